"""What the commands print on terminals and in encodings that lack something."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from uncollapse.cli import evaluate as evaluate_cli
from uncollapse.evaluate.result import Result
from uncollapse.progress import bars
from uncollapse.report.words import meaning
from uncollapse.training.alarms import LossWatch


def test_an_ascii_terminal_gets_ascii_instead_of_a_traceback() -> None:
    code = "from uncollapse.cli.terminal import tolerate_any_encoding as t; t(); print('ε ± 3 – \\u4e2d', flush=True)"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert done.stdout.decode("ascii").strip() == r"eps +- 3 - \u4e2d"


def test_a_dumb_terminal_gets_lines_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out = io.StringIO()
    with bars(Console(file=out, force_terminal=True), ["training"]) as report:
        report("training", 5, 5, 1.5)
    assert "training: 5/5, loss 1.500" in out.getvalue()


def test_evaluations_fit_eighty_columns_and_cut_no_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    metrics = {f"{kind}_{name}": 0.5 for kind in ("prototypes", "kmeans") for name in ("ami", "nmi", "ari", "purity")}
    result = Result("cluster", metrics, (0.4, 0.6), 360, "argmax of the raw cosine; k-means with restarts", "whose")
    encoder = SimpleNamespace(side="teacher")
    found = SimpleNamespace(
        encoder=encoder, n_train=1437, n_test=360, results=[result], notes=["a note"], label="teacher"
    )
    control = SimpleNamespace(**{**vars(found), "encoder": SimpleNamespace(side="untrained"), "notes": []})
    evaluate_cli.print_results([found, control], "builtin:digits")  # type: ignore[list-item]
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) < 20
    for name in metrics:
        assert text.count(f"{name} 50.0 %") == 2, "of the encoder and of its control, whole"
    assert "prototypes_ami 50.0 % (40.0–60.0), n = 360" in text


def test_every_name_in_the_documentation_is_explained() -> None:
    """docs/evaluate.md has a table of what metrics mean; it says what the page says."""
    page = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", page, re.MULTILINE)
    explained = {name: text for name, text in rows if meaning(name)}
    assert {"distinct_top1", "n_owned", "prototypes_ami", "macro", "map", "miou"} <= set(explained)
    for name, text in explained.items():
        assert text == meaning(name), name
    assert meaning("nonsense") == ""


@pytest.mark.parametrize("mode", ["joint", "koleo", "decoupled", "decoupled-paper", ""])
def test_the_warning_of_dead_prototypes_fits_the_mode(mode: str) -> None:
    watch = LossWatch(100, {}, mode=mode)
    assert watch.alive(60, 20) is None
    text = watch.alive(40, 20)
    assert text is not None
    assert "only 40 of 100" in text
    assert "20 steps before" in text
    assert ("--prototypes decoupled" in text) == (mode not in ("decoupled", ""))
    assert watch.alive(30, 20) is None, "once"


def test_the_control_is_not_warned_of_what_it_is_for() -> None:
    assert LossWatch(100, {}, mode="fixed").alive(5, 20) is None
