"""What `uncollapse export` wrote, read back as the checkpoint of ours that it was made from.

Each safetensors file of an export says in its header, under ``uncollapse``, which run it is of: configuration, side and
step. A file read alone gives what is in it; their folder gives the whole network of one side.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uncollapse.checkpoints.files import read_safetensors
from uncollapse.checkpoints.own import own_config
from uncollapse.checkpoints.torchfile import read_torch
from uncollapse.config.facts import hides_patches, teacher_follows_prototypes
from uncollapse.config.schema import Config
from uncollapse.errors import InputError

HEAD = "head.safetensors"
ENCODER = "encoder.safetensors"
HUB_ENCODER = "model.safetensors"
"""The encoder's name where a hub's own loader looks for it."""
DINO_CHECKPOINT = "checkpoint.pth"
FACTS = "uncollapse"
"""Entry of a file's metadata: a JSON object with ``config``, ``side``, ``step`` and what else says whose it is."""


def facts_of(file: Path) -> dict[str, Any] | None:
    """What a file of an export says of itself; None of any other file."""
    from safetensors import safe_open

    with suppress(Exception):  # no safetensors, damaged, or of somebody else: its reader says which
        with safe_open(file, "pt") as content:
            facts = json.loads((content.metadata() or {})[FACTS])
        return facts if isinstance(facts, dict) and facts.get("side") in ("student", "teacher") else None
    return None


def is_export(path: Path) -> bool:
    """Whether a path is a folder that `uncollapse export` wrote, or one of its safetensors files."""
    return facts_of(path / HEAD if path.is_dir() else path) is not None


def read_export(path: Path) -> dict[str, Any]:
    """Configuration, step, weights of one side, prototypes and centres, nested as in a run's own checkpoint.

    Args:
        path: of which `is_export` says yes.

    Raises:
        InputError: damaged, or a part of it is missing.
    """
    file = path / HEAD if path.is_dir() else path
    facts = facts_of(file)
    if facts is None:
        raise InputError(f"{path}: not a folder or file that `uncollapse export` wrote")
    content: dict[str, Any] = {"exported": True, "config": facts.get("config"), "step": facts.get("step")}
    config, side = own_config(content, path), str(facts["side"])
    weights: dict[str, Tensor] = {}
    states: dict[str, dict[str, Tensor]] = {}
    memory: dict[str, Tensor] = {}
    backbone = "backbone.vit." if hides_patches(config) else "backbone."
    tensors = read_safetensors(file)
    for name, tensor in tensors.items() if file.name == HEAD or _has_prototypes(tensors) else ():
        part, _, rest = name.partition(".")
        if part == "prototypes":
            of_set, _, rest = rest.partition(".")
            states.setdefault(of_set, {})[rest] = tensor
        elif part == "memory":
            memory[rest] = tensor
        else:
            weights["backbone.mask_token" if name == "mask_token" else name] = tensor
    if path.is_dir():
        weights |= {backbone + name: tensor for name, tensor in _encoder(path, side).items()}
    elif not states:
        weights = {backbone + name: tensor for name, tensor in tensors.items()}
    if states and _each_side_its_own(config):
        content["prototypes_of"] = side
    sets = {name: _as_learned(state, config, side) for name, state in states.items()}
    return {**content, side: weights, "prototypes": sets, "memory": memory}


def _has_prototypes(tensors: Mapping[str, Tensor]) -> bool:
    """Whether it is the head's file, whatever it is called now."""
    return any(name.startswith("prototypes.") for name in tensors)


def _encoder(folder: Path, side: str) -> dict[str, Tensor]:
    for name in (ENCODER, HUB_ENCODER):
        if (folder / name).is_file():
            return read_safetensors(folder / name)
    file = folder / DINO_CHECKPOINT
    if not file.is_file():
        raise InputError(f"{folder}: it has a {HEAD} but no encoder ({ENCODER}, {HUB_ENCODER} or {DINO_CHECKPOINT})")
    network = read_torch(file).get(side)
    if not isinstance(network, dict):
        raise InputError(f"{file}: it holds no {side}, which {folder / HEAD} belongs to")
    names = {str(name).removeprefix("module."): tensor for name, tensor in network.items()}
    backbone = {n.removeprefix("backbone."): t for n, t in names.items() if n.startswith("backbone.")}
    backbone.pop("masked_embed", None)  # the head's file has it
    return backbone


def _each_side_its_own(config: Config) -> bool:
    """Whether the student's prototypes are others than the teacher's."""
    if config.prototypes.kind in ("joint", "koleo"):
        return teacher_follows_prototypes(config)
    return config.prototypes.kind == "capi" and config.method.name == "capi"


def _as_learned(state: dict[str, Tensor], config: Config, side: str) -> dict[str, Tensor]:
    """A set's tensors under the names that a run keeps them by, from those that an export writes."""
    weight = state.get("weight")
    if weight is None or weight.ndim != 2:
        return state
    kind = config.prototypes.kind
    if kind in ("decoupled", "decoupled-paper"):
        return {name: tensor for name, tensor in state.items() if name != "weight"}  # made of the means
    if kind in ("joint", "koleo") or (kind == "capi" and "bias" not in state):
        of = side if _each_side_its_own(config) else "student"
        return {f"{of}_v": weight, f"{of}_g": torch.linalg.vector_norm(weight, dim=-1, keepdim=True)}
    if kind == "capi" and not _each_side_its_own(config):
        length = weight.shape[1] ** 0.5  # a run keeps the layer as the clustering learns it
        return {**state, "weight": weight * length, "bias": state["bias"] * length}
    return state
