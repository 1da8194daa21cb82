"""Where a training step's time goes."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Seconds spent in each part of a step. On a GPU, events are recorded and read only by :meth:`totals`."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self.pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.last: Any = None
        self.begin()

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> None:
        self.last = self._now()

    def lap(self, part: str) -> None:
        """Books the time since the last lap under ``part``."""
        now = self._now()
        if self.cuda:
            self.pending.append((part, self.last, now))
        else:
            self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now

    def totals(self) -> dict[str, float]:
        if self.pending:
            torch.cuda.synchronize()
            for part, start, end in self.pending:
                elapsed = start.elapsed_time(end) / 1000
                self.seconds[part] = self.seconds.get(part, 0.0) + elapsed
            self.pending.clear()
        return dict(self.seconds)
