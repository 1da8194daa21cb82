"""Output that no terminal, file or pipe can make fail: what its encoding lacks is spelled in ASCII; and JSON."""

from __future__ import annotations

import codecs
import json
import math
import select
import sys
from typing import Any

_SPELLED = {
    "ε": "eps",
    "λ": "lambda",
    "β": "beta",
    "τ": "tau",
    "±": "+-",
    "×": "x",
    "–": "-",
    "—": "-",
    "−": "-",
    "·": "-",
    "…": "...",
    "→": "->",
    "≈": "~",
    "≤": "<=",
    "≥": ">=",
    "∞": "inf",
    "’": "'",
    "“": '"',
    "”": '"',
    "½": "1/2",
    "─": "-",
    "━": "-",
    "╸": "-",
    "╺": "-",
    "│": "|",
    "é": "e",
    "è": "e",
    "ö": "oe",
    "ü": "ue",
    "ä": "ae",
    "\N{NO-BREAK SPACE}": " ",
}
_NAME = "uncollapse.spelled"


def tolerate_any_encoding() -> None:
    """From here on stdout and stderr spell what their encoding lacks (``PYTHONIOENCODING=ascii``), and never fail."""
    codecs.register_error(_NAME, _spell)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # what a test or a notebook puts there may have none
        if reconfigure is not None:
            reconfigure(errors=_NAME)


def nobody_reads() -> bool:
    """Whether the reader of stdout has left (``| head``); what is still printed goes nowhere then."""
    try:
        poll = select.poll()  # not on Windows
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        left = any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):
        return False
    if left:
        from uncollapse.progress import silence_stdout

        silence_stdout()
    return left


def print_json(value: Any) -> None:
    """One JSON value on stdout, as any reader of JSON takes it: NaN and infinity are null there."""
    print(json.dumps(_finite(value), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_SPELLED.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lost), error.end
