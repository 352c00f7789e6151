"""Processes of a group, with their shares of a batch, do what one does with the whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import DEADLINE, GROUP_OF_ONE
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import exits
import quantizers
from arguments import get_args
from model import VQVAE
from quantizers.functional import in_group as grouped

ROOT = Path(__file__).resolve().parent.parent
STEPS, BATCH = 4, 8

# name: (class, arguments); a decay of 0.5 and a threshold of 0.9 restart codes in every step.
QUANTIZERS = {
    "rfsq-none": ("RFSQ", {"strategy": "none"}),
    "rfsq-scale": ("RFSQ", {"strategy": "scale"}),
    "rfsq-layernorm": ("RFSQ", {"stages": 4, "momentum": 0.4}),
    "rfsq-image": ("RFSQ", {"statistics": "image"}),
    "rfsq-geometric": ("GeometricRFSQ", {"momentum": 0.4}),
    "lfq": ("LFQ", {"dim": 7, "entropy_loss_weight": 1.0}),
    "lfq-groups": ("LFQ", {"dim": 6, "entropy_loss_weight": 1.0, "entropy_groups": 3}),
    "svq": ("SVQ", {"bits": 12, "dim": 5, "classes": 4, "stages": 2, "momentum": 0.4}),
    "ema": ("VectorQuantizeEMA", {"codebook_size": 16, "dim": 4, "decay": 0.5}),
    "ema-restart": (
        "VectorQuantizeEMA",
        {"codebook_size": 40, "dim": 4, "decay": 0.5, "stages": 2, "restart_threshold": 0.9},
    ),
    "ema-no-restart": (
        "VectorQuantizeEMA",
        {"codebook_size": 16, "dim": 4, "stages": 2, "restart_threshold": 0},
    ),
}
# Without SVQ, whose code lengths are rounded to integers: in one process too, latents that differ
# by a factor of 1 + 1e-7 lead to weights that differ by 2e-3 after three steps.
MODELS = {
    "fsq": ["--quantizer", "fsq"],
    "rfsq-none": ["--rfsq-strategy", "none"],
    "rfsq-layernorm": [],
    "rfsq-image": ["--rfsq-statistics", "image"],
    "rfsq-scale": ["--rfsq-strategy", "scale"],
    "rfsq-geometric": ["--rfsq-strategy", "geometric", "--network", "dct"],
    "lfq": ["--quantizer", "lfq", "--lfq-dim", "6"],
    "ema": ["--quantizer", "ema", "--n-embed", "24", "--embed-dim", "4", "--ema-stages", "2"],
}


def train_quantizer(name, rank, world):
    """Steps of a linear layer before the quantizer: (losses, gradients, buffers)."""
    torch.manual_seed(7)
    kind, kwargs = QUANTIZERS[name]
    quantizer = getattr(quantizers, kind)(**kwargs)
    net = nn.Sequential(nn.Conv1d(3, quantizer.dim, 1), quantizer)
    batches = [2 * torch.randn(BATCH, 3, 6) + 0.3 * step for step in range(STEPS)]
    targets = torch.randn(STEPS, BATCH, quantizer.dim, 6)
    model = DistributedDataParallel(net, broadcast_buffers=False) if grouped() else net
    losses, gradients = [], []
    for batch, target in zip(batches, targets, strict=True):
        mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        quantized, _, *rest = model(batch[mine])
        own = rest[0] if rest else quantized.new_zeros(())
        net.zero_grad()
        ((quantized - target[mine]).square().mean() + own).backward()
        losses.append(own.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]).clone())
    return {"loss": torch.stack(losses), "gradient": torch.stack(gradients)} | {
        key: value.clone() for key, value in quantizer.named_buffers()
    }


def train_model(name, rank, world):
    """Three steps of a small VQVAE; its parameters and buffers afterwards."""
    torch.manual_seed(11)
    model = VQVAE(get_args(["--channel", "8", "--img-size", "16", *MODELS[name]]))
    images = torch.randn(3, BATCH, 3, 16, 16)
    step_model = DistributedDataParallel(model, broadcast_buffers=False) if grouped() else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch in images:
        mine = batch[rank * BATCH // world : (rank + 1) * BATCH // world]
        reconstruction, _, loss = step_model(mine)
        optimizer.zero_grad()
        ((reconstruction - mine).abs().mean() + loss).backward()
        optimizer.step()
    return {key: value.clone() for key, value in model.state_dict().items()}


def train_on_unequal_parts(rank, world):
    """The codebook of a VQ whose processes have unequal numbers of tokens."""
    torch.manual_seed(13)
    vq = quantizers.VectorQuantizeEMA(16, 4, stages=2, decay=0.5, restart_threshold=0.8)
    for tokens in torch.randn(6, 1, 4, 48) + 5:
        sizes = {1: [48], 2: [37, 11], 4: [20, 3, 11, 14]}[world]
        vq(tokens.split(sizes, -1)[rank])
    return vq.codebook.clone()


def everything(rank=0, world=1):
    return {
        "unequal": train_on_unequal_parts(rank, world),
        "quantizers": {name: train_quantizer(name, rank, world) for name in QUANTIZERS},
        "models": {name: train_model(name, rank, world) for name in MODELS},
    }


def process(rank: int, world: int, folder: Path) -> None:
    """One process of a group, with its results in a file."""
    place = f"file://{folder / 'init'}"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=world)
    torch.save(everything(rank, world), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one_process():
    return everything()


@pytest.fixture(scope="module", params=[1, 2, 4])
def results(request, one_process, tmp_path_factory):
    """The results without a group, and of each process of a group of one, two or four."""
    folder, world = tmp_path_factory.mktemp("processes"), request.param
    # Forked: nothing is imported again, which takes longer than the work.
    torch.multiprocessing.start_processes(
        process, (world, folder), nprocs=world, start_method="fork"
    )
    files = [folder / f"{rank}.pt" for rank in range(world)]
    return one_process, [torch.load(file, weights_only=True) for file in files]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_statistics_and_gradients_of_several_processes(results, name):
    one, several = results
    wanted, (first, *others) = one["quantizers"][name], (r["quantizers"][name] for r in several)
    for key, value in wanted.items():
        if key == "loss":  # each process's own part: their mean is the loss of the whole batch
            mean = sum((other[key] for other in others), first[key]) / len(several)
            torch.testing.assert_close(mean, value, rtol=1e-5, atol=1e-5)
            continue
        assert all(torch.equal(first[key], other[key]) for other in others), key
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")
    assert wanted["gradient"].abs().max() > 1e-2


def test_a_codebook_of_processes_with_unequal_numbers_of_tokens(results):
    one, (first, *others) = results[0]["unequal"], (r["unequal"] for r in results[1])
    assert all(torch.equal(first, other) for other in others)
    torch.testing.assert_close(first, one, rtol=1e-4, atol=1e-4)


def test_the_statistics_compared_are_not_those_of_the_start(results):
    wanted = results[0]["quantizers"]
    assert wanted["rfsq-layernorm"]["running_mean"].abs().min() > 0
    assert wanted["rfsq-layernorm"]["batches"] == STEPS
    for name in ("ema", "ema-restart", "ema-no-restart"):
        assert wanted[name]["sums"].abs().max() > 0.1
        assert wanted[name]["batches"] == STEPS
    # Each process sees tokens of the other's codes only through the sums.
    first, *others = (result["quantizers"]["lfq"]["loss"] for result in results[1])
    assert not any(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trained_by_several_processes(results, name):
    one, several = results
    wanted, (first, *others) = one["models"][name], (r["models"][name] for r in several)
    torch.manual_seed(11)
    start = VQVAE(get_args(["--channel", "8", "--img-size", "16", *MODELS[name]])).state_dict()
    for key, value in wanted.items():
        assert all(torch.equal(first[key], other[key]) for other in others), key
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")
    assert not torch.equal(wanted["encoder.layers.0.weight"], start["encoder.layers.0.weight"])


IN_A_GROUP = """
import atexit, exits, time, torch, util

def main(step):
    util.setup_processes()
    model = util.data_parallel(torch.nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    atexit.register(print, "Python has ended")
    print("done")
    step()

def stop():
    raise exits.Interrupted("stopped")

def fail(error):
    # As NCCL does where the others wait for this process.
    torch.distributed.destroy_process_group = lambda: time.sleep(1000)
    raise error
"""


@pytest.mark.parametrize("step, code", [("list", 0), ("stop", exits.EXIT_INTERRUPTED)])
def test_a_process_of_a_group_ends_without_the_end_of_python(step, code):
    """In it a thread that frees the tensor of the last collective aborts the process."""
    script = subprocess.run(
        [sys.executable, "-c", f"{IN_A_GROUP}\nexits.run_script(lambda: main({step}))"],
        **dict(cwd=ROOT, env=os.environ | GROUP_OF_ONE, capture_output=True, text=True),
    )
    assert script.returncode == code, script.stderr
    assert script.stdout.split() == ["done"] + ["stopped"] * (step == "stop")


@pytest.mark.parametrize(
    "error, code, last",
    [
        ("ValueError('damaged')", 2, "-c: error: damaged"),
        ("AssertionError('a fault')", 1, "AssertionError: a fault"),
        ("torch.OutOfMemoryError('CUDA')", 2, "-c: error: the memory of the GPU is full"),
    ],
)
def test_an_error_of_one_process_ends_it_without_waiting_for_the_others(error, code, last):
    command = f"exits.run_script(lambda: main(lambda: fail({error})))"
    script = subprocess.run(
        [sys.executable, "-c", f"{IN_A_GROUP}\n{command}"],
        **dict(
            cwd=ROOT,
            env=os.environ | GROUP_OF_ONE,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        ),
    )
    assert script.returncode == code and script.stdout == "done\n"
    assert last in script.stderr.splitlines()[-1]
    assert ("Traceback" in script.stderr) == (code == 1)
