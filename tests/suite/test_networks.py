"""The suite's networks and the loop: paired by seed, bit-identical whatever threads and global state, cheap."""

from __future__ import annotations

import gzip
import math
import struct

import numpy as np
import pytest
import torch
from torch.optim import Adam

from l2l_fast.evaluation.suite import material, running
from l2l_fast.evaluation.suite.material import KINDS, Folder, pictures, rows
from l2l_fast.evaluation.suite.networks import NETWORKS, choose, seeds
from l2l_fast.problems.data import EMBEDDED, load_mnist

network = pytest.mark.parametrize("name", list(NETWORKS))


def adam(parameters, steps):
    return Adam(parameters, lr=1e-3)


def losses_of(name, make=adam, seed=5, steps=12, **options):
    return running.run(NETWORKS[name], make, seed, steps, **options).curve


def test_there_are_enough():
    assert len(NETWORKS) >= 14 and all(name == each.name for name, each in NETWORKS.items())
    assert {each.kind for each in NETWORKS.values()} == set(KINDS)


@network
def test_a_network_is_small_and_learns(name):
    module = running.initial(NETWORKS[name], 3)
    assert 500 <= sum(parameter.numel() for parameter in module.parameters()) <= 40_000
    start = running.start_loss(NETWORKS[name], Folder(), 3)
    run = running.run(NETWORKS[name], lambda p, steps: Adam(p, lr=1e-2), 3, 60)
    assert run.start == start and not run.diverged and run.curve[-1] < run.curve[0]


@network
def test_a_seed_is_theta_0_and_minibatches_whatever_the_optimizer(name):
    drawn = []

    def greedy(parameters, steps):
        parameters = list(parameters)
        drawn.append([parameter.detach().clone() for parameter in parameters])
        torch.rand(len(drawn))  # an optimizer may draw as it likes
        return torch.optim.SGD(parameters, lr=0.0)

    one, other = losses_of(name, greedy), losses_of(name, greedy, steps=20)
    assert one == other[:12]
    assert all(map(torch.equal, *drawn))
    assert losses_of(name)[0] == one[0] != losses_of(name, seed=6)[0]
    # With theta held still, losses differ by their minibatches.
    assert len(set(one)) > 6


@pytest.mark.parametrize("name", ["mlp-gelu", "conv-batchnorm", "char-transformer", "gru"])
def test_results_depend_neither_on_threads_nor_on_global_state(name):
    torch.set_num_threads(1)
    torch.manual_seed(1)
    alone = losses_of(name)
    torch.set_num_threads(2)
    torch.manual_seed(2)
    torch.set_default_dtype(torch.float64)
    before = torch.get_rng_state()
    try:
        with torch.inference_mode(), torch.autocast("cpu"):
            assert losses_of(name) == alone
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.get_num_threads() == 2 and torch.equal(torch.get_rng_state(), before)


def test_optimizers_that_draw_repeat():
    class Drawing(Adam):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    parameter.add_(torch.randn_like(parameter), alpha=0.01)

    runs = [losses_of("softmax", lambda p, steps: Drawing(p, lr=1e-3)) for _ in range(2)]
    assert runs[0] == runs[1] != losses_of("softmax")


def test_state_is_restored_when_an_optimizer_fails():
    torch.set_num_threads(2)
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        losses_of("softmax", lambda parameters, steps: 1 // 0)
    assert torch.get_num_threads() == 2 and torch.equal(torch.get_rng_state(), before)


def test_the_quadratics_minimum_is_not_theta_0():
    # Two generators with one seed draw the same numbers.
    assert running.start_loss(NETWORKS["quadratic"], Folder(), 1) > 20


def test_the_schedule_and_the_length_reach_the_optimizer():
    seen = []

    class Watching(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(self.param_groups[0]["lr"])

    lengths = []

    def make(parameters, steps):
        lengths.append(steps)
        return Watching(parameters, lr=2.0)

    running.run(NETWORKS["sinusoid"], make, 1, 4, schedule="cosine")
    assert seen == pytest.approx([1 + math.cos(math.pi * k / 4) for k in range(4)]) and lengths == [4]


def test_hopeless_runs_are_given_up_only_in_searches():
    def climb(parameters, steps):
        return torch.optim.SGD(parameters, lr=1e-2, maximize=True)

    quadratic = NETWORKS["quadratic"]
    whole, given_up = (running.run(quadratic, climb, 1, 500, give_up=each) for each in (False, True))
    assert whole.ends()[-1] == 500 and math.isfinite(whole.final)
    assert given_up.ends()[-1] < 450 and given_up.diverged and given_up.final == math.inf
    with pytest.raises(ValueError, match="steps"):
        running.run(quadratic, climb, 1, 0)


def test_names_and_seeds():
    assert [each.name for each in choose(["conv", "softmax"])] == ["softmax", "conv"]
    for wrong in (["convolution"], []):
        with pytest.raises(ValueError, match="networks: expected some of softmax, mlp-relu"):
            choose(wrong)
    assert len(seeds(3)) == 3 and seeds(2)[0] == seeds(3)[0]
    with pytest.raises(ValueError, match="seeds"):
        seeds(0)


def test_the_digits_are_there_nine_times():
    images = torch.cat([split.images for split in load_mnist(EMBEDDED).splits.values()])
    pixels, labels = pictures(Folder(), "digits", 28)
    assert pixels.shape == (90_000, 784) and labels.shape == (90_000,)
    parts = pixels.view(9, 10_000, 28, 28)
    assert torch.equal(parts[4], images) and torch.equal(labels[:10_000], labels[-10_000:])
    assert torch.equal(parts[0][:, :-2, :-2], images[:, 2:, 2:]) and not parts[0][:, -2:].any()  # up and to the left
    small, _ = pictures(Folder(), "digits", 14)
    means = images.view(-1, 14, 2, 14, 2).float().mean((2, 4)).round()
    assert torch.equal(small.view(9, 10_000, 14, 14)[4].float(), means)


def test_rows_are_the_same_for_every_length():
    def first(count):
        drawn = rows(1000, 3, torch.Generator().manual_seed(1))
        return [next(drawn).tolist() for _ in range(count)]

    assert first(200)[:70] == first(70)
    assert len({tuple(row) for row in first(200)}) == 200


def fashion(folder):
    folder.mkdir(parents=True)
    for stem, count in (("train", 12), ("t10k", 6)):
        images = np.full((count, 28, 28), 200, dtype=np.uint8)
        head = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28)
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + images.tobytes()))
        labels = struct.pack(">4BI", 0, 0, 8, 1, count) + bytes(range(count // 2)) * 2
        (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))


def test_where_data_sets_are_looked_for(tmp_path, monkeypatch):
    for variable in ("L2L_FAST_DATA", "L2L_FAST_FASHION_MNIST"):
        monkeypatch.delenv(variable, raising=False)
    assert Folder.named() == Folder.named(EMBEDDED) == Folder()
    assert Folder().name("digits") == Folder().name("fashion") == EMBEDDED
    assert Folder().name("english") == "asv-genesis-luke" and Folder().name("none") == "none"
    with pytest.raises(FileNotFoundError, match="MNIST is not complete"):
        Folder.named(tmp_path)
    with pytest.raises(ValueError, match="kind"):
        Folder().name("cats")
    fashion(tmp_path / "fashion-mnist")
    there = Folder(None, tmp_path / "fashion-mnist")
    assert there.name("fashion") == "fashion-mnist" and there.name("digits") == EMBEDDED
    pixels, labels = pictures(there, "fashion", 14)
    assert pixels.shape == (18, 196) and (pixels == 200).all()
    # A full set in a folder, by the environment.
    monkeypatch.setattr(material, "load_mnist", lambda data: type("Data", (), {"folder": tmp_path, "name": "full"})())
    monkeypatch.setenv("L2L_FAST_DATA", str(tmp_path))
    assert Folder.named() == Folder(tmp_path, tmp_path / "fashion-mnist") and Folder.named().name("digits") == "full"
    assert Folder.named(EMBEDDED) == Folder()
