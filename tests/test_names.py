"""Names of files and keys are data: none is markup, no terminal obeys one, and no byte of one is an error."""

import json
import os

import pytest
import torch

from layouts import T
from uncollapse.cli.main import main

ODD = ["m[/x]", "[va]", "[bold]b[/bold]", "\x1b[31mred", "two\nlines", os.fsdecode(b"\xff"), "‮txt", "a\\"]


@pytest.fixture(params=ODD)
def odd(request, tmp_path):
    """Two checkpoints in a folder of that name, with a key of that name too."""
    name = request.param
    (tmp_path / name).mkdir(parents=True)
    for i in (0, 1):
        torch.save({f"[/k]\x1b{i}": {"head.last_layer.weight": T.w}}, tmp_path / name / f"{i}.pt")
    (tmp_path / name / "bad.pt").write_bytes(b"x")
    return tmp_path / name


def printed(capsys) -> str:
    shown = capsys.readouterr()
    both = shown.out + shown.err
    assert "\x1b[31m" not in both
    assert "\u202e" not in both
    both.encode()
    return both


def test_diagnose_prints_any_name(odd, capsys):
    from uncollapse.shown import shown

    paths = [str(odd / name) for name in ("0.pt", "1.pt", "bad.pt")]
    with pytest.raises(SystemExit) as stop:
        main(["diagnose", *paths, "--quick", "--fail-under", "0.9"])
    assert stop.value.code == 2
    text = printed(capsys)
    assert shown(paths[0]) in text.replace("\n", "")
    assert text.count("uncollapse: error: ") == 1
    assert shown(paths[2]) + ": not a checkpoint" in text


def test_a_page_holds_any_name(tmp_path):
    name = os.fsdecode(b"<b>\x1b[31m\xff.pt")
    torch.save({"head.last_layer.weight": T.w}, tmp_path / name)
    main(["diagnose", str(tmp_path / name), "--quick", "--json", "--html", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "\x1b" not in page
    assert r"&lt;b&gt;\x1b[31m\xff.pt" in page


def test_json_keeps_the_path_as_it_is(odd, capsys):
    main(["diagnose", str(odd / "0.pt"), "--quick", "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert found["source"]["file"] == str(odd / "0.pt")
    assert found["source"]["key"] == "[/k]\\x1b0/head.last_layer.weight"


def test_failures_name_the_file_on_one_line(odd, capsys):
    with pytest.raises(SystemExit):
        main(["diagnose", str(odd / "0.pt"), "--quick", "--fail-under", "0.9"])
    assert "0.pt" in printed(capsys).splitlines()[-1]


@pytest.mark.parametrize("name", ODD)
def test_evaluate_prints_any_name(name, capsys):
    from uncollapse.cli.evaluate import print_results
    from uncollapse.evaluate.encoder import EvalEncoder
    from uncollapse.evaluate.result import Result
    from uncollapse.evaluate.run import Evaluated
    from uncollapse.models.backbones import Conv3

    found = Evaluated(EvalEncoder(Conv3(4), 16, name=name), notes=[f"{name} said so"])
    found.results.append(Result("knn", {"top1": 0.5}, (0.4, 0.6), 10, "kNN", "DINO"))
    print_results([found], f"{name},{name}")
    text = printed(capsys)
    assert "50.0" in text
    assert "said so" in text
