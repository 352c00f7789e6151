"""Flags of a checkpoint or of results.json: read, compared, and which of them decide what."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Collection

from arguments import ARCHITECTURE, MAY_CHANGE, QUANTIZER_GROUP, get_args, get_parser
from output import printable
from quantizers import Quantizer


def architecture_flags() -> tuple[str, ...]:
    """The flags that decide what the weights of a model mean."""
    return _flags(role=ARCHITECTURE)


def may_change_flags() -> tuple[str, ...]:
    """The flags that may differ when a run is resumed."""
    return _flags(role=MAY_CHANGE)


def differing_flags(there: Namespace, here: Namespace, may_change: Collection[str]) -> list[str]:
    """The flags whose values differ, each as "--name VALUE there, VALUE here"."""
    before = vars(there)
    return [
        f"--{name.replace('_', '-')} {before.get(name)} there, {value} here"
        for name, value in vars(here).items()
        if name not in may_change and before.get(name) != value
    ]


def quantizer_flags() -> tuple[str, ...]:
    """The flags that quantizers read."""
    return _flags(group=QUANTIZER_GROUP)


def _flags(role: str | None = None, group: str | None = None) -> tuple[str, ...]:
    return tuple(
        action.dest
        for title, its_role, action in get_parser().declared
        if role in (None, its_role) and group in (None, title)
    )


def unread_flags(quantizer: Quantizer) -> set[str]:
    """The flags of other quantizers, which make no difference to this one."""
    return {*quantizer_flags()} - {"quantizer", "pairs", *quantizer.read_flags()}


def with_values_in_use(args: Namespace, quantizer: Quantizer) -> Namespace:
    """A copy of `args` where flags that were not given have the values that `quantizer` uses."""
    return Namespace(**{**vars(args), **quantizer.flag_values()})


def ignored_flags(args: Namespace, quantizer: Quantizer) -> list[str]:
    """The flags that were given and this quantizer does not read, each as "--name VALUE"."""
    defaults, given = vars(get_args([])), vars(args)
    return [
        f"--{name.replace('_', '-')} {given[name]}"
        for name in sorted(unread_flags(quantizer))
        if given[name] != defaults[name]
    ]


def current_flags(saved: dict) -> dict:
    """Flags as a checkpoint or a results.json holds them, under the names that they have today."""
    renamed = {
        old.removeprefix("--").replace("-", "_"): action.dest
        for _, _, action in get_parser().declared
        for old in action.option_strings
        if not old.startswith("--no-")
    }
    return {renamed.get(name, name): value for name, value in saved.items()}


def args_of(checkpoint: dict) -> Namespace:
    """The flags of a checkpoint; those that are younger than it have their defaults.

    Raises:
        ValueError: a flag has a value that the command line would refuse, or the model was exported
            with a flag that does not exist.
    """
    args = get_args([])
    if not isinstance(checkpoint["args"], dict):
        raise ValueError("its flags are damaged")
    if unknown := sorted(set(checkpoint.get("architecture", ())) - set(architecture_flags())):
        raise ValueError(
            f"the model was exported with --{unknown[0].replace('_', '-')}, which this version does"
            " not know: use the version of the project that wrote it"
        )
    vars(args).update(current_flags(checkpoint["args"]))
    for _, _, action in get_parser().declared:
        value = getattr(args, action.dest)
        if not _allows(action, value):
            given = printable(f"{value!r:.80}")
            raise ValueError(f"its flag {action.option_strings[0]} cannot be {given}")
    return args


def _allows(action: argparse.Action, value) -> bool:
    """Whether a flag can have a value of a checkpoint."""
    if value is None:
        return action.default is None
    if action.nargs == 0 or isinstance(value, bool):  # a switch
        return action.nargs == 0 and isinstance(value, bool)
    if isinstance(value, list) != (action.nargs == "+"):
        return False
    values, kind = value if isinstance(value, list) else [value], action.type or str
    try:
        same = all(isinstance(x, int | float | str) and kind(str(x)) == x for x in values)
    except (ValueError, argparse.ArgumentTypeError):
        return False
    return same and (not action.choices or value in action.choices) and bool(values)
