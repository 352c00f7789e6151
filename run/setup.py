"""The parts of a run that are built from its flags: images, start, batches, folder."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import util
from dataset import ImageDataset, build_dataset
from dataset.loaders import train_loader, val_loader
from exits import StopSignals
from model import VQVAE, load_weights
from run.folder import RunFolder
from run.resume import Resumed, check_begun_alike, find_resumed


def build_datasets(args: Namespace) -> tuple[ImageDataset, ImageDataset]:
    """The images for training and for validation.

    Raises:
        ValueError: there are no such images, or the batch does not divide among the processes.
    """
    if args.batch_size % util.world_size():
        raise ValueError(
            f"--batch-size {args.batch_size} does not divide among {util.world_size()} "
            f"processes: give a multiple of {util.world_size()}"
        )

    def images(path: str, train: bool) -> ImageDataset:
        return build_dataset(path, args.img_size, args.seed, train, skip_corrupt=args.skip_corrupt)

    return images(args.train_data_path, train=True), images(args.val_data_path, train=False)


def find_start(
    args: Namespace, name: str, model: VQVAE, train_set: ImageDataset, steps: int
) -> Resumed | None:
    """The checkpoint of --resume; without one, put the weights of --load into the model.

    Args:
        args: the flags; `load` becomes that of the resumed run.
        name: of the run folder, without --save.
        model: whose weights are replaced by those of --load.
        train_set: the training images.
        steps: the last step of the run.

    Raises:
        ValueError: the checkpoint is damaged, of another run or model, or after the last step.
    """
    resumed = util.on_main(lambda: find_resumed(args, name, train_set))
    if resumed is None:
        if args.load:
            load_weights(model, args, args.load)
        return None
    args.load = resumed.args.get("load")
    if resumed.state.step > steps:
        raise ValueError(
            f"the checkpoint is at step {resumed.state.step}, but these flags end the run at step "
            f"{steps}: give more --max-train-epochs or --train-iters"
        )
    return resumed


def start_loaders(
    args: Namespace,
    train_set: ImageDataset,
    val_set: ImageDataset,
    start_step: int,
    steps: int,
    device: torch.device,
    stop: StopSignals,
) -> tuple[DataLoader, DataLoader]:
    """This process's batches of steps start_step + 1 .. steps, and those for validation."""
    batches = train_loader(
        train_set,
        batch_size=args.batch_size // util.world_size(),
        steps=steps,
        seed=args.seed,
        start_step=start_step,
        num_workers=args.num_workers,
        rank=util.rank(),
        world_size=util.world_size(),
        device=device,
        stop=stop,
    )
    val_batches = val_loader(
        val_set,
        batch_size=min(args.batch_size, 64),
        num_workers=args.num_workers,
        rank=util.rank(),
        world_size=util.world_size(),
        device=device,
        stop=stop,
    )
    if args.num_workers:
        iter(val_batches)  # starts its processes, before there are threads to fork beside
    return batches, val_batches


def open_folder(
    args: Namespace,
    name: str,
    resumed: Resumed | None,
    steps: int,
    environment: dict,
    stack: contextlib.ExitStack,
) -> RunFolder:
    """The run folder, made or taken from `resumed`, locked, and ready for the first step.

    The main process alone locks it and writes there.

    Args:
        args: the flags, which are recorded in the folder.
        name: the name of a new folder under runs/, without --save.
        resumed: the checkpoint to continue; None: a new run.
        steps: the last step of the run.
        environment: the result of `util.environment`, which is recorded in the folder.
        stack: releases the lock, and explains the errors of diverged numbers and full disks.

    Raises:
        ValueError: the folder is of another run, or held by another process.
    """
    folder = resumed.path.parent if resumed else util.on_main(lambda: _new_folder(args, name))
    run = RunFolder(folder, step=resumed.state.step if resumed else 0)
    stack.enter_context(run.explained_errors(args.lr))

    def lock_and_begin() -> None:
        stack.enter_context(run.locked())
        if resumed:
            run.resume(
                vars(args),
                environment,
                checkpoint=resumed.path,
                step=resumed.state.step,
                seen=resumed.seen,
                steps=steps,
                keep=args.keep,
                overwrite=args.overwrite,
                tensorboard=args.tensorboard,
            )
        else:
            run.begin(
                vars(args),
                environment,
                overwrite=args.overwrite,
                tensorboard=args.tensorboard,
            )

    util.on_main(lock_and_begin)
    return run


def _new_folder(args: Namespace, name: str) -> Path:
    resuming = args.resume == "auto"
    run = RunFolder.create(
        args.save, default_name=name, overwrite=args.overwrite, resuming=resuming
    )
    if resuming and not args.overwrite:
        check_begun_alike(run.path, args)
    return run.path
