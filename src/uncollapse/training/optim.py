"""The optimiser, clipping, and the teacher's moving average."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from uncollapse.config.schema import Config, OptimConfig


def build_optimizer(config: Config, encoder: nn.Module, prototypes: nn.Module) -> torch.optim.Optimizer:
    """Groups as DINO has them: matrices decay; biases and other 1-D tensors only on request; prototypes on their own.
    The patch embedding has groups of its own where its rate is another.

    LARS divides by ``|gradient| + decay · |weight|``, as SwAV's does; DINO's and CARP's code divides by the norm of the
    sum of the two, which differs where a gradient is no longer than the decay.
    """
    encoding: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    embedding: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in encoder.named_parameters():
        alone = not config.optim.decay_biases and (parameter.ndim == 1 or name.endswith(".bias"))
        slow = "patch_embed." in name and config.optim.patch_embed_lr != 1
        (embedding if slow else encoding)[alone].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": params, "role": role, "weight_decay": 0.0}
        for params, role in zip(encoding, ("decay", "plain"), strict=True)
    ]
    groups += [
        {"params": params, "role": role, "weight_decay": 0.0, "lr_scale": config.optim.patch_embed_lr}
        for params, role in zip(embedding, ("decay", "plain"), strict=True)
        if params
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


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """EMA over parameters in order; batch-norm statistics are the teacher's own, as in DINO."""
    torch._foreach_lerp_(list(teacher.parameters()), [p.detach() for p in student.parameters()], 1 - momentum)


def clip_gradients(encoder: nn.Module, prototypes: list[nn.Parameter], config: OptimConfig) -> None:
    """Scales gradients that are longer than ``config.clip`` down to it: tensor by tensor, or the encoder's as one."""
    if not config.clip:
        return
    if config.clip_of == "encoder":
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), config.clip)
    else:
        clip_each([*encoder.parameters(), *prototypes], config.clip)


def clip_each(parameters: list[nn.Parameter], limit: float) -> None:
    """Scales every gradient tensor on its own to a norm of at most ``limit``, as DINO, iBOT and EsViT do."""
    for parameter in parameters:
        if parameter.grad is not None:
            norm = parameter.grad.norm()
            parameter.grad.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
