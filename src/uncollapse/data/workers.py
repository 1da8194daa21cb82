"""Views of single images, and the loader processes that decode them; evaluation views of any image set.

The parameters are those of :mod:`uncollapse.data.views`, so an image gets the same views (up to rounding) whether
it lives in memory or is decoded by one of any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from uncollapse.data.batched import eval_batch, normalised
from uncollapse.data.images import ImageSet, LazyImages, MemoryImages
from uncollapse.data.views import (
    SOLARISE,
    ViewParams,
    ViewSpec,
    blur_radius,
    eval_shorter_side,
    sample_params,
    uniforms,
)
from uncollapse.errors import DataError

Plan = Iterable[tuple[int, Sequence[int], Sequence[int]]]
"""(step, indices of the images, their positions in the global batch) for each batch of this rank."""


# --- views of single images, and loader processes -----------------------------------------------------------


@torch.no_grad()
def apply_one(image: Image.Image, params: ViewParams, i: int, spec: ViewSpec) -> Tensor:
    """View ``spec`` of one RGB image with row ``i`` of ``params``: float32 (3, size, size), normalised."""
    import torchvision.transforms.v2.functional as F  # type: ignore[import-untyped]

    box = [int(v[i]) for v in (params.top, params.left, params.height, params.width)]
    image = F.resized_crop(image, *box, [spec.size, spec.size], F.InterpolationMode.BICUBIC, antialias=True)
    x = F.to_dtype(F.pil_to_tensor(image), torch.float32, scale=True)
    if params.flip[i]:
        x = F.horizontal_flip(x)
    if params.jitter[i]:
        adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
        for operation in params.order[i].tolist():
            if spec.jitter_strength[operation] > 0:
                x = adjust[operation](x, float(params.factors[i, operation]))
    if params.grey[i]:
        x = F.rgb_to_grayscale(x, num_output_channels=3)
    if params.blur[i]:
        sigma = float(params.sigma[i])
        x = F.gaussian_blur(x, [2 * blur_radius(sigma, spec.size) + 1] * 2, [sigma, sigma])
    if params.solarise[i]:
        x = F.solarize(x, SOLARISE)
    return F.normalize(x, list(spec.mean), list(spec.std))


@dataclass
class _Views(torch.utils.data.Dataset[Any]):
    """Item (step, index, position) → its views and the unreadable images met so far; an error as text."""

    images: ImageSet
    specs: Sequence[ViewSpec]
    seed: int

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[list[Tensor] | str, list[str]]:
        step, index, position = key
        try:
            image = self.images.image(index)
        except DataError as e:  # a loader would wrap it into a traceback of many lines
            return str(e), list(self.images.bad)
        size = np.array([[image.height, image.width]])
        views = []
        for view, spec in enumerate(self.specs):
            u = uniforms(self.seed, step, view, 1, position)
            views.append(apply_one(image, sample_params(u, size, spec), 0, spec))
        return views, list(self.images.bad)


def _stacked(items: list[tuple[list[Tensor] | str, list[str]]]) -> tuple[list[Tensor] | str, list[str]]:
    bad = [b for _, notes in items for b in notes]
    good = [views for views, _ in items if not isinstance(views, str)]
    for views, _ in items:
        if isinstance(views, str):
            return views, bad
    return [torch.stack(v) for v in zip(*good, strict=True)], bad


def _loaded(dataset: torch.utils.data.Dataset[Any], keys: Iterable[Any], workers: int, collate: Any) -> Any:
    return iter(
        torch.utils.data.DataLoader(
            dataset,
            batch_sampler=keys,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own, so that loading leaves the global random state alone
        )
    )


def view_loader(
    images: ImageSet, plan: Plan, specs: Sequence[ViewSpec], seed: int, workers: int
) -> Iterator[list[Tensor]]:
    """For each batch of ``plan``, in order, its views made by loader processes.

    Like :func:`~uncollapse.data.batched.multicrop`, one float32 (n, 3, size, size) per spec. ``workers`` processes
    (0: this one) change the speed and nothing else. An unreadable image is replaced by the next readable one
    and listed in ``images.bad``; too many raise :class:`~uncollapse.errors.DataError`.
    """
    keys = (
        [(step, int(i), int(p)) for i, p in zip(indices, positions, strict=True)] for step, indices, positions in plan
    )
    for views, bad in _loaded(_Views(images, specs, seed), keys, workers, _stacked):
        if isinstance(images, LazyImages):
            images.note_bad(bad)
        if isinstance(views, str):
            raise DataError(views)
        yield views


# --- evaluation ---------------------------------------------------------------------------------------------


def eval_crop(image: Image.Image, size: int) -> Tensor:
    """Shorter side resized (bicubic; to 256 for 224), central ``size``×``size`` crop: uint8 (3, size, size)."""
    import torchvision.transforms.v2.functional as F

    image = F.resize(image, [eval_shorter_side(size)], F.InterpolationMode.BICUBIC, antialias=True)
    crop: Tensor = F.pil_to_tensor(F.center_crop(image, [size, size]))
    return crop


@dataclass
class _Crops(torch.utils.data.Dataset[Any]):
    """Central crops as bytes: a quarter of what normalised floats would send from the loader processes."""

    images: LazyImages
    size: int

    def __getitem__(self, i: int) -> tuple[int, Tensor | str | None, list[str]]:
        try:
            image = self.images.readable(i)
        except DataError as error:  # a loader would wrap it into a traceback of many lines
            return i, str(error), list(self.images.bad)
        return i, None if image is None else eval_crop(image, self.size), list(self.images.bad)


def _collated(items: Sequence[tuple[int, Tensor | str | None, list[str]]]) -> tuple[Any, Any, Any, list[str]]:
    """Indices and crops of a batch, the error met or None, and the notes: made in the loader process."""
    bad = [note for _, _, notes in items for note in notes]
    error = next((crop for _, crop, _ in items if isinstance(crop, str)), None)
    kept = [(i, crop) for i, crop, _ in items if isinstance(crop, Tensor)]
    crops = torch.stack([crop for _, crop in kept]) if kept else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    return torch.tensor([i for i, _ in kept], dtype=torch.int64), crops, error, bad


@torch.no_grad()
def eval_batches(
    images: ImageSet,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    batch: int = 256,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Evaluation views of images, in order: indices int64 (b,) on the CPU, float32 (b, 3, size, size) on the device.

    The shorter side is resized (bicubic), the centre cropped, as in DINO's protocols. Unreadable images are left out (a
    replacement would carry the wrong label) and listed in ``images.bad``; too many raise `DataError`. ``workers``
    processes decode :class:`~uncollapse.data.images.LazyImages`; in-memory sets need none.
    """
    n = len(images)
    if isinstance(images, MemoryImages):
        for i in range(0, n, batch):
            canvas = images.canvas[i : i + batch].to(device)
            yield torch.arange(i, i + len(canvas)), eval_batch(canvas, images.sizes[i : i + batch], size, mean, std)
        return
    keys = [list(range(i, min(i + batch, n))) for i in range(0, n, batch)]
    for indices, crops, error, bad in _loaded(_Crops(images, size), keys, workers, _collated):
        images.note_bad(bad)
        if error is not None:
            raise DataError(error)
        if len(indices):
            yield indices, normalised(crops.to(device, non_blocking=True).float().mul_(1 / 255), mean, std)
