"""The golden run: a dozen steps of the tiny demo for every arm, as losses and a digest of the weights.

    python tests/golden.py write FILE    before a change
    python tests/golden.py check FILE    after it, on the same machine: says where the first bit differs

``tests/golden.json`` holds what the test compares with, within what versions of torch and processors differ by.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from uncollapse.config.facts import arm_keys
from uncollapse.config.load import load_config
from uncollapse.config.schema import DEMO_ARMS
from uncollapse.config.tiny import tiny
from uncollapse.run_folder.checkpoint import load_checkpoint
from uncollapse.run_folder.log import read_rows
from uncollapse.training.run import train

FILE = Path(__file__).with_suffix(".json")
STEPS = 12
PARTS = ("student", "teacher", "prototypes")


def tensors(content: Any) -> list[torch.Tensor]:
    """All tensors of nested mappings in their order, whatever their names."""
    if isinstance(content, torch.Tensor):
        return [content]
    return [t for value in content.values() for t in tensors(value)] if isinstance(content, dict) else []


def weights(saved: dict[str, Any]) -> torch.Tensor:
    return torch.cat([t.double().flatten() for part in PARTS for t in tensors(saved[part])])


def golden(arm: str, out: Path) -> dict[str, Any]:
    """Losses and what is left of the weights: all bits as a digest, and some sums that rounding moves a little."""
    config = tiny(load_config("demo", {**arm_keys(arm), "log.every_steps": 1}))
    train(config, out, max_steps=STEPS, say=lambda line: None, accelerator="cpu")
    values = weights(load_checkpoint(out / "checkpoints"))
    return {
        "losses": [row["loss"] for row in read_rows(out / "metrics.jsonl") if row["kind"] == "step"],
        "digest": hashlib.sha256(values.numpy().tobytes()).hexdigest(),
        "numbers": len(values),
        "norm": values.norm().item(),
        "waves": [(values * torch.arange(len(values)).double().mul(w).cos()).sum().item() for w in (0.1, 1.0, 2.0)],
    }


def all_golden() -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return {arm: golden(arm, Path(folder) / arm) for arm in DEMO_ARMS}


def main() -> int:
    if len(sys.argv) != 3 or sys.argv[1] not in ("write", "check"):
        print(__doc__)
        return 2
    file, runs = Path(sys.argv[2]), all_golden()
    if sys.argv[1] == "write":
        file.write_text(json.dumps(runs, indent=1))
        return 0
    before = json.loads(file.read_text())
    for arm, run in runs.items():
        different = [i for i, (a, b) in enumerate(zip(run["losses"], before[arm]["losses"], strict=True)) if a != b]
        first = f"losses differ from step {different[0] + 1} on" if different else "weights differ"
        print(f"{arm}: {'the same bits' if run == before[arm] else first}")
    return int(runs != before)


if __name__ == "__main__":
    sys.exit(main())
