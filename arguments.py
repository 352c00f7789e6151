"""Every flag of the project, in groups: `get_args()` reads the command line or a list."""

from __future__ import annotations

import argparse
import math
from argparse import Namespace
from collections.abc import Callable, Sequence

import scheduler
from quantizers import QUANTIZERS
from quantizers.rfsq import STRATEGIES
from util import cpu_cores

# The flags that decide what the weights mean: a checkpoint fits a model if these are equal.
ARCHITECTURE = (
    "quantizer",
    "levels",
    "rfsq_stages",
    "rfsq_strategy",
    "rfsq_slope",
    "rfsq_statistics",
    "lfq_dim",
    "n_embed",
    "embed_dim",
    "ema_stages",
    "network",
    "channel",
    "downsample",
    "res_blocks",
)


# The flags that may change when a run is resumed; any other would make it another run.
MAY_CHANGE = (
    "train_data_path",
    "val_data_path",
    "num_workers",
    "max_train_epochs",
    "train_iters",
    "compile",
    "save",
    "overwrite",
    "load",
    "resume",
    "keep",
    "max_skipped_steps",
    "log_interval",
    "save_interval",
)


class _HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        # Where the default is no value, the help says in words what happens.
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line (exit code 2) and whose help shows defaults."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", _HelpWithDefaults)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


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

    data = parser.add_argument_group("data")
    where = "a folder of images, nested or flat, or packed (scripts/pack_images.py), or `synthetic`"
    data.add_argument(
        "--train-data-path", default="./data/imagenet/train", metavar="DIR", help=where
    )
    data.add_argument("--val-data-path", default="./data/imagenet/val", metavar="DIR", help=where)
    data.add_argument(
        "--img-size",
        type=number(int, 16),
        default=128,
        help="pixels a side: the short side is resized to it, the centre is cropped",
    )
    data.add_argument(
        "--skip-corrupt",
        action="store_true",
        help="leave out images that cannot be read, and report them, instead of stopping",
    )
    data.add_argument(
        "--num-workers",
        type=number(int, 0),
        default=max(1, min(8, cpu_cores() // 2)),
        help="loading processes for each training process; 0 loads in the training process",
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--network",
        choices=("conv", "dct"),
        default="conv",
        help="conv: strided convolutions, as in the paper; dct: a block transform that starts as a "
        "DCT, and a residual network beside it, all at the latent's resolution",
    )
    model.add_argument(
        "--channel",
        type=number(int, 8),
        default=256,
        help="width: of the encoder's last stage (conv), of the residual network (dct)",
    )
    model.add_argument(
        "--downsample", type=int, choices=(4, 8, 16), default=4, help="downsampling factor f"
    )
    model.add_argument(
        "--res-blocks",
        type=number(int, 0),
        default=0,
        help="residual blocks at the lowest resolution, in encoder and decoder each",
    )

    quantizer = parser.add_argument_group("quantizer")
    quantizer.add_argument(
        "--quantizer", choices=tuple(QUANTIZERS), default="rfsq", help="which quantizer"
    )
    quantizer.add_argument(
        "--levels",
        type=int,
        nargs="+",
        default=None,
        metavar="L",
        help="fsq, rfsq: levels of each channel (rfsq: in every stage); default 8 8 8 8 for fsq, "
        "8 8 8 4 for rfsq with 2 stages, 4 4 4 4 4 with 4 stages",
    )
    quantizer.add_argument("--rfsq-stages", type=number(int, 1), default=2, help="rfsq: stages")
    quantizer.add_argument(
        "--rfsq-strategy",
        choices=STRATEGIES,
        default="layernorm",
        help="rfsq: how a stage's residual is brought to the range of the FSQ",
    )
    quantizer.add_argument(
        "--rfsq-initial-scale",
        type=number(float, 0, above=True),
        default=1.0,
        help="rfsq scale: the scale of every stage at the start",
    )
    quantizer.add_argument(
        "--rfsq-slope",
        type=number(float, 0, above=True),
        default=None,
        help="rfsq geometric: slope of the bound; default: the best at a fixed rate, by the number "
        "of levels; for entropy coding about 0.2, with more levels",
    )
    quantizer.add_argument(
        "--rfsq-statistics",
        choices=("global", "image"),
        default="global",
        help="rfsq layernorm: statistics that are constants of the model, or of each image "
        "(side information, counted in the bits)",
    )
    quantizer.add_argument(
        "--rfsq-stage-dropout",
        type=number(float, 0, 1),
        default=0.0,
        help="rfsq: probability that an image in training is quantized by its first stages alone, "
        "so that one model serves all its rates",
    )
    quantizer.add_argument(
        "--lfq-dim", type=number(int, 1, 62), default=12, help="lfq: channels, each one bit"
    )
    quantizer.add_argument(
        "--entropy-loss-weight",
        type=number(float, 0),
        default=0.1,
        help="lfq: weight of the entropy term in the quantizer's loss",
    )
    quantizer.add_argument(
        "--lfq-diversity-gamma",
        type=number(float, 0),
        default=1.0,
        help="lfq: weight of the entropy of the mean code distribution in the entropy term",
    )
    quantizer.add_argument(
        "--lfq-temperature",
        type=number(float, 0, above=True),
        default=1.0,
        help="lfq: t in p(c|z) ~ exp(-|z-c|^2/t)",
    )
    quantizer.add_argument(
        "--lfq-entropy-groups",
        type=number(int, 1),
        default=None,
        help="lfq: groups of bits whose entropies are summed; default: the fewest of <= 24 bits",
    )
    quantizer.add_argument(
        "--commitment-weight",
        "--codebook-loss-weight",  # the former name
        type=number(float, 0),
        default=0.25,
        help="lfq, ema: weight of the commitment term in the quantizer's loss",
    )
    quantizer.add_argument(
        "--n-embed", type=number(int, 2), default=4096, help="ema: codes of each stage"
    )
    quantizer.add_argument(
        "--embed-dim", type=number(int, 1), default=256, help="ema: channels of a code"
    )
    quantizer.add_argument(
        "--ema-stages", type=number(int, 1), default=1, help="ema: stages; above 1 a residual VQ"
    )
    quantizer.add_argument(
        "--ema-decay", type=number(float, 0, 1), default=0.99, help="ema: decay of the codebook"
    )

    loss = parser.add_argument_group("loss (weighted sum of named terms)")
    weight = number(float, 0)
    loss.add_argument(
        "--l1-weight", type=weight, default=1.0, help="weight of L1 on ImageNet-normalised images"
    )
    loss.add_argument(
        "--perceptual-weight", type=weight, default=1.0, help="weight of LPIPS; 0 trains without"
    )
    loss.add_argument(
        "--codebook-weight", type=weight, default=1.0, help="weight of the quantizer's own loss"
    )
    loss.add_argument(
        "--lpips-net",
        choices=("vgg", "alex", "squeeze"),
        default="vgg",
        help="network of LPIPS, in the loss and in the metric",
    )

    optimizer = parser.add_argument_group("optimisation (Adam)")
    optimizer.add_argument(
        "--batch-size",
        type=number(int, 1),
        default=128,
        help="images a step, over all processes together",
    )
    optimizer.add_argument(
        "--max-train-epochs", type=number(int, 1), default=50, help="passes over the training set"
    )
    optimizer.add_argument(
        "--train-iters",
        type=number(int, 1),
        default=None,
        help="at most this many steps, whatever the epochs; default: no such limit",
    )
    optimizer.add_argument(
        "--lr", type=number(float, 0, above=True), default=8e-4, help="peak learning rate"
    )
    optimizer.add_argument(
        "--warmup", type=number(float, 0, 1), default=0.01, help="share of the steps to warm up in"
    )
    optimizer.add_argument(
        "--lr-decay-style",
        choices=scheduler.STYLES,
        default="linear",
        help="how the learning rate falls from its peak to the end of the run",
    )
    optimizer.add_argument(
        "--lr-decay-ratio",
        type=number(float, 0, 1),
        default=0.01,
        help="learning rate at the end, as a share of the peak",
    )
    optimizer.add_argument(
        "--weight-decay", type=number(float, 0), default=5e-5, help="Adam's L2 penalty"
    )
    optimizer.add_argument(
        "--precision",
        choices=("bf16", "fp32"),
        default=None,
        help="of encoder, decoder and LPIPS in training; the quantizer and the evaluation are "
        "float32; default: bf16 on a GPU, fp32 on a CPU",
    )
    optimizer.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compile the forward and the loss (torch.compile); default: on a GPU",
    )
    optimizer.add_argument(
        "--clip-grad",
        type=number(float, 0),
        default=1.0,
        help="largest norm of the gradient; 0 does not clip",
    )

    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=number(int, 0, 2**31), default=0, help="of weights and order")
    run.add_argument(
        "--save",
        default=None,
        metavar="DIR",
        help="run folder; default: a new one under runs/, named by the configuration",
    )
    run.add_argument(
        "--overwrite", action="store_true", help="replace a run that --save already holds"
    )
    run.add_argument(
        "--load",
        default=None,
        metavar="FILE",
        help="checkpoint to start the weights from; default: random weights",
    )
    run.add_argument(
        "--resume",
        default=None,
        metavar="auto|PATH",
        help="continue a run: `auto` from the newest whole checkpoint of its folder (a new run if "
        "there is none), or a checkpoint or run folder; default: a new run",
    )
    run.add_argument(
        "--keep", type=number(int, 1), default=2, help="newest checkpoints kept (beside best.pt)"
    )
    run.add_argument(
        "--max-skipped-steps",
        type=number(int, 1),
        default=10,
        help="steps in a row whose loss or gradient is not finite, skipped, before the run stops",
    )
    run.add_argument(
        "--log-interval", type=number(int, 1), default=50, help="steps between log lines"
    )
    run.add_argument(
        "--save-interval",
        type=number(int, 1),
        default=None,
        help="steps between checkpoints, each with an evaluation; default: an epoch",
    )
    return parser


def get_args(argv: Sequence[str] | None = None) -> Namespace:
    """The flags of the command line, or of the list `argv`.

    Exits with code 2 and one line on standard error for flags that cannot be.
    """
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.img_size % args.downsample:
        parser.error(f"--img-size {args.img_size} is no multiple of --downsample {args.downsample}")
    if args.lr_decay_style == "exponential" and args.lr_decay_ratio == 0:
        parser.error("--lr-decay-style exponential needs a --lr-decay-ratio above 0")
    if args.ema_decay == 1:
        parser.error("--ema-decay must be below 1, or the codebook would never move")
    return args
