"""The command ``suite``: optimizers on the evaluation suite, beside tuned baselines."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from ..evaluation import suite
from ..evaluation.suite import evaluating
from ..networks import writing
from .console import UserError, say, user_errors, write_json
from .options import Commands, add_command, add_quiet


def add_to(commands: Commands) -> None:
    """Add the command to the parser."""
    text = "measure optimizers on networks that none was made for, beside Adam, AdamW, NAG and Muon at their best"
    parser = add_command(commands, "suite", _run, text, "general", "general Adam:lr=1e-3 --networks mlp-relu conv")
    what = "a pretrained optimizer, a .safetensors file, Adam:lr=1e-3 (any class of torch.optim), package.module:Class"
    parser.add_argument("contender", nargs="*", metavar="CONTENDER", help=what)
    lengths, names = evaluating.STEPS, ", ".join(suite.NETWORKS)
    parser.add_argument(
        "--steps", nargs="+", type=int, default=lengths, metavar="N", help="of a run, one or several (1000 10000)"
    )
    parser.add_argument("--networks", nargs="+", metavar="NAME", help=f"some of {names} (default: all)")
    parser.add_argument("--seeds", type=int, default=evaluating.SEEDS, metavar="N", help="test seeds (%(default)s)")
    parser.add_argument(
        "--data", metavar="DATA", help="a folder of data sets (default: L2L_FAST_DATA, or the digits in the package)"
    )
    parser.add_argument(
        "--out", default="runs/suite", metavar="DIR", help="folder for results; the same command goes on (%(default)s)"
    )
    parser.add_argument("--tune", action="store_true", help="measure the baselines that are missing (hours for all)")
    add_quiet(parser)


def _run(arguments: argparse.Namespace) -> int:
    if not arguments.contender and not arguments.tune:
        raise UserError("suite: expected a CONTENDER (or --tune), got none")
    on_run = None if arguments.quiet else _Progress()
    with user_errors():
        lengths = sorted({evaluating.checked_steps(steps) for steps in arguments.steps})
        contenders = [suite.parse(text) for text in arguments.contender]
        if len({contender.name for contender in contenders}) < len(contenders):
            raise UserError(f"CONTENDER: expected different ones, got {', '.join(arguments.contender)}")
        networks, folder = suite.choose(arguments.networks), suite.Folder.named(arguments.data)
        seeds = suite.seeds(arguments.seeds)
        with writing.folder(arguments.out, "--out") as out:
            baselines = suite.baselines(folder, out, arguments.tune, on_run)
            if arguments.tune:
                for _ in baselines.everything(networks, lengths, seeds):
                    pass
            if not contenders:
                say(f"tuned baselines: {out / 'baselines.jsonl'}")
                return 0
            keeper = suite.Keeper(suite.Store(out / "contenders.jsonl"), folder, on_run=on_run)
            outcomes = _measure(contenders, networks, lengths, seeds, baselines, keeper)
            say(suite.text(outcomes))
            write_json(str(out / "results.json"), [outcome.to_json() for outcome in outcomes])
            writing.write_atomically(out / "results.md", suite.text(outcomes) + "\n")
            say("\n".join(["", f"written: {out / 'results.json'}", f"written: {out / 'results.md'}"]))
            _draw(outcomes, out)
    return 0


def _measure(
    contenders: list[suite.Contender], networks: list[suite.Network], lengths: list[int], seeds: range, *kept: Any
) -> list[suite.Outcome]:
    try:
        return [suite.measure(each, networks, steps, seeds, *kept) for steps in lengths for each in contenders]
    except suite.MissingRun as error:
        raise UserError(f"{error}: --tune measures the baselines that are missing") from error


def _draw(outcomes: list[suite.Outcome], out: Path) -> None:
    from ..evaluation.suite import pictures

    try:
        paths = [pictures.ratios(outcomes, out / "ratios.png")]
        for steps in sorted({outcome.steps for outcome in outcomes}):
            alike = [outcome for outcome in outcomes if outcome.steps == steps]
            paths.append(pictures.curves(alike, out / f"curves-{steps}.png"))
        say("\n".join(f"written: {path}" for path in paths))
    except ModuleNotFoundError as error:
        print(f"no picture: {error}", file=sys.stderr)


class _Progress:
    """Says what was run, as it happens."""

    def __init__(self) -> None:
        self.begin = time.monotonic()

    def __call__(self, key: Any, run: Any) -> None:
        who = key.optimizer.split(" ")[0] + (f" {key.options['lr']:g}" if "lr" in key.options else "")
        who += "" if key.schedule == "constant" else f" {key.schedule}"
        what = "tuning " if key.search else ""
        ends = "diverged" if run.diverged else f"final loss {run.final:.4g}"
        took = f"[{time.monotonic() - self.begin:6.0f} s]"
        print(f"{took} {what}{key.network}, {key.steps:,} steps, {who}: {ends}", file=sys.stderr, flush=True)
