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
from uncollapse.distributed import Group, rank_and_size
from uncollapse.losses.pairs import fused_dino_loss
from uncollapse.methods.centre import assigned, temperature_at
from uncollapse.methods.contract import At, Batch, Memory, Parts, Seen, Sets, Targets
from uncollapse.methods.dino import see_student as see_student
from uncollapse.models.network import Encoder


def parts(c: Config) -> Parts:
    return Parts(uninformed={"cls": math.log(c.prototypes.count)})


def memory(c: Config) -> Memory:
    """The queue of each global view, newest first, and how many of its rows are filled."""
    length = _own(c).queue
    if not length:
        return {}
    return {
        "queue": torch.zeros(c.views.global_count, length, c.head.bottleneck),
        "filled": torch.zeros((), dtype=torch.long),
    }


def see_teacher(c: Config, net: Encoder, batch: Batch, student: Seen | None) -> Seen:
    assert student is not None
    return Seen({"cls": student.z["cls"][: c.views.global_count].detach()})


def assign(c: Config, teacher: Seen, sets: Sets, memory: Memory, at: At) -> Targets:
    """Codes of each global view, named by its number; the queue is balanced with them once it is full."""
    tau, iterations, full = temperature_at(c, at), _own(c).iterations, False
    if "queue" in memory:
        full = int(memory["filled"]) >= memory["queue"].shape[1]
    codes = {}
    for v, z in enumerate(teacher.z["cls"]):
        beside = _share(memory["queue"][v], at.group) if full else None
        codes[str(v)] = assigned(c, z[None], sets["cls"], tau, at.group, beside=beside, iterations=iterations)
    return codes


def _share(queue: Tensor, group: Group) -> Tensor:
    """Each rank balances its own rows of the queue, so that together they are one process's."""
    rank, ranks = rank_and_size(group)
    return queue.chunk(ranks)[rank]


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
    """The newest projections push the oldest out of the queue, which fills from its epoch on and is used once full."""
    if "queue" not in memory or at.epoch < _own(c).queue_epoch:
        return
    new = everyone.z["cls"]
    length = memory["queue"].shape[1]
    memory["queue"].copy_(torch.cat([new, memory["queue"]], dim=1)[:, :length])
    memory["filled"].add_(new.shape[1]).clamp_(max=length)


def _own(c: Config) -> SwAV:
    assert isinstance(c.method, SwAV)
    return c.method
