"""What an image set is: encoded images in files or Parquet rows, decoded ones in memory, or on demand.

Two kinds of set share one small interface (``labels``, ``classes``, ``bad``, ``len()``, ``image(i)``):
:class:`MemoryImages` holds decoded pixels in one tensor, :class:`LazyImages` decodes on demand and can be
sent to loader processes. Labels serve evaluation; training must not read them.

EXIF orientation is ignored, as torchvision's ``ImageFolder`` does.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROW_GROUPS_KEPT = 4


class DataError(ValueError):
    """Images that cannot be used; the message is one line that says what was found and what was expected."""


# --- decoding -----------------------------------------------------------------------------------------------


def decode(source: bytes | str | Path) -> Image.Image:
    """Decode one image, from its encoded bytes or its path, to RGB (the first frame where there are several).

    Transparency is composited on white. Grey of 16 bits (and 32-bit integers within 0..65535) is scaled to
    8 bits; floating-point grey must lie in 0..1. Raises :class:`DataError` with the reason for anything that
    is no complete image, or has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    if isinstance(source, bytes) and not source:
        raise DataError("no bytes")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise DataError(f"{image.width}×{image.height} pixels are more than the limit of {limit}")
            image.load()
            return _to_rgb(image)
    except DataError:
        raise
    except Image.UnidentifiedImageError:
        raise DataError("not an image, or of an unknown format") from None
    except Exception as e:  # broken files make decoders raise almost anything
        raise DataError(" ".join(f"{type(e).__name__}: {e}".split())) from e


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image.copy()
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), rgba).convert("RGB")
    if image.mode == "F" or image.mode.startswith("I"):
        pixels = np.asarray(image, dtype=np.float64)
        top = 1.0 if image.mode == "F" else 65535.0
        if not (pixels.min() >= 0 and pixels.max() <= top):  # also catches NaN
            found = f"{pixels.min():g}..{pixels.max():g}"
            raise DataError(f"mode {image.mode} with values {found} outside 0..{top:g}")
        return Image.fromarray(np.rint(pixels * (255 / top)).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


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


class ParquetRows:
    """Encoded images in the struct column ``column`` of Parquet shards, read one row group at a time.

    File handles and the cache belong to a process and are left behind when pickled.
    """

    def __init__(self, paths: Sequence[Path], column: str) -> None:
        self.paths, self.column = [str(p) for p in paths], column
        self.groups: list[tuple[int, int, int]] = []  # shard, row group, first row within the shard
        starts = [0]
        for shard, path in enumerate(self.paths):
            metadata, row = open_parquet(path).metadata, 0
            for group in range(metadata.num_row_groups):
                self.groups.append((shard, group, row))
                row += metadata.row_group(group).num_rows
                starts.append(starts[-1] + metadata.row_group(group).num_rows)
        self.starts = np.asarray(starts)
        self._keep = ROW_GROUPS_KEPT
        self._forget()

    def _forget(self) -> None:
        self._handles: dict[tuple[int, int], Any] = {}
        self._cache: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}, "_cache": {}}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _find(self, i: int) -> tuple[int, int]:
        g = int(np.searchsorted(self.starts, i, side="right")) - 1
        return g, int(i - self.starts[g])

    def name(self, i: int) -> str:
        g, row = self._find(i)
        shard, _, first = self.groups[g]
        return f"{self.paths[shard]} row {first + row}"

    def _group(self, g: int) -> Any:
        if g not in self._cache:
            shard, group, _ = self.groups[g]
            # A forked worker must not share the parent's file position.
            key = (os.getpid(), shard)
            if key not in self._handles:
                self._handles[key] = open_parquet(self.paths[shard])
            while len(self._cache) >= self._keep:
                self._cache.pop(next(iter(self._cache)))
            table = self._handles[key].read_row_group(group, columns=[self.column], use_threads=False)
            self._cache[g] = table.column(self.column).combine_chunks()
        return self._cache[g]

    def read(self, i: int) -> bytes:
        g, row = self._find(i)
        cell = self._group(g)[row].as_py()
        return (cell or {}).get("bytes") or b""

    def bytes_over(self, index: np.ndarray, limit: float) -> bool:
        total = sum(os.stat(p).st_size for p in self.paths)
        return total * len(index) / max(len(self), 1) > limit

    def preload(self) -> None:
        """Keep all encoded bytes in memory (forked workers share them), because shuffled reads are slow."""
        self._keep = max(len(self.groups), 1)
        for g in range(len(self.groups)):
            self._group(g)


def open_parquet(path: str | Path) -> Any:
    """A Parquet file opened for reading; raises :class:`DataError` where it is none."""
    import pyarrow
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as e:
        raise DataError(f"{path}: not a readable Parquet file ({' '.join(str(e).split())})") from e


# --- the two kinds of image set -----------------------------------------------------------------------------


@dataclass
class MemoryImages:
    """Decoded images; each sits in the top left corner of its own zero canvas.

    ``canvas``: uint8 (n, 3, H, W), RGB; ``sizes``: int64 (n, 2), the true (height, width) of each image.
    ``labels``: int64 (n,) or None. ``bad``: "name: reason" of images that could not be read and were dropped.
    ``names``: of the images, such as their paths; empty where they have none.
    """

    canvas: torch.Tensor
    sizes: torch.Tensor
    labels: torch.Tensor | None = None
    classes: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

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
    process that met it; :mod:`uncollapse.loading` carries the notes of its workers back. More than
    ``max_bad``·n of them raise :class:`DataError`.
    """

    source: Files | ParquetRows
    index: np.ndarray
    labels: torch.Tensor | None = None
    classes: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    max_bad: float = 0.05

    def __len__(self) -> int:
        return len(self.index)

    def name(self, i: int) -> str:
        return self.source.name(int(self.index[i]))

    def readable(self, i: int) -> Image.Image | None:
        """Image ``i``, or None where it cannot be read (then it is listed in ``bad``)."""
        j = int(self.index[i])
        try:
            return decode(self.source.read(j))
        except (DataError, OSError) as e:
            self.note_bad([f"{self.source.name(j)}: {e}"])
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
        if len(self.bad) > self.max_bad * len(self):
            raise DataError(bad_message(self.bad, len(self), self.max_bad))


ImageSet = MemoryImages | LazyImages


def subset(images: ImageSet, indices: Sequence[int] | np.ndarray | torch.Tensor) -> ImageSet:
    """The images at ``indices`` (repeats allowed), in that order, as a set of the same kind."""
    rows = torch.as_tensor(indices, dtype=torch.int64)
    labels = None if images.labels is None else images.labels[rows]
    if isinstance(images, MemoryImages):
        names = [images.names[i] for i in rows.tolist()] if images.names else []
        return replace(images, canvas=images.canvas[rows], sizes=images.sizes[rows], labels=labels,
                       bad=list(images.bad), names=names)  # fmt: skip
    # Notes are of the images one holds; those on the others would count against this set's share.
    return replace(images, index=images.index[rows.numpy()], labels=labels, bad=[])


def bad_message(bad: Sequence[str], n: int, max_bad: float) -> str:
    """What to say of a set with more unreadable images (``bad``: "name: reason") than it may have."""
    return (f"{len(bad)} of {n} images cannot be read, more than data.max_bad={max_bad:g} allows; "
            f"the first is {bad[0]}. Repair or remove them, or raise data.max_bad.")  # fmt: skip
