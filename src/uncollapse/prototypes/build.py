"""The set a recipe names."""

from __future__ import annotations

import torch

from uncollapse.config.schema import Config, PrototypeConfig
from uncollapse.prototypes.decoupled import _mixture, mixture_defaults
from uncollapse.prototypes.sets import FixedPrototypes, JointPrototypes, Prototypes


def build_prototypes(config: PrototypeConfig, dim: int, rows: int, seed: int) -> Prototypes:
    """The set that ``config.kind`` names, started from ``seed`` alone.

    Args:
        config: validated.
        dim: D, length of a projection.
        rows: teacher projections per step over all ranks.
        seed: of the initial vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    if config.kind in ("joint", "koleo"):
        koleo = config.koleo_weight if config.kind == "koleo" else 0.0
        return JointPrototypes(config.count, dim, config.learn_norm, koleo, generator, config.koleo_every)
    if config.kind == "fixed":
        return FixedPrototypes(config.count, dim, generator)
    return _mixture(mixture_defaults(config.kind, config.mixture), config.count, dim, rows, generator)


def initial_prototypes(config: Config) -> Prototypes:
    """The prototype set before any step. Its seed differs from the encoder's, so that neither mirrors the other."""
    return build_prototypes(config.prototypes, config.head.bottleneck, 2 * config.run.batch, config.seed + 7919)
