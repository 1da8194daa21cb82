"""Folders of torch.distributed.checkpoint: many ranks' shards put together again, without running what is in them.

DINOv3's training code writes such folders (``ckpt/199``), and so does every trainer that shards with FSDP. Their index
is a pickle, which is read as data (`pickled`): its classes are records of their fields, and other names are refused.
So are the shards, each a file of ``torch.save`` inside a larger one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uncollapse.checkpoints.files import OPTIMIZERS, damage_is_said, line_of
from uncollapse.checkpoints.pickled import Maker, Record, Refused, load
from uncollapse.checkpoints.torchfile import NAMES, read_torch_bytes, without_values
from uncollapse.errors import InputError

INDEX = ".metadata"
_KEPT = """metadata.BytesStorageMetadata metadata.ChunkStorageMetadata metadata.Metadata metadata.MetadataIndex
metadata.StorageMeta metadata.TensorProperties metadata.TensorStorageMetadata metadata._MEM_FORMAT_ENCODING
filesystem._StorageInfo filesystem._StoragePrefix"""
_PLAIN = re.compile(r"pathlib\.\w+|torch\.\w+|torch\.serialization\.\w+|collections\.OrderedDict")
_NAMES: dict[str, Maker | None] = {
    **{f"torch.distributed.checkpoint.{name}": None for name in _KEPT.split()},
    **{name: make for name, make in NAMES.items() if _PLAIN.fullmatch(name)},
}
"""The classes of an index, and the types of tensors."""


def is_sharded(path: Path) -> bool:
    """Whether a folder is a checkpoint of torch.distributed.checkpoint."""
    return path.is_dir() and (path / INDEX).is_file()


def read_sharded(folder: Path, only: Callable[[str], bool] | None = None) -> dict[str, Any]:
    """The tensors of a folder as nested dicts, the way the training code had them; states of optimisers left out.

    Args:
        folder: with an index ``.metadata`` and the files of the ranks.
        only: whether to read the tensor at a path (levels joined by ``/``); the others come without values, on
            torch's meta device. None: all of them.

    Raises:
        InputError: no index, one that is damaged or would run something, or shards that are missing, damaged, or do
            not cover every number exactly once.
    """
    index = _index(folder)
    entries, places = (_field(index, name) for name in ("state_dict_metadata", "storage_data"))
    names = _field(index, "planner_data")
    if not isinstance(entries, dict) or not isinstance(places, dict):
        raise InputError(f"{folder}: {INDEX} holds no index of a distributed checkpoint; copy the folder again")
    stored: dict[str, list[tuple[Any, Any]]] = {}
    for at, info in places.items():
        stored.setdefault(str(_field(at, "fqn")), []).append((_field(at, "offset"), info))
    nested: dict[str, Any] = {}
    sizes = {str(name): _field(entry, "size") for name, entry in entries.items()}
    few = sum(size is not None for size in sizes.values()) <= 3
    taken: set[tuple[str, int]] = set()
    for name, size in sizes.items():
        path = names.get(name) if isinstance(names, dict) else None
        levels = [str(level) for level in path] if isinstance(path, tuple | list) and path else [name]
        if not _whole(size) or OPTIMIZERS.fullmatch(levels[0]) or name.startswith("optimizer."):
            continue  # numbers, text and the like are pickles of their own, and not needed
        wanted = few or only is None or only("/".join(levels))
        tensor = _joined(folder, name, size, stored.get(name, []), taken) if wanted else without_values(size)
        level = nested
        for part in levels[:-1]:
            level = level.setdefault(part, {})
            if not isinstance(level, dict):
                raise InputError(f"{folder}: {name}: its index puts tensors into a tensor; it is damaged")
        level[levels[-1]] = tensor
    return nested


def _field(record: Any, name: str) -> Any:
    return record.get(name) if isinstance(record, Record) else None


def _whole(size: Any) -> bool:
    return isinstance(size, tuple) and len(size) <= 64 and all(type(n) is int and 0 <= n < 1 << 48 for n in size)


def _index(folder: Path) -> Any:
    try:
        with (folder / INDEX).open("rb") as file:
            return load(file, _NAMES)
    except Refused as error:
        raise InputError(
            f"{folder}: {INDEX} is damaged, or names something that no index of a distributed checkpoint needs "
            f"({error}); it was not read"
        ) from None
    except OSError as error:
        raise InputError(f"{folder}: {INDEX} cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise InputError(f"{folder}: {INDEX} is damaged ({line_of(error)}); copy the folder again") from None


def _joined(
    folder: Path, name: str, size: tuple[int, ...], shards: list[tuple[Any, Any]], taken: set[tuple[str, int]]
) -> Tensor:
    """The tensor whose shards these are. taken: bytes that were read for one already, which no other can be."""
    parts: list[tuple[tuple[slice, ...], Tensor]] = []
    for offset, info in shards:
        part = _shard(folder, name, info, taken)
        start = offset if offset is not None else (0,) * part.ndim
        fits = _whole(start) and len(start) == part.ndim == len(size)
        if not fits or any(a + n > most for a, n, most in zip(start, part.shape, size, strict=True)):
            raise InputError(f"{folder}: {name}: a shard {tuple(part.shape)} at {start} does not fit into {size}")
        if parts and part.dtype != parts[0][1].dtype:
            raise InputError(
                f"{folder}: {name}: shards of {part.dtype} and {parts[0][1].dtype}; they do not belong together"
            )
        parts.append((tuple(slice(a, a + n) for a, n in zip(start, part.shape, strict=True)), part))
    covered, total = sum(part.numel() for _, part in parts), math.prod(size)
    if not total:
        return torch.empty(size)
    if covered == total:  # what is claimed is there, so there is memory for it
        whole, filled = torch.empty(size, dtype=parts[0][1].dtype), torch.zeros(size, dtype=torch.bool)
        for at, part in parts:
            whole[at], filled[at] = part, True
        # As many numbers as places, and every place filled: none twice.
        if bool(filled.all()):
            return whole
        raise InputError(
            f"{folder}: {name}: its shards overlap, so that other parts are missing; copy the folder again"
        )
    raise InputError(f"{folder}: {name}: {covered:,} of {total:,} values are there; are files missing, or doubled?")


def _shard(folder: Path, name: str, info: Any, taken: set[tuple[str, int]]) -> Tensor:
    file = str(_field(info, "relative_path") or "")
    if not file or Path(file).name != file or (folder / file).resolve().parent != folder.resolve():
        raise InputError(f"{folder}: {name}: its index points outside of the folder ({file!r}); it was not read")
    if _field(info, "transform_descriptors"):
        raise InputError(f"{folder}: {name}: a compressed shard, which is not read here; save it uncompressed")
    if not (folder / file).exists():
        raise InputError(f"{folder}: {file} is missing, which holds a part of {name}")
    if not (folder / file).is_file():
        raise InputError(f"{folder}: {file} is not an ordinary file; copy the folder again")
    offset, length = _field(info, "offset"), _field(info, "length")
    if not _whole((offset, length)) or (file, offset) in taken:
        raise InputError(f"{folder}: {file}: damaged or cut off at {name} (no place of its own in the file)")
    taken.add((file, offset))
    with damage_is_said(f"{folder}: {file} at {name}"), (folder / file).open("rb") as content:
        content.seek(offset)
        shard = read_torch_bytes(content.read(min(length, (folder / file).stat().st_size)))
    if not isinstance(shard, Tensor):
        raise InputError(f"{folder}: {file}: {name} is no tensor but a {type(shard).__name__}")
    if shard.is_meta or shard.numel() * shard.element_size() > length:
        raise InputError(f"{folder}: {file}: {name}: a shard without values of its own")
    return shard.detach()
