"""DINO: self-distillation with no labels (Caron et al., ICCV 2021, Algorithm 1 and Section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from uncollapse.config.schema import TargetKind
from uncollapse.distributed import Group
from uncollapse.losses.pairs import fused_dino_loss
from uncollapse.prototypes.sets import Prototypes
from uncollapse.targets.sinkhorn import sinkhorn_offsets
from uncollapse.targets.softmax import SoftmaxTargets


class DINO(nn.Module):
    """Targets, loss and centre. The only state is the centre, a buffer that is checkpointed.

    Works with any prototype set. Args: K; the centre's momentum; the target: ``centred`` and sharpened softmax of the
    teacher's logits (the paper's), ``sinkhorn`` (the same balanced over the batch, as SwAV and DINOv2 do it), or the
    set's own ``posterior``.
    """

    center: Tensor

    def __init__(self, prototypes: int, center_momentum: float = 0.9, target: TargetKind = "centred") -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(prototypes))
        self.center_momentum = center_momentum
        self.target = target

    @torch.no_grad()
    def targets(
        self, z_teacher: Tensor, prototypes: Prototypes, temperature: float, group: Group = None
    ) -> SoftmaxTargets:
        """A distribution over prototypes for each of the teacher's projections ``(T, n, D)``, made where it is used.

        ``group`` has the ranks whose projections are balanced together; each of them must call this.
        """
        if self.target == "posterior":
            return prototypes.posterior(z_teacher, temperature)
        weight, bias = prototypes.affine("teacher")
        if self.target == "sinkhorn":
            # Over both views and all ranks, as in DINOv2; a larger batch balances better.
            offsets = sinkhorn_offsets(z_teacher.flatten(0, 1), weight, temperature, bias=bias, group=group)
            return SoftmaxTargets(z_teacher, weight, temperature, offsets if bias is None else bias + offsets)
        shift = -self.center if bias is None else bias - self.center
        return SoftmaxTargets(z_teacher, weight, temperature, shift / temperature)

    def loss(
        self, z_student: list[Tensor], targets: SoftmaxTargets, prototypes: Prototypes, temperature: float
    ) -> Tensor:
        """Cross-entropy over all pairs (global teacher view, other student view)."""
        weight, bias = prototypes.affine("student")
        return fused_dino_loss(z_student, weight, targets, temperature, bias)

    @torch.no_grad()
    def update_center(self, z_mean: Tensor, prototypes: Prototypes) -> None:
        """After the loss: ``c ← m c + (1 - m) · mean of the raw teacher logits``.

        Logits are linear in z, so their mean over views, batch and ranks is the logit of the mean
        projection ``z_mean (D,)``; no ``(batch, K)`` array is read again and ranks exchange D numbers.
        """
        if self.target != "centred":
            return
        mean_logits = prototypes.logits(z_mean.unsqueeze(0), "teacher").squeeze(0)
        self.center.lerp_(mean_logits, 1 - self.center_momentum)
