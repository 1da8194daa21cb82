"""One image, decoded and the right way up.

Images are data from anywhere: only the formats of ``FORMATS`` are opened, sizes are checked before decoding, and
whatever a decoder raises becomes a :class:`DataError`.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image

from uncollapse.errors import DataError

if TYPE_CHECKING:
    pass

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
    formats = []
    for name, (_, accepts) in Image.OPEN.items():
        with suppress(Exception):  # of a prefix too short for it
            if accepts is not None and (answer := accepts(prefix)) and not isinstance(answer, str):
                formats.append(name)
    ours = [name for name in formats if name in FORMATS]
    if ours:
        return f"not an image: begins like {ours[0]}, but its header is damaged"
    what = f"looks like {formats[0]}" if formats else "of an unknown format"
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
            reach = f"{pixels.min():g}..{pixels.max():g}"
            raise DataError(f"mode {image.mode} with values {reach} outside 0..{top:g}")
        return Image.fromarray(np.rint(pixels * np.float32(255 / top)).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
