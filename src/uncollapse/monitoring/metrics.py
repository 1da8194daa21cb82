"""The measures as torchmetrics metrics: what they keep between batches, and how ranks add it up.

Each computes what the function of its name does, on everything that was given to ``update`` since the last ``reset``,
on all ranks. They take tensors of any float type and device, and what they keep stays on that device. ``key`` is the
name that `PrototypeCallback` logs it under.

Ranks must update alike: one that has no rows left passes ``z`` of no rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from uncollapse.measure.geometry import effective_rank_of_gram, finite
from uncollapse.measure.information import view_information
from uncollapse.measure.monitor import alive_prototypes, alive_window, nearest_cosine, projection_argmax
from uncollapse.measure.unique import unique_prototypes
from uncollapse.measure.usage import (
    effective_prototypes,
    prototype_argmax,
    unique_among_used,
    usage_counts,
    used_prototypes,
)


def at(name: str, eps: float) -> str:
    """``unique@0.025``: a measure at an ε."""
    return f"{name}@{eps:g}"


def _first(copies: Tensor) -> Tensor:
    return copies[0]


def _number(value: float, device: torch.device) -> Tensor:
    return torch.tensor(float(value), device=device)


def _together(rows: list[Tensor] | Tensor) -> Tensor | None:
    """``(V, n, D)`` of what was kept as ``(n, V, D)`` batch by batch; after ranks were gathered it is one tensor."""
    rows = torch.cat(rows) if isinstance(rows, list) and rows else rows
    return rows.transpose(0, 1) if isinstance(rows, Tensor) and len(rows) else None


class _OfVectors(Metric):
    """Keeps the prototypes that were passed last; ranks have the same ones."""

    higher_is_better = True
    is_differentiable = False
    full_state_update = True
    w: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("w", torch.zeros(0, 0), dist_reduce_fx=_first)

    def _take(self, w: Tensor) -> None:
        self.w = w.detach().clone()

    def _vectors(self) -> Tensor:
        if not len(self.w):
            raise ValueError(f"{type(self).__name__} has seen no prototypes: call update before compute")
        return self.w


class UniquePrototypesMetric(_OfVectors):
    """`unique_prototypes`: ``update(w (K, D))``, ``compute()`` → float32 scalar in [1, K].

    Args:
        eps: cosine distance in (0, 2].
        kwargs: of any torchmetrics metric.
    """

    def __init__(self, eps: float = 0.025, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.eps, self.key = eps, at("unique", eps)

    def update(self, w: Tensor) -> None:
        """Takes the prototypes ``(K, D)``, floating, in place of the ones before."""
        self._take(w)

    def compute(self) -> Tensor:
        return _number(unique_prototypes(self._vectors(), self.eps), self.w.device)


class NearestCosineMetric(_OfVectors):
    """`nearest_cosine`: ``update(w (K, D))``, ``compute()`` → float32 scalar in [-1, 1]; 1 where all are copies."""

    higher_is_better = False
    key = "nearest_cosine"

    def update(self, w: Tensor) -> None:
        """Takes the prototypes ``(K, D)``, floating, in place of the ones before."""
        self._take(w)

    def compute(self) -> Tensor:
        return _number(nearest_cosine(self._vectors()), self.w.device)


class _OfUse(_OfVectors):
    """Counts on how many rows each prototype is the nearest by cosine."""

    counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", torch.zeros(0, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, z: Tensor, w: Tensor) -> None:
        """Adds projections ``(n, D)`` of held-out images, one view each, to what prototypes ``(K, D)`` were used for.

        Raises:
            ValueError: shapes disagree, a row is zero or non-finite, or K is another one than before.
        """
        self._take(w)
        if len(self.counts) not in (0, len(w)):
            raise ValueError(f"{len(w)} prototypes after {len(self.counts)}; call reset before another set")
        counts = usage_counts(prototype_argmax(z, w), len(w)) if len(z) else torch.zeros(len(w)).long().to(w.device)
        self.counts = self.counts + counts if len(self.counts) else counts


class UsedPrototypesMetric(_OfUse):
    """`used_prototypes`: ``update(z (n, D), w (K, D))``, ``compute()`` → float32 scalar in [1, K]. Print n too."""

    key = "used"

    def compute(self) -> Tensor:
        self._vectors()
        return _number(used_prototypes(self.counts), self.counts.device)


class UniqueAmongUsedMetric(_OfUse):
    """`unique_among_used`: ``update(z (n, D), w (K, D))``, ``compute()`` → float32 scalar in [1, used].

    Args:
        eps: cosine distance in (0, 2].
        kwargs: of any torchmetrics metric.
    """

    def __init__(self, eps: float = 0.025, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.eps, self.key = eps, at("unique_among_used", eps)

    def compute(self) -> Tensor:
        return _number(unique_among_used(self._vectors(), self.counts, self.eps), self.counts.device)


class EffectivePrototypesMetric(_OfUse):
    """`effective_prototypes`: ``update(z (n, D), w (K, D))``, ``compute()`` → float32 scalar in [1, used].

    Args:
        eps: cosine distance in (0, 2].
        kwargs: of any torchmetrics metric.
    """

    def __init__(self, eps: float = 0.025, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.eps, self.key = eps, at("effective", eps)

    def compute(self) -> Tensor:
        return _number(effective_prototypes(self.counts, self._vectors(), self.eps), self.counts.device)


class AlivePrototypesMetric(Metric):
    """`alive_prototypes`, which `PrototypeMonitor` follows on one rank, over all of them.

    ``update(z (n, D), w (K, D))`` once per training step, ``compute()`` → float32 scalar in [0, K]. ``reset`` forgets
    the past; what it keeps is in the ``state_dict`` of a model that it is an attribute of.

    Args:
        prototypes: K.
        rows: per update over all ranks; sets the window when none is given, as `PrototypeMonitor` does.
        window: updates within which a prototype must have been an argmax to be alive.
        kwargs: of any torchmetrics metric.

    Raises:
        ValueError: fewer than one prototype or row, or a negative window.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = True
    key = "alive"
    last_used: Tensor
    called: Tensor

    def __init__(self, prototypes: int, rows: int, window: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.window = alive_window(prototypes, rows, window)
        never = torch.full((prototypes,), -1, dtype=torch.long)
        self.add_state("last_used", never, dist_reduce_fx="max", persistent=True)
        self.add_state("called", torch.zeros((), dtype=torch.long), dist_reduce_fx="max", persistent=True)

    def update(self, z: Tensor, w: Tensor) -> None:
        """Notes the nearest prototype of every projection; rows that are not finite count for none.

        Raises:
            ValueError: shapes disagree, or K is another one than this was made for.
        """
        if len(w) != len(self.last_used):
            raise ValueError(f"{len(w)} prototypes; this metric was made for {len(self.last_used)}")
        argmax = projection_argmax(z, F.normalize(w.detach().float(), dim=-1))
        self.called = self.called + 1
        # Rows that are not finite go to a place after the last, so that a GPU is not waited for.
        place = torch.where(z.isfinite().all(-1), argmax, len(w)).to(self.last_used.device)
        used = F.pad(self.last_used, (0, 1))
        used[place] = self.called
        self.last_used = used[:-1]

    def compute(self) -> Tensor:
        return _number(alive_prototypes(self.last_used, self.called, self.window), self.last_used.device)


class ViewInformationMetric(_OfVectors):
    """`view_information` in bits: ``update(z_views (V, n, D), w (K, D))``, ``compute()`` → float32 scalar.

    All projections are kept, on all ranks when it computes: pass as many images as there is memory for. Without images
    to fit on, each half of the images is scored by what was fitted on the other half.
    """

    key = "view_information"
    scored: list[Tensor] | Tensor
    fitting: list[Tensor] | Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("scored", [], dist_reduce_fx="cat")
        self.add_state("fitting", [], dist_reduce_fx="cat")

    def update(self, z_views: Tensor, w: Tensor, fit: bool = False) -> None:
        """Adds projections of V ≥ 2 views of each of n held-out images; ``fit``: of other images, to fit on.

        Raises:
            ValueError: shapes disagree.
        """
        self._take(w)
        if z_views.ndim != 3 or w.ndim != 2 or z_views.shape[-1] != w.shape[-1]:
            got = f"{tuple(z_views.shape)} and {tuple(w.shape)}"
            raise ValueError(f"need projections (views, images, D) and prototypes (K, D), got {got}")
        rows = self.fitting if fit else self.scored
        assert isinstance(rows, list)
        rows.append(z_views.detach().transpose(0, 1))

    def compute(self) -> Tensor:
        vectors, scored, fitting = self._vectors(), _together(self.scored), _together(self.fitting)
        if scored is None:
            raise ValueError("ViewInformationMetric has seen no images to score: call update before compute")
        return _number(view_information(scored, vectors, fitting).bits, vectors.device)


class EffectiveRankMetric(Metric):
    """`effective_rank` of projections: ``update(z (n, D))``, ``compute()`` → float32 scalar in [1, min(n, D)]."""

    higher_is_better = True
    is_differentiable = False
    full_state_update = True
    key = "effective_rank"
    gram: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("gram", torch.zeros(0, 0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, z: Tensor) -> None:
        """Adds projections ``(n, D)``.

        Raises:
            ValueError: no floating matrix, or one with values that are not finite.
        """
        z = finite(z).double() if len(z) else z.double()
        self.gram = z.T @ z + (self.gram if len(self.gram) else 0)

    def compute(self) -> Tensor:
        if not len(self.gram):
            raise ValueError("EffectiveRankMetric has seen no projections: call update before compute")
        return _number(effective_rank_of_gram(self.gram), self.gram.device)
