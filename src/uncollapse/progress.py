"""Progress on the terminal: the one bar of every command, with what is left; plain lines where none can be drawn."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 30.0
"""A log file gets a line this often."""

Report = Callable[[str, float, float, float | None], None]
"""Called with (name of the work, done, in all, loss or None). Where all is 1.0, ``done`` is a share of it."""


@contextmanager
def bars(
    console: Console, names: Sequence[str] = (), after: float = 0.0, keep: bool = False, show: bool = True
) -> Iterator[Report]:
    """A bar for each name: how much is done, the loss or the speed, time taken and time left.

    Args:
        names: those that have a bar from the start; others get one when they are first heard of.
        after: seconds of work before anything is shown.
        keep: whether bars stay when their work is done.
        show: False shows nothing.
    """
    if not show:
        yield lambda name, done, total, loss: None
        return
    if not console.is_terminal or console.is_dumb_terminal:  # TERM=dumb cannot redraw a line
        yield _lines(console, last=after == 0)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TextColumn("{task.fields[note]}"),
    )
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    display = Progress(*columns, *times, console=console, transient=not keep)
    width, began = max(map(len, names), default=0), time.monotonic()

    def task_of(name: str) -> TaskID:
        return display.add_task(f"{name:<{width}}", total=None, start=False, amount="", note="")

    tasks = {name: task_of(name) for name in names}

    def report(name: str, done: float, total: float, loss: float | None) -> None:
        if name not in tasks:
            for earlier in () if keep else tasks.values():
                display.update(earlier, visible=False)  # its work may have ended before its own end
            tasks[name] = task_of(name)
        of, task = tasks[name], display.tasks[tasks[name]]
        if not task.started:
            display.start_task(of)
        speed = "" if total == 1.0 or not task.speed else f"{task.speed:,.0f}/s"
        note = speed if loss is None else f"loss {loss:.3f}"
        display.update(
            of, completed=done, total=total, amount=_amount(done, total), note=note, visible=keep or done < total
        )
        if not display.live.is_started and time.monotonic() - began >= after:
            display.start()

    try:
        if not after:
            display.start()
        yield report
    finally:
        if display.live.is_started:
            display.stop()


def _lines(console: Console, last: bool) -> Report:
    """``last``: whether the end of the work has a line of its own."""
    first: dict[str, tuple[float, float]] = {}
    said: dict[str, float] = {}

    def report(name: str, done: float, total: float, loss: float | None) -> None:
        now = time.monotonic()
        began, start = first.setdefault(name, (now, done))
        if now - said.setdefault(name, now) < LINE_SECONDS and not (last and done >= total):
            return
        said[name] = now
        left = (now - began) / max(1e-9, done - start) * (total - done) if done > start else 0.0
        note = "" if loss is None else f", loss {loss:.3f}"
        say(console, f"{name}: {_amount(done, total)}{note}, {left:.0f} s left")

    return report


def _amount(done: float, total: float) -> str:
    return f"{100 * done:.0f} %" if total == 1.0 else f"{done:,.0f}/{total:,.0f}"


def say(console: Console, line: str) -> None:
    """A line as it is, above any bars; a closed terminal, or a log file on a full disk, stops nothing."""
    with suppress(OSError, ValueError):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def training_bar(
    show: bool = True, stderr: bool = False
) -> Iterator[tuple[Callable[[str], None], Callable[[int, int, float], None]]]:
    """Yields ``say(line)`` and ``progress(done, total, loss)`` that share one terminal; ``stderr``: not stdout."""
    console = SteadyConsole(quiet=not show, stderr=stderr)
    with bars(console, ["training"], keep=True, show=show) as report:

        def progress(done: int, total: int, loss: float) -> None:
            with suppress(OSError, ValueError):
                report("training", done, total, loss)

        yield lambda line: say(console, line), progress


class SteadyConsole(Console):
    """A console whose reader may leave (``| head``) without ending the run."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        silence_stdout()


def silence_stdout() -> None:
    """What is still printed goes nowhere, also when the interpreter flushes at its end."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
