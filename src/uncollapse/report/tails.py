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
from uncollapse.report.arms import BASELINE, Grouping, rival
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
    factor: float
    of_classes: str = ""
    """Where the values of the classes stand in the details; empty: nowhere."""
    title: str = ""
    """Of their panel."""


_ACCURACY = ".1f", 100.0
_COUNT = ".1f", 1.0
_RATIO = ".2f", 1.0
MEASURES = (
    Measured("kNN, %", "longtail", "knn_{}", *_ACCURACY, "by_class.knn", "kNN accuracy (%)"),
    Measured("linear, %", "longtail", "linear_{}", *_ACCURACY, "by_class.linear", "Linear accuracy (%)"),
    Measured("used", "prototypes", "{}_used_per_class", *_COUNT, "classes.used", "Used"),
    Measured("used, ε .25", "prototypes", "{}_used_wide_per_class", *_COUNT, "classes.used_wide", "Used at ε = 0.25"),
    Measured("own", "prototypes", "{}_own_per_class", *_COUNT, "classes.own", "Its own"),
    Measured("own / mean", "prototypes", "{}_own_ratio", *_RATIO),
    Measured("owned", "prototypes", "{}_distinct_per_class", *_COUNT, "classes.distinct", "Owned, training images"),
    Measured("owned / images", "prototypes", "{}_share_ratio", *_RATIO),
    Measured("the same, random", "prototypes", "{}_share_ratio_random", *_RATIO),
)
LEGEND = (
    "distinct prototypes of a class, mean over the group's classes: used, on which equally many test images of each "
    "class are, and the same where those within ε = .25 count as one; own, on which most of these images are of the "
    "class; by the mean of own over all classes, 1 by chance; owned, on which most training images are of the class; "
    "the group's share of these by its share of the training images, and the same with labels at random. Classes "
    "differ in more than their images: compare modes, not groups"
)
Lines = list[tuple[str, list[str]]]
"""A label, and a cell for each column."""


@dataclasses.dataclass(frozen=True)
class Tails:
    """The tables of one data set."""

    groups: str
    """Which groups of classes there are, in words."""
    columns: list[str]
    """Arms, each with its untrained encoder behind it where that was evaluated."""
    lines: Lines
    gaps: list[str]
    """Arms that have a joint one to stand against, and its seeds."""
    gap_lines: Lines
    """How much more each of them has than that, seed by seed: mean and its standard error over seeds."""
    shown: frozenset[str]
    """Metrics that the tables hold."""


Tasks = dict[str, dict[int, Row]]
"""Arm → seed → the tasks of its evaluation."""


def _tasks(arms: Arms, key: str) -> Tasks:
    """Of each arm's runs on a data set; those of the untrained encoder behind the arm."""
    columns: Tasks = {}
    for arm, runs in arms.items():
        for run in runs:
            for label, encoder in run.evaluation.get(key, {}).get("encoders", {}).items():
                name = arm if label in LOOKED_AT else f"{arm}, {label}"
                columns.setdefault(name, {})[run.seed] = encoder.get("tasks", {})
    both = {measure.task for measure in MEASURES}
    return {name: of_seed for name, of_seed in columns.items() if any(both & t.keys() for t in of_seed.values())}


def tails(grouping: Grouping, key: str) -> Tails | None:
    """What groups of classes have, over seeds; None where there is but one group."""
    tasks = _tasks(grouping.arms, key)
    joint = {arm: rival(arm, grouping, BASELINE) for arm in tasks if arm in grouping.arms}
    against = {arm: other for arm, other in joint.items() if other in tasks and tasks[arm].keys() & tasks[other].keys()}
    for names in (THIRDS, SPLITS):
        metrics = [(m, name, m.metric.format(name)) for m in MEASURES for name in names]
        there = [(m, name, metric) for m, name, metric in metrics if any(_of(m, metric, t) for t in tasks.values())]
        if len({name for _, name, _ in there}) > 1:
            lines = [
                (f"{m.label}, {name}", [_mean(m, list(_of(m, metric, t).values())) for t in tasks.values()])
                for m, name, metric in there
            ]
            gap_lines = [
                (
                    f"{m.label}, {name}",
                    [_gap(m, _of(m, metric, tasks[a]), _of(m, metric, tasks[b])) for a, b in against.items()],
                )
                for m, name, metric in there
            ]
            shown = frozenset(metric for _, _, metric in there)
            return Tails(_in_words({n for _, n, _ in there}), list(tasks), lines, list(against), gap_lines, shown)
    return None


def _of(measure: Measured, metric: str, of_seed: dict[int, Row]) -> dict[int, float]:
    """The numbers of an arm by seed; empty where no run has any."""
    values = {seed: number(tasks.get(measure.task, {}).get(metric)) for seed, tasks in of_seed.items()}
    return {seed: measure.factor * v for seed, v in values.items() if v is not None}


def _mean(measure: Measured, values: list[float]) -> str:
    if not values:
        return "–"
    spread = f"±{np.std(values, ddof=1):{measure.form}}" if len(values) > 1 else ""
    return f"{np.mean(values):{measure.form}}{spread}"


def _gap(measure: Measured, ours: dict[int, float], theirs: dict[int, float]) -> str:
    differences = [value - theirs[seed] for seed, value in ours.items() if seed in theirs]
    if not differences:
        return "–"
    error = np.std(differences, ddof=1) / len(differences) ** 0.5 if len(differences) > 1 else None
    return f"{np.mean(differences):+{measure.form}}" + ("" if error is None else f"±{error:{measure.form}}")


def _in_words(names: set[str]) -> str:
    if THIRDS[0] in names:
        return "head, body, tail: thirds of the classes, those with the most training images first"
    there = ", ".join(name for name in SPLITS if name in names)
    return f"{there}: classes by training images, many above 100, few below 20, medium between"


# --- class by class -----------------------------------------------------------------------------------------


def tail_picture(arms: Arms, key: str, look: Mapping[str, Style]) -> Row | None:
    """Every class of every arm, most training images first; None where no run has numbers of classes."""
    tasks_of = {arm: of_seed for arm, of_seed in _tasks(arms, key).items() if arm in look}
    train: Ints | None = None
    measures: dict[str, ByClass] = {}
    for measure in (m for m in MEASURES if m.of_classes):
        place, name = measure.of_classes.split(".")
        lines: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for arm, of_seed in tasks_of.items():
            values = []
            for tasks in of_seed.values():
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
