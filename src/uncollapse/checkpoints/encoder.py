"""An encoder rebuilt from a checkpoint, for the numbers that only images can give.

Our own runs carry their configuration. Of other checkpoints the architecture is read off the keys and shapes
(`uncollapse.checkpoints.backbones`), with the projection head that leads to the prototypes in question. What cannot be
read off is never guessed: the error says which part was not understood.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from uncollapse.checkpoints.backbones import backbone_of
from uncollapse.checkpoints.own import own_encoder
from uncollapse.checkpoints.prototypes import OWN, PrototypeSet, clean, side_of
from uncollapse.errors import InputError
from uncollapse.models.network import Encoder
from uncollapse.models.tokens import PatchTokens, plain

_SIDE = re.compile(r"^(student|teacher|momentum|target|online|anchor)[._]")


def _without_side(name: str) -> str:
    """A module's name without the side in it: ``teacher_backbone.0`` (lightly), ``backbone.teacher.0`` (stable-

    pretraining) and ``teacher.backbone.0`` are all ``backbone.0``.
    """
    return re.sub(r"\.(student|teacher)\.", ".", _SIDE.sub("", name), count=1)


@dataclass
class Rebuilt:
    """An encoder, in evaluation mode: images to features to projections in the prototypes' space."""

    backbone: nn.Module
    head: nn.Module
    """Features (n, d) → projections (n, D), of unit length."""
    size: int
    """Side of the images that it was made for, in pixels."""
    config: Any = None
    """The run's configuration, for our own."""
    described: str = ""
    tokens: bool = False
    """Whether ``backbone`` returns patch tokens (n, T, d), because the prototypes divide up patches."""


PATCHES = frozenset({"patch", "region", "clusters"})
"""Names of sets whose prototypes divide up patches instead of images."""


class Unit(nn.Module):
    """L2 normalisation in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=-1)


def rebuild_encoder(loaded: Any, tensors: Mapping[str, Tensor], s: PrototypeSet, where: str) -> Rebuilt:
    """The encoder whose projections the prototypes of ``s`` divide up, on the side of ``s``.

    Args:
        loaded: what `read_tensors` returned. tensors: the same, flat. where: the file, for messages.

    Raises:
        InputError: no encoder in the file, or a part of it that was not understood; the message names it.
    """
    if s.family == "uncollapse" and OWN.match(s.key):
        return _own(loaded, s, where)
    if s.family == "CAPI" and s.name == "patch":
        raise InputError(
            f"{where}: CAPI's student prototypes divide up predictions of masked patches, made by a decoder from the "
            "visible ones; --data measures the teacher's clusters (head.layer), which a training checkpoint has"
        )
    weights = one_side(tensors, s)
    if not weights:
        raise InputError(f"{where}: it holds no encoder beside the prototypes, so --data has nothing to run")
    backbone = backbone_of(backbone_part(weights), where)
    head = _head(weights, backbone.width, s, where)
    if s.name not in PATCHES:
        return Rebuilt(backbone.module, head.eval(), backbone.size, None, backbone.described)
    if backbone.tokens is None:
        raise InputError(
            f"{where}: the {s.name} prototypes divide up patches, and {backbone.described} gives none here; --data "
            "cannot place images among them"
        )
    return Rebuilt(backbone.tokens, head.eval(), backbone.size, None, backbone.described, tokens=True)


def _own(loaded: Any, s: PrototypeSet, where: str) -> Rebuilt:
    alone = s.side == "shared" and "teacher" not in loaded  # a student's export
    encoder, config = own_encoder(loaded, "student" if s.side == "student" or alone else "teacher", where)
    tokens = s.name in PATCHES
    backbone, head = own_parts(encoder, s.name)
    size, described = config.views.global_size, config.backbone.name
    return Rebuilt(PatchTokens(backbone) if tokens else backbone, head, size, config, described, tokens)


def own_parts(encoder: Encoder, level: str = "cls") -> tuple[nn.Module, nn.Module]:
    """Backbone and a level's head of one of our encoders as `Rebuilt` has them: plain, and with unit projections."""
    head = encoder.head_of(level)
    return plain(encoder.backbone), head if getattr(head, "normalise", True) else nn.Sequential(head, Unit())


# ------------------------------------------------------------------------------- the tensors of one side


def one_side(tensors: Mapping[str, Tensor], s: PrototypeSet) -> dict[str, Tensor]:
    """Weights of the network on the side of ``s``, named from that network's root."""
    root = _root(s)
    beside = {c.removeprefix(root): t for path, t in tensors.items() if root and (c := clean(path)).startswith(root)}
    if _has_encoder(beside):
        return {name: t for name, t in beside.items() if t.is_floating_point()}
    wanted = "student" if s.side == "student" else "teacher"
    sides: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        cleaned = clean(path)
        level, _, last = cleaned.rpartition("/")
        side = side_of(cleaned)
        name = last
        if not _says_side(level):
            name = _without_side(name)
        sides.setdefault(side, {})[name] = tensor
    # MSN's prototypes belong to no side, and its evaluation takes the target encoder.
    order = [wanted, "unstated"] if wanted in sides else ["unstated", *sides]
    part = next((sides[name] for name in order if _has_encoder(sides.get(name, {}))), {})
    return {name: t for name, t in part.items() if t.is_floating_point()}


def _root(s: PrototypeSet) -> str:
    """Cleaned path of the network that the set belongs to, where it names one: ``teacher/``, ``model/teacher.``."""
    layer = re.sub(r"(weight_v|weight|parametrizations\.weight\.original1)$", "", clean(s.key))
    match = re.match(r"(.*[/.])?(\w*head\w*|prototypes)\.", layer)
    root = (match[1] or "") if match else ""
    return root if side_of(root) != "unstated" else ""


def _says_side(level: str) -> bool:
    return bool(level) and side_of(level) != "unstated"


def _has_encoder(weights: Mapping[str, Tensor]) -> bool:
    return any("patch_embed" in n or re.search(r"(^|\.)(conv1|stem|layer1)\b", n) for n in weights)


def backbone_part(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Backbone weights without its prefix, which may be there twice (EsViT's ResNet) or not at all."""
    out = dict(weights)
    for prefix in ("backbone.", "backbone.", "encoder.", "vit."):  # the last is lightly's, for masked ones
        inner = {n.removeprefix(prefix): t for n, t in out.items() if n.startswith(prefix)}
        out = inner if _has_encoder(inner) else out
    own = re.compile(r"^(\w*head(_\w+)?|prototypes|fc|last_layer|projector|classifier)\b")
    return {n: t for n, t in out.items() if not own.match(n)}


# ----------------------------------------------------------------------------------------------- heads


def _head_name(s: PrototypeSet) -> str:
    """Module that holds the layer of prototypes, named from its network's root: ``dino_head``; empty without one."""
    _, _, name = clean(s.key).rpartition("/")
    layer = re.search(r"(?:^|\.)([^.]+)\.(?:last_layer2?|layer)(?:\.|$)", _without_side(name))
    return layer[1] if layer else ""


def _head(weights: Mapping[str, Tensor], width: int, s: PrototypeSet, where: str) -> nn.Module:
    """Features → unit vectors among the prototypes of ``s``: the MLP of its own head, not of one beside it."""
    # SwAV's, everywhere; all others descend from DINO. lightly's MSN is told by its transformer.
    activation = "relu" if "prototypes" in s.key and not any("blocks." in n for n in weights) else "gelu"
    msn = {n.removeprefix("fc."): t for n, t in weights.items() if re.match(r"fc\.(fc|bn)\d\.", n)}
    if msn:
        order = [f"{kind}{i}" for i in (1, 2, 3) for kind in ("fc", "bn")]
        parts = [{p: msn[f"{m}.{p}"] for p in _parts(msn, m)} for m in order if f"{m}.weight" in msn]
        return _sequence(parts, "gelu", width, s, where)
    own = _head_name(s)
    names = [rf"{own}\.(?:mlp|layers)"] if own else [r"projection_head(?:\.layers)?", r"projector"]
    if s.key.endswith("mean"):  # a mixture has no layer whose name would tell
        names += [r"(?:\w+_)?head(?:\.mlp|\.layers)?"]
    if own == "head" and s.name == "clusters":
        names = []  # CAPI's clusters are of the tokens themselves
    for name in names:
        layers: dict[int, dict[str, Tensor]] = {}
        for key, tensor in weights.items():
            if m := re.match(rf"{name}(?:\.(\d+))?\.(weight|bias|running_mean|running_var)$", key):
                layers.setdefault(int(m[1] or 0), {})[m[2]] = tensor
        if layers:
            return _sequence([layers[i] for i in sorted(layers)], activation, width, s, where)
    if width == s.weight.shape[1]:
        return nn.Sequential(Unit())
    raise InputError(
        f"{where}: no projection head was found between the backbone ({width} features) and the prototypes "
        f"({s.weight.shape[1]} dimensions), so --data cannot place images among them"
    )


def _parts(weights: Mapping[str, Tensor], module: str) -> list[str]:
    return [n.removeprefix(module + ".") for n in weights if n.startswith(module + ".")]


def _sequence(
    parts: list[dict[str, Tensor]], activation: str, width: int, s: PrototypeSet, where: str
) -> nn.Sequential:
    """Linear layers and batch norms in order, an activation before every linear layer but the first."""
    modules: list[nn.Module] = []
    for state in parts:
        state = {n: t.float() for n, t in state.items()}
        weight = state.get("weight")
        if weight is not None and weight.ndim == 2:
            if modules:
                modules.append(nn.GELU() if activation == "gelu" else nn.ReLU())
            if weight.shape[1] != width:
                raise InputError(
                    f"{where}: the projection head was not understood (a layer takes {weight.shape[1]}, {width} come)"
                )
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in state)
            linear.load_state_dict(state)
            modules.append(linear)
            width = weight.shape[0]
        elif weight is None or weight.ndim != 1 or "running_mean" not in state or "running_var" not in state:
            raise InputError(f"{where}: a layer of the projection head was not understood ({', '.join(state)})")
        else:
            norm = nn.BatchNorm1d(len(weight))
            norm.load_state_dict(state, strict=False)
            modules.append(norm)
    if width != s.weight.shape[1]:
        raise InputError(f"{where}: the head ends in {width} dimensions, the prototypes have {s.weight.shape[1]}")
    return nn.Sequential(*modules, Unit()).requires_grad_(False)


_CENTERS = {"patch": "(center2|center_patch)", "region": "center_grid"}
"""Name of the centre in the state of the loss, where it is not ``center``: of iBOT's second one (its own code's, and
ours) and of EsViT's."""


def center_of(tensors: Mapping[str, Tensor], s: PrototypeSet) -> Tensor | None:
    """The centre (K,) that training subtracted from the teacher's logits for this set, where the file has it."""
    for name in (f"center_{s.name}", _CENTERS.get(s.name, "center")):  # our own name for it first
        for path, tensor in tensors.items():
            if re.search(rf"(_loss|^objective|^memory)/{name}$", path) and tensor.numel() == len(s.weight):
                return tensor.reshape(-1).float()
    return None
