"""Resuming: a checkpoint is found, compared with the flags, and its state restored."""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import exits
import util
from checkpoint import load_checkpoint, restore_random_states
from dataset import ImageDataset
from files import parse_json
from flags import args_of, differing_flags, may_change_flags, unread_flags, with_values_in_use
from quantizers import build_quantizer
from run.folder import RunFolder
from run.state import RunState

# Errors of PyTorch and Python for a state that is damaged or of another model.
UNFIT = (LookupError, TypeError, AttributeError, ArithmeticError, ValueError, RuntimeError)
MAX_THREADS = 512  # of a checkpoint that another machine wrote


@dataclass
class Resumed:
    """The checkpoint that --resume continues.

    Attributes:
        path: its file, in the run folder.
        seen: names of the checkpoints that were in the folder when this one was chosen.
        model: the weights, by name.
        optimizer: the state of Adam.
        args: the flags, by name.
        state: everything else.
    """

    path: Path
    seen: list[str]
    model: dict
    optimizer: dict
    args: dict
    state: RunState


def find_resumed(args: Namespace, default_name: str, train_set: ImageDataset) -> Resumed | None:
    """The checkpoint that --resume continues, or None for a new run.

    Raises:
        ValueError: there is none, it is damaged, or it belongs to another run.
    """
    found = _find(args, default_name)
    if found is None:
        return None
    path, saved, seen = found
    try:
        state = RunState.from_checkpoint(saved)
    except ValueError as error:
        raise ValueError(
            f"{path} holds no training state ({error}): give a last.pt or step_*.pt of a run"
        ) from error
    resumed = Resumed(
        path=path,
        seen=seen,
        model=saved["model"],
        optimizer=saved.get("optimizer", {}),
        args=saved["args"],
        state=state,
    )
    _check_same_run(resumed, args, train_set)
    return resumed


def _find(args: Namespace, default_name: str) -> tuple[Path, dict, list[str]] | None:
    """The file of --resume, its content, and the names of all checkpoints in its folder."""
    if args.resume is None:
        return None
    automatic = args.resume == "auto"
    path = Path((args.save or Path("runs", default_name)) if automatic else args.resume)
    folder = path.parent if path.is_file() else path
    # Listed before the newest one is read: `RunFolder` refuses to delete a checkpoint that another
    # process saves from now on.
    seen = [each.name for _, each in RunFolder(folder).checkpoints()]
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
    return path, saved, seen


def _check_same_run(resumed: Resumed, args: Namespace, train_set: ImageDataset) -> None:
    """Raises ValueError if the flags or the training images differ from those of the checkpoint."""
    path, state = resumed.path, resumed.state
    if state.train_images != len(train_set):
        raise ValueError(
            f"{path} is of a run on {state.train_images:,} training images, but "
            f"--train-data-path has {len(train_set):,}: give the same images to resume it"
        )
    try:
        before = args_of({"args": resumed.args})
        differ = _differing(before, args)
    except ValueError as error:
        raise ValueError(f"{path} cannot be resumed: {error}") from error
    there = state.segments[-1].get("precision") if state.segments else before.precision
    here = util.training_precision(args.precision)
    if there not in (None, here):
        differ.append(f"--precision {there} there, {here} here")
    if differ:
        raise ValueError(
            f"{path} is of another run: {'; '.join(differ)}: give the same flags to resume it"
        )
    # A packed folder has names, and no sizes.
    there, here = state.train_fingerprint, train_set.fingerprint()
    other = [name for name in here if name in there and here[name] != there[name]]
    if other and not args.allow_other_images:
        raise ValueError(
            f"{path} is of a run on other training images (their {' and '.join(other)} differ): "
            "give the same images, or --allow-other-images to resume it with these"
        )


def _differing(before: Namespace, args: Namespace) -> list[str]:
    """The flags, but --precision, that make `args` another run than `before`.

    Raises:
        ValueError: there is no quantizer of the flags `before`.
    """
    with torch.device("meta"):  # no memory for a codebook
        there, here = build_quantizer(before), build_quantizer(args)
    may_change = {*may_change_flags(), *unread_flags(here), "precision"}
    if not args.perceptual_weight:
        may_change.add("lpips_net")  # it is a metric then, and no part of the loss
    before, now = with_values_in_use(before, there), with_values_in_use(args, here)
    return differing_flags(before, now, may_change)


def check_begun_alike(folder: Path, args: Namespace) -> None:
    """Raises ValueError unless a run that ended in `folder` without a checkpoint had these flags.

    A folder without an args.json is a new one.
    """
    if not (folder / "args.json").exists():
        return
    advice = "give another --save, or --overwrite it"
    try:
        flags = parse_json((folder / "args.json").read_bytes())
        if not (isinstance(flags, dict) and {"quantizer", "train_data_path"} <= flags.keys()):
            raise ValueError("it lacks flags of train.py")
        differ = _differing(args_of({"args": flags}), args)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / 'args.json'} is not of a run that can begin again ({error}): {advice}"
        ) from error
    if differ:
        raise ValueError(
            f"{folder} holds another run, without a checkpoint: {'; '.join(differ)}: {advice}"
        )


def best_psnr(state: RunState, run: RunFolder, validation: str) -> float:
    """The PSNR above which a checkpoint becomes the new best.pt. In the main process.

    -inf, if best.pt is not there, or was chosen by validation images other than `validation`.
    """
    same_images = state.validation in ("", validation)
    if not same_images or not (run.path / "best.pt").exists():
        return -math.inf
    # A checkpoint is saved before its own evaluation, which therefore is only in the log.
    logged = [record["psnr"] for record in run.validations(validation)]
    return max([state.best_psnr, *logged])


def owes_evaluation(run: RunFolder, validation: str, step: int, steps: int, interval: int) -> bool:
    """Whether a run that continues after `step` still has to evaluate the model of that step.

    It was stopped between the checkpoint and the evaluation. In the main process.
    """
    if step == 0:
        return False
    if step == steps:
        return True
    evaluated = [record["step"] for record in run.validations(validation)]
    return step % interval == 0 and step not in evaluated


def restore(
    resumed: Resumed, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> None:
    """Restore weights, moments of the optimizer, random states and the number of threads.

    Raises:
        ValueError: they are damaged, or of another model.
    """
    try:
        model.load_state_dict(resumed.model)
        moments = resumed.optimizer["state"]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for number, parameter in enumerate(parameters):
            own = moments.get(number, {})  # empty before the first step
            shapes = {name: value.shape for name, value in own.items()}
            like = dict(step=torch.Size(), exp_avg=parameter.shape, exp_avg_sq=parameter.shape)
            if own and shapes != like:
                raise ValueError(f"moments of parameter {number} do not fit")
        # The hyperparameters come from the flags, which are the same.
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
        restore_random_states(resumed.state.random)
        if device.type == "cpu":
            threads = resumed.state.threads
            if not 1 <= threads <= MAX_THREADS:
                raise ValueError(f"{threads} threads")
            torch.set_num_threads(threads)  # the rounding of sums depends on it
    except UNFIT as error:
        raise ValueError(
            f"{resumed.path} holds the training state of another model, or is damaged "
            f"({exits.one_line(error)}): use an older checkpoint"
        ) from error
