"""The models in weights/: their sizes, and files of today that later code must read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from codec.codec import Codec
from dataset.synthetic import SyntheticDataset
from model import load_model
from similarity import psnr

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
BITS = {"rfsq_2x2048_ln": 22, "rfsq_4x1024_ln": 40, "svq_22bit": 22, "svq_40bit": 40}


def test_they_are_small_and_say_what_they_are():
    assert sorted(path.parent.name for path in WEIGHTS.glob("*/config.json")) == sorted(BITS)
    sizes = [(WEIGHTS / name / "model.safetensors").stat().st_size for name in BITS]
    assert max(sizes) < 400_000 and sum(sizes) < 2_000_000
    for name in BITS:
        card = (WEIGHTS / name / "README.md").read_text()
        assert "490 images of 128x128" in card and "python train.py" in card
        assert json.loads((WEIGHTS / name / "config.json").read_bytes())["training"]["step"]


@pytest.mark.parametrize("name", BITS)
def test_a_file_of_today_decodes_to_its_image(name):
    codec = Codec(WEIGHTS / name)
    assert codec.model.quantizer.bits == BITS[name]
    decoded = codec.decode((WEIGHTS / "samples" / f"{name}.rfsq").read_bytes()).astype(int)
    with Image.open(WEIGHTS / "samples" / f"{name}.png") as image:
        expected = np.asarray(image).astype(int)
    assert decoded.shape == expected.shape == (96, 100, 3)
    # Another processor may round a pixel that lies between two values differently.
    assert abs(decoded - expected).max() <= 1 and (decoded != expected).mean() < 0.001


def test_the_models_are_good_on_images_that_they_have_not_seen():
    images = torch.stack(list(SyntheticDataset(64, seed=5, length=4))) / 255
    values = {}
    for name in BITS:
        model, _, _ = load_model(WEIGHTS / name)
        decoded = model.decode(model.encode(images)).clamp(0, 1)
        values[name] = psnr(decoded, images).mean().item()
    assert values["rfsq_2x2048_ln"] > 20
    assert values["svq_22bit"] > values["rfsq_2x2048_ln"] + 1
    assert values["svq_40bit"] > values["rfsq_4x1024_ln"] + 1
