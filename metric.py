"""What is reported: L1, PSNR, SSIM, LPIPS, code usage and bits, over every image of a split.

Metrics are kept per image and counts are added up over processes, so that the last partial batch
and uneven shards weigh what they should. The field's units and the paper's (arXiv 2508.15860):

    unit    L1                    PSNR                          SSIM             LPIPS inputs
    field   [0, 1], clamped       peak 1, [0, 1], clamped       [0, 1], clamped  [-1, 1], clamped
    paper   ImageNet-normalised   peak 2, ImageNet-normalised   -                [0, 1]

The paper's units use the reconstruction as the model gives it: its code does not clamp. PSNR and
SSIM are taken per image and then averaged. SSIM: Wang et al. 2004, see `ssim`. LPIPS: arXiv
1801.03924.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

import exits
import output
import util
from checkpoint import NotFinite
from fid import FrechetDistance
from loss.perceptual import Perceptual
from networks import IMAGENET_STD
from quantizers import Quantizer
from similarity import check_range, l1, psnr, ssim

DENSE_LIMIT = 2**20  # codebooks above this size are counted by sorting, not in an array
MERGE_ABOVE = 2**20  # codes that may wait to be merged, beside as many as are merged already
FIELD, PAPER = ("l1", "psnr", "ssim", "lpips"), ("l1", "psnr", "lpips")  # of the table above


class ImageMetrics:
    """The metrics of the table above, image by image, and their means.

    Args:
        perceptual: LPIPS on the images' device; None: no LPIPS.
        paper: whether to compute the paper's units as well, which doubles the work for LPIPS.
    """

    def __init__(self, perceptual: Perceptual | None, paper: bool = True) -> None:
        self.perceptual, self.paper = perceptual, paper
        self.names = [*FIELD, *(f"paper_{name}" for name in PAPER if paper)]
        self.values = [torch.zeros(len(self.names), 0, dtype=torch.float64)]  # (metrics, B) each

    @torch.no_grad()
    def update(self, images: Tensor, reconstruction: Tensor) -> None:
        """Add a batch of images in [0, 1] and their reconstructions, (B, 3, H, W) each.

        Reconstructions may exceed [0, 1]; they are clamped for all units but the paper's.

        Raises:
            ValueError: unequal shapes, originals outside [0, 1], images too small for SSIM or
                LPIPS.
        """
        if images.shape != reconstruction.shape:
            got = f"images {tuple(images.shape)}, reconstruction {tuple(reconstruction.shape)}"
            raise ValueError(f"shapes must be equal: {got}")
        if len(images) == 0:
            return
        images, reconstruction = images.float(), reconstruction.float()
        check_range(images)
        none = torch.zeros(len(images), device=images.device)
        a, b = images.clamp(0, 1), reconstruction.clamp(0, 1)
        values = [l1(a, b), psnr(a, b), ssim(a, b)]
        values += [self.perceptual(a, b) if self.perceptual else none]
        if self.paper:
            # The mean cancels in every difference, so only ImageNet's std is divided by.
            std = torch.tensor(IMAGENET_STD, device=images.device).view(3, 1, 1)
            a, b = images / std, reconstruction / std
            values += [l1(a, b), psnr(a, b, peak=2.0)]
            values += [self.perceptual(images, reconstruction, True) if self.perceptual else none]
        self.values.append(torch.stack([value.double() for value in values]).cpu())
        if not reconstruction.isfinite().all():  # clamped, an infinite pixel has a finite error
            self.values[-1].fill_(math.nan)

    def compute(self, per_image: bool = False) -> dict:
        """Means over the images of all processes (a collective: every process calls it).

        Returns:
            'l1', 'psnr', 'ssim', 'lpips', 'images' (their number), and 'paper' {l1, psnr, lpips}
            unless the paper's units are left out. With `per_image` also 'per_image' {l1, psnr,
            ssim, lpips}: a list of the values of all images, those of process 0 first, each
            process's in the order of `update`. LPIPS is None without a network.

        Raises:
            ValueError: if no process had an image.
            NotFinite: for reconstructions that have no distance.
        """
        values = torch.cat(util.from_all(torch.cat(self.values, dim=1)), dim=1)
        images = values.shape[1]
        if images == 0:
            raise ValueError("there are no images to evaluate: the split is empty")
        if not values.isfinite().all():
            raise NotFinite("the reconstructions are not finite: the model has diverged")
        means = dict(zip(self.names, values.mean(dim=1).tolist(), strict=True))
        each = dict(zip(self.names, values.tolist(), strict=True)) if per_image else {}
        if self.perceptual is None:
            missing = {name: None for name in self.names if name.endswith("lpips")}
            means, each = means | missing, each | missing
        result = {name: means[name] for name in FIELD}
        if self.paper:
            result["paper"] = {name: means[f"paper_{name}"] for name in PAPER}
        if per_image:
            result["per_image"] = {name: each[name] for name in FIELD}
        return {**result, "images": images}


def bicubic_reference(images: Tensor, f: int) -> Tensor:
    """Images scaled down by f (bicubic, antialiased) and up again, clamped: a reference.

    Images (B, 3, H, W) in [0, 1] in and out. As PyTorch computes them: the kernel has a = -0.5 on
    the way down, where it is antialiased, and a = -0.75 on the way up. With -0.5 both ways, as in
    Pillow, PSNR is about 0.2 dB lower.
    """
    size = [max(1, side // f) for side in images.shape[2:]]
    small = interpolate(images, size=size, mode="bicubic", antialias=True)
    return interpolate(small, size=images.shape[2:], mode="bicubic").clamp(0, 1)


def mean_colour_reference(images: Tensor) -> Tensor:
    """Each image's mean colour everywhere, (B, 3, H, W): three numbers an image, a reference."""
    return images.mean(dim=(2, 3), keepdim=True).expand_as(images)


class CodeUsage:
    """How many codes of each stage are used, and how evenly.

    With pairs of positions, the two tokens of a pair are counted together.

    `codebook_sizes`: codes of each stage, 2^40 and more included. `stage_axis`: whether indices
    have a last axis of stages; by default if there are several.
    """

    def __init__(self, codebook_sizes: list[int], stage_axis: bool | None = None) -> None:
        self.codebook_sizes = list(codebook_sizes)
        self.stage_axis = len(self.codebook_sizes) > 1 if stage_axis is None else stage_axis
        # Of each stage a list of (2, n) tensors, a row of codes and one of their counts: memory
        # grows with the codes that were seen, not with the codebook.
        self.parts = [[torch.zeros(2, 0, dtype=torch.int64)] for _ in self.codebook_sizes]

    def update(self, indices: Tensor) -> None:
        """Count int64 indices, (B, *positions), or (B, *positions, stages) with a stage axis.

        Raises ValueError for another type or number of stages, or an index outside its codebook.
        """
        indices = (indices if self.stage_axis else indices.unsqueeze(-1)).detach().cpu()
        if not indices.numel():
            return
        if indices.dtype != torch.int64 or indices.shape[-1] != len(self.codebook_sizes):
            got = f"{indices.dtype} of shape {tuple(indices.shape)}"
            need = f"torch.int64 with a last axis of {len(self.codebook_sizes)} stages"
            raise ValueError(f"indices are {got}; they must be {need}")
        stages = indices.flatten(0, -2).unbind(-1)
        for k, size in enumerate(self.codebook_sizes):  # check all stages before counting any
            low, high = (value.item() for value in stages[k].aminmax())
            if low < 0 or high >= size:
                got = f"from {low} to {high}, outside its {size} codes"
                raise ValueError(f"indices of stage {k + 1} range {got}")
        for parts, size, stage in zip(self.parts, self.codebook_sizes, stages, strict=True):
            parts.append(_count(stage, size))
            # A merge sorts everything; waiting until it has doubled keeps the total n log n.
            if sum(part.shape[1] for part in parts[1:]) > parts[0].shape[1] + MERGE_ABOVE:
                parts[:] = [_merge(parts)]

    def compute(self) -> list[dict[str, float | int]]:
        """One dictionary a stage, over the tokens of all processes (a collective).

        'stage' (from 1), 'codebook_size', 'used' (codes seen at least once), 'share' (used /
        codebook_size), 'perplexity' (2^entropy), 'entropy_bits' (-sum p log2 p, bits a token) and
        'tokens'. Raises ValueError if no process had a token.

        They are of the tokens seen. Where these are few for the codebook, 'used', perplexity and
        entropy are too low (the entropy is at most log2 'tokens'); see `usage_note`.
        """
        result = []
        for k, size in enumerate(self.codebook_sizes):
            counts = _merge(util.from_all(_merge(self.parts[k])))[1]
            used, tokens = len(counts), int(counts.sum())
            if tokens == 0:
                raise ValueError(f"there are no indices of stage {k + 1} to count")
            p = counts.double() / tokens
            entropy = (p * p.reciprocal().log2()).sum().item()
            row = {"stage": k + 1, "codebook_size": size, "used": used, "share": used / size}
            row |= {"perplexity": 2**entropy, "entropy_bits": entropy, "tokens": tokens}
            result.append(row)
        return result


def _count(indices: Tensor, codebook_size: int) -> Tensor:
    """(2, n): each code among the indices (tokens,), in order, and how often it occurs."""
    if codebook_size > DENSE_LIMIT:
        return torch.stack(indices.unique(return_counts=True))
    counts = torch.bincount(indices)
    codes = counts.nonzero()[:, 0]
    return torch.stack([codes, counts[codes]])


def _merge(parts: list[Tensor]) -> Tensor:
    """Add up tensors of `_count`: each code once, in order."""
    codes, counts = torch.cat(parts, dim=1)
    codes, inverse = codes.unique(return_inverse=True)
    return torch.stack([codes, torch.zeros_like(codes).index_add_(0, inverse, counts)])


def usage_note(stages: Sequence[dict]) -> str:
    """A line on the stages of `CodeUsage.compute` with less than ten tokens per code, or ""."""
    few = [row for row in stages if row["tokens"] < 10 * row["codebook_size"]]
    if not few:
        return ""
    numbers = ", ".join(str(row["stage"]) for row in few)
    return (
        f"used, perplexity and entropy of stage {numbers} are too low: {few[0]['tokens']:,} tokens "
        "are few for so many codes"
    )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Tensor],
    perceptual: Perceptual | None,
    device: torch.device | str,
    progress: bool = False,
    final: bool = True,
    stop: Callable[[], bool] = lambda: False,
    frechet: FrechetDistance | None = None,
    per_image: bool = False,
) -> dict:
    """Measure a model, in evaluation mode, on every image of a loader: a collective over processes.

    Args:
        model: not inside DistributedDataParallel, whose forward waits for all processes. Returns
            (reconstruction, indices, loss) for images in [0, 1]; has `f` and a `quantizer` with
            `bits_with_side_information`, `codebook_sizes` and `stage_axis`.
        loader: yields uint8 batches (B, 3, H, W) of one image size; this process's shard, which
            may be empty.
        perceptual: LPIPS on `device`, or None.
        device: where the model is. `progress` shows how far it is.
        final: also report the paper's units and two references (bicubic, mean colour).
        stop: asked between batches; True in any process ends the evaluation in all of them.
        frechet: rFID, without images so far, or None.
        per_image: also report the four metrics of each image.

    Returns:
        'images', 'image_size' [H, W], 'bits' (per position, side information spread over the
        positions), 'f', 'bpp' (bits per pixel, side information included), 'l1', 'psnr', 'ssim',
        'lpips', 'lpips_net', 'paper' {l1, psnr, lpips} and 'floors' {bicubic, mean_colour: {l1,
        psnr, ssim, lpips, paper}} (both only if `final`), 'per_image' (only if asked for, see
        `ImageMetrics.compute`), 'stages' (see `CodeUsage.compute`), 'rfid' (only with `frechet`).

    Raises:
        exits.Interrupted: `stop` ended it.
        NotFinite: the model has diverged.
        ValueError: no image, and where `ImageMetrics` and `CodeUsage` raise it.
    """
    quantizer = model.quantizer
    usage = CodeUsage(quantizer.codebook_sizes, quantizer.stage_axis)
    names = ["model", "bicubic", "mean_colour"] if final else ["model"]
    metrics = {name: ImageMetrics(perceptual, paper=final) for name in names}
    shape = torch.zeros(3, dtype=torch.int64)  # H, W, positions; a process may see no image
    with util.in_evaluation_mode(model):
        for batch in output.progress(loader, "evaluate", "batches", shown=progress):
            if stop():
                break
            if batch is None:  # none of its images could be read
                continue
            batch = batch.to(device)
            images = batch.float() / 255
            reconstruction, indices, _ = model(images)
            metrics["model"].update(images, reconstruction)
            if frechet is not None:
                frechet.update(batch, reconstruction)
            if final:
                metrics["bicubic"].update(images, bicubic_reference(images, model.f))
                metrics["mean_colour"].update(images, mean_colour_reference(images))
            if reconstruction.isfinite().all():  # else `compute` refuses, in all processes
                usage.update(indices)
            positions = indices[0].numel() // len(quantizer.codebook_sizes)
            shape = torch.tensor([*images.shape[2:], positions])
    if any(util.from_all(stop())):
        raise exits.Interrupted("the evaluation was stopped")

    measured = metrics.pop("model").compute(per_image)
    result = {
        "images": measured.pop("images"),
        **_rate(quantizer, model.f, *torch.stack(util.from_all(shape)).amax(dim=0).tolist()),
        **measured,
        "lpips_net": None if perceptual is None else perceptual.net,
    }
    if final:
        floors = {name: metric.compute() for name, metric in metrics.items()}
        for floor in floors.values():
            del floor["images"]
        result["floors"] = floors  # the name in files: the references
    result["stages"] = usage.compute()
    return result if frechet is None else {**result, "rfid": frechet.compute()}


def _rate(quantizer: Quantizer, f: int, height: int, width: int, positions: int) -> dict:
    """The size of the images and the bits that the decoder needs, as `evaluate` returns them."""
    bits = quantizer.bits_with_side_information(positions)
    bpp = bits * positions / (height * width)
    return {"image_size": [height, width], "bits": bits, "f": f, "bpp": bpp}


def format_results(result: dict) -> str:
    """The final table for the screen, from what `evaluate` returns; plain text, no last newline."""
    network, f, (height, width) = result["lpips_net"], result["f"], result["image_size"]
    lpips = f"LPIPS-{network}" if network else "LPIPS"
    labels = {"bicubic": f"bicubic x{f}", "mean_colour": "mean colour"}
    rows = {"model": result}
    rows |= {labels[name]: row for name, row in result.get("floors", {}).items()}
    field = [["", "L1 [0,1]", "PSNR dB (peak 1)", "SSIM", lpips]]
    paper = [["", "L1 normalised", "PSNR dB (peak 2)", f"{lpips} of [0,1] inputs"]]
    for label, row in rows.items():
        for table, values in ((field, row), (paper, row.get("paper"))):
            if values is None:
                continue
            distance = f"{values['lpips']:.4f}" if network else "missing"
            ssim = [f"{values['ssim']:.4f}"] if table is field else []
            table.append([label, f"{values['l1']:.4f}", f"{values['psnr']:.2f}", *ssim, distance])
    stages = [[name.replace("_", " ") for name in result["stages"][0]]]
    for row in result["stages"]:
        stages.append([f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()])
    parts = [
        f"{result['images']} images of {height}x{width}\n" + output.text_table(field),
        output.text_table(stages) + f"\n{usage_note(result['stages'])}".rstrip(),
        f"{result['bits']:.4g} bits per position, f = {f}, {result['bpp']:.4g} bpp",
    ]
    if "paper" in result:
        heading = "the paper's units (arXiv 2508.15860), reconstructions not clamped\n"
        parts.insert(1, heading + output.text_table(paper))
    if not network:
        parts[-1] += "\nLPIPS is missing: its weights are not available, or --lpips-net is none"
    return "\n\n".join(parts)
