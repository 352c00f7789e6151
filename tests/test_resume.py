"""Runs survive: kills, signals, damage and bad numbers, and go on as if nothing had happened."""

from __future__ import annotations

import errno
import json
import math
import os
import pty
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from processes import DEADLINE, child, children, ended, exists, free_port, wait_for
from torchvision.utils import save_image

import exits
import train
import util
from checkpoint import load_checkpoint, save_checkpoint
from dataset import loaders
from dataset.synthetic import SyntheticDataset
from loss import Perceptual, TrainingLoss
from meter import Meter
from model import VQVAE
from quantizers import RFSQ, VectorQuantizeEMA
from run import RunFolder, setup
from scripts import pack_images
from train import Training

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--img-size=16", "--channel=16", "--batch-size=4", "--perceptual-weight=0", "--lr=0.01"]
DATA = ["--train-data-path=synthetic", "--val-data-path=synthetic"]
STEPS = 14
FLAGS = [*SMALL, *DATA, f"--train-iters={STEPS}", "--log-interval=3"]
FLAGS += ["--save-interval=5", "--eval-interval=5"]
QUANTIZERS = {
    "layernorm": ["--rfsq-strategy=layernorm"],
    "scale": ["--rfsq-strategy=scale"],
    "lfq": ["--quantizer=lfq"],
    "svq": ["--quantizer=svq", "--pairs", "--svq-bits=24", "--svq-stages=2", "--svq-dim=16"],
    "ema": ["--quantizer=ema", "--n-embed=16", "--embed-dim=4", "--ema-stages=2"],
}
OTHERS = {
    "fsq": ["--quantizer=fsq"],
    "none": ["--rfsq-strategy=none"],
    "image": ["--rfsq-statistics=image"],
}


@pytest.fixture(autouse=True)
def no_nohup():
    """As if the tests had not been started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("dataset.SYNTHETIC_VAL", 2)


def run(folder: Path, *flags: str) -> dict:
    return train.main([*FLAGS, "--num-workers=0", f"--save={folder}", *flags])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run with these flags, made once, to compare with."""
    runs: dict[tuple[str, ...], Path] = {}

    def finished(*flags: str) -> Path:
        if flags not in runs:
            runs[flags] = tmp_path_factory.mktemp("whole") / "run"
            run(runs[flags], *flags)
        return runs[flags]

    return finished


def interrupt_after(monkeypatch, step: int, number=signal.SIGTERM):
    """Send this process a signal in step `step`, once."""
    forward, calls = train.TrainingStep.forward, iter(range(1, 10**6))

    def forward_and_signal(self, batch):
        if next(calls) == step:
            os.kill(os.getpid(), number)
        return forward(self, batch)

    monkeypatch.setattr(train.TrainingStep, "forward", forward_and_signal)


def same(a, b) -> bool:
    """Whether two parts of a checkpoint are equal, to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, optimizer, random states and logs of two finished runs, but for times and paths."""
    one, two = (load_checkpoint(folder / "last.pt") for folder in (a, b))
    parts = ("model", "optimizer", "step", "best_psnr", "skipped", "random", "train_images")
    for part in (*parts, "interval_sums", "interval_count"):
        assert same(one[part], two[part]), part
    logs = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (a, b)]
    timing = ("images_per_s", "peak_memory_mib")
    records = [[json.loads(line) for line in log] for log in logs]
    bare = [[{k: v for k, v in r.items() if k not in timing} for r in log] for log in records]
    assert bare[0] == bare[1]
    results = [json.loads((folder / "results.json").read_text()) for folder in (a, b)]
    for key in ("psnr", "l1", "stages", "steps", "images_seen"):
        assert results[0][key] == results[1][key]


@pytest.mark.parametrize("flags", QUANTIZERS.values(), ids=QUANTIZERS.keys())
@pytest.mark.parametrize("step", [1, 7, 10])
def test_interrupted_and_resumed_is_uninterrupted(step, flags, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt_after(patched, step)
        with pytest.raises(exits.Interrupted, match=f"SIGTERM after step {step};.*--resume"):
            run(tmp_path / "cut", *flags)
    assert load_checkpoint(tmp_path / "cut" / "last.pt")["step"] == step
    run(tmp_path / "cut", *flags, "--resume=auto")
    assert_same_run(whole(*flags), tmp_path / "cut")


def test_workers_and_many_interruptions(whole, tmp_path, monkeypatch):
    for step, number in ((2, signal.SIGUSR1), (1, signal.SIGINT), (4, signal.SIGTERM)):
        with monkeypatch.context() as patched:
            interrupt_after(patched, step, number)
            with pytest.raises(exits.Interrupted):
                run(tmp_path / "cut", "--resume=auto", "--num-workers=1")
    run(tmp_path / "cut", "--resume=auto", "--num-workers=2")
    assert_same_run(whole(), tmp_path / "cut")


@pytest.mark.parametrize("flags", [["--rfsq-strategy=layernorm"], ["--quantizer=lfq"]])
@pytest.mark.parametrize("evaluation, step", [(1, 5), (3, STEPS)])
def test_a_signal_in_an_evaluation_loses_nothing(
    evaluation, step, flags, whole, tmp_path, monkeypatch
):
    """The checkpoint is written before the evaluation, which the resumed run makes up for."""
    with monkeypatch.context() as patched:
        signal_now = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
        before_call(patched, "train.evaluate", evaluation, signal_now)
        with pytest.raises(exits.Interrupted, match=f"SIGTERM after step {step};.*--resume"):
            run(tmp_path / "cut", *flags)
    assert load_checkpoint(tmp_path / "cut" / "last.pt")["step"] == step
    run(tmp_path / "cut", *flags, "--resume=auto")
    assert_same_run(whole(*flags), tmp_path / "cut")
    best = [
        load_checkpoint(folder / "best.pt")["step"] for folder in (whole(*flags), tmp_path / "cut")
    ]
    assert best[0] == best[1]


@pytest.mark.parametrize("number", exits.StopSignals.SIGNALS)
def test_a_signal_before_the_first_step_ends_at_once(number, tmp_path, monkeypatch):
    before = [signal.getsignal(number) for number in exits.StopSignals.SIGNALS]
    before_call(monkeypatch, "setup.build_dataset", 1, lambda: os.kill(os.getpid(), number))
    with pytest.raises(exits.Interrupted, match=f"by {number.name} before the first step"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert [signal.getsignal(number) for number in exits.StopSignals.SIGNALS] == before


def test_a_signal_after_the_last_step_leaves_whole_results(tmp_path, monkeypatch):
    before_call(
        monkeypatch, "RunFolder.write_results", 1, lambda: os.kill(os.getpid(), signal.SIGTERM)
    )
    assert run(tmp_path / "run") == json.loads((tmp_path / "run" / "results.json").read_text())


def test_images_of_a_folder_in_mid_epoch(tmp_path, monkeypatch):
    for i in range(11):
        (tmp_path / "images").mkdir(exist_ok=True)
        save_image(SyntheticDataset(16, 0, 11)[i] / 255, tmp_path / "images" / f"{i}.png")
    data = f"--train-data-path={tmp_path / 'images'}"
    run(tmp_path / "whole", data)
    with monkeypatch.context() as patched:
        interrupt_after(patched, 4)
        with pytest.raises(exits.Interrupted):
            run(tmp_path / "cut", data)
    resume = ["--resume", str(tmp_path / "cut" / "last.pt")]
    # Another number of images would come in another order.
    save_image(torch.zeros(3, 16, 16), tmp_path / "images" / "one more.png")
    with pytest.raises(ValueError, match=r"on 11 training images, but --train-data-path has 12"):
        run(tmp_path / "cut", data, *resume)
    (tmp_path / "images" / "one more.png").unlink()
    (tmp_path / "images").rename(tmp_path / "moved")  # a path may change
    run(tmp_path / "cut", f"--train-data-path={tmp_path / 'moved'}", *resume)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_other_images_of_equal_count_are_refused(tmp_path, monkeypatch, capsys):
    for folder, seed in (("images", 0), ("others", 1)):
        (tmp_path / folder).mkdir()
        for i in range(8):
            save_image(SyntheticDataset(16, seed, 8)[i] / 255, tmp_path / folder / f"{i}.png")
        pack_images.main(
            [str(tmp_path / folder), str(tmp_path / f"packed-{folder}"), "--img-size=16"]
        )
    names = ("images", "others", "packed-images", "packed-others")
    data = [f"--train-data-path={tmp_path / name}" for name in names]
    with monkeypatch.context() as patched:
        interrupt_after(patched, 4)
        with pytest.raises(exits.Interrupted):
            run(tmp_path / "cut", data[0])
    with pytest.raises(ValueError, match=r"other training images \(their sizes.*--allow-other-im"):
        run(tmp_path / "cut", data[1], "--resume=auto")
    (tmp_path / "images" / "7.png").rename(tmp_path / "images" / "8.png")
    with pytest.raises(ValueError, match=r"other training images \(their names differ\)"):
        run(tmp_path / "cut", data[0], "--resume=auto")
    run(tmp_path / "cut", data[2], "--resume=auto", "--train-iters=6")  # the same images, packed
    with pytest.raises(ValueError, match=r"other training images \(their pixels differ\)"):
        run(tmp_path / "cut", data[3], "--resume=auto")
    run(tmp_path / "cut", data[1], "--resume=auto", "--allow-other-images")


def test_the_stages_that_are_dropped_are_those_of_an_uninterrupted_run(
    whole, tmp_path, monkeypatch
):
    """They are drawn at random."""
    flags = ["--rfsq-stage-dropout=0.5"]
    with monkeypatch.context() as patched:
        interrupt_after(patched, 7)
        with pytest.raises(exits.Interrupted):
            run(tmp_path / "cut", *flags)
    run(tmp_path / "cut", *flags, "--resume=auto")
    assert_same_run(whole(*flags), tmp_path / "cut")


def test_a_resumed_run_has_the_threads_that_it_had(whole, tmp_path):
    """The rounding of sums depends on their number."""
    folder = Path(shutil.copytree(whole(), tmp_path / "run"))
    path = folder / "step_0000010.pt"
    save_checkpoint(path, {**load_checkpoint(path), "threads": 2})
    try:
        run(folder, f"--resume={path}")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_the_lpips_network_of_the_loss_stays(tmp_path, monkeypatch):
    random_weights = lambda net, *_: Perceptual(net, pretrained=False)  # noqa: E731
    monkeypatch.setattr(train, "lpips_network", random_weights)
    flags = ["--img-size=32", "--perceptual-weight=0.1"]
    run(tmp_path / "run", *flags, "--lpips-net=squeeze", "--train-iters=1")
    with pytest.raises(ValueError, match="--lpips-net squeeze there, alex here"):
        run(tmp_path / "run", *flags, "--lpips-net=alex", "--train-iters=2", "--resume=auto")


def test_speed_counts_the_time_before_the_interruption(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt_after(patched, 7)
        with pytest.raises(exits.Interrupted):
            run(tmp_path / "cut")
    saved = load_checkpoint(tmp_path / "cut" / "step_0000007.pt")
    assert 0 < saved["interval_seconds"] < saved["seconds"]
    save_checkpoint(tmp_path / "cut" / "step_0000007.pt", {**saved, "interval_seconds": 1000.0})
    run(tmp_path / "cut", "--resume=auto")
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    speeds = {r["step"]: r["images_per_s"] for r in map(json.loads, lines) if "loss" in r}
    assert speeds[9] < 0.1 < speeds[12]  # steps 7 to 9, of which one was before


def fork_group(world: int, work, output: str | Path = os.devnull) -> list[int]:
    """`work(rank)` in a group of forked processes, as torchrun sets them up; their exit codes."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def process(rank: int) -> None:
        sizes = {name: str(world) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        os.environ.update(place, **sizes, RANK=str(rank), LOCAL_RANK=str(rank))
        exits.run_script(lambda: work(rank))

    return [
        ended(pid)
        for pid in [child(lambda rank=rank: process(rank), output) for rank in range(world)]
    ]


@pytest.mark.parametrize(
    "name, interval, stopped", [("layernorm", 20, 16), ("layernorm", 7, 7), ("ema", 7, 7)]
)
def test_two_processes_stop_together_and_continue_to_the_bit(name, interval, stopped, tmp_path):
    """They agree every 16 steps, and in every evaluation."""
    flags = [*QUANTIZERS[name], "--train-iters=20", f"--eval-interval={interval}"]
    flags += ["--save-interval=7", "--resume=auto"]

    def work(folder: str, signalled: bool, rank: int) -> None:
        if signalled and rank == 1:
            with pytest.MonkeyPatch.context() as patched:
                interrupt_after(patched, 3, signal.SIGUSR1)
                run(tmp_path / folder, *flags)
        run(tmp_path / folder, *flags)

    def group(folder: str, signalled: bool = False) -> list[int]:
        return fork_group(2, lambda rank: work(folder, signalled, rank))

    assert group("whole") == [0, 0]
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["images_seen"] == 20 * 4
    assert results["images"] == 2 and results["stages"][0]["tokens"] == 2 * 4 * 4  # each once
    assert group("cut", signalled=True) == [exits.EXIT_INTERRUPTED] * 2
    assert load_checkpoint(tmp_path / "cut" / "last.pt")["step"] == stopped
    shutil.copytree(tmp_path / "cut", tmp_path / "one")
    assert group("cut") == [0, 0]
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    # One process continues what two began, to rounding errors, the sums for the log included.
    assert run(tmp_path / "one", *flags)["steps"] == 20
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "one")]
    whole, one = ([json.loads(line) for line in log.splitlines()] for log in logs)
    for wanted, record in zip(whole, one, strict=True):
        if record["kind"] == "train":
            assert record["loss"] == pytest.approx(wanted["loss"], rel=0.02)


def test_twenty_kills(tmp_path):
    """A run killed at random moments, every third time inside the write of a checkpoint.

    The kernel counts the moments in CPU time, so that a busy machine has no influence, and sends
    SIGPROF, which ends a process as SIGKILL does. KILLS=200 in the environment makes it a longer
    test.
    """
    flags = ["--save-interval=2", "--eval-interval=4", "--keep=3"]
    run(tmp_path / "warm", *flags)  # what is imported late is in the time of no child
    started = time.process_time()
    run(tmp_path / "whole", *flags)
    duration = time.process_time() - started
    chance, kills, tries = random.Random(0), 0, 0
    folder = tmp_path / "killed"
    save = torch.save

    def die_in_the_write(state, file):
        if chance.random() < 0.6:
            return save(state, file)
        file.write(b"half a checkpoint")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def work(number: int) -> None:
        chance.seed(number)
        if number % 3 == 0:
            torch.save = die_in_the_write
        else:
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, max(1e-3, chance.random() * duration))
        run(folder, *flags, "--resume=auto")

    wanted = int(os.environ.get("KILLS", 20))
    while kills < wanted:
        assert tries < 10 * wanted
        tries += 1
        pid = child(lambda number=tries: work(number))
        if (code := ended(pid)) in (-signal.SIGKILL, -signal.SIGPROF):
            kills += 1
        else:  # it had finished before the kill: begin anew
            assert code == 0
            assert_same_run(tmp_path / "whole", folder)
            folder.rename(tmp_path / f"finished-{tries}")
    run(folder, *flags, "--resume=auto")
    assert_same_run(tmp_path / "whole", folder)
    assert len(list(folder.glob("step_*.pt"))) == 3
    assert not list(folder.glob(".*"))  # what a killed process had half-written


def run_killed_before_naming(folder: Path, flags: list[str], victim: str) -> None:
    """A run that dies just before a checkpoint `victim` is named, or any is named `victim`."""
    link = RunFolder._link

    def die(self: RunFolder, path: Path, name: str) -> None:
        if victim in (path.name, name):
            os.kill(os.getpid(), signal.SIGKILL)
        link(self, path, name)

    def work() -> None:
        RunFolder._link = die
        run(folder, *flags)

    assert ended(child(work)) == -signal.SIGKILL


@pytest.mark.parametrize("step", [2, 14])
def test_a_kill_between_a_checkpoint_and_its_name(step, whole, tmp_path):
    """After the last one there is no other that would be named last.pt."""
    flags, folder = ["--save-interval=2", "--keep=3"], tmp_path / "run"
    run_killed_before_naming(folder, flags, f"step_{step:07d}.pt")
    assert (folder / f"step_{step:07d}.pt").exists()
    run(folder, *flags, "--resume=auto")
    assert load_checkpoint(folder / "last.pt")["step"] == 14
    assert_same_run(whole(*flags), folder)
    assert len(list(folder.glob("step_*.pt"))) == 3


def test_a_kill_between_a_result_and_the_name_of_the_best(tmp_path, monkeypatch):
    """Here the model gets worse with every step, so that the first one stays the best."""
    flags = ["--save-interval=2", "--eval-interval=4"]
    folder, steps = tmp_path / "run", []
    assess, evaluate = Training.assess, train.evaluate

    def noted(self: Training, step: int) -> dict:
        steps.append(step)
        return assess(self, step)

    def worse(*given, **named) -> dict:
        return {**evaluate(*given, **named), "psnr": -steps[-1]}

    monkeypatch.setattr(Training, "assess", noted)
    monkeypatch.setattr(train, "evaluate", worse)
    run_killed_before_naming(folder, flags, "best.pt")
    run(folder, *flags, "--resume=auto")
    results = json.loads((folder / "results.json").read_text())
    assert [record["step"] for record in results["validations"]] == [4, 8, 12, 14]
    assert load_checkpoint(folder / "best.pt")["step"] == 4


def test_best_is_of_one_validation_set(monkeypatch, tmp_path):
    decibels, evaluate = iter([30.0, 29.0, 9.0, 10.0, 12.0]), train.evaluate

    def chosen(*given, **named) -> dict:
        return {**evaluate(*given, **named), "psnr": next(decibels)}

    monkeypatch.setattr(train, "evaluate", chosen)
    folder, other = tmp_path / "run", tmp_path / "images"
    other.mkdir()
    save_image(torch.rand(3, 16, 16), other / "a.png")
    flags = ["--save-interval=2", "--eval-interval=2"]
    run(folder, *flags, "--train-iters=4", "--lr-decay-style=constant")
    assert load_checkpoint(folder / "best.pt")["step"] == 2
    flags += ["--lr-decay-style=constant", "--resume=auto", f"--val-data-path={other}"]
    run(folder, *flags, "--train-iters=8")
    assert load_checkpoint(folder / "best.pt")["step"] == 8


def test_a_resumed_run_says_how_it_began_and_went_on(tmp_path, monkeypatch, capsys):
    run(tmp_path / "first", "--train-iters=4")
    load = f"--load={tmp_path / 'first' / 'last.pt'}"
    folder, flags = tmp_path / "run", ["--lr-decay-style=constant"]
    run(folder, *flags, "--train-iters=4", load)
    (tmp_path / "first" / "last.pt").unlink()
    results = run(folder, *flags, "--train-iters=6", "--resume=auto")
    assert [part["precision"] for part in results["segments"]] == ["fp32", "fp32"]
    assert results["args"]["load"] == load.removeprefix("--load=")
    assert [part["first_step"] for part in results["segments"]] == [1, 5]
    installed = util.version("torch")
    assert all(part["torch"] == installed for part in results["segments"])
    assert "uninterrupted" not in capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr(util, "version", lambda name: "2.6.0")
        run(folder, *flags, "--train-iters=8", "--resume=auto")
    line = f"not bit for bit equal to an uninterrupted run: torch {installed}, now 2.6.0\n"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "empty", "executes"])
def test_damage_is_seen_and_the_checkpoint_before_is_used(
    damage, whole, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patched:
        interrupt_after(patched, 12)
        with pytest.raises(exits.Interrupted):
            run(tmp_path / "cut")
    newest = sorted((tmp_path / "cut").glob("step_*.pt"))[-1]
    content = bytearray(newest.read_bytes())
    if damage == "flipped bit":
        bias = load_checkpoint(newest)["model"]["decoder.layers.0.bias"]
        content[content.index(bias.numpy().tobytes()) + 5] ^= 1
    elif damage == "executes":
        content = b"cos\nsystem\n(S'touch " + str(tmp_path / "made").encode() + b"'\ntR."
    else:
        content = content[: len(content) // 2] if damage == "truncated" else b""
    newest.write_bytes(content)  # last.pt is the same file
    with pytest.raises(ValueError, match=r"damaged|not a checkpoint"):
        load_checkpoint(newest)
    capsys.readouterr()
    run(tmp_path / "cut", "--resume=auto")
    out = capsys.readouterr().out
    assert "skipped:" in out and str(newest) in out and "resumed after step 10" in out
    assert not (tmp_path / "made").exists()
    assert_same_run(whole(), tmp_path / "cut")


def test_evaluations_and_checkpoints_have_intervals_of_their_own(tmp_path):
    run(tmp_path / "run", "--save-interval=3", "--eval-interval=7", "--keep=99")
    steps = [int(path.name[5:12]) for path in sorted((tmp_path / "run").glob("step_*.pt"))]
    assert steps == [3, 6, 7, 9, 12, 14]
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [record["step"] for record in records if record["kind"] == "val"] == [7, 14]


def test_damaged_lines_of_the_log_are_skipped_with_a_warning(whole, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        interrupt_after(patched, 12)
        with pytest.raises(exits.Interrupted):
            run(tmp_path / "cut")
    with open(tmp_path / "cut" / "metrics.jsonl", "ab") as log:
        log.write(b'\xff\xfe\n{"kind": "train"}\n[1, 2]\n')
        for change in ({"psnr": None}, {"psnr": "x"}, {"psnr": True}, {"l1": math.nan}):
            log.write(
                json.dumps({"kind": "val", "step": 1, "psnr": 9.0, **change}).encode() + b"\n"
            )
        for change in ({"lpips_net": 5}, {"step": True}):
            log.write(
                json.dumps({"kind": "val", "step": 1, "psnr": 9.0, **change}).encode() + b"\n"
            )
        log.write(b'{"kind": "val", "step": 1')
    run(tmp_path / "cut", "--resume=auto")
    assert "10 damaged lines skipped" in capsys.readouterr().out
    assert_same_run(whole(), tmp_path / "cut")


def test_checkpoints_are_sorted_by_number_and_best_is_the_last_resort(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    for step in (9_999_999, 10_000_000, 5):
        save_checkpoint(tmp_path / f"step_{step:07d}.pt", {"model": {}, "args": {}, "step": step})
    (tmp_path / "step_x.pt").write_bytes(b"of somebody else")
    assert [step for step, _ in folder.checkpoints()] == [5, 9_999_999, 10_000_000]
    assert folder.newest_checkpoint()[1]["step"] == 10_000_000
    shutil.copy(tmp_path / "step_0000005.pt", tmp_path / "best.pt")
    for _, path in folder.checkpoints():
        path.write_bytes(b"damaged")
    path, state = folder.newest_checkpoint()
    assert (path.name, state["step"]) == ("best.pt", 5)
    assert "all newer checkpoints are damaged" in capsys.readouterr().out


def test_files_of_others_in_the_folder_stay(tmp_path):
    """Only what a run has written itself is ever deleted."""
    folder = tmp_path / "run"
    run(folder)
    others = [folder / name for name in (".env.production.local", "step_final.pt", "notes.pt")]
    for path in others:
        path.write_text("mine")
    run(folder, "--overwrite")
    assert [path.read_text() for path in others] == ["mine"] * 3
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "last.pt").write_text("mine")
    for flags in ([], ["--overwrite"]):
        with pytest.raises(ValueError, match=r"last\.pt but no args\.json"):
            run(strange, *flags)
    assert [path.name for path in strange.iterdir()] == ["last.pt"]


def test_overwriting_on_a_full_disk_keeps_the_old_run(tmp_path, monkeypatch):
    run(tmp_path / "run")
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before_call(
        monkeypatch,
        "RunFolder.begin",
        1,
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1])),
    )
    try:
        with pytest.raises(ValueError, match=r"args\.json cannot be written"):
            run(tmp_path / "run", "--overwrite")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files == {
        path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()
    }


def test_profile_writes_a_trace(tmp_path):
    run(tmp_path / "run", "--profile=2")
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    assert any("conv" in event.get("name", "") for event in events)


def test_a_run_too_short_for_its_profile_says_so(tmp_path, capsys):
    run(tmp_path / "run", "--profile=2", "--train-iters=8")
    assert "no profile: it needs more" in capsys.readouterr().out


def test_without_git_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert util.environment(torch.device("cpu"))["commit"] is None


def test_flags_that_make_another_run_are_refused(tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 3)
    with pytest.raises(exits.Interrupted):
        run(tmp_path / "run")
    others = ["--lr 0.02", "--seed 1", "--channel 32", "--warmup 0", "--rfsq-stage-dropout 0.5"]
    others += ["--rfsq-strategy geometric"]
    for flag, value in map(str.split, others):
        with pytest.raises(ValueError, match=rf"{flag} .* there, .* here") as caught:
            run(tmp_path / "run", "--resume=auto", f"{flag}={value}")
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"--levels \[8, 8, 8, 4\] there, \[4, 8, 8, 8\] here"):
        run(tmp_path / "run", "--resume=auto", "--levels", "4", "8", "8", "8")
    with pytest.raises(ValueError, match="end the run at step 2"):
        run(tmp_path / "run", "--resume=auto", "--train-iters=2")
    allowed = ["--train-iters=16", "--log-interval=4", "--num-workers=1", "--keep=1"]
    allowed += ["--ema-decay=1", "--rfsq-initial-scale=2"]  # which layernorm does not read
    allowed += ["--levels", "8", "8", "8", "4"]  # as by default
    assert run(tmp_path / "run", "--resume=auto", *allowed)["steps"] == 16
    assert len(list((tmp_path / "run").glob("step_*.pt"))) == 1


def test_what_cannot_be_resumed(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("hello")
    for path, says in (("empty", "holds no checkpoint"), ("text.pt", "not a checkpoint")):
        with pytest.raises(ValueError, match=says):
            run(tmp_path / "new", f"--resume={tmp_path / path}")
    assert not (tmp_path / "new").exists()
    assert run(tmp_path / "new", "--resume=auto", "--train-iters=2")["steps"] == 2


def test_hostile_training_states_with_a_valid_checksum_are_one_line(whole, tmp_path):
    saved = load_checkpoint(whole() / "step_0000010.pt")
    state, random = saved["optimizer"], saved["random"]
    moments = state["state"][0]
    wrong = [
        *({"step": value} for value in (None, "5", 5.0, True, [5], torch.tensor(5))),
        *({"threads": value} for value in (0, 10**9, -1, "2")),
        *({"best_psnr": value} for value in (None, 20, "x")),
        *({"interval_sums": value} for value in (5, torch.ones(1, 2, 9), torch.ones(1, 50))),
        *({"random": {**random, name: value}} for name in ("python", "numpy") for value in (5, [])),
        *({"random": {**random, "torch": value}} for value in (None, torch.ones(3))),
        *({"optimizer": value} for value in (5, {}, {"state": 5}, {"state": {0: 5}})),
        {"optimizer": {**state, "state": {**state["state"], 0: {}, 1: {"step": 1}}}},
        {"optimizer": {**state, "state": {0: {**moments, "exp_avg": torch.ones(10**6)}}}},
        {"optimizer": {**state, "state": {0: {**moments, "step": torch.ones(5)}}}},
        *({"train_fingerprint": value} for value in (5, "x", [])),
        *({"segments": value} for value in (5, {}, None)),
        *({"skipped_images": value} for value in (5, [5])),
        {"step": -1},
        {"skipped": None},
        {"args": {**saved["args"], "lr": "x"}},
        {"model": {**saved["model"], "decoder.layers.0.bias": torch.ones(3)}},
    ]
    (tmp_path / "args.json").write_text("{}")  # of a run
    for number, change in enumerate(wrong):
        path = tmp_path / f"{number}.pt"
        save_checkpoint(path, {**saved, **change})
        with pytest.raises(ValueError) as caught:
            run(tmp_path / "new", f"--resume={path}")
        assert "\n" not in str(caught.value), change


def test_a_finished_run_resumed_gives_its_results_again(tmp_path):
    first = run(tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    again = run(tmp_path / "run", "--resume=auto")
    assert again["psnr"] == first["psnr"] and again["steps"] == first["steps"]


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    flags = [f"--save={tmp_path / 'run'}", "--num-workers=0", "--train-iters=3"]
    train.main([*FLAGS, *flags])
    for how in ([], ["--resume=auto"], ["--overwrite"]):
        with (
            RunFolder(tmp_path / "run").locked(),
            pytest.raises(ValueError, match="another process is training"),
        ):
            train.main([*FLAGS, *flags, *how])
    train.main([*FLAGS, *flags, "--resume=auto"])  # the lock was left behind by nobody


def test_a_refused_resume_loses_no_checkpoint(tmp_path):
    """Going back to an older checkpoint drops the newer ones, but only once the run is on."""
    folder = tmp_path / "run"
    run(folder, "--keep=9")
    files = {path.name: path.read_bytes() for path in folder.glob("*.pt")}
    assert {"step_0000005.pt", "step_0000010.pt", "step_0000014.pt"} <= files.keys()
    older = f"--resume={folder / 'step_0000005.pt'}"
    with pytest.raises(ValueError, match="end the run at step 4"):
        run(folder, older, "--train-iters=4")
    with RunFolder(folder).locked(), pytest.raises(ValueError, match="another process is training"):
        run(folder, older)
    assert {path.name: path.read_bytes() for path in folder.glob("*.pt")} == files
    run(folder, older, "--train-iters=7", "--keep=9")
    left = sorted(path.name for path in folder.glob("step_*.pt"))
    assert left == ["step_0000005.pt", "step_0000007.pt"]


def set_format(path: Path, number: int) -> None:
    torch.save({**torch.load(path, weights_only=True), "format": number}, path)


@pytest.mark.parametrize("problem", ["all damaged", "newer format", "disk", "memory", "no memory"])
def test_nothing_is_deleted_where_no_checkpoint_may_be_taken(tmp_path, monkeypatch, problem):
    folder = tmp_path / "run"
    run(folder)
    if problem == "all damaged":
        for path in folder.glob("*.pt"):
            path.write_bytes(b"damaged")
    elif problem == "newer format":
        set_format(folder / "step_0000014.pt", 2)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    reason = {
        "all damaged": r"all checkpoints are damaged \(step_0000014\.pt, .*best\.pt\)",
        "newer format": r"step_0000014\.pt has checkpoint format 2",
        "disk": r"step_0000014\.pt cannot be read \(Input/output error\)",
        "memory": r"step_0000014\.pt cannot be read \(Cannot allocate memory\)",
        "no memory": r"step_0000014\.pt cannot be read \(out of memory\)",
    }
    number = {"disk": errno.EIO, "memory": errno.ENOMEM}.get(problem)

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number)) if number else MemoryError

    with monkeypatch.context() as patched:
        if number or problem == "no memory":
            patched.setattr("zipfile.ZipFile", refuse)
        with pytest.raises(ValueError, match=reason[problem]):
            run(folder, "--resume=auto")
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("first", [False, True])
def test_a_checkpoint_that_another_process_saves_meanwhile_is_kept(tmp_path, monkeypatch, first):
    """Between the look for checkpoints and the lock."""
    folder = tmp_path / "run"
    run(tmp_path / "other")
    if not first:
        with monkeypatch.context() as patched:
            interrupt_after(patched, 5)
            with pytest.raises(exits.Interrupted):
                run(folder)
    new = folder / "step_0000014.pt"
    before_call(
        monkeypatch, "RunFolder.locked", 1, lambda: shutil.copy(tmp_path / "other" / new.name, new)
    )
    with pytest.raises(ValueError, match=r"another process has saved .*step_0000014\.pt just now"):
        run(folder, "--resume=auto")
    assert new.read_bytes() == (tmp_path / "other" / new.name).read_bytes()
    assert (folder / "step_0000005.pt").exists() is not first
    run(folder, "--resume=auto")


def test_a_checkpoint_alone_makes_no_run_of_its_folder(tmp_path):
    run(tmp_path / "run")
    (tmp_path / "mine").mkdir()
    shutil.copy(tmp_path / "run" / "step_0000014.pt", tmp_path / "mine" / "last.pt")
    (tmp_path / "mine" / "step_0000099.pt").write_text("mine")
    with pytest.raises(ValueError, match="is not in the folder of a run"):
        run(tmp_path / "any", f"--resume={tmp_path / 'mine' / 'last.pt'}")
    assert sorted(os.listdir(tmp_path / "mine")) == ["last.pt", "step_0000099.pt"]


def before_call(monkeypatch, name: str, number: int, act) -> None:
    """Do `act()` just before the call `number` of a function, named as `place.function`."""
    places = {"train": train, "shutil": shutil, "RunFolder": RunFolder, "Meter": Meter}
    places |= {"run": sys.modules["run.folder"], "setup": setup}
    module = places[name.split(".")[0]]
    function, calls = getattr(module, name.split(".")[1]), iter(range(1, 10**6))

    def patched(*args, **kwargs):
        if next(calls) == number:
            act()
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name.split(".")[1], patched)


# What is written, and the call just before it, after which files may have so many bytes; None: a
# few more than the log has, so that half a line is written.
DISK = {
    "metrics.jsonl": ("Meter.compute", 3, None),
    "step_0000010.png": ("RunFolder.draw_samples", 2, 50),
    "step_0000010.pt": ("RunFolder.save", 2, 20_000),
    "last.pt": ("shutil.copyfile", 3, 20_000),
    "results.json": ("run.write_json", 3, 50),
    "results.txt": ("RunFolder.write_results", 1, 5),
}


@pytest.mark.parametrize("file", DISK)
def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(file, whole, tmp_path, monkeypatch):
    """The kernel refuses to write: a limit on the size of files stands for a disk that is full."""
    folder, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    call, number, size = DISK[file]

    def fill_the_disk():
        most = size or (folder / "metrics.jsonl").stat().st_size + 20
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))

    def no_links(*_):
        raise OSError("a file system without hard links")

    with monkeypatch.context() as patched:
        if file == "last.pt":
            patched.setattr(os, "link", no_links)
        before_call(patched, call, number, fill_the_disk)
        try:
            with pytest.raises(ValueError, match=r"cannot be written \(File too large\)") as caught:
                run(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = str(caught.value)
    assert "\n" not in message and "make room" in message
    # The copy names what it is made from.
    assert {"last.pt": "step_0000010.pt"}.get(file, file) in message
    last = {"results.json": 14, "results.txt": 14, "step_0000010.png": 10}.get(file, 5)
    assert load_checkpoint(folder / "last.pt")["step"] == last
    run(folder, "--resume=auto")
    assert_same_run(whole(), folder)
    assert not list(folder.rglob(".*"))


def test_a_folder_that_becomes_read_only(whole, tmp_path):
    place = Path(tempfile.mkdtemp())  # others, as whom root runs here, cannot reach `tmp_path`
    folder, out = place / "run", tmp_path / "out"

    def work():
        if os.geteuid() == 0:  # permissions do not hold for root
            os.chown(place, 65534, 65534)
            os.seteuid(65534)
        with pytest.MonkeyPatch.context() as patched:
            before_call(patched, "Meter.compute", 3, lambda: folder.chmod(0o555))
            exits.run_script(lambda: run(folder))

    try:
        assert ended(child(work, out)) == 2
        error = out.read_text().splitlines()[-1]
        assert "step_0000010.pt cannot be written (Permission denied)" in error
        assert "Traceback" not in out.read_text()
        folder.chmod(0o755)
        assert load_checkpoint(folder / "last.pt")["step"] == 5
        run(folder, "--resume=auto")
        assert_same_run(whole(), folder)
    finally:
        shutil.rmtree(place)


def test_a_folder_that_vanishes_is_one_line(tmp_path, monkeypatch):
    before_call(monkeypatch, "Meter.compute", 2, lambda: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"metrics\.jsonl cannot be written \(No such file"):
        run(tmp_path / "run")


# ---------------------------------------------------------------------------------------
# Real processes
# ---------------------------------------------------------------------------------------
STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """A test that fails leaves no endless training beside the next ones."""
    yield
    for process in STARTED:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    STARTED.clear()


def start(folder: Path, *flags: str, launcher=()) -> subprocess.Popen:
    """`train.py` in a process group of its own, with no end in sight; waits until it trains.

    Its output is in `folder`.out: a pipe that nobody reads would stop it.
    """
    command = [*(launcher or (sys.executable,)), str(ROOT / "train.py"), *SMALL, *DATA]
    command += ["--train-iters=1000000", "--log-interval=1", f"--save={folder}", *flags]
    network = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    environment = {**os.environ, **network, "TORCH_HOME": str(folder.parent / "torch")}
    with open(f"{folder}.out", "wb") as out:
        pipes = dict(stdout=out, stderr=subprocess.STDOUT)
        process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    STARTED.append(process)
    wait_for(lambda: process.poll() is not None or trains(folder))
    return process


def trains(folder: Path) -> bool:
    """Whether a run has logged a step."""
    log = folder / "metrics.jsonl"
    return log.exists() and log.stat().st_size > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_whole_group_saves_and_says_how_to_go_on(number, tmp_path):
    folder, out = tmp_path / "run", tmp_path / "out"
    endless = ["--train-iters=1000000", "--log-interval=1", "--num-workers=2"]

    def work():
        os.setsid()
        exits.run_script(lambda: train.main([*SMALL, *DATA, *endless, f"--save={folder}"]))

    pid = child(work, out)
    wait_for(lambda: trains(folder))
    os.killpg(pid, number)
    assert ended(pid) == exits.EXIT_INTERRUPTED
    text = out.read_text()
    assert text.strip().splitlines()[-1].startswith(f"stopped by {number.name} after step")
    assert "Traceback" not in text
    step = load_checkpoint(folder / "last.pt")["step"]
    assert f"after step {step};" in text


def test_a_terminal_that_is_closed_loses_nothing(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "train.py", *SMALL, *DATA, "--train-iters=1000000"]
    command += ["--log-interval=1", "--num-workers=1", "--lpips-net=none", f"--save={folder}"]
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(ROOT)
        os.execv(sys.executable, command)

    def trains_and_is_read() -> bool:
        while select.select([terminal], [], [], 0)[0]:
            os.read(terminal, 2**16)
        return trains(folder)

    wait_for(trains_and_is_read)
    os.close(terminal)
    assert ended(pid) == exits.EXIT_INTERRUPTED
    assert load_checkpoint(folder / "last.pt")["step"] > 0


def test_nohup_is_respected(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupt_after(monkeypatch, 2, signal.SIGHUP)
        assert run(tmp_path / "run", "--num-workers=1")["steps"] == STEPS
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_worker_that_dies_is_an_error_and_no_hang(tmp_path):
    process = start(tmp_path / "run", "--num-workers=1")
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    process.wait(timeout=DEADLINE)
    out = Path(f"{tmp_path / 'run'}.out").read_text()
    assert process.returncode == 1, out
    assert "train.py: error: a loading process died" in out and "Traceback" not in out, out


def test_loading_processes_end_where_the_end_of_the_run_is_cut_short(tmp_path):
    """By the error that PyTorch raises from a signal handler, for a loading process that died."""
    flags = [*SMALL, *DATA, "--train-iters=2", "--num-workers=1", "--lpips-net=none"]
    code = (
        "import exits, sys, train\n"
        "def cut_short(self, *_): raise RuntimeError('DataLoader worker (pid 1) is killed')\n"
        "exits.StopSignals.__exit__ = cut_short\n"
        "exits.run_script(lambda: train.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *flags, f"--save={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 1 and "error: a loading process died" in done.stderr


def test_a_loading_process_that_dies_at_the_end_of_a_script_interrupts_no_explanation():
    code = (
        "import exits, os, signal\n"
        "dead = RuntimeError('DataLoader worker (pid 1) is killed')\n"
        "def handler(*_): raise dead\n"  # as PyTorch's
        "def main(): signal.signal(signal.SIGCHLD, handler); raise dead\n"
        "explain = exits._explain_dead_worker\n"
        "def late(*error): os.kill(os.getpid(), signal.SIGCHLD); explain(*error)\n"
        "exits._explain_dead_worker = late\n"
        "exits.run_script(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "error: a loading process died" in done.stderr


@pytest.mark.parametrize("error", ["EOFError()", "OSError('half a message')", "RuntimeError('0')"])
@pytest.mark.parametrize("file", ["dataloader.py", "elsewhere.py"])
def test_a_broken_connection_to_a_worker_is_explained_and_no_other(error, file, capsys):
    """Before PyTorch sees that a worker has died, the connection to it may break in many ways."""
    names, handler = {}, signal.getsignal(signal.SIGCHLD)
    receive = f"def receive(): raise {error}"
    exec(compile(receive, "/python/multiprocessing/connection.py", "exec"), names)
    try:
        with pytest.raises((EOFError, OSError, RuntimeError)) as caught:
            exits.run_script(lambda: exec(compile("receive()", file, "exec"), names))
        sys.excepthook(caught.type, caught.value, caught.tb)
    finally:
        signal.signal(signal.SIGCHLD, handler)
        sys.excepthook = sys.__excepthook__
    explained = file == "dataloader.py"
    err = capsys.readouterr().err
    assert ("a loading process died" in err, "Traceback" in err) == (explained, not explained)


def test_a_worker_that_hangs_is_an_error_in_the_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dataset.loaders.LOADER_TIMEOUT", 3)
    monkeypatch.setattr(SyntheticDataset, "__getitem__", lambda self, i: time.sleep(3600))
    with pytest.raises(RuntimeError) as caught:
        exits.run_script(lambda: run(tmp_path / "run", "--num-workers=1"))
    sys.excepthook(caught.type, caught.value, caught.tb)
    sys.excepthook = sys.__excepthook__
    assert "error: DataLoader timed out after 3 seconds" in capsys.readouterr().err


def test_a_signal_to_a_loading_process_that_has_just_started(monkeypatch):
    """A scheduler signals the whole group at any time: the run would end by an error."""
    start_worker = loaders._start_worker

    def signalled(deferred: torch.Tensor, worker: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        start_worker(deferred, worker)

    monkeypatch.setattr(loaders, "_start_worker", signalled)
    with exits.StopSignals() as stop:
        stop.defer()
        batches = loaders.val_loader(SyntheticDataset(8, 0, 4), 2, num_workers=1, stop=stop)
        assert len(list(batches)) == 2
    assert stop.received is None
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def test_a_killed_run_leaves_no_lock_and_no_process(tmp_path):
    process = start(tmp_path / "run", "--num-workers=2")
    workers = children(process.pid)
    assert len(workers) == 4  # two for training, two for validation
    process.kill()
    process.wait()
    with RunFolder(tmp_path / "run").locked():
        pass
    wait_for(lambda: not any(map(exists, workers)))


def test_a_process_that_dies_ends_the_others(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = start(tmp_path / "run", "--num-workers=0", launcher=launcher)
    ranks = children(process.pid)
    os.kill(ranks[-1], signal.SIGKILL)
    process.wait(timeout=DEADLINE)
    out = Path(f"{tmp_path / 'run'}.out").read_text()
    assert process.returncode != 0
    assert "SIGKILL" in out or "Signal 9" in out
    wait_for(lambda: not any(map(exists, ranks)))


def test_ranks_save_and_end_when_torchrun_is_killed(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = start(tmp_path / "run", "--num-workers=0", launcher=launcher)
    ranks = children(process.pid)
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(exists, ranks)))
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] > 0


# ---------------------------------------------------------------------------------------
# Images that cannot be read
# ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [0, 2])
def test_skip_corrupt_leaves_out_and_reports(workers, tmp_path, capsys):
    for split, count, bad in (("train", 9, (2, 3)), ("val", 10, range(8))):  # none for samples
        (tmp_path / split).mkdir()
        for i in range(count):
            path = tmp_path / split / f"{i}.png"
            save_image(SyntheticDataset(16, 0, 9)[i] / 255, path)
            if i in bad:
                path.write_bytes(path.read_bytes()[:50])
    data = [f"--{split}-data-path={tmp_path / split}" for split in ("train", "val")]
    flags = [*data, f"--num-workers={workers}", "--max-train-epochs=2"]
    with pytest.raises(ValueError, match=r"cannot read image .*\.png"):
        run(tmp_path / "stops", *data)
    # The run that was stopped can go on as its message says.
    assert run(tmp_path / "stops", *flags, "--resume=auto", "--skip-corrupt")["images"] == 2
    results = run(tmp_path / "skips", *flags, "--skip-corrupt")
    wanted = [tmp_path / "train" / f"{i}.png" for i in (2, 3)]
    wanted += [tmp_path / "val" / f"{i}.png" for i in range(8)]
    assert results["skipped_images"] == [str(path) for path in wanted]
    assert results["images"] == 2
    assert any((tmp_path / "skips" / "samples").iterdir())
    assert capsys.readouterr().out.count("10 images skipped") == 2


def test_a_resumed_run_knows_what_was_skipped_before(whole, tmp_path):
    folder = Path(shutil.copytree(whole(), tmp_path / "run"))
    (folder / "last.pt").unlink()
    for checkpoint in folder.glob("step_*.pt"):
        saved = load_checkpoint(checkpoint)
        assert saved["skipped_images"] == []
        save_checkpoint(checkpoint, {**saved, "skipped_images": ["early.png"]})
    assert run(folder, "--resume=auto")["skipped_images"] == ["early.png"]


@pytest.mark.parametrize("count", [0, 1])
def test_no_image_and_one_image(count, tmp_path):
    (tmp_path / "images").mkdir()
    if count:
        save_image(SyntheticDataset(16, 0, 1)[0] / 255, tmp_path / "images" / "0.png")
        flags = [f"--{split}-data-path={tmp_path / 'images'}" for split in ("train", "val")]
        assert run(tmp_path / "run", *flags, "--batch-size=1")["images"] == 1
    else:
        with pytest.raises(ValueError, match="images"):
            run(tmp_path / "run", f"--train-data-path={tmp_path / 'images'}")
        assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------
# Numbers that are not finite
# ---------------------------------------------------------------------------------------
def poison(monkeypatch, steps, what: str):
    """Make the loss, or only the gradient, infinite or NaN in these steps."""
    forward, calls = TrainingLoss.forward, iter(range(1, 10**6))

    def poisoned(self, images, reconstruction, quantizer_loss):
        bad = next(calls) in steps
        if bad and what == "gradient":
            reconstruction = reconstruction + 0 * (reconstruction - reconstruction.detach()).sqrt()
        terms = forward(self, images, reconstruction, quantizer_loss)
        if bad and what == "loss":
            terms["loss"], terms["l1"] = terms["loss"] * torch.inf, terms["l1"] * torch.inf
        return terms

    monkeypatch.setattr(TrainingLoss, "forward", poisoned)


def all_finite(run: Path) -> int:
    """The number of a run's checkpoints; fails if one holds a number that is not finite."""

    def finite(value) -> bool:
        if isinstance(value, dict):
            return all(map(finite, value.values()))
        return not isinstance(value, torch.Tensor) or bool(value.isfinite().all())

    checkpoints = [torch.load(path, weights_only=True) for path in run.glob("*.pt")]
    assert all(finite(checkpoint) for checkpoint in checkpoints)
    assert "NaN" not in (run / "metrics.jsonl").read_text()
    return len(checkpoints)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_bad_step_is_skipped_and_counted(what, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {1, 4, 5}, what)
    results = run(tmp_path / "run")
    assert results["skipped_steps"] == 3
    assert "3 steps skipped" in capsys.readouterr().out
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(record.get("loss", 0) < 10 for record in map(json.loads, lines))
    assert all_finite(tmp_path / "run") == 4


def test_a_skipped_step_leaves_the_weights_alone(tmp_path, monkeypatch):
    poison(monkeypatch, set(range(2, 10**6)), "loss")
    flags = ["--max-skipped-steps=100", "--save-interval=1", "--keep=9", "--train-iters=3"]
    run(tmp_path / "run", *flags)
    one, two = (load_checkpoint(tmp_path / "run" / f"step_000000{i}.pt") for i in (1, 3))
    weights = [name for name in one["model"] if not name.startswith("quantizer")]
    assert all(torch.equal(one["model"][name], two["model"][name]) for name in weights)
    state = [list(c["optimizer"]["state"].values()) for c in (one, two)]
    assert same(*state)


def test_too_many_bad_steps_stop_the_run(tmp_path, monkeypatch):
    poison(monkeypatch, set(range(8, 10**6)), "loss")
    with pytest.raises(ValueError) as caught:
        run(tmp_path / "run", "--max-skipped-steps=4")
    message = str(caught.value)
    assert message.startswith("step 12: 5 steps in a row were not finite in loss, l1, grad_norm:")
    assert "\n" not in message and "--lr (now 0.01)" in message
    assert message.endswith(f"last good checkpoint: {tmp_path / 'run' / 'step_0000010.pt'}")
    assert all_finite(tmp_path / "run") == 4
    with pytest.raises(ValueError, match=r"step 3: 3 steps .* no checkpoint yet"):
        poison(monkeypatch, set(range(1, 10**6)), "gradient")
        run(tmp_path / "new", "--max-skipped-steps=2")


@pytest.mark.parametrize("flags", (QUANTIZERS | OTHERS).values(), ids=(QUANTIZERS | OTHERS).keys())
def test_bad_numbers_in_one_of_two_processes_reach_no_checkpoint(flags, tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.SYNTHETIC_VAL", 1)  # fewer images than processes
    made = []

    def work(rank: int) -> None:
        latent, calls = VQVAE.to_latent, iter(range(1, 10**6))

        def latent_or_not(model, images):
            z = latent(model, images)
            if rank == 1 and model.training and (step := next(calls)) in (1, 4, 5, 6):
                # Infinity is the outermost code of a bounded quantizer, and no bad step then.
                z = z.index_fill(0, torch.tensor([0]), float("inf" if step == 6 else "nan"))
            return z

        VQVAE.to_latent = latent_or_not
        train.VQVAE = lambda args: made.append(VQVAE(args)) or made[-1]
        steps = ["--train-iters=7", "--save-interval=1", "--eval-interval=1", "--keep=9"]
        assert run(tmp_path / "run", *flags, *steps)["skipped_steps"] in (3, 4)
        torch.save(made[0].state_dict(), tmp_path / f"{rank}.pt")

    assert fork_group(2, work, tmp_path / "out") == [0, 0], (tmp_path / "out").read_text()
    assert all_finite(tmp_path / "run") == 9
    assert same(*(torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)))


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--lr=1e39"], r"step 5: model \S+ is not finite"),
        (["--lr=1e30"], r"step 5: the reconstructions are not finite"),
        (["--lr=1e39", "--max-skipped-steps=2"], r"step 3: 2 steps in a row were not finite in lo"),
    ],
)
def test_a_learning_rate_that_breaks_the_weights(flags, says, tmp_path):
    """Loss and gradient of the first step are finite, and what the step makes is not."""
    with pytest.raises(ValueError, match=says + ".*no checkpoint yet") as caught:
        run(tmp_path / "run", *flags)
    assert "\n" not in str(caught.value)
    assert all_finite(tmp_path / "run") == 0


def test_broken_weights_are_not_saved_at_a_signal(tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 2)
    with pytest.raises(ValueError, match=r"step 2: model \S+ is not finite"):
        run(tmp_path / "run", "--lr=1e39")
    assert all_finite(tmp_path / "run") == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_and_codebooks_stay_finite(value):
    for quantizer in (RFSQ(2), VectorQuantizeEMA(16, 4, stages=2)):
        good = torch.randn(4, 4, 4, 4)
        quantizer(good)
        before = {name: b.clone() for name, b in quantizer.named_buffers() if name != "batches"}
        quantizer(torch.where(good > 1, value, good))
        for name, buffer in quantizer.named_buffers():
            assert buffer.isfinite().all(), name
            if "running" in name:
                assert torch.equal(buffer, before[name])


# ---------------------------------------------------------------------------------------
# What is there already
# ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["results.json", "metrics.jsonl", "samples/step_0000001.png"])
def test_files_of_others_are_not_replaced(name, tmp_path):
    (tmp_path / "mine" / "samples").mkdir(parents=True)
    (tmp_path / "mine" / name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds {Path(name).name} but no args.json"):
        run(tmp_path / "mine", "--train-iters=1")
    assert (tmp_path / "mine" / name).read_text() == "mine"


def test_results_of_a_run_without_its_checkpoints_stay(tmp_path):
    run(tmp_path / "run", "--train-iters=1")
    for path in (tmp_path / "run").glob("*.pt"):
        path.unlink()
    with pytest.raises(ValueError, match=r"checkpoints are gone.*--overwrite"):
        run(tmp_path / "run", "--train-iters=1", "--resume=auto")
    assert (tmp_path / "run" / "results.json").exists()
    assert run(tmp_path / "run", "--train-iters=1", "--resume=auto", "--overwrite")["steps"] == 1


@pytest.mark.parametrize("left", ["metrics.jsonl", "samples/step_0000001.png"])
def test_what_is_left_of_a_run_without_its_checkpoints_stays(left, tmp_path):
    folder = tmp_path / "run"
    run(folder, "--train-iters=1")
    for path in [*folder.glob("*.*"), *folder.glob("samples/*")]:
        if path not in (folder / "args.json", folder / left):
            path.unlink()
    content = (folder / left).read_bytes()
    with pytest.raises(ValueError, match=r"checkpoints are gone.*--overwrite"):
        run(folder, "--train-iters=1", "--resume=auto")
    assert (folder / left).read_bytes() == content
    assert run(folder, "--train-iters=1", "--resume=auto", "--overwrite")["steps"] == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"model": "gan"}', r"args\.json is not of a run that can begin again \(it lacks flags"),
        ("[]", "it lacks flags of train.py"),
        ("{", "is not of a run that can begin again"),
        (
            '{"quantizer": "fsq", "train_data_path": "synthetic"}',
            "--quantizer fsq there, rfsq here",
        ),
        ('{"quantizer": "gan", "train_data_path": "x"}', "is not of a run that can begin again"),
    ],
)
def test_auto_takes_no_folder_of_others(content, said, tmp_path):
    """An args.json alone does not make a folder one in which a run may begin again."""
    mine = {"args.json": content, "metrics.jsonl": '{"epoch": 1, "fid": 3.2}\n'}
    (tmp_path / "mine").mkdir()
    for name, text in mine.items():
        (tmp_path / "mine" / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        run(tmp_path / "mine", "--train-iters=1", "--resume=auto")
    assert {name: (tmp_path / "mine" / name).read_text() for name in mine} == mine


def test_auto_begins_again_what_ended_before_its_first_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(train.Training, "fit", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "run", "--train-iters=2")
    with pytest.raises(ValueError, match=r"another run, without a checkpoint: --seed 0 there, 1"):
        run(tmp_path / "run", "--train-iters=2", "--resume=auto", "--seed=1")
    assert run(tmp_path / "run", "--train-iters=1", "--resume=auto")["steps"] == 1


def test_a_branch_in_another_folder_is_refused(tmp_path):
    flags = ["--train-iters=2", "--save-interval=1", "--keep=2"]
    run(tmp_path / "run", *flags)
    first = tmp_path / "run" / "step_0000001.pt"
    with pytest.raises(ValueError, match=r"continues the run in .*--load"):
        run(tmp_path / "branch", *flags, f"--resume={first}")
    assert (tmp_path / "run" / "step_0000002.pt").exists()


def test_going_back_to_best_makes_it_the_last(tmp_path, monkeypatch):
    """Its step file is gone; the newer last.pt must not take its place, nor the old results."""
    flags = ["--train-iters=4", "--save-interval=2", "--keep=1"]
    run(tmp_path / "run", *flags)
    folder = tmp_path / "run"
    saved = load_checkpoint(folder / "last.pt")
    save_checkpoint(folder / "best.pt", {**saved, "step": 2})
    monkeypatch.setattr(train.Training, "fit", lambda self: 1 / 0)  # killed at once
    with pytest.raises(ZeroDivisionError):
        run(folder, *flags, f"--resume={folder / 'best.pt'}")
    assert load_checkpoint(folder / "last.pt")["step"] == 2
    assert not (folder / "results.json").exists()
    assert json.loads((folder / "results_0000004.json").read_text())["steps"] == 4
    assert (folder / "results_0000004.txt").exists()


def test_going_back_says_what_it_discards_and_leaves_no_best_of_it(tmp_path, capsys):
    flags = ["--save-interval=2", "--eval-interval=2", "--keep=9"]
    folder = tmp_path / "run"
    run(folder, *flags, "--train-iters=6")
    saved = load_checkpoint(folder / "step_0000006.pt")
    save_checkpoint(folder / "best.pt", {**saved, "best_psnr": 99.0})
    resume = f"--resume={folder / 'step_0000002.pt'}"
    again = run(folder, *flags, "--train-iters=4", resume)
    said = capsys.readouterr().out
    assert "after step 2: step_0000004.pt, step_0000006.pt, best.pt" in said
    best = load_checkpoint(folder / "best.pt")
    assert best["step"] == 4 and [v["step"] for v in again["validations"]] == [2, 4]
    # A run that goes on after its end keeps the results that it had.
    assert run(folder, *flags, "--train-iters=6", "--resume=auto")["steps"] == 6
    assert json.loads((folder / "results_0000004.json").read_text())["psnr"] == again["psnr"]
    mine = [folder / name for name in ("results.csv", "results_mine.json", "results_20261129.txt")]
    for path in mine:
        path.write_text("mine")
    run(folder, *flags, "--train-iters=2", "--overwrite")
    assert sorted(folder.glob("results_*")) == sorted(mine[1:])
    assert all(path.read_text() == "mine" for path in mine)


@pytest.mark.parametrize("steps", [None, [1], {}, "../../x", -5])
def test_damaged_results_do_not_keep_a_run_from_going_on(steps, tmp_path):
    folder = tmp_path / "run"
    run(folder, "--train-iters=1")
    (folder / "results.json").write_text(json.dumps({"steps": steps}))
    run(folder, "--train-iters=2", "--resume=auto")
    assert json.loads((folder / "results_0000000.json").read_text()) == {"steps": steps}


@pytest.mark.parametrize(
    "change",
    [
        {"segments": [2**62]},
        {"segments": [{"first_step": torch.zeros(1)}]},
        {"interval_seconds": math.nan},
        {"step": "2"},
        {"step": -1},
    ],
    ids=str,
)
def test_a_state_that_train_py_does_not_write_is_refused(change, tmp_path):
    folder = tmp_path / "run"
    run(folder, "--train-iters=1")
    (folder / "best.pt").unlink()
    for path in folder.glob("*.pt"):
        save_checkpoint(path, {**load_checkpoint(path), **change})
    with pytest.raises(ValueError, match=r"holds no training state|all checkpoints are damaged"):
        run(folder, "--train-iters=2", "--resume=auto")


def test_the_precision_of_a_run_is_the_one_it_had_and_not_its_flag(tmp_path):
    run(tmp_path / "run", "--train-iters=2")
    more = ["--train-iters=3", "--resume=auto"]
    with pytest.raises(ValueError, match="--precision fp32 there, bf16 here"):
        run(tmp_path / "run", *more, "--precision=bf16")
    assert run(tmp_path / "run", *more, "--precision=fp32")["steps"] == 3
