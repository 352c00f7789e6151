"""One picture: the same validation images through several checkpoints, with error maps.

    python scripts/compare.py --load A/last.pt B/last.pt --val-data-path DIR --out compare.png

    originals       | image 1 | image 2 | ...
    A, bits         | reconstructions, PSNR and SSIM of each below it
    A, error        | |difference| in [0, 1], times --amplify, white where it is 1 or more
    B, bits         | ...

Needs matplotlib: pip install '.[figures]'.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import exits
import output
import util
from arguments import LOAD_HELP, Parser, add_evaluation_flags, number
from dataset.images import some
from evaluation import prepare
from model import VQVAE
from similarity import psnr, ssim

CELL, LABEL = 1.75, 2.25  # inches: an image, and the labels beside the rows
DPI = 150
CHARACTERS = 22  # of a line of a label


@torch.no_grad()
def reconstruct(model: VQVAE, originals: Tensor) -> tuple[Tensor, float]:
    """From the tokens alone: (images (N, 3, H, W) in [0, 1], bits per latent position)."""
    bits = model.quantizer.bits_with_side_information(originals[0, 0].numel() // model.f**2)
    return model.decode(*model.tokens(originals)).clamp(0, 1), bits


def draw(originals: Tensor, rows: Sequence[tuple[str, Tensor, float]], amplify: float):
    """The picture, a matplotlib Figure.

    Args:
        originals: (N, 3, H, H) in [0, 1].
        rows: (name, reconstructions, bits per position) of each checkpoint.
        amplify: factor of the error maps; 0 leaves them out.
    """
    blank = [""] * len(originals)
    cells = [("originals", originals, blank)]  # label, images, a caption for each
    for name, images, bits in rows:
        values = torch.stack([psnr(images, originals), ssim(images, originals)], dim=1).tolist()
        captions = [f"{decibels:.2f} dB, SSIM {similarity:.3f}" for decibels, similarity in values]
        cells.append((f"{name}\n{bits:.4g} bits a position", images, captions))
        if amplify:
            error = ((images - originals).abs() * amplify).clamp(max=1)
            cells.append((f"{name}\n|error| x {amplify:g}", error, blank))

    size = (LABEL + CELL * len(originals), (CELL + 0.2) * len(cells))
    figure = output.load_figure()(figsize=size, dpi=DPI, layout="compressed")
    grid = figure.subplots(len(cells), len(originals), squeeze=False)
    for row, (label, images, captions) in zip(grid, cells, strict=True):
        label = "\n".join(textwrap.fill(line, CHARACTERS) for line in label.split("\n"))
        row[0].set_ylabel(output.literal(label), rotation=0, ha="right", va="center", fontsize=9)
        for axes, image, caption in zip(row, images, captions, strict=True):
            pixels = image.mul(255).round().byte().permute(1, 2, 0)
            axes.imshow(pixels.cpu().numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[], xlabel=caption)
            axes.spines[:].set_visible(False)
    return figure


def main(argv: Sequence[str] | None = None) -> Path:
    """Draw as the flags say and return the path of the picture. ValueError for bad input."""
    parser = Parser.of(__file__, __doc__)
    add = parser.add_argument
    add("--load", required=True, nargs="+", metavar="MODEL", help=f"each a {LOAD_HELP}")
    add("--out", required=True, metavar="PNG", help="the picture")
    add("--images", type=number(int, 1), default=6, help="how many, evenly over the split")
    help_text = "factor of the error maps; 0 leaves them out"
    add("--amplify", type=number(float, 0), default=4.0, help=help_text)
    add_evaluation_flags(parser, "--val-data-path", "--img-size")
    flags = parser.parse_args(argv)
    out = output.check_picture("--out", flags.out)
    util.refuse_torchrun()

    setup = prepare(flags.load, flags.val_data_path, flags.img_size, lpips_net="none")
    chosen = [setup.images[i] for i in some(range(len(setup.images)), flags.images)]
    originals = torch.stack(chosen).to(setup.device).float() / 255
    folders = [Path(path).resolve().parent.name for path in flags.load]  # paths are long labels
    places = folders if len({*folders}) == len(folders) else flags.load
    names = output.distinct([c.name for c in setup.checkpoints], places)
    rows = [
        (name, *reconstruct(checkpoint.model, originals))
        for name, checkpoint in zip(names, setup.checkpoints, strict=True)
    ]
    figure = draw(originals, rows, flags.amplify)
    output.save_picture(figure, out)
    print(f"{len(chosen)} images through {len(rows)} checkpoints: {out}")
    return out


if __name__ == "__main__":
    exits.run_script(main)
