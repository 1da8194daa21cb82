"""Hundreds of mutated files of every kind: each is read, or refused by our own error in one line, at once."""

import contextlib
import io
import time
import zipfile
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from safetensors.torch import save

from layouts import ARGS
from uncollapse.checkpoints.prototypes import find_prototypes
from uncollapse.checkpoints.read import flatten, read_tensors
from uncollapse.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

CASES = 200
EXTREMES = [b"\x00" * 8, b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\x00\x00\x00\x80", b"\xff\xff\xff\x7f", b"9" * 12, b"-1"]
W = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
CONTENT = {
    "teacher": {"head.last_layer.weight_v": W, "head.last_layer.weight_g": torch.ones(6, 1)},
    "args": ARGS,
    "student": {"prototypes.weight": W.half(), "n": np.arange(6.0)},
    "epoch": 3,
    "queue": [torch.ones(2), {"a": (1, 2)}],
}


def mutated(whole: bytes, rng: np.random.Generator) -> bytes:
    """One to three changes: bits, extreme numbers, cuts, repetitions, and pieces from elsewhere in the file."""
    content = bytearray(whole)
    for _ in range(int(rng.integers(1, 4))):
        n = max(1, len(content))
        at, size = int(rng.integers(n)), int(rng.integers(1, 17))
        what = rng.integers(7)
        if what == 0:
            content = content[:at]
        elif what == 1:
            del content[at : at + size]
        elif what == 2:
            content[at:at] = content[int(rng.integers(n)) :][:size]
        elif what == 3:
            content[at : at + size] = content[int(rng.integers(n)) :][:size]
        elif what == 4:
            extreme = EXTREMES[int(rng.integers(len(EXTREMES)))]
            content[at : at + len(extreme)] = extreme
        elif at < len(content):
            content[at] = int(rng.integers(256)) if what == 5 else content[at] ^ (1 << int(rng.integers(8)))
    return bytes(content)


def saved(**options) -> bytes:
    buffer = io.BytesIO()
    torch.save(CONTENT, buffer, **options)
    return buffer.getvalue()


def rezipped(whole: bytes, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """The archive with its members changed, and its checksums right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(buffer, "w", method) as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))
    return buffer.getvalue()


def numpy_file(save_as: Callable, *arrays, **named) -> bytes:
    buffer = io.BytesIO()
    save_as(buffer, *arrays, **named)
    return buffer.getvalue()


def inside(whole: bytes, end: str, rng: np.random.Generator) -> bytes:
    """An archive in which one member is mutated, packed again."""
    return rezipped(whole, lambda name, content: mutated(content, rng) if name.endswith(end) else content)


def kinds() -> dict[str, Callable[[np.random.Generator], bytes]]:
    zipped, old = saved(), saved(_use_new_zipfile_serialization=False)
    newest = saved(pickle_protocol=5)
    packed = rezipped(zipped, lambda _, content: content, zipfile.ZIP_DEFLATED)
    npy, npz = numpy_file(np.save, W.numpy()), numpy_file(np.savez, a=W.numpy(), b=np.ones(3))
    squeezed = numpy_file(np.savez_compressed, a=W.numpy(), b=np.ones(3))
    tensors = save({"prototypes.weight": W, "x": torch.ones(2, dtype=torch.bfloat16)})
    return {
        "torch": lambda rng: mutated(zipped, rng),
        "torch, its pickle": lambda rng: inside(zipped if rng.integers(2) else newest, "data.pkl", rng),
        "torch, compressed": lambda rng: mutated(packed, rng),
        "torch before 1.6": lambda rng: mutated(old, rng),
        "npy": lambda rng: mutated(npy[:140] if rng.integers(2) else npy, rng),
        "npz": lambda rng: mutated(npz if rng.integers(2) else squeezed, rng),
        "npz, its arrays": lambda rng: inside(npz, "a.npy", rng),
        "safetensors": lambda rng: mutated(tensors, rng),
    }


def read(path) -> None:
    """What every command does with a file before it computes."""
    with contextlib.suppress(InputError):
        tensors = flatten(read_tensors(path), path)
        for s in find_prototypes(tensors, str(path)):
            s.directions().float().sum()


def hold_to_it(cases: Iterator[tuple[object, Callable[[], None]]]) -> None:
    for case, one in cases:
        began = time.monotonic()
        try:
            one()
        except Exception as error:
            raise AssertionError(f"case {case}: {type(error).__name__}: {error}") from error
        assert time.monotonic() - began < 5, f"case {case} took for ever"


@pytest.mark.parametrize("kind", kinds())
def test_mutated_files_are_read_or_refused(kind, tmp_path):
    make, path = kinds()[kind], tmp_path / "a"

    def case(i: int) -> Callable[[], None]:
        def one() -> None:
            path.write_bytes(make(np.random.default_rng(i)))
            read(path)

        return one

    hold_to_it((i, case(i)) for i in range(CASES))


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_mutated_folders_are_read_or_refused(file, tmp_path):
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": {"teacher.dino_head.last_layer.weight": W}}, checkpoint_id=tmp_path / "9", no_dist=True)
    whole = (tmp_path / "9" / file).read_bytes()

    def case(i: int) -> Callable[[], None]:
        def one() -> None:
            (tmp_path / "9" / file).write_bytes(mutated(whole, np.random.default_rng(i)))
            read(tmp_path / "9")

        return one

    hold_to_it((i, case(i)) for i in range(CASES))
