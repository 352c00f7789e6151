"""Training as a user runs it: every quantizer learns, every file is there, errors are one line."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import exits
import output
import train
import util
from arguments import get_args
from checkpoint import load_checkpoint, save_checkpoint
from dataset.synthetic import SyntheticDataset
from meter import Meter
from model import VQVAE, load_model
from scripts import evaluate

pytestmark = pytest.mark.usefixtures("no_lpips")
ROOT = Path(__file__).resolve().parent.parent
SIZE = ["--img-size=32", "--channel=32", "--batch-size=8", "--num-workers=0", "--lr=0.01"]
TINY = [*SIZE, "--perceptual-weight=0", "--lpips-net=squeeze"]
CONFIGURATIONS = {
    "fsq": ["--quantizer", "fsq"],
    "lfq": ["--quantizer", "lfq"],
    "ema": ["--quantizer=ema", "--n-embed=64", "--embed-dim=16"],
    "ema-residual": ["--quantizer=ema", "--n-embed=64", "--embed-dim=16", "--ema-stages=2"],
    "layernorm-image": ["--rfsq-statistics=image"],
    **{
        f"{stages}-{strategy}": ["--rfsq-stages", str(stages), "--rfsq-strategy", strategy]
        for stages in (2, 4)
        for strategy in ("none", "scale", "layernorm")
    },
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two folders of PNGs: 24 for training, 10 for validation."""
    root = tmp_path_factory.mktemp("images")
    for split, count, seed in (("train", 24, 1), ("val", 10, 2)):
        folder = root / split / "class"
        folder.mkdir(parents=True)
        images = SyntheticDataset(32, seed, count)
        for i in range(count):
            pixels = images[i].permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return root


def paths(photographs):
    return [f"--{split}-data-path={photographs / split}" for split in ("train", "val")]


def close(a, b) -> bool:
    """Whether two results are equal, numbers to 1e-6."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == b or (isinstance(a, float) and a == pytest.approx(b, rel=1e-6))


def records(run: Path, kind: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.mark.parametrize("flags", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_twenty_steps_learn_and_evaluate_agrees(flags, tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.SYNTHETIC_VAL", 10)
    run = tmp_path / "run"
    synthetic = ["--train-data-path", "synthetic", "--val-data-path", "synthetic"]
    results = train.main(
        [*TINY, *flags, *synthetic, "--train-iters", "20", "--log-interval", "1", f"--save={run}"]
    )
    losses = [record["l1"] for record in records(run, "train")]
    assert len(losses) == 20
    assert np.mean(losses[-5:]) < 0.95 * np.mean(losses[:5])
    assert len(records(run, "train")[-1]["codes_in_batch"]) == len(results["stages"])

    again = evaluate.main([f"--load={run / 'last.pt'}", "--val-data-path=synthetic"])
    keys = (
        "images",
        "bits",
        "f",
        "bpp",
        "l1",
        "psnr",
        "ssim",
        "lpips",
        "paper",
        "floors",
        "stages",
    )
    for key in keys:
        assert close(again[key], results[key]), (key, again[key], results[key])


def test_run_folder_holds_everything(photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [*TINY, *paths(photographs), "--max-train-epochs", "2"]
    results = train.main(flags)
    out = capsys.readouterr().out
    run = tmp_path / "runs" / "rfsq-2x2048-layernorm-f4-c32-s0"
    assert str(run.relative_to(tmp_path)) in out
    assert json.loads((run / "args.json").read_text()) == vars(get_args(flags))
    environment = json.loads((run / "environment.json").read_text())
    assert {"command", "commit", "torch", "device", "processes"} <= environment.keys()
    # 2 epochs of 24 images in batches of 8, evaluated once an epoch; ten images, all counted.
    assert results["steps"] == 6 and results["images_seen"] == 48
    assert [record["step"] for record in records(run, "val")] == [3, 6]
    assert results["images"] == 10
    assert json.loads((run / "results.json").read_text()) == results
    assert (run / "results.txt").read_text().strip() in out
    assert "LPIPS is missing" in out and "step 6/6" in out
    assert f"SSIM {results['ssim']:.4f}  L1 {results['l1']:.4f}\n" in out
    best = max(records(run, "val"), key=lambda record: record["psnr"])
    assert load_checkpoint(run / "best.pt")["step"] == best["step"]
    assert load_checkpoint(run / "last.pt")["step"] == 6
    pictures = sorted((run / "samples").iterdir())
    assert [p.name for p in pictures] == ["step_0000003.png", "step_0000006.png"]
    assert Image.open(pictures[0]).size == (8 * 34 + 2, 2 * 34 + 2)
    assert not [p for p in run.rglob("*") if p.name.startswith(".")]

    # The same command again takes a new folder; the first one is not touched.
    before = (run / "results.json").read_bytes()
    train.main(flags)
    assert (run.parent / f"{run.name}-2" / "results.json").exists()
    assert (run / "results.json").read_bytes() == before


def test_epochs_that_are_no_whole_number_of_batches(photographs, tmp_path, monkeypatch):
    """2 epochs of 10 images in batches of 4 are 5 steps, and the first ends within the third."""
    compute = Meter.compute
    monkeypatch.setattr(Meter, "compute", lambda self, most: (compute(self, most)[0], 2.5))
    data = [f"--{split}-data-path={photographs / 'val'}" for split in ("train", "val")]
    flags = ["--batch-size=4", "--max-train-epochs=2", "--log-interval=1"]
    results = train.main([*TINY, *data, *flags, f"--save={tmp_path / 'run'}"])
    assert results["steps"] == 5 and results["images_seen"] == 20
    assert [record["step"] for record in records(tmp_path / "run", "val")] == [3, 5]
    log = records(tmp_path / "run", "train")
    assert [record["epoch"] for record in log] == [0.4, 0.8, 1.2, 1.6, 2.0]
    assert {record["images_per_s"] for record in log} == {2.5 * 4}  # 2.5 steps


def test_a_log_says_how_far_a_long_evaluation_is(photographs, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(output, "SECONDS_A_LINE", 0)
    train.main([*TINY, *paths(photographs), "--train-iters=3", f"--save={tmp_path / 'run'}"])
    said = capfd.readouterr()
    assert said.err.splitlines() == ["evaluate: 1 of 2 batches", "evaluate: 2 of 2 batches"]
    assert "evaluate: " not in said.out and "step 3/3" in said.out


def test_save_refuses_a_run_and_overwrite_replaces_it(photographs, tmp_path):
    flags = [*TINY, *paths(photographs), "--train-iters", "2", f"--save={tmp_path / 'run'}"]
    train.main(flags)
    with pytest.raises(ValueError, match=r"already holds a run.*--overwrite"):
        train.main(flags)
    train.main([*flags, "--overwrite"])
    assert len(records(tmp_path / "run", "val")) == 1


def test_load_starts_from_the_checkpoint(photographs, tmp_path):
    flags = [*TINY, *paths(photographs), "--train-iters", "3"]
    train.main([*flags, f"--save={tmp_path / 'a'}"])
    last = tmp_path / "a" / "last.pt"
    train.main(
        [*flags, f"--save={tmp_path / 'b'}", f"--load={last}", "--lr=1e-12", "--clip-grad=0"]
    )
    a, b = (load_checkpoint(tmp_path / run / "last.pt")["model"] for run in "ab")
    weights = [name for name in a if "running" not in name and "batches" not in name]
    assert all(torch.allclose(a[name], b[name], atol=1e-9) for name in weights)


def test_same_seed_same_weights_other_seed_other_weights(photographs, tmp_path):
    def weights(name, *extra):
        run = tmp_path / name
        train.main([*TINY, *paths(photographs), "--train-iters=3", f"--save={run}", *extra])
        return load_checkpoint(run / "last.pt")["model"]

    first, workers, other = weights("a"), weights("b", "--num-workers=2"), weights("c", "--seed=1")
    assert all(torch.equal(first[name], workers[name]) for name in first)
    assert not torch.equal(first["encoder.layers.0.weight"], other["encoder.layers.0.weight"])


@pytest.mark.parametrize(
    "flags, term",
    [(["--l1-weight=2"], 2.0), (["--l1-weight=0.5", "--quantizer-loss-weight=3"], 3.0)],
)
def test_loss_weights_work(flags, term, photographs, tmp_path):
    lfq = ["--quantizer=lfq", "--train-iters=1", f"--save={tmp_path / 'run'}"]
    train.main([*TINY, *paths(photographs), *lfq, *flags])
    record = records(tmp_path / "run", "train")[0]
    weights = {"l1": 1.0, "quantizer": 1.0, **{k: v for k, v in [_weight(f) for f in flags]}}
    expected = sum(weights[name] * record[name] for name in weights)
    assert record["loss"] == pytest.approx(expected, rel=1e-5)
    assert term in weights.values()


def _weight(flag: str) -> tuple[str, float]:
    name, value = flag.removeprefix("--").split("=")
    return name.removesuffix("-weight").removesuffix("-loss"), float(value)


def test_clip_grad_and_weight_decay_work(photographs, tmp_path):
    def weights(name, *extra):
        flags = [*TINY, *paths(photographs), "--train-iters=2", f"--save={tmp_path / name}", *extra]
        train.main(flags)
        return load_checkpoint(tmp_path / name / "last.pt")["model"]["decoder.layers.0.weight"]

    plain = weights("a", "--clip-grad=0")
    assert not torch.equal(plain, weights("b", "--clip-grad=0", "--weight-decay=0.5"))
    # Adam forgets the scale of the gradient, but not beside its epsilon.
    assert not torch.equal(plain, weights("c", "--clip-grad=1e-9"))


def test_the_precision_asked_for_is_computed_in(photographs, tmp_path):
    losses = []
    for precision in ("fp32", "bf16"):
        flags = [f"--precision={precision}", "--train-iters=1", f"--save={tmp_path / precision}"]
        train.main([*TINY, *paths(photographs), *flags])
        losses.append(records(tmp_path / precision, "train")[0]["loss"])
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)


def test_perceptual_loss_without_weights_stops_before_training(photographs, tmp_path):
    flags = [*TINY, *paths(photographs), "--perceptual-weight=1", f"--save={tmp_path / 'run'}"]
    with pytest.raises(ValueError) as caught:
        train.main(flags)
    message = str(caught.value)
    for part in ("squeezenet1_1-b8a52dc0.pth", str(tmp_path / "torch"), "--perceptual-weight 0"):
        assert part in message
    assert "\n" not in message and not (tmp_path / "run").exists()


def test_images_too_small_for_lpips_are_known_before_training(photographs, tmp_path, capsys):
    flags = [*TINY, *paths(photographs), "--img-size=16", f"--save={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match="of 17 pixels a side, not 16; give a larger"):
        train.main([*flags, "--perceptual-weight=1"])
    assert not (tmp_path / "run").exists()
    assert train.main([*flags, "--train-iters=1"])["lpips"] is None
    assert "missing from the evaluation: LPIPS-squeeze needs images" in capsys.readouterr().out


def test_model_from_a_checkpoint_decodes_in_a_fresh_process(photographs, tmp_path):
    run = tmp_path / "run"
    train.main([*TINY, *paths(photographs), "--train-iters=3", f"--save={run}"])
    code = (
        "import sys, torch; from model import load_model\n"
        "indices = torch.load(sys.argv[2], weights_only=True)\n"
        "torch.save(load_model(sys.argv[1])[0].decode(indices), sys.argv[3])\n"
    )
    model, _, _ = load_model(run / "last.pt")
    images = torch.stack([SyntheticDataset(32, 5, 3)[i] for i in range(3)]) / 255
    with torch.no_grad():
        reconstruction, indices, _ = model(images)
    assert torch.equal(model.encode(images), indices)
    torch.save(indices, tmp_path / "indices.pt")
    files = [str(run / "last.pt"), str(tmp_path / "indices.pt"), str(tmp_path / "out.pt")]
    subprocess.run([sys.executable, "-c", code, *files], cwd=ROOT, check=True)
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), reconstruction)


def test_flags_of_another_quantizer_are_named(photographs, tmp_path, capsys):
    flags = ["--train-iters=1", "--quantizer=lfq", "--levels", "4", "--svq-bits=40"]
    flags += ["--ema-stages=1", f"--save={tmp_path / 'run'}"]
    train.main([*TINY, *paths(photographs), *flags])
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warnings == [
        "warning: --levels [4] has no effect on lfq-12",
        "warning: --svq-bits 40 has no effect on lfq-12",
    ]


def test_more_processes_than_gpus_are_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes, but 1 GPUs: give --nproc-per-node 1"):
        util.setup_processes()


# ---------------------------------------------------------------------------------------
# Bad input: exit code 2, one line that names the thing and the cure, nothing half-written
# ---------------------------------------------------------------------------------------
def bad_inputs(photographs: Path, tmp_path: Path) -> dict[str, tuple[str, list[str], str]]:
    empty, text, broken = tmp_path / "empty", tmp_path / "text", tmp_path / "broken"
    for folder in (empty, text, broken):
        folder.mkdir()
    (text / "notes.txt").write_text("hello")
    (broken / "a.png").write_bytes(b"this is no picture")
    (tmp_path / "fake.pt").write_bytes(b"this is no checkpoint")
    args = vars(get_args(["--channel=32"]))
    model = VQVAE(get_args(["--channel=32"]))
    save_checkpoint(tmp_path / "real.pt", {"model": model.state_dict(), "args": args})
    lie = {"model": model.state_dict(), "args": {**args, "channel": 64}}
    save_checkpoint(tmp_path / "lie.pt", lie)
    huge = {name: value * 1e30 for name, value in model.state_dict().items()}
    save_checkpoint(tmp_path / "huge.pt", {"model": huge, "args": args})
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "results.json").write_text('{"psnr": 2')
    good, val = paths(photographs), f"--val-data-path={photographs / 'val'}"
    finished, nowhere = str(tmp_path / "finished"), tmp_path / "nowhere"
    train.main([*TINY, *good, "--train-iters=1", f"--save={finished}"])
    real = f"--load={tmp_path / 'real.pt'}"
    return {
        "missing folder": ("train", ["--train-data-path=nowhere"], "nowhere"),
        "default folder": ("train", [], "synthetic"),
        "empty folder": ("train", [f"--train-data-path={empty}", val], str(empty)),
        "no image": ("train", [f"--train-data-path={text}", val], "notes.txt"),
        "broken image": ("train", [f"--train-data-path={broken}", val, "--batch-size=1"], "a.png"),
        "broken validation image": ("train", [good[0], f"--val-data-path={broken}"], "a.png"),
        "empty path": ("train", ["--train-data-path=", val], "--train-data-path is empty"),
        "level 1": ("train", [*good, "--levels", "1"], "level"),
        "level 0": ("train", [*good, "--levels", "0"], "level"),
        "level x": ("train", [*good, "--levels", "x"], "--levels"),
        "strategy": ("train", [*good, "--rfsq-strategy=batchnorm"], "layernorm"),
        "quantizer": ("train", [*good, "--quantizer=vq"], "rfsq"),
        "three stages": ("train", [*good, "--rfsq-stages=3"], "levels"),
        "unknown flag": ("train", [*good, "--strategy=none"], "--strategy"),
        "large batch": ("train", [*good, "--batch-size=25"], "24"),
        "no checkpoint": ("train", [*good, "--load=nowhere.pt"], "nowhere.pt"),
        "fake checkpoint": ("train", [*good, f"--load={tmp_path / 'fake.pt'}"], "fake.pt"),
        "other architecture": ("train", [*good, real, "--channel=16"], "--channel 32 there"),
        "other stages": ("train", [*good, real, "--rfsq-stages=4"], "--rfsq-stages 2 there"),
        "image size": ("train", [*good, "--img-size=30"], "multiple"),
        "learning rate": ("train", [*good, "--lr=-1"], "--lr"),
        "nan weight": ("train", [*good, "--l1-weight=nan"], "--l1-weight"),
        "file for a folder": ("train", [f"--train-data-path={text / 'notes.txt'}"], "notes.txt"),
        "no validation": ("train", [good[0], "--val-data-path=nowhere"], "nowhere"),
        "save is a file": ("train", [*good, f"--save={tmp_path / 'real.pt'}"], "real.pt"),
        "resume nothing": ("train", [*good, "--resume=nowhere"], "nowhere"),
        "resume a fake": ("train", [*good, f"--resume={tmp_path / 'fake.pt'}"], "fake.pt"),
        "resume weights alone": ("train", [*good, f"--resume={tmp_path / 'real.pt'}"], "real.pt"),
        "downsample": ("train", [*good, "--downsample=3"], "--downsample"),
        "decay": ("train", [*good, "--lr-decay-style=step"], "cosine"),
        "exponential to 0": (
            "train",
            [*good, "--lr-decay-style=exponential", "--lr-decay-ratio=0"],
            "--lr-decay-ratio",
        ),
        "warmup": ("train", [*good, "--warmup=2"], "--warmup"),
        "half a step": ("train", [*good, "--train-iters=1.5"], "--train-iters"),
        "channels": ("train", [*good, "--quantizer=lfq", "--lfq-dim=63"], "--lfq-dim"),
        "groups": (
            "train",
            [*good, "--quantizer=lfq", "--lfq-entropy-groups=13"],
            "entropy_groups must be an integer from 1 to 12",
        ),
        "ema decay": ("train", [*good, "--quantizer=ema", "--ema-decay=1"], "decay must be in"),
        "statistics": (
            "train",
            [*good, "--rfsq-strategy=none", "--rfsq-statistics=image"],
            "statistics 'image' needs strategy 'layernorm', not 'none'",
        ),
        "all weights 0": (
            "train",
            [*good, "--l1-weight=0", "--codebook-weight=0"],
            "a weight above 0",
        ),
        "empty save": ("train", [*good, "--save="], "--save is empty"),
        "empty resume": ("train", [*good, "--resume="], "--resume is empty"),
        "empty evaluation": ("evaluate", ["--load=x", "--val-data-path="], "data-path is empty"),
        "empty report": ("report", ["runs", ""], "RUNS is empty"),
        "empty pack": ("pack_images", ["", "out"], "SRC is empty"),
        "too many decoders": ("pack_images", ["a", "b", "--num-workers=9999"], "at most 1024"),
        "giant images": ("pack_images", ["a", "b", "--img-size=10000"], "at most 8192"),
        "nothing to learn from": ("train", [*good, "--l1-weight=0"], "--l1-weight 0"),
        "too many stages": ("train", [*good, "--rfsq-stages=1000000"], "--rfsq-stages"),
        "too many workers": ("train", [*good, "--num-workers=100000"], "--num-workers"),
        "too large": ("train", [*good, "--img-size=1000000"], "--img-size"),
        "too deep": ("train", [*good, "--res-blocks=100000"], "--res-blocks"),
        "slope": ("train", [*good, "--rfsq-slope=1e300"], "--rfsq-slope"),
        "levels too many": ("train", [*good, "--levels", *["64"] * 11], "2^62"),
        "pack nothing": ("pack_images", ["nowhere", str(tmp_path / "packed")], "nowhere"),
        "pack an empty folder": ("pack_images", [str(empty), str(tmp_path / "packed")], str(empty)),
        "pack into itself": ("pack_images", [str(photographs)] * 2, str(photographs)),
        "report nothing": ("report", ["nowhere"], "nowhere"),
        "stages of a fake": ("stages", [f"--load={tmp_path / 'fake.pt'}", val], "fake.pt"),
        "compare a fake": (
            "compare",
            [f"--load={tmp_path / 'fake.pt'}", val, f"--out={tmp_path / 'x.png'}"],
            "fake.pt",
        ),
        "benchmark what": ("benchmark", ["--only=nothing"], "nothing"),
        "evaluate nothing": ("evaluate", [val], "--load"),
        "evaluate fake": ("evaluate", [val, f"--load={tmp_path / 'fake.pt'}"], "fake.pt"),
        "evaluate lie": ("evaluate", [val, f"--load={tmp_path / 'lie.pt'}"], "lie.pt"),
        "evaluate folder": ("evaluate", ["--val-data-path=nowhere", real], "nowhere"),
        "evaluate size": ("evaluate", [val, real, "--img-size=30"], "30"),
        "evaluate diverged": ("evaluate", [val, f"--load={tmp_path / 'huge.pt'}"], "not finite"),
        "evaluate to nowhere": ("evaluate", [val, real, f"--json={nowhere / 'x.json'}"], "x.json"),
        "save below a file": (
            "train",
            [*good, f"--save={tmp_path / 'real.pt' / 'run'}"],
            "real.pt",
        ),
        "pack below a file": (
            "pack_images",
            [str(photographs), str(tmp_path / "real.pt" / "packed")],
            "real.pt",
        ),
        "report to nowhere": ("report", [finished, f"--out={nowhere / 'x.md'}"], "x.md"),
        "report a damaged run": ("report", [str(tmp_path / "half")], "results.json"),
        "compare to nowhere": ("compare", [real, val, f"--out={nowhere / 'x.png'}"], "x.png"),
        "compare without images": (
            "compare",
            [real, "--val-data-path=nowhere", f"--out={tmp_path / 'x.png'}"],
            "nowhere",
        ),
        "stages without images": ("stages", [real, "--val-data-path=nowhere"], "nowhere"),
        "stages to nowhere": ("stages", [real, val, f"--json={nowhere / 'x.json'}"], "x.json"),
        "stages into a file": (
            "stages",
            [real, val, f"--figures={tmp_path / 'real.pt'}"],
            "real.pt",
        ),
        "benchmark to nowhere": (
            "benchmark",
            [f"--json={nowhere / 'x.json'}"],
            "x.json",
        ),
        "reproduce what": ("reproduce.sh", ["--only", "rfsq"], "--only rfsq"),
        "reproduce a seed": ("reproduce.sh", ["--seeds", "one"], "one"),
        "reproduce no seed": ("reproduce.sh", ["--seeds"], "--seeds"),
        "reproduce as another": ("reproduce.sh", ["--quantizer", "lfq"], "--only"),
        "reproduce into one folder": ("reproduce.sh", ["--save=x"], "OUT"),
    }


def test_bad_input_is_one_line_and_code_2(photographs, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mains = {"train": train.main}
    for name in ("evaluate", "pack_images", "report", "stages", "compare", "benchmark"):
        mains[name] = importlib.import_module(f"scripts.{name}").main
    cases = bad_inputs(photographs, tmp_path)
    assert len(cases) >= 40
    before = sorted(tmp_path.rglob("*"))
    for name, (script, flags, part) in cases.items():
        base = [*TINY, "--train-iters=2", "--save=run"] if script == "train" else []
        if script in mains:
            with pytest.raises(SystemExit) as caught:
                exits.run_script(lambda s=script, b=base, f=flags: mains[s]([*b, *f]))
            code, errors = caught.value.code, capfd.readouterr().err
        else:
            command = ["bash", str(ROOT / "scripts" / script), *flags]
            done = subprocess.run(command, capture_output=True, text=True)
            code, errors = done.returncode, done.stderr
        lines = errors.strip().splitlines()
        assert code == 2, (name, errors)
        assert len(lines) == 1 and part in lines[0], (name, errors)
        if name in ("broken image", "broken validation image"):  # found in training
            # A checkpoint is written before its evaluation, which so cannot lose it.
            saved = (tmp_path / "run" / "last.pt").exists()
            assert saved == (name == "broken validation image"), name
            shutil.rmtree(tmp_path / "run")
        assert sorted(tmp_path.rglob("*")) == before, name


def test_broken_image_in_a_real_process(photographs, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(8):
        Image.new("RGB", (32, 32)).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes((folder / "0.png").read_bytes()[:40])
    flags = [f"--train-data-path={folder}", f"--val-data-path={photographs / 'val'}"]
    command = [sys.executable, ROOT / "train.py", *TINY, *flags, "--num-workers=1"]
    done = subprocess.run(
        [*command, "--train-iters=2", f"--save={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        env={**os.environ, "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"},
    )
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2
    assert len(lines) == 1 and lines[0].startswith("train.py: error: cannot read image")
    assert str(folder / "3.png") in lines[0]


def test_a_reader_that_has_read_enough_is_no_error():
    """As after `| head -1`."""
    code = "import exits; exits.run_script(lambda: [print(i, flush=True) for i in range(10**5)])"
    options = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], **options) as script:
        assert script.stdout.readline() == b"0\n"
        script.stdout.close()
        assert script.stderr.read() == b""
    assert script.returncode == 128 + signal.SIGPIPE


def test_a_process_that_lost_the_others_says_so(capsys):
    def main():
        raise RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Broken pipe")

    with pytest.raises(SystemExit) as caught:
        exits.run_script(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 1 and "another process of this run has ended" in line
    with pytest.raises(RuntimeError, match="another"):
        exits.run_script(lambda: (_ for _ in ()).throw(RuntimeError("another error")))


def test_standard_streams_that_are_closed_lead_nowhere(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)

    def main():
        print("hello", flush=True)
        print("hello", file=sys.stderr)
        assert sys.stdin.read() == "" and not sys.stderr.isatty()

    exits.run_script(main)
    for name in ("stdin", "stdout", "stderr"):
        getattr(sys, name).close()
