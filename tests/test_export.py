"""Exports: the same model bit for bit, read without executing anything, and loud about damage."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import make_checkpoint
from test_report import make_run

import exits
from arguments import get_args
from checkpoint import Damaged, load_checkpoint, save_export
from codec.codec import Codec
from model import VQVAE, load_model, load_weights
from scripts import evaluate, export

SMALL = ["--channel", "16", "--img-size", "32", "--name", "small"]
MODELS = {
    "layernorm": [],
    "image": ["--rfsq-statistics", "image"],
    "geometric": ["--rfsq-strategy", "geometric", "--rfsq-slope", "0.7", "--network", "dct"],
    "fsq": ["--quantizer", "fsq", "--levels", "5", "3"],
    "lfq": ["--quantizer", "lfq", "--lfq-dim", "6"],
    "ema": ["--quantizer", "ema", "--n-embed", "24", "--embed-dim", "4", "--ema-stages", "2"],
}


def make_export(folder: Path, name: str = "layernorm") -> Path:
    make_checkpoint(folder / "last.pt", *MODELS[name], *SMALL)
    return export.main(["--load", str(folder / "last.pt"), "--out", str(folder / "out" / name)])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export; tests must not change it."""
    return make_export(tmp_path_factory.mktemp("exported"))


@pytest.fixture
def copy(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def error_of(path: Path | str) -> str:
    with pytest.raises(ValueError) as caught:
        load_model(path)
    assert type(caught.value) in (ValueError, Damaged) and "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------ what is written
@pytest.mark.parametrize("name", MODELS)
def test_the_round_trip_is_exact(name, tmp_path):
    out = make_export(tmp_path, name)
    before, flags, _ = load_model(tmp_path / "last.pt")
    after, args, saved = load_model(out)
    assert repr(after) == repr(before) and not after.training
    weights, plain = before.state_dict(), safetensors.torch.load_file(out / "model.safetensors")
    assert weights.keys() == after.state_dict().keys() == plain.keys()
    for key, value in weights.items():
        for other in (after.state_dict()[key], plain[key]):
            assert other.dtype == value.dtype and torch.equal(other, value), key
    assert (args.name, args.img_size, saved["step"]) == ("small", 32, 2)
    # Files of the checkpoint and of the export are exchangeable.
    assert Codec(out).format.fingerprint == Codec(tmp_path / "last.pt").format.fingerprint
    # An export of the export is the same, and its weights fit a model of the same flags.
    again = export.main(["--load", str(out), "--out", str(tmp_path / "again")])
    for file in ("model.safetensors", "config.json"):
        assert (again / file).read_bytes() == (out / file).read_bytes()
    model = VQVAE(flags)
    load_weights(model, flags, out)
    assert torch.equal(next(model.parameters()), next(before.parameters()))


def test_a_host_that_fills_a_meta_model_gets_the_same_tokens(exported):
    """How `from_pretrained` of a host that wraps the model reads the two files."""
    config = json.loads((exported / "config.json").read_text())
    args = get_args([])
    vars(args).update(config["architecture"])
    with torch.device("meta"):
        model = VQVAE(args)
    model = model.to_empty(device="cpu").eval()
    model.load_state_dict(safetensors.torch.load_file(exported / "model.safetensors"), assign=True)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model.encode(images), load_model(exported)[0].encode(images))


def test_the_config_holds_the_architecture_and_no_paths(exported):
    config = json.loads((exported / "config.json").read_text())
    assert config["architecture"].keys() == set(export.architecture_flags())
    assert config["training"] == {"step": 2, "img_size": 32, "name": "small", "lpips_net": "vgg"}
    assert str(exported) not in (exported / "config.json").read_text()
    assert sorted(p.name for p in exported.iterdir()) == [
        *("README.md", "config.json", "model.safetensors")
    ]


def test_the_card_has_the_results_of_its_step_alone(exported, tmp_path):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\ntags:") and "# small\n" in card and "Not measured." in card
    assert "| bits per position | 22 |" in card and "| `--channel` | 16 |" in card
    assert "--rfsq-stages" in card and "--svq-bits" not in card  # flags of its own quantizer
    assert "--pairs" not in card and "False" not in card  # nor a switch that is off
    make_checkpoint(tmp_path / "last.pt", *SMALL)
    command = "python train.py --save '/a b' --x --overwrite --resume=/c"
    args = load_checkpoint(tmp_path / "last.pt")["args"]
    run = make_run(tmp_path / "run", images_seen=12_000, args=args)
    results = json.loads((run / "results.json").read_text()) | {
        "environment": {"command": command, "commit": "0b", "device": "a CPU"},
        "segments": [{"commit": "0a"}, {"commit": "0a"}, {"commit": None}],
    }
    (tmp_path / "results.txt").write_text("PSNR 31.4\n")
    for steps, measured in ((2, True), (3, False)):
        (tmp_path / "results.json").write_text(json.dumps({**results, "steps": steps}))
        out = tmp_path / f"{steps}"
        export.main(["--load", str(tmp_path / "last.pt"), "--out", str(out)])
        text = (out / "README.md").read_text()
        assert ("PSNR 31.4" in text) == ("python train.py --x\n" in text) == measured
        assert ("Not measured." in text) != measured
        seen = "Training saw 12,000 images, drawn from the 12,303 of `train`;"
        seen += " the table is of the images of `val`."
        assert (f"{seen} Commit 0a, unknown; command:" in text) == measured


def test_the_card_names_the_licence(exported, tmp_path, capsys):
    flags = ["--load", str(exported), "--out", str(tmp_path / "out")]
    export.main([*flags, "--license", "cc-by-4.0"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\ntags:\n- image-tokenizer\n- rfsq\n---\n")
    for bad in ("", "MIT licence", "mit\nx: 1", "-mit"):
        with pytest.raises(SystemExit, match="2"):
            export.main([*flags, f"--license={bad}"])
        assert "is not an identifier such as mit" in capsys.readouterr().err


def test_the_card_has_no_results_of_another_model(tmp_path):
    """A checkpoint that was copied into the folder of another run, of as many steps."""
    make_checkpoint(tmp_path / "last.pt", *SMALL)
    args = load_checkpoint(tmp_path / "last.pt")["args"]
    for flag, measured in (("seed", True), ("rfsq_strategy", False)):
        run = make_run(tmp_path / flag, steps=2, args={**args, flag: "other"})
        (run / "results.txt").write_text("PSNR 31.4\n")
        shutil.copy(tmp_path / "last.pt", run)
        out = export.main(["--load", str(run / "last.pt"), "--out", str(run / "out")])
        assert ("PSNR 31.4" in (out / "README.md").read_text()) == measured


def test_the_card_counts_statistics_and_says_what_was_generated(tmp_path):
    make_checkpoint(tmp_path / "last.pt", *MODELS["image"], *SMALL)
    args = load_checkpoint(tmp_path / "last.pt")["args"]
    run = make_run(tmp_path / "run", steps=2, args=args, train_data="synthetic", images_seen=8)
    (run / "results.txt").write_text("a table")
    shutil.copy(tmp_path / "last.pt", run)
    out = export.main(["--load", str(run / "last.pt"), "--out", str(tmp_path / "out")])
    text = (out / "README.md").read_text()
    assert "| bits per position | 22 |\n| bits per image, beside these | 256 |" in text
    seen = "Training saw 8 images, all of them generated; the table is of the images of `val`."
    assert seen in text
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {"images": torch.rand(2, 3, 32, 32)}
    exec(block.replace("FOLDER", str(out)), names)
    assert names["images"].shape == (2, 3, 32, 32)


# ------------------------------------------------------------------ what is refused
def rewrite(folder: Path, **changes) -> None:
    """Change entries of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in {**config, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder: Path, change) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(change(tensors), folder / "model.safetensors")


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def other_flags(folder: Path) -> dict:
    architecture = json.loads((folder / "config.json").read_text())["architecture"]
    return {"architecture": {**architecture, "rfsq_strategy": "none"}}


DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), "is a folder without config.json"),
    "no json": (lambda f: (f / "config.json").write_text("[1"), "config.json is not of this proj"),
    "deep": (lambda f: (f / "config.json").write_text("[" * 10**5), "config.json is not of this"),
    "somebody's": (lambda f: (f / "config.json").write_text('{"a": 1}'), "is not of this project"),
    "newer": (lambda f: rewrite(f, version=2), "has version 2 .* up to 1: use the version"),
    "missing key": (lambda f: rewrite(f, checksum=None), "must hold .*checksum.* nothing else"),
    "unknown key": (lambda f: rewrite(f, x=1), "must hold .* nothing else"),
    "flags": (lambda f: rewrite(f, architecture=3), "must hold"),
    "other flags": (lambda f: rewrite(f, **other_flags(f)), "damaged .its checksum is wrong"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "cut": (lambda f: os.truncate(f / "model.safetensors", 5000), "tensors cannot be read"),
    "empty": (lambda f: os.truncate(f / "model.safetensors", 0), "tensors cannot be read"),
    "a pipe": (
        lambda f: (f / "model.safetensors").unlink() or os.mkfifo(f / "model.safetensors"),
        "model.safetensors is missing",
    ),
    "float8": (
        lambda f: change_weights(f, lambda t: {k: v.to(torch.float8_e5m2) for k, v in t.items()}),
        "tensors cannot be read",
    ),
    "a bit": (flip_a_bit, "is damaged .its checksum is wrong"),
    "shape": (
        lambda f: change_weights(f, lambda t: {k: v[None] for k, v in t.items()}),
        "is damaged .its checksum is wrong",
    ),
}


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_full_disk_leaves_the_model_that_was_there(file, exported, tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "last.pt", *SMALL, "--channel=24")
    out = shutil.copytree(exported, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fsync(descriptor):
        if file in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ValueError, match=f"{file} cannot be written .*untouched"):
        export.main(["--load", str(tmp_path / "last.pt"), "--out", str(out), "--force"])
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_line(kind, copy):
    change, message = DAMAGE[kind]
    change(copy)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(copy)
    assert str(copy) in error_of(copy)


def test_a_checkpoint_of_float8_is_one_line(tmp_path):
    model = {"x": torch.ones(2).to(torch.float8_e5m2)}
    torch.save({"format": 1, "model": model, "args": {}}, tmp_path / "last.pt")
    with pytest.raises(Damaged, match="is not a checkpoint of this project"):
        load_checkpoint(tmp_path / "last.pt")


def test_weights_of_other_names_or_shapes_are_one_line(exported, tmp_path):
    """With a checksum that is right: somebody else's writer, or another architecture."""
    model = load_model(exported)[0]
    flags = json.loads((exported / "config.json").read_text())["architecture"]
    weights, name = model.state_dict(), "decoder.layers.0.bias"
    missing = {key: value for key, value in weights.items() if key != name}
    for named, tensors in (
        (name, missing),
        ("extra", weights | {"extra": torch.zeros(1)}),
        (name, weights | {name: torch.zeros(3)}),
    ):
        save_export(tmp_path, tensors, flags, {"step": 2})
        assert "do not fit the model" in error_of(tmp_path) and named in error_of(tmp_path)
    save_export(tmp_path, weights, {**flags, "new_flag": 1}, {"step": 2})
    assert "--new-flag, which this version does not know" in error_of(tmp_path)
    for flag, value in (("channel", "wide"), ("img_size", 10**9)):
        channel = {flag: value} if flag == "channel" else {}
        save_export(tmp_path, weights, {**flags, **channel}, {flag: value})
        assert "cannot be" in error_of(tmp_path)
    weights[name] = torch.full_like(weights[name], torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        save_export(tmp_path, weights, flags, {})


class Trap:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_nothing_is_executed(copy, tmp_path):
    for name in ("model.safetensors", "config.json"):
        (copy / name).write_bytes(pickle.dumps(Trap(tmp_path / "made")))
        error_of(copy)
    assert not (tmp_path / "made").exists()


def test_errors_of_the_scripts_are_one_line_and_code_2(exported, tmp_path, capfd):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("")
    load = ["--load", str(exported), "--out"]
    for main, flags, part in (
        (evaluate.main, ["--load", str(tmp_path)], "is a folder without config.json"),
        (export.main, [*load, str(exported)], "holds a model: .* or --force"),
        (export.main, [*load, str(tmp_path / "other")], "holds other files .'thesis.tex'"),
        (export.main, [*load, str(tmp_path / "file")], "cannot be made"),
        (export.main, ["--load", "none.pt", "--out", str(tmp_path / "new")], "does not exist"),
    ):
        with pytest.raises(SystemExit) as caught:
            exits.run_script(lambda main=main, flags=flags: main(flags))
        assert caught.value.code == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert re.search(part, line), line
    assert not (tmp_path / "new").exists()
    assert export.main([*load, str(tmp_path / "b")]) == tmp_path / "b"
    assert export.main([*load, str(tmp_path / "b"), "--force"]) == tmp_path / "b"


def test_a_run_folder_gives_its_last_checkpoint(copy, tmp_path):
    for name, width in (("last", 16), ("best", 32)):
        make_checkpoint(tmp_path / f"{name}.pt", "--channel", str(width))
    wanted = load_checkpoint(tmp_path / "last.pt")
    assert load_checkpoint(tmp_path)["checksum"] == wanted["checksum"]
    shutil.copy(tmp_path / "last.pt", copy)  # an export stays one
    assert load_model(copy).args.name == "small"
    (tmp_path / "last.pt").write_bytes(b"cut")
    assert "last.pt is not a checkpoint of this project" in error_of(tmp_path)


# ------------------------------------------------------------------ Hugging Face
def test_a_repository_is_fetched(exported, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, sorted(allow_patterns)))
        if name != "owner/model":
            raise OSError("404 Client Error:\nnot found")
        return str(exported)

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert load_model("owner/model")[1].name == "small"
    assert asked == [("owner/model", ["config.json", "model.safetensors"])]
    assert "owner/none does not exist here" in error_of("owner/none")
    assert "404 Client Error: not found" in error_of("owner/none")
    asked.clear()
    (tmp_path / "runs").mkdir()
    for no_name in ("runs/typo", "owner/last.pt", "a/b/c", "model", "../x/y"):
        assert f"checkpoint {no_name} does not exist" in error_of(no_name)
    assert not asked
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # not installed
    assert "pip install '.[hub]'" in error_of("owner/model")


def test_a_name_that_is_not_unicode_is_escaped_in_the_card(tmp_path):
    make_checkpoint(tmp_path / "last.pt", "--channel=16", "--name=caf\udce9")
    out = export.main(["--load", str(tmp_path / "last.pt"), "--out", str(tmp_path / "exported")])
    assert "# caf\\udce9" in (out / "README.md").read_text()
    assert load_model(out).args.name == "caf\udce9"
