"""`rate_distortion.py`: parsers of foreign headers, rates that are met, and what a user sees."""

from __future__ import annotations

import io
import json
import math
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import exits
import output
from arguments import get_args
from checkpoint import save_checkpoint
from codec import baselines
from codec.baselines import BASELINES, avif_header, jpeg_header, webp_header
from dataset.images import read_image
from dataset.synthetic import SyntheticDataset
from model import VQVAE
from scripts import compress
from scripts import rate_distortion as rd
from similarity import ssim

SIDE, IMAGES = 32, 3


@pytest.fixture(autouse=True)
def small(monkeypatch, no_lpips):
    """A few qualities in place of 22."""
    for module in (baselines, rd):
        monkeypatch.setattr(module, "QUALITIES", (0, 30, 60, 90))


def pictures(count=IMAGES, side=SIDE):
    return [x.permute(1, 2, 0).numpy() for x in SyntheticDataset(side, 3, count)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder `val`; checkpoint `last.pt` of two stages, and `coded.pt` with an entropy model."""
    root = tmp_path_factory.mktemp("rate_distortion")
    (root / "val").mkdir()
    for i, image in enumerate(pictures()):
        Image.fromarray(image).save(root / "val" / f"{i}.png")
    torch.manual_seed(1)
    args = get_args(["--channel=8", f"--img-size={SIDE}"])
    model = VQVAE(args)
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(4, 3, SIDE, SIDE))
    state = {"model": model.state_dict(), "args": vars(args), "step": 2}
    save_checkpoint(root / "last.pt", state)
    fit = ["fit", str(root / "val"), f"--load={root / 'last.pt'}", f"--out={root / 'coded.pt'}"]
    compress.main(fit)  # needs no extra: that is for coding
    return root


def saved(form, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pictures(1, 64)[0]).save(file, form, **options)
    return file.getvalue()


def pillow_can(form) -> bool:
    Image.init()
    return form in Image.SAVE


# ---------------------------------------------------------------------------------------
# Headers
# ---------------------------------------------------------------------------------------
def test_jpeg_header_ends_where_the_scan_begins():
    data = saved("JPEG", quality=50, optimize=True, comment=b"\xff\xda is no marker here")
    header = jpeg_header(data)
    start = header - 2  # 2 are EOI's
    assert data[-2:] == b"\xff\xd9"
    # SOS of three components: marker, length 12, 3, three pairs, 0 63 0.
    assert data[start - 14 : start - 9] == b"\xff\xda\x00\x0c\x03"
    assert data[start - 3 : start] == b"\x00\x3f\x00"
    # In the scan, 0xff is followed by a stuffed zero.
    scan = data[start:-2]
    assert scan.count(b"\xff") == scan.count(b"\xff\x00") > 0
    # 23 bytes more of a comment are header, and nothing else changes.
    plain = saved("JPEG", quality=50, optimize=True)
    assert len(data) - header == len(plain) - jpeg_header(plain)
    assert header > jpeg_header(plain)


@pytest.mark.skipif(not pillow_can("WEBP"), reason="Pillow without WebP")
def test_webp_header_is_all_but_the_image_chunk():
    data = saved("WEBP", quality=50, method=6)
    (length,) = struct.unpack_from("<I", data, 16)
    assert data[12:16] == b"VP8 " and webp_header(data) == len(data) - length
    assert webp_header(data) in (20, 21)  # RIFF and chunk header, and padding
    # An ICC profile makes it an extended file; the image chunk is the same.
    extended = saved("WEBP", quality=50, method=6, icc_profile=b"profile" * 9)
    assert extended[12:16] == b"VP8X"
    assert len(extended) - webp_header(extended) == length
    lossless = saved("WEBP", lossless=True)
    assert len(lossless) - webp_header(lossless) == struct.unpack_from("<I", lossless, 16)[0]


def test_odd_webp_chunks_are_padded():
    image = b"VP8 " + struct.pack("<I", 5) + b"12345\0"
    data = b"RIFF" + struct.pack("<I", 4 + 22) + b"WEBP" + b"EXIF\x01\0\0\0x\0" + image
    assert len(data) - webp_header(data) == 5


@pytest.mark.parametrize("mdat", ["32 bits", "64 bits", "to the end"])
def test_avif_header_is_all_but_mdat(mdat):
    before = struct.pack(">I4s", 8 + 3, b"ftyp") + b"abc" + struct.pack(">I4s", 8, b"mdat")
    if mdat == "32 bits":
        box = (
            struct.pack(">I4s", 8 + 5, b"mdat") + b"12345" + struct.pack(">I4s", 9, b"free") + b"x"
        )
    elif mdat == "64 bits":
        box = struct.pack(">I4sQ", 1, b"mdat", 16 + 5) + b"12345"
    else:
        box = struct.pack(">I4s", 0, b"mdat") + b"12345"
    assert len(before + box) - avif_header(before + box) == 5


@pytest.mark.skipif(not pillow_can("AVIF"), reason="Pillow without AVIF")
def test_avif_header_of_real_files():
    few, many = (saved("AVIF", quality=q, subsampling="4:4:4") for q in (20, 90))
    assert avif_header(few) == avif_header(many)  # boxes do not grow with the image's data
    assert 150 < avif_header(few) < 600
    assert few.count(b"mdat") == 1  # and the data of it are the file's last bytes
    assert len(few) - avif_header(few) == len(few) - few.index(b"mdat") - 4


# ---------------------------------------------------------------------------------------
# Measuring, and meeting a rate
# ---------------------------------------------------------------------------------------
def test_measurements_by_hand():
    image = np.full((8, 8, 3), 100, np.uint8)  # too small for SSIM
    other = image.copy()
    other[0, 0] = (110, 100, 90)  # squares 100, 0 and 100 over 192 values
    rows = rd.measure(image, lambda _: [(10, 30, other), (11, 31, image)], None)
    assert rows[:, : rd.PSNR].tolist() == [[10, 30], [11, 31]]
    assert rows[0, rd.PSNR] == pytest.approx(10 * math.log10(255**2 / (200 / 192)))
    assert rows[1, rd.PSNR] == 100.0  # equal images: the cap, not infinity
    assert np.isnan(rows[:, [rd.SSIM, rd.LPIPS]]).all()
    image, other = pictures(2, 12)
    (row,) = rd.measure(image, lambda _: [(1, 2, other)], None)
    a, b = (torch.tensor(x).permute(2, 0, 1)[None] / 255 for x in (image, other))
    assert row[rd.SSIM] == pytest.approx(ssim(a, b).item()) and 0 < row[rd.SSIM] < 1


def test_lpips_of_the_right_images_in_the_right_range():
    class Spy(torch.nn.Module):
        smallest_side = 8

        def __init__(self):
            super().__init__()
            self.scaling = torch.nn.Module()
            self.scaling.register_buffer("shift", torch.zeros(1))

        def forward(self, images, reconstruction):
            assert images.shape == reconstruction.shape == (1, 3, *self.size)
            return (images[:, 0] - 2 * reconstruction[:, 2]).mean(dim=(1, 2))

    spy = Spy()
    image = np.zeros((8, 9, 3), np.uint8)
    image[..., 0] = 255  # red 1, blue of the other 0.2: 1 - 0.4
    other = np.full((8, 9, 3), 51, np.uint8)
    spy.size = (8, 9)
    (row,) = rd.measure(image, lambda _: [(1, 2, other)], spy)
    assert row[rd.LPIPS] == pytest.approx(0.6)
    (row,) = rd.measure(image[:7], lambda _: [(1, 2, other[:7])], spy)  # too small
    assert math.isnan(row[rd.LPIPS])
    means = rd.mean(np.array([[1.0, math.nan, math.nan], [3.0, 0.5, math.nan]]))
    assert means[:2].tolist() == [2.0, 0.5] and math.isnan(means[2])


def curve():
    """Sizes 100, 200 and 800: 10 dB for each doubling; 100 bytes of header."""
    rows = [(100, 0.7, 1.0), (200, 0.8, 0.9), (800, 0.9, 0.8)]  # bytes, SSIM, LPIPS
    return np.array([(s, s + 100, 10 * math.log2(s / 100), *quality) for s, *quality in rows])


def test_a_rate_between_two_qualities_is_met_exactly():
    row = rd.at_rate(curve(), rd.PAYLOAD, 400)  # half way from 200 to 800, in the logarithm
    assert row == pytest.approx([400, math.sqrt(300 * 900), 20.0, 0.85, 0.85])
    row = rd.at_rate(curve(), rd.BYTES, 900)
    assert row == pytest.approx(curve()[2])
    assert rd.at_rate(curve(), rd.PAYLOAD, 200) == pytest.approx(curve()[1])
    assert rd.at_rate(curve(), rd.PAYLOAD, 5000) == pytest.approx(curve()[2])  # no more to spend
    assert rd.at_rate(curve(), rd.PAYLOAD, 99.9) is None
    # Where the bytes fall although the quality rises, the baseline has the better of the two.
    bent = [(100, 200, 10, 0, 0), (300, 400, 20, 0, 0), (200, 300, 30, 0, 0), (800, 900, 40, 0, 0)]
    bent = np.array(bent, float)
    assert rd.at_rate(bent, rd.PAYLOAD, 250)[rd.PSNR] > 30


def test_one_quality_for_all_images_and_the_same_bytes_for_every_image():
    easy, hard = curve(), curve()
    hard[:, : rd.PSNR] *= 4  # four times the bytes for the same dB
    target = np.array([(400.0, 500.0), (400.0, 500.0)])
    table = {"baseline": np.stack([easy, hard])}
    without, as_file = rd.baselines_at(table, target, pixels=1000)
    # Means over the images are 250, 500, 2000 bytes: 400 is log2(1.6) doublings above 250.
    assert without["matched"] == "without header" and without["bpp"] == pytest.approx(3.2)
    assert without["psnr"] == pytest.approx(10 * math.log2(1.6))
    # Each at 400 bytes: 2 doublings for the easy one, none for the hard one.
    assert without["every_image"]["psnr"] == pytest.approx((20 + 0) / 2)
    assert as_file["file_bpp"] == pytest.approx(8 * 500 / 1000)
    # The hard one's smallest file is 800 bytes: it cannot.
    (_, missed) = rd.baselines_at(table, np.array([(400.0, 500.0), (400.0, 799.0)]), 1000)
    assert missed["every_image"]["psnr"] is None and missed["psnr"] is not None
    assert missed["file_bpp"] == pytest.approx(8 * (500 + 799) / 2 / 1000)


# ---------------------------------------------------------------------------------------
# As a user runs it
# ---------------------------------------------------------------------------------------
def run(files, *flags, load=("last",)):
    loads = ["--load", *(str(files / f"{name}.pt") for name in load)] if load else []
    return rd.main([str(files / "val"), *flags, *loads])


def test_rows_are_what_compress_writes(files, tmp_path, capsys):
    (checkpoint,) = run(files)["checkpoints"]
    one, two = checkpoint["rows"]
    assert one["bytes"] < two["bytes"] and one["psnr"] != two["psnr"]
    # 64 positions, 11 bits a stage: 88 bytes a stage, and 27 of header and checksum.
    assert [row["bytes"] for row in (one, two)] == [88 + 27, 176 + 27]
    assert [row["bpp"] for row in (one, two)] == [11 / 16, 22 / 16]
    assert one["file_bpp"] == 8 * (88 + 27) / SIDE**2
    for row in (one, two):
        out = tmp_path / str(row["stages"])
        flags = [f"--load={files / 'last.pt'}", f"--stages={row['stages']}", f"--out={out}"]
        written = compress.main(["encode", str(files / "val"), *flags])
        sizes = [path.stat().st_size for path in out.iterdir()]
        assert row["bytes"] == sum(sizes) / IMAGES and row["psnr"] == pytest.approx(written["psnr"])


def test_a_log_says_how_far_it_is(files, monkeypatch, capfd):
    monkeypatch.setattr(output, "SECONDS_A_LINE", 0)
    rd.main([str(files / "val"), "--lpips-net=none"])
    assert capfd.readouterr().err.splitlines() == [f"measure: {i} of 3 images" for i in (1, 2, 3)]


def test_entropy_coded_rows_where_there_is_an_entropy_model(files, capsys):
    pytest.importorskip("constriction")
    result = run(files, load=("last", "coded"))
    plain, coded = result["checkpoints"]
    assert [row["entropy_coded"] for row in coded["rows"]] == [False, False, True, True]
    # The same pictures; counted on these very images, so fewer bytes of payload.
    for fixed, row in zip(coded["rows"][:2], coded["rows"][2:], strict=True):
        assert row["psnr"] == fixed["psnr"] and row["bpp"] < fixed["bpp"]
    assert [row["bytes"] for row in plain["rows"]] == [row["bytes"] for row in coded["rows"][:2]]
    # Equal rates share a table: two fixed rates, two coded.
    assert [len(rate["ours"]) for rate in result["rates"]].count(2) == 2
    assert len(result["rates"]) == 4
    assert "coded.pt), 2 of 2 stages, entropy-coded" in capsys.readouterr().out


@pytest.mark.slow
def test_json_table_and_figure(files, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "rd.json", tmp_path / "rd.png"
    result = run(files, f"--json={out}", f"--figure={picture}", "--limit=2")
    assert json.loads(out.read_text()) == result
    assert result["images"] == 2 and result["lpips_net"] is None
    assert result["environment"]["pillow"] and result["environment"]["torch"]
    with Image.open(picture) as image:
        assert image.format == "PNG" and min(image.size) > 500
        assert np.asarray(image.convert("L")).std() > 5  # lines on white
    text = capsys.readouterr().out
    assert "LPIPS will be missing" in text and "missing |" in text
    for rate in result["rates"]:
        assert len(rate["ours"]) == 1 and len(rate["baselines"]) == 2 * len(result["curves"])
        for row in rate["baselines"]:
            key = "bpp" if row["matched"] == "without header" else "file_bpp"
            if row["psnr"] is not None:  # met exactly, or its best quality is cheaper
                assert row[key] <= rate["ours"][0][key] * (1 + 1e-9)
                line = f"| {row['bpp']:.3f} | {row['file_bpp']:.3f} | {row['psnr']:.2f}"
                assert f"{line} | {row['ssim']:.4f} | missing |" in text
    for found in result["curves"]:
        assert [row["quality"] for row in found["rows"]] == [0, 30, 60, 90]
        assert found["rows"][0]["bytes"] < found["rows"][-1]["bytes"]
        assert found["rows"][0]["psnr"] < found["rows"][-1]["psnr"]
        assert 0 < found["rows"][0]["ssim"] < found["rows"][-1]["ssim"] < 1


def test_codecs_alone_at_the_usual_rates_and_images_of_any_size(tmp_path, capsys):
    for i, side in enumerate((24, 40)):
        image = pictures(1, 64)[0][: side + 1, :side]
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    result = rd.main([str(tmp_path)])
    assert result["pixels"] == 24 * 25 + 40 * 41 and not result["checkpoints"]
    assert [rate["bpp"] for rate in result["rates"]] == list(rd.RATES)
    best = result["rates"][-1]["baselines"][0]
    assert best["coder"] == "JPEG 4:4:4"
    assert best["bpp"] == pytest.approx(2.5) == best["every_image"]["bpp"]
    # bpp is all bits over all pixels, not the mean of the images'.
    jpeg = BASELINES[0]
    sizes = [next(jpeg(np.asarray(read_image(tmp_path / f"{i}.png"))))[1] for i in range(2)]
    assert result["curves"][0]["rows"][0]["file_bpp"] == pytest.approx(
        8 * sum(sizes) / result["pixels"]
    )
    assert rd.main([str(tmp_path), "--img-size=16", "--limit=1"])["pixels"] == 16 * 16


def test_no_metadata_of_the_original_is_paid_for(tmp_path):
    image = pictures(1)[0]
    Image.fromarray(image).save(tmp_path / "a.png", icc_profile=b"profile" * 500)
    read = np.asarray(read_image(tmp_path / "a.png"))
    for baseline in BASELINES:
        if baseline.problem() is None:
            assert next(baseline(read))[1] < 1500, baseline.name


@pytest.mark.parametrize("baseline", BASELINES[:3], ids=lambda b: b.name)
def test_noise_fits_every_quality_of_jpeg(baseline, monkeypatch):
    """The buffer of Pillow for an optimised JPEG has 8 bits a pixel."""
    monkeypatch.setattr(baselines, "QUALITIES", (92, 100))
    noise = np.random.default_rng(0).integers(0, 256, (320, 320, 3), np.uint8)
    sizes = [size for _, size, _ in baseline(noise)]
    assert sizes[1] > sizes[0] and sizes[1] > 320 * 320


def test_images_too_small_for_ssim_are_said_and_psnr_alone_is_drawn(tmp_path, monkeypatch, capsys):
    (tmp_path / "val").mkdir()
    for side in (8, 32):
        Image.fromarray(pictures(1, 32)[0][:side, :side]).save(tmp_path / "val" / f"{side}.png")
    monkeypatch.setattr(rd, "BASELINES", BASELINES[:1])
    run(tmp_path, load=())
    assert "SSIM is of 1 images" in capsys.readouterr().out
    (tmp_path / "val" / "32.png").unlink()
    run(tmp_path, f"--figure={tmp_path / 'rd.png'}", load=())
    assert (tmp_path / "rd.png").exists()


def test_an_image_that_cannot_be_compressed_is_named(tmp_path, monkeypatch):
    (tmp_path / "val").mkdir()
    Image.fromarray(pictures(1)[0]).save(tmp_path / "val" / "wide.png")

    def fails(*args):
        raise OSError("too wide")

    monkeypatch.setattr(rd, "BASELINES", BASELINES[:1])
    monkeypatch.setattr(rd, "measure", fails)
    with pytest.raises(
        ValueError, match=r"wide\.png cannot be compressed \(too wide\): leave it out"
    ):
        run(tmp_path, load=())


def test_models_of_equal_rates_but_other_bytes_for_each_image_stand_apart():
    table = {"codec": np.array([[[10, 10, 20, 0, 0], [40, 40, 30, 0, 0]]] * 2, float)}
    first = np.array([[[10, 10, 25, 0, 0]], [[40, 40, 25, 0, 0]]], float)
    ours = [first, first[::-1].copy(), first.copy()]
    rows = [{"rows": [{"bpp": 1.0, "file_bpp": 1.0, "name": i}]} for i in range(3)]
    rates = rd.rates_of(rows, ours, table, [200, 200])
    assert sorted(len(rate["ours"]) for rate in rates) == [1, 2]


def test_a_format_that_pillow_lacks_is_named_and_the_rest_reported(files, monkeypatch, capsys):
    Image.init()
    monkeypatch.delitem(Image.SAVE, "AVIF", raising=False)
    result = run(files, "--limit=1")
    assert set(result["unavailable"]) == {"AVIF 4:4:4", "AVIF 4:4:4, tune=psnr"}
    assert "AVIF 4:4:4: unavailable in this Pillow" in capsys.readouterr().out
    assert "JPEG 4:4:4" in {row["coder"] for row in result["rates"][0]["baselines"]}


def test_bad_input_is_one_line_and_code_2(files, tmp_path, capfd, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no image")
    val = str(files / "val")
    for flags, part in (
        ([str(tmp_path / "empty")], "empty"),
        ([str(tmp_path / "nowhere")], "nowhere"),
        ([str(tmp_path / "bad")], "a.png"),
        ([val, "--load", str(tmp_path / "none.pt")], "none.pt"),
        ([val, f"--figure={tmp_path / 'nowhere' / 'x.png'}"], "x.png"),
        ([val, f"--json={tmp_path / 'empty'}"], "empty"),
        ([val, "--limit=0"], "--limit"),
    ):
        with pytest.raises(SystemExit) as caught:
            exits.run_script(lambda flags=flags: rd.main(flags))
        lines = capfd.readouterr().err.strip().splitlines()
        assert caught.value.code == 2 and len(lines) == 1 and part in lines[0], (flags, lines)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pip install"):
        rd.main([val, f"--figure={tmp_path / 'x.png'}"])
    assert not (tmp_path / "x.png").exists()
