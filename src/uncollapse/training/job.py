"""What one training run knows about itself from its first step to its summary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.fabric import Fabric

from uncollapse.config.schema import Config
from uncollapse.data.images import ImageSet


@dataclass(frozen=True)
class Job:
    """Everything about a run that no step changes; what steps change is in `TrainState`."""

    config: Config
    out: Path
    """The run folder."""
    fabric: Fabric
    images: ImageSet
    """To train on."""
    held_out: ImageSet
    digests: dict[str, str]
    """Of both, as `image_digests` makes them."""
    steps_per_epoch: int
    total: int
    """Steps of the whole recipe, which schedules run over."""

    @property
    def device(self) -> torch.device:
        return self.fabric.device

    def epoch(self, step: int) -> float:
        """Epochs done after ``step`` steps."""
        return step / self.steps_per_epoch
