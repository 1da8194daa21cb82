"""The set a recipe names."""

from __future__ import annotations

import torch
from torch.nn import Parameter

from uncollapse.config.facts import bottleneck_of, has_teacher, teacher_follows_prototypes, views_assigned
from uncollapse.config.schema import Config, PrototypeConfig
from uncollapse.prototypes.clustering import ClusteredPrototypes
from uncollapse.prototypes.decoupled import mixture_defaults, mixture_set
from uncollapse.prototypes.memory import MemoryPrototypes
from uncollapse.prototypes.sets import FixedPrototypes, JointPrototypes, Prototypes


def build_prototypes(
    config: PrototypeConfig,
    dim: int,
    rows: int,
    seed: int,
    unit: bool = True,
    followed: bool = True,
    own_student: bool = False,
    on_sphere: bool = False,
) -> Prototypes:
    """The set that ``config.kind`` names, started from ``seed`` alone.

    Args:
        config: validated.
        dim: D, length of a projection.
        rows: teacher projections per step over all ranks.
        seed: of the initial vectors.
        unit: whether projections are unit vectors.
        followed: whether a teacher's side of their own follows joint prototypes.
        own_student: whether the student learns weights of its own beside a clustering of the teacher's projections.
        on_sphere: whether joint prototypes are put back on the unit sphere after each step.
    """
    generator = torch.Generator().manual_seed(seed)
    if config.kind in ("joint", "koleo"):
        koleo = config.koleo_weight if config.kind == "koleo" else 0.0
        return JointPrototypes(
            config.count,
            dim,
            config.learn_norm,
            koleo,
            generator,
            config.koleo_every,
            config.vmf,
            followed,
            on_sphere,
            config.diversity,
        )
    if config.kind == "capi":
        return ClusteredPrototypes(config.count, dim, config.clustering, generator, own_student, config.learn_norm)
    if config.kind == "memory":
        return MemoryPrototypes(config.count, dim, generator, config.memory_length, seed)
    if config.kind == "fixed":
        return FixedPrototypes(config.count, dim, generator, config.start)
    return mixture_set(mixture_defaults(config.kind, config.mixture), config.count, dim, rows, generator, unit)


def carry_over(old: Prototypes, new: Prototypes) -> list[tuple[Parameter, Parameter]]:
    """Puts a set that has learned nothing yet where an old one is; pairs of parameters that go on as what they were.

    A set of the same kind takes all that the old one has; another one starts from its vectors.
    """
    have, take = old.state_dict(), new.state_dict()
    if type(old) is type(new) and all(name in take and take[name].shape == t.shape for name, t in have.items()):
        new.load_state_dict(have, strict=False)
        return list(zip(old.parameters(), new.parameters(), strict=True))
    new.begin_at(old.vectors("teacher"))
    return []


def initial_prototypes(config: Config, number: int = 0, levels: int = 1, name: str = "cls") -> Prototypes:
    """A set before any step. Its seed differs from the encoder's, so that neither mirrors the other.

    Args:
        config: validated.
        number: which of the method's sets; each starts elsewhere.
        levels: how many levels of tokens share it. Each counts in a mixture as much as the views of a batch that are
            assigned, mostly the two global ones.
        name: the set's.
    """
    seed, rows = config.seed + 7919 * (1 + number), views_assigned(config) * config.run.batch * levels
    unit, followed, on_sphere = config.head.normalise, teacher_follows_prototypes(config), not has_teacher(config)
    own = config.method.name == "capi"
    return build_prototypes(config.prototypes, bottleneck_of(config, name), rows, seed, unit, followed, own, on_sphere)
