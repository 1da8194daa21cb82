"""CARP: consistent assignment over random partitions of the prototypes (Silva & Ramírez Rivera, NeurIPS 2023).

Every step deals the K prototypes into random blocks; inside each, student and teacher take a softmax over its
prototypes alone and must agree in inner product, while the mean assignment over the batch is kept even. Neither
temperature nor centre, and projections are not on the unit sphere: their length says how sure they are. The teacher and
its prototypes follow between the forward pass and the student's step, so they average the student of the step before.
With decoupled prototypes these are the second paper's own experiments (Arteaga et al., *Why Prototypes Collapse*,
2026).
"""

from __future__ import annotations

import math

from torch import Tensor

from uncollapse.config.methods import CARP
from uncollapse.config.schema import Config
from uncollapse.losses.carp import fused_carp_terms, random_blocks
from uncollapse.methods.centre import assigned, temperature_at
from uncollapse.methods.contract import At, Memory, Parts, Seen, Sets, Targets
from uncollapse.methods.dino import see_student as see_student
from uncollapse.methods.dino import see_teacher as see_teacher


def parts(c: Config) -> Parts:
    return Parts(average="before", uninformed={"consistency": math.log(_own(c).block)})


def memory(c: Config) -> Memory:
    return {}


def assign(c: Config, teacher: Seen, sets: Sets, memory: Memory, at: At) -> Targets:
    """The teacher's own softmax, which the loss takes inside each block; its temperature is 1 in the paper."""
    return {"cls": assigned(c, teacher.z["cls"], sets["cls"], temperature_at(c, at), at.group)}


def objective(c: Config, student: Seen, targets: Targets, sets: Sets, at: At) -> dict[str, Tensor]:
    own, tau, views = _own(c), c.teacher.student_temperature, student.z["cls"].unbind()
    blocks = random_blocks(c.prototypes.count, own.block, at.seed, at.step)
    weight, bias = sets["cls"].affine("student", tau)
    loss, entropy = fused_carp_terms(views, weight, targets["cls"], blocks, own.entropy_weight, tau, bias, at.group)
    return {"consistency": loss - entropy, "entropy": entropy}  # the first has the gradient of both


def remember(c: Config, everyone: Seen, sets: Sets, memory: Memory, at: At) -> None:
    pass


def _own(c: Config) -> CARP:
    assert isinstance(c.method, CARP)
    return c.method
