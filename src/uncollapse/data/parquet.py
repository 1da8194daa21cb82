"""Images and labels in Parquet files: which columns hold them, and reading them a row group at a time.

A Parquet file states how much it unpacks to; what it states is checked before anything is unpacked. Whatever pyarrow
raises becomes a :class:`~uncollapse.errors.DataError`.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uncollapse.data.decode import MAX_BYTES
from uncollapse.errors import DataError
from uncollapse.shown import in_words, shown

LABELS = (
    "label",
    "labels",
    "class",
    "class_label",
    "class_id",
    "class_name",
    "target",
    "targets",
    "category",
    "category_id",
    "fine_label",
    "coarse_label",
)
"""Names of columns that are taken for labels, in order of preference."""

IMAGES = ("image", "img", "image_bytes", "bytes", "jpg", "jpeg", "png", "webp")
"""Names of columns of bytes that are taken for encoded images."""

GROUP_BYTES = 2**31 - 1
"""A column of a row group may unpack to so many bytes; all row groups kept at a time have so many too."""

GROUPS_KEPT = 4
MAX_CLASSES = 1 << 20
"""Whole numbers up to this are labels as they are; larger ones are names of classes."""


@contextmanager
def arrow_errors(path: str | Path, what: str = "not a readable Parquet file") -> Iterator[None]:
    """Turns whatever pyarrow raises, and lack of memory, into :class:`DataError`."""
    try:
        yield
    except DataError:
        raise
    except Exception as e:
        raise DataError(f"{path}: {what} ({in_words(e)})") from e


def open_parquet(path: str | Path, read_dictionary: Sequence[str] | None = None) -> Any:
    """A Parquet file opened for reading; raises :class:`DataError` where it is none."""
    import pyarrow.parquet as pq

    with arrow_errors(path):
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise DataError(f"{path}: not a regular file (but a folder, pipe, socket or device)")
        file = pq.ParquetFile(path, read_dictionary=read_dictionary)
        metadata, size = file.metadata, os.stat(path).st_size
        rows = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows or sum(rows) > size:
            raise DataError(f"{path}: {sum(rows):,} rows in a file of {size:,} bytes cannot hold images")
        return file


# --- columns ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """Where a schema has images and labels."""

    image: str
    leaf: str
    """The column of bytes: ``image`` itself, or a field of it."""
    label: str | None
    classes: list[str]
    """Names that the metadata give the label's numbers; empty without."""
    seen: str
    """All columns and their types, in words."""


def find_columns(schema: Any, path: str | Path, image: str = "", label: str = "") -> Columns:
    """Image and label column of an Arrow schema; ``image`` and ``label`` name them where given.

    An image column is a struct with a field ``bytes`` (Hugging Face's layout), or bytes under a name in ``IMAGES``.
    A label column is a ``ClassLabel``, or whole numbers or text under a name in ``LABELS``. Raises
    :class:`DataError` without an image column, and for named columns that are not there or of another type.
    """
    import pyarrow.types as types

    features: dict[str, Any] = {}
    # Without (readable) metadata of Hugging Face datasets, the column types decide.
    with suppress(KeyError, ValueError, TypeError, RecursionError):
        features = dict(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
    kinds = {n: f.get("_type") for n, f in features.items() if isinstance(f, dict) and n in schema.names}
    seen = ", ".join(f"{f.name} ({f.type})" for f in schema)[:500] or "none"
    for key, name in (("image", image), ("label", label)):
        if name and schema.names.count(name) != 1:
            raise DataError(f"{path}: data.{key}: no column {name!r}; columns are {seen}")

    def is_bytes(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    def is_struct(kind: Any) -> bool:
        at = kind.get_field_index("bytes") if types.is_struct(kind) else -1
        return at >= 0 and is_bytes(kind.field(at).type)

    def is_label(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return bool(
            types.is_integer(kind)
            or types.is_boolean(kind)
            or types.is_floating(kind)
            or types.is_string(kind)
            or types.is_large_string(kind)
        )

    shaped = [f.name for f in schema if is_struct(f.type)]
    plain = [f.name for f in schema if is_bytes(f.type)]
    if image and image not in (*shaped, *plain):
        raise DataError(f"{path}: data.image: column {image!r} holds no encoded images, but {schema.field(image).type}")
    image_column = image or next((n for n in shaped if kinds.get(n) == "Image"), shaped[0] if shaped else "")
    image_column = image_column or next((n for name in IMAGES for n in plain if n.lower() == name), "")
    if not image_column:
        raise DataError(
            f"{path}: no image column: looked for a struct with a field 'bytes' (Hugging Face's image "
            f"layout) or bytes called {', '.join(IMAGES)}, found columns {seen}; --data.image COLUMN "
            "names another"
        )
    usable = [
        n for n in schema.names if schema.names.count(n) == 1 and n != image_column and is_label(schema.field(n).type)
    ]
    if label and label not in usable:
        raise DataError(f"{path}: data.label: column {label!r} holds no labels, but {schema.field(label).type}")
    named = [n for n in usable if kinds.get(n) == "ClassLabel"]
    usual = [n for name in LABELS for n in usable if n.lower() == name]
    chosen = label or next((n for n in usual if n in named), None) or next(iter(named + usual), None)
    names = features[chosen].get("names") if chosen is not None and chosen in named else None
    classes = [shown(str(n)) for n in names] if isinstance(names, list) else []
    return Columns(
        image_column, f"{image_column}.bytes" if image_column in shaped else image_column, chosen, classes, seen
    )


def read_labels(
    files: Sequence[Any], paths: Sequence[str | Path], columns: Columns
) -> tuple[np.ndarray | None, list[str], str]:
    """Label numbers of all rows (int64), names of the classes, and in words what gave the labels or why there are none.

    One row without a usable label (null, negative, without a class name) leaves the whole set unlabelled. Text is
    numbered by code point.
    """
    name = columns.label
    if name is None:
        return (
            None,
            [],
            (
                f"no column is a ClassLabel or called {', '.join(LABELS)}; columns are {columns.seen}; "
                f"--data.label COLUMN names one"
            ),
        )
    parts: list[np.ndarray] = []
    for file, path in zip(files, paths, strict=True):
        check_size(file.metadata, name, path)
        with arrow_errors(path, f"cannot read column '{name}'"):
            values = _values(file, path, name)
            if len(values) != file.metadata.num_rows:
                raise DataError(f"{path}: column '{name}' has {len(values)} of {file.metadata.num_rows} rows")
            missing = np.array([v is None for v in values]) if values.dtype == object else np.isnan(values)
            if missing.any():
                return None, [], _row_without(path, name, int(missing.argmax()), "null")
            if values.dtype != object:
                if (np.rint(values) != values).any():
                    return None, [], f"column '{name}' of {shown(path)} holds numbers that are not whole"
                values = values.astype(np.int64)
            most = len(columns.classes) or math.inf
            if values.dtype != object and (unfit := (values < 0) | (values >= most)).any():
                row = int(unfit.argmax())
                return None, [], _row_without(path, name, row, str(values[row]))
        parts.append(values)
    text = any(p.dtype == object for p in parts)
    labels = np.concatenate([np.array([*map(str, p), None], dtype=object)[:-1] for p in parts] if text else parts)
    if text or labels.max(initial=0) >= MAX_CLASSES:
        names, labels = np.unique(labels, return_inverse=True)
        return labels.astype(np.int64), [shown(str(n)) for n in names], f"column '{name}'"
    return labels, columns.classes, f"column '{name}'"


def _row_without(path: str | Path, column: str, row: int, value: str) -> str:
    return f"{shown(path)}, row {row}: its '{column}' is {value}, and one such row leaves the set unlabelled"


def _values(file: Any, path: str | Path, name: str) -> np.ndarray:
    """Values of a column: numbers (nulls are NaN), or objects (text and None)."""
    import pyarrow.types as types

    kind = file.schema_arrow.field(name).type
    if types.is_string(kind) or types.is_large_string(kind):
        file = open_parquet(path, [name])  # text that repeats stays as small as it is in the file
    column = file.read(columns=[name], use_threads=False).column(name)
    if not types.is_dictionary(column.type):
        return np.asarray(column.to_numpy())
    pieces = [np.empty(0, dtype=object)]
    for chunk in column.chunks:
        words = np.array([*chunk.dictionary.to_pylist(), None], dtype=object)
        pieces.append(words[chunk.indices.fill_null(len(words) - 1).to_numpy(zero_copy_only=False)])
    return np.concatenate(pieces)


def check_size(metadata: Any, leaf: str, path: str | Path) -> int:
    """Bytes that the row groups of a column unpack to; :class:`DataError` where one passes ``GROUP_BYTES``."""
    total = 0
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        for c in range(group.num_columns):
            column = group.column(c)
            if column.path_in_schema == leaf or column.path_in_schema.startswith(f"{leaf}."):
                size = column.total_uncompressed_size
                if not 0 <= size <= GROUP_BYTES:
                    raise DataError(
                        f"{path}: row group {g} unpacks to {size / 1e9:.1f} GB in column '{leaf}', more "
                        f"than {GROUP_BYTES / 1e9:.1f}; write the file with smaller row groups"
                    )
                total += size
    return total


# --- encoded images -----------------------------------------------------------------------------------------


class ParquetRows:
    """Encoded images in column ``columns.leaf`` of Parquet shards, read one row group at a time.

    ``nbytes``: what all of them unpack to. A row group that cannot be read makes its rows unreadable, and no others.
    File handles and the cache belong to a process and are left behind when pickled.
    """

    def __init__(self, files: Sequence[Any], paths: Sequence[str | Path], leaf: str) -> None:
        self.paths, self.leaf = [str(p) for p in paths], leaf
        self.groups: list[tuple[int, int, int]] = []  # shard, row group, first row within the shard
        self.nbytes = 0
        starts = [0]
        for shard, (file, path) in enumerate(zip(files, paths, strict=True)):
            metadata, row = file.metadata, 0
            self.nbytes += check_size(metadata, leaf, path)
            for group in range(metadata.num_row_groups):
                self.groups.append((shard, group, row))
                row += metadata.row_group(group).num_rows
                starts.append(starts[-1] + metadata.row_group(group).num_rows)
        self.starts = np.asarray(starts)
        self._keep, self._keep_bytes = GROUPS_KEPT, float(GROUP_BYTES)
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
        """The column of row group ``g``, or the error of reading it."""
        if g not in self._cache:
            try:
                read = self._read_group(g)
            except DataError as e:
                read = e
            size = getattr(read, "nbytes", 0)
            while self._cache and (len(self._cache) >= self._keep or self._kept_bytes() + size > self._keep_bytes):
                self._cache.pop(next(iter(self._cache)))
            self._cache[g] = read
        return self._cache[g]

    def _kept_bytes(self) -> int:
        return sum(getattr(group, "nbytes", 0) for group in self._cache.values())

    def _read_group(self, g: int) -> Any:
        import pyarrow as pa

        shard, group, _ = self.groups[g]
        # A forked worker must not share the parent's file position.
        key = (os.getpid(), shard)
        if key not in self._handles:
            # One image may stand for many rows; as a dictionary it is unpacked once.
            self._handles[key] = open_parquet(self.paths[shard], [self.leaf])
        with arrow_errors(self.paths[shard], f"cannot read row group {group}"):
            table = self._handles[key].read_row_group(group, columns=[self.leaf], use_threads=False)
            column = table.column(0)
            if "." in self.leaf and pa.types.is_struct(column.type):
                column = pa.chunked_array([c.field("bytes") for c in column.chunks])
            return column

    def read(self, i: int) -> bytes:
        """Encoded bytes of row ``i``, empty where it has none; raises :class:`~uncollapse.errors.DataError`."""
        g, row = self._find(i)
        column = self._group(g)
        if isinstance(column, DataError):
            raise DataError(f"{column}")
        with arrow_errors(self.name(i), "cannot be read"):
            cell = column[row]
            cell = getattr(cell, "value", cell)  # what it stands for, where it is of a dictionary
            buffer = cell.as_buffer() if cell is not None and cell.is_valid else b""
            if len(buffer) > MAX_BYTES:
                raise DataError(f"{len(buffer)} bytes are more than the limit of {MAX_BYTES}")
            return bytes(buffer)

    def bytes_over(self, index: np.ndarray, limit: float) -> bool:
        return self.nbytes * len(index) / max(len(self), 1) > limit

    def preload(self) -> None:
        """Keep all encoded bytes in memory (forked workers share them), because shuffled reads are slow."""
        self._keep, self._keep_bytes = max(len(self.groups), 1), math.inf
        for g in range(len(self.groups)):
            self._group(g)
