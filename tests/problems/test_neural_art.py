"""Neural art, with drawn pictures and random weights in the place of VGG-16's, which are too large for a test."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import l2l_fast as l2l
from l2l_fast.evaluation import experiments
from l2l_fast.evaluation.comparison import data_set
from l2l_fast.problems import NeuralArt, get
from l2l_fast.problems.data import photographs
from l2l_fast.problems.data.vgg import VGG16, torchvision_names

image = pytest.importorskip("PIL.Image")
WIDTHS = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("art")
    generator = torch.Generator().manual_seed(1)
    made, depth = [], 3
    for width in WIDTHS:
        weight = torch.randn(width, depth, 3, 3, generator=generator) * (2 / (9 * depth)) ** 0.5
        made.append((weight, torch.zeros(width)))
        depth = width
    save_file(torchvision_names(VGG16(made)), place / "vgg16.safetensors")
    drawn = np.random.default_rng(0)
    for kind, names in (("photographs", "abcdefgh"), ("styles", "xy")):
        (place / kind).mkdir()
        for k, name in enumerate(names):
            values = drawn.integers(0, 256, (5, 6 + k, 3), dtype=np.uint8)
            image.fromarray(values).resize((60 + k, 50), image.Resampling.BICUBIC).save(place / kind / f"{name}.png")
    return place


def make(place, **options):
    return NeuralArt(**{"folder": place, "style": "x", "side": 32, **options})


def test_the_loss_is_gatys_loss(folder):
    problem = make(folder, content_weight=2.0, style_weight=3.0, smooth_weight=5.0)
    task = problem.sample(0)
    assert task.pixels.shape == (3, 32, 32) and task.num_problems == 3 * 32 * 32
    vgg, pixels = problem._vgg, (task.pixels + 127.5) / 255
    style = photographs.centre_square(photographs.read_style(folder, "x"), 32)
    layers = ("conv1_1", "conv2_1", "conv3_1", "conv4_1", "conv5_1")
    own, other = vgg.features(pixels, (*layers, "conv4_2")), vgg.features(style, layers)
    expected = 2.0 * (own["conv4_2"] - task._content).square().sum() / task._content.square().sum()
    for name in layers:
        positions = own[name].shape[1]
        difference = own[name] @ own[name].T / positions - other[name] @ other[name].T / positions
        expected = (
            expected + 3.0 / 5 * difference.square().sum() / (other[name] @ other[name].T / positions).square().sum()
        )
    down, right = pixels[:, 1:] - pixels[:, :-1], pixels[:, :, 1:] - pixels[:, :, :-1]
    expected = expected + 5.0 * (down.square().mean() + right.square().mean())
    torch.testing.assert_close(task() / task.num_problems, expected, rtol=1e-4, atol=1e-6)
    # What the losses are zero at: the photograph's content, the style's statistics.
    with torch.no_grad():
        task.pixels.copy_(style * 255 - 127.5)
    parts = task.parts()
    assert parts["style"] < 1e-8 < parts["content"] and parts["smooth"] > 0
    assert task.picture().shape == (3, 32, 32) and float(task.picture().max()) <= 1


def test_splits_have_different_photographs_and_tasks_follow_their_seed(folder):
    pictures = photographs.read_photographs(folder).splits
    assert {split: len(each) for split, each in pictures.items()} == {"train": 4, "validation": 2, "test": 2}
    widths = {split: {picture.shape[2] for picture in each} for split, each in pictures.items()}
    assert widths == {"train": {60, 62, 64, 66}, "validation": {61, 65}, "test": {63, 67}}
    problem = make(folder)
    first, again, other = problem.sample(5), problem.sample(5), problem.sample(6)
    assert torch.equal(first.pixels, again.pixels) and torch.equal(first._content, again._content)
    assert not torch.equal(first._content, other._content)
    rebuilt = get(**problem.config(), folder=folder).sample(5)
    assert torch.equal(rebuilt.pixels, first.pixels) and rebuilt().item() == first().item()
    assert data_set(problem) == "photographs (images: train 4, validation 2, test 2)" and first.side_by_side == 1
    assert first.pixels.std().item() == pytest.approx(20, rel=0.1)


def test_gradients_do_not_shrink_with_the_resolution(folder):
    sizes = [torch.autograd.grad(task(), task.pixels)[0].abs().mean() for task in
             (make(folder, side=side).sample(1) for side in (32, 64))]  # fmt: skip
    assert 0.3 < float(sizes[0] / sizes[1]) < 3


def test_a_learned_optimizer_is_trained_on_it(folder, tmp_path):
    net = l2l.CoordinatewiseLSTM(preprocess="log_sign", output_scale=1.0)
    trainer = l2l.MetaTrainer(
        net, make(folder), horizon=4, unroll=2, validate_every=1, validation_episodes=1, log=tmp_path / "log.jsonl"
    )
    before = net.phi().detach().clone()
    trainer.fit(1, progress=False)
    assert not torch.equal(before, net.phi())
    assert trainer.counters.best_loss is not None and 0 < trainer.counters.best_loss < 100


def test_options_and_files_are_checked(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("L2L_FAST_NEURAL_ART", raising=False)
    for options, error, message in (
        ({"side": 16}, ValueError, "side must be at least 32 pixels, got 16"),
        ({"side": 2.5}, TypeError, "side must be a positive integer"),
        ({"style": "z"}, FileNotFoundError, r"no style 'z', there are \['x', 'y'\]"),
        ({"style": 3}, TypeError, "style must be a name"),
        ({"content_weight": -1.0}, ValueError, "content_weight must be finite and not negative"),
        ({"init_std": "wide"}, TypeError, "init_std must be a number"),
        ({"folder": None}, FileNotFoundError, "L2L_FAST_NEURAL_ART"),
        ({"folder": "no/such"}, FileNotFoundError, "no such folder"),
        ({"folder": tmp_path}, FileNotFoundError, "VGG-16's weights are missing"),
    ):
        with pytest.raises(error, match=message):
            make(folder, **options)
    (tmp_path / "vgg16.safetensors").write_bytes((folder / "vgg16.safetensors").read_bytes())
    with pytest.raises(FileNotFoundError, match="at least 4 pictures"):
        make(tmp_path)
    (tmp_path / "photographs").mkdir()
    for name in "abcd":
        (tmp_path / "photographs" / f"{name}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png' is not a readable picture"):
        make(tmp_path)


def test_the_environment_names_the_folder(folder, monkeypatch):
    monkeypatch.setenv("L2L_FAST_NEURAL_ART", str(folder))
    assert get("neural-art", style="y", side=32).config()["style"] == "y"


def test_the_experiment_draws_its_pictures(folder, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    setting = {"name": "test", "title": "Small", "horizon": 2, "baselines": ["adam"], "tuning_episodes": 1,
               "search": {"options": {}, "schedules": ["linear"], "points_per_decade": 2}}  # fmt: skip
    content = {
        "name": "art",
        "about": "Small.",
        "source": "none",
        "pretrained": "",
        "problem": {"name": "neural-art", "style": "x", "side": 32},
        "networks": {"": {"preprocess": "log_sign", "output_scale": 1.0, "hidden_size": 4}},
        "training": {"horizon": 2, "unroll": 2, "validate_every": 1, "validation_episodes": 1},
        "episodes": 1,
        "candidates": [{"seed": 0}],
        "selection": [],
        "settings": [setting],
        "test_episodes": 2,
    }
    (tmp_path / "art.json").write_text(json.dumps(content))
    experiment = experiments.load(tmp_path / "art.json")
    figures = []
    save = l2l.plots.save_figure
    keep = lambda figure, *a, **k: figures.append(figure) or save(figure, *a, **k)  # noqa: E731
    monkeypatch.setattr(l2l.plots, "save_figure", keep)
    outcome = experiments.run(experiment, tmp_path / "out", data=str(folder), progress=False)
    assert (tmp_path / "out" / "pictures.png").read_bytes().startswith(b"\x89PNG")
    # The photograph, the style, and what two optimizers make of them, each from theta_0 of the first test task.
    shown = {axes.get_title(): torch.from_numpy(axes.images[0].get_array().data) for axes in figures[0].axes}
    problem, net = make(folder), l2l.load(tmp_path / "out" / "optimizer.safetensors")
    comparison = outcome.comparisons["test"]
    rate = comparison.learning_rates["adam"]
    expected = {"photograph, 32 x 32": problem.sample(0, "test").content, "style": problem.picture}
    for label, start in (
        (f"Adam, lr {rate:.3g}", lambda task: torch.optim.Adam(task.parameters(), lr=rate)),
        ("learned LSTM", lambda task: l2l.LearnedOptimizer(task.parameters(), net)),
    ):
        task = problem.sample(0, "test")
        optimizer = start(task)
        for factor in (1.0, 0.5):  # the schedule that was asked for
            optimizer.zero_grad()
            task().backward()
            if label != "learned LSTM":
                optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
        expected[f"{label}: loss {task().item() / task.num_problems:.3f}"] = task.picture()
    assert list(shown) == list(expected)
    for title, picture in expected.items():
        torch.testing.assert_close(shown[title], picture.permute(1, 2, 0), rtol=1e-3, atol=1e-3, msg=title)
    text = outcome.table.read_text()
    assert "2 fresh test tasks, test images; baselines tuned on 1 tasks; photographs (images: train 4" in text
    assert "| **Adam** |" in text and "NAG" not in text
    with pytest.raises(ValueError, match="baselines: expected some of"):
        (tmp_path / "art.json").write_text(json.dumps({**content, "settings": [{**setting, "baselines": ["lbfgs"]}]}))
        experiments.load(tmp_path / "art.json")
