"""What `pip install` of this repository gives other projects: a package `rfsq` that needs torch."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# In a project that has neither this checkout nor what training needs.
CHILD = """
import sys
absent = ("quantizers", "model", "torchvision", "lpips", "numpy", "tqdm", "PIL")
sys.modules.update(dict.fromkeys(absent))  # importing them is an ImportError
import torch, rfsq
from rfsq import RFSQ
assert rfsq.__file__.startswith(sys.argv[1]), rfsq.__file__
made = RFSQ(), rfsq.FSQ(), rfsq.GeometricRFSQ(), rfsq.LFQ(4), rfsq.VectorQuantizeEMA(16, 4)
made += (rfsq.SVQ(12, 4),)
assert set(map(type, made)) == {rfsq.GeometricRFSQ, *rfsq.QUANTIZERS.values()}
for quantizer in made:
    quantized, indices, *_ = quantizer.eval()(torch.randn(2, 4, 8, 8))
    assert torch.equal(quantizer.indices_to_codes(indices), quantized)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built without network, from a copy, because a build leaves files behind."""
    if tuple(map(int, version("setuptools").split(".")[:2])) < (70, 1):
        pytest.skip("building a wheel without network needs setuptools 70.1")
    version("pip")
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "quantizers", folder / "rfsq" / "quantizers")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "rfsq")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "-w", folder, folder / "rfsq"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (found,) = folder.glob("rfsq-*.whl")
    return found


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"building a wheel needs {name}")


def test_the_wheel_is_a_package_rfsq_that_needs_torch_alone(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    (info,) = tmp_path.glob("*.dist-info")
    assert {path.name for path in tmp_path.iterdir()} == {"rfsq", info.name}
    files = {path.name for path in (tmp_path / "rfsq").iterdir()}
    assert files == {"py.typed", *(path.name for path in (ROOT / "quantizers").glob("*.py"))}
    needs = importlib.metadata.PathDistribution(info).requires
    assert [need for need in needs if "extra ==" not in need] == ["torch>=2.6"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


FAKE_PYTHON = """#!/bin/sh
case "$*" in
    *fcntl*) exec {python} "$@" ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip "*) echo installed >> {log} && sleep 1 ;;
esac
"""


@pytest.mark.parametrize("needs, installs", [("", False), ("no_such_module", True)])
def test_an_active_environment_that_has_everything_is_used(needs, installs, tmp_path):
    (tmp_path / "scripts").mkdir()
    setup = shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    (tmp_path / "pyproject.toml").touch()
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(FAKE_PYTHON.format(python=sys.executable, log=log))
    python.chmod(0o755)
    here = Path(sys.executable).parent
    variables = {**os.environ, "PYTHON": str(python), "VIRTUAL_ENV": str(here), "NEEDS": needs}
    variables["PATH"] = f"{here}:{variables['PATH']}"
    variables.pop("VENV", None)
    command = ["bash", "-euc", f"source {setup} && command -v python"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    used = tmp_path / ".venv" / "bin" if installs else here
    assert done.stdout.splitlines()[-1] == str(used / "python") and log.exists() is installs


def test_two_scripts_that_start_at_once_install_once(tmp_path):
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(FAKE_PYTHON.format(python=sys.executable, log=log))
    python.chmod(0o755)
    variables = {**os.environ, "PYTHON": str(python), "VENV": str(tmp_path / "venv")}
    command = ["bash", "-euc", f"source {ROOT / 'scripts/setup.sh'} && command -v python"]
    options = dict(env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    scripts = [subprocess.Popen(command, **options) for _ in range(2)]
    for script in scripts:
        output, errors = script.communicate()
        assert script.returncode == 0 and not errors
        assert output.splitlines()[-1] == str(tmp_path / "venv" / "bin" / "python")
    assert log.read_text() == "installed\n"
