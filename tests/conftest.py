import os

import pytest
import torch
from hypothesis import settings

# The same examples in every run, and no limit on a machine that is busy with something else.
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")

# The tensors are small: a second thread costs more than it saves.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


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
