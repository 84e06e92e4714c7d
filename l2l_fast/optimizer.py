"""LearnedOptimizer: a trained network behind the interface of torch.optim."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from math import isfinite
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from . import joint, ops, reference
from .config import AnyConfig
from .joint import Kept, Reduce
from .memory import NTMBFGS, Memory
from .network import CoordinatewiseLSTM, check_gradient
from .ops import KERNEL_DTYPES, Config
from .optimizer_checks import (
    check_devices,
    check_new_options,
    check_parameters,
    check_plain,
    check_problems,
    check_together,
    number,
    plain,
    truth,
)
from .optimizer_networks import Registry, check_network, check_same_network, digest
from .optimizer_state import (
    NUMEL_KEY,
    SAVED_KEY,
    TILES_KEY,
    as_state,
    check_structure,
    modernize,
    pack_entry,
    rows_of,
    tiles_of,
    unpack_entry,
)
from .segment import Segment
from .state import TILE, State, num_tiles
from .surroundings import without_autocast


class Batch(NamedTuple):
    """What one parameter group does in one step: tensors for the fused kernel, and float64 ones for the reference.

    Where coordinates communicate (a config that is not a :class:`Config`), all tensors are of one of the two kinds."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[Tensor]
    exact: list[tuple[Tensor, Tensor, Tensor]]
    fresh: list[tuple[Tensor, Tensor]]  # parameters with states that are not yet among the optimizer's
    network: CoordinatewiseLSTM
    phi: Tensor
    config: AnyConfig
    lr: float
    weight_decay: float
    maximize: bool
    groups: int = 1
    memory: Memory | None = None
    reduce: Reduce | None = None


class LearnedOptimizer(Optimizer):
    """Updates every coordinate with an LSTM: ``theta = theta * (1 - lr * weight_decay) + lr * phi(grad, state)``.

    Equation 1 of Andrychowicz et al. 2016 as a :class:`torch.optim.Optimizer`: parameter groups, learning-rate
    schedulers, closures, hooks, state dicts, gradient scaling and clipping work as usual. All float32, bfloat16 and
    float16 parameters of a group are updated by one launch, in float32 arithmetic; float64 parameters take the
    reference path.

    Args:
        params: parameters, named parameters or group dicts. A group may carry its own ``"network"`` (the paper's CIFAR
            experiment uses one for convolutions and one for the rest).
        network: the network of the groups that carry none.
        lr: multiplies the update; 1.0 is what the network was trained for, and what schedulers scale.
        weight_decay: decoupled weight decay, as in AdamW.
        maximize: ascend: the network sees -grad.
        groups: for networks whose coordinates communicate (:class:`l2l_fast.NTMBFGS`, ``gac_cells``): this many
            independent problems lie side by side in the leading dimension of every parameter, and do not mix. An
            option of a parameter group, as lr is; averages and memory span all parameters of the group.
        process_group: of ``torch.distributed``, if the coordinates are sharded over its processes: global averages then
            run over all of them. Or a function that adds up a float64 tensor over the processes in place. Every process
            must take every step, also one whose parameters have no gradients.

    Raises:
        TypeError: a network, option or parameter of an unsupported type (parameters must be dense and real floating
            point; so must gradients, which :meth:`step` checks before it writes anything).
        ValueError: a negative lr or weight_decay, a group without a network, or one not on its network's device.
        NotImplementedError: parameters on a device for which this build has no kernel.

    Meta-training: :meth:`start_segment` and :meth:`backward_segment`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        network: CoordinatewiseLSTM | None = None,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        groups: int = 1,
        process_group: Any = None,
    ) -> None:
        self._segment: Segment | None = None
        self._registry = Registry()
        self._kept = Kept(process_group)
        self._failure: str | None = None
        defaults = {"network": network, "lr": lr, "weight_decay": weight_decay, "maximize": maximize, "groups": groups}
        super().__init__(params, defaults)
        if process_group is not None and not any(network.communicates for network in self.networks):
            warnings.warn(
                "process_group: has no effect, for the coordinates of these networks do not communicate (gac_cells=0): "
                "every process steps its own",
                stacklevel=2,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see :meth:`torch.optim.Optimizer.add_param_group`. Options not given take the defaults."""
        if isinstance(param_group, dict):
            options = {**self.defaults, **param_group}
            if not isinstance(options["network"], dict):
                check_network(options["network"])
            check_new_options(options)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_parameters(group)
            for name in ("lr", "weight_decay"):
                group[name] = group[name] if isinstance(group[name], Tensor) else plain(group[name])
            check_problems(group, self._registry.network_of(group), self._kept.reduce)
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
    def process_group(self) -> Any:
        """What the constructor was given: kept by :func:`copy.deepcopy`, lost by pickling unless it can be pickled."""
        return self._kept.value

    @process_group.setter
    def process_group(self, value: Any) -> None:
        self._kept = Kept(value)

    def state_of(self, param: Tensor) -> State | None:
        """The recurrent state of a parameter, sharing the memory of ``optimizer.state[param]["lstm_tiles"]`` unless
        that must be converted first; None before its first step.

        Raises:
            KeyError: not a parameter of this optimizer.
        """
        for group in self.param_groups:
            if any(param is each for each in group["params"]):
                config = self._registry.network_of(group).config
                dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
                tiles = tiles_of(self.state.get(param, {}), param, config, dtype)
                return None if tiles is None else as_state(tiles, param.numel(), config)
        raise KeyError(f"param: not a parameter of this optimizer, of shape {tuple(param.shape)}")

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns the closure's loss, if there is a closure.

        torch.compile leaves the step alone: it is one launch already.

        Raises:
            TypeError, ValueError, NotImplementedError: a gradient, parameter, state or option that does not fit, in
                whichever group; nothing has been written then, in any group.
            RuntimeError: an earlier step failed after it had begun to write.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._failure is not None:
            raise RuntimeError(
                f"step: an earlier step failed half-way ({self._failure}), so that parameters and state no longer "
                "belong together; call load_state_dict() (and load the parameters) before going on"
            )
        # Everything is collected and checked before the first launch, so that an error leaves all groups untouched.
        phis: dict[int, Tensor] = {}
        batches = [self._gather(group, phis) for group in self.param_groups]
        if len(batches) > 1 or batches[0].exact:
            check_together(batches)
        segment = self._segment
        if segment is not None:
            segment.begin_step(zip(self.param_groups, batches, strict=True))
        self._begun = False
        try:
            for group, batch in zip(self.param_groups, batches, strict=True):
                self._run(group, batch)
        except BaseException as error:
            if self._begun:
                self._failure = f"{type(error).__name__}: {error}"
            raise
        if segment is not None:
            segment.end_step()
        return loss

    def _run(self, group: dict[str, Any], batch: Batch) -> None:
        record, tiles = (None, ()) if self._segment is None else self._segment.record(group, batch)
        if not isinstance(batch.config, Config):
            with without_autocast(batch.phi.device):
                self._run_joint(group, batch, record, tiles)
            return
        if batch.params:
            options = (batch.lr, batch.weight_decay, batch.maximize, record, tiles)
            phi = batch.phi.float()
            ops.lstm_step_(batch.params, batch.grads, batch.states, phi, *batch.config, *options)
            self._keep(batch)
        for param, grad, state in batch.exact:
            self._keep(batch)
            with without_autocast(batch.phi.device):
                _exact_step(param, grad, state, batch)

    def _run_joint(
        self, group: dict[str, Any], batch: Batch, record: Tensor | None, record_tiles: Sequence[int]
    ) -> None:
        if batch.exact:
            self._keep(batch)
            joint.exact_step(batch)
        elif batch.params or batch.reduce is not None:
            means = joint.fused_step(batch, record, record_tiles, lambda: self._keep(batch))
            if self._segment is not None:
                self._segment.keep_means(group, means)
        if batch.memory is not None:
            self.state[group["params"][0]].update(batch.memory.entries())

    def _keep(self, batch: Batch) -> None:
        # Only once the kernel has taken them: a step that is refused leaves the state as it was, too.
        self._begun = True
        for param, tiles in batch.fresh:
            entry = self.state[param]
            entry.update({TILES_KEY: tiles, NUMEL_KEY: param.numel()})
            entry.pop(SAVED_KEY, None)
        batch.fresh.clear()

    def _gather(self, group: dict[str, Any], phis: dict[int, Tensor]) -> Batch:
        network = self._registry.network_of(group)
        phi = phis.get(id(network))
        if phi is None:
            # Rebuilt every step: a copy of 20 kB costs less than a cache that could go stale.
            phi = phis[id(network)] = network.phi()
        lr, decay = group["lr"], group["weight_decay"]
        lr = lr if type(lr) is float and isfinite(lr) else number("lr", lr)
        decay = decay if type(decay) is float and isfinite(decay) else number("weight_decay", decay)
        maximize = group["maximize"]
        maximize = maximize if type(maximize) is bool else truth("maximize", maximize)
        batch = Batch([], [], [], [], [], network, phi, network.config, lr, decay, maximize)
        all_exact = False
        if not isinstance(batch.config, Config):
            batch, all_exact = self._gather_joint(group, batch)
        config, kernel = batch.config, "lstm_step_" if isinstance(batch.config, Config) else "gac_step_"
        on_cpu, rows = phi.is_cpu, rows_of(config)
        params, grads, states, state_of = batch.params, batch.grads, batch.states, self.state.get
        for k, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None:
                continue
            if type(param) is not Parameter or type(grad) is not Tensor:
                check_plain(param, group, k, "params")
                check_plain(grad, group, k, "grad")
            fused = grad.dtype in KERNEL_DTYPES and param.dtype in KERNEL_DTYPES and not all_exact
            if not fused or grad.layout is not torch.strided:
                check_gradient("params", param)
                check_gradient("grad", grad)
            if not (on_cpu and param.is_cpu and grad.is_cpu):
                check_devices(param, grad, phi, fused, kernel)
            dtype = torch.float32 if fused else torch.float64
            entry = state_of(param, _EMPTY)
            tiles, numel = entry.get(TILES_KEY), param.numel()
            fits = type(tiles) is Tensor and tiles.dtype is dtype and tiles.dim() == 3 and tiles.size(1) == rows
            if not fits or entry.get(NUMEL_KEY) != numel or SAVED_KEY in entry:
                with torch.inference_mode(False):  # a state outlives the mode that its first step is taken in
                    tiles = tiles_of(entry, param, config, dtype)
                    if tiles is None:
                        shape = (num_tiles(numel), rows, TILE)
                        tiles = torch.zeros(shape, dtype=dtype, device=param.device)
                batch.fresh.append((param, tiles))
            if fused:
                params.append(param)
                grads.append(grad)
                states.append(tiles)
            else:
                batch.exact.append((param, grad, tiles))
        return batch

    def _gather_joint(self, group: dict[str, Any], batch: Batch) -> tuple[Batch, bool]:
        # One average cannot run over the kernel and the reference: a single float64 tensor takes all to the latter.
        params, network, reduce = group["params"], batch.network, self._kept.reduce
        moving = [param for param in params if param.grad is not None]
        exact = any(torch.float64 in (param.dtype, param.grad.dtype) for param in moving)
        if exact and reduce is not None:
            raise NotImplementedError("step: float64 parameters cannot be sharded, only float32, bfloat16 and float16")
        memory = None
        if moving and isinstance(network, NTMBFGS):
            joint.check_all_move(params)
            dtype = torch.float64 if exact else torch.float32
            with torch.inference_mode(False):
                memory = joint.memory_of(self.state.get(params[0], _EMPTY), group, network, dtype)
                if memory is None:
                    numel = sum(param.numel() for param in params)
                    memory = network.init_memory(numel, group["groups"], params[0].device, dtype)
        return batch._replace(groups=group["groups"], memory=memory, reduce=reduce), exact

    # ---- meta-training ----

    def start_segment(self) -> None:
        """Start an unrolled segment at the current theta_0 and state: from now on every :meth:`step` is recorded.

        Recording keeps a copy of the start state and, per step, the gradients as this optimizer sees them (after
        unscaling and clipping) in float32: 4 bytes per coordinate and step.

        Raises:
            RuntimeError: a segment is already open (:meth:`discard_segment` drops it).
            NotImplementedError: a network with memory (unroll it in autograd, as :class:`l2l_fast.MetaTrainer` does),
                or coordinates that communicate and are sharded.
        """
        if self._segment is not None:
            raise RuntimeError("start_segment: a segment is already open; call backward_segment() or discard_segment()")
        for network in self.networks:
            if isinstance(network, NTMBFGS) or network.num_outputs > 1:
                raise NotImplementedError(
                    "start_segment: a network with memory or several outputs is unrolled in autograd, not in segments"
                )
            if network.communicates and self._kept.reduce is not None:
                raise NotImplementedError("start_segment: not with sharded coordinates (process_group)")
        self._segment = Segment()

    def discard_segment(self) -> None:
        """Drop the open segment, if any, with its recorded gradients. Parameters and state stay as they are."""
        self._segment = None

    def backward_segment(
        self,
        weights: Sequence[float] | Tensor | None = None,
        grad_end_states: Mapping[Tensor, State] | None = None,
        return_grad_start_states: bool = False,
    ) -> dict[Tensor, State] | None:
        """Add ``d(sum_{s=1..T} w_s f(theta_s)) / d phi`` to the ``.grad`` of the networks; close the segment.

        Call it after T recorded steps and after one more ``backward()`` at theta_T, which leaves grad f(theta_T) in the
        parameters' ``.grad``. Differentiates equation 3 of Andrychowicz et al. 2016 with every grad f(theta_s) held
        constant: exactly what back-propagation through the unrolled LSTM gives when the gradients are detached. f is
        the function whose gradients the optimizer saw: if they were clipped, so is f's gradient here. With
        ``maximize=True`` f is still the user's function, to be meta-maximised by the caller. A parameter without a
        gradient at theta_s did not move there and contributes nothing to f(theta_s).

        Args:
            weights: w_1 ... w_T (default: all 1).
            grad_end_states: for some parameters, dL/d(state after step T) from beyond the segment (synthetic
                gradients, Jaderberg et al. 2017); states as :meth:`state_of` returns them.
            return_grad_start_states: return dL/d(state at the start) for every parameter that has a state.

        Returns:
            None, or a dict from parameters to :class:`State` objects that hold gradients.

        Afterwards the segment is closed; :meth:`start_segment` may follow at once, and the gradients in ``.grad`` may
        serve as those of the next step. After an error the segment is still open and nothing has been written.

        Raises:
            RuntimeError: no open segment, no recorded step, no gradient at theta_T, or a network or state that was
                changed during the segment.
            ValueError, TypeError: weights of the wrong length or type, grad_end_states that do not fit; networks of
                which no parameter requires grad, unless the gradients of the start states are asked for.
        """
        if self._segment is None:
            raise RuntimeError("backward_segment: no open segment; call start_segment() before the first step")
        states: dict[Tensor, State] = {}
        for group, network in zip(self.param_groups, self.networks, strict=True):
            for param in group["params"]:
                tiles = self.state.get(param, _EMPTY).get(TILES_KEY)
                if tiles is not None:
                    states[param] = as_state(tiles, param.numel(), network.config)
        result = self._segment.backward(states, weights, grad_end_states, return_grad_start_states)
        self._segment = None
        return result

    def _params(self) -> Iterable[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`torch.optim.Optimizer.state_dict`: plain data, which ``torch.load(weights_only=True)`` reads.

        Each parameter's entry holds ``"lstm_state"``, of shape ``param.shape + (2 * num_layers * hidden_size,)`` (per
        layer h, then c), independent of tiles, device and threads. A snapshot: later steps do not change it. Of the
        networks only a description and a digest of the weights are stored, to be compared on loading (save them with
        :meth:`CoordinatewiseLSTM.save`). An open segment is not stored."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        index: dict[int, int] = {}
        for k, param in enumerate(self._params()):
            index.setdefault(id(param), k)
        groups = []
        for group in self.param_groups:
            network = self._registry.network_of(group)
            packed = {key: plain(value) for key, value in group.items() if key != "params"}
            packed["network"] = {**group["network"], "digest": digest(network)}
            packed["params"] = [index[id(param)] for param in group["params"]]
            groups.append(packed)
        state = {
            index[id(key)] if isinstance(key, Tensor) else key: pack_entry(value, key)
            for key, value in self.state.items()
        }
        state_dict: dict[str, Any] = {"state": state, "param_groups": groups}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            result = post_hook(self, state_dict)
            state_dict = state_dict if result is None else result
        return state_dict

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; the argument is not modified. The groups keep their networks. Files
        of earlier releases load.

        Raises:
            RuntimeError: a segment is open.
            TypeError, ValueError: not the state dict of a LearnedOptimizer, or groups, options, parameters or networks
                that do not match; nothing has been loaded then.
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
        check_structure(state_dict)
        groups = copy.deepcopy(state_dict["param_groups"])
        counts = [len(group["params"]) for group in groups], [len(group["params"]) for group in self.param_groups]
        if counts[0] != counts[1]:
            raise ValueError(
                f"state_dict: expected groups of {counts[1]} parameters (as in the optimizer), got {counts[0]}"
            )
        owners: dict[Any, tuple[Tensor, dict[str, Any]]] = {}
        for new, old in zip(groups, self.param_groups, strict=True):
            network = self._registry.network_of(old)
            check_same_network(new["network"], network, "state_dict")
            new.setdefault("groups", old["groups"])  # written before there was this option
            owners.update((key, (param, new)) for key, param in zip(new["params"], old["params"], strict=True))
            new.update({"params": old["params"], "network": old["network"]})
            for name in ("lr", "weight_decay"):
                number(name, new[name])
            truth("maximize", new["maximize"])
            check_problems(new, network, self._kept.reduce)
            if "param_names" in old:
                new.setdefault("param_names", old["param_names"])
        state: defaultdict[Any, Any] = defaultdict(dict)
        for key, entry in state_dict["state"].items():
            if key not in owners:
                state[key] = entry
                continue
            param, group = owners[key]
            network = self._registry.network_of(group)
            state[param] = unpack_entry(entry, param, network.config)
            if "memory" in entry or any(name in entry for name in Memory.KEYS if name != "step"):
                if not isinstance(network, NTMBFGS):
                    raise ValueError("state_dict: a memory was saved, but the group's network has none")
                memory = joint.memory_of(entry, group, network)
                state[param].update({name: value.clone() for name, value in memory.entries().items()})
        self.__setstate__({"state": state, "param_groups": groups})
        self._failure = None
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        kept = {"_registry": self._registry, "_kept": self._kept, "_failure": self._failure}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._segment = None  # a copy starts outside any segment
        # What load_state_dict leaves alone, and pickles of earlier releases do not have.
        for name, make in (("_registry", Registry), ("_kept", Kept), ("_failure", lambda: None)):
            if name not in self.__dict__:
                self.__dict__[name] = make()
        for group in self.param_groups:
            group.setdefault("groups", 1)
            self._registry.network_of(group)
        for entry in self.state.values():
            modernize(entry)


_EMPTY: Mapping[str, Any] = MappingProxyType({})


def _exact_step(param: Tensor, grad: Tensor, tiles: Tensor, batch: Batch) -> None:
    g = -grad if batch.maximize else grad
    state = as_state(tiles, param.numel(), batch.config)
    update, logical = reference.lstm_step(g, state.to_logical(), batch.phi, batch.config)
    param.mul_(1.0 - batch.lr * batch.weight_decay).add_(update, alpha=batch.lr)
    tiles.copy_(State.from_logical(logical).data)
