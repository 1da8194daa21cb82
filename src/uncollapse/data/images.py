"""What an image set is: encoded images in files or Parquet rows, decoded ones in memory, or on demand.

Two kinds of set share one small interface (``labels``, ``classes``, ``bad``, ``len()``, ``image(i)``):
:class:`MemoryImages` holds decoded pixels in one tensor, :class:`LazyImages` decodes on demand and can be
sent to loader processes. Labels serve evaluation; training must not read them.

Images are data from anywhere: only the formats of ``FORMATS`` are opened, sizes are checked before decoding, and
whatever a decoder raises becomes a :class:`DataError`.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import ExifTags, Image

from uncollapse.errors import DataError
from uncollapse.shown import shown

if TYPE_CHECKING:
    from uncollapse.data.parquet import ParquetRows

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""The formats that are read. Pillow knows forty more, among them PostScript, which it hands to Ghostscript."""

MAX_BYTES = 1 << 29
"""An encoded image of more bytes than this is not read."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation."""

_ON_ITS_SIDE = [_TURNS[i] for i in (5, 6, 7, 8)]


# --- decoding -----------------------------------------------------------------------------------------------


def decode(source: bytes | str | Path) -> Image.Image:
    """Decode one image, from its encoded bytes or its path, to RGB (the first frame where there are several).

    EXIF orientation is applied, transparency composited on white. Grey of 16 bits (and 32-bit integers within
    0..65535) is scaled to 8 bits; floating-point grey must lie in 0..1. Raises :class:`DataError` with the reason
    for anything that is no complete image of ``FORMATS``, or too large (see :func:`open_image`).
    """
    with open_image(source) as image:
        return to_rgb(image)


@contextmanager
def open_image(source: bytes | str | Path) -> Iterator[Image.Image]:
    """One image whose header is read and whose pixels are not: the one place that opens images.

    Raises :class:`DataError`, also for whatever is raised inside the ``with``: for other formats than ``FORMATS``,
    files that are not regular ones, more than ``MAX_BYTES`` bytes or ``PIL.Image.MAX_IMAGE_PIXELS`` pixels.
    """
    try:
        _check_bytes(source)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and _area(image) > limit:
                raise DataError(f"{image.width}×{image.height} pixels are more than the limit of {limit}")
            yield image
    except DataError:
        raise
    except Image.UnidentifiedImageError:
        raise DataError(_unidentified(source)) from None
    except OSError as e:
        raise DataError(e.strerror or e) from e
    except Exception as e:  # broken files make decoders raise almost anything
        raise DataError(" ".join(f"{type(e).__name__}: {e}".split())) from e


def _check_bytes(source: bytes | str | Path) -> None:
    if isinstance(source, bytes):
        size = len(source)
    else:
        status = os.stat(source)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise DataError("not a regular file (but a folder, pipe, socket or device)")
        size = status.st_size
    if not size:
        raise DataError("no bytes")
    if size > MAX_BYTES:
        raise DataError(f"{size} bytes are more than the limit of {MAX_BYTES}")


def _area(image: Image.Image) -> int:
    """Pixels that decoding makes at once; a tile of a TIFF may be larger than the image it belongs to."""
    tags: Any = getattr(image, "tag_v2", {})
    return max(image.width * image.height, int(tags.get(322, 0)) * int(tags.get(323, 0)))


def _unidentified(source: bytes | str | Path) -> str:
    """Names the format where Pillow would know it, and where only the beginning is as it should be says so."""
    if isinstance(source, bytes):
        prefix = source[:16]
    else:
        with open(source, "rb") as file:
            prefix = file.read(16)
    Image.init()
    found = []
    for name, (_, accepts) in Image.OPEN.items():
        with suppress(Exception):  # of a prefix too short for it
            if accepts is not None and (answer := accepts(prefix)) and not isinstance(answer, str):
                found.append(name)
    ours = [name for name in found if name in FORMATS]
    if ours:
        return f"not an image: begins like {ours[0]}, but its header is damaged"
    what = f"looks like {found[0]}" if found else "of an unknown format"
    return f"not an image that is read here, {what}; read are {', '.join(FORMATS)}"


def to_rgb(image: Image.Image) -> Image.Image:
    """The pixels of an opened image as upright RGB, see :func:`decode`."""
    return _to_rgb(upright(image))


def upright(image: Image.Image) -> Image.Image:
    """The pixels of an opened image in its own mode, turned as its EXIF orientation says."""
    image.load()
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height that an opened image has when upright, without decoding it."""
    # Pillow turns TIFFs itself, and would decode a PNG to look for EXIF behind its pixels.
    late = image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info)
    turned = not late and _turn(image) in _ON_ITS_SIDE
    return (image.height, image.width) if turned else image.size


def _turn(image: Image.Image) -> Image.Transpose | None:
    if image.format == "JPEG" and not {"exif", "xmp"} & image.info.keys():
        return None  # soon found out, for the sake of small images
    with suppress(Exception):  # damaged EXIF says nothing about the pixels
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image.copy()
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), rgba).convert("RGB")
    if image.mode == "F" or image.mode.startswith("I"):
        pixels = np.asarray(image, dtype=np.float32)
        top = 1.0 if image.mode == "F" else 65535.0
        if not (pixels.min() >= 0 and pixels.max() <= top):  # also catches NaN
            found = f"{pixels.min():g}..{pixels.max():g}"
            raise DataError(f"mode {image.mode} with values {found} outside 0..{top:g}")
        return Image.fromarray(np.rint(pixels * np.float32(255 / top)).astype(np.uint8)).convert("RGB")
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


# --- the two kinds of image set -----------------------------------------------------------------------------


@dataclass
class MemoryImages:
    """Decoded images; each sits in the top left corner of its own zero canvas.

    ``canvas``: uint8 (n, 3, H, W), RGB; ``sizes``: int64 (n, 2), the true (height, width) of each image.
    ``labels``: int64 (n,) or None. ``bad``: "name: reason" of images that could not be read and were dropped.
    ``names``: of the images, such as their paths, fit to be printed; empty where they have none.
    ``about_labels``: in words, what gave the labels, or why there are none. ``origin``: of held-out images, in words,
    where they are from.
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
        return replace(images, canvas=images.canvas[rows], sizes=images.sizes[rows], labels=labels,
                       bad=list(images.bad), names=names)  # fmt: skip
    # Notes are of the images one holds; those on the others would count against this set's share.
    return replace(images, index=images.index[rows.numpy()], labels=labels, bad=[], dropped=0)


def bad_message(bad: Sequence[str], n: int, max_bad: float) -> str:
    """What to say of a set with more unreadable images (``bad``: "name: reason") than it may have."""
    return (f"{len(bad)} of {n} images cannot be read, more than data.max_bad={max_bad:g} allows; "
            f"the first is {bad[0]}. Repair or remove them, or raise data.max_bad.")  # fmt: skip
