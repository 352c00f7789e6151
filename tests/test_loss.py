import hashlib
import os
import re
import socket
import warnings

import lpips
import pytest
import torch
import torchvision
from torch import nn

from loss import Perceptual, TrainingLoss, WeightsMissing, perceptual
from networks import IMAGENET_MEAN, IMAGENET_STD

FILES = {
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
    "vgg": "vgg16-397923af.pth",
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several threads are slower for images this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A torch.hub folder with a SqueezeNet of random weights, as torchvision would cache it."""
    torch_home = tmp_path_factory.mktemp("torch")
    folder = torch_home / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = torchvision.models.squeezenet1_1(weights=None).state_dict()
    torch.save(state, folder / FILES["squeeze"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(torch_home))
        yield folder


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture(scope="module")
def squeeze(cache):
    return Perceptual("squeeze")


def pair(seed=0, side=33):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(3, 3, side, side, generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    return images, (images + 0.1 * noise).clamp(0, 1)


def serve_from(monkeypatch, url):
    backbone, _, side = perceptual.LPIPS_NETS["squeeze"]
    monkeypatch.setitem(perceptual.LPIPS_NETS, "squeeze", (backbone, url, side))


def test_the_weights_are_those_of_torchvision():
    names = {"alex": "AlexNet", "squeeze": "SqueezeNet1_1", "vgg": "VGG16"}
    urls = {
        net: getattr(torchvision.models, f"{name}_Weights").IMAGENET1K_V1.url
        for net, name in names.items()
    }
    assert urls == {net: url for net, (_, url, _) in perceptual.LPIPS_NETS.items()}


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------- the distance


def test_equal_images_are_at_distance_zero_also_after_train(squeeze):
    images, reconstruction = pair()
    before = squeeze(images, reconstruction)
    parent = nn.Sequential(squeeze).train()
    assert parent.training and not any(module.training for module in squeeze.modules())
    squeeze.train(True)
    assert torch.equal(squeeze(images, images), torch.zeros(3))
    assert torch.equal(squeeze(images, reconstruction), before)
    assert before.min() > 1e-4


@pytest.mark.parametrize("net", ["squeeze", "alex", pytest.param("vgg", marks=pytest.mark.slow)])
def test_value_equals_the_package_s_own(net, cache):
    """The package is given its own random backbone; this reads it back under torchvision's names.

    SqueezeNet is loaded by the package itself, through torchvision, from the same file.
    """
    images, reconstruction = pair()
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        if net == "squeeze":
            reference = lpips.LPIPS(net=net, verbose=False)
        else:  # without the classifiers, whose initialisation takes seconds
            model = torchvision.models.alexnet if net == "alex" else torchvision.models.vgg16
            features = model_features(model)
            torch.save(features, cache / FILES[net])
            with torch.device("meta"):
                reference = lpips.LPIPS(net=net, pnet_rand=True, pretrained=False, verbose=False)
            reference.scaling_layer = lpips.ScalingLayer()
            linear = os.path.join(lpips.__path__[0], "weights", "v0.1", f"{net}.pth")
            state = torch.load(linear, map_location="cpu", weights_only=True)
            for name in reference.net.state_dict():
                index = name.split(".", 1)[1]  # slice2.5.weight is the list's 5.weight
                state[f"net.{name}"] = features[f"features.{index}"]
            state |= {f"lins.{name[3:]}": tensor for name, tensor in state.items() if "lin" in name}
            missing, _ = reference.load_state_dict(state, strict=False, assign=True)
            assert all("scaling" in name for name in missing)
    module = Perceptual(net)
    with torch.no_grad():
        expected = reference(images, reconstruction, normalize=True).flatten()
        expected_paper = reference(images, reconstruction).flatten()  # no [0, 1] -> [-1, 1]
        assert expected.min() > 1e-4
    torch.testing.assert_close(module(images, reconstruction), expected, atol=1e-6, rtol=1e-5)
    paper = module(images, reconstruction, paper_range=True)
    torch.testing.assert_close(paper, expected_paper, atol=1e-6, rtol=1e-5)
    assert (expected - expected_paper).abs().min() > 1e-5


def model_features(model):
    with torch.device("meta"):
        features = model(weights=None).features
    features = features.to_empty(device="cpu")
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            layer.reset_parameters()
    return {f"features.{name}": tensor for name, tensor in features.state_dict().items()}


def test_gradient_reaches_the_reconstruction_and_nothing_else(squeeze):
    images, reconstruction = pair()
    images.requires_grad_()
    reconstruction.requires_grad_()
    squeeze(images, reconstruction).sum().backward()
    assert reconstruction.grad.abs().sum() > 0 and reconstruction.grad.isfinite().all()
    assert images.grad is None
    assert not any(parameter.requires_grad for parameter in squeeze.parameters())
    assert all(parameter.grad is None for parameter in squeeze.parameters())


def test_gradient_is_finite_where_all_features_are_zero(cache):
    module = Perceptual("squeeze")
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    # What the scaling layer maps to exactly 0, in the range that has no rounding before it.
    black = module.scaling.shift.expand(1, 3, 33, 33).clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anomaly detection says that it is on
        with torch.autograd.detect_anomaly(check_nan=True):
            module(pair()[0][:1], black, paper_range=True).sum().backward()
    assert black.grad.isfinite().all()


def test_distance_is_float32_under_autocast(cache):
    module = Perceptual("squeeze")
    module.blocks[0][0].weight.mul_(3000)  # activations whose squares float16 cannot hold
    images, reconstruction = pair()
    with torch.autocast("cpu", dtype=torch.float16):
        distance = module(images, reconstruction.half())
        assert 300 < module.blocks[0](images).max() < 65000
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, module(images, reconstruction), rtol=0.02, atol=1e-4)


@pytest.mark.slow
def test_graph_has_no_break(squeeze):
    torch._dynamo.reset()
    compiled = torch.compile(squeeze, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*pair()), squeeze(*pair()))


def test_building_it_draws_no_random_number(cache):
    before = torch.get_rng_state()
    Perceptual("squeeze")
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_inputs_are_named(squeeze):
    images, reconstruction = pair()
    with pytest.raises(ValueError, match=r"at least 17 pixels a side; got 16x16"):
        squeeze(*pair(side=16))
    assert squeeze(*pair(side=17)).shape == (3,)
    with pytest.raises(ValueError, match="equal shapes"):
        squeeze(images, reconstruction[:1])
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        squeeze((images * 255).byte(), reconstruction)
    with pytest.raises(ValueError, match=r"'resnet'; allowed: vgg, alex, squeeze"):
        Perceptual("resnet")


# ---------------------------------------------------------------------------- the weights


def test_missing_weights_are_one_line(empty_cache, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # closed again below: nothing listens there
    url = f"http://127.0.0.1:{port}/{FILES['squeeze']}"
    serve_from(monkeypatch, url)
    with pytest.raises(WeightsMissing) as error:
        Perceptual("squeeze")
    message = one_line(error)
    for part in (FILES["squeeze"], str(empty_cache), url, "--perceptual-weight 0"):
        assert part in message
    assert isinstance(error.value, ValueError) and not list(empty_cache.iterdir())


def test_a_server_that_never_answers_is_given_up(empty_cache, monkeypatch):
    monkeypatch.setattr("pretrained.DOWNLOAD_TIMEOUT", 0.2)
    before = socket.getdefaulttimeout()
    with socket.create_server(("127.0.0.1", 0)) as server:
        serve_from(monkeypatch, f"http://127.0.0.1:{server.getsockname()[1]}/net-00.pth")
        with pytest.raises(WeightsMissing, match="timed out"):
            Perceptual("squeeze")
    assert socket.getdefaulttimeout() == before


def test_download_is_checked_against_its_hash(cache, empty_cache, tmp_path, monkeypatch):
    whole = (cache / FILES["squeeze"]).read_bytes()
    name = f"net-{hashlib.sha256(whole).hexdigest()[:8]}.pth"
    (tmp_path / name).write_bytes(whole[:-1000])
    serve_from(monkeypatch, (tmp_path / name).as_uri())
    with pytest.raises(WeightsMissing, match="hash"):
        Perceptual("squeeze")
    assert not list(empty_cache.iterdir())
    (tmp_path / name).write_bytes(whole)
    Perceptual("squeeze")
    assert (empty_cache / name).read_bytes() == whole


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("damage", ["truncated", "empty", "other network", "not weights", "code"])
def test_unusable_file_is_named(damage, cache, empty_cache, tmp_path):
    empty_cache.mkdir(parents=True)
    path = empty_cache / FILES["squeeze"]
    whole = (cache / FILES["squeeze"]).read_bytes()
    if damage in ("truncated", "empty"):
        path.write_bytes(whole[: len(whole) // 2 if damage == "truncated" else 0])
    else:
        state = torch.load(cache / FILES["squeeze"], weights_only=True)
        state["features.0.weight"] = torch.zeros(64, 3, 11, 11)
        content = {"other network": state, "not weights": [1], "code": Bomb(tmp_path / "boom")}
        torch.save(content[damage], path)
    with pytest.raises(WeightsMissing, match=re.escape(str(path))) as error:
        Perceptual("squeeze")
    one_line(error)
    assert not (tmp_path / "boom").exists()


# ---------------------------------------------------------------------------- the training loss


def test_terms_and_weighted_total(squeeze):
    images, reconstruction = pair()
    own = torch.tensor(0.5)
    terms = TrainingLoss(2.0, 3.0, 5.0, squeeze)(images, reconstruction, own)
    assert list(terms) == ["loss", "l1", "perceptual", "quantizer"]
    distance = squeeze(images, reconstruction).mean()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    normalised = ((images - mean) / std, (reconstruction - mean) / std)
    torch.testing.assert_close(terms["l1"], (normalised[0] - normalised[1]).abs().mean())
    torch.testing.assert_close(terms["perceptual"], distance)
    assert terms["quantizer"] == own
    torch.testing.assert_close(terms["loss"], 2 * terms["l1"] + 3 * distance + 5 * own)


def test_the_perceptual_term_has_the_gradient_of_the_reconstruction(squeeze):
    images, reconstruction = pair()
    reconstruction.requires_grad_()
    loss = TrainingLoss(0.0, 2.0, 0.0, squeeze)(images, reconstruction, torch.zeros(()))["loss"]
    (gradient,) = torch.autograd.grad(loss, reconstruction)
    (wanted,) = torch.autograd.grad(2 * squeeze(images, reconstruction).mean(), reconstruction)
    torch.testing.assert_close(gradient, wanted)
    assert gradient.any()


def test_weight_zero_leaves_a_term_out():
    images, reconstruction = pair()
    loss = TrainingLoss(1.0, 0.0, 0.0, None)
    terms = loss(images, reconstruction, torch.tensor(float("inf")))
    assert "perceptual" not in terms and torch.equal(terms["loss"], terms["l1"])


@pytest.mark.parametrize("weights", [(-1, 0, 1), (1, float("nan"), 1), (0, 0, 0), (1, 0.5, 1)])
def test_impossible_weights(weights):
    with pytest.raises(ValueError, match="weight"):
        TrainingLoss(*weights, perceptual=None)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="equal"):
        TrainingLoss(1, 0, 1)(torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 8, 8), torch.zeros(()))


def test_integers_are_refused_and_the_std_of_imagenet_stays():
    loss, images = TrainingLoss(1.0, 0.0, 1.0), torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"floats in .*, not torch.uint8"):
        loss(images.byte(), images, torch.zeros(()))
    wanted = loss(images, images + 0.1, torch.zeros(()))["l1"]
    for moved in (loss.half(), loss.to("meta").to_empty(device="cpu")):
        assert torch.equal(moved(images, images + 0.1, torch.zeros(()))["l1"], wanted)
