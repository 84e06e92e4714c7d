"""MNIST: the 10,000 embedded images or the full 70,000, cut into training, validation and test images.

The splits are disjoint; i is an image's index in the published order.

- ``mnist-10k-embedded``: the 10,000 test images, which are in the package. Three parts of equal size: train 3,334
  (i % 3 == 0), validation 3,333 (i % 3 == 1), test 3,333 (i % 3 == 2).
- ``mnist-60k``: all four published files, in a folder. Of the 60,000 training images train 50,000 and validation 10,000
  (i // 2 % 6 == 5); test: the 10,000 test images.

Parts are interleaved because the published order is not random: the two halves of the test images have different
writers, and the first is easier; the training images alternate between the two populations (mean pixel 31.3 at even i,
35.4 at odd i, which are much easier), so they are dealt out in pairs. The embedded parts have equal size because a
smaller set is memorised sooner: NAG at learning rate 1 takes the paper's perceptron within 100 steps to a loss of 0.18
on 3,333 images, 0.23 on 5,000 and 0.29 on 10,000. For the same reason losses on the embedded set are lower than
published ones, and comparable only with each other.
"""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .idx import read_idx
from .splits import ImageData, cut, pick

ENVIRONMENT_VARIABLE = "L2L_FAST_DATA"
EMBEDDED = "mnist-10k-embedded"
FULL = "mnist-60k"

_EMBEDDED_FOLDER = Path(__file__).parent / "mnist"
# Where a folder that a user names may keep the files: itself, our own layout, torchvision's.
_SUBFOLDERS = (".", "mnist", "MNIST/raw")


@dataclass(frozen=True)
class _File:
    """A published file; the checksum is of the uncompressed IDX contents, so that repacked copies are recognised."""

    stem: str
    shape: tuple[int, ...]
    sha256: str


_TEST_FILES = (
    _File(
        "t10k-images-idx3-ubyte",
        (10_000, 28, 28),
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    _File("t10k-labels-idx1-ubyte", (10_000,), "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
)
_TRAIN_FILES = (
    _File(
        "train-images-idx3-ubyte",
        (60_000, 28, 28),
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    _File("train-labels-idx1-ubyte", (60_000,), "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
)


_loaded: dict[Path, ImageData] = {}
_load_lock = threading.Lock()


def load_mnist(data: str | os.PathLike[str] | None = None) -> ImageData:
    """Load MNIST; read, checked and kept in memory once per process and folder.

    Args:
        data: a folder with the four published files (``train-images-idx3-ubyte.gz`` and so on, compressed or not),
            or "mnist-10k-embedded" for the images in the package, or "mnist-60k" for the full set in the folder that
            the environment variable ``L2L_FAST_DATA`` names. None: the full set if ``L2L_FAST_DATA`` is set, otherwise
            the embedded images.

    Raises:
        FileNotFoundError: a file is missing; the message lists which, and every path that was tried.
        ValueError: a file is damaged, has another size or is not the published one (SHA-256 of its contents).
        TypeError: ``data`` is neither None, a string nor a path.
    """
    folder = _folder_of(data)
    with _load_lock:
        if folder not in _loaded:
            _loaded[folder] = _load_embedded() if folder == _EMBEDDED_FOLDER else _load_full(folder)
        return _loaded[folder]


def _folder_of(data: str | os.PathLike[str] | None) -> Path:
    if data is not None and not isinstance(data, (str, os.PathLike)):
        raise TypeError(f"data must be None, a folder or the name of a data set, got {type(data).__name__}")
    if data is not None and data not in (EMBEDDED, FULL):
        return Path(data).expanduser().resolve()
    named = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if data == FULL and not named:
        raise FileNotFoundError(
            f'data="{FULL}" needs the full MNIST: set the environment variable {ENVIRONMENT_VARIABLE} to the folder '
            "that holds its four files (it is not set), or pass that folder as data"
        )
    if data == EMBEDDED or not named:
        return _EMBEDDED_FOLDER
    return Path(named).expanduser().resolve()


def _load_embedded() -> ImageData:
    images, labels = _read_pair(_EMBEDDED_FOLDER, _TEST_FILES)
    part = np.arange(len(labels)) % 3
    splits = {split: pick((images, labels), part == k) for k, split in enumerate(("train", "validation", "test"))}
    return ImageData(EMBEDDED, _EMBEDDED_FOLDER, splits)


def _load_full(folder: Path) -> ImageData:
    # Both pairs are looked up before any is read, so that one message names all that is missing.
    _find(folder, _TRAIN_FILES + _TEST_FILES)
    return cut(FULL, folder, _read_pair(folder, _TRAIN_FILES), _read_pair(folder, _TEST_FILES))


def _read_pair(folder: Path, files: tuple[_File, ...]) -> tuple[np.ndarray, np.ndarray]:
    paths = _find(folder, files)
    images, labels = (_read_checked(path, file) for path, file in zip(paths, files, strict=True))
    return images, labels


def _find(folder: Path, files: tuple[_File, ...]) -> list[Path]:
    found, missing, tried = [], [], []
    for file in files:
        candidates = [folder / sub / (file.stem + suffix) for sub in _SUBFOLDERS for suffix in (".gz", "")]
        there = [path for path in candidates if path.is_file()]
        if there:
            found.append(there[0])
        else:
            missing.append(file.stem + ".gz")
            tried.extend(candidates)
    if missing:
        raise FileNotFoundError(
            f"MNIST is not complete in {folder}{'' if folder.is_dir() else ' (no such folder)'}: missing "
            f"{', '.join(missing)} (compressed or not). Looked for:\n  "
            + "\n  ".join(str(path) for path in tried)
            + f"\nPut the published files there, name another folder in {ENVIRONMENT_VARIABLE}, "
            f'or use data="{EMBEDDED}".'
        )
    return found


def _read_checked(path: Path, file: _File) -> np.ndarray:
    digest = hashlib.sha256()
    array = read_idx(path, file.shape, on_bytes=digest.update)
    if digest.hexdigest() != file.sha256:
        raise ValueError(
            f"{path}: not the published {file.stem}: the SHA-256 of its uncompressed contents is {digest.hexdigest()}, "
            f"expected {file.sha256}"
        )
    return array
