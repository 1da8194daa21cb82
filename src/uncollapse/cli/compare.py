"""``uncollapse compare``: objectives × ways to learn prototypes × seeds on one set of images, as one table."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any, NamedTuple

from uncollapse.cli.train import at_least_one, data_key, must_exist
from uncollapse.config.facts import arm_keys, mode_name
from uncollapse.config.load import load_config
from uncollapse.config.plain_yaml import parse_value
from uncollapse.config.schema import ARMS, Config
from uncollapse.errors import ConfigError


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="objectives × ways to learn prototypes × seeds on your images",
        epilog="Any key of a recipe can be set for all runs, e.g. --run.batch 64.",
    )
    parser.add_argument("--recipes", nargs="+", required=True, metavar="RECIPE", help="names or YAML files")
    parser.add_argument(
        "--prototypes",
        nargs="+",
        default=list(ARMS),
        metavar="MODE",
        help=f"ways to learn prototypes, alone or with targets, as joint-sinkhorn (default: {' '.join(ARMS)})",
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs per cell; more than 1 gives mean ± spread")
    parser.add_argument("--data", help="image folder, Parquet file or folder of them, or builtin:digits")
    parser.add_argument("--out", type=Path, required=True, help="folder of the grid; the same one goes on")
    parser.add_argument("--max-steps", type=int, help="stop every run after so many steps")
    parser.add_argument(
        "--sweep",
        nargs="+",
        default=[],
        metavar="KEY=A,B,...",
        help="every run with each of these values, as prototypes=256,1024 (how many) or optim.lr=1e-3,3e-3",
    )
    parser.add_argument(
        "--branch",
        type=int,
        metavar="STEP",
        help="one run for each recipe and seed up to STEP; there all ways to learn prototypes leave it",
    )
    parser.add_argument("--trunk", default="joint", metavar="MODE", help="how that run learns them (default: joint)")
    parser.add_argument(
        "--freeze",
        nargs="+",
        default=[],
        metavar="PART@STEP",
        help="every run also with its encoder or its prototypes as they are from STEP on, as encoder@1000",
    )
    parser.add_argument("--tiny", action="store_true", help="shrink every recipe to run in seconds")
    parser.add_argument("--jobs", type=int, help="runs at once (default: one per CUDA device, else per core)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else on stdout")
    parser.set_defaults(run=compare)


class Row(NamedTuple):
    """What is trained once with each way to learn prototypes."""

    recipe: str
    seed: int
    keys: dict[str, Any]
    """Of the sweep."""

    @property
    def name(self) -> str:
        """Of the recipe and the sweep's values, the seed behind what is put between."""
        return " ".join([Path(self.recipe).stem, *(f"{key}={value}" for key, value in self.keys.items())])


def compare(arguments: argparse.Namespace, overrides: dict[str, Any]) -> None:
    at_least_one(arguments, "seeds", "max_steps", "jobs", "branch")
    overrides = {**overrides, **data_key(arguments.data)}
    swept = [_swept(word) for word in arguments.sweep]
    rows = [
        Row(recipe, seed, dict(zip([key for key, _ in swept], values, strict=True)))
        for seed in range(arguments.seeds)
        for recipe in arguments.recipes
        for values in itertools.product(*(values for _, values in swept))
    ]
    from uncollapse.cli.grid import Cell, cores, write_grid

    def cell(row: Row, arm: str, folder: str, **more: Any) -> Cell:
        keys = {**overrides, **row.keys, **arm_keys(arm), **more, "seed": row.seed}
        frozen = more.get("change.freeze", "")
        name = " ".join([row.name, arm, *([frozen] if frozen else []), str(row.seed)])
        return Cell(name, _config(row.recipe, keys, arguments.tiny), arguments.out / folder / name.replace(" ", "-"))

    trunks, cells, notes = [], [], []
    first: dict[tuple[str, int, str, str], str] = {}  # how the arm was called that is trained
    for row in rows:
        change: dict[str, Any] = {}
        if arguments.branch:
            trunks.append(cell(row, arguments.trunk, "trunks"))
            change = {"change.branch": str(trunks[-1].out.resolve()), "change.branch_step": arguments.branch}
        for arm in arguments.prototypes:
            for frozen in ("", *arguments.freeze):
                one = cell(row, arm, "runs", **change, **({"change.freeze": frozen} if frozen else {}))
                same = first.setdefault((row.name, row.seed, frozen, mode_name(one.config)), arm)
                if same == arm:
                    cells.append(one)
                else:  # the targets that an arm names may be the method's own
                    notes.append(f"{row.name}: {arm} is what {same} is there, and was not trained again.")
    devices = _devices(arguments.device)
    jobs = min(arguments.jobs or len(devices) or cores(), len(cells))
    left = f"All arms leave one run with {arguments.trunk} prototypes at step {arguments.branch}."
    write_grid(
        cells,
        arguments.out,
        arguments.max_steps,
        jobs,
        devices,
        arguments.again,
        "Do the prototypes collapse?",
        (*((left,) if trunks else ()), *dict.fromkeys(notes)),
        (trunks, arguments.branch),
        as_json=arguments.json,
    )


def _swept(word: str) -> tuple[str, list[Any]]:
    """Key and values of ``KEY=A,B,...``; ``prototypes`` is how many there are."""
    key, equals, text = word.partition("=")
    if key == "seed":
        raise ConfigError(f"--sweep {word}: take --seeds, which pairs the arms")
    if not equals or not text or not key:
        raise ConfigError(f"--sweep {word}: say KEY=A,B,..., as prototypes=256,1024")
    return {"prototypes": "prototypes.count"}.get(key, key), [parse_value(value) for value in text.split(",")]


def _config(recipe: str, keys: dict[str, Any], small: bool) -> Config:
    from uncollapse.config.tiny import load_tiny

    config = load_tiny(recipe, keys) if small else load_config(recipe, keys)
    must_exist(config, fresh=True)
    return config


def _devices(wanted: str) -> list[str]:
    if wanted == "cpu":
        return []
    import torch

    numbers = [str(i) for i in range(torch.cuda.device_count())]
    if wanted == "cuda" and not numbers:
        raise ConfigError("--device cuda: torch finds no CUDA device here; leave it out to use the CPU")
    return numbers
