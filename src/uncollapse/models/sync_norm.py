"""Batch norm over the batches of all ranks, on any device: PyTorch's own form raises an error on the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uncollapse.distributed import Group, gather_rows, rank_and_size, sum_over_ranks, world


def convert(module: nn.Module, group: Group = None) -> nn.Module:
    """Replaces every batch norm in ``module``, in place, by one over the batches of all ranks.

    Parameters and buffers are the same objects under the same names, so optimisers keep working and checkpoints are
    interchangeable with those of the module as it was. timm's ``BatchNormAct2d`` keeps its activation.

    Args:
        module: any; norms that are synchronised already are left as they are.
        group: the ranks. None: all there are, and nothing to do where there is one process.

    Returns:
        ``module``, or its replacement where it is a batch norm itself.

    Raises:
        TypeError: a subclass of batch norm with a forward pass of its own.
    """
    return module if group is None and world() is None else _convert(module, group, {})


def _convert(module: nn.Module, group: Group, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, SyncedNorm | nn.SyncBatchNorm):
        # One norm in two places stays one: `named_children` would name it once and leave the other place as it was.
        if module not in done:
            done[module] = SyncedNorm(module, group)
        return done[module]
    if module not in done:
        done[module] = module
        for name, child in module._modules.items():
            if child is not None:
                setattr(module, name, _convert(child, group, done))
    return module


class SyncedNorm(nn.modules.batchnorm._BatchNorm):
    """What ``norm`` computes, with the statistics of all ranks' rows while it trains.

    Forward and backward equal batch norm over the concatenated batch (Ioffe & Szegedy 2015) up to the order of sums,
    ranks with other numbers of rows included. Of the affine parameters' gradients each rank has its own rows' share,
    as of every other parameter's: data parallelism sums them up. One collective of 2 C + 1 numbers each way.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, group: Group) -> None:
        nn.Module.__init__(self)
        extra = {"drop", "act"} & set(dict(norm.named_children()))
        plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        if type(norm) not in plain and type(norm).__name__ != "BatchNormAct2d":
            raise TypeError(f"{type(norm).__name__} has a forward pass of its own, which cannot be synchronised")
        self.num_features, self.eps, self.momentum = norm.num_features, norm.eps, norm.momentum
        self.affine, self.track_running_stats, self.training = norm.affine, norm.track_running_stats, norm.training
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(norm, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))
        self.after = [name for name in ("drop", "act") if name in extra]
        for name in self.after:
            setattr(self, name, getattr(norm, name))
        self.group = group  # None stays None, so that the module can be copied and saved

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch norm needs (rows, channels, ...), got shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """``(n, C, ...)`` to the same shape and dtype; statistics in float32 or wider."""
        self._check_input_dim(input)
        if self.training or self.running_mean is None or self.running_var is None:
            x, mean, variance, count = _SyncedNorm.apply(input, self.weight, self.bias, self.eps, self.group or world())
            if self.training and self.running_mean is not None:
                self._track(mean, variance * (count / (count - 1)))
        else:
            x = F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        for name in self.after:
            x = getattr(self, name)(x)
        return x

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


class _SyncedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Group
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.group, ctx.dims = group, [0, *range(2, x.ndim)]
        wide = x if x.dtype == torch.float64 else x.float()
        count = wide.new_full((1,), x.numel() // x.shape[1])
        if count > 0:
            # Around the rank's own mean: a difference of two large sums of squares would lose what is left.
            variance, mean = torch.var_mean(wide, ctx.dims, correction=0)
        else:
            mean = variance = wide.new_zeros(x.shape[1])
        everyone = gather_rows(torch.cat([mean, variance, count]).unsqueeze(0), group)
        means, variances = everyone[:, :-1].reshape(rank_and_size(group)[1], 2, -1).unbind(1)
        counts = everyone[:, -1:]
        total = counts.sum()
        if total <= 1:
            raise ValueError(f"batch norm needs more than one value per channel over all ranks, got {tuple(x.shape)}")
        mean = (means * counts).sum(0) / total
        variance = ((variances + (means - mean).square()) * counts).sum(0) / total
        scale = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale, total)
        ctx.mark_non_differentiable(mean, variance, total)
        slope = scale if weight is None else scale * weight
        shift = -mean * slope if bias is None else bias - mean * slope
        out = torch.addcmul(_channels(shift, x), wide, _channels(slope, x))
        return out.to(x.dtype), mean, variance, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, total = ctx.saved_tensors
        wide = grad.to(mean.dtype)
        normal = (x.to(mean.dtype) - _channels(mean, x)) * _channels(scale, x)
        own = torch.stack([wide.sum(ctx.dims), (wide * normal).sum(ctx.dims)])
        # Every rank's loss sees every rank's rows through the statistics, so these two are sums over all of them.
        average, along = sum_over_ranks(own.clone(), ctx.group) / total
        slope = scale if weight is None else scale * weight
        inner = wide - _channels(average, x) - normal * _channels(along, x)
        grad_x = (inner * _channels(slope, x)).to(x.dtype)
        return grad_x, own[1] if weight is not None else None, own[0] if weight is not None else None, None, None


def _channels(v: Tensor, like: Tensor) -> Tensor:
    return v.view(1, -1, *[1] * (like.ndim - 2))
