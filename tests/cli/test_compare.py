"""Objectives × modes × seeds through the command line: the grid, its tables, and going on where it stopped."""

import csv
import json
import shutil

import pytest

from uncollapse.cli.main import main
from uncollapse.config.load import load_config, recipe_names

WORDS = ["compare", "--recipes", "carp-small32", "dino-small32", "--prototypes", "joint", "fixed"]
DIGITS = ["--recipes", "dino-small32", "--data", "builtin:digits"]
WORDS += ["--data", "builtin:digits", "--tiny", "--max-steps", "2", "--device", "cpu"]


@pytest.mark.slow
def test_a_grid_is_trained_once_and_becomes_tables(tmp_path, capsys):
    out = tmp_path / "grid"
    main([*WORDS, "--out", str(out)])
    capsys.readouterr()
    rows = json.loads((out / "summary.json").read_text())["arms"]
    assert [(r["method"], r["name"]) for r in rows] == [
        (method, mode) for method in ("carp", "dino") for mode in ("joint", "fixed")
    ]
    table = list(csv.DictReader((out / "table.csv").open()))
    assert len(table) == 4
    assert len({row["arm"] for row in table}) == 4
    assert all(float(row["kNN, %"]) > 20 for row in table)
    text = (out / "table.md").read_text()
    assert text.count("\n| `") == 4 + 2 + 2  # values; fixed against joint, joint against fixed, within each method
    assert (out / "report.html").stat().st_size > 50_000

    # One cell is lost; the others are not trained again.
    shutil.rmtree(out / "runs" / "dino-small32-fixed-0")
    before = {p: p.stat().st_mtime_ns for p in out.glob("runs/*/checkpoints/*.pt")}
    main([*WORDS, "--out", str(out)])
    after = {p: p.stat().st_mtime_ns for p in out.glob("runs/*/checkpoints/*.pt")}
    assert before.items() <= after.items()
    assert len(after) > len(before)


@pytest.mark.slow
def test_arms_leave_one_run_in_mid_run(tmp_path, capsys):
    out = tmp_path / "grid"
    words = ["compare", "--recipes", "dino-small32", "--prototypes", "joint", "decoupled", "--data", "builtin:digits"]
    words += ["--tiny", "--max-steps", "3", "--branch", "2", "--device", "cpu", "--out", str(out)]
    main(words)
    capsys.readouterr()
    rows = json.loads((out / "summary.json").read_text())["arms"]
    assert [r["name"] for r in rows] == ["joint", "decoupled"]
    (trunk,) = (out / "trunks").iterdir()
    logs = [trunk / "metrics.jsonl", *sorted(out.glob("runs/*/metrics.jsonl"))]
    steps = [[json.loads(line)["step"] for line in log.read_text().splitlines()] for log in logs]
    assert [max(steps[0]), min(steps[1]), min(steps[2])] == [2, 3, 3]
    assert "leave one run with joint prototypes at step 2" in (out / "report.html").read_text()


def grid_of(words, monkeypatch, tmp_path):
    """The cells and trunks that a command would train."""
    grids = []
    monkeypatch.setattr("uncollapse.cli.grid.write_grid", lambda *asked, as_json: grids.append(asked))
    start = ["compare", "--recipes", "dino-small32", "--data", "builtin:digits", "--out", str(tmp_path), *words]
    main([*start, "--device", "cpu"])
    ((cells, *_, (trunks, step)),) = grids
    return cells, trunks, step


def test_every_value_of_a_sweep_meets_every_other_one(monkeypatch, tmp_path):
    words = ["--prototypes", "joint", "memory", "--sweep", "prototypes=256,1024", "optim.lr=1e-3,3e-3"]
    cells, trunks, _ = grid_of([*words, "--freeze", "prototypes@7"], monkeypatch, tmp_path)
    settings = [
        (c.config.prototypes.kind, c.config.prototypes.count, c.config.optim.lr, c.config.change.freeze) for c in cells
    ]
    assert len(set(settings)) == len(settings) == 2 * 2 * 2 * 2
    assert len({c.out for c in cells}) == len({c.name for c in cells}) == 16
    assert not trunks


def test_a_trunk_for_each_row_of_the_grid(monkeypatch, tmp_path):
    words = ["--prototypes", "joint", "fixed", "--seeds", "2", "--sweep", "prototypes=256,1024", "--branch", "50"]
    cells, trunks, step = grid_of([*words, "--trunk", "koleo"], monkeypatch, tmp_path)
    assert (len(cells), len(trunks), step) == (8, 4, 50)
    by_folder = {str(t.out.resolve()): t.config for t in trunks}
    for cell in cells:
        trunk = by_folder[cell.config.change.branch]
        assert trunk.prototypes.kind == "koleo"
        assert (trunk.seed, trunk.prototypes.count) == (cell.config.seed, cell.config.prototypes.count)
        assert cell.config.change.branch_step == 50


def test_a_cell_that_fails_leaves_the_others(tmp_path, capsys):
    out = tmp_path / "grid"
    words = ["compare", "--recipes", "dino-small32", "--prototypes", "joint", "fixed", "--data", "builtin:digits"]
    words += ["--tiny", "--max-steps", "1", "--device", "cpu", "--out", str(out), "--jobs", "1"]
    (out / "runs" / "dino-small32-joint-0").mkdir(parents=True)
    (out / "runs" / "dino-small32-joint-0" / "metrics.jsonl").write_text("precious")
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code != 0
    said = capsys.readouterr()
    assert "1 of 2 runs failed" in said.err
    assert "go on with: uncollapse compare" in said.err
    assert [r["name"] for r in json.loads((out / "summary.json").read_text())["arms"]] == ["fixed"]
    assert (out / "runs" / "dino-small32-joint-0" / "metrics.jsonl").read_text() == "precious"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--recipes", "dino-small23", "--data", "builtin:digits"], "did you mean dino-small32"),
        (["--recipes", "dino-small32"], "--data PATH"),
        (["--recipes", "dino-small32", "--data", "/no/such/place"], "/no/such/place"),
        (["--recipes", "dino-small32", "--data", "builtin:digits", "--seeds", "0"], "--seeds"),
        (["--recipes", "dino-small32", "--data", "builtin:digits", "--optim.lr", "x"], "optim.lr"),
        (["--recipes", "dino-small32", "--data", "builtin:digits", "--sweep", "prototypes"], "prototypes=256,1024"),
        (["--recipes", "dino-small32", "--data", "builtin:digits", "--sweep", "optim.l=1"], "did you mean 'lr'"),
        (["--recipes", "dino-small32", "--data", "builtin:digits", "--sweep", "seed=1,2"], "take --seeds"),
        (["--recipes", "dino-small32", "--data", "builtin:digits", "--freeze", "teacher@2"], "change.freeze"),
        (["--recipes", "dino-small32", "--data", "builtin:digits", "--branch", "0"], "--branch"),
        ([*DIGITS, "--prototypes", "joint", "joint-sinkhom"], "did you mean joint-sinkhorn?"),
    ],
)
def test_what_cannot_be_compared_is_said_before_any_training(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", *words, "--out", str(tmp_path / "grid")])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "grid").exists()


def test_recipes_are_listed_with_method_and_source(capsys):
    main(["recipes", "--names"])
    assert capsys.readouterr().out.split() == recipe_names()
    main(["recipes"])
    shown = capsys.readouterr().out
    assert "carp" in shown
    assert "dino-vmf" in shown
    main(["recipe", "carp-small32"])
    assert "name: carp" in capsys.readouterr().out


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_says_what_it_is(name):
    from uncollapse.cli.recipes import _described

    assert len(_described(name)) > 20
    load_config(name)


def test_the_whole_grid_counts_cells_that_have_not_said_anything_yet():
    from uncollapse.cli.grid import whole

    assert whole([(5, 10, 2.0)], cells=4, ended=0) == (5, 40, 2.0)
    assert whole([(10, 10, 2.0), (5, 10, 4.0)], cells=4, ended=1) == (15, 40, 3.0)
    assert whole([(5, 10, 2.0)], cells=3, ended=2) == (25, 30, 2.0)  # two were finished before


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--prototypes", "joint", "--prototypes.targets", "posterior"], "only a mixture has a posterior"),
        (["--prototypes", "decoupled", "--prototypes.targets", "centred"], "carp has no centre"),
    ],
)
def test_a_pairing_that_means_nothing_is_refused_before_training_with_the_reason(words, why, tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        main(["train", "carp-small32", "--data", "builtin:digits", *words, "--out", str(out)])
    assert stop.value.code == 3
    assert why in capsys.readouterr().err
    assert not out.exists()


def test_an_arm_that_is_another_one_under_this_method_is_trained_once(tmp_path, monkeypatch):
    """SwAV balances anyway; DINO does not."""
    seen = {}

    def write_grid(cells, *_, as_json):
        seen["cells"], seen["notes"] = [cell.name for cell in cells], _[6]

    monkeypatch.setattr("uncollapse.cli.grid.write_grid", write_grid)
    words = ["--prototypes", "joint", "joint-sinkhorn", "joint-floor", "--data", "builtin:digits", "--device", "cpu"]
    main(["compare", "--recipes", "dino-small32", "swav-small32", *words, "--out", str(tmp_path / "grid")])
    assert seen["cells"] == [
        *(f"dino-small32 {arm} 0" for arm in ("joint", "joint-sinkhorn", "joint-floor")),
        *(f"swav-small32 {arm} 0" for arm in ("joint", "joint-floor")),
    ]
    assert seen["notes"] == ("swav-small32: joint-sinkhorn is what joint is there, and was not trained again.",)
