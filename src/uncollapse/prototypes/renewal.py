"""Components of a mixture that are put anew where projections are, some every step."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from uncollapse.distributed import same_everywhere
from uncollapse.prototypes.mixture import OnlineMixture

Renewed = Literal["oldest", "idle"]

_USE_KEPT = 0.98
"""Of the running use of each component, per step."""


class Renewal(nn.Module):
    """Puts the oldest, or the least used, components at projections of the step, so many that all were in ``steps``.

    A renewed component has the median variance and no offset. Rows are drawn at random, so that where projections are
    dense more components come to be: revival weighted by use.
    """

    done: Tensor
    use: Tensor

    def __init__(self, components: int, steps: float, which: Renewed, seed: int = 0) -> None:
        super().__init__()
        self.steps, self.which, self.seed = steps, which, seed
        self.register_buffer("done", torch.zeros((), dtype=torch.long))
        self.register_buffer("use", torch.ones(components))

    @torch.no_grad()
    def __call__(self, mixture: OnlineMixture, x: Tensor) -> None:
        """``x (n, D)``: the step's rows, as the mixture sees them."""
        step, k = int(self.done), mixture.components
        self.done += 1
        if self.which == "idle":
            chosen = (x.to(mixture.mean) @ mixture.directions().T).argmax(1)
            self.use.lerp_(torch.bincount(chosen, minlength=k) * (k / len(x)), 1 - _USE_KEPT)
        first, last = (int(k * s / self.steps) for s in (step, step + 1))
        n = min(last - first, len(x), k)
        at = torch.arange(first, first + n, device=x.device) % k
        if self.which == "idle":
            at = self.use.topk(n, largest=False).indices
            self.use[at] = 1.0
        rows = torch.randperm(len(x), generator=same_everywhere(self.seed, step))[:n].to(x.device)
        mixture.mean[at] = x[rows].to(mixture.mean)
        if len(mixture.variance) == k:
            mixture.variance[at] = mixture.variance.median(0).values
        mixture.offset[at] = 0
