"""scripts/gpu_check.py at toy size: its parts, what it leaves on disk, and that it goes on."""

from __future__ import annotations

import json

import pytest
import torch

import exits
from scripts import gpu_check


def toy(out, *flags):
    gpu_check.main(["--toy", f"--out={out}", *flags])


def record(out, part):
    return json.loads((out / f"{part}.json").read_text())


@pytest.mark.slow
def test_a_part_is_run_once_and_written_with_its_environment(tmp_path, capsys, monkeypatch):
    toy(tmp_path, "--only", "train")
    found = record(tmp_path, "train")
    assert found["state"] == "done" and found["toy"] and found["environment"]["torch"]
    row = found["rows"][0]
    assert row["steps"] == 6 and row["images_seen"] == 24 and row["images/s"] > 0
    assert f"{row['psnr']:.4g}" in capsys.readouterr().out
    # A second call only prints.
    monkeypatch.setattr(gpu_check.Check, "call", None)
    toy(tmp_path, "--only", "train")
    assert "train: done" in capsys.readouterr().out


def test_the_tests_part_counts_what_was_skipped(tmp_path):
    toy(tmp_path, "--only", "tests")
    row = record(tmp_path, "tests")["rows"][0]
    assert row["tests"] > 50 and row["failures"] == row["errors"] == 0


def test_a_part_that_fails_is_written_and_run_again(tmp_path, monkeypatch, capsys):
    calls = []

    def call(self, *command):
        calls.append(command)
        raise RuntimeError("exit code 1: out of memory")

    monkeypatch.setattr(gpu_check.Check, "call", call)
    for count in (1, 2):
        with pytest.raises(SystemExit) as caught:
            toy(tmp_path, "--only", "quantizers", "torchrun")
        assert caught.value.code == 1 and len(calls) == 2 * count
    assert "out of memory" in record(tmp_path, "torchrun")["error"]
    assert "out of memory" in record(tmp_path, "all")["torchrun"]["error"]
    assert "quantizers: exit code 1: out of memory" in capsys.readouterr().out


def test_what_was_done_at_toy_size_or_elsewhere_is_not_done(tmp_path):
    args = gpu_check.get_flags(["--toy", f"--out={tmp_path}"])
    check = gpu_check.Check(args)
    here = {"state": "done", "toy": True, "environment": check.environment, "data": check.data}
    for changes, done in (
        ({}, True),
        ({"toy": False}, False),
        ({"environment": {**check.environment, "device": "another"}}, False),
        ({"environment": {**check.environment, "commit": "another"}}, False),
        ({"data": [*check.data[:-1], "--val-data-path=/another"]}, False),
        ({"state": "failed"}, False),
    ):
        (tmp_path / "step.json").write_text(json.dumps({**here, **changes}))
        assert check.done("step") is done


def test_a_script_that_fails_or_takes_too_long(tmp_path):
    check = gpu_check.Check(gpu_check.get_flags(["--toy", f"--out={tmp_path}"]))
    check.part = "step"
    check.call("-c", "print(1)")
    with pytest.raises(RuntimeError, match=r"exit code 2: nowhere is missing \(more in .*step.log"):
        check.call("-c", "import sys; print('nowhere is missing', file=sys.stderr); sys.exit(2)")
    check.ends = 0
    with pytest.raises(TimeoutError, match="stopped after 9 minutes"):
        check.call("-c", "import time; time.sleep(60)")
    assert (tmp_path / "step.log").read_text().splitlines()[:2] == ["$ -c print(1)", "1"]


def test_flags_of_training_follow_those_of_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--toy", "--lpips-net=none", "--train-data-path=images", f"--out={tmp_path}"]
    args = gpu_check.get_flags(flags)
    args.toy = False
    check = gpu_check.Check(args)
    assert "--perceptual-weight=0" in check.data
    assert f"--train-data-path={tmp_path}/images" in check.data  # not of the checkout
    assert "--val-data-path=synthetic" in check.data
    with pytest.raises(RuntimeError, match="needs the part train"):
        check.long("2x2048", 0.5)
    (tmp_path / "train.json").write_text(
        json.dumps(
            {"state": "done", "toy": False, "environment": check.environment}
            | {"data": check.data, "rows": [{"images/s": 1280.0, "other s": 30.0}]}
        )
    )
    calls = []
    monkeypatch.setattr(check, "train", lambda name, *flags: calls.append(flags) or {})
    check.long("2x2048", 0.5)
    (steps,) = (int(flag.split("=")[1]) for flag in calls[0] if "--train-iters" in flag)
    assert 1500 < steps < 10 * 0.5 * 9 * 60
    assert {f"--eval-interval={steps}", f"--save-interval={steps}"} <= set(calls[0])


def test_every_part_is_explained():
    for part in gpu_check.PARTS:
        assert f"\n{part} " in (gpu_check.__doc__ or "")


@pytest.mark.parametrize("flags", [[], ["--only=tests"]], ids=str)
def test_without_a_gpu_it_says_so(flags, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "DEVICE", torch.device("cpu"))
    with pytest.raises(SystemExit) as caught:
        exits.run_script(lambda: gpu_check.main(flags))
    assert caught.value.code == 2 and "--toy" in capsys.readouterr().err
