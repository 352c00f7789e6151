"""Files written whole or not at all, and folders that one process holds."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from processes import child, ended

from files import check_room, locked, remove_leftovers, write_json, write_whole


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("existing", [True, False])
def test_a_write_that_fails_leaves_nothing_half(tmp_path, error, existing):
    path = tmp_path / "last.pt"
    if existing:
        path.write_bytes(b"whole")

    def write(file):
        file.write(b"half")
        raise error("disk")

    # What the file system refuses is told as bad input: one line that names the file.
    with pytest.raises(ValueError if error is OSError else error):
        write_whole(path, write)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"whole"] * existing


def test_a_write_replaces_what_was_there(tmp_path):
    path = tmp_path / "last.pt"
    for content in (b"one", b"two"):
        write_whole(path, lambda file, content=content: file.write(content))
        assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
        assert path.read_bytes() == content


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_has_the_mode_that_the_user_gives_files(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "file", lambda file: file.write(b"content"))
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_links_devices_and_pipes_stay_what_they_are(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "file")
    for content in (b"one", b"two"):
        write_whole(tmp_path / "link", lambda file, content=content: file.write(content))
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "elsewhere" / "file").read_bytes() == content
    os.mkfifo(tmp_path / "pipe")
    received = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_json(tmp_path / "pipe", [1])
    reader.join()
    assert received == [b"[\n  1\n]\n"] and (tmp_path / "pipe").is_fifo()
    (tmp_path / "null").symlink_to("/dev/null")
    write_json(tmp_path / "null", [1])
    assert (tmp_path / "null").resolve().is_char_device()
    with pytest.raises(ValueError, match="elsewhere cannot be written"):
        write_whole(tmp_path / "elsewhere", lambda file: file.write(b"content"))
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "link", "null", "pipe"]


PRINTING = """
from files import write_json
from output import check_outputs
print("before")
check_outputs("/dev/stdout")
write_json("/dev/stdout", [1])
print("after")
"""


@pytest.mark.parametrize("redirected", [False, True])
def test_standard_output_is_written_between_what_is_printed(tmp_path, redirected):
    with open(tmp_path / "file", "w") as file:
        given = {"stdout": file} if redirected else {"stdout": subprocess.PIPE}
        command = [sys.executable, "-c", PRINTING]
        piped = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, **given).stdout
    written = (tmp_path / "file").read_bytes() if redirected else piped
    assert written == b"before\n[\n  1\n]\nafter\n"


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127])
def test_the_longest_names_can_be_written(tmp_path, name):
    write_whole(tmp_path / name, lambda file: file.write(b"content"))
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    "need, free, says",
    [
        (123_456, 100, "needs 123.5 kB more, and its disk has 0.1 kB free"),
        (7_890_000, 204_800, "needs 7.9 MB more, and its disk has 204.8 kB free"),
        (2_000_000_000, 10**9, "needs 2.0 GB more, and its disk has 1.0 GB free"),
    ],
)
def test_room_is_told_in_a_unit_that_fits(need, free, says, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    with pytest.raises(ValueError, match=re.escape(says)):
        check_room(tmp_path, need)


def test_what_a_kill_leaves_can_be_told_and_removed(tmp_path):
    def killed() -> None:
        write_whole(tmp_path / "file", lambda file: os.kill(os.getpid(), signal.SIGKILL))

    assert ended(child(killed)) == -signal.SIGKILL
    (tmp_path / ".mine").write_text("")
    assert len(os.listdir(tmp_path)) == 2
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [".mine"]


@pytest.mark.parametrize("name", [".", "lock"])
def test_one_process_holds_a_place(tmp_path, name):
    path = tmp_path / name

    def second() -> None:
        with (
            pytest.raises(ValueError, match="it is held"),
            locked(path, "it is held"),
        ):
            pass

    with locked(path, "not held"):
        assert ended(child(second)) == 0
    with locked(path, "not held"):  # at the end it is free
        pass
    assert os.listdir(tmp_path) == [name] * (name != ".")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_a_file_system_without_locks_is_no_other_process(tmp_path, monkeypatch, capsys, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path, "it is held"):
        assert "has no locks" in capsys.readouterr().out
