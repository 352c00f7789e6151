"""What each stage of a residual quantizer does, measured on a validation set.

    python scripts/stages.py --load A/last.pt B/last.pt --val-data-path DIR --figures DIR

For every stage: RMS of the residual before and after it, RMS of what enters its FSQ, share of its
codes that are used, perplexity and first-order entropy; and PSNR, L1 and LPIPS of the images that
the first k stages decode to. The residual of stage k is z minus what the first k - 1 stages decode
to, all of it in the units of the latent z (B, C, H/f, W/f).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import util
from arguments import Parser, number
from checkpoint import write_json
from dataset import build_dataset, val_loader
from loss import Perceptual, lpips_network
from metric import CodeUsage, ImageMetrics
from model import VQVAE, load_models

COLUMNS = {  # column: (heading, decimals)
    "stage": ("stage", 0),
    "bits": ("bits so far", 2),
    "residual_rms_before": ("residual before", 4),
    "residual_rms_after": ("after", 4),
    "fsq_input_rms": ("into the FSQ", 4),
    "used": ("codes used", 0),
    "share": ("share", 4),
    "perplexity": ("perplexity", 1),
    "entropy_bits": ("entropy bits", 2),
    "psnr": ("PSNR dB", 2),
    "l1": ("L1 [0,1]", 4),
    "lpips": ("LPIPS", 4),
}


class MeanSquare:
    """Root of the mean square over all the elements of many tensors."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def add(self, x: Tensor) -> None:
        self.sum += x.double().square().sum().item()
        self.count += x.numel()

    def root(self) -> float:
        return math.sqrt(self.sum / self.count)


@torch.no_grad()
def measure(
    model: VQVAE,
    loader: Iterable[Tensor],
    perceptual: Perceptual | None,
    device: torch.device,
) -> list[dict]:
    """One dictionary a stage, over all images of `loader` (uint8 batches (B, 3, H, W)).

    The keys are those of `COLUMNS`, 'codebook_size', 'tokens', and 'paper' with the three metrics
    in the paper's units. 'fsq_input_rms' is None where the quantizer has no FSQ. The quantizer is
    a residual one, in evaluation mode.
    """
    quantizer = model.quantizer
    stages = range(quantizer.stages)
    residuals = [MeanSquare() for _ in range(quantizer.stages + 1)]  # the first is the latent
    inputs = [MeanSquare() for _ in stages]
    metrics = [ImageMetrics(perceptual) for _ in stages]
    usage = CodeUsage(quantizer.codebook_sizes, stage_axis=True)
    positions = 0
    for batch in loader:
        images = batch.to(device).float() / 255
        z = model.to_latent(images).float()
        _, indices, *rest = quantizer(z)
        side = rest[1:]  # image statistics, for the quantizers whose decoder needs them
        quantized = None
        residuals[0].add(z)
        for k in stages:
            if hasattr(quantizer, "stage_input"):
                inputs[k].add(quantizer.stage_input(k, z, quantized))
            first = indices[..., : k + 1]
            quantized = quantizer.indices_to_codes(first, *side)
            residuals[k + 1].add(z - quantized)
            metrics[k].update(images, model.decode(first, *side))
        usage.update(indices)
        positions = indices[0, ..., 0].numel()

    rows = []
    for k, (codes, metric) in enumerate(zip(usage.compute(), metrics, strict=True)):
        quality = metric.compute()
        index_bits = sum(math.log2(size) for size in quantizer.codebook_sizes[: k + 1])
        side_bits = quantizer.side_bits * (k + 1) / quantizer.stages / positions
        rows.append(
            {
                **codes,
                "bits": index_bits + side_bits,
                "residual_rms_before": residuals[k].root(),
                "residual_rms_after": residuals[k + 1].root(),
                "fsq_input_rms": inputs[k].root() if inputs[k].count else None,
                **{name: quality[name] for name in ("psnr", "l1", "lpips")},
                "paper": quality["paper"],
            }
        )
    return rows


def format_table(rows: Sequence[dict]) -> str:
    """The rows of `measure` as a table for the screen."""

    def text(value: float | None, decimals: int) -> str:
        return "-" if value is None else f"{value:.{decimals}f}"

    table = [[heading for heading, _ in COLUMNS.values()]]
    table += [[text(row[name], d) for name, (_, d) in COLUMNS.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in table)


def draw(results: Sequence[dict], folder: Path) -> list[Path]:
    """Two PNGs: the residual's magnitude by stage, and quality against stages.

    Raises:
        ValueError: if matplotlib is missing or the folder cannot be made.
    """
    figure_class = util.load_figure()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--figures {folder} cannot be made ({error.strerror})") from error
    labels = [result["name"] for result in results]
    if len({*labels}) < len(labels):
        labels = [f"{result['name']} ({result['checkpoint']})" for result in results]

    def panels(name: str, *panels: tuple) -> Path:
        # The object-oriented interface: pyplot would want a display, and keep state.
        figure = figure_class(figsize=(5 * len(panels), 4), layout="constrained")
        for axes, (title, x_label, curve, scale) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            for label, result in zip(labels, results, strict=True):
                x, y = curve(result["stages"])
                if None not in y:
                    axes.plot(x, y, marker="o", label=label)
            axes.set(title=title, xlabel=x_label, yscale=scale)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
        figure.axes[0].legend(fontsize=8)
        path = folder / name
        figure.savefig(path, dpi=150)
        return path

    def residual(rows: Sequence[dict]) -> tuple:
        start = rows[0]["residual_rms_before"]
        return range(len(rows) + 1), [1, *(row["residual_rms_after"] / start for row in rows)]

    def column(name: str):
        return lambda rows: ([row["stage"] for row in rows], [row[name] for row in rows])

    quality = [("PSNR, dB", "stages decoded", column("psnr"), "linear")]
    quality.append(("L1 on [0, 1]", "stages decoded", column("l1"), "linear"))
    if any(row["lpips"] is not None for result in results for row in result["stages"]):
        quality.append(("LPIPS", "stages decoded", column("lpips"), "linear"))
    return [
        panels(
            "residuals.png",
            ("RMS of the residual / RMS of the latent", "after stage", residual, "log"),
            ("RMS of what enters the FSQ", "stage", column("fsq_input_rms"), "log"),
        ),
        panels("quality.png", *quality),
    ]


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure every checkpoint on the same images, and return what `--json` writes."""
    parser = Parser(prog="stages.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--load", required=True, nargs="+", metavar="FILE", help="checkpoints: last.pt, best.pt"
    )
    parser.add_argument(
        "--val-data-path",
        default="./data/imagenet/val",
        metavar="DIR",
        help="a folder of images, nested or flat, or `synthetic`",
    )
    parser.add_argument(
        "--img-size", type=number(int, 16), help="pixels a side; default: as trained"
    )
    parser.add_argument(
        "--batch-size", type=number(int, 1), default=64, help="images at a time; no effect"
    )
    parser.add_argument("--num-workers", type=number(int, 0), default=1, help="loading processes")
    parser.add_argument(
        "--lpips-net", choices=("vgg", "alex", "squeeze"), help="default: as trained"
    )
    parser.add_argument("--json", metavar="FILE", help="write the results there as well")
    parser.add_argument("--figures", metavar="DIR", help="draw two figures there (matplotlib)")
    flags = parser.parse_args(argv)
    if flags.figures:
        util.load_figure()  # missing? better known before the work than after it

    device = util.setup_processes()
    util.share_cores(flags.num_workers)
    util.set_float32_precision("ieee")
    models, args, steps = load_models(flags.load, device, flags.img_size)
    for model in models:
        if not model.quantizer.stage_axis:
            raise ValueError(
                f"{model.quantizer.name} has no stages: give checkpoints of RFSQ, or of VQ-EMA "
                "with --ema-stages above 1"
            )
    size = flags.img_size or args.img_size
    images = build_dataset(flags.val_data_path, size, args.seed, train=False)
    perceptual = lpips_network(flags.lpips_net or args.lpips_net, device, needed=False, side=size)
    results = []
    for path, model, step in zip(flags.load, models, steps, strict=True):
        loader = val_loader(images, flags.batch_size, flags.num_workers, device=device)
        rows = measure(model, loader, perceptual, device)
        name = model.quantizer.name
        results.append({"name": name, "checkpoint": path, "step": step, "stages": rows})
        print(f"{name}, step {step}, {path}\n{format_table(rows)}\n", flush=True)
    result = {
        "images": len(images),
        "image_size": size,
        "val_data": flags.val_data_path,
        "lpips_net": perceptual and perceptual.net,
        "checkpoints": results,
        "environment": util.environment(device),
    }
    if flags.json:
        write_json(Path(flags.json), result)
    if flags.figures:
        print(*draw(results, Path(flags.figures)), sep="\n")
    return result


if __name__ == "__main__":
    util.run_script(main)
