"""What the losses with hand-written gradients share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that refuses to be differentiated: it would take its own inputs for constants, silently.

    PyTorch's ``once_differentiable`` refuses only where the incoming gradient depends on something; a penalty on the
    gradient of this loss plus another one slips through.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the gradient of this loss cannot be differentiated a second time (create_graph=True); the plain form "
                "of the loss, which keeps its intermediate values, can"
            )
        return backward(ctx, *grads)

    return checked
