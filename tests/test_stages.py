"""`stages.py` against hand computations and `evaluate.py`; the picture of `compare.py`."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
from conftest import make_checkpoint
from PIL import Image

import util
from dataset import SyntheticDataset, normalize
from metric import psnr
from model import load_model
from scripts import compare, evaluate, stages

pytestmark = pytest.mark.usefixtures("no_lpips")
CONFIGURATIONS = {
    "none": ["--rfsq-strategy=none"],
    "scale": ["--rfsq-strategy=scale"],
    "layernorm": ["--rfsq-stages=4"],
    "image": ["--rfsq-statistics=image"],
    "ema": ["--quantizer=ema", "--ema-stages=2", "--n-embed=16", "--embed-dim=4"],
}
SIDE, IMAGES = 32, 5
SMALL = ["--channel=8", f"--img-size={SIDE}", "--lpips-net=squeeze"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder `val` of PNGs, and a checkpoint of a tiny model of each configuration."""
    root = tmp_path_factory.mktemp("stages")
    (root / "val").mkdir()
    for i, image in enumerate(SyntheticDataset(SIDE, 3, IMAGES)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / "val" / f"{i}.png")
    for name, flags in {**CONFIGURATIONS, "fsq": ["--quantizer=fsq"]}.items():
        make_checkpoint(root / f"{name}.pt", *SMALL, *flags)
    return root


def originals():
    return torch.stack(list(SyntheticDataset(SIDE, 3, IMAGES)))


def run(files, *names, batch=2, **flags):
    loads = [str(files / f"{name}.pt") for name in names]
    extra = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    where = [f"--val-data-path={files / 'val'}", "--num-workers=0", f"--batch-size={batch}"]
    return stages.main(["--load", *loads, *where, *extra])


def rms(x) -> float:
    return math.sqrt(x.double().square().mean().item())


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_magnitudes_equal_a_hand_computation(name, files, capsys):
    (result,) = run(files, name)["checkpoints"]
    model = load_model(files / f"{name}.pt")[0]
    quantizer = model.quantizer
    z = model.encoder(normalize(originals())).detach()
    _, indices, *rest = quantizer(z)
    residual, statistics = z, rest[1] if len(rest) > 1 else None
    assert len(result["stages"]) == quantizer.stages
    for k, row in enumerate(result["stages"]):
        index = indices[..., k]
        if name == "ema":
            # Written out: the code of a stage is a row of its codebook.
            entering, code = None, quantizer.codebook[k][index].movedim(-1, 1)
        else:
            a, b = map_of(quantizer, k, statistics)
            entering = a * residual + b
            # The levels of the digits, A^-1 of them; digit i of an index counts prod of L before i.
            digits = []
            for level in quantizer.levels:
                digits.append(index % level - level // 2)
                index = index // level
            halves = torch.tensor([level // 2 for level in quantizer.levels])[:, None, None]
            code = (torch.stack(digits, 1) / halves - b) / a
        assert row["residual_rms_before"] == pytest.approx(rms(residual), rel=1e-5)
        residual = residual - code
        assert row["residual_rms_after"] == pytest.approx(rms(residual), rel=1e-4)
        if entering is None:
            assert row["fsq_input_rms"] is None
        else:
            assert row["fsq_input_rms"] == pytest.approx(rms(entering), rel=1e-3)
        counts = indices[..., k].flatten().bincount().double()
        p = counts[counts > 0] / counts.sum()
        assert row["used"] == len(p) and row["share"] == len(p) / quantizer.codebook_sizes[k]
        assert row["entropy_bits"] == pytest.approx(-(p * p.log2()).sum().item())
        assert row["perplexity"] == pytest.approx(2 ** row["entropy_bits"])
    table = capsys.readouterr().out.splitlines()
    first = f"{result['stages'][0]['residual_rms_before']:.4f}"
    assert any(line.split()[0] == "1" and first in line for line in table if line)


def map_of(quantizer, stage: int, statistics):
    """a and b of A(r) = a r + b, (B or 1, C or 1, 1, 1), from the weights alone."""
    if quantizer.strategy == "none":
        return torch.ones(1), torch.zeros(1)
    if quantizer.strategy == "scale":
        return quantizer.log_scale[stage].exp().detach(), torch.zeros(1)
    if statistics is None:
        mean, std = quantizer.running_mean[stage], (quantizer.running_var[stage] + 1e-10).sqrt()
    else:
        mean, std = statistics[:, stage].detach().unbind(1)
    a = quantizer.log_gain[stage].exp().detach() / std
    b = quantizer.bias[stage].detach() - a * mean
    return a.view(-1, quantizer.dim, 1, 1), b.view(-1, quantizer.dim, 1, 1)


@pytest.mark.parametrize("name", ["layernorm", "image", "ema"])
def test_all_stages_together_are_what_evaluate_reports(name, files, capsys):
    where = [f"--load={files / name}.pt", f"--val-data-path={files / 'val'}", "--num-workers=0"]
    whole = evaluate.main([*where, "--batch-size=2"])
    result = run(files, name)
    rows = result["checkpoints"][0]["stages"]
    for key in ("psnr", "l1", "lpips", "bits"):
        assert rows[-1][key] == whole[key], key
    assert rows[-1]["paper"] == whole["paper"] and rows[-1]["lpips"] is None
    for row, other in zip(rows, whole["stages"], strict=True):
        assert {key: row[key] for key in other} == other
    # The first stage alone: the decoder's picture of the first index.
    model = load_model(files / f"{name}.pt")[0]
    images = normalize(originals())
    tokens = model.encode(images)
    indices, *side = tokens if isinstance(tokens, tuple) else (tokens,)
    pictures = model.decode(indices[..., :1], *side)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    a, b = (x * std[:, None, None] + mean[:, None, None] for x in (images, pictures))
    expected = psnr(a, b.clamp(0, 1)).mean().item()
    assert rows[0]["psnr"] == pytest.approx(expected, abs=1e-4)
    assert rows[0]["psnr"] != rows[1]["psnr"] and result["images"] == IMAGES


def test_bits_add_up_with_side_information(files, capsys):
    rows = run(files, "image")["checkpoints"][0]["stages"]
    # 11 bits a stage, and 32 bits for each of 4 channels an image of 8 x 8 positions.
    assert [row["bits"] for row in rows] == [13.0, 26.0]
    rows = run(files, "layernorm")["checkpoints"][0]["stages"]
    assert [row["bits"] for row in rows] == [10.0, 20.0, 30.0, 40.0]


def test_measuring_changes_nothing(files, capsys):
    model = load_model(files / "layernorm.pt")[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loader = [originals()]
    rows = stages.measure(model, loader, None, torch.device("cpu"))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert rows == stages.measure(model, loader, None, torch.device("cpu"))
    assert not any(isinstance(value, torch.Tensor) for value in vars(model.quantizer).values())


def test_json_and_two_figures_for_several_checkpoints(files, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, folder = tmp_path / "stages.json", tmp_path / "figures"
    result = run(files, "none", "scale", "layernorm", "ema", json=out, figures=folder)
    assert json.loads(out.read_text()) == result
    assert len(result["checkpoints"]) == 4 and result["environment"]["torch"]
    for name in ("residuals.png", "quality.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) >= 500
            assert np.asarray(picture.convert("L")).std() > 5  # lines on white
    assert len(list(folder.iterdir())) == 2


def test_figures_without_matplotlib_are_one_line(files, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as caught:
        util.run_script(lambda: run(files, "none", figures=tmp_path / "figures"))
    lines = capfd.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and len(lines) == 1 and "pip install" in lines[0]
    assert not (tmp_path / "figures").exists()


# ---------------------------------------------------------------------------------------
# compare.py
# ---------------------------------------------------------------------------------------
def test_picture_has_the_originals_reconstructions_and_errors(files, tmp_path, capsys):
    out = tmp_path / "compare.png"
    loads = [str(files / f"{name}.pt") for name in ("none", "image", "fsq")]
    flags = ["--images=2", "--amplify=3", f"--out={out}", f"--val-data-path={files / 'val'}"]
    assert compare.main(["--load", *loads, *flags]) == out
    picture = np.asarray(Image.open(out))
    side = 128  # 32 pixels, enlarged four times
    # A row of originals; for each checkpoint a row with a caption, and a row of error maps.
    assert picture.shape == (7 * (side + 4) + 3 * 18 + 4, 220 + 2 * (side + 4), 3)

    def cell(top: int, column: int) -> np.ndarray:
        left = 220 + column * (side + 4)
        return picture[top : top + side : 4, left : left + side : 4].astype(int)

    chosen = originals()[[0, 2]]  # evenly over the five
    tokens = load_model(files / "image.pt")[0]
    indices, statistics = tokens.encode(normalize(chosen))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    decoded = tokens.decode(indices, statistics) * std[:, None, None] + mean[:, None, None]
    for column in (0, 1):
        original = chosen[column].permute(1, 2, 0).numpy().astype(int)
        image = decoded[column].clamp(0, 1).permute(1, 2, 0).numpy() * 255
        assert np.array_equal(cell(4, column), original)
        top = 4 + 3 * (side + 4) + 18  # the second checkpoint
        assert np.abs(cell(top, column) - image).max() <= 0.51
        error = np.clip(3 * np.abs(image - original), 0, 255)
        assert np.abs(cell(top + side + 4 + 18, column) - error).max() <= 0.51
    # Text beside every row and below the reconstructions.
    for top in (4, 4 + 132, 4 + 2 * 132 + 18):
        assert (picture[top : top + side, :220] < 128).any()
    assert (picture[4 + 2 * 132 - 4 : 4 + 2 * 132 + 14, 220:] < 128).any()


def test_labels_stay_within_their_column():
    from PIL import ImageFont

    font = ImageFont.load_default(14)
    for name in ("fsq-16x16x16x16x16x16x16x16x16x16", "rfsq-2x2048-layernorm-image"):
        lines = compare.textwrap.wrap(f"{name} rfsq_2x2048_layernorm-s0", compare.CHARACTERS)
        assert max(font.getlength(line) for line in lines) + compare.GAP < compare.LABEL
        assert (len(lines) + 1) * compare.TEXT < compare.CELL


# ---------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------
def test_bad_input_is_one_line_and_code_2(files, tmp_path, capfd):
    make_checkpoint(tmp_path / "large.pt", *SMALL, "--img-size=64")
    good, val = f"--load={files / 'none.pt'}", f"--val-data-path={files / 'val'}"
    sizes = ["--load", str(files / "none.pt"), str(tmp_path / "large.pt")]
    out = f"--out={tmp_path / 'x.png'}"
    for script, flags, part in (
        (stages, [f"--load={files / 'fsq.pt'}", val], "no stages"),
        (stages, ["--load=nowhere.pt", val], "nowhere.pt"),
        (stages, [good, "--val-data-path=nowhere"], "nowhere"),
        (stages, [*sizes, val], "give --img-size"),
        (stages, [good, val, f"--figures={files / 'none.pt'}", "--num-workers=0"], "none.pt"),
        (stages, [val], "--load"),
        (compare, [good, val], "--out"),
        (compare, [good, val, "--out=x.jpg"], "x.jpg"),
        (compare, [good, val, out, "--amplify=0"], "--amplify"),
        (compare, [good, "--val-data-path=nowhere", out], "nowhere"),
        (compare, [good, val, out, "--img-size=30"], "30"),
        (compare, [*sizes, val, out], "give --img-size"),
    ):
        with pytest.raises(SystemExit) as caught:
            util.run_script(lambda script=script, flags=flags: script.main(flags))
        lines = capfd.readouterr().err.strip().splitlines()
        assert caught.value.code == 2 and len(lines) == 1 and part in lines[0], (flags, lines)
    assert not (tmp_path / "x.png").exists()
