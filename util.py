"""Processes, devices, seeds, checkpoints, and how a script ends."""

from __future__ import annotations

import fcntl
import os
import platform
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from checkpoint import is_of_a_file, load_checkpoint, save_checkpoint

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: run the same command again, with --resume auto


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


def from_all(value) -> list:
    """Every process's `value` in the order of ranks (plain types only)."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def save_run_checkpoint(run: Path, state: dict, keep: int, best: bool) -> None:
    """Write `step_*.pt` of a run, name it `last.pt` too, and `best.pt` if it is; keep `keep`.

    The older ones go only after the new one is whole.
    """
    path = run / f"step_{state['step']:07d}.pt"
    save_checkpoint(path, state)
    for name in ("last.pt", "best.pt") if best else ("last.pt",):
        link = run / f".{name}.link"
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, link)
        os.replace(link, run / name)
    for old in sorted(run.glob("step_*.pt"))[:-keep]:
        old.unlink()


def newest_checkpoint(run: Path) -> tuple[Path, dict] | None:
    """The newest whole checkpoint of a run folder; says aloud which newer ones are damaged."""
    for path in [*sorted(run.glob("step_*.pt"), reverse=True), run / "last.pt"]:
        if path.is_file():
            try:
                return path, load_checkpoint(path)
            except ValueError as error:
                print(f"skipped: {error}", flush=True)
    return None


def lock_folder(folder: Path):
    """Hold a run folder until the returned file is closed, or this process ends in any way.

    Raises:
        ValueError: another process holds it.
    """
    file = open(folder / "lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ValueError(
            f"another process is training in {folder}: wait for it, or give another --save"
        ) from error
    return file


def random_states() -> dict:
    """The states of all random number generators, in plain types and tensors."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict) -> None:
    """Put back what `random_states` gave."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


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
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "commit": commit.stdout.strip() + (" (changed)" if changed.stdout.strip() else ""),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "lpips", "numpy")},
        "device": torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "processes": world_size(),
    }


# ---------------------------------------------------------------------------------------
# Tables and figures
# ---------------------------------------------------------------------------------------
def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; the first column to the left, the others to the right."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, *rows)]
    return "\n".join([lines[0], "|---" + "|---:" * (len(header) - 1) + "|", *lines[1:]])


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in cells)


def check_outputs(*paths: str | None) -> None:
    """Raise, before the work, for a file that could not be written after it; None is skipped.

    Raises:
        ValueError: the folder of the file does not exist, or the path is a folder.
    """
    for path in filter(None, paths):
        if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path} cannot be written: give a file in a folder that exists")


def load_figure() -> type:
    """matplotlib's Figure class: the object-oriented interface needs no display.

    Raises:
        ValueError: matplotlib, an optional extra, is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "figures need matplotlib: pip install '.[figures]', or leave them out"
        ) from error
    return Figure


# ---------------------------------------------------------------------------------------
# How a script ends
# ---------------------------------------------------------------------------------------
class Interrupted(Exception):
    """A run that stopped because a signal asked it to, with its checkpoint saved."""


class StopSignals:
    """Within `with`, the signals that ask a run to stop are noted instead of obeyed.

    SIGINT (Ctrl-C), SIGTERM, and SIGUSR1, a scheduler's warning. `shield` (1,) is True meanwhile,
    in shared memory, for the loading processes to see.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, shield: torch.Tensor):
        self.shield = shield
        self.received: str | None = None

    def __enter__(self) -> StopSignals:
        self.shield.fill_(True)
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        self.shield.fill_(False)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        self.received = signal.Signals(number).name


def one_line(error: BaseException) -> str:
    """The message of an error in one line, also when it comes from a DataLoader's worker."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # The last line of a worker's traceback is "package.TypeOfError: message".
    return lines[0] if len(lines) == 1 else re.sub(r"^[\w.]+: ", "", lines[-1].strip())


def _explain_dead_worker(kind, error, trace) -> None:
    # PyTorch raises a RuntimeError from a signal handler: anywhere, also in here, but for the next
    # lines. Before that, the connection to the loading process may break, in the loader.
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    except RuntimeError:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    dead = isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)
    if isinstance(error, EOFError) or (isinstance(error, OSError) and error.errno):
        frames = traceback.extract_tb(trace)
        dead = any(Path(frame.filename).name == "dataloader.py" for frame in frames)
    if not dead:
        return sys.__excepthook__(kind, error, trace)
    reason = "it may have run out of memory: give fewer --num-workers"
    print(f"{Path(sys.argv[0]).name}: error: a loading process died; {reason}", file=sys.stderr)


def run_script(main: Callable) -> None:
    """Run a script's `main`: bad input ends it with one line on standard error and code 2.

    So does a file that cannot be read or written. A signal that asked a training run to stop ends
    it with code 75, when its checkpoint is saved.
    """
    sys.excepthook = _explain_dead_worker
    try:
        main()
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and not is_of_a_file(error):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(stop, flush=True)
        sys.exit(EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
