"""Which images a set holds, as a short text: equal texts mean the same images with the same labels in the same order.

Made from the listing, not from the pixels, so that a set of a million files takes seconds: names below their common
folder (a set that was moved as a whole is still the same set), sizes in bytes of the files, and labels. Whether the
set was decoded into memory makes no difference. A file replaced by another one of exactly its size is not noticed.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from uncollapse.data.images import ImageSet, LazyImages, MemoryImages

_PARQUET_ROW = re.compile(r"(.*) row \d+", re.DOTALL)
_CHUNK = 10_000


def image_digest(images: ImageSet) -> str:
    """16 hexadecimal digits for the images of a set, their labels, classes and order.

    Images without a file behind them (the built-in digits, tensors) count by their pixels. A file that cannot be
    looked at counts by its name alone.
    """
    digest = hashlib.sha256(f"{len(images)} images\n".encode())
    names = [images.name(i) for i in range(len(images))]
    files = [_file_of(name) for name in names]
    if isinstance(images, LazyImages) or (images.names and os.path.exists(files[0])):
        root = _common_folder(names)
        sizes = _sizes(files)
        for name, file in zip(names, files, strict=True):
            digest.update(f"{name[len(root) :].lstrip('/')}\0{sizes[file]}\n".encode(errors="surrogateescape"))
    else:
        _add_pixels(digest, images)
    if images.labels is not None:
        digest.update(repr(images.classes).encode(errors="surrogateescape"))
        digest.update(images.labels.to(torch.int64).numpy().tobytes())
    return digest.hexdigest()[:16]


def image_digests(train: ImageSet, held_out: ImageSet) -> dict[str, str]:
    """``data_digest`` of the training images and ``held_out_digest``, as ``summary.json`` and checkpoints have them."""
    return {"data_digest": image_digest(train), "held_out_digest": image_digest(held_out)}


def _file_of(name: str) -> str:
    row = _PARQUET_ROW.fullmatch(name)
    return row[1] if row else name


def _common_folder(names: Sequence[str]) -> str:
    """The deepest folder above every name: that of the first and last in order is that of all."""
    return os.path.commonpath([os.path.dirname(min(names)), os.path.dirname(max(names))])


def _sizes(files: Sequence[str]) -> dict[str, int]:
    """Bytes of each file; -1 where it cannot be looked at."""
    distinct = list(dict.fromkeys(files))

    def look(chunk: Sequence[str]) -> list[int]:
        sizes = []
        for file in chunk:
            try:
                sizes.append(os.stat(file).st_size)
            except OSError:
                sizes.append(-1)
        return sizes

    chunks = [distinct[i : i + _CHUNK] for i in range(0, len(distinct), _CHUNK)]
    with ThreadPoolExecutor(16) as pool:  # a network's file system answers many questions at once
        return dict(zip(distinct, (size for sizes in pool.map(look, chunks) for size in sizes), strict=True))


def _add_pixels(digest: hashlib._Hash, images: MemoryImages) -> None:
    digest.update(images.sizes.to(torch.int64).numpy().tobytes())
    for pixels in images.canvas.split(1024):
        digest.update(pixels.contiguous().numpy().tobytes())
