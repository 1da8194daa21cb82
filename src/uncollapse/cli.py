"""The command line. Heavy imports happen inside the commands, so ``--help`` and bad input answer at once."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uncollapse.config import (
    ARMS,
    Config,
    ConfigError,
    arm_keys,
    arm_name,
    load_config,
    parse_value,
    recipe_names,
    tiny,
)
from uncollapse.evaluate_cli import add_parser as add_evaluate


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits 0, 1 (the run failed) or 2 (bad input), with one clear line on stderr."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        overrides = _overrides(rest)
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
        print(f"warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uncollapse", description="Train prototypes that do not collapse, and see whether they have."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="ways to learn prototypes, compared on real images in minutes")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder (default: %(default)s)")
    demo.add_argument("--seeds", type=int, default=1, help="runs per arm; more than 1 gives mean ± spread")
    demo.add_argument("--max-steps", type=int, help="stop every arm after so many steps")
    demo.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all six")
    demo.add_argument("--jobs", type=int, help="arms trained at once (default: one per core)")
    demo.set_defaults(run=_demo)

    train = commands.add_parser(
        "train",
        help="pre-train on your images",
        epilog=f"Recipes that ship: {', '.join(recipe_names())}. Any key of a recipe can be set after it, e.g. "
        "--optim.lr 1e-3 --views.local_count 4; `uncollapse recipe NAME` prints every key.",
    )
    train.add_argument("recipe", nargs="?", help="a recipe's name or a YAML file")
    train.add_argument("--data", help="image folder, Parquet file or folder of them, or builtin:digits")
    train.add_argument("--prototypes", choices=ARMS, help="how prototypes are learned")
    train.add_argument("--out", type=Path, help="run folder (default: runs/RECIPE-PROTOTYPES-seedN)")
    train.add_argument("--max-steps", type=int, help="stop after this many steps in all")
    train.add_argument("--tiny", action="store_true", help="shrink the recipe to run in seconds")
    train.add_argument("--resume", type=Path, metavar="DIR", help="continue the run in DIR; needs nothing else")
    train.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    train.set_defaults(run=_train)

    recipe = commands.add_parser("recipe", help="print a recipe with every key it leaves at its default")
    recipe.add_argument("name", help=f"one of {', '.join(recipe_names())}, or a YAML file")
    recipe.set_defaults(run=_recipe)

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
    return parser


def _overrides(rest: Sequence[str]) -> dict[str, Any]:
    """``--optim.lr 1e-3`` and ``--optim.lr=1e-3`` as dotted keys with YAML values."""
    values: dict[str, Any] = {}
    words = list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"unexpected argument {word!r}; keys of the recipe are set as --key.name VALUE")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not words:
                raise ConfigError(f"--{key} needs a value")
            text = words.pop(0)
        values[key] = parse_value(text)
    return values


def _train(arguments: argparse.Namespace, overrides: dict[str, Any]) -> None:
    if arguments.max_steps is not None and arguments.max_steps < 1:
        raise ConfigError(f"--max-steps: must be at least 1, got {arguments.max_steps}")
    if arguments.resume is not None:
        config, out = _resumed(arguments, overrides)
    else:
        config, out = _new_run(arguments, overrides)
    from uncollapse.progress import training_bar
    from uncollapse.report import write_report
    from uncollapse.runs import read_run
    from uncollapse.table import print_table
    from uncollapse.train import train

    main_rank = os.environ.get("RANK", "0") == "0"
    with training_bar(show=main_rank) as (say, progress):
        summary = train(config, out, arguments.max_steps, arguments.resume is not None, progress, say, arguments.device)
    if main_rank:
        print_table([summary])
        for note in summary.get("notes", []):
            print(f"note        {note}")
        write_report([read_run(out)], out / "report.html", f"{arm_name(config.prototypes)} on {summary['data']}", [])
        print(f"diagnosis took {100 * summary['diagnosis_share']:.2f} % of the run's time")
        print(f"report      {out / 'report.html'}")


def _new_run(arguments: argparse.Namespace, overrides: dict[str, Any]) -> tuple[Config, Path]:
    if arguments.recipe is None:
        raise ConfigError(f"name a recipe ({', '.join(recipe_names())}, or a YAML file), or --resume DIR")
    if arguments.data is not None:
        builtin = arguments.data.startswith("builtin:")
        overrides["data.path"] = arguments.data if builtin else str(Path(arguments.data).resolve())
    if arguments.prototypes is not None:
        overrides.update(arm_keys(arguments.prototypes))
    config = load_config(arguments.recipe, overrides)
    if arguments.tiny:
        config = tiny(config)
    if not config.data.path:
        raise ConfigError("--data PATH: say where the images are (a folder, Parquet, or builtin:digits)")
    stem = Path(arguments.recipe).stem
    return config, arguments.out or Path("runs") / f"{stem}-{arm_name(config.prototypes)}-seed{config.seed}"


def _resumed(arguments: argparse.Namespace, overrides: dict[str, Any]) -> tuple[Config, Path]:
    path: Path = arguments.resume / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"--resume {arguments.resume}: no config.yaml there, so it is not a run folder")
    given = [n for n in ("recipe", "data", "prototypes", "out") if getattr(arguments, n) is not None]
    if given or overrides or arguments.tiny:
        changed = [*given, *overrides, *(["tiny"] if arguments.tiny else [])]
        raise ConfigError(f"--resume continues a run as it was; it takes --max-steps, not {', '.join(changed)}")
    return load_config(path), arguments.resume


def _recipe(arguments: argparse.Namespace, overrides: dict[str, Any]) -> None:
    from uncollapse.config import dump_config

    print(dump_config(load_config(arguments.name, overrides)), end="")


def _demo(arguments: argparse.Namespace, overrides: dict[str, Any]) -> None:
    for name in ("seeds", "max_steps", "jobs"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: must be at least 1, got {value}")
    load_config("demo", overrides)
    from uncollapse.demo import run_demo

    run_demo(arguments.out, arguments.seeds, arguments.arms, arguments.max_steps, arguments.jobs, overrides)


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

    from uncollapse.diagnosis import diagnose_file, failures, in_order
    from uncollapse.images import DataError
    from uncollapse.reading import InputError
    from uncollapse.unique import EPSILONS

    cuda = torch.cuda.is_available()
    if arguments.device == "cuda" and not cuda:
        raise ConfigError("--device cuda: torch finds no CUDA device here; leave it out to use the CPU")
    device = "cuda" if cuda and arguments.device != "cpu" else "cpu"
    complete = True if arguments.complete else False if arguments.quick else None
    from rich.console import Console

    found, refused = [], []
    for path in in_order(arguments.paths):
        with Console(stderr=True).status(f"{path}: reading and counting"):
            try:
                found += diagnose_file(
                    path, arguments.eps or EPSILONS, key=arguments.key, trust=arguments.trust, complete=complete,
                    device=device, data=arguments.data, limit=arguments.images,
                )  # fmt: skip
            except (InputError, DataError) as error:
                if len(arguments.paths) == 1:
                    raise
                refused.append(str(error))  # the others' results are not lost to one file
    if arguments.html is not None:
        from uncollapse.diagnosis_page import write_page

        write_page(found, arguments.html)
    if arguments.json:
        import json

        print(json.dumps([d.to_json() for d in found], indent=1, allow_nan=False))
    else:
        from uncollapse.diagnosis_table import print_diagnoses

        print_diagnoses(found)
        if arguments.html is not None:
            print(f"report      {arguments.html}")
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
    missing = [str(r) for r in arguments.runs if not (r / "summary.json").is_file()]
    if missing:
        raise ConfigError(f"no summary.json in {', '.join(missing)}: not a finished run folder")
    from uncollapse.report import write_report
    from uncollapse.runs import read_run

    write_report([read_run(r) for r in arguments.runs], arguments.out, "Comparison", [])
    print(f"report      {arguments.out}")
