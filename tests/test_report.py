"""The report on synthetic run folders: what it says must be what the folders hold."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from uncollapse import figures, report
from uncollapse.report import write_report
from uncollapse.runs import RunRecord, group_runs, read_run
from uncollapse.verdict import USED, compare, difference, takeaways, verdict

K, HELD_OUT = 256, 360
# per arm: distinct at the four ε (%), used, alive, N_eff(.025), N_eff(.25), bits, kNN, linear
ARMS: dict[str, tuple[tuple[float, ...], int, int, float, float, float, float, float]] = {
    "joint": ((11.5, 10.2, 8.5, 3.9), 64, 99, 38.5, 32.0, 3.99, 0.46, 0.51),
    "koleo": ((100, 100, 98.3, 94.7), 40, 90, 24.1, 18.3, 3.44, 0.443, 0.5),
    "decoupled": ((97.8, 86.9, 70.3, 19.9), 133, 200, 74.2, 23.1, 4.40, 0.4475, 0.52),
    "decoupled-paper": ((100, 98, 97.6, 96.5), 10, 44, 9.6, 1.8, 1.03, 0.30, 0.33),
    "fixed": ((100, 100, 100, 99.4), 12, 14, 10.6, 10.6, 3.12, 0.423, 0.45),
}
EPS = ("0.025", "0.1", "0.25", "0.5")


def make_summary(arm: str, seed: int = 0, **changes: Any) -> dict[str, Any]:
    shares, used, alive, n_eff, n_wide, bits, knn, linear = ARMS[arm]
    unique = {eps: round(K * share / 100) for eps, share in zip(EPS, shares, strict=True)}
    parts = {"views": 0.006, "teacher": 0.005, "prototypes": 0.001, "student": 0.009, "backward": 0.016,
             "optimiser": 0.002, "ema": 0.001, "diagnosis": 0.0008}  # fmt: skip
    if arm.startswith("decoupled"):
        parts["prototypes"] = 0.004
    summary = {
        "name": arm, "seed": seed, "prototypes": K, "dim": 64, "steps": 1200, "n_held_out": HELD_OUT,
        "n_train": 1437, "unique": unique,
        "unique_used": {eps: min(used, count) for eps, count in unique.items()},
        "used": used + seed, "alive": alive, "alive_window": 200,
        "effective": {"0.025": n_eff, "0.1": (n_eff + n_wide) / 2, "0.25": n_wide, "0.5": n_wide / 2},
        "view_information": bits, "knn": knn + 0.002 * seed, "knn_ci95": [knn - 0.02, knn + 0.02],
        "linear": linear, "linear_ci95": [linear - 0.02, linear + 0.02], "knn_untrained": 0.33,
        "seconds_per_step": sum(parts.values()), "step_parts": parts, "diagnosis_share": 0.02,
        "device": "cpu", "loss": 3.2,
    }  # fmt: skip
    return summary | changes


def make_run(root: Path, arm: str, seed: int = 0, **changes: Any) -> Path:
    """Write a run folder the way training does: its numbers are arranged, its shapes are real."""
    folder = root / f"{arm}-{seed}"
    folder.mkdir(parents=True)
    summary = make_summary(arm, seed, **changes)
    (folder / "summary.json").write_text(json.dumps(summary))
    rng = np.random.default_rng([seed, *arm.encode()])
    rows: list[dict[str, Any]] = []
    for step in range(0, 1201, 10):
        fall = float(np.exp(-step / 250))
        rows.append({"step": step, "epoch": step / 11, "kind": "step", "lr": 0.003,
                     "loss": 3.2 + 2.3 * fall + 0.05 * rng.normal(),
                     "teacher_entropy": 1 + 4.5 * fall + 0.03 * rng.normal(),
                     "alive": round(summary["alive"] + (K - summary["alive"]) * fall)})  # fmt: skip
        if step % 100 == 0:
            counts = {eps: round(n + (K - n) * fall) for eps, n in summary["unique"].items()}
            rows.append({"step": step, "epoch": step / 11, "kind": "sweep", "unique": counts})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    centres = rng.normal(size=(6, 2)) if arm == "joint" else rng.normal(size=(K, 2))
    circle = np.repeat(centres, -(-K // len(centres)), axis=0)[:K] + 0.05 * rng.normal(size=(K, 2))
    usage = np.zeros(K, dtype=int)
    weights = 1 / np.arange(1, summary["used"] + 1)
    chosen = rng.choice(summary["used"], HELD_OUT - summary["used"], p=weights / weights.sum())
    usage[rng.permutation(K)[: summary["used"]]] = 1 + np.bincount(chosen, minlength=summary["used"])
    ids = np.flatnonzero(usage)[:4]
    shade = np.linspace(0, 1, 16)[:, None] * np.linspace(0, 1, 16)
    motifs = (255 * np.stack([np.rot90(shade, turn) for turn in range(4)])).astype(np.uint8)
    unique = np.repeat(np.repeat(motifs[:, None, :, :, None], 6, 1), 3, -1)
    group = len(ids) if arm == "joint" else 0
    eps = np.linspace(0, 0.5, 41)
    np.savez(
        folder / "diagnosis.npz", circle=circle / np.linalg.norm(circle, axis=1, keepdims=True), usage=usage,
        sweep_eps=eps, sweep_unique=np.interp(eps, [0, *map(float, EPS)], [K, *summary["unique"].values()]),
        movement=rng.random(K) * (0.02 if arm == "decoupled-paper" else 1.0),
        duplicate_ids=ids[:group], duplicate_images=np.repeat(unique[:1], 4, 0)[:group],
        unique_ids=ids, unique_images=unique,
    )  # fmt: skip
    return folder


def make_all(root: Path, seeds: int = 1, **changes: Any) -> list[RunRecord]:
    return [read_run(make_run(root, arm, seed, **changes)) for arm in ARMS for seed in range(seeds)]


class Page(HTMLParser):
    """Table cells, text and references of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[list[str]]] = []  # the pieces of text of each cell
        self.references: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self._cell = False
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append([])
        self._cell = self._cell or tag in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self._cell and data.strip():
            self.rows[-1][-1].append(data.strip())

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "table"):
            self._cell = False

    def cell(self, arm: str, column: str) -> str:
        row = next(row for row in self.rows if row[0][0] == arm)
        return " ".join(row[[cell[0] for cell in self.rows[0]].index(column)])


def render(runs: list[RunRecord], path: Path, title: str = "Demo", notes: tuple[str, ...] = ()) -> str:
    write_report(runs, path, title, list(notes))
    return path.read_text(encoding="utf-8")


def test_page_is_self_contained(tmp_path: Path) -> None:
    html = render(make_all(tmp_path), tmp_path / "new" / "report.html")
    page = Page(html)
    assert not re.search(r"https?://|@import|url\(", html)
    assert page.references
    assert all(reference.startswith("data:image/") for reference in page.references)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert all(image.get("alt") for image in page.images)
    assert len(html) < 3e6


def test_table_shows_the_summaries(tmp_path: Path) -> None:
    runs = make_all(tmp_path)
    page = Page(render(runs, tmp_path / "report.html"))
    for run in runs:
        s = run.summary
        for eps in EPS:
            assert page.cell(run.name, f"unique ε={float(eps):g}") == f"{100 * s['unique'][eps] / K:.1f}"
        assert page.cell(run.name, "used") == str(s["used"])
        assert page.cell(run.name, "alive") == str(s["alive"])
        among = 100 * s["unique_used"]["0.025"] / s["used"]
        assert page.cell(run.name, "unique among used") == f"{among:.1f}"
        assert page.cell(run.name, "N_eff(0.025)") == f"{s['effective']['0.025']:.1f}"
        assert page.cell(run.name, "N_eff(0.25)") == f"{s['effective']['0.25']:.1f}"
        assert page.cell(run.name, "view information") == f"{s['view_information']:.2f}"
        low, high = (100 * bound for bound in s["knn_ci95"])
        assert page.cell(run.name, "kNN") == f"{100 * s['knn']:.1f} {low:.1f}–{high:.1f}"
        assert page.cell(run.name, "linear").startswith(f"{100 * s['linear']:.1f}")
        assert page.cell(run.name, "step time") == f"{1e3 * s['seconds_per_step']:.1f}"
    assert page.cell("untrained encoder", "kNN") == "33.0"
    assert f"{HELD_OUT} held-out images" in page.text


def test_seeds_become_mean_and_standard_deviation(tmp_path: Path) -> None:
    page = Page(render(make_all(tmp_path, seeds=3), tmp_path / "report.html"))
    assert page.cell("joint", "used") == "65 ± 1"
    assert page.cell("joint", "kNN").startswith("46.2 ± 0.2")
    assert "Mean ± standard deviation over seeds" in page.text


def test_verdict_names_what_is_worse(tmp_path: Path) -> None:
    arms = group_runs(make_all(tmp_path))
    koleo = compare("koleo", "joint", arms)
    assert any(text.startswith("used 40 vs 64") for text in koleo.worse)
    assert any(text.startswith("view information 3.44") for text in koleo.worse)
    assert any(text.startswith("unique ε=0.025") for text in koleo.better)
    assert any(text.startswith("kNN") for text in koleo.same), "1.7 points lie within the interval"
    paper = verdict("decoupled-paper", arms)
    assert ("bad", "worse than the control") in paper.labels
    assert ("warn", "mostly dead") in paper.labels
    assert any("100 % lie within cosine distance 0.1 of where they started" in s for s in paper.sentences)
    by_name = {c.against: c for c in paper.comparisons}
    assert any(text.startswith("kNN 30.0 vs 46.0 %") for text in by_name["joint"].worse)
    assert any(text.startswith("used 10 vs 12") for text in by_name["fixed"].worse)
    assert not any("unique" in text for text in by_name["fixed"].worse + by_name["fixed"].better)
    assert ("bad", "partial collapse") in verdict("joint", arms).labels
    assert any("alone says nothing" in s for s in verdict("fixed", arms).sentences)
    short = takeaways(arms)
    assert any("Partial collapse" in line and "joint" in line for line in short)
    assert any("Worse than the control" in line and "decoupled-paper" in line for line in short)
    assert any(line.startswith("kNN") and "lower: decoupled-paper (30.0)" in line for line in short)


def test_verdict_does_not_call_noise_a_difference(tmp_path: Path) -> None:
    runs = make_all(tmp_path, seeds=3)
    for run in runs:
        if run.name == "koleo":
            run.summary["used"] = (20, 100, 60)[run.seed]
    assert difference(USED, group_runs(runs)["koleo"], group_runs(runs)["joint"]) == 0


def test_one_run_reads_as_one_run(tmp_path: Path) -> None:
    page = Page(render([read_run(make_run(tmp_path, "decoupled"))], tmp_path / "report.html"))
    assert "In short" not in page.text
    assert "Against joint" not in page.text
    assert "No control was run" in page.text
    assert "No duplicate group: none was recorded" in page.text
    control = Page(render([read_run(make_run(tmp_path, "fixed"))], tmp_path / "report.html"))
    assert "No duplicate group: no two prototypes lie within ε = 0.025" in control.text


@pytest.mark.parametrize("missing", ["metrics.jsonl", "summary.json", "diagnosis.npz", "all"])
def test_missing_pieces_do_not_crash(tmp_path: Path, missing: str) -> None:
    folders = [make_run(tmp_path, arm) for arm in ("joint", "decoupled")]
    for folder in folders:
        for file in list(folder.iterdir()):
            if missing in (file.name, "all"):
                file.unlink()
    for runs in ([read_run(folders[0])], [read_run(folder) for folder in folders]):
        page = Page(render(runs, tmp_path / "report.html"))
        assert "Verdict" in page.text
    if missing == "all":
        assert read_run(folders[0]).name == "joint-0"
        assert "No summary was found" in page.text


def test_missing_entries_and_odd_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for drawing in ("line_panel", "step_parts"):  # the words are tested here, twenty times over
        monkeypatch.setattr(figures, drawing, lambda *_, **__: "data:image/png;base64,")
    full = make_summary("joint")
    for name in full:
        if name != "name":
            run = RunRecord("joint", 0, [], {k: v for k, v in full.items() if k != name})
            render([run, RunRecord("fixed", 0, [], make_summary("fixed"))], tmp_path / "report.html")
    nothing = dict.fromkeys(full) | {"loss": float("nan"), "knn_ci95": [None, None]}
    page = Page(render([RunRecord("joint", 0, [], nothing)], tmp_path / "report.html"))
    assert page.cell("joint", "kNN") == "–"
    assert "training diverged" in page.text


def test_no_runs_at_all(tmp_path: Path) -> None:
    assert "no runs" in render([], tmp_path / "report.html")


def test_torn_line_is_ignored_and_later_rows_win(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "joint")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1200, "kind": "step", "loss": 9.5}\n')
        file.write('{"kind": "warning", "message": "dead"}\n{"st')
    run = read_run(folder)
    assert run.metrics[-1] == {"kind": "warning", "message": "dead"}
    assert report._logged(run, "loss")[1][-1] == 9.5
    assert "dead" in Page(render([run], tmp_path / "report.html")).text


def test_a_line_torn_in_the_middle_costs_only_itself(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo\n[3]\n{"step": 4}\n')
    assert read_run(tmp_path).metrics == [{"step": 1}, {"step": 4}]


def test_text_is_escaped(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, "joint", data='"><img src=x>', device="<i>cpu</i>"))
    run.name = "<em>arm</em>"
    run.metrics.append({"kind": "warning", "message": "<script>1</script>"})
    html = render([run], tmp_path / "report.html", "<b>Title</b> & more", ("<script>alert(1)</script>",))
    assert "<title>&lt;b&gt;Title&lt;/b&gt; &amp; more</title>" in html
    for raw in ("<script>", "<b>Title", "<img src=x>", "<i>cpu", "<em>arm"):
        assert raw not in html


def test_density_of_a_circle() -> None:
    even = np.linspace(0, 2 * np.pi, 100_000, endpoint=False)
    density = figures.circle_density(np.stack([np.cos(even), np.sin(even)], 1))
    np.testing.assert_allclose(density, 1, atol=0.02)
    one = figures.circle_density(np.tile([[0.0, 1.0]], (50, 1)))
    assert one.mean() == pytest.approx(1)
    assert abs(one.argmax() / 720 * 360 - 270) <= 0.5, "bins start at -180°, so 90° is three quarters round"


def test_many_prototypes_stay_small(tmp_path: Path) -> None:
    total, rng = 262_144, np.random.default_rng(0)
    usage = np.zeros(total, dtype=int)
    usage[:40_000] = rng.integers(1, 30, 40_000)
    arrays = {"circle": rng.normal(size=(total, 2)), "usage": usage, "movement": rng.random(total)}
    run = RunRecord("joint", 0, [], make_summary("joint", prototypes=total), arrays)
    assert len(render([run], tmp_path / "report.html")) < 400_000
