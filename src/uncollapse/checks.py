"""Arguments that cannot be meant, refused before they become numbers; one line that says what, where and what to do.

Shapes, types and plain numbers are looked at always, since that costs nothing. What is inside a tensor is looked at
where it is on a CPU, or where the function waits for its device in any case: a loss must not.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_rows(x: Tensor, weight: Tensor | None, dim: int) -> float:
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
