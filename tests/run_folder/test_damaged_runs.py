"""Run folders that are damaged, hostile or oddly named: the page is written, and what is left out is named."""

from __future__ import annotations

import base64
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from made_runs import make_run, make_summary
from uncollapse.cli.main import main
from uncollapse.errors import ConfigError
from uncollapse.figures import panels as figures
from uncollapse.report.page import report_folders, write_report
from uncollapse.run_folder.read import read_run

FILES = ("summary.json", "metrics.jsonl", "diagnosis.npz", "evaluation.json", "config.yaml")
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABh6FO1AAAAABJRU5ErkJggg=="
)


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("line_panel", "step_parts", "circle", "usage_spectrum"):
        monkeypatch.setattr(figures, name, lambda *_, **__: "data:image/png;base64,")


def evaluated(folder: Path, key: str = "set", **pictured: Any) -> Path:
    """Adds an ``evaluation.json`` as `merge` writes it, with one picture."""
    task = {
        "top1": 0.5,
        "ci95": [0.4, 0.6],
        "ci95_of": {"macro": [0.3, 0.5]},
        "macro": 0.4,
        "n": 360,
        "protocol": "how",
        "source": "whose",
        "command": "uncollapse evaluate",
        "details": {"k": 20},
    }
    classes = {"train_images": [5, 3], "prototypes": [2, 1], "distinct": [1, 1]}
    picture = {"file": "evaluation/a.png", "caption": "a caption", "alt": "what it shows"} | pictured
    encoder = {
        "name": "run",
        "described": "conv3",
        "weights": "w",
        "images": "i",
        "step": 1200,
        "size": 32,
        "notes": ["a note"],
        "pictures": {"attention": [picture]},
        "tasks": {"knn": task, "linear": task, "prototypes": {**task, "details": {"classes": classes}}},
    }
    data = {key: {"n_train": 1437, "n_test": 360, "classes": 2, "encoders": {"teacher": encoder}}}
    (folder / "evaluation").mkdir(exist_ok=True)
    (folder / "evaluation" / "a.png").write_bytes(PIXEL)
    (folder / "evaluation.json").write_text(json.dumps({"format": 1, "data": data}))
    return folder


# ----------------------------------------------------------------------------------- hostile evaluations


@pytest.mark.parametrize(
    "pictured",
    [
        {"file": "/etc/passwd"},
        {"file": "../secret.png"},
        {"file": "evaluation/../../secret.png"},
        {"file": "evaluation/link.png"},
        {"file": "evaluation/text.png"},
        {"file": "evaluation/a.png\0"},
        {"file": "evaluation"},
        {"file": "gone.png", "src": "https://example.org/track.png"},
    ],
)
def test_only_our_own_pictures_are_embedded(tmp_path: Path, pictured: dict[str, str]) -> None:
    (tmp_path / "secret.png").write_bytes(PIXEL + b"secret")
    folder = evaluated(make_run(tmp_path, "joint"), **pictured)
    (folder / "evaluation" / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "evaluation" / "text.png").write_text("root:x:0:0")
    run = read_run(folder)
    assert run.evaluation, "the numbers stay"
    write_report([run], tmp_path / "page.html", "x", [])
    page = (tmp_path / "page.html").read_text()
    assert "example.org" not in page
    assert "a caption" not in page
    for content in (PIXEL + b"secret", b"root:x:0:0", Path("/etc/passwd").read_bytes()):
        assert base64.b64encode(content).decode()[:60] not in page


def test_our_own_picture_is_embedded(tmp_path: Path) -> None:
    run = read_run(evaluated(make_run(tmp_path, "joint"), src="https://example.org/track.png"))
    write_report([run], tmp_path / "page.html", "x", [])
    page = (tmp_path / "page.html").read_text()
    assert f"data:image/png;base64,{base64.b64encode(PIXEL).decode()}" in page
    assert "example.org" not in page


def test_one_page_has_one_number_for_each_accuracy(tmp_path: Path) -> None:
    """After `evaluate` on a run's own data, the table shows what the section below it shows."""
    folder = make_run(tmp_path, "joint")
    evaluated(folder, key=str(tmp_path / "images"))
    write_report([read_run(folder)], tmp_path / "page.html", "x", [])
    page = (tmp_path / "page.html").read_text()
    assert "46.0" not in page
    assert "51.0" not in page, "the quick probes of training"
    assert page.count("40.0–60.0") >= 2
    assert "those of <code>uncollapse evaluate</code>" in page
    evaluated(folder, key="another set")
    write_report([read_run(folder)], tmp_path / "page.html", "x", [])
    page = (tmp_path / "page.html").read_text()
    assert "46.0" in page
    assert "quick probes" in page


# --------------------------------------------------------------------------------------- damaged pieces


def test_a_damaged_run_is_named_and_costs_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = make_run(tmp_path, "joint"), make_run(tmp_path, "decoupled")
    (bad / "summary.json").write_text('{"name": "decoup')
    out = tmp_path / "page.html"
    with pytest.raises(SystemExit) as exit_:
        main(["report", str(good), str(bad), "--out", str(out)])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "decoupled-0" in err
    assert "left out" in err
    assert "decoupled-0" in out.read_text(), "the page says it too"
    assert "joint" in out.read_text()
    with pytest.raises(ConfigError, match="left out"):
        report_folders([bad], out)


@pytest.mark.parametrize("name", ["diagnosis.npz", "metrics.jsonl", "evaluation.json", "config.yaml"])
def test_another_damaged_file_costs_only_itself(tmp_path: Path, name: str) -> None:
    folder = evaluated(make_run(tmp_path, "joint"))
    (folder / name).write_bytes(b'[{"step": "x"}]\n{"step": "y"}\n\xff')
    run = read_run(folder)
    assert run.summary["used"] == 64
    assert len(run.problems) == 1
    assert name in run.problems[0]
    write_report([run], tmp_path / "page.html", "x", [])
    assert name in (tmp_path / "page.html").read_text()


def test_entries_of_other_types_are_left_out_and_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "joint")
    wrong = {"used": "many", "unique": {"0.025": 10**400}, "alive": [1], "knn": {"a": 1}}
    (folder / "summary.json").write_text(json.dumps(make_summary("joint", **wrong)))
    run = read_run(folder)
    assert not {"used", "unique", "alive", "knn"} & set(run.summary)
    assert all(name in run.problems[0] for name in ("used", "unique", "alive", "knn"))
    assert run.summary["linear"] == 0.51


def test_arrays_that_claim_more_than_they_hold_are_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "joint")
    header = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(
        117
    )
    with zipfile.ZipFile(folder / "diagnosis.npz", "w") as archive:
        archive.writestr("movement.npy", header + b"\n" + bytes(80))
        archive.writestr("usage.npy", b"\x80\x04.")
    run = read_run(folder)
    assert run.arrays == {}
    assert "movement" in run.problems[0]
    assert "usage" in run.problems[0]


def test_a_pipe_in_the_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "joint")
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    assert read_run(folder).summary == {}


def test_names_are_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path, "joint", name="[/x]<b>\x1b[31m", data="$\\frac{</script>")
    main(["report", str(folder), "--out", str(tmp_path / "[va]page.html")])
    shown = capsys.readouterr().out
    assert "[va]page.html" in shown
    assert "\x1b" not in shown
    page = (tmp_path / "[va]page.html").read_text()
    assert "</script>" not in page
    assert "\x1b" not in page


def _mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """One of the ways in which files go wrong: cut, changed bytes, pieces moved, numbers and words replaced."""
    way = int(rng.integers(5))
    at = int(rng.integers(max(1, len(data))))
    if way == 0:
        return data[:at]
    if way == 1:
        changed = bytearray(data)
        for _ in range(int(rng.integers(1, 8))):
            changed[int(rng.integers(len(changed)))] = int(rng.integers(256))
        return bytes(changed)
    if way == 2:
        return data[at:] + data[:at]
    words = [b"null", b"-1", b"1e999", b"NaN", b'"x"', b"[]", b"{}", b"true", b"9" * 400, b"[" * 3000, b"\xff\xfe"]
    word = words[int(rng.integers(len(words)))]
    places = [i for i, c in enumerate(data) if c in b":,["] or [at]
    start = places[int(rng.integers(len(places)))] + 1
    end = start + (int(rng.integers(1, 12)) if way == 3 else 0)
    return data[:start] + word + data[end:]


def test_mutated_files_never_end_in_a_traceback(tmp_path: Path) -> None:
    """Some hundred damaged folders: each is read, with its problems named, and the page about it is written."""
    whole = evaluated(make_run(tmp_path, "joint"))
    other = read_run(make_run(tmp_path, "fixed"))
    rng = np.random.default_rng(0)
    original = {name: (whole / name).read_bytes() for name in FILES}
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder)
    named = 0
    for turn in range(100):
        name = FILES[turn % len(FILES)]
        (folder / name).write_bytes(_mutated(original[name], rng))
        run = read_run(folder)
        named += bool(run.problems)
        assert all("\n" not in problem for problem in run.problems)
        if turn % 5 == 0:
            write_report([run, other], tmp_path / "page.html", "x", [])
        (folder / name).write_bytes(original[name])
    assert named > 35
