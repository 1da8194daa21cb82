"""Names from files and folders as text that is safe to print: they may hold anything a file system or file allows."""

from __future__ import annotations

import os
import unicodedata

_JOINERS = "\u200c\u200d"  # parts of ordinary Persian and Hindi words, and of emoji


def shown(name: str | os.PathLike[str]) -> str:
    """``name`` on one line, with nothing in it that a terminal would obey.

    Control characters, line breaks, marks that turn the direction of writing and bytes that are not UTF-8 come out
    as escapes (``\\n``, ``\\x1b``, ``\\xff``, ``\\u202e``). Always encodes as UTF-8.
    """
    text = os.fspath(name)
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(c: str) -> str:
    if c.isprintable() or c in _JOINERS or unicodedata.category(c) == "Zs":
        return c
    if "\udc80" <= c <= "\udcff":  # how Python keeps a byte of a name that is not UTF-8
        return f"\\x{ord(c) - 0xDC00:02x}"
    return c.encode("unicode_escape").decode("ascii")


def markup(name: str | os.PathLike[str]) -> str:
    """`shown`, and escaped for rich, which would take ``[bold]`` in a name for markup and fail on ``[/x]``."""
    from rich.markup import escape

    text = escape(shown(name))
    # An odd number of backslashes at the end would escape the bracket of markup that follows.
    return text + "\\" * ((len(text) - len(text.rstrip("\\"))) % 2)


def in_words(error: BaseException) -> str:
    """What an error says, on one line; its type, where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
