"""What every quantizer promises (base.py), asked of each of them in the same words."""

import copy
import hashlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES, CHAINS, RESIDUAL, TRACKING, latent, run, same_bits, trained

from arguments import get_args
from quantizers import (
    FSQ,
    LFQ,
    QUANTIZERS,
    RFSQ,
    SVQ,
    GeometricRFSQ,
    Quantized,
    Quantizer,
    VectorQuantizeEMA,
    build_quantizer,
    counting,
    svq_search,
)

ROOT = Path(__file__).parent.parent

every = pytest.mark.parametrize("name", CASES)
residual = pytest.mark.parametrize("name", RESIDUAL)


def test_every_registered_quantizer_is_asked():
    known, asked = {*QUANTIZERS.values(), GeometricRFSQ}, {case.cls for case in CASES.values()}
    names = ", ".join(sorted(kind.__name__ for kind in known ^ asked))
    assert known == asked, f"{names}: CASES in tests/cases.py must hold every registered quantizer"
    assert all(issubclass(kind, Quantizer) for kind in known)


@pytest.mark.parametrize("kind", [int, np.int64, torch.tensor], ids=["int", "numpy", "torch"])
def test_integers_of_any_kind_are_taken(kind):
    two, levels = kind(2), [kind(4)] * 3
    for quantizer in (
        FSQ(levels),
        RFSQ(two, levels=levels),
        LFQ(kind(6), entropy_groups=two),
        VectorQuantizeEMA(kind(8), kind(3), two),
        SVQ(kind(10), kind(4), two, two),
    ):
        numbers = [quantizer.dim, *quantizer.codebook_sizes, *(quantizer.levels or [])]
        assert all(type(number) is int for number in numbers), quantizer.name


@pytest.mark.parametrize("name", TRACKING)
def test_a_single_vector_leaves_finite_statistics(name):
    """Its variance is 0, and by rounding it would be a little less."""
    for seed in range(20):
        quantizer = CASES[name].build().train()
        torch.manual_seed(seed)
        z = torch.randn(1, quantizer.dim, quantizer.group)
        assert all(quantizer(z)[0].isfinite().all() for _ in range(2))
        assert all(value.isfinite().all() for value in quantizer.state_dict().values())


# ---------------------------------------------------------------------------------------
# Flags and outputs
# ---------------------------------------------------------------------------------------
@every
def test_flags_build_the_same_quantizer(name):
    case = CASES[name]
    wanted, found = case.build(), build_quantizer(get_args(case.argv()))
    assert type(found) is type(wanted) and repr(found) == repr(wanted)
    for key, value in wanted.state_dict().items():
        other = found.state_dict()[key]
        assert other.shape == value.shape
        assert key == "codebook" or torch.equal(other, value)  # which starts at random


@pytest.mark.parametrize("kind", [*QUANTIZERS.values(), GeometricRFSQ])
def test_every_constructor_argument_has_a_flag(kind):
    """Except those that the command line leaves at their defaults."""
    parameters = set(inspect.signature(kind).parameters)
    assert set(kind.flags.values()) <= parameters
    assert parameters - set(kind.flags.values()) <= {"momentum", "restart_threshold"}
    assert set(kind.flags) <= set(vars(get_args([])))


@every
def test_outputs_have_names(name):
    module = trained(name)
    z = latent(module)
    values = module(z)
    assert type(values) is tuple and len(values) in (2, 3, 4)
    out = Quantized(*values)
    assert out.codes is values[0] and out.indices is values[1]
    assert (out.loss is None) == (len(values) == 2)
    assert (out.statistics is None) == (len(values) < 4) == (not module.side_bits)


# ---------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------
@every
@pytest.mark.parametrize("positions", [(), (7,), (5, 4), (2, 3, 4)], ids=len)
def test_indices_decode_to_the_same_bits(name, positions):
    module = trained(name)
    quantized, indices, side = run(module, latent(module, 3, positions))
    assert quantized.shape == (3, module.dim, *positions)
    stage_axis = (module.stages,) if module.stage_axis else ()
    assert indices.shape == (3, *positions, *stage_axis) and indices.dtype == torch.int64
    decoded = module.indices_to_codes(indices, *side)
    assert torch.equal(decoded, quantized)
    assert same_bits(decoded, quantized)


CHILD = """
import hashlib, sys, torch, quantizers
torch.set_num_threads(1)
for name, case in torch.load(sys.argv[1], weights_only=True).items():
    module = getattr(quantizers, case["kind"])(**case["kwargs"]).eval()
    module.load_state_dict(case["state"])
    codes = module.indices_to_codes(case["indices"], *case["side"])
    print(name, hashlib.sha256(codes.detach().contiguous().numpy().tobytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """name -> digest of the codes that this process has, and a fresh one has from files."""
    torch.manual_seed(1)
    here, cases = {}, {}
    for name, case in CASES.items():
        module = trained(name)
        with torch.no_grad():
            quantized, indices, side = run(module, latent(module))
        here[name] = hashlib.sha256(quantized.contiguous().numpy().tobytes()).hexdigest()
        cases[name] = {"kind": case.kind, "kwargs": case.arguments, "state": module.state_dict()}
        cases[name] |= {"indices": indices, "side": side}
    path = tmp_path_factory.mktemp("fresh") / "cases.pt"
    torch.save(cases, path)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.returncode == 0, child.stderr
    return here, dict(line.split() for line in child.stdout.splitlines())


@every
def test_a_fresh_process_decodes_the_same_bits(fresh, name):
    here, there = fresh
    assert there[name] == here[name]


@every
def test_batch_one_equals_batch_n(name):
    module = trained(name)
    z = latent(module, 4)
    quantized, indices, side = run(module, z)
    for image in range(4):
        alone, index, own = run(module, z[image : image + 1])
        assert torch.equal(index, indices[image : image + 1])
        assert torch.equal(alone, quantized[image : image + 1])
        decoded = module.indices_to_codes(index, *own)
        assert torch.equal(decoded, quantized[image : image + 1])
        decoded = module.indices_to_codes(
            indices[image : image + 1], *(x[image : image + 1] for x in side)
        )
        assert torch.equal(decoded, quantized[image : image + 1])


@pytest.mark.parametrize("name", [name for name in CASES if "image" not in name])
def test_equal_indices_give_equal_output(name):
    """Wherever a token stands and whatever it was before: its indices decide."""
    module = trained(name)
    z = latent(module, 4)
    quantized, indices, _ = run(module, z)
    tokens = quantized.movedim(1, -1).reshape(-1, module.dim)
    flat = indices.reshape(-1, *indices.shape[3:])
    assert torch.equal(module.indices_to_codes(flat), tokens)
    other, others, _ = run(module, z + 0.02 * torch.randn_like(z))
    equal = others == indices
    equal = equal.all(-1) if module.stage_axis else equal
    assert equal.sum() > 5
    assert torch.equal(other.movedim(1, -1)[equal], quantized.movedim(1, -1)[equal])


@residual
def test_the_first_stages_give_the_partial_sums(name):
    module = trained(name)
    z = latent(module)
    quantized, indices, side = run(module, z)
    errors = []
    for k in range(1, module.stages + 1):
        partial = module.indices_to_codes(indices[..., :k], *side)
        if k == 1:
            total = partial
        elif name in CHAINS:
            # A stage by itself is what its indices add, whatever the stages before it say.
            zero = torch.zeros_like(indices)
            zero[..., k - 1] = indices[..., k - 1]
            before = module.indices_to_codes(torch.zeros_like(indices)[..., : k - 1], *side)
            own = module.indices_to_codes(zero[..., :k], *side) - before
            total = total + own
            torch.testing.assert_close(partial, total, rtol=1e-5, atol=1e-5)
        errors.append((partial - z).square().mean().item())
    assert torch.equal(partial, quantized)
    assert errors == sorted(errors, reverse=True)
    if side:  # the statistics of the stages decoded are enough
        first = module.indices_to_codes(indices[..., :1], side[0][:, :1])
        assert torch.equal(first, module.indices_to_codes(indices[..., :1], *side))


@pytest.mark.parametrize("name", CHAINS)
def test_a_shorter_chain_is_the_start_of_a_longer_one(name):
    """The k-stage result is what a quantizer of k stages with the same weights gives.

    Not for geometric stages: the slope of their bound follows from the number of all cells.
    """
    module = trained(name)
    k = module.stages - 1
    levels = {"levels": module.levels} if CASES[name].kind == "RFSQ" else {}
    shorter = CASES[name].build(**levels, stages=k).eval()
    state = module.state_dict()
    shorter.load_state_dict({key: v[:k] if v.dim() else v for key, v in state.items()})
    z = latent(module)
    _, indices, side = run(module, z)
    quantized, first, _ = run(shorter, z)
    if not shorter.stage_axis:
        first = first.unsqueeze(-1)
    assert torch.equal(first, indices[..., :k])
    assert torch.equal(module.indices_to_codes(indices[..., :k], *side), quantized)


@every
def test_indices_of_any_integer_type_decode_alike(name):
    module = trained(name)
    _, indices, side = run(module, latent(module))
    types = ("int8", "int16", "int32", "uint8", "uint16", "uint32", "uint64")
    for dtype in (getattr(torch, name) for name in types):
        small = indices.clamp(max=min(indices.max().item(), torch.iinfo(dtype).max))
        wanted = module.indices_to_codes(small, *side)
        assert same_bits(module.indices_to_codes(small.to(dtype), *side), wanted)
    for value in (torch.tensor(-1, dtype=torch.int8), torch.tensor(2**63, dtype=torch.uint64)):
        beyond = value.expand(indices.shape)
        with pytest.raises(ValueError, match="run from 0 to"):
            module.indices_to_codes(beyond, *side)


@every
def test_codes_after_each_stage(name):
    module = trained(name)
    quantized, indices, side = run(module, latent(module))
    codes = module.codes_after_each_stage(indices, *side)
    assert len(codes) == module.stages and same_bits(codes[-1], quantized)
    for k, found in enumerate(codes, start=1):
        first = indices[..., :k] if module.stage_axis else indices
        assert same_bits(found, module.indices_to_codes(first, *side))
    if module.stages > 1:
        assert len(module.codes_after_each_stage(indices[..., :1], *side)) == 1
        errors = [(x - quantized).square().mean() for x in codes]
        assert errors == sorted(errors, reverse=True)


# ---------------------------------------------------------------------------------------
# Bits
# ---------------------------------------------------------------------------------------
@every
def test_bits_are_the_bits_of_the_indices(name):
    module = CASES[name].build()
    wanted = CASES[name].bits
    if wanted == int(wanted):
        assert module.bits == wanted
    assert module.bits == pytest.approx(wanted)
    assert isinstance(module.bits, float) and len(module.codebook_sizes) == module.stages
    top = torch.tensor([[size - 1 for size in module.codebook_sizes]])
    top = top if module.stage_axis else top[:, 0]
    side = (torch.ones(1, module.stages, 2, module.dim),) if module.side_bits else ()
    module.indices_to_codes(top, *side)
    for stage in range(module.stages):
        beyond = top.clone()
        beyond.view(1, -1)[0, stage] += 1
        with pytest.raises(ValueError, match="run from 0 to"):
            module.indices_to_codes(beyond, *side)


@every
def test_side_bits_are_the_numbers_that_forward_returns_beyond_the_indices(name):
    module = trained(name)
    *_, side = run(module, latent(module, 2))
    numbers = sum(x[0].numel() for x in side)
    assert module.side_bits == 16 * numbers
    assert (module.side_bits > 0) == name.endswith("image")


@every
def test_name_and_description(name):
    module = CASES[name].build()
    assert module.name == module.name.lower() and "/" not in module.name and " " not in module.name
    assert module.name in repr(module) and f"bits={module.bits:g}" in repr(module)


def test_names_are_not_shared():
    assert len({CASES[name].build().name for name in CASES}) == len(CASES)


# ---------------------------------------------------------------------------------------
# Inputs that are no numbers, and none at all
# ---------------------------------------------------------------------------------------
@every
@pytest.mark.parametrize("training", [False, True])
def test_indices_are_in_range_whatever_the_input(name, training):
    module = trained(name).train(training)
    for value in (float("nan"), float("inf"), -float("inf"), 3e38, -3e38):
        for where in (torch.rand(3, module.dim, 5, 4) < 0.1, True):
            z = latent(module).masked_fill(torch.as_tensor(where), value)
            _, indices, side = run(module, z)
            for index, size in zip(
                indices.reshape(-1, module.stages).t(), module.codebook_sizes, strict=True
            ):
                assert index.min() >= 0 and index.max() < size, value
            module.indices_to_codes(indices, *side)


@every
def test_a_nan_is_seen_in_the_codes(name):
    """As indices it would be valid codes, and an evaluation would report a broken model."""
    module = trained(name).eval()
    z = latent(module)
    z[0, 0, 0, 0] = float("nan")
    assert run(module, z)[0][0, 0, 0, 0].isnan()


@every
@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 5, 0)])
def test_an_empty_input_is_named(name, shape):
    module = trained(name)
    z = torch.randn(shape[0], module.dim, *shape[1:])
    before = copy.deepcopy(module.state_dict())
    for mode in (False, True):
        with pytest.raises(ValueError, match=r"empty.*shape \(\d, .*at least one"):
            module.train(mode)(z)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])


# ---------------------------------------------------------------------------------------
# Precision
# ---------------------------------------------------------------------------------------
@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_precision_in_is_float32_inside(name, dtype):
    module = trained(name)
    z = latent(module).to(dtype)
    quantized, indices, _ = run(module, z)
    wanted, wanted_indices, _ = run(module, z.float())
    assert quantized.dtype == dtype
    assert torch.equal(quantized, wanted.to(quantized.dtype)) and torch.equal(
        indices, wanted_indices
    )


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(name, dtype):
    module = trained(name)
    z = latent(module)
    wanted, wanted_indices, *rest = module(z)
    with torch.autocast("cpu", dtype=dtype):
        quantized, indices, *rest_autocast = module(z)
        side = tuple(rest_autocast[1:])
        decoded = module.indices_to_codes(indices, *side)
    assert same_bits(quantized, wanted) and torch.equal(indices, wanted_indices)
    assert torch.equal(decoded, wanted)
    for one, two in zip(rest, rest_autocast, strict=True):
        assert same_bits(one, two)


@every
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_a_cast_of_the_module_leaves_it_float32(name, cast):
    module = trained(name)
    z = latent(module)
    wanted, wanted_indices, _ = run(module, z)
    before = copy.deepcopy(module.state_dict())
    around = torch.nn.Sequential(torch.nn.Linear(2, 2), module)
    getattr(around, cast)()
    assert around[0].weight.dtype != torch.float32
    for tensor in (*module.parameters(), *module.buffers()):
        assert tensor.dtype == torch.float32 or not tensor.is_floating_point()
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])
    quantized, indices, _ = run(module, z)
    assert same_bits(quantized, wanted) and torch.equal(indices, wanted_indices)


# ---------------------------------------------------------------------------------------
# State
# ---------------------------------------------------------------------------------------
@every
def test_the_input_is_not_modified(name):
    module = trained(name)
    for mode in (False, True):
        z = latent(module)
        before = z.clone()
        module.train(mode)(z)
        assert torch.equal(z, before)


@every
def test_evaluation_changes_no_state_and_training_only_running_statistics(name):
    module = trained(name)
    before = copy.deepcopy(module.state_dict())
    _, indices, side = run(module, latent(module))
    module.indices_to_codes(indices, *side)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key
    module.train()(latent(module))
    changed = [k for k, value in module.state_dict().items() if not torch.equal(value, before[k])]
    assert bool(changed) == (name in TRACKING)
    assert not set(changed) & {key for key, _ in module.named_parameters()}


@every
def test_two_forwards_of_one_input_are_equal(name):
    module = trained(name)
    z = latent(module)
    for one, two in zip(module(z), module(z), strict=True):
        assert torch.equal(one, two)


@every
def test_an_evaluation_asks_no_other_process(name, monkeypatch):
    """Processes may have different numbers of batches there: one that asks would wait for ever."""
    module = CASES[name].build()
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)  # to ask is an error
    module.eval()(latent(module))
    if name in TRACKING or name.startswith("lfq"):
        with pytest.raises(ValueError, match="process group"):
            module.train()(latent(module))


@every
def test_copies_after_a_forward(name, tmp_path):
    module = CASES[name].build()
    z = latent(module).requires_grad_()
    module(z)[0].sum().backward()
    module(z)
    path = tmp_path / "state.pt"
    torch.save(module.state_dict(), path)
    loaded = CASES[name].build()
    loaded.load_state_dict(torch.load(path, weights_only=True))
    torch.save(module, path)
    whole = torch.load(path, weights_only=False)
    wanted, indices, *_ = module.eval()(z)
    for twin in (copy.deepcopy(module), loaded, whole):
        quantized, found, *_ = twin.eval()(z)
        assert same_bits(quantized, wanted) and torch.equal(found, indices)


@every
def test_two_forwards_before_one_backward(name):
    """Statistics that a second forward moves must not reach the first one's graph."""
    module = CASES[name].build()
    one, two = latent(module).requires_grad_(), latent(module).requires_grad_()
    first, second = module(one), module(two)
    (first[0].sum() + second[0].sum()).backward()
    assert torch.isfinite(one.grad).all() and torch.isfinite(two.grad).all()


@every
def test_memory_layout_of_the_input_does_not_matter(name):
    module = trained(name)
    z = latent(module)
    wanted, wanted_indices, _ = run(module, z)
    quantized, indices, _ = run(module, z.to(memory_format=torch.channels_last))
    assert torch.equal(indices, wanted_indices)
    torch.testing.assert_close(quantized, wanted)


# ---------------------------------------------------------------------------------------
# Compilation
# ---------------------------------------------------------------------------------------
COMPILED = [(name, True) for name in CASES] + [(name, False) for name in TRACKING]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "training"), COMPILED)
def test_compiled_equals_eager(name, training, monkeypatch):
    """One graph without a break; values, gradients and statistics."""
    torch._dynamo.reset()
    # What operators compile on their own takes a while; test_svq.py has a test of it.
    for inside in (counting, svq_search):
        monkeypatch.setattr(inside, "compiled_form", lambda function: function)
    eager = trained(name).train(training)
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    one = latent(eager).requires_grad_()
    two = one.detach().clone().requires_grad_()
    results = eager(one), compiled(two)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(one)
    for result in results:
        loss = result[2] if len(result) == 3 else 0.0
        ((result[0] * upstream).sum() + loss).backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-5)
    for a, b in zip(eager.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    for a, b in zip(eager.buffers(), module.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@every
def test_indices_that_are_no_tensor_are_named(name):
    module = CASES[name].build()
    with pytest.raises(ValueError, match="indices must be a tensor, not list"):
        module.indices_to_codes([[0, 0]])
