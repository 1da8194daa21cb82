"""The verdict on one prototype matrix, with the rule that gave it, and the test for a random start."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

COLLAPSED, DUPLICATES, BUNCHED = 0.5, 0.9, 0.5
"""Shares of unique prototypes: below the first a collapse, below the second duplicates; third: at wide ε."""
WIDE = 0.25
UNUSED = 0.1
_SAMPLE = 2048
_DRAWS = 6

FAILING = frozenset({"damaged", "untrained or unused", "partial collapse", "total collapse", "mostly unused"})
"""Verdicts that `--fail-under` fails whatever the share of unique prototypes is."""


@dataclass(frozen=True)
class Verdict:
    """What the numbers mean, and by which rule."""

    label: str
    rule: str
    sentence: str


@dataclass(frozen=True)
class RandomLikeness:
    """How a matrix compares with as many random directions; all ratios are 1 for those, up to sampling."""

    rows: int
    """Looked at: all, or 2,048 evenly spread ones."""
    resultant: float
    """rows × squared length of the mean direction."""
    spread: float
    """D × mean squared cosine of different rows."""
    nearest: float
    """Mean cosine to the nearest other row."""
    nearest_random: float
    """The same of random directions of this shape."""
    alike: bool | None
    """Whether it cannot be told from them; None where there are too few rows or dimensions to say."""

    @property
    def rule(self) -> str:
        return (
            "looks like a random start: mean direction (rows × length²), spread (D × mean cos²) and mean cosine to "
            f"the nearest row are {self.resultant:.2f}, {self.spread:.3f} and {self.nearest:.3f}, for random "
            f"directions 1, 1 and {self.nearest_random:.3f}"
        )


def random_likeness(w: Tensor) -> RandomLikeness:
    """Compares w (K, D; rows finite and not zero) with random directions of its shape.

    Any start in use (uniform or normal entries, any scale) has directions that are uniform or close to it:
    mean near 0, mean squared cosine 1/D, and nearest neighbours as far as chance has them. Training changes at
    least one of the three long before anything else shows: the mean by far first.
    """
    n, dim = min(len(w), _SAMPLE), w.shape[1]
    chosen = w[torch.linspace(0, len(w) - 1, n).long().to(w.device)].double()
    chosen = chosen / chosen.abs().amax(1, keepdim=True)
    found = _shape_of(chosen)
    generator = torch.Generator().manual_seed(0)
    draws = [
        _shape_of(torch.randn(n, dim, generator=generator, dtype=torch.float64).to(w.device))
        for _ in range(_DRAWS if n > 1 else 0)
    ]
    if not draws:
        return RandomLikeness(n, found[0], found[1], found[2], found[2], None)
    expected = sum(d[2] for d in draws) / len(draws)
    noise = math.sqrt(sum((d[2] - expected) ** 2 for d in draws) / (len(draws) - 1))
    alike = None
    if n >= 32 and dim >= 4:  # with fewer, chance is too wide to be told from training
        alike = (
            found[0] < 1.5 + 6 * math.sqrt(2 / dim)
            and abs(found[1] - 1) < 0.1 + 6 * math.sqrt(4 / (n * (n - 1)))
            and abs(found[2] - expected) < 0.02 + 6 * noise
        )
    return RandomLikeness(n, *found, nearest_random=expected, alike=alike)


def _shape_of(x: Tensor) -> tuple[float, float, float]:
    n = len(x)
    x = torch.nn.functional.normalize(x, dim=1, eps=0.0)
    mean = float(x.mean(0).square().sum()) * n
    if n == 1:
        return mean, 1.0, 1.0
    cos = (x @ x.T).fill_diagonal_(0)
    spread = float(cos.square().sum()) / (n * (n - 1)) * x.shape[1]
    return mean, spread, float(cos.fill_diagonal_(-2).amax(1).mean())


def judge(
    total: int, bad: int, dim: int, unique: dict[float, int], likeness: RandomLikeness | None,
    used: int | None = None, effective: float | None = None, n: int | None = None, unit: str = "images",
) -> Verdict:  # fmt: skip
    """The verdict on K = ``total`` prototypes, ``bad`` of which are zero or not finite.

    ``unique`` counts the usable ones at each ε, the headline first; ``used`` and ``effective`` (N_eff at the
    headline) come from ``n`` images, or what ``unit`` says. No verdict calls a matrix healthy from its vectors
    alone: random vectors that nothing ever used are all unique.
    """
    eps, kept = next(iter(unique.items()))
    share = kept / total
    counted = f"{kept:,} of {total:,} unique at ε = {eps:g} ({100 * share:.1f} %)"
    seen = ""
    if used is not None and effective is not None and n is not None:
        seen = f" {n:,} held-out {unit} use {used:,} of them, worth {effective:.1f} equally used ones."
    if bad:
        return Verdict(
            "damaged",
            "any zero, NaN or infinite row",
            f"{bad:,} of {total:,} prototypes are zero, NaN or infinite; among the others {kept:,} are unique at "
            f"ε = {eps:g}. Look for the step where training diverged.",
        )
    if total == 1 or dim == 1:
        return Verdict(
            "nothing to compare",
            "one prototype, or one dimension",
            "A single prototype has no duplicates." if total == 1 else "In one dimension there are two directions.",
        )
    if likeness is not None and likeness.alike:
        return Verdict(
            "untrained or unused",
            likeness.rule,
            f"{counted}, but that is what random vectors give: these look as if no training had touched them. "
            f"Unique is not healthy.{seen or ' They may never be used.'}",
        )
    if kept == 1:
        return Verdict(
            "total collapse", f"one unique prototype at ε = {eps:g}", f"{counted}: all are one vector.{seen}"
        )
    if share < COLLAPSED:
        return Verdict(
            "partial collapse",
            f"less than {100 * COLLAPSED:.0f} % unique at ε = {eps:g}",
            f"{counted}: one distinct vector stands for {total / kept:.1f} prototypes on average.{seen}",
        )
    if share < DUPLICATES:
        return Verdict(
            "some duplicates",
            f"{100 * COLLAPSED:.0f} to {100 * DUPLICATES:.0f} % unique at ε = {eps:g}",
            f"{counted}: {total - kept:,} repeat another one.{seen}",
        )
    if used is not None and effective is not None and n is not None:
        most = min(total, n)
        if effective < UNUSED * most:
            return Verdict(
                "mostly unused",
                f"N_eff({eps:g}) below {100 * UNUSED:.0f} % of the {most:,} that {n:,} {unit} could use",
                f"{counted}.{seen} Distinct vectors that do little.",
            )
        rule = f"at least {100 * DUPLICATES:.0f} % unique, and N_eff({eps:g}) at least {100 * UNUSED:.0f} % of {most:,}"
        return Verdict("distinct and used", rule, f"{counted}.{seen}")
    wide = unique.get(WIDE)
    if wide is not None and wide / total < BUNCHED:
        return Verdict(
            "bunched",
            f"at least {100 * DUPLICATES:.0f} % unique at ε = {eps:g}, below {100 * BUNCHED:.0f} % at ε = {WIDE}",
            f"{counted}, but close together: {100 * wide / total:.1f} % remain at ε = {WIDE}. "
            "Whether they are used, only images tell (--data).",
        )
    return Verdict(
        "distinct, use unknown",
        f"at least {100 * DUPLICATES:.0f} % unique at ε = {eps:g}, and unlike a random start",
        f"{counted}. Whether they are used, only images tell (--data).",
    )
