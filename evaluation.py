"""What the scripts that measure checkpoints share: set-up, stages, two models image by image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import util
from dataset import build_dataset
from dataset.base import ImageDataset
from dataset.loaders import val_loader
from loss import Perceptual, lpips_if_available
from metric import CodeUsage, ImageMetrics
from model import VQVAE, load_model
from output import LOWER_IS_BETTER, METRICS, printable
from quantizers import Quantized


class Checkpoint(NamedTuple):
    """A trained model and where it comes from."""

    path: str
    name: str  # of the configuration (`--name`), or of the quantizer
    step: int | None  # training steps
    model: VQVAE  # in evaluation mode, on the device of the evaluation


class Evaluation(NamedTuple):
    """Checkpoints and the images to measure them on."""

    checkpoints: list[Checkpoint]
    images: ImageDataset
    img_size: int  # pixels a side
    loader: DataLoader  # batches of this process's share of `images`
    perceptual: Perceptual | None  # LPIPS on `device`
    device: torch.device  # the GPU of this process, or the CPU


def prepare(
    paths: Sequence[str],
    data: str,
    img_size: int | None = None,
    lpips_net: str | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
) -> Evaluation:
    """Load checkpoints, images and LPIPS for an evaluation in plain float32.

    Args:
        paths: checkpoints.
        data: what `dataset.build_dataset` takes: a folder, packed images, tars, or 'synthetic'.
        img_size: pixels a side; None: as the checkpoints were trained.
        lpips_net: network of LPIPS, or 'none'; None: that of the first checkpoint. Weights that
            are missing are reported in one line, and the evaluation goes on without LPIPS.
        batch_size: images at a time; no effect on values beyond rounding.
        num_workers: loading processes.

    Raises:
        ValueError: a file is no checkpoint, a folder holds no images, or `img_size` is None and
            the checkpoints were trained at different sizes.
    """
    device = util.setup_processes()
    util.share_cores(num_workers)
    util.set_float32_precision("ieee")
    checkpoints, first = [], None  # the flags of the first one
    for path in paths:
        model, args, saved = load_model(path)
        first = first or args
        if img_size is None and args.img_size != first.img_size:
            raise ValueError(
                f"{path} was trained at {args.img_size} pixels, {paths[0]} at {first.img_size}: "
                "give --img-size"
            )
        name = printable(args.name or model.quantizer.name)
        checkpoints.append(Checkpoint(path, name, saved.get("step"), model.to(device)))
    size = img_size or first.img_size
    images = build_dataset(data, size, first.seed, train=False)
    share = dict(rank=util.rank(), world_size=util.world_size(), device=device)
    return Evaluation(
        checkpoints=checkpoints,
        images=images,
        img_size=size,
        loader=val_loader(images, batch_size, num_workers, **share),
        perceptual=lpips_if_available(lpips_net or first.lpips_net, device, size),
        device=device,
    )


@torch.no_grad()
def evaluate_stages(
    model: VQVAE,
    loader: Iterable[Tensor],
    perceptual: Perceptual | None,
    device: torch.device | str,
) -> list[dict]:
    """Measure each stage of a quantizer, over all images of all processes.

    A quantizer that is not residual has one. The residual of stage k is z minus what the first
    k - 1 stages decode to. RMS is taken over all elements, in the units of the latent z (B, C, H/f,
    W/f). Arguments as for `metric.evaluate`.

    Returns:
        One dictionary a stage. Of the stage alone: what `CodeUsage.compute` gives,
        'residual_rms_before' and 'residual_rms_after' it, and 'fsq_input_rms' (of a residual FSQ,
        else None). Of all stages up to it: 'bits' (per position, side information included) and, of
        the images that they decode to, 'psnr', 'ssim', 'l1', 'lpips' and 'paper' {l1, psnr, lpips}.
    """
    quantizer = model.quantizer
    metrics = [ImageMetrics(perceptual) for _ in range(quantizer.stages)]
    usage = CodeUsage(quantizer.codebook_sizes, quantizer.stage_axis)
    # Sums of squares: of z and of the residual after each stage, and of the input of each FSQ.
    squares = torch.zeros(2, quantizer.stages + 1, dtype=torch.float64)
    elements, positions = 0, 0
    with util.in_evaluation_mode(model):
        for batch in loader:
            images = batch.to(device).float() / 255
            z = model.to_latent(images).float()
            quantized = Quantized(*quantizer(z))
            after = quantizer.codes_after_each_stage(quantized.indices, quantized.statistics)
            squares[0, 0] += _sum_of_squares(z)
            for k, (metric, before, codes) in enumerate(
                zip(metrics, [None, *after[:-1]], after, strict=True)
            ):
                entering = quantizer.stage_input(k, z, before)
                squares[1, k] += math.nan if entering is None else _sum_of_squares(entering)
                squares[0, k + 1] += _sum_of_squares(z - codes)
                metric.update(images, model.to_images(codes))
            usage.update(quantized.indices)
            elements += z.numel()
            positions = z[0, 0].numel()

    elements, positions = sum(util.from_all(elements)), max(util.from_all(positions))
    residual, inputs = (sum(util.from_all(squares)) / elements).sqrt().tolist()
    rows = usage.compute()
    for k, (row, metric) in enumerate(zip(rows, metrics, strict=True)):
        row["bits"] = quantizer.bits_with_side_information(positions, stages=k + 1)
        row["residual_rms_before"], row["residual_rms_after"] = residual[k : k + 2]
        row["fsq_input_rms"] = None if math.isnan(inputs[k]) else inputs[k]
        row |= metric.compute()
        del row["images"]
    return rows


def _sum_of_squares(x: Tensor) -> Tensor:
    """The sum of the squares of all elements, float64, on the CPU."""
    return x.double().square().sum().cpu()


def differences(first: dict, other: dict) -> dict:
    """How another model differs from the first on the same images, from two results of `evaluate`.

    Returns:
        For each of 'psnr', 'ssim', 'l1' and 'lpips': 'mean', that of the other minus that of the
        first; 'half_width' of its 95 % interval, 1.96 s / sqrt(images) with s the standard
        deviation of the differences of the images (None of one image); 'better', the share of the
        images in which the other is better. None for a metric that is missing. The interval is for
        the choice of images, and for these two models: other seeds of training are not in it.
    """
    result: dict[str, dict | None] = {}
    for metric in METRICS:
        a, b = first["per_image"][metric], other["per_image"][metric]
        if a is None or b is None:
            result[metric] = None
            continue
        d = torch.tensor(b, dtype=torch.float64) - torch.tensor(a, dtype=torch.float64)
        better = d < 0 if metric in LOWER_IS_BETTER else d > 0
        result[metric] = {
            "mean": d.mean().item(),
            "half_width": 1.96 * d.std().item() / math.sqrt(len(d)) if len(d) > 1 else None,
            "better": better.double().mean().item(),
        }
    return result
