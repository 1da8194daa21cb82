"""Pages lead where they say, also to the line of a symbol, and say of keys what the code says."""

import re
import sys
from pathlib import Path

import pytest

from uncollapse.config.load import all_keys

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "website"))
import keys  # noqa: E402
import links  # noqa: E402

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
]


def anchors(text):
    """Those that both the forges and MkDocs make of headings."""
    headings = re.findall(r"^#+ (.*)$", links.CODE.sub(lambda m: m.group() if m.group()[1] != "`" else "", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_headings_and_symbols(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for path, fragment in links.local(text, page):
        assert (ROOT / path).exists(), path
        if path.endswith(".py") and fragment:
            links.line_of(ROOT / path, fragment)
        elif fragment:
            assert fragment in anchors((ROOT / path).read_text(encoding="utf-8")), (path, fragment)
    for fragment in re.findall(r"\]\(#([^)]+)\)", links.CODE.sub("", text)):
        assert fragment in anchors(text), fragment


def test_a_symbol_that_does_not_exist_is_not_found(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("A: int = 1\n\n\nclass B:\n    def c(self):\n        pass\n")
    assert [links.line_of(file, symbol) for symbol in ("A", "B", "B.c")] == [1, 4, 5]
    with pytest.raises(KeyError, match=r"a.py defines no B\.d"):
        links.line_of(file, "B.d")


def test_links_are_found_outside_code_alone():
    text = "[a](b.md) `[c](d.md)` [`e`](f.py#g) [h](https://i)\n```sh\n[j](k.md)\n```\n![l](m.png)\n"
    assert links.local(text, "docs/page.md") == [("docs/b.md", ""), ("docs/f.py", "g"), ("docs/m.png", "")]


@pytest.mark.parametrize("page", [p.name for p in sorted((ROOT / "docs").glob("*.md"))])
def test_every_page_is_in_the_sites_navigation(page):
    nav = (ROOT / "website/mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    assert re.search(rf"^ *- .*: {re.escape(page)}$", nav, re.M), page


def test_the_page_of_keys_is_what_the_code_says():
    assert (ROOT / "docs/keys.md").read_text(encoding="utf-8") == keys.page(), "run python website/keys.py"


def test_the_page_of_keys_has_every_key_once():
    rows = re.findall(r"^\| `([a-z][\w.]*)` \|", keys.page(), re.M)
    assert set(all_keys()) - {"method.name"} <= set(rows)
    of_all_methods = [row for row in rows if not row.startswith("method.")]
    assert len(of_all_methods) == len(set(of_all_methods))
