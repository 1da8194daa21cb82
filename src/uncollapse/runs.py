"""Run folders read back, and numbers read out of their summaries; a missing piece is never an error."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from uncollapse.config import ARMS
from uncollapse.runlog import read_rows

Row = dict[str, Any]


@dataclass
class RunRecord:
    """What one training run left behind; a missing piece is empty and the report goes without it."""

    name: str
    """The arm: how the prototypes were learned."""
    seed: int = 0
    metrics: list[Row] = field(default_factory=list)
    """Rows of ``metrics.jsonl``: kinds ``step``, ``sweep`` and ``warning``."""
    summary: Row = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    """The arrays of ``diagnosis.npz``."""
    evaluation: Row = field(default_factory=dict)
    """What `uncollapse evaluate` measured: the ``data`` of ``evaluation.json``."""


Arms = dict[str, list[RunRecord]]
"""The runs of each arm, one per seed."""


def read_run(folder: Path) -> RunRecord:
    """Read ``metrics.jsonl``, ``summary.json``, ``diagnosis.npz`` and ``evaluation.json``, whichever exist."""
    summary: Row = {}
    if (folder / "summary.json").exists():
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    arrays: dict[str, np.ndarray] = {}
    if (folder / "diagnosis.npz").exists():
        with np.load(folder / "diagnosis.npz", allow_pickle=False) as stored:
            arrays = dict(stored)
    rows = read_rows(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    evaluation: Row = {}
    if (folder / "evaluation.json").exists():
        from uncollapse.evaluate.record import embed_pictures, read_evaluation

        evaluation = (read_evaluation(folder) or {}).get("data", {})
        embed_pictures(folder, evaluation)
    name = summary.get("name") or folder.name
    return RunRecord(name, summary.get("seed") or 0, rows, summary, arrays, evaluation)


def group_runs(runs: Iterable[RunRecord]) -> Arms:
    """Runs by arm, in the order of :data:`~uncollapse.config.ARMS` (others after), seeds ascending."""
    arms: Arms = {}
    for run in sorted(runs, key=lambda run: run.seed):
        arms.setdefault(run.name, []).append(run)
    order: dict[str, int] = {name: place for place, name in enumerate(ARMS)}
    return dict(sorted(arms.items(), key=lambda item: order.get(item[0], len(order))))


def number(value: Any) -> float | None:
    """A finite number of a summary as a float; None for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def at_epsilon(counts: Any, eps: float) -> float | None:
    """The value at ``eps`` of a mapping whose keys are ε as text, as JSON has them."""
    found = [value for key, value in (counts or {}).items() if math.isclose(float(key), eps)]
    return number(found[0]) if found else None


def percent(part: float | None, whole: float | None) -> float | None:
    """``part`` in per cent of ``whole``; None where either is missing or ``whole`` is zero."""
    return 100 * part / whole if part is not None and whole else None


def entry(name: str, factor: float = 1.0) -> Callable[[Row], float | None]:
    """A function that reads the number ``name`` of a summary, times ``factor``."""

    def read(summary: Row) -> float | None:
        value = number(summary.get(name))
        return None if value is None else factor * value

    return read


def common(runs: Sequence[RunRecord], name: str) -> str:
    """The values of a summary's entry over the runs, without repeats; empty where there is none."""
    found = dict.fromkeys(v for run in runs if (v := run.summary.get(name)) is not None)
    return " / ".join(f"{v:,}" if isinstance(v, int) else str(v) for v in found)
