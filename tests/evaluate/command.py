"""Class folders of noise, and the exit code of a command that has to fail."""

import numpy as np
import pytest
from PIL import Image

from uncollapse.cli.main import main


def images(folder, classes, each, size=12, seed=0):
    rng = np.random.default_rng(seed)
    for c in classes:
        (folder / c).mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / c / f"{i}.png")
    return folder


def failing(*words):
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", *map(str, words)])
    return caught.value.code
