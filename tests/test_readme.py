"""Every block of the README runs, as it stands but for flags that make it small."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torchvision.utils import save_image

import train
from arguments import get_parser
from dataset import SyntheticDataset

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
# Appended to commands that train: the last flag wins.
TINY = (
    "--train-data-path synthetic --val-data-path images --train-iters 1 --batch-size 4 "
    "--channel 16 --img-size 32 --perceptual-weight 0 --num-workers 0 --embed-dim 8"
)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the project, with a few images and one finished run named as the README does."""
    folder = tmp_path_factory.mktemp("clone") / "rfsq"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "data", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=ignored)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(train, "lpips_network", lambda *args, **kwargs: None)
        for name in ("images", "data/imagenet/train", "data/imagenet/val"):
            Path(name).mkdir(parents=True)
            for i, image in enumerate(SyntheticDataset(32, 0, 4)):
                save_image(image / 255, f"{name}/{i}.png")
        train.main([*TINY.split(), "--save", "runs/NAME"])
    return folder


def environment(folder: Path) -> dict[str, str]:
    """This interpreter's environment for the scripts, and no download of LPIPS weights."""
    # `sys.prefix` is the virtual environment of the tests; the scripts find it complete.
    (folder / ".venv").exists() or (folder / ".venv").symlink_to(sys.prefix)
    ours, installed = (Path(place, "pyproject.toml") for place in (folder, sys.prefix))
    if not installed.exists() or installed.read_bytes() != ours.read_bytes():
        shutil.copyfile(ours, installed)
    return {
        **os.environ,
        "PYTHONPATH": str(folder),
        "TORCH_HOME": str(folder.parent / "torch"),
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "TEST_PROCESSES": "0",
    }


def shrink(command: str) -> str:
    """One shell command of the README, made small."""
    if command.endswith("--help"):
        return command
    if "train.py" in command or re.search(r"scripts/(rfsq_|demo)", command):
        return f"{command} {TINY}"
    if "scripts/test.sh" in command:
        return f"{command} --collect-only -q tests/test_scheduler.py"
    return command


def shell_blocks() -> list[str]:
    return [text.strip() for language, text in BLOCKS if language == "bash"]


def in_this_process(commands: list[str], clone: Path, monkeypatch, tmp_path: Path) -> None:
    """Run shell scripts that end in `python train.py`, and that last step of theirs right here.

    A new interpreter takes several times as long as a small run of training.
    """
    calls = tmp_path / "calls"
    fake = tmp_path / "venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    shutil.copy(clone / "pyproject.toml", tmp_path / "venv")
    fake.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo 0 || echo "$*" >> {calls}\n')
    fake.chmod(0o755)
    variables = environment(clone) | {"VENV": str(tmp_path / "venv")}
    subprocess.run(["bash", "-ec", "\n".join(commands)], cwd=clone, env=variables, check=True)
    monkeypatch.chdir(clone)
    lines = calls.read_text().splitlines()
    assert len(lines) == len(commands)
    for line in lines:
        script, *flags = line.split()
        assert Path(script).samefile(clone / "train.py")
        assert train.main(flags)["steps"] == 1


@pytest.mark.parametrize("block", shell_blocks(), ids=lambda block: block.splitlines()[0][:50])
def test_shell_block(block, clone, monkeypatch, tmp_path, no_lpips):
    commands = [shrink(line) for line in block.replace("\\\n", " ").splitlines()]
    if "--nnodes 2" in block:  # the same command on two machines; here, two agents on one
        (command,) = commands
        commands = [f"{command} & first=$!", command, "wait $first"]
    if all("scripts/rfsq_" in command for command in commands):
        in_this_process(commands[1:], clone, monkeypatch, tmp_path)
        commands = commands[:1]  # one of them in full
    script = "set -euo pipefail\n" + "\n".join(commands)
    done = subprocess.run(
        ["bash", "-c", script], cwd=clone, env=environment(clone), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    "block", [text for language, text in BLOCKS if language == "python"], ids=lambda b: b[:30]
)
def test_python_block(block, clone, monkeypatch):
    monkeypatch.chdir(clone)
    exec(compile(block, "README.md", "exec"), {})


def test_slurm_script_ends_when_training_is_killed(clone, tmp_path):
    """By the memory limit, say: neither an endless loop nor a job that is requeued for ever."""
    (script,) = (text for _, text in BLOCKS if "#SBATCH" in text)
    script = re.sub(r"^python .* &$", "sh -c 'kill -9 $$' &", script, flags=re.M)
    assert "kill -9" in script
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\n')
    (tmp_path / "scontrol").chmod(0o755)
    variables = environment(clone) | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", script], env=variables, timeout=30, capture_output=True)
    assert not (tmp_path / "requeued").exists()


def test_slurm_script_requeues_itself(clone, tmp_path):
    """The warning reaches the script alone; training saves and stops, and the job is requeued."""
    (script,) = (text for _, text in BLOCKS if "#SBATCH" in text)
    endless = TINY.replace("--train-iters 1", "--train-iters 1000000 --log-interval 1")
    script = script.replace("--resume auto &", f"--resume auto {endless} --save {tmp_path}/run &")
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\n')
    (tmp_path / "scontrol").chmod(0o755)
    variables = environment(clone) | {"SLURM_JOB_ID": "42"}
    variables["PATH"] = f"{tmp_path}:{variables['PATH']}"
    job = subprocess.Popen(["bash", "-c", script], cwd=clone, env=variables)
    for _ in range(600):
        log = tmp_path / "run" / "metrics.jsonl"
        if log.exists() and log.read_text():  # the first step is done: signals are heeded
            break
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    job.wait(timeout=60)
    assert (tmp_path / "requeued").read_text() == "requeue 42\n"
    assert (tmp_path / "run" / "last.pt").exists()


def test_blocks_say_what_they_are():
    assert {language for language, _ in BLOCKS} <= {"bash", "python", "bibtex", ""}
    assert len(shell_blocks()) >= 6


def test_named_files_exist():
    """Paths and flags that the README names exist."""
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"(?:scripts|quantizers|loss)/[\w]+\.\w+", text):
        assert (ROOT / path).exists(), path
    known = {flag for action in get_parser()._actions for flag in action.option_strings}
    known |= {"--standalone", "--nproc-per-node", "--nnodes"}  # torchrun's
    known |= {"--rdzv-backend", "--rdzv-id", "--rdzv-endpoint"}
    for script in (ROOT / "scripts").glob("*.py"):
        known |= set(re.findall(r'"(--[a-z][\w-]+)"', script.read_text()))
    reproduce = (ROOT / "scripts" / "reproduce.sh").read_text()
    known |= set(re.findall(r"(--[a-z][\w-]+) ?(?:\||\))", reproduce))  # its cases
    text = re.sub("#SBATCH .*", "", text)
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) <= known
