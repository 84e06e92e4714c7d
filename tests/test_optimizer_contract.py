"""LearnedOptimizer where torch's own optimizers are put: schedulers, wrappers, hooks, scalers, processes, tools."""

from __future__ import annotations

import copy
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import l2l_fast as l2l
from tests.contract_helpers import clones, equal, network, through_a_file
from tests.gac_helpers import gac_network
from tests.helpers import random_network, run_processes, structured_gradient
from tests.optimizer_helpers import parameters, run, set_gradients

# ---- schedulers ----

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR to zero": lambda o: lr_scheduler.LinearLR(o, end_factor=0.0, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, 2, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=20, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=3),
}


def scheduled(optimizer, params, scheduler, first: int, steps: int) -> None:
    for t in range(first, first + steps):
        set_gradients(params, t)
        optimizer.step()
        scheduler.step(1.0) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else scheduler.step()


@pytest.mark.parametrize("kind", ["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_resume_from_a_file(name, kind):
    make_lr = lambda: torch.tensor(0.5) if kind == "tensor" else 0.5  # noqa: E731
    net, params = network(), parameters((70,), (4, 5))
    optimizer = l2l.LearnedOptimizer(params, net, make_lr())
    scheduler = SCHEDULERS[name](optimizer)
    scheduled(optimizer, params, scheduler, 0, 4)
    saved = through_a_file({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})
    others = clones(params)
    other = l2l.LearnedOptimizer(others, net, make_lr())
    other_scheduler = SCHEDULERS[name](other)
    other_scheduler.load_state_dict(saved["scheduler"])
    other.load_state_dict(saved["optimizer"])
    scheduled(optimizer, params, scheduler, 4, 3)
    scheduled(other, others, other_scheduler, 4, 3)
    assert float(optimizer.param_groups[0]["lr"]) == float(other.param_groups[0]["lr"])
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"lr": -1.85e-17},
        {"lr": np.float32(0.25)},
        {"lr": 1},
        {"lr": torch.tensor(0.25)},
        {"weight_decay": torch.tensor(0.1)},
        {"weight_decay": np.float64(0.1)},
        {"maximize": 1},
        {"lr": Fraction(1, 2), "weight_decay": np.longdouble(0.1)},
        {"lr": Decimal("0.5")},
        {"note": np.int64(3), "initial_lr": torch.ones(1)},
    ],
)
def test_what_step_accepts_a_checkpoint_accepts(change):
    net, params = network(), parameters((6,))
    optimizer = l2l.LearnedOptimizer(params, net)
    optimizer.param_groups[0].update(change)
    run(optimizer, params, 2)
    others = clones(params)
    other = l2l.LearnedOptimizer(others, net)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    run(optimizer, params, 2, seed=5)
    run(other, others, 2, seed=5)
    assert torch.equal(params[0], others[0]) and other.param_groups[0].keys() == optimizer.param_groups[0].keys()


@pytest.mark.parametrize(
    ("change", "error"),
    [({"lr": float("nan")}, ValueError), ({"lr": torch.tensor(float("inf"))}, ValueError), ({"lr": "0.1"}, TypeError)]
    + [({"lr": torch.ones(2)}, ValueError), ({"weight_decay": None}, TypeError), ({"lr": 1j}, TypeError)]
    + [({"maximize": torch.ones(2)}, ValueError), ({"maximize": "yes"}, TypeError)],
)
def test_what_step_refuses_a_checkpoint_refuses(change, error):
    net, params = network(), parameters((6,))
    optimizer = l2l.LearnedOptimizer(params, net)
    run(optimizer, params, 1)
    saved, kept = optimizer.state_dict(), params[0].detach().clone()
    saved["param_groups"][0].update(change)
    with pytest.raises(error, match=next(iter(change))):
        optimizer.load_state_dict(saved)
    optimizer.param_groups[0].update(change)
    with pytest.raises(error, match=next(iter(change))):
        run(optimizer, params, 1)
    assert torch.equal(params[0], kept)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64, torch.tensor, lambda x: np.array(x)])
def test_numbers_of_any_kind_are_options(kind):
    params = parameters((6,))
    optimizer = l2l.LearnedOptimizer(params, network(), lr=kind(1), weight_decay=kind(0))
    run(optimizer, params, 1)
    through_a_file(optimizer.state_dict())


def test_a_tensor_lr_in_a_state_dict_is_a_snapshot():
    params, lr = parameters((6,)), torch.tensor(0.5)
    optimizer = l2l.LearnedOptimizer(params, network(), lr)
    saved = optimizer.state_dict()
    lr.fill_(0.25)
    assert optimizer.param_groups[0]["lr"] is lr and saved["param_groups"][0]["lr"] == 0.5
    optimizer.load_state_dict(saved)
    saved["param_groups"][0]["lr"].fill_(7)
    assert optimizer.param_groups[0]["lr"] == 0.5


# ---- state dicts ----


def test_state_dicts_are_deterministic_and_survive_loading():
    net, params = network(), parameters((70,), (4, 5), (), (0, 3), (64,))
    optimizer = l2l.LearnedOptimizer([{"params": params[:2]}, {"params": params[2:], "lr": 0.5}], net)
    run(optimizer, params, 2)
    saved = optimizer.state_dict()
    assert equal(saved, optimizer.state_dict())
    other = l2l.LearnedOptimizer([{"params": clones(params[:2])}, {"params": clones(params[2:])}], net)
    other.load_state_dict(saved)
    assert equal(saved, other.state_dict())
    assert [tuple(entry["lstm_state"].shape) for entry in saved["state"].values()] == [
        (*param.shape, 80) for param in params
    ]
    # What is saved takes no more room than it needs.
    states = [entry["lstm_state"] for entry in saved["state"].values()]
    assert all(state.untyped_storage().nbytes() == 4 * state.numel() for state in states)


def test_hooks_may_return_anything_and_foreign_keys_are_kept_as_they_are():
    params = parameters((6,))
    optimizer = l2l.LearnedOptimizer(params, network())
    note = [torch.ones(2)]
    optimizer.state["note"] = note
    saved = optimizer.state_dict()
    assert saved["state"]["note"] is note
    optimizer.load_state_dict(saved)
    assert optimizer.state["note"] is note
    hook = optimizer.register_state_dict_post_hook(lambda o, d: {})
    assert optimizer.state_dict() == {}
    hook.remove()
    optimizer.register_load_state_dict_pre_hook(lambda o, d: {})
    with pytest.raises(ValueError, match="state_dict"):
        optimizer.load_state_dict(saved)


def test_repeated_groups_are_saved_as_torch_saves_them():
    a, b = parameters((2,), (3,))
    optimizer, adam = l2l.LearnedOptimizer([a, b], network()), torch.optim.Adam([a, b])
    saved = []
    for each in (optimizer, adam):
        each.param_groups.extend(each.param_groups)
        saved.append([group["params"] for group in each.state_dict()["param_groups"]])
    assert saved[0] == saved[1] == [[0, 1], [0, 1]]


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Adagrad", "RMSprop", "Adam", "NAdam", "Rprop"])
@pytest.mark.parametrize("stepped", [True, False])
def test_other_optimizers_checkpoints_are_refused(kind, stepped):
    params = parameters((5, 2), (2,))
    other = getattr(torch.optim, kind)(params)
    if stepped:
        run(other, params, 1)
    optimizer = l2l.LearnedOptimizer(params, network())
    run(optimizer, params, 1)
    kept = optimizer.state_dict()
    with pytest.raises(ValueError, match="state_dict: .*of another optimizer"):
        optimizer.load_state_dict(other.state_dict())
    assert equal(kept, optimizer.state_dict())


@pytest.mark.parametrize("change", [{"add_read": False}, {"initial": "zero"}, {"memory": "low_rank"}, {"gac_cells": 1}])
def test_a_memory_of_another_meaning_is_not_loaded_in_silence(change):
    options = {"hidden_size": 4, "read_heads": 1, "write_heads": 1, "add_read": True, "initial": "identity"}
    params, others = parameters((6,)), parameters((6,))
    optimizer = l2l.LearnedOptimizer(params, l2l.NTMBFGS(**options))
    run(optimizer, params, 1)
    other = l2l.LearnedOptimizer(others, l2l.NTMBFGS(**{**options, **change}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((ValueError, UserWarning), match=next(iter(change))):
            other.load_state_dict(optimizer.state_dict())
        with pytest.raises(ValueError, match="type='NTMBFGS', now type='CoordinatewiseLSTM'"):
            l2l.LearnedOptimizer(others, random_network(hidden_size=4)).load_state_dict(optimizer.state_dict())


def test_other_weights_are_told_apart():
    params = parameters((6,))
    optimizer = l2l.LearnedOptimizer(params, random_network(seed=1))
    with pytest.warns(UserWarning, match="other weights"):
        l2l.LearnedOptimizer(params, random_network(seed=2)).load_state_dict(optimizer.state_dict())


def test_checkpoints_of_earlier_releases_load():
    """Before 0.2: the state [numel, num_layers, 2, hidden_size], the memory a dict, only the kernel's numbers of the
    network; and pickles of whole optimizers with objects in state and groups."""
    for net in (network(), l2l.NTMBFGS(memory="low_rank", history=3, add_read=True), l2l.NTMBFGS()):
        params = parameters((7,), (4, 5))
        optimizer = l2l.LearnedOptimizer(params, net, 0.5)
        run(optimizer, params, 4)
        old = optimizer.state_dict()
        old["param_groups"][0]["network"] = net.config._asdict()
        pickled = copy.deepcopy(optimizer)
        pickled.__dict__.pop("_registry"), pickled.__dict__.pop("_kept"), pickled.__dict__.pop("_failure")
        pickled.param_groups[0]["network"] = net
        for k, (param, other) in enumerate(zip(params, pickled.param_groups[0]["params"], strict=True)):
            entry, live = old["state"][k], pickled.state[other]
            entry["lstm_state"] = entry["lstm_state"].reshape(param.numel(), 2, 2, 20)
            live["lstm_state"] = l2l.State(live["lstm_state"], live.pop("numel"), 20, 2)
            memory = {key: entry.pop(key) for key in list(entry) if key.startswith("memory_")}
            if memory:
                live["memory"] = net.memory_from({key: live.pop(key) for key in memory}, 27)
                entry["memory"] = {key.removeprefix("memory_"): value for key, value in memory.items()}
                if "written" in entry["memory"]:
                    entry["memory"]["written"] = live["memory"].written
        others = clones(params)
        loaded = l2l.LearnedOptimizer(others, net)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded.load_state_dict(through_a_file(old))
            pickled.__setstate__({key: pickled.__dict__[key] for key in ("defaults", "state", "param_groups")})
        run(optimizer, params, 3, seed=9)
        run(loaded, others, 3, seed=9)
        run(pickled, pickled.param_groups[0]["params"], 3, seed=9)
        for a, b, c in zip(params, others, pickled.param_groups[0]["params"], strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)


# ---- loops ----


def test_optimizer_in_backward():
    """One optimizer per parameter, stepped when its gradient is there (torch's tutorial on saving memory)."""
    net = network()
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    twin = copy.deepcopy(model)
    optimizers = {param: l2l.LearnedOptimizer([param], net) for param in model.parameters()}

    def hook(param):
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(hook)
    whole = l2l.LearnedOptimizer(twin.parameters(), net)
    x = torch.randn(9, 5)
    for _ in range(3):
        model(x).square().mean().backward()
        whole.zero_grad()
        twin(x).square().mean().backward()
        whole.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_gradient_scaler_skips_steps_that_overflow():
    model = nn.Linear(5, 1)
    optimizer = l2l.LearnedOptimizer(model.parameters(), network())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(model.state_dict())
    scaler.scale(model(torch.full((2, 5), float("inf"))).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert equal(dict(before), dict(model.state_dict())) and len(optimizer.state) == 0
    optimizer.zero_grad()
    twin = copy.deepcopy(model)
    scaler.scale(model(torch.ones(2, 5)).sum()).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    scaler.step(optimizer)
    twin(torch.ones(2, 5)).sum().backward()
    nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
    l2l.LearnedOptimizer(twin.parameters(), network()).step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_schedule_does_not_recompile_the_step():
    for lr in (torch.tensor(0.5), 0.5):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        params = parameters((3,))
        optimizer = l2l.LearnedOptimizer(params, network(), lr)
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
        step = torch.compile(lambda: optimizer.step(), backend="eager")  # noqa: B023
        for t in range(12):
            set_gradients(params, t)
            step()
            scheduler.step()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@pytest.mark.parametrize("name", ["l2l_fast", "torch"])
def test_autocast_and_default_dtype_do_not_reach_the_step(name):
    shapes = [(3, 10), (3,)]
    grads = [[structured_gradient(shape, seed=10 * t + k) for k, shape in enumerate(shapes)] for t in range(3)]

    def go() -> list[torch.Tensor]:
        results = []
        for net in (network(), gac_network(), l2l.NTMBFGS(add_read=True), l2l.NTMBFGS(memory="low_rank")):
            with torch.no_grad():
                for k, parameter in enumerate(net.parameters()):
                    generator = torch.Generator().manual_seed(k)
                    parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * 0.3)
            generator = torch.Generator().manual_seed(0)
            model = nn.Linear(10, 3, dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32))
            optimizer = l2l.LearnedOptimizer(model.parameters(), net)
            for each in grads:
                model.weight.grad, model.bias.grad = each
                optimizer.step()
            results += [parameter.detach() for parameter in model.parameters()]
        return results

    expected = go()
    if name == "torch":
        torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=name != "torch"):
            actual = go()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_a_state_made_under_inference_mode_lives_on():
    net, params = network(), parameters((70,))
    others = clones(params)
    optimizer, other = l2l.LearnedOptimizer(params, net), l2l.LearnedOptimizer(others, net)
    set_gradients(params, 0)
    with torch.inference_mode():
        optimizer.step()
    run(other, others, 1)
    run(optimizer, params, 2, seed=1)
    run(other, others, 2, seed=1)
    assert torch.equal(params[0], others[0])


# ---- arguments ----


def test_several_networks_are_refused_with_the_way_to_give_them():
    nets = nn.ModuleDict({"conv": network(), "fc": network()})
    with pytest.raises(TypeError, match=r"\['conv', 'fc'\].*'network': networks\['conv'\]"):
        l2l.LearnedOptimizer(nn.Linear(2, 2).named_parameters(), nets)


@pytest.mark.parametrize("key", ["betas", "momentum", "learning_rate", "eps"])
def test_options_of_other_optimizers_are_named(key):
    with pytest.warns(UserWarning, match=f"no option '{key}'"):
        l2l.LearnedOptimizer([{"params": parameters((2,)), key: 0.9}], network())


def test_bookkeeping_of_schedulers_is_not():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        l2l.LearnedOptimizer([{"params": parameters((2,)), "initial_lr": 0.1, "name": "head"}], network())


def test_a_process_group_without_communication_is_named():
    with pytest.warns(UserWarning, match="process_group: has no effect"):
        l2l.LearnedOptimizer(parameters((2,)), network(), process_group=lambda tensor: None)


# ---- processes ----


@pytest.mark.parametrize("case", ["zero", "ddp"])
def test_two_processes(case, tmp_path):
    run_processes("contract_worker.py", case, tmp_path, count=2)


@pytest.mark.parametrize("kind", ["plain", "dense", "low_rank"])
def test_a_state_loaded_or_stepped_in_another_mode_lives_on(kind):
    net = network() if kind == "plain" else l2l.NTMBFGS(memory=kind)
    params = parameters((7,))
    optimizer = l2l.LearnedOptimizer(params, net)
    run(optimizer, params, 1)
    with torch.inference_mode(), torch.device("meta"):
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
    run(optimizer, params, 1)
    through_a_file(optimizer.state_dict())


def test_a_copy_takes_groups_without_a_warning():
    optimizer = copy.deepcopy(l2l.LearnedOptimizer(parameters((7,)), network()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.add_param_group({"params": parameters((3,))})
