"""What can be wrong with what a user gave, free of torch: each message says what, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from uncollapse.shown import shown


def meant(name: str, names: Iterable[str], otherwise: str = "") -> str:
    """``did you mean X?`` for a name that is none of ``names``; where none is close, ``otherwise``, or all of them."""
    known = list(names)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else otherwise or f"there are {', '.join(known)}"


class ConfigError(ValueError):
    """A recipe or an override that cannot be used; the message is one line and names the key."""


class PairingError(ConfigError):
    """A method and a way to learn prototypes or to make targets that mean nothing together; says why."""


class DataError(ValueError):
    """Images that cannot be used; the message is one line that says what was found and what was expected."""

    def __init__(self, message: object) -> None:
        super().__init__(shown(str(message)))  # it quotes names from files


class InputError(ValueError):
    """A file that cannot be diagnosed; the message is one line: what, where, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(shown(message))  # names and keys in it are the file's, and may be anything


class CheckpointError(RuntimeError):
    """No usable checkpoint; the message says where it looked and what it found."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, why, and what was kept."""
