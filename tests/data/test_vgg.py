"""VGG-16's weights from the three kinds of files, and what is refused."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from l2l_fast.problems.data.vgg import LAYERS, VGG16, load_vgg16, torchvision_names

WIDTHS = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]


def random_convolutions(count):
    generator = torch.Generator().manual_seed(0)
    made, depth = [], 3
    for width in WIDTHS[:count]:
        weight = torch.randn(width, depth, 3, 3, generator=generator) * (2 / (9 * depth)) ** 0.5
        made.append((weight, torch.randn(width, generator=generator) * 0.1))
        depth = width
    return made


@pytest.fixture(scope="module")
def whole():
    return VGG16(random_convolutions(13))


def same(left, right):
    assert len(left.convolutions) == len(right.convolutions)
    for a, b in zip(left.convolutions, right.convolutions):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_the_features_are_those_of_torchvisions_layers_in_their_order():
    vgg = VGG16(random_convolutions(5))
    pixels = torch.rand(3, 16, 16)
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 64, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(64, 64, 3, padding=1), torch.nn.ReLU(), torch.nn.AvgPool2d(2),
        torch.nn.Conv2d(64, 128, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(128, 128, 3, padding=1), torch.nn.ReLU(), torch.nn.AvgPool2d(2),
        torch.nn.Conv2d(128, 256, 3, padding=1), torch.nn.ReLU(),
    )  # fmt: skip
    state = {name.removeprefix("features."): value for name, value in torchvision_names(vgg).items()}
    layers.load_state_dict(state)
    x = (pixels - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    found = vgg.features(pixels, ("conv1_1", "conv2_2", "conv3_1"))
    for name, end in (("conv1_1", 2), ("conv2_2", 9), ("conv3_1", 12)):
        expected = layers[:end](x.unsqueeze(0))[0].flatten(1)
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
    assert F.relu(found["conv1_1"]).equal(found["conv1_1"]) and list(found) == ["conv1_1", "conv2_2", "conv3_1"]


def test_layers_beyond_the_weights_are_refused():
    vgg = VGG16(random_convolutions(2))
    for layers in ((), ("conv2_1",), ("conv1_1", "fc6")):
        with pytest.raises(ValueError, match=r"expected some of \('conv1_1', 'conv1_2'\)"):
            vgg.features(torch.zeros(3, 8, 8), layers)


def test_all_three_kinds_of_files(whole, tmp_path):
    names = torchvision_names(whole)
    save_file(names, tmp_path / "vgg16.safetensors")
    torch.save(names, tmp_path / "vgg16.pth")
    content = {
        "VGG16_0": {
            f"Conv_{k}": {"kernel": weight.permute(2, 3, 1, 0).numpy().copy(), "bias": bias.numpy()}
            for k, (weight, bias) in enumerate(whole.convolutions)
        },
        "NetLinLayer_0": {"Conv_0": {"kernel": np.zeros((1, 1, 64, 1), np.float32)}},
    }
    (tmp_path / "vgg16.ckpt").write_bytes(pickle.dumps(content, protocol=3))
    for name in ("vgg16.safetensors", "vgg16.pth", "vgg16.ckpt"):
        same(load_vgg16(tmp_path / name), whole)
    assert len(LAYERS) == 13 and LAYERS[10] == "conv5_1"


def test_a_pickle_that_runs_something_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    path = tmp_path / "vgg16.ckpt"
    path.write_bytes(pickle.dumps({"VGG16_0": Evil()}))
    with pytest.raises(ValueError, match=r"builtins\.print"):
        load_vgg16(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_vgg16(tmp_path / "none.pth")
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match=r"bad\.safetensors"):
        load_vgg16(path)
    save_file({"features.2.weight": torch.zeros(64, 64, 3, 3)}, path)
    with pytest.raises(ValueError, match=r"features\.0, features\.2"):
        load_vgg16(path)
    save_file({"features.0.weight": torch.zeros(64, 3, 5, 5), "features.0.bias": torch.zeros(64)}, path)
    with pytest.raises(ValueError, match=r"conv1_1: expected \[64, 3, 3, 3\]"):
        load_vgg16(path)
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"bad\.pth"):
        load_vgg16(tmp_path / "bad.pth")
    (tmp_path / "bad.ckpt").write_bytes(pickle.dumps({"other": {}}))
    with pytest.raises(ValueError, match=r"bad\.ckpt.*VGG16_0"):
        load_vgg16(tmp_path / "bad.ckpt")
