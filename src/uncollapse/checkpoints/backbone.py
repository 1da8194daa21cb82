"""What every rebuilt backbone has, and how weights go into one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from uncollapse.errors import InputError


@dataclass
class Backbone:
    """A frozen encoder without its projection head."""

    module: nn.Module
    """Images (n, 3, size, size) → features (n, width): class token or pooled map."""
    width: int
    size: int
    """Side of the images that it was made for, in pixels."""
    described: str
    tokens: nn.Module | None = None
    """Images → patch tokens (n, T, width) as patch heads take them; None where there are none."""


def count_of(weights: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest number that the pattern finds at the start of a name."""
    numbers = {int(m[1]) for n in weights if (m := re.match(pattern, n))}
    if numbers and max(numbers) >= len(weights):
        raise ValueError(f"blocks numbered up to {max(numbers)} in {len(weights)} tensors")
    return 1 + max(numbers, default=-1)


def ratio(rows: int, width: int) -> float:
    """An MLP ratio that int(width · ratio) makes into ``rows`` again, of this width and of its doubles."""
    return rows / width * (1 + 1e-9)


def load(model: nn.Module, weights: Mapping[str, Tensor], where: str, what: str) -> None:
    """Every weight into its place, or an `InputError` that names what is missing, unknown or of another shape."""
    try:
        result = model.load_state_dict(dict(weights), strict=False)
    except RuntimeError as error:
        line = " ".join(str(error).split()[:40])
        raise InputError(f"{where}: the {what}'s shapes were not understood ({line})") from None
    missing = [n for n in result.missing_keys if not n.endswith("num_batches_tracked")]
    if missing or result.unexpected_keys:
        odd = f"missing {', '.join(missing[:3])}" if missing else f"unknown {', '.join(result.unexpected_keys[:3])}"
        raise InputError(f"{where}: the {what} was not understood ({odd}); --data cannot run it")
