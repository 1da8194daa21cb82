"""WE-SSL: a weighted ensemble of heads on one backbone (Ruan et al., ICLR 2023, eq. 4 to 9 and Algorithm 1).

Over DINO: m heads, each with prototypes of its own, which differ by how they start alone. Each learns as DINO's one
does, and their losses are summed with weights that no gradient goes through: for a teacher view x of an image, softmax
over heads of -H(t_i(x)) / γ (ENT), or 1 / m (UNIF). PROB is the cross-entropy of the averages of all heads'
assignments instead, which amounts to a weight for each prototype.

As published: balanced targets instead of centred ones, 1024 prototypes in each head, and Table 7's γ in the unit of
Section 5.1, ln K. The table does not repeat that unit: if its γ is in nats, it is 6.9 times sharper. Not published, and
as in DINO here: prototypes wait for one epoch, and Sinkhorn takes three iterations. One head with several sets, several
heads with one, and MSN as a base are not here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from uncollapse.config.facts import head_names
from uncollapse.config.methods import WESSL
from uncollapse.config.schema import Config
from uncollapse.losses.cross_entropy import fused_cross_entropy
from uncollapse.losses.ensemble import Head, fused_mean_loss
from uncollapse.losses.pairs import pair_count
from uncollapse.methods.centre import CENTER, assigned, recentre, temperature_at
from uncollapse.methods.contract import At, Batch, Memory, Parts, Seen, Sets, Targets
from uncollapse.models.network import Encoder, Projected
from uncollapse.schedules import linear_epochs
from uncollapse.targets.softmax import row_entropies


def parts(c: Config) -> Parts:
    return Parts({name: name for name in head_names(c)}, uninformed={"cls": math.log(c.prototypes.count)})


def memory(c: Config) -> Memory:
    return {_center(name): torch.zeros(c.prototypes.count) for name in head_names(c)}


def see_student(c: Config, net: Encoder, batch: Batch) -> Seen:
    return _seen(net([view for group in batch.views.values() for view in group], keys=batch.keys))


def see_teacher(c: Config, net: Encoder, batch: Batch, student: Seen | None) -> Seen:
    return _seen(net(batch.views["global"]))


def assign(c: Config, teacher: Seen, sets: Sets, memory: Memory, at: At) -> Targets:
    tau = temperature_at(c, at)
    return {name: assigned(c, z, sets[name], tau, at.group, memory[_center(name)]) for name, z in teacher.z.items()}


def objective(c: Config, student: Seen, targets: Targets, sets: Sets, at: At) -> dict[str, Tensor]:
    tau = c.teacher.student_temperature
    affine = {name: sets[name].affine("student", tau) for name in student.z}
    if _own(c).weighting == "probability":
        return {"cls": fused_mean_loss([Head(z, *affine[n], targets[n]) for n, z in student.z.items()], tau)}
    losses = []
    for (name, z), share in zip(student.z.items(), shares(c, targets, at), strict=True):
        (views, images, _), seen = z.shape, len(targets[name].z)
        pairing = 1 - torch.eye(views, seen, device=z.device)
        counts = share.T / (images * pair_count(views, seen))
        weight, bias = affine[name]
        losses.append(fused_cross_entropy(z, weight, targets[name], tau, pairing, counts, bias))
    return {"cls": torch.stack(losses).sum()}


def remember(c: Config, everyone: Seen, sets: Sets, memory: Memory, at: At) -> None:
    for name, z in everyone.z.items():
        recentre(c, memory[_center(name)], z, sets[name], temperature_at(c, at))


def shares(c: Config, targets: Targets, at: At) -> Tensor:
    """``(m, T, n)``: how much each head counts for each teacher view of each image; they sum to 1 over heads."""
    own = _own(c)
    if own.weighting == "uniform":
        z = next(iter(targets.values())).z
        return z.new_full((len(targets), *z.shape[:2]), 1 / len(targets))
    gamma = linear_epochs(int(at.epoch), own.gamma_start, own.gamma, own.gamma_epochs)
    entropy = torch.stack([row_entropies(of) for of in targets.values()])
    return torch.softmax(-entropy / (gamma * math.log(c.prototypes.count)), dim=0)


def _seen(projected: Projected) -> Seen:
    return Seen({"cls": projected.cls, **projected.others})


def _center(name: str) -> str:
    return CENTER if name == "cls" else f"{CENTER}_{name}"


def _own(c: Config) -> WESSL:
    assert isinstance(c.method, WESSL)
    return c.method
