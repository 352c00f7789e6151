"""The shell scripts of the configurations, `reproduce.sh`, and the tables of `report.py`."""

from __future__ import annotations

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

import util
from arguments import get_args
from quantizers import build_quantizer
from scripts import report

ROOT = Path(__file__).resolve().parent.parent
BITS = {
    "rfsq_2x2048_none": 22.0,
    "rfsq_2x2048_scale": 22.0,
    "rfsq_2x2048_ln": 22.0,
    "rfsq_4x1024_none": 40.0,
    "rfsq_4x1024_scale": 40.0,
    "rfsq_4x1024_ln": 40.0,
    "fsq_4096": 12.0,
    "lfq_4096": 12.0,
    "ema_4096": 12.0,
    "fsq_22bit": 22.0,
    "lfq_22bit": 22.0,
    "ema_2x2048": 22.0,
    "fsq_40bit": 40.0,
    "lfq_40bit": 40.0,
    "ema_4x1024": 40.0,
}
BEYOND = {
    "geometric_22bit": 22.0,
    "geometric_40bit": 40.0,
    "coded_22bit_f4": None,  # what it takes is known once it is trained
    "coded_40bit_f4": None,
    "coded_22bit_f8": None,
    "coded_40bit_f8": None,
}
TINY = (
    "--train-data-path synthetic --val-data-path IMAGES --train-iters 1 --batch-size 4 "
    "--channel 16 --img-size 32 --perceptual-weight 0 --num-workers 0"
)


def script_flags(name: str) -> list[str]:
    """The flags that a configuration's script adds to those of paper.sh."""
    text = (ROOT / "scripts" / f"{name}.sh").read_text().replace("\\\n", " ")
    (flags,) = re.findall(r'paper\.sh" (.*) "\$@"$', text, re.M)
    return shlex.split(flags)


def make_run(folder: Path, flags: list[str] = (), seed: int = 0, **changes) -> Path:
    """A results.json as train.py writes it, with numbers that the seed makes."""
    args = vars(get_args([*flags, "--seed", str(seed), "--lpips-net=alex"]))
    quantizer = build_quantizer(get_args(list(flags)))
    lpips = changes.pop("lpips", 0.2 + seed / 100)
    l1 = changes.pop("l1", 0.05 + seed / 1000)
    psnr = changes.pop("psnr", 25.0 + seed)
    floor = {"l1": 0.06, "psnr": 21.5, "lpips": 0.3}
    floor["paper"] = {"l1": 0.26, "psnr": 14.5, "lpips": 0.28}
    results = {
        "name": quantizer.name,
        "images": 490,
        "image_size": [128, 128],
        "bits": quantizer.bits,
        "f": 4,
        "bpp": quantizer.bits / 16,
        "l1": l1,
        "psnr": psnr,
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
@pytest.mark.parametrize("name, bits", BITS.items())
def test_every_configuration_has_its_bits(name, bits):
    args = get_args(script_flags(name))
    args.embed_dim = min(args.embed_dim, 8)  # no bits in it, but memory
    assert build_quantizer(args).bits == bits
    text = (ROOT / "scripts" / f"{name}.sh").read_text()
    assert f"{bits} bits per position, {bits / 16:g} bits per pixel" in text
    assert os.access(ROOT / "scripts" / f"{name}.sh", os.X_OK)


@pytest.mark.parametrize("name, bits", BEYOND.items())
def test_presets_beyond_the_paper(name, bits):
    args = get_args(script_flags(name))
    text = (ROOT / "scripts" / f"{name}.sh").read_text()
    assert args.network == "dct" and args.rfsq_strategy == "geometric"
    if bits:
        assert build_quantizer(args).bits == bits and f"{bits} bits per position" in text
    else:
        bits, f = re.match(r"coded_(\d+)bit_f(\d)", name).groups()
        bpp = int(bits) / int(f) ** 2
        assert args.downsample == int(f) and f"at most {bits} bits per position" in text
        assert f"{bpp:.3f}".rstrip("0") in text
        # A position costs more without entropy coding than with it.
        assert build_quantizer(args).bits > 1.5 * int(bits)
    assert os.access(ROOT / "scripts" / f"{name}.sh", os.X_OK)


def test_nothing_beyond_the_paper_is_in_its_configurations():
    for name in BITS:
        args = get_args(script_flags(name))
        assert (args.network, args.downsample, args.res_blocks) == ("conv", 4, 0)
        assert args.rfsq_strategy != "geometric" and args.rfsq_slope is None


def test_the_entropy_of_lfq_at_40_bits_is_over_groups_and_said_to_be():
    assert build_quantizer(get_args(script_flags("lfq_40bit"))).entropy_groups == 4
    assert "4 groups of 10 bits" in (ROOT / "scripts" / "lfq_40bit.sh").read_text()


# ---------------------------------------------------------------------------------------
# reproduce.sh
# ---------------------------------------------------------------------------------------
def reproduce(
    folder: Path,
    *flags: str,
    scripts: Path = ROOT / "scripts",
    script: str = "reproduce.sh",
    **variables: str,
):
    """Run reproduce.sh in `folder`, with this interpreter's environment, without a network."""
    # setup.sh finds the virtual environment of the tests complete.
    ours, installed = (Path(place, "pyproject.toml") for place in (ROOT, sys.prefix))
    if not installed.exists() or installed.read_bytes() != ours.read_bytes():
        shutil.copyfile(ours, installed)
    environment = {
        **os.environ,
        "VENV": sys.prefix,
        "TORCH_HOME": str(folder / "torch"),
        "https_proxy": "http://127.0.0.1:9",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    command = [scripts / script, *flags]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_dry_run_lists_every_run_and_skips_the_finished(tmp_path):
    done = reproduce(tmp_path, "--dry-run", "--seeds", "0", "1", "--lr", "0.001", SEEDS="7")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 15 * 2
    wanted = [
        f"{ROOT}/scripts/{name}.sh --seed {seed} --save runs/reproduce/{name}-s{seed} "
        "--overwrite --lr 0.001"
        for seed in (0, 1)
        for name in BITS
    ]
    assert sorted(lines) == sorted(wanted)
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


def test_reproduce_runs_the_rest_and_reports_what_failed(tmp_path):
    # The queue alone: scripts that write a result, and one that fails.
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    shutil.copy(ROOT / "scripts" / "reproduce.sh", scripts)
    (scripts / "setup.sh").write_text(f"ROOT={ROOT}\nPATH={Path(sys.executable).parent}:$PATH\n")
    fake = scripts / "fsq_4096.sh"
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
    scripts.mkdir()
    shutil.copy(ROOT / "scripts" / "reproduce.sh", scripts)
    # A `python` that finds two GPUs and eight cores.
    (tmp_path / "python").write_text("#!/bin/bash\necho 2 8\n")
    (tmp_path / "python").chmod(0o755)
    (scripts / "setup.sh").write_text(f"ROOT={ROOT}\nPATH={tmp_path}:$PATH\n")
    fake = scripts / "fsq_4096.sh"
    fake.write_text(
        f'#!/bin/bash\necho "$CUDA_VISIBLE_DEVICES $GPUS" >> {log}\nsleep 0.3\n'
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


def test_reproduce_trains_and_resumes_and_report_reads_it(tmp_path):
    shutil.copytree(make_images(tmp_path), tmp_path / "images")
    tiny = TINY.replace("IMAGES", "images").split()
    done = reproduce(tmp_path, "--only", "fsq_4096", *tiny)
    first = tmp_path / "runs" / "reproduce" / "fsq_4096-s0"
    assert done.returncode == 0, done.stdout + done.stderr
    before = (first / "results.json").read_bytes()
    # The second was killed on its way: there are flags, but no results.
    second = first.with_name("rfsq_2x2048_none-s0")
    second.mkdir()
    (second / "args.json").write_text("{}")
    done = reproduce(tmp_path, "--only", "fsq_4096", "rfsq_2x2048_none", *tiny)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (first / "results.json").read_bytes() == before
    text = report.main([str(first.parent)])
    assert [row[1] for row in cells(text, "RFSQ-2x2048-None")][:1] == ["22.00"]
    assert len(cells(text, "FSQ [8,8,8,8]")) == 2 and "Not to be compared" not in text
    assert "missing" in cells(text, "FSQ [8,8,8,8]")[0]


def make_images(folder: Path) -> Path:
    from PIL import Image

    from dataset import SyntheticDataset

    (folder / "made").mkdir()
    for i, image in enumerate(SyntheticDataset(32, 0, 3)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "made" / f"{i}.png")
    return folder / "made"


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--only", "rfsq"], "choose from rfsq_2x2048_none"),
        (["--only"], "--only is empty"),
        (["--seeds", "one"], "seed one"),
        (["--seed=1"], "--seeds"),
        (["--save", "x"], "OUT"),
        (["--overwrite"], "remove"),
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
    # Mean and sample standard deviation of 25, 26, 27; 0.050, 0.051, 0.052; 0.20, 0.21, 0.22.
    assert field == [
        *["3", "22.00", "4", "1.375", "1,063,687"],
        *["26.00 ± 1.00", "0.0510 ± 0.0010", "0.2100 ± 0.0100"],
    ]
    assert paper == [
        *["0.2040 ± 0.0040", "0.124", "0.1890 ± 0.0090", "0.148", "19.00 ± 1.00", "21.3"],
    ]
    field, paper = cells(text, "FSQ [8,8,8,8]")
    assert field[0] == "1" and field[5] == "27.12" and paper[1::2] == ["0.143", "0.182", "20.3"]
    assert cells(text, "bicubic x4")[0][-3:] == ["21.50", "0.0600", "0.3000"]
    assert cells(text, "mean colour")[0][-3] == "12.25"
    assert cells(text, "bicubic x4")[1] == ["0.2600", "–", "0.2800", "–", "14.50", "–"]
    assert "L1 normalised" in text and "LPIPS-alex" in text and "LPIPS-alex of [0,1]" in text
    origin = "RFSQ-2x2048-LN: 1,000 steps, 128,000 images seen; seeds 0, 1, 2, commit 0123456789"
    assert f"{origin} (changed), a GPU: `python train.py --lr 0.0008`" in text


def test_report_recomputes_the_claims_from_pairs_of_seeds(tmp_path):
    ln, base = [0.045, 0.040, 0.048], [0.050, 0.050, 0.050]
    for seed in range(3):
        make_run(tmp_path / f"ln{seed}", ["--rfsq-stages=4"], seed, l1=ln[seed], lpips=0.1)
        make_run(tmp_path / f"none{seed}", none(4), seed, l1=base[seed], lpips=0.125, psnr=24.5)
    make_run(tmp_path / "none9", none(4), 9, l1=0.9)  # without a partner
    text = report.main([str(tmp_path)])
    rows = cells(text, "RFSQ-4x1024-LN against RFSQ-4x1024-None")
    # 10 %, 20 % and 4 % less; the paper: 0.113 to 0.102, 0.121 to 0.100, 22.2 to 22.9 dB.
    mean, std = statistics.fmean([10, 20, 4]), statistics.stdev([10, 20, 4])
    assert rows[0] == ["L1, %", *[f"{mean:+.1f} ± {std:.1f}"] * 2, "+9.7", "3 of 3"]
    assert rows[1] == ["LPIPS, %", *["+20.0 ± 0.0"] * 2, "+17.4", "3 of 3"]
    assert rows[2] == ["PSNR, dB", *["+1.50 ± 1.00"] * 2, "+0.70", "3 of 3"]


def test_report_compares_scale_statistics_and_fsq_of_equal_bits(tmp_path):
    make_run(tmp_path / "none", none(2))
    make_run(tmp_path / "scale", ["--rfsq-strategy=scale"], l1=0.055)
    make_run(tmp_path / "ln")
    make_run(tmp_path / "image", ["--rfsq-statistics=image"], bits=22.25)
    make_run(tmp_path / "fsq", script_flags("fsq_22bit"))
    make_run(tmp_path / "fsq12", script_flags("fsq_4096"))
    make_run(tmp_path / "fsq40", script_flags("fsq_40bit"))
    text = report.main([str(tmp_path)])
    image = "RFSQ-2x2048-LN, statistics image"
    compared = set(re.findall(r"^\| (.*) against (.*?) \| L1", text, re.M))
    fsq = "FSQ [16,16,16,16,8,8]"
    rfsq = ["RFSQ-2x2048-None", "RFSQ-2x2048-Scale", "RFSQ-2x2048-LN", image]
    wanted = {(row, fsq) for row in rfsq} | {(row, rfsq[0]) for row in rfsq[1:]}
    assert compared == wanted | {("RFSQ-2x2048-LN", image)}
    scale = cells(text, "RFSQ-2x2048-Scale against RFSQ-2x2048-None")
    assert scale[0] == ["L1, %", "-10.0", "-10.0", "+6.2", "0 of 1"]  # 0.130 to 0.122
    assert [row for row in cells(text, image)][1][1] == "0.124"
    # By bits, then as the paper has them.
    labels = re.findall(r"^\| ([^|]*?) \| 1 \|", text, re.M)
    assert labels == ["FSQ [8,8,8,8]", fsq, *rfsq, "FSQ [32]x8"]


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


def test_flags_without_effect_do_not_separate(tmp_path):
    make_run(tmp_path / "a", args={"num_workers": 7, "save": "x", "log_interval": 9})
    make_run(tmp_path / "b", ["--quantizer=fsq"], args={"rfsq_stages": 4, "embed_dim": 8})
    tuned = ["--quantizer=lfq", "--entropy-loss-weight=0.5"]
    make_run(tmp_path / "c", tuned)
    text = report.main([str(tmp_path)])
    assert text.count("\n## ") == 1
    assert len(cells(text, "FSQ [8,8,8,8]")) == 2
    label = "LFQ 12 bits, entropy loss weight 0.5"
    assert cells(text, label)[1][1] == "0.241"


def test_floors_show_that_validation_images_differ(tmp_path):
    folder = make_run(tmp_path / "a")
    results = json.loads((folder / "results.json").read_text())
    results["floors"]["bicubic"]["psnr"] = 21.7
    make_run(tmp_path / "b", none(2), floors=results["floors"])
    text = report.main([str(tmp_path)])
    assert "validation images are not the same" in text and "from 21.50 to 21.70 dB" in text
    assert cells(text, "bicubic x4")[0][-3] == "21.60 ± 0.14"


def test_report_writes_a_file_and_takes_patterns(tmp_path, capsys):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", none(2))
    out = tmp_path / "tables.md"
    text = report.main([str(tmp_path / "*" / "results.json"), str(tmp_path), f"--out={out}"])
    assert out.read_text() == text and capsys.readouterr().out == ""
    assert len(cells(text, "RFSQ-2x2048-LN")) == 2  # named twice, read once


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
        (str(tmp_path / "empty"),): "give finished runs",
        (str(tmp_path / "damaged"),): "damaged",
        (str(tmp_path / "other"),): "lacks args",
        (str(tmp_path / "twice"),): "both RFSQ-2x2048-LN with seed 0",
        (): "RUNS",
    }.items():
        with pytest.raises(SystemExit) as caught:
            util.run_script(lambda flags=flags: report.main(flags))
        lines = capfd.readouterr().err.strip().splitlines()
        assert caught.value.code == 2 and len(lines) == 1 and part in lines[0], (flags, lines)


# ---------------------------------------------------------------------------------------
# best.sh
# ---------------------------------------------------------------------------------------
def test_best_trains_fits_and_measures(tmp_path):
    images = make_images(tmp_path)
    data = ["--train-data-path", str(images), f"--val-data-path={images}"]
    tiny = "--train-iters 1 --batch-size 2 --channel 8 --img-size 32 --perceptual-weight 0"
    flags = [*data, *tiny.split(), "--num-workers", "0"]
    done = reproduce(tmp_path, *flags, script="best.sh", LIMIT="1", FIT="3", JOBS="2")
    assert done.returncode == 0, done.stdout + done.stderr
    best = tmp_path / "runs" / "best"
    assert done.stdout.count("counted the codes of 3 images") == 4
    measured = json.loads((best / "rate_distortion.json").read_text())
    assert measured["images"] == 1 and (best / "rate_distortion.png").stat().st_size > 1000
    coded = [c for c in measured["checkpoints"] if any(r["entropy_coded"] for r in c["rows"])]
    assert {Path(c["checkpoint"]).parent.name for c in coded} == {
        f"{name}-s0" for name in BEYOND if name.startswith("coded")
    }
    before = {path: path.stat().st_mtime_ns for path in best.glob("*/*.pt")}
    done = reproduce(tmp_path, *flags, script="best.sh", LIMIT="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in best.glob("*/*.pt")}


def test_best_wants_folders_of_files(tmp_path):
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "index.json").write_text("{}")
    for where in ("nowhere", "packed"):
        done = reproduce(tmp_path, f"--train-data-path={where}", script="best.sh")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert f"{where} is no folder of image files: set IMAGES_TRAIN" in done.stderr
    assert not (tmp_path / "runs").exists()
