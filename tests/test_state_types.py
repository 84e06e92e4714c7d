"""States in bfloat16 and int8: the kernels against the oracle bit for bit, and what the optimizer promises of them."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast.kernels import operators, state_types
from l2l_fast.kernels.config import Config

ROUNDED = ("bfloat16", "int8")
PLAIN = {
    "2x20": Config(20, 2, "log_sign", 10.0, 0.1),
    "1x8": Config(8, 1, "identity", 10.0, 1.0),
    "3x5": Config(5, 3, "log_sign", 10.0, 0.1),
    "normalized": Config(4, 1, "normalized", 10.0, 0.01, tensor_inputs=3),
    "without layers": Config(0, 0, "normalized", 10.0, 0.01, tensor_inputs=3),
}
SIZES = (0, 1, 9, 16, 17, 32, 63, 64, 65, 1000)


def network(config: Config, scale: float = 3.0) -> torch.Tensor:
    torch.manual_seed(0)
    options = {name: getattr(config, name) for name in ("hidden_size", "num_layers", "preprocess", "tensor_inputs")}
    return (scale * l2l.CoordinatewiseLSTM(**options).phi()).detach()


# NaNs whose bits are nearly all ones: rounding up would carry out of them.
ALL_ONES = torch.tensor([-1, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)


def coordinates(tiles: torch.Tensor, numel: int) -> torch.Tensor:
    return tiles.transpose(1, 2).reshape(-1, tiles.shape[1])[:numel]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("kind", ROUNDED)
def test_a_step_decodes_computes_in_float32_and_encodes(isa, kind, name, numel):
    config, dtype = PLAIN[name], state_types.STATE_DTYPES[kind]
    phi = network(config)
    torch.manual_seed(1)
    param, state = torch.randn(numel), state_types.zeros(numel, config, dtype)
    other, oracle = param.clone(), state.clone()
    for step in range(1, 7):
        grad = torch.randn(numel) * 10 ** torch.randn(numel)
        if step == 4 and numel > 2:
            grad[1:3] = torch.tensor([torch.nan, torch.inf])
        seed = state_types.seed_of(5, step)
        common = {}
        if config.averages:
            common = {"ages": [step], "tensor_inputs": torch.randn(1, 3)}
        options = (phi, config, 0.5, 0.01, step == 2)
        operators.step_([param], [grad], [state], *options, seeds=[seed], **common)
        rows = state_types.decode(oracle, config)
        operators.step_([other], [grad], [rows], *options, **common)
        oracle = state_types.encode(rows, config, dtype, numel, seed)
        assert same(param, other)
        decoded = [coordinates(state_types.decode(x, config), numel) for x in (state, oracle)]
        assert same(*decoded)
    assert numel < 3 or bool(state_types.decode(state, config).isnan().any())


@pytest.mark.parametrize("kind", ROUNDED)
def test_what_is_not_a_number_stays_in_its_coordinate(isa, kind):
    config, numel = PLAIN["2x20"], 64
    dtype, phi = state_types.STATE_DTYPES[kind], network(config)
    states = [state_types.zeros(numel, config, dtype) for _ in range(2)]
    params = [torch.zeros(numel) for _ in range(2)]
    for step in range(1, 5):
        torch.manual_seed(step)
        grad = torch.randn(numel)
        bad = grad.clone()
        bad[7] = (torch.nan, *ALL_ONES)[step % 3]
        for param, state, g in zip(params, states, (grad, bad), strict=True):
            operators.step_([param], [g], [state], phi, config, 1.0, 0.0, False, seeds=[step])
    others = torch.arange(numel) != 7
    assert params[1][7].isnan() and bool(params[1][others].isfinite().all())
    # Its neighbours lose at most the part of the row's step that its own number chose.
    assert torch.allclose(params[0][others], params[1][others], atol=0.05)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("kind", ROUNDED)
def test_rounding_does_not_make_a_number_of_what_is_none(isa, kind, name):
    config, dtype = PLAIN[name], state_types.STATE_DTYPES[kind]
    state, grad = state_types.zeros(64, config, dtype), ALL_ONES.repeat(32)
    common = {"ages": [1], "tensor_inputs": torch.randn(1, 3)} if config.averages else {}
    operators.step_([torch.zeros(64)], [grad], [state], network(config), config, 1.0, 0.0, False, seeds=[1], **common)
    rows = state_types.decode(state, config)
    assert bool(rows.isnan().all()), rows.isnan().float().mean((0, 2))


@pytest.mark.parametrize("kind", ROUNDED)
def test_padding_reaches_nothing(kind):
    config, numel = PLAIN["2x20"], 65
    dtype, phi = state_types.STATE_DTYPES[kind], network(config)
    rows = torch.randn(2, config.rows, 64)
    garbage = rows.clone()
    garbage[1, :, 1:] = torch.tensor([1e30, torch.nan, torch.inf]).repeat(21)
    results = []
    for start in (rows, garbage):
        state = state_types.encode(start, config, dtype, numel, 3)
        param = torch.zeros(numel)
        for step in range(3):
            operators.step_([param], [torch.ones(numel)], [state], phi, config, 1.0, 0.0, False, seeds=[step])
        results += [param, coordinates(state_types.decode(state, config), numel)]
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


def test_codes_are_within_a_step_and_survive_being_written_again():
    config = PLAIN["2x20"]
    torch.manual_seed(0)
    rows = torch.randn(3, config.rows, 64) * 10 ** (3 * torch.randn(3, config.rows, 1))
    rows[:, :20].tanh_()
    rows[:, 40:60].tanh_()
    rows[0, 25] = 0.0
    rows[1, 30, 5] = 1e38
    rows[1, 31] = 1e-38
    for kind in ROUNDED:
        dtype = state_types.STATE_DTYPES[kind]
        for seed in (None, 17):
            stored = state_types.encode(rows, config, dtype, 192, seed)
            decoded = state_types.decode(stored, config)
            c = decoded[:, 20:40] - rows[:, 20:40]
            largest = rows[:, 20:40].abs().amax(2, keepdim=True)
            assert bool((c.abs() <= largest / 63.4 + 1e-35).all())
            assert bool(((decoded - rows)[:, :20].abs() <= 0.5 / 127 + 1e-6).all())
            for again in (None, 99):
                twice = state_types.encode(decoded, config, dtype, 192, again)
                assert torch.equal(state_types.decode(twice, config), decoded)


@pytest.mark.parametrize("kind", ROUNDED)
def test_rounding_has_no_bias(kind):
    """The mean of 400,000 numbers, each in steps of 1/128 or so, within 3e-5."""
    config, dtype = Config(8, 1, "identity", 10.0, 1.0), state_types.STATE_DTYPES[kind]
    tiles = 2000
    for value in (0.7003, -0.3001, 0.1234, 0.9371):
        rows = torch.zeros(tiles, config.rows, 64)
        rows[:, 8:] = value
        rows[:, 8:, 0] = 0.99
        errors = []
        for seed in range(1, 4):
            stored = state_types.encode(rows, config, dtype, tiles * 64, state_types.seed_of(0, seed))
            errors.append((state_types.decode(stored, config)[:, 8:, 1:].double() - rows[:, 8:, 1:].double()).mean())
        assert abs(torch.stack(errors).mean().item()) < 3e-5
        nearest = state_types.decode(state_types.encode(rows, config, dtype, tiles * 64), config)
        assert (nearest[:, 8:, 1:].double() - value).mean().abs() > 1e-4, "a value that rounding does not change"


def test_an_average_does_not_stop_where_its_gain_is_below_half_a_unit():
    config = PLAIN["normalized"]
    state, param = state_types.zeros(640, config, torch.bfloat16), torch.zeros(640)
    phi, grad = network(config), torch.ones(640)
    for step in range(1, 1201):
        inputs = torch.zeros(1, 3)
        common = {"ages": [step], "tensor_inputs": inputs, "seeds": [state_types.seed_of(0, step)]}
        operators.step_([param], [grad], [state], phi, config, 0.0, 0.0, False, **common)
    second = state_types.decode_averages(state, config)[:, 3]  # the root of an average with beta 0.999
    expected = (1 - 0.999**1200) ** 0.5
    assert abs(second.mean().item() - expected) < 0.005
    rounded = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(1200):
        rounded = (rounded.float() ** 2 * 0.999 + 0.001).sqrt().to(torch.bfloat16)
    assert rounded.item() < expected - 0.05, "to the nearest it stops"


def test_random_bits_are_uniform_and_unrelated():
    bits = state_types.random_bits(state_types.seed_of(3, 9), 5, 50, 41).double() / 65536
    assert abs(bits.mean() - 0.5) < 0.003 and abs(bits.var() - 1 / 12) < 0.002
    again = state_types.random_bits(state_types.seed_of(3, 10), 5, 50, 41).double() / 65536
    pairs = [(bits, again), (bits[:, 1:], bits[:, :-1]), (bits[:, 2:], bits[:, :-2]), (bits[..., 1:], bits[..., :-1])]
    for a, b in pairs:
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 0.012
    assert torch.equal(state_types.random_bits(7, 2, 3, 5)[1:], state_types.random_bits(7, 3, 2, 5))


def test_bytes_per_parameter():
    lstm = {name: state_types.sizes(PLAIN[name]) for name in ("2x20", "1x8")}
    assert lstm["2x20"]["bfloat16"] <= 161 and lstm["2x20"]["int8"] <= 84 and lstm["1x8"]["int8"] <= 17
    with_averages, without = (state_types.sizes(Config(8, 1, kind, 10.0, 0.1)) for kind in ("normalized", "log_sign"))
    for kind in ROUNDED:
        assert with_averages[kind] - without[kind] <= 2 * 4
    for name, config in PLAIN.items():
        for kind, dtype in state_types.STATE_DTYPES.items():
            state = state_types.zeros(6400, config, dtype)
            assert state.numel() * state.element_size() / 6400 == state_types.sizes(config)[kind], name


# ---- the optimizer


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 65), nn.ReLU(), nn.Linear(65, 3))


def optimizer(module: nn.Module, kind: str, network: str = "general", **options) -> l2l.LearnedOptimizer:
    net = l2l.load_pretrained(network)
    options.update({"total_steps": 40} if network == "general" else {})
    return l2l.LearnedOptimizer(module.parameters(), net, state_dtype=kind, **options)


def train(module: nn.Module, opt: l2l.LearnedOptimizer, steps: int) -> float:
    x, y = torch.randn(64, 20, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 3
    for _ in range(steps):
        opt.zero_grad()
        loss = nn.functional.cross_entropy(module(x), y)
        loss.backward()
        opt.step()
    return loss.item()


def theta(module: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach()


@pytest.mark.parametrize("network", ["general", "mnist-mlp"])
@pytest.mark.parametrize("kind", ROUNDED)
def test_resumes_bit_for_bit_and_trains(kind, network):
    whole, half = model(), model()
    loss = train(whole, optimizer(whole, kind, network), 40)
    assert loss < 0.8  # of 1.1
    before = optimizer(half, kind, network)
    train(half, before, 17)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for param, entry in zip(half.parameters(), saved["state"].values(), strict=True):
        assert entry["lstm_state"].shape[:-1] == param.shape and entry["lstm_state"].dtype is torch.bfloat16
    after = optimizer(half, kind, network)
    after.load_state_dict(saved)
    assert all(entry["lstm_age"] == 17 for entry in after.state.values())
    train(half, after, 23)
    assert torch.equal(theta(whole), theta(half))
    for a, b in zip(whole.parameters(), half.parameters(), strict=True):
        assert after.state[b]["lstm_age"] == 40 and a.shape == b.shape


@pytest.mark.parametrize("kind", ROUNDED)
def test_copies_and_pickles_go_on_alike(kind):
    first = model()
    opt = optimizer(first, kind, "mnist-mlp")
    train(first, opt, 5)
    for make in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        other, its_own = make((first, opt))
        mine, own = copy.deepcopy((first, opt))
        train(other, its_own, 3)
        train(mine, own, 3)
        assert torch.equal(theta(other), theta(mine))


@pytest.mark.parametrize("kind", ROUNDED)
def test_any_number_of_threads(kind):
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            module = nn.Linear(100, 101)
            with torch.no_grad():
                module.weight.fill_(0.01)
                module.bias.fill_(0.0)
            opt = optimizer(module, kind, "mnist-mlp")
            for _ in range(4):
                module.weight.grad = torch.linspace(-1, 1, 10100).view(101, 100)
                module.bias.grad = torch.linspace(-1, 1, 101)
                opt.step()
            found.append(theta(module))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("network", ["general", "mnist-mlp"])
@pytest.mark.parametrize("after", state_types.STATE_DTYPES)
@pytest.mark.parametrize("before", state_types.STATE_DTYPES)
def test_a_checkpoint_of_one_type_loads_into_another(before, after, network):
    module = model()
    first = optimizer(module, before, network)
    train(module, first, 8)
    second = optimizer(module, after, network)
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["state_dtype"] == after
    for param in module.parameters():
        assert second.state[param]["lstm_state"].dtype is state_types.STATE_DTYPES[after]
        old, new = (opt.state_of(param).to_logical()[0] for opt in (first, second))
        for a, b in zip(old, new, strict=True):
            assert torch.allclose(a, b, atol=0.05, rtol=0.02)
    assert train(module, second, 30) < 0.8  # of 1.1; how far down is a matter of how sums are rounded


@pytest.mark.parametrize("kind", ROUNDED)
def test_conversion_in_parts_is_that_of_the_whole(kind, monkeypatch):
    """And what lies beyond the last coordinate chooses no step, in whichever part it is."""
    network, config = l2l.load_pretrained("mnist-mlp"), PLAIN["2x20"]
    rows = torch.randn(3, config.rows, 64).clamp(-0.9, 0.9)
    clean = rows.clone()
    rows[2, :, 2:], clean[2, :, 2:] = 1e30, 0.0
    found = []
    for tiles, chunk in ((clean, 1024), (rows, 1)):
        monkeypatch.setattr(state_types, "CHUNK", chunk)
        param = nn.Parameter(torch.zeros(130))
        opt = l2l.LearnedOptimizer([param], network, state_dtype=kind)
        opt.state[param].update(lstm_state=tiles, numel=130)
        param.grad = torch.ones(130)
        opt.step()
        saved = opt.state_dict()
        opt.load_state_dict(saved)
        found.append([saved["state"][0]["lstm_state"], *sum(map(list, opt.state_of(param).to_logical()), [])])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("kind", ROUNDED)
def test_no_two_parameters_round_alike(kind):
    params = [nn.Parameter(torch.zeros(64)) for _ in range(4)]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    opt = l2l.LearnedOptimizer(groups, l2l.load_pretrained("mnist-mlp"), state_dtype=kind)
    for _ in range(3):
        for param in params:
            param.grad = torch.linspace(-1, 1, 64)
        opt.step()
    cells = [opt.state_of(param).to_logical()[0][1] for param in params]
    assert not any(torch.equal(cells[i], cells[j]) for i in range(4) for j in range(i))


def test_a_parameter_that_became_float64_is_refused():
    param = nn.Parameter(torch.zeros(3))
    opt = l2l.LearnedOptimizer([param], l2l.CoordinatewiseLSTM(), state_dtype="int8")
    param.data = param.data.double()
    param.grad = torch.ones(3, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="expected 'float32' for float64 parameters"):
        opt.step()
    assert not param.any() and not opt.state


def test_the_type_of_a_group_can_be_changed_between_steps():
    module = model()
    opt = optimizer(module, "float32", "mnist-mlp")
    train(module, opt, 4)
    opt.param_groups[0]["state_dtype"] = "int8"
    train(module, opt, 4)
    assert all(entry["lstm_state"].dtype is torch.int8 for entry in opt.state.values())
    opt.param_groups[0]["state_dtype"] = "float16"
    before = theta(module)
    with pytest.raises(ValueError, match=r"state_dtype: expected one of .*'int8', got 'float16'"):
        train(module, opt, 1)
    assert torch.equal(before, theta(module))


@pytest.mark.parametrize("kind", ROUNDED)
def test_sums_over_a_tensor_are_those_of_what_is_stored(kind):
    config, dtype = PLAIN["normalized"], state_types.STATE_DTYPES[kind]
    torch.manual_seed(0)
    rows = torch.randn(16, config.rows, 64).abs()
    stored = state_types.encode(rows, config, dtype, 1000, 5)
    param, grad = torch.randn(1000), torch.randn(1000)
    found = operators.tensor_sums([param], [grad], [stored], config, False, [7])
    expected = operators.tensor_sums([param], [grad], [state_types.decode(stored, config)], config, False, [7])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", state_types.STATE_DTYPES)
def test_a_state_of_another_network_is_not_saved_as_one_of_this(kind):
    param = nn.Parameter(torch.zeros(70))
    opt = l2l.LearnedOptimizer([param], l2l.CoordinatewiseLSTM(), state_dtype=kind)
    param.grad = torch.ones(70)
    opt.step()
    opt.param_groups[0]["network"] = l2l.CoordinatewiseLSTM(hidden_size=8, num_layers=1)
    if kind == "int8":
        with pytest.raises(ValueError, match="does not fit the network"):
            opt.state_dict()
    else:
        assert opt.state_dict()["state"][0]["lstm_state"].shape == (70, 80)


def test_what_needs_float32_says_so():
    param = nn.Parameter(torch.zeros(3))
    plain, talking = l2l.CoordinatewiseLSTM(), l2l.CoordinatewiseLSTM(gac_cells=2)
    with pytest.raises(ValueError, match="state_dtype: expected one of"):
        l2l.LearnedOptimizer([param], plain, state_dtype="fp8")
    with pytest.raises(NotImplementedError, match="state_dtype: expected 'float32' for a network whose coordinates"):
        l2l.LearnedOptimizer([param], talking, state_dtype="int8")
    with pytest.raises(NotImplementedError, match=r"expected 'float32' for float64 parameters"):
        l2l.LearnedOptimizer([param.double().detach()], plain, state_dtype="int8")
    opt = l2l.LearnedOptimizer([param], plain, state_dtype="int8")
    with pytest.raises(NotImplementedError, match="start_segment: meta-training needs .*, got 'int8'"):
        opt.start_segment()


def test_a_group_without_the_option_and_one_with_a_wrong_one():
    param = nn.Parameter(torch.zeros(70))
    opt = l2l.LearnedOptimizer([param], l2l.CoordinatewiseLSTM())
    param.grad = torch.ones(70)
    del opt.param_groups[0]["state_dtype"]
    opt.step()
    opt.load_state_dict(opt.state_dict())
    assert opt.state_of(param).dtype is torch.float32 and opt.param_groups[0]["state_dtype"] == "float32"
    saved = opt.state_dict()
    for wrong in ("fp8", ["int8"], None):
        opt.param_groups[0]["state_dtype"] = wrong
        for ask in (opt.step, lambda: opt.state_of(param), opt.start_segment, lambda: opt.load_state_dict(saved)):
            with pytest.raises(ValueError, match="state_dtype: expected one of"):
                ask()


def test_int8_of_three_dimensions_is_no_live_state():
    param = nn.Parameter(torch.zeros(70))
    opt = l2l.LearnedOptimizer([param], l2l.CoordinatewiseLSTM())
    opt.state[param].update(lstm_state=torch.zeros(2, 80, 64, dtype=torch.int8), numel=70)
    assert opt.state_dict()["state"][0]["lstm_state"].shape == (2, 80, 64)
    with pytest.raises(ValueError, match="expected 'lstm_state' of shape"):
        opt.state_of(param)


def test_operators_refuse_what_does_not_fit():
    config = PLAIN["1x8"]
    phi, param, grad = network(config), torch.zeros(70), torch.ones(70)
    good = state_types.zeros(70, config, torch.int8)

    def step(state, seeds=(1,), params=None, **options):
        params = params or [param]
        operators.step_(params, [grad] * len(params), state, phi, config, 1.0, 0.0, False, seeds=seeds, **options)

    with pytest.raises(ValueError, match="seeds: expected 1 numbers"):
        step([good], ())
    with pytest.raises(ValueError, match="seeds: expected 0 numbers"):
        step([state_types.zeros(70, config, torch.float32)])
    with pytest.raises(ValueError, match=r"states\[0\]: expected shape \[2, 1040\], got \[2, 1024\]"):
        step([good[:, :1024].contiguous()])
    with pytest.raises(TypeError, match=r"states\[0\]: expected dtype float32, bfloat16 or int8"):
        step([good.view(torch.uint8)])
    with pytest.raises(TypeError, match=r"states\[1\]: expected dtype"):
        step([good, state_types.zeros(70, config, torch.bfloat16)], (1, 2), [param, param.clone()])
    with pytest.raises(NotImplementedError, match="`out`"):
        step([good], out=torch.empty(1, 70))
    assert not param.any() and not good.any()
