"""The report's section on ``evaluation.json``: one table per data set, arms and controls below one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from uncollapse.figures.style import Style
from uncollapse.measure.catalogue import Row, number
from uncollapse.report.arms import Grouping
from uncollapse.report.numbers import interval, metric_text
from uncollapse.report.tails import LEGEND, LOOKED_AT, tail_picture, tails
from uncollapse.report.words import meaning
from uncollapse.run_folder.evaluation import evaluation_key
from uncollapse.run_folder.read import RunRecord

FIXED = ("ci95", "ci95_of", "n", "protocol", "source", "command", "details")
"""Entries of a task that are not metrics."""


def metrics_of(task: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in task.items() if name not in FIXED}


def evaluations(grouping: Grouping, look: Mapping[str, Style]) -> list[Row]:
    """For each data set that any run was evaluated on, what the template shows; empty without evaluations."""
    arms = grouping.arms
    named = [(arm, run) for arm, runs in arms.items() for run in runs]
    keys = dict.fromkeys(key for _, run in named for key in run.evaluation)
    several = {arm: len(runs) > 1 for arm, runs in arms.items()}
    sections = []
    for key in keys:
        found = tails(grouping, key)
        runs = [(arm, run) for arm, run in named if key in run.evaluation]
        section = _one(key, runs, several, look, frozenset() if found is None else found.shown)
        tables = {"tails": found, "tails_legend": LEGEND, "by_class": tail_picture(arms, key, look)}
        sections.append(section | tables)
    return sections


def probed_by_evaluate(run: RunRecord) -> Row:
    """kNN and linear accuracy that `uncollapse evaluate` found on the run's own held-out images, for its summary.

    One page then has one number for each. Empty where it was not evaluated on those, or the run went on since.
    """
    paths = [run.config.get(name) for name in ("data.path", "data.val_path")]
    own = evaluation_key(",".join(str(p) for p in paths if p), number(run.config.get("data.long_tail")) or 1.0)
    evaluation = run.evaluation.get(own, {})
    encoders = evaluation.get("encoders", {})
    encoder: Row = next((encoders[label] for label in LOOKED_AT if label in encoders), {})
    summary = run.summary
    if evaluation.get("n_test") != summary.get("n_held_out") or encoder.get("step") != summary.get("steps"):
        return {}
    out: Row = {}
    for task, name in (("knn", "top1"), ("linear", "top1")):
        content = encoder.get("tasks", {}).get(task, {})
        if number(content.get(name)) is not None and content.get("n") == summary.get("n_held_out"):
            out |= {task: content[name], f"{task}_ci95": content.get("ci95")}
    if "linear" in out:
        content = encoder["tasks"]["linear"]
        out["linear_balanced"] = content.get("macro")
        out["linear_balanced_ci95"] = (content.get("ci95_of") or {}).get("macro")
    return out


def _one(
    key: str,
    runs: list[tuple[str, RunRecord]],
    several: Mapping[str, bool],
    look: Mapping[str, Style],
    elsewhere: frozenset[str],
) -> Row:
    """What the template shows of one data set, but for metrics that another table of it has."""
    rows: list[Row] = []
    notes: dict[str, None] = {}
    for arm, run in runs:
        for label, encoder in run.evaluation[key].get("encoders", {}).items():
            notes |= dict.fromkeys(encoder.get("notes", []))
            for task, content in encoder.get("tasks", {}).items():
                name = f"{arm}, seed {run.seed}" if several[arm] else arm
                rows.append(_row(name, look[arm].colour, label, task, content, elsewhere))
    # Tasks in the order of the first run that has them, so that encoders stand below one another.
    order = {task: i for i, task in enumerate(dict.fromkeys(row["task"] for row in rows))}
    rows.sort(key=lambda row: order[row["task"]])
    first = runs[0][1].evaluation[key]
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
    "prototypes that each class owns (it is the commonest class of the training images assigned to them), and distinct "
    "ones that equally many test images of each class use, against the training images of the class"
)


def _owned(classes: Any) -> Any:
    """The counts of a ``prototypes`` result as `draw_owners` asks for them; None where they are not such counts."""
    names = ("train_images", "prototypes", "distinct")
    lists = [classes.get(name) for name in names] if isinstance(classes, dict) else [None]
    arrays = []
    for numbers in lists:
        if not isinstance(numbers, list) or not all(isinstance(n, int) and 0 <= n < 2**53 for n in numbers):
            return None
        arrays.append(np.array(numbers, dtype=np.int64))
    alike = len({len(numbers) for numbers in arrays}) == 1
    return tuple(arrays) if alike and arrays[0].any() else None


def _used(classes: Any, n: int) -> np.ndarray | None:
    """The (C,) prototypes in use of a ``prototypes`` result; None of one that has none."""
    values = classes.get("used")
    if not isinstance(values, list) or len(values) != n:
        return None
    return np.array([np.nan if (v := number(value)) is None else v for value in values])


def _pictures(runs: list[tuple[str, RunRecord]], key: str) -> list[Row]:
    """What tasks drew, and which class owns how many prototypes where the task ``prototypes`` was done."""
    pictures_of: list[Row] = []
    for arm, run in runs:
        for label, encoder in run.evaluation[key].get("encoders", {}).items():
            name = arm if label in LOOKED_AT else f"{arm}, {label}"
            classes = encoder.get("tasks", {}).get("prototypes", {}).get("details", {}).get("classes")
            if (counts := _owned(classes)) is not None:
                from uncollapse.figures.owners import draw_owners

                src, alt = draw_owners(counts[0], counts[1], counts[2], _used(classes, len(counts[0])))
                pictures_of.append({"src": src, "alt": alt, "caption": f"{name}: {OWNERS}"})
            drawn = [p for pictures in encoder.get("pictures", {}).values() for p in pictures if "src" in p]
            pictures_of += [{"src": p["src"], "alt": p["alt"], "caption": f"{name}: {p['caption']}"} for p in drawn]
    return pictures_of


def _row(arm: str, colour: str, label: str, task: str, content: Row, elsewhere: frozenset[str]) -> Row:
    values = metrics_of(content)
    (metric, value), *others = values.items() if values else [("", None)]
    return {
        "task": task,
        "encoder": arm if label in LOOKED_AT else f"{arm}, {label}",
        "colour": colour,
        "metric": metric,
        "meaning": meaning(metric),
        "value": metric_text(metric, value),
        "interval": interval(content.get("ci95")),
        "others": [
            (n, metric_text(n, v), interval((content.get("ci95_of") or {}).get(n)), meaning(n))
            for n, v in others
            if (isinstance(v, int | float) or v is None) and n not in elsewhere
        ],
        "n": f"{content['n']:,}" if isinstance(content.get("n"), int) else "",
        "protocol": content.get("protocol", ""),
        "source": content.get("source", ""),
        "command": content.get("command", ""),
    }
