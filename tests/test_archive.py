"""Tars give what the folder gives that they are unpacked into, and hostile ones do nothing."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_checkpoint
from test_pack import CORRUPT, FLAGS, SIZE, contents, fill_source, pack_and_die

import exits
from dataset import ImageFolderDataset, TarDataset, archive, build_dataset
from dataset.archive import expand, is_tar, list_archives
from dataset.loaders import train_loader, val_loader
from scripts import make_tokens, pack_images

SUFFIXES = (".png", ".jpg", ".webp", ".tif")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(pack_images, "SHARD_IMAGES", 4)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Thirteen images of all modes in three folders, two files that are none, a text."""
    root = tmp_path_factory.mktemp("source")
    fill_source(root)
    return root


def put(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def tar_of(path: Path, files: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in files.items():
            put(tar, name, data)
    return path


@pytest.fixture(scope="module")
def tars(source, tmp_path_factory):
    """The folder as ImageNet is downloaded, as a plain tar, and as shards; not in order."""
    root, files = tmp_path_factory.mktemp("tars"), {}
    for path in sorted(source.rglob("*.*"), reverse=True):
        files[path.relative_to(source).as_posix()] = path.read_bytes()
    folders = {}
    for folder in ("c", "a", "b"):
        inner = {name[2:]: data for name, data in files.items() if name[0] == folder}
        folders[f"{folder}.tar"] = tar_of(root / "inner", inner).read_bytes()
    (root / "inner").unlink()
    tar_of(root / "nested.tar", folders)
    with tarfile.open(root / "plain.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.add(source, ".")  # with the folders themselves, as ./a
    names = list(files)
    for k in range(3):
        tar_of(root / f"shard-{k + 9:02}.tar", {name: files[name] for name in names[k::3]})
    return root


@pytest.mark.parametrize("workers", [0, 1])
def test_a_tar_that_vanishes_is_named(workers, source, tmp_path):
    png = next(source.rglob("*.png")).read_bytes()
    tar = tar_of(tmp_path / "a.tar", {f"{i}.png": png for i in range(4)})
    images = TarDataset([str(tar)], SIZE)
    tar.unlink()
    with pytest.raises(ValueError, match=r"cannot read tar .*a\.tar: .*try again"):
        next(iter(val_loader(images, 2, num_workers=workers)))


WAYS = ("nested.tar", "plain.tar", "shard-{09..11}.tar")


# ------------------------------------------------------------------ the same images
@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    """The folder, packed."""
    out = tmp_path_factory.mktemp("packed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_images, "SHARD_IMAGES", 4)
        pack_images.main([str(source), str(out), *FLAGS])
    return out


@pytest.mark.parametrize("way", WAYS)
def test_packing_a_tar_is_packing_the_folder(way, tars, packed, tmp_path):
    flags = [f"--img-size={SIZE}", "--num-workers=2"]
    index = pack_images.main([str(tars / way), str(tmp_path / "out"), *flags])
    assert [entry["name"] for entry in index["skipped"]] == list(CORRUPT)
    assert contents(tmp_path / "out") == contents(packed)  # pixels, names, reasons, checksums


def test_shards_that_the_shell_has_expanded(tars, packed, tmp_path):
    shards = [str(tars / f"shard-{k:02}.tar") for k in (9, 10, 11)]
    pack_images.main([*shards, str(tmp_path / "out"), *FLAGS])
    assert contents(tmp_path / "out") == contents(packed)


def test_a_run_that_was_interrupted_continues_from_the_tar(source, tars, packed, tmp_path, capfd):
    out, context = tmp_path / "out", multiprocessing.get_context("fork")
    dying = context.Process(target=pack_and_die, args=(source, out, 5, False))
    dying.start()
    dying.join()
    pack_images.main([str(tars / "nested.tar"), str(out), *FLAGS])
    assert "continues after 9 of 15 files" in capfd.readouterr().out
    assert contents(out) == contents(packed)


@pytest.mark.parametrize("way", WAYS)
def test_the_dataset_is_that_of_the_folder(way, source, tars):
    folder, images = (build_dataset(x, SIZE, 0, True) for x in (source, tars / way))
    assert isinstance(images, TarDataset) and images.names() == folder.names()
    assert images.fingerprint() == folder.fingerprint()
    assert len(pickle.dumps(images)) < 10_000
    for i in range(len(folder)):
        if folder.name(i) in CORRUPT:
            with pytest.raises(ValueError, match=rf"cannot read image .*\.tar/{folder.name(i)}: "):
                images[i]
        else:
            assert torch.equal(images[i], folder[i])


def test_loaders_are_those_of_the_folder(source, tars):
    options = dict(seed=4, start_step=2, num_workers=2)
    drawn = []
    for data in (source, tars / "nested.tar"):
        images = build_dataset(data, SIZE, 0, train=True, skip_corrupt=True)
        batches = list(train_loader(images, 3, 9, **options))
        rest = build_dataset(data, SIZE, 0, train=False, skip_corrupt=True)
        drawn.append([*batches, *val_loader(rest, 4)])
        assert [Path(name).name for name in rest.skipped()] == ["cut.jpg", "text.png"]
    assert len(drawn[0]) == 7 + 4 and all(map(torch.equal, *drawn))


def test_tokens_of_a_tar_are_those_of_the_folder(source, tars, tmp_path):
    make_checkpoint(tmp_path / "last.pt", "--channel", "16")
    for data, out in ((source, "a"), (tars / "nested.tar", "b")):
        flags = [f"--load={tmp_path / 'last.pt'}", f"--out={tmp_path / out}", "--skip-corrupt"]
        make_tokens.main([str(data), *flags, "--num-workers=0", f"--img-size={SIZE}"])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# ------------------------------------------------------------------ names
def test_braces_are_those_of_a_shell():
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("{8..10}.tar") == ["8.tar", "9.tar", "10.tar"]
    assert expand("{0..10}.tar") == [f"{i}.tar" for i in range(11)]
    assert expand("x{000..1}-{a,b}.tar") == ["x000-a.tar", "x000-b.tar", "x001-a.tar", "x001-b.tar"]
    assert expand("plain.tar") == ["plain.tar"] and expand("{a}.tar") == ["{a}.tar"]
    assert is_tar("shard-{000000..000146}.tar") and not is_tar("images")
    for text in ("{0..999999999999}.tar", "{5..3}.tar", "{1..9999}{1..9999}.tar"):
        with pytest.raises(ValueError, match="tars"):
            expand(text)


def test_a_file_or_folder_of_that_name_comes_first(tmp_path):
    tar_of(tmp_path / "{1..2}.tar", {"a.png": b"x"})
    assert expand(str(tmp_path / "{1..2}.tar")) == [str(tmp_path / "{1..2}.tar")]
    (tmp_path / "folder.tar").mkdir()
    assert not is_tar(tmp_path / "folder.tar")


def names_of(*paths: Path) -> list[str]:
    return list_archives(list(map(str, paths)), SUFFIXES)[0]


def test_hidden_tars_within_a_tar_are_passed_over(tmp_path):
    inner = tar_of(tmp_path / "n01.tar", {"a.png": b"x"}).read_bytes()
    outer = tar_of(tmp_path / "all.tar", {"._n01.tar": b"of a Mac", "n01.tar": inner})
    assert names_of(outer) == ["n01/a.png"]


def test_a_name_that_comes_twice_is_the_later_file(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for data in (b"1", b"22", b"333"):
            put(tar, "x/a.png", data)
    names, places, _ = list_archives([str(tmp_path / "a.tar")], SUFFIXES)
    assert names == ["x/a.png"] and places[0, 2] == 3
    tar_of(tmp_path / "b.tar", {"./x/a.png": b"4"})
    with pytest.raises(ValueError, match=r"a\.tar and .*b\.tar both hold 'x/a\.png'"):
        names_of(tmp_path / "a.tar", tmp_path / "b.tar")


def test_names_that_the_folder_skips_or_orders(tmp_path):
    names = ["é.png", "z.png", "Z.PNG", ".hidden.png", "a/.b/c.png", "a/b.png", "a.png", "a-.png"]
    names += [
        "t.txt",
        "x.tar.png",
        "n" * 150 + ".png",
        "\udcff.png",
        "\ue000.png",
        "\U0001f600.png",
    ]
    tar_of(tmp_path / "a.tar", dict.fromkeys(names, b""))
    (tmp_path / "folder").mkdir()
    with tarfile.open(tmp_path / "a.tar") as tar:
        for member in tar:  # `extractall` differs between versions of Python
            file = tmp_path / "folder" / member.name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(tar.extractfile(member).read())
    (tmp_path / "folder" / "t.txt").unlink()
    assert names_of(tmp_path / "a.tar") == ImageFolderDataset(tmp_path / "folder", 8).names()


# ------------------------------------------------------------------ hostile and damaged tars
def test_only_regular_files_are_read_and_nothing_is_unpacked(tmp_path, monkeypatch):
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, kind in enumerate(
            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
        ):
            member = tarfile.TarInfo(f"{i}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        for name in ("/absolute.png", "../../above.png", "./x//y.png", "/", ".."):
            put(tar, name, b"data")
        inner = tar_of(tmp_path / "inner", {"in.tar": b"not opened", "b.png": b"1"}).read_bytes()
        put(tar, "deep.tar", inner)
    (tmp_path / "inner").unlink()
    before = sorted(tmp_path.rglob("*"))
    wanted = ["above.png", "absolute.png", "deep/b.png", "x/y.png"]
    assert names_of(tmp_path / "a.tar") == wanted
    images = TarDataset([str(tmp_path / "a.tar")], 8)
    for i in range(4):
        with pytest.raises(ValueError, match="cannot identify"):
            images[i]
    assert sorted(tmp_path.rglob("*")) == before and not os.path.exists("/absolute.png")


def patched(tar: bytes, size: bytes, kind: bytes | None = None) -> bytes:
    """The first header of a tar with another size (12 bytes) and type, and its right checksum."""
    header = bytearray(tar[:512])
    header[124:136] = size.ljust(12, b"\0")
    header[156:157] = kind or header[156:157]
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header) + tar[512:]


def negative(value: int) -> bytes:
    return b"\xff" + struct.pack(">q", value).rjust(11, b"\xff")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Two members with a byte each, in 512-byte blocks, and zeros at the end."""
    path = tmp_path_factory.mktemp("good") / "a.tar"
    return tar_of(path, {"a.png": b"1", "b.png": b"2"}).read_bytes()


def bad_tars(good: bytes) -> dict[str, tuple[bytes, str]]:
    damaged = bytearray(good)
    damaged[1024 + 148] ^= 1  # the checksum of the second header
    huge = b"\x80" + (2**60).to_bytes(11, "big")
    return {
        "empty": (b"", "empty"),
        "text": (b"<html>not found</html>" * 100, "invalid header"),
        "compressed": (b"\x1f\x8b" + bytes(range(256)) * 8, "not compressed"),
        "cut in data": (good[:600], "unexpected end of data|cut off|is wrong"),
        "cut in a header": (good[:1100], "cut off at byte"),
        "cut after a file": (good[:1024], "cut off at byte 1,024"),
        "no end": (good[:2048], "cut off at byte 2,048"),
        "damaged header": (bytes(damaged), "damaged or cut off at byte 1,024"),
        "huge": (patched(good, huge), "the size of 'a.png' is wrong"),
        "huge, a long name": (patched(good, huge, b"L"), "a header of "),
        "huge, pax": (patched(good, huge, b"x"), "a header of |invalid|cannot read"),
        "huge, sparse": (patched(good, huge, b"S"), "is wrong|cut off|cannot read"),
        "negative": (patched(good, negative(-512)), "is wrong|cannot read"),
        "negative, a long name": (patched(good, negative(-1024), b"L"), "cannot read"),
        "negative, pax": (patched(good, negative(-1024), b"x"), "cannot read"),
        "a thousand headers for one file": (
            1500 * patched(good, b"00000000001\0", b"L")[:1024] + good,
            "recursion",
        ),
        "negative, unknown type": (patched(good, negative(-1024), b"Z"), "is wrong|cannot read"),
    }


def test_damaged_tars_are_one_line_and_code_2(good, tmp_path, capfd):
    kinds = bad_tars(good)
    for kind, (data, _) in list(kinds.items()):  # and the same within a tar
        kinds[f"{kind}, inside"] = (
            tar_of(tmp_path / "x", {"in.tar": data}).read_bytes(),
            r"x\.tar/in\.tar: ",
        )
    for kind, (data, part) in kinds.items():
        (tmp_path / "x.tar").write_bytes(data)
        with pytest.raises(ValueError, match=part) as caught:
            names_of(tmp_path / "x.tar")
        assert str(caught.value).startswith("cannot read tar "), kind
        assert "\n" not in str(caught.value), kind
    (tmp_path / "fifo").mkdir()
    os.mkfifo(tmp_path / "fifo" / "x.tar")
    tar_of(tmp_path / "text.tar", {"a.txt": b"1", "b.txt": b""})
    tar_of(tmp_path / "none.tar", {})
    tar_of(tmp_path / "names.tar", {"\n\x1b[31m.tar": b""})
    tar_of(tmp_path / "other.tar", {"\n\x1b[31m.txt": b""})
    for name in ("a.tar", "b.tar"):
        tar_of(tmp_path / name, {"\n\x1b[31m.png": b""})
    out = str(tmp_path / "out")
    for sources, part in (
        ([tmp_path / "x.tar"], "cannot read tar"),
        ([tmp_path / "missing-{0..2}.tar"], "missing-0.tar: it does not exist"),
        ([tmp_path / "fifo" / "x.tar"], "it does not exist"),
        ([tmp_path / "text.tar"], "holds no image (but, for example, 'a.txt')"),
        ([tmp_path / "none.tar"], "holds no file"),
        ([tmp_path / "names.tar"], r"names.tar/\n\x1b[31m.tar: empty file"),
        ([tmp_path / "other.tar"], r"for example, '\n\x1b[31m.txt'"),
        ([tmp_path / "a.tar", tmp_path / "b.tar"], r"both hold '\n\x1b[31m.png'"),
        ([tmp_path / "text.tar", tmp_path], "are several paths"),
    ):
        with pytest.raises(SystemExit) as caught:
            exits.run_script(lambda s=sources: pack_images.main([*map(str, s), out, *FLAGS]))
        (line,) = capfd.readouterr().err.splitlines()
        assert caught.value.code == 2 and part in line, line
    assert not os.path.exists(out)


def test_any_damage_gives_an_error_or_the_names_of_files(good, tmp_path):
    """The bytes of a header, changed in two ways: no other exception, and no endless loop."""
    path, seen = tmp_path / "x.tar", set()
    for position in range(100, 265):  # after the name: mode, sizes, types, links
        for value in (0xFF, good[position] ^ 1):
            data = bytearray(good)
            data[position] = value
            data[148:156] = b" " * 8
            data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
            path.write_bytes(data)
            try:
                seen.add(len(names_of(path)))
            except ValueError as error:
                assert str(error).startswith("cannot read tar ")
                seen.add("error")
    assert {"error", 1, 2} <= seen


def test_a_section_reads_as_a_file_does(tmp_path):
    (tmp_path / "x").write_bytes(bytes(range(100)))
    with archive.opened(str(tmp_path / "x"), "name", 10, 50) as file:
        wanted = io.BytesIO(bytes(range(10, 60)))
        for offset, whence, size in ((0, 0, 7), (3, 1, 5), (-4, 2, 9), (70, 0, 3), (0, 0, -1)):
            assert file.seek(offset, whence) == wanted.seek(offset, whence)
            assert file.read(size) == wanted.read(size) and file.tell() == wanted.tell()
        with pytest.raises(ValueError):
            archive.Section(file.raw.file, 0, 5).seek(-1)


def test_the_places_are_of_the_tar_itself(tars):
    paths = expand(str(tars / "shard-{09..11}.tar"))
    names, places, other = list_archives(paths, SUFFIXES)
    assert places.dtype == np.int64 and other == "b/labels.txt" and len(names) == len(places) == 15
    for name, (tar, start, size) in zip(names, places, strict=True):
        with tarfile.open(paths[tar]) as reader:
            wanted = reader.extractfile(name).read()
        assert Path(paths[tar]).read_bytes()[start : start + size] == wanted
