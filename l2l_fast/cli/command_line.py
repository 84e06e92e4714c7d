"""The command line: ``python -m l2l_fast COMMAND``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import problems
from ..evaluation import baselines
from ..evaluation import comparison as comparisons
from ..meta import evaluate
from ..networks import writing
from . import commands as more
from . import suite as suite_command
from . import train as train_command
from .console import PROGRAM, UserError, check_outputs, draw, unbreakable_streams
from .console import network as _network
from .console import problem as _problem
from .console import say as _say
from .console import user_errors as _user_errors
from .console import write_json as _write_json

_MAX_THREADS = 1024  # far beyond any machine's processors; a process that starts too many ends without a word


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (0; 1: a whole demo in which a baseline won; 2: a user's mistake; 130:
    interrupted)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with unbreakable_streams():
        return _main(argv)


def _main(argv: list[str]) -> int:
    if argv[:1] == ["bench"]:
        return _bench(argv[1:])
    arguments = _parser().parse_args(argv)
    try:
        if arguments.threads is not None:
            if arguments.threads > _MAX_THREADS:
                raise UserError(f"--threads: expected 1..{_MAX_THREADS}, got {arguments.threads}")
            torch.set_num_threads(arguments.threads)
        return arguments.command(arguments)
    except UserError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


# ---- commands ----


def _evaluate(arguments: argparse.Namespace) -> int:
    check_outputs(json=arguments.json)
    net, problem = _network(arguments.optimizer, arguments.device), _problem(arguments)
    with _user_errors():
        losses = evaluate(net, problem, range(arguments.episodes), arguments.horizon, device=arguments.device)
    problems_per_task = problem.sample(0, "test").side_by_side
    result = comparisons.Comparison(problem, {comparisons.LEARNED: losses}, {}, problems_per_task)
    _say(comparisons.table(result))
    _write_json(arguments.json, result.to_json())
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    check_outputs(json=arguments.json, plot=arguments.plot)
    net, problem = _network(arguments.optimizer, arguments.device), _problem(arguments)
    with _user_errors():
        result = comparisons.compare(
            net,
            problem,
            arguments.horizon,
            arguments.episodes,
            tuning_episodes=arguments.tuning_episodes,
            names=arguments.baselines,
            cache=arguments.cache,
            device=arguments.device,
            on_trial=None if arguments.quiet else _show_trial,
        )
    _say(comparisons.table(result))
    _say(comparisons.verdict(result)[1])
    _write_json(arguments.json, result.to_json())
    draw(
        [result],
        arguments.plot,
        titles=[repr(problem)],
        heading=f"{Path(arguments.optimizer).name} against tuned baselines",
    )
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from . import demo

    with _user_errors():
        tasks = demo.tasks(arguments.data, quick=arguments.quick)
        with writing.folder(arguments.out, "--out") as out:
            general = () if arguments.quick else demo.DROPPED_INTO
            return demo.run(tasks, out, progress=not arguments.quiet, general=general)


def _info(arguments: argparse.Namespace) -> int:
    facts = information()
    if arguments.json:
        _say(json.dumps(facts, indent=2))
        return 0
    width = max(map(len, facts))
    for name, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        _say(f"{name.ljust(width)}  {text}")
    return 0


def information() -> dict[str, Any]:
    """Versions, instruction sets, threads and data sets of this installation; JSON-able."""
    from importlib.metadata import PackageNotFoundError, version

    from .. import _C
    from ..problems.data import EMBEDDED, ENVIRONMENT_VARIABLE, FULL, load_mnist

    def package(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    names = ("l2l_fast", "torch", "numpy", "safetensors", "tqdm", "matplotlib")
    facts: dict[str, Any] = {name: package(name) for name in names}
    facts["python"] = f"{platform.python_version()} ({sys.executable})"
    facts["machine"] = platform.platform()
    facts["instruction set"] = _C.isa()
    facts["available instruction sets"] = list(_C.isa_available())
    facts["L2L_FAST_ISA"] = os.environ.get("L2L_FAST_ISA", "not set")
    facts["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} processors"
    facts["CUDA"] = torch.version.cuda or "not in this torch"
    facts["build"] = ", ".join(f"{key} {value}" for key, value in _C.build_info().items())
    for name in (EMBEDDED, FULL):
        try:
            data = load_mnist(name)
            facts[name] = f"{sum(len(split) for split in data.splits.values()):,} images in {data.folder}"
        except (OSError, ValueError) as error:
            facts[name] = f"not found: {str(error).splitlines()[0]}"
    facts[ENVIRONMENT_VARIABLE] = os.environ.get(ENVIRONMENT_VARIABLE, "not set")
    return facts


def _bench(argv: list[str]) -> int:
    from ..evaluation import benchmark

    return benchmark.main(argv) or 0


# ---- shared by commands ----


def _show_trial(name: str, lr: float, loss: float) -> None:
    print(f"tuning {name}: lr {lr:.3g}, final validation loss {loss:.4g}", file=sys.stderr)


# ---- arguments ----


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Learned optimizers (Andrychowicz et al. 2016): meta-train them, measure them, use them.",
        epilog=f"{PROGRAM} COMMAND --help explains a command.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_train(commands)
    _add_evaluate(commands)
    _add_compare(commands)
    more.add_to(commands, _add, _add_problem)
    suite_command.add_to(commands, _add)
    _add(commands, "bench", _info, "measure the kernels side by side with eager and compiled PyTorch")
    info = _add(commands, "info", _info, "print versions, instruction sets, threads and data sets")
    info.add_argument("--json", action="store_true", help="as JSON")
    demo = _add(
        commands, "demo", _demo, "meta-train on quadratics and on real digits, compare with tuned baselines, plot"
    )
    demo.add_argument("--out", default="demo_output", metavar="DIR", help="folder for results (default: %(default)s)")
    demo.add_argument(
        "--data", metavar="DATA", help="MNIST: a folder or mnist-60k (default: the 10,000 embedded images)"
    )
    demo.add_argument("--quick", action="store_true", help="a few episodes, only to see that everything runs")
    demo.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def _add(commands: Any, name: str, command: Callable[..., int], text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(command=command)
    parser.add_argument("--threads", type=_count, metavar="N", help="CPU threads (default: torch's choice)")
    return parser


def _add_train(commands: Any) -> None:
    parser = _add(
        commands, "train", train_command.train, "meta-train an optimizer; can be killed and resumed at any time"
    )
    _add_problem(parser, required=False)
    more.add_device(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for checkpoint, log and trained optimizer")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, with its settings")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    run = parser.add_argument_group("training (defaults: what trains well on the problem)")
    run.add_argument(
        "--episodes", type=_count, metavar="N", help="episodes in all; with --resume, may be more than at first"
    )
    run.add_argument("--horizon", type=_count, metavar="N", help="steps of an episode (100)")
    run.add_argument("--unroll", type=_count, metavar="N", help="steps of a segment of truncated back-propagation")
    run.add_argument("--lr", type=float, metavar="X", help="Adam's learning rate on the network")
    run.add_argument(
        "--decay-to", type=float, metavar="X", help="it falls along a cosine to this fraction; 1: no decay"
    )
    text = "it falls within so many episodes (default: the first --episodes; a run that is extended goes on at the end)"
    run.add_argument("--decay-episodes", type=_count, metavar="N", help=text)
    run.add_argument("--clip-norm", type=float, metavar="X", help="largest norm of the meta-gradient")
    run.add_argument(
        "--second-derivatives", action="store_true", default=None, help="differentiate through the gradients"
    )
    run.add_argument("--seed", type=int, metavar="N", help="of initial weights and tasks (0)")
    run.add_argument("--start", metavar="OPTIMIZER", help="weights to begin with: a file, or a pretrained optimizer")
    run.add_argument("--validate-every", type=int, metavar="N", help="episodes between validations; 0: never")
    run.add_argument("--validation-episodes", type=_count, metavar="N", help="tasks of a validation")
    run.add_argument("--patience", type=_count, metavar="N", help="stop after so many validations without a new best")
    net = parser.add_argument_group("network")
    net.add_argument("--hidden-size", type=int, metavar="N", help="units per layer, 4..64 (20)")
    net.add_argument("--num-layers", type=int, metavar="N", help="1..4 (2)")
    net.add_argument("--preprocess", choices=("identity", "log_sign"), help="of the gradients")
    net.add_argument("--p", type=float, metavar="X", help="constant of log_sign (10)")
    net.add_argument("--output-scale", type=float, metavar="X", help="multiplies the updates")


def _add_evaluate(commands: Any) -> None:
    parser = _add(commands, "evaluate", _evaluate, "learning curve of a trained optimizer on fresh test tasks")
    _add_optimizer(parser)
    _add_problem(parser)
    _add_protocol(parser)


def _add_compare(commands: Any) -> None:
    parser = _add(commands, "compare", _compare, "a trained optimizer against hand-written ones at their best")
    _add_optimizer(parser)
    _add_problem(parser)
    _add_protocol(parser)
    parser.add_argument(
        "--tuning-episodes", type=_count, default=10, metavar="N", help="validation tasks to tune on (%(default)s)"
    )
    parser.add_argument(
        "--baselines",
        nargs="+",
        default=baselines.NAMES,
        choices=baselines.NAMES,
        metavar="NAME",
        help=f"some of {', '.join(baselines.NAMES)} (default: all)",
    )
    parser.add_argument("--cache", metavar="DIR", help="keep the searches' trials there: the same command goes on")
    parser.add_argument("--plot", default="compare.png", metavar="FILE", help="learning curves (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    text = "a trained optimizer, the checkpoint of a run (its best), or the name of a pretrained one"
    parser.add_argument("--optimizer", required=True, metavar="FILE", help=text)


def _add_problem(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--problem", required=required, choices=problems.available(), help="the optimizee")
    parser.add_argument(
        "--option",
        action="append",
        type=_option,
        metavar="KEY=VALUE",
        help='an option of the problem, as often as needed: "hidden=[40,40]", activation=relu, dim=20',
    )
    parser.add_argument(
        "--data", metavar="DATA", help="data set: a folder or a name (default: L2L_FAST_DATA or embedded)"
    )


def _add_protocol(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--episodes", type=_count, default=20, metavar="N", help="test tasks (%(default)s)")
    parser.add_argument("--horizon", type=_count, default=100, metavar="N", help="steps (%(default)s)")
    more.add_device(parser)
    parser.add_argument("--json", metavar="FILE", help="write the curves there")


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return value


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
