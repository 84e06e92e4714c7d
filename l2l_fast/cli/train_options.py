"""The options of ``train`` and what they stand for: arguments of the network and of the trainer, settings in a file."""

from __future__ import annotations

import argparse
from typing import Any

from ..meta.estimators import NAMES as ESTIMATORS
from .options import add_device, add_problem, add_quiet, count

# Options by their place among the settings of a run, which a resumed one takes from its checkpoint.
NETWORK = (
    *("hidden_size", "num_layers", "preprocess", "p", "output_scale", "gac_cells"),
    *("memory", "read_heads", "write_heads", "history", "initial", "add_read"),
)
ESTIMATOR = ("pairs", "sigma", "shortest")
PLACES: dict[str, tuple[str, ...]] = {
    **{name: ("network", name) for name in NETWORK},
    **{name: ("protocol", name) for name in ("horizon", "unroll", "second_derivatives", "autograd")},
    **{name: ("protocol", name) for name in ("coordinate_fraction", "estimator", *ESTIMATOR)},
    **{name: ("meta_optimizer", name) for name in ("lr", "betas", "clip_norm", "decay_to", "decay_episodes")},
    "validate_every": ("validation", "every"),
    "validation_episodes": ("validation", "episodes"),
    "patience": ("validation", "patience"),
    "seed": ("seed",),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all options of the command."""
    add_problem(parser, required=False)
    add_device(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for checkpoint, log and trained optimizer")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, with its settings")
    text = "also write the log for TensorBoard, into this folder (default: tensorboard in --out)"
    parser.add_argument("--tensorboard", nargs="?", const="", metavar="DIR", help=text)
    add_quiet(parser)
    _add_run(parser.add_argument_group("training (defaults: what trains well on the problem)"))
    _add_estimator(parser.add_argument_group("how the meta-gradient is found"))
    _add_curriculum(parser.add_argument_group("what is trained on"))
    _add_network(parser.add_argument_group("network"))


def _add_run(run: Any) -> None:
    run.add_argument(
        "--episodes", type=count, metavar="N", help="episodes in all; with --resume, may be more than at first"
    )
    run.add_argument("--horizon", type=count, metavar="N", help="steps of an episode (100)")
    run.add_argument("--unroll", type=count, metavar="N", help="steps of a segment of truncated back-propagation")
    run.add_argument("--lr", type=float, metavar="X", help="Adam's learning rate on the network")
    run.add_argument("--betas", type=float, nargs=2, metavar="X", help="Adam's decay rates")
    run.add_argument(
        "--decay-to", type=float, metavar="X", help="it falls along a cosine to this fraction; 1: no decay"
    )
    text = "it falls within so many episodes (default: the first --episodes; a run that is extended goes on at the end)"
    run.add_argument("--decay-episodes", type=count, metavar="N", help=text)
    run.add_argument("--clip-norm", type=float, metavar="X", help="largest norm of the meta-gradient")
    run.add_argument("--seed", type=int, metavar="N", help="of initial weights and tasks (0)")
    run.add_argument("--start", metavar="OPTIMIZER", help="weights to begin with: a file, or a pretrained optimizer")
    run.add_argument("--validate-every", type=int, metavar="N", help="episodes between validations; 0: never")
    run.add_argument("--validation-episodes", type=count, metavar="N", help="tasks of a validation")
    run.add_argument("--patience", type=count, metavar="N", help="stop after so many validations without a new best")


def _add_estimator(way: Any) -> None:
    text = (
        "bptt: truncated back-propagation; synthetic_gradients: the same with a learned prediction of what comes after "
        "a segment; pes: persistent evolution strategies, unbiased over the horizon; evolution: of a general-purpose "
        "optimizer on the zoo"
    )
    way.add_argument("--estimator", choices=ESTIMATORS, help=text)
    way.add_argument("--pairs", type=count, metavar="N", help="antithetic pairs of pes and evolution (4)")
    text = "standard deviation of their perturbations (pes 0.01, evolution 0.1)"
    way.add_argument("--sigma", type=float, metavar="X", help=text)
    text = "train on this random part of the coordinates of large tensors, 0..1 (bptt alone)"
    way.add_argument("--coordinate-fraction", type=float, metavar="X", help=text)
    way.add_argument(
        "--second-derivatives", action="store_true", default=None, help="differentiate through the gradients"
    )
    text = "unroll in autograd although the fused backward would do; slower, the same gradients"
    way.add_argument("--autograd", action="store_true", default=None, help=text)


def _add_curriculum(tasks: Any) -> None:
    text = "least number of steps of an episode of evolution, which is drawn between it and --horizon (200)"
    tasks.add_argument("--shortest", type=count, metavar="N", help=text)
    text = "rescale the tensors of every training task, the logarithms of the scales drawn from [-X, X]"
    tasks.add_argument("--scale-tensors", type=float, metavar="X", help=text)
    text = "rescale its loss, the logarithm of the scale drawn from [LOW, HIGH]"
    tasks.add_argument("--scale-loss", type=float, nargs=2, metavar=("LOW", "HIGH"), help=text)


def _add_network(net: Any) -> None:
    net.add_argument("--hidden-size", type=int, metavar="N", help="units per layer, 4..64 (20); 0 without layers")
    text = "1..4 (2); with --preprocess normalized also 0: moving averages alone"
    net.add_argument("--num-layers", type=int, metavar="N", help=text)
    net.add_argument("--preprocess", choices=("identity", "log_sign", "normalized"), help="of the gradients")
    net.add_argument("--p", type=float, metavar="X", help="constant of log_sign (10)")
    net.add_argument("--output-scale", type=float, metavar="X", help="multiplies the updates")
    text = "cells of every layer that are averaged over all coordinates (0; with a memory 2)"
    net.add_argument("--gac-cells", type=int, metavar="N", help=text)
    text = "NTM-BFGS: a memory that is a matrix over the coordinates, whole or made of the last writes"
    net.add_argument("--memory", choices=("dense", "low_rank"), help=text)
    net.add_argument("--read-heads", type=int, metavar="N", help="of the memory (1)")
    net.add_argument("--write-heads", type=int, metavar="N", help="of the memory (3)")
    net.add_argument("--history", type=int, metavar="N", help="steps that a low-rank memory remembers (10)")
    net.add_argument("--initial", choices=("zero", "identity"), help="the memory at first")
    net.add_argument(
        "--add-read", action="store_true", default=None, help="what is read from the memory is added to the update"
    )


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, of those in PLACES."""
    return {name: getattr(arguments, name) for name in PLACES if getattr(arguments, name) is not None}


def dashed(name: str) -> str:
    """The option of that name, as it is typed."""
    return "--" + name.replace("_", "-")
