"""Run folders in, one self-contained HTML page out: verdict, table, figures, definitions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2
import numpy as np

from uncollapse import figures
from uncollapse.evaluation_section import evaluations
from uncollapse.figures import Curve
from uncollapse.runs import Arms, Row, RunRecord, at_epsilon, common, entry, group_runs, number, percent
from uncollapse.unique import EPSILONS
from uncollapse.verdict import CONTROL, EFFECTIVE, MEASURES, UNIQUE, Measure, stat, takeaways, verdict


def write_report(runs: list[RunRecord], path: Path, title: str, notes: list[str]) -> None:
    """Write one HTML file about one run, or about several arms and seeds side by side."""
    arms = group_runs(runs)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("uncollapse"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["tight"] = _tight
    page = environment.get_template("report.html.j2").render(
        title=title,
        notes=notes,
        setting=_setting(runs),
        takeaways=takeaways(arms),
        verdicts=[verdict(arm, arms) for arm in arms],
        measures=MEASURES,
        table=[_table_row(arm, rows) for arm, rows in arms.items()],
        untrained=_untrained(runs),
        held_out=common(runs, "n_held_out"),
        many_seeds=any(len(rows) > 1 for rows in arms.values()),
        figures=_figures(arms),
        diagnosis_share=_diagnosis_share(arms),
        evaluations=evaluations(arms),
        examples=[_examples(arm, rows) for arm, rows in arms.items()],
        has_control=CONTROL in arms,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


# ------------------------------------------------------------------------------------- table and figures


Panels = list[tuple[str, str]]
"""Images of one figure: address and alternative text."""


def _table_row(arm: str, runs: Sequence[RunRecord]) -> Row:
    cells: list[list[str]] = []
    for measure in MEASURES:
        if (s := stat(measure, runs)) is None:
            cells.append(["–"])
            continue
        spread = [] if s.sd is None else [f"± {measure.text(s.sd)}"]
        interval = [f"{measure.text(s.interval[0])}–{measure.text(s.interval[1])}"] if s.interval else []
        cells.append([measure.text(s.mean), *spread, *interval])
    return {"arm": arm, "colour": figures.style(arm)[0], "seeds": len(runs), "cells": cells}


def _figures(arms: Arms) -> dict[str, Panels]:
    """The panels of every figure; a figure that nothing was recorded for has none."""
    step, share = "training step", "unique prototypes (%)"

    def panels(*given: tuple[str, str] | None) -> Panels:
        return [panel for panel in given if panel is not None]

    return {
        "training": panels(
            _lines(arms, lambda run: _sweep(run, 0.025), "Unique at ε = 0.025", step, share, (0, 100), True),
            _lines(arms, lambda run: _sweep(run, 0.25), "Unique at ε = 0.25", step, share, (0, 100), True),
            _lines(arms, lambda run: _logged(run, "alive"), "Alive", step, "alive prototypes", (0, None)),
        ),
        "epsilon": panels(
            _lines(arms, _epsilons, "Unique against ε", "ε (cosine distance)", share, (0, 100)),
            _lines(arms, _effective_curve, "Effective against ε", "ε (cosine distance)", "N_eff(ε)",
                   (0, None), True),
        ),
        "circle": _circles(arms),
        "usage": _usage(arms),
        "loss": panels(
            _lines(arms, lambda run: _logged(run, "loss"), "Loss", step, "loss (nats)", ln_k=True),
            _lines(arms, lambda run: _logged(run, "teacher_entropy"), "Teacher entropy", step,
                   "entropy of the targets (nats)", ln_k=True),
        ),
        "cost": _cost(arms),
    }  # fmt: skip


def _lines(
    arms: Arms, read: Callable[[RunRecord], Curve], title: str, x_label: str, y_label: str,
    y_range: tuple[float, float | None] | None = None, marker: bool = False, ln_k: bool = False,
) -> tuple[str, str] | None:  # fmt: skip
    """A panel of one curve per run, with the last values as alternative text; None without any curve."""
    curves = {arm: [c for run in runs if len((c := read(run))[0])] for arm, runs in arms.items()}
    curves = {arm: found for arm, found in curves.items() if found}
    if not curves:
        return None
    totals = {k for runs in arms.values() for run in runs if (k := number(run.summary.get("prototypes")))}
    reference = (math.log(totals.pop()), "ln K") if ln_k and len(totals) == 1 else None
    ends = "; ".join(f"{arm} {np.mean([y[-1] for _, y in found]):.3g}" for arm, found in curves.items())
    image = figures.line_panel(curves, title, x_label, y_label, y_range, reference, marker)
    return image, f"{title}: {y_label} against {x_label}. At the right end: {ends}."


def _curve(points: dict[float, float]) -> Curve:
    x = sorted(points)
    return np.array(x, dtype=float), np.array([points[at] for at in x], dtype=float)


def _logged(run: RunRecord, name: str) -> Curve:
    # a resumed run logs some steps twice: the later row is the one that training went on from
    points = {row["step"]: v for row in run.metrics
              if row.get("kind") == "step" and (v := number(row.get(name))) is not None}  # fmt: skip
    return figures.smooth(*_curve(points))


def _sweep(run: RunRecord, eps: float) -> Curve:
    total = number(run.summary.get("prototypes"))
    points = {row["step"]: v for row in run.metrics if row.get("kind") == "sweep"
              and (v := percent(at_epsilon(row.get("unique"), eps), total)) is not None}  # fmt: skip
    return _curve(points)


def _epsilons(run: RunRecord) -> Curve:
    total = number(run.summary.get("prototypes"))
    if not total or "sweep_eps" not in run.arrays or "sweep_unique" not in run.arrays:
        return _curve({})
    return run.arrays["sweep_eps"], 100 * run.arrays["sweep_unique"] / total


def _effective_curve(run: RunRecord) -> Curve:
    given = run.summary.get("effective") or {}
    return _curve({eps: n for eps in EPSILONS if (n := at_epsilon(given, eps)) is not None})


def _circles(arms: Arms) -> Panels:
    given = {arm: [run for run in runs if len(run.arrays.get("circle", ()))] for arm, runs in arms.items()}
    first = {arm: runs[0] for arm, runs in given.items() if runs}
    points = {arm: run.arrays["circle"] for arm, run in first.items()}
    top = max([4.0, *(float(figures.circle_density(p).max()) for p in points.values())])
    panels = []
    for arm, run in first.items():
        usage = run.arrays.get("usage")
        image = figures.circle(arm, points[arm], None if usage is None else usage > 0, top)
        peak = figures.circle_density(points[arm]).max()
        alt = f"{arm}: prototypes on a circle; the densest angle has {peak:.1f} × the uniform density."
        panels.append((image, alt))
    return panels


def _usage(arms: Arms) -> Panels:
    given = {arm: [r.arrays["usage"] for r in runs if "usage" in r.arrays] for arm, runs in arms.items()}
    counts = {arm: found for arm, found in given.items() if found}
    if not counts:
        return []
    labels = {}
    for arm in counts:
        used = np.mean([(usage > 0).sum() for usage in counts[arm]])
        effective = [f"{m.name} {s.mean:.1f}" for m in EFFECTIVE.values() if (s := stat(m, arms[arm]))]
        labels[arm] = "\n".join([f"{arm}: {used:,.0f} used", *effective])
    alt = "Held-out images per prototype by rank. " + "; ".join(labels.values()).replace("\n", ", ")
    return [(figures.usage_spectrum(counts, labels), alt)]


def _cost(arms: Arms) -> Panels:
    parts: dict[str, dict[str, float]] = {}
    for arm, runs in arms.items():
        given = [found for run in runs if (found := run.summary.get("step_parts"))]
        if given:
            names = dict.fromkeys(name for found in given for name in found)
            parts[arm] = {name: float(np.mean([found.get(name) or 0.0 for found in given])) for name in names}
    if not parts:
        return []
    alt = "; ".join(f"{arm}: " + ", ".join(f"{part} {1e3 * s:.3g} ms" for part, s in found.items())
                    for arm, found in parts.items())  # fmt: skip
    return [(figures.step_parts(parts), alt)]


def _diagnosis_share(arms: Arms) -> str:
    share = Measure("", "", entry("diagnosis_share", 100))
    found = {arm: s.mean for arm, runs in arms.items() if (s := stat(share, runs)) is not None}
    return ", ".join(f"{arm} {percent:.1f} %" for arm, percent in found.items())


def _examples(arm: str, runs: Sequence[RunRecord]) -> Row:
    """Strips of nearest images: one duplicate group, and used prototypes that are unique."""
    run = next((run for run in runs if {"duplicate_images", "unique_images"} & set(run.arrays)), runs[0])
    groups = []
    for kind in ("duplicate", "unique"):
        images = run.arrays.get(f"{kind}_images")
        ids = run.arrays.get(f"{kind}_ids", ())
        strips = []
        if images is not None and images.size:
            labels = [str(i) for i in ids[:6]] or [str(i) for i in range(len(images[:6]))]
            pairs = zip(labels, images, strict=False)
            strips = [(label, figures.image_strip(row[:8])) for label, row in pairs]
        groups.append(strips)
    all_distinct = UNIQUE[0.025].read(run.summary) == 100
    none = "no two prototypes lie within ε = 0.025 of each other" if all_distinct else "none was recorded"
    return {"arm": arm, "colour": figures.style(arm)[0], "none": f"No duplicate group: {none}.",
            "duplicate": groups[0], "unique": groups[1]}  # fmt: skip


def _untrained(runs: Sequence[RunRecord]) -> str:
    found = stat(Measure("", "", entry("knn_untrained", 100)), runs)
    return "" if found is None else f"{found.mean:.1f}"


def _tight(text: str) -> str:
    """Keep a sign and its number on one line."""
    for sign in ("ε = ", " ± ", " %", "K = ", " × ", " ms", " bits"):
        text = text.replace(sign, sign.replace(" ", "\N{NO-BREAK SPACE}"))
    return text


def _setting(runs: Sequence[RunRecord]) -> str:
    words = (("data", "data: {}"), ("n_train", "{} training images"), ("prototypes", "K = {} prototypes"),
             ("dim", "{} dimensions"), ("steps", "{} steps"), ("device", "on {}"))  # fmt: skip
    parts = [form.format(value) for name, form in words if (value := common(runs, name))]
    seeds = sorted({run.seed for run in runs})
    last = "no runs" if not seeds else f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"
    return " · ".join([*parts, last])
