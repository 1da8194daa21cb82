"""The measures: one list for the table in the terminal, the report and `diagnose`, with the figure of merit first.

Each is read from a row: a run's ``summary.json``, or what `Diagnosis.to_json` gives, which use the same names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from uncollapse.measure.unique import EPSILONS

Row = dict[str, Any]
Read = Callable[[Row], float | None]


# ------------------------------------------------------------------------------------------ reading a row


def number(value: Any) -> float | None:
    """A finite number as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def at_epsilon(counts: Any, eps: float) -> float | None:
    """The value at ``eps`` of a mapping whose keys are ε as text, as JSON has them."""
    for key, value in (counts or {}).items():
        try:
            same = math.isclose(float(key), eps)
        except ValueError:
            continue
        if same:
            return number(value)
    return None


def percent(part: float | None, whole: float | None) -> float | None:
    """``part`` in per cent of ``whole``; None where either is missing or ``whole`` is zero."""
    return 100 * part / whole if part is not None and whole else None


def entry(name: str, factor: float = 1.0) -> Read:
    """A function that reads the number ``name`` of a row, times ``factor``."""

    def read(row: Row) -> float | None:
        value = number(row.get(name))
        return None if value is None else factor * value

    return read


def _inside(name: str, key: str) -> Read:
    return lambda row: number(entries.get(key)) if isinstance(entries := row.get(name), dict) else None


def _half_width(name: str) -> Read:
    """The standard error in per cent behind a 95 % interval of shares."""

    def read(row: Row) -> float | None:
        ends = row.get(name)
        low, high = (number(e) for e in ends) if isinstance(ends, list | tuple) and len(ends) == 2 else (None, None)
        return None if low is None or high is None else 100 * (high - low) / 2 / 1.96

    return read


# ------------------------------------------------------------------------------------------- the measures


@dataclass(frozen=True)
class Measure:
    """One line of every table: how to read it from a row, print it and compare it."""

    name: str
    definition: str
    read: Read
    digits: int = 0
    unit: str = ""
    error: Read | None = None
    """Standard error of one run, over its held-out images. Only measures that have one are called better or worse."""
    per_image: str = ""
    """The array of ``diagnosis.npz`` with a value per held-out image, for paired comparisons."""
    interval: str = ""
    """The entry with the 95 % interval."""

    @property
    def label(self) -> str:
        return f"{self.name}, {self.unit}" if self.unit else self.name

    def text(self, value: float) -> str:
        return f"{value:,.{self.digits}f}"


def _eps(eps: float) -> str:
    return f"{eps:g}".removeprefix("0")


def unique(eps: float) -> Measure:
    return Measure(
        f"unique ε {_eps(eps)}",
        "Share of the K prototypes, as the logits use them, that the greedy ε-cover keeps: no kept prototype lies "
        f"closer than cosine distance {eps:g} to another one kept before it. Random vectors are all unique.",
        lambda row: percent(at_epsilon(row.get("unique"), eps), number(row.get("prototypes"))),
        1,
        "%",
    )


def unique_means(eps: float) -> Measure:
    return Measure(
        f"means unique ε {_eps(eps)}",
        f"The papers' literal count at ε = {eps:g}: of a mixture's means themselves, where the logits use their "
        "directions from the middle of all means; of the prototypes where there is no mixture.",
        lambda row: percent(at_epsilon(row.get("unique_means"), eps), number(row.get("prototypes"))),
        1,
        "%",
    )


def effective(eps: float) -> Measure:
    return Measure(
        f"N_eff ε {_eps(eps)}",
        "Effective prototypes: exp of the entropy of the used counts after every prototype is merged into "
        f"its nearest kept one at ε = {eps:g}.",
        lambda row: at_epsilon(row.get("effective"), eps),
        1,
    )


VIEW_INFORMATION = Measure(
    "view information",
    "Figure of merit: bits that the prototype of one augmented view of a held-out image tells about the prototype of "
    "another view of it. A lower bound, fitted on other images; ± its standard error over images and seeds.",
    _inside("view_information", "bits"),
    2,
    "bits",
    _inside("view_information", "standard_error"),
    "view_information_of_image",
)
OLD_VIEW_INFORMATION = Measure(
    "view information, old estimator",
    "What runs of before recorded: a plug-in estimate with a bias that differs between arms. It cannot be compared, "
    "not with the figure of merit and not between arms.",
    entry("view_information"),
    2,
    "bits",
)
KNN = Measure(
    "kNN",
    "Figure of merit: accuracy of a k-nearest-neighbour classifier on the frozen features.",
    entry("knn", 100),
    1,
    "%",
    _half_width("knn_ci95"),
    "knn_correct",
    "knn_ci95",
)
KNN_BALANCED = Measure(
    "kNN, balanced",
    "Mean over classes of the kNN accuracy on each: rare classes count as much as frequent ones.",
    entry("knn_balanced", 100),
    1,
    "%",
    _half_width("knn_balanced_ci95"),
    "knn_balanced_of_image",
    "knn_balanced_ci95",
)
LINEAR = Measure(
    "linear",
    "Accuracy of a linear classifier on the frozen features.",
    entry("linear", 100),
    1,
    "%",
    _half_width("linear_ci95"),
    "linear_correct",
    "linear_ci95",
)
LINEAR_BALANCED = Measure(
    "linear, balanced",
    "Mean over classes of the linear accuracy on each.",
    entry("linear_balanced", 100),
    1,
    "%",
    _half_width("linear_balanced_ci95"),
    "linear_balanced_of_image",
    "linear_balanced_ci95",
)
USED = Measure(
    "used",
    "Prototypes that are the hard argmax of the raw cosine (uncentred, unbalanced) for at least one of the "
    "held-out images; prototypes of patches, of their patches.",
    entry("used"),
)
USED_BY_LOGITS = Measure(
    "used by logits",
    "The same by the layer's own logits, with its lengths and bias, where those are not the cosine.",
    entry("used_by_logits"),
)
USED_BY_TARGET = Measure(
    "used by target",
    "Prototypes that lead the arm's own training target (posterior, centred softmax or Sinkhorn's) on at least one "
    "held-out image.",
    entry("used_by_target"),
)
TARGET_AGREEMENT = Measure(
    "target agreement",
    "Share of the held-out images on which the training target leads with the prototype that the raw cosine picks.",
    entry("target_agreement", 100),
    1,
    "%",
)
ALIVE = Measure(
    "alive",
    "Prototypes that were a hard argmax within the last steps of training (diagnose: of a view of the training images "
    "given); the others are dead, and dead ones count as unique. Those of memory change every step and have none.",
    entry("alive"),
)
AMONG_USED = Measure(
    "unique among used",
    "Share of the used prototypes that the ε-cover keeps at ε = 0.025.",
    lambda row: percent(at_epsilon(row.get("unique_used"), EPSILONS[0]), number(row.get("used"))),
    1,
    "%",
)
MOVEMENT = Measure(
    "movement",
    "Mean cosine distance of the prototypes from where they started; where nothing moved, nothing was learned.",
    entry("movement"),
    2,
)
STEP_TIME = Measure("step time", "Mean wall time of a training step.", entry("seconds_per_step", 1e3), 1, "ms")
UNIQUE = {eps: unique(eps) for eps in EPSILONS}
UNIQUE_MEANS = {eps: unique_means(eps) for eps in EPSILONS}
EFFECTIVE = {eps: effective(eps) for eps in (0.025, 0.25)}

MERIT = (VIEW_INFORMATION, KNN, KNN_BALANCED, LINEAR, LINEAR_BALANCED)
"""They decide between arms; the others describe."""
MEASURES = (
    *MERIT,
    OLD_VIEW_INFORMATION,
    *UNIQUE.values(),
    *UNIQUE_MEANS.values(),
    AMONG_USED,
    USED,
    USED_BY_LOGITS,
    USED_BY_TARGET,
    TARGET_AGREEMENT,
    ALIVE,
    *EFFECTIVE.values(),
    MOVEMENT,
    STEP_TIME,
)


def measured(rows: list[Row]) -> list[Measure]:
    """The measures that at least one of the rows has, in order."""
    return [m for m in MEASURES if any(m.read(row) is not None for row in rows)]


def information_text(value: Any) -> str:
    """``4.66 ± 0.05 bits`` of an entry ``view_information``, in whichever form; empty where there is none."""
    row = {"view_information": value}
    bits, error = VIEW_INFORMATION.read(row), VIEW_INFORMATION.error and VIEW_INFORMATION.error(row)
    if bits is not None:
        return f"{bits:.2f}" + ("" if error is None else f" ± {error:.2f}") + " bits"
    old = number(value)
    return "" if old is None else f"{old:.2f} bits (old estimator, not comparable)"
