"""Other people's files, read without running anything in them: what they hold, recognised by content.

A checkpoint is a pickle, and unpickling runs whatever the file says. Here only tensors, plain containers and the
classes listed below are ever built; where a configuration class of some framework is all that stands in the way,
an inert object takes its place. Everything else needs the user's word (``trust``).
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class InputError(ValueError):
    """A file that cannot be diagnosed; the message is one line: what, where, and what to do."""


class Inert:
    """Stands in for a configuration object of a framework; keeps nothing and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass


_STOOD_IN_FOR = (
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.base.SCMode",
    "omegaconf.nodes.AnyNode",
    "omegaconf.nodes.BooleanNode",
    "omegaconf.nodes.FloatNode",
    "omegaconf.nodes.IntegerNode",
    "omegaconf.nodes.StringNode",
    "typing.Any",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "torch.torch_version.TorchVersion",
    "yacs.config.CfgNode",
)
"""Classes of configurations and versions that checkpoints carry along; their contents are not looked at."""


OPTIMIZERS = re.compile(r"opt|optim\w*|\w*_optimizer|\w*optimizer_states|fp16_scaler")
"""Top levels of a checkpoint that hold states of optimisers."""


def _dtype_classes() -> list[type]:
    return [type(np.dtype(letter)) for letter in "?bhilBHILefd"]


def _allowed() -> list[Any]:
    """The allow-list: harmless to build, and found in the checkpoints of the families that are read here."""
    core: Any = np._core if hasattr(np, "_core") else np.core  # type: ignore[attr-defined, unused-ignore]
    arrays = [
        (function, f"numpy.{where}.multiarray.{name}")
        for name, function in (("scalar", core.multiarray.scalar), ("_reconstruct", core.multiarray._reconstruct))
        for where in ("core", "_core")
    ]
    plain = [argparse.Namespace, collections.defaultdict, dict, list, set, int, float, np.dtype, np.ndarray]
    # A path class of the other operating system cannot be built here.
    paths = [(pathlib.PurePath, f"pathlib.{n}") for n in ("PosixPath", "WindowsPath", "PurePosixPath", "Path")]
    paths += [(pathlib.PurePath, f"pathlib._local.{n}") for n in ("PosixPath", "WindowsPath", "PurePosixPath")]
    return [*plain, *_dtype_classes(), *arrays, *paths, *((Inert, name) for name in _STOOD_IN_FOR)]


# ------------------------------------------------------------------------------------------- a file's kind


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
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile:
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
    if head[0] == 0x80 or b"ustar" in head:
        return "torch"
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: only a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    raise InputError(
        f"{path}: not a checkpoint: it starts with {head[:12]!r}; expected a file of torch.save, safetensors or numpy"
    )


def read_tensors(path: Path, trust: bool = False, only: Callable[[str], bool] | None = None) -> Any:
    """What a file holds: nested dicts with tensors (mapped from disk where possible), or one tensor.

    Args:
        path: a file of any of the kinds of `file_kind`, or a folder of torch.distributed.checkpoint.
        trust: the user's word that the file may run code while it is loaded.
        only: of such a folder, whether to read the values of the tensor at a path; None: of all.

    Raises:
        InputError: unreadable, damaged, or needing ``trust``.
    """
    from uncollapse.sharded import is_sharded, read_sharded

    if is_sharded(path):
        return read_sharded(path, only)
    kind = file_kind(path)
    if kind == "safetensors":
        return _safetensors(path)
    if kind in ("npy", "npz"):
        found = _numpy(path)
        if isinstance(found, np.ndarray):
            raise InputError(f"{path}: an array of {found.dtype}; prototypes are floating-point numbers")
        return found
    return _torch(path, trust)


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path}: a damaged or cut-off safetensors file ({line_of(error)}); copy or download it again"
        ) from None


def _numpy(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = np.load(path, allow_pickle=False, mmap_mode=None)
        if isinstance(loaded, np.ndarray):
            return _tensor(loaded)
        with loaded:
            return {name: _tensor(loaded[name]) for name in loaded.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: a damaged numpy file, or one that holds objects ({line_of(error)})") from None


def _tensor(array: np.ndarray) -> Any:
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        return array  # text, complex, 80 bits: nothing that torch has
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))


def _torch(path: Path, trust: bool) -> Any:
    options: dict[str, Any] = {"map_location": "cpu"}
    if zipfile.is_zipfile(path):
        options["mmap"] = True  # a file of many gigabytes costs only the tensors that are looked at
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if trust:
                return torch.load(path, weights_only=False, **options)
            with torch.serialization.safe_globals(_allowed()):
                return torch.load(path, weights_only=True, **options)
    except ModuleNotFoundError as error:
        raise InputError(f"{path}: loading it runs code of the module {error.name!r}, which is not installed") from None
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global:?|function) (?:GLOBAL )?([\w.<>]+)", str(error))
        if not found:
            raise InputError(f"{path}: damaged, or no checkpoint at all ({line_of(error)})") from None
        if re.search(r"torch\.distributed\.|ShardedTensor|DTensor", found[1]):
            raise InputError(
                f"{path}: one rank's shard ({found[1]}), not the whole network; take the teacher that the code gathers "
                "for its evaluations (DINOv2's and DINOv3's eval/*/teacher_checkpoint.pth), or save a full state dict"
            ) from None
        raise InputError(
            f"{path}: not loaded, because it would run {found[1]!r}, which is not on the list of harmless classes. "
            "If you know who made the file and trust them, say --trust"
        ) from None
    except Exception as error:  # a damaged pickle can fail in any way
        if "TorchScript" in str(error):
            raise InputError(f"{path}: TorchScript, which is code with weights; save the state_dict of it") from None
        raise InputError(f"{path}: damaged, cut off, or no checkpoint ({line_of(error)})") from None


def line_of(error: BaseException) -> str:
    """An error's message on one line of at most 160 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 160 else text[:157] + "..."


# ------------------------------------------------------------------------------------------- its tensors


def flatten(loaded: Any) -> dict[str, Tensor]:
    """Every tensor of nested dicts and lists by its path, levels joined by ``/``; states of optimisers left out."""
    found: dict[str, Tensor] = {}

    def walk(value: Any, path: str, around: tuple[int, ...]) -> None:
        if isinstance(value, torch.nn.Module):
            value = value.state_dict()
        if isinstance(value, Tensor):
            found[path] = value.detach()
        elif isinstance(value, dict | list | tuple):
            # A pickle may contain itself; nothing real is nested this deeply.
            if id(value) in around or len(around) > 40 or _is_optimizer(value):
                return
            for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
                if not path and OPTIMIZERS.fullmatch(str(name)):
                    continue
                walk(inner, f"{path}/{name}" if path else str(name), (*around, id(value)))
        elif isinstance(value, np.ndarray) and isinstance(array := _tensor(value), Tensor):
            found[path] = array

    walk(loaded, "", ())
    return found


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, dict) and {"state", "param_groups"} <= {str(name) for name in value}


# ------------------------------------------------------------------------------------------- folders


def newest_of(path: Path) -> tuple[Path, list[str]]:
    """What to read: a file or a folder of torch.distributed.checkpoint is itself; of one of our run folders, the
    newest checkpoint whose digest fits, and a line that names the newer ones that were passed over.

    Raises:
        InputError: a folder without a usable checkpoint.
    """
    from uncollapse.sharded import is_sharded

    if not path.is_dir() or is_sharded(path):
        return path, []
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = sorted(folder.glob("step-*.json"), reverse=True)
    for record in steps:
        file = record.with_suffix(".pt")
        try:
            with file.open("rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
            if json.loads(record.read_text())["sha256"] == found:
                skipped = ", ".join(r.with_suffix(".pt").name for r in steps if r > record)
                return file, [f"{skipped} damaged: {file.name} is the newest whole checkpoint"] if skipped else []
        except (OSError, ValueError, KeyError, TypeError):
            continue
    if steps:
        raise InputError(f"{path}: every checkpoint in {folder} is damaged ({len(steps)} of them)")
    if shards := sorted(p.name for p in path.glob("*.distcp")):
        raise InputError(
            f"{path}: shards of a distributed checkpoint ({shards[0]}) without their index .metadata; copy it too"
        )
    if sharded := sorted((p.name for p in path.iterdir() if is_sharded(p)), key=lambda n: (len(n), n)):
        raise InputError(f"{path}: it holds distributed checkpoints ({', '.join(sharded[-3:])}); name one of them")
    inside = ", ".join(sorted(p.name for p in path.iterdir())[:4]) or "nothing"
    raise InputError(f"{path}: a folder without checkpoints of a run (it holds {inside}); name a file")
