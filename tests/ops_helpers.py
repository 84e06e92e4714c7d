"""What the tests of the operators share: inputs for every kind of network, and the reference's results."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import l2l_fast as l2l
from l2l_fast.kernels import operators as ops
from l2l_fast.kernels import reference
from l2l_fast.kernels.state import num_tiles
from tests.gac_helpers import GAC_CONFIGS, GAC_IDS, shared_state
from tests.helpers import (
    CONFIG_IDS,
    CONFIGS,
    phi_of,
    random_state,
    structured_gradient,
)

TOLERANCE = 2e-5
LOW_PRECISION = {torch.float32: TOLERANCE, torch.bfloat16: 4e-3, torch.float16: 6e-4}
ALL_CONFIGS, ALL_IDS = CONFIGS + GAC_CONFIGS, CONFIG_IDS + GAC_IDS


def reference_vjp(net, grad, extra, state, grad_out, grad_new_state, problems=1):
    """out, new state and the gradients of <grad_out, out> + <grad_new_state, new state> with respect to gradient,
    extra, state and phi, in float64."""
    phi = phi_of(net).double().requires_grad_()
    grad = grad.detach().double().requires_grad_()
    extra = None if extra is None else extra.double().requires_grad_()
    data = state.data.double().requires_grad_()
    logical = l2l.State(data, grad.numel(), net.hidden_size, net.num_layers).to_logical()
    out, new = reference.lstm_step(grad, logical, phi, net.config, problems, extra)
    out, new_data = out.reshape(net.num_outputs, *grad.shape), l2l.State.from_logical(new).data
    wanted = [grad, data, phi] if extra is None else [grad, extra, data, phi]
    grads = list(torch.autograd.grad([out, new_data], wanted, [grad_out.double(), grad_new_state.double()]))
    if extra is None:
        grads.insert(1, torch.zeros(0, *grad.shape))
    return out, new_data, *grads


def valid_lanes(data: Tensor, numel: int) -> Tensor:
    """The coordinates of a blocked state without its padding."""
    return data.transpose(1, 2).reshape(-1, data.shape[1])[:numel]


def states_of(net, numels: list[int], problems: int = 1, seed: int = 1) -> list[l2l.State]:
    """Random states of several tensors, as a step leaves them: all averages of a problem are equal."""
    joint = shared_state(net, sum(numels), problems, seed).to_logical()
    return [l2l.State.from_logical(pairs) for pairs in reference.separate_states(joint, numels, problems)]


def averages_of(net, problems: int = 1) -> dict[str, Tensor]:
    """What step_ writes beside the rest, filled with what it must not read."""
    means = torch.full((net.num_layers, problems, net.gac_cells), math.nan)
    return {"means": means, "sums": torch.full((2, problems, net.gac_cells), math.nan, dtype=torch.float64)}


def step_inputs(net: l2l.CoordinatewiseLSTM):
    """Parameters, gradients and states of many shapes, strides and dtypes, a zero-size and a 0-dim one among them."""
    shapes = [(3, 50), (), (0, 4), (64,), (2, 3, 4, 5), (65,), (1,), (129, 2)]
    params = [torch.randn(shape) for shape in shapes]
    grads = [structured_gradient(shape, seed=k) for k, shape in enumerate(shapes)]
    params[0] = torch.randn(50, 3).t()
    grads[4] = grads[4].contiguous(memory_format=torch.channels_last)
    params[3], grads[5] = params[3].bfloat16(), grads[5].half()
    params[7] = params[7].half()
    grads[7] = grads[7].bfloat16()
    return params, grads, states_of(net, [p.numel() for p in params], seed=20)


def in_phases(net, arguments, places, problems=1, **tensors) -> list[Tensor]:
    """All that step_ writes when it is called once for every two neighbours of ``places``."""
    params, grads, states = ([x.clone() for x in xs] for xs in arguments)
    tensors = {name: tensor if name == "extra" else tensor.clone() for name, tensor in tensors.items()}
    for phases in zip(places[:-1], places[1:], strict=True):
        ops.step_(
            params, grads, states, phi_of(net), net.config, 0.7, 0.1, True, num_problems=problems, phases=phases,
            record_tiles=[4, 1, 0], **tensors,
        )  # fmt: skip
        if net.gac_cells and phases[1] <= net.num_layers:
            tensors["means"][phases[1] - 1] = tensors["sums"][0] / tensors["sums"][1].clamp_min(1)
    return [*params, *states, *(tensors[name] for name in ("record", "out"))]


def segment_inputs(net: l2l.CoordinatewiseLSTM, steps: int, sizes: list[int]):
    generator = torch.Generator().manual_seed(11)
    tiles = [num_tiles(n) for n in sizes]
    places = [1 + sum(tiles[k + 1 :]) for k in range(len(sizes))]
    records = []
    for t in range(steps + 1):
        record = torch.full((64 * (sum(tiles) + 2),), math.nan)  # what belongs to no tensor must not be read
        for k, n in enumerate(sizes):
            record[64 * places[k] : 64 * (places[k] + tiles[k])] = 0
            record[64 * places[k] :][:n] = structured_gradient((n,), seed=100 * t + k)
        records.append(record)
    grads = [[record[64 * places[k] :][:n].double() for k, n in enumerate(sizes)] for record in records]
    weights = (torch.rand(steps, generator=generator) * 2).tolist()
    lrs = (torch.rand(steps, generator=generator) + 0.5).tolist()
    decays = (1 - 0.1 * torch.rand(steps, generator=generator)).tolist()
    starts = states_of(net, sizes)
    ends = [random_state(net, n, seed=50 + k) for k, n in enumerate(sizes)]
    return places, records, grads, weights, lrs, decays, starts, ends


def means_of(net, sizes, grads, starts) -> list[Tensor]:
    """What the steps of such a segment write: the averages of every layer."""
    params, states, means = [torch.zeros(n) for n in sizes], [s.data.clone() for s in starts], []
    for row in grads[:-1]:
        averages = averages_of(net)
        row = [g.float() for g in row]
        ops.step_(params, row, states, phi_of(net), net.config, 1.0, 0.0, False, **averages)
        means.append(averages["means"])
    return means


SEGMENT_CONFIGS = [c for c in ALL_CONFIGS if c.get("extra_inputs", 0) == 0 and c.get("num_outputs", 1) == 1]
SEGMENT_IDS = [i for i, c in zip(ALL_IDS, ALL_CONFIGS, strict=True) if c in SEGMENT_CONFIGS]
