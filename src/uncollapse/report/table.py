"""The table that ends a run or a demo: the figures of merit first, and no share of unique prototypes without them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from uncollapse.measure.catalogue import Measure, Row, measured
from uncollapse.measure.verdict import judge_row
from uncollapse.progress import SteadyConsole
from uncollapse.report.arms import CONTROL, arm_name, group, set_name
from uncollapse.report.comparing import stat
from uncollapse.report.tails import LEGEND, tails
from uncollapse.run_folder.read import RunRecord
from uncollapse.shown import shown


def cell(measure: Measure, rows: Sequence[Row]) -> str:
    """One arm's value; ± its standard error where it has one of its own, else its deviation over seeds; – for none."""
    s = stat(measure, [RunRecord("", row.get("seed") or 0, summary=row) for row in rows])
    if s is None:
        return "–"
    spread = s.error if measure.error is not None and not measure.interval else s.sd
    return measure.text(s.mean) + ("" if spread is None else f"±{measure.text(spread)}")


def print_table(summaries: list[Row], console: Console | None = None) -> None:
    """Prints a column per arm: the figures of merit, what became of its prototypes, the verdict, the cost of a step."""
    console = console or SteadyConsole()
    arms: dict[str, list[Row]] = {}
    several = len({_method(s) for s in summaries}) > 1
    for summary in summaries:
        arms.setdefault(arm_name(_method(summary), shown(summary["name"]), several), []).append(summary)
    every = {name: of_arm for arm, rows in arms.items() for name, of_arm in _with_sets(arm, rows).items()}
    first = summaries[0]
    seeds = len({s["seed"] for s in summaries})
    title = f"{first['prototypes']} prototypes, {first['steps']} steps, n = {first['n_held_out']} held-out images"
    title += f", mean ± sd over {seeds} seeds" if seeds > 1 else ""
    lines = [
        (m.label, [cell(m, rows) for rows in every.values()])
        for m in measured([row for rows in every.values() for row in rows])
    ]
    _print(console, title, list(every), lines)
    console.print(_legend(summaries), highlight=False, markup=False)
    console.print()
    for arm, rows in every.items():
        for line in verdict_lines(arm, rows):
            console.print(line, highlight=False, markup=False)
    console.print()
    _print(console, "what a step costs, ms", list(arms), _parts(arms))


def print_tails(runs: Sequence[RunRecord], console: Console | None = None) -> None:
    """Prints what evaluations found of frequent and of rare classes: a column per arm, a table per data set."""
    console = console or SteadyConsole()
    grouping = group(runs)
    seeds = max(len(members) for members in grouping.arms.values())
    for key in dict.fromkeys(key for run in runs for key in run.evaluation):
        if (found := tails(grouping, key)) is not None:
            over = f", mean ± sd over {seeds} seeds" if seeds > 1 else ""
            console.print()
            _print(console, f"{shown(key)}: frequent against rare classes{over}", found.columns, found.lines)
            if found.gaps:
                error = " ± its standard error" if seeds > 1 else ""
                _print(console, f"more than joint has, seed by seed{error}", found.gaps, found.gap_lines)
            console.print(f"{found.groups}. {LEGEND}.", highlight=False, markup=False)


def _with_sets(arm: str, rows: list[Row]) -> dict[str, list[Row]]:
    """An arm, and behind it its further sets of prototypes."""
    out = {arm: rows}
    for row in rows:
        for part, measures in (row.get("sets") or {}).items():
            own = {"name": row["name"], "seed": row["seed"], **measures}
            out.setdefault(set_name(arm, shown(part)), []).append(own)
    return out


def _method(summary: Row) -> str:
    return shown(summary.get("method") or "dino")  # as all were once


def verdict_lines(arm: str, rows: Sequence[Row]) -> list[str]:
    """The verdict on each arm and what to do next; a line for each label where seeds disagree."""
    verdicts = [v for row in rows if (v := judge_row(row, row["name"])) is not None]
    labels = [v.label for v in verdicts]
    lines = []
    for label, v in {v.label: v for v in verdicts}.items():
        count = "" if len(set(labels)) == 1 else f" ({labels.count(label)} of {len(labels)} seeds)"
        control = " (the control)" if rows[0]["name"] == CONTROL else ""
        lines.append(f"{arm}{control}: {label}{count}. Next: {v.advice}")
    return lines


Line = tuple[str, list[str]]
"""A label and one cell per arm."""


def _print(console: Console, title: str, arms: list[str], lines: list[Line]) -> None:
    """A line per measure and a column per arm: the arms are few, so this fits where the reverse would not."""
    console.print(title, style="italic", highlight=False, markup=False)
    unbounded = console.options.update(width=100_000)
    # What does not fit side by side is broken, first names, then cells before ±, then the row of arms.
    for breaks, most in [("", len(arms)), ("-", len(arms)), *(("-±", n) for n in range(len(arms), 0, -1))]:
        tables = [_table(arms, lines, slice(i, i + most), breaks) for i in range(0, len(arms), most)]
        if max(console.measure(table, options=unbounded).maximum for table in tables) <= console.width:
            break
    for table in tables:
        console.print(table)
        console.print()


def _table(arms: list[str], lines: list[Line], columns: slice, breaks: str) -> Table:
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column(overflow="fold")  # never an ellipsis, however narrow the console
    for arm in arms[columns]:
        name = arm.replace("-", "-\n").replace(" ", "\n").replace("·\n", "· ") if "-" in breaks else arm
        table.add_column(Text(name), justify="right", overflow="fold")
    for label, cells in lines:
        table.add_row(label, *(c.replace("±", "\n±") if "±" in breaks else c for c in cells[columns]))
    return table


def _legend(summaries: list[Row]) -> str:
    first = summaries[0]
    lines = []
    information = next((s["view_information"] for s in summaries if isinstance(s.get("view_information"), dict)), None)
    if information is not None:
        fitted = f", fitted on {information['fitted_on']}" if information.get("fitted_on") else ""
        lines.append(
            "view information: the figure of merit, with kNN; ± its standard error over images and seeds (lower "
            f"bound{fitted})."
        )
    window = next((s["alive_window"] for s in summaries if s.get("alive_window")), None)
    alive = "" if window is None else f"; alive: nearest to a training view in the last {window} steps"
    lines.append(
        f"unique: kept by the greedy ε-cover; used: nearest to at least one held-out image{alive}. These describe: "
        "dead and random ones are unique too."
    )
    if any(s.get("sets") for s in summaries):
        lines.append(
            "ARM · SET: a further set of prototypes of the same runs, counted on held-out images or patches of them."
        )
    if first.get("knn") is not None:
        low, high = first["knn_ci95"]
        text = f"kNN: k = {first['knn_k']}, 95 % interval of one run ± {50 * (high - low):.1f}"
        if floor := [100 * s["knn_untrained"] for s in summaries if s.get("knn_untrained") is not None]:
            text += f"; untrained encoder {statistics.fmean(floor):.1f} %"
        lines.append(f"{text}.")
    controlled = {_method(s) for s in summaries if s["name"] == CONTROL}
    if uncontrolled := [m for m in dict.fromkeys(map(_method, summaries)) if m not in controlled]:
        of = f" of {', '.join(uncontrolled)}" if controlled else ""
        lines.append(
            f"No control{of} here: the same command with --prototypes fixed trains it, and uncollapse report RUN "
            "CONTROL compares the two."
        )
    return "\n".join([*lines, *dict.fromkeys(note for s in summaries for note in s.get("notes") or [])])


def _parts(arms: dict[str, list[Row]]) -> list[Line]:
    parts = dict.fromkeys(p for rows in arms.values() for s in rows for p in s["step_parts"])
    lines = []
    for part in parts:
        ms = Measure(part, "", lambda s, p=part: 1000 * s["step_parts"].get(p, 0.0), 2)  # type: ignore[misc]
        lines.append((part, [cell(ms, rows) for rows in arms.values()]))
    shares = [statistics.fmean(s["diagnosis_share"] for s in rows) for rows in arms.values()]
    return [*lines, ("diagnosis, share", [f"{100 * share:.2f} %" for share in shares])]
