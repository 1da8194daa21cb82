"""Class and patch tokens and regions of a backbone: the one reader of them, in training, from checkpoints and in
evaluation.

``vit`` is a transformer as timm builds them; all tokens are those after its final norm.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from uncollapse.errors import ConfigError

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


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
    from timm.models.vision_transformer import VisionTransformer  # late: reading a checkpoint needs none of it

    vit: Any = plain(backbone)
    if not isinstance(vit, VisionTransformer):
        raise ConfigError(f"backbone.name: {type(backbone).__name__} has no patch tokens to hide; take a vit_*")
    side: Any = vit.patch_embed.feat_ratio(as_scalar=False)  # in pixels, behind a convolutional stem too
    return int(side[0])


def plain(backbone: nn.Module) -> nn.Module:
    """The transformer itself, without what hides patches around it; any other backbone as it is."""
    return backbone.vit if isinstance(backbone, MaskedViT) else backbone


def is_vit(module: nn.Module) -> bool:
    """Whether a module is a plain vision transformer as timm builds them (ViT, DeiT, BEiT, EVA, DINOv3)."""
    named = ("blocks", "patch_embed", "norm", "forward_intermediates", "forward_head", "num_prefix_tokens")
    if not all(hasattr(module, n) for n in named) or not hasattr(module.blocks[0], "attn"):  # type: ignore[index]
        return False
    return "return_prefix_tokens" in inspect.signature(module.forward_intermediates).parameters  # type: ignore[arg-type]


def tokens(vit: Any, x: Tensor, mask: Tensor | None = None, stand_in: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All tokens of images ``(n, 3, S, S)``, and the patches' alone: ``(n, p + T, d)`` and ``(n, T, d)``.

    Args:
        mask: ``(n, T)`` bool; of these patches of a `VisionTransformer`, ``stand_in (d,)`` takes the embedding's place.
            Without it, they are left out: T is then the number of the others, the same for every image.
    """
    if mask is None:
        x = vit.forward_features(x)
        if x.ndim == 4:  # nothing but patches
            x = _in_a_row(vit, x)
            return x, x
    else:
        x = vit.patch_embed(x)  # (n, rows, columns, d) where sizes may vary, else (n, T, d)
        if stand_in is not None:
            x = torch.where(mask.view(*x.shape[:-1], 1), stand_in.to(x.dtype), x)
        x = vit._pos_embed(x)
        x = _without(x, mask, vit.num_prefix_tokens) if stand_in is None else x
        x = vit.norm(vit.blocks(vit.norm_pre(vit.patch_drop(x))))
    return x, x[:, vit.num_prefix_tokens :]


def regions(backbone: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Feature vectors ``(n, d)`` of images, as the backbone gives them, and their regions ``(n, T, d)``.

    Regions are what the feature is made of: places of the last map of a CNN or a Swin transformer, patches of a ViT.
    """
    model: Any = plain(backbone)
    last = model.forward_features(x)
    places = _in_a_row(model, last) if last.ndim == 4 else last[:, model.num_prefix_tokens :]
    return model.forward_head(last, pre_logits=True), places


def has_regions(backbone: nn.Module) -> bool:
    """Whether `regions` can read it."""
    return hasattr(plain(backbone), "forward_features") and hasattr(plain(backbone), "forward_head")


def _in_a_row(model: nn.Module, map_: Tensor) -> Tensor:
    """The places of a map as tokens (n, T, d); its channels come last in Swin, second in a CNN."""
    return map_.flatten(1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else map_.flatten(2).transpose(1, 2)


def _without(x: Tensor, mask: Tensor, prefix: int) -> Tensor:
    """Tokens ``(n, prefix + T, d)`` without the patches of ``mask (n, T)``."""
    left = (~mask).sum(1)
    if not bool((left == left[0]).all()):
        raise ValueError("every image must be left with as many patches as the others")
    kept = x[:, prefix:][~mask].view(len(x), -1, x.shape[-1])
    return torch.cat([x[:, :prefix], kept], 1)


def seen_without(vit: Any, x: Tensor, mask: Tensor) -> Tensor:
    """Feature vectors ``(n, d)`` of images whose patches in ``mask (n, T)`` are left out (MSN)."""
    features: Tensor = vit.forward_head(tokens(vit, x, mask)[0], pre_logits=True)
    return features


def last_blocks(vit: Any, x: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    """Feature ``(n, d)`` and patch tokens ``(n, T, d)`` of the last ``count`` blocks of an `is_vit`, the last one last.

    The feature is the class token, or, without one, what the model's own classifier would see.
    """
    blocks = vit.forward_intermediates(
        x, indices=count, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
    )
    split = [block if isinstance(block, tuple) else (block, None) for block in blocks]
    return [(_feature(vit, patches, prefix), patches) for patches, prefix in split]


def _feature(vit: Any, patches: Tensor, prefix: Tensor | None) -> Tensor:
    if prefix is not None and getattr(vit, "global_pool", "token") == "token":
        fc_norm = getattr(vit, "fc_norm", None)
        return prefix[:, 0] if fc_norm is None else fc_norm(prefix[:, 0])
    pooled: Tensor = vit.forward_head(patches if prefix is None else torch.cat([prefix, patches], 1), pre_logits=True)
    return pooled


class ClassToken(nn.Module):
    """A timm vision transformer as images → class token."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, x: Tensor) -> Tensor:
        return tokens(self.vit, x)[0][:, 0]


class PatchTokens(nn.Module):
    """A timm transformer as images → patch tokens (n, T, d), class token and registers left out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return tokens(self.model, x)[1]


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
        everything, patches = tokens(self.vit, x, mask, self.mask_token)
        features: Tensor = self.vit.forward_head(everything, pre_logits=True)
        return features, patches
