"""rFID: the formula against known Gaussians, the sums against their definition, the script."""

import io
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from conftest import make_checkpoint
from PIL import Image
from scipy.linalg import sqrtm

from dataset.synthetic import SyntheticDataset
from fid import WEIGHTS, FrechetDistance, frechet_distance, inception_distance
from scripts import evaluate

F64 = dict(dtype=torch.float64)


def rotation(angle):
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.tensor([[cos, -sin], [sin, cos]], **F64)


def test_distance_of_known_gaussians():
    zero, mean = torch.zeros(2, **F64), torch.tensor([3.0, 4.0], **F64)
    a, b = torch.diag(torch.tensor([4.0, 9.0], **F64)), torch.diag(torch.tensor([1.0, 25.0], **F64))
    assert frechet_distance(mean, zero, a, a) == pytest.approx(25)
    # Independent coordinates: squared differences of the standard deviations.
    assert frechet_distance(zero, zero, a, b) == pytest.approx((2 - 1) ** 2 + (3 - 5) ** 2)
    # The distance does not depend on the axes, and is symmetric.
    turn = rotation(0.7)
    turned = [turn @ cov @ turn.T for cov in (a, b)]
    assert frechet_distance(turn @ mean, zero, *turned) == pytest.approx(25 + 5)
    # Covariances that do not commute; of 2x2, tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)).
    other = turn @ b @ turn.T
    product = a @ other
    root = (product.trace() + 2 * product.det().sqrt()).sqrt().item()
    expected = (a.trace() + other.trace()).item() - 2 * root
    assert expected > 5.1
    assert frechet_distance(zero, zero, a, other) == pytest.approx(expected)
    assert frechet_distance(zero, zero, other, a) == pytest.approx(expected)
    # Singular covariances, as of fewer images than features.
    line, point = torch.diag(torch.tensor([4.0, 0.0], **F64)), torch.zeros(2, 2, **F64)
    assert frechet_distance(zero, zero, line, b) == pytest.approx((2 - 1) ** 2 + 25)
    assert frechet_distance(zero, mean, line, point) == pytest.approx(25 + 4)
    assert frechet_distance(zero, zero, point, point) == 0


def features(images):
    """Mean and spread of each channel: six features; uint8 alone, as Inception takes it."""
    assert images.dtype == torch.uint8
    x = images.float().flatten(2)
    return torch.cat([x.mean(dim=2), x.std(dim=2)], dim=1)


def test_sums_over_batches_are_means_and_covariances():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8, generator=generator)
    # Not 8 bits, and outside [0, 1]: clamped and rounded before the network sees it.
    reconstruction = images / 255 * 1.3 - 0.1 + 0.001
    distance = FrechetDistance(features)
    for a, b in zip(images.split(4), reconstruction.split(4), strict=True):
        distance.update(a, b)
    rounded = torch.tensor(np.rint(reconstruction.clamp(0, 1).numpy() * 255).astype(np.uint8))
    x, y = (features(batch).double().numpy() for batch in (images, rounded))
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert distance.compute() == pytest.approx(expected, rel=1e-6)
    exact = FrechetDistance(features)
    exact.update(images, images / 255)
    assert exact.compute() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("images", [0, 1])
def test_one_image_has_no_covariance(images):
    distance = FrechetDistance(features)
    if images:
        distance.update(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=f"two images or more, not {images}"):
        distance.compute()


@pytest.fixture
def flags(tmp_path):
    (tmp_path / "val").mkdir()
    for i, image in enumerate(SyntheticDataset(32, 3, 5)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "val" / f"{i}.png")
    make_checkpoint(tmp_path / "last.pt", "--channel=8", "--img-size=32", "--perceptual-weight=0")
    where = [f"--load={tmp_path / 'last.pt'}", f"--val-data-path={tmp_path / 'val'}"]
    return [*where, "--num-workers=0", "--batch-size=2", f"--json={tmp_path / 'out.json'}"]


class Extractor(torch.nn.Module):
    """torch-fidelity's class, but for the network: five weights and `features`."""

    def __init__(self, name, features_list, feature_extractor_weights_path):
        assert (name, features_list) == ("inception-v3-compat", ["2048"])
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(5))
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, images):
        return (features(images) * self.scale[0],)


def test_rfid_of_a_checkpoint(flags, tmp_path, monkeypatch, no_lpips, capsys):
    module = type(sys)("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", type(sys)("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    without = evaluate.main(flags)
    assert "rfid" not in without and "rFID" not in capsys.readouterr().out

    # No weights, and no way to fetch them: one line, and everything else is reported.
    file = tmp_path / "torch" / "hub" / "checkpoints" / WEIGHTS.rsplit("/", 1)[1]
    result = evaluate.main([*flags, "--fid"])
    said = capsys.readouterr().out
    (line,) = (line for line in said.splitlines() if "rFID will be missing" in line)
    assert f"rFID needs {file}, which could not be downloaded (no network in tests)" in line
    assert f"fetch {WEIGHTS} and put it there" in line and "\nrFID missing: " in said
    assert json.loads((tmp_path / "out.json").read_text())["rfid"] is None
    assert all(result[key] == without[key] for key in ("psnr", "ssim", "l1", "stages", "floors"))

    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"scale": torch.full((5,), 2.0)}, file)
    result = evaluate.main([*flags, "--fid"])
    method = "5 reconstructions against the same images, resized and centre-cropped to 32x32"
    (line,) = re.findall("^rFID .*", capsys.readouterr().out, re.M)
    assert line.startswith(f"rFID {result['rfid']:.3f}: ") and method in line
    assert json.loads((tmp_path / "out.json").read_text())["rfid"] == result["rfid"] > 1
    torch.save({"scale": torch.full((5,), 4.0)}, file)
    again = evaluate.main([*flags, "--fid"])
    assert again["rfid"] == pytest.approx(4 * result["rfid"])  # twice the features

    torch.save({"other": torch.zeros(3)}, file)
    assert evaluate.main([*flags, "--fid"])["rfid"] is None
    assert f"{file}, which cannot be loaded (RuntimeError): delete it" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, module.__name__, None)
    with pytest.raises(ValueError, match=r"needs torch-fidelity: pip install '\.\[fid\]'"):
        evaluate.main([*flags, "--fid"])


def test_inception_of_torch_fidelity(tmp_path, no_lpips):
    """Its class takes our calls: the file of weights, 8-bit images of any size, 2048 features."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class WithoutWeights(FeatureExtractorInceptionV3):
        def load_state_dict(self, _):
            pass

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.device("meta"):
        network = WithoutWeights("x", ["2048"], feature_extractor_weights_path=empty)
    state = network.to_empty(device="cpu").state_dict()
    for value in state.values():
        value.fill_(0.01)
    file = tmp_path / "torch" / "hub" / "checkpoints" / WEIGHTS.rsplit("/", 1)[1]
    file.parent.mkdir(parents=True)
    torch.save(state, file)
    distance = inception_distance(torch.device("cpu"))
    distance.update(torch.full((2, 3, 24, 32), 255, dtype=torch.uint8), torch.ones(2, 3, 24, 32))
    images, reconstruction = distance.moments
    assert images.shape == (1 + 2048, 1 + 2048) and images[0, 0] == 2
    assert torch.equal(images, reconstruction) and images[0, 1:].isfinite().all()
