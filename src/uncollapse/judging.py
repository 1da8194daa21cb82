"""The verdict on the prototypes of one checkpoint: numbers in; label, rule, sentence and what to do next out.

`diagnose` and the report both ask `judge`, so that one checkpoint has one verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COLLAPSED, DUPLICATES, BUNCHED = 0.5, 0.9, 0.5
"""Shares of unique prototypes: below the first a collapse, below the second duplicates; third: at wide ε."""
WIDE = 0.25
UNUSED = 0.1
"""Share of the K prototypes that N_eff must reach before they count as used."""
_SAMPLE = 2048
_DRAWS = 6

FAILING = frozenset({"damaged", "untrained or unused", "partial collapse", "total collapse", "mostly unused"})
"""Verdicts that `--fail-under` fails whatever the share of unique prototypes is."""


@dataclass(frozen=True)
class Verdict:
    """What the numbers mean, by which rule, and what to do next."""

    label: str
    rule: str
    sentence: str
    advice: str = ""

    @property
    def tone(self) -> str:
        """``bad``, ``good`` or ``warn``: how a page colours the label."""
        return "bad" if self.label in FAILING else "good" if self.label == "distinct and used" else "warn"


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
    unique: float
    """Share of unique rows at the headline ε among as many random directions; below 1 where D is small."""
    orthogonal: bool
    """Whether rows (K ≤ D) or columns are orthogonal to 1e-3, as orthogonal initialisation makes them."""
    alike: bool | None
    """Whether it cannot be told from a random start; None where there are too few rows or dimensions to say."""

    @property
    def rule(self) -> str:
        if self.orthogonal:
            return "rows or columns are orthogonal to 0.001, as orthogonal initialisation leaves them"
        return (
            "looks like a random start: mean direction (rows × length²), spread (D × mean cos²) and mean cosine to "
            f"the nearest row are {self.resultant:.2f}, {self.spread:.3f} and {self.nearest:.3f}, for random "
            f"directions 1, 1 and {self.nearest_random:.3f}"
        )


def random_likeness(w: Tensor, eps: float) -> RandomLikeness:
    """Compares w (K, D; rows finite and not zero) with random directions of its shape, and of orthogonal ones.

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
        return RandomLikeness(n, *found, found[2], 1.0, False, None)
    expected = sum(d[2] for d in draws) / len(draws)
    noise = math.sqrt(sum((d[2] - expected) ** 2 for d in draws) / (len(draws) - 1))
    alike = None
    if n >= 32 and dim >= 4:  # with fewer, chance is too wide to be told from training
        alike = (
            found[0] < 1.5 + 6 * math.sqrt(2 / dim)
            and abs(found[1] - 1) < 0.1 + 6 * math.sqrt(4 / (n * (n - 1)))
            and abs(found[2] - expected) < 0.02 + 6 * noise
        )
    orthogonal = n >= 8 and dim >= 4 and _is_orthogonal(w, chosen)
    return RandomLikeness(n, *found, expected, random_share(len(w), dim, eps), orthogonal, orthogonal or alike)


def _is_orthogonal(w: Tensor, chosen: Tensor) -> bool:
    k, dim = w.shape
    if k <= dim:
        rows = torch.nn.functional.normalize(chosen, dim=1)
        return float((rows @ rows.T).fill_diagonal_(0).abs().max()) < 1e-3
    scale = w.abs().amax().double()
    gram = sum((part.double() / scale).T @ (part.double() / scale) for part in w.split(1 << 16))
    assert isinstance(gram, Tensor)
    gram = gram / (gram.trace() / dim)
    return float((gram - torch.eye(dim, dtype=gram.dtype, device=gram.device)).abs().max()) < 1e-3


def random_share(rows: int, dim: int, eps: float) -> float:
    """Share of unique rows among random directions, ``rows`` of them: 1 unless there are few dimensions or ε is wide.

    The chance that two random directions are closer than ε is that of a cap of the sphere, an incomplete beta function.
    Where a row has next to no other in its cap the share is 1; elsewhere it is counted on such a draw.
    """
    from scipy.special import betainc

    from uncollapse.unique import greedy_cover

    if dim < 2 or rows < 2:
        return 1.0
    cap = 0.5 * float(betainc((dim - 1) / 2, 0.5, min(1.0, 1 - (1 - eps) ** 2)))
    if rows * (cap if eps <= 1 else 1 - cap) < 0.01:
        return 1.0
    drawn = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0))
    return len(greedy_cover(drawn, eps)) / rows


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
    total: int,
    bad: int,
    dim: int,
    unique: Mapping[float, int],
    likeness: RandomLikeness | None,
    used: int | None = None,
    effective: float | None = None,
    n: int | None = None,
    unit: str = "images",
    wide: int | None = None,
    arm: str = "",
) -> Verdict:
    """The verdict on K = ``total`` prototypes, ``bad`` of which are zero or not finite.

    ``unique`` counts the usable ones at each ε, the headline first; ``used`` and ``effective`` (N_eff at the
    headline) come from ``n`` images, or what ``unit`` says; ``wide`` is the count at ε = 0.25 where ``unique`` lacks
    it; ``arm`` (how the prototypes were learned, where that is known) only changes the advice. No verdict calls a
    matrix healthy from its vectors alone: random vectors that nothing ever used are all unique.
    """
    label, rule, sentence = _judged(total, bad, dim, unique, likeness, used, effective, n, unit, wide)
    few = n if label == "distinct, use unknown" and used is not None else None
    return Verdict(label, rule, sentence, advice(label, arm, None if few is None else total))


def _judged(
    total: int,
    bad: int,
    dim: int,
    unique: Mapping[float, int],
    likeness: RandomLikeness | None,
    used: int | None,
    effective: float | None,
    n: int | None,
    unit: str,
    wide: int | None,
) -> tuple[str, str, str]:
    eps, kept = next(iter(unique.items()))
    share = kept / total
    counted = f"{kept:,} of {total:,} unique at ε = {eps:g} ({100 * share:.1f} %)"
    seen = ""
    if used is not None and effective is not None and n is not None:
        seen = f" {n:,} held-out {unit} use {used:,} of them, worth {effective:.1f} equally used ones."
    if bad:
        return (
            "damaged",
            "any zero, NaN or infinite row",
            f"{bad:,} of {total:,} prototypes are zero, NaN or infinite; among the others {kept:,} are unique at "
            f"ε = {eps:g}.",
        )
    if total == 1 or dim == 1:
        return (
            "nothing to compare",
            "one prototype, or one dimension",
            "A single prototype has no duplicates." if total == 1 else "In one dimension there are two directions.",
        )
    # Random likeness looks at the shape of some rows; copies of random vectors have it too, but are not as many.
    if likeness is not None and likeness.alike and share >= DUPLICATES * likeness.unique:
        return (
            "untrained or unused",
            likeness.rule,
            f"{counted}, but that is what random vectors give: these look as if no training had touched them. "
            f"Unique is not healthy.{seen or ' They may never be used.'}",
        )
    if kept == 1:
        return "total collapse", f"one unique prototype at ε = {eps:g}", f"{counted}: all are one vector.{seen}"
    if share < COLLAPSED:
        return (
            "partial collapse",
            f"less than {100 * COLLAPSED:.0f} % unique at ε = {eps:g}",
            f"{counted}: one distinct vector stands for {total / kept:.1f} prototypes on average.{seen}",
        )
    if share < DUPLICATES:
        return (
            "some duplicates",
            f"{100 * COLLAPSED:.0f} to {100 * DUPLICATES:.0f} % unique at ε = {eps:g}",
            f"{counted}: {total - kept:,} repeat another one.{seen}",
        )
    if effective is not None and n is not None and effective < UNUSED * (most := min(total, n)):
        return (
            "mostly unused",
            f"N_eff({eps:g}) below {100 * UNUSED:.0f} % of the {most:,} that {n:,} {unit} could use",
            f"{counted}.{seen} Distinct vectors that do little.",
        )
    wide = unique.get(WIDE, wide)
    if wide is not None and wide / total < BUNCHED:
        return (
            "bunched",
            f"at least {100 * DUPLICATES:.0f} % unique at ε = {eps:g}, below {100 * BUNCHED:.0f} % at ε = {WIDE}",
            f"{counted}, but close together: {100 * wide / total:.1f} % remain at ε = {WIDE}."
            + (seen or " Whether they are used, only images tell."),
        )
    if used is not None and effective is not None and n is not None:
        rule = f"at least {100 * DUPLICATES:.0f} % unique, and N_eff({eps:g}) "
        # So many images could not have used a tenth of K, so that a small N_eff says more about n than about them.
        if effective < UNUSED * total:
            rule += f"below {100 * UNUSED:.0f} % of K = {total:,}, with fewer {unit} ({n:,}) than prototypes"
            return "distinct, use unknown", rule, f"{counted}.{seen} {n:,} {unit} are too few to tell."
        return "distinct and used", f"{rule}at least {100 * UNUSED:.0f} % of K = {total:,}", f"{counted}.{seen}"
    start = "not compared with a random start" if likeness is None else "unlike a random start"
    if likeness is not None and likeness.alike is None:
        start = "too few rows or dimensions to tell them from a random start"
    return (
        "distinct, use unknown",
        f"at least {100 * DUPLICATES:.0f} % unique at ε = {eps:g}, and {start}",
        f"{counted}. Whether they are used, only images tell.",
    )


def judge_row(row: Mapping[str, Any], arm: str = "") -> Verdict | None:
    """`judge` on the entries of a ``summary.json`` (or of `Diagnosis.to_json`); None where they lack the counts."""
    total, unique = row.get("prototypes"), row.get("unique") or {}
    if not total or not unique:
        return None
    counts = {float(eps): int(count) for eps, count in unique.items()}
    eps = next(iter(counts))
    effective = {float(e): n for e, n in (row.get("effective") or {}).items()}
    start = row.get("random_start")
    sweep = (row.get("sweep") or {}).get("unique") or {}
    return judge(
        int(total),
        (row.get("zero_rows") or 0) + (row.get("non_finite_rows") or 0),
        int(row.get("dim") or 2),
        counts,
        RandomLikeness(**start) if start else None,
        row.get("used"),
        effective.get(eps),
        row.get("n_held_out", row.get("n")),
        row.get("unit") or "images",
        sweep.get(f"{WIDE:g}"),
        arm,
    )


_APART = {
    "": "in a new run keep them apart with KoLeo-Proto, take them out of the gradient (decoupled), or use fewer",
    "joint": "train again with --prototypes decoupled, or keep these apart with --prototypes koleo",
    "koleo": "raise prototypes.koleo_weight, or train again with --prototypes decoupled",
    "decoupled": "use fewer prototypes (prototypes.count)",
    "decoupled-paper": "train again with --prototypes decoupled, which keeps its components alive",
    "fixed": "use fewer, or more dimensions (head.bottleneck): random directions repeat where there is no room",
}
"""What helps against duplicates and dead prototypes, by how they are learned; "": not known."""


def help_apart(arm: str) -> str:
    """What helps such prototypes against copies and death, as the end of a sentence."""
    return _APART.get(arm.removesuffix("-sinkhorn"), _APART[""])


def advice(label: str, arm: str = "", images: int | None = None) -> str:
    """What to do next about a verdict, in a sentence.

    Args:
        arm: how the prototypes were learned, such as ``joint``; empty where that is not known.
        images: so many images would tell whether they are used, where fewer were looked at.
    """
    apart = help_apart(arm)
    if arm == "fixed" and label in ("untrained or unused", "mostly unused", "distinct and used"):
        return "As it should be: this is the control. Learned prototypes must beat its view information and kNN."
    if images is not None:
        return f"Give at least {images:,} held-out images (diagnose --data, --images; training: data.held_out_max)."
    texts = {
        "damaged": "Look for the step where training diverged and go back to the checkpoint before it; a lower "
        "learning rate or clipped gradients (optim.clip 3.0) keep it finite.",
        "nothing to compare": "Give a matrix of two prototypes or more, in two dimensions or more (--key).",
        "untrained or unused": "Check that this is the matrix that training used (--key) and that it was trained.",
        "total collapse": f"Check that features still differ between images (kNN), and {apart}.",
        "partial collapse": f"Compare view information and kNN with the control's (fixed prototypes), and {apart}.",
        "some duplicates": "Compare view information and kNN with the control's (fixed prototypes): a few copies may "
        f"cost nothing. If they do, {apart}.",
        "mostly unused": f"Most of these do nothing: {apart}"
        + ("." if "fewer" in apart else ", or use fewer (prototypes.count)."),
        "bunched": "See whether images tell them apart: view information against the control's (fixed prototypes). "
        f"If they do not, {apart}.",
        "distinct, use unknown": "Give images, to see whether they are used: uncollapse diagnose FILE --data IMAGES.",
        "distinct and used": "Nothing to mend: judge by view information and kNN, against the control (fixed "
        "prototypes).",
    }
    return texts[label]
