"""DINO: self-distillation with no labels (Caron et al., ICCV 2021, Algorithm 1 and Section 3.1).

The student sees all views, the teacher the global ones; each student view predicts the teacher's centred and sharpened
assignment of every *other* view. DINO-vMF (Govindarajan et al., ICLR 2023) is this with ``prototypes.vmf`` and a centre
of probabilities.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from uncollapse.config.schema import Config
from uncollapse.losses.pairs import fused_dino_loss
from uncollapse.methods.centre import CENTER, assigned, recentre, temperature_at
from uncollapse.methods.contract import At, Batch, Memory, Parts, Seen, Sets, Targets
from uncollapse.models.network import Encoder


def parts(c: Config) -> Parts:
    return Parts(uninformed={"cls": math.log(c.prototypes.count)})


def memory(c: Config) -> Memory:
    return {CENTER: torch.zeros(c.prototypes.count)}


def see_student(c: Config, net: Encoder, batch: Batch) -> Seen:
    return Seen({"cls": net([view for group in batch.views.values() for view in group], keys=batch.keys).cls})


def see_teacher(c: Config, net: Encoder, batch: Batch, student: Seen | None) -> Seen:
    return Seen({"cls": net(batch.views["global"]).cls})


def assign(c: Config, teacher: Seen, sets: Sets, memory: Memory, at: At) -> Targets:
    tau = temperature_at(c, at)
    return {"cls": assigned(c, teacher.z["cls"], sets["cls"], tau, at.group, memory[CENTER])}


def objective(c: Config, student: Seen, targets: Targets, sets: Sets, at: At) -> dict[str, Tensor]:
    tau = c.teacher.student_temperature
    weight, bias = sets["cls"].affine("student", tau)
    return {"cls": fused_dino_loss(student.z["cls"].unbind(), weight, targets["cls"], tau, bias)}


def remember(c: Config, everyone: Seen, sets: Sets, memory: Memory, at: At) -> None:
    z = everyone.z["cls"]
    recentre(c, memory[CENTER], z, sets["cls"], temperature_at(c, at), mean=z.mean((0, 1)))
