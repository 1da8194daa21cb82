"""Multi-crop views: DINO's augmentation, with every random number keyed by (seed, step, position, view).

One set of parameters (:func:`sample_params`) drives two implementations. :func:`apply_batch` transforms a
batch of in-memory images at once, on any device: crop, resize and flip are one pair of small matrices per
image, and the colour operations are batched with one factor per image. In :mod:`uncollapse.data.workers`,
``apply_one`` transforms one PIL image with torchvision, for images that loader processes decode. They agree
up to rounding.

Crops are rounded to 8 bits; what follows is computed in floating point on 0..1, as torchvision's
functions do for float images (on 8-bit images they round after each operation, by less than one grey level).

The operations, their order and probabilities are those of the original DINO (Caron et al., 2021) and its
released code. Its blur is Pillow's, which approximates a Gaussian of standard
deviation ``radius`` by box filters; here it is the Gaussian, cut off at ⌈3σ⌉ pixels, reflected at the border.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from uncollapse.config.schema import ViewConfig

RATIO = (3 / 4, 4 / 3)
DRAWS = 36  # numbers per view; a multiple of four, because Philox makes four at a time
GREY = (0.2989, 0.587, 0.114)
SOLARISE = 0.5  # inverts from 128/255 up; between two grey levels, so that rounding errors do not matter
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


@dataclass(frozen=True)
class ViewSpec:
    """How one view is made. Probabilities are in 0..1, sizes in pixels, scales shares of the image's area."""

    name: Literal["global", "local"]
    size: int
    scale: tuple[float, float]
    flip: float
    jitter: float
    jitter_strength: tuple[float, float, float, float]
    grey: float
    blur: float
    blur_sigma: tuple[float, float]
    solarise: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def view_specs(config: ViewConfig) -> list[ViewSpec]:
    """The global views, of which the first may be made otherwise than the rest, then the local ones."""

    def spec(kind: int) -> ViewSpec:
        local = kind == 2
        return ViewSpec(
            name="local" if local else "global",
            size=config.local_size if local else config.global_size,
            scale=config.local_scale if local else config.global_scale,
            flip=config.flip,
            jitter=config.jitter,
            jitter_strength=config.jitter_strength,
            grey=config.grey,
            blur=config.blur[kind],
            blur_sigma=config.blur_sigma,
            solarise=config.solarise[kind],
            mean=config.mean,
            std=config.std,
        )

    return [spec(0), *[spec(1)] * (config.global_count - 1), *[spec(2)] * config.local_count]


# --- random parameters --------------------------------------------------------------------------------------


def uniforms(seed: int, step: int, view: int, batch: int, first: int = 0) -> np.ndarray:
    """Uniform numbers in [0, 1) for positions ``first`` .. ``first + batch - 1`` of the batch of ``step``.

    Returns float64 (batch, DRAWS). Positions count over the global batch of all ranks; the row of a position
    does not depend on the batch size, the rank or the process that asks. The generator is Philox, keyed by
    (seed, step, view).
    """
    bits = np.random.Philox(np.random.SeedSequence([seed, step, view]))
    bits.advance(first * DRAWS // 4)
    return np.random.Generator(bits).random((batch, DRAWS))


@dataclass(frozen=True)
class ViewParams:
    """What one view does to each of n images; CPU tensors of n rows.

    Crop in pixels (int64): ``top``, ``left``, ``height``, ``width``. Flags (bool): ``flip``, ``jitter``,
    ``grey``, ``blur``, ``solarise``. ``order`` (int64, n×4): the order of brightness 0, contrast 1,
    saturation 2 and hue 3. ``factors`` (float32, n×4): of each of these (hue: shift in turns, -1/2..1/2).
    ``sigma`` (float32): of the blur, in pixels of the view.
    """

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor
    jitter: Tensor
    order: Tensor
    factors: Tensor
    grey: Tensor
    blur: Tensor
    sigma: Tensor
    solarise: Tensor

    def __getitem__(self, rows: slice | Tensor) -> ViewParams:
        return ViewParams(*(getattr(self, f.name)[rows] for f in fields(self)))


def sample_params(u: np.ndarray, sizes: np.ndarray | Tensor, spec: ViewSpec) -> ViewParams:
    """Parameters of view ``spec`` for n images, from uniform numbers.

    ``u``: float64 (n, DRAWS) from :func:`uniforms`; ``sizes``: (n, 2) heights and widths. Crops follow
    torchvision's ``RandomResizedCrop``: ten tries at an area uniform in ``spec.scale`` and a log-uniform
    aspect ratio in 3/4..4/3; where none fits, the largest central crop within these ratios.
    """
    height, width = np.asarray(sizes, dtype=np.float64).T
    area = (height * width)[:, None] * _between(u[:, :10], *spec.scale)
    ratio = np.exp(_between(u[:, 10:20], math.log(RATIO[0]), math.log(RATIO[1])))
    tries_w, tries_h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (tries_w > 0) & (tries_w <= width[:, None]) & (tries_h > 0) & (tries_h <= height[:, None])
    first, rows = fits.argmax(1), np.arange(len(u))
    w, h = tries_w[rows, first], tries_h[rows, first]
    top, left = np.floor(u[:, 20] * (height - h + 1)), np.floor(u[:, 21] * (width - w + 1))
    if not (any_fits := fits.any(1)).all():
        central_w = np.minimum(width, np.rint(height * RATIO[1]))
        central_h = np.minimum(height, np.rint(width / RATIO[0]))
        h, w = np.where(any_fits, h, central_h), np.where(any_fits, w, central_w)
        top = np.where(any_fits, top, (height - h) // 2)
        left = np.where(any_fits, left, (width - w) // 2)
    strength = np.array(spec.jitter_strength)
    low = np.array([*np.maximum(1 - strength[:3], 0), -strength[3]])
    high = np.array([*(1 + strength[:3]), strength[3]])

    def whole(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x.astype(np.int64))

    def flag(column: int, probability: float) -> Tensor:
        return torch.from_numpy(u[:, column] < probability)

    return ViewParams(
        whole(top),
        whole(left),
        whole(h),
        whole(w),
        flip=flag(22, spec.flip),
        jitter=flag(23, spec.jitter),
        order=whole(u[:, 24:28].argsort(1)),
        factors=torch.from_numpy((low + (high - low) * u[:, 28:32]).astype(np.float32)),
        grey=flag(32, spec.grey),
        blur=flag(33, spec.blur),
        sigma=torch.from_numpy(_between(u[:, 34], *spec.blur_sigma).astype(np.float32)),
        solarise=flag(35, spec.solarise),
    )


def _between(u: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * u


# --- batched views ------------------------------------------------------------------------------------------


def blur_radius(sigma: float, size: int) -> int:
    """Pixels on each side that the blur of a view of ``size`` sees: ⌈3σ⌉, and never beyond one reflection."""
    return min(math.ceil(3 * sigma), size - 1)


# --- batched evaluation views -------------------------------------------------------------------------------


def eval_shorter_side(size: int) -> int:
    """Length to which the shorter side is resized before the central crop: 256 for 224, ``size`` below 64."""
    return size if size < 64 else round(size * 256 / 224)
