"""Quantizers inside models of other projects: how those load, cast, compile and differentiate."""

import copy
from pathlib import Path

import pytest
import torch
from cases import CASES, latent, run, same_bits, trained

ROOT = Path(__file__).parent.parent

every = pytest.mark.parametrize("name", CASES)
HALF = [torch.float16, torch.bfloat16]


def assert_same(module, other):
    """Equal outputs, bit for bit, of two quantizers in evaluation mode."""
    z = latent(module)
    wanted, wanted_indices, _ = run(module.eval(), z)
    quantized, indices, side = run(other.eval(), z)
    assert torch.equal(indices, wanted_indices) and same_bits(quantized, wanted)
    assert same_bits(other.indices_to_codes(indices, *side), wanted)


# ---------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------
def to_empty(module, state):
    module.to_empty(device="cpu").load_state_dict(state, strict=True)


def assign(module, state):
    module.load_state_dict(state, strict=True, assign=True)


def one_by_one(module, state):
    """As transformers' `from_pretrained`: tensors not in the checkpoint come back uninitialised."""
    for part in module.modules():
        for key in part._non_persistent_buffers_set:
            part._buffers[key] = torch.full_like(part._buffers[key], -7, device="cpu")
    for key, value in state.items():
        parent, _, leaf = key.rpartition(".")
        module.get_submodule(parent).load_state_dict({leaf: value}, strict=False, assign=True)


@every
@pytest.mark.parametrize("load", [to_empty, assign, one_by_one])
def test_loading_through_the_meta_device(name, load):
    module = trained(name)
    with torch.device("meta"):
        other = CASES[name].build()
    assert all(x.is_meta for x in other.state_dict().values())
    load(other, copy.deepcopy(module.state_dict()))
    assert_same(module, other)


@every
def test_a_visit_to_the_meta_device_loses_no_constant(name):
    """Such as that of a program which counts parameters before it loads them."""
    module = trained(name)
    other = copy.deepcopy(module).to("meta")
    other.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert_same(module, other)
