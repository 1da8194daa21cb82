"""Combinations of settings that no single key's range can rule out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uncollapse.config.schema import Config


def impossible(config: Config) -> list[tuple[str, str]]:
    """(key, what is wrong with it) for each; empty where all is well."""
    from uncollapse.config.schema import targets_of

    views, teacher, optim, run = config.views, config.teacher, config.optim, config.run
    problems = []
    for name in ("global_scale", "local_scale", "blur_sigma"):
        low, high = getattr(views, name)
        if low > high:
            problems.append((f"views.{name}", f"the first number must not exceed the second, got {low} > {high}"))
    if any(s <= 0 for s in views.std):
        problems.append(("views.std", f"must be positive, got {list(views.std)}"))
    momentum, end, lr = teacher.momentum, teacher.momentum_end, optim.lr * run.batch / optim.lr_batch
    if end < momentum:
        problems.append(("teacher.momentum_end", f"must be at least teacher.momentum, {end} < {momentum}"))
    if optim.min_lr > lr:
        problems.append(("optim.min_lr", f"{optim.min_lr} exceeds the scaled learning rate {lr:g}"))
    if targets_of(config.prototypes) == "posterior" and not config.prototypes.kind.startswith("decoupled"):
        problems.append(("prototypes.targets", f"only a mixture has a posterior, {config.prototypes.kind} has none"))
    if run.batch % run.accumulate:
        problems.append(("run.accumulate", f"a batch of {run.batch} does not divide into {run.accumulate} equal parts"))
    if teacher.temperature > 1 or teacher.temperature_start > 1:
        problems.append(("teacher.temperature", "temperatures above 1 make every target uniform over cosines"))
    return problems
