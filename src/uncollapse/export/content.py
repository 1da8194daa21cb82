"""What there is to export of a run: one side's encoder, heads and prototypes, what they are called, and what is known
of them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uncollapse import __version__
from uncollapse.checkpoints.exported import FACTS, is_export
from uncollapse.checkpoints.files import damage_is_said
from uncollapse.checkpoints.own import own_encoder
from uncollapse.checkpoints.read import flatten, newest_of, read_tensors
from uncollapse.config.facts import has_teacher, method_name, mode_name, teacher_follows_prototypes
from uncollapse.config.schema import Config
from uncollapse.errors import InputError
from uncollapse.measure.random_start import RandomLikeness, random_likeness
from uncollapse.measure.unique import EPSILONS, epsilon_sweep
from uncollapse.models.network import Encoder, PredictingEncoder
from uncollapse.models.tokens import MaskedViT, plain
from uncollapse.prototypes.build import initial_prototypes
from uncollapse.prototypes.decoupled import MixturePrototypes
from uncollapse.prototypes.sets import Prototypes, Side
from uncollapse.run_folder.read import RunRecord, read_run
from uncollapse.shown import in_words


@dataclass(frozen=True)
class SetFacts:
    """What is said of one set of prototypes beside its tensors."""

    K: int
    D: int
    kind: str
    """How it was learned: ``joint``, ``koleo``, ``decoupled`` …"""
    side: str
    """``student`` or ``teacher``; ``shared`` where both look at the same vectors."""
    head: str
    """Under which name the head whose projections it divides up stands in the file."""
    of: str
    """``images``, or ``patches`` where projections are those of patches or regions."""
    unit_projections: bool
    """Whether projections are put on the unit sphere before they meet the prototypes."""
    temperature: float
    """Of the softmax over the logits of this side, at the end of its warm-up."""
    unique: dict[str, int]
    """ε (cosine distance) → unique prototypes at it, counted on what is in the file."""
    unusable: int
    """Rows that are zero, NaN or infinite; they are in no count."""


@dataclass(frozen=True)
class Content:
    """One side of a run at one step."""

    source: str
    """What the user named."""
    name: str
    """Of the run."""
    config: Config
    """Without paths of the machine that it ran on."""
    side: Side
    step: int
    encoder: Encoder
    sets: dict[str, Prototypes]
    centres: dict[str, Tensor]
    """DINO's centres by the name that the run keeps them by, each (K,)."""
    facts: dict[str, SetFacts]
    random: RandomLikeness | None
    """Whether the first set still looks like its random start; None: no row has a direction."""
    record: RunRecord | None
    """What the run measured at this very step; None where it did not."""
    whole: dict[str, Any]
    """The checkpoint as it was read."""


def content_of(run: Path, side: str | None) -> Content:
    """Reads the newest whole checkpoint of a run folder, or one file of ours; nothing in it is run.

    Args:
        run: where it is. side: ``teacher``, ``student``, or None for the one that is evaluated.

    Raises:
        InputError: nothing of ours there, or a side that it does not have.
    """
    if is_export(run):
        raise InputError(f"{run}: an export already; name the run folder that it was made from")
    with damage_is_said(run):
        file, _ = newest_of(run)
    loaded = read_tensors(file)
    if not isinstance(loaded, dict) or not isinstance(loaded.get("prototypes"), dict) or "config" not in loaded:
        raise InputError(f"{run}: no checkpoint of uncollapse; only runs of ours are exported")
    with damage_is_said(file):
        flatten(loaded, file)
    own: Side = "teacher" if side in (None, "teacher") else "student"
    encoder, config = own_encoder(loaded, own, file)
    if not has_teacher(config):
        if side == "teacher":
            raise InputError(f"{run}: {config.method.name} has no teacher; leave out --side")
        own = "student"
    sets = {name: _set(config, i, name, state, file) for i, (name, state) in enumerate(loaded["prototypes"].items())}
    step = loaded.get("step")
    folder = run if run.is_dir() else file.parent.parent
    return Content(
        str(run),
        folder.resolve().name if (folder / "config.yaml").is_file() else file.stem,
        _without_paths(config),
        own,
        step if type(step) is int else 0,
        encoder,
        sets,
        {name: t for name, t in loaded.get("memory", {}).items() if name.startswith("center")},
        {name: _facts(config, name, prototypes, own, encoder) for name, prototypes in sets.items()},
        _likeness(next(iter(sets.values())), own),
        _record(folder, step),
        loaded,
    )


def _set(config: Config, number: int, name: str, state: Any, where: Path) -> Prototypes:
    made = initial_prototypes(config, number, 1, name)
    try:
        made.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError, KeyError) as error:
        why = in_words(error)[:160]
        raise InputError(f"{where}: the prototypes of {name!r} do not fit its configuration ({why})") from None
    return made.eval().requires_grad_(False)


def _without_paths(config: Config) -> Config:
    """The same, but for folders and files of the machine: an export is for others to see."""

    def bare(path: str) -> str:
        return path if path.startswith("builtin:") else ""

    data = replace(config.data, path=bare(config.data.path), val_path=bare(config.data.val_path))
    backbone = replace(config.backbone, init=Path(config.backbone.init).name)
    return replace(config, data=data, backbone=backbone, change=replace(config.change, branch=""))


def _record(folder: Path, step: Any) -> RunRecord | None:
    record = read_run(folder) if (folder / "summary.json").is_file() else None
    return record if record is not None and record.summary.get("steps") == step else None


def rows_of(prototypes: Prototypes, side: Side) -> tuple[Tensor, Tensor | None]:
    """``weight (K, D)`` and ``bias (K,)``: what a side's logits are made of, ``(z @ weight.T + bias) / τ``.

    A vMF normaliser is no bias of the layer: it is left to who knows the temperature.
    """
    weight, bias = prototypes.affine(side, 1.0)
    has_layer = bias is not None and not getattr(prototypes, "vmf", False)
    return weight.detach().float(), bias.detach().float() if has_layer and bias is not None else None


def _usable(prototypes: Prototypes, side: Side) -> Tensor:
    rows = rows_of(prototypes, side)[0]
    return rows[torch.isfinite(rows).all(1) & (rows != 0).any(1)]


def _likeness(prototypes: Prototypes, side: Side) -> RandomLikeness | None:
    rows = _usable(prototypes, side)
    return random_likeness(rows, EPSILONS[0]) if len(rows) else None


def _facts(config: Config, name: str, prototypes: Prototypes, side: Side, encoder: Encoder) -> SetFacts:
    weight, usable = rows_of(prototypes, side)[0], _usable(prototypes, side)
    kind, method = config.prototypes.kind, config.method.name
    apart = teacher_follows_prototypes(config) if kind in ("joint", "koleo") else (kind, method) == ("capi", "capi")
    counts = epsilon_sweep(usable, EPSILONS) if len(usable) else dict.fromkeys(EPSILONS, 0)
    teacher = config.teacher
    return SetFacts(
        K=weight.shape[0],
        D=weight.shape[1],
        kind=kind,
        side=side if apart else "shared",
        head=f"heads.{name if name in encoder.heads else 'cls'}",
        of="patches" if name in ("patch", "region") else "images",
        unit_projections=config.head.normalise,
        temperature=teacher.temperature if side == "teacher" else teacher.student_temperature,
        unique={f"{eps:g}": count for eps, count in counts.items()},
        unusable=len(weight) - len(usable),
    )


# ------------------------------------------------------------------------------------------ what files hold


def encoder_tensors(content: Content) -> dict[str, Tensor]:
    """The backbone alone, by the names that timm gives them."""
    return _ready(plain(content.encoder.backbone).state_dict())


def head_tensors(content: Content) -> dict[str, Tensor]:
    """Everything beside the backbone.

    ``heads.NAME.mlp.*`` the projection heads; ``prototypes.SET.weight (K, D)``, as they enter the logits, with
    ``bias (K,)`` where the layer has one and ``mixture.*`` where a mixture made them; ``memory.*`` DINO's centres;
    ``mask_token`` and ``predictor.*`` where the method has them.
    """
    tensors = content.encoder.heads.state_dict(prefix="heads.")
    if isinstance(content.encoder.backbone, MaskedViT):
        tensors["mask_token"] = content.encoder.backbone.mask_token
    if isinstance(content.encoder, PredictingEncoder):
        tensors |= content.encoder.predictor.state_dict(prefix="predictor.")
    for name, prototypes in content.sets.items():
        weight, bias = rows_of(prototypes, content.side)
        tensors[f"prototypes.{name}.weight"] = weight
        if bias is not None:
            tensors[f"prototypes.{name}.bias"] = bias
        if isinstance(prototypes, MixturePrototypes):
            tensors |= prototypes.mixture.state_dict(prefix=f"prototypes.{name}.mixture.")
    tensors |= {f"memory.{name}": centre for name, centre in content.centres.items()}
    return _ready(tensors)


def _ready(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies, since a safetensors file takes none that share memory."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def metadata(content: Content, head: bool) -> dict[str, str]:
    """Of a safetensors file, which holds nothing but text: JSON under ``uncollapse`` and, in the head's file, under
    ``prototypes.SET`` for each set."""
    config = content.config
    facts = {
        "version": __version__,
        "family": "uncollapse",
        "method": method_name(config),
        "mode": mode_name(config),
        "side": content.side,
        "step": content.step,
        "backbone": config.backbone.name,
        "config": dataclasses.asdict(config),
    }
    entries = {"format": "pt", FACTS: json.dumps(facts)}
    if head:
        entries |= {f"prototypes.{name}": json.dumps(dataclasses.asdict(of)) for name, of in content.facts.items()}
    return entries
