"""What a setting does where runs differ in it: a picture for each number that was swept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from uncollapse.figures.sweep import Lines, sweep_panels
from uncollapse.measure.catalogue import EFFECTIVE, KNN, UNIQUE, VIEW_INFORMATION, number
from uncollapse.report.arms import group, in_short
from uncollapse.report.comparing import stat
from uncollapse.run_folder.read import RunRecord

SHOWN = (VIEW_INFORMATION, KNN, UNIQUE[0.025], EFFECTIVE[0.025])


def swept(runs: Sequence[RunRecord]) -> list[str]:
    """The keys, numbers above 0, in which runs of one method, mode and seed differ."""
    mates: dict[tuple[object, ...], list[RunRecord]] = {}
    for run in runs:
        mates.setdefault((run.method, run.name, run.seed), []).append(run)
    keys = dict.fromkeys(key for members in mates.values() for run in members for key in run.config)
    return [key for key in keys if key != "seed" and any(len(_values(key, members)) > 1 for members in mates.values())]


def _values(key: str, runs: Sequence[RunRecord]) -> list[float]:
    """What runs have under a key, ascending; nothing where one of them has no number above 0 there."""
    values = [number(run.config.get(key)) for run in runs]
    return [] if any(v is None or v <= 0 for v in values) else sorted({v for v in values if v is not None})


def sweeps(runs: Sequence[RunRecord]) -> list[tuple[str, str, str]]:
    """(setting, picture as an address, the same in words) for each of `swept`."""
    return [_picture(runs, key) for key in swept(runs)]


def _picture(runs: Sequence[RunRecord], key: str) -> tuple[str, str, str]:
    measures: dict[str, dict[str, list[tuple[float, float, float]]]] = {measure.label: {} for measure in SHOWN}
    values = _values(key, [run for run in runs if number(run.config.get(key)) is not None])
    for value in values:
        having = [run for run in runs if number(run.config.get(key)) == value]
        alike = [dataclasses.replace(run, config={k: v for k, v in run.config.items() if k != key}) for run in having]
        for arm, members in group(alike).arms.items():
            for measure in SHOWN:
                if (s := stat(measure, members)) is not None:
                    measures[measure.label].setdefault(arm, []).append((value, s.mean, s.sd or 0.0))
    shown: dict[str, Lines] = {title: lines for title, lines in measures.items() if lines}
    words = "; ".join(f"{title}: {_in_words(lines)}" for title, lines in shown.items())
    return in_short(key), sweep_panels(shown, in_short(key)), words


def _in_words(lines: Lines) -> str:
    return ", ".join(f"{arm} {' '.join(f'{y:.3g} at {x:g}' for x, y, _ in points)}" for arm, points in lines.items())
