"""What ``summary.json`` holds: one record, which the end of training writes and every reader reads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, get_type_hints

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from uncollapse.measure.catalogue import Row
from uncollapse.measure.random_start import RandomLikeness
from uncollapse.shown import shown

LONGEST = 80
"""Characters of a text that are read."""


def _epsilon(text: str) -> str:
    if not 0 < float(text) <= 2:
        raise ValueError("a cosine distance is above 0 and at most 2")
    return text


Whole = Annotated[int, Field(strict=True, ge=0, lt=2**53)]
Above0 = Annotated[int, Field(strict=True, ge=1, lt=2**53)]
Real = Annotated[float, Field(strict=True)]
Ends = tuple[Real | None, Real | None]
Epsilon = Annotated[str, AfterValidator(_epsilon)]
"""A cosine distance as text, as JSON has no numbers for keys."""


@dataclass
class Information:
    """`ViewInformation` without its values per image."""

    bits: Real
    standard_error: Real | None = None
    fitted_on: str = ""
    n_fit: Whole | None = None
    n: Whole | None = None
    views: Whole | None = None


@dataclass(frozen=True, kw_only=True)
class SetSummary:
    """What is known of one set of prototypes at the end of a run; None: not measured.

    Every measure is defined in `measure.catalogue`.
    """

    prototypes: Above0 | None = None
    dim: Above0 | None = None
    unique: dict[Epsilon, Whole] | None = None
    unique_means: dict[Epsilon, Whole] | None = None
    unique_used: dict[Epsilon, Whole] | None = None
    used: Whole | None = None
    effective: dict[Epsilon, Real] | None = None
    n: Whole | None = None
    """Held-out images, or what ``unit`` says, behind ``used`` and ``effective``."""
    unit: str | None = None
    alive: Whole | None = None
    alive_window: Whole | None = None
    movement: Real | None = None
    random_start: RandomLikeness | None = None


@dataclass(frozen=True, kw_only=True)
class Summary(SetSummary):
    """A finished run: what its first set of prototypes, its encoder and its steps came to."""

    name: str | None = None
    """The mode."""
    method: str | None = None
    seed: Whole | None = None
    steps: Whole | None = None
    data: str | None = None
    n_train: Whole | None = None
    n_held_out: Whole | None = None
    data_digest: str | None = None
    held_out_digest: str | None = None
    view_information: Real | Information | None = None
    """A bare number is one of the old estimator."""
    used_by_logits: Whole | None = None
    used_by_target: Whole | None = None
    target_agreement: Real | None = None
    effective_rank: Real | None = None
    uniformity: Real | None = None
    knn: Real | None = None
    knn_ci95: Ends | None = None
    knn_k: Whole | None = None
    n_bank: Whole | None = None
    knn_balanced: Real | None = None
    knn_balanced_ci95: Ends | None = None
    knn_untrained: Real | None = None
    knn_untrained_ci95: Ends | None = None
    knn_untrained_balanced: Real | None = None
    linear: Real | None = None
    linear_ci95: Ends | None = None
    linear_balanced: Real | None = None
    linear_balanced_ci95: Ends | None = None
    loss: Real | None = None
    seconds_per_step: Real | None = None
    step_parts: dict[str, Real] | None = None
    diagnosis_share: Real | None = None
    device: str | None = None
    encoder: str | None = None
    sets: dict[str, SetSummary] = field(default_factory=dict)
    """Further sets of prototypes by name, such as those of patches."""
    notes: list[str] = field(default_factory=list)


_ADAPTERS = {
    record: {
        name: TypeAdapter[Any](hint)
        for name, hint in get_type_hints(record, include_extras=True).items()
        if name != "sets"
    }
    for record in (SetSummary, Summary)
}


def read_summary(content: Row) -> tuple[Row, list[str]]:
    """The entries of a summary that have the right type, text safe to print; and the names of the others.

    Entries that a `Summary` does not have are passed over; missing ones and null stay missing.
    """
    good, wrong = _checked(Summary, content, "")
    sets: Any = content.get("sets") or {}
    if not isinstance(sets, dict) or not all(isinstance(of_set, dict) for of_set in sets.values()):
        return good, [*wrong, "sets"]
    for name, of_set in sets.items():
        text = shown(name)[:LONGEST]
        measures, bad = _checked(SetSummary, of_set, f"sets.{text}.")
        good.setdefault("sets", {})[text] = measures
        wrong += bad
    return good, wrong


def _checked(record: type[SetSummary], content: Row, prefix: str) -> tuple[Row, list[str]]:
    good: Row = {}
    wrong = []
    for name, adapter in _ADAPTERS[record].items():
        if (value := content.get(name)) is None:
            continue
        try:
            checked = adapter.validate_python(value)
        except ValidationError:
            wrong.append(prefix + name)
            continue
        if dataclasses.is_dataclass(checked) and not isinstance(checked, type):
            checked = dataclasses.asdict(checked)
        good[name] = shown(checked)[:LONGEST] if isinstance(checked, str) else checked
    if any(n > good.get("prototypes", 0) for n in good.get("unique", {}).values()):
        del good["unique"]
        wrong.append(f"{prefix}unique (more than there are prototypes)")
    return good, wrong
