"""Targets balanced by more than the batch: over a queue of earlier projections, or by a floor under every cluster.

Any method's targets, as its `assign` leaves them, get an offset for each prototype; what that needs from step to step
is kept beside the method's own memory, a queue or duals for each target by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from uncollapse.config.facts import bottleneck_of, queue_of, targets_of
from uncollapse.config.schema import Config
from uncollapse.distributed import Group, gather_ragged, gather_rows, rank_and_size, sum_over_ranks
from uncollapse.methods.contract import At, Memory, Parts, Seen, Targets, at_most
from uncollapse.targets.sinkhorn import sinkhorn_offsets
from uncollapse.targets.softmax import SoftmaxTargets


def balance_memory(c: Config, parts: Parts) -> Memory:
    """A queue, newest rows first, and how many are filled; or one dual for each prototype."""
    length, kept = queue_of(c)[0], {}
    for target, level in (parts.targets or {level: level for level in parts.sets}).items():
        if length:
            kept[_key("queue", target)] = torch.zeros(length, bottleneck_of(c, parts.sets[level]))
            kept[_key("filled", target)] = torch.zeros((), dtype=torch.long)
        if targets_of(c) == "floor":
            kept[_key("dual", target)] = torch.zeros(c.prototypes.count)
    return kept


@torch.no_grad()
def balanced(c: Config, targets: Targets, memory: Mapping[str, Tensor], at: At) -> Targets:
    """``targets`` with what balances them; as they are, where the batch or nothing does.

    ``sinkhorn-queue``: over the batch and a queue (Caron et al., *SwAV*, 2020), which is used once it is full.
    ``floor``: cosines plus a dual of each prototype, before the division by the temperature (Qian et al., *CoKe*, 2022,
    eq. 5).
    """
    if queue_of(c)[0]:
        return {name: _over_queue(c, of, name, memory, at.group) for name, of in targets.items()}
    if targets_of(c) == "floor":
        return {name: _shifted(of, memory[_key("dual", name)] / of.temperature) for name, of in targets.items()}
    return targets


@torch.no_grad()
def remember_balance(c: Config, targets: Targets, teacher: Seen, memory: Memory, at: At) -> None:
    """After the step: the newest projections push the oldest out of the queue; duals rise below the floor.

    A dual moves by ``floor_rate · (floor / K - m_k)``, m_k being the mean of the step's targets, and never below 0
    (CoKe's Algorithm 1 with the sizes of soft clusters); with a floor of 1 it may, and sizes become equal.
    """
    length, first = queue_of(c)
    for name, of in targets.items():
        if length and at.epoch >= first:
            queue, filled = memory[_key("queue", name)], memory[_key("filled", name)]
            new = _new_rows(of.z, teacher.key.get(name), c.views.global_count * c.run.batch, at)
            queue.copy_(torch.cat([new, queue])[:length])
            filled.add_(len(new)).clamp_(max=length)
        if targets_of(c) == "floor":
            size = sum_over_ranks(torch.stack([p.sum(0) for p in of.blocks()]).sum(0), at.group)
            seen, dual, share = size.sum(), memory[_key("dual", name)], c.prototypes.floor
            change = share / len(size) - size / seen.clamp_min(torch.finfo(size.dtype).tiny)
            dual += c.prototypes.floor_rate * change * (seen > 0)  # a step without hidden patches leaves it
            if share < 1:
                dual.clamp_(min=0)


def _over_queue(c: Config, of: SoftmaxTargets, name: str, memory: Mapping[str, Tensor], group: Group) -> SoftmaxTargets:
    rows, queue = of.z.flatten(0, -2), memory[_key("queue", name)]
    if int(memory[_key("filled", name)]) == len(queue):
        rank, ranks = rank_and_size(group)
        rows = torch.cat([rows, queue.tensor_split(ranks)[rank]])  # each its own share: together one process's
    iterations = getattr(c.method, "iterations", 3)
    return _shifted(of, sinkhorn_offsets(rows, of.weight, of.temperature, iterations, of.bias, group))


def _new_rows(z: Tensor, key: Tensor | None, most: int, at: At) -> Tensor:
    """``(m, D)`` of all ranks, the same on any number of them; of tokens and regions at most so many, at random."""
    if z.ndim == 2:
        assert key is not None
        return at_most(gather_ragged(z, at.group), gather_ragged(key, at.group), most, at)
    rows = gather_rows(z.transpose(0, 1), at.group).transpose(0, 1).flatten(0, -2)
    return rows if z.ndim == 3 else at_most(rows, None, most, at)


def _shifted(of: SoftmaxTargets, offsets: Tensor) -> SoftmaxTargets:
    return replace(of, bias=offsets if of.bias is None else of.bias + offsets)


def _key(what: str, target: str) -> str:
    return what if target == "cls" else f"{what}_{target}"
