"""What the numbers of a run say: each measure over seeds, arms compared, and the verdict in plain words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from uncollapse import figures
from uncollapse.runs import Arms, Row, RunRecord, at_epsilon, common, entry, number, percent
from uncollapse.unique import EPSILONS

BASELINE, CONTROL = "joint", "fixed"
MARGIN = 0.05  # counts and bits that differ by less than this share are not called different


# ---------------------------------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class Stat:
    """A number over the seeds of an arm."""

    mean: float
    sd: float | None  # None with one seed
    half: float
    """Half of its 95 % interval: held-out images (where the run gives an interval) and seeds together."""
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Measure:
    """One column of the table: how to read it from a summary, print it and compare it."""

    name: str
    definition: str
    read: Callable[[Row], float | None]
    digits: int = 0
    unit: str = ""
    better: int = 0
    """+1: more is better, -1: less is better, 0: not compared."""
    interval: str | None = None

    def text(self, value: float) -> str:
        return f"{value:,.{self.digits}f}"


def _unique(eps: float) -> Measure:
    return Measure(
        f"unique ε={eps:g}",
        f"Share of the K prototypes that the greedy ε-cover keeps: no kept prototype lies closer than cosine "
        f"distance {eps:g} to another one kept before it.",
        lambda s: percent(at_epsilon(s.get("unique"), eps), number(s.get("prototypes"))), 1, "%",
        int(eps == EPSILONS[0]),
    )  # fmt: skip


def _effective(eps: float) -> Measure:
    return Measure(
        f"N_eff({eps:g})",
        "Effective prototypes: exp of the entropy of the used counts after every prototype is merged into "
        f"its nearest kept one at ε = {eps:g}.",
        lambda s: at_epsilon(s.get("effective"), eps), 1, "", 1,
    )  # fmt: skip


USED = Measure(
    "used",
    "Prototypes that are the hard argmax of the raw cosine (uncentred, unbalanced) for at least one of the "
    "held-out images.",
    entry("used"), better=1,
)  # fmt: skip
ALIVE = Measure(
    "alive",
    "Prototypes that were a hard argmax in training within the stated last steps; the others are dead.",
    entry("alive"),
)
AMONG_USED = Measure(
    "unique among used", "Share of the used prototypes that the ε-cover keeps at ε = 0.025.",
    lambda s: percent(at_epsilon(s.get("unique_used"), EPSILONS[0]), number(s.get("used"))), 1, "%",
)  # fmt: skip
VIEW_INFORMATION = Measure(
    "view information",
    "Mutual information, in bits, between the argmaxes of two views of the same held-out image: what the "
    "prototypes carry that survives augmentation.",
    entry("view_information"), 2, "bits", 1,
)  # fmt: skip
KNN = Measure("kNN", "Accuracy of a k-nearest-neighbour classifier on the frozen features.",
              entry("knn", 100), 1, "%", 1, "knn_ci95")  # fmt: skip
LINEAR = Measure("linear", "Accuracy of a linear classifier on the frozen features.",
                 entry("linear", 100), 1, "%", 1, "linear_ci95")  # fmt: skip
STEP_TIME = Measure("step time", "Mean wall time of a training step.",
                    entry("seconds_per_step", 1e3), 1, "ms", -1)  # fmt: skip
UNIQUE = {eps: _unique(eps) for eps in EPSILONS}
EFFECTIVE = {eps: _effective(eps) for eps in (0.025, 0.25)}
MEASURES = [
    *UNIQUE.values(), AMONG_USED, USED, ALIVE, *EFFECTIVE.values(), VIEW_INFORMATION, KNN, LINEAR, STEP_TIME,
]  # fmt: skip


def stat(measure: Measure, runs: Sequence[RunRecord]) -> Stat | None:
    """Mean, standard deviation and 95 % half-width of a measure over an arm's seeds."""
    values = [value for run in runs if (value := measure.read(run.summary)) is not None]
    if not values:
        return None
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    pairs = [run.summary.get(measure.interval) for run in runs if measure.interval]
    given = [pair for pair in pairs if pair and None not in pair]
    interval = None
    images = 0.0
    if given:
        # the seeds share their held-out images, so averaging over seeds does not shrink this part
        low, high = (100 * float(np.mean([pair[side] for pair in given])) for side in (0, 1))
        interval, images = (low, high), (high - low) / 2
    seeds = 1.96 * sd / math.sqrt(len(values)) if sd is not None else 0.0
    return Stat(float(np.mean(values)), sd, math.hypot(images, seeds), interval)


def difference(measure: Measure, runs: Sequence[RunRecord], others: Sequence[RunRecord]) -> int | None:
    """+1 where ``runs`` are clearly better than ``others``, -1 clearly worse, 0 no clear difference."""
    ours, theirs = stat(measure, runs), stat(measure, others)
    if ours is None or theirs is None or not measure.better:
        return None
    noise = math.hypot(ours.half, theirs.half)
    if ours.interval is None or theirs.interval is None:
        noise = max(noise, MARGIN * abs(theirs.mean))
    gap = (ours.mean - theirs.mean) * measure.better
    return 0 if abs(gap) <= noise else (1 if gap > 0 else -1)


# ---------------------------------------------------------------------------------------------- verdict


@dataclass(frozen=True)
class Comparison:
    """An arm against another one, measure by measure, in words."""

    against: str
    worse: list[str]
    better: list[str]
    same: list[str]


@dataclass(frozen=True)
class Verdict:
    """What the numbers say about one arm."""

    arm: str
    colour: str
    labels: list[tuple[str, str]]  # tone ("bad", "warn", "good", "plain") and text
    sentences: list[str]
    comparisons: list[Comparison]
    warnings: list[str]


def compare(arm: str, other: str, arms: Arms) -> Comparison:
    """Sort the compared measures of ``arm`` into worse than, better than and not clearly unlike ``other``."""
    found: dict[int, list[str]] = {-1: [], 0: [], 1: []}
    for measure in MEASURES:
        # the control is unique by construction: nobody is worse for having fewer than it
        if other == CONTROL and measure in (*UNIQUE.values(), STEP_TIME):
            continue
        sign = difference(measure, arms[arm], arms[other])
        ours, theirs = stat(measure, arms[arm]), stat(measure, arms[other])
        if sign is not None and ours and theirs:
            unit = f" {measure.unit}" if measure.unit else ""
            found[sign].append(f"{measure.name} {measure.text(ours.mean)} vs {measure.text(theirs.mean)}{unit}")
    return Comparison(other, found[-1], found[1], found[0])


def verdict(arm: str, arms: Arms) -> Verdict:
    """Plain words about one arm, from its numbers and from those of the baseline and the control."""
    runs = arms[arm]
    values = {m.name: s for m in MEASURES if (s := stat(m, runs)) is not None}
    others = [other for other in (BASELINE, CONTROL) if other in arms and other != arm and arm != CONTROL]
    comparisons = [compare(arm, other, arms) for other in others]
    labels, readings = _reading(arm, runs, values)
    if any(c.against == CONTROL and c.worse for c in comparisons):
        labels.append(("bad", "worse than the control"))
    if any(isinstance(loss := run.summary.get("loss"), float) and not math.isfinite(loss) for run in runs):
        labels.insert(0, ("bad", "diverged"))
        readings.append("The final loss is not a finite number: training diverged.")
    rows = [row for run in runs for row in run.metrics if row.get("kind") == "warning"]
    messages = list(dict.fromkeys(str(row.get("message", "")) for row in rows))
    sentences = [*_description(runs, values), *readings]
    return Verdict(arm, figures.style(arm)[0], labels, sentences, comparisons, messages)


def _description(runs: Sequence[RunRecord], values: dict[str, Stat]) -> list[str]:
    def count(stat: Stat, digits: int = 0) -> str:
        spread = "" if stat.sd is None else f" ± {stat.sd:,.{digits}f}"
        return f"{stat.mean:,.{digits}f}{spread}"

    if not values:
        return ["No summary was found for this run, so there is nothing to judge yet."]
    total = number(runs[0].summary.get("prototypes"))
    parts = []
    for eps in (0.025, 0.25):
        share = values.get(UNIQUE[eps].name)
        kept = stat(Measure("", "", lambda s, e=eps: at_epsilon(s.get("unique"), e)), runs)  # type: ignore[misc]
        if share and kept:
            parts.append(f"{count(kept)} distinct at ε = {eps:g} ({share.mean:.1f} %)")
    sentences = []
    if total and parts:
        sentences.append(f"{total:,.0f} prototypes: " + " and ".join(parts) + ".")
    if used := values.get("used"):
        n = common(runs, "n_held_out")
        text = f"{count(used)} used on {n + ' ' if n else ''}held-out images"
        if effective := values.get("N_eff(0.025)"):
            text += f", which are worth {count(effective, 1)} effective prototypes"
        if alive := values.get("alive"):
            window = common(runs, "alive_window")
            text += f"; {count(alive)} alive in {f'the last {window} steps of ' if window else ''}training"
        sentences.append(text + ".")
    if (bits := values.get(VIEW_INFORMATION.name)) is not None:
        sentences.append(f"{count(bits, 2)} bits survive augmentation (view information).")
    return sentences


def _reading(arm: str, runs: Sequence[RunRecord], values: dict[str, Stat]) -> tuple[list[tuple[str, str]], list[str]]:
    """Labels and sentences that say what an arm's own numbers mean."""
    labels: list[tuple[str, str]] = []
    readings: list[str] = []
    unique, wide = values.get(UNIQUE[0.025].name), values.get(UNIQUE[0.25].name)
    used, alive = values.get("used"), values.get("alive")
    total = number(runs[0].summary.get("prototypes"))
    if arm == CONTROL:
        labels.append(("plain", "control"))
        if unique and used:
            readings.append(
                "This is the control: random prototypes that are never learned. They are "
                f"{unique.mean:.0f} % unique, yet only {used.mean:,.0f} are used: the share of unique "
                "prototypes alone says nothing."
            )
    elif unique:
        if unique.mean < 90:
            labels.append(("bad", "partial collapse") if unique.mean < 50 else ("warn", "some duplicates"))
            readings.append(f"One distinct direction stands for {100 / unique.mean:.1f} of them on average.")
        elif wide and wide.mean < 50:
            labels.append(("warn", "bunched"))
            readings.append(
                f"Few are duplicates, but they stand close together: only {wide.mean:.1f} % remain at ε = 0.25."
            )
        if unique.mean >= 50 and alive and total and alive.mean < total / 2:
            labels.append(("warn", "mostly dead"))
            readings.append(
                f"Only {alive.mean:,.0f} of {total:,.0f} are alive. A dead prototype counts as unique "
                f"wherever it sits, so {unique.mean:.0f} % unique says little here.{_stuck(runs)}"
            )
        if not labels:
            labels.append(("good", "distinct"))
    knn, floor = values.get("kNN"), stat(Measure("", "", entry("knn_untrained", 100)), runs)
    if knn and floor and knn.mean - floor.mean <= math.hypot(knn.half, knn.half):
        readings.append(f"kNN ({knn.mean:.1f} %) is not clearly above an untrained encoder's ({floor.mean:.1f} %).")
    return labels, readings


def _stuck(runs: Sequence[RunRecord]) -> str:
    arrays = runs[0].arrays
    if "usage" not in arrays or "movement" not in arrays or not (unused := arrays["usage"] == 0).any():
        return ""
    share = 100 * float((arrays["movement"][unused] < 0.1).mean())
    if share < 10:
        return ""
    return f" Of the unused ones, {share:.0f} % lie within cosine distance 0.1 of where they started."


def takeaways(arms: Arms) -> list[str]:
    """The comparison in a few sentences; empty for a single arm."""
    learned = [arm for arm in arms if arm != CONTROL]
    if len(arms) < 2:
        return []
    lines = []
    shares = {arm: s.mean for arm in learned if (s := stat(UNIQUE[0.025], arms[arm])) is not None}
    collapsed = [f"{arm} ({share:.1f} % distinct)" for arm, share in shares.items() if share < 50]
    if collapsed:
        lines.append(f"Partial collapse at ε = 0.025: {', '.join(collapsed)}.")
    elif shares:
        lines.append("No arm lost half of its prototypes to duplicates at ε = 0.025.")
    for measure in (USED, VIEW_INFORMATION, KNN, LINEAR):
        if BASELINE in arms and (line := _against_baseline(measure, learned, arms)):
            lines.append(line)
    if CONTROL in arms:
        worse = {arm: compare(arm, CONTROL, arms).worse for arm in learned}
        lines += [f"Worse than the control (random prototypes): {arm}, in {'; '.join(what)}."
                  for arm, what in worse.items() if what]  # fmt: skip
    return lines


def _against_baseline(measure: Measure, learned: list[str], arms: Arms) -> str | None:
    signs = {arm: difference(measure, arms[arm], arms[BASELINE]) for arm in learned if arm != BASELINE}
    base = stat(measure, arms[BASELINE])
    if base is None or all(sign is None for sign in signs.values()):
        return None
    unit = f" {measure.unit}" if measure.unit else ""
    parts = []
    for sign, word in ((1, "higher"), (-1, "lower"), (0, "no clear difference")):
        named = [f"{arm} ({measure.text(s.mean)})" for arm, is_ in signs.items()
                 if is_ == sign and (s := stat(measure, arms[arm])) is not None]  # fmt: skip
        if named:
            parts.append(f"{word}: {', '.join(named)}")
    return f"{measure.name} — {BASELINE} {measure.text(base.mean)}{unit}; {'; '.join(parts)}."
