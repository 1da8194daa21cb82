"""A run exported: every format's files, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from uncollapse.checkpoints.exported import DINO_CHECKPOINT, ENCODER, HEAD, HUB_ENCODER, is_export
from uncollapse.data.views import eval_shorter_side
from uncollapse.errors import ConfigError, meant
from uncollapse.export.card import card
from uncollapse.export.content import Content, SetFacts, content_of, encoder_tensors, head_tensors, metadata
from uncollapse.export.dino import dino_checkpoint, left_out
from uncollapse.export.formats import FORMATS
from uncollapse.models.backbones import timm_options
from uncollapse.models.tokens import plain

CARD = "README.md"
_WRITTEN = frozenset([ENCODER, HUB_ENCODER, DINO_CHECKPOINT, HEAD, CARD, "config.json"])
"""What an export may hold: nothing else is ever replaced."""

Write = Callable[[Path], None]
"""Puts a file or several into a folder."""


@dataclass(frozen=True)
class Written:
    """What was exported."""

    out: Path
    format: str
    side: str
    step: int
    files: dict[str, int]
    """Name → bytes."""
    sets: dict[str, SetFacts]
    notes: list[str]


def export(run: Path, to: str, out: Path | None = None, side: str | None = None, overwrite: bool = False) -> Written:
    """Writes a run's encoder, its heads with their prototypes, and a model card into a folder.

    Args:
        run: a run folder of ours (its newest whole checkpoint), or one of its checkpoint files.
        to: ``timm`` (weights that timm loads), ``hf`` (a folder as the Hugging Face hub has them), ``safetensors``
            (any encoder), or ``dino`` (a ``.pth`` in the layout of DINO's checkpoints).
        out: the folder; None: ``export-FORMAT`` in the run folder.
        side: ``teacher`` or ``student``; None: the teacher, or the student of a method without one.
        overwrite: whether an earlier export in ``out`` may be replaced.

    Raises:
        ConfigError: an unknown format, something that it cannot hold, or ``out`` holds something. Nothing is written.
        InputError: no run of ours, or a damaged one.
    """
    if to not in FORMATS:
        raise ConfigError(f"--to: no format {to!r} ({meant(to, FORMATS)})")
    content = content_of(run, side)
    write, notes = _format(content, to)
    if out is None:
        out = (run if run.is_dir() else Path(content.name)) / f"export-{to}"
    _refuse(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    new = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir()
        save_file(head_tensors(content), new / HEAD, metadata(content, head=True))
        write(new)
        names = sorted([*(p.name for p in new.iterdir()), CARD])
        (new / CARD).write_text(card(content, to, names), encoding="utf-8")
        for path in new.iterdir():
            path.chmod(0o644)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        _put(new, out)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    files = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    return Written(out, to, content.side, content.step, files, content.facts, notes)


def _refuse(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise ConfigError(f"--out {out}: there already; name another folder, or say --overwrite to replace an export")
    strange = "" if not out.is_dir() else next((p.name for p in out.iterdir() if p.name not in _WRITTEN), "")
    if not out.is_dir() or strange or not is_export(out):
        what = f"it holds {strange}, which no export has" if strange else "it is no export"
        raise ConfigError(f"--out {out}: not replaced, because {what}; name another folder")


def _put(new: Path, out: Path) -> None:
    """Puts the new folder into the place of the old one, which comes back where that fails."""
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        out.rename(old)
    try:
        new.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


# ----------------------------------------------------------------------------------------------- formats


def _format(content: Content, to: str) -> tuple[Write, list[str]]:
    """What writes the encoder, and what the user should know of it; refuses what the format cannot hold."""
    if to == "dino":
        saved = dino_checkpoint(content)
        return lambda folder: torch.save(saved, folder / DINO_CHECKPOINT), left_out(content)
    if to != "safetensors" and content.config.backbone.name == "conv3":
        raise ConfigError(f"--to {to}: timm has no conv3 to load the weights into; take --to safetensors")
    name = HUB_ENCODER if to == "hf" else ENCODER

    def write(folder: Path) -> None:
        save_file(encoder_tensors(content), folder / name, metadata(content, head=False))
        if to == "hf":
            _hub_config(content, folder / "config.json")

    return write, []


def _hub_config(content: Content, path: Any) -> None:
    """``config.json`` as timm's loader of hub models reads it, written by timm itself."""
    from timm.models._hub import save_config_for_hf  # what timm exports in its stead needs the hub's own package

    config, size = content.config, content.config.views.global_size
    model: Any = plain(content.encoder.backbone)
    known = model.pretrained_cfg
    own = {  # of these weights, and not of those that timm has under the same name
        "input_size": (3, size, size),
        "mean": config.views.mean,
        "std": config.views.std,
        "interpolation": "bicubic",
        "crop_pct": round(size / eval_shorter_side(size), 4),
        "crop_mode": "center",
        "num_classes": 0,
        "fixed_input_size": False,
    }
    kept = {name: known[name] for name in ("architecture", "classifier", "first_conv") if known.get(name)}
    model.pretrained_cfg = own | {"architecture": config.backbone.name} | kept
    try:
        options = json.loads(json.dumps(timm_options(config.backbone)))
        save_config_for_hf(model, path, model_args=options)
    finally:
        model.pretrained_cfg = known
