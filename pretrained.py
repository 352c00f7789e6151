"""Weights of pretrained networks: from torch.hub's folder, or downloaded into it once."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

import util

DOWNLOAD_TIMEOUT = 20.0  # seconds without an answer before a download is given up
Network = TypeVar("Network")

# LPIPS network -> (backbone, by its name in lpips.pretrained_networks; its ImageNet weights,
# torchvision's; smallest side whose pooled feature maps are not empty).
WEIGHTS = "https://download.pytorch.org/models/"
LPIPS_NETS = {
    "vgg": ("vgg16", f"{WEIGHTS}vgg16-397923af.pth", 16),
    "alex": ("alexnet", f"{WEIGHTS}alexnet-owt-7be5be79.pth", 31),
    "squeeze": ("squeezenet", f"{WEIGHTS}squeezenet1_1-b8a52dc0.pth", 17),
}


class WeightsMissing(ValueError):
    """A network's weights are neither cached nor downloadable, or the file is not usable."""


def load_pretrained(name: str, url: str, build: Callable[[dict[str, Tensor]], Network]) -> Network:
    """Load the state dict at `url`, which never executes anything, and build a network from it.

    `name` says in the error message what needs the weights.

    Raises:
        WeightsMissing: the file is not cached and not downloadable, damaged, or of another network.
    """
    path = Path(torch.hub.get_dir()).absolute() / "checkpoints" / url.rsplit("/", 1)[-1]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torch.hub has no argument for it
    try:
        # weights_only: a file from a cache folder must not be able to run code.
        state = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
        return build(state)
    except Exception as error:  # no network, no space, a wrong hash; damage can raise anything
        if path.is_file():
            what = f"cannot be loaded ({type(error).__name__}): delete it and fetch {url} again"
        else:
            reason = " ".join(str(error).split()) or type(error).__name__
            what = f"could not be downloaded ({reason}): fetch {url} and put it there"
        raise WeightsMissing(f"{name} needs {path}, which {what}") from error
    finally:
        socket.setdefaulttimeout(timeout)


def build_in_all(build: Callable[[], Network]) -> Network:
    """Call `build` in all processes of a group and return its result. A collective.

    One process of each machine goes first, so that weights are downloaded once.

    Raises:
        WeightsMissing: in all processes, if they are missing in one.
    """
    network, problem = None, None
    first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    for my_turn in (first_here, not first_here):
        if my_turn and not problem:
            try:
                network = build()
            except WeightsMissing as error:
                problem = str(error)
        problem = next(filter(None, util.from_all(problem)), None)
    if problem:
        raise WeightsMissing(problem)
    return network
