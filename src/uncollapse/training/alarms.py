"""What a run warns of while it trains."""

from __future__ import annotations

import math

from uncollapse.measure.verdict import help_apart


class LossWatch:
    """Notices a loss that stays at ln K, and an assignment in which most components are dead; says so once."""

    def __init__(self, prototypes: int, patience: int = 200, arm: str = "") -> None:
        self.uniform = math.log(prototypes)
        self.prototypes = prototypes
        self.patience = patience
        self.arm = arm
        self.stuck = 0
        self.told: set[str] = set()

    def loss(self, loss: float) -> str | None:
        """A message when the loss has been within 0.5 % of ln K for ``patience`` steps running."""
        self.stuck = self.stuck + 1 if abs(loss - self.uniform) < 0.005 * self.uniform else 0
        if self.stuck < self.patience or "loss" in self.told:
            return None
        self.told.add("loss")
        return (
            f"the loss has stayed at ln K = {self.uniform:.3f} for {self.patience} steps: the student predicts "
            "every prototype alike. Usual causes: the projections coincide (try head.batch_norm true, or a "
            "larger optim.lr), the teacher's target is uniform (lower teacher.temperature), teacher and "
            "student share weights, or the warm-up is still too early to judge."
        )

    def alive(self, alive: int, window: int) -> str | None:
        """A message when fewer than half of the prototypes were used in the window; none for the control."""
        if alive >= 0.5 * self.prototypes or "alive" in self.told or self.arm == "fixed":
            return None
        self.told.add("alive")
        return (
            f"only {alive} of {self.prototypes} prototypes were any image's nearest in the {window} steps before; "
            "the others were dead or copies then. The share of unique prototypes counts dead ones as healthy. If it "
            f"stays so to the end: {help_apart(self.arm)}."
        )
