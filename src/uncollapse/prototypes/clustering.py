"""Prototypes that a clustering of the teacher's projections learns, as in CAPI, out of the encoder's gradient.

Darcet et al., *Cluster and Predict Latent Patches for Improved Masked Image Modeling* (2025), Section 3.1: a linear
layer learns to predict its own assignments, balanced by Sinkhorn and sharpened. Its optimiser is its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adamw import adamw

from uncollapse.config.schema import ClusteringConfig
from uncollapse.distributed import Group, rank_and_size, sum_over_ranks
from uncollapse.losses.pairs import fused_patch_loss
from uncollapse.prototypes.sets import Prototypes, Side
from uncollapse.schedules import cosine
from uncollapse.targets.positions import at_positions, sinkhorn_by_position
from uncollapse.targets.sinkhorn import sinkhorn_offsets
from uncollapse.targets.softmax import SoftmaxTargets

BETAS = (0.9, 0.95)
_CLOCK = 1 << 20
"""Steps in which the share of training done is counted, for the schedule of the rate."""


class ClusteredPrototypes(Prototypes):
    """A linear layer ``W z + b`` on unit projections, trained to predict its own balanced assignments.

    The layer's loss is the mean cross-entropy of Sinkhorn's assignment at ``target_temperature`` against the softmax at
    ``temperature``; AdamW minimises it, whose state stands in the buffers beside W and b, so that a checkpoint has all
    of it and the encoder's optimiser none. W starts from a standard normal distribution and is never normalised. The
    step is taken after the student's, so that targets are by the prototypes that the loss was of, as in the released
    code.

    As CAPI has it (``own_student``), the student's side is a weight-normalised layer that the encoder's optimiser
    learns, and the teacher's logits are the layer's own. In other methods both sides are the layer, divided by √D: its
    rows are about √D long, and a method's temperatures are made for prototypes of length 1.
    """

    weight: Tensor
    bias: Tensor
    steps: Tensor

    def __init__(
        self,
        count: int,
        dim: int,
        config: ClusteringConfig,
        generator: torch.Generator,
        own_student: bool = False,
        learn_norm: bool = True,
    ) -> None:
        super().__init__()
        self.config, self.own_student = config, own_student
        self.register_buffer("weight", torch.randn(count, dim, generator=generator))
        self.register_buffer("bias", torch.zeros(count))
        for name in ("weight", "bias"):
            for moment in ("first", "second"):
                self.register_buffer(f"{name}_{moment}", torch.zeros_like(getattr(self, name)))
        self.register_buffer("steps", torch.zeros(()))
        if own_student:
            start = nn.init.trunc_normal_(torch.empty(count, dim), std=0.02, generator=generator)
            self.student_v = nn.Parameter(start)
            self.student_g = nn.Parameter(torch.ones(count, 1), requires_grad=learn_norm)
        self._learned: tuple[list[Tensor], float] | None = None

    @torch.no_grad()
    def begin_at(self, vectors: Tensor) -> None:
        self.weight.copy_(vectors * self.weight.norm(dim=-1, keepdim=True))
        if self.own_student:
            self.student_v.copy_(vectors)

    def affine(self, side: Side, temperature: float) -> tuple[Tensor, Tensor | None]:
        if side == "student" and self.own_student:
            return F.normalize(self.student_v, dim=-1) * self.student_g, None
        unit = 1.0 if self.own_student else self.weight.shape[1] ** 0.5
        return self.weight / unit, self.bias / (unit * temperature)

    def rate(self, progress: float) -> float:
        """AdamW's learning rate: a linear warm-up, then half a cosine of which the run sees a part."""
        c = self.config
        return cosine(round(progress * _CLOCK), round(c.schedule_span * _CLOCK), c.lr, 0.0, round(c.warmup * _CLOCK))

    @torch.no_grad()
    def observe(self, z: Tensor, progress: float, weight: Tensor | None = None, group: Group = None) -> None:
        """The gradient of the clustering's loss, for the step that `after_step` takes.

        Args:
            z: ``(n, D)``, balanced together; or ``(P, n, D)``, each of P positions balanced on its own.
            weight: ``(n,)``, how much each row counts, where there are no positions.
            group: ranks with other rows of the same number; None: z is everything there is.
        """
        if not z.shape[-2]:
            return
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.to(self.weight.dtype), dim=-1)
            share = z.new_ones(z.shape[:-1].numel()) if weight is None else weight.to(z)
            share = share / (share.sum() * rank_and_size(group)[1])
            targets = self._assigned(z, weight, group)
            with torch.enable_grad():
                layer = [tensor.clone().requires_grad_() for tensor in (self.weight, self.bias)]
                tau = self.config.temperature
                loss = fused_patch_loss(z.flatten(0, -2), layer[0], targets, tau, share, layer[1] / tau)
                gradients = list(torch.autograd.grad(loss, layer))
            self.own_loss = loss.detach() * rank_and_size(group)[1]
            self._learned = [sum_over_ranks(g, group) for g in gradients], self.rate(progress)

    def observe_positions(self, z: Tensor, progress: float, group: Group) -> bool:
        self.observe(z, progress, group=group)
        return True

    def _assigned(self, z: Tensor, weight: Tensor | None, group: Group) -> SoftmaxTargets:
        """Sinkhorn's assignments of the rows of ``z``, flattened."""
        tau, iterations = self.config.target_temperature, self.config.iterations
        bias = self.bias / tau
        if z.ndim == 2:
            offsets = sinkhorn_offsets(z, self.weight, tau, iterations, bias, group, row_weight=weight)
            return SoftmaxTargets(z, self.weight, tau, bias + offsets)
        offsets = sinkhorn_by_position(z, self.weight, tau, iterations, bias, group)
        position = torch.arange(len(z), device=z.device).repeat_interleave(z.shape[1])
        return at_positions(z.flatten(0, 1), position, self.weight, tau, bias, offsets)

    @torch.no_grad()
    def after_step(self) -> None:
        if self._learned is None:
            return
        gradients, rate = self._learned
        self._learned = self.own_loss = None
        layer = [self.weight, self.bias]
        moments = [[self.get_buffer(f"{name}_{m}") for name in ("weight", "bias")] for m in ("first", "second")]
        self.steps += 1
        clocks = [self.steps - 1, self.steps - 1]  # each tensor's, which the function below moves on
        adamw(
            layer,
            gradients,
            moments[0],
            moments[1],
            [],
            clocks,
            amsgrad=False,
            maximize=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=rate,
            weight_decay=self.config.weight_decay,
            eps=1e-8,
        )
