"""Files of other implementations, written here as those write them, and files that are not what they claim."""

from __future__ import annotations

import collections
import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast.networks import interchange
from tests.helpers import random_network


def deepmind_modules(hidden=20, inputs=2, layers=2, seed=0):
    """What that code's ``save`` collects: a defaultdict of dicts of arrays."""
    random = np.random.default_rng(seed)
    modules = collections.defaultdict(dict)
    for k in range(layers):
        rows = (inputs if k == 0 else hidden) + hidden
        modules[f"lstm_{k + 1}"]["w_gates"] = random.normal(size=(rows, 4 * hidden)).astype(np.float32)
        modules[f"lstm_{k + 1}"]["b_gates"] = random.normal(size=4 * hidden).astype(np.float32)
    modules["linear"]["w"] = random.normal(size=(hidden, 1)).astype(np.float32)
    modules["linear"]["b"] = random.normal(size=1).astype(np.float32)
    return modules


def deepmind_steps(modules, grads, k=5.0, scale=0.01):
    """That code's forward pass in numpy: Sonnet's LSTM (gates i, j, f, o; forget bias 1), its LogAndSign."""

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    layers = sorted(name for name in modules if name.startswith("lstm"))
    hidden = modules["linear"]["w"].shape[0]
    states = [(np.zeros((grads.shape[1], hidden)), np.zeros((grads.shape[1], hidden))) for _ in layers]
    updates = []
    for grad in grads:
        log = np.maximum(np.log(np.abs(grad) + np.finfo(np.float32).eps) / k, -1.0)
        x = np.stack([log, np.clip(grad * np.exp(k), -1, 1)], axis=1)
        for index, layer in enumerate(layers):
            h, c = states[index]
            gates = np.concatenate([x, h], axis=1) @ modules[layer]["w_gates"] + modules[layer]["b_gates"]
            i, j, f, o = np.split(gates, 4, axis=1)
            c = sigmoid(f + 1.0) * c + sigmoid(i) * np.tanh(j)
            x = sigmoid(o) * np.tanh(c)
            states[index] = (x, c)
        updates.append((x @ modules["linear"]["w"] + modules["linear"]["b"])[:, 0] * scale)
    return np.stack(updates)


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_a_deepmind_file_does_here_what_it_does_there(tmp_path, protocol):
    modules = deepmind_modules()
    path = tmp_path / "cw.l2l"
    path.write_bytes(pickle.dumps(modules, protocol=protocol))
    net = interchange.load_deepmind(path)
    assert (net.preprocess, net.p, net.output_scale) == ("log_sign", 5.0, 0.01)
    grads = np.random.default_rng(1).normal(size=(6, 30)) * 10.0 ** np.random.default_rng(2).uniform(-3, 1, 30)
    expected = deepmind_steps(modules, grads)
    state = net.init_state(30)
    for grad, update in zip(grads, expected):
        found, state = net(torch.tensor(grad, dtype=torch.float32), state)
        np.testing.assert_allclose(found.detach().numpy(), update, rtol=2e-4, atol=1e-6)


def test_a_deepmind_file_of_python_2_and_fortran_order_and_double(tmp_path):
    modules = deepmind_modules(hidden=4, inputs=1, layers=1)
    plain = {
        name: {key: np.asfortranarray(value.astype(np.float64)) for key, value in part.items()}
        for name, part in modules.items()
    }
    path = tmp_path / "x.l2l"
    content = pickle.dumps(plain, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    path.write_bytes(content)
    net = interchange.load_deepmind(path, preprocess="identity", output_scale=1.0)
    cells, linear = net.to_lstm_cells()
    torch.testing.assert_close(linear.weight[0], torch.from_numpy(modules["linear"]["w"][:, 0]))
    torch.testing.assert_close(cells[0].bias_ih[4:8], torch.from_numpy(modules["lstm_1"]["b_gates"][8:12]) + 1.0)


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("function", [os.system, eval, exec, getattr, np.load, __import__], ids=lambda f: f.__name__)
def test_malicious_pickles_are_refused_and_do_nothing(tmp_path, function, protocol):
    mark = tmp_path / "ran"
    arguments = {"system": (f"touch {mark}",), "getattr": (os, "system"), "load": (str(mark),), "__import__": ("os",)}
    code = f"open({str(mark)!r}, 'w')"
    path = tmp_path / "evil.l2l"
    modules = deepmind_modules()
    try:
        modules["linear"]["b"] = Evil(function, *arguments.get(function.__name__, (code,)))
        path.write_bytes(pickle.dumps(modules, protocol=protocol))
    except (TypeError, pickle.PicklingError):
        modules["linear"]["b"] = Evil(function, "os")
        path.write_bytes(pickle.dumps(modules, protocol=protocol))
    with pytest.raises(ValueError, match="asks for"):
        interchange.load_deepmind(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["linear"].pop("b"),
        lambda m: m.pop("linear"),
        lambda m: m["lstm_2"].update(w_gates=np.zeros((7, 80), np.float32)),
        lambda m: m["lstm_1"].update(b_gates=np.zeros(79, np.float32)),
        lambda m: m["linear"].update(w=np.array([None])),
        lambda m: m["linear"].update(w=np.zeros((20, 1), np.int64)),
        lambda m: m.update(extra={}),
        lambda m: m["linear"].update(w=3),
    ],
)
def test_other_contents_are_refused(tmp_path, change):
    modules = deepmind_modules()
    change(modules)
    path = tmp_path / "x.l2l"
    path.write_bytes(pickle.dumps(modules))
    with pytest.raises(ValueError, match=r"x\.l2l"):
        interchange.load_deepmind(path)


def test_damaged_and_foreign_files(tmp_path):
    path = tmp_path / "x.l2l"
    whole = pickle.dumps(deepmind_modules())
    for content in (b"", b"not a pickle", whole[: len(whole) // 2], pickle.dumps([1, 2]), pickle.dumps(None)):
        path.write_bytes(content)
        with pytest.raises(ValueError):
            interchange.load_deepmind(path)
    with pytest.raises(FileNotFoundError):
        interchange.load_deepmind(tmp_path / "missing.l2l")


class Peer(nn.Module):
    def __init__(self, hidden=20):
        super().__init__()
        self.recurs = nn.LSTMCell(2, hidden)
        self.recurs2 = nn.LSTMCell(hidden, hidden)
        self.output = nn.Linear(hidden, 1)


def test_a_state_dict_of_cells(tmp_path):
    peer = Peer()
    path = tmp_path / "peer.pth"
    torch.save(peer.state_dict(), path)
    expected = l2l.CoordinatewiseLSTM.from_lstm_cells([peer.recurs, peer.recurs2], peer.output)
    for net in (interchange.from_state_dict(peer.state_dict()), interchange.load_torch(path)):
        assert torch.equal(net.phi(), expected.phi())


def test_a_state_dict_of_one_lstm():
    lstm, linear = nn.LSTM(2, 8, num_layers=2), nn.Linear(8, 1)
    state = {f"lstm.{k}": v for k, v in lstm.state_dict().items()}
    state |= {f"o.{k}": v for k, v in linear.state_dict().items()}
    net = interchange.from_state_dict(state, p=7.0, output_scale=0.5)
    cells, _ = net.to_lstm_cells()
    torch.testing.assert_close(cells[1].weight_ih, lstm.weight_ih_l1)
    torch.testing.assert_close(cells[0].bias_ih, lstm.bias_ih_l0 + lstm.bias_hh_l0)
    assert (net.p, net.output_scale) == (7.0, 0.5)


def test_the_round_trip_through_cells_is_exact():
    net = random_network(hidden_size=12, num_layers=3)
    cells, linear = net.to_lstm_cells()
    state = {f"{k}.{name}": value for k, cell in enumerate(cells) for name, value in cell.state_dict().items()}
    state |= {f"out.{name}": value for name, value in linear.state_dict().items()}
    assert torch.equal(interchange.from_state_dict(state).phi(), net.phi())


@pytest.mark.parametrize(
    "change", [{"more": torch.zeros(2)}, {"output.weight": torch.zeros(2, 20)}, {"output.bias": 3}]
)
def test_other_state_dicts_are_refused(change):
    with pytest.raises((ValueError, TypeError), match="state|read-out"):
        interchange.from_state_dict({**Peer().state_dict(), **change})


def test_a_torch_file_of_something_else(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(Peer(), path)
    with pytest.raises(ValueError, match=r"x\.pth"):
        interchange.load_torch(path)
