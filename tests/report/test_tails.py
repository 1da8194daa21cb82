"""Frequent against rare classes on a page and in a terminal: what the runs' evaluations hold, over seeds."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from made_runs import make_run
from uncollapse.figures.classes import class_panels
from uncollapse.figures.style import styles
from uncollapse.report.arms import group
from uncollapse.report.table import print_tails
from uncollapse.report.tails import tail_picture, tails
from uncollapse.run_folder.read import read_run

KEY = "set (long tail 100)"
TRAIN = [5, 500, 50]


def evaluated(root, arm, seed, knn, used, label="teacher"):
    """A run folder whose evaluation has these accuracies of head, body and tail, and prototypes used by each class."""
    folder = root / f"{arm}-{seed}"
    if not folder.exists():
        make_run(root, arm, seed)
    path = folder / "evaluation.json"
    content = json.loads(path.read_text()) if path.exists() else {"format": 1, "data": {KEY: {"encoders": {}}}}
    names = ("head", "body", "tail")
    content["data"][KEY]["encoders"][label] = {
        "tasks": {
            "longtail": {
                "macro": 0.5,
                **{f"knn_{name}": value for name, value in zip(names, knn, strict=True)},
                "details": {"by_class": {"train_images": TRAIN, "knn": [knn[2], knn[0], knn[1]]}},
            },
            "prototypes": {
                "top1": 0.5,
                **{f"{name}_used_per_class": value for name, value in zip(names, used, strict=True)},
                "details": {"classes": {"train_images": TRAIN, "used": [used[2], used[0], None]}},
            },
        }
    }
    path.write_text(json.dumps(content))
    return folder


def test_cells_are_means_and_deviations_over_seeds(tmp_path):
    folders = [
        evaluated(tmp_path, "joint", 0, (0.5, 0.3, 0.1), (30, 20, 10)),
        evaluated(tmp_path, "joint", 1, (0.7, 0.3, 0.2), (32, 20, 16)),
        evaluated(tmp_path, "decoupled", 0, (0.5, 0.4, 0.3), (30, 30, 30)),
    ]
    evaluated(tmp_path, "decoupled", 0, (0.1, 0.1, 0.1), (1, 1, 1), "untrained")
    runs = [read_run(folder) for folder in folders]
    found = tails(group(runs), KEY)
    assert found.columns == ["joint", "decoupled", "decoupled, untrained"]
    lines = dict(found.lines)
    assert lines["kNN, %, head"] == [f"60.0±{100 * np.std([0.5, 0.7], ddof=1):.1f}", "50.0", "10.0"]
    assert lines["used, tail"] == [f"13.0±{np.std([10, 16], ddof=1):.1f}", "30.0", "1.0"]
    assert "linear, %, head" not in lines
    assert "thirds" in found.groups
    assert found.gaps == ["decoupled"]
    assert dict(found.gap_lines)["kNN, %, tail"] == ["+20.0"]  # of the one seed that both have
    assert {"knn_head", "tail_used_per_class"} <= found.shown
    text = io.StringIO()
    print_tails(runs, Console(file=text, width=100))
    assert "kNN, %, body" in text.getvalue()
    assert "mean ± sd over 2 seeds" in text.getvalue()


def test_differences_are_seed_by_seed(tmp_path):
    """Seeds differ by far more than modes do."""
    knn = {0: 0.2, 1: 0.5, 2: 0.8}
    made = [("joint", seed, at) for seed, at in knn.items()] + [("fixed", s, at + 0.01 * s) for s, at in knn.items()]
    grouping = group([read_run(evaluated(tmp_path, arm, s, (at, at, at), (1, 1, 1))) for arm, s, at in made])
    found = tails(grouping, KEY)
    assert found.gaps == ["fixed"]
    assert dict(found.gap_lines)["kNN, %, body"] == [f"+1.0±{1 / 3**0.5:.1f}"]
    text = io.StringIO()
    print_tails([run for runs in grouping.arms.values() for run in runs], Console(file=text, width=100))
    assert "more than joint has, seed by seed ± its standard error" in text.getvalue()


def test_classes_stand_in_the_order_of_their_training_images(tmp_path):
    folders = [
        evaluated(tmp_path, "joint", 0, (0.5, 0.3, 0.1), (30, 20, 10)),
        evaluated(tmp_path, "joint", 1, (0.7, 0.3, 0.2), (32, 20, 16)),
    ]
    arms = group([read_run(folder) for folder in folders]).arms
    picture = tail_picture(arms, KEY, styles(arms))
    assert picture["src"].startswith("data:image/svg+xml;base64,")
    assert "training images (500 50 5)" in picture["alt"]
    assert "kNN accuracy (%): joint 60 30 15" in picture["alt"]
    assert "Used: joint 31 nan 13" in picture["alt"]


@pytest.mark.parametrize(
    "details",
    [{}, {"by_class": 3}, {"by_class": {"train_images": [1], "knn": [0.1, 0.2]}}]
    + [{"by_class": {"train_images": counts, "knn": [0.1, 0.2]}} for counts in (["a", 1], [0, 0], [-1, 4], None)],
)
def test_details_that_no_evaluation_wrote_have_no_picture(details, tmp_path):
    run = read_run(evaluated(tmp_path, "joint", 0, (0.5, 0.3, 0.1), (30, 20, 10)))
    run.evaluation[KEY]["encoders"]["teacher"]["tasks"] = {"longtail": {"knn_head": 0.5, "details": details}}
    arms = group([run]).arms
    assert tail_picture(arms, KEY, styles(arms)) is None
    assert tails(group([run]), KEY) is None  # one group has nothing to stand against
    assert tails(group([run]), "another set") is None


def test_many_classes_become_as_many_points_as_can_be_seen():
    train = np.arange(300, 0, -1)
    one = np.linspace(1, 0, 300)
    few = class_panels({"kNN": {"joint": (one[:30], one[:30] * 0)}}, train[:30], styles(["joint"]))
    many = class_panels({"kNN": {"joint": (one, one * 0)}}, train, styles(["joint"]))
    assert len(many) < 1.2 * len(few)
