"""RFSQ against a reference in double precision: values, gradients and running statistics."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch

from quantizers import FSQ, RFSQ, GeometricRFSQ
from quantizers.fsq import Grid
from quantizers.rfsq import affine, denormalise

STRATEGIES = ("none", "scale", "layernorm")


def column(x, like):
    """Lay numbers per channel along axis 1 of `like`."""
    return np.asarray(x, dtype=np.float64).reshape(1, -1, *[1] * (like.ndim - 2))


def reference_stage(r, levels, a, b):
    """One stage in NumPy: (codes, digits, slope of the bound, distance from a rounding edge)."""
    level = np.array(levels)
    h, offset = (level - 1) * 0.999 / 2, np.where(level % 2, 0.0, 0.5)
    half = column(level // 2, r)
    x = np.tanh(a * r + b + column(np.tan(offset / h), r))
    y = column(h, r) * x - column(offset, r)
    n = np.round(y)
    slope = column(h, r) * (1 - x**2) / half
    return (n / half - b) / a, (n + half).astype(np.int64), slope, np.abs(np.abs(y - n) - 0.5)


def reference(z, levels, maps):
    """The chain of `maps`, a list of (a, b) or functions of the residual that return them.

    Returns quantized, digits of each stage, d quantized / dz, and where rounding is certain.
    """
    r, total, digits, product, edge = z, np.zeros_like(z), [], np.ones_like(z), np.inf
    for entry in maps:
        a, b = entry(r) if callable(entry) else entry
        q, n, slope, distance = reference_stage(r, levels, a, b)
        r, total, product = r - q, total + q, product * (1 - slope)
        digits.append(n)
        edge = np.minimum(edge, distance)
    # A code next to an edge may round the other way in float32, in any channel or stage.
    return total, digits, 1 - product, edge > 1e-4


def weights(rfsq, stage, like):
    """Gain and bias of a stage of layernorm as the reference takes them."""
    gain = rfsq.log_gain[stage].detach().double().exp().numpy()
    return column(gain, like), column(rfsq.bias[stage].detach().numpy(), like)


def perturb(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def check_against(rfsq, z, maps):
    """Values, digits and gradient of `rfsq(z)` against the reference."""
    z = z.clone().requires_grad_()
    upstream = torch.randn_like(z)
    quantized, indices, *_ = rfsq(z)
    (quantized * upstream).sum().backward()
    value, digits, slope, certain = reference(z.detach().double().numpy(), rfsq.levels, maps)
    assert certain.mean() > 0.9
    assert (slope > 0).all() and (slope <= 1).all()
    radix = column(np.cumprod([1, *rfsq.levels[:-1]]), value)
    everywhere = certain.all(axis=1)
    for stage, n in enumerate(digits):
        wanted = (n * radix.astype(np.int64)).sum(axis=1)
        assert np.array_equal(indices[..., stage].numpy()[everywhere], wanted[everywhere])
    np.testing.assert_allclose(quantized.detach().numpy()[certain], value[certain], atol=2e-5)
    gradient = (z.grad / upstream).double().numpy()
    np.testing.assert_allclose(gradient[certain], slope[certain], rtol=1e-3, atol=2e-5)


# ---------------------------------------------------------------------------------------
# Values and gradients of the chain
# ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("levels", [[8, 8, 8, 4], [5, 3, 2]])
def test_none_is_the_plain_chain(stages, levels):
    rfsq = RFSQ(stages, "none", levels)
    check_against(rfsq, torch.randn(8, len(levels), 5, 5), [(1.0, 0.0)] * stages)


@pytest.mark.parametrize("stages", [2, 4])
def test_scale_multiplies_before_and_divides_after(stages):
    rfsq = RFSQ(stages, "scale", initial_scale=1.7)
    perturb(rfsq)
    scales = rfsq.log_scale.detach().double().exp().tolist()
    z = torch.randn(8, rfsq.dim, 5, 5)
    check_against(rfsq, z, [(scale, 0.0) for scale in scales])


@pytest.mark.parametrize("stages", [2, 4])
def test_layernorm_with_statistics_that_are_constants(stages):
    rfsq = RFSQ(stages, "layernorm").eval()
    perturb(rfsq)
    rfsq.running_mean.normal_(std=0.3)
    rfsq.running_var.uniform_(0.2, 2)
    z = torch.randn(8, rfsq.dim, 5, 5)
    maps = []
    for stage in range(stages):
        gain, bias = weights(rfsq, stage, z)
        mean = column(rfsq.running_mean[stage].numpy(), z)
        a = gain / column(rfsq.running_var[stage].sqrt().numpy(), z)
        maps.append((a, bias - a * mean))
    check_against(rfsq, z, maps)


@pytest.mark.parametrize("stages", [2, 4])
def test_layernorm_in_training_normalises_by_the_first_batch(stages):
    rfsq = RFSQ(stages, "layernorm")
    perturb(rfsq)
    z = 2 * torch.randn(16, rfsq.dim, 6, 6) + 0.5

    def by_moments(stage):
        def map_of(r):
            gain, bias = weights(rfsq, stage, r)
            a = gain / column(r.std(axis=(0, 2, 3)), r)
            return a, bias - a * column(r.mean(axis=(0, 2, 3)), r)

        return map_of

    check_against(rfsq, z, [by_moments(stage) for stage in range(stages)])


@pytest.mark.parametrize("offset, spread", [(0.0, 1e6), (1e6, 1.0), (-1e6, 1e6)])
def test_image_statistics_beyond_half_precision_are_its_greatest_numbers(offset, spread):
    rfsq = RFSQ(2, "layernorm", statistics="image").eval()
    z = offset + spread * torch.randn(3, 4, 6, 5)
    quantized, indices, _, statistics = rfsq(z)
    assert statistics.isfinite().all() and quantized.isfinite().all()
    assert torch.equal(rfsq.indices_to_codes(indices, statistics), quantized)


def test_a_constant_image_has_the_least_std():
    """The half-precision number next to 1e-3, in every version: files of models hold it."""
    statistics = RFSQ(stages=2, statistics="image")(torch.full((1, 4, 3, 3), 2.5))[3]
    assert (statistics[:, 0, 0] == 2.5).all()
    assert (statistics[:, 0, 1] == torch.tensor(1e-3).half()).all()


def test_image_statistics_are_each_images_mean_and_std():
    rfsq = RFSQ(2, "layernorm", statistics="image").eval()
    z = torch.randn(3, 4, 6, 5) * torch.tensor([0.5, 1, 3]).view(3, 1, 1, 1) + 2
    with torch.no_grad():
        quantized, _, loss, statistics = rfsq(z)
    assert statistics.shape == (3, 2, 2, 4) and loss.item() == 0
    # What the decoder gets are half-precision numbers, as `side_bits` counts them.
    assert torch.equal(statistics, statistics.half().float())
    torch.testing.assert_close(statistics[:, 0, 0], z.mean((2, 3)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        statistics[:, 0, 1], z.std((2, 3), correction=0), rtol=1e-3, atol=1e-3
    )
    for image in range(3):
        maps = []
        for stage in range(2):
            gain, bias = weights(rfsq, stage, np.zeros((1, 4, 1, 1)))
            mean, std = statistics[image, stage].double().numpy()
            a = gain / column(std, gain)
            maps.append((a, bias - a * column(mean, gain)))
        value, _, _, certain = reference(z[image : image + 1].double().numpy(), rfsq.levels, maps)
        np.testing.assert_allclose(
            quantized[image : image + 1].numpy()[certain], value[certain], atol=2e-5
        )


def composed(rfsq, z, statistics):
    """The chain by autograd in double precision: (quantized, gains, biases, distance to an edge).

    `statistics` maps (stage, residual) to mean and std, None where the strategy has none.
    """
    level = torch.tensor(rfsq.levels).double()
    h, offset = (level - 1) * 0.999 / 2, 0.5 * (1 - level % 2)
    half = level.div(2, rounding_mode="floor")
    names = [name for name, _ in rfsq.named_parameters()]
    logs = rfsq.get_parameter(names[0]).detach().double().requires_grad_()
    biases = torch.zeros(rfsq.stages, 1).double()
    if "bias" in names:
        biases = rfsq.bias.detach().double().requires_grad_()
    lay = [1, -1] + [1] * (z.dim() - 2)
    h, offset, half = h.view(lay), offset.view(lay), half.view(lay)
    r, total, edge = z, 0.0, []
    for stage in range(rfsq.stages):
        mean, std = statistics(stage, r)
        gain, bias = logs[stage].exp().view(lay), biases[stage].view(lay)
        y = h * torch.tanh((r - mean) / std * gain + bias + torch.tan(offset / h)) - offset
        edge.append(((y - y.round()).abs() - 0.5).abs().min().item())
        n = y + (y.round() - y).detach()
        q = ((n / half - bias) / gain) * std + mean
        r, total = r - q, total + q
    return total, logs, biases, min(edge)


@pytest.mark.parametrize("kind", ["scale", "eval", "train", "image"])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_gradients_of_all_parameters_equal_plain_autograd(kind, stages):
    strategy = "scale" if kind == "scale" else "layernorm"
    statistics = "image" if kind == "image" else "global"
    rfsq = RFSQ(stages, strategy, [8, 5, 4, 2], initial_scale=1.3, statistics=statistics)
    perturb(rfsq)
    if kind == "eval":
        rfsq(torch.randn(64, 4) * 1.5 + 0.2)
        rfsq.eval()
    for attempt in range(50):  # an input that is near no rounding edge
        z = torch.randn(5, 4, 16, generator=torch.Generator().manual_seed(attempt))
        z = (1.4 * z + 0.3).requires_grad_()
        found = rfsq if kind == "eval" else copy.deepcopy(rfsq)
        quantized, _, *rest = found(z)

        def moments(stage, r, found=found, rest=rest):
            if kind == "scale":
                return 0.0, 1.0
            if kind == "image":  # the values that the decoder gets, the gradient of their formula
                own = torch.stack([r.mean(2), r.std(2, correction=0)], dim=1)
                own = own + (rest[1][:, stage].double() - own).detach()
                return own[:, 0, :, None], own[:, 1, :, None]
            mean = found.running_mean[stage].double().view(1, -1, 1)
            return mean, found.running_var[stage].double().sqrt().view(1, -1, 1)

        exact = z.detach().double().requires_grad_()
        wanted, logs, biases, edge = composed(found, exact, moments)
        if edge > 2e-5:
            break
    else:
        raise AssertionError("every input was near an edge")
    torch.testing.assert_close(quantized.double(), wanted, rtol=1e-4, atol=1e-4)
    upstream = torch.randn_like(quantized)
    (quantized * upstream).sum().backward()
    (wanted * upstream).sum().backward()
    pairs = [(z.grad, exact.grad)]
    pairs.append(((found.log_scale if kind == "scale" else found.log_gain).grad, logs.grad))
    if kind != "scale":
        pairs.append((found.bias.grad, biases.grad))
    for gradient, expected in pairs:
        slack = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=slack)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_the_loop_is_the_composition_of_its_parts(strategy, stages):
    """Normalise, FSQ, denormalise, subtract: the same by the public FSQ, in as many steps."""
    levels = [8, 5, 4, 2]
    rfsq, fsq = RFSQ(stages, strategy, levels, initial_scale=1.3), FSQ(levels)
    perturb(rfsq)
    for _ in range(2):
        rfsq(torch.randn(64, 4) * 1.5 + 0.2)
    rfsq.eval()
    z = (1.4 * torch.randn(5, 4, 16) + 0.3).requires_grad_()
    found, indices = rfsq(z)
    upstream = torch.randn_like(z)
    parameters = [z, *rfsq.parameters()]
    gradients = torch.autograd.grad(found, parameters, upstream)
    residual, total = z, torch.zeros_like(z)
    for k in range(stages):
        gain, bias, mean, std = 1.0, 0.0, 0.0, 1.0
        if strategy == "scale":
            gain = rfsq.log_scale[k].exp()
        elif strategy == "layernorm":
            gain, bias = (x[k].view(1, -1, 1) for x in (rfsq.log_gain.exp(), rfsq.bias))
            mean, std = (x[k].view(1, -1, 1) for x in (rfsq.running_mean, rfsq.running_var.sqrt()))
        codes, index = fsq((residual - mean) / std * gain + bias)
        assert torch.equal(index, indices[..., k])
        codes = (codes - bias) / gain * std + mean
        residual, total = residual - codes, total + codes
    torch.testing.assert_close(found, total, rtol=1e-5, atol=1e-5)
    for one, two in zip(gradients, torch.autograd.grad(total, parameters, upstream), strict=True):
        slack = 1e-5 * two.abs().max().item()
        torch.testing.assert_close(one, two, rtol=1e-4, atol=slack)


@pytest.mark.parametrize("per_image", [False, True])
def test_the_parts_of_the_loop_pass_gradcheck(per_image):
    """In double precision, at integers that stand still."""
    fsq = FSQ([8, 5, 3])
    grid = Grid(*(x.double() for x in fsq.grid(torch.zeros(2, 3, 4))))
    shape = (2 if per_image else 1, 3, 1)
    z = torch.randn(2, 3, 4).double().requires_grad_()
    gain = (torch.rand(1, 3, 1).double() + 0.5).requires_grad_()
    bias = torch.randn(1, 3, 1).double().requires_grad_()
    mean = torch.randn(shape).double().requires_grad_()
    std = (torch.rand(shape).double() + 0.5).requires_grad_()
    n = torch.randint(-2, 3, (2, 3, 4)).double()

    def normalised(z, gain, bias, mean, std):
        a, b = affine(gain, bias, mean, std)
        return fsq.bound(a * z + b, fsq.grid(z))

    def codes(gain, bias, mean, std):
        return denormalise(n, *affine(gain, bias, mean, std), grid)

    assert torch.autograd.gradcheck(normalised, (z, gain, bias, mean, std))
    assert torch.autograd.gradcheck(codes, (gain, bias, mean, std))
    a, b = affine(gain, bias, mean, std)
    half = torch.tensor([4.0, 2.0, 1.0]).double().view(1, 3, 1)
    torch.testing.assert_close(denormalise(n, a, b, grid), (n / half - b) / a)


@pytest.mark.parametrize("shape", [(2, 4, 3, 3), (2, 4), (2, 4, 1, 1)])
def test_gradient_is_finite_for_a_constant_image(shape):
    """A flat image has a std of exactly zero, where the square root has no derivative."""
    z = torch.full(shape, 0.3, requires_grad=True)
    RFSQ(2, "layernorm", statistics="image")(z)[0].sum().backward()
    assert torch.isfinite(z.grad).all()


def test_a_loss_on_the_statistics_alone():
    """Those of the second stage depend on the codes of the first, and on nothing after them."""
    z = torch.randn(2, 4, 5, requires_grad=True)
    RFSQ(2, "layernorm", statistics="image")(z)[3][:, 1].sum().backward()
    assert torch.isfinite(z.grad).all() and z.grad.any()


def test_the_gradient_of_the_statistics_is_that_of_mean_and_std():
    z = (2 * torch.randn(3, 4, 5, 6) + 1).requires_grad_()
    statistics = RFSQ(2, "layernorm", statistics="image")(z)[3]
    upstream = torch.randn(3, 2, 4)
    (gradient,) = torch.autograd.grad(statistics[:, 0], z, upstream)
    exact = z.detach().double().requires_grad_()
    moments = torch.stack([exact.mean((2, 3)), exact.std((2, 3), correction=0)], dim=1)
    (wanted,) = torch.autograd.grad(moments, exact, upstream.double())
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "strategy, statistics", [("scale", "global"), ("layernorm", "global"), ("layernorm", "image")]
)
def test_every_parameter_learns(strategy, statistics):
    rfsq = RFSQ(2, strategy, statistics=statistics)
    z = torch.randn(8, 4, 5, 5)
    (rfsq(z)[0] - z).square().mean().backward()
    for name, parameter in rfsq.named_parameters():
        assert torch.isfinite(parameter.grad).all() and (parameter.grad != 0).all(), name


def test_one_stage_of_none_is_fsq():
    levels = [8, 5, 3, 4]
    z = torch.randn(4, 4, 7, 7)
    one, two = z.clone().requires_grad_(), z.clone().requires_grad_()
    quantized, indices = RFSQ(1, "none", levels)(one)
    wanted, wanted_indices = FSQ(levels)(two)
    assert torch.equal(quantized.view(torch.int32), wanted.view(torch.int32))
    assert torch.equal(indices, wanted_indices.unsqueeze(-1))
    quantized.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------------------------
# Running statistics
# ---------------------------------------------------------------------------------------
def test_running_statistics_by_hand():
    """The first 1/momentum = 4 batches weigh 1, 1/2, 1/3, 1/4; those after them 1/4 each."""
    rfsq = RFSQ(2, "layernorm", momentum=0.25)
    perturb(rfsq)
    mean, var = np.zeros((2, 4)), np.ones((2, 4))
    for weight in (1, 1 / 2, 1 / 3, 1 / 4, 1 / 4, 1 / 4):
        z = (torch.randn(6, 4, 5, 5) * torch.rand(1, 4, 1, 1) + torch.randn(1, 4, 1, 1)).float()
        rfsq(z)
        r = z.double().numpy()
        for stage in range(2):
            mean[stage] += weight * (r.mean(axis=(0, 2, 3)) - mean[stage])
            var[stage] += weight * (r.var(axis=(0, 2, 3)) - var[stage])
            np.testing.assert_allclose(rfsq.running_mean[stage], mean[stage], atol=2e-5)
            np.testing.assert_allclose(rfsq.running_var[stage], var[stage], rtol=2e-4)
            gain, bias = weights(rfsq, stage, r)
            # From the statistics just checked, so that a rounding edge is the same in both.
            a = gain / column((rfsq.running_var[stage].double()).sqrt().numpy(), r)
            b = bias - a * column(rfsq.running_mean[stage].numpy(), r)
            q, _, _, edge = reference_stage(r, rfsq.levels, a, b)
            assert edge.min() > 1e-6
            r = r - q


def test_the_first_batches_are_averaged_evenly():
    rfsq = RFSQ(1, "layernorm", levels=[4], momentum=0.01)
    batches = [torch.randn(32, 1) * k + k for k in range(1, 8)]
    for batch in batches:
        rfsq(batch)
    torch.testing.assert_close(rfsq.running_mean[0, 0], torch.stack(batches).mean())
    variances = torch.stack([batch.var(correction=0) for batch in batches])
    torch.testing.assert_close(rfsq.running_var[0, 0], variances.mean())


def perplexity(indices):
    counts = torch.bincount(indices.flatten()).double()
    p = counts[counts > 0] / counts.sum()
    return math.exp(-(p * p.log()).sum())


@pytest.mark.parametrize(("stages", "times", "decibels"), [(2, 1.1, 4), (4, 30, 8)])
def test_the_last_stage_uses_its_codes_from_the_start(stages, times, decibels):
    """What the paper's layernorm is for: without it the residual leaves most codes unused."""
    used, error = {}, {}
    for strategy in ("none", "layernorm"):
        rfsq = RFSQ(stages, strategy)
        for _ in range(5):
            rfsq(torch.randn(16, rfsq.dim, 16, 16))
        z = torch.randn(64, rfsq.dim, 32, 32)
        quantized, indices = rfsq.eval()(z)
        used[strategy] = perplexity(indices[..., -1])
        error[strategy] = (quantized - z).square().mean().item()
    assert used["layernorm"] > 100 and used["layernorm"] > times * used["none"]
    assert 10 * math.log10(error["none"] / error["layernorm"]) > decibels


def test_side_information_is_shared_by_the_positions_of_an_image():
    rfsq = RFSQ(2, levels=[8, 8, 8, 4], statistics="image")  # 2 x 11 bits, 2 x 4 x 2 half floats
    assert rfsq.bits_with_side_information(1024) == 22 + 2 * 4 * 2 * 16 / 1024
    assert rfsq.bits_with_side_information(64, stages=1) == 11 + 4 * 2 * 16 / 64
    assert RFSQ(4).bits_with_side_information(64, stages=3) == 30


@pytest.mark.parametrize("gain", [1.0, 0.4])
def test_the_initial_gain_asked_for_comes_without_a_bias(gain):
    rfsq = RFSQ(2, levels=[8, 5], initial_gain=gain)
    assert rfsq.log_gain.exp().flatten().tolist() == pytest.approx([gain] * 4, rel=1e-6)
    assert not rfsq.bias.any()
    # Before any batch the mean is 0 and the variance 1: the first stage is FSQ(gain z) / gain.
    z = torch.randn(4, 2, 8, 8)
    first = rfsq.eval().codes_after_each_stage(rfsq(z)[1])[0]
    torch.testing.assert_close(first, FSQ([8, 5])(gain * z)[0] / gain)


def test_the_start_is_in_the_middle_of_odd_and_even_levels():
    rfsq = RFSQ(stages=2, levels=[5, 4, 3])
    assert rfsq.bias.tolist() == [[0, -0.25, 0]] * 2
    gains = [1.1 / level**0.5 for level in (5, 4, 3)]
    assert rfsq.log_gain.exp().flatten().tolist() == pytest.approx(2 * gains)


@pytest.mark.parametrize("kind", [RFSQ, GeometricRFSQ])
def test_a_channel_without_variance_decodes_as_with_the_constant_that_is_added(kind):
    """1e-10: what the indices of older models mean depends on it."""
    rfsq, indices = kind(stages=2).eval(), torch.tensor([[[100, 900]]])
    rfsq.running_var.zero_()
    codes = rfsq.indices_to_codes(indices)
    rfsq.running_var.fill_(1 - 1e-10)
    torch.testing.assert_close(codes, 1e-5 * rfsq.indices_to_codes(indices), atol=1e-9, rtol=0)


# ---------------------------------------------------------------------------------------
# Scale
# ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [1.0, 0.693, 1e-4, 7, 1e4])
def test_the_scale_asked_for_is_the_scale_there_is(scale):
    rfsq = RFSQ(3, "scale", [4, 4], initial_scale=scale)
    assert rfsq.log_scale.exp().tolist() == pytest.approx([scale] * 3, rel=1e-6)
    # A code of one is 1/scale away.
    quantized, _ = RFSQ(1, "scale", [3], initial_scale=scale)(torch.tensor([[1e9]]))
    assert quantized.item() == pytest.approx(1 / scale, rel=1e-6)


# ---------------------------------------------------------------------------------------
# Image statistics belong to the tokens
# ---------------------------------------------------------------------------------------
def image_quantizer():
    rfsq = RFSQ(2, "layernorm", statistics="image").eval()
    perturb(rfsq)
    z = torch.randn(2, 4, 6, 6) * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1) + 1
    with torch.no_grad():
        return rfsq, z, *rfsq(z)


def test_swapped_statistics_move_the_codes_as_the_equation_says():
    rfsq, _, quantized, indices, _, statistics = image_quantizer()
    swapped = rfsq.indices_to_codes(indices, statistics.flip(0))
    wanted = 0.0
    for stage in range(2):
        code = FSQ(rfsq.levels).indices_to_codes(indices[..., stage])
        gain, bias = weights(rfsq, stage, code.numpy())
        mean, std = statistics.flip(0)[:, stage].double().unbind(1)
        normal = (code.double() - torch.tensor(bias)) / torch.tensor(gain)
        wanted = wanted + normal * std[..., None, None] + mean[..., None, None]
    torch.testing.assert_close(swapped.double(), wanted, rtol=1e-5, atol=1e-5)
    assert (swapped - quantized).abs().mean() > 0.5


@pytest.mark.parametrize("wrong", ["none", "one image", "channels", "rank", "too few stages"])
def test_statistics_that_do_not_fit(wrong):
    rfsq, _, _, indices, _, statistics = image_quantizer()
    given = {
        "none": None,
        "one image": statistics[:1],
        "channels": statistics[..., :3],
        "rank": statistics[0],
        "too few stages": statistics[:, :1],
    }[wrong]
    with pytest.raises(ValueError, match=r"statistics \(2, 2, 2, 4\)"):
        rfsq.indices_to_codes(indices, given)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_statistics_where_the_indices_alone_decode(strategy):
    rfsq = RFSQ(2, strategy)
    with pytest.raises(ValueError, match="indices alone"):
        rfsq.indices_to_codes(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, 2, 4))


def test_nothing_is_kept_between_calls():
    rfsq, z, quantized, indices, _, statistics = image_quantizer()
    before = set(vars(rfsq))
    rfsq(100 * z.flip(0) - 7)
    assert set(vars(rfsq)) == before
    assert torch.equal(rfsq.indices_to_codes(indices, statistics), quantized)


# ---------------------------------------------------------------------------------------
# Bits and refusals
# ---------------------------------------------------------------------------------------
def test_side_information_is_counted():
    assert RFSQ(2, "layernorm", statistics="image").side_bits == 2 * 4 * 2 * 16  # numbers x 16
    assert RFSQ(4, "layernorm", statistics="image").side_bits == 2 * 5 * 4 * 16
    for strategy in STRATEGIES:
        assert RFSQ(2, strategy).side_bits == 0


@pytest.mark.parametrize("stages", [1, 3, 5])
def test_stages_without_default_levels(stages):
    with pytest.raises(ValueError, match=f"{stages} stages.*levels"):
        RFSQ(stages)


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"strategy": "batchnorm"}, "'batchnorm'.*none, scale, layernorm"),
        ({"strategy": "geometric"}, "'geometric'.*GeometricRFSQ"),
        ({"statistics": "batch"}, "'batch'.*global, image"),
        ({"strategy": "scale", "statistics": "image"}, "'image' needs .*'layernorm', not 'scale'"),
        ({"stages": 0, "levels": [4]}, "stages.*0"),
        ({"stages": 2.0}, "stages.*2.0"),
        ({"strategy": "scale", "initial_scale": 0}, "initial_scale.*0"),
        ({"strategy": "scale", "initial_scale": -1.0}, "initial_scale.*-1.0"),
        ({"strategy": "scale", "initial_scale": math.nan}, "initial_scale.*nan"),
        ({"strategy": "scale", "initial_scale": math.inf}, "initial_scale.*inf"),
        ({"initial_gain": 0.0}, "initial_gain.*0.0"),
        ({"initial_gain": math.nan}, "initial_gain.*nan"),
        ({"momentum": 0}, "momentum.*0"),
        ({"momentum": 1.5}, "momentum.*1.5"),
        ({"stage_dropout": -0.1}, "stage_dropout.*-0.1"),
        ({"stage_dropout": math.nan}, "stage_dropout.*nan"),
        ({"levels": [8, 1]}, "1 is among"),
    ],
)
def test_arguments_that_cannot_be(kwargs, named):
    with pytest.raises(ValueError, match=named):
        RFSQ(**kwargs)


def test_wrong_number_of_channels_names_both():
    with pytest.raises(ValueError, match=r"4 channels.*has 5"):
        RFSQ(2)(torch.randn(1, 5, 3))


@pytest.mark.parametrize("stages", [0, 3])
def test_indices_of_stages_that_there_are_not(stages):
    with pytest.raises(ValueError, match=f"1 to 2 stages.*has {stages}"):
        RFSQ(2).indices_to_codes(torch.zeros(1, 5, stages, dtype=torch.int64))


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("index", [-1, 2048])
def test_indices_out_of_range(stage, index):
    indices = torch.zeros(1, 5, 2, dtype=torch.int64)
    indices[0, 3, stage] = index
    with pytest.raises(ValueError, match=rf"0 to 2047.*{index}"):
        RFSQ(2).indices_to_codes(indices)


def test_indices_without_a_batch():
    with pytest.raises(ValueError):
        RFSQ(2).indices_to_codes(torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("strategy", ["none", "scale", "layernorm", "image"])
def test_stage_input_is_what_enters_the_fsq(strategy):
    if strategy == "image":
        rfsq = RFSQ(4, statistics="image")
    else:
        rfsq = RFSQ(4, strategy, initial_scale=1.7)
    z = 2 * torch.randn(3, 5, 6, 6) + 1
    for _ in range(3):
        rfsq(z)
    rfsq.eval()
    _, indices, *rest = rfsq(z)
    quantized = None
    for stage in range(4):
        _, index = rfsq.fsq(rfsq.stage_input(stage, z, quantized))
        assert torch.equal(index, indices[..., stage])
        quantized = rfsq.indices_to_codes(indices[..., : stage + 1], *rest[1:])


# ---------------------------------------------------------------------------------------
# Stage dropout
# ---------------------------------------------------------------------------------------
def stages_kept(rfsq, z):
    """Quantize in training, and how many stages each image was quantized by, seen from outside."""
    quantized, indices = rfsq(z)
    partial = [rfsq.indices_to_codes(indices[..., :k]) for k in range(1, rfsq.stages + 1)]
    equal = torch.stack([(p == quantized).flatten(1).all(1) for p in partial])
    assert (equal.sum(0) == 1).all()
    return quantized, equal.int().argmax(0) + 1


@pytest.mark.parametrize("strategy", [*STRATEGIES, "geometric"])
def test_stage_dropout_quantizes_by_the_first_stages(strategy):
    torch.manual_seed(0)
    kind = GeometricRFSQ if strategy == "geometric" else partial(RFSQ, strategy=strategy)
    rfsq, z = kind(stages=4, stage_dropout=0.6), 2 * torch.randn(2000, 5, 60)
    kept = stages_kept(rfsq, z)[1]
    shares = [(kept == k).float().mean().item() for k in (1, 2, 3, 4)]
    assert shares == pytest.approx([0.2, 0.2, 0.2, 0.4], abs=0.04)
    rfsq.eval()
    assert (stages_kept(rfsq, z)[1] == 4).all()


def test_stage_dropout_leaves_indices_and_statistics_alone():
    z = torch.randn(64, 4, 5, 5)
    plain, dropping = RFSQ(2), RFSQ(2, stage_dropout=1.0)
    assert torch.equal(plain(z)[1], dropping(z)[1])
    for name, value in plain.state_dict().items():
        assert torch.equal(value, dropping.state_dict()[name])


def test_the_gradient_of_a_dropped_image_is_that_of_its_stages():
    z = torch.randn(40, 5, 60)
    dropping = RFSQ(4, "none", stage_dropout=0.7)
    leaf = z.clone().requires_grad_()
    quantized, kept = stages_kept(dropping, leaf)
    quantized.sum().backward()
    for k in (1, 2, 3, 4):
        alone = z.clone().requires_grad_()
        RFSQ(k, "none", [4] * 5)(alone)[0].sum().backward()
        assert (kept == k).any()
        torch.testing.assert_close(leaf.grad[kept == k], alone.grad[kept == k])


def test_stage_dropout_of_two_processes_is_that_of_one(monkeypatch):
    z, shares = torch.randn(12, 4, 3), []
    for rank in (0, 1):
        torch.manual_seed(5)
        with monkeypatch.context() as patch:
            patch.setattr("quantizers.residual.processes", lambda: 2)
            patch.setattr("quantizers.residual.rank", lambda rank=rank: rank)
            half = RFSQ(2, "none", stage_dropout=0.5)
            shares.append(half(z[6 * rank : 6 * rank + 6])[0])
    torch.manual_seed(5)
    assert torch.equal(RFSQ(2, "none", stage_dropout=0.5)(z)[0], torch.cat(shares))


def test_without_stage_dropout_no_random_number_is_drawn():
    before = torch.get_rng_state()
    RFSQ(2)(torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)))
    RFSQ(1, levels=[4], stage_dropout=1.0)(torch.ones(2, 1, 3))  # there is none to drop
    RFSQ(2, stage_dropout=1.0).eval()(torch.ones(2, 4, 3))
    assert torch.equal(torch.get_rng_state(), before)
