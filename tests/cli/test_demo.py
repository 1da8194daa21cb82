"""The demo end to end through the command line, with few steps."""

import json

import pytest

from uncollapse.cli.main import main
from uncollapse.config.schema import DEMO_ARMS as ARMS


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


def test_a_stopped_demo_names_the_whole_command(tmp_path, capsys, monkeypatch):
    from concurrent.futures import Future

    import uncollapse.cli.grid as grid

    class Pool:
        """Begins nothing."""

        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, *_):
            return Future()

        def shutdown(self, cancel_futures):
            assert "again to stop now" in capsys.readouterr().out  # said before the wait

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(grid, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(grid, "follow", interrupt)
    words = ["demo", "--seeds", "2", "--arms", "fixed", "--optim.lr", "1e-3", "--out", str(tmp_path / "my demo")]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 130
    said = "".join(capsys.readouterr().out.split("\n"))
    assert f"uncollapse demo --seeds 2 --arms fixed --optim.lr 1e-3 --out '{tmp_path / 'my demo'}'" in said
