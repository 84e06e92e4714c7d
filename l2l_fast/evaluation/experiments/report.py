"""Tables, stored curves and pictures of an experiment."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...networks import files
from ...networks.record import record_of
from ...networks.several import Networks
from ...networks.writing import write_atomically
from ...problems import Problem
from .. import plots
from ..baselines import Setup
from ..comparison import LEARNED, Comparison
from .config import Experiment, Setting, paper_curves
from .tables import STEPS, section, sum_from_start

_VERSION = 2  # of what kept curves are
_PARTS = ("losses", "by_problem", "errors")


def fingerprint(
    net: Networks | None,
    problem: Problem,
    setting: Setting,
    count: int,
    tuning: int,
    device: str = "cpu",
    release: str | None = None,
) -> str:
    """Of everything that the curves of a setting depend on; without a network: those of the baselines."""
    digest = hashlib.sha256()
    if net is not None:
        digest.update(weights_digest(net).encode())
    place = [] if device == "cpu" else [device]  # a GPU adds up in another order
    about = [_VERSION, problem.config(), setting.horizon, setting.split, count, tuning, release, *place]
    about += [setting.search, setting.tuning_problem] if net is None else []
    digest.update(json.dumps(about).encode())
    return digest.hexdigest()


def weights_digest(net: Networks) -> str:
    """Of the weights of a network, or of several."""
    digest = hashlib.sha256()
    for name, value in net.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_curves(path: Path, key: str, comparison: Comparison) -> None:
    """Keep the losses of all episodes and what is known of their ends, in half of float64's size."""
    metadata = {
        "key": key,
        "learning_rates": json.dumps(comparison.learning_rates),
        "setups": json.dumps({name: asdict(setup) for name, setup in comparison.setups.items()}),
        "order": json.dumps(list(comparison.losses)),
        "problems_per_task": str(comparison.problems_per_task),
    }
    tensors = {
        f"{part}/{name}": values.float() for part in _PARTS for name, values in getattr(comparison, part).items()
    }
    files.write_tensors(path, tensors, metadata)


def read_curves(path: Path, key: str, problem: Problem) -> Comparison | None:
    """What :func:`write_curves` kept, if it was kept for ``key``."""
    if not path.is_file():
        return None
    try:
        metadata, tensors = files.read(path)
        if metadata.get("key") != key:
            return None
        parts: dict[str, dict[str, torch.Tensor]] = {part: {} for part in _PARTS}
        for name in json.loads(metadata["order"]):
            parts["losses"][name] = tensors[f"losses/{name}"].double()
            for part in _PARTS[1:]:
                if f"{part}/{name}" in tensors:
                    parts[part][name] = tensors[f"{part}/{name}"].double()
        setups = {name: Setup(**setup) for name, setup in json.loads(metadata["setups"]).items()}
        return Comparison(
            problem,
            learning_rates=json.loads(metadata["learning_rates"]),
            setups=setups,
            problems_per_task=int(metadata["problems_per_task"]),
            **parts,
        )
    except (KeyError, TypeError, ValueError):
        return None  # damaged: computed again


def scores(results: dict[str, Comparison]) -> dict[str, dict[str, float]]:
    """The learned optimizer's mean losses by setting, JSON-able; of the settings where it did not diverge."""
    found: dict[str, dict[str, float]] = {}
    for name, comparison in results.items():
        mean = comparison.losses[LEARNED].mean(0)
        values = {f"step {t}": mean[t].item() for t in STEPS if t < comparison.horizon}
        values[f"step {comparison.horizon}"] = mean[-1].item()
        values["sum"] = sum_from_start(comparison, LEARNED)[0]
        finite = {key: float(f"{value:.5g}") for key, value in values.items() if math.isfinite(value)}
        found[name] = {**finite, "test tasks": comparison.episodes}
    return found


def write_table(
    experiment: Experiment, net: Networks, results: dict[str, Comparison], path: Path, release: str | None = None
) -> Path:
    """The tables as Markdown."""
    lines = [f"# {experiment.name}", "", experiment.about, "", f"Source: {experiment.source}.", ""]
    record = record_of(net)
    if record is not None:
        lines += ["Training of this optimizer: " + training_text(record) + ".", ""]
    if release is not None:
        lines += [
            f"Measured on the sealed tasks of release {release}: nobody had looked at them, and nothing was chosen on "
            f"them (`python -m l2l_fast evidence {experiment.name}`).",
            "",
        ]
    lines.append(
        "Means over fresh tasks ± half of the 95 % interval over tasks. Final: the mean of the last 5 % of the losses "
        "(one minibatch is noise), which the baselines were tuned for, on validation tasks of the same family: "
        "learning rate, momenta or betas, weight decay and schedule (constant, cosine, linear, hold then linear). "
        "Learned minus it: the paired difference of final losses, and on how many tasks the learned optimizer is "
        "lower. Sum: of the losses at steps 0 to the last but one. Paper: its published mean at the last step, "
        "read off the figure."
    )
    for setting in experiment.settings:
        lines += ["", *section(setting, results[setting.name], experiment.tuning(setting))]
    write_atomically(path, "\n".join(lines) + "\n")
    return path


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
