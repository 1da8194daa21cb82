"""What a run warns of while it trains."""

from __future__ import annotations

import math
from collections.abc import Mapping

from uncollapse.measure.verdict import help_apart


class LossWatch:
    """Notices a term that stays where a student that knows nothing has it, and an assignment in which most components
    are dead; says each once.

    Args:
        prototypes: K of every set.
        uninformed: term → its value when the student predicts all prototypes alike.
        patience: steps running.
        mode: how prototypes are learned, for the advice.
    """

    def __init__(self, prototypes: int, uninformed: Mapping[str, float], patience: int = 200, mode: str = "") -> None:
        self.prototypes, self.uninformed, self.patience, self.mode = prototypes, uninformed, patience, mode
        self.stuck: dict[str, int] = {}
        self.told: set[str] = set()

    def loss(self, terms: Mapping[str, float]) -> str | None:
        """A message when a term has been within 0.5 % of its uninformed value for ``patience`` steps running."""
        for name, value in self.uninformed.items():
            near = abs(terms.get(name, math.inf) - value) < 0.005 * value
            self.stuck[name] = self.stuck.get(name, 0) + 1 if near else 0
            if self.stuck[name] < self.patience or "loss" in self.told:
                continue
            self.told.add("loss")
            what = "the loss" if len(terms) == 1 else f"the loss's term {name!r}"
            return (
                f"{what} has stayed at {value:.3f} for {self.patience} steps, which is what it is while the student "
                "predicts every prototype alike. Usual causes: the projections coincide (try head.batch_norm "
                "true, or a larger optim.lr), the teacher's target is uniform (lower teacher.temperature), teacher "
                "and student share weights, or the warm-up is still too early to judge."
            )
        return None

    def alive(self, alive: int, window: int, name: str = "cls") -> str | None:
        """A message when fewer than half of a set were used in the window; none for the control."""
        if alive >= 0.5 * self.prototypes or f"alive {name}" in self.told or self.mode.startswith("fixed"):
            return None
        self.told.add(f"alive {name}")
        which = "prototypes" if name == "cls" else f"prototypes of {name!r}"
        return (
            f"only {alive} of {self.prototypes} {which} were any image's nearest in the {window} steps before; "
            "the others were dead or copies then. The share of unique prototypes counts dead ones as healthy. If it "
            f"stays so to the end: {help_apart(self.mode)}."
        )
