"""Classes by how many training images they have, as the long-tailed literature counts them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
SPLITS = ("many", "medium", "few")


def splits(class_train: Ints) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Classes with many (> 100), medium (20 to 100) and few (1 to 19) training images: three (C,) masks."""
    return class_train > 100, (class_train >= 20) & (class_train <= 100), (class_train > 0) & (class_train < 20)
