"""What a setting does to each arm: one panel a measure, one line an arm, over the values of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from uncollapse.figures.style import RC, legend, styles, svg

COLUMNS = 2
Lines = Mapping[str, Sequence[tuple[float, float, float]]]
"""Arm → (value of the setting, mean, standard deviation over seeds), the values ascending."""


def sweep_panels(measures: Mapping[str, Lines], setting: str) -> str:
    """An SVG with a panel for each measure, over a logarithmic axis of the setting, which is above 0.

    Args:
        measures: title of the panel → what it shows.
        setting: what is swept, as the axis calls it.
    """
    import matplotlib as mpl

    with mpl.rc_context(RC):
        arms = list(dict.fromkeys(arm for lines in measures.values() for arm in lines))
        rows = -(-len(measures) // COLUMNS)
        figure = Figure(figsize=(3.6 * COLUMNS, 2.6 * rows + 0.5), layout="constrained")
        style = styles(arms)
        for place, (title, lines) in enumerate(measures.items(), 1):
            axes = figure.add_subplot(rows, COLUMNS, place)
            axes.set_title(title)
            axes.set_xlabel(setting)
            for arm, points in lines.items():
                x, y, spread = zip(*points, strict=True)
                look = style[arm]
                axes.errorbar(
                    x, y, spread, label=arm, color=look.colour, linestyle=look.dashes, marker=look.marker, markersize=4
                )
            values = sorted({x for points in lines.values() for x, _, _ in points})
            axes.set_xscale("log")
            axes.set_xticks(values, [f"{value:,g}" for value in values])
            axes.set_xticks([], minor=True)
        legend(figure, figure.axes[0])
        return svg(figure)
