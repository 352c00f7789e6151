"""The training step: one graph, no wait for the device, the same numbers however it is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import GROUP_OF_ONE
from torch.utils._python_dispatch import TorchDispatchMode

import train
from arguments import get_args
from dataset.synthetic import SyntheticDataset
from loss import TrainingLoss
from model import VQVAE

QUANTIZERS = {
    "fsq": ["--quantizer=fsq"],
    "none": ["--rfsq-strategy=none"],
    "scale": ["--rfsq-strategy=scale"],
    "layernorm": ["--rfsq-stages=4"],
    "image": ["--rfsq-statistics=image"],
    "dct": ["--network=dct", "--rfsq-strategy=geometric"],
    "lfq": ["--quantizer=lfq"],
    "ema": ["--quantizer=ema", "--n-embed=32", "--embed-dim=8", "--ema-stages=2"],
}
every = pytest.mark.parametrize("flags", QUANTIZERS.values(), ids=QUANTIZERS.keys())


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    """Dynamo counts the models that it compiles the same code for, and stops at eight."""
    torch._dynamo.reset()


class PerceptualStandIn(torch.nn.Module):
    """A frozen network with the interface of LPIPS, for there are no weights in a test."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, stride=2).requires_grad_(False)

    def forward(self, images, reconstruction):
        with torch.no_grad():
            target = self.conv(images)
        return (self.conv(reconstruction) - target).float().square().mean((1, 2, 3))


def build(flags, bf16=False):
    torch.manual_seed(0)
    model = VQVAE(get_args(["--channel=16", *flags]))
    step = train.TrainingStep(model, TrainingLoss(1, 1, 1, PerceptualStandIn()), bf16)
    return step.to(memory_format=torch.channels_last).train()


def batch(count=4):
    return torch.stack([SyntheticDataset(32, 0, count)[i] for i in range(count)])


def test_a_bad_step_is_skipped_and_marked():
    step = build([])
    adam = torch.optim.Adam(step.model.parameters(), lr=0.01, fused=True)
    parameters, parts = list(step.model.parameters()), []
    before = [p.detach().clone() for p in parameters]

    def bad_step(images):
        terms, indices = step(images)
        return {**terms, "loss": terms["loss"] * torch.inf}, indices

    for module, bad in ((bad_step, 1.0), (step, 0.0)):
        result = train.optimise(module, adam, parameters, batch(), 1.0, mark=parts.append)
        same = all(map(torch.equal, before, parameters))
        assert (result.bad.item(), same) == (bad, bad == 1.0)
    assert parts == 2 * ["forward", "backward", "optimizer"]
    assert result.indices.shape == (4, 8, 8, 2) and result.norm > 0


def test_every_term_has_a_gradient():
    step = build(["--quantizer=lfq"])
    encoder, decoder = (net.layers[0].weight for net in (step.model.encoder, step.model.decoder))
    terms, _ = step(batch())
    for name, weight in (("l1", decoder), ("perceptual", decoder), ("quantizer", encoder)):
        assert torch.autograd.grad(terms[name], weight, retain_graph=True)[0].any(), name


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_the_gradient_is_clipped_to_its_bound_and_by_zero_not_at_all(clip):
    step = build(["--quantizer=fsq"])
    step.criterion.weights["l1"] = 1e4  # a gradient far above the bound
    parameters = list(step.model.parameters())
    adam = torch.optim.Adam(parameters, fused=True)
    before = train.optimise(step, adam, parameters, batch(), clip).norm
    after = torch.stack([p.grad.norm() for p in parameters]).norm()
    assert before > 100
    assert after.item() == pytest.approx(clip or before.item(), rel=1e-4)


def run(step):
    terms, indices = step(batch())
    terms["loss"].backward()
    return terms, indices, [p.grad for p in step.model.parameters()]


@every
def test_no_graph_break_in_bf16(flags):
    """In float32, `test_compiled_step_equals_eager` compiles with `fullgraph`, which says so."""
    report = torch._dynamo.explain(build(flags, bf16=True))(batch())
    assert (report.graph_count, report.graph_break_count) == (1, 0), report.break_reasons


@every
def test_compiled_step_equals_eager(flags):
    eager, compiled = build(flags), build(flags)
    compiled.compile(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        (terms, indices, grads), (c_terms, c_indices, c_grads) = run(eager), run(compiled)
        assert torch.equal(indices, c_indices)
        for name, value in terms.items():
            torch.testing.assert_close(c_terms[name], value, rtol=1e-5, atol=1e-6)
        for grad, c_grad in zip(grads, c_grads, strict=True):
            torch.testing.assert_close(c_grad, grad, rtol=1e-4, atol=1e-6)
    state, c_state = eager.model.state_dict(), compiled.model.state_dict()
    for name in state:
        torch.testing.assert_close(c_state[name], state[name], rtol=1e-5, atol=1e-6)


def test_compiled_by_the_real_compiler_equals_eager():
    """Inductor, which the default on a GPU runs, on the main configuration."""
    eager, compiled = build([]), build([])
    compiled.compile(fullgraph=True)
    (terms, indices, grads), (c_terms, c_indices, c_grads) = run(eager), run(compiled)
    assert (indices != c_indices).float().mean() < 1e-3  # a rounding error may cross a boundary
    torch.testing.assert_close(c_terms["loss"], terms["loss"], rtol=1e-4, atol=1e-5)
    for grad, c_grad in zip(grads, c_grads, strict=True):
        torch.testing.assert_close(c_grad, grad, rtol=1e-2, atol=1e-4)


@every
def test_bf16_is_close_to_float32_and_quantizes_in_float32(flags):
    full, half = build(flags), build(flags, bf16=True)
    seen = []
    quantizer = half.model.quantizer
    quantizer.register_forward_hook(
        lambda m, given, out: seen.append((given[0].dtype, out[0].dtype))
    )
    (terms, *_), (b_terms, *_) = run(full), run(half)
    assert seen == [(torch.bfloat16, torch.float32)]
    assert all(term.dtype == torch.float32 for term in b_terms.values())
    torch.testing.assert_close(b_terms["l1"], terms["l1"], rtol=0.02, atol=0)
    assert not torch.equal(b_terms["l1"], terms["l1"])


def test_channels_last_all_the_way_and_equal_to_contiguous():
    step = build([])
    layouts = []

    def look(module, given, out):
        layouts.append(out.is_contiguous(memory_format=torch.channels_last))

    for module in step.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            module.register_forward_hook(look)
    _, indices, grads = run(step)
    assert len(layouts) >= 6 and all(layouts)
    plain = build([])
    plain.to(memory_format=torch.contiguous_format)
    _, plain_indices, plain_grads = run(plain)
    assert (indices != plain_indices).float().mean() < 1e-3
    for grad, other in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-5)


class Reads(TorchDispatchMode):
    """Counts the operations that read a value of a tensor, for which a GPU's host must wait."""

    WAITS = ("_local_scalar_dense", "nonzero", "unique", "equal.", "masked_select", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += any(name in str(func) for name in self.WAITS)
        return func(*args, **(kwargs or {}))


@every
def test_no_wait_between_log_lines(flags, tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.SYNTHETIC_VAL", 2)

    def reads(steps: int) -> int:
        # However many steps, there is one log line, one checkpoint and one evaluation.
        fixed = ["--log-interval=100", "--save-interval=100", f"--save={tmp_path / str(steps)}"]
        small = ["--img-size=32", "--channel=16", "--batch-size=4", "--num-workers=0"]
        data = ["--train-data-path=synthetic", "--val-data-path=synthetic", "--perceptual-weight=0"]
        with Reads() as mode:
            train.main([*small, *data, *fixed, *flags, f"--train-iters={steps}"])
        return mode.count

    few, many = reads(2), reads(6)
    assert 0 < few == many


def test_precision_and_compile_flags_are_written_down(tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.SYNTHETIC_VAL", 2)
    flags = ["--img-size=32", "--channel=16", "--batch-size=4", "--num-workers=0"]
    flags += ["--train-data-path=synthetic", "--val-data-path=synthetic", "--perceptual-weight=0"]
    flags += ["--train-iters=1", f"--save={tmp_path / 'run'}"]
    assert train.main([*flags, "--precision=bf16"])["precision"] == "bf16"
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert record["peak_memory_mib"] > 100


IN_A_GROUP = """
import torch, train, util
from loss import TrainingLoss
from model import VQVAE
from arguments import get_args

graphs = []

def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward

util.setup_processes()
model = VQVAE(get_args(["--channel=256", "--img-size=32"])).train()
step = train.TrainingStep(model, TrainingLoss(1.0, 0.0, 1.0, None), bf16=True)
step.compile(fullgraph=True, backend=backend)
step = util.data_parallel(step)
parameters = list(model.parameters())
adam = torch.optim.Adam(parameters, fused=True)
images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
result = train.optimise(step, adam, parameters, images, 1.0)
print(len(graphs), result.bad.item())
"""


def test_one_graph_also_in_a_process_group():
    """DistributedDataParallel would cut it where its buckets of gradients end."""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", IN_A_GROUP],
        **dict(cwd=root, env=os.environ | GROUP_OF_ONE, capture_output=True, text=True),
    )
    assert done.stdout.split() == ["1", "0.0"], done.stderr
