"""Tables, stored curves and pictures of an experiment."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch

from ...meta.evaluation import summarize
from ...networks import files
from ...networks.record import record_of
from ...networks.several import Networks
from ...networks.writing import write_atomically
from ...problems import Problem
from ...problems.data.mnist import EMBEDDED
from .. import plots
from ..comparison import LEARNED, Comparison, data_set
from .config import Experiment, Setting, paper_curves

_STEPS = (20, 100)


def fingerprint(
    net: Networks | None, problem: Problem, setting: Setting, count: int, tuning: int, device: str = "cpu"
) -> str:
    """Of everything that the curves of a setting depend on; without a network: those of the baselines."""
    digest = hashlib.sha256()
    for name, value in [] if net is None else net.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    place = [] if device == "cpu" else [device]  # a GPU adds up in another order
    digest.update(json.dumps([problem.config(), setting.horizon, setting.split, count, tuning, *place]).encode())
    return digest.hexdigest()


def write_curves(path: Path, key: str, comparison: Comparison) -> None:
    """Keep the losses of all episodes, in half of float64's size."""
    metadata = {
        "key": key,
        "learning_rates": json.dumps(comparison.learning_rates),
        "order": json.dumps(list(comparison.losses)),
        "problems_per_task": str(comparison.problems_per_task),
    }
    tensors = {name: losses.float() for name, losses in comparison.losses.items()}
    files.write_tensors(path, tensors, metadata)


def read_curves(path: Path, key: str, problem: Problem) -> Comparison | None:
    """What :func:`write_curves` kept, if it was kept for ``key``."""
    if not path.is_file():
        return None
    try:
        metadata, tensors = files.read(path)
        if metadata.get("key") != key:
            return None
        losses = {name: tensors[name].double() for name in json.loads(metadata["order"])}
        rates = json.loads(metadata["learning_rates"])
        return Comparison(problem, losses, rates, int(metadata["problems_per_task"]))
    except (KeyError, ValueError):
        return None  # damaged: computed again


def sum_from_start(comparison: Comparison, name: str) -> tuple[float, float]:
    """Mean and half width of the 95 % interval of the sum of the losses at steps 0..horizon-1, theta_0 included: what
    an unrolled loop that evaluates, then updates, adds up."""
    sums = comparison.losses[name][:, :-1].sum(1)
    both = summarize(torch.stack([sums, sums], 1))
    return both.mean[0].item(), both.half_width[0].item()


def scores(results: dict[str, Comparison]) -> dict[str, dict[str, float]]:
    """The learned optimizer's mean losses by setting, JSON-able; of the settings where it did not diverge."""
    found: dict[str, dict[str, float]] = {}
    for name, comparison in results.items():
        mean = comparison.losses[LEARNED].mean(0)
        values = {f"step {t}": mean[t].item() for t in _STEPS if t < comparison.horizon}
        values[f"step {comparison.horizon}"] = mean[-1].item()
        values["sum"] = sum_from_start(comparison, LEARNED)[0]
        finite = {key: float(f"{value:.5g}") for key, value in values.items() if math.isfinite(value)}
        found[name] = {**finite, "test tasks": comparison.episodes}
    return found


def write_table(experiment: Experiment, net: Networks, results: dict[str, Comparison], path: Path) -> Path:
    """The tables as Markdown."""
    lines = [f"# {experiment.name}", "", experiment.about, "", f"Source: {experiment.source}.", ""]
    record = record_of(net)
    if record is not None:
        lines += ["Training of this optimizer: " + training_text(record) + ".", ""]
    lines.append(
        "Means over fresh tasks ± half of the 95 % interval. The baselines' learning rates were tuned on validation "
        "tasks of the same family (best final loss). Sum: of the losses at steps 0 to the last but one. Paper: its "
        "published mean, read off the figure."
    )
    for setting in experiment.settings:
        lines += ["", *_section(setting, results[setting.name], experiment.tuning(setting))]
    write_atomically(path, "\n".join(lines) + "\n")
    return path


def _section(setting: Setting, comparison: Comparison, tuning: int) -> list[str]:
    steps = sorted({step for step in _STEPS if step < setting.horizon} | {setting.horizon})
    paper = paper_curves(setting.paper) if setting.paper else {}
    header = ["optimizer", "learning rate", *(f"step {step}" for step in steps), "sum"]
    header += [f"paper, step {setting.horizon}"] if paper else []
    images = "" if getattr(comparison.problem, "data", None) is None else f", {setting.split} images"
    lines = [
        f"## {setting.title}",
        "",
        f"{comparison.tasks()}{images}, {tuning} per learning rate tried; {data_set(comparison.problem)}; "
        f"`{comparison.problem!r}`" + ("; the optimizer was not trained for this." if setting.transfer else "."),
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
    ]
    for name, summary in comparison.summaries().items():
        rate = comparison.learning_rates.get(name)
        total, width = sum_from_start(comparison, name)
        cells = [comparison.plain_label(name), "" if rate is None else f"{rate:.3g}"]
        cells += [f"{_number(summary.mean[t].item())} ± {_number(summary.half_width[t].item())}" for t in steps]
        cells.append(f"{_number(total)} ± {_number(width)}")
        if paper:
            cells.append(_number(paper[name][1][-1]) if name in paper else "")
        if name == LEARNED:
            cells = [f"**{cell}**" if cell else "" for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *_verdicts(setting, comparison)]
    return lines


def _verdicts(setting: Setting, comparison: Comparison) -> list[str]:
    learned = comparison.losses[LEARNED].mean(0)
    best = comparison.best_baseline()
    other = comparison.losses[best].mean(0)[-1].item()
    final = learned[-1].item()
    words = "below" if final < other else "not below"
    rival = f"{comparison.plain_label(best)}, {_number(other)}"
    lines = [f"- final loss {_number(final)}: {words} the best baseline ({rival})"]
    # The embedded images are memorised sooner than the full set: such losses say nothing about the published ones.
    embedded = comparison.problem.config().get("data") == EMBEDDED
    for step, value in setting.target.items():
        reached = sum_from_start(comparison, LEARNED)[0] if step == "sum" else learned[int(step)].item()
        what = "sum" if step == "sum" else f"step {step}"
        if embedded:
            verdict = "not comparable, these are the embedded images"
        else:
            verdict = "reached" if reached <= value else "NOT reached"
        lines.append(f"- published {what} {value:g}: {verdict} ({_number(reached)})")
    return lines


def training_text(record: dict[str, Any]) -> str:
    """One phrase about the training that a record describes, stage by stage."""
    stages = [_stage_text(each) for each in (*record.get("earlier", []), record)]
    text = "; then from the best network so far: ".join(stages)
    candidates = len(record.get("candidates", []))
    if candidates > 1:
        text += f"; the best of {candidates} runs on validation tasks"
    return text


def _stage_text(record: dict[str, Any]) -> str:
    protocol, meta = record.get("protocol", {}), record.get("meta_optimizer", {})
    problem = record.get("problem", {})
    return (
        f"{record.get('episodes')} episodes of {protocol.get('horizon')} steps, segments of {protocol.get('unroll')}, "
        f"on {json.dumps(problem)}; Adam, learning rate {meta.get('lr')} (cosine decay), betas {meta.get('betas')}, "
        f"gradient norm cut to {meta.get('clip_norm')}; seed {record.get('seed')}"
    )


def draw(experiment: Experiment, results: dict[str, Comparison], path: Path) -> Path | None:
    """One panel per setting with the paper's curves dotted; None without matplotlib."""
    references = [paper_curves(setting.paper) if setting.paper else None for setting in experiment.settings]
    try:
        return plots.learning_curves(
            [results[setting.name] for setting in experiment.settings],
            path,
            titles=[setting.title for setting in experiment.settings],
            heading=experiment.about.split(". ")[0].rstrip("."),
            centre="mean",
            references=references,
            columns=3,
        )
    except ModuleNotFoundError:
        return None


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "diverged"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"
