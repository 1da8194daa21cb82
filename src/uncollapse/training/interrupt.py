"""Signals while a run trains: asked to stop, it ends after a whole step; nothing else may end it within one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

HANG_UP = getattr(signal, "SIGHUP", None)


class StopRequest:
    """Ctrl-C, a scheduler's SIGTERM or a closed terminal, answered between two steps so that no half-done step is
    saved. A second Ctrl-C interrupts at once, without a checkpoint.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.asked = False
        self.speaks = speaks and multiprocessing.parent_process() is None  # a demo's arms leave it to their parent

    def _ask(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        if self.speaks:
            with suppress(OSError):  # not print: the signal may have come in the middle of one
                os.write(2, b"\nfinishing this step and saving it; again to stop now\n")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals can be caught in the main thread only; elsewhere this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heard = [signal.SIGINT, signal.SIGTERM]
        if HANG_UP is not None and signal.getsignal(HANG_UP) is not signal.SIG_IGN:  # nohup: to be ignored
            heard.append(HANG_UP)
        previous = {n: signal.signal(n, self._ask) for n in heard}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


@contextmanager
def deaths_wait(inside: Callable[[], bool]) -> Iterator[Callable[[], None]]:
    """Keeps the death of a loader process from ending a step half way; yields a check to call between steps.

    PyTorch's handler raises wherever the main thread happens to be. Enter when the first batch has been loaded.
    """
    theirs = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    if not callable(theirs) or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def handler(number: int, frame: object) -> None:
        if not inside():
            theirs(number, None)

    signal.signal(signal.SIGCHLD, handler)
    try:
        yield lambda: theirs(signal.SIGCHLD, None)
    finally:
        signal.signal(signal.SIGCHLD, theirs)
