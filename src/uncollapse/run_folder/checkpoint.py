"""A run's own checkpoints: written whole or not at all, verified before they are loaded."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from uncollapse.errors import CheckpointError
from uncollapse.run_folder.files import write_atomically

FORMAT = 1


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> bool:
    """Writes ``step-########.pt`` and its digest, then drops all but the newest ``keep``.

    The digest is written last and is what makes a checkpoint count. A full disk does not stop training:
    the partial file is removed, the older checkpoints stay, and a warning says so.

    Returns:
        Whether the checkpoint was written.
    """
    path = folder / f"step-{step:08d}.pt"
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, "step": step, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        digest = _digest(temporary)
        temporary.replace(path)
        write_atomically(path.with_suffix(".json"), json.dumps({"step": step, "sha256": digest}).encode())
    except (OSError, RuntimeError) as error:  # torch's zip writer wraps a failed write in a RuntimeError
        with suppress(OSError):  # the folder may be read-only or gone
            temporary.unlink(missing_ok=True)
            if not path.with_suffix(".json").exists():
                path.unlink(missing_ok=True)
        # torch's writer reports a short write in words of its own.
        short = "write failed" in str(error) or "unexpected pos" in str(error)
        full = short or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full" if full else str(error).splitlines()[0]
        warnings.warn(
            f"checkpoint at step {step} not written to {folder}: {why}. Older checkpoints are untouched; "
            "training goes on and tries again at the next one. Free some space now.",
            stacklevel=2,
        )
        return False
    for old in _steps(folder)[keep:]:
        with suppress(OSError):
            (folder / f"step-{old:08d}.json").unlink(missing_ok=True)
            (folder / f"step-{old:08d}.pt").unlink(missing_ok=True)
    return True


def _steps(folder: Path) -> list[int]:
    """Newest first; files of other names, such as ``step-00000040 (1).json``, are no checkpoints."""
    matches = (re.fullmatch(r"step-(\d{8,18})\.json", p.name) for p in folder.glob("step-*.json"))
    return sorted((int(name[1]) for name in matches if name), reverse=True)


def newest_step(folder: Path) -> int | None:
    """Step of the newest checkpoint, whole or not; None where there is none."""
    return next(iter(_steps(folder)), None)


def load_checkpoint(folder: Path, step: int | None = None) -> dict[str, Any] | None:
    """The newest checkpoint whose digest matches, or that of one ``step``, on the CPU; None where there is none.

    Loaded with ``weights_only``, so a tampered file cannot run code.

    Raises:
        CheckpointError: there are checkpoints, but every one is damaged.
    """
    steps = [number for number in _steps(folder) if step in (None, number)]
    for number in steps:
        path = folder / f"step-{number:08d}.pt"
        try:
            recorded = json.loads(path.with_suffix(".json").read_text())["sha256"]
            if _digest(path) != recorded:
                raise CheckpointError("its contents do not match its digest")
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            if state.get("format") != FORMAT:
                raise CheckpointError(f"format {state.get('format')} is not {FORMAT}")
            return state
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(f"skipping damaged checkpoint {path}: {reason}", stacklevel=2)
    if steps:
        raise CheckpointError(f"every checkpoint in {folder} is damaged (steps {steps}); start a new run")
    return None
