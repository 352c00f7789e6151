import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate

import exits
import metric
import output
from checkpoint import NotFinite
from fid import FrechetDistance
from loss import Perceptual
from metric import CodeUsage, ImageMetrics, evaluate, format_results, usage_note
from networks import IMAGENET_STD
from similarity import PSNR_CAP, l1, psnr, ssim

STD = torch.tensor(IMAGENET_STD, dtype=torch.float64)


@pytest.fixture(scope="module")
def squeeze(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several are slower for images this small
    torch_home = tmp_path_factory.mktemp("torch")
    (torch_home / "hub" / "checkpoints").mkdir(parents=True)
    state = torchvision.models.squeezenet1_1(weights=None).state_dict()
    torch.save(state, torch_home / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(torch_home))
        yield Perceptual("squeeze")
    torch.set_num_threads(threads)


def flat(*levels, side=12):
    """Grey images of the given [0, 1] levels."""
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, side, side)


def pictures(n, side=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=generator)


class Fake(nn.Module):
    """Keeps the mean of every f x f block; two stages of made-up indices, one of 2^40 codes."""

    f = 4

    def __init__(self):
        super().__init__()
        self.quantizer = SimpleNamespace(
            codebook_sizes=[16, 2**40],
            stage_axis=True,
            bits_with_side_information=lambda positions: 44 + 50 / positions,
        )
        self.frozen = nn.Dropout().eval()
        self.seen_training = None

    def forward(self, images):
        self.seen_training = self.training
        small = avg_pool2d(images, self.f)
        level = (small * 1e6).long()
        indices = torch.stack([level[:, 0] % 16, level[:, 1] * 1_000_003], dim=-1)
        return interpolate(small, scale_factor=self.f), indices, torch.zeros(())


# ---------------------------------------------------------------------------- image metrics


def test_per_image_values_by_hand():
    a = torch.zeros(3, 3, 2, 2)
    b = torch.tensor([0.1, 0.01, 0.0]).view(3, 1, 1, 1).expand_as(a)
    torch.testing.assert_close(l1(a, b), torch.tensor([0.1, 0.01, 0.0]))
    torch.testing.assert_close(psnr(a, b), torch.tensor([20.0, 40.0, PSNR_CAP]))
    assert psnr(a, b, peak=2.0)[0].item() == pytest.approx(26.0206, abs=1e-4)
    half = torch.zeros(1, 3, 2, 2)
    half[:, :, 0] = 0.2  # half of the pixels: MSE 0.02, L1 0.1
    assert l1(a[:1], half).item() == pytest.approx(0.1)
    assert psnr(a[:1], half).item() == pytest.approx(-10 * math.log10(0.02), abs=1e-4)


def test_ssim_by_hand():
    """One window of 11 pixels: weighted means and covariances in plain Python, and two limits."""
    weights = [math.exp(-(i**2) / 4.5) for i in range(-5, 6)]
    weights = [w / sum(weights) for w in weights]
    row = [0.1, 0.3, 0.2, 0.9, 0.5, 0.6, 0.4, 0.8, 0.7, 0.0, 1.0]
    other = [0.2, 0.3, 0.1, 0.7, 0.6, 0.6, 0.5, 0.5, 0.8, 0.1, 0.9]

    def mean(values):
        return sum(w * x for w, x in zip(weights, values, strict=True))

    m_a, m_b = mean(row), mean(other)
    s_a, s_b = mean([x * x for x in row]) - m_a**2, mean([x * x for x in other]) - m_b**2
    s_ab = mean([x * y for x, y in zip(row, other, strict=True)]) - m_a * m_b
    c1, c2 = 0.0001, 0.0009
    expected = (2 * m_a * m_b + c1) * (2 * s_ab + c2)
    expected /= (m_a**2 + m_b**2 + c1) * (s_a + s_b + c2)
    # The same in all rows, and in one of the three channels; the others are equal: 1.
    a, b = (torch.tensor(values).expand(1, 3, 11, 11).clone() for values in (row, other))
    b[:, 1:] = a[:, 1:]
    assert ssim(a, b).item() == pytest.approx((expected + 2) / 3, abs=1e-6)
    assert ssim(a.mT, b.mT).item() == pytest.approx((expected + 2) / 3, abs=1e-6)

    images = pictures(2, 24) / 255
    assert ssim(images, images).tolist() == [1, 1]
    assert (ssim(images, 1 - images) < -0.8).all()
    flat_areas = flat(0.95) + 0.01 * torch.randn(1, 3, 12, 12)
    noisy = flat_areas + 0.01 * torch.randn_like(flat_areas)
    exact = ssim(flat_areas.double(), noisy.double()).item()
    assert ssim(flat_areas, noisy).item() == pytest.approx(exact, abs=5e-6)
    # Constant images have no structure: only the means differ.
    black_and_white = ssim(flat(0.0, 0.5), flat(1.0, 0.5))
    assert black_and_white.tolist() == pytest.approx([c1 / (1 + c1), 1], abs=1e-6)
    # A corner lies in one window alone: the border is not padded.
    images = images.double()  # for its weight of 1e-6
    changed = images.clone()
    changed[0, :, 0, 0] = 1 - changed[0, :, 0, 0]
    assert 1 - 1e-6 < ssim(images, changed)[0] < 1 and ssim(images, changed)[1] == 1


@pytest.mark.parametrize("size", [(11, 11), (24, 17), (40, 64)])
def test_ssim_is_that_of_scikit_image(size):
    from skimage.metrics import structural_similarity

    generator = np.random.default_rng(0)
    smooth = generator.random((6, 3, *size)).cumsum(axis=-1) % 1
    smooth[3:] = 0.95 + 0.05 * smooth[3:]  # bright: small variances beside large means
    noisy = (smooth + generator.normal(0, 0.02, smooth.shape)).clip(0, 1)
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1)
    expected = [
        structural_similarity(a, b, channel_axis=0, **options)
        for a, b in zip(smooth, noisy, strict=True)
    ]
    a, b = torch.tensor(smooth), torch.tensor(noisy)
    assert ssim(a, b).tolist() == pytest.approx(expected, abs=1e-12)
    assert ssim(a.float(), b.float()).tolist() == pytest.approx(expected, abs=5e-5)


def test_field_and_paper_units_by_hand():
    metrics = ImageMetrics(None)
    metrics.update(flat(0.5, 0.5), flat(0.6, 0.51))
    result = metrics.compute()
    assert result["images"] == 2 and result["lpips"] is None and result["paper"]["lpips"] is None
    assert result["l1"] == pytest.approx((0.1 + 0.01) / 2, rel=1e-5)
    assert result["psnr"] == pytest.approx((20 + 40) / 2, abs=1e-3)  # not the PSNR of the mean MSE
    assert result["paper"]["l1"] == pytest.approx(0.055 * (1 / STD).mean().item(), rel=1e-5)
    mse = (1 / STD**2).mean().item()  # of a difference of 1 in [0, 1]
    similarity = [(2 * 0.5 * x + 1e-4) / (0.25 + x**2 + 1e-4) for x in (0.6, 0.51)]
    assert result["ssim"] == pytest.approx(sum(similarity) / 2, abs=1e-6)
    assert "ssim" not in result["paper"]
    expected = [10 * math.log10(4 / (mse * d**2)) for d in (0.1, 0.01)]
    assert result["paper"]["psnr"] == pytest.approx(sum(expected) / 2, abs=1e-3)


def test_only_the_field_s_units_are_clamped():
    metrics = ImageMetrics(None)
    metrics.update(flat(1.0, 0.0), flat(1.3, -0.3))
    result = metrics.compute()
    assert result["l1"] == pytest.approx(0, abs=1e-6) and result["psnr"] > 99
    assert result["ssim"] == pytest.approx(1, abs=1e-6)
    assert result["paper"]["l1"] == pytest.approx(0.3 * (1 / STD).mean().item(), rel=1e-5)
    assert result["paper"]["psnr"] < 20


def test_lpips_columns_and_their_inputs(squeeze):
    images = pictures(2) / 255
    reconstruction = images * 1.5 - 0.2  # leaves [0, 1]
    metrics = ImageMetrics(squeeze)
    metrics.update(images, reconstruction)
    result = metrics.compute()
    a, b = images, reconstruction
    field = squeeze(a.clamp(0, 1), b.clamp(0, 1)).mean().item()
    paper = squeeze(a, b, paper_range=True).mean().item()
    assert result["lpips"] == pytest.approx(field, rel=1e-5)
    assert result["paper"]["lpips"] == pytest.approx(paper, rel=1e-5)
    assert abs(field - paper) > 1e-4 and abs(field - squeeze(a, b).mean().item()) > 1e-4


def test_partial_batch_weighs_its_images():
    metrics = ImageMetrics(None)
    metrics.update(flat(0.5, 0.5), flat(0.6, 0.6))
    metrics.update(flat(0.5), flat(0.9))
    assert metrics.compute()["l1"] == pytest.approx(0.2, rel=1e-5)  # the mean of means is 0.25


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reconstruction_that_is_not_finite_has_no_metrics(value):
    metrics = ImageMetrics(None, paper=False)
    metrics.update(flat(0.5), flat(0.5))
    metrics.update(flat(1.0), flat(value))
    with pytest.raises(NotFinite):
        metrics.compute()


def test_bad_images_are_refused(squeeze):
    with pytest.raises(ValueError, match="no images"):
        ImageMetrics(None).compute()
    with pytest.raises(ValueError, match=r" -0\.03 to 0\.5:"):
        ImageMetrics(None).update(flat(0.5, -0.03), flat(0.5, 0.5))
    with pytest.raises(ValueError, match=r" 0\.5 to 1\.03:"):
        ImageMetrics(None).update(flat(0.5, 1.03), flat(0.5, 0.5))
    ImageMetrics(None).update(flat(-0.01, 1.01), flat(0.5, 0.5))
    with pytest.raises(ValueError, match="nan"):
        ImageMetrics(None).update(flat(float("nan")), flat(0.5))
    with pytest.raises(ValueError, match="equal"):
        ImageMetrics(None).update(flat(0.5, 0.5), flat(0.5))
    with pytest.raises(ValueError, match="at least 17 pixels"):
        ImageMetrics(squeeze).update(flat(0.5, side=16), flat(0.5, side=16))
    with pytest.raises(ValueError, match="at least 11 pixels a side; got 11x10"):
        ImageMetrics(None).update(torch.ones(1, 3, 11, 10), torch.ones(1, 3, 11, 10))


# ---------------------------------------------------------------------------- references


def test_references_keep_constant_images():
    images = flat(0.0, 0.3, 1.0, side=16)
    torch.testing.assert_close(metric.bicubic_reference(images, 4), images, atol=1e-5, rtol=0)
    torch.testing.assert_close(metric.mean_colour_reference(images), images, atol=1e-6, rtol=0)


def test_mean_colour_is_the_mean_of_each_channel():
    images = pictures(2) / 255
    reference = metric.mean_colour_reference(images)
    expected = pictures(2).double().mean(dim=(2, 3)) / 255
    torch.testing.assert_close(reference[:, :, 3, 7].double(), expected, atol=1e-6, rtol=0)
    assert reference.shape == images.shape and reference.std(dim=(2, 3)).max() < 1e-6


def test_bicubic_reference_is_antialiased_and_clamped():
    checks = torch.zeros(1, 3, 16, 16)
    checks[..., ::2, ::2] = checks[..., 1::2, 1::2] = 1  # finer than any f = 4 image can show
    reference = metric.bicubic_reference(checks, 4)
    assert (reference - 0.5).abs().max() < 0.05
    edge = torch.zeros(1, 3, 16, 16)
    edge[..., 8:] = 1  # bicubic rings at it
    reference = metric.bicubic_reference(edge, 4)
    assert reference.min() >= -1e-6 and reference.max() <= 1 + 1e-6
    assert 0.01 < (reference - edge).abs().mean() < 0.2


def test_the_bicubic_reference_is_bicubic_on_the_way_up():
    """An edge, row by row of the small image, by the kernel with a = -3/4."""
    edge = torch.full((1, 3, 32, 32), 0.25)
    edge[..., 16:] = 0.75  # nothing is clamped
    small = interpolate(edge, size=(8, 8), mode="bicubic", antialias=True)[0, 0, 4].tolist()

    def kernel(x, a=-0.75):
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4)

    reference = metric.bicubic_reference(edge, 4)[0, 0, 9]
    for i in range(32):
        at = (i + 0.5) / 4 - 0.5
        near = range(math.floor(at) - 1, math.floor(at) + 3)
        wanted = sum(kernel(abs(at - k)) * small[min(max(k, 0), 7)] for k in near)
        assert reference[i].item() == pytest.approx(wanted, abs=1e-5)


# ---------------------------------------------------------------------------- code usage


def test_usage_by_hand():
    usage = CodeUsage([8, 4])
    usage.update(torch.tensor([[[0, 3], [0, 3]], [[1, 3], [2, 3]]]))  # (B, positions, stages)
    first, second = usage.compute()
    assert first == {
        "stage": 1,
        "codebook_size": 8,
        "used": 3,
        "share": 3 / 8,
        "perplexity": 2**1.5,
        "entropy_bits": 1.5,  # 1/2 * 1 + 2 * 1/4 * 2
        "tokens": 4,
    }
    assert (second["used"], second["perplexity"], second["entropy_bits"]) == (1, 1.0, 0.0)


@pytest.mark.parametrize("merge_at", [0, 50, 10**6])
def test_sparse_equals_dense(monkeypatch, merge_at):
    indices = torch.randint(0, 40, (20, 3, 5), generator=torch.Generator().manual_seed(0)) ** 2
    dense = CodeUsage([2000])
    dense.update(indices)
    monkeypatch.setattr(metric, "DENSE_LIMIT", 0)
    monkeypatch.setattr(metric, "MERGE_ABOVE", merge_at)
    sparse = CodeUsage([2000])
    for batch in indices.split(3):
        sparse.update(batch)
    assert (len(sparse.parts[0]) < 8) == (merge_at < 10**6)  # 7 batches and the empty start
    assert dense.compute() == sparse.compute()
    assert dense.compute()[0]["used"] == len(indices.unique())
    assert dense.compute()[0]["tokens"] == indices.numel()


def test_codebook_of_2_to_the_40():
    usage = CodeUsage([2**40])
    usage.update(torch.tensor([[0, 2**40 - 1], [5, 5]]))
    (stage,) = usage.compute()
    assert (stage["used"], stage["entropy_bits"], stage["share"]) == (3, 1.5, 3 / 2**40)


def test_few_tokens_for_a_codebook_are_said():
    usage = CodeUsage([2, 4, 2**40])
    usage.update(torch.randint(2, (5, 2, 2, 3)))  # 20 tokens a stage
    few = "stage 2, 3 are too low: 20 tokens are few for so many codes"
    assert usage_note(usage.compute()) == f"used, perplexity and entropy of {few}"
    assert usage_note(usage.compute()[:1]) == ""


def test_stage_axis_of_a_single_stage():
    usage = CodeUsage([8], stage_axis=True)
    usage.update(torch.zeros(2, 3, 3, 1, dtype=torch.int64))
    assert usage.compute()[0]["tokens"] == 18
    with pytest.raises(ValueError, match="stages"):
        usage.update(torch.zeros(2, 3, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("indices", "message"),
    [([[0, 8]], "stage 1 range from 0 to 8"), ([[-1, 0]], "from -1 to 0"), ([[0.0, 1.0]], "float")],
)
def test_bad_indices_are_refused(indices, message):
    usage = CodeUsage([8])
    with pytest.raises(ValueError, match=message):
        usage.update(torch.tensor(indices))
    with pytest.raises(ValueError, match="no indices"):
        usage.compute()


# ---------------------------------------------------------------------------- evaluate


def test_evaluate(squeeze):
    model, images = Fake().train(), pictures(5)
    model.frozen.eval()
    result = evaluate(model, images.split(2), squeeze, "cpu")
    assert model.training and not model.frozen.training and model.seen_training is False
    assert (result["images"], result["image_size"], result["f"]) == (5, [20, 20], 4)
    assert result["bits"] == 44 + 50 / 25  # 5 x 5 positions
    assert result["bpp"] == pytest.approx(46 / 16)
    assert result["lpips_net"] == "squeeze"
    expected = ImageMetrics(squeeze)
    expected.update(images / 255, model(images / 255)[0])
    expected = expected.compute()
    assert result["ssim"] == pytest.approx(expected["ssim"], rel=1e-5)
    for name in ("l1", "psnr", "lpips"):
        assert result[name] == pytest.approx(expected[name], rel=1e-5)
        assert result["paper"][name] == pytest.approx(expected["paper"][name], rel=1e-5)
    floors = result["floors"]
    assert floors["bicubic"]["psnr"] > floors["mean_colour"]["psnr"] > 5
    assert floors["bicubic"]["ssim"] > floors["mean_colour"]["ssim"] > 0
    assert [stage["tokens"] for stage in result["stages"]] == [125, 125]

    text = format_results(result)
    for part in ("PSNR dB (peak 1)", "L1 [0,1]", "LPIPS-squeeze", "bicubic x4", "mean colour"):
        assert part in text
    assert f"{result['psnr']:.2f}" in text and f"{result['paper']['l1']:.4f}" in text
    model = re.findall("^model +(.*)", text, re.M)  # in the field's units, and in the paper's
    assert f"{result['psnr']:.2f}  {result['ssim']:.4f}" in re.sub(" +", "  ", model[0])
    assert [len(line.split()) for line in model] == [4, 3]
    assert "46 bits per position, f = 4, 2.875 bpp" in text and "missing" not in text


def test_metrics_of_each_image(squeeze):
    images = pictures(5)
    result = evaluate(Fake(), images.split(2), squeeze, "cpu", per_image=True)
    alone = [evaluate(Fake(), [image], squeeze, "cpu", final=False) for image in images.split(1)]
    for name in ("l1", "psnr", "ssim", "lpips"):
        values = result["per_image"][name]
        assert values == pytest.approx([each[name] for each in alone], rel=1e-4)
        assert len({*values}) == 5 and result[name] == pytest.approx(sum(values) / 5)
    assert "per_image" not in alone[0]


def test_evaluate_without_lpips_the_paper_s_units_and_lower_bounds():
    result = evaluate(Fake(), pictures(2).split(2), None, "cpu", final=False)
    assert result["lpips"] is None and result["lpips_net"] is None
    assert "floors" not in result and "paper" not in result
    text = format_results(result)
    assert "missing" in text and "LPIPS is missing: " in text and "bicubic" not in text


def test_evaluate_restores_the_mode_after_an_error():
    model = Fake().train()
    with pytest.raises(ValueError, match="no images"):
        evaluate(model, [], None, "cpu")
    model.quantizer.codebook_sizes = [1, 1]
    with pytest.raises(ValueError, match="stage 1"):
        evaluate(model, [pictures(1)], None, "cpu")
    assert model.training


def test_evaluate_stops_between_batches():
    model, asked = Fake().train(), []

    def stop():
        asked.append(True)
        return len(asked) > 2

    with pytest.raises(exits.Interrupted):
        evaluate(model, pictures(6).split(2), None, "cpu", stop=stop)
    assert model.training and len(asked) == 4  # before each of three batches, and at the end


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("seconds, told", [(4, []), (20, [2, 4, 6])])
def test_a_log_says_every_30_seconds_how_far_an_evaluation_is(
    seconds, told, shown, monkeypatch, capfd
):
    now = 0

    class Slow(Fake):
        def forward(self, images):
            nonlocal now
            now += seconds
            return super().forward(images)

    monkeypatch.setattr(output, "SECONDS_A_LINE", 30)
    monkeypatch.setattr(output, "time", SimpleNamespace(monotonic=lambda: now))
    evaluate(Slow(), pictures(6).split(1), None, "cpu", progress=shown)
    lines = [f"evaluate: {batches} of 6 batches" for batches in told if shown]
    assert capfd.readouterr().err.splitlines() == lines


def mean_colours(images):
    """Features for rFID."""
    return images.float().mean(dim=(2, 3))


def one_process(rank, folder, shards):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = []
    for sizes in shards:
        mine = pictures(7).split(sizes)[rank]
        options = dict(frechet=FrechetDistance(mean_colours), per_image=True)
        results.append(evaluate(Fake(), mine.split(2) if len(mine) else [], None, "cpu", **options))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    shards = [(5, 2), (7, 0)]  # uneven, and one that is empty
    # Forked: nothing is imported again, which takes longer than the work.
    start = torch.multiprocessing.start_processes
    start(one_process, (str(tmp_path), shards), nprocs=2, start_method="fork")
    options = dict(frechet=FrechetDistance(mean_colours), per_image=True)
    single = evaluate(Fake(), pictures(7).split(3), None, "cpu", **options)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    for result in first:
        assert result["stages"] == single["stages"]
        assert result["rfid"] == pytest.approx(single["rfid"], rel=1e-6, abs=1e-9)
        values, of_one = result["per_image"], single["per_image"]  # the shards lie in this order
        assert values["lpips"] is of_one["lpips"] is None
        for name in ("l1", "psnr", "ssim"):
            assert len(values[name]) == 7 and values[name] == pytest.approx(of_one[name], rel=1e-5)
        for a, b in ((result, single), (result["floors"]["bicubic"], single["floors"]["bicubic"])):
            assert a["ssim"] == pytest.approx(b["ssim"], rel=1e-6)
            for name in ("l1", "psnr"):
                assert a[name] == pytest.approx(b[name], rel=1e-6)
                assert a["paper"][name] == pytest.approx(b["paper"][name], rel=1e-6)
        for name in ("images", "image_size", "bits", "bpp"):
            assert result[name] == single[name]
