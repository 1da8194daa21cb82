"""``evaluation.json`` of a run folder, read back."""

from __future__ import annotations

import base64
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from uncollapse.shown import in_words, shown

if TYPE_CHECKING:
    pass

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


def evaluation_key(data: str, long_tail: float, words: Sequence[str] = ()) -> str:
    """The name of a data set in ``evaluation.json``: what it is, and how it was cut."""
    cuts = [*words, *([f"long tail {long_tail:g}"] if long_tail > 1 else [])]
    return data + (f" ({', '.join(cuts)})" if cuts else "")


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
        warnings.warn(f"{shown(path)}: not understood ({shown(in_words(error))})", stacklevel=2)
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


def embed_pictures(folder: Path, data: dict[str, Any]) -> None:
    """Adds to each picture of an ``evaluation.json`` its ``src``; one that is not ours, or gone, goes without.

    Ours are PNG and SVG files in ``FOLDER/evaluation``: an entry may name any file, and say any address.
    """
    ours = (folder / "evaluation").resolve()
    for of_set in data.values():
        for encoder in of_set.get("encoders", {}).values():
            for picture in (p for pictures in encoder.get("pictures", {}).values() for p in pictures):
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
