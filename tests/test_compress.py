"""`compress.py` as a user runs it: names, bytes, PSNR, and what it says about bad input."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_checkpoint
from PIL import Image, features
from processes import stop_by_ctrl_c

import exits
import output
from codec.codec import Codec
from codec.pixels import psnr
from dataset.images import IMAGE_SUFFIXES, read_image
from dataset.synthetic import SyntheticDataset
from scripts import compress

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with two checkpoints and `images/`: a.png, below/b.jpg, below/deep/c.webp."""
    monkeypatch.chdir(tmp_path)
    make_checkpoint("model.pt", "--channel=16", contrast=5)
    make_checkpoint("other.pt", "--channel=16", "--rfsq-stages=4", contrast=5)
    for i, name in enumerate(["a.png", "below/b.jpg", "below/deep/c.webp"]):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = SyntheticDataset(50, i, 1)[0].permute(1, 2, 0).numpy()[:37, : 40 + i]
        Image.fromarray(image).save(path)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    (tmp_path / "images" / ".hidden.png").write_text("no image")
    return tmp_path


def run(line: str):
    return compress.main(line.split())


def refused(line: str, capfd) -> str:
    """The one line on standard error with which a command ends, exit code 2."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        exits.run_script(lambda: run(line))
    lines = capfd.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_folder_there_and_back(here, capsys):
    result = run("encode images --load model.pt --out coded --json coded.json")
    assert files(here / "coded") == ["a.rfsq", "below/b.rfsq", "below/deep/c.rfsq"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    decoded = run("decode coded --load model.pt --out back --json back.json")
    assert files(here / "back") == ["a.png", "below/b.png", "below/deep/c.png"]
    codec = Codec("model.pt")
    for i, (row, name) in enumerate(zip(result["images"], files(here / "coded"), strict=True)):
        data = (here / "coded" / name).read_bytes()
        back = np.asarray(Image.open((here / "back" / name).with_suffix(".png")))
        assert np.array_equal(back, codec.decode(data)) and back.shape == (37, 40 + i, 3)
        # 10 x 10, or 10 x 11, positions of 22 bits; header and checksum.
        payload = math.ceil(22 * 10 * math.ceil((40 + i) / 4) / 8)
        assert row["bytes"] == len(data) == payload + 27 and row["payload_bytes"] == payload
        assert row["bpp"] == 8 * len(data) / (37 * (40 + i))
        original = np.asarray(read_image(here / "images" / row["name"])).astype(float)
        expected = 10 * math.log10(255**2 / np.square(original - back).mean())
        assert row["psnr"] == pytest.approx(expected)
        for part in (row["name"], f"{40 + i}x37", f"{len(data)} bytes", f"{row['bpp']:.4f} bpp"):
            assert part in lines[i]
        assert f"{expected:.2f} dB" in lines[i]
    assert result["bytes"] == sum(row["bytes"] for row in result["images"])
    assert f"{result['bytes']} bytes" in lines[3].replace(",", "") and "3 images" in lines[3]
    assert json.loads(Path("coded.json").read_text()) == result
    assert json.loads(Path("back.json").read_text()) == decoded


def test_a_log_says_how_far_it_is(here, monkeypatch, capfd):
    monkeypatch.setattr(output, "SECONDS_A_LINE", 0)
    for line, unit in (
        ("encode images --load model.pt --out coded", "files"),
        ("decode coded --load model.pt --out back", "files"),
        ("fit images --load model.pt --out coded.pt", "images"),
    ):
        run(line)
        told = [f"{line.split()[0]}: {i} of 3 {unit}" for i in (1, 2, 3)]
        assert capfd.readouterr().err.splitlines() == told


def test_a_folder_of_links_is_searched_as_in_training(here):
    (here / "linked").mkdir()
    (here / "linked" / "all").symlink_to(here / "images")
    result = run("encode linked --load model.pt --out files")
    assert [row["name"] for row in result["images"]] == [
        "all/a.png",
        "all/below/b.jpg",
        "all/below/deep/c.webp",
    ]


def test_stages_in_the_file_or_at_decoding_are_the_same_image(here, capsys):
    run("encode images/a.png --load model.pt --out one --stages 1")
    run("encode images/a.png --load model.pt --out both")
    for where, flags in (("one", ""), ("both", " --stages 1"), ("both", "")):
        out = f"{where}{len(flags)}"
        run(f"decode {where}/a.rfsq --load model.pt --out {out}{flags}")
    one, first, both = (Path(x, "a.png").read_bytes() for x in ("one0", "both11", "both0"))
    assert one == first != both
    short, long = (len(Path(x, "a.rfsq").read_bytes()) for x in ("one", "both"))
    assert (short - 27, long - 27) == (138, 275)  # 11 and 22 bits x 100 positions


def test_fit_then_entropy_coding(here, capsys):
    run("fit images --load model.pt --out runs/coded.pt")
    plain = run("encode images --load runs/coded.pt --out plain")
    capsys.readouterr()
    coded = run("encode images --load runs/coded.pt --out coded --entropy-coding")
    assert [row["psnr"] for row in coded["images"]] == [row["psnr"] for row in plain["images"]]
    assert coded["fixed_bytes"] == plain["bytes"] == plain["fixed_bytes"]
    assert coded["bytes"] < 0.9 * plain["bytes"]
    saving = 100 * (1 - coded["bytes"] / plain["bytes"])
    assert f"{saving:.1f} % less" in capsys.readouterr().out.splitlines()[-1]
    for where in ("plain", "coded"):
        run(f"decode {where} --load runs/coded.pt --out {where}-back")
    for name in files(here / "plain-back"):
        a, b = (Path(x, name).read_bytes() for x in ("plain-back", "coded-back"))
        assert a == b


def test_a_grey_image_becomes_a_grey_png(here):
    levels = np.asarray(Image.open("images/a.png").convert("L"))
    Image.fromarray(levels).save("grey.png")
    Image.fromarray(np.repeat(levels[..., None], 3, axis=2)).save("equal.png")
    result = run("encode grey.png equal.png images/a.png --load model.pt --out coded")
    run("decode coded --load model.pt --out back")
    modes = [Image.open(f"back/{name}.png").mode for name in ("grey", "equal", "a")]
    assert modes == ["L", "L", "RGB"]
    assert Path("coded/grey.rfsq").read_bytes() == Path("coded/equal.rfsq").read_bytes()
    # The PSNR is that of the decoded image as it is written.
    error = np.asarray(Image.open("back/grey.png")).astype(float) - levels
    expected = 10 * math.log10(255**2 / np.square(error).mean())
    assert result["images"][0]["psnr"] == pytest.approx(expected)


def test_fit_to_some_of_the_images(here):
    every = run("fit images --load model.pt --out every.pt")["images"]
    assert run("fit images --load model.pt --out two.pt --limit 2")["images"] == 2 < every
    assert run("fit images --load model.pt --out all.pt --limit 99")["images"] == every
    assert Path("all.pt").read_bytes() == Path("every.pt").read_bytes()
    assert Path("two.pt").read_bytes() != Path("every.pt").read_bytes()


def test_names_that_meet_are_refused_before_anything_is_written(here, capfd):
    line = refused("encode images images/below/../a.png --load model.pt --out coded", capfd)
    assert "would both become" in line and not Path("coded").exists()


def test_names_that_meet_keep_their_suffix(here):
    for name in ("a.jpg", "below/a.jpg", "c.jpg.png", "c.jpg", "c.png"):
        Image.open("images/below/b.jpg").save(here / "images" / name)
    result = run("encode images --load model.pt --out coded")
    names = {row["name"]: row["output"].removeprefix("coded/") for row in result["images"]}
    assert names == {
        **{"a.jpg": "a.jpg.rfsq", "a.png": "a.png.rfsq"},  # alone, they would both be a.rfsq
        **{"below/a.jpg": "below/a.rfsq", "below/b.jpg": "below/b.rfsq"},
        "below/deep/c.webp": "below/deep/c.rfsq",
        # c.jpg.rfsq is the output of c.jpg here.
        **{"c.jpg": "c.jpg.rfsq", "c.png": "c.png.rfsq", "c.jpg.png": "c.jpg.png.rfsq"},
    }
    assert files(here / "coded") == sorted(names.values())
    run("decode coded --load model.pt --out back")
    assert files(here / "back") == sorted(f"{name[:-5]}.png" for name in names.values())


def test_existing_outputs_stay_without_force(here, capfd):
    run("encode images/a.png --load model.pt --out coded")
    Path("coded/a.rfsq").write_bytes(b"mine")
    line = refused("encode images/below/b.jpg images/a.png --load model.pt --out coded", capfd)
    assert "coded/a.rfsq exists" in line and "--force" in line
    assert Path("coded/a.rfsq").read_bytes() == b"mine" and files(here / "coded") == ["a.rfsq"]
    run("encode images/a.png --load model.pt --out coded --force")
    assert Path("coded/a.rfsq").read_bytes()[:4] == b"RFSQ"
    Path("back").mkdir()
    Path("back/a.png").write_bytes(b"mine")
    assert "back/a.png exists" in refused("decode coded --load model.pt --out back", capfd)
    run("decode coded --load model.pt --out back --force")
    line = refused("fit images --load model.pt --out other.pt", capfd)
    assert "other.pt exists" in line


def test_an_interrupted_command_says_how_it_goes_on(here, monkeypatch, capfd):
    decode, calls = Codec.decode, iter(range(10))

    def decode_once(*given):
        if next(calls):
            raise KeyboardInterrupt
        return decode(*given)

    line = "encode images --load model.pt --out coded"
    with monkeypatch.context() as patch:
        patch.setattr(Codec, "decode", decode_once)
        stop_by_ctrl_c("compress", *line.split())
    advice = "to go on with encode or decode: the same command with --keep-existing"
    assert capfd.readouterr().err == f"compress.py: interrupted; {advice}\n"
    assert run(f"{line} --keep-existing")["kept"] == 1 and len(files(here / "coded")) == 3


def damage(here: Path) -> None:
    """Make the second of the three images unreadable."""
    path = here / "images" / "below" / "b.jpg"
    path.write_bytes(path.read_bytes()[:100])


def test_skip_corrupt_leaves_out_and_lists(here, capfd):
    damage(here)
    line = refused("encode images --load model.pt --out first", capfd)
    assert "images/below/b.jpg" in line and "--skip-corrupt" in line
    result = run("encode images --load model.pt --out coded --json coded.json --skip-corrupt")
    assert files(here / "coded") == ["a.rfsq", "below/deep/c.rfsq"]
    assert [row["name"] for row in result["images"]] == ["a.png", "below/deep/c.webp"]
    assert result["skipped"] == ["below/b.jpg"] and result["kept"] == 0
    assert json.loads(Path("coded.json").read_text()) == result
    lines = capfd.readouterr().out.splitlines()
    assert lines[-3].startswith("2 images ") and lines[-2] == "1 files skipped:"
    assert "cannot read image images/below/b.jpg: " in lines[-1]
    assert "--skip-corrupt" not in lines[-1] and "repair it" not in lines[-1]
    # Nothing else of the results depends on it.
    alone = run("encode images/a.png images/below/deep/c.webp --load model.pt --out alone")
    assert alone["psnr"] == result["psnr"] and alone["bytes"] == result["bytes"]
    assert alone["skipped"] == []
    line = refused("encode images/below/b.jpg --load model.pt --out none --skip-corrupt", capfd)
    assert "no image is left of 1: give readable ones" in line and not Path("none").exists()
    assert "--skip-corrupt" not in line


def test_fit_skips_corrupt_images(here, capfd):
    damage(here)
    assert "--skip-corrupt" in refused("fit images --load model.pt --out coded.pt", capfd)
    result = run("fit images --load model.pt --out coded.pt --skip-corrupt")
    assert result == {"images": 2, "skipped": ["below/b.jpg"], "output": "coded.pt"}
    assert "1 files skipped:" in capfd.readouterr().out


def test_decoding_goes_on_after_a_damaged_file_and_after_an_interruption(here, capfd):
    run("encode images --load model.pt --out coded")
    damaged = Path("coded/below/b.rfsq")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    decode = "decode coded --load model.pt --out back"
    assert "below/b.rfsq" in refused(decode, capfd)
    assert files(here / "back") == ["a.png"]
    first = Path("back/a.png").read_bytes()
    Path("back/a.png").write_bytes(b"kept")
    assert "--keep-existing" in refused(decode, capfd)
    result = run(f"{decode} --keep-existing --skip-corrupt --json back.json")
    assert result["kept"] == 1 and result["skipped"] == ["below/b.rfsq"]
    assert [row["name"] for row in result["files"]] == ["below/deep/c.rfsq"]
    assert "checksum" in capfd.readouterr().out.splitlines()[-1]
    assert Path("back/a.png").read_bytes() == b"kept" != first
    line = refused("decode coded/below/b.rfsq --load model.pt --out x --skip-corrupt", capfd)
    assert "none of 1 files can be decoded" in line


def test_no_file_is_replaced_but_by_force(here, capfd):
    photograph = Path("images/a.png").read_bytes()
    line = refused("encode images --load model.pt --out coded --json images/a.png", capfd)
    assert "is no .json file" in line and not Path("coded").exists()
    assert Path("images/a.png").read_bytes() == photograph
    Path("coded").mkdir()
    Path("coded/a.rfsq").symlink_to(here / "elsewhere.bin")  # which does not exist yet
    assert "a.rfsq exists" in refused("encode images/a.png --load model.pt --out coded", capfd)
    assert not Path("elsewhere.bin").exists()


def test_fit_counts_images_of_one_name_in_two_folders(here):
    for name in ("one", "two"):
        (here / name).mkdir()
        shutil.copy(here / "images" / "a.png", here / name / "ok.png")
        (here / name / "bad.png").write_bytes(b"cut")
    result = run("fit one two --load model.pt --out coded.pt --skip-corrupt")
    assert result == {"images": 2, "skipped": ["bad.png", "bad.png"], "output": "coded.pt"}


@pytest.mark.parametrize("flags", ["", " --stages 1", " --entropy-coding"])
def test_keep_existing_continues_what_was_interrupted(here, capfd, flags):
    run("fit images --load model.pt --out coded.pt")
    encode = f"encode images --load coded.pt --out coded{flags}"
    whole = run(f"encode images --load coded.pt --out whole{flags}")
    original = Path("images/below/b.jpg").read_bytes()
    damage(here)
    refused(encode, capfd)
    assert files(here / "coded") == ["a.rfsq"]
    Path("images/below/b.jpg").write_bytes(original)
    line = refused(encode, capfd)
    assert "coded/a.rfsq exists" in line and "--keep-existing" in line and "--force" in line
    before = os.stat("coded/a.rfsq")
    result = run(f"{encode} --keep-existing")
    after = os.stat("coded/a.rfsq")
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].endswith("kept") and lines[3].startswith("3 images, 1 of them kept ")
    # The results are those of a run without interruption.
    for row, other in zip(result["images"], whole["images"], strict=True):
        assert {**row, "output": ""} == {**other, "output": ""}
        assert Path(row["output"]).read_bytes() == Path(other["output"]).read_bytes()
    assert result["kept"] == 1 and result["psnr"] == whole["psnr"]
    assert run(f"{encode} --keep-existing")["kept"] == 3


def test_keep_existing_keeps_nothing_else(here, capfd):
    run("fit images --load model.pt --out coded.pt")
    a = "images/a.png"
    run(f"encode {a} --load model.pt --out right")
    right = Path("right/a.rfsq").read_bytes()
    run(f"encode {a} --load other.pt --out model")
    run(f"encode {a} --load model.pt --out stages --stages 1")
    run(f"encode {a} --load coded.pt --out coding --entropy-coding")
    Image.open(a).resize((40, 36)).save("size.png")
    Image.open(a).convert("L").save("grey.png")
    for name in ("size", "grey"):
        run(f"encode {name}.png --load model.pt --out {name}")
        Path(name, f"{name}.rfsq").rename(Path(name, "a.rfsq"))
    for name, content in (("damaged", right[:-1] + b"x"), ("mine", b"mine")):
        Path(name).mkdir()
        Path(name, "a.rfsq").write_bytes(content)
    for out, part in (
        ("model", "another model"),
        ("stages", "has 1 stages, not 2"),
        ("coding", "is entropy-coded"),
        ("size", "of another image"),
        ("grey", "of another image"),
        ("damaged", "checksum"),
        ("mine", "not an RFSQ file"),
    ):
        content = Path(out, "a.rfsq").read_bytes()
        load = "coded.pt" if out == "coding" else "model.pt"
        early = out not in ("size", "grey")  # before anything is written
        inputs = f"images/below/b.jpg {a}" if early else a
        command = f"encode {inputs} --load {load} --out {out} --keep-existing"
        line = refused(command, capfd)
        assert f"{out}/a.rfsq" in line and part in line and "--force" in line, line
        assert Path(out, "a.rfsq").read_bytes() == content and files(here / out) == ["a.rfsq"]
        assert run(f"{command} --force")["kept"] == 0
        assert Path(out, "a.rfsq").read_bytes() == right
    assert run(f"encode {a} --load model.pt --out right --keep-existing --force")["kept"] == 1


def test_a_pipe_named_like_a_file_is_not_opened(here, capfd):
    Path("pipes").mkdir()
    os.mkfifo("pipes/x.rfsq")
    line = refused("decode pipes --load model.pt --out back", capfd)
    assert "pipes/x.rfsq: it is not a regular file" in line


def test_names_that_are_not_utf_8(here, capfd):
    name = os.fsdecode(b"\xff\n.png")
    Path("folder").mkdir()
    Path("images/a.png").rename(Path("folder", name))
    assert run("encode folder --load model.pt --out coded")["images"][0]["name"] == name
    run("decode coded --load model.pt --out back")
    assert files(here / "back") == [name]
    Path("folder", name).write_bytes(b"")
    Path("folder/b.png").write_bytes(Path("back", name).read_bytes())
    assert run("encode folder --load model.pt --out new --skip-corrupt")["skipped"] == [name]
    assert len(capfd.readouterr().out.splitlines()) == 2 + 1 + 4


def test_bad_files_are_one_line_and_nothing_is_written(here, capfd):
    run("encode images/a.png --load model.pt --out coded")
    data = Path("coded/a.rfsq").read_bytes()
    flipped = bytearray(data)
    flipped[60] ^= 4
    gigantic = bytearray(data)
    gigantic[15:23] = b"\xff" * 8
    for name, content, part in (
        ("empty", b"", "empty"),
        ("cut", data[:100], "truncated"),
        ("head", data[:10], "truncated"),
        ("flipped", bytes(flipped), "checksum"),
        ("png", Path("images/a.png").read_bytes(), "not an RFSQ file"),
        ("newer", data[:4] + b"\x09" + data[5:], "newer version, 9"),
        ("gigantic", bytes(gigantic), "more than the limit"),
        ("long", data + bytes(5), "damaged"),
    ):
        Path(f"{name}.rfsq").write_bytes(content)
        line = refused(f"decode {name}.rfsq --load model.pt --out back", capfd)
        assert part in line and f"{name}.rfsq" in line and not Path("back").exists()
    line = refused("decode coded --load other.pt --out back", capfd)
    assert "another model" in line and not Path("back").exists()
    with open("huge.rfsq", "wb") as file:  # a sparse file, of which the header alone is read
        file.write(data)
        file.truncate(2**40)
    assert "more than" in refused("decode huge.rfsq --load model.pt --out back", capfd)
    # What came before the bad one stays.
    line = refused("decode coded/a.rfsq cut.rfsq --load model.pt --out back", capfd)
    assert "cut.rfsq" in line and files(here / "back") == ["a.png"]


def test_bad_input_is_one_line_and_code_2(here, capfd):
    Path("broken.png").write_bytes(Path("images/a.png").read_bytes()[:200])
    Path("nothing").mkdir()
    Path("file").write_text("")
    Image.new("L", (20000, 10000)).save("vast.png")
    coded = "--load model.pt --out out"
    for line, part in (
        (f"encode nowhere {coded}", "nowhere does not exist"),
        (f"encode nothing {coded}", "folder nothing holds no file"),
        (f"encode broken.png {coded}", "cannot read image broken.png"),
        (f"encode images/notes.txt {coded}", "cannot read image images/notes.txt"),
        (f"encode vast.png {coded}", "178956970"),
        ("encode images --load nowhere.pt --out out", "nowhere.pt"),
        ("encode images --load images/a.png --out out", "not a checkpoint"),
        ("encode images --load model.pt --out model.pt", "model.pt"),
        (f"encode images {coded} --stages 3", "the model has 2"),
        (f"encode images {coded} --stages 0", "--stages"),
        (f"encode images {coded} --entropy-coding", "fit"),
        (f"decode images {coded}", "folder images holds no file named .rfsq"),
        ("encode images --load model.pt --out file/out", "folder file/out cannot be made"),
        ("encode images --load model.pt", "--out"),
        ("squash images --load model.pt", "squash"),
        ("", "COMMAND"),
    ):
        assert part in refused(line, capfd), line
    assert not Path("out").exists()


def test_more_than_one_process_is_refused(here, capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun does
    assert "without torchrun" in refused("encode images --load model.pt --out out", capfd)
    assert not Path("out").exists()


def test_images_are_read_as_in_training(tmp_path):
    half = np.zeros((2, 2, 4), np.uint8)
    half[..., 3] = [[0, 255], [255, 0]]
    Image.fromarray(half).save(tmp_path / "clear.png")
    image = np.asarray(read_image(tmp_path / "clear.png"))
    assert image[..., 0].tolist() == [[255, 0], [0, 255]]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 3)).save(tmp_path / "turned.jpg", exif=exif)
    assert np.asarray(read_image(tmp_path / "turned.jpg")).shape == (6, 3, 3)


def test_avif_in_a_folder_is_read_or_reported(here, capfd, monkeypatch):
    Path("folder").mkdir()
    image = Image.open("images/a.png")
    image.save("folder/a.png")
    if features.check("avif"):
        image.save("folder/b.AVIF", quality=90)
        result = run("encode folder --load model.pt --out coded")
        assert [row["name"] for row in result["images"]] == ["a.png", "b.AVIF"]
        original, read = (np.asarray(x).astype(int) for x in (image, read_image("folder/b.AVIF")))
        assert 0 < abs(original - read).mean() < 5
        monkeypatch.setattr("PIL.AvifImagePlugin.SUPPORTED", False)
    else:
        Path("folder/b.AVIF").write_bytes(b"\0\0\0\x1cftypavif")
    line = refused("encode folder --load model.pt --out other", capfd)
    assert "cannot read image folder/b.AVIF" in line


def test_the_guide_names_every_suffix():
    assert f"`{' '.join(IMAGE_SUFFIXES)}`" in (ROOT / "docs" / "data.md").read_text()


def test_psnr_of_equal_images_is_infinite_and_counts_as_100_dB(here, monkeypatch):
    image = np.full((3, 4, 3), 7, np.uint8)
    assert psnr(image, image) == math.inf
    assert psnr(image, image + 1) == pytest.approx(20 * math.log10(255))
    codec, image = Codec("model.pt"), np.full((32, 32, 3), 7, np.uint8)
    data = codec.encode(image)
    monkeypatch.setattr(codec, "decode", lambda data: image)
    assert compress.measure(codec, image, data)["psnr"] == 100


@pytest.mark.slow
def test_as_a_command(here):
    """In a process of its own: what a shell sees."""
    script = [sys.executable, str(ROOT / "scripts" / "compress.py")]
    flags = ["--load", "model.pt", "--out", "coded"]
    done = subprocess.run([*script, "encode", "images", *flags], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and len(done.stdout.splitlines()) == 4
    Path("coded/a.rfsq").write_bytes(b"RFSQ")
    done = subprocess.run(
        [*script, "decode", "coded/a.rfsq", "--load=model.pt", "--out=back"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == "" and not Path("back").exists()
    assert done.stderr.startswith("compress.py: error: coded/a.rfsq: the file is truncated")
    assert len(done.stderr.splitlines()) == 1
