"""Whether a run goes on as what it was: its configuration and its images against those in its checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from uncollapse.config.load import build_config
from uncollapse.config.schema import Config
from uncollapse.errors import CheckpointError, ConfigError

FREE = (
    "log.",
    "data.path",
    "data.val_path",
    "data.memory_gb",
    "data.workers",
    "data.max_bad",
    "backbone.init",
    "change.branch",
)
"""Keys that do not change what is learned from here on; where the images lie is free, which ones they are is not."""


NEEDED = {"step": int, "config": dict, "seconds": dict, "loss": float, "monitor": dict}


def refuse_foreign(saved: dict[str, Any], where: object) -> None:
    """Raises :class:`CheckpointError` where a checkpoint lacks what a run goes on from."""
    for name, kind in NEEDED.items():
        if not isinstance(saved.get(name), kind):
            raise CheckpointError(f"{where}: its checkpoint has no usable {name!r}, so it is not one of a training run")


def check_same_run(
    config: Config, digests: dict[str, str], saved: dict[str, Any], free: tuple[str, ...] = ()
) -> list[str]:
    """Lines about differences that do no harm.

    Args:
        config: that of ``config.yaml``.
        digests: of the images, as :func:`uncollapse.data.fingerprint.image_digests` makes them.
        saved: the checkpoint.
        free: beginnings of keys that may differ, and need not be said.

    Raises:
        ConfigError: something that changes what is learned is not as it was; names it.
    """
    then = build_config(saved["config"], "the checkpoint's configuration")
    differences = _differences(then, config)
    changed = [f"{key} {old!r} → {new!r}" for key, old, new in differences if not key.startswith(free)]
    harmless = [line for line in changed if line.startswith(FREE)]
    bound = [line for line in changed if not line.startswith(FREE)]
    if bound:
        raise ConfigError(
            f"config.yaml is not what this run was trained with ({'; '.join(bound)}): put it back, or start a new run "
            "with another --out"
        )
    known = saved.get("images", {})
    if known.get("data_digest", digests["data_digest"]) != digests["data_digest"]:
        raise ConfigError(
            f"{config.data.path} does not hold the training images that this run was trained on (images were added, "
            "removed, renamed, or given other labels): put them back, or start a new run with another --out"
        )
    if known.get("held_out_digest", digests["held_out_digest"]) != digests["held_out_digest"]:
        harmless.append("the held-out images, so its numbers cannot be compared with earlier ones")
    return [f"changed     {line}" for line in harmless]


def _differences(then: Config, now: Config) -> Iterator[tuple[str, Any, Any]]:
    old, new = dict(_flat(dataclasses.asdict(then))), dict(_flat(dataclasses.asdict(now)))
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            yield key, old.get(key), new.get(key)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
