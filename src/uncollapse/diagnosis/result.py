"""What a diagnosis says of one set of prototypes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from uncollapse.measure.random_start import RandomLikeness
from uncollapse.measure.sweep import Sweep
from uncollapse.measure.verdict import Verdict


@dataclass(frozen=True)
class Source:
    """Where a matrix came from."""

    file: str
    key: str
    side: str
    """``student``, ``teacher``, ``shared`` (one matrix for both) or ``unstated``."""
    set: str = ""
    family: str = ""

    def __str__(self) -> str:
        side = "" if self.side == "unstated" else f"{self.side} "
        return f"{side}{self.set}".strip() or "tensor"


@dataclass
class Diagnosis:
    """What is known about one set of K prototypes. Dicts go from ε (cosine distance) to a number."""

    source: Source
    prototypes: int
    dim: int
    dtype: str
    zero_rows: int
    non_finite_rows: int
    """Rows without a direction; every count below is of the other rows."""
    unique: dict[float, int]
    """Greedy ε-cover in index order, the papers' definition; 0 where no row has a direction."""
    components: dict[float, int]
    """Connected components of the ε-graph; empty where only a single ε was counted."""
    no_neighbour: dict[float, int]
    """Prototypes without another one within ε."""
    unique_means: dict[float, int]
    """The papers' literal count of a mixture's means, where its logits use other directions; else ``unique``."""
    sweep: Sweep | None
    """All three along 40 ε up to 0.5."""
    groups: np.ndarray
    """Sizes of the groups at the headline ε (every prototype with its nearest kept one), largest first."""
    nearest: dict[str, float]
    """Quantiles of the cosine distance to the nearest other prototype: min, median, max."""
    norms: dict[str, float]
    """Lengths of the effective prototypes (g under weight norm): min, median, max."""
    random: RandomLikeness | None
    verdict: Verdict
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Of the single-ε count, of the rest, and (measured on a tile) of the product a single ε needs."""
    vectors: Tensor | None = field(default=None, repr=False)
    """(K', D) rows that have a direction, and the group of each, for drawing and for images."""
    group_of: Tensor | None = field(default=None, repr=False)
    rows: Tensor | None = field(default=None, repr=False)
    """(K',) their rows in the file, on the CPU."""
    images: Any = None
    """`uncollapse.diagnosis.images.ImageFindings`, where images were given."""

    @property
    def epsilon(self) -> float:
        return next(iter(self.unique))

    @property
    def share(self) -> float:
        """Unique prototypes at the headline ε, of all K."""
        return self.unique[self.epsilon] / self.prototypes

    def to_json(self) -> dict[str, Any]:
        """Plain types only; ε as text keys, without trailing zeros."""

        def keyed(values: dict[float, Any]) -> dict[str, Any]:
            return {f"{eps:g}": value for eps, value in values.items()}

        out: dict[str, Any] = {
            "source": dataclasses.asdict(self.source),
            "prototypes": self.prototypes,
            "dim": self.dim,
            "dtype": self.dtype,
            "unique": keyed(self.unique),
            "unique_means": keyed(self.unique_means),
            "components": keyed(self.components),
            "no_neighbour": keyed(self.no_neighbour),
            "verdict": dataclasses.asdict(self.verdict),
            "zero_rows": self.zero_rows,
            "non_finite_rows": self.non_finite_rows,
            "groups": {
                "epsilon": self.epsilon,
                "count": len(self.groups),
                "largest": [int(n) for n in self.groups[:10]],
                "singletons": int((self.groups == 1).sum()),
            },
            "nearest": self.nearest,
            "norms": self.norms,
            "random_start": None if self.random is None else dataclasses.asdict(self.random),
            "sweep": None,
            "notes": self.notes,
            "seconds": {name: round(s, 4) for name, s in self.seconds.items()},
        }
        for name in ("nearest", "norms"):  # JSON has no infinity
            out[name] = {k: v if math.isfinite(v) else None for k, v in out[name].items()}
        if self.sweep is not None:
            out["sweep"] = {name: keyed(getattr(self.sweep, name)) for name in ("unique", "components", "no_neighbour")}
        if self.images is not None:
            out.update(self.images.to_json())
        return out
