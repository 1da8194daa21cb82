"""Backbone and projection heads as one module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from uncollapse.config.schema import Config
from uncollapse.models.backbones import build_backbone
from uncollapse.models.drop_path import keyed
from uncollapse.models.heads import ProjectionHead
from uncollapse.models.tokens import MaskedViT, patches_of


class Projected(NamedTuple):
    """Projections of a batch of views, float32."""

    cls: Tensor
    """``(V, n, D)``: of every view."""
    patch: Tensor | None
    """``(M, D)``: of the patches that were asked for, view by view, image by image; None where none were."""
    patch_mean: Tensor | None
    """``(D,)``: mean over all patches of these views, where it was asked for."""


class Encoder(nn.Module):
    """Backbone and projection heads in one module, so that data-parallel wrappers see one ``forward``.

    ``heads`` by name; "cls", which class and patch tokens share, is always there.
    """

    def __init__(self, backbone: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)
        self.drops = keyed(backbone)  # in the backbone already; a list of modules registers nothing
        self.register_load_state_dict_pre_hook(_names_of_before)

    @property
    def head(self) -> nn.Module:
        """Of class and patch tokens."""
        return self.heads["cls"]

    def forward(
        self,
        views: list[Tensor],
        keys: Tensor | None = None,
        read: Tensor | None = None,
        hide: bool = False,
        mean: bool = False,
    ) -> Projected:
        """Projections of each view; views of one size go through the backbone together.

        As in DINO's multi-crop wrapper, a head sees all views at once, so that batch norm in it (where
        there is any) averages over all of them.

        Args:
            views: ``(n, 3, S, S)`` each.
            keys: ``(V, n)`` of `row_keys`, where the backbone has stochastic depth.
            read: ``(V', n, P)`` bool: which patches of the first V' views to project.
            hide: whether these patches are hidden from the backbone.
            mean: whether the mean projection of *all* patches of these views is wanted.
        """
        groups: dict[int, list[int]] = {}
        for i, view in enumerate(views):
            groups.setdefault(view.shape[-1], []).append(i)
        parts: list[Tensor] = [views[0]] * len(views)
        patches: list[Tensor | None] = [None] * len(views)
        for group in groups.values():
            for drop in self.drops:
                drop.keys = None if keys is None else keys[group].flatten()
            stacked = _stack([views[i] for i in group])
            if read is None or group[0] >= len(read):
                features = self.backbone(stacked)
            else:
                mask = read[group].flatten(0, 1)
                features, tokens = self._backbone_tokens(stacked, mask if hide else None)
                for i, part in zip(group, tokens.chunk(len(group)), strict=True):
                    patches[i] = part
            for i, part in zip(group, features.chunk(len(group)), strict=True):
                parts[i] = part
        cls = self.head(_stack(parts)).unflatten(0, (len(views), -1))
        if read is None:
            return Projected(cls, None, None)
        seen = torch.stack([t for t in patches if t is not None])
        if not mean:
            return Projected(cls, self.head(seen[read]), None)
        everything = self.head(seen.flatten(0, 2)).unflatten(0, read.shape)
        return Projected(cls, everything[read], everything.mean((0, 1, 2)))

    def _backbone_tokens(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        backbone: Any = self.backbone
        out: tuple[Tensor, Tensor] = backbone.tokens(x, mask)
        return out


def _names_of_before(module: nn.Module, state: dict[str, Any], prefix: str, *rest: object) -> None:
    """Checkpoints of before had one head, named so."""
    for name in [name for name in state if name.startswith(f"{prefix}head.")]:
        state[f"{prefix}heads.cls.{name.removeprefix(f'{prefix}head.')}"] = state.pop(name)


def _stack(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def build_encoder(config: Config, drop_path: bool) -> Encoder:
    """Backbone and heads started from the seed alone: equal in every arm and on every rank.

    Raises:
        ConfigError: a backbone that cannot be built, or one without patch tokens where the method needs them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone, features = build_backbone(config.backbone, drop_path)
        c = config.head
        head = ProjectionHead(features, c.hidden, c.bottleneck, c.layers, c.batch_norm, c.normalise, c.activation)
        if config.method.name == "ibot":
            patches_of(backbone, config.views.global_size)  # refuses what has no patches to hide
            backbone = MaskedViT(backbone)  # type: ignore[arg-type]
        return Encoder(backbone, {"cls": head})
