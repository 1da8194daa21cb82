"""The verdict on the prototypes of one checkpoint: numbers in; label, rule, sentence and what to do next out.

`diagnose` and the report both ask `judge`, so that one checkpoint has one verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from uncollapse.measure.random_start import RandomLikeness
from uncollapse.measure.sweep import WIDE

COLLAPSED, DUPLICATES, BUNCHED = 0.5, 0.9, 0.5
"""Shares of unique prototypes: below the first a collapse, below the second duplicates; third: at wide ε."""
UNUSED = 0.1
"""Share of the K prototypes that N_eff must reach before they count as used."""

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
    mode: str = "",
) -> Verdict:
    """The verdict on K = ``total`` prototypes, ``bad`` of which are zero or not finite.

    ``unique`` counts the usable ones at each ε, the headline first; ``used`` and ``effective`` (N_eff at the
    headline) come from ``n`` images, or what ``unit`` says; ``wide`` is the count at ε = 0.25 where ``unique`` lacks
    it; ``mode`` (how the prototypes were learned, where that is known) only changes the advice. No verdict calls a
    matrix healthy from its vectors alone: random vectors that nothing ever used are all unique.
    """
    label, rule, sentence = _judged(total, bad, dim, unique, likeness, used, effective, n, unit, wide)
    few = n if label == "distinct, use unknown" and used is not None else None
    return Verdict(label, rule, sentence, advice(label, mode, None if few is None else total))


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


def judge_row(row: Mapping[str, Any], mode: str = "") -> Verdict | None:
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
        row.get("n", row.get("n_held_out")),
        row.get("unit") or "images",
        sweep.get(f"{WIDE:g}"),
        mode,
    )


_APART = {
    "": "in a new run balance the targets (Sinkhorn) or take prototypes out of the gradient (decoupled), or use fewer; "
    "KoLeo-Proto keeps them apart, and no more",
    "joint": "train again with balanced targets (--prototypes joint-sinkhorn) or with --prototypes decoupled; "
    "--prototypes koleo keeps them apart, and no more",
    "joint-sinkhorn": "train again with --prototypes decoupled",
    **dict.fromkeys(
        ("koleo", "repulsion", "energy", "mst"),
        "raise prototypes.koleo_weight, or train again with --prototypes decoupled",
    ),
    "orthogonality": "train again with --prototypes decoupled or koleo: more prototypes than dimensions have copies "
    "that orthogonality cannot tell",
    "decoupled": "use fewer prototypes (prototypes.count)",
    "decoupled-paper": "train again with --prototypes decoupled, which keeps its components alive",
    "capi": "raise prototypes.clustering.lr if they hardly moved, or train again with --prototypes decoupled",
    "memory": "use fewer (prototypes.count): they are projections, and as alike as the encoder makes those",
    "fixed": "use fewer, or more dimensions (head.bottleneck): random directions repeat where there is no room",
}
"""What helps against duplicates and dead prototypes, by how they are learned; "": not known."""


def help_apart(mode: str) -> str:
    """What helps such prototypes against copies and death, as the end of a sentence."""
    kinds = [kind for kind in _APART if mode == kind or mode.startswith(f"{kind}-")]
    return _APART[max(kinds, key=len, default="")]


def advice(label: str, mode: str = "", images: int | None = None) -> str:
    """What to do next about a verdict, in a sentence.

    Args:
        mode: how the prototypes were learned, such as ``joint``; empty where that is not known.
        images: so many images would tell whether they are used, where fewer were looked at.
    """
    apart = help_apart(mode)
    if mode == "fixed" and label in ("untrained or unused", "mostly unused", "distinct and used"):
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
