"""Transfer: how one frozen encoder does on several data sets, as one mean."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from uncollapse.errors import DataError
from uncollapse.evaluate.features import Features
from uncollapse.evaluate.result import Result

SOURCE = "kNN and linear as in their own tasks; sets averaged with equal weight (Govindarajan et al. 2024)"
Extract = Callable[[str], tuple[Features, Features]]


def transfer(extract: Extract, sets: Sequence[str], seed: int = 0, device: torch.device | str = "cpu") -> Result:
    """kNN and linear accuracy on each of ``sets``, and their means with equal weight whatever the sets' sizes.

    A set that fails (its files are missing, it has no labels, ...) is left out of every mean, named in
    ``details["failed"]`` with the reason and in a warning; its protocol says how many sets the mean is over, so that
    means over different sets are not taken for one another.

    The interval is of ``knn_mean``. Test images of different sets are independent, so the half-widths of the sets'
    own bootstrap intervals, taken as 1.96 standard errors, add in squares: half² = Σ half_i² / S². It covers the
    choice of test images, not the choice of sets.

    Args:
        extract: features of the training and test part of a set, given as `load_pair` takes it.
        sets: as ``--data`` takes them; duplicates count once.
        seed: of whatever the two tasks draw. device: of both.

    Returns:
        Metrics ``knn_mean``, ``linear_mean``, then ``knn NAME`` and ``linear NAME`` of each set.

    Raises:
        DataError: no set given, or none that worked.
    """
    from uncollapse.evaluate.tasks.knn import knn
    from uncollapse.evaluate.tasks.linear import linear
    from uncollapse.shown import in_words

    wanted = list(dict.fromkeys(sets))
    if not wanted:
        raise DataError("transfer: no data set given; name them with --sets")
    by_set: dict[str, dict[str, Result]] = {}
    failed: dict[str, str] = {}
    names = dict(zip(wanted, short_names(wanted), strict=True))
    for spec in wanted:
        try:
            train, test = extract(spec)
            # Both or none: a mean over other sets than its neighbour's would be compared with it.
            by_set[names[spec]] = {
                "knn": knn(train, test, device=device),
                "linear": linear(train, test, seed=seed, device=device),
            }
        except Exception as error:  # one set must not take the others' numbers with it
            failed[names[spec]] = in_words(error)
    if not by_set:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise DataError(f"transfer: none of the {len(wanted)} sets could be used: {reasons}")
    for name, reason in failed.items():
        warnings.warn(f"transfer: {name} failed and is left out of the means: {reason}", stacklevel=2)
    means: dict[str, float] = {}
    per_set: dict[str, float] = {}
    for task in ("knn", "linear"):
        values = [_headline(results[task]) for results in by_set.values()]
        means[f"{task}_mean"] = math.fsum(values) / len(values)
        per_set |= {f"{task} {name}": _headline(results[task]) for name, results in by_set.items()}
    interval = mean_interval([_headline(r["knn"]) for r in by_set.values()], [r["knn"].ci95 for r in by_set.values()])
    left_out = f"; left out because they failed: {', '.join(failed)}" if failed else ""
    first = next(iter(by_set.values()))
    return Result(
        "transfer",
        means | per_set,
        interval,
        sum(results["knn"].n for results in by_set.values()),
        f"mean over {len(by_set)} of {len(wanted)} sets ({', '.join(by_set)}){left_out}; {first['knn'].protocol}; "
        f"{first['linear'].protocol}",
        SOURCE,
        _details(by_set, failed, names),
    )


def _headline(result: Result) -> float:
    return next(iter(result.metrics.values()))


def _details(by_set: dict[str, dict[str, Result]], failed: dict[str, str], names: dict[str, str]) -> dict[str, Any]:
    linear = [results["linear"] for results in by_set.values()]
    return {
        "sets": {name: {task: r.to_json() for task, r in results.items()} for name, results in by_set.items()},
        "failed": failed,
        "specs": {name: spec for spec, name in names.items()},
        "linear_mean_ci95": list(mean_interval([_headline(r) for r in linear], [r.ci95 for r in linear])),
        "rule": "equal weight per set; sets independent, so squared half-widths of their intervals add up",
    }


def mean_interval(values: Sequence[float], intervals: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """95 % interval of the mean of independent ``values`` in [0, 1] from their own intervals; NaN where one is."""
    half = math.sqrt(math.fsum(((high - low) / 2) ** 2 for low, high in intervals)) / len(values)
    mean = math.fsum(values) / len(values)
    return (math.nan, math.nan) if math.isnan(half) else (max(0.0, mean - half), min(1.0, mean + half))


def short_names(sets: Sequence[str]) -> list[str]:
    """``CIFAR10`` of ``torchvision:CIFAR10@ROOT``, the last part of a path; the whole where two would be alike."""

    def short(spec: str) -> str:
        kind, colon, rest = spec.partition(":")
        if colon and kind in ("torchvision", "builtin"):
            return rest.partition("@")[0]
        return Path(spec.split(",")[0].rstrip("/")).name or spec

    names = [short(spec) for spec in sets]
    return [name if names.count(name) == 1 else spec for name, spec in zip(names, sets, strict=True)]
