"""Progress on the terminal: one bar per run, with the loss and the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def bars(console: Console) -> Progress:
    """A display of bars with steps done, loss, time taken and time left."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console,
    )  # fmt: skip


@contextmanager
def training_bar(
    show: bool = True,
) -> Iterator[tuple[Callable[[str], None], Callable[[int, int, float], None]]]:
    """Yields ``say(line)`` and ``progress(done, total, loss)`` that share one terminal."""
    if not show:
        yield lambda line: None, lambda done, total, loss: None
        return
    console = Console()
    with bars(console) as display:
        task = display.add_task("training", total=None, loss=float("nan"), visible=False)

        def progress(done: int, total: int, loss: float) -> None:
            display.update(task, completed=done, total=total, loss=loss, visible=True)

        yield lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True), progress
