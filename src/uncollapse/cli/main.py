"""The command line. Heavy imports happen inside the commands, so ``--help`` and bad input answer at once."""

from __future__ import annotations

import argparse
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
from uncollapse.cli.compare import add_parser as add_compare
from uncollapse.cli.completion import WITH_KEYS
from uncollapse.cli.completion import add_parser as add_completion
from uncollapse.cli.diagnose import run_diagnose
from uncollapse.cli.evaluate import add_parser as add_evaluate
from uncollapse.cli.export import add_parser as add_export
from uncollapse.cli.recipes import add_parsers as add_recipes
from uncollapse.cli.terminal import nobody_reads, print_json, tolerate_any_encoding
from uncollapse.cli.train import add_parsers as add_train
from uncollapse.cli.train import take_keys, unknown
from uncollapse.errors import ConfigError, PairingError, meant
from uncollapse.shown import shown

EXIT_CODES = {
    0: "done",
    1: "the work failed, or `--fail-under` does not let a checkpoint pass",
    2: "input that cannot be used: a word, a key, a file, images",
    3: "a method and a way to learn prototypes, or targets, that mean nothing together",
    130: "stopped by Ctrl-C, or a scheduler's SIGTERM; what was trained is saved",
}
"""What each exit status means; docs/cli.md has the same table."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with one of `EXIT_CODES`, and with one clear line on stderr where it is not 0."""
    tolerate_any_encoding()
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments, overrides = _parsed(words)
        arguments.run(arguments, overrides)
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and nobody_reads():
            return  # | head
        if os.environ.get("UNCOLLAPSE_TRACEBACK"):
            raise
        code = _exit_code(error)
        if code is None:
            raise
        print(f"uncollapse: error: {error}", file=sys.stderr)
        sys.exit(code)


def _exit_code(error: Exception) -> int | None:
    """2 for input that cannot be used, 3 for a pairing that means nothing, 1 for a run that failed.

    None: a bug, shown with its traceback.
    """
    if isinstance(error, ConfigError):
        return 3 if isinstance(error, PairingError) else 2
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
    """Errors in one line, like all others, that say what may have been meant."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            hint = meant(str(value), map(str, action.choices))
            raise argparse.ArgumentError(action, f"there is no {str(value)!r} ({hint})")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def _parsed(words: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Options of the command, and keys of the recipe."""
    parser, commands = _parser()
    if words and not words[0].startswith("-") and words[0] not in commands:
        raise ConfigError(f"no command {words[0]!r} ({meant(words[0], commands)})")
    left, overrides = take_keys(words)
    arguments, rest = parser.parse_known_args(left)
    if rest:
        options = re.findall(r"--[a-z][a-z-]*", commands[words[0]].format_usage())
        raise unknown(rest[0], options, keys=words[0] in WITH_KEYS)
    arguments.again = shlex.join(["uncollapse", *words])
    return arguments, overrides


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser, and that of each command."""
    parser = _Parser(prog="uncollapse", description="Train prototypes that do not collapse, and see whether they have.")
    parser.add_argument("--version", action="version", version=f"uncollapse {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add_train(commands)
    add_compare(commands)
    add_recipes(commands)

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
        "--fail-under",
        type=float,
        metavar="SHARE",
        help="exit 1 if a set has a smaller share of unique prototypes or, whatever the share, is damaged, untrained "
        "or unused, mostly unused, or collapsed (below half unique)",
    )
    diagnose.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    diagnose.set_defaults(run=run_diagnose)

    add_evaluate(commands)
    add_export(commands)

    report = commands.add_parser("report", help="write report.html again from finished run folders")
    report.add_argument("runs", nargs="+", type=Path, help="run folders")
    report.add_argument("--out", type=Path, default=Path("report.html"), help="page to write (default: %(default)s)")
    report.add_argument("--json", action="store_true", help="print a JSON list: what is in each run folder")
    report.set_defaults(run=_report)

    add_completion(commands)
    return parser, commands.choices


def _report(arguments: argparse.Namespace, overrides: dict[str, Any]) -> None:
    if overrides:
        raise ConfigError(f"report takes no {', '.join(overrides)}")
    from uncollapse.report.page import report_folders

    problems = report_folders(arguments.runs, arguments.out)
    if arguments.json:
        from uncollapse.run_folder.read import read_run

        records = [read_run(folder) for folder in arguments.runs]
        print_json([{"run": r.folder, "summary": r.summary, "evaluation": r.evaluation} for r in records if r.summary])
    else:
        print(f"report      {shown(arguments.out)}")
    for line in problems:
        print(f"uncollapse: error: {line}", file=sys.stderr)
    if problems:
        sys.exit(2)
