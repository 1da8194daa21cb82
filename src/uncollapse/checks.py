"""Arguments that cannot be meant, refused before they become numbers; one line that says what, where and what to do.

Shapes, types and plain numbers are looked at always, since that costs nothing. What is inside a tensor is looked at
where it is on a CPU, or where the function waits for its device in any case: a loss must not. What is a mean over rows
refuses an empty batch, of which there is none; a sum over no rows is 0, and an update from none changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def above_zero(value: float, name: str = "temperature") -> None:
    if not value > 0:
        raise ValueError(f"{name} must be above 0, got {value}")


def not_empty(rows: int) -> None:
    if rows < 1:
        raise ValueError("an empty batch: there is no mean over no rows; leave out the step, or drop the last batch")


def one_shape(tensors: Sequence[Tensor], what: str) -> None:
    """``(rows, columns)`` of the same numbers each, and at least one row.

    Raises:
        ValueError: saying ``what`` must be alike, and which is not.
    """
    if not len(tensors):  # a stacked tensor is a sequence too
        raise ValueError(f"there are none of {what}")
    shape = tuple(tensors[0].shape)
    if odd := [tuple(t.shape) for t in tensors if tuple(t.shape) != shape]:
        raise ValueError(f"{what} must be of one shape: the first is {shape}, one is {odd[0]}")
    if len(shape) != 2:
        raise ValueError(f"{what} must have two dimensions each, got {shape}")
    not_empty(shape[0])


def fits(z: Tensor, weight: Tensor, bias: Tensor | None = None, whose: str = "") -> None:
    """Projections ``(..., D)``, prototypes ``(K, D)`` and their bias ``(K,)`` belong together."""
    if weight.ndim != 2 or z.ndim < 1 or z.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{whose or 'the '}projections have {z.shape[-1] if z.ndim else 0} dimensions, their prototypes "
            f"{weight.shape[1] if weight.ndim == 2 else tuple(weight.shape)}"
        )
    has_shape(bias, (len(weight),), f"bias{' of the targets' if whose else ''}")


def has_shape(x: Tensor | None, shape: tuple[int, ...], name: str) -> None:
    if x is not None and tuple(x.shape) != shape:
        raise ValueError(f"{name} is {tuple(x.shape)}, not {shape}")


def usable_weights(weight: Tensor, name: str) -> None:
    """Finite and not negative; not looked at on a GPU."""
    if weight.device.type != "cpu" or not weight.numel():
        return
    least, most = (float(x) for x in torch.aminmax(weight.detach()))  # NaN, if there is one, is both
    if not (least >= 0 and most < math.inf):
        at = (~((weight >= 0) & (weight < math.inf))).nonzero()[0].tolist()
        where = at[0] if len(at) == 1 else tuple(at)
        raise ValueError(f"{name} must be finite and 0 or above, got {float(weight[tuple(at)]):g} at place {where}")


def usable_rows(x: Tensor, weight: Tensor | None, dim: int) -> float:
    """How many rows ``x (n, dim)`` stands for, each counting ``weight (n,)`` times. Waits for the device once.

    Raises:
        ValueError: shapes that do not fit, a weight below 0 or not finite, or a row that counts and is not finite.
    """
    if x.ndim != 2 or x.shape[1] != dim:
        raise ValueError(f"what is observed must be (rows, {dim}), got {tuple(x.shape)}")
    if weight is not None and weight.shape != x.shape[:1]:
        raise ValueError(f"weight must be {(len(x),)}, one number per row, got {tuple(weight.shape)}")
    if not len(x):
        return 0.0
    bad = ~torch.linalg.vector_norm(x, dim=1).isfinite()  # also of rows so long that their squares overflow
    count, unusable = x.new_full((), len(x)), bad
    if weight is not None:
        count = weight.sum()
        unusable = (bad & (weight != 0)) | ~((weight >= 0) & weight.isfinite())
    total, wrong = torch.stack([count, unusable.sum()]).tolist()
    if wrong:
        row = int(unusable.nonzero()[0])
        if weight is not None and not 0 <= (w := float(weight[row])) < float("inf"):
            raise ValueError(f"the weight of row {row} is {w:g}; weights must be finite and 0 or above")
        raise ValueError(
            f"row {row} of the {len(x)} observed ({int(wrong)} in all) is NaN, infinite or beyond float range; "
            "nothing was learned from this batch: look for the step at which the encoder diverged"
        )
    return total
