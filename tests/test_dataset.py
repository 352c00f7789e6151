"""Images in: what the pixels are, what is refused, and which process sees which image when."""

import errno
import hashlib
import os
import struct
import subprocess
import sys
import time
import traceback
from pathlib import Path
from zlib import compress, crc32

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as reference

import dataset
from arguments import get_args
from dataset import ImageFolderDataset, build_dataset, loaders
from dataset.images import UnreadableImage, read_image
from dataset.loaders import StreamSampler, train_loader, val_loader
from dataset.synthetic import SyntheticDataset
from exits import StopSignals, one_line
from run import setup


def photo(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Noise over a ramp: every pixel tells where it comes from."""
    noise = np.random.default_rng(seed).integers(0, 120, (height, width, channels))
    ramp = np.linspace(0, 135, width)[None, :, None]
    pixels = (noise + ramp).astype(np.uint8)
    return pixels if channels > 1 else pixels[..., 0]


def load(folder: Path, size: int) -> np.ndarray:
    """The first image of a folder, (H, W, 3)."""
    item = ImageFolderDataset(folder, size)[0]
    assert item.dtype == torch.uint8 and item.shape == (3, size, size) and item.is_contiguous()
    return item.permute(1, 2, 0).numpy()


# ------------------------------------------------------------------ geometry
def test_the_right_size_keeps_its_bytes(tmp_path):
    pixels = photo(128, 128)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(load(tmp_path, 128), pixels)


def test_a_right_short_side_is_cropped_only(tmp_path):
    pixels = photo(48, 32)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(load(tmp_path, 32), pixels[:, 8:40])


@pytest.mark.parametrize(
    "width, height",
    [(40, 40), (101, 77), (77, 101), (20, 35), (7, 150), (650, 10), (35, 32), (32, 39)],
)
def test_resize_and_crop_are_those_of_torchvision(tmp_path, width, height):
    image = Image.fromarray(photo(width, height))
    image.save(tmp_path / "a.png")
    expected = reference.center_crop(reference.resize(image, 32), 32)
    assert np.array_equal(load(tmp_path, 32), np.asarray(expected))


@pytest.mark.parametrize("width, height", [(60_000, 1), (1, 60_000)])
def test_a_strip_does_not_fill_the_memory(tmp_path, width, height):
    Image.new("L", (width, height), 77).save(tmp_path / "a.png")
    assert (load(tmp_path, 128) == 77).all()  # enlarged in full, it has 3 GB


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_puts_the_image_upright(tmp_path, orientation):
    upright = photo(16, 24)
    # How a camera that is held that way stores the picture; EXIF 2.32, table of tag 0x0112.
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: a.swapaxes(0, 1)[::-1],
        7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
        8: lambda a: a.swapaxes(0, 1)[:, ::-1],
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(load(tmp_path, 16), upright[4:20])


@pytest.mark.filterwarnings("error")
def test_damaged_exif_is_no_damage(tmp_path):
    Image.fromarray(photo(16, 16)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    Image.fromarray(photo(16, 16)).save(tmp_path / "b.jpg")
    damaged, whole = ImageFolderDataset(tmp_path, 16)
    assert torch.equal(damaged, whole)


# ------------------------------------------------------------------ modes
def test_grey_is_repeated(tmp_path):
    pixels = photo(16, 16, channels=1)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(load(tmp_path, 16), np.repeat(pixels[..., None], 3, axis=2))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    levels[0, :4] = [0, 128, 129, 65535]
    Image.fromarray(levels).save(tmp_path / f"a.{suffix}")
    loaded = load(tmp_path, 16)
    assert np.array_equal(loaded[..., 0], np.round(levels / 257).astype(np.uint8))
    assert loaded[0, :4, 1].tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize("tag, before, after", [(258, 16, 12), (262, 1, 0)])
def test_16_bit_grey_of_another_meaning_is_refused(tmp_path, tag, before, after):
    """A TIFF of 12 bits would be dark, one with white as 0 a negative."""
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(tmp_path / "a.tif")
    entry = struct.pack("<HHIH", tag, 3, 1, before)
    file = (tmp_path / "a.tif").read_bytes()
    assert file.count(entry) == 1
    (tmp_path / "a.tif").write_bytes(file.replace(entry, entry[:8] + struct.pack("<H", after)))
    with pytest.raises(UnreadableImage, match="grey TIFF"):
        load(tmp_path, 16)


def test_the_transparent_level_of_16_bit_grey_is_white(tmp_path):
    levels = np.arange(0, 65536, 256, np.uint16).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "a.png", transparency=int(levels[3, 5]))
    loaded = load(tmp_path, 16)[..., 0]
    assert loaded[3, 5] == 255 and loaded[3, 4] == round(levels[3, 4] / 257)


def test_1_bit(tmp_path):
    bits = np.random.default_rng(0).random((16, 16)) < 0.5
    Image.fromarray(bits).save(tmp_path / "a.png")
    assert np.array_equal(load(tmp_path, 16)[..., 2], bits * np.uint8(255))


def test_palette(tmp_path):
    image = Image.fromarray(photo(16, 16)).quantize(16)
    image.save(tmp_path / "a.png")
    assert np.array_equal(load(tmp_path, 16), np.asarray(image.convert("RGB")))


def test_a_transparent_palette_entry_is_white(tmp_path):
    image = Image.fromarray((np.arange(256) % 2).reshape(16, 16).astype(np.uint8), mode="P")
    image.putpalette([200, 10, 20, 30, 40, 50])
    image.save(tmp_path / "a.png", transparency=0)
    loaded = load(tmp_path, 16)
    assert loaded[0, 0].tolist() == [255, 255, 255] and loaded[0, 1].tolist() == [30, 40, 50]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_lies_on_white_before_the_resize(tmp_path, mode):
    alpha = np.array([0, 64, 128, 255], np.uint8).repeat(64).reshape(16, 16)
    colour = photo(16, 16, channels=3 if mode == "RGBA" else 1)
    bands = colour.reshape(16, 16, -1)
    Image.fromarray(np.concatenate([bands, alpha[..., None]], axis=2)).save(tmp_path / "a.png")
    part = alpha[..., None] / 255
    expected = np.broadcast_to(part * bands + (1 - part) * 255, (16, 16, 3))
    assert Image.open(tmp_path / "a.png").mode == mode
    assert np.abs(load(tmp_path, 16) - expected).max() <= 1

    # Black that is fully transparent must not bleed into its neighbours.
    bands = np.zeros((16, 16, 2 if mode == "LA" else 4), np.uint8)
    bands[:, 8:] = 255
    Image.fromarray(bands).save(tmp_path / "a.png")
    assert load(tmp_path, 8).min() == 255


def test_a_transparent_colour_is_white(tmp_path):
    pixels = np.full((8, 8, 3), 9, np.uint8)
    pixels[0, 0] = 1, 2, 3
    Image.fromarray(pixels).save(tmp_path / "a.png", transparency=(1, 2, 3))
    loaded = load(tmp_path, 8)
    assert loaded[0, 0].tolist() == [255, 255, 255] and loaded[1, 1].tolist() == [9, 9, 9]


def png(width: int, bits: int, kind: int, transparent: bytes, line: bytes) -> bytes:
    """The bytes of a PNG of one line, of a colour type with a transparent colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, 1, bits, kind, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + chunk(b"tRNS", transparent)
    chunks += chunk(b"IDAT", compress(b"\0" + line)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("bits, line, level, wanted", [
    (1, 0b01000000, 0, [255, 255]),
    (2, 0b01100000, 1, [255, 170]),
    (4, 0b01011010, 5, [255, 170]),
])  # fmt: skip
def test_a_transparent_level_of_few_bits_is_white(bits, line, level, wanted, tmp_path):
    data = png(2, bits, 0, struct.pack(">H", level), bytes([line]))
    (tmp_path / "a.png").write_bytes(data)
    assert np.asarray(read_image(tmp_path / "a.png"))[0, :, 0].tolist() == wanted


def test_a_tiff_of_32_bit_integers_is_refused(tmp_path):
    """Nothing says which of its levels is white: those of 8 bits would all become black."""
    Image.fromarray(np.full((8, 8), 124, np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(UnreadableImage, match="grey TIFF of 12 or 32 bits"):
        load(tmp_path, 8)


def test_a_transparent_colour_of_16_bits_is_refused(tmp_path):
    """Pillow gives its pixels with 8 bits, where the colour cannot be found any more."""
    colour = struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)
    (tmp_path / "a.png").write_bytes(png(1, 16, 2, colour, colour))
    with pytest.raises(UnreadableImage, match="transparent colour of 16 bits"):
        load(tmp_path, 1)


def test_cmyk(tmp_path):
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[..., 0], ink[..., 3] = 255, 51  # cyan, with a fifth of black
    Image.fromarray(ink, mode="CMYK").save(tmp_path / "a.tif")
    Image.fromarray(ink, mode="CMYK").save(tmp_path / "b.jpg", quality=100)
    for item in ImageFolderDataset(tmp_path, 16):
        assert (item[:, 0, 0] - torch.tensor([0.0, 204, 204])).abs().max() <= 2


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load(tmp_path, 8)[0, 0].tolist() == [255, 0, 0]


# ------------------------------------------------------------------ the list of files
def test_nested_and_flat_in_a_fixed_order(tmp_path):
    names = ["z.png", "b/2.JPEG", "b/10.jpg", "a/deep/er/x.WebP", "m.bmp", "n.gif", "o.tiff"]
    names += ["p.ppm", "q.jp2", "r.jpeg", "s.tif", "t.pgm", "dir.png/y.png"]
    for name in [*names, ".hidden.png", ".cache/h.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / name)
    (tmp_path / "labels.txt").write_text("not an image")
    images = ImageFolderDataset(tmp_path, 8)
    found = [images.path(i).relative_to(tmp_path).as_posix() for i in range(len(images))]
    assert found == sorted(names)
    assert len(list(images)) == len(names)


def test_links_are_followed_and_a_circle_ends(tmp_path):
    (tmp_path / "real").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "real" / "a.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "class").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(tmp_path / "root")
    assert len(ImageFolderDataset(tmp_path / "root", 8)) == 1


def test_folders_without_images_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text" / "in").mkdir(parents=True)
    (tmp_path / "text" / "in" / "notes.txt").write_text("")
    for name, why in [
        ("missing", "does not exist"),
        ("file", "is a file"),
        ("empty", "is empty"),
        ("text", "in/notes.txt"),
    ]:
        with pytest.raises(ValueError) as caught:
            ImageFolderDataset(tmp_path / name, 8)
        message = str(caught.value)
        assert str(tmp_path / name) in message and why in message and "\n" not in message
        assert ".png" in message and "synthetic" in message  # what is allowed, how to fix it


# ------------------------------------------------------------------ damaged files
def damage(folder: Path, kind: str) -> Path:
    path = folder / ("a.jpg" if kind == "cut jpeg" else "a.tif" if kind == "float" else "a.png")
    if kind == "float":
        Image.fromarray(np.zeros((8, 8), np.float32)).save(path)
        return path
    Image.fromarray(photo(64, 64)).save(path)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "text": b"<html>not found</html>",
            "empty": b"",
            "cut": whole[: len(whole) // 2],
            "cut jpeg": whole[: len(whole) // 2],
            "garbled": whole.replace(b"IDAT\x78", b"IDAT\xff"),
        }[kind]
    )
    return path


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "cut jpeg", "garbled", "float"])
def test_a_damaged_file_is_named(tmp_path, kind):
    path = damage(tmp_path, kind)
    images = ImageFolderDataset(tmp_path, 8)
    with pytest.raises(UnreadableImage) as caught:
        images[0]
    message = str(caught.value)
    assert message.startswith(f"cannot read image {path}: ") and "\n" not in message
    assert "by --skip-corrupt" in message and one_line(caught.value) == message


def test_too_many_pixels_are_refused(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match=r"cannot read image .*a\.png: .*pixels"):
        ImageFolderDataset(tmp_path, 8)[0]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_file_is_named_through_a_loader(tmp_path, num_workers):
    path = damage(tmp_path, "cut")
    loader = val_loader(ImageFolderDataset(tmp_path, 8), 1, num_workers)
    with pytest.raises(UnreadableImage) as caught:
        list(loader)
    # Lets go of the loader here and not in some later test: garbage takes 5 s to stop its workers.
    traceback.clear_frames(caught.tb)
    line = one_line(caught.value)
    assert line.startswith(f"cannot read image {path}: ") and "\n" not in line


def test_one_line():
    assert one_line(ValueError("what: how")) == "what: how"
    assert one_line(ValueError()) == "ValueError"
    trace = "Caught\nOriginal Traceback (most recent call last):\n  File x\nsome.Error: what: how\n"
    assert one_line(ValueError(trace)) == "what: how"
    assert one_line(ValueError("a\nb\udcff is: how")) == r"a\nb\udcff is: how"


# ------------------------------------------------------------------ generated images
def test_items_are_a_function_of_seed_and_index():
    images = SyntheticDataset(64, seed=3, length=4)
    item = images[10**12]
    assert item.dtype == torch.uint8 and item.shape == (3, 64, 64)
    images[0]
    assert torch.equal(item, SyntheticDataset(64, seed=3, length=9)[np.int64(10**12)])
    assert not torch.equal(item, images[10**12 + 1])
    assert not torch.equal(item, SyntheticDataset(64, seed=4, length=4)[10**12])
    with pytest.raises(IndexError, match="-1"):
        images[-1]
    assert len(images) == len(list(images)) == 4


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOMEM, None])
def test_what_the_disk_fails_to_give_is_not_skipped_as_corrupt(tmp_path, monkeypatch, number):
    Image.fromarray(photo(16, 16)).save(tmp_path / "0.png")

    def fail(*_):
        raise OSError(number, os.strerror(number)) if number else MemoryError

    images = build_dataset(tmp_path, 16, 0, train=False, skip_corrupt=True)
    for place, name in ((os, "stat"), (Image.Image, "convert")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fail)
            with pytest.raises(ValueError, match=r"cannot read .*0\.png: ") as caught:
                images[0]
        assert not isinstance(caught.value, UnreadableImage) and not images.skipped()
    assert images[0] is not None


def test_formats_that_run_other_programs_are_refused(tmp_path):
    """Pillow would give an EPS to Ghostscript, whatever the name of the file."""
    Image.fromarray(photo(16, 16)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    with pytest.raises(UnreadableImage, match="cannot identify"):
        read_image(tmp_path / "x.png")


@pytest.mark.slow
def test_a_pipe_named_like_an_image_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(UnreadableImage, match=r"x\.png: it is not a regular file"):
        read_image(tmp_path / "x.png")


def test_pipes_and_links_to_nothing_in_a_folder_are_left_out_or_named(tmp_path):
    for i in range(3):
        Image.fromarray(photo(16, 16)).save(tmp_path / f"{i}.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "index.json")  # no packed folder either
    images = build_dataset(tmp_path, 16, 0, train=False, skip_corrupt=True)
    whole = images.fingerprint()
    assert sum(images[i] is not None for i in range(len(images))) == 3
    assert [Path(name).name for name in images.skipped()] == ["link.png", "pipe.png"]
    (tmp_path / "link.png").unlink()
    (tmp_path / "link.png").write_bytes(b"x")
    again = build_dataset(tmp_path, 16, 0, train=False, skip_corrupt=True).fingerprint()
    assert again["names"] == whole["names"] and again["sizes"] != whole["sizes"]


def test_names_that_cannot_be_printed_are_escaped(tmp_path):
    name = os.fsdecode(b"a\nb\xff.png")
    (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(UnreadableImage) as caught:
        read_image(tmp_path / name)
    assert str(caught.value).isprintable() and "a\\nb\\udcff.png" in str(caught.value)


def test_the_same_bytes_in_another_process():
    code = (
        "import hashlib; from dataset import synthetic\n"
        "assert synthetic._textures.cache_info().currsize == 0\n"
        "images = synthetic.SyntheticDataset(32, 5, 9)\n"
        "print(hashlib.sha256(b''.join(images[i].numpy().tobytes() for i in (7, 2))).hexdigest())"
    )
    there = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(dataset.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    images = SyntheticDataset(32, 5, 9)
    here = b"".join(images[i].numpy().tobytes() for i in (7, 2))
    assert there.stdout.strip() == hashlib.sha256(here).hexdigest()


@pytest.mark.slow
def test_training_and_validation_share_no_image():
    train, val = (build_dataset("synthetic", 16, 0, train) for train in (True, False))
    assert (len(train), len(val)) == (12_800, 256)
    seen = {images[i].numpy().tobytes() for images in (train, val) for i in range(100)}
    assert len(seen) == 200


@pytest.mark.parametrize("size", [8, 17, 33, 200])
def test_any_size(size):
    images = torch.stack([SyntheticDataset(size, 0, 1)[i] for i in range(8)])
    assert images.shape == (8, 3, size, size) and images.float().std() > 30


def test_refuses_what_it_cannot_generate():
    with pytest.raises(ValueError, match="img_size is 4"):
        SyntheticDataset(4, 0, 1)
    with pytest.raises(ValueError, match="seed -1"):
        SyntheticDataset(32, -1, 1)


def test_statistics_are_those_of_photographs():
    """Bounds around 300 ImageNet photographs at this size, measured in the same way.

    Theirs: mean 0.44, standard deviation 0.28, slope 2.9, kurtosis 18, saturation 0.32.
    """
    images = SyntheticDataset(128, 0, 48)
    rgb = torch.stack(list(images)).double().numpy() / 255
    assert 0.38 < rgb.mean() < 0.56 and 0.23 < rgb.std() < 0.32
    high, low = rgb.max(1), rgb.min(1)
    assert 0.2 < ((high - low) / np.maximum(high, 1e-6)).mean() < 0.45

    grey = np.einsum("nchw,c->nhw", rgb, [0.299, 0.587, 0.114])
    slope = np.diff(grey, axis=2).ravel()
    kurtosis = ((slope - slope.mean()) ** 4).mean() / slope.var() ** 2
    assert 10 < kurtosis < 40  # 3 for a Gaussian: smooth surfaces, hard edges

    window = np.outer(np.hanning(128), np.hanning(128))
    spectrum = np.fft.fft2((grey - grey.mean((1, 2), keepdims=True)) * window)
    power = (np.abs(spectrum) ** 2).mean(0)
    cycles = np.arange(2, 64)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(128, 1 / 128), np.fft.fftfreq(128, 1 / 128)))
    radial = [power[np.abs(frequency - f) < 0.5].mean() for f in cycles]
    exponent = -np.polyfit(np.log(cycles), np.log(radial), 1)[0]
    assert 2.4 < exponent < 3.4


def test_build_dataset_takes_a_folder(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    images = build_dataset(tmp_path, 8, seed=0, train=True)
    assert isinstance(images, ImageFolderDataset) and len(images) == 1


# ------------------------------------------------------------------ order
sizes = st.integers(1, 40).flatmap(
    lambda size: st.integers(1, min(size, 4)).flatmap(
        lambda world: st.tuples(st.just(size), st.integers(1, size // world), st.just(world))
    )
)


def batches(*args, **options) -> list[list[int]]:
    sampler = StreamSampler(*args, **options)
    drawn = list(sampler)
    assert len(drawn) == len(sampler)
    return drawn


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(0, 2**40))
def test_every_image_once_an_epoch_over_all_processes(shape, seed):
    size, batch, world = shape
    steps = 3 * size // (batch * world) + 1
    ranks = [
        batches(size, batch, seed, steps=steps, rank=rank, world_size=world)
        for rank in range(world)
    ]
    assert all(len(b) == batch for drawn in ranks for b in drawn)
    stream = [i for step in zip(*ranks, strict=True) for b in step for i in b]
    for start in range(0, len(stream) - size + 1, size):
        assert sorted(stream[start : start + size]) == list(range(size))
    # Two processes with batch B see what one sees with 2B.
    one = batches(size, batch * world, seed, steps=steps)
    assert stream == [i for b in one for i in b]


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(0, 30), st.booleans())
def test_a_restart_continues(shape, start, endless):
    size, batch, world = shape
    options = dict(rank=world - 1, world_size=world, endless=endless)
    whole = batches(size, batch, 7, steps=30, **options)
    assert batches(size, batch, 7, steps=30, start_step=start, **options) == whole[start:]


def test_epochs_and_seeds_differ():
    first, second = batches(100, 100, 0, steps=2)
    (other,) = batches(100, 100, 1, steps=1)
    assert first != second and first != other and second != other
    assert first != list(range(100))


def test_time_that_a_job_was_suspended_ends_no_run(monkeypatch):
    """Such a job finds its wait over when it goes on; here every wait is too short."""

    class Slow(SyntheticDataset):
        def __getitem__(self, i):
            time.sleep(1)
            return super().__getitem__(i)

    monkeypatch.setattr(loaders, "WAITS", 6000)
    batches = iter(val_loader(Slow(8, 0, length=2), 2, num_workers=1))
    kind, waits = type(batches.batches), []
    wait = kind.__next__
    monkeypatch.setattr(kind, "__next__", lambda self: waits.append(1) or wait(self))
    assert len(next(batches)) == 2 and len(waits) > 1
    assert next(batches, None) is None


def test_an_iterator_can_be_started_twice():
    sampler = StreamSampler(10, 3, 0, steps=7)
    assert list(sampler) == list(sampler)


def test_past_the_end_nothing_is_left():
    assert batches(10, 2, 0, steps=3, start_step=5) == []


def test_endless_counts_up():
    drawn = batches(4, 3, 0, steps=4, start_step=2, rank=1, world_size=2, endless=True)
    assert drawn == [[15, 16, 17], [21, 22, 23]]


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(ValueError, match=r"64 images \(32 x 2 processes\).* set of 50"):
        StreamSampler(50, 32, 0, steps=1, world_size=2)
    StreamSampler(50, 32, 0, steps=1, world_size=2, endless=True)
    with pytest.raises(ValueError, match="rank 2, world_size 2"):
        StreamSampler(50, 1, 0, steps=1, rank=2, world_size=2)


# ------------------------------------------------------------------ loaders
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for i in range(7):
        Image.fromarray(photo(12, 10, seed=i)).save(root / f"{i}.png")
    return ImageFolderDataset(root, 8)


@pytest.mark.parametrize("kind", ["folder", "synthetic"])
def test_workers_change_nothing(folder, kind):
    images = folder if kind == "folder" else SyntheticDataset(16, 0, 7)
    drawn = [list(train_loader(images, 3, 5, 0, 1, workers)) for workers in (0, 2)]
    assert len(drawn[0]) == 4 and drawn[0][0].shape == (3, *images[0].shape)
    assert drawn[0][0].dtype == torch.uint8
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    drawn = [list(val_loader(images, 3, workers)) for workers in (0, 2)]
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


@pytest.mark.parametrize("kind", ["folder", "synthetic"])
def test_the_seed_of_a_run_is_that_of_its_images_and_of_their_order(folder, kind):
    path = folder.root if kind == "folder" else kind
    flags = [f"--train-data-path={path}", f"--val-data-path={path}", "--num-workers=0"]

    def images(seed):
        """Those of three steps, and the first for validation, which is always the same."""
        args = get_args([*flags, "--img-size=16", "--batch-size=2", f"--seed={seed}"])
        train, val = setup.build_datasets(args)
        where = torch.device("cpu"), StopSignals()
        batches, _ = setup.start_loaders(args, train, val, 0, 3, *where)
        return torch.cat(list(batches)), val[0]

    (one, val), (same, _), (other, other_val) = map(images, (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(val, other_val)


def test_the_train_loader_follows_the_sampler(folder):
    drawn = list(train_loader(folder, 2, 6, seed=4, start_step=2, rank=1, world_size=2))
    expected = StreamSampler(7, 2, 4, steps=6, start_step=2, rank=1, world_size=2)
    for batch, indices in zip(drawn, expected, strict=True):
        assert torch.equal(batch, torch.stack([folder[i] for i in indices]))


def test_training_on_generated_images_never_repeats_one():
    images = SyntheticDataset(8, 0, length=4)
    drawn = torch.cat(list(train_loader(images, 4, 6, 0)))
    assert len({image.numpy().tobytes() for image in drawn}) == 24
    assert torch.equal(drawn[20], images[20])


@pytest.mark.parametrize("world_size, num_workers", [(1, 0), (2, 0), (3, 0), (9, 0), (9, 1)])
def test_validation_shares_hold_every_image_once(folder, world_size, num_workers):
    everything = torch.stack([folder[i] for i in range(7)])
    for rank in range(world_size):
        drawn = list(val_loader(folder, 2, num_workers, rank, world_size))
        share = everything[rank::world_size]
        assert len(drawn) == -(-len(share) // 2)
        assert torch.equal(torch.cat([*drawn, share[:0]]), share)


class _Threads(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return torch.get_num_threads() if torch.utils.data.get_worker_info() else -1


def test_a_worker_has_one_thread():
    loader = val_loader(_Threads(), 1, num_workers=1)
    assert isinstance(loader, DataLoader) and [int(n) for n in loader] == [1]


def test_loaders_leave_the_random_state_alone(folder):
    before = torch.get_rng_state()
    list(train_loader(folder, 2, 3, 0)), list(val_loader(folder, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_only_a_gpu_needs_pinned_memory(folder):
    assert not train_loader(folder, 2, 3, 0, device="cpu").pin_memory
    assert val_loader(folder, 2, device=torch.device("cuda", 0)).pin_memory
