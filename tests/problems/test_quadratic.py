"""Quadratics: the function, its gradient and its distribution (Andrychowicz et al. 2016, section 3.1)."""

import pytest
import torch

from l2l_fast.problems import Quadratic


def test_value_and_gradient_follow_the_definition() -> None:
    task = Quadratic(dim=4, batch=6, family="gaussian", init_std=1.0).sample(2)
    assert [(name, tuple(p.shape)) for name, p in task.named_parameters()] == [("theta", (6, 4))]
    assert task.num_problems == 6
    expected_loss, expected_gradient = 0.0, []
    for k in range(6):
        residual = task.W[k].double() @ task.theta[k].detach().double() - task.y[k, :, 0].double()
        expected_loss += residual.square().sum().item()
        expected_gradient.append(2 * task.W[k].double().T @ residual)
    loss = task()
    loss.backward()
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    torch.testing.assert_close(task.theta.grad.double(), torch.stack(expected_gradient), rtol=1e-5, atol=1e-4)


def test_gradcheck_in_double_precision() -> None:
    task = Quadratic(dim=3, batch=2, init_std=1.0).sample(0).double()

    def loss(theta: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(task, {"theta": theta}, ())

    theta = task.theta.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (theta,))
    assert torch.autograd.gradgradcheck(loss, (theta,))


@pytest.mark.parametrize(("family", "mean", "variance"), [("uniform", 0.5, 1 / 12), ("gaussian", 0.0, 1.0)])
def test_families(family, mean, variance) -> None:
    task = Quadratic(batch=4096, family=family).sample(0)
    for values in (task.W, task.y):
        assert values.mean().item() == pytest.approx(mean, abs=0.02)
        assert values.var().item() == pytest.approx(variance, rel=0.03)
    assert task.theta.std().item() == pytest.approx(0.01, rel=0.03)
    start = task().item() / task.num_problems
    # 10 E[y^2]: 3.33 and 10.
    assert start == pytest.approx(10 * (mean**2 + variance), rel=0.02)


def test_the_function_does_not_change_between_evaluations() -> None:
    task = Quadratic().sample(0)
    assert task().item() == task().item()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim must be a positive integer, got 0"),
        ({"batch": 2.0}, TypeError, "batch must be a positive integer, got 2.0"),
        ({"batch": True}, TypeError, "batch must be a positive integer, got True"),
        ({"family": "normal"}, ValueError, r"family must be one of .*'gaussian'.*, got 'normal'"),
        ({"init_std": -1}, ValueError, "init_std must be finite and not negative, got -1"),
        ({"init_std": float("nan")}, ValueError, "init_std must be finite"),
        ({"init_std": "1"}, TypeError, "init_std must be a number"),
    ],
)
def test_options_are_checked(options, error, message) -> None:
    with pytest.raises(error, match=message):
        Quadratic(**options)


@pytest.mark.parametrize("family", ["uniform", "gaussian", "ill_conditioned"])
def test_losses_problem_by_problem(family) -> None:
    task = Quadratic(dim=4, batch=6, family=family, init_std=1.0).sample(2)
    found = task.losses_by_problem()
    expected = [
        (task.W[k].double() @ task.theta[k].double() - task.y[k, :, 0].double()).square().sum() for k in range(6)
    ]
    torch.testing.assert_close(found.double(), torch.stack(expected).detach(), rtol=1e-5, atol=1e-6)
    assert found.sum().item() == pytest.approx(task().item()) and not found.requires_grad
