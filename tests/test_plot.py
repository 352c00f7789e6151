"""scripts/plot.py: the curves of runs, from their logs."""

import json
import sys

import pytest
from PIL import Image
from test_report import make_run

import exits
from scripts import keep_results, plot


def make_log(folder, losses, psnr, **others):
    """A log with a training record every 10 steps, and an evaluation at the last one."""
    folder.mkdir(parents=True)
    step = 10 * len(losses)
    records = [
        {"kind": "train", "step": 10 * i, "loss": loss} for i, loss in enumerate(losses, start=1)
    ]
    records.append({"kind": "val", "step": step, "psnr": psnr, "l1": 0.1, "lpips": None, **others})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_curves_of_two_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    make_log(tmp_path / "a" / "old", [0.5, None, 0.25], 20.0)  # without SSIM; a skipped interval
    make_log(tmp_path / "new", [0.4, 0.3], 25.0, ssim=0.75)
    with open(tmp_path / "new" / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "train", "step": 30, "lo\n\xff\xfe\n[1]\n')
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    figures, draw = [], plot.draw
    monkeypatch.setattr(plot, "draw", lambda curves: figures.append(draw(curves)) or figures[-1])
    out = tmp_path / "x.png"
    names = [str(tmp_path / "*"), str(tmp_path / "new" / "metrics.jsonl")]  # one run named twice
    assert plot.main([*names, f"--out={out}"]) == out
    said, warned = capsys.readouterr()
    assert "warning: nothing is logged of empty: left out" in warned
    assert "new/metrics.jsonl: 3 damaged lines skipped" in said
    (figure,) = figures
    shown = {
        axes.get_title(): {
            line.get_color(): list(zip(*map(list, line.get_data()), strict=True))
            for line in axes.lines
        }
        for axes in figure.axes
    }
    (legend,) = figure.legends
    colours = {
        text.get_text(): line.get_color()
        for text, line in zip(legend.texts, legend.get_lines(), strict=True)
    }
    old, new = colours["a/old"], colours["new"]
    assert len(colours) == 2 and old != new
    assert shown == {
        "training loss": {old: [(10, 0.5), (30, 0.25)], new: [(10, 0.4), (20, 0.3)]},
        "validation PSNR dB": {old: [(30, 20.0)], new: [(20, 25.0)]},
        "validation SSIM": {new: [(20, 0.75)]},
        "validation L1 [0,1]": {old: [(30, 0.1)], new: [(20, 0.1)]},
    }
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear", "linear", "linear"]
    with Image.open(out) as image:
        assert image.format == "PNG" and image.width > 2 * image.height

    make_log(tmp_path / "lfq", [0.5, -0.5], 20.0)  # a logarithm would leave out its second half
    plot.main([str(tmp_path / "lfq"), f"--out={out}"])
    assert figures[1].axes[0].get_yscale() == "linear"
    plot.main([*names, f"--out={out}", "--panels", "psnr", "loss", "psnr"])
    titles = [axes.get_title() for axes in figures[2].axes]
    assert titles == ["validation PSNR dB", "training loss"]


def test_numbers_that_cannot_be_drawn_are_left_out(tmp_path):
    make_log(tmp_path / "a", [0.5, 10**400, 1e308, 0.25], 20.0)
    assert plot.read_curves([str(tmp_path)], ["loss"]) == {
        "training loss": {"a": [(10, 0.5), (40, 0.25)]}
    }


def test_networks_of_lpips_have_a_panel_each(tmp_path):
    for name, net, lpips in (("a", "alex", 0.1), ("b", "vgg", 0.3), ("c", "alex", 0.2)):
        make_log(tmp_path / name, [0.5], 20.0, lpips=lpips, lpips_net=net)
    assert plot.read_curves([str(tmp_path)], ["lpips", "psnr"]) == {
        "validation LPIPS-alex": {"a": [(10, 0.1)], "c": [(10, 0.2)]},
        "validation LPIPS-vgg": {"b": [(10, 0.3)]},
        "validation PSNR dB": {name: [(10, 20.0)] for name in "abc"},
    }


def test_kept_results_are_drawn_beside_runs(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    curve = [{"step": step, "psnr": float(step), "lpips": None} for step in (1, 2)]
    for seed in (0, 1):
        run = make_run(tmp_path / f"{seed}", ["--name=LN"], seed, validations=curve[: 2 - seed])
        keep_results.main([str(run), "--out", str(tmp_path / "kept")])
    keep_results.main([str(make_run(tmp_path / "old", ["--name=old"])), f"--out={tmp_path}/kept"])
    make_log(tmp_path / "run", [0.5], 20.0)
    curves = plot.read_curves([str(tmp_path / name) for name in ("kept", "run")], ["psnr", "lpips"])
    assert curves == {
        "validation PSNR dB": {
            f"run ({tmp_path / 'run'})": [(10, 20.0)],
            "LN (ln-f4-conv-1000-s0)": [(1, 1.0), (2, 2.0)],
            "LN (ln-f4-conv-1000-s1)": [(1, 1.0)],
        }
    }
    assert "nothing is logged of old (old-f4-conv-1000-s0): left out" in capsys.readouterr().err
    (alone,) = plot.read_curves([f"{tmp_path}/kept/ln*-s0.json"], ["psnr"]).values()
    assert alone == {"LN": [(1, 1.0), (2, 2.0)]}

    # A run and its own kept copy are one curve.
    (tmp_path / "0" / "metrics.jsonl").write_text(
        "".join(json.dumps({"kind": "val", **record}) + "\n" for record in curve)
    )
    both = [f"{tmp_path}/0", f"{tmp_path}/kept"]
    (lines,) = plot.read_curves(both, ["psnr"]).values()
    assert lines == {"0": [(1, 1.0), (2, 2.0)], "LN": [(1, 1.0)]}


def test_no_two_of_many_runs_look_alike(tmp_path):
    pytest.importorskip("matplotlib")
    for number in range(25):
        make_log(tmp_path / f"{number:02}", [0.5], 20.0 + number)
    figure = plot.draw(plot.read_curves([str(tmp_path)], ["psnr"]))
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == 25


def test_bad_input_is_one_line_and_code_2(tmp_path, capfd, monkeypatch):
    pytest.importorskip("matplotlib")
    make_log(tmp_path / "run", [0.5], 20.0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "metrics.jsonl").write_text("{\n")
    run = str(tmp_path / "run")
    for flags, part in (
        ([str(tmp_path / "nowhere")], "nowhere holds no metrics.jsonl"),
        ([str(tmp_path / "empty")], "empty holds no metrics.jsonl"),
        ([run, str(tmp_path / "nowhere")], "nowhere holds no metrics.jsonl"),
        ([str(tmp_path / "damaged")], "nothing to draw"),
        ([run, "--out=x.jpg"], "x.jpg is no PNG"),
        ([run, f"--out={tmp_path / 'nowhere' / 'x.png'}"], "x.png cannot be written"),
        ([], "RUN"),
    ):
        with pytest.raises(SystemExit) as caught:
            exits.run_script(lambda flags=flags: plot.main(flags))
        lines = capfd.readouterr().err.strip().splitlines()
        assert caught.value.code == 2 and len(lines) == 1 and part in lines[0], (flags, lines)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pip install"):
        plot.main([run, f"--out={tmp_path / 'x.png'}"])
    assert not (tmp_path / "x.png").exists()


def test_a_name_with_dollars_is_no_formula(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("matplotlib")
    for name in ("cost $x^$", "from $5 to $6"):
        make_log(tmp_path / name, [0.5, 0.25], 20.0)
    figure = plot.draw(plot.read_curves(["cost $x^$", "from $5 to $6"], ["loss"]))
    figure.canvas.draw()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [r"cost \$x^\$", r"from \$5 to \$6"]
