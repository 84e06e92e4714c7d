"""The command ``pretrained``: the trained optimizers that come with the package."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from ..evaluation.experiments.report import training_text
from ..kernels.checks import meant
from ..networks import pretrained
from .console import UserError, say, table
from .options import Commands, add_command


def add_to(commands: Commands) -> None:
    """Add the command to the parser."""
    text = "list the trained optimizers in the package"
    parser = add_command(commands, "pretrained", _run, text, "", "general", "--json")
    parser.add_argument("name", nargs="*", metavar="NAME", help="tell everything about these (default: list all)")
    parser.add_argument("--json", action="store_true", help="everything that is known, as JSON")


def _run(arguments: argparse.Namespace) -> int:
    found = pretrained.list_pretrained()
    for name in arguments.name:
        if name not in found:
            known = f"expected some of {', '.join(found)}, got {name!r}{meant(name, found)}"
            raise UserError(f"NAME: {known}")
    chosen = {name: found[name] for name in arguments.name or found}
    if arguments.json:
        say(json.dumps(chosen, indent=1))
    elif arguments.name:
        say("\n\n".join(_everything(name, facts) for name, facts in chosen.items()))
    else:
        header = ("name", "trained on", "network", "steps", "episodes", "loss on test tasks")
        say(table(header, [_row(name, facts) for name, facts in chosen.items()], numbers=(3, 4)))
        say('\nuse one: l2l_fast.load_pretrained("general"); its training and all its scores: pretrained NAME')
    return 0


def _row(name: str, facts: Mapping[str, Any]) -> tuple[str, ...]:
    record = facts["record"]
    data = facts["data"]
    return (
        name,
        facts["problem"].get("name", "?") + ("" if data is None else f" ({data})"),
        _network(record.get("network", {})),
        _number(facts["horizon"]),
        _number(facts["episodes"]),
        _score(facts["score"]),
    )


def _network(config: Mapping[str, Any]) -> str:
    groups = config.get("groups")
    if groups is not None:  # alike in all that is told here
        return f"{_network(next(iter(groups.values())))}; {', '.join(groups)}"
    if config.get("num_layers") == 0:
        return f"no layers, {config.get('preprocess', '?')}"
    return f"{config.get('num_layers', '?')} x {config.get('hidden_size', '?')}, {config.get('preprocess', '?')}"


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _score(score: Mapping[str, Mapping[str, Any]] | None) -> str:
    """Of the first setting that it was measured on, at the last step."""
    for setting, values in (score or {}).items():
        steps = [key for key in values if key.startswith("step ")]
        key = steps[-1] if steps else next(iter(values))
        return f"{values[key]:.3g} at {key}" if steps else f"{values[key]:.3g} ({setting})"
    return "?"


def _everything(name: str, facts: Mapping[str, Any]) -> str:
    lines = [name, f"  network: {_network(facts['record'].get('network', {}))}"]
    lines.append(f"  trained: {training_text(facts['record'])}")
    if "made_of" in facts["record"]:
        lines.append(f"  made of: {facts['record']['made_of']}")
    lines += [f"  {setting}: {_values(values)}" for setting, values in (facts["score"] or {}).items()]
    return "\n".join(lines)


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in values.items())
