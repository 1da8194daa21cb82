"""Recipes: read, merged with overrides, validated, written."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from uncollapse.config.impossible import impossible, meaningless
from uncollapse.config.methods import METHODS
from uncollapse.config.plain_yaml import parse_yaml, read_yaml, shortened
from uncollapse.config.schema import Config
from uncollapse.errors import ConfigError, PairingError
from uncollapse.shown import in_words, shown


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("uncollapse") / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, given by path or by the name of a recipe that ships with the package.

    Raises:
        ConfigError: no such recipe, unreadable YAML, or something other than a mapping.
    """
    path = Path(recipe)
    if str(recipe) in recipe_names():
        text = (resources.files("uncollapse") / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")
        content = parse_yaml(text, str(recipe))
    elif path.is_file():
        content = read_yaml(path)
    else:
        close = difflib.get_close_matches(str(recipe), recipe_names(), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(
            f"no recipe {str(recipe)!r}: {hint}give the path of a YAML file or one of {', '.join(recipe_names())}"
        )
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{recipe}: expected keys and values, found a {type(content).__name__}")
    return content


def set_key(content: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key (``optim.lr``) in nested mappings, in place."""
    *parents, last = key.split(".")
    for i, parent in enumerate(parents):
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            raise ConfigError(f"{key}: {'.'.join(parents[: i + 1])} is a value, it has no keys of its own")
    content[last] = value


def _known_keys(prefix: list[str]) -> list[str]:
    if prefix == ["method"]:  # of any method: which one it is, a recipe may say later
        return list(dict.fromkeys(f.name for record in METHODS.values() for f in dataclasses.fields(record)))
    cls: Any = Config
    for name in prefix:
        types = {f.name: f.default_factory for f in dataclasses.fields(cls)}
        cls = types.get(name)
        if not dataclasses.is_dataclass(cls):
            return []
    return [f.name for f in dataclasses.fields(cls)]


def all_keys(prefix: Sequence[str] = ()) -> list[str]:
    """Every dotted key of a recipe."""
    inner = [[*prefix, name] for name in _known_keys(list(prefix))]
    return [key for path in inner for key in (all_keys(path) or [".".join(path)])]


def _one_line(error: ValidationError, source: str) -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    if location[:1] == ["method"] and len(location) > 2:
        del location[1]  # which of the methods
    if first["type"] == "union_tag_invalid":
        location, first = (
            ["method", "name"],
            {**first, "msg": f"one of {', '.join(METHODS)}", "input": first["ctx"]["tag"]},
        )
    key = ".".join(location)
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_keys(location[:-1])
        if location[0] == "method" and location[-1] in known:
            return f"{source}: {key}: the method has no such key; it belongs to another one"
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return f"{source}: unknown key {shortened(key)!r} ({hint})"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    message = message if first["type"] == "value_error" else f"should be {message}"
    names = re.findall(r"[\w-]+", message) if location[-1:] == ["name"] or first["type"] == "literal_error" else []
    close = difflib.get_close_matches(str(first["input"]), names, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"{source}: {key}: {message}, got {shortened(repr(first['input']))}{hint}"


@functools.cache
def _adapter() -> TypeAdapter[Config]:
    return TypeAdapter(Config)  # a fifth of a second to make


def build_config(
    content: dict[str, Any], source: str = "config", retired: bool = False, together: bool = True
) -> Config:
    """A validated :class:`Config` from nested mappings.

    Args:
        content: as YAML or a checkpoint has it.
        source: what to call it in an error.
        retired: whether options that no longer exist are left out, to look at what a run of before has made; without
            it, only where they change nothing.
        together: whether it is also checked that values go together, which those of a recipe still to be shrunk need
            not.

    Raises:
        ConfigError: unknown key, wrong type or impossible value; one line that names the key.
        PairingError: a method and a way to learn prototypes that mean nothing together.
    """
    content = _as_now(content, source, retired)
    try:
        config = _adapter().validate_json(json.dumps(content, ensure_ascii=False).encode(), strict=True)
    except ValidationError as error:
        raise ConfigError(_one_line(error, source)) from None
    except UnicodeEncodeError as error:  # of a path: nothing else can hold such bytes
        near = shown(error.object[max(0, error.start - 60) : error.end + 20])
        raise ConfigError(f"{source}: {near}: not UTF-8; reach it by another name, such as a symbolic link") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {in_words(error)}") from None
    for key, problem in impossible(config) if together else ():
        raise ConfigError(f"{source}: {key}: {problem}")
    for key, problem in meaningless(config) if together else ():
        raise PairingError(f"{source}: {key}: {problem}")
    return config


_REMOVED = {
    "queue": "rows of earlier steps took the balance and left the batch's own without",
    "top": "it saved part of one product and changed what the mixture learns",
    **dict.fromkeys(
        ("assignment", "forgetting", "blocks", "linear", "saturated", "whiten", "renew_steps", "renew", "renew_until"),
        "the study found no use for it (docs/study.md; commit 4a4952f has it)",
    ),
}
"""Options of the mixture that are gone, and why; one that was not used is passed over."""
_NOT_USED = {"whiten": "none", "renew": "oldest", "renew_until": 1.0}
"""What those say that had a default."""


def _as_now(content: dict[str, Any], source: str, retired: bool) -> dict[str, Any]:
    """Keys of run folders of before under their names of today; what no longer exists is refused where it was used."""
    if isinstance(method := content.get("method"), dict):
        content = {**content, "method": {"name": "dino", **method}}
    prototypes = content.get("prototypes")
    if not isinstance(prototypes, dict):
        return content
    mixture = prototypes.get("mixture")
    if not isinstance(mixture, dict):
        return content
    for key, why in _REMOVED.items():
        if mixture.get(key) and mixture[key] != _NOT_USED.get(key) and not retired:
            name = f"{source}: prototypes.mixture.{key}"
            raise ConfigError(f"{name}: this option was removed, because {why}; leave it out")
    rest = {key: value for key, value in mixture.items() if key not in ("target", *_REMOVED)}
    targets = {"targets": mixture["target"]} if "target" in mixture else {}
    return {**content, "prototypes": {**targets, **prototypes, "mixture": rest}}


def load_config(recipe: str | Path, overrides: Mapping[str, Any] | None = None, together: bool = True) -> Config:
    """Recipe and overrides (dotted keys), merged and validated; ``together`` as :func:`build_config` has it.

    Raises:
        ConfigError: see :func:`read_recipe` and :func:`build_config`.
    """
    content = read_recipe(recipe)
    overrides = overrides or {}
    backbone = content.get("backbone")
    renamed = isinstance(backbone, dict) and overrides.get("backbone.name", backbone.get("name")) != backbone.get(
        "name"
    )
    if renamed and isinstance(backbone, dict):
        backbone.pop("options", None)  # those of the recipe's own model, which another one does not take
    for key, value in overrides.items():
        set_key(content, key, value)
    return build_config(content, str(recipe), together=together)


def dump_config(config: Config) -> str:
    """The configuration as YAML that :func:`load_config` reads back to an equal one."""
    return yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config))), sort_keys=False)
