"""What torch puts around every ``Optimizer.step``: its hooks, and a record for the profiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
    """As :meth:`torch.optim.Optimizer.profile_hook_step`, which records the step whether a profiler runs or not: that
    alone takes as long as the step of a small tensor. Where neither profiler nor hook is there, ``func`` is called."""
    recorded = Optimizer.profile_hook_step(func)

    @functools.wraps(func)
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        if hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks or torch.autograd._profiler_enabled():
            return recorded(self, *args, **kwargs)
        return func(self, *args, **kwargs)

    return step
