"""The report's section on ``evaluation.json``: one table per data set, arms and controls below one another."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from uncollapse import figures
from uncollapse.runs import Arms, Row, RunRecord

FIXED = ("ci95", "ci95_of", "n", "protocol", "source", "command", "details")
"""Entries of a task that are not metrics."""
COUNTS = re.compile(r"(^n_|_clusters$|^count|_count$|^prototypes$|_prototypes$|^classes$|_classes$)")
"""Names of metrics that are counts, whatever their value."""
PLAIN = re.compile(r"((prototypes|distinct)_per_class|_bits|_nats|_ratio)$")
"""Names of metrics that are no shares, even where they lie between 0 and 1."""


def number(name: str, value: float | None) -> str:
    """A metric as text: shares in per cent, counts whole, the rest to four digits; a dash for what is missing."""
    if value is None or not math.isfinite(value):
        return "–"
    if COUNTS.search(name) or (float(value).is_integer() and abs(value) > 1):
        return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"
    return f"{100 * value:.1f} %" if -1 <= value <= 1 and not PLAIN.search(name) else f"{value:.4g}"


def interval(ci95: Any) -> str:
    """``40.0–60.0`` for shares, plain numbers else; empty for an interval that could not be had."""
    low, high = ci95 if isinstance(ci95, list | tuple) and len(ci95) == 2 else (None, None)
    if low is None or high is None or not math.isfinite(low) or not math.isfinite(high):
        return ""
    shares = -1 <= low <= high <= 1
    ends = [f"{100 * end:.1f}" if shares else f"{end:.4g}" for end in (low, high)]
    return (" to " if low < 0 else "–").join(ends)


def metrics_of(task: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in task.items() if name not in FIXED}


def evaluations(arms: Arms) -> list[Row]:
    """For each data set that any run was evaluated on, what the template shows; empty without evaluations."""
    runs = [run for found in arms.values() for run in found]
    keys = dict.fromkeys(key for run in runs for key in run.evaluation)
    return [_one(key, [run for run in runs if key in run.evaluation], len(runs) > len(arms)) for key in keys]


def _one(key: str, runs: list[RunRecord], seeds: bool) -> Row:
    rows: list[Row] = []
    notes: dict[str, None] = {}
    for run in runs:
        for label, encoder in run.evaluation[key].get("encoders", {}).items():
            notes |= dict.fromkeys(encoder.get("notes", []))
            for task, content in encoder.get("tasks", {}).items():
                rows.append(_row(run, label, task, content, seeds))
    # Tasks in the order of the first run that has them, so that encoders stand below one another.
    order = {task: i for i, task in enumerate(dict.fromkeys(row["task"] for row in rows))}
    rows.sort(key=lambda row: order[row["task"]])
    first = runs[0].evaluation[key]
    counts = {name: f"{first[name]:,}" if isinstance(first.get(name), int) else "?" for name in ("n_train", "n_test")}
    return {
        "data": key,
        **counts,
        "classes": first.get("classes"),
        "rows": rows,
        "pictures": _pictures(runs, key),
        "notes": [n.rstrip(".") for n in notes],
    }


OWNERS = (
    "prototypes that each class owns (it is the commonest class of the training images assigned to them), against the "
    "training images of the class"
)


class _Owned:
    """The counts of a ``prototypes`` result, as `draw_owners` asks for them."""

    def __init__(self, classes: Row) -> None:
        self.class_train = np.asarray(classes["train_images"])
        self.prototypes, self.distinct = np.asarray(classes["prototypes"]), np.asarray(classes["distinct"])

    def owned(self) -> Any:
        return self.prototypes

    def owned_distinct(self) -> Any:
        return self.distinct


def _pictures(runs: list[RunRecord], key: str) -> list[Row]:
    """What tasks drew, and which class owns how many prototypes where the task ``prototypes`` was done."""
    found: list[Row] = []
    for run in runs:
        for label, encoder in run.evaluation[key].get("encoders", {}).items():
            name = run.name if label == "teacher" else f"{run.name}, {label}"
            classes = encoder.get("tasks", {}).get("prototypes", {}).get("details", {}).get("classes")
            if classes and any(classes.get("train_images", ())):
                from uncollapse.evaluate.owners import draw_owners

                counts: Any = _Owned(classes)
                src, alt = draw_owners(counts)
                found.append({"src": src, "alt": alt, "caption": f"{name}: {OWNERS}"})
            drawn = [p for pictures in encoder.get("pictures", {}).values() for p in pictures if "src" in p]
            found += [{"src": p["src"], "alt": p["alt"], "caption": f"{name}: {p['caption']}"} for p in drawn]
    return found


def _row(run: RunRecord, label: str, task: str, content: Row, seeds: bool) -> Row:
    values = metrics_of(content)
    (metric, value), *others = values.items() if values else [("", None)]
    arm = f"{run.name}, seed {run.seed}" if seeds else run.name
    return {
        "task": task,
        "encoder": arm if label == "teacher" else f"{arm}, {label}",
        "colour": figures.style(run.name)[0],
        "metric": metric,
        "value": number(metric, value),
        "interval": interval(content.get("ci95")),
        "others": [
            (n, number(n, v), interval((content.get("ci95_of") or {}).get(n)))
            for n, v in others
            if isinstance(v, int | float) or v is None
        ],
        "n": f"{content['n']:,}" if isinstance(content.get("n"), int) else "",
        "protocol": content.get("protocol", ""),
        "source": content.get("source", ""),
        "command": content.get("command", ""),
    }
