"""Many training runs as one: cells trained side by side, each resumed where it stopped, none done twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from uncollapse.cli.terminal import print_json
from uncollapse.config.load import load_config
from uncollapse.config.schema import Config
from uncollapse.errors import ConfigError, TrainingError
from uncollapse.progress import SteadyConsole, bars
from uncollapse.report.grid import markdown, table, to_csv
from uncollapse.report.page import write_report
from uncollapse.report.table import print_table
from uncollapse.run_folder.files import write_atomically
from uncollapse.run_folder.read import read_run
from uncollapse.shown import in_words
from uncollapse.training.interrupt import StopRequest

ALL = "all"
"""The bar of all cells together."""

_messages: Any = None
_stopped: Any = None


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    name: str
    """What its bar is called."""
    config: Config
    out: Path


@dataclass(frozen=True)
class Outcome:
    """What became of the cells."""

    summaries: dict[str, dict[str, Any]]
    """Cell → its summary, in the cells' order."""
    failed: dict[str, str]
    """Cell → why it has none."""


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_grid(
    cells: list[Cell],
    out: Path,
    max_steps: int | None,
    jobs: int,
    devices: list[str],
    again: str,
    title: str,
    notes: tuple[str, ...] = (),
    trunks: tuple[Sequence[Cell], int | None] = ((), None),
    as_json: bool = False,
) -> Outcome:
    """Trains the cells and writes ``summary.json``, ``table.md``, ``table.csv`` and ``report.html`` to ``out``.

    Args:
        cells, max_steps, jobs, devices, again: see `run_grid`.
        out: folder of the grid.
        title: of the page.
        notes: shown with the tables.
        trunks: runs that cells leave, and the step at which; trained up to there before the cells.
        as_json: whether stdout gets one JSON object and stderr what is said besides.

    Raises:
        ConfigError: ``out`` holds something else than a grid, or one of another configuration.
        TrainingError: some cells failed; the tables of the others are written, and it names the command to go on.
    """
    folders = {cell.out.parent for cell in cells}
    if out.exists() and any(out.iterdir()) and not any(folder.is_dir() for folder in folders):
        raise ConfigError(f"--out {out}: holds something else than such a comparison; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    console = SteadyConsole(stderr=as_json)
    console.print(
        f"{len(cells)} runs, {jobs} at a time on {f'{len(devices)} GPUs' if devices else f'{cores()} cores'} → {out}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if trunks[0]:
        console.print(f"{len(trunks[0])} before them, to step {trunks[1]}, for the others to leave", highlight=False)
        before = run_grid(trunks[0], trunks[1], min(jobs, len(trunks[0])), devices, console, again)
        if before.failed:
            raise TrainingError(_failed(before, len(trunks[0]), again))
    outcome = run_grid(cells, max_steps, jobs, devices, console, again)
    summaries = list(outcome.summaries.values())
    if summaries:
        write_atomically(out / "summary.json", (json.dumps({"arms": summaries}, indent=1) + "\n").encode())
        records = [read_run(cell.out) for cell in cells if cell.name in outcome.summaries]
        values, differences = table(records)
        write_atomically(out / "table.md", markdown(values, differences).encode())
        write_atomically(out / "table.csv", to_csv(values).encode())
        write_report(records, out / "report.html", title, list(notes))
        console.print()
        print_table(summaries, console)
        for note in notes:
            console.print(note, highlight=False, markup=False)
        for name in ("table.md", "report.html"):
            console.print(f"{name.partition('.')[0]}: {out / name}", highlight=False, markup=False, soft_wrap=True)
    if as_json:
        arms = [
            {"run": str(cell.out), **outcome.summaries[cell.name]} for cell in cells if cell.name in outcome.summaries
        ]
        print_json({"out": str(out), "arms": arms, "failed": outcome.failed, "notes": list(notes)})
    if outcome.failed:
        raise TrainingError(_failed(outcome, len(cells), again))
    return outcome


def _failed(outcome: Outcome, of: int, again: str) -> str:
    lines = "; ".join(f"{name}: {why}" for name, why in outcome.failed.items())
    return f"{len(outcome.failed)} of {of} runs failed ({lines}); go on with: {again}"


def run_grid(
    cells: Sequence[Cell], max_steps: int | None, jobs: int, devices: Sequence[str], console: Console, again: str
) -> Outcome:
    """Trains every cell in a process of its own, ``jobs`` at a time.

    A cell whose folder is there already goes on from its newest checkpoint; a finished one is not trained again. One
    that fails leaves the others alone.

    Args:
        cells: with a folder each.
        max_steps: stop each after so many steps.
        jobs: processes at a time.
        devices: numbers of the CUDA devices to share out, a process each; none: all on the CPU.
        console: where the bars go.
        again: the command that goes on from here, said on Ctrl-C.

    Raises:
        ConfigError: a folder that holds a run of another configuration.
        KeyboardInterrupt: after the steps under way are saved.
    """
    for cell in cells:
        started = cell.out / "config.yaml"
        if started.exists() and load_config(started) != cell.config:
            raise ConfigError(f"{cell.out} holds a run of another configuration; choose another --out")
    context = multiprocessing.get_context("spawn")
    manager = context.Manager()
    messages, stopped, free = manager.Queue(), manager.Event(), manager.Queue()
    for i in range(jobs):
        free.put(devices[i % len(devices)] if devices else "")
    threads = max(1, cores() // jobs)
    with ProcessPoolExecutor(jobs, context, _start_worker, (messages, stopped, free, threads)) as pool:
        started_cells = {
            pool.submit(_train_cell, cell.name, cell.config, str(cell.out), max_steps, bool(devices)): cell.name
            for cell in cells
        }
        # Not an exception out of nowhere: one within a call to the manager would leave it without its answer, and
        # `stopped` could not be set any more.
        request = StopRequest(speaks=False)
        try:
            with request.listening():
                follow(started_cells, messages, console, lambda: request.asked)
        except KeyboardInterrupt:
            stopped.set()
            console.print("finishing the steps under way and saving them; again to stop now", highlight=False)
            pool.shutdown(cancel_futures=True)
            console.print(f"stopped; go on from here with: {again}", soft_wrap=True, highlight=False, markup=False)
            raise
        failed = {name: in_words(e) for future, name in started_cells.items() if (e := future.exception()) is not None}
        done = {name: future.result() for future, name in started_cells.items() if name not in failed}
    return Outcome(done, failed)


def _start_worker(messages: Any, stopped: Any, free: Any, threads: int) -> None:
    global _messages, _stopped
    _messages, _stopped = messages, stopped
    if device := free.get():
        os.environ["CUDA_VISIBLE_DEVICES"] = device  # before torch looks
    import torch

    torch.set_num_threads(threads)


def _train_cell(name: str, config: Config, out: str, max_steps: int | None, on_gpu: bool) -> dict[str, Any]:
    from uncollapse.training.run import train

    last = 0.0

    def progress(done: int, total: int, loss: float) -> None:
        nonlocal last
        if _stopped.is_set():
            signal.raise_signal(signal.SIGINT)
        if done == total or time.monotonic() - last > 0.25:
            last = time.monotonic()
            _messages.put((name, done, total, loss))

    resume = (Path(out) / "config.yaml").exists()
    return train(config, Path(out), max_steps, resume, progress, lambda line: None, "cuda" if on_gpu else "cpu")


def follow(
    started: dict[Future[dict[str, Any]], str],
    messages: Any,
    console: Console,
    asked: Callable[[], bool] = lambda: False,
) -> None:
    """Shows every cell's progress, and that of all together with the time they still need, until all have ended.

    Raises:
        KeyboardInterrupt: once ``asked`` says that they are to stop.
    """
    waiting, heard = set(started), dict[str, tuple[int, int, float]]()
    several = [ALL] if len(started) > 1 else []
    with bars(console, [*started.values(), *several], keep=True) as report:
        while waiting:
            if asked():
                raise KeyboardInterrupt
            with suppress(queue.Empty):
                name, done, total, loss = messages.get(timeout=0.5)
                heard[name] = (done, total, loss)
                report(name, done, total, loss)
                if several:
                    report(ALL, *whole(list(heard.values()), len(started), len(started) - len(waiting)))
                continue
            for future in [f for f in waiting if f.done()]:
                waiting.discard(future)
                if not future.cancelled() and (error := future.exception()) is not None:
                    console.print(f"{started[future]} failed: {in_words(error)}", markup=False, highlight=False)


def whole(heard: Sequence[Sequence[float]], cells: int, ended: int) -> tuple[int, int, float]:
    """Steps done and to do over all cells, and their mean loss; those not heard of count as the mean of the others.

    Args:
        heard: (steps done, steps to do, loss) of each cell that has said so.
        cells: how many there are.
        ended: how many of them have; those that were finished before say nothing.
    """
    each = sum(total for _, total, _ in heard) / len(heard)
    silent = max(0, ended - sum(done == total for done, total, _ in heard))
    done = sum(done for done, _, _ in heard) + silent * each
    return round(done), round(each * cells), sum(loss for _, _, loss in heard) / len(heard)
