"""Watching prototypes while they train: cheap statistics often, the ε-sweep now and then."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uncollapse.checks import fits
from uncollapse.measure.unique import EPSILONS, epsilon_sweep
from uncollapse.numerics import rows_at_once


def alive_window(prototypes: int, rows: int, window: int = 0) -> int:
    """The calls within which a prototype must have been an argmax to be alive: ``20 · K / rows`` unless one is given.

    Raises:
        ValueError: fewer than one prototype or row, or a negative window.
    """
    if prototypes < 1 or rows < 1 or window < 0:
        raise ValueError(f"need prototypes and rows ≥ 1 and window ≥ 0: {prototypes}, {rows}, {window}")
    return window or math.ceil(20 * prototypes / rows)


def alive_prototypes(last_used: Tensor, calls: Tensor | int, window: Tensor | int) -> int:
    """How many prototypes were an argmax within the last ``window`` calls.

    Args:
        last_used: ``(K,)`` integers, the number of the call, from 1, in which each was an argmax last; below 1: never.
        calls: made so far. window: calls that count.

    Returns:
        Between 0 and K.
    """
    since = torch.as_tensor(calls - window, device=last_used.device).clamp_min(0)
    return int((last_used > since).sum())


@torch.no_grad()
def projection_argmax(z: Tensor, vectors: Tensor) -> Tensor:
    """The largest product ``z · w_k`` of every projection, of any float type, in float32 at least and block by block.

    On unit rows of ``vectors`` this is the nearest prototype, as fast as a training step needs it;
    `prototype_argmax` decides near ties as float64 does.

    Args:
        z: ``(n, D)``. vectors: ``(K, D)``, on the same device.

    Returns:
        ``(n,)`` int64 in [0, K).

    Raises:
        ValueError: shapes that do not fit.
    """
    if z.ndim != 2:
        raise ValueError(f"projections must be (rows, dimensions), got {tuple(z.shape)}; flatten views and tokens")
    fits(z, vectors)
    wide = torch.promote_types(torch.promote_types(z.dtype, vectors.dtype), torch.float32)
    with torch.autocast(z.device.type, enabled=False):
        z, vectors = z.detach().to(wide), vectors.detach().to(wide)
        parts = z.split(rows_at_once(len(vectors)))
        return torch.cat([_argmax(part @ vectors.T) for part in parts]) if len(z) else z.new_empty(0, dtype=torch.long)


def _argmax(x: Tensor) -> Tensor:
    # NumPy's argmax is several times faster than torch's on a CPU, and this runs every step.
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    return torch.from_numpy(x.numpy().argmax(-1)) if on_cpu else x.argmax(-1)


class PrototypeMonitor(nn.Module):
    """Follows one set of prototypes in any training loop; each rank its own rows (`AlivePrototypesMetric`: all ranks').

    It has buffers and nothing to learn: make it an attribute of your model, and it moves and is checkpointed with it.

    Example::

        monitor = PrototypeMonitor(prototypes=K, rows=2 * batch)
        for step, batch in enumerate(loader):
            ...
            monitor.observe(teacher_logits)  # or cosines; (n, K), raw: not centred, not balanced
            if step % 100 == 0:
                log({"alive": monitor.alive(), **monitor.sweep(prototype_matrix)})

    Args:
        prototypes: K.
        rows: teacher rows per call of :meth:`observe`; sets the window when none is given.
        window: a prototype is *alive* when it was the argmax of a row within this many calls;
            0: ``20 · K / rows``, in which a prototype with a fair share is expected 20 times.
        device: where it begins.

    Raises:
        ValueError: fewer than one prototype or row, or a negative window.
    """

    last_used: Tensor
    called: Tensor
    in_window: Tensor

    def __init__(self, prototypes: int, rows: int, window: int = 0, device: torch.device | str = "cpu") -> None:
        super().__init__()
        window = alive_window(prototypes, rows, window)
        self.prototypes = prototypes
        self.register_buffer("last_used", torch.full((prototypes,), -1, dtype=torch.long, device=device))
        self.register_buffer("called", torch.zeros((), dtype=torch.long, device=device))
        self.register_buffer("in_window", torch.tensor(window, device=device))

    @property
    def calls(self) -> int:
        """Calls of :meth:`observe` so far."""
        return int(self.called)

    @property
    def window(self) -> int:
        """Calls within which a prototype must have been an argmax to be alive."""
        return int(self.in_window)

    def observe(self, cosines: Tensor) -> None:
        """Notes the argmax of every row of raw cosines ``(..., K)``: uncentred, unbalanced.

        Raises:
            ValueError: the last dimension is not K.
        """
        if not cosines.ndim or cosines.shape[-1] != self.prototypes:
            raise ValueError(f"cosines must be (rows, {self.prototypes}), got {tuple(cosines.shape)}")
        self.observe_argmax(_argmax(cosines.detach()))

    @torch.no_grad()
    def observe_projections(self, z: Tensor, vectors: Tensor) -> None:
        """As :meth:`observe`, from projections ``(n, D)`` and prototypes ``(K, D)`` of length 1, in blocks of rows.

        Where the prototypes have other lengths, it is the argmax of what a linear layer of them gives.

        Raises:
            ValueError: shapes that do not fit.
        """
        if len(vectors) != self.prototypes:
            raise ValueError(f"{len(vectors)} vectors; this monitor was made for {self.prototypes} prototypes")
        self.observe_argmax(projection_argmax(z, vectors))

    @torch.no_grad()
    def observe_argmax(self, argmax: Tensor) -> None:
        """As :meth:`observe`, from argmaxes ``(n,)``."""
        self.called += 1
        self.last_used[argmax.to(self.last_used.device)] = self.called

    def alive(self) -> int:
        """How many prototypes were an argmax within the window."""
        return alive_prototypes(self.last_used, self.called, self.in_window)

    @property
    def window_full(self) -> bool:
        """Whether as many calls were seen as the window holds; before that, alive is still growing."""
        return self.calls >= self.window

    def sweep(self, vectors: Tensor) -> dict[str, int]:
        """Unique prototypes (greedy ε-cover) of a ``(K, D)`` matrix at each ε, keyed by ε as text."""
        return {f"{eps:g}": count for eps, count in epsilon_sweep(vectors, EPSILONS).items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module; takes what earlier versions saved as well."""
        if "calls" in state_dict:
            names = {"calls": "called", "window": "in_window", "last_used": "last_used"}
            state_dict = {names[name]: torch.as_tensor(value) for name, value in state_dict.items()}
        return super().load_state_dict(state_dict, strict, assign)


def nearest_cosine(vectors: Tensor, sample: int = 128) -> float:
    """Mean cosine of an evenly spaced sample of prototypes to their nearest other one: 1 where all are copies.

    Args:
        vectors: ``(K, D)`` of any float type, K ≥ 2. sample: how many are looked at.

    Raises:
        ValueError: no such matrix.
    """
    if vectors.ndim != 2 or len(vectors) < 2 or not vectors.is_floating_point():
        raise ValueError(f"vectors must be floating (K, D) with K ≥ 2, got {vectors.dtype} {tuple(vectors.shape)}")
    unit = F.normalize(vectors.detach().float(), dim=-1)
    chosen = torch.linspace(0, len(unit) - 1, min(sample, len(unit)), device=unit.device).long()
    with torch.autocast(unit.device.type, enabled=False):
        cosines = unit[chosen] @ unit.T
    cosines[torch.arange(len(chosen), device=unit.device), chosen] = -2
    return float(cosines.max(1).values.mean())
