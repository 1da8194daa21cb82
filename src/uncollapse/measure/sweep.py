"""Component counts at every ε from one spanning tree, and each prototype's nearest neighbour, in one pass.

The minimum spanning tree over cosine distances holds the connected components of every ε-graph: cut its edges
that are at least ε long and count the pieces. `uncollapse diagnose` is whom it is for: its curves over all ε then cost
about as much as one ε does by comparing all pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uncollapse.measure.unique import EPSILONS, components, greedy_cover, row_has_neighbour
from uncollapse.neighbours.spanning_tree import SpanningTree, spanning_tree


@dataclass(frozen=True)
class Sweep:
    """Counts along a sweep of ε; each maps ε, in the order given, to a number between 0 and K."""

    unique: dict[float, int]
    components: dict[float, int]
    no_neighbour: dict[float, int]


def complete_sweep(
    w: Tensor,
    epsilons: Sequence[float] = EPSILONS,
    tree: SpanningTree | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Sweep:
    """The greedy count, the connected components and the rows without a neighbour, at every ε.

    All three are exact (what `unique_prototypes`, `components` and `no_neighbour` return): where an ε lies
    too close to a length of the tree to be read from it, the pairs are compared again.

    Args:
        w: (K, D) floating. epsilons: cosine distances in (0, 2]. tree: of ``w``, where it is at hand.
        progress: told the share of ``epsilons`` that are done.

    Raises:
        ValueError: as `greedy_cover`.
    """
    tree = spanning_tree(w) if tree is None else tree
    unique: dict[float, int] = {}
    linked: dict[float, int] = {}
    alone: dict[float, int] = {}
    stars = -1  # the last number of components, where every row was within eps of the first of its component
    for i, eps in enumerate(sorted(set(epsilons))):
        progress(i / len(epsilons))
        if not 0 < eps <= 2:
            raise ValueError(f"eps is a cosine distance, 1 - cos, and must lie in (0, 2], got {eps}")
        crowd = np.flatnonzero(tree.nearest < eps + tree.slack)
        unsure = crowd[tree.nearest[crowd] >= eps - tree.slack]
        has = row_has_neighbour(w, torch.from_numpy(unsure), eps) if len(unsure) else np.empty(0, bool)
        alone[eps] = len(w) - len(crowd) + int((~has).sum())
        linked[eps] = _components(w, tree, eps)
        if linked[eps] == stars:  # the same components as at a smaller eps: they still are stars
            unique[eps] = stars
            continue
        # A row with no neighbour is kept and removes nothing, so greedy need only look at the others.
        crowd = np.setdiff1d(crowd, unsure[~has], assume_unique=True)
        kept = len(greedy_cover(w[torch.from_numpy(crowd).to(w.device)], eps)) if len(crowd) else 0
        unique[eps] = len(w) - len(crowd) + kept
        stars = linked[eps] if linked[eps] == unique[eps] else -1
    return Sweep(*({eps: counts[eps] for eps in epsilons} for counts in (unique, linked, alone)))


def _components(w: Tensor, tree: SpanningTree, eps: float) -> int:
    low, high = np.searchsorted(tree.lengths, [eps - tree.slack, eps + tree.slack])
    return len(w) - int(low) if low == high else components(w, eps)


def wide_of(sweep: Sweep | None) -> int | None:
    """The count at the wide ε that tells bunched prototypes, where the sweep has it."""
    return None if sweep is None else sweep.unique.get(WIDE)


WIDE = 0.25
