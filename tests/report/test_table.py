"""The table in the terminal: what it shows is what the summaries hold, whole, on eighty columns."""

from __future__ import annotations

import io
import math
import re
import statistics
from typing import Any

import pytest
from rich.console import Console

from uncollapse.measure.catalogue import KNN
from uncollapse.report.table import cell, print_table

ARMS = ("joint", "koleo", "decoupled", "decoupled-paper", "fixed")
PARTS = ("views", "teacher", "prototypes", "diagnosis", "student", "backward", "optimiser", "ema", "checkpoint")
EPS = {".025": "0.025", ".1": "0.1", ".25": "0.25", ".5": "0.5"}


def make_summary(arm: str, seed: int, prototypes: int) -> dict[str, Any]:
    """Numbers that all differ, so that none can stand in the place of another."""
    x = 1 + ARMS.index(arm) + 5 * seed  # 1..15
    unique = {eps: prototypes * (20 - x - i) // 20 for i, eps in enumerate(EPS.values())}
    parts = {part: 0.001 * x * (1 + 7.3 * i) for i, part in enumerate(PARTS)}
    return {
        "name": arm,
        "seed": seed,
        "prototypes": prototypes,
        "steps": 1200,
        "n_held_out": 360,
        "unique": unique,
        "unique_used": {"0.025": 2 + x},
        "used": 40 * x,
        "alive": 55 * x,
        "alive_window": 200,
        "effective": {"0.025": prototypes / (x + 0.3), "0.25": prototypes / (x + 5.7)},
        "unique_means": {eps: count // 2 for eps, count in unique.items()},
        "used_by_target": 30 * x,
        "target_agreement": 0.02 * x,
        "dim": 64,
        "notes": [],
        "view_information": {"bits": 0.31 * x, "standard_error": 0.01 * x, "fitted_on": "training images"},
        "knn": 0.03 * x,
        "knn_ci95": [0.44, 0.50],
        "knn_k": 20,
        "knn_untrained": 0.33,
        "linear": 0.033 * x,
        "linear_ci95": [0.4, 0.5],
        "seconds_per_step": sum(parts.values()),
        "step_parts": parts,
        "diagnosis_share": 0.0123 * x,
    }


def make_all(arms: tuple[str, ...] = ARMS, seeds: int = 1, prototypes: int = 256) -> list[dict[str, Any]]:
    return [make_summary(arm, seed, prototypes) for seed in range(seeds) for arm in arms]


def printed(summaries: list[dict[str, Any]], width: int) -> str:
    out = io.StringIO()
    print_table(summaries, Console(file=out, width=width))
    return out.getvalue()


def read_back(text: str, arms: tuple[str, ...], times: int = 2) -> dict[str, dict[str, str]]:
    """Arm → label → cell of all tables in ``text``, with broken names and cells put together again."""
    tables: dict[str, dict[str, str]] = {arm: {} for arm in arms}
    left = list(arms) * times  # arms appear in this order: first in the main table, then in that of the costs
    for block in re.split(r"\n\s*\n", text):
        lines = block.splitlines()
        rule = next((i for i, line in enumerate(lines) if line.startswith("──")), None)
        if rule is None:
            continue
        label = ""
        for i, line in enumerate(lines[rule + 1 :]):
            first, *cells = re.split(r"\s{2,}", line.rstrip())
            if i == 0:
                shown, left = left[: len(cells)], left[len(cells) :]
                heading = " ".join(lines[:rule])
                assert all(piece in heading for arm in shown for piece in re.findall(r"\w+-?", arm))
            for arm, text_of in zip(shown, cells, strict=first != ""):
                tables[arm][first or label] = tables[arm].get(first or label, "") + text_of
            label = first or label
    assert not left
    return tables


def expected(rows: list[dict[str, Any]]) -> dict[str, str]:
    """What an arm's column must say, straight from its summaries."""

    def text(values: list[float], decimals: int) -> str:
        mean = f"{statistics.fmean(values):,.{decimals}f}"
        return mean if len(values) == 1 else f"{mean}±{statistics.stdev(values):,.{decimals}f}"

    column = {}
    for label, eps in EPS.items():
        for name, key in (("unique", "unique"), ("means unique", "unique_means")):
            column[f"{name} ε {label}, %"] = text([100 * s[key][eps] / s["prototypes"] for s in rows], 1)
    for name, label in (("used", "used"), ("alive", "alive"), ("used_by_target", "used by target")):
        column[label] = text([s[name] for s in rows], 0)
    column["unique among used, %"] = text([100 * s["unique_used"]["0.025"] / s["used"] for s in rows], 1)
    for label in (".025", ".25"):
        column[f"N_eff ε {label}"] = text([s["effective"][EPS[label]] for s in rows], 1)
    bits = [s["view_information"]["bits"] for s in rows]
    within = statistics.fmean(s["view_information"]["standard_error"] for s in rows)
    over = statistics.stdev(bits) / len(bits) ** 0.5 if len(bits) > 1 else 0.0
    column["view information, bits"] = f"{statistics.fmean(bits):.2f}±{math.hypot(within, over):.2f}"
    for name, label in (("knn", "kNN, %"), ("linear", "linear, %"), ("target_agreement", "target agreement, %")):
        column[label] = text([100 * s[name] for s in rows], 1)
    column["step time, ms"] = text([1000 * s["seconds_per_step"] for s in rows], 1)
    for part in PARTS:
        column[part] = text([1000 * s["step_parts"][part] for s in rows], 2)
    column["diagnosis, share"] = f"{100 * statistics.fmean(s['diagnosis_share'] for s in rows):.2f} %"
    return column


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("prototypes", [256, 65_536])
@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("arms", [ARMS[:1], ARMS])
def test_every_number_is_the_summarys(arms: tuple[str, ...], seeds: int, prototypes: int, width: int) -> None:
    summaries = make_all(arms, seeds, prototypes)
    text = printed(summaries, width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    tables = read_back(text, arms)
    for arm in arms:
        assert tables[arm] == expected([s for s in summaries if s["name"] == arm])
    assert list(tables[arms[0]])[:2] == ["view information, bits", "kNN, %"]
    words = " ".join(text.split())
    for arm in arms:
        assert f"{arm}{' (the control)' * (arm == 'fixed')}: " in words
    assert words.count("Next: ") >= len(arms)
    assert ("No control here" in words) == ("fixed" not in arms)
    assert f"{prototypes} prototypes, 1200 steps, n = 360 held-out images" in words
    assert ("mean ± sd over 3 seeds" in words) == (seeds == 3)
    assert "95 % interval of one run ± 3.0; untrained encoder 33.0 %" in words


def test_all_arms_stand_side_by_side_on_eighty_columns() -> None:
    for seeds in (1, 3):
        for prototypes in (256, 262_144):
            rules = [line for line in printed(make_all(ARMS, seeds, prototypes), 80).splitlines() if "──" in line]
            assert len(rules) == 2, "one table of measures and one of costs"


def test_names_and_cells_stay_whole_where_there_is_room() -> None:
    text = printed(make_all(seeds=3), 200)
    assert sum(all(arm in line for arm in ARMS) for line in text.splitlines()) == 2
    assert "\n±" not in text.replace(" ", "")


def test_methods_are_told_apart_where_there_are_several() -> None:
    one = make_all(ARMS[:3])
    other = [s | {"method": "carp", "used": 7} for s in make_all(("joint", "fixed"))]
    names = ("dino joint", "dino koleo", "dino decoupled", "carp joint", "carp fixed")
    text = printed([*one, *other], 200)
    table = read_back(text, names)
    assert [table[name]["used"] for name in names] == ["40", "80", "120", "7", "7"]
    assert "No control of dino here" in text
    assert "dino joint: " in text
    assert list(read_back(printed(other, 80), ("joint", "fixed"))["fixed"]) == list(table["carp fixed"])


def test_sets_of_prototypes_have_columns_of_their_own() -> None:
    runs = make_all(ARMS[:2], seeds=2)
    for s in runs:
        own = {"prototypes": 64, "dim": 8, "unique": {"0.025": 60}, "used": s["used"] + 1, "n": 900, "unit": "patches"}
        s |= {"method": "ibot", "sets": {"patch": own}}
    for width in (80, 200):
        text = printed(runs, width)
        main, costs = text.split("what a step costs")
        assert "joint · patch: " in " ".join(main.split())
        assert "patch" not in costs
    table = read_back(main, ("joint", "joint · patch", "koleo", "koleo · patch"), 1)
    assert table["joint"]["used"] == "140±141"
    assert table["joint · patch"]["used"] == "141±141"
    assert table["koleo · patch"]["unique ε .025, %"] == "93.8±0.0"
    assert table["koleo · patch"]["kNN, %"] == "–"


def test_what_was_not_measured_is_a_dash() -> None:
    summaries = make_all()
    for s in summaries[:1]:
        s |= dict.fromkeys(("knn", "knn_ci95", "linear", "linear_ci95"))
    first = read_back(printed(summaries, 80), ARMS)["joint"]
    assert first["kNN, %"] == first["linear, %"] == "–", "where another arm has them"
    for s in summaries:
        s |= dict.fromkeys(("knn", "knn_ci95", "linear", "linear_ci95", "knn_untrained"))
    text = printed(summaries, 80)
    for column in read_back(text, ARMS).values():
        assert set(column) & {"kNN, %", "linear, %"} == set()
        assert column["used"] != "–"
    assert "untrained" not in text
    assert cell(KNN, [{}, {}]) == "–"
    assert cell(KNN, [{}, {"knn": 0.02}]) == "2.0", "one seed has no spread"


def test_a_pipe_gets_plain_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    summaries = make_all()
    print_table(summaries)
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert read_back(text, ARMS)["fixed"] == expected(summaries[-1:])
