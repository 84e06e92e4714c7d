"""The step on tensor cores, on the CPU: against the float64 reference, a tenth of what the other kernels may be off.

Its sums of products are cut as tensor cores cut them (include/cuda_on_host/ptx_host.h), and every product is one of
numbers of 11 bits; without one of the terms that a product is made of, the first test fails.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from .build import compile_kernels
from .kernels import (
    AUTOMATIC,
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    NARROW,
    SHORT_FLAGS,
    SOURCE,
    TILE,
    WIDE,
    Config,
    Kernels,
    Tensor,
    from_bits,
    to_bits,
)
from .library import Library
from .test_kernels import (
    assert_close,
    blocked,
    expected_step,
    inside,
    logical,
    random_gradient,
    random_phi,
    random_state,
)

TOLERANCE = 2e-6
DEVICE = "sm_80,multiprocessors=1"  # for the fixture `kernels`
KERNEL = "mma_step_kernel"


def ran_on_tensor_cores(kernels: Kernels) -> bool:
    return KERNEL in kernels.library.launch_log()[-1]


def check(kernels: Kernels, config: Config, numel: int, mapping: int = AUTOMATIC, tolerance: float = TOLERANCE) -> None:
    rng, library = np.random.default_rng([numel, 1]), kernels.library
    phi, grad, state = random_phi(config, rng), random_gradient((numel,), rng), random_state(config, numel, rng)
    param = rng.standard_normal(numel).astype(np.float32)
    target, held = Tensor(library, param), library.array(state)
    options = {"lr": 0.7, "decay": 0.9, "mapping": mapping, "tensor_cores": True}
    kernels.step(config, phi, [target], [Tensor(library, grad)], [held], **options)
    assert ran_on_tensor_cores(kernels)
    update, new_state = expected_step(config, phi, grad, state)
    assert_close(target.numpy(), param * 0.9 + 0.7 * update, tolerance)
    assert_close(inside(config, held.numpy(), numel), new_state, tolerance)


@pytest.mark.parametrize("mapping", [NARROW, WIDE])
@pytest.mark.parametrize("numel", [1, 63, 64, 65, 1000])
def test_sizes(kernels: Kernels, numel: int, mapping: int) -> None:
    check(kernels, Config(), numel, mapping)


@pytest.mark.parametrize("config", [Config(20, 1), Config(8, 2), Config(8, 1, "identity"), Config(20, 2, "identity")])
@pytest.mark.parametrize("mapping", [NARROW, WIDE])
def test_networks(kernels: Kernels, config: Config, mapping: int) -> None:
    check(kernels, config, 200, mapping)


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [8, 16, 20])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_all_networks(all_kernels: Kernels, hidden: int, layers: int) -> None:
    all_kernels.library.set_device("sm_86,multiprocessors=1")  # the least shared memory
    for mapping in (NARROW, WIDE):
        for preprocess in ("log_sign", "identity"):
            check(all_kernels, Config(hidden, layers, preprocess), 150, mapping)


def test_other_schedules(kernels: Kernels) -> None:
    for seed in (-1, 1, 2):
        with kernels.library.seed(seed):
            check(kernels, Config(), 300)


@pytest.mark.parametrize(("scale", "factor"), [(1, 1.5), (10, 2.5), (300, 3)])
def test_as_accurate_as_float32(kernels: Kernels, scale: float, factor: float) -> None:
    """The root mean square error against that of the other kernel; with large weights, pre-activations of hundreds, a
    sum that is cut loses more than one that is rounded."""
    rng, library, config, numel = np.random.default_rng(2), kernels.library, Config(), 1000
    phi = random_phi(config, rng) * scale
    grad, state, errors = random_gradient((numel,), rng), random_state(config, numel, rng), []
    _, expected = expected_step(config, phi, grad, state)
    for tensor_cores in (False, True):
        target, held = Tensor(library, np.zeros(numel)), library.array(state)
        kernels.step(config, phi, [target], [Tensor(library, grad)], [held], tensor_cores=tensor_cores)
        errors.append(float(np.sqrt(np.mean((inside(config, held.numpy(), numel) - expected) ** 2))))
    assert errors[1] <= factor * errors[0]


@pytest.mark.parametrize("mapping", [NARROW, WIDE])
def test_tensors_of_a_group_in_one_launch(kernels: Kernels, mapping: int) -> None:
    config, library, rng = Config(8, 2), kernels.library, np.random.default_rng(3)
    phi, sizes = random_phi(config, rng), [1, 64, 65, 0, 129, 7, 200]
    grads = [random_gradient((n,), rng) for n in sizes]
    states = [random_state(config, n, rng) for n in sizes]
    params = [rng.standard_normal(n).astype(np.float32) for n in sizes]
    targets, held = [Tensor(library, x) for x in params], [library.array(x) for x in states]
    library.reset_counters()
    sources = [Tensor(library, x) for x in grads]
    kernels.step(config, phi, targets, sources, held, mapping=mapping, tensor_cores=True)
    assert library.counter("launches") == 1 and ran_on_tensor_cores(kernels)
    for k, n in enumerate(sizes):
        if n:
            update, new_state = expected_step(config, phi, grads[k], states[k])
            assert_close(targets[k].numpy(), params[k] + update, TOLERANCE)
            assert_close(inside(config, held[k].numpy(), n), new_state, TOLERANCE)


def test_a_table_in_device_memory(kernels: Kernels) -> None:
    config, library, rng = Config(8, 1), kernels.library, np.random.default_rng(4)
    phi, grad = random_phi(config, rng), random_gradient((3,), rng)
    state = random_state(config, 3, rng)
    targets = [Tensor(library, np.zeros(3)) for _ in range(600)]
    held = [library.array(state) for _ in targets]
    kernels.step(config, phi, targets, [Tensor(library, grad)] * 600, held, tensor_cores=True)
    update, _ = expected_step(config, phi, grad, state)
    for target in targets:
        assert_close(target.numpy(), update, TOLERANCE)


@pytest.mark.parametrize("mapping", [NARROW, WIDE])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("config", [Config(), Config(8, 1, "identity")])
def test_a_bad_gradient_stays_in_its_coordinate(kernels: Kernels, config: Config, bad: float, mapping: int) -> None:
    """And infinities do there what they do in float32: they drive gates to an end, and make no NaN."""
    library, rng = kernels.library, np.random.default_rng(5)
    phi, grad, state = random_phi(config, rng), random_gradient((130,), rng), random_state(config, 130, rng)
    grad[70] = bad
    expected, plain = expected_step(config, phi, np.where(np.isfinite(grad), grad, np.float32(1)), state), []
    for tensor_cores in (False, True):
        target, held = Tensor(library, np.zeros(130)), library.array(state)
        options = {"mapping": mapping, "tensor_cores": tensor_cores}
        kernels.step(config, phi, [target], [Tensor(library, grad)], [held], **options)
        plain.append((target.numpy(), inside(config, held.numpy(), 130)))
    (update, new_state), (got, got_state) = plain
    assert_close(np.delete(got, 70), np.delete(expected[0], 70), TOLERANCE)
    rows, others = np.delete(np.arange(64), 6), [0, 2]
    assert_close(got_state[1][:, rows], expected[1][1][:, rows], TOLERANCE)
    assert_close(got_state[others], expected[1][others], TOLERANCE)
    assert np.isnan(got[70]) == np.isnan(bad)
    np.testing.assert_allclose(got[70], update[70], atol=TOLERANCE)
    np.testing.assert_allclose(got_state[1][:, 6], new_state[1][:, 6], atol=TOLERANCE)


def test_nan_in_the_state_stays_in_its_coordinate(kernels: Kernels) -> None:
    """In a tile's padding too, which may hold anything."""
    config, library, rng = Config(20, 2), kernels.library, np.random.default_rng(6)
    phi, grad, state = random_phi(config, rng), random_gradient((100,), rng), random_state(config, 100, rng)
    update, _ = expected_step(config, phi, grad, state)
    for place, value in ((36, np.nan), (40, np.inf), (63, 2.0**127), (11, np.uint32(0x7FFFFFFF).view(np.float32))):
        state[1 if place >= 36 else 0, :, place] = value
    target = Tensor(library, np.zeros(100))
    kernels.step(config, phi, [target], [Tensor(library, grad)], [library.array(state)], tensor_cores=True)
    got = target.numpy()
    assert np.isnan(got[11])
    assert_close(np.delete(got, 11), np.delete(update, 11), TOLERANCE)


@pytest.mark.parametrize(("param_dtype", "grad_dtype"), [(FLOAT32, BFLOAT16), (BFLOAT16, FLOAT16), (FLOAT16, FLOAT32)])
def test_dtypes_strides_maximize_and_record(kernels: Kernels, param_dtype: int, grad_dtype: int) -> None:
    config, library, rng, shape = Config(8, 1), kernels.library, np.random.default_rng(7), (3, 4, 5, 2)
    phi, state = random_phi(config, rng), random_state(config, 120, rng)
    grad = from_bits(to_bits(rng.standard_normal(shape), grad_dtype), grad_dtype)
    param = from_bits(to_bits(rng.standard_normal(shape), param_dtype), param_dtype)
    update, _ = expected_step(config, phi, -grad, state)
    target = Tensor(library, param, param_dtype, permutation=(0, 2, 3, 1), step=2, offset=1)
    source = Tensor(library, grad, grad_dtype, permutation=(3, 1, 0, 2))
    record = library.array(np.full(3 * TILE, np.nan, np.float32))
    options = {"records": [record.pointer + 4 * TILE], "lr": 0.5, "maximize": True, "tensor_cores": True}
    kernels.step(config, phi, [target], [source], [library.array(state)], **options)
    expected = param + 0.5 * update
    unit = {FLOAT32: 0.0, BFLOAT16: 2.0**-8, FLOAT16: 2.0**-11}[param_dtype]
    assert np.all(np.abs(target.numpy() - expected) <= unit * np.abs(expected) + TOLERANCE)
    written = record.numpy()
    assert np.isnan(written[:TILE]).all() and not written[TILE + 120 :].any()
    np.testing.assert_array_equal(written[TILE : TILE + 120], -grad.reshape(-1))


def test_functional_step_leaves_its_inputs(kernels: Kernels) -> None:
    config, library, rng = Config(), kernels.library, np.random.default_rng(8)
    phi, grad = random_phi(config, rng), random_gradient((7, 11), rng)
    state = random_state(config, grad.size, rng)
    update, new_state = expected_step(config, phi, grad, state)
    out, before = Tensor(library, np.full(grad.shape, np.nan)), library.array(state)
    after = library.array(np.full_like(state, np.nan))
    source = Tensor(library, grad)
    kernels.step(config, phi, [out], [source], [before], [after], in_place=False, tensor_cores=True)
    assert ran_on_tensor_cores(kernels)
    assert_close(out.numpy(), update, TOLERANCE)
    assert_close(inside(config, after.numpy(), grad.size), new_state, TOLERANCE)
    np.testing.assert_array_equal(before.numpy(), state)


def test_ten_steps_in_a_row(kernels: Kernels) -> None:
    """Errors do not build up."""
    config, library, rng = Config(), kernels.library, np.random.default_rng(9)
    phi, state = random_phi(config, rng), random_state(config, 100, rng)
    held, target = library.array(state), Tensor(library, np.zeros(100))
    total = np.zeros(100)
    for _ in range(10):
        grad = random_gradient((100,), rng)
        kernels.step(config, phi, [target], [Tensor(library, grad)], [held], tensor_cores=True)
        update, state = expected_step(config, phi, grad, state)
        total += update
    assert_close(target.numpy(), total, 5 * TOLERANCE)
    assert_close(inside(config, held.numpy(), 100), blocked(logical(config, state, 100)), 5 * TOLERANCE)


def test_the_mapping_follows_the_number_of_tiles(kernels: Kernels) -> None:
    """Six tiles per multiprocessor: a block has two of the wide mapping, and three are resident."""
    check(kernels, Config(8, 1), 5 * TILE)
    assert "<8, 2, " in kernels.library.launch_log()[-1]
    check(kernels, Config(8, 1), 6 * TILE)
    assert "<8, 4, " in kernels.library.launch_log()[-1]


def fp32_ran(kernels: Kernels, config: Config) -> bool:
    """Asks for tensor cores; whether the step was right, and that of the other kernel."""
    rng, library = np.random.default_rng(10), kernels.library
    phi, grad, state = random_phi(config, rng), random_gradient((70,), rng), random_state(config, 70, rng)
    target = Tensor(library, np.zeros(70))
    kernels.step(config, phi, [target], [Tensor(library, grad)], [library.array(state)], tensor_cores=True)
    assert_close(target.numpy(), expected_step(config, phi, grad, state)[0])
    return not ran_on_tensor_cores(kernels)


def test_networks_and_devices_without_the_kernel_take_the_other(kernels: Kernels, tmp_path: Path) -> None:
    assert fp32_ran(kernels, Config(4, 1))
    assert not fp32_ran(kernels, Config(8, 1))
    # What a library has learnt of its device it keeps: a library of its own.
    copy = shutil.copy(compile_kernels([SOURCE], flags=SHORT_FLAGS), tmp_path / "old_device.so")
    old = Kernels(Library(copy))
    old.library.set_device("sm_75,multiprocessors=1")
    assert fp32_ran(old, Config(8, 1))


@pytest.mark.slow
def test_code_for_older_devices_on_a_newer_one_takes_the_other_kernel() -> None:
    """A GPU runs the code of the architecture below its own that the build has, if only as PTX."""
    sizes = ("-DL2L_CUDA_HIDDEN_SIZES(X)=X(8)", "-DL2L_CUDA_LAYERS(X)=X(1)", "-DCUDA_ON_HOST_ARCH=750")
    old = Kernels(Library.build([SOURCE], flags=sizes))
    old.library.set_device("sm_90,multiprocessors=1")
    assert fp32_ran(old, Config(8, 1))
