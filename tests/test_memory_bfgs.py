"""With hand-set heads the memory is BFGS: its inverse Hessian, and its iterates (appendix D of the paper)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from l2l_fast.networks.memory import DenseMemory, LowRankMemory, Memory

N, PROBLEMS = 8, 5
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
# Rounding errors grow with it from step to step, in any implementation of BFGS.
CONDITION = {torch.float64: 100.0, torch.float32: 20.0}


def quadratics(dtype, condition):
    """Hessians ``[PROBLEMS, N, N]``, linear terms and starts ``[PROBLEMS, N]``."""
    generator = torch.Generator().manual_seed(3)
    q, _ = torch.linalg.qr(torch.randn(PROBLEMS, N, N, generator=generator, dtype=torch.float64))
    eigenvalues = torch.logspace(0, -torch.tensor(condition).log10().item(), N, dtype=torch.float64)
    hessian = (q * eigenvalues) @ q.mT
    vectors = torch.randn(2, PROBLEMS, N, generator=generator, dtype=torch.float64)
    return hessian.to(dtype), vectors[0].to(dtype), vectors[1].to(dtype)


def make_memory(kind: str, dtype, functional_history=40) -> Memory:
    if kind == "dense":
        return DenseMemory.create(N, PROBLEMS, 1, "identity", "cpu", dtype)
    return LowRankMemory.create(N, PROBLEMS, 1, 3, functional_history, "identity", "cpu", dtype)


def write_heads(s: Tensor, y: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """What a controller would have to emit: three outer products from s, y, u = M y and two inner products."""
    rho = 1.0 / (y * s).sum(-1, keepdim=True)
    a = torch.stack([s, u, s])
    b = torch.stack([-rho * u, -rho * s, (rho + rho**2 * (y * u).sum(-1, keepdim=True)) * s])
    return a, b


def textbook_update(inverse: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """Nocedal and Wright, Numerical Optimization, equation 6.17: (I - rho s y^T) H (I - rho y s^T) + rho s s^T."""
    rho = 1.0 / (y * s).sum(-1)[:, None, None]
    left = torch.eye(N, dtype=s.dtype) - rho * s[:, :, None] * y[:, None, :]
    return left @ inverse @ left.mT + rho * s[:, :, None] * s[:, None, :]


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "functional"])
@pytest.mark.parametrize("kind", ["dense", "low_rank"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_hand_set_heads_reproduce_bfgs_with_exact_line_search(dtype, kind, in_place):
    hessian, linear, theta = quadratics(dtype, CONDITION[dtype])
    memory = make_memory(kind, dtype)
    exact_hessian, exact_linear, exact_theta = quadratics(torch.float64, CONDITION[dtype])
    inverse = torch.eye(N, dtype=torch.float64).expand(PROBLEMS, N, N)
    start = (exact_hessian @ exact_theta[..., None]).squeeze(-1) - exact_linear
    for _ in range(N - 1):  # after N steps the gradient is rounding error
        g = (hessian @ theta[..., None]).squeeze(-1) - linear
        direction = -memory.read(g[None])[0]
        length = -(g * direction).sum(-1) / (direction * (hessian @ direction[..., None]).squeeze(-1)).sum(-1)
        s = length[:, None] * direction
        y = (hessian @ s[..., None]).squeeze(-1)
        a, b = write_heads(s, y, memory.read(y[None])[0])
        if in_place:
            memory.write_(a, b, memory.reads)
        else:
            memory = memory.write(a, b, memory.reads)
        theta = theta + s

        exact_g = (exact_hessian @ exact_theta[..., None]).squeeze(-1) - exact_linear
        exact_d = -(inverse @ exact_g[..., None]).squeeze(-1)
        curvature = (exact_d * (exact_hessian @ exact_d[..., None]).squeeze(-1)).sum(-1)
        exact_s = (-(exact_g * exact_d).sum(-1) / curvature)[:, None] * exact_d
        exact_theta = exact_theta + exact_s
        inverse = textbook_update(inverse, exact_s, (exact_hessian @ exact_s[..., None]).squeeze(-1))
        error = (theta.double() - exact_theta).norm() / exact_theta.norm()
        assert error < TOLERANCE[dtype], f"iterates: {error:.1e}"
    identity = torch.eye(N, dtype=dtype)[:, None, :].expand(N, PROBLEMS, N)
    matrix = torch.stack([memory.read(e[None])[0] for e in identity], dim=-1)
    assert (matrix.double() - inverse).norm() / inverse.norm() < TOLERANCE[dtype]
    g = (exact_hessian @ exact_theta[..., None]).squeeze(-1) - exact_linear
    assert g.norm() < 0.2 * start.norm()  # and it does optimise


def scipy_iterates(optimize, hessian, linear, start):
    iterates = [start]
    optimize.minimize(
        lambda x: 0.5 * x @ hessian @ x - linear @ x,
        start,
        jac=lambda x: hessian @ x - linear,
        method="BFGS",
        callback=lambda x: iterates.append(x.copy()),
        options={"gtol": 1e-4, "maxiter": 12},
    )
    return iterates


@pytest.mark.parametrize("kind", ["dense", "low_rank"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_iterates_are_those_of_scipy(dtype, kind):
    """scipy's BFGS chooses the step lengths (Wolfe line search), the memory the directions."""
    optimize = pytest.importorskip("scipy.optimize")
    hessian, linear, start = quadratics(torch.float64, 100.0)
    for problem in range(PROBLEMS):
        iterates = scipy_iterates(optimize, hessian[problem].numpy(), linear[problem].numpy(), start[problem].numpy())
        assert len(iterates) > 5
        path = torch.stack([torch.from_numpy(x) for x in iterates])
        memory = make_memory(kind, dtype)
        theta = start[problem].to(dtype)
        for k in range(len(path) - 1):
            g = hessian[problem].to(dtype) @ theta - linear[problem].to(dtype)
            r = g.expand(1, PROBLEMS, N)
            direction = -memory.read(r)[0, 0]
            step = path[k + 1] - path[k]
            length = (step.norm() / direction.double().norm()).item()
            s = length * direction
            y = hessian[problem].to(dtype) @ s
            u = memory.read(y.expand(1, PROBLEMS, N))[0]
            memory.write_(*write_heads(s.expand(PROBLEMS, N), y.expand(PROBLEMS, N), u), memory.reads)
            theta = theta + s
            error = (theta.double() - path[k + 1]).norm() / path[k + 1].norm()
            assert error < TOLERANCE[dtype], f"problem {problem}, iterate {k + 1}: {error:.1e}"
