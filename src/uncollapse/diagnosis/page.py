"""Diagnoses in, one self-contained HTML page out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import LogNorm
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from uncollapse.diagnosis.result import Diagnosis
from uncollapse.diagnosis.text import columns, facts, names_of, rows_of
from uncollapse.figures import panels as figures
from uncollapse.figures.style import MAX_POINTS, RC, Curve, Panels, panel, svg
from uncollapse.figures.template import template
from uncollapse.measure.catalogue import MEASURES, Measure
from uncollapse.run_folder.files import write_atomically
from uncollapse.shown import shown

HEAT, MAP = 240, 4000
"""Most prototypes in the heat-map and on the map: more cannot be seen."""
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def write_page(diagnoses: Sequence[Diagnosis], path: Path) -> None:
    """Writes one HTML file about one or several prototype sets; it needs nothing else and no network."""
    names = names_of(diagnoses)
    page = template("diagnosis.html.j2").render(
        title="Are these prototypes collapsed?",
        columns=[name for name, _ in columns(diagnoses[0].epsilon)] if diagnoses else [],
        sets=[
            _set(d, name, _COLOURS[i % len(_COLOURS)]) for i, (d, name) in enumerate(zip(diagnoses, names, strict=True))
        ],
        words=_words(diagnoses),
        over=_over(diagnoses),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode())


def _set(d: Diagnosis, name: str, colour: str) -> dict[str, Any]:
    return {
        "name": name,
        "file": shown(d.source.file),
        "colour": colour,
        "cells": [read(d) for _, read in columns(d.epsilon)],
        "where": f"{shown(d.source.file)}: {shown(d.source.key) or 'the tensor itself'} · {d.prototypes:,} × {d.dim}, "
        + d.dtype
        + (f" · {d.source.family}" if d.source.family else ""),
        "label": d.verdict.label,
        "tone": d.verdict.tone,
        "sentence": d.verdict.sentence,
        "advice": d.verdict.advice,
        "rule": d.verdict.rule,
        "notes": list(map(shown, d.notes)),
        "facts": facts(d),
        "epsilons": [f"{e:g}" for e in d.unique],
        "rows": rows_of(d),
        "headline": f"{d.epsilon:g}",
        "has_images": d.images is not None,
        "sweep": _sweep(d),
        "circle": _circle(d),
        "heat": _heat(d),
        "heat_rows": min(HEAT, d.prototypes),
        "spectrum": _spectrum(d),
        "map": _map(d),
        "shared": _shared(d),
    }


def _words(diagnoses: Sequence[Diagnosis]) -> list[Measure]:
    """The measures that any of the sets has; those at one ε once, as the page explains ε."""
    rows = [d.to_json() for d in diagnoses]
    return [m for m in MEASURES if "ε" not in m.name and any(m.read(row) is not None for row in rows)]


def _over(diagnoses: Sequence[Diagnosis]) -> Panels:
    """Share of unique prototypes against the file's place in the list, a line for each set that several files have."""
    place = {file: i + 1 for i, file in enumerate(dict.fromkeys(d.source.file for d in diagnoses))}
    sets: dict[tuple[str, int], list[Diagnosis]] = {}
    for i, d in enumerate(diagnoses):
        # Of several matrices of one kind in a file, the n-th goes with the n-th of the other files.
        nth = sum(d.source.file == e.source.file and str(d.source) == str(e.source) for e in diagnoses[:i])
        sets.setdefault((str(d.source), nth), []).append(d)
    curves: dict[str, list[Curve]] = {}
    for (kind, nth), points in sets.items():
        if len(points) > 1:
            x = np.array([place[d.source.file] for d in points], dtype=float)
            name = f"{kind} {nth + 1}" if (kind, 1) in sets else kind
            curves[name] = [(x, np.array([100 * d.share for d in points]))]
    if not curves:
        return []
    image = figures.line_panel(
        curves,
        f"Unique at ε = {diagnoses[0].epsilon:g}",
        "file, in the order given",
        "unique prototypes (%)",
        (0, 100),
        marker=True,
    )
    ends = "; ".join(f"{kind} {c[0][1][0]:.1f} % to {c[0][1][-1]:.1f} %" for kind, c in curves.items())
    return [(image, f"Unique prototypes from the first file to the last: {ends}.")]


def _sweep(d: Diagnosis) -> Panels:
    if d.sweep is None:
        return []
    names = {"unique": "greedy cover", "components": "components", "no_neighbour": "no neighbour"}
    curves: dict[str, list[Curve]] = {}
    for name, label in names.items():
        points = getattr(d.sweep, name)
        curves[label] = [(np.array(list(points)), 100 * np.array(list(points.values())) / d.prototypes)]
    image = figures.line_panel(curves, "Against ε", "ε (cosine distance)", "share of K (%)", (0, 100))
    ends = "; ".join(f"{label} {c[0][1][-1]:.1f} %" for label, c in curves.items())
    return [(image, f"Three counts against ε; at ε = {list(d.sweep.unique)[-1]:g}: {ends}.")]


def _unit(d: Diagnosis, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """At most so many evenly spread unit rows, and how many prototypes share the direction of each."""
    assert d.vectors is not None
    assert d.group_of is not None
    chosen = torch.linspace(0, len(d.vectors) - 1, min(most, len(d.vectors))).long()
    rows = d.vectors[chosen.to(d.vectors.device)].double().cpu()
    group = d.group_of.cpu()
    rows = rows / rows.abs().amax(1, keepdim=True)
    return F.normalize(rows, dim=1), torch.bincount(group)[group][chosen]


def _circle(d: Diagnosis) -> Panels:
    if d.vectors is None or d.dim < 2:
        return []
    plane = torch.linalg.qr(torch.randn(d.dim, 2, generator=torch.Generator().manual_seed(0)))[0].double()
    unit, _ = _unit(d, len(d.vectors))
    points = F.normalize(unit @ plane, dim=1).numpy()
    used = None if d.images is None else d.images.usage > 0
    peak = float(figures.circle_density(points).max())
    image = figures.circle(str(d.source), points, used, max(4.0, peak))
    return [(image, f"Prototypes on a circle; the densest angle has {peak:.1f} × the uniform density.")]


def _heat(d: Diagnosis) -> Panels:
    if d.vectors is None or len(d.vectors) < 3:
        return []
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    unit, _ = _unit(d, HEAT)
    cos = (unit @ unit.T).clamp(-1, 1).numpy()
    distance = 1 - (cos + cos.T) / 2
    np.fill_diagonal(distance, 0)
    order = leaves_list(linkage(squareform(distance, checks=False), "average"))
    with mpl.rc_context(RC):
        figure, axes = panel("Cosine between prototypes")
        axes.grid(visible=False)
        shown = axes.imshow(cos[np.ix_(order, order)], vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        figure.colorbar(shown, ax=axes, shrink=0.8)
        image = svg(figure)
    high = float((cos[np.triu_indices(len(cos), 1)] > 1 - d.epsilon).mean())
    return [(image, f"Heat-map of cosines; {100 * high:.1f} % of the pairs shown lie within ε = {d.epsilon:g}.")]


def _spectrum(d: Diagnosis) -> Panels:
    sizes: NDArray[Any] = d.groups
    if not len(sizes):
        return []
    rank = np.unique(np.geomspace(1, len(sizes), MAX_POINTS).astype(int))
    with mpl.rc_context(RC):
        figure, axes = panel("Group sizes")
        axes.plot(rank, sizes[rank - 1], color="#0072B2", marker="o", markersize=2, markevery=[-1])
        axes.set(xscale="log", yscale="log", xlabel="rank of the group", ylabel="prototypes in it")
        axes.set_ylim(0.8, max(2.0, 1.3 * float(sizes[0])))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        image = svg(figure)
    return [(image, f"{len(sizes):,} groups; the largest has {int(sizes[0]):,} prototypes.")]


def _map(d: Diagnosis) -> Panels:
    if d.vectors is None or d.dim < 2 or len(d.vectors) < 3:
        return []
    unit, size = _unit(d, MAP)
    values, axes_of = torch.linalg.eigh(torch.cov(unit.T))
    points = ((unit - unit.mean(0)) @ axes_of.flip(1)[:, :2]).numpy()
    held = float(values.flip(0)[:2].sum() / values.sum().clamp_min(1e-300))
    with mpl.rc_context(RC):
        figure, axes = panel("First two principal axes")
        top = max(2.0, float(size.max()))
        shown = axes.scatter(
            points[:, 0],
            points[:, 1],
            c=size.numpy(),
            s=5,
            cmap="viridis",
            norm=LogNorm(1, top),
            linewidths=0,
            rasterized=True,
        )
        axes.set_aspect("equal", "datalim")
        bar = figure.colorbar(shown, ax=axes, shrink=0.8, label="prototypes on this direction")
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        bar.ax.minorticks_off()
        image = svg(figure)
    return [(image, f"Map of the prototypes; the two axes hold {100 * held:.0f} % of the variance.")]


def _shared(d: Diagnosis) -> list[dict[str, Any]]:
    if d.images is None:
        return []
    from uncollapse.diagnosis.images import PICTURED

    out = []
    for g in d.images.shared[:PICTURED]:
        title = f"{g.prototypes} prototypes, {g.images} images; overlap {100 * g.overlap:.0f} %"
        pictures = [] if g.pictures is None else list(g.pictures)
        strips = [(str(i), figures.image_strip(row)) for i, row in zip(g.members, pictures, strict=False)]
        out.append({"title": title, "strips": strips})
    return out
