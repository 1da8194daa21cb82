"""Stochastic depth whose coins are keyed: the same for an image's view in any process, batch part or resumed run."""

from __future__ import annotations

import torch
from timm.layers import DropPath
from torch import Tensor, nn

_MASK = (1 << 63) - 1


def row_keys(seed: int, step: int, positions: Tensor, views: int) -> Tensor:
    """``(views, n)`` int64 keys of the images at ``positions (n,)`` of the whole batch of ``step``."""
    view = torch.arange(views, device=positions.device)[:, None]
    key = _mixed(torch.full_like(view, seed & _MASK) ^ _mixed(torch.full_like(view, step & _MASK)))
    return _mixed(_mixed(key + view) + positions[None])


def token_keys(keys: Tensor, mask: Tensor) -> Tensor:
    """``(M,)`` int64 in no order, one for each True of ``mask (V, n, P)``, from the `row_keys` of the first V views."""
    of_view = _mixed(keys[: len(mask)] ^ 0x5851F42D4C957F2D)  # other coins than stochastic depth's
    return _mixed(of_view[:, :, None] + torch.arange(mask.shape[2], device=keys.device))[mask]


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 64 bits whose output looks random (the finaliser of SplitMix64; Steele et al. 2014)."""
    x = x + -7046029254386353131
    x = (x ^ _shifted(x, 30)) * -4658895280553007687
    x = (x ^ _shifted(x, 27)) * -7723592293110705685
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift right: torch's repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class KeyedDropPath(nn.Module):
    """Drops a residual branch for some rows, as `timm.layers.DropPath`, by the rows' keys and its own number."""

    def __init__(self, probability: float, number: int) -> None:
        super().__init__()
        self.probability, self.number = probability, number
        self.keys: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.probability:
            return x
        if self.keys is None or len(self.keys) != len(x):
            raise RuntimeError(f"stochastic depth needs a key for each of {len(x)} rows: pass keys to the encoder")
        uniform = (_mixed(self.keys + self.number * 0x9E3779B9) >> 11 & ((1 << 53) - 1)).double() / (1 << 53)
        keep = (uniform >= self.probability).to(x.dtype) / (1 - self.probability)
        return x * keep.view(-1, *[1] * (x.ndim - 1))


def keyed(module: nn.Module, first: int = 0) -> list[KeyedDropPath]:
    """Puts a `KeyedDropPath` in the place of every timm `DropPath` of ``module``; returns them, numbered on."""
    made: list[KeyedDropPath] = []
    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, DropPath):
                new = KeyedDropPath(float(child.drop_prob or 0.0), first + len(made))
                setattr(parent, name, new)
                made.append(new)
    return made
