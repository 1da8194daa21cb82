"""The few collectives the mathematics needs, each a no-op without a process group.

Every function that takes ``group`` treats ``None`` as one process alone, so the same code is tested with and
without ranks. Sums over ranks are plain sums: pass sums and counts, not means, and unequal ranks come out right.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def world() -> Group:
    """The default process group, or None where none was initialised or it has one process."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


def same_everywhere(seed: int, number: int) -> torch.Generator:
    """A generator on the CPU that every rank, and a resumed run, makes alike from a seed and a step or a count."""
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)


def rank_and_size(group: Group) -> tuple[int, int]:
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def sum_over_ranks(x: Tensor, group: Group) -> Tensor:
    """Sums ``x`` over ranks in place and returns it; no gradient."""
    if group is not None:
        dist.all_reduce(x, dist.ReduceOp.SUM, group)
    return x


def max_over_ranks(x: Tensor, group: Group) -> Tensor:
    """Largest of ``x`` over ranks, element by element, in place; no gradient."""
    if group is not None:
        dist.all_reduce(x, dist.ReduceOp.MAX, group)
    return x


def gather_rows(x: Tensor, group: Group) -> Tensor:
    """``(n, ...)`` of each rank → ``(W n, ...)`` in rank order on all of them; no gradient. Equal n on all ranks.

    Raises:
        ValueError: other numbers of rows on another rank. On a GPU that is not looked for, since it would have to wait.
    """
    if group is None:
        return x
    size = dist.get_world_size(group)
    if x.device.type == "cpu":  # gloo would end the process
        rows = torch.tensor([len(x), -len(x)])
        dist.all_reduce(rows, dist.ReduceOp.MAX, group)
        most, least = int(rows[0]), -int(rows[1])
        if most != least:
            raise ValueError(
                f"ranks have between {least} and {most} rows, {len(x)} here; all need as many: drop the last batch"
            )
    out = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(out, x.detach().contiguous(), group)
    return torch.cat(out)


def gather_ragged(x: Tensor, group: Group) -> Tensor:
    """As :func:`gather_rows` where ranks have other numbers of rows; no gradient."""
    if group is None:
        return x
    sizes = gather_rows(torch.tensor([len(x)], device=x.device), group).tolist()
    padded = torch.cat([x.detach(), x.new_zeros(max(sizes) - len(x), *x.shape[1:])])
    blocks = gather_rows(padded, group).split(max(sizes) or 1)
    return torch.cat([block[:size] for block, size in zip(blocks, sizes, strict=False)])


def logsumexp_over_ranks(x: Tensor, group: Group) -> Tensor:
    """``log Σ_ranks exp x``, element by element; no gradient."""
    if group is None:
        return x
    top = max_over_ranks(x.detach().clone(), group)
    finite = torch.where(top.isfinite(), top, torch.zeros_like(top))
    return sum_over_ranks((x.detach() - finite).exp(), group).log() + finite
