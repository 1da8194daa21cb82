"""``uncollapse recipes`` and ``uncollapse recipe NAME``: what there is to train."""

from __future__ import annotations

import argparse
import dataclasses
import re
from importlib import resources
from typing import Any

from uncollapse.cli.terminal import print_json
from uncollapse.config.facts import method_name, mode_name
from uncollapse.config.load import dump_config, load_config, recipe_names
from uncollapse.config.schema import Config


def add_parsers(commands: Any) -> None:
    recipes = commands.add_parser("recipes", help="list the recipes that ship: method, backbone, K, source")
    as_what = recipes.add_mutually_exclusive_group()
    as_what.add_argument("--names", action="store_true", help="names alone, one a line")
    as_what.add_argument("--json", action="store_true", help="print a JSON list, one object per recipe")
    recipes.set_defaults(run=_recipes)
    recipe = commands.add_parser("recipe", help="print a recipe with every key it leaves at its default")
    recipe.add_argument("name", help="a recipe's name (`uncollapse recipes` lists them) or a YAML file")
    recipe.add_argument("--json", action="store_true", help="print one JSON object instead of YAML")
    recipe.set_defaults(run=_recipe)


def _recipe(arguments: argparse.Namespace, overrides: dict[str, Any]) -> None:
    config = load_config(arguments.name, overrides)
    if arguments.json:
        print_json(dataclasses.asdict(config))
        return
    print(dump_config(config), end="")


def _recipes(arguments: argparse.Namespace, overrides: dict[str, Any]) -> None:
    if arguments.names:
        print("\n".join(recipe_names()))
        return
    configs = {name: load_config(name) for name in recipe_names()}
    if arguments.json:
        print_json([_row(name, config) for name, config in configs.items()])
        return
    from rich.padding import Padding

    from uncollapse.progress import SteadyConsole

    console = SteadyConsole(highlight=False)
    for name, config in configs.items():
        k = f"K = {config.prototypes.count:,}"
        console.print(f"[bold]{name}[/bold]  {method_name(config)} · {config.backbone.name} · {k}")
        console.print(Padding(_described(name), (0, 0, 0, 4)), markup=False)


def _row(name: str, config: Config) -> dict[str, Any]:
    return {
        "name": name,
        "method": method_name(config),
        "prototypes": config.prototypes.count,
        "mode": mode_name(config),
        "backbone": config.backbone.name,
        "described": _described(name),
    }


def _described(name: str) -> str:
    """The first sentence of the comment that begins a recipe; the rest says where it differs from the published one."""
    text = (resources.files("uncollapse") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return re.split(r"(?<=[a-z)])\. (?=[A-Z])", " ".join(lines))[0].removesuffix(".")
