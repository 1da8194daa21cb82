"""What each class has, arm by arm: one panel a measure, one line an arm, the classes with the most images first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from uncollapse.figures.style import RC, Style, legend, svg
from uncollapse.measure.shots import SPLITS, THIRDS, Ints, groups

COLUMNS = 2
FEW = 12
"""Classes, at most, of which each has its training images written below it."""
MOST = 40
"""Points of a line; beyond, means of neighbouring classes."""
Floats = NDArray[np.float64]
ByClass = Mapping[str, tuple[Floats, Floats]]
"""Arm → (C,) means and (C,) standard deviations over seeds; NaN where a class has none."""


def class_panels(measures: Mapping[str, ByClass], class_train: Ints, look: Mapping[str, Style]) -> str:
    """An SVG with a panel for each measure.

    Args:
        measures: title of the panel → its lines, of classes in the order of their numbers.
        class_train: (C,) training images of each class.
    """
    import matplotlib as mpl

    order = by_frequency(class_train)
    with mpl.rc_context(RC):
        rows = -(-len(measures) // COLUMNS)
        figure = Figure(figsize=(3.6 * COLUMNS, 2.5 * rows + 0.5), layout="constrained")
        for place, (title, lines) in enumerate(measures.items(), 1):
            axes = figure.add_subplot(rows, COLUMNS, place)
            axes.set_title(title, pad=14)
            parts = np.array_split(np.arange(len(order)), min(MOST, len(order)))
            x = np.array([part.mean() + 1 for part in parts])
            for arm, (mean, sd) in lines.items():
                y, spread = (np.array([_mean(values[order][part]) for part in parts]) for values in (mean, sd))
                style = look[arm]
                options: dict[str, Any] = {"color": style.colour, "linestyle": style.dashes, "marker": style.marker}
                axes.errorbar(x, y, np.nan_to_num(spread), label=arm, markersize=3, linewidth=1.3, **options)
            axes.set_ylim(bottom=0)
            if len(order) <= FEW:
                axes.set_xticks(x, [f"{n:,}" for n in class_train[order]], fontsize=7, rotation=35)
                axes.set_xlabel("classes by training images")
            else:
                axes.set_xlabel("classes, most training images first")
            mark_groups(axes, class_train[order])
        legend(figure, figure.axes[0])
        return svg(figure)


def by_frequency(class_train: Ints) -> Ints:
    """The classes that have training images, those with the most first."""
    order = np.argsort(-class_train, kind="stable")
    return order[class_train[order] > 0]


def mark_groups(axes: Any, class_train: Ints) -> None:
    """Names of the groups along the top, thirds where there are any, and a line where one ends.

    ``class_train`` is sorted, most images first.
    """
    of = groups(class_train)
    names = THIRDS if THIRDS[0] in of else SPLITS
    start = 0
    for name in names:
        n = int(of[name].sum())
        if n:
            if start:
                axes.axvline(start + 0.5, color="#9aa5b1", linewidth=0.8, dashes=(1, 3))
            axes.annotate(
                f"{name}: {n}",
                (start + (n + 1) / 2, 1),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                fontsize=7.5,
            )
        start += n


def _mean(values: Floats) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")
