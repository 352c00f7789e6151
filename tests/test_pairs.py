"""Pairs of neighbouring positions: the transform, the order of tokens, what it gains."""

from __future__ import annotations

import pytest
import torch

from quantizers import FSQ, RFSQ, SVQ, Pairs, VectorQuantizeEMA

MAKERS = {
    "svq": lambda: SVQ(20, dim=12, classes=4, stages=4),
    "one-token": lambda: SVQ(18, dim=12, classes=4, stages=2),
    "ema": lambda: VectorQuantizeEMA(32, 12, stages=4, decay=0.5),
    "rfsq": lambda: RFSQ(stages=2, strategy="layernorm", levels=[4, 4, 3, 3]),
}


def smooth(n, channels=6, width=8):
    """Neighbours that are alike (n, channels, 3, width)."""
    z = torch.randn(n, channels, 3, width // 2).repeat_interleave(2, -1)
    return (z + 0.2 * torch.randn_like(z)) * torch.linspace(2, 0.3, channels)[:, None, None]


def trained(name):
    torch.manual_seed(0)
    pairs = Pairs(MAKERS[name]())
    for _ in range(4):
        pairs(smooth(8, pairs.dim))
    return pairs.eval()


@pytest.mark.parametrize("name", MAKERS)
def test_it_is_the_quantizer_of_sums_and_differences(name):
    pairs = trained(name)
    z = smooth(2, pairs.dim)
    codes, indices = pairs(z)[:2]
    left, right = z[..., ::2], z[..., 1::2]
    inner_codes, inner = pairs.quantizer(torch.cat([left + right, left - right], 1) / 2**0.5)[:2]
    total, difference = inner_codes.chunk(2, 1)
    torch.testing.assert_close(codes[..., ::2], (total + difference) / 2**0.5)
    torch.testing.assert_close(codes[..., 1::2], (total - difference) / 2**0.5)
    indices = indices if pairs.stage_axis else indices[..., None]
    assert torch.equal(indices[..., ::2, :], inner[..., ::2])
    assert torch.equal(indices[..., 1::2, :], inner[..., 1::2])
    assert pairs.bits * 2 == pairs.quantizer.bits


@pytest.mark.parametrize("name", MAKERS)
def test_it_keeps_the_contract(name):
    pairs = trained(name)
    z = smooth(3, pairs.dim).requires_grad_()
    codes, indices = pairs(z)[:2]
    assert codes.shape == z.shape and torch.equal(pairs.indices_to_codes(indices), codes)
    assert indices.shape == (3, 3, 8, *([pairs.stages] if pairs.stage_axis else []))
    (gradient,) = torch.autograd.grad(codes.sum(), z)
    assert gradient.isfinite().all() and gradient.any()
    after = pairs.codes_after_each_stage(indices)
    assert len(after) == pairs.stages and torch.equal(after[-1], codes)
    copy = Pairs(MAKERS[name]())
    copy.load_state_dict(pairs.state_dict())
    assert torch.equal(copy.indices_to_codes(indices), codes)
    state = [value.clone() for value in pairs.freeze().state_dict().values()]
    pairs.train()(smooth(2, pairs.dim))
    pairs.quantizer.train()(smooth(2, 2 * pairs.dim))
    assert all(map(torch.equal, state, pairs.state_dict().values()))
    # As in a host that gives and takes the gradients of all that it holds.
    assert not pairs.requires_grad_(True).indices_to_codes(indices).requires_grad
    assert pairs.unfreeze().quantizer.training
    assert not pairs.eval().freeze().freeze().unfreeze().quantizer.training


def test_pairs_of_pairs_ask_for_four():
    quads = Pairs(Pairs(SVQ(40, dim=16, stages=4)))
    assert quads.group == 4 and quads.dim == 4
    codes, indices = quads(torch.randn(2, 4, 8))
    assert indices.shape == (2, 8) and torch.equal(quads.eval().indices_to_codes(indices), codes)


def test_the_loss_is_that_of_the_quantizer():
    pairs = trained("ema")
    z = smooth(2, pairs.dim).requires_grad_()
    left, right = z[..., ::2], z[..., 1::2]
    wanted = pairs.quantizer(torch.cat([left + right, left - right], 1) / 2**0.5)[2]
    loss = pairs(z)[2]
    torch.testing.assert_close(loss, wanted)
    gradient, of_wanted = (torch.autograd.grad(x, z)[0] for x in (loss, wanted))
    torch.testing.assert_close(gradient, of_wanted)
    assert gradient.any()


def test_the_gradient_is_straight_through():
    pairs = trained("ema")  # SVQ has a gradient of its own
    z, weight = smooth(2).requires_grad_(), torch.randn(2, 6, 3, 8)
    (gradient,) = torch.autograd.grad((pairs(z)[0] * weight).sum(), z)
    torch.testing.assert_close(gradient, weight)


def test_neighbours_that_are_alike_need_fewer_bits():
    torch.manual_seed(0)
    errors = []
    for quantizer in (SVQ(12, dim=6, stages=2), Pairs(SVQ(24, dim=12, stages=4))):
        for _ in range(30):
            quantizer(smooth(20))
        assert quantizer.bits == 12
        z = smooth(100)
        errors.append((quantizer.eval()(z)[0] - z).square().mean().log10() * 10)
    assert errors[1] < errors[0] - 2  # dB


@pytest.mark.parametrize(
    "make",
    [
        lambda: FSQ([4, 4]),  # one stage
        lambda: SVQ(21, dim=4, stages=2),  # tokens of 11 and 10 bits
        lambda: SVQ(22, dim=5, stages=2),
        lambda: RFSQ(stages=2, strategy="layernorm", statistics="image"),
    ],
)
def test_quantizers_that_have_no_halves_are_refused(make):
    with pytest.raises(ValueError, match="even number of channels, stages in pairs of equal"):
        Pairs(make())


def test_stages_that_would_be_dropped_apart_are_refused():
    with pytest.raises(ValueError, match="cannot be dropped apart"):
        Pairs(RFSQ(stages=2, strategy="layernorm", stage_dropout=0.5))


@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (2, 6)])
def test_an_odd_axis_is_refused(shape):
    with pytest.raises(ValueError, match="pairs on the last axis, whose length must be even"):
        Pairs(SVQ(20, dim=12, stages=2))(torch.randn(shape))
    with pytest.raises(ValueError, match="even"):
        Pairs(SVQ(20, dim=12, stages=2)).indices_to_codes(torch.zeros(1, 3, dtype=torch.int64))
