"""Everything that needs a GPU to be measured, the most important first, in one command.

    python scripts/gpu_check.py --minutes 9 --train-data-path DIR --val-data-path DIR
    python scripts/gpu_check.py --toy                # tries the command itself, on any machine

The same command again goes on: a part that is done, by its PART.json in the folder --out, with
this code, device, torch, images and size, is not run again, parts that have failed come last, and
one that does not fit the minutes that are left waits for the next call. The moment a part ends, its
file is written, and all.json with all of them; PART.log has what its scripts have said.

tests        tests/test_cuda.py: equal indices on CPU and GPU, no wait for the GPU in a step
step         images/s of the training step at batch 128 and 512, its parts, the rates of the card
train        images/s of train.py itself, from the images that are given (generated ones without)
curves       300 steps in bf16 compiled and in float32 eager: their loss, and a picture of both
torchrun     train.py under torchrun with NCCL, a process for each GPU
quantizers   against vector-quantize-pytorch (pip install '.[benchmark]'), SVQ against our VQ-EMA
2x2048       RFSQ-2x2048-LN, for half of the minutes that are left, and its evaluation
4x1024       RFSQ-4x1024-LN, for the minutes that are left, and its evaluation

At the end a table of all parts is printed. Exit code 1 if one of them failed or was not run.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import exits
import timing
import util
from arguments import LPIPS_CHOICES, Parser, get_args, number
from files import make_folder, write_json
from loss import Perceptual
from run import RunFolder
from timing import DEVICE

ROOT = Path(__file__).resolve().parent.parent
GOALS = {"H200": 4500, "H100": 3500}  # images/s of the training step
SPARE = 20  # seconds of the minutes that no part may count on
TOY = ["--channel=16", "--img-size=32"]
FULL = ["--channel=256", "--img-size=128"]


class Check:
    """The parts, as calls of the other scripts, within the minutes of `args`."""

    def __init__(self, args: Namespace):
        self.args, self.out = args, Path(args.out)
        self.part = ""  # the one that runs
        self.ends = time.monotonic() + 60 * args.minutes
        self.environment = util.environment(DEVICE)
        self.model = TOY if args.toy else FULL
        self.batch = 4 if args.toy else 128
        self.data = [f"--lpips-net={'none' if args.toy else args.lpips_net}"]
        for split, path in (("train", args.train_data_path), ("val", args.val_data_path)):
            path = path if path == "synthetic" else os.path.abspath(path)  # not of ROOT
            self.data.append(f"--{split}-data-path={path}")
        if self.data[0] == "--lpips-net=none":
            self.data.append("--perceptual-weight=0")
        if args.toy:
            self.data.append("--num-workers=0")
        get_args([*self.model, *self.data])  # bad flags end the script here

    def left(self) -> float:
        """Seconds that a part may take now."""
        return self.ends - time.monotonic() - SPARE

    def call(self, *command: str) -> None:
        """Run a script, which is stopped when the minutes are over; its output goes to PART.log.

        Raises:
            RuntimeError: it failed; the last line of what it said.
            TimeoutError: it was stopped.
        """
        log, words = self.out / f"{self.part}.log", [sys.executable, *command]
        with open(log, "a") as file:
            print("$", *command, file=file, flush=True)
            output = dict(stdout=file, stderr=subprocess.STDOUT)
            try:
                code = subprocess.run(words, cwd=ROOT, timeout=max(1, self.left()), **output)
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"stopped after {self.args.minutes:g} minutes in all") from None
        if code.returncode:
            last = log.read_text(errors="replace").strip().splitlines()[-1]
            raise RuntimeError(f"exit code {code.returncode}: {last} (more in {log})")

    def train(self, name: str, *flags: str) -> dict:
        """Results of train.py in the run folder `name`, with images/s after its first log line.

        `other s` are the seconds that did not go into steps: start, compilation, evaluation.
        """
        folder, start = self.out / name, time.monotonic()
        saved = [f"--save={folder.resolve()}", "--overwrite", f"--name={name}", "--seed=0"]
        self.call("train.py", *self.model, *self.data, *saved, *flags)
        rates = [row["images_per_s"] for row in self.log(name)]
        results = json.loads((folder / "results.json").read_text())
        keys = ("steps", "images_seen", "train_images", "images", "l1", "psnr", "ssim", "lpips")
        row = {"run": name, "images/s": statistics.median(rates[1:] or rates)}
        row["other s"] = time.monotonic() - start - results["images_seen"] / row["images/s"]
        return row | {key: results[key] for key in keys if results.get(key) is not None}

    def log(self, name: str) -> list[dict]:
        """The log lines of training in the run folder `name`."""
        return [row for row in RunFolder(self.out / name).read_log() if row["kind"] == "train"]

    def steps(self, count: int, log_interval: int) -> list[str]:
        """Flags of a run of so many steps, or of six at toy size."""
        count, log_interval = (6, 2) if self.args.toy else (count, log_interval)
        steps = [f"--train-iters={count}", f"--log-interval={log_interval}"]
        return [*steps, f"--batch-size={self.batch}"]

    def benchmark(self, name: str, *flags: str) -> dict:
        """What scripts/benchmark.py measured."""
        file = (self.out / f"benchmark-{name}.json").resolve()
        self.call("scripts/benchmark.py", f"--json={file}", *flags)
        return json.loads(file.read_text())

    # -------------------------------------------------------------------------------------
    # Parts
    # -------------------------------------------------------------------------------------
    def tests(self) -> list[dict]:
        report = (self.out / "tests.xml").resolve()
        flags = ["-q", "-p", "no:cacheprovider", "-m", "cuda", f"--junit-xml={report}"]
        report.unlink(missing_ok=True)
        try:
            self.call("-m", "pytest", "tests/test_cuda.py", *flags)
        except RuntimeError:
            if not report.exists():
                raise
            cases = ElementTree.parse(report).iter("testcase")
            failed = [
                case.get("name", "")
                for case in cases
                if any(case.find(outcome) is not None for outcome in ("failure", "error"))
            ]
            raise RuntimeError(f"{len(failed)} failed: {', '.join(failed[:8])}") from None
        suite = next(ElementTree.parse(report).iter("testsuite")).attrib
        return [{key: int(suite[key]) for key in ("tests", "failures", "errors", "skipped")}]

    def step(self) -> list[dict]:
        rows = []
        for batch in (4,) if self.args.toy else (128, 512):
            flags = [*self.model, f"--batch-size={batch}"]
            toy, full = ("--repeats=1", "--lpips-net=none"), ("--precision=bf16", "--compile")
            flags += toy if self.args.toy else [*full, "--lpips-net=vgg"]
            measured = self.benchmark(f"step-{batch}", "--only=step", *flags)
            ours, *others = measured["step"]["times"]["rows"]
            plain = next(row for row in others if row["step"] == "plain, fp32")
            row = {"batch": batch, "images/s": ours["images/s"]["median"]}
            goals = [goal for name, goal in GOALS.items() if name in self.environment["device"]]
            if goals:
                row["goal"] = goals[0]
            row |= {"ratio to plain float32": plain["ratio"]["median"]}
            row |= {key: ours[key] for key in ("of the limit", "peak MiB")}
            parts = measured["step"]["parts"]["rows"]
            rows.append(row | {f"share of {part['part']}": part["share"] for part in parts})
        return rows

    def quantizers(self) -> list[dict]:
        flags = ["--repeats=1", "--latent=4", "--match=svq"] if self.args.toy else ["--compile"]
        batch = "2" if self.args.toy else "128"
        rows = self.benchmark("quantizers", "--only=quantizers", "--z-batch", batch, *flags)
        keep = ("quantizer", "ours", "against", "theirs", "ms", "copies", "ratio")
        rows = rows["quantizers"]["times"]["rows"]
        return [{key: row[key] for key in keep if key in row} for row in rows]

    def train_rate(self) -> list[dict]:
        trace = [] if self.args.toy else ["--profile=10"]
        return [self.train("train", *self.steps(400, 50), *trace)]

    def curves(self) -> list[dict]:
        fast = [] if self.args.toy else ["--precision=bf16", "--compile"]
        exact = ["--precision=fp32", "--no-compile"]
        kinds = {"bf16-compiled": fast, "float32-eager": exact}
        rows = [self.train(name, *self.steps(300, 10), *flags) for name, flags in kinds.items()]
        losses = [[row["loss"] for row in self.log(name)] for name in kinds]
        apart = [abs(a / b - 1) for a, b in zip(*losses, strict=True)]
        rows[0] |= {"loss apart, mean": sum(apart) / len(apart), "most": max(apart)}
        folders = [str((self.out / name).resolve()) for name in kinds]
        self.call("scripts/plot.py", *folders, f"--out={(self.out / 'curves.png').resolve()}")
        return rows

    def torchrun(self) -> list[dict]:
        folder, processes = (self.out / "torchrun").resolve(), max(1, torch.cuda.device_count())
        flags = ["--train-iters=4", "--log-interval=2", f"--save={folder}", "--overwrite"]
        flags.append(f"--batch-size={4 * processes}")
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        self.call(*launch, "train.py", *self.model, *self.data, *flags)
        backend = "nccl" if DEVICE.type == "cuda" else "gloo"
        psnr = json.loads((folder / "results.json").read_text())["psnr"]
        return [{"backend": backend, "processes": processes, "psnr": psnr}]

    def long(self, name: str, share: float, *flags: str) -> list[dict]:
        """A run for a share of the time that is left, by the images/s of the part `train`."""
        if not self.done("train"):
            raise RuntimeError("it needs the part train, for its images/s: add it to --only")
        short = self.read("train")["rows"][0]
        # A tenth is kept back, beside what the short run needed for start, compilation and its end.
        seconds = 0.9 * share * self.left() - max(60, short["other s"])
        steps = int(seconds * short["images/s"] / self.batch)
        if steps < 6 and not self.args.toy:
            raise TimeoutError("no time is left for it")
        common = [*self.steps(steps, 50), "--max-train-epochs=100000", "--lr=0.002"]
        common += [f"--{what}-interval={max(steps, 1)}" for what in ("eval", "save")]
        return [self.train(name, *common, *flags)]

    # -------------------------------------------------------------------------------------
    # Their files
    # -------------------------------------------------------------------------------------
    def read(self, part: str) -> dict:
        """The file of a part, empty if there is none."""
        file = self.out / f"{part}.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def done(self, part: str) -> bool:
        """Whether a part is done as it would be here: with this code, device, images and size."""
        record = self.read(part)
        there = record.get("environment", {})
        same = all(there.get(key) == self.environment[key] for key in ("commit", "device", "torch"))
        same = same and record.get("data") == self.data and record["toy"] == self.args.toy
        return record.get("state") == "done" and same

    def run(self) -> dict[str, dict]:
        """Run what is missing; the file of each part by its name."""
        for name in sorted(PARTS, key=lambda name: self.read(name).get("state") == "failed"):
            self.part, (seconds, part) = name, PARTS[name]
            if name not in self.args.only or self.done(name):
                continue
            if not self.args.toy and self.left() < seconds:
                print(f"{name}: skipped, needs {seconds:.0f} s: run the same command again")
                continue
            print(f"{name} ...", flush=True)
            start = time.monotonic()
            record = {"part": name, "environment": self.environment}
            record |= {"data": self.data, "toy": self.args.toy}
            try:
                record |= {"state": "done", "rows": part(self)}
            except (RuntimeError, OSError, LookupError, ValueError, TypeError) as error:
                record |= {"state": "failed", "error": exits.one_line(error)}
            record["seconds"] = time.monotonic() - start
            write_json(self.out / f"{name}.json", record)
            write_json(self.out / "all.json", {each: self.read(each) for each in PARTS})
            print(f"{name}: {record['state']}, {record['seconds']:.0f} s {record.get('error', '')}")
        return {name: self.read(name) for name in self.args.only}


# By name: the seconds that a part needs on a card of 2023, and what it does.
PARTS: dict[str, tuple[float, Callable[[Check], list[dict]]]] = {
    "tests": (120.0, Check.tests),
    "step": (120.0, Check.step),
    "train": (90.0, Check.train_rate),
    "curves": (90.0, Check.curves),
    "torchrun": (40.0, Check.torchrun),
    "quantizers": (240.0, Check.quantizers),
    "2x2048": (90.0, lambda check: check.long("2x2048", 0.5, "--rfsq-stages=2")),
    "4x1024": (90.0, lambda check: check.long("4x1024", 1.0, "--rfsq-stages=4")),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts and print their tables; exit code 1 if one is not done.

    Raises:
        ValueError: for bad input, before anything is run.
    """
    args = get_flags(argv)
    if not args.toy and args.lpips_net != "none":
        Perceptual(args.lpips_net)  # weights that are missing end the script here
    make_folder(args.out, "give another --out")
    # As PyTorch decides by itself, and tests/conftest.py does not.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(util.cpu_cores()))
    check = Check(args)
    device = check.environment["device"]
    print(f"{device}, torch {torch.__version__}, {args.minutes:g} minutes, into {args.out}")
    records = check.run()
    for name, record in records.items():
        state = record.get("error") or record.get("state", "not run")
        timing.table(f"{name}: {state}", record.get("rows", [{"": "-"}]))
    if not all(map(check.done, records)):
        sys.exit(1)


def get_flags(argv: Sequence[str] | None) -> Namespace:
    """The flags of the command line, or of the list `argv`."""
    parser = Parser.of(__file__, __doc__)
    add = parser.group("flags")
    add("--minutes", number(float, 1, 600), 9.0, help="of this call; start it again for the rest")
    add("--out", str, "gpu_check", metavar="DIR", help="where the results go")
    text = "images, as for train.py; packed ones measure the step and not the decoding of files"
    add("--train-data-path", str, "synthetic", metavar="DIR", help=text)
    add("--val-data-path", str, "synthetic", metavar="DIR", help="likewise")
    text = "of the training runs; the part `step` takes vgg, with random weights if it must"
    add("--lpips-net", LPIPS_CHOICES, "vgg", help=text)
    add("--only", tuple(PARTS), tuple(PARTS), nargs="+", metavar="PART", help="the parts to be run")
    add("--toy", bool, False, help="tiny sizes, to try the command itself without a GPU")
    args = parser.parse_args(argv)
    if not args.toy and DEVICE.type != "cuda":
        parser.error("there is no GPU here: --toy tries the command itself without one")
    return args


if __name__ == "__main__":
    exits.run_script(main)
