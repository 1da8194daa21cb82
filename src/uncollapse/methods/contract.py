"""What a method and the training loop say to one another.

A method is a module of plain functions (see `dino`, the shortest). The loop asks in this order and owns everything
else: devices, precision, gathering over ranks, accumulation, logging of every named term, saving.

    see_student, see_teacher, [observe], assign, objective, [teacher's average], step, remember, [teacher's average]

Everything is keyed by name: views by group ("global", "local"), projections by level ("cls", "patch"), prototypes and
heads by set. ``c`` is the run's `Config`; what a method has of its own is in ``c.method``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from uncollapse.config.schema import Config
from uncollapse.distributed import Group, same_everywhere
from uncollapse.models.network import Encoder
from uncollapse.prototypes.sets import Prototypes
from uncollapse.targets.softmax import SoftmaxTargets

Sets = Mapping[str, Prototypes]
Memory = dict[str, Tensor]
Targets = dict[str, SoftmaxTargets]


class Batch(NamedTuple):
    """A step's images as views, on the device. Views of a group are a list: their sizes differ between groups."""

    views: Mapping[str, list[Tensor]]
    """Group → one ``(n, 3, S, S)`` for each view."""
    masks: Mapping[str, Tensor]
    """Group → ``(V, n, P)`` bool, True where a patch is hidden from the student; groups without masks are missing.
    "predicted": which of the hidden patches of the global views the student predicts, where that is not all."""
    keys: Tensor
    """``(V, n)`` int64, one for each image of each view, all groups in their order: what stochastic depth is drawn
    from, so that it depends on (seed, step, place in the whole batch, view) and on nothing else."""

    def to(self, device: torch.device) -> Batch:
        views = {name: [v.to(device, non_blocking=True) for v in group] for name, group in self.views.items()}
        masks = {name: mask.to(device, non_blocking=True) for name, mask in self.masks.items()}
        return Batch(views, masks, self.keys.to(device, non_blocking=True))

    def only(self, group: str) -> Batch:
        """Without the views of other groups."""
        return self._replace(views={group: self.views[group]})

    def part(self, of: slice) -> Batch:
        """The images ``of`` of every view."""
        views = {name: [view[of] for view in group] for name, group in self.views.items()}
        return Batch(views, {name: mask[:, of] for name, mask in self.masks.items()}, self.keys[:, of])


@dataclass(frozen=True)
class Seen:
    """What one side made of a batch, float32."""

    z: dict[str, Tensor]
    """Level → ``(V, n, D)`` for V views of every image, ``(V, n, T, D)`` for the T regions of each, or ``(M, D)`` for M
    tokens."""
    weight: dict[str, Tensor] = field(default_factory=dict)
    """Level → ``(M,)``: how much each token counts in the loss."""
    image: dict[str, Tensor] = field(default_factory=dict)
    """Level → ``(M,)`` int64: the image that each token is of."""
    mean: dict[str, Tensor] = field(default_factory=dict)
    """Level → ``(D,)``: mean over tokens that ``z`` leaves out too, where the method needs it."""
    features: dict[str, Tensor] = field(default_factory=dict)
    """Level → ``(V, n, ..., d)``: the encoder's own features, of this process's images, where the method needs them."""
    key: dict[str, Tensor] = field(default_factory=dict)
    """Level → ``(M,)`` int64 of `token_keys`: which token it is, whatever the number of ranks."""
    place: dict[str, Tensor] = field(default_factory=dict)
    """Level → ``(M,)`` int64: the position in its view that each token has."""
    every: dict[str, Tensor] = field(default_factory=dict)
    """Level → ``(P, n, D)``: the tokens at each of P positions, this rank's alone, where the method balances each
    position on its own."""


class At(NamedTuple):
    """The clock: where training is, for everything that changes with it."""

    step: int
    epoch: float
    """Epochs done."""
    progress: float
    """Share of all steps done."""
    seed: int
    group: Group
    """Ranks whose rows are balanced and averaged together; None: this process alone."""


@dataclass(frozen=True)
class Parts:
    """What a method needs built, besides the backbone."""

    sets: dict[str, str] = field(default_factory=lambda: {"cls": "cls"})
    """Level → the set of prototypes it is compared with."""
    targets: dict[str, str] = field(default_factory=dict)
    """Target → the level whose projections it is of; empty: one for each level, named as it is."""
    average: str = "after"
    """When the teacher follows: ``after`` the student's step, or ``before`` it."""
    hide: tuple[float, tuple[float, float]] | None = None
    """Which share of the global views has hidden patches, and between which shares of them; None: no masks."""
    hide_evenly: bool = False
    """Whether a batch has exactly that share of such views, with ratios spread evenly; else each view draws its own."""
    drop: float = 0.0
    """Which share of their patches global views are seen without by the student, the same for a whole batch."""
    predict: tuple[float, float] | None = None
    """Which share of each global view's patches is hidden around one visible block, and which share of these the
    student predicts (masks "global" and "predicted"); None: no such masks."""
    uninformed: dict[str, float] = field(default_factory=dict)
    """Term → what it is when the student predicts all prototypes alike: where a loss that stays there is stuck."""

    def levels(self, name: str) -> list[str]:
        """The levels of a set."""
        return [level for level, of in self.sets.items() if of == name]

    def names(self) -> list[str]:
        """The sets, the first level's first."""
        return list(dict.fromkeys(self.sets.values()))


class Method(Protocol):
    """The functions of a method's module. None of them but ``remember`` changes anything."""

    def parts(self, c: Config) -> Parts: ...

    def memory(self, c: Config) -> Memory:
        """What a method carries from step to step (centres, queues): moved to the device, kept in the checkpoint."""
        ...

    def see_student(self, c: Config, net: Encoder, batch: Batch) -> Seen: ...

    def see_teacher(self, c: Config, net: Encoder, batch: Batch, student: Seen | None) -> Seen:
        """Without gradient. ``student`` is what the student saw, for a method without a teacher; else None."""
        ...

    def assign(self, c: Config, teacher: Seen, sets: Sets, memory: Memory, at: At) -> Targets:
        """Targets for the rows of ``teacher``, by name."""
        ...

    def objective(self, c: Config, student: Seen, targets: Targets, sets: Sets, at: At) -> dict[str, Tensor]:
        """The terms of the loss by name, weighted: their sum is minimised."""
        ...

    def remember(self, c: Config, everyone: Seen, sets: Sets, memory: Memory, at: At) -> None:
        """From the teacher's rows of all ranks: updates ``memory`` in place, once the student has learned."""
        ...


def method_of(c: Config) -> Method:
    """The module of the method that ``c`` names."""
    return cast(Method, import_module(f"uncollapse.methods.{c.method.name}"))


def at_most(rows: Tensor, key: Tensor | None, most: int, at: At) -> Tensor:
    """So many of the rows ``(M, D)`` of all ranks, at random, the same and in the same order on any number of ranks.

    ``key (M,)`` of `token_keys` says which token a row is; None: rows are in one order on any number of ranks.
    """
    if key is not None:
        return rows[key.argsort()[:most]]
    return rows[torch.randperm(len(rows), generator=same_everywhere(at.seed, at.step))[:most].to(rows.device)]


def part_of(targets: SoftmaxTargets, images: slice, image: Tensor | None) -> SoftmaxTargets:
    """The targets of some images; ``image (M,)`` says which image each row is of, where rows are tokens."""
    features = None if targets.features is None else targets.features[:, images]
    if targets.z.ndim > 2:
        rows = targets.z[:, images]
    else:
        assert image is not None
        first, stop, _ = images.indices(1 << 62)
        rows = targets.z[(image >= first) & (image < stop)]
    return replace(targets, z=rows, features=features)
