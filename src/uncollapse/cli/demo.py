"""The demonstration: one objective, several ways to learn its prototypes, from one start on the same batches."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import signal
import time
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from uncollapse.config.load import load_config
from uncollapse.config.schema import arm_keys, method_name
from uncollapse.errors import ConfigError
from uncollapse.progress import run_bars
from uncollapse.report.page import write_report
from uncollapse.report.table import print_table
from uncollapse.run_folder.files import write_atomically
from uncollapse.run_folder.read import read_run

NOTE = (
    "The prototypes' learning rate (×10) and weight decay (1) are raised on purpose: they fit into a minute the "
    "collapse that a full-size run reaches over its hundred epochs. Digits are easy (an untrained encoder already "
    "does well), so this page claims nothing about kNN on harder images."
)

_messages: Any = None
_stopped: Any = None


def _start_worker(messages: Any, stopped: Any, threads: int) -> None:
    import torch

    global _messages, _stopped
    _messages, _stopped = messages, stopped
    torch.set_num_threads(threads)


def _train_arm(arm: str, seed: int, out: str, max_steps: int | None, overrides: dict[str, Any]) -> dict[str, Any]:
    from uncollapse.training.run import train

    config = load_config("demo", {**overrides, **arm_keys(arm), "seed": seed})
    started = Path(out) / "config.yaml"
    if started.exists() and load_config(started) != config:
        raise ConfigError(f"{out} holds a run of another configuration; choose another --out")
    task = f"{arm} {seed}"
    last = 0.0

    def progress(done: int, total: int, loss: float) -> None:
        nonlocal last
        if _stopped.is_set():
            signal.raise_signal(signal.SIGINT)
        if done == total or time.monotonic() - last > 0.25:
            last = time.monotonic()
            _messages.put((task, done, total, loss))

    return train(config, Path(out), max_steps, started.exists(), progress, lambda line: None, "cpu")


def run_demo(
    out: Path,
    seeds: int,
    arms: list[str],
    max_steps: int | None,
    jobs: int | None,
    overrides: dict[str, Any],
    again: str,
) -> dict[str, Any]:
    """Trains every arm × seed in processes of its own and writes table, ``summary.json`` and ``report.html``.

    A demo that was interrupted goes on where its arms stopped, and finished arms are not trained again; ``again`` is
    the command for that.

    Returns:
        ``{"arms": [one summary per run]}``, as in ``summary.json``.

    Raises:
        ConfigError: ``out`` holds something else than a demo, or one of another configuration.
    """
    if out.exists() and any(out.iterdir()) and not (out / "arms").is_dir():
        raise ConfigError(f"--out {out}: holds something else than a demo; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    runs = [(arm, seed) for seed in range(seeds) for arm in arms]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = min(jobs or cores, len(runs))
    method = method_name(load_config("demo", overrides))
    console.print(
        f"{len(runs)} runs of {method} on real 8×8 digits ({', '.join(arms)}; {seeds} seed{'s' * (seeds > 1)}), "
        f"{jobs} at a time on {cores} cores → {out}",
        highlight=False,
    )
    context = multiprocessing.get_context("spawn")
    manager = context.Manager()
    messages, stopped = manager.Queue(), manager.Event()
    threads = max(1, cores // jobs)
    with ProcessPoolExecutor(jobs, context, _start_worker, (messages, stopped, threads)) as pool:
        started = {
            pool.submit(_train_arm, arm, seed, str(out / "arms" / f"{arm}-seed{seed}"), max_steps, overrides): (
                arm,
                seed,
            )
            for arm, seed in runs
        }
        try:
            _follow(started, messages, console)
        except KeyboardInterrupt:
            stopped.set()
            console.print("finishing the steps under way and saving them; again to stop now", highlight=False)
            pool.shutdown(cancel_futures=True)
            console.print(f"stopped; go on from here with: {again}", soft_wrap=True, highlight=False, markup=False)
            raise
        failed = [e for f in started if not f.cancelled() and (e := f.exception()) is not None]
        if failed:
            raise failed[0]
        summaries = [future.result() for future in started]
    result = {"arms": summaries}
    write_atomically(out / "summary.json", (json.dumps(result, indent=1) + "\n").encode())
    console.print()
    print_table(summaries, console)
    records = [read_run(out / "arms" / f"{arm}-seed{seed}") for arm, seed in runs]
    write_report(records, out / "report.html", "Do the prototypes collapse?", [NOTE])
    console.print(NOTE, highlight=False)
    console.print(f"report: {out / 'report.html'}", highlight=False, soft_wrap=True)
    return result


def _follow(started: dict[Future[dict[str, Any]], tuple[str, int]], messages: Any, console: Console) -> None:
    """Shows every run's progress until all have ended; the first failure cancels those not yet begun."""
    waiting = set(started)
    with run_bars(console, [f"{arm} {seed}" for arm, seed in started.values()]) as report:
        while waiting:
            with suppress(queue.Empty):
                report(*messages.get(timeout=0.5))
                continue
            for future in [f for f in waiting if f.done()]:
                waiting.discard(future)
                if not future.cancelled() and future.exception() is not None:
                    for other in waiting:
                        other.cancel()
