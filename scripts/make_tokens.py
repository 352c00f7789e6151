"""Turn a data set into tokens, as arrays that numpy maps: what a generative model trains on.

    python scripts/make_tokens.py DATA --load runs/NAME/last.pt --out TOKENS
    torchrun --standalone --nproc-per-node 8 scripts/make_tokens.py DATA --load MODEL --out TOKENS

`tokens.py` describes the files in TOKENS. After an interruption the same command continues with
the images that are not done. The tokens do not depend on the number of processes.

(The script is not called tokenize.py: python puts the folder of a script first on its path, where
every script of this folder would find it in place of the standard library's `tokenize`.)
"""

from __future__ import annotations

import contextlib
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import exits
import tokens
import util
from arguments import IMAGES_HELP, LOAD_HELP, Parser, add_evaluation_flags
from dataset import SkipCorrupt, build_dataset
from dataset.base import ImageDataset
from dataset.loaders import batch_loader
from dataset.packed import as_lines
from files import check_room, remove_leftovers
from model import VQVAE, fingerprint, load_model
from output import Progress

SECONDS_A_FLUSH = 10  # how much work a power failure costs
FLIPPED = "-flipped"


def settings_of(
    model: VQVAE, saved: dict, images: ImageDataset, size: int, flags: Namespace
) -> dict:
    """The settings that tokens depend on, and the shapes of the arrays.

    Raises:
        ValueError: the image size does not fit the model.
    """
    quantizer, side = model.quantizer, size // model.f
    multiple = model.f * quantizer.group
    if size % multiple:
        raise ValueError(f"--img-size {size} is no multiple of {multiple}, as this model needs")
    shape = [side, side, *([quantizer.stages] if quantizer.stage_axis else [])]
    dtype = tokens.smallest_unsigned(max(quantizer.codebook_sizes) - 1)
    arrays = {"tokens": {"dtype": dtype.name, "shape": shape}}
    if quantizer.side_bits:
        row = [quantizer.stages, 2, quantizer.dim]
        arrays["statistics"] = {"dtype": "float16", "shape": row}
    mirrors = ("", FLIPPED) if flags.flip else ("",)
    return {
        # Of what decoding depends on, as in `.rfsq` files, and of the encoder.
        "fingerprint": fingerprint(model, saved["args"]).hex(),
        "encoder_fingerprint": fingerprint(model, saved["args"], ("encoder",)).hex(),
        "quantizer": quantizer.name,
        "levels": quantizer.levels,
        "codebook_sizes": quantizer.codebook_sizes,
        "bits_per_position": quantizer.bits,
        "f": model.f,
        "image_size": size,
        "batch_size": flags.batch_size,  # the last bits of a convolution may depend on it
        "sources": len(images),
        "images": images.fingerprint(),
        "arrays": {f"{name}{m}.npy": row for name, row in arrays.items() for m in mirrors},
    }


def encode(model: VQVAE, images: Tensor, flip: bool) -> dict[str, np.ndarray]:
    """The rows of each array for a batch of images (B, 3, H, W) in [0, 1]."""
    rows = {}
    for mirror, batch in (("", images), *([(FLIPPED, images.flip(-1))] if flip else [])):
        for name, part in zip(("tokens", "statistics"), model.tokens(batch), strict=True):
            if part is not None:
                rows[f"{name}{mirror}.npy"] = part.cpu().numpy()
    return rows


def encode_rest(
    model: VQVAE, images: ImageDataset, settings: dict, device: torch.device, flags: Namespace
) -> float:
    """Write this process's share of the rows that are missing; returns images/s of all processes.

    A batch is the same images whoever makes it, and whether the run was interrupted or not.
    """
    out, size, count = Path(flags.out), flags.batch_size, len(images)
    # One list for all: a process that reads it later would see what others have done by then.
    left = util.on_main(lambda: np.unique(tokens.to_do(out) // size).tolist())
    if not left:  # an interrupted run may have given the arrays their names already
        return 0.0
    mine = left[util.rank() :: util.world_size()]
    batches = [list(range(b * size, min(count, (b + 1) * size))) for b in mine]
    loader = batch_loader(images, batches, flags.num_workers, device=device)
    start = flushed = time.monotonic()
    with (
        Progress("tokens", sum(map(len, batches)), shown=util.rank() == 0) as bar,
        tokens.TokenWriter(out, settings) as writer,
    ):
        for batch, pixels in zip(batches, loader, strict=True):
            kept = np.ones(len(batch), bool)
            if isinstance(images, SkipCorrupt):  # its loading processes have set `bad`
                kept = ~images.bad[batch].numpy()
            rows = {}
            if pixels is not None:
                rows = encode(model, pixels.to(device).float() / 255, flags.flip)
            writer.write(batch[0], kept, rows)
            bar.add(len(batch))
            if time.monotonic() - flushed >= SECONDS_A_FLUSH:
                writer.flush()
                flushed = time.monotonic()
    made = sum(util.from_all(sum(map(len, batches))))
    return made / max(util.from_all(time.monotonic() - start))


def begin(out: Path, settings: dict) -> dict | None:
    """`tokens.begin`, and a check that there is room for what it leaves to do."""
    index = tokens.begin(out, settings)
    remove_leftovers(out)  # of a run that was killed while writing
    if index is None:
        left, rows = len(tokens.to_do(out)), settings["arrays"].values()
        row = sum(np.dtype(r["dtype"]).itemsize * int(np.prod(r["shape"])) for r in rows)
        check_room(out, left * row)
        done = settings["sources"] - left
        if done:
            print(
                f"'{out}': continues after {done:,} of {settings['sources']:,} images", flush=True
            )
    return index


def main(argv: Sequence[str] | None = None) -> dict:
    """Make tokens as the flags say, and return their index. ValueError for bad input."""
    parser = Parser.of(__file__, __doc__)
    parser.add_argument("data", metavar="DATA", help=IMAGES_HELP)
    parser.add_argument("--load", required=True, metavar="MODEL", help=LOAD_HELP)
    add = parser.add_argument
    add("--out", required=True, metavar="TOKENS", help="folder to write, or to continue")
    add("--flip", action="store_true", help="also the tokens of the mirrored images")
    add("--skip-corrupt", action="store_true", help="leave out and list unreadable images")
    add_evaluation_flags(parser, "--img-size", "--batch-size", "--num-workers")
    flags = parser.parse_args(argv)
    out = Path(flags.out)

    device = util.setup_processes()
    util.share_cores(flags.num_workers)
    util.set_float32_precision("ieee")
    model, args, saved = load_model(flags.load)
    size = flags.img_size or args.img_size
    images = build_dataset(flags.data, size, 0, train=False, skip_corrupt=flags.skip_corrupt)
    settings = settings_of(model, saved, images, size, flags)
    names = images.names()
    as_lines(names or ())  # refuses names with line breaks before the work
    with contextlib.ExitStack() as stack:
        util.on_main(lambda: stack.enter_context(tokens.held(out)))
        index, speed = util.on_main(lambda: begin(out, settings)), 0.0
        if index is None:
            speed = encode_rest(model.to(device), images, settings, device, flags)
            index = util.on_main(lambda: tokens.finish(out, settings, names))
    if util.rank() == 0:
        rows, classes = index["arrays"]["tokens.npy"], index["classes"]
        print(
            f"'{out}' is complete: {index['count']:,} images, {rows['dtype']} tokens of "
            f"{'x'.join(map(str, rows['shape']))}"
            + (f", {len(classes):,} classes" if classes else "")
            + (f", {speed:,.0f} images/s" if speed else "")
        )
        if index["skipped"]:
            print(f"{len(index['skipped'])} images skipped, listed in {out / tokens.INDEX}")
    return index


if __name__ == "__main__":
    exits.run_script(main, "to go on: the same command")
