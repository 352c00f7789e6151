"""SVQ: counting by enumeration, the index, the search against the optimum, gradients, tables."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import latent
from processes import in_fresh_process

from arguments import get_args
from model import VQVAE
from quantizers import FSQ, SVQ, GeometricRFSQ, compiling, svq_search
from quantizers.counting import SATURATED, Lengths, count, rank, unrank
from quantizers.svq import PRIOR_WEIGHT
from quantizers.svq_search import log_scale, search, suited

SEEDS = range(12)


def random_lengths(classes, dim, most=9):
    zero = torch.randint(0, 5, (classes, dim))
    first = zero + torch.randint(0, most, (classes, dim))
    step, run = torch.randint(1, 6, (classes, dim)), torch.randint(1, 4, (classes, dim))
    return torch.stack([zero, first, step, run], -1)


def enumerated(lengths, most):
    """All integer vectors of length at most `most`, in lexicographic order, and their lengths."""
    table = [Lengths(*row) for row in lengths]
    of = [{v: int(row.of(torch.tensor(abs(v)))) for v in range(-100, 101)} for row in table]
    least = [min(values.values()) for values in of]
    spare = most - sum(least)
    values = [[v for v in one if one[v] <= low + spare] for one, low in zip(of, least, strict=True)]
    vectors = [
        v
        for v in itertools.product(*values)
        if sum(one[x] for one, x in zip(of, v, strict=True)) <= most
    ]
    return vectors


def laplacian_mixture(dim, n, spread=0.8):
    """A Laplacian (n, dim) whose channels differ in scale, and whose vectors do."""
    scale = torch.exp(spread * torch.randn(n, 1)) * torch.linspace(2, 0.2, dim)
    return scale * torch.distributions.Laplace(0.0, 1.0).sample((n, dim))


def fitted(svq, batches=30, n=2000, **mixture):
    with torch.no_grad():
        for _ in range(batches):
            svq(laplacian_mixture(svq.dim, n, **mixture).T[None])
    return svq.eval()


@pytest.mark.parametrize("seed", SEEDS)
def test_counts_ranks_and_their_inverse_are_those_of_an_enumeration(seed):
    torch.manual_seed(seed)
    dim, size = 1 + seed % 3, 24
    lengths = random_lengths(2, dim)
    counts = count(lengths, size, room=300)
    for j in range(2):
        for t in (0, size // 2, size - 1):
            for c in range(dim + 1):
                expected = len(enumerated(lengths[j, c:], t))
                assert counts.within[j, c, t] == expected
        budget = int(counts.budget[j])
        totals = counts.within[j, 0]
        assert budget == -1 or totals[budget] <= 300
        assert budget == size - 1 or totals[budget + 1] > 300
        if budget < 0 or totals[budget] == 0:
            continue
        vectors = torch.tensor(enumerated(lengths[j], budget)).T  # (dim, all of them)
        classes = torch.full((vectors.shape[1],), j)
        numbers = rank(counts, lengths, classes, vectors)
        assert torch.equal(numbers, torch.arange(len(numbers)))
        assert torch.equal(unrank(counts, lengths, classes, numbers), vectors)
        # What no vector has stands for the last one.
        beyond = unrank(counts, lengths, classes[:1], numbers[-1:] + 7)
        assert torch.equal(beyond, vectors[:, -1:])


def compare_compiled_and_eager() -> None:
    torch.manual_seed(0)
    svq = fitted(SVQ(22, dim=12))
    operator = torch.compile(svq, backend="aot_eager", fullgraph=True)
    for n in (4000, 30):
        z = laplacian_mixture(12, n).T[None]
        assert all(map(torch.equal, operator(z)[:2], svq(z)[:2]))


def test_compiled_operators_find_the_same():
    """What a compiled model runs, by inductor, for sizes that differ."""
    in_fresh_process(compare_compiled_and_eager)


def test_zero_is_in_every_class_and_gets_the_first_that_was_searched():
    svq = fitted(SVQ(22, dim=6))
    candidates = torch.randint(0, 8, (4, 500))
    found = search(torch.zeros(6, 500), candidates, svq.steps, svq.lengths, svq._counts().budget)
    assert torch.equal(found[0], candidates[0]) and not found[1].any()


def compare_without_a_compiler() -> None:
    from torch._inductor import config

    magnitude, lengths = torch.arange(5), Lengths(*random_lengths(1, 1)[0, 0])
    with config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        length = compiling.compiled_form(Lengths.of)(lengths, magnitude)
    assert torch.equal(length, lengths.of(magnitude))


def test_what_no_compiler_is_there_for_runs_as_it_is():
    in_fresh_process(compare_without_a_compiler)


@pytest.mark.parametrize("bits", [8, 31, 60])
@pytest.mark.parametrize("seed", range(3))
def test_numbers_of_a_large_class_are_a_bijection_in_order(bits, seed):
    torch.manual_seed(seed)
    lengths = torch.stack(
        [
            torch.randint(0, 12, (3, 14)),
            torch.randint(12, 40, (3, 14)),
            torch.randint(3, 30, (3, 14)),
            torch.randint(1, 9, (3, 14)),
        ],
        -1,
    )
    room = 2**bits // 3
    counts = count(lengths, 8 * (bits + 14), room)
    classes = torch.arange(3).repeat_interleave(300)
    total = counts.within[:, 0].gather(1, counts.budget[:, None])[:, 0]
    assert ((total >= 1) & (total <= room)).all() and (total > room / 16).all()
    numbers = (torch.rand(900, dtype=torch.float64) * total[classes]).long()
    numbers = torch.minimum(numbers, total[classes] - 1)
    numbers[::300], numbers[299::300] = 0, total - 1  # the first and the last of each class
    vectors = unrank(counts, lengths, classes, numbers)
    assert torch.equal(rank(counts, lengths, classes, vectors), numbers)
    table = Lengths(*lengths.permute(2, 1, 0)[..., classes])
    assert (table.of(vectors.abs()).sum(0) <= counts.budget[classes]).all()
    order = numbers[:300].argsort()
    first = [tuple(v) for v in vectors[:, :300].T[order].tolist()]
    assert first == sorted(first)


def test_counts_beyond_int64_are_saturated_and_not_wrong():
    lengths = torch.tensor([0, 1, 1, 50]).expand(1, 40, 4)
    within = count(lengths, 300, 2**60).within
    assert within.max() == SATURATED and within.min() >= 0
    assert (within.diff(dim=-1) >= 0).all()


def test_length_of_an_integer():
    lengths = Lengths(*torch.tensor([2, 5, 3, 2]))
    assert lengths.of(torch.arange(6)).tolist() == [2, 5, 5, 8, 8, 11]


def optimum(svq, z):
    """The least squared error (N,) of `z` (N, dim) over all codes: a knapsack by dynamic programme.

    A channel may take its rounded magnitude, one to four less, or zero.
    """
    best, budgets = [], svq._counts().budget
    for j in range(svq.classes):
        most, size = int(budgets[j]), z.abs() / svq.steps[j]
        top = size.round()
        error = torch.full((len(z), most + 1), math.inf)
        error[:, 0] = 0
        for c in range(svq.dim):
            row, new = Lengths(*svq.lengths[j, c]), torch.full_like(error, math.inf)
            for v in (*(top[:, c] - less for less in range(5)), 0 * top[:, c]):
                t = torch.arange(most + 1) - row.of(v.clamp(min=0).long())[:, None]
                after = error.gather(1, t.clamp(min=0)) + (size[:, c] - v).square()[:, None]
                new = new.minimum(torch.where((t >= 0) & (v >= 0)[:, None], after, math.inf))
            error = new
        best.append(error.amin(1) * svq.steps[j] ** 2)
    return torch.stack(best).amin(0)


# With 30 batches, tables whose range is wide: the search has to find small multipliers there too.
@pytest.mark.parametrize("bits, batches", [(12, 10), (22, 10), (40, 30)])
def test_the_search_is_close_to_the_optimum(bits, batches, monkeypatch):
    losses = []
    for seed in range(4):
        torch.manual_seed(seed)
        svq = fitted(SVQ(bits, dim=bits // 2), batches=batches)
        z = laplacian_mixture(svq.dim, 200)
        z = (z - svq.running_mean)[:, svq.order]
        std, level = svq._reference_step(svq.running_var)
        candidates = suited(z.T, std[svq.order], level, svq.steps)
        assert candidates.shape == (4, 200)
        arguments = (candidates, svq.steps, svq.lengths, svq._counts().budget)
        classes, v = search(z.T, *arguments)
        # As on a GPU, where every vector is searched in every class, and the candidates count.
        with monkeypatch.context() as patch:
            patch.setattr(svq_search, "traced", lambda: True)
            assert all(map(torch.equal, search(z.T, *arguments), (classes, v)))
        error = (z.T - v * svq.steps[classes]).square().sum(0)
        best = optimum(svq, z)
        assert (error >= best * 0.999).float().mean() > 0.97  # the rest: more than four less
        losses.append(10 * math.log10(error.sum() / best.sum()))
    # The mean of four: a single vector far beyond the others can make most of an error.
    assert sum(losses) / len(losses) < 0.1  # dB


@pytest.mark.parametrize("bits, stages", [(22, 2), (40, 4), (23, 3), (8, 1), (60, 5)])
def test_bits_and_tokens(bits, stages):
    svq = fitted(SVQ(bits, dim=6, classes=4, stages=stages))
    assert svq.bits == bits and len(svq.codebook_sizes) == stages
    assert max(svq.token_bits) - min(svq.token_bits) <= 1
    _, indices = svq(latent(svq))
    assert (indices >= 0).all()
    assert indices.shape == ((3, 5, 4, stages) if stages > 1 else (3, 5, 4))
    # Every index of the codebook decodes, also one that no vector has.
    last = torch.tensor(svq.codebook_sizes) - 1
    assert (
        svq.indices_to_codes(last.view(1, 1, -1) if stages > 1 else last.view(1, 1))
        .isfinite()
        .all()
    )


def test_more_tokens_decode_to_a_finer_latent():
    torch.manual_seed(0)
    svq = fitted(SVQ(40, dim=12, stages=4))
    z = laplacian_mixture(12, 3000).T[None]
    quantized, indices = svq(z)
    after = svq.codes_after_each_stage(indices)
    errors = [(z - codes).square().mean().item() for codes in after]
    assert errors == sorted(errors, reverse=True) and torch.equal(after[-1], quantized)
    assert errors[0] < 0.8 * (z - svq.running_mean[:, None]).square().mean()
    # Alone, a token leaves the weak channels at their mean.
    weak = svq.order[-1]
    assert torch.equal(after[0][:, weak], svq.running_mean[weak].expand(1, 3000))


def test_the_channel_that_a_token_leaves_open_is_in_the_middle():
    svq = fitted(SVQ(22, dim=6, classes=4, stages=2))
    first = torch.arange(2048).view(1, -1, 1)
    coarse = svq.indices_to_codes(first)
    lowest, middle = (
        svq.indices_to_codes(torch.cat([first, torch.full_like(first, second)], -1))
        for second in (0, 1024)
    )
    strong = svq.order[0]
    assert torch.equal(coarse[:, strong], middle[:, strong])
    assert not torch.equal(lowest[:, strong], middle[:, strong])


def test_any_scale_of_the_latent_gives_the_same_indices():
    torch.manual_seed(0)
    batches = [laplacian_mixture(6, 500).T[None] for _ in range(12)]
    found = []
    for factor in (1.0, 2.0**12, 2.0**-4):  # powers of two, which round alike
        svq = SVQ(16, dim=6)
        with torch.no_grad():
            for z in batches:
                svq(factor * z)
        found.append(svq.eval()(factor * batches[-1])[1])
    # Up to the 1e-10 that is added to a variance.
    assert (found[0] == found[1]).float().mean() > 0.98
    assert (found[0] == found[2]).float().mean() > 0.9


def test_the_gradient_is_straight_through_but_for_its_component_along_the_error():
    svq = fitted(SVQ(22, dim=6))
    z = latent(svq).requires_grad_()
    quantized, _ = svq(z)
    g = torch.randn_like(z)
    (found,) = torch.autograd.grad(quantized, z, g)
    for ours, given, error in zip(found, g, (z - quantized).detach(), strict=True):
        along = (given * error).sum() / error.square().sum()
        torch.testing.assert_close(ours, given - along * error)
        assert along.abs() * error.norm() > 1e-3  # there was something to remove
        assert (ours * error).sum().abs() < 1e-5 * ours.norm() * error.norm()


def test_a_latent_that_is_quantized_exactly_has_the_gradient_of_the_output():
    svq = fitted(SVQ(22, dim=6))
    exact = svq(latent(svq))[0].detach().requires_grad_()
    quantized, _ = svq(exact)
    assert torch.equal(quantized, exact)
    g = torch.randn_like(exact)
    assert torch.equal(torch.autograd.grad(quantized, exact, g)[0], g)


def test_a_latent_that_is_not_a_number_shows():
    svq = fitted(SVQ(22, dim=6))
    z = latent(svq)
    expected = svq(z)[0]
    z[0, 0, 0], expected[0, 0, 0] = math.nan, math.nan
    quantized, indices = svq(z)
    assert quantized.isnan().equal(expected.isnan())
    # Its index is as valid as any: it decodes to finite codes, and all others to the same bits.
    decoded = svq.indices_to_codes(indices)
    assert decoded.isfinite().all() and torch.equal(decoded[1:], quantized[1:])
    assert torch.equal(quantized[1:], expected[1:])


def test_a_random_convolutional_encoder_does_not_collapse():
    """A commitment term makes it shrink its latents to nothing before the decoder uses them."""
    torch.manual_seed(1)
    model = VQVAE(get_args(["--quantizer=svq", "--svq-dim=16", "--channel=16"])).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.006)
    errors = []
    for _ in range(60):
        images = F.interpolate(torch.rand(8, 3, 2, 2), size=(32, 32), mode="bilinear")
        output, indices, _ = model(images)
        error = (output - images).abs().mean()
        optimizer.zero_grad()
        (error / 0.226).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        errors.append(error.detach() / (images - images.mean()).abs().mean())
    assert torch.stack(errors[-10:]).mean() < 0.85  # 1 is the mean colour
    assert len(indices.unique()) > 50


def test_tables_move_in_training_and_are_integers_that_stay():
    svq = SVQ(22, dim=8)
    before = svq.lengths.clone()
    fitted(svq, batches=5)
    assert not torch.equal(before, svq.lengths) and svq.lengths.dtype == torch.int64
    state = {key: value.clone() for key, value in svq.state_dict().items()}
    svq(latent(svq))
    assert all(torch.equal(state[key], value) for key, value in svq.state_dict().items())
    # Products with integers up to 2^12 are exact: nothing depends on how a device rounds.
    integers = torch.arange(2**12)
    exact = integers.double() * svq.steps.double()[:, None]
    assert torch.equal((integers * svq.steps[:, None]).double(), exact)


def test_the_scale_statistics_are_those_of_the_vectors():
    """Mean and variance of log2 of the scale; the first batch counts alone."""
    svq = SVQ(16, dim=4)
    z = torch.randn(1, 4, 500) * torch.exp2(torch.randn(1, 1, 500)) + 5
    svq(z)
    scale = log_scale(z[0] - svq.running_mean[:, None], *svq._reference_step(svq.running_var))
    wanted = torch.stack([scale.mean(), scale.var(correction=0)])
    torch.testing.assert_close(svq.log_scale, wanted, rtol=1e-4, atol=1e-4)


def test_the_scale_of_a_vector_by_hand():
    """Channels count as far as they are above the noise of quantization, step^2 / 12."""
    std, step = torch.tensor([2.0, 0.1]).double(), torch.tensor(1.2).double()
    strong, weak = 4 / (4 + 0.12), 0.01 / (0.01 + 0.12)
    for first, second in ((3.0, -1.0), (0.5, 0.0)):
        mean = (strong * (first / 2) ** 2 + weak * (second / 0.1) ** 2) / (strong + weak)
        found = log_scale(torch.tensor([[first], [second]]), std, step)
        assert found.item() == pytest.approx(math.log2(mean) / 2, rel=1e-5)


def test_the_statistics_of_the_classes_are_running_means():
    """Shares, P(v != 0) and mean |v|, recomputed from codes and indices; even weights at first."""
    svq, wanted = SVQ(16, dim=4, classes=4), torch.zeros(4, 9)
    for number in (1, 2, 3):
        codes, indices = svq(laplacian_mixture(4, 700).T[None])
        classes = indices[0] // svq.class_size
        v = ((codes[0].detach().T - svq.running_mean) / svq.steps[classes, None]).round().abs()
        features = torch.cat([torch.ones(700, 1), v.sign(), v], 1)
        batch = F.one_hot(classes, 4).float().T @ features / 700
        wanted += (batch - wanted) / number
        torch.testing.assert_close(svq.class_moments, wanted, rtol=1e-4, atol=1e-5)
    assert (wanted[:, 0] > 0).sum() > 1 and wanted[:, 0].sum().item() == pytest.approx(1)


def test_probabilities_are_those_counted_and_a_little_of_a_laplacian():
    svq = SVQ(16, dim=1, classes=2)
    share, counted, magnitude = 0.5, 0.3, 0.6  # of the first class; nobody is in the second
    svq.class_moments.copy_(torch.tensor([[share, counted, magnitude], [0, 0, 0]]))
    nonzero, decay = svq._probabilities(torch.tensor([2.0]).double(), torch.tensor(1.5).double())
    prior_decay = math.exp(-(2**0.5) * 1.5 / 2)
    prior, weight = prior_decay**0.5, PRIOR_WEIGHT / 2
    some = (counted + weight * prior) / (share + weight)
    mean = (magnitude + weight * prior / (1 - prior_decay)) / (share + weight)
    assert nonzero.flatten().tolist() == pytest.approx([some, prior], rel=1e-6)
    assert decay.flatten().tolist() == pytest.approx([1 - some / mean, prior_decay], rel=1e-6)


def test_the_order_of_the_channels_makes_no_difference():
    """Statistics are kept by channel, code lengths by variance: neither stands for the other."""
    shuffled = torch.tensor([3, 0, 5, 1, 4, 2])
    one, other = SVQ(22, dim=6), SVQ(22, dim=6)
    for _ in range(12):
        z = laplacian_mixture(6, 800).T[None]
        one(z), other(z[:, shuffled])
    torch.testing.assert_close(one.running_var[shuffled], other.running_var)
    # Up to the rounding of sums over channels.
    assert (one.lengths - other.lengths).abs().max() <= 1
    assert (one.lengths == other.lengths).float().mean() > 0.95
    same = one.eval()(z)[1] == other.eval()(z[:, shuffled])[1]
    assert same.float().mean() > 0.9


def test_the_meaning_of_an_index_by_hand():
    """Files hold indices of older models: no version may give one another meaning.

    8 bits and 4 classes: 64 indices a class. A budget is below 8 (8 + 14) = 176 eighths of a bit,
    and no higher than leaves at most 64 vectors. The second channel is the first in the vectors.
    """
    svq = SVQ(8, dim=2, classes=4).eval()
    svq.order.copy_(torch.tensor([1, 0]))
    svq.running_mean.copy_(torch.tensor([10, 20]))
    svq.steps.copy_(torch.tensor([0.25, 0.5, 1, 2]))
    never = [0, 176, 1, 1]  # the length of 0, of 1 and -1, what is added for more, and how often
    both = [[0, 100, 100, 1], [0, 100, 100, 1]]  # one of them is 0
    lengths = [both, [[0, 50, 25, 1], never], [[0, 150, 25, 2], never], [[0, 1, 1, 1], never]]
    svq.lengths.copy_(torch.tensor(lengths))
    assert svq._counts().budget.tolist() == [175, 175, 175, 31]
    meaning = {
        **{0: [10, 19.75], 1: [9.75, 20], 2: [10, 20], 3: [10.25, 20], 4: [10, 20.25]},
        **{5: [10, 20.25], 63: [10, 20.25]},  # indices left over stand for the last vector
        **{64: [10, 20 - 6 * 0.5], 65: [10, 20 - 5 * 0.5], 76: [10, 20 + 6 * 0.5]},
        **{128: [10, 20 - 4], 132: [10, 20], 136: [10, 20 + 4], 137: [10, 20 + 4]},
        **{192: [10, 20 - 31 * 2], 254: [10, 20 + 31 * 2], 255: [10, 20 + 31 * 2]},
    }
    codes = svq.indices_to_codes(torch.tensor([list(meaning)]))
    assert codes[0].T.tolist() == list(meaning.values())


def test_vectors_far_outside_of_the_budgets_decode_as_they_were_quantized():
    torch.manual_seed(0)
    svq = fitted(SVQ(22, dim=6, stages=2))
    z = latent(svq) * torch.logspace(0, 38, 20).view(5, 4)
    z[0, :, 0, 0] = math.inf
    quantized, indices = svq(z)
    assert torch.equal(svq.indices_to_codes(indices), quantized) and quantized.isfinite().all()


def snr(svq, z):
    """Signal to noise in dB of the quantization of vectors (n, dim)."""
    quantized = svq(z.T[None])[0][0].T
    return 10 * float(torch.log10(z.square().sum() / (z - quantized).square().sum()))


def test_more_classes_follow_a_mixture_of_scales_better():
    torch.manual_seed(0)
    z = laplacian_mixture(12, 4000)
    quantizers = [fitted(SVQ(24, dim=12, classes=k)) for k in (1, 2, 4, 8)]
    found = [snr(svq, z) for svq in quantizers]
    assert found == sorted(found) and found[0] > 3.6  # dB
    for svq in quantizers:  # the middles of equal parts of -25/14 to 39/14: one class is at 1/2
        (mean, var), (_, level) = svq.log_scale, svq._reference_step(svq.running_var)
        places = ((svq.steps / level).log2() - mean) / var.sqrt()
        middles = -25 / 14 + 64 / 14 * (torch.arange(svq.classes) + 0.5) / svq.classes
        torch.testing.assert_close(places.float(), middles, atol=0.01, rtol=0)


@pytest.mark.parametrize("weak", [0.0, 1e-6])
def test_channels_with_nothing_in_them_cost_nothing(weak):
    """The scale of a vector, and its class, are those of its strong channels."""
    torch.manual_seed(0)
    scale = torch.exp(0.6 * torch.randn(31, 2000, 1))
    strong, nothing = torch.distributions.Laplace(0.0, 1.0).sample((2, 31, 2000, 16))
    with torch.no_grad():
        alone, among = SVQ(22, dim=4), SVQ(22, dim=20)
        for i in range(31):
            few = scale[i] * strong[i, :, :4]
            z = torch.cat([few, scale[i] * weak * nothing[i]], 1)
            alone.train(i < 30), among.train(i < 30)
            one, other = snr(alone, few), snr(among, z)
    assert one - other < 1


def test_a_vector_beyond_the_budget_is_cut_and_not_lost():
    torch.manual_seed(0)
    svq = SVQ(36, dim=4)
    with torch.no_grad():
        for _ in range(30):
            svq(torch.distributions.Laplace(0.0, 1.0).sample((4, 2000))[None])
    z = torch.tensor([2.4, -2.6, -2.8, -10.6])
    for factor in (0.5, 0.9, 1, 1.1, 1.3, 1.6):
        quantized = svq.eval()(factor * z[None, :, None])[0][0, :, 0]
        assert quantized.norm() > 0.8 * (factor * z).norm()


@pytest.mark.parametrize("bits, dim, classes", [(14, 7, 8), (13, 7, 4), (12, 7, 2)])
def test_no_class_is_empty_where_zero_is_rare(bits, dim, classes):
    """Where 0 was as long as 1 and -1, a class could have more shortest vectors than fit it."""
    svq = SVQ(bits, dim, classes)
    for _ in range(20):
        z = torch.randn(1, dim, 400).sign() * (0.5 + torch.rand(1, dim, 400))
        svq(z)
    quantized, indices = svq.eval()(z)
    assert torch.equal(svq.indices_to_codes(indices), quantized)
    assert (quantized - z).square().mean() < 0.2 * z.square().mean()


@pytest.mark.parametrize("bits, dim, classes", [(22, 512, 8), (40, 512, 8), (8, 300, 2)])
@pytest.mark.parametrize("batches", [0, 1])
def test_no_class_is_empty_with_many_channels(bits, dim, classes, batches):
    """The lengths of that many zeros alone were above every budget: nothing could be decoded."""
    torch.manual_seed(0)
    svq = fitted(SVQ(bits, dim, classes), batches)
    counts = svq._counts()
    assert (counts.within[:, 0].gather(1, counts.budget[:, None]) > 0).all()
    quantized, indices = svq(torch.randn(2, dim, 8, 4))
    assert torch.equal(svq.indices_to_codes(indices), quantized)
    assert len(indices.unique()) > 30 or bits == 8  # 600 vectors with one 1 or -1 are too many


def test_lengths_of_older_models_decode_as_those_relative_to_zero():
    torch.manual_seed(0)
    svq = fitted(SVQ(22, dim=20, stages=2))
    z = latent(svq)
    quantized, indices = svq(z)
    old = torch.randint(1, 6, (svq.classes, svq.dim))
    svq.lengths += torch.stack([old, old, 0 * old, 0 * old], -1)
    assert torch.equal(svq(z)[1], indices)
    assert torch.equal(svq.indices_to_codes(indices), quantized)


def test_a_batch_that_is_not_finite_changes_nothing_for_good():
    svq = fitted(SVQ(16, dim=4), batches=3)
    state = {key: value.clone() for key, value in svq.state_dict().items()}
    svq.train()(torch.full((1, 4, 50), math.nan))
    assert torch.equal(svq.running_mean, state["running_mean"])
    assert all(value.isfinite().all() for value in svq.state_dict().values())


def test_at_equal_bits_it_is_ahead_of_products_of_levels():
    """Squared error for a mixture of scales, at 22 bits for 8 channels."""
    torch.manual_seed(0)
    levels = [16, 16, 8, 8, 8, 4, 4, 2]
    svq = fitted(SVQ(22, dim=8))
    geometric = fitted(GeometricRFSQ(stages=1, levels=levels))
    z = laplacian_mixture(8, 5000).T[None]
    error = [(z - q(z)[0]).square().mean().log10().item() * 10 for q in (svq, geometric)]
    assert FSQ(levels).bits == svq.bits == geometric.bits == 22
    assert error[0] < error[1] - 1  # dB


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"bits": 7}, "bits must be an integer from 8 to 60, not 7"),
        ({"bits": 61}, "not 61"),
        ({"dim": 0}, "dim must be an integer of 1"),
        ({"bits": 40, "dim": 2}, "40 bits are too many for 2 channels: .* at least 3"),
        ({"bits": 40, "classes": 2**36}, "classes must be an integer from 1 to 1024"),
        ({"bits": 8, "classes": 17}, "17 classes are too many for 8 bits: at most 16"),
        ({"stages": 23}, "22 bits make at most 22 tokens, not 23"),
        ({"momentum": 0.0}, "momentum must be in"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        SVQ(**changes)


def test_a_batch_that_is_not_finite_moves_no_statistics():
    svq = SVQ(22, 4).train()
    torch.manual_seed(0)
    svq(torch.randn(1, 4, 50))
    before = {key: value.clone() for key, value in svq.state_dict().items()}
    for bad in (math.nan, math.inf):
        z = torch.randn(1, 4, 50)
        z[0, 1, 7] = bad
        svq(z)
    for key, value in svq.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("run", range(1, 10))
def test_lengths_are_the_same_in_float32_and_int64(run):
    magnitude, lengths = torch.arange(3000), Lengths(*torch.tensor([1, 4, 3, run]))
    wanted = [1, *(4 + 3 * ((m - 1) // run) for m in range(1, 3000))]
    assert lengths.of(magnitude).tolist() == wanted
    assert Lengths(*(x.float() for x in lengths)).of(magnitude.float()).tolist() == wanted


@pytest.mark.parametrize(
    ("bits", "dim", "live"), [(40, 28, 2), (40, 28, 1), (22, 20, 1), (32, 8, 1)]
)
def test_few_channels_with_anything_in_them_are_quantized_well(bits, dim, live):
    """More bits than the integers of a channel can take are left over, and not lost."""
    torch.manual_seed(0)
    svq = SVQ(bits, dim)

    def few():
        return F.pad(torch.randn(4, live, 256), (0, 0, 0, dim - live))

    for _ in range(60):
        svq(few())
    z = few()
    error = (svq.eval()(z)[0] - z)[:, :live].square().mean()
    assert 10 * torch.log10(z[:, :live].square().mean() / error) > 80  # dB; 2 to 4 before
