"""Processes, devices, seeds and hardware."""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import os
import platform
import random
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from quantizers.functional import in_group, rank
from quantizers.functional import processes as world_size

Result = TypeVar("Result")


# ---------------------------------------------------------------------------------------
# Processes and devices
# ---------------------------------------------------------------------------------------
def setup_processes() -> torch.device:
    """Join the process group if `torchrun` started this process, and return the device to use.

    CUDA (the GPU of LOCAL_RANK) where there is one, else the CPU.
    """
    cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local >= (gpus := torch.cuda.device_count()):
        processes = os.environ.get("LOCAL_WORLD_SIZE", local + 1)
        raise ValueError(f"{processes} processes, but {gpus} GPUs: give --nproc-per-node {gpus}")
    device = torch.device("cuda", local) if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        stop_with_parent(signal.SIGTERM)  # of torchrun
        # Objects go through gloo: through NCCL they would wait for the GPU. What one process does
        # alone, such as a download, may take longer than the ten minutes that NCCL waits.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return torch.device(device)


def data_parallel(module: nn.Module) -> DistributedDataParallel:
    """The module with its gradients averaged over processes, and its buffers left alone.

    The quantizers keep their own statistics equal in all processes.
    """
    # Compiled as one graph. It would be cut into parts whose gradients are sent while others are
    # computed; a few megabytes are not worth that.
    torch._dynamo.config.optimize_ddp = False
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(module, **{name: False})  # the second until torch 2.13


def training_precision(flag: str | None) -> str:
    """Precision of encoder, decoder and LPIPS: `flag`, or else bf16 on a GPU that has it."""
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return flag or ("bf16" if has_bf16 else "fp32")


def refuse_torchrun() -> None:
    """For a script that works alone.

    Raises:
        ValueError: torchrun has started several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("this script runs in one process: start it without torchrun")


def stop_with_parent(number: int) -> None:
    """On Linux, send this process the signal `number` when its parent ends or is killed."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)


def share_cores(num_workers: int) -> None:
    """On a CPU, leave a core to each loading process.

    Compute threads wait for each other in a loop: with more of them than free cores a step takes
    several times as long. OMP_NUM_THREADS, where it is set, decides instead.
    """
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores_of_process() - num_workers))


def set_float32_precision(precision: str) -> None:
    """How GPUs multiply float32 matrices: `ieee`, or `tf32`, faster with a 10-bit mantissa."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


@contextlib.contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    """Within `with`, or in a decorated function, as `set_float32_precision`; then as before."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    old, new = "allow_tf32", "fp32_precision"  # the names before torch 2.9, and since
    conv, rnn = getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None)
    before = []
    for part, name in ((matmul, old), (cudnn, old), (matmul, new), (conv, new), (rnn, new)):
        # PyTorch raises a RuntimeError when the old name is read after the new one was set.
        with contextlib.suppress(AttributeError, RuntimeError):
            before.append((part, name, getattr(part, name)))
    set_float32_precision(precision)
    try:
        yield
    finally:
        for part, name, value in before:
            setattr(part, name, value)


def peak_memory_mib(device: torch.device) -> int:
    """The most memory that this process has held: on the GPU, or in all on a CPU, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)


def cpu_cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_of_process() -> int:
    """The share of `cpu_cores` of each process that `torchrun` has started on this machine."""
    return max(1, cpu_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def default_workers() -> int:
    """Loading processes of a training process: half of its cores, and on a GPU all but two."""
    cores = cores_of_process()
    return min(16, max(1, cores - 2)) if torch.cuda.is_available() else max(1, min(8, cores // 2))


def on_main(function: Callable[[], Result]) -> Result:
    """Run `function` in the main process; all processes get its result, or raise its exception.

    A collective. The result consists of plain types and tensors.
    """
    if not in_group():
        return function()
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def from_all(value) -> list:
    """Every process's `value`, by rank: anything that pickle takes, tensors on the CPU.

    A collective.
    """
    if not in_group():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def environment(device: torch.device) -> dict:
    """Where a run's numbers come from: command, commit, versions, hardware.

    The commit is None outside a git checkout, and where git is not installed.
    """
    found = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "torchvision", "lpips", "numpy")},
        "device": f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "processes": world_size(),
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["compute_capability"] = list(torch.cuda.get_device_capability(device))
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


def _version(name: str) -> str | None:
    """The version of a package; None if it is not installed (lpips may be missing)."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit, changed = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + (" (changed)" if changed.strip() else "")


@contextlib.contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within `with`, all modules are in evaluation mode; afterwards each is as it was.

    Not by `model.eval()`, after which a frozen quantizer would be unfrozen to evaluation mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def profiler(steps: int, path: Path) -> Iterator[Callable[[], None]]:
    """Profile `steps` steps after the first ten into a trace file; yields what each step calls.

    Records the main process alone; nothing for 0 steps.
    """
    if not steps or rank():
        yield lambda: None
        return

    written = []

    def write(profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(path))
        written.append(path)
        print(f"profile: {path}", flush=True)

    schedule = torch.profiler.schedule(wait=8, warmup=2, active=steps, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profile:
        yield profile.step
    if not written:
        print("no profile: it needs more than ten steps", flush=True)
