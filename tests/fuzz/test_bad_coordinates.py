"""Coordinates whose gradient or state is not finite, in networks with averages: they stay alone, forward and backward.

And averages in a state that are not the same for all coordinates: no step has written them, but a checkpoint of a plain
network or :meth:`State.from_logical` may bring them.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import l2l_fast as l2l
from l2l_fast.kernels import operators as ops
from l2l_fast.kernels import reference
from tests.fuzz.cases import examples, seeds
from tests.gac_helpers import shared_state
from tests.helpers import double, random_network, random_state, structured_gradient

POISONS = (math.nan, math.inf, -math.inf, 3e38, -1e30)


def assert_same(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """The same places are finite, and those agree."""
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{what}: other places are finite"
    error = (actual.double() - expected)[finite].norm() / expected[finite].norm().clamp_min(1e-30)
    assert error <= tolerance, f"{what}: {error:.1e}"


class Problem:
    """Tensors of an optimizee with random states, and one step of them by the operator and by the reference."""

    def __init__(self, net: l2l.CoordinatewiseLSTM, numels: list[int], groups: int, seed: int, uniform: bool) -> None:
        self.net, self.numels, self.groups = net, numels, groups
        self.grads = [structured_gradient((n,), seed=seed + k) for k, n in enumerate(numels)]
        self.params = [torch.linspace(-1, 1, n) if n else torch.zeros(0) for n in numels]
        make = (lambda n, s: shared_state(net, n, groups, s)) if uniform else (lambda n, s: random_state(net, n, s))
        # Of one seed: then all tensors hold the same averages, as after a step.
        self.states = [make(n, seed if uniform else seed + k) for k, n in enumerate(numels)]
        if uniform:
            first = next(state for state in self.states if state.numel).to_logical()
            for k, state in enumerate(self.states):
                pairs = [(h.clone(), c) for h, c in state.to_logical()]
                for (h, _), (h0, _) in zip(pairs, first, strict=True):
                    shape = (groups, -1, net.hidden_size)
                    if len(h):
                        h.view(shape)[:, :, : net.gac_cells] = h0.view(shape)[:, :1, : net.gac_cells]
                self.states[k] = l2l.State.from_logical(pairs)
        self.phi = net.phi().detach()

    def expected(self) -> tuple[list[Tensor], list[l2l.kernels.state.LogicalState]]:
        joint = reference.join_states([s.to(torch.float64).to_logical() for s in self.states], self.groups)
        grad = reference.join([g.double() for g in self.grads], self.groups)
        update, joint = reference.lstm_step(grad, joint, self.phi.double(), self.net.config, self.groups)
        updates = reference.separate(update, self.numels, self.groups)
        params = [p.double() + u for p, u in zip(self.params, updates, strict=True)]
        return params, reference.separate_states(joint, self.numels, self.groups)

    def run(self, phases: bool = False) -> tuple[list[Tensor], list[l2l.State], Tensor, Tensor]:
        params, states = [p.clone() for p in self.params], [s.clone() for s in self.states]
        layers, cells = self.net.num_layers, self.net.gac_cells
        means = torch.full((layers, self.groups, cells), 7.0)
        sums = torch.full((2, self.groups, cells), 7.0, dtype=torch.float64)
        out = torch.empty(1, sum(self.numels))
        steps = [(k, k + 1) for k in range(layers + 1)] if phases else [(0, layers + 1)]
        for first, last in steps:
            ops.step_(
                params, self.grads, [s.data for s in states], self.phi, self.net.config, 1.0, 0.0, False,
                out=out, num_problems=self.groups, means=means, sums=sums, phases=(first, last),
            )  # fmt: skip
            if last <= layers:
                means[last - 1] = sums[0] / sums[1].clamp_min(1)
        return params, states, means, sums

    def check(self, tolerance: float = 3e-5) -> None:
        params, states, means, sums = self.run()
        expected, expected_states = self.expected()
        for k, n in enumerate(self.numels):
            if n == 0:
                continue
            assert_same(params[k] - self.params[k], expected[k] - self.params[k], 10 * tolerance, f"update {k}")
            for pair, pair_expected in zip(states[k].to_logical(), expected_states[k], strict=True):
                for part, part_expected in zip(pair, pair_expected, strict=True):
                    assert_same(part, part_expected, tolerance, f"state {k}")
        assert means.isfinite().all() and sums.isfinite().all()
        again = self.run(phases=True)
        for one, other in zip([*params, *(s.data for s in states), means], [*again[0], *(s.data for s in again[1]),
                              again[2]], strict=True):  # fmt: skip
            assert torch.equal(one.view(torch.int32), other.view(torch.int32))


@st.composite
def networks(draw) -> l2l.CoordinatewiseLSTM:
    hidden = draw(st.sampled_from((4, 5, 8, 20)))
    return random_network(
        seed=draw(seeds),
        hidden_size=hidden,
        num_layers=draw(st.integers(1, 3)),
        preprocess=draw(st.sampled_from(("log_sign", "identity"))),
        gac_cells=draw(st.integers(1, hidden)),
        output_scale=1.0,
    )


sizes = st.lists(st.sampled_from((0, 1, 2, 20, 32, 33, 64, 70, 100)), min_size=1, max_size=3).filter(any)


@examples(120)
@given(net=networks(), sizes=sizes, groups=st.sampled_from((1, 1, 2, 4)), seed=seeds, data=st.data())
def test_one_step(net, sizes, groups, seed, data, isa):
    problem = Problem(net, [n * groups for n in sizes], groups, seed % 1000, data.draw(st.booleans()))
    kind = data.draw(st.sampled_from(("none", "gradients", "states", "all of a group")))
    places = [(k, i) for k, n in enumerate(problem.numels) for i in range(n)]
    chosen = data.draw(st.lists(st.sampled_from(places), max_size=4)) if kind != "all of a group" else []
    if kind == "all of a group":
        chosen = [(k, i) for k, i in places if i < problem.numels[k] // groups]
    for k, i in chosen:
        if kind == "states":
            row = data.draw(st.integers(0, problem.states[k].data.shape[1] - 1))
            problem.states[k].data[i // 64, row, i % 64] = math.nan
        elif kind != "none":
            problem.grads[k][i] = data.draw(st.sampled_from((math.nan, 1e30, -3e37) if i else (math.nan,)))
    problem.check()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("cells", [1, 4, 8])
def test_averages_of_a_state_that_no_step_wrote(cells, groups, isa):
    """Also where only the last lane of the last tile differs."""
    net = random_network(hidden_size=8, num_layers=2, gac_cells=cells)
    Problem(net, [70, 0, 134], groups, 3, False).check()
    for lane in (0, 1, 63, 69):
        problem = Problem(net, [70, 134], groups, 3, True)
        problem.states[0].data[lane // 64, 16, lane % 64] += 0.5
        problem.check()


def test_a_plain_checkpoint_in_a_network_with_averages():
    """Loaded states count per coordinate, in the fused step as in the functional one."""
    net = random_network(gac_cells=3)
    state, grad = random_state(net, 200), structured_gradient((200,))
    with torch.no_grad():
        update, expected = net(grad, state.clone())
    problem = Problem(net, [200], 1, 2, False)
    problem.states, problem.grads, problem.params = [state], [grad], [torch.zeros(200)]
    params, states, _, _ = problem.run()
    assert_same(params[0], update.double(), 1e-5, "update")
    assert_same(states[0].data[:3], expected.data[:3].double(), 1e-5, "state")


@examples(60)
@given(net=networks(), sizes=sizes, groups=st.sampled_from((1, 2)), seed=seeds, data=st.data())
def test_no_other_coordinate_sees_which_poison_it_was(net, sizes, groups, seed, data):
    """Bit for bit: with the gradients of some coordinates NaN, of any sign and payload, the others go on as if these
    did not exist, whatever their own values are."""
    results = []
    uniform = data.draw(st.booleans())
    numels = [n * groups for n in sizes]
    places = [(k, i) for k, n in enumerate(numels) for i in range(n)]
    chosen = set(data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=5)))
    for bits in (0x7FC00000, -0x3FFFFF, 0x7FFFFFFF):
        problem = Problem(net, numels, groups, seed % 1000, uniform)
        for k, i in chosen:
            problem.grads[k].view(torch.int32)[i] = bits
        params, states, means, sums = problem.run()
        keep = [torch.tensor([(k, i) not in chosen for i in range(n)], dtype=torch.bool) for k, n in enumerate(numels)]
        others = [p[m] for p, m in zip(params, keep, strict=True)]
        others += [part[m] for s, m in zip(states, keep, strict=True) for pair in s.to_logical() for part in pair]
        assert all(x.isfinite().all() for x in others)
        # Of every group and cell, the chosen are not counted.
        members = torch.tensor([[m.view(groups, -1).sum(1).tolist() for m in keep]]).sum(1).view(groups, 1)
        assert torch.equal(sums[1], members.expand(groups, net.gac_cells).double())
        results.append([*others, means])
        assert all(params[k][i].isnan() for k, i in chosen)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def gradients_of(net, grad, state, weight, end, groups):
    """d grad, d state, d phi of one functional step, and what it gave."""
    grad = grad.clone().requires_grad_()
    leaf = state._like(state.data.clone().requires_grad_())
    update, new = net(grad, leaf, groups)
    logical = torch.stack([torch.stack(pair) for pair in new.to_logical()])
    torch.autograd.backward([update, logical], [weight.to(update.dtype), end.to(logical.dtype)])
    phi = torch.cat([p.grad.flatten() for p in net.parameters()])
    start = torch.stack([torch.stack(p) for p in state._like(leaf.data.grad).to_logical()])
    return update, logical, grad.grad, start, phi


@examples(60)
@given(net=networks(), n=st.sampled_from((2, 31, 64, 70, 150)), groups=st.sampled_from((1, 2)), seed=seeds,
       data=st.data())  # fmt: skip
def test_functional_step_and_its_backward(net, n, groups, seed, data):
    n *= groups
    grad, state = structured_gradient((n,), seed=seed % 999), random_state(net, n, seed % 999)
    chosen = data.draw(st.lists(st.integers(0, n - 1), max_size=3, unique=True))
    by_state = data.draw(st.booleans())
    for i in chosen:
        if by_state:  # only some of its activations
            state.data[i // 64, net.hidden_size + data.draw(st.integers(0, net.hidden_size - 1)), i % 64] = math.nan
        else:
            grad[i] = math.nan
    generator = torch.Generator().manual_seed(seed % 999)
    weight = torch.randn(n, generator=generator)
    end = torch.randn((net.num_layers, 2, n, net.hidden_size), generator=generator)
    actual = gradients_of(net, grad, state, weight, end, groups)
    expected = gradients_of(double(net), grad.double(), state.to(torch.float64), weight, end, groups)
    for name, a, e in zip(("update", "state", "d grad", "d state", "d phi"), actual, expected, strict=True):
        if name == "d grad" and net.preprocess == "log_sign":
            # Where the gradient is NaN, its own derivative is a NaN or a constant of the linear branch.
            keep = torch.ones(n, dtype=torch.bool)
            keep[chosen] = False
            a, e = a[keep], e[keep]
        if name == "d phi" and not e.isfinite().all():  # which contains the bad coordinates
            assert not a.isfinite().all()
        else:
            assert_same(a, e, 2e-4, name)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("cells", [2, 8])
@pytest.mark.parametrize("bad_from", [0, 2])
def test_segment_backward(cells, groups, bad_from):
    """Gradients of the start states through the recorded means. A coordinate that is bad from the start is in no mean
    and reaches no other's gradient; one that turns bad was in the means before and does."""
    net = random_network(hidden_size=8, num_layers=2, gac_cells=cells)
    numels, steps = [70 * groups, 20 * groups], 5
    problem = Problem(net, numels, groups, 1, False)
    starts, means_of, records, seen = [s.clone() for s in problem.states], [], [], []
    tiles = [0, -(-numels[0] // 64)]
    total = 64 * (tiles[1] + -(-numels[1] // 64))
    states, params = [s.clone() for s in starts], [p.clone() for p in problem.params]
    for t in range(steps + 1):
        grads = [structured_gradient((n,), seed=50 * t + k) for k, n in enumerate(numels)]
        if t >= bad_from:
            grads[0][66] = math.nan
        seen.append([g.double() for g in grads])
        record = torch.full((total,), math.nan)  # padding of records too
        means = torch.empty(net.num_layers, groups, cells)
        sums = torch.empty(2, groups, cells, dtype=torch.float64)
        if t < steps:
            ops.step_(
                params, grads, [s.data for s in states], problem.phi, net.config, 1.0, 0.0, False, record=record,
                record_tiles=tiles, num_problems=groups, means=means, sums=sums,
            )  # fmt: skip
            means_of.append(means)
        for place, g, n in zip(tiles, grads, numels, strict=True):
            record[64 * place :][:n] = g
            record[64 * place + n :][: -n % 64] = math.nan
        records.append(record)
    ones = [1.0] * steps
    ends = [random_state(net, n, 9 + k) for k, n in enumerate(numels)]
    _, grad_starts = ops.segment_backward(
        [s.data for s in starts], numels, tiles, records, means_of, ones, ones, ones, problem.phi, net.config, groups,
        [s.data for s in ends], True,
    )  # fmt: skip
    _, expected = reference.segment_backward(
        [s.to(torch.float64).to_logical() for s in starts], seen, ones, ones, ones, problem.phi.double(), net.config,
        [s.to(torch.float64).to_logical() for s in ends], groups,
    )  # fmt: skip
    for start, data, wanted in zip(starts, grad_starts, expected, strict=True):
        for pair, pair_wanted in zip(start._like(data).to_logical(), wanted, strict=True):
            for part, part_wanted in zip(pair, pair_wanted, strict=True):
                lost = part_wanted.numel() - int(part_wanted.isfinite().sum())
                assert bad_from > 0 or lost <= net.hidden_size
                assert_same(part, part_wanted, 1e-4, "d start")


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("preprocess", ["log_sign", "identity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_others_go_on_for_ever(poison, preprocess, dtype):
    """A single bad gradient, then good ones: its own coordinate at most is lost."""
    net = random_network(gac_cells=4, preprocess=preprocess, hidden_size=8)
    param = nn.Parameter(torch.zeros(150, dtype=dtype))
    optimizer = l2l.LearnedOptimizer([param], net)
    for t in range(6):
        param.grad = structured_gradient((150,), seed=t).to(dtype)
        if t == 1:
            param.grad[77] = poison
        optimizer.step()
        others = torch.cat([param[:77], param[78:]])
        assert others.isfinite().all() and others.ne(0).all()
    if math.isnan(poison):
        assert param[77].isnan()
