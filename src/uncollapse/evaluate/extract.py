"""One pass of an encoder over a set of images, kept on disk in shards so that it is never made twice."""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uncollapse.data.images import ImageSet, LazyImages, MemoryImages, subset
from uncollapse.data.workers import eval_batches
from uncollapse.errors import DataError
from uncollapse.evaluate.encoder import EvalEncoder
from uncollapse.evaluate.features import Features
from uncollapse.run_folder.files import write_atomically

SHARD = 4096
"""Images per file: what an interruption costs at most."""
FORMAT = 1
_NAMES = ("cls", "mean", "projections")


# ---------------------------------------------------------------------------------------------- batches


def batches(
    images: ImageSet, encoder: EvalEncoder, batch: int, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """`eval_batches` as this encoder takes them."""
    return eval_batches(images, encoder.size, encoder.mean, encoder.std, batch, workers, device)


@torch.inference_mode()
def forward(encoder: EvalEncoder, x: Tensor) -> dict[str, Tensor]:
    """``cls``, and ``mean`` and ``projections`` where there are any, float32 on the device of ``x``.

    On a GPU the backbone runs in bfloat16 autocast; the head always in float32.
    """
    with torch.autocast("cuda", torch.bfloat16, enabled=x.device.type == "cuda"):
        cls, mean = encoder.layers(x)
    out = {"cls": cls.float()}
    if mean is not None:
        out["mean"] = mean.float()
    if (z := encoder.project(out["cls"][:, -1])) is not None:
        out["projections"] = z
    return out


# ------------------------------------------------------------------------------------------------- keys


def identity(images: ImageSet) -> str:
    """sha256 of what a set holds: pixels where they are in memory, else paths, sizes, times and choice of images.

    Labels are not part of it: features do not depend on them.
    """
    digest = hashlib.sha256()
    if isinstance(images, MemoryImages):
        digest.update(images.sizes.numpy().tobytes())
        digest.update(f"{tuple(images.canvas.shape)}".encode())
        digest.update(images.canvas.cpu().contiguous().reshape(-1).numpy().data)
        return digest.hexdigest()
    source: Any = images.source
    digest.update(np.ascontiguousarray(images.index).tobytes())
    paths = getattr(source, "paths", None)
    for name in paths if paths is not None else (source.name(int(i)) for i in images.index):
        try:
            state = os.stat(name)
            digest.update(os.fsencode(f"{os.path.abspath(name)}\0{state.st_size}\0{state.st_mtime_ns}\n"))
        except OSError:
            digest.update(os.fsencode(f"{name}\0missing\n"))
    return digest.hexdigest()


def cache_key(encoder: EvalEncoder, images: ImageSet, device: torch.device) -> str:
    """Of weights, data, preprocessing and precision; anything that changes a feature changes it."""
    parts = {
        "format": FORMAT,
        "weights": encoder.weights_hash,
        "data": identity(images),
        "size": encoder.size,
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "blocks": encoder.blocks,
        "precision": "bf16" if device.type == "cuda" else "fp32",
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ shards


class Shards:
    """Features of one key in ``folder``, `SHARD` images to a file, each with its digest beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broken = False

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors"

    def read(self, shard: int) -> dict[str, Tensor] | None:
        """The tensors of a shard; None where it is missing, or damaged (which a warning says)."""
        from safetensors.torch import load

        path = self._path(shard)
        try:
            content, digest = path.read_bytes(), path.with_suffix(".sha256").read_text()
        except OSError:
            return None
        if hashlib.sha256(content).hexdigest() == digest.strip():
            return load(content)
        warnings.warn(f"{path}: damaged; its features are made again", stacklevel=2)
        return None

    def write(self, shard: int, tensors: dict[str, Tensor]) -> None:
        """A disk that is full, or a folder that cannot be written, stops the caching and nothing else."""
        from safetensors.torch import save

        if self.broken:
            return
        path = self._path(shard)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            content = save({name: t.contiguous() for name, t in tensors.items()})
            write_atomically(path, content)
            # Written last: it is what makes the shard count.
            write_atomically(path.with_suffix(".sha256"), hashlib.sha256(content).hexdigest().encode())
        except OSError as error:
            self.broken = True
            warnings.warn(
                f"features are not cached in {self.folder}: {error.strerror or error}. The evaluation goes on without; "
                "free some space, or name another folder with --cache",
                stacklevel=2,
            )


# --------------------------------------------------------------------------------------------- extraction


class _Rows:
    """Preallocated tensors of n rows: at ImageNet's size a second copy would be gigabytes."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.read = torch.zeros(n, dtype=torch.bool)
        self.tensors: dict[str, Tensor] = {}

    def put(self, rows: Tensor, values: dict[str, Tensor]) -> None:
        for name in _NAMES:
            if name in values:
                value = values[name].cpu()
                if name not in self.tensors:
                    self.tensors[name] = torch.empty(self.n, *value.shape[1:])
                self.tensors[name][rows] = value
        self.read[rows] = True

    def part(self, start: int, end: int) -> dict[str, Tensor]:
        kept = self.read[start:end].nonzero()[:, 0] + start
        return {**{name: t[kept] for name, t in self.tensors.items()}, "indices": kept}


def extract(
    encoder: EvalEncoder,
    images: ImageSet,
    *,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    batch: int = 256,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Features:
    """Features of unaugmented images, from the cache where it has them.

    What is missing is made and written `SHARD` images at a time, so an interrupted extraction goes on where it
    stopped. Unreadable images are left out of every tensor.

    Args:
        encoder: moved to ``device``. images: in memory or lazy.
        cache: folder of all cached features; None: nothing is read or written.
        batch, workers: images per forward pass, processes that decode; neither changes a feature, up to rounding.
        progress: called with (images done, images in all). say: called with a line about the cache.

    Raises:
        DataError: too many unreadable images, none at all, or features that are not finite.
    """
    device, n = torch.device(device), len(images)
    encoder.to(device)
    shards = None if cache is None else Shards(cache / cache_key(encoder, images, device)[:32])
    rows, missing = _Rows(n), []
    for shard in range(-(-n // SHARD)):
        stored = None if shards is None else shards.read(shard)
        if stored is None:
            missing.append(shard)
        else:
            rows.put(stored["indices"], stored)
    todo = np.concatenate([np.arange(s * SHARD, min((s + 1) * SHARD, n)) for s in missing] or [np.arange(0)])
    if say is not None and len(todo) < n:
        say("features from cache" if not len(todo) else f"features of {n - len(todo):,} of {n:,} images from cache")
    if len(todo):
        absent = images if len(todo) == n else subset(images, todo)
        try:
            _make(encoder, absent, torch.from_numpy(todo), rows, missing, shards, device, batch, workers, progress)
        except torch.OutOfMemoryError:
            raise DataError(
                f"{encoder.name}: {batch} images of {encoder.size} pixels do not fit into the memory of the GPU; "
                "lower --batch"
            ) from None
        if absent is not images and isinstance(images, LazyImages):
            images.note_bad(absent.bad)
    return _finished(rows, images, encoder.name)


def _make(
    encoder: EvalEncoder,
    images: ImageSet,
    numbers: Tensor,
    rows: _Rows,
    missing: list[int],
    shards: Shards | None,
    device: torch.device,
    batch: int,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Features of ``images``, which are the images ``numbers`` of the whole set, written shard by shard."""
    waiting: list[tuple[Tensor, dict[str, Tensor]]] = []  # on the device until a shard is full: one copy, not many
    done, before = 0, rows.n - len(numbers)
    open_shards = list(missing)

    def flush(upto: int) -> None:
        for which, values in waiting:
            rows.put(which, values)
        waiting.clear()
        while open_shards and (open_shards[0] + 1) * SHARD <= upto:
            shard = open_shards.pop(0)
            if shards is not None:
                shards.write(shard, rows.part(shard * SHARD, min((shard + 1) * SHARD, rows.n)))

    for which, x in batches(images, encoder, batch, workers, device):
        here = numbers[which]
        waiting.append((here, forward(encoder, x)))
        done = int(which[-1]) + 1
        # An image of a later shard: all that is readable in the ones before has come.
        if open_shards and int(here[-1]) >= (open_shards[0] + 1) * SHARD - 1:
            flush(int(here[-1]) + 1)
        if progress is not None:
            progress(before + done, rows.n)
    flush((rows.n + SHARD) // SHARD * SHARD + SHARD)
    if progress is not None and done < len(numbers):
        progress(rows.n, rows.n)


def _finished(rows: _Rows, images: ImageSet, name: str) -> Features:
    if not bool(rows.read.any()):
        raise DataError(f"none of the {rows.n} images could be read")
    kept = rows.read.nonzero()[:, 0]
    whole = len(kept) == rows.n
    tensors = rows.tensors if whole else {n: t[kept] for n, t in rows.tensors.items()}
    for what, tensor in tensors.items():
        bad = sum(int((~torch.isfinite(part).flatten(1).all(1)).sum()) for part in tensor.split(SHARD))
        if bad:
            raise DataError(
                f"{name}: {what} of {bad:,} of {len(kept):,} images are NaN or infinite; the encoder's weights are "
                "damaged or overflow"
            )
    return Features(
        tensors["cls"],
        tensors.get("mean"),
        tensors.get("projections"),
        None if images.labels is None else images.labels[kept],
        kept,
        images.classes,
    )


def timed(function: Callable[[], Features]) -> tuple[Features, float]:
    """A result and the seconds it took."""
    began = time.perf_counter()
    result = function()
    return result, time.perf_counter() - began
