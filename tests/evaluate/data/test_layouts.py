"""Other people's layouts: torchvision's sets, iNaturalist's JSON, ImageNet-LT's lists."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from red_images import folders, reds, save
from uncollapse.config.schema import DataConfig
from uncollapse.errors import DataError
from uncollapse.evaluate.data.layouts import SETS
from uncollapse.evaluate.data.pair import load_pair

LAZY = DataConfig(memory_gb=0)


# --- iNaturalist and lists ----------------------------------------------------------------------------------


def inat(root: Path, part: str, pairs: list[tuple[str, int]], names: dict[int, str]) -> None:
    for k, (name, _) in enumerate(pairs):
        save(root / name, k)
    content = {
        "images": [{"id": 10 + i, "file_name": name} for i, (name, _) in enumerate(pairs)],
        "annotations": [{"id": i, "image_id": 10 + i, "category_id": c} for i, (_, c) in enumerate(pairs)],
        "categories": [{"id": c, "name": n, "supercategory": "Aves"} for c, n in names.items()],
    }
    (root / f"{part}2018.json").write_text(json.dumps(content))


def test_inaturalist(tmp_path):
    names = {3: "Turdus", 7: "Parus", 9: "Turdus"}
    base = "train_val2018/Aves"
    inat(tmp_path, "train", [(f"{base}/9/a.png", 9), (f"{base}/3/b.png", 3), (f"{base}/7/c.png", 7)], names)
    inat(tmp_path, "val", [(f"{base}/7/d.png", 7)], names)
    for spec in (
        f"inat:{tmp_path}",
        str(tmp_path),
        f"{tmp_path}/train2018.json",
        f"{tmp_path}/train2018.json,{tmp_path}/val2018.json",
    ):
        train, test = load_pair(spec)
        assert train.classes == ["Turdus (3)", "Parus", "Turdus (9)"]
        assert train.labels.tolist() == [0, 1, 2]
        assert test.labels.tolist() == [1]
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(DataError, match="iNaturalist's layout"):
        load_pair(str(tmp_path / "x.json"))
    (tmp_path / base / "3/b.png").unlink()
    with pytest.raises(DataError, match="not where it says"):
        load_pair(str(tmp_path))


def test_lists(tmp_path):
    images, lists = tmp_path / "images", tmp_path / "l@sts"
    folders(images / "train", {"n01": 3, "n02": 2})
    folders(images / "val", {"": 2})
    lists.mkdir()
    lines = [f"train/n02/{k:03}.png 1" for k in range(2)] + [f"train/n01/{k:03}.png 0" for k in range(3)]
    (lists / "LT_train.txt").write_text("\n".join(lines) + "\n\n")
    (lists / "LT_test.txt").write_text("val/000.png 1\nval/001.png 0\n")
    spec = f"list:{lists}/LT_train.txt@{images}"
    train, test = load_pair(spec)
    assert train.labels.tolist() == [1, 1, 0, 0, 0]
    assert train.classes == test.classes == ["n01", "n02"]
    assert test.labels.tolist() == [1, 0]
    train, test = load_pair(f"{spec},list:{lists}/LT_test.txt@{images}")
    assert [len(train), len(test)] == [5, 2]
    with pytest.raises(DataError, match=r"not where it says.*list:FILE@FOLDER"):
        load_pair(f"{lists}/LT_train.txt")
    beside = images / "some.txt"
    beside.write_text("\n".join(lines))
    assert sum(map(len, load_pair(str(beside)))) == 5
    beside.write_text("train/n01/000.png\n")
    with pytest.raises(DataError, match="line 1"):
        load_pair(str(beside))


# --- torchvision --------------------------------------------------------------------------------------------


def lines(path: Path, *rows: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")


def make_dtd(root: Path) -> None:
    for k, part in enumerate(("train", "val", "test")):
        for c in ("banded", "dotted"):
            save(root / f"dtd/dtd/images/{c}/{part}.png", k)
        lines(root / f"dtd/dtd/labels/{part}1.txt", f"dotted/{part}.png", f"banded/{part}.png")


def make_food(root: Path) -> None:
    for part, k in (("train", 3), ("test", 1)):
        names = {c: [f"{c}/{part}{i}" for i in range(k)] for c in ("apple_pie", "ramen")}
        lines(root / f"food-101/meta/{part}.json", json.dumps(names))
        for files in names.values():
            for f in files:
                save(root / f"food-101/images/{f}.jpg")


def make_pets(root: Path) -> None:
    for part in ("trainval", "test"):
        rows = [f"Abyssinian_{part} 1 1 1", f"beagle_{part} 2 2 1"]
        lines(root / f"oxford-iiit-pet/annotations/{part}.txt", *rows)
        for r in rows:
            save(root / f"oxford-iiit-pet/images/{r.split()[0]}.jpg")


def make_aircraft(root: Path) -> None:
    base = root / "fgvc-aircraft-2013b/data"
    lines(base / "variants.txt", "707-320", "A300")
    for part in ("trainval", "test"):
        lines(base / f"images_variant_{part}.txt", f"{part}0 A300", f"{part}1 707-320")
        for k in range(2):
            save(base / f"images/{part}{k}.jpg")


def make_gtsrb(root: Path) -> None:
    for c in ("00000", "00001"):
        save(root / f"gtsrb/GTSRB/Training/{c}/a.ppm")
    for name in ("00000.ppm", "00001.ppm"):
        save(root / f"gtsrb/GTSRB/Final_Test/Images/{name}")
    lines(root / "gtsrb/GT-final_test.csv", "Filename;ClassId", "00000.ppm;1", "00001.ppm;0")


def make_inaturalist(root: Path) -> None:
    for part in ("2021_train", "2021_valid"):
        for i, name in enumerate(("Animalia_C_A_O_F_Gx_one", "Animalia_C_A_O_F_Gx_two")):
            save(root / part / f"{i:05d}_{name}" / "a.jpg")


@pytest.mark.parametrize(
    ("name", "make", "sizes", "classes"),
    [
        ("DTD", make_dtd, (4, 2), ["banded", "dotted"]),
        ("Food101", make_food, (6, 2), ["apple_pie", "ramen"]),
        ("OxfordIIITPet", make_pets, (2, 2), ["Abyssinian", "Beagle"]),
        ("FGVCAircraft", make_aircraft, (2, 2), ["707-320", "A300"]),
        ("GTSRB", make_gtsrb, (2, 2), None),
        ("INaturalist", make_inaturalist, (2, 2), None),
    ],
)
def test_torchvision_sets_with_a_split(tmp_path, name, make, sizes, classes):
    spec = f"torchvision:{name}@{tmp_path}"
    with pytest.raises(DataError, match=f"looks for .*{SETS[name].looks_for}.*nothing is downloaded"):
        load_pair(spec)
    assert not list(tmp_path.iterdir())
    make(tmp_path)
    train, test = load_pair(spec)
    assert (len(train), len(test)) == sizes
    assert set(train.labels.tolist()) == set(test.labels.tolist()) == {0, 1}
    assert classes is None or train.classes == test.classes == classes
    assert sorted(reds(load_pair(spec, config=LAZY)[0])) == sorted(reds(train))


@pytest.mark.parametrize(
    ("name", "folder", "file"),
    [
        ("EuroSAT", "eurosat/2750", "{c}/{k}.jpg"),
        ("Caltech101", "caltech101/101_ObjectCategories", "{c}/image_{k:04d}.jpg"),
        ("SUN397", "SUN397", "{c[0]}/{c}/sun_{k}.jpg"),
    ],
)
def test_torchvision_sets_without_a_split(tmp_path, name, folder, file):
    for c in ("ant", "bee"):
        for k in range(1, 11):
            save(tmp_path / folder / file.format(c=c, k=k))
    if name == "SUN397":
        lines(tmp_path / folder / "ClassName.txt", "/a/ant", "/b/bee")
    if name == "Caltech101":  # torchvision drops it
        save(tmp_path / folder / "BACKGROUND_Google" / "image_0001.jpg")
    train, test = load_pair(f"torchvision:{name}@{tmp_path}")
    assert (len(train), len(test)) == (18, 2)
    assert train.classes == ["ant", "bee"]
    assert train.labels.bincount().tolist() == [9, 9]


def test_cifar(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    for file, rows in (("data_batch_1", slice(0, 3)), ("test_batch", slice(3, 4))):
        (base / file).write_bytes(pickle.dumps({"data": pixels[rows], "labels": [2, 0, 1][: len(pixels[rows])]}))
    with pytest.raises(DataError, match="cannot open its train=True part"):
        load_pair(f"torchvision:cifar10@{tmp_path}")
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": ["plane", "car", "bird"]}))
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    train, test = load_pair(f"torchvision:cifar10@{tmp_path}")
    assert torch.equal(train.canvas, torch.from_numpy(pixels[:3].reshape(3, 3, 32, 32)))
    assert train.labels.tolist() == [2, 0, 1]
    assert test.labels.tolist() == [2]
    assert train.classes == ["plane", "car", "bird"]
    small, _ = load_pair(f"torchvision:CIFAR10@{tmp_path}", limit=2)
    assert len(small) == 2


def test_every_named_set_is_one_of_torchvisions():
    import torchvision.datasets

    assert all(hasattr(torchvision.datasets, name) for name in SETS)
