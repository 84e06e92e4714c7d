"""Any wrong argument of any operator: an error that names it, nothing written, and never a crash."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import l2l_fast as l2l
from l2l_fast.kernels import operators as ops
from tests.fuzz import calls
from tests.fuzz.cases import examples, identical, phi_of
from tests.helpers import random_network

# What PyTorch itself turns away before the operator is reached: layouts and devices without a kernel, Python objects
# of another type, tensors that may not be written.
BY_PYTORCH = (
    "Could not run 'l2l_fast::",
    "Expected a value of type",
    "no tensor arguments",
    "inference tensor",
    "ZeroTensors are immutable",
    "Overflow when unpacking",
    "cannot be converted",
    "can't allocate memory",
    "requires grad: call the operator under torch.no_grad()",
)
REFUSALS = (ValueError, TypeError, NotImplementedError, RuntimeError, OverflowError)


def check_refusal(error: BaseException, kept: list, names: tuple[str, ...]) -> None:
    assert all(identical(now, before) for now, before in kept), f"something was written before {error!r}"
    if not any(part in str(error) for part in BY_PYTORCH):
        assert isinstance(error, (ValueError, TypeError)), repr(error)
        assert str(error).startswith(names), f"{error} should name {' or '.join(names)}"


def refuses(operator: str, arguments: dict[str, Any], *names: str) -> None:
    """The call fails, the message begins with one of the names, and nothing has been written."""
    kept = calls.snapshot(arguments)
    with pytest.raises(REFUSALS) as caught:
        calls.call(operator, arguments)
    check_refusal(caught.value, kept, names)


def is_tensors(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, torch.Tensor)


def tensor_cases():
    for operator in calls.OPERATORS:
        for name, value in calls.valid_call(operator).items():
            if is_tensors(value):
                for kind in calls.TENSORS:
                    yield operator, name, kind


_WIDE = ("sums", "alignments", "weight_nominal")  # may be of float64
_OF_DIMENSIONS = (
    "mkldnn", "one dimension fewer", "one element fewer", "one element more", "twice along the first dimension",
    "zero-size", "expanded",
)  # fmt: skip


def may_pass(operator: str, name: str, kind: str) -> bool:
    """Whether a tensor of this kind can mean something valid in this place."""
    shapes = ("dimension", "element", "0-dim", "zero-size")
    operator = operator.removesuffix(" (normalized)")
    if operator == "_vector_math" and (kind == "meta" or any(part in kind for part in shapes)):
        return True
    if name == "updates" and kind in ("meta", "one element more", "twice along the first dimension", "zero-size"):
        return True
    if name == "weight_nominal" and kind == "one dimension fewer":  # those of all optimizees
        return True
    if name == "alignments" and kind == "0-dim":  # as they are
        return True
    if kind == "one element more":  # 71 coordinates fit the tiles of 70; a record may be too large
        return (operator, name) == ("step", "grad") or name == "record"
    if kind == "twice along the first dimension":
        return name == "record"
    if kind == "one element fewer":  # 69 coordinates
        return (operator, name) == ("step", "grad")
    if kind == "one more dimension":
        return (operator, name) == ("step", "grad")
    return calls.TENSORS[kind][1]


@pytest.mark.parametrize(("operator", "name", "kind"), list(tensor_cases()))
def test_a_strange_tensor(operator, name, kind):
    """Refused, or computed as if it were the plain dense tensor of the same numbers."""

    def with_strange(make):
        arguments = calls.valid_call(operator)
        value = arguments[name]
        arguments[name] = [value[0], make(value[1]), *value[2:]] if isinstance(value, list) else make(value)
        return arguments

    def plain(tensor):
        strange = make(tensor).detach().resolve_neg()
        return strange.clone(memory_format=torch.contiguous_format)

    make = calls.TENSORS[kind][0]
    if kind == "None" and name in ("nominal", "weight_nominal"):
        pytest.skip("means the default")
    if name == "alignments" and kind in _OF_DIMENSIONS:
        pytest.skip("there are none of a scalar")
    if operator == "_vector_math" and "2^" in kind:
        pytest.skip("asks for a copy of that size")
    arguments = with_strange(make)
    kept = calls.snapshot(arguments)
    try:
        actual = calls.call(operator, arguments)
    except REFUSALS as error:
        # The shapes and devices of the tensors must fit: another one that no longer does may be named.
        wide = name in _WIDE and kind == "float64"
        about_itself = (kind in calls.DTYPES and not wide) or kind in ("freed", "shrunk", "negated")
        check_refusal(error, kept, (name,) if about_itself else tuple(arguments))
        return
    assert may_pass(operator, name, kind) or (name in _WIDE and kind == "float64"), "accepted"
    expected = calls.call(operator, with_strange(plain))
    assert kind == "meta" or all(identical(a.detach().resolve_neg(), b) for a, b in zip(actual, expected, strict=True))


def value_cases():
    for operator in calls.OPERATORS:
        for name, value in calls.valid_call(operator).items():
            if isinstance(value, bool):
                zoo = calls.BOOLEANS
            elif isinstance(value, int):
                zoo = calls.INTEGERS
            elif isinstance(value, float):
                zoo = calls.FLOATS
            elif isinstance(value, str):
                zoo = calls.STRINGS
            else:
                continue
            for strange in zoo:
                yield pytest.param(operator, name, strange, id=f"{operator}-{name}-{strange!s:.12}")


@pytest.mark.parametrize(("operator", "name", "strange"), list(value_cases()))
def test_a_strange_number_or_string(operator, name, strange):
    """Sizes that no network has are refused; so are sizes that do not fit phi. Any lr computes, NaN in, NaN out."""
    arguments = calls.valid_call(operator)
    usual, functional = arguments[name], calls.name_of(operator) in ("step", "step_backward")
    arguments[name] = strange
    alone = operator in calls.NORMALIZED  # no cells, and one problem
    accepted = {
        "p": isinstance(strange, float) and 0 < strange <= 70 and strange > 1e-38,
        "output_scale": isinstance(strange, float) and abs(strange) < 1e38,
        "lr": isinstance(strange, float),
        "weight_decay": isinstance(strange, float),
        "preprocess": strange == usual,
        "hidden_size": strange == usual,
        "num_layers": strange == usual,
        "maximize": not isinstance(strange, str),  # PyTorch makes a bool of numbers and of None
        "need_grad_start": not isinstance(strange, str),
        "function": False,
        # No weight depends on how many cells are averaged.
        "gac_cells": strange in ((0, 1, 2, 3, 4) if functional and not alone else (usual,)),
        "extra_inputs": strange == usual,
        "num_outputs": strange == usual,
        "num_problems": strange
        in ((1, 2) if (functional or operator == "segment_backward") and not alone else (usual,)),
        "first_phase": strange in ((usual,) if alone else (0, 1, 2, 3)),
        "last_phase": strange in ((usual,) if alone else (0, 1, 2, 3)),
        "check_only": not isinstance(strange, str),
        "total_steps": strange is None or (isinstance(strange, int) and 1 <= strange < 2**63),
        "optimizees": strange == usual,
        "precision": strange == usual,
        "steps": isinstance(strange, int) and 0 <= strange <= 100,
    }[name]
    if accepted:
        actual = calls.call(operator, arguments)
        again = calls.valid_call(operator)
        again[name] = strange
        assert all(identical(a, b) for a, b in zip(actual, calls.call(operator, again), strict=True))
    else:
        # Another size of network is valid; what does not fit then is phi, the averages or the coordinates.
        others = {
            "gac_cells": ("means",),
            "num_problems": ("means", "params", "numels", "grad"),
            "last_phase": ("first_",),
            "preprocess": ("constants",),
            "optimizees": ("weight_nominal",),
        }
        states = ("states",) if operator == "_tensor_sums" else ()
        refuses(operator, arguments, name, "phi", *states, *others.get(name, ()))


list_cases = [
    (operator, name)
    for operator in calls.OPERATORS
    for name, value in calls.valid_call(operator).items()
    if isinstance(value, list) and value
]


@pytest.mark.parametrize(("operator", "name"), list_cases)
@pytest.mark.parametrize("change", ["shorter", "longer", "empty", "nested", "none"])
def test_lists_of_different_lengths(operator, name, change):
    arguments = calls.valid_call(operator)
    usual = arguments[name]
    arguments[name] = {
        "shorter": usual[:-1],
        "longer": [*usual, usual[-1]],
        "empty": [],
        "nested": [usual],
        "none": [None for _ in usual],
    }[change]
    if (name, change) == ("grad_end_states", "empty"):
        calls.call(operator, arguments)
        return
    related = {
        "params": ("grads",),
        "start_states": ("numels", "record_tiles"),
        "records": ("loss_weights", "lrs", "means"),
        "ages": ("sums",),
    }
    refuses(operator, arguments, name, *related.get(name, ()))


@pytest.mark.parametrize("number", [0, 4, 7])
@pytest.mark.parametrize("operator", [*calls.PLAIN, *calls.COMMUNICATING])
def test_a_configuration_of_another_length(operator, number, monkeypatch):
    arguments = calls.valid_call(operator)
    names = (*calls.SIZES, "num_outputs", "num_outputs")[:number]
    monkeypatch.setattr(calls, "SIZES", names)
    refuses(operator, arguments, "sizes: expected hidden_size, num_layers, gac_cells, extra_inputs, num_outputs and")
    monkeypatch.undo()
    monkeypatch.setattr(calls, "CONSTANTS", (*calls.CONSTANTS, "p")[: number // 2])
    if number != 4:
        refuses(operator, arguments, "constants: expected p and output_scale, got")


@pytest.mark.parametrize("operator", [name for name in calls.OPERATORS if "step_ " in f"{name} " or "segment" in name])
@pytest.mark.parametrize("offset", calls.OFFSETS)
@pytest.mark.parametrize("which", [0, 1])
def test_offsets_out_of_range(operator, offset, which):
    """Also those whose byte offset wraps around 64 bits."""
    arguments = calls.valid_call(operator)
    arguments["record_tiles"][which] = offset
    fits = {("step_", 0): (2,), ("step_", 1): (1,), ("segment_backward", 1): (1,)}
    if offset in fits.get((calls.name_of(operator), which), ()):
        calls.call(operator, arguments)
    else:
        refuses(operator, arguments, "record_tiles")


# ---- memory that is shared ----


def shared_memory() -> dict[str, tuple[str, Any]]:
    def same_param(a):
        a["params"][1] = a["params"][0] = torch.ones(70)
        a["grads"][0] = a["grads"][1].clone()
        a["states"][0] = a["states"][1].clone()
        a["record_tiles"] = [2, 0]

    def same_state(a):
        same_param(a)
        a["params"][0] = torch.ones(70)
        a["states"][0] = a["states"][1]

    def overlapping_states(a):
        memory = torch.zeros(3, *a["states"][1].shape[1:])
        same_param(a)
        a["params"][0] = torch.ones(70)
        a["states"] = [memory[:2], memory[1:]]

    def same_tiles_of_the_record(a):
        a["record_tiles"] = [1, 0]

    def shifted_params(a):
        memory = torch.ones(140)
        same_param(a)
        a["params"] = [memory[:70], memory[69:139]]

    def gradient_is_another_parameter(a):
        same_param(a)
        a["params"][0] = torch.ones(70)
        a["grads"][1] = a["params"][0]

    def gradient_shifted_in_its_parameter(a):
        memory = torch.ones(71)
        a["params"][1], a["grads"][1] = memory[1:], memory[:-1]

    def gradient_is_the_transposed_parameter(a):
        square = torch.ones(8, 8)
        a["params"][1], a["grads"][1], a["states"][1] = square, square.t(), a["states"][1][:1].clone()

    def parameter_in_the_record(a):
        a["params"][1] = a["record"][5:75]

    def state_in_the_record(a):
        a["record"] = a["states"][1].view(-1)

    def gradient_in_a_state(a):
        a["grads"][1] = a["states"][0].view(-1)[:70]

    def expanded_parameter(a):
        a["params"][1] = torch.ones(1).expand(70)

    cases = {
        "params": [same_param, shifted_params, parameter_in_the_record, expanded_parameter],
        "states": [same_state, overlapping_states, state_in_the_record],
        "record_tiles": [same_tiles_of_the_record],
        "grads": [
            gradient_is_another_parameter,
            gradient_shifted_in_its_parameter,
            gradient_is_the_transposed_parameter,
            gradient_in_a_state,
        ],
    }
    return {change.__name__: (name, change) for name, changes in cases.items() for change in changes}


@pytest.mark.parametrize("case", list(shared_memory()))
def test_shared_memory_is_refused(case):
    """Tensors that are written may not share memory: the result would depend on the threads."""
    name, change = shared_memory()[case]
    arguments = calls.valid_call("step_")
    change(arguments)
    refuses("step_", arguments, name, "params", "states", "record_tiles")


def test_harmless_neighbours_are_accepted():
    """Interleaved columns, adjacent slices, a gradient in its parameter's own memory."""
    net = random_network(hidden_size=5, num_layers=2)
    phi, config = phi_of(net).clone(), net.config
    matrix, flat = torch.ones(70, 2), torch.ones(128)
    params = [matrix[:, 0], matrix[:, 1], flat[:64], flat[64:]]
    own = torch.randn(70)
    grads = [torch.randn(p.shape) for p in params] + [own]
    params.append(own)
    plain = [p.clone() for p in params]
    states = [torch.zeros(-(-p.numel() // 64), 20, 64) for p in params]
    expected_states = [s.clone() for s in states]
    copies = [g.clone() for g in grads]
    ops.step_(plain, copies, expected_states, phi.clone(), config, 1.0, 0.1, False)
    ops.step_(params, grads, states, phi, config, 1.0, 0.1, False)
    pairs = zip([*params, *states], [*plain, *expected_states], strict=True)
    assert all(identical(a.contiguous(), b) for a, b in pairs)


def test_lazy_clones_get_their_own_memory():
    arguments = calls.valid_call("step_")
    origin = torch.ones(70)
    arguments["params"] = [torch._lazy_clone(origin), torch._lazy_clone(origin)]
    arguments["grads"] = [torch.ones(70), torch._lazy_clone(origin)]
    arguments["states"] = [arguments["states"][1].clone(), torch._lazy_clone(arguments["states"][1])]
    arguments["record_tiles"] = [0, 2]
    calls.call("step_", arguments)
    assert origin.eq(1).all() and identical(arguments["params"][0], arguments["params"][1])
    assert arguments["params"][0].ne(1).all()


# ---- everything at once ----


@examples(250)
@given(data=st.data())
def test_several_strange_arguments(data):
    """No combination crashes or writes before an error."""
    operator = data.draw(st.sampled_from(calls.OPERATORS))
    arguments = calls.valid_call(operator)
    for name in data.draw(st.lists(st.sampled_from(list(arguments)), min_size=1, max_size=3, unique=True)):
        value = arguments[name]
        first, unprintable = value[0] if isinstance(value, list) and value else value, False
        if isinstance(first, torch.Tensor):
            kind = data.draw(st.sampled_from(list(calls.TENSORS)))
            strange, unprintable = calls.TENSORS[kind][0](first), kind in ("freed", "shrunk")
        elif isinstance(first, str):
            strange = data.draw(st.sampled_from(calls.STRINGS))
        else:
            strange = data.draw(st.sampled_from((*calls.INTEGERS, *calls.FLOATS, *calls.OFFSETS, *calls.BOOLEANS)))
        # PyTorch itself crashes when it complains of such a tensor in the place of a list, and prints it.
        if isinstance(value, list) and (data.draw(st.booleans()) or unprintable):
            count = data.draw(st.integers(0, 3))
            strange = [strange if data.draw(st.booleans()) else first for _ in range(count)]
        arguments[name] = strange
    kept = calls.snapshot(arguments)
    try:
        calls.call(operator, arguments)
    except REFUSALS:
        assert all(identical(now, before) for now, before in kept), "something was written"


def test_the_worst_in_a_process_of_its_own():
    """What would kill the process if it were not refused: a crash shows as the exit status."""
    script = """
        import faulthandler; faulthandler.enable()
        from tests.fuzz import calls
        refused = 0
        def expect_refusal(operator, arguments):
            global refused
            try:
                calls.call(operator, arguments)
            except (ValueError, TypeError, RuntimeError, NotImplementedError, MemoryError):
                refused += 1
            else:
                raise SystemExit(f"{operator} accepted {arguments}")
        for operator in calls.OPERATORS:
            for name, value in calls.valid_call(operator).items():
                for kind in ("freed", "shrunk", "2^40 elements", "2^62 elements", "meta"):
                    arguments = calls.valid_call(operator)
                    make = calls.TENSORS[kind][0]
                    if isinstance(value, list) and value and hasattr(value[0], "shape"):
                        arguments[name][-1] = make(arguments[name][-1])
                    elif hasattr(value, "shape"):
                        arguments[name] = make(value)
                    else:
                        continue
                    accepts = {"_vector_math": ("2^40 elements", "2^62 elements", "meta"), "_orthogonalized": ("meta",)}
                    if kind not in accepts.get(operator, ()):
                        expect_refusal(operator, arguments)
        for operator in ("step_", "segment_backward"):
            for offset in calls.OFFSETS:
                arguments = calls.valid_call(operator)
                arguments["record_tiles"] = [offset, offset]
                expect_refusal(operator, arguments)
        print(refused)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, f"exit status {run.returncode}: {run.stdout}{run.stderr[-3000:]}"
    assert int(run.stdout) > 80


def test_importing_with_an_unknown_instruction_set_says_so():
    run = subprocess.run(
        [sys.executable, "-c", "import l2l_fast"],
        env={**os.environ, "L2L_FAST_ISA": "sse9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1 and "ValueError: L2L_FAST_ISA: instruction set 'sse9' is unknown" in run.stderr


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan])
def test_fma_rate_of_no_time(seconds):
    with pytest.raises(ValueError, match="^seconds"):
        l2l._C.fma_rate(seconds)
