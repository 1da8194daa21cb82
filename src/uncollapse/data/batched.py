"""Views of a whole batch at once, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from uncollapse.data.images import MemoryImages
from uncollapse.data.views import (
    CONTRAST,
    GREY,
    HUE,
    SATURATION,
    SOLARISE,
    ViewParams,
    ViewSpec,
    blur_radius,
    eval_shorter_side,
    sample_params,
    uniforms,
)
from uncollapse.numerics import NEAR, blocks, rows_at_once


def _resample(line: Tensor, size: int, extent: int) -> Tensor:
    """Matrices (n, size, extent) that resize a part of a line of ``extent`` pixels.

    ``line``: int64 (5, n) of start, length, resized length, offset and flip. Pixels [start, start + length)
    become ``resized`` pixels, of which [offset, offset + size) are made, mirrored where ``flip`` is 1. The
    kernel is Pillow's bicubic (a = -1/2), widened when shrinking; it sees nothing outside the crop.
    """
    device = line.device
    start, length, resized, offset, flip = line
    out = torch.arange(size, device=device, dtype=torch.float32)
    out = torch.where(flip[:, None] > 0, size - 1 - out, out) + (offset.float() + 0.5)[:, None]
    scale = (length.float() / resized.float())[:, None]
    stretch = scale.clamp(min=1)
    pixel = torch.arange(extent, device=device)
    inside = (pixel >= start[:, None]) & (pixel < (start + length)[:, None])
    # Pixels outside the crop are moved out of the kernel's reach, which is cheaper than a full-size mask.
    pixels = torch.where(inside, pixel / stretch, 1e6)
    centre = (start[:, None] + out * scale - 0.5) / stretch
    # With v = max(2 - t, 0), w = v - 1 and u = max(w, 0), both pieces of the kernel of distance t at once are
    # wv²/2 + u²(1 - 2u); the factor of two goes into the normalisation.
    v = (pixels[:, None, :] - centre[:, :, None]).abs_().neg_().add_(2).clamp_(min=0)
    w = v - 1
    u = w.clamp(min=0)
    weight = w.mul_(v).mul_(v).addcmul_(u * u, u.mul_(-2).add_(1), value=2)
    return weight.div_(weight.sum(-1, keepdim=True))


def _resized(canvas: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ image @ columnsᵀ for uint8 (n, 3, H, W): float32 (n, 3, S, S), whole numbers in 0..255.

    Columns come first and are rounded and clipped, as in Pillow: bicubic weights overshoot at edges.
    """
    n, _, height, width = canvas.shape
    size = rows.shape[1]
    x = torch.bmm(canvas.float().view(n, 3 * height, width), columns.transpose(1, 2)).round_().clamp_(0, 255)
    # (n, H, 3S) lets one product per image do all channels.
    x = torch.bmm(rows, x.view(n, 3, height, size).permute(0, 2, 1, 3).reshape(n, height, 3 * size))
    return x.view(n, size, 3, size).permute(0, 2, 1, 3).contiguous().round_().clamp_(0, 255)


def _grey(x: Tensor) -> Tensor:
    return (x[:, 0:1] * GREY[0]).add_(x[:, 1:2], alpha=GREY[1]).add_(x[:, 2:3], alpha=GREY[2])


def _shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue of (n, 3, S, S) in 0..1 by ``turns`` (n, 1, 1, 1), as in HSV."""
    r, g, b = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    high = torch.maximum(r, g).maximum(b)
    chroma = high - torch.minimum(r, g).minimum(b)
    # Which channel is the highest (the first one where several are), as 0 or 1; much faster than torch.where.
    not_r, not_g = (high - r).sign_(), (high - g).sign_()
    is_r, is_g, is_b = 1 - not_r, not_r * (1 - not_g), not_r * not_g
    hue = (g - b).mul_(is_r).addcmul_(b - r, is_g).addcmul_(r - g, is_b).div_(chroma.clamp(min=1e-12))
    hue.add_(is_g, alpha=2).add_(is_b, alpha=4).add_(turns * 6)
    hue.sub_((hue / 6).floor_().mul_(6))  # in sixths of a turn, 0..6
    # Share of the chroma that each channel lies below the highest: a trapezium around its own hue.
    below = torch.cat([2 - (hue - 3).abs_(), (hue - 2).abs_().sub_(1), (hue - 4).abs_().sub_(1)], dim=1)
    return below.clamp_(0, 1).mul_(chroma).neg_().add_(high)


def _jitter(x: Tensor, order: Tensor, factors: Tensor, strength: Sequence[float]) -> Tensor:
    """Brightness, contrast, saturation and hue of (n, 3, S, S) in 0..1, each image in its own order."""
    shape, pixels = x.shape, x.shape[-2] * x.shape[-1]
    # Blending with black (brightness), the mean of grey (contrast) or grey (saturation), r·x + (1 - r)·base,
    # is a 3×3 matrix and a shift of the colours of an image, so that one product does any mixture of them.
    grey = torch.tensor(GREY)
    ratio = torch.where(order == HUE, 1.0, factors.gather(1, order))[..., None, None]
    to_grey = (1 - ratio) * grey.expand(3, 3)
    matrix = (ratio * torch.eye(3) + to_grey * (order == SATURATION)[..., None, None]).to(x.device)
    to_mean = (to_grey * (order == CONTRAST)[..., None, None]).to(x.device)
    turns = factors[:, HUE].to(x.device).view(-1, 1, 1, 1)
    for slot in range(4):
        if any(strength[:HUE]):
            flat = x.view(-1, 3, pixels)
            shift = torch.bmm(to_mean[:, slot], flat.mean(2, keepdim=True))
            x = torch.baddbmm(shift, matrix[:, slot], flat).clamp_(0, 1).view(shape)
        rows = (order[:, slot] == HUE).nonzero()[:, 0].to(x.device)
        if strength[HUE] > 0 and len(rows):
            x[rows] = _shift_hue(x[rows], turns[rows])
    return x


@lru_cache(maxsize=8)
def _reflections(size: int, reach: int) -> Tensor:
    """(reach + 1, size²): how often pixel i sees pixel j at distance 0 .. reach, reflections included."""
    offset, at = torch.arange(-reach, reach + 1), torch.arange(size)
    seen = at[:, None] + offset
    seen = size - 1 - (size - 1 - seen.abs()).abs()
    flat = offset.abs() * size**2 + at[:, None] * size + seen
    return torch.bincount(flat.flatten(), minlength=(reach + 1) * size**2).float().view(reach + 1, size**2)


def _blur(x: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Gaussian blur of (n, 3, S, S), one ``sigma`` ≤ ``largest`` per image, as a pair of matrix products."""
    n, _, size, _ = x.shape
    distance = torch.arange(blur_radius(largest, size) + 1)
    radius = torch.tensor([blur_radius(s, size) for s in sigma.tolist()])
    kernel = torch.exp(-0.5 * (distance / sigma[:, None]).square()) * (distance <= radius[:, None])
    kernel = kernel / (2 * kernel.sum(1, keepdim=True) - 1)  # both sides; the centre, 1, counts once
    matrix = (kernel.to(x.device) @ _reflections(size, len(distance) - 1).to(x.device)).view(n, size, size)
    across = torch.bmm(x.view(n, 3 * size, size), matrix.transpose(1, 2)).view(n, 3, size, size)
    return torch.matmul(matrix[:, None], across)


def normalised(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    shift = torch.tensor(mean, device=x.device).view(3, 1, 1)
    return x.sub_(shift).div_(torch.tensor(std, device=x.device).view(3, 1, 1))


def _chunks(n: int, canvas: Tensor, size: int) -> list[slice]:
    rows = rows_at_once(size * max(size, *canvas.shape[-2:]), 4 * NEAR, 1, canvas.device)  # of an image's matrices
    return blocks(n, rows)


@torch.no_grad()
def apply_batch(canvas: Tensor, params: ViewParams, spec: ViewSpec, device: torch.device | str | None = None) -> Tensor:
    """One view of n images at once.

    ``canvas``: uint8 (n, 3, H, W), each image in the top left corner; ``params``: of the same n images.
    Returns float32 (n, 3, size, size), normalised, on ``device`` (default: the canvas's).
    """
    device = canvas.device if device is None else torch.device(device)
    with torch.autocast(torch.device(device).type, enabled=False):
        canvas = canvas.to(device, non_blocking=True)
        parts = [_apply_chunk(canvas[s], params[s], spec) for s in _chunks(len(canvas), canvas, spec.size)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _apply_chunk(canvas: Tensor, p: ViewParams, spec: ViewSpec) -> Tensor:
    device, size = canvas.device, spec.size
    resized, none = torch.full_like(p.top, size), torch.zeros_like(p.top)
    down = torch.stack([p.top, p.height, resized, none, none]).to(device)
    across = torch.stack([p.left, p.width, resized, none, p.flip.long()]).to(device)
    x = _resized(canvas, _resample(down, size, canvas.shape[-2]), _resample(across, size, canvas.shape[-1]))
    x.mul_(1 / 255)

    def chosen(flags: Tensor, probability: float) -> Tensor | None:
        rows = flags.nonzero()[:, 0] if probability > 0 else flags[:0]
        return rows if len(rows) else None

    if (rows := chosen(p.jitter, spec.jitter)) is not None and any(spec.jitter_strength):
        at = rows.to(device)
        x[at] = _jitter(x[at], p.order[rows], p.factors[rows], spec.jitter_strength)
    if (rows := chosen(p.grey, spec.grey)) is not None:
        at = rows.to(device)
        x[at] = _grey(x[at]).expand(-1, 3, -1, -1)
    if (rows := chosen(p.blur, spec.blur)) is not None:
        at = rows.to(device)
        x[at] = _blur(x[at], p.sigma[rows], spec.blur_sigma[1])
    if (rows := chosen(p.solarise, spec.solarise)) is not None:
        at = rows.to(device)
        y = x[at]
        x[at] = torch.where(y >= SOLARISE, 1 - y, y)
    return normalised(x, spec.mean, spec.std)


def multicrop(
    images: MemoryImages,
    indices: Sequence[int] | Tensor,
    seed: int,
    step: int,
    specs: Sequence[ViewSpec],
    positions: Sequence[int] | Tensor,
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """All views of the images at ``indices``, which stand at ``positions`` of the global batch of ``step``.

    Returns one float32 (n, 3, size, size) per spec, on ``device`` (default: where the canvas is).
    """
    rows, at = torch.as_tensor(indices), np.asarray(positions)
    canvas, sizes = images.canvas[rows.to(images.canvas.device)], images.sizes[rows]
    canvas = canvas if device is None else canvas.to(device, non_blocking=True)
    first = int(at.min(initial=0))
    draws = [
        uniforms(seed, step, view, int(at.max(initial=-1)) + 1 - first, first)[at - first] for view in range(len(specs))
    ]
    views: list[Tensor] = [canvas] * len(specs)
    for spec in dict.fromkeys(specs):  # views made alike are made together: half the calls, the same images
        alike = [view for view, other in enumerate(specs) if other == spec]
        u = np.concatenate([draws[view] for view in alike])
        several = canvas if len(alike) == 1 else canvas.repeat(len(alike), 1, 1, 1)
        made = apply_batch(several, sample_params(u, sizes.repeat(len(alike), 1), spec), spec)
        for view, part in zip(alike, made.chunk(len(alike)), strict=True):
            views[view] = part
    return views


@torch.no_grad()
def eval_batch(canvas: Tensor, sizes: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Evaluation views of n in-memory images at once: float32 (n, 3, size, size), normalised.

    Shorter side resized (bicubic), central crop, as :func:`~uncollapse.data.workers.eval_crop` does for one image.
    """
    with torch.autocast(canvas.device.type, enabled=False):
        return torch.cat(
            [_eval_chunk(canvas[s], sizes[s], size, mean, std) for s in _chunks(len(canvas), canvas, size)]
        )


def _eval_chunk(canvas: Tensor, sizes: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    shorter = sizes.amin(1, keepdim=True)
    side = eval_shorter_side(size)
    # Whole-number arithmetic as torchvision's: the longer side is rounded down, the crop's offset to even.
    resized = torch.where(sizes == shorter, side, side * sizes // shorter)
    offset = ((resized - size) / 2).round().long()
    none = torch.zeros_like(sizes)
    lines = torch.stack([none, sizes, resized, offset, none]).to(canvas.device)
    rows = _resample(lines[..., 0], size, canvas.shape[-2])
    columns = _resample(lines[..., 1], size, canvas.shape[-1])
    return normalised(_resized(canvas, rows, columns).mul_(1 / 255), mean, std)
