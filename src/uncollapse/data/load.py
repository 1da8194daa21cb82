"""Which images a path holds, which of them are held out, and whether they are decoded into memory.

Whether :func:`load_images` returns :class:`~uncollapse.data.images.MemoryImages` or
:class:`~uncollapse.data.images.LazyImages` depends only on size: listing, splitting and order are the same for both.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from uncollapse.config.schema import DataConfig
from uncollapse.data.decode import open_image, to_rgb
from uncollapse.data.images import Files, ImageSet, LazyImages, MemoryImages, bad_message, subset
from uncollapse.data.listing import Items, find_items
from uncollapse.data.long_tail import cut_long_tail
from uncollapse.data.parquet import ParquetRows
from uncollapse.errors import DataError
from uncollapse.progress import bars
from uncollapse.shown import shown

T = TypeVar("T")

DIGITS_HELD_OUT = 0.2
_CHUNK = 64
_IN_FLIGHT = 1 << 26
"""Encoded bytes that wait to be decoded at a time."""
_LARGE = 1 << 24
"""Images of more pixels than this are decoded one at a time."""


def _aligned(held: Items, train: Items) -> Items:
    """``held`` with its labels numbered as in ``train``; by name, because folders may lack a class."""
    if held.labels is None or train.labels is None or held.classes == train.classes:
        return held
    unknown = [c for c in held.classes if c not in train.classes]
    if not held.classes or not train.classes or unknown:
        raise DataError(
            f"classes of the held-out images are not those of the training images: "
            f"{', '.join(unknown[:5]) or 'one of the two has no class names'}; "
            f"training has {', '.join(train.classes[:5]) or 'no names'}"
        )
    number = np.array([train.classes.index(c) for c in held.classes])
    return replace(held, labels=number[held.labels], classes=train.classes)


# --- splitting ----------------------------------------------------------------------------------------------


def split_items(
    n: int, labels: np.ndarray | None, share: float, most: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted (train, held-out) positions of n items: ``share`` of each class, at least one if it has two.

    At least two of all, where there are four: with one nothing can be evaluated.
    """
    share = min(share, most / n)
    held: list[int] = []
    groups = [np.arange(n)] if labels is None else [np.flatnonzero(labels == c) for c in np.unique(labels)]
    if all(len(g) < 2 for g in groups):
        groups = [np.arange(n)]
    for group in groups:
        if len(group) >= 2:
            k = min(max(1, round(share * len(group))), len(group) - 1)
            held += rng.permutation(group)[:k].tolist()
    if len(held) < 2 <= most and n >= 4:
        largest = np.setdiff1d(max(groups, key=len), held)
        held += rng.permutation(largest)[: 2 - len(held)].tolist()
    if len(held) > most:
        held = rng.permutation(np.array(held))[:most].tolist()
    mask = np.zeros(n, dtype=bool)
    mask[held] = True
    return np.flatnonzero(~mask), np.flatnonzero(mask)


# --- loading ------------------------------------------------------------------------------------------------


def _chunks(source: Files | ParquetRows, index: np.ndarray) -> Iterator[tuple[list[bytes | str | DataError], int]]:
    """Sources of consecutive images, or why there is none, and their encoded bytes in memory."""
    chunk: list[bytes | str | DataError] = []
    size = 0
    for i in index:
        try:
            one: bytes | str | DataError = source.read(int(i))
        except DataError as e:
            one = e
        chunk.append(one)
        size += len(one) if isinstance(one, bytes) else 0
        if len(chunk) == _CHUNK or size > _IN_FLIGHT // 8:
            yield chunk, size
            chunk, size = [], 0
    if chunk:
        yield chunk, size


def _in_threads(
    source: Files | ParquetRows, index: np.ndarray, work: Callable[[bytes | str], T], what: str, show: bool
) -> Iterator[list[T | DataError]]:
    """``work`` on every encoded image, in order, some at a time; a :class:`DataError` in place of its result."""

    def each(sources: Sequence[bytes | str | DataError]) -> list[T | DataError]:
        done: list[T | DataError] = []
        for one in sources:
            try:
                done.append(one if isinstance(one, DataError) else work(one))
            except DataError as e:
                done.append(e)
        return done

    threads = min(4, os.cpu_count() or 1)
    waiting: deque[tuple[Future[list[T | DataError]], int]] = deque()
    ready = 0
    with bars(Console(stderr=True), after=2.0, show=show) as report, ThreadPoolExecutor(threads) as pool:

        def take() -> list[T | DataError]:
            nonlocal ready
            done = waiting.popleft()[0].result()
            ready += len(done)
            report(what, ready, len(index), None)
            return done

        try:
            for chunk, size in _chunks(source, index):
                while waiting and (len(waiting) >= 2 * threads or sum(s for _, s in waiting) + size > _IN_FLIGHT):
                    yield take()
                waiting.append((pool.submit(each, chunk), size))
            while waiting:
                yield take()
        finally:
            pool.shutdown(cancel_futures=True)


_one_large = threading.Lock()


def _pixels(image: Image.Image) -> np.ndarray:
    """An opened image as uint8 (height, width, 3); large ones one at a time."""
    with _one_large if image.width * image.height > _LARGE else nullcontext():
        return np.asarray(to_rgb(image))


def _decode_all(
    source: Files | ParquetRows, index: np.ndarray, limit: float, show: bool
) -> list[np.ndarray | DataError] | None:
    """Each image as uint8 (height, width, 3), or why it is bad; None if a canvas would pass ``limit``."""
    results: list[np.ndarray | DataError] = []
    most_h = most_w = 0
    full = False

    def fits(height: int, width: int) -> bool:
        return 3 * len(index) * max(most_h, height) * max(most_w, width) <= limit

    def pixels(encoded: bytes | str) -> np.ndarray:
        nonlocal full
        with open_image(encoded) as image:
            # Looked at before decoding; making the image upright may exchange its sides.
            full = full or not (fits(image.height, image.width) or fits(image.width, image.height))
            return np.empty((0, 0, 3), np.uint8) if full else _pixels(image)

    for done in _in_threads(source, index, pixels, "decoding images", show):
        for one in done:
            if isinstance(one, np.ndarray):
                full = full or not fits(*one.shape[:2])
                most_h, most_w = max(most_h, one.shape[0]), max(most_w, one.shape[1])
        results += done
        if full:
            return None
    return results


def described(train: ImageSet, held_out: ImageSet) -> str:
    """What was found, in words: how many images, which classes by what, and where the held-out ones are from."""
    classes = 0 if train.labels is None else len(train.labels.unique())
    labels = f"{classes:,} class{'es' if classes != 1 else ''} by {train.about_labels}" if classes else "no labels"
    why = f" ({train.about_labels})" if not classes and train.about_labels else ""
    if classes and held_out.labels is None:
        why = f", but the held-out images have no labels ({held_out.about_labels})"
    cut = f" ({train.origin})" if train.origin else ""
    return f"{len(train):,} training images{cut}, {labels}{why}; {len(held_out):,} held out ({held_out.origin})"


def _sizes_in_words(images: ImageSet) -> str:
    assert images.labels is not None
    sizes = images.labels.unique(return_counts=True)[1]
    return f"{int(sizes.max()):,} images in the largest class, {int(sizes.min()):,} in the smallest"


def _checked(images: LazyImages, show: bool) -> LazyImages:
    """The images that can be read, all of which are decoded once; the others are dropped and listed in ``bad``."""

    def check(encoded: bytes | str) -> None:
        with open_image(encoded) as image:
            _pixels(image)

    errors = itertools.chain(*_in_threads(images.source, images.index, check, "checking held-out images", show))
    reasons = {i: e for i, e in enumerate(errors) if e is not None}
    images.note_bad([f"{images.name(i)}: {e}" for i, e in reasons.items()])
    if not reasons:
        return images
    good = [i for i in range(len(images)) if i not in reasons]
    return replace(subset(images, good), bad=images.bad, dropped=len(reasons))  # type: ignore[arg-type,return-value]


def load_items(items: Items, index: np.ndarray, config: DataConfig, progress: bool) -> ImageSet:
    """The images of ``items`` at ``index``, in memory where they fit ``config.memory_gb``, see `load_images`."""
    limit, n = config.memory_gb * 1e9, len(items.source)
    labels = None if items.labels is None else torch.from_numpy(items.labels[index])
    small = not items.source.bytes_over(index, limit)
    decoded = _decode_all(items.source, index, limit, progress) if small else None
    if decoded is None:
        if isinstance(items.source, ParquetRows) and not items.source.bytes_over(np.arange(n), limit):
            items.source.preload()
        images: ImageSet = LazyImages(items.source, index, labels, items.classes, max_bad=config.max_bad)
        return replace(images, about_labels=items.about_labels, origin=items.origin)
    pairs = zip(index, decoded, strict=True)
    bad = [f"{shown(items.source.name(int(i)))}: {d}" for i, d in pairs if isinstance(d, DataError)]
    if len(bad) > config.max_bad * len(index):
        raise DataError(bad_message(bad, len(index), config.max_bad))
    good = [k for k, d in enumerate(decoded) if isinstance(d, np.ndarray)]
    sizes = torch.tensor([decoded[k].shape[:2] for k in good], dtype=torch.int64).reshape(-1, 2)  # type: ignore[union-attr]
    height, width = sizes.amax(0).tolist() if good else (0, 0)
    canvas = torch.zeros(len(good), 3, height, width, dtype=torch.uint8)
    view = canvas.numpy()
    for row, k in enumerate(good):
        pixels = decoded[k]
        assert isinstance(pixels, np.ndarray)
        view[row, :, : pixels.shape[0], : pixels.shape[1]] = pixels.transpose(2, 0, 1)
        decoded[k] = DataError("")  # free as we go: the canvas is a second copy
    names = [shown(items.source.name(int(index[k]))) for k in good]
    images = MemoryImages(canvas, sizes, None if labels is None else labels[good], items.classes, bad, names)
    return replace(images, about_labels=items.about_labels, origin=items.origin)


def _builtin(name: str, config: DataConfig, rng: np.random.Generator) -> tuple[MemoryImages, MemoryImages]:
    if name != "digits":
        raise DataError(f"builtin:{name}: no such built-in set; there is builtin:digits")
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))
    n = len(pixels)
    images = MemoryImages(
        pixels[:, None].expand(n, 3, 8, 8).contiguous(),
        torch.full((n, 2), 8),
        torch.from_numpy(digits.target.astype(np.int64)),
        [str(i) for i in range(10)],
        names=[f"digit {i}" for i in range(n)],
    )
    train, held = split_items(n, digits.target, DIGITS_HELD_OUT, config.held_out_max, rng)
    return subset(images, train), subset(images, held)  # type: ignore[return-value]


def load_images(
    path: str | Path, config: DataConfig, seed: int, val_path: str | Path | None = None, progress: bool = True
) -> tuple[ImageSet, ImageSet]:
    """Training and held-out images of ``path``.

    ``path`` is ``builtin:digits`` (scikit-learn's 1,797 digits of 8×8), a ``.parquet`` file or a folder of
    them, a ``.csv`` file of paths and labels, or a folder of images. A folder may have ``train`` and ``val``,
    ``validation`` or ``test`` parts (sub-folders, or names of Parquet shards), a ``train.csv`` a ``val.csv``,
    ``validation.csv`` or ``test.csv`` beside it. Class folders are numbered by code point; deeper images belong to
    their top-level class. A folder with images outside class folders is unlabelled. Links to folders are followed,
    each real folder once. ``config.image`` and ``config.label`` name the columns of Parquet and CSV files; which
    are taken without, :mod:`uncollapse.data.parquet` says. A row without a usable label makes the split unlabelled;
    ``about_labels`` of the sets says so.

    Without a held-out part (or ``val_path``), ``config.held_out`` of the images is split off, by class where
    there are labels, at least one from each class with two; 0.2 for the digits. At most
    ``config.held_out_max`` are held out: of a given split a random subset, otherwise the rest stays in
    training. ``seed`` fixes both. ``config.long_tail`` then cuts the training images, and only these, to an imbalance
    factor (:func:`~uncollapse.data.long_tail.long_tail_rows`); of the same training images every seed keeps the same.

    A set whose n×3×max height×max width bytes fit ``config.memory_gb`` is decoded into
    :class:`MemoryImages`, without its unreadable images (see ``bad``); otherwise it is :class:`LazyImages`. Sizes are
    known before anything is decoded; while loading, twice that memory may be in use. Held-out images that are not
    kept in memory are decoded once, so that what evaluates them finds readable ones only.
    ``progress`` shows a bar on stderr while decoding takes more than two seconds. Raises :class:`DataError`
    where nothing usable is found, fewer than two training or two held-out images remain, too many are unreadable, or
    a long tail cannot be cut.
    """
    rng = np.random.default_rng(seed)
    train: ImageSet
    held: ImageSet
    if str(path).startswith("builtin:"):
        if val_path is not None:
            raise DataError(f"{path}: a built-in set has its own held-out images; leave out {val_path}")
        whole, held = _builtin(str(path).removeprefix("builtin:"), config, rng)
        held.origin = "split off by class"
        assert whole.labels is not None
        n_whole = len(whole)
        kept = cut_long_tail(np.arange(n_whole), whole.labels.numpy(), config.long_tail, f"{path}: data.long_tail")
        train = subset(whole, kept)
    else:
        items, held_items = find_items(Path(path), config.image, config.label)
        if val_path is not None:
            held_items = replace(
                find_items(Path(val_path), config.image, config.label)[0], origin=f"data.val_path {shown(val_path)}"
            )
        n = len(items.source)
        if held_items is None:
            if n < 2:
                raise DataError(
                    f"{path}: found {n} image(s), but at least two for training and two to hold out are needed"
                )
            index, held_index = split_items(n, items.labels, config.held_out, config.held_out_max, rng)
            how = "by class" if items.labels is not None else "at random, as there are no labels"
            held_items = replace(items, origin=f"split off {how}")
        else:
            held_items, index, m = _aligned(held_items, items), np.arange(n), len(held_items.source)
            held_index = np.sort(rng.permutation(m)[: config.held_out_max])
            if len(held_index) < m:
                held_items.origin = f"{len(held_index):,} of {m:,} at random from {held_items.origin}"
        n_whole = len(index)
        index = cut_long_tail(index, items.labels, config.long_tail, f"{path}: data.long_tail", items.about_labels)
        train = load_items(items, index, config, progress)
        held = load_items(held_items, held_index, config, progress)
        if isinstance(held, LazyImages):
            held = _checked(held, progress)
    if len(train) < 2 or len(held) < 2:
        raise DataError(
            f"{path}: {len(train)} training and {len(held)} held-out image(s) are usable, but at "
            f"least two of each are needed; data.held_out and data.held_out_max set how many are held out"
        )
    if config.long_tail > 1:
        train.origin = f"a long tail cut from {n_whole:,}: {_sizes_in_words(train)}"
    return train, held
