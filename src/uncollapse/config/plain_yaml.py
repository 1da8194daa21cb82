"""YAML of recipes and run folders: plain values only, within bounds, and one clear line where it is anything else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from uncollapse.errors import ConfigError
from uncollapse.shown import in_words

MOST_BYTES = 1 << 20
"""A recipe of a megabyte is none."""
MOST_VALUES = 10_000
"""Values of one text; what an alias stands for counts every time, so that a few lines cannot fill the memory."""


class _Loader(yaml.SafeLoader):
    """YAML whose floats include 1e-3, which YAML 1.1 reads as a string; dates stay text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*([eE][-+]?\d+)|\d[\d_]*\.[\d_]*|\.\d+([eE][-+]?\d+)?)$"),
    list("-+0123456789."),
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if not tag.endswith(":timestamp")]
    for first, rules in _Loader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text: nested dicts and lists of text, numbers, booleans and None.

    Raises:
        ConfigError: not YAML, or too large or too deep; begins with ``source``.
    """
    try:
        value = yaml.load(text, _Loader)
    except RecursionError:
        raise ConfigError(f"{source}: brackets or indents too deep to be a recipe") from None
    except Exception as error:  # the values of tags (!!int, !!float …) fail in ways of their own
        raise ConfigError(f"{source}: not valid YAML: {shortened(in_words(error))}") from None
    waiting, seen = [value], 0
    while waiting:
        inner = waiting.pop()
        seen += 1
        if seen > MOST_VALUES:
            raise ConfigError(f"{source}: more than {MOST_VALUES:,} values, aliases counted each time they stand")
        waiting += inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list | set) else []
    return value


def read_yaml(path: Path) -> Any:
    """:func:`parse_yaml` of a file, which must be text in UTF-8 of at most a megabyte."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{path}: more than {MOST_BYTES:,} bytes, too large to be a recipe")
    try:
        return parse_yaml(content.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is 0x{content[error.start]:02x}"
        raise ConfigError(f"{path}: not text in UTF-8 ({where}); save it as UTF-8") from None


def parse_value(text: str) -> Any:
    """The YAML value of one command-line word (``1e-3`` is a float, ``[0.2, 1.0]`` a list)."""
    return parse_yaml(text, f"the value {shortened(text)!r}")


def shortened(text: str, most: int = 120) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
