"""What only a GPU can show. Skipped where there is none; scripts/gpu_check.py runs this file."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CASES, TRACKING, latent, run, trained

import train
from meter import Meter
from quantizers import SVQ

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
TINY = ["--channel=16", "--img-size=32", "--batch-size=8", "--train-iters=12", "--log-interval=12"]
DATA = ["--train-data-path=synthetic", "--val-data-path=synthetic"]
DATA += ["--lpips-net=none", "--perceptual-weight=0"]
every = pytest.mark.parametrize("name", CASES)


@every
def test_indices_are_those_of_the_cpu(name):
    """A value on the edge of two codes may fall to either side: one in a thousand at most.

    Statistics of an image are rounded to half precision, which moves many values when they fall to
    the other side.
    """
    module = trained(name)
    z = torch.cat([latent(module) for _ in range(20)])
    _, wanted, _ = run(module, z)
    _, indices, _ = run(copy.deepcopy(module).cuda(), z.cuda())
    most = 2e-2 if module.side_bits else 1e-3
    assert (indices.cpu() != wanted).float().mean() <= most


@every
def test_decoding_gives_the_same_bits(name):
    module = trained(name).cuda()
    quantized, indices, side = run(module, latent(module).cuda())
    assert torch.equal(module.indices_to_codes(indices, *side), quantized)


@pytest.mark.parametrize("bits, dim", [(22, 20), (40, 12)])  # (40, 12): lengths of long runs
def test_compiled_search_gives_vectors_that_decode(bits, dim):
    svq = SVQ(bits, dim).cuda().train()
    z = torch.randn(4, dim, 32, 32, device="cuda") * torch.randn(4, 1, 32, 32, device="cuda").exp()
    for _ in range(5):
        svq(z)
    quantized, indices = torch.compile(svq.eval())(z)
    torch.testing.assert_close(quantized, svq.indices_to_codes(indices))


@every
def test_codes_are_those_of_the_cpu(name):
    module = trained(name)
    _, indices, side = run(module, latent(module))
    on_gpu = (value.cuda() for value in (indices, *side))
    codes = copy.deepcopy(module).cuda().indices_to_codes(*on_gpu)
    torch.testing.assert_close(codes.cpu(), module.indices_to_codes(indices, *side))


@pytest.mark.parametrize("name", TRACKING)
def test_statistics_move_as_on_the_cpu(name):
    module = trained(name).train()
    twin = copy.deepcopy(module).cuda()
    z = latent(module)
    run(module, z)
    run(twin, z.cuda())
    for key, value in module.state_dict().items():
        found = twin.state_dict()[key].cpu().to(value.dtype)
        torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("flags", [[], ["--quantizer=svq"], ["--quantizer=lfq"]], ids=str)
def test_no_step_waits_for_the_gpu(flags, tmp_path, monkeypatch):
    """From the third step to the log line, nothing may wait; in bf16, compiled as one graph."""
    count, update, log = [0], Meter.update, train.Training.log

    def strict_update(self, *args):
        update(self, *args)
        count[0] += 1
        if count[0] == 2:
            torch.cuda.set_sync_debug_mode("error")

    def relaxed_log(self, *args):
        torch.cuda.set_sync_debug_mode("default")
        log(self, *args)

    monkeypatch.setattr(Meter, "update", strict_update)
    monkeypatch.setattr(train.Training, "log", relaxed_log)
    try:
        train.main([*TINY, *DATA, *flags, f"--save={tmp_path / 'run'}", "--num-workers=0"])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert count[0] == 12
