"""What a finished run writes about itself is what every reader gets, set by set; what is damaged is named."""

import json
from dataclasses import asdict, fields

import torch

from made_runs import make_run, make_summary
from steps import small
from uncollapse.data.load import load_images
from uncollapse.data.workers import eval_batches
from uncollapse.diagnosis.run import diagnose_file
from uncollapse.measure.catalogue import MEASURES, OLD_VIEW_INFORMATION
from uncollapse.measure.unique import unique_prototypes
from uncollapse.run_folder.checkpoint import load_checkpoint
from uncollapse.run_folder.read import read_run
from uncollapse.run_folder.summary import Information, SetSummary, Summary, read_summary
from uncollapse.training.run import train
from uncollapse.training.state import build_state, load_state_dicts

BY_EPSILON = {"0.025": 20, "0.1": 19, "0.25": 18, "0.5": 17}


def of_set() -> dict:
    counts = dict.fromkeys(("unique", "unique_means", "unique_used"), BY_EPSILON)
    numbers = {"prototypes": 64, "dim": 8, "used": 30, "n": 100, "alive": 40, "alive_window": 9, "movement": 0.5}
    return {**counts, **numbers, "effective": {eps: n / 2 for eps, n in BY_EPSILON.items()}, "unit": "patches"}


def test_what_is_written_is_what_is_read():
    """And every measure of the catalogue can be read of it: there is one list of them."""
    shares = ("knn", "knn_balanced", "linear", "linear_balanced")
    accuracies = dict.fromkeys(shares, 0.5) | {f"{name}_ci95": (0.4, 0.6) for name in shares}
    counts = {"seed": 3, "steps": 7, "used_by_logits": 4, "used_by_target": 5, "target_agreement": 0.5}
    written = Summary(
        **of_set(),
        **accuracies,
        **counts,
        name="joint",
        method="ibot",
        view_information=Information(1.5, 0.1),
        seconds_per_step=0.1,
        sets={"patch": SetSummary(**of_set())},
    )
    row, wrong = read_summary(json.loads(json.dumps(asdict(written))))
    assert not wrong
    assert row["sets"] == {"patch": of_set()}
    assert {name: value for name, value in row.items() if name in of_set()} == of_set()
    assert row["view_information"]["bits"] == 1.5
    assert [m.name for m in MEASURES if m.read(row) is None] == [OLD_VIEW_INFORMATION.name]
    assert set(row) <= {f.name for f in fields(Summary)}


def test_a_folder_of_before_is_read_as_it_was(tmp_path):
    run = read_run(make_run(tmp_path, "joint"))
    assert run.problems == []
    assert run.method == "dino"
    assert json.loads(json.dumps(run.summary)) == {
        name: value | {} if isinstance(value, dict) else value for name, value in make_summary("joint").items()
    }


def test_a_damaged_set_costs_only_what_is_damaged():
    sets = {"patch": of_set() | {"used": "many", "unique": {"0.025": 65}, "effective": {"3": 1.0}}, "x\x1b": {"n": 3}}
    row, wrong = read_summary(make_summary("joint", sets=sets))
    unique = "sets.patch.unique (more than there are prototypes)"
    assert wrong == ["sets.patch.used", "sets.patch.effective", unique]
    left = set(row["sets"]["patch"])
    assert left == set(of_set()) - {"used", "unique", "effective"}
    assert all("\x1b" not in name for name in row["sets"])
    assert row["used"] == 64
    for sets in ([1], {"patch": 3}, "patch"):
        row, wrong = read_summary(make_summary("joint", sets=sets))
        assert wrong == ["sets"]
        assert "sets" not in row


def test_a_run_with_prototypes_of_patches_measures_them_on_patches(tmp_path):
    config = small("ibot-separate", "joint", **{"prototypes.koleo_weight": 0.0})
    row = train(config, tmp_path / "run", 2, say=lambda line: None, accelerator="cpu")
    patch = row["sets"]["patch"]
    assert read_run(tmp_path / "run").summary["sets"]["patch"] == {k: v for k, v in patch.items() if v is not None}

    state = build_state(config)
    start = state.prototypes("patch").vectors("teacher")
    load_state_dicts(state, load_checkpoint(tmp_path / "run" / "checkpoints"))
    vectors = state.prototypes("patch").vectors("teacher")
    _, held_out = load_images("builtin:digits", config.data, 0, None, progress=False)
    net, z = state.evaluated.eval(), []
    with torch.no_grad():
        for _, x in eval_batches(held_out, config.views.global_size, config.views.mean, config.views.std):
            z.append(net.head(net.backbone.tokens(x)[1].flatten(0, 1)))
    nearest = (torch.cat(z).double() @ vectors.double().T).argmax(1)  # there are no more than 16 patches to an image
    assert (patch["n"], patch["unit"]) == (len(nearest), "patches")
    assert patch["used"] == len(nearest.unique())
    share = torch.bincount(nearest).double() / len(nearest)
    assert patch["effective"]["0.025"] <= float(torch.special.entr(share).sum().exp()) * (1 + 1e-9)
    assert patch["unique"]["0.025"] == unique_prototypes(vectors, 0.025)
    assert abs(patch["movement"] - float((1 - (vectors * start).sum(1)).mean())) < 1e-6
    assert 0 < patch["alive"] <= 64
    assert row["n"] == row["n_held_out"]

    seen = diagnose_file(tmp_path / "run", data="builtin:digits")
    counted = {d.source.set: d.images.used for d in seen if d.source.side == "teacher"}
    assert counted == {"cls": row["used"], "patch": patch["used"]}, "one checkpoint, one count"
