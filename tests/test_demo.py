"""The demo end to end through the command line, with few steps."""

import json

import pytest

from uncollapse.cli import main
from uncollapse.config import ARMS


@pytest.mark.slow
def test_demo_compares_all_arms_and_goes_on_where_it_stopped(tmp_path, capsys):
    out = tmp_path / "demo"
    main(["demo", "--out", str(out), "--max-steps", "4"])
    shown = capsys.readouterr().out
    arms = json.loads((out / "summary.json").read_text())["arms"]
    assert [a["name"] for a in arms] == list(ARMS)
    assert all(a["steps"] == 4 and a["prototypes"] == 1024 and a["n_held_out"] == 359 for a in arms)
    fixed = next(a for a in arms if a["name"] == "fixed")
    assert fixed["unique"]["0.025"] == 1024
    assert fixed["used"] < 512  # what the share of unique prototypes hides
    assert all(name in shown for name in ARMS)
    page = (out / "report.html").read_text()
    assert "https://" not in page
    assert "http://" not in page
    before = {p: p.stat().st_mtime_ns for p in out.glob("arms/*/checkpoints/*.pt")}
    main(["demo", "--out", str(out), "--max-steps", "4"])
    assert {p: p.stat().st_mtime_ns for p in out.glob("arms/*/checkpoints/*.pt")} == before
    assert json.loads((out / "summary.json").read_text())["arms"][0]["used"] == arms[0]["used"]


def test_demo_refuses_a_folder_with_something_else(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "something else" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "precious"
