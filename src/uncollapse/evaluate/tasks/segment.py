"""Semantic segmentation by a linear layer on frozen patch tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from uncollapse.data.decode import decode, open_image, upright, upright_size
from uncollapse.data.listing import image_names
from uncollapse.errors import DataError
from uncollapse.evaluate.encoder import EvalEncoder
from uncollapse.evaluate.result import Result, bootstrap95
from uncollapse.evaluate.tasks.finetune import told
from uncollapse.progress import Report

SOURCE = "linear segmentation of DINOv2 (Oquab et al. 2023): batch norm and a linear layer on the last patch tokens"
IGNORE = 255
PIXELS = 4
"""Side of the grid of pixels per patch that training looks at."""
TRAIN, TEST = ("train", "training"), ("val", "validation", "test", "testing")


@dataclass(frozen=True)
class SegmentConfig:
    """AdamW as in DINOv2's code; its 40,000 steps of 16 images are 32 epochs of ADE20K."""

    epochs: float = 32.0
    min_steps: int = 300
    batch: int = 16
    lrs: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    """To choose from on held-out training images; DINOv2 takes 1e-3."""
    weight_decay: float = 1e-4
    warmup: float = 0.0375
    """Share of the steps; after it the rate falls in a line to 0."""
    held_out: float = 0.1
    tokens_gb: float = 4.0
    """Patch tokens (float16) that fit in this are kept; more are made anew for every batch."""


@dataclass(frozen=True)
class Masks:
    """Images and their masks of class indices, as paths."""

    images: list[Path]
    masks: list[Path]
    reduce_zero: bool = False
    """Whether 0 means "other" (ignored) and classes begin with 1, as in ADE20K."""

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: np.ndarray) -> Masks:
        return dataclasses.replace(self, images=[self.images[i] for i in rows], masks=[self.masks[i] for i in rows])

    def image(self, i: int) -> Image.Image:
        try:
            return decode(self.images[i])
        except DataError as error:
            raise DataError(f"{self.images[i]}: {error}") from None

    def mask(self, i: int) -> Tensor:
        """(H, W) int64 class indices, `IGNORE` where a pixel does not count."""
        try:
            with open_image(self.masks[i]) as file:
                if file.mode not in ("L", "P", "1", "I", "I;16"):
                    raise DataError(
                        f"a mask holds one class index per pixel (grey or palette), this one has mode {file.mode}"
                    )
                values = np.asarray(upright(file)).astype(np.int64)
        except DataError as error:
            raise DataError(f"{self.masks[i]}: not a readable mask ({error})") from None
        if values.max(initial=0) > IGNORE or values.min(initial=0) < 0:
            raise DataError(
                f"{self.masks[i]}: class indices must lie in 0..254 (255: ignored), "
                f"found {values.min()}..{values.max()}"
            )
        mask = torch.from_numpy(values)
        return torch.where(mask == 0, IGNORE, mask - (mask != IGNORE).long()) if self.reduce_zero else mask


# --- files --------------------------------------------------------------------------------------------------


def find_masks(root: Path, seed: int = 0) -> tuple[Masks, Masks]:
    """Training and test part of a folder of images with masks.

    ``images`` stand beside ``masks`` or ``annotations``, in ``train`` and ``val`` folders, or with such folders in
    them (ADE20K: ``images/training``, ``annotations/training``; there 0 is "other" and is ignored). Without a split,
    a fifth is held out. An image and its mask have the same name but for the ending; masks without image are left
    out.

    Raises `DataError` for other layouts, and for images without mask or with a mask of another size.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    ade = (root / "annotations").is_dir()
    for train, test in ((a, b) for a in TRAIN for b in TEST):
        for pattern in ("{part}/{kind}", "{kind}/{part}"):
            folders = [_folders(root, pattern, part) for part in (train, test)]
            if folders[0] is not None and folders[1] is not None:
                ade_like = ade and train == "training"
                return _paired(*folders[0], ade_like), _paired(*folders[1], ade_like)
    whole = _folders(root, "{kind}", "")
    if whole is None:
        there = ", ".join(sorted(p.name for p in root.iterdir())[:5]) or "nothing"
        raise DataError(
            f"{root}: expected images/ and masks/ (or annotations/), with or within train and val folders; "
            f"found {there}"
        )
    both = _paired(*whole, False)
    if len(both) < 2:
        raise DataError(f"{root}: {len(both)} image(s) with a mask, but at least two are needed")
    order = np.random.default_rng(seed).permutation(len(both))
    held = max(1, round(len(both) / 5))
    return both.take(np.sort(order[held:])), both.take(np.sort(order[:held]))


def _folders(root: Path, pattern: str, part: str) -> tuple[Path, Path] | None:
    images = root / pattern.format(kind="images", part=part)
    masks = [root / pattern.format(kind=kind, part=part) for kind in ("masks", "annotations")]
    there = [m for m in masks if m.is_dir()]
    return (images, there[0]) if images.is_dir() and there else None


def _paired(images: Path, masks: Path, reduce_zero: bool) -> Masks:
    names = image_names(images)
    by_stem = {str(Path(n).with_suffix("")): masks / n for n in image_names(masks)}
    missing = [n for n in names if str(Path(n).with_suffix("")) not in by_stem]
    if missing or not names:
        raise DataError(
            f"{images}: {len(missing)} of {len(names)} images have no mask in {masks}; first: {missing[0]}"
            if missing
            else f"{images}: no images"
        )
    pairs = Masks([images / n for n in names], [by_stem[str(Path(n).with_suffix(""))] for n in names], reduce_zero)
    for image, mask in zip(pairs.images, pairs.masks, strict=True):
        try:
            with open_image(image) as a, open_image(mask) as b:
                sizes = upright_size(a), upright_size(b)
        except DataError as error:
            raise DataError(f"{image} or its mask {mask}: not readable ({error})") from None
        if sizes[0] != sizes[1]:
            raise DataError(
                f"{mask}: its size {sizes[1][0]}×{sizes[1][1]} is not its image's, {sizes[0][0]}×{sizes[0][1]}"
            )
    return pairs


# --- tokens -------------------------------------------------------------------------------------------------


@torch.no_grad()
def _tokens(encoder: EvalEncoder, data: Masks, rows: Sequence[int], device: torch.device) -> Tensor:
    """(n, h, w, d) float32 on the device; whole images, squeezed to the encoder's square."""
    import torchvision.transforms.v2.functional as T  # type: ignore[import-untyped]

    size, views = [encoder.size] * 2, []
    for i in rows:
        image = T.resize(data.image(i), size, T.InterpolationMode.BICUBIC, antialias=True)
        x = T.to_dtype(T.pil_to_tensor(image), torch.float32, scale=True)
        views.append(T.normalize(x, list(encoder.mean), list(encoder.std)))
    with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        tokens = encoder.patches(torch.stack(views).to(device))
    if tokens is None:
        raise DataError(f"{encoder.name or 'this encoder'}: no map of patches, which segmentation needs")
    return tokens.float()


class _Source:
    """Patch tokens of images, kept where they fit, and the pixels of their masks that training looks at."""

    def __init__(self, encoder: EvalEncoder, data: Masks, config: SegmentConfig, device: torch.device) -> None:
        self.encoder, self.data, self.device = encoder, data, device
        h, w, d = _tokens(encoder, data, [0], device).shape[1:]
        self.grid, self.width = (int(h), int(w)), int(d)
        keep = len(data) * h * w * d * 2 <= config.tokens_gb * 1e9
        self.kept = torch.empty(len(data), h, w, d, dtype=torch.float16) if keep else None
        pixels = (PIXELS * self.grid[0], PIXELS * self.grid[1])
        self.pixels = torch.empty(len(data), *pixels, dtype=torch.uint8)
        for start in range(0, len(data), 32):
            rows = list(range(start, min(start + 32, len(data))))
            if self.kept is not None:
                self.kept[rows] = _tokens(encoder, data, rows, device).half().cpu()
            for i in rows:
                mask = data.mask(i)[None, None].float()
                self.pixels[i] = F.interpolate(mask, pixels, mode="nearest-exact")[0, 0].to(torch.uint8)

    def get(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Tokens (n, h, w, d) float32 and masks (n, 4h, 4w) int64, on the device."""
        if self.kept is None:
            x = _tokens(self.encoder, self.data, rows.tolist(), self.device)
        else:
            x = self.kept[rows].to(self.device).float()
        return x, self.pixels[rows].to(self.device).long()


class _Head(nn.Module):
    """(n, h, w, d) → (n, C, h, w)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm2d(width), nn.Conv2d(width, classes, 1)
        nn.init.zeros_(self.linear.weight)
        assert self.linear.bias is not None
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.linear(self.norm(tokens.permute(0, 3, 1, 2)))
        return out


# --- the task -----------------------------------------------------------------------------------------------


def segment(
    encoder: EvalEncoder,
    masks: Path | str,
    config: SegmentConfig | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    report: Report | None = None,
) -> Result:
    """Mean intersection over union of a linear layer on the frozen last map of patches (of a CNN: its last map).

    Whole images are squeezed to the encoder's square, without augmentation. The layer is trained by cross-entropy
    over pixels, logits upsampled (bilinear) to 4×4 pixels per patch. Its learning rate is the one with the highest
    mIoU on held-out training images; then all are trained on. Test logits are upsampled to each mask's own size, so
    every pixel counts, and the test images are seen once. Classes that neither prediction nor truth has in any test
    image are left out of the mean; one that training never saw counts with the IoU it gets, 0.

    Args:
        encoder: not changed, but moved to the device.
        masks: a folder as `find_masks` takes it; 255 in a mask is ignored.
        report: called with (name, steps done, steps to do, loss); None: a bar on stderr.

    Returns:
        Metrics ``miou`` and ``pixel_accuracy``; the interval is a bootstrap over test images, whose counts are
        summed. ``details["iou"]`` by class.

    Raises:
        DataError: files that cannot be used, masks with fewer than two classes, an encoder without a map.
    """
    config, device = config or SegmentConfig(), torch.device(device)
    train, test = find_masks(Path(masks), seed)
    encoder.to(device)
    source = _Source(encoder, train, config, device)
    seen = torch.zeros(IGNORE + 1, dtype=torch.bool)
    for i in range(len(train)):
        seen[train.mask(i).unique()] = True
    in_train = seen[:IGNORE].nonzero()[:, 0].tolist()
    if len(in_train) < 2:
        raise DataError(f"{masks}: the training masks hold {len(in_train)} class(es), at least two are needed")
    classes = in_train[-1] + 1
    order = np.random.default_rng(seed).permutation(len(train))
    held = order[: max(1, round(config.held_out * len(train)))]
    scores: dict[str, float] = {}
    with told("segmentation", report) as tell:
        if len(order) > 1:
            for lr in config.lrs if len(config.lrs) > 1 else ():
                head = _train(source, order[len(held) :], classes, lr, config, seed, tell)
                scores[f"{lr:g}"] = miou(_counts(head, encoder, train.take(held), device).sum(0))
        lr = max(sorted(config.lrs), key=lambda one: scores.get(f"{one:g}", 0.0))
        head = _train(source, order, classes, lr, config, seed, tell)
    counts = _counts(head, encoder, test, device)
    total = counts.sum(0)
    if not total[2].sum():
        raise DataError(f"{masks}: every pixel of the test masks is ignored")
    iou = per_class(total)
    unseen = sorted(set(np.flatnonzero(total[2]).tolist()) - set(in_train))
    details: dict[str, Any] = {
        "iou": {str(c): float(v) for c, v in enumerate(iou) if not math.isnan(v)},
        "lr": lr,
        "held_out_miou_by_lr": scores,
        "classes": classes,
        "training_images": len(train),
        "map": list(source.grid),
        "settings": dataclasses.asdict(config),
    }
    if unseen:
        details["rule"] = f"test classes {unseen} are in no training mask and count with IoU 0"
    return Result(
        "segment",
        {"miou": miou(total), "pixel_accuracy": _right(total)},
        bootstrap95(lambda rows: miou(counts[rows].sum(0)), len(test)),
        len(test),
        f"linear on {source.grid[0]}×{source.grid[1]} frozen patch tokens, whole images at {encoder.size} pixels, "
        f"cross-entropy over {PIXELS}×{PIXELS} pixels per patch, {_steps(len(train), config)} steps, lr {lr:g}",
        SOURCE,
        details,
        {"pixel_accuracy": bootstrap95(lambda rows: _right(counts[rows].sum(0)), len(test))},
    )


def _steps(n: int, config: SegmentConfig) -> int:
    return max(config.min_steps, math.ceil(config.epochs * n / config.batch))


def _train(
    source: _Source, rows: np.ndarray, classes: int, lr: float, config: SegmentConfig, seed: int, tell: Report
) -> _Head:
    head = _Head(source.width, classes).to(source.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=config.weight_decay)
    steps, rng = _steps(len(rows), config), np.random.default_rng([seed, len(rows)])
    warmup, waiting = max(1, round(config.warmup * steps)), np.arange(0)
    for step in range(steps):
        if len(waiting) < min(config.batch, len(rows)):
            waiting = np.concatenate([waiting, rng.permutation(rows)])
        batch, waiting = waiting[: config.batch], waiting[config.batch :]
        x, y = source.get(batch)
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
        logits = F.interpolate(head(x), y.shape[1:], mode="bilinear", align_corners=False)
        counted = int((y != IGNORE).sum())
        loss = F.cross_entropy(logits, y, ignore_index=IGNORE, reduction="sum") / max(1, counted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        tell(f"lr {lr:g}", step + 1, steps, float(loss.detach()))
    return head.eval()


@torch.no_grad()
def _counts(head: _Head, encoder: EvalEncoder, data: Masks, device: torch.device) -> np.ndarray:
    """(n, 3, 255) float64: of each image and class the pixels that are right, predicted, and true."""
    out = np.zeros((len(data), 3, IGNORE))
    for i in range(len(data)):
        logits, mask = head(_tokens(encoder, data, [i], device)), data.mask(i).to(device)
        predicted = F.interpolate(logits, mask.shape, mode="bilinear", align_corners=False)[0].argmax(0)
        counted = mask != IGNORE
        p, t = predicted[counted], mask[counted]
        for k, part in enumerate((t[p == t], p, t)):
            out[i, k] = torch.bincount(part, minlength=IGNORE).cpu().numpy()
    return out


def per_class(counts: np.ndarray) -> np.ndarray:
    """IoU of each class from (3, C) counts of pixels right, predicted and true; NaN where it is in neither."""
    union = counts[1] + counts[2] - counts[0]
    return np.divide(counts[0], union, out=np.full(len(union), math.nan), where=union > 0)


def _right(counts: np.ndarray) -> float:
    """Share of the pixels that are right; NaN where every one is ignored."""
    return float(counts[0].sum() / counts[2].sum()) if counts[2].any() else math.nan


def miou(counts: np.ndarray) -> float:
    """Mean of `per_class` over the classes that are predicted or true anywhere; NaN without any."""
    ious = per_class(counts)
    return float(np.nanmean(ious)) if not np.isnan(ious).all() else math.nan
