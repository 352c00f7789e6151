"""The shell scripts of the configurations, `reproduce.sh`, and the tables of `report.py`."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from processes import DEADLINE, script_environment

import exits
from arguments import get_args
from quantizers import build_quantizer
from scripts import report
from tables.rows import PAPER as CLAIMS

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
PAPER = sorted(path.stem for path in SCRIPTS.glob("paper/*.sh"))
BEYOND = sorted(path.stem for path in SCRIPTS.glob("beyond/*.sh"))
TINY = (
    "--train-data-path synthetic --val-data-path IMAGES --train-iters 1 --batch-size 4 "
    "--channel 16 --img-size 32 --perceptual-weight 0 --num-workers 0"
)


def script(name: str) -> Path:
    """The file of a configuration."""
    (path,) = (path for path in SCRIPTS.glob(f"*/{name}.sh"))
    return path


def script_flags(name: str) -> list[str]:
    """The flags that a configuration adds to those of paper.sh."""
    text = script(name).read_text().replace("\\\n", " ")
    (flags,) = re.findall(r'^exec "\$\(dirname "\$0"\)/../paper\.sh" (.*) "\$@"$', text, re.M)
    return shlex.split(flags)


def make_run(folder: Path, flags: list[str] = (), seed: int = 0, **changes) -> Path:
    """A results.json as train.py writes it, with numbers that the seed makes."""
    args = vars(get_args([*flags, "--seed", str(seed), "--lpips-net=alex"]))
    quantizer = build_quantizer(get_args(list(flags)))
    lpips = changes.pop("lpips", 0.2 + seed / 100)
    l1 = changes.pop("l1", 0.05 + seed / 1000)
    psnr = changes.pop("psnr", 25.0 + seed)
    floor = {"l1": 0.06, "psnr": 21.5, "ssim": 0.65, "lpips": 0.3}
    floor["paper"] = {"l1": 0.26, "psnr": 14.5, "lpips": 0.28}
    results = {
        "name": args["name"] or quantizer.name,
        "images": 490,
        "image_size": [128, 128],
        "bits": quantizer.bits,
        "f": 4,
        "bpp": quantizer.bits / 16,
        "l1": l1,
        "psnr": psnr,
        "ssim": 0.8 + seed / 50,
        "lpips": lpips,
        "lpips_net": "alex",
        "paper": {"l1": l1 * 4, "psnr": psnr - 7, "lpips": lpips and lpips * 0.9},
        "floors": {"bicubic": floor, "mean_colour": {**floor, "psnr": 12.25}},
        "stages": [],
        "parameters": 1_063_687,
        "steps": 1000,
        "batch_size": 128,
        "images_seen": 128_000,
        "train_images": 12_303,
        "seconds": 60.0,
        "seed": seed,
        "precision": "bf16",
        "train_data": "data/train",
        "val_data": "data/val",
        "checkpoint": "last.pt",
        "environment": {
            "command": f"python /x/train.py --save {folder} --overwrite --seed {seed} --lr 0.0008",
            "commit": "0123456789abcdef (changed)",
            "device": "a GPU",
        },
        "args": {**args, **changes.pop("args", {})},
        **changes,
    }
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def cells(text: str, label: str) -> list[list[str]]:
    """The cells of every table row whose first cell is `label`."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return [row[1:] for row in rows if row and row[0] == label]


def none(stages: int) -> list[str]:
    return ["--rfsq-strategy=none", f"--rfsq-stages={stages}"]


# ---------------------------------------------------------------------------------------
# Configurations
# ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [*PAPER, *BEYOND])
def test_every_configuration_has_a_name_and_the_bits_that_it_states(name):
    text, args = script(name).read_text(), get_args(script_flags(name))
    assert args.name and os.access(script(name), os.X_OK)
    args.embed_dim = min(args.embed_dim, 8)  # memory, which does not change the bits
    bits, f = build_quantizer(args).bits, args.downsample
    if name.startswith("coded_"):
        most = int(re.search(r"_(\d+)bit_f", name)[1])
        assert f"f = {f}" in text and re.search(f"(at most|about) {most} bits per position", text)
        assert f"{most / f**2:.3f}".rstrip("0") in text
        assert bits > 1.5 * most  # before entropy coding
    else:
        assert f"{bits} bits per position, {bits / f**2:g} bits per pixel" in text
    # The shared settings alone would start no configuration; nothing else is in the file.
    code = [line for line in text.replace("\\\n", " ").splitlines() if line[0] != "#"]
    assert len(code) == 1 and text.startswith("#!/usr/bin/env bash\n# ")


def test_names_are_unique_and_those_of_the_paper_are_there():
    names = [get_args(script_flags(name)).name for name in (*PAPER, *BEYOND)]
    assert len(set(names)) == len(names)
    assert set(CLAIMS) <= set(names) and not set(PAPER) & set(BEYOND)
    assert len(PAPER) == 15 and len(BEYOND) >= 6


def test_the_paper_has_six_configurations_and_baselines_of_equal_bits():
    found = {}
    for name in PAPER:
        args = get_args(script_flags(name))
        args.embed_dim = min(args.embed_dim, 8)
        found.setdefault(build_quantizer(args).bits, []).append(args.quantizer)
        assert (args.network, args.downsample, args.res_blocks) == ("conv", 4, 0)
        assert args.rfsq_strategy != "geometric" and args.rfsq_slope is None
    assert found == {
        12: ["ema", "fsq", "lfq"],
        22: ["ema", "fsq", "lfq", "rfsq", "rfsq", "rfsq"],
        40: ["ema", "fsq", "lfq", "rfsq", "rfsq", "rfsq"],
    }


@pytest.mark.parametrize("name", BEYOND)
def test_configurations_beyond_the_paper(name):
    args = get_args(script_flags(name))
    kind = {"svq": "svq", "ema": "ema"}.get(name.split("_")[0], "rfsq")
    assert (args.network, args.quantizer) == ("dct", kind)
    assert kind != "rfsq" or args.rfsq_strategy == "geometric"
    if name.startswith("coded_"):
        bits, f = re.fullmatch(r"coded_(\d+)bit_f(\d)", name).groups()
        assert args.downsample == int(f)
        assert re.search(f"(at most|about) {bits} bits per position", script(name).read_text())
    else:
        assert build_quantizer(args).bits == int(re.search(r"_(\d+)bit", name)[1])


def test_the_entropy_of_lfq_at_40_bits_is_over_groups_and_said_to_be():
    assert build_quantizer(get_args(script_flags("lfq_40bit"))).entropy_groups == 4
    assert "4 groups of" in script("lfq_40bit").read_text()


# ---------------------------------------------------------------------------------------
# reproduce.sh
# ---------------------------------------------------------------------------------------
def reproduce(
    folder: Path,
    *flags: str,
    scripts: Path = ROOT / "scripts",
    script: str = "reproduce.sh",
    programs: dict[str, str] | None = None,
    **variables: str,
):
    """Run a script in `folder`, with this interpreter's environment, without a network."""
    environment = {**script_environment(folder, **programs or {}), **variables}
    command, pipes = [scripts / script, *flags], dict(capture_output=True, text=True)
    return subprocess.run(command, cwd=folder, env=environment, timeout=DEADLINE, **pipes)


def test_dry_run_lists_every_run_and_skips_the_finished(tmp_path):
    done = reproduce(tmp_path, "--dry-run", "--seeds", "0", "1", "--lr", "0.001", SEEDS="7")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 15 * 2
    wanted = [
        f"{ROOT}/scripts/paper/{name}.sh --seed {seed} --save runs/reproduce/{name}-s{seed} "
        "--resume auto --lr 0.001"
        for seed in (0, 1)
        for name in PAPER
    ]
    assert lines == wanted  # all configurations with the first seed, then with the second
    assert not (tmp_path / "runs").exists()

    finished = tmp_path / "elsewhere" / "ema_4096-s1"
    finished.mkdir(parents=True)
    (finished / "results.json").write_text("{}")
    (tmp_path / "elsewhere" / "fsq_4096-s1").mkdir()  # begun, not finished
    done = reproduce(
        tmp_path, "--dry-run", "--only", "ema_4096", "fsq_4096", OUT="elsewhere", SEEDS="1 2"
    )
    lines = done.stdout.splitlines()
    saved = [re.sub(r".* --save (\S+) .*", r"\1", line) for line in lines]
    runs = [f"elsewhere/{name}" for name in ("fsq_4096-s1", "ema_4096-s2", "fsq_4096-s2")]
    assert saved == ["# finished: elsewhere/ema_4096-s1", *runs]

    done = reproduce(tmp_path, "--dry-run", "--only", *BEYOND, "ema_4096")
    files = [line.split()[0] for line in done.stdout.splitlines()]
    assert files == [str(script(name)) for name in (*BEYOND, "ema_4096")]


@pytest.mark.slow
def test_reproduce_runs_the_rest_and_reports_what_failed(tmp_path):
    # The queue alone: scripts that write a result, and one that fails.
    scripts = tmp_path / "scripts"
    (scripts / "paper").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "reproduce.sh", scripts)
    (scripts / "setup.sh").write_text(f"ROOT={ROOT}\nPATH={Path(sys.executable).parent}:$PATH\n")
    fake = scripts / "paper" / "fsq_4096.sh"
    fake.write_text(
        '#!/bin/bash\n[ "$2" != 1 ] || { echo "train.py: error: no such luck"; exit 2; }\n'
        'mkdir "$4" && echo "$GPUS $OMP_NUM_THREADS" > "$4/results.json"\n'
    )
    fake.chmod(0o755)
    flags = ["--only", "fsq_4096", "--seeds", "0", "1", "2", "3", "3"]
    done = reproduce(tmp_path, *flags, scripts=scripts, JOBS="2", CUDA_VISIBLE_DEVICES="")
    runs = tmp_path / "runs" / "reproduce"
    assert done.returncode == 1, done.stderr
    assert sorted(path.parent.name for path in runs.glob("*/results.json")) == [
        f"fsq_4096-s{seed}" for seed in (0, 2, 3)
    ]
    assert (runs / "fsq_4096-s3" / "results.json").read_text() == "1 1\n"
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and "1 of 4 runs failed" in lines[1]
    for part in ("fsq_4096, seed 1", "fsq_4096-s1.log", "no such luck", "exit code 2"):
        assert part in lines[0]

    fake.write_text('#!/bin/bash\nmkdir "$4" && echo again > "$4/results.json"\n')
    done = reproduce(tmp_path, *flags, "--lr", "1", scripts=scripts)
    assert done.returncode == 0 and "all runs are finished" in done.stdout
    assert (runs / "fsq_4096-s1" / "results.json").read_text() == "again\n"
    assert (runs / "fsq_4096-s0" / "results.json").read_text() == "1 1\n"
    # Finished by a command without --lr: it is said, for the numbers are of other flags.
    assert done.stdout.count("by another command") == 3


def test_reproduce_spreads_over_the_gpus_there_are(tmp_path):
    scripts, log = tmp_path / "scripts", tmp_path / "log"
    (scripts / "paper").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "reproduce.sh", scripts)
    # A `python` that finds two GPUs and eight cores.
    (tmp_path / "python").write_text("#!/bin/bash\necho 2 8\n")
    (tmp_path / "python").chmod(0o755)
    (scripts / "setup.sh").write_text(f"ROOT={ROOT}\nPATH={tmp_path}:$PATH\n")
    fake = scripts / "paper" / "fsq_4096.sh"
    # Each run waits for the other of its pair: a GPU cannot be faster than the other one.
    fake.write_text(
        f'#!/bin/bash\necho "$CUDA_VISIBLE_DEVICES $GPUS" >> {log}\n'
        f"until [ $(wc -l < {log}) -gt $(($2 / 2 * 2 + 1)) ]; do sleep 0.01; done\n"
        'mkdir "$4" && echo > "$4/results.json"\n'
    )
    fake.chmod(0o755)
    flags = ["--only", "fsq_4096", "--seeds", "0", "1", "2", "3"]
    for given, wanted in (("", ["0 1", "1 1"]), ("5,GPU-8", ["5 1", "GPU-8 1"])):
        log.unlink(missing_ok=True)
        variables = {"CUDA_VISIBLE_DEVICES": given, "OUT": f"out{given}"}
        done = reproduce(tmp_path, *flags, scripts=scripts, **variables)
        assert done.returncode == 0, done.stderr
        assert sorted(log.read_text().splitlines()) == sorted(wanted * 2)


@pytest.mark.slow
def test_reproduce_trains_what_is_left_and_report_reads_it(tmp_path):
    """One configuration is finished, the other was killed on its way; flags of the user win."""
    shutil.copytree(make_images(tmp_path), tmp_path / "images")
    runs = tmp_path / "runs" / "reproduce"
    first, second = runs / "fsq_4096-s0", runs / "rfsq_2x2048_none-s0"
    make_run(first, script_flags("fsq_4096"))
    before = (first / "results.json").read_bytes()
    second.mkdir()
    tiny = TINY.replace("IMAGES", "images").split()
    flags = vars(get_args([*script_flags("rfsq_2x2048_none"), *tiny]))
    (second / "args.json").write_text(json.dumps(flags))  # flags, but no results
    (runs / "rfsq_2x2048_none-s0.log").write_text("the first part\n")
    done = reproduce(tmp_path, "--only", "fsq_4096", "rfsq_2x2048_none", *tiny)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (first / "results.json").read_bytes() == before
    results = json.loads((second / "results.json").read_text())
    assert results["name"] == results["args"]["name"] == "RFSQ-2x2048-None"
    assert results["args"]["quantizer_loss_weight"] == 1 and results["args"]["channel"] == 16
    text = report.main([str(runs)])
    assert [row[1] for row in cells(text, "RFSQ-2x2048-None")][:1] == ["22.00"]
    assert "missing" in cells(text, "RFSQ-2x2048-None")[0]
    assert len(cells(text, "FSQ 12 bits")) == 2
    assert (runs / "rfsq_2x2048_none-s0.log.1").read_text() == "the first part\n"


def test_the_parts_of_a_resumed_run_are_told(tmp_path):
    part = {"command": "python train.py --seed=3 --lr 1 --save=/home/me --resume auto"}
    gpu = {**part, "first_step": 1, "commit": "a" * 40, "device": "a GPU", "precision": "bf16"}
    cpu = {**gpu, "first_step": 801, "commit": "b" * 40, "device": "a CPU", "precision": "fp32"}
    text = report.main([str(make_run(tmp_path / "run", segments=[gpu, cpu, {**cpu}]))])
    assert "bf16, then fp32" in text and "/home" not in text and "--seed=" not in text
    assert "from step 1: commit aaaaaaaaaa, a GPU: `python train.py --lr 1`" in text
    assert text.count("from step") == 2 and "from step 801: commit bbbbbbbbbb, a CPU" in text
    newer = [{**gpu, "torch": "2.6.0"}, {**gpu, "first_step": 801, "torch": "2.14.1"}]
    newer.append({**newer[1], "first_step": 901, "processes": 2})
    text = report.main([str(make_run(tmp_path / "newer", segments=newer))])
    for step, machine in ((1, "2.6.0"), (801, "2.14.1"), (901, "2.14.1, 2 processes")):
        assert f"from step {step}: commit aaaaaaaaaa, a GPU, torch {machine}: `" in text


def make_images(folder: Path) -> Path:
    from PIL import Image

    from dataset.synthetic import SyntheticDataset

    (folder / "made").mkdir()
    for i, image in enumerate(SyntheticDataset(32, 0, 3)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "made" / f"{i}.png")
    return folder / "made"


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--only", "rfsq"], "choose from ema_2x2048 "),
        (["--only", "fsq_4096", "*"], "--only * is unknown"),
        (["--only"], "--only is empty"),
        (["--seeds", "one"], "seed one"),
        (["--seed=1"], "--seeds"),
        (["--save", "x"], "OUT"),
        (["--overwrite"], "remove"),
        (["--resume", "auto"], "continue"),
    ],
)
def test_reproduce_refuses_in_one_line(flags, part, tmp_path):
    done = reproduce(tmp_path, *flags)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1 and part in lines[0], done.stderr
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------------------
# report.py
# ---------------------------------------------------------------------------------------
def test_report_states_values_spread_paper_and_floors(tmp_path, capsys):
    for seed in (0, 1, 2):
        make_run(tmp_path / "a" / f"x{seed}", seed=seed)
    make_run(tmp_path / "b", ["--quantizer=fsq"], seed=4, psnr=27.125)
    text = report.main([str(tmp_path / "a"), str(tmp_path / "b" / "results.json")])
    assert capsys.readouterr().out == text
    assert text.count("\n## ") == 1 and "Not to be compared" not in text
    field, paper = cells(text, "RFSQ-2x2048-LN")
    # Mean and sample standard deviation of 25, 26, 27; 0.80, 0.82, 0.84; 0.050, 0.051, 0.052;
    # 0.20, 0.21, 0.22.
    assert field == [
        *["3", "22.00", "4", "1.375", "1,063,687"],
        *["26.00 ± 1.00", "0.8200 ± 0.0200", "0.0510 ± 0.0010", "0.2100 ± 0.0100"],
    ]
    assert paper == [
        *["0.2040 ± 0.0040", "0.124", "0.1890 ± 0.0090", "0.148", "19.00 ± 1.00", "21.3"],
    ]
    field, paper = cells(text, "FSQ 12 bits")
    assert field[0] == "1" and field[5] == "27.12" and paper[1::2] == ["0.143", "0.182", "20.3"]
    assert cells(text, "bicubic x4")[0][-4:] == ["21.50", "0.6500", "0.0600", "0.3000"]
    assert cells(text, "mean colour")[0][-4] == "12.25"
    assert cells(text, "bicubic x4")[1] == ["0.2600", "–", "0.2800", "–", "14.50", "–"]
    assert "L1 normalised" in text and "LPIPS-alex" in text and "LPIPS-alex of [0,1]" in text
    origin = "RFSQ-2x2048-LN: 1,000 steps, 128,000 images seen; seeds 0, 1, 2, commit 0123456789"
    assert f"{origin} (changed), a GPU: `python train.py --lr 0.0008`" in text


def test_report_has_the_curves_of_training(tmp_path):
    """Every step that all seeds have, at most seven of them: the first, and from the last on."""

    def curve(steps, seed):
        records = [{"step": 10 * i, "psnr": 20.0 + i + seed, "lpips": 0.1 * i} for i in steps]
        return {"validations": [{**each, "l1": 0.1, "ssim": 0.5} for each in records]}

    for seed in (0, 1):
        make_run(tmp_path / f"ln{seed}", seed=seed, **curve(range(1, 10 + seed), seed))
    none = curve(range(2, 10), 0)["validations"]
    none[-1]["lpips"] = None
    make_run(tmp_path / "none", ["--rfsq-strategy=none"], validations=none)
    make_run(tmp_path / "scale", ["--rfsq-strategy=scale"], **curve([9], 0))
    for seed in (0, 1):  # the first one by an older version
        made = curve([1, 9], 0) if seed else {}
        make_run(tmp_path / f"old{seed}", ["--quantizer=fsq"], seed, **made)
    text = report.main([str(tmp_path)])
    table = text.partition("PSNR dB / LPIPS after steps:\n\n")[2].partition("\n\n")[0]
    assert table.splitlines() == [
        "|  | 10 | 30 | 50 | 70 | 90 |",
        "|---|---:|---:|---:|---:|---:|",
        "| FSQ 12 bits, 1 of 2 seeds | 21.00 / 0.1000 | – | – | – | 29.00 / 0.9000 |",
        "| RFSQ-2x2048-None | – | 23.00 / 0.3000 | 25.00 / 0.5000 | 27.00 / 0.7000 | 29.00 / – |",
        "| RFSQ-2x2048-LN | 21.50 / 0.1000 | 23.50 / 0.3000 | 25.50 / 0.5000 | 27.50 / 0.7000 "
        "| 29.50 / 0.9000 |",
    ]
    other = make_run(tmp_path / "other", ["--lr=1"])
    assert "after steps" not in report.main([str(other)])


def test_report_recomputes_the_claims_from_pairs_of_seeds(tmp_path):
    ln, base = [0.045, 0.040, 0.048], [0.050, 0.050, 0.050]
    for seed in range(3):
        make_run(tmp_path / f"ln{seed}", ["--rfsq-stages=4"], seed, l1=ln[seed], lpips=0.1)
        values = dict(l1=base[seed], lpips=0.125, psnr=24.5, ssim=0.75)
        make_run(tmp_path / f"none{seed}", none(4), seed, **values)
    make_run(tmp_path / "none9", none(4), 9, l1=0.9)  # without a partner
    text = report.main([str(tmp_path)])
    rows = cells(text, "RFSQ-4x1024-LN against RFSQ-4x1024-None")
    # 10 %, 20 % and 4 % less; the paper: 0.113 to 0.102, 0.121 to 0.100, 22.2 to 22.9 dB.
    mean, std = statistics.fmean([10, 20, 4]), statistics.stdev([10, 20, 4])
    l1, lpips, psnr = f"{mean:+.1f} ± {std:.1f}", "+20.0 ± 0.0", "+1.50 ± 1.00"
    # SSIM: 0.80, 0.82, 0.84 against 0.75; the paper reports none.
    ours = ["3 of 3", psnr, "+0.0700 ± 0.0200", l1, lpips]
    assert rows == [[*ours, f"{l1} (+9.7)", f"{lpips} (+17.4)", f"{psnr} (+0.70)"]]


def test_report_compares_every_quantizer_with_the_baselines_of_equal_bits(tmp_path):
    svq, ema = script_flags("svq_22bit"), script_flags("ema_22bit")
    for seed in (0, 1):
        make_run(tmp_path / f"svq{seed}", svq, seed, lpips=0.06)
        make_run(tmp_path / f"ema{seed}", ema[2:] if seed else ema, seed, lpips=0.08)
    make_run(tmp_path / "ema40", script_flags("ema_40bit"))
    text = report.main([str(tmp_path)])
    # With and without its --name, the configuration is one row of two seeds.
    assert ema[0] == "--name" and cells(text, ema[1])[0][0] == "2"
    (row,) = cells(text, f"SVQ 22 bits against {ema[1]}")
    assert row[0] == "0 of 2" and row[4] == row[6] == "+25.0 ± 0.0"
    assert len(re.findall("^.* against ", text, re.M)) == 1


def test_report_compares_scale_statistics_and_fsq_of_equal_bits(tmp_path):
    make_run(tmp_path / "none", none(2))
    make_run(tmp_path / "scale", ["--rfsq-strategy=scale"], l1=0.055)
    make_run(tmp_path / "ln")
    make_run(tmp_path / "image", ["--rfsq-statistics=image"], bits=22.25)
    make_run(tmp_path / "fsq", script_flags("fsq_22bit"))
    make_run(tmp_path / "fsq12", script_flags("fsq_4096"))
    make_run(tmp_path / "fsq40", script_flags("fsq_40bit"))
    text = report.main([str(tmp_path)])
    image = "RFSQ-2x2048-LN, rfsq statistics image"
    compared = set(re.findall(r"^\| (.*) against (.*?) \|", text, re.M))
    fsq = "FSQ 22 bits"
    rfsq = ["RFSQ-2x2048-None", "RFSQ-2x2048-Scale", "RFSQ-2x2048-LN", image]
    # Statistics of the image are 0.25 bits more than FSQ has.
    wanted = {(row, fsq) for row in rfsq[:-1]} | {(row, rfsq[0]) for row in rfsq[1:]}
    assert compared == wanted | {("RFSQ-2x2048-LN", image)}
    (scale,) = cells(text, "RFSQ-2x2048-Scale against RFSQ-2x2048-None")
    assert scale[3] == "-10.0" and scale[5] == "-10.0 (+6.2)"  # 0.130 to 0.122
    assert cells(text, "RFSQ-2x2048-LN")[1][1] == "0.124" and cells(text, image)[1][1] == "–"
    # By bits, then as the paper has them.
    labels = re.findall(r"^\| ([^|]*?) \| 1 \|", text, re.M)
    assert labels == ["FSQ 12 bits", fsq, *rfsq, "FSQ 40 bits"]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"steps": 999}, "steps (here 999)"),
        ({"train_data": "other"}, "training data (here other)"),
        ({"train_images": 7}, "training images (here 7)"),
        ({"val_data": "other"}, "validation data (here other)"),
        ({"batch_size": 64}, "batch size (here 64)"),
        ({"image_size": [64, 64]}, "pixels (here 64x64)"),
        ({"lpips_net": "squeeze"}, "LPIPS network (here squeeze)"),
        ({"lpips_net": None, "lpips": None}, "LPIPS network (here missing)"),
        ({"precision": "fp32"}, "precision (here fp32)"),
        ({"args": {"channel": 64}}, "--channel (here 64)"),
        ({"args": {"downsample": 8}}, "--downsample (here 8)"),
        ({"args": {"lr": 1.0}}, "--lr (here 1.0)"),
        ({"args": {"perceptual_weight": 0.0}}, "--perceptual-weight (here 0.0)"),
        ({"args": {"load": "a.pt"}}, "--load (here a.pt)"),
        ({"args": {"flag_of_the_future": 3}}, "--flag-of-the-future (here 3)"),
        ({"args": {"rfsq_flag_of_the_past": 3}}, "--rfsq-flag-of-the-past (here 3)"),
    ],
    ids=str,
)
def test_unlike_rows_are_in_separate_tables_that_say_so(change, said, tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", none(2), **change)
    text = report.main([str(tmp_path)])
    first, second = re.split(r"^## ", text, flags=re.M)[1:]
    assert "RFSQ-2x2048-LN" in first and "None" not in first.replace("(here None)", "")
    assert "RFSQ-2x2048-None" in second and "RFSQ-2x2048-LN" not in second
    assert f"**Not to be compared with the other tables:** they differ in {said}" in second
    assert "Not to be compared" in first and "against" not in text


def test_lpips_separates_no_runs_that_it_did_not_train(tmp_path):
    def run(name, flags, net, **changes):
        changes |= {} if net else {"lpips": None, "floors": without}
        make_run(tmp_path / name, [*flags, "--perceptual-weight=0"], lpips_net=net, **changes)

    floor = json.loads((make_run(tmp_path / "x") / "results.json").read_text())["floors"]
    paper = {**floor["bicubic"]["paper"], "lpips": None}
    without = {name: {**row, "lpips": None, "paper": paper} for name, row in floor.items()}
    shutil.rmtree(tmp_path / "x")
    run("none", none(2), None)
    run("ln", [], "squeeze")
    text = report.main([str(tmp_path)])
    assert text.count("\n## ") == 1 and "LPIPS network: squeeze" in text
    columns = [cells(text, name)[0][-1] for name in ("RFSQ-2x2048-None", "RFSQ-2x2048-LN")]
    assert columns == ["missing", "0.2000"] and cells(text, "bicubic x4")[0][-1] == "0.3000"
    (gain,) = cells(text, "RFSQ-2x2048-LN against RFSQ-2x2048-None")
    assert gain[:2] == ["0 of 1", "+0.00"] and gain[4] == "–"
    # Of two networks it is not known whose column to share.
    run("scale", ["--rfsq-strategy=scale"], "alex")
    text = report.main([str(tmp_path)])
    assert text.count("\n## ") == 3 and "against" not in text
    for here in ("alex", "squeeze", "missing"):
        assert f"they differ in LPIPS network (here {here})" in text


@pytest.mark.parametrize("flags", [["--network=dct"], ["--downsample=8"]])
def test_the_paper_s_figures_are_of_its_network_alone(flags, tmp_path):
    make_run(tmp_path / "run", [*flags, "--name=RFSQ-2x2048-LN"])
    assert "0.124" not in report.main([str(tmp_path)])


def test_generated_images_have_no_number(tmp_path):
    make_run(tmp_path / "run", train_data="synthetic")
    text = report.main([str(tmp_path)])
    assert "## Generated training images, 1,000 steps of 128" in text and "12,303" not in text


def test_flags_without_effect_do_not_separate(tmp_path):
    make_run(tmp_path / "a", args={"num_workers": 7, "save": "x", "log_interval": 9})
    make_run(tmp_path / "b", ["--quantizer=fsq"], args={"rfsq_stages": 4, "embed_dim": 8})
    make_run(tmp_path / "d", none(2), args={"svq_flag_of_the_past": 5, "rfsq_initial_scale": 1.0})
    make_run(tmp_path / "c", [*script_flags("lfq_4096"), "--entropy-loss-weight=0.5"])
    text = report.main([str(tmp_path)])
    assert text.count("\n## ") == 1
    assert len(cells(text, "FSQ 12 bits")) == len(cells(text, "RFSQ-2x2048-None")) == 2
    label = "LFQ 12 bits, entropy loss weight 0.5"
    assert cells(text, label)[1][1] == "0.241"


def test_rows_have_the_names_of_their_runs(tmp_path):
    fsq = ["--quantizer=fsq", "--levels", *["4"] * 4]
    make_run(tmp_path / "mine", [*fsq, "--name=mine"])
    make_run(tmp_path / "other", [*none(2), "--name=mine", "--rfsq-stage-dropout=0.5"])
    make_run(tmp_path / "ours", [*fsq, "--name=ours"])
    make_run(tmp_path / "again", [*fsq, "--name=ours"], seed=1)
    make_run(tmp_path / "unnamed", fsq)
    make_run(tmp_path / "wide", [*fsq, "4"])
    # A name of the paper with other codes: its flags are stated, and not the paper's figures.
    make_run(tmp_path / "changed", [*script_flags("rfsq_2x2048_ln"), "--levels", *["4"] * 4])
    text = report.main([str(tmp_path)])
    labels = dict(re.findall(r"^\| ([^|]*?) \| ([12]) \|", text, re.M))
    both = [label for label in labels if label.startswith("mine, ")]
    assert len(both) == 2 and labels["ours"] == "2" and len(labels) == 6
    assert any("quantizer fsq" in label and "levels 4 4 4 4" in label for label in both)
    assert any("quantizer rfsq" in label and "rfsq strategy none" in label for label in both)
    assert {"fsq-4x4x4x4", "fsq-4x4x4x4x4"} <= set(labels)
    (changed,) = (label for label in labels if label.startswith("RFSQ"))
    assert changed == "RFSQ-2x2048-LN, levels 4 4 4 4"
    assert cells(text, changed)[1][1::2] == ["–"] * 3


def test_results_of_older_versions_are_read(tmp_path):
    """No name among the flags, flags that have other names today, and no SSIM."""
    for name, seed in (("lfq_4096", 0), ("rfsq_2x2048_ln", 0), ("rfsq_2x2048_none", 0)):
        flags = script_flags(name)
        folder = make_run(tmp_path / "old" / name, flags, seed)
        results = json.loads((folder / "results.json").read_text())
        results["name"] = build_quantizer(get_args(flags)).name
        for values in (results, *results["floors"].values()):
            del values["ssim"]
        args = results["args"]
        args["codebook_weight"] = args.pop("quantizer_loss_weight")
        args["codebook_loss_weight"] = 0.5 if name == "lfq_4096" else args["commitment_weight"]
        for young in ("name", "commitment_weight", "eval_interval", "profile"):
            del args[young]
        (folder / "results.json").write_text(json.dumps(results))
    make_run(tmp_path / "new", script_flags("rfsq_2x2048_none"), seed=1)
    text = report.main([str(tmp_path)])
    assert text.count("\n## ") == 1 and "Not to be compared" not in text
    assert cells(text, "RFSQ-2x2048-None")[0][0] == "2"
    assert cells(text, "RFSQ-2x2048-LN")[0][5:] == ["25.00", "missing", "0.0500", "0.2000"]
    assert cells(text, "bicubic x4")[0][-4:] == ["21.50", "missing", "0.0600", "0.3000"]
    assert cells(text, "LFQ 12 bits, commitment weight 0.5")[1][1] == "0.241"
    (gain,) = cells(text, "RFSQ-2x2048-LN against RFSQ-2x2048-None")
    assert gain[2] == "–" and gain[5].endswith("(+4.6)")


def test_damaged_results_are_left_out_with_a_warning(tmp_path, capsys):
    make_run(tmp_path / "whole")
    make_run(tmp_path / "third", args={"lr": "x"})
    for name, content in (("half", '{"psnr": 2'), ("other", '{"psnr": 3}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(content)
    text = report.main([str(tmp_path)])
    warnings = sorted(capsys.readouterr().err.splitlines())
    assert len(cells(text, "RFSQ-2x2048-LN")) == 2 and len(warnings) == 3
    assert all(line.startswith("report.py: warning: ") for line in warnings)
    assert "half/results.json is damaged" in warnings[0]
    assert "other/results.json lacks args" in warnings[1]
    assert (
        "third/results.json is damaged, or no results of a run (its flag --lr cannot be 'x')"
        in warnings[2]
    )
    with pytest.raises(ValueError, match="lacks args"):
        report.main([str(tmp_path / "half"), str(tmp_path / "other")])
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "change, lacks",
    [
        ({"psnr": float("nan")}, "psnr"),
        ({"psnr": 10**400, "name": "huge"}, "psnr"),
        ({"bits": float("inf")}, "bits"),
        ({"image_size": [None, 128]}, "image_size"),
        ({"segments": 10**30}, "segments"),
        ({"segments": [True]}, "segments"),
        ({"segments": [{"command": True}]}, "segments"),
        ({"segments": [{"precision": 7}]}, "segments"),
        ({"environment": {"command": "python 'x", "device": "a"}}, "environment.command"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_results_with_what_train_py_does_not_write_are_left_out(change, lacks, tmp_path, capsys):
    make_run(tmp_path / "whole")
    make_run(tmp_path / "other", none(2), **change)
    assert cells(report.main([str(tmp_path)]), "RFSQ-2x2048-None") == []
    warning = capsys.readouterr().err
    assert "other/results.json lacks " in warning and f"{lacks}: give" in warning


def drop(tree, *keys):
    """`tree` without the entry at `keys`."""
    first, *rest = keys
    kept = {key: value for key, value in tree.items() if key != first}
    return {**kept, first: drop(tree[first], *rest)} if rest else kept


@pytest.mark.parametrize(
    "change",
    [
        lambda run: drop(run, "floors", "bicubic", "lpips"),
        lambda run: {**run, "floors": {**run["floors"], "noise": 5}},
        lambda run: {**run, "validations": [{"step": 1, "psnr": 20.0}, {"step": 2, "psnr": 21.0}]},
        lambda run: {**run, "segments": [{"first_step": 1, "precision": None}]},
        lambda run: drop(run, "environment", "commit"),
        lambda run: {**run, "l1": 0.0},
    ],
)
def test_results_that_say_less_have_a_row_all_the_same(change, tmp_path):
    make_run(tmp_path / "ln")
    path = make_run(tmp_path / "none", none(2)) / "results.json"
    path.write_text(json.dumps(change({"segments": [], **json.loads(path.read_text())})))
    text = report.main([str(tmp_path)])
    assert cells(text, "RFSQ-2x2048-None") and cells(text, "RFSQ-2x2048-LN")


@pytest.mark.parametrize("name", ["results.json", "last.pt", "README.md", "names.txt"])
def test_report_replaces_no_file_of_a_run(name, tmp_path):
    run = make_run(tmp_path / "run")
    (run / name).write_text(before := json.dumps({"precious": name}))
    with pytest.raises(ValueError, match=r"--out .*: give"):
        report.main([str(run), f"--out={run / name}"])
    assert (run / name).read_text() == before


def test_what_is_no_result_is_left_out_and_never_called_damaged(tmp_path, capsys):
    make_run(tmp_path / "runs" / "a")
    (tmp_path / "runs" / "coded.pt").write_bytes(b"\x80 weights")
    unfinished = tmp_path / "runs" / "b"
    unfinished.mkdir()
    (unfinished / "args.json").write_text("{}")
    text = report.main([str(tmp_path / "runs" / "*")])
    assert len(cells(text, "RFSQ-2x2048-LN")) == 2 and not capsys.readouterr().err
    report.main([str(tmp_path / "runs" / "a"), str(unfinished)])
    assert capsys.readouterr().err.endswith("b holds no results.json: left out\n")


def test_floors_show_that_validation_images_differ(tmp_path):
    folder = make_run(tmp_path / "a")
    results = json.loads((folder / "results.json").read_text())
    results["floors"]["bicubic"]["psnr"] = 21.7
    make_run(tmp_path / "b", none(2), floors=results["floors"])
    text = report.main([str(tmp_path)])
    assert "validation images are not the same" in text and "from 21.50 to 21.70 dB" in text
    assert cells(text, "bicubic x4")[0][-4] == "21.60 ± 0.14"


def test_report_writes_a_file_and_takes_patterns(tmp_path, capsys):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", none(2))
    out = tmp_path / "tables.md"
    text = report.main([str(tmp_path / "*" / "results.json"), str(tmp_path), f"--out={out}"])
    assert out.read_text() == text and capsys.readouterr().out == ""
    assert len(cells(text, "RFSQ-2x2048-LN")) == 2  # named twice, read once


def test_names_that_cannot_be_printed_are_escaped_and_pipes_not_opened(tmp_path, monkeypatch):
    name, streams = os.fsdecode(b"\xff\nname"), {}
    make_run(tmp_path / name, ["--name", name])
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "results.json")
    for stream in ("stdout", "stderr"):  # as strict as a terminal's
        streams[stream] = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict")
        monkeypatch.setattr(sys, stream, streams[stream])
    exits.run_script(lambda: report.main([str(tmp_path)]))
    exits.run_script(lambda: report.main([str(tmp_path), f"--out={tmp_path / 'out.md'}"]))
    with pytest.raises(SystemExit):
        exits.run_script(lambda: report.main([name]))
    for stream in streams.values():
        stream.flush()
    out, err = (stream.buffer.getvalue().decode() for stream in streams.values())
    assert out == (tmp_path / "out.md").read_text()
    assert cells(out, "\\udcff\\nname")[0][0] == "1"
    assert len(err.splitlines()) == 1 and "\\udcff\\nname holds no results.json" in err


def test_bad_input_is_one_line_and_code_2(tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "results.json").write_text("{")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text('{"psnr": 3}')
    for name in "ab":
        make_run(tmp_path / "twice" / name)
    for flags, part in {
        ("nowhere",): "nowhere holds no results.json",
        (str(tmp_path / "empty"),): "holds no results.json: give folders of runs",
        (str(tmp_path / "damaged"),): "damaged",
        (str(tmp_path / "other"),): "lacks args",
        (str(tmp_path / "twice"),): "both RFSQ-2x2048-LN with seed 0",
        (): "RUNS",
    }.items():
        with pytest.raises(SystemExit) as caught:
            exits.run_script(lambda flags=flags: report.main(flags))
        lines = capfd.readouterr().err.strip().splitlines()
        assert caught.value.code == 2 and len(lines) == 1 and part in lines[0], (flags, lines)


# ---------------------------------------------------------------------------------------
# best.sh
# ---------------------------------------------------------------------------------------
@pytest.mark.slow
def test_best_trains_fits_and_measures(tmp_path):
    """One of its configurations, from training to the comparison of files."""
    images = make_images(tmp_path)
    data = ["--train-data-path", str(images), f"--val-data-path={images}"]
    tiny = "--train-iters 1 --batch-size 2 --channel 8 --img-size 32 --perceptual-weight 0"
    flags = [*data, *tiny.split(), "--num-workers", "0", "--only", "coded_22bit_f8"]
    done = reproduce(tmp_path, *flags, script="best.sh", LIMIT="1", FIT="3")
    assert done.returncode == 0, done.stdout + done.stderr
    best = tmp_path / "runs" / "best"
    assert done.stdout.count("counted the codes of 3 images") == 1
    measured = json.loads((best / "rate_distortion.json").read_text())
    assert measured["images"] == 1 and (best / "rate_distortion.png").stat().st_size > 1000
    coded = [c for c in measured["checkpoints"] if any(r["entropy_coded"] for r in c["rows"])]
    assert {Path(c["checkpoint"]).parent.name for c in coded} == {"coded_22bit_f8-s0"}


def test_best_runs_four_configurations_and_then_what_is_left(tmp_path):
    """The commands, without running them: a `python` that writes empty files."""
    log = tmp_path / "log"
    python = f"""
case "$1" in
    -) printf 'photos\nothers\n' ;; # the folders, checked
    -c) echo 0 2 ;; # GPUs and cores
    *)
        echo "$@" >> {log}
        while [ $# -gt 1 ]; do
            case $1 in
                --save) mkdir -p $2 && touch $2/results.json && touch -d 2020-01-01 $2/last.pt ;;
                --out) touch $2 ;;
            esac
            shift
        done ;;
esac"""
    for command in (["--seeds", "3"], ["--seeds", "3"], ["--seeds", "3", "--only", *BEYOND]):
        done = reproduce(tmp_path, *command, script="best.sh", programs={"python": python})
        assert done.returncode == 0, done.stderr
    calls = [Path(line.split()[0]).name for line in log.read_text().splitlines()]
    assert calls == [
        *["train.py"] * 4,
        *["compress.py"] * 4,
        *["rate_distortion.py"] * 2,
        *["train.py"] * (len(BEYOND) - 4),  # not entropy-coded, and therefore not compared
        "rate_distortion.py",
    ]
    names = [name for name in BEYOND if name.startswith("coded")]
    lines = log.read_text().splitlines()
    coded = [f"runs/best/{name}-s3/coded.pt" for name in names]
    assert len(names) == 4 and all(" ".join(coded) in line for line in (lines[8], lines[9]))
    assert all(f"{ROOT}/scripts/compress.py fit photos" in line for line in lines[4:8])
    assert lines[8].startswith(f"{ROOT}/scripts/rate_distortion.py others --load")


@pytest.mark.slow
def test_best_refuses_wrong_flags_before_folders_without_images(tmp_path):
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "index.json").write_text("{}")
    for flags, part in (
        (["--train-data-path=nowhere", "--lr=-1", "--seeds", "0", "1"], "--lr"),
        (["--skip-corrupt", "--train-data-path=nowhere"], "leave --skip-corrupt out"),
        (["--train-data-path=packed"], "packed is not a folder of image files: set IMAGES_TRAIN"),
    ):
        done = reproduce(tmp_path, *flags, script="best.sh")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert part in done.stderr and "nowhere" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", ["best.sh", "reproduce.sh", "demo.sh", "paper/fsq_22bit.sh"])
def test_help_of_the_shell_scripts_installs_nothing(script, tmp_path):
    done = reproduce(tmp_path, "--help", script=script, VENV=str(tmp_path / "new"))
    assert done.returncode == 0 and "train" in done.stdout and not done.stderr
    assert not (tmp_path / "new").exists()
