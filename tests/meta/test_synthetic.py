"""Synthetic gradients at the boundaries of segments: zero is truncated back-propagation, exact is the whole horizon."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast.meta import Protocol, SyntheticGradients, recipes
from l2l_fast.meta.estimators import PES, FusedBPTT
from l2l_fast.meta.estimators.predictor import Boundary, Example, Moments, Predictor
from l2l_fast.problems import ModuleProblem, Quadratic
from tests.helpers import assert_close, random_network

HORIZON, UNROLL = 12, 3


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Linear(nn.Module):
    """f(theta) = <a, theta>: its gradients are constant."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        for name, shape in (("x", (7, 10)), ("y", (3,))):
            self.register_buffer(f"a_{name}", torch.randn(shape, generator=generator).to(dtype))
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype)))

    def loss(self) -> torch.Tensor:
        return (self.a_x * self.x).sum() + (self.a_y * self.y).sum()


def linear(dtype: torch.dtype = torch.float32) -> ModuleProblem:
    return ModuleProblem(lambda generator: Linear(dtype), lambda module, generator: module.loss(), name="linear")


def network(seed: int = 0, **options) -> l2l.CoordinatewiseLSTM:
    defaults = {"hidden_size": 6, "preprocess": "identity", "output_scale": 0.1, "gain": 1.0}
    return random_network(seed, **{**defaults, **options})


def forgetful(dtype: torch.dtype = torch.float32) -> l2l.CoordinatewiseLSTM:
    """One whose state carries nothing from step to step, so that theta alone crosses boundaries."""
    net = network(num_layers=1)
    with torch.no_grad():
        net.weight_hh_l0.zero_()
        net.bias_l0[6:12] = -1e4  # the forget gate
    return net.to(dtype)


def flat(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten().double() for p in net.parameters()])


def episode_gradient(estimator, net, task, unroll: int, weights=None) -> torch.Tensor:
    """The sum of an episode's meta-gradients, phi staying what it is."""
    net = copy.deepcopy(net)
    protocol = Protocol.make(HORIZON, unroll, weights)
    estimator.episode(copy.deepcopy(task), net, protocol, lambda: None, torch.Generator().manual_seed(5))
    return flat(net)


def make(problem=None, net=None, **options) -> l2l.MetaTrainer:
    options = {"synthetic_gradients": True, "validate_every": 2, "validation_episodes": 1, **options}
    return l2l.MetaTrainer(net or network(), problem or Quadratic(dim=3, batch=2), HORIZON, UNROLL, **options)


def weights(trainer: l2l.MetaTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.net.parameters()])


# ---- what is injected ----


class InjectsZeros(SyntheticGradients):
    """Goes all the way with a predictor that has learned nothing."""

    def predictor_of(self, key, network, generator):
        predictor = super().predictor_of(key, network, generator)
        predictor.is_zero = lambda: False
        return predictor


@pytest.mark.parametrize("options", [{}, {"gac_cells": 2}, {"preprocess": "normalized"}, {"preprocess": "log_sign"}])
def test_a_predictor_of_zeros_is_truncated_back_propagation_bit_for_bit(options):
    problem = Quadratic(dim=3, batch=1 if options.get("preprocess") == "normalized" else 2)
    runs = [
        make(problem, network(**options), synthetic_gradients=False, estimator=estimator).fit(3, progress=False)
        for estimator in ("bptt", SyntheticGradients(predictor_lr=0.0), InjectsZeros(predictor_lr=0.0))
    ]
    assert torch.equal(weights(runs[0]), weights(runs[1])) and torch.equal(weights(runs[0]), weights(runs[2]))
    assert runs[0].counters == runs[2].counters
    assert not torch.equal(weights(runs[0]), weights(make(problem, network(**options)).fit(3, progress=False)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss_weights", [None, [0.0] * 5 + [1.0, 0.5, 2.0, 0.0, 0.0, 1.0, 3.0]])
def test_a_frozen_exact_predictor_gives_the_gradient_of_the_whole_horizon(dtype, loss_weights):
    """Of a linear f, whose future gradients are the present one: y_0' = 1. Segments without weight count, too."""
    net, task = forgetful(dtype), linear(dtype).sample(0)
    exact = episode_gradient(FusedBPTT(), net, task, HORIZON, loss_weights)
    truncated = episode_gradient(FusedBPTT(), net, task, UNROLL, loss_weights)
    estimator = SyntheticGradients(predictor_lr=0.0, discount=1.0)
    predictor = estimator.predictor_of("", net, torch.Generator())
    predictor.values["V"][-1, -2] = 1.0  # of the input that is 1
    predictor.agreement.fill_(1.0)
    assert_close(episode_gradient(estimator, net, task, UNROLL, loss_weights), exact, 1e-5)
    assert (truncated - exact).norm() > 0.3 * exact.norm()


@pytest.mark.parametrize("options", [{}, {"bp_lambda": 1.0}, {"bp_lambda": 0.5, "auxiliary": 0.5}])
def test_it_learns_what_is_to_come(options):
    """Nothing of the network moves; after some episodes the truncated gradient is nearly that of the whole horizon."""
    net, task = network(), linear().sample(0)
    exact = episode_gradient(FusedBPTT(), net, task, HORIZON)
    estimator = SyntheticGradients(discount=1.0, **options)
    found = [episode_gradient(estimator, net, task, UNROLL) for _ in range(60)]
    errors = [float((each - exact).norm() / exact.norm()) for each in found]
    assert errors[0] > 0.3 and sum(errors[-5:]) / 5 < 0.25 * errors[0], errors


@pytest.mark.parametrize(("bp_lambda", "discount"), [(0.0, 1.0), (0.25, 1.0), (1.0, 1.0), (0.0, 0.8), (0.5, 0.8)])
def test_targets_mix_predictions_with_what_the_episode_brought(bp_lambda, discount, monkeypatch):
    """By hand, of theta, with a predictor that says half of that wherever it is asked."""
    seen: list[Example] = []
    monkeypatch.setattr(Predictor, "learn", lambda self, examples, *others: seen.append(examples[0]))
    net, task = forgetful(), linear().sample(0)
    estimator = SyntheticGradients(bp_lambda=bp_lambda, discount=discount)
    predictor = estimator.predictor_of("", net, torch.Generator())
    predictor.values["V"][-1, -2] = 0.5
    predictor.agreement.fill_(1.0)
    episode_gradient(estimator, net, task, UNROLL)
    a, segments = task.module.a_x.flatten()[:64], HORIZON // UNROLL
    expected, following, left, factor = [0.0] * segments, 0.0, 0.0, discount**UNROLL
    for k in reversed(range(segments)):
        expected[k] = UNROLL + factor * ((1 - bp_lambda) * 0.5 * left + bp_lambda * following)
        following, left = expected[k], UNROLL + factor * left
    order = seen if bp_lambda == 0.0 else seen[::-1]
    for example, value in zip(order, expected, strict=True):
        torch.testing.assert_close(example.theta[0, 0], value * a, rtol=1e-5, atol=1e-5)


# ---- the predictor ----


def test_the_predictor_is_coordinatewise_and_zero_at_the_end():
    net = network()
    generator = torch.Generator().manual_seed(0)
    predictor = Predictor(net.config, 8, generator)
    predictor.values["V"] = torch.randn(predictor.values["V"].shape, generator=generator)
    predictor.agreement.fill_(1.0)
    param = torch.zeros(13, 5)
    grads = [torch.randn(13, 5, generator=generator) for _ in range(3)]
    grads[1][3, 2] = grads[2][3, 2] = torch.nan
    grads[0][0, 0] = grads[1][0, 0] = grads[2][0, 0] = 0.0
    moments = Moments(param)
    for grad in grads:
        moments.update(grad)
    data = torch.full((2, net.config.rows, 64), torch.nan)  # what lies beyond the last coordinate may be anything
    state = l2l.State.zeros(65, net.hidden_size, net.num_layers)
    state.data.copy_(torch.where(torch.arange(128).view(2, 1, 64) < 65, 0.1, data))
    at = Boundary.of(moments, state, net.config, 4.0, 0.5)
    values = predictor.predict(at).transpose(1, 2).reshape(128, -1)
    other = torch.arange(65) != 3 * 5 + 2
    assert values[:65][other].isfinite().all() and values[17].isnan().all()
    assert not values[0].any() and not values[65:].any()
    second = Boundary.of(moments, state, net.config, 4.0, 0.5, slice(1, 2))
    assert torch.equal(predictor.predict(second).transpose(1, 2)[0], values[64:])
    # It scales with the gradients, but for the logarithm's input, and with the weight that is left.
    twice = predictor.predict(at._replace(r=2 * at.r, left=8.0)).transpose(1, 2).reshape(128, -1)
    torch.testing.assert_close(twice[:17], 4 * values[:17])
    assert not predictor.predict(at._replace(left=0.0))[1].any()


def test_a_step_goes_down_the_error_and_none_is_made_of_nan():
    net = network()
    generator = torch.Generator().manual_seed(0)
    predictor = Predictor(net.config, 8, generator, auxiliary=True)
    moments = Moments(torch.zeros(64))
    moments.update(torch.randn(64, generator=generator))
    at = Boundary.of(moments, None, net.config, 3.0, 0.0)
    target = moments.grad * torch.linspace(-1.0, 2.0, 1 + net.config.rows).view(1, -1, 1)
    example = Example(at, target[:, :1], target[:, 1:], target, 2.0)
    errors = [predictor.learn([example], 1e-2, 1.0) for _ in range(50)]
    assert errors[-1] < 0.9 * errors[0]
    before = predictor.state_dict()
    assert predictor.learn([example._replace(theta=target[:, :1] * torch.nan)], 1e-2) is None
    assert all(torch.equal(value, before[name]) for name, value in predictor.state_dict().items())
    assert predictor.learn([example._replace(at=at._replace(left=0.0))], 1e-2) is None


def test_targets_and_predictions_are_bounded():
    """Of theta by 2 left r, whatever the gradients do later; those of (h, c) by what targets have been."""
    net = network()
    predictor = Predictor(net.config, 8, torch.Generator().manual_seed(0))
    moments = Moments(torch.zeros(64))
    moments.update(torch.linspace(-1.0, 1.0, 64))
    at = Boundary.of(moments, None, net.config, 3.0, 0.0)
    usual = moments.grad * torch.ones(1 + net.config.rows, 1)
    for factor in (1.0, 1e6, 1e6):
        assert predictor.learn([Example(at, factor * usual[:, :1], factor * usual[:, 1:])], 1e-2) is not None
    assert predictor.sizes[0] <= 2.0 and predictor.sizes[1:].max() < 4.0
    predictor.values["V"] = torch.full_like(predictor.values["V"], 1e6)
    predictor.agreement.fill_(1.0)
    values = predictor.predict(at)
    assert values.isfinite().all() and values[:, :1].abs().max() == (2.0 * 3.0 * at.r).max()


# ---- runs ----


def test_a_run_resumes_bit_for_bit(tmp_path):
    whole = make().fit(4, progress=False)
    assert torch.equal(weights(whole), weights(make().fit(4, progress=False)))
    path = tmp_path / "run.safetensors"
    make().fit(2, checkpoint=path, progress=False)
    resumed = l2l.MetaTrainer.from_checkpoint(path)
    assert isinstance(resumed.estimator, SyntheticGradients) and resumed.settings() == make().settings()
    assert torch.equal(weights(resumed.fit(4, progress=False)), weights(whole))
    saved = whole.estimator.state_dict()
    assert saved.keys() == resumed.estimator.state_dict().keys() and saved["net.V.value"].any()
    assert all(torch.equal(value, saved[name]) for name, value in resumed.estimator.state_dict().items())
    ours, theirs = whole.estimator.predictors["net"], resumed.estimator.predictors["net"]
    assert torch.equal(ours.agreement, theirs.agreement) and torch.equal(ours.sizes, theirs.sizes)
    with pytest.raises(ValueError, match=r"protocol\.estimator"):
        make(synthetic_gradients=False).resume(path)
    with pytest.raises(ValueError, match=r"protocol\.predictor_lr"):
        make(estimator=SyntheticGradients(predictor_lr=2e-3)).resume(path)
    torch.set_num_threads(2)
    assert torch.equal(weights(make().fit(4, progress=False)), weights(whole))


def test_its_options_are_in_a_checkpoint(tmp_path):
    options = {"units": 5, "predictor_lr": 0.02, "discount": 0.9, "bp_lambda": 0.5, "auxiliary": 0.3, "coordinates": 64}
    run = make(estimator=SyntheticGradients(**options)).fit(2, progress=False)
    run.save(tmp_path / "c")
    resumed = l2l.MetaTrainer.from_checkpoint(tmp_path / "c")
    assert {name: getattr(resumed.estimator, name) for name in options} == options
    assert torch.equal(weights(resumed.fit(3, progress=False)), weights(run.fit(3, progress=False)))


def test_an_interrupted_episode_leaves_no_trace(monkeypatch):
    whole = make().fit(3, progress=False)
    run, calls = make(), []
    learn = Predictor.learn

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 2 * HORIZON // UNROLL + 2:  # within the third episode
            raise KeyboardInterrupt
        return learn(self, *arguments)

    monkeypatch.setattr(Predictor, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.fit(3, progress=False)
    assert run.episode == 2
    assert torch.equal(weights(run.fit(3, progress=False)), weights(whole))


def test_a_recipe_that_samples_coordinates_leaves_them_be():
    problem = l2l.problems.get("mnist", data="mnist-10k-embedded")
    recipe = recipes.get(problem)
    assert "coordinate_fraction" in recipe.trainer
    trainer = recipe.make_trainer(l2l.CoordinatewiseLSTM(hidden_size=4), problem, synthetic_gradients=True)
    assert isinstance(trainer.estimator, SyntheticGradients) and trainer.estimator.coordinate_fraction == 1.0


def test_without_layers_theta_alone_is_predicted():
    net = l2l.CoordinatewiseLSTM(hidden_size=0, num_layers=0, preprocess="normalized")
    estimator = SyntheticGradients()
    trainer = l2l.MetaTrainer(net, Quadratic(dim=3, batch=1), horizon=8, unroll=2, lr=1e-9, seed=0, estimator=estimator)
    trainer.fit(episodes=2)
    (predictor,) = estimator.predictors.values()
    assert predictor.steps > 0 and not predictor.is_zero()


def test_networks_by_kind_have_predictors_of_their_own(tmp_path):
    problem = linear()
    sample = problem.sample

    def with_groups(*arguments):
        task = sample(*arguments)
        task.parameter_groups = lambda: {"matrices": ["module.x"], "vectors": ["module.y"]}
        return task

    problem.sample = with_groups
    nets = {"matrices": network(0), "vectors": network(seed=1, hidden_size=4, num_layers=1)}
    run = make(problem, nets).fit(2, progress=False)
    assert set(run.estimator.predictors) == {"matrices", "vectors"}
    run.save(tmp_path / "c")
    again = make(problem, copy.deepcopy(run.net)).resume(tmp_path / "c")
    assert torch.equal(weights(again.fit(3, progress=False)), weights(run.fit(3, progress=False)))


def test_a_parameter_without_gradient_and_one_that_gets_it_late():
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x, self.y, self.z = (nn.Parameter(torch.ones(n)) for n in (3, 2, 4))
            self.empty = nn.Parameter(torch.ones(0, 5))

    def loss(module: nn.Module, generator: torch.Generator) -> torch.Tensor:
        module.calls = getattr(module, "calls", 0) + 1
        late = module.y.square().sum() if module.calls > UNROLL else 0.0
        return module.x.square().sum() + module.empty.sum() + late

    run = make(ModuleProblem(lambda generator: Late(), loss, name="late"), validate_every=0)
    before = weights(run)
    run.fit(3, progress=False)
    assert run.counters.skipped_updates == 0 and not torch.equal(before, weights(run))
    assert weights(run).isfinite().all() and run.estimator.predictors["net"].steps == 3 * HORIZON // UNROLL


def test_a_diverging_episode_spoils_neither_network_nor_predictor():
    class Cliff(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.ones(3))

    def loss(module: nn.Module, generator: torch.Generator) -> torch.Tensor:
        module.calls = getattr(module, "calls", 0) + 1
        return module.x.square().sum() * (math.nan if module.calls == 2 * UNROLL else 1.0)

    run = make(ModuleProblem(lambda generator: Cliff(), loss, name="cliff"), validate_every=0).fit(2, progress=False)
    assert run.counters.skipped_updates > 0 and weights(run).isfinite().all()
    assert all(value.isfinite().all() for value in run.estimator.state_dict().values())


# ---- arguments ----


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"synthetic_gradients": 1}, TypeError, "synthetic_gradients"),
        ({"estimator": "pes"}, ValueError, "synthetic_gradients: are for back-propagation"),
        ({"estimator": PES()}, ValueError, "synthetic_gradients: are for back-propagation"),
        ({"autograd": True}, ValueError, "autograd"),
        ({"second_derivatives": True}, ValueError, "second_derivatives"),
        ({"meta_loss": lambda trace: trace.losses.sum()}, ValueError, "meta_loss"),
        ({"coordinate_fraction": 0.5}, ValueError, "coordinate_fraction"),
        (
            {"net": l2l.NTMBFGS(8, gac_cells=1, memory="low_rank", history=2)},
            ValueError,
            "synthetic_gradients: .*memory",
        ),
        ({"net": {"all": network(num_outputs=2)}}, ValueError, r"synthetic_gradients: .*net\['all'\]"),
    ],
)
def test_arguments_of_the_trainer(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_both_ways_to_ask_for_it():
    assert isinstance(make(estimator="synthetic_gradients").estimator, SyntheticGradients)
    made = SyntheticGradients(units=3)
    assert make(estimator=made).estimator is made
    assert make(estimator=made, synthetic_gradients=False).estimator is made


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"units": 0}, ValueError),
        ({"units": 1.5}, TypeError),
        ({"predictor_lr": -1.0}, ValueError),
        ({"predictor_lr": math.inf}, ValueError),
        ({"discount": 1.01}, ValueError),
        ({"bp_lambda": 1.5}, ValueError),
        ({"bp_lambda": "x"}, TypeError),
        ({"auxiliary": -0.1}, ValueError),
        ({"coordinates": 0}, ValueError),
    ],
)
def test_arguments_of_the_estimator(options, error):
    with pytest.raises(error, match=next(iter(options))):
        SyntheticGradients(**options)


def test_a_state_that_does_not_fit_changes_nothing():
    estimator = make().fit(1, progress=False).estimator
    saved, before = estimator.state_dict(), estimator.predictors
    cases = [
        {"sums": torch.zeros(1)},
        {name: value for name, value in saved.items() if name != "net.step"},
        {**saved, "net.V.value": torch.zeros(2, 3)},
        {**saved, "net.W.value": torch.zeros(4)},
        {**saved, "net.more": torch.zeros(1)},
    ]
    for state in cases:
        with pytest.raises(ValueError, match="checkpoint: expected the predictor's"):
            estimator.load_state_dict(state)
        assert estimator.predictors is before
    with pytest.raises(ValueError, match="checkpoint: expected the predictor's"):
        SyntheticGradients(units=5).load_state_dict(saved)
    with pytest.raises(ValueError, match="net: its predictor of synthetic gradients was made for another network"):
        make(net=network(hidden_size=4), estimator=estimator, synthetic_gradients=False).fit(1, progress=False)
    estimator.load_state_dict({})
    assert estimator.state_dict() == {}
