"""Commands and Python of README and docs: tutorials run as printed, all other commands are ones that the parser takes.

What a reader has to put in (IMAGES, PATH, RUN1 …) and what takes hours is parsed alone.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch

import uncollapse
from uncollapse.cli.main import _parsed, main
from uncollapse.config.facts import arm_keys
from uncollapse.config.load import load_config, recipe_names

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
RUN_WHOLE = ["docs/tour.md", "docs/collapsed.md"]
"""Tutorials. Trainings are cut to a few steps."""
RECORD = """
exec 3>&1
record() { printf '%s\\037' "$@" >&3; printf '\\036' >&3; }
for name in uncollapse python pip make bash torchrun git cd; do eval "$name() { record $name \\"\\$@\\"; }"; done
set -e
"""


def blocks(page):
    """(language, text) of each block of code."""
    return re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)


def commands(block, folder):
    """The words of each command, loops and variables as the shell has them; nothing is run."""
    script = RECORD + re.sub(r"> \S+", "> /dev/null", block.replace(".venv/bin/", ""))
    done = subprocess.run(["/bin/bash", "-c", script], cwd=folder, env={"PATH": ""}, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return [c.split("\x1f")[:-1] for c in done.stdout.split("\x1e")[:-1]]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_that_the_parser_takes(page, tmp_path):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for language, block in blocks(page):
        if language != "sh":
            assert not re.search(r"^(uncollapse|\.venv/bin/uncollapse) ", block, re.M), "mark the block as sh"
            continue
        for program, *words in commands(block, tmp_path):
            if program == "git" and words[0] == "checkout":
                break  # what follows is for the code of that commit
            if program == "torchrun":
                program, words = "uncollapse", words[words.index("uncollapse") + 1 :]
            if program == "make":
                assert words[0] in targets
            elif program == "python" and words[0].endswith(".py"):
                assert (ROOT / words[0]).exists(), words[0]
            elif program == "uncollapse":
                arguments, keys = _parsed([word for word in words if word != "OPTIONS"])
                modes = getattr(arguments, "prototypes", None) or []
                for mode in [modes] if isinstance(modes, str) else modes:
                    keys |= {} if mode == "MODE" else arm_keys(mode)
                recipe = getattr(arguments, "recipe", None) or "demo"
                if recipe in recipe_names():
                    load_config(recipe, keys)


def is_for_the_reader(words, folder):
    """Something stands for what a reader has: a name in capitals, or files that are not here."""
    return any(re.fullmatch(r"[A-Z]+[0-9]?(,[A-Z]+)?", w) or ("*" in w and not list(folder.glob(w))) for w in words)


def exit_status(words):
    try:
        main(words)
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.mark.parametrize("page", RUN_WHOLE)
def test_tutorials_run_as_printed(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for language, block in blocks(page):
        if language == "python":
            exec(compile(block, page, "exec"), {})
        elif language == "sh":
            for _, *words in commands(block, tmp_path):
                if is_for_the_reader(words, tmp_path):
                    continue
                short = ["--tiny", "--max-steps", "4"] if words[0] == "train" else []
                assert exit_status([*words, *short]) == int("--fail-under" in words), words
    said = capsys.readouterr().out
    if page == "docs/collapsed.md":
        assert "partial collapse: 100 of 4,096 unique at ε = 0.025 (2.4 %)" in said
    else:
        assert re.search(r"\d+ of 64 prototypes are unique", said)
        assert (tmp_path / "diagnosis.html").exists()


@pytest.mark.parametrize("page", PAGES)
def test_other_python_is_python_and_imports_what_there_is(page):
    for language, block in blocks(page):
        if language == "python":
            compile(block, page, "exec")
            for names in re.findall(r"^from uncollapse import (.+)$", block, re.M):
                for name in names.split(", "):
                    getattr(uncollapse, name)


def test_the_python_of_diagnose_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"prototypes": torch.randn(64, 16)}, "checkpoint.pth")
    for language, block in blocks("docs/diagnose.md"):
        if language == "python":
            exec(compile(block, "docs/diagnose.md", "exec"), {})
