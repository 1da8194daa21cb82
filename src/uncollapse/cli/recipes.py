"""``uncollapse recipes`` and ``uncollapse recipe NAME``: what there is to train."""

from __future__ import annotations

import argparse
import re
from importlib import resources
from typing import Any

from uncollapse.config.facts import method_name
from uncollapse.config.load import dump_config, load_config, recipe_names


def add_parsers(commands: Any) -> None:
    recipes = commands.add_parser("recipes", help="list the recipes that ship: method, backbone, K, source")
    recipes.add_argument("--names", action="store_true", help="names alone, one a line")
    recipes.set_defaults(run=_recipes)
    recipe = commands.add_parser("recipe", help="print a recipe with every key it leaves at its default")
    recipe.add_argument("name", help="a recipe's name (`uncollapse recipes` lists them) or a YAML file")
    recipe.set_defaults(run=_recipe)


def _recipe(arguments: argparse.Namespace, overrides: dict[str, Any]) -> None:
    print(dump_config(load_config(arguments.name, overrides)), end="")


def _recipes(arguments: argparse.Namespace, overrides: dict[str, Any]) -> None:
    if arguments.names:
        print("\n".join(recipe_names()))
        return
    from rich.console import Console
    from rich.padding import Padding

    console = Console(highlight=False)
    for name in recipe_names():
        config = load_config(name)
        k = f"K = {config.prototypes.count:,}"
        console.print(f"[bold]{name}[/bold]  {method_name(config)} · {config.backbone.name} · {k}")
        console.print(Padding(_described(name), (0, 0, 0, 4)), markup=False)


def _described(name: str) -> str:
    """The first sentence of the comment that begins a recipe; the rest says where it differs from the published one."""
    text = (resources.files("uncollapse") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return re.split(r"(?<=[a-z)])\. (?=[A-Z])", " ".join(lines))[0].removesuffix(".")
