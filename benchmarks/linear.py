"""The linear probe's whole grid (every classifier at once, one chosen and refitted) beside one logistic regression.

    OMP_NUM_THREADS=1 python benchmarks/linear.py

Features of 100 classes that overlap, d = 384: 10,000 training rows, and 100,000 where a size of 65,536 is asked for.
A CNN has one input and 13 rates; a vision transformer four inputs (1 or 4 blocks, with or without mean patch token;
4,608 columns together, 12 times 384) and 52 classifiers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from common import Row, main, matmul_seconds, measure
from uncollapse.evaluate.features import Features
from uncollapse.evaluate.tasks.linear import inputs, linear
from uncollapse.measure.linear import RATES, steps_for

CLASSES, WIDTH = 100, 384


def rows(sizes: Sequence[int], device: torch.device) -> Iterator[Row]:
    for count in sorted({100_000 if size >= 65536 else 10_000 for size in sizes}):
        yield _row(count, device)
        yield _transformer(count, device)


def _transformer(count: int, device: torch.device) -> Row:
    train, test = _features(count, 1, 4), _features(2000, 2, 4)
    ours = measure(lambda: linear(train, test, device=device), 0)
    batch, steps = steps_for(count)
    widths = [c.stop - c.start for c in (i.columns(train) for i in inputs(train))]
    limit = 2 * matmul_seconds(batch * steps, WIDTH, sum(widths) // WIDTH * len(RATES) * CLASSES, device)
    return Row(
        "linear grid, 52 + 1 classifiers",
        f"N = {count:,}",
        ours,
        limit,
        f"matrix products of {steps:,} steps",
        note=f"top-1 {ours.result.metrics['top1']:.3f}, chosen: {ours.result.details['chosen']}",
    )


def _row(count: int, device: torch.device) -> Row:
    train, test = _features(count, 1), _features(2000, 2)
    ours = measure(lambda: linear(train, test, device=device), 0)
    scaler = StandardScaler().fit(train.last.numpy())
    x, queries = scaler.transform(train.last.numpy()), scaler.transform(test.last.numpy())

    def regression() -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LogisticRegression(max_iter=100).fit(x, train.labels.numpy()).score(queries, test.labels.numpy())

    theirs = measure(regression, 0)
    batch, steps = steps_for(count)
    # Forward and weight gradient of every step, for the grid and for the one that is refitted.
    limit = 2 * matmul_seconds(batch * steps, WIDTH, (len(RATES) + 1) * CLASSES, device)
    return Row(
        "linear grid, 13 + 1 classifiers",
        f"N = {count:,}",
        ours,
        limit,
        f"matrix products of {steps:,} steps",
        {"scikit-learn, one classifier": theirs},
        "seconds to a minute" if count >= 100_000 else "",
        ours.seconds <= 60 if count >= 100_000 else None,
        f"top-1 {ours.result.metrics['top1']:.3f}, scikit-learn {theirs.result:.3f}",
    )


def _features(count: int, seed: int, blocks: int = 1) -> Features:
    """With several blocks, earlier ones and the mean patch token are the last one with more noise."""
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(0, CLASSES, (count,), generator=rng)
    x = (centres[y] + 6 * torch.randn(count, WIDTH, generator=rng))[:, None]
    if blocks == 1:
        return Features(x, None, None, y, torch.arange(count), [str(c) for c in range(CLASSES)])
    cls = torch.cat([x + 3 * torch.randn(count, blocks - 1, WIDTH, generator=rng), x], 1)
    return Features(cls, cls.flip(1), None, y, torch.arange(count), [str(c) for c in range(CLASSES)])


if __name__ == "__main__":
    main("linear probe", rows)
