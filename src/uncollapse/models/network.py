"""Backbone and head as one module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from uncollapse.config.schema import Config
from uncollapse.models.backbones import build_backbone
from uncollapse.models.heads import ProjectionHead


class Encoder(nn.Module):
    """Backbone and projection head in one module, so that data-parallel wrappers see one ``forward``."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, views: list[Tensor]) -> list[Tensor]:
        """Projections of each view; views of one size go through the backbone together.

        As in DINO's multi-crop wrapper, the head sees all views at once, so that batch norm in it (where
        there is any) averages over all of them.
        """
        sizes = [v.shape[-1] for v in views]
        groups = [[i for i, s in enumerate(sizes) if s == size] for size in dict.fromkeys(sizes)]
        parts: list[Tensor] = [views[0]] * len(views)
        for group in groups:
            features = self.backbone(_stack([views[i] for i in group]))
            for i, part in zip(group, features.chunk(len(group)), strict=True):
                parts[i] = part
        return list(self.head(_stack(parts)).chunk(len(views)))


def _stack(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def build_encoder(config: Config, drop_path: bool) -> Encoder:
    """Backbone and head started from the seed alone: equal in every arm and on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone, features = build_backbone(config.backbone, drop_path)
        head = config.head
        return Encoder(backbone, ProjectionHead(features, head.hidden, head.bottleneck, head.layers, head.batch_norm))
