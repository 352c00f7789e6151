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
