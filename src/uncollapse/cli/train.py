"""The commands ``train`` and ``demo``, and the keys of a recipe that can be typed after them."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uncollapse.cli.terminal import print_json
from uncollapse.config.facts import arm_keys, method_name, mode_name
from uncollapse.config.load import all_keys, load_config, recipe_names
from uncollapse.config.plain_yaml import parse_value
from uncollapse.config.schema import DEMO_ARMS, KINDS, RIVALS, Config
from uncollapse.errors import ConfigError

_METHOD_KEYS = {"method.name", "method.center", "method.prior", "prototypes.vmf"}
"""What `method_name` reads."""


def add_parsers(commands: Any) -> None:
    demo = commands.add_parser("demo", help="ways to learn prototypes, compared on real images in minutes")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder (default: %(default)s)")
    demo.add_argument("--seeds", type=int, default=1, help="runs per arm; more than 1 gives mean ± spread")
    demo.add_argument("--max-steps", type=int, help="stop every arm after so many steps")
    demo.add_argument("--arms", nargs="+", choices=DEMO_ARMS, default=list(DEMO_ARMS), help="default: all six")
    demo.add_argument("--jobs", type=int, help="arms trained at once (default: one per core)")
    demo.add_argument("--json", action="store_true", help="print one JSON object, and nothing else on stdout")
    demo.set_defaults(run=_demo)

    train = commands.add_parser(
        "train",
        help="pre-train on your images",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # else names are broken at their hyphens
        epilog="Recipes that ship:\n  "
        + "\n  ".join(recipe_names())
        + "\n\nAny key of a recipe can be set, e.g. --optim.lr 1e-3 --views.local_count 4;\n"
        "`uncollapse recipe NAME` prints every key.",
    )
    train.add_argument("recipe", nargs="?", help="a recipe's name or a YAML file")
    train.add_argument("--data", help="image folder, Parquet file or folder of them, or builtin:digits")
    train.add_argument(
        "--prototypes",
        metavar="MODE",
        help=f"how prototypes are learned: {', '.join((*KINDS, *RIVALS))}; or with other targets, as joint-sinkhorn",
    )
    train.add_argument("--init", metavar="FILE", help="start the encoder from these weights, or those of a run folder")
    train.add_argument("--out", type=Path, help="run folder (default: runs/RECIPE-PROTOTYPES-seedN)")
    train.add_argument("--max-steps", type=int, help="stop after this many steps in all")
    train.add_argument("--tiny", action="store_true", help="shrink the recipe to run in seconds")
    train.add_argument("--resume", type=Path, metavar="DIR", help="continue the run in DIR; needs nothing else")
    train.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    train.add_argument("--json", action="store_true", help="print the summary as JSON, and nothing else on stdout")
    train.set_defaults(run=_train)


# --- keys of the recipe on the command line -----------------------------------------------------------------


def take_keys(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The words that are left, and ``--optim.lr 1e-3`` or ``--optim.lr=1e-3`` as dotted keys with YAML values.

    Before argparse sees them: it would take the value for a recipe's name.
    """
    plain = {f.name for f in dataclasses.fields(Config) if not isinstance(f.default_factory, type)}
    values: dict[str, Any] = {}
    left, waiting = [], list(words)
    while waiting:
        word = waiting.pop(0)
        key, equals, text = word[2:].partition("=")
        if not word.startswith("--") or not ("." in key or key in plain):
            left.append(word)
            continue
        if not equals:
            if not waiting or waiting[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value")
            text = waiting.pop(0)
        values[key] = parse_value(text)
    return left, values


def unknown(word: str, options: Sequence[str], keys: bool) -> ConfigError:
    """The error for a word that is no option, with what may have been meant; ``keys``: those of recipes too."""
    if not word.startswith("-"):
        return ConfigError(f"unexpected argument {word!r}" + ("; keys are set as --key.name VALUE" if keys else ""))
    name = word.lstrip("-").partition("=")[0]
    last = {key.rpartition(".")[2]: f"--{key}" for key in all_keys()} if keys else {}
    last.update({option.lstrip("-"): option for option in options})
    close = [name] if name in last else difflib.get_close_matches(name, last, n=1, cutoff=0.6)
    return ConfigError(f"no option --{name}" + (f" (did you mean {last[close[0]]}?)" if close else ""))


# --- train --------------------------------------------------------------------------------------------------


def _train(arguments: argparse.Namespace, overrides: dict[str, Any]) -> None:
    at_least_one(arguments, "max_steps")
    if arguments.resume is not None:
        config, out = _resumed(arguments, overrides)
    else:
        config, out = _new_run(arguments, overrides)
    from uncollapse.progress import silence_stdout, training_bar
    from uncollapse.report.page import write_report
    from uncollapse.report.table import print_table
    from uncollapse.run_folder.read import read_run
    from uncollapse.training.run import train

    main_rank = os.environ.get("RANK", "0") == "0"
    with training_bar(main_rank, arguments.json) as (say, progress):
        summary = train(config, out, arguments.max_steps, arguments.resume is not None, progress, say, arguments.device)
    if not main_rank:
        return
    write_report([read_run(out)], out / "report.html")
    if arguments.json:
        print_json({**summary, "run": str(out), "report": str(out / "report.html")})
        return
    try:
        print_table([summary])
        for note in summary.get("notes", []):
            print(f"note        {note}")
        print(f"diagnosis took {100 * summary['diagnosis_share']:.2f} % of the run's time")
        print(f"report      {out / 'report.html'}", flush=True)
    except OSError:  # nobody reads any more; the run is whole
        silence_stdout()


def _new_run(arguments: argparse.Namespace, overrides: dict[str, Any]) -> tuple[Config, Path]:
    if arguments.recipe is None:
        raise ConfigError(f"name a recipe ({', '.join(recipe_names())}, or a YAML file), or --resume DIR")
    overrides.update(data_key(arguments.data))
    if arguments.init is not None:
        overrides["backbone.init"] = str(Path(arguments.init).resolve())
    if arguments.prototypes is not None:
        overrides.update(arm_keys(arguments.prototypes))
    if arguments.tiny:
        from uncollapse.config.tiny import load_tiny

        config = load_tiny(arguments.recipe, overrides)
    else:
        config = load_config(arguments.recipe, overrides)
    must_exist(config, fresh=True)
    stem = Path(arguments.recipe).stem
    if _METHOD_KEYS & overrides.keys():  # no longer the recipe's own
        stem += f"-{method_name(config)}"
    return config, arguments.out or Path("runs") / f"{stem}-{mode_name(config)}-seed{config.seed}"


def at_least_one(arguments: argparse.Namespace, *names: str) -> None:
    """Raises :class:`ConfigError` for an option that counts something and was given less."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: must be at least 1, got {value}")


def data_key(data: str | None) -> dict[str, Any]:
    """The key that ``--data`` sets; nothing where it was not given."""
    if data is None:
        return {}
    return {"data.path": data if data.startswith("builtin:") else str(Path(data).resolve())}


def must_exist(config: Config, fresh: bool) -> None:
    """Raises :class:`ConfigError` for images or weights that are not there.

    Said at once, before the seconds that the imports take.
    """
    if fresh and not config.data.path:
        raise ConfigError("--data PATH: say where the images are (a folder, Parquet, or builtin:digits)")
    for key in ("path", "val_path"):
        path = getattr(config.data, key)
        if path and not path.startswith("builtin:") and not Path(path).exists():
            raise ConfigError(f"data.{key}: {path}: no such file or folder")
    if fresh and config.backbone.init and not Path(config.backbone.init).exists():
        raise ConfigError(f"backbone.init: {config.backbone.init}: no such file or folder")


def _resumed(arguments: argparse.Namespace, overrides: dict[str, Any]) -> tuple[Config, Path]:
    path: Path = arguments.resume / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"--resume {arguments.resume}: no config.yaml there, so it is not a run folder")
    named = [n for n in ("recipe", "data", "prototypes", "init", "out") if getattr(arguments, n) is not None]
    if named or overrides or arguments.tiny:
        changed = [*named, *overrides, *(["tiny"] if arguments.tiny else [])]
        raise ConfigError(f"--resume continues a run as it was; it takes --max-steps, not {', '.join(changed)}")
    config = load_config(path)
    must_exist(config, fresh=False)
    return config, arguments.resume


# --- demo ----------------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace, overrides: dict[str, Any]) -> None:
    at_least_one(arguments, "seeds", "max_steps", "jobs")
    load_config("demo", overrides)
    from uncollapse.cli.demo import run_demo

    run_demo(
        arguments.out,
        arguments.seeds,
        arguments.arms,
        arguments.max_steps,
        arguments.jobs,
        overrides,
        arguments.again,
        arguments.json,
    )
