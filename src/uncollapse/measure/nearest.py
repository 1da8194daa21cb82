"""Weighted k-nearest-neighbour classification, in blocks, for any number of features."""

from __future__ import annotations

import torch
from torch import Tensor

from uncollapse.numerics import rows_at_once

_BANK = 1 << 19
"""Most bank rows compared with at once; a larger bank is searched in parts."""
_GROUP = 32


def nearest(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest inner products of every query with the bank.

    Args:
        bank: ``(N, d)`` floating; unit rows make the products cosines.
        queries: ``(n, d)`` of the same type and device.
        k: in [1, N].

    Returns:
        Values ``(n, k)``, descending, and indices into the bank ``(n, k)`` int64. Memory is bounded whatever n and N.
    """
    part = min(len(bank), _BANK)
    step = max(1, min(rows_at_once(part, device=bank.device), len(queries)))
    similar = torch.empty(step, part, device=bank.device, dtype=bank.dtype)  # once: a fresh one costs as much again
    values, indices = [], []
    for s in range(0, len(queries), step):
        part_of_queries = queries[s : s + step]
        top = bank.new_empty(len(part_of_queries), 0)
        index = torch.empty(len(part_of_queries), 0, dtype=torch.long, device=bank.device)
        for b in range(0, len(bank), part):
            rows = bank[b : b + part]
            out = (
                similar[: len(part_of_queries)]
                if len(rows) == part
                else similar.new_empty(len(part_of_queries), len(rows))
            )
            more, where = _largest(torch.mm(part_of_queries, rows.T, out=out), min(k, len(rows)))
            top, index = torch.cat([top, more], 1), torch.cat([index, where + b], 1)
            if b:
                top, chosen = top.topk(min(k, top.shape[1]), 1)
                index = index.gather(1, chosen)
        values.append(top)
        indices.append(index)
    return torch.cat(values), torch.cat(indices)


def _largest(similar: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, (rows, N) → values and columns, both (rows, k)."""
    size, device = similar.shape[1], similar.device
    groups = size // _GROUP
    if groups < 4 * k:
        return similar.topk(k, 1)
    # The k largest lie in the k groups with the largest maxima (or in the tail, searched whole). Selecting
    # among maxima first is several times faster than selecting among all.
    inside = similar[:, : groups * _GROUP].view(len(similar), groups, _GROUP)
    best = inside.amax(2).topk(k, 1, sorted=False)[1]
    columns = (best[:, :, None] * _GROUP + torch.arange(_GROUP, device=device)).flatten(1)
    tail = torch.arange(groups * _GROUP, size, device=device).expand(len(similar), -1)
    columns = torch.cat([columns, tail], 1)
    top, place = similar.gather(1, columns).topk(k, 1)
    return top, columns.gather(1, place)


def vote(similarity: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The class that each query's neighbours elect; equal votes go to the smaller label.

    Every neighbour votes for its class with weight ``exp(similarity / temperature)`` (Wu et al. 2018; Caron et al.
    2021).

    Args:
        similarity: ``(n, k)``, the neighbours' cosines. labels: ``(n, k)``, their classes, integers.
        temperature: above 0.

    Returns:
        ``(n,)`` int64 classes.
    """
    classes, codes = torch.unique(labels, return_inverse=True)
    winners = []
    step = rows_at_once(len(classes), device=labels.device)
    for s in range(0, len(labels), step):
        part = similarity[s : s + step]
        # Relative to the nearest one, which changes no decision and cannot overflow.
        weight = torch.exp((part - part.amax(1, keepdim=True)) / temperature)
        votes = torch.zeros(len(part), len(classes), device=part.device, dtype=weight.dtype)
        votes.scatter_add_(1, codes[s : s + step], weight)
        winners.append(classes[(votes >= votes.amax(1, keepdim=True)).byte().argmax(1)])
    return torch.cat(winners)


def unit_rows(x: Tensor, name: str) -> Tensor:
    """Float32 rows of length 1.

    Raises:
        ValueError: a row of zeros, which has no direction, or one that is not finite.
    """
    x = x.detach().float()
    norm = x.norm(dim=1, keepdim=True)
    if bad := int((~torch.isfinite(norm)).sum()):
        raise ValueError(f"{bad} of the {len(x)} {name} features are NaN or infinite; look upstream for the cause")
    if zero := int((norm == 0).sum()):
        raise ValueError(f"{zero} {name} features are all zero and have no direction")
    return x / norm
