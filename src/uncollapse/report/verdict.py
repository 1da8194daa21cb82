"""What the numbers of the arms say: the verdict on each, its differences from baseline and control, in plain words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from uncollapse.measure.catalogue import (
    ALIVE,
    EFFECTIVE,
    KNN,
    LINEAR,
    MEASURES,
    MERIT,
    MOVEMENT,
    OLD_VIEW_INFORMATION,
    STEP_TIME,
    UNIQUE,
    UNIQUE_MEANS,
    USED,
    USED_BY_TARGET,
    VIEW_INFORMATION,
    Measure,
    at_epsilon,
    entry,
    number,
)
from uncollapse.measure.verdict import Verdict, judge_row
from uncollapse.report.arms import BASELINE, CONTROL, Grouping, of_mode, rival
from uncollapse.report.comparing import difference, stat
from uncollapse.run_folder.read import RunRecord, common

_CONTROLLED = (*UNIQUE.values(), *UNIQUE_MEANS.values(), MOVEMENT, STEP_TIME)
"""Measures that follow from never learning: nobody is compared with the control in them."""


@dataclass(frozen=True)
class Comparison:
    """An arm against another one, measure by measure, in words."""

    against: str
    is_control: bool
    worse: list[str] = field(default_factory=list)
    better: list[str] = field(default_factory=list)
    same: list[str] = field(default_factory=list)
    more: list[str] = field(default_factory=list)
    """Counts, which describe and have no standard error with one seed."""
    fewer: list[str] = field(default_factory=list)
    unpaired: bool = False
    """Whether a figure of merit could not be compared image by image."""


@dataclass(frozen=True)
class ArmVerdict:
    """What the numbers say about one arm."""

    arm: str
    labels: list[tuple[str, str]]
    """Tone (``bad``, ``warn``, ``good``, ``plain``) and text."""
    rules: list[str]
    sentences: list[str]
    advice: list[str]
    comparisons: list[Comparison]
    warnings: list[str]


def compare(arm: str, other: str, grouping: Grouping) -> Comparison:
    """Sorts what both arms have into better, worse and not clearly unlike, and counts into more and fewer."""
    ours, theirs = grouping.arms[arm], grouping.arms[other]
    out = Comparison(other, theirs[0].name == CONTROL)
    unpaired = False
    for measure in MEASURES:
        if measure is OLD_VIEW_INFORMATION or (out.is_control and measure in _CONTROLLED):
            continue
        a, b, gap = stat(measure, ours), stat(measure, theirs), difference(measure, ours, theirs)
        if a is None or b is None or gap is None:
            continue
        unit = f" {measure.unit}" if measure.unit else ""
        text = f"{measure.name} {measure.text(a.mean)} vs {measure.text(b.mean)}{unit}"
        if gap.error is not None:
            text += f" (difference {gap.mean:+,.{measure.digits}f} ± {gap.error:.{max(1, measure.digits)}f})"
        if measure in MERIT:
            unpaired |= not gap.paired
            {1: out.better, -1: out.worse, 0: out.same, None: out.same}[gap.sign].append(text)
        elif gap.sign == 0 or gap.mean == 0:
            out.same.append(text)
        else:
            (out.more if gap.mean > 0 else out.fewer).append(text)
    return Comparison(**{**vars(out), "unpaired": unpaired})


def verdict(arm: str, grouping: Grouping) -> ArmVerdict:
    """Plain words about one arm: the verdict on its checkpoints, and how it differs from baseline and control."""
    runs = grouping.arms[arm]
    mode = runs[0].name
    others = [] if mode == CONTROL else [rival(arm, grouping, other) for other in (BASELINE, CONTROL)]
    if mode == BASELINE:
        others[0] = of_mode(arm, grouping, BASELINE)[0]
    comparisons = [
        compare(arm, other, grouping)
        for other in others
        if other and other != arm and grouping.data[other] == grouping.data[arm]
    ]
    judged = [one for run in runs if (one := judge_row(run.summary, mode)) is not None]
    labels = _labels(judged)
    if mode == CONTROL:
        labels.insert(0, ("plain", "control"))
    if any(c.is_control and c.worse for c in comparisons):
        labels.append(("bad", "worse than the control"))
    sentences = [*_description(runs), *_readings(runs)]
    if any(isinstance(loss := run.summary.get("loss"), float) and not math.isfinite(loss) for run in runs):
        labels.insert(0, ("bad", "diverged"))
        sentences.append("The final loss is not a finite number: training diverged.")
    return ArmVerdict(
        arm,
        labels,
        list(dict.fromkeys(f.rule for f in judged)),
        sentences,
        list(dict.fromkeys(f.advice for f in judged)),
        comparisons,
        _warnings(runs),
    )


def _labels(judged: Sequence[Verdict]) -> list[tuple[str, str]]:
    """The label of each checkpoint; where seeds disagree, how many have which."""
    pairs = [(f.tone, f.label) for f in judged]
    distinct = dict.fromkeys(pairs)
    if len(distinct) == 1:
        return list(distinct)
    return [(tone, f"{label} ({pairs.count((tone, label))} of {len(pairs)} seeds)") for tone, label in distinct]


def _warnings(runs: Sequence[RunRecord]) -> list[str]:
    """What was said during training, with the step, so that it is not read as of the end."""
    rows = [(run, row) for run in runs for row in run.metrics if row.get("kind") == "warning"]
    return list(
        dict.fromkeys(
            f"{f'seed {run.seed}, ' if len(runs) > 1 else ''}step {row.get('step', '?'):,}: {row.get('message', '')}"
            if isinstance(row.get("step"), int)
            else str(row.get("message", ""))
            for run, row in rows
        )
    )


def _description(runs: Sequence[RunRecord]) -> list[str]:
    def count(measure: Measure) -> str:
        s = stat(measure, runs)
        if s is None:
            return ""
        return measure.text(s.mean) + ("" if s.sd is None else f" ± {measure.text(s.sd)}")

    if not any(measure.read(run.summary) is not None for run in runs for measure in MEASURES):
        return ["No summary was found for this run, so there is nothing to judge yet."]
    sentences = []
    if (bits := stat(VIEW_INFORMATION, runs)) is not None:
        text = f"{bits.mean:.2f}" + ("" if bits.error is None else f" ± {bits.error:.2f}")
        sentences.append(f"{text} bits survive augmentation (view information).")
    total = number(runs[0].summary.get("prototypes"))
    parts = []
    for eps in (0.025, 0.25):
        kept = Measure("", "", lambda s, e=eps: at_epsilon(s.get("unique"), e))  # type: ignore[misc]
        if (share := stat(UNIQUE[eps], runs)) and count(kept):
            parts.append(f"{count(kept)} distinct at ε = {eps:g} ({share.mean:.1f} %)")
    means = Measure("", "", lambda s: at_epsilon(s.get("unique_means"), 0.025))
    unlike = any(
        run.summary.get("unique_means", run.summary.get("unique")) != run.summary.get("unique") for run in runs
    )
    if parts and unlike and count(means):
        parts.append(f"{count(means)} of the mixture's means at ε = 0.025")
    if total and parts:
        sentences.append(f"{total:,.0f} prototypes: " + " and ".join(", ".join(parts).rsplit(", ", 1)) + ".")
    if used := count(USED):
        n, unit = common(runs, "n") or common(runs, "n_held_out"), common(runs, "unit") or "images"
        text = f"{used} used on {n + ' ' if n else ''}held-out {unit}"
        if by_target := count(USED_BY_TARGET):
            text += f" ({by_target} by the training target)"
        if worth := count(EFFECTIVE[0.025]):
            text += f", which are worth {worth} effective prototypes"
        if alive := count(ALIVE):
            window = common(runs, "alive_window")
            text += f"; {alive} alive in {f'the last {window} steps of ' if window else ''}training"
        sentences.append(text + ".")
    return sentences


def _readings(runs: Sequence[RunRecord]) -> list[str]:
    """What an arm's own numbers mean, beyond the verdict."""
    readings = []
    unique, used, alive = (stat(m, runs) for m in (UNIQUE[0.025], USED, ALIVE))
    total = number(runs[0].summary.get("prototypes"))
    if runs[0].name == CONTROL and unique and used:
        readings.append(
            "This is the control: random prototypes that are never learned. They are "
            f"{unique.mean:.0f} % unique, yet only {used.mean:,.0f} are used: the share of unique prototypes alone "
            "says nothing."
        )
    elif unique and unique.mean >= 50 and alive and total and alive.mean < total / 2:
        readings.append(
            f"Only {alive.mean:,.0f} of {total:,.0f} are alive. A dead prototype counts as unique wherever it sits, so "
            f"{unique.mean:.0f} % unique says little here.{_stuck(runs)}"
        )
    knn, floor = stat(KNN, runs), stat(Measure("", "", entry("knn_untrained", 100)), runs)
    if knn and floor and knn.mean - floor.mean <= 1.96 * math.sqrt(2) * (knn.error or 0.0):
        readings.append(f"kNN ({knn.mean:.1f} %) is not clearly above an untrained encoder's ({floor.mean:.1f} %).")
    if (old := stat(OLD_VIEW_INFORMATION, runs)) is not None:
        readings.append(
            f"Its view information ({old.mean:.2f}) is a number of the old, biased estimator and is not compared; "
            "delete its summary.json and run uncollapse train --resume on its folder to measure it again."
        )
    return readings + [note for run in runs for note in run.summary.get("notes") or []]


def _stuck(runs: Sequence[RunRecord]) -> str:
    arrays = runs[0].arrays
    if "usage" not in arrays or "movement" not in arrays or not (unused := arrays["usage"] == 0).any():
        return ""
    share = 100 * float((arrays["movement"][unused] < 0.1).mean())
    if share < 10:
        return ""
    return f" Of the unused ones, {share:.0f} % lie within cosine distance 0.1 of where they started."


def takeaways(grouping: Grouping) -> list[str]:
    """The comparison in a few sentences, figures of merit first; empty for a single arm."""
    arms = grouping.arms
    if len(arms) < 2:
        return []
    learned = [arm for arm in arms if arms[arm][0].name != CONTROL]
    lines = []
    against = {
        arm: base
        for arm in learned
        if arms[arm][0].name != BASELINE and (base := rival(arm, grouping, BASELINE)) is not None
    }
    for measure in (VIEW_INFORMATION, KNN, LINEAR):
        for base in dict.fromkeys(against.values()):
            rivals = [arm for arm, other in against.items() if other == base]
            if line := _against(measure, base, rivals, grouping):
                lines.append(line)
    for arm in learned:
        if (control := rival(arm, grouping, CONTROL)) and (worse := compare(arm, control, grouping).worse):
            lines.append(f"Worse than the control (random prototypes): {arm}, in {'; '.join(worse)}.")
    labels = {arm: [f.label for run in arms[arm] if (f := judge_row(run.summary)) is not None] for arm in learned}
    collapsed = [arm for arm, per_run in labels.items() if any("collapse" in label for label in per_run)]
    if collapsed:
        named = [f"{arm} ({s.mean:.1f} % distinct)" for arm in collapsed if (s := stat(UNIQUE[0.025], arms[arm]))]
        lines.append(f"Collapsed at ε = 0.025: {', '.join(named)}.")
    elif any(labels.values()):
        lines.append("No arm lost half of its prototypes to duplicates at ε = 0.025.")
    return lines


def _against(measure: Measure, base: str, rivals: Sequence[str], grouping: Grouping) -> str | None:
    gaps = {
        arm: gap
        for arm in rivals
        if (gap := difference(measure, grouping.arms[arm], grouping.arms[base])) and gap.sign is not None
    }
    theirs = stat(measure, grouping.arms[base])
    if theirs is None or not gaps:
        return None
    unit = f" {measure.unit}" if measure.unit else ""
    parts = []
    for sign, word in ((1, "better"), (-1, "worse"), (0, "no clear difference")):
        named = [
            f"{arm} ({measure.text(s.mean)})"
            for arm, gap in gaps.items()
            if gap.sign == sign and (s := stat(measure, grouping.arms[arm])) is not None
        ]
        if named:
            parts.append(f"{word}: {', '.join(named)}")
    unpaired = "" if all(gap.paired for gap in gaps.values()) else " Not over the same images one by one."
    return f"{measure.name}: {base} {measure.text(theirs.mean)}{unit}; {'; '.join(parts)}.{unpaired}"
