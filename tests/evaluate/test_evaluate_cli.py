"""``uncollapse evaluate`` from the command line: what it prints, keeps, refuses and survives."""

import dataclasses
import json

import pytest
import torch
from command import failing, images

from uncollapse.cli.main import main
from uncollapse.config.load import load_config
from uncollapse.config.tiny import tiny
from uncollapse.evaluate import extract as extraction
from uncollapse.evaluate.catalogue import TASKS, Task, chosen
from uncollapse.report.numbers import interval, metric_text
from uncollapse.run_folder.checkpoint import save_checkpoint
from uncollapse.training.state import build_state, state_dicts

# ------------------------------------------------------------------------------------------ what it does


def test_a_run_is_evaluated_on_its_own_data(run, tasks, capsys):
    main(["evaluate", str(run)])
    shown = capsys.readouterr()
    assert [name for name, _ in tasks] == ["knn", "linear", "cluster", "prototypes"]  # digits are balanced
    context = tasks[0][1]
    from uncollapse.config.schema import DataConfig
    from uncollapse.data.load import load_images

    train, held = load_images("builtin:digits", DataConfig(), 0)  # the very split that training held out
    assert (len(context.train), len(context.test)) == (len(train), len(held))
    assert torch.equal(context.test.labels, held.labels)
    assert "40.0–60.0" in shown.out
    assert "protocol of knn" in shown.out
    assert "uncollapse evaluate" not in shown.out
    content = json.loads((run / "evaluation.json").read_text())
    kept = content["data"]["builtin:digits"]["encoders"]["teacher"]
    assert kept["step"] == 7
    assert set(kept["tasks"]) == {"knn", "linear", "cluster", "prototypes"}
    assert kept["tasks"]["knn"]["n"] == len(held)
    assert kept["tasks"]["knn"]["ci95"] == [0.4, 0.6]
    assert kept["tasks"]["knn"]["command"].startswith("uncollapse")


def test_the_second_call_reads_features_and_keeps_older_results(run, tasks, capsys, monkeypatch):
    main(["evaluate", str(run), "--tasks", "knn"])
    assert "from cache" not in capsys.readouterr().err

    def never(encoder, x):
        raise AssertionError("computed again")

    monkeypatch.setattr(extraction, "forward", never)
    main(["evaluate", str(run), "--tasks", "retrieval", "fewshot"])
    assert capsys.readouterr().err.count("features from cache") == 2
    content = json.loads((run / "evaluation.json").read_text())
    assert set(content["data"]["builtin:digits"]["encoders"]["teacher"]["tasks"]) == {"knn", "retrieval", "fewshot"}


def test_json_is_all_there_is_on_stdout(run, tasks, capsys):
    main(["evaluate", str(run), "--tasks", "knn,cluster", "--json", "--untrained"])
    shown = capsys.readouterr().out
    content = json.loads(shown)
    expected = {
        "top1": 0.5,
        "count": 12.0,
        "ci95": [0.4, 0.6],
        "n": 360,
        "protocol": "protocol of knn",
        "source": "source of knn",
    }
    n = content["knn"]["n"]
    assert content["knn"] == {**expected, "n": n, "untrained": {**expected, "n": n}}
    assert list(content) == ["knn", "cluster"]
    kept = json.loads((run / "evaluation.json").read_text())["data"]["builtin:digits"]["encoders"]
    assert set(kept) == {"teacher", "untrained"}
    assert kept["teacher"]["weights"] != kept["untrained"]["weights"]


def test_the_student_has_features_of_its_own(run, tasks, capsys):
    main(["evaluate", str(run), "--tasks", "knn"])
    main(["evaluate", str(run), "--tasks", "knn", "--side", "student"])
    assert "from cache" not in capsys.readouterr().err
    teacher, student = (context.train.cls for _, context in tasks)
    assert not torch.equal(teacher, student)
    kept = json.loads((run / "evaluation.json").read_text())["data"]["builtin:digits"]["encoders"]
    assert set(kept) == {"teacher", "student"}


def test_a_timm_model_on_a_folder_and_another_out(tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "train", "ab", 4)
    images(tmp_path / "test", "ab", 3, seed=1)
    main(["evaluate", "timm:resnet10t", "--data", "train,test", "--size", "32", "--batch", "3", "--workers", "0"])
    assert "random weights" in capsys.readouterr().out
    kept = json.loads((tmp_path / "runs/evaluate-resnet10t/evaluation.json").read_text())
    data = kept["data"]["train,test"]
    assert (data["n_train"], data["n_test"], data["classes"]) == (8, 6, 2)
    assert set(data["encoders"]["timm:resnet10t"]["tasks"]) == {"knn", "linear", "cluster"}  # it has no prototypes
    assert list((tmp_path / "runs/features").iterdir())
    main(
        [
            "evaluate",
            "timm:resnet10t",
            "--data",
            "train,test",
            "--size",
            "32",
            "--out",
            "here",
            "--no-cache",
            "--tasks",
            "all",
        ]
    )
    shown = capsys.readouterr().out
    assert "prototypes left out" in shown
    assert "transfer left out: it needs --sets" in shown
    assert (tmp_path / "here/evaluation.json").is_file()


def test_transfer_needs_no_data_of_its_own(tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "a", "xy", 5)
    words = ["--tasks", "transfer", "--sets", "a", "builtin:digits", "--size", "32", "--workers", "0"]
    main(["evaluate", "timm:resnet10t", *words])
    ((name, context),) = tasks
    assert name == "transfer"
    assert context.train is None
    assert list(context.sets) == ["a", "builtin:digits"]
    train, test = context.extract("a")  # made when it is asked for, and then cached
    assert (len(train), len(test)) == (8, 2)
    kept = json.loads((tmp_path / "runs/evaluate-resnet10t/evaluation.json").read_text())
    assert list(kept["data"]) == ["a, builtin:digits"]


def test_scalars_and_the_report_have_the_evaluation(run, tasks, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run / "summary.json").write_text(json.dumps({"name": "joint", "seed": 0, "prototypes": 64, "data": "digits"}))
    main(["evaluate", str(run), "--tasks", "knn"])
    (folder,) = (run / "tensorboard").glob("evaluate-*")
    events = EventAccumulator(str(folder))
    events.Reload()
    (scalar,) = events.Scalars("evaluate/knn/top1")
    assert (scalar.step, scalar.value) == (7, 0.5)
    page = (run / "report.html").read_text()
    assert "protocol of knn" in page
    assert "builtin:digits" in page


def test_results_of_older_weights_are_not_mixed_with_new_ones(run, tasks, capsys):
    main(["evaluate", str(run), "--tasks", "knn"])
    config = tiny(load_config("demo", {"data.path": "builtin:digits", "seed": 3}))
    state = build_state(config)
    save_checkpoint(run / "checkpoints", 9, {"config": dataclasses.asdict(config), **state_dicts(state)}, 1)
    main(["evaluate", str(run), "--tasks", "linear"])
    (data,) = json.loads((run / "evaluation.json").read_text())["data"].values()
    assert set(data["encoders"]["teacher"]["tasks"]) == {"linear"}
    assert data["encoders"]["teacher"]["step"] == 9


def test_results_of_other_images_or_sizes_are_not_mixed(run, tasks, tmp_path, capsys):
    def kept():
        (data,) = json.loads((run / "evaluation.json").read_text())["data"].values()
        return set(data["encoders"]["teacher"]["tasks"])

    images(tmp_path / "set", "ab", 12)
    data = ["evaluate", str(run), "--data", str(tmp_path / "set")]
    main([*data, "--tasks", "knn"])
    main([*data, "--tasks", "cluster"])
    assert kept() == {"knn", "cluster"}
    main([*data, "--tasks", "retrieval", "--size", "16"])
    assert kept() == {"retrieval"}
    (tmp_path / "set" / "a" / "0.png").unlink()
    main([*data, "--tasks", "fewshot", "--size", "16"])
    assert kept() == {"fewshot"}


def test_unreadable_images_are_said_and_stored_whatever_the_output(run, tasks, tmp_path, capsys):
    images(tmp_path / "train", "ab", 30)
    images(tmp_path / "test", "ab", 30, seed=1)
    (tmp_path / "test" / "a" / "3.png").write_bytes(b"")
    words = ["evaluate", str(run), "--data", f"{tmp_path / 'train'},{tmp_path / 'test'}", "--tasks", "knn"]
    main([*words, "--json"])
    shown = capsys.readouterr()
    json.loads(shown.out)
    said = "1 test image(s) cannot be read and are left out: "
    assert said in shown.err
    assert "3.png" in shown.err
    (data,) = json.loads((run / "evaluation.json").read_text())["data"].values()
    assert any(said in note for note in data["encoders"]["teacher"]["notes"])


def test_sets_whose_paths_end_alike_have_runs_of_their_own_in_tensorboard(run, tasks, tmp_path):
    for name in "xy":
        images(tmp_path / name / "train", "ab", 6, seed=ord(name))
        images(tmp_path / name / "test", "ab", 2, seed=ord(name) + 5)
        pair = f"{tmp_path / name / 'train'},{tmp_path / name / 'test'}"
        main(["evaluate", str(run), "--data", pair, "--tasks", "knn"])
    assert len(list((run / "tensorboard").glob("evaluate-*"))) == 2


def test_a_task_that_failed_leaves_no_empty_entry(run, tasks, monkeypatch, capsys):
    def work(context):
        raise ValueError("no")

    monkeypatch.setitem(TASKS, "knn", dataclasses.replace(TASKS["knn"], run=work))
    assert failing(run, "--tasks", "knn") == 1
    assert not (run / "evaluation.json").exists()


def test_all_may_stand_among_other_tasks(run, tasks, capsys):
    main(["evaluate", str(run), "--tasks", "knn,all"])
    assert {"knn", "linear", "retrieval", "finetune"} <= {name for name, _ in tasks}


def test_a_damaged_evaluation_is_put_aside(run, tasks, capsys):
    (run / "evaluation.json").write_text("{")
    main(["evaluate", str(run), "--tasks", "knn"])
    assert (run / "evaluation.json.old").read_text() == "{"
    assert json.loads((run / "evaluation.json").read_text())["format"] == 1
    assert "is kept as" in capsys.readouterr().err


def test_the_protocols_themselves_from_one_end_to_the_other(run, capsys):
    """No stand-ins: what the command gives must be what the functions give on the same features."""
    names = ["knn", "linear", "longtail", "cluster", "prototypes", "fewshot", "retrieval"]
    main(["evaluate", str(run), "--tasks", ",".join(names), "--limit", "240", "--json"])
    shown = capsys.readouterr()
    content = json.loads(shown.out)
    assert list(content) == names
    for name, task in content.items():
        low, high = task["ci95"]
        headline = next(iter(task.values()))
        assert low <= headline <= high, name
        assert task["n"] == 240
        assert task["protocol"]
        assert task["source"]
    from uncollapse.evaluate.data.pair import load_pair
    from uncollapse.evaluate.extract import extract
    from uncollapse.evaluate.source import open_encoder
    from uncollapse.evaluate.tasks.knn import knn

    encoder = open_encoder(run)
    train, test = load_pair("builtin:digits", 0, 240)
    expected = knn(extract(encoder, train), extract(encoder, test)).to_json()
    assert content["knn"]["top1"] == expected["top1"] > 0.5
    (of_set,) = json.loads((run / "evaluation.json").read_text())["data"].values()
    assert all(task["command"] for task in of_set["encoders"]["teacher"]["tasks"].values())


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("top1", 0.5, "50.0 %"),
        ("ari", -0.012, "-1.2 %"),
        ("top1", 1.0, "100.0 %"),
        ("kmeans_clusters", 1.0, "1"),
        ("prototypes", 64, "64"),
        ("class_entropy_bits", 0.25, "0.25"),
        ("few_prototypes_per_class", 0.674, "0.674"),
        ("map_per_class", 0.674, "67.4 %"),
        ("images", 12345, "12,345"),
        ("top1", None, "–"),
        ("top1", float("nan"), "–"),
    ],
)
def test_metrics_as_text(name, value, text):
    assert metric_text(name, value) == text


@pytest.mark.parametrize(
    ("ci95", "text"),
    [([0.4, 0.6], "40.0–60.0"), ([-0.01, 0.02], "-1.0 to 2.0"), ([None, None], ""), ([1.5, 3.0], "1.5–3"), (None, "")],
)
def test_intervals_as_text(ci95, text):
    assert interval(ci95) == text


# ------------------------------------------------------------------------------------- choosing tasks


@dataclasses.dataclass
class Plain:
    name: str = "x"
    vectors: object = None
    head: object = None


def test_the_default_tasks_follow_encoder_and_data(tmp_path):
    plain, full = Plain(), Plain(vectors=1, head=1)

    def names(asked, encoder, counts=(5, 5), sets=(), masks=None):
        return [t.name for t in chosen(asked, encoder, counts, sets, masks)[0]]

    assert names(None, plain) == ["knn", "linear", "cluster"]
    assert names(None, full, (100, 10)) == ["knn", "linear", "longtail", "cluster", "prototypes"]
    assert names(None, plain, sets=["a"], masks=tmp_path) == ["knn", "linear", "cluster", "segment", "transfer"]
    assert names(["all"], full, sets=["a"], masks=tmp_path) == list(TASKS)
    assert names(["linear", "knn", "linear"], plain) == ["linear", "knn"]
    assert isinstance(TASKS["knn"], Task)
