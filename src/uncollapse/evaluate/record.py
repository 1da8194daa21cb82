"""Where results stay: ``evaluation.json``, merged task by task, and scalars for TensorBoard."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uncollapse.run_folder.evaluation import FILE, FORMAT, read_evaluation
from uncollapse.run_folder.files import write_atomically

if TYPE_CHECKING:
    from uncollapse.evaluate.run import Evaluated


def merge(folder: Path, key: str, one: Evaluated, command: str) -> None:
    """Adds one encoder's results to a folder's ``evaluation.json``: a task done again replaces its older result.

    Results of the same label with other weights (the run went on), of other images or labels, or at another size are
    dropped, not mixed. Written atomically.

    Args:
        key: of the data set and its cuts. command: the command line, stored with each task.
    """
    content = read_evaluation(folder)
    if content is None:  # somebody may still want it
        (folder / FILE).replace(folder / f"{FILE}.old")
        warnings.warn(f"{folder / FILE} is kept as {FILE}.old and a new one begun", stacklevel=2)
        content = {"format": FORMAT, "data": {}}
    state = {"weights": one.encoder.weights_hash, "images": one.images, "size": one.encoder.size}
    old = content["data"].get(key, {}).get("encoders", {}).get(one.label, {})
    tasks = old.get("tasks", {}) if all(old.get(name) == value for name, value in state.items()) else {}
    for result in one.results:
        tasks[result.task] = {**finite(result.to_json()), "command": command}
    if not tasks:  # nothing worked: no entry to wonder about
        return
    data = content["data"].setdefault(key, {"encoders": {}})
    data |= {"n_train": one.n_train, "n_test": one.n_test, "classes": one.classes}
    pictures = {t: p for t, p in old.get("pictures", {}).items() if t in tasks}
    pictures |= _drawn(folder, key, one)
    data["encoders"][one.label] = {
        "name": one.encoder.name,
        "described": one.encoder.described,
        **state,
        "step": one.encoder.step,
        "notes": one.notes,
        "tasks": tasks,
        "pictures": pictures,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / FILE, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def _drawn(folder: Path, key: str, one: Evaluated) -> dict[str, list[dict[str, str]]]:
    """Writes the pictures into ``FOLDER/evaluation`` and lists them by task."""
    out: dict[str, list[dict[str, str]]] = {}
    for i, picture in enumerate(one.pictures):
        head, _, content = picture.src.partition(",")
        ending = "svg" if "svg" in head else "png"
        name = f"{slug(key, one.label)}-{picture.task}{i}.{ending}"
        (folder / "evaluation").mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "evaluation" / name, base64.b64decode(content))
        entry = {"file": f"evaluation/{name}", "caption": picture.caption, "alt": picture.alt}
        out.setdefault(picture.task, []).append(entry)
    return out


def slug(key: str, label: str) -> str:
    """Data set and encoder as a file's name; a digest tells sets apart whose paths end alike."""
    name = re.sub(r"[^\w.-]+", "-", f"{Path(key.split(',')[0]).name}-{label}").strip("-")
    return f"{name}-{hashlib.sha256(key.encode(errors='surrogateescape')).hexdigest()[:6]}"


def finite(value: Any) -> Any:
    """JSON has no NaN: an interval that could not be had is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(name): finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value


def add_scalars(folder: Path, key: str, evaluated: Sequence[Evaluated]) -> None:
    """``evaluate/TASK/METRIC`` at the encoder's step, a TensorBoard run per data set and encoder.

    A failing write is a warning: the numbers are in ``evaluation.json``.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter

        for one in evaluated:
            board = SummaryWriter(str(folder / "tensorboard" / f"evaluate-{slug(key, one.label)}"))
            for result in one.results:
                for name, value in result.metrics.items():
                    if math.isfinite(value):
                        board.add_scalar(f"evaluate/{result.task}/{name}".replace(" ", "_"), value, one.encoder.step)
            board.close()
    except Exception as error:
        warnings.warn(f"no TensorBoard events of the evaluation: {error}", stacklevel=2)
