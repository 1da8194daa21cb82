"""Where a run's scalars go besides ``metrics.jsonl``: TensorBoard always, a CSV table and Weights & Biases on request.

Each takes ``row(step, scalars)`` and ``close()``. One that fails is left out from then on; the run goes on.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import secrets
from pathlib import Path
from typing import Any, Protocol

from uncollapse.errors import ConfigError
from uncollapse.run_folder.files import write_atomically


class Sink(Protocol):
    def row(self, step: int, scalars: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def scalars_of(kind: str, values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row by ``kind/name``, or ``kind/name/key`` where the value is a mapping."""
    scalars = {}
    for name, value in values.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        for key, scalar in inner:
            if isinstance(scalar, int | float):
                scalars[f"{kind}/{name}/{key}" if key else f"{kind}/{name}"] = scalar
    return scalars


class TensorBoard:
    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = start_step + 1 if start_step else None
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def row(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class CsvTable:
    """``metrics.csv``: one line per row, ``step`` first, a column for every scalar; empty where a row has none."""

    def __init__(self, folder: Path, kept: list[tuple[int, dict[str, float]]]) -> None:
        self.path, self.rows = folder / "metrics.csv", list(kept)
        self.columns = list(dict.fromkeys(name for _, scalars in kept for name in scalars))
        self._write()

    def row(self, step: int, scalars: dict[str, float]) -> None:
        self.rows.append((step, scalars))
        new = [name for name in scalars if name not in self.columns]
        if new:  # a header cannot grow in place
            self.columns += new
            self._write()
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(self._text(self.rows[-1:]))

    def _text(self, rows: list[tuple[int, dict[str, float]]]) -> str:
        text = io.StringIO()
        csv.writer(text).writerows([step, *(s.get(c, "") for c in self.columns)] for step, s in rows)
        return text.getvalue()

    def _write(self) -> None:
        header = io.StringIO()
        csv.writer(header).writerow(["step", *self.columns])
        write_atomically(self.path, (header.getvalue() + self._text(self.rows)).encode())

    def close(self) -> None:
        pass


def refuse_missing_wandb(project: str) -> None:
    """Raises :class:`ConfigError` where Weights & Biases is asked for and not installed; before any training."""
    if project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "log.wandb: the package wandb is not installed; pip install 'uncollapse[wandb]', or leave log.wandb empty"
        )


class WeightsAndBiases:
    """One run of a project, and the same one after a resume: its id is kept in ``wandb-id``."""

    def __init__(self, folder: Path, project: str, config: dict[str, Any]) -> None:
        import wandb

        identity = folder / "wandb-id"
        if not identity.is_file():
            identity.write_text(secrets.token_hex(8))
        names = {"project": project, "name": folder.name, "id": identity.read_text().strip()}
        self.run = wandb.init(**names, resume="allow", dir=str(folder), config=config)

    def row(self, step: int, scalars: dict[str, float]) -> None:
        self.run.log(scalars, step=step)

    def close(self) -> None:
        self.run.finish()
