"""Run folders in, one self-contained HTML page out: verdict, table, figures, definitions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uncollapse.errors import ConfigError
from uncollapse.figures import panels as figures
from uncollapse.figures.style import Curve, Panels, Style, smooth
from uncollapse.figures.template import template
from uncollapse.measure.catalogue import EFFECTIVE, UNIQUE, Measure, Row, at_epsilon, entry, measured, number, percent
from uncollapse.measure.unique import EPSILONS
from uncollapse.report.arms import CONTROL, arm_name, group, without_control
from uncollapse.report.comparing import stat
from uncollapse.report.evaluation import evaluations, probed_by_evaluate
from uncollapse.report.sweep import sweeps
from uncollapse.report.verdict import takeaways, verdict
from uncollapse.run_folder.files import write_atomically
from uncollapse.run_folder.read import Arms, RunRecord, common, read_run
from uncollapse.shown import shown


def report_folders(folders: Sequence[Path], path: Path) -> list[str]:
    """Writes the page about run folders that can be read; returns a line for each that cannot, and what they lack.

    Raises:
        ConfigError: none of them can be read.
    """
    runs, refused = [], []
    for folder in folders:
        run = read_run(folder)
        if run.summary:
            runs.append(run)
        elif run.problems:
            refused.append(f"{shown(folder)} is left out: {run.problems[0]}")
        else:
            refused.append(f"{shown(folder)} is left out: no summary.json, so it is not a finished run folder")
    if not runs:
        raise ConfigError("; ".join(refused))
    write_report(runs, path, "", refused)
    return [*refused, *(problem for run in runs for problem in run.problems)]


def _title(runs: Sequence[RunRecord]) -> str:
    if len(runs) != 1:
        return "Comparison"
    return f"{arm_name(runs[0].method, runs[0].name, True)} on {runs[0].summary.get('data', 'images')}"


def write_report(runs: list[RunRecord], path: Path, title: str = "", notes: Sequence[str] = ()) -> None:
    """Writes one HTML file about one run, or about several arms and seeds side by side; they give it a title too."""
    replaced = False
    if len(runs) == 1 and (probes := probed_by_evaluate(runs[0])):
        runs, replaced = [dataclasses.replace(runs[0], summary=runs[0].summary | probes)], True
    grouping = group(runs)
    arms = grouping.arms
    look = figures.styles(arms)
    rows = [run.summary for members in arms.values() for run in members]
    measures = measured(rows)
    page = template("report.html.j2").render(
        title=title or _title(runs),
        notes=[*grouping.notes, *notes, *(problem for run in runs for problem in run.problems)],
        setting=_setting(runs),
        takeaways=takeaways(grouping),
        verdicts=[verdict(arm, grouping) for arm in arms],
        colours={arm: style.colour for arm, style in look.items()},
        measures=measures,
        columns=[{"arm": arm, "seeds": len(members)} for arm, members in arms.items()],
        table=[(measure, [_cell(measure, members) for members in arms.values()]) for measure in measures],
        untrained=_untrained(arms),
        held_out=common(runs, "n_held_out"),
        fitted_on=_fitted_on(rows),
        many_seeds=any(len(members) > 1 for members in arms.values()),
        figures=_figures(arms, look),
        sweeps=sweeps(runs),
        diagnosis_share=_diagnosis_share(arms),
        evaluations=evaluations(grouping, look),
        probes_replaced=replaced,
        examples=[_examples(arm, members, look[arm].colour) for arm, members in arms.items() if not members[0].set],
        has_control=any(members[0].name == CONTROL for members in arms.values()),
        has_sets=any(members[0].set for members in arms.values()),
        uncontrolled=without_control(arms),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode("utf-8", errors="replace"))


# ------------------------------------------------------------------------------------- table and figures


def _cell(measure: Measure, runs: Sequence[RunRecord]) -> list[str]:
    """The mean with its standard error or its spread over seeds, and small print below it."""
    if (s := stat(measure, runs)) is None:
        return ["–"]
    if measure.error is not None and not measure.interval:
        return [measure.text(s.mean) + ("" if s.error is None else f" ± {measure.text(s.error)}")]
    spread = [] if s.sd is None else [f"± {measure.text(s.sd)}"]
    interval = [f"{measure.text(s.interval[0])}–{measure.text(s.interval[1])}"] if s.interval else []
    return [measure.text(s.mean), *spread, *interval]


def _fitted_on(rows: Sequence[Row]) -> str:
    texts = [r["view_information"].get("fitted_on") for r in rows if isinstance(r.get("view_information"), dict)]
    return " / ".join(dict.fromkeys(text for text in texts if text))


def _figures(arms: Arms, look: Mapping[str, Style]) -> dict[str, Panels]:
    """The panels of every figure; a figure that nothing was recorded for has none."""
    step, share = "training step", "unique prototypes (%)"

    def panels(*drawn: tuple[str, str] | None) -> Panels:
        return [panel for panel in drawn if panel is not None]

    def lines(
        read: Callable[[RunRecord], Curve], title: str, x_label: str, y_label: str, **options: Any
    ) -> tuple[str, str] | None:
        return _lines(arms, look, read, title, x_label, y_label, **options)

    return {
        "training": panels(
            lines(lambda run: _sweep(run, 0.025), "Unique at ε = 0.025", step, share, y_range=(0, 100), marker=True),
            lines(lambda run: _sweep(run, 0.25), "Unique at ε = 0.25", step, share, y_range=(0, 100), marker=True),
            lines(lambda run: _logged(run, "alive"), "Alive", step, "alive prototypes", y_range=(0, None)),
        ),
        "epsilon": panels(
            lines(_epsilons, "Unique against ε", "ε (cosine distance)", share, y_range=(0, 100)),
            lines(
                _effective_curve,
                "Effective against ε",
                "ε (cosine distance)",
                "N_eff(ε)",
                y_range=(0, None),
                marker=True,
            ),
        ),
        "circle": _circles(arms, look),
        "usage": _usage(arms, look),
        "loss": panels(
            lines(lambda run: _logged(run, "loss"), "Loss", step, "loss (nats)", ln_k=True),
            lines(
                lambda run: _logged(run, "teacher_entropy"),
                "Teacher entropy",
                step,
                "entropy of the targets (nats)",
                ln_k=True,
            ),
        ),
        "cost": _cost(arms, look),
    }


def _lines(
    arms: Arms,
    look: Mapping[str, Style],
    read: Callable[[RunRecord], Curve],
    title: str,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float | None] | None = None,
    marker: bool = False,
    ln_k: bool = False,
) -> tuple[str, str] | None:
    """A panel of one curve per run, with the last values as alternative text; None without any curve."""
    curves = {arm: [c for run in runs if len((c := read(run))[0])] for arm, runs in arms.items()}
    curves = {arm: drawn for arm, drawn in curves.items() if drawn}
    if not curves:
        return None
    totals = {k for runs in arms.values() for run in runs if (k := number(run.summary.get("prototypes")))}
    reference = (math.log(totals.pop()), "ln K") if ln_k and len(totals) == 1 else None
    ends = "; ".join(f"{arm} {np.mean([y[-1] for _, y in drawn]):.3g}" for arm, drawn in curves.items())
    image = figures.line_panel(curves, title, x_label, y_label, y_range, reference, marker, look)
    return image, f"{title}: {y_label} against {x_label}. At the right end: {ends}."


def _curve(points: dict[float, float]) -> Curve:
    x = sorted(points)
    return np.array(x, dtype=float), np.array([points[at] for at in x], dtype=float)


def _logged(run: RunRecord, name: str) -> Curve:
    # a resumed run logs some steps twice: the later row is the one that training went on from
    points = {
        row["step"]: v for row in run.metrics if row.get("kind") == "step" and (v := number(row.get(name))) is not None
    }
    return smooth(*_curve(points))


def _sweep(run: RunRecord, eps: float) -> Curve:
    total = number(run.summary.get("prototypes"))
    points = {
        row["step"]: v
        for row in run.metrics
        if row.get("kind") == "sweep" and (v := percent(at_epsilon(row.get("unique"), eps), total)) is not None
    }
    return _curve(points)


def _epsilons(run: RunRecord) -> Curve:
    total = number(run.summary.get("prototypes"))
    if not total or "sweep_eps" not in run.arrays or "sweep_unique" not in run.arrays:
        return _curve({})
    return run.arrays["sweep_eps"], 100 * run.arrays["sweep_unique"] / total


def _effective_curve(run: RunRecord) -> Curve:
    effective = run.summary.get("effective") or {}
    return _curve({eps: n for eps in EPSILONS if (n := at_epsilon(effective, eps)) is not None})


def _circles(arms: Arms, look: Mapping[str, Style]) -> Panels:
    having = {arm: [run for run in runs if len(run.arrays.get("circle", ()))] for arm, runs in arms.items()}
    first = {arm: runs[0] for arm, runs in having.items() if runs}
    points = {arm: run.arrays["circle"] for arm, run in first.items()}
    top = max([4.0, *(float(figures.circle_density(p).max()) for p in points.values())])
    panels = []
    for arm, run in first.items():
        usage = run.arrays.get("usage")
        image = figures.circle(arm, points[arm], None if usage is None else usage > 0, top, look[arm].colour)
        peak = figures.circle_density(points[arm]).max()
        alt = f"{arm}: prototypes on a circle; the densest angle has {peak:.1f} × the uniform density."
        panels.append((image, alt))
    return panels


def _usage(arms: Arms, look: Mapping[str, Style]) -> Panels:
    by_arm = {arm: [r.arrays["usage"] for r in runs if "usage" in r.arrays] for arm, runs in arms.items()}
    counts = {arm: per_run for arm, per_run in by_arm.items() if per_run}
    if not counts:
        return []
    labels = {}
    for arm in counts:
        used = np.mean([(usage > 0).sum() for usage in counts[arm]])
        effective = [f"{m.name} {s.mean:.1f}" for m in EFFECTIVE.values() if (s := stat(m, arms[arm]))]
        labels[arm] = "\n".join([f"{arm}: {used:,.0f} used", *effective])
    alt = "Held-out images per prototype by rank. " + "; ".join(labels.values()).replace("\n", ", ")
    return [(figures.usage_spectrum(counts, labels, look), alt)]


def _cost(arms: Arms, look: Mapping[str, Style]) -> Panels:
    parts: dict[str, dict[str, float]] = {}
    for arm, runs in arms.items():
        measured = [seconds for run in runs if (seconds := run.summary.get("step_parts"))]
        if measured:
            names = dict.fromkeys(name for seconds in measured for name in seconds)
            parts[arm] = {name: float(np.mean([seconds.get(name) or 0.0 for seconds in measured])) for name in names}
    if not parts:
        return []
    alt = "; ".join(
        f"{arm}: " + ", ".join(f"{part} {1e3 * s:.3g} ms" for part, s in seconds.items())
        for arm, seconds in parts.items()
    )
    return [(figures.step_parts(parts, look), alt)]


def _diagnosis_share(arms: Arms) -> str:
    share = Measure("", "", entry("diagnosis_share", 100))
    shares = {arm: s.mean for arm, runs in arms.items() if (s := stat(share, runs)) is not None}
    return ", ".join(f"{arm} {percent:.1f} %" for arm, percent in shares.items())


def _examples(arm: str, runs: Sequence[RunRecord], colour: str) -> Row:
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
    return {
        "arm": arm,
        "colour": colour,
        "none": f"No duplicate group: {none}.",
        "duplicate": groups[0],
        "unique": groups[1],
    }


def _untrained(arms: Arms) -> list[str]:
    """kNN of each arm's encoder at its random start; empty where no run has it."""
    averages = [stat(Measure("", "", entry("knn_untrained", 100)), runs) for runs in arms.values()]
    return ["–" if s is None else f"{s.mean:.1f}" for s in averages] if any(averages) else []


def _setting(runs: Sequence[RunRecord]) -> str:
    words = (
        ("data", "data: {}"),
        ("n_train", "{} training images"),
        ("prototypes", "K = {} prototypes"),
        ("dim", "{} dimensions"),
        ("steps", "{} steps"),
        ("device", "on {}"),
    )
    methods = " / ".join(dict.fromkeys(run.method for run in runs))
    parts = [f"method: {methods}"] if methods else []
    parts += [form.format(value) for name, form in words if (value := common(runs, name))]
    seeds = sorted({run.seed for run in runs})
    last = "no runs" if not seeds else f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"
    return " · ".join([*parts, last])
