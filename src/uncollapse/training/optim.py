"""The optimiser, clipping, and the teacher's moving average."""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from torch import nn

from uncollapse.config.schema import Config, OptimConfig
from uncollapse.errors import ConfigError
from uncollapse.models.network import Encoder
from uncollapse.models.tokens import plain


def build_optimizer(config: Config, encoder: nn.Module, prototypes: nn.Module) -> torch.optim.Optimizer:
    """Groups as DINO has them: matrices decay; biases and other 1-D tensors only on request; prototypes on their own.
    What learns at a rate of its own has groups of its own.

    LARS divides by ``|gradient| + decay · |weight|``, as SwAV's does; DINO's and CARP's code divides by the norm of the
    sum of the two, which differs where a gradient is no longer than the decay.
    """
    members: dict[tuple[str, float], list[nn.Parameter]] = {("decay", 1.0): [], ("plain", 1.0): []}
    blocks = _blocks(encoder) if config.optim.layer_decay != 1 else 0
    for name, parameter in encoder.named_parameters():
        alone = not config.optim.decay_biases and (parameter.ndim == 1 or name.endswith(".bias"))
        scale = _lr_scale(name, config.optim, blocks)
        members.setdefault(("plain" if alone else "decay", scale), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": params, "role": role, "weight_decay": 0.0, **({} if scale == 1 else {"lr_scale": scale})}
        for (role, scale), params in members.items()
    ]
    learned = [p for p in prototypes.parameters() if p.requires_grad]
    if learned:
        groups.append({"params": learned, "role": "prototypes", "weight_decay": 0.0})
    name, lr = config.optim.name, config.optim.lr
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=config.optim.betas)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9)
    from timm.optim.lars import Lars

    for group in groups:
        # timm adapts a tensor's rate only where it decays at that step; DINO's LARS adapts whatever may decay.
        group["always_adapt"] = group["role"] != "plain"
    optimizer: torch.optim.Optimizer = Lars(groups, lr=lr, momentum=0.9, trust_coeff=0.001)
    return optimizer


def _lr_scale(name: str, optim: OptimConfig, blocks: int) -> float:
    """A parameter's rate relative to the encoder's: what lies below a block decays once more, heads and norm not."""
    scale = optim.patch_embed_lr if "patch_embed." in name else 1.0
    if optim.layer_decay == 1 or not name.startswith("backbone."):
        return scale
    if re.search(r"\b(patch_embed|pos_embed|cls_token|reg_token|mask_token)\b", name):
        layer = 0
    else:
        block = re.search(r"\bblocks\.(\d+)\.", name)
        layer = int(block[1]) + 1 if block else blocks + 1
    return scale * optim.layer_decay ** (blocks + 1 - layer)


def _blocks(encoder: nn.Module) -> int:
    """How many blocks a transformer's layer decay counts."""
    blocks: Any = getattr(plain(cast(Any, encoder).backbone), "blocks", None)
    if blocks is None:
        raise ConfigError("optim.layer_decay: this backbone has no blocks; take a vit_*, or leave it at 1")
    return len(blocks)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """EMA over parameters in order; batch-norm statistics are the teacher's own, as in DINO."""
    torch._foreach_lerp_(list(teacher.parameters()), [p.detach() for p in student.parameters()], 1 - momentum)


def clip_gradients(encoder: Encoder, sets: nn.ModuleDict, config: OptimConfig) -> None:
    """Scales gradients that are longer than ``config.clip`` down to it.

    Tensor by tensor; or the encoder's as one; or each network's as one: the backbone, and every head with the
    prototypes behind it.
    """
    if not config.clip:
        return
    if config.clip_of == "encoder":
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), config.clip)
    elif config.clip_of == "network":
        torch.nn.utils.clip_grad_norm_(encoder.backbone.parameters(), config.clip)
        for head in encoder.heads.values():
            behind = [p for name, s in sets.items() if encoder.head_of(name) is head for p in s.parameters()]
            torch.nn.utils.clip_grad_norm_([*head.parameters(), *behind], config.clip)
    else:
        clip_each([*encoder.parameters(), *sets.parameters()], config.clip)


def clip_each(parameters: list[nn.Parameter], limit: float) -> None:
    """Scales every gradient tensor on its own to a norm of at most ``limit``, as DINO, iBOT and EsViT do."""
    for parameter in parameters:
        if parameter.grad is not None:
            norm = parameter.grad.norm()
            parameter.grad.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
