"""scripts/keep_results.py, and the tables of RESULTS.md from the files in results/."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_report import make_run

import output
from scripts import keep_results, report
from tables.results import read_results, without_places

ROOT = Path(__file__).resolve().parent.parent
KEPT = sorted((ROOT / "results").glob("*.json"))
IMAGE_BY_IMAGE = sorted((ROOT / "results" / "test").glob("*.json"))


def keep(out, *runs):
    return keep_results.main([*map(str, runs), "--out", str(out)])


def test_kept_results_make_the_same_table(tmp_path, capsys):
    runs = [make_run(tmp_path / f"run{seed}", ["--quantizer=svq"], seed) for seed in (0, 1)]
    files = keep(tmp_path / "results", *runs)
    assert [file.name for file in files] == [
        f"svq-22bit-f4-conv-1000-s{seed}.json" for seed in (0, 1)
    ]
    places = ("run*", "results/*.json", "results")
    tables = [report.main([str(tmp_path / place)]) for place in places]
    rows = [[line for line in table.splitlines() if line.startswith("| ")] for table in tables]
    assert rows[0] == rows[1] == rows[2] and len(rows[0]) > 4


def test_another_run_is_not_replaced(tmp_path):
    first = make_run(tmp_path / "first", psnr=20.0)
    (file,) = keep(tmp_path / "results", first)
    keep(tmp_path / "results", first)
    again = make_run(tmp_path / "again", psnr=21.0)
    with pytest.raises(ValueError, match=r"PSNR 20.0000 there, 21.0000 here.*--force"):
        keep(tmp_path / "results", again)
    assert json.loads(file.read_text())["psnr"] == 20
    keep(tmp_path / "results", again, "--force")
    assert json.loads(file.read_text())["psnr"] == 21
    for flag, differs in (
        ("--lr=0.5", "--lr 0.0008 there, 0.5 here"),
        ("--load=/a/b.pt", "--load None there, a/b.pt here"),
    ):
        other = make_run(tmp_path / flag.replace("/", ""), [flag])
        with pytest.raises(ValueError, match=rf"is of another run \({differs}\)"):
            keep(tmp_path / "results", other, "--force")
    assert json.loads(file.read_text())["psnr"] == 21
    (beside,) = keep(tmp_path / "results", other, "--name", "RFSQ, loaded")
    assert beside.name.startswith("rfsq-loaded-f4-conv") and file.exists()
    file.write_text('{"psnr": 2')
    with pytest.raises(ValueError, match=f"{file.name} is damaged"):
        keep(tmp_path / "results", first, "--force")
    assert file.read_text() == '{"psnr": 2'


def test_no_folder_of_the_machine_is_kept(tmp_path):
    flags = ["--train-data-path=/home/me/train", "--load", "/home/me/a.pt", "--name=RFSQ, mine"]
    run = make_run(tmp_path / "run", flags)
    command = "python /home/me/rfsq/train.py --train-data-path /home/me/train --save=/home/me/x"
    command += " --lr 0.1 --load /home/me/a.pt"
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    results["environment"]["command"] = command
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    (file,) = keep(tmp_path / "results", run)
    assert file.name == "rfsq-mine-f4-conv-1000-s0.json"
    kept = json.loads(file.read_text())
    assert "/home" not in file.read_text() and kept["args"]["train_data_path"] == "train"
    assert kept["environment"]["command"] == "python train.py --lr 0.1"
    assert kept["psnr"] == results["psnr"] and kept.keys() == results.keys()


def test_runs_are_found_through_links_and_beside_kept_results(tmp_path):
    first = make_run(tmp_path / "disk" / "first", name="first")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "first").symlink_to(first.parent if first.is_file() else first)
    (tmp_path / "runs" / "again").symlink_to(tmp_path / "runs")
    keep(tmp_path / "runs", make_run(tmp_path / "other", seed=1))
    keep(tmp_path / "runs", tmp_path / "runs" / "first")  # its copy is no other run
    found, faults = read_results([str(tmp_path / "runs")])
    assert sorted(run["seed"] for run in found) == [0, 1] and not faults


def test_a_command_that_nobody_has_kept_stays_as_it_is():
    assert without_places("unknown") == "unknown"


def test_a_flag_that_is_given_again_counts_the_last_time():
    command = "/bin/python /x/train.py --lr 1 --levels 8 8 --compile --lr=2 --save a --levels 4"
    assert without_places(command) == "python train.py --compile --lr=2 --levels 4"


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"train_images": None}, "train_images"),
        ({"bits": "many", "seed": 0.5}, "bits, seed"),
        ({"environment": {"device": "a CPU"}}, "environment.command"),
        (
            {"floors": {"bicubic": {}, "mean_colour": None}},
            "floors.bicubic.l1, floors.bicubic.paper.l1",
        ),
        ({"paper": None}, "paper.l1, paper.psnr"),
        ({"validations": [1]}, "validations"),
    ],
    ids=str,
)
def test_what_a_file_lacks_is_named(changes, said, tmp_path):
    run = make_run(tmp_path / "run") / "results.json"
    run.write_text(json.dumps({**json.loads(run.read_text()), **changes}))
    found, (fault,) = read_results([str(run)])
    assert not found and f"{run} lacks {said}" in fault


def test_names_in_any_language_stay_apart(tmp_path):
    names = ("量子化", "квантизация", "a_b")
    runs = [make_run(tmp_path / f"{i}", [f"--name={name}"]) for i, name in enumerate(names)]
    files = keep(tmp_path / "results", *runs)
    assert [file.name.removesuffix("-f4-conv-1000-s0.json") for file in files] == [
        *names[:2],
        "a-b",
    ]


def test_two_runs_of_one_name_or_a_damaged_one_leave_nothing(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    with pytest.raises(
        ValueError, match=r"a/results.json and .*b/results.json are both rfsq-2x2048"
    ):
        keep(tmp_path / "results", *runs)
    (tmp_path / "b" / "results.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        keep(tmp_path / "results", *runs)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.stem)
def test_files_of_the_repository_are_whole(file):
    run = json.loads(file.read_text())
    assert run["images"] == 490 and re.fullmatch("[0-9a-f]{40}", run["environment"]["commit"])
    assert not re.search(r'"/|[ =]/', file.read_text())  # no folder


def test_tables_of_results_are_those_of_the_files():
    """Each row that the report makes of results/ is in RESULTS.md, digit for digit."""
    text = (ROOT / "RESULTS.md").read_text()
    assert KEPT
    for line in report.main([str(file) for file in KEPT]).splitlines():
        if re.match(r"\| .* \| (\d+ \| \d+\.\d\d|\d+\.\d\d / 0\.\d{4}) \|", line):
            assert line in text, line


@pytest.mark.parametrize("file", IMAGE_BY_IMAGE, ids=lambda file: file.stem)
def test_differences_image_by_image_are_those_of_the_files(file):
    result = json.loads(file.read_text())
    first, other = result["checkpoints"]
    d = other["differences"]
    assert first["images"] == {"val": 490, "test": 120}[result["val_data"]]
    assert d["psnr"]["mean"] == pytest.approx(other["psnr"] - first["psnr"])
    cells = [str(first["images"])]
    cells += [f"{each['psnr']:.2f} / {each['lpips']:.4f}" for each in (first, other)]
    for metric in ("psnr", "ssim", "lpips"):
        decimals = output.METRICS[metric][1]
        mean, half_width = d[metric]["mean"], d[metric]["half_width"]
        cells.append(f"{mean:+.{decimals}f} ± {half_width:.{decimals}f}")
    cells.append(f"{100 * d['psnr']['better']:.0f} %")
    assert f"| {' | '.join(cells)} |" in (ROOT / "RESULTS.md").read_text()
    assert not re.search(r'"/|[ =]/', file.read_text())  # no folder


@pytest.mark.parametrize(
    "broken",
    [
        {"ssim": "x"},
        {"lpips": []},
        {"precision": 16},
        {"environment": {"command": "python train.py", "device": "a CPU", "commit": []}},
        {"environment": {"command": "python train.py", "device": "a CPU", "processes": "two"}},
        {"floors": {"bicubic": {"l1": 1, "psnr": 1, "paper": None}, "mean_colour": {}}},
        {"validations": None},
        {"validations": [{}]},
        {"validations": [{"step": [], "psnr": 1.0}]},
    ],
    ids=str,
)
def test_entries_of_another_type_are_damage(broken, tmp_path):
    run = make_run(tmp_path / "run") / "results.json"
    run.write_text(json.dumps({**json.loads(run.read_text()), **broken}))
    found, (fault,) = read_results([str(run)])
    assert not found and next(iter(broken)) in fault


def test_a_bar_in_a_name_is_no_column():
    table = output.markdown_table(["name", "x"], [["a|b", 1]])
    assert table.splitlines()[-1] == r"| a\|b | 1 |"
