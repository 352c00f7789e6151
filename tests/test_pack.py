"""Packed images: the bytes of the folder, whatever happens on the way, and loud about damage."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import stop_by_ctrl_c

import exits
import output
import train
from dataset import ImageFolderDataset, build_dataset
from dataset import packed as packed_module
from dataset.loaders import train_loader, val_loader
from dataset.packed import PackedDataset
from dataset.synthetic import SyntheticDataset
from files import locked
from scripts import pack_images

SIZE = 16
FLAGS = [f"--img-size={SIZE}", "--num-workers=0"]
CORRUPT = ("a/cut.jpg", "c/text.png")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(pack_images, "SHARD_IMAGES", 4)


def fill_source(root: Path) -> None:
    """Thirteen images of all modes and shapes, and two files that are none, in three folders."""
    for folder in ("a", "b", "c"):
        (root / folder).mkdir()
    pixels = SyntheticDataset(40, 0, 13)
    modes = ["RGB", "L", "RGBA", "P", "1", "CMYK", "LA", "I;16", "RGB", "RGB", "RGB", "L", "RGB"]
    for i, mode in enumerate(modes):
        image = Image.fromarray(pixels[i].permute(1, 2, 0).numpy())
        image = image.crop((0, 0, 40 - 2 * (i % 5), 17 + 2 * i))
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        elif mode == "RGBA":
            image.putalpha(image.convert("L"))
        else:
            image = image.convert(mode)
        suffix = "tif" if mode == "CMYK" else ("jpg", "webp")[i % 2] if i > 7 else "png"
        image.save(root / "abc"[i % 3] / f"{i:02}.{suffix}")
    whole = (root / "c" / "08.jpg").read_bytes()
    (root / CORRUPT[0]).write_bytes(whole[: len(whole) // 2])
    (root / CORRUPT[1]).write_text("<html>not found</html>")
    (root / "b" / "labels.txt").write_text("no image")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("source")
    fill_source(root)
    return root


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    """The folder packed without a break; tests must not change it."""
    out = tmp_path_factory.mktemp("packed") / "deep" / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_images, "SHARD_IMAGES", 4)
        pack_images.main([str(source), str(out), *FLAGS])
    return out


@pytest.fixture
def copy(packed, tmp_path):
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def readable(source: Path) -> list[torch.Tensor]:
    images = ImageFolderDataset(source, SIZE)
    return [images[i] for i in range(len(images)) if images.name(i) not in CORRUPT]


# ------------------------------------------------------------------ what is packed
def test_the_bytes_and_the_order_are_those_of_the_folder(source, packed):
    images, expected = build_dataset(packed, SIZE, seed=0, train=True), readable(source)
    assert isinstance(images, PackedDataset) and len(images) == len(expected) == 13
    for image, wanted in zip(images, expected, strict=True):
        assert image.dtype == torch.uint8 and image.shape == (3, SIZE, SIZE)
        assert torch.equal(image, wanted)
    names = (packed / "names.txt").read_text().splitlines()
    folder = ImageFolderDataset(source, SIZE)
    assert names == [folder.name(i) for i in range(len(folder)) if folder.name(i) not in CORRUPT]


def test_the_index_says_what_is_there(source, packed):
    index = json.loads((packed / "index.json").read_text())
    assert (index["img_size"], index["count"], index["sources"]) == (SIZE, 13, 15)
    assert [shard["count"] for shard in index["shards"]] == [4, 4, 4, 1]
    for shard in index["shards"]:
        data = (packed / shard["file"]).read_bytes()
        assert shard["bytes"] == len(data)
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
        array = np.load(packed / shard["file"], mmap_mode="r", allow_pickle=False)
        assert array.dtype == np.uint8 and array.shape == (shard["count"], 3, SIZE, SIZE)
    assert [entry["name"] for entry in index["skipped"]] == list(CORRUPT)
    for entry in index["skipped"]:
        assert entry["reason"] and "\n" not in entry["reason"]
        assert str(source) not in entry["reason"]
    shards = [shard["file"] for shard in index["shards"]]
    assert sorted(contents(packed)) == sorted(["index.json", "names.txt", *shards])


def test_workers_change_nothing_and_a_second_run_does_nothing(source, packed, tmp_path, capfd):
    out = tmp_path / "out"
    index = pack_images.main([str(source), str(out), f"--img-size={SIZE}", "--num-workers=2"])
    said = capfd.readouterr()
    assert contents(out) == contents(packed)
    assert "13 images of 16x16" in said.out and "2 files skipped, listed in" in said.out
    assert said.err == ""

    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert pack_images.main([str(source), str(out), *FLAGS]) == index
    assert "is complete" in capfd.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_shards_are_bounded(source, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_images, "SHARD_BYTES", 2 * 3 * SIZE**2 + 1)
    index = pack_images.main([str(source), str(tmp_path / "out"), *FLAGS])
    assert [shard["count"] for shard in index["shards"]] == [2] * 6 + [1]
    batch = PackedDataset(tmp_path / "out", SIZE).__getitems__(range(13))
    assert torch.equal(batch, PackedDataset(packed, SIZE).__getitems__(range(13)))


def test_a_log_gets_a_line_now_and_then(source, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(output, "SECONDS_A_LINE", 0)
    pack_images.main([str(source), str(tmp_path / "out"), *FLAGS])
    assert capfd.readouterr().err == "pack: 15 of 15 images\n"


# ------------------------------------------------------------------ kills
def test_an_interrupted_run_says_how_it_goes_on(source, tmp_path, monkeypatch, capfd):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(packed_module, "add_shard", stop)
    stop_by_ctrl_c("pack_images", str(source), str(tmp_path / "out"), *FLAGS)
    line = "pack_images.py: interrupted; to go on: the same command\n"
    assert capfd.readouterr().err == line


def pack_and_die(source: Path, out: Path, call: int, after: bool) -> None:
    """Pack; at the given call of os.replace, the process is killed, before or after it."""
    replace, calls = os.replace, iter(range(1000))

    def deadly(*paths):
        now = next(calls) == call
        if after or not now:
            replace(*paths)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = deadly
    pack_images.main([str(source), str(out), *FLAGS])


@pytest.mark.slow
def test_a_kill_at_any_write_leaves_what_the_same_command_finishes(source, packed, tmp_path):
    """A file appears by os.replace alone, so that these are all the states a kill can leave."""
    wanted, context = contents(packed), multiprocessing.get_context("fork")
    killed = unfinished = 0
    for call in range(100):
        out = tmp_path / f"{call}"
        dying = context.Process(target=pack_and_die, args=(source, out, call, call % 2 == 0))
        dying.start()
        dying.join()
        if dying.exitcode == 0:
            break
        assert dying.exitcode == -signal.SIGKILL
        killed += 1
        left = contents(out)
        if "index.json" not in left and any(name[0] != "." for name in left):
            unfinished += 1
            with pytest.raises(ValueError, match=r"not packed to its end.*pack_images\.py"):
                build_dataset(out, SIZE, seed=0, train=True)
        for name in left.keys() & wanted.keys():  # nothing that looks whole is not
            assert left[name] == wanted[name], (call, name)
        pack_images.main([str(source), str(out), *FLAGS])
        assert contents(out) == wanted, call
    # The start, 4 shards with a line in the index each, the names, the index, and its last name.
    assert killed == 1 + 4 * 2 + 1 + 1 + 1 and unfinished >= 10


def test_a_kill_within_a_shard_costs_that_shard_alone(source, packed, tmp_path, capfd):
    out, context = tmp_path / "out", multiprocessing.get_context("fork")
    dying = context.Process(target=pack_and_die, args=(source, out, 5, False))
    dying.start()
    dying.join()
    left = {name for name in contents(out) if name.startswith(".shard-00002.npy.")}
    assert len(left) == 1  # written, and not yet named
    old = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.npy")}
    assert sorted(old) == ["shard-00000.npy", "shard-00001.npy"]
    pack_images.main([str(source), str(out), *FLAGS])
    assert "continues after 9 of 15 files" in capfd.readouterr().out
    assert all((out / name).stat().st_mtime_ns == time for name, time in old.items())
    assert contents(out) == contents(packed)


def test_a_disk_error_ends_the_run_and_skips_nothing(source, packed, tmp_path, monkeypatch):
    out, real = tmp_path / "out", Image.open

    def failing(path, **options):
        if Path(path).name == "07.png":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, **options)

    monkeypatch.setattr(Image, "open", failing)
    with pytest.raises(ValueError, match=r"cannot read .*07\.png: Input/output error; try again"):
        pack_images.main([str(source), str(out), *FLAGS])
    monkeypatch.setattr(Image, "open", real)
    pack_images.main([str(source), str(out), *FLAGS])
    assert contents(out) == contents(packed)


def test_one_command_at_a_time(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with locked(out, ""), pytest.raises(ValueError, match="another process is packing"):
        pack_images.main([str(source), str(out), *FLAGS])
    assert not list(out.iterdir())


# ------------------------------------------------------------------ damage
def test_verify_finds_one_bit(source, copy, capfd):
    pack_images.main(["--verify", str(copy)])
    pack_images.main([str(source), str(copy), *FLAGS, "--verify"])
    assert capfd.readouterr().out.count("is intact: 5 files") == 2
    for name in ("shard-00001.npy", "names.txt"):
        data = bytearray((copy / name).read_bytes())
        data[-40] ^= 1
        (copy / name).write_bytes(data)
    PackedDataset(copy, SIZE)  # sizes are right: only reading all of it can tell
    with pytest.raises(ValueError, match=r"checksums differ: shard-00001\.npy, names\.txt; copy"):
        pack_images.main([str(copy), "--verify"])
    (copy / "names.txt").unlink()
    with pytest.raises(ValueError, match=r"names\.txt"):
        pack_images.main([str(copy), "--verify"])


def test_a_disk_error_in_a_loading_process_is_one_line(copy, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    images = PackedDataset(copy, SIZE)
    with pytest.raises(ValueError, match=r"shard-00000\.npy: Input/output error"):
        list(torch.utils.data.DataLoader(images, num_workers=1))


def test_a_shard_that_is_cut_or_missing_is_named_at_once(source, copy):
    shard = copy / "shard-00002.npy"
    size = shard.stat().st_size
    os.truncate(shard, size - 1)
    for read in (
        lambda: PackedDataset(copy, SIZE),
        lambda: pack_images.main([str(source), str(copy), *FLAGS]),
    ):
        with pytest.raises(ValueError, match=rf"00002\.npy has {size - 1:,} bytes, not {size:,}"):
            read()
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard .*shard-00002\.npy is missing: copy"):
        build_dataset(copy, SIZE, seed=0, train=True)


def test_a_shard_of_another_shape_is_refused(copy):
    shard = np.load(copy / "shard-00001.npy")
    np.save(copy / "shard-00001.npy", shard.transpose(0, 2, 3, 1).copy())
    images = PackedDataset(copy, SIZE)
    with pytest.raises(ValueError, match=r"00001\.npy: uint8 \(4, 16, 16, 3\)"):
        images[5]


def test_nothing_of_a_file_is_executed(copy, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    shard = copy / "shard-00000.npy"
    shard.write_bytes(pickle.dumps(Trap()).ljust(shard.stat().st_size, b"\0"))
    with pytest.raises(ValueError, match=r"cannot read shard .*00000\.npy: .*; copy"):
        PackedDataset(copy, SIZE)[0]
    assert not (tmp_path / "executed").exists()


def test_a_damaged_header_is_refused(copy):
    shard = copy / "shard-00000.npy"
    whole = shard.read_bytes()
    for data in (bytes(len(whole)), whole[:20] + b"\xff" + whole[21:], b"PK\3\4" + whole[4:]):
        shard.write_bytes(data)
        with pytest.raises(ValueError, match=r"^cannot read shard .*00000\.npy: .*pack again$"):
            PackedDataset(copy, SIZE)[0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 2}, r"version 2 .*reads up to 1: use the version"),
        ({"format": "other"}, r"no index of packed images, or is damaged"),
        ({"img_size": "16"}, r"is damaged"),
        ({"count": 12}, r"is damaged"),
        ({"images_per_shard": 5}, r"is damaged"),
        ({"shards": None}, r"is damaged"),
        ({"sources_done": -1}, r"is damaged"),
        ({"sources": None}, r"is damaged"),
        ({"skipped": None}, r"is damaged"),
        ({"skipped": [{}]}, r"is damaged"),
        ({"version": 0}, r"is damaged"),
        ({"version": 1.0}, r"is damaged"),
        ({"images_per_shard": 0}, r"is damaged"),
        ({"images_per_shard": -1, "count": 0, "shards": []}, r"is damaged"),
        ({"listing_sha256": None}, r"is damaged"),
        ({"names_sha256": None}, r"is damaged"),
        ({"sources": 99}, r"is damaged"),  # an index is written at the end
        ({"count": 10**12, "images_per_shard": 1, "sources": 10**12}, r"is damaged"),
    ],
)
def test_an_index_of_another_kind_is_refused(copy, change, message):
    index = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(ValueError, match=message):
        build_dataset(copy, SIZE, seed=0, train=True)


def test_a_damaged_index_is_refused(copy):
    whole = (copy / "index.json").read_bytes()
    for data in (b"", whole[:100], b"[]", b"\xff\xfe", b"[" * 10**5):
        (copy / "index.json").write_bytes(data)
        with pytest.raises(ValueError, match=r"index\.json is no index of packed images"):
            build_dataset(copy, SIZE, seed=0, train=True)
    (copy / "index.json").unlink()
    with pytest.raises(ValueError, match="not packed to its end"):
        build_dataset(copy, SIZE, seed=0, train=True)


def test_sources_that_have_changed_are_refused(tmp_path, capsys):
    (tmp_path / "src").mkdir()
    fill_source(tmp_path / "src")
    out = tmp_path / "out"
    pack_images.main([str(tmp_path / "src"), str(out), *FLAGS])
    file = next((tmp_path / "src").rglob("*.png"))
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(ValueError, match="from files of other sizes"):
        pack_images.main([str(tmp_path / "src"), str(out), *FLAGS])


def test_another_size_is_refused(packed):
    with pytest.raises(ValueError, match=r"16x16 pixels, asked is 32x32: use --img-size 16, or"):
        PackedDataset(packed, 32)


def test_an_index_of_somebody_else_leaves_a_folder_a_folder(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    for text in ('{"format": "coco"}', "[1]", "no json"):
        (tmp_path / "index.json").write_text(text)
        assert isinstance(build_dataset(tmp_path, 8, 0, True), ImageFolderDataset)


# ------------------------------------------------------------------ reading
def test_a_batch_is_its_items(packed, monkeypatch):
    monkeypatch.setattr(packed_module, "MAX_OPEN", 2)  # of 4 shards
    images, order = PackedDataset(packed, SIZE), [12, 0, 7, 7, -1, np.int64(3), 4]
    batch = images.__getitems__(order)
    assert batch.shape == (7, 3, SIZE, SIZE) and batch.is_contiguous()
    assert torch.equal(batch, torch.stack([images[i] for i in order]))
    assert torch.equal(images[-1], images[12]) and not torch.equal(images[0], images[1])
    assert len(images._open) <= 2
    for wrong in (13, -14):
        with pytest.raises(IndexError, match=rf"index {wrong}: .* 13 images"):
            images[wrong]
    with pytest.raises(TypeError):
        images[1.0]


def test_items_can_be_changed_and_files_cannot(packed):
    before = contents(packed)
    images = PackedDataset(packed, SIZE)
    wanted = images[3].clone()
    images[3].zero_()
    images.__getitems__([3]).zero_()
    assert torch.equal(images[3], wanted) and contents(packed) == before


def test_a_pickle_holds_no_pixels(packed):
    images = PackedDataset(packed, SIZE)
    everything = images.__getitems__(range(13))
    assert len(images._open) == 4
    data = pickle.dumps(images)
    assert len(data) < 2000
    assert torch.equal(pickle.loads(data).__getitems__(range(13)), everything)


def test_loaders_give_what_the_folder_gives(source, packed, tmp_path):
    clean = Path(shutil.copytree(source, tmp_path / "clean"))
    for name in CORRUPT:
        (clean / name).unlink()
    folder, images = ImageFolderDataset(clean, SIZE), PackedDataset(packed, SIZE)
    wanted = list(train_loader(folder, 3, 9, seed=4, start_step=2, rank=1, world_size=2))
    for workers in (0, 2):
        options = dict(start_step=2, num_workers=workers, rank=1, world_size=2)
        drawn = list(train_loader(images, 3, 9, 4, **options))
        assert len(drawn) == 7 and all(map(torch.equal, drawn, wanted))
        drawn = list(val_loader(images, 4, workers, rank=1, world_size=2))
        assert torch.equal(torch.cat(drawn), torch.stack(list(folder))[1::2])


def test_training_on_packed_images_is_training_on_the_folder(packed, source, tmp_path, no_lpips):
    clean = Path(shutil.copytree(source, tmp_path / "clean"))
    for name in CORRUPT:
        (clean / name).unlink()
    small = ["--channel=16", "--batch-size=4", "--perceptual-weight=0", "--lpips-net=squeeze"]
    results = []
    for data, workers in ((packed, 2), (clean, 0)):
        paths = [f"--train-data-path={data}", f"--val-data-path={data}"]
        run = [f"--save={tmp_path / data.name}-run", f"--num-workers={workers}"]
        results.append(train.main([*small, *paths, *run, f"--img-size={SIZE}", "--train-iters=2"]))
    assert results[0]["steps"] == 2 and results[0]["images"] == 13
    assert results[0]["psnr"] == results[1]["psnr"]


# ------------------------------------------------------------------ bad input
def bad_inputs(source: Path, packed: Path, tmp_path: Path) -> dict[str, tuple[list, str]]:
    for folder in ("empty", "other", "broken", "lines"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    (tmp_path / "other" / "index.json").write_text("{}")
    (tmp_path / "broken" / "a.png").write_text("no image")
    Image.new("L", (8, 8)).save(tmp_path / "lines" / "a\nb.png")
    out = tmp_path / "out"
    return {
        "no source": ([tmp_path / "nowhere", out], "does not exist"),
        "empty source": ([tmp_path / "empty", out], "is empty"),
        "source is a file": ([tmp_path / "file", out], "is a file"),
        "nothing readable": ([tmp_path / "broken", tmp_path / "b"], "'a.png' for example"),
        "line break": ([tmp_path / "lines", out], "rename it"),
        "out is a file": ([source, tmp_path / "file"], "is a file: give a new folder"),
        "out below a file": ([source, tmp_path / "file" / "out"], "give another OUT"),
        "out is source": ([source, source], "give a folder outside"),
        "out in source": ([source, source / "a" / "out"], "give a folder outside"),
        "out holds others": ([source, tmp_path / "other"], "'index.json'): give a new folder"),
        "other size": ([source, packed, "--img-size=32"], "at 16x16 pixels, asked is 32x32"),
        "other source": ([source / "a", packed], "from 15 files"),
        "out alone": ([packed], "--verify"),
        "verify nothing": ([tmp_path / "empty", "--verify"], "is no packed folder"),
        "size": ([source, out, "--img-size=0"], "--img-size"),
        "workers": ([source, out, "--num-workers=-1"], "--num-workers"),
        "unknown flag": ([source, out, "--overwrite"], "--overwrite"),
    }


def test_bad_input_is_one_line_and_code_2(source, packed, tmp_path, capfd):
    inputs = bad_inputs(source, packed, tmp_path)
    before = contents(packed)
    for name, (given, part) in inputs.items():
        flags = [*FLAGS, *map(str, given)]
        with pytest.raises(SystemExit) as caught:
            exits.run_script(lambda flags=flags: pack_images.main(flags))
        captured = capfd.readouterr()
        lines = captured.err.strip().splitlines()
        assert caught.value.code == 2, name
        assert len(lines) == 1 and part in lines[0], (name, captured.err)
        assert not (tmp_path / "out").exists(), name
    assert contents(packed) == before
    assert (tmp_path / "other" / "thesis.tex").read_text() == "precious"


def test_a_full_disk_is_seen_before_the_work(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    need = 15 * 3 * SIZE**2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need - 1))
    with pytest.raises(ValueError, match="make room"):
        pack_images.main([str(source), str(tmp_path / "out"), *FLAGS])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need))
    pack_images.main([str(source), str(tmp_path / "out"), *FLAGS])
