"""Muon: its matrices against plain float64 and torch.optim.Muon, its other tensors against torch's Adam."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from l2l_fast.evaluation import baselines
from l2l_fast.evaluation.baselines.muon import Muon, matrix_shape
from l2l_fast.problems import ModuleProblem, Quadratic
from tests.search_helpers import Bowl


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def draw(params: list[nn.Parameter], seed: int) -> None:
    """The same gradients for lists of the same shapes."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Jordan et al. 2024, on one matrix."""
    x = matrix / matrix.norm()
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


@pytest.mark.parametrize(
    "shape, expected",
    {
        (): None, (5,): None, (5, 1): None, (1, 5): None, (2, 2): (2, 2), (2, 0): None, (0, 2): None,
        (64, 63): (64, 63), (8, 1, 3, 3): (8, 9), (1, 4, 3, 3): None, (4, 1, 1, 1): None, (3, 2, 1): (3, 2),
    }.items(),
)  # fmt: skip
def test_what_is_a_matrix(shape, expected):
    assert matrix_shape(torch.Size(shape)) == expected


def test_matrices_move_by_orthogonalized_nesterov_momentum():
    # Two of one shape and a kernel that flattens to it are one stack; the rate changes as a schedule changes it.
    params = parameters((6, 9), (6, 9), (6, 1, 3, 3), (9, 6), (2, 2), (65, 64), dtype=torch.float64)
    expected, buffers = [p.detach().clone() for p in params], [torch.zeros_like(p) for p in params]
    optimizer = Muon(params, lr=0.01)
    for step, lr in enumerate((0.01, 0.02, 0.003)):
        draw(params, step)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        for p, theta, b in zip(params, expected, buffers):
            b.mul_(0.95).add_(p.grad)
            matrix = (p.grad + 0.95 * b).reshape(p.shape[0], -1)
            theta -= lr * 0.2 * math.sqrt(max(matrix.shape)) * newton_schulz(matrix).reshape(p.shape)
            torch.testing.assert_close(p.detach(), theta, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shape", [(10, 10), (64, 63), (40, 196), (196, 40)])
def test_matrices_move_as_those_of_torch_optim_muon(shape):
    """Within the rounding of its bfloat16: its momentum is 0.05 times ours, which orthogonalizing takes out again."""
    (mine,), (theirs,) = parameters(shape), parameters(shape)
    one = Muon([mine], lr=0.02)
    other = torch.optim.Muon(
        [theirs], lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(10):
        before, before_theirs = mine.detach().clone(), theirs.detach().clone()
        for params, optimizer in (([mine], one), ([theirs], other)):
            draw(params, step)
            optimizer.step()
        moved, expected = mine.detach() - before, theirs.detach() - before_theirs
        assert (moved - expected).norm() < 0.03 * expected.norm(), step


def test_all_other_tensors_move_as_by_adam():
    shapes = [(), (1,), (65,), (5, 1), (1, 64), (1, 4, 3, 3), (0,)]
    mine, theirs = parameters(*shapes, (4, 4)), parameters(*shapes)
    one, other = Muon(mine, lr=0.01), torch.optim.Adam(theirs, lr=0.01, fused=True)
    for step in range(5):
        draw(mine, step)
        draw(theirs, step)
        for optimizer in (one, other):
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
            optimizer.step()
    for p, q in zip(mine, theirs):
        assert torch.equal(p, q)


def test_parameters_are_where_they_were_without_a_gradient():
    params = parameters((4, 4), (4,), (4, 4), (4,))
    before = [p.detach().clone() for p in params]
    optimizer = Muon(params, lr=0.01)
    draw(params[:2], 0)
    optimizer.step()
    assert [torch.equal(p, q) for p, q in zip(params, before)] == [False, False, True, True]
    assert set(optimizer.state) == set(params[:2])


def test_a_gradient_of_zero_moves_no_matrix():
    (p,) = parameters((4, 4))
    before, p.grad = p.detach().clone(), torch.zeros(4, 4)
    Muon([p], lr=0.01).step()
    assert torch.equal(p, before)


def test_groups_have_rates_of_their_own():
    shapes = [(4, 6), (5,)]
    for which in (0, 1):
        together, alone = parameters(*shapes, *shapes), parameters(*shapes, *shapes)
        optimizer = Muon([{"params": together[:2], "lr": 0.1}, {"params": together[2:]}], lr=0.01)
        single = Muon(alone[2 * which : 2 * which + 2], lr=(0.1, 0.01)[which])
        for step in range(3):
            draw(together, step)
            draw(alone, step)
            optimizer.step()
            single.step()
        for k in (2 * which, 2 * which + 1):
            assert torch.equal(together[k], alone[k])


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_a_copy_goes_on_as_the_optimizer_does(how):
    mine = parameters((4, 6), (5,), (3, 1, 2, 2))
    one = Muon(mine, lr=0.01)
    for step in range(3):
        draw(mine, step)
        one.step()
    if how == "state_dict":
        theirs = copy.deepcopy(mine)
        other = Muon(theirs, lr=0.5)
        other.load_state_dict(copy.deepcopy(one.state_dict()))
    else:
        other = copy.deepcopy(one) if how == "deepcopy" else pickle.loads(pickle.dumps(one))
        theirs = other.param_groups[0]["params"]
    for step in range(3, 6):
        for params, optimizer in ((mine, one), (theirs, other)):
            draw(params, step)
            optimizer.step()
    for p, q in zip(mine, theirs):
        assert p is not q and torch.equal(p, q)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_low_precision_is_orthogonalized_in_float32(dtype, tolerance):
    # From zero, so that what is compared is the update, but for the rounding of momentum and parameter.
    mine, exact = nn.Parameter(torch.zeros(8, 12, dtype=dtype)), nn.Parameter(torch.zeros(8, 12, dtype=torch.float64))
    draw([mine], 0)
    exact.grad = mine.grad.double()
    for p in (mine, exact):
        Muon([p], lr=0.1).step()
    assert mine.dtype == dtype
    assert (mine.double() - exact).norm() < tolerance * exact.norm()


def test_memory_formats_do_not_matter():
    (plain,), (last,) = parameters((4, 3, 2, 2)), parameters((4, 3, 2, 2))
    last = nn.Parameter(last.detach().contiguous(memory_format=torch.channels_last))
    for p in (plain, last):
        optimizer = Muon([p], lr=0.1)
        for step in range(3):
            draw([p], step)
            optimizer.step()
    assert torch.equal(plain, last) and last.is_contiguous(memory_format=torch.channels_last)


def test_a_closure_is_called_with_gradients_enabled():
    params = parameters((4, 4), (4,))
    optimizer = Muon(params, lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss.detach()

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first and Muon(params).step() is None


@pytest.mark.parametrize(
    "lr, error, words",
    [(-0.1, ValueError, "lr must be at least 0"), (math.nan, ValueError, "finite, got nan"), ("x", TypeError, "'x'")],
)
def test_a_rate_that_is_none(lr, error, words):
    with pytest.raises(error, match=words):
        Muon(parameters((2, 2)), lr=lr)


def test_sparse_and_complex_gradients_are_refused_before_anything_moves():
    dense, sparse = parameters((3, 4), (3, 4))
    complex_one = nn.Parameter(torch.zeros(3, 4, dtype=torch.complex64))
    sparse.grad, complex_one.grad = torch.ones(3, 4).to_sparse(), torch.ones_like(complex_one)
    for refused, words in ((sparse, "torch.sparse_coo.* \\[3, 4\\]"), (complex_one, "complex64")):
        dense.grad, before = torch.ones(3, 4), dense.detach().clone()
        with pytest.raises(TypeError, match=f"expected dense real gradients, got one of .*{words}"):
            Muon([dense, refused], lr=0.1).step()
        assert torch.equal(dense, before)


def test_it_is_a_rule_that_a_search_can_tune():
    made = baselines.make_optimizer("muon", parameters((2, 2)), 0.01)
    assert type(made) is Muon and made.param_groups[0]["lr"] == 0.01 and "muon" not in baselines.NAMES
    with pytest.raises(ValueError, match="options: muon has none, got 'momentum'"):
        baselines.make_optimizer("muon", parameters((2, 2)), 0.01, momentum=0.9)
    # Its only tensor is no matrix: there it is Adam.
    bowl = ModuleProblem(lambda generator: Bowl(), lambda module, generator: (module.x - 3).square().sum(), name="bowl")
    options = {"seeds": [0], "schedules": ["constant"], "points_per_decade": 2}
    found = baselines.search(bowl, "muon", 20, **options)
    adam = baselines.search(bowl, "adam", 20, options={}, **options)
    assert (found.lr, found.final, found.options) == (adam.lr, adam.final, {})
    problem = Quadratic(dim=4, batch=3)
    losses = baselines.run(problem, "muon", 0.1, [0], 20)
    assert losses[0, -1] < losses[0, 0] and not torch.equal(losses, baselines.run(problem, "adam", 0.1, [0], 20))
