"""What may share memory in a step that writes in place, against sets of addresses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from l2l_fast.kernels import operators as ops
from tests.fuzz.cases import OPS, examples, phi_of
from tests.helpers import random_network

NET = random_network(hidden_size=4, num_layers=1)
GAC = random_network(hidden_size=4, num_layers=1, gac_cells=1, extra_inputs=1, num_outputs=2)


def addresses(tensor: torch.Tensor) -> list[int]:
    """Of every element's bytes, in logical order."""
    offsets = torch.zeros(tensor.shape, dtype=torch.int64)
    for d, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        shape = [1] * tensor.dim()
        shape[d] = size
        offsets = offsets + (torch.arange(size) * stride).view(shape)
    begin, each = tensor.data_ptr(), tensor.element_size()
    return [begin + each * o + byte for o in offsets.flatten().tolist() for byte in range(each)]


def step(params: list[torch.Tensor], grads: list[torch.Tensor], states: list[torch.Tensor] | None = None) -> None:
    states = states or [torch.zeros(-(-p.numel() // 64), 8, 64) for p in params]
    ops.step_(params, grads, states, phi_of(NET), NET.config, 1.0, 0.0, False)


def accepted(params: list[torch.Tensor], grads: list[torch.Tensor]) -> bool:
    try:
        step(params, grads)
    except ValueError as error:
        assert str(error).startswith(("params[", "grads[")), error
        return False
    return True


def truly_disjoint(params: list[torch.Tensor], grads: list[torch.Tensor]) -> bool:
    written = [addresses(p) for p in params]
    if sum(map(len, written)) != len(set().union(*written)):
        return False
    for k, grad in enumerate(grads):
        own = addresses(grad)
        for j, other in enumerate(written):
            if not (j == k and own == other) and not set(own).isdisjoint(other):
                return False
    return True


@st.composite
def views(draw, memory: torch.Tensor, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    if shape is None:
        shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    strides = [draw(st.sampled_from((0, 1, 2, 3, 4, 5, 6, 8, 12, 16, 24))) for _ in shape]
    room = memory.numel() - 1 - sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    assume(room >= 0)
    return memory.as_strided(shape, strides, draw(st.integers(0, min(room, 30))))


@examples(400)
@given(data=st.data())
def test_what_is_accepted_is_disjoint(data):
    memory = torch.zeros(300)
    params = [data.draw(views(memory)) for _ in range(data.draw(st.integers(1, 3)))]
    grads = []
    for param in params:
        kind = data.draw(st.sampled_from(("own", "the parameter", "a view")))
        if kind == "a view":
            grads.append(data.draw(views(memory, tuple(param.shape))))
        else:
            grads.append(torch.ones(param.shape) if kind == "own" else param)
    if accepted(params, grads):
        assert truly_disjoint(params, grads)


@examples(200)
@given(data=st.data())
def test_parts_of_one_tensor_are_accepted(data):
    """Cut along any dimensions into blocks or combs, in any order of dimensions, in any dtype: all of it disjoint."""
    shape = data.draw(st.lists(st.integers(2, 6), min_size=1, max_size=4))
    dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16)))
    parts = [torch.zeros(shape, dtype=dtype)]
    for _ in range(data.draw(st.integers(1, 3))):
        part = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        d = data.draw(st.integers(0, part.dim() - 1))
        size = part.shape[d]
        if data.draw(st.booleans()):
            cut = data.draw(st.integers(0, size))
            parts += [part.narrow(d, 0, cut), part.narrow(d, cut, size - cut)]
        else:
            teeth = data.draw(st.integers(1, 3))
            parts += [part[(slice(None),) * d + (slice(k, None, teeth),)] for k in range(min(teeth, size))]
    parts = [part.permute(data.draw(st.permutations(range(part.dim())))) for part in parts]
    grads = [torch.ones(part.shape) for part in parts]
    assert truly_disjoint(parts, grads)
    step(parts, grads)
    # And all but one of them are written while that one is read.
    step(parts[1:], [parts[0].flatten()[:1].expand(part.shape) if parts[0].numel() else g
                     for part, g in zip(parts[1:], grads[1:])])  # fmt: skip


def test_columns_that_overlap_are_refused():
    base = torch.zeros(5000, 4)
    with pytest.raises(ValueError, match=r"params\[1\].*params\[0\]"):
        step([base[:, 0:2], base[:, 1:3]], [torch.ones(5000, 2)] * 2)
    assert not base.any()
    step([base[:, 0:2], base[:, 2:4]], [torch.ones(5000, 2)] * 2)
    assert base.all()


def test_a_gradient_that_is_a_view_over_its_parameter():
    base = torch.zeros(64, 6)
    param = base[:, 0:3]
    step([param], [param])
    for grad in (base[:, 1:4], base[:, 0:6:2], base.flatten()[: 64 * 3].view(64, 3)):
        with pytest.raises(ValueError, match=r"grads\[0\].*params\[0\]"):
            step([param], [grad])
    step([param], [base[:, 3:6]])


@pytest.mark.parametrize("strides", [(1, 1), (0, 1), (2, 1), (1, 63)])
def test_a_parameter_that_overlaps_itself(strides):
    param = torch.zeros(64 * 4).as_strided((64, 3), strides)
    with pytest.raises(ValueError, match=r"params\[0\]"):
        step([param], [torch.ones(64, 3)])


def test_hundreds_of_tensors_in_one_storage():
    base = torch.zeros(300, 70)
    params = [*base[:150], *base[150:].T]
    step(params, [torch.ones(p.shape) for p in params])
    assert base.all()


# ---- the operator with averages, memory and outputs ----


def all_arguments() -> dict[str, torch.Tensor]:
    return {
        "param": torch.zeros(64),
        "grad": torch.ones(64),
        "state": torch.zeros(1, 8, 64),
        "extra": torch.ones(1, 64),
        "out": torch.zeros(2, 64),
        "phi": phi_of(GAC).clone(),
        "record": torch.zeros(64),
        "means": torch.zeros(1, 1, 1),
        "sums": torch.zeros(2, 1, 1, dtype=torch.float64),
    }


def step_of_all_(a: dict[str, torch.Tensor]) -> None:
    """The operator itself, without the Python layer."""
    OPS.step_(
        [a["param"]], [a["grad"]], [a["state"]], a["phi"], *GAC.config.arguments, 1.0, 0.0, False, a["record"], [0],
        a["extra"], a["out"], 1, a["means"], a["sums"], 0, 2, False,
    )  # fmt: skip


WRITTEN = ("param", "state", "record", "out", "means", "sums")
NAMES = {"param": "params[0]", "grad": "grads[0]", "state": "states[0]", "record": "record_tiles[0]"}


@pytest.mark.parametrize("first", WRITTEN)
@pytest.mark.parametrize("second", list(all_arguments()))
def test_no_two_arguments_of_a_step_share_memory(first, second):
    """One of them written: also by its last byte only."""
    arguments = all_arguments()
    step_of_all_(all_arguments())
    if first == second:
        return
    for distance in (0, 1):
        a, b = arguments[first], arguments[second]
        memory = torch.zeros(a.nbytes + b.nbytes + 16, dtype=torch.uint8)
        place = {0: 0, 1: (a.nbytes - 4) // 8 * 8}[distance]  # views of float64 begin at a multiple of 8 bytes
        changed = dict(arguments)
        for name, tensor, begin in ((first, a, 0), (second, b, place)):
            view = memory[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            changed[name] = view
        kept = {name: tensor.clone() for name, tensor in changed.items()}
        if {first, second} == {"param", "grad"} and distance == 0:
            step_of_all_(changed)
            continue
        with pytest.raises(ValueError) as caught:
            step_of_all_(changed)
        assert all(NAMES.get(name, name) in str(caught.value) for name in (first, second)), caught.value
        assert all(torch.equal(changed[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_may_not_be_negated_or_require_grad(name):
    arguments = all_arguments()
    arguments[name] = torch._neg_view(arguments[name])
    with pytest.raises(ValueError, match="lazy negation"):
        step_of_all_(arguments)
    arguments = all_arguments()
    arguments[name].requires_grad_()
    with pytest.raises(RuntimeError, match=rf"{name}.*no_grad"):
        step_of_all_(arguments)
    with torch.no_grad():
        step_of_all_(arguments)


@pytest.mark.parametrize("name", [*WRITTEN, "extra", "phi", "grad"])
def test_freed_memory_is_refused(name):
    arguments = all_arguments()
    arguments[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=rf"{name}.*storage"):
        step_of_all_(arguments)


def test_every_layout_of_a_matrix_pair():
    """All pairs of columns ranges of one matrix: accepted exactly if they do not meet."""
    base = torch.zeros(8, 5)
    ranges = [(a, b) for a in range(5) for b in range(a + 1, 6)]
    for a, b in ranges:
        for c, d in ranges:
            params = [base[:, a:b], base[:, c:d]]
            assert accepted(params, [torch.ones(p.shape) for p in params]) == (b <= c or d <= a)


def test_a_stride_far_beyond_the_size():
    base = torch.zeros(1 << 20)
    params = [base[k :: 1 << 10] for k in range(20)]
    step(params, [torch.ones(p.shape) for p in params])
    assert int(base.count_nonzero()) == 20 * (1 << 10)
    assert math.isfinite(float(base.sum()))
