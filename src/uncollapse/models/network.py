"""Backbone and projection heads as one module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from uncollapse.config.facts import bottleneck_of, head_names, hides_patches
from uncollapse.config.methods import CAPI
from uncollapse.config.schema import Config
from uncollapse.errors import ConfigError
from uncollapse.models.backbones import build_backbone
from uncollapse.models.decoder import Predictor, edge
from uncollapse.models.drop_path import keyed
from uncollapse.models.heads import ProjectionHead
from uncollapse.models.tokens import MaskedViT, PatchTokens, has_regions, patches_of, regions, seen_without, tokens


class Projected(NamedTuple):
    """Projections of a batch of views, float32."""

    cls: Tensor
    """``(V, n, D)``: of every view."""
    patch: Tensor | None
    """``(M, D)``: of the patches that were asked for, view by view, image by image; None where none were."""
    patch_mean: Tensor | None
    """``(D,)``: mean over all patches of these views, where it was asked for."""
    features: Tensor
    """``(V, n, d)``: of every view before any head, not yet float32 under autocast."""
    others: dict[str, Tensor] = {}  # noqa: RUF012 - nothing writes to it
    """Head → ``(V, n, D)``: of every view by the further heads over class tokens."""
    region: list[Tensor] | None = None
    """For each view ``(n, T, D)``: of its regions, where there is a head for them; T goes with the view's size."""
    region_features: list[Tensor] | None = None
    """The same before the head, ``(n, T, d)``, without gradient."""


class _Through(NamedTuple):
    """What a backbone makes of views."""

    features: list[Tensor]
    """For each view ``(n, d)``."""
    tokens: list[Tensor]
    """For each view whose tokens were asked for ``(n, T, d)``; the others' are of no use."""
    groups: list[list[int]]
    """Which views went through it together."""


def _share_out(rows: Tensor, group: list[int], views: list[Tensor]) -> None:
    """Puts the rows of a group of views, one behind the other, at their places in ``views``."""
    for i, part in zip(group, rows.chunk(len(group)), strict=True):
        views[i] = part


OF_TOKENS = ("patch", "region")
"""Heads that see tokens or regions; every other sees class tokens, or what takes their place."""


class Encoder(nn.Module):
    """Backbone and projection heads in one module, so that data-parallel wrappers see one ``forward``.

    ``heads`` by name; "cls" is always there, and patches without a head of their own, "patch", share it. "region",
    where there is one, sees the regions of every view; heads of any other name see class tokens as well.
    """

    def __init__(self, backbone: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)
        self.drops = keyed(backbone)  # in the backbone already; a list of modules registers nothing
        self.register_load_state_dict_pre_hook(_names_of_before)

    @property
    def head(self) -> nn.Module:
        """Of class tokens."""
        return self.heads["cls"]

    def head_of(self, level: str) -> nn.Module:
        """A level's own, or the class tokens'."""
        return self.heads[level if level in self.heads else "cls"]

    def forward(
        self,
        views: list[Tensor],
        keys: Tensor | None = None,
        read: Tensor | None = None,
        hide: bool = False,
        mean: bool = False,
        without: Tensor | None = None,
        apart: bool = False,
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
            without: ``(V', n, P)`` bool: patches that the first V' views are seen without, as many of each.
            apart: whether the head, too, sees views of each size on their own, as in MSN's code.
        """
        seen = self._backbone_of(views, keys, read, hide, without)
        stacked = _stack(seen.features)
        features = stacked.unflatten(0, (len(views), -1))
        if apart:
            return Projected(self._each_size(seen), None, None, features)
        by_head = {
            name: head(stacked).unflatten(0, (len(views), -1))
            for name, head in self.heads.items()
            if name not in OF_TOKENS
        }
        cls = by_head.pop("cls")
        if "region" in self.heads:
            return Projected(cls, None, None, features, by_head, *self._of_regions(seen.tokens))
        if read is None:
            return Projected(cls, None, None, features, by_head)
        patches, patch_head = torch.stack(seen.tokens[: len(read)]), self.head_of("patch")
        if not mean:
            return Projected(cls, patch_head(patches[read]), None, features, by_head)
        everything = patch_head(patches.flatten(0, 2)).unflatten(0, read.shape)
        return Projected(cls, everything[read], everything.mean((0, 1, 2)), features, by_head)

    def _backbone_of(
        self, views: list[Tensor], keys: Tensor | None, read: Tensor | None, hide: bool, without: Tensor | None
    ) -> _Through:
        """What the backbone makes of each view, views of one size together; those with a mask apart from others."""
        hidden = read if without is None else without
        masked = 0 if hidden is None else len(hidden)
        groups: dict[tuple[int, bool], list[int]] = {}
        for i, view in enumerate(views):
            groups.setdefault((view.shape[-1], i < masked), []).append(i)
        through = _Through([views[0]] * len(views), [views[0]] * len(views), list(groups.values()))
        for group in through.groups:
            for drop in self.drops:
                drop.keys = None if keys is None else keys[group].flatten()
            stacked, tokens = _stack([views[i] for i in group]), None
            if "region" in self.heads:
                features, tokens = regions(self.backbone, stacked)
            elif without is not None and group[0] < masked:
                features = seen_without(self.backbone, stacked, without[group].flatten(0, 1))
            elif read is None or group[0] >= masked:
                features = self.backbone(stacked)
            else:
                mask = read[group].flatten(0, 1)
                features, tokens = self._backbone_tokens(stacked, mask if hide else None)
            _share_out(features, group, through.features)
            if tokens is not None:
                _share_out(tokens, group, through.tokens)
        return through

    def _each_size(self, seen: _Through) -> Tensor:
        """``(V, n, D)``, with the head called once for each group of views."""
        z = list(seen.features)
        for group in seen.groups:
            _share_out(self.head(_stack([seen.features[i] for i in group])), group, z)
        return torch.stack(z)

    def _of_regions(self, places: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Projections of the regions ``(n, T, d)`` of each view, by one call of their head; and the regions."""
        z = self.heads["region"](torch.cat([p.flatten(0, 1) for p in places]))
        rows = z.split([p.shape[:2].numel() for p in places])
        projected = [r.unflatten(0, p.shape[:2]) for r, p in zip(rows, places, strict=True)]
        return projected, [p.detach().float() for p in places]

    def _backbone_tokens(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        backbone: Any = self.backbone
        out: tuple[Tensor, Tensor] = backbone.tokens(x, mask)
        return out


class PredictingEncoder(Encoder):
    """A vision transformer that sees only visible patches, with a `Predictor` of the hidden ones and a head.

    Features are the transformer's own; the teacher's predictor only follows the student's.
    """

    def __init__(self, vit: Any, head: nn.Module, depth: int, drop_path: float) -> None:
        super().__init__(vit, {"cls": head})
        self.predictor = Predictor(vit.embed_dim, vit.blocks[0].attn.num_heads, depth, drop_path)
        self.drops += keyed(self.predictor, len(self.drops))

    def forward(  # type: ignore[override]
        self, views: list[Tensor], keys: Tensor | None = None, hidden: Tensor | None = None, read: Tensor | None = None
    ) -> Tensor:
        """Projections ``(M, D)`` of what is predicted at the patches ``read``, view by view, image by image.

        Args:
            views: ``(n, 3, S, S)`` each, of one size.
            keys: ``(V, n)`` of `row_keys`, where there is stochastic depth.
            hidden: ``(V, n, P)`` bool, as many in each view. read: the same, among these. None for both: projections
                ``(V n, P, D)`` of all patches, with nothing hidden.
        """
        x = torch.cat(views)
        for drop in self.drops:
            drop.keys = None if keys is None else keys.flatten()
        if hidden is None or read is None:
            everything: Tensor = self.head(PatchTokens(self.backbone)(x))
            return everything
        hidden, read = hidden.flatten(0, 1), read.flatten(0, 1)
        seen = tokens(self.backbone, x, hidden)[0]
        side = math.isqrt(hidden.shape[1])
        line = torch.linspace(0, 1, side, device=x.device)
        places = torch.cartesian_prod(line, line).expand(len(x), -1, -1)
        visible, at = (places[mask].unflatten(0, (len(x), -1)) for mask in (~hidden, read))
        # Whatever comes before the patches stands around what is visible.
        low, high = visible.amin(1, keepdim=True), visible.amax(1, keepdim=True)
        around = low + edge(seen.shape[1] - visible.shape[1]).to(x.device) * (high - low)
        predicted = self.predictor(seen, torch.cat([around, visible], 1), at)
        z: Tensor = self.head(predicted.flatten(0, 1))
        return z


def _names_of_before(module: nn.Module, state: dict[str, Any], prefix: str, *rest: object) -> None:
    """Checkpoints of before had one head, named so."""
    for name in [name for name in state if name.startswith(f"{prefix}head.")]:
        state[f"{prefix}heads.cls.{name.removeprefix(f'{prefix}head.')}"] = state.pop(name)


def _stack(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def build_encoder(config: Config, drop_path: bool) -> Encoder:
    """Backbone and heads started from the seed alone: equal in every arm and on every rank.

    Raises:
        ConfigError: a backbone that cannot be built, or one without the tokens that the method needs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone, features = build_backbone(config.backbone, drop_path)
        heads = {name: _head(config, features, name) for name in head_names(config)}
        if "region" in heads and not has_regions(backbone):
            raise ConfigError(
                f"backbone.name: {config.backbone.name} gives no regions, which {config.method.name} needs; "
                "take a swin_*, a resnet* or a vit_*"
            )
        if isinstance(config.method, CAPI):
            patches_of(backbone, config.views.global_size)
            rate = config.backbone.drop_path if drop_path else 0.0
            return PredictingEncoder(backbone, heads["cls"], config.method.decoder_depth, rate)
        if hides_patches(config):
            patches_of(backbone, config.views.global_size)  # refuses what has no patches to hide
            backbone = MaskedViT(backbone)  # type: ignore[arg-type]
        elif config.method.name == "msn" and config.method.drop:
            patches_of(backbone, config.views.global_size)
        return Encoder(backbone, heads)


def _head(config: Config, features: int, level: str) -> ProjectionHead:
    c = config.head
    if not c.layers and c.bottleneck != features:
        raise ConfigError(
            f"head.bottleneck: must be {features}, the length of the encoder's features, since head.layers is 0; "
            f"got {c.bottleneck}"
        )
    return ProjectionHead(
        features, c.hidden, bottleneck_of(config, level), c.layers, c.batch_norm, c.normalise, c.activation
    )
