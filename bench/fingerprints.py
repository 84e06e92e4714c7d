"""Fingerprints of results, to tell whether a change of the code changed a single bit.

    python -m bench.fingerprints before.json                      # in one tree, or before a change
    python -m bench.fingerprints after.json --against before.json

For every instruction set of the machine: the functional step and its gradients, steps and segments of LearnedOptimizer,
for plain and communicating networks, extra inputs, several outputs and the shipped optimizers, in four dtypes, and
orthogonalized matrices; then evaluations on three tasks of the experiments that need no other data than the package
has, and two short meta-trainings. Of torch's own arithmetic some depends on the number of threads: one is used.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import l2l_fast as l2l
from l2l_fast import _C
from l2l_fast.kernels import operators as ops

SIZES = (0, 1, 63, 64, 65, 1000, 20001)
SHAPES = ((1,), (63,), (64,), (65,), (10, 20, 3), (130, 7), (0, 3), ())
MATRICES = ((1, 1), (10, 784), (64, 64), (130, 17), (300, 310))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EXPERIMENTS = {"quadratic-uniform": "quadratic", "quadratic-gaussian": "quadratic-gaussian", "mnist": "mnist-mlp"}
EMBEDDED = {"mnist": "mnist-10k-embedded"}
NETWORKS = {
    "plain": {},
    "one-layer": {"hidden_size": 8, "num_layers": 1, "preprocess": "identity", "output_scale": 1.0},
    "wide": {"hidden_size": 32, "num_layers": 3},
    "odd": {"hidden_size": 13},
    "gac": {"gac_cells": 5},
    "all-cells": {"hidden_size": 16, "preprocess": "identity", "gac_cells": 16},
    "extra": {"extra_inputs": 3, "num_outputs": 2},
    "gac-extra": {"gac_cells": 3, "extra_inputs": 3, "num_outputs": 4},
}


def fingerprint(*tensors: Tensor | None) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            digest.update(b"none")
            continue
        values = tensor.detach().contiguous()
        digest.update(str((tuple(values.shape), values.dtype)).encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def of_coordinates(state: l2l.State) -> Tensor:
    """What a state holds, without the padding of its tiles: that may be anything."""
    return state.data.transpose(1, 2).reshape(-1, state.data.shape[1])[: state.numel]


def networks() -> Iterator[tuple[str, l2l.CoordinatewiseLSTM]]:
    for name, options in NETWORKS.items():
        torch.manual_seed(0)
        yield name, l2l.CoordinatewiseLSTM(**options)
    for name in dict.fromkeys(EXPERIMENTS.values()):
        yield name, l2l.load_pretrained(name)


def functional(net: l2l.CoordinatewiseLSTM, n: int, dtype: torch.dtype, random: torch.Generator) -> dict[str, str]:
    """Two steps, and the gradients through both."""
    grad = torch.randn(n, generator=random) * torch.exp(4 * torch.randn(n, generator=random))
    grad = grad.to(dtype).requires_grad_()
    extra = torch.randn(net.extra_inputs, n, generator=random).requires_grad_() if net.extra_inputs else None
    first, state = net(grad, net.init_state(n), extra=extra)
    second, last = net(grad * 0.5, state, extra=extra)
    weights = torch.randn(second.shape, generator=random).to(second.dtype)
    loss = ((first + second) * weights).float().sum() + (of_coordinates(last) * 0.01).sum()
    inputs = [grad, *([] if extra is None else [extra]), *net.parameters()]
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    of_inputs = len(inputs) - len(list(net.parameters()))
    steps = fingerprint(first, of_coordinates(state), second, of_coordinates(last))
    return {"": steps, "/d inputs": fingerprint(*grads[:of_inputs]), "/d phi": fingerprint(*grads[of_inputs:])}


def unrolled(optimizer: l2l.LearnedOptimizer, steps: int, random: torch.Generator) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    optimizer.start_segment()
    for t in range(steps + 1):
        for param in params:
            param.grad = torch.randn(param.shape, generator=random).to(param.dtype)
        if t < steps:
            optimizer.step()
    optimizer.backward_segment([1.0 + 0.1 * t for t in range(steps)])


def deployed(net: l2l.CoordinatewiseLSTM, dtype: torch.dtype, random: torch.Generator) -> dict[str, str]:
    """Two segments, one longer than a chunk, over tensors of many shapes and layouts."""
    tensors = [torch.randn(shape, generator=random).to(dtype) for shape in SHAPES]
    tensors.append(torch.randn(4, 6, 5, 5, generator=random).to(dtype).to(memory_format=torch.channels_last))
    tensors.append(torch.randn(30, 40, generator=random).to(dtype).t())
    params = [nn.Parameter(tensor) for tensor in tensors]
    optimizer = l2l.LearnedOptimizer(params, net, lr=0.7, weight_decay=0.01)
    net.zero_grad()
    for steps in (4, 23):
        unrolled(optimizer, steps, random)
    states = [optimizer.state_of(param) for param in params]
    steps = fingerprint(*params, *[of_coordinates(s) for s in states if s is not None])
    return {"": steps, "/d phi": fingerprint(*[p.grad for p in net.parameters()])}


def of_kernels() -> dict[str, str]:
    found = {}
    for name, net in networks():
        random = torch.Generator().manual_seed(1)
        for dtype in DTYPES[:2]:
            for n in SIZES:
                key = f"{name}/functional/{dtype}/{n}"
                found.update({f"{key}{part}": value for part, value in functional(net, n, dtype, random).items()})
        if net.extra_inputs:
            continue
        for dtype in DTYPES:
            key = f"{name}/deployed/{dtype}"
            found.update({f"{key}{part}": value for part, value in deployed(net, dtype, random).items()})
        large = nn.Parameter(torch.randn(300_007, generator=random))
        net.zero_grad()
        unrolled(l2l.LearnedOptimizer([large], net), 5, random)
        found[f"{name}/large"] = fingerprint(large)
        found[f"{name}/large/d phi"] = fingerprint(*[p.grad for p in net.parameters()])
    random = torch.Generator().manual_seed(5)
    torch.manual_seed(3)
    net, memory = l2l.CoordinatewiseLSTM(gac_cells=4), l2l.NTMBFGS()
    params = [nn.Parameter(torch.randn(12, n, generator=random)) for n in (33, 5)]
    unrolled(l2l.LearnedOptimizer([{"params": params, "num_problems": 12}], net), 7, random)
    found["several problems"] = fingerprint(*params)
    found["several problems/d phi"] = fingerprint(*[p.grad for p in net.parameters()])
    param = nn.Parameter(torch.randn(50, generator=random))
    optimizer = l2l.LearnedOptimizer([param], memory)
    for _ in range(9):
        param.grad = torch.randn(50, generator=random)
        optimizer.step()
    found["memory"] = fingerprint(param)
    for shape in MATRICES:
        matrices = torch.randn(3, *shape, generator=random)
        found[f"orthogonalized/{shape}"] = fingerprint(ops.orthogonalized(matrices))
    return found


def of_training() -> dict[str, str]:
    found = {}
    for name, shipped in EXPERIMENTS.items():
        experiment, net = l2l.experiments.load(name), l2l.load_pretrained(shipped)
        for setting in experiment.settings:
            problem = experiment.problem_of(setting, EMBEDDED.get(name))
            curves = l2l.meta.evaluate(net, problem, range(3), min(setting.horizon, 100))
            found[f"evaluate/{name}/{setting.name}"] = fingerprint(curves)
    for name, options in (("quadratic", {}), ("mnist", {"data": EMBEDDED["mnist"]})):
        torch.manual_seed(0)
        net = l2l.CoordinatewiseLSTM(gac_cells=4 if name == "mnist" else 0)
        trainer = l2l.MetaTrainer(net, l2l.problems.get(name, **options), horizon=20, unroll=10, seed=1)
        trainer.fit(3, progress=False)
        found[f"train/{name}"] = fingerprint(*net.parameters())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path, help="fingerprints of the other tree; exit code 1 if one differs")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {}
    for isa in _C.isa_available():
        _C.set_isa(isa)
        found.update({f"{isa}/{key}": value for key, value in of_kernels().items()})
        print(f"{isa}: {len(found)} fingerprints so far", flush=True)
    found.update(of_training())
    arguments.out.write_text(json.dumps(found, indent=0, sort_keys=True))
    print(f"{len(found)} fingerprints: {arguments.out}")
    if arguments.against is None:
        return 0
    before = json.loads(arguments.against.read_text())
    differing = [key for key in before if found.get(key) != before[key]]
    print(f"{len(differing)} of {len(before)} differ {differing[:20]}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
