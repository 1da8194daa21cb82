"""Labelled pairs from every layout: what is found, how classes are numbered, and what a long tail keeps."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from red_images import folders, reds
from uncollapse.config.schema import DataConfig
from uncollapse.data.images import LazyImages
from uncollapse.data.load import load_images
from uncollapse.errors import DataError
from uncollapse.evaluate.data.pair import load_pair, open_pair, proportional_rows, split_spec

LAZY = DataConfig(memory_gb=0)


def parquet(path: Path, labels: list[int], names: list[str] | None) -> Path:
    cells = []
    for i in range(len(labels)):
        out = io.BytesIO()
        Image.new("RGB", (6, 4), (i, 0, 0)).save(out, "PNG")
        cells.append({"bytes": out.getvalue(), "path": f"{i}.png"})
    table = pa.table(
        {
            "image": pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "label": pa.array(labels, pa.int64()),
        }
    )
    features: dict[str, object] = {"image": {"_type": "Image"}}
    if names is not None:
        features["label"] = {"_type": "ClassLabel", "names": names}
    meta = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(meta), path)
    return path


# --- the parts ----------------------------------------------------------------------------------------------


def test_held_out_images_are_those_that_training_holds_out(tmp_path):
    folders(tmp_path, {"a": 12, "b": 9, "c": 7})
    for seed in (0, 3):
        ours, theirs = load_pair(str(tmp_path), seed), load_images(tmp_path, DataConfig(), seed)
        for mine, other in zip(ours, theirs, strict=True):
            assert reds(mine) == reds(other)
            assert torch.equal(mine.labels, other.labels)


def test_digits_are_those_that_training_has():
    ours, theirs = load_pair("builtin:digits", 1), load_images("builtin:digits", DataConfig(), 1)
    assert torch.equal(ours[0].canvas, theirs[0].canvas)
    assert torch.equal(ours[1].canvas, theirs[1].canvas)


def test_a_given_test_part_is_used_in_full(tmp_path):
    folders(tmp_path / "train", {"a": 3, "b": 3})
    folders(tmp_path / "val", {"a": 9, "b": 9})
    config = DataConfig(held_out_max=5)
    assert [len(s) for s in load_pair(str(tmp_path), config=config)] == [6, 18]
    # Of a TEST with parts of its own, its held-out part.
    other = folders(tmp_path / "other", {"a": 4, "b": 4})
    assert [len(s) for s in load_pair(f"{other},{tmp_path}")] == [8, 18]
    assert [len(s) for s in load_pair(f"{other},{tmp_path / 'val'}")] == [8, 18]


def test_large_sets_are_decoded_on_demand_and_travel_to_workers(tmp_path):
    folders(tmp_path, {"a": 12, "b": 9})
    train, test = load_pair(str(tmp_path), config=LAZY, limit=8)
    assert isinstance(train, LazyImages)
    assert isinstance(test, LazyImages)
    assert reds(pickle.loads(pickle.dumps(train))) == reds(load_pair(str(tmp_path), limit=8)[0])


def test_commas(tmp_path):
    a, b = folders(tmp_path / "a,b", {"x": 3, "y": 3}), folders(tmp_path / "c", {"x": 2, "y": 2})
    assert split_spec(f"{a}") == (str(a), None)
    assert split_spec(f"{a},{b}") == (str(a), str(b))
    assert split_spec(f"{b},{a}") == (str(b), str(a))
    assert split_spec("p\\,q,r") == ("p,q", "r")
    assert split_spec("new,other") == ("new", "other")
    assert [len(s) for s in load_pair(f"{a},{b}")] == [6, 4]
    for bad in ("a,b,c", ",b", "a,"):
        with pytest.raises(DataError, match="TRAIN,TEST"):
            split_spec(bad)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("/no/such/place", "no such"),
        ("builtin:letters", "no such built-in"),
        ("list:/none.txt@/x", "no such file"),
        ("inat:/none", "no such file"),
        ("torchvision:CIFAR10", "FOLDER"),
        ("torchvision:Nope@/x", "no set 'Nope'"),
    ],
)
def test_what_is_not_there_is_named(spec, words):
    with pytest.raises(DataError, match=words):
        load_pair(spec)


def test_limit_keeps_the_classes_shares(tmp_path):
    folders(tmp_path / "train", {"a": 40, "b": 20, "c": 10})
    folders(tmp_path / "test", {"a": 10, "b": 10, "c": 10})
    train, test = load_pair(str(tmp_path), 0, limit=14)
    assert train.labels.bincount().tolist() == [8, 4, 2]
    assert sorted(test.labels.bincount().tolist()) == [4, 5, 5]
    assert reds(train) == reds(load_pair(str(tmp_path), 0, limit=14)[0])
    assert reds(train) != reds(load_pair(str(tmp_path), 1, limit=14)[0])
    with pytest.raises(DataError, match="limit"):
        load_pair(str(tmp_path), limit=0)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 100), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_proportional_rows(counts, most, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    most = min(most, len(labels))
    rows = proportional_rows(labels, most, seed)
    assert len(rows) == len(set(rows.tolist())) == most
    kept = np.bincount(labels[rows], minlength=len(counts))
    assert (np.abs(kept - np.array(counts) * most / len(labels)) < 1).all()


# --- classes ------------------------------------------------------------------------------------------------


def test_classes_are_aligned_by_name(tmp_path):
    train = folders(tmp_path / "one", {"ant": 4, "bee": 4, "cow": 4})
    test = folders(tmp_path / "two", {"bee": 2, "cow": 3, "dog": 1}, first=20)
    pair = open_pair(f"{train},{test}")
    assert pair.train.classes == pair.test.classes == ["ant", "bee", "cow", "dog"]
    assert pair.test.labels.tolist() == [1, 1, 2, 2, 2, 3]
    assert len(pair.notes) == 1
    assert "'dog'" in pair.notes[0]
    with pytest.warns(UserWarning, match="dog"):
        load_pair(f"{train},{test}")


def test_classes_without_a_name_are_aligned_by_number(tmp_path):
    train = folders(tmp_path / "one", {"ant": 4, "bee": 4})
    test = parquet(tmp_path / "t.parquet", [1, 0, 3], None)
    pair = open_pair(f"{train},{test}")
    assert pair.test.labels.tolist() == [1, 0, 3]
    assert pair.test.classes == ["ant", "bee", "2", "3"]
    assert "2 to 3" in pair.notes[0]


def test_parts_without_a_common_class_are_refused(tmp_path):
    train, test = folders(tmp_path / "one", {"ant": 2, "bee": 2}), folders(tmp_path / "two", {"x": 2, "y": 2})
    with pytest.raises(DataError, match=r"share no class.*ant.*'x'"):
        load_pair(f"{train},{test}")


def test_odd_folders_are_named_and_nothing_is_merged(tmp_path):
    folders(tmp_path, {"Dog": 12, "dog": 12, "cat ": 12, ".hidden": 1})
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.png").write_bytes(b"nothing")
    for config in (DataConfig(), LAZY):
        pair = open_pair(str(tmp_path), config=config)
        notes = "\n".join(pair.notes)
        for words in (
            "'Dog', 'dog' differ only",
            "'cat ' begin or end",
            "'.hidden' hold",
            "'empty' hold no image",
            "without a readable training image: 'broken'",
        ):
            assert words in notes
        assert pair.train.classes == ["Dog", "broken", "cat ", "dog"]
    assert not open_pair(str(folders(tmp_path / "fine", {"a": 4, "b": 4}))).notes


def test_unlabelled_images_have_no_labels(tmp_path):
    folders(tmp_path, {"": 12})
    train, test = load_pair(str(tmp_path))
    assert train.labels is None
    assert test.labels is None
    with pytest.raises(DataError, match="no labels"):
        load_pair(str(tmp_path), long_tail=2)


# --- long tails ---------------------------------------------------------------------------------------------


def test_long_tails_leave_the_test_part_alone(tmp_path):
    folders(tmp_path / "train", {"a": 40, "b": 38, "c": 41})
    folders(tmp_path / "test", {"a": 4, "b": 4, "c": 4})
    train, test = load_pair(str(tmp_path), long_tail=10)
    assert train.labels.bincount().tolist() == [40, 12, 4]
    assert test.labels.bincount().tolist() == [4, 4, 4]
    assert load_pair(str(tmp_path), long_tail=1)[0].labels.bincount().tolist() == [40, 38, 41]


@pytest.mark.parametrize("config", [DataConfig(), LAZY])
def test_test_images_that_are_training_images_are_refused_or_counted(tmp_path, config):
    root = folders(tmp_path / "set", {"a": 6, "b": 6})
    with pytest.raises(DataError, match="every test image is a training image too"):
        open_pair(f"{root},{root}", config=config)
    lines = [f"{root}/{c}/{k:03}.png {n}" for n, c in enumerate("ab") for k in range(6)]
    (tmp_path / "train.txt").write_text("\n".join(lines[:-2]))
    (tmp_path / "test.txt").write_text("\n".join(lines[-4:]))
    pair = open_pair(f"list:{tmp_path}/train.txt@/,list:{tmp_path}/test.txt@/", config=config)
    assert any("2 of 4 test images are training images too (the same file)" in note for note in pair.notes)
    assert not any("too" in note for note in open_pair(str(root), config=config).notes)


def test_copies_of_training_images_are_counted_where_pixels_are_at_hand(tmp_path):
    train, test = folders(tmp_path / "x", {"a": 3, "b": 3}), folders(tmp_path / "y", {"a": 3, "b": 3}, first=4)
    notes = open_pair(f"{train},{test}").notes
    assert any("2 of 6 test images are training images too (the same pixels)" in note for note in notes)


def test_parquet_files_with_other_classes_are_not_shards_of_one_set(tmp_path):
    parquet(tmp_path / "train-0.parquet", [0, 1, 0], ["cat", "dog"])
    parquet(tmp_path / "train-1.parquet", [0, 1, 1], ["dog", "cat"])
    with pytest.raises(DataError, match=r"train-1.parquet: its classes \(dog, cat\) are not those of .*train-0"):
        open_pair(str(tmp_path))


def test_a_row_without_a_label_is_named(tmp_path):
    parquet(tmp_path / "train.parquet", [0, 1, -1, 0], ["cat", "dog"])
    train = open_pair(str(tmp_path)).train
    assert train.labels is None
    assert "row 2: its 'label' is -1" in train.about_labels
