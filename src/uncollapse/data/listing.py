"""Which images, labels and held-out part a path holds: folders, Parquet, and CSV files. Nothing is decoded."""

from __future__ import annotations

import csv
import os
import re
import stat
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from uncollapse.data.images import Files
from uncollapse.data.parquet import LABELS, ParquetRows, find_columns, open_parquet, read_labels
from uncollapse.errors import DataError
from uncollapse.shown import shown

SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2"]
)
"""File names that count as images in a folder, compared in lower case. Other files are ignored."""

HELD_OUT = ("val", "validation", "test")
"""Names of a held-out split, in order of preference."""

PATHS = ("path", "image", "file", "filename", "file_name", "image_path", "filepath", "file_path", "img")
"""Names of CSV columns that are taken for paths of images, in order of preference."""


@dataclass
class Items:
    """What a path holds, before anything is decoded. ``about_labels`` and ``origin`` are words for the user."""

    source: Files | ParquetRows
    labels: np.ndarray | None
    classes: list[str]
    about_labels: str = ""
    origin: str = ""


# --- folders ------------------------------------------------------------------------------------------------


def visible(path: Path) -> list[Path]:
    try:
        return sorted(p for p in path.iterdir() if not p.name.startswith("."))
    except OSError as e:
        raise DataError(f"{path}: cannot be listed ({e.strerror})") from None


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads round in a circle
        return False


def _walk(folder: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Relative folder ("" at the top) and entry of every visible thing below ``folder`` that is not itself a folder.

    Links to folders are followed, after all real ones; each real folder is entered once, and the folders above
    ``folder`` never, so no image comes twice and none of another part comes at all.
    """
    seen = {_identity(p) for p in Path(os.path.realpath(folder)).parents}
    real, links = deque([""]), deque[str]()
    while real or links:
        relative = real.popleft() if real else links.popleft()
        path = os.path.join(folder, relative)
        try:
            if (identity := _identity(path)) in seen:
                continue
            seen.add(identity)
            with os.scandir(path) as listed:
                entries = sorted(listed, key=lambda e: e.name)
        except OSError as e:
            if not relative:
                raise DataError(f"{path}: cannot be listed ({e.strerror})") from None
            warnings.warn(f"{shown(path)}: cannot be listed ({e.strerror}), its images are left out", stacklevel=1)
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                (links if entry.is_symlink() else real).append(os.path.join(relative, entry.name))
            else:
                yield relative, entry


def _names(folder: Path, suffixes: frozenset[str]) -> list[str]:
    names = (
        os.path.join(relative, e.name)
        for relative, e in _walk(folder)
        if os.path.splitext(e.name)[1].lower() in suffixes
    )
    return sorted(names)


def image_names(folder: Path) -> list[str]:
    """Relative paths of the image files below ``folder``, sorted by code point; hidden ones are left out."""
    return _names(folder, SUFFIXES)


def _folder_items(folder: Path) -> Items:
    """Top-level folders with images are classes; an image outside of them makes the set unlabelled."""
    names = image_names(folder)
    if not names:
        inside = ", ".join(p.name for p in visible(folder)[:5]) or "nothing"
        raise DataError(
            f"{folder}: no images: looked for {', '.join(sorted(SUFFIXES))} and .parquet files, found {inside}"
        )
    tops = [n.split(os.sep, 1)[0] if os.sep in n else "" for n in names]
    loose = [n for n, top in zip(names, tops, strict=True) if not top]
    if loose:
        why = "no image lies in a sub-folder, whose name would be its class"
        if len(loose) < len(names):
            why = (
                f"{shown(folder / loose[0])} lies beside the class folders ({len(loose)} such file(s)); move it "
                "into one"
            )
        return Items(Files(str(folder), names), None, [], why)
    classes = sorted(set(tops))
    number = {c: i for i, c in enumerate(classes)}
    order = sorted(range(len(names)), key=lambda i: (number[tops[i]], names[i]))
    labels = np.array([number[tops[i]] for i in order], dtype=np.int64)
    source = Files(str(folder), [names[i] for i in order])
    return Items(source, labels, [shown(c) for c in classes], "sub-folders")


# --- Parquet ------------------------------------------------------------------------------------------------


def _first_few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", … {len(names)} in all" if len(names) > 3 else "") or "no names"


def _parquet_items(paths: Sequence[Path], image: str, label: str) -> Items:
    files = [open_parquet(path) for path in paths]
    columns = [find_columns(f.schema_arrow, p, image, label) for f, p in zip(files, paths, strict=True)]
    first = columns[0]
    for path, other in zip(paths, columns, strict=True):
        if (other.leaf, other.label) != (first.leaf, first.label):
            raise DataError(f"{path}: its image and label columns are not those of {paths[0]}")
        if other.classes != first.classes:
            raise DataError(
                f"{path}: its classes ({_first_few(other.classes)}) are not those of {paths[0]} "
                f"({_first_few(first.classes)}), so the two are not shards of one set; name one of them"
            )
    return Items(ParquetRows(files, paths, first.leaf), *read_labels(files, paths, first))


def _split_of(path: Path, root: Path) -> str:
    """Split that the name of a shard, or of a folder above it, announces; "train" where none does."""
    for part in reversed(path.relative_to(root).parts):
        match = re.match(r"(train|validation|val|test)(?![a-z])", part.lower())
        if match:
            return match[1]
    return "train"


def _sharded_items(path: Path, shards: Sequence[Path], image: str, label: str) -> tuple[Items, Items | None]:
    splits: dict[str, list[Path]] = {}
    for p in shards:
        splits.setdefault(_split_of(p, path), []).append(p)
    if "train" not in splits:
        raise DataError(
            f"{path}: no training shards: looked for train*.parquet, found {', '.join(p.name for p in shards[:5])}"
        )
    train = _parquet_items(splits["train"], image, label)
    held = next((s for s in HELD_OUT if s in splits), None)
    if held is None:
        return train, None
    return train, replace(_parquet_items(splits[held], image, label), origin=f"the split '{held}' of {shown(path)}")


# --- CSV ----------------------------------------------------------------------------------------------------


def _csv_items(path: Path, image: str, label: str) -> Items:
    """Paths (relative to the file) and labels of a CSV file: the columns named, or of a usual name, or the first two.

    The first line is a heading unless its first cell ends like an image and no column was named. Labels are names of
    classes, numbered by code point, numbers by size; a missing one leaves the set unlabelled.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise DataError(f"{path}: not a regular file")
        rows: list[tuple[int, list[str]]] = []
        # Names of files need not be UTF-8.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file)
            rows += [(reader.line_num, row) for row in reader if row]
    except (OSError, csv.Error) as e:
        raise DataError(f"{path}: cannot be read as CSV ({e})") from None
    if not rows:
        raise DataError(f"{path}: no line in it; expected lines of path,label")
    heading = [cell.strip() for cell in rows[0][1]]
    seen = f"columns are {', '.join(heading)[:300]}"
    headed = bool(image or label) or os.path.splitext(heading[0])[1].lower() not in SUFFIXES
    if headed:
        rows = rows[1:]
        at = _csv_column(heading, image, PATHS, f"{path}: data.image", seen)
        if at is None:
            raise DataError(
                f"{path}: no column of paths: looked for {', '.join(PATHS)}; {seen}; --data.image COLUMN names one"
            )
        by = _csv_column(heading, label, LABELS, f"{path}: data.label", seen)
    else:
        at, by = 0, 1 if len(heading) > 1 else None
    short = next((number for number, row in rows if len(row) <= max(at, by or 0)), None)
    if short is not None:
        raise DataError(f"{path}, line {short}: fewer columns than the first line has")
    names = [row[at] for _, row in rows]
    empty = next((number for (number, _), name in zip(rows, names, strict=True) if not name or "\0" in name), None)
    if empty is not None:
        raise DataError(f"{path}, line {empty}: no path of an image")
    source = Files(os.path.abspath(path.parent), names)
    if names and not any(os.path.exists(source.name(i)) for i in range(min(len(names), 20))):
        raise DataError(
            f"{path}: its images are not where it says: {source.name(0)} does not exist; paths count from {path.parent}"
        )
    if by is None:
        why = f"no column is called {', '.join(LABELS)}; {seen}; --data.label COLUMN names one"
        why = why if headed else "its lines hold one column"
        return Items(source, None, [], shown(why))
    values = [row[by].strip() for _, row in rows]
    missing = next((number for (number, _), value in zip(rows, values, strict=True) if not value), None)
    if missing is not None:
        return Items(
            source, None, [], f"{shown(path)}, line {missing} has no label, and one such line leaves the set unlabelled"
        )
    numeric = all(v.isascii() and v.isdigit() and len(v) < 19 for v in values)
    classes = sorted(set(values), key=int) if numeric else sorted(set(values))
    number = {c: i for i, c in enumerate(classes)}
    labels = np.array([number[v] for v in values], dtype=np.int64)
    return Items(source, labels, [shown(c) for c in classes], f"column '{shown(heading[by]) if headed else 2}'")


def _csv_column(heading: Sequence[str], column: str, usual: Sequence[str], key: str, seen: str) -> int | None:
    if column:
        if column not in heading:
            raise DataError(f"{key}: no column {column!r}; {seen}")
        return heading.index(column)
    lower = [h.lower() for h in heading]
    return next((lower.index(name) for name in usual if name in lower), None)


# --- any path -----------------------------------------------------------------------------------------------


def find_items(path: Path, image: str = "", label: str = "") -> tuple[Items, Items | None]:
    """Training items of ``path`` and, where it has a held-out split, those; nothing is decoded.

    ``image`` and ``label`` name columns of Parquet and CSV files. Raises :class:`~uncollapse.errors.DataError` for
    anything that is no data set.
    """
    suffix = path.suffix.lower()
    try:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        if not path.is_dir():
            if suffix not in (".parquet", ".csv"):
                raise DataError(
                    f"{path}: expected a folder of images, a .parquet file or a folder of them, a .csv file "
                    "of paths and labels, or builtin:digits, found another file"
                )
            return _one_file(path, image, label)
    except (OSError, ValueError) as e:
        if isinstance(e, DataError):
            raise
        raise DataError(f"{path}: cannot be looked at ({e})") from None
    shards = [path / name for name in _names(path, frozenset([".parquet"]))]
    if shards:
        return _sharded_items(path, shards, image, label)
    if image or label:
        raise DataError(
            f"data.{'image' if image else 'label'}: names a column, but {path} is a folder of images, "
            "whose classes are its sub-folders"
        )
    return _folders(path)


def _one_file(path: Path, image: str, label: str) -> tuple[Items, Items | None]:
    if path.suffix.lower() == ".parquet":
        return _parquet_items([path], image, label), None
    train = _csv_items(path, image, label)
    if "train" in path.stem:
        for name in HELD_OUT:
            beside = path.with_stem(name.join(path.stem.rsplit("train", 1)))
            if beside.is_file():
                return train, replace(_csv_items(beside, image, label), origin=f"{shown(beside.name)} beside it")
    return train, None


def _folders(path: Path) -> tuple[Items, Items | None]:
    folders = [p for p in visible(path) if p.is_dir()]
    names = {p.name for p in folders}
    siblings = [s for s in HELD_OUT if s in names]
    # "train" can also be a class (of vehicles): it is a split only where something else says so.
    alone = len(folders) == 1
    if "train" in names and (siblings or alone or any(p.is_dir() for p in visible(path / "train"))):
        train = path / "train"
        held = next((path / s for s in siblings if image_names(path / s)), None)
        if held is None:
            return _folder_items(train), None
        if _identity(held) == _identity(train):
            raise DataError(f"{held}: the same folder as {train}, so nothing is held out; remove one of the two")
        return _folder_items(train), replace(_folder_items(held), origin=f"the folder {shown(held)}")
    return _folder_items(path), None
