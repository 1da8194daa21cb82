"""CAPI's predictor: tokens of what is visible → what is at places that are hidden.

Darcet et al., *Cluster and Predict Latent Patches for Improved Masked Image Modeling* (2025), Section 3.2; the
arithmetic is that of facebookresearch/capi in its published configuration.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

EPSILON = 1e-5
HIGHEST, LOWEST = 7.0, 7e-4
"""Turns of the fastest and the slowest channels from one side of an image to the other."""


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """Each channel of the first half with its partner in the second, turned by their angle."""
    first, second = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()


def frequencies(channels: int) -> Tensor:
    """``(2, channels)``: radians across the image, of its rows for half of the channels and its columns for the rest.

    As in the released code, the two partners that `turned` mixes thus turn by different angles.
    """
    one = HIGHEST * (HIGHEST / LOWEST) ** torch.linspace(0, -1, channels // 4)
    out = torch.zeros(2, channels)
    out[0, : channels // 2] = out[1, channels // 2 :] = one.repeat(2)
    return out * 2 * math.pi


def edge(count: int) -> Tensor:
    """``(count, 2)``: places around the unit square, at equal distances, in CAPI's order: where registers stand."""
    round_trip = 4 * torch.arange(count) / max(1, count)
    side, along = round_trip.long(), round_trip.frac()
    zero, one = torch.zeros(count), torch.ones(count)
    rows = torch.stack([along, one, 1 - along, zero])
    columns = torch.stack([zero, along, one, 1 - along])
    at = torch.arange(count)
    return torch.stack([rows[side, at], columns[side, at]], 1)


class CrossBlock(nn.Module):
    """Attention of queries to the visible tokens alone, then an MLP; without any bias."""

    def __init__(self, width: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=EPSILON), nn.RMSNorm(width, eps=EPSILON)
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.drop1, self.drop2 = DropPath(drop_path), DropPath(drop_path)

    def forward(self, x: Tensor, seen: Tensor, angle: Tensor, seen_angle: Tensor) -> Tensor:
        """Queries ``(n, Q, d)`` and tokens ``(n, T, d)``, with angles ``(n, 1, ·, d / heads)`` of their places."""
        q, k, v = (
            layer(of).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, of in ((self.q, self.norm1(x)), (self.k, seen), (self.v, seen))
        )
        q, k = turned(q, angle).to(v.dtype), turned(k, seen_angle).to(v.dtype)
        x = x + self.drop1(self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        return x + self.drop2(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class Predictor(nn.Module):
    """A learned token at each place that is asked for, which reads the visible tokens block by block."""

    frequencies: Tensor

    def __init__(self, width: int, heads: int, depth: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, width))  # two dimensions: it decays, as in CAPI's code
        self.blocks = nn.ModuleList(CrossBlock(width, heads, drop_path) for _ in range(depth))
        self.register_buffer("frequencies", frequencies(width // heads), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, seen: Tensor, seen_at: Tensor, at: Tensor) -> Tensor:
        """Tokens ``(n, T, d)`` with their places ``(n, T, 2)``, and places ``(n, Q, 2)`` → ``(n, Q, d)``."""
        x = self.mask_token.expand(len(at), at.shape[1], -1)
        # Not a matrix product, which autocast would round to half precision: angles go up to 44.
        angle, seen_angle = ((p.unsqueeze(-1) * self.frequencies).sum(-2).unsqueeze(1) for p in (at, seen_at))
        for block in self.blocks:
            x = block(x, seen, angle, seen_angle)
        return F.rms_norm(x, x.shape[-1:], eps=EPSILON)
