"""What MkDocs does not do by itself: README, linked files of the repository and the API reference as pages of the site.

A link in a page is written as it works in the repository (`../src/uncollapse/losses/koleo.py#koleo_proto`). Here it
leads to a page with that file, at the line where the symbol is defined.
"""

import os
import re
import sys
from collections import defaultdict
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "website")]

import links  # noqa: E402
import uncollapse  # noqa: E402

ROOMS = {
    "prototypes": "Prototypes",
    "losses": "Losses",
    "targets": "Targets",
    "measure": "Measures",
    "monitoring": "Metrics and the Lightning callback",
    "diagnosis": "Diagnosis",
    "export": "Export",
}


def page_of(path: str) -> str:
    """Where a file or folder of the repository is on the site."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"repository/{path}/index.md"
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def text_of(path: str) -> str:
    """A page with the file, or with what is in the folder."""
    place = ROOT / path
    if place.is_dir():
        names = sorted(p.name for p in place.iterdir() if p.is_file())
        return f"# {path}\n\n" + "".join(f"- [{name}]({name})\n" for name in names)
    text = place.read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    kind = {".py": "python", ".yaml": "yaml", ".sh": "sh"}.get(place.suffix, "text")
    return f'---\nsearch: {{exclude: true}}\n---\n# {path}\n\n~~~~{{.{kind} linenums="1"}}\n{text}\n~~~~\n'


def api() -> str:
    rooms = defaultdict(list)
    for name, home in uncollapse._HOMES.items():
        rooms[home.split(".")[0]].append((name, home))
    text = "# API\n\nEvery name is imported from `uncollapse` and loads on first use.\n"
    for room in sorted(rooms, key=list(ROOMS).index):
        text += f"\n## {ROOMS[room]}\n"
        text += "".join(f"\n::: uncollapse.{home}.{name}\n" for name, home in sorted(rooms[room]))
    return text


def on_files(files, config):
    todo = ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
    texts: dict[str, str] = {}
    for path in todo:  # grows: what a linked page links to is wanted too
        if path in texts or not (ROOT / path).exists() or (path.startswith("docs/") and not path.endswith(".md")):
            continue
        texts[path] = text_of(path)
        if path.endswith(".md") or (ROOT / path).is_dir():
            here = path if path.endswith(".md") else f"{path}/index.md"
            todo += [target for target, _ in links.local(texts[path], here)]
    for path, text in texts.items():
        if not path.startswith("docs/"):
            files.append(File.generated(config, page_of(path), content=text))
    files.append(File.generated(config, "api.md", content=api()))
    return files


def on_page_markdown(markdown, page, config, files):
    uri = page.file.src_uri
    if uri == "index.md":
        here = "README.md"
    elif uri.startswith("repository/"):
        here = uri.removeprefix("repository/")
    else:
        here = f"docs/{uri}"
    if here.endswith((".py.md", ".yaml.md")):
        return markdown

    def rewritten(target: str) -> str:
        path, symbol = links.resolved(target, here)
        if not (ROOT / path).exists():
            return target  # MkDocs says so
        if path.endswith(".py") and symbol:
            symbol = f"__codelineno-0-{links.line_of(ROOT / path, symbol)}"
        there = os.path.relpath(page_of(path), os.path.dirname(uri) or ".")
        return there + (f"#{symbol}" if symbol else "")

    return links.replaced(markdown, rewritten)


def on_page_content(html, page, config, files):
    return re.sub(r":(?:func|class|meth|mod|data):(?=<code>)", "", html)  # Sphinx's roles in docstrings


def on_post_page(output, page, config):
    outside = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?:https?:)?//[^"]*"', output)
    if outside:
        raise SystemExit(f"{page.file.src_uri} loads something from elsewhere: {outside[0]}")
    return output
