"""Who owns the prototypes: one dot a prototype."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from uncollapse.figures import style
from uncollapse.figures.classes import by_frequency, mark_groups
from uncollapse.measure.shots import Ints


def draw_owners(train: Ints, owned: Ints, distinct: Ints, used: NDArray[np.float64] | None = None) -> tuple[str, str]:
    """A picture of which class owns how many prototypes, and its alternative text.

    From the class with the most training images to the one with the fewest. Beyond 400 classes, means of neighbouring
    ones.

    Args:
        train: ``(C,)`` training images of each class.
        owned: ``(C,)`` prototypes that each class owns.
        distinct: ``(C,)`` the same once ε-duplicates are merged.
        used: ``(C,)`` distinct prototypes that equally many test images of each class use; NaN where there are too few.
    """
    import matplotlib as mpl
    from matplotlib.ticker import MaxNLocator

    order = by_frequency(train)
    owned, distinct = owned[order], distinct[order]
    with mpl.rc_context(style.RC):
        figure, axes = style.panel("Prototypes that each class owns", width=6.6)
        axes.set_title(axes.get_title(loc="left"), pad=14)  # above the names of the groups
        rank = np.arange(1, len(order) + 1)
        x, every = style.smooth(rank, owned, style.MAX_POINTS)
        _, merged = style.smooth(rank, distinct, style.MAX_POINTS)
        axes.vlines(x, merged, every, color=style.FAINT, linewidth=1.2)
        look = style.styles(["joint", "decoupled"])
        axes.plot(x, every, "o", color=look["joint"].colour, markersize=5.5, fillstyle="none", label="prototypes")
        axes.plot(x, merged, "o", color=look["decoupled"].colour, markersize=2.6, label="duplicates merged")
        top = max(1.0, float(every.max()))
        if used is not None and not np.isnan(used[order]).all():
            place, in_use = style.smooth(rank, used[order], style.MAX_POINTS)
            axes.plot(place, in_use, "_", color=style.INK, markersize=7, label="used, equal images")
            top = max(top, float(in_use.max()))
        axes.set(xlabel="classes, most training images first", ylabel="prototypes")
        axes.set_ylim(-0.03 * top, 1.12 * top)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        mark_groups(axes, train[order])
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)
        picture = style.svg(figure)
    none = int((owned == 0).sum())
    alt = (
        f"Prototypes owned by each of {len(order)} classes, from most to fewest training images: {owned.mean():.3g} "
        f"per class on average, {distinct.mean():.3g} after merging duplicates; {none} classes own none."
    )
    return picture, alt
