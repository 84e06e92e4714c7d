"""Runs the kernels in a process of its own whose library is instrumented: ``python -m ... SANITIZER SEED [--full]``.

Prints a digest of the results, which the caller compares with those of the plain build.
"""

from __future__ import annotations

import hashlib
import sys

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
    Tensor,
)
from tests.cuda_on_host.library import Library


def phi_size(config: Config) -> int:
    hidden = config.hidden_size
    inputs = [2 if config.preprocess == "log_sign" else 1] + [hidden] * (config.num_layers - 1)
    return sum(4 * hidden * (n + hidden + 1) for n in inputs) + hidden + 1


def exercise(kernels: Kernels, full: bool) -> str:
    """Every kernel on a few tensors; returns a digest of all results."""
    library, digest = kernels.library, hashlib.sha256()
    rng = np.random.default_rng(0)
    configs = [Config(8, 2), Config(8, 1, "identity")] + ([Config(20, 2)] if full else [])
    for config in configs:
        phi = (rng.standard_normal(phi_size(config)) * 0.3).astype(np.float32)
        shapes = [(1,), (65,), (5, 9)]
        numels = [int(np.prod(shape)) for shape in shapes]
        tiles = [-(-numel // TILE) for numel in numels]
        states = [rng.uniform(-1, 1, (n, config.rows, TILE)).astype(np.float32) for n in tiles]
        for mapping in (NARROW, WIDE):
            values = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
            params = [Tensor(library, v, BFLOAT16, offset=1) for v in values]
            grads = [Tensor(library, v, FLOAT16, permutation=tuple(reversed(range(v.ndim)))) for v in values]
            held = [library.array(state) for state in states]
            record = library.array(np.zeros(sum(tiles) * TILE, np.float32))
            addresses = [record.pointer + 4 * TILE * sum(tiles[:k]) for k in range(len(tiles))]
            kernels.step(config, phi, params, grads, held, records=addresses, mapping=mapping)
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
    return digest.hexdigest()


def load(sanitizer: str) -> Kernels:
    library = Library.build([SOURCE], sanitizer=sanitizer, flags=SHORT_FLAGS)
    library.set_device("sm_90,multiprocessors=1")
    return Kernels(library)


if __name__ == "__main__":
    name, seed = sys.argv[1], int(sys.argv[2])
    kernels = load(name)
    with kernels.library.seed(seed):
        print("digest", exercise(kernels, "--full" in sys.argv))
