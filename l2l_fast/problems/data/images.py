"""More image sets with ten classes: Fashion-MNIST (IDX files) and CIFAR-10 (its binary version).

Both give the same kind of object as MNIST: a name, a folder and three disjoint splits of uint8 images. Validation is a
sixth of the training images (pairs (2k, 2k + 1) with k % 6 == 5, as for MNIST); test is the published test set.

Neither set is in the package. Fashion-MNIST (Xiao et al. 2017, MIT licence): the Debian package
``dataset-fashion-mnist`` puts it into ``/usr/share/datasets/fashion-mnist``. CIFAR-10 (Krizhevsky 2009): the archive
``cifar-10-binary.tar.gz``, unpacked.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .idx import read_idx
from .splits import ImageData, cut

FASHION_VARIABLE = "L2L_FAST_FASHION_MNIST"
CIFAR_VARIABLE = "L2L_FAST_CIFAR10"
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")

_CIFAR_TRAIN = tuple(f"data_batch_{k}.bin" for k in range(1, 6))
_CIFAR_TEST = ("test_batch.bin",)
_CIFAR_SHAPE = (3, 32, 32)
_CLASSES = 10

_loaded: dict[tuple[str, Path], ImageData] = {}
_load_lock = threading.Lock()


def load_fashion_mnist(folder: str | os.PathLike[str] | None = None) -> ImageData:
    """Fashion-MNIST, images uint8 ``[n, 28, 28]``; read and checked once per process and folder.

    Args:
        folder: with the four IDX files, compressed or not. Default: what the environment variable
            ``L2L_FAST_FASHION_MNIST`` names, or the folder of the Debian package.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or images and labels do not belong together.
    """
    place = Path(folder or os.environ.get(FASHION_VARIABLE) or FASHION_FOLDER).expanduser().resolve()
    return _once("fashion-mnist", place, _read_fashion)


def load_cifar10(folder: str | os.PathLike[str] | None = None) -> ImageData:
    """CIFAR-10, images uint8 ``[n, 3, 32, 32]`` (red, green, blue); read and checked once per process and folder.

    A file of the binary version is a sequence of records of 3,073 bytes: the label 0..9, then the red, green and blue
    planes of 32 x 32 bytes, row by row. Files with fewer records than the published 10,000 are read as well.

    Args:
        folder: with ``data_batch_1.bin`` ... ``data_batch_5.bin`` and ``test_batch.bin``, or that contains
            ``cifar-10-batches-bin``. Default: what the environment variable ``L2L_FAST_CIFAR10`` names.

    Raises:
        FileNotFoundError: a file is missing, or no folder is named.
        ValueError: a file is cut short or holds a label beyond 9.
    """
    named = folder or os.environ.get(CIFAR_VARIABLE)
    if not named:
        raise FileNotFoundError(
            f"CIFAR-10 is not in this package: give its folder, or set the environment variable {CIFAR_VARIABLE}"
        )
    return _once("cifar-10", Path(named).expanduser().resolve(), _read_cifar)


def read_cifar10_file(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """One file of the binary version: images uint8 ``[n, 3, 32, 32]``, labels int64 ``[n]``; errors as above."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: no such file: {str(path)!r}")
    values = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    record = 1 + int(np.prod(_CIFAR_SHAPE))
    if len(values) == 0 or len(values) % record:
        raise ValueError(f"{path}: {len(values)} bytes are not a number of records of {record} bytes")
    records = values.reshape(-1, record)
    labels = records[:, 0].astype(np.int64)
    if labels.max() >= _CLASSES:
        raise ValueError(f"{path}: record {int(labels.argmax())} has the label {int(labels.max())}, expected 0..9")
    return records[:, 1:].reshape(-1, *_CIFAR_SHAPE).copy(), labels


def _once(name: str, folder: Path, read: Callable[[Path], ImageData]) -> ImageData:
    with _load_lock:
        if (name, folder) not in _loaded:
            _loaded[name, folder] = read(folder)
        return _loaded[name, folder]


def _read_fashion(folder: Path) -> ImageData:
    pairs = []
    for stem in ("train", "t10k"):
        paths = [_idx_file(folder, f"{stem}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        images, labels = (read_idx(path) for path in paths)
        if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{folder}: expected images [n, 28, 28] and n labels, got {images.shape} and {labels.shape} ({stem})"
            )
        if labels.max(initial=0) >= _CLASSES:
            raise ValueError(f"{paths[1]}: holds the label {labels.max()}, expected 0..9")
        pairs.append((images, labels.astype(np.int64)))
    return cut("fashion-mnist", folder, *pairs)


def _idx_file(folder: Path, stem: str) -> Path:
    for name in (stem + ".gz", stem):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"Fashion-MNIST: {folder / stem}(.gz) is missing. The Debian package dataset-fashion-mnist has it; "
        f"name another folder in {FASHION_VARIABLE}"
    )


def _read_cifar(folder: Path) -> ImageData:
    below = folder / "cifar-10-batches-bin"
    place = below if below.is_dir() else folder
    missing = [name for name in (*_CIFAR_TRAIN, *_CIFAR_TEST) if not (place / name).is_file()]
    if missing:
        raise FileNotFoundError(f"CIFAR-10 is not complete in {place}: missing {', '.join(missing)}")
    pairs = []
    for names in (_CIFAR_TRAIN, _CIFAR_TEST):
        parts = [read_cifar10_file(place / name) for name in names]
        pairs.append((np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])))
    return cut("cifar-10", folder, *pairs)
