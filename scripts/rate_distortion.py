"""Bytes on disk against PSNR and LPIPS: checkpoints at every k, beside JPEG, WebP and AVIF.

    python scripts/rate_distortion.py DIR --load runs/NAME/last.pt --json rd.json --figure rd.png

What is measured is the uint8 image that the bytes of a file decode to. Over a folder: bpp = all
bits / all pixels; PSNR (peak 255, at most 100 dB) and LPIPS of each image, then the mean. What a
file is without its header:

    ours    payload and image statistics; not the fixed header and the checksum
    JPEG    the scan; not EOI, nor SOI to SOS with all tables. The Huffman tables are made for the
            image: without header, JPEG has them for nothing
    WebP    data of the VP8 or VP8L chunk; not RIFF and chunk headers, padding, other chunks
    AVIF    data of the mdat box; not any other box

The rivals have the settings that give most for a byte: Huffman tables of the image, WebP's slowest
method, all the chroma where one can choose; and, as they win at some rates, JPEG 4:2:0 and AVIF
tuned for PSNR (by default for the eye). Each runs over a grid of qualities; its value at a rate is
between the highest quality that fits and the next, linear in the logarithm of the bytes (128x128
photographs: within 0.04 dB and 6 % of LPIPS of all 100 qualities). The rates are those of the
checkpoints' rows, met by one quality for all images, as a codec is used, and by as many bytes for
every image as our file of it has, which mostly gives a higher mean PSNR.
"""

from __future__ import annotations

import io
import math
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, features

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import util
from arguments import Parser, number
from checkpoint import write_json, write_whole
from codec import bitstream
from codec.codec import Codec, psnr
from dataset import IMAGE_SUFFIXES, find, fit, read_image, some
from loss import Perceptual, lpips_network
from metric import PSNR_CAP
from util import progress

PAYLOAD, BYTES, PSNR, LPIPS = range(4)  # columns of measurements: bytes, bytes, dB, distance
RATES = (0.344, 0.625, 1.375, 2.5)  # bpp, where there is no checkpoint
QUALITIES = (0, 2, 4, 6, 8, 12, 16, 20, 26, 32, 40, 48, 56, 64, 72, 78, 84, 88, 92, 95, 98, 100)
COLOURS = {"JPEG": "#e69f00", "WEBP": "#56b4e9", "AVIF": "#009e73"}  # of Okabe and Ito
OUR_COLOURS, OUR_MARKERS = ("#000000", "#d55e00", "#cc79a7", "#0072b2"), "os^D"


def jpeg_header(data: bytes) -> int:
    """Bytes from SOI to the end of SOS, and EOI, of a JPEG with one scan (not progressive)."""
    place, marker = 2, 0
    while marker != 0xDA:  # start of scan
        _, marker, length = struct.unpack_from(">BBH", data, place)
        place += 2 + length
    return place + 2


def webp_header(data: bytes) -> int:
    """Bytes of a WebP that are not the data of its image chunk."""
    place, image = 12, 0
    while place < len(data):
        name, length = struct.unpack_from("<4sI", data, place)
        image += length if name in (b"VP8 ", b"VP8L") else 0
        place += 8 + length + length % 2
    return len(data) - image


def avif_header(data: bytes) -> int:
    """Bytes of an AVIF that are not the data of mdat boxes."""
    place, image = 0, 0
    while place < len(data):
        (length, name), head = struct.unpack_from(">I4s", data, place), 8
        if length == 1:  # 64 bits follow
            (length,), head = struct.unpack_from(">Q", data, place + 8), 16
        length = length or len(data) - place  # 0: to the end of the file
        image += length - head if name == b"mdat" else 0
        place += length
    return len(data) - image


@dataclass(frozen=True)
class Rival:
    """A codec of Pillow's, over the grid of its qualities."""

    name: str
    format: str
    header: Callable[[bytes], int]
    options: dict

    def __call__(self, image: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """(bytes without header, bytes of the file, decoded image) at each quality."""
        for quality in QUALITIES:
            file = io.BytesIO()
            # From an array: no ICC profile and no EXIF of the original's file is written again.
            Image.fromarray(image).save(file, self.format, quality=quality, **self.options)
            data = file.getvalue()
            with Image.open(file) as decoded:
                yield len(data) - self.header(data), len(data), np.asarray(decoded.convert("RGB"))

    def problem(self) -> str | None:
        """Why this Pillow cannot do it, or None."""
        try:
            next(self(np.zeros((16, 16, 3), np.uint8)))
        except Exception as error:  # no such format, no encoder, an option that it does not know
            return f"unavailable in this Pillow ({type(error).__name__}: {util.one_line(error)})"
        return None


_AVIF = {"subsampling": "4:4:4", "speed": 6, "codec": "aom"}
RIVALS = (
    Rival("JPEG 4:4:4", "JPEG", jpeg_header, {"subsampling": "4:4:4", "optimize": True}),
    Rival("JPEG 4:2:0", "JPEG", jpeg_header, {"subsampling": "4:2:0", "optimize": True}),
    Rival("WebP", "WEBP", webp_header, {"method": 6}),
    Rival("AVIF 4:4:4", "AVIF", avif_header, _AVIF),
    Rival("AVIF 4:4:4, tune=psnr", "AVIF", avif_header, {**_AVIF, "advanced": {"tune": "psnr"}}),
)


class Ours:
    """A checkpoint at every k, and once more entropy-coded if it has an entropy model."""

    def __init__(self, path: str, device: torch.device):
        self.codec = Codec(path, device)
        coded = [False] if self.codec.entropy_model is None else [False, True]
        self.points = [(k, c) for c in coded for k in range(1, self.codec.stages + 1)]

    def __call__(self, image: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """(bytes without header, bytes of the file, decoded image) at each of `points`."""
        indices, statistics = self.codec.encode_indices(image)
        for k, coded in self.points:
            data = self.codec.write(indices, statistics, image.shape[:2], k, coded)
            header = bitstream.read_header(data).size + 4  # and the checksum
            yield len(data) - header, len(data), self.codec.decode(data)


def measure(image: np.ndarray, coder: Callable, perceptual: Perceptual | None) -> np.ndarray:
    """(settings, 4) for one uint8 image (H, W, 3): bytes without header and of the file, dB, LPIPS.

    LPIPS is NaN without a network, and for an image that is too small for it.
    """
    fits = perceptual is not None and min(image.shape[:2]) >= perceptual.smallest_side
    device = perceptual.scaling.shift.device if fits else None

    def distance(decoded: np.ndarray) -> float:
        pair = [torch.tensor(x, device=device).permute(2, 0, 1)[None] for x in (image, decoded)]
        with torch.inference_mode():
            return perceptual(*(x.float() / 255 for x in pair)).item()

    rows = [
        (payload, size, min(psnr(image, x), PSNR_CAP), distance(x) if fits else math.nan)
        for payload, size, x in coder(image)
    ]
    return np.array(rows, np.float64)


def mean(values: np.ndarray) -> np.ndarray:
    """Over the first axis, the images; NaNs (images without LPIPS) are left out."""
    count = (~np.isnan(values)).sum(axis=0)
    return np.where(count, np.nansum(values, axis=0) / np.maximum(count, 1), math.nan)


def at_rate(curve: np.ndarray, column: int, target: float) -> np.ndarray | None:
    """The measurements (4,) of a coder at `target` bytes, from those at its settings (Q, 4).

    Between the last setting whose bytes (`column`) fit and the next one; the last setting itself
    where more bytes are allowed than it takes; None where no setting fits.
    """
    fits = np.flatnonzero(curve[:, column] <= target)
    if len(fits) == 0:
        return None
    low, high = curve[fits[-1]].copy(), curve[min(fits[-1] + 1, len(curve) - 1)].copy()
    low[:PSNR], high[:PSNR] = np.log(low[:PSNR]), np.log(high[:PSNR])
    span = high[column] - low[column]
    value = low + (high - low) * ((math.log(target) - low[column]) / span if span else 0)
    value[:PSNR] = np.exp(value[:PSNR])
    return value


def as_row(values: np.ndarray | None, pixels: float) -> dict:
    """Means over images (4,), or None, as a row of the JSON; `pixels` is the mean of theirs."""
    if values is None:
        return dict.fromkeys(("bpp", "file_bpp", "bytes", "psnr", "lpips"))
    payload, size, decibels, distance = values.tolist()
    row = {"bpp": 8 * payload / pixels, "file_bpp": 8 * size / pixels, "bytes": size}
    return {**row, "psnr": decibels, "lpips": None if math.isnan(distance) else distance}


def rivals_at(table: dict[str, np.ndarray], target: np.ndarray, pixels: float) -> list[dict]:
    """Rows of rivals (images, Q, 4) at the bytes (images, 2) without header and of the files."""
    rows = []
    for column, matched in ((PAYLOAD, "without header"), (BYTES, "file")):
        for name, values in table.items():
            row = as_row(at_rate(mean(values), column, target[:, column].mean()), pixels)
            pairs = zip(values, target[:, column], strict=True)
            each = [at_rate(curve, column, size) for curve, size in pairs]
            missed = any(value is None for value in each)
            every = as_row(None if missed else mean(np.stack(each)), pixels)
            rows.append({"coder": name, "matched": matched, **row, "every_image": every})
    return rows


def format_results(result: dict) -> str:
    """The tables as Markdown, one for each rate."""
    lpips = f"LPIPS-{result['lpips_net']}" if result["lpips_net"] else "LPIPS"
    heading = ["coder", "bytes a file", "bpp without header", "bpp of the file", "PSNR dB", lpips]
    heading += ["PSNR dB, these bytes for every image"]
    forms = {"bytes": ".0f", "bpp": ".3f", "file_bpp": ".3f", "psnr": ".2f", "lpips": ".4f"}
    parts = [result["method"]]
    for rate in result["rates"]:
        lines = [heading, ["---", *["---:"] * (len(heading) - 1)]]
        for row in [*rate["ours"], *rate["rivals"]]:
            lpips = "–" if result["lpips_net"] else "missing"
            missing = {key: "–" for key in forms} | {"lpips": lpips}
            cells = [missing[k] if row[k] is None else f"{row[k]:{f}}" for k, f in forms.items()]
            every = (row.get("every_image") or {}).get("psnr")
            name = row["coder"] + (", file" if row.get("matched") == "file" else "")
            name += " (its smallest is larger)" if row["psnr"] is None else ""
            lines.append([name, *cells, "–" if every is None else f"{every:.2f}"])
        title = f"## {rate['bpp']:.3f} bpp without headers, {rate['file_bpp']:.3f} as files\n"
        parts.append("\n".join([title, *(f"| {' | '.join(line)} |" for line in lines)]))
    parts += [f"{name}: {problem}" for name, problem in result["unavailable"].items()]
    return "\n\n".join(parts)


def draw(result: dict, path: Path) -> None:
    """PSNR and LPIPS against bpp: rivals as lines, checkpoints with a marker at each k."""
    lines, formats = [], []  # lines: label, rows, style, whether the files are drawn as well
    for curve in result["curves"]:
        first = curve["format"] not in formats
        style = {"color": COLOURS[curve["format"]], "linestyle": "-" if first else "--"}
        lines.append((curve["coder"], curve["rows"], style, first))
        formats.append(curve["format"])
    for i, ours in enumerate(result["checkpoints"]):
        colour = OUR_COLOURS[i % 4]
        for coded, end, face in ((False, "", colour), (True, ", entropy-coded", "white")):
            style = {"color": colour, "marker": OUR_MARKERS[i % 4], "markerfacecolor": face}
            rows = [row for row in ours["rows"] if row["entropy_coded"] == coded]
            lines += [(ours["name"] + end, rows, style, True)] if rows else []
    rates = [rate[key] for rate in result["rates"] for key in ("bpp", "file_bpp")]
    left, right = 0.6 * min(rates), 1.7 * max(rates)
    keys = ["psnr", "lpips"] if result["lpips_net"] else ["psnr"]
    figure = util.load_figure()(figsize=(6 * len(keys), 6), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        seen = []
        for label, rows, style, files in lines:
            y = [math.nan if row[key] is None else row[key] for row in rows]
            axes.plot([row["bpp"] for row in rows], y, label=label, **style)
            if files:
                dotted = {**style, "linestyle": ":", "markersize": 3, "linewidth": 1.2}
                axes.plot([row["file_bpp"] for row in rows], y, **dotted)
            seen += [v for row, v in zip(rows, y, strict=True) if left <= row["bpp"] <= right]
        axes.plot([], [], ":", color="grey", label="the whole file, with header")
        title = "PSNR, dB" if key == "psnr" else f"LPIPS-{result['lpips_net']}, lower is better"
        axes.set(title=title, xlabel="bits per pixel", xscale="log")
        axes.set(yscale="linear" if key == "psnr" else "log")
        ticks = [x for x in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6) if left <= x <= right]
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.set_xticks([], minor=True)
        axes.set(xlim=(left, right), ylim=(0.97 * np.nanmin(seen), 1.03 * np.nanmax(seen)))
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    write_whole(path, lambda file: figure.savefig(file, dpi=150, format="png"))


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure as the flags say, and return what `--json` writes."""
    parser = Parser(prog="rate_distortion.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("images", metavar="DIR", help="a folder of images, nested or flat")
    add("--load", nargs="+", default=[], metavar="FILE", help="checkpoints: last.pt, best.pt")
    add("--lpips-net", choices=("vgg", "alex", "squeeze"), default="alex", help="of the distances")
    add("--limit", type=number(int, 1), metavar="N", help="so many images, evenly over the folder")
    size_help = "resize and crop to squares, as in training; default: as they are"
    add("--img-size", type=number(int, 1), metavar="N", help=size_help)
    add("--json", metavar="FILE", help="write the results there as well")
    add("--figure", metavar="PNG", help="draw the curves there (matplotlib)")
    flags = parser.parse_args(argv)
    if flags.figure:
        util.load_figure()  # missing? better known before the work than after it
    for out in filter(None, (flags.json, flags.figure)):
        if not Path(out).absolute().parent.is_dir() or Path(out).is_dir():
            raise ValueError(f"{out} cannot be written: give a file in a folder that exists")
    if util.world_size() > 1:
        raise ValueError("this script runs in one process: start it without torchrun")

    device = util.setup_processes()
    files = some([path for path, _ in find([flags.images], IMAGE_SUFFIXES)], flags.limit)
    ours = {path: Ours(path, device) for path in flags.load}
    problems = {rival.name: rival.problem() for rival in RIVALS}
    rivals = [rival for rival in RIVALS if problems[rival.name] is None]
    perceptual = lpips_network(flags.lpips_net, device, needed=False)
    coders, measured, pixels = [*ours.values(), *rivals], [], []
    for path in progress(files, "image"):
        image = read_image(path)
        image = np.asarray(fit(image, flags.img_size) if flags.img_size else image)
        pixels.append(image.shape[0] * image.shape[1])
        measured.append([measure(image, coder, perceptual) for coder in coders])
    values = [np.stack(images) for images in zip(*measured, strict=True)]  # (images, settings, 4)
    table = {r.name: v for r, v in zip(rivals, values[len(ours) :], strict=True)}
    area = float(np.mean(pixels))

    checkpoints, targets = [], {}
    names = [coder.codec.model.quantizer.name for coder in ours.values()]
    for (path, coder), v in zip(ours.items(), values, strict=False):
        name = coder.codec.model.quantizer.name
        name += f", {path}" if names.count(name) > 1 else ""  # such as several seeds
        rows = []
        for i, (k, coded) in enumerate(coder.points):
            stages = f", {k} of {coder.codec.stages} stages" * (coder.codec.stages > 1)
            label = name + stages + ", entropy-coded" * coded
            settings = {"coder": label, "stages": k, "entropy_coded": coded}
            rows.append({**settings, **as_row(mean(v[:, i]), area)})
            key = tuple(round(rows[-1][rate], 3) for rate in ("bpp", "file_bpp"))
            targets.setdefault(key, (v[:, i, :PSNR], []))[1].append(rows[-1])
        checkpoints.append({"name": name, "checkpoint": path, "rows": rows})
    for rate in () if ours else RATES:
        targets[rate, rate] = np.outer(pixels, [rate / 8, rate / 8]), []
    rates = [
        {"bpp": bpp, "file_bpp": file, "ours": rows, "rivals": rivals_at(table, target, area)}
        for (bpp, file), (target, rows) in sorted(targets.items(), key=lambda item: item[0])
    ]
    curves = []
    for rival in rivals:
        rows = [as_row(row, area) for row in mean(table[rival.name])]
        rows = [{"quality": q, **row} for q, row in zip(QUALITIES, rows, strict=True)]
        curves.append({"coder": rival.name, "format": rival.format, "rows": rows})
        curves[-1]["options"] = rival.options
    libraries = [x for x in ("libjpeg_turbo", "webp", "avif") if x in features.get_supported()]
    result = {
        "images": len(files),
        "pixels": sum(pixels),
        "data": flags.images,
        "img_size": flags.img_size,
        "lpips_net": perceptual and perceptual.net,
        "method": f"{len(files)} images, {area:.0f} pixels on average. "
        "bpp: all bits / all pixels. PSNR (peak 255, uint8) and LPIPS: mean over images. "
        "Rivals: one quality for all images, at the rate without headers, or of the whole file; "
        "the last column instead gives every image the "
        "bytes that ours has for it (of this rate, where there is no checkpoint).",
        "rates": rates,
        "checkpoints": checkpoints,
        "curves": curves,
        "unavailable": {name: problem for name, problem in problems.items() if problem},
        "environment": util.environment(device)
        | {"pillow": PIL.__version__, **{name: features.version(name) for name in libraries}},
    }
    print(format_results(result), flush=True)
    if flags.json:
        write_json(Path(flags.json), result)
    if flags.figure:
        draw(result, Path(flags.figure))
    return result


if __name__ == "__main__":
    util.run_script(main)
