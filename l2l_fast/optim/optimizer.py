"""LearnedOptimizer: a trained network behind the interface of torch.optim."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..kernels import renamed
from ..kernels.state import State
from ..networks.lstm import CoordinatewiseLSTM
from ..networks.memory import Memory
from . import joint, sharding
from .batch import Batch, gather, only_make_state
from .checkpoints import pack, unpack
from .checks import (
    check_group_problems,
    check_new_options,
    check_parameters,
    check_precision,
    check_precision_of,
    check_state_dtype,
    check_together,
    plain,
)
from .joint import Kept
from .profiling import profile_hook_step
from .registry import Registry, adopted, check_network, take_in_renamed
from .segment import Segment
from .segment_checks import check_recordable
from .segment_params import StartGradients
from .segment_sampling import Sampling
from .state import (
    AGE_KEY,
    ALIGNMENT_KEY,
    NUMEL_KEY,
    STATE_KEY,
    age_of,
    as_state,
    dtype_of,
    is_live,
    modernized,
    state_dtype_of,
    tiles_of,
)
from .tensor_features import TensorFeatures

# What load_state_dict leaves alone and pickles keep; those of earlier releases may lack it.
_KEPT: dict[str, Callable[[], Any]] = {
    "_registry": Registry,
    "_kept": Kept,
    "_failure": lambda: None,
    "_tensor_features": lambda: None,
    "_precision": lambda: "float32",
}


class LearnedOptimizer(Optimizer):
    """Updates every coordinate with an LSTM: ``theta = theta * (1 - lr * weight_decay) + lr * phi(grad, state)``.

    Equation 1 of Andrychowicz et al. 2016 as a :class:`torch.optim.Optimizer`: parameter groups, learning-rate
    schedulers, closures, hooks, state dicts, gradient scaling and clipping work as usual. All float32, bfloat16 and
    float16 parameters of a group are updated by one launch, in float32 arithmetic; float64 parameters take the
    reference path. Of a DTensor (FSDP2, tensor parallelism) every process steps its shard; what runs over coordinates
    is added up over its mesh (:mod:`l2l_fast.optim.sharding`).

    Args:
        params: parameters, named parameters or group dicts. A group may carry its own ``"network"`` (the paper's CIFAR
            experiment uses one for convolutions and one for the rest).
        network: the network of the groups that carry none.
        lr: multiplies the update; 1.0 is what the network was trained for, and what schedulers scale.
        weight_decay: decoupled weight decay, as in AdamW.
        maximize: ascend: the network sees -grad.
        num_problems: for networks whose coordinates communicate (:class:`l2l_fast.NTMBFGS`, ``gac_cells``): this many
            independent problems lie side by side in the leading dimension of every parameter, and do not mix. An
            option of a parameter group, as lr is; averages and memory span all parameters of the group. Its name before
            0.2, ``groups``, is understood here and in groups, with a DeprecationWarning.
        process_group: of ``torch.distributed``, if the coordinates are sharded over its processes by hand, in plain
            tensors (DTensors know their mesh): global averages then run over all of them. Or a function that adds up a
            float64 tensor over the processes in place. Every process must take every step, also one whose parameters
            have no gradients. With inputs per tensor every process holds its shard of the same tensors, perhaps an
            empty one, in the same order.
        total_steps: how many steps the run will have, for networks with inputs per tensor, of which the progress is
            one; None: not known, which they are told. An option of a parameter group.
        tensor_features: for such networks, ``(param, age, total_steps) -> (tensor_inputs, nominal)``, asked for every
            parameter before each of its steps, the age-th. Default: those of :mod:`l2l_fast.optim.tensor_features`.
        state_dtype: "float32", "bfloat16" (half the bytes) or "int8" (a quarter of those of h and c; averages as
            bfloat16), what the state is kept in between steps (:mod:`l2l_fast.kernels.state_types`); steps are computed
            in float32, and what is rounded stochastically is the same for any number of threads and after resuming. An
            option of a parameter group; a checkpoint of one type loads into another. Not for meta-training, networks
            whose coordinates communicate, or float64 parameters.
        precision: "float32", or "bfloat16": the two matrix products of every layer take weights and inputs rounded to
            bfloat16 and add up in float32, which is faster where the processor has AVX512-BF16, and nowhere else;
            all else, what is stored included, stays as it is. On the CPU, for networks with layers whose coordinates do
            not communicate, not for meta-training or float64 parameters. Of all groups, no part of a state dict, kept
            by copies and pickles.

    Raises:
        TypeError: a network, option or parameter of an unsupported type (parameters must be dense and real floating
            point; so must gradients, which :meth:`step` checks before it writes anything).
        ValueError: a negative lr or weight_decay, a group without a network, or one not on its network's device; a
            precision that there is not, or not for these networks and parameters.
        NotImplementedError: parameters on a device for which this build has no kernel; DTensors with a network with
            memory, or, where averages run over them, on several meshes in one group or with several problems.

    Meta-training: :meth:`start_segment` and :meth:`backward_segment`.
    """

    _adopts = False  # groups of another optimizer; while it is made

    @renamed.takes_groups()
    def __init__(
        self,
        params: Iterable[Any],
        network: CoordinatewiseLSTM | None = None,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        num_problems: int = 1,
        process_group: Any = None,
        total_steps: int | None = None,
        tensor_features: TensorFeatures | None = None,
        state_dtype: str = "float32",
        precision: str = "float32",
    ) -> None:
        if tensor_features is not None and not callable(tensor_features):
            raise TypeError(f"tensor_features: expected a function, got {type(tensor_features).__name__}")
        self._tensor_features = tensor_features
        self._precision = precision
        self._segment: Segment | None = None
        self._registry = Registry()
        self._kept = Kept(process_group)
        self._failure: str | None = None
        defaults: dict[str, Any] = {"network": network, "lr": lr, "weight_decay": weight_decay, "maximize": maximize}
        defaults.update(num_problems=num_problems, total_steps=total_steps, state_dtype=state_dtype)
        self._adopts = True
        super().__init__(params, defaults)
        self._adopts = False
        told = (network.communicates or network.tensor_inputs for network in self.networks)
        if process_group is not None and not any(told):
            warnings.warn(
                "process_group: has no effect, for the coordinates of these networks do not communicate (gac_cells=0) "
                "and are told nothing of their tensors (tensor_inputs=0): every process steps its own",
                stacklevel=2,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see :meth:`torch.optim.Optimizer.add_param_group`. Options not given take the defaults. The dict
        stays as it is: the group is a copy of it."""
        if isinstance(param_group, dict):
            param_group = dict(param_group)
            if renamed.FORMER in param_group:
                if renamed.PRESENT in param_group:
                    renamed.refuse_both()
                renamed.warn(renamed.frames_to_user())
                take_in_renamed(param_group)
            options = {**self.defaults, **param_group}
            if not isinstance(options["network"], dict):
                check_network(options["network"])
            elif not self._registry.describes(options["network"]):
                default = self.defaults["network"] if self._adopts else None
                param_group["network"] = adopted(options["network"], default)
            check_new_options(options, param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_parameters(group)
            for name in ("lr", "weight_decay"):
                group[name] = group[name] if isinstance(group[name], Tensor) else plain(group[name])
            network = self._registry.network_of(group)
            check_group_problems(group, network, self._kept.reduce)
            check_state_dtype(group, network)
            check_precision(self._precision, network)
            check_precision_of(self._precision, group)
            if self._segment is not None:
                name, sampling = "add_param_group, with a segment open", self._segment.sampling
                check_recordable(name, network, self._kept.reduce, sampling, state_dtype_of(group))
        except BaseException:
            self.param_groups.pop()
            raise

    def __repr__(self) -> str:
        text = super().__repr__()
        for group, network in zip(self.param_groups, self.networks, strict=True):
            text = text.replace(repr(group["network"]), repr(network))
        return text

    @property
    def networks(self) -> list[CoordinatewiseLSTM]:
        """The network of every parameter group. To give a group another one, assign to ``group["network"]``; what
        stands there otherwise is a description, so that ``param_groups`` hold nothing but plain data."""
        return [self._registry.network_of(group) for group in self.param_groups]

    @property
    def precision(self) -> str:
        """What the constructor was given: "float32" or "bfloat16"."""
        return self._precision

    @property
    def process_group(self) -> Any:
        """What the constructor was given: kept by :func:`copy.deepcopy`, lost by pickling unless it can be pickled."""
        return self._kept.value

    @process_group.setter
    def process_group(self, value: Any) -> None:
        self._kept = Kept(value)

    def state_of(self, param: Tensor) -> State | None:
        """The recurrent state of a parameter, sharing the memory of ``optimizer.state[param]["lstm_state"]`` unless
        that must be converted first; None before its first step.

        Raises:
            KeyError: not a parameter of this optimizer.
        """
        for group in self.param_groups:
            if any(param is each for each in group["params"]):
                config, entry = self._registry.network_of(group).config, self.state.get(param, {})
                held = sharding.local(param)
                dtype = dtype_of(held, group)
                tiles = tiles_of(sharding.local_entry(entry, param), held, config, dtype)
                return None if tiles is None else as_state(tiles, held.numel(), config, age_of(entry, config))
        raise KeyError(f"param: not a parameter of this optimizer, of shape {tuple(param.shape)}")

    profile_hook_step = staticmethod(profile_hook_step)

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss, if there is a closure.

        torch.compile leaves the step alone: it is one launch already. The first step of all, if every lr is 0 and every
        gradient exactly zero, makes the state and leaves it as new, outside of segments and unless there is a
        ``process_group``: such a step is how ``torch.distributed.checkpoint`` has an optimizer make what it will look
        for.

        Raises:
            TypeError, ValueError, NotImplementedError: a gradient, parameter, state or option that does not fit, in
                whichever group; nothing has been written then, in any group.
            RuntimeError: an earlier step failed, or was interrupted, after it had begun to write. The closure is not
                called then. Ctrl-C waits for an operator that runs; if that was all of the step, the step is whole.
        """
        if self._failure is not None or self._segment is not None or self._kept.reduce is not None:
            self._check_can_go_on()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Everything is collected and checked before the first launch, so that an error leaves all groups untouched.
        networks = self.networks
        # Rebuilt every step: a copy of 20 kB costs less than a cache that could go stale.
        phis = {id(network): network.phi() for network in dict.fromkeys(networks)}
        firsts = itertools.accumulate((len(group["params"]) for group in self.param_groups), initial=0)
        known = self.state, self._kept.reduce, self._tensor_features
        batches = [
            gather(group, network, phis[id(network)], *known, first, self._precision)
            for group, network, first in zip(self.param_groups, networks, firsts, strict=False)
        ]
        segment = self._segment
        if len(batches) != 1 or batches[0].exact or batches[0].memory is not None or batches[0].network.orthogonal:
            check_together(batches)
        if segment is None:
            groups, reduce = self.param_groups, self._kept.reduce
            if batches and batches[0].lr == 0.0 and only_make_state(batches, self.state, groups, reduce):
                for group, batch in zip(self.param_groups, batches, strict=True):
                    self._keep(batch, steps=0)
                    if batch.memory is not None:
                        self._keep_memory(group, batch.memory)
                return loss
        else:
            segment.begin_step(zip(self.param_groups, batches, strict=True))
        self._begun, self._done = False, 0
        try:
            for group, batch in zip(self.param_groups, batches, strict=True):
                self._run(group, batch)
        except BaseException as error:
            if self._begun and not self._is_whole(batches[-1], error):
                self._failure = f"{type(error).__name__}: {error}"
            elif segment is not None and isinstance(error, (ValueError, TypeError, NotImplementedError)):
                segment.cancel_step()  # the first launch refused its arguments
            raise
        if segment is not None:
            segment.end_step()
        return loss

    def _check_can_go_on(self) -> None:
        """Raise RuntimeError if there is no step to take, whatever the gradients are."""
        if self._failure is not None:
            raise RuntimeError(
                f"step: an earlier step failed half-way ({self._failure}), so that parameters and state no longer "
                "belong together; call load_state_dict() (and load the parameters) before going on"
            )
        if self._segment is not None:
            self._segment.check_whole()
        if self._kept.reduce is joint.refuse and any(
            network.communicates or network.tensor_inputs for network in self.networks
        ):
            joint.refuse(torch.empty(0))

    def _run(self, group: dict[str, Any], batch: Batch) -> None:
        segment = self._segment
        gradients, places = (None, ()) if segment is None else segment.record(group, batch)
        if batch.params or batch.reduce is not None:
            means = joint.fused_step(batch, gradients, places, lambda: self._keep(batch))
            if segment is not None:
                segment.keep_means(group, means)
        if batch.exact:
            for together, common in batch.exact_steps():
                self._keep(batch)
                joint.exact_step(batch, together, common)
        if batch.memory is not None:
            self._keep_memory(group, batch.memory)
        sharding.mark_written(batch.owners.values())

    def _keep_memory(self, group: dict[str, Any], memory: Memory) -> None:
        self.state[group["params"][0]].update(memory.entries())

    def _is_whole(self, last: Batch, error: BaseException) -> bool:
        """Whether a step that an interrupt ended had only to be told that it is done: Ctrl-C waits for the operator."""
        parts = (last.memory, last.reduce, last.mesh, self._segment)  # what goes on behind the operator
        alone = not (last.exact or last.owners or last.network.orthogonal) and all(part is None for part in parts)
        return alone and not isinstance(error, Exception) and self._done == id(last)

    def _keep(self, batch: Batch, steps: int = 1) -> None:
        # Only once the kernel has taken them: a step that is refused leaves the state as it was, too.
        self._begun = True
        for k, (param, age) in enumerate(batch.ages()):
            self.state[param][AGE_KEY] = age - 1 + steps
            if batch.alignments:
                self.state[param][ALIGNMENT_KEY] = batch.alignments[k]
        for param, tiles in batch.fresh:
            self.state[param].update({STATE_KEY: tiles, NUMEL_KEY: sharding.local(param).numel()})
        batch.fresh.clear()
        self._done = id(batch)

    # ---- meta-training ----

    def start_segment(self, sampling: Sampling | None = None) -> None:
        """Start an unrolled segment at the current theta_0 and state: from now on every :meth:`step` is recorded.

        Recording keeps a copy of the start state and, per step, the gradients as this optimizer sees them (after
        unscaling and clipping) in float32: 4 bytes per coordinate and step.

        Args:
            sampling: estimate the meta-gradient from a random part of the coordinates
                (:class:`l2l_fast.optim.segment_sampling.Sampling`); segments with gradients from beyond, or
                that return those at the start, stay exact. Default: all coordinates.

        Raises:
            TypeError: ``sampling`` is something else.
            ValueError: ``precision`` is not "float32".
            RuntimeError: a segment is already open (:meth:`discard_segment` drops it).
            NotImplementedError: a network with memory (unroll it in autograd, as :class:`l2l_fast.MetaTrainer` does),
                or coordinates that communicate and are sharded (``process_group``), or shall be sampled.
        """
        if sampling is not None and not isinstance(sampling, Sampling):
            raise TypeError(f"sampling: expected a Sampling, got {type(sampling).__name__}")
        if self._segment is not None:
            raise RuntimeError("start_segment: a segment is already open; call backward_segment() or discard_segment()")
        for group, network in zip(self.param_groups, self.networks, strict=True):
            options = sampling, state_dtype_of(group), self._precision
            check_recordable("start_segment", network, self._kept.reduce, *options)
        self._segment = Segment(sampling)

    def discard_segment(self) -> None:
        """Drop the open segment, if any, with its recorded gradients. Parameters and state stay as they are."""
        self._segment = None

    def backward_segment(
        self,
        weights: Sequence[float] | Tensor | None = None,
        grad_end_states: Mapping[Tensor, State] | None = None,
        return_grad_start_states: bool = False,
        *,
        grad_end_params: Mapping[Tensor, Tensor] | None = None,
        return_grad_start_params: bool = False,
    ) -> dict[Tensor, State] | StartGradients | None:
        """Add ``d(sum_{s=1..T} w_s f(theta_s)) / d phi`` to the ``.grad`` of the networks; close the segment.

        Call it after T recorded steps and after one more ``backward()`` at theta_T, which leaves grad f(theta_T) in the
        parameters' ``.grad``. Differentiates equation 3 of Andrychowicz et al. 2016 with every grad f(theta_s) held
        constant: exactly what back-propagation through the unrolled LSTM gives when the gradients are detached. f is
        the function whose gradients the optimizer saw: if they were clipped, so is f's gradient here. With
        ``maximize=True`` f is still the user's function, to be meta-maximised by the caller. A parameter without a
        gradient at theta_s did not move there and contributes nothing to f(theta_s). Of DTensors every process takes
        its shard, and gets the gradient over all shards; states and their gradients are those of its own.

        Args:
            weights: w_1 ... w_T (default: all 1).
            grad_end_states: for some parameters, dL/d(state after step T) from beyond the segment (synthetic
                gradients, Jaderberg et al. 2017); states as :meth:`state_of` returns them.
            return_grad_start_states: return dL/d(state at the start) for every parameter that has a state.
            grad_end_params: for some parameters, dL/d theta_T from beyond the segment, of the parameter's shape and any
                real floating-point dtype: the loss is the above plus its inner product with theta_T. It is what the
                user's theta is worth, so ``maximize`` does not turn its sign. NaN is passed on as a gradient's is.
            return_grad_start_params: return dL/d theta_0 of every parameter: the sum of the weighted gradients of the
                segment and what was injected, each times the weight decay on its way.

        Returns:
            None; or a dict from parameters to :class:`State` objects that hold gradients; or, with
            ``return_grad_start_params``, :class:`StartGradients`: ``states``, that dict or None, and ``params``, a dict
            from parameters to gradients, float64 for float64 parameters, else float32. Each fits the argument that
            injects it into the segment before.

        Afterwards the segment is closed; :meth:`start_segment` may follow at once, and the gradients in ``.grad`` may
        serve as those of the next step. After an error the segment is still open and nothing has been written; after an
        interrupt (Ctrl-C) it is open, and ``.grad`` of the networks may have been added to.

        Raises:
            RuntimeError: no open segment, no recorded step, no gradient at theta_T, or a network or state that was
                changed during the segment.
            ValueError, TypeError: weights of the wrong length or type, grad_end_states or grad_end_params that do not
                fit; no parameter that requires grad in the networks that moved something, unless gradients at the start
                are asked for.
        """
        if self._segment is None:
            raise RuntimeError("backward_segment: no open segment; call start_segment() before the first step")
        params: list[Tensor] = []
        states: dict[Tensor, State] = {}
        for group, network in zip(self.param_groups, self.networks, strict=True):
            params += group["params"]
            for param in group["params"]:
                entry = self.state.get(param, {})
                if is_live(entry):
                    age = age_of(entry, network.config)
                    numel = sharding.local(param).numel()
                    states[param] = as_state(entry[STATE_KEY], numel, network.config, age)
        starts = bool(return_grad_start_states), grad_end_params, bool(return_grad_start_params)
        result = self._segment.backward(params, states, weights, grad_end_states, *starts)
        self._segment = None
        return result

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`torch.optim.Optimizer.state_dict`: plain data, which ``torch.load(weights_only=True)`` reads.

        Each parameter's entry holds ``"lstm_state"``, of shape ``param.shape + (2 * num_layers * hidden_size,)`` (per
        layer h, then c; of a normalized network four more, its moving averages, with their age in ``"lstm_age"``),
        independent of tiles, device and threads; a DTensor, placed as the parameter is, where that is one. A snapshot:
        later steps do not change it. Of the
        networks only a description and a digest of the weights are stored, to be compared on loading (save them with
        :meth:`CoordinatewiseLSTM.save`). An open segment is not stored. What others keep in ``state`` (wrappers of
        optimizers) is stored as it is. After a step that failed half-way it says so, and will not be loaded."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = pack(self.state, self.param_groups, self.networks, self._failure)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            result = post_hook(self, state_dict)
            state_dict = state_dict if result is None else result
        return state_dict

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; the argument is not modified. The groups keep their networks. Files
        of earlier releases load. The state of a DTensor may be a DTensor of any placements, or a plain tensor of the
        whole parameter, of which each process takes its shard; all processes load at once.

        Raises:
            RuntimeError: a segment is open.
            TypeError, ValueError: not the state dict of a LearnedOptimizer, or groups, options, parameters or networks
                that do not match, or one of half-written state; nothing has been loaded then.

        Warns of states that will begin anew although something was saved for their parameters.
        """
        if self._segment is not None:
            raise RuntimeError(
                "load_state_dict: a segment is open and would no longer match the state; call backward_segment() or "
                "discard_segment() first"
            )
        state_dict = copy.copy(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, state_dict)
            state_dict = state_dict if result is None else result
        with torch.inference_mode(False):  # a state outlives the mode that it is loaded in
            state, groups = unpack(state_dict, self.param_groups, self.networks, self._kept.reduce)
        self.__setstate__({"state": state, "param_groups": groups})
        self._failure = None
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _KEPT}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it; the constructor, which takes defaults, has no such
        self._segment = None  # a copy starts outside any segment
        take_in_renamed(self.defaults)
        self.defaults.setdefault("num_problems", 1)
        self.defaults.setdefault("total_steps", None)
        self.defaults.setdefault("state_dtype", "float32")
        for name, make in _KEPT.items():
            if name not in self.__dict__:
                self.__dict__[name] = make()
        for group in self.param_groups:
            take_in_renamed(group)
            group.setdefault("num_problems", 1)
            group.setdefault("total_steps", None)
            group.setdefault("state_dtype", "float32")
            self._registry.network_of(group)
        for key, entry in self.state.items():
            self.state[key] = modernized(entry)
