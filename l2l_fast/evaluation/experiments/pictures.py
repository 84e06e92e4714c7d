"""Neural art to look at: in every setting a photograph, the style, and what two optimizers made of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...kernels.surroundings import own_loop
from ...meta.assignment import optimizer_for
from ...meta.rollout import rollout
from ...networks.several import Networks, device_of
from ...problems import Task
from ...problems.neural_art import NeuralArt, NeuralArtTask
from ...problems.theta import Theta
from .. import baselines, plots
from ..comparison import Comparison
from .config import Experiment, Setting

_SEED = 0


def draw(experiment: Experiment, results: dict[str, Comparison], net: Networks, path: Path) -> Path | None:
    """Write the picture; None if there is nothing to look at, or without matplotlib."""
    shown = [setting for setting in experiment.settings if isinstance(results[setting.name].problem, NeuralArt)]
    if not shown:
        return None
    try:
        figure = plots.make_figure(4 * len(shown), 4)
    except ModuleNotFoundError:
        return None
    figure.set_size_inches(11, 3.0 * len(shown))
    for k, setting in enumerate(shown):
        row = figure.axes[4 * k : 4 * k + 4]
        for axes, (title, picture) in zip(row, _pictures(setting, results[setting.name], net).items()):
            axes.imshow(picture.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            plots.set_title(axes, title, fontsize=9)
            axes.axis("off")
    return plots.save_figure(figure, path, dpi=110)


def _pictures(setting: Setting, comparison: Comparison, net: Networks) -> dict[str, Tensor]:
    problem = comparison.problem
    assert isinstance(problem, NeuralArt)
    task = _task(problem, setting, net)
    found = {f"photograph, {problem.side} x {problem.side}": task.content, "style": problem.picture}
    best = comparison.best_baseline()
    setup = comparison.setups[best]
    ends: list[Task] = []
    losses = baselines.run(
        problem,
        best,
        setup.lr,
        [_SEED],
        setting.horizon,
        options=setup.options,
        schedule=setup.schedule,
        split=setting.split,
        device=device_of(net),
        on_end=ends.append,
    )
    for end in ends:
        assert isinstance(end, NeuralArtTask)
        _title(found, comparison.label(best), (end.picture(), losses[0, -1].item()))
    learned = optimizer_for(task, net, setting.horizon)
    _title(found, "learned LSTM", _optimised(task, learned, setting.horizon))
    return found


def _task(problem: NeuralArt, setting: Setting, net: Networks) -> NeuralArtTask:
    task = problem.sample(_SEED, setting.split, device_of(net))
    assert isinstance(task, NeuralArtTask)
    return task


@own_loop()
def _optimised(task: NeuralArtTask, optimizer: torch.optim.Optimizer, horizon: int) -> tuple[Tensor, float]:
    theta = Theta(task)
    for _ in rollout(theta, optimizer, horizon):
        pass
    return task.picture(), theta.value().item() / task.num_problems


def _title(found: dict[str, Tensor], label: str, result: tuple[Tensor, float]) -> None:
    picture, loss = result
    found[f"{label}: loss {loss:.3f}"] = picture
