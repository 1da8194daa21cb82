"""An export, ready to run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor, nn

from uncollapse.checkpoints.exported import HEAD, is_export, read_export
from uncollapse.checkpoints.files import damage_is_said
from uncollapse.checkpoints.own import own_encoder
from uncollapse.config.schema import Config
from uncollapse.errors import InputError
from uncollapse.models.tokens import plain


class Export(NamedTuple):
    """Encoder, heads and prototypes of one side of a run, in evaluation mode, on the CPU."""

    encoder: nn.Module
    """Images ``(n, 3, S, S)`` → features ``(n, d)``: a timm model, or our own three convolutions."""
    heads: nn.ModuleDict
    """Name → features ``(..., d)`` → projections ``(..., D)``, of unit length unless the method has them otherwise."""
    prototypes: dict[str, dict[str, Tensor]]
    """Set → its tensors: ``weight (K, D)``, and ``bias``, ``mixture.mean`` … where it has them."""
    facts: dict[str, dict[str, Any]]
    """Set → K, D, head, side, temperature, counts per ε."""
    config: Config
    """The run's, without its paths."""


def load_export(folder: str | os.PathLike[str]) -> Export:
    """What `uncollapse export` wrote, in any of its formats.

    Raises:
        InputError: no export, or a damaged one.
    """
    path = Path(folder)
    if not path.is_dir() or not is_export(path):
        raise InputError(f"{path}: not a folder that `uncollapse export` wrote")
    loaded = read_export(path)
    encoder, config = own_encoder(loaded, "teacher" if "teacher" in loaded else "student", path)
    prototypes: dict[str, dict[str, Tensor]] = {}
    with damage_is_said(path / HEAD), safe_open(path / HEAD, "pt") as file:
        said = file.metadata()
        for name in file.keys():  # noqa: SIM118 - it is no dictionary
            if name.startswith("prototypes."):
                _, of_set, rest = name.split(".", 2)
                prototypes.setdefault(of_set, {})[rest] = file.get_tensor(name)
        facts = {name: json.loads(said[f"prototypes.{name}"]) for name in prototypes}
    return Export(plain(encoder.backbone).requires_grad_(False), encoder.heads, prototypes, facts, config)
