"""Tokens of a data set: what the model gives, whatever happens on the way."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import make_checkpoint
from PIL import Image
from processes import stop_by_ctrl_c, wait_for

import dataset
import exits
import tokens
from codec.codec import Codec
from dataset import ImageFolderDataset, build_dataset
from dataset.loaders import val_loader
from dataset.synthetic import SyntheticDataset
from metric import ImageMetrics, evaluate
from model import load_model
from scripts import make_tokens, pack_images

SIZE, BATCH = 16, 3
TWO = ("--flip", "--batch-size=6")  # two batches
CORRUPT = "cat/02.png"
FLAGS = ["--num-workers=0", f"--batch-size={BATCH}", f"--img-size={SIZE}", "--skip-corrupt"]
MODELS = {  # flags, type and shape of a row
    "layernorm": ([], "uint16", (4, 4, 2)),
    "image": (["--rfsq-statistics", "image"], "uint16", (4, 4, 2)),
    "fsq": (["--quantizer", "fsq", "--levels", "4", "4", "4", "4"], "uint8", (4, 4)),
    "lfq": (["--quantizer", "lfq", "--lfq-dim", "33"], "uint64", (4, 4)),
    "ema": (
        ["--quantizer", "ema", "--n-embed", "257", "--embed-dim", "4", "--ema-stages", "3"],
        "uint16",
        (4, 4, 3),
    ),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, (flags, _, _) in MODELS.items():
        make_checkpoint(folder / f"{name}.pt", "--channel", "16", *flags)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eleven images of three classes, one of which cannot be read."""
    root, pixels = tmp_path_factory.mktemp("images"), SyntheticDataset(SIZE, 0, 11)
    for i in range(11):
        folder = root / ("cat", "dog", "owl")[i // 4]
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels[i].permute(1, 2, 0).numpy()).save(folder / f"{i:02}.png")
    (root / CORRUPT).write_text("no image")
    return root


def make(images, checkpoint, out, *flags) -> dict:
    return make_tokens.main([str(images), f"--load={checkpoint}", f"--out={out}", *FLAGS, *flags])


@pytest.fixture(scope="module")
def made(images, checkpoints, tmp_path_factory):
    """Tokens with mirrors; tests must not change them."""
    out = tmp_path_factory.mktemp("made") / "deep" / "out"
    make(images, checkpoints / "layernorm.pt", out, "--flip")
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------------ what is written
@pytest.mark.parametrize("name", MODELS)
def test_rows_are_what_the_model_gives_and_decode_to_what_evaluate_measures(
    name, images, checkpoints, tmp_path
):
    _, dtype, shape = MODELS[name]
    index = make(images, checkpoints / f"{name}.pt", tmp_path, "--flip")
    model = load_model(checkpoints / f"{name}.pt")[0]
    folder = ImageFolderDataset(images, SIZE)
    names = [n for n in folder.names() if n != CORRUPT]
    originals = torch.stack([folder[i] for i in range(11) if folder.name(i) != CORRUPT])
    assert (index["count"], index["sources"], index["skipped"]) == (10, 11, [CORRUPT])
    assert (tmp_path / "names.txt").read_text().splitlines() == names
    for mirror, pixels in (("", originals), ("-flipped", originals.flip(-1))):
        stored = np.load(tmp_path / f"tokens{mirror}.npy", mmap_mode="r", allow_pickle=False)
        assert isinstance(stored, np.memmap) and stored.dtype == dtype
        assert stored.shape == (10, *shape)
        rows, side = torch.from_numpy(stored.astype(np.int64)), ()
        if name == "image":
            statistics = np.load(tmp_path / f"statistics{mirror}.npy")
            assert statistics.dtype == np.float16 and statistics.shape == (10, 2, 2, 4)
            side = (torch.from_numpy(statistics.astype(np.float32)),)
        else:
            assert not (tmp_path / f"statistics{mirror}.npy").exists()
        encoded = model.encode(pixels.float() / 255)
        assert torch.equal(encoded[0] if side else encoded, rows)
        assert not side or torch.equal(encoded[1], side[0])
        metrics = ImageMetrics(None)
        metrics.update(pixels.float() / 255, model.decode(rows, *side))
        measured = evaluate(model, [pixels], None, "cpu", final=False)
        assert metrics.compute()["psnr"] == measured["psnr"]
    assert not np.array_equal(np.load(tmp_path / "tokens.npy"), stored)  # the mirrored


def test_the_index_says_what_is_there(made, checkpoints):
    index = json.loads((made / "index.json").read_text())
    assert index["classes"] == ["cat", "dog", "owl"]
    labels = np.load(made / "labels.npy")
    assert labels.dtype == np.uint8 and labels.tolist() == [0] * 3 + [1] * 4 + [2] * 3
    assert (index["image_size"], index["f"], index["bits_per_position"]) == (SIZE, 4, 22.0)
    assert (index["codebook_sizes"], index["levels"]) == ([2048] * 2, [8, 8, 8, 4])
    assert index["fingerprint"] == Codec(checkpoints / "layernorm.pt").format.fingerprint.hex()
    files = ["index.json", "labels.npy", "names.txt", "tokens-flipped.npy", "tokens.npy"]
    assert sorted(contents(made)) == files


def test_packed_images_workers_and_batches_change_nothing(images, checkpoints, made, tmp_path):
    pack_images.main([str(images), str(tmp_path / "packed"), f"--img-size={SIZE}"])
    flags = ["--flip", "--num-workers=2"]
    for data, out in ((tmp_path / "packed", "a"), (images, "b")):
        index = make(data, checkpoints / "layernorm.pt", tmp_path / out, *flags)
        assert index["classes"] == ["cat", "dog", "owl"] and index["count"] == 10
        ours, wanted = contents(tmp_path / out), contents(made)
        del ours["index.json"], wanted["index.json"]
        assert ours == wanted


def test_a_flat_folder_and_generated_images_have_no_classes(
    images, checkpoints, tmp_path, monkeypatch
):
    monkeypatch.setattr(dataset, "SYNTHETIC_VAL", 5)
    index = make(images / "dog", checkpoints / "fsq.pt", tmp_path / "flat")
    assert index["classes"] is None and not (tmp_path / "flat" / "labels.npy").exists()
    assert (tmp_path / "flat" / "names.txt").read_text().split() == [
        f"{i:02}.png" for i in (4, 5, 6, 7)
    ]
    index = make("synthetic", checkpoints / "fsq.pt", tmp_path / "generated", "--batch-size=4")
    assert index["count"] == 5 and index["classes"] is None
    assert sorted(contents(tmp_path / "generated")) == ["index.json", "tokens.npy"]


def _share(rank: int, data: Path, checkpoint: Path, out: Path) -> None:
    place = f"file://{out.parent}/init"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    real, sizes = make_tokens.encode, []

    def encode(model, batch, flip):
        sizes.append(len(batch))
        return real(model, batch, flip)

    make_tokens.encode = encode
    index = make(data, checkpoint, out, "--flip")
    assert index["count"] == 10  # in both
    assert sizes == ([2, 3], [3, 2])[rank]  # batches 0 and 2, 1 and 3
    dist.destroy_process_group()


def test_two_processes_do_what_one_does(images, checkpoints, made, tmp_path, capfd):
    arguments = (images, checkpoints / "layernorm.pt", tmp_path / "out")
    torch.multiprocessing.start_processes(_share, arguments, nprocs=2, start_method="fork")
    assert contents(tmp_path / "out") == contents(made)
    said = capfd.readouterr().out
    assert said.count("is complete: 10 images, uint16 tokens of 4x4x2, 3 classes") == 1
    assert "images/s" in said and "1 images skipped, listed in" in said


def _share_the_rest(rank: int, data: Path, checkpoint: Path, out: Path) -> None:
    """Process 1 begins when process 0 has done its part: what is left is less by then."""
    place = f"file://{out.parent}/init"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    real = make_tokens.batch_loader

    def loader(*arguments, **options):
        if rank == 1:
            wait_for(lambda: (out.parent / "first").exists())
        yield from real(*arguments, **options)

    class Writer(tokens.TokenWriter):
        def __exit__(self, *error):
            super().__exit__(*error)
            (out.parent / "first").touch()

    make_tokens.batch_loader, tokens.TokenWriter = loader, Writer
    to_do = tokens.to_do
    tokens.to_do = lambda out: to_do(out) if rank == 0 else pytest.fail("a list of its own")
    assert make(data, checkpoint, out, "--flip")["count"] == 10
    dist.destroy_process_group()


@pytest.mark.parametrize("left", [[0, 3, 7], [4], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
def test_two_processes_finish_what_was_interrupted(images, checkpoints, made, tmp_path, left):
    """With one batch left, process 1 has nothing to do."""
    out, checkpoint = tmp_path / "out", checkpoints / "layernorm.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "finish", lambda *_: sys.exit("interrupted"))
        with pytest.raises(SystemExit):
            make(images, checkpoint, out, "--flip")
    marks = np.fromfile(out / tokens.DONE, np.uint8)
    marks[left] = tokens.TO_DO
    marks.tofile(out / tokens.DONE)
    index = json.loads((made / tokens.INDEX).read_text())
    with pytest.raises(ValueError, match=f"{len(left)} of 11 images are not done"):
        tokens.finish(out, index, None)
    arguments = (images, checkpoint, out)
    torch.multiprocessing.start_processes(_share_the_rest, arguments, nprocs=2, start_method="fork")
    assert contents(out) == contents(made)


@pytest.fixture
def interrupted(images, checkpoints, tmp_path, monkeypatch):
    """The folder of a run that did all images, and was stopped before it named the arrays."""
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "finish", lambda *_: sys.exit("interrupted"))
        with pytest.raises(SystemExit):
            make(images, checkpoints / "layernorm.pt", tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(
    "name, change",
    [
        ("done.part", lambda data: data[:5]),
        ("done.part", lambda data: data + b"\1"),
        ("done.part", lambda data: b"\7" * len(data)),
        ("done.part", None),
        ("tokens.npy.part", lambda data: data[:200]),
        ("tokens.npy.part", None),
        ("settings.part", lambda data: b"[" * 10**5),
    ],
)
def test_a_damaged_interrupted_run_is_refused(name, change, interrupted, images, checkpoints):
    file = interrupted / name
    data = file.read_bytes()
    file.unlink()
    if change:
        file.write_bytes(change(data))
    with pytest.raises(ValueError, match=r"damaged: |^the files of an interrupted run .* damaged"):
        make(images, checkpoints / "layernorm.pt", interrupted)
    assert not (interrupted / tokens.INDEX).exists()


@pytest.mark.parametrize("name", [tokens.NAMES, tokens.LABELS])
def test_names_and_labels_are_those_of_the_index(name, made, images, checkpoints, tmp_path):
    out = Path(shutil.copytree(made, tmp_path / "out"))
    make(images, checkpoints / "layernorm.pt", out, "--flip")
    (out / name).write_bytes((out / name).read_bytes()[:-1])
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{name} is missing or is not that of the index"):
            make(images, checkpoints / "layernorm.pt", out, "--flip")
        (out / name).unlink(missing_ok=True)


def test_one_command_at_a_time(images, checkpoints, tmp_path):
    checkpoint, out = checkpoints / "layernorm.pt", tmp_path / "out"
    with tokens.held(out), pytest.raises(ValueError, match="another process is writing"):
        make(images, checkpoint, out)
    assert not list(out.iterdir())


def test_hidden_files_of_others_stay(images, checkpoints, tmp_path):
    (tmp_path / ".thesis.rfsq-tmp").write_text("of a run here")
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="holds other files"):
        make(images, checkpoints / "layernorm.pt", tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


# ------------------------------------------------------------------ kills
def _make_and_die(images, checkpoint, out, call) -> None:
    """At the given call that changes what is on the disk, the process is killed before it."""
    calls = iter(range(1000))

    def deadly(real):
        def function(*given, **options):
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **options)

        return function

    for name in ("replace", "fsync", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))
    make_tokens.SECONDS_A_FLUSH = 0
    make(images, checkpoint, out, *TWO)


def test_a_kill_at_any_write_leaves_what_the_same_command_finishes(
    images, checkpoints, tmp_path, capfd
):
    checkpoint, context = checkpoints / "layernorm.pt", multiprocessing.get_context("fork")
    make(images, checkpoint, tmp_path / "whole", *TWO)
    wanted, continued = contents(tmp_path / "whole"), 0
    for call in range(100):
        out = tmp_path / f"{call}"
        dying = context.Process(target=_make_and_die, args=(images, checkpoint, out, call))
        dying.start()
        dying.join()
        if dying.exitcode == 0:
            break
        assert dying.exitcode == -signal.SIGKILL
        left = contents(out)
        for name in left.keys() & wanted.keys():  # nothing that looks whole is not
            assert left[name] == wanted[name], (call, name)
        capfd.readouterr()
        make(images, checkpoint, out, *TWO)
        continued += "continues after" in capfd.readouterr().out
        assert contents(out) == wanted, call
    # 2 batches flush three files each; both arrays, labels, names and the index follow.
    assert call > 20 and continued > 10


def test_an_interrupted_run_says_how_it_goes_on(images, checkpoints, tmp_path, monkeypatch, capfd):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokens.TokenWriter, "write", stop)
    model = f"--load={checkpoints / 'fsq.pt'}"
    stop_by_ctrl_c("make_tokens", str(images), model, f"--out={tmp_path / 'out'}", *FLAGS)
    line = "make_tokens.py: interrupted; to go on: the same command\n"
    assert capfd.readouterr().err == line


def test_a_second_run_does_nothing(images, checkpoints, made, capfd):
    before = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    make(images, checkpoints / "layernorm.pt", made, "--flip")
    assert {path.name: path.stat().st_mtime_ns for path in made.iterdir()} == before
    assert "is complete" in capfd.readouterr().out


def test_an_array_that_is_cut_or_missing_is_named(images, checkpoints, made, tmp_path):
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    os.truncate(copy / "tokens-flipped.npy", 200)
    with pytest.raises(ValueError, match=r"flipped\.npy is missing or has not the 768 bytes"):
        make(images, checkpoints / "layernorm.pt", copy, "--flip")
    (copy / "tokens.npy").unlink()
    with pytest.raises(ValueError, match=r"tokens\.npy is missing"):
        make(images, checkpoints / "layernorm.pt", copy, "--flip")


def test_what_was_done_before_an_error_is_kept(images, checkpoints, tmp_path, capfd):
    data = Path(shutil.copytree(images, tmp_path / "data"))
    flags = [str(data), f"--load={checkpoints / 'fsq.pt'}", f"--out={tmp_path / 'out'}"]
    flags += FLAGS[:-1]  # without --skip-corrupt
    shutil.move(data / CORRUPT, data / "owl" / "09.png")  # now number 8 of 10
    with pytest.raises(ValueError, match=r"cannot read image .*owl/09\.png"):
        make_tokens.main(flags)
    assert tokens.to_do(tmp_path / "out").tolist() == [6, 7, 8, 9]
    # Repaired, it has another size: another data set.
    Image.new("RGB", (SIZE, SIZE)).save(data / "owl" / "09.png")
    with pytest.raises(ValueError, match="tokens of another images"):
        make_tokens.main(flags)


# ------------------------------------------------------------------ bad input
def test_bad_input_is_one_line_and_code_2(images, checkpoints, made, tmp_path, capfd):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("no image")
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "index.json").write_text("[1]")
    (tmp_path / "lines").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "lines" / "a\nb.png")
    before, new, once = contents(made), tmp_path / "new", tmp_path / "once"
    make(images, checkpoints / "layernorm.pt", once)
    capfd.readouterr()
    for data, model, out, flags, part in (
        (tmp_path / "nowhere", "fsq", new, [], "does not exist"),
        (tmp_path / "lines", "fsq", new, [], "holds a line break"),
        (images, "none", new, [], "none.pt does not exist"),
        (images, "fsq", new, ["--img-size=18"], "no multiple of 4, as this model needs"),
        (images, "fsq", made, ["--flip"], "tokens of another fingerprint"),
        (images, "layernorm", made, [], "made with --flip: give --flip, give another --out, or"),
        (images, "layernorm", once, ["--flip"], "made without --flip: leave out --flip, give"),
        (images, "layernorm", made, ["--flip", "--img-size=32"], "another image size (16, not 32)"),
        (images / "owl", "layernorm", made, ["--flip"], "tokens of another sources (11, not 3)"),
        (images, "fsq", tmp_path / "other", [], "holds other files ('thesis.tex')"),
        (images, "fsq", tmp_path / "file", [], "cannot be made"),
        (images, "fsq", tmp_path / "index", [], "index.json is not of make_tokens.py"),
        (tmp_path / "bad", "fsq", tmp_path / "none", [], "none of the 1 images can be read"),
    ):
        with pytest.raises(SystemExit) as caught:
            exits.run_script(
                lambda a=data, b=checkpoints / f"{model}.pt", c=out, d=flags: make(a, b, c, *d)
            )
        assert caught.value.code == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert part in line, line
        assert not new.exists()
    assert contents(made) == before


def test_a_full_disk_is_seen_before_the_work(images, checkpoints, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    need = 11 * 2 * 4 * 4 * 2 * 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need - 1))
    with pytest.raises(ValueError, match="make room"):
        make(images, checkpoints / "layernorm.pt", tmp_path / "out", "--flip")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need))
    make(images, checkpoints / "layernorm.pt", tmp_path / "out", "--flip")


@pytest.mark.parametrize("begun", [False, True])
def test_a_disk_that_fills_up_is_one_line_and_the_same_command_continues(
    begun, images, checkpoints, made, tmp_path, monkeypatch
):
    """A limit on the size of files stands for a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    begin, command = tokens.begin, (images, checkpoints / "layernorm.pt", tmp_path, "--flip")

    def begin_and_fill(*given):
        index = begin(*given) if begun else None
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
        return index if begun else begin(*given)

    with monkeypatch.context() as patch:
        patch.setattr(tokens, "begin", begin_and_fill)
        try:
            with pytest.raises(ValueError, match=r"cannot be written \(File too large\)") as caught:
                make(*command)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{tmp_path}/tokens" in str(caught.value) and "same command" in str(caught.value)
    make(*command)
    assert contents(tmp_path) == contents(made)


def test_evaluate_sees_the_same_images_in_the_same_order(images, checkpoints, made):
    """Row i is image i of the loader of evaluate.py."""
    folder = build_dataset(images, SIZE, 0, train=False, skip_corrupt=True)
    model, stored = load_model(checkpoints / "layernorm.pt")[0], np.load(made / "tokens.npy")
    rows = [model.encode(batch.float() / 255) for batch in val_loader(folder, BATCH)]
    assert np.array_equal(torch.cat(rows).numpy(), stored)


def test_values_that_the_type_does_not_hold_are_refused(tmp_path):
    settings = {"sources": 3, "arrays": {"tokens.npy": {"dtype": "|u1", "shape": (2, 2)}}}
    assert tokens.begin(tmp_path, settings) is None
    assert tokens.begin(tmp_path, settings) is None  # a tuple is a list in the file
    with tokens.TokenWriter(tmp_path, settings) as writer:
        for wrong in (256, -1):
            rows = {"tokens.npy": np.full((1, 2, 2), wrong)}
            with pytest.raises(ValueError, match=f"holds uint8, but the values run from {wrong}"):
                writer.write(0, np.ones(1, bool), rows)
        with pytest.raises(ValueError, match="rows 2 to 3 were given, of 3 images"):
            writer.write(2, np.ones(2, bool), {"tokens.npy": np.zeros((2, 2, 2), int)})
    assert len(tokens.to_do(tmp_path)) == 3


def test_rows_are_left_out_in_every_block(monkeypatch, tmp_path):
    """A large array is copied in blocks: here of two rows of 3 x 2 bytes."""
    monkeypatch.setattr(tokens, "BLOCK", 2 * 3 * 2)
    settings = {"sources": 7, "arrays": {"tokens.npy": {"dtype": "uint16", "shape": [3]}}}
    tokens.begin(tmp_path, settings)
    kept, rows = np.array([1, 1, 0, 1, 0, 0, 1], bool), np.arange(12).reshape(4, 3)
    with tokens.TokenWriter(tmp_path, settings) as writer:
        writer.write(0, kept, {"tokens.npy": rows})
    index = tokens.finish(tmp_path, settings, [f"{i}.png" for i in range(7)])
    assert np.array_equal(np.load(tmp_path / "tokens.npy"), rows)
    assert (index["count"], index["skipped"]) == (4, ["2.png", "4.png", "5.png"])


@pytest.mark.parametrize("classes, dtype", [(256, "uint8"), (257, "uint16")])
def test_labels_of_many_classes(classes, dtype, tmp_path):
    settings = {"sources": classes, "arrays": {"tokens.npy": {"dtype": "uint8", "shape": [1]}}}
    tokens.begin(tmp_path, settings)
    with tokens.TokenWriter(tmp_path, settings) as writer:
        writer.write(0, np.ones(classes, bool), {"tokens.npy": np.zeros((classes, 1), int)})
    tokens.finish(tmp_path, settings, [f"{i:03}/a.png" for i in range(classes)])
    labels = np.load(tmp_path / "labels.npy")
    assert labels.dtype == dtype and labels.tolist() == list(range(classes))
    assert tokens.begin(tmp_path, settings)["count"] == classes  # the files fit the index


@pytest.mark.parametrize("broken", [{"count": None}, {"skipped": -1}, {"classes": 5}], ids=str)
def test_a_damaged_index_is_one_line(broken, tmp_path):
    settings = {"sources": 1, "arrays": {"tokens.npy": {"dtype": "|u1", "shape": [2]}}}
    tokens.begin(tmp_path, settings)
    with tokens.TokenWriter(tmp_path, settings) as writer:
        writer.write(0, np.ones(1, bool), {"tokens.npy": np.zeros((1, 2), int)})
    index = tokens.finish(tmp_path, settings, None)
    (tmp_path / "index.json").write_text(json.dumps({**index, **broken}))
    with pytest.raises(ValueError, match=r"index.json is damaged: give another --out"):
        tokens.begin(tmp_path, settings)
