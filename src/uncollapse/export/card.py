"""The model card: what was trained, how its prototypes fared, what was not measured, and how to use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
import yaml

from uncollapse import __version__
from uncollapse.config.facts import method_name, mode_name
from uncollapse.config.load import dump_config
from uncollapse.export.content import Content, SetFacts
from uncollapse.export.usage import usage
from uncollapse.measure.catalogue import (
    ALIVE,
    EFFECTIVE,
    KNN,
    OLD_VIEW_INFORMATION,
    STEP_TIME,
    UNIQUE,
    UNIQUE_MEANS,
    USED,
    VIEW_INFORMATION,
    Measure,
    Row,
    information_text,
    measured,
    number,
)
from uncollapse.measure.verdict import judge, judge_row
from uncollapse.shown import shown

_EXPECTED = (VIEW_INFORMATION, KNN, *UNIQUE.values(), USED, ALIVE, *EFFECTIVE.values())
"""What a card says of every run, or that it was not measured."""
_OF_IMAGES = (VIEW_INFORMATION, KNN)
"""Of the encoder and the first set alone."""
_STILL = 0.005
"""Mean cosine distance from the start below which prototypes have not moved."""
_FILES = {
    "head.safetensors": "projection heads, prototypes, centres; each set's K, D, temperature and counts in its header",
    "encoder.safetensors": "the encoder alone",
    "model.safetensors": "the encoder alone",
    "config.json": "how timm builds the encoder, and what it does to images",
    "checkpoint.pth": "student and teacher with their heads, in the layout of DINO's checkpoints",
    "README.md": "this card",
}


def card(content: Content, to: str, files: Sequence[str]) -> str:
    """The card in Markdown, with the hub's front matter; ``files``: names of what lies beside it."""
    parts = [
        _front_matter(content, to),
        f"# {_text(content.name)}",
        _introduction(content),
        *_control(content),
        "## Files",
        "\n".join(f"- `{name}`: {_FILES[name]}" for name in files),
        "## Use",
        usage(content, to),
        "## Are its prototypes collapsed?",
        *_diagnosis(content),
        "## How it was trained",
        _training(content),
        "## What this card does not say",
        _silence(content),
    ]
    return "\n\n".join(parts) + "\n"


def _text(words: Any) -> str:
    """A name from a folder or a file as text of Markdown, which makes nothing of it."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#&" else c for c in shown(str(words)))


def _front_matter(content: Content, to: str) -> str:
    ours = content.config.backbone.name == "conv3"
    tags = ["image-feature-extraction", *([] if ours else ["timm"]), "self-supervised-learning", "prototypes"]
    front = {
        "library_name": "uncollapse" if ours or to == "dino" else "timm",
        "pipeline_tag": "image-feature-extraction",
        "tags": [*tags, method_name(content.config), "uncollapse"],
    }
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---"


def _introduction(content: Content) -> str:
    config, row = content.config, _row(content)
    count, images = row.get("n_train"), row.get("data")
    on = f"{f'{count:,} images' if count else 'images'}" + (f" of {_text(images)}" if images else "")
    return (
        f"A `{config.backbone.name}` that was trained without labels: {method_name(config)} with "
        f"{mode_name(config)} prototypes, {content.step:,} steps of {config.run.batch:,} images, on {on}. These are "
        f"the weights of its {content.side}, with the projection head and the {config.prototypes.count:,} prototypes "
        "that such releases leave out."
    )


def _control(content: Content) -> list[str]:
    lines = []
    if not content.step:
        lines.append("**Untrained: this is the network before its first step, of use as a control only.**")
    if content.config.prototypes.kind == "fixed":
        lines.append("**A control: its prototypes are directions that never moved; only the encoder learned.**")
    elif content.step and (moved := number(_row(content).get("movement"))) is not None and moved < _STILL:
        lines.append("**Its prototypes are where they started: little or nothing was learned in them.**")
    return lines


def _row(content: Content) -> Row:
    return {} if content.record is None else content.record.summary


# --------------------------------------------------------------------------------------------- diagnosis


def _diagnosis(content: Content) -> list[str]:
    row = _row(content)
    parts = [_verdict(content)]
    if content.record is None:
        parts.append(
            "The run left no measurements of this step: what needs images was not measured. Unique prototypes are "
            "counted on the tensors in `head.safetensors`."
        )
    elif content.side != "teacher" and content.record.method != "swav":
        parts.append(
            "Measured by the run on its teacher's side, of which this student is the other one; unique prototypes are "
            "counted on the tensors in `head.safetensors`."
        )
    for i, (name, facts) in enumerate(content.facts.items()):
        of_set = row if i == 0 else (row.get("sets") or {}).get(name) or {}
        if len(content.facts) > 1:
            parts.append(f"### Prototypes `{name}`, of {facts.of}")
        parts.append(_table(of_set, facts, first=i == 0))
    parts += [f"- {_text(note)}" for note in row.get("notes", [])]
    return parts


def _verdict(content: Content) -> str:
    facts, mode = next(iter(content.facts.values())), mode_name(content.config)
    found = judge_row(_row(content), mode) if content.side == "teacher" or not content.record else None
    if found is None:
        counts = {float(eps): count for eps, count in facts.unique.items()}
        found = judge(facts.K, facts.unusable, facts.D, counts, content.random, mode=mode)
    return f"**{found.label}**: {_text(found.sentence)} (The rule: {_text(found.rule)}.)"


def _table(row: Row, facts: SetFacts, first: bool) -> str:
    counted = {"prototypes": facts.K, "dim": facts.D, "unique": facts.unique}
    row = row | counted
    expected = [m for m in _EXPECTED if first or m not in _OF_IMAGES]
    beside = (STEP_TIME, OLD_VIEW_INFORMATION, *(() if facts.kind.startswith("decoupled") else UNIQUE_MEANS.values()))
    known = [m for m in measured([row]) if m not in beside]
    lines = ["| measure | value | what it is |", "|---|---|---|"]
    for measure in (*expected, *(m for m in known if m not in expected)):
        value = _value(measure, row)
        lines.append(f"| {measure.name} | {value or '**not measured**'} | {measure.definition} |")
    return "\n".join(lines)


def _value(measure: Measure, row: Row) -> str:
    if measure is VIEW_INFORMATION:
        return information_text(row.get("view_information"))
    value = measure.read(row)
    if value is None:
        return ""
    text = measure.text(value) + (f" {measure.unit}" if measure.unit else "")
    if measure in UNIQUE.values():
        text = f"{round(value * row['prototypes'] / 100):,} of {row['prototypes']:,} ({text})"
    ends = row.get(measure.interval) if measure.interval else None
    if ends and None not in ends:
        text += f" (95 %: {100 * ends[0]:.1f} to {100 * ends[1]:.1f})"
    if measure is USED and row.get("n"):
        text += f", seen on {row['n']:,} {row.get('unit') or 'images'}"
    if measure is KNN and (untrained := number(row.get("knn_untrained"))) is not None:
        text += f"; **untrained encoder: {100 * untrained:.1f} %**"
    return text


# ---------------------------------------------------------------------------------------------- training


def _training(content: Content) -> str:
    config, row = content.config, _row(content)
    optim, run = config.optim, config.run
    lines = [
        ("Images", f"{row['n_train']:,} of {_text(row.get('data') or 'unnamed data')}" if row.get("n_train") else ""),
        ("Digest of the images", row.get("data_digest") and f"`{_text(row['data_digest'])}`"),
        ("Held out, and measured on", row.get("n_held_out") and f"{row['n_held_out']:,} images"),
        (
            "Views",
            f"{config.views.global_count} of {config.views.global_size} pixels"
            + (f", {config.views.local_count} of {config.views.local_size}" if config.views.local_count else ""),
        ),
        ("Steps", f"{content.step:,} of {run.batch:,} images; the recipe is planned for {run.epochs:g} epochs"),
        ("Optimiser", f"{optim.name}, learning rate {optim.lr:g} per {optim.lr_batch} images"),
        ("Precision", run.precision),
        ("Seed", config.seed),
        ("Device", row.get("device") and _text(row["device"])),
        ("Seconds a step", f"{row['seconds_per_step']:.3g}" if row.get("seconds_per_step") else ""),
        ("Exported by", f"uncollapse {__version__}, torch {torch.__version__}, timm {timm.__version__}"),
    ]
    known = "\n".join(f"- {name}: {value}" for name, value in lines if value not in (None, ""))
    recipe = f"<details><summary>The whole recipe</summary>\n\n```yaml\n{dump_config(config)}```\n\n</details>"
    return f"{known}\n\n{recipe}"


def _silence(content: Content) -> str:
    lines = [
        "Nothing here was measured on other data than the held-out part of the training set"
        + (", and nothing at this step." if content.record is None else "."),
        "Under which licence the weights may be used is for whoever trained them to say, and depends on the images.",
        "What the encoder was not shown it may treat unfairly; nobody looked for that.",
    ]
    if not (content.record and content.record.summary.get("knn_untrained") is not None):
        lines.append("There is no untrained encoder beside the numbers, without which accuracies mean little.")
    return "\n".join(f"- {line}" for line in lines)
