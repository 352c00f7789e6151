"""Bytes on disk against PSNR, SSIM and LPIPS: checkpoints beside JPEG, WebP and AVIF.

    python scripts/rate_distortion.py DIR --load runs/NAME/last.pt --json rd.json --figure rd.png

What is measured is the uint8 image that the bytes of a file decode to (protocol: RESULTS.md), of a
checkpoint with several stages also by its first 1, 2, ... stages.
Rates are given for whole files and without headers: of ours, payload and image statistics; of the
others, see `codec/baselines.py`. A baseline meets the rates of the checkpoints in two ways: by one
quality for all images, as a codec is used, and by the bytes of our file for every image, which
mostly gives a higher mean PSNR. Both are interpolated between two of its qualities.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import features

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import exits
import output
import util
from arguments import (
    LOAD_HELP,
    LPIPS_CHOICES,
    MAX_SIDE,
    Parser,
    add_evaluation_flags,
    number,
)
from codec import bitstream
from codec.baselines import BASELINES, QUALITIES
from codec.codec import Codec
from codec.pixels import is_grey, psnr
from dataset.images import IMAGE_SUFFIXES, find, fit, read_image, some
from files import write_json
from loss import Perceptual, lpips_if_available
from similarity import PSNR_CAP, SSIM_WINDOW, ssim

# Columns of measurements: bytes without header, bytes of the file, dB, similarity, distance.
PAYLOAD, BYTES, PSNR, SSIM, LPIPS = range(5)
RATES = (0.344, 0.625, 1.375, 2.5)  # bpp, where there is no checkpoint
FORMS = {"bytes": ".0f", "bpp": ".3f", "file_bpp": ".3f"}
FORMS |= {"psnr": ".2f", "ssim": ".4f", "lpips": ".4f"}
STYLES = {  # colours of Okabe and Ito; the files are drawn for the solid lines alone
    "JPEG 4:4:4": ("#e69f00", "-"),
    "JPEG 4:4:4, progressive": ("#e69f00", "-."),
    "JPEG 4:2:0": ("#e69f00", "--"),
    "WebP": ("#56b4e9", "-"),
    "AVIF 4:4:4": ("#009e73", "-"),
    "AVIF 4:4:4, tune=psnr": ("#009e73", "--"),
}
OUR_COLOURS, OUR_MARKERS = ("#000000", "#d55e00", "#cc79a7", "#0072b2"), "os^Dv"


class Ours:
    """A checkpoint with its first k stages, for every k; entropy-coded too if it has the tables."""

    def __init__(self, path: str, device: torch.device):
        self.codec, self.path = Codec(path, device), path
        self.name = output.printable(self.codec.args.name or self.codec.model.quantizer.name)
        coded = [False] if self.codec.format.entropy_model is None else [False, True]
        self.points = [(k, c) for c in coded for k in range(1, self.codec.stages + 1)]

    def settings(self) -> Iterator[dict]:
        """The entries of the JSON for each of the points."""
        for k, coded in self.points:
            stages = f", {k} of {self.codec.stages} stages" if self.codec.stages > 1 else ""
            label = self.name + stages + (", entropy-coded" if coded else "")
            yield {"coder": label, "stages": k, "entropy_coded": coded}

    def __call__(self, image: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """(bytes without header, bytes of the file, decoded image) at each of the points."""
        indices, statistics = self.codec.encode_indices(image)
        size, grey = image.shape[:2], is_grey(image)
        for k, coded in self.points:
            data = self.codec.format.write(indices, statistics, size, k, coded, grey)
            header = bitstream.read_header(data).size + 4  # and the checksum
            yield len(data) - header, len(data), self.codec.decode(data)


@torch.inference_mode()
def measure(image: np.ndarray, coder: Callable, perceptual: Perceptual | None) -> np.ndarray:
    """One uint8 image (H, W, 3) at all settings of a coder: (settings, 5), see `PAYLOAD` ff.

    SSIM and LPIPS are NaN for an image that is too small for them, LPIPS without a network too.
    """
    device = perceptual.scaling.shift.device if perceptual else None

    def tensor(pixels: np.ndarray) -> torch.Tensor:
        return torch.tensor(pixels, device=device).permute(2, 0, 1)[None].float() / 255

    rows, side, original = [], min(image.shape[:2]), tensor(image)
    similarity = distance = math.nan
    for payload, size, pixels in coder(image):
        decoded = tensor(pixels)
        if side >= SSIM_WINDOW:
            similarity = ssim(original, decoded).item()
        if perceptual is not None and side >= perceptual.smallest_side:
            distance = perceptual(original, decoded).item()
        decibels = min(psnr(image, pixels), PSNR_CAP)
        rows.append((payload, size, decibels, similarity, distance))
    return np.array(rows, np.float64)


def mean(values: np.ndarray) -> np.ndarray:
    """The mean over the first axis, the images, without NaNs (images too small)."""
    return np.ma.masked_invalid(values).mean(axis=0).filled(math.nan)


def at_rate(curve: np.ndarray, column: int, target: float) -> np.ndarray | None:
    """The measurements (5,) of a coder at `target` bytes, from those at its settings (Q, 5).

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
    """Means over images (5,), or None, as a row of the JSON; `pixels`: their mean number."""
    if values is None:
        return dict.fromkeys(("bpp", "file_bpp", "bytes", "psnr", "ssim", "lpips"))
    payload, size, *quality = (None if math.isnan(x) else x for x in values.tolist())
    row = {"bpp": 8 * payload / pixels, "file_bpp": 8 * size / pixels, "bytes": size}
    return row | dict(zip(("psnr", "ssim", "lpips"), quality, strict=True))


def as_rows(settings: Iterable[dict], values: np.ndarray, pixels: float) -> list[dict]:
    """A row for each setting of a coder, from its measurements (images, settings, 5)."""
    pairs = zip(settings, mean(values), strict=True)
    return [{**setting, **as_row(row, pixels)} for setting, row in pairs]


def baselines_at(table: dict[str, np.ndarray], target: np.ndarray, pixels: float) -> list[dict]:
    """Rows of the baselines at a rate: at equal bytes without header, then at equal file sizes.

    Args:
        table: measurements of each baseline, (images, qualities, 5).
        target: bytes without header and of the file of every image, (images, 2).
        pixels: mean number of pixels of the images.
    """
    rows = []
    for column, matched in ((PAYLOAD, "without header"), (BYTES, "file")):
        sizes = target[:, column]
        for name, values in table.items():
            row = as_row(at_rate(mean(values), column, sizes.mean()), pixels)
            each = [at_rate(x, column, size) for x, size in zip(values, sizes, strict=True)]
            missed = any(value is None for value in each)
            every = as_row(None if missed else mean(np.stack(each)), pixels)
            rows.append({"coder": name, "matched": matched, **row, "every_image": every})
    return rows


def format_results(result: dict) -> str:
    """The tables as Markdown, one for each rate."""
    net = result["lpips_net"]
    heading = ["coder", "bytes a file", "bpp without header", "bpp of the file", "PSNR dB"]
    heading += ["SSIM", f"LPIPS-{net}" if net else "LPIPS", "PSNR dB, these bytes for every image"]

    def cell(row: dict, key: str) -> str:
        if row.get(key) is not None:
            return f"{row[key]:{FORMS[key]}}"
        return "missing" if key == "lpips" and not net else "–"

    parts = [result["method"]]
    for rate in result["rates"]:
        lines = []
        for row in [*rate["ours"], *rate["baselines"]]:
            name = row["coder"] + (", file" if row.get("matched") == "file" else "")
            if row["psnr"] is None:
                name += " (its smallest is larger)"
            every = cell(row.get("every_image", {}), "psnr")
            lines.append([name, *(cell(row, key) for key in FORMS), every])
        title = f"## {rate['bpp']:.3f} bpp without headers, {rate['file_bpp']:.3f} as files"
        parts += [title, output.markdown_table(heading, lines)]
    parts += [f"{name}: {problem}" for name, problem in result["unavailable"].items()]
    return "\n\n".join(parts)


def draw(result: dict, path: Path) -> None:
    """PSNR, SSIM and LPIPS against bpp: baselines as lines, checkpoints with a marker at each k."""
    lines = []  # label, rows, style, whether to draw the files as well
    for curve in result["curves"]:
        colour, style = STYLES.get(curve["coder"], ("grey", "-"))
        style = {"color": colour, "linestyle": style}
        lines.append((curve["coder"], curve["rows"], style, style["linestyle"] == "-"))
    for i, ours in enumerate(result["checkpoints"]):
        colour, marker = OUR_COLOURS[i % len(OUR_COLOURS)], OUR_MARKERS[i % len(OUR_MARKERS)]
        for coded, end, face in ((False, "", colour), (True, ", entropy-coded", "white")):
            style = {"color": colour, "marker": marker, "markerfacecolor": face}
            rows = [row for row in ours["rows"] if row["entropy_coded"] == coded]
            if rows:
                lines.append((ours["name"] + end, rows, style, True))
    rates = [rate[key] for rate in result["rates"] for key in ("bpp", "file_bpp")]
    left, right = 0.6 * min(rates), 1.7 * max(rates)
    titles = {name: output.METRICS[name][0] for name in ("psnr", "ssim")}
    titles["lpips"] = f"LPIPS-{result['lpips_net']}, lower is better"
    measured = [row for _, rows, _, _ in lines for row in rows]
    titles = {k: v for k, v in titles.items() if any(row[k] is not None for row in measured)}
    figure = output.load_figure()(figsize=(6 * len(titles), 6), layout="constrained")
    all_axes = figure.subplots(1, len(titles), squeeze=False)[0]
    for axes, (key, title) in zip(all_axes, titles.items(), strict=True):
        seen = []
        for label, rows, style, files in lines:
            names = ("bpp", "file_bpp", key)
            x, file_x, y = (np.array([row[name] for row in rows], float) for name in names)
            axes.plot(x, y, label=output.literal(label), **style)
            if files:
                dotted = {**style, "linestyle": ":", "markersize": 3, "linewidth": 1.2}
                axes.plot(file_x, y, **dotted)
            seen.extend(y[(left <= x) & (x <= right)])
        axes.plot([], [], ":", color="grey", label="the whole file, with header")
        axes.set(title=title, xlabel="bits per pixel", xscale="log")
        axes.set(yscale="log" if key == "lpips" else "linear")
        axes.set(xlim=(left, right), ylim=(0.97 * np.nanmin(seen), 1.03 * np.nanmax(seen)))
        axes.xaxis.get_major_locator().set_params(subs=(1, 1.5, 2, 3, 5, 7))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    output.save_picture(figure, path)


def rates_of(
    checkpoints: Sequence[dict], ours: Sequence[np.ndarray], table: dict, pixels: Sequence[int]
) -> list[dict]:
    """The baselines beside the checkpoints' rows at the rates of these, equal rates together.

    Without checkpoints, at `RATES`. `ours` and `table`: measurements (images, settings, 5) of each
    checkpoint and baseline; `pixels`: of each image.
    """
    # (bpp, bpp of the files, which images have which bytes): bytes (images, 2), rows of ours
    targets = {}
    for checkpoint, v in zip(checkpoints, ours, strict=True):
        for i, row in enumerate(checkpoint["rows"]):
            sizes = v[:, i, :PSNR]
            key = round(row["bpp"], 3), round(row["file_bpp"], 3), sizes.tobytes()
            targets.setdefault(key, (sizes, []))[1].append(row)
    for rate in () if checkpoints else RATES:
        targets[rate, rate, b""] = np.outer(pixels, [rate / 8, rate / 8]), []
    result = []
    for (bpp, file_bpp, _), (target, rows) in sorted(targets.items(), key=lambda item: item[0]):
        baselines = baselines_at(table, target, float(np.mean(pixels)))
        result.append({"bpp": bpp, "file_bpp": file_bpp, "ours": rows, "baselines": baselines})
    return result


def measure_all(
    files: Sequence[Path], img_size: int | None, coders: Sequence, perceptual: Perceptual | None
) -> tuple[list[np.ndarray], list[int]]:
    """Measurements (images, settings, 5) of each coder, and the pixels of each image.

    Raises:
        ValueError: an image cannot be read, or a coder refuses it.
    """
    measured, pixels = [], []
    for path in output.progress(files, "measure", "images"):
        image = read_image(path)
        image = np.asarray(fit(image, img_size) if img_size else image)
        pixels.append(image.shape[0] * image.shape[1])
        try:
            measured.append([measure(image, coder, perceptual) for coder in coders])
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{output.printable(str(path))} cannot be compressed ({exits.one_line(error)}): "
                "leave it out, or give --img-size"
            ) from error
    return [np.stack(images) for images in zip(*measured, strict=True)], pixels


def method(values: np.ndarray, area: float, perceptual: Perceptual | None) -> str:
    """Explain the numbers; `values`: measurements (images, settings, 5), `area`: mean pixels."""
    images = len(values)
    with_ssim, with_lpips = np.isfinite(values[:, 0, SSIM:]).sum(0).tolist()
    counts = {"SSIM": with_ssim, "LPIPS": with_lpips if perceptual else images}
    small = "".join(
        f" {name} is of {count} images: the others are too small."
        for name, count in counts.items()
        if count < images
    )
    return (
        f"{images} images, {area:.0f} pixels on average. bpp: all bits / all pixels. PSNR (peak "
        "255, uint8; 100 dB for an exact image), SSIM and LPIPS: mean over images. Baselines: one "
        "quality for all images, at the rate without headers or of the whole file, interpolated "
        f"between two of {len(QUALITIES)} qualities, linearly in the logarithm of the bytes. Last "
        "column: the same for every image at the bytes that our file of it has (or, without a "
        "checkpoint, the bytes of this rate)." + small
    )


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure as the flags say, and return what `--json` writes. ValueError for bad input."""
    parser = Parser.of(__file__, __doc__)
    add = parser.add_argument
    add("images", metavar="DIR", help="a folder of images, nested or flat")
    add("--load", nargs="+", default=[], metavar="MODEL", help=f"each a {LOAD_HELP}")
    add("--lpips-net", choices=LPIPS_CHOICES, default="alex", help="network of LPIPS")
    add("--limit", type=number(int, 1), metavar="N", help="so many images, evenly over the folder")
    text = "resize and crop to squares, as in training; default: as they are"
    add("--img-size", type=number(int, 1, MAX_SIDE), metavar="N", help=text)
    add_evaluation_flags(parser, "--json")
    add("--figure", metavar="PNG", help="draw the curves there (matplotlib)")
    flags = parser.parse_args(argv)
    output.check_json(flags.json)
    if flags.figure:
        output.check_picture("--figure", flags.figure)
    util.refuse_torchrun()
    device = util.setup_processes()
    util.set_float32_precision("ieee")
    files = some([path for path, _ in find([flags.images], IMAGE_SUFFIXES)], flags.limit)
    ours = [Ours(path, device) for path in flags.load]
    problems = {baseline.name: baseline.problem() for baseline in BASELINES}
    baselines = [baseline for baseline in BASELINES if problems[baseline.name] is None]
    perceptual = lpips_if_available(flags.lpips_net, device)
    values, pixels = measure_all(files, flags.img_size, [*ours, *baselines], perceptual)
    our_values, table = values[: len(ours)], values[len(ours) :]
    area = float(np.mean(pixels))
    checkpoints, curves = [], []
    names = output.distinct([coder.name for coder in ours], flags.load)
    for coder, name, v in zip(ours, names, our_values, strict=True):
        coder.name = name
        rows = as_rows(coder.settings(), v, area)
        checkpoints.append({"name": coder.name, "checkpoint": coder.path, "rows": rows})
    for b, v in zip(baselines, table, strict=True):
        about = {"coder": b.name, "format": b.format, "options": b.options}
        rows = as_rows([{"quality": quality} for quality in QUALITIES], v, area)
        curves.append({**about, "rows": rows})
    table = dict(zip([b.name for b in baselines], table, strict=True))
    libraries = [x for x in ("libjpeg_turbo", "webp", "avif") if x in features.get_supported()]
    result = {
        "images": len(files),
        "pixels": sum(pixels),
        "data": flags.images,
        "img_size": flags.img_size,
        "lpips_net": perceptual and perceptual.net,
        "method": method(values[0], area, perceptual),
        "rates": rates_of(checkpoints, our_values, table, pixels),
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
    exits.run_script(main)
