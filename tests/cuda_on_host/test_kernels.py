"""The kernels of csrc/cuda on the CPU, against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from l2l_fast import State
from l2l_fast.kernels import reference
from l2l_fast.kernels.config import Config as ReferenceConfig

from .kernels import (
    AUTOMATIC,
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    NARROW,
    TILE,
    WIDE,
    Config,
    Kernels,
    Tensor,
    from_bits,
    to_bits,
)

TOLERANCE = 2e-5
DEVICE = "sm_90,multiprocessors=2"  # for the fixture `kernels`
ALL_SIZES = [Config(hidden, layers) for hidden in (4, 8, 16, 20, 32) for layers in (1, 2, 3)]
SHORT_SIZES = [Config(20, 2), Config(8, 1, "identity"), Config(20, 1), Config(8, 2), Config(4, 1), Config(4, 2)]


def random_phi(config: Config, rng: np.random.Generator) -> np.ndarray:
    size = reference.phi_size(ReferenceConfig(*config))
    return (rng.standard_normal(size) * 0.3).astype(np.float32)


def random_gradient(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Of all magnitudes, both branches of log_sign and an exact zero among them."""
    values = rng.standard_normal(shape) * np.exp(rng.uniform(-14, 3, shape))
    if values.size > 2:
        values.reshape(-1)[1] = 0.0
    return values.astype(np.float32)


def random_state(config: Config, numel: int, rng: np.random.Generator) -> np.ndarray:
    tiles = -(-numel // TILE)
    state = rng.uniform(-1, 1, (tiles, config.rows, TILE)).astype(np.float32)
    if numel % TILE:
        state[-1, :, numel % TILE :] = 0.0
    return state


def logical(config: Config, state: np.ndarray, numel: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    data = torch.from_numpy(state).double()
    return State(data, numel, config.hidden_size, config.num_layers).to_logical()


def blocked(state: list[tuple[torch.Tensor, torch.Tensor]]) -> np.ndarray:
    return State.from_logical(state).data.numpy()


def expected_step(
    config: Config, phi: np.ndarray, grad: np.ndarray, state: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    update, new = reference.lstm_step(
        torch.from_numpy(grad).double().reshape(-1),
        logical(config, state, grad.size),
        torch.from_numpy(phi).double(),
        ReferenceConfig(*config),
    )
    return update.numpy().reshape(grad.shape), blocked(new)


def assert_close(got: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    """Within a share of the largest magnitude, at least of 1."""
    assert got.shape == expected.shape
    assert np.isfinite(got).all()
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    assert float(np.abs(got - expected).max(initial=0.0)) <= tolerance * scale


def inside(config: Config, state: np.ndarray, numel: int) -> np.ndarray:
    """A state with its padding set to zero."""
    return blocked(logical(config, state, numel)) if numel else state


def check_step(kernels: Kernels, config: Config, numel: int, mapping: int, seed: int = 0) -> None:
    rng = np.random.default_rng([numel, seed])
    library = kernels.library
    phi, grad, state = random_phi(config, rng), random_gradient((numel,), rng), random_state(config, numel, rng)
    param = rng.standard_normal(numel).astype(np.float32)
    update, new_state = expected_step(config, phi, grad, state) if numel else (param, state)
    target, held = Tensor(library, param), library.array(state)
    kernels.step(config, phi, [target], [Tensor(library, grad)], [held], lr=0.7, decay=0.9, mapping=mapping)
    if numel:
        assert_close(target.numpy(), param * 0.9 + 0.7 * update)
        assert_close(inside(config, held.numpy(), numel), new_state)


@pytest.mark.parametrize("mapping", [NARROW, WIDE])
@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65, 1000])
def test_step_sizes(kernels: Kernels, numel: int, mapping: int) -> None:
    check_step(kernels, Config(), numel, mapping)


@pytest.mark.parametrize("config", SHORT_SIZES, ids=str)
@pytest.mark.parametrize("mapping", [NARROW, WIDE])
def test_step_networks(kernels: Kernels, config: Config, mapping: int) -> None:
    check_step(kernels, config, 200, mapping)


def test_step_under_other_schedules(kernels: Kernels) -> None:
    for seed in (-1, 1, 2):
        with kernels.library.seed(seed):
            check_step(kernels, Config(), 300, AUTOMATIC, seed + 1)


@pytest.mark.parametrize("param_dtype", [FLOAT32, BFLOAT16, FLOAT16])
@pytest.mark.parametrize("grad_dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_step_dtypes_maximize_and_record(kernels: Kernels, param_dtype: int, grad_dtype: int) -> None:
    config, library = Config(8, 1), kernels.library
    rng = np.random.default_rng(1)
    phi, numel = random_phi(config, rng), 100
    grad = from_bits(to_bits(rng.standard_normal(numel), grad_dtype), grad_dtype)
    state = random_state(config, numel, rng)
    param = from_bits(to_bits(rng.standard_normal(numel), param_dtype), param_dtype)
    update, _ = expected_step(config, phi, -grad, state)
    target = Tensor(library, param, param_dtype)
    record = library.array(np.full(3 * TILE, np.nan, np.float32))
    kernels.step(
        config,
        phi,
        [target],
        [Tensor(library, grad, grad_dtype)],
        [library.array(state)],
        records=[record.pointer + 4 * TILE],
        lr=0.5,
        maximize=True,
    )
    expected = param + 0.5 * update
    unit = {FLOAT32: 0.0, BFLOAT16: 2.0**-8, FLOAT16: 2.0**-11}[param_dtype]
    assert np.all(np.abs(target.numpy() - expected) <= unit * np.abs(expected) + TOLERANCE)
    written = record.numpy()
    assert np.isnan(written[:TILE]).all()
    np.testing.assert_array_equal(written[TILE : TILE + numel], -grad)
    assert not written[TILE + numel :].any()


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("offset", [0, 1])
def test_step_strides(kernels: Kernels, step: int, offset: int) -> None:
    config, library, shape = Config(8, 1), kernels.library, (3, 4, 5, 2)
    rng = np.random.default_rng(2)
    phi, grad, param = random_phi(config, rng), random_gradient(shape, rng), rng.standard_normal(shape)
    state = random_state(config, grad.size, rng)
    update, new_state = expected_step(config, phi, grad, state)
    target = Tensor(library, param, permutation=(0, 2, 3, 1), step=step, offset=offset)
    source = Tensor(library, grad, permutation=(3, 1, 0, 2), offset=offset)
    held = library.array(state)
    kernels.step(config, phi, [target], [source], [held])
    assert_close(target.numpy(), param + update)
    assert_close(inside(config, held.numpy(), grad.size), new_state)


def test_functional_step_leaves_its_inputs(kernels: Kernels) -> None:
    config, library = Config(), kernels.library
    rng = np.random.default_rng(3)
    phi, grad = random_phi(config, rng), random_gradient((7, 11), rng)
    state = random_state(config, grad.size, rng)
    update, new_state = expected_step(config, phi, grad, state)
    out, before = Tensor(library, np.full(grad.shape, np.nan)), library.array(state)
    after = library.array(np.full_like(state, np.nan))
    kernels.step(config, phi, [out], [Tensor(library, grad)], [before], [after], in_place=False)
    assert_close(out.numpy(), update)
    assert_close(inside(config, after.numpy(), grad.size), new_state)
    np.testing.assert_array_equal(before.numpy(), state)


@pytest.mark.parametrize(("tensors", "launches"), [(300, 1), (600, 3)])
def test_many_tensors_in_one_launch(kernels: Kernels, tensors: int, launches: int) -> None:
    """Tables of more than 32 kB go to device memory first, two launches for these."""
    config, library = Config(8, 1), kernels.library
    rng = np.random.default_rng(4)
    phi = random_phi(config, rng)
    sizes = rng.integers(0, 90, tensors)
    sizes[:3] = [1, 64, 65]
    grads = [random_gradient((int(n),), rng) for n in sizes]
    states = [random_state(config, int(n), rng) for n in sizes]
    params = [rng.standard_normal(int(n)).astype(np.float32) for n in sizes]
    targets = [Tensor(library, param) for param in params]
    held = [library.array(state) for state in states]
    sources = [Tensor(library, grad) for grad in grads]
    library.reset_counters()
    kernels.step(config, phi, targets, sources, held)
    assert library.counter("launches") == launches
    assert sum("step_kernel" in line for line in library.launch_log()) == 1
    assert library.counter("copies") == 0 and library.counter("synchronizations") == 0
    for k in [0, 1, 2, tensors // 2, tensors - 1]:
        if sizes[k]:
            update, _ = expected_step(config, phi, grads[k], states[k])
            assert_close(targets[k].numpy(), params[k] + update)


def test_a_nan_gradient_stays_in_its_coordinate(kernels: Kernels) -> None:
    library = kernels.library
    rng = np.random.default_rng(5)
    for config in (Config(), Config(8, 1, "identity")):
        for bad in (np.nan, np.inf, -np.inf):
            phi, grad = random_phi(config, rng), random_gradient((130,), rng)
            grad[70] = bad
            state = random_state(config, 130, rng)
            clean = np.where(np.arange(130) == 70, np.float32(1), grad)
            update, _ = expected_step(config, phi, clean, state)
            target = Tensor(library, np.zeros(130))
            kernels.step(config, phi, [target], [Tensor(library, grad)], [library.array(state)])
            got = target.numpy()
            assert np.isnan(got[70]) or not np.isnan(bad)
            assert_close(np.delete(got, 70), np.delete(update, 70))


def test_extreme_gradients_stay_finite(kernels: Kernels) -> None:
    config, library = Config(), kernels.library
    rng = np.random.default_rng(6)
    grad = np.array([0.0, -0.0, 1e-45, -1e-40, 3e38, -3e38, np.exp(-10.0), 1.0], np.float32)
    phi, state = random_phi(config, rng), random_state(config, grad.size, rng)
    update, _ = expected_step(config, phi, grad, state)
    target = Tensor(library, np.zeros(grad.size))
    kernels.step(config, phi, [target], [Tensor(library, grad)], [library.array(state)])
    assert_close(target.numpy(), update)


def ulps(got: np.ndarray, exact: np.ndarray) -> float:
    spacing = np.spacing(np.maximum(np.abs(exact), np.finfo(np.float32).tiny).astype(np.float32))
    return float(np.max(np.abs(got.astype(np.float64) - exact) / spacing))


def test_functions_are_accurate(kernels: Kernels) -> None:
    """With approximate instructions that err by as much as they may."""
    rng = np.random.default_rng(7)
    near = (rng.choice([-1, 1], 4000) * np.exp(rng.uniform(-60, 3.3, 4000))).astype(np.float32)
    wide = rng.uniform(-80, 29.9, 4000).astype(np.float32)
    x = np.concatenate([near, wide, np.array([0.69999, 0.7, -0.7, -0.70001, 1.0, -1.0], np.float32)])
    exact = x.astype(np.float64)
    assert ulps(kernels.math(0, x), np.exp2(exact)) <= 4
    assert ulps(kernels.math(1, x), 1 / (1 + np.exp2(exact))) <= 4
    assert ulps(kernels.math(2, x), np.tanh(exact * np.log(2) / 2)) <= 6
    assert ulps(kernels.math(4, x), np.expm1(exact * np.log(2))) <= 6
    positive = np.abs(x[x != 0]).clip(1e-37)
    assert ulps(kernels.math(3, positive), np.log(positive.astype(np.float64))) <= 4
    edges = np.array([np.inf, -np.inf, np.nan, 200.0, -200.0], np.float32)
    np.testing.assert_allclose(kernels.math(1, edges), [0, 1, np.nan, 0, 1], atol=1e-30)
    np.testing.assert_allclose(kernels.math(2, edges), [1, -1, np.nan, 1, -1])
    np.testing.assert_array_equal(kernels.math(3, edges[:3][[0, 2]]), [np.inf, np.nan])


@pytest.mark.slow
@pytest.mark.parametrize("config", ALL_SIZES, ids=str)
@pytest.mark.parametrize("mapping", [NARROW, WIDE])
def test_step_all_networks(all_kernels: Kernels, config: Config, mapping: int) -> None:
    for preprocess in ("log_sign", "identity"):
        check_step(all_kernels, config._replace(preprocess=preprocess), 150, mapping)
