"""Checkpoints and exports, written whole and read safely; random states."""

from __future__ import annotations

import hashlib
import random
import re
import zipfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from files import is_of_the_disk, parse_json, reason_of, write_json, write_whole

CHECKPOINT_FORMAT = 1
EXPORT_FORMAT, EXPORT_VERSION = "rfsq model", 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"  # the files of an export
CONFIG_KEYS = {"format", "version", "architecture", "training", "checksum"}
MAX_CONFIG = 2**20  # bytes
ENTROPY_MODEL = "entropy_model"  # the key of what `compress.py fit` adds to a checkpoint


class NotFinite(ValueError):
    """A number that is NaN or infinite where it would be kept or reported."""


class Damaged(ValueError):
    """A file does not hold what was written to it: an older checkpoint may take its place."""


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint (tensors and plain types alone) with its checksum, whole or not at all.

    Raises:
        NotFinite: one of its tensors holds a NaN or an infinity; nothing is written then.
    """
    state = {"format": CHECKPOINT_FORMAT, **state}
    state["checksum"] = _checksum(state)
    write_whole(path, lambda file: torch.save(state, file))


def _checksum(state: dict) -> str:
    """SHA-256 of everything in a checkpoint but its checksum; NotFinite, if a tensor is not."""
    digest = hashlib.sha256()

    def add(value, name: str = "") -> None:
        if isinstance(value, torch.Tensor):
            if not value.isfinite().all():
                raise NotFinite(f"{name} is not finite")
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            if value.numel():
                flat = value.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key, entry in value.items():
                digest.update(f"{key!r}:".encode())
                add(entry, f"{name} {key}".strip())
        elif isinstance(value, list | tuple):
            digest.update(f"{len(value)}[".encode())
            for entry in value:
                add(entry, name)
        else:
            digest.update(f"{value!r},".encode())

    add({key: value for key, value in state.items() if key != "checksum"})
    return digest.hexdigest()


def _check_plain(state, size: int) -> None:
    """Raises ValueError for what `save_checkpoint` never writes, and what could exhaust memory.

    `size`: of the file, in bytes. A list that contains another one many times, which contains ...,
    would have more entries, and take for ever.
    """
    left, seen = [(state, 0)], 0
    while left:
        value, depth = left.pop()
        seen += 1
        if depth > 32 or seen > size:  # also for a list that contains itself
            raise ValueError("nested too deeply")
        if type(value) is torch.Tensor:
            plain = value.layout == torch.strided and value.device.type == "cpu"
            plain &= not (value.is_quantized or value.is_complex() or value.is_neg())
            plain &= value.is_floating_point() <= (value.itemsize > 1)  # float8 hardly computes
            if not plain or value.requires_grad or value.numel() > value.untyped_storage().nbytes():
                raise ValueError("not a plain tensor")
        elif isinstance(value, dict):
            left += [(key, 32) for key in value]
            left += [(entry, depth + 1) for entry in value.values()]
        elif isinstance(value, list | tuple):
            left += [(entry, depth + 1) for entry in value]
        elif not (value is None or isinstance(value, bool | int | float | str)):
            raise ValueError("neither a tensor nor of a plain type")


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint or an export onto the CPU. Reading never executes anything from a file.

    Args:
        path: a file that `save_checkpoint` wrote, a folder that `save_export` wrote, or the name of
            a Hugging Face repository with the files of such a folder.

    Returns:
        'model' (tensors by name), 'args' (flags by name), 'step', and of a checkpoint all else that
        it holds. An export has the flags of the architecture and of `training` alone, and
        'architecture', the names of the former.

    Raises:
        Damaged: one line, if it does not hold what was written, or is not of this project.
        ValueError: one line, if there is no such file, it cannot be read, or is of a newer version.
    """
    path = Path(path)
    if path.is_dir():
        state = _read_export(path)
    elif path.is_file():
        state = _read_checkpoint(path)
    else:
        state = _read_export(_download(str(path)))
    try:
        damage = "its checksum is wrong" if state.get("checksum") != _checksum(state) else None
    except NotFinite as error:
        damage = str(error)
    if damage:
        raise Damaged(f"{path} is damaged ({damage}): use an older checkpoint, or copy it again")
    return state


def _read_checkpoint(path: Path) -> dict:
    wrong = f"{path} is not a checkpoint of this project, or is damaged: give a last.pt or best.pt"
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or sum(e.file_size for e in entries) > path.stat().st_size:
                raise ValueError("a small file could unpack to a large one")
        state = torch.load(path, map_location="cpu", weights_only=True)
        _check_plain(state, path.stat().st_size)
    except Exception as error:  # unpickling garbage can raise nearly anything
        if is_of_the_disk(error):
            raise ValueError(
                f"{path} cannot be read ({reason_of(error)}): try again, or move it away to go on "
                "without it"
            ) from error
        raise Damaged(wrong) from error
    if not isinstance(state, dict) or not {"format", "model", "args"} <= state.keys():
        raise Damaged(wrong)
    weights = state["model"].items() if isinstance(state["model"], dict) else [(None, None)]
    if not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in weights):
        raise Damaged(wrong)
    if type(state["format"]) is not int or not _is_step(state.get("step")):
        raise Damaged(wrong)
    if state["format"] != CHECKPOINT_FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {state['format']}, this version reads "
            f"{CHECKPOINT_FORMAT}: use the version of the project that wrote it"
        )
    return state


def _is_step(value) -> bool:
    return value is None or (type(value) is int and value >= 0)


def save_export(folder: Path, model: dict, architecture: dict, training: dict) -> None:
    """Write the weights of a model as `model.safetensors`, and its flags as `config.json`.

    Args:
        folder: exists.
        model: the tensors of a state dict.
        architecture: the flags that decide what the weights mean.
        training: 'step', and further flags that `load_checkpoint` is to return.

    Raises:
        NotFinite: a tensor holds a NaN or an infinity; nothing is written then.
    """
    state = _export_state(model, architecture, training)
    config = {"format": EXPORT_FORMAT, "version": EXPORT_VERSION, "architecture": architecture}
    config |= {"training": training, "checksum": _checksum(state)}
    # Copies: safetensors refuses tensors that share memory.
    tensors = {name: tensor.clone().contiguous() for name, tensor in state["model"].items()}
    data = safetensors.torch.save(tensors, metadata={"format": "pt"})
    write_whole(folder / WEIGHTS, lambda file: file.write(data))
    write_json(folder / CONFIG, config)


def _export_state(model: dict, architecture: dict, training: dict) -> dict:
    """What `load_checkpoint` returns of an export, without its checksum; order does not matter."""
    flags = {name: value for name, value in training.items() if name != "step"}
    return {
        "format": CHECKPOINT_FORMAT,
        "step": training.get("step"),
        "args": dict(sorted({**flags, **architecture}.items())),
        "architecture": sorted(architecture),
        "model": {name: model[name].detach().cpu() for name in sorted(model)},
    }


def _read_export(folder: Path) -> dict:
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"checkpoint {folder} is a folder without {CONFIG}: give a file such as "
            "runs/NAME/last.pt, or a folder that scripts/export.py wrote"
        )
    damaged = "copy the folder again, or run scripts/export.py again"
    try:
        with open(folder / CONFIG, "rb") as file:
            config = parse_json(file.read(MAX_CONFIG))
        ours, version = config["format"] == EXPORT_FORMAT, config["version"]
        newer = ours and type(version) is int and version > EXPORT_VERSION
        sound = ours and version == EXPORT_VERSION and config.keys() == CONFIG_KEYS
        sound = sound and all(isinstance(config[key], dict) for key in ("architecture", "training"))
        sound = sound and _is_step(config["training"].get("step"))
        _check_plain(config, MAX_CONFIG)
    except Exception as error:  # any entry may be of any type
        raise ValueError(f"{folder / CONFIG} is not of this project: {damaged}") from error
    if newer:
        raise ValueError(
            f"{folder / CONFIG} has version {version} of the format, this code reads up to "
            f"{EXPORT_VERSION}: use the version of the project that wrote it"
        )
    if not sound:
        keys = ", ".join(sorted(CONFIG_KEYS))
        raise ValueError(
            f"{folder / CONFIG} must hold {keys}, and nothing else, in version {EXPORT_VERSION} of "
            f"the format '{EXPORT_FORMAT}': {damaged}"
        )
    try:
        if not (folder / WEIGHTS).is_file():  # reading a pipe would wait for ever
            raise FileNotFoundError
        model = safetensors.torch.load((folder / WEIGHTS).read_bytes())
        _check_plain(model, (folder / WEIGHTS).stat().st_size)
    except Exception as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read"
        raise ValueError(f"{folder / WEIGHTS} {reason}: {damaged}") from error
    state = _export_state(model, config["architecture"], config["training"])
    return {**state, "checksum": config["checksum"]}


def _download(name: str) -> Path:
    """The folder into which the files of a Hugging Face repository, `owner/name`, are fetched."""
    absent = f"checkpoint {name} does not exist: give a file such as runs/NAME/last.pt, or a folder"
    a_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not name.endswith(".pt")
    if not a_name or Path(name).parent.is_dir():
        raise ValueError(f"{absent} that scripts/export.py wrote")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"{absent}; if it is a Hugging Face repository, first: pip install '.[hub]'"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # of the connection, of the server, of the name
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name} does not exist here, and not as a Hugging Face repository that can be "
            f"fetched ({reason}): give another name, or a folder"
        ) from error


def random_states() -> dict:
    """The states of all random number generators, in plain types and tensors."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        # Of this process's own device: all processes have the same.
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict) -> None:
    """Put back what `random_states` gave."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and states["cuda"]:
        torch.cuda.set_rng_state(states["cuda"][0])
