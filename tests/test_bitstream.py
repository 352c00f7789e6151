"""The layout of a `.rfsq` file to the byte, fixed-rate packing, and the entropy coder."""

from __future__ import annotations

import math
import re
import struct
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codec import bitstream, context, entropy
from codec.bitstream import Header, pack, payload_bytes, unpack


# ---------------------------------------------------------------------------------------
# Layout
# ---------------------------------------------------------------------------------------
def test_layout_byte_by_byte():
    header = Header(3, b"8 bytes.", width=0x01020304, height=0x05)
    data = bitstream.write(header, b"side", b"payload")
    assert data[:4] == b"RFSQ"
    assert data[4] == 1 and data[5] == 0 and data[6] == 3
    assert data[7:15] == b"8 bytes."
    assert data[15:19] == bytes([4, 3, 2, 1]) and data[19:23] == bytes([5, 0, 0, 0])
    assert data[23:34] == b"sidepayload"
    assert data[34:] == struct.pack("<I", zlib.crc32(data[:34])) and len(data) == 27 + 11
    assert bitstream.read_header(data) == header and bitstream.intact(data)
    coded = Header(3, b"8 bytes.", 6, 5, payload=7, flags=1)
    data = bitstream.write(coded, b"side", b"payload")
    assert data[5] == 1 and data[23:27] == bytes([7, 0, 0, 0]) and data[27:38] == b"sidepayload"
    assert len(data) == 31 + 11 and bitstream.read_header(data) == coded
    grey = Header(3, b"8 bytes.", 6, 5, flags=bitstream.GREY)
    data = bitstream.write(grey, b"side", b"payload")
    assert data[5] == 2 and data[23:34] == b"sidepayload"
    assert len(data) == 27 + 11 and bitstream.read_header(data) == grey


@pytest.mark.parametrize(
    "data, part",
    [
        (b"", "empty"),
        (b"R", "truncated"),
        (b"RFSQ", "truncated"),
        (b"RFSQ\x01" + bytes(21), "truncated"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "not an RFSQ file"),
        (b"RFSX", "not an RFSQ file"),
        (b"RFSQ\x02" + bytes(40), "newer version, 2"),
        (b"RFSQ\x00" + bytes(40), "unknown version, 0"),
    ],
)
def test_what_is_no_header_says_why(data, part):
    with pytest.raises(ValueError, match=part):
        bitstream.read_header(data)


def test_checksum_sees_every_bit():
    data = bitstream.write(Header(1, bytes(8), 4, 4), b"", b"\x5a")
    assert bitstream.intact(data)
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        assert not bitstream.intact(bytes(changed))


# ---------------------------------------------------------------------------------------
# Fixed rate
# ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("positions", [1, 2, 3, 7, 1024, 24576, 65537])
@pytest.mark.parametrize("bits, sizes", [(22, [2048] * 2), (40, [1024] * 4), (40, [2**40])])
def test_22_and_40_bits_to_the_bit(positions, bits, sizes):
    rng = np.random.default_rng(0)
    indices = np.stack([rng.integers(0, size, positions) for size in sizes], 1)
    payload = pack(indices, sizes)
    assert len(payload) == math.ceil(bits * positions / 8) == payload_bytes(positions, sizes)
    assert np.array_equal(unpack(payload, positions, sizes), indices)


def test_packing_by_hand():
    # Two positions; stages of 4, 5 and 8 codes.
    indices = np.array([[1, 3, 6], [2, 4, 1]])
    # 01 10 | 3 + 4*5 = 23 in ceil(2 log2 5) = 5 bits: 10111 | 110 001 | zero bit to fill
    bits = "0110101111100010"
    assert pack(indices, [4, 5, 8]) == int(bits, 2).to_bytes(2, "big")
    # Powers of two: all positions of the first stage, then of the second.
    assert pack(np.array([[1, 0], [3, 2], [0, 1]]), [4, 4]) == bytes([0b01110000, 0b10010000])
    # One integer in base 3, the first index in the lowest place: 2 + 0*3 + 1*9 = 11 in 5 bits.
    assert pack(np.array([[2], [0], [1]]), [3]) == bytes([0b01011000])


@given(st.data())
@settings(max_examples=150)
def test_round_trip_of_any_codebooks(data):
    size = st.one_of(st.integers(2, 5000), st.integers(2, 2**62), st.sampled_from([2**40, 3**20]))
    sizes = data.draw(st.lists(size, min_size=1, max_size=3))
    positions = data.draw(st.integers(1, 60))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    indices = np.stack([rng.integers(0, size, positions) for size in sizes], 1)
    indices[rng.random(indices.shape) < 0.2] = 0
    highest = rng.random(indices.shape) < 0.2
    indices = np.where(highest, np.array(sizes) - 1, indices)
    payload = pack(indices, sizes)
    # Less than a bit is lost in each stage, and less than a byte at the end.
    needed = sum(positions * math.log2(size) for size in sizes)
    assert needed - 1e-6 <= 8 * len(payload) < needed + 8 + len(sizes)
    assert len(payload) == payload_bytes(positions, sizes)
    assert np.array_equal(unpack(payload, positions, sizes), indices)


def test_the_length_of_a_block_by_hand():
    """Of 48 codes: floor(32768 / log2 48) = 5867 positions, then those that are left over."""
    indices = np.random.default_rng(0).integers(0, 48, (5867 + 2, 1))
    digits, text = indices[:, 0].tolist(), ""
    for block in (digits[:5867], digits[5867:]):
        number = sum(digit * 48**place for place, digit in enumerate(block))
        text += f"{number:0{(48 ** len(block) - 1).bit_length()}b}"
    text += "0" * (-len(text) % 8)
    assert pack(indices, [48]) == int(text, 2).to_bytes(len(text) // 8, "big")


@pytest.mark.parametrize("size", [3, 1000, 2187, 65535])
def test_mixed_radix_wastes_less_than_a_bit_a_block(size):
    positions = 3 * int(32768 / math.log2(size)) + 17
    rng = np.random.default_rng(0)
    indices = rng.integers(0, size, (positions, 1))
    payload = pack(indices, [size])
    assert 0 <= 8 * len(payload) - positions * math.log2(size) < 4 + 7
    assert np.array_equal(unpack(payload, positions, [size]), indices)


def test_a_payload_that_no_indices_give_is_refused():
    # Three indices of 5 codes: 125 values in 7 bits. 124 is the last, 125 to 127 are none.
    assert unpack(bytes([124 << 1]), 3, [5])[:, 0].tolist() == [4, 4, 4]
    for value in (125, 126, 127):
        with pytest.raises(ValueError, match="out of range"):
            unpack(bytes([value << 1]), 3, [5])
    with pytest.raises(ValueError, match="padding"):
        unpack(bytes([124 << 1 | 1]), 3, [5])
    with pytest.raises(ValueError, match="2 bytes, not 1"):
        unpack(bytes(2), 3, [5])
    for index in (-1, 5):
        with pytest.raises(ValueError, match="from 0 to 4"):
            pack(np.array([[index]]), [5])


# ---------------------------------------------------------------------------------------
# Entropy coding
# ---------------------------------------------------------------------------------------
CODEBOOKS = {
    "rfsq": ([256, 256], [8, 8, 4]),
    "wide": ([2**20, 2**20], [4] * 10),
    "fsq": ([1024], [32, 32]),
    "bits": ([2**20], [2] * 20),
    "odd": ([45, 45, 45], [5, 3, 3]),
    "ema": ([512, 512], None),
    "no power": ([1000], None),
    "fields": ([2**22], None),
    "chain": ([2**13, 2**18], None),  # the second bit field depends on the first
}


def smooth(height: int, width: int, sizes, seed: int) -> np.ndarray:
    """Indices (height, width, stages) that neighbours and stages have in common."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 12
    wave = 0.5 + 0.4 * np.sin(y + rng.uniform(0, 6)) * np.cos(x + rng.uniform(0, 6))
    noisy = [np.clip(wave + rng.normal(0, 0.02, wave.shape), 0, 0.999) for _ in sizes]
    return np.stack([(n * size).astype(np.int64) for n, size in zip(noisy, sizes, strict=True)], -1)


def fitted(name: str) -> entropy.EntropyModel:
    sizes, levels = CODEBOOKS[name]
    counts = entropy.Counts(sizes, levels)
    for seed in range(3):
        counts.add(smooth(24, 32, sizes, seed))
    return counts.entropy_model()


@pytest.mark.parametrize("name", CODEBOOKS)
def test_entropy_coder_is_lossless_and_saves(name):
    model, (sizes, levels) = fitted(name), CODEBOOKS[name]
    image = smooth(40, 33, sizes, 7)
    payload = model.encode(image)
    assert np.array_equal(model.decode(payload, (40, 33), len(sizes)), image)
    if levels:  # 2,304 positions are too few to count every code on its own
        assert len(payload) < payload_bytes(40 * 33, sizes)
    rng = np.random.default_rng(0)
    for shape in [(1, 1), (1, 9), (7, 1), (2, 3), (17, 16), (65, 20)]:
        # Codes that were never seen, and the most frequent one alone, which is all but free.
        for image in (
            np.stack([rng.integers(0, size, shape) for size in sizes], -1),
            np.zeros((*shape, len(sizes)), np.int64),
        ):
            for k in range(1, len(sizes) + 1):
                payload = model.encode(image[..., :k])
                assert np.array_equal(model.decode(payload, shape, k), image[..., :k])
                model.check_length(len(payload), shape[0] * shape[1], k)


def test_an_earlier_bit_field_is_a_context():
    """Two bit fields that are equal: the second one costs next to nothing."""
    rng = np.random.default_rng(0)
    counts = entropy.Counts([2**14])
    assert counts.digits == [[2**7, 2**7]] and counts.stages[0].contexts == [(1, 1), (1, 2**7)]
    counts.add(rng.integers(0, 4, (200, 200, 1)) * (2**7 + 1))
    model, new = counts.entropy_model(), rng.integers(0, 4, (40, 40, 1)) * (2**7 + 1)
    payload = model.encode(new)
    assert np.array_equal(model.decode(payload, (40, 40), 1), new)
    assert 2 < 8 * len(payload) / 1600 < 2.1


def test_images_beyond_the_sample_are_counted_only(monkeypatch):
    sizes, levels = CODEBOOKS["rfsq"]
    monkeypatch.setattr(entropy, "SAMPLE", 24 * 32 * 2)
    counts = entropy.Counts(sizes, levels)
    for seed in range(3):
        counts.add(smooth(24, 32, sizes, seed))
        assert len(counts.kept) == (seed == 0)
        assert all(table.sum() == 24 * 32 * (seed + 1) * (seed > 0) for table in counts.counts[1])
    assert counts.entropy_model().weights is counts.weights
    two = entropy.Counts(sizes, levels)
    for seed in range(2):
        two.add(smooth(24, 32, sizes, seed))
    for row, other in zip(counts.weights, two.weights, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(row, other, strict=True))


def test_regressions_in_parts_are_those_of_the_whole(monkeypatch):
    """Parts that begin among the positions without neighbours and after them."""
    whole = fitted("rfsq")
    monkeypatch.setattr(context, "PART", 3)
    for row, other in zip(fitted("rfsq").weights, whole.weights, strict=True):
        assert all(np.array_equal(a, b) and a.any() for a, b in zip(row, other, strict=True))
    scan = context.whole_lattice(24, 32)
    parts = list(scan.parts())
    assert scan.alone == 4 and [part.alone for part in parts[:3]] == [3, 1, 0]
    assert np.array_equal(np.concatenate([part.rows for part in parts]), scan.rows)
    # Each as if its neighbours and those around it were looked up in padded planes.
    planes = context.split(context.stages_of([[8, 8, 4]], True), smooth(24, 32, [256], 0))
    digit = list(context.digits_of(context.stages_of([[8, 8, 4]], True), planes))[1]
    near = context.surroundings(planes[0])[:, scan.rows, scan.columns]
    assert np.array_equal(digit.features(scan)[4:9], near)


def test_neighbours_and_the_stage_before_pay():
    sizes, _ = CODEBOOKS["rfsq"]
    conditional, first_order = fitted("rfsq"), entropy.Counts(sizes, None)
    for seed in range(3):
        first_order.add(smooth(24, 32, sizes, seed))
    image = smooth(40, 33, sizes, 7)
    plain = first_order.entropy_model().encode(image)
    assert len(conditional.encode(image)) < 0.9 * len(plain)


def test_what_is_linear_in_earlier_channels_is_all_but_free():
    """A second channel that is the mean of the first one's neighbours, in the next stage too."""
    rng = np.random.default_rng(0)

    def image():
        first = rng.integers(0, 9, (40, 40))
        padded = np.pad(first, 1, mode="edge")
        mean = (padded[1:-1, :-2] + padded[1:-1, 2:]) // 2
        return np.stack([first + 9 * mean, 8 - mean + 9 * first], -1)

    counts = entropy.Counts([81, 81], [9, 9])
    for _ in range(12):
        counts.add(image())
    model, new = counts.entropy_model(), image()
    payload = model.encode(new)
    assert np.array_equal(model.decode(payload, (40, 40), 2), new)
    # log2 9 for the first channel; the mean, rounded down, is known to a half, and what is repeated
    # in the second stage is known.
    assert math.log2(9) < 8 * len(payload) / 1600 < math.log2(9) + 0.75


def test_a_context_by_hand():
    """Digit 1 of (3, 5) levels at the centre of a 3x3 grid, its neighbours on the edges."""
    (stage,) = entropy.Counts([15], [3, 5]).stages
    assert stage.contexts == [(3 * 48, 36), (3 * 48, 36)]
    digits = np.array([[[0, 1, 2], [2, 2, 0], [1, 0, 1]], [[0, 4, 0], [3, 0, 1], [0, 2, 0]]])
    beside = np.array([[[0], [1]], [[2], [1]], [[1], [0]], [[1], [2]]])
    here = context.Pass(np.array([1]), np.array([1]), beside, np.array([1]), 0)
    weights = np.zeros((3, 10), np.int32)
    # A quarter of each neighbour, half of channel 0 here, minus what is left of it, and 3/4.
    weights[1] = np.array([1, 1, 1, 1, 2, 0, 0, -4, 0, 3]) * context.UNIT // 4
    digit = context.Digit(stage, 0, 1, digits, np.empty((0, 3, 3)))
    (_, index), (_, alone) = digit.contexts(weights, [here, here._replace(alone=1)])
    # Prediction (4 + 2 + 3 + 1)/4 + 2/2 - 2 + 3/4 = 2.25: step floor(2.75 * 48 / 5) = 26.
    # |4 d - 10| over the neighbours: 6 + 2 + 2 + 6 = 16, the third of the six steps.
    # Channel 0: |4*2 - (1 + 0 + 2 + 0)| = 5, the second.
    assert index.tolist() == [(26 * 3 + 1) * 36 + 2 * 6 + 1]
    # Four times the middle, 2: (8 / 4) + 1 - 2 + 3/4 = 1.75, step 21; no difference.
    assert alone.tolist() == [(21 * 3 + 1) * 36 + 0 * 6 + 1]


def test_contexts_are_as_many_as_in_older_entropy_models():
    """Checkpoints hold tables of these shapes, and no longer decode with others."""
    first, second = entropy.Counts([2**20, 512 * 128], None).stages
    assert first.digits == [2**10, 2**10] and first.contexts == [(1, 1), (1, 1)]
    assert second.digits == [2**8, 2**8] and second.contexts == [(1, 1), (1, 2**8)]
    (stage,) = entropy.Counts([512 * 128 * 64], [512, 128, 64]).stages
    assert stage.contexts == [(3 * 9, 36), (3 * 37, 36), (3 * 48, 36)]


def test_sparse_contexts_back_off_by_hand():
    """With weight 4 to the coarse context, and from there to the digit alone."""
    counts = entropy.Counts([4], [4])
    ((_, fine),) = counts.stages[0].contexts
    counts.weights = [[np.zeros(counts.stages[0].weights[0], np.int32)]]
    table = counts.counts[0][0]
    table[0], table[1], table[fine] = [9, 1, 0, 0], [0, 4, 0, 2], [0, 0, 7, 1]
    digit = np.array([9.5, 5.5, 7.5, 3.5]) / 26  # each code half a time more
    coarse = [
        (np.array([9, 5, 0, 2]) + 4 * digit) / (16 + 4),  # of contexts 0 and 1
        (np.array([0, 0, 7, 1]) + 4 * digit) / (8 + 4),
        digit,
    ]
    found = counts.entropy_model().tables[0][0] / entropy.total(4)
    for i, of in ((0, 0), (1, 0), (2, 0), (fine, 1), (fine + 1, 1), (2 * fine, 2)):
        wanted = (table[i] + 4 * coarse[of]) / (table[i].sum() + 4)
        np.testing.assert_allclose(found[i], wanted, atol=2e-3)


def test_predictions_are_exact_integers():
    rng = np.random.default_rng(0)
    (stage,) = entropy.Counts([2**50], [32] * 10).stages
    digits = rng.integers(0, 32, (10, 7, 9))
    weights = rng.integers(-(2**31), 2**31, (3, 4 + 45 + 1))
    prediction, _ = context.Digit(stage, 0, 9, digits, np.empty((0, 7, 9))).around(weights)
    for row, column in ((0, 0), (3, 4), (6, 8)):
        near = [
            digits[c, min(max(row + y, 0), 6), min(max(column + x, 0), 8)]
            for c in range(9)
            for y, x in context.AROUND
        ]
        for kind in range(3):
            exact = sum(int(w) * int(d) for w, d in zip(weights[kind, 4:-1], near, strict=True))
            assert prediction[kind, row, column] == exact


def test_coded_size_is_the_cross_entropy():
    sizes = [16]
    counts = entropy.Counts(sizes)
    rng = np.random.default_rng(0)
    counts.add(rng.binomial(15, 0.3, (100, 100, 1)))
    model = counts.entropy_model()
    image = rng.binomial(15, 0.3, (64, 64, 1))
    p = model.tables[0][0][0] / entropy.total(16)
    bits = -np.log2(p[image]).sum()
    # The coder's start costs three bytes, its last word up to one.
    assert bits <= 8 * len(model.encode(image)) + 1 < bits + 8 * 4 + 1


def test_a_symbol_costs_a_minimum():
    p = np.array([[1.0, 0, 0, 0], [0.25] * 4, [0, 0.5, 0.5, 0], [0, 0, 0.001, 0.999]])
    table = entropy.frequencies(p)
    whole = entropy.total(4)
    assert (table.sum(1) == whole).all() and table.min() >= 1
    assert table.max() == whole // 64 * 63
    assert (np.abs(table[1:3] / whole - p[1:3]) < 1e-3).all()
    rng = np.random.default_rng(0)
    for size in (2, 3, 512, 1000):
        table = entropy.frequencies(rng.dirichlet([0.05] * size, 50))
        assert (table.sum(1, dtype=np.int64) == entropy.total(size)).all() and table.min() >= 1
        assert table.max() <= entropy.total(size) // 64 * 63


def test_claims_of_a_small_payload_are_refused():
    model = fitted("rfsq")
    image = np.zeros((50, 50, 2), np.int64)
    least = len(model.encode(image))
    model.check_length(least, 2500, 2)
    with pytest.raises(ValueError, match="claims"):
        model.check_length(least, 10**6, 2)


def test_a_stream_that_no_indices_give_is_refused():
    model, (sizes, _) = fitted("rfsq"), CODEBOOKS["rfsq"]
    payload = model.encode(smooth(10, 11, sizes, 3))
    wrong = 0
    for data in (payload[:-1], payload + b"\x01", payload + b"\0", b"", payload[4:], b"\x07" * 50):
        with pytest.raises(ValueError, match="payload"):
            model.decode(data, (10, 11), 2)
        wrong += 1
    assert wrong == 6


def test_the_passes_of_the_example_in_the_docstring():
    numbers = np.zeros((5, 5), int)
    for number, step in enumerate(context.lattice(5, 5), start=1):
        numbers[step.rows, step.columns] = number
    example = re.search(r"5x5\s+positions:\n\n(.*?)\n\n", context.__doc__, re.S)[1]
    assert [list(map(int, row.split())) for row in example.splitlines()] == numbers.tolist()


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (23, 1), (2, 2), (8, 9), (17, 33), (64, 5)])
def test_lattice_visits_each_position_once_after_its_neighbours(shape):
    seen = np.zeros(shape, bool)
    for step in context.lattice(*shape):
        assert not seen[step.rows, step.columns].any()
        if not step.alone:
            assert seen[step.neighbours[:, 0], step.neighbours[:, 1]].all()
        seen[step.rows, step.columns] = True
    assert seen.all()
    adjacent = [step for step in context.lattice(*shape) if step.kind[0] == 0]
    for step in adjacent:  # their four neighbours are the adjacent ones, inside the grid
        away = abs(step.neighbours - np.stack([step.rows, step.columns])[None]).sum(1)
        assert (away == 1).all()


def test_the_decoder_needs_nothing_that_comes_later():
    """Two images that agree up to some place decode alike up to there, whatever comes after."""
    model, (sizes, _) = fitted("odd"), CODEBOOKS["odd"]
    a = smooth(9, 9, sizes, 1)
    assert np.array_equal(
        model.decode(model.encode(a[..., :2]), (9, 9), 2),
        model.decode(model.encode(a), (9, 9), 3)[..., :2],
    )


def test_codebooks_without_an_entropy_model_are_refused():
    assert entropy.bit_fields(2**40) == [2**10] * 4 and entropy.bit_fields(2**13) == [2**7, 2**6]
    assert entropy.bit_fields(4096) == [4096] and entropy.bit_fields(1000) == [1000]
    with pytest.raises(ValueError, match="65537"):
        entropy.bit_fields(65537)


def test_without_constriction_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ValueError, match=r"pip install '.\[compress\]'"):
        entropy.load_constriction()


def test_tables_that_do_not_fit_are_refused():
    model = fitted("rfsq")
    for change in ("shape", "zero", "sum"):
        tables = [[table.copy() for table in row] for row in model.tables]
        if change == "shape":
            tables[1][0] = tables[1][0][:-1]
        else:
            tables[1][0][3, :2] = [0, tables[1][0][3, :2].sum()] if change == "zero" else [1, 1]
        with pytest.raises(ValueError, match="does not fit"):
            entropy.EntropyModel(model.digits, model.ordered, tables, model.weights)
    again = entropy.EntropyModel(model.digits, model.ordered, model.tables, model.weights)
    assert again.digest == model.digest
