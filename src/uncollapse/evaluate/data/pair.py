"""The labelled pair of image sets that an evaluation is done on, from any layout, cut and numbered alike."""

from __future__ import annotations

import hashlib
import os
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uncollapse.config.schema import DataConfig
from uncollapse.data.decode import open_image
from uncollapse.data.images import Files, ImageSet, LazyImages, MemoryImages, subset
from uncollapse.data.listing import Items, find_items, image_names
from uncollapse.data.load import load_images, load_items, split_items
from uncollapse.data.long_tail import cut_long_tail
from uncollapse.data.parquet import ParquetRows
from uncollapse.errors import DataError
from uncollapse.evaluate.data.layouts import (
    INAT,
    LIST,
    TORCHVISION,
    Part,
    file_and_root,
    inat_file,
    inat_parts,
    list_parts,
    torchvision_parts,
)
from uncollapse.shown import shown

BUILTIN = "builtin:"


@dataclass
class Pair:
    """Training and test images, both numbered by the same classes."""

    train: ImageSet
    test: ImageSet
    notes: list[str] = field(default_factory=list)
    """What was found in the data or done to them that the user should know, a line each."""


def load_pair(data: str, seed: int = 0, limit: int | None = None, **options: Any) -> tuple[ImageSet, ImageSet]:
    """Training and test images of `open_pair`, which has the other options too; its notes are warnings."""
    pair = open_pair(data, seed, limit, **options)
    for note in pair.notes:
        warnings.warn(note, stacklevel=2)
    return pair.train, pair.test


def open_pair(
    data: str,
    seed: int = 0,
    limit: int | None = None,
    long_tail: float = 1.0,
    config: DataConfig | None = None,
    progress: bool = False,
) -> Pair:
    """Training and test images of ``data``, which is ``TRAIN`` or ``TRAIN,TEST``.

    Either is a folder of images, a Parquet file or folder, a CSV file or ``builtin:digits`` (`data.load_images`); a
    torchvision set whose files are there, ``torchvision:CIFAR10@ROOT``; iNaturalist's JSON, ``inat:FOLDER`` or a
    ``.json`` file; or lines of path and label, ``list:FILE@ROOT`` or a ``.txt`` file. A folder with
    ``train2018.json`` in it is taken as iNaturalist's. A comma that belongs to a path is written ``\\,``, or
    simply stays where the path exists.

    TRAIN alone brings its own test part, in full, or has ``config.held_out`` of its images split off (at most
    ``config.held_out_max``, by class; with the same seed these are the images that training held out). Of a TEST
    with parts of its own the held-out part is taken, otherwise all of it.

    Classes are numbered as in TRAIN, by name where both have names, otherwise by number. Classes that only TEST
    has are kept behind the others. Folders whose names look like one class written twice, hidden or empty class
    folders, and classes without a readable image are noted; nothing is merged.

    Args:
        limit: most images of each part, after ``long_tail``: a random choice in proportion to the classes.
        long_tail: imbalance factor (largest by smallest class) to which the training part is cut, by
            `long_tail_rows`; 1: as it is. The test part is never cut.
        seed: of the split and of ``limit``.
        progress: a bar on stderr while decoding takes more than two seconds.

    Returns:
        A `Pair` of sets in memory where they are small, else decoded on demand. Labels are None where a part has
        none.

    Raises:
        DataError: nothing usable, two parts that share no class, or a long tail that cannot be drawn.
    """
    config = config or DataConfig()
    if limit is not None and limit < 1:
        raise DataError(f"limit: at least 1 image, got {limit}")
    first, second = split_spec(data)
    notes: list[str] = []
    train, test, chosen, held = _parts(first, second, seed, config, notes)
    classes, test_labels = _aligned(train, test, notes)
    train_index = _cut(train, chosen, seed, limit, long_tail, first)
    test_index = _cut(test, held, seed, limit, 1.0, second or first)
    sets = (
        _load(train, _labels(train), train_index, classes, config, progress),
        _load(test, test_labels, test_index, classes, config, progress),
    )
    for images, spec, what in zip(sets, (first, second or first), ("training", "test"), strict=True):
        if not len(images):
            raise DataError(f"{spec}: no {what} image is usable")
    notes += _unreadable(train, train_index, sets[0])
    same = _same_files(train, train_index, test, test_index)
    if same == len(test_index):
        raise DataError(
            f"{data}: every test image is a training image too, so nothing can be measured; name other "
            "images as TEST, or leave it out to have a part held out"
        )
    if twice := max(same, _same_pixels(*sets)):
        notes.append(
            f"{twice:,} of {len(sets[1]):,} test images are training images too (the same "
            f"{'file' if same else 'pixels'}), which flatters every number"
        )
    return Pair(*sets, notes=notes)


# --- what is named ------------------------------------------------------------------------------------------


def split_spec(data: str) -> tuple[str, str | None]:
    r"""TRAIN and TEST (None without) of ``TRAIN,TEST``; ``\,`` is a comma, and so is one within an existing path.

    Raises `DataError` where one of them is empty, or several commas could be the one between them.
    """

    def plain(text: str) -> str:
        return text.replace("\\,", ",").strip()

    cuts = [i for i, c in enumerate(data) if c == "," and data[i - 1 : i] != "\\"]
    if not cuts or _exists(plain(data)):
        return plain(data), None
    pairs = [(plain(data[:i]), plain(data[i + 1 :])) for i in cuts]
    there = [p for p in pairs if all(map(_exists, p))] or pairs
    if len(there) > 1:
        raise DataError(f"{data}: which of its commas is the one of TRAIN,TEST? Write the others as \\,")
    if not all(there[0]):
        raise DataError(f"{data}: expected TRAIN or TRAIN,TEST, but one of the two is empty")
    return there[0]


def _exists(spec: str) -> bool:
    if spec.startswith(BUILTIN):
        return "," not in spec
    if spec.startswith(TORCHVISION):
        return Path(spec.partition("@")[2]).expanduser().exists()
    if spec.startswith(LIST):
        return file_and_root(spec.removeprefix(LIST)) is not None
    path = spec.removeprefix(INAT)
    return bool(path) and Path(path).expanduser().exists()


def _parts(
    first: str, second: str | None, seed: int, config: DataConfig, notes: list[str]
) -> tuple[Part, Part, np.ndarray, np.ndarray]:
    """Training part, test part, and which of their images are chosen."""
    train, test = _parts_of(first, seed, config, notes)
    if second is not None:
        whole, held = _parts_of(second, seed, config, notes)
        test = held or whole
    n = _count(train)
    if test is not None:
        return train, test, np.arange(n), np.arange(_count(test))
    if n < 2:
        raise DataError(f"{first}: found {n} image(s), but two at least are needed")
    rng = np.random.default_rng(seed)
    return train, train, *split_items(n, _labels(train), config.held_out, config.held_out_max, rng)


def _parts_of(spec: str, seed: int, config: DataConfig, notes: list[str]) -> tuple[Part, Part | None]:
    if spec.startswith(BUILTIN):
        digits = load_images(spec, replace(config, long_tail=1.0), seed)  # cut later, as any other part
        assert isinstance(digits[0], MemoryImages)
        assert isinstance(digits[1], MemoryImages)
        return digits[0], digits[1]
    if spec.startswith(TORCHVISION):
        return torchvision_parts(spec)
    path = Path(spec.removeprefix(INAT)).expanduser()
    if spec.startswith(INAT) or (path.suffix.lower() == ".json" and path.is_file()) or inat_file(path) is not None:
        return inat_parts(path)
    if spec.startswith(LIST) or (path.suffix.lower() == ".txt" and path.is_file()):
        return list_parts(spec)
    items = find_items(path, config.image, config.label)
    for part in items if path.is_dir() else ():
        if part is not None and part.classes and isinstance(part.source, Files):
            notes += folder_notes(Path(part.source.root), part.classes)
    return items


def _count(part: Part) -> int:
    return len(part.source) if isinstance(part, Items) else len(part)


def _labels(part: Part) -> np.ndarray | None:
    return part.labels.numpy() if isinstance(part.labels, torch.Tensor) else part.labels


# --- classes ------------------------------------------------------------------------------------------------


def _listed(names: Sequence[str], most: int = 5) -> str:
    first = ", ".join(repr(n) for n in names[:most])
    return first + (f" and {len(names) - most} more" if len(names) > most else "")


def _aligned(train: Part, test: Part, notes: list[str]) -> tuple[list[str], np.ndarray | None]:
    """Names of all classes, the training part's first, and the test labels numbered by them."""
    labels, ours, theirs = _labels(test), list(train.classes), list(test.classes)
    if labels is None or train.labels is None or ours == theirs:
        return ours, labels
    if not ours or not theirs:
        classes = ours or theirs
        highest = int(labels.max(initial=-1))
        if ours and highest >= len(ours):
            classes = ours + [str(i) for i in range(len(ours), highest + 1)]
            notes.append(f"test labels {len(ours)} to {highest} are not among the {len(ours)} training classes: kept")
        return classes, labels
    extra = [c for c in theirs if c not in set(ours)]
    if len(extra) == len(theirs):
        raise DataError(
            f"training and test images share no class: training has {_listed(ours)}, test has {_listed(theirs)}"
        )
    if extra:
        alike = {_folded(c) for c in extra} & {_folded(c) for c in ours}
        hint = "; some differ from training classes only in case or spaces" if alike else ""
        notes.append(
            f"{len(extra)} test class(es) are not among the training classes and are kept as classes of "
            f"their own: {_listed(extra)}{hint}"
        )
    classes = ours + extra
    number = {c: i for i, c in enumerate(classes)}
    return classes, np.array([number[c] for c in theirs], dtype=np.int64)[labels]


def _folded(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def folder_notes(folder: Path, classes: Sequence[str]) -> list[str]:
    """What looks wrong about the folders in ``folder``, of which ``classes`` hold images; none of it is changed."""
    here = sorted(p for p in folder.iterdir() if p.is_dir())
    names = [shown(p.name) for p in here if not p.name.startswith(".")]
    notes, alike = [], defaultdict(list)
    for name in names:
        alike[_folded(name)].append(name)
    for same in alike.values():
        if len(same) > 1:
            notes.append(
                f"{folder}: class folders {_listed(same)} differ only in case, spaces or Unicode form; "
                "they are separate classes"
            )
    odd = [n for n in names if n != n.strip() and len(alike[_folded(n)]) == 1]
    if odd:
        notes.append(f"{folder}: class folder(s) {_listed(odd)} begin or end with a space, which is part of the name")
    hidden = [shown(p.name) for p in here if p.name.startswith(".") and image_names(p)]
    if hidden:
        notes.append(f"{folder}: hidden folder(s) {_listed(hidden)} hold images, which are left out")
    empty = [n for n in names if n not in set(classes)]
    if empty:
        notes.append(f"{folder}: folder(s) {_listed(empty)} hold no image and are no classes")
    return notes


def _unreadable(part: Part, index: np.ndarray, images: ImageSet) -> list[str]:
    """Classes that had images of which none can be read."""
    labels = _labels(part)
    if not isinstance(part, Items) or labels is None or images.labels is None:
        return []
    wanted = np.unique(labels[index])
    if isinstance(images, LazyImages):
        lost = [int(c) for c in wanted if not _any_opens(part, index[labels[index] == c])]
    else:
        lost = [int(c) for c in np.setdiff1d(wanted, images.labels.unique().numpy())]
    names = [part.classes[c] if part.classes else str(c) for c in lost]
    return [f"{len(names)} class(es) without a readable training image: {_listed(names)}"] if names else []


def _same_files(train: Part, train_index: np.ndarray, test: Part, test_index: np.ndarray) -> int:
    """Test images whose file, or row of a file, is a training image as well."""
    if train is test:  # a part of it is held out
        return 0
    if not isinstance(train, Items) or not isinstance(test, Items) or type(train.source) is not type(test.source):
        return 0
    if isinstance(train.source, ParquetRows) and isinstance(test.source, ParquetRows):
        shards = [set(map(os.path.abspath, source.paths)) for source in (train.source, test.source)]
        if shards[0].isdisjoint(shards[1]):
            return 0
    known = {os.path.abspath(train.source.name(int(i))) for i in train_index}
    return sum(os.path.abspath(test.source.name(int(i))) in known for i in test_index)


def _same_pixels(train: ImageSet, test: ImageSet) -> int:
    """Test images whose pixels are those of a training image; 0 where they are not in memory."""

    def digests(images: MemoryImages) -> list[bytes]:
        canvas, hashes = images.canvas.numpy(), []
        for one, (height, width) in zip(canvas, images.sizes.tolist(), strict=True):
            shape = height.to_bytes(4, "big") + width.to_bytes(4, "big")
            hashes.append(hashlib.blake2b(shape + one[:, :height, :width].tobytes(), digest_size=16).digest())
        return hashes

    if not isinstance(train, MemoryImages) or not isinstance(test, MemoryImages):
        return 0
    known = set(digests(train))
    return sum(one in known for one in digests(test))


def _any_opens(part: Items, rows: np.ndarray) -> bool:
    """Whether one of the images has a readable header; those of Parquet files are not tried."""
    if not isinstance(part.source, Files):
        return True
    for i in rows:
        try:
            with open_image(part.source.name(int(i))):
                return True
        except DataError:
            continue
    return False


# --- cutting ------------------------------------------------------------------------------------------------


def _cut(part: Part, index: np.ndarray, seed: int, limit: int | None, long_tail: float, spec: str) -> np.ndarray:
    labels = _labels(part)
    index = cut_long_tail(index, labels, long_tail, spec, part.about_labels)
    if limit is None or len(index) <= limit:
        return index
    if labels is None:
        return np.sort(np.random.default_rng(seed).permutation(index)[:limit])
    return index[proportional_rows(labels[index], limit, seed)]


def proportional_rows(labels: np.ndarray, most: int, seed: int = 0) -> np.ndarray:
    """Sorted positions of ``most`` of the n labels, each class with its share, by largest remainders."""
    rng = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * (most / len(labels))
    keep = np.floor(exact + 1e-9).astype(int)
    # Equal remainders, as in every balanced set, go to classes at random and not to the first.
    order = np.lexsort((rng.random(len(classes)), -(exact - keep)))
    keep[order[: most - keep.sum()]] += 1
    rows = [rng.permutation(np.flatnonzero(labels == c))[:k] for c, k in zip(classes, keep, strict=True)]
    return np.sort(np.concatenate(rows))


def _load(
    part: Part, labels: np.ndarray | None, index: np.ndarray, classes: list[str], config: DataConfig, progress: bool
) -> ImageSet:
    if isinstance(part, Items):
        return load_items(replace(part, labels=labels, classes=classes), index, config, progress)
    whole = replace(part, labels=None if labels is None else torch.from_numpy(labels), classes=classes)
    return whole if len(index) == len(whole) else subset(whole, index)
