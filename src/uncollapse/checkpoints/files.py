"""One file of other people's: its kind by its first bytes, and what it holds."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uncollapse.checkpoints.pickled import Refused
from uncollapse.checkpoints.torchfile import Unsupported, refuse_encrypted
from uncollapse.errors import InputError
from uncollapse.shown import in_words


@contextmanager
def damage_is_said(where: object) -> Iterator[None]:
    """Whatever goes wrong inside is an `InputError` that names the file: a damaged one can fail in any way."""
    try:
        yield
    except InputError:
        raise
    except Unsupported as error:
        raise InputError(f"{where}: {error}") from None
    except Refused as error:
        raise InputError(_refusal(where, str(error))) from None
    except MemoryError:
        raise InputError(
            f"{where}: it asks for more memory than there is; it is damaged, or too large for here"
        ) from None
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror or line_of(error)})") from None
    except Exception as error:
        raise InputError(f"{where}: damaged or cut off, or no checkpoint ({line_of(error)})") from None


def _refusal(where: object, name: str) -> str:
    if re.search(r"^torch\.distributed\.|ShardedTensor|DTensor", name):
        return (
            f"{where}: one rank's shard ({name}), not the whole network; take the teacher that the code gathers "
            "for its evaluations (DINOv2's and DINOv3's eval/*/teacher_checkpoint.pth), or save a full state dict"
        )
    return (
        f"{where}: not loaded, because it would run {name!r}, which is not on the list of harmless classes. "
        "If you know who made the file and trust them, say --trust"
    )


OPTIMIZERS = re.compile(r"opt|optim\w*|\w*_optimizer|\w*optimizer_states|fp16_scaler")
"""Top levels of a checkpoint that hold states of optimisers."""


def file_kind(path: Path) -> str:
    """``torch``, ``npy``, ``npz`` or ``safetensors``, by the first bytes and never by the name.

    Raises:
        InputError: no such file, an empty one, or none of these.
    """
    try:
        if not path.exists():
            raise InputError(f"{path}: no such file")
        if not path.is_file():
            raise InputError(
                f"{path}: not an ordinary file (a pipe or a device cannot be read at random); copy it first"
            )
        with path.open("rb") as file:
            head = file.read(64)
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not size:
        raise InputError(f"{path}: the file is empty (0 bytes); copy or download it again")
    if head.startswith(b"PK\x03\x04"):
        try:
            with damage_is_said(path), zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                for info in archive.infolist():
                    refuse_encrypted(info)
        except InputError as error:
            if "encrypted" in str(error):
                raise
            raise InputError(
                f"{path}: cut off or damaged (a zip archive without its index, {size:,} bytes); "
                "copy or download it again"
            ) from None
        if any(n == "data.pkl" or n.endswith("/data.pkl") for n in names):
            return "torch"
        if names and all(n.endswith(".npy") for n in names):
            return "npz"
        raise InputError(f"{path}: a zip archive, but not a checkpoint (it holds {', '.join(names[:3]) or 'nothing'})")
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if len(head) >= 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000:
        return "safetensors"
    if head[0] == 0x80:
        return "torch"
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: only a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    raise InputError(
        f"{path}: not a checkpoint: it starts with {head[:12]!r}; expected a file of torch.save, safetensors or numpy"
    )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load, load_file

    try:
        str(path).encode()
    except UnicodeEncodeError:
        with damage_is_said(path):
            return load(path.read_bytes())  # its reader of files takes no other names
    try:
        return load_file(path)
    except Exception as error:  # a type that torch lacks, for one, is a KeyError
        raise InputError(
            f"{path}: a damaged or cut-off safetensors file, or of a type that torch lacks ({line_of(error)}); copy or "
            "download it again"
        ) from None


_UNPACKED = 1 << 30
"""Bytes that an npz may unpack to, where that is more than 16 times the file: zeros shrink a thousandfold."""


def read_numpy(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Mapped, an array that claims to be larger than its file is refused instead of allocated.
            loaded = np.load(path, allow_pickle=False, mmap_mode="c")
        if isinstance(loaded, np.ndarray):
            return tensor_of_array(loaded)
        with loaded:
            infos = loaded.zip.infolist()
            if sum(info.file_size for info in infos) > max(_UNPACKED, 16 * path.stat().st_size):
                raise InputError(f"{path}: an npz that unpacks to far more than its size; save it uncompressed")
            return {name: tensor_of_array(loaded[name]) for name in loaded.files}
    except InputError:
        raise
    except MemoryError:
        raise InputError(f"{path}: a damaged numpy file: it claims more numbers than there is memory for") from None
    except Exception as error:
        line = line_of(error)
        if "format version" in line:
            raise InputError(f"{path}: a numpy file of a newer format than is known here ({line})") from None
        raise InputError(f"{path}: a damaged numpy file, or one that holds objects ({line})") from None


def tensor_of_array(array: np.ndarray) -> Any:
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        return array  # text, complex, 80 bits: nothing that torch has
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))


def read_trusted(path: Path) -> Any:
    """``torch.load`` as it is, which runs what the file says."""
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": False}
    if zipfile.is_zipfile(path):
        options["mmap"] = True  # a file of many gigabytes costs only the tensors that are looked at
    with damage_is_said(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, **options)
        except ModuleNotFoundError as error:
            raise InputError(
                f"{path}: loading it runs code of the module {error.name!r}, which is not installed"
            ) from None


def line_of(error: BaseException) -> str:
    """An error's message on one line of at most 160 characters."""
    text = in_words(error)
    return text if len(text) < 160 else text[:157] + "..."
