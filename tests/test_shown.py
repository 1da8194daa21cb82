"""Names of files as text that is safe to print."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text

from uncollapse.shown import markup, shown


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plain name.pt", "plain name.pt"),
        ("smörgås 猫/👩‍🔬.pt", "smörgås 猫/👩‍🔬.pt"),
        (Path("a/b.pt"), "a/b.pt"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\x1b[31mred\x9b0m\x7f", r"\x1b[31mred\x9b0m\x7f"),
        ("gp\u202efdp.exe", r"gp\u202efdp.exe"),
        ("line\u2028end", r"line\u2028end"),
        (os.fsdecode(b"caf\xe9.png"), r"caf\xe9.png"),
        ("\ud800", r"\ud800"),
        ("[va]/a.pt", "[va]/a.pt"),
    ],
)
def test_shown(name, text):
    assert shown(name) == text


@given(st.text(st.characters(codec=None, exclude_categories=()), max_size=20))
def test_shown_is_one_line_of_utf8_without_controls(name):
    text = shown(name)
    text.encode("utf-8")
    assert len(text.splitlines()) <= 1
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text)


@pytest.mark.parametrize("name", ["m[/x]/a.pt", "[va]/a.pt", "[bold]a", r"a\[/x]", "a\x1b[0m[/]", "[link=file:///x]a"])
def test_markup_shows_what_is_there(name):
    assert Text.from_markup(f"[bold]{markup(name)}[/bold]!").plain == f"{shown(name)}!"


@given(st.text("[]/\\abc#@= ", max_size=12))
def test_markup_never_breaks_the_markup_around_it(name):
    assert Text.from_markup(f"{markup(name)}[bold]!").plain.endswith("!")
    assert len(Text.from_markup(f"{markup(name)}[bold]![/bold]").spans) == 1
