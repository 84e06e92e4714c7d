"""The ledger of evidence: what was measured on sealed test tasks, once a release, with every candidate's score.

A test task that helped to choose is none any more. So the sealed tasks of a release (:mod:`l2l_fast.problems.sealed`)
are opened only here, and only for optimizers that the ledger does not contradict: the first measurement of a setting
writes its line; from then on, for that release, exactly the same optimizers can be measured again (to check the line)
and no others.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...kernels.version import VERSION
from ...networks import pretrained, writing
from ...networks.several import Networks
from ...problems import sealed
from ..baselines import final_losses
from ..comparison import LEARNED, Comparison
from .config import Experiment, Setting
from .measuring import Outcome, evaluate_experiment
from .report import weights_digest

_TOLERANCE = 0.1  # relative, of a mean final loss: other machines round differently, and trajectories amplify it


def measure(
    experiment: Experiment,
    out: str | os.PathLike[str],
    ledger: str | os.PathLike[str],
    *,
    data: str | None = None,
    release: str = sealed.RELEASES[-1],
    test_episodes: int | None = None,
    settings: list[str] | None = None,
    progress: bool = True,
) -> tuple[Outcome, list[str]]:
    """Measure the package's optimizers for an experiment on the sealed tasks, and append what is new to the ledger.

    Tables and figures go to ``out``, as :func:`evaluate_experiment` writes them.

    Args:
        settings: names of those to measure; default: all.
        test_episodes: in the place of the experiment's.

    Returns:
        The outcome, and a sentence on every setting: appended, or how it compares with its line.

    Raises:
        ValueError: there is no pretrained optimizer, no such release or setting; the ledger is damaged, or has other
            optimizers or tasks for this release.
    """
    names = [setting.name for setting in experiment.settings] if settings is None else settings
    chosen = replace(experiment, settings=tuple(experiment.setting(name) for name in names))
    if chosen.pretrained not in pretrained.names():
        raise ValueError(f"experiment: {chosen.name!r} has no optimizer in the package to measure")
    net = pretrained.load_pretrained(chosen.pretrained)
    others = pretrained.trained_alike(chosen.pretrained)
    writing.check_writable(ledger, "ledger", make_folder=True)
    lines = read(ledger)
    plans = {
        setting.name: _plan(chosen, setting, net, others, data, release, test_episodes) for setting in chosen.settings
    }
    for name, plan in plans.items():
        _check_unspent(plan, lines.get((release, chosen.name, name)))
    for plan in plans.values():
        _check_same_networks(plan, lines.values())
    with sealed.opened(release):
        outcome = evaluate_experiment(
            chosen,
            net,
            writing.checked_folder(out, "out"),
            others=others,
            data=data,
            test_episodes=test_episodes,
            release=release,
            progress=progress,
        )
    said = []
    for name, plan in plans.items():
        line = {**plan, **_scores(outcome.comparisons[name])}
        earlier = lines.get((release, chosen.name, name))
        if earlier is None:
            _append(ledger, line)
            said.append(f"{name}: written to {os.fspath(ledger)}")
        else:
            said.append(f"{name}: {_compared(line, earlier)}")
    return outcome, said


def read(ledger: str | os.PathLike[str]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The lines of a ledger by release, experiment and setting; none if there is no such file.

    Raises:
        ValueError: a line is no entry, or there are two for one setting.
    """
    path = Path(os.fsdecode(ledger))
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else [], start=1):
        try:
            line = json.loads(text)
            key = line["release"], line["experiment"], line["setting"]
            line["networks"], line["results"]  # noqa: B018
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"ledger: line {number} of {str(path)!r} is no entry of evidence: {error!r}") from error
        if key in found:
            raise ValueError(f"ledger: {str(path)!r} has two entries for {key}, line {number} is the second")
        found[key] = line
    return found


def _plan(
    experiment: Experiment,
    setting: Setting,
    net: Networks,
    others: Mapping[str, Networks],
    data: str | None,
    release: str,
    test_episodes: int | None,
) -> dict[str, Any]:
    """What a line says before anything is measured."""
    seeds = sealed.seeds(experiment.tests(setting) if test_episodes is None else test_episodes, release)
    return {
        "release": release,
        "experiment": experiment.name,
        "setting": setting.name,
        "date": datetime.date.today().isoformat(),
        "version": VERSION,
        "torch": torch.__version__,
        "problem": experiment.problem_of(setting, data).config(),
        "horizon": setting.horizon,
        "split": setting.split,
        "seeds": [seeds.start, len(seeds)],
        "baselines": list(setting.baselines),
        "tuned": {"tasks": experiment.tuning(setting), "problem": setting.tuning_problem, "search": setting.search},
        "networks": {name: weights_digest(each) for name, each in {LEARNED: net, **others}.items()},
    }


def _check_unspent(plan: dict[str, Any], earlier: dict[str, Any] | None) -> None:
    if earlier is None:
        return
    for what in ("networks", "problem", "horizon", "split", "seeds", "baselines"):
        if earlier.get(what) != plan[what]:
            raise ValueError(
                f"ledger: the sealed tasks of release {plan['release']} for {plan['experiment']!r}, setting "
                f"{plan['setting']!r}, were spent on {earlier.get('date')} with other {what}: {earlier.get(what)}, now "
                f"{plan[what]}. Choosing between the two on these tasks would make them worthless: choose on "
                "validation tasks; a new release has new sealed tasks"
            )


def _check_same_networks(plan: dict[str, Any], lines: Iterable[dict[str, Any]]) -> None:
    """Nor may another network be taken for the settings that are left: its choice might stand on those that are not."""
    for line in lines:
        if (line["release"], line["experiment"]) != (plan["release"], plan["experiment"]):
            continue
        if line["networks"] != plan["networks"]:
            raise ValueError(
                f"ledger: release {plan['release']} measured other networks on setting {line['setting']!r} of "
                f"{plan['experiment']!r}: {line['networks']}, now {plan['networks']}; a new release may have others"
            )


def _scores(comparison: Comparison) -> dict[str, Any]:
    """Every candidate's score: settings, mean and single final losses, the losses at the end, the held-out errors."""
    results: dict[str, Any] = {}
    for name, losses in comparison.losses.items():
        finals = comparison.finals(name)
        results[name] = {
            "setting": comparison.setting(name),
            "final": _number(finals.mean().item()),
            "last": _number(losses[:, -1].mean().item()),
            "finals": [_number(value) for value in finals.tolist()],
        }
        if name in comparison.errors:
            results[name]["held-out error"] = _number(comparison.errors[name].mean().item())
    others = {name: _number(final_losses(losses).mean().item()) for name, losses in comparison.others.items()}
    return {"results": results, "trained alike": others}


def _compared(line: dict[str, Any], earlier: dict[str, Any]) -> str:
    now, then = ({**_means(each), **each.get("trained alike", {})} for each in (line, earlier))
    off = {name: (now.get(name), then[name]) for name in then if not _near(now.get(name), then[name])}
    if not off:
        return f"agrees with the ledger (within {100 * _TOLERANCE:.0f} %; {earlier['date']})"
    found = ", ".join(f"{name} {new} (ledger: {old})" for name, (new, old) in off.items())
    return f"DIFFERS from the ledger of {earlier['date']}: mean final losses {found}"


def _means(line: dict[str, Any]) -> dict[str, float | None]:
    return {name: result["final"] for name, result in line["results"].items()}


def _near(now: float | None, then: float | None) -> bool:
    if now is None or then is None:
        return now is then
    return abs(now - then) <= _TOLERANCE * abs(then)


def _number(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _append(ledger: str | os.PathLike[str], line: dict[str, Any]) -> None:
    path = Path(os.fsdecode(ledger))
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    with writing.folder(path.parent):
        writing.write_atomically(path, before + json.dumps(line, separators=(",", ":")) + "\n")
