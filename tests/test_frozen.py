"""Today's code against the losses, weights, checkpoints and files of commit 1350f45.

`golden/record.py` wrote them. Losses and weights are equal within 1e-4: another processor changes
them by 4e-7, another order of operations by 1e-6.
"""

import json

import numpy as np
import pytest
from golden import record
from PIL import Image

from scripts import compress

GOLDEN = record.ROOT / "tests" / "golden"
FROZEN = json.loads((GOLDEN / "frozen.json").read_text())
DECODED = sorted(path.stem for path in GOLDEN.glob("*.rfsq"))


@pytest.mark.parametrize("name", record.FROZEN)
def test_losses_and_weights_are_those_of_the_record(name, tmp_path):
    was, now = FROZEN["runs"][name], record.train(record.FROZEN[name], tmp_path / "run")
    assert len(now["loss"]) == FROZEN["steps"]
    assert now["loss"] == pytest.approx(was["loss"], rel=1e-4)
    assert now["psnr"] == pytest.approx(was["psnr"], rel=1e-4)
    assert now["norms"] == pytest.approx(was["norms"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", DECODED)
def test_old_files_decode_to_the_old_image(name, tmp_path):
    if name.endswith("coded"):
        pytest.importorskip("constriction")
    load = ["--load", str(GOLDEN / f"{name}.pt"), "--out", str(tmp_path)]
    compress.main(["decode", str(GOLDEN / f"{name}.rfsq"), *load])
    was, now = (
        np.asarray(Image.open(folder / f"{name}.png")).astype(int) for folder in (GOLDEN, tmp_path)
    )
    assert was.shape == now.shape
    difference = abs(was - now)
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-3


@pytest.mark.parametrize("name", DECODED)
def test_files_written_today_are_the_old_ones(name, tmp_path):
    """An index may differ where a latent lies in the middle between two codes."""
    if name.endswith("coded"):
        pytest.importorskip("constriction")
    load = ["--load", str(GOLDEN / f"{name}.pt"), "--out", str(tmp_path)]
    coded = ["--entropy-coding"] if name.endswith("coded") else []
    compress.main(["encode", str(GOLDEN / "image.png"), *load, *coded])
    now, was = (tmp_path / "image.rfsq").read_bytes(), (GOLDEN / f"{name}.rfsq").read_bytes()
    assert now[:23] == was[:23]  # with the fingerprint of the model
    if not coded:
        differ = sum(a != b for a, b in zip(now[23:-4], was[23:-4], strict=True))
        assert differ <= 2


@pytest.mark.slow
def test_an_old_run_goes_on(tmp_path):
    """A checkpoint of that commit resumes, under its flags' old names too."""
    flags = record.FROZEN[record.RESUMABLE]
    argv = [
        *record.SIZE,
        *flags.split(),
        "--codebook-weight",
        "1",
        "--codebook-loss-weight",
        "0.25",
    ]
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    (run / "last.pt").write_bytes((GOLDEN / f"{record.RESUMABLE}.pt").read_bytes())
    import train

    longer = [x if x != str(record.STEPS) else str(record.STEPS + 5) for x in argv]
    result = train.main([*longer, "--resume", str(run)])
    assert result["steps"] == record.STEPS + 5


@pytest.mark.parametrize("name", ["ema", "ema-residual", "lfq", "geometric"])
def test_every_quantizer_has_an_entropy_coder(name, tmp_path):
    pytest.importorskip("constriction")
    image, coded = str(GOLDEN / "image.png"), str(tmp_path / "coded.pt")
    compress.main(["fit", image, "--load", str(GOLDEN / f"{name}.pt"), "--out", coded])
    flags = ["--load", coded, "--out", str(tmp_path)]
    compress.main(["encode", image, *flags, "--entropy-coding"])
    compress.main(["decode", str(tmp_path / "image.rfsq"), *flags])
    was, now = (
        np.asarray(Image.open(path)).astype(int)
        for path in (GOLDEN / f"{name}.png", tmp_path / "image.png")
    )
    assert abs(was - now).max() <= 1
