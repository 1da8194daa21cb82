"""CAPI's encoder, which no library has: rotary positions from learned frequencies, registers along the edge.

Darcet et al., *Cluster and Predict Latent Patches for Improved Masked Image Modeling* (2025); the arithmetic is that
of facebookresearch/capi in its published configuration (RMSNorm with ε = 1e-5, a last norm without weights, registers
placed around the image), which are the parts that a checkpoint does not state.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uncollapse.checkpoints.backbone import Backbone, count_of, load
from uncollapse.errors import InputError

EPSILON = 1e-5


class _Block(nn.Module):
    def __init__(self, width: int, head: int, hidden: int, biased: Mapping[str, bool]) -> None:
        super().__init__()
        self.head = head
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=EPSILON), nn.RMSNorm(width, eps=EPSILON)
        self.q_proj = nn.Linear(width, width, bias=biased["q_proj"])
        self.k_proj = nn.Linear(width, width, bias=biased["k_proj"])
        self.v_proj = nn.Linear(width, width, bias=biased["v_proj"])
        self.proj = nn.Linear(width, width, bias=biased["proj"])
        self.freqs = nn.Parameter(torch.empty(2, head))
        self.fc1 = nn.Linear(width, hidden, bias=biased["fc1"])
        self.fc2 = nn.Linear(hidden, width, bias=biased["fc2"])

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """Tokens (n, T, d) and their places (T, 2) in the unit square."""
        y = self.norm1(x)
        q, k, v = (p(y).unflatten(2, (-1, self.head)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        angle = places @ self.freqs
        q, k = (_turned(t, angle) for t in (q, k))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    """Each channel of the first half with its partner in the second, turned by their angle."""
    first, second = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()


class CapiEncoder(nn.Module):
    """Images (n, 3, H, W) → normalised patch tokens (n, T, d)."""

    def __init__(self, width: int, patch: int, registers: int, blocks: list[_Block]) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.registers = nn.Parameter(torch.empty(1, registers, width))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        rows, columns = (torch.linspace(0, 1, n, device=x.device) for n in x.shape[2:])
        count = self.registers.shape[1]
        places = torch.cat([_edge(count).to(x.device), torch.cartesian_prod(rows, columns)])
        x = torch.cat([self.registers.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
        for block in self.blocks:
            x = block(x, places)
        return F.rms_norm(x, x.shape[-1:], eps=EPSILON)[:, count:]


def _edge(count: int) -> Tensor:
    """(count, 2): places around the unit square, a quarter of them along each side, in CAPI's order."""
    side = count // 4
    along = torch.arange(side) / max(1, side)
    zero, one = torch.zeros(side), torch.ones(side)
    sides = [(along, zero), (one, along), (1 - along, one), (zero, 1 - along)]
    return torch.cat([torch.stack(pair, 1) for pair in sides])


class _Mean(nn.Module):
    """Mean patch token: for the health of the encoder. CAPI has no token for the image."""

    def __init__(self, encoder: CapiEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x).mean(1)


def capi_backbone(weights: Mapping[str, Tensor], where: str) -> Backbone:
    """The encoder part of a CAPI network, from weights named as its code names them.

    Raises:
        InputError: a part that was not understood.
    """
    width, _, patch, _ = weights["patch_embed.weight"].shape
    ours: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.startswith(("decoder.", "mask_token")):
            continue  # predicts masked patches; the teacher has none to predict
        name = re.sub(r"^encoder\.(blocks\.\d+)\.residual([12])\.norm\.", r"\1.norm\2.", name)
        name = re.sub(r"^encoder\.(blocks\.\d+)\.residual[12]\.fn\.(rope\.)?", r"\1.", name)
        ours[name] = tensor
    depth = count_of(ours, r"blocks\.(\d+)\.")
    frequencies, hidden, registers = (ours.get(n) for n in ("blocks.0.freqs", "blocks.0.fc1.weight", "registers"))
    if frequencies is None or hidden is None or registers is None or width % max(1, frequencies.shape[-1]):
        raise InputError(f"{where}: CAPI's encoder was not understood (no rotary frequencies, registers or MLP)")
    if registers.shape[1] % 4:
        raise InputError(f"{where}: {registers.shape[1]} registers, which CAPI's code cannot place around the image")
    layers = ("q_proj", "k_proj", "v_proj", "proj", "fc1", "fc2")
    biased = {layer: f"blocks.0.{layer}.bias" in ours for layer in layers}
    blocks = [_Block(width, frequencies.shape[-1], len(hidden), biased) for _ in range(depth)]
    encoder = CapiEncoder(width, patch, registers.shape[1], blocks)
    load(encoder, ours, where, "CAPI encoder")
    described = f"CAPI encoder, {depth} blocks of width {width}, patch {patch}"
    return Backbone(_Mean(encoder), width, 16 * patch, described, encoder)
