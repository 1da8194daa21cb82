"""Folders of torch.distributed.checkpoint: many ranks' shards put together again, without running what is in them.

DINOv3's training code writes such folders (``ckpt/199``), and so does every trainer that shards with FSDP. Their index
is a pickle. Here its classes are replaced by records that do nothing but keep their fields, and nothing else in it is
ever looked up; the shards themselves are read with ``weights_only``.
"""

from __future__ import annotations

import io
import math
import pathlib
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uncollapse.reading import OPTIMIZERS, InputError, line_of

INDEX = ".metadata"
_METADATA = "torch.distributed.checkpoint.metadata"
_RECORDS = {
    (_METADATA, name)
    for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )
} | {("torch.distributed.checkpoint.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")}  # fmt: skip


def is_sharded(path: Path) -> bool:
    """Whether a folder is a checkpoint of torch.distributed.checkpoint."""
    return path.is_dir() and (path / INDEX).is_file()


class _Record:
    """Keeps the fields of a class of the index."""

    def __init__(self, *given: Any) -> None:
        self.given = given

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update({str(name): value for name, value in state.items()})
        else:
            self.given = state


def _tuple(values: Any = ()) -> tuple[Any, ...]:
    return tuple(values)


def _nothing(*_: Any) -> None:
    return None


class _Index(pickle.Unpickler):
    """An unpickler that knows the classes of an index and no other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            return _Record
        if (module, name) == ("torch", "Size"):
            return _tuple
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _nothing
        if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "WindowsPath", "PurePosixPath"):
            return pathlib.PurePosixPath
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"{module}.{name}")


def read_sharded(folder: Path, only: Callable[[str], bool] | None = None) -> dict[str, Any]:
    """The tensors of a folder as nested dicts, the way the training code had them; states of optimisers left out.

    Args:
        folder: with an index ``.metadata`` and the files of the ranks.
        only: whether to read the tensor at a path (levels joined by ``/``); the others come without values, on
            torch's meta device. None: all of them.

    Raises:
        InputError: no index, one that is damaged or would run something, or shards that are missing or damaged.
    """
    index = _index(folder)
    entries, places = getattr(index, "state_dict_metadata", None), getattr(index, "storage_data", None)
    names = getattr(index, "planner_data", None)
    if not isinstance(entries, dict) or not isinstance(places, dict):
        raise InputError(f"{folder}: {INDEX} holds no index of a distributed checkpoint; copy the folder again")
    stored: dict[str, list[tuple[tuple[int, ...], Any]]] = {}
    for at, info in places.items():
        stored.setdefault(str(getattr(at, "fqn", "")), []).append((tuple(getattr(at, "offset", None) or ()), info))
    found: dict[str, Any] = {}
    sizes = {name: getattr(entry, "size", None) for name, entry in entries.items()}
    few = sum(size is not None for size in sizes.values()) <= 3
    for name, size in sizes.items():
        path = names.get(name) if isinstance(names, dict) else None
        levels = [str(level) for level in path] if isinstance(path, tuple | list) and path else [str(name)]
        if not isinstance(size, tuple) or OPTIMIZERS.fullmatch(levels[0]) or name.startswith("optimizer."):
            continue  # numbers, text and the like are pickles of their own, and not needed
        wanted = few or only is None or only("/".join(levels))
        tensor = _joined(folder, str(name), size, stored.get(str(name), [])) if wanted else _without_values(size)
        level = found
        for part in levels[:-1]:
            level = level.setdefault(part, {})
        level[levels[-1]] = tensor
    return found


def _index(folder: Path) -> Any:
    try:
        with (folder / INDEX).open("rb") as file:
            return _Index(file).load()
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{folder}: {INDEX} is damaged, or names something that no index of a distributed checkpoint needs "
            f"({line_of(error)}); it was not read"
        ) from None
    except OSError as error:
        raise InputError(f"{folder}: {INDEX} cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise InputError(f"{folder}: {INDEX} is damaged ({line_of(error)}); copy the folder again") from None


def _without_values(size: tuple[int, ...]) -> Tensor:
    return torch.empty(size, device="meta")


def _joined(folder: Path, name: str, size: tuple[int, ...], shards: list[tuple[tuple[int, ...], Any]]) -> Tensor:
    whole: Tensor | None = None
    covered = 0
    for offset, info in shards:
        shard = _shard(folder, name, info)
        start = offset or (0,) * shard.ndim
        end = [a + n for a, n in zip(start, shard.shape, strict=False)]
        if len(start) != len(size) or shard.ndim != len(size) or any(e > n for e, n in zip(end, size, strict=True)):
            raise InputError(f"{folder}: {name}: a shard {tuple(shard.shape)} at {start} does not fit into {size}")
        whole = torch.empty(size, dtype=shard.dtype) if whole is None else whole
        whole[tuple(slice(a, e) for a, e in zip(start, end, strict=True))] = shard
        covered += shard.numel()
    if whole is None or covered != math.prod(size):
        raise InputError(f"{folder}: {name}: {covered:,} of {math.prod(size):,} values are there; are files missing?")
    return whole


def _shard(folder: Path, name: str, info: Any) -> Tensor:
    file = str(getattr(info, "relative_path", ""))
    if not file or Path(file).name != file:
        raise InputError(f"{folder}: {name}: its index points outside of the folder ({file!r}); it was not read")
    if getattr(info, "transform_descriptors", None):
        raise InputError(f"{folder}: {name}: a compressed shard, which is not read here; save it uncompressed")
    try:
        with (folder / file).open("rb") as content, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content.seek(int(info.offset))
            shard = torch.load(io.BytesIO(content.read(int(info.length))), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{folder}: {file} is missing, which holds a part of {name}") from None
    except Exception as error:  # a damaged shard can fail in any way
        raise InputError(f"{folder}: {file}: damaged or cut off at {name} ({line_of(error)})") from None
    if not isinstance(shard, Tensor):
        raise InputError(f"{folder}: {file}: {name} is no tensor but a {type(shard).__name__}")
    return shard.detach()
