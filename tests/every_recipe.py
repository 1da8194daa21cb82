"""Every recipe with every way to learn prototypes, shrunk, a few steps each on real digits: minutes, so no test.

    python tests/every_recipe.py [RECIPE ...]

Prints what is refused, and why; exits 1 where anything else went wrong.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

from uncollapse.config.facts import arm_keys
from uncollapse.config.load import recipe_names
from uncollapse.config.schema import KINDS, RIVALS
from uncollapse.config.tiny import load_tiny
from uncollapse.errors import PairingError
from uncollapse.training.run import train

STEPS = 3


def outcome(recipe: str, way: str) -> str:
    """``trained``, ``refused: why`` or ``failed: why``."""
    keys = {"data.path": "builtin:digits", "data.held_out_max": 16, **arm_keys(way)}
    with tempfile.TemporaryDirectory() as folder, patch("uncollapse.training.summary.finish_run", lambda *_: {}):
        try:
            train(load_tiny(recipe, keys), Path(folder) / "run", STEPS, say=lambda line: None, accelerator="cpu")
        except PairingError as error:
            return f"refused: {error}"
        except Exception as error:
            return f"failed: {type(error).__name__}: {error}"
    return "trained"


def main() -> None:
    counts: dict[str, int] = {}
    for recipe in sys.argv[1:] or recipe_names():
        for way in (*KINDS, *RIVALS):
            what = outcome(recipe, way)
            kind = what.partition(":")[0]
            counts[kind] = counts.get(kind, 0) + 1
            if kind != "trained":
                print(f"{recipe} {way}: {what}")
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    sys.exit(int("failed" in counts))


if __name__ == "__main__":
    main()
