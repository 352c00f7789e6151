"""The codec: what a file decodes to, against the model; every bit counted; mutations of files."""

from __future__ import annotations

import math
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_checkpoint

import util
from checkpoint import load_checkpoint, save_checkpoint
from codec import bitstream
from codec.codec import Codec
from codec.pixels import psnr
from codec.tiles import reach, tiles
from dataset.synthetic import SyntheticDataset

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATIONS = {
    "two": [],
    "four": ["--rfsq-stages=4"],
    "none": ["--rfsq-strategy=none"],
    "image": ["--rfsq-statistics=image"],
    "fsq": ["--quantizer=fsq", "--levels", "7", "5", "5", "3"],
    "lfq": ["--quantizer=lfq"],
    "ema": ["--quantizer=ema", "--ema-stages=2", "--n-embed=48", "--embed-dim=4"],
    "pairs": ["--quantizer=svq", "--pairs", "--svq-bits=20", "--svq-stages=4", "--svq-dim=12"],
    "pairs f8": ["--downsample=8", "--quantizer=svq", "--pairs", "--svq-stages=2", "--svq-dim=6"],
    "svq": ["--quantizer=svq", "--svq-bits=22", "--svq-stages=2", "--svq-dim=6"],
    "f8": ["--downsample=8", "--res-blocks=1", "--rfsq-stages=4"],
    "dct": ["--network=dct", "--downsample=8", "--res-blocks=1", "--rfsq-strategy=geometric"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("codec")
    for name, flags in CONFIGURATIONS.items():
        make_checkpoint(root / f"{name}.pt", "--channel=16", *flags, contrast=5)
    return root


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    side = max(height, width, 8)
    return SyntheticDataset(side, seed, 1)[0].permute(1, 2, 0).numpy()[:height, :width]


@pytest.mark.parametrize("name, channels", [("lfq", True), ("fsq", True), ("bytes", False)])
def test_only_the_digits_of_channels_are_ordered(name, channels, folder, tmp_path):
    """256 codes in 8 channels are not 8 bits, one a channel, unless the quantizer says so."""
    flags = ["--quantizer=ema", "--n-embed=256", "--embed-dim=8"]
    make_checkpoint(tmp_path / "bytes.pt", "--channel=16", *flags)
    path = tmp_path / "bytes.pt" if name == "bytes" else folder / f"{name}.pt"
    assert Codec(path).counts().ordered == channels


def fitted(path) -> Codec:
    codec = Codec(path)
    counts = codec.counts()
    for seed in range(2):
        counts.add(codec.encode_indices(picture(64, 64, 10 + seed))[0])
    codec.fit(counts)
    return codec


def of_model(codec: Codec, image: np.ndarray, stages: int) -> tuple[np.ndarray, torch.Tensor]:
    """The model's own reconstruction, written out: (uint8 image, indices)."""
    height, width = image.shape[:2]
    f = codec.model.f
    across = 2 * f if codec.model.quantizer.name.endswith("pairs") else f
    # Reflection about the last pixel, as often as is needed.
    rows, columns = (
        [
            i if i < n else 0 if n == 1 else abs((i - n + 1) % (2 * n - 2) - (n - 1))
            for i in range(m)
        ]
        for n, m in ((height, -(-height // f) * f), (width, -(-width // across) * across))
    )
    padded = torch.from_numpy(image[rows][:, columns].copy()).permute(2, 0, 1)
    tokens = codec.model.encode(padded[None].float() / 255)
    indices, *side = tokens if isinstance(tokens, tuple) else (tokens,)
    if codec.model.quantizer.stage_axis:
        indices = indices[..., :stages]
    pixels = codec.model.decode(indices, *side)[0].clamp(0, 1) * 255
    whole = pixels.round().to(torch.uint8).permute(1, 2, 0).numpy()
    return whole[:height, :width], indices


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("size", [(64, 48), (1, 1), (3, 5), (17, 33), (2, 70)])
def test_a_file_is_the_models_own_reconstruction(name, size, folder):
    codec = Codec(folder / f"{name}.pt")
    image = picture(*size)
    for stages in range(1, codec.stages + 1):
        data = codec.encode(image, stages)
        expected, indices = of_model(codec, image, stages)
        assert np.array_equal(codec.decode(data), expected), stages
        read = codec.format.read(data)[0]
        assert np.array_equal(read.squeeze(-1) if indices.dim() == 3 else read, indices[0])
        # Fewer stages of the whole file: the same image.
        assert np.array_equal(codec.decode(codec.encode(image), stages), expected)
    assert expected.std() > 5 or size == (1, 1)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_bytes_are_the_formula(name, folder):
    codec = Codec(folder / f"{name}.pt")
    quantizer = codec.model.quantizer
    height, width = 50, 91
    columns = math.ceil(width / codec.model.f)
    positions = math.ceil(height / codec.model.f) * (columns + columns % 2 * (name == "pairs"))
    bits = {"two": 22, "four": 40, "none": 22, "image": 22, "lfq": 12, "f8": 40, "pairs": 10}.get(
        name
    )
    payload = math.ceil((bits or quantizer.bits) * positions / 8)
    side = quantizer.side_bits / 8
    assert side == (32 if name == "image" else 0)  # 2 stages, mean and std, 4 channels, 2 bytes
    assert len(codec.encode(picture(height, width))) == 27 + side + payload


def test_image_statistics_of_the_kept_stages_are_in_the_file(folder):
    codec = Codec(folder / "image.pt")
    image = picture(32, 40)
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
    _, statistics = codec.model.encode(pixels)
    for stages in (1, 2):
        data = codec.encode(image, stages)
        side = np.frombuffer(data[23 : 23 + 16 * stages], "<f2").reshape(stages, 2, 4)
        assert np.array_equal(side.astype(np.float32), statistics[0, :stages].numpy())
        assert len(data) == 27 + 16 * stages + 11 * stages * 80 // 8
    for value in (math.nan, math.inf, 0.0, -1.0):  # a std that cannot be
        body = bytearray(data[:-4])
        body[23 + 8 : 23 + 10] = np.array(value, "<f2").tobytes()
        with pytest.raises(ValueError, match="statistics"):
            codec.decode(repaired(body))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_entropy_coding_gives_the_same_indices(name, folder):
    codec = fitted(folder / f"{name}.pt")
    image = picture(52, 71)
    for stages in range(1, codec.stages + 1):
        plain, coded = (codec.encode(image, stages, entropy_coding=x) for x in (False, True))
        assert coded[5] == 1 and plain[5] == 0
        for a, b in zip(codec.format.read(plain), codec.format.read(coded), strict=True):
            assert np.array_equal(a, b) if a is not None else b is None
        assert np.array_equal(codec.decode(plain), codec.decode(coded))
        whole = codec.encode(image, entropy_coding=True)
        assert np.array_equal(codec.decode(whole, stages), codec.decode(plain))
    if name in ("two", "four", "none", "image"):
        assert len(coded) < 0.9 * len(plain)


@pytest.mark.parametrize("name", ["two", "image"])
def test_grey_images_decode_without_a_tint(name, folder):
    codec = fitted(folder / f"{name}.pt")
    grey = np.repeat(picture(37, 50)[..., :1], 3, axis=2)
    for coded in (False, True):
        data = codec.encode(grey, entropy_coding=coded)
        assert data[5] == coded | 2
        for stages in (1, 2):
            decoded = codec.decode(data, stages)
            tinted = codec.decode_indices(*codec.format.read(data, stages))
            assert np.ptp(tinted, axis=2).max() > 3  # the model's own, which has a tint
            mean = tinted.astype(float).mean(2).round()
            assert all(np.array_equal(decoded[..., c], mean) for c in range(3))
            assert psnr(grey, decoded) > psnr(grey, tinted)
        # The flag changes nothing else, and a file without it decodes as it always did.
        old = codec.format.write(*codec.encode_indices(grey), grey.shape[:2], entropy_coding=coded)
        assert old[5] == coded and old[:5] + old[6:-4] == data[:5] + data[6:-4]
        assert np.array_equal(codec.decode(old), tinted)
    almost = grey.copy()
    almost[36, 49, 2] ^= 1
    assert codec.encode(almost)[5] == 0


# ---------------------------------------------------------------------------------------
# Tiles
# ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["two", "f8", "image", "fsq", "pairs f8"])
def test_tiles_have_no_seam(name, folder):
    whole, tiled = (Codec(folder / f"{name}.pt", tile=tile) for tile in (1024, 32))
    image = picture(130, 190)
    a, b = (codec.encode_indices(image)[0] for codec in (whole, tiled))
    # The same sums in another order: the indices differ in ties alone.
    assert (a != b).any(-1).mean() <= 0.002
    indices, statistics, size = whole.format.read(whole.encode(image))
    one, many = (codec.decode_indices(indices, statistics, size) for codec in (whole, tiled))
    assert np.abs(one.astype(int) - many).max() <= 1 and (one != many).mean() < 0.001


@pytest.mark.parametrize("name", ["two", "pairs"])
def test_decoding_looks_up_the_codes_of_a_tile_alone(name, folder, monkeypatch):
    codec = Codec(folder / f"{name}.pt", tile=32)
    quantizer, sizes = codec.model.quantizer, []
    decode = quantizer.indices_to_codes
    kept = lambda x, *side: sizes.append(max(x.shape[1:3])) or decode(x, *side)  # noqa: E731
    monkeypatch.setattr(quantizer, "indices_to_codes", kept)
    codec.decode(codec.encode(picture(130, 190)))
    most = 32 // codec.model.f + 2 * reach(codec.model.decoder) + 2 * (quantizer.group - 1)
    assert len(sizes) > 20 and max(sizes) <= most


@pytest.mark.parametrize("name", ["two", "f8"])
def test_the_margin_exceeds_the_reach(name, folder):
    """A pixel, or a code, that lies beyond the margin changes nothing."""
    model = Codec(folder / f"{name}.pt").model
    f, side = model.f, 48
    for network, start in (
        (model.encoder, torch.randn(1, 3, side * f, side * f)),
        (model.decoder, torch.randn(1, model.quantizer.dim, side, side)),
    ):
        limit = reach(network)
        changed = start.clone()
        scale_in, scale_out = (f, 1) if network is model.encoder else (1, f)
        middle = side // 2
        changed[..., middle * scale_in : (middle + 1) * scale_in, :] += 1
        with torch.no_grad():
            differ = (network(changed) - network(start)).abs().amax((0, 1, 3)) > 1e-5
        rows = differ.nonzero()[:, 0] // scale_out
        assert middle in rows and 0 < limit < middle
        assert middle - limit <= rows.min() and rows.max() <= middle + limit


def test_tiles_cover_everything_once():
    seen = np.zeros((17, 23), int)
    place = np.arange(17 * 23).reshape(17, 23)
    for core, outer, inner in tiles((17, 23), 5, 3):
        seen[core] += 1
        assert np.array_equal(place[outer][inner], place[core])
        for length, own, around in zip((17, 23), core, outer, strict=True):
            assert own.stop - own.start <= 5
            assert (around.start, around.stop) == (max(0, own.start - 3), min(length, own.stop + 3))
    assert (seen == 1).all()


# ---------------------------------------------------------------------------------------
# Processes and checkpoints
# ---------------------------------------------------------------------------------------
FRESH = ("two", "image", "ema")


@pytest.mark.slow
def test_a_fresh_process_decodes_identically(folder, tmp_path):
    """Another process, another number of threads; and the indices in a batch with other images."""
    code = (
        "import sys, numpy, torch; torch.set_num_threads(2); from codec.codec import Codec\n"
        "for name in sys.argv[3:]:\n"
        "    codec = Codec(f'{sys.argv[1]}/{name}.pt')\n"
        "    data = open(f'{sys.argv[2]}/{name}', 'rb').read()\n"
        "    image = codec.decode(data); indices = codec.format.read(data)[0]\n"
        "    numpy.savez(f'{sys.argv[2]}/{name}.npz', image=image, indices=indices)\n"
    )
    image = picture(61, 90)
    codecs = {name: Codec(folder / f"{name}.pt") for name in FRESH}
    for name, codec in codecs.items():
        (tmp_path / name).write_bytes(codec.encode(image))
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", code, folder, tmp_path, *FRESH]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    for name, codec in codecs.items():
        data, other = (tmp_path / name).read_bytes(), np.load(tmp_path / f"{name}.npz")
        indices, statistics, _ = codec.format.read(data)
        assert np.array_equal(other["indices"], indices)
        assert np.array_equal(other["image"], codec.decode(data))
        side = () if statistics is None else (torch.tensor(statistics.astype(np.float32)),)
        batch = torch.from_numpy(indices)[None].repeat(5, 1, 1, 1)
        batch[1:] = 0
        images = codec.model.decode(batch, *(x[None].repeat(5, 1, 1, 1) for x in side))
        pixels = (images[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        assert np.abs(pixels.numpy()[:61, :90].astype(int) - codec.decode(data)).max() <= 1


def test_fingerprint_is_of_what_decoding_depends_on(folder, tmp_path):
    saved = load_checkpoint(folder / "two.pt")
    original = Codec(folder / "two.pt").format.fingerprint

    def changed(key=None, **more) -> bytes:
        state = {**saved, "model": dict(saved["model"]), **more}
        if key:
            state["model"][key] = state["model"][key] + 1e-3
        save_checkpoint(tmp_path / "x.pt", state)
        return Codec(tmp_path / "x.pt").format.fingerprint

    assert len(original) == 8 and changed() == original
    assert changed(optimizer={"a": torch.ones(3)}, step=9) == original
    assert changed("encoder.layers.0.weight") == original  # decoding does not need it
    for key in ("decoder.layers.0.weight", "quantizer.bias", "quantizer.running_mean"):
        assert changed(key) != original
    # The same weights and codebook sizes, another order of the levels.
    assert changed(args={**saved["args"], "levels": [4, 8, 8, 8]}) != original


def test_a_checkpoint_with_an_entropy_model_is_still_one(folder, tmp_path):
    from model import load_model

    codec = fitted(folder / "two.pt")
    save_checkpoint(tmp_path / "coded.pt", codec.checkpoint)
    again = Codec(tmp_path / "coded.pt")
    assert (
        again.format.fingerprint
        == codec.format.fingerprint
        == Codec(folder / "two.pt").format.fingerprint
    )
    assert again.format.entropy_model.digest == codec.format.entropy_model.digest
    model, _, saved = load_model(tmp_path / "coded.pt")
    assert saved["step"] == 2 and not model.training
    older = {k: v for k, v in saved["entropy_model"].items() if k != "weights"}
    save_checkpoint(
        tmp_path / "older.pt",
        {k: older if k == "entropy_model" else v for k, v in saved.items() if k != "checksum"},
    )
    with pytest.raises(ValueError, match="older layout: run fit again"):
        Codec(tmp_path / "older.pt")
    saved["entropy_model"]["digits"] = [[8, 8, 4, 8]] * 2
    save_checkpoint(tmp_path / "wrong.pt", {k: v for k, v in saved.items() if k != "checksum"})
    with pytest.raises(ValueError, match="entropy model"):
        Codec(tmp_path / "wrong.pt")


def test_a_codec_leaves_the_precision_of_its_host(folder):
    matmul, image = torch.backends.cuda.matmul, np.zeros((16, 16, 3), np.uint8)
    for given in (True, False):
        matmul.allow_tf32 = given
        codec = Codec(folder / "two.pt")
        codec.decode(codec.encode(image))
        assert matmul.allow_tf32 == given


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch 2.9")
def test_a_codec_works_in_a_host_that_sets_the_precision_by_its_new_name(folder):
    code = (
        "import sys, numpy, torch; from codec.codec import Codec\n"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "codec = Codec(sys.argv[1])\n"
        "codec.decode(codec.encode(numpy.zeros((16, 16, 3), numpy.uint8)))\n"
        "assert torch.backends.cuda.matmul.fp32_precision == 'tf32'"
    )
    command = [sys.executable, "-c", code, str(folder / "two.pt")]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True)


# ---------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------
def test_malformed_entropy_models_with_a_valid_checksum_are_one_line(folder, tmp_path):
    codec = fitted(folder / "two.pt")
    model = codec.checkpoint["entropy_model"]
    (first, *rest), *stages = model["tables"]
    (slopes, *others), *_ = model["weights"]
    tables = {
        "a row less": [first[:-1], *rest],
        "negative": [-first, *rest],
        "zeros": [first * 0, *rest],
        "another sum": [first + 1, *rest],
        "fractions": [first.float(), *rest],
        "half precision": [first.bfloat16(), *rest],
        "booleans": [first.bool(), *rest],
        "wide": [first.long(), *rest],
        "with a gradient": [first.float().requires_grad_(), *rest],
        "complex": [first.cfloat(), *rest],
        "empty": [first[:0], *rest],
        "numbers": [first.tolist(), *rest],
        "a table less": rest,
        "a table more": [first, first, *rest],
        "nothing": [None, *rest],
    }
    digits = [[8.0, 8, 8, 4], [-8, -8, 8, 4], [8, 4, 8, 8], [2048], [True, 8, 8, 32], 2048, None]
    wrong = [
        *([], 5, None, "x", torch.ones(3), {}, {"weights": 5}),
        *({**model, "tables": [row, *stages]} for row in tables.values()),
        *({**model, "tables": rows} for rows in (stages, 10**4 * stages, None, first, {0: first})),
        *({**model, "weights": [[x, *others], *model["weights"][1:]]} for x in (first, None)),
        {**model, "weights": [[slopes.double(), *others], *model["weights"][1:]]},
        *({**model, "digits": [row, [8, 8, 8, 4]]} for row in digits),
        *({**model, "digits": value} for value in (None, [], [[8, 8, 8, 4]], first, 2**62)),
        *({**model, "ordered": value} for value in (False, 1, "yes", first)),
        *({k: v for k, v in model.items() if k != name} for name in model),
    ]
    for number, state in enumerate(wrong):
        with pytest.raises(ValueError, match=r"run fit again") as caught:
            codec._read_entropy_model(state)
        assert "\n" not in str(caught.value)
        if number % 10 == 0:
            save_checkpoint(tmp_path / "x.pt", {**codec.checkpoint, "entropy_model": state})
            with pytest.raises(ValueError, match=r"run fit again|not a checkpoint"):
                Codec(tmp_path / "x.pt")


def repaired(body: bytes) -> bytes:
    """A file with a right checksum, from everything before it."""
    return bytes(body) + struct.pack("<I", zlib.crc32(bytes(body)))


def test_each_bad_file_says_what_is_wrong(folder):
    codec, other = Codec(folder / "two.pt"), Codec(folder / "four.pt")
    data = codec.encode(picture(32, 32))

    def edit(place: int, new: bytes) -> bytes:
        return repaired(data[:place] + new + data[place + len(new) : -4])

    for bad, part in (
        (b"", "empty"),
        (data[:20], "truncated"),
        (data[:-1], f"truncated or damaged: {len(data) - 1} of the {len(data)} bytes"),
        (data + b"x", "checksum"),
        (b"J" + data[1:], "not an RFSQ file"),
        (edit(4, b"\x02"), "newer version, 2"),
        (edit(5, b"\x80"), "unknown flags 0x80"),
        (edit(5, b"\x06"), "unknown flags 0x06"),
        (edit(5, b"\x01"), "no entropy model"),
        (edit(6, b"\x00"), "0 stages"),
        (edit(6, b"\x03"), "3 stages"),
        (edit(7, b"whatever"), "another model"),
        (other.encode(picture(32, 32)), "another model"),
        (edit(15, bytes(4)), "0x32 pixels is empty"),
        (edit(15, b"\xff" * 8), "more than the limit"),
        (edit(15, struct.pack("<II", 13000, 13000)), "its header says"),
        (edit(15, struct.pack("<I", 36)), "its header says"),
        (repaired(data[:-5]), "its header says"),
    ):
        with pytest.raises(ValueError, match=part) as caught:
            codec.decode(bad)
        assert "\n" not in str(caught.value)
    for bad in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bad // 8] ^= 1 << bad % 8
        with pytest.raises(ValueError):
            codec.format.check(bytes(flipped))
    with pytest.raises(ValueError, match="3 stages were asked for, but the file holds 2"):
        codec.decode(data, 3)
    with pytest.raises(ValueError, match="no entropy model"):
        codec.encode(picture(8, 8), entropy_coding=True)
    for image in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="image"):
            codec.encode(image)


FUZZ = """
import random, resource, struct, sys, zlib
import numpy as np, torch
torch.set_num_threads(1)
sys.path.insert(0, "tests")
from test_codec import fitted, picture, repaired

codec = fitted(sys.argv[1])
codec.decode(codec.encode(picture(24, 28)))
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rng, outcomes = random.Random(0), {"error": 0, "image": 0}


def number(bits):
    return rng.getrandbits(rng.randint(1, bits))


def mutate(data):
    data, kind = bytearray(data), rng.randrange(7)
    if kind == 0:
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[rng.randrange(len(data)):]
    elif kind == 2:
        place = rng.randrange(len(data))
        data[place:place] = rng.randbytes(rng.randint(1, 40))
    elif kind == 3:
        place = rng.randrange(len(data))
        del data[place:place + rng.randint(1, 40)]
    elif kind == 4:
        data[15:23] = struct.pack("<II", number(32), number(32))
    elif kind == 5:
        data[rng.choice([4, 5, 6])] = rng.randrange(256) if rng.random() < 0.5 else 1
    else:
        data[23:27] = struct.pack("<I", number(32))
    # Half of them with the checksum repaired; of these, some with the length of the payload too.
    if rng.random() < 0.5 or len(data) < 32:
        return bytes(data), False
    if data[5] & 1 and rng.random() < 0.5:
        data[23:27] = struct.pack("<I", max(0, len(data) - 35))
    return repaired(data[:-4]), True


files = [
    codec.encode(picture(24, 28, i), stages, coded)
    for i in range(2) for stages in (1, 2) for coded in (False, CODED)
]
for _ in range(2400):
    data, checked = mutate(rng.choice(files))
    try:
        image = codec.decode(data)
        assert checked or data in files, "a mutation went through the checksum"
        assert image.dtype == np.uint8 and image.ndim == 3 and image.size > 0
        outcomes["image"] += 1
    except ValueError as error:
        assert "\\n" not in str(error) and 10 < len(str(error)) < 200, error
        outcomes["error"] += 1
growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
print(outcomes["error"], outcomes["image"], growth // 1024)
"""


@pytest.mark.slow
def test_2400_mutations_give_an_error_or_an_image(folder):
    """In a process of its own, so that a crash, a hang and the peak of its memory are seen."""
    code = FUZZ.replace("CODED)", "True)")
    done = subprocess.run(
        [sys.executable, "-c", code, folder / "two.pt"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    errors, images, growth = map(int, done.stdout.split())
    assert errors + images == 2400 and errors > 1000 and images > 50
    assert growth < 256  # MiB


def test_a_gigantic_claim_allocates_nothing(folder):
    """A header with as many pixels as there may be, over a payload of a few bytes."""
    codec = fitted(folder / "two.pt")
    peak = util.peak_memory_mib(torch.device("cpu"))
    for coded in (False, True):
        data = bytearray(codec.encode(picture(16, 16), entropy_coding=coded)[:-4])
        data[15:23] = struct.pack("<II", 13000, 13000)
        with pytest.raises(ValueError, match=r"header says|claims"):
            codec.decode(repaired(data))
    assert util.peak_memory_mib(torch.device("cpu")) - peak < 20
    with pytest.raises(ValueError, match="more than the limit"):
        codec.encode(np.broadcast_to(np.uint8(0), (20000, 10000, 3)))
    assert bitstream.MAX_PIXELS == 178_956_970


def test_the_mode_of_the_model_makes_no_difference(tmp_path):
    """A model in training would move its statistics, and no other codec could decode its files."""
    make_checkpoint(tmp_path / "x.pt", "--channel=16")
    codec, image = Codec(tmp_path / "x.pt"), picture(32, 32)
    wanted = codec.encode(image)
    codec.model.train()
    assert codec.encode(image) == wanted and codec.model.training
    again = Codec(tmp_path / "x.pt").decode(np.frombuffer(wanted, np.uint8))
    assert np.array_equal(again, codec.decode(wanted))
