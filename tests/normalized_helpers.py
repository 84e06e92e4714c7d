"""What the tests of networks with normalized inputs share: networks, inputs, and the reference's results."""

from __future__ import annotations

import torch
from torch import Tensor

import l2l_fast as l2l
from l2l_fast.kernels import operators as ops
from l2l_fast.kernels import reference
from l2l_fast.kernels.state import Averages
from tests.helpers import phi_of, random_network, random_state

NORMALIZED = [
    {"hidden_size": 20, "num_layers": 2, "tensor_inputs": 7, "output_scale": 0.1},
    {"hidden_size": 20, "num_layers": 2, "output_scale": 0.1},
    {"hidden_size": 8, "num_layers": 1, "tensor_inputs": 1, "output_scale": -0.5},
    {"hidden_size": 13, "num_layers": 3, "tensor_inputs": 16, "betas": (0.5, 0.9, 0.75, 0.99)},
    {"hidden_size": 64, "num_layers": 2, "tensor_inputs": 3, "betas": (0.9, 0.5, 0.5, 0.9999)},
]
IDS = [f"H{c['hidden_size']}xL{c['num_layers']}-K{c.get('tensor_inputs', 0)}" for c in NORMALIZED]


def normalized_network(seed: int = 0, **options) -> l2l.CoordinatewiseLSTM:
    return random_network(seed, **{"hidden_size": 8, "preprocess": "normalized", "tensor_inputs": 3, **options})


def common_of(net: l2l.CoordinatewiseLSTM, *shape: int, seed: int = 5) -> dict[str, Tensor | None]:
    """tensor_inputs and nominal of ``shape`` (tensors, or steps and tensors) for the operators."""
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(*shape, net.tensor_inputs, generator=random) if net.tensor_inputs else None
    nominal = torch.rand(*shape, 5, generator=random) * torch.tensor([0.5, 1.0, 0.5, 1.0, 1.0])
    return {"tensor_inputs": inputs, "nominal": nominal}


def drifting_gradients(steps: int, numel: int, decades: float = 6.0, seed: int = 3) -> Tensor:
    """Badly scaled gradients ``[steps, numel]`` in float64 whose scale also drifts in time, some of them zero."""
    random = torch.Generator().manual_seed(seed)
    scale = 10 ** (torch.rand(numel, generator=random, dtype=torch.float64) * 2 * decades - decades)
    drift = 10 ** torch.linspace(0.5, -0.5, steps, dtype=torch.float64).unsqueeze(1)
    g = (torch.randn(steps, numel, generator=random, dtype=torch.float64) + 0.3) * scale * drift
    g[torch.rand(steps, numel, generator=random) < 0.05] = 0.0
    return g


def warm_states(net: l2l.CoordinatewiseLSTM, grads: Tensor, seed: int = 1) -> l2l.State:
    """A float32 state of random h and c whose averages are those of ``grads`` ``[steps, numel]``, in float64
    arithmetic."""
    *pairs, _ = random_state(net, grads.shape[1], seed).to_logical()
    averages = Averages(torch.zeros(grads.shape[1], 4, dtype=torch.float64), 0)
    for g in grads:
        averages = reference.normalized.advance(g, averages, net.betas)
    return l2l.State.from_logical([*pairs, Averages(averages.rows.float(), averages.age)])


def exact_step(net, grad: Tensor, state: l2l.State, inputs: Tensor | None, nominal: Tensor | None, phi=None):
    """The reference in float64; new state as :class:`l2l_fast.State`."""
    phi = phi_of(net).double() if phi is None else phi
    logical = state.to(torch.float64).to_logical()
    out, new = reference.lstm_step(grad.double(), logical, phi, net.config, 1, None, inputs, nominal)
    return out, l2l.State.from_logical(new)


def run_step(net, params, grads, states, common, ages, **options) -> None:
    arguments = {"lr": 1.0, "weight_decay": 0.0, "maximize": False, **options}
    ops.step_(params, grads, states, phi_of(net), net.config, **arguments, ages=ages, **common)
