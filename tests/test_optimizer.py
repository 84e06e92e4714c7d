"""LearnedOptimizer under the contract of torch.optim."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from tests.helpers import assert_close, random_network, structured_gradient
from tests.optimizer_helpers import Oracle, parameters, run, set_gradients

SHAPES = [(), (3,), (5, 13), (2, 3, 4), (2, 2, 3, 3), (2, 1, 2, 3, 2), (0,), (3, 0), (200,)]


@pytest.mark.parametrize(
    "options",
    [{}, {"lr": 0.3}, {"weight_decay": 0.1, "lr": 0.5}, {"maximize": True}, {"lr": torch.tensor(0.3)}],
    ids=["plain", "lr", "decay", "maximize", "tensor lr"],
)
def test_steps_match_the_oracle(options):
    net = random_network()
    params = parameters(*SHAPES)
    optimizer = l2l.LearnedOptimizer(params, net, **options)
    oracle = Oracle(params, net, **{name: float(v) if name == "lr" else v for name, v in options.items()})
    for t in range(4):
        set_gradients(params, t)
        optimizer.step()
        oracle.step([param.grad for param in params])
    for param, expected, logical in zip(params, oracle.params, oracle.states, strict=True):
        assert_close(param, expected, 2e-6, str(tuple(param.shape)))
        state = optimizer.state_of(param)
        assert isinstance(state, l2l.State) and state.numel == param.numel()
        for pair, pair_expected in zip(state.to_logical(), logical, strict=True):
            for part, part_expected in zip(pair, pair_expected, strict=True):
                assert_close(part, part_expected, 2e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 6e-4), (torch.float64, 1e-12)]
)
def test_other_dtypes(dtype, tolerance):
    net = random_network()
    params = parameters((70,), (4, 5), dtype=dtype)
    options = {"lr": 0.5, "weight_decay": 0.1}
    optimizer, oracle = l2l.LearnedOptimizer(params, net, **options), Oracle(params, net, **options)
    set_gradients(params)
    oracle.step([param.grad for param in params])
    optimizer.step()
    for param, expected in zip(params, oracle.params, strict=True):
        assert_close(param, expected, tolerance)
        assert optimizer.state_of(param).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_one_group_may_mix_dtypes():
    net = random_network()
    params = [*parameters((70,)), *parameters((30,), dtype=torch.float64), *parameters((9,), dtype=torch.bfloat16)]
    optimizer, oracle = l2l.LearnedOptimizer(params, net), Oracle(params, net)
    for t in range(2):
        set_gradients(params, t)
        optimizer.step()
        oracle.step([param.grad for param in params])
    for param, expected, tolerance in zip(params, oracle.params, (2e-6, 1e-12, 2e-2), strict=True):
        assert_close(param, expected, tolerance)


def test_model_converted_in_mid_training():
    net = random_network()
    model = nn.Linear(7, 5)
    optimizer = l2l.LearnedOptimizer(model.parameters(), net)
    run(optimizer, list(model.parameters()), 2)
    before = [part for pair in optimizer.state_of(model.weight).to_logical() for part in pair]
    model.double()
    model.weight.grad = None
    model.bias.grad = None
    oracle = Oracle([model.weight], net)
    oracle.states[0] = optimizer.state_of(model.weight).to(torch.float64).to_logical()
    set_gradients([model.weight], 7)
    optimizer.step()
    oracle.step([model.weight.grad])
    assert_close(model.weight, oracle.params[0], 1e-12)
    assert before[0].dtype == torch.float32 and optimizer.state_of(model.weight).dtype == torch.float64
    model.float()
    set_gradients([model.weight], 8)
    optimizer.step()
    assert optimizer.state_of(model.weight).dtype == torch.float32


def test_strides_do_not_matter():
    net = random_network()
    values = torch.randn(3, 4, 5, 6)
    grads = [structured_gradient((3, 4, 5, 6), seed=t) for t in range(3)]
    results = []
    for param_format in ("contiguous", "channels_last", "transposed"):
        for grad_format in ("contiguous", "channels_last", "transposed"):

            def arrange(x, how):
                if how == "channels_last":
                    return x.clone(memory_format=torch.channels_last)
                return x.transpose(0, 3).contiguous().transpose(0, 3) if how == "transposed" else x.clone()

            param = nn.Parameter(arrange(values, param_format))
            optimizer = l2l.LearnedOptimizer([param], net)
            for grad in grads:
                param.grad = arrange(grad, grad_format)
                optimizer.step()
            results.append(param.detach().contiguous())
    assert all(torch.equal(result, results[0]) for result in results)


def test_no_gradient_no_step():
    net = random_network()
    moving, still = parameters((5,), (6,))
    old = still.detach().clone()
    optimizer = l2l.LearnedOptimizer([moving, still], net, weight_decay=0.5)
    set_gradients([moving])
    optimizer.step()
    assert torch.equal(still, old) and still not in optimizer.state
    optimizer.zero_grad()
    assert moving.grad is None
    optimizer.step()  # nothing to do at all
    optimizer.zero_grad(set_to_none=False)


def test_zero_lr_changes_no_parameter_but_the_state():
    net = random_network()
    params = parameters((5,))
    old = params[0].detach().clone()
    optimizer = l2l.LearnedOptimizer(params, net, lr=0.0)
    run(optimizer, params, 1)
    assert torch.equal(params[0], old) and optimizer.state_of(params[0]).data.abs().sum() > 0


def test_step_is_seen_by_autograd():
    param = parameters((5,))[0]
    optimizer = l2l.LearnedOptimizer([param], random_network())
    loss = param.square().sum()
    param.grad = torch.ones(5)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- groups, schedulers, closures, hooks ----


def test_groups_have_their_own_network_and_options():
    first, second = random_network(seed=1), random_network(seed=2, hidden_size=8, num_layers=1, preprocess="identity")
    a, b, c = parameters((7,), (8,), (9,))
    groups = [{"params": [a]}, {"params": [b], "network": second, "lr": 0.2}, {"params": [c], "maximize": True}]
    optimizer = l2l.LearnedOptimizer(groups, first, weight_decay=0.01)
    oracles = [
        Oracle([a], first, weight_decay=0.01),
        Oracle([b], second, lr=0.2, weight_decay=0.01),
        Oracle([c], first, weight_decay=0.01, maximize=True),
    ]
    for t in range(3):
        set_gradients([a, b, c], t)
        optimizer.step()
        for oracle, param in zip(oracles, (a, b, c), strict=True):
            oracle.step([param.grad])
    for oracle, param in zip(oracles, (a, b, c), strict=True):
        assert_close(param, oracle.params[0], 2e-6)


def test_every_group_may_bring_its_network():
    a, b = parameters((7,), (8,))
    optimizer = l2l.LearnedOptimizer([{"params": [a], "network": random_network()}])
    with pytest.raises(ValueError, match="network: expected a CoordinatewiseLSTM for every parameter group"):
        optimizer.add_param_group({"params": [b]})
    assert len(optimizer.param_groups) == 1


def test_add_param_group():
    net = random_network()
    a, b = parameters((7,), (8,))
    optimizer, oracle_a, oracle_b = l2l.LearnedOptimizer([a], net), Oracle([a], net), Oracle([b], net, lr=0.5)
    set_gradients([a])
    optimizer.step()
    oracle_a.step([a.grad])
    optimizer.add_param_group({"params": b, "lr": 0.5})
    for t in range(2):
        set_gradients([a, b], t + 1)
        optimizer.step()
        oracle_a.step([a.grad])
        oracle_b.step([b.grad])
    assert_close(a, oracle_a.params[0], 2e-6)
    assert_close(b, oracle_b.params[0], 2e-6)


def test_named_parameters():
    model = nn.Linear(3, 2)
    optimizer = l2l.LearnedOptimizer(model.named_parameters(), random_network())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    again = l2l.LearnedOptimizer(model.named_parameters(), random_network())
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["param_names"] == ["weight", "bias"]


def test_schedulers_scale_the_update():
    net = random_network()
    params = parameters((70,))
    optimizer, oracle = l2l.LearnedOptimizer(params, net, lr=2.0), Oracle(params, net)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    for t in range(4):
        set_gradients(params, t)
        oracle.lr = 2.0 * 0.5**t
        optimizer.step()
        scheduler.step()
        oracle.step([params[0].grad])
    assert_close(params[0], oracle.params[0], 2e-6)
    for make in (
        lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=5, cycle_momentum=False),
        lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
    ):
        scheduler = make()
        scheduler.step(1.0) if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else scheduler.step()


def test_closure():
    model = nn.Linear(3, 2)
    optimizer = l2l.LearnedOptimizer(model.parameters(), random_network())
    old = model.weight.detach().clone()

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3)).square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.requires_grad and not torch.equal(model.weight, old)
    assert optimizer.step() is None


def test_step_hooks_and_profiler_name():
    params = parameters((5,))
    optimizer = l2l.LearnedOptimizer(params, random_network())
    calls = []
    optimizer.register_step_pre_hook(lambda *args: calls.append("before"))
    optimizer.register_step_post_hook(lambda *args: calls.append("after"))
    run(optimizer, params, 1)
    assert calls == ["before", "after"]


def test_a_running_profiler_records_the_step():
    params = parameters((5,))
    optimizer = l2l.LearnedOptimizer(params, random_network())
    with torch.autograd.profiler.profile() as profiler:
        run(optimizer, params, 1)
    assert "Optimizer.step#LearnedOptimizer.step" in {event.name for event in profiler.function_events}


def test_repr_is_readable():
    text = repr(l2l.LearnedOptimizer(parameters((5,)), random_network()))
    assert "lr: 1.0" in text and "network: CoordinatewiseLSTM(hidden_size=20" in text


# ---- training with the rest of torch ----


def test_clip_grad_norm():
    net = random_network()
    params = parameters((5,), (6,))
    optimizer, oracle = l2l.LearnedOptimizer(params, net), Oracle(params, net)
    set_gradients(params)
    total = nn.utils.clip_grad_norm_(params, 0.01)
    assert total > 0.01
    optimizer.step()
    oracle.step([param.grad for param in params])
    assert_close(params[0], oracle.params[0], 2e-6)


def test_grad_scaler():
    net = random_network()
    params = parameters((50,))
    optimizer, oracle = l2l.LearnedOptimizer(params, net), Oracle(params, net)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    grad = structured_gradient((50,))
    for bad in (False, True, False):
        optimizer.zero_grad()
        loss = (params[0] * grad).sum() * (float("inf") if bad else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)  # unscales, and skips the step on infinities
        scaler.update()
        if not bad:
            oracle.step([grad])
    assert_close(params[0], oracle.params[0], 2e-6)
    assert params[0].isfinite().all()


def test_trains_a_model_under_autocast():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    net = random_network(output_scale=0.001)
    optimizer = l2l.LearnedOptimizer(model.parameters(), net)
    old = [param.detach().clone() for param in model.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(torch.randn(16, 4)).square().mean()
        loss.backward()
        optimizer.step()
    assert all(
        not torch.equal(param, o) and param.isfinite().all() for param, o in zip(model.parameters(), old, strict=True)
    )


def test_step_under_torch_compile():
    net = random_network()
    results = []
    for compiled in (False, True):
        torch.manual_seed(1)
        params = parameters((70,), (3, 4))
        optimizer = l2l.LearnedOptimizer(params, net, lr=0.5)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for t in range(3):
            set_gradients(params, t)
            step()
        results.append(torch.cat([param.detach().flatten() for param in params]))
    assert torch.equal(*results)
