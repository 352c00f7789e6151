"""Copy the `results.json` of finished runs into one folder, to be kept and shared.

    python scripts/keep_results.py runs/reproduce --out results

Each becomes NAME-fF-NETWORK-STEPS-sSEED.json. What was measured, all flags, the command and the
commit stay; folders of this machine and weights do not. `scripts/report.py 'results/*.json'` makes
the tables.
"""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import exits
import output
from arguments import Parser
from files import make_folder, write_json
from flags import args_of, differing_flags, may_change_flags
from tables.results import portable, read_results


def file_name(run: dict, args: Namespace, name: str | None) -> str:
    """NAME-fF-NETWORK-STEPS-sSEED.json: this name, or that of the run, or the quantizer's."""
    name = f"{name or args.name or run['name']} f{args.downsample} {args.network}"
    name = re.sub(r"[^\w.]+|_+", "-", name.lower()).strip("-.")
    return f"{name}-{run['steps']}-s{run['seed']}.json"


def check_same_run(file: Path, run: dict, force: bool) -> None:
    """Raises ValueError if `file` holds another run; with `force`, only if its flags differ."""
    if not file.exists():
        return
    found, faults = read_results([str(file)])
    if faults:
        raise ValueError(faults[0])
    (before,) = found
    differ = differing_flags(args_of(before), args_of(run), may_change_flags())
    old, new = portable(before), portable(run)
    given = [{**each, "--load": each["args"].get("load")} for each in (old, new)]
    for name in ("train_images", "images", "train_data", "val_data", "--load"):
        there, here = (each.get(name) for each in given)
        if there != here:
            differ.append(f"{name} {there} there, {here} here")
    if differ:
        raise ValueError(
            f"{file} is of another run ({'; '.join(differ)}): move it, or give another --name"
        )
    if old != new and not force:
        raise ValueError(
            f"{file} is of another run of the same flags (PSNR {before['psnr']:.4f} there, "
            f"{run['psnr']:.4f} here): move it, or replace it with --force"
        )


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Write the files as the flags say; return them.

    Raises:
        ValueError: damaged results, two runs of one name, or a file of another run; nothing is
            written then.
    """
    parser = Parser.of(__file__, __doc__)
    text = "run folders, folders of them, results.json, globs"
    parser.add_argument("runs", nargs="+", metavar="RUNS", help=text)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the copies")
    text = "name of the files instead of the configuration's, for runs that differ in another flag"
    parser.add_argument("--name", help=text)
    text = "replace copies of other runs of the same flags and seed"
    parser.add_argument("--force", action="store_true", help=text)
    flags = parser.parse_args(argv)
    found, faults = read_results(flags.runs)
    if faults:
        raise ValueError(faults[0])
    kept: dict[str, dict] = {}
    for run in found:
        name = file_name(run, args_of(run), flags.name)
        if name in kept:
            raise ValueError(
                f"{kept[name]['path']} and {run['path']} are both {name}: leave one out"
            )
        kept[name] = run
    files = [Path(flags.out) / name for name in kept]
    make_folder(flags.out, "give another --out")
    for file, run in zip(files, kept.values(), strict=True):
        check_same_run(file, run, flags.force)
    for file, run in zip(files, kept.values(), strict=True):
        write_json(file, portable(run))
        print(output.printable(str(file)))
    return files


if __name__ == "__main__":
    exits.run_script(main)
