"""Baselines: Torch7's update rules, the learning-rate search, and the known results on random quadratics."""

import math

import pytest
import torch
from torch import nn

from l2l_fast.evaluation import baselines
from l2l_fast.problems import ModuleProblem, Quadratic


@pytest.fixture(autouse=True)
def one_thread():
    # Many small parallel regions stall where other processes keep the cores busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trajectory(name: str, lr: float, gradient, start: float, steps: int) -> list[float]:
    """Torch7's ``optim`` rules on one number: the points at which f is reported."""
    x, points = start, []
    velocity = mean = square = 0.0
    for t in range(1, steps + 1):
        look_ahead = x + 0.9 * velocity if name == "nag" else x
        points.append(look_ahead)
        g = gradient(look_ahead)
        if name == "sgd":
            x -= lr * g
        elif name == "nag":
            velocity = 0.9 * velocity - lr * g
            x += velocity
        elif name == "rmsprop":
            square = 0.99 * square + 0.01 * g * g
            x -= lr * g / (math.sqrt(square) + 1e-8)
        else:
            mean = 0.9 * mean + 0.1 * g
            square = 0.999 * square + 0.001 * g * g
            x -= lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * mean / (math.sqrt(square) + 1e-8)
    return points


class Bowl(nn.Module):
    """f(x) = (x - 3)^2 + sin x, in double precision from x = 0.5."""

    def __init__(self, start: float = 0.5) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([start], dtype=torch.float64))


def bowl_loss(module: nn.Module, generator: torch.Generator) -> torch.Tensor:
    return ((module.x - 3) ** 2 + torch.sin(module.x)).sum()


bowl = ModuleProblem(lambda generator: Bowl(), bowl_loss, name="bowl")


@pytest.mark.parametrize("name", baselines.NAMES)
def test_update_rules_are_those_of_torch7(name) -> None:
    losses = baselines.run(bowl, name, 0.05, [0], 29)
    points = trajectory(name, 0.05, lambda x: 2 * (x - 3) + math.cos(x), 0.5, 30)
    expected = torch.tensor([(x - 3) ** 2 + math.sin(x) for x in points], dtype=torch.float64)
    assert losses.shape == (1, 30)
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses[0], expected, rtol=1e-6, atol=1e-9)


# The published curves and their reproductions; a single task holds many problems, so that the means are sharp.
@pytest.mark.parametrize(
    ("name", "lr", "low", "high"),
    [("sgd", 0.0165, 0.212, 0.221), ("nag", 0.0145, 0.079, 0.086), ("nag", 0.0165, 0.078, 0.083)],
)
def test_uniform_quadratics_end_where_the_paper_does(name, lr, low, high) -> None:
    losses = baselines.run(Quadratic(batch=8192), name, lr, [0], 100)
    assert losses[0, 0].item() == pytest.approx(3.33, abs=0.05)
    assert low < losses[0, 100].item() < high


def test_gaussian_quadratics_sum_to_what_reproductions_print() -> None:
    losses = baselines.run(Quadratic(batch=16384, family="gaussian"), "sgd", 0.01, [0], 100)
    # 184 to 186, with a standard error of 1.2 on either side.
    assert losses[0, :100].sum().item() == pytest.approx(185.0, abs=3.0)


def test_tuned_quadratics_reach_the_known_optima() -> None:
    problem = Quadratic(batch=1024)
    results = baselines.compare(problem, 100, range(2), tuning_seeds=range(1))
    # Best learning rate and final loss of each optimizer, from an independent simulation of 4,000 problems.
    known = {"sgd": (0.0255, 0.178), "nag": (0.0184, 0.077), "rmsprop": (0.0217, 0.160), "adam": (0.212, 0.094)}
    assert tuple(results) == baselines.NAMES == tuple(known)
    for name, (lr, final) in known.items():
        found = results[name]
        assert found.losses.shape == (2, 101)
        assert found.search.lr == pytest.approx(lr, rel=0.3), name
        assert found.losses[:, -1].mean().item() == pytest.approx(final, rel=0.08), name


def quadratic_bowl(curvature: float) -> ModuleProblem:
    return ModuleProblem(
        lambda generator: Bowl(1.0), lambda module, generator: curvature * module.x.square().sum(), name="parabola"
    )


@pytest.mark.parametrize("curvature", [1e-4, 1e-2, 1.0, 1e3, 1e6])
def test_search_leaves_its_first_grid_until_the_best_is_interior(curvature) -> None:
    trials = []
    found = baselines.search(
        quadratic_bowl(curvature), "sgd", 5, seeds=[0], on_trial=lambda lr, loss: trials.append((lr, loss))
    )
    # One step of SGD with lr = 1 / (2 curvature) is exact; neighbours on the grid are a factor 1.33 away.
    assert found.lr == pytest.approx(0.5 / curvature, rel=0.34)
    rates = list(found.final_losses)
    assert rates == sorted(rates)
    assert rates[0] < found.lr < rates[-1]
    assert found.final_losses[found.lr] == min(found.final_losses.values())
    assert dict(trials) == found.final_losses
    assert baselines.tune(quadratic_bowl(curvature), "sgd", 5, seeds=[0]) == found.lr


@pytest.mark.parametrize("points", [1, 3, 4])
@pytest.mark.parametrize("exponent", [-1.25, -0.875, -0.6, 0.25, 1.375])
def test_both_midpoints_beside_the_best_are_tried_and_may_win(points, exponent) -> None:
    trials = []
    found = baselines.search(
        quadratic_bowl(0.5 * 10**-exponent), "sgd", 1, seeds=[0], points_per_decade=points,
        on_trial=lambda lr, loss: trials.append(lr),
    )  # fmt: skip
    keys = [math.log10(lr) * 2 * points for lr in trials]
    assert [round(key) for key in keys] == pytest.approx(keys, abs=1e-6)
    grid, middle = keys[:-2], keys[-2:]
    assert all(round(key) % 2 == 0 for key in grid) and len(set(map(round, grid))) == len(grid)
    assert max(grid) - min(grid) == pytest.approx(2 * (len(grid) - 1))  # without a gap
    best = min(grid, key=lambda key: found.final_losses[trials[keys.index(key)]])
    assert middle == pytest.approx([best - 1, best + 1]) and min(grid) < best < max(grid)
    # One step of SGD with lr = 10**exponent is exact.
    losses = {key: (1 - 10 ** (key / (2 * points) - exponent)) ** 2 for key in keys}
    assert math.log10(found.lr) * 2 * points == pytest.approx(min(losses, key=losses.__getitem__))


def test_search_takes_the_mean_over_tasks_and_refuses_a_diverged_one() -> None:
    def make(generator: torch.Generator) -> nn.Module:
        return Bowl(float(torch.rand((), generator=generator)))

    problem = ModuleProblem(make, lambda module, generator: module.x.square().sum())
    found = baselines.search(problem, "sgd", 1, seeds=range(5))
    for lr, mean in found.final_losses.items():
        final = baselines.run(problem, "sgd", lr, range(5), 1, split="validation")[:, -1]
        assert mean == pytest.approx(final.mean().item()) and mean != pytest.approx(final.median().item())
    wild = ModuleProblem(make, lambda module, generator: (module.x * 1e200).square().sum())
    with pytest.raises(RuntimeError, match="no best learning rate"):
        baselines.search(wild, "sgd", 3, seeds=range(2))


def test_search_gives_up_with_a_reason_where_no_rate_is_best() -> None:
    falling = ModuleProblem(lambda generator: Bowl(), lambda module, generator: module.x.sum(), name="slope")
    with pytest.raises(RuntimeError, match=r"no best learning rate for sgd on slope .* is at the edge"):
        baselines.search(falling, "sgd", 2, seeds=[0])


def test_search_minimises_the_final_loss_not_the_sum() -> None:
    # Two steps: lr = 1 overshoots to -x and comes back, so that the loss ends where it started; lr near 0.5 is right at
    # once. A loss that only counts at the third evaluation tells the criteria apart.
    def loss(module: nn.Module, generator: torch.Generator) -> torch.Tensor:
        module.calls = getattr(module, "calls", 0) + 1
        final = (module.x.detach() - 0.81).abs().sum() if module.calls == 3 else 0.0
        return module.x.square().sum() + 1e3 * final

    # x after two steps is (1 - 2 lr)^2, equal to 0.81 at lr = 0.05, where x^2 has hardly fallen.
    problem = ModuleProblem(lambda generator: Bowl(1.0), loss)
    assert baselines.tune(problem, "sgd", 2, seeds=[0], points_per_decade=20) == pytest.approx(0.05, rel=0.04)


def test_search_uses_validation_tasks_and_comparison_test_tasks() -> None:
    seen = []

    def make(generator: torch.Generator, split: str) -> nn.Module:
        seen.append(split)
        return Bowl()

    results = baselines.compare(ModuleProblem(make, bowl_loss), 3, [0, 1], names=["sgd"], tuning_seeds=[5])
    assert set(seen[:-2]) == {"validation"}
    assert seen[-2:] == ["test", "test"]
    assert list(results) == ["sgd"]


def test_divergence_counts_as_infinite() -> None:
    losses = baselines.run(Quadratic(batch=4), "sgd", 1e6, [0, 1], 100)
    assert torch.isfinite(losses[:, :3]).all()
    assert torch.isinf(losses[:, -1]).all()
    assert not torch.isnan(losses).any()
    poisoned = ModuleProblem(lambda generator: Bowl(), lambda module, generator: (module.x * math.nan).sum())
    assert torch.equal(baselines.run(poisoned, "adam", 0.1, [0], 2), torch.full((1, 3), math.inf, dtype=torch.float64))


def test_losses_are_per_problem_and_start_at_theta_0() -> None:
    problem = Quadratic(batch=7)
    losses = baselines.run(problem, "sgd", 0.01, [3, 4], 2, split="validation")
    assert losses[1, 0].item() == pytest.approx(problem.sample(4, "validation")().item() / 7)
    assert losses[1, 1] < losses[1, 0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("lbfgs", 0.1, [0], 5), ValueError, r"name must be one of \('sgd', 'nag', 'rmsprop', 'adam'\), got 'lbfgs'"),
        (("sgd", 0.0, [0], 5), ValueError, "lr must be positive and finite, got 0.0"),
        (("sgd", math.nan, [0], 5), ValueError, "lr must be positive and finite, got nan"),
        (("sgd", 0.1, [0], 0), ValueError, "horizon must be a positive integer, got 0"),
        (("sgd", 0.1, [0], 2.5), TypeError, "horizon must be a positive integer, got 2.5"),
        (("sgd", 0.1, [], 5), ValueError, "seeds must name at least one task"),
    ],
)
def test_arguments_are_checked(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        baselines.run(bowl, *arguments)


def test_compare_refuses_an_unknown_name_before_any_work() -> None:
    with pytest.raises(ValueError, match="got 'momentum'"):
        baselines.compare(bowl, 5, [0], names=["sgd", "momentum"])


def test_a_grid_on_which_every_run_diverges_grows_downwards() -> None:
    trials = []
    found = baselines.search(
        quadratic_bowl(1e8), "sgd", 60, seeds=[0], on_trial=lambda lr, loss: trials.append((lr, loss))
    )
    assert all(math.isinf(loss) for _, loss in trials[:9])
    assert found.lr == pytest.approx(0.5e-8, rel=0.34) and max(lr for lr, _ in trials) == 1.0


@pytest.mark.parametrize("name", baselines.NAMES)
def test_a_search_starts_with_two_decades_that_hold_the_usual_rates(name) -> None:
    rates = []
    baselines.search(Quadratic(dim=2, batch=8), name, 5, seeds=[0], on_trial=lambda lr, loss: rates.append(lr))
    first = [math.log10(rate) for rate in rates[:9]]
    assert first == pytest.approx([first[0] + k / 4 for k in range(9)])
    # Where the best rates of the paper's problems are, with room on both sides.
    assert first[0] < math.log10(0.018) and math.log10(0.21) < first[-1]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_after_a_loss_that_is_not_finite_all_count_as_infinite(bad) -> None:
    def loss(module: nn.Module, generator: torch.Generator) -> torch.Tensor:
        module.calls = getattr(module, "calls", 0) + 1
        return module.x.square().sum() + (bad if module.calls == 3 else 0.0)

    losses = baselines.run(ModuleProblem(lambda generator: Bowl(), loss), "sgd", 0.1, [0], 4)
    assert losses[0, :2].isfinite().all() and losses[0, 2:].isinf().all()
