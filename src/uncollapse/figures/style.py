"""How figures look, and how they become SVG."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

Array = NDArray[np.floating] | NDArray[np.integer]
Curve = tuple[Array, Array]
"""x and y of one run."""
INK, FAINT = "#24303c", "#d9dee4"
MAX_POINTS = 400  # of a line or a scatter: more cannot be seen and makes the page heavy
# Okabe & Ito's colours, told apart with any kind of colour vision; dashes repeat the message for grey print.
Style = tuple[str, str]
"""Colour and line style."""
_STYLES: dict[str, Style] = {
    "joint": ("#D55E00", "-"),
    "joint-sinkhorn": ("#CC79A7", "--"),
    "koleo": ("#009E73", "-"),
    "decoupled": ("#0072B2", "-"),
    "decoupled-paper": ("#56B4E9", "--"),
    "fixed": ("#7A7A7A", ":"),
}
_SPARE = ["#E69F00", "#000000", "#8C510A", "#B40F5D", "#5B8F00", "#6A3D9A", "#00797A", "#A0522D", "#3B3B98", "#C19A00"]
RC: dict[Any, Any] = {
    "svg.hashsalt": "uncollapse",  # same data, same bytes
    "text.parse_math": False,  # a dollar in an arm's name is a dollar
    "font.size": 8.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa5b1",
    "axes.linewidth": 0.7,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
}


def styles(arms: Iterable[str]) -> dict[str, Style]:
    """A colour and line style for each arm, all different; the first of a known kind has that kind's own.

    Names are a kind, or a kind with what tells it from others (``decoupled, K = 5,000``).
    """
    out: dict[str, Style] = {}
    spare = [(colour, dashes) for dashes in ("-.", "-", "--", ":") for colour in [*_SPARE, *dict(_STYLES.values())]]
    names = list(dict.fromkeys(arms))
    for arm in names:
        own = _STYLES.get(arm.split(",")[0])
        if own is not None and own not in out.values():
            out[arm] = own
    for arm in names:
        if arm not in out:
            taken = {colour for colour, _ in out.values()}
            fresh = [one for one in spare if one[0] not in taken] or [one for one in spare if one not in out.values()]
            out[arm] = (fresh or spare)[0]
    return out


def smooth(x: Array, y: Array, points: int = 200) -> Curve:
    """Means of consecutive stretches, so that a long noisy log becomes a readable line."""
    good = np.isfinite(y)
    x, y = x[good], y[good]
    if len(x) <= points:
        return x, y
    groups = np.array_split(np.arange(len(x)), points)
    return np.array([x[g].mean() for g in groups]), np.array([y[g].mean() for g in groups])


def panel(title: str, width: float = 3.9) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, 3.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def legend(figure: Figure, axes: Axes) -> None:
    """Below the panel, and only where there is more than one line to tell apart."""
    if len(axes.get_legend_handles_labels()[0]) > 1:
        figure.legend(
            loc="outside lower center", ncols=3, fontsize=8,
            handlelength=1.9, columnspacing=1.1, handletextpad=0.4,
        )  # fmt: skip


def svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
