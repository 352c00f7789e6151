"""docs/tour.ipynb runs from its top, with the weights of the repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from processes import DEADLINE

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "tour.ipynb"


def test_the_tour_runs_and_prints_what_it_shows():
    cells = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    outputs = [out for cell in cells for out in cell["outputs"]]
    assert sum("image/png" in out.get("data", {}) for out in outputs) == 3
    shown = "".join("".join(out.get("text", [])) for out in outputs)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=NOTEBOOK.parent,
        env={**os.environ, "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stderr
    # Without numbers, which may differ by the processor.
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        line.split(":")[0] for line in shown.splitlines()
    ]
