"""Evaluate a checkpoint: the table that `train.py` prints at its end, from the checkpoint alone.

    python scripts/evaluate.py --load runs/NAME/last.pt --val-data-path DIR

The checkpoint knows its own architecture. Without LPIPS weights the table says that LPIPS is
missing and holds the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import util
from arguments import Parser, number
from checkpoint import write_json
from dataset import build_dataset, val_loader
from loss import lpips_network
from metric import evaluate, format_results
from model import load_model


def main(argv: Sequence[str] | None = None) -> dict:
    """Evaluate as the flags say and return the results.

    Raises:
        ValueError: for bad input.
    """
    parser = Parser(prog="evaluate.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--load", required=True, metavar="FILE", help="checkpoint: last.pt, best.pt"
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
        "--batch-size",
        type=number(int, 1),
        default=64,
        help="images at a time; no effect on values",
    )
    parser.add_argument("--num-workers", type=number(int, 0), default=1, help="loading processes")
    parser.add_argument(
        "--lpips-net", choices=("vgg", "alex", "squeeze"), help="default: as trained"
    )
    parser.add_argument("--json", metavar="FILE", help="write the results there as well")
    flags = parser.parse_args(argv)

    model, args, saved = load_model(flags.load)
    device = util.setup_processes()
    util.share_cores(flags.num_workers)
    util.set_float32_precision("ieee")
    model.to(device)

    size = flags.img_size or args.img_size
    images = build_dataset(flags.val_data_path, size, args.seed, train=False)
    place = dict(rank=util.rank(), world_size=util.world_size(), device=device)
    loader = val_loader(images, flags.batch_size, flags.num_workers, **place)
    perceptual = lpips_network(flags.lpips_net or args.lpips_net, device, needed=False, side=size)
    main_process = util.rank() == 0
    bar = main_process and sys.stderr.isatty()
    result = {
        "name": model.quantizer.name,
        **evaluate(model, loader, perceptual, device, progress=bar),
        "val_data": flags.val_data_path,
        "checkpoint": flags.load,
        "step": saved.get("step"),
    }
    if main_process:
        print(f"{result['name']}, step {result['step']}, {flags.load}\n\n{format_results(result)}")
        if flags.json:
            write_json(Path(flags.json), {**result, "environment": util.environment(device)})
    return result


if __name__ == "__main__":
    util.run_script(main)
