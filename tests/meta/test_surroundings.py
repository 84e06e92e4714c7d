"""Loops of the package under whatever the caller has switched on: the very same results, or an error that says why."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast.evaluation import baselines, decisions
from l2l_fast.evaluation.benchmark.episode import FusedEpisode
from l2l_fast.meta import Evolution, evaluate
from l2l_fast.problems import MNIST, ModuleProblem, Quadratic, Zoo
from tests.helpers import random_network
from tests.meta.unusual import perceptron

DATA = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


def fitting(module: nn.Module, generator: torch.Generator) -> torch.Tensor:
    return (module(DATA).squeeze(1) - DATA.sum(1)).float().square().mean()


class Own(nn.Module):
    """Enters an autocast of its own, made once, whose cache a surrounding region would keep alive."""

    def __init__(self) -> None:
        super().__init__()
        self.module = perceptron()
        self.autocast = torch.autocast("cpu", torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.autocast:
            return self.module(x)


PROBLEMS = {
    "quadratic": Quadratic(dim=3, batch=4),
    "mnist": MNIST(hidden=(3,), batch_size=8),
    "module": ModuleProblem(lambda generator: perceptron(), fitting),
    "own autocast": ModuleProblem(lambda generator: Own(), fitting),
}


@contextmanager
def default(setter, value, before):
    setter(value)
    try:
        yield
    finally:
        setter(before)


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "deterministic": lambda: default(torch.use_deterministic_algorithms, True, False),
    "float64": lambda: default(torch.set_default_dtype, torch.float64, torch.float32),
    "device": lambda: default(torch.set_default_device, "meta", None),
}
OWN_DRAWS = ("float64", "device")  # a user's module follows these, as it should; the problems of the package do not


def network(**options) -> l2l.CoordinatewiseLSTM:
    return random_network(**{"hidden_size": 6, "preprocess": "identity", "output_scale": 0.1, **options})


def fitted(net, problem, **options) -> torch.Tensor:
    run = l2l.MetaTrainer(net, problem, horizon=6, unroll=3, validate_every=1, validation_episodes=1, **options)
    run.fit(2, progress=False)
    return torch.cat([p.detach().reshape(-1) for p in run.best_net().parameters()])


def decided(net, problem) -> torch.Tensor:
    with torch.inference_mode(False):
        task = problem.sample(0)
    found = decisions.decide(net, task, {"adam": 0.1, "sgd": 0.01}, horizon=4, points=5)
    return torch.cat([value.reshape(-1) for value in [*found.updates.values(), *found.proposals.values()]])


def episode(net, problem) -> torch.Tensor:
    run = FusedEpisode(net, problem, 6, 3)
    run()
    return run.net.phi().detach()


LOOPS = {
    "evaluate": lambda problem: evaluate(network(), problem, [0, 1], 6),
    "fit": lambda problem: fitted(network(), problem),
    "fit with autograd": lambda problem: fitted(network(), problem, autograd=True),
    "fit with memory": lambda problem: fitted(l2l.NTMBFGS(hidden_size=6).requires_grad_(True), problem),
    "fit with synthetic gradients": lambda problem: fitted(network(), problem, synthetic_gradients=True),
    "baselines": lambda problem: baselines.run(problem, "adam", 0.05, [0, 1], 6),
    "decisions": lambda problem: decided(network(), problem),
    "benchmark": lambda problem: episode(network(), problem),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("surrounding", SURROUNDINGS)
def test_surroundings_make_no_difference(surrounding, loop, problem):
    if loop == "benchmark" and problem == "own autocast":
        pytest.skip("benchmarks run the package's own problems")
    if surrounding in OWN_DRAWS and problem in ("module", "own autocast"):
        pytest.skip("a module of the user's follows torch's defaults")
    if surrounding in (*OWN_DRAWS, "inference_mode") and loop not in ("evaluate", "baselines", "decisions"):
        # A network made inside could not be trained, or would be another one: made outside.
        net = l2l.NTMBFGS(hidden_size=6) if "memory" in loop else network()
        ways = {"fit with autograd": "autograd", "fit with synthetic gradients": "synthetic_gradients"}
        options = {ways[loop]: True} if loop in ways else {}
        run = episode if loop == "benchmark" else fitted
        torch.manual_seed(0)
        plain = run(_copy(net), PROBLEMS[problem], **options)
        copied = _copy(net)
        with SURROUNDINGS[surrounding]():
            result = run(copied, PROBLEMS[problem], **options)
    else:
        torch.manual_seed(0)
        plain = LOOPS[loop](PROBLEMS[problem])
        torch.manual_seed(0)
        if surrounding in OWN_DRAWS:
            result = _inside_with_network_from_outside(loop, problem, surrounding)
        else:
            with SURROUNDINGS[surrounding]():
                result = LOOPS[loop](PROBLEMS[problem])
    assert plain.isfinite().all() and plain.dtype == result.dtype
    assert torch.equal(plain, result)


def _copy(net):
    import copy

    return copy.deepcopy(net)


def _inside_with_network_from_outside(loop, problem, surrounding) -> torch.Tensor:
    net = network()
    with SURROUNDINGS[surrounding]():
        if loop == "evaluate":
            return evaluate(net, PROBLEMS[problem], [0, 1], 6)
        if loop == "decisions":
            return decided(net, PROBLEMS[problem])
        return LOOPS[loop](PROBLEMS[problem])


def test_a_task_keeps_the_autocast_that_it_enters_itself():
    whole = ModuleProblem(lambda generator: perceptron(), fitting)
    own = evaluate(network(), PROBLEMS["own autocast"], [0], 6)
    assert not torch.equal(own, evaluate(network(), whole, [0], 6))
    assert len(set(own[0].tolist())) > 4  # theta moves, and f sees it move


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
def test_evolution_is_the_same_in_all_of_them(surrounding):
    def run(net):
        zoo = Zoo(problems=1)
        options = {"horizon": 20, "unroll": 10, "validate_every": 0, "estimator": Evolution(pairs=1, shortest=10)}
        l2l.MetaTrainer(net, zoo, seed=0, lr=1e-2, **options).fit(1, progress=False)
        return net.weight_nominal.detach()

    options = {"hidden_size": 0, "num_layers": 0, "preprocess": "normalized", "tensor_inputs": 15}
    net = l2l.CoordinatewiseLSTM(**options)
    plain, copied = run(_copy(net)), _copy(net)
    with SURROUNDINGS[surrounding]():
        result = run(copied)
    assert plain.any() and torch.equal(plain, result)
