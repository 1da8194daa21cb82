"""Prototype sets: K vectors seen from a student's and a teacher's side, and how they are learned.

Every way to learn prototypes answers the same calls, so every objective runs with each of them. One set
belongs to one head; a method with several heads has several named sets.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uncollapse.losses.koleo import koleo_proto, nearest_neighbours
from uncollapse.targets.softmax import SoftmaxTargets

Side = Literal["student", "teacher"]


class Prototypes(nn.Module):
    """What an objective may ask of a set. The defaults do nothing, which is right for most ways to learn."""

    def affine(self, side: Side) -> tuple[Tensor, Tensor | None]:
        """``weight (K, D)`` and optional ``bias (K,)`` with ``logits = z @ weight.T / temperature + bias``."""
        raise NotImplementedError

    def logits(self, z: Tensor, side: Side, temperature: float = 1.0) -> Tensor:
        """``(n, D)`` projections → ``(n, K)`` logits. The temperature is in the call because a vMF normaliser
        and a mixture's variance depend on it."""
        weight, bias = self.affine(side)
        logits = z @ weight.T / temperature
        return logits if bias is None else logits + bias

    def vectors(self, side: Side) -> Tensor:
        """``(K, D)`` unit vectors, detached: what diagnosis looks at."""
        return F.normalize(self.affine(side)[0].detach().float(), dim=-1)

    def means(self) -> Tensor:
        """``(K, D)``, detached: the centres of the clusters, where these are not the vectors in the logits."""
        return self.vectors("teacher")

    def regulariser(self) -> Tensor | None:
        """A term to add to the loss, already weighted."""
        return None

    def observe(self, z: Tensor, progress: float, weight: Tensor | None = None, level: str = "cls") -> None:
        """The decoupled update from the teacher's projections ``(n, D)`` of all ranks.

        ``progress`` is the share of training done; ``weight (n,)`` and ``level`` let a head that class and
        patch tokens share balance two of the one against hundreds of the other.
        """

    def posterior(self, z: Tensor, temperature: float) -> SoftmaxTargets:
        """The set's own target for teacher projections ``(T, n, D)``; only a mixture has one."""
        raise NotImplementedError(f"{type(self).__name__} has no posterior")

    def after_step(self) -> None:
        """Runs after the optimiser's step (re-normalisation, a clustering step of its own)."""

    def update_teacher(self, momentum: float) -> None:
        """Moves the teacher's side towards the student's."""


class JointPrototypes(Prototypes):
    """Prototypes learned by the encoder's own gradient: DINO's weight-normalised last layer.

    The student's rows are ``g · v / |v|``; the teacher's are an EMA of v and g. With a positive
    ``koleo_weight`` the student's rows are pushed apart by KoLeo-Proto, whose nearest neighbours are looked for every
    ``koleo_every`` steps; what is found serves until then and is checkpointed.
    """

    teacher_v: Tensor
    teacher_g: Tensor
    neighbours: Tensor
    neighbours_age: Tensor

    def __init__(
        self, count: int, dim: int, learn_norm: bool, koleo_weight: float, generator: torch.Generator,
        koleo_every: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        # The distribution of PyTorch's linear layer, which DINO's last layer keeps.
        start = (torch.rand(count, dim, generator=generator) * 2 - 1) / dim**0.5
        self.student_v = nn.Parameter(start)
        self.student_g = nn.Parameter(torch.ones(count, 1), requires_grad=learn_norm)
        self.register_buffer("teacher_v", start.clone())
        self.register_buffer("teacher_g", torch.ones(count, 1))
        self.koleo_weight, self.koleo_every = koleo_weight, koleo_every
        self._keeps_neighbours = koleo_weight > 0 and koleo_every > 1
        if self._keeps_neighbours:
            self.register_buffer("neighbours", torch.zeros(count, dtype=torch.long))
            self.register_buffer("neighbours_age", torch.zeros((), dtype=torch.long))

    def affine(self, side: Side) -> tuple[Tensor, Tensor | None]:
        v, g = (self.student_v, self.student_g) if side == "student" else (self.teacher_v, self.teacher_g)
        return F.normalize(v, dim=-1) * g, None

    def regulariser(self) -> Tensor | None:
        if not self.koleo_weight:
            return None
        if self._keeps_neighbours and int(self.neighbours_age) % self.koleo_every == 0:
            self.neighbours.copy_(nearest_neighbours(self.student_v))
        neighbours = self.neighbours if self._keeps_neighbours else None
        return self.koleo_weight * koleo_proto(self.student_v, neighbours=neighbours)

    def after_step(self) -> None:
        if self._keeps_neighbours:
            self.neighbours_age += 1

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        self.teacher_v.lerp_(self.student_v.detach(), 1 - momentum)
        self.teacher_g.lerp_(self.student_g.detach(), 1 - momentum)


class FixedPrototypes(Prototypes):
    """Random directions that never move: the control every comparison needs."""

    weight: Tensor

    def __init__(self, count: int, dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("weight", F.normalize(torch.randn(count, dim, generator=generator), dim=-1))

    def affine(self, side: Side) -> tuple[Tensor, Tensor | None]:
        return self.weight, None
