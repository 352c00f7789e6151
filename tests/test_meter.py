"""The means and the speed of an interval of training."""

import time

import pytest
import torch

import meter
from checkpoint import NotFinite


def test_the_speed_counts_the_work_that_is_still_queued(monkeypatch):
    """On a GPU the sums arrive only when its steps are done: that time is of the interval."""
    cat = torch.cat

    def slow_cat(tensors):
        time.sleep(0.2)
        return cat(tensors)

    monkeypatch.setattr(meter.torch, "cat", slow_cat)
    interval = meter.Meter(torch.device("cpu"))
    for loss in (1.0, 3.0):
        interval.update({"loss": torch.tensor(loss)}, torch.tensor(0.0))
    means, steps_per_s = interval.compute(max_skipped=10)
    assert means == {"loss": 2.0} and 0 < steps_per_s <= 2 / 0.2
    assert interval.count == 0


def test_skipped_steps_are_in_no_mean_but_in_the_speed():
    interval = meter.Meter(torch.device("cpu"))
    interval.update({"loss": torch.tensor(1.0)}, torch.tensor(0.0))
    interval.update({"loss": torch.tensor(torch.inf)}, torch.tensor(1.0))
    interval.start = time.perf_counter() - 4
    means, steps_per_s = interval.compute(max_skipped=10)
    assert means == {"loss": 1.0, "skipped_steps": 1} and 0 < steps_per_s <= 0.5


def test_only_skipped_steps_in_a_row_stop_the_run():
    interval = meter.Meter(torch.device("cpu"))
    loss = {"loss": torch.tensor(1.0)}
    for bad in (1.0, 1.0, 0.0, 1.0, 1.0):
        interval.update(loss, torch.tensor(bad))
    assert interval.compute(max_skipped=3)[0] == {"loss": 1.0, "skipped_steps": 4}
    interval.update(loss, torch.tensor(1.0))
    with pytest.raises(NotFinite, match="3 steps in a row"):
        interval.compute(max_skipped=3)


def test_a_pause_is_no_part_of_the_interval(monkeypatch):
    now = 100.0
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now)
    interval = meter.Meter(torch.device("cpu"))
    now += 2
    with interval.paused():
        now += 50
    now += 3
    assert interval.seconds() == 5


def test_a_resumed_interval_knows_what_was_skipped_before():
    before, after = (meter.Meter(torch.device("cpu")) for _ in range(2))
    loss = {"loss": torch.tensor(1.0)}
    for bad in (0.0, 1.0, 1.0):
        before.update(loss, torch.tensor(bad))
    after.resume(before.gathered_sums(), before.count, before.seconds(), before.skipped)
    after.update(loss, torch.tensor(1.0))
    assert after.skipped.tolist() == [3, 3] and after.count == 4
    with pytest.raises(NotFinite, match="3 steps in a row"):
        after.compute(max_skipped=3)
