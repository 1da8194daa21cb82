"""What a setting does to each arm: one panel a measure, one line an arm, over the values of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from uncollapse.figures.style import RC, styles, svg

Lines = Mapping[str, Sequence[tuple[float, float, float]]]
"""Arm → (value of the setting, mean, standard deviation over seeds), the values ascending."""


def sweep_panels(measures: Mapping[str, Lines], setting: str) -> str:
    """An SVG with a panel for each measure; the axis of a setting above 0 is logarithmic.

    Args:
        measures: title of the panel → what it shows.
        setting: what is swept, as the axis calls it.
    """
    import matplotlib as mpl

    with mpl.rc_context(RC):
        figure = Figure(figsize=(3.4 * len(measures), 3.2), layout="constrained")
        style = styles(dict.fromkeys(arm for lines in measures.values() for arm in lines))
        for place, (title, lines) in enumerate(measures.items(), 1):
            axes = figure.add_subplot(1, len(measures), place)
            axes.set_title(title)
            axes.set_xlabel(setting)
            for arm, points in lines.items():
                x, y, spread = zip(*points, strict=True)
                look = style[arm]
                axes.errorbar(
                    x, y, spread, label=arm, color=look.colour, linestyle=look.dashes, marker=look.marker, markersize=4
                )
                if min(x) > 0:
                    axes.set_xscale("log", base=2)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), fontsize=8)
        return svg(figure)
