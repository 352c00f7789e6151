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
            if not (isinstance(record["step"], int) and isinstance(record["kind"], str)):
                raise TypeError
            records.append(record)
        except (ValueError, KeyError, TypeError):
            damaged += 1
    if damaged:
        print(f"warning: {path}: {damaged} damaged lines skipped", flush=True)
    return records


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
