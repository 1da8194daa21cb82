"""Prototypes that are the teacher's projections of earlier images, out of the encoder's gradient.

As in MaSSL (Silva, Pedrini & Ramírez Rivera, *Learning from Memory*, ICML 2024): a queue in which the newest
projections push out the oldest takes the place of a last layer. It starts with random directions, which stand in until
it is full, as in their code. Their code keeps the second global view of each image, this the first; their random blocks
are CARP's, which goes with these prototypes. A longer queue, of which some are drawn every step, is how SOP begins (the
same authors, ICML 2025); that each drawn one speaks together with its neighbours is not here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from uncollapse.distributed import same_everywhere
from uncollapse.prototypes.sets import Prototypes, Side


class MemoryPrototypes(Prototypes):
    """The newest ``count`` projections as unit vectors; or, of a longer queue, as many drawn anew every step.

    What is observed enters after the step: no image is compared with itself. Draws depend on the seed and on how many
    projections have entered, so that ranks and resumed runs agree. Before ``count`` have entered, random directions
    make up the rest.

    Args:
        count: K.
        dim: D.
        generator: of the random directions.
        length: of the queue, at least K.
        seed: of the draws.

    Raises:
        ValueError: a queue shorter than K.
    """

    lasting, first_view = False, True
    weight: Tensor
    queue: Tensor
    entered: Tensor

    def __init__(
        self, count: int, dim: int, generator: torch.Generator, length: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        length = count if length is None else length
        if length < count:
            raise ValueError(f"{count} prototypes cannot be taken from a queue of {length}")
        self.draws, self.seed = length > count, seed
        start = F.normalize(torch.randn(length, dim, generator=generator), dim=-1)
        self.register_buffer("weight", start[:count].clone())
        if self.draws:
            self.register_buffer("queue", start)
        self.register_buffer("entered", torch.zeros((), dtype=torch.long))
        self._waiting: Tensor | None = None

    def begin_at(self, vectors: Tensor) -> None:
        self.weight = vectors.clone()
        if self.draws:
            self.queue[: len(vectors)] = vectors

    def affine(self, side: Side, temperature: float) -> tuple[Tensor, Tensor | None]:
        return self.weight, None

    @torch.no_grad()
    def observe(self, z: Tensor, progress: float, weight: Tensor | None = None) -> None:
        self._waiting = F.normalize(z.to(self.weight.dtype), dim=-1)

    @torch.no_grad()
    def after_step(self) -> None:
        new, self._waiting = self._waiting, None
        if new is None:
            return
        queue = self.queue if self.draws else self.weight
        new = new[: len(queue)]
        at = (self.entered + torch.arange(len(new), device=queue.device)) % len(queue)
        self.entered += len(new)
        queue = queue.index_copy(0, at, new)  # a copy: this step's targets are still looked at
        if not self.draws:
            self.weight = queue
            return
        self.queue = queue
        entered = int(self.entered)
        among = min(max(entered, len(self.weight)), len(queue))
        drawn = torch.randperm(among, generator=same_everywhere(self.seed, entered))[: len(self.weight)]
        self.weight = queue[drawn.to(queue.device)]
