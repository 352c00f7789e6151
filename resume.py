"""What a run is resumed from: the checkpoint, and whether it is of the same run."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch
from torch.utils.data import Dataset

from arguments import args_of, may_change_flags, unread_flags
from checkpoint import load_checkpoint
from quantizers import Quantizer
from run import RunFolder

TRAINING_STATE = {  # what `train.py` adds to weights and flags
    **dict.fromkeys(("step", "train_images", "interval_count", "threads"), int),
    **dict.fromkeys(("best_psnr", "interval_seconds", "seconds"), float),
    **dict.fromkeys(("interval_sums", "skipped"), torch.Tensor),
    **dict.fromkeys(("optimizer", "random", "train_fingerprint"), dict),
}


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
    if args.resume is None:
        return None
    automatic = args.resume == "auto"
    folder = Path((args.save or Path("runs", default_name)) if automatic else args.resume)
    is_file = folder.is_file()
    path, folder = folder, folder.parent if is_file else folder
    # Before the newest one is read: one that another process saves from now on is not known.
    checkpoints = [path.name for _, path in RunFolder(folder).checkpoints()]
    if is_file:
        saved = load_checkpoint(path)
        if not (folder / "args.json").is_file():
            raise ValueError(
                f"--resume {path} is not in the folder of a run, which has an args.json: give a "
                "file of a run, or start a new run from its weights with --load"
            )
    else:
        found = RunFolder(folder).newest_checkpoint()
        if found is None and automatic:
            args.save = str(folder)
            return None
        if found is None:
            raise ValueError(
                f"--resume {folder} holds no checkpoint: give a run folder, a .pt file, or auto"
            )
        path, saved = found
    saved.setdefault("train_fingerprint", {})  # checkpoints from before it lack it
    whole = all(type(saved.get(name)) is kind for name, kind in TRAINING_STATE.items())
    if not whole or saved["skipped"].shape != (2,) or not saved["interval_sums"].dim():
        raise ValueError(f"{path} holds no training state: give a last.pt or step_*.pt of a run")
    if saved["train_images"] != len(train_set):
        raise ValueError(
            f"{path} is of a run on {saved['train_images']:,} training images, here are "
            f"{len(train_set):,}, which come in another order: give the same images to resume it"
        )
    try:
        before = vars(args_of(saved))
    except ValueError as error:
        raise ValueError(f"{path} cannot be resumed: {error}") from error
    may_change = {*may_change_flags(), *unread_flags(quantizer)}
    if not args.perceptual_weight:
        may_change.add("lpips_net")  # then it is only measured
    differ = [
        f"--{name.replace('_', '-')} {before[name]} there, {value} here"
        for name, value in vars(args).items()
        if name not in may_change and before[name] != value
    ]
    if differ:
        raise ValueError(
            f"{path} is of another run: {'; '.join(differ)}: give the same flags to resume it"
        )
    # Checkpoints from before fingerprints have none; a packed folder has names, and no sizes.
    before, now = saved["train_fingerprint"], train_set.fingerprint()
    other = [what for what in now if what in before and now[what] != before[what]]
    if other and not args.allow_other_images:
        raise ValueError(
            f"{path} is of a run on other training images (their {' and '.join(other)} differ): "
            "give the same images, or --allow-other-images to resume it with these"
        )
    return {**saved, "path": str(path), "run": str(folder), "checkpoints": checkpoints}
