"""What an image set is: encoded images in files or Parquet rows, decoded ones in memory, or on demand.

Two kinds of set share one small interface (``labels``, ``classes``, ``bad``, ``len()``, ``image(i)``):
:class:`MemoryImages` holds decoded pixels in one tensor, :class:`LazyImages` decodes on demand and can be
sent to loader processes. Labels serve evaluation; training must not read them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image

from uncollapse.data.decode import decode
from uncollapse.data.parquet import ParquetRows
from uncollapse.errors import DataError
from uncollapse.shown import shown

# --- where encoded images come from -------------------------------------------------------------------------


@dataclass
class Files:
    """Image files below ``root``; ``names`` are relative paths (a million ``Path`` objects would be slow)."""

    root: str
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        return os.path.join(self.root, self.names[i])

    def read(self, i: int) -> str:
        return self.name(i)

    def bytes_over(self, index: np.ndarray, limit: float) -> bool:
        """Whether the encoded files exceed ``limit`` bytes; stops looking as soon as they do."""
        total = 0
        for i in index:
            try:
                total += os.stat(self.name(i)).st_size
            except OSError:
                continue  # reading it later gives the reason
            if total > limit:
                return True
        return False


# --- the two kinds of image set -----------------------------------------------------------------------------


@dataclass
class MemoryImages:
    """Decoded images; each sits in the top left corner of its own zero canvas.

    ``canvas``: uint8 (n, 3, H, W), RGB; ``sizes``: int64 (n, 2), the true (height, width) of each image.
    ``labels``: int64 (n,) or None. ``bad``: "name: reason" of images that could not be read and were dropped.
    ``names``: of the images, such as their paths, fit to be printed; empty where they have none.
    ``about_labels``: in words, what gave the labels, or why there are none. ``origin``: in words, where held-out images
    are from, and what training images were cut from.
    """

    canvas: torch.Tensor
    sizes: torch.Tensor
    labels: torch.Tensor | None = None
    classes: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    about_labels: str = ""
    origin: str = ""

    def __len__(self) -> int:
        return len(self.canvas)

    def name(self, i: int) -> str:
        return self.names[i] if self.names else f"#{i}"

    def image(self, i: int) -> Image.Image:
        """Image ``i`` as an RGB PIL image of its true size."""
        height, width = self.sizes[i].tolist()
        return Image.fromarray(self.canvas[i, :, :height, :width].permute(1, 2, 0).cpu().numpy())


@dataclass
class LazyImages:
    """Images decoded on demand; picklable, so that loader processes can use it.

    ``index`` (int64) picks and orders the items of ``source``. An unreadable item is noted in ``bad`` of the
    process that met it; :mod:`uncollapse.data.workers` carries the notes of its workers back. More than
    ``max_bad``·n of them raise :class:`DataError`, where n counts the ``dropped`` (listed in ``bad`` and no longer in
    ``index``) too. ``about_labels`` and ``origin`` as in :class:`MemoryImages`.
    """

    source: Files | ParquetRows
    index: np.ndarray
    labels: torch.Tensor | None = None
    classes: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    max_bad: float = 0.05
    dropped: int = 0
    about_labels: str = ""
    origin: str = ""

    def __len__(self) -> int:
        return len(self.index)

    def name(self, i: int) -> str:
        return shown(self.source.name(int(self.index[i])))

    def readable(self, i: int) -> Image.Image | None:
        """Image ``i``, or None where it cannot be read (then it is listed in ``bad``)."""
        j = int(self.index[i])
        try:
            return decode(self.source.read(j))
        except (DataError, OSError) as e:
            self.note_bad([f"{shown(self.source.name(j))}: {e}"])
            return None

    def image(self, i: int) -> Image.Image:
        """Image ``i`` as RGB; where it cannot be read, the next one that can, so that batches stay full."""
        for k in range(len(self)):
            image = self.readable((i + k) % len(self))
            if image is not None:
                return image
        raise DataError(bad_message(self.bad, len(self), self.max_bad))

    def note_bad(self, notes: Sequence[str]) -> None:
        """Add ``notes`` ("name: reason") that are new; raises :class:`DataError` where they are too many."""
        self.bad += [n for n in dict.fromkeys(notes) if n not in self.bad]
        n = len(self) + self.dropped
        if len(self.bad) > self.max_bad * n:
            raise DataError(bad_message(self.bad, n, self.max_bad))


ImageSet = MemoryImages | LazyImages


def subset(images: ImageSet, indices: Sequence[int] | np.ndarray | torch.Tensor) -> ImageSet:
    """The images at ``indices`` (repeats allowed), in that order, as a set of the same kind."""
    rows = torch.as_tensor(indices, dtype=torch.int64)
    labels = None if images.labels is None else images.labels[rows]
    if isinstance(images, MemoryImages):
        names = [images.names[i] for i in rows.tolist()] if images.names else []
        return replace(
            images,
            canvas=images.canvas[rows],
            sizes=images.sizes[rows],
            labels=labels,
            bad=list(images.bad),
            names=names,
        )
    # Notes are of the images one holds; those on the others would count against this set's share.
    return replace(images, index=images.index[rows.numpy()], labels=labels, bad=[], dropped=0)


def bad_message(bad: Sequence[str], n: int, max_bad: float) -> str:
    """What to say of a set with more unreadable images (``bad``: "name: reason") than it may have."""
    return (
        f"{len(bad)} of {n} images cannot be read, more than data.max_bad={max_bad:g} allows; "
        f"the first is {bad[0]}. Repair or remove them, or raise data.max_bad."
    )
