"""The decision figures: what is drawn must be what the optimizers do."""

from __future__ import annotations

import pytest
import torch

import l2l_fast as l2l
from l2l_fast.evaluation import decisions
from tests.helpers import random_network

RATES = {"adam": 0.1, "sgd": 0.01}


def made(**options):
    net = random_network(preprocess="identity", output_scale=0.1)
    task = l2l.problems.Quadratic(dim=3, batch=4).sample(0, "test")
    return net, decisions.decide(net, task, RATES, **{"horizon": 9, "steps": (1, 4, 9, 50), "points": 21, **options})


def test_the_learned_trace_is_the_trajectory():
    net, found = made(coordinates=[("theta", 5), ("theta", 0)])
    task = l2l.problems.Quadratic(dim=3, batch=4).sample(0, "test")
    start = task.theta.detach().clone()
    optimizer = l2l.LearnedOptimizer(task.parameters(), net)
    for _ in range(9):
        optimizer.zero_grad()
        task().backward()
        optimizer.step()
    moved = (task.theta.detach() - start).reshape(-1)
    torch.testing.assert_close(found.updates["learned"].sum(0), moved[[5, 0]], rtol=1e-4, atol=1e-5)


def test_normalized_inputs_have_their_averages_in_a_proposal():
    """At the gradient that was, what is proposed is the update that was made."""
    net = random_network(preprocess="normalized", hidden_size=8, output_scale=0.1)
    task = l2l.problems.Quadratic(dim=3, batch=4).sample(0, "test")
    found = decisions.decide(net, task, RATES, horizon=9, steps=(1, 4, 9), points=4001, coordinates=[("theta", 0)])
    for proposed, step in zip(found.proposals["learned"][:, 0], found.steps, strict=True):
        near = (found.grids[0] - found.gradients[step - 1, 0]).abs().argmin()
        assert (proposed[near] - found.updates["learned"][step - 1, 0]).abs() < 0.02 * proposed.abs().max()


def test_a_network_with_inputs_per_tensor_is_refused_by_name():
    task = l2l.problems.Quadratic(dim=3, batch=4).sample(0, "test")
    with pytest.raises(ValueError, match="net: a network with inputs per tensor.*got 15"):
        decisions.decide(l2l.load_pretrained("general"), task, RATES)


def test_adam_and_sgd_do_what_torch_does_with_these_gradients():
    _, found = made()
    for name, make in (("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)):
        theta = torch.zeros(2, requires_grad=True)
        optimizer = make([theta], lr=RATES[name])
        for t, grad in enumerate(found.gradients):
            before = theta.detach().clone()
            theta.grad = grad.clone()
            optimizer.step()
            torch.testing.assert_close(found.updates[name][t], theta.detach() - before, rtol=1e-4, atol=1e-6)


def test_a_proposal_at_the_true_gradient_is_the_update():
    _, found = made()
    assert found.steps == [1, 4, 9] and found.grids.shape == (2, 21)
    for name, values in found.proposals.items():
        assert values.shape == (3, 2, 21)
        for j, step in enumerate(found.steps):
            for k in range(2):
                grid, proposed = found.grids[k], values[j, k]
                x = found.gradients[step - 1, k]
                right = int((grid > x).nonzero()[0])
                part = (x - grid[right - 1]) / (grid[right] - grid[right - 1])
                between = proposed[right - 1] + part * (proposed[right] - proposed[right - 1])
                size = proposed.abs().max()
                assert abs(between - found.updates[name][step - 1, k]) < 0.15 * size, name
    torch.testing.assert_close(found.proposals["sgd"][1], -0.01 * found.grids)


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = decisions.draw(made()[1], tmp_path / "x.png", "heading")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"steps": (10,)}, ValueError, "steps"),
        ({"coordinates": [("theta", 12)]}, ValueError, "coordinates: expected a parameter and an index below"),
        ({"coordinates": [("W", 0)]}, ValueError, "coordinates: expected a parameter"),
        ({"coordinates": []}, ValueError, "coordinates: expected at least one"),
        ({"coordinates": 0}, ValueError, "coordinates must be a positive integer"),
        ({"coordinates": 13}, ValueError, "coordinates: expected at most 12"),
        ({"coordinates": 1.5}, TypeError, "coordinates: expected a number, or pairs"),
        ({"coordinates": "theta"}, TypeError, "coordinates: expected a number, or pairs"),
        ({"coordinates": ["theta"]}, TypeError, "coordinates: expected pairs"),
        ({"coordinates": [("theta", 0.5)]}, ValueError, "coordinates: expected a parameter and an index"),
        ({"horizon": 10**30}, ValueError, "horizon must be at most"),
    ],
)
def test_arguments_are_checked_before_anything_moves(options, error, message, monkeypatch):
    monkeypatch.setattr(decisions, "_trajectory", lambda *arguments: pytest.fail("something was computed"))
    with pytest.raises(error, match=message):
        made(**options)


def test_a_task_of_one_coordinate_is_shown_by_default():
    task = l2l.problems.Quadratic(dim=1, batch=1).sample(0)
    found = decisions.decide(random_network(preprocess="identity"), task, RATES, horizon=2)
    assert found.coordinates == [("theta", 0)] and len(made()[1].coordinates) == 2


def test_as_many_coordinates_as_asked_for():
    assert len(set(made(coordinates=12)[1].coordinates)) == 12


def test_learning_rates_are_needed():
    task = l2l.problems.Quadratic(dim=2, batch=1).sample(0)
    with pytest.raises(ValueError, match="sgd"):
        decisions.decide(random_network(preprocess="identity"), task, {"adam": 1.0})


def far_from_zero() -> l2l.problems.ModuleProblem:
    """Two parameters that start far away from zero, of which few coordinates move much."""

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.tensor([100.0, -50.0, 1.0, 20.0]))
            self.b = torch.nn.Parameter(torch.tensor([30.0, 7.0, -3.0]))

    slopes = torch.tensor([0.0, 1.0, -5.0, 2.0]), torch.tensor([0.0, -0.5, 0.1])

    def loss(module: torch.nn.Module, generator: torch.Generator) -> torch.Tensor:
        return (module.a * slopes[0]).sum() + (module.b * slopes[1]).sum()

    return l2l.problems.ModuleProblem(lambda generator: Two(), loss)


@pytest.mark.parametrize("count", range(1, 8))
def test_those_that_move_most_are_watched_and_of_every_parameter_first(count):
    net = random_network(preprocess="identity", output_scale=0.1)
    task = far_from_zero().sample(0)
    start = {name: value.detach().clone() for name, value in task.named_parameters()}
    found = decisions.decide(net, task, RATES, horizon=6, coordinates=count).coordinates
    moved = {name: (value.detach() - start[name]).abs().tolist() for name, value in task.named_parameters()}
    ranked = []
    for name, distances in moved.items():
        order = sorted(range(len(distances)), key=lambda k, distances=distances: -distances[k])
        ranked += [(place, -distances[k], name, k) for place, k in enumerate(order)]
    assert found == [(name, index) for _, _, name, index in sorted(ranked)[:count]]
    assert count == 1 or {name for name, _ in found} == {"module.a", "module.b"}


def test_grids_reach_to_the_largest_gradient_of_either_sign():
    net = random_network(preprocess="identity", output_scale=0.1)
    places = [("module.a", 2), ("module.a", 3)]
    found = decisions.decide(net, far_from_zero().sample(0), RATES, horizon=3, coordinates=places, reach=1.5, points=5)
    for row, largest in zip(found.grids, (5.0, 2.0)):
        torch.testing.assert_close(row, torch.tensor([-1.5, -0.75, 0.0, 0.75, 1.5]) * largest)


def test_small_gradients_meet_the_eps_of_adam():
    task = far_from_zero().sample(0)
    net = random_network(preprocess="identity", output_scale=0.1)
    found = decisions.decide(net, task, RATES, horizon=2, coordinates=[("module.a", 0), ("module.b", 2)])
    assert torch.equal(found.updates["adam"][:, 0], torch.zeros(2))
    torch.testing.assert_close(found.updates["adam"][0, 1], torch.tensor(-0.1), rtol=1e-6, atol=0)


def test_the_figure_shows_the_numbers():
    pytest.importorskip("matplotlib")
    found = made()[1]
    axes = decisions.decisions_figure(found, "heading").axes
    columns = 1 + len(found.steps)
    assert len(axes) == 2 * columns
    labels = {"learned": "learned LSTM", "adam": "Adam", "sgd": "SGD"}
    for k, (name, index) in enumerate(found.coordinates):
        traces = {line.get_label(): line for line in axes[k * columns].get_lines()}
        assert axes[k * columns].get_title() == f"updates of {name}[{index}]"
        for optimizer, label in labels.items():
            assert list(traces[label].get_xdata()) == list(range(1, 10))
            assert list(traces[label].get_ydata()) == found.updates[optimizer][:, k].tolist()
        for j, step in enumerate(found.steps):
            panel = axes[k * columns + 1 + j]
            assert panel.get_title() == f"{name}[{index}], step {step}"
            *proposals, point = panel.get_lines()
            assert point.get_xdata()[0] == found.gradients[step - 1, k]
            assert point.get_ydata()[0] == found.updates["learned"][step - 1, k]
            for line, optimizer in zip(proposals, labels):
                assert list(line.get_xdata()) == found.grids[k].tolist() and line.get_label() == labels[optimizer]
                assert list(line.get_ydata()) == found.proposals[optimizer][j, k].tolist()
