"""Prototypes that an online mixture learns, out of the encoder's gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from uncollapse.config.schema import MixtureConfig
from uncollapse.prototypes.mixture import DISTILLING, PAPER, MixtureOptions, OnlineMixture
from uncollapse.prototypes.sets import Prototypes, Side
from uncollapse.targets.softmax import SoftmaxTargets


class MixturePrototypes(Prototypes):
    """Prototypes that are the means of an online Gaussian mixture; no gradient ever reaches them."""

    def __init__(
        self, mixture: OnlineMixture, anneal_start: float = 1.0, anneal_steps: float = 0.0, unit: bool = True
    ) -> None:
        """``unit``: whether projections come as unit vectors; else the mixture sees their directions."""
        super().__init__()
        self.unit = unit
        self.mixture = mixture
        self.in_order = mixture.renewed > 0
        self.lasting = not mixture.renewed
        self.anneal_start = anneal_start
        self.anneal_steps = anneal_steps

    def beta(self, progress: float) -> float:
        """Inverse temperature of the E-step: geometric from ``anneal_start`` to 1."""
        if progress >= self.anneal_steps:
            return 1.0
        return self.anneal_start ** (1 - progress / self.anneal_steps)

    def affine(self, side: Side, temperature: float) -> tuple[Tensor, Tensor | None]:
        return self.mixture.directions(), None

    def means(self) -> Tensor:
        return self.mixture.mean.detach().float()

    def observe(self, z: Tensor, progress: float, weight: Tensor | None = None) -> None:
        self.mixture.observe(self._unit(z), weight, self.beta(progress))

    def begin_at(self, vectors: Tensor) -> None:
        self.mixture.mean.copy_(vectors)

    def posterior(self, z: Tensor, temperature: float) -> SoftmaxTargets:
        """The mixture's own responsibilities, as sharp as its variances or its own temperature make them.

        The teacher's temperature does not enter: offsets balance the components only as they were found.
        """
        return self.mixture.targets(self._unit(z))

    def _unit(self, z: Tensor) -> Tensor:
        return z if self.unit else F.normalize(z, dim=-1)


def mixture_defaults(kind: str, chosen: MixtureConfig) -> MixtureConfig:
    """The mode's own value wherever the recipe says nothing.

    ``decoupled-paper`` reads the paper as literally as its published parts allow: one diagonal, annealed,
    unbalanced mixture over all K.
    """
    defaults = {
        "decoupled": MixtureConfig(**DISTILLING._asdict(), anneal_start=1.0, anneal_steps=0.0),
        "decoupled-paper": MixtureConfig(**PAPER._asdict(), anneal_start=0.05, anneal_steps=0.3),
    }[kind]
    names = MixtureConfig.__dataclass_fields__
    merged = {n: getattr(defaults, n) if getattr(chosen, n) is None else getattr(chosen, n) for n in names}
    return MixtureConfig(**merged)


def mixture_set(
    config: MixtureConfig, count: int, dim: int, rows: int, generator: torch.Generator, unit: bool
) -> MixturePrototypes:
    assert config.anneal_start
    options = {name: getattr(config, name) for name in MixtureOptions._fields}
    mixture = OnlineMixture(count, dim, rows, **options, generator=generator)
    return MixturePrototypes(mixture, config.anneal_start, config.anneal_steps or 0.0, unit)
