"""``uncollapse evaluate`` of runs that were trained on a long tail, and of several runs at once."""

import json
import shutil

import numpy as np
import pytest
import torch
from command import failing, images

from made_runs import make_summary
from uncollapse.cli.main import main
from uncollapse.config.load import dump_config, load_config
from uncollapse.config.schema import DataConfig
from uncollapse.data.load import load_images
from uncollapse.run_folder.checkpoint import load_checkpoint, save_checkpoint


def lengthen(run, factor):
    """Makes it a run on a long tail."""
    saved = load_checkpoint(run / "checkpoints")
    saved["config"]["data"]["long_tail"] = factor
    save_checkpoint(run / "checkpoints", saved.pop("step"), saved, 1)


@pytest.mark.parametrize(
    ("options", "factor", "key"),
    [
        ([], 10, "builtin:digits (long tail 10)"),
        (["--data", "builtin:digits"], 10, "builtin:digits (long tail 10)"),
        (["--long-tail", "1"], 1, "builtin:digits"),
        (["--long-tail", "5"], 5, "builtin:digits (long tail 5)"),
    ],
)
def test_a_run_on_a_long_tail_is_evaluated_on_the_same_training_images(options, factor, key, run, tasks, capsys):
    lengthen(run, 10.0)
    main(["evaluate", str(run), "--tasks", "knn", "longtail", *options])
    train, held = load_images("builtin:digits", DataConfig(long_tail=factor), 0)
    context = tasks[0][1]
    assert torch.equal(context.train.labels, train.labels)
    assert torch.equal(context.test.labels, held.labels)
    assert list(json.loads((run / "evaluation.json").read_text())["data"]) == [key]
    assert ("cut to a long tail of imbalance factor" in capsys.readouterr().out) == (factor > 1)


def test_other_data_has_no_tail_of_the_run(run, tasks, tmp_path):
    lengthen(run, 10.0)
    other = images(tmp_path / "other", "ab", 20)
    main(["evaluate", str(run), "--data", str(other), "--tasks", "knn"])
    assert tasks[0][1].train.labels.bincount().tolist() == [18, 18]


def test_all_training_images_are_grouped_by_what_the_run_was_trained_on(run, tasks, capsys):
    lengthen(run, 10.0)
    main(["evaluate", str(run), "--tasks", "longtail", "--long-tail", "1"])
    train, _ = load_images("builtin:digits", DataConfig(long_tail=10), 0)
    assert np.array_equal(tasks[0][1].frequency, train.labels.bincount())
    assert "frequent or rare as in what the encoder was trained on" in capsys.readouterr().out
    main(["evaluate", str(run), "--tasks", "longtail"])
    assert tasks[1][1].frequency is None


@pytest.fixture
def two(run):
    """Two finished runs, on a long tail, of two modes."""
    lengthen(run, 10.0)
    other = run.with_name("other")
    shutil.copytree(run, other)
    for folder, mode in ((run, "joint"), (other, "decoupled")):
        keys = {"prototypes.kind": mode, "data.path": "builtin:digits", "data.long_tail": 10.0}
        (folder / "config.yaml").write_text(dump_config(load_config("demo", keys)))
        (folder / "summary.json").write_text(json.dumps(make_summary(mode)))
    return run, other


def test_modes_stand_side_by_side(two, capsys):
    main(["evaluate", *map(str, two), "--tasks", "longtail,prototypes"])
    out = capsys.readouterr().out
    assert out.count("many > 100, few < 20 training images; head, body, tail") == 2
    table, _, gaps = out.partition("frequent against rare classes")[2].partition("more than joint has")
    assert "decoupled" in gaps
    assert "joint" in table
    assert "decoupled" in table
    content = json.loads((two[1] / "evaluation.json").read_text())["data"]["builtin:digits (long tail 10)"]
    found = content["encoders"]["teacher"]["tasks"]
    (row,) = [line for line in table.splitlines() if line.startswith("used, tail")]
    assert row.split()[-1] == f"{found['prototypes']['tail_used_per_class']:.1f}"
    (row,) = [line for line in table.splitlines() if line.startswith("kNN, %, head")]
    assert row.split()[-1] == f"{100 * found['longtail']['knn_head']:.1f}"
    page = (two[1] / "report.html").read_text()
    assert "Frequent against rare classes of builtin:digits" in page
    assert "What each class has, by mode" in page


def test_json_of_several_is_by_their_names(two, tasks, capsys):
    main(["evaluate", *map(str, two), "--tasks", "knn", "--json"])
    content = json.loads(capsys.readouterr().out)
    assert list(content) == [str(folder) for folder in two]
    assert content[str(two[0])]["knn"]["top1"] == 0.5


def test_one_place_for_the_results_of_several_is_refused(two, tasks, tmp_path, capsys):
    assert failing(*two, "--tasks", "knn", "--out", tmp_path / "out") == 2
    assert "--out: results of 2 encoders would overwrite" in capsys.readouterr().err
    assert not tasks
