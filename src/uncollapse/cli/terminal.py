"""Output that no terminal, file or pipe can make fail: what its encoding lacks is spelled in ASCII."""

from __future__ import annotations

import codecs
import sys

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


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_SPELLED.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lost), error.end
