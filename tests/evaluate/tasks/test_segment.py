"""Linear segmentation: far above chance on coloured shapes, at chance on shuffled masks; torchmetrics agrees."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from uncollapse.errors import DataError
from uncollapse.evaluate.encoder import EvalEncoder
from uncollapse.evaluate.tasks.segment import SegmentConfig, find_masks, miou, per_class, segment

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
QUICK = SegmentConfig(epochs=1, min_steps=80, lrs=(1e-2, 3e-2))
COLOURS = np.array([[30, 30, 30], [220, 40, 40], [40, 60, 220]])


def quiet(name: str, done: int, total: int, loss: float) -> None:
    pass


def vit() -> EvalEncoder:
    torch.manual_seed(0)
    options = {"patch_size": 4, "img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 2}
    return EvalEncoder(timm.create_model("vit_tiny_patch16_224", num_classes=0, **options), 32, *HALF, name="vit")


def shapes(images: Path, masks: Path, n: int, seed: int, first: int = 0, shuffled: bool = False) -> None:
    """A red and a blue rectangle on dark ground; ``first`` is added to the classes, and the rim is not counted."""
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(n):
        mask = np.zeros((40, 48), dtype=np.uint8)
        for c in rng.permutation([1, 2]):
            top, left = rng.integers(2, 20), rng.integers(2, 26)
            mask[top : top + rng.integers(10, 18), left : left + rng.integers(10, 18)] = c
        # Rolled around the edges: otherwise the middle of any image would fit the middle of any mask.
        drawn.append(np.roll(mask, (rng.integers(40), rng.integers(48)), (0, 1)))
    order = np.roll(np.arange(n), 1) if shuffled else np.arange(n)  # no image keeps its own
    for folder in (images, masks):
        folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        pixels = COLOURS[drawn[i]] + rng.integers(-20, 20, (40, 48, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(images / f"{i:02}.png")
        mask = drawn[order[i]] + np.uint8(first)
        mask[0] = 255
        Image.fromarray(mask).save(masks / f"{i:02}.png")


def made(root: Path, shuffled: bool = False, n: int = 40) -> Path:
    shapes(root / "train/images", root / "train/masks", n, 0, shuffled=shuffled)
    shapes(root / "val/images", root / "val/masks", 20, 1)
    return root


class Cnn(nn.Module):
    """Two strided convolutions, with the interface of timm's CNNs."""

    num_features = 24

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 24, 3, 2, 1), nn.ReLU())

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.stages(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_features(x).mean((2, 3))


def cnn() -> EvalEncoder:
    torch.manual_seed(0)
    return EvalEncoder(Cnn(), 32, *HALF)


@pytest.mark.parametrize("encoder", [vit, cnn])
def test_shapes_are_found_and_shuffled_masks_are_not(tmp_path, encoder):
    one = encoder()
    before = {n: t.clone() for n, t in one.module.state_dict().items()}
    right = segment(one, made(tmp_path / "right"), QUICK, report=quiet)
    assert all(torch.equal(before[n], t) for n, t in one.module.state_dict().items())
    wrong = segment(encoder(), made(tmp_path / "wrong", shuffled=True), QUICK, report=quiet)
    test = find_masks(tmp_path / "wrong")[1]
    truth = torch.cat([test.mask(i).flatten() for i in range(len(test))])
    # The best that one can do without looking: everything is ground.
    blind = float((truth == 0).sum() / (truth != 255).sum()) / 3
    assert right.metrics["miou"] > 0.75
    assert wrong.metrics["miou"] < blind + 0.05
    assert right.ci95[0] <= right.metrics["miou"] <= right.ci95[1]
    assert right.ci95[1] - right.ci95[0] < 0.15
    assert next(iter(right.metrics)) == "miou"
    assert set(right.details["iou"]) == {"0", "1", "2"}
    assert right.n == 20


def test_numbers_agree_with_torchmetrics(tmp_path):
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    rng = np.random.default_rng(0)
    # Class 4 is nowhere, class 3 only predicted.
    truth, found = torch.from_numpy(rng.integers(0, 3, (6, 9, 7))), torch.from_numpy(rng.integers(0, 4, (6, 9, 7)))
    truth[:, 0] = 255
    kept = truth != 255
    counts = np.zeros((3, 5))
    for k, part in enumerate((truth[kept & (truth == found)], found[kept], truth[kept])):
        counts[k] = torch.bincount(part, minlength=5).numpy()
    theirs = MulticlassJaccardIndex(5, ignore_index=255)(found, truth)
    assert miou(counts) == pytest.approx(float(theirs), abs=1e-6)
    each = MulticlassJaccardIndex(5, ignore_index=255, average="none")(found, truth)
    assert per_class(counts)[:4] == pytest.approx(each[:4].numpy(), abs=1e-6)
    assert math.isnan(per_class(counts)[4])
    accuracy = MulticlassAccuracy(5, ignore_index=255, average="micro")(found, truth)
    assert counts[0].sum() / counts[2].sum() == pytest.approx(float(accuracy), abs=1e-6)


def test_layouts(tmp_path):
    shapes(tmp_path / "a/images/training", tmp_path / "a/annotations/training", 6, 0, first=1)
    shapes(tmp_path / "a/images/validation", tmp_path / "a/annotations/validation", 3, 1, first=0)
    train, test = find_masks(tmp_path / "a")
    assert (len(train), len(test)) == (6, 3)
    # ADE20K: 0 is "other", classes begin with 1.
    assert train.mask(0).unique().tolist() == [0, 1, 2, 255]
    assert test.mask(0).unique().tolist() == [0, 1, 255]
    shapes(tmp_path / "b/images", tmp_path / "b/masks", 10, 0)
    train, test = find_masks(tmp_path / "b")
    assert (len(train), len(test)) == (8, 2)
    assert not set(train.images) & set(test.images)
    assert find_masks(tmp_path / "b", 1)[1].images != test.images
    shapes(tmp_path / "c/images/train", tmp_path / "c/masks/train", 2, 0)
    shapes(tmp_path / "c/images/val", tmp_path / "c/masks/val", 3, 0)
    assert [len(part) for part in find_masks(tmp_path / "c")] == [2, 3]


def test_tokens_that_are_not_kept_give_the_same_numbers(tmp_path):
    root, config = made(tmp_path, n=12), dataclasses.replace(QUICK, min_steps=20, lrs=(1e-3,))
    kept = segment(vit(), root, config, report=quiet)
    assert kept == segment(vit(), root, config, report=quiet)
    anew = segment(vit(), root, dataclasses.replace(config, tokens_gb=0), report=quiet)
    assert anew.metrics == pytest.approx(kept.metrics, abs=0.02)  # float16 against float32


def test_a_class_that_training_never_saw_counts_as_wrong(tmp_path):
    root = made(tmp_path, n=12)
    file = root / "val/masks/00.png"
    mask = np.asarray(Image.open(file)).copy()
    mask[mask == 2] = 7
    Image.fromarray(mask).save(file)
    result = segment(vit(), root, dataclasses.replace(QUICK, min_steps=20), report=quiet)
    assert result.details["iou"]["7"] == 0.0
    assert "[7]" in result.details["rule"]


def test_files_that_cannot_be_used_are_named(tmp_path):
    config = dataclasses.replace(QUICK, min_steps=2)
    root = made(tmp_path, n=4)

    def fails(words: str) -> None:
        with pytest.raises(DataError, match=words):
            segment(vit(), root, config, report=quiet)

    file = root / "train/masks/01.png"
    good = file.read_bytes()
    file.unlink()
    fails("1 of 4 images have no mask.*01.png")
    Image.new("L", (5, 6)).save(file)
    fails("size 5×6 is not its image's, 48×40")
    Image.new("RGB", (48, 40)).save(file)
    fails("one class index per pixel")
    file.write_bytes(b"nothing")
    fails("not readable")
    file.write_bytes(good)
    for k in range(4):
        Image.new("L", (48, 40), 3).save(root / f"train/masks/{k:02}.png")
    fails("hold 1 class")
    with pytest.raises(DataError, match="expected images/ and masks/"):
        find_masks(root / "train/images")
    with pytest.raises(DataError, match="no such folder"):
        find_masks(root / "nowhere")
