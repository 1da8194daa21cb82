"""Run folders read back; a missing piece is never an error, and a damaged one is named and left out."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from uncollapse.measure.catalogue import Row
from uncollapse.run_folder.summary import read_summary
from uncollapse.shown import in_words, shown

MOST_ARRAY = 1 << 28
"""Bytes of the largest array of a ``diagnosis.npz`` that is read: ours stay far below."""


@dataclass
class RunRecord:
    """What one training run left behind; a missing piece is empty and the report goes without it."""

    name: str
    """The mode: how the prototypes were learned, such as ``joint``."""
    seed: int = 0
    metrics: list[Row] = field(default_factory=list)
    """Rows of ``metrics.jsonl``: kinds ``step``, ``sweep`` and ``warning``."""
    summary: Row = field(default_factory=dict)
    """What ``summary.json`` has of the entries of a `Summary`."""
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    """The arrays of ``diagnosis.npz``."""
    evaluation: Row = field(default_factory=dict)
    """What `uncollapse evaluate` measured: the ``data`` of ``evaluation.json``."""
    config: Row = field(default_factory=dict)
    """``config.yaml`` with dotted keys and every default; empty where there is none."""
    folder: str = ""
    method: str = "dino"
    """The objective, such as ``carp``; with ``name`` it makes an arm. Runs of before were all DINO's."""
    set: str = ""
    """Which further set of prototypes this is about, as `of_set` gives it; empty: the run's own numbers."""
    problems: list[str] = field(default_factory=list)
    """A line for each damaged piece, which was left out."""


Arms = dict[str, list[RunRecord]]
"""The runs of each arm, one per seed."""


def of_set(run: RunRecord, name: str) -> RunRecord:
    """What a run recorded of a further set of prototypes, under the names that the first set's numbers have."""
    common, end = ("step", "epoch", "kind"), f"/{name}"
    rows = [{k.removesuffix(end): v for k, v in r.items() if k in common or k.endswith(end)} for r in run.metrics]
    rows = [row for row in rows if row.get("kind") != "warning"]
    of_run = {"summary": run.summary["sets"][name], "metrics": rows, "arrays": {}, "evaluation": {}}
    return dataclasses.replace(run, set=name, **of_run)


def read_run(folder: Path) -> RunRecord:
    """Reads ``summary.json``, ``config.yaml``, ``metrics.jsonl``, ``diagnosis.npz`` and ``evaluation.json``.

    Whichever exist: what cannot be read, or holds other types than a run writes, is left out and named in `problems`.
    """
    record = RunRecord(shown(folder.name)[:80], folder=shown(folder))
    for name, read in (
        ("summary.json", _summary),
        ("config.yaml", _config),
        ("metrics.jsonl", _metrics),
        ("diagnosis.npz", _arrays),
        ("evaluation.json", _evaluation),
    ):
        path = folder / name
        try:
            if path.is_file():
                read(path, record)
        # Whatever a file's bytes make a parser raise, the other files and the other runs are still worth reading.
        except Exception as error:
            reason = in_words(error)[:200]
            record.problems.append(f"{shown(path)}: damaged and left out ({shown(reason)})")
    return record


# ------------------------------------------------------------------------------------ one reader a file


def _summary(path: Path, record: RunRecord) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, found a {type(content).__name__}")
    record.summary, wrong = read_summary(content)
    if wrong:
        record.problems.append(f"{shown(path)}: of another type than a run writes, and left out: {', '.join(wrong)}")
    record.name = record.summary.get("name") or record.name
    record.method = record.summary.get("method") or record.method
    record.seed = record.summary.get("seed") or 0


def _config(path: Path, record: RunRecord) -> None:
    from uncollapse.config.load import build_config, read_recipe

    content = read_recipe(path)
    built = flat(dataclasses.asdict(build_config(content, str(path), retired=True)))
    # An option that no longer exists still tells runs of before apart; the target only has another name now.
    gone = {k: v for k, v in flat(content).items() if v and k not in built and k != "prototypes.mixture.target"}
    record.config = gone | built


def flat(content: Row, prefix: str = "") -> Row:
    """Nested mappings with dotted keys."""
    out: Row = {}
    for key, value in content.items():
        if isinstance(value, dict) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _metrics(path: Path, record: RunRecord) -> None:
    from uncollapse.run_folder.log import read_rows

    rows = read_rows(path)
    good = [r for r in rows if isinstance(r.get("step", 0), int) and abs(r.get("step", 0)) < 2**53]
    for row in good:
        if row.get("kind") == "sweep":
            counts = {key: value for key, value in row.items() if key.partition("/")[0] == "unique"}
            row |= {"unique": {}} | {key: value if isinstance(value, dict) else {} for key, value in counts.items()}
    record.metrics = good
    if len(good) < len(rows):
        record.problems.append(f"{shown(path)}: {len(rows) - len(good)} rows without a step are left out")


_SHAPES = {
    "circle": ("f", 2),
    "usage": ("iu", 1),
    "movement": ("f", 1),
    "sweep_eps": ("f", 1),
    "sweep_unique": ("iuf", 1),
    "duplicate_ids": ("iu", 1),
    "unique_ids": ("iu", 1),
    "duplicate_images": ("u", 5),
    "unique_images": ("u", 5),
    "view_information_of_image": ("f", 1),
    "knn_balanced_of_image": ("f", 1),
    "linear_balanced_of_image": ("f", 1),
    "knn_correct": ("b", 1),
    "linear_correct": ("b", 1),
}
"""Kind of the numbers and dimensions of each array that is read."""


def _arrays(path: Path, record: RunRecord) -> None:
    with zipfile.ZipFile(path) as archive:
        sizes = {i.filename.removesuffix(".npy"): i.file_size for i in archive.infolist()}
        arrays, bad = {}, []
        for name in _SHAPES:
            if name not in sizes:
                continue
            try:
                arrays[name] = _array(archive, name, sizes[name])
            except Exception as error:  # of one array; the others may still be whole
                bad.append(f"{name} ({shown(in_words(error))[:80]})")
    for one, other in (("circle", "usage"), ("movement", "usage"), ("sweep_eps", "sweep_unique")):
        if one in arrays and other in arrays and len(arrays[one]) != len(arrays[other]):
            bad.append(f"{one} (its length is not that of {other})")
            del arrays[one]
    record.arrays = arrays
    if bad:
        record.problems.append(f"{shown(path)}: arrays damaged and left out: {', '.join(bad)}")


def _array(archive: zipfile.ZipFile, name: str, size: int) -> np.ndarray:
    if size > MOST_ARRAY:
        raise ValueError(f"{size:,} bytes, more than any run writes")
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        count = 1
        for side in shape:
            count *= int(side)
        kinds, dimensions = _SHAPES[name]
        if dtype.kind not in kinds or len(shape) != dimensions:
            raise ValueError(f"is {dtype} of {len(shape)} dimensions")
        data = file.read(count * dtype.itemsize + 1 if count * dtype.itemsize <= size else 0)
        if len(data) != count * dtype.itemsize:
            raise ValueError("is cut short")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C").copy()
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError("holds NaN or infinite values")
    if dtype.kind == "i" and array.size and int(array.min()) < 0:
        raise ValueError("holds negative counts")
    if dimensions == 5 and (dtype != np.uint8 or (array.size and array.shape[-1] != 3)):
        raise ValueError("holds no images")
    if name == "circle" and array.shape[1] != 2:
        raise ValueError("is not in the plane")
    return array


def _evaluation(path: Path, record: RunRecord) -> None:
    from uncollapse.run_folder.evaluation import embed_pictures, understood

    record.evaluation = understood(path)["data"]
    embed_pictures(path.parent, record.evaluation)


def common(runs: Sequence[RunRecord], name: str) -> str:
    """The values of a summary's entry over the runs, without repeats; empty where there is none."""
    values = dict.fromkeys(v for run in runs if (v := run.summary.get(name)) is not None)
    return " / ".join(f"{v:,}" if isinstance(v, int) else str(v) for v in values)
