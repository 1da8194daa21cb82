"""Other people's files, read without running anything in them: what they hold, recognised by content.

A checkpoint is a pickle, and unpickling runs whatever the file says. Here it is read as data (`pickled`, `torchfile`);
names beyond a list of harmless ones need the user's word (``trust``). Whatever is wrong with a file, an `InputError`
says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uncollapse.checkpoints.files import (
    OPTIMIZERS,
    damage_is_said,
    file_kind,
    read_numpy,
    read_safetensors,
    read_trusted,
    tensor_of_array,
)
from uncollapse.checkpoints.pickled import Record
from uncollapse.checkpoints.torchfile import array_of, read_torch
from uncollapse.errors import InputError
from uncollapse.shown import shown

# ------------------------------------------------------------------------------------------- a file's kind


def read_tensors(path: Path, trust: bool = False, only: Callable[[str], bool] | None = None) -> Any:
    """What a file holds: nested dicts with tensors (mapped from disk where possible), or one tensor.

    Args:
        path: a file of any of the kinds of `file_kind`, or a folder of torch.distributed.checkpoint or of an export.
        trust: the user's word that the file may run code while it is loaded.
        only: of such a folder, whether to read the values of the tensor at a path; None: of all.

    Raises:
        InputError: unreadable, damaged, or needing ``trust``.
    """
    from uncollapse.checkpoints.exported import is_export, read_export
    from uncollapse.checkpoints.sharded import is_sharded, read_sharded

    if is_sharded(path):
        with damage_is_said(path):
            return read_sharded(path, only)
    kind = "export" if path.is_dir() and is_export(path) else file_kind(path)
    if kind == "export" or (kind == "safetensors" and is_export(path)):
        with damage_is_said(path):
            return read_export(path)
    if kind == "safetensors":
        return read_safetensors(path)
    if kind in ("npy", "npz"):
        content = read_numpy(path)
        if isinstance(content, np.ndarray):
            raise InputError(f"{path}: an array of {content.dtype}; prototypes are floating-point numbers")
        return content
    if trust:
        return read_trusted(path)
    with damage_is_said(path):
        return read_torch(path)


# ------------------------------------------------------------------------------------------- its tensors


_REVISITED = 100_000
"""Entries of containers that may be come upon again under another name; a few lists in one another make billions."""


def flatten(loaded: Any, where: object = "file") -> dict[str, Tensor]:
    """Every tensor of nested dicts and lists by its path, levels joined by ``/``; states of optimisers left out.

    Names in paths are as `shown` writes them. ``where``: the file, for messages.

    Raises:
        InputError: containers that hold one another so often that they cannot be written out.
    """
    tensors: dict[str, Tensor] = {}
    holds: dict[int, bool] = {}  # whether there are tensors in a container seen before
    again = 0

    def walk(value: Any, path: str, around: tuple[int, ...]) -> bool:
        nonlocal again
        if isinstance(value, torch.nn.Module):
            value = value.state_dict()
        if isinstance(value, Record):
            value = array_of(value)
        elif isinstance(value, np.ndarray):
            value = tensor_of_array(value)
        if isinstance(value, Tensor):
            tensors[path] = value.detach()
            return True
        # A pickle may contain itself; nothing real is nested this deeply.
        if not isinstance(value, dict | list | tuple) or id(value) in around or len(around) > 40:
            return False
        if holds.get(id(value)) is False or _is_optimizer(value):
            return False
        if id(value) in holds:
            again += len(value)
            if again > _REVISITED:
                raise InputError(f"{where}: dicts and lists that hold one another without end; it is no checkpoint")
        holds[id(value)] = True
        any_tensor = False
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if path or not OPTIMIZERS.fullmatch(str(name)):
                any_tensor |= walk(
                    inner, f"{path}/{shown(str(name))}" if path else shown(str(name)), (*around, id(value))
                )
        holds[id(value)] = any_tensor
        return any_tensor

    with damage_is_said(where):
        walk(loaded, "", ())
    return tensors


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, dict) and {"state", "param_groups"} <= {str(name) for name in value}


# ------------------------------------------------------------------------------------------- folders


def newest_of(path: Path) -> tuple[Path, list[str]]:
    """What to read: a file or a folder of torch.distributed.checkpoint or of an export is itself; of a run folder, the
    newest checkpoint whose digest fits, and a line that names the newer ones that were passed over.

    Raises:
        InputError: a folder without a usable checkpoint.
    """
    from uncollapse.checkpoints.exported import is_export
    from uncollapse.checkpoints.sharded import is_sharded

    if not path.is_dir() or is_sharded(path) or is_export(path):
        return path, []
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = sorted(folder.glob("step-*.json"), reverse=True)
    for record in steps:
        file = record.with_suffix(".pt")
        if not (record.is_file() and file.is_file()):
            continue  # a pipe would be waited for
        try:
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            if json.loads(record.read_text())["sha256"] == digest:
                skipped = ", ".join(shown(r.with_suffix(".pt").name) for r in steps if r > record)
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
