"""The report on synthetic run folders: what it says must be what the folders hold."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from made_runs import ARMS, EPS, HELD_OUT, K, make_all, make_run, make_set, make_summary
from uncollapse.figures import panels as figures
from uncollapse.report import page as report
from uncollapse.report.arms import group
from uncollapse.report.page import write_report
from uncollapse.report.verdict import compare, takeaways, verdict
from uncollapse.run_folder.read import RunRecord, read_run


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

    def cell(self, arm: str, measure: str) -> str:
        """Of the table of numbers: arms are columns, measures rows."""
        head = next(row for row in self.rows if row[0] == ["measure"])
        row = next(row for row in self.rows if row[0][0] == measure)
        return " ".join(row[[cell[0] for cell in head].index(arm)])


def render(runs: list[RunRecord], path: Path, title: str = "Demo", notes: tuple[str, ...] = ()) -> str:
    write_report(runs, path, title, list(notes))
    return path.read_text(encoding="utf-8")


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time; most tests are about words."""
    for name in ("line_panel", "step_parts", "circle", "usage_spectrum"):
        monkeypatch.setattr(figures, name, lambda *_, **__: "data:image/png;base64,")


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[RunRecord], str]:
    """One run of each arm, and their page."""
    root = tmp_path_factory.mktemp("five")
    runs = make_all(root)
    return runs, render(runs, root / "new" / "report.html")


def test_page_is_self_contained(five: tuple[list[RunRecord], str]) -> None:
    html = five[1]
    page = Page(html)
    assert not re.search(r"https?://|@import|url\(", html)
    assert page.references
    assert all(reference.startswith("data:image/") for reference in page.references)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert all(image.get("alt") for image in page.images)
    assert len(html) < 3e6


def test_table_shows_the_summaries(five: tuple[list[RunRecord], str]) -> None:
    runs, page = five[0], Page(five[1])
    for run in runs:
        s = run.summary
        for eps in EPS:
            name = f"{float(eps):g}".removeprefix("0")
            assert page.cell(run.name, f"unique ε\N{NO-BREAK SPACE}{name}") == f"{100 * s['unique'][eps] / K:.1f}"
            means = f"{100 * s['unique_means'][eps] / K:.1f}"
            assert page.cell(run.name, f"means unique ε\N{NO-BREAK SPACE}{name}") == means
        for name in ("used", "alive"):
            assert page.cell(run.name, name) == str(s[name])
        assert page.cell(run.name, "used by target") == str(s["used_by_target"])
        assert page.cell(run.name, "target agreement") == "28.0"
        among = 100 * s["unique_used"]["0.025"] / s["used"]
        assert page.cell(run.name, "unique among used") == f"{among:.1f}"
        assert page.cell(run.name, "N_eff ε\N{NO-BREAK SPACE}.025") == f"{s['effective']['0.025']:.1f}"
        assert page.cell(run.name, "N_eff ε\N{NO-BREAK SPACE}.25") == f"{s['effective']['0.25']:.1f}"
        bits = f"{s['view_information']['bits']:.2f} ± 0.05"
        assert page.cell(run.name, "view information").replace("\N{NO-BREAK SPACE}", " ") == bits
        low, high = (100 * bound for bound in s["knn_ci95"])
        assert page.cell(run.name, "kNN") == f"{100 * s['knn']:.1f} {low:.1f}–{high:.1f}"
        assert page.cell(run.name, "kNN, balanced") == f"{100 * s['knn_balanced']:.1f}"
        assert page.cell(run.name, "linear").startswith(f"{100 * s['linear']:.1f}")
        assert page.cell(run.name, "step time") == f"{1e3 * s['seconds_per_step']:.1f}"
        assert page.cell(run.name, "kNN, untrained encoder") == "33.0"
    assert f"{HELD_OUT} held-out images" in page.text
    assert "fitted on training images" in page.text


def test_figures_of_merit_come_first_and_the_control_is_in_the_table(five: tuple[list[RunRecord], str]) -> None:
    page = Page(five[1])
    head, first, second = page.rows[:3]
    assert [cell[0] for cell in head] == ["measure", *ARMS]
    assert (first[0][0], second[0][0]) == ("view information", "kNN")


@pytest.mark.usefixtures("no_figures")
def test_seeds_become_mean_and_standard_deviation(tmp_path: Path) -> None:
    page = Page(render(make_all(tmp_path, seeds=3), tmp_path / "report.html"))
    assert page.cell("joint", "used") == "65 ± 1"
    assert page.cell("joint", "kNN").startswith("46.2 ± 0.2")
    assert "mean ± standard deviation over seeds" in page.text


def test_verdict_names_what_is_worse(tmp_path: Path) -> None:
    arms = group(make_all(tmp_path))
    koleo = compare("koleo", "joint", arms)
    assert any(text.startswith("used 40 vs 64") for text in koleo.fewer)
    assert any(text.startswith("view information 3.44 vs 3.99 bits") for text in koleo.worse)
    assert any(text.startswith("unique ε .025") for text in koleo.more)
    assert any(text.startswith("kNN") for text in koleo.worse), "1.7 points, over the same images one by one"
    paper = verdict("decoupled-paper", arms)
    assert ("bad", "worse than the control") in paper.labels
    assert ("bad", "mostly unused") in paper.labels
    assert any("100 % lie within cosine distance 0.1 of where they started" in s for s in paper.sentences)
    by_name = {c.against: c for c in paper.comparisons}
    assert any(text.startswith("kNN 30.0 vs 46.0 %") for text in by_name["joint"].worse)
    assert any(text.startswith("used 10 vs 12") for text in by_name["fixed"].fewer)
    to_fixed = [text for texts in vars(by_name["fixed"]).values() if isinstance(texts, list) for text in texts]
    assert to_fixed
    assert not any("unique ε" in text for text in to_fixed)
    joint = verdict("joint", arms)
    assert ("bad", "partial collapse") in joint.labels
    assert any("--prototypes decoupled" in text for text in joint.advice)
    assert any("alone says nothing" in s for s in verdict("fixed", arms).sentences)
    short = takeaways(arms)
    assert short[0].startswith("view information: joint 3.99 bits; better: decoupled (4.40); worse: koleo (3.44)")
    assert any("Collapsed" in line and "joint" in line for line in short)
    assert any("Worse than the control" in line and "decoupled-paper" in line for line in short)
    assert any(line.startswith("kNN") and "decoupled-paper (30.0)" in line for line in short)


@pytest.mark.usefixtures("no_figures")
def test_one_run_reads_as_one_run(tmp_path: Path) -> None:
    page = Page(render([read_run(make_run(tmp_path, "decoupled"))], tmp_path / "report.html"))
    assert "In short" not in page.text
    assert "Against joint" not in page.text
    assert "No control was run" in page.text
    assert "Next:" in page.text
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


@pytest.mark.usefixtures("no_figures")
def test_missing_entries_and_odd_values(tmp_path: Path) -> None:
    full = make_summary("joint")
    for name in full:
        if name != "name":
            run = RunRecord("joint", 0, [], {k: v for k, v in full.items() if k != name})
            render([run, RunRecord("fixed", 0, [], make_summary("fixed"))], tmp_path / "report.html")
    nothing = dict.fromkeys(full) | {"loss": float("nan"), "knn_ci95": [None, None]}
    both = [RunRecord("joint", 0, [], nothing), RunRecord("fixed", 0, [], make_summary("fixed"))]
    page = Page(render(both, tmp_path / "report.html"))
    assert page.cell("joint", "kNN") == "–"
    assert "training diverged" in page.text


@pytest.mark.usefixtures("no_figures")
def test_several_methods_stand_on_one_page(tmp_path: Path) -> None:
    made = (("dino", "joint"), ("dino", "fixed"), ("carp", "joint"), ("carp", "decoupled"))
    runs = [read_run(make_run(tmp_path, mode, method=method)) for method, mode in made]
    page = Page(render(runs, tmp_path / "report.html", ""))
    head = next(row for row in page.rows if row[0] == ["measure"])
    assert [cell[0] for cell in head[1:]] == [f"{method} {mode}" for method, mode in made]
    assert page.cell("carp decoupled", "used") == "133"
    assert "No control was run of carp. Random" in page.text
    assert "method: dino / carp" in page.text
    one = Page(render([runs[-1]], tmp_path / "report.html", ""))
    assert "carp decoupled on digits" in one.text
    assert [cell[0] for cell in next(row for row in one.rows if row[0] == ["measure"])] == ["measure", "decoupled"]


@pytest.mark.usefixtures("no_figures")
def test_sets_of_prototypes_have_columns_of_their_own(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, "joint", method="ibot", sets={"patch": make_set("joint", used=17)}))
    page = Page(render([run], tmp_path / "report.html", ""))
    assert page.cell("joint", "used") == "64"
    assert page.cell("joint · patch", "used") == "17"
    assert page.cell("joint · patch", "kNN") == "–"
    assert page.cell("joint · patch", "movement") == "0.25"
    assert "patch" not in " ".join(page.text.partition("Figure 5.")[2].partition("Figure 6.")[0].split())


@pytest.mark.usefixtures("no_figures")
def test_no_runs_at_all(tmp_path: Path) -> None:
    assert "no runs" in render([], tmp_path / "report.html")


@pytest.mark.usefixtures("no_figures")
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


@pytest.mark.usefixtures("no_figures")
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
