"""How the benchmarks measure: side by side in one process, the same threads, backend and allocator for both sides.

A benchmark module has ``rows(sizes, device) -> Iterator[Row]``; ``benchmarks/run.py`` runs them all, prints the
tables and writes ``benchmarks/results.json``. Each module can also be run on its own.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

SIZES = (1024, 8192, 65536)


@dataclass(frozen=True)
class Cost:
    """What one call takes: the fastest of several, and the most memory held beyond what was there before."""

    seconds: float
    peak: int
    """Bytes. On the CPU the rise of the process's resident set, so other libraries' memory counts as well."""
    result: Any = field(default=None, repr=False, compare=False)


@dataclass
class Row:
    """One line of the table: a function at one size, its rivals and its limit."""

    name: str
    size: str
    """Such as ``K = 65,536``."""
    ours: Cost
    limit: float | None = None
    """Seconds that the hardware needs at least, measured in this run."""
    limit_is: str = ""
    """What the limit counts, such as ``half the matrix product``."""
    others: dict[str, Cost | None] = field(default_factory=dict)
    """Naive form and peers by name; None where one was not run (the note says why)."""
    target: str = ""
    """What the row is to reach, in words; empty where there is no target."""
    met: bool | None = None
    note: str = ""


def measure(function: Callable[[], Any], repeats: int = 5, most_seconds: float = 20.0) -> Cost:
    """The fastest of ``repeats`` calls after one to warm up; fewer where ``most_seconds`` are over."""
    cuda = torch.cuda.is_available()
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        _reset_peak()
        before = _memory("VmRSS")
    begin = time.perf_counter()
    result = function()
    if cuda:
        torch.cuda.synchronize()
    times = [time.perf_counter() - begin]
    peak = torch.cuda.max_memory_allocated() - before if cuda else _memory("VmHWM") - before
    for _ in range(repeats):
        if time.perf_counter() - begin > most_seconds:
            break
        start = time.perf_counter()
        result = function()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return Cost(min(times[1:] or times), max(0, peak), result)


def alternate(functions: dict[str, Callable[[], Any]], repeats: int = 5, most_seconds: float = 20.0) -> dict[str, Cost]:
    """`measure` for several functions in turns, so that a noisy minute falls on all of them.

    The peak is taken on each one's first call; the time is the fastest of its turns.
    """
    costs = {name: measure(f, 0) for name, f in functions.items()}
    best = {name: float("inf") for name in functions}
    spent = dict.fromkeys(functions, 0.0)
    for _ in range(repeats):
        for name, f in functions.items():
            if spent[name] > most_seconds:
                continue
            start = time.perf_counter()
            f()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            took = time.perf_counter() - start
            spent[name] += took
            best[name] = min(best[name], took)
    return {
        name: Cost(min(best[name], cost.seconds) if best[name] == float("inf") else best[name], cost.peak, cost.result)
        for name, cost in costs.items()
    }


def _memory(which: str) -> int:
    status = Path("/proc/self/status")
    if not status.is_file():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = re.search(which + r":\s+(\d+)", status.read_text())
    return int(line[1]) * 1024 if line else 0


def _reset_peak() -> None:
    # Freed memory that the allocator keeps would hide what the next call takes.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # elsewhere than on Linux: peaks are then of the process so far


# ------------------------------------------------------------------------------------------- the hardware's limits


def matmul_seconds(m: int, k: int, n: int, device: torch.device) -> float:
    """Time of one float32 ``(m, k) @ (k, n)`` by tiles of what a cache holds, into a reused buffer."""
    tile_m, tile_n = min(m, 1024), min(n, 2048)
    a, b = torch.randn(tile_m, k, device=device), torch.randn(tile_n, k, device=device)
    out = torch.empty(tile_m, tile_n, device=device)
    few = max(1, min(64, (m * n) // (tile_m * tile_n)))

    def product() -> None:
        for _ in range(few):
            torch.mm(a, b.T, out=out)

    return measure(product, 5, 5.0).seconds / few * (m * n) / (tile_m * tile_n)


def copy_rate(device: torch.device, size: int = 1 << 26) -> float:
    """Bytes read plus written per second by a copy of ``size`` float32."""
    a, b = torch.randn(size, device=device), torch.empty(size, device=device)
    return 8 * size / measure(lambda: b.copy_(a), 5, 5.0).seconds


def exp_rate(device: torch.device, size: int = 1 << 22) -> float:
    """float32 exponentials per second, in a buffer that stays near the processor."""
    a = torch.randn(size, device=device)
    b = torch.empty_like(a)
    return size / measure(lambda: torch.exp(a, out=b), 8, 5.0).seconds


# ----------------------------------------------------------------------------------------------------- the tables


def describe(device: torch.device) -> str:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return f"{where}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def print_rows(title: str, rows: Sequence[Row], device: torch.device) -> None:
    """Times and memory as ratios: others over ours (more is better), ours over the limit (1 is the best)."""
    table = Table(title=f"{title}: {describe(device)}", title_justify="left")
    for heading in ("function", "size", "ours", "memory", "× limit", "limit", "others: time, memory ÷ ours", "target"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        ratio = "" if not row.limit else f"{row.ours.seconds / row.limit:.2f}"
        others = [
            f"{name}: not run"
            if cost is None
            else f"{name}: {cost.seconds / row.ours.seconds:.2f}×, {cost.peak / max(row.ours.peak, 1):.1f}×"
            for name, cost in row.others.items()
        ]
        verdict = "" if row.met is None else " ✓" if row.met else " ✗ missed"
        table.add_row(
            row.name,
            row.size,
            f"{1e3 * row.ours.seconds:.1f} ms",
            f"{row.ours.peak / 2**20:.0f} MiB",
            ratio,
            row.limit_is,
            "\n".join([*others, row.note] if row.note else others),
            row.target + verdict,
        )
    Console(width=170).print(table)


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    out = []
    for row in rows:
        content = asdict(row)
        for cost in [content["ours"], *content["others"].values()]:
            if cost is not None:
                cost.pop("result")
        content["times_limit"] = row.ours.seconds / row.limit if row.limit else None
        content["time_over_ours"] = {n: c.seconds / row.ours.seconds for n, c in row.others.items() if c}
        content["memory_over_ours"] = {n: c.peak / max(row.ours.peak, 1) for n, c in row.others.items() if c}
        out.append(content)
    return out


def main(title: str, rows: Callable[[Sequence[int], torch.device], Iterator[Row]]) -> None:
    """``python benchmarks/NAME.py [--sizes ...] [--device cuda] [--json FILE]``."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    measured = list(rows(options.sizes, torch.device(options.device)))
    print_rows(title, measured, torch.device(options.device))
    if options.json:
        options.json.write_text(json.dumps(to_json(measured), indent=1) + "\n")
