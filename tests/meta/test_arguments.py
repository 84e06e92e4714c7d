"""What meta-training and measuring are given: whatever is wrong is said, by name, before anything is computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import l2l_fast as l2l
from l2l_fast.evaluation import baselines
from l2l_fast.meta import evaluate, summarize
from l2l_fast.problems import Problem, Quadratic, sealed
from tests.meta.test_trainer import log_of, network, trainer, weights_of

PROBLEM = Quadratic(dim=3, batch=2)


@pytest.fixture
def nothing_is_sampled(monkeypatch):
    monkeypatch.setattr(Problem, "make_task", lambda *arguments: pytest.fail("a task was made"), raising=False)
    monkeypatch.setattr(Quadratic, "make_task", lambda *arguments: pytest.fail("a task was made"))


@pytest.mark.parametrize(
    "weights, error, message",
    [
        (dict.fromkeys(range(10), 1.0), TypeError, 'weights: expected "final", a callable or 10 numbers, got {0: 1.0'),
        (set(range(10)), TypeError, "weights: .*got {0, 1"),
        (frozenset([1.0]), TypeError, "weights: .*got frozenset"),
        (["1"] * 10, TypeError, "weights: .*got '1' for step 1"),
        ([1.0] * 9 + [True], TypeError, "weights: .*got True for step 10"),
        ([None] * 10, TypeError, "weights: .*got None for step 1"),
        ([[1.0]] * 10, TypeError, "weights: "),
        (torch.ones(10, 1), TypeError, "weights: "),
        (torch.ones(10, dtype=torch.bool), TypeError, "weights: .*got True"),
        (torch.ones(10, dtype=torch.complex64), TypeError, "weights: "),
        (b"0123456789", TypeError, "weights: "),
        (1.0, TypeError, "weights: .*got 1.0"),
        (torch.tensor(1.0), TypeError, "weights: "),
        (lambda t: str(t), TypeError, "weights: .*got '1' for step 1"),
        (lambda t: None, TypeError, "weights: "),
        ([1.0] * 9, ValueError, "weights: expected 10 values"),
        ([1.0] * 9 + [float("nan")], ValueError, "weights: expected finite"),
        ([1.0] * 9 + [10**400], ValueError, "weights: expected finite"),
        ("last", ValueError, "weights: .*got 'last'"),
    ],
)
def test_weights(weights, error, message):
    with pytest.raises(error, match=message):
        trainer(weights=weights)


def test_weights_in_every_form_that_means_numbers():
    expected = tuple(t / 10 for t in range(1, 11))
    for weights in (list(expected), expected, np.array(expected), torch.tensor(expected, dtype=torch.float64),
                    lambda t: t / 10, (w for w in expected), [np.float64(w) for w in expected]):  # fmt: skip
        assert trainer(weights=weights).protocol.weights == expected


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"betas": None}, TypeError, "betas: expected two numbers"),
        ({"betas": 0.9}, TypeError, "betas: expected two numbers"),
        ({"betas": "ab"}, TypeError, "betas: expected two numbers"),
        ({"betas": {0: 0.9, 1: 0.9}}, TypeError, "betas: expected two numbers"),
        ({"betas": (0.9,)}, ValueError, "betas: expected two numbers"),
        ({"autograd": "no"}, TypeError, "autograd: expected a bool, got 'no'"),
        ({"autograd": 1}, TypeError, "autograd: expected a bool, got 1"),
        ({"second_derivatives": "no"}, TypeError, "second_derivatives: expected a bool"),
        ({"log": 5}, TypeError, "log: expected a path, got 5"),
        ({"log": "."}, IsADirectoryError, "log: expected a file"),
        ({"log": ""}, ValueError, "log: expected the name of a file"),
        ({"device": "gpu"}, ValueError, "device: expected a device such as 'cpu' or 'cuda:0', got 'gpu'"),
        ({"device": 1.5}, TypeError, "device: expected a device"),
        ({"device": "meta"}, ValueError, "device: .*no values"),
        ({"device": "cuda:99"}, ValueError, "device: torch sees"),
        ({"horizon": 10**30}, ValueError, "horizon: expected 1..10000000"),
    ],
)
def test_of_a_trainer(options, error, message):
    with pytest.raises(error, match=message):
        trainer(**options)


@pytest.mark.parametrize("checkpoint, error", [(5, TypeError), ("", ValueError), (".", IsADirectoryError)])
def test_where_a_run_is_saved(checkpoint, error):
    run = trainer()
    before = weights_of(run.net)
    with pytest.raises(error, match="checkpoint: expected"):
        run.fit(1, checkpoint=checkpoint, progress=False)
    assert run.episode == 0 and torch.equal(before, weights_of(run.net))
    with pytest.raises(TypeError, match="path: expected the path of a checkpoint, got 5"):
        run.resume(5)


MEASURES = {
    "evaluate": lambda **o: evaluate(**{"net": network(), "problem": PROBLEM, "seeds": [0, 1], "horizon": 3, **o}),
    "run": lambda **o: baselines.run(**{"problem": PROBLEM, "name": "sgd", "lr": 0.1, "seeds": [0], "horizon": 3, **o}),
    "search": lambda **o: baselines.search(**{"problem": PROBLEM, "name": "sgd", "horizon": 3, **o}),
    "compare": lambda **o: baselines.compare(**{"problem": PROBLEM, "horizon": 3, "seeds": [0], **o}),
}


@pytest.mark.usefixtures("nothing_is_sampled")
@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"seeds": 5}, TypeError, r"seeds: expected several integers, such as range\(20\), got 5"),
        ({"seeds": "01"}, TypeError, "seeds: expected several integers"),
        ({"seeds": None}, TypeError, "seeds: expected several integers"),
        ({"seeds": [0, 0.5]}, TypeError, "seeds: expected integers, got 0.5"),
        ({"seeds": []}, ValueError, "seeds must name at least one task"),
        ({"horizon": 10**30}, ValueError, "horizon must be at most 10,000,000 steps"),
        ({"horizon": 0}, ValueError, "horizon must be a positive integer"),
        ({"device": "gpu"}, ValueError, "device: expected a device"),
        ({"device": "cuda:99"}, ValueError, "device: torch sees"),
        ({"device": "meta"}, ValueError, "device: .*no values"),
        ({"seeds": [1 << 64]}, sealed.SealedError, "is a sealed test task"),
    ],
)
def test_of_a_measurement(name, options, error, message):
    with pytest.raises(error, match=message):
        MEASURES[name](**options)


@pytest.mark.usefixtures("nothing_is_sampled")
@pytest.mark.parametrize(
    "options, message",
    [
        ({"problem": "quadratic"}, "problem: expected a Problem, got str"),
        ({"problem": None}, "problem: expected a Problem, got NoneType"),
        ({"net": None}, "net: expected a CoordinatewiseLSTM or a mapping of them, got NoneType"),
        ({"net": "quadratic"}, "net: expected a CoordinatewiseLSTM or a mapping of them, got str"),
    ],
)
def test_of_an_evaluation(options, message):
    with pytest.raises(TypeError, match=message):
        MEASURES["evaluate"](**options)


def test_seeds_in_every_form_that_means_integers():
    expected = evaluate(network(), PROBLEM, [0, 1, 2], 3)
    for seeds in (range(3), (0, 1, 2), np.arange(3), torch.arange(3), iter([0, 1, 2])):
        assert torch.equal(evaluate(network(), PROBLEM, seeds, 3), expected)


def test_a_summary_is_of_a_tensor():
    for losses in ([[1.0, 2.0]], np.ones((2, 3)), None):
        with pytest.raises(TypeError, match="losses: expected a tensor"):
            summarize(losses)


def test_names_of_baselines():
    for names in ("sgd", None, 3):
        with pytest.raises(TypeError, match="names: expected some of"):
            baselines.compare(PROBLEM, 3, [0], names=names)


@pytest.mark.parametrize("autograd", [False, True])
def test_the_log_counts_the_updates_that_were_left_out_episode_by_episode(autograd, tmp_path):
    class Torn(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = torch.nn.Parameter(torch.ones(3))
            self.calls = 0

    episodes = []
    runs_away = {1: 2, 3: 1}  # by episode: in how many of its two segments the loss is infinite at the end

    def make(generator: torch.Generator) -> torch.nn.Module:
        episodes.append(Torn())
        return episodes[-1]

    def loss(module: Torn, generator: torch.Generator) -> torch.Tensor:
        module.calls += 1
        count = runs_away.get(len(episodes) - 1, 0)
        wild = module.calls > 2 if count == 2 else module.calls > 6 if count == 1 else False
        return module.x.square().sum() * (torch.inf if wild else 1.0)

    problem = l2l.problems.ModuleProblem(make, loss)
    run = trainer(problem=problem, log=tmp_path / "log", validate_every=0, autograd=autograd).fit(5, progress=False)
    records = [record for record in log_of(tmp_path / "log") if record["event"] == "episode"]
    assert [record["skipped_updates"] for record in records] == [0, 2, 0, 1, 0]
    assert run.counters.skipped_updates == 3
    for record in records:
        assert sum(norm is None for norm in record["grad_norms"]) == record["skipped_updates"]
