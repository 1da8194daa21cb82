"""What one pass of an encoder over a set of images leaves behind; every task starts from it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


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


def labelled(train: Features, test: Features) -> tuple[Ints, int, Ints]:
    """Labels of both parts, checked: (N,) int64, the number of classes there may be, and (n,) int64.

    Raises:
        ValueError: a part without images or labels, features that are not finite or all zero, other names of
            classes in either part, or widths that differ.
    """
    for part, features in (("training", train), ("test", test)):
        if not len(features):
            raise ValueError(f"there are no {part} images")
        if features.labels is None:
            raise ValueError(f"the {part} images have no labels, which this compares with")
        if int(features.labels.min()) < 0:
            raise ValueError(f"{part} labels start at {int(features.labels.min())}; classes are numbered from 0")
        bad = int((~torch.isfinite(features.last)).any(1).sum())
        if bad:
            raise ValueError(
                f"{bad} of {len(features)} {part} features are NaN or infinite; look for the step where training "
                "diverged"
            )
        dead = int((features.last == 0).all(1).sum())
        if dead:
            raise ValueError(f"{dead} of {len(features)} {part} features are all zero and have no direction")
    if train.classes and test.classes and train.classes != test.classes:
        raise ValueError("training and test images number their classes differently; open both parts together")
    if train.last.shape[1] != test.last.shape[1]:
        raise ValueError(f"training features have {train.last.shape[1]} columns, test features {test.last.shape[1]}")
    assert train.labels is not None
    assert test.labels is not None
    most = max(int(train.labels.max()), int(test.labels.max())) + 1
    return train.labels.numpy(), max(len(train.classes), most), test.labels.numpy()
