"""The report's figures: plain arrays in, one self-contained image (a ``data:`` address) out.

Every function takes a mapping from arm to its data, so one run and a comparison of several arms look the
same. Nothing here touches pyplot or any other global state except matplotlib's settings, inside a context.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray
from PIL import Image

from uncollapse.figures.style import INK, MAX_POINTS, RC, Array, Curve, Style, legend, panel, styles, svg

_PART_COLOURS = ["#77AADD", "#99DDFF", "#EE8866", "#44BB99", "#BBCC33", "#EEDD88", "#FFAABB", "#AAAA88"]


def line_panel(
    curves: Mapping[str, Sequence[Curve]],
    title: str,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float | None] | None = None,
    reference: tuple[float, str] | None = None,
    marker: bool = False,
    look: Mapping[str, Style] | None = None,
) -> str:
    """One line per arm (mean over seeds) with a band (range over seeds); ``reference`` is a level to mark."""
    look = look or styles(curves)
    with mpl.rc_context(RC):
        figure, axes = panel(title)
        for arm, runs in curves.items():
            colour, dashes, dot = look[arm]
            x, lowest, middle, highest = _over_seeds(runs)
            dot = dot if marker else ""
            axes.plot(x, middle, linestyle=dashes, color=colour, label=arm, marker=dot, markersize=2.6)
            if len(runs) > 1:
                axes.fill_between(x, lowest, highest, color=colour, alpha=0.16, linewidth=0)
        if reference is not None:
            axes.axhline(reference[0], color=INK, linewidth=0.8, dashes=(1, 3))
            axes.annotate(
                reference[1],
                (1, reference[0]),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                xytext=(0, 1.5),
                textcoords="offset points",
                fontsize=7.5,
            )
        axes.set(xlabel=x_label, ylabel=y_label)
        if y_range is not None:
            low, high = y_range[0], axes.get_ylim()[1] if y_range[1] is None else y_range[1]
            pad = 0.03 * (high - low)
            axes.set_ylim(low - pad, high + pad)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        legend(figure, axes)
        return svg(figure)


def usage_spectrum(
    counts: Mapping[str, Sequence[Array]], labels: Mapping[str, str], look: Mapping[str, Style] | None = None
) -> str:
    """Held-out images per used prototype, from the busiest to the least busy; one thin line per seed."""
    look = look or styles(counts)
    with mpl.rc_context(RC):
        figure, axes = panel("Usage spectrum", width=6.6)
        lines = sum(1 + labels.get(arm, arm).count("\n") for arm in counts)
        figure.set_figheight(max(figure.get_figheight(), 0.17 * lines + 0.5))  # the legend stands beside the panel
        for arm, runs in counts.items():
            colour, dashes, dot = look[arm]
            for seed, usage in enumerate(runs):
                kept = np.sort(usage[usage > 0])[::-1]
                rank = np.unique(np.geomspace(1, max(len(kept), 1), MAX_POINTS).astype(int))[: len(kept)]
                label, width = None if seed else labels.get(arm, arm), 1.7 if len(runs) == 1 else 1.1
                line = axes.plot(rank, kept[rank - 1], linestyle=dashes, color=colour, label=label, linewidth=width)
                line[0].set(marker=dot, markersize=2, markevery=[-1])
        axes.set(xscale="log", yscale="log", xlabel="rank of the prototype", ylabel="held-out images")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=2.2, borderaxespad=0.2)
        return svg(figure)


def circle_density(points: Array, bins: int = 720, kappa: float = 150.0) -> NDArray[np.float64]:
    """Von Mises density of the points' angles on ``bins`` equal arcs, relative to uniform (mean 1).

    Binning first makes it a circular convolution: linear in the number of points, however many there are.
    """
    angle = np.arctan2(points[:, 1], points[:, 0])
    counts = np.bincount(np.floor((angle + np.pi) / (2 * np.pi) * bins).astype(int) % bins, minlength=bins)
    kernel = np.exp(kappa * (np.cos(2 * np.pi * np.arange(bins) / bins) - 1))
    density = np.fft.irfft(np.fft.rfft(counts) * np.fft.rfft(kernel), bins)
    return np.clip(density / density.mean(), 0, None)


def circle(arm: str, points: Array, used: NDArray[np.bool_] | None, top: float, colour: str = "") -> str:
    """Ring plot: height above the ring is the density of prototypes; dots inside are the used ones.

    ``top`` is the density (relative to uniform) that reaches the rim, shared by all arms of a report.
    """
    with mpl.rc_context(RC):
        colour = colour or styles([arm])[arm].colour
        figure = Figure(figsize=(2.7, 2.95), layout="constrained")
        axes = figure.add_subplot()
        axes.set_axis_off()
        axes.set(aspect="equal", xlim=(-2.06, 2.06), ylim=(-2.06, 2.06))
        axes.set_title(arm, loc="center", color=colour)
        around = np.linspace(-np.pi, np.pi, 721)
        density = circle_density(points)
        # bin i holds the angles from i to i + 1, so its middle lies half a bin further
        turn = np.append(density, density[0])
        around_density = around + np.pi / 720
        radius = 1 + np.minimum(np.sqrt(turn / top), 1)
        edge = np.stack([np.cos(around_density) * radius, np.sin(around_density) * radius])
        ring = np.stack([np.cos(around), np.sin(around)])
        axes.fill(
            np.append(edge[0], ring[0][::-1]), np.append(edge[1], ring[1][::-1]), color=colour, alpha=0.55, linewidth=0
        )
        axes.plot(*edge, color=colour, linewidth=0.8)
        axes.plot(*ring, color=INK, linewidth=0.8)
        axes.plot(*(ring * (1 + np.sqrt(1 / top))), color=INK, linewidth=0.7, dashes=(2, 3))
        if used is not None and used.any():
            chosen = points[used]
            chosen = chosen[:: -(-len(chosen) // MAX_POINTS)]
            axes.plot(
                chosen[:, 0] * 0.9, chosen[:, 1] * 0.9, "o", color=colour, markersize=2.8, alpha=0.6, markeredgewidth=0
            )
            axes.text(0, 0, f"{int(used.sum()):,}\nused", ha="center", va="center", fontsize=9)
        return svg(figure)


def step_parts(parts: Mapping[str, Mapping[str, float]], look: Mapping[str, Style] | None = None) -> str:
    """Stacked bars: milliseconds of each part of one training step, one bar per arm."""
    look = look or styles(parts)
    with mpl.rc_context(RC):
        figure = Figure(figsize=(9.6, 0.9 + 0.38 * len(parts)), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y", visible=False)
        arms, names = list(parts), list(dict.fromkeys(name for arm in parts.values() for name in arm))
        left = np.zeros(len(arms))
        for index, name in enumerate(names):
            width = np.array([1e3 * parts[arm].get(name, 0.0) for arm in arms])
            axes.barh(
                arms,
                width,
                left=left,
                color=_PART_COLOURS[index % len(_PART_COLOURS)],
                label=name,
                height=0.66,
                edgecolor="white",
                linewidth=0.6,
            )
            left += width
        for row, total in enumerate(left):
            axes.annotate(f"{total:.3g} ms", (total, row), xytext=(4, 0), textcoords="offset points", va="center")
        axes.invert_yaxis()
        axes.set(xlabel="milliseconds per step", xlim=(0, 1.1 * max(left.max(), 1e-9)))
        axes.tick_params(axis="y", length=0)
        for label in axes.get_yticklabels():
            label.set_color(look[label.get_text()].colour if label.get_text() in look else INK)
            label.set_fontweight("bold")
        figure.legend(loc="outside upper center", ncols=8, handlelength=1, columnspacing=1.2, fontsize=8)
        return svg(figure)


def image_strip(images: NDArray[np.uint8], largest: int = 64, smallest: int = 40, gap: int = 3) -> str:
    """A row of images (m, H, W, 3) as one PNG; small ones are enlarged without smoothing."""
    tiles = []
    for image in images:
        tile = Image.fromarray(np.ascontiguousarray(image))
        scale = min(1.0, largest / max(tile.size))
        if scale < 1:
            method = Image.Resampling.LANCZOS
        else:
            scale, method = max(1, -(-smallest // max(tile.size))), Image.Resampling.NEAREST
        tile = tile.resize((max(1, round(tile.width * scale)), max(1, round(tile.height * scale))), method)
        tiles.append(tile)
    strip = Image.new("RGB", (sum(t.width + gap for t in tiles) - gap, max(t.height for t in tiles)), "white")
    left = 0
    for tile in tiles:
        strip.paste(tile, (left, 0))
        left += tile.width + gap
    buffer = io.BytesIO()
    strip.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _over_seeds(runs: Sequence[Curve]) -> tuple[Array, Array, Array, Array]:
    """x, lowest, mean and highest over the runs, each read at the first run's x within the common range."""
    x = np.asarray(runs[0][0])
    start, end = max(r[0][0] for r in runs), min(r[0][-1] for r in runs)
    x = x[(x >= start) & (x <= end)]
    values = np.stack([np.interp(x, *run) for run in runs])
    return x, values.min(0), values.mean(0), values.max(0)
