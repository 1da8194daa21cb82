"""``uncollapse completion SHELL``: a script for bash, zsh or fish, made from the parser and the keys of recipes.

Static: pressing Tab starts no Python. Values of options that name something (recipes, modes, tasks) are in it too.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from uncollapse.config.facts import mode_names
from uncollapse.config.load import all_keys, recipe_names
from uncollapse.errors import ConfigError
from uncollapse.evaluate.names import TASK_NAMES

SHELLS = ("bash", "zsh", "fish")
WITH_KEYS = ("train", "demo", "recipe", "compare")
"""Commands after which any key of a recipe can be set."""
_FILES = frozenset(["data", "init", "weights", "paths", "source", "recipe", "name", "recipes", "sets"])
"""Arguments that are files or folders without being typed so."""
_NAMED: dict[str, Callable[[], Sequence[str]]] = {
    "train recipe": recipe_names,
    "recipe name": recipe_names,
    "compare recipes": recipe_names,
    "train prototypes": mode_names,
    "compare prototypes": mode_names,
    "compare trunk": mode_names,
    "evaluate tasks": lambda: (*TASK_NAMES, "all"),
}
"""Command and argument → the names that it takes."""


@dataclass(frozen=True)
class Argument:
    """One option of a command, or one of its places."""

    flag: str
    """With its dashes; empty for a place."""
    help: str
    most: int
    """Values that it takes: 0, 1, or 2 for several."""
    words: Sequence[str]
    files: bool


@dataclass(frozen=True)
class Command:
    """A command with its arguments."""

    name: str
    help: str
    arguments: Sequence[Argument]

    @property
    def options(self) -> list[Argument]:
        return [a for a in self.arguments if a.flag]

    @property
    def places(self) -> list[Argument]:
        return [a for a in self.arguments if not a.flag]


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "completion",
        help="print a script that completes commands, options, keys and names",
        epilog='bash: add `eval "$(uncollapse completion bash)"` to ~/.bashrc. zsh: the same with zsh, after compinit, '
        "in ~/.zshrc. fish: uncollapse completion fish > ~/.config/fish/completions/uncollapse.fish",
    )
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(run=lambda arguments, overrides: _print(commands, arguments.shell, overrides))


def _print(commands: Any, shell: str, overrides: Mapping[str, Any]) -> None:
    if overrides:
        raise ConfigError(f"completion takes no {', '.join('--' + name for name in overrides)}")
    helps = {action.dest: action.help or "" for action in commands._choices_actions}
    found = [_command(name, helps.get(name, ""), parser) for name, parser in commands.choices.items()]
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](found))


def _command(name: str, about: str, parser: argparse.ArgumentParser) -> Command:
    arguments = [argument for action in parser._actions for argument in _arguments(name, action)]
    if name in WITH_KEYS:
        arguments += [Argument(f"--{key}", "key of a recipe", 1, (), key.endswith("path")) for key in all_keys()]
    return Command(name, about, arguments)


def _arguments(command: str, action: argparse.Action) -> list[Argument]:
    flags = [flag for flag in action.option_strings if flag.startswith("--")] or [""]
    most = 0 if action.nargs == 0 else 2 if action.nargs in ("+", "*") else 1
    named = _NAMED.get(f"{command} {action.dest}")
    words = tuple(map(str, action.choices)) if action.choices is not None else tuple(named()) if named else ()
    files = most > 0 and (action.type is Path or action.dest in _FILES)
    about = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    return [Argument(flag, about, most, words, files) for flag in flags]


# ------------------------------------------------------------------------------------------------- shells


def _bash(commands: Sequence[Command]) -> str:
    def reply(words: Sequence[str], files: bool) -> str:
        named = f'COMPREPLY=($(compgen -W "{" ".join(words)}" -- "$cur"))'
        return named + ('; COMPREPLY+=($(compgen -f -- "$cur")); compopt -o filenames' if files else "")

    options = [
        f'    {c.name}) COMPREPLY=($(compgen -W "{" ".join(o.flag for o in c.options)}" -- "$cur"));;' for c in commands
    ]
    return "\n".join(
        [
            "_uncollapse() {",
            '  local cur="${COMP_WORDS[COMP_CWORD]}" command="${COMP_WORDS[1]}" option="" i',
            "  COMPREPLY=()",
            f"  if ((COMP_CWORD == 1)); then {reply([c.name for c in commands], False)}; return; fi",
            "  for ((i = COMP_CWORD - 1; i > 1; i--)); do",
            '    if [[ "${COMP_WORDS[i]}" == --* ]]; then option="${COMP_WORDS[i]}"; break; fi',
            "  done",
            '  if [[ "$cur" == -* ]]; then case "$command" in',
            *options,
            "  esac; return; fi",
            '  case "$command $option $((COMP_CWORD - i))" in',
            *[f"    {pattern}) {reply(a.words, a.files)}; return;;" for pattern, a in _values(commands)],
            "  esac",
            '  case "$command" in',
            *[f"    {c.name}) {reply(a.words, a.files)};;" for c in commands for a in c.places[:1]],
            "  esac",
            "}",
            "complete -F _uncollapse uncollapse",
        ]
    )


def _zsh(commands: Sequence[Command]) -> str:
    def described(entries: Sequence[tuple[str, str]]) -> str:
        return " ".join(shlex.quote(f"{name}:{about}") for name, about in entries)

    def add(a: Argument) -> str:
        named = f"compadd -- {' '.join(a.words)}" if a.words else ""
        return "; ".join(part for part in (named, "_files" if a.files else "") if part) or ":"

    options = [
        f"    {c.name}) entries=({described([(o.flag, o.help) for o in c.options])});;" for c in commands if c.options
    ]
    return "\n".join(
        [
            "#compdef uncollapse",
            "_uncollapse() {",
            '  local command="$words[2]" option="" i',
            "  local -a entries",
            "  if ((CURRENT == 2)); then",
            f"    entries=({described([(c.name, c.help) for c in commands])})",
            "    _describe command entries; return",
            "  fi",
            "  for ((i = CURRENT - 1; i > 2; i--)); do",
            '    if [[ "$words[i]" == --* ]]; then option="$words[i]"; break; fi',
            "  done",
            '  if [[ "$words[CURRENT]" == -* ]]; then case "$command" in',
            *options,
            "  esac; _describe -o option entries; return; fi",
            '  case "$command $option $((CURRENT - i))" in',
            *[f"    {pattern}) {add(a)}; return;;" for pattern, a in _values(commands)],
            "  esac",
            '  case "$command" in',
            *[f"    {c.name}) {add(a)};;" for c in commands for a in c.places[:1]],
            "  esac",
            "}",
            'if [[ "$funcstack[1]" == _uncollapse ]]; then _uncollapse "$@"; else compdef _uncollapse uncollapse; fi',
        ]
    )


def _values(commands: Sequence[Command]) -> list[tuple[str, Argument]]:
    """Pattern of ``COMMAND --option HOW-FAR`` → the option whose value stands there."""
    return [(f'"{c.name} {o.flag} "' + ("*" if o.most > 1 else "1"), o) for c in commands for o in c.options if o.most]


def _fish(commands: Sequence[Command]) -> str:
    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    def line(when: str, a: Argument) -> str:
        parts = ["complete -c uncollapse -n", quoted(when)]
        parts += ["-l", a.flag[2:], "-d", quoted(a.help)] if a.flag else []
        parts += ["-r"] if a.flag and a.most else []
        parts += ["-F"] if a.files else []
        parts += ["-a", quoted(" ".join(a.words))] if a.words else []
        return " ".join(parts)

    lines = ["complete -c uncollapse -f"]
    for c in commands:
        lines.append(f"complete -c uncollapse -n __fish_use_subcommand -a {c.name} -d {quoted(c.help)}")
        here = f"__fish_seen_subcommand_from {c.name}"
        lines += [line(here, a) for a in (*c.options, *c.places[:1]) if a.flag or a.words or a.files]
        for several in (a for a in c.options if a.most > 1 and a.words):  # fish itself knows of one value
            after = f"{here}; and __fish_contains_opt {several.flag[2:]}"
            lines.append(line(after, replace(several, flag="", files=False)))
    return "\n".join(lines)
