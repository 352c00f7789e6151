"""Processes, devices, seeds, checkpoints, and how a script ends."""

from __future__ import annotations

import json
import os
import platform
import random
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

CHECKPOINT_FORMAT = 1


# ---------------------------------------------------------------------------------------
# Processes and devices
# ---------------------------------------------------------------------------------------
def setup_processes() -> torch.device:
    """Join the process group if `torchrun` started this process, and return the device to use.

    CUDA (the GPU of LOCAL_RANK) where there is one, else the CPU.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return torch.device(device)


def share_cores(num_workers: int) -> None:
    """On a CPU, leave a core to each loading process.

    Compute threads wait for each other in a loop: with more of them than free cores a step takes
    several times as long. OMP_NUM_THREADS, where it is set, decides instead.
    """
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        cores = cpu_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, cores - num_workers))


def set_float32_precision(precision: str) -> None:
    """How GPUs multiply float32 matrices: `ieee`, or `tf32`, faster with a 10-bit mantissa."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def peak_memory_mib(device: torch.device) -> int:
    """The most memory that this process has held: on the GPU, or in all on a CPU, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)


def cpu_cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rank() -> int:
    """This process's number, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def from_main(value):
    """The main process's `value`, in every process (plain types only)."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# ---------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------
def write_whole(path: Path, write: Callable) -> None:
    """Write a file whole or not at all: `write(binary file)` to a temporary one, then rename."""
    path = Path(path)
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def write_json(path: Path, value) -> None:
    """Write `value` as readable JSON, whole or not at all."""
    text = json.dumps(value, indent=2) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint (tensors and plain types alone), whole or not at all."""
    write_whole(path, lambda file: torch.save({"format": CHECKPOINT_FORMAT, **state}, file))


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint onto the CPU. Reading never executes anything from the file.

    Raises:
        ValueError: one line, if there is no such file or it is no checkpoint of this project.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"checkpoint {path} {found}: give a file such as runs/NAME/last.pt")
    wrong = f"{path} is not a checkpoint of this project, or is damaged: give a last.pt or best.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling garbage can raise nearly anything
        raise ValueError(wrong) from error
    if not isinstance(state, dict) or not {"format", "model", "args"} <= state.keys():
        raise ValueError(wrong)
    if state["format"] != CHECKPOINT_FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {state['format']}, this version reads "
            f"{CHECKPOINT_FORMAT}: use the version of the project that wrote it"
        )
    return state


def environment(device: torch.device) -> dict:
    """Where a run's numbers come from: command, commit, versions, hardware."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
    )
    cuda = device.type == "cuda"
    return {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "commit": commit.stdout.strip() + (" (changed)" if changed.stdout.strip() else ""),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "lpips", "numpy")},
        "device": torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "processes": world_size(),
    }


# ---------------------------------------------------------------------------------------
# How a script ends
# ---------------------------------------------------------------------------------------
def one_line(error: BaseException) -> str:
    """The message of an error in one line, also when it comes from a DataLoader's worker."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # The last line of a worker's traceback is "package.TypeOfError: message".
    return lines[0] if len(lines) == 1 else re.sub(r"^[\w.]+: ", "", lines[-1].strip())


def run_script(main: Callable) -> None:
    """Run a script's `main`: bad input ends it with one line on standard error and code 2."""
    try:
        main()
    except ValueError as error:
        print(f"{Path(sys.argv[0]).name}: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
