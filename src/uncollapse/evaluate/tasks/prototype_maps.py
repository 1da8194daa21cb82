"""Where the encoder looks: maps over the images of duplicate prototypes, beside those of distinct ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from uncollapse.data.images import ImageSet, subset
from uncollapse.evaluate.encoder import EvalEncoder
from uncollapse.evaluate.extract import batches
from uncollapse.evaluate.features import Features
from uncollapse.figures import panels as figures
from uncollapse.measure.unique import greedy_cover, nearest_kept
from uncollapse.measure.usage import prototype_argmax

Pixels = NDArray[np.uint8]

SIDE = 96
"""Pixels of a picture's side: smaller images are enlarged without smoothing, larger ones reduced."""
ATTENTION = "attention of the class token in the last block, mean of the heads"
GRADIENT = "Grad-CAM towards the prototype, against the mean of all prototypes and images"
BASELINE = 64
"""Images behind the mean activation that gradient maps start from."""


@dataclass
class GroupPicture:
    """The test images nearest to one vector, and where the encoder looks in them."""

    duplicates: int
    """Prototypes that are this vector (within ε); 1 for a distinct one."""
    prototypes: list[int]
    """Their indices, the first four."""
    images: int
    """Test images assigned to any of them."""
    indices: list[int]
    """Images pictured, as `Features.indices` numbers them, the nearest first."""
    label: str
    """Share and name of the commonest class among the images assigned, such as ``81 % cat``; empty without labels."""
    kind: str
    """What the maps are: `ATTENTION` or `GRADIENT`."""
    maps: NDArray[np.float32] = field(repr=False)
    """(m, h, w), at least 0: the part of each location, each map summing to 1 (or all 0)."""
    spread: float
    """Locations a map effectively covers, as a share: exp(entropy) / (h · w), mean over the images; NaN for none."""
    pictures: Pixels = field(repr=False)
    """(m, side, side, 3): what the encoder saw, cropped and resized."""
    overlays: Pixels = field(repr=False)
    """(m, side, side, 3): the same, darkened where the map is low; each map is scaled to its own largest value."""


def group_maps(
    encoder: EvalEncoder,
    images: ImageSet,
    features: Features,
    vectors: Tensor,
    eps: float = 0.025,
    groups: int = 3,
    each: int = 6,
) -> list[GroupPicture]:
    """Maps for the busiest groups of duplicates, then for the busiest prototypes that have no duplicate.

    Vision transformers show the attention of their class token (Caron et al., 2021). Encoders without one show
    Grad-CAM (Selvaraju et al., 2017) with two changes. The score is the cosine to the prototype less the mean of
    the cosines to all: the cosine alone has no slope where it matters, at the images nearest to the prototype.
    And activations count from their mean over 64 images of the set: projections have unit length, so that more of
    everything changes nothing. (An energy map would be the same whatever the prototype.)

    Args:
        encoder: with head, on any device. images: the set that ``features`` were made of. vectors: (K, D).
        eps: cosine distance below which prototypes are duplicates. groups: of either kind, at most. each: images
            per group, at most; those assigned to the group with the largest cosine.

    Returns:
        Up to 2 · ``groups`` pictures, the duplicates first; empty where neither attention nor a map exists.

    Raises:
        ValueError: no projections, or features of other images.
    """
    if features.projections is None:
        raise ValueError("no projections: the encoder has no head that leads into the prototypes' space")
    if len(features) and int(features.indices.max()) >= len(images):
        raise ValueError(f"features of image {int(features.indices.max())}, but there are {len(images)} images")
    w = F.normalize(vectors.detach().float().cpu(), dim=1)
    z = features.projections
    group = nearest_kept(w, greedy_cover(w, eps))
    of_image = group[prototype_argmax(z, w)]
    size = torch.bincount(group, minlength=len(w))
    busy = torch.bincount(of_image, minlength=len(w))
    mean = _baseline(encoder, images, features.indices)
    pictures = []
    for which in (size > 1, size == 1):
        ranked = torch.where(which, busy, torch.zeros_like(busy)).argsort(descending=True, stable=True)[:groups]
        for leader in ranked[busy[ranked].bool() & which[ranked]].tolist():
            rows = (of_image == leader).nonzero()[:, 0]
            members = (group == leader).nonzero()[:, 0]
            near = (F.normalize(z[rows], dim=1) @ w[leader]).argsort(descending=True, stable=True)[:each]
            label = _label(features, rows)
            toward = _toward(w, leader)
            picture = _picture(encoder, images, features.indices[rows[near]], toward, mean, members, len(rows), label)
            if picture is not None:
                pictures.append(picture)
    return pictures


def _toward(w: Tensor, k: int) -> Tensor:
    """(D,): prototype k less the mean of all; prototype k where nothing is left, as with a single one."""
    apart = w[k] - w.mean(0)
    return apart if float(apart.norm()) > 1e-6 else w[k]


def _label(features: Features, rows: Tensor) -> str:
    if features.labels is None:
        return ""
    counts = torch.bincount(features.labels[rows])
    top = int(counts.argmax())
    name = features.classes[top] if top < len(features.classes) else str(top)
    return f"{100 * int(counts[top]) / len(rows):.0f} % {name}"


def _picture(
    encoder: EvalEncoder,
    images: ImageSet,
    indices: Tensor,
    toward: Tensor,
    mean: Tensor | None,
    members: Tensor,
    assigned: int,
    label: str,
) -> GroupPicture | None:
    device = next(encoder.module.parameters()).device
    parts = [x for _, x in batches(subset(images, indices), encoder, len(indices), 0, device)]
    if not parts:
        return None
    x = torch.cat(parts)
    made = location_maps(encoder, x, toward, mean)
    if made is None:
        return None
    maps, kind = made
    total = maps.flatten(1).sum(1)[:, None, None]
    maps = (maps / total.clamp_min(1e-12)).cpu()
    middle, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (encoder.mean, encoder.std))
    seen = ((x * std + middle).clamp(0, 1)).cpu()
    return GroupPicture(
        len(members),
        members[:4].tolist(),
        assigned,
        indices.tolist(),
        label,
        kind,
        maps.numpy().astype(np.float32),
        _spread(maps),
        *overlay(seen, maps),
    )


# ------------------------------------------------------------------------------------------------- the maps


def location_maps(
    encoder: EvalEncoder, x: Tensor, toward: Tensor, mean: Tensor | None = None
) -> tuple[Tensor, str] | None:
    """Maps (n, h, w), float32 and at least 0, of images (n, 3, size, size), and which kind they are; None without any.

    Args:
        x: normalised, on the encoder's device. toward, mean: as `gradient_maps` takes them.
    """
    with torch.no_grad():
        attention = encoder.attention(x)
    if attention is not None:
        return attention.float().mean(1), ATTENTION
    made = gradient_maps(encoder, x, toward, mean)
    return None if made is None else (made, GRADIENT)


def gradient_maps(encoder: EvalEncoder, x: Tensor, toward: Tensor, mean: Tensor | None = None) -> Tensor | None:
    """Grad-CAM (Selvaraju et al., 2017) of the projection's component along ``toward``: (n, h, w), float32.

    Channels of the last map with more than one location, less their means, are weighted by the mean slope of that
    component and summed; what speaks against it is cut off, so values are at least 0 and a map can be all zero.
    None without a head or such a map.

    Args:
        x: (n, 3, size, size) normalised images, on the encoder's device. toward: (D,), on any device.
        mean: (c,) activations to start from, one per channel of that map; None: 0, as in the paper.
    """
    if encoder.head is None:
        return None
    with torch.enable_grad():
        spatial, features = _last_map(encoder, x.detach().clone().requires_grad_())
        projections = encoder.project(features)
        if projections is None or spatial is None:
            return None
        component = F.normalize(projections, dim=1) @ toward.to(projections)
        (gradient,) = torch.autograd.grad(component.sum(), spatial)
    values, slopes = (_channels_first(encoder, t.detach().float()) for t in (spatial, gradient))
    if mean is not None:
        values = values - mean.to(values)[:, None, None]
    return (values * slopes.mean((2, 3), keepdim=True)).sum(1).clamp_min(0)


def _last_map(encoder: EvalEncoder, x: Tensor) -> tuple[Tensor | None, Tensor]:
    """The last map with more than one location on the way to the features, in the model's layout; the features."""
    spatial: list[Tensor] = []

    def keep(_: Any, __: Any, out: Any) -> None:
        if isinstance(out, Tensor) and out.ndim == 4 and _locations(encoder, out) > 1:
            spatial[:] = [out]  # of modules in the order in which they finish, the last one stays

    handles = [module.register_forward_hook(keep) for module in encoder.module.modules()]
    try:
        features = encoder.features(x)
    finally:
        for handle in handles:
            handle.remove()
    return (spatial[0] if spatial else None), features


@torch.no_grad()
def _baseline(encoder: EvalEncoder, images: ImageSet, indices: Tensor) -> Tensor | None:
    """(c,): mean activation of each channel of the last map over images spread evenly over the set."""
    if encoder.tokens or not len(indices):
        return None
    spread = indices[torch.linspace(0, len(indices) - 1, min(BASELINE, len(indices))).round().long()]
    device = next(encoder.module.parameters()).device
    parts = [_last_map(encoder, x)[0] for _, x in batches(subset(images, spread), encoder, len(spread), 0, device)]
    means = [_channels_first(encoder, p.float()).mean((2, 3)) for p in parts if p is not None]
    return torch.cat(means).mean(0) if means else None


def _channels_last(encoder: EvalEncoder) -> bool:
    return str(getattr(encoder.module, "output_fmt", "NCHW")) == "NHWC"


def _locations(encoder: EvalEncoder, out: Tensor) -> int:
    return out.shape[1] * out.shape[2] if _channels_last(encoder) else out.shape[2] * out.shape[3]


def _channels_first(encoder: EvalEncoder, t: Tensor) -> Tensor:
    return t.permute(0, 3, 1, 2) if _channels_last(encoder) else t


def _spread(maps: Tensor) -> float:
    """Mean of exp(entropy) / locations over the maps that are not all zero."""
    p = maps.flatten(1)
    p = p[p.sum(1) > 0].double()
    if not len(p):
        return math.nan
    entropy = -(p * p.clamp_min(1e-300).log()).sum(1)
    return float((entropy.exp() / p.shape[1]).mean())


# ------------------------------------------------------------------------------------------------- pictures


def overlay(seen: Tensor, maps: Tensor, side: int = SIDE) -> tuple[Pixels, Pixels]:
    """Images and the same under their maps, both uint8 (n, side, side, 3).

    Args:
        seen: (n, 3, H, H) in [0, 1]. maps: (n, h, w), at least 0; each is scaled to its own largest value.
    """
    if seen.shape[-1] < side:
        images = F.interpolate(seen, (side, side), mode="nearest")
    else:
        images = F.interpolate(seen, (side, side), mode="bilinear", antialias=True, align_corners=False)
    heat = maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-12)
    heat = F.interpolate(heat[:, None].float(), (side, side), mode="bilinear", align_corners=False)[:, 0]
    from matplotlib import colormaps

    colours = torch.from_numpy(colormaps["inferno"](heat.numpy())[..., :3]).float().permute(0, 3, 1, 2)
    grey = images.mean(1, keepdim=True).expand_as(images)
    covered = 0.45 * grey + 0.55 * colours
    return _bytes(images), _bytes(covered)


def _bytes(images: Tensor) -> Pixels:
    out: Pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return out


def draw_groups(pictures: list[GroupPicture], gap: int = 4) -> tuple[str, str]:
    """One figure of all groups as a self-contained image, and its alternative text.

    Each group has two rows of images: what the encoder saw, and where it looks. Duplicates are on the left, distinct
    prototypes on the right.

    Raises:
        ValueError: no pictures.
    """
    if not pictures:
        raise ValueError("there is no group to draw")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    sides = [[p for p in pictures if p.duplicates > 1], [p for p in pictures if p.duplicates == 1]]
    rows, most = max(map(len, sides)), max(len(p.indices) for p in pictures)
    columns = [side for side in sides if side]
    with mpl.rc_context({**figures.RC, "axes.grid": False}):
        figure = Figure(figsize=(0.62 * most * len(columns) + 0.2, 1.62 * rows + 0.45), layout="constrained")
        grid = figure.subplots(rows, len(columns), squeeze=False)
        for column, side in enumerate(columns):
            for row in range(rows):
                axes = grid[row][column]
                axes.set_axis_off()
                if row < len(side):
                    strip = _strip(side[row], most, gap)
                    axes.imshow(strip, interpolation="none")
                    axes.set_title(_title(side[row]), fontsize=8, fontweight="normal")
        picture = figures.svg(figure)
    return picture, _alt(columns, pictures[0].kind)


def _strip(p: GroupPicture, most: int, gap: int) -> Pixels:
    side = p.pictures.shape[1]
    canvas = np.full((2 * side + gap, most * (side + gap) - gap, 3), 255, np.uint8)
    for i, (image, covered) in enumerate(zip(p.pictures, p.overlays, strict=True)):
        left = i * (side + gap)
        canvas[:side, left : left + side] = image
        canvas[side + gap :, left : left + side] = covered
    return canvas


def _title(p: GroupPicture) -> str:
    numbers = ", ".join(map(str, p.prototypes)) + (", …" if p.duplicates > len(p.prototypes) else "")
    what = f"{p.duplicates:,} duplicates ({numbers})" if p.duplicates > 1 else f"prototype {numbers}"
    return f"{what}: {p.images:,} images" + (f", {p.label}" if p.label else "")


def _alt(columns: list[list[GroupPicture]], kind: str) -> str:
    lines, plain = [], sum(int((p.maps.sum((1, 2)) == 0).sum()) for side in columns for p in side)
    for side in columns:
        name = "groups of duplicates" if side[0].duplicates > 1 else "distinct prototypes"
        spread = [p.spread for p in side if math.isfinite(p.spread)]
        share = f", maps cover {100 * float(np.mean(spread)):.0f} % of the locations" if spread else ""
        lines.append(f"{len(side)} {name}{share}: " + "; ".join(_title(p) for p in side))
    if plain:
        lines.append(f"{plain} images without colour have no location that speaks for the prototype")
    return f"Images nearest to prototypes, and under each the {kind}. " + ". ".join(lines) + "."
