import math
import os

import pytest
import torch
from hypothesis import settings

import output
from arguments import get_args
from checkpoint import save_checkpoint
from model import VQVAE

# The same examples in every run, and no limit on a machine that is busy with something else.
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")

# No machine is so slow that its tests print how far they are.
output.SECONDS_A_LINE = math.inf

# The tensors are small: a second thread costs more than it saves.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# Of the compiler too: it compiles in the process that asks, and starts no pool of others.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def torch_home(tmp_path_factory):
    """No test depends on the LPIPS weights that this machine has, or has not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def no_lpips(monkeypatch, tmp_path):
    """An empty cache of LPIPS weights and no way to fill it: no network, and no weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def make_checkpoint(path, *flags, contrast=1.0):
    """A model that has seen two batches, so that running statistics and codebooks are not new.

    Its latents are spread over the codes, and its images, with a `contrast` above 1, over [0, 1].
    """
    torch.manual_seed(1)
    args = get_args(flags)
    model = VQVAE(args)
    with torch.no_grad():
        for network, factor in ((model.encoder, 5), (model.decoder, contrast)):
            weight = network.layers[-1].weight
            if not weight.any():  # of the dct network, which starts as zero there
                torch.nn.init.normal_(weight, std=0.05)
            weight.mul_(factor)
        for _ in range(2):
            model(torch.rand(4, 3, 32, 32))
    save_checkpoint(path, {"model": model.state_dict(), "args": vars(args), "step": 2})


# Whole files of runs, scripts and processes; and, in the others, what compiles or starts a process.
SLOW_FILES = [
    "board",
    "benchmark",
    "compress",
    "docs",
    "frozen",
    "hosts",
    "pack",
    "package",
    "processes",
    "rate_distortion",
    "report",
    "resume",
    "stages",
    "step",
    "train",
]
SLOW_NAMES = (
    "compile",
    "kill",
    "graph",
    "process",
    "mutations",
    "gradcheck",
    "any_size",
    "lossless",
    "inception",
)


def pytest_collection_modifyitems(items):
    """Mark as `slow` what `./scripts/test.sh -m "not slow"` leaves out."""
    for item in items:
        in_slow_file = item.path.stem.removeprefix("test_") in SLOW_FILES
        if in_slow_file or any(word in item.name for word in SLOW_NAMES):
            item.add_marker(pytest.mark.slow)
