"""What is found in a path: links, pipes, names of columns, CSV files, and where the held-out images come from."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from red_images import folders, reds
from uncollapse.config.schema import DataConfig
from uncollapse.data.listing import image_names
from uncollapse.data.load import described, load_images
from uncollapse.errors import DataError

LAZY = DataConfig(memory_gb=0)


def png(red: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (6, 4), (red, 100, 200)).save(out, "PNG")
    return out.getvalue()


def parquet(path: Path, n: int = 8, image: str = "image", **columns: list[object]) -> Path:
    cells = [{"bytes": png(i), "path": None} for i in range(n)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({image: cells, **columns}), path)
    return path


# --- links and other things that are no images --------------------------------------------------------------


def test_each_real_folder_is_entered_once(tmp_path):
    folders(tmp_path / "set", {"a": 10, "b": 10})
    (tmp_path / "set" / "a" / "up").symlink_to("..")
    (tmp_path / "set" / "b" / "up").symlink_to("..")
    (tmp_path / "set" / "0again").symlink_to("a")  # before "a" by name; the real folder gives the class all the same
    train, held = load_images(tmp_path / "set", DataConfig(), 0)
    assert sorted(reds(train, held)) == list(range(20))
    assert train.classes == ["a", "b"]


def test_a_link_to_above_the_training_folder_brings_no_held_out_image_into_it(tmp_path):
    folders(tmp_path / "train", {"a": 4, "b": 4})
    folders(tmp_path / "val", {"a": 2, "b": 2}, first=50)
    (tmp_path / "train" / "c").symlink_to(tmp_path)
    (tmp_path / "train" / "a" / "up").symlink_to("../..")
    train, held = load_images(tmp_path, DataConfig(), 0)
    assert sorted(reds(train)) == list(range(8))
    assert sorted(reds(held)) == [50, 51, 52, 53]


def test_links_to_folders_elsewhere_are_followed(tmp_path):
    folders(tmp_path / "store", {"x": 3, "y": 3})
    (tmp_path / "set").mkdir()
    for name, target in (("a", "x"), ("b", "y")):
        (tmp_path / "set" / name).symlink_to(tmp_path / "store" / target)
    assert image_names(tmp_path / "set") == [f"{c}/00{k}.png" for c in "ab" for k in range(3)]


def test_held_out_images_that_are_the_training_folder_are_refused(tmp_path):
    folders(tmp_path / "train", {"a": 4, "b": 4})
    (tmp_path / "val").symlink_to("train")
    with pytest.raises(DataError, match="nothing is held out"):
        load_images(tmp_path, DataConfig(), 0)


@pytest.mark.parametrize(
    "config", [DataConfig(max_bad=0.2), DataConfig(memory_gb=0, max_bad=0.2)], ids=["memory", "lazy"]
)
def test_pipes_and_lost_links_are_unreadable_images(tmp_path, config):
    folders(tmp_path / "train", {"a": 10, "b": 10})
    folders(tmp_path / "val", {"a": 4, "b": 4})
    os.mkfifo(tmp_path / "train" / "a" / "pipe.png")
    (tmp_path / "train" / "b" / "lost.png").symlink_to("nowhere")
    train, _ = load_images(tmp_path, config, 0)
    for i in range(len(train)):
        train.image(i)
    assert len(train.bad) == 2
    assert "pipe.png: not a regular file" in train.bad[0]
    assert "lost.png: No such file" in train.bad[1]


@pytest.mark.parametrize("name", ["it", "it.parquet", "it.csv"])
def test_a_pipe_for_a_data_set(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=r"not a regular file|found another file"):
        load_images(tmp_path / name, DataConfig(), 0)


def test_a_pipe_among_parquet_files(tmp_path):
    parquet(tmp_path / "train-0.parquet")
    os.mkfifo(tmp_path / "train-1.parquet")
    with pytest.raises(DataError, match=r"train-1.parquet: not a regular file"):
        load_images(tmp_path, DataConfig(), 0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list everything")
def test_a_folder_that_cannot_be_listed_is_said(tmp_path):
    folders(tmp_path, {"a": 8, "b": 8, "c": 1})
    (tmp_path / "c").chmod(0)
    with pytest.warns(UserWarning, match="c: cannot be listed"):
        load_images(tmp_path, DataConfig(), 0)


def test_names_that_are_not_utf8_or_hold_escapes(tmp_path):
    odd = os.fsdecode(b"caf\xe9"), "a\x1b[31m\nb", "[red]"
    for k, name in enumerate(odd):
        folders(tmp_path / "train", {name: 9}, first=20 * k)
        (tmp_path / "train" / name / f"{name}.png").write_bytes(b"junk")
    folders(tmp_path / "val", dict.fromkeys(odd, 2))
    train, held = load_images(tmp_path, DataConfig(max_bad=0.2), 0)
    assert sorted(train.classes) == ["[red]", r"a\x1b[31m\nb", r"caf\xe9"]
    assert held.classes == train.classes
    for text in (*train.classes, *train.bad, *(train.name(i) for i in range(len(train)))):
        assert text.encode("utf-8").decode().isprintable()


# --- columns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["class", "fine_label", "target", "Label", "category"])
def test_usual_names_of_label_columns(tmp_path, name):
    path = parquet(tmp_path / "x.parquet", other=[0.5] * 8, **{name: [0, 1] * 4})
    train, held = load_images(path, DataConfig(), 0)
    assert len(train.labels) + len(held.labels) == 8
    assert f"2 classes by column '{name}'" in described(train, held)


def test_columns_seen_are_said_and_one_can_be_named(tmp_path):
    path = parquet(tmp_path / "x.parquet", breed=["pug", "beagle"] * 4, age=[1, 2, 3, 4] * 2)
    train, held = load_images(path, DataConfig(), 0)
    assert train.labels is None
    assert "breed (string), age (int64)" in described(train, held)
    assert "--data.label" in described(train, held)
    train, held = load_images(path, DataConfig(label="breed"), 0)
    assert train.classes == ["beagle", "pug"]
    assert {red: int(label) for red, label in zip(reds(train), train.labels, strict=True)}.items() <= {
        (i, 1 - i % 2) for i in range(8)
    }
    with pytest.raises(DataError, match=r"data.label: no column 'race'; columns are image .*breed \(string\)"):
        load_images(path, DataConfig(label="race"), 0)
    with pytest.raises(DataError, match=r"data.label: column 'image' holds no labels"):
        load_images(path, DataConfig(label="image"), 0)


def test_image_column_of_plain_bytes(tmp_path):
    table = pa.table({"scan": [png(i) for i in range(8)], "label": list(range(8))})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"no image column.*scan \(binary\), label \(int64\); --data.image"):
        load_images(tmp_path / "x.parquet", DataConfig(), 0)
    train, held = load_images(tmp_path / "x.parquet", DataConfig(image="scan"), 0)
    assert sorted(reds(train, held)) == list(range(8))
    with pytest.raises(DataError, match=r"data.image: column 'label' holds no encoded images"):
        load_images(tmp_path / "x.parquet", DataConfig(image="label"), 0)


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        ([10**12, 5] * 4, ["5", "1000000000000"]),
        ([True, False] * 4, []),
        ([1.0, 0.0] * 4, []),
        (pa.array(["b", "a"] * 4).dictionary_encode(), ["a", "b"]),
    ],
    ids=["huge", "bool", "float", "dictionary"],
)
def test_kinds_of_labels(tmp_path, values, classes):
    train, _ = load_images(parquet(tmp_path / "x.parquet", label=values), DataConfig(), 0)
    assert train.classes == classes
    truth = {i: 1 - i % 2 for i in range(8)}
    assert all(truth[red] == int(label) for red, label in zip(reds(train), train.labels, strict=True))


@pytest.mark.parametrize("values", [[0, 1, None, 1] * 2, [0.5, 1.0] * 4, ["a", None] * 4, [0, -1] * 4], ids=str)
def test_rows_without_a_label_leave_the_set_unlabelled_and_are_named(tmp_path, values):
    train, held = load_images(parquet(tmp_path / "x.parquet", label=values), DataConfig(), 0)
    assert train.labels is None
    assert "x.parquet" in train.about_labels
    assert "'label'" in described(train, held)


def test_columns_are_not_named_for_folders(tmp_path):
    folders(tmp_path, {"a": 8, "b": 8})
    with pytest.raises(DataError, match=r"data.label: names a column, but .* is a folder of images"):
        load_images(tmp_path, DataConfig(label="breed"), 0)


# --- CSV ----------------------------------------------------------------------------------------------------


def listed(root: Path, lines: list[str], name: str = "set.csv", encoding: str = "utf-8") -> Path:
    (root / name).write_bytes("\n".join(lines).encode(encoding) + b"\n")
    return root / name


def test_csv_with_and_without_heading(tmp_path):
    folders(tmp_path / "images", {"x": 8})
    rows = [f"images/x/{k:03}.png,{'cat' if k % 2 else 'dog'}" for k in range(8)]
    for lines in (rows, ["path,label", *rows], ["\ufefffilename,Class", *rows]):
        train, held = load_images(listed(tmp_path, lines), DataConfig(), 0)
        assert train.classes == ["cat", "dog"]
        assert sorted(reds(train, held)) == list(range(8))
        assert all(label == 1 - red % 2 for red, label in zip(reds(train), train.labels.tolist(), strict=True))


def test_csv_columns_can_be_named(tmp_path):
    folders(tmp_path, {"x": 8})
    path = listed(tmp_path, ["breed,where,n", *(f'"pug, {10 - k}",x/{k:03}.png,{k}' for k in range(8))])
    with pytest.raises(DataError, match=r"no column of paths: .*columns are breed, where, n; --data.image"):
        load_images(path, DataConfig(), 0)
    train, held = load_images(path, DataConfig(image="where"), 0)
    assert train.labels is None
    assert "columns are breed, where, n; --data.label" in described(train, held)
    train, _ = load_images(path, DataConfig(image="where", label="n"), 0)
    assert train.classes == [str(k) for k in range(8)]
    assert train.labels.tolist() == reds(train)


def test_csv_with_a_held_out_one_beside_it(tmp_path):
    folders(tmp_path, {"x": 8})
    listed(tmp_path, [f"x/{k:03}.png,{k % 2}" for k in range(2)], "dogs_test.csv")
    path = listed(tmp_path, [f"x/{k:03}.png,{k % 2}" for k in range(2, 8)], "dogs_train.csv")
    train, held = load_images(path, DataConfig(), 0)
    assert (reds(train), reds(held)) == ([2, 3, 4, 5, 6, 7], [0, 1])
    assert "2 held out (dogs_test.csv beside it)" in described(train, held)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no line"),
        (["path,label"], "found 0 image"),
        (["path,label", "x/000.png"], "line 2: fewer columns"),
        (["path,label", ",cat"], "line 2: no path"),
        (["path,label", "y/000.png,cat"], "not where it says: .*y/000.png does not exist"),
        (["path,label", "x/0\0.png,cat"], "NUL|no path"),
        (["path", '"' + "x" * 200_000 + '"'], "field larger"),
    ],
)
def test_unusable_csv(tmp_path, lines, message):
    folders(tmp_path, {"x": 2})
    with pytest.raises(DataError, match=message) as error:
        load_images(listed(tmp_path, lines), DataConfig(), 0)
    assert "\n" not in str(error.value)


def test_csv_names_that_are_not_utf8(tmp_path):
    folders(tmp_path, {os.fsdecode(b"caf\xe9"): 8})
    path = listed(tmp_path, [f"café/{k:03}.png,{k % 2}" for k in range(8)], encoding="latin-1")
    assert sorted(reds(*load_images(path, DataConfig(), 0))) == list(range(8))


def test_csv_line_without_a_label(tmp_path):
    folders(tmp_path, {"x": 8})
    path = listed(tmp_path, ["path,label", *(f"x/{k:03}.png,{'' if k == 3 else 'a'}" for k in range(8))])
    train, held = load_images(path, DataConfig(), 0)
    assert train.labels is None
    assert "line 5 has no label" in described(train, held)


# --- where the held-out images come from --------------------------------------------------------------------


def test_origin_of_held_out_images(tmp_path):
    folders(tmp_path / "x" / "train", {"a": 6, "b": 6})
    assert "2 classes by sub-folders; 2 held out (split off by class)" in described(
        *load_images(tmp_path / "x", LAZY, 0)
    )
    folders(tmp_path / "x" / "test", {"a": 4, "b": 4})
    some = load_images(tmp_path / "x", DataConfig(held_out_max=5), 0)
    assert f"5 held out (5 of 8 at random from the folder {tmp_path / 'x' / 'test'})" in described(*some)
    other = load_images(tmp_path / "x", LAZY, 0, val_path=folders(tmp_path / "y", {"a": 3}))
    assert f"3 held out (data.val_path {tmp_path / 'y'})" in described(*other)
    folders(tmp_path / "z", {".": 12})
    words = described(*load_images(tmp_path / "z", LAZY, 0))
    assert "no labels (no image lies in a sub-folder" in words
    assert "2 held out (split off at random, as there are no labels)" in words
    assert "10 classes by" in described(*load_images("builtin:digits", LAZY, 0))
