"""Segments with a predicted gradient at their end, against back-propagation through the whole episode."""

from __future__ import annotations

import copy
import pickle
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2l_fast import dni

DOUBLE = {"dtype": torch.float64}


class Pair(NamedTuple):
    c: Tensor
    h: Tensor


class Cell(nn.Module):
    """An LSTM cell over a segment, whose state has the batch first."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(3, 5, **DOUBLE)

    def forward(self, inputs, state):
        zero = inputs.new_zeros(inputs.shape[1], 5)
        state = Pair(zero, zero) if state is None else state
        assert type(state) is Pair
        outputs = []
        for x in inputs:
            h, c = self.cell(x, (state.h, state.c))
            outputs.append(h)
            state = Pair(c, h)
        return torch.stack(outputs), state


CORES = {
    "lstm": (lambda: nn.LSTM(3, 5, **DOUBLE), 10, 1),
    "two layers": (lambda: nn.LSTM(3, 5, num_layers=2, **DOUBLE), 20, 1),
    "gru": (lambda: nn.GRU(3, 5, **DOUBLE), 5, 1),
    "cell": (Cell, 10, 0),
}


def episode(steps=7, batch=4):
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(steps, batch, size, generator=generator, **DOUBLE) for size in (3, 5))


def loss_of(targets):
    return lambda outputs: (outputs - targets).square().sum() / targets.shape[1]


def pieces(x, y, length=3):
    return list(zip(x.split(length), y.split(length), strict=True))


class Oracle(nn.Module):
    """The true gradient of all losses from a segment on; ``asked`` says which one, call by call."""

    def __init__(self, core, parts, batch_dim, shapes):
        super().__init__()
        self.held = [core, parts, batch_dim, shapes]
        self.asked = []

    def forward(self, flat):
        core, parts, batch_dim, shapes = self.held
        leaf, state = flat.detach().requires_grad_(), []
        for shape, piece in zip(shapes, leaf.chunk(len(shapes), 1), strict=True):
            moved = (shape[batch_dim], *shape[:batch_dim], *shape[batch_dim + 1 :])
            state.append(piece.reshape(moved).movedim(0, batch_dim))
        given = state[0] if len(state) == 1 else Pair(*state) if batch_dim == 0 else tuple(state)
        rest = parts[self.asked.pop(0) :]
        outputs, _ = core(torch.cat([x for x, _ in rest]), given)
        return torch.autograd.grad(loss_of(torch.cat([y for _, y in rest]))(outputs), leaf)[0]


@pytest.mark.parametrize("name", CORES)
def test_with_the_true_gradient_it_is_back_propagation_through_the_episode(name):
    make, size, batch_dim = CORES[name]
    core = make()
    x, y = episode()
    parts = pieces(x, y)
    outputs, end = core(x, None)
    want = torch.autograd.grad(loss_of(y)(outputs), list(core.parameters()))
    shapes = [part.shape for part in ([end] if isinstance(end, Tensor) else end)]
    oracle = Oracle(core, parts, batch_dim, shapes)
    net = dni.Recurrent(core, size, oracle, batch_dim=batch_dim, gradient_scale=1.0)
    state = None
    for k, (inputs, targets) in enumerate(parts):
        last = k == len(parts) - 1
        oracle.asked = ([] if last else [k + 1]) + ([k] if k else [])  # at the segment's end, then at its start
        segment = net.segment(inputs, state, loss_of(targets), last=last)
        assert not oracle.asked
        if k:  # the bootstrapped target is the true gradient, too
            assert segment.predictor_loss < 1e-24
        state = segment.state
    for p, g in zip(core.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-12)


def run(net, x, y, length=3):
    state, found = None, []
    parts = pieces(x, y, length)
    for k, (inputs, targets) in enumerate(parts):
        found.append(net.segment(inputs, state, loss_of(targets), last=k == len(parts) - 1))
        state = found[-1].state
    return found


@pytest.mark.parametrize("auxiliary", [False, True])
def test_at_first_it_is_truncated_back_propagation_exactly(auxiliary):
    core = nn.LSTM(3, 5, **DOUBLE)
    x, y = episode()
    net = dni.Recurrent(core, 10, auxiliary=auxiliary, output_size=5)
    found = run(net, x, y)
    got = [p.grad.clone() for p in core.parameters()]
    core.zero_grad()
    state = None
    for inputs, targets in pieces(x, y):
        outputs, state = core(inputs, None if state is None else tuple(part.detach() for part in state))
        loss_of(targets)(outputs).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(core.parameters(), got, strict=True))
    assert found[0].predictor_loss is None and found[0].state_gradient is None
    assert (found[-1].auxiliary_loss is None) and (found[0].auxiliary_loss is not None) == auxiliary


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("auxiliary", [False, True])
def test_the_target_is_bootstrapped_and_the_auxiliary_task_is_no_part_of_it(last, auxiliary):
    core = nn.LSTM(3, 5, **DOUBLE)
    x, y = episode(3)
    net = dni.Recurrent(core, 10, auxiliary=auxiliary, output_size=5, hidden=6, auxiliary_weight=0.5)
    for module in (net.predictor.out, net.auxiliary):
        if module is not None:
            nn.init.normal_(module.weight)
    start = [torch.randn(1, 4, 5, **DOUBLE) for _ in range(2)]
    found = net.segment(x, tuple(start), loss_of(y), last=last)

    leaves = [part.clone().requires_grad_() for part in start]
    outputs, end = core(x, tuple(leaves))
    beyond = net.predictor(torch.cat([end[0][0], end[1][0]], 1)).detach() / 4
    total = loss_of(y)(outputs)
    if not last:
        total = total + (beyond[:, :5] * end[0][0]).sum() + (beyond[:, 5:] * end[1][0]).sum()
    *want, dh, dc = torch.autograd.grad(total, [*core.parameters(), *leaves], retain_graph=True)
    target = torch.cat([dh[0], dc[0]], 1)
    torch.testing.assert_close(found.state_gradient, target, rtol=1e-12, atol=1e-12)
    said = net.predictor(torch.cat([start[0][0], start[1][0]], 1))
    error = (said - 4 * target).square().sum() / 4
    torch.testing.assert_close(found.predictor_loss, error.detach(), rtol=1e-12, atol=1e-12)
    parameters = list(net.predictor.parameters())
    for p, g in zip(parameters, torch.autograd.grad(error, parameters), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-12)
    if auxiliary and not last:
        wrong = (net.auxiliary(outputs[0]) - 4 * beyond).square().sum() / 4
        torch.testing.assert_close(found.auxiliary_loss, wrong.detach(), rtol=1e-12, atol=1e-12)
        more = torch.autograd.grad(0.5 * wrong, list(core.parameters()))
        want = [a + b for a, b in zip(want, more, strict=True)]
    for p, g in zip(core.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-11, atol=1e-12)


def test_samples_may_end_at_different_times():
    # A sample's gradients are its own: together they are what every sample gives alone.
    core = nn.LSTM(3, 5, **DOUBLE)
    x, y = episode(3)
    net = dni.Recurrent(core, 10, auxiliary=True, output_size=5, gradient_scale=1.0)
    nn.init.normal_(net.predictor.out.weight), nn.init.normal_(net.auxiliary.weight)
    start = tuple(torch.randn(1, 4, 5, **DOUBLE) for _ in range(2))
    last = torch.tensor([True, False, False, True])
    found = net.segment(x, start, loss_of(y), last=last)
    got = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    for k, end in enumerate(last.tolist()):
        piece = slice(k, k + 1)
        mine = tuple(part[:, piece].contiguous() for part in start)
        alone = net.segment(x[:, piece], mine, lambda out, k=piece: loss_of(y[:, k])(out) / 4, last=end)
        torch.testing.assert_close(found.state_gradient[piece], alone.state_gradient, rtol=1e-12, atol=1e-12)
    names = [name for name, _ in net.named_parameters()]
    for name, p, g in zip(names, net.parameters(), got, strict=True):
        if not name.startswith("core"):  # means over the batch
            torch.testing.assert_close(p.grad / 4, g, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=r"last: expected shape \(4,\), one for every sample, got \(3,\)"):
        net.segment(x, start, loss_of(y), last=last[:3])
    with pytest.raises(TypeError, match="last: expected a bool or a bool tensor"):
        net.segment(x, start, loss_of(y), last=last.long())


@pytest.mark.parametrize("value", [False, True])
def test_a_tensor_that_says_the_same_of_all_is_a_bool(value):
    x, y = episode(3)
    grads = []
    core = nn.LSTM(3, 5, **DOUBLE)
    net = dni.Recurrent(core, 10, auxiliary=True, output_size=5)
    nn.init.normal_(net.predictor.out.weight), nn.init.normal_(net.auxiliary.weight)
    start = tuple(torch.randn(1, 4, 5, **DOUBLE) for _ in range(2))
    for last in (value, torch.full((4,), value)):
        net.zero_grad()
        net.segment(x, start, loss_of(y), last=last)
        grads.append([torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_no_graph_is_left_and_nothing_is_stored(tmp_path):
    net = dni.Recurrent(nn.LSTM(3, 5, **DOUBLE), 10, auxiliary=True, output_size=5)
    x, y = episode()
    found = run(net, x, y)
    for segment in found:
        tensors = [part for value in segment for part in (value if isinstance(value, tuple) else [value])]
        assert not any(part.requires_grad for part in tensors if part is not None)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        net.zero_grad(), other.zero_grad()
        run(net, x, y), run(other, x, y)
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)


def test_a_predictor_of_a_linear_core_learns_the_true_gradient():
    # s' = s A + x with losses s B: the gradient with respect to a state one segment before the end is a constant.
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(2, **DOUBLE) * 0.7, requires_grad=False)

        def forward(self, inputs, state):
            outputs = []
            for x in inputs:
                state = x if state is None else state @ self.weight + x
                outputs.append(state)
            return torch.stack(outputs), state

    net = dni.Recurrent(Linear(), 2, batch_dim=0, hidden=0)
    opt = torch.optim.SGD(net.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(6)
    for _ in range(400):
        _, state = net(torch.randn(2, 16, 2, generator=generator, **DOUBLE))
        x = torch.randn(2, 16, 2, generator=generator, **DOUBLE)
        opt.zero_grad()
        found = net.segment(x, state, lambda outputs: outputs.sum() / 16, last=True)
        opt.step()
    want = torch.full((16, 2), 0.7 + 0.49, **DOUBLE)
    torch.testing.assert_close(found.state_gradient * 16, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(net.predictor(state).detach(), want, rtol=1e-3, atol=1e-3)


def test_bfloat16_autocast_and_frozen_cores_work():
    net = dni.Recurrent(nn.LSTM(3, 5), 10, auxiliary=True, output_size=5)
    x, y = (part.float() for part in episode())
    with torch.autocast("cpu", torch.bfloat16):
        run(net, x, y)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    net.core.requires_grad_(False)
    net.zero_grad()
    state = net.core(x[:3])[1]
    net.segment(x[3:6], state, loss_of(y[3:6]))
    assert net.predictor.out.bias.grad is not None and all(p.grad is None for p in net.core.parameters())


def test_wrong_arguments_are_named():
    core = nn.LSTM(3, 5)
    x, y = (part.float() for part in episode(3))
    with pytest.raises(TypeError, match=r"core: expected an nn.Module, got function"):
        dni.Recurrent(lambda x, s: (x, s), 4)
    with pytest.raises(ValueError, match="state_size must be a positive integer, got 0"):
        dni.Recurrent(core, 0)
    with pytest.raises(TypeError, match="output_size: expected an int >= 1 for the auxiliary task"):
        dni.Recurrent(core, 10, auxiliary=True)
    with pytest.raises(ValueError, match='gradient_scale: expected "batch" or a number > 0'):
        dni.Recurrent(core, 10, gradient_scale="sample")
    net = dni.Recurrent(core, 9)
    with pytest.raises(ValueError, match="state_size: expected 10, as the core's state has, got 9"):
        net.segment(x, None, loss_of(y))
    net = dni.Recurrent(core, 10)
    with pytest.raises(ValueError, match=r"loss_fn: expected a scalar tensor, got shape \(3, 4, 5\)"):
        net.segment(x, None, lambda out: out)
    with pytest.raises(TypeError, match="loss_fn: expected a scalar tensor, got float"):
        net.segment(x, None, lambda out: 1.0)
    with torch.no_grad(), pytest.raises(RuntimeError, match="gradients are switched off"):
        net.segment(x, None, loss_of(y))
    assert all(p.grad is None for p in net.parameters())
    wrong = dni.Recurrent(core, 10, nn.Linear(10, 9))
    with pytest.raises(ValueError, match=r"predictor: expected a tensor of shape \(4, 10\), got shape \(4, 9\)"):
        wrong.segment(x, None, loss_of(y))
    assert all(p.grad is None for p in wrong.parameters())


def test_a_segment_in_which_nothing_is_asked_gets_what_comes_later():
    net = dni.Recurrent(nn.LSTM(3, 5, **DOUBLE), 10)
    nn.init.normal_(net.predictor.out.weight)
    x, _ = episode(3)
    grads = []
    for constant in (lambda out: out.sum() * 0, lambda out: torch.zeros(())):
        net.zero_grad()
        assert net.segment(x, None, constant).loss == 0
        grads.append([p.grad.clone() for p in net.core.parameters()])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*grads, strict=True))
    with pytest.raises(RuntimeError, match="does not require grad"):
        net.segment(x, None, lambda out: torch.zeros(()), last=True)


def test_losses_of_a_head_outside_reach_it():
    net = dni.Recurrent(nn.LSTM(3, 5), 10)
    head = nn.Linear(5, 2)
    x, _ = episode(3)
    labels = torch.randint(2, (3 * 4,))
    net.segment(x.float(), None, lambda out: F.cross_entropy(head(out).flatten(0, 1), labels))
    assert head.weight.grad.abs().sum() > 0 and net.core.weight_hh_l0.grad.abs().sum() > 0


def test_outputs_and_what_is_foreseen_are_checked_before_anything_is_written():
    core, x = nn.LSTM(3, 5), torch.randn(3, 4, 3)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, [3, 3, 2, 1])
    with pytest.raises(TypeError, match="core: expected one tensor of outputs, time first, got PackedSequence"):
        dni.Recurrent(core, 10).segment(packed, None, lambda y: y.data.square().sum())
    net = dni.Recurrent(core, 10, auxiliary=nn.Linear(5, 1))
    with pytest.raises(ValueError, match=r"auxiliary: expected a tensor of shape \(4, 10\) .* got shape \(4, 1\)"):
        net.segment(x, None, lambda y: y.square().sum())
    assert all(param.grad is None for param in net.parameters())
    with pytest.raises(ValueError, match="core: expected outputs time first"):
        dni.Recurrent(nn.LSTM(3, 5, batch_first=True), 10, auxiliary=True, output_size=5)
