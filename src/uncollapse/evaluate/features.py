"""What one pass of an encoder over a set of images leaves behind; every task starts from it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Features of n images, float32 on the CPU. Images that could not be read are left out of every tensor."""

    cls: Tensor
    """(n, L, d): class token after the final norm, of each of the last L blocks, the last block last; for a
    CNN the pooled map, L = 1."""
    mean: Tensor | None
    """(n, L, d): mean of the patch tokens of the same blocks; None for a CNN."""
    projections: Tensor | None
    """(n, D) unit vectors in the prototypes' space; None where the encoder has no head."""
    labels: Tensor | None
    """(n,) int64 into `classes`; None where the data has none."""
    indices: Tensor
    """(n,) int64: which images of the set."""
    classes: list[str]
    """Names; empty where the data has none."""

    def __len__(self) -> int:
        return len(self.cls)

    @property
    def last(self) -> Tensor:
        """(n, d): what kNN, clustering and retrieval look at."""
        return self.cls[:, -1]

    def take(self, which: Tensor) -> Features:
        """The rows ``which`` (int64 indices or a mask)."""
        return replace(
            self,
            cls=self.cls[which],
            mean=None if self.mean is None else self.mean[which],
            projections=None if self.projections is None else self.projections[which],
            labels=None if self.labels is None else self.labels[which],
            indices=self.indices[which],
        )
