"""--tensorboard: what a run writes for TensorBoard, alone and resumed."""

import sys
import time

import pytest

import train
from arguments import get_args
from run import RunFolder
from run.board import scalars

TINY = ["--train-data-path=synthetic", "--val-data-path=synthetic", "--channel=8", "--img-size=32"]
TINY += ["--batch-size=4", "--train-iters=4", "--log-interval=1", "--eval-interval=2", "--keep=9"]
TINY += ["--save-interval=1", "--perceptual-weight=0", "--num-workers=0"]


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr("dataset.SYNTHETIC_VAL", 2)


def events(folder):
    """Of each tag, what TensorBoard shows: {tag: [(step, value)]}; of pictures, the bytes."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    found = {tag: [(e.step, e.value) for e in shown.Scalars(tag)] for tag in shown.scalars.Keys()}
    pictures = [(e.step, e.encoded_image_string) for e in shown.Images("samples")]
    return {**found, "samples": pictures}


def logged(folder, kind, *keys):
    """The same of one number of metrics.jsonl."""
    pairs = []
    for record in RunFolder(folder).read_log():
        if record["kind"] == kind:
            value = record
            for key in keys:
                value = value[key]
            pairs.append((record["step"], pytest.approx(value, rel=1e-6)))
    return pairs


def test_numbers_of_a_record():
    record = {"step": 3, "loss": 0.5, "l1": None, "lpips_net": "vgg", "codes_in_batch": [7, 9]}
    record |= {"paper": {"psnr": 20.0}, "floors": {"bicubic": {"l1": 1.0}}}
    record |= {"stages": [{"stage": 1, "used": 5, "tokens": 8}, {"stage": 2, "used": 6}]}
    assert dict(scalars(record)) == {
        **{"loss": 0.5, "paper/psnr": 20.0, "codes_in_batch/1": 7, "codes_in_batch/2": 9},
        **{"stages/1/used": 5, "stages/2/used": 6},
    }


def check(folder, steps):
    """The events are the log: every number once, at the steps where it was logged."""
    found = events(folder)
    for tag, kind, *keys in (
        *[(f"train/{x}", "train", x) for x in ("loss", "l1", "lr", "grad_norm", "images_per_s")],
        *[(f"val/{x}", "val", x) for x in ("psnr", "ssim", "l1")],
        ("train/codes_in_batch/2", "train", "codes_in_batch", 1),
        ("val/stages/1/perplexity", "val", "stages", 0, "perplexity"),
    ):
        assert found[tag] == logged(folder, kind, *keys), tag
    assert [step for step, _ in found["train/loss"]] == steps
    pictures = [folder / "samples" / f"step_{step:07d}.png" for step, _ in found["samples"]]
    assert [step for step, _ in found["samples"]] == [step for step in steps if step % 2 == 0]
    assert all(path.is_file() for path in pictures) and found["samples"][0][1][1:4] == b"PNG"


def test_a_run_that_is_resumed_has_every_step_once(tmp_path):
    run = tmp_path / "run"
    flags = [*TINY, "--tensorboard", f"--save={run}"]
    train.main(flags)
    check(run, [1, 2, 3, 4])
    for resumed in (run / "step_0000003.pt", "auto"):  # in the middle, then at the end
        time.sleep(1.1)  # TensorBoard reads files in the order of the seconds in their names
        train.main([*flags, f"--resume={resumed}"])
        check(run, [1, 2, 3, 4])
    assert len(list(run.glob("events.*"))) == 3
    train.main([*flags, "--overwrite", "--train-iters=2"])
    check(run, [1, 2])
    assert len(list(run.glob("events.*"))) == 1


def test_nothing_is_imported_without_the_flag(tmp_path, monkeypatch, capsys):
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    run = tmp_path / "run"
    train.main([*TINY, f"--save={run}", "--train-iters=1"])
    assert not list(run.glob("events.*"))
    with pytest.raises(SystemExit):
        get_args(["--tensorboard"])
    assert "--tensorboard needs `pip install '.[tensorboard]'`" in capsys.readouterr().err
