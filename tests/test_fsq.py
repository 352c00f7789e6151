"""FSQ against numbers worked out by hand, and its indices against Python's integers."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantizers import FSQ, straight_through

# L: (z, code, digit), from h = (L-1) 0.999 / 2, offset 1/2 and shift tan(offset/h) for even L.
# L = 4, z = 0.5: h = 1.4985, shift = tan(0.33367) = 0.34668; 1.4985 tanh(0.84668) - 0.5 = 0.533,
# which rounds to 1: code 1/2, digit 1 + 2.
BY_HAND = {
    2: [(-9, -1, 0), (-2, -1, 0), (9, 0, 1), (2, 0, 1)],
    3: [(-9, -1, 0), (-0.6, -1, 0), (-0.5, 0, 1), (0, 0, 1), (0.5, 0, 1), (0.6, 1, 2), (9, 1, 2)],
    4: [(-9, -1, 0), (-2, -1, 0), (-1, -0.5, 1), (-0.5, -0.5, 1), (0, 0, 2), (0.5, 0.5, 3)],
    5: [(-1, -1, 0), (-0.9, -0.5, 1), (-0.3, -0.5, 1), (0.2, 0, 2), (0.3, 0.5, 3), (1, 1, 4)],
    8: [
        *((-9, -1, 0), (-1, -0.75, 1), (-0.5, -0.5, 2), (-0.2, -0.25, 3)),
        *((0, 0, 4), (0.5, 0.25, 5), (1, 0.5, 6), (9, 0.75, 7)),
    ],
}


def bound(z: float, level: int) -> float:
    """Appendix A.1 of the paper for one number, in double precision."""
    h = (level - 1) * 0.999 / 2
    offset = 0.0 if level % 2 else 0.5
    return h * math.tanh(z + math.tan(offset / h)) - offset


def inverse_bound(y: float, level: int) -> float:
    """The z whose bound is y; far out where the bound never gets there."""
    h = (level - 1) * 0.999 / 2
    offset = 0.0 if level % 2 else 0.5
    x = (y + offset) / h
    return math.copysign(30, x) if abs(x) >= 1 else math.atanh(x) - math.tan(offset / h)


@pytest.mark.parametrize("level", [2, 3, 4, 5, 8, 31, 256, 512])
def test_the_bound_is_that_of_the_paper(level):
    fsq, z = FSQ([level]), torch.linspace(-6, 6, 97)[:, None]
    wanted = torch.tensor([bound(x, level) for x in z[:, 0].tolist()])
    torch.testing.assert_close(fsq.bound(z, fsq.grid(z))[:, 0], wanted, rtol=0, atol=2e-7 * level)


def digits(index: int, levels: list[int]) -> list[int]:
    """Mixed-radix digits in unbounded integers, the first channel the least significant."""
    out = []
    for level in levels:
        index, digit = divmod(index, level)
        out.append(digit)
    return out


# ---------------------------------------------------------------------------------------
# Straight-through
# ---------------------------------------------------------------------------------------
def test_straight_through_value_is_exact():
    values = [0.0, -0.0, 1e-45, -1e-38, 1 / 3, 16777217.0, 3.4e38, math.inf, -math.inf]
    value = torch.tensor(values)
    for source in (torch.zeros_like(value), torch.full_like(value, 1e30), -value.flip(0)):
        out = straight_through(source, value)
        assert torch.equal(out.view(torch.int32), value.view(torch.int32))


@given(
    st.floats(width=32, allow_nan=False),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
def test_straight_through_value_is_exact_everywhere(value, source):
    value, source = torch.tensor([value]), torch.tensor([source])
    out = straight_through(source, value)
    assert torch.equal(out.view(torch.int32), value.view(torch.int32))


def test_straight_through_gradient_goes_to_the_source_alone():
    source = torch.randn(3, 4, requires_grad=True)
    value = torch.randn(3, 4, requires_grad=True)
    upstream = torch.randn(3, 4)
    (straight_through(source, value) * upstream).sum().backward()
    assert torch.equal(source.grad, upstream)
    assert value.grad is None


# ---------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("level", BY_HAND)
def test_codes_and_indices_by_hand(level):
    z, codes, indices = zip(*BY_HAND[level], strict=True)
    quantized, found = FSQ([level])(torch.tensor(z).float().view(-1, 1))
    assert quantized.flatten().tolist() == list(codes)
    assert found.tolist() == list(indices)


def test_the_default_is_the_paper_s_4096_codes():
    assert FSQ().levels == [8, 8, 8, 8] and FSQ().bits == 12.0


def test_index_order_by_hand():
    # digits 2, 0, 2, 5: 2 + 0*3 + 2*(3*4) + 5*(3*4*5) = 326
    quantized, index = FSQ([3, 4, 5, 8])(torch.tensor([[9.0, -9.0, 0.0, 0.5]]))
    assert quantized.tolist() == [[1.0, -1.0, 0.0, 0.25]]
    assert index.dtype == torch.int64 and index.tolist() == [326]


@given(level=st.integers(2, 512), z=st.floats(-6, 6, width=32))
def test_codes_follow_the_paper(level, z):
    y = bound(z, level)
    rounded = {math.floor(y + 0.5 + d) for d in (-1e-3, 1e-3)}  # both, next to a boundary
    quantized, index = FSQ([level])(torch.tensor([[z]]))
    assert index.item() - level // 2 in rounded
    assert quantized.item() == torch.tensor((index.item() - level // 2) / (level // 2)).item()


@pytest.mark.parametrize("levels", [[2], [3], [4], [8], [2, 3, 4, 5, 8], [17, 512]])
def test_gradient_is_the_slope_of_the_bound(levels):
    z = torch.randn(64, len(levels), 3, requires_grad=True)
    upstream = torch.randn_like(z)
    (FSQ(levels)(z)[0] * upstream).sum().backward()
    for channel, level in enumerate(levels):
        h, offset = (level - 1) * 0.999 / 2, 0.0 if level % 2 else 0.5
        x = z.detach()[:, channel].double() + math.tan(offset / h)
        slope = h * (1 - torch.tanh(x) ** 2) / (level // 2)
        wanted = upstream[:, channel].double() * slope
        torch.testing.assert_close(z.grad[:, channel].double(), wanted, rtol=1e-4, atol=1e-6)
        assert slope.max() < 1


# ---------------------------------------------------------------------------------------
# Indices
# ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("level", [*range(2, 65), 255, 256, 511, 512])
def test_every_code_of_a_channel_is_reached_and_survives_the_round_trip(level):
    fsq, every = FSQ([level]), torch.arange(level)
    codes = fsq.indices_to_codes(every)
    half = level // 2
    assert codes.flatten().tolist() == ((every - half).float() / half).tolist()
    assert torch.equal(fsq.codes_to_indices(codes), every)
    z = [inverse_bound(i - half, level) for i in range(level)]
    quantized, indices = fsq(torch.tensor(z).view(-1, 1))
    assert torch.equal(indices, every)
    assert torch.equal(quantized, codes)


@pytest.mark.parametrize("levels", [[2, 3, 4, 5, 7], [8, 8, 8, 4], [64, 2, 63], [4] * 5, [2] * 14])
def test_round_trip_over_every_code_of_a_product(levels):
    fsq = FSQ(levels)
    every = torch.arange(math.prod(levels))
    codes = fsq.indices_to_codes(every)
    assert len(torch.unique(codes, dim=0)) == len(every)
    assert torch.equal(fsq.codes_to_indices(codes), every)


LARGE = {
    "2^24": [8] * 8,
    "above 2^24": [257, 256, 256],
    "below 2^31": [2] * 29 + [3],
    "2^31": [2] * 31,
    "above 2^31": [3] + [2] * 30,
    "2^40": [4] * 20,
    "2^53": [2] * 53,
    "above 2^53": [3, 2, 2] + [4] * 26,
    "odd, above 2^53": [511] * 6,
    "2^62": [4] * 31,
}


@pytest.mark.parametrize("levels", LARGE.values(), ids=LARGE.keys())
def test_round_trip_where_floats_lose_integers(levels):
    fsq, size, rng = FSQ(levels), math.prod(levels), random.Random(0)
    edges = [n + d for n in (0, 2**24, 2**31, 2**53, size // 2, size) for d in (-2, -1, 0, 1)]
    wanted = [i for i in edges if 0 <= i < size] + [rng.randrange(size) for _ in range(500)]
    indices = torch.tensor(wanted)
    codes = fsq.indices_to_codes(indices)
    half = torch.tensor([level // 2 for level in levels])
    by_hand = (torch.tensor([digits(i, levels) for i in wanted]) - half).float() / half
    assert torch.equal(codes, by_hand)
    assert fsq.codes_to_indices(codes).tolist() == wanted
    z = torch.atanh((codes * half + torch.tensor([0.5 * (1 - n % 2) for n in levels])) / half / 1.1)
    quantized, found = fsq(z)
    assert found.tolist() == [
        sum(d * math.prod(levels[:i]) for i, d in enumerate(row))
        for row in (quantized * half + half).round().long().tolist()
    ]


@given(st.data())
def test_round_trip_of_any_levels(data):
    levels = data.draw(st.lists(st.integers(2, 512), min_size=1, max_size=6))
    wanted = data.draw(st.lists(st.integers(0, math.prod(levels) - 1), min_size=1, max_size=8))
    fsq = FSQ(levels)
    codes = fsq.indices_to_codes(torch.tensor(wanted))
    assert fsq.codes_to_indices(codes).tolist() == wanted
    assert codes.abs().max() <= 1


# ---------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("levels", "named"),
    [
        ([8, 1], "1"),
        ([0], "0"),
        ([8, -3], "-3"),
        ([4.0, 4], "4.0"),
        ([True, 4], "True"),
        (["8"], "'8'"),
        ([], "levels must be .*not \\[\\]"),
        (8, "levels must be .*not 8"),
        (torch.tensor(8), "levels must be .*not 8"),
        (torch.tensor([8.0, 8.0]), r"tensor\(8\.\) is among"),
        ([torch.tensor(True), 4], "True"),
        ([8, 513], "513"),
        ([4] * 32, r"2\^64"),
        ([3] + [4] * 31, r"2\^63"),
    ],
)
def test_levels_that_cannot_be(levels, named):
    with pytest.raises(ValueError, match=named):
        FSQ(levels)


@pytest.mark.parametrize("level", [300, 511, 512])
def test_codes_of_many_levels_in_half_precision(level):
    fsq, every = FSQ([level]), torch.arange(level)[:, None]
    codes = fsq.indices_to_codes(every)
    exact = (codes.bfloat16().float() * (level // 2)).round() == codes * (level // 2)
    found = fsq.codes_to_indices(codes.bfloat16())
    assert torch.equal(found[exact[:, 0]], every[exact[:, 0]])
    assert torch.equal(fsq.codes_to_indices(codes.half()), every)
    meta = torch.empty(2, 1, 3, device="meta")
    assert fsq.codes_to_indices(meta).shape == (2, 3)


@pytest.mark.parametrize("wrong", [7.3, 0.1, -1.25, math.nan, math.inf])
def test_numbers_that_are_no_codes_have_no_index(wrong):
    fsq = FSQ([8, 5])
    codes = fsq.indices_to_codes(torch.arange(40)[:, None])
    for half in (torch.float16, torch.bfloat16):
        assert fsq.codes_to_indices(codes.to(half))[:, 0].tolist() == list(range(40))
    codes[7, 1, 0] = wrong
    with pytest.raises(ValueError, match="not all codes of fsq-8x5"):
        fsq.codes_to_indices(codes)
    between = torch.tensor([[0.3 / 4], [0.0]]).T.bfloat16()  # 0.3 of a step beside a code
    with pytest.raises(ValueError, match="not all codes of fsq-8x5"):
        fsq.codes_to_indices(between)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 5), (4,), ()])
def test_wrong_number_of_channels_names_both(shape):
    given_channels = str(shape[1]) if len(shape) > 1 else "no"
    with pytest.raises(ValueError, match=rf"4 channels.*has {given_channels}"):
        FSQ([8] * 4)(torch.randn(shape))


@pytest.mark.parametrize("index", [-1, 4096, 2**40])
def test_indices_out_of_range_are_named(index):
    with pytest.raises(ValueError, match=rf"0 to 4095.*{index}"):
        FSQ([8] * 4).indices_to_codes(torch.tensor([0, index]))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32, torch.bool])
def test_indices_of_another_type(dtype):
    with pytest.raises(ValueError, match=f"integers, not {dtype}"):
        FSQ([8] * 4).indices_to_codes(torch.zeros(3, dtype=dtype))


def test_a_single_number_is_no_batch_of_indices():
    with pytest.raises(ValueError):
        FSQ([8] * 4).indices_to_codes(torch.tensor(0))


def test_a_cast_leaves_the_copies_on_their_device():
    fsq = FSQ([8] * 4).to("meta")  # where a GPU is missing, another device than the CPU
    for cast in (lambda: fsq.half(), lambda: fsq.to(memory_format=torch.channels_last)):
        cast()
        assert len(fsq._copies) == 2 and all(x.is_meta for x in fsq._copies)


def test_a_move_back_to_the_cpu_leaves_no_copy_elsewhere():
    fsq = FSQ([8] * 4).to("meta").to_empty(device="cpu")
    assert not fsq._copies and all(
        x.device.type == "cpu" for x in fsq.constants(torch.device("cpu"))
    )
