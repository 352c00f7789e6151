"""The state of a run in a checkpoint: written, read, and refused if it is damaged."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from checkpoint import random_states, restore_random_states
from run.state import RunState

SEGMENT = {"first_step": 1, "command": "python train.py", "commit": None, "device": "a CPU"}
STATE = RunState(
    step=5,
    best_psnr=-math.inf,
    seconds=2.0,
    interval_sums=torch.ones(1, 2, 3),
    interval_count=2,
    interval_seconds=0.5,
    skipped=torch.zeros(2),
    random={},
    threads=1,
    train_images=8,
    train_fingerprint={"names": "0a"},
    validation="0b",
    segments=[SEGMENT],
    skipped_images=["a.png"],
)


def test_the_state_is_read_as_it_was_written():
    saved = {"model": {}, "optimizer": {}, "args": {}, **STATE.state_dict()}
    assert vars(RunState.from_checkpoint(saved)) == vars(STATE)  # the same tensors


def test_older_checkpoints_lack_some_entries():
    saved = STATE.state_dict()
    for name in ("train_fingerprint", "validation", "segments", "skipped_images"):
        del saved[name]
    state = RunState.from_checkpoint(saved)
    assert (state.train_fingerprint, state.validation) == ({}, "")
    assert (state.segments, state.skipped_images) == ([], [])


def test_random_states_come_back():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    states = random_states()
    first = draw()
    assert not set(first) & set(draw())
    restore_random_states(states)
    assert draw() == first


@pytest.mark.parametrize("name", ["step", "best_psnr", "skipped", "random", "train_images"])
def test_a_missing_entry_is_named(name):
    saved = STATE.state_dict()
    del saved[name]
    with pytest.raises(ValueError, match=f"{name} is missing"):
        RunState.from_checkpoint(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"step": True},
        {"best_psnr": 20},
        {"validation": 5},
        {"seconds": -1.0},
        {"interval_seconds": math.nan},
        {"interval_sums": torch.zeros(())},
        {"skipped": torch.zeros(3)},
        {"segments": [{**SEGMENT, "commit": 5}]},
        {"segments": [5]},
        {"skipped_images": [5]},
    ],
    ids=str,
)
def test_an_entry_of_another_type_or_out_of_range_is_refused(change):
    with pytest.raises(ValueError):
        RunState.from_checkpoint({**STATE.state_dict(), **change})
