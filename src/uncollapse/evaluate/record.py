"""Where results stay: ``evaluation.json``, merged task by task, and scalars for TensorBoard."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from uncollapse.checkpoint import write_atomically
from uncollapse.shown import shown

if TYPE_CHECKING:
    from uncollapse.evaluate.run import Evaluated

FILE = "evaluation.json"
FORMAT = 1
LARGEST_PICTURE = 1 << 24
"""Bytes; ours have some ten thousand."""

_Count = Annotated[int, Field(strict=True, ge=0, lt=2**53)]
_Ends = tuple[float | None, float | None]


class _Task(BaseModel):
    """Whatever else it holds is a metric."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | None]
    ci95: _Ends | None = None
    ci95_of: dict[str, _Ends] = {}
    n: _Count = 0
    protocol: str = ""
    source: str = ""
    command: str = ""
    details: dict[str, Any] = {}


class _Picture(BaseModel):
    file: str
    caption: str
    alt: str


class _Encoder(BaseModel):
    name: str = ""
    described: str = ""
    weights: str | None = None
    images: str = ""
    step: _Count | None = None
    size: _Count | None = None
    notes: list[str] = []
    pictures: dict[str, list[_Picture]] = {}
    tasks: dict[str, _Task] = {}


class _DataSet(BaseModel):
    n_train: _Count = 0
    n_test: _Count = 0
    classes: _Count = 0
    encoders: dict[str, _Encoder] = {}


_DATA = TypeAdapter(dict[str, _DataSet])


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """The contents of ``evaluation.json``, empty where there is none; None (and a warning) if it is not understood.

    ``{"format": 1, "data": {KEY: {"n_train", "n_test", "classes", "encoders": {LABEL: {"name", "described",
    "weights", "images", "step", "size", "notes", "pictures", "tasks": {TASK: {METRIC: value, "ci95", "ci95_of", "n",
    "protocol", "source", "details", "command"}}}}}}}``
    """
    path = folder / FILE
    if not path.exists():
        return {"format": FORMAT, "data": {}}
    try:
        return understood(path)
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"{shown(path)}: not understood ({shown(' '.join(str(error).split()))})", stacklevel=2)
    return None


def understood(path: Path) -> dict[str, Any]:
    """The contents of an ``evaluation.json`` whose every entry is of the type that `merge` writes.

    Raises:
        OSError, ValueError, RecursionError: it cannot be read, is no JSON, or holds something else; says what.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"format {content.get('format') if isinstance(content, dict) else '?'} is not {FORMAT}")
    try:
        _DATA.validate_python(content.get("data"))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))[:120]}: {first['msg']}") from None
    return content


def merge(folder: Path, key: str, one: Evaluated, command: str) -> None:
    """Adds one encoder's results to a folder's ``evaluation.json``: a task done again replaces its older result.

    Results of the same label with other weights (the run went on), of other images or labels, or at another size are
    dropped, not mixed. Written atomically.

    Args:
        key: of the data set and its cuts. command: the command line, stored with each task.
    """
    content = read_evaluation(folder)
    if content is None:  # somebody may still want it
        (folder / FILE).replace(folder / f"{FILE}.old")
        warnings.warn(f"{folder / FILE} is kept as {FILE}.old and a new one begun", stacklevel=2)
        content = {"format": FORMAT, "data": {}}
    state = {"weights": one.encoder.weights_hash, "images": one.images, "size": one.encoder.size}
    old = content["data"].get(key, {}).get("encoders", {}).get(one.label, {})
    tasks = old.get("tasks", {}) if all(old.get(name) == value for name, value in state.items()) else {}
    for result in one.results:
        tasks[result.task] = {**finite(result.to_json()), "command": command}
    if not tasks:  # nothing worked: no entry to wonder about
        return
    data = content["data"].setdefault(key, {"encoders": {}})
    data |= {"n_train": one.n_train, "n_test": one.n_test, "classes": one.classes}
    pictures = {t: p for t, p in old.get("pictures", {}).items() if t in tasks}
    pictures |= _drawn(folder, key, one)
    data["encoders"][one.label] = {
        "name": one.encoder.name, "described": one.encoder.described, **state,
        "step": one.encoder.step, "notes": one.notes, "tasks": tasks,
        "pictures": pictures,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / FILE, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def _drawn(folder: Path, key: str, one: Evaluated) -> dict[str, list[dict[str, str]]]:
    """Writes the pictures into ``FOLDER/evaluation`` and lists them by task."""
    out: dict[str, list[dict[str, str]]] = {}
    for i, picture in enumerate(one.pictures):
        head, _, content = picture.src.partition(",")
        ending = "svg" if "svg" in head else "png"
        name = f"{slug(key, one.label)}-{picture.task}{i}.{ending}"
        (folder / "evaluation").mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "evaluation" / name, base64.b64decode(content))
        entry = {"file": f"evaluation/{name}", "caption": picture.caption, "alt": picture.alt}
        out.setdefault(picture.task, []).append(entry)
    return out


def slug(key: str, label: str) -> str:
    """Data set and encoder as a file's name; a digest tells sets apart whose paths end alike."""
    name = re.sub(r"[^\w.-]+", "-", f"{Path(key.split(',')[0]).name}-{label}").strip("-")
    return f"{name}-{hashlib.sha256(key.encode(errors='surrogateescape')).hexdigest()[:6]}"


def embed_pictures(folder: Path, data: dict[str, Any]) -> None:
    """Adds to each picture of an ``evaluation.json`` its ``src``; one that is not ours, or gone, goes without.

    Ours are PNG and SVG files in ``FOLDER/evaluation``: an entry may name any file, and say any address.
    """
    ours = (folder / "evaluation").resolve()
    for of_set in data.values():
        for encoder in of_set.get("encoders", {}).values():
            for picture in (p for found in encoder.get("pictures", {}).values() for p in found):
                picture.pop("src", None)
                if kind := _picture_kind(ours, folder / picture["file"]):
                    content = base64.b64encode((folder / picture["file"]).read_bytes()).decode()
                    picture["src"] = f"data:image/{kind};base64,{content}"


def _picture_kind(ours: Path, path: Path) -> str:
    try:
        inside = path.resolve().is_relative_to(ours) and path.is_file() and path.stat().st_size <= LARGEST_PICTURE
        if not inside:
            return ""
        with path.open("rb") as file:
            start = file.read(512).lstrip()
    except (OSError, ValueError, RuntimeError):  # a name with a null, a loop of links
        return ""
    if path.suffix == ".png" and start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "svg+xml" if path.suffix == ".svg" and start.startswith((b"<?xml", b"<svg", b"<!DOCTYPE svg")) else ""


def finite(value: Any) -> Any:
    """JSON has no NaN: an interval that could not be had is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(name): finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value


def add_scalars(folder: Path, key: str, found: Sequence[Evaluated]) -> None:
    """``evaluate/TASK/METRIC`` at the encoder's step, a TensorBoard run per data set and encoder.

    A failing write is a warning: the numbers are in ``evaluation.json``.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter

        for one in found:
            board = SummaryWriter(str(folder / "tensorboard" / f"evaluate-{slug(key, one.label)}"))
            for result in one.results:
                for name, value in result.metrics.items():
                    if math.isfinite(value):
                        board.add_scalar(f"evaluate/{result.task}/{name}".replace(" ", "_"), value, one.encoder.step)
            board.close()
    except Exception as error:
        warnings.warn(f"no TensorBoard events of the evaluation: {error}", stacklevel=2)
