"""What an optimizer decides: the figures of appendix B (Andrychowicz et al. 2016, figures 10-13).

Along one trajectory of the learned optimizer, for single coordinates: the updates that it, Adam and SGD make of the
very same gradients; and, at some steps, the update that each would propose if the present gradient were another, the
history being what it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels import checks
from ..kernels.checks import positive_int
from ..kernels.state import Averages, State
from ..kernels.surroundings import own_loop
from ..meta.assignment import names_by_network, optimizer_for
from ..meta.rollout import rollout
from ..networks.lstm import CoordinatewiseLSTM
from ..networks.several import Networks, as_networks, members
from ..problems import Task
from ..problems.base import horizon_of
from ..problems.theta import Theta

LEARNED = "learned"
_LABELS = {LEARNED: "learned LSTM", "adam": "Adam", "sgd": "SGD"}
_COLUMNS = 4  # panels in a row of the figure
_BETAS, _EPS = (0.9, 0.999), 1e-8  # of Adam


@dataclass(frozen=True)
class Decisions:
    """Of ``K`` coordinates over ``T`` steps; optimizers are "learned", "adam" and "sgd".

    Attributes:
        coordinates: their places, (name of the parameter, index in row-major order).
        gradients: ``[T, K]``, what all three see.
        updates: by optimizer, ``[T, K]``.
        steps: where proposals were taken (1 is the first update).
        grids: ``[K, G]``, gradient values.
        proposals: by optimizer, ``[len(steps), K, G]``.
    """

    coordinates: list[tuple[str, int]]
    gradients: Tensor
    updates: dict[str, Tensor]
    steps: list[int]
    grids: Tensor
    proposals: dict[str, Tensor]


@own_loop()
@torch.no_grad()
def decide(
    net: Networks,
    task: Task,
    learning_rates: Mapping[str, float],
    *,
    horizon: int = 100,
    coordinates: Sequence[tuple[str, int]] | int | None = None,
    steps: Sequence[int] = (1, 2, 4, 8, 16, 32),
    points: int = 201,
    reach: float = 2.0,
) -> Decisions:
    """Run ``net`` on ``task`` for ``horizon`` steps and ask all three what they do with that trajectory's gradients.

    Args:
        learning_rates: of "adam" and "sgd".
        coordinates: which to watch, or how many: then those that move most, each of another parameter if possible;
            by default two, or the one that there is.
        steps: where to take proposals; those beyond the horizon are left out.
        points, reach: a grid has so many points, from -reach to reach times the coordinate's largest gradient.

    Raises:
        ValueError: a learning rate is missing, no step is within the horizon, no such coordinate, or ``points`` or
            ``reach`` out of range.
    """
    horizon, points = horizon_of(horizon), positive_int("points", points)
    reach = checks.real("reach", reach, above=0.0)
    missing = {"adam", "sgd"} - set(learning_rates)
    if missing:
        raise ValueError(f"learning_rates: expected those of adam and sgd, missing {sorted(missing)}")
    learning_rates = {
        name: checks.real(f"learning_rates[{name!r}]", rate, 0.0) for name, rate in learning_rates.items()
    }
    steps = sorted(step for step in set(steps) if 1 <= step <= horizon)
    if not steps:
        raise ValueError(f"steps: expected some within 1..{horizon}, got none")
    names_by_network(task, as_networks(net))
    for member in members(as_networks(net)).values():
        if member.tensor_inputs:
            raise ValueError(
                "net: a network with inputs per tensor decides for a tensor as a whole, so that a single coordinate's "
                f"gradients do not tell what it does; expected tensor_inputs=0, got {member.tensor_inputs}"
            )
    sizes = {name: value.numel() for name, value in Theta(task).parameters.items()}
    count = min(2, sum(sizes.values())) if coordinates is None else checks.as_int(coordinates)
    chosen = [] if count is not None else _checked(sizes, coordinates)
    if count is not None:
        check_count(sizes, count)
    history, moved = _trajectory(net, task, horizon)
    chosen = chosen if count is None else _most_moved(moved, count)
    gradients = torch.stack([history[name][:, index] for name, index in chosen], 1)
    largest = gradients.abs().amax(0).clamp_min(1e-12)
    grids = torch.linspace(-reach, reach, points, dtype=torch.float32, device="cpu") * largest.unsqueeze(1)
    owners = {name: members(net)[key] for key, names in names_by_network(task, net).items() for name in names}
    updates: dict[str, list[Tensor]] = {LEARNED: [], "adam": [], "sgd": []}
    proposals: dict[str, list[Tensor]] = {name: [] for name in updates}
    for k, (name, _) in enumerate(chosen):
        series, grid = gradients[:, k], grids[k]
        of = {
            LEARNED: _learned(owners[name], series, grid, steps),
            "adam": _adam(series, grid, steps, learning_rates["adam"]),
            "sgd": (-learning_rates["sgd"] * series, -learning_rates["sgd"] * grid.expand(len(steps), -1)),
        }
        for optimizer, (made, proposed) in of.items():
            updates[optimizer].append(made)
            proposals[optimizer].append(proposed)
    return Decisions(
        chosen,
        gradients,
        {name: torch.stack(series, 1) for name, series in updates.items()},
        steps,
        grids,
        {name: torch.stack(series, 1) for name, series in proposals.items()},
    )


@torch.enable_grad()
def _trajectory(net: Networks, task: Task, horizon: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All gradients ``[horizon, numel]`` by parameter, and how far every coordinate went."""
    theta = Theta(task)
    parameters = theta.parameters
    optimizer = optimizer_for(task, net, horizon)
    start = {name: value.detach().clone() for name, value in parameters.items()}
    history: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for _ in rollout(theta, optimizer, horizon):
        for name, value in parameters.items():
            grad = torch.zeros_like(value) if value.grad is None else value.grad
            history[name].append(grad.reshape(-1).float().cpu())
    moved = {name: (value.detach() - start[name]).abs().reshape(-1).cpu() for name, value in parameters.items()}
    return {name: torch.stack(grads) for name, grads in history.items()}, moved


def _most_moved(moved: Mapping[str, Tensor], count: int) -> list[tuple[str, int]]:
    ranked: list[tuple[int, float, str, int]] = []
    for name, distance in moved.items():
        best = distance.topk(min(count, distance.numel()))
        ranked += [(rank, -d, name, i) for rank, (d, i) in enumerate(zip(best.values.tolist(), best.indices.tolist()))]
    return [(name, index) for _, _, name, index in sorted(ranked)[:count]]


def check_count(sizes: Mapping[str, int], count: int) -> None:
    """Raise ValueError unless so many coordinates can be watched of parameters of these ``sizes``."""
    positive_int("coordinates", count)
    total = sum(sizes.values())
    if count > total:
        raise ValueError(f"coordinates: expected at most {total}, which is all the task has, got {count}")


def _checked(sizes: Mapping[str, int], coordinates: Any) -> list[tuple[str, int]]:
    if isinstance(coordinates, (str, Mapping)) or not isinstance(coordinates, Iterable):
        raise TypeError(f"coordinates: expected a number, or pairs (parameter, index), got {coordinates!r}")
    coordinates = list(coordinates)
    for pair in coordinates:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"coordinates: expected pairs (parameter, index), got {pair!r}")
        name, index = pair
        if not checks.chosen(name, sizes) or checks.as_int(index) is None or not 0 <= index < sizes[name]:
            raise ValueError(f"coordinates: expected a parameter and an index below {sizes}, got {(name, index)}")
    if not coordinates:
        raise ValueError("coordinates: expected at least one, got none")
    return [(str(name), int(index)) for name, index in coordinates]


def _learned(net: CoordinatewiseLSTM, series: Tensor, grid: Tensor, steps: Sequence[int]) -> tuple[Tensor, Tensor]:
    state = net.init_state(1)
    series, grid = series.to(state.device), grid.to(state.device)
    made, proposed = [], []
    for t, grad in enumerate(series, start=1):
        if t in steps:
            copies = State.from_logical([_expanded(part, len(grid)) for part in state.to_logical()])
            proposed.append(net(grid, copies)[0])
        update, state = net(grad.reshape(1), state)
        made.append(update)
    return torch.cat(made).cpu(), torch.stack(proposed).cpu()


def _expanded(part: Any, count: int) -> Any:
    """An entry of a logical state of one coordinate as that of ``count`` equal ones."""
    if isinstance(part, Averages):
        return part._replace(rows=part.rows.expand(count, -1))
    return tuple(x.expand(count, -1) for x in part)


def _adam(series: Tensor, grid: Tensor, steps: Sequence[int], lr: float) -> tuple[Tensor, Tensor]:
    m, v = torch.zeros_like(series[0]), torch.zeros_like(series[0])

    def update(grad: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
        new_m = _BETAS[0] * m + (1 - _BETAS[0]) * grad
        new_v = _BETAS[1] * v + (1 - _BETAS[1]) * grad.square()
        size = (new_v / (1 - _BETAS[1] ** t)).sqrt() + _EPS
        return -lr * new_m / (1 - _BETAS[0] ** t) / size, new_m, new_v

    made, proposed = [], []
    for t, grad in enumerate(series, start=1):
        if t in steps:
            proposed.append(update(grid, t)[0])
        change, m, v = update(grad, t)
        made.append(change)
    return torch.stack(made), torch.stack(proposed)


def draw(decisions: Decisions, path: str | os.PathLike[str], heading: str | None = None) -> Path:
    """Draw, for every coordinate, the traces and one panel of proposals per step. Returns the path.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from . import plots

    return plots.save_figure(decisions_figure(decisions, heading), path)


def decisions_figure(decisions: Decisions, heading: str | None = None) -> Any:
    """The figure that :func:`draw` writes."""
    from . import plots

    # Few panels in a row: a page is no wider, and numbers on axes must stay legible there.
    panels = 1 + len(decisions.steps)
    columns = min(panels, _COLUMNS)
    cells = -(-panels // columns) * columns
    figure = plots.make_figure(cells * len(decisions.coordinates), columns)
    figure.set_size_inches(2.9 * columns, 2.6 * len(figure.axes) / columns + 0.8)
    axes_of = [figure.axes[k * cells : (k + 1) * cells] for k in range(len(decisions.coordinates))]
    for k, (name, index) in enumerate(decisions.coordinates):
        _traces(axes_of[k][0], decisions, k, f"{name}[{index}]")
        for j, axes in enumerate(axes_of[k][1:panels]):
            _proposals(axes, decisions, k, j)
        for unused in axes_of[k][panels:]:
            figure.delaxes(unused)
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    plots.add_legend(figure, handles, labels, fontsize=11)
    if heading is not None:
        plots.set_heading(figure, heading, fontsize=12)
    return figure


def _line(name: str) -> dict[str, Any]:
    from .plots import COLOURS

    return {"color": COLOURS[name], "linewidth": 2.0 if name == LEARNED else 1.4, "label": _LABELS[name]}


def _traces(axes: Any, decisions: Decisions, k: int, title: str) -> None:
    from . import plots

    steps = range(1, len(decisions.gradients) + 1)
    marker = "." if len(steps) == 1 else None  # a line needs two points
    for name, series in decisions.updates.items():
        axes.plot(steps, series[:, k], marker=marker, **_line(name))
    plots.set_title(axes, f"updates of {title}", fontsize=11)
    axes.set_xlabel("step", fontsize=10)
    axes.set_ylabel("update", fontsize=10)
    axes.tick_params(labelsize=9)
    axes.grid(True, color="0.92")


def _proposals(axes: Any, decisions: Decisions, k: int, j: int) -> None:
    from . import plots

    step = decisions.steps[j]
    for name, values in decisions.proposals.items():
        axes.plot(decisions.grids[k], values[j, k], **_line(name))
    # What happened: the gradient that came, and the update that was made of it.
    happened = decisions.gradients[step - 1, k], decisions.updates[LEARNED][step - 1, k]
    axes.plot(*happened, "o", color="black", markersize=4, label="the gradient that came, and its update")
    name, index = decisions.coordinates[k]
    plots.set_title(axes, f"{name}[{index}], step {step}", fontsize=11)
    axes.set_xlabel("gradient", fontsize=10)
    axes.locator_params(axis="x", nbins=4)
    axes.tick_params(labelsize=9)
    axes.grid(True, color="0.92")
