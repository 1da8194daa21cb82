"""Who owns the prototypes: one dot a prototype."""

from __future__ import annotations

from typing import Any

import numpy as np

from uncollapse.figures import style
from uncollapse.measure.shots import SPLITS, Ints, splits


def draw_owners(train: Ints, owned: Ints, distinct: Ints) -> tuple[str, str]:
    """A picture of which class owns how many prototypes, and its alternative text.

    From the class with the most training images to the one with the fewest. Beyond 400 classes, means of neighbouring
    ones.

    Args:
        train: ``(C,)`` training images of each class.
        owned: ``(C,)`` prototypes that each class owns.
        distinct: ``(C,)`` the same once ε-duplicates are merged.
    """
    import matplotlib as mpl
    from matplotlib.ticker import MaxNLocator

    order = np.argsort(-train, kind="stable")
    order = order[train[order] > 0]
    owned, distinct = owned[order], distinct[order]
    with mpl.rc_context(style.RC):
        figure, axes = style.panel("Prototypes that each class owns", width=6.6)
        rank = np.arange(1, len(order) + 1)
        x, every = style.smooth(rank, owned, style.MAX_POINTS)
        _, merged = style.smooth(rank, distinct, style.MAX_POINTS)
        axes.vlines(x, merged, every, color=style.FAINT, linewidth=1.2)
        look = style.styles(["joint", "decoupled"])
        axes.plot(x, every, "o", color=look["joint"].colour, markersize=5.5, fillstyle="none", label="prototypes")
        axes.plot(x, merged, "o", color=look["decoupled"].colour, markersize=2.6, label="duplicates merged")
        axes.set(xlabel="classes, most training images first", ylabel="owned by the class")
        axes.set_ylim(-0.03 * max(1, every.max()), 1.12 * max(1, every.max()))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _mark_splits(axes, train[order])
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)
        picture = style.svg(figure)
    none = int((owned == 0).sum())
    alt = (
        f"Prototypes owned by each of {len(order)} classes, from most to fewest training images: {owned.mean():.3g} "
        f"per class on average, {distinct.mean():.3g} after merging duplicates; {none} classes own none."
    )
    return picture, alt


def _mark_splits(axes: Any, class_train: Ints) -> None:
    """Names of the splits along the top, and a line where one ends. Classes are sorted, most images first."""
    start = 0
    for name, of_class in zip(SPLITS, splits(class_train), strict=True):
        n = int(of_class.sum())
        if n:
            if start:
                axes.axvline(start + 0.5, color="#9aa5b1", linewidth=0.8, dashes=(1, 3))
            axes.annotate(
                f"{name}-shot: {n}",
                (start + (n + 1) / 2, 1),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="top",
                fontsize=7.5,
            )
        start += n
