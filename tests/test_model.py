"""The model, the flags that describe it, and the files that hold it."""

import copy
import itertools
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from arguments import get_args, get_parser
from checkpoint import Damaged, load_checkpoint, save_checkpoint
from flags import (
    architecture_flags,
    current_flags,
    differing_flags,
    may_change_flags,
    with_values_in_use,
)
from model import VQVAE, load_model, load_weights
from networks import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    NETWORKS,
    DCTDecoder,
    DCTEncoder,
    Decoder,
    Encoder,
    dct_basis,
)
from quantizers import FSQ, LFQ, QUANTIZERS, RFSQ, GeometricRFSQ, VectorQuantizeEMA, build_quantizer
from util import peak_memory_mib

ROOT = Path(__file__).parent.parent
SMALL = ["--channel", "32", "--img-size", "32"]

CONFIGURATIONS = {
    "default": [],
    "fsq": ["--quantizer", "fsq"],
    "none": ["--rfsq-stages", "4", "--rfsq-strategy", "none"],
    "scale": ["--rfsq-strategy", "scale", "--rfsq-initial-scale", "0.5"],
    "image": ["--rfsq-statistics", "image"],
    "lfq": ["--quantizer", "lfq"],
    "ema": ["--quantizer", "ema", "--n-embed", "64", "--embed-dim", "8"],
    "ema-2": ["--quantizer", "ema", "--n-embed", "64", "--embed-dim", "8", "--ema-stages", "2"],
    "pairs": ["--quantizer=svq", "--pairs", "--svq-bits=20", "--svq-stages=4", "--svq-dim=12"],
    "svq": ["--quantizer", "svq", "--svq-bits", "18", "--svq-stages", "3", "--svq-classes", "4"],
    "dct": ["--network", "dct", "--rfsq-strategy", "geometric", "--levels", "16", "8", "5", "3"],
}
every = pytest.mark.parametrize("name", CONFIGURATIONS)


def build(name="default", *flags):
    return VQVAE(get_args([*SMALL, *CONFIGURATIONS[name], *flags]))


def size(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def side(tokens):
    return tokens if isinstance(tokens, tuple) else (tokens,)


# ---------------------------------------------------------------------------------------
# Shapes
# ---------------------------------------------------------------------------------------
def test_the_default_is_the_network_of_the_public_implementation():
    model = VQVAE(get_args([]))
    assert model.quantizer.dim == 4
    assert size(model.encoder, model.decoder) == 1_063_687
    # conv 4x4 3->128, conv 4x4 128->256, conv 1x1 256->4, and the way back
    assert size(model.encoder) == (48 * 128 + 128) + (16 * 128 * 256 + 256) + (256 * 4 + 4)
    assert size(model.decoder) == (4 * 256 + 256) + (16 * 256 * 128 + 128) + (48 * 128 + 3)


@pytest.mark.parametrize("factor", [4, 8, 16])
@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("channel", [8, 24])
@pytest.mark.parametrize("network", NETWORKS)
def test_shapes(network, factor, blocks, channel):
    shape = {"channel": channel, "downsample": factor, "res_blocks": blocks}
    Encoder, Decoder = NETWORKS[network]
    encoder, decoder = Encoder(5, **shape), Decoder(5, **shape)
    z = encoder(torch.randn(2, 3, 32, 48))
    assert z.shape == (2, 5, 32 // factor, 48 // factor)
    assert decoder(z).shape == (2, 3, 32, 48)
    block = 9 * channel**2 + channel + channel**2 + channel
    plain = {**shape, "res_blocks": 0}
    assert size(encoder) - size(Encoder(5, **plain)) == blocks * block
    assert size(decoder) - size(Decoder(5, **plain)) == blocks * block


def test_channel_is_the_width_of_the_last_stage():
    widths = [
        layer.out_channels
        for layer in Encoder(4, channel=64, downsample=16).layers
        if isinstance(layer, torch.nn.Conv2d)
    ]
    assert widths == [8, 16, 32, 64, 4]


def test_residual_blocks_are_before_the_last_rectifier():
    """The names of weights are numbers of layers: files of models have these."""

    def kinds(network):
        layers = network(4, channel=8, downsample=4, res_blocks=2).layers
        return [type(layer).__name__.removesuffix("2d") for layer in layers]

    blocks = ["ResidualBlock", "ResidualBlock", "ReLU"]
    up = ["ConvTranspose", "ReLU", "ConvTranspose"]
    assert kinds(Encoder) == ["Conv", "ReLU", "Conv", *blocks, "Conv"]
    assert kinds(Decoder) == ["Conv", *blocks, *up]


def test_the_dct_basis_is_that_of_photographs_first():
    f, basis = 4, dct_basis(48, 4).double()
    torch.testing.assert_close(basis @ basis.T, torch.eye(48).double(), atol=1e-6, rtol=0)
    assert torch.equal(dct_basis(7, 4), dct_basis(48, 4)[:7])
    # By hand: c_u c_v cos(pi (y + 1/2) u / 4) cos(pi (x + 1/2) v / 4) of a colour
    y, x = torch.meshgrid(torch.arange(f) + 0.5, torch.arange(f) + 0.5, indexing="ij")
    colour = torch.tensor([1.0, 1.0, 1.0]) / 3**0.5, torch.tensor([1.0, 0.0, -1.0]) / 2**0.5

    def function(colour, u, v):
        scale = (1 if u else 0.5) ** 0.5 * (1 if v else 0.5) ** 0.5 / 2
        wave = torch.cos(torch.pi * y * u / f) * torch.cos(torch.pi * x * v / f) * scale
        return (colour[:, None, None] * wave).flatten()

    # 1/4, 4^(4/5)/4 = 0.76 (the first chroma's mean), then the two slopes at 5/4
    wanted = [(colour[0], 0, 0), (colour[1], 0, 0), (colour[0], 0, 1), (colour[0], 1, 0)]
    for row, one in zip(basis, wanted, strict=False):
        torch.testing.assert_close(row.float(), function(*one), atol=1e-6, rtol=0)
    # All of them: w (1/4 + u + v)^(5/4)
    colour = *colour, torch.tensor([1.0, -2.0, 1.0]) / 6**0.5
    functions = itertools.product(range(3), range(f), range(f))
    order = sorted(functions, key=lambda kuv: (1, 4, 8)[kuv[0]] * (0.25 + sum(kuv[1:])) ** 1.25)
    for row, (k, u, v) in zip(basis, order, strict=True):
        torch.testing.assert_close(row.float(), function(colour[k], u, v), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"f = 4 has at most 48 latent channels.*has 49"):
        dct_basis(49, 4)
    with pytest.raises(ValueError, match="at most 48"):
        VQVAE(get_args(["--network", "dct", "--quantizer", "ema", "--embed-dim", "256"]))


@pytest.mark.parametrize("factor", [4, 8])
def test_the_dct_network_starts_as_an_orthonormal_transform(factor):
    images = torch.randn(2, 3, 32, 48)
    shape = {"channel": 8, "downsample": factor, "res_blocks": 1}
    dim = 3 * factor**2
    encoder, decoder = DCTEncoder(dim, **shape), DCTDecoder(dim, **shape)
    z = encoder(images)
    torch.testing.assert_close(z.square().sum(), images.square().sum())
    torch.testing.assert_close(decoder(z), images, atol=1e-5, rtol=1e-5)
    # Fewer channels: the projection, of which what is left out is orthogonal.
    few, back = DCTEncoder(9, **shape)(images), DCTDecoder(9, **shape)
    assert torch.equal(few, z[:, :9])
    lost = images - back(few)
    torch.testing.assert_close(lost.square().sum(), z[:, 9:].square().sum())


@pytest.mark.parametrize("shape", [{"downsample": 2}, {"downsample": 5}, {"channel": 1}])
def test_shapes_that_cannot_be(shape):
    for kind in (Encoder, Decoder):
        with pytest.raises(ValueError, match=r"downsample|channel"):
            kind(4, **{"channel": 64, "downsample": 4, **shape})


@every
def test_forward(name):
    model = build(name)
    images = 40 * torch.rand(2, 3, 32, 24)  # latents beyond the code of zero
    reconstruction, indices, loss = model(images)
    assert reconstruction.shape == images.shape
    stages = (model.quantizer.stages,) if model.quantizer.stage_axis else ()
    assert indices.shape == (2, 8, 6, *stages)
    assert loss.shape == () and (loss.item() != 0) == (name in ("lfq", "ema", "ema-2"))
    (reconstruction.square().mean() + loss).backward()
    for key, parameter in model.named_parameters():
        # The residual network of "dct" starts as zero, so that only its last layer moves at first.
        waits = name == "dct" and re.search(r"layers\.[01]\.", key)
        assert torch.isfinite(parameter.grad).all() and parameter.grad.any() != bool(waits), key


@pytest.mark.parametrize("height, width", [(30, 32), (32, 30), (33, 31)])
def test_sides_that_are_no_multiple_name_the_sizes(height, width):
    with pytest.raises(ValueError, match=f"{height}x{width}.*multiples of 4"):
        build()(torch.randn(1, 3, height, width))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 4, 32, 32)])
def test_what_is_no_batch_of_images(shape):
    with pytest.raises(ValueError, match=re.escape(str(shape))):
        build().encode(torch.randn(shape))


# ---------------------------------------------------------------------------------------
# Encode and decode
# ---------------------------------------------------------------------------------------
@every
def test_decode_of_encode_is_the_reconstruction(name):
    model = build(name)
    model(torch.rand(4, 3, 32, 32))
    model.eval()
    images = torch.rand(2, 3, 32, 32)
    reconstruction, indices, _ = model(images)
    tokens = side(model.encode(images))
    assert torch.equal(tokens[0], indices)
    assert torch.equal(model.decode(*tokens), reconstruction)
    assert isinstance(model.encode(images), tuple) == (name == "image")


@every
def test_a_model_from_a_checkpoint_decodes_the_same(name, tmp_path):
    model = build(name)
    model(torch.rand(4, 3, 32, 32))
    tokens = side(model.encode(torch.rand(2, 3, 32, 32)))
    state = {"model": model.state_dict(), "args": vars(get_args([*SMALL, *CONFIGURATIONS[name]]))}
    save_checkpoint(tmp_path / "last.pt", state)
    torch.manual_seed(99)
    other = build(name)
    load_weights(other, get_args([*SMALL, *CONFIGURATIONS[name]]), tmp_path / "last.pt")
    assert torch.equal(other.eval().decode(*tokens), model.decode(*tokens))


@every
def test_encode_leaves_state_and_modes_alone(name):
    """In training mode too, and with parts of the model in another mode than the whole."""
    model = build(name).train()
    model(torch.rand(4, 3, 32, 32))
    images = torch.rand(2, 3, 32, 32)
    wanted = side(copy.deepcopy(model).eval().encode(images))
    for frozen in (None, model.quantizer, model.decoder):
        model.train()
        if frozen is not None:
            frozen.eval()
        modes = [module.training for module in model.modules()]
        before = copy.deepcopy(model.state_dict())
        tokens = side(model.encode(images))
        assert [module.training for module in model.modules()] == modes
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), key
        for token, expected in zip(tokens, wanted, strict=True):
            assert torch.equal(token, expected)
    assert not any(token.requires_grad for token in tokens)


def test_normalised_and_integer_images_are_refused():
    """They would give tokens without an error."""
    model, images = build(), torch.rand(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"in \[0, 1\], within 0.02, but these range from -"):
        model.encode(images * 4 - 2)
    with pytest.raises(ValueError, match="range from nan"):
        model.encode(images * torch.nan)
    for function in (model, model.encode):
        with pytest.raises(ValueError, match=r"not torch.uint8: give images.float\(\) / 255"):
            function((images * 255).byte())


def test_the_network_sees_normalised_images():
    model, images, seen = build().eval(), torch.rand(2, 3, 32, 32), []
    model.encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model.decoder.register_forward_hook(lambda module, given, out: seen.append(out))
    reconstruction = model(images)[0]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(seen[0], (images - mean) / std)
    torch.testing.assert_close(reconstruction, seen[1] * std + mean)
    for moved in (model.bfloat16(), model.to("meta").to_empty(device="cpu")):
        kept = moved.normalise
        assert torch.equal(kept.mean, mean) and torch.equal(kept.std, std)


def test_encode_gives_the_mode_back_after_an_error():
    model = build().train()
    with pytest.raises(ValueError):
        model.encode(torch.rand(1, 3, 30, 30))
    assert model.training and model.quantizer.training


def test_the_first_stages_decode_to_a_coarser_image():
    model = build("none").eval()
    images = torch.rand(2, 3, 32, 32)
    indices = model.encode(images)
    for k in range(1, 5):
        codes = model.quantizer.indices_to_codes(indices[..., :k])
        assert torch.equal(model.decode(indices[..., :k]), model.to_images(codes))
    assert torch.equal(model.decode(indices), model(images)[0])


@every
def test_a_model_cast_to_half_precision_still_decodes(name):
    model = build(name).eval().bfloat16()
    images = torch.rand(2, 3, 32, 32).bfloat16()
    reconstruction, *_ = model(images)
    assert reconstruction.dtype == torch.bfloat16
    assert torch.equal(model.decode(*side(model.encode(images))), reconstruction)


# ---------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------
def flags():
    return [action for action in get_parser()._actions if action.dest != "help"]


def test_without_flags_it_is_rfsq_with_layernorm():
    quantizer = VQVAE(get_args([])).quantizer
    assert isinstance(quantizer, RFSQ)
    assert (quantizer.strategy, quantizer.statistics) == ("layernorm", "global")
    assert quantizer.levels == [8, 8, 8, 4] and quantizer.stages == 2 and quantizer.bits == 22.0


def test_the_set_up_of_the_paper_is_the_default():
    args = get_args([])
    assert (args.lr, args.weight_decay, args.batch_size) == (8e-4, 5e-5, 128)
    assert (args.max_train_epochs, args.warmup, args.clip_grad) == (50, 0.01, 1.0)
    assert (args.img_size, args.downsample, args.channel) == (128, 4, 256)
    assert (args.l1_weight, args.perceptual_weight, args.quantizer_loss_weight) == (1, 1, 1)
    assert (args.lr_decay_style, args.lpips_net) == ("linear", "vgg")


def parse(line):
    return get_args(line.split())


def test_flags_reach_the_quantizer():
    rfsq = RFSQ.from_args(
        parse("--rfsq-stages 3 --rfsq-strategy scale --levels 5 4 3 --rfsq-initial-scale 2.5")
    )
    assert (rfsq.stages, rfsq.strategy, rfsq.levels) == (3, "scale", [5, 4, 3])
    assert rfsq.log_scale.exp().tolist() == pytest.approx([2.5] * 3)
    assert RFSQ.from_args(parse("--rfsq-statistics image")).statistics == "image"
    assert RFSQ.from_args(parse("--rfsq-initial-gain 1")).log_gain.eq(0).all()
    geometric = build_quantizer(parse("--rfsq-strategy geometric --rfsq-slope 0.2"))
    assert geometric.slope.tolist() == pytest.approx([0.2] * 4)
    assert FSQ.from_args(parse("--quantizer fsq")).levels == [8, 8, 8, 8]
    assert FSQ.from_args(parse("--quantizer fsq --levels 7 5")).levels == [7, 5]
    lfq = LFQ.from_args(
        parse(
            "--lfq-dim 10 --entropy-loss-weight 0.2 --codebook-loss-weight 0.3 "
            "--lfq-diversity-gamma 0.4 --lfq-temperature 0.5 --lfq-entropy-groups 2"
        )
    )
    assert (lfq.dim, lfq.entropy_loss_weight, lfq.commitment_loss_weight) == (10, 0.2, 0.3)
    assert (lfq.diversity_gamma, lfq.temperature, lfq.entropy_groups) == (0.4, 0.5, 2)
    ema = VectorQuantizeEMA.from_args(
        parse(
            "--n-embed 32 --embed-dim 6 --ema-stages 2 --ema-decay 0.8 --codebook-loss-weight 0.7"
        )
    )
    assert ema.codebook.shape == (2, 32, 6)
    assert (ema.decay, ema.commitment_loss_weight) == (0.8, 0.7)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_is_a_flag_away(name):
    model = VQVAE(get_args(["--quantizer", name]))
    assert type(model.quantizer) is QUANTIZERS[name]


def test_no_flag_is_dead():
    """Every flag is read by the code that trains; `arguments.py` only declares and checks them."""
    folders = (".", "quantizers", "loss", "run")
    sources = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    text = "\n".join(path.read_text() for path in sources if path.name != "arguments.py")
    read = set(re.findall(r"\bargs\.(\w+)", text))
    read |= {flag for kind in (*QUANTIZERS.values(), GeometricRFSQ) for flag in kind.flags}
    assert {action.dest for action in flags()} - read == set()


def test_roles_are_those_of_the_declarations():
    assert "rfsq_slope" in architecture_flags() and "lr" not in architecture_flags()
    assert "save" in may_change_flags() and "seed" not in may_change_flags()
    assert not set(architecture_flags()) & set(may_change_flags())


def test_old_names_of_flags_are_read():
    args = get_args(["--codebook-weight", "2", "--codebook-loss-weight", "3"])
    assert (args.quantizer_loss_weight, args.commitment_weight) == (2, 3)
    saved = {"codebook_weight": 2, "codebook_loss_weight": 3, "lr": 1, "unknown": 4}
    renamed = {"quantizer_loss_weight": 2, "commitment_weight": 3, "lr": 1, "unknown": 4}
    assert current_flags(saved) == renamed


def test_lpips_network_follows_its_weight():
    assert get_args([]).lpips_net == "vgg"
    assert get_args(["--perceptual-weight", "0"]).lpips_net == "none"
    assert get_args(["--perceptual-weight", "0", "--lpips-net", "alex"]).lpips_net == "alex"


def test_every_flag_is_in_a_group_with_help():
    for action in flags():
        assert action.help and action.option_strings[0] == "--" + action.dest.replace("_", "-")
        assert action.container.title not in ("options", "optional arguments")


def test_help_mentions_every_default(capsys):
    with pytest.raises(SystemExit) as stop:
        get_args(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for action in flags():
        formatter = get_parser()._get_formatter()
        formatter.add_argument(action)
        entry = " ".join(formatter.format_help().split())
        assert entry in text
        # Without a default in the parser, the words say what happens.
        default = "default" if action.default is None else f"(default: {action.default})"
        assert default in entry or action.dest in ("load", "train_iters"), entry
        assert "None" not in entry, entry


BAD_FLAGS = {
    "levels": (["--levels", "x"], "--levels.*'x'"),
    "strategy": (["--rfsq-strategy", "batchnorm"], "--rfsq-strategy.*batchnorm"),
    "quantizer": (["--quantizer", "vq"], "--quantizer.*vq"),
    "lr": (["--lr", "-1"], "--lr.*'-1'.*above 0"),
    "lr zero": (["--lr", "0"], "--lr.*'0'.*above 0"),
    "lr nan": (["--lr", "nan"], "--lr.*'nan'"),
    "lr inf": (["--lr=inf"], "--lr.*'inf'"),
    "warmup": (["--warmup", "1.5"], "--warmup.*'1.5'.*at most 1"),
    "batch": (["--batch-size", "0"], "--batch-size.*'0'.*1 or more"),
    "float batch": (["--batch-size", "1.5"], "--batch-size.*'1.5'.*integer"),
    "scale": (["--rfsq-initial-scale", "0"], "--rfsq-initial-scale.*'0'.*above 0"),
    "stages": (["--rfsq-stages", "0"], "--rfsq-stages.*'0'"),
    "dim": (["--lfq-dim", "63"], "--lfq-dim.*'63'.*at most 62"),
    "downsample": (["--downsample", "5"], "--downsample.*5"),
    "size": (["--img-size", "130"], "--img-size 130.*--downsample 4"),
    "ratio": (
        ["--lr-decay-style", "exponential", "--lr-decay-ratio", "0"],
        "exponential.*--lr-decay-ratio",
    ),
    "no lpips": (["--lpips-net", "none"], "--lpips-net none.*--perceptual-weight 0"),
    "many codes": (["--n-embed", "1000000000"], "--n-embed.*'1000000000'.*at most"),
    "wide": (["--channel", "100000000"], "--channel.*'100000000'.*at most"),
    "unknown": (["--no-such-flag"], "--no-such-flag"),
    "abbreviated": (["--batch", "4"], "--batch"),
    "no value": (["--lr"], "--lr"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags_are_one_line_and_code_2(name, capsys):
    argv, named = BAD_FLAGS[name]
    with pytest.raises(SystemExit) as stop:
        get_args(argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == "" and err.endswith("\n") and err.count("\n") == 1
    assert re.search(named, err), err


@pytest.mark.parametrize("argv", [["--levels", "1"], ["--rfsq-stages", "3"]])
def test_what_the_quantizer_refuses_names_the_levels(argv):
    with pytest.raises(ValueError, match="level"):
        VQVAE(get_args(argv))


@pytest.mark.parametrize(
    "flag, value",
    [
        ("res_blocks", 10**7),
        ("channel", "wide"),
        ("levels", [8, None]),
        ("levels", 8),
        ("network", ["conv"]),
        ("rfsq_stages", 2.5),
        ("channel", None),
        ("levels", []),
        ("quantizer", "x\ny" * 50),
        ("img_size", "128"),
        ("lpips_net", ["vgg"]),
        ("commitment_weight", torch.ones(2)),
        ("name", 5),
        ("compile", "yes"),
        ("overwrite", None),
    ],
    ids=str,
)
def test_impossible_flags_of_a_checkpoint_are_one_line(flag, value, tmp_path):
    args = {**vars(get_args(SMALL)), flag: value}
    save_checkpoint(tmp_path / "last.pt", {"model": {}, "args": args})
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} cannot be") as caught:
        load_model(tmp_path / "last.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weights", [5, [], {1: torch.ones(2)}, {"decoder.layers.0.bias": 1.0}])
def test_weights_that_are_no_tensors_by_name_are_no_checkpoint(weights, tmp_path):
    save_checkpoint(tmp_path / "last.pt", {"model": weights, "args": vars(get_args(SMALL))})
    with pytest.raises(ValueError, match="not a checkpoint") as caught:
        load_model(tmp_path / "last.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"quantizer": "ema", "n_embed": 2**20, "embed_dim": 16384}, "encoder.layers.* is"),
        ({"channel": 4096, "res_blocks": 64}, "encoder.layers.* is"),
        ({"quantizer": "ema", "ema_stages": 64, "n_embed": 2**20}, "encoder.layers.* is"),
    ],
)
@pytest.mark.parametrize("empty", [False, True])
def test_flags_of_a_huge_model_take_no_memory(changes, says, empty, tmp_path):
    """A small file, whose flags describe a model of 17 to 300 GB."""
    args = get_args(SMALL)
    weights = {} if empty else VQVAE(args).state_dict()
    save_checkpoint(tmp_path / "last.pt", {"model": weights, "args": {**vars(args), **changes}})
    load_checkpoint(tmp_path / "last.pt")
    with torch.device("meta"):  # its first use imports modules of torch that take memory
        VQVAE(args).state_dict()
    peak = peak_memory_mib(torch.device("cpu"))
    with pytest.raises(ValueError, match="numbers are missing" if empty else says):
        load_model(tmp_path / "last.pt")
    assert peak_memory_mib(torch.device("cpu")) - peak < 100


def test_an_unknown_quantizer_names_the_known():
    args = get_args([])
    args.quantizer = "vq"
    with pytest.raises(ValueError, match=r"'vq'.*fsq, rfsq, lfq, ema"):
        VQVAE(args)


# ---------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------
class Executes:
    """Unpickled with trust, it would make the folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def bad_checkpoint(kind, folder):
    path = folder / "last.pt"
    good = {"model": {"w": torch.randn(100)}, "args": {}}
    state = {"format": 1, **good, "x": Executes(folder / "made")}
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("step,loss\n1,0.5\n")
    elif kind == "text like a pickle":
        path.write_text(".0 epochs\n")
    elif kind == "bytes":
        path.write_bytes(bytes(range(256)) * 8)
    elif kind.startswith("truncated"):
        save_checkpoint(path, good)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) * int(kind.split()[1]) // 100])
    elif kind == "executes":
        torch.save(state, path)
    elif kind == "executes, plain pickle":
        path.write_bytes(pickle.dumps(state, protocol=2))
    elif kind == "a tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "weights alone":
        torch.save(good["model"], path)
    elif kind == "another format":
        torch.save({"format": 999, **good}, path)
    elif kind in NAMES:
        torch.save({"format": 1, **good}, folder / "good.pt")
        with zipfile.ZipFile(folder / "good.pt") as whole, zipfile.ZipFile(path, "w") as packed:
            for entry in whole.infolist():
                named = entry.filename.endswith("data.pkl")
                packed.writestr(entry.filename, NAMES[kind] if named else whole.read(entry))
        (folder / "good.pt").unlink()
    elif kind == "deflated":  # 100 MB in 100 kB
        torch.save({"format": 1, **good, "x": torch.zeros(25_000_000)}, folder / "stored.pt")
        with zipfile.ZipFile(folder / "stored.pt") as stored, zipfile.ZipFile(path, "w") as packed:
            for entry in stored.infolist():
                packed.writestr(entry.filename, stored.read(entry), zipfile.ZIP_DEFLATED)
        (folder / "stored.pt").unlink()
    elif kind == "overlapping":  # 40 tensors that share the bytes of one
        tensors = {f"{i}": torch.ones(100_000) for i in range(40)}
        torch.save({"format": 1, "args": {}, "model": tensors}, folder / "apart.pt")
        with zipfile.ZipFile(folder / "apart.pt") as apart, zipfile.ZipFile(path, "w") as packed:
            first = None
            for entry in apart.infolist():
                if "/data/" not in entry.filename or first is None:
                    packed.writestr(entry.filename, apart.read(entry))
                    first = packed.getinfo(entry.filename) if "/data/" in entry.filename else None
                else:
                    again = copy.copy(first)
                    again.filename = again.orig_filename = entry.filename
                    packed.filelist.append(again)
        (folder / "apart.pt").unlink()
        assert path.stat().st_size < 1e6
    elif kind in HOSTILE:
        torch.save({"format": 1, "args": {}, "model": {"w": HOSTILE[kind]()}, "checksum": ""}, path)
    return path


def endless_list():
    endless = []
    endless.append(endless)
    return endless


def references_to_references():
    """A trillion entries in a small file."""
    entries = [0] * 10
    for _ in range(11):
        entries = [entries] * 10
    return entries


def pickled_call(name):
    """A pickle that calls `name` with a size of 32 TB."""
    return b"\x80\x02c" + name + b"\n(\x8a\x06" + (2**45).to_bytes(6, "little") + b"tR."


NAMES = {  # pickles that name what `save_checkpoint` does not
    "bytearray": pickled_call(b"builtins\nbytearray"),
    "a tensor of a size": pickled_call(b"torch\nTensor"),
    "protocol 4": pickle.dumps(OrderedDict(), protocol=4),
}
HOSTILE = {
    "one tensor at a hundred names": lambda: [torch.zeros(100_000)] * 100,
    "views of one tensor": lambda: [each.view(2, -1) for each in [torch.zeros(100_000)] * 9],
    "sparse": lambda: torch.zeros(1000, 1000).to_sparse(),
    "meta": lambda: torch.zeros(10**12, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(10), 1.0, 0, torch.qint8),
    "stride 0": lambda: torch.zeros(1).expand(10**10),
    "contains itself": endless_list,
    "references": references_to_references,
}


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("missing", "does not exist"),
        ("folder", "is a folder"),
        *((kind, "not a checkpoint") for kind in ("empty", "text", "text like a pickle", "bytes")),
        *((f"truncated {share}", "damaged") for share in (1, 50, 90, 99)),
        ("executes", "not a checkpoint"),
        ("executes, plain pickle", "not a checkpoint"),
        ("a tensor", "not a checkpoint"),
        ("weights alone", "not a checkpoint"),
        ("another format", "format 999"),
        *((kind, "not a checkpoint") for kind in ("deflated", "overlapping", *HOSTILE)),
        *((kind, "not a checkpoint") for kind in NAMES),
    ],
)
def test_what_is_no_checkpoint(kind, named, tmp_path):
    path = bad_checkpoint(kind, tmp_path)
    with pytest.raises(ValueError, match=named) as caught:
        load_checkpoint(path)
    assert type(caught.value) in (ValueError, Damaged)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    state = {"model": {"w": torch.randn(5)}, "args": {"levels": [8, 4], "save": None}, "step": 7}
    save_checkpoint(tmp_path / "last.pt", state)
    loaded = load_checkpoint(str(tmp_path / "last.pt"))
    assert torch.equal(loaded["model"]["w"], state["model"]["w"])
    assert loaded["args"] == state["args"] and loaded["step"] == 7


GEOMETRIC = "--rfsq-strategy geometric"


def saved(tmp_path, *flags) -> str:
    """The path of a checkpoint of the model that the flags describe."""
    args = get_args([*SMALL, *flags])
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"model": VQVAE(args).state_dict(), "args": vars(args)})
    return str(path)


def test_another_architecture_is_named_flag_by_flag(tmp_path):
    here = get_args(["--channel", "64", "--rfsq-strategy", "none", "--lr", "1"])
    with pytest.raises(ValueError) as caught:
        load_weights(VQVAE(here), here, saved(tmp_path))
    message = str(caught.value)
    assert "\n" not in message and "last.pt" in message
    assert "--channel 32 there, 64 here" in message
    assert "--rfsq-strategy layernorm there, none here" in message
    assert "--lr" not in message and "--levels" not in message


@pytest.mark.parametrize(
    "there, here",
    [
        ("--quantizer svq", "--quantizer svq --svq-classes 4"),
        ("--quantizer svq", "--quantizer svq --svq-stages 2"),
        (GEOMETRIC, f"{GEOMETRIC} --rfsq-slope 0.2"),
    ],
)
def test_what_only_the_quantizer_knows_is_an_architecture_too(there, here, tmp_path):
    path = saved(tmp_path, *there.split())
    args = get_args([*SMALL, *here.split()])
    name = here.split()[-2]
    with pytest.raises(ValueError, match=f"of another architecture: {name}.* there"):
        load_weights(VQVAE(args), args, path)


@pytest.mark.parametrize(
    ("flags", "same", "other"),
    [
        ("--quantizer svq", "--svq-dim 20", "--svq-dim 22"),
        ("--quantizer svq --svq-stages 2 --pairs", "--svq-dim 20", "--svq-dim 22"),
        ("--quantizer lfq --lfq-dim 12", "--lfq-entropy-groups 1", "--lfq-entropy-groups 2"),
    ],
)
def test_a_default_is_the_same_run_as_its_value_given(flags, same, other):
    default, given, changed = (
        with_values_in_use(args, build_quantizer(args))
        for args in (parse(f"{flags} {more}") for more in ("", same, other))
    )
    assert not differing_flags(default, given, may_change=())
    assert len(differing_flags(default, changed, may_change=())) == 1


@pytest.mark.parametrize("pairs", ["", "--pairs"])
def test_default_levels_are_the_same_run_as_the_same_levels_given(pairs):
    default, given = (parse(f"{pairs} {levels}") for levels in ("", "--levels 8 8 8 4"))
    runs = [with_values_in_use(args, build_quantizer(args)) for args in (default, given)]
    assert not differing_flags(*runs, may_change=())
    other = parse(f"{pairs} --levels 8 8 4 8")
    other = with_values_in_use(other, build_quantizer(other))
    assert differing_flags(runs[0], other, may_change=()) == [
        "--levels [8, 8, 8, 4] there, [8, 8, 4, 8] here"
    ]


def test_flags_that_make_the_same_model_fit(tmp_path):
    path = saved(tmp_path)
    written_out = ["--levels", "8", "8", "8", "4", "--n-embed", "7", "--lr", "1", "--seed", "3"]
    args = get_args([*SMALL, *written_out])
    model = VQVAE(args)
    load_weights(model, args, path)
    other, flags, _ = load_model(path)
    assert flags.channel == 32 and not other.training
    for name, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_weights_that_do_not_fit_are_one_line(tmp_path):
    path = tmp_path / "last.pt"
    state = {"model": build("fsq").state_dict(), "args": vars(get_args(SMALL))}
    save_checkpoint(path, state)
    with pytest.raises(ValueError, match=r"last\.pt") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("network", ["conv", "dct"])
def test_no_image_is_an_error(network):
    model = VQVAE(get_args(["--channel=16", f"--network={network}"]))
    with pytest.raises(ValueError, match="no image in a batch"):
        model.encode(torch.zeros(0, 3, 32, 32))


def test_the_default_precision_of_a_host_leaves_the_normalisation():
    model = VQVAE(get_args(["--channel=16"]))
    mean, before = model.normalise.mean.clone(), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model.to("cpu")
    finally:
        torch.set_default_dtype(before)
    kept = model.normalise.mean
    assert torch.equal(kept, mean) and kept.dtype == torch.float32
