"""CoordinatewiseLSTM: parameters, initialisation, forward, exchange with torch.nn, files."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import stat

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import l2l_fast as l2l
from tests.helpers import CONFIG_IDS, CONFIGS, Cells, assert_close, double, random_network, random_state

# ---- construction ----


def test_default_is_the_network_of_the_paper():
    net = l2l.CoordinatewiseLSTM()
    assert (net.hidden_size, net.num_layers, net.preprocess, net.p, net.output_scale) == (20, 2, "log_sign", 10.0, 0.1)
    assert sum(parameter.numel() for parameter in net.parameters()) == 5141
    assert sum(p.numel() for p in l2l.CoordinatewiseLSTM(preprocess="identity").parameters()) == 5061
    assert repr(net) == (
        "CoordinatewiseLSTM(hidden_size=20, num_layers=2, preprocess='log_sign', p=10.0, output_scale=0.1)"
    )


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"hidden_size": 3}, ValueError, "hidden_size"),
        ({"hidden_size": 65}, ValueError, "hidden_size"),
        ({"hidden_size": 20.0}, TypeError, "hidden_size"),
        ({"hidden_size": True}, TypeError, "hidden_size"),
        ({"num_layers": 0}, ValueError, "num_layers"),
        ({"num_layers": 5}, ValueError, "num_layers"),
        ({"preprocess": "log"}, ValueError, "preprocess"),
        ({"preprocess": None}, ValueError, "preprocess"),
        ({"p": 0.0}, ValueError, "p:"),
        ({"p": 81.0}, ValueError, "p:"),
        ({"p": math.nan}, ValueError, "p:"),
        ({"p": "10"}, TypeError, "p:"),
        ({"output_scale": math.inf}, ValueError, "output_scale"),
        ({"output_scale": None}, TypeError, "output_scale"),
        ({"gac_cells": 21}, ValueError, "gac_cells"),
        ({"gac_cells": 1.0}, TypeError, "gac_cells"),
        ({"extra_inputs": 17}, ValueError, "extra_inputs"),
        ({"extra_inputs": -1}, ValueError, "extra_inputs"),
        ({"num_outputs": 0}, ValueError, "num_outputs"),
        ({"num_outputs": True}, TypeError, "num_outputs"),
    ],
)
def test_constructor_rejects(options, error, name):
    with pytest.raises(error, match=name):
        l2l.CoordinatewiseLSTM(**options)


def test_phi_is_the_parameters_in_order_and_differentiable():
    net = random_network(hidden_size=4, num_layers=3)
    names = [f"{name}_l{k}" for k in range(3) for name in ("weight_ih", "weight_hh", "bias")]
    expected = torch.cat([getattr(net, name).flatten() for name in [*names, "weight_out", "bias_out"]])
    assert torch.equal(net.phi(), expected)
    weights = torch.randn(expected.shape)
    net.phi().backward(weights)
    assert torch.equal(torch.cat([getattr(net, n).grad.flatten() for n in [*names, "weight_out", "bias_out"]]), weights)
    unpacked = l2l.reference.unpack_phi(net.phi(), net.config)
    assert torch.equal(unpacked.layers[1][1], net.weight_hh_l1) and torch.equal(unpacked.bias_out, net.bias_out)


def test_phi_sees_swapped_and_parametrized_parameters():
    net = random_network(hidden_size=4, num_layers=1)
    swapped = {"bias_out": torch.full((1,), 7.0)}

    class Phi(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self):
            return self.net.phi()

    assert torch.func.functional_call(Phi(net), {"net.bias_out": swapped["bias_out"]}, ())[-1] == 7
    nn.utils.parametrizations.weight_norm(net, "weight_hh_l0")
    with torch.no_grad():
        net.parametrizations.weight_hh_l0.original0.mul_(2)
    phi = net.phi()
    assert torch.equal(l2l.reference.unpack_phi(phi, net.config).layers[0][1], net.weight_hh_l0)
    phi.sum().backward()
    assert net.parametrizations.weight_hh_l0.original0.grad is not None


def test_initialisation():
    net = l2l.CoordinatewiseLSTM(hidden_size=64, num_layers=2)
    std = 1 / math.sqrt(128)
    for values in (net.weight_hh_l1, net.weight_ih_l1):
        # A normal cut off at two standard deviations keeps 0.88 of its standard deviation.
        assert values.abs().max() <= 2 * std
        assert float(values.detach().std()) == pytest.approx(0.88 * std, rel=0.03)
        assert abs(float(values.detach().mean())) < 0.05 * std
    biases = net.bias_l1.detach().view(4, 64)
    assert float(biases[1].mean()) == pytest.approx(1.0, abs=3 * std / 8)
    assert (biases[1] - 1).abs().max() <= 2 * std + 1e-6 and biases[[0, 2, 3]].abs().max() <= 2 * std
    assert net.bias_out == 0 and net.weight_out.abs().max() <= 2 / 8


def test_initialisation_is_seeded():
    torch.manual_seed(5)
    first = l2l.CoordinatewiseLSTM().phi()
    torch.manual_seed(5)
    assert torch.equal(first, l2l.CoordinatewiseLSTM().phi())
    net = l2l.CoordinatewiseLSTM()
    net.reset_parameters(torch.Generator().manual_seed(1))
    again = net.phi().detach()
    net.reset_parameters(torch.Generator().manual_seed(1))
    assert torch.equal(again, net.phi()) and not torch.equal(again, first)


def test_copies_and_pickles():
    net = random_network()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert other.config == net.config and torch.equal(other.phi(), net.phi())
        assert other.bias_out is not net.bias_out


# ---- forward ----


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (65,), (8, 9), (2, 3, 4), (2, 3, 2, 5), (1, 2, 2, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_forward_keeps_shape_and_dtype(shape, dtype):
    net = random_network()
    grad = torch.randn(shape).to(dtype)
    state = random_state(net, grad.numel(), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    update, new_state = net(grad, state)
    assert update.shape == grad.shape and update.dtype == dtype and new_state.dtype == state.dtype
    assert new_state.numel == grad.numel()
    expected, _ = l2l.reference.step(double(net), grad.double(), state.to(torch.float64).to_logical())
    assert_close(update, expected, {torch.bfloat16: 4e-3, torch.float16: 5e-4}.get(dtype, 2e-5))


def test_float64_goes_through_the_reference_and_is_exact():
    net = random_network()
    grad = torch.randn(10, dtype=torch.float64)
    update, state = net(grad, net.init_state(10, dtype=torch.float64))
    expected, expected_state = Cells(double(net))(grad, [(torch.zeros(10, 20).double(),) * 2] * 2)
    assert_close(update, expected, 1e-12)
    assert_close(state.to_logical()[1][1], expected_state[1][1], 1e-12)
    update.sum().backward()  # reaches the float32 parameters
    assert net.weight_out.grad.dtype == torch.float32 and net.weight_out.grad.norm() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_network_in_another_dtype(dtype):
    net = random_network().to(dtype)
    update, _ = net(torch.randn(5), net.init_state(5))
    assert update.dtype == torch.float32
    update.sum().backward()
    assert net.bias_l0.grad.dtype == dtype


def test_frozen_network_and_no_grad():
    net = random_network().requires_grad_(False)
    update, state = net(torch.randn(5), net.init_state(5))
    assert not update.requires_grad and not state.data.requires_grad


@pytest.mark.parametrize(
    ("grad", "state", "error", "message"),
    [
        (torch.ones(5, dtype=torch.int64), 5, TypeError, "grad: .*int64"),
        (torch.ones(5, dtype=torch.complex64), 5, TypeError, "grad: .*complex64"),
        (torch.ones(5).to_sparse(), 5, TypeError, "grad: .*sparse"),
        ([1.0], 1, TypeError, "grad: expected a tensor"),
        (torch.ones(5), 6, ValueError, "state: expected numel=5"),
        (torch.ones(5), None, TypeError, "state: expected l2l_fast.State"),
        (torch.ones(5, device="meta"), 5, ValueError, "one device"),
    ],
)
def test_forward_rejects(grad, state, error, message):
    net = l2l.CoordinatewiseLSTM()
    with pytest.raises(error, match=message):
        net(grad, state if state is None else net.init_state(state))


def test_forward_rejects_the_state_of_another_network():
    with pytest.raises(ValueError, match="hidden_size=20"):
        l2l.CoordinatewiseLSTM()(torch.ones(5), l2l.CoordinatewiseLSTM(hidden_size=8).init_state(5))


# ---- exchange with torch.nn ----


@pytest.mark.parametrize("options", CONFIGS, ids=CONFIG_IDS)
def test_lstm_cells_round_trip(options):
    net = random_network(**options)
    cells, linear = net.to_lstm_cells()
    options = {name: value for name, value in options.items() if name not in ("hidden_size", "num_layers")}
    again = l2l.CoordinatewiseLSTM.from_lstm_cells(cells, linear, **options)
    assert again.config == net.config and torch.equal(again.phi(), net.phi())
    cells[0].weight_hh.data.zero_()
    assert net.weight_hh_l0.abs().max() > 0  # copies


def test_from_lstm_cells_adds_both_biases_and_takes_none():
    cells = nn.ModuleList([nn.LSTMCell(2, 6), nn.LSTMCell(6, 6, bias=False)])
    state = torch.get_rng_state()
    net = l2l.CoordinatewiseLSTM.from_lstm_cells(cells, nn.Linear(6, 1, bias=False))
    assert torch.equal(net.bias_l0, cells[0].bias_ih + cells[0].bias_hh)
    assert net.bias_l1.eq(0).all() and net.bias_out == 0
    assert net.config == l2l.Config(6, 2, "log_sign", 10.0, 0.1)
    torch.set_rng_state(state)


def test_from_lstm_cells_does_not_touch_the_random_state():
    cells, linear = [nn.LSTMCell(1, 6)], nn.Linear(6, 1)
    before = torch.get_rng_state()
    l2l.CoordinatewiseLSTM.from_lstm_cells(cells, linear, preprocess="identity")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("cells", "linear", "error", "message"),
    [
        ([], nn.Linear(6, 1), ValueError, "at least one"),
        ([nn.LSTMCell(1, 6)], nn.Linear(6, 1), ValueError, r"cells\[0\]"),
        ([nn.LSTMCell(2, 6), nn.LSTMCell(6, 7)], nn.Linear(6, 1), ValueError, r"cells\[1\]"),
        ([nn.LSTMCell(2, 6)], nn.Linear(6, 2), ValueError, "linear"),
        ([nn.GRUCell(2, 6)], nn.Linear(6, 1), TypeError, r"cells\[0\]"),
        ([nn.LSTMCell(2, 6)], nn.Identity(), TypeError, "linear"),
    ],
)
def test_from_lstm_cells_rejects(cells, linear, error, message):
    with pytest.raises(error, match=message):
        l2l.CoordinatewiseLSTM.from_lstm_cells(cells, linear)


# ---- files ----


@pytest.mark.parametrize("options", CONFIGS, ids=CONFIG_IDS)
def test_save_and_load(options, tmp_path):
    net = random_network(**options)
    net.save(tmp_path / "net.safetensors")
    again = l2l.load(str(tmp_path / "net.safetensors"))
    assert again.config == net.config and torch.equal(again.phi(), net.phi())
    assert os.listdir(tmp_path) == ["net.safetensors"]  # no temporary file stays


def test_save_keeps_dtype_and_plain_permissions(tmp_path):
    path = tmp_path / "net.safetensors"
    random_network().double().save(path)
    assert l2l.load(path).weight_out.dtype == torch.float64
    (tmp_path / "plain").write_bytes(b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    old = random_network(seed=1)
    old.save(path)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        random_network(seed=2).save(path)
    assert torch.equal(l2l.load(path).phi(), old.phi()) and os.listdir(tmp_path) == ["net.safetensors"]


def test_load_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.safetensors"):
        l2l.load(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError):
        l2l.load(tmp_path)


def _tampered(metadata=None, config=None, tensors=None) -> bytes:
    net = l2l.CoordinatewiseLSTM(hidden_size=4, num_layers=1)
    content = {name: parameter.detach() for name, parameter in net.named_parameters()}
    content.update(tensors or {})
    content = {name: tensor for name, tensor in content.items() if tensor is not None}
    full = {**net.config._asdict(), "gac_cells": 0, **(config or {})}
    header = {"format": "l2l_fast.CoordinatewiseLSTM", "format_version": "1", "config": json.dumps(full)}
    return safetensors.torch.save(content, {**header, **(metadata or {})})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable safetensors file"),
        (b"PK\x03\x04 a zip archive", "not a readable safetensors file"),
        (b"\xff" * 100, "not a readable safetensors file"),
        (_tampered()[:-5], "not a readable safetensors file"),
        (safetensors.torch.save({"x": torch.ones(2)}), "format"),
        (_tampered({"format": "other"}), "format"),
        (_tampered({"format_version": "2"}), "format_version"),
        (_tampered({"config": "{"}), "property name|Expecting"),
        (_tampered({"config": "[1]"}), "configuration fields"),
        (_tampered(config={"extra": 1}), "configuration fields"),
        (_tampered(config={"hidden_size": 1000}), "hidden_size"),
        (_tampered(config={"hidden_size": "4"}), "hidden_size"),
        (_tampered(config={"hidden_size": 5}), "expected shape"),
        (_tampered(config={"gac_cells": 1}), "gac_cells"),
        (_tampered(config={"num_layers": 2}), "missing: .*weight_hh_l1"),
        (_tampered(tensors={"bias_out": None}), "missing: .*bias_out"),
        (_tampered(tensors={"more": torch.ones(1)}), "unknown: .*more"),
        (_tampered(tensors={"bias_out": torch.ones(1, dtype=torch.int64)}), "dtype"),
        (_tampered(tensors={"bias_out": torch.ones(2)}), "bias_out: expected shape"),
    ],
)
def test_load_says_what_is_wrong(content, message, tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        l2l.load(path)
    assert "net.safetensors" in str(error.value)


@given(data=st.data())
def test_load_survives_any_damage(data, tmp_path):
    content = bytearray(_tampered())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    header = 8 + int.from_bytes(_tampered()[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        if content:
            # Mostly in the header: damage to the weights cannot be seen.
            position = data.draw(st.integers(0, min(header, len(content)) - 1))
            content[position] = data.draw(st.integers(0, 255))
    path = tmp_path / "net.safetensors"
    path.write_bytes(bytes(content))
    try:
        net = l2l.load(path)
    except ValueError as error:
        assert "net.safetensors" in str(error)
    else:
        assert net.phi().shape == (l2l.reference.phi_size(net.config),)
