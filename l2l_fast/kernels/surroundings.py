"""What a caller may have switched on around the package's own arithmetic and loops, which work the same under it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch

# Asked by name, since a loop cannot know on which devices a task computes.
_AUTOCAST = ("cpu", "cuda", "xpu", "mps")


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast switched off on ``device``, if it is on there: the step is float32 arithmetic, whatever the user's
    forward pass runs in."""
    if has_autocast(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def has_autocast(device: torch.device) -> bool:
    """Whether the caller has switched autocast on for ``device``."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


@contextmanager
def own_loop() -> Iterator[None]:
    """Inside, gradients are on, inference mode is off and so is the caller's autocast.

    Autocast keeps the casts of the parameters until its outermost region ends, and a loop that optimises in place
    within that region would go on with those of theta_0. A task that enters autocast itself keeps it, see
    :meth:`l2l_fast.problems.theta.Theta.evaluate`.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
