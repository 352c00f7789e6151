"""Processes that the tests start, and how long they may take.

A deadline only ends a test that hangs: nothing here measures, so that a busy machine changes no
result.
"""

from __future__ import annotations

import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
DEADLINE = 600.0  # seconds


def wait_for(condition: Callable[[], object]) -> None:
    """Return once `condition()` holds."""
    end = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"waited in vain for {DEADLINE:g} seconds")
        time.sleep(0.02)


def ended(pid: int) -> int:
    """The exit code of a child, or the signal that killed it, below 0."""
    end = time.monotonic() + DEADLINE
    while (state := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pytest.fail("a process hangs")
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(state[1])


def child(work: Callable[[], None], output: str | Path = os.devnull) -> int:
    """Run `work` in a forked process, which writes to `output`, and return its number.

    `work` must not compile: the threads of a compiler that this process has used are not in the
    forked one, which would wait for them. `in_fresh_process` is for that.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
        # tqdm's lock is shared with forked processes: one killed while it holds it would stop all.
        tqdm.set_lock(threading.RLock())
        work()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def in_fresh_process(work: Callable[[], None]) -> None:
    """Run `work`, a function of a test file, in a new interpreter; fail with what it printed."""
    code = f"import conftest, {work.__module__} as file; file.{work.__name__}()"
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr


def stop_by_ctrl_c(script: str, *flags: str) -> None:
    """Run a script in this process as the command line does; Ctrl-C has to end it."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(sys, "argv", [f"{script}.py", *flags])
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    assert caught.value.code == 128 + signal.SIGINT


def free_port() -> int:
    """A port that nobody listens on, below those that the kernel gives to outgoing connections.

    A server that is started on it later would lose one of these to any test that connects.
    """
    choice = random.SystemRandom()
    while True:
        port = choice.randrange(20_000, 32_000)
        with socket.socket() as server:
            try:
                server.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue


def children(pid: int) -> list[int]:
    """The processes that `pid` started (Linux), in the order of their start."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue
        if int(fields[1]) == pid:
            found.append((int(fields[19]), int(status.parent.name)))
    return [number for _, number in sorted(found)]


def exists(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not waited for does not (Linux)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


# Variables of a process that is a group of its own, as `torchrun` sets them.
GROUP_OF_ONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


def script_environment(folder: Path, **programs: str) -> dict[str, str]:
    """Variables for the shell scripts: this interpreter, one thread, no network and no LPIPS.

    `scripts/setup.sh` takes `folder`/venv for its complete environment. Nothing outside `folder`
    is written, which other tests would see. `programs` are texts of shell scripts by their names,
    which replace installed programs.
    """
    binaries = folder / "venv" / "bin"
    binaries.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / "pyproject.toml", folder / "venv" / "pyproject.toml")
    for name, text in programs.items():
        (binaries / name).write_text(f"#!/bin/sh\n{text}\n")
        (binaries / name).chmod(0o755)
    network = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    return {
        **os.environ,
        **network,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "VENV": str(folder / "venv"),
        "TORCH_HOME": str(folder / "torch"),
        "OMP_NUM_THREADS": "1",
    }
