"""The commands ``experiment``, ``evidence``, ``pretrained``, ``decisions`` and ``import``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..evaluation import baselines, comparison, decisions, experiments
from ..evaluation.experiments.report import training_text
from ..kernels import checks
from ..meta.assignment import optimizer_groups
from ..networks import interchange, pretrained, trained
from ..problems import Problem
from ..problems.base import horizon_of
from ..problems.theta import trainable
from .console import UserError, check_outputs, device, network, say, user_errors
from .console import problem as named_problem

_MAX_ROWS = 50  # of panels in a picture

Add = Callable[..., argparse.ArgumentParser]


def add_to(commands: Any, add: Add, add_problem: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add the commands to the parser; ``add`` makes one, ``add_problem`` adds the options of a problem."""
    _add_experiment(commands, add)
    _add_evidence(commands, add)
    listing = add(commands, "pretrained", _pretrained, "list the trained optimizers in the package")
    listing.add_argument("--json", action="store_true", help="everything that is known, as JSON")
    _add_decisions(commands, add, add_problem)
    _add_import(commands, add)


def _add_experiment(commands: Any, add: Add) -> None:
    parser = add(commands, "experiment", _experiment, "one of the paper's experiments: train, compare, tabulate, plot")
    parser.add_argument("name", nargs="?", metavar="NAME", help="its name, or a .json file like those in the package")
    parser.add_argument("--list", action="store_true", help="say which there are")
    parser.add_argument("--out", metavar="DIR", help="folder for checkpoints and results (runs/experiments/NAME)")
    parser.add_argument(
        "--evaluate-only", action="store_true", help="no training: evaluate the pretrained optimizer (or --optimizer)"
    )
    parser.add_argument("--optimizer", metavar="FILE", help="evaluate this one; implies --evaluate-only")
    parser.add_argument("--data", metavar="DATA", help="data set: a folder or a name")
    add_device(parser)
    parser.add_argument("--episodes", type=_positive, metavar="N", help="training episodes of every candidate")
    parser.add_argument("--test-episodes", type=_positive, metavar="N", help="fresh test tasks per setting")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _add_evidence(commands: Any, add: Add) -> None:
    text = "measure the package's optimizers on the sealed test tasks of this release, once, into the ledger"
    parser = add(commands, "evidence", _evidence, text)
    parser.add_argument("name", nargs="+", metavar="NAME", help="of an experiment, or its .json file")
    parser.add_argument("--settings", nargs="+", metavar="NAME", help="some of the experiment's (default: all)")
    parser.add_argument("--out", metavar="DIR", help="folder for tables, figures and what is kept (runs/evidence/NAME)")
    parser.add_argument(
        "--ledger", default="docs/evidence.jsonl", metavar="FILE", help="where every measurement is noted (%(default)s)"
    )
    parser.add_argument("--data", metavar="DATA", help="data set: a folder or a name")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _add_decisions(commands: Any, add: Add, add_problem: Callable[[argparse.ArgumentParser], None]) -> None:
    text = "draw what an optimizer does with gradients, beside Adam and SGD (appendix B)"
    parser = add(commands, "decisions", _decisions, text)
    parser.add_argument("optimizer", metavar="OPTIMIZER", help="a file, or the name of a pretrained optimizer")
    add_problem(parser)
    add_device(parser)
    parser.add_argument("--horizon", type=_positive, default=100, metavar="N", help="steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the test task (%(default)s)")
    parser.add_argument("--coordinates", type=_positive, metavar="N", help="how many (2, or the one that there is)")
    parser.add_argument("--adam-lr", type=float, metavar="X", help="default: tuned on the problem")
    parser.add_argument("--sgd-lr", type=float, metavar="X", help="default: tuned on the problem")
    parser.add_argument("--plot", default="decisions.png", metavar="FILE", help="the picture (%(default)s)")


def _add_import(commands: Any, add: Add) -> None:
    parser = add(
        commands, "import", _import, "convert a .l2l file of google-deepmind/learning-to-learn or a PyTorch state dict"
    )
    parser.add_argument("file", metavar="FILE", help="FILE.l2l, or what torch.save wrote of a state dict")
    parser.add_argument("--out", required=True, metavar="FILE", help="the optimizer, a .safetensors file")
    parser.add_argument("--kind", choices=("deepmind", "torch"), help="default: by the ending")
    parser.add_argument(
        "--key", metavar="KEY", help="of a larger file: the entry that is the state dict, such as model"
    )
    # Not in the files: whoever trained the network knows them.
    parser.add_argument("--preprocess", choices=("identity", "log_sign"), required=True, help="of the gradients")
    parser.add_argument("--p", type=float, default=10.0, metavar="X", help="constant of log_sign (%(default)s)")
    parser.add_argument("--output-scale", type=float, required=True, metavar="X", help="multiplies the updates")


def _experiment(arguments: argparse.Namespace) -> int:
    if arguments.list or arguments.name is None:
        for name in experiments.available():
            experiment = experiments.load(name)
            say(f"{name:20} {experiment.about}\n{'':20} {experiment.source}")
        if not arguments.list:
            raise UserError("experiment: give one of these names")
        return 0
    with user_errors():
        experiment = experiments.load(arguments.name)
        optimizer = None
        if arguments.optimizer is not None:
            optimizer = network(arguments.optimizer, arguments.device)
        elif arguments.evaluate_only:
            if experiment.pretrained not in pretrained.names():
                raise UserError(f"--evaluate-only: {experiment.name} has no pretrained optimizer; give --optimizer")
            optimizer = pretrained.load_pretrained(experiment.pretrained, arguments.device)
        outcome = experiments.run(
            experiment,
            Path("runs", "experiments", experiment.name) if arguments.out is None else arguments.out,
            optimizer=optimizer,
            data=arguments.data,
            test_episodes=arguments.test_episodes,
            episodes=arguments.episodes,
            device=arguments.device,
            progress=not arguments.quiet,
        )
    say(outcome.table.read_text(encoding="utf-8"))
    say("\n".join(f"written: {path}" for path in (outcome.table, outcome.record, outcome.picture) if path is not None))
    if outcome.picture is None:
        print("no picture: plots need matplotlib", file=sys.stderr)
    return 0


def _evidence(arguments: argparse.Namespace) -> int:
    if len(arguments.name) > 1 and arguments.out is not None:
        raise UserError("--out: one experiment at a time, or none of it: they would write the same files")
    for name in arguments.name:
        with user_errors():
            experiment = experiments.load(name)
            outcome, said = experiments.measure(
                experiment,
                Path("runs", "evidence", experiment.name) if arguments.out is None else arguments.out,
                arguments.ledger,
                data=arguments.data,
                settings=arguments.settings,
                progress=not arguments.quiet,
            )
        say(outcome.table.read_text(encoding="utf-8"))
        say("\n".join(said))
    return 0


def _pretrained(arguments: argparse.Namespace) -> int:
    found = pretrained.list_pretrained()
    if arguments.json:
        say(json.dumps(found, indent=1))
        return 0
    for name, facts in found.items():
        say(f"{name}\n  trained: {training_text(facts['record'])}")
        for setting, score in (facts["score"] or {}).items():
            say(f"  {setting}: {', '.join(f'{key} {value:.4g}' for key, value in score.items())}")
    return 0


def _decisions(arguments: argparse.Namespace) -> int:
    check_outputs(plot=arguments.plot)
    net, problem = network(arguments.optimizer, arguments.device), named_problem(arguments)
    with user_errors():
        if (arguments.coordinates or 0) > _MAX_ROWS:
            count = f"expected 1..{_MAX_ROWS}, one row of panels each, got {arguments.coordinates}"
            raise UserError(f"--coordinates: {count}")
        given = {"adam": arguments.adam_lr, "sgd": arguments.sgd_lr}
        # Before the searches, which take longer than anything that follows.
        for name, rate in given.items():
            if rate is not None:
                checks.real(f"learning_rates[{name!r}]", rate, 0.0)
        horizon_of(arguments.horizon)
        task = problem.sample(arguments.seed, "test", arguments.device)
        optimizer_groups(task, net)
        if arguments.coordinates is not None:
            sizes = {name: value.numel() for name, value in trainable(task).items()}
            decisions.check_count(sizes, arguments.coordinates)
        rates = {name: lr if lr is not None else _tuned(problem, name, arguments) for name, lr in given.items()}
        made = decisions.decide(
            net,
            task,
            rates,
            horizon=arguments.horizon,
            coordinates=arguments.coordinates,
        )
        heading = f"{Path(arguments.optimizer).stem} on {problem.name} ({comparison.data_set(problem)})"
        say(f"decisions: {decisions.draw(made, arguments.plot, heading)}")
    say(f"learning rates: Adam {rates['adam']:.3g}, SGD {rates['sgd']:.3g}")
    return 0


def _tuned(problem: Problem, name: str, arguments: argparse.Namespace) -> float:
    # Of the same kind as in the figures of the paper: a constant rate, the default betas.
    given: dict[str, Any] = {"options": {}, "schedules": ["constant"], "points_per_decade": 8}
    return baselines.tune(problem, name, arguments.horizon, seeds=range(5), device=arguments.device, **given)


def _import(arguments: argparse.Namespace) -> int:
    check_outputs(out=arguments.out)
    kind = arguments.kind or ("deepmind" if arguments.file.endswith(".l2l") else "torch")
    options = arguments.file, arguments.preprocess, arguments.p, arguments.output_scale
    with user_errors():
        if kind == "deepmind":
            if arguments.key is not None:
                raise UserError("--key: expected a file of torch.save, a .l2l file has no entries to choose from")
            net = interchange.load_deepmind(*options)
        else:
            net = interchange.load_torch(*options, key=arguments.key)
        trained.save(net, arguments.out)
    say(f"{net!r}\nwritten: {arguments.out}")
    return 0


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--device``."""
    text = "where tasks and networks live: cpu, cuda or cuda:N (%(default)s)"
    parser.add_argument("--device", type=device, default="cpu", metavar="DEVICE", help=text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return int(text)
