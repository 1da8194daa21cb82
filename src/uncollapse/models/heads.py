"""Projection head: backbone features to projections on the unit sphere."""

from __future__ import annotations

import itertools
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """MLP to a bottleneck, then L2 normalisation; DINO's head without its prototypes.

    ``layers`` linear layers with ``activation`` (and batch norm where asked) between them; weights start from a
    normal distribution of standard deviation 0.02 truncated at ±2, biases at zero (Caron et al., *Emerging
    Properties in Self-Supervised Vision Transformers*, 2021, and its released code). With no layers, features are
    projections as they are (CAPI).

    Shapes: ``(n, features)`` → ``(n, bottleneck)``, float32, unit norm unless ``normalise`` is false (CARP).
    """

    def __init__(
        self,
        features: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        batch_norm: bool = False,
        normalise: bool = True,
        activation: Literal["gelu", "relu"] = "gelu",
    ) -> None:
        super().__init__()
        self.normalise = normalise
        widths = [features, *[hidden] * (layers - 1), bottleneck] if layers else [features]
        modules: list[nn.Module] = []
        for i, (wide, narrow) in enumerate(itertools.pairwise(widths)):
            linear = nn.Linear(wide, narrow)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            modules.append(linear)
            if i < layers - 1:
                if batch_norm:
                    modules.append(nn.BatchNorm1d(narrow))
                modules.append(nn.GELU() if activation == "gelu" else nn.ReLU())
        self.mlp = nn.Sequential(*modules)

    def forward(self, features: Tensor) -> Tensor:
        # fp32 from here on: cosines near 1 are what collapse is measured by, and bf16 cannot hold them.
        z: Tensor = self.mlp(features).float()
        return F.normalize(z, dim=-1) if self.normalise else z
