"""Every block of README.md and docs/ runs as it is written, but for flags that make it small."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from processes import DEADLINE, free_port, script_environment, wait_for
from torch.distributed import TCPStore
from torchvision.utils import save_image

import train
from arguments import get_parser
from dataset import build_dataset
from scripts import make_tokens

ROOT = Path(__file__).resolve().parent.parent
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]  # their blocks run
PAGES = [*GUIDES, *(ROOT / f"{name}.md" for name in ("RESULTS", "CONTRIBUTING", "CHANGELOG"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
# (page, language, block), each block once.
BLOCKS = {
    block: (page, language)
    for page in (str(page.relative_to(ROOT)) for page in GUIDES)
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", TEXTS[page], re.M | re.S)
}
# Appended to commands that train: the last flag wins.
TINY = (
    "--train-data-path synthetic --val-data-path images --train-iters 1 --batch-size 4 "
    "--channel 16 --img-size 32 --perceptual-weight 0 --num-workers 0 --embed-dim 8"
)
# Flags of torchrun, SLURM, TensorBoard and an example, and the names that flags had before.
OTHER_FLAGS = {
    *("--standalone", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-id"),
    *("--rdzv-endpoint", "--logdir", "--sign-dim", "--codebook-weight", "--codebook-loss-weight"),
}


def refuse_download(*args, **kwargs):
    raise OSError("no network in tests")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the project, with a few images and one finished run, named as in the guides."""
    folder = tmp_path_factory.mktemp("clone") / "rfsq"
    ignored = shutil.ignore_patterns(
        *(".git", ".venv", "runs", "data", "images", "__pycache__", ".*_cache")
    )
    shutil.copytree(ROOT, folder, ignore=ignored)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setenv("TORCH_HOME", str(folder.parent / "torch"))
        patched.setattr(torch.hub, "download_url_to_file", refuse_download)
        for name in ("images", "data/imagenet/train", "data/imagenet/val"):
            Path(name).mkdir(parents=True)
            images = build_dataset("synthetic", img_size=32, seed=0, train=False)
            for i in range(4):
                save_image(images[i] / 255, f"{name}/{i}.png")
        shutil.make_archive("data/ILSVRC2012_img_val", "tar", "data/imagenet/val")
        train.main([*TINY.split(), "--save", "runs/NAME"])
        shutil.copytree("runs/NAME", "runs/reproduce/NAME")
        # As in docs/tokens.md, whose other block reads them; it may run in another process.
        load = ["--load", "runs/NAME/last.pt", "--out", "runs/tokens", "--flip"]
        make_tokens.main(["./data/imagenet/train", *load])
    return folder


def environment(clone: Path, folder: Path, **programs: str) -> dict[str, str]:
    """For the scripts of the clone, with files in `folder`."""
    variables = script_environment(folder, **programs)
    return {**variables, "PYTHONPATH": str(clone), "TEST_PROCESSES": "0"}


def shrink(command: str) -> str:
    """One shell command of a guide, made small."""
    if "train.py" in command or re.search(r"scripts/(paper/|beyond/|demo)", command):
        return f"{command} {TINY}"
    if "scripts/test.sh" in command:
        return f"{command} --collect-only -q tests/test_scheduler.py"
    return command


def commands_of(block: str) -> list[str]:
    return [shrink(line) for line in block.replace("\\\n", " ").strip().splitlines()]


def blocks(language: str, python_alone: bool | None = None) -> list:
    """Blocks of a language; of shell blocks those that are `python` commands alone, or the rest."""
    return [
        pytest.param(block, id=f"{page}: {block.splitlines()[0][:50]}")
        for block, (page, kind) in BLOCKS.items()
        if kind == language
        and python_alone
        in (None, all(command.startswith("python ") for command in commands_of(block)))
    ]


def in_this_process(commands: list[str], clone: Path, monkeypatch, tmp_path: Path) -> None:
    """Run shell scripts that end in `python train.py`, and that last step of theirs right here.

    A new interpreter takes several times as long as a small run of training.
    """
    calls = tmp_path / "calls"
    python = f'[ "$1" = -c ] && echo 0 || echo "$*" >> {calls}'
    variables = environment(clone, tmp_path / "fake", python=python)
    subprocess.run(["bash", "-ec", "\n".join(commands)], cwd=clone, env=variables, check=True)
    monkeypatch.chdir(clone)
    lines = calls.read_text().splitlines()
    assert len(lines) == len(commands)
    for line in lines:
        script, *flags = line.split()
        assert Path(script).samefile(clone / "train.py")
        assert train.main(flags)["steps"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("bash", python_alone=False))
def test_shell_block(block, clone, monkeypatch, tmp_path, no_lpips):
    commands = commands_of(block)
    if "--nnodes 2" in block:  # the same command on two machines; here, two agents on one
        (command,) = commands
        # The store of an agent ends with it, and the other one may still ask: this one does not.
        store = TCPStore("localhost", free_port(), is_master=True, wait_for_workers=False)
        command = command.replace(":29400", f":{store.port}")
        commands = [f"{command} & first=$!", command, "wait $first"]
    if all("scripts/paper/" in command for command in commands):
        in_this_process(commands[1:], clone, monkeypatch, tmp_path)
        commands = commands[:1]  # one of them in full
    script = "set -euo pipefail\n" + "\n".join(commands)
    # The linters have checked the checkout, which takes longer than all tests of this file.
    variables = environment(clone, tmp_path, ruff="", basedpyright="")
    done = subprocess.run(
        ["bash", "-c", script], cwd=clone, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]


@pytest.mark.parametrize("block", blocks("bash", python_alone=True))
def test_python_commands(block, clone, monkeypatch, no_lpips):
    """In this process: a new interpreter takes several times as long as a small run."""
    monkeypatch.chdir(clone)
    for command in commands_of(block):
        _, script, *flags = shlex.split(command)
        importlib.import_module(script.removesuffix(".py").replace("/", ".")).main(flags)


@pytest.mark.parametrize("block", blocks("python"))
def test_python_block(block, clone, monkeypatch):
    monkeypatch.chdir(clone)
    exec(compile(block, BLOCKS[block][0], "exec"), {})


def test_slurm_script_ends_when_training_is_killed(tmp_path):
    """By the memory limit, say: neither an endless loop nor a job that is requeued for ever."""
    (script,) = (block for block in BLOCKS if "#SBATCH" in block)
    script = re.sub(r"^python .* &$", "sh -c 'kill -9 $$' &", script, flags=re.M)
    assert "kill -9" in script
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\n')
    (tmp_path / "scontrol").chmod(0o755)
    variables = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", script], env=variables, timeout=DEADLINE, capture_output=True)
    assert not (tmp_path / "requeued").exists()


@pytest.mark.slow
def test_slurm_script_requeues_itself(clone, tmp_path):
    """The warning reaches the script alone; training saves and stops, and the job is requeued."""
    (script,) = (block for block in BLOCKS if "#SBATCH" in block)
    endless = TINY.replace("--train-iters 1", "--train-iters 1000000 --log-interval 1")
    script = script.replace("--resume auto &", f"--resume auto {endless} --save {tmp_path}/run &")
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\n')
    (tmp_path / "scontrol").chmod(0o755)
    variables = environment(clone, tmp_path) | {"SLURM_JOB_ID": "42"}
    variables["PATH"] = f"{tmp_path}:{variables['PATH']}"
    job = subprocess.Popen(["bash", "-c", script], cwd=clone, env=variables)
    log = tmp_path / "run" / "metrics.jsonl"  # from the first step on, signals are heeded
    wait_for(lambda: job.poll() is not None or (log.exists() and log.stat().st_size))
    job.send_signal(signal.SIGUSR1)
    job.wait(timeout=DEADLINE)
    assert (tmp_path / "requeued").read_text() == "requeue 42\n"
    assert (tmp_path / "run" / "last.pt").exists()


def test_blocks_say_what_they_are():
    assert {language for _, language in BLOCKS.values()} <= {"bash", "python", "bibtex", ""}
    assert len(blocks("bash")) >= 12 and len(blocks("python")) >= 4


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 12_000


def test_results_of_the_readme_are_those_of_the_results_page():
    (table,) = re.findall(r"^## Results\n.*?\n(\|.*?)\n\n", TEXTS["README.md"], re.M | re.S)
    decimals = re.findall(r"\d+\.\d{2,}", table)
    assert len(decimals) > 30
    assert set(decimals) <= set(re.findall(r"\d+\.\d{2,}", TEXTS["RESULTS.md"])) | {"1.375"}


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", TEXTS)
def test_links_exist(name):
    """Relative links, their anchors, and pictures."""
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", TEXTS[name]):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("name", [name for name in TEXTS if name != "CHANGELOG.md"])
def test_named_files_exist(name):
    pattern = (
        r"(?:scripts|quantizers|codec|loss|tests|figures|docs)/(?:\w+/)?\w+\.(?:py|sh|md|png)\b"
    )
    for path in re.findall(pattern, TEXTS[name]):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", TEXTS)
def test_named_flags_exist(name):
    known = {flag for action in get_parser()._actions for flag in action.option_strings}
    for script in (ROOT / "scripts").glob("*.py"):
        known |= set(re.findall(r'"(--[a-z][\w-]+)"', script.read_text()))
    reproduce = (ROOT / "scripts" / "reproduce.sh").read_text()
    known |= set(re.findall(r"(--[a-z][\w-]+) ?(?:\||\))", reproduce))  # its cases
    text = re.sub("#SBATCH .*", "", TEXTS[name])
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) <= known | OTHER_FLAGS


def test_every_figure_is_used():
    used = "".join(TEXTS.values())
    for figure in (ROOT / "figures").iterdir():
        assert f"figures/{figure.name})" in used, f"{figure.name} is in no page"
