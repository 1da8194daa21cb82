"""The demonstration: one objective, several ways to learn its prototypes, from one start on the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from uncollapse.cli.grid import Cell, Outcome, cores, write_grid
from uncollapse.config.facts import arm_keys
from uncollapse.config.load import load_config

NOTE = (
    "The prototypes' learning rate (×10) and weight decay (1) are raised on purpose: they fit into a minute the "
    "collapse that a full-size run reaches over its hundred epochs. Digits are easy (an untrained encoder already "
    "does well), so this page claims nothing about kNN on harder images."
)


def run_demo(
    out: Path,
    seeds: int,
    arms: list[str],
    max_steps: int | None,
    jobs: int | None,
    overrides: dict[str, Any],
    again: str,
    as_json: bool = False,
) -> Outcome:
    """A comparison on real 8×8 digits; ``again`` is the command that goes on where it was interrupted.

    Raises:
        ConfigError: ``out`` holds something else than a demo, or one of another configuration.
    """
    cells = [
        Cell(
            f"{arm} {seed}",
            load_config("demo", {**overrides, **arm_keys(arm), "seed": seed}),
            out / "arms" / f"{arm}-seed{seed}",
        )
        for seed in range(seeds)
        for arm in arms
    ]
    jobs = min(jobs or cores(), len(cells))
    return write_grid(cells, out, max_steps, jobs, [], again, "Do the prototypes collapse?", (NOTE,), as_json=as_json)
