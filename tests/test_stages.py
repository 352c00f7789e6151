"""`stages.py` against hand computations and `evaluate.py`; `evaluate.py`; `compare.py`."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import make_checkpoint
from PIL import Image

import exits
import loss.perceptual
import output
from dataset.synthetic import SyntheticDataset
from evaluation import differences, evaluate_stages, prepare
from model import load_model
from networks import IMAGENET_MEAN, IMAGENET_STD
from scripts import compare, evaluate, stages
from similarity import psnr, ssim

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
    """The images of the folder, uint8."""
    return torch.stack(list(SyntheticDataset(SIDE, 3, IMAGES)))


def pixels():
    """The same in [0, 1], as the model takes them."""
    return originals().float() / 255


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
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    z = model.encoder((pixels() - mean) / std).detach()
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


@pytest.mark.parametrize("name", ["layernorm", "image", "ema", "fsq"])
def test_all_stages_together_are_what_evaluate_reports(name, files, capsys):
    where = [f"--load={files / name}.pt", f"--val-data-path={files / 'val'}", "--num-workers=0"]
    whole = evaluate.main([*where, "--batch-size=2"])
    result = run(files, name)
    rows = result["checkpoints"][0]["stages"]
    for key in ("psnr", "ssim", "l1", "lpips", "bits"):
        assert rows[-1][key] == whole[key], key
    assert rows[-1]["paper"] == whole["paper"] and rows[-1]["lpips"] is None
    for row, other in zip(rows, whole["stages"], strict=True):
        assert {key: row[key] for key in other} == other
    # The first stage alone: the decoder's picture of the first index.
    model = load_model(files / f"{name}.pt")[0]
    if name == "fsq":  # its only stage
        assert len(rows) == 1 and rows[0]["residual_rms_after"] < rows[0]["residual_rms_before"]
        return
    tokens = model.encode(pixels())
    indices, *side = tokens if isinstance(tokens, tuple) else (tokens,)
    pictures = model.decode(indices[..., :1], *side)
    expected = psnr(pixels(), pictures.clamp(0, 1)).mean().item()
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
    model.train()  # and it stays so
    rows = evaluate_stages(model, loader, None, "cpu")
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert rows == evaluate_stages(model.eval(), loader, None, "cpu")
    assert not any(isinstance(value, torch.Tensor) for value in vars(model.quantizer).values())


def stages_of_a_share(rank, folder, files):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    share = originals()[rank::2].split(2)
    rows = evaluate_stages(load_model(files / "image.pt")[0], share, None, "cpu")
    torch.save(rows, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(files, tmp_path):
    """With shares of three and two images: sums, and no means of means."""
    # Forked: nothing is imported again, which takes longer than the work.
    start = torch.multiprocessing.start_processes
    start(stages_of_a_share, (str(tmp_path), files), nprocs=2, start_method="fork")
    model = load_model(files / "image.pt")[0]
    single = evaluate_stages(model, originals().split(2), None, "cpu")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    sizes = ("residual_rms_before", "residual_rms_after", "fsq_input_rms")
    for row, wanted in zip(first, single, strict=True):
        for key in ("psnr", "l1", "bits", "entropy_bits", "tokens", "used", *sizes):
            assert row[key] == pytest.approx(wanted[key], rel=1e-5), key


@pytest.mark.slow
def test_json_and_two_figures_for_several_checkpoints(files, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, folder = tmp_path / "stages.json", tmp_path / "figures"
    result = run(files, "none", "scale", "layernorm", "ema", "fsq", json=out, figures=folder)
    assert json.loads(out.read_text()) == result
    assert len(result["checkpoints"]) == 5 and result["environment"]["torch"]
    for name in ("residuals.png", "quality.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) >= 500
            assert np.asarray(picture.convert("L")).std() > 5  # lines on white
    assert len(list(folder.iterdir())) == 2


def test_figures_without_matplotlib_are_one_line(files, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as caught:
        exits.run_script(lambda: run(files, "none", figures=tmp_path / "figures"))
    lines = capfd.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and len(lines) == 1 and "pip install" in lines[0]
    assert not (tmp_path / "figures").exists()


# ---------------------------------------------------------------------------------------
# evaluate.py, and what the three scripts share
# ---------------------------------------------------------------------------------------
def test_a_log_says_how_far_it_is(files, monkeypatch, capfd):
    monkeypatch.setattr(output, "SECONDS_A_LINE", 0)
    run(files, "none", lpips_net="none")
    where = [f"--val-data-path={files / 'val'}", "--num-workers=0", "--batch-size=2"]
    evaluate.main([f"--load={files / 'none.pt'}", *where, "--lpips-net=none"])
    told = [f"{what}: {i} of 3 batches" for what in ("stages", "evaluate") for i in (1, 2, 3)]
    assert capfd.readouterr().err.splitlines() == told


def test_mflop_of_the_network_of_the_paper_by_hand(files, tmp_path, capsys):
    # 4 latent channels, f = 4, 32 pixels: two operations a weight and output position.
    wide, narrow = 3 * 4 * 4 * 4 * 16**2, 4 * 8 * 4 * 4 * 8**2  # 4x4 convolutions to 4, 8 channels
    expected = 2e-6 * (wide + narrow + 8 * 4 * 8**2)  # and the 1x1 convolution
    out = tmp_path / "evaluate.json"
    flags = [f"--load={files / 'none.pt'}", f"--val-data-path={files / 'val'}", f"--json={out}"]
    result = evaluate.main([*flags, "--num-workers=0"])
    assert result["mflop"] == pytest.approx({"encoder": expected, "decoder": expected})
    assert json.loads(out.read_text())["mflop"] == result["mflop"]
    assert "MFLOP an image, without the quantizer: encoder 0.2, decoder 0.2" in (
        capsys.readouterr().out
    )


def test_without_lpips_no_network_is_loaded(files, capsys, monkeypatch):
    def load(net):
        raise AssertionError("LPIPS was not asked for")

    monkeypatch.setattr(loss.perceptual, "Perceptual", load)
    where = [f"--load={files / 'none.pt'}", f"--val-data-path={files / 'val'}", "--num-workers=0"]
    result = evaluate.main([*where, "--lpips-net=none"])
    assert result["lpips"] is None and result["lpips_net"] is None
    said = capsys.readouterr().out
    assert "LPIPS will be missing" not in said and "LPIPS is missing" in said
    result = run(files, "none", lpips_net="none")
    assert result["lpips_net"] is None and result["checkpoints"][0]["stages"][0]["lpips"] is None


def test_lpips_that_cannot_be_loaded_is_reported(files, capsys):
    where = [f"--load={files / 'none.pt'}", f"--val-data-path={files / 'val'}", "--num-workers=0"]
    result = evaluate.main(where)  # squeeze, as trained: no weights and no network in tests
    assert result["lpips"] is None and result["psnr"] > 0
    said = capsys.readouterr().out
    assert "LPIPS will be missing" in said and "LPIPS is missing" in said


def test_differences_of_two_models_by_hand():
    def result(psnr, l1, lpips):
        return {"per_image": {"psnr": psnr, "ssim": psnr, "l1": l1, "lpips": lpips}}

    first = result([20.0, 30.0, 25.0, 28.0], [0.1, 0.2, 0.3, 0.4], None)
    other = result([21.0, 30.0, 28.0, 28.0], [0.1, 0.1, 0.1, 0.5], [0.1, 0.1, 0.1, 0.1])
    found = differences(first, other)
    # 1, 0, 3, 0: mean 1, squares of the deviations 0 + 1 + 4 + 1 over 4 - 1
    half = 1.96 * math.sqrt(2) / 2
    expected = {"mean": 1.0, "half_width": half, "better": 0.5}
    assert found["psnr"] == pytest.approx(expected) and found["ssim"] == found["psnr"]
    assert found["l1"]["mean"] == pytest.approx(-0.05) and found["l1"]["better"] == 0.5
    assert found["lpips"] is None
    single = differences(result([20.0], [0.1], [0.3]), result([19.0], [0.1], [0.1]))
    assert single["psnr"] == {"mean": -1.0, "half_width": None, "better": 0.0}
    assert single["lpips"]["better"] == 1.0


def test_checkpoints_are_compared_image_by_image(files, tmp_path, capsys):
    loads = [str(files / f"{name}.pt") for name in ("none", "image", "fsq", "none")]
    where = [f"--val-data-path={files / 'val'}", "--num-workers=0", "--batch-size=2"]
    out = tmp_path / "evaluate.json"
    result = evaluate.main(["--load", *loads, *where, f"--json={out}"])
    said, written = capsys.readouterr().out, json.loads(out.read_text())
    first, other, _, same = result["checkpoints"]
    assert written.pop("environment") and written == result
    assert [each["checkpoint"] for each in result["checkpoints"]] == loads

    def decibels(name):
        model = load_model(files / f"{name}.pt")[0]
        return psnr(model(pixels())[0].clamp(0, 1), pixels()).double()

    d = decibels("image") - decibels("none")
    assert other["psnr"] == pytest.approx(decibels("image").mean().item(), abs=1e-3)
    found = other["differences"]["psnr"]
    assert found["mean"] == pytest.approx(d.mean().item(), abs=1e-3)
    assert found["half_width"] == pytest.approx(1.96 * d.std().item() / math.sqrt(5), abs=1e-3)
    assert found["better"] == pytest.approx((d > 0).double().mean().item())
    assert found["mean"] == pytest.approx(other["psnr"] - first["psnr"])
    assert same["differences"]["psnr"] == {"mean": 0.0, "half_width": 0.0, "better": 0.0}
    assert other["differences"]["lpips"] is None and "differences" not in first
    assert evaluate.main([f"--load={loads[0]}", *where]) == {
        **first,
        "val_data": str(files / "val"),
    }

    *_, heading, line, _, last, note = said.splitlines()
    name, paths = first["name"], (loads[0], loads[3])  # two of the same name
    assert heading.startswith(f"minus {name} ({paths[0]})")
    assert last.startswith(f"{name} ({paths[1]})")
    same_as_first = "+0.00 ± 0.00 +0.0000 ± 0.0000 +0.0000 ± 0.0000 missing 0%"
    assert " ".join(last.split()).endswith(same_as_first)
    assert f"{found['mean']:+.2f} ± {found['half_width']:.2f}" in line
    assert "95 % interval" in note and "these 5;" in note


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_the_images(world_size, files, monkeypatch):
    for rank in range(world_size):
        monkeypatch.setattr("util.rank", lambda rank=rank: rank)
        monkeypatch.setattr("util.world_size", lambda: world_size)
        loads, where = [str(files / "none.pt")], str(files / "val")
        share = torch.cat(list(prepare(loads, where, lpips_net="none", batch_size=2).loader))
        assert torch.equal(share, originals()[rank::world_size])


def test_a_configuration_has_the_name_that_it_was_trained_with(files, tmp_path):
    make_checkpoint(tmp_path / "named.pt", *SMALL, "--name=RFSQ of tests")
    paths = [str(tmp_path / "named.pt"), str(files / "none.pt")]
    setup = prepare(paths, str(files / "val"), lpips_net="none")
    assert [c.name for c in setup.checkpoints] == ["RFSQ of tests", "rfsq-2x2048-none"]
    assert setup.img_size == SIDE and len(setup.images) == IMAGES and setup.perceptual is None


# ---------------------------------------------------------------------------------------
# compare.py
# ---------------------------------------------------------------------------------------
def test_picture_has_the_originals_reconstructions_and_errors(files, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    drawn, draw = [], compare.draw
    monkeypatch.setattr(compare, "draw", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    out = tmp_path / "compare.png"
    loads = [str(files / f"{name}.pt") for name in ("none", "image", "fsq")]
    flags = ["--images=2", "--amplify=3", f"--out={out}", f"--val-data-path={files / 'val'}"]
    assert compare.main(["--load", *loads, *flags]) == out
    (figure,) = drawn
    # A row of originals; for each checkpoint a row of reconstructions, and a row of error maps.
    cells = np.array(figure.axes, dtype=object).reshape(7, 2)

    def shown(row: int, column: int) -> np.ndarray:
        (image,) = cells[row, column].images
        return np.asarray(image.get_array()).astype(int)

    chosen = originals()[[0, 2]]  # evenly over the five
    model = load_model(files / "image.pt")[0]
    indices, statistics = model.encode(chosen.float() / 255)
    decoded = model.decode(indices, statistics).clamp(0, 1)
    pair = decoded, chosen.float() / 255
    captions = [f"{x:.2f} dB, SSIM {y:.3f}" for x, y in zip(psnr(*pair), ssim(*pair), strict=True)]
    for column in (0, 1):
        original = chosen[column].permute(1, 2, 0).numpy().astype(int)
        image = decoded[column].permute(1, 2, 0).numpy() * 255
        assert np.array_equal(shown(0, column), original)
        assert np.abs(shown(3, column) - image).max() <= 0.51  # of the second checkpoint
        error = np.clip(3 * np.abs(image - original), 0, 255)
        assert np.abs(shown(4, column) - error).max() <= 0.51
        assert cells[3, column].get_xlabel() == captions[column]
        assert cells[4, column].get_xlabel() == cells[0, column].get_xlabel() == ""
    labels = [axes.get_ylabel() for axes in cells[:, 0]]
    assert labels[0] == "originals" and labels[1] == "rfsq-2x2048-none\n22 bits a position"
    assert "26 bits a position" in labels[3] and "|error| x 3" in labels[4]
    assert labels[5].startswith("fsq-8x8x8x8\n")
    # As a file: every image at least as large as its pixels, and the text beside it.
    picture = np.asarray(Image.open(out).convert("L"))
    assert picture.shape[0] > 7 * 128 and picture.shape[1] > 2 * 128
    assert (picture[:, : int(0.15 * picture.shape[1])] < 128).any()


def test_labels_and_images_stay_apart():
    pytest.importorskip("matplotlib")
    names = ("fsq-16x16x16x16x16x16x16x16x16x16", "rfsq-2x2048-layernorm-image runs_of_a_seed-s0")
    images = pixels()[:2]
    figure = compare.draw(images, [(name, images, 22.0) for name in names], 4.0)
    figure.draw_without_rendering()
    boxes = []
    for axes in figure.axes:
        boxes.append(axes.get_window_extent())
        texts = (axes.yaxis.label, axes.xaxis.label)
        boxes += [text.get_window_extent() for text in texts if text.get_text()]
    width, height = figure.bbox.size
    for i, box in enumerate(boxes):
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_checkpoints_of_one_name_are_told_apart_by_their_folders(files, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    loads = []
    for seed in (0, 1):
        folder = tmp_path / f"run-s{seed}"
        folder.mkdir()
        loads.append(str(folder / "last.pt"))
        (folder / "last.pt").write_bytes((files / "none.pt").read_bytes())
    rows = []
    draw = compare.draw
    monkeypatch.setattr(compare, "draw", lambda a, b, c: rows.extend(b) or draw(a, b, c))
    flags = [f"--out={tmp_path / 'x.png'}", f"--val-data-path={files / 'val'}", "--images=1"]
    compare.main(["--load", *loads, *flags])
    assert [row[0] for row in rows] == [f"rfsq-2x2048-none (run-s{seed})" for seed in (0, 1)]
    rows.clear()  # of one folder: by their paths
    loads[1] = str(tmp_path / "run-s0" / "best.pt")
    (tmp_path / "run-s0" / "best.pt").write_bytes((files / "none.pt").read_bytes())
    compare.main(["--load", *loads, *flags])
    assert [row[0] for row in rows] == [f"rfsq-2x2048-none ({path})" for path in loads]


# ---------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------
def test_bad_input_is_one_line_and_code_2(files, tmp_path, capfd):
    make_checkpoint(tmp_path / "large.pt", *SMALL, "--img-size=64")
    good, val = f"--load={files / 'none.pt'}", f"--val-data-path={files / 'val'}"
    sizes = ["--load", str(files / "none.pt"), str(tmp_path / "large.pt")]
    out = f"--out={tmp_path / 'x.png'}"
    absent = tmp_path / "nowhere"
    for script, flags, part in (
        (stages, ["--load=nowhere.pt", val], "nowhere.pt"),
        (stages, [good, "--val-data-path=nowhere"], "nowhere"),
        (stages, [*sizes, val], "give --img-size"),
        (stages, [good, val, f"--figures={files / 'none.pt'}", "--num-workers=0"], "none.pt"),
        (stages, [good, val, f"--json={absent / 'x.json'}"], "x.json"),
        (stages, [val], "--load"),
        (evaluate, [good, val, f"--json={absent / 'x.json'}"], "x.json"),
        (evaluate, [good, val, f"--json={tmp_path}"], str(tmp_path)),
        (compare, [good, val, f"--out={absent / 'x.png'}"], "x.png"),
        (compare, [good, val], "--out"),
        (compare, [good, val, "--out=x.jpg"], "x.jpg"),
        (compare, [good, val, out, "--amplify=-1"], "--amplify"),
        (compare, [good, "--val-data-path=nowhere", out], "nowhere"),
        (compare, [good, val, out, "--img-size=30"], "30"),
        (compare, [*sizes, val, out], "give --img-size"),
    ):
        with pytest.raises(SystemExit) as caught:
            exits.run_script(lambda script=script, flags=flags: script.main(flags))
        lines = capfd.readouterr().err.strip().splitlines()
        assert caught.value.code == 2 and len(lines) == 1 and part in lines[0], (flags, lines)
    assert not (tmp_path / "x.png").exists() and not absent.exists()


def test_an_interrupted_script_says_so(monkeypatch, capfd):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["stages.py"])
    with pytest.raises(SystemExit) as caught:
        exits.run_script(stop)
    assert caught.value.code == 130 and capfd.readouterr().err == "stages.py: interrupted\n"


@pytest.mark.parametrize("script", [stages, evaluate, compare])
def test_outputs_are_checked_before_the_work(script, files, tmp_path, monkeypatch):
    def work(*args):
        raise AssertionError("the work began")

    monkeypatch.setattr(script, "prepare", work)
    flags = [f"--load={files / 'none.pt'}", f"--val-data-path={files / 'val'}"]
    target = tmp_path / "nowhere" / "x.png"
    with pytest.raises(ValueError, match=r"x\.png cannot be written"):
        script.main([*flags, f"--{'out' if script is compare else 'json'}={target}"])
    if script is not evaluate:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        target = tmp_path / "x.png"
        with pytest.raises(ValueError, match="pip install"):
            script.main([*flags, f"--{'out' if script is compare else 'figures'}={target}"])
