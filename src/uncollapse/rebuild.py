"""An encoder rebuilt from a checkpoint, for the numbers that only images can give.

Our own runs carry their configuration. Of other checkpoints the architecture is read off the keys and shapes:
vision transformers (DINO, iBOT, MSN, DINOv2) and ResNets (DINO, CARP, SwAV), each with its projection head. What
cannot be read off is never guessed: the error says which part was not understood.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from uncollapse.formats import PrototypeSet, clean, side_of
from uncollapse.reading import InputError

HEAD_DIM = 64
"""Width of an attention head: shapes do not tell, but every published model of these families has it."""
_HEADS = (
    ("mlp", "gelu", r"^(?:\w*head)\.mlp\.(\d+)\.(weight|bias|running_mean|running_var)$"),  # DINO's and relatives
    ("layers", "gelu", r"^(?:\w*head)\.layers\.(\d+)\.(weight|bias|running_mean|running_var)$"),  # lightly
    ("projection_head", "relu", r"^projection_head\.(\d+)\.(weight|bias|running_mean|running_var)$"),  # SwAV
)


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
    if s.name in ("patch", "region", "clusters"):
        raise InputError(
            f"{where}: the {s.name} prototypes divide up patches, not images; --data measures class-token and "
            "pooled prototypes only"
        )
    if s.family == "uncollapse":
        return _own(loaded, s, where)
    weights = _one_side(tensors, s)
    if not weights:
        raise InputError(f"{where}: it holds no encoder beside the prototypes, so --data has nothing to run")
    backbone_weights = _backbone_part(weights)
    if "patch_embed.proj.weight" in backbone_weights:
        backbone, width, size, described = _vit(backbone_weights, where)
    elif "conv1.weight" in backbone_weights and "layer4.0.conv1.weight" in backbone_weights:
        backbone, width, size, described = _resnet(backbone_weights, where)
    else:
        some = ", ".join(list(backbone_weights)[:3])
        raise InputError(
            f"{where}: the backbone was not understood (neither a plain ViT nor a ResNet; it begins with {some}), "
            "so --data cannot run it; its prototypes can still be diagnosed without --data"
        )
    head = _head(weights, width, s, where)
    return Rebuilt(backbone.eval(), head.eval(), size, None, described)


def _own(loaded: Any, s: PrototypeSet, where: str) -> Rebuilt:
    from uncollapse.config import ConfigError, build_config
    from uncollapse.state import build_encoder

    content = loaded.get("config") if isinstance(loaded, dict) else None
    if not isinstance(content, dict):
        raise InputError(f"{where}: a checkpoint without its configuration, so the encoder cannot be rebuilt")
    side = "student" if s.side == "student" else "teacher"
    try:
        config = build_config(content, where)
        encoder = build_encoder(config, drop_path=False)
        encoder.load_state_dict(loaded[side])
    except (ConfigError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{where}: its encoder does not fit its configuration ({reason})") from None
    encoder.eval()
    return Rebuilt(encoder.backbone, encoder.head, config.views.global_size, config, config.backbone.name)


def own_directions(loaded: Any, s: PrototypeSet) -> PrototypeSet:
    """A set of our own run as training used it: the means of a centred mixture are seen from their middle."""
    from uncollapse.config import ConfigError, build_config
    from uncollapse.prototypes import mixture_defaults

    content = loaded.get("config") if isinstance(loaded, dict) else None
    if s.family != "uncollapse" or not s.key.endswith("mixture.mean") or not isinstance(content, dict):
        return s
    if "centred" not in (content.get("prototypes", {}).get("mixture") or {}):
        return s  # written before mixtures could be
    try:
        chosen = build_config(content).prototypes
        centred = mixture_defaults(chosen.kind, chosen.mixture).centred
    except (ConfigError, KeyError):
        return replace(s, notes=(*s.notes, "its configuration is of another version: means taken as they are"))
    return replace(s, weight=s.weight - s.weight.mean(0)) if centred else s


# ------------------------------------------------------------------------------- the tensors of one side


def _one_side(tensors: Mapping[str, Tensor], s: PrototypeSet) -> dict[str, Tensor]:
    """Weights of the network on the side of ``s``, named from that network's root."""
    wanted = "student" if s.side == "student" else "teacher"
    sides: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        cleaned = clean(path)
        level, _, last = cleaned.rpartition("/")
        side = side_of(cleaned)
        name = last
        if not _says_side(level):
            # lightly and solo-learn: the side is a word in the module's own name
            name = re.sub(r"^(student|teacher|momentum|target|online)[._]", "", name)
        sides.setdefault(side, {})[name] = tensor
    # MSN's prototypes belong to no side, and its evaluation takes the target encoder.
    order = [wanted, "unstated"] if wanted in sides else ["unstated", *sides]
    found = next((sides[name] for name in order if _has_encoder(sides.get(name, {}))), {})
    return {name: t for name, t in found.items() if t.is_floating_point()}


def _says_side(level: str) -> bool:
    return bool(level) and side_of(level) != "unstated"


def _has_encoder(weights: Mapping[str, Tensor]) -> bool:
    return any("patch_embed" in n or re.search(r"(^|\.)(conv1|stem|layer1)\b", n) for n in weights)


def _backbone_part(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Backbone weights without its prefix, which may be there twice (EsViT's ResNet) or not at all."""
    out = dict(weights)
    for prefix in ("backbone.", "backbone.", "encoder."):
        inner = {n.removeprefix(prefix): t for n, t in out.items() if n.startswith(prefix)}
        out = inner if _has_encoder(inner) else out
    own = re.compile(r"^(\w*head|projection_head|prototypes|fc|last_layer|projector|classifier)\b")
    return {n: t for n, t in out.items() if not own.match(n)}


# ------------------------------------------------------------------------------------------- backbones


class _ClassToken(nn.Module):
    """A timm vision transformer as images → normalised class token."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, x: Tensor) -> Tensor:
        return self.vit.forward_features(x)[:, 0]  # type: ignore[operator]


def _vit(weights: dict[str, Tensor], where: str) -> tuple[nn.Module, int, int, str]:
    from timm.models.vision_transformer import VisionTransformer

    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    # FSDP checkpoints of DINOv2 number blocks within chunks: blocks.0.7.norm1 is block 7.
    weights = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", n): t for n, t in weights.items()}
    weights.pop("mask_token", None)
    weights.pop("masked_embed", None)
    depth = 1 + max((int(m[1]) for n in weights if (m := re.match(r"blocks\.(\d+)\.", n))), default=-1)
    swiglu = any(".mlp.w12." in n or ".mlp.w1." in n for n in weights)
    if "pos_embed" not in weights or "cls_token" not in weights or not depth or swiglu or width % HEAD_DIM:
        missing = (
            "SwiGLU blocks" if swiglu
            else f"a width of {width}, which is no multiple of {HEAD_DIM}" if width % HEAD_DIM
            else "no learned position embedding, class token or blocks"
        )  # fmt: skip
        raise InputError(f"{where}: a vision transformer that was not understood ({missing}); --data cannot run it")
    weights = {n: t.float() for n, t in weights.items()}
    registers = weights.pop("register_tokens", None)
    side = round((weights["pos_embed"].shape[1] - 1) ** 0.5)
    options: dict[str, Any] = {}
    if registers is not None:
        # Registers have no position: the class token's is added to it, and only patches keep theirs.
        options = {"reg_tokens": registers.shape[1], "no_embed_class": True}
        weights["reg_token"] = registers
        weights["cls_token"] = weights["cls_token"] + weights["pos_embed"][:, :1]
        weights["pos_embed"] = weights["pos_embed"][:, 1:]
    model = VisionTransformer(
        img_size=side * patch, patch_size=patch, embed_dim=width, depth=depth, num_heads=width // HEAD_DIM,
        mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / width, num_classes=0, global_pool="token",
        qkv_bias="blocks.0.attn.qkv.bias" in weights, dynamic_img_size=True,
        init_values=1.0 if "blocks.0.ls1.gamma" in weights else None, **options,
    )  # fmt: skip
    _load(model, weights, where, "vision transformer")
    size = 224 if patch <= 16 and side * patch > 224 else side * patch
    return _ClassToken(model), width, size, f"ViT, {depth} blocks of width {width}, patch {patch}"


def _resnet(weights: dict[str, Tensor], where: str) -> tuple[nn.Module, int, int, str]:
    from timm.models.resnet import BasicBlock, Bottleneck, ResNet

    weights = {n: t.float() for n, t in weights.items()}
    layers = [
        1 + max(int(m[1]) for n in weights if (m := re.match(rf"layer{stage}\.(\d+)\.", n))) for stage in (1, 2, 3, 4)
    ]
    bottleneck = "layer1.0.conv3.weight" in weights
    block: Any = Bottleneck if bottleneck else BasicBlock
    model = ResNet(block, tuple(layers), num_classes=0)
    if weights["conv1.weight"].shape != model.conv1.weight.shape:
        raise InputError(
            f"{where}: a ResNet with an unusual stem {tuple(weights['conv1.weight'].shape)}; not understood"
        )
    _load(model, weights, where, "ResNet")
    return model, model.num_features, 224, f"ResNet of {layers} {'bottleneck' if bottleneck else 'basic'} blocks"


def _load(model: nn.Module, weights: Mapping[str, Tensor], where: str, what: str) -> None:
    try:
        result = model.load_state_dict(dict(weights), strict=False)
    except RuntimeError as error:
        line = " ".join(str(error).split()[:40])
        raise InputError(f"{where}: the {what}'s shapes were not understood ({line})") from None
    missing = [n for n in result.missing_keys if not n.endswith("num_batches_tracked")]
    if missing or result.unexpected_keys:
        odd = f"missing {', '.join(missing[:3])}" if missing else f"unknown {', '.join(result.unexpected_keys[:3])}"
        raise InputError(f"{where}: the {what} was not understood ({odd}); --data cannot run it")


# ----------------------------------------------------------------------------------------------- heads


def _head(weights: Mapping[str, Tensor], width: int, s: PrototypeSet, where: str) -> nn.Module:
    msn = {n.removeprefix("fc."): t for n, t in weights.items() if re.match(r"fc\.(fc|bn)\d\.", n)}
    if msn:
        order = [f"{kind}{i}" for i in (1, 2, 3) for kind in ("fc", "bn")]
        parts = [{p: msn[f"{m}.{p}"] for p in _parts(msn, m)} for m in order if f"{m}.weight" in msn]
        return _sequence(parts, "gelu", width, s, where)
    for _, activation, sign in _HEADS:
        found: dict[int, dict[str, Tensor]] = {}
        for name, tensor in weights.items():
            if m := re.match(sign, name):
                found.setdefault(int(m[1]), {})[m[2]] = tensor
        if found:
            return _sequence([found[i] for i in sorted(found)], activation, width, s, where)
    if width == s.weight.shape[1]:
        return Unit()
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
        weight = state["weight"]
        if weight.ndim == 2:
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
        else:
            norm = nn.BatchNorm1d(len(weight))
            norm.load_state_dict(state, strict=False)
            modules.append(norm)
    if width != s.weight.shape[1]:
        raise InputError(f"{where}: the head ends in {width} dimensions, the prototypes have {s.weight.shape[1]}")
    return nn.Sequential(*modules, Unit()).requires_grad_(False)


def center_of(tensors: Mapping[str, Tensor], s: PrototypeSet) -> Tensor | None:
    """The centre (K,) that training subtracted from the teacher's logits for this set, where the file has it."""
    for path, tensor in tensors.items():
        if re.search(r"(_loss|^objective)/center$", path) and tensor.numel() == len(s.weight):
            return tensor.reshape(-1).float()
    return None
