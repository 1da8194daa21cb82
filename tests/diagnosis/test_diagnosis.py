"""From a checkpoint to verdict, JSON, page and exit code, and the encoder rebuilt for --data."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import uncollapse
from layouts import EPS, LAYOUTS, S, T, planted
from uncollapse.cli.main import main
from uncollapse.diagnosis.run import diagnose, diagnose_file, failures, in_order
from uncollapse.diagnosis.text import names_of, shortened
from uncollapse.errors import InputError
from uncollapse.measure.random_start import random_likeness
from uncollapse.measure.unique import SWEEP
from uncollapse.measure.verdict import judge


def dino_like() -> torch.Tensor:
    """Distinct rows that training has moved: an anisotropic cloud off the origin."""
    rng = torch.Generator().manual_seed(5)
    return torch.randn(200, 24, generator=rng) * torch.linspace(0.2, 2, 24) + 0.6


# ---------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize("rows", [64, 1000])
@pytest.mark.parametrize("dim", [8, 64])
@pytest.mark.parametrize("start", ["normal", "uniform"])
def test_a_random_start_is_never_healthy(rows, dim, start):
    rng = torch.Generator().manual_seed(rows + dim)
    w = torch.randn(rows, dim, generator=rng) if start == "normal" else torch.rand(rows, dim, generator=rng) * 2 - 1
    d = diagnose(w)
    assert d.random.alike
    assert d.verdict.label == "untrained or unused"
    assert "random" in d.verdict.rule
    assert failures([d], 0.5)


def test_a_few_trained_rows_among_dead_ones_do_not_hide_them():
    """A mixture whose components died keeps them at their random start: 99 % unique, ten in use."""
    w = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))
    w[:10] = w[:1] + 0.3 * w[:10]
    assert diagnose(w).verdict.label == "untrained or unused"


def test_training_is_told_from_a_random_start():
    assert random_likeness(dino_like(), EPS).alike is False
    spread = torch.nn.functional.normalize(torch.randn(400, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    for _ in range(200):  # rows pushed away from their nearest one: the KoLeo way to be unlike chance
        nearest = (spread @ spread.T).fill_diagonal_(-2).argmax(1)
        spread = torch.nn.functional.normalize(spread + 0.02 * (spread - spread[nearest]), dim=1)
    assert random_likeness(spread, EPS).alike is False


@pytest.mark.parametrize(
    ("unique", "extra", "label"),
    [
        ({0.025: 1}, {}, "total collapse"),
        ({0.025: 49}, {}, "partial collapse"),
        ({0.025: 50}, {}, "some duplicates"),
        ({0.025: 89}, {}, "some duplicates"),
        ({0.025: 90, 0.25: 40}, {}, "bunched"),
        ({0.025: 90, 0.25: 60}, {}, "distinct, use unknown"),
        ({0.025: 100}, {"used": 5, "effective": 3.0, "n": 500}, "mostly unused"),
        ({0.025: 90}, {"wide": 40}, "bunched"),
        ({0.025: 100}, {"used": 60, "effective": 50.0, "n": 500}, "distinct and used"),
        ({0.025: 100}, {"used": 60, "effective": 50.0, "n": 500, "wide": 40}, "bunched"),
        ({0.025: 100}, {"used": 17, "effective": 12.0, "n": 30}, "distinct and used"),  # over a tenth of K, whatever n
        ({0.025: 100}, {"used": 9, "effective": 8.0, "n": 30}, "distinct, use unknown"),
        ({0.025: 100}, {"used": 9, "effective": 8.0, "n": 100}, "mostly unused"),
    ],
)
def test_verdicts_follow_their_stated_rules(unique, extra, label):
    verdict = judge(100, 0, 8, unique, None, **extra)
    assert verdict.label == label
    assert verdict.rule
    assert verdict.sentence.endswith(".")
    assert verdict.advice.endswith(".")


def test_few_images_are_said_to_be_too_few():
    """17 of 1,024 used on 30 images says little about the other thousand."""
    verdict = judge(1024, 0, 64, {0.025: 1000}, None, 17, 14.0, 30)
    assert verdict.label == "distinct, use unknown"
    assert "30 images are too few to tell" in verdict.sentence
    assert "at least 1,024 held-out images" in verdict.advice


def test_copies_of_random_vectors_are_a_collapse_wherever_they_stand():
    """2,048 evenly spread rows of these are all different: the full count has to say otherwise."""
    w = torch.randn(2048, 64, generator=torch.Generator().manual_seed(0)).repeat_interleave(4, 0)
    d = diagnose(w, EPS, complete=False)
    assert d.unique == {EPS: 2048}
    assert d.random.alike
    assert d.verdict.label == "partial collapse"
    few_dimensions = diagnose(torch.randn(8192, 4, generator=torch.Generator().manual_seed(0)), EPS, complete=False)
    assert few_dimensions.share < 0.5
    assert few_dimensions.share == pytest.approx(few_dimensions.random.unique, abs=0.05)
    assert few_dimensions.verdict.label == "untrained or unused"


@pytest.mark.parametrize("shape", [(100, 256), (256, 256), (1000, 256)])
def test_orthogonal_starts_are_starts(shape):
    d = diagnose(torch.nn.init.orthogonal_(torch.empty(shape)))
    assert d.verdict.label == "untrained or unused"
    assert "orthogonal" in d.verdict.rule


def test_too_few_rows_to_tell_are_said_to_be():
    d = diagnose(torch.randn(10, 256, generator=torch.Generator().manual_seed(0)))
    assert d.random.alike is None
    assert "too few rows or dimensions to tell them from a random start" in d.verdict.rule


def test_an_infinite_length_is_damage(tmp_path, capsys):
    g = torch.ones(100, 1)
    g[7] = float("inf")
    v = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    torch.save({"head.last_layer.weight_v": v, "head.last_layer.weight_g": g}, tmp_path / "a.pth")
    main(["diagnose", str(tmp_path / "a.pth"), "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert found["verdict"]["label"] == "damaged"
    assert found["non_finite_rows"] == 1
    huge = diagnose(v.double() * 1e200)
    assert huge.verdict.label == "untrained or unused"
    json.dumps(huge.to_json(), allow_nan=False)


def test_arrays_of_any_kind_count_as_tensors():
    w = T.w.numpy()
    for array in (w, w[::-1], w.astype(">f4"), np.asfortranarray(w)):
        assert (
            uncollapse.unique_prototypes(array, EPS)
            == diagnose(array, np.float32(EPS), complete=False).unique[float(np.float32(EPS))]
        )
    assert uncollapse.epsilon_sweep(w) == uncollapse.epsilon_sweep(T.w)


def test_vectors_alone_are_never_called_healthy():
    d = diagnose(dino_like())
    assert d.share == 1
    assert d.verdict.label == "distinct, use unknown"
    assert "--data" in d.verdict.advice


def test_rows_without_a_direction():
    w = planted().w.clone()
    expected = diagnose(w[3:], EPS)
    w[0], w[1, 2], w[2, 0] = 0, float("nan"), float("inf")
    d = diagnose(w, EPS)
    assert (d.zero_rows, d.non_finite_rows, d.prototypes) == (1, 2, len(w))
    assert d.unique == expected.unique
    assert d.rows.tolist() == list(range(3, len(w)))
    assert d.verdict.label == "damaged"
    json.dumps(d.to_json(), allow_nan=False)
    nothing = diagnose(torch.full((4, 3), float("nan")))
    assert nothing.unique == dict.fromkeys(nothing.unique, 0)
    json.dumps(nothing.to_json(), allow_nan=False)


@pytest.mark.parametrize(("w", "count"), [(torch.ones(1, 5), 1), (torch.tensor([[1.0], [-2.0], [3.0]]), 2)])
def test_one_prototype_and_one_dimension(w, count):
    d = diagnose(w)
    assert set(d.unique.values()) == {count}
    assert d.verdict.label == "nothing to compare"


def test_groups_and_complete():
    p = planted(copies=30)
    d = diagnose(p.w, EPS)
    assert d.groups.sum() == len(p.w)
    assert len(d.groups) == p.unique
    assert (np.diff(d.groups) <= 0).all()
    assert list(d.sweep.unique) == list(SWEEP)
    single = diagnose(p.w, (EPS, 0.5), complete=False)
    assert single.unique == {EPS: p.unique}
    assert (single.sweep, single.components) == (None, {})
    assert "--complete" in single.notes[-1]


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(2, 3, dtype=torch.int64), torch.ones(0, 3)])
def test_what_is_no_matrix(bad):
    with pytest.raises(InputError, match=r"prototypes × dimensions|prototypes are floating"):
        diagnose(bad)
    with pytest.raises(InputError, match="ε"):
        diagnose(torch.eye(3), 0.0)


def test_the_public_name_stays_a_function():
    """A module of the same name would take its place as soon as it is imported."""
    assert callable(uncollapse.diagnose)
    assert isinstance(uncollapse.diagnose(torch.eye(4)), uncollapse.Diagnosis)
    assert dataclasses.is_dataclass(uncollapse.Diagnosis)


# ------------------------------------------------------------------------------------------- command line


@pytest.fixture
def epochs(tmp_path):
    """Two checkpoints of one run: healthy-looking at first, collapsed later."""
    paths = []
    for i, w in enumerate((dino_like(), T.w)):
        paths.append(tmp_path / f"epoch{i}.pth")
        torch.save({"teacher": {"head.last_layer.weight": w}}, paths[-1])
    return [str(p) for p in paths]


def test_json_lists_one_object_per_set(epochs, capsys):
    main(["diagnose", *epochs, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [f["source"]["file"] for f in found] == epochs
    last = found[1]
    assert last["source"]["key"] == "teacher/head.last_layer.weight"
    assert last["source"]["side"] == "teacher"
    assert (last["prototypes"], last["dim"]) == tuple(T.w.shape)
    assert last["unique"]["0.025"] == T.unique
    assert last["components"]["0.025"] == T.components
    assert set(last["unique"]) == set(last["components"]) == {"0.025", "0.1", "0.25", "0.5"}
    assert last["verdict"]["label"] == "partial collapse"
    assert last["verdict"]["rule"]
    assert len(last["sweep"]["unique"]) == len(SWEEP)
    assert "used" not in last


def test_text_says_where_and_what_and_compares(epochs, capsys):
    main(["diagnose", *epochs])
    out = capsys.readouterr().out
    assert "partial collapse" in out
    assert "less than 50 % unique" in out.replace("\n", " ")
    assert "teacher/head.last_layer.weight" in out.replace("\n", "")
    assert "epoch1.pth" in out.rsplit("verdict", 1)[1]  # a row of the comparison at the end


@pytest.mark.parametrize(("which", "share", "code"), [(0, "0.9", 0), (1, "0.9", 1), (1, "0.05", 1), (0, "0", 0)])
def test_fail_under(which, share, code, epochs, capsys):
    """A collapse and a random start fail even below the asked share."""
    arguments = ["diagnose", epochs[which], "--fail-under", share]
    if code:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == code
        assert epochs[which] in capsys.readouterr().err
    else:
        main(arguments)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--fail-under", "90"], "between 0 and 1"),
        (["--eps", "3"], r"\(0, 2\]"),
        (["--key", "nothing"], "no tensor"),
        (["--optim.lr", "1"], "takes no"),
        (["--images", "1"], "at least 2"),
        (["--data", "builtin:digits"], "no encoder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(extra, says, epochs, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["diagnose", epochs[1], *extra])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.count("\n") == 1
    assert re.search(says, err)


def test_one_bad_file_does_not_lose_the_others(epochs, tmp_path, capsys):
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        main(["diagnose", epochs[0], str(tmp_path / "x"), epochs[1], "--json"])
    shown = capsys.readouterr()
    assert stop.value.code == 2
    assert [f["source"]["file"] for f in json.loads(shown.out)] == epochs
    assert "empty" in shown.err


def test_epochs_are_in_order_of_their_numbers(tmp_path):
    from uncollapse.diagnosis.page import write_page

    paths = [str(tmp_path / f"ckp-{epoch}.pth") for epoch in (0, 25, 100)]
    assert in_order(sorted(paths)) == paths
    assert in_order(paths[::-1]) == paths[::-1]  # an order of the user's own
    heads = {"prototypes.heads.0.weight": T.w, "prototypes.heads.1.weight": S.w, "projection_head.0.weight": S.w}
    for path in paths[:2]:
        torch.save(heads, path)
    found = [d for path in paths[:2] for d in diagnose_file(path, EPS)]
    write_page(found[:2], tmp_path / "one.html")
    assert "from the first file to the last" not in (tmp_path / "one.html").read_text()
    write_page(found, tmp_path / "two.html")
    caption = re.search(r"from the first file to the last: ([^<]*)", (tmp_path / "two.html").read_text())[1]
    share = f"{100 * T.unique / len(T.w):.1f} %"
    assert f"1 {share} to {share}" in caption


def test_a_damaged_newest_checkpoint_is_named(tmp_path, capsys):
    from uncollapse.run_folder.checkpoint import save_checkpoint

    for step in (1, 2):
        save_checkpoint(tmp_path / "checkpoints", step, {"teacher": {"head.last_layer.weight": T.w}}, 5)
    newest = tmp_path / "checkpoints" / "step-00000002.pt"
    newest.write_bytes(newest.read_bytes()[:100])
    (d,) = diagnose_file(tmp_path, EPS)
    assert d.source.file.endswith("step-00000001.pt")
    assert any("step-00000002.pt damaged" in note for note in d.notes)


def test_a_folder_cannot_be_a_page(epochs, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["diagnose", epochs[0], "--html", str(tmp_path)])
    assert stop.value.code == 2
    assert "is a folder" in capsys.readouterr().err


def test_a_damaged_file_exits_2(tmp_path, capsys):
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        main(["diagnose", str(tmp_path / "x")])
    assert stop.value.code == 2
    assert "empty" in capsys.readouterr().err


def test_help_does_not_load_torch():
    script = (
        "import sys, uncollapse.cli.main\n"
        "try: uncollapse.cli.main.main(['diagnose', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


def test_the_page_is_self_contained(epochs, tmp_path):
    torch.save(LAYOUTS["EsViT"][0], tmp_path / "esvit.pth")
    page = tmp_path / "new" / "page.html"
    main(["diagnose", *epochs, str(tmp_path / "esvit.pth"), "--html", str(page)])
    text = page.read_text()
    assert not re.search(r"(src|href)=[\"'](?!data:)", text)
    assert "<script" not in text
    for title in ("ε-sweep", "Projected density", "Similarity", "Group sizes", "Map", "Unique prototypes, set by set"):
        assert f"<b>{title}.</b>" in text
    assert text.count("<h2>esvit.pth teacher region</h2>") == 1


def test_a_page_of_odd_matrices(tmp_path):
    from uncollapse.diagnosis.page import write_page

    odd = [torch.ones(1, 5), torch.ones(3, 1), torch.ones(2, 2), torch.zeros(2, 2), torch.ones(40, 6)]
    write_page([diagnose(w) for w in odd], tmp_path / "p.html")
    assert (tmp_path / "p.html").read_text().count("<h2>tensor</h2>") == len(odd)


def test_names():
    assert shortened(["/a/b/x/1.pt", "/a/b/y/1.pt"]) == {"/a/b/x/1.pt": "x", "/a/b/y/1.pt": "y"}
    assert shortened(["/a/x/1.pt", "/a/y/2.pt"]) == {"/a/x/1.pt": "x/1.pt", "/a/y/2.pt": "y/2.pt"}
    assert shortened(["/a/b.pt"]) == {"/a/b.pt": "b.pt"}
    assert shortened(["tensor"]) == {"tensor": "tensor"}
    d = diagnose(T.w, EPS)
    assert names_of([d]) == ["tensor"]


@pytest.mark.gpu
def test_a_gpu_gives_the_same_diagnosis():
    assert diagnose(S.w, device="cuda").unique == diagnose(S.w).unique
    assert diagnose(S.w, device="cuda").sweep == diagnose(S.w).sweep


@pytest.mark.gpu
def test_a_gpu_counts_65536_prototypes_in_under_a_second():
    w = torch.randn(65536, 256, device="cuda")
    diagnose(w, EPS, complete=False)
    assert diagnose(w, EPS, complete=False).seconds["unique"] < 1
