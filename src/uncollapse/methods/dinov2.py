"""DINOv2: DINO's and iBOT's terms together, and spread features (Oquab et al., TMLR 2024, Section 4).

As in iBOT, the student predicts the teacher's assignment of every other view from the class token, and that of each
hidden patch. Otherwise than there: targets are balanced by Sinkhorn or centred for both kinds of token alike (the
patches' centre is that of the hidden ones), both may have a head of their own, the temperature rises at every step, and
half of a batch's crops are masked, by ratios spread evenly. KoLeo keeps the student's class features apart, before any
head, for each global crop on its own.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from uncollapse.config.methods import DINOv2
from uncollapse.config.schema import Config
from uncollapse.losses.diversity import koleo_features
from uncollapse.methods import dino, ibot
from uncollapse.methods.centre import recentre, temperature_at
from uncollapse.methods.contract import At, Batch, Memory, Parts, Seen, Sets, Targets
from uncollapse.methods.ibot import assign as assign
from uncollapse.methods.ibot import memory as memory
from uncollapse.methods.ibot import see_student as see_student
from uncollapse.models.network import Encoder


def parts(c: Config) -> Parts:
    return replace(ibot.parts(c), hide_evenly=True)


def see_teacher(c: Config, net: Encoder, batch: Batch, student: Seen | None) -> Seen:
    return ibot.tokens_seen(net(batch.views["global"], None, batch.masks["global"]), batch)


def objective(c: Config, student: Seen, targets: Targets, sets: Sets, at: At) -> dict[str, Tensor]:
    terms = ibot.objective(c, student, targets, sets, at)
    own, crops = _own(c), targets["cls"].z.shape[0]  # the teacher saw the global ones, which come first
    if own.koleo_weight:
        spread = [koleo_features(f.float(), own.koleo_images) for f in student.features["cls"][:crops]]
        terms["koleo"] = own.koleo_weight * sum(spread[1:], spread[0])
    return terms


def remember(c: Config, everyone: Seen, sets: Sets, memory: Memory, at: At) -> None:
    """The patches' centre is that of the hidden ones; a step without any leaves it."""
    dino.remember(c, everyone, sets, memory, at)
    if len(patches := everyone.z["patch"]):
        of = sets[ibot.parts(c).sets["patch"]]
        recentre(c, memory["center_patch"], patches, of, temperature_at(c, at))


def _own(c: Config) -> DINOv2:
    assert isinstance(c.method, DINOv2)
    return c.method
