"""VQ by moving averages against a reference of plain loops."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch

from quantizers import VectorQuantizeEMA, ema
from quantizers.ema import _argmin

DECAY, BETA = 0.9, 0.25


class Reference:
    """One stage, token by token, in double precision."""

    def __init__(self, codebook, threshold, stage, stages):
        self.codebook = np.array(codebook, dtype=np.float64)
        self.counts = np.zeros(len(codebook))
        self.sums = np.zeros_like(self.codebook)
        self.threshold = threshold
        self.shift, self.shift_by_batch = 7919 * stage, 7919 * stages

    def step(self, tokens):
        """Restart, assign, update; returns the codes of the tokens and their indices."""
        size, n = len(self.codebook), len(tokens)
        if self.threshold:
            for i in range(size):
                if self.counts[i] < self.threshold * n / size:
                    token = tokens[(i * n // size + self.shift) % n]
                    self.codebook[i] = token
                    self.counts[i] = n / size
                    self.sums[i] = token * n / size
        index = [int(np.argmin([((t - c) ** 2).sum() for c in self.codebook])) for t in tokens]
        codes = self.codebook[index].copy()
        for i in range(size):
            mine = [t for t, j in zip(tokens, index, strict=True) if j == i]
            self.counts[i] = DECAY * self.counts[i] + (1 - DECAY) * len(mine)
            self.sums[i] = DECAY * self.sums[i] + (1 - DECAY) * np.sum(mine, axis=0)
        total = self.counts.sum()
        for i in range(size):
            if self.counts[i] > 0:
                smoothed = (self.counts[i] + 1e-5) / (total + size * 1e-5) * total
                self.codebook[i] = self.sums[i] / smoothed
        self.shift += self.shift_by_batch
        return codes, index


def clustered(batch, dim, side):
    """Tokens around a few moving centres, so that codes die and are restarted."""
    centres = 3 * torch.randn(3, dim)
    pick = torch.randint(3, (batch, side, side))
    return (centres[pick] + 0.3 * torch.randn(batch, side, side, dim)).movedim(-1, 1).contiguous()


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("threshold", [0, 0.5, 0.9])  # 0.9 restarts codes in every step
def test_steps_equal_the_reference(stages, threshold):
    size, dim = 11, 3
    vq = VectorQuantizeEMA(size, dim, stages, DECAY, BETA, restart_threshold=threshold)
    references = [
        Reference(codebook.tolist(), threshold, stage, stages)
        for stage, codebook in enumerate(vq.codebook)
    ]
    for _ in range(6):
        z = clustered(4, dim, 3)
        quantized, indices, loss = vq(z)
        r = z.movedim(1, -1).reshape(-1, dim).double().numpy()
        total, wanted_loss = np.zeros_like(r), 0.0
        for stage, reference in enumerate(references):
            codes, index = reference.step(r)
            mine = indices[..., stage] if stages > 1 else indices
            assert mine.flatten().tolist() == index
            r, total = r - codes, total + codes
            wanted_loss += BETA * (r**2).mean()
        np.testing.assert_allclose(quantized.movedim(1, -1).reshape(-1, dim), total, atol=2e-5)
        assert loss.item() == pytest.approx(wanted_loss, rel=1e-4)
        for stage, reference in enumerate(references):
            np.testing.assert_allclose(vq.counts[stage], reference.counts, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(vq.sums[stage], reference.sums, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(vq.codebook[stage], reference.codebook, rtol=1e-4, atol=1e-4)


def test_the_first_batch_initialises_the_codebook():
    vq = VectorQuantizeEMA(16, 4, decay=0.99)
    z = 0.1 * torch.randn(4, 4, 8, 8) + 50  # far from where the codebook starts
    quantized, indices, _ = vq(z)
    tokens = {tuple(token) for token in z.movedim(1, -1).reshape(-1, 4).tolist()}
    codes = torch.unique(quantized.detach().movedim(1, -1).reshape(-1, 4), dim=0)
    assert len(codes) == 16 == len(torch.unique(indices))
    assert all(tuple(code) in tokens for code in codes.tolist())
    assert (vq.codebook - 50).abs().max() < 1


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_every_stage_starts_with_a_codebook(stages):
    """A token that a stage takes as a code leaves nothing over: the next one must take others."""
    vq = VectorQuantizeEMA(16, 4, stages)
    z = torch.randn(8, 4, 8, 8)
    _, indices, _ = vq(z)
    for stage in range(stages):
        assert len(torch.unique(indices[..., stage])) >= 14
    errors = [
        (vq.indices_to_codes(indices[..., : k + 1]) - z).square().mean() for k in range(stages)
    ]
    for before, after in itertools.pairwise(errors):
        assert after < 0.9 * before


def test_fewer_tokens_than_codes():
    vq = VectorQuantizeEMA(64, 4)
    z = torch.randn(2, 4, 3)
    quantized, indices, _ = vq(z)
    assert torch.equal(quantized.detach(), z)  # every token is a code
    assert torch.isfinite(vq.codebook).all() and indices.max() < 64


def test_dead_codes_come_back_and_without_a_random_number():
    vq = VectorQuantizeEMA(8, 2, decay=0.5)
    for _ in range(3):
        vq(torch.randn(8, 2, 8))
    vq.codebook[0, 3] = 1e6
    vq.counts[0, 3] = 0
    vq.sums[0, 3] = 0
    other = copy.deepcopy(vq)
    z, state = torch.randn(8, 2, 8), torch.get_rng_state()
    _, indices, _ = vq(z)
    assert torch.equal(torch.get_rng_state(), state)
    assert vq.codebook[0, 3].abs().max() < 10 and (indices == 3).any()
    torch.rand(5)
    other(z)
    for mine, its in zip(vq.buffers(), other.buffers(), strict=True):
        assert torch.equal(mine, its)


def test_a_first_batch_that_is_not_finite_starts_no_codebook():
    vq = VectorQuantizeEMA(8, 2)
    before = vq.codebook.clone()
    z = torch.randn(8, 2, 8)
    z[0, 0, 0] = torch.nan
    vq(z)
    assert torch.equal(vq.codebook, before) and not vq.counts.any() and not vq.sums.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 3, 99])
def test_a_batch_that_is_not_finite_restarts_no_code(bad, place):
    """Also where the four evenly spaced vectors, to which dead codes move, are finite."""
    torch.manual_seed(0)
    vq = VectorQuantizeEMA(4, 2, decay=0.5)
    for first in (True, False):
        before = {name: getattr(vq, name).clone() for name in ("codebook", "counts", "sums")}
        z = torch.randn(1, 2, 100) + 50
        z[0, 0, place] = bad
        vq(z)
        assert all(torch.equal(getattr(vq, name), value) for name, value in before.items())
        if first:
            vq(torch.randn(1, 2, 100))
            for _ in range(2):  # vectors of one code alone: the others die
                vq(vq.codebook[0, :1].mT[None] + 1e-3 * torch.randn(1, 2, 100))
            assert (vq.counts < 0.3 * vq.counts.mean()).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_later_batch_that_is_not_finite_moves_no_code(bad):
    vq = VectorQuantizeEMA(8, 2, restart_threshold=0)
    vq(torch.randn(8, 2, 8))
    before = {name: getattr(vq, name).clone() for name in ("codebook", "counts", "sums")}
    z = torch.randn(8, 2, 8)
    z[0, 0, 0] = bad
    vq(z)
    assert all(torch.equal(getattr(vq, name), value) for name, value in before.items())


def test_another_batch_gives_dead_codes_other_tokens():
    vq, z, starts = VectorQuantizeEMA(4, 2), torch.randn(10, 2, 100), []
    for _ in range(2):
        vq.counts.zero_()
        vq._restart(0, z.movedim(1, -1).reshape(-1, 2), torch.tensor([1000]))
        starts.append(vq.codebook.clone())
        vq(z)
    assert vq.batches == 2 and not torch.equal(*starts)


def test_without_restart_a_dead_code_stays_where_it_is():
    vq = VectorQuantizeEMA(8, 2, restart_threshold=0)
    vq.codebook[0, 3] = 1e6
    for _ in range(3):
        vq(torch.randn(8, 2, 8))
    assert (vq.codebook[0, 3] == 1e6).all() and torch.isfinite(vq.codebook).all()


def test_a_larger_batch_makes_no_code_dead():
    centres = 3 * torch.randn(16, 8)

    def batch(n):
        return (centres[torch.randint(16, (n,))] + 0.3 * torch.randn(n, 8)).t()[None]

    vq = VectorQuantizeEMA(32, 8)
    for _ in range(100):
        vq(batch(512))
    before = vq.codebook.clone()
    vq(batch(4096))
    assert ((vq.codebook - before).norm(dim=-1) < 0.2).float().mean() > 0.9


def test_live_codes_are_not_restarted():
    vq = VectorQuantizeEMA(2, 1, decay=0.5)
    z = torch.tensor([[-1.0], [1.0]]).repeat(8, 1)
    for _ in range(20):
        vq(z)
    assert sorted(vq.codebook.flatten().tolist()) == pytest.approx([-1, 1], abs=1e-4)
    assert vq.counts.flatten().tolist() == pytest.approx([8, 8])


def test_nearest_code_is_the_nearest():
    vq = VectorQuantizeEMA(300, 6).eval()
    z = torch.randn(2, 6, 20, 20)
    tokens = z.movedim(1, -1).reshape(-1, 6).double()
    wanted = torch.cdist(tokens, vq.codebook[0].double()).argmin(1)
    assert torch.equal(vq(z)[1].flatten(), wanted)


def test_the_nearest_code_far_from_zero():
    torch.manual_seed(0)
    vq = VectorQuantizeEMA(256, dim=8).eval()
    vq.codebook.add_(10_000)
    z = 10_000 + torch.randn(1, 8, 500)
    exact = torch.cdist(z[0].t().double(), vq.codebook[0].double())
    index = vq(z)[1]
    assert torch.equal(exact.gather(1, index[0][:, None]), exact.amin(1, keepdim=True))


@pytest.mark.parametrize("chunk", [1, 640, 10_000])
def test_chunks_do_not_change_the_result(monkeypatch, chunk):
    vq = VectorQuantizeEMA(64, 4, stages=2).eval()
    z = torch.randn(2, 4, 9, 9)
    _, whole, _ = vq(z)
    monkeypatch.setitem(ema.CHUNK, "cpu", chunk)
    assert torch.equal(vq(z)[1], whole)


def test_gradients_by_hand():
    vq = VectorQuantizeEMA(16, 4, stages=2, commitment_loss_weight=0.7).eval()
    z = torch.randn(3, 4, 5, requires_grad=True)
    quantized, indices, loss = vq(z)
    upstream = torch.randn_like(z)
    (gradient,) = torch.autograd.grad((quantized * upstream).sum(), z, retain_graph=True)
    assert torch.equal(gradient, upstream)
    (gradient,) = torch.autograd.grad(loss, z)
    first = z - vq.indices_to_codes(indices[..., :1])
    second = z - vq.indices_to_codes(indices)
    torch.testing.assert_close(gradient, 0.7 * 2 * (first + second) / z.numel())


def test_the_codebook_takes_no_gradient():
    vq = VectorQuantizeEMA(16, 4)
    assert not list(vq.parameters())
    z = torch.randn(3, 4, 5, requires_grad=True)
    vq(z)
    vq(z)[2].backward()
    assert not any(buffer.requires_grad for buffer in vq.buffers())


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"codebook_size": 1}, "codebook_size.*1"),
        ({"codebook_size": 8.0}, "codebook_size.*8.0"),
        ({"dim": 0}, "dim.*0"),
        ({"stages": 0}, "stages.*0"),
        ({"decay": 1}, "decay.*1"),
        ({"decay": -0.1}, "decay.*-0.1"),
        ({"restart_threshold": 1}, "restart_threshold.*1"),
        ({"commitment_loss_weight": -0.1}, "commitment_loss_weight.*-0.1"),
    ],
)
def test_arguments_that_cannot_be(kwargs, named):
    with pytest.raises(ValueError, match=named):
        VectorQuantizeEMA(**kwargs)


@pytest.mark.parametrize("index", [-1, 8])
def test_indices_out_of_range(index):
    with pytest.raises(ValueError, match=f"0 to 7.*{index}"):
        VectorQuantizeEMA(8, 2).indices_to_codes(torch.tensor([[index]]))


def test_wrong_number_of_channels_names_both():
    with pytest.raises(ValueError, match=r"256 channels.*has 4"):
        VectorQuantizeEMA()(torch.randn(2, 4, 3))


@pytest.mark.parametrize("codes", [64, 100])  # whole blocks, and not
def test_of_equal_codes_the_first_is_nearest(codes):
    errors = torch.randint(0, 9, (50, codes)).float() - 4
    first = [row.index(min(row)) for row in errors.tolist()]
    assert _argmin(errors).tolist() == first
    assert _argmin(errors.clone().fill_(math.nan)).max() < codes
