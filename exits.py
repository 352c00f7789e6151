"""How a script ends: stop signals, exit codes, errors in one line."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import os
import re
import select
import signal
import stat
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from files import is_of_a_file
from output import printable
from util import from_all, in_group, rank, world_size

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: run the same command again, with --resume auto


class Interrupted(Exception):
    """A signal stopped the run, whose checkpoint, if there is one, is saved."""


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
    """Discard the output to the terminal: writing to one that is closed would be an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        with contextlib.suppress(OSError):  # a stream that is closed
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(nowhere, stream)
    os.close(nowhere)


def one_line(error: BaseException) -> str:
    """The message of an error in one printable line; also of an error in a loading process."""
    text = str(error).strip() or type(error).__name__
    if "\nOriginal Traceback" in text:  # its last line is "package.TypeOfError: message"
        text = re.sub(r"^[\w.]+: ", "", text.splitlines()[-1].strip())
    return printable(text)


def _explain_dead_worker(kind, error, trace) -> None:
    """An excepthook: one line where a loading process has died or hangs, else the traceback."""
    text = str(error) if isinstance(error, RuntimeError) else ""
    files = [Path(frame.filename) for frame in traceback.extract_tb(trace)]
    # Before PyTorch's own error, receiving from the loading process may fail, with any error.
    receiving = any(file.name == "dataloader.py" for file in files) and any(
        "multiprocessing" in file.parts for file in files
    )
    if "DataLoader timed out" in text:
        _print_error(f"{one_line(error)}: a loading process, or the disk, hangs")
    elif "shared memory" in text:
        _print_error(
            "a loading process died, as there is too little shared memory: give fewer "
            "--num-workers, or a container more (docker run --ipc=host)"
        )
    elif "DataLoader worker (pid" in text or receiving:
        _print_error(
            "a loading process died; it may have run out of memory: give fewer --num-workers"
        )
    else:
        sys.__excepthook__(kind, error, trace)


def _is_of_a_collective(error: RuntimeError) -> bool:
    """Whether gloo or NCCL raised the error because the connection to a process failed."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def _output_is_closed() -> bool:
    """Whether the reader of standard output has gone, as after `| head`; if so, discard output."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    closed = any(event & select.POLLERR for _, event in output.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


def run_script(main: Callable, again: str = "") -> None:
    """Run a script's `main`: bad input ends it with one line on standard error and code 2.

    A file that cannot be read or written does the same. A signal ends a training run with code 75,
    after its checkpoint is saved, or before the first step without one. Ctrl-C ends other scripts
    with code 130 and a line that has the advice `again`: how the work can go on.
    """
    sys.excepthook = _explain_dead_worker
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed, as by `>&-`: this also takes its number
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names need not be Unicode
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _exit_code(main, again)
    except Exception:
        if not in_group():
            raise
        sys.excepthook(*sys.exc_info())
        _end_at_once(1)
    if in_group():
        if code == 0:  # otherwise it would wait for processes that wait for this one
            dist.destroy_process_group()
        _end_at_once(code)
    if code:
        sys.exit(code)


def _exit_code(main: Callable, again: str) -> int:
    """Run `main`; return 0, or the code for its error, which is printed in one line."""
    try:
        _run(main)
    except BaseException as error:
        code = _explain(error, again)
        if code is None:
            raise
        return code
    return 0


def _explain(error: BaseException, again: str) -> int | None:
    """Print the line that explains an error; return the exit code.

    None: the error is not expected, and nothing is printed.
    """
    # UnsupportedOperation is a ValueError as well, and a fault of the program.
    if isinstance(error, ValueError) and not isinstance(error, io.UnsupportedOperation):
        _print_error(one_line(error))
        return 2
    if isinstance(error, Interrupted):
        print(error, flush=True)
        return EXIT_INTERRUPTED
    if isinstance(error, KeyboardInterrupt):
        if rank() == 0:
            _print_line("; ".join(filter(None, ["interrupted", again])))
        return 128 + signal.SIGINT
    if isinstance(error, BrokenPipeError) and _output_is_closed():
        return 128 + signal.SIGPIPE
    if isinstance(error, OSError) and is_of_a_file(error):
        text = one_line(error)
        if error.filename is None:
            text = f"standard output, or a file, cannot be read or written: {text}"
        _print_error(text)
        return 2
    if isinstance(error, torch.OutOfMemoryError):
        _print_error("the memory of the GPU is full: give a smaller --batch-size, or more GPUs")
        return 2
    if isinstance(error, RuntimeError) and _is_of_a_collective(error):
        _print_error(
            "another process of this run has ended, or cannot be reached: give the same command "
            "again (train.py: with --resume auto)"
        )
        return 1
    return None


def _print_error(text: str) -> None:
    _print_line(f"error: {text}")


def _print_line(text: str) -> None:
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)


def _run(main: Callable) -> None:
    """Run `main`, then take away PyTorch's handler of SIGCHLD.

    When a loading process dies, that handler raises an error, wherever the program is. Without it,
    no such error can interrupt the explanation of another one.
    """
    try:
        main()
    finally:
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        except RuntimeError:  # from the handler, which was called at the last moment
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            raise


def _end_at_once(code: int) -> NoReturn:
    """End this process without Python's own end.

    A thread of gloo may still hold a tensor of the last collective. If it frees that tensor while
    Python ends, the process is aborted (SIGABRT), although all its work is done. The threads do
    not end with `destroy_process_group`, because DistributedDataParallel still holds the group.
    """
    gc.collect()  # ends the loading processes
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(code)
