"""What a run writes while it goes: metrics as JSON lines, and where its time goes."""

from __future__ import annotations

import errno
import json
import os
import warnings
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from uncollapse.config.schema import Config
from uncollapse.run_folder.files import write_atomically
from uncollapse.run_folder.sinks import CsvTable, Sink, TensorBoard, WeightsAndBiases, scalars_of


class RunLog:
    """Appends rows to ``metrics.jsonl`` and hands their numbers to ``tensorboard/`` and what else ``config`` asks for.

    A write that fails (full disk) loses nothing: rows wait in memory and go out with the next one.
    ``start_step`` > 0 drops what a killed run wrote beyond the checkpoint that is resumed.
    """

    def __init__(self, folder: Path, start_step: int = 0, config: Config | None = None) -> None:
        self.path = folder / "metrics.jsonl"
        self.waiting: list[str] = []
        self.warned = False
        kept: list[dict[str, Any]] = []
        if not self.path.exists():
            self.path.touch()
        elif self.path.stat().st_size:
            rows = [r for r in read_rows(self.path) if type(r.get("step")) is int]
            kept = [r for r in rows if r["step"] <= start_step and start_step]
            write_atomically(self.path, "".join(json.dumps(r) + "\n" for r in kept).encode())
        self.sinks: list[Sink] = [TensorBoard(folder, start_step)]
        if config is not None and config.log.csv:
            inside = ({k: v for k, v in r.items() if k not in ("kind", "step")} for r in kept)
            scalars = [scalars_of(str(r.get("kind")), i) for r, i in zip(kept, inside, strict=True)]
            self.sinks.append(CsvTable(folder, [(r["step"], s) for r, s in zip(kept, scalars, strict=True) if s]))
        if config is not None and config.log.wandb:
            try:
                self.sinks.append(WeightsAndBiases(folder, config.log.wandb, asdict(config)))
            except Exception as error:  # no network, or nobody logged in: the run itself needs neither
                warnings.warn(f"nothing goes to Weights & Biases: {error}", stacklevel=2)

    def row(self, kind: str, step: int, **values: Any) -> None:
        self.waiting.append(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        try:
            self._append("".join(self.waiting).encode())
            self.waiting.clear()
        except OSError as error:
            if not self.warned:
                warnings.warn(f"{self.path}: {error.strerror}; rows are kept and written later", stacklevel=2)
            self.warned = True
        self._scalars(kind, step, values)

    def _append(self, content: bytes) -> None:
        """All of it or nothing: half a line would swallow the next one."""
        if not self.path.exists():  # moved away: it must not begin anew without its rows
            raise OSError(errno.ENOENT, "no longer there")
        with self.path.open("r+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(content) != len(content):
                    raise OSError(errno.ENOSPC, "no space left")
            except OSError:
                file.truncate(end)
                raise

    def _scalars(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if kind == "warning":
            return
        for sink in list(self.sinks):
            try:
                sink.row(step, scalars_of(kind, values))
            except Exception as error:
                warnings.warn(f"{type(sink).__name__} stops at step {step}: {error}", stacklevel=2)
                self.sinks.remove(sink)

    def close(self) -> None:
        for sink in self.sinks:
            with suppress(Exception):  # what is in metrics.jsonl is safe already
                sink.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a ``metrics.jsonl``; a line torn by a kill, or still being written, is skipped."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
