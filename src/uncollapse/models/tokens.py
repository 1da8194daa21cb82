"""Class and patch tokens of a backbone, with some patches hidden: the one reader of tokens in training."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from uncollapse.errors import ConfigError


def patches_of(backbone: nn.Module, size: int) -> int:
    """How many patches a view of ``size`` pixels has.

    Raises:
        ConfigError: a backbone without patch tokens, or a size that its patches do not divide.
    """
    side = _patch_side(backbone)
    if size % side:
        raise ConfigError(f"views.global_size: {size} pixels do not divide into patches of {side}")
    return (size // side) ** 2


def _patch_side(backbone: nn.Module) -> int:
    vit: Any = plain(backbone)
    if not isinstance(vit, VisionTransformer):
        raise ConfigError(f"backbone.name: {type(backbone).__name__} has no patch tokens to hide; take a vit_*")
    side: Any = vit.patch_embed.patch_size
    return int(side[0])


def plain(backbone: nn.Module) -> nn.Module:
    """The transformer itself, without what hides patches around it; any other backbone as it is."""
    return backbone.vit if isinstance(backbone, MaskedViT) else backbone


class MaskedViT(nn.Module):
    """A timm vision transformer that also gives patch tokens, and takes patches from view behind a learned token.

    The mask token stands in for the embedding of a hidden patch before positions are added (Bao et al. 2022; Zhou et
    al. 2022, Section 3.1).
    """

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit
        self.mask_token = nn.Parameter(torch.zeros(1, vit.embed_dim))  # two dimensions: it decays, as in iBOT's code

    def forward(self, x: Tensor) -> Tensor:
        """``(n, 3, S, S)`` → the feature vector ``(n, d)``, as the transformer itself gives it."""
        out: Tensor = self.vit(x)
        return out

    def tokens(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Feature vectors ``(n, d)`` and patch tokens ``(n, P, d)``; ``mask (n, P)`` bool hides patches."""
        vit: Any = self.vit
        x = vit.patch_embed(x)  # (n, rows, columns, d) where sizes may vary, else (n, P, d)
        if mask is not None:
            x = torch.where(mask.view(*x.shape[:-1], 1), self.mask_token.to(x.dtype), x)
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(x)))
        x = vit.norm(vit.blocks(x))
        features: Tensor = vit.forward_head(x, pre_logits=True)
        return features, x[:, vit.num_prefix_tokens :]
