"""Digests of image sets: equal exactly where images, labels and order are."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from uncollapse.config.schema import DataConfig
from uncollapse.data.fingerprint import image_digest, image_digests
from uncollapse.data.images import MemoryImages, subset
from uncollapse.data.load import load_images

IN_MEMORY, LAZY = DataConfig(), DataConfig(memory_gb=0)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / "images" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def both(path, config=IN_MEMORY, seed=0):
    return image_digests(*load_images(path, config, seed, progress=False))


def test_the_same_images_have_the_same_digest_wherever_they_lie_and_however_they_are_read(folder, tmp_path):
    first = both(folder)
    assert first["data_digest"] != first["held_out_digest"]
    assert both(folder) == first
    assert both(folder, LAZY) == first
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert both(tmp_path / "elsewhere") == first


@pytest.mark.parametrize("change", ["add", "remove", "rename", "swap classes", "replace", "seed"])
def test_other_images_have_another_digest(folder, change):
    first, seed = both(folder), 0
    image = folder / "class0" / "0.png"
    if change == "add":
        shutil.copy(image, folder / "class0" / "new.png")
    elif change == "remove":
        image.unlink()
    elif change == "rename":
        image.rename(folder / "class0" / "00.png")
    elif change == "swap classes":
        image.rename(folder / "class1" / "0.png")
    elif change == "replace":
        for path in folder.glob("*/*.png"):
            Image.open(path).resize((20, 20)).save(path)
    else:
        seed = 1
    assert both(folder, seed=seed) != first


def test_images_without_files_count_by_their_pixels_and_labels():
    canvas = torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = MemoryImages(canvas, torch.full((8, 2), 4), torch.arange(8) % 2, ["a", "b"])
    assert image_digest(images) == image_digest(subset(images, range(8)))
    assert image_digest(images) != image_digest(subset(images, [1, 0, *range(2, 8)]))
    assert image_digest(images) != image_digest(MemoryImages(255 - canvas, images.sizes, images.labels, ["a", "b"]))
    assert image_digest(images) != image_digest(MemoryImages(canvas, images.sizes, 1 - images.labels, ["a", "b"]))
    digits = [both("builtin:digits", seed=seed) for seed in (0, 0, 1)]
    assert digits[0] == digits[1]
    assert digits[0]["held_out_digest"] != digits[2]["held_out_digest"]
