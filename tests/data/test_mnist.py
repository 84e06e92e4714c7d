"""The MNIST loader: what it finds, what it refuses, and what it says when something is missing."""

import copy
import gzip
import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from l2l_fast.problems.data import EMBEDDED, ENVIRONMENT_VARIABLE, FULL, load_mnist, mnist

PACKAGED = Path(mnist.__file__).parent / "mnist"
GIVEN = os.environ.get(ENVIRONMENT_VARIABLE, "")


@pytest.fixture(autouse=True)
def no_data_in_the_environment(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(mnist, "_loaded", {})


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def small_full_set(tmp_path, monkeypatch):
    """Four files of the right kind, but with 60 training and 10 test images, and the loader told so."""
    rng = np.random.default_rng(0)
    for attribute, stem, count in (("_TRAIN_FILES", "train", 60), ("_TEST_FILES", "t10k", 10)):
        files = []
        for kind, values in (
            ("images-idx3", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)),
            ("labels-idx1", np.arange(count, dtype=np.uint8)),
        ):
            contents = idx(values)
            name = f"{stem}-{kind}-ubyte"
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(contents))
            files.append(mnist._File(name, values.shape, hashlib.sha256(contents).hexdigest()))
        monkeypatch.setattr(mnist, attribute, tuple(files))
    return tmp_path


def test_embedded_set_is_the_published_one() -> None:
    data = load_mnist()
    assert data.name == EMBEDDED == "mnist-10k-embedded"
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 3334,
        "validation": 3333,
        "test": 3333,
    }
    histogram = sum(torch.bincount(split.labels, minlength=10) for split in data.splits.values())
    assert histogram.tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    # The first test image is the well-known 7; each third image belongs to the same split.
    assert [data.split(name).labels[0].item() for name in ("train", "validation", "test")] == [7, 2, 1]
    for split in data.splits.values():
        assert split.images.dtype == torch.uint8
        assert split.images.shape == (len(split), 28, 28)
        assert split.labels.dtype == torch.int64


def test_embedded_splits_share_no_image() -> None:
    data = load_mnist()
    images = torch.cat([split.images for split in data.splits.values()]).flatten(1)
    assert len(torch.unique(images, dim=0)) == 10_000


def test_images_are_read_once_and_shared() -> None:
    assert load_mnist() is load_mnist(EMBEDDED)
    split = load_mnist().split("train")
    assert copy.deepcopy(split) is split
    assert split.to("cpu") is split
    assert split.to(None) is split
    assert split.to("meta") is split.to("meta")
    with pytest.raises(ValueError, match=r"split must be one of \('train', 'validation', 'test'\), got 'dev'"):
        load_mnist().split("dev")


@pytest.mark.parametrize("how", ["argument", "environment", "by name"])
@pytest.mark.parametrize("layout", [".", "mnist", "MNIST/raw"])
def test_full_set(small_full_set, monkeypatch, how, layout) -> None:
    if layout != ".":
        (small_full_set / layout).mkdir(parents=True)
        for file in small_full_set.glob("*.gz"):
            file.rename(small_full_set / layout / file.name)
    if how != "argument":
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(small_full_set))
    data = load_mnist({"argument": small_full_set, "environment": None, "by name": FULL}[how])
    assert data.name == FULL == "mnist-60k"
    assert data.folder == small_full_set
    # Pairs, because images at even and at odd places have different writers.
    held_out = [i for k in range(10, 60, 12) for i in (k, k + 1)]
    assert data.split("validation").labels.tolist() == held_out
    assert sorted(data.split("train").labels.tolist() + held_out) == list(range(60))
    assert data.split("test").labels.tolist() == list(range(10))


def test_uncompressed_and_repacked_copies_are_accepted(small_full_set) -> None:
    file = small_full_set / "train-images-idx3-ubyte.gz"
    contents = gzip.decompress(file.read_bytes())
    file.unlink()
    file.with_suffix("").write_bytes(contents)
    labels = small_full_set / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(gzip.decompress(labels.read_bytes()), compresslevel=1))
    assert len(load_mnist(small_full_set).split("train")) == 50


def test_the_embedded_set_can_be_asked_for_whatever_the_environment(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "nowhere"))
    assert load_mnist(EMBEDDED).name == EMBEDDED
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    assert load_mnist().name == EMBEDDED


def test_missing_files_are_listed_with_every_place_looked_at(small_full_set) -> None:
    for name in ("train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"):
        (small_full_set / f"{name}.gz").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load_mnist(small_full_set)
    message = str(caught.value)
    assert "missing train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz (compressed or not)" in message
    for place in ("train-labels-idx1-ubyte.gz", "train-labels-idx1-ubyte", "mnist/t10k-images-idx3-ubyte.gz"):
        assert str(small_full_set / place) + "\n" in message
    assert "train-images" not in message
    assert ENVIRONMENT_VARIABLE in message


def test_missing_folder_and_missing_variable(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none \(no such folder\): missing train-images"):
        load_mnist(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r'data="mnist-60k" needs the full MNIST.*L2L_FAST_DATA'):
        load_mnist(FULL)
    with pytest.raises(TypeError, match="data must be None, a folder or the name of a data set, got int"):
        load_mnist(3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: gzip.compress(b[:-1]), "truncated: 59 of the announced 60"),
        (lambda b: gzip.compress(b + b"x"), "goes on after"),
        (lambda b: gzip.compress(b)[:-9], "damaged or truncated gzip"),
        (
            lambda b: gzip.compress(b[:-1] + bytes([b[-1] ^ 1])),
            "not the published train-labels-idx1-ubyte: the SHA-256",
        ),
        (lambda b: gzip.compress(idx(np.zeros(61, np.uint8))), r"shape \(61,\), expected \(60,\)"),
        (lambda b: b"", "starts with nothing"),
        (lambda b: b"<html>Not found</html>", "not an IDX file"),
    ],
)
def test_damaged_files_are_refused_by_name(small_full_set, damage, message) -> None:
    file = small_full_set / "train-labels-idx1-ubyte.gz"
    file.write_bytes(damage(gzip.decompress(file.read_bytes())))
    with pytest.raises(ValueError, match=message) as caught:
        load_mnist(small_full_set)
    assert str(file) in str(caught.value)


def test_a_folder_with_other_data_of_the_same_form_is_refused(tmp_path) -> None:
    for stem, count in (("train", 60_000), ("t10k", 10_000)):
        (tmp_path / f"{stem}-images-idx3-ubyte").write_bytes(idx(np.zeros((count, 28, 28), np.uint8)))
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(idx(np.zeros(count, np.uint8)))
    with pytest.raises(ValueError, match="not the published train-images-idx3-ubyte"):
        load_mnist(tmp_path)


@pytest.mark.skipif(not GIVEN, reason=f"{ENVIRONMENT_VARIABLE} does not name a folder with the full MNIST")
def test_the_real_full_set() -> None:
    data = load_mnist(GIVEN)
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 50_000,
        "validation": 10_000,
        "test": 10_000,
    }
    counts = sum(torch.bincount(data.split(name).labels) for name in ("train", "validation"))
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    embedded = load_mnist(EMBEDDED).split("train")
    assert torch.equal(data.split("test").images[::3], embedded.images)
