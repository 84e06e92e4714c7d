"""Fused and autograd episodes, evaluation and baselines are one protocol: compared over unusual optimizees."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast.evaluation import baselines, decisions
from l2l_fast.kernels.tensor_inputs import DEFAULT_INPUTS
from l2l_fast.meta import Protocol, evaluate
from l2l_fast.meta.estimators import AutogradBPTT, FusedBPTT
from l2l_fast.problems import Quadratic, Task
from l2l_fast.problems.scaled import Scaled
from l2l_fast.problems.theta import Theta
from tests.helpers import assert_close, random_network
from tests.meta import unusual
from tests.normalized_helpers import normalized_network

HORIZON, UNROLL = 7, 3
fused_episode, autograd_episode = FusedBPTT().episode, AutogradBPTT().episode


def network(**options) -> l2l.CoordinatewiseLSTM:
    return random_network(**{"hidden_size": 6, "preprocess": "identity", "output_scale": 0.1, **options})


def episode(run, task: Task, net, protocol=None):
    """What an episode leaves: losses, the meta-gradient of every segment, and the task."""
    collected = []

    def meta_step():
        collected.append(torch.cat([p.grad.reshape(-1).clone() for p in net.parameters() if p.requires_grad]))
        net.zero_grad()

    losses = run(task, net, protocol or Protocol.make(HORIZON, UNROLL), meta_step)
    return torch.tensor(losses, dtype=torch.float64), collected, task


def assert_alike(one, other, tolerance: float) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=tolerance, atol=tolerance)
    assert len(one[1]) == len(other[1]) == 3
    for a, b in zip(one[1], other[1], strict=True):
        assert a.abs().max() > 0
        assert_close(a, b, tolerance)
    for (name, a), b in zip(one[2].state_dict().items(), other[2].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)
    assert torch.equal(one[2].generator.get_state(), other[2].generator.get_state())


@pytest.mark.parametrize("gac_cells", [0, 2])
@pytest.mark.parametrize("name", unusual.MODULES)
def test_fused_and_autograd_episodes_agree(name, gac_cells):
    problem, net = unusual.problem_of(unusual.MODULES[name]), network(gac_cells=gac_cells)
    start = problem.sample(3)
    fused = episode(fused_episode, problem.sample(3), net)
    unrolled = episode(autograd_episode, problem.sample(3), net)
    # bfloat16 rounds theta at every step, so a last bit of the update may fall on either side.
    assert_alike(fused, unrolled, 2e-2 if name == "bfloat16" else 2e-4)
    for key, before in start.named_parameters():
        for _, _, task in (fused, unrolled):
            still = not before.requires_grad or "unused" in key
            assert torch.equal(before, task.get_parameter(key)) == still, key


@pytest.mark.parametrize("name", unusual.MODULES)
def test_evaluation_and_baselines_treat_parameters_as_episodes_do(name):
    made = []

    def make() -> nn.Module:
        made.append(unusual.MODULES[name]())
        starts.append({key: value.detach().clone() for key, value in made[-1].named_parameters()})
        return made[-1]

    starts: list[dict] = []
    problem, net = unusual.problem_of(make), network()
    fused = episode(fused_episode, problem.sample(3), net)[0]
    assert torch.equal(evaluate(net, problem, [3], HORIZON, split="train")[0], fused)
    for baseline in baselines.NAMES:
        baselines.run(problem, baseline, 0.01, [3], HORIZON)
    if name != "mixed dtypes":
        decisions.decide(net, problem.sample(3), {"adam": 0.1, "sgd": 0.1}, horizon=4)
    dead = "0.bias" if name == "batch norm" else "unused"  # their gradients are zero
    for module, start in zip(made, starts, strict=True):
        moved = [k for k, v in module.named_parameters() if not torch.equal(v, start[k]) and not k.startswith(dead)]
        assert moved == [k for k, v in module.named_parameters() if v.requires_grad and not k.startswith(dead)]


@pytest.mark.parametrize("how", [False, True])
@pytest.mark.parametrize("run", [fused_episode, autograd_episode])
def test_checkpointing_changes_nothing(run, how):
    plain, recomputed = (
        episode(run, unusual.problem_of(lambda kind=kind: unusual.Checkpointed(kind)).sample(0), network())
        for kind in (None, how)
    )
    assert_alike(plain, recomputed, 1e-6)


@pytest.mark.parametrize("how", [False, True])
def test_second_derivatives_of_a_checkpointed_task_are_refused(how):
    problem, net = unusual.problem_of(lambda: unusual.Checkpointed(how)), network()
    for task in (problem.sample(0), Scaled(problem, 0.5).sample(0)):
        with pytest.raises(NotImplementedError, match="unusual.*checkpointing"):
            episode(autograd_episode, task, net, Protocol.make(4, 4, second_derivatives=True))
        assert all(parameter.grad is None for parameter in net.parameters())
        assert task().isfinite()  # theta is back in its place


def test_a_meta_loss_may_use_losses_of_a_checkpointed_task_but_not_evaluate_it():
    problem, net = unusual.problem_of(lambda: unusual.Checkpointed(False)), network()
    plain, recomputed = (
        episode(
            AutogradBPTT(lambda trace: trace.losses[1:].log().sum()).episode,
            unusual.problem_of(lambda kind=kind: unusual.Checkpointed(kind)).sample(0),
            net,
        )
        for kind in (None, False)
    )
    assert_alike(plain, recomputed, 1e-6)
    with pytest.raises(NotImplementedError, match="checkpointing"):
        evaluating = AutogradBPTT(lambda trace: torch.func.functional_call(trace.task, trace.parameters, ()))
        episode(evaluating.episode, problem.sample(0), net)


@pytest.mark.parametrize(
    "name", ["plain", "partly frozen", "tied", "unused layers", "weight norm", "float64", "parametrized", "bfloat16"]
)
def test_second_derivatives_see_the_same_theta(name):
    problem, net = unusual.problem_of(unusual.MODULES[name]), network()
    protocol = Protocol.make(HORIZON, UNROLL, second_derivatives=True)
    exact, dropped = (episode(autograd_episode, problem.sample(3), net, each) for each in (protocol, None))
    torch.testing.assert_close(exact[0], dropped[0], rtol=2e-2, atol=1e-3)
    for k, (one, other) in enumerate(zip(exact[1], dropped[1], strict=True)):
        # The last segment is a single step, in which there is no second derivative.
        assert one.isfinite().all() and (k == 2 or not torch.equal(one, other))
    for (key, a), b in zip(exact[2].named_parameters(), dropped[2].parameters(), strict=True):
        assert a.requires_grad or torch.equal(a, problem.sample(3).get_parameter(key))
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("how", [None, False, True])
def test_scaled_tasks_are_recomputed_at_the_present_theta(how):
    scaled = [
        Scaled(unusual.problem_of(lambda kind=kind: unusual.Checkpointed(kind)), 1.0, (-1, 1)).sample(0)
        for kind in (None, how)
    ]
    one, other = (episode(fused_episode, task, network()) for task in scaled)
    assert_alike(one, other, 1e-6)
    unrolled = Scaled(unusual.problem_of(lambda: unusual.Checkpointed(how)), 1.0, (-1, 1)).sample(0)
    assert_alike(one, episode(autograd_episode, unrolled, network()), 2e-4)


def test_frozen_parameters_of_a_scaled_task_stay_as_they_are():
    task = Scaled(unusual.problem_of(lambda: unusual.frozen("0.weight")), 1.0).sample(0)
    assert list(Theta(task).parameters) == ["module_0_bias", "module_2_weight", "module_2_bias"]
    before = task._task.get_parameter("module.0.weight").clone()
    episode(fused_episode, task, network())
    assert torch.equal(before, task._task.get_parameter("module.0.weight"))


@pytest.mark.parametrize("gac_cells", [0, 2])
def test_several_problems_side_by_side(gac_cells):
    problem, net = Quadratic(dim=3, batch=5), network(gac_cells=gac_cells)
    one, other = (episode(run, problem.sample(1), net) for run in (fused_episode, autograd_episode))
    assert_alike(one, other, 2e-4)


class Groups(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 1)
        self.a.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("listed", ["all", "trainable"])
def test_several_networks_and_frozen_parameters(listed):
    groups = {"weights": ["module.a.weight", "module.b.weight"], "biases": ["module.a.bias", "module.b.bias"]}
    if listed == "trainable":
        groups["weights"].remove("module.a.weight")
    nets = nn.ModuleDict({key: random_network(k, hidden_size=5, output_scale=0.1) for k, key in enumerate(groups)})
    problem = unusual.problem_of(Groups)
    results = []
    for run in (fused_episode, autograd_episode):
        task = problem.sample(2)
        task.parameter_groups = lambda: groups
        results.append(episode(run, task, nets))
        assert torch.equal(task.module.a.weight, problem.sample(2).module.a.weight)
    assert_alike(*results, 2e-4)
    task.parameter_groups = lambda: {**groups, "biases": ["module.a.bias", "module.c"]}
    with pytest.raises(ValueError, match="module.c"):
        episode(fused_episode, task, nets)


@pytest.mark.parametrize("memory", ["dense", "low_rank"])
@pytest.mark.parametrize("name", ["plain", "partly frozen", "checkpointed, reentrant", "tied", "dropout", "float64"])
def test_networks_with_memory_walk_as_they_are_deployed(name, memory):
    net = l2l.NTMBFGS(hidden_size=6, memory=memory, history=3)
    problem = unusual.problem_of(unusual.MODULES[name])
    losses, gradients, task = episode(autograd_episode, problem.sample(3), net)
    torch.testing.assert_close(losses, evaluate(net, problem, [3], HORIZON, split="train")[0], rtol=1e-4, atol=1e-5)
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    for key, value in problem.sample(3).named_parameters():
        assert torch.equal(value, task.get_parameter(key)) != value.requires_grad


def nothing_to_do() -> dict[str, tuple]:
    def late(module: nn.Module, generator: torch.Generator) -> torch.Tensor:
        if not hasattr(module, "late"):
            module.late = nn.Parameter(torch.ones(()))
        return unusual.regression(module, generator) * module.late

    def unfreezing(module: nn.Module, generator: torch.Generator) -> torch.Tensor:
        module.requires_grad_(True)
        return unusual.regression(module, generator)

    def constant(module: nn.Module, generator: torch.Generator) -> torch.Tensor:
        return torch.randn((), generator=generator)

    def elsewhere(module: nn.Module, generator: torch.Generator) -> torch.Tensor:
        return torch.ones((), requires_grad=True) * 2

    def under_inference() -> nn.Module:
        with torch.inference_mode():
            return unusual.perceptron()

    all_frozen = lambda: unusual.perceptron().requires_grad_(False)  # noqa: E731
    return {
        "all frozen": (all_frozen, unusual.regression, "unusual.*frozen.*0.weight"),
        "no parameters": (nn.Tanh, unusual.regression, "unusual.*no parameters"),
        "lazy": (lambda: nn.Sequential(nn.LazyLinear(1)), unusual.regression, "unusual.*lazy"),
        "inference": (under_inference, unusual.regression, "unusual.*inference_mode"),
        "made late": (unusual.perceptron, late, "unusual.*late"),
        "unfrozen late": (lambda: unusual.frozen("0.bias"), unfreezing, "unusual.*0.bias"),
        "constant": (unusual.perceptron, constant, "unusual.*does not depend"),
        "elsewhere": (unusual.perceptron, elsewhere, "unusual.*does not depend"),
    }


@pytest.mark.parametrize("name", nothing_to_do())
def test_where_there_is_nothing_to_optimise_the_problem_is_named(name):
    make, loss, message = nothing_to_do()[name]
    problem, net = unusual.problem_of(make, loss), network()
    before = net.phi().clone()
    for attempt in (
        lambda: episode(fused_episode, problem.sample(0), net),
        lambda: episode(autograd_episode, problem.sample(0), net),
        lambda: episode(autograd_episode, problem.sample(0), net, Protocol.make(4, 4, second_derivatives=True)),
        lambda: evaluate(net, problem, [0], 3),
        lambda: baselines.run(problem, "adam", 0.1, [0], 3),
        lambda: decisions.decide(net, problem.sample(0), {"adam": 0.1, "sgd": 0.1}, horizon=3),
        lambda: l2l.MetaTrainer(net, problem, horizon=4, unroll=2).fit(1, progress=False),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()
    assert torch.equal(before, net.phi())


class Clamped(nn.Module):
    """Edits its own parameters in place whenever it is evaluated; ``how`` it does so."""

    def __init__(self, how: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(6, 1).to(dtype), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.layer.weight
        with torch.no_grad():
            if self.how == "clamp_":
                weight.clamp_(-0.2, 0.2)
            elif self.how == "data":
                weight.data.mul_(0.9)
            elif self.how == "replaced":
                weight.data = weight.data.clamp(-0.2, 0.2)
            elif self.how == "projected":
                weight /= weight.norm().clamp_min(0.5)
        return self.layer(x)


EDITS = ["clamp_", "data", "replaced", "projected"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gac_cells", [0, 2])
@pytest.mark.parametrize("how", EDITS)
def test_edits_in_place_stay_as_in_any_training_loop(how, gac_cells, dtype):
    problem, net = unusual.problem_of(lambda: Clamped(how, dtype)), network(gac_cells=gac_cells)
    fused, unrolled = (episode(run, problem.sample(3), net) for run in (fused_episode, autograd_episode))
    assert_alike(fused, unrolled, 2e-2 if dtype == torch.bfloat16 else 2e-4)
    plain = episode(fused_episode, unusual.problem_of(lambda: Clamped("not at all", dtype)).sample(3), net)
    assert not torch.equal(plain[0], fused[0])
    # As with an optimizer of torch's interface, by hand.
    task = problem.sample(3)
    optimizer = l2l.LearnedOptimizer([{"params": list(task.parameters()), "network": net}])
    losses = []
    for _ in range(HORIZON):
        optimizer.zero_grad()
        loss = task()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses == fused[0][:-1].tolist()
    for key, value in task.named_parameters():  # the last evaluation of an episode edits once more
        if key != "module.layer.weight":
            assert torch.equal(value, fused[2].get_parameter(key))


@pytest.mark.parametrize("how", EDITS)
def test_edits_stay_with_second_derivatives_too(how):
    problem, net = unusual.problem_of(lambda: Clamped(how)), network()
    protocol = Protocol.make(HORIZON, UNROLL, second_derivatives=True)
    exact, dropped = (episode(autograd_episode, problem.sample(3), net, each) for each in (protocol, None))
    torch.testing.assert_close(exact[0], dropped[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(exact[1][2], dropped[1][2]) or torch.allclose(exact[1][2], dropped[1][2], rtol=1e-3)
    assert not torch.allclose(exact[1][0], dropped[1][0], rtol=1e-3)


@pytest.mark.parametrize("name", list(unusual.MODULES)[:4])
def test_they_agree_on_what_a_network_is_told_of_a_tensor(name):
    """Inputs per tensor, from sums and alignments that both carry along; total_steps is the horizon."""
    net = normalized_network(tensor_inputs=len(DEFAULT_INPUTS), hidden_size=6, output_scale=0.05)
    net.weight_nominal.requires_grad_(False)  # no meta-gradient reaches it
    problem = unusual.problem_of(unusual.MODULES[name])
    fused = episode(fused_episode, problem.sample(3), net)
    unrolled = episode(autograd_episode, problem.sample(3), net)
    assert_alike(fused, unrolled, 5e-2 if name == "bfloat16" else 2e-3)
