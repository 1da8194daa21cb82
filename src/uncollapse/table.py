"""The table that ends a run or a demo: no share of unique prototypes without what it hides."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
Measure = Callable[[Row], float | None]


def _unique(eps: str) -> Measure:
    return lambda s: 100 * s["unique"][eps] / s["prototypes"]


def _percent(name: str) -> Measure:
    return lambda s: None if s.get(name) is None else 100 * s[name]


MEASURES: list[tuple[str, Measure, int]] = [
    ("unique %, ε .025", _unique("0.025"), 1),
    ("unique %, ε .1", _unique("0.1"), 1),
    ("unique %, ε .25", _unique("0.25"), 1),
    ("unique %, ε .5", _unique("0.5"), 1),
    ("used", lambda s: s["used"], 0),
    ("alive", lambda s: s["alive"], 0),
    ("unique of used", lambda s: s["unique_used"]["0.025"], 0),
    ("N_eff, ε .025", lambda s: s["effective"]["0.025"], 1),
    ("N_eff, ε .25", lambda s: s["effective"]["0.25"], 1),
    ("view bits", lambda s: s["view_information"], 2),
    ("kNN %", _percent("knn"), 1),
    ("linear %", _percent("linear"), 1),
    ("ms per step", lambda s: 1000 * s["seconds_per_step"], 1),
]
"""Label, value and decimals of each line."""


def cell(values: list[float | None], decimals: int) -> str:
    """One arm's value; mean ± standard deviation over several seeds; – where there is none."""
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    mean = f"{statistics.fmean(known):.{decimals}f}"
    return mean if len(known) == 1 else f"{mean}±{statistics.stdev(known):.{decimals}f}"


def print_table(summaries: list[Row], console: Console | None = None) -> None:
    """Prints a column per arm: what became of its prototypes, then what each part of a step costs."""
    console = console or Console()
    arms: dict[str, list[Row]] = {}
    for summary in summaries:
        arms.setdefault(summary["name"], []).append(summary)
    first = summaries[0]
    seeds = len({s["seed"] for s in summaries})
    title = f"{first['prototypes']} prototypes, {first['steps']} steps, n = {first['n_held_out']} held-out images"
    title += f", mean ± sd over {seeds} seeds" if seeds > 1 else ""
    lines = [
        (label, [cell([measure(s) for s in rows], decimals) for rows in arms.values()])
        for label, measure, decimals in MEASURES
    ]
    _print(console, title, list(arms), lines)
    console.print(_legend(summaries), highlight=False)
    console.print()
    _print(console, "what a step costs, ms", list(arms), _parts(arms))


Line = tuple[str, list[str]]
"""A label and one cell per arm."""


def _print(console: Console, title: str, arms: list[str], lines: list[Line]) -> None:
    """A line per measure and a column per arm: the arms are few, so this fits where the reverse would not."""
    console.print(title, style="italic", highlight=False)
    unbounded = console.options.update(width=100_000)
    # What does not fit side by side is broken, first names at hyphens, then cells before ±, then the row of arms.
    for breaks, most in [("", len(arms)), ("-", len(arms)), *(("-±", n) for n in range(len(arms), 0, -1))]:
        tables = [_table(arms, lines, slice(i, i + most), breaks) for i in range(0, len(arms), most)]
        if max(console.measure(table, options=unbounded).maximum for table in tables) <= console.width:
            break
    for table in tables:
        console.print(table)
        console.print()


def _table(arms: list[str], lines: list[Line], shown: slice, breaks: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column(overflow="fold")  # never an ellipsis, however narrow the console
    for arm in arms[shown]:
        table.add_column(arm.replace("-", "-\n") if "-" in breaks else arm, justify="right", overflow="fold")
    for label, cells in lines:
        table.add_row(label, *(c.replace("±", "\n±") if "±" in breaks else c for c in cells[shown]))
    return table


def _legend(summaries: list[Row]) -> str:
    first = summaries[0]
    lines = [
        "unique: kept by the greedy ε-cover; used: nearest to at least one held-out image; alive: nearest to a "
        f"training view in the last {first['alive_window']} steps. Dead prototypes count as unique: "
        "read that line only with used, N_eff and the fixed control."
    ]
    if first.get("knn") is not None:
        low, high = first["knn_ci95"]
        untrained = statistics.fmean(s["knn_untrained"] for s in summaries)
        lines.append(
            f"kNN: k = {first['knn_k']}, 95 % interval of one run ± {50 * (high - low):.1f}; "
            f"untrained encoder {100 * untrained:.1f} %."
        )
    return "\n".join(lines)


def _parts(arms: dict[str, list[Row]]) -> list[Line]:
    parts = dict.fromkeys(p for rows in arms.values() for s in rows for p in s["step_parts"])
    lines = [
        (part, [cell([1000 * s["step_parts"].get(part, 0.0) for s in rows], 2) for rows in arms.values()])
        for part in parts
    ]
    shares = [statistics.fmean(s["diagnosis_share"] for s in rows) for rows in arms.values()]
    return [*lines, ("diagnosis, share", [f"{100 * share:.2f} %" for share in shares])]
