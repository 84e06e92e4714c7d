"""The loaders of Fashion-MNIST and CIFAR-10, on files written here in the published formats."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch

from l2l_fast.problems.data import load_cifar10, load_fashion_mnist, read_cifar10_file
from l2l_fast.problems.data.images import CIFAR_VARIABLE, FASHION_VARIABLE


def write_fashion(folder, counts=(24, 6)):
    random = np.random.default_rng(0)
    written = {}
    for stem, count in zip(("train", "t10k"), counts):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28)
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, count) + labels.tobytes())
        written[stem] = images, labels
    return written


def write_cifar(folder, count=12):
    random = np.random.default_rng(1)
    written = {}
    for name in [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]:
        images = random.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        labels = random.integers(0, 10, count, dtype=np.uint8)
        records = b"".join(bytes([label]) + image.tobytes() for label, image in zip(labels, images))
        (folder / name).write_bytes(records)
        written[name] = images, labels
    return written


def test_fashion_mnist(tmp_path, monkeypatch):
    written = write_fashion(tmp_path)
    data = load_fashion_mnist(tmp_path)
    held_out = np.arange(24) // 2 % 6 == 5
    images, labels = written["train"]
    for split, mask in (("train", ~held_out), ("validation", held_out)):
        assert np.array_equal(data.split(split).images.numpy(), images[mask])
        assert np.array_equal(data.split(split).labels.numpy(), labels[mask])
    assert np.array_equal(data.split("test").images.numpy(), written["t10k"][0])
    monkeypatch.setenv(FASHION_VARIABLE, str(tmp_path))
    assert load_fashion_mnist() is data


def test_fashion_mnist_that_is_incomplete_or_inconsistent(tmp_path):
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        load_fashion_mnist(tmp_path)
    write_fashion(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, 5) + bytes(5))
    with pytest.raises(ValueError, match="n labels"):
        load_fashion_mnist(tmp_path)


def test_one_cifar_file(tmp_path):
    images, labels = write_cifar(tmp_path)["data_batch_2.bin"]
    found = read_cifar10_file(tmp_path / "data_batch_2.bin")
    assert np.array_equal(found[0], images) and np.array_equal(found[1], labels)
    assert found[1].dtype == np.int64


@pytest.mark.parametrize("below", [False, True])
def test_cifar10(tmp_path, monkeypatch, below):
    folder = tmp_path / "cifar-10-batches-bin" if below else tmp_path
    folder.mkdir(exist_ok=True)
    written = write_cifar(folder)
    data = load_cifar10(tmp_path)
    assert [len(data.split(split)) for split in ("train", "validation", "test")] == [50, 10, 12]
    # The planes are red, green, blue: the first image's blue plane is the last third of its record.
    assert np.array_equal(data.split("train").images[0, 2].numpy(), written["data_batch_1.bin"][0][0, 2])
    everything = torch.cat([data.split("train").images, data.split("validation").images])
    assert len(everything.flatten(1).unique(dim=0)) == 60
    monkeypatch.setenv(CIFAR_VARIABLE, str(tmp_path))
    assert load_cifar10() is data


def test_cifar_files_that_are_damaged_or_missing(tmp_path, monkeypatch):
    monkeypatch.delenv(CIFAR_VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match=CIFAR_VARIABLE):
        load_cifar10()
    with pytest.raises(FileNotFoundError, match=r"test_batch\.bin"):
        load_cifar10(tmp_path)
    path = tmp_path / "x.bin"
    for content, words in ((bytes(3072), "3072 bytes"), (b"", "0 bytes"), (bytes([10]) + bytes(3072), "label 10")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            read_cifar10_file(path)
