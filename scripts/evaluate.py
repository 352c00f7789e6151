"""Evaluate a checkpoint: the table that `train.py` prints at its end, from the checkpoint alone.

    python scripts/evaluate.py --load runs/NAME/last.pt --val-data-path DIR
    python scripts/evaluate.py --load A/last.pt B/last.pt --val-data-path DIR

The checkpoint determines the architecture. Below the table, and as "mflop" in the JSON: the
operations of encoder and decoder for one image. Without LPIPS weights, and with --lpips-net none,
the table says that LPIPS is missing and holds the rest. --fid adds rFID (see `fid.py`; needs
torch-fidelity: pip install '.[fid]').

Several checkpoints are compared with the first one image by image (see `evaluation.differences`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import exits
import output
import util
from arguments import LOAD_HELP, Parser, add_evaluation_flags
from evaluation import Checkpoint, Evaluation, differences, prepare
from fid import inception_distance
from files import write_json
from metric import evaluate, format_results
from model import VQVAE


@torch.no_grad()
def mflop(model: VQVAE, height: int, width: int) -> dict[str, float]:
    """Operations of 'encoder' and 'decoder' for one image, in millions, without the quantizer.

    Convolutions and matrix products alone; a multiplication and an addition count as two.
    """
    device = next(model.parameters()).device
    x, counts = torch.zeros(1, 3, height, width, device=device), {}
    for name in ("encoder", "decoder"):
        with FlopCounterMode(display=False) as counter:
            x = getattr(model, name)(x)
        counts[name] = 1e-6 * counter.get_total_flops()
    return counts


def measure(setup: Evaluation, checkpoint: Checkpoint, fid: bool, per_image: bool) -> dict:
    """The result of one checkpoint: what `metric.evaluate` gives, and where it comes from."""
    model, size = checkpoint.model, setup.img_size
    measured = evaluate(
        model,
        setup.loader,
        setup.perceptual,
        setup.device,
        progress=util.rank() == 0,
        frechet=inception_distance(setup.device) if fid else None,
        per_image=per_image,
    )
    result = {
        "name": checkpoint.name,
        **measured,
        "mflop": mflop(model, size, size),
        "checkpoint": checkpoint.path,
        "step": checkpoint.step,
    }
    if fid:
        result["rfid_method"] = (
            f"InceptionV3 of torch-fidelity, {result['images']} reconstructions against the same "
            f"images, resized and centre-cropped to {size}x{size}, 8 bits"
        )
        result.setdefault("rfid", None)
    return result


def format_checkpoint(result: dict) -> str:
    """What `measure` returns, for the screen."""
    operations = ", ".join(f"{part} {count:.1f}" for part, count in result["mflop"].items())
    lines = [
        f"{result['name']}, step {result['step']}, {result['checkpoint']}",
        f"\n{format_results(result)}",
        f"MFLOP an image, without the quantizer: {operations}",
    ]
    if "rfid" in result:
        rfid = "missing" if result["rfid"] is None else f"{result['rfid']:.3f}"
        lines.append(f"rFID {rfid}: {result['rfid_method']}")
    return "\n".join(lines)


def format_differences(results: Sequence[dict]) -> str:
    """The table of all checkpoints but the first, each minus the first."""
    first, *others = results
    names, paths = ([result[key] for result in results] for key in ("name", "checkpoint"))
    names = output.distinct(names, paths)
    headings = output.headings(output.METRICS, first["lpips_net"]).values()
    table = [[f"minus {names[0]}", *headings, "images with more PSNR"]]
    for name, other in zip(names[1:], others, strict=True):
        cells = [name]
        for metric, (_, decimals) in output.METRICS.items():
            difference = other["differences"][metric]
            if difference is None:
                cells.append("missing")
                continue
            cell = f"{difference['mean']:+.{decimals}f}"
            if difference["half_width"] is not None:
                cell += f" ± {difference['half_width']:.{decimals}f}"
            cells.append(cell)
        table.append([*cells, f"{other['differences']['psnr']['better']:.0%}"])
    note = (
        f"±: 95 % interval for the choice of images, from the differences of these "
        f"{first['images']}; other seeds of training are not in it"
    )
    return f"{output.text_table(table)}\n{note}"


def main(argv: Sequence[str] | None = None) -> dict:
    """Evaluate as the flags say. ValueError for bad input.

    Returns:
        The result of the checkpoint; of several, a list of results as 'checkpoints', all but the
        first with the 'differences' to it.
    """
    parser = Parser.of(__file__, __doc__)
    parser.add_argument("--load", required=True, nargs="+", metavar="MODEL", help=LOAD_HELP)
    text = "also report rFID: torch-fidelity's InceptionV3, against the images of the split"
    parser.add_argument("--fid", action="store_true", help=text)
    add_evaluation_flags(parser)
    flags = parser.parse_args(argv)
    output.check_json(flags.json)

    loading = flags.batch_size, flags.num_workers
    setup = prepare(flags.load, flags.val_data_path, flags.img_size, flags.lpips_net, *loading)
    several = len(setup.checkpoints) > 1
    results = [measure(setup, each, flags.fid, per_image=several) for each in setup.checkpoints]
    for other in results[1:]:
        other["differences"] = differences(results[0], other)
    texts = [format_checkpoint(result) for result in results]
    if several:
        texts.append(format_differences(results))
    for result in results:
        result.pop("per_image", None)
    result = {"checkpoints": results} if several else results[0]
    result["val_data"] = flags.val_data_path
    if util.rank() == 0:
        print("\n\n".join(texts))
        if flags.json:
            write_json(Path(flags.json), {**result, "environment": util.environment(setup.device)})
    return result


if __name__ == "__main__":
    exits.run_script(main)
