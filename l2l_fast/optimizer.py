"""LearnedOptimizer: a trained network behind the interface of torch.optim."""

from __future__ import annotations

import copy
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import ops, reference
from .network import CoordinatewiseLSTM, check_gradient
from .ops import KERNEL_DTYPES, Config
from .segment import Segment
from .state import State

STATE_KEY = "lstm_state"


class Batch(NamedTuple):
    """What one parameter group does in one step: tensors for the fused kernel, and float64 ones for the reference."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[State]
    exact: list[tuple[Tensor, Tensor, State]]
    phi: Tensor
    config: Config
    lr: float
    weight_decay: float
    maximize: bool


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
    ) -> None:
        self._segment: Segment | None = None
        defaults = {"network": network, "lr": lr, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see :meth:`torch.optim.Optimizer.add_param_group`. Options not given take the defaults."""
        if isinstance(param_group, dict):
            _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            params = self.param_groups[-1]["params"]
            for param in params:
                check_gradient("params", param)
            if len(set(params)) != len(params):
                raise ValueError("params: the same parameter appears more than once in the group")
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

    def _gather(self, group: dict[str, Any], phis: dict[int, Tensor]) -> Batch:
        network = group["network"]
        phi = phis.get(id(network))
        if phi is None:
            # Rebuilt every step: a copy of 20 kB costs less than a cache that could go stale.
            phi = phis[id(network)] = network.phi()
        lr = float(group["lr"])
        batch = Batch([], [], [], [], phi, network.config, lr, float(group["weight_decay"]), bool(group["maximize"]))
        params, grads, states, exact = batch.params, batch.grads, batch.states, batch.exact
        on_cpu = phi.is_cpu
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            fused = grad.dtype in KERNEL_DTYPES and param.dtype in KERNEL_DTYPES
            if not fused or grad.layout is not torch.strided:
                check_gradient("params", param)
                check_gradient("grad", grad)
            if not (on_cpu and param.is_cpu and grad.is_cpu):
                _check_devices(param, grad, phi, fused)
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
        """
        if self._segment is not None:
            raise RuntimeError("start_segment: a segment is already open; call backward_segment() or discard_segment()")
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
            index[id(key)] if isinstance(key, Tensor) else key: _pack_entry(value) for key, value in self.state.items()
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
        _check_structure(state_dict)
        groups = copy.deepcopy(state_dict["param_groups"])
        counts = [len(group["params"]) for group in groups], [len(group["params"]) for group in self.param_groups]
        if counts[0] != counts[1]:
            raise ValueError(
                f"state_dict: expected groups of {counts[1]} parameters (as in the optimizer), got {counts[0]}"
            )
        owners: dict[Any, tuple[Tensor, CoordinatewiseLSTM]] = {}
        for new, old in zip(groups, self.param_groups, strict=True):
            _check_same_network(new.get("network"), old["network"].config)
            _check_options({**new, "network": old["network"]})
            owners.update(
                (key, (param, old["network"])) for key, param in zip(new["params"], old["params"], strict=True)
            )
            new.update({"params": old["params"], "network": old["network"]})
            if "param_names" in old:
                new.setdefault("param_names", old["param_names"])
        state: defaultdict[Any, Any] = defaultdict(dict)
        for key, entry in state_dict["state"].items():
            if key in owners:
                state[owners[key][0]] = _unpack_entry(entry, *owners[key])
            else:
                state[key] = copy.deepcopy(entry)
        self.__setstate__({"state": state, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._segment = None  # a copy starts outside any segment


def _exact_step(param: Tensor, grad: Tensor, state: State, batch: Batch) -> None:
    g = -grad if batch.maximize else grad
    update, logical = reference.lstm_step(g, state.to_logical(), batch.phi, batch.config)
    param.mul_(1.0 - batch.lr * batch.weight_decay).add_(update, alpha=batch.lr)
    state.data.copy_(State.from_logical(logical).data)


def _check_structure(state_dict: Any) -> None:
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= set(state_dict):
        got = sorted(map(str, state_dict)) if isinstance(state_dict, dict) else type(state_dict).__name__
        raise ValueError(f"state_dict: expected a dict with 'state' and 'param_groups', got {got}")
    groups, state = state_dict["param_groups"], state_dict["state"]
    if not isinstance(state, dict) or not all(isinstance(entry, dict) for entry in state.values()):
        raise TypeError("state_dict: expected a dict of dicts as 'state'")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise TypeError("state_dict: expected a list of dicts as 'param_groups'")
    for group in groups:
        missing = {"params", "lr", "weight_decay", "maximize"} - set(group)
        if missing:
            raise ValueError(f"state_dict: a group lacks {sorted(missing)}")
        if not isinstance(group["params"], list) or not all(isinstance(k, (int, str)) for k in group["params"]):
            raise TypeError(f"state_dict: expected a list of indices as 'params' of a group, got {group['params']!r}")
    keys = [key for group in groups for key in group["params"]]
    if len(set(keys)) != len(keys):
        raise ValueError(f"state_dict: expected every parameter once, got {keys}")


def _check_options(group: Mapping[str, Any]) -> None:
    if group["network"] is None:
        raise ValueError("network: expected a CoordinatewiseLSTM for every parameter group, got None")
    if not isinstance(group["network"], CoordinatewiseLSTM):
        raise TypeError(f"network: expected a CoordinatewiseLSTM, got {type(group['network']).__name__}")
    for name in ("lr", "weight_decay"):
        value = group[name]
        if isinstance(value, Tensor) and name == "lr":
            if value.numel() != 1:
                raise ValueError(f"lr: expected a number or a tensor with one element, got shape {tuple(value.shape)}")
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {value!r}")
        if not 0.0 <= (float(value) if isinstance(value, Tensor) else value) <= sys.float_info.max:
            raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    if not isinstance(group["maximize"], bool):
        raise TypeError(f"maximize: expected a bool, got {group['maximize']!r}")


def _check_devices(param: Tensor, grad: Tensor, phi: Tensor, fused: bool) -> None:
    if not param.device == grad.device == phi.device:
        raise ValueError(
            f"params, their gradients and the network must be on one device, got {param.device}, {grad.device} and "
            f"{phi.device}"
        )
    if fused:
        ops.require_kernel("lstm_step_", param.device)


def _pack_entry(entry: Any) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get(STATE_KEY), State):
        return entry
    layers = [torch.stack(pair, dim=1) for pair in entry[STATE_KEY].to_logical()]
    return {**entry, STATE_KEY: torch.stack(layers, dim=1)}


def _unpack_entry(entry: Mapping[str, Any], param: Tensor, network: CoordinatewiseLSTM) -> dict[str, Any]:
    unpacked = {key: copy.deepcopy(value) for key, value in entry.items() if key != STATE_KEY}
    if STATE_KEY in entry:
        saved = entry[STATE_KEY]
        expected = (param.numel(), network.num_layers, 2, network.hidden_size)
        if not isinstance(saved, Tensor) or tuple(saved.shape) != expected:
            got = tuple(saved.shape) if isinstance(saved, Tensor) else type(saved).__name__
            raise ValueError(f"state_dict: expected {STATE_KEY!r} of shape {expected}, got {got}")
        if saved.layout != torch.strided or not saved.is_floating_point():
            raise TypeError(f"state_dict: expected a dense real {STATE_KEY!r}, got {saved.dtype}, {saved.layout}")
        saved = saved.to(param.device, torch.float64 if param.dtype == torch.float64 else torch.float32)
        layers = [(saved[:, k, 0], saved[:, k, 1]) for k in range(network.num_layers)]
        unpacked[STATE_KEY] = State.from_logical(layers)
    return unpacked


def _check_same_network(saved: Mapping[str, Any] | None, current: Config) -> None:
    if saved is None:
        return
    if not isinstance(saved, Mapping):
        raise TypeError(f"state_dict: expected a network's configuration, got {type(saved).__name__}")
    for name, value in current._asdict().items():
        if isinstance(saved.get(name), (int, float, str)) and saved[name] == value:
            continue
        difference = f"state_dict: saved with a network of {name}={saved.get(name)!r}, now {name}={value!r}"
        if name in ("hidden_size", "num_layers"):
            raise ValueError(difference)
        warnings.warn(f"{difference}: the optimizer will not continue as before", stacklevel=3)
