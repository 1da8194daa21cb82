"""Which images a path holds, which of them are held out, and whether they are decoded into memory.

Whether :func:`load_images` returns :class:`~uncollapse.images.MemoryImages` or
:class:`~uncollapse.images.LazyImages` depends only on size: listing, splitting and order are the same for both.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uncollapse.config import DataConfig
from uncollapse.images import (
    DataError,
    Files,
    ImageSet,
    LazyImages,
    MemoryImages,
    ParquetRows,
    bad_message,
    decode,
    open_parquet,
    subset,
)

SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".png",
        ".bmp",
        ".gif",
        ".webp",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".jp2",
    ]
)
"""File names that count as images in a folder, compared in lower case. Other files are ignored."""

HELD_OUT = ("val", "validation", "test")
"""Names of a held-out split, in order of preference."""

DIGITS_HELD_OUT = 0.2
_CHUNK = 64


# --- listing ------------------------------------------------------------------------------------------------


@dataclass
class Items:
    """What a path holds, before anything is decoded."""

    source: Files | ParquetRows
    labels: np.ndarray | None
    classes: list[str]


def visible(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if not p.name.startswith("."))


def image_names(folder: Path) -> list[str]:
    """Relative paths of the image files below ``folder``, sorted by code point; hidden ones are left out."""
    found = []
    for here, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [d for d in folders if not d.startswith(".")]
        for name in files:
            if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith("."):
                found.append(os.path.relpath(os.path.join(here, name), folder))
    return sorted(found)


def _folder_items(folder: Path) -> Items:
    """Top-level folders with images are classes; an image outside of them makes the set unlabelled."""
    names = image_names(folder)
    if not names:
        inside = ", ".join(p.name for p in visible(folder)[:5]) or "nothing"
        raise DataError(f"{folder}: no images: looked for {', '.join(sorted(SUFFIXES))} and .parquet files, "
                        f"found {inside}")  # fmt: skip
    tops = [Path(n).parts[0] if len(Path(n).parts) > 1 else "" for n in names]
    if "" in tops:
        return Items(Files(str(folder), names), None, [])
    classes = sorted(set(tops))
    number = {c: i for i, c in enumerate(classes)}
    order = sorted(range(len(names)), key=lambda i: (number[tops[i]], names[i]))
    labels = np.array([number[tops[i]] for i in order], dtype=np.int64)
    return Items(Files(str(folder), [names[i] for i in order]), labels, classes)


def _columns(schema: Any, path: Path) -> tuple[str, str | None, list[str]]:
    """Image column, label column (or None) and class names of a Parquet schema."""
    import pyarrow.types as types

    features: dict[str, Any] = {}
    # Without (readable) metadata of Hugging Face datasets, the column types decide.
    with suppress(KeyError, ValueError, TypeError):
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    kinds = {n: f.get("_type") for n, f in features.items() if isinstance(f, dict) and n in schema.names}
    shaped = [f.name for f in schema if types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    image = next((n for n in shaped if kinds.get(n) == "Image"), shaped[0] if shaped else None)
    if image is None:
        found = ", ".join(f"{f.name} ({f.type})" for f in schema) or "none"
        raise DataError(f"{path}: no image column: looked for a struct with a field 'bytes' (Hugging Face's "
                        f"image layout), found columns {found}")  # fmt: skip
    named = [n for n, kind in kinds.items() if kind == "ClassLabel"]
    plain = [n for n in ("label", "labels") if n in schema.names and types.is_integer(schema.field(n).type)]
    label = next((n for n in plain if n in named), None) or next(iter(named + plain), None)
    return image, label, list(features[label].get("names") or []) if label in named else []


def unlabelled_because(spec: str) -> str:
    """What keeps a folder or Parquet set from having labels, in words; empty where that is not known."""
    path = Path(spec)
    for folder in (path / "train", path):
        if folder.is_dir():
            loose = [p.name for p in visible(folder) if p.suffix.lower() in SUFFIXES and p.is_file()]
            if loose and any(p.is_dir() for p in visible(folder)):
                return f"{folder / loose[0]} lies beside the class folders ({len(loose)} such file(s)); move it"
    shards = [path] if path.suffix.lower() == ".parquet" else sorted(path.rglob("*.parquet")) if path.is_dir() else []
    for shard in shards:
        opened = open_parquet(shard)
        _, label, classes = _columns(opened.schema_arrow, shard)
        if label is not None:
            values = opened.read(columns=[label]).column(label).to_pylist()
            for row, value in enumerate(values):
                if value is None or value < 0 or (classes and value >= len(classes)):
                    return f"{shard}, row {row}: its '{label}' is {value}, and one such row leaves the set unlabelled"
    return ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", … {len(names)} in all" if len(names) > 3 else "") or "no names"


def _parquet_items(paths: Sequence[Path]) -> Items:
    image, label, classes = _columns(open_parquet(paths[0]).schema_arrow, paths[0])
    parts = []
    for path in paths:
        shard = open_parquet(path)
        found = _columns(shard.schema_arrow, path)
        if found[:2] != (image, label):
            raise DataError(f"{path}: its image and label columns are not those of {paths[0]}")
        if found[2] != classes:
            raise DataError(f"{path}: its classes ({_some(found[2])}) are not those of {paths[0]} ({_some(classes)}), "
                            f"so the two are not shards of one set; name one of them")  # fmt: skip
        if label is not None:
            parts.append(shard.read(columns=[label]).column(label))
    labels = None
    if parts and not any(p.null_count for p in parts):
        labels = np.concatenate([p.to_numpy().astype(np.int64) for p in parts])
        if len(labels) and (labels.min() < 0 or (classes and labels.max() >= len(classes))):
            labels = None
    return Items(ParquetRows(paths, image), labels, classes if labels is not None else [])


def _parquet_split(path: Path, root: Path) -> str:
    """Split that the name of a shard, or of a folder above it, announces; "train" where none does."""
    for part in reversed(path.relative_to(root).parts):
        match = re.match(r"(train|validation|val|test)(?![a-z])", part.lower())
        if match:
            return match[1]
    return "train"


def find_items(path: Path) -> tuple[Items, Items | None]:
    """Training items of ``path`` and, where it has a held-out split, those."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise DataError(f"{path}: expected a folder of images, a .parquet file, a folder of such files "
                            f"or builtin:digits, found another file")  # fmt: skip
        return _parquet_items([path]), None
    shards = sorted(p for p in path.rglob("*.parquet") if not p.name.startswith("."))
    if shards:
        splits: dict[str, list[Path]] = {}
        for p in shards:
            splits.setdefault(_parquet_split(p, path), []).append(p)
        if "train" not in splits:
            raise DataError(f"{path}: no training shards: looked for train*.parquet, found "
                            f"{', '.join(p.name for p in shards[:5])}")  # fmt: skip
        held = next((splits[s] for s in HELD_OUT if s in splits), None)
        return _parquet_items(splits["train"]), _parquet_items(held) if held else None
    folders = [p for p in visible(path) if p.is_dir()]
    names = {p.name for p in folders}
    siblings = [s for s in HELD_OUT if s in names]
    # "train" can also be a class (of vehicles): it is a split only where something else says so.
    alone = len(folders) == 1
    if "train" in names and (siblings or alone or any(p.is_dir() for p in visible(path / "train"))):
        held_folder = next((path / s for s in siblings if image_names(path / s)), None)
        return _folder_items(path / "train"), _folder_items(held_folder) if held_folder else None
    return _folder_items(path), None


def _aligned(held: Items, train: Items) -> Items:
    """``held`` with its labels numbered as in ``train``; by name, because folders may lack a class."""
    if held.labels is None or train.labels is None or held.classes == train.classes:
        return held
    unknown = [c for c in held.classes if c not in train.classes]
    if not held.classes or not train.classes or unknown:
        raise DataError(f"classes of the held-out images are not those of the training images: "
                        f"{', '.join(unknown[:5]) or 'one of the two has no class names'}; "
                        f"training has {', '.join(train.classes[:5]) or 'no names'}")  # fmt: skip
    number = np.array([train.classes.index(c) for c in held.classes])
    return replace(held, labels=number[held.labels], classes=train.classes)


# --- splitting ----------------------------------------------------------------------------------------------


def split_items(n: int, labels: np.ndarray | None, share: float, most: int,
           rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Sorted (train, held-out) positions of n items: ``share`` of each class, at least one if it has two."""
    share = min(share, most / n)
    held: list[int] = []
    groups = [np.arange(n)] if labels is None else [np.flatnonzero(labels == c) for c in np.unique(labels)]
    if all(len(g) < 2 for g in groups):
        groups = [np.arange(n)]
    for group in groups:
        if len(group) >= 2:
            k = min(max(1, round(share * len(group))), len(group) - 1)
            held += rng.permutation(group)[:k].tolist()
    if len(held) > most:
        held = rng.permutation(np.array(held))[:most].tolist()
    mask = np.zeros(n, dtype=bool)
    mask[held] = True
    return np.flatnonzero(~mask), np.flatnonzero(mask)


# --- loading ------------------------------------------------------------------------------------------------


@contextmanager
def _progress(total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function that advances a bar; the bar appears only after two seconds, and leaves no trace."""
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True, disable=not show)
    task, began, shown = bar.add_task("decoding images", total=total), time.monotonic(), False

    def advance(n: int) -> None:
        nonlocal shown
        bar.advance(task, n)
        if not shown and time.monotonic() - began > 2:
            shown = True
            bar.start()

    try:
        yield advance
    finally:
        if shown:
            bar.stop()


def _decode_chunk(items: Sequence[bytes | str]) -> list[np.ndarray | str]:
    out: list[np.ndarray | str] = []
    for item in items:
        try:
            out.append(np.asarray(decode(item)))
        except DataError as e:
            out.append(str(e))
    return out


def _decode_all(source: Files | ParquetRows, index: np.ndarray, limit: float,
                show: bool) -> list[np.ndarray | str] | None:  # fmt: skip
    """Each image as uint8 (height, width, 3), or why it is bad; None if a canvas would pass ``limit``."""
    results: list[np.ndarray | str] = []
    height = width = 0
    waiting: deque[Future[list[np.ndarray | str]]] = deque()
    threads = min(4, os.cpu_count() or 1)
    with _progress(len(index), show) as advance, ThreadPoolExecutor(threads) as pool:
        chunks = [index[i : i + _CHUNK] for i in range(0, len(index), _CHUNK)]
        for k in range(len(chunks) + 2 * threads):
            if k < len(chunks):
                waiting.append(pool.submit(_decode_chunk, [source.read(int(i)) for i in chunks[k]]))
            if k < 2 * threads or not waiting:
                continue
            done = waiting.popleft().result()
            for pixels in done:
                if isinstance(pixels, np.ndarray):
                    height, width = max(height, pixels.shape[0]), max(width, pixels.shape[1])
            results += done
            advance(len(done))
            if 3 * len(index) * height * width > limit:
                return None
    return results


def load_items(items: Items, index: np.ndarray, config: DataConfig, progress: bool) -> ImageSet:
    limit, n = config.memory_gb * 1e9, len(items.source)
    labels = None if items.labels is None else torch.from_numpy(items.labels[index])
    small = not items.source.bytes_over(index, limit)
    decoded = _decode_all(items.source, index, limit, progress) if small else None
    if decoded is None:
        if isinstance(items.source, ParquetRows) and not items.source.bytes_over(np.arange(n), limit):
            items.source.preload()
        return LazyImages(items.source, index, labels, items.classes, max_bad=config.max_bad)
    pairs = zip(index, decoded, strict=True)
    bad = [f"{items.source.name(int(i))}: {d}" for i, d in pairs if isinstance(d, str)]
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
        decoded[k] = ""  # free as we go: the canvas is a second copy
    names = [items.source.name(int(index[k])) for k in good]
    return MemoryImages(canvas, sizes, None if labels is None else labels[good], items.classes, bad, names)


def _builtin(name: str, config: DataConfig, rng: np.random.Generator) -> tuple[MemoryImages, MemoryImages]:
    if name != "digits":
        raise DataError(f"builtin:{name}: no such built-in set; there is builtin:digits")
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))
    n = len(pixels)
    images = MemoryImages(
        pixels[:, None].expand(n, 3, 8, 8).contiguous(), torch.full((n, 2), 8),
        torch.from_numpy(digits.target.astype(np.int64)), [str(i) for i in range(10)],
        names=[f"digit {i}" for i in range(n)],
    )  # fmt: skip
    train, held = split_items(n, digits.target, DIGITS_HELD_OUT, config.held_out_max, rng)
    return subset(images, train), subset(images, held)  # type: ignore[return-value]


def load_images(path: str | Path, config: DataConfig, seed: int, val_path: str | Path | None = None,
                progress: bool = True) -> tuple[ImageSet, ImageSet]:  # fmt: skip
    """Training and held-out images of ``path``.

    ``path`` is ``builtin:digits`` (scikit-learn's 1,797 digits of 8×8), a ``.parquet`` file or a folder of
    them (Hugging Face image layout), or a folder of images. A folder may have ``train`` and ``val``,
    ``validation`` or ``test`` parts (sub-folders, or names of Parquet shards). Class folders are numbered by
    code point; deeper images belong to their top-level class. A folder with images outside class folders is
    unlabelled. In Parquet, the label is a ``ClassLabel`` column or an integer column ``label`` or ``labels``;
    a null, a negative label (-1 means "unknown" there) or one without a class name makes the whole split
    unlabelled.

    Without a held-out part (or ``val_path``), ``config.held_out`` of the images is split off, by class where
    there are labels, at least one from each class with two; 0.2 for the digits. At most
    ``config.held_out_max`` are held out: of a given split a random subset, otherwise the rest stays in
    training. ``seed`` fixes both.

    A set whose n×3×max height×max width bytes fit ``config.memory_gb`` is decoded into
    :class:`MemoryImages`, without its unreadable images (see ``bad``); otherwise it is :class:`LazyImages`.
    ``progress`` shows a bar on stderr while decoding takes more than two seconds. Raises :class:`DataError`
    where nothing usable is found, fewer than two training images remain, or too many are unreadable.
    """
    rng = np.random.default_rng(seed)
    train: ImageSet
    held: ImageSet
    if str(path).startswith("builtin:"):
        if val_path is not None:
            raise DataError(f"{path}: a built-in set has its own held-out images; leave out {val_path}")
        train, held = _builtin(str(path).removeprefix("builtin:"), config, rng)
    else:
        items, held_items = find_items(Path(path))
        if val_path is not None:
            held_items = find_items(Path(val_path))[0]
        n = len(items.source)
        if held_items is None:
            if n < 2:
                raise DataError(f"{path}: found {n} image(s), but two at least are needed to train")
            index, held_index = split_items(n, items.labels, config.held_out, config.held_out_max, rng)
            held_items = items
        else:
            held_items, index, m = _aligned(held_items, items), np.arange(n), len(held_items.source)
            held_index = np.sort(rng.permutation(m)[: config.held_out_max])
        train, held = load_items(items, index, config, progress), load_items(held_items, held_index, config, progress)
    if len(train) < 2 or len(held) < 1:
        raise DataError(f"{path}: {len(train)} training and {len(held)} held-out image(s) are usable, but at "
                        f"least two and one are needed")  # fmt: skip
    return train, held
