"""An unrolled segment of learned optimization: what is recorded, and the meta-gradient that comes out of it.

Since every gradient counts as a constant (Andrychowicz et al. 2016, section 2), the upstream gradient of every update
is a sum of recorded gradients, and the states can be recomputed from the first one. So a segment records only the start
state and the gradients; :func:`l2l_fast.kernels.operators.segment_backward` does the rest in one launch per group.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.checks import check_gradient
from ..kernels.config import Config
from ..kernels.state import TILE, State
from ..kernels.surroundings import without_autocast
from ..networks.lstm import CoordinatewiseLSTM
from . import segment_sharded
from .segment_backward import Given, like, part_backward
from .segment_checks import check_end_states, check_recordable, check_trainable, check_weights
from .segment_params import StartGradients, check_end_params, start_params, with_injected
from .segment_sampling import Sampling
from .sharding import Totals, by_mesh, everywhere, local, local_gradient, meshes
from .state import as_state, state_dtype_of
from .tape import Step, Tape

if TYPE_CHECKING:
    from .batch import Batch

HALF_WAY = "a step of the open segment failed half-way; call discard_segment() and start anew"


class Segment:
    """Recorder of the steps between ``start_segment`` and ``backward_segment``.

    Args:
        sampling: which coordinates the backward pass visits; default: all.
    """

    def __init__(self, sampling: Sampling | None = None) -> None:
        self.sampling = sampling
        self.num_steps = 0
        self.tapes: dict[int, Tape] = {}
        self.start_states: dict[Tensor, State] = {}
        self.current_states: dict[Tensor, tuple[Tensor, int]] = {}  # the tensor, and its version after the last step
        self.owners: dict[Tensor, int] = {}  # the group of every parameter
        self._broken = False
        self._moving: list[tuple[Tensor, Tensor]] = []
        self._last_gradient: tuple[Tensor, Any, int] | None = None
        self._gradients_are_fresh = False

    def check_whole(self) -> None:
        """Raise RuntimeError if a step of this segment failed after it had begun to write."""
        if self._broken:
            raise RuntimeError(HALF_WAY)

    # ---- recording, driven by LearnedOptimizer.step ----

    def begin_step(self, batches: Iterable[tuple[dict[str, Any], Batch]]) -> None:
        """Check that the step continues the segment and keep the start states of parameters that move for the first
        time. Raises RuntimeError if a network or a state was replaced since the previous step, NotImplementedError for
        a network that no segment can hold."""
        self.check_whole()
        witness = None
        started: list[tuple[Tensor, Tensor, Config, int]] = []
        for group, batch in batches:
            reduce = None if batch.mesh is not None else batch.reduce
            dtype = state_dtype_of(group)
            check_recordable("step, with a segment open", batch.network, reduce, self.sampling, dtype)
            keys = batch.keys()
            moving = [(key, grad, state) for key, (_, grad, state) in zip(keys, batch.moving(), strict=True)]
            tape = self.tapes.get(id(group))
            if tape is not None and tape.network is not batch.network:
                raise RuntimeError("step: a group's network was replaced during the segment")
            if tape is not None and tape.num_problems != batch.num_problems:
                raise RuntimeError("step: a parameter group's number of problems was changed during the segment")
            for param, _, state in moving:
                if param in self.current_states:
                    self._check_same_state("step", param, state)
                if self.owners.setdefault(param, id(group)) != id(group):
                    raise RuntimeError("step: a parameter's group was replaced during the segment")
                witness = param if witness is None else witness
            ages = [age - 1 for _, age in batch.ages()] or [0] * len(moving)
            started.extend((param, state, batch.config, age) for (param, _, state), age in zip(moving, ages))
        for param, state, config, age in started:
            if param not in self.start_states:
                self.start_states[param] = as_state(state.clone(), local(param).numel(), config, age)
        self._moving = [(param, state) for param, state, _, _ in started]
        if witness is not None and witness.grad is not None:
            self._watch(witness, witness.grad)
        self._broken = True  # until end_step

    def record(self, group: dict[str, Any], batch: Batch) -> tuple[Tensor | None, list[int]]:
        """Add a step to the group's tape; returns the buffer and places where the kernel shall write the gradients."""
        tape = self.tapes.get(id(group))
        if tape is None:
            tape = Tape(batch.network, batch.phi, batch.config, batch.joint, batch.num_problems)
            self.tapes[id(group)] = tape
        gradients, tiles = None, []
        keys = batch.keys()
        params, others = keys[: len(batch.params)], keys[len(batch.params) :]
        if batch.params:
            tiles = tape.place(params)
            gradients = torch.empty(TILE * tape.total_tiles, dtype=torch.float32, device=batch.params[0].device)
        wide = ((-grad if batch.maximize else grad.clone()).to(torch.float64) for _, grad, _ in batch.exact)
        exact = dict(zip(others, wide, strict=True))
        decay = 1.0 - batch.lr * batch.weight_decay
        sign = -1.0 if batch.maximize else 1.0
        common = None, batch.common, batch.exact_common
        tape.steps.append(Step(self.num_steps, params, gradients, exact, batch.lr, decay, sign, *common))
        return gradients, tiles

    def keep_means(self, group: dict[str, Any], means: Tensor | None) -> None:
        """Keep the means, if any, that the step just recorded for this group came out with; a few floats."""
        self.tapes[id(group)].steps[-1].means = means

    def cancel_step(self) -> None:
        """The step that was begun has written nothing: it is as if it had not been tried."""
        for tape in self.tapes.values():
            tape.steps = [step for step in tape.steps if step.t < self.num_steps]
        self._moving = []
        self._broken = False

    def end_step(self) -> None:
        self.current_states.update((param, (state, _version(state))) for param, state in self._moving)
        self._moving = []
        self.num_steps += 1
        self._broken = False

    def _watch(self, param: Tensor, grad: Tensor) -> None:
        # A forgotten backward() at theta_T would give a plausible, wrong meta-gradient. It shows when gradients used to
        # be renewed from step to step and no longer are.
        previous = self._last_gradient
        self._gradients_are_fresh = previous is not None and not _is_same(grad, *previous[1:])
        self._last_gradient = (param, weakref.ref(grad), _version(grad))

    # ---- the meta-gradient ----

    @torch.no_grad()
    def backward(
        self,
        params: Sequence[Tensor],
        states: Mapping[Tensor, State],
        weights: Sequence[float] | Tensor | None,
        grad_end_states: Mapping[Tensor, State] | None,
        return_grad_start_states: bool,
        grad_end_params: Mapping[Tensor, Tensor] | None,
        return_grad_start_params: bool,
    ) -> dict[Tensor, State] | StartGradients | None:
        """See :meth:`l2l_fast.LearnedOptimizer.backward_segment`; ``params`` are all parameters, ``states`` all current
        states."""
        if self.num_steps == 0:
            raise RuntimeError("backward_segment: no step was recorded since start_segment()")
        self.check_whole()
        only_phi = not (return_grad_start_states or return_grad_start_params)
        if only_phi:
            still = [not any(step.params or step.exact for step in tape.steps) for tape in self.tapes.values()]
            networks = [tape.network for tape in self.tapes.values()]
            # If nothing moved at all, it is the gradients that are missing, which is said below.
            moved = networks if all(still) else [network for network, rests in zip(networks, still) if not rests]
            check_trainable(moved, networks)
        w = check_weights(weights, self.num_steps)
        end_grads = check_end_states(grad_end_states, states)
        end_params = check_end_params(grad_end_params, params)
        self._check_unchanged(states)
        finals = {key: self._final_gradients(tape) for key, tape in self.tapes.items()}
        self._check_final(finals, w[-1])
        if only_phi and all(still):
            raise RuntimeError("backward_segment: no parameter had a gradient in any recorded step, so none has moved")

        theta_start = start_params(params, self.tapes.values(), w, end_params) if return_grad_start_params else {}
        finals, w = with_injected(self.tapes, finals, w, end_params)
        sampling = self.sampling if only_phi and not (end_grads or end_params) else None
        grad_start: dict[Tensor, State] = {}
        totals = Totals()
        for key, tape in self.tapes.items():
            given = Given(self.start_states, finals[key], w, end_grads, bool(return_grad_start_states))
            run = part_backward if sampling is None else sampling.part_backward
            for part in tape.parts():
                if tape.joint and (shared := meshes(part.params)):
                    grad_phi, starts = segment_sharded.part_backward(tape, part, given, shared[0])
                    grad_start.update(zip(part.params, starts))
                    totals.add(tape.network, grad_phi.to(tape.phi.dtype), shared[0], True)
                    continue
                for mesh, counts, params in by_mesh(part.params):
                    # Copies whose sums another process counts have nothing to give but gradients of start states.
                    needed = params if counts or return_grad_start_states else []
                    grad_phi, starts = run(tape, part._replace(params=needed), given)
                    grad_start.update(zip(params, starts))
                    totals.add(tape.network, grad_phi.to(tape.phi.dtype), mesh, counts)
        for network, total in totals.over_processes():
            _accumulate(network, total)
        if return_grad_start_states:
            for param, state in states.items():
                if param not in grad_start:  # it did not move: its state passed through the segment unchanged
                    zeros = torch.zeros_like(state.data)
                    grad_start[param] = end_grads.get(param, like(state, zeros)).clone()
        found = grad_start if return_grad_start_states else None
        return StartGradients(found, theta_start) if return_grad_start_params else found

    # ---- checks, all before anything is written ----

    def _check_unchanged(self, states: Mapping[Tensor, State]) -> None:
        for param in self.current_states:
            state = states.get(param)
            self._check_same_state("backward_segment", param, None if state is None else state.data)
        for tape in self.tapes.values():
            now = tape.network.phi()
            if now.dtype != tape.phi.dtype or not torch.equal(_bits(now), _bits(tape.phi)):
                raise RuntimeError(
                    "backward_segment: the network's parameters changed since the segment's first step; update them "
                    "only between backward_segment() and the next start_segment()"
                )

    def _check_same_state(self, name: str, param: Tensor, state: Tensor | None) -> None:
        known, version = self.current_states[param]
        if state is not known or _version(known) != version:
            how = "written to" if state is known else "replaced"
            raise RuntimeError(f"{name}: a parameter's optimizer state was {how} during the segment")

    def _final_gradients(self, tape: Tape) -> dict[Tensor, Tensor]:
        final = {}
        for param in {param: None for step in tape.steps for param in (*step.params, *step.exact)}:
            grad = param.grad
            if grad is not None:
                grad = local_gradient(param, grad)
                check_gradient("grad", grad)
                final[param] = grad
        return final

    def _check_final(self, finals: Mapping[int, dict[Tensor, Tensor]], last_weight: float) -> None:
        if last_weight == 0.0:
            return
        if not any(finals.values()):
            raise RuntimeError(
                "backward_segment: no parameter has a gradient at theta_T; call f().backward() after the last step"
            )
        if self._last_gradient is None or not self._gradients_are_fresh:
            return
        witness, reference_to_grad, version = self._last_gradient
        if witness.grad is None or not _is_same(witness.grad, reference_to_grad, version):
            return
        # Shards may be empty, or zero all the time: so all processes are asked.
        if everywhere(self._ends_as_it_stepped(finals), self.owners):
            raise RuntimeError(
                "backward_segment: .grad still holds the gradients of the last step; clear them and call "
                "f().backward() once more, so that they are those at theta_T"
            )

    def _ends_as_it_stepped(self, finals: Mapping[int, dict[Tensor, Tensor]]) -> bool:
        """Whether the gradients at theta_T are those of the last step in all coordinates."""
        for key, tape in self.tapes.items():
            last = tape.steps[-1]
            for param in (*last.params, *last.exact):
                recorded = last.sign * last.gradient(param, tape.tiles)
                final = finals[key].get(param)
                if final is None or not torch.equal(final.reshape(-1).to(recorded.dtype), recorded):
                    return False
        return True


def _accumulate(network: CoordinatewiseLSTM, grad_phi: Tensor) -> None:
    # Through autograd, so that frozen parameters, hooks and parametrizations of the network are respected.
    with torch.inference_mode(False), torch.enable_grad(), without_autocast(grad_phi.device):
        phi = network.phi()
        if phi.requires_grad:  # one of several networks may be frozen
            # A gradient that was computed under inference mode must become an ordinary tensor first.
            phi.backward(grad_phi.clone() if grad_phi.is_inference() else grad_phi)


def _bits(x: Tensor) -> Tensor:
    # Compares NaN as equal to itself.
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _version(grad: Tensor) -> int:
    return -1 if grad.is_inference() else grad._version


def _is_same(grad: Tensor, reference_to_grad: Any, version: int) -> bool:
    return reference_to_grad() is grad and _version(grad) == version
