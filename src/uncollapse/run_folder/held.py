"""Whose a run folder is: one run's, held by one process at a time, and the same folder from beginning to end."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from uncollapse.errors import ConfigError
from uncollapse.run_folder.log import read_rows

try:
    import fcntl
except ImportError:  # Windows has no such locks: there, nothing keeps two processes apart
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
WRITTEN = (
    "config.yaml",
    "metrics.jsonl",
    "metrics.csv",
    "summary.json",
    "diagnosis.npz",
    "report.html",
    "checkpoints",
    "tensorboard",
)
"""What a run writes into its folder."""


def refuse_what_is_there(out: Path) -> None:
    """A new run must not write over anything.

    Raises:
        ConfigError: ``out`` holds a run, or a file of the name of one that a run writes.
    """
    if (out / "checkpoints").is_dir() and any((out / "checkpoints").iterdir()):
        raise ConfigError(f"{out} already holds a run: continue it with --resume {out}, or choose another --out")
    for name in WRITTEN:
        there = out / name
        if there.exists() and not (there.is_dir() and not any(there.iterdir())):
            raise ConfigError(f"{out} holds a {name}, which a run would write over; choose another --out")


def refuse_lost_checkpoints(out: Path) -> None:
    """A run that has made steps is never started again in its own folder, where that would write over what is left.

    Raises:
        ConfigError: there is no checkpoint to go on from, but traces of steps.
    """
    folder = out / "checkpoints"
    steps = [row["step"] for row in metrics_of(out) if row["step"] > 0]
    bare = sorted(p.name for p in folder.glob("step-*.pt")) if folder.is_dir() else []
    if bare:
        raise ConfigError(
            f"--resume {out}: {folder / bare[-1]} has no {Path(bare[-1]).with_suffix('.json')} beside it, the digest "
            "by which a checkpoint is known to be whole; copy it back, or start anew with another --out"
        )
    if steps or (out / "summary.json").exists():
        made = f"made {max(steps)} steps" if steps else "was finished"
        raise ConfigError(
            f"--resume {out}: the run {made}, but {folder} holds no checkpoint to go on from; "
            "copy it back, or start anew with another --out"
        )


def metrics_of(out: Path) -> list[dict[str, int]]:
    """Rows of ``metrics.jsonl`` that name their step; none where there is no such file."""
    path = out / "metrics.jsonl"
    return [r for r in read_rows(path) if type(r.get("step")) is int] if path.is_file() else []


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Makes the folder and holds it for this process; another one is refused as long as this one lives.

    The lock is the system's own, which a killed process gives back, so a stale file of it means nothing; what is
    written there is for the other's message.

    Raises:
        ConfigError: another process holds the folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with open(os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644), "r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not passed on to loader processes, unlike flock
        except (BlockingIOError, PermissionError):
            raise ConfigError(f"{out} is in use by {_holder(file.read())}; wait for it, or stop it first") from None
        except OSError:  # a file system without locks
            yield
            return
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):
                file.seek(0)
                file.truncate(0)


def _holder(text: str) -> str:
    with suppress(ValueError, KeyError, TypeError):
        told = json.loads(text)
        return f"process {int(told['pid'])} on {str(told['host'])[:100]!r}"
    return "another process"


def identity(out: Path) -> tuple[int, int] | None:
    """What a folder is whatever its name: equal as long as it was not moved away or replaced; None: not there."""
    try:
        status = out.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
