"""Steps with bfloat16 products: the kernels against the oracle, and what the optimizer promises of them."""

from __future__ import annotations

import copy
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast.kernels import operators, reference, state_types
from l2l_fast.kernels.state import Averages
from l2l_fast.optim.checks import check_precision_of
from tests.helpers import phi_of, random_network, random_state, relative_error, structured_gradient

# The steps with bfloat16 products are all that the last one has of its own (tests/conftest.py leaves it out).
INSTRUCTION_SETS = l2l._C.isa_available()
SIZES = (0, 1, 15, 16, 17, 32, 33, 63, 64, 65, 300)
# One layer of any number of units and inputs, whose operands are those of the oracle bit for bit; then whatever else.
ONE_LAYER = {size: {"hidden_size": size, "num_layers": 1, "preprocess": "identity"} for size in (4, 5, 19, 20, 63)}
DEEPER = {
    "2x20": {"hidden_size": 20, "num_layers": 2},
    "3x5": {"hidden_size": 5, "num_layers": 3},
    "4x16 identity": {"hidden_size": 16, "num_layers": 4, "preprocess": "identity"},
    "2x64": {"hidden_size": 64, "num_layers": 2},
    "normalized": {"hidden_size": 7, "num_layers": 2, "preprocess": "normalized", "tensor_inputs": 3},
    "normalized, nothing told": {"hidden_size": 8, "num_layers": 1, "preprocess": "normalized"},
}


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request) -> str:
    l2l._C.set_isa(request.param)
    return request.param


def told(net, steps: int = 4) -> dict:
    """What a step of such a network takes beside all others: random_state is of age 3."""
    if not net.config.averages:
        return {}
    inputs = torch.linspace(-1, 1, net.tensor_inputs).unsqueeze(0) if net.tensor_inputs else None
    return {"ages": [steps], "tensor_inputs": inputs}


def kernel_step(net, grad, state, precision="bfloat16"):
    """The update and the new logical state, float64."""
    param, data = torch.zeros_like(grad), state.data.clone()
    options = (phi_of(net), net.config, 1.0, 1.0, False)  # theta' = 0 theta + update
    operators.step_([param], [grad], [data], *options, precision=precision, **told(net))
    age = state.to_logical()[-1].age + 1 if net.config.averages else 0
    sizes = net.hidden_size, net.num_layers, net.config.averages
    new = l2l.State(data, grad.numel(), *sizes, age).to_logical()
    return param.double(), [part.double() for pair in new[: net.num_layers] for part in pair]


def oracle_step(net, grad, state, precision="bfloat16"):
    logical = [
        Averages(each.rows.double(), each.age) if isinstance(each, Averages) else tuple(x.double() for x in each)
        for each in state.to_logical()
    ]
    inputs = told(net).get("tensor_inputs")
    inputs = None if inputs is None else inputs[0].double()
    update, new = reference.lstm_step(
        grad.double(), logical, phi_of(net).double(), net.config, tensor_inputs=inputs, precision=precision
    )
    return update, [part for pair in new[: net.num_layers] for part in pair]


def errors(found, expected) -> list[float]:
    """Of the update and of every h and c."""
    return [relative_error(found[0], expected[0]), *map(relative_error, found[1], expected[1])]


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("hidden", ONE_LAYER)
def test_one_layer_is_that_of_the_oracle(isa, hidden, numel):
    net = random_network(**ONE_LAYER[hidden])
    grad, state = structured_gradient((numel,)), random_state(net, numel)
    found, expected = kernel_step(net, grad, state), oracle_step(net, grad, state)
    # The cell of the dot products is the shorter one: 1e-4 of its gates.
    assert max(errors(found, expected)) < (2.5e-4 if isa == "avx512bf16" else 1e-6)
    if numel >= 300:  # and what is rounded is seen
        assert min(errors(expected, oracle_step(net, grad, state, "float32"))[1:]) > 5e-4


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("name", DEEPER)
def test_any_network_is_near_the_oracle(isa, name, numel):
    """An h on the edge between two bfloat16 numbers may fall on either side: 2^-8 of it, in a few of many."""
    net = random_network(**DEEPER[name])
    grad, state = structured_gradient((numel,)), random_state(net, numel)
    found, expected = kernel_step(net, grad, state), oracle_step(net, grad, state)
    short = isa == "avx512bf16"
    assert max(errors(found, expected)) < (1e-3 if short else 1e-4)
    if numel >= 300:
        rounding = max(errors(expected, oracle_step(net, grad, state, "float32")))
        assert max(errors(found, expected)) < (0.3 if short else 0.03) * rounding


def test_rounding_is_to_the_nearest_and_to_even():
    """Weights and inputs on the edge between two bfloat16 numbers, where any other rounding shows."""
    net = random_network(hidden_size=4, num_layers=1, preprocess="identity")
    edges = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 - 2.0**-9, -1 - 2.0**-8, 1 + 2.0**-8 + 2.0**-20])
    state = random_state(net, 5)
    for name in INSTRUCTION_SETS:
        l2l._C.set_isa(name)
        rounded = edges.bfloat16().float()
        assert rounded.tolist() == [1, 1 + 2.0**-6, 1, -1, 1 + 2.0**-7]
        found, same = kernel_step(net, edges, state), kernel_step(net, rounded, state)
        assert torch.equal(found[0], same[0]) and all(map(torch.equal, found[1], same[1]))


def trajectory(net, steps=20, numel=200, kind="float32", precision="bfloat16", bad=None):
    """Parameters and state after some steps in place."""
    torch.manual_seed(3)
    param, dtype = torch.randn(numel), state_types.STATE_DTYPES[kind]
    state = state_types.zeros(numel, net.config, dtype)
    for step in range(1, steps + 1):
        grad = torch.randn(numel)
        if bad is not None and step == 5:
            grad[7] = bad
        seeds = {} if kind == "float32" else {"seeds": [step]}
        options = (phi_of(net), net.config, 0.5, 0.01, False)
        operators.step_([param], [grad], [state], *options, precision=precision, **seeds, **told(net, step))
    rows = state_types.decode(state, net.config)
    return param, rows.transpose(1, 2).reshape(-1, net.config.rows)[:numel]


@pytest.mark.parametrize("name", DEEPER)
def test_instruction_sets_agree_to_rounding(name):
    net = random_network(gain=1.0, **DEEPER[name])
    results = {}
    for each in INSTRUCTION_SETS:
        l2l._C.set_isa(each)
        results[each] = trajectory(net)
    exact = trajectory(net, precision="float32")
    for each, (param, state) in results.items():
        assert relative_error(param, results["baseline"][0]) < (5e-5 if each == "avx512bf16" else 1e-6)
        assert relative_error(state, results["baseline"][1]) < (5e-4 if each == "avx512bf16" else 3e-5)
        assert not torch.equal(param, exact[0])


@pytest.mark.skipif("avx512bf16" not in INSTRUCTION_SETS, reason="the processor has no AVX512-BF16")
def test_float32_is_that_of_avx512():
    """The last instruction set has steps with bfloat16 products of its own, and nothing else."""
    net, results = random_network(), []
    for name in ("avx512", "avx512bf16"):
        l2l._C.set_isa(name)
        results.append([*trajectory(net, precision="float32"), trajectory(net, kind="int8", precision="float32")[0]])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", ["2x20", "3x5", "normalized"])
def test_threads_and_runs_change_nothing(isa, name):
    net = random_network(**DEEPER[name])
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append([*trajectory(net, 5, 2000), *trajectory(net, 5, 2000, "int8")])
    assert all(map(torch.equal, results[0], results[1])) and all(map(torch.equal, results[0], results[2]))


@pytest.mark.parametrize("numel", (1, 17, 64, 300))
@pytest.mark.parametrize("name", ["2x20", "3x5", "normalized"])
@pytest.mark.parametrize("kind", ("bfloat16", "int8"))
def test_stored_states_are_decoded_stepped_and_encoded(isa, kind, name, numel):
    net, dtype = random_network(**DEEPER[name]), state_types.STATE_DTYPES[kind]
    torch.manual_seed(1)
    param, state = torch.randn(numel), state_types.zeros(numel, net.config, dtype)
    other, oracle = param.clone(), state.clone()
    for step in range(1, 5):
        grad, options = torch.randn(numel), (phi_of(net), net.config, 0.5, 0.01, False)
        common = {"precision": "bfloat16", **told(net, step)}
        operators.step_([param], [grad], [state], *options, seeds=[step], **common)
        rows = state_types.decode(oracle, net.config)
        operators.step_([other], [grad], [rows], *options, **common)
        oracle = state_types.encode(rows, net.config, dtype, numel, step)
        assert torch.equal(param, other)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3.4e38, 1e-45])
@pytest.mark.parametrize("preprocess", ["log_sign", "identity"])
def test_what_is_extreme_stays_in_its_coordinate(isa, preprocess, bad):
    net = random_network(preprocess=preprocess)
    (good, good_state), (param, state) = trajectory(net), trajectory(net, bad=bad)
    others = torch.arange(200) != 7
    assert torch.equal(param[others], good[others])
    assert bool(param[7].isnan()) == (bad != bad)
    assert torch.equal(state[others], good_state[others])


def test_padding_reaches_nothing(isa):
    net, numel = random_network(hidden_size=5), 65
    results = []
    for garbage in (0.0, torch.nan):
        state, param = state_types.zeros(numel, net.config, torch.float32), torch.zeros(numel)
        state[1, :, 1:] = garbage
        for _ in range(3):
            options = (phi_of(net), net.config, 1.0, 0.0, False)
            operators.step_([param], [torch.ones(numel)], [state], *options, precision="bfloat16")
        results += [param, state.transpose(1, 2).reshape(-1, net.config.rows)[:numel]]
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


def test_operator_refuses_what_it_does_not_have():
    def step(net, precision="bfloat16", layers=None, **options):
        param, state = torch.zeros(70), torch.zeros(2, net.config.rows, 64)
        arguments = ([param], [torch.ones(70)], [state], phi_of(net), net.config, 1.0, 0.0, False)
        operators.step_(*arguments, precision=precision, **options)
        return param, state

    plain = random_network()
    with pytest.raises(ValueError, match="precision: expected 'float32' or 'bfloat16', got 'float16'"):
        step(plain, "float16")
    with pytest.raises(ValueError, match="precision: expected 'float32' for a step with `record`"):
        step(plain, record=torch.zeros(128), record_tiles=[0])
    with pytest.raises(ValueError, match="precision: expected 'float32' for a step of several phases"):
        step(plain, phases=(0, 1))
    averaging = random_network(gac_cells=2)
    with pytest.raises(ValueError, match="precision: expected 'float32' for a network with gac_cells"):
        step(averaging, means=torch.zeros(2, 1, 2), sums=torch.zeros(2, 1, 2, dtype=torch.float64))
    bare = l2l.CoordinatewiseLSTM(hidden_size=0, num_layers=0, preprocess="normalized")
    with pytest.raises(ValueError, match="precision: expected 'float32' for a network without layers"):
        step(bare, ages=[1])
    with pytest.raises(ValueError, match="precision: expected 'float32' or 'bfloat16', got 'half'"):
        reference.step(plain, torch.ones(3), plain.init_state(3).to_logical(), precision="half")
    assert step(plain, "float32")[0].any()


# ---- the optimizer


def optimizer_of(precision="bfloat16", net=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 11), nn.Tanh(), nn.Linear(11, 3))
    chosen = {} if precision is None else {"precision": precision}
    return model, l2l.LearnedOptimizer(model.parameters(), net or random_network(), **chosen, **options)


def run(model, optimizer, steps=4, first=0):
    for step in range(first, first + steps):
        torch.manual_seed(100 + step)
        optimizer.zero_grad()
        model(torch.randn(5, 9)).square().mean().backward()
        optimizer.step()
    return [param.detach().clone() for param in model.parameters()]


def equal(a, b) -> bool:
    return all(map(torch.equal, a, b))


def test_only_the_argument_changes_it():
    default, wide, narrow = (run(*optimizer_of(precision)) for precision in (None, "float32", "bfloat16"))
    assert equal(default, wide) and not equal(default, narrow)
    for a, b in zip(wide, narrow):
        assert relative_error(b, a) < 1e-2
    assert optimizer_of(None)[1].precision == "float32" and optimizer_of()[1].precision == "bfloat16"


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
def test_all_kinds_of_networks_and_states(state_dtype):
    for net in (None, random_network(**DEEPER["normalized, nothing told"])):
        (model, optimizer), (_, wide) = (optimizer_of(p, net, state_dtype=state_dtype) for p in ("bfloat16", None))
        before = [param.detach().clone() for param in model.parameters()]
        after = run(model, optimizer)
        assert all(bool(param.isfinite().all()) for param in after) and not equal(before, after)
        assert optimizer.state_dict()["param_groups"][0].keys() == wide.state_dict()["param_groups"][0].keys()


def test_copies_and_pickles_keep_it():
    model, optimizer = optimizer_of()
    run(model, optimizer)
    pair = model, optimizer
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(pair), pickle.loads(pickle.dumps(pair)), torch.load(buffer, weights_only=False)]
    expected = run(*pair, first=4)
    for each in copies:
        assert each[1].precision == "bfloat16"
        assert equal(run(*each, first=4), expected)


def test_state_dict_knows_nothing_of_it():
    model, optimizer = optimizer_of()
    run(model, optimizer)
    saved = optimizer.state_dict()
    assert "precision" not in repr(saved["param_groups"])
    for precision in ("float32", "bfloat16"):
        other, fresh = optimizer_of(precision)
        other.load_state_dict(model.state_dict())
        fresh.load_state_dict(saved)
        assert fresh.precision == precision
        expected = copy.deepcopy((model, optimizer))
        assert equal(run(other, fresh, first=4), run(*expected, first=4)) == (precision == "bfloat16")


def test_pickles_of_earlier_releases_are_float32():
    _, optimizer = optimizer_of("float32")
    held = optimizer.__getstate__()
    del held["_precision"]
    old = l2l.LearnedOptimizer.__new__(l2l.LearnedOptimizer)
    old.__setstate__(held)
    assert old.precision == "float32"


def test_surroundings_change_nothing():
    results = []
    for surrounded in (False, True):
        param, net = nn.Parameter(torch.ones(70)), random_network()
        optimizer = l2l.LearnedOptimizer([param], net, precision="bfloat16")
        for step in range(4):
            param.grad = torch.arange(70.0) - 20 * step
            if surrounded:
                torch.set_default_dtype(torch.float64)
                try:
                    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
                        optimizer.step()
                finally:
                    torch.set_default_dtype(torch.float32)
            else:
                optimizer.step()
        results.append(param.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_and_strided_parameters(dtype):
    net, results = random_network(), []
    for layout in (lambda x: x, lambda x: x.t().contiguous().t()):
        torch.manual_seed(0)
        param = nn.Parameter(layout(torch.randn(9, 13).to(dtype)))
        optimizer = l2l.LearnedOptimizer([param], net, precision="bfloat16")
        for _ in range(3):
            param.grad = layout(torch.randn(9, 13).to(dtype))
            optimizer.step()
        results.append(param.detach().contiguous())
    assert torch.equal(*results)


def test_optimizer_refuses_what_it_does_not_have():
    param = nn.Parameter(torch.zeros(3))

    def ask(net=None, params=None, precision="bfloat16"):
        return l2l.LearnedOptimizer(params or [param], net or random_network(), precision=precision)

    for wrong in (16, None, torch.bfloat16):
        with pytest.raises(TypeError, match="precision: expected 'float32' or 'bfloat16', got"):
            ask(precision=wrong)
    with pytest.raises(ValueError, match="precision: expected 'float32' or 'bfloat16', got 'bf16'"):
        ask(precision="bf16")
    for net in (random_network(gac_cells=2), l2l.NTMBFGS()):
        with pytest.raises(ValueError, match="precision: expected 'float32' for a network whose coordinates"):
            ask(net)
    with pytest.raises(ValueError, match="precision: expected 'float32' for a network without layers"):
        ask(l2l.CoordinatewiseLSTM(hidden_size=0, num_layers=0, preprocess="normalized"))
    with pytest.raises(ValueError, match="precision: expected 'float32' for float64 parameters"):
        ask(params=[nn.Parameter(torch.zeros(3, dtype=torch.float64))])
    optimizer = ask()
    with pytest.raises(AttributeError):
        optimizer.precision = "float32"
    with pytest.raises(ValueError, match="start_segment: meta-training needs precision='float32', got 'bfloat16'"):
        optimizer.start_segment()
    other = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="precision: expected 'float32' for a network whose"):
        optimizer.add_param_group({"params": [other], "network": random_network(gac_cells=1)})
    assert len(optimizer.param_groups) == 1
    param.grad = torch.ones(3)
    optimizer.param_groups[0]["network"] = random_network(gac_cells=1)
    with pytest.raises(ValueError, match="precision: expected 'float32' for a network whose"):
        optimizer.step()
    assert not param.any() and not optimizer.state


def test_it_is_of_the_cpu():
    elsewhere = SimpleNamespace(device=torch.device("cuda", 1), dtype=torch.float32, grad=None, shape=(3,))
    check_precision_of("float32", {"params": [elsewhere]})
    with pytest.raises(ValueError, match="precision: 'bfloat16' is of the CPU; expected 'float32' for .* cuda:1"):
        check_precision_of("bfloat16", {"params": [elsewhere]})


def test_float64_gradients_are_refused_in_time():
    first, second = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = l2l.LearnedOptimizer([first, second], random_network(), precision="bfloat16")
    first.grad = torch.ones(3)
    second.data = torch.zeros(3, dtype=torch.float64)
    second.grad = torch.ones(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="float64 parameters and gradients.*parameter 1 of its group"):
        optimizer.step()
    assert not first.any() and not optimizer.state
