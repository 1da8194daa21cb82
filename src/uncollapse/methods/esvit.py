"""EsViT: efficient self-supervised vision transformers (Li et al., ICLR 2022, eq. 1 to 4).

DINO's term over the views, and one over their regions: every region of a student view, local views included, predicts
the teacher's assignment of one region of a global view, of the one whose feature is nearest by cosine, before any head.
Regions have a head, prototypes and a centre of their own. A view's feature is the mean of its regions, but for a vision
transformer's, which is its class token.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from uncollapse.config.methods import ESVIT
from uncollapse.config.schema import Config
from uncollapse.losses.pairs import fused_dino_loss, fused_patch_loss, pair_count
from uncollapse.methods.centre import assigned, recentre, temperature_at
from uncollapse.methods.contract import At, Batch, Memory, Parts, Seen, Sets, Targets
from uncollapse.models.network import Encoder, Projected
from uncollapse.targets.softmax import SoftmaxTargets

CENTERS = {"cls": "center", "region": "center_region"}
LOCAL = "region_local"
"""Regions of the student's local views, which are fewer."""


def parts(c: Config) -> Parts:
    least = math.log(c.prototypes.count)
    share = _own(c).region_weight
    return Parts({"cls": "cls", "region": "region"}, uninformed={"cls": (1 - share) * least, "region": share * least})


def memory(c: Config) -> Memory:
    return {name: torch.zeros(c.prototypes.count) for name in CENTERS.values()}


def see_student(c: Config, net: Encoder, batch: Batch) -> Seen:
    return _seen(net([view for group in batch.views.values() for view in group], keys=batch.keys), batch)


def see_teacher(c: Config, net: Encoder, batch: Batch, student: Seen | None) -> Seen:
    return _seen(net(batch.views["global"]), batch)


def assign(c: Config, teacher: Seen, sets: Sets, memory: Memory, at: At) -> Targets:
    """Of views and of regions, which keep the features that they are found by."""
    tau = temperature_at(c, at)
    targets = {
        level: assigned(c, z, sets[level], tau, at.group, memory[CENTERS[level]]) for level, z in teacher.z.items()
    }
    if "region" in targets:
        targets["region"] = replace(targets["region"], features=teacher.features["region"])
    return targets


def objective(c: Config, student: Seen, targets: Targets, sets: Sets, at: At) -> dict[str, Tensor]:
    tau, share = c.teacher.student_temperature, _own(c).region_weight
    weight, bias = sets["cls"].affine("student", tau)
    views = fused_dino_loss(student.z["cls"].unbind(), weight, targets["cls"], tau, bias)
    weight, bias = sets["region"].affine("student", tau)
    z, matched, count = _matched(student, targets["region"])
    regions = fused_patch_loss(z, weight, replace(targets["region"], z=matched, features=None), tau, count, bias)
    return {"cls": (1 - share) * views, "region": share * regions}


def remember(c: Config, everyone: Seen, sets: Sets, memory: Memory, at: At) -> None:
    tau = temperature_at(c, at)
    for level, name in CENTERS.items():
        recentre(c, memory[name], everyone.z[level], sets[level], tau)


def _matched(student: Seen, targets: SoftmaxTargets) -> tuple[Tensor, Tensor, Tensor]:
    """The student's regions ``(M, D)``, the teacher's projections they predict ``(M, D')``, and how much each counts.

    Once for every teacher view that is another one. A view's regions count alike, and so do images and pairs of views.
    """
    assert targets.features is not None
    views, features = (
        [view for level in ("region", LOCAL) if level in of for view in of[level]]
        for of in (student.z, student.features)
    )
    pairs = pair_count(len(views), len(targets.z))
    rows, matched, weights = [], [], []
    for q, (theirs, of) in enumerate(zip(targets.z, targets.features, strict=True)):
        for v, (z, f) in enumerate(zip(views, features, strict=True)):
            if v == q:
                continue
            at = nearest_regions(f, of)
            rows.append(z.flatten(0, 1))
            matched.append(theirs.gather(1, at[..., None].expand(-1, -1, theirs.shape[-1])).flatten(0, 1))
            weights.append(z.new_full((at.numel(),), 1 / (at.numel() * pairs)))
    return torch.cat(rows), torch.cat(matched), torch.cat(weights)


def nearest_regions(student: Tensor, teacher: Tensor) -> Tensor:
    """``(n, T)``: for every region of ``student (n, T, d)`` the nearest by cosine of ``teacher (n, T', d)``."""
    return (F.normalize(student, dim=-1) @ F.normalize(teacher, dim=-1).mT).argmax(-1)


def _seen(projected: Projected, batch: Batch) -> Seen:
    assert projected.region is not None
    assert projected.region_features is not None
    z, features, first = {"cls": projected.cls}, {}, len(batch.views["global"])
    for level, views in {"region": slice(first), LOCAL: slice(first, None)}.items():
        if projected.region[views]:
            z[level] = torch.stack(projected.region[views])
            features[level] = torch.stack(projected.region_features[views])
    return Seen(z, features=features)


def _own(c: Config) -> ESVIT:
    assert isinstance(c.method, ESVIT)
    return c.method
