"""Prototype sets: K vectors seen from a student's and a teacher's side, and how they are learned.

Every way to learn prototypes answers the same calls, so every objective runs with each of them. One set
belongs to one head; a method with several heads has several named sets.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uncollapse.distributed import Group
from uncollapse.losses.diversity import spanning_pairs, spread
from uncollapse.losses.koleo import nearest_neighbours
from uncollapse.prototypes.vmf import vmf_bias
from uncollapse.targets.softmax import SoftmaxTargets

Side = Literal["student", "teacher"]


class Prototypes(nn.Module):
    """What an objective may ask of a set. The defaults do nothing, which is right for most ways to learn."""

    lasting = True
    """Whether prototype k of one step is prototype k of the next, so that it can be followed."""
    first_view = False
    """Whether it observes the first view of each image alone."""

    in_order = False
    """Whether it matters in which order rows come that it observes."""

    own_loss: Tensor | None = None
    """What a learner of the set's own minimised in the step under way, to be logged; None: there is none."""

    def affine(self, side: Side, temperature: float) -> tuple[Tensor, Tensor | None]:
        """``weight (K, D)`` and optional ``bias (K,)`` with ``logits = z @ weight.T / temperature + bias``.

        The temperature is in the call because a vMF normaliser depends on it.
        """
        raise NotImplementedError

    def vectors(self, side: Side) -> Tensor:
        """``(K, D)`` unit vectors, detached: what diagnosis looks at."""
        return F.normalize(self.affine(side, 1.0)[0].detach().float(), dim=-1)

    def targets(self, z: Tensor, temperature: float, shift: Tensor | None = None) -> SoftmaxTargets:
        """The teacher's targets for its projections ``z``, with ``shift (K,)`` added after the temperature."""
        weight, bias = self.affine("teacher", temperature)
        if shift is not None:
            bias = shift if bias is None else bias + shift
        return SoftmaxTargets(z, weight.detach(), temperature, None if bias is None else bias.detach())

    def means(self) -> Tensor:
        """``(K, D)``, detached: the centres of the clusters, where these are not the vectors in the logits."""
        return self.vectors("teacher")

    def regulariser(self) -> Tensor | None:
        """A term to add to the loss, already weighted."""
        return None

    def observe(self, z: Tensor, progress: float, weight: Tensor | None = None) -> None:
        """The decoupled update from the teacher's projections ``(n, D)`` of all ranks.

        ``progress`` is the share of training done; ``weight (n,)`` is how much each counts, so that a set which class
        and patch tokens share can balance two of the one against hundreds of the other.
        """

    def observe_positions(self, z: Tensor, progress: float, group: Group) -> bool:
        """The same from the projections ``(P, n, D)`` of this rank at each of P positions, added up over ``group``.

        Returns whether the set learns so; `observe` is left out then.
        """
        return False

    def posterior(self, z: Tensor, temperature: float) -> SoftmaxTargets:
        """The set's own target for teacher projections ``(..., D)``; only a mixture has one."""
        raise NotImplementedError(f"{type(self).__name__} has no posterior")

    def begin_at(self, vectors: Tensor) -> None:
        """Puts a set that has learned nothing yet where another one is: at its unit vectors ``(K, D)``."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Runs after the optimiser's step (re-normalisation, a clustering step of its own)."""

    def update_teacher(self, momentum: float) -> None:
        """Moves the teacher's side towards the student's."""


class JointPrototypes(Prototypes):
    """Prototypes learned by the encoder's own gradient: DINO's weight-normalised last layer.

    The student's rows are ``g · v / |v|``; the teacher's are an EMA of v and g, or the same (``followed`` false), as in
    MSN. With ``on_sphere`` they are v, which is put back on the unit sphere after every step, as in SwAV. ``vmf`` adds
    the log-normaliser of each row's von Mises-Fisher density to the logits. With a positive
    ``koleo_weight`` the student's rows are pushed apart by KoLeo-Proto or another ``diversity``. The nearest
    neighbours, or the spanning tree, are looked for every ``koleo_every`` steps; they serve until then and are
    checkpointed.
    """

    teacher_v: Tensor
    teacher_g: Tensor
    neighbours: Tensor
    neighbours_age: Tensor

    def __init__(
        self,
        count: int,
        dim: int,
        learn_norm: bool,
        koleo_weight: float,
        generator: torch.Generator,
        koleo_every: int = 1,
        vmf: bool = False,
        followed: bool = True,
        on_sphere: bool = False,
        diversity: str = "koleo",
    ) -> None:
        super().__init__()
        # The distribution of PyTorch's linear layer, which DINO's last layer keeps.
        start = (torch.rand(count, dim, generator=generator) * 2 - 1) / dim**0.5
        start = F.normalize(start, dim=-1) if on_sphere else start
        self.student_v = nn.Parameter(start)
        self.student_g = nn.Parameter(torch.ones(count, 1), requires_grad=learn_norm and not on_sphere)
        if followed:
            self.register_buffer("teacher_v", start.clone())
            self.register_buffer("teacher_g", torch.ones(count, 1))
        self.koleo_weight, self.koleo_every, self.diversity = koleo_weight, koleo_every, diversity
        self.vmf, self.followed, self.on_sphere = vmf, followed, on_sphere
        self._keeps_neighbours = koleo_weight > 0 and koleo_every > 1
        if self._keeps_neighbours:
            shape = (2, count - 1) if diversity == "mst" else (count,)
            self.register_buffer("neighbours", torch.zeros(shape, dtype=torch.long))
            self.register_buffer("neighbours_age", torch.zeros((), dtype=torch.long))

    def affine(self, side: Side, temperature: float) -> tuple[Tensor, Tensor | None]:
        if self.on_sphere:
            return self.student_v, None
        own = self.followed and side == "teacher"
        v, g = (self.teacher_v, self.teacher_g) if own else (self.student_v, self.student_g)
        weight = F.normalize(v, dim=-1) * g
        return weight, vmf_bias(weight, temperature) if self.vmf else None

    def regulariser(self) -> Tensor | None:
        if not self.koleo_weight:
            return None
        if self._keeps_neighbours and int(self.neighbours_age) % self.koleo_every == 0:
            search = spanning_pairs if self.diversity == "mst" else nearest_neighbours
            self.neighbours.copy_(search(self.student_v))
        neighbours = self.neighbours if self._keeps_neighbours else None
        return self.koleo_weight * spread(self.diversity, self.student_v, neighbours)

    @torch.no_grad()
    def begin_at(self, vectors: Tensor) -> None:
        self.student_v.copy_(vectors)
        if self.followed:
            self.teacher_v.copy_(vectors)

    def after_step(self) -> None:
        if self.on_sphere:
            with torch.no_grad():
                self.student_v.copy_(F.normalize(self.student_v, dim=-1))
        if self._keeps_neighbours:
            self.neighbours_age += 1

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        if not self.followed:
            return
        self.teacher_v.lerp_(self.student_v.detach(), 1 - momentum)
        self.teacher_g.lerp_(self.student_g.detach(), 1 - momentum)


class FixedPrototypes(Prototypes):
    """Directions that never move, random or a `simplex`: the control every comparison needs."""

    weight: Tensor

    def __init__(self, count: int, dim: int, generator: torch.Generator, start: str = "random") -> None:
        super().__init__()
        rows = torch.randn(count, dim, generator=generator) if start == "random" else simplex(count, dim, generator)
        self.register_buffer("weight", F.normalize(rows, dim=-1))

    def begin_at(self, vectors: Tensor) -> None:
        self.weight.copy_(vectors)

    def affine(self, side: Side, temperature: float) -> tuple[Tensor, Tensor | None]:
        return self.weight, None


def simplex(count: int, dim: int, generator: torch.Generator) -> Tensor:
    """``(K, D)`` unit vectors, every two at a cosine of ``-1 / (K - 1)``, turned at random: the corners of a simplex.

    No K vectors are further apart (the simplex equiangular tight frame of neural collapse; Papyan, Han & Donoho 2020).

    Raises:
        ValueError: K above D + 1.
    """
    if count > dim + 1:
        raise ValueError(f"a simplex in {dim} dimensions has at most {dim + 1} corners, not {count}")
    ones = torch.ones(count, 1, dtype=torch.float64)
    corners = torch.linalg.qr(torch.cat([ones, torch.eye(count, dtype=torch.float64)[:, 1:]], dim=1)).Q[:, 1:]
    turn = torch.linalg.qr(torch.randn(dim, count - 1, generator=generator, dtype=torch.float64)).Q
    return F.normalize(corners @ turn.T, dim=-1).float()
