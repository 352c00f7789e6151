"""GeometricRFSQ against its definition: one compander at the input, the stages its digits."""

import copy
import math

import numpy as np
import pytest
import torch

from arguments import get_args
from quantizers import RFSQ, GeometricRFSQ, build_quantizer

MEAN, STD = 0.7, 2.5


def geometric(stages, levels):
    """In evaluation, with running moments as if it had seen latents of this mean and std."""
    rfsq = GeometricRFSQ(stages, levels).eval()
    rfsq.running_mean.fill_(MEAN)
    rfsq.running_var.fill_(STD**2)
    return rfsq


def bounded(z, cells):
    u = (6**-0.5 + 0.7 / cells) * (z.double() - MEAN) / STD
    return u / (1 + u**2).sqrt()


def unbounded(y, cells):
    y = y.double()
    return MEAN + STD * y / (1 - y**2).sqrt() / (6**-0.5 + 0.7 / cells)


def test_geometric_stages_by_hand():
    rfsq = geometric(2, [4, 3])
    # Channel 1 in cells of 1/2, then of 1/8; channel 2 in cells of 2/3 and 2/9.
    y = torch.tensor([[-0.99, -0.99], [-0.3, 0.0], [0.001, 0.2], [0.9999, -0.9999]])
    quantized, indices = rfsq(unbounded(y, torch.tensor([16, 9])).float())
    digits = torch.stack([indices % 4, indices // 4])  # (channel, token, stage)
    assert digits.tolist() == [
        [[0, 0], [1, 1], [2, 0], [3, 3]],
        [[0, 0], [1, 1], [1, 2], [0, 0]],
    ]
    wanted = torch.tensor([[-0.9375, -8 / 9], [-0.3125, 0.0], [0.0625, 2 / 9], [0.9375, -8 / 9]])
    torch.testing.assert_close(
        quantized, unbounded(wanted, torch.tensor([16, 9])).float(), atol=1e-4, rtol=1e-5
    )
    first = rfsq.indices_to_codes(indices[..., :1])
    wanted = torch.tensor([[-0.75, -2 / 3], [-0.25, 0.0], [0.25, 0.0], [0.75, -2 / 3]])
    torch.testing.assert_close(
        first, unbounded(wanted, torch.tensor([16, 9])).float(), atol=1e-4, rtol=1e-5
    )


@pytest.mark.parametrize(("stages", "level"), [(1, 7), (2, 16), (4, 4), (3, 5), (20, 2)])
def test_geometric_stages_are_one_uniform_quantizer_of_the_bounded_latent(stages, level):
    rfsq, cells = geometric(stages, [level]), level**stages
    z = MEAN + 3 * STD * torch.randn(20000, 1)
    scaled = (bounded(z, cells) + 1) * cells / 2
    certain = (scaled - scaled.round()).abs() > cells * 3e-7  # near an edge float32 may differ
    uniform = (2 * scaled.floor().clamp(0, cells - 1) + 1) / cells - 1
    y = bounded(rfsq(z)[0], cells)
    assert certain.double().mean() > 0.3
    torch.testing.assert_close(y[certain], uniform[certain], atol=4e-7, rtol=0)
    assert ((y - bounded(z, cells)).abs() <= 1.0001 / cells + 4e-7).all()


def test_the_gradient_of_geometric_stages_is_that_of_the_bound_and_its_inverse():
    """Slope of the bound at z over its slope at the code: the rounding alone is passed straight."""
    rfsq = geometric(2, [4, 3])
    z = (MEAN + 2 * STD * torch.randn(50, 2)).requires_grad_()
    quantized, _ = rfsq(z)
    upstream = torch.randn_like(quantized)
    (quantized * upstream).sum().backward()
    slope = 6**-0.5 + 0.7 / torch.tensor([16.0, 9.0])

    def steepness(x):
        return (1 + (slope * (x.detach() - MEAN) / STD) ** 2) ** -1.5

    torch.testing.assert_close(z.grad, upstream * steepness(z) / steepness(quantized))


def test_geometric_stages_follow_the_latent_and_lose_little():
    torch.manual_seed(0)
    rfsq, batches = GeometricRFSQ(4, [4]), MEAN + STD * torch.randn(5, 100_000, 1)
    for number, z in enumerate(batches, 1):
        quantized, _ = rfsq(z)
        seen = batches[:number].double()
        assert rfsq.running_mean.item() == pytest.approx(seen.mean().item(), abs=1e-4)
        assert rfsq.running_var.item() == pytest.approx(
            (seen - seen.mean()).square().mean().item(), rel=1e-4
        )
    before = copy.deepcopy(rfsq.state_dict())
    rfsq.eval()(z + 1)
    assert all(torch.equal(x, before[key]) for key, x in rfsq.state_dict().items())
    # 256 cells: the best scalar quantizer of a Gaussian has 42 dB (Panter and Dite), a layernorm
    # chain of four stages with 4 levels has 28 at best.
    noise = (quantized.double() - z).square().mean()
    assert 20 * math.log10(STD) - 10 * torch.log10(noise) > 39


@pytest.mark.parametrize("level", [2, 4, 16, 256])
@pytest.mark.parametrize("law", ["gaussian", "laplacian", "student"])
def test_the_compander_is_within_a_decibel_of_the_best_of_its_kind(law, level):
    torch.manual_seed(0)
    laws = torch.distributions
    law = {"gaussian": laws.Normal, "laplacian": laws.Laplace}.get(law, laws.StudentT)
    z = (law(8.0) if law is laws.StudentT else law(0.0, 1.0)).sample((200_000,)).double()
    z = z / z.std()

    def decibels(slope):
        u = slope * z
        cell = ((u / (1 + u**2).sqrt() + 1) * level / 2).floor().clamp(0, level - 1)
        y = (2 * cell + 1) / level - 1
        return -10 * (y / (1 - y**2).sqrt() / slope - z).square().mean().log10().item()

    rfsq = GeometricRFSQ(1, [level]).eval()
    ours = -10 * (rfsq(z.float()[:, None])[0][:, 0] - z).square().mean().log10().item()
    assert ours == pytest.approx(decibels(rfsq.slope.item()), abs=0.01)
    assert ours > max(decibels(slope) for slope in np.arange(0.1, 1.0, 0.03)) - 1.1


def test_geometric_moments_of_a_batch_that_is_not_finite_leave_no_trace():
    rfsq = GeometricRFSQ(2)
    rfsq(torch.randn(8, 4, 6))
    before = copy.deepcopy(rfsq.state_dict())
    rfsq(torch.full((8, 4, 6), math.nan))
    one = torch.randn(8, 4, 6)
    one[2, 1, 3] = math.inf
    rfsq(one)
    assert all(torch.equal(x, before[key]) for key, x in rfsq.state_dict().items())


@pytest.mark.parametrize("level", range(2, 40))
def test_the_tails_have_the_outermost_cells(level):
    rfsq = GeometricRFSQ(3, [level]).eval()
    tails = torch.tensor([3e38, 1e30, 1e19, 1e7])
    _, indices = rfsq(torch.cat([tails, -tails])[:, None])
    assert indices.tolist() == [[level - 1] * 3] * 4 + [[0] * 3] * 4


def test_a_slope_of_its_own_makes_other_cells():
    rfsq, z = GeometricRFSQ(1, [5, 4], slope=0.1).eval(), 3 * torch.randn(2, 2, 50)
    u = 0.1 * z.double()
    cell = ((u / (1 + u**2).sqrt() + 1) * torch.tensor([[2.5], [2.0]])).floor().long()
    assert torch.equal(rfsq(z)[1][..., 0], cell[:, 0] + 5 * cell[:, 1])
    for slope in (0.0, -0.2, math.inf, math.nan):
        with pytest.raises(ValueError, match="slope must be a positive number"):
            GeometricRFSQ(1, [5, 4], slope=slope)


def test_more_geometric_cells_than_float32_tells_apart():
    with pytest.raises(ValueError, match=r"11 geometric stages of 4.*fewer stages or levels"):
        GeometricRFSQ(11, [2, 4])
    GeometricRFSQ(10, [2, 4])


def test_stage_input_of_geometric_is_what_is_cut_into_cells():
    rfsq, z = geometric(3, [4, 4]), MEAN + 2 * STD * torch.randn(3, 2, 50)
    _, indices = rfsq(z)
    quantized = None
    for stage in range(3):
        scaled = (rfsq.stage_input(stage, z, quantized) + 1) * 2
        certain = ((scaled - scaled.round()).abs() > 1e-3).all(1)  # near an edge it may differ
        cell = scaled.floor().clamp(0, 3).long()
        assert certain.float().mean() > 0.9
        assert torch.equal((cell[:, 0] + 4 * cell[:, 1])[certain], indices[..., stage][certain])
        quantized = rfsq.indices_to_codes(indices[..., : stage + 1])


def test_the_flag_builds_the_class():
    flags = [
        "--rfsq-strategy=geometric",
        "--rfsq-stages=3",
        "--rfsq-slope=0.2",
        "--levels",
        "5",
        "4",
    ]
    rfsq = build_quantizer(get_args([*flags, "--rfsq-stage-dropout=0.3"]))
    assert type(rfsq) is GeometricRFSQ and rfsq.name == "rfsq-3x20-geometric"
    assert (rfsq.stages, rfsq.levels, rfsq.stage_dropout) == (3, [5, 4], 0.3)
    assert rfsq.slope.tolist() == pytest.approx([0.2, 0.2])
    with pytest.raises(ValueError, match="GeometricRFSQ"):
        RFSQ(2, "geometric")


def test_the_state_has_the_keys_of_older_checkpoints():
    state = GeometricRFSQ(2).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "running_mean": (1, 4),
        "running_var": (1, 4),
        "batches": (),
    }


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"stages": 0, "levels": [4]}, "stages.*0"),
        ({"stages": 3}, "3 stages.*levels"),
        ({"momentum": 0}, "momentum.*0"),
        ({"stage_dropout": 1.5}, "stage_dropout.*1.5"),
        ({"levels": [8, 1]}, "1 is among"),
    ],
)
def test_arguments_that_cannot_be(kwargs, named):
    with pytest.raises(ValueError, match=named):
        GeometricRFSQ(**kwargs)
