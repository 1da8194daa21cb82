"""``uncollapse diagnose``."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from typing import TYPE_CHECKING, Any

from uncollapse.errors import ConfigError
from uncollapse.shown import shown

if TYPE_CHECKING:
    from uncollapse.progress import Report


def _told(report: Report, path: str, what: str, share: float) -> None:
    report(f"{path}: {what}", share, 1.0, None)


def run_diagnose(arguments: argparse.Namespace, overrides: dict[str, Any]) -> None:
    if overrides:
        raise ConfigError(f"diagnose takes no {', '.join('--' + name for name in overrides)}")
    under: float | None = arguments.fail_under
    if under is not None and not 0 <= under <= 1:
        raise ConfigError(f"--fail-under: a share between 0 and 1, got {under:g}")
    if arguments.html is not None and arguments.html.is_dir():
        raise ConfigError(f"--html: {arguments.html} is a folder; name a file in it")
    if arguments.images < 2:
        raise ConfigError(f"--images: must be at least 2, got {arguments.images}")
    import torch

    from uncollapse.diagnosis.run import diagnose_file, failures, in_order
    from uncollapse.errors import DataError, InputError
    from uncollapse.measure.unique import EPSILONS
    from uncollapse.progress import bars

    cuda = torch.cuda.is_available()
    if arguments.device == "cuda" and not cuda:
        raise ConfigError("--device cuda: torch finds no CUDA device here; leave it out to use the CPU")
    device = "cuda" if cuda and arguments.device != "cpu" else "cpu"
    complete = True if arguments.complete else False if arguments.quick else None
    from rich.console import Console

    diagnoses, refused = [], []
    for path in in_order(arguments.paths):
        with bars(Console(stderr=True), after=1.0) as report:
            try:
                diagnoses += diagnose_file(
                    path,
                    arguments.eps or EPSILONS,
                    key=arguments.key,
                    trust=arguments.trust,
                    complete=complete,
                    device=device,
                    data=arguments.data,
                    limit=arguments.images,
                    progress=functools.partial(_told, report, shown(path)),
                )
            except Exception as error:  # the others' results are not lost to one file
                if len(arguments.paths) == 1 or os.environ.get("UNCOLLAPSE_TRACEBACK"):
                    raise
                known = isinstance(error, InputError | DataError)
                why = str(error) if known else f"{path}: not diagnosed ({type(error).__name__}: {error})"
                refused.append(shown(why))
    if arguments.html is not None and diagnoses:
        from uncollapse.diagnosis.page import write_page

        write_page(diagnoses, arguments.html)
    if arguments.json:
        import json

        print(json.dumps([d.to_json() for d in diagnoses], indent=1, allow_nan=False))
    else:
        from uncollapse.diagnosis.text import print_diagnoses

        print_diagnoses(diagnoses)
        if arguments.html is not None and diagnoses:
            print(f"report      {shown(arguments.html)}")
    for line in refused:
        print(f"uncollapse: error: {line}", file=sys.stderr)
    if refused:
        sys.exit(2)
    if under is not None and (failed := failures(diagnoses, under)):
        for line in failed:
            print(f"uncollapse: {line}", file=sys.stderr)
        sys.exit(1)
