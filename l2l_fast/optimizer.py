"""LearnedOptimizer: a trained network behind the interface of torch.optim."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import joint, ops, reference
from .config import AnyConfig
from .joint import Reduce
from .memory import NTMBFGS, Memory
from .network import CoordinatewiseLSTM, check_gradient
from .ops import KERNEL_DTYPES, Config
from .optimizer_checks import check_devices, check_options, check_problems
from .optimizer_state import STATE_KEY, check_same_network, check_structure, pack_entry, unpack_entry
from .segment import Segment
from .state import State


class Batch(NamedTuple):
    """What one parameter group does in one step: tensors for the fused kernel, and float64 ones for the reference.

    Where coordinates communicate (a config that is not a :class:`Config`), all tensors are of one of the two kinds."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[State]
    exact: list[tuple[Tensor, Tensor, State]]
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
        self._reduce = joint.as_reduce(process_group)
        defaults = {"network": network, "lr": lr, "weight_decay": weight_decay, "maximize": maximize, "groups": groups}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see :meth:`torch.optim.Optimizer.add_param_group`. Options not given take the defaults."""
        if isinstance(param_group, dict):
            check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            params = self.param_groups[-1]["params"]
            for param in params:
                check_gradient("params", param)
            if len(set(params)) != len(params):
                raise ValueError("params: the same parameter appears more than once in the group")
            check_problems(self.param_groups[-1], self._reduce)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Everything is collected and checked before the first launch, so that an error leaves all groups untouched.
        phis: dict[int, Tensor] = {}
        batches = [self._gather(group, phis) for group in self.param_groups]
        segment = self._segment
        if segment is not None:
            segment.begin_step(zip(self.param_groups, batches, strict=True))
        for group, batch in zip(self.param_groups, batches, strict=True):
            record, record_tiles = (None, ()) if segment is None else segment.record(group, batch)
            if not isinstance(batch.config, Config):
                self._joint_step(group, batch, record, record_tiles)
                continue
            if batch.params:
                ops.lstm_step_(
                    batch.params,
                    batch.grads,
                    [state.data for state in batch.states],
                    batch.phi.float(),
                    *batch.config,
                    batch.lr,
                    batch.weight_decay,
                    batch.maximize,
                    record,
                    record_tiles,
                )
            for param, grad, state in batch.exact:
                _exact_step(param, grad, state, batch)
        if segment is not None:
            segment.end_step()
        return loss

    def _joint_step(
        self, group: dict[str, Any], batch: Batch, record: Tensor | None, record_tiles: Sequence[int]
    ) -> None:
        if batch.exact:
            joint.exact_step(batch)
        elif batch.params or batch.reduce is not None:
            means = joint.fused_step(batch, record, record_tiles)
            if self._segment is not None:
                self._segment.keep_means(group, means)

    def _gather(self, group: dict[str, Any], phis: dict[int, Tensor]) -> Batch:
        network = group["network"]
        phi = phis.get(id(network))
        if phi is None:
            # Rebuilt every step: a copy of 20 kB costs less than a cache that could go stale.
            phi = phis[id(network)] = network.phi()
        lr = float(group["lr"])
        decay, maximize = float(group["weight_decay"]), bool(group["maximize"])
        batch = Batch([], [], [], [], network, phi, network.config, lr, decay, maximize)
        all_exact = False
        if not isinstance(batch.config, Config):
            batch, all_exact = self._gather_joint(group, batch)
        params, grads, states, exact = batch.params, batch.grads, batch.states, batch.exact
        on_cpu = phi.is_cpu
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            fused = grad.dtype in KERNEL_DTYPES and param.dtype in KERNEL_DTYPES and not all_exact
            if not fused or grad.layout is not torch.strided:
                check_gradient("params", param)
                check_gradient("grad", grad)
            if not (on_cpu and param.is_cpu and grad.is_cpu):
                check_devices(
                    param, grad, phi, fused, "lstm_step_" if isinstance(batch.config, Config) else "gac_step_"
                )
            state = self.state[param].get(STATE_KEY)
            if state is None or state.dtype != (torch.float32 if fused else torch.float64):
                state = self._new_state(param, state, network, torch.float32 if fused else torch.float64)
            config = batch.config
            if (state.numel, state.hidden_size, state.num_layers) != (
                param.numel(),
                config.hidden_size,
                config.num_layers,
            ):
                raise ValueError(
                    f"the state of a parameter of shape {tuple(param.shape)} does not fit the parameter or the group's "
                    f"network (hidden_size={config.hidden_size}, num_layers={config.num_layers}): {state!r}"
                )
            if fused:
                params.append(param)
                grads.append(grad)
                states.append(state)
            else:
                exact.append((param, grad, state))
        return batch

    def _gather_joint(self, group: dict[str, Any], batch: Batch) -> tuple[Batch, bool]:
        # One average cannot run over the kernel and the reference: a single float64 tensor takes all to the latter.
        moving = [param for param in group["params"] if param.grad is not None]
        exact = any(torch.float64 in (param.dtype, param.grad.dtype) for param in moving)
        if exact and self._reduce is not None:
            raise NotImplementedError("step: float64 parameters cannot be sharded, only float32, bfloat16 and float16")
        memory = None
        if moving and isinstance(batch.network, NTMBFGS):
            entry = self.state[group["params"][0]]
            memory = joint.memory_of(entry, group, torch.float64 if exact else torch.float32)
        return batch._replace(groups=group["groups"], memory=memory, reduce=self._reduce), exact

    def _new_state(self, param: Tensor, old: State | None, network: CoordinatewiseLSTM, dtype: torch.dtype) -> State:
        if old is None:
            state = network.init_state(param.numel(), device=param.device, dtype=dtype)
        else:
            state = old.to(dtype)  # the parameter has been converted from or to float64
        self.state[param][STATE_KEY] = state
        return state

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
        for group in self.param_groups:
            network = group["network"]
            if isinstance(network, NTMBFGS) or network.num_outputs > 1:
                raise NotImplementedError(
                    "start_segment: a network with memory or several outputs is unrolled in autograd, not in segments"
                )
            if network.communicates and self._reduce is not None:
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
                gradients, Jaderberg et al. 2017); states as in ``optimizer.state[param]["lstm_state"]``.
            return_grad_start_states: return dL/d(state at the start) for every parameter that has a state.

        Returns:
            None, or a dict from parameters to :class:`State` objects that hold gradients.

        Afterwards the segment is closed; :meth:`start_segment` may follow at once, and the gradients in ``.grad`` may
        serve as those of the next step. After an error the segment is still open and nothing has been written.

        Raises:
            RuntimeError: no open segment, no recorded step, no gradient at theta_T, or a network or state that was
                changed during the segment.
            ValueError, TypeError: weights of the wrong length or type, grad_end_states that do not fit.
        """
        if self._segment is None:
            raise RuntimeError("backward_segment: no open segment; call start_segment() before the first step")
        states = {p: self.state[p][STATE_KEY] for p in self._params() if STATE_KEY in self.state.get(p, ())}
        result = self._segment.backward(states, weights, grad_end_states, return_grad_start_states)
        self._segment = None
        return result

    def _params(self) -> Iterable[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`torch.optim.Optimizer.state_dict`; each parameter's entry holds ``"lstm_state"`` in the logical
        layout ``[numel, num_layers, 2, hidden_size]`` (index 0: h, 1: c), independent of tiles, device and threads. Of
        the networks only the configuration is stored (save them with :meth:`CoordinatewiseLSTM.save`). An open segment
        is not stored."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        index = {id(param): k for k, param in enumerate(self._params())}
        groups = []
        for group in self.param_groups:
            packed = {key: value for key, value in group.items() if key != "params"}
            packed["network"] = group["network"].config._asdict()
            packed["params"] = [index[id(param)] for param in group["params"]]
            groups.append(packed)
        state = {
            index[id(key)] if isinstance(key, Tensor) else key: pack_entry(value) for key, value in self.state.items()
        }
        state_dict: dict[str, Any] = {"state": state, "param_groups": groups}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; the argument is not modified. The groups keep their networks.

        Raises:
            RuntimeError: a segment is open.
            TypeError, ValueError: not such a dict, or groups, parameters or networks that do not match; nothing has
                been loaded then.
        """
        if self._segment is not None:
            raise RuntimeError(
                "load_state_dict: a segment is open and would no longer match the state; call backward_segment() or "
                "discard_segment() first"
            )
        state_dict = copy.copy(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict  # type: ignore[assignment]
        check_structure(state_dict)
        groups = copy.deepcopy(state_dict["param_groups"])
        counts = [len(group["params"]) for group in groups], [len(group["params"]) for group in self.param_groups]
        if counts[0] != counts[1]:
            raise ValueError(
                f"state_dict: expected groups of {counts[1]} parameters (as in the optimizer), got {counts[0]}"
            )
        owners: dict[Any, tuple[Tensor, dict[str, Any]]] = {}
        for new, old in zip(groups, self.param_groups, strict=True):
            check_same_network(new.get("network"), old["network"].config)
            new.setdefault("groups", old["groups"])  # written before there was this option
            keys = new["params"]
            new.update({"params": old["params"], "network": old["network"]})
            check_options(new)
            check_problems(new, self._reduce)
            owners.update((key, (param, new)) for key, param in zip(keys, old["params"], strict=True))
            if "param_names" in old:
                new.setdefault("param_names", old["param_names"])
        state: defaultdict[Any, Any] = defaultdict(dict)
        for key, entry in state_dict["state"].items():
            if key in owners:
                state[owners[key][0]] = unpack_entry(entry, *owners[key])
            else:
                state[key] = copy.deepcopy(entry)
        self.__setstate__({"state": state, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._segment = None  # a copy starts outside any segment
        self._reduce = getattr(self, "_reduce", None)  # and a copy in this process only: process groups do not pickle
        for group in self.param_groups:
            group.setdefault("groups", 1)


def _exact_step(param: Tensor, grad: Tensor, state: State, batch: Batch) -> None:
    g = -grad if batch.maximize else grad
    update, logical = reference.lstm_step(g, state.to_logical(), batch.phi, batch.config)
    param.mul_(1.0 - batch.lr * batch.weight_decay).add_(update, alpha=batch.lr)
    state.data.copy_(State.from_logical(logical).data)
