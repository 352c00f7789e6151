"""LFQ against the sum over all 2^d codes that its equations avoid."""

import itertools
import math

import pytest
import torch

from quantizers import LFQ


def all_codes(dim):
    """(2^d, d), channel i the bit i of the row's number."""
    return torch.tensor(
        [[1.0 if row >> i & 1 else -1.0 for i in range(dim)] for row in range(2**dim)],
        dtype=torch.float64,
    )


def naive_entropies(z, temperature):
    """H_token and H_batch of z (N, d), nats, from the full tokens x codes matrix."""
    squared = (z[:, None, :] - all_codes(z.shape[1])[None]).square().sum(-1)
    log_p = torch.log_softmax(-squared / temperature, dim=1)
    p = log_p.exp()
    mean = p.mean(0)
    return -(p * log_p).sum(1).mean(), -(mean * mean.log()).sum()


def test_codes_and_indices_by_hand():
    z = torch.tensor([[-0.1, 2.0, 0.3], [5.0, -1e-9, -3.0], [-1.0, -1.0, -1.0], [1.0, 1.0, 1e-9]])
    quantized, indices, _ = LFQ(3)(z)
    assert quantized.tolist() == [[-1, 1, 1], [1, -1, -1], [-1, -1, -1], [1, 1, 1]]
    assert indices.dtype == torch.int64 and indices.tolist() == [6, 1, 0, 7]


def test_zero_counts_as_negative():
    quantized, indices, _ = LFQ(2)(torch.tensor([[0.0, -0.0], [0.0, 1.0]]))
    assert quantized.tolist() == [[-1, -1], [-1, 1]] and indices.tolist() == [0, 2]


def test_every_code_is_a_code():
    lfq = LFQ(6)
    codes = lfq.indices_to_codes(torch.arange(64))
    assert torch.equal(codes.double(), all_codes(6))
    assert torch.equal(lfq(codes)[1], torch.arange(64))


def test_the_other_package_counts_channels_from_the_highest_bit():
    """As docs/quantizers.md says, where it exchanges tokens with it."""
    theirs = pytest.importorskip("vector_quantize_pytorch").LFQ(dim=6, codebook_size=64).eval()
    z, lfq = torch.randn(2, 6, 50), LFQ(6)
    indices = lfq(z)[1]
    reversed_bits = sum((indices >> i & 1) << lfq.dim - 1 - i for i in range(lfq.dim))
    assert torch.equal(theirs(z.movedim(1, -1))[1], reversed_bits)


@pytest.mark.parametrize("dim", [40, 62])
def test_indices_above_what_floats_hold(dim):
    wanted = [0, 1, 2**24 + 1, 2**31 - 1, 2**31, 2**dim - 1, 2**dim // 3]
    lfq = LFQ(dim, entropy_loss_weight=0)
    codes = lfq.indices_to_codes(torch.tensor(wanted))
    by_hand = [[1.0 if index >> i & 1 else -1.0 for i in range(dim)] for index in wanted]
    assert codes.tolist() == by_hand
    assert lfq(codes)[1].tolist() == wanted


def test_gradient_is_straight_through():
    z = torch.randn(2, 5, 3, requires_grad=True)
    upstream = torch.randn_like(z)
    (LFQ(5)(z)[0] * upstream).sum().backward()
    assert torch.equal(z.grad, upstream)


# ---------------------------------------------------------------------------------------
# Entropies and loss
# ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("dim", range(1, 9))
@pytest.mark.parametrize("temperature", [0.3, 1.0, 7.0])
def test_entropies_equal_the_naive_sum(dim, temperature):
    z = torch.randn(50, dim, dtype=torch.float64) * 0.7
    token, batch = LFQ(dim, temperature=temperature).entropies(z)
    wanted_token, wanted_batch = naive_entropies(z, temperature)
    torch.testing.assert_close(token, wanted_token, rtol=0, atol=1e-9)
    torch.testing.assert_close(batch, wanted_batch, rtol=0, atol=1e-9)
    token, batch = LFQ(dim, temperature=temperature).entropies(z.float())
    torch.testing.assert_close(token.double(), wanted_token, rtol=0, atol=1e-5)
    torch.testing.assert_close(batch.double(), wanted_batch, rtol=0, atol=1e-5)


def test_entropies_have_the_values_that_they_must_have():
    lfq = LFQ(4)
    # Halfway between all codes: every code equally likely.
    token, batch = lfq.entropies(torch.zeros(3, 4))
    assert token.item() == pytest.approx(4 * math.log(2), abs=1e-6)
    assert batch.item() == pytest.approx(4 * math.log(2), abs=1e-6)
    # Far away: each token certain. All codes present once, then one code alone.
    every = 100 * all_codes(4).float()
    for tokens, wanted in ((every, 4 * math.log(2)), (every[:1], 0.0)):
        token, batch = lfq.entropies(tokens)
        assert token.item() == pytest.approx(0, abs=1e-6)
        assert batch.item() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("dim", range(1, 9))
def test_loss_and_its_gradient_equal_the_naive_ones(dim):
    settings = dict(temperature=0.8, diversity_gamma=1.7)
    lfq = LFQ(dim, entropy_loss_weight=0.3, commitment_loss_weight=0.6, **settings)
    z = torch.randn(4, dim, 3, 2, requires_grad=True)
    loss = lfq(z)[2]
    loss.backward()
    exact = z.detach().double().requires_grad_()
    tokens = exact.movedim(1, -1).reshape(-1, dim)
    token, batch = naive_entropies(tokens, 0.8)
    commitment = (tokens - tokens.detach().sign()).square().mean()
    wanted = 0.3 * (token - 1.7 * batch) + 0.6 * commitment
    wanted.backward()
    torch.testing.assert_close(loss.double(), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_gradient_is_finite_far_from_the_codes():
    z = (1e3 * torch.randn(6, 8)).requires_grad_()
    loss = LFQ(8)(z)[2]
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(z.grad).all()


def test_commitment_alone_by_hand():
    z = torch.tensor([[0.5, -2.0]])  # to codes 1 and -1: 0.5^2 and 1^2
    loss = LFQ(2, entropy_loss_weight=0, commitment_loss_weight=0.4)(z)[2]
    assert loss.item() == pytest.approx(0.4 * (0.25 + 1) / 2)


@pytest.mark.parametrize(("dim", "groups"), [(6, 2), (6, 3), (6, 6), (8, 4), (5, 5), (5, 3)])
def test_groups_sum_their_entropies(dim, groups):
    z = torch.randn(40, dim, dtype=torch.float64)
    token, batch = LFQ(dim, entropy_groups=groups).entropies(z)
    parts = [naive_entropies(part, 1.0) for part in z.tensor_split(groups, dim=1)]
    torch.testing.assert_close(token, sum(part[0] for part in parts))
    torch.testing.assert_close(batch, sum(part[1] for part in parts))
    joint = naive_entropies(z, 1.0)
    torch.testing.assert_close(token, joint[0])
    assert batch > joint[1]


def test_large_codebooks_need_groups():
    with pytest.raises(ValueError, match=r"entropy_groups=1 leaves 40 bits.*24"):
        LFQ(40, entropy_groups=1)
    assert LFQ(24).entropy_groups == 1
    assert LFQ(40).entropy_groups == 2
    assert LFQ(62).entropy_groups == 3  # of 21, 21 and 20 bits
    z = torch.randn(3, 40, 2)
    token, batch = LFQ(40).entropies(z)
    assert 0 < token < 40 * math.log(2) and token < batch < 40 * math.log(2)


def test_a_prime_number_of_bits_is_not_split_into_single_ones():
    """29 equal bits have the entropy of one; a group for each would count it 29 times."""
    lfq = LFQ(29)
    z = 50 * torch.randn(200, 1).sign().expand(200, 29)
    assert lfq.entropy_groups == 2
    assert lfq.eval().entropies(z)[1] < 2.1 * math.log(2)


# ---------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------
WEIGHTS = ("entropy_loss_weight", "commitment_loss_weight", "diversity_gamma")


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        *(({"dim": dim}, f"dim.*{dim!r}") for dim in (0, -1, 63, 12.0, True)),
        *(({"temperature": t}, f"temperature.*{t}") for t in (0, -1, math.inf, math.nan)),
        *(({name: w}, f"{name}.*{w}") for name in WEIGHTS for w in (-1, math.inf, math.nan)),
        *(({"dim": 12, "entropy_groups": g}, f"entropy_groups.*12.*{g}") for g in (0, 13)),
    ],
)
def test_arguments_that_cannot_be(kwargs, named):
    with pytest.raises(ValueError, match=named):
        LFQ(**kwargs)


@pytest.mark.parametrize("index", [-1, 8])
def test_indices_out_of_range(index):
    with pytest.raises(ValueError, match=f"0 to 7.*{index}"):
        LFQ(3).indices_to_codes(torch.tensor([index]))


def test_wrong_number_of_channels_names_both():
    with pytest.raises(ValueError, match=r"12 channels.*has 4"):
        LFQ(12)(torch.randn(2, 4, 3))


def test_all_corners_of_a_small_cube():
    for signs in itertools.product((-1.0, 1.0), repeat=3):
        quantized, index, _ = LFQ(3)(0.2 * torch.tensor([signs]))
        assert quantized.tolist() == [list(signs)]
        assert index.item() == sum(2**i for i, sign in enumerate(signs) if sign > 0)
