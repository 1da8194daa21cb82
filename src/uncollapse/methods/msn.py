"""MSN: masked Siamese networks (Assran et al., ECCV 2022, Section 3), and PMSN (Assran et al., ICLR 2023).

The teacher sees one large view of each image; the student sees another, without some of its patches, and several small
ones, and each of them predicts the teacher's assignment. That is a softmax over cosines, sharpened by a power, which is
a lower temperature; the released recipe then balances it by Sinkhorn over the batch. Student and teacher look at the
same prototypes. What keeps all of these in use is the student's mean prediction over the batch: its divergence from a
prior is part of the loss, in MSN from equal shares (mean-entropy maximisation), in PMSN from a power law, which suits
images whose classes are of very different sizes.

Batch norm in the student's head sees large and small views each on their own, as in the released code.
"""

from __future__ import annotations

import math

from torch import Tensor

from uncollapse.config.methods import MSN
from uncollapse.config.schema import Config
from uncollapse.losses.cross_entropy import fused_cross_entropy
from uncollapse.losses.mean_entropy import me_max, prediction_entropy
from uncollapse.methods.centre import assigned, temperature_at
from uncollapse.methods.contract import At, Batch, Memory, Parts, Seen, Sets, Targets
from uncollapse.models.network import Encoder
from uncollapse.targets.prior import power_law

TARGET = 1
"""The first of the large views is the teacher's; the student sees all others."""


def parts(c: Config) -> Parts:
    return Parts(drop=_own(c).drop, uninformed={"cls": math.log(c.prototypes.count)})


def memory(c: Config) -> Memory:
    return {}


def see_student(c: Config, net: Encoder, batch: Batch) -> Seen:
    anchors = batch.views["global"][TARGET:] + batch.views.get("local", [])
    dropped = batch.masks["global"][TARGET:] if "global" in batch.masks else None
    return Seen({"cls": net(anchors, batch.keys[TARGET:], without=dropped, apart=True).cls})


def see_teacher(c: Config, net: Encoder, batch: Batch, student: Seen | None) -> Seen:
    return Seen({"cls": net(batch.views["global"][:TARGET]).cls})


def assign(c: Config, teacher: Seen, sets: Sets, memory: Memory, at: At) -> Targets:
    tau, z = temperature_at(c, at), teacher.z["cls"]
    prior = _prior(c, z)
    return {"cls": assigned(c, z, sets["cls"], tau, at.group, marginal=prior, of_probabilities=True)}


def objective(c: Config, student: Seen, targets: Targets, sets: Sets, at: At) -> dict[str, Tensor]:
    own, tau, z = _own(c), c.teacher.student_temperature, student.z["cls"]
    weight, bias = sets["cls"].affine("student", tau)
    views, images, _ = z.shape
    pairing, each = z.new_ones(views, 1), z.new_full((images,), 1 / (views * images))
    terms = {"cls": fused_cross_entropy(z, weight, targets["cls"], tau, pairing, each, bias)}
    rows = z.flatten(0, 1)
    if own.prior_weight:
        terms["prior"] = own.prior_weight * me_max(rows, weight, tau, bias, at.group, _prior(c, z))
    if own.entropy_weight:
        terms["entropy"] = own.entropy_weight * prediction_entropy(rows, weight, tau, bias)
    return terms


def remember(c: Config, everyone: Seen, sets: Sets, memory: Memory, at: At) -> None:
    pass


def _prior(c: Config, like: Tensor) -> Tensor | None:
    """The share that each prototype should get; None: equal ones."""
    own = _own(c)
    return power_law(c.prototypes.count, own.exponent, like) if own.prior == "power" else None


def _own(c: Config) -> MSN:
    assert isinstance(c.method, MSN)
    return c.method
