"""Processes, devices, seeds, signals, and how a script ends."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import io
import os
import platform
import random
import re
import resource
import select
import shlex
import signal
import stat
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from files import is_of_a_file
from output import printable
from quantizers.base import processes as world_size
from quantizers.base import rank

Result = TypeVar("Result")
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
        stop_with_parent(signal.SIGTERM)  # of torchrun
        dist.init_process_group("nccl" if cuda else "gloo")
    return torch.device(device)


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


def on_main(function: Callable[[], Result]) -> Result:
    """Run `function` in the main process; all processes get its result, or raise its exception.

    A collective. The result consists of plain types and tensors.
    """
    if world_size() == 1:
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


def environment(device: torch.device) -> dict:
    """Where a run's numbers come from: command, commit, versions, hardware.

    The commit is None outside a git checkout, and where git is not installed.
    """
    cuda = device.type == "cuda"
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "lpips", "numpy")},
        "device": torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "processes": world_size(),
    }


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


# ---------------------------------------------------------------------------------------
# How a script ends
# ---------------------------------------------------------------------------------------
class Interrupted(Exception):
    """A run was stopped by a signal; what it had to save is saved."""


class StopSignals:
    """Within `with`, some signals stop the run.

    They are SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal is closed; ignored under `nohup`) and
    SIGUSR1 (a scheduler's warning).

    Until `defer` is called, a signal raises `Interrupted` at once. Afterwards it is only noted in
    `received`, so that the run can finish its step and save.

    Attributes:
        received: the name of the signal, or None.
        deferred: (1,) bool in shared memory: loading processes ignore signals while it is True,
            because the step that is being finished needs them.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: str | None = None
        self.deferred = torch.zeros(1, dtype=torch.bool).share_memory_()

    def __enter__(self) -> StopSignals:
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {n: signal.signal(n, self._note) for n in self.heeded()}
        return self

    def __exit__(self, *_) -> None:
        self.deferred.fill_(False)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @classmethod
    def heeded(cls) -> list[signal.Signals]:
        """SIGNALS, without SIGHUP under `nohup`, which has it ignored.

        SIGINT is handled even where it is ignored, as a shell sets it for background jobs.
        """
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        return [number for number in cls.SIGNALS if not (nohup and number == signal.SIGHUP)]

    def defer(self) -> None:
        """From now on, note signals instead of raising `Interrupted`."""
        self.deferred.fill_(True)
        # `__exit__` may be cut short: where a loading process has died, PyTorch raises an error
        # from a signal handler, anywhere. The others would then ignore the signal that ends them.
        atexit.register(self.deferred.fill_, False)

    def agreed(self, step: int) -> bool:
        """Whether to stop after `step`. A collective: several processes agree every 16 steps."""
        if world_size() == 1:
            return self.received is not None
        return step % 16 == 0 and any(from_all(self.received is not None))

    def _note(self, number: int, _) -> None:
        self.received = signal.Signals(number).name
        if number == signal.SIGHUP:
            _leave_terminal()
        if not self.deferred:
            raise Interrupted(f"stopped by {self.received} before the first step: nothing to save")


def _leave_terminal() -> None:
    """Let output to a terminal go nowhere: to one that is closed, it would be an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        with contextlib.suppress(OSError):  # a stream that is closed
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(nowhere, stream)
    os.close(nowhere)


def one_line(error: BaseException) -> str:
    """The message of an error in one printable line, also from a DataLoader's worker."""
    text = str(error).strip() or type(error).__name__
    if "\nOriginal Traceback" in text:  # its last line is "package.TypeOfError: message"
        text = re.sub(r"^[\w.]+: ", "", text.splitlines()[-1].strip())
    return printable(text)


def _explain_dead_worker(kind, error, trace) -> None:
    # Before PyTorch's own error, receiving from the loading process may fail, with any error.
    dead = isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)
    files = [Path(frame.filename) for frame in traceback.extract_tb(trace)]
    dead |= any(file.name == "dataloader.py" for file in files) and any(
        "multiprocessing" in file.parts for file in files
    )
    problem = "a loading process died; it may have run out of memory: give fewer --num-workers"
    if isinstance(error, RuntimeError) and "DataLoader timed out" in str(error):
        dead, problem = True, f"{one_line(error)}: a loading process, or the disk, hangs"
    if not dead:
        return sys.__excepthook__(kind, error, trace)
    print(f"{Path(sys.argv[0]).name}: error: {problem}", file=sys.stderr)


def _output_is_closed() -> bool:
    """Whether nobody reads standard output any more, as after `| head`; if so, it leads nowhere."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    closed = any(event & select.POLLERR for _, event in output.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


def run_script(main: Callable) -> None:
    """Run a script's `main`: bad input ends it with one line on standard error and code 2.

    So does a file that cannot be read or written. A signal ends a training run with code 75: after
    its checkpoint is saved, or before the first step without one.
    """
    sys.excepthook = _explain_dead_worker
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names need not be Unicode
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            main()
        finally:
            # PyTorch raises an error of a dead loading process from a signal handler, anywhere: in
            # these lines at the latest, and not where errors are explained.
            try:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            except RuntimeError:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                raise
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            sys.exit(128 + signal.SIGPIPE)
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
