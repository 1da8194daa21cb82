"""CAPI: cluster and predict latent patches (Darcet et al. 2025).

Every patch of the teacher's view is assigned to a prototype, balanced over the images at each place on its own. The
student's encoder sees one block of patches; a predictor says, from its tokens, to which prototypes a few of the others
were assigned. With the ``capi`` mode, the paper's own, the prototypes come from a clustering of the teacher's patches
(`prototypes.clustering`) and the student has weights of its own; in other modes prototypes are whatever the mode says.
A mixture sees the patches that are predicted. There is no class token, and no second view.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from uncollapse.config.facts import targets_of
from uncollapse.config.methods import CAPI
from uncollapse.config.schema import Config
from uncollapse.losses.pairs import fused_patch_loss
from uncollapse.methods.centre import assigned, temperature_at
from uncollapse.methods.contract import At, Batch, Memory, Parts, Seen, Sets, Targets
from uncollapse.models.drop_path import token_keys
from uncollapse.models.network import Encoder, PredictingEncoder
from uncollapse.targets.positions import at_positions, sinkhorn_by_position
from uncollapse.targets.prior import power_law


def parts(c: Config) -> Parts:
    own = _own(c)
    return Parts(
        {"patch": "patch"}, predict=(own.hidden, own.predicted), uninformed={"patch": math.log(c.prototypes.count)}
    )


def memory(c: Config) -> Memory:
    return {}


def see_student(c: Config, net: Encoder, batch: Batch) -> Seen:
    views, hidden, read = batch.views["global"], batch.masks["global"], batch.masks["predicted"]
    return Seen({"patch": cast(PredictingEncoder, net)(views, batch.keys, hidden, read)})


def see_teacher(c: Config, net: Encoder, batch: Batch, student: Seen | None) -> Seen:
    every, read = cast(PredictingEncoder, net)(batch.views["global"]), batch.masks["predicted"]
    _, image, position = read.nonzero().unbind(1)
    return Seen(
        {"patch": every[read.flatten(0, 1)]},
        image={"patch": image},
        key={"patch": token_keys(batch.keys, read)},
        place={"patch": position},
        every={"patch": every.transpose(0, 1)},
    )


def assign(c: Config, teacher: Seen, sets: Sets, memory: Memory, at: At) -> Targets:
    """Balanced at every place; of rows whose places are not known, all together."""
    z, prototypes, tau, iterations = teacher.z["patch"], sets["patch"], temperature_at(c, at), _own(c).iterations
    if targets_of(c) not in ("sinkhorn", "power-law") or "patch" not in teacher.every:
        return {"patch": assigned(c, z, prototypes, tau, at.group, iterations=iterations)}
    shares = power_law(c.prototypes.count, c.prototypes.power, z) if targets_of(c) == "power-law" else None
    weight, bias = (None if t is None else t.detach() for t in prototypes.affine("teacher", tau))
    assert weight is not None
    offsets = sinkhorn_by_position(teacher.every["patch"], weight, tau, iterations, bias, at.group, shares)
    return {"patch": at_positions(z, teacher.place["patch"], weight, tau, bias, offsets)}


def objective(c: Config, student: Seen, targets: Targets, sets: Sets, at: At) -> dict[str, Tensor]:
    """Mean over all that is predicted, of which every image has as much."""
    z, tau = student.z["patch"], c.teacher.student_temperature
    weight, bias = sets["patch"].affine("student", tau)
    each = torch.full((len(z),), 1 / len(z), dtype=z.dtype, device=z.device)
    return {"patch": fused_patch_loss(z, weight, targets["patch"], tau, each, bias)}


def remember(c: Config, everyone: Seen, sets: Sets, memory: Memory, at: At) -> None:
    pass


def _own(c: Config) -> CAPI:
    assert isinstance(c.method, CAPI)
    return c.method
