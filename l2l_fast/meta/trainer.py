"""MetaTrainer: trains phi along the gradient of an unrolled optimization (Andrychowicz et al. 2016, section 3)."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels import checks
from ..kernels.checks import positive_int
from ..kernels.surroundings import own_loop
from ..networks import effective, writing
from ..networks.lstm import CoordinatewiseLSTM
from ..networks.record import attach
from ..networks.several import Networks, as_networks, device_of, members
from ..problems import Problem
from . import checkpoint as checkpoints
from .checkpoint import Checkpoint, Complete, Counters, capture
from .estimators import Estimator, MetaLoss, choose
from .evaluation import evaluate
from .log import TrainingLog
from .progress import Progress, note
from .protocol import LossWeights, Protocol, episode_seed
from .settings import Arguments, MetaOptimizer, Validation, arguments_of, check_can_train, frozen_names, settings_of


class MetaTrainer(Arguments):
    """Trains a network to optimise the tasks of a problem.

    An episode draws a task, optimises it for ``horizon`` steps from its theta_0 and a zero state, and after every
    ``unroll`` steps updates phi with Adam along the gradient of ``sum_t w_t f(theta_t)`` over that segment. Episode i
    uses the task ``problem.sample(hash(seed, i), "train")``: a run is a function of its settings, and nothing else.

    Args:
        net: the network; trained in place, but for its frozen parameters (requires_grad=False, see ``frozen``). Or
            several by kind of parameter (a mapping, kept as an ``nn.ModuleDict``), for tasks whose
            ``parameter_groups()`` has these kinds; one Adam then trains them all.
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
            coordinates of every large tensor (:mod:`l2l_fast.optim.segment_sampling`); cheaper, a little noisier.
        estimator: "bptt", truncated back-propagation through time, "pes" or "evolution" (:class:`l2l_fast.meta.PES`,
            :class:`l2l_fast.meta.Evolution`), or one made.
        synthetic_gradients: add to truncated back-propagation a prediction of what comes after each segment: the same
            as ``estimator="synthetic_gradients"`` (:class:`l2l_fast.meta.SyntheticGradients`, which has options).
        clip_norm: the meta-gradient's norm is cut to this. It is the gradient of the loss per problem.
        betas: of Adam.
        decay_episodes, decay_to: the learning rate falls along half a cosine to ``decay_to`` times its first value
            within ``decay_episodes`` episodes; no decay without.
        validate_every: episodes between validations (phi frozen); 0: never. The best network is the one with the lowest
            mean *final* validation loss, as in the paper.
        validation_episodes: tasks of a validation, always the same.
        patience: stop after this many validations without a new best; default: never.
        log: a file for JSON lines: the settings, every episode, every validation; or a :class:`~.log.TrainingLog`,
            such as :class:`l2l_fast.meta.TensorBoardLog`.
        device: where tasks live; default: the network's device.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, or nothing to train; it is named.
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
        estimator: str | Estimator = "bptt",
        synthetic_gradients: bool = False,
        clip_norm: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        decay_episodes: int | None = None,
        decay_to: float = 0.01,
        validate_every: int = 50,
        validation_episodes: int = 10,
        patience: int | None = None,
        log: str | os.PathLike[str] | TrainingLog | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        net = as_networks(net)
        frozen = frozen_names(net)
        if not isinstance(problem, Problem):
            raise TypeError(f"problem: expected a Problem, got {type(problem).__name__} (ModuleProblem wraps a module)")
        autograd = checks.flag("autograd", autograd)
        self.seed = checks.integer("seed", seed)
        self.protocol = Protocol.make(horizon, unroll, weights, second_derivatives)
        self.estimator = choose(
            net,
            autograd=autograd,
            second_derivatives=self.protocol.second_derivatives,
            meta_loss=meta_loss,
            coordinate_fraction=coordinate_fraction,
            estimator=estimator,
            synthetic_gradients=synthetic_gradients,
        )
        self.meta_optimizer = MetaOptimizer.make(lr, betas, clip_norm, decay_episodes, decay_to)
        self.validation = Validation.make(validate_every, validation_episodes, patience)
        self.net = net
        self.frozen = frozen
        self.problem = problem
        self.log = log if log is None or isinstance(log, TrainingLog) else TrainingLog(log)
        self.device = device_of(net) if device is None else checks.device("device", device)
        self.counters = Counters()
        self._best: dict[str, Tensor] | None = None
        self._complete: Complete | None = None
        self._unsettled = False  # within an episode
        self._log_is_ours = False
        self._saved: tuple[Path, int] | None = None  # the last checkpoint written or resumed, and its episode
        self._grad_norms: list[float] = []
        self._adam = self.meta_optimizer.adam(net)

    @property
    def episode(self) -> int:
        """Finished episodes."""
        return self.counters.episode

    def settings(self) -> dict[str, Any]:
        """Everything the course of a run depends on, JSON-able: what a checkpoint stores and a resume checks."""
        return settings_of(self)

    def fit(
        self,
        episodes: int,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 10,
        progress: bool = True,
    ) -> MetaTrainer:
        """Train until ``episodes`` episodes are finished in all (a resumed trainer does what is left); returns self.
        Autocast, grad and inference mode around the call make no difference.

        Args:
            checkpoint: save there at the start, every ``checkpoint_every`` episodes, at the end, and when interrupted.
            progress: show a bar (tqdm) or, without a terminal, a line every few seconds.

        An interrupt (Ctrl-C, any exception) at any moment leaves the trainer, its log and ``checkpoint`` as they were
        after the last complete episode: going on, here or from the file, ends as if there had been none.

        Raises:
            ValueError: the log holds another run's lines, or ``checkpoint`` is there before the first episode and this
                trainer did not write it (resume that run, or give another file), a task has nothing to
                optimise, the learning rate has fallen to 0 already (``decay_to=0``), or the network's weights change
                whenever they are looked at (a spectral norm in training mode, noise).
        """
        episodes = positive_int("episodes", episodes)
        checkpoint_every = positive_int("checkpoint_every", checkpoint_every)
        check_can_train(self, episodes)
        if checkpoint is not None:
            writing.check_writable(checkpoint, "checkpoint", make_folder=True)
            checkpoint = Path(os.fsdecode(checkpoint))
        with own_loop():
            self._fit(episodes, checkpoint, checkpoint_every, progress)
        # So that the network remembers its protocol if it is saved itself; it is the last one, not the best.
        last = dataclasses.replace(self.counters, best_episode=None, best_loss=None)
        attach(self.net, checkpoints.record(self.settings(), last))
        return self

    def _fit(self, episodes: int, checkpoint: Path | None, checkpoint_every: int, progress: bool) -> None:
        if self._unsettled:
            self._roll_back()
        if self.log is not None and not (self.episode or self._log_is_ours):
            self.log.check_unused()
        ours = self.episode or (self._saved is not None and self._saved[0] == checkpoint)
        if checkpoint is not None and not ours and checkpoint.exists() and checkpoint.stat().st_size:
            raise ValueError(
                f"checkpoint: {str(checkpoint)!r} is there already, and is not of this run; "
                "MetaTrainer.from_checkpoint goes on with the run that wrote it, another file begins a new one"
            )
        if self.episode >= episodes or self.counters.stopped:
            why = "stopped early, as patience demands" if self.counters.stopped else "fit counts episodes in all"
            note(f"nothing left to train: {self.episode} episodes are finished ({why})", progress)
        else:
            self.counters.planned = episodes
        self._complete = self._capture()
        display = Progress(f"meta-training on {self.problem.name}", episodes, self.episode, progress)
        try:
            # Before anything else, so that a run can be resumed whenever it was stopped.
            self._save_if_new(checkpoint)
            self._open_log()
            while self.episode < episodes and not self.counters.stopped:
                self._unsettled = True
                line = self._one_episode()
                self._complete = self._capture()
                self._unsettled = False
                display.update(self.episode, line)
                if self.episode % checkpoint_every == 0:
                    self._save_if_new(checkpoint)
        except BaseException as error:
            # Wherever in an episode an interrupt lands: the run is as it was after the last complete one.
            if self._unsettled:
                self._roll_back()
            if self.episode or not isinstance(error, Exception):
                self._save_if_new(checkpoint)
            raise
        finally:
            display.close()
            if self.log is not None:
                self.log.flush()
        self._save_if_new(checkpoint)

    def _capture(self) -> Complete:
        return capture(self.net, self._adam, self.estimator, self._best, self.counters)

    def _roll_back(self) -> None:
        # Undoes any part of an episode, and may itself be interrupted and done again.
        assert self._complete is not None
        self._best, self.counters = checkpoints.put_back(self._complete, self.net, self._adam, self.estimator)
        if self.log is not None:
            self.log.cut_back(self.episode)
        self._unsettled = False

    def _save_if_new(self, checkpoint: Path | None) -> None:
        if checkpoint is not None and self._saved != (checkpoint, self.episode):
            self.save(checkpoint)

    def _one_episode(self) -> str:
        begin = time.monotonic()
        counters = self.counters
        lr = self.meta_optimizer.lr * self.meta_optimizer.decay(self.episode)
        self._adam.param_groups[0]["lr"] = lr
        self._grad_norms.clear()
        skipped = counters.skipped_updates
        task = self.problem.sample(episode_seed(self.seed, self.episode), "train", self.device)
        self._adam.zero_grad()
        generator = torch.Generator().manual_seed(episode_seed(self.seed, self.episode))
        losses = self.estimator.episode(task, self.net, self.protocol, self._meta_step, generator)
        counters.episode += 1
        self._write_log(
            event="episode",
            episode=self.episode,
            loss_first=losses[0],
            loss_mean=sum(losses[1:]) / (len(losses) - 1),
            loss_final=losses[-1],
            grad_norms=list(self._grad_norms),
            skipped_updates=counters.skipped_updates - skipped,
            lr=lr,
            seconds=round(time.monotonic() - begin, 4),
        )
        if self.validation.every and self.episode % self.validation.every == 0:
            self._validate()
        best = "" if counters.best_loss is None else f", best validation {counters.best_loss:.4g}"
        return f"final loss {losses[-1]:.4g}{best}"

    def _meta_step(self) -> None:
        norm = self.meta_optimizer.clip(self.net)
        self._grad_norms.append(norm)
        if math.isfinite(norm):
            attach(self.net, None)  # what it may carry of an earlier training is true no longer
            for parameter in self._adam.param_groups[0]["params"]:
                if parameter.grad is None:  # not every estimator reaches all weights; a checkpoint holds Adam's of all
                    parameter.grad = torch.zeros_like(parameter)
            self._adam.step()
        else:
            # An optimizee that ran away; one such segment must not destroy phi.
            self.counters.skipped_updates += 1
        self._adam.zero_grad()

    def _validate(self) -> None:
        begin = time.monotonic()
        losses = evaluate(
            self.net,
            self.problem,
            range(self.validation.episodes),
            self.protocol.horizon,
            split="validation",
            device=self.device,
        )
        final = losses[:, -1].mean().item()
        is_best = self.counters.validated(final, self.validation.patience)
        if is_best:
            self._best = {name: value.detach().clone() for name, value in self.net.state_dict().items()}
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
        carries it along, see :mod:`l2l_fast.networks.record`."""
        return checkpoints.record(self.settings(), self.counters)

    def best_net(self) -> Networks:
        """A copy of the network with the lowest final validation loss; of the present one before any validation. It
        carries :meth:`record`."""
        with own_loop():
            net = copy.deepcopy(self.net)
            if self._best is not None:
                net.load_state_dict(self._best)
            for member in members(net).values():
                effective.remake(member)
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
        if self._unsettled:
            self._roll_back()
        tensors = self._capture().tensors()
        if not all(effective.is_plain(member) for member in members(self.net).values()):
            tensors.update(checkpoints.effective_tensors(self.best_net()))
        checkpoints.write(path, Checkpoint(self.settings(), self.counters, tensors))
        self._saved = Path(path), self.episode

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        problem: Problem | None = None,
        *,
        meta_loss: MetaLoss | None = None,
        log: str | os.PathLike[str] | TrainingLog | None = None,
        device: torch.device | str | None = None,
    ) -> MetaTrainer:
        """A trainer that continues the run of a checkpoint, with the settings that are in the file.

        Args:
            problem: needed where ``l2l_fast.problems.get`` cannot build it; meta_loss: where the run had one.
            log, device: as for the class.

        Raises:
            FileNotFoundError, ValueError, TypeError: see :meth:`resume`; or an argument is missing; or the network was
                pruned or parametrized, which a file does not tell how to do again: make the trainer, then ``resume``.
        """
        saved = checkpoints.read(path)
        arguments = arguments_of(saved, problem, meta_loss, device)
        return cls(**arguments, log=log, device=device).resume(path)

    @own_loop()
    def resume(self, path: str | os.PathLike[str]) -> MetaTrainer:
        """Continue from a checkpoint of a run with these very settings; returns self. Lines that the log gained after
        the checkpoint are dropped (they will be written again).

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or was written by a run with other settings; the message lists them; or
                ``log`` is no run's log, or another run's. Nothing has been changed then.
        """
        saved = checkpoints.read(path)
        checkpoints.check_same_run(path, saved, self.settings(), self.net)
        if self.log is not None:
            self.log.check_same_run(self.settings())
        checkpoints.adam_state(self.net, saved.part("adam"))  # complains before anything is changed
        self.estimator.load_state_dict(saved.part("estimator"))
        checkpoints.restore_adam(self.net, self._adam, saved.part("adam"))
        attach(self.net, None)
        self.net.load_state_dict(saved.part("net"))
        best = saved.part("best")
        self._best = {name: value.to(device_of(self.net)) for name, value in best.items()} or None
        self.counters = saved.counters
        self._unsettled = False
        self._saved, self._log_is_ours = (Path(path), self.episode), True
        if self.log is not None:
            self.log.cut_back(self.episode)
        return self

    def _open_log(self) -> None:
        self._log_is_ours = True
        if self.log is not None and self.log.is_empty():
            self.log.append({"event": "settings", "torch": torch.__version__, **self.settings()})

    def _write_log(self, **record: Any) -> None:
        if self.log is not None:
            self.log.append(record)
