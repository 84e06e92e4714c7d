"""MetaTrainer: trains phi by truncated back-propagation through time (Andrychowicz et al. 2016, section 3)."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..memory import NTMBFGS
from ..network import CoordinatewiseLSTM
from ..problems import Problem
from ..problems.base import positive_int
from . import checkpoint as checkpoints
from .checkpoint import Checkpoint, Counters
from .episode import MetaLoss, autograd_episode, fused_episode
from .evaluation import evaluate
from .log import TrainingLog
from .networks import Networks, as_networks, config_of, device_of, members
from .progress import Progress
from .protocol import LossWeights, Protocol, cosine_decay, episode_seed
from .record import attach


class MetaTrainer:
    """Trains a network to optimise the tasks of a problem.

    An episode draws a task, optimises it for ``horizon`` steps from its theta_0 and a zero state, and after every
    ``unroll`` steps updates phi with Adam along the gradient of ``sum_t w_t f(theta_t)`` over that segment. Episode i
    uses the task ``problem.sample(hash(seed, i), "train")``: a run is a function of its settings, and nothing else.

    Args:
        net: the network; trained in place. Or several by kind of parameter (a mapping, kept as an ``nn.ModuleDict``),
            for tasks whose ``parameter_groups()`` has these kinds; one Adam then trains them all.
        problem: where tasks come from; :class:`l2l_fast.problems.ModuleProblem` wraps any module and loss.
        horizon, unroll: steps of an episode and of a segment (the paper: 100 and 20).
        lr: Adam's learning rate on phi. The good window is narrow, about 3e-3 to 1e-2.
        seed: of the run's tasks.
        weights: w_1..w_horizon as numbers, as a function of t, or ``"final"``: only the last step of each segment
            counts (with ``unroll=horizon``, equation 2 of the paper). Default: all 1.
        second_derivatives: keep the path through d grad / d theta, which the paper drops. Runs through autograd.
        meta_loss: replaces the weighted sum: ``meta_loss(trace: SegmentTrace) -> scalar``. Runs through autograd.
        autograd: unroll in autograd although the fused backward would do (slower; the same gradients). A network with
            memory always is.
        coordinate_fraction: below 1, the meta-gradient is estimated, without bias, from this random part of the
            coordinates of every large tensor (:mod:`l2l_fast.meta.sampling`); cheaper, a little noisier.
        clip_norm: the meta-gradient's norm is cut to this. It is the gradient of the loss per problem.
        betas: of Adam.
        decay_episodes, decay_to: the learning rate falls along half a cosine to ``decay_to`` times its first value
            within ``decay_episodes`` episodes; no decay without.
        validate_every: episodes between validations (phi frozen); 0: never. The best network is the one with the lowest
            mean *final* validation loss, as in the paper.
        validation_episodes: tasks of a validation, always the same.
        patience: stop after this many validations without a new best; default: never.
        log: a file for JSON lines: the settings, every episode, every validation.
        device: where tasks live; default: the network's device.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range; the message names it.
    """

    def __init__(
        self,
        net: Networks | Mapping[str, CoordinatewiseLSTM],
        problem: Problem,
        horizon: int = 100,
        unroll: int = 20,
        lr: float = 3e-3,
        seed: int = 0,
        *,
        weights: LossWeights = None,
        second_derivatives: bool = False,
        meta_loss: MetaLoss | None = None,
        autograd: bool = False,
        coordinate_fraction: float = 1.0,
        clip_norm: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        decay_episodes: int | None = None,
        decay_to: float = 0.01,
        validate_every: int = 50,
        validation_episodes: int = 10,
        patience: int | None = None,
        log: str | os.PathLike[str] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        net = as_networks(net)
        if not isinstance(problem, Problem):
            raise TypeError(f"problem: expected a Problem, got {type(problem).__name__} (ModuleProblem wraps a module)")
        seed = checks.integer("seed", seed)
        if meta_loss is not None and not callable(meta_loss):
            raise TypeError(f"meta_loss: expected a callable, got {type(meta_loss).__name__}")
        _check_range("lr", lr, 0.0, math.inf)
        _check_range("decay_to", decay_to, 0.0, 1.0, closed=True)
        _check_range("coordinate_fraction", coordinate_fraction, 0.0, 1.0, closed=True)
        if coordinate_fraction == 0.0:
            raise ValueError("coordinate_fraction: expected a number above 0, got 0")
        if clip_norm is not None:
            _check_range("clip_norm", clip_norm, 0.0, math.inf)
        if len(betas) != 2 or not all(0.0 <= checks.real("betas", beta) < 1.0 for beta in betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {betas!r}")
        decay_episodes = None if decay_episodes is None else positive_int("decay_episodes", decay_episodes)
        patience = None if patience is None else positive_int("patience", patience)
        validate_every = 0 if checks.as_int(validate_every) == 0 else positive_int("validate_every", validate_every)
        attach(net, None)  # what it may carry of an earlier training is no longer true
        self.net = net
        self.problem = problem
        self.protocol = Protocol.make(horizon, unroll, weights, second_derivatives)
        self.lr = float(lr)
        self.seed = seed
        self.meta_loss = meta_loss
        with_memory = any(isinstance(member, NTMBFGS) for member in members(net).values())
        self.autograd = bool(autograd or second_derivatives or meta_loss is not None or with_memory)
        self.coordinate_fraction = float(coordinate_fraction)
        if self.autograd and self.coordinate_fraction < 1.0:
            raise ValueError("coordinate_fraction: expected 1 with autograd, only the fused backward can sample")
        if self.coordinate_fraction < 1.0 and any(member.communicates for member in members(net).values()):
            raise ValueError("coordinate_fraction: expected 1 with a network whose coordinates communicate")
        self.clip_norm = None if clip_norm is None else float(clip_norm)
        self.decay_episodes = decay_episodes
        self.decay_to = float(decay_to)
        self.validate_every = validate_every
        self.validation_episodes = positive_int("validation_episodes", validation_episodes)
        self.patience = patience
        self.log = None if log is None else TrainingLog(log)
        self.device = device_of(net) if device is None else torch.device(device)
        self.counters = Counters()
        self._best: dict[str, Tensor] | None = None
        self._grad_norms: list[float] = []
        self._adam = torch.optim.Adam(
            net.parameters(), lr=self.lr, betas=(float(betas[0]), float(betas[1])), eps=1e-8, fused=True
        )

    @property
    def episode(self) -> int:
        """Finished episodes."""
        return self.counters.episode

    def settings(self) -> dict[str, Any]:
        """Everything the course of a run depends on, JSON-able: what a checkpoint stores and a resume checks."""
        meta_loss = self.meta_loss
        if meta_loss is not None:
            meta_loss = getattr(meta_loss, "__qualname__", type(meta_loss).__name__)
        settings = {
            "network": config_of(self.net),
            "problem": self.problem.config(),
            "protocol": {
                **self.protocol.config(),
                "meta_loss": meta_loss,
                "autograd": self.autograd,
                "coordinate_fraction": self.coordinate_fraction,
            },
            "meta_optimizer": {
                "lr": self.lr,
                "betas": list(self._adam.defaults["betas"]),
                "clip_norm": self.clip_norm,
                "decay_episodes": self.decay_episodes,
                "decay_to": self.decay_to,
            },
            "validation": {
                "every": self.validate_every,
                "episodes": self.validation_episodes,
                "patience": self.patience,
            },
            "seed": self.seed,
        }
        return json.loads(json.dumps(settings))  # tuples become lists, as they will in the file

    # ---- training ----

    def fit(
        self,
        episodes: int,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 10,
        progress: bool = True,
    ) -> MetaTrainer:
        """Train until ``episodes`` episodes are finished in all (a resumed trainer does what is left); returns self.

        Args:
            checkpoint: save there every ``checkpoint_every`` episodes, and at the end.
            progress: show a bar (tqdm) or, without a terminal, a line every few seconds.

        Raises:
            ValueError: the log holds another run's lines (resume that run, or give another file).
        """
        episodes = positive_int("episodes", episodes)
        checkpoint_every = positive_int("checkpoint_every", checkpoint_every)
        self._open_log()
        display = Progress(f"meta-training on {self.problem.name}", episodes, self.episode, progress)
        saved = self.episode if self.episode else None
        try:
            while self.episode < episodes and not self.counters.stopped:
                note = self._one_episode()
                display.update(self.episode, note)
                if checkpoint is not None and self.episode % checkpoint_every == 0:
                    self.save(checkpoint)
                    saved = self.episode
        finally:
            display.close()
        if checkpoint is not None and saved != self.episode:
            self.save(checkpoint)
        return self

    def _one_episode(self) -> str:
        begin = time.monotonic()
        counters = self.counters
        lr = self.lr * cosine_decay(self.episode, self.decay_episodes, self.decay_to)
        self._adam.param_groups[0]["lr"] = lr
        self._grad_norms.clear()
        skipped = counters.skipped_updates
        task = self.problem.sample(episode_seed(self.seed, self.episode), "train", self.device)
        self._adam.zero_grad()
        if self.autograd:
            losses = autograd_episode(task, self.net, self.protocol, self._meta_step, self.meta_loss)
        else:
            generator = torch.Generator().manual_seed(episode_seed(self.seed, self.episode))
            losses = fused_episode(task, self.net, self.protocol, self._meta_step, self.coordinate_fraction, generator)
        counters.episode += 1
        self._write_log(
            event="episode",
            episode=self.episode,
            loss_first=losses[0],
            loss_mean=sum(losses[1:]) / self.protocol.horizon,
            loss_final=losses[-1],
            grad_norms=list(self._grad_norms),
            skipped_updates=counters.skipped_updates - skipped,
            lr=lr,
            seconds=round(time.monotonic() - begin, 4),
        )
        if self.validate_every and self.episode % self.validate_every == 0:
            self._validate()
        best = "" if counters.best_loss is None else f", best validation {counters.best_loss:.4g}"
        return f"final loss {losses[-1]:.4g}{best}"

    def _meta_step(self) -> None:
        parameters = [parameter for parameter in self.net.parameters() if parameter.grad is not None]
        limit = math.inf if self.clip_norm is None else self.clip_norm
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        self._grad_norms.append(float(norm))
        if math.isfinite(self._grad_norms[-1]):
            if self._grad_norms[-1] > limit:
                torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
            self._adam.step()
        else:
            # An optimizee that ran away; one such segment must not destroy phi.
            self.counters.skipped_updates += 1
        self._adam.zero_grad()

    def _validate(self) -> None:
        begin = time.monotonic()
        counters = self.counters
        losses = evaluate(
            self.net,
            self.problem,
            range(self.validation_episodes),
            self.protocol.horizon,
            split="validation",
            device=self.device,
        )
        final = losses[:, -1].mean().item()
        is_best = math.isfinite(final) and (counters.best_loss is None or final < counters.best_loss)
        if is_best:
            counters.best_loss, counters.best_episode, counters.validations_since_best = final, self.episode, 0
            self._best = {name: value.detach().clone() for name, value in self.net.state_dict().items()}
        else:
            counters.validations_since_best += 1
            counters.stopped = self.patience is not None and counters.validations_since_best >= self.patience
        self._write_log(
            event="validation",
            episode=self.episode,
            loss_mean=losses[:, 1:].mean().item(),
            loss_final=final,
            best=is_best,
            seconds=round(time.monotonic() - begin, 4),
        )

    # ---- results ----

    def record(self) -> dict[str, Any]:
        """How the best network was trained, JSON-able: :meth:`settings`, how long, and its validation loss. The network
        carries it along, see :mod:`l2l_fast.meta.record`."""
        return checkpoints.record(self.settings(), self.counters)

    def best_net(self) -> Networks:
        """A copy of the network with the lowest final validation loss; of the present one before any validation. It
        carries :meth:`record`."""
        net = copy.deepcopy(self.net)
        if self._best is not None:
            net.load_state_dict(self._best)
        attach(net, self.record())
        return net

    def evaluate(
        self,
        episodes: int = 20,
        *,
        horizon: int | None = None,
        problem: Problem | None = None,
        seeds: Iterable[int] | None = None,
        split: str = "test",
        best: bool = True,
    ) -> Tensor:
        """Learning curves on fresh test tasks, with the best network (``best=False``: the present one), phi frozen.

        Returns:
            float64 ``[episodes, horizon + 1]``, see :func:`l2l_fast.meta.evaluate`.
        """
        return evaluate(
            self.best_net() if best else self.net,
            self.problem if problem is None else problem,
            range(positive_int("episodes", episodes)) if seeds is None else seeds,
            self.protocol.horizon if horizon is None else horizon,
            split=split,
            device=self.device,
        )

    # ---- checkpoints ----

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint, atomically. A run resumed from it ends bit for bit where it would have ended anyway."""
        tensors = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        tensors.update({f"best.{name}": value for name, value in (self._best or {}).items()})
        tensors.update(checkpoints.adam_tensors(self.net, self._adam))
        checkpoints.write(path, Checkpoint(self.settings(), self.counters, tensors))

    def resume(self, path: str | os.PathLike[str]) -> MetaTrainer:
        """Continue from a checkpoint of a run with these very settings; returns self. Lines that the log gained after
        the checkpoint are dropped (they will be written again).

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or was written by a run with other settings; the message lists them.
                Nothing has been changed then.
        """
        saved = checkpoints.read(path)
        different = checkpoints.differences(saved.settings, self.settings())
        if different:
            raise ValueError(f"{os.fspath(path)!r} belongs to another run:\n  " + "\n  ".join(different))
        parameters = self.net.state_dict()
        for part in ("net", "best"):
            weights = saved.part(part)
            if part == "best" and not weights:
                continue
            shapes = {name: value.shape for name, value in weights.items()}
            if shapes != {name: value.shape for name, value in parameters.items()}:
                raise ValueError(f"{os.fspath(path)!r}: the tensors of {part!r} do not fit the network")
        checkpoints.restore_adam(self.net, self._adam, saved.part("adam"))
        self.net.load_state_dict(saved.part("net"))
        best = saved.part("best")
        self._best = {name: value.to(device_of(self.net)) for name, value in best.items()} or None
        self.counters = saved.counters
        if self.log is not None:
            self.log.cut_back(self.episode)
        return self

    # ---- log ----

    def _open_log(self) -> None:
        if self.log is None:
            return
        if self.log.is_empty():
            self.log.append({"event": "settings", "torch": torch.__version__, **self.settings()})
        elif self.episode == 0:
            raise ValueError(
                f"log: {str(self.log.path)!r} already holds a run; resume that one from its checkpoint or give another "
                "file"
            )

    def _write_log(self, **record: Any) -> None:
        if self.log is not None:
            self.log.append(record)


def _check_range(name: str, value: Any, low: float, high: float, closed: bool = False) -> None:
    number = checks.real(name, value, expected=f"a number between {low:g} and {high:g}")
    if not (low <= number <= high if closed else low < number < high):
        raise ValueError(f"{name}: expected a number between {low:g} and {high:g}, got {value}")
