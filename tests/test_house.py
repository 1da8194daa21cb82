"""The rooms of the code: which may import which, written down here once and held against the real imports."""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import torch

import uncollapse

ROOT = Path(uncollapse.__file__).parent

LEAVES = {"errors", "shown", "checks", "numerics", "distributed", "schedules", "progress"}
"""Files at the root that any room may import; of each other, ``errors`` imports ``shown``."""

MAY_IMPORT = {
    "config": set(),
    "targets": set(),
    "neighbours": set(),
    "measure": {"neighbours"},
    "data": {"config"},
    "figures": {"measure"},
    "losses": {"neighbours", "targets"},
    "run_folder": {"config", "measure"},
    "models": {"config", "data"},
    "prototypes": {"config", "losses", "targets"},
    "methods": {"config", "losses", "models", "prototypes", "targets"},
    "checkpoints": {"config", "models", "prototypes"},
    "report": {"config", "figures", "measure", "run_folder"},
    "monitoring": {"checkpoints", "measure"},
    "diagnosis": {"checkpoints", "config", "data", "figures", "measure", "models", "neighbours", "run_folder"},
    "evaluate": {"checkpoints", "config", "data", "figures", "measure", "models", "prototypes", "run_folder"},
    "training": {
        "checkpoints",
        "config",
        "data",
        "measure",
        "methods",
        "models",
        "prototypes",
        "run_folder",
        "targets",
    },
    "export": {"checkpoints", "config", "data", "measure", "models", "prototypes", "run_folder"},
    "cli": {"checkpoints", "config", "diagnosis", "evaluate", "export", "measure", "report", "run_folder", "training"},
    "__main__": {"cli"},
}


def modules() -> dict[str, Path]:
    return {
        ".".join(p.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): p
        for p in ROOT.rglob("*.py")
    }


def imports() -> dict[str, set[str]]:
    """module → modules of ours it imports anywhere: at the top, inside a function, or for types alone."""
    known = modules()
    found: dict[str, set[str]] = defaultdict(set)
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[name] |= {a.name for a in node.names if a.name in known}
            elif isinstance(node, ast.ImportFrom) and (node.module or "") in known:
                inner = {f"{node.module}.{a.name}" for a in node.names}
                found[name] |= inner & known.keys() or {str(node.module)}
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_imports_between_rooms_run_only_where_the_table_allows():
    wrong = [
        f"{module} imports {target}"
        for module, targets in imports().items()
        if module != "uncollapse"
        for target in targets
        if room(target) not in {room(module), *LEAVES, *MAY_IMPORT.get(room(module), set())}
        and not (room(module) in ("cli", "export") and not room(target))  # its version
    ]
    assert not wrong


def test_the_table_has_every_room_and_nothing_that_is_not_needed():
    real = defaultdict(set)
    for module, targets in imports().items():
        real[room(module)] |= {room(t) for t in targets} - LEAVES - {room(module), ""}
    assert {m: t for m, t in real.items() if m and m not in LEAVES and (t or m in MAY_IMPORT)} == {
        m: t for m, t in MAY_IMPORT.items() if m in real
    }
    assert set(MAY_IMPORT) | LEAVES == {
        p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    } - {"__init__"}


def test_no_two_modules_import_each_other_even_through_others():
    graph = imports()
    graph.pop("uncollapse", None)  # it names everything's home, for type checkers

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for target in graph.get(todo.pop(), set()) - seen:
                seen.add(target)
                todo.append(target)
        return seen

    assert not [module for module in graph if module in reached(module)]


def test_what_is_public_reaches_neither_the_trainer_nor_a_recipe():
    """`diagnose` and `load_export` aside, which read what a run left: a loop of one's own needs no configuration."""
    graph = imports()
    homes = {
        f"uncollapse.{home}"
        for home in uncollapse._HOMES.values()
        if room(f"uncollapse.{home}") not in ("diagnosis", "export")
    }
    reached, todo = set(homes), list(homes)
    while todo:
        todo += (more := graph.get(todo.pop(), set()) - reached - {"uncollapse"})
        reached |= more
    assert {room(module) for module in reached} - LEAVES == {
        *("checkpoints", "losses", "measure", "monitoring", "neighbours", "prototypes", "targets")
    }


def test_errors_and_recipes_are_read_without_torch():
    code = "import sys, uncollapse.errors, uncollapse.config.load; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_diagnosing_a_file_loads_no_method_no_loop_and_no_optimiser(tmp_path):
    torch.save({"weight": torch.randn(64, 16)}, tmp_path / "w.pt")
    code = (
        "import sys, uncollapse\n"
        f"uncollapse.diagnose({str(tmp_path / 'w.pt')!r})\n"
        "print(*[m for m in sys.modules if m.startswith(('uncollapse.training', 'uncollapse.methods', 'lightning'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
