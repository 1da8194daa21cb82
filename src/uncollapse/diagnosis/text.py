"""Diagnoses as text: a table of counts, and what they mean in plain words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from uncollapse.diagnosis.result import Diagnosis
from uncollapse.measure.catalogue import USED, VIEW_INFORMATION, Measure, effective, information_text, unique
from uncollapse.measure.sweep import WIDE
from uncollapse.progress import SteadyConsole
from uncollapse.shown import shown


def columns(eps: float) -> tuple[tuple[str, Callable[[Diagnosis], str]], ...]:
    """Heading and cell of each column of a comparison at the headline ε; no share of unique ones without the verdict.

    The measures are the report's.
    """
    listed = (VIEW_INFORMATION, unique(eps), *((unique(WIDE),) if eps != WIDE else ()), USED, effective(eps))
    return (
        *((measure.label, partial(_cell, measure)) for measure in listed[:1]),
        ("K", lambda d: f"{d.prototypes:,}"),
        *((measure.label, partial(_cell, measure)) for measure in listed[1:]),
        ("verdict", lambda d: d.verdict.label),
    )


def _cell(measure: Measure, d: Diagnosis) -> str:
    row = d.to_json()
    value, error = measure.read(row), measure.error and measure.error(row)
    if value is None:
        return "–"
    return measure.text(value) + ("" if error is None else f"±{measure.text(error)}")


def names_of(diagnoses: Sequence[Diagnosis]) -> list[str]:
    """The file where there are several, side and set, and the key where that would name two alike; safe to print."""
    short = shortened([d.source.file for d in diagnoses])
    several = len(short) > 1
    named = [shown(f"{short[d.source.file]} {d.source}" if several else str(d.source)) for d in diagnoses]
    return [
        shown(f"{name} ({d.source.key})") if d.source.key and named.count(name) > 1 else name
        for d, name in zip(diagnoses, named, strict=True)
    ]


def shortened(files: Sequence[str]) -> dict[str, str]:
    """Each path without the folders that all of them share at the start and the names that all share at the end.

    Of run folders at the same step only the runs' own names are left.
    """
    parts = {file: Path(file).parts for file in files}
    least = min(map(len, parts.values()))
    shared = 0
    while len({p[shared : shared + 1] for p in parts.values()}) == 1 and shared < least - 1:
        shared += 1
    end = 0
    while len(parts) > 1 and len({p[len(p) - end - 1 :] for p in parts.values()}) == 1 and end < least - shared - 1:
        end += 1
    return {file: str(Path(*p[shared : len(p) - end])) if p else "" for file, p in parts.items()}


def rows_of(d: Diagnosis) -> list[tuple[str, list[str]]]:
    """Label and one cell per ε."""
    rows = [
        ("unique", [f"{n:,}" for n in d.unique.values()]),
        ("unique, % of K", [f"{100 * n / d.prototypes:.1f}" for n in d.unique.values()]),
    ]
    if d.unique_means != d.unique:
        rows.append(("unique means", [f"{n:,}" for n in d.unique_means.values()]))
    if d.components:
        rows.append(("components", [f"{n:,}" for n in d.components.values()]))
        rows.append(("no neighbour", [f"{n:,}" for n in d.no_neighbour.values()]))
    if d.images is not None:
        rows.append(("unique among used", [f"{d.images.unique_used[e]:,}" for e in d.unique]))
        rows.append(("N_eff", [f"{d.images.effective[e]:.1f}" for e in d.unique]))
    return rows


def facts(d: Diagnosis) -> list[str]:
    """How the prototypes are distributed and, with images, what they do; one line each."""
    lines = []
    if len(d.groups):
        largest = ", ".join(f"{int(n):,}" for n in d.groups[:5])
        lines.append(
            f"{len(d.groups):,} groups at ε = {d.epsilon:g}: {int((d.groups == 1).sum()):,} of one prototype; "
            f"the largest have {largest}"
        )
    if d.nearest:
        n = d.nearest
        lines.append(f"nearest other prototype at {n['min']:.3g} to {n['max']:.3g}, median {n['median']:.3g}")
    if d.norms:
        lines.append(f"lengths {d.norms['min']:.3g} to {d.norms['max']:.3g}, median {d.norms['median']:.3g}")
    if "unique" in d.seconds:
        took, product = d.seconds["unique"], d.seconds["product"]
        work = d.prototypes * d.prototypes * d.dim / 2
        text = f"one ε counted in {took:.2f} s"
        if product > 0.05:  # below, neither can be timed
            text += (
                f"; half of the K × K product ({work:.2g} multiply-adds) takes about {product:.2f} s here, so "
                f"{took / product:.1f} ×"
            )
        lines.append(text)
    if d.images is not None:
        i = d.images
        m, h = i.marginal, i.health
        information = information_text(i.to_json()["view_information"])
        bits = f"; {information} survive augmentation" if information else ""
        of = "" if i.unit == "images" else f" of {i.n_images:,} images"
        own = "" if i.used_by_logits is None else f" ({i.used_by_logits:,} by the layer's own logits)"
        how = "".join(f", {word}" for word, key in (("centred", "centred"), ("with bias", "biased")) if m[key])
        lines += [
            f"{i.n:,} held-out {i.unit}{of} use {i.used:,} prototypes{own}{bits}",
            f"{i.alive:,} alive: argmax of one of {i.views} views of {i.n_train:,} training {i.unit} (a checkpoint "
            f"does not record training itself); {i.dead:,} neither used nor alive",
            f"mean target at temperature {m['temperature']:g}{how}: entropy "
            f"{m['entropy']:.2f} of {m['entropy_of_prior']:.2f} nats over all K; over the {m['distinct']:,} distinct "
            f"ones {m['kl_distinct_to_uniform']:.2f} nats from uniform (duplication alone makes "
            f"{m['kl_of_duplication']:.2f}), the largest gets {100 * m['largest']:.1f} %",
            f"encoder ({i.encoder}): effective rank {h['effective_rank_features']:.1f} of {h['features']} features, "
            f"{h['effective_rank_projections']:.1f} of {d.dim} after the head"
            + ("" if h["alignment"] is None else f"; alignment {h['alignment']:.2f}")
            + ("" if h["uniformity"] is None else f", uniformity {h['uniformity']:.2f}"),
        ]
        lines += [
            f"{g.prototypes} prototypes (such as {', '.join(map(str, g.members))}) are one vector for {g.images} "
            f"images; their nearest images overlap by {100 * g.overlap:.0f} %"
            for g in i.shared[:3]
        ]
    return lines


def print_diagnoses(diagnoses: Sequence[Diagnosis], console: Console | None = None) -> None:
    """A block per set: where it was found, the counts per ε, how it is distributed, the verdict and what to do next."""
    console = console or SteadyConsole()
    names = names_of(diagnoses)
    for d, name in zip(diagnoses, names, strict=True):
        family = f" [{d.source.family}]" if d.source.family else ""
        console.print(f"{name}{family}  {d.prototypes:,} × {d.dim} {d.dtype}", style="bold", markup=False)
        where = shown(f"{d.source.file}{': ' + d.source.key if d.source.key else ''}")
        console.print(where, markup=False, highlight=False, soft_wrap=True)  # a path broken in two cannot be copied
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column("ε", overflow="fold")
        for eps in d.unique:
            table.add_column(f"{eps:g}", justify="right", overflow="fold")
        for label, cells in rows_of(d):
            table.add_row(label, *cells)
        console.print(table)
        for line in [*facts(d), *(f"note: {shown(n)}" for n in d.notes)]:
            console.print(f"  {line}", markup=False, highlight=False)
        console.print(f"{d.verdict.label}: {d.verdict.sentence}", style="bold", markup=False, highlight=False)
        console.print(f"  next: {d.verdict.advice}", markup=False, highlight=False)
        console.print(f"  rule: {d.verdict.rule}", markup=False, highlight=False)
        console.print()
    if len(diagnoses) > 1:
        _compare(diagnoses, names, console)


def _compare(diagnoses: Sequence[Diagnosis], names: Sequence[str], console: Console) -> None:
    """A line per set; where names would make it wider than the console, numbers that stand for them."""
    cells = [[read(d) for _, read in columns(d.epsilon)] for d in diagnoses]
    labels = [label for label, _ in columns(diagnoses[0].epsilon)]
    told = [i for i in range(len(labels)) if any(row[i] != "–" for row in cells)]

    def table(first: Sequence[str]) -> Table:
        out = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
        out.add_column("set", overflow="fold")
        for i in told:
            heading = labels[i].replace(" ", "\n")
            out.add_column(heading, justify="right", overflow="fold", no_wrap=labels[i] != "verdict")
        for row, name in zip(cells, first, strict=True):
            out.add_row(Text(name), *(row[i] for i in told))
        return out

    whole = table(names)
    if console.measure(whole, options=console.options.update(width=100_000)).maximum <= console.width:
        console.print(whole)
        return
    console.print(table([str(i) for i in range(1, len(names) + 1)]))
    for i, name in enumerate(names, 1):
        console.print(f"{i:>3}  {name}", markup=False, highlight=False, soft_wrap=True)
