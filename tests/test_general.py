"""The general optimizer of the package on networks of a user's own. The suite's networks are not looked at here."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast.kernels.tensor_inputs import DEFAULT_INPUTS
from l2l_fast.meta import ProtocolWarning, evaluate, recipes
from l2l_fast.problems import Zoo

WEIGHTS = Path(__file__).parents[1] / "docs/general/weights"


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def spirals(generator: torch.Generator, count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Three arms of a noisy spiral: a task of no family that anything here was trained or measured on."""
    labels = torch.randint(3, (count,), generator=generator)
    radius = torch.rand(count, generator=generator)
    angle = 2.1 * labels + 4 * radius + 0.1 * torch.randn(count, generator=generator)
    return torch.stack([radius * angle.sin(), radius * angle.cos()], dim=1) * 2, labels


def train(make, steps: int = 400, seed: int = 0, scale: float = 1.0) -> float:
    """The mean loss of the last tenth; ``scale``: of the loss that is differentiated."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(2, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))
    optimizer = make(model.parameters())
    losses = []
    for _ in range(steps):
        x, labels = spirals(generator)
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        (scale * loss).backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-steps // 10 :]) / (steps // 10)


def general(total_steps: int | None = 400, **options):
    net = l2l.load_pretrained("general")
    return lambda parameters: l2l.LearnedOptimizer(parameters, net, total_steps=total_steps, **options)


def test_it_is_what_its_recipe_makes():
    net, made = l2l.load_pretrained("general"), recipes.get(Zoo(problems=1)).make_network()
    assert net.options() == made.options() and net.tensor_inputs == len(DEFAULT_INPUTS)
    assert net.weight_nominal.abs().max() > 0.1


def test_dropped_in_it_ends_below_adam():
    learned = train(general())
    assert learned < train(lambda parameters: torch.optim.Adam(parameters, lr=1e-3))
    assert learned < train(lambda parameters: torch.optim.Adam(parameters, lr=1e-2)) * 1.1


def test_the_one_for_matrices_ends_below_adam():
    net = l2l.load_pretrained("general-matrix")
    assert type(net) is l2l.OrthogonalLSTM and net.config == l2l.load_pretrained("general-small").config
    learned = train(lambda parameters: l2l.LearnedOptimizer(parameters, net, total_steps=400))
    assert learned < train(lambda parameters: torch.optim.Adam(parameters, lr=1e-2))


@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="a copy of the sources without docs")
def test_the_one_for_matrices_is_the_mean_of_three_runs(tmp_path, monkeypatch):
    from bench import averaged

    runs = [str(WEIGHTS / f"matrix-seed-{seed}.safetensors") for seed in (7, 8, 9)]
    monkeypatch.setattr("sys.argv", ["averaged", *runs, "--out", str(tmp_path / "mean.safetensors")])
    averaged.main()
    mean, shipped = l2l.load(tmp_path / "mean.safetensors"), l2l.load_pretrained("general-matrix")
    assert all(map(torch.equal, mean.state_dict().values(), shipped.state_dict().values()))
    monkeypatch.setattr("sys.argv", ["averaged", runs[0], str(WEIGHTS / "start.safetensors"), "--out", "unused"])
    with pytest.raises(SystemExit):
        averaged.main()


@pytest.mark.parametrize("scale", [1e-3, 1e6])  # far above Adam's eps
def test_the_scale_of_the_loss_does_not_matter(scale):
    # Few steps: later the ways part, as they do after any change of rounding.
    assert train(general(), 20, scale=scale) == pytest.approx(train(general(), 20), rel=0.02)


def test_without_total_steps_it_trains_too():
    assert train(general(None)) < train(lambda parameters: torch.optim.Adam(parameters, lr=1e-3))


def test_a_network_of_one_bad_gradient_goes_on():
    """A gradient that is not finite spoils its own coordinate and no other."""
    parameter = nn.Parameter(torch.zeros(70))
    optimizer = general(20)([parameter])
    for t in range(8):
        parameter.grad = torch.linspace(-1, 1, 70)
        if t == 3:
            parameter.grad[5] = float("nan")
        optimizer.step()
    bad = parameter.isnan().nonzero().flatten().tolist()
    assert bad == [5] and (parameter[6:30] > 0).all()


def test_evaluating_it_elsewhere_warns_of_nothing_but_the_horizon():
    net, problem = l2l.load_pretrained("general"), l2l.problems.Quadratic(dim=3, batch=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = evaluate(net, problem, range(2), 60)
    assert (losses[:, -1] < losses[:, 0]).all()
    longest = l2l.meta.record_of(net)["protocol"]["horizon"]
    with pytest.warns(ProtocolWarning, match="horizon"):
        l2l.meta.mismatch.warn_of_mismatch(net, problem, longest + 1)


def test_copies_and_checkpoints_go_the_same_way():
    model = nn.Linear(4, 3)
    optimizer = general(30)(model.parameters())

    def step(model, optimizer, t):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    for t in range(5):
        step(model, optimizer, t)
    twin = copy.deepcopy(model)
    resumed = general(30)(twin.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for t in range(5, 9):
        step(model, optimizer, t)
        step(twin, resumed, t)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_an_evaluation_tells_it_the_horizon():
    net, problem = l2l.load_pretrained("general"), l2l.problems.Quadratic(dim=3, batch=2)
    found = evaluate(net, problem, [4], 12, split="validation")[0]
    ends = []
    for total_steps in (12, None):
        task = problem.sample(4, "validation")
        optimizer = l2l.LearnedOptimizer(task.parameters(), net, total_steps=total_steps)
        for _ in range(12):
            optimizer.zero_grad()
            task().backward()
            optimizer.step()
        ends.append(task().item() / task.num_problems)
    assert found[-1].item() == pytest.approx(ends[0], rel=1e-5) and found[-1].item() != pytest.approx(ends[1], rel=1e-3)
