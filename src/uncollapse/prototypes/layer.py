"""The mixture as the last layer of a projection head, where DINO and its relatives keep their prototypes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uncollapse.checks import fits
from uncollapse.distributed import gather_rows, world
from uncollapse.prototypes.mixture import OnlineMixture
from uncollapse.targets.softmax import SoftmaxTargets


class MixtureLayer(nn.Module):
    """Takes the place of a head's last, weight-normalised layer; its K rows are an online mixture's directions.

    It has no parameters: the encoder's optimiser, gradient clipping, weight decay and a teacher's moving average pass
    it by, and freezing it for the first epoch has nothing to freeze. The student's head ends in this layer. The
    teacher's head ends in its projections (``nn.Identity()`` in place of the last layer), which are what the mixture
    learns from and makes the targets of. In every step :meth:`update` comes first, :meth:`targets` after it.

    DINO's centre, its update and the teacher's temperature have no place beside it: a centre keeps targets from
    agreeing on a few prototypes, and the posterior is balanced over the batch already; how sharp it is, the
    components' variances say.

    Args:
        components: K.
        dim: D, length of a projection.
        rows: the teacher's projections per step, all views and all ranks.
        options: further arguments of `OnlineMixture`, whose defaults are the recommended form.
    """

    def __init__(self, components: int, dim: int, rows: int, **options: Any) -> None:
        super().__init__()
        self.mixture = OnlineMixture(components, dim, rows, **options)

    @property
    def weight(self) -> Tensor:
        """The prototypes ``(K, D)``, unit vectors without a gradient."""
        return self.mixture.directions()

    def forward(self, z: Tensor) -> Tensor:
        """Projections ``(..., D)`` of any length → cosines ``(..., K)``, float32 whatever autocast says.

        To be divided by the student's temperature in the loss, as DINO does it.

        Raises:
            ValueError: projections of another dimension.
        """
        fits(z, self.mixture.mean)
        with torch.autocast(z.device.type, enabled=False):
            return self._unit(z) @ self.weight.T

    @torch.no_grad()
    def update(self, z: Tensor, weight: Tensor | None = None) -> None:
        """One EM update from the teacher's projections ``(..., D)``, each counting ``weight (...)`` times.

        With a process group, from those of all its ranks, of which each passes its own, equally many.

        Raises:
            ValueError: see `OnlineMixture.observe`.
        """
        weight = None if weight is None else gather_rows(weight.flatten(), world())
        self.mixture.observe(gather_rows(self._unit(z).flatten(0, -2), world()), weight)

    def targets(self, z: Tensor) -> SoftmaxTargets:
        """The posterior of the teacher's projections ``(..., D)``, balanced as of the last update.

        For a loss that makes targets where it uses them; ``.dense()`` is the array ``(..., K)``, rows summing to 1.
        """
        return self.mixture.targets(self._unit(z))

    def _unit(self, z: Tensor) -> Tensor:
        return F.normalize(z.to(self.mixture.mean.dtype), dim=-1)

    def extra_repr(self) -> str:
        return f"components={self.mixture.components}, dim={self.mixture.mean.shape[1]}"
