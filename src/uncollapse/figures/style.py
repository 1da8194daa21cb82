"""How figures look, and how they become SVG."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

Array = NDArray[np.floating] | NDArray[np.integer]
Curve = tuple[Array, Array]
"""x and y of one run."""
Panels = list[tuple[str, str]]
"""Images of one figure: address and alternative text."""
INK, FAINT = "#24303c", "#d9dee4"
MAX_POINTS = 400  # of a line or a scatter: more cannot be seen and makes the page heavy


class Style(NamedTuple):
    """How an arm is drawn, everywhere on a page."""

    colour: str
    dashes: str | tuple[int, tuple[float, ...]]
    """A line style of matplotlib."""
    marker: str = "o"


# Okabe & Ito's colours, told apart with any kind of colour vision; dashes repeat the message for grey print.
_MODES: dict[str, Style] = {
    "joint": Style("#D55E00", "-"),
    "joint-sinkhorn": Style("#CC79A7", "--"),
    "koleo": Style("#009E73", "-"),
    "repulsion": Style("#5B8F00", "--"),
    "energy": Style("#00797A", "-."),
    "orthogonality": Style("#8C510A", "--"),
    "mst": Style("#3B3B98", "-."),
    "decoupled": Style("#0072B2", "-"),
    "decoupled-paper": Style("#56B4E9", "--"),
    "memory": Style("#6A3D9A", "-"),
    "fixed": Style("#7A7A7A", ":"),
    "capi": Style("#E69F00", "-"),
}
_LINES: list[str | tuple[int, tuple[float, ...]]] = [
    "-",
    "--",
    ":",
    "-.",
    (0, (1, 2.5)),
    (0, (7, 2)),
    (0, (5, 1.5, 1, 1.5, 1, 1.5)),
    (0, (3, 4)),
    (0, (9, 1, 3, 1)),
    (0, (1, 5)),
    (0, (7, 4, 1, 4)),
]
_MARKERS = "os^DvP*X<>p"
_SPARE = ["#000000", "#B40F5D", "#A0522D", "#C19A00"]
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
    """A style for each arm, all different.

    Names are a mode (``decoupled``), one of several methods (``carp decoupled``), a further set of prototypes
    (``decoupled · patch``), or any of these with what tells it from others (``decoupled, K = 5,000``). The first of a
    known mode has that mode's own colour; with several methods or sets, its hue says the mode, and its shade, dashes
    and marker which of them.
    """
    names = list(dict.fromkeys(arms))
    known = {arm: match for arm in names if (match := _NAME.match(arm))}
    families = list(dict.fromkeys((match["method"], match["set"]) for match in known.values()))
    out: dict[str, Style] = {}
    for arm, match in known.items():
        number = families.index((match["method"], match["set"]))
        own = _MODES[match["mode"]]
        if len(families) > 1:
            at = number % len(_LINES)
            own = Style(_shade(own.colour, number), _LINES[at], _MARKERS[at])
        if own.colour not in {style.colour for style in out.values()}:
            out[arm] = own
    colours = [*_SPARE, *(style.colour for style in _MODES.values())]
    spare = [Style(colour, dashes) for dashes in ("-.", "-", "--", ":") for colour in colours]
    for arm in names:
        if arm not in out:
            taken = {style.colour for style in out.values()}
            fresh = [one for one in spare if one.colour not in taken] or [s for s in spare if s not in out.values()]
            out[arm] = (fresh or spare)[0]
    return out


_NAME = re.compile(rf"(?:(?P<method>\S+) )?(?P<mode>{'|'.join(_MODES)})(?: · (?P<set>[^,(]+?))?(?=$|,| \()")


def _shade(colour: str, number: int) -> str:
    """The colour itself for 0, then darker and lighter ones in turn, each further from it."""
    step = 0.7 ** ((number + 1) // 2)
    end = 0 if number % 2 else 255
    return "#" + "".join(f"{round(end + step * (int(colour[i : i + 2], 16) - end)):02X}" for i in (1, 3, 5))


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
    """Below the panels, and only where there is more than one line to tell apart; the figure grows with it."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) < 2:
        return
    room = figure.get_figwidth() * 17  # characters beside one another
    columns = max(1, min(4, int(room // (max(map(len, labels)) + 6))))
    rows = math.ceil(len(labels) / columns)
    figure.set_figheight(figure.get_figheight() + 0.16 * max(0, rows - 2))
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        fontsize=8,
        handlelength=1.9,
        columnspacing=1.1,
        handletextpad=0.4,
    )


def svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
