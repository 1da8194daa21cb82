"""A run as a checkpoint in the layout of DINO's released ones.

facebookresearch/dino, main_dino.py: a dictionary of ``student`` (under DDP's ``module.``), ``teacher``, ``epoch``,
``args`` and ``dino_loss``; each network has ``backbone`` and ``head`` with ``mlp`` and a weight-normalised
``last_layer``. iBOT adds ``last_layer2`` for patches. Here ``args`` is a dictionary, so that the file loads with
``weights_only``, and the optimiser's state is left out.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from uncollapse.checkpoints.backbones import HEAD_DIM, WIDE_HEADS
from uncollapse.checkpoints.encoder import own_parts, rebuild_encoder
from uncollapse.checkpoints.own import own_encoder
from uncollapse.checkpoints.prototypes import find_prototypes
from uncollapse.checkpoints.read import flatten
from uncollapse.config.facts import centres_probabilities, has_teacher
from uncollapse.errors import ConfigError, InputError
from uncollapse.export.content import Content, rows_of
from uncollapse.models.network import Encoder
from uncollapse.models.tokens import MaskedViT, is_vit, plain
from uncollapse.prototypes.decoupled import MixturePrototypes
from uncollapse.prototypes.sets import Side

_LAYERS = {"cls": "last_layer", "patch": "last_layer2"}
_AGREE = 1e-4
"""Largest difference of a unit projection that rounding makes."""


def dino_checkpoint(content: Content) -> dict[str, Any]:
    """What is saved, tried by reading it as anybody would who knows nothing of where it comes from.

    Raises:
        ConfigError: something that the layout cannot hold, or that its readers would take for something else.
    """
    config = content.config
    if not has_teacher(config):
        raise _refusal(f"it holds a student and a teacher, and {config.method.name} has no teacher")
    if config.backbone.name == "conv3":
        raise _refusal("no reader of it knows conv3, three convolutions of our own")
    if len(content.encoder.heads) > 1:
        raise _refusal(f"it holds one head, and this run has {len(content.encoder.heads)}")
    if other := [name for name in content.sets if name not in _LAYERS]:
        raise _refusal(f"it has no place for prototypes of {other[0]!r}")
    if "cls" not in content.sets:
        raise _refusal(f"its prototypes divide up images, and those of {config.method.name} patches")
    if config.prototypes.kind == "capi":
        raise _refusal("its layer of prototypes has no bias, and a clustering's has one")
    if is_vit(plain(content.encoder.backbone)):
        _refuse_narrow_heads(plain(content.encoder.backbone))
    networks: dict[str, Encoder] = {}
    for side in ("student", "teacher"):
        try:
            networks[side] = own_encoder(content.whole, side, content.source)[0]
        except InputError as error:
            raise _refusal(f"it holds a student and a teacher ({error})") from None
    saved: dict[str, Any] = {
        "student": _network(content, networks["student"], "student", "module."),
        "teacher": _network(content, networks["teacher"], "teacher", ""),
        "args": _args(content),
    }
    if centres := _centres(content):
        saved["ibot_loss" if "center2" in centres else "dino_loss"] = centres
    _try(content, saved)
    return saved


def left_out(content: Content) -> list[str]:
    """What the layout has no place for, a line each."""
    lines = []
    if any(isinstance(prototypes, MixturePrototypes) for prototypes in content.sets.values()):
        lines.append("last_layer has the mixture's directions; means, variances and weights are in head.safetensors")
    if config_vmf(content):
        lines.append("nothing in the layout says that these are von Mises-Fisher prototypes")
    return lines


def config_vmf(content: Content) -> bool:
    return content.config.prototypes.vmf or centres_probabilities(content.config)


def _refusal(why: str) -> ConfigError:
    return ConfigError(f"--to dino: {why}; take --to safetensors, which holds every run")


def _network(content: Content, encoder: Encoder, side: Side, prefix: str) -> dict[str, Tensor]:
    state = {f"backbone.{n}": t for n, t in plain(encoder.backbone).state_dict().items()}
    if isinstance(encoder.backbone, MaskedViT):
        state["backbone.masked_embed"] = encoder.backbone.mask_token
    state |= {f"head.{n}": t for n, t in encoder.head.state_dict().items()}
    names = ["cls", "patch"] if content.config.method.name == "ibot" else ["cls"]
    for name in names:  # a shared layer stands twice in iBOT's files
        rows = rows_of(content.sets[name if name in content.sets else "cls"], side)[0]
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        state[f"head.{_LAYERS[name]}.weight_g"], state[f"head.{_LAYERS[name]}.weight_v"] = length, rows
    return {prefix + n: t.detach().clone() for n, t in state.items()}


def _centres(content: Content) -> dict[str, Tensor]:
    """As the losses of DINO and iBOT keep them; centres of probabilities are of no use to them."""
    if centres_probabilities(content.config):
        return {}
    shapes = {"center": ("center", (1, -1)), "center_patch": ("center2", (1, 1, -1))}
    return {new: content.centres[old].reshape(s) for old, (new, s) in shapes.items() if old in content.centres}


def _args(content: Content) -> dict[str, Any]:
    """What DINO's own code asks for to build the networks, as far as it has a word for them."""
    config, backbone = content.config, plain(content.encoder.backbone)
    name = re.match(r"(?:vit|deit)_(tiny|small|base|large)", config.backbone.name)
    args: dict[str, Any] = {
        "arch": f"vit_{name[1]}" if name else config.backbone.name,
        "out_dim": config.prototypes.count,
        "norm_last_layer": not config.prototypes.learn_norm,
        "use_bn_in_head": config.head.batch_norm,
        "teacher_temp": config.teacher.temperature,
        "seed": config.seed,
    }
    if is_vit(backbone):
        args["patch_size"] = int(backbone.patch_embed.patch_size[0])  # type: ignore[union-attr, index]
    return args


@torch.no_grad()
def _try(content: Content, saved: dict[str, Any]) -> None:
    """Rebuilds both networks from names and shapes alone, and compares their projections of an image."""
    tensors = flatten(saved, content.source)
    for s in find_prototypes(tensors, content.source):
        if s.side not in ("student", "teacher") or s.name != "cls":
            continue
        encoder = own_encoder(content.whole, s.side, content.source)[0]
        try:
            rebuilt = rebuild_encoder(saved, tensors, s, content.source)
        except InputError as error:
            why = str(error).removeprefix(f"{content.source}: ").removesuffix("; --data cannot run it")
            raise _refusal(f"its readers cannot rebuild this encoder ({why})") from None
        image = torch.randn(2, 3, rebuilt.size, rebuilt.size, generator=torch.Generator().manual_seed(0))
        backbone, head = own_parts(encoder)
        if float((rebuilt.head(rebuilt.backbone(image)) - head(backbone(image))).abs().max()) > _AGREE:
            raise _refusal("names and shapes do not tell this encoder and its head from others that compute otherwise")


def _refuse_narrow_heads(backbone: Any) -> None:
    width = int(backbone.embed_dim) // int(backbone.blocks[0].attn.num_heads)
    if width != WIDE_HEADS.get(int(backbone.embed_dim), HEAD_DIM):
        raise _refusal(
            f"it does not say how many attention heads there are, and its readers take {HEAD_DIM} dimensions for each, "
            f"where this encoder has {width}"
        )
