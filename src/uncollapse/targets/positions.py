"""Assignments that are balanced at each patch position on its own, as in CAPI."""

from __future__ import annotations

import torch
from torch import Tensor

from uncollapse.distributed import Group
from uncollapse.targets.sinkhorn import sinkhorn_offsets
from uncollapse.targets.softmax import SoftmaxTargets


def sinkhorn_by_position(
    z: Tensor,
    weight: Tensor,
    temperature: float,
    iterations: int = 3,
    bias: Tensor | None = None,
    group: Group = None,
    marginal: Tensor | None = None,
) -> Tensor:
    """`sinkhorn_offsets` of the images at each of P positions: ``(P, n, D)`` → ``(P, K)``.

    Darcet et al. (2025), Section 3.1: prototypes are balanced over images, never over places, so that none can stand
    for a place in the image. The released code adds 1e-8 to the masses it divides by, which is nothing beside them.

    Raises:
        ValueError: as `sinkhorn_offsets`.
    """
    return torch.stack(
        [sinkhorn_offsets(rows, weight, temperature, iterations, bias, group, marginal=marginal) for rows in z]
    )


def at_positions(
    z: Tensor, position: Tensor, weight: Tensor, temperature: float, bias: Tensor | None, offsets: Tensor
) -> SoftmaxTargets:
    """Targets ``softmax(z · w_k / temperature + bias_k + offsets_pk)`` of rows at the positions p.

    A row's position enters as P further numbers, one of them 1, and the offsets as as many of each prototype.

    Args:
        z: ``(M, D)``. position: ``(M,)`` int64. weight: ``(K, D)``. bias: ``(K,)``. offsets: ``(P, K)``.
    """
    place = z.new_zeros(len(z), len(offsets)).scatter_(1, position.unsqueeze(1), 1)
    wider = torch.cat([weight, offsets.T.to(weight) * temperature], dim=1)
    return SoftmaxTargets(torch.cat([z, place], dim=1), wider, temperature, bias)
