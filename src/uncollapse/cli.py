"""The command line. Heavy imports happen inside the commands, so ``--help`` and bad input answer at once."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from uncollapse import __version__
from uncollapse.errors import ConfigError
from uncollapse.evaluate_cli import add_parser as add_evaluate
from uncollapse.shown import shown
from uncollapse.terminal import tolerate_any_encoding
from uncollapse.train_cli import add_parsers as add_train
from uncollapse.train_cli import take_keys, unknown


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits 0, 1 (the run failed) or 2 (bad input), with one clear line on stderr."""
    tolerate_any_encoding()
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments, overrides = _parsed(words)
        arguments.run(arguments, overrides)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("UNCOLLAPSE_TRACEBACK"):
            raise
        code = _exit_code(error)
        if code is None:
            raise
        print(f"uncollapse: error: {error}", file=sys.stderr)
        sys.exit(code)


def _exit_code(error: Exception) -> int | None:
    """2 for input that cannot be used, 1 for a run that failed; None: a bug, shown with its traceback."""
    if isinstance(error, ConfigError):
        return 2
    names = {c.__name__ for c in type(error).__mro__}
    if names & {"DataError", "InputError"}:
        return 2
    if isinstance(error, OSError) or names & {"TrainingError", "CheckpointError"}:
        return 1
    if "nms" in str(error) and "torchvision" in str(error):
        print(
            "uncollapse: torch and torchvision come from different builds (a +cpu torch needs a +cpu "
            "torchvision); reinstall both from the same index",
            file=sys.stderr,
        )
    return None


def _show_warning(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
    """Ours as one line; other libraries' advice about their own internals is not the user's business."""
    if "uncollapse" in filename:
        with suppress(OSError, ValueError):  # a closed stderr must not end a run
            print(f"warning: {message}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """Errors in one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def _parsed(words: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Options of the command, and keys of the recipe."""
    parser, commands = _parser()
    if words and not words[0].startswith("-") and words[0] not in commands:
        close = difflib.get_close_matches(words[0], commands, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(commands)}"
        raise ConfigError(f"no command {words[0]!r} ({hint})")
    left, overrides = take_keys(words)
    arguments, rest = parser.parse_known_args(left)
    if rest:
        options = re.findall(r"--[a-z][a-z-]*", commands[words[0]].format_usage())
        raise unknown(rest[0], options, keys=words[0] in ("train", "demo", "recipe"))
    arguments.again = shlex.join(["uncollapse", *words])
    return arguments, overrides


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser, and that of each command."""
    parser = _Parser(prog="uncollapse", description="Train prototypes that do not collapse, and see whether they have.")
    parser.add_argument("--version", action="version", version=f"uncollapse {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add_train(commands)

    diagnose = commands.add_parser(
        "diagnose",
        help="any checkpoint: are its prototypes collapsed?",
        epilog="Exits 0, 1 where --fail-under fails, 2 where a file cannot be used. No file runs code unless --trust.",
    )
    diagnose.add_argument("paths", nargs="+", metavar="PATH", help="checkpoint files, run folders, or bare matrices")
    diagnose.add_argument("--data", help="images to run the encoder on: what --data of train takes")
    diagnose.add_argument("--images", type=int, default=2000, help="most images of each part of --data (%(default)s)")
    diagnose.add_argument("--eps", type=float, nargs="+", help="cosine distances, the headline first")
    diagnose.add_argument("--key", help="the tensor to take, such as teacher/head.last_layer.weight_v")
    diagnose.add_argument("--trust", action="store_true", help="load files that run code; only if you know their maker")
    extent = diagnose.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="count unique prototypes at the headline ε only")
    extent.add_argument("--complete", action="store_true", help="count everything however large K is")
    diagnose.add_argument("--json", action="store_true", help="print a JSON list, one object per prototype set")
    diagnose.add_argument("--html", type=Path, metavar="FILE", help="also write one self-contained page")
    diagnose.add_argument(
        "--fail-under", type=float, metavar="SHARE",
        help="exit 1 if a set has a smaller share of unique prototypes or, whatever the share, is damaged, untrained "
        "or unused, mostly unused, or collapsed (below half unique)",
    )  # fmt: skip
    diagnose.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    diagnose.set_defaults(run=_diagnose)

    add_evaluate(commands)

    report = commands.add_parser("report", help="write report.html again from finished run folders")
    report.add_argument("runs", nargs="+", type=Path, help="run folders")
    report.add_argument("--out", type=Path, default=Path("report.html"))
    report.set_defaults(run=_report)
    return parser, commands.choices


def _diagnose(arguments: argparse.Namespace, overrides: dict[str, Any]) -> None:
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
    from uncollapse.progress import share_bar
    from uncollapse.shown import shown

    cuda = torch.cuda.is_available()
    if arguments.device == "cuda" and not cuda:
        raise ConfigError("--device cuda: torch finds no CUDA device here; leave it out to use the CPU")
    device = "cuda" if cuda and arguments.device != "cpu" else "cpu"
    complete = True if arguments.complete else False if arguments.quick else None
    from rich.console import Console

    found, refused = [], []
    for path in in_order(arguments.paths):
        with share_bar(Console(stderr=True)) as bar:
            try:
                found += diagnose_file(
                    path, arguments.eps or EPSILONS, key=arguments.key, trust=arguments.trust, complete=complete,
                    device=device, data=arguments.data, limit=arguments.images,
                    progress=lambda what, share, path=path: bar(f"{shown(path)}: {what}", share),  # type: ignore[misc]
                )  # fmt: skip
            except Exception as error:  # the others' results are not lost to one file
                if len(arguments.paths) == 1 or os.environ.get("UNCOLLAPSE_TRACEBACK"):
                    raise
                known = isinstance(error, InputError | DataError)
                why = str(error) if known else f"{path}: not diagnosed ({type(error).__name__}: {error})"
                refused.append(shown(why))
    if arguments.html is not None and found:
        from uncollapse.diagnosis.page import write_page

        write_page(found, arguments.html)
    if arguments.json:
        import json

        print(json.dumps([d.to_json() for d in found], indent=1, allow_nan=False))
    else:
        from uncollapse.diagnosis.text import print_diagnoses

        print_diagnoses(found)
        if arguments.html is not None and found:
            print(f"report      {shown(arguments.html)}")
    for line in refused:
        print(f"uncollapse: error: {line}", file=sys.stderr)
    if refused:
        sys.exit(2)
    if under is not None and (failed := failures(found, under)):
        for line in failed:
            print(f"uncollapse: {line}", file=sys.stderr)
        sys.exit(1)


def _report(arguments: argparse.Namespace, overrides: dict[str, Any]) -> None:
    if overrides:
        raise ConfigError(f"report takes no {', '.join(overrides)}")
    from uncollapse.report.page import report_folders

    problems = report_folders(arguments.runs, arguments.out)
    print(f"report      {shown(arguments.out)}")
    for line in problems:
        print(f"uncollapse: error: {line}", file=sys.stderr)
    if problems:
        sys.exit(2)
