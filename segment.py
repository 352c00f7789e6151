"""A segment of a run: its steps from one start, or resumption, to the next.

Checkpoints and results.json hold the segments of a run, in order.
"""

from __future__ import annotations

from typing import TypedDict, TypeGuard, get_type_hints


class Segment(TypedDict, total=False):
    """Where the steps from `first_step` on were computed. Older versions lack some entries."""

    first_step: int
    command: str
    commit: str | None  # None outside a git checkout
    device: str
    precision: str | None
    compiled: bool
    torch: str | None
    processes: int


TYPES = get_type_hints(Segment)


def is_segment(value: object) -> TypeGuard[Segment]:
    """Whether a value that was read from a file is a segment: a dict with entries of its types."""
    return isinstance(value, dict) and all(
        isinstance(value[name], kind) for name, kind in TYPES.items() if name in value
    )


def changes(before: Segment, now: Segment) -> list[str]:
    """What differs between two segments and changes the rounding of a run, in words."""
    names = ("device", "torch", "processes", "compiled")
    return [
        f"{name} {before[name]}, now {now[name]}"
        for name in names
        if name in before and before[name] != now[name]
    ]
