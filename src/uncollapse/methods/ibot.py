"""iBOT: image BERT with an online tokenizer (Zhou et al., ICLR 2022, eq. 2 and 3).

DINO's term over class tokens, where some patches of the student's global views are hidden, and a second one: at every
hidden patch the student predicts the teacher's assignment of the patch itself, seen in the same view without a mask.
Both kinds of token share one head and one set of prototypes; or (``shared`` false) the head's MLP alone, and patches
have prototypes of their own, student's and teacher's. The released code can also share them on the teacher's side
alone; that is not here. iBOT-vMF (Govindarajan et al., ICLR 2023) is this with ``prototypes.vmf`` and centres of
probabilities.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from uncollapse.config.facts import centres_probabilities
from uncollapse.config.methods import IBOT, DINOv2
from uncollapse.config.schema import Config
from uncollapse.losses.pairs import fused_dino_loss, fused_patch_loss, patch_weights
from uncollapse.methods.centre import assigned, recentre, temperature_at
from uncollapse.methods.contract import At, Batch, Memory, Parts, Seen, Sets, Targets
from uncollapse.models.drop_path import token_keys
from uncollapse.models.network import Encoder, Projected


def parts(c: Config) -> Parts:
    own = _own(c)
    sets = {"cls": "cls", "patch": "cls" if own.shared else "patch"}
    return Parts(sets, hide=(own.masked_crops, own.mask_ratio), uninformed={"cls": math.log(c.prototypes.count)})


def memory(c: Config) -> Memory:
    """A centre for each level, also where they share their prototypes."""
    return {"center": torch.zeros(c.prototypes.count), "center_patch": torch.zeros(c.prototypes.count)}


def see_student(c: Config, net: Encoder, batch: Batch) -> Seen:
    views = [view for group in batch.views.values() for view in group]
    return tokens_seen(net(views, batch.keys, batch.masks["global"], hide=True), batch)


def see_teacher(c: Config, net: Encoder, batch: Batch, student: Seen | None) -> Seen:
    return tokens_seen(net(batch.views["global"], None, batch.masks["global"], mean=True), batch)


def assign(c: Config, teacher: Seen, sets: Sets, memory: Memory, at: At) -> Targets:
    tau, patch = temperature_at(c, at), _patch_temperature(c, at)
    targets = {"cls": assigned(c, teacher.z["cls"], sets["cls"], tau, at.group, memory["center"])}
    # With several ranks, one without hidden patches still has to take part in what they do together.
    if "patch" in teacher.z and (len(teacher.z["patch"]) or at.group is not None):
        of = sets[_patch_set(c)]
        targets["patch"] = assigned(c, teacher.z["patch"], of, patch, at.group, memory["center_patch"])
    return targets


def objective(c: Config, student: Seen, targets: Targets, sets: Sets, at: At) -> dict[str, Tensor]:
    tau = c.teacher.student_temperature
    weight, bias = sets["cls"].affine("student", tau)
    terms = {"cls": fused_dino_loss(student.z["cls"].unbind(), weight, targets["cls"], tau, bias)}
    if "patch" in targets:
        weight, bias = sets[_patch_set(c)].affine("student", tau)
        # Over all crops: one without a mask counts as one whose loss is 0, as in the released code.
        patch = fused_patch_loss(student.z["patch"], weight, targets["patch"], tau, student.weight["patch"], bias)
        terms["patch"] = _own(c).patch_weight * patch
    else:
        terms["patch"] = 0 * student.z["patch"].sum()  # nothing was hidden; the head is still in the graph
    return terms


def remember(c: Config, everyone: Seen, sets: Sets, memory: Memory, at: At) -> None:
    """The patches' centre is that of all patches, hidden from the student or not.

    One of probabilities is that of the hidden ones alone, whose logits are made anyway; a step without any leaves it.
    """
    z = everyone.z["cls"]
    recentre(c, memory["center"], z, sets["cls"], temperature_at(c, at), mean=z.mean((0, 1)))
    patches = everyone.z["patch"]
    if len(patches) or not centres_probabilities(c):
        of, tau = sets[_patch_set(c)], _patch_temperature(c, at)
        recentre(c, memory["center_patch"], patches, of, tau, mean=everyone.mean["patch"])


def tokens_seen(projected: Projected, batch: Batch) -> Seen:
    """Class tokens of every view, the hidden patches of the global ones, and what each of these counts."""
    mask = batch.masks["global"]
    assert projected.patch is not None
    image = torch.arange(mask.shape[1], device=mask.device)[None, :, None].expand(mask.shape)[mask]
    mean = {} if projected.patch_mean is None else {"patch": projected.patch_mean}
    weight, key = {"patch": patch_weights(mask.flatten(0, 1))}, {"patch": token_keys(batch.keys, mask)}
    features = {"cls": projected.features}
    return Seen({"cls": projected.cls, "patch": projected.patch}, weight, {"patch": image}, mean, features, key)


def _patch_temperature(c: Config, at: At) -> float:
    own = _own(c)
    return temperature_at(c, at, own.patch_temperature_start if isinstance(own, IBOT) else None)


def _patch_set(c: Config) -> str:
    return "cls" if _own(c).shared else "patch"


def _own(c: Config) -> IBOT | DINOv2:
    assert isinstance(c.method, IBOT | DINOv2)
    return c.method
