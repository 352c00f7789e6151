"""Measure quantizers, training step and loader against plain alternatives, in one process.

    python scripts/benchmark.py                        # on a GPU if there is one, else on the CPU
    python scripts/benchmark.py --only quantizers --compile --json benchmark.json

quantizers  ours against vector-quantize-pytorch (pip install '.[benchmark]'): forward and backward
            in training mode, float32, equal shapes, levels and stages (its ResidualFSQ scales the
            residual by fixed factors instead of a strategy of ours); SVQ against our residual
            VQ-EMA of equal bits, each with the channels that it is best with
step        the training step of train.py against the same model in plain float32 PyTorch
loader      packed images against the folder that they were made from
limits      what the machine can do: a large copy, a matrix product, a convolution

What is compared takes turns (ours, theirs, ours, theirs, ...), so that another load on the machine
affects both. A ratio is the median of the turns' ratios (smallest..largest); above 1, ours is
faster. Other numbers are medians. A turn is as many calls as fill a tenth of a second.
"""

from __future__ import annotations

import copy
import importlib
import math
import subprocess
import sys
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from operator import truediv
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import exits
import output
import timing
import util
from arguments import LPIPS_CHOICES, MAX_SIDE, Parser, get_args, number
from dataset import ImageFolderDataset, PackedDataset, SyntheticDataset
from dataset.base import ImageDataset
from dataset.images import some
from dataset.loaders import train_loader
from files import write_json
from loss import Perceptual, TrainingLoss, WeightsMissing
from model import VQVAE
from quantizers import FSQ, LFQ, RFSQ, SVQ, Pairs, Quantizer, VectorQuantizeEMA
from quantizers.residual import PAPER_LEVELS
from timing import CUDA, DEVICE, spread, timer
from train import TrainingStep, optimise

PACKAGE, INSTALL = "vector_quantize_pytorch", "pip install '.[benchmark]'"
SECTIONS = ("quantizers", "step", "loader", "limits")
LOADER_BATCH, LOADER_SECONDS = 32, 0.5  # images of a batch; time of a turn


@dataclass(frozen=True)
class Case:
    """A quantizer of ours, and what takes turns with it: `theirs`, "" for nothing."""

    ours: Callable[[], Quantizer]
    theirs: Callable[[], Quantizer] | str = ""  # another of ours, or a class of the other package
    arguments: dict = field(default_factory=dict)  # of that class
    options: dict = field(default_factory=dict)  # of its forward

    def alternative(self, package) -> nn.Module | None:
        """The module that takes turns with it; None for nothing, or without the other package."""
        if callable(self.theirs):
            return self.theirs().to(DEVICE)
        if not (self.theirs and package):
            return None
        return getattr(package, self.theirs)(**self.arguments).to(DEVICE)


SCALARS = [Case(partial(FSQ, [8, 8, 8, 8]), "FSQ", {"levels": [8, 8, 8, 8]})]
SCALARS += [
    Case(
        partial(RFSQ, stages, strategy),
        "ResidualFSQ",
        {"levels": levels, "num_quantizers": stages, "is_channel_first": True},
    )
    for stages, levels in PAPER_LEVELS.items()
    for strategy in RFSQ.STRATEGIES
]
LOSS = {"entropy_loss_weight": 0.1, "commitment_loss_weight": 0.25, "diversity_gamma": 1.0}
VQ = {"dim": 256, "codebook_size": 4096, "decay": 0.99, "commitment_weight": 0.25}
VQ |= {"accept_image_fmap": True, "rotation_trick": False}  # straight through, as ours
EMA_22BIT = partial(VectorQuantizeEMA, 2048, 16, stages=2)
EMA_40BIT = partial(VectorQuantizeEMA, 1024, 24, stages=4)
TOKENS = [
    Case(partial(LFQ, 12, **LOSS), "LFQ", {"dim": 12, **LOSS}, {"inv_temperature": 1.0}),
    Case(partial(LFQ, 18, **LOSS)),
    Case(partial(VectorQuantizeEMA, 4096, 256), "VectorQuantize", VQ),
    Case(partial(SVQ, 22, stages=2), EMA_22BIT),
    Case(lambda: Pairs(SVQ(44, 32, stages=4)), EMA_22BIT),  # scripts/beyond/svq_22bit.sh
    Case(partial(SVQ, 40, 28, stages=4), EMA_40BIT),
]


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure as the flags say, print tables and return everything.

    Raises:
        ValueError: for bad input, before anything is measured.
    """
    args = get_flags(argv)
    output.check_json(args.json)
    if args.originals:
        ImageFolderDataset(args.originals, args.img_size)  # raises its errors before the work
    torch.set_num_threads(args.threads or torch.get_num_threads())
    util.seed_everything(0)
    results = {"environment": util.environment(DEVICE), "flags": vars(args)}
    print(", ".join(f"{k} {results['environment'][k]}" for k in ("device", "torch", "threads")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the other package would interrupt the tables
        # The limits are measured in any case: the other sections refer to them.
        rates = results["limits"] = timing.limits(args.repeats, bf16=args.precision == "bf16")
        timing.table("limits; a copy reads and writes", [rates])
        for name, section in (("quantizers", quantizers), ("step", training_step)):
            if name in args.only:
                results[name] = section(args, rates)
        if "loader" in args.only:
            results["loader"] = loader(args)
    if args.json:
        write_json(Path(args.json), results)
    return results


def get_flags(argv: Sequence[str] | None) -> Namespace:
    """The flags of the command line, or of the list `argv`; the defaults suit the device."""
    parser, count = Parser.of(__file__, __doc__), number(int, 1, 4096)
    add = parser.group("all sections")
    everything = ",".join(SECTIONS)
    add("--only", lambda names: names.split(","), everything, metavar="A,B", help="what to measure")
    add("--repeats", count, 5, help="turns of each")
    add("--threads", count, None, help="compute threads on a CPU; default: as PyTorch decides")
    add("--json", str, None, metavar="FILE", help="write every number and the environment there")
    text = "compiled quantizers as well, and our step compiled; default: the step alone, on a GPU"
    add("--compile", bool, None, help=text)
    add("--img-size", number(int, 16, MAX_SIDE), 128, help="step, loader: pixels a side")
    add = parser.group("quantizers")
    text = "batch sizes of z; LFQ, VQ-EMA and SVQ use only the smallest"
    batches = [8, 128] if CUDA else [8]
    add("--z-batch", count, batches, nargs="+", metavar="B", help=text)
    add("--latent", count, 32, help="positions a side of z")
    add("--match", str, "", metavar="TEXT", help="those with this in their name; default: all")
    add = parser.group("step")
    text = "ours; plain PyTorch is float32"
    add("--precision", ("bf16", "fp32"), "bf16" if CUDA else "fp32", help=text)
    add("--batch-size", count, 128 if CUDA else 4, help="images")
    add("--channel", number(int, 8), 256, help="width of the encoder's last stage")
    text = "LPIPS network, with random weights if its own are not available"
    add("--lpips-net", LPIPS_CHOICES, "vgg" if CUDA else "none", help=text)
    add = parser.group("loader")
    add("--originals", str, None, metavar="DIR", help="images; default: generated JPEGs")
    add("--loader-images", number(int, 1, 10**6), 256, help="how many images to read")
    args = parser.parse_args(argv)
    if not {*args.only} <= {*SECTIONS}:
        parser.error(f"--only {','.join(args.only)} is not among {everything}")
    names = [case.ours().name for case in SCALARS + TOKENS]
    if not any(args.match in name for name in names):
        parser.error(f"--match {args.match} is in none of the names: {', '.join(names)}")
    args.model = vars(get_args([f"--channel={args.channel}", f"--img-size={args.img_size}"]))
    return args


def quantizers(args: Namespace, rates: dict) -> dict[str, dict]:
    """A row for each quantizer, batch of z and mode; LFQ's entropies."""
    try:
        package, note = importlib.import_module(PACKAGE), f"{PACKAGE} {version(PACKAGE)}"
    except ImportError:
        package, note = None, f"theirs is missing: {INSTALL}"
    util.set_float32_precision("ieee")
    scalars, tokens = (
        [case for case in cases if args.match in case.ours().name] for cases in (SCALARS, TOKENS)
    )
    work = [(case, batch) for batch in args.z_batch for case in scalars]
    work += [(case, min(args.z_batch)) for case in tokens]
    modes = ["eager", "compiled"] if args.compile else ["eager"]
    work = [(*x, mode) for mode in modes for x in work]
    rows = []
    for case, batch, mode in output.progress(work, "benchmark", "quantizers"):
        torch.compiler.reset()  # or the second shape would be compiled for any shape
        ours = case.ours().to(DEVICE)
        shape = (batch, ours.dim, args.latent, args.latent)
        z = torch.randn(shape, device=DEVICE)
        row = {"quantizer": ours.name, "z": "x".join(map(str, shape)), "ours": mode}
        calls = {"": timing.forward_backward(ours, z, mode)}
        if theirs := case.alternative(package):
            row["against"] = case.theirs if isinstance(case.theirs, str) else theirs.name
            if callable(case.theirs):
                z = torch.randn(batch, theirs.dim, *shape[2:], device=DEVICE)
            calls["theirs "], row["theirs"] = try_mode(theirs, z, mode, case.options)
        times = timing.turns(calls.values(), args.repeats)
        for (who, call), seconds in zip(calls.items(), times, strict=True):
            row[f"{who}ms"] = spread(1e3 * x for x in seconds)
            row[f"{who}peak MiB"] = timing.peak_memory(call)
        row["copies"] = row["ms"]["median"] * rates["copy GB/s"] / (2e-6 * 4 * math.prod(shape))
        if len(times) == 2:
            row["ratio"] = spread(map(truediv, times[1], times[0]))
        rows.append(row)
    title = f"quantizers, forward + backward; copies: our time over a copy of z; {note}"
    result = {"times": timing.table(title, rows)}
    if args.match and args.match not in "lfq-12":  # not one of the quantizers that are shown
        return result
    z = torch.randn(min(args.z_batch), 12, args.latent, args.latent, device=DEVICE)
    title = "entropies of lfq-12, nats; theirs takes log p < 1e-5 as log 1e-5"
    return result | {"entropies": timing.table(title, entropies(package, z))}


def try_mode(module: nn.Module, z: Tensor, mode: str, options: dict) -> tuple[Callable, str]:
    """The call to time, and its mode: what cannot be compiled runs eagerly."""
    call = timing.forward_backward(copy.deepcopy(module), z, mode, **options)
    try:
        call()
    except Exception as error:  # the compiler can raise nearly anything
        if mode == "eager":
            raise
        call = timing.forward_backward(module, z, "eager", **options)
        return call, f"eager ({type(error).__name__})"
    return call, mode


@torch.no_grad()
def entropies(package, z: Tensor) -> list[dict]:
    """LFQ's two entropies by ours, theirs and the definition: p(c|z) of all codes in float64.

    At temperature 1 theirs is limited by its smallest log p; at 20 no p is that small.
    """
    tokens, rows = z.movedim(1, -1).flatten(0, -2).double(), []
    codes = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).to(tokens)] * z.shape[1])
    for temperature in (1.0, 20.0):
        # |z - c|^2 without |z|^2 + |c|^2, which is the same for all codes.
        p = (2 / temperature * tokens @ codes.t()).softmax(1)
        found = {"ours": LFQ(z.shape[1], temperature=temperature).entropies(z)}
        if package:
            lfq, inverse = package.LFQ(dim=z.shape[1]).to(DEVICE).train(), 1 / temperature
            found["theirs"] = lfq(z, inv_temperature=inverse, return_loss_breakdown=True)[1]
        for i, (name, x) in enumerate({"token": p, "batch": p.mean(0)}.items()):
            exact = torch.special.entr(x).sum(-1).mean().item()
            row = {"entropy": name, "temperature": temperature, "definition": exact}
            for who, values in found.items():
                row[who] = values[i].item()
                row[f"{who} off by"] = abs(row[who] / exact - 1)
            rows.append(row)
    return rows


class PlainStep(TrainingStep):
    """The same loss, with images and weights in PyTorch's default memory layout."""

    def forward(self, batch: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        images = batch.float() / 255
        reconstruction, indices, quantizer_loss = self.model(images)
        return self.criterion(images, reconstruction, quantizer_loss), indices


def perceptual(net: str) -> tuple[Perceptual | None, str]:
    """The LPIPS network and its name in the table; weights that are not available are random."""
    if net == "none":
        return None, "no LPIPS"
    try:
        return Perceptual(net), f"LPIPS({net})"
    except WeightsMissing:
        return Perceptual(net, pretrained=False), f"LPIPS({net}, random weights)"


def our_update(step: TrainingStep, optimizer, images: Tensor, mark=lambda part: None):
    """One step of `train.py`."""
    util.set_float32_precision("ieee")  # a setting of the process, in which the steps differ
    optimise(step, optimizer, step.model.parameters(), images, clip_grad=1.0, mark=mark)


def plain_update(step: TrainingStep, optimizer, images: Tensor, precision: str):
    """One step of plain PyTorch with the same model and loss."""
    util.set_float32_precision(precision)
    terms, _ = step(images)
    optimizer.zero_grad(set_to_none=True)
    terms["loss"].backward()
    nn.utils.clip_grad_norm_(step.model.parameters(), 1.0)
    optimizer.step()


def training_step(args: Namespace, rates: dict) -> dict[str, dict]:
    """Images/s of our training step and of plain ones, share of the limit, time of each part."""
    network, lpips_name = perceptual(args.lpips_net)
    criterion = TrainingLoss(1.0, 0.0 if network is None else 1.0, 1.0, network)
    bf16 = args.precision == "bf16"
    start = TrainingStep(VQVAE(Namespace(**args.model)), criterion, bf16).to(DEVICE).train()
    images = torch.randint(256, (args.batch_size, 3, args.img_size, args.img_size))
    images = images.to(DEVICE, torch.uint8)

    def ours(compiled: bool) -> tuple[TrainingStep, partial]:
        step = copy.deepcopy(start).to(DEVICE, memory_format=torch.channels_last)
        if compiled:
            step.compile(fullgraph=True)
        adam = torch.optim.Adam(step.model.parameters(), 1e-4, weight_decay=5e-5, fused=True)
        return step, partial(our_update, step, adam, images)

    def plain(precision: str) -> partial:
        step = PlainStep(copy.deepcopy(start.model), copy.deepcopy(criterion), bf16=False)
        adam = torch.optim.Adam(step.model.parameters(), 1e-4, weight_decay=5e-5)
        return partial(plain_update, step, adam, images, precision)

    compiled = CUDA if args.compile is None else args.compile
    how = f"{args.precision}, compiled" if compiled else args.precision
    steps = {f"ours, {how}": ours(compiled)[1], "plain, fp32": plain("ieee")}
    if CUDA:
        steps["plain, tf32"] = plain("tf32")
    times, (step, eager) = timing.turns(steps.values(), args.repeats), ours(False)
    with FlopCounterMode(display=False) as counter:
        eager()
    rows = []
    for (name, call), seconds in zip(steps.items(), times, strict=True):
        rate = 1e-9 * counter.get_total_flops() / median(seconds)
        precision = name.split(", ")[1]
        limit = max(value for what, value in rates.items() if what.startswith(precision))
        row = {"step": name, "images/s": spread(args.batch_size / s for s in seconds)}
        row["ratio"] = spread(map(truediv, seconds, times[0]))
        row |= {"peak MiB": timing.peak_memory(call), "GFLOP/s": rate, "of the limit": rate / limit}
        rows.append(row)
    about = f"width {args.channel}, {args.img_size} pixels, batch {args.batch_size}, {lpips_name}"
    title = f"training step, {start.model.quantizer.name}, {about}; ratio: how much faster ours is"
    result = {"times": timing.table(title, rows)}
    modules = {name: getattr(step.model, name) for name in ("encoder", "quantizer", "decoder")}
    if network is not None:
        modules["LPIPS"] = step.criterion.perceptual
    parts = timing.part_times(eager, modules, ("forward", "backward", "optimizer"), args.repeats)
    return result | {"parts": timing.table("its parts, eager, each waited for", parts)}


def loader(args: Namespace) -> dict[str, dict]:
    """Images/s from a folder and from the same images packed; `ratio` is to the folder."""
    with tempfile.TemporaryDirectory() as root:
        originals, out = Path(root, "originals"), Path(root, "packed")
        originals.mkdir()
        make_originals(args, originals)
        command = [sys.executable, Path(__file__).with_name("pack_images.py"), originals, out]
        command.append(f"--img-size={args.img_size}")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"the images cannot be packed: {done.stderr.strip()}")
        folder = ImageFolderDataset(originals, args.img_size)
        packed = PackedDataset(out, args.img_size)
        loaders = [("folder", folder, 1), ("packed", packed, 1), ("packed", packed, 4)]
        repeats = output.progress(range(args.repeats), "load", "turns")
        speeds = [[images_per_second(*loader[1:]) for loader in loaders] for _ in repeats]
    speeds, rows = list(zip(*speeds, strict=True)), []
    for (name, _, workers), speed in zip(loaders, speeds, strict=True):
        row = {"images": name, "workers": workers, "images/s": spread(speed)}
        rows.append({**row, "ratio": spread(map(truediv, speed, speeds[0]))})
    what = args.originals or "generated JPEGs of 500x375"
    title = f"loader, {len(folder)} of {what}, random order; ratio: to the folder"
    return {"times": timing.table(title, rows)}


def make_originals(args: Namespace, folder: Path) -> None:
    """Links to some of the images of --originals, evenly, or generated JPEGs."""
    if args.originals:
        given = ImageFolderDataset(args.originals, args.img_size)
        for i in some(range(len(given)), args.loader_images):
            path = given.path(i).absolute()
            (folder / f"{i:06d}{path.suffix}").symlink_to(path)
    else:
        images = SyntheticDataset(500, seed=0, length=args.loader_images)
        for i, image in enumerate(output.progress(images, "generate", "images")):
            pixels = image[:, :375].permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / f"{i:06d}.jpg", quality=95)


def images_per_second(dataset: ImageDataset, workers: int) -> float:
    """The rate at which batches arrive after the first one; the files are in the page cache."""
    batches = iter(train_loader(dataset, min(LOADER_BATCH, len(dataset)), 10**9, 0, 0, workers))
    next(batches)  # the start of the workers does not count
    count, start = 0, timer()
    while not count or timer() - start < LOADER_SECONDS:
        count += len(next(batches))
    return count / (timer() - start)


if __name__ == "__main__":
    exits.run_script(main)
