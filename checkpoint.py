"""Checkpoints and exports, written whole and read safely; random states."""

from __future__ import annotations

import hashlib
import pickletools
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
LAST = "last.pt"  # the newest checkpoint of a run folder
CONFIG_KEYS = {"format", "version", "architecture", "training", "checksum"}
MAX_CONFIG = 2**20  # bytes
# What `torch.save` names for tensors and dictionaries.
PICKLED = re.compile(r"torch \w+Storage|torch\._utils _rebuild_tensor_v2|collections OrderedDict")
ENTROPY_MODEL = "entropy_model"  # a key that `compress.py fit` adds to a checkpoint


class NotFinite(ValueError):
    """A number that would be saved or reported is NaN or infinite."""


class Damaged(ValueError):
    """The content of a file is not what was written: an older checkpoint may take its place."""


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint (tensors and plain types alone) with its checksum, whole or not at all.

    Raises:
        NotFinite: one of its tensors holds a NaN or an infinity; nothing is written then.
    """
    state = {"format": CHECKPOINT_FORMAT, **state}
    _check_finite(state)
    state["checksum"] = _checksum(state)
    write_whole(path, lambda file: torch.save(state, file))


def _checksum(state: dict) -> str:
    """SHA-256 of everything in a checkpoint except its checksum."""
    digest = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            if value.numel():
                flat = value.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key, entry in value.items():
                digest.update(f"{key!r}:".encode())
                add(entry)
        elif isinstance(value, list | tuple):
            digest.update(f"{len(value)}[".encode())
            for entry in value:
                add(entry)
        else:
            digest.update(f"{value!r},".encode())

    add({key: value for key, value in state.items() if key != "checksum"})
    return digest.hexdigest()


def _check_finite(value: object, name: str = "") -> None:
    """Raises NotFinite, with the name of the tensor, if a tensor holds a NaN or an infinity."""
    if isinstance(value, torch.Tensor):
        if not value.isfinite().all():
            raise NotFinite(f"{name} is not finite")
    elif isinstance(value, dict):
        for key, entry in value.items():
            _check_finite(entry, f"{name} {key}".strip())
    elif isinstance(value, list | tuple):
        for entry in value:
            _check_finite(entry, name)


def _check_names(pickled: bytes) -> None:
    """Raises ValueError if a pickle names what `save_checkpoint` does not.

    `weights_only` would still call `bytearray` and the like, with any size.
    """
    for opcode, name, _ in pickletools.genops(pickled):
        if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"{opcode.name} in the pickle")
        if opcode.name == "GLOBAL" and not PICKLED.fullmatch(name):
            raise ValueError(f"{name} in the pickle")


def _check_plain(state, size: int) -> None:
    """Raises ValueError for entries that `save_checkpoint` never writes or that exhaust memory.

    Shared references can expand to exponentially many entries, so their count and the bytes of all
    tensors together are limited by the size of the file in bytes.
    """
    left, seen = [(state, 0)], 0
    while left:
        value, depth = left.pop()
        seen += 1 + (value.nbytes if isinstance(value, torch.Tensor) else 0)
        if depth > 32 or seen > size:  # a list that contains itself exceeds the depth
            raise ValueError("nested too deeply, or larger than its file")
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
        path: a file that `save_checkpoint` wrote, a run folder, whose last.pt is read, a folder
            that `save_export` wrote, or the name of a Hugging Face repository with the files of
            such a folder.

    Returns:
        'model' (tensors by name), 'args' (flags by name), 'step', and every other entry of a
        checkpoint. An export has only the flags of the architecture and of `training`, and
        'architecture', the names of the former.

    Raises:
        Damaged: the content is not what was written, or the file is not of this project.
        ValueError: there is no such file, it cannot be read, or it is of a newer version. The
            messages have one line.
    """
    path = Path(path)
    if (path / LAST).is_file() and not (path / CONFIG).is_file():
        path = path / LAST
    if path.is_dir():
        state = _read_export(path)
    elif path.is_file():
        state = _read_checkpoint(path)
    else:
        state = _read_export(_download(str(path)))
    advice = "use an older checkpoint, or copy it again"
    try:
        _check_finite(state)
    except NotFinite as error:
        raise Damaged(f"{path} is damaged ({error}): {advice}") from error
    if state.get("checksum") != _checksum(state):
        raise Damaged(f"{path} is damaged (its checksum is wrong): {advice}")
    return state


def _read_checkpoint(path: Path) -> dict:
    wrong = f"{path} is not a checkpoint of this project, or is damaged: give a last.pt or best.pt"
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or sum(e.file_size for e in entries) > path.stat().st_size:
                raise ValueError("a small file could unpack to a large one")
            for entry in entries:
                if entry.filename.endswith(".pkl"):
                    _check_names(archive.read(entry))
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
    _check_finite(state)
    config = {
        "format": EXPORT_FORMAT,
        "version": EXPORT_VERSION,
        "architecture": architecture,
        "training": training,
        "checksum": _checksum(state),
    }
    # Copies: safetensors refuses tensors that share memory.
    tensors = {name: tensor.clone().contiguous() for name, tensor in state["model"].items()}
    data = safetensors.torch.save(tensors, metadata={"format": "pt"})
    write_whole(
        folder / WEIGHTS,
        lambda file: file.write(data),
        before=lambda: write_json(folder / CONFIG, config),
    )


def _export_state(model: dict, architecture: dict, training: dict) -> dict:
    """The result of `load_checkpoint` for an export, except its checksum.

    Flags and tensors are sorted, because the checksum depends on their order.
    """
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
            f"checkpoint {folder} is a folder without {CONFIG} or {LAST}: give a file such as "
            "runs/NAME/last.pt, a run folder, or a folder that scripts/export.py wrote"
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
    """Fetch the files of a Hugging Face repository, `owner/name`; return their folder."""
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
        # The state of this process's own GPU; it is the same in all processes.
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict) -> None:
    """Restore the states that `random_states` returned."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and states["cuda"]:
        torch.cuda.set_rng_state(states["cuda"][0])
