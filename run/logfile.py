"""The log of a run, metrics.jsonl: one record a line, of training or of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from files import parse_json, write_whole
from metric import FIELD


def append(path: Path, record: dict) -> None:
    """Append a record to the log.

    Raises:
        OSError: names the file.
    """
    try:
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        error.filename = str(path)  # an error in writing does not name the file
        raise


def read(path: Path) -> list[dict]:
    """The records of a log; damaged lines are skipped with a warning."""
    records, damaged = [], 0
    text = path.read_bytes() if path.is_file() else b""
    for line in text.splitlines():
        try:
            record = parse_json(line)
            if not _is_sound(record):
                raise ValueError
            records.append(record)
        except ValueError:
            damaged += 1
    if damaged:
        print(f"warning: {path}: {damaged} damaged lines skipped", flush=True)
    return records


def _is_sound(record: object) -> bool:
    """Whether a record has a step, a kind and, of an evaluation, numbers as metrics."""
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return False
    if record.get("kind") != "val":
        return isinstance(record.get("kind"), str)
    values = [record.get(name) for name in FIELD if record.get(name) is not None]
    network = record.get("lpips_net")
    return (
        record.get("psnr") is not None
        and all(type(value) in (int, float) and abs(value) < 1e300 for value in values)
        and (network is None or isinstance(network, str))
    )


def replace(path: Path, records: Iterable[dict]) -> None:
    """Write a log anew, whole or not at all."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    write_whole(path, lambda file: file.write(lines.encode()))


def up_to(records: Iterable[dict], step: int, evaluated: bool) -> list[dict]:
    """The records up to a step; those of its evaluation only if `evaluated`."""
    return [
        record
        for record in records
        if record["step"] < step
        or (record["step"] == step and (evaluated or record["kind"] != "val"))
    ]


def validations(records: Iterable[dict], images: str) -> list[dict]:
    """Step and metrics of each evaluation of a validation set.

    Args:
        records: the log.
        images: identifies the set; records of older versions, which name none, count as well.
    """
    return [
        {key: record.get(key) for key in ("step", *FIELD)}
        for record in records
        if record["kind"] == "val" and record.get("validation", images) == images
    ]
