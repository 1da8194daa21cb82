"""Where other people's data sets keep images and labels: torchvision's sets, iNaturalist's JSON, lists of paths."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uncollapse.data.images import Files, MemoryImages
from uncollapse.data.listing import Items
from uncollapse.data.parquet import MAX_CLASSES
from uncollapse.errors import DataError
from uncollapse.shown import shown

Part = Items | MemoryImages
"""One part of a set: where its images are and their labels, or its pixels where the set is one array."""

TORCHVISION, INAT, LIST = "torchvision:", "inat:", "list:"


# --- torchvision --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Set:
    """How one of torchvision's classes names its parts."""

    looks_for: str
    """What has to be below the root, so that a missing set can be named before torchvision makes empty folders."""
    train: Sequence[dict[str, Any]] = ({"split": "train"},)
    """Arguments of each piece of the training part."""
    test: dict[str, Any] | None = None
    """Arguments of the test part; None: torchvision has no split."""


_TEST = {"split": "test"}
_TRAIN_VAL = ({"split": "train"}, {"split": "val"})
_BOOL = ({"train": True},)

SETS: dict[str, _Set] = {
    "CIFAR10": _Set("cifar-10-batches-py", _BOOL, {"train": False}),
    "CIFAR100": _Set("cifar-100-python", _BOOL, {"train": False}),
    "Caltech101": _Set("caltech101/101_ObjectCategories", ({},)),
    "Caltech256": _Set("caltech256/256_ObjectCategories", ({},)),
    "Country211": _Set("country211", ({"split": "train"}, {"split": "valid"}), _TEST),
    "DTD": _Set("dtd/dtd", _TRAIN_VAL, _TEST),
    "EuroSAT": _Set("eurosat/2750", ({},)),
    "FGVCAircraft": _Set("fgvc-aircraft-2013b", ({"split": "trainval"},), _TEST),
    "FashionMNIST": _Set("FashionMNIST", _BOOL, {"train": False}),
    "Flowers102": _Set("flowers-102", _TRAIN_VAL, _TEST),
    "Food101": _Set("food-101", test=_TEST),
    "GTSRB": _Set("gtsrb", test=_TEST),
    "INaturalist": _Set("2021_train", ({"version": "2021_train"},), {"version": "2021_valid"}),
    "ImageNet": _Set("train", test={"split": "val"}),
    "Imagenette": _Set("imagenette2", test={"split": "val"}),
    "MNIST": _Set("MNIST", _BOOL, {"train": False}),
    "OxfordIIITPet": _Set("oxford-iiit-pet", ({"split": "trainval"},), _TEST),
    "RenderedSST2": _Set("rendered-sst2", _TRAIN_VAL, _TEST),
    "STL10": _Set("stl10_binary", test=_TEST),
    "SUN397": _Set("SUN397", ({},)),
    "SVHN": _Set("train_32x32.mat", test=_TEST),
    "StanfordCars": _Set("stanford_cars", test=_TEST),
    "USPS": _Set("usps.bz2", _BOOL, {"train": False}),
}
"""torchvision's sets and their parts. Where a set has train, val and test, training takes train and val together,
as Kornblith et al. (2019, *Do better ImageNet models transfer better?*) do: nothing is ever chosen on val here."""


def torchvision_parts(spec: str) -> tuple[Part, Part | None]:
    """Training and test part of ``torchvision:NAME@ROOT``; no test part where torchvision has no split.

    Nothing is downloaded. Raises `DataError` where NAME is not in `SETS`, or its files are not below ROOT.
    """
    name, _, root = spec.removeprefix(TORCHVISION).partition("@")
    known = {s.lower(): s for s in SETS}
    if name.lower() not in known:
        raise DataError(f"{spec}: no set {name!r} here; there are {', '.join(SETS)}. Others: as folders of images")
    name = known[name.lower()]
    if not root:
        raise DataError(f"{spec}: where its files are is missing: write {TORCHVISION}{name}@FOLDER")
    one = SETS[name]
    looked = Path(root).expanduser() / one.looks_for
    if not looked.exists():
        raise DataError(
            f"{spec}: torchvision's {name} looks for {looked}, which is not there; nothing is downloaded "
            f"here, torchvision.datasets.{name}(root, download=True) may"
        )
    pieces = [_torchvision(spec, name, root, options) for options in one.train]
    return _joined(pieces), None if one.test is None else _torchvision(spec, name, root, one.test)


def _torchvision(spec: str, name: str, root: str, options: dict[str, Any]) -> Part:
    import torchvision.datasets  # type: ignore[import-untyped]

    size = {"size": "full"} if name == "Imagenette" else {}
    try:
        dataset = getattr(torchvision.datasets, name)(str(Path(root).expanduser()), **size, **options)
    except Exception as error:  # each class has its own way of finding nothing, or half of it
        reason = " ".join(str(error).replace("You can use download=True to download it", "").split())
        what = ", ".join(f"{k}={v!r}" for k, v in options.items()) or "only"
        raise DataError(
            f"{spec}: torchvision cannot open its {what} part below {root}, where it looks for "
            f"{SETS[name].looks_for} ({reason or type(error).__name__})"
        ) from None
    try:
        return _opened(dataset)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        version = torchvision.__version__
        raise DataError(
            f"{spec}: torchvision {version} keeps this set in a way that is not known here ({error}); "
            f"give its images as a folder with a sub-folder per class"
        ) from None


def _opened(dataset: Any) -> Part:
    """Paths and labels of an opened set, without decoding anything; pixels where the set is an array."""
    # The directories' names, where the names of classes are words: ImageNet's also come as plain folders.
    named = getattr(dataset, "wnids", None) or getattr(dataset, "classes", None)
    classes = [c if isinstance(c, str) else ", ".join(c) for c in named or getattr(dataset, "categories", [])]
    data = getattr(dataset, "data", None)
    if data is not None:
        labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
        return _pixels(np.asarray(data), np.asarray(labels, dtype=np.int64), classes)
    if hasattr(dataset, "all_categories"):
        classes = list(dataset.all_categories)
        paths = [os.path.join(dataset.root, classes[c], file) for c, file in dataset.index]
        codes = [c for c, _ in dataset.index]
    elif hasattr(dataset, "categories"):
        codes = list(dataset.y)
        paths = [_caltech(dataset, c, i) for c, i in zip(codes, dataset.index, strict=True)]
    elif hasattr(dataset, "_labels"):
        codes = list(dataset._labels)
        paths = [str(p) for p in (dataset._image_files if hasattr(dataset, "_image_files") else dataset._images)]
    else:
        samples = dataset.samples if hasattr(dataset, "samples") else dataset._samples
        paths, codes = [str(p) for p, _ in samples], [c for _, c in samples]
    if len(paths) != len(codes):
        raise ValueError(f"{len(paths)} paths and {len(codes)} labels")
    # Some sets list a folder in whatever order the disk gives.
    order = sorted(range(len(paths)), key=lambda i: (int(codes[i]), paths[i]))
    labels = np.array([int(codes[i]) for i in order], dtype=np.int64)
    return Items(Files("", [paths[i] for i in order]), labels, classes)


def _caltech(dataset: Any, label: int, number: int) -> str:
    category = dataset.categories[label]
    if os.path.isdir(os.path.join(dataset.root, "101_ObjectCategories")):
        return os.path.join(dataset.root, "101_ObjectCategories", category, f"image_{number:04d}.jpg")
    return os.path.join(dataset.root, "256_ObjectCategories", category, f"{label + 1:03d}_{number:04d}.jpg")


def _pixels(data: np.ndarray, labels: np.ndarray, classes: list[str]) -> MemoryImages:
    """From (n, h, w), (n, h, w, 3) or (n, 3, h, w) uint8."""
    x = torch.from_numpy(np.ascontiguousarray(data))
    if x.ndim == 3:
        x = x[:, None].expand(-1, 3, -1, -1)
    elif x.shape[1] != 3:
        x = x.permute(0, 3, 1, 2)
    if x.ndim != 4 or x.shape[1] != 3 or x.dtype != torch.uint8 or len(x) != len(labels):
        raise ValueError(f"an array of shape {tuple(data.shape)} and type {data.dtype}")
    return MemoryImages(
        x.contiguous(), torch.tensor([list(x.shape[2:])]).repeat(len(x), 1), torch.from_numpy(labels), classes
    )


def _joined(pieces: Sequence[Part]) -> Part:
    if len(pieces) == 1:
        return pieces[0]
    names: list[str] = []
    for piece in pieces:
        assert isinstance(piece, Items)
        assert isinstance(piece.source, Files)
        names += piece.source.names
    labels = np.concatenate([np.asarray(piece.labels) for piece in pieces])
    order = np.argsort(labels, kind="stable")
    return Items(Files("", [names[i] for i in order]), labels[order], pieces[0].classes)


# --- iNaturalist --------------------------------------------------------------------------------------------


def inat_file(path: Path) -> Path | None:
    """The training JSON of an iNaturalist folder (``train2018.json``; the newest of several); None without."""
    lists = sorted(path.glob("train20[0-9][0-9].json")) if path.is_dir() else []
    return lists[-1] if lists else None


def inat_parts(path: Path) -> tuple[Part, Part | None]:
    """Training and test part of an iNaturalist set: a folder with ``train2018.json``, or a JSON file itself.

    The test part is ``val2018.json`` beside the training file, as in every published result: the labels of the
    competition's test images are not public. Paths of images count from the folder of the JSON file.

    Raises `DataError` for files that are not in that layout.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    file = inat_file(path) if path.is_dir() else path
    if file is None:
        raise DataError(f"{path}: no train20xx.json (iNaturalist's layout) in it")
    val = file.with_name(file.name.replace("train", "val")) if file.name.startswith("train") else None
    train = _inat(file)
    return train, _inat(val) if val is not None and val.is_file() else None


def _inat(file: Path) -> Items:
    try:
        content = json.loads(_text(file))
        images, annotations, categories = (content[k] for k in ("images", "annotations", "categories"))
        names = {int(i["id"]): str(i["file_name"]) for i in images}
        pairs = [(int(a["category_id"]), names[int(a["image_id"])]) for a in annotations]
        titles = {int(c["id"]): str(c.get("name", c["id"])) for c in categories}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, MemoryError) as error:
        raise DataError(
            f"{file}: not in iNaturalist's layout: looked for images (id, file_name), annotations "
            f"(image_id, category_id) and categories (id, name); {type(error).__name__}: {error}"
        ) from None
    unknown = {c for c, _ in pairs} - set(titles)
    if unknown or not pairs:
        raise DataError(f"{file}: {f'categories {sorted(unknown)[:3]} are not listed' if unknown else 'no annotation'}")
    # The obfuscated names of 2018 are unique, others need not be.
    often = Counter(titles.values())
    ids = sorted(titles)
    classes = [shown(titles[i] if often[titles[i]] == 1 else f"{titles[i]} ({i})") for i in ids]
    number = {c: k for k, c in enumerate(ids)}
    pairs.sort()
    _check_first(file, file.parent, pairs[0][1])
    labels = np.array([number[c] for c, _ in pairs], dtype=np.int64)
    return Items(Files(str(file.parent), [name for _, name in pairs]), labels, classes)


# --- lists of paths -----------------------------------------------------------------------------------------


def list_parts(spec: str) -> tuple[Part, Part | None]:
    """Training and test part of ``list:FILE@ROOT``, or of a ``.txt`` file whose paths count from its own folder.

    Lines are ``path label``, as in ImageNet-LT (Liu et al. 2019). The test part of ``X_train.txt`` is the
    ``X_test.txt`` beside it, else ``X_val.txt``: in ImageNet-LT val is for choosing, and test is ImageNet's
    validation set, on which results are published. Classes are named after their folders where each class has
    one of its own, and are numbers otherwise.

    Raises `DataError` for other lines, or where the first image is not there.
    """
    parts = file_and_root(spec.removeprefix(LIST))
    if parts is None:
        raise DataError(f"{spec}: no such file or folder; a list of images is given as {LIST}FILE@FOLDER")
    file, root = parts
    train = _list(file, root)
    for other in ("test", "val"):
        beside = file.with_name(other.join(file.name.rsplit("train", 1))) if "train" in file.name else file
        if beside != file and beside.is_file():
            return train, _list(beside, root)
    return train, None


def file_and_root(text: str) -> tuple[Path, Path] | None:
    """File and folder of ``FILE@ROOT`` or ``FILE``; None where they are not there. An @ may be part of either."""
    parts = text.split("@")
    for k in range(len(parts), 0, -1):
        file, root = Path("@".join(parts[:k])).expanduser(), "@".join(parts[k:])
        if file.is_file() and (not root or Path(root).expanduser().is_dir()):
            return file, Path(root).expanduser() if root else file.parent
    return None


def _list(file: Path, root: Path) -> Items:
    names, labels = [], []
    for number, line in enumerate(_text(file).splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name.strip() or "\0" in name or not re.fullmatch(r"\d{1,9}", label):
            raise DataError(f"{file}, line {number}: expected a path and a class number, found {line[:80]!r}")
        names.append(name.strip())
        labels.append(int(label))
        if labels[-1] >= MAX_CLASSES:
            raise DataError(f"{file}, line {number}: class number {label} is too large; classes count from 0")
    if not names:
        raise DataError(f"{file}: no line in it")
    _check_first(file, root, names[0])
    return Items(Files(str(root), names), np.array(labels, dtype=np.int64), _folder_names(names, labels))


def _folder_names(names: Sequence[str], labels: Sequence[int]) -> list[str]:
    """Folder of each class, where folders and classes are one to one and no class is missing."""
    pairs = {(label, os.path.basename(os.path.dirname(name))) for label, name in zip(labels, names, strict=True)}
    folder = dict(pairs)
    one_to_one = len(pairs) == len(folder) == len(set(folder.values())) == max(folder) + 1
    return [shown(folder[c]) for c in range(len(folder))] if one_to_one and "" not in folder.values() else []


def _text(file: Path) -> str:
    """Content of a text file; bytes that are not UTF-8 are kept as surrogates, as names of files need not be UTF-8."""
    try:
        if not file.is_file():  # opening a pipe would wait for ever
            raise DataError(f"{file}: not a regular file")
        return file.read_text(encoding="utf-8", errors="surrogateescape")
    except (OSError, MemoryError) as error:
        raise DataError(f"{file}: cannot be read as text ({error})") from None


def _check_first(file: Path, root: Path, name: str) -> None:
    """A wrong root would otherwise show as a million unreadable images."""
    there = False
    with suppress(OSError, ValueError):  # of a name that cannot be one
        there = (root / name).is_file()
    if not there:
        raise DataError(
            f"{file}: its images are not where it says: {root / name} does not exist. "
            f"Paths count from {root}; a list can name another folder: {LIST}FILE@FOLDER"
        )
