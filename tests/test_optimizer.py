"""LearnedOptimizer under the contract of torch.optim."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast import reference
from tests.helpers import assert_close, double, random_network, structured_gradient

STATE = "lstm_state"


def parameters(*shapes: tuple[int, ...], dtype=torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def set_gradients(params, seed: int = 0) -> None:
    for k, param in enumerate(params):
        param.grad = structured_gradient(tuple(param.shape), seed=100 * seed + k).to(param.dtype)


def run(optimizer, params, steps: int, seed: int = 0) -> None:
    for t in range(steps):
        set_gradients(params, seed + t)
        optimizer.step()


class Oracle:
    """The same optimizer in a dozen lines of float64."""

    def __init__(self, params, net, lr=1.0, weight_decay=0.0, maximize=False):
        self.net, self.lr, self.weight_decay, self.sign = double(net), lr, weight_decay, -1.0 if maximize else 1.0
        self.params = [param.detach().double().clone() for param in params]
        self.states = [net.init_state(param.numel(), dtype=torch.float64).to_logical() for param in params]

    def step(self, grads) -> None:
        with torch.no_grad():
            for k, grad in enumerate(grads):
                if grad is not None:
                    update, self.states[k] = reference.step(self.net, self.sign * grad.double(), self.states[k])
                    self.params[k] = self.params[k] * (1 - self.lr * self.weight_decay) + self.lr * update


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
        state = optimizer.state[param][STATE]
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
        assert optimizer.state[param][STATE].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


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
    before = [part for pair in optimizer.state[model.weight][STATE].to_logical() for part in pair]
    model.double()
    model.weight.grad = None
    model.bias.grad = None
    oracle = Oracle([model.weight], net)
    oracle.states[0] = optimizer.state[model.weight][STATE].to(torch.float64).to_logical()
    set_gradients([model.weight], 7)
    optimizer.step()
    oracle.step([model.weight.grad])
    assert_close(model.weight, oracle.params[0], 1e-12)
    assert before[0].dtype == torch.float32 and optimizer.state[model.weight][STATE].dtype == torch.float64
    model.float()
    set_gradients([model.weight], 8)
    optimizer.step()
    assert optimizer.state[model.weight][STATE].dtype == torch.float32


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
    assert torch.equal(params[0], old) and optimizer.state[params[0]][STATE].data.abs().sum() > 0


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


# ---- checkpoints ----


def trained(seed: int = 1, **options):
    net = random_network(seed=seed)
    params = [*parameters((70,), (4, 5)), *parameters((6,), dtype=torch.bfloat16), *parameters((), dtype=torch.float64)]
    optimizer = l2l.LearnedOptimizer(params, net, **options)
    run(optimizer, params, 3)
    return net, params, optimizer


def clones(params) -> list[nn.Parameter]:
    return [nn.Parameter(param.detach().clone()) for param in params]


def assert_same_run(optimizer, params, other, other_params) -> None:
    run(optimizer, params, 3, seed=50)
    run(other, other_params, 3, seed=50)
    for param, other_param in zip(params, other_params, strict=True):
        assert torch.equal(param, other_param)
        assert torch.equal(
            torch.cat([part.flatten() for pair in optimizer.state[param][STATE].to_logical() for part in pair]),
            torch.cat([part.flatten() for pair in other.state[other_param][STATE].to_logical() for part in pair]),
        )


def test_state_dict_continues_bit_for_bit():
    net, params, optimizer = trained(lr=0.3, weight_decay=0.01)
    optimizer.param_groups[0]["lr"] = 0.25
    state_dict = optimizer.state_dict()
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    others = clones(params)
    other = l2l.LearnedOptimizer(others, net)
    other.load_state_dict(loaded)
    assert other.param_groups[0]["lr"] == 0.25 and other.param_groups[0]["weight_decay"] == 0.01
    assert other.param_groups[0]["network"] is net
    assert_same_run(optimizer, params, other, others)


def test_state_dict_is_logical_and_a_snapshot():
    net, params, optimizer = trained()
    state_dict = optimizer.state_dict()
    assert set(state_dict) == {"state", "param_groups"}
    assert state_dict["param_groups"][0]["params"] == [0, 1, 2, 3]
    assert state_dict["param_groups"][0]["network"] == net.config._asdict()
    for k, param in enumerate(params):
        saved = state_dict["state"][k][STATE]
        assert saved.shape == (param.numel(), 2, 2, 20)
        for layer, pair in enumerate(optimizer.state[param][STATE].to_logical()):
            assert torch.equal(saved[:, layer, 0], pair[0]) and torch.equal(saved[:, layer, 1], pair[1])
    kept = copy.deepcopy(state_dict)
    run(optimizer, params, 1)
    assert all(torch.equal(state_dict["state"][k][STATE], kept["state"][k][STATE]) for k in range(4))


def test_loading_does_not_touch_the_loaded_dict():
    net, params, optimizer = trained()
    optimizer.state[params[0]]["note"] = torch.ones(2)
    state_dict = optimizer.state_dict()
    kept = copy.deepcopy(state_dict)
    others = clones(params)
    other = l2l.LearnedOptimizer(others, net)
    other.load_state_dict(state_dict)
    other.state[others[0]]["note"].add_(1)
    run(other, others, 1)
    other.param_groups[0]["lr"] = 9.0
    assert state_dict["param_groups"] == kept["param_groups"]
    assert torch.equal(state_dict["state"][0]["note"], torch.ones(2))
    for k in range(4):
        assert torch.equal(state_dict["state"][k][STATE], kept["state"][k][STATE])


def test_state_dict_of_a_fresh_optimizer_resets_another():
    net, params, optimizer = trained()
    fresh = l2l.LearnedOptimizer(clones(params), net)
    optimizer.load_state_dict(fresh.state_dict())
    assert len(optimizer.state) == 0
    others = clones(params)
    assert_same_run(optimizer, params, l2l.LearnedOptimizer(others, net), others)


def test_state_dict_hooks():
    net, params, optimizer = trained()
    seen = []
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda opt, d: {**d, "more": d["state"][0][STATE].shape})
    state_dict = optimizer.state_dict()
    assert seen == ["save"] and state_dict["more"] == (70, 2, 2, 20)
    other = l2l.LearnedOptimizer(clones(params), net)

    def scale(opt, loaded):
        return {**loaded, "param_groups": [{**loaded["param_groups"][0], "lr": 0.125}]}

    other.register_load_state_dict_pre_hook(scale)
    other.register_load_state_dict_post_hook(lambda opt: seen.append(opt.param_groups[0]["lr"]))
    other.load_state_dict(state_dict)
    assert seen == ["save", 0.125]


def test_load_rejects_what_does_not_fit_and_keeps_everything():
    net, params, optimizer = trained()
    good = optimizer.state_dict()
    cases = []
    fewer = copy.deepcopy(good)
    fewer["param_groups"][0]["params"].pop()
    cases.append((fewer, "groups of"))
    groups = copy.deepcopy(good)
    groups["param_groups"].append({**groups["param_groups"][0], "params": []})
    cases.append((groups, "groups of"))
    shape = copy.deepcopy(good)
    shape["state"][3][STATE] = torch.zeros(2, 2, 2, 20)
    cases.append((shape, r"expected 'lstm_state' of shape \(1, 2, 2, 20\)"))
    kind = copy.deepcopy(good)
    kind["state"][3][STATE] = "state"
    cases.append((kind, "got str"))
    network = copy.deepcopy(good)
    network["param_groups"][0]["network"]["hidden_size"] = 8
    cases.append((network, "hidden_size=8"))
    others = clones(params)
    other = l2l.LearnedOptimizer(others, net)
    run(other, others, 1)
    kept = other.state_dict()
    for bad, message in cases:
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(bad)
        now = other.state_dict()
        assert now["param_groups"] == kept["param_groups"]
        assert all(torch.equal(now["state"][k][STATE], kept["state"][k][STATE]) for k in range(4))


def test_load_warns_of_another_network():
    net, params, optimizer = trained()
    state_dict = optimizer.state_dict()
    other = l2l.LearnedOptimizer(clones(params), random_network(output_scale=0.5))
    with pytest.warns(UserWarning, match="output_scale=0.1, now output_scale=0.5"):
        other.load_state_dict(state_dict)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(state_dict)


def test_deepcopy_and_pickle():
    net, params, optimizer = trained()
    optimizer.start_segment()
    for copier in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        others, other = copier((params, optimizer))
        assert other.param_groups[0]["params"][0] is others[0] and other.param_groups[0]["network"] is not net
        with pytest.raises(RuntimeError, match="no open segment"):
            other.backward_segment()
        run(other, others, 1, seed=20)
        assert not torch.equal(others[0], params[0])
    optimizer.discard_segment()
    others, other = copy.deepcopy((params, optimizer))
    assert_same_run(optimizer, params, other, others)


# ---- errors ----


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr: expected a finite number >= 0"),
        ({"lr": float("nan")}, ValueError, "lr"),
        ({"lr": "1"}, TypeError, "lr"),
        ({"lr": torch.ones(2)}, ValueError, "lr"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay"),
        ({"weight_decay": None}, TypeError, "weight_decay"),
        ({"maximize": 1}, TypeError, "maximize"),
        ({"network": None}, ValueError, "network"),
        ({"network": nn.Linear(1, 1)}, TypeError, "network: .*Linear"),
    ],
)
def test_constructor_rejects(options, error, message):
    with pytest.raises(error, match=message):
        l2l.LearnedOptimizer(parameters((3,)), **{"network": random_network(), **options})


def test_constructor_rejects_parameters():
    net = random_network()
    for tensor in (torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.complex64), torch.eye(3).to_sparse()):
        with pytest.raises(TypeError, match="params"):
            l2l.LearnedOptimizer([tensor], net)
    param = parameters((3,))[0]
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="more than once"):
        l2l.LearnedOptimizer([param, param], net)
    with pytest.raises(ValueError, match="empty parameter list"):
        l2l.LearnedOptimizer([], net)
    with pytest.raises(ValueError, match="more than one parameter group"):
        l2l.LearnedOptimizer([{"params": [param]}, {"params": [param]}], net)


@pytest.mark.parametrize("kind", ["sparse", "complex", "integer", "device"])
def test_bad_gradient_in_the_last_group_leaves_the_first_alone(kind):
    net = random_network()
    a, b = torch.randn(5), torch.randn(6)
    optimizer = l2l.LearnedOptimizer([{"params": [a]}, {"params": [b], "network": random_network()}], net)
    run(optimizer, [a, b], 1)
    kept = [a.clone(), *(optimizer.state[p][STATE].data.clone() for p in (a, b))]
    set_gradients([a], 1)
    b.grad = None
    if kind == "sparse":
        b.grad = torch.ones(6).to_sparse()
    elif kind == "device":
        b.grad = torch.ones(6)
        optimizer.param_groups[1]["network"].to("meta")
    else:  # a tensor can change its dtype after it has been given to the optimizer
        b.data = torch.ones(6, dtype=torch.complex64 if kind == "complex" else torch.int32)
        b.grad = torch.ones_like(b)
    with pytest.raises(
        ValueError if kind == "device" else TypeError, match="device" if kind == "device" else "params|grad"
    ):
        optimizer.step()
    assert torch.equal(a, kept[0]) and torch.equal(optimizer.state[a][STATE].data, kept[1])
    assert torch.equal(optimizer.state[b][STATE].data, kept[2])


def test_parameter_resized_or_network_replaced():
    net = random_network()
    params = parameters((5,))
    optimizer = l2l.LearnedOptimizer(params, net)
    run(optimizer, params, 1)
    params[0].grad = None
    params[0].data = torch.zeros(7)
    with pytest.raises(ValueError, match=r"shape \(7,\)"):
        run(optimizer, params, 1)
    optimizer = l2l.LearnedOptimizer(params, net)
    run(optimizer, params, 1)
    optimizer.param_groups[0]["network"] = random_network(hidden_size=8)
    with pytest.raises(ValueError, match="hidden_size=8"):
        run(optimizer, params, 1)


def test_expanded_parameter_is_refused():
    param = torch.zeros(1).expand(5)
    optimizer = l2l.LearnedOptimizer([param], random_network())
    param.grad = torch.ones(5)
    with pytest.raises(ValueError, match="overlap"):
        optimizer.step()


def test_new_weights_of_the_network_are_used_at_once():
    """However they were written: in place, through .data, or by load_state_dict."""
    net, other = random_network(seed=1), random_network(seed=2)
    params = parameters((70,))
    start = params[0].detach().clone()
    optimizer = l2l.LearnedOptimizer(params, net)
    set_gradients(params)
    changes = [
        lambda: net.load_state_dict(other.state_dict()),
        lambda: [p.data.mul_(0.5) for p in net.parameters()],
        lambda: [setattr(p, "data", p.data * 2) for p in net.parameters()],
    ]
    for change in changes:
        change()
        oracle = Oracle([start], net)
        oracle.step([params[0].grad])
        with torch.no_grad():
            params[0].copy_(start)
        optimizer.state.clear()
        optimizer.step()
        assert_close(params[0], oracle.params[0], 2e-6)
