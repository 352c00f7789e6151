"""The printed lines of a training run, and the records of its log and its results."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import util
from checkpoint import LAST
from dataset import ImageDataset, print_skipped
from flags import ignored_flags
from model import VQVAE
from run.progress import Progress
from run.resume import Resumed


def print_start(
    args: Namespace,
    model: VQVAE,
    train_set: ImageDataset,
    val_set: ImageDataset,
    steps: int,
    device: torch.device,
    precision: str,
    compiled: bool,
    folder: Path,
    resumed: Resumed | None,
    changed: Sequence[str],
) -> None:
    """Print what is about to be trained, and a warning for each flag that has no effect.

    `changed`: what has changed since the interruption of a resumed run.
    """
    quantizer = model.quantizer
    for flag in ignored_flags(args, quantizer):
        print(f"warning: {flag} has no effect on {quantizer.name}", file=sys.stderr)
    suffix = ", compiled" if compiled else ""
    images = f"{len(train_set):,} training images"
    if train_set.endless:
        images = f"endless training images (an epoch: {len(train_set):,})"
    side = f" and {quantizer.side_bits:g} per image" if quantizer.side_bits else ""
    print(
        f"{quantizer.name}: {quantizer.bits:.4g} bits per position{side}, f = {model.f}, "
        f"{number_of_parameters(model):,} parameters\n"
        f"{images}, {len(val_set):,} for validation; "
        f"{steps:,} steps of {args.batch_size} on {device} in {precision}{suffix}; "
        f"run folder {folder}",
    )
    if resumed:
        print(f"resumed after step {resumed.state.step} from {resumed.path}")
    if changed:
        print(f"not bit for bit equal to an uninterrupted run: {'; '.join(changed)}")
    sys.stdout.flush()


def number_of_parameters(model: VQVAE) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters())


# ---------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------
def training_record(
    step: int,
    epoch: float,
    lr: float,
    means: dict[str, float | None],
    images_per_s: float,
    device: torch.device,
    indices: Tensor,
    stage_axis: bool,
) -> dict:
    """The record of an interval of training for metrics.jsonl.

    Args:
        step: the last step of the interval.
        epoch: how often all images were seen, as a fraction.
        lr: the learning rate of that step.
        means: the result of `Meter.compute`.
        images_per_s: the speed of the interval.
        device: where the model is trained.
        indices: the codes of the last batch of this process, the stages in the last dimension if
            there is a `stage_axis`.
    """
    stages = indices.unbind(-1) if stage_axis else [indices]
    return {
        "kind": "train",
        "step": step,
        "epoch": round(epoch, 4),
        "lr": lr,
        **means,
        "images_per_s": round(images_per_s, 1),
        "peak_memory_mib": util.peak_memory_mib(device),
        "codes_in_batch": [len(torch.unique(stage)) for stage in stages],
    }


def print_training(record: dict, terms: Sequence[str], steps: int) -> None:
    """Print a record of training in one line: the terms of the loss, learning rate and speed."""
    words = [f"{name} {record[name]:.4f}" for name in terms if record[name] is not None]
    if "skipped_steps" in record:
        words.append(f"{record['skipped_steps']} steps skipped so far")
    print(
        f"step {record['step']}/{steps}  epoch {record['epoch']:.2f}  {'  '.join(words)}  "
        f"lr {record['lr']:.2e}  {record['images_per_s']:.0f} images/s",
        flush=True,
    )


def show_progress(bar: tqdm, record: dict) -> None:
    """Show a record of training beside the progress bar."""
    bar.set_postfix(
        loss="skipped" if record["loss"] is None else f"{record['loss']:.4f}",
        lr=f"{record['lr']:.2e}",
        images_s=f"{record['images_per_s']:.0f}",
    )


# ---------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------
def print_evaluation(step: int, steps: int, result: dict) -> None:
    """Print a result of `metric.evaluate` in one line, above the progress bar."""
    net = result["lpips_net"]
    lpips = f"  LPIPS-{net} {result['lpips']:.4f}" if net else ""
    tqdm.write(
        f"step {step}/{steps}  validation: PSNR {result['psnr']:.2f} dB  "
        f"SSIM {result['ssim']:.4f}  L1 {result['l1']:.4f}{lpips}"
    )


def results_of_run(
    args: Namespace,
    model: VQVAE,
    progress: Progress,
    evaluation: dict,
    validations: list[dict],
    steps: int,
    precision: str,
    environment: dict,
) -> dict:
    """The content of results.json. A collective.

    Args:
        args: the flags.
        model: its quantizer's name is the default name of the run.
        progress: that of the whole run.
        evaluation: the result of the last evaluation.
        validations: step and metrics of all evaluations.
        steps: how many steps were trained.
        precision: `fp32` or `bf16`.
        environment: the result of `util.environment`.
    """
    return {
        "name": args.name or model.quantizer.name,
        **evaluation,
        "validations": validations,
        "parameters": number_of_parameters(model),
        "steps": steps,
        "batch_size": args.batch_size,
        "images_seen": steps * args.batch_size,
        "train_images": len(progress.train_set),
        "seconds": round(progress.seconds(), 1),
        "skipped_steps": int(progress.meter.skipped[0]),
        "skipped_images": progress.skipped_images(),
        "seed": args.seed,
        "precision": precision,
        "train_data": args.train_data_path,
        "val_data": args.val_data_path,
        "checkpoint": LAST,
        "environment": environment,
        "segments": progress.segments,
        "args": vars(args),
    }


def print_end(table: str, skipped: list[str], folder: Path) -> None:
    """Print the table of the results, the images that were skipped, and the run folder."""
    print_skipped(skipped)
    print(f"\n{table}\n\nresults, pictures and checkpoints: {folder}", flush=True)
