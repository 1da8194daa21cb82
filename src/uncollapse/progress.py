"""Progress on the terminal: one bar per run, with the loss and the time left; plain lines where there is none."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 30.0
"""A log file gets a line this often."""

Report = Callable[[str, int, int, float], None]
"""Called with (name of the run, steps done, steps to do, loss)."""


@contextmanager
def run_bars(console: Console, names: list[str]) -> Iterator[Report]:
    """Shows each named run's steps, loss, time taken and time left."""
    if not console.is_terminal or console.is_dumb_terminal:  # TERM=dumb cannot redraw a line
        yield _lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console) as display:
        width = max(map(len, names))
        tasks = {n: display.add_task(f"{n:<{width}}", total=None, start=False, loss="–") for n in names}

        def report(name: str, done: int, total: int, loss: float) -> None:
            task = tasks[name]
            if not display.tasks[task].started:
                display.start_task(task)
            display.update(task, completed=done, total=total, loss=f"{loss:.3f}")

        yield report


def _lines(console: Console) -> Report:
    first: dict[str, tuple[float, int]] = {}
    last: dict[str, float] = {}

    def report(name: str, done: int, total: int, loss: float) -> None:
        now = time.monotonic()
        began, start = first.setdefault(name, (now, done))
        if done < total and now - last.setdefault(name, now) < LINE_SECONDS:
            return
        last[name] = now
        left = (now - began) / max(1, done - start) * (total - done)
        console.print(f"{name}: step {done}/{total}, loss {loss:.3f}, {left:.0f} s left", markup=False, highlight=False)

    return report


@contextmanager
def training_bar(show: bool = True) -> Iterator[tuple[Callable[[str], None], Callable[[int, int, float], None]]]:
    """Yields ``say(line)`` and ``progress(done, total, loss)`` that share one terminal."""
    if not show:
        yield lambda line: None, lambda done, total, loss: None
        return
    console = SteadyConsole()
    with run_bars(console, ["training"]) as report:

        def say(line: str) -> None:
            with suppress(OSError, ValueError):  # a closed terminal, or a log file on a full disk
                console.print(line, markup=False, highlight=False, soft_wrap=True)

        def progress(done: int, total: int, loss: float) -> None:
            with suppress(OSError, ValueError):
                report("training", done, total, loss)

        yield say, progress


class SteadyConsole(Console):
    """A console whose reader may leave (``| head``) without ending the run."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        silence_stdout()


def silence_stdout() -> None:
    """What is still printed goes nowhere, also when the interpreter flushes at its end."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def share_bar(console: Console) -> Iterator[Callable[[str, float], None]]:
    """Yields ``report(what, share)``: one bar with the time left, gone at the end; now and then a line, where none can
    be drawn. ``what`` is printed as it is; a new one starts again at its own share."""
    if not console.is_terminal or console.is_dumb_terminal:
        yield _share_lines(console)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, transient=True) as display:
        task = display.add_task("", total=None)
        now = ""

        def report(what: str, share: float) -> None:
            nonlocal now
            if what != now:
                display.reset(task, total=1.0, description=what)
                now = what
            display.update(task, completed=share)

        yield report


def _share_lines(console: Console) -> Callable[[str, float], None]:
    began: dict[str, float] = {}
    last = time.monotonic()

    def report(what: str, share: float) -> None:
        nonlocal last
        now = time.monotonic()
        first = began.setdefault(what, now)
        if now - last < LINE_SECONDS or not 0 < share < 1:
            return
        last = now
        left = (now - first) * (1 - share) / share
        console.print(f"{what}: {100 * share:.0f} %, {left:.0f} s left", markup=False, highlight=False, soft_wrap=True)

    return report
