"""The rules of CONTRIBUTING.md that a program can check: imports one way, functions that end."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Every room may import from the rooms that stand before it.
FLOORS = (
    {
        "scheduler",
        "files",
        "output",
        "quantizers",
        "networks",
        "segment",
        "similarity",
    },
    {"checkpoint", "util"},
    {"exits"},
    {"meter", "pretrained"},
    {"dataset"},
    {"tokens"},
    {"arguments"},
    {"flags"},
    {"loss", "fid"},
    {"model", "metric"},
    {"run", "evaluation", "codec", "tables"},
    {"train"},
    {"timing"},
    {"scripts"},
)
FILES = sorted(
    path
    for folder in (".", "dataset", "quantizers", "loss", "codec", "run", "tables", "scripts")
    for path in (ROOT / folder).glob("*.py")
)
every_file = pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])


def room(path: Path) -> str:
    return path.stem if path.parent == ROOT else path.parent.name


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names


@every_file
def test_imports_run_one_way(path):
    floor = next(i for i, rooms in enumerate(FLOORS) if room(path) in rooms)
    above = set().union(*FLOORS[floor + 1 :])
    assert not imported(path) & above
    assert "scripts" not in imported(path)  # command lines only


def test_quantizers_import_torch_alone():
    used = set().union(*(imported(path) for path in FILES if room(path) == "quantizers"))
    assert used - sys.stdlib_module_names == {"torch"}


def test_no_script_hides_a_standard_module():
    """`python scripts/x.py` puts scripts/ first on the path, before the standard library."""
    names = {path.stem for path in FILES if room(path) == "scripts"}
    assert not names & sys.stdlib_module_names


@every_file
def test_functions_end(path):
    """None has more than 80 lines; a function that is read has an end in sight."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name != "_add_quantizer":
            assert node.end_lineno - node.lineno < 80, node.name


def test_the_rooms_are_those_of_the_list():
    assert {room(path) for path in FILES} <= set().union(*FLOORS)
