"""``uncollapse compare``: objectives × ways to learn prototypes × seeds on one set of images, as one table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from uncollapse.cli.train import at_least_one, data_key, must_exist
from uncollapse.config.load import load_config
from uncollapse.config.schema import ARMS, Config, arm_keys
from uncollapse.errors import ConfigError


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("compare", help="objectives × ways to learn prototypes × seeds on your images")
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
    parser.add_argument("--tiny", action="store_true", help="shrink every recipe to run in seconds")
    parser.add_argument("--jobs", type=int, help="runs at once (default: one per CUDA device, else per core)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.set_defaults(run=compare)


def compare(arguments: argparse.Namespace, overrides: dict[str, Any]) -> None:
    at_least_one(arguments, "seeds", "max_steps", "jobs")
    overrides = {**overrides, **data_key(arguments.data)}
    from uncollapse.cli.grid import Cell, cores, write_grid

    cells = [
        Cell(
            name := f"{Path(recipe).stem} {arm} {seed}",
            _config(recipe, arm, seed, overrides, arguments.tiny),
            arguments.out / "runs" / name.replace(" ", "-"),
        )
        for seed in range(arguments.seeds)
        for recipe in arguments.recipes
        for arm in arguments.prototypes
    ]
    devices = _devices(arguments.device)
    jobs = min(arguments.jobs or len(devices) or cores(), len(cells))
    write_grid(cells, arguments.out, arguments.max_steps, jobs, devices, arguments.again, "Do the prototypes collapse?")


def _config(recipe: str, arm: str, seed: int, overrides: dict[str, Any], small: bool) -> Config:
    from uncollapse.config.tiny import tiny

    keys = {**overrides, **arm_keys(arm), "seed": seed}
    config = load_config(recipe, keys)
    config = tiny(config, keys) if small else config
    must_exist(config, fresh=True)
    return config


def _devices(wanted: str) -> list[str]:
    if wanted == "cpu":
        return []
    import torch

    found = [str(i) for i in range(torch.cuda.device_count())]
    if wanted == "cuda" and not found:
        raise ConfigError("--device cuda: torch finds no CUDA device here; leave it out to use the CPU")
    return found
