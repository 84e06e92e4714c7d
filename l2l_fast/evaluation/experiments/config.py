"""What an experiment is: read from a JSON file in this folder."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ... import problems
from ...kernels import checks
from ...kernels.checks import meant, one_of, positive_int
from ...problems.base import horizon_of
from ...problems.scaled import Scaled
from ..baselines import NAMES

_FOLDER = Path(__file__).parent
_PAPER = "paper_curves.json"
_TRAINING_SCALES = "training_scales"
_TRAINED_AS = "trained_as"
_TRAINING = ("pretrained", "problem", "networks", "training", "episodes", "candidates")
_FOLDERS = ("conv", "neural-art")  # problems whose data is a folder of their own


@dataclass(frozen=True)
class Stage:
    """A continuation of a training run from its best network so far: how long, and what differs from the experiment's
    problem and training. ``seed``: of its tasks; by default stage k takes the candidate's plus 1000 k."""

    episodes: int
    problem: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True)
class Candidate:
    """One training run: its seed (of initial weights and tasks), what differs from the experiment's problem and
    training, and its further stages."""

    seed: int
    problem: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()

    @classmethod
    def parse(cls, content: dict[str, Any]) -> Candidate:
        """From the JSON object."""
        given = _fields(cls, content, "candidate")
        stages = _list("stages", content.get("stages", []))
        stages = [Stage(**_fields(Stage, stage, "stage")) for stage in stages]
        for stage in stages:
            positive_int("stage: episodes", stage.episodes)
        return cls(**{**given, "stages": tuple(stages)})


@dataclass(frozen=True)
class Setting:
    """One table and one panel of the figure.

    Attributes:
        name, title: short and long.
        problem: options that differ from those of the training problem.
        horizon: steps.
        split: where the tasks' data come from, "test" or "train"; theta_0 and minibatches are new either way.
        paper: the paper's curves to draw beside (a name in ``paper_curves.json``).
        target: published loss of the LSTM by step ("sum": of the losses at steps 0..horizon-1), to be reached.
        transfer: the trained optimizer was not trained for this.
        baselines: names of those to compare with, where all would take too long.
        search: arguments of :func:`l2l_fast.baselines.search`.
        tuning_problem: options of the problem that differ where baselines are tuned: more problems side by side, so
            that a rate at which one in a thousand diverges is seen there.
        test_episodes, tuning_episodes: in the place of the experiment's.
    """

    name: str
    title: str
    problem: dict[str, Any] = field(default_factory=dict)
    horizon: int = 100
    split: str = "test"
    paper: str | None = None
    target: dict[str, float] = field(default_factory=dict)
    transfer: bool = False
    baselines: tuple[str, ...] = NAMES
    search: dict[str, Any] = field(default_factory=dict)
    tuning_problem: dict[str, Any] = field(default_factory=dict)
    test_episodes: int | None = None
    tuning_episodes: int | None = None

    @classmethod
    def parse(cls, content: dict[str, Any]) -> Setting:
        """From the JSON object; ValueError for a baseline that there is not."""
        given = _fields(cls, content, "setting")
        setting = cls(**{**given, "baselines": tuple(_list("baselines", content.get("baselines", list(NAMES))))})
        horizon_of(setting.horizon)
        one_of("split", setting.split, problems.SPLITS)
        for name in ("test_episodes", "tuning_episodes"):
            if getattr(setting, name) is not None:
                positive_int(name, getattr(setting, name))
        if not setting.baselines or not all(checks.chosen(each, NAMES) for each in setting.baselines):
            raise ValueError(f"baselines: expected some of {NAMES}, got {setting.baselines}")
        return setting


@dataclass(frozen=True)
class Experiment:
    """An experiment; the fields are the keys of its file.

    Attributes:
        name, about, source: what it is, and where it comes from.
        pretrained: the optimizer of this name in :mod:`l2l_fast.pretrained` came from it; "": none did.
        problem: name and options of the training problem; ``training_scales``, [width, low, high], wraps
            it in :class:`l2l_fast.problems.scaled.Scaled`.
        networks: options of the network, by kind of parameter; the kind "" is a single network for all.
        training: arguments of :class:`l2l_fast.MetaTrainer`.
        episodes: of every candidate, over which the meta-learning rate decays.
        candidates: runs, of which the best on validation tasks is kept.
        selection: names of the settings that this choice looks at (mean logarithm of the final validation losses).
        test_episodes, tuning_episodes: tasks of the final tables, and per learning rate of the baselines' search.
        settings: the tables.
    """

    name: str
    about: str
    source: str
    pretrained: str
    problem: dict[str, Any]
    networks: dict[str, dict[str, Any]]
    training: dict[str, Any]
    episodes: int
    candidates: tuple[Candidate, ...]
    selection: tuple[str, ...]
    settings: tuple[Setting, ...]
    test_episodes: int = 100
    tuning_episodes: int = 10

    def setting(self, name: str) -> Setting:
        """The setting of that name; ValueError if there is none."""
        for setting in self.settings:
            if setting.name == name:
                return setting
        names = [each.name for each in self.settings]
        raise ValueError(f"setting: expected one of {names}, got {name!r}{meant(name, names)}")

    def tuning(self, setting: Setting) -> int:
        """Validation tasks per learning rate of a baseline's search in that setting."""
        return self.tuning_episodes if setting.tuning_episodes is None else setting.tuning_episodes

    def tests(self, setting: Setting) -> int:
        """Fresh test tasks of that setting."""
        return self.test_episodes if setting.test_episodes is None else setting.test_episodes

    def training_problem(self, part: Candidate | Stage, data: str | None = None) -> problems.Problem:
        """The problem of a training run or stage; ``data`` replaces the option ``data`` (``folder`` of "conv"
        and "neural-art")."""
        options = {**self.problem, **part.problem}
        scales = options.pop(_TRAINING_SCALES, None)
        problem = problems.get(**_with_data(options, data))
        return problem if scales is None else Scaled(problem, scales[0], (scales[1], scales[2]))

    def problem_of(self, setting: Setting, data: str | None = None, tuning: bool = False) -> problems.Problem:
        """The problem of a setting, never scaled; ``tuning``: that of its baselines' search."""
        options = {**self.problem, **setting.problem, **(setting.tuning_problem if tuning else {})}
        options.pop(_TRAINING_SCALES, None)
        return problems.get(**_with_data(options, data))


def available() -> tuple[str, ...]:
    """The names of the experiments in the package."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json") if path.name != _PAPER))


def load(name: str | os.PathLike[str]) -> Experiment:
    """The experiment of that name, or in that JSON file.

    Raises:
        ValueError: no such experiment, or a file with other keys.
        FileNotFoundError: no such file.
    """
    text = os.fspath(name)
    if not text.endswith(".json") and text not in available():
        known = available()
        raise ValueError(f"experiment: expected one of {known} or a .json file, got {text!r}{meant(text, known)}")
    path = Path(text) if text.endswith(".json") else _FOLDER / f"{text}.json"
    try:
        content = _with_training(json.loads(path.read_text(encoding="utf-8")))
        content = _fields(Experiment, content, "experiment")
        content["candidates"] = tuple(Candidate.parse(each) for each in _list("candidates", content["candidates"]))
        content["settings"] = tuple(Setting.parse(each) for each in _list("settings", content["settings"]))
        content["selection"] = tuple(_list("selection", content["selection"]))
        for name in ("episodes", "test_episodes", "tuning_episodes"):
            if name in content:
                positive_int(name, content[name])
        if not content["networks"]:
            raise ValueError("networks: expected the options of at least one network")
        experiment = Experiment(**content)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not an experiment: {error}") from error
    if not experiment.candidates or not experiment.settings:
        raise ValueError(f"{str(path)!r}: expected at least one candidate and one setting")
    for each in experiment.selection:
        experiment.setting(each)
    return experiment


def _with_training(content: Any) -> Any:
    """An experiment that says ``"trained_as": NAME`` measures the optimizer of another one in the package on other
    tasks: how that is trained is written down there alone."""
    if not isinstance(content, dict) or _TRAINED_AS not in content:
        return content
    other = content[_TRAINED_AS]
    if not checks.chosen(other, available()):
        raise ValueError(f"{_TRAINED_AS}: expected one of {available()}, got {other!r}")
    training = json.loads((_FOLDER / f"{other}.json").read_text(encoding="utf-8"))
    found = {**{key: training[key] for key in _TRAINING}, "selection": [], **content}
    del found[_TRAINED_AS]
    return found


def paper_curves(name: str) -> dict[str, tuple[list[int], list[float]]]:
    """The paper's curves of one figure by optimizer: steps and mean losses.

    Raises:
        ValueError: there is no figure of that name.
    """
    curves = json.loads((_FOLDER / _PAPER).read_text(encoding="utf-8"))["curves"]
    if name not in curves:
        raise ValueError(f"paper: expected one of {sorted(curves)}, got {name!r}")
    figure = dict(curves[name])
    first = figure.pop("first")
    return {each: (list(range(first, first + len(losses))), losses) for each, losses in figure.items()}


def _fields(kind: type, content: Any, what: str) -> dict[str, Any]:
    """The JSON object of a dataclass, with the keys that it needs and no others, objects where it has dicts.

    Raises:
        TypeError: something else than an object. ValueError: other keys.
    """
    if not isinstance(content, dict):
        raise TypeError(f"{what}: expected an object with keys, got {content!r}")
    known = {each.name: each for each in dataclasses.fields(kind)}
    nothing = (dataclasses.MISSING, dataclasses.MISSING)
    needed = [name for name, each in known.items() if (each.default, each.default_factory) == nothing]
    missing, unknown = [name for name in needed if name not in content], sorted(set(content) - set(known))
    if missing or unknown:
        raise ValueError(f"{what}: keys missing: {missing}, unknown: {unknown}; expected {', '.join(known)}")
    for name, value in content.items():
        if str(known[name].type).startswith("dict") and not isinstance(value, dict):
            raise TypeError(f"{what}: {name}: expected an object with keys, got {value!r}")
    return dict(content)


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{name}: expected a list, got {value!r}")
    return value


def _with_data(options: dict[str, Any], data: str | None) -> dict[str, Any]:
    if data is None:
        return options
    return {**options, "folder" if options.get("name") in _FOLDERS else "data": data}
