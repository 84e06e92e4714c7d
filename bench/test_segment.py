"""The segment backward, and what recording adds to a step."""

import pytest
import torch

from l2l_fast import CoordinatewiseLSTM
from l2l_fast.kernels import operators as ops
from l2l_fast.kernels.state import TILE, num_tiles

from .test_step import KINDS, common_of

NETWORKS = [(20, 2), (4, 1), (8, 2), (16, 2), (32, 2), (64, 2), (20, 1), (20, 4)]


def segment_backward(net, n, steps, injected=False, need_grad_start=False):
    records = list(torch.randn(steps + 1, num_tiles(n) * TILE))
    state, phi, ones = net.init_state(n).data, net.phi().detach(), [1.0] * steps
    end, common = [torch.randn_like(state)] if injected else [], common_of(net, steps)

    def run():
        arguments = ([state], [n], [0], records, [], ones, ones, ones, phi, net.config, 1, end, need_grad_start)
        ops.segment_backward(*arguments, **common)

    return run


@pytest.mark.benchmark(group="segment backward: instruction sets")
def test_instruction_set(measure, n, isa):
    measure(segment_backward(CoordinatewiseLSTM(), n, 20), n * 20)


@pytest.mark.benchmark(group="segment backward: networks")
@pytest.mark.parametrize("hidden, layers", NETWORKS)
def test_network(measure, n, hidden, layers):
    measure(segment_backward(CoordinatewiseLSTM(hidden, layers), n // 4, 20), n // 4 * 20)


@pytest.mark.benchmark(group="segment backward: preprocessing")
@pytest.mark.parametrize("options", KINDS, ids=[kind["preprocess"] for kind in KINDS])
def test_preprocess(measure, n, options):
    measure(segment_backward(CoordinatewiseLSTM(**options), n // 4, 20), n // 4 * 20)


@pytest.mark.benchmark(group="segment backward: lengths, same coordinates times steps")
@pytest.mark.parametrize("steps", [1, 5, 20, 100])
def test_length(measure, n, steps):
    size = max(n * 20 // steps // 4, TILE)
    measure(segment_backward(CoordinatewiseLSTM(), size, steps), size * steps)


@pytest.mark.benchmark(group="segment backward: gradients at both ends")
@pytest.mark.parametrize("ends", [False, True])
def test_ends(measure, n, ends):
    measure(segment_backward(CoordinatewiseLSTM(), n, 20, injected=ends, need_grad_start=ends), n * 20)


@pytest.mark.benchmark(group="in-place step: recording its gradient")
@pytest.mark.parametrize("recorded", [False, True])
def test_recording(measure, n, recorded):
    net, param, grad = CoordinatewiseLSTM(), torch.zeros(n), torch.randn(n)
    state, phi = net.init_state(n).data, net.phi().detach()

    def step():
        record = torch.empty(num_tiles(n) * TILE) if recorded else None
        tiles = [0] if recorded else []
        ops.step_([param], [grad], [state], phi, net.config, 1.0, 0.0, False, record=record, record_tiles=tiles)

    measure(step, n)
