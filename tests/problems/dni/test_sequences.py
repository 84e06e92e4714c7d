"""The copy tasks are what they say, and their curriculum grows when it should."""

from __future__ import annotations

import pytest
import torch

from l2l_fast import dni


def test_copy():
    episode = dni.CopyTask(characters=3).sample(4, 5, torch.Generator().manual_seed(0))
    assert episode.inputs.shape == (9, 5, 4) and episode.targets.shape == (9, 5) and episode.scored == 4
    text = episode.inputs[:4].argmax(2)
    assert torch.equal(episode.targets[5:], text) and (episode.targets[:5] == -100).all()
    assert torch.equal(episode.inputs[:5].sum(2), torch.ones(5, 5))
    assert (episode.inputs[4, :, 3] == 1).all() and not episode.inputs[5:].any()
    assert len(set(text.flatten().tolist())) == 3


def test_repeat_copy():
    episode = dni.CopyTask(repeat=True).sample(2, 5, torch.Generator().manual_seed(0), repeats=3)
    text = episode.inputs[:2].argmax(2)
    assert episode.scored == 7 and episode.inputs.shape == (10, 5, 3)
    assert torch.equal(episode.targets[3:9], text.repeat(3, 1)) and (episode.targets[9] == 2).all()
    torch.testing.assert_close(episode.inputs[2, :, 2], torch.full((5,), 0.3))


def test_a_gap():
    episode = dni.CopyTask().sample(1, 5, torch.Generator().manual_seed(0), gap=4)
    assert episode.inputs.shape == (7, 5, 3) and episode.scored == 1
    assert not episode.inputs[1:5].any() and (episode.inputs[5, :, 2] == 1).all() and not episode.inputs[6].any()
    assert torch.equal(episode.targets[6], episode.inputs[0].argmax(1)) and (episode.targets[:6] == -100).all()


def test_a_seed_repeats():
    first, second = (dni.CopyTask().sample(6, 7, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first.inputs, second.inputs) and torch.equal(first.targets, second.targets)


def test_the_curriculum_grows_on_means_below_the_threshold_alone():
    curriculum = dni.Curriculum(threshold=0.15, window=3)
    assert not any(curriculum.record(bits) for bits in (0.0, 0.0))
    assert curriculum.record(0.1) and curriculum.length == 2 and curriculum.solved == 1
    # 0.15 is not below, and nothing of the shorter sequences counts.
    assert not any(curriculum.record(bits) for bits in (0.15, 0.15, 0.15, float("nan"), 0.1, 0.1))
    assert curriculum.record(0.1) and curriculum.solved == 2


def test_in_repeat_copy_length_and_copies_grow_in_turn():
    curriculum, seen = dni.Curriculum(repeat=True, window=1), []
    for _ in range(4):
        curriculum.record(0.0)
        seen.append((curriculum.length, curriculum.repeats, curriculum.solved))
    assert seen == [(2, 1, 1), (2, 2, 2), (3, 2, 4), (3, 3, 6)]


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="repeats: expected 1, this is copy and not repeat copy, got 2"):
        dni.CopyTask().sample(2, 3, torch.Generator(), repeats=2)
    with pytest.raises(ValueError, match="length must be a positive integer, got 0"):
        dni.CopyTask().sample(0, 3, torch.Generator())
    with pytest.raises(ValueError, match="gap: expected an int >= 0, got -1"):
        dni.CopyTask().sample(1, 3, torch.Generator(), gap=-1)
    with pytest.raises(ValueError, match="threshold: expected a finite number > 0, got 0"):
        dni.Curriculum(threshold=0)
    curriculum = dni.Curriculum(window=1)
    with pytest.raises(TypeError, match="bits: expected a number, got None"):
        curriculum.record(None)
    assert curriculum.record(0.0)
    assert not curriculum.record(float("nan"))
