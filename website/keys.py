"""Writes docs/keys.md, every key of a recipe with its default and meaning, from the dataclasses that define them.

    python website/keys.py

The suite holds the page against the code.
"""

import ast
import dataclasses
import inspect
import json
import types
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from uncollapse.config.methods import METHODS
from uncollapse.config.schema import Config

PAGE = Path(__file__).resolve().parent.parent / "docs/keys.md"
SIGNS = {Ge: "≥ {}", Gt: "> {}", Le: "≤ {}", Lt: "< {}"}
INTRODUCTION = """# Every key of a recipe

Written by `python website/keys.py` from [schema.py](../src/uncollapse/config/schema.py) and
[methods.py](../src/uncollapse/config/methods.py). A recipe names what differs from these
defaults; `uncollapse recipe NAME` prints all that it amounts to. On the command line a key is `--optim.lr 1e-3`. `null`
leaves it to the method or mode.

"""
HUGE = 1e9
"""Bounds beyond it only keep out what no number can be meant to be."""


def meanings(cls: type) -> dict[str, str]:
    """The string under each attribute."""
    body = ast.parse(inspect.getsource(cls)).body[0].body
    return {
        of.target.id: inspect.cleandoc(text.value.value).replace("\n", " ").replace("``", "`")
        for of, text in pairwise(body)
        if isinstance(of, ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(of.target, ast.Name)
    }


def kind(of: Any) -> str:
    """A type with its range in words."""
    origin, arguments = get_origin(of), get_args(of)
    if origin is Annotated:
        bounds = [m for a in arguments[1:] if isinstance(a, FieldInfo) for m in a.metadata]
        signs = [
            SIGNS[type(b)].format(f"{v:g}")
            for b in bounds
            if type(b) in SIGNS and abs(v := next(iter(dataclasses.astuple(b)))) < HUGE
        ]
        return ", ".join([kind(arguments[0]), *signs])
    if origin is Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if a is type(None) else kind(a) for a in arguments)
    if origin is tuple:
        kinds = [kind(a) for a in arguments]
        return f"{len(kinds)} of: {kinds[0]}" if len(set(kinds)) == 1 else "; ".join(kinds)
    return {int: "whole number", float: "number", bool: "true, false", str: "text"}.get(of, "names and values")


def default_of(f: dataclasses.Field) -> Any:
    return f.default if f.default is not dataclasses.MISSING else f.default_factory()


def table(cls: type, prefix: str) -> str:
    hints, said = get_type_hints(cls, include_extras=True), meanings(cls)
    lines = ["| key | default | takes | meaning |", "|---|---|---|---|"]
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(default := default_of(f)) or (prefix == "method." and f.name == "name"):
            continue
        if f.name not in said:
            raise SystemExit(f"{cls.__name__}.{f.name} has no string that says what it is")
        cells = [f"`{prefix}{f.name}`", f"`{json.dumps(default)}`", kind(hints[f.name]), said[f.name]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def section(title: str, cls: type, prefix: str) -> str:
    about = inspect.cleandoc(cls.__doc__ or "").replace("``", "`")
    generated = about.startswith(f"{cls.__name__}(")  # where the class has no docstring
    return f"## {title}\n\n" + ("" if generated else f"{about}\n\n") + table(cls, prefix)


def sections(cls: type, prefix: str) -> Iterator[str]:
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(inner := default_of(f)) and f.name != "method":
            yield section(prefix + f.name, type(inner), f"{prefix}{f.name}.")
            yield from sections(type(inner), f"{prefix}{f.name}.")


def page() -> str:
    parts = [INTRODUCTION + table(Config, ""), *sections(Config, "")]
    for name, cls in METHODS.items():
        if len(dataclasses.fields(cls)) > 1:
            parts.append(section(f"method.name {name}", cls, "method."))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
