"""``uncollapse evaluate``: its arguments, its progress and its table."""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uncollapse.errors import ConfigError, meant
from uncollapse.evaluate.names import TASK_NAMES
from uncollapse.shown import shown

if TYPE_CHECKING:
    from uncollapse.evaluate.run import Evaluated


def add_parser(commands: Any) -> None:
    """Adds the sub-command to the parser's."""
    parser = commands.add_parser(
        "evaluate",
        help="what the papers measure: kNN, linear, few-shot, long tail, clusters, retrieval, prototypes, transfer",
        epilog="Tasks: knn, linear, longtail, cluster, prototypes (the default: all of these that fit), fewshot, "
        "retrieval, finetune, segment, transfer; or all. Features are extracted once and cached. Exits 0, 1 where a "
        "task failed (the others' results are kept), 2 where input cannot be used.",
    )
    add = parser.add_argument
    add(
        "sources",
        metavar="RUN|FILE|timm:NAME",
        nargs="+",
        help="run folders, whose modes are then compared; or a checkpoint of any known family, or a timm model",
    )
    add(
        "--data",
        metavar="TRAIN[,TEST]",
        help="labelled images; without TEST a part of TRAIN is held out (a run's own data, if left out)",
    )
    add("--tasks", nargs="+", metavar="TASK", help="which, apart by commas or spaces; or all (default: the cheap ones)")
    add("--side", choices=("teacher", "student"), default="teacher", help="which network (default: %(default)s)")
    add("--untrained", action="store_true", help="also the same architecture at its random start: the control")
    add("--weights", metavar="FILE", help="weights of timm:NAME, which is random without")
    add("--pretrained", action="store_true", help="download the weights of timm:NAME (needs internet)")
    add("--size", type=int, metavar="PIXELS", help="side of the images (default: what the model was made for)")
    add("--limit", type=int, metavar="N", help="most images of each part")
    add(
        "--long-tail",
        type=float,
        metavar="IF",
        help="cut the training classes to an imbalance factor, such as 100 (a run's own on its own data, if left out; "
        "1: no cut)",
    )
    add("--sets", nargs="+", default=[], metavar="SET", help="data sets of the task transfer, as --data takes them")
    add("--max-steps", type=int, metavar="N", help="most training steps of the task finetune")
    add("--masks", type=Path, metavar="DIR", help="images with masks, for the task segment")
    add("--seed", type=int, default=0, help="of draws and of random weights (default: %(default)s)")
    add("--cache", type=Path, metavar="DIR", help="where features stay (default: RUN/features, or runs/features)")
    add("--no-cache", action="store_true", help="neither read nor write cached features")
    add("--out", type=Path, metavar="DIR", help="where evaluation.json goes (default: the run folder)")
    add("--json", action="store_true", help="print one JSON object, task by task, and nothing else on stdout")
    add("--batch", type=int, default=256, help="images per forward pass (default: %(default)s)")
    add("--workers", type=int, help="processes that decode images (default: one per core, at most 16)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--trust", action="store_true", help="load files that run code; only if you know their maker")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """The command. Bad input raises; failed tasks exit 1 after everything else has been written."""
    columns = {name: str(overrides.pop(f"data.{name}")) for name in ("image", "label") if f"data.{name}" in overrides}
    if overrides:
        raise ConfigError(f"evaluate takes no {', '.join('--' + name for name in overrides)}")
    for name, least in (("limit", 2), ("batch", 1), ("max_steps", 1), ("workers", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')}: must be at least {least}, got {value}")
    if arguments.long_tail is not None and arguments.long_tail < 1:
        raise ConfigError(
            f"--long-tail: the largest class is at least as large as the smallest, got {arguments.long_tail:g}"
        )
    if arguments.masks is not None and not arguments.masks.is_dir():
        raise ConfigError(f"--masks: {arguments.masks} is no folder; it holds the images and their masks")
    if arguments.no_cache and arguments.cache is not None:
        raise ConfigError("--cache and --no-cache exclude each other")
    words = ",".join(arguments.tasks or []).split(",")
    tasks = None if arguments.tasks is None else [t.strip() for t in words if t.strip()]
    known = (*TASK_NAMES, "all")
    if tasks is not None and (unknown := [t for t in tasks if t not in known]):
        raise ConfigError(f"--tasks: no task {', '.join(map(repr, unknown))} ({meant(unknown[0], known)})")
    tasks = ["all"] if tasks and "all" in tasks else tasks
    sources = list(dict.fromkeys(arguments.sources))
    if len(sources) > 1 and arguments.out is not None:
        raise ConfigError(f"--out: results of {len(sources)} encoders would overwrite one another; leave it out")
    done = {source: _one(arguments, source, tasks, columns) for source in sources}
    if arguments.json:
        whole = {source: to_json(evaluated) for source, evaluated in done.items()}
        print(json.dumps(whole if len(sources) > 1 else whole[sources[0]], indent=1, allow_nan=False))
    elif len(sources) > 1:
        _compare([Path(source) for source in sources if Path(source).is_dir()])
    failed = [
        f"{f'{source}: ' if len(sources) > 1 else ''}{one.label}: {task} failed: {reason}"
        for source, evaluated in done.items()
        for one in evaluated
        for task, reason in one.failures.items()
    ]
    for line in failed:
        print(f"uncollapse: {shown(line)}", file=sys.stderr)
    if failed:
        sys.exit(1)


def _one(
    arguments: argparse.Namespace, source: str, tasks: list[str] | None, columns: dict[str, str]
) -> list[Evaluated]:
    """Evaluates one encoder, its control too where that was asked for, and shows and keeps what was found."""
    import torch
    from rich.console import Console

    from uncollapse.checkpoints.exported import is_export
    from uncollapse.evaluate.record import add_scalars, merge
    from uncollapse.evaluate.run import evaluate, settings_for
    from uncollapse.evaluate.source import open_encoder
    from uncollapse.progress import bars, say

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device here; leave it out to use the CPU")
    device = torch.device("cuda" if torch.cuda.is_available() and arguments.device != "cpu" else "cpu")
    encoder = open_encoder(
        source,
        arguments.side,
        size=arguments.size,
        weights=arguments.weights,
        pretrained=arguments.pretrained,
        trust=arguments.trust,
        seed=arguments.seed,
    )
    folder = Path(source)
    of_run = encoder.config is not None and folder.is_dir() and not is_export(folder)
    out = arguments.out or (folder if of_run else Path("runs") / f"evaluate-{_slug(source)}")
    cache = None if arguments.no_cache else arguments.cache or (folder if of_run else Path("runs")) / "features"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    settings = settings_for(
        encoder,
        columns,
        data=arguments.data,
        tasks=tasks,
        seed=arguments.seed,
        limit=arguments.limit,
        long_tail=arguments.long_tail,
        sets=arguments.sets,
        masks=arguments.masks,
        cache=cache,
        out=out,
        batch=arguments.batch,
        device=device,
        options={} if arguments.max_steps is None else {"max_steps": arguments.max_steps},
        workers=min(16, cores) if arguments.workers is None else arguments.workers,
    )
    encoders = [encoder]
    if arguments.untrained:
        if encoder.untrained is None:
            raise ConfigError(f"--untrained: {source} is at a random start already; give --weights FILE")
        encoders.append(encoder.untrained())
    command = shlex.join(["uncollapse", *sys.argv[1:]])
    console = Console(stderr=True)
    with bars(console) as report:
        tell = functools.partial(say, console)
        tell(f"{shown(encoder.name)}: {encoder.described}, {encoder.side}, {encoder.size} pixels, on {device.type}")
        evaluated = evaluate(encoders, settings, tell, report, lambda one: merge(out, settings.key, one, command))
    if of_run and out == folder:
        add_scalars(out, settings.key, evaluated)
        _rewrite_report(out)
    if arguments.json:
        for note in _notes(evaluated):
            print(f"note: {note}", file=sys.stderr)
    else:
        print_results(evaluated, settings.key)
        print(f"results     {shown(out / 'evaluation.json')}")
    return evaluated


def _compare(folders: Sequence[Path]) -> None:
    """A table for each data set that finished runs were evaluated on, with a column for each mode."""
    from uncollapse.report.table import print_tails
    from uncollapse.run_folder.read import read_run

    runs = [run for folder in folders if (run := read_run(folder)).summary]
    if len(runs) > 1:
        print_tails(runs)


def _slug(source: str) -> str:
    name = source.removeprefix("timm:") if source.startswith("timm:") else Path(source).resolve().stem
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name)


def _rewrite_report(folder: Path) -> None:
    """The run's page again, now with the evaluation; a run that is not finished has no page yet."""
    if not (folder / "summary.json").is_file():
        return
    from uncollapse.report.page import write_report
    from uncollapse.run_folder.read import read_run

    record = read_run(folder)
    write_report([record], folder / "report.html")
    for problem in record.problems:
        print(f"note: {problem}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------- results


def to_json(evaluated: Sequence[Evaluated]) -> dict[str, Any]:
    """``{task: {metric: value, "ci95", "n", "protocol", "source"}}``; a control's under the task's ``untrained``."""
    from uncollapse.evaluate.record import finite

    out: dict[str, Any] = {result.task: finite(result.to_json()) for result in evaluated[0].results}
    for one in evaluated[1:]:
        for result in one.results:
            out.setdefault(result.task, {})["untrained"] = finite(result.to_json())
    return out


def print_results(evaluated: Sequence[Evaluated], key: str) -> None:
    """On stdout, task by task: headline with its interval, protocol, other metrics, and the control's below them."""
    from rich.console import Console

    from uncollapse.report.numbers import interval, metric_text

    console = Console()
    counts = (
        f": {evaluated[0].n_train:,} training and {evaluated[0].n_test:,} test images" if evaluated[0].n_train else ""
    )
    width = max(40, min(console.width, 120))
    print("\n".join(_wrapped(shown(key + counts), width, "")))
    for task in dict.fromkeys(r.task for one in evaluated for r in one.results):
        for one in evaluated:
            for result in (r for r in one.results if r.task == task):
                metrics = [
                    f"{shown(name)} {metric_text(name, value)}"
                    + (f" ({ends})" if (ends := _ends(result, i, interval)) else "")
                    for i, (name, value) in enumerate(result.metrics.items())
                ]
                first = one is evaluated[0]
                name = task if first else f"{task}, {one.encoder.side}"
                print(f"\n{name}: {metrics[0]}, n = {result.n:,}" if first else f"  {name}: {metrics[0]}")
                if first:
                    print("\n".join(_wrapped(result.protocol, width)))
                if metrics[1:]:
                    print("\n".join(_wrapped(" · ".join(m.replace(" ", _KEPT) for m in metrics[1:]), width)))
    print("\nIn brackets: 95 % intervals. docs/evaluate.md says what each name means.")
    for note in _notes(evaluated):
        print(f"note: {shown(note)}")  # a command or a path in it can be copied whole


_KEPT = "\N{NO-BREAK SPACE}"


def _wrapped(text: str, width: int, indent: str = "  ") -> list[str]:
    """Lines that end between words, and never inside one or at a kept space."""
    lines = textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent or "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_KEPT, " ") for line in lines]


def _ends(result: Any, place: int, text: Callable[[Any], str]) -> str:
    """The interval of a metric: the first has one of its own, others may."""
    return text(result.ci95 if place == 0 else result.ci95_of.get(list(result.metrics)[place]))


def _notes(evaluated: Sequence[Evaluated]) -> list[str]:
    return list(dict.fromkeys(shown(note) for one in evaluated for note in one.notes))
