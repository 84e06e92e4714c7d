"""Runs the kernels in a process of its own whose library is instrumented: ``python -m ... SANITIZER SEED [--full]``.

Prints a digest of the results, which the caller compares with those of the plain build.
"""

from __future__ import annotations

import hashlib
import sys
from itertools import product

import numpy as np

from tests.cuda_on_host.kernels import (
    BFLOAT16,
    FLOAT16,
    NARROW,
    SHORT_FLAGS,
    SOURCE,
    TILE,
    WIDE,
    Config,
    Kernels,
    StoredSegment,
    StoredStep,
    Tensor,
)
from tests.cuda_on_host.library import Library
from tests.cuda_on_host.normalized_kernels import Network, NormalizedKernels

#: Of 4 blocks of 64 threads at a time, or 8 of 32: some have a second tile.
DEVICE = "sm_90,multiprocessors=1,registers=255"


def phi_size(config: Config) -> int:
    hidden = config.hidden_size
    inputs = [2 if config.preprocess == "log_sign" else 1] + [hidden] * (config.num_layers - 1)
    return sum(4 * hidden * (n + hidden + 1) for n in inputs) + hidden + 1


def exercise(kernels: Kernels, full: bool) -> str:
    """Every kernel on a few tensors; returns a digest of all results."""
    library, digest = kernels.library, hashlib.sha256()
    rng = np.random.default_rng(0)
    configs = [Config(8, 2), Config(8, 1, "identity"), Config(4, 2)] + ([Config(20, 2)] if full else [])
    for config in configs:
        phi = (rng.standard_normal(phi_size(config)) * 0.3).astype(np.float32)
        shapes = [(1,), (65,), (5, 9)]
        numels = [int(np.prod(shape)) for shape in shapes]
        tiles = [-(-numel // TILE) for numel in numels]
        states = [rng.uniform(-1, 1, (n, config.rows, TILE)).astype(np.float32) for n in tiles]
        for mapping, tensor_cores in product((NARROW, WIDE), (False, True)):
            values = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
            params = [Tensor(library, v, BFLOAT16, offset=1) for v in values]
            grads = [Tensor(library, v, FLOAT16, permutation=tuple(reversed(range(v.ndim)))) for v in values]
            held = [library.array(state) for state in states]
            record = library.array(np.zeros(sum(tiles) * TILE, np.float32))
            addresses = [record.pointer + 4 * TILE * sum(tiles[:k]) for k in range(len(tiles))]
            options = {"records": addresses, "mapping": mapping, "tensor_cores": tensor_cores}
            kernels.step(config, phi, params, grads, held, **options)
            for result in [*params, *held, record]:
                digest.update(result.numpy().tobytes())
        records = [rng.standard_normal(sum(tiles) * TILE).astype(np.float32) for _ in range(4)]
        starts = [sum(tiles[:k]) for k in range(len(tiles))]
        for budget in (0, 1):
            coefficients = ([1.0] * 3, [0.5] * 3, [0.9] * 3)
            grad_phi, grads_start = kernels.segment_backward(
                config, phi, states, numels, starts, records, *coefficients, states, scratch_budget=budget
            )
            for array in [grad_phi, *grads_start]:
                digest.update(array.tobytes())
        for dtype in (0, FLOAT16):
            grad = Tensor(library, rng.standard_normal((7, 10)), dtype, permutation=(1, 0))
            update = rng.standard_normal((7, 10)).astype(np.float32)
            state = rng.uniform(-1, 1, (2, config.rows, TILE)).astype(np.float32)
            for array in kernels.step_backward(config, phi, grad, update, state, state):
                digest.update(array.tobytes())
    for sizes in [(8, 2, 3), (8, 1, 0), (4, 1, 3)] + ([(20, 2, 15)] if full else []):
        exercise_normalized(library, sizes, rng, digest)
    return digest.hexdigest()


def exercise_normalized(library: Library, sizes: tuple[int, int, int], rng: np.random.Generator, digest) -> None:
    """Networks with averages, K inputs per tensor."""
    hidden, layers, inputs = sizes
    size = phi_size(Config(hidden, layers)) + 4 * hidden * 3 + hidden + 1 + 4 * hidden * inputs
    net, kernels = Network(*sizes, (rng.standard_normal(size) * 0.3).astype(np.float32)), NormalizedKernels(library)
    numels, tiles, steps, rows = [1, 65, 109], [1, 2, 2], 3, 2 * layers * hidden + 4
    states = [rng.uniform(0.1, 1, (n, rows, TILE)).astype(np.float32) for n in tiles]
    told = rng.standard_normal((steps, 3, inputs)) if inputs else None, rng.uniform(0, 1, (steps, 3, 5))
    first = [None if each is None else each[0] for each in told]
    for mapping in (NARROW, WIDE):
        values = [rng.standard_normal(n).astype(np.float32) for n in numels]
        params, grads = ([Tensor(library, v, dtype) for v in values] for dtype in (BFLOAT16, FLOAT16))
        held = [library.array(state) for state in states]
        kernels.step(net, params, grads, held, [1, 2, 3], *first, mapping=mapping)
        for result in [*params, *held]:
            digest.update(result.numpy().tobytes())
    records = [rng.standard_normal(sum(tiles) * TILE).astype(np.float32) for _ in range(steps + 1)]
    for budget in (0, 1):
        coefficients = ([1.0] * steps, [0.5] * steps, [0.9] * steps)
        segment = StoredSegment(library, states, numels, [0, 1, 3], records, *coefficients, states)
        grad_phi, grads_start = kernels.segment_backward(net, segment, [1, 2, 3], *told, budget)
        for array in [grad_phi, *grads_start]:
            digest.update(array.tobytes())
    grad = Tensor(library, rng.standard_normal(70), FLOAT16)
    step = StoredStep(library, grad, rng.standard_normal(70), states[1], states[1])
    for array in kernels.step_backward(net, step, 4, *(None if each is None else each[1] for each in first)):
        digest.update(array.tobytes())


def load(sanitizer: str) -> Kernels:
    library = Library.build([SOURCE], sanitizer=sanitizer, flags=SHORT_FLAGS)
    library.set_device(DEVICE)
    return Kernels(library)


if __name__ == "__main__":
    name, seed = sys.argv[1], int(sys.argv[2])
    kernels = load(name)
    with kernels.library.seed(seed):
        print("digest", exercise(kernels, "--full" in sys.argv))
