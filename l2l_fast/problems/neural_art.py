"""Neural art: a picture with the content of a photograph in the style of another (Andrychowicz et al. 2016, section
3.4, after Gatys et al. 2015). The optimizee's parameters are the pixels."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.checks import non_negative, positive_int
from .base import FLOAT32, Problem, Task
from .data import photographs
from .data.vgg import FILES, VGG16, load_vgg16

CONTENT_LAYER = "conv4_2"
STYLE_LAYERS = ("conv1_1", "conv2_1", "conv3_1", "conv4_1", "conv5_1")
_LAYERS = (*STYLE_LAYERS, CONTENT_LAYER)
_GREY = 127.5
_LEVELS = 255.0
_SMALLEST = 32  # conv5_1 sees a sixteenth of it


class NeuralArtTask(Task):
    """f(theta) = content_weight L_content + style_weight L_style + smooth_weight L_reg.

    - L_content: squared distance of the activities of conv4_2 from the photograph's, relative to their squared norm.
    - L_style: squared distance of the Gram matrices of conv1_1, conv2_1, ..., conv5_1 from the style's, relative to
      their squared norm, averaged over the layers.
    - L_reg: mean squared difference of neighbouring pixels, in units of the range of a pixel.

    The parameter ``pixels`` float32 ``[3, side, side]`` (red, green, blue) is in grey levels of 0..255 around the
    middle, so that an output of 1 changes a pixel by one level. ``forward()`` returns f times the number of values in
    ``pixels``, and ``num_problems`` takes the factor out of reported losses: gradients then do not shrink with the
    resolution. ``content`` is the photograph.
    """

    def __init__(
        self,
        generator: torch.Generator,
        vgg: VGG16,
        content: Tensor,
        style_grams: dict[str, Tensor],
        weights: tuple[float, float, float],
        init_std: float,
    ) -> None:
        super().__init__(generator)
        self._vgg, self._grams, self._weights = vgg, style_grams, weights
        self.content = content
        with torch.no_grad():
            self._content = vgg.features(content, (CONTENT_LAYER,))[CONTENT_LAYER]
        value = torch.randn(content.shape, generator=generator, **FLOAT32) * init_std
        self.pixels = nn.Parameter(value.to(content.device))
        self.num_problems = content.numel()

    @property
    def side_by_side(self) -> int:
        """One picture."""
        return 1

    def parts(self) -> dict[str, Tensor]:
        """The three losses, not weighted."""
        levels = (self.pixels + _GREY) / _LEVELS
        features = self._vgg.features(levels, _LAYERS)
        style = torch.stack([_relative(gram(features[name]), self._grams[name]) for name in STYLE_LAYERS])
        rows, columns = levels.diff(dim=1), levels.diff(dim=2)
        return {
            "content": _relative(features[CONTENT_LAYER], self._content),
            "style": style.mean(),
            "smooth": rows.square().mean() + columns.square().mean(),
        }

    def forward(self) -> Tensor:
        """f at the present pixels, times their number."""
        total = sum(weight * part for weight, part in zip(self._weights, self.parts().values()))
        assert isinstance(total, Tensor)
        return self.num_problems * total

    def picture(self) -> Tensor:
        """The picture so far, ``[3, side, side]`` in [0, 1]."""
        return ((self.pixels.detach() + _GREY) / _LEVELS).clamp(0, 1)


def gram(features: Tensor) -> Tensor:
    """Mean products of channels over positions, ``[channels, channels]``."""
    return features @ features.T / features.shape[1]


def _relative(value: Tensor, target: Tensor) -> Tensor:
    return (value - target).square().sum() / target.square().sum()


class NeuralArt(Problem):
    """Style transfer with one style and many photographs. Tasks differ in the photograph's random square and theta_0.

    The splits have different photographs. Neither the paper's weights of the three losses nor its layers nor the scale
    of theta_0 are published; the layers are those of Gatys et al. 2015, in VGG-16.

    Args:
        folder: with ``photographs/``, ``styles/`` and VGG-16's weights (``vgg16.safetensors``, ``.pth`` or ``.ckpt``),
            see :mod:`l2l_fast.data.photographs`; None: what ``L2L_FAST_NEURAL_ART`` names.
        style: name of the style's picture.
        side: pixels (the paper: 64 in training, 128 in test).
        content_weight, style_weight, smooth_weight: of the three losses.
        init_std: theta_0 ~ N(grey, init_std^2), in levels of 0..255.

    Raises:
        ValueError, TypeError: an option is out of its range, or a file is damaged.
        FileNotFoundError: a file is missing.
        ImportError: Pillow is missing.

    ``picture`` is the style's, ``[3, side, side]`` in [0, 1].
    """

    name = "neural-art"

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        style: str = "ihc",
        side: int = 64,
        content_weight: float = 1.0,
        style_weight: float = 1.0,
        smooth_weight: float = 1.0,
        init_std: float = 20.0,
    ) -> None:
        self.side = positive_int("side", side)
        if self.side < _SMALLEST:
            raise ValueError(f"side must be at least {_SMALLEST} pixels, got {self.side}")
        self.weights = (
            non_negative("content_weight", content_weight),
            non_negative("style_weight", style_weight),
            non_negative("smooth_weight", smooth_weight),
        )
        self.init_std = non_negative("init_std", init_std)
        if not isinstance(style, str):
            raise TypeError(f"style must be a name, got {style!r}")
        self.style = str(style)
        place = photographs.neural_art_folder(folder)
        found = [place / name for name in FILES if (place / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{place}: VGG-16's weights are missing, expected one of {', '.join(FILES)}")
        self.data = photographs.read_photographs(place)
        self._vgg = load_vgg16(found[0])
        self.picture = photographs.centre_square(photographs.read_style(place, style), self.side)
        with torch.no_grad():
            features = self._vgg.features(self.picture, STYLE_LAYERS)
        self._grams = {name: gram(value) for name, value in features.items()}

    def make_task(self, generator: torch.Generator, split: str, device: torch.device) -> NeuralArtTask:
        content = photographs.random_square(self.data.split(split), self.side, generator).to(device)
        vgg = self._vgg if device.type == "cpu" else self._vgg.to(device)
        grams = {name: value.to(device) for name, value in self._grams.items()}
        return NeuralArtTask(generator, vgg, content, grams, self.weights, self.init_std)

    def config(self) -> dict[str, Any]:
        """As ``Problem.config``; the folder is left out."""
        content, style, smooth = self.weights
        return {
            "name": self.name,
            "style": self.style,
            "side": self.side,
            "content_weight": content,
            "style_weight": style,
            "smooth_weight": smooth,
            "init_std": self.init_std,
        }
