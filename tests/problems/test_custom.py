"""ModuleProblem: users' own modules and losses."""

import functools

import pytest
import torch
from torch import nn

from l2l_fast.problems import ModuleProblem


def test_the_loss_gets_the_module_and_the_split() -> None:
    seen = []

    def make(generator: torch.Generator, split: str) -> nn.Module:
        seen.append(split)
        return nn.Linear(2, 1)

    def loss(module: nn.Module, generator: torch.Generator, *, split: str) -> torch.Tensor:
        seen.append((type(module), split))
        return module(torch.ones(1, 2)).sum()

    task = ModuleProblem(make, loss, name="lines").sample(0, "validation")
    value = task()
    assert seen == ["validation", (nn.Linear, "validation")]
    assert value.item() == pytest.approx(task.module(torch.ones(1, 2)).item())
    assert [name for name, _ in task.named_parameters()] == ["module.weight", "module.bias"]


def test_dropout_draws_anew_at_each_evaluation_and_alike_for_each_copy() -> None:
    problem = ModuleProblem(
        lambda generator: nn.Sequential(nn.Linear(50, 50), nn.Dropout(0.5)),
        lambda module, generator: module(torch.ones(1, 50)).sum(),
    )
    task, twin = problem.sample(0), problem.sample(0)
    values = [task().item() for _ in range(3)]
    assert len(set(values)) == 3
    torch.rand(7)
    assert [twin().item() for _ in range(3)] == values


def test_the_global_state_is_put_back_when_the_loss_fails() -> None:
    def loss(module: nn.Module, generator: torch.Generator) -> torch.Tensor:
        torch.rand(3)
        raise RuntimeError("mine")

    task = ModuleProblem(lambda generator: nn.Linear(1, 1), loss).sample(0)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="mine"):
        task()
    assert torch.equal(torch.get_rng_state(), before)


def test_callables_without_a_signature_or_with_bound_arguments() -> None:
    problem = ModuleProblem(
        functools.partial(lambda width, generator: nn.Linear(width, 1), 3),
        functools.partial(lambda scale, module, generator: scale * module(torch.ones(1, 3)).sum(), 2.0),
    )
    assert problem.sample(0).module.in_features == 3


def test_arguments_and_results_are_checked() -> None:
    def make(generator: torch.Generator) -> nn.Module:
        return nn.Linear(2, 1)

    with pytest.raises(TypeError, match="make must be callable, got Linear|make must be callable, got int"):
        ModuleProblem(3, make)
    with pytest.raises(TypeError, match="loss must be callable, got str"):
        ModuleProblem(make, "loss")
    with pytest.raises(TypeError, match="name must be a string"):
        ModuleProblem(make, make, name=3)
    with pytest.raises(TypeError, match=r"make must return an nn.Module, got int"):
        ModuleProblem(lambda generator: 3, make).sample(0)
    with pytest.raises(ValueError, match="loss must return a scalar tensor, got 3.0"):
        ModuleProblem(make, lambda module, generator: 3.0).sample(0)()
    with pytest.raises(ValueError, match=r"loss must return a scalar tensor, got a tensor of shape \(1, 2\)"):
        ModuleProblem(make, lambda module, generator: module.weight).sample(0)()
