"""Resuming: the checkpoint, whether it is of the same run, and its state put back."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

import exits
import util
from checkpoint import load_checkpoint, restore_random_states
from flags import args_of, differing_flags, may_change_flags, unread_flags, with_levels
from quantizers import Quantizer, build_quantizer
from run.folder import RunFolder
from segment import is_segment

TRAINING_STATE = {  # what `train.py` adds to weights and flags
    **dict.fromkeys(("step", "train_images", "interval_count", "threads"), int),
    **dict.fromkeys(("best_psnr", "interval_seconds", "seconds"), float),
    **dict.fromkeys(("interval_sums", "skipped"), torch.Tensor),
    **dict.fromkeys(("optimizer", "random", "train_fingerprint"), dict),
    **dict.fromkeys(("segments", "skipped_images"), list),
}
YOUNGER = ("train_fingerprint", "segments", "skipped_images")

# What PyTorch and Python raise for a state that is not of this model, or damaged.
UNFIT = (LookupError, TypeError, AttributeError, ArithmeticError, ValueError, RuntimeError)
MAX_THREADS = 512  # of a checkpoint that another machine wrote


def find_resumed(
    args: Namespace, default_name: str, quantizer: Quantizer, train_set: Dataset
) -> dict | None:
    """What --resume continues; None: nothing.

    Returns:
        The checkpoint, and its `path`, the folder of its `run`, and the names of the `checkpoints`
        that are there.

    Raises:
        ValueError: there is none, it is damaged, or it belongs to another run.
    """
    found = _find(args, default_name)
    if found is None:
        return None
    path, saved, checkpoints = found
    # Older checkpoints lack some.
    saved = {**{name: TRAINING_STATE[name]() for name in YOUNGER}, **saved}
    whole = all(type(saved.get(name)) is kind for name, kind in TRAINING_STATE.items())
    whole = whole and all(map(is_segment, saved["segments"]))
    whole = whole and all(saved[name] >= 0 for name in ("interval_seconds", "seconds"))
    whole = whole and all(isinstance(name, str) for name in saved["skipped_images"])
    if not whole or saved["skipped"].shape != (2,) or not saved["interval_sums"].dim():
        raise ValueError(f"{path} holds no training state: give a last.pt or step_*.pt of a run")
    _check_same_run(path, saved, args, quantizer, train_set)
    run = str(path.parent)
    return {**saved, "path": str(path), "run": run, "checkpoints": checkpoints}


def _find(args: Namespace, default_name: str) -> tuple[Path, dict, list[str]] | None:
    """The checkpoint of --resume: its file, what it holds, and the checkpoints beside it."""
    if args.resume is None:
        return None
    automatic = args.resume == "auto"
    path = Path((args.save or Path("runs", default_name)) if automatic else args.resume)
    folder = path.parent if path.is_file() else path
    # Before the newest one is read: one that another process saves from now on is not known.
    checkpoints = [each.name for _, each in RunFolder(folder).checkpoints()]
    if path.is_file():
        saved = load_checkpoint(path)
        if not (folder / "args.json").is_file():
            raise ValueError(
                f"--resume {path} is not in the folder of a run, which has an args.json: give a "
                "file of a run, or start a new run from its weights with --load"
            )
    else:
        found = RunFolder(folder).newest_checkpoint()
        if found is None and automatic:
            return None
        if found is None:
            raise ValueError(
                f"--resume {folder} holds no checkpoint: give a run folder, a .pt file, or auto"
            )
        path, saved = found
    if not automatic and args.save and Path(args.save).resolve() != folder.resolve():
        raise ValueError(
            f"--resume {args.resume} continues the run in {folder}, not in --save {args.save}: "
            "leave --save out, or start a new run from the weights with --load"
        )
    return path, saved, checkpoints


def _check_same_run(
    path: Path, saved: dict, args: Namespace, quantizer: Quantizer, train_set: Dataset
) -> None:
    """Raises ValueError if the images or the flags make another run than the checkpoint's."""
    if saved["train_images"] != len(train_set):
        raise ValueError(
            f"{path} is of a run on {saved['train_images']:,} training images, but "
            f"--train-data-path has {len(train_set):,}: give the same images to resume it"
        )
    try:
        before = args_of(saved)
        before = with_levels(before, build_quantizer(before))
    except ValueError as error:
        raise ValueError(f"{path} cannot be resumed: {error}") from error
    may_change = {*may_change_flags(), *unread_flags(quantizer)}
    if not args.perceptual_weight:
        may_change.add("lpips_net")  # then it is only measured
    differ = differing_flags(before, with_levels(args, quantizer), {*may_change, "precision"})
    there = saved["segments"][-1].get("precision") if saved["segments"] else before.precision
    here = util.training_precision(args.precision)
    if there not in (None, here):
        differ.append(f"--precision {there} there, {here} here")
    if differ:
        raise ValueError(
            f"{path} is of another run: {'; '.join(differ)}: give the same flags to resume it"
        )
    # A packed folder has names, and no sizes.
    there, here = saved["train_fingerprint"], train_set.fingerprint()
    other = [what for what in here if what in there and here[what] != there[what]]
    if other and not args.allow_other_images:
        raise ValueError(
            f"{path} is of a run on other training images (their {' and '.join(other)} differ): "
            "give the same images, or --allow-other-images to resume it with these"
        )


def restore(
    resumed: dict, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> None:
    """Put back weights, moments of the optimizer and random states of a checkpoint.

    Raises:
        ValueError: they are those of another model, or damaged.
    """
    try:
        model.load_state_dict(resumed["model"])
        moments = resumed["optimizer"]["state"]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for number, parameter in enumerate(parameters):
            own = moments.get(number, {})  # empty before the first step
            shapes = {name: value.shape for name, value in own.items()}
            like = dict(step=torch.Size(), exp_avg=parameter.shape, exp_avg_sq=parameter.shape)
            if own and shapes != like:
                raise ValueError(f"moments of parameter {number} do not fit")
        # The hyperparameters are those of the flags, which are the same.
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
        restore_random_states(resumed["random"])
        if device.type == "cpu":
            if not 1 <= resumed["threads"] <= MAX_THREADS:
                raise ValueError(f"{resumed['threads']} threads")
            torch.set_num_threads(resumed["threads"])  # sums are rounded by threads
    except UNFIT as error:
        raise ValueError(
            f"{resumed['path']} holds the training state of another model, or is damaged "
            f"({exits.one_line(error)}): use an older checkpoint"
        ) from error
