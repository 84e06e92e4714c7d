"""What the operators refuse: by name, with what came and what was expected, and before anything is written."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from l2l_fast.kernels import operators as ops
from tests.gac_helpers import every_kind, extra_for
from tests.helpers import (
    phi_of,
    random_network,
)


def step_arguments(**options):
    """A valid step of two tensors with all that it may be given, by the names of its arguments."""
    net = random_network(hidden_size=4, num_layers=1, **options)
    return {
        "params": [torch.zeros(5), torch.zeros(70)],
        "grads": [torch.ones(5), torch.ones(70)],
        "states": [net.init_state(5).data, net.init_state(70).data],
        "phi": phi_of(net),
        "config": net.config,
        "lr": 1.0,
        "weight_decay": 0.0,
        "maximize": False,
        "record": torch.zeros(192),
        "record_tiles": [0, 1],
        "extra": extra_for(net, (75,)),
        "out": torch.zeros(net.num_outputs, 75),
        "num_problems": 5,
        "means": torch.zeros(1, 5, net.gac_cells),
        "sums": torch.zeros(2, 5, net.gac_cells, dtype=torch.float64),
    }


def rejects_before_writing(arguments, error, match):
    tensors = [*arguments["params"], *arguments["states"]]
    tensors += [t for t in map(arguments.get, ("record", "out", "means", "sums")) if t is not None]
    kept = [t.clone() for t in tensors]
    for check_only in (True, False):
        with pytest.raises(error, match=match):
            ops.step_(**arguments, check_only=check_only)
    for tensor, old in zip(tensors, kept, strict=True):
        assert tensor.is_sparse or torch.equal(tensor, old)


BOTH = {"gac_cells": 2, "extra_inputs": 1, "num_outputs": 2}


@pytest.mark.parametrize("options", [{}, BOTH], ids=["plain", "communicating"])
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("grads", [torch.ones(5)], ValueError),
        ("grads", [torch.ones(5), torch.ones(71)], ValueError),
        ("grads", [torch.ones(5), torch.ones(70, dtype=torch.int32)], TypeError),
        ("grads", [torch.ones(5), torch.ones(70, dtype=torch.float64)], TypeError),
        ("grads", [torch.ones(5), torch.ones(70, dtype=torch.complex64)], TypeError),
        ("grads", [torch.ones(5), torch.ones(70).to_sparse()], TypeError),
        ("params", [torch.zeros(5), torch.zeros(70, dtype=torch.float64)], TypeError),
        ("params", [torch.zeros(5), torch.zeros(1).expand(70)], ValueError),
        ("states", [torch.zeros(1, 8, 64)], ValueError),
        ("states", [torch.zeros(1, 8, 64), torch.zeros(1, 8, 64)], ValueError),
        ("states", [torch.zeros(1, 8, 64), torch.zeros(2, 64, 8).transpose(1, 2)], ValueError),
        ("states", [torch.zeros(1, 8, 64), torch.zeros(2, 8, 64).double()], TypeError),
        ("phi", torch.zeros(3), ValueError),
        ("phi", torch.zeros(117).double(), TypeError),
        ("hidden_size", 100, ValueError),
        ("num_layers", 9, ValueError),
        ("preprocess", "sqrt", ValueError),
        ("p", -1.0, ValueError),
        ("output_scale", math.nan, ValueError),
        ("record", torch.zeros(191), ValueError),
        ("record", torch.zeros(192, dtype=torch.float64), TypeError),
        ("record_tiles", [0], ValueError),
        ("record_tiles", [0, 2], ValueError),
        ("record_tiles", [-1, 1], ValueError),
        ("num_problems", 0, ValueError),
        ("num_problems", -5, ValueError),
    ],
)
def test_step_in_place_rejects_before_writing(name, value, error, options):
    arguments = step_arguments(**options)
    if isinstance(value, Tensor) and name == "phi" and value.dtype != torch.float32:
        value = arguments["phi"].to(value.dtype)
    if hasattr(arguments["config"], name):
        arguments["config"] = dataclasses.replace(arguments["config"], **{name: value})
    else:
        arguments[name] = value
    # p is one letter: look for it at the start of the message.
    rejects_before_writing(arguments, error, rf"^{name}|record_tiles" if name == "record" else rf"^{name}")


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("extra", None, ValueError, "extra: expected a tensor of 1 rows for this network"),
        ("extra", torch.ones(2, 75), ValueError, r"extra: expected shape \[1, 75\], got \[2, 75\]"),
        ("extra", torch.ones(1, 74), ValueError, r"extra: expected shape \[1, 75\], got \[1, 74\]"),
        ("extra", torch.ones(1, 1).expand(1, 75), ValueError, r"extra: .*contiguous.* strides \[1, 0\]"),
        ("extra", torch.ones(1, 75).half(), TypeError, "extra: expected dtype float32, got Half"),
        ("extra", torch._neg_view(torch.ones(1, 75)), ValueError, "extra: .*lazy negation"),
        ("out", None, ValueError, "out: expected a tensor of 2 rows, got None"),
        ("out", torch.ones(1, 75), ValueError, r"out: expected shape \[2, 75\]"),
        ("out", torch.ones(75, 2).t(), ValueError, r"out: expected a contiguous tensor, got strides \[1, 2\]"),
        ("out", torch.ones(2, 75).double(), TypeError, "out: expected dtype float32, got Double"),
        ("means", None, ValueError, r"means: expected a tensor of shape \[1, 5, 2\], got None"),
        ("sums", None, ValueError, r"sums: expected a tensor of shape \[2, 5, 2\], got None"),
        ("means", torch.ones(1, 5, 3), ValueError, r"means: expected shape \[1, 5, 2\], got \[1, 5, 3\]"),
        ("sums", torch.ones(1, 5, 2).double(), ValueError, r"sums: expected shape \[2, 5, 2\], got \[1, 5, 2\]"),
        ("means", torch.ones(1, 5, 2).double(), TypeError, "means: expected dtype float32, got Double"),
        ("sums", torch.ones(2, 5, 2), TypeError, "sums: expected dtype float64, got Float"),
        ("means", torch.ones(1, 1, 1).expand(1, 5, 2), ValueError, r"means: .*contiguous.* strides \[1, 0, 0\]"),
        ("means", torch.ones(1, 2, 5).transpose(1, 2), ValueError, r"means: .*contiguous.* strides \[10, 1, 5\]"),
        ("sums", torch.ones(1, 1, 1).double().expand(2, 5, 2), ValueError, r"sums: .*contiguous.* strides \[0, 0, 0\]"),
        ("sums", torch.ones(2, 2, 5).double().mT, ValueError, r"sums: .*contiguous.* strides \[10, 1, 5\]"),
        ("num_problems", 3, ValueError, r"means: expected shape \[1, 3, 2\]"),
        ("phases", (1, 0), ValueError, "first_phase, last_phase: expected 0 <= first <= last <= 2, got 1, 0"),
        ("phases", (0, 3), ValueError, "first_phase, last_phase: expected 0 <= first <= last <= 2, got 0, 3"),
        ("phases", (-1, 2), ValueError, "first_phase, last_phase: expected 0 <= first <= last <= 2, got -1, 2"),
    ],
)  # fmt: skip
def test_what_communicates_is_checked_before_writing(name, value, error, message):
    arguments = step_arguments(**BOTH)
    arguments[name] = value
    rejects_before_writing(arguments, error, f"^{message}")


@pytest.mark.parametrize("name", ["means", "sums"])
def test_averages_of_a_plain_network_need_the_shape_too(name):
    """They hold nothing, and may be left out."""
    arguments = step_arguments()
    arguments[name] = arguments[name].new_zeros(1, 5, 1)
    rejects_before_writing(arguments, ValueError, rf"^{name}: expected shape \[\d, 5, 0\], got \[1, 5, 1\]")


@pytest.mark.parametrize("options", [{}, {"extra_inputs": 1, "num_outputs": 2}], ids=["plain", "extra"])
@pytest.mark.parametrize("phases", [None, (0, 1), (1, 2)])
def test_averages_may_be_left_out_without_averaging_cells(options, phases):
    for left_out in (("means",), ("sums",), ("means", "sums")):
        arguments, whole = step_arguments(**options), step_arguments(**options)
        ops.step_(**{**arguments, **dict.fromkeys(left_out)}, phases=phases)
        ops.step_(**whole, phases=phases)
        for name in ("params", "states"):
            assert all(torch.equal(a, b) for a, b in zip(arguments[name], whole[name], strict=True))
        assert torch.equal(arguments["out"], whole["out"])


def test_extra_inputs_that_no_network_has():
    arguments = step_arguments()
    arguments["extra"] = torch.ones(1, 75)
    rejects_before_writing(arguments, ValueError, "^extra: expected None for this network")
    net = random_network()
    with pytest.raises(ValueError, match="^extra: expected None for this network"):
        ops.step(torch.ones(5), torch.ones(1, 5), net.init_state(5).data, phi_of(net), net.config)


def test_problems_must_divide_every_tensor():
    arguments = step_arguments()
    arguments |= {"num_problems": 2, "means": None, "sums": None}
    message = "expected a multiple of num_problems=2 coordinates, got 5"
    rejects_before_writing(arguments, ValueError, rf"^params\[0\]: {message}")
    net = random_network()
    with pytest.raises(ValueError, match=f"^grad: {message}"):
        ops.step(torch.ones(5), None, net.init_state(5).data, phi_of(net), net.config, 2)
    with pytest.raises(ValueError, match="^num_problems: expected at least 1, got 0"):
        ops.step(torch.ones(5), None, net.init_state(5).data, phi_of(net), net.config, 0)


@every_kind
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda g: g.mT.contiguous().mT, ValueError, r"expected a contiguous tensor, got strides \[12, 1, 3\]"),
        (lambda g: g[:1, :1, :1].expand_as(g), ValueError, r"contiguous tensor, got strides \[\d+, 0, 0\]"),
        (lambda g: g.half(), TypeError, "expected dtype float32, got Half"),
        (lambda g: g.double(), TypeError, "expected dtype float32, got Double"),
        (lambda g: g[0], ValueError, "expected shape"),
        (lambda g: g[:, :-1], ValueError, "expected shape"),
        (lambda g: torch.cat([g, g]), ValueError, "expected shape"),
    ],
)  # fmt: skip
def test_upstream_gradients_are_checked(change, error, message, options):
    net = random_network(**options)
    grad, state, extra = torch.ones(3, 4), net.init_state(12).data, extra_for(net, (3, 4))
    grad_out = change(torch.ones(net.num_outputs, 3, 4))
    with pytest.raises(error, match=f"^grad_out: .*{message}"):
        ops.step_backward(grad_out, state, grad, extra, state, phi_of(net), net.config)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("means", [], ValueError, r"means: expected 2 tensors \(one a step\), got 0"),
        ("means", [torch.ones(2, 1, 3)], ValueError, r"means: expected 2 tensors \(one a step\), got 1"),
        ("means", [torch.ones(2, 1, 3), torch.ones(2, 1, 2)], ValueError, r"means\[1\]: expected shape \[2, 1, 3\]"),
        ("means", [torch.ones(2, 1, 3).half()] * 2, TypeError, r"means\[0\]: expected dtype float32, got Half"),
        ("means", [torch.ones(1).expand(2, 1, 3)] * 2, ValueError, r"means\[0\]: .*strides \[0, 0, 0\]"),
        ("means", [torch.ones(3, 1, 2).permute(2, 1, 0)] * 2, ValueError, r"means\[0\]: .*strides \[1, 2, 2\]"),
        ("num_problems", 0, ValueError, "num_problems: expected at least 1"),
        ("num_problems", 3, ValueError, r"numels\[0\]: expected a multiple of num_problems=3 coordinates, got 70"),
    ],
)  # fmt: skip
def test_averages_of_a_segment_are_checked(name, value, error, message):
    net = random_network(gac_cells=3)
    arguments = {
        "start_states": [net.init_state(70).data], "numels": [70], "record_tiles": [0],
        "records": [torch.ones(128)] * 3,
        "means": [torch.ones(2, 1, 3)] * 2, "loss_weights": [1.0, 1.0], "lrs": [1.0, 1.0], "decays": [1.0, 1.0],
        "phi": phi_of(net), "config": net.config, "num_problems": 1,
    }  # fmt: skip
    ops.segment_backward(**arguments)
    with pytest.raises(error, match=f"^{message}"):
        ops.segment_backward(**{**arguments, name: value})


@pytest.mark.parametrize("options", [{"extra_inputs": 1}, {"num_outputs": 2}, BOTH], ids=str)
def test_segments_of_extra_inputs_and_outputs_are_refused(options):
    net, ones = random_network(**options), [1.0]
    with pytest.raises(ValueError, match="^extra_inputs, num_outputs: expected 0 and 1 for a segment"):
        ops.segment_backward(
            [net.init_state(5).data], [5], [0], [torch.ones(64)] * 2, [], ones, ones, ones, phi_of(net), net.config
        )


def test_averages_of_a_plain_segment_may_be_given():
    net, ones = random_network(), [1.0]
    arguments = ([net.init_state(5).data], [5], [0], [torch.ones(64)] * 2)
    rest = (ones, ones, ones, phi_of(net), net.config)
    grad_phi, _ = ops.segment_backward(*arguments, [], *rest)
    assert torch.equal(ops.segment_backward(*arguments, [torch.ones(2, 1, 0)], *rest)[0], grad_phi)
    with pytest.raises(ValueError, match=r"^means\[0\]: expected shape \[2, 1, 0\]"):
        ops.segment_backward(*arguments, [torch.ones(2, 1, 1)], *rest)


def test_unknown_device_is_named():
    with pytest.raises(NotImplementedError, match=r"no kernel for device 'xla'.*\['cpu'"):
        ops.require_kernel("step", torch.device("xla"))
