"""One picture: the same validation images through several checkpoints, with error maps.

python scripts/compare.py --load A/last.pt B/last.pt --val-data-path DIR --out compare.png

originals       | image 1 | image 2 | ...
A, bits         | reconstructions, the PSNR of each below it
A, error        | |difference| in [0, 1], times --amplify, white where it is 1 or more
B, bits         | ...
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import util
from arguments import Parser, number
from checkpoint import write_whole
from dataset import build_dataset
from metric import psnr
from model import VQVAE, load_models

LABEL, GAP, TEXT = 220, 4, 18  # pixels: width of the labels, space, height of a line of text
CHARACTERS = 26  # that fit into a label
CELL = 128  # pixels a side that an image has at least; smaller ones are enlarged by whole factors


@torch.no_grad()
def reconstruct(model: VQVAE, originals: Tensor) -> tuple[Tensor, float]:
    """From the tokens alone: (images (N, 3, H, W) in [0, 1], bits a latent position)."""
    tokens = model.encode(originals)
    indices, *side = tokens if isinstance(tokens, tuple) else (tokens,)
    images = model.decode(indices, *side).clamp(0, 1)
    quantizer = model.quantizer
    positions = indices[0].numel() // quantizer.stages
    return images, quantizer.bits + quantizer.side_bits / positions


def picture_size(columns: int, checkpoints: int, side: int) -> tuple[int, int]:
    """Width and height of the picture in pixels, for images that are shown `side` pixels wide."""
    images = 1 + 2 * checkpoints
    height = images * (side + GAP) + checkpoints * TEXT + GAP
    return LABEL + columns * (side + GAP), height


def draw(
    originals: Tensor, rows: Sequence[tuple[str, Tensor, float]], amplify: float
) -> Image.Image:
    """The picture. `originals` (N, 3, H, H) in [0, 1]; rows of (name, images, bits a position)."""
    zoom = -(-CELL // originals.shape[-1])
    side = zoom * originals.shape[-1]
    picture = Image.new("RGB", picture_size(len(originals), len(rows), side), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    top = GAP

    def add_row(label: Sequence[str], images: Tensor, captions: Sequence[str] = ()) -> None:
        nonlocal top
        lines = [part for text in label for part in textwrap.wrap(text, CHARACTERS)]
        for i, line in enumerate(lines):
            pen.text((GAP, top + i * TEXT), line, "black", font)
        for i, image in enumerate(images):
            pixels = image.mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
            enlarged = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            left = LABEL + i * (side + GAP)
            picture.paste(enlarged, (left, top))
            if captions:
                pen.text((left, top + side), captions[i], "black", font)
        top += side + GAP + (TEXT if captions else 0)

    add_row(["originals"], originals)
    for name, images, bits in rows:
        captions = [f"{value:.2f} dB" for value in psnr(images, originals).tolist()]
        add_row([name, f"{bits:.4g} bits a position"], images, captions)
        error = ((images - originals).abs() * amplify).clamp(max=1)
        add_row([name, f"|error| x {amplify:g}"], error)
    return picture


def main(argv: Sequence[str] | None = None) -> Path:
    """Draw as the flags say and return the path of the picture."""
    parser = Parser(prog="compare.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--load", required=True, nargs="+", metavar="FILE", help="checkpoints: last.pt, best.pt"
    )
    parser.add_argument(
        "--val-data-path",
        default="./data/imagenet/val",
        metavar="DIR",
        help="a folder of images, nested or flat, or `synthetic`",
    )
    parser.add_argument("--out", required=True, metavar="PNG", help="the picture")
    parser.add_argument(
        "--images", type=number(int, 1), default=6, help="how many, evenly over the split"
    )
    parser.add_argument(
        "--amplify", type=number(float, 0, above=True), default=4.0, help="of the error maps"
    )
    parser.add_argument(
        "--img-size", type=number(int, 16), help="pixels a side; default: as trained"
    )
    flags = parser.parse_args(argv)
    out = Path(flags.out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out} is no PNG: give a name that ends in .png")

    device = util.setup_processes()
    util.set_float32_precision("ieee")
    models, args, _ = load_models(flags.load, device, flags.img_size)
    size = flags.img_size or args.img_size
    split = build_dataset(flags.val_data_path, size, args.seed, train=False)
    count = min(flags.images, len(split))
    chosen = [split[i * len(split) // count] for i in range(count)]
    originals = torch.stack(chosen).to(device).float() / 255
    names = [model.quantizer.name for model in models]
    if len({*names}) < len(names):  # as with several seeds: the run folders tell them apart
        folders = [Path(path).resolve().parent.name for path in flags.load]
        names = [f"{name} {folder}" for name, folder in zip(names, folders, strict=True)]
    rows = [
        (name, *reconstruct(model, originals)) for name, model in zip(names, models, strict=True)
    ]
    picture = draw(originals, rows, flags.amplify)
    write_whole(out, lambda file: picture.save(file, format="png"))
    print(f"{count} images through {len(models)} checkpoints: {out}")
    return out


if __name__ == "__main__":
    util.run_script(main)
