"""Every flag of the project, each declared once: `get_args()` reads the command line or a list.

A declaration may give a flag a role. ARCHITECTURE: it decides what the weights mean, so that a
checkpoint fits a model only if these flags are equal. MAY_CHANGE: it may differ when a run is
resumed. A flag without a role makes another run, but its weights still fit.
"""

from __future__ import annotations

import argparse
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

import scheduler
from networks import DOWNSAMPLES, NETWORKS
from pretrained import LPIPS_NETS
from quantizers import QUANTIZERS, STRATEGIES
from util import default_workers

ARCHITECTURE, MAY_CHANGE = "architecture", "may change"  # the roles of flags
QUANTIZER_GROUP = "quantizer"  # title of the group of the flags that quantizers read
DEFAULTS_OF_MODEL = ("img_size", "name", "lpips_net")  # what scripts take from the model they load
LOAD_HELP = (
    "checkpoint (last.pt, best.pt), run folder (its last.pt), folder of scripts/export.py, or "
    "Hugging Face repository"
)
LPIPS_CHOICES = (*LPIPS_NETS, "none")
IMAGES_HELP = (
    "a folder of images, nested or flat, or packed (scripts/pack_images.py), or tars "
    "(shard-{000..146}.tar), or `synthetic`"
)


MAX_SIDE = 8192  # pixels: Pillow refuses images of more than 89,478,485, or 9,459 a side


class _HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        # Where the default is no value, the help says in words what happens.
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line (exit code 2) and whose help shows defaults."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", _HelpWithDefaults)
        super().__init__(allow_abbrev=False, **kwargs)
        # (title of the group, role, flag) of what `add` of a group has declared
        self.declared: list[tuple[str, str | None, argparse.Action]] = []

    @classmethod
    def of(cls, file: str, doc: str | None) -> Parser:
        """The parser of a script: its `__file__`, and the first line of its `__doc__`."""
        return cls(prog=Path(file).name, description=(doc or "").split("\n")[0])

    def parse_known_args(self, args=None, namespace=None):
        """As of argparse, but an empty text, as of an unset variable, names no file or folder."""
        found, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            value = getattr(found, action.dest, None)
            if value != action.default and "" in (value if isinstance(value, list) else [value]):
                name = action.option_strings[-1] if action.option_strings else action.metavar
                self.error(f"{name} is empty: give a value, or leave it out")
        return found, rest

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")

    def group(self, title: str) -> Callable:
        """A new group of flags. Returns `add`, which declares one in it.

        `names` are the flag and its older names, separated by spaces. `kind` is a type, a tuple of
        choices, or bool: a switch, which has an opposite, --no-..., where the default is None.
        """
        group = self.add_argument_group(title)

        def add(names: str, kind, default, role: str | None = None, **options) -> None:
            if kind is bool:
                options["action"] = (
                    argparse.BooleanOptionalAction if default is None else "store_true"
                )
            elif isinstance(kind, tuple):
                options.update(type=type(kind[0]), choices=kind)
            else:
                options["type"] = kind
            action = group.add_argument(*names.split(), default=default, **options)
            self.declared.append((title, role, action))

        return add


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable:
    """An argparse type: a finite `kind` from `low` (or above it) to `high`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not ((low < value if above else low <= value) and value <= high and value < math.inf):
            wanted = "an integer" if kind is int else "a number"
            span = f"above {low:g}" if above else f"of {low:g} or more"
            upper = "" if high == math.inf else f", at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted} {span}{upper}")
        return value

    return parse


def get_parser() -> Parser:
    """The parser of `train.py`."""
    parser = Parser(
        prog="train.py",
        description="Train a VQVAE around a quantizer and evaluate it. With no flag at all: "
        "RFSQ-2x2048 with layernorm (22.0 bits) on ImageNet, in the set-up of arXiv 2508.15860.",
    )
    _add_data(parser.group("data"))
    _add_model(parser.group("model"))
    _add_quantizer(parser.group(QUANTIZER_GROUP))
    _add_loss(parser.group("loss (weighted sum of named terms)"))
    _add_optimizer(parser.group("optimisation (Adam)"))
    _add_run(parser.group("run"))
    return parser


# fmt: off
def _add_data(add: Callable) -> None:
    add("--train-data-path", str, "./data/imagenet/train", MAY_CHANGE, metavar="DIR",
        help=IMAGES_HELP)
    add("--val-data-path", str, "./data/imagenet/val", MAY_CHANGE, metavar="DIR", help=IMAGES_HELP)
    add("--img-size", number(int, 16, MAX_SIDE), 128,
        help="pixels a side: the short side is resized to it, the centre is cropped")
    add("--skip-corrupt", bool, False, MAY_CHANGE,
        help="leave out images that cannot be read, and report them, instead of stopping")
    add("--num-workers", number(int, 0, 1024), default_workers(), MAY_CHANGE,
        help="loading processes for each training process; 0 loads in the training process")


def _add_model(add: Callable) -> None:
    add("--network", tuple(NETWORKS), "conv", ARCHITECTURE,
        help="conv: strided convolutions, as in the paper; dct: a block transform that starts as a"
             " DCT, and a residual network beside it, all at the latent's resolution")
    add("--channel", number(int, 8, 16384), 256, ARCHITECTURE,
        help="width: of the encoder's last stage (conv), of the residual network (dct)")
    add("--downsample", tuple(DOWNSAMPLES), 4, ARCHITECTURE, help="downsampling factor f")
    add("--res-blocks", number(int, 0, 256), 0, ARCHITECTURE,
        help="residual blocks at the lowest resolution, in encoder and decoder each")


def _add_quantizer(add: Callable) -> None:
    positive = number(float, 0, 1e6, above=True)
    weight = number(float, 0)
    add("--quantizer", tuple(QUANTIZERS), "rfsq", ARCHITECTURE, help="which quantizer")
    add("--levels", int, None, ARCHITECTURE, nargs="+", metavar="L",
        help="fsq, rfsq: levels of each channel (rfsq: in every stage); default 8 8 8 8 for fsq, "
             "8 8 8 4 for rfsq with 2 stages, 4 4 4 4 4 with 4 stages")
    add("--rfsq-stages", number(int, 1, 64), 2, ARCHITECTURE, help="rfsq: number of stages")
    add("--rfsq-strategy", tuple(STRATEGIES), "layernorm", ARCHITECTURE,
        help="rfsq: how a stage's residual is brought to the range of the FSQ")
    add("--rfsq-initial-scale", positive, 0.693147,
        help="rfsq scale: the scale of every stage at the start; log 2 as in the paper's code")
    add("--rfsq-initial-gain", positive, None,
        help="rfsq layernorm: the gain of every channel at the start, with a bias of 0; 1 in the "
             "paper's code; default: near the best for a Gaussian, 1.1/sqrt(L) with a bias of -1/L "
             "for an even number of levels L")
    add("--rfsq-slope", positive, None, ARCHITECTURE,
        help="rfsq geometric: slope of the bound; default: 1/sqrt(6) + 0.7 / levels^stages, for a"
             " fixed rate; for entropy coding 0.1 to 0.2, with more levels")
    add("--rfsq-statistics", ("global", "image"), "global", ARCHITECTURE,
        help="rfsq layernorm: statistics that are constants of the model, or of each image (side "
             "information, counted in the bits)")
    add("--rfsq-stage-dropout", number(float, 0, 1), 0.0,
        help="rfsq: probability that an image in training is quantized by its first stages alone, "
             "so that one model serves all its rates")
    add("--lfq-dim", number(int, 1, 62), 12, ARCHITECTURE, help="lfq: channels, each one bit")
    add("--entropy-loss-weight", weight, 0.1,
        help="lfq: weight of the entropy term in the quantizer's loss")
    add("--lfq-diversity-gamma", weight, 1.0,
        help="lfq: weight of the entropy of the mean code distribution in the entropy term")
    add("--lfq-temperature", positive, 1.0, help="lfq: t in p(c|z) ~ exp(-|z-c|^2/t)")
    add("--lfq-entropy-groups", number(int, 1, 62), None,
        help="lfq: groups of bits whose entropies are summed; default: the fewest of <= 24 bits")
    add("--commitment-weight --codebook-loss-weight", weight, 0.25,
        help="lfq, ema: weight of the commitment term in the quantizer's loss")
    add("--n-embed", number(int, 2, 2**20), 4096, ARCHITECTURE, help="ema: codes of each stage")
    add("--embed-dim", number(int, 1, 16384), 256, ARCHITECTURE, help="ema: channels of a code")
    add("--ema-stages", number(int, 1, 64), 1, ARCHITECTURE,
        help="ema: stages; above 1 a residual VQ")
    add("--ema-decay", number(float, 0, 1), 0.99, help="ema: decay of the codebook")
    add("--pairs", bool, False, ARCHITECTURE,
        help="quantize two neighbouring positions as one vector; the quantizer's channels, stages "
        "and bits then count both")
    add("--svq-bits", number(int, 8, 60), 22, ARCHITECTURE, help="svq: bits of a position")
    add("--svq-dim", number(int, 1, 16384), None, ARCHITECTURE,
        help="svq: channels; default: 12 + 2/5 of the bits")
    add("--svq-classes", number(int, 1, 1024), 8, ARCHITECTURE,
        help="svq: classes of vectors, each with a step of its own")
    add("--svq-stages", number(int, 1, 60), 1, ARCHITECTURE,
        help="svq: tokens that the bits of a position are cut into")


def _add_loss(add: Callable) -> None:
    weight = number(float, 0)
    add("--l1-weight", weight, 1.0, help="weight of L1 on ImageNet-normalised images")
    add("--perceptual-weight", weight, 1.0, help="weight of LPIPS; 0 trains without")
    add("--quantizer-loss-weight --codebook-weight", weight, 1.0,
        help="weight of the loss that the quantizer itself returns (lfq, ema)")
    add("--lpips-net", LPIPS_CHOICES, None,
        help="network of LPIPS, in the loss and in the metric; none reports no LPIPS; default: "
             "vgg, or none with --perceptual-weight 0")


def _add_optimizer(add: Callable) -> None:
    add("--batch-size", number(int, 1, 2**20), 128,
        help="images a step, over all processes together")
    add("--max-train-epochs", number(int, 1, 2**31), 50, MAY_CHANGE,
        help="passes over the training set")
    add("--train-iters", number(int, 1, 2**31), None, MAY_CHANGE,
        help="at most this many steps, however many epochs; default: no such limit")
    add("--lr", number(float, 0, above=True), 8e-4, help="peak learning rate")
    add("--warmup", number(float, 0, 1), 0.01, help="share of the steps to warm up in")
    add("--lr-decay-style", scheduler.STYLES, "linear",
        help="how the learning rate falls from its peak to the end of the run")
    add("--lr-decay-ratio", number(float, 0, 1), 0.01,
        help="learning rate at the end, as a share of the peak")
    add("--weight-decay", number(float, 0), 5e-5, help="Adam's L2 penalty")
    add("--clip-grad", number(float, 0), 1.0, help="largest norm of the gradient; 0 does not clip")
    add("--precision", ("bf16", "fp32"), None,
        help="of encoder, decoder and LPIPS in training; the quantizer and the evaluation are "
             "float32; default: bf16 on a GPU that has it, else fp32")
    add("--compile", bool, None, MAY_CHANGE,
        help="compile the forward and the loss (torch.compile); default: on a GPU")


def _add_run(add: Callable) -> None:
    add("--seed", number(int, 0, 2**31), 0, help="seed for initialisation and data order")
    add("--name", str, None, MAY_CHANGE,
        help="name of the configuration in results and tables; default: the quantizer's name")
    add("--save", str, None, MAY_CHANGE, metavar="DIR",
        help="run folder; default: a new one under runs/, named by quantizer, f, width and seed")
    add("--overwrite", bool, False, MAY_CHANGE, help="replace a run that --save already holds")
    add("--load", str, None, MAY_CHANGE, metavar="MODEL",
        help=f"start from these weights: {LOAD_HELP}; default: random weights")
    add("--resume", str, None, MAY_CHANGE, metavar="auto|PATH",
        help="continue a run: `auto` from the newest whole checkpoint of its folder (a new run if "
             "there is none), or a checkpoint or run folder; default: a new run")
    add("--allow-other-images", bool, False, MAY_CHANGE,
        help="resume although names or sizes of the training images are not those of the run")
    add("--keep", number(int, 1), 2, MAY_CHANGE, help="newest checkpoints kept (beside best.pt)")
    add("--max-skipped-steps", number(int, 1), 10, MAY_CHANGE,
        help="steps in a row whose loss or gradient is not finite, skipped, before the run stops")
    add("--log-interval", number(int, 1), 50, MAY_CHANGE, help="steps between log lines")
    add("--save-interval", number(int, 1), None, MAY_CHANGE,
        help="steps between checkpoints, beside those before evaluations; default: an epoch")
    add("--eval-interval", number(int, 1), None, MAY_CHANGE,
        help="steps between evaluations; default: an epoch")
    add("--tensorboard", bool, False, MAY_CHANGE,
        help="also write the log and the samples for TensorBoard, into the run folder; needs "
             "`pip install '.[tensorboard]'`")
    add("--profile", number(int, 0, 1000), 0, MAY_CHANGE, metavar="N",
        help="record N steps after the first ten with torch.profiler: trace.json in the run folder")
# fmt: on


def add_evaluation_flags(parser: Parser, *names: str) -> None:
    """Declare the flags that the scripts which evaluate checkpoints share; `names` chooses some."""
    flags = {
        "--val-data-path": dict(default="./data/imagenet/val", metavar="DIR", help=IMAGES_HELP),
        "--img-size": dict(
            type=number(int, 16, MAX_SIDE), help="pixels a side; default: as trained"
        ),
        "--batch-size": dict(
            type=number(int, 1, 2**20),
            default=64,
            help="images at a time; affects no more than rounding",
        ),
        "--num-workers": dict(
            type=number(int, 0, 1024),
            default=default_workers() if torch.cuda.is_available() else 1,
            help="loading processes",
        ),
        "--lpips-net": dict(choices=LPIPS_CHOICES, help="network of LPIPS; default: as trained"),
        "--json": dict(metavar="FILE", help="write the results there as well"),
    }
    for name in names or flags:
        parser.add_argument(name, **flags[name])


def get_args(argv: Sequence[str] | None = None) -> Namespace:
    """The flags of the command line, or of the list `argv`.

    Exits with code 2 and one line on standard error for flags that do not fit together.
    """
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.img_size % args.downsample:
        parser.error(f"--img-size {args.img_size} is no multiple of --downsample {args.downsample}")
    if args.pairs and args.img_size % (2 * args.downsample):
        parser.error(
            f"--pairs needs an --img-size that is a multiple of {2 * args.downsample}, twice the "
            f"--downsample, not {args.img_size}"
        )
    if args.lr_decay_style == "exponential" and args.lr_decay_ratio == 0:
        parser.error("--lr-decay-style exponential needs a --lr-decay-ratio above 0")
    if not args.l1_weight and not args.perceptual_weight:
        parser.error(
            "--l1-weight 0 and --perceptual-weight 0 leave nothing to reconstruct by: "
            "give one of them a weight above 0"
        )
    if args.tensorboard and find_spec("tensorboard") is None:
        parser.error("--tensorboard needs `pip install '.[tensorboard]'`, or leave it out")
    if args.lpips_net is None:
        args.lpips_net = "vgg" if args.perceptual_weight else "none"
    if args.lpips_net == "none" and args.perceptual_weight:
        parser.error("--lpips-net none needs --perceptual-weight 0")
    return args
