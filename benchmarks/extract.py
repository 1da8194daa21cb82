"""Extraction of features against its limits: the forward pass on ready tensors, and the decoding of the files alone.

    python benchmarks/extract.py [--images 2048] [--workers 2] [--model vit_small_patch16_224] [--device cuda]

Whichever limit is slower is the one that an extraction can reach; it has done its work where the ratio to it is 1.
The files are JPEGs of 500×375 pixels, about ImageNet's size, made for the occasion.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import Row, alternate, print_rows
from uncollapse.data.batched import normalised
from uncollapse.data.images import Files, ImageSet, LazyImages, MemoryImages
from uncollapse.data.workers import eval_crop
from uncollapse.evaluate.encoder import EvalEncoder
from uncollapse.evaluate.extract import batches, extract, forward
from uncollapse.evaluate.source import open_encoder

BATCH = 256


def rows(
    sizes: Sequence[int],
    device: torch.device,
    images: int | None = None,
    workers: int | None = None,
    model: str | None = None,
) -> Iterator[Row]:
    """``sizes`` (numbers of prototypes, for the other benchmarks) does not matter here."""
    cuda = device.type == "cuda"
    images = images or (8192 if cuda else 128)
    cores = len(os.sched_getaffinity(0))
    workers = cores if workers is None else workers
    encoder = open_encoder(f"timm:{model or ('vit_small_patch16_224' if cuda else 'vit_tiny_patch16_224')}").to(device)
    batch = min(BATCH, images)
    with tempfile.TemporaryDirectory() as folder:
        files = _files(Path(folder), images)
        yield _row("files", encoder, files, batch, workers, device, Path(folder) / "cache")
        rng = np.random.default_rng(0)
        canvas = torch.from_numpy(rng.integers(0, 256, (images, 3, 32, 32), dtype=np.uint8))
        memory = MemoryImages(canvas, torch.full((images, 2), 32))
        yield _row("in memory, 32 px", encoder, memory, batch, 0, device, Path(folder) / "cache2")


def _row(
    what: str, encoder: EvalEncoder, images: ImageSet, batch: int, workers: int, device: torch.device, cache: Path
) -> Row:
    n = len(images)
    ready = torch.randn(batch, 3, encoder.size, encoder.size, device=device)

    def bare() -> None:
        for _ in range(n // batch):
            forward(encoder, ready)

    def decode() -> None:
        for _ in batches(images, encoder, batch, workers, device):
            pass

    def naive() -> None:
        """What a first script does: decode, transform and forward one after the other, in one process."""
        for i in range(0, n, batch):
            crops = torch.stack([eval_crop(images.image(j), encoder.size) for j in range(i, min(i + batch, n))])
            forward(encoder, normalised(crops.float() / 255, encoder.mean, encoder.std).to(device))["cls"].cpu()

    def ours() -> None:
        extract(encoder, images, device=device, batch=batch, workers=workers)

    def cached() -> None:
        extract(encoder, images, device=device, batch=batch, workers=workers, cache=cache)

    cached()
    functions: dict[str, Callable[[], None]] = {
        "ours": ours,
        "forward": bare,
        "decode": decode,
        "naive, one process": naive,
        "from cache": cached,
    }
    costs = alternate(functions, 3)
    seconds = {name: cost.seconds for name, cost in costs.items()}
    slower = max("forward", "decode", key=lambda name: seconds[name])
    cores = len(os.sched_getaffinity(0))
    # On a CPU both share the cores, so they cannot overlap: the limit is their sum.
    shared = device.type == "cpu"
    limit = seconds["forward"] + seconds["decode"] if shared else seconds[slower]
    rates = ", ".join(f"{name} {n / s:,.0f}" for name, s in seconds.items())
    return Row(
        f"extract, {what}",
        f"{n:,} images, {encoder.described}",
        costs["ours"],
        limit,
        "forward + decoding (they share the cores)" if shared else f"the slower: {slower}",
        {name: costs[name] for name in ("naive, one process", "from cache")},
        "≤ 1.15 × limit",
        seconds["ours"] <= 1.15 * limit,
        f"images/s: {rates}; {workers} loader processes on {cores} cores",
    )


def _files(folder: Path, n: int) -> LazyImages:
    rng = np.random.default_rng(0)
    names = []
    for i in range(min(n, 256)):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
        names.append(f"{i}.jpg")
    return LazyImages(Files(str(folder), names), np.arange(n) % len(names))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    where = torch.device(options.device)
    print_rows("extract", list(rows((), where, options.images, options.workers, options.model)), where)
