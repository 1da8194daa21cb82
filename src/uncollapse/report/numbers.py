"""Numbers of an evaluation as text."""

from __future__ import annotations

import re
from typing import Any

from uncollapse.measure.catalogue import number

COUNTS = re.compile(r"(^n_|_clusters$|^count|_count$|^prototypes$|_prototypes$|^classes$|_classes$)")
"""Names of metrics that are counts, whatever their value."""
PLAIN = re.compile(r"((prototypes|distinct|used|wide|own)_per_class|_bits|_nats|_ratio(_random)?)$")
"""Names of metrics that are no shares, even where they lie between 0 and 1."""


def metric_text(name: str, value: float | None) -> str:
    """A metric as text: shares in per cent, counts whole, the rest to four digits; a dash for what is missing."""
    value = number(value)
    if value is None:
        return "–"
    if COUNTS.search(name) or (float(value).is_integer() and abs(value) > 1):
        return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"
    return f"{100 * value:.1f} %" if -1 <= value <= 1 and not PLAIN.search(name) else f"{value:.4g}"


def interval(ci95: Any) -> str:
    """``40.0–60.0`` for shares, plain numbers else; empty for an interval that could not be had."""
    low, high = ci95 if isinstance(ci95, list | tuple) and len(ci95) == 2 else (None, None)
    low, high = number(low), number(high)
    if low is None or high is None:
        return ""
    shares = -1 <= low <= high <= 1
    ends = [f"{100 * end:.1f}" if shares else f"{end:.4g}" for end in (low, high)]
    return (" to " if low < 0 else "–").join(ends)
