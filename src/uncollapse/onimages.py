"""What only images can tell about prototypes: which are used, by what, and whether the encoder itself is well."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from uncollapse.backbones import Encoder
from uncollapse.config import Config, DataConfig, ViewConfig
from uncollapse.data import load_images
from uncollapse.images import ImageSet, subset
from uncollapse.judging import judge
from uncollapse.metrics import alignment, effective_rank, prototype_argmax, prototype_report, uniformity
from uncollapse.rebuild import Rebuilt
from uncollapse.summary import VIEWS, extract, nearest_images, project_views

if TYPE_CHECKING:
    from uncollapse.diagnosis import Diagnosis

TEMPERATURES = {"MSN": 0.025, "SwAV": 0.05}
"""Of the targets, where a family's published recipe differs from DINO's final 0.07."""
PICTURED, MEMBERS, NEAREST = 6, 3, 8
"""Groups with pictures, prototypes listed of each group, images listed of each prototype."""


@dataclass
class SharedGroup:
    """Prototypes that are one vector (within ε), and the held-out images they divide among them."""

    prototypes: int
    members: list[int]
    """Indices of the first ones (rows of the checkpoint), the busiest first."""
    images: int
    nearest: list[list[int]]
    """For each member listed, the indices of the held-out images nearest to it."""
    overlap: float
    """Share of those images that the listed members have in common on average: 1 is the same list."""
    pictures: np.ndarray | None = field(default=None, repr=False)


@dataclass
class ImageFindings:
    """All by the hard argmax of the raw cosine on held-out images, unless it says otherwise."""

    encoder: str
    n: int
    n_train: int
    views: int
    """Augmented views per image, behind `alive`, `view_information` and `alignment`."""
    used: int
    alive: int
    """Argmax of at least one of ``views`` augmented views of the ``n_train`` training images given: a checkpoint
    does not record what was an argmax while it was trained."""
    dead: int
    """Neither used nor alive."""
    unique_used: dict[float, int]
    effective: dict[float, float]
    view_information: float | None
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
        for name in ("unique_used", "effective"):
            out[name] = {f"{eps:g}": value for eps, value in getattr(self, name).items()}
        pictures = ("pictures",)
        out["shared_groups"] = [
            {f.name: getattr(g, f.name) for f in dataclasses.fields(g) if f.name not in pictures} for g in self.shared
        ]
        return out


def look(
    d: Diagnosis, rebuilt: Rebuilt, data: str, center: Tensor | None, scale: Tensor | None, limit: int,
    device: torch.device,
) -> None:  # fmt: skip
    """Adds what the images of ``data`` tell to a diagnosis, and judges it again.

    Args:
        d: of the set whose projections ``rebuilt`` makes.
        data: what `load_images` takes; its held-out part is looked at, its training part for `alive`.
        center: (K,) subtracted from the teacher's logits in training. scale: (K,) lengths of the prototypes in
            the logits; None: 1.
        limit: most images of each part.

    Raises:
        DataError: no usable images.
    """
    assert d.vectors is not None
    assert d.group_of is not None
    config = _configured(rebuilt, data)
    train, held = load_images(data, config.data, config.seed)
    train, held = (_some(images, limit, config.seed) for images in (train, held))
    encoder = Encoder(rebuilt.backbone, rebuilt.head).to(device)
    w = d.vectors.float().cpu()
    features, z, _ = extract(encoder, held, config, device)
    z_views = project_views(encoder, held, config, device)
    matching = z_views.shape[1] == len(z)  # not where images turned out to be unreadable
    report = prototype_report(w, z, z_views if matching else None, list(d.unique))
    of_training = prototype_argmax(project_views(encoder, train, config, device).flatten(0, 1), w).unique()
    argmax = prototype_argmax(z, w)
    usage = torch.bincount(argmax, minlength=len(w))
    both = torch.zeros(len(w), dtype=torch.bool)
    both[of_training] = True
    both |= usage > 0
    usable = d.rows if d.rows is not None else torch.arange(len(w))
    temperature = config.teacher.temperature if rebuilt.config else TEMPERATURES.get(d.source.family, 0.07)
    d.images = ImageFindings(
        encoder=rebuilt.described, n=len(z), n_train=len(train), views=VIEWS,
        used=report.used, alive=len(of_training), dead=d.prototypes - int(both.sum()),
        unique_used=report.unique_used, effective=report.effective, view_information=report.view_information,
        marginal=_marginal(w, z, d.group_of.cpu(), temperature, _rows(center, usable), _rows(scale, usable)),
        health={
            "features": features.shape[1],
            "effective_rank_features": effective_rank(features),
            "effective_rank_projections": report.effective_rank,
            "uniformity": report.uniformity,
            "uniformity_features": uniformity(features) if len(features) > 1 else None,
            "alignment": alignment(z_views),
        },
        shared=_shared(w, z, d.group_of.cpu(), usage, usable, held if len(held) == len(z) else None),
        usage=usage.numpy(),
    )  # fmt: skip
    d.verdict = judge(
        d.prototypes, d.zero_rows + d.non_finite_rows, d.dim, d.unique, d.random, report.used,
        report.effective[d.epsilon], len(z),
    )  # fmt: skip


def _configured(rebuilt: Rebuilt, data: str) -> Config:
    path = data if data.startswith("builtin:") else str(Path(data).resolve())
    if rebuilt.config is not None:
        own: Config = rebuilt.config
        return dataclasses.replace(own, data=dataclasses.replace(own.data, path=path, val_path="", workers=0))
    views = ViewConfig(global_size=rebuilt.size)
    return Config(data=DataConfig(path=path, workers=0), views=views)


def _some(images: ImageSet, limit: int, seed: int) -> ImageSet:
    if len(images) <= limit:
        return images
    return subset(images, np.sort(np.random.default_rng([seed, 3]).permutation(len(images))[:limit]))


def _rows(values: Tensor | None, usable: Tensor) -> Tensor | None:
    return None if values is None else values.float().cpu()[usable]


def _marginal(
    w: Tensor, z: Tensor, group: Tensor, temperature: float, center: Tensor | None, scale: Tensor | None
) -> dict[str, Any]:
    """The mean target on these images over all prototypes and over distinct ones, against a uniform prior.

    The prior of the methods is uniform over K. Where g prototypes are one vector, the distinct vector gets
    their g shares: uniform over K is not uniform over distinct prototypes, and that is what is measured.
    """
    unit = torch.nn.functional.normalize(w, dim=1)
    unit = unit if scale is None else unit * scale.abs()[:, None]
    total = torch.zeros(len(w), dtype=torch.float64)
    for part in torch.nn.functional.normalize(z, dim=1).split(max(1, (1 << 24) // len(w))):
        logits = part @ unit.T
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
        "entropy": _entropy(share),
        "entropy_of_prior": math.log(len(w)),
        "entropy_distinct": _entropy(distinct),
        "distinct": len(distinct),
        # How far from the uniform prior over distinct vectors: what is there, and what duplication alone makes.
        "kl_distinct_to_uniform": max(0.0, math.log(len(distinct)) - _entropy(distinct)),
        "kl_of_duplication": max(0.0, math.log(len(distinct)) - _entropy(prior)),
        "kl_distinct_to_group_sizes": float((distinct[known] * (distinct[known] / prior[known]).log()).sum()),
        "largest": float(distinct.max()),
    }


def _entropy(p: Tensor) -> float:
    p = p[p > 0]
    return float(-(p * p.log()).sum())


def _shared(
    w: Tensor, z: Tensor, group: Tensor, usage: Tensor, usable: Tensor, held: ImageSet | None
) -> list[SharedGroup]:
    size = torch.bincount(group, minlength=len(w))
    images = torch.zeros_like(usage).index_add_(0, group, usage)
    busy = torch.where(size > 1, images, torch.full_like(images, -1))
    out: list[SharedGroup] = []
    unit = torch.nn.functional.normalize(z, dim=1)
    for leader in busy.argsort(descending=True, stable=True)[: int((busy > 0).sum())].tolist():
        members = (group == leader).nonzero()[:, 0]
        members = members[usage[members].argsort(descending=True, stable=True)][:MEMBERS]
        chosen = torch.nn.functional.normalize(w[members], dim=1)
        nearest = (chosen @ unit.T).topk(min(NEAREST, len(z)), dim=1).indices.tolist()
        lists = [set(row) for row in nearest]
        pairs = [(a, b) for i, a in enumerate(lists) for b in lists[:i]]
        out.append(SharedGroup(
            int(size[leader]), usable[members].tolist(), int(images[leader]), nearest,
            float(np.mean([len(a & b) / len(a) for a, b in pairs])),
            nearest_images(chosen, unit, held, NEAREST) if held is not None and len(out) < PICTURED else None,
        ))  # fmt: skip
    return out
