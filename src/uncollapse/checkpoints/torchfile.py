"""Files of ``torch.save`` without ``torch.load``: pickles are read as data, tensors are laid over the file's bytes.

Every tensor is checked against the bytes that it claims before it is made. Storages stay on disk (mapped) where they
are stored as they are, so a file of many gigabytes costs only the tensors that are looked at.
"""

from __future__ import annotations

import io
import math
import mmap
import re
import struct
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from uncollapse.checkpoints.pickled import Damaged, Maker, Name, Record, Refused, load

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_NEWEST_ARCHIVE = 10
"""Of torch's zip archives (``version``): it writes 3 since 1.6, and 10 at most for compiled programs."""
_REPEATED = 1 << 22
"""Numbers that a tensor may have at most where it has more than its storage, as an expanded one does."""
_INFLATED, _RATIO = 1 << 30, 16
"""Bytes that compressed records may unpack to: a gigabyte, or 16 times the file. Zeros shrink a thousandfold."""


class Unsupported(ValueError):
    """A sound file of a kind that is not read; the message says what it is and what to do."""


@dataclass(eq=False)
class _Storage:
    """Bytes of a file, and the type that the pickle gives them."""

    content: memoryview
    dtype: torch.dtype

    def elements(self, dtype: torch.dtype) -> Tensor:
        """All of it, (n,)."""
        count = len(self.content) // dtype.itemsize
        if not count:
            return torch.empty(0, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing here is written to
            numbers = torch.frombuffer(self.content, dtype=dtype, count=count)
            if numbers.data_ptr() % dtype.itemsize:
                numbers = torch.frombuffer(bytearray(self.content), dtype=dtype, count=count)
        return numbers


# --------------------------------------------------------------------------------------- what names mean

_STORAGES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "QInt8": torch.int8,
    "QUInt8": torch.uint8,
    "QInt32": torch.int32,
    "QUInt4x2": torch.uint8,
    "QUInt2x4": torch.uint8,
    "Untyped": torch.uint8,
}
_OF_STORAGE = {
    f"torch.{where}{name}Storage": dtype for name, dtype in _STORAGES.items() for where in ("", "cuda.", "storage.")
}
_SCHEMES = [f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.qscheme)]
_DTYPES = {f"torch.{name}": dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}


def _sizes(*lists: Any) -> list[tuple[int, ...]]:
    """Shapes and strides as they are in a pickle, checked."""
    for values in lists:
        if not isinstance(values, tuple | list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in values):
            raise Damaged("a shape that is none")
    if len({len(values) for values in lists}) != 1 or len(lists[0]) > 64:
        raise Damaged("a shape and strides that differ in length")
    return [tuple(values) for values in lists]


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any, dtype: torch.dtype | None = None) -> Tensor:
    """``_rebuild_tensor_v2``: numbers of a storage as a tensor."""
    (size, stride), ((start,),) = _sizes(size, stride), _sizes((offset,))
    if not isinstance(storage, _Storage):
        raise Damaged("a tensor without a storage")
    dtype = storage.dtype if dtype is None else dtype
    if 0 in size:
        return torch.empty(size, dtype=dtype)
    flat = storage.elements(dtype)
    last = start + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= len(flat):
        raise Damaged(f"a tensor of {size} reaches beyond its {len(flat):,} stored numbers")
    if math.prod(size) > max(len(flat), _REPEATED):
        raise Damaged(f"a tensor of {size} over {len(flat):,} stored numbers, repeated")
    return flat.as_strided(size, stride, start)


def _typed(storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any) -> Tensor:
    """``_rebuild_tensor_v3``: the type stands beside an untyped storage."""
    if not isinstance(dtype, Name) or dtype.full not in _DTYPES:
        raise Damaged("a tensor of a type that is none")
    return _tensor(storage, offset, size, stride, dtype=_DTYPES[dtype.full])


def without_values(size: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Stands for a tensor that is no array of numbers; on torch's meta device."""
    (size,) = _sizes(size)
    if math.prod(size) >= 1 << 60:
        raise Damaged(f"a shape of {size}")
    return torch.empty(size, dtype=dtype, device="meta")


def _sparse(_: Any, parts: Any) -> Tensor:
    sizes = [part for part in parts if isinstance(part, tuple)]
    return without_values(sizes[0] if sizes else ())


def _quantised(storage: Any, _: Any, size: Any, *__: Any) -> Tensor:
    return without_values(size, storage.dtype if isinstance(storage, _Storage) else torch.int8)


def _meta(dtype: Any, size: Any, *_: Any) -> Tensor:
    return without_values(size, _DTYPES.get(getattr(dtype, "full", ""), torch.float32))


def _first(value: Any = None, *_: Any) -> Any:
    return value


def _subclassed(function: Any, _: Any, arguments: Any, *__: Any) -> Any:
    """``_rebuild_from_type_v2``: the tensor inside, whatever class it is to become."""
    make = (
        _MAKERS.get(getattr(function, "full", "")) if function != Name("torch._tensor._rebuild_from_type_v2") else None
    )
    if make is None or not isinstance(arguments, tuple):
        raise Damaged("a tensor made by what makes none")
    return make(*arguments)


def _encoded(text: Any, *_: Any) -> bytes:
    if not isinstance(text, str):
        raise Damaged("bytes that are none")
    return text.encode("latin-1")


def _dict(*arguments: Any) -> dict[Any, Any]:
    return dict(arguments[-1]) if arguments and isinstance(arguments[-1], dict) else {}


def _list(items: Any = ()) -> list[Any]:
    return list(items) if isinstance(items, list | tuple) else []


def _array(record: Any) -> Tensor | None:
    """The numbers of a numpy array from its pickled state; None where it has no such numbers."""
    if not isinstance(record, Record) or record.name != "numpy._core.multiarray._reconstruct":
        return None
    if not isinstance(record.state, tuple) or len(record.state) != 5:
        return None
    _, shape, dtype, fortran, content = record.state
    return _numbers(content, dtype, shape, "F" if fortran is True else "C")


def _numbers(content: Any, dtype: Any, shape: Any, order: Any = "C") -> Tensor | None:
    code = dtype.arguments[0] if isinstance(dtype, Record) and dtype.arguments else None
    state = dtype.state if isinstance(dtype, Record) else None
    end = state[1] if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">") else "="
    if not isinstance(code, str) or not re.fullmatch(r"[iu][1248]|f[248]|b1", code):
        return None
    if not isinstance(content, bytes | bytearray) or not isinstance(shape, tuple):
        return None
    (shape,) = _sizes(shape)
    kind = np.dtype(end + code)
    if math.prod(shape) * kind.itemsize != len(content):
        raise Damaged(f"an array of {shape} with {len(content):,} bytes")
    numbers = np.frombuffer(content, kind).reshape(shape, order="F" if order == "F" else "C")
    return torch.from_numpy(np.array(numbers, kind.newbyteorder("=")))


def array_of(value: Any) -> Tensor | None:
    """The tensor that a pickled numpy array holds; None for anything else."""
    return _array(value)


_MAKERS: dict[str, Maker | None] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._utils._rebuild_device_tensor_from_numpy": lambda array, *_: _array(array),
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_qtensor": _quantised,
    "torch._utils._rebuild_meta_tensor_no_storage": _meta,
    "torch._utils._rebuild_wrapper_subclass": lambda cls, dtype, size, *_: _meta(dtype, size),
    "torch._tensor._rebuild_from_type_v2": _subclassed,
    "torch.nn.parameter.Parameter": _first,
    "torch.nn.parameter.Buffer": _first,
    "torch.Size": _first,
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": _dict,
    "builtins.dict": _dict,
    "builtins.list": _list,
    "builtins.set": _list,
    "builtins.frozenset": _list,
    "_codecs.encode": _encoded,
    "numpy._core.numeric._frombuffer": _numbers,
}
_PLAIN = """
argparse.Namespace builtins.bytearray builtins.bytes builtins.complex builtins.float builtins.int builtins.str
builtins.bool builtins.object builtins.tuple builtins.slice torch.Tensor torch.device torch.serialization._get_layout
torch.torch_version.TorchVersion typing.Any yacs.config.CfgNode
numpy.dtype numpy.ndarray numpy._core.multiarray.scalar numpy._core.multiarray._reconstruct
pathlib.Path pathlib.PosixPath pathlib.WindowsPath pathlib.PurePosixPath pathlib.PurePath
omegaconf.dictconfig.DictConfig omegaconf.listconfig.ListConfig omegaconf.base.ContainerMetadata
omegaconf.base.Metadata omegaconf.base.SCMode omegaconf.nodes.AnyNode omegaconf.nodes.BooleanNode
omegaconf.nodes.FloatNode omegaconf.nodes.IntegerNode omegaconf.nodes.StringNode
pytorch_lightning.utilities.parsing.AttributeDict lightning.pytorch.utilities.parsing.AttributeDict
lightning.fabric.utilities.data.AttributeDict lightning_fabric.utilities.data.AttributeDict
"""
"""Configurations, versions, numpy's scalars and the like: kept as records, and not looked at."""
NAMES: dict[str, Maker | None] = {
    **dict.fromkeys([*_PLAIN.split(), *_OF_STORAGE, *_DTYPES, *_SCHEMES]),
    **{f"numpy.{kind}{bits}": None for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64)},
    **{f"numpy.dtypes.{kind}{bits}DType": None for kind in ("Int", "UInt", "Float") for bits in (8, 16, 32, 64)},
    **_MAKERS,
}
"""Every name that may occur in a checkpoint: found in those of the families that are read here."""


# ------------------------------------------------------------------------------------------- the files


def read_torch(path: Path) -> Any:
    """What a file of ``torch.save`` holds, in either of its formats, as `read_torch_bytes`."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # tensors keep it open
        return _read(file, memoryview(mapped))


def read_torch_bytes(content: bytes | bytearray) -> Any:
    """Tensors in plain dicts, lists and tuples, `Name` and `Record` for the rest.

    Raises:
        Refused: a name that is not in ``NAMES``. Unsupported: a sound file of another kind. Any other error: damage.
    """
    return _read(io.BytesIO(content), memoryview(bytearray(content)))


def _read(file: BinaryIO, content: memoryview) -> Any:
    return _zipped(file, content) if content[:2] == b"PK" else _one_after_another(file, content)


def _zipped(file: BinaryIO, content: memoryview) -> Any:
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: info for info in archive.infolist()}
        at = next(name for name in records if name == "data.pkl" or name.endswith("/data.pkl"))
        base = at.removesuffix("data.pkl")
        if f"{base}constants.pkl" in records:
            raise Unsupported("TorchScript, which is code with weights; save the state_dict of it")
        left = [max(_INFLATED, _RATIO * len(content))]

        def record(name: str) -> memoryview:
            if base + name not in records:
                raise Damaged(f"no record {name}")
            return _record(archive, records[base + name], content, left)

        if base + "version" in records and int(bytes(record("version")[:20])) > _NEWEST_ARCHIVE:
            raise Unsupported(
                f"an archive of version {int(bytes(record('version')[:20]))}, newer than the {_NEWEST_ARCHIVE} that is "
                "known here; save it with an older torch, or update uncollapse"
            )
        if base + "byteorder" in records and bytes(record("byteorder")) == b"big":
            raise Unsupported("saved on a machine that keeps numbers the other way round; save it as safetensors there")
        seen: dict[str, memoryview] = {}

        def stored(saved: Any) -> _Storage:
            dtype, key, count, _ = _saved(saved, 5)
            if key not in seen:
                seen[key] = record(f"data/{key}")
            if count * dtype.itemsize > len(seen[key]):
                raise Damaged(f"storage {key} has {len(seen[key]):,} bytes for {count:,} numbers")
            return _Storage(seen[key][: count * dtype.itemsize], dtype)

        return load(io.BytesIO(bytes(record("data.pkl"))), NAMES, stored)


def _record(archive: zipfile.ZipFile, info: zipfile.ZipInfo, content: memoryview, left: list[int]) -> memoryview:
    """A record's bytes, in the file itself where they are not compressed. left: bytes that may still be unpacked."""
    refuse_encrypted(info)
    if info.compress_type == zipfile.ZIP_STORED:
        start = info.header_offset
        head = bytes(content[start : start + 30])
        if len(head) < 30 or head[:4] != b"PK\x03\x04":
            raise Damaged(f"no record where the archive says that {info.filename} is")
        start += 30 + sum(struct.unpack("<HH", head[26:30]))
        if start + info.file_size > len(content):
            raise Damaged(f"{info.filename} reaches beyond the end")
        return content[start : start + info.file_size]
    left[0] -= info.file_size
    if left[0] < 0:
        raise Unsupported("its compressed records unpack to far more than the file; unpack it and save it uncompressed")
    try:
        with archive.open(info) as packed:
            data = packed.read(info.file_size + 1)
    except (zlib.error, EOFError, zipfile.BadZipFile) as error:
        raise Damaged(f"{info.filename} cannot be unpacked ({error})") from None
    if len(data) != info.file_size:
        raise Damaged(f"{info.filename} unpacks to another length than it says")
    return memoryview(bytearray(data))


def refuse_encrypted(info: zipfile.ZipInfo) -> None:
    if info.flag_bits & 1:
        raise Unsupported("an encrypted archive; unpack it with its password first")


def _saved(saved: Any, length: int) -> tuple[torch.dtype, str, int, Any]:
    """Type, key and count of a storage from its persistent id, and the view of it, which only old files have."""
    if not isinstance(saved, tuple) or len(saved) < length or saved[0] != "storage" or not isinstance(saved[1], Name):
        raise Damaged("a storage that is none")
    _, kind, key, _, count, *view = saved
    if kind.full not in _OF_STORAGE or not isinstance(key, str) or type(count) is not int or not 0 <= count < 1 << 62:
        raise Damaged("a storage of a type that is none")
    return _OF_STORAGE[kind.full], key, count, view[0] if view else None


def _one_after_another(file: BinaryIO, content: memoryview) -> Any:
    """The format before torch 1.6: pickles in a row, then the storages, each behind its count."""
    try:
        first = load(file, {})
    except Refused as error:
        raise Unsupported(f"a pickle that is no file of torch.save (it names {error})") from None
    if first != _MAGIC:
        raise Unsupported("a pickle that is no file of torch.save")
    if load(file, {}) != _PROTOCOL:
        raise Unsupported("a file of another version of torch.save, which is not known here; save it again")
    load(file, {})
    storages: dict[str, _Storage] = {}

    def stored(saved: Any) -> _Storage:
        dtype, key, count, view = _saved(saved, 5)
        if key not in storages:
            if sum(len(s.content) for s in storages.values()) + count * dtype.itemsize > len(content):
                raise Damaged(f"storage {key} of {count:,} numbers in a file of {len(content):,} bytes")
            storages[key] = _Storage(memoryview(bytearray(count * dtype.itemsize)), dtype)
        whole = storages[key].content
        if view is not None:
            (_, offset, many) = view
            ((start, many),) = _sizes((offset, many))
            return _Storage(whole[start * dtype.itemsize : (start + many) * dtype.itemsize], dtype)
        return _Storage(whole[: count * dtype.itemsize], dtype)

    loaded = load(file, NAMES, stored)
    keys = load(file, {})
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise Damaged("storages that are not there")
    for key in keys:
        storage, head = storages[key], file.read(8)
        if int.from_bytes(head, "little") * storage.dtype.itemsize != len(storage.content):
            raise Damaged(f"storage {key} has another length than it says")
        if file.readinto(storage.content) != len(storage.content):  # type: ignore[attr-defined]
            raise Damaged(f"storage {key} is cut off")
    return loaded
