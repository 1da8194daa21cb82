"""Networks whose sizes a file names, built no larger than the weights that the file has to fill them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SPARE = 20_000_000
"""Numbers that building a network may make besides four times those it is filled with: masks, index tables."""
_MADE: dict[Callable[..., Any], Callable[..., int]] = {
    **dict.fromkeys((torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand, torch.full), math.prod),
    **dict.fromkeys((torch.linspace, torch.arange, torch.eye), max),
}
"""Functions that make tensors, and how many numbers from their whole-number arguments."""


class TooLarge(ValueError):
    """What is built would be larger than the weights."""


class Within(TorchFunctionMode):
    """While it is entered, torch refuses to make more numbers, or more tensors, than ``weights`` call for.

    Raises:
        TooLarge: inside, from the call that would have.
    """

    def __init__(self, weights: Collection[Tensor]) -> None:
        super().__init__()
        self.tensors = 10 * len(weights) + 1000
        self.numbers = self.most = 4 * sum(t.numel() for t in weights if not t.is_meta) + _SPARE

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [*args, *kwargs.values()]
        shapes = [t.shape for t in inputs if isinstance(t, Tensor)]
        made = max(map(math.prod, shapes), default=0)
        if len(set(shapes)) > 1:
            with suppress(RuntimeError):  # shapes that are not spread over one another
                made = max(made, math.prod(torch.broadcast_shapes(*shapes)))
        if func in _MADE:
            flat = [n for value in inputs for n in (value if isinstance(value, tuple | list) else [value])]
            made = _MADE[func]([abs(int(n)) for n in flat if isinstance(n, int | float) and math.isfinite(n)] or [0])
            self.numbers, self.tensors = self.numbers - made, self.tensors - 1
        if made > self.most or self.numbers < 0 or self.tensors < 0:
            raise TooLarge("it would be far larger than the weights in the file")
        return func(*args, **kwargs)
