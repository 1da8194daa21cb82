"""The picture of a setting that runs differ in."""

from made_runs import make_run
from uncollapse.report.page import write_report
from uncollapse.report.sweep import sweeps, swept
from uncollapse.run_folder.read import read_run


def runs_of(root):
    return [
        read_run(make_run(root, arm, seed, f"{arm}-{k}-{seed}", {"prototypes.count": k}, "dino", knn=0.5 + k / 1e4))
        for arm in ("joint", "decoupled")
        for k in (256, 1024)
        for seed in (0, 1)
    ]


def test_each_arm_is_a_line_over_the_values(tmp_path):
    runs = runs_of(tmp_path / "runs")
    assert swept(runs) == ["prototypes.count"]
    ((setting, picture, words),) = sweeps(runs)
    assert setting == "K"
    assert picture.startswith("data:image/svg+xml;base64,")
    assert "kNN, %: joint 52.6 at 256 60.2 at 1024, decoupled 52.6 at 256 60.2 at 1024" in words
    write_report(runs, tmp_path / "report.html")
    assert "What K does" in (tmp_path / "report.html").read_text()


def test_runs_that_differ_in_no_number_have_none(tmp_path):
    runs = runs_of(tmp_path / "runs")
    assert sweeps([run for run in runs if run.config["prototypes.count"] == 256]) == []
    named = [read_run(make_run(tmp_path / "more", "joint", 0, n, {"optim.name": n}, "dino")) for n in ("adamw", "sgd")]
    assert sweeps(named) == []
