"""Calls of every operator by the names of their arguments, and a zoo of what may be passed in place of each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import l2l_fast as l2l
from tests.fuzz.cases import OPS, blocked_state, memory_of, phi_of
from tests.helpers import random_network, structured_gradient

PLAIN = ("step", "step_backward", "step_", "segment_backward")
# The same operators of a network whose coordinates communicate: two problems, averaging cells and, but for segments,
# extra inputs and several outputs.
COMMUNICATING = tuple(f"{name} (communicating)" for name in PLAIN)
# And of one with normalized inputs, which takes what all coordinates of a tensor have in common.
NORMALIZED = tuple(f"{name} (normalized)" for name in PLAIN)
ABOUT_TENSORS = ("_tensor_sums", "_tensor_inputs")
OPERATORS = (*PLAIN, *COMMUNICATING, *NORMALIZED, "_vector_math", *ABOUT_TENSORS, "_orthogonalized")

# How the operators take a configuration.
SIZES = ("hidden_size", "num_layers", "gac_cells", "extra_inputs", "num_outputs")
CONSTANTS = ("p", "output_scale")
_CONFIGURATION = (*SIZES[:2], "preprocess", *CONSTANTS, *SIZES[2:])
PER_TENSOR, BETAS = 3, (0.9, 0.99, 0.95, 0.999)  # of the normalized ones, behind the others


def name_of(operator: str) -> str:
    return operator.split()[0]


def valid_call(operator: str, seed: int = 0) -> dict[str, Any]:
    """Arguments by name that the operator accepts. Those of the configuration are its fields, see ``call``."""
    if operator in NORMALIZED:
        return _normalized_call(name_of(operator), seed)
    name, communicating = name_of(operator), operator in COMMUNICATING
    if name == "_vector_math":
        return {"function": "exp2", "x": structured_gradient((70,))}
    if name == "_tensor_sums":
        taken = _normalized_call("step_", seed)
        return {key: taken[key] for key in ("params", "grads", "states", *_CONFIGURATION, "maximize", "ages")}
    if name == "_tensor_inputs":
        random = torch.Generator().manual_seed(seed)
        return {
            "sums": torch.rand(4, 6, generator=random, dtype=torch.float64) + 0.5,
            "alignments": list(torch.rand(4, generator=random, dtype=torch.float64)),
            "fan_ins": [0, 3, 0, 70],
            "ages": [1, 1, 7, 7],
            "total_steps": 100,
            "weight_nominal": torch.randn(2, 4, 15, generator=random),
            "optimizees": 2,
        }
    if name == "_orthogonalized":
        return {"updates": structured_gradient((2, 5, 7), seed=seed), "steps": 5}
    options: dict[str, int] = {"gac_cells": 2} if communicating else {}
    if communicating and name != "segment_backward":
        options |= {"extra_inputs": 2, "num_outputs": 3}
    net = random_network(seed, hidden_size=5, num_layers=2, **options)
    config, problems = _fields(net), 2 if communicating else 1
    grad, state, phi = structured_gradient((70,), seed=seed), blocked_state(net, 70, seed), phi_of(net).clone()
    means = [structured_gradient((2, 2, 2), seed=seed + k).clamp(-1, 1) for k in (7, 8)] if communicating else []

    def rows(count: int, numel: int, k: int) -> Tensor:
        return structured_gradient((count, numel), seed=seed + k)

    if name == "step_":
        first = 2 if communicating else 3
        return {
            "params": [torch.ones(first, 1), torch.ones(70)],
            "grads": [structured_gradient((first, 1)), grad],
            "states": [blocked_state(net, first, seed + 1), state],
            "phi": phi,
            **config,
            "lr": 0.5,
            "weight_decay": 0.1,
            "maximize": False,
            "record": torch.full((64 * 4,), 7.0),
            "record_tiles": [3, 0],
            "extra": rows(2, 72, 6) if communicating else None,
            "out": rows(3, 72, 5) if communicating else None,
            "num_problems": problems,
            "means": means[0] if communicating else None,
            "sums": structured_gradient((2, 2, 2), seed=seed + 9).double() if communicating else None,
            "first_phase": 0,
            "last_phase": 3,
            "check_only": False,
            "precision": "float32",
        }
    if name == "segment_backward":
        record = torch.nn.functional.pad(grad, (0, 58))
        return {
            "start_states": [state, blocked_state(net, 60, seed + 2)],
            "numels": [70, 60],
            "record_tiles": [0, 0],
            "records": [record, record * 2, record * 3],
            "means": means,
            "loss_weights": [1.0, 0.5],
            "lrs": [1.0, 1.0],
            "decays": [1.0, 0.9],
            "phi": phi,
            **config,
            "num_problems": problems,
            "grad_end_states": [state.clone(), blocked_state(net, 60, seed + 3)],
            "need_grad_start": True,
        }
    extra = rows(2, 70, 5) if communicating else None
    arguments = {"grad": grad, "extra": extra, "state": state, "phi": phi, **config, "num_problems": problems}
    if name == "step_backward":
        upstream = {"grad_out": rows(3 if communicating else 1, 70, 1), "grad_new_state": state.clone()}
        return {**upstream, **arguments}
    return arguments


def _fields(net: l2l.CoordinatewiseLSTM) -> dict[str, Any]:
    return {name: getattr(net, name) for name in _CONFIGURATION}


def _normalized_call(name: str, seed: int) -> dict[str, Any]:
    net = random_network(seed, hidden_size=5, preprocess="normalized", tensor_inputs=PER_TENSOR, betas=BETAS)
    arguments = {**valid_call(name, seed), **_fields(net), "phi": phi_of(net).clone()}
    for key, value in arguments.items():
        if "state" in key:
            several = isinstance(value, list)
            states = [_with_averages(state) for state in (value if several else [value])]
            arguments[key] = states if several else states[0]
    tensors = 2 if name in ("step_", "segment_backward") else 1
    shape = (2, tensors) if name == "segment_backward" else (tensors,)
    random = torch.Generator().manual_seed(seed + 20)
    return {
        **arguments,
        "ages": [5, 2][:tensors],
        "tensor_inputs": torch.randn(*shape, PER_TENSOR, generator=random),
        "nominal": torch.rand(*shape, 5, generator=random),
    }


def _with_averages(state: Tensor) -> Tensor:
    return torch.cat([state, state[:, :2], state[:, 2:4].abs() + 0.1], dim=1)


def call(operator: str, arguments: dict[str, Any]) -> list[Tensor]:
    """Runs the operator itself, without the Python layer; returns all tensors that it returned or wrote."""
    function = getattr(OPS, name_of(operator))
    taken = dict(arguments)
    if "hidden_size" in taken:
        taken |= {"sizes": [taken[name] for name in SIZES], "constants": [taken[name] for name in CONSTANTS]}
    if operator in (*NORMALIZED, "_tensor_sums"):
        taken["sizes"], taken["constants"] = [*taken["sizes"], PER_TENSOR], [*taken["constants"], *BETAS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schema = function.default._schema.arguments
        result = function(*(taken.get(each.name, each.default_value) for each in schema))
    if name_of(operator) == "step_":
        written = ("params", "states", "record", "out", "means", "sums")
        return tensors([arguments[name] for name in written])
    return tensors(result)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in tensors(item)] if isinstance(value, (list, tuple)) else []


def snapshot(arguments: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Every tensor argument that has plain memory, with a copy of all of that memory."""
    found = tensors(list(arguments.values()))
    plain = [t for t in found if type(t) is Tensor and t.layout == torch.strided and not t.is_nested]
    # A quantized tensor, a zero tensor or a meta tensor has no memory to look at.
    plain = [t for t in plain if t.device.type == "cpu" and not t.is_quantized and not t._is_zerotensor()]
    plain = [t for t in plain if t.element_size() in (2, 4, 8)]
    return [(memory_of(t.detach()), memory_of(t.detach()).clone()) for t in plain]


# ---- the zoo ----


def _quietly(make: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def quiet(tensor: Tensor) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(tensor)

    return quiet


def _freed(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def _shrunk(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() // 2)
    return tensor


def _inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
        torch.complex32, torch.complex64, torch.complex128, torch.float8_e4m3fn,
    )
}  # fmt: skip

# name: (what replaces a tensor, whether the kernels may accept it: it means the same numbers, or other valid ones)
TENSORS: dict[str, tuple[Callable[[Tensor], Any], bool]] = {
    **{name: (_quietly(lambda t, dtype=dtype: t.to(dtype)), False) for name, dtype in DTYPES.items()},
    "bfloat16": (lambda t: t.bfloat16(), True),
    "float16": (lambda t: t.half(), True),
    "conjugated": (lambda t: torch.complex(t, t).conj(), False),
    "imaginary part of a conjugate": (lambda t: torch.complex(t, t).conj().imag, True),
    "negated": (lambda t: torch._neg_view(t), True),
    "meta": (lambda t: t.to("meta"), False),
    "sparse": (lambda t: t.to_sparse(), False),
    "sparse csr": (_quietly(lambda t: t.reshape(1, -1).to_sparse_csr()), False),
    "quantized": (_quietly(lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)), False),
    "mkldnn": (lambda t: t.float().to_mkldnn(), False),
    "nested": (_quietly(lambda t: torch.nested.nested_tensor([t])), False),
    "zero tensor": (lambda t: torch._efficientzerotensor(t.shape), True),
    "freed": (_freed, False),
    "shrunk": (_shrunk, False),
    "inference": (_inference, True),
    "parameter": (lambda t: torch.nn.Parameter(t), True),
    "one more dimension": (lambda t: t.unsqueeze(0), False),
    "one dimension fewer": (lambda t: t[0], False),
    "one element fewer": (lambda t: t[..., :-1], False),
    "one element more": (lambda t: torch.cat([t, t[..., :1]], dim=-1), False),
    "twice along the first dimension": (lambda t: torch.cat([t, t]), False),
    "zero-size": (lambda t: t[:0], False),
    "0-dim": (lambda t: t.flatten()[0], False),
    "expanded": (lambda t: t[..., :1].expand_as(t), True),
    "strided": (lambda t: torch.stack([t, t], dim=-1)[..., 0], True),
    "transposed storage": (lambda t: t.transpose(0, -1).contiguous().transpose(0, -1), True),
    "2^40 elements": (lambda t: t.flatten()[:1].expand(2**40), False),
    "2^62 elements": (lambda t: t.flatten()[:1].expand(2**31, 2**31), False),
    "None": (lambda t: None, False),
    "a number": (lambda t: 1.0, False),
    "a list": (lambda t: t.tolist(), False),
    "a state": (lambda t: l2l.State.zeros(70, 5, 2), False),
}  # fmt: skip

INTEGERS = (-(2**63), -(2**31), -1, 0, 1, 2, 3, 4, 6, 20, 64, 65, 2**31, 2**32 + 5, 2**63 - 1, 2**70, 1.5, "5", None)
FLOATS = (math.nan, math.inf, -math.inf, 0.0, -1.0, 71.0, 1e300, -1e300, 1e-310, 10**400, "1.0", None, 1j)
STRINGS = ("", "identity", "log_sign", "normalized", "LOG_SIGN", "log_sign ", "log_sign\0", "exp3", 3, None)
BOOLEANS = (True, 2, 0.5, "yes", None)
# Times 64 * 4 bytes these wrap around 64 bits, to small numbers or to far away.
OFFSETS = (-(2**63), -(2**58), -1, 1, 2, 4, 2**31, 2**40, 2**56, 2**57 + 2**40, 2**58, 2**58 + 1, 2**63 - 1)
