"""``uncollapse evaluate`` with tasks that fail, interruptions and input that cannot be used."""

import dataclasses
import json

import pytest
import torch
from command import failing, images
from PIL import Image

from uncollapse.cli.main import main
from uncollapse.evaluate.catalogue import TASKS


def test_one_failing_task_does_not_lose_the_others(run, tasks, monkeypatch, capsys):
    def broken(context):
        raise ValueError("k is 20 but there\nare 3")

    monkeypatch.setitem(TASKS, "knn", dataclasses.replace(TASKS["knn"], run=broken))
    assert failing(run, "--tasks", "knn,linear", "--json") == 1
    shown = capsys.readouterr()
    assert list(json.loads(shown.out)) == ["linear"]
    assert "teacher: knn failed: k is 20 but there are 3" in shown.err
    (data,) = json.loads((run / "evaluation.json").read_text())["data"].values()
    assert set(data["encoders"]["teacher"]["tasks"]) == {"linear"}


def test_an_interruption_keeps_the_tasks_that_were_done(run, tasks, monkeypatch):
    def stopped(context):
        raise KeyboardInterrupt

    monkeypatch.setitem(TASKS, "linear", dataclasses.replace(TASKS["linear"], run=stopped))
    assert failing(run, "--tasks", "knn,linear") == 130
    (data,) = json.loads((run / "evaluation.json").read_text())["data"].values()
    assert set(data["encoders"]["teacher"]["tasks"]) == {"knn"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tasks", "knnn"], "no task 'knnn' (did you mean knn?)"),
        (["--tasks", "knnn,all"], "no task 'knnn'"),
        (["--masks", "nowhere"], "--masks: nowhere is no folder"),
        (["--tasks", ","], "no task named"),
        (["--tasks", "transfer"], "--sets"),
        (["--tasks", "segment"], "--masks"),
        (["--limit", "1"], "--limit: must be at least 2"),
        (["--batch", "0"], "--batch"),
        (["--max-steps", "0"], "--max-steps: must be at least 1"),
        (["--workers", "-1"], "--workers"),
        (["--long-tail", "0.5"], "--long-tail"),
        (["--cache", "x", "--no-cache"], "exclude each other"),
        (["--weights", "x"], "is for timm:NAME"),
        (["--optim.lr", "1"], "takes no --optim.lr"),
        (["--data", "nowhere"], "nowhere"),
        (["--data", "builtin:letters"], "builtin"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(run, tasks, capsys, words, says):
    assert failing(run, *words) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert says in line
    assert line.startswith("uncollapse: error: ")
    assert not (run / "evaluation.json").exists()


@pytest.mark.parametrize("source", ["none.pth", "timm:none"])
def test_a_source_that_is_none(tasks, tmp_path, capsys, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert failing(source, "--data", "builtin:digits") == 2
    assert "none" in capsys.readouterr().err


def test_data_is_needed_where_the_encoder_has_none(tasks, capsys):
    assert failing("timm:resnet10t") == 2
    assert "--data TRAIN[,TEST]" in capsys.readouterr().err


def test_untrained_of_a_random_model_is_refused(tasks, capsys):
    assert failing("timm:resnet10t", "--untrained", "--data", "builtin:digits") == 2
    assert "random start already" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["train", "test"])
def test_data_without_labels_names_the_file_and_the_tasks(run, tasks, tmp_path, capsys, part):
    for name in ("train", "test"):
        images(tmp_path / name, "ab", 3)
    for i, path in enumerate((tmp_path / part).rglob("*.png")):
        path.rename(tmp_path / part / f"{i}.png")
    assert failing(run, "--data", f"{tmp_path / 'train'},{tmp_path / 'test'}", "--tasks", "knn,linear") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{tmp_path / part}: no labels, which knn, linear need" in line
    assert "no image lies in a sub-folder, whose name would be its class" in line


def test_one_class_is_nothing_to_tell_apart(run, tasks, tmp_path, capsys):
    images(tmp_path / "train", "a", 5)
    assert failing(run, "--data", tmp_path / "train") == 2
    assert "all of one class" in capsys.readouterr().err


def test_damaged_weights_are_named_before_any_task(tmp_path, tasks, capsys, run):
    path = next((run / "checkpoints").glob("*.pt"))
    content = torch.load(path, weights_only=True)
    content["teacher"] = {n: t * float("nan") if t.is_floating_point() else t for n, t in content["teacher"].items()}
    torch.save(content, tmp_path / "bad.pt")
    assert failing(tmp_path / "bad.pt", "--data", "builtin:digits", "--no-cache") == 2
    assert "images are NaN or infinite" in capsys.readouterr().err
    assert tasks == []


def test_a_class_without_training_images_is_said(run, tasks, tmp_path, capsys):
    images(tmp_path / "train", "abc", 3)
    images(tmp_path / "test", "abc", 2)
    for path in (tmp_path / "train" / "c").iterdir():
        path.unlink()
    Image.new("RGB", (9, 9)).save(tmp_path / "train" / "a" / "z.png")
    main(["evaluate", str(run), "--data", f"{tmp_path / 'train'},{tmp_path / 'test'}", "--tasks", "knn"])
    said = "1 class(es) of the test part have no training image: their 2 test images stay in"
    assert said in capsys.readouterr().out
    (data,) = json.loads((run / "evaluation.json").read_text())["data"].values()
    assert any(said in note for note in data["encoders"]["teacher"]["notes"])


def test_columns_are_named_as_in_training(run, tasks, tmp_path, capsys):
    images(tmp_path, "ab", 8)
    lines = [f"{c}/{i}.png,{c}" for c in "ab" for i in range(8)]
    (tmp_path / "set.csv").write_text("\n".join(["where,breed", *lines]))
    words = (run, "--data", tmp_path / "set.csv", "--data.image", "where", "--tasks", "knn", "--out", tmp_path / "out")
    assert failing(*words, "--data.label", "race") == 2
    assert "data.label: no column 'race'; columns are where, breed" in capsys.readouterr().err
    main(["evaluate", *map(str, words), "--data.label", "breed"])
    (data,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())["data"].values()
    assert data["encoders"]["teacher"]["tasks"]["knn"]
