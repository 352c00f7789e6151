"""Copy the `results.json` of finished runs into one folder, to be kept and shared.

    python scripts/keep_results.py runs/reproduce --out results

Each becomes NAME-STEPS-sSEED.json. What was measured, all flags, the command and the commit stay;
folders of this machine and weights do not. `scripts/report.py 'results/*.json'` makes the tables.
"""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import output
import util
from arguments import Parser, args_of
from files import write_json
from results import portable, read_results


def file_name(run: dict, args: Namespace) -> str:
    """NAME-STEPS-sSEED.json: the name that was given, or the quantizer's and the network."""
    name = args.name or f"{run['name']} f{args.downsample} {args.network}"
    name = re.sub(r"[^\w.]+|_+", "-", name.lower()).strip("-.")
    return f"{name}-{run['steps']}-s{run['seed']}.json"


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Write the files as the flags say; return them.

    Raises:
        ValueError: damaged results, or two runs of one name; nothing is written then.
    """
    parser = Parser(prog="keep_results.py", description=(__doc__ or "").split("\n")[0])
    text = "run folders, folders of them, results.json, globs"
    parser.add_argument("runs", nargs="+", metavar="RUNS", help=text)
    text = "files of the same name there are replaced"
    parser.add_argument("--out", required=True, metavar="DIR", help=text)
    flags = parser.parse_args(argv)
    found, faults = read_results(flags.runs)
    if faults:
        raise ValueError(faults[0])
    kept: dict[str, dict] = {}
    for run in found:
        name = file_name(run, args_of(run))
        if name in kept:
            raise ValueError(
                f"{kept[name]['path']} and {run['path']} are both {name}: leave one out"
            )
        kept[name] = run
    files = [Path(flags.out) / name for name in kept]
    Path(flags.out).mkdir(parents=True, exist_ok=True)
    for file, run in zip(files, kept.values(), strict=True):
        write_json(file, portable(run))
        print(output.printable(str(file)))
    return files


if __name__ == "__main__":
    util.run_script(main)
