"""Evaluate a checkpoint: the table that `train.py` prints at its end, from the checkpoint alone.

    python scripts/evaluate.py --load runs/NAME/last.pt --val-data-path DIR

The checkpoint determines the architecture. Below the table, and as "mflop" in the JSON: the
operations of encoder and decoder for one image. Without LPIPS weights, and with --lpips-net none,
the table says that LPIPS is missing and holds the rest. --fid adds rFID (see `fid.py`; needs
torch-fidelity: pip install '.[fid]').
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
from evaluation import prepare
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


def main(argv: Sequence[str] | None = None) -> dict:
    """Evaluate as the flags say and return the results. ValueError for bad input."""
    parser = Parser.of(__file__, __doc__)
    parser.add_argument("--load", required=True, metavar="MODEL", help=LOAD_HELP)
    text = "also report rFID: torch-fidelity's InceptionV3, against the images of the split"
    parser.add_argument("--fid", action="store_true", help=text)
    add_evaluation_flags(parser)
    flags = parser.parse_args(argv)
    output.check_json(flags.json)

    loading = flags.batch_size, flags.num_workers
    setup = prepare([flags.load], flags.val_data_path, flags.img_size, flags.lpips_net, *loading)
    ((_, name, step, model),) = setup.checkpoints
    frechet = inception_distance(setup.device) if flags.fid else None
    options = dict(progress=util.rank() == 0, frechet=frechet)
    result = {
        "name": name,
        **evaluate(model, setup.loader, setup.perceptual, setup.device, **options),
        "mflop": mflop(model, setup.img_size, setup.img_size),
        "val_data": flags.val_data_path,
        "checkpoint": flags.load,
        "step": step,
    }
    if flags.fid:
        size = "x".join(map(str, result["image_size"]))
        result["rfid_method"] = (
            f"InceptionV3 of torch-fidelity, {result['images']} reconstructions against the same "
            f"images, resized and centre-cropped to {size}, 8 bits"
        )
        result.setdefault("rfid", None)
    if util.rank() == 0:
        operations = ", ".join(f"{part} {count:.1f}" for part, count in result["mflop"].items())
        print(f"{name}, step {step}, {flags.load}\n\n{format_results(result)}")
        print(f"MFLOP an image, without the quantizer: {operations}")
        if flags.fid:
            rfid = "missing" if result["rfid"] is None else f"{result['rfid']:.3f}"
            print(f"rFID {rfid}: {result['rfid_method']}")
        if flags.json:
            write_json(Path(flags.json), {**result, "environment": util.environment(setup.device)})
    return result


if __name__ == "__main__":
    exits.run_script(main)
