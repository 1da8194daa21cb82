"""Image sets: what is found, what is held out, and what happens to files that cannot be read."""

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

from uncollapse.config.schema import DataConfig
from uncollapse.data.images import LazyImages, MemoryImages, subset
from uncollapse.data.load import load_images
from uncollapse.errors import DataError

CONFIG = DataConfig()
LAZY = DataConfig(memory_gb=0)


def picture(i: int, size: tuple[int, int] = (6, 4)) -> Image.Image:
    """A plain RGB image that tells its number: red is i."""
    return Image.new("RGB", size, (i, 100, 200))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def write(folder: Path, counts: dict[str, int], first: int = 0) -> None:
    """``counts``[sub-folder] numbered images in each sub-folder."""
    number = first
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            picture(number).save(folder / name / f"{k:03}.png")
            number += 1


def write_parquet(
    path: Path,
    numbers: list[int],
    labels: list[int | None] | None,
    names: list[str] | None = None,
    image: str = "img",
    label: str = "label",
) -> None:
    cells = [{"bytes": encoded(picture(i)), "path": f"{i}.png"} for i in numbers]
    columns = {image: pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    features: dict[str, object] = {image: {"_type": "Image"}}
    if labels is not None:
        columns[label] = pa.array(labels, pa.int64())
        features[label] = {"names": names, "_type": "ClassLabel"}
    table = pa.table(columns)
    if names is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=3)


def numbers(images: MemoryImages | LazyImages) -> list[int]:
    return [images.image(i).getpixel((0, 0))[0] for i in range(len(images))]


# --- what is found ------------------------------------------------------------------------------------------


def test_digits():
    train, held = load_images("builtin:digits", CONFIG, 0)
    assert isinstance(train, MemoryImages)
    assert len(train) + len(held) == 1797
    assert len(held) == pytest.approx(0.2 * 1797, abs=6)
    assert train.canvas.shape[1:] == (3, 8, 8)
    assert train.canvas.max() == 255
    assert (train.canvas[:, 0] == train.canvas[:, 2]).all()
    assert train.classes == [str(i) for i in range(10)]
    share = held.labels.bincount() / (train.labels.bincount() + held.labels.bincount())
    assert share.tolist() == pytest.approx([0.2] * 10, abs=0.01)


@pytest.mark.parametrize("config", [CONFIG, LAZY], ids=["memory", "lazy"])
def test_class_folders_with_splits(tmp_path, config):
    write(tmp_path / "train", {"b": 3, "a": 2, "C/deep/er": 2})
    write(tmp_path / "val", {"b": 2, "a": 1}, first=50)
    train, held = load_images(tmp_path, config, 0)
    assert isinstance(train, MemoryImages if config is CONFIG else LazyImages)
    assert train.classes == held.classes == ["C", "a", "b"]  # by code point
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert numbers(train) == [5, 6, 3, 4, 0, 1, 2]
    assert held.labels.tolist() == [1, 2, 2]  # numbered as in training, although "C" is missing
    assert numbers(held) == [52, 50, 51]
    assert train.image(0).size == (6, 4)


def test_memory_canvas_and_sizes(tmp_path):
    for k, size in enumerate([(6, 4), (3, 9), (2, 2), (5, 5)]):
        picture(k, size).save(tmp_path / f"{k}.png")
    train, held = load_images(tmp_path, DataConfig(held_out=0.25), 0)
    assert train.labels is None
    assert len(train) == len(held) == 2
    for i in range(2):
        h, w = train.sizes[i].tolist()
        assert train.image(i).size == (w, h)
        assert (train.canvas[i, 1, :h, :w] == 100).all()
        assert train.canvas[i].sum() == train.canvas[i, :, :h, :w].sum()


def test_a_class_called_train(tmp_path):
    write(tmp_path, {"train": 4, "plane": 4})
    train, _ = load_images(tmp_path, CONFIG, 0)
    assert train.classes == ["plane", "train"]


def test_other_files_are_ignored(tmp_path):
    write(tmp_path, {"a": 4, "b": 4})
    (tmp_path / "a" / "notes.txt").write_text("hello")
    (tmp_path / "a" / "._001.png").write_bytes(b"resource fork")
    train, held = load_images(tmp_path, CONFIG, 0)
    assert len(train) + len(held) == 8
    assert train.bad == []


def test_separate_held_out_path(tmp_path):
    write(tmp_path / "x", {"a": 3, "b": 3})
    write(tmp_path / "y", {"b": 2}, first=90)
    train, held = load_images(tmp_path / "x", CONFIG, 0, val_path=tmp_path / "y")
    assert len(train) == 6
    assert held.labels.tolist() == [1, 1]
    write(tmp_path / "z", {"other": 2})
    with pytest.raises(DataError, match=r"classes of the held-out.*other"):
        load_images(tmp_path / "x", CONFIG, 0, val_path=tmp_path / "z")


@pytest.mark.parametrize("config", [CONFIG, LAZY], ids=["memory", "lazy"])
def test_parquet_shards(tmp_path, config):
    names = ["cat", "dog"]
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", [0, 1, 2, 3, 4, 5, 6], [0, 1] * 3 + [1], names)
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", [7, 8], [0, 0], names)
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [9, 10], [1, 0], names)
    train, held = load_images(tmp_path, config, 0)
    assert numbers(train) == list(range(9))
    assert train.labels.tolist() == [0, 1, 0, 1, 0, 1, 1, 0, 0]
    assert train.classes == names
    assert numbers(held) == [9, 10]
    assert held.labels.tolist() == [1, 0]
    copy = pickle.loads(pickle.dumps(train))
    assert numbers(copy) == list(range(9))


@pytest.mark.parametrize("labels", [None, [-1] * 5, [0, 1, None, 1, 0], [0, 1, 2, 1, 0]], ids=str)
def test_parquet_without_usable_labels(tmp_path, labels):
    write_parquet(tmp_path / "some.parquet", list(range(5)), labels, ["a", "b"])
    train, held = load_images(tmp_path / "some.parquet", CONFIG, 0)
    assert train.labels is None
    assert train.classes == []
    assert sorted(numbers(train) + numbers(held)) == list(range(5))


def test_parquet_without_metadata(tmp_path):
    write_parquet(tmp_path / "some.parquet", list(range(6)), [3, 4] * 3, None, image="picture", label="labels")
    train, held = load_images(tmp_path / "some.parquet", CONFIG, 0)
    assert sorted(train.labels.tolist() + held.labels.tolist()) == [3, 3, 3, 4, 4, 4]


def not_there(path: Path) -> None:
    pass


def empty(path: Path) -> None:
    path.mkdir()


def only_text(path: Path) -> None:
    path.mkdir()
    (path / "readme.md").write_text("hello")


def one_image(path: Path) -> None:
    write(path, {"a": 1})


def two_images(path: Path) -> None:
    write(path, {"a": 2})


def text_file(path: Path) -> None:
    path.write_text("hello")


def no_image_column(path: Path) -> None:
    path.mkdir()
    pq.write_table(pa.table({"x": [1, 2], "label": [0, 1]}), path / "train.parquet")


def not_parquet(path: Path) -> None:
    path.mkdir()
    (path / "train.parquet").write_text("hello")


def only_test(path: Path) -> None:
    write_parquet(path / "test.parquet", [1, 2], [0, 1], ["a", "b"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (not_there, "no such file"),
        (empty, "no images: looked for .*found nothing"),
        (only_text, r"no images: .*found readme\.md"),
        (one_image, r"found 1 image\(s\), but at least two for training"),
        (two_images, "1 training and 1 held-out"),
        (text_file, "expected a folder of images"),
        (no_image_column, r"no image column.*x \(int64\), label \(int64\)"),
        (not_parquet, "not a readable Parquet file"),
        (only_test, r"no training shards.*test\.parquet"),
    ],
)
def test_unusable_paths(tmp_path, make, message):
    make(tmp_path / "it")
    with pytest.raises(DataError, match=message) as error:
        load_images(tmp_path / "it", CONFIG, 0)
    assert "\n" not in str(error.value)


def test_unknown_builtin():
    with pytest.raises(DataError, match=r"builtin:digits"):
        load_images("builtin:letters", CONFIG, 0)


# --- unreadable images --------------------------------------------------------------------------------------


def test_unreadable_images_are_dropped_from_memory(tmp_path):
    write(tmp_path / "train", {"a": 15, "b": 15})
    write(tmp_path / "test", {"a": 2, "b": 2}, first=50)
    (tmp_path / "train" / "a" / "004.png").write_bytes(b"")
    train, _ = load_images(tmp_path, CONFIG, 0)
    assert numbers(train) == [i for i in range(30) if i != 4]
    assert train.labels.tolist() == [0] * 14 + [1] * 15
    assert len(train.bad) == 1
    assert "004.png: " in train.bad[0]


def test_too_many_unreadable_images(tmp_path):
    write(tmp_path / "train", {"a": 10})
    write(tmp_path / "test", {"a": 2}, first=50)
    for k in (2, 7):
        (tmp_path / "train" / "a" / f"00{k}.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"2 of 10 .*002\.png: not an image.*data\.max_bad"):
        load_images(tmp_path, CONFIG, 0)
    train, _ = load_images(tmp_path, DataConfig(max_bad=0.5), 0)
    assert len(train) == 8


def test_lazy_images_skip_to_the_next_readable_one(tmp_path):
    write(tmp_path / "train", {"a": 10})
    write(tmp_path / "test", {"a": 2}, first=50)
    for k in (8, 9):
        (tmp_path / "train" / "a" / f"00{k}.png").write_bytes(b"junk")
    train, _ = load_images(tmp_path, DataConfig(memory_gb=0, max_bad=0.2), 0)
    assert isinstance(train, LazyImages)
    assert numbers(train) == [0, 1, 2, 3, 4, 5, 6, 7, 0, 0]
    assert [b.split(": ")[0][-7:] for b in train.bad] == ["008.png", "009.png"]
    (tmp_path / "train" / "a" / "000.png").unlink()
    with pytest.raises(DataError, match="3 of 10"):
        train.image(0)


def test_empty_parquet_cells_are_bad(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [{"bytes": encoded(picture(i)), "path": None} for i in range(6)]
    cells[1], cells[4] = {"bytes": None, "path": "x.png"}, None  # type: ignore[call-overload]
    pq.write_table(pa.table({"image": pa.array(cells, kind)}), tmp_path / "train.parquet")
    write_parquet(tmp_path / "test.parquet", [8, 9], None)
    with pytest.raises(DataError, match="2 of 6"):
        load_images(tmp_path, CONFIG, 0)
    train, _ = load_images(tmp_path, DataConfig(max_bad=0.5), 0)
    assert numbers(train) == [0, 2, 3, 5]
    assert ["row 1: no bytes" in train.bad[0], "row 4: no bytes" in train.bad[1]] == [True, True]


# --- splits -------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    counts=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    share=st.floats(0.05, 0.6),
    seed=st.integers(0, 99),
)
def test_split_by_class(tmp_path_factory, counts, share, seed):
    path = tmp_path_factory.mktemp("set")
    write(path, {str(c): n for c, n in enumerate(counts)})
    config = DataConfig(held_out=share)
    try:
        train, held = load_images(path, config, seed)
    except DataError:
        assert sum(counts) <= 3
        return
    assert sorted(numbers(train) + numbers(held)) == list(range(sum(counts)))
    again = load_images(path, config, seed)
    assert numbers(again[1]) == numbers(held)
    lazy = load_images(path, DataConfig(held_out=share, memory_gb=0), seed)
    assert numbers(lazy[1]) == numbers(held)
    if max(counts) > 1:
        for c, n in enumerate(counts):
            k = int((held.labels == c).sum())
            assert k <= n - 1
            assert k == 0 if n == 1 else abs(k - share * n) <= 1 or len(held) == 2


def test_seed_chooses_the_held_out_images(tmp_path):
    write(tmp_path, {"a": 40})
    splits = {tuple(numbers(load_images(tmp_path, CONFIG, seed)[1])) for seed in range(3)}
    assert len(splits) == 3


def test_held_out_max(tmp_path):
    write(tmp_path / "one", {"a": 20, "b": 20})
    train, held = load_images(tmp_path / "one", DataConfig(held_out=0.5, held_out_max=6), 0)
    assert (len(train), len(held)) == (34, 6)
    assert held.labels.bincount().tolist() == [3, 3]
    write(tmp_path / "two" / "train", {"a": 5})
    write(tmp_path / "two" / "test", {"a": 20}, first=50)
    train, held = load_images(tmp_path / "two", DataConfig(held_out_max=6), 0)
    assert (len(train), len(held)) == (5, 6)
    assert numbers(held) == sorted(set(numbers(held)))


@pytest.mark.parametrize("config", [CONFIG, LAZY], ids=["memory", "lazy"])
def test_subset(tmp_path, config):
    write(tmp_path / "train", {"a": 3, "b": 3})
    write(tmp_path / "test", {"a": 2})
    train, _ = load_images(tmp_path, config, 0)
    for indices in ([4, 0, 4], np.array([4, 0, 4]), torch.tensor([4, 0, 4])):
        part = subset(train, indices)
        assert type(part) is type(train)
        assert numbers(part) == [4, 0, 4]
        assert part.labels.tolist() == [1, 0, 1]


def test_set_that_outgrows_memory_while_decoding_is_lazy(tmp_path):
    write(tmp_path / "train", {"a": 100})
    Image.new("RGB", (900, 900)).save(tmp_path / "train" / "a" / "zzz.png")
    write(tmp_path / "test", {"a": 2})
    train, held = load_images(tmp_path, DataConfig(memory_gb=0.1), 0)
    assert isinstance(train, LazyImages)
    assert isinstance(held, MemoryImages)
    assert numbers(train)[:100] == list(range(100))
