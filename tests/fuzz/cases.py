"""What the fuzz tests draw: networks, tensors of any shape, strides, dtype and magnitude, and how much of it."""

from __future__ import annotations

import math
import os

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

import l2l_fast as l2l
from l2l_fast.kernels import operators as ops
from tests.helpers import phi_of as phi_of
from tests.helpers import random_network, random_state, structured_gradient

FULL = os.environ.get("L2L_FAST_FULL") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = torch.ops.l2l_fast


def examples(count: int) -> settings:
    """``count`` examples, always the same ones; with L2L_FAST_FULL=1 twenty times as many, and new ones every time."""
    return settings(max_examples=20 * count if FULL else count, derandomize=not FULL)


# ---- networks ----

seeds = st.integers(0, 2**31 - 1)
hidden_sizes = st.one_of(st.integers(4, 24), st.sampled_from([4, 20, 25, 31, 32, 33, 47, 63, 64]))


@st.composite
def networks(draw, preprocess=("log_sign", "identity")) -> l2l.CoordinatewiseLSTM:
    """Any configuration the package accepts, with weights large enough that every gate matters."""
    hidden = draw(hidden_sizes)
    return random_network(
        seed=draw(seeds),
        gain=draw(st.sampled_from([0.5, 1.5])),
        hidden_size=hidden,
        num_layers=draw(st.integers(1, 4 if hidden < 40 else 2)),
        preprocess=draw(st.sampled_from(preprocess)),
        p=draw(st.floats(2.0, 70.0)),
        output_scale=draw(st.sampled_from([0.1, 1.0, -0.5, 1e-3, 30.0])),
    )


# ---- the functional step of a plain network, whose one output has the gradient's shape ----


def plain_step(grad: Tensor, state: Tensor, phi: Tensor, config: l2l.Config) -> tuple[Tensor, Tensor]:
    """The update and the new state."""
    out, new_state = ops.step(grad, None, state, phi, config)
    return out[0], new_state


def plain_step_backward(
    grad_update: Tensor, grad_new_state: Tensor, grad: Tensor, state: Tensor, phi: Tensor, config: l2l.Config
) -> list[Tensor]:
    """d grad, d state, d phi."""
    result = ops.step_backward(grad_update.unsqueeze(0), grad_new_state, grad, None, state, phi, config)
    assert result[1].shape == (0, *grad.shape)
    return [result[0], *result[2:]]


# ---- tensors ----

around_tiles = st.sampled_from([63, 64, 65, 127, 128, 129, 200])
shapes = st.one_of(
    st.tuples(st.integers(0, 150)),
    st.tuples(around_tiles),
    st.lists(st.integers(0, 6), min_size=0, max_size=5).filter(lambda sizes: math.prod(sizes) <= 400).map(tuple),
    st.tuples(st.integers(1, 3), around_tiles),
)
LAYOUTS = ("contiguous", "permuted", "sliced", "permuted and sliced", "unaligned", "channels_last")
READ_ONLY_LAYOUTS = (*LAYOUTS, "expanded", "negated", "overlapping")


def with_layout(values: Tensor, layout: str, seed: int) -> Tensor:
    """The same values (some of them repeated, for "expanded" and "overlapping") with other strides.

    Memory between the elements of a sliced tensor holds NaN, which nothing may read, and ``gaps`` finds again.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = values.dim()
    if layout == "channels_last" and rank in (4, 5):
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return values.contiguous(memory_format=formats[rank])
    if layout == "expanded" and rank > 0:
        for d in range(rank):
            if values.shape[d] > 1 and torch.rand((), generator=generator) < 0.5:
                values = values.narrow(d, 0, 1).expand_as(values)
        return values
    if layout == "overlapping" and values.dim() == 1 and values.numel() > 2:
        rows = values.numel() // 3
        return values.as_strided((rows, 3), (1, 1))
    if layout == "negated":
        return torch._neg_view(-values)
    if layout in ("sliced", "permuted and sliced"):
        steps = torch.randint(1, 4, (rank,), generator=generator).tolist()
        starts = torch.randint(0, 3, (rank,), generator=generator).tolist()
        order = torch.randperm(rank, generator=generator).tolist() if layout != "sliced" else list(range(rank))
        sizes = [start + step * size + 1 for start, step, size in zip(starts, steps, values.shape)]
        memory = torch.full([sizes[d] for d in order], math.nan, dtype=values.dtype)
        view = memory.permute([order.index(d) for d in range(rank)])
        for d in range(rank):
            view = view.narrow(d, starts[d], steps[d] * values.shape[d])
            view = view[(slice(None),) * d + (slice(None, None, steps[d]),)]
        return view.copy_(values)
    if layout == "permuted" and rank > 1:
        order = torch.randperm(rank, generator=generator).tolist()
        return values.permute(order).contiguous().permute([order.index(d) for d in range(rank)])
    if layout == "unaligned":
        memory = torch.full((values.numel() + 1,), math.nan, dtype=values.dtype)
        return memory[1:].view(values.shape).copy_(values)
    return values.clone()


def memory_of(tensor: Tensor) -> Tensor:
    """Every element of the storage of a tensor, its own and those between, as a flat vector."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers, so that comparisons see NaN payloads and the sign of zero."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def identical(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def gradient_values(net: l2l.CoordinatewiseLSTM, shape: tuple[int, ...], seed: int, style: str) -> Tensor:
    """float32 gradients. "structured": the magnitudes of real ones; "extreme": denormals to the largest float."""
    if style == "structured":
        values = structured_gradient(shape, seed=seed)
        return values.clamp(-3, 3) if net.preprocess == "identity" else values
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.rand(shape, generator=generator) * 83.5 - 45.0
    values = torch.pow(10.0, exponent.double()).float() * (torch.randint(0, 2, shape, generator=generator) * 2.0 - 1)
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-38, 3.4e38, -3.4e38, math.exp(-net.p), 1.0])
    chosen = special[torch.randint(0, len(special), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.1, chosen, values)


def logical(data: Tensor, numel: int, net: l2l.CoordinatewiseLSTM) -> Tensor:
    """A blocked state as [numel, 2 * layers * hidden], without its padding."""
    return data.transpose(1, 2).reshape(-1, data.shape[1])[:numel]


def blocked_state(net: l2l.CoordinatewiseLSTM, numel: int, seed: int, padding: float = 0.0) -> Tensor:
    """The data of a random state whose padding lanes hold ``padding``."""
    data = random_state(net, numel, seed=seed).data
    if numel % 64:
        data[-1, :, numel % 64 :] = padding
    return data


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, floor: float, what: str) -> None:
    """||actual - expected|| <= tolerance * max(||expected||, floor * sqrt(numel)), in float64; a NaN fails.

    The floor is the size that an element has when nothing cancels: a norm of few numbers may be small by chance.
    """
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    error = float((actual - expected).norm())
    scale = max(float(expected.norm()), floor * math.sqrt(expected.numel()))
    assert error <= tolerance * scale, f"{what}: error {error:.3e} > {tolerance:.0e} * {scale:.3e}"
