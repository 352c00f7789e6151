"""Bytes on disk against PSNR and LPIPS: checkpoints at every k, beside JPEG, WebP and AVIF.

    python scripts/rate_distortion.py DIR --load runs/NAME/last.pt --json rd.json --figure rd.png

What is measured is the uint8 image that the bytes of a file decode to. Over a folder: bpp = all
bits / all pixels; PSNR (peak 255, at most 100 dB) and LPIPS of each image, then the mean. Rates are
given for whole files and without headers: of ours, payload and image statistics; of the others, see
`codec/baselines.py`, which has their settings too.

A baseline runs over a grid of qualities; its value at a rate is interpolated between the highest
quality that fits and the next one, linearly in the logarithm of the bytes. The rates are those of
the checkpoints, met in two ways: by one quality for all images, as a codec is used, and by the
bytes of our file for every image, which mostly gives a higher mean PSNR.
"""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import features

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import util
from arguments import LPIPS_NETS, Parser, add_evaluation_flags, number
from checkpoint import write_json, write_whole
from codec import bitstream
from codec.baselines import BASELINES, QUALITIES, Baseline
from codec.codec import Codec, psnr
from dataset import IMAGE_SUFFIXES, find, fit, read_image, some
from loss import Perceptual, lpips_network
from metric import PSNR_CAP
from util import progress

# Columns of measurements: bytes without header, bytes of the file, dB, distance.
PAYLOAD, BYTES, PSNR, LPIPS = range(4)
RATES = (0.344, 0.625, 1.375, 2.5)  # bpp, where there is no checkpoint
COLOURS = {"JPEG": "#e69f00", "WEBP": "#56b4e9", "AVIF": "#009e73"}  # of Okabe and Ito
OUR_COLOURS, OUR_MARKERS = ("#000000", "#d55e00", "#cc79a7", "#0072b2"), "os^D"


class Ours:
    """A checkpoint with its first k stages, for every k; entropy-coded too if it has the tables.

    `points` are the settings: (k, whether entropy-coded).
    """

    def __init__(self, path: str, device: torch.device):
        self.codec = Codec(path, device)
        coded = [False] if self.codec.entropy_model is None else [False, True]
        self.points = [(k, c) for c in coded for k in range(1, self.codec.stages + 1)]

    def __call__(self, image: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """(bytes without header, bytes of the file, decoded image) at each of the points."""
        indices, statistics = self.codec.encode_indices(image)
        for k, coded in self.points:
            data = self.codec.write(indices, statistics, image.shape[:2], k, coded)
            header = bitstream.read_header(data).size + 4  # and the checksum
            yield len(data) - header, len(data), self.codec.decode(data)


def measure(image: np.ndarray, coder: Callable, perceptual: Perceptual | None) -> np.ndarray:
    """One uint8 image (H, W, 3) at all settings of a coder: (settings, 4), see `PAYLOAD` ff.

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
    """The mean over the first axis, the images, without NaNs (images without LPIPS)."""
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
    """Means over images (4,), or None, as a row of the JSON; `pixels`: their mean number."""
    if values is None:
        return dict.fromkeys(("bpp", "file_bpp", "bytes", "psnr", "lpips"))
    payload, size, decibels, distance = values.tolist()
    row = {"bpp": 8 * payload / pixels, "file_bpp": 8 * size / pixels, "bytes": size}
    return {**row, "psnr": decibels, "lpips": None if math.isnan(distance) else distance}


def baselines_at(table: dict[str, np.ndarray], target: np.ndarray, pixels: float) -> list[dict]:
    """Rows of the baselines at a rate: at equal bytes without header, then at equal file sizes.

    Args:
        table: measurements of each baseline, (images, qualities, 4).
        target: bytes without header and of the file of every image, (images, 2).
        pixels: mean number of pixels of the images.
    """
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
    net = result["lpips_net"]
    heading = ["coder", "bytes a file", "bpp without header", "bpp of the file", "PSNR dB"]
    heading += [f"LPIPS-{net}" if net else "LPIPS", "PSNR dB, these bytes for every image"]
    forms = {"bytes": ".0f", "bpp": ".3f", "file_bpp": ".3f", "psnr": ".2f", "lpips": ".4f"}
    absent = dict.fromkeys(forms, "–") | {"lpips": "–" if net else "missing"}
    parts = [result["method"]]
    for rate in result["rates"]:
        lines = []
        for row in [*rate["ours"], *rate["baselines"]]:
            cells = [absent[k] if row[k] is None else f"{row[k]:{f}}" for k, f in forms.items()]
            every = (row.get("every_image") or {}).get("psnr")
            name = row["coder"] + (", file" if row.get("matched") == "file" else "")
            name += " (its smallest is larger)" if row["psnr"] is None else ""
            lines.append([name, *cells, "–" if every is None else f"{every:.2f}"])
        title = f"## {rate['bpp']:.3f} bpp without headers, {rate['file_bpp']:.3f} as files"
        parts += [title, util.markdown_table(heading, lines)]
    parts += [f"{name}: {problem}" for name, problem in result["unavailable"].items()]
    return "\n\n".join(parts)


def draw(result: dict, path: Path) -> None:
    """PSNR and LPIPS against bpp: baselines as lines, checkpoints with a marker at each k."""
    lines, formats = [], []  # a line: label, rows, style, whether to draw the files as well
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


def checkpoint_rows(ours: dict[str, Ours], values: Sequence[np.ndarray], area: float) -> list:
    """Each checkpoint with a row for each of its points.

    Args:
        ours: the checkpoints by their paths.
        values: measurements of each, (images, points, 4).
        area: mean number of pixels of the images.
    """
    names = [c.codec.args.name or c.codec.model.quantizer.name for c in ours.values()]
    result = []
    for (path, coder), name, v in zip(ours.items(), names, values, strict=True):
        name += f", {path}" if names.count(name) > 1 else ""  # such as several seeds
        rows = []
        for (k, coded), row in zip(coder.points, mean(v), strict=True):
            stages = f", {k} of {coder.codec.stages} stages" * (coder.codec.stages > 1)
            label = name + stages + ", entropy-coded" * coded
            settings = {"coder": label, "stages": k, "entropy_coded": coded}
            rows.append({**settings, **as_row(row, area)})
        result.append({"name": name, "checkpoint": path, "rows": rows})
    return result


def rates_of(
    checkpoints: Sequence[dict], ours: Sequence[np.ndarray], table: dict, pixels: Sequence[int]
) -> list[dict]:
    """The baselines beside the checkpoints' rows at the rates of these, equal rates together.

    Without checkpoints, at `RATES`. Arguments: what `checkpoint_rows` gives and takes, the
    measurements of each baseline, (images, qualities, 4), and the pixels of each image.
    """
    targets = {}  # (bpp, bpp of the files): bytes of every image (images, 2), rows of ours
    for checkpoint, v in zip(checkpoints, ours, strict=True):
        for i, row in enumerate(checkpoint["rows"]):
            key = round(row["bpp"], 3), round(row["file_bpp"], 3)
            targets.setdefault(key, (v[:, i, :PSNR], []))[1].append(row)
    for rate in () if checkpoints else RATES:
        targets[rate, rate] = np.outer(pixels, [rate / 8, rate / 8]), []
    area = float(np.mean(pixels))
    return [
        {"bpp": key[0], "file_bpp": key[1], "ours": rows}
        | {"baselines": baselines_at(table, target, area)}
        for key, (target, rows) in sorted(targets.items(), key=lambda item: item[0])
    ]


def curve(baseline: Baseline, values: np.ndarray, area: float) -> dict:
    """A baseline over all qualities, from its measurements (images, qualities, 4)."""
    rows = zip(QUALITIES, mean(values), strict=True)
    rows = [{"quality": quality, **as_row(row, area)} for quality, row in rows]
    about = {"coder": baseline.name, "format": baseline.format, "options": baseline.options}
    return {**about, "rows": rows}


def get_flags(argv: Sequence[str] | None) -> Namespace:
    """The flags of the command line, or of the list `argv`, with the outputs checked."""
    parser = Parser(prog="rate_distortion.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("images", metavar="DIR", help="a folder of images, nested or flat")
    add("--load", nargs="+", default=[], metavar="FILE", help="checkpoints: last.pt, best.pt")
    add("--lpips-net", choices=LPIPS_NETS, default="alex", help="network of LPIPS")
    add("--limit", type=number(int, 1), metavar="N", help="so many images, evenly over the folder")
    size_help = "resize and crop to squares, as in training; default: as they are"
    add("--img-size", type=number(int, 1), metavar="N", help=size_help)
    add_evaluation_flags(parser, "--json")
    add("--figure", metavar="PNG", help="draw the curves there (matplotlib)")
    flags = parser.parse_args(argv)
    util.check_outputs(flags.json, flags.figure)
    if flags.figure:
        util.load_figure()
    if util.world_size() > 1:
        raise ValueError("this script runs in one process: start it without torchrun")
    return flags


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure as the flags say, and return what `--json` writes.

    Raises:
        ValueError: for bad input.
    """
    flags = get_flags(argv)
    device = util.setup_processes()
    files = some([path for path, _ in find([flags.images], IMAGE_SUFFIXES)], flags.limit)
    ours = {path: Ours(path, device) for path in flags.load}
    problems = {baseline.name: baseline.problem() for baseline in BASELINES}
    baselines = [baseline for baseline in BASELINES if problems[baseline.name] is None]
    perceptual = lpips_network(flags.lpips_net, device, needed=False)
    measured, pixels = [], []
    for path in progress(files, "image"):
        image = read_image(path)
        image = np.asarray(fit(image, flags.img_size) if flags.img_size else image)
        pixels.append(image.shape[0] * image.shape[1])
        measured.append([measure(image, c, perceptual) for c in (*ours.values(), *baselines)])
    values = [np.stack(images) for images in zip(*measured, strict=True)]  # (images, settings, 4)
    table = dict(zip([b.name for b in baselines], values[len(ours) :], strict=True))
    area = float(np.mean(pixels))
    checkpoints = checkpoint_rows(ours, values[: len(ours)], area)
    libraries = [x for x in ("libjpeg_turbo", "webp", "avif") if x in features.get_supported()]
    result = {
        "images": len(files),
        "pixels": sum(pixels),
        "data": flags.images,
        "img_size": flags.img_size,
        "lpips_net": perceptual and perceptual.net,
        "method": f"{len(files)} images, {area:.0f} pixels on average. "
        "bpp: all bits / all pixels. PSNR (peak 255, uint8) and LPIPS: mean over images. "
        "Baselines: one quality for all images, at the rate without headers or of the whole file. "
        "Last column: every image gets the bytes that our file of it has (or, without a "
        "checkpoint, the bytes of this rate).",
        "rates": rates_of(checkpoints, values[: len(ours)], table, pixels),
        "checkpoints": checkpoints,
        "curves": [curve(baseline, table[baseline.name], area) for baseline in baselines],
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
