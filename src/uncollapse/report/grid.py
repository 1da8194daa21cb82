"""The tables of a grid of runs, as Markdown and CSV: what each arm measures, how it differs from the controls."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from statistics import fmean

from uncollapse.measure.catalogue import (
    ALIVE,
    EFFECTIVE,
    KNN,
    LINEAR,
    STEP_TIME,
    UNIQUE,
    USED,
    VIEW_INFORMATION,
    Measure,
    number,
)
from uncollapse.report.arms import BASELINE, CONTROL, Grouping, group, rival
from uncollapse.report.comparing import Difference, difference, stat
from uncollapse.run_folder.read import RunRecord

SHOWN = (VIEW_INFORMATION, KNN, LINEAR, *UNIQUE.values(), USED, ALIVE, *EFFECTIVE.values(), STEP_TIME)
COMPARED = (VIEW_INFORMATION, KNN, LINEAR)

Rows = list[dict[str, str]]


def table(runs: Sequence[RunRecord]) -> tuple[Rows, Rows]:
    """What every arm measures (mean ± deviation over seeds), and its paired differences from joint and from fixed.

    A difference is ± its standard error over images and seeds; one beyond 1.96 of them has a ``*``.
    """
    grouping = group(runs)
    values = [_values(arm, grouping) for arm in grouping.arms]
    differences = [
        row for arm in grouping.arms for mode in (BASELINE, CONTROL) if (row := _against(arm, mode, grouping))
    ]
    return values, differences


def _values(arm: str, grouping: Grouping) -> dict[str, str]:
    runs = grouping.arms[arm]
    row = {"arm": arm, "seeds": str(len(runs))}
    for measure in SHOWN:
        average = stat(measure, runs)
        spread = "" if average is None or average.sd is None else f" ± {measure.text(average.sd)}"
        row[_heading(measure)] = "–" if average is None else measure.text(average.mean) + spread
    minutes = [s * n / 60 for run in runs if (s := _number(run, "seconds_per_step")) and (n := _number(run, "steps"))]
    row["minutes a run"] = f"{fmean(minutes):.1f}" if minutes else "–"
    return row


def _number(run: RunRecord, name: str) -> float | None:
    return number(run.summary.get(name))


def _against(arm: str, mode: str, grouping: Grouping) -> dict[str, str]:
    other = rival(arm, grouping, mode)
    if other is None:
        return {}
    gaps = {m: difference(m, grouping.arms[arm], grouping.arms[other]) for m in COMPARED}
    if not any(gaps.values()):  # of further sets of prototypes, which describe
        return {}
    return {"arm": arm, "minus": other} | {_heading(m): _text(m, gap) for m, gap in gaps.items()}


def _text(measure: Measure, gap: Difference | None) -> str:
    if gap is None:
        return "–"
    sign = "+" if gap.mean > 0 else "−" if gap.mean < 0 else ""
    error = "" if gap.error is None else f" ± {measure.text(gap.error)}"
    return f"{sign}{measure.text(abs(gap.mean))}{error}{'*' if gap.sign else ''}"


def _heading(measure: Measure) -> str:
    return f"{measure.label}, {measure.unit}" if measure.unit and measure.unit not in measure.label else measure.label


def markdown(values: Rows, differences: Rows) -> str:
    """Both tables as GitHub shows them."""
    parts = ["Mean ± standard deviation over seeds.", "", *_lines(values)]
    if differences:
        parts += [
            "",
            "Differences over the same held-out images, ± standard error; * beyond 1.96 of it.",
        ]
        parts += ["", *_lines(differences)]
    return "\n".join(parts) + "\n"


def _lines(rows: Rows) -> list[str]:
    names = list(rows[0])
    body = [[f"`{value}`" if name in ("arm", "minus") else value for name, value in row.items()] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (names, ["---"] * len(names), *body)]


def to_csv(values: Rows) -> str:
    """The first table; numbers as they are shown."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(values[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(values)
    return text.getvalue()
