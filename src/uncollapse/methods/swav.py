"""SwAV: swapped assignments between views (Caron et al., NeurIPS 2020, eq. 1 to 3 and Algorithm 1).

There is no teacher: the student's own projections of the global views, balanced over the prototypes by Sinkhorn, are
the codes that every other view predicts. Each of the global views is balanced on its own, together with a queue of
that view's earlier projections. Prototypes are put back on the unit sphere after each step, which is where the released
code's forward pass puts them at the start of the next one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from uncollapse.config.methods import SwAV
from uncollapse.config.schema import Config
from uncollapse.losses.pairs import fused_dino_loss
from uncollapse.methods.centre import assigned, temperature_at
from uncollapse.methods.contract import At, Batch, Memory, Parts, Seen, Sets, Targets
from uncollapse.methods.dino import see_student as see_student
from uncollapse.models.network import Encoder


def parts(c: Config) -> Parts:
    codes = {str(view): "cls" for view in range(c.views.global_count)}
    return Parts(targets=codes, uninformed={"cls": math.log(c.prototypes.count)})


def memory(c: Config) -> Memory:
    return {}  # the queue of each view is kept where any method's is


def see_teacher(c: Config, net: Encoder, batch: Batch, student: Seen | None) -> Seen:
    assert student is not None
    return Seen({"cls": student.z["cls"][: c.views.global_count].detach()})


def assign(c: Config, teacher: Seen, sets: Sets, memory: Memory, at: At) -> Targets:
    """Codes of each global view, named by its number."""
    tau, iterations = temperature_at(c, at), _own(c).iterations
    return {
        str(v): assigned(c, z[None], sets["cls"], tau, at.group, iterations=iterations)
        for v, z in enumerate(teacher.z["cls"])
    }


def objective(c: Config, student: Seen, targets: Targets, sets: Sets, at: At) -> dict[str, Tensor]:
    """Mean over the two codes, and over the views that predict each: all but its own."""
    tau, views = c.teacher.student_temperature, list(student.z["cls"].unbind())
    weight, bias = sets["cls"].affine("student", tau)
    losses = []
    for name, codes in targets.items():
        own = int(name)
        others = [views[own], *views[:own], *views[own + 1 :]]  # the loss leaves out the pair (0, 0)
        losses.append(fused_dino_loss(others, weight, codes, tau, bias))
    return {"cls": torch.stack(losses).mean()}


def remember(c: Config, everyone: Seen, sets: Sets, memory: Memory, at: At) -> None:
    pass


def _own(c: Config) -> SwAV:
    assert isinstance(c.method, SwAV)
    return c.method
