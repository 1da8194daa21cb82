"""Regularisers that keep vectors apart, on prototypes or on features: rivals of KoLeo-Proto."""

from __future__ import annotations

import torch
from torch import Tensor

from uncollapse.losses.koleo import koleo_proto


def koleo_features(features: Tensor, images: int | None = None) -> Tensor:
    """KoLeo on the features of a batch (Sablayrolles et al. 2019, Section 3), as DINOv2 has it (Oquab et al. 2024).

    ``-mean_i log min_{j≠i} ||f̄_i - f̄_j||`` with ``f̄`` the normalised features; :func:`koleo_proto` on rows that are
    images. The gradient goes through both ends of every pair.

    Args:
        features: ``(n, d)`` floating, n ≥ 2, one row per image: views of one image must not be among them.
        images: features are compared within so many rows that follow one another, such as those of one GPU in the
            released code; None: all with all. The mean is over all rows; a last row on its own counts 0.

    Returns:
        Scalar, float32 (float64 for float64 features).

    Raises:
        ValueError: fewer than two rows, or a row that is infinite.
    """
    n = len(features)
    groups = [group for group in features.split(images or max(1, n)) if len(group) > 1 or n == 1]
    return torch.stack([koleo_proto(group) * (len(group) / n) for group in groups]).sum()
