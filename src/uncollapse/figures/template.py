"""The templates that pages are made from."""

from __future__ import annotations

import functools

import jinja2


@functools.cache
def template(name: str) -> jinja2.Template:
    """A file of ``uncollapse/templates``; whatever it shows is escaped, and a name it does not get is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("uncollapse"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["tight"] = _tight
    return environment.get_template(name)


def _tight(text: str) -> str:
    """Keep a sign and its number on one line."""
    for sign in ("ε ", "ε = ", " ± ", " %", "K = ", " × ", " ms", " bits"):
        text = text.replace(sign, sign.replace(" ", "\N{NO-BREAK SPACE}"))
    return text
