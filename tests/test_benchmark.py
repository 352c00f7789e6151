"""The benchmark: finite positive numbers in every section, with and without the other package."""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import exits
import timing
from quantizers import FSQ, LFQ, RFSQ, VectorQuantizeEMA
from scripts import benchmark

TINY = ["--threads=1", "--repeats=2", "--z-batch=1", "--latent=2", "--batch-size=1"]
TINY += ["--channel=8", "--img-size=16", "--loader-images=6"]


class TheirLFQ(LFQ):
    def __init__(self, dim, **options):
        super().__init__(dim, **options)

    def forward(self, z, inv_temperature, return_loss_breakdown=False):
        self.temperature = 1 / inv_temperature
        return (None, (*self.entropies(z), 0)) if return_loss_breakdown else super().forward(z)


# The interface of vector-quantize-pytorch, which the tests do not need, by our own quantizers.
THEIRS = SimpleNamespace(
    FSQ=FSQ,
    LFQ=TheirLFQ,
    ResidualFSQ=lambda levels, num_quantizers, is_channel_first: RFSQ(num_quantizers, "none"),
    VectorQuantize=lambda dim, codebook_size, **options: VectorQuantizeEMA(codebook_size, dim),
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(timing, "COPY_MIB", 1)
    monkeypatch.setattr(timing, "MATRIX", 256)
    monkeypatch.setattr(timing, "TURN", 0.002)
    monkeypatch.setattr(benchmark, "LOADER_BATCH", 2)
    monkeypatch.setattr(benchmark, "LOADER_SECONDS", 0.01)


def numbers(x):
    """All floats in a nested structure."""
    if isinstance(x, dict | list):
        return [n for y in (x.values() if isinstance(x, dict) else x) for n in numbers(y)]
    return [x] if isinstance(x, float) else []


def check(rows):
    values = numbers([{k: v for k, v in row.items() if "off by" not in k} for row in rows])
    assert values and all(math.isfinite(v) and v > 0 for v in values)
    for spread in (row["ratio"] for row in rows if "ratio" in row):
        assert spread["min"] <= spread["median"] <= spread["max"]


@pytest.mark.slow
def test_every_section_and_the_json(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, benchmark.PACKAGE, THEIRS)
    monkeypatch.setattr(benchmark, "version", lambda name: "1.0")
    result = benchmark.main([*TINY, f"--json={tmp_path / 'all.json'}"])
    text = capsys.readouterr().out
    saved = json.loads((tmp_path / "all.json").read_text())
    assert {"environment", "flags", "limits", "quantizers", "step", "loader"} == saved.keys()
    assert saved["limits"] == result["limits"] and saved["environment"]["threads"] == 1
    check([result["limits"]])
    rows = [r for section in ("quantizers", "step", "loader") for r in result[section].items()]
    for name, part in rows:
        check(part["rows"])
        assert part["title"] in text, name
    times = result["quantizers"]["times"]["rows"]
    assert [row["quantizer"] for row in times if "ratio" not in row] == ["lfq-18"]
    against = [row["against"] for row in times if row["quantizer"].startswith("svq")]
    assert against == ["ema-2x2048", "ema-2x2048", "ema-4x1024"]
    assert len(times) == 13
    for row in result["quantizers"]["entropies"]["rows"]:
        assert row["ours off by"] < 1e-6 and row["theirs off by"] < 1e-6
    parts = {row["part"]: row["share"] for row in result["step"]["parts"]["rows"]}
    assert list(parts) == ["encoder", "quantizer", "decoder", "forward", "backward", "optimizer"]
    assert sum(parts.values()) == pytest.approx(1)
    loader = [(r["images"], r["workers"]) for r in result["loader"]["times"]["rows"]]
    assert loader == [("folder", 1), ("packed", 1), ("packed", 4)]


def test_without_their_package_the_rest_runs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, benchmark.PACKAGE, None)  # importing it fails
    result = benchmark.main([*TINY, "--only=quantizers"])
    assert "pip install '.[benchmark]'" in capsys.readouterr().out
    check(result["quantizers"]["times"]["rows"])
    compared = [r["quantizer"] for r in result["quantizers"]["times"]["rows"] if "ratio" in r]
    assert compared == ["svq-22bit", "svq-44bit-pairs", "svq-40bit"]  # against our own


def test_some_quantizers_alone(capsys):
    result = benchmark.main([*TINY, "--only=quantizers", "--match=4x1024"])["quantizers"]
    names = [row["quantizer"] for row in result["times"]["rows"]]
    assert len(names) == 3 and all("4x1024" in name for name in names)
    assert "entropies" not in result
    assert "step" not in result and "loader" not in result


@pytest.mark.slow
def test_your_own_images(tmp_path):
    for i in range(5):
        Image.new("RGB", (20, 30)).save(tmp_path / f"{i}.png")
    flags = [*TINY, "--only=loader", f"--originals={tmp_path}", "--loader-images=3"]
    part = benchmark.main(flags)["loader"]["times"]
    assert f"3 of {tmp_path}" in part["title"]
    check(part["rows"])


@pytest.mark.slow
def test_lpips_without_its_weights(no_lpips):
    result = benchmark.main([*TINY, "--only=step", "--lpips-net=vgg"])["step"]
    assert "LPIPS(vgg, random weights)" in result["times"]["title"]
    assert "LPIPS" in [row["part"] for row in result["parts"]["rows"]]
    check(result["times"]["rows"])


def test_peak_memory_is_that_of_the_tensors():
    def call():
        x = torch.ones(2**20)  # 4 MiB
        y = x + 1
        del x
        return y * 2

    assert timing.peak_memory(call) == pytest.approx(8, abs=0.1)


@pytest.mark.parametrize(
    ("flag", "part"),
    [
        ("--only=quantisers", "quantisers"),
        ("--repeats=0", "repeats"),
        ("--match=vq2", "vq2"),
        ("--img-size=18", "18"),
        ("--originals=nowhere", "nowhere"),
        ("--json=nowhere/all.json", "nowhere/all.json"),
    ],
)
def test_bad_input_is_one_line_and_code_2(flag, part, capsys):
    with pytest.raises(SystemExit) as caught:
        exits.run_script(lambda: benchmark.main([*TINY, flag]))
    captured = capsys.readouterr()
    assert caught.value.code == 2 and not captured.out
    assert len(captured.err.strip().splitlines()) == 1 and part in captured.err
