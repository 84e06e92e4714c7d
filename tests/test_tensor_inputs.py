"""The operator that makes the default inputs per tensor against its oracle in plain PyTorch."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import l2l_fast as l2l
from l2l_fast.kernels import normalized
from l2l_fast.kernels import operators as ops
from l2l_fast.kernels.tensor_inputs import DEFAULT_INPUTS, aligned, default_inputs
from tests.helpers import assert_close

SQUARES = st.one_of(st.just(0.0), st.floats(1e-300, 1e300), st.floats(1e-6, 1e6))


@st.composite
def tensors(draw):
    """Arguments of :func:`operators.tensor_inputs` without the weights: sums that a step could have, and some more."""
    optimizees, each = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    rows = []
    for _ in range(optimizees * each):
        theta, grad, q, adam = (draw(SQUARES) for _ in range(4))
        along = draw(st.floats(-1, 1)) * math.sqrt(grad) * math.sqrt(adam)
        rows.append([theta, grad, q, adam, along, float(draw(st.sampled_from([0, 1, 63, 64, 65, 10**6 + 3])))])
    count = len(rows)
    ages = draw(st.lists(st.sampled_from([1, 2, 999, 1000, 1001, 10**7]), min_size=count, max_size=count))
    fan_ins = draw(st.lists(st.sampled_from([0, 1, 32, 784, 10**6]), min_size=count, max_size=count))
    before = draw(st.lists(st.floats(-1, 1), min_size=count, max_size=count))
    total = draw(st.sampled_from([None, 1, 10, 1000, 10**6]))
    sums = torch.tensor(rows, dtype=torch.float64)
    return sums, [torch.tensor(x, dtype=torch.float64) for x in before], fan_ins, ages, total, optimizees


def expected(sums, before, fan_ins, ages, total, optimizees, weight):
    after = aligned(sums, torch.stack(before))
    inputs = default_inputs(fan_ins, ages, total, sums, after, optimizees)
    rows = normalized.default_nominal(len(ages), sums.device)
    if weight is not None:
        whole = weight.expand(optimizees, *weight.shape[-2:]).unsqueeze(1)
        rows = normalized.nominal_of(whole, inputs.view(optimizees, -1, len(DEFAULT_INPUTS))).flatten(0, 1)
    return inputs, rows, after


@settings(max_examples=300, deadline=None)
@given(tensors(), st.sampled_from(["none", "one", "each"]), st.floats(1e-3, 1e3), st.integers(0, 9))
def test_as_the_oracle(arguments, weights, scale, seed):
    *rest, optimizees = arguments
    random = torch.Generator().manual_seed(seed)
    shape = {"one": (4, 15), "each": (optimizees, 4, 15)}.get(weights)
    weight = None if shape is None else scale * torch.randn(shape, generator=random)
    inputs, nominal, after = ops.tensor_inputs(*rest, weight, optimizees)
    ideal_inputs, ideal_nominal, ideal_after = expected(*arguments, weight)
    assert inputs.dtype == nominal.dtype == torch.float32
    torch.testing.assert_close(inputs, ideal_inputs, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(nominal, ideal_nominal, rtol=1e-5, atol=1e-5 * scale)
    torch.testing.assert_close(torch.stack(after), ideal_after, rtol=1e-12, atol=1e-15)


def case(count: int = 2, **changes):
    sums = torch.arange(1.0, 6.0 * count + 1, dtype=torch.float64).view(count, 6)
    zero = torch.zeros((), dtype=torch.float64)
    usual = {"sums": sums, "alignments": [zero] * count, "fan_ins": [3, 0][:count], "ages": [2, 1][:count]}
    return {**usual, "total_steps": 9, "weight_nominal": torch.ones(4, 15), "optimizees": 1, **changes}


def test_of_no_tensors_and_of_any_weights():
    inputs, nominal, after = ops.tensor_inputs(**case(0, sums=torch.zeros(0, 6).double()))
    assert inputs.shape == (0, 15) and nominal.shape == (0, 5) and after == []
    usual = ops.tensor_inputs(**case())[1]
    for weight in (torch.ones(15, 4).double().t().requires_grad_(), torch.ones(4, 15).bfloat16()):
        rows = ops.tensor_inputs(**case(weight_nominal=weight))[1]
        assert torch.equal(rows, usual) and not rows.requires_grad


def test_weights_in_float64_are_not_rounded():
    weight = torch.full((4, 15), 1 / 3, dtype=torch.float64)
    arguments = [case()[name] for name in ("sums", "alignments", "fan_ins", "ages", "total_steps", "optimizees")]
    found = ops.tensor_inputs(**case(weight_nominal=weight))[1]
    torch.testing.assert_close(found, expected(*arguments, weight)[1], rtol=6e-8, atol=0)


def test_numbers_that_are_none_stay_in_their_tensor():
    sums = case()["sums"]
    sums[0, 0] = math.nan  # theta's alone: the gradients' sums are those of all tensors
    spoilt, usual = ops.tensor_inputs(**case(sums=sums)), ops.tensor_inputs(**case())
    assert torch.equal(spoilt[0][1], usual[0][1]) and spoilt[0][0].isnan().sum() == 2


def test_what_it_returns_is_of_its_own():
    """Alignments are states that are saved one by one."""
    given = case()
    after = ops.tensor_inputs(**given)[2]
    assert all(each.untyped_storage().nbytes() == 8 for each in after)
    assert not {each.data_ptr() for each in after} & {each.data_ptr() for each in given["alignments"]}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sums": torch.ones(2, 5).double()}, r"sums: expected shape \[2, 6\], got \[2, 5\]"),
        ({"sums": torch.ones(2, 6)}, "sums: expected dtype float64, got Float"),
        ({"alignments": [torch.zeros(()).double()]}, "alignments: expected 2 as of ages, got 1"),
        ({"alignments": [torch.zeros(())] * 2}, r"alignments\[0\]: expected dtype float64, got Float"),
        ({"alignments": [torch.zeros(1).double()] * 2}, r"alignments\[0\]: expected shape \[\], got \[1\]"),
        ({"sums": torch.ones(6, 2).double().t()}, "sums: expected a contiguous tensor"),
        ({"ages": [2, 0]}, "ages: expected at least 1, got 0"),
        ({"fan_ins": [-1, 0]}, "fan_ins: expected at least 0, got -1"),
        ({"total_steps": 0}, "total_steps: expected at least 1, got 0"),
        ({"optimizees": 3}, "optimizees: expected a divisor of 2, got 3"),
        ({"weight_nominal": torch.ones(4, 14)}, r"weight_nominal: expected shape \[4, 15\]"),
        ({"weight_nominal": torch.ones(15, 4)}, r"weight_nominal: expected shape \[4, 15\]"),
        ({"weight_nominal": torch.ones(2, 4, 15)}, r"weight_nominal: expected shape \[1, 4, 15\]"),
        ({"weight_nominal": torch.ones(4, 15, device="meta")}, "weight_nominal: expected device cpu as sums, got meta"),
        ({"alignments": [torch.zeros((), device="meta")] * 2}, "alignments: expected device cpu as sums, got meta"),
    ],
)
def test_refusals(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ops.tensor_inputs(**case(**change))


def test_the_operator_is_whole():
    """Schema, fake kernel, and no transform of torch.func that would pass it by."""
    arguments = tuple(case().values())
    checks = ["test_schema", "test_faketensor"]
    torch.library.opcheck(torch.ops.l2l_fast._tensor_inputs.default, arguments, test_utils=checks)
    with pytest.raises(NotImplementedError, match=re.escape("torch.func")):
        torch.func.vmap(lambda sums: ops.tensor_inputs(**case(sums=sums))[0])(case()["sums"].expand(3, -1, -1))


def test_a_step_is_told_what_the_oracle_says(monkeypatch):
    """The optimizer's steps with the operator and with the oracle in its place."""

    def run():
        random = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, generator=random)) for shape in ((5, 4), (5,), (0, 3), ())]
        optimizer = l2l.LearnedOptimizer(params, l2l.load_pretrained("general"), total_steps=20)
        for _ in range(20):
            for param in params:
                param.grad = torch.randn(param.shape, generator=random) + 0.5
            optimizer.step()
        return [param.detach() for param in params]

    found = run()

    def by_the_oracle(sums, alignments, fan_ins, ages, total_steps, weight_nominal=None, optimizees=1):
        inputs, rows, after = expected(sums, alignments, fan_ins, ages, total_steps, optimizees, weight_nominal)
        return inputs, rows, list(after)

    monkeypatch.setattr(ops, "tensor_inputs", by_the_oracle)
    for got, ideal in zip(found, run(), strict=True):
        assert_close(got, ideal, 1e-5)
