"""What every problem promises: determinism, independent splits, no use of the global random state, functional calls."""

import copy
import json

import pytest
import torch
from torch import nn

from l2l_fast import problems
from l2l_fast.problems.base import task_generator


def make_net(generator: torch.Generator) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))


def net_loss(net: nn.Module, generator: torch.Generator) -> torch.Tensor:
    return net(torch.randn(8, 3, generator=generator)).square().mean()


PROBLEMS = {
    "uniform quadratics": problems.Quadratic(dim=5, batch=3),
    "gaussian quadratics": problems.Quadratic(dim=5, batch=3, family="gaussian"),
    "mnist": problems.MNIST(hidden=(4, 3), batch_size=8),
    "zoo": problems.Zoo(problems=2),
    "module": problems.ModuleProblem(make_net, net_loss),
}


@pytest.fixture(params=PROBLEMS.values(), ids=PROBLEMS.keys())
def problem(request) -> problems.Problem:
    return request.param


def trace(task: problems.Task, steps: int = 3) -> list[torch.Tensor]:
    """Initial parameters, then losses and parameters along a few gradient steps."""
    seen = [parameter.detach().clone() for parameter in task.parameters()]
    for _ in range(steps):
        loss = task()
        gradients = torch.autograd.grad(loss, list(task.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(task.parameters(), gradients, strict=True):
                parameter -= 0.01 * gradient
        seen += [loss.detach(), *(parameter.detach().clone() for parameter in task.parameters())]
    return seen


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_task_is_a_function_of_seed_and_split(problem) -> None:
    reference = trace(problem.sample(7))
    torch.manual_seed(1234)
    torch.rand(5)
    assert equal(trace(problem.sample(7, "train")), reference)
    assert not equal(trace(problem.sample(8)), reference)
    assert not equal(trace(problem.sample(7, "validation")), reference)
    assert not equal(trace(problem.sample(7, "test")), trace(problem.sample(7, "validation")))


def test_tasks_in_alternation_do_not_disturb_each_other(problem) -> None:
    first, second = problem.sample(0), problem.sample(1)
    losses = [(first().item(), second().item()) for _ in range(3)]
    alone = problem.sample(0)
    assert [pair[0] for pair in losses] == [alone().item() for _ in range(3)]


def test_the_global_random_state_is_neither_read_nor_changed(problem) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    task = problem.sample(3)
    task().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_loss_is_a_scalar_and_every_parameter_gets_a_gradient(problem) -> None:
    task = problem.sample(0)
    loss = task()
    assert loss.shape == ()
    loss.backward()
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert any(parameter.grad.abs().max() > 0 for parameter in task.parameters())


def test_functional_call_evaluates_at_other_parameters(problem) -> None:
    task, moved = problem.sample(0), problem.sample(0)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += 0.1
    parameters = {name: (value.detach() + 0.1).requires_grad_() for name, value in task.named_parameters()}
    before = [parameter.detach().clone() for parameter in task.parameters()]
    loss = torch.func.functional_call(task, parameters, ())
    torch.testing.assert_close(loss, moved())
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    assert any(gradient.abs().max() > 0 for gradient in gradients)
    assert equal(before, list(task.parameters()))


def test_gradients_can_be_differentiated_again(problem) -> None:
    torch.manual_seed(0)
    task = problem.sample(0).double() if not isinstance(problem, problems.ModuleProblem) else problem.sample(0)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    parameters = list(task.parameters())
    gradients = torch.autograd.grad(task(), parameters, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in gradients), parameters)
    assert any(value.abs().max() > 0 for value in second)


def test_a_copy_continues_like_the_original(problem) -> None:
    task = problem.sample(5)
    task()
    twin = copy.deepcopy(task)
    assert equal(trace(twin), trace(task))


def test_generator_and_parameters_are_the_whole_state(problem) -> None:
    task = problem.sample(5)
    task()
    state, random = copy.deepcopy(task.state_dict()), task.generator.get_state()
    expected = trace(task)
    again = problem.sample(5)
    again.load_state_dict(state)
    again.generator.set_state(random)
    assert equal(trace(again), expected)


def test_device_is_honoured(problem) -> None:
    task = problem.sample(0, device="meta")
    assert {parameter.device.type for parameter in task.parameters()} == {"meta"}


def test_split_and_seed_are_checked(problem) -> None:
    with pytest.raises(ValueError, match=r"split must be one of \('train', 'validation', 'test'\), got 'dev'"):
        problem.sample(0, "dev")
    for seed in (1.5, "1", None, True):
        with pytest.raises(TypeError, match="seed must be an integer"):
            problem.sample(seed)


def test_splits_never_share_a_stream() -> None:
    seeds = {split: {task_generator(seed, split).initial_seed() for seed in range(2000)} for split in problems.SPLITS}
    assert seeds["train"].isdisjoint(seeds["validation"] | seeds["test"])
    assert seeds["validation"].isdisjoint(seeds["test"])
    assert all(max(values) < 2**32 for values in seeds.values())
    assert all(len(values) >= 1999 for values in seeds.values())
    assert task_generator(-1, "train").initial_seed() != task_generator(1, "train").initial_seed()
    assert task_generator(2**70, "train").initial_seed() != task_generator(0, "train").initial_seed()


@pytest.mark.parametrize("name", ["uniform quadratics", "gaussian quadratics", "mnist", "zoo"])
def test_config_builds_the_problem_again(name) -> None:
    problem = PROBLEMS[name]
    config = json.loads(json.dumps(problem.config()))
    again = problems.get(**config)
    assert again.config() == problem.config()
    assert equal(trace(again.sample(1, "test")), trace(problem.sample(1, "test")))
    assert repr(problem).startswith(type(problem).__name__ + "(")


def test_registry() -> None:
    assert {"mnist", "quadratic"} <= set(problems.available())
    assert problems.get("mnist", hidden=(40,)).hidden == (40,)
    with pytest.raises(ValueError, match=r"name must be one of \(.*'quadratic'.*\), got 'cubic'"):
        problems.get("cubic")
    with pytest.raises(ValueError, match="'mnist' is taken"):
        problems.register("mnist", problems.MNIST)
    with pytest.raises(TypeError, match="make must be callable"):
        problems.register("new", 3)
