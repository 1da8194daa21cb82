"""Links of Markdown pages: found outside code, resolved within the repository."""

import ast
import posixpath
import re
from collections.abc import Callable
from pathlib import Path

CODE = re.compile(r"^(`{3,}|~{3,})[^\n]*\n.*?^\1[ \t]*$|`[^`\n]+`", re.S | re.M)
LINK = re.compile(r"(?<=\]\()[^)\s]+(?=\))")


def replaced(text: str, new: Callable[[str], str]) -> str:
    """The page with `new(target)` for the target of every link to a file of the repository."""

    def link(match: re.Match[str]) -> str:
        target = match.group()
        return target if re.match(r"[a-z]+:|#|/", target) else new(target)

    parts, end = [], 0
    for code in CODE.finditer(text):
        parts += [LINK.sub(link, text[end : code.start()]), code.group()]
        end = code.end()
    # A link whose text is code, [`a`](b), has its target in the part after the code, which starts with "](".
    return "".join(parts) + LINK.sub(link, text[end:])


def resolved(target: str, page: str) -> tuple[str, str]:
    """Path in the repository, and what follows `#`, of a link as `page` (a path too) has it."""
    path, _, fragment = target.partition("#")
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), path)), fragment


def local(text: str, page: str) -> list[tuple[str, str]]:
    """(path, fragment) of every link of a page to a file of the repository."""
    targets: list[str] = []
    replaced(text, lambda target: targets.append(target) or target)
    return [resolved(target, page) for target in targets]


def line_of(path: Path, symbol: str) -> int:
    """Line at which a function, class, method (`Class.method`) or constant is defined; KeyError if it is not."""
    body: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
    line = 0
    for name in symbol.split("."):
        for node in body:
            names = [getattr(node, "name", None)]
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            if name in names:
                line, body = node.lineno, getattr(node, "body", [])
                break
        else:
            raise KeyError(f"{path.name} defines no {symbol}")
    return line
