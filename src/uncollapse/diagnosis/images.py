"""What only images can tell about prototypes: which are used, by what, and whether the encoder itself is well."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uncollapse.checkpoints.encoder import Rebuilt
from uncollapse.checkpoints.prototypes import PrototypeSet
from uncollapse.config.facts import centres_probabilities, mode_name
from uncollapse.config.schema import Config, DataConfig, ViewConfig
from uncollapse.data.images import ImageSet, subset
from uncollapse.data.load import load_images
from uncollapse.diagnosis.result import Diagnosis
from uncollapse.errors import DataError, InputError
from uncollapse.measure.geometry import alignment, effective_rank, entropy, uniformity
from uncollapse.measure.information import ViewInformation
from uncollapse.measure.sweep import wide_of
from uncollapse.measure.usage import prototype_argmax, prototype_report
from uncollapse.measure.verdict import judge
from uncollapse.models.embed import PATCHES, VIEWS, SomePatches, embed, nearest_images, project_views
from uncollapse.models.network import Encoder
from uncollapse.numerics import rows_at_once

TEMPERATURES = {"MSN": 0.025, "SwAV": 0.05, "CAPI": 0.06, "CARP": 1.0}
"""Of the targets, where a family's published recipe differs from DINO's final 0.07. CARP has none, so 1."""
PICTURED, MEMBERS, NEAREST = 6, 3, 8
"""Groups with pictures, prototypes listed of each group, images listed of each prototype."""


@dataclass
class SharedGroup:
    """Prototypes that are one vector (within ε), and the held-out images they divide among them."""

    prototypes: int
    members: list[int]
    """Indices of the first ones (rows of the checkpoint), the busiest first."""
    images: int
    """Images nearest to one of them; of patch prototypes, images with such a patch."""
    nearest: list[list[str]]
    """For each member listed, the names (paths) of the held-out images nearest to it, or with the nearest patches."""
    overlap: float
    """Share of those images that the listed members have in common on average: 1 is the same list."""
    pictures: np.ndarray | None = field(default=None, repr=False)


@dataclass
class ImageFindings:
    """All by the hard argmax of the raw cosine on held-out images, unless it says otherwise.

    Where the prototypes divide up patches, every count is of patches: at most 16 of each image, drawn by a fixed seed.
    """

    encoder: str
    unit: str
    """``images`` or ``patches``: what ``n`` and ``n_train`` count."""
    n: int
    n_train: int
    n_images: int
    """Held-out images that the ``n`` come from."""
    views: int
    """Augmented views per image, behind `alive`, `view_information` and `alignment`; the last two are None for
    patches, which two views do not share."""
    used: int
    used_by_logits: int | None
    """The same by the layer's own logits, with its lengths and its bias; None where that is the cosine."""
    alive: int
    """Argmax of at least one of ``views`` augmented views of the ``n_train`` training images given: a checkpoint
    does not record what was an argmax while it was trained."""
    dead: int
    """Neither used nor alive."""
    unique_used: dict[float, int]
    effective: dict[float, float]
    view_information: ViewInformation | None
    """Fitted on the training part of ``data``; None for patches, which two views do not share."""
    marginal: dict[str, Any]
    health: dict[str, float | None]
    shared: list[SharedGroup]
    """Every duplicate group that some image uses, the busiest first; the first six with pictures."""
    usage: np.ndarray = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        out = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("shared", "usage", "unique_used", "effective")
        }
        out["view_information"] = None if self.view_information is None else self.view_information.to_json()
        for name in ("unique_used", "effective"):
            out[name] = {f"{eps:g}": value for eps, value in getattr(self, name).items()}
        pictures = ("pictures",)
        out["shared_groups"] = [
            {f.name: getattr(g, f.name) for f in dataclasses.fields(g) if f.name not in pictures} for g in self.shared
        ]
        return out


def look(
    d: Diagnosis, s: PrototypeSet, rebuilt: Rebuilt, data: str, center: Tensor | None, limit: int, device: torch.device
) -> None:
    """Adds what the images of ``data`` tell to a diagnosis, and judges it again.

    Args:
        d: of the set ``s``, whose projections ``rebuilt`` makes.
        data: what `load_images` takes; its held-out part is looked at, its training part for `alive`.
        center: (K,) subtracted from the teacher's logits in training.
        limit: most images of each part.

    Raises:
        DataError: no usable images.
    """
    assert d.vectors is not None
    assert d.group_of is not None
    config = _configured(rebuilt, data)
    train, held = load_images(data, config.data, config.seed)
    if len(held) < 2:
        raise DataError(f"{data}: {len(held)} held-out image, and images tell something from two on; give more images")
    train, held = (_sampled(images, limit, config.seed) for images in (train, held))
    backbone = SomePatches(rebuilt.backbone) if rebuilt.tokens else rebuilt.backbone
    own = rebuilt.config
    raw_head = not own.head.normalise if own else d.source.family == "CARP"
    unnormalised = raw_head and isinstance(rebuilt.head, nn.Sequential)
    head = rebuilt.head[:-1] if unnormalised else rebuilt.head  # type: ignore[index]
    encoder = Encoder(backbone, {"cls": head}).to(device)
    w = d.vectors.float().cpu()
    features, raw, _ = embed(encoder, held, config.views, config.data.workers, device)
    lost = int((~torch.isfinite(raw).all(1) | (raw == 0).all(1)).sum())
    if lost:
        raise InputError(
            f"{d.source.file}: the projections of {lost:,} of {len(raw):,} views are zero, NaN or infinite; the "
            "encoder's weights are damaged, or training diverged"
        )
    z = F.normalize(raw, dim=1)
    z_views = project_views(encoder, held, config.views, config.seed, config.data.workers, device)
    each = backbone.each if isinstance(backbone, SomePatches) else 1
    matching = z_views.shape[1] == len(z)  # not where images turned out to be unreadable
    aligned = matching and not rebuilt.tokens
    z_train = project_views(encoder, train, config.views, config.seed, config.data.workers, device)
    report = prototype_report(w, z, z_views if aligned else None, z_train, list(d.unique))
    of_training = prototype_argmax(z_train.flatten(0, 1), w).unique()
    argmax = prototype_argmax(z, w)
    usage = torch.bincount(argmax, minlength=len(w))
    both = torch.zeros(len(w), dtype=torch.bool)
    both[of_training] = True
    both |= usage > 0
    usable = d.rows if d.rows is not None else torch.arange(len(w))
    lengths, bias = _rows(s.lengths(), usable), _rows(s.bias, usable)
    temperature = _temperature(s, rebuilt)
    if center is not None and own and centres_probabilities(own):
        center = center * temperature  # subtracted after the division by it
    marginal, by_logits = _marginal(
        w, raw if unnormalised else z, d.group_of.cpu(), temperature, _rows(center, usable), lengths, bias
    )
    plain = bias is None and (lengths is None or bool((lengths == lengths[0]).all()))
    unit = "patches" if rebuilt.tokens else "images"
    d.images = ImageFindings(
        encoder=rebuilt.described,
        unit=unit,
        n=len(z),
        n_train=each * len(train),
        n_images=len(z) // each,
        views=VIEWS,
        used=report.used,
        used_by_logits=None if plain else by_logits,
        alive=len(of_training),
        dead=d.prototypes - int(both.sum()),
        unique_used=report.unique_used,
        effective=report.effective,
        view_information=report.view_information,
        marginal=marginal,
        health={
            "features": features.shape[1],
            "effective_rank_features": effective_rank(features),
            "effective_rank_projections": report.effective_rank,
            "uniformity": report.uniformity,
            "uniformity_features": uniformity(features) if len(features) > 1 else None,
            "alignment": None if rebuilt.tokens else alignment(z_views),
        },
        shared=_shared(w, z.unflatten(0, (-1, each)), d.group_of.cpu(), argmax, usable, held),
        usage=usage.numpy(),
    )
    if rebuilt.tokens:
        d.notes.append(
            f"prototypes of patches: counts are of {len(z):,} patches, at most {PATCHES} of each of {len(z) // each:,} "
            "images; view information and alignment need tokens that two views share, and crops do not"
        )
    elif any("shared head" in note for note in d.notes) or getattr(own and own.method, "shared", False):
        d.notes.append("this head is for patches too; counts on images are of the class token alone")
    if bias is not None:
        d.notes.append("mean target and 'used by logits' add the layer's bias; all else is by the cosine")
    d.verdict = judge(
        d.prototypes,
        d.zero_rows + d.non_finite_rows,
        d.dim,
        d.unique,
        d.random,
        report.used,
        report.effective[d.epsilon],
        len(z),
        unit,
        wide_of(d.sweep),
        mode_name(rebuilt.config) if rebuilt.config is not None else "",
    )


def _temperature(s: PrototypeSet, rebuilt: Rebuilt) -> float:
    if rebuilt.config:
        return float(rebuilt.config.teacher.temperature)
    swav = s.family in ("lightly", "solo-learn") and "prototypes" in s.key
    return TEMPERATURES.get("SwAV" if swav else s.family, 0.07)


def _configured(rebuilt: Rebuilt, data: str) -> Config:
    path = data if data.startswith("builtin:") else str(Path(data).resolve())
    if rebuilt.config is not None:
        own: Config = rebuilt.config
        data_config = dataclasses.replace(own.data, path=path, val_path="", workers=0)
        if path != own.data.path:
            # The columns of other files, and the cut of another set.
            data_config = dataclasses.replace(data_config, image="", label="", long_tail=1.0)
        return dataclasses.replace(own, data=data_config)
    views = ViewConfig(global_size=rebuilt.size)
    return Config(data=DataConfig(path=path, workers=0), views=views)


def _sampled(images: ImageSet, limit: int, seed: int) -> ImageSet:
    if len(images) <= limit:
        return images
    return subset(images, np.sort(np.random.default_rng([seed, 3]).permutation(len(images))[:limit]))


def _rows(values: Tensor | None, usable: Tensor) -> Tensor | None:
    return None if values is None else values.float().cpu()[usable]


def _marginal(
    w: Tensor,
    z: Tensor,
    group: Tensor,
    temperature: float,
    center: Tensor | None = None,
    lengths: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[dict[str, Any], int]:
    """The mean target over all prototypes and over distinct ones, against a uniform prior; and how many are used.

    The prior of the methods is uniform over K. Where g prototypes are one vector, the distinct vector gets
    their g shares: uniform over K is not uniform over distinct prototypes, and that is what is measured.

    Args:
        w: (K, D) directions. z: (n, D) projections as the logits take them. group: (K,) of each prototype.
        center: (K,) subtracted from the logits. lengths: (K,) of the prototypes in the logits; None: 1.
        bias: (K,) added to the logits.

    Returns:
        The numbers, and the count of prototypes that are the largest logit (centre aside) of any row.
    """
    unit = F.normalize(w, dim=1)
    unit = unit if lengths is None else unit * lengths[:, None]
    total = torch.zeros(len(w), dtype=torch.float64)
    chosen = torch.zeros(len(w), dtype=torch.bool)
    for part in z.split(rows_at_once(len(w))):
        logits = part @ unit.T
        logits = logits if bias is None else logits + bias
        chosen[logits.argmax(1)] = True
        logits = logits if center is None else logits - center
        total += torch.softmax(logits / temperature, dim=1).double().sum(0)
    share = total / total.sum()
    distinct = torch.zeros_like(share).index_add_(0, group, share)
    distinct = distinct[group.unique()]
    size = torch.bincount(group, minlength=len(w))[group.unique()].double()
    prior = size / size.sum()
    known = distinct > 0
    return {
        "temperature": temperature,
        "centred": center is not None and bool((center != 0).any()),
        "biased": bias is not None,
        "entropy": entropy(share.numpy()),
        "entropy_of_prior": math.log(len(w)),
        "entropy_distinct": entropy(distinct.numpy()),
        "distinct": len(distinct),
        # How far from the uniform prior over distinct vectors: what is there, and what duplication alone makes.
        "kl_distinct_to_uniform": max(0.0, math.log(len(distinct)) - entropy(distinct.numpy())),
        "kl_of_duplication": max(0.0, math.log(len(distinct)) - entropy(prior.numpy())),
        "kl_distinct_to_group_sizes": float((distinct[known] * (distinct[known] / prior[known]).log()).sum()),
        "largest": float(distinct.max()),
    }, int(chosen.sum())


def _shared(
    w: Tensor, z: Tensor, group: Tensor, argmax: Tensor, usable: Tensor, held: ImageSet | None
) -> list[SharedGroup]:
    """Groups of duplicates that are in use, the busiest first; z is (images, tokens of each, D), of unit length."""
    # Unreadable images have no projection; without them the places no longer tell which image is which.
    held = held if held is not None and len(held) == len(z) else None
    names = [f"#{i}" if held is None else held.name(i) for i in range(len(z))]
    usage = torch.bincount(argmax, minlength=len(w))
    size = torch.bincount(group, minlength=len(w))
    total = torch.zeros_like(usage).index_add_(0, group, usage)
    busy = torch.where(size > 1, total, torch.full_like(total, -1))
    of_image = group[argmax].view(z.shape[:2])
    out: list[SharedGroup] = []
    for leader in busy.argsort(descending=True, stable=True)[: int((busy > 0).sum())].tolist():
        members = (group == leader).nonzero()[:, 0]
        members = members[usage[members].argsort(descending=True, stable=True)][:MEMBERS]
        # An image is as near as its nearest token.
        near = (F.normalize(w[members], dim=1) @ z.flatten(0, 1).T).unflatten(1, z.shape[:2]).amax(2)
        nearest = near.topk(min(NEAREST, len(z)), dim=1).indices.tolist()
        lists = [set(row) for row in nearest]
        pairs = [(a, b) for i, a in enumerate(lists) for b in lists[:i]]
        pictures = None
        if held is not None and len(out) < PICTURED:
            pictures = nearest_images(torch.eye(len(members)), near.T.unsqueeze(1), held, NEAREST)
        out.append(
            SharedGroup(
                int(size[leader]),
                usable[members].tolist(),
                int((of_image == leader).any(1).sum()),
                [[names[i] for i in row] for row in nearest],
                float(np.mean([len(a & b) / len(a) for a, b in pairs])),
                pictures,
            )
        )
    return out
