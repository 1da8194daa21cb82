"""What the losses with hand-written gradients share: the gradient is formed together with the value.

A value and its gradient need the same pass over the prototypes, so a loss forms both in forward and hands the gradient
over in backward. `losses/mean_entropy.py` is the exception: its gradient needs the finished mean first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Form = Callable[[Sequence[Any], Sequence[bool]], tuple[Sequence[Tensor], Sequence[Tensor | None]]]
"""(tensors, which of the learned ones need a gradient) → the loss and further numbers, and the gradients."""


def with_gradient(form: Form, learned: Sequence[Tensor | None], fixed: Sequence[Tensor | None] = ()) -> Any:
    """The first of ``form([*learned, *fixed], needs)``'s numbers as a loss with the gradients that came with it.

    ``form`` runs without autocast and without a graph. It is called a second time only where the same graph is walked
    again.

    Returns:
        The loss; with further numbers (which have no gradient), all of them.
    """
    outputs = _Formed.apply(form, len(learned), torch.is_grad_enabled(), *learned, *fixed)
    return outputs if len(outputs) > 1 else outputs[0]


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


class _Formed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, form: Form, learned: int, gradients: bool, *tensors: Any) -> tuple[Tensor, ...]:
        ctx.form = form
        ctx.needs = [gradients and needed for needed in ctx.needs_input_grad[3 : 3 + learned]]
        ctx.save_for_backward(*tensors)
        outputs, ctx.gradients = _alone(form, tensors, ctx.needs)
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            # Handed over already, and scaled in place there: a graph that is walked twice pays for it here.
            gradients = _alone(ctx.form, ctx.saved_tensors, ctx.needs)[1]
        # A gradient may be as large as all logits: a pass over it to multiply by 1 is worth a look at a number, which
        # on a GPU would be worth a wait instead.
        as_it_is = grad.device.type == "cpu" and float(grad) == 1
        handed = [g if g is None or as_it_is else g.mul_(grad) for g in gradients]
        return None, None, None, *handed, *[None] * (len(ctx.needs_input_grad) - 3 - len(handed))


def _alone(
    form: Form, tensors: Sequence[Any], needs: Sequence[bool]
) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    device = next(t.device for t in tensors if t is not None)
    with torch.autocast(device.type, enabled=False), torch.no_grad():
        return form(tensors, needs)
