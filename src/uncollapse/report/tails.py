"""Frequent classes against rare ones, arm by arm: the table that a page and a terminal show, and the page's picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from uncollapse.figures.classes import ByClass, by_frequency, class_panels
from uncollapse.figures.style import Style
from uncollapse.measure.catalogue import Row, number
from uncollapse.measure.shots import SPLITS, THIRDS, Ints
from uncollapse.run_folder.read import Arms

LOOKED_AT = ("teacher", "model")
"""The network that a run's own numbers are of: the teacher, or the only one."""


class Measured(NamedTuple):
    """A number that each group of classes has, and each class where ``details`` are kept."""

    label: str
    task: str
    metric: str
    """With the group's name for ``{}``."""
    form: str
    factor: float = 1.0
    of_classes: str = ""
    """Where the values of the classes stand in the details; empty: nowhere."""
    title: str = ""
    """Of their panel."""


MEASURES = (
    Measured("kNN, %", "longtail", "knn_{}", ".1f", 100, "by_class.knn", "kNN accuracy (%)"),
    Measured("linear, %", "longtail", "linear_{}", ".1f", 100, "by_class.linear", "Linear accuracy (%)"),
    Measured("used", "prototypes", "{}_used_per_class", ".1f", 1, "classes.used", "Prototypes used"),
    Measured("own", "prototypes", "{}_own_per_class", ".1f", 1, "classes.own", "Prototypes of its own"),
    Measured("own, by chance 1", "prototypes", "{}_own_ratio", ".2f"),
    Measured("owned by share", "prototypes", "{}_share_ratio", ".2f"),
    Measured("the same, random", "prototypes", "{}_share_ratio_random", ".2f"),
)
LEGEND = (
    "used: distinct prototypes on which equally many test images of each class are, mean over the group's classes; "
    "own: those on which most of these images are of the class, below it by the mean over all classes; owned by share: "
    "share of the distinct prototypes whose commonest class of training images is in the group, by the group's share "
    "of these images, and the same with labels at random"
)


@dataclasses.dataclass(frozen=True)
class Tails:
    """One data set's table: a column for each arm."""

    columns: list[str]
    groups: str
    """Which groups of classes there are, in words."""
    lines: list[tuple[str, list[str]]]
    """Label, and a cell for each column."""


def _encoders(arms: Arms, key: str) -> dict[str, list[Row]]:
    """The tasks of each arm's runs on a data set; those of the untrained encoder behind the arm."""
    columns: dict[str, list[Row]] = {}
    for arm, runs in arms.items():
        for run in runs:
            for label, encoder in run.evaluation.get(key, {}).get("encoders", {}).items():
                name = arm if label in LOOKED_AT else f"{arm}, {label}"
                columns.setdefault(name, []).append(encoder.get("tasks", {}))
    return {name: tasks for name, tasks in columns.items() if any("longtail" in t or "prototypes" in t for t in tasks)}


def tails(arms: Arms, key: str) -> Tails | None:
    """Mean and standard deviation over seeds of what groups of classes have; None where there is but one group."""
    columns = _encoders(arms, key)
    for names in (THIRDS, SPLITS):
        lines, there = [], []
        for measure in MEASURES:
            for group in names:
                values = [
                    _numbers([tasks.get(measure.task, {}).get(measure.metric.format(group)) for tasks in of_arm])
                    for of_arm in columns.values()
                ]
                if any(values):
                    lines.append((f"{measure.label}, {group}", [_cell(measure, one) for one in values]))
                    there.append(group)
        if len(set(there)) > 1:
            return Tails(list(columns), _in_words([g for g in names if g in there]), lines)
    return None


def _numbers(values: list[Any]) -> list[float]:
    return [v for value in values if (v := number(value)) is not None]


def _cell(measure: Measured, values: list[float]) -> str:
    if not values:
        return "–"
    mean = format(measure.factor * float(np.mean(values)), measure.form)
    spread = f"±{format(measure.factor * float(np.std(values, ddof=1)), measure.form)}" if len(values) > 1 else ""
    return mean + spread


def _in_words(names: list[str]) -> str:
    if names[0] in THIRDS:
        return "head, body, tail: thirds of the classes, those with the most training images first"
    return f"{', '.join(names)}: classes by training images, many above 100, few below 20"


# --- class by class -----------------------------------------------------------------------------------------


def tail_picture(arms: Arms, key: str, look: Mapping[str, Style]) -> Row | None:
    """Every class of every arm, most training images first; None where no run has numbers of classes."""
    tasks_of = {arm: tasks for arm, tasks in _encoders(arms, key).items() if arm in look}
    train: Ints | None = None
    measures: dict[str, ByClass] = {}
    for measure in (m for m in MEASURES if m.of_classes):
        place, name = measure.of_classes.split(".")
        lines: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for arm, of_arm in tasks_of.items():
            values = []
            for tasks in of_arm:
                found = _by_class(tasks.get(measure.task, {}).get("details", {}).get(place), name)
                if found is None:
                    continue
                train = found[0] if train is None else train
                values += [measure.factor * found[1]] if len(found[1]) == len(train) else []
            if values:
                lines[arm] = _over_seeds(np.array(values))
        if lines:
            measures[measure.title] = lines
    if train is None or not measures:
        return None
    order = by_frequency(train)
    words = "; ".join(
        f"{title}: "
        + ", ".join(f"{arm} {' '.join(f'{v:.3g}' for v in mean[order][:30])}" for arm, (mean, _) in lines.items())
        for title, lines in measures.items()
    )
    alt = f"Classes from most to fewest training images ({' '.join(str(n) for n in train[order][:30])}). {words}."
    return {"src": class_panels(measures, train, look), "alt": alt}


def _by_class(classes: Any, name: str) -> tuple[Ints, np.ndarray] | None:
    """(C,) training images and (C,) values in a result's details; None where they are not such lists."""
    counts, values = (classes.get(key) if isinstance(classes, dict) else None for key in ("train_images", name))
    if not isinstance(counts, list) or not isinstance(values, list) or len(counts) != len(values):
        return None
    if not all(isinstance(n, int) and 0 <= n < 2**53 for n in counts) or not any(counts):
        return None
    floats = [number(value) for value in values]
    return np.array(counts, dtype=np.int64), np.array([np.nan if v is None else v for v in floats])


def _over_seeds(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of (seeds, C) over the seeds that have a number; NaN where too few have."""
    n = (~np.isnan(values)).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.nansum(values, 0) / n
        mean = np.where(n > 0, mean, np.nan)
        sd = np.sqrt(np.nansum((values - mean) ** 2, 0) / (n - 1))
    return mean, np.where(n > 1, sd, np.nan)
