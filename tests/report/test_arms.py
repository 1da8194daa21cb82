"""Which runs are seeds of one arm, what arms are called, and when one is called better than another."""

from __future__ import annotations

import colorsys
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from made_runs import ARMS, HELD_OUT, make_run, make_set, make_summary
from uncollapse.checkpoints.prototypes import PrototypeSet
from uncollapse.diagnosis.run import measure
from uncollapse.figures import panels as figures
from uncollapse.measure.catalogue import KNN, MEASURES, OLD_VIEW_INFORMATION, USED, VIEW_INFORMATION
from uncollapse.measure.random_start import RandomLikeness
from uncollapse.measure.verdict import judge, judge_row
from uncollapse.report.arms import group, rival
from uncollapse.report.comparing import difference, stat
from uncollapse.report.verdict import compare, takeaways, verdict
from uncollapse.run_folder.read import RunRecord, read_run

# --------------------------------------------------------------------------------------------- grouping


def test_the_same_run_twice_counts_once_and_is_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "joint")
    grouping = group([read_run(folder), read_run(folder)])
    assert [len(runs) for runs in grouping.arms.values()] == [1]
    assert any("the same run" in note and "counted once" in note for note in grouping.notes)
    again = make_run(tmp_path, "joint", name="again", loss=1.0)
    grouping = group([read_run(folder), read_run(again)])
    assert [len(runs) for runs in grouping.arms.values()] == [1]
    assert any("same arm and seed" in note for note in grouping.notes)


def test_seeds_are_of_one_arm_only_where_nothing_else_differs(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path, "decoupled", seed)) for seed in (0, 1)]
    assert {arm: len(found) for arm, found in group(runs).arms.items()} == {"decoupled": 2}
    more = read_run(make_run(tmp_path, "decoupled", 2, prototypes=5000))
    assert {arm: len(found) for arm, found in group([*runs, more]).arms.items()} == {
        "decoupled, K = 256": 2,
        "decoupled, K = 5,000": 1,
    }
    slow = read_run(make_run(tmp_path, "decoupled", 3, config={"optim.lr": 0.001}))
    assert "decoupled, learning rate = 0.001" in group([*runs, slow]).arms
    short = read_run(make_run(tmp_path, "decoupled", 4, steps=600))
    assert "decoupled, steps = 600" in group([*runs, short]).arms
    elsewhere = read_run(make_run(tmp_path, "decoupled", 5, config={"data.path": "/moved", "log.every_steps": 3}))
    assert {arm: len(found) for arm, found in group([*runs, elsewhere]).arms.items()} == {"decoupled": 3}


def test_where_too_much_differs_the_folder_names_the_arm(tmp_path: Path) -> None:
    keys = {"optim.lr": 0.001, "optim.weight_decay": 0.1, "head.hidden": 96, "run.epochs": 7.0}
    runs = [read_run(make_run(tmp_path, "joint")), read_run(make_run(tmp_path, "joint", name="other", config=keys))]
    grouping = group(runs)
    assert len(grouping.arms) == 2
    assert any("other" in arm for arm in grouping.arms)
    assert any("optim.weight_decay" in note for note in grouping.notes)


def test_unlike_images_are_said_and_not_compared(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path, arm)) for arm in ("joint", "decoupled", "fixed")]
    runs += [
        read_run(make_run(tmp_path, arm, name=f"{arm}-c", data="caltech", data_digest="c", held_out_digest="d"))
        for arm in ("decoupled", "fixed")
    ]
    grouping = group(runs)
    assert len(grouping.arms) == 5
    assert any("different images" in note for note in grouping.notes)
    caltech = next(a for a in grouping.arms if a.startswith("decoupled") and "caltech" in a)
    assert rival(caltech, grouping, "joint") is None
    assert [c.against for c in verdict(caltech, grouping).comparisons] == [
        next(a for a in grouping.arms if a.startswith("fixed") and "caltech" in a)
    ]


def test_digests_decide_whether_images_are_the_same(tmp_path: Path) -> None:
    one = read_run(make_run(tmp_path, "joint", data_digest="x", held_out_digest="y"))
    renamed = make_run(tmp_path, "decoupled", data="renamed", data_digest="x", held_out_digest="y")
    changed = make_run(tmp_path, "koleo", data_digest="z", held_out_digest="y")
    assert len(set(group([one, read_run(renamed)]).data.values())) == 1
    assert len(set(group([one, read_run(changed)]).data.values())) == 2
    # a part that is held out by the seed makes each seed's digests its own
    later = read_run(make_run(tmp_path, "joint", 1, data_digest="other", held_out_digest="split"))
    assert [len(found) for found in group([one, later]).arms.values()] == [2]


def test_each_arm_is_compared_with_the_most_like_it(tmp_path: Path) -> None:
    runs = [
        read_run(make_run(tmp_path, arm, name=f"{arm}{total}", prototypes=total))
        for arm in ("joint", "decoupled", "fixed")
        for total in (256, 5000)
    ]
    grouping = group(runs)
    assert rival("decoupled, K = 5,000", grouping, "joint") == "joint, K = 5,000"
    assert rival("decoupled, K = 256", grouping, "fixed") == "fixed, K = 256"


def test_no_two_arms_share_a_colour() -> None:
    kinds = ["joint", "joint-sinkhorn", "koleo", "decoupled", "decoupled-paper", "fixed"]
    names = [f"{kind}, K = {total}" for kind in kinds for total in (256, 5000)]
    found = figures.styles(names)
    assert len({style.colour for style in found.values()}) == len(names)
    assert figures.styles(kinds)["joint"] == figures.styles(["joint"])["joint"]
    many = figures.styles([f"arm {i}" for i in range(40)])
    assert len(set(many.values())) == 40


def test_with_several_methods_the_hue_says_the_mode_and_the_line_the_method() -> None:
    modes = ["joint", "joint-sinkhorn", "koleo", "decoupled", "decoupled-paper"]
    methods = ["dino", "dino-vmf", "ibot", "ibot-vmf", "swav", "carp"]
    found = figures.styles([f"{method} {mode}" for method in methods for mode in [*modes, "fixed"]])
    assert len({style.colour for style in found.values()}) == 36
    for mode in modes:
        own = colorsys.rgb_to_hls(*to_rgb(figures.styles([mode])[mode].colour))[0]
        hues = [colorsys.rgb_to_hls(*to_rgb(found[f"{method} {mode}"].colour))[0] for method in methods]
        assert max(abs(hue - own) for hue in hues) < 0.02, "a fiftieth of the circle"
    for part in ("dashes", "marker"):
        of = [{getattr(found[f"{method} {mode}"], part) for mode in modes} for method in methods]
        assert all(len(one) == 1 for one in of)
        assert len(set.union(*of)) == len(methods)
    # what tells configurations apart takes nothing from that
    both = figures.styles(["dino joint, K = 256", "carp joint, K = 256", "carp joint, K = 5,000"])
    assert len({style.colour for style in both.values()}) == 3
    assert both["carp joint, K = 256"].colour == figures.styles(["dino joint", "carp joint"])["carp joint"].colour


def test_an_arm_is_a_method_and_a_mode(tmp_path: Path) -> None:
    """Old folders name no method and are DINO's; every arm is measured by the joint and fixed ones of its method."""
    own = {"optim.lr": 0.001, "head.normalise": False, "teacher.temperature": 1.0, "run.batch": 256}
    runs = [read_run(make_run(tmp_path, mode, method="carp", config=own)) for mode in ("fixed", "decoupled", "joint")]
    runs += [read_run(make_run(tmp_path, mode)) for mode in ("decoupled", "joint")]
    runs += [read_run(make_run(tmp_path, "joint", method="dino-vmf"))]
    grouping = group(runs)
    names = ["dino joint", "dino decoupled", "dino-vmf joint", "carp joint", "carp decoupled", "carp fixed"]
    assert list(grouping.arms) == names
    assert any("methods also differ" in note and "optim.lr" in note for note in grouping.notes)

    def against(arm: str) -> list[str]:
        return [c.against for c in verdict(arm, grouping).comparisons]

    assert against("dino decoupled") == ["dino joint"]
    assert against("carp decoupled") == ["carp joint", "carp fixed"]
    assert against("carp joint") == ["carp fixed"]
    assert against("dino-vmf joint") == against("dino joint") == against("carp fixed") == []
    short = [line for line in takeaways(grouping) if line.startswith("view information")]
    assert [line.split(" ", 3)[2:] for line in short] == [
        ["dino", "joint 3.99 bits; better: dino decoupled (4.40)."],
        ["carp", "joint 3.99 bits; better: carp decoupled (4.40)."],
    ]
    # one method alone needs no name
    assert list(group(runs[:3]).arms) == ["joint", "decoupled", "fixed"]
    slow = read_run(make_run(tmp_path, "joint", name="slow", method="carp", config={**own, "optim.lr": 0.1}))
    joint = ["joint, learning rate = 0.001", "joint, learning rate = 0.1"]
    assert list(group([*runs[:3], slow]).arms)[:2] == joint


def test_a_further_set_of_prototypes_is_an_arm_beside_its_own(tmp_path: Path) -> None:
    modes = ("joint", "decoupled", "fixed")
    runs = [
        read_run(make_run(tmp_path, mode, seed, method="ibot", sets={"patch": make_set(mode)}))
        for mode in modes
        for seed in (0, 1)
    ]
    runs.append(read_run(make_run(tmp_path, "joint", method="dino")))
    grouping = group(runs)
    names = [f"ibot {mode}{part}" for mode in modes for part in ("", " · patch")]
    assert list(grouping.arms) == ["dino joint", *names]
    assert [len(found) for found in grouping.arms.values()] == [1, *[2] * 6]
    assert rival("ibot decoupled · patch", grouping, "joint") == "ibot joint · patch"
    assert rival("ibot decoupled", grouping, "joint") == "ibot joint"
    found = verdict("ibot decoupled · patch", grouping)
    assert [c.against for c in found.comparisons] == ["ibot joint · patch", "ibot fixed · patch"]
    assert not any("view information" in text for c in found.comparisons for text in [*c.better, *c.worse])
    assert any("66 ± 0 used on 5,000 held-out patches" in s for s in found.sentences)
    joint = verdict("ibot joint · patch", grouping)
    assert ("bad", "partial collapse") in joint.labels
    assert any("joint · patch (11.3 % distinct)" in line for line in takeaways(grouping))
    curve = [row["unique"]["0.025"] for row in grouping.arms["ibot joint · patch"][0].metrics if row["kind"] == "sweep"]
    assert (curve[0], curve[-1]) == (256, 31)
    look = figures.styles(grouping.arms)
    assert len({style.colour for style in look.values()}) == 7
    assert look["ibot joint"].dashes != look["ibot joint · patch"].dashes == look["ibot fixed · patch"].dashes


def test_a_damaged_sweep_of_a_set_costs_no_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "joint", method="ibot", sets={"patch": make_set("joint")})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1201, "kind": "sweep", "unique": {}, "unique/patch": "many"}\n')
    (run,) = group([read_run(folder)]).arms["joint · patch"]
    assert run.metrics[-1]["unique"] == {}


# -------------------------------------------------------------------------------------------- comparing


def record(name: str, seed: int, values: np.ndarray, digest: str | None = "d", **summary: Any) -> RunRecord:
    bits = {"bits": float(values.mean()), "standard_error": float(values.std(ddof=1) / len(values) ** 0.5)}
    row = {"name": name, "seed": seed, "view_information": bits, "held_out_digest": digest} | summary
    return RunRecord(name, seed, summary=row, arrays={"view_information_of_image": values.astype(np.float32)})


def test_differences_are_paired_over_the_same_images() -> None:
    rng = np.random.default_rng(0)
    hard = 3 * rng.normal(size=400)  # images differ far more than arms
    gaps = [0.2 + 0.3 * rng.normal(size=400) for _ in range(3)]
    ours = [record("decoupled", seed, hard + gap) for seed, gap in enumerate(gaps)]
    theirs = [record("joint", seed, hard) for seed in range(3)]
    found = difference(VIEW_INFORMATION, ours, theirs)
    assert found is not None
    assert found.paired
    assert found.sign == 1
    means = [gap.mean() for gap in gaps]
    within = np.mean([gap.std(ddof=1) / 20 for gap in gaps])
    assert found.mean == pytest.approx(np.mean(means), abs=1e-5)
    assert found.error == pytest.approx(math.hypot(np.std(means, ddof=1) / 3**0.5, within), rel=1e-4)
    # the same numbers of other images, or of unknown ones, cannot be told apart
    for digest in ("e", None):
        others = [record("joint", run.seed, hard, digest) for run in theirs]
        unpaired = difference(VIEW_INFORMATION, ours, others)
        assert unpaired is not None
        assert not unpaired.paired
        assert unpaired.sign == 0
    crossed = difference(VIEW_INFORMATION, ours[:1], theirs[1:])
    assert crossed is not None
    assert not crossed.paired, "pairs are within a seed"


def test_better_and_worse_take_more_than_1_96_standard_errors() -> None:
    theirs = [record("joint", 0, np.zeros(100))]
    spread = np.where(np.arange(100) % 2, 1.0, -1.0)
    error = spread.std(ddof=1) / 10
    for share, sign in ((1.95, 0), (1.97, 1), (-1.97, -1)):
        found = difference(VIEW_INFORMATION, [record("koleo", 0, spread + share * error)], theirs)
        assert found is not None
        assert found.sign == sign


def test_counts_of_one_seed_are_described_and_never_called_better(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path, arm)) for arm in ("joint", "decoupled")]
    gap = difference(USED, runs[1:], runs[:1])
    assert gap is not None
    assert gap.error is None
    found = compare("decoupled", "joint", group(runs))
    assert any(text.startswith("used 133 vs 64") for text in found.more)
    merit = {"view information", "kNN", "kNN, balanced", "linear", "linear, balanced"}
    said = [*found.better, *found.worse]
    assert said
    assert all(any(text.startswith(f"{name} ") for name in merit) for text in said)
    several = [read_run(make_run(tmp_path / "s", "joint", seed)) for seed in range(3)]
    noisy = [RunRecord("koleo", s, summary=make_summary("koleo", s, used=used)) for s, used in enumerate((20, 110, 70))]
    gap = difference(USED, noisy, several)
    assert gap is not None
    assert gap.sign == 0


def test_without_values_per_image_the_comparison_says_so(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path, arm)) for arm in ("joint", "decoupled")]
    assert not compare("decoupled", "joint", group(runs)).unpaired or runs[0].arrays
    for run in runs:
        run.arrays = {}
    found = compare("decoupled", "joint", group(runs))
    assert found.unpaired
    assert any(text.startswith("view information") for text in found.better), "0.4 bits, with 0.05 standard error each"


def test_an_old_estimate_is_shown_apart_and_never_compared(tmp_path: Path) -> None:
    old = read_run(make_run(tmp_path, "joint", view_information=3.62))
    new = read_run(make_run(tmp_path, "decoupled"))
    assert VIEW_INFORMATION.read(old.summary) is None
    assert OLD_VIEW_INFORMATION.read(old.summary) == 3.62
    assert OLD_VIEW_INFORMATION.read(new.summary) is None
    assert difference(VIEW_INFORMATION, [new], [old]) is None
    mixed = stat(VIEW_INFORMATION, [old, new])
    assert mixed is not None
    assert mixed.mean == pytest.approx(4.40)
    grouping = group([old, new])
    assert not any("information" in line for line in takeaways(grouping))
    assert any("old, biased estimator" in line for line in verdict("joint", grouping).sentences)
    for found in vars(compare("decoupled", "joint", grouping)).values():
        assert not (isinstance(found, list) and any("information" in text for text in found))


# ---------------------------------------------------------------------------------------- one verdict


@pytest.mark.parametrize("unique", [1, 100, 200, 250])
@pytest.mark.parametrize("wide", [60, 200])
@pytest.mark.parametrize(("used", "effective", "n"), [(5, 4.0, 1000), (20, 19.0, 60), (200, 150.0, 1000)])
@pytest.mark.parametrize("alike", [False, True])
def test_report_and_diagnose_give_the_same_numbers_the_same_label(
    unique: int, wide: int, used: int, effective: float, n: int, alike: bool
) -> None:
    start = RandomLikeness(256, 1.0, 1.0, 0.3, 0.3, 1.0, False, alike)
    counts = {0.025: unique, 0.1: unique, 0.25: min(unique, wide), 0.5: 1}
    direct = judge(256, 0, 64, counts, start, used, effective, n)
    changes = {
        "unique": {f"{e:g}": c for e, c in counts.items()},
        "used": used,
        "n_held_out": n,
        "alive": 9,
        "random_start": vars(start),
        "effective": {"0.025": effective, "0.25": 1.0},
    }
    summary = make_summary("joint", **changes)
    shown = verdict("joint", group([RunRecord("joint", summary=summary)]))
    assert shown.labels == [(direct.tone, direct.label)]
    assert shown.rules == [direct.rule]
    assert shown.advice
    assert "--prototypes decoupled" not in " ".join(verdict("x", group([RunRecord("x", summary=summary)])).advice)


def test_the_json_of_a_diagnosis_is_judged_as_the_diagnosis_is() -> None:
    import torch

    w = torch.randn(200, 24, generator=torch.Generator().manual_seed(0)).repeat(2, 1) + 1.0
    d = measure(PrototypeSet("", "", "unstated", "", w), "tensor")
    again = judge_row(d.to_json())
    assert again is not None
    assert (again.label, again.rule) == (d.verdict.label, d.verdict.rule)


def test_advice_fits_the_mode() -> None:
    for mode in ("joint", "joint-sinkhorn", "koleo", "decoupled", "decoupled-paper", "memory", "fixed", ""):
        text = judge(256, 0, 64, {0.025: 100}, None, 50, 30.0, 1000, mode=mode).advice
        assert text
        assert ("--prototypes decoupled" in text) == (mode not in ("decoupled", "memory", "fixed", "")), mode


def test_seeds_that_disagree_are_counted(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path, "koleo", seed)) for seed in range(2)]
    runs.append(read_run(make_run(tmp_path, "koleo", 2, unique={"0.025": 20, "0.1": 20, "0.25": 20, "0.5": 9})))
    labels = [text for _, text in verdict("koleo", group(runs)).labels]
    assert any("(1 of 3 seeds)" in text and "collapse" in text for text in labels)


def test_every_measure_is_defined_and_named_once() -> None:
    assert len({m.name for m in MEASURES}) == len(MEASURES)
    assert all(m.definition.endswith(".") for m in MEASURES)
    assert MEASURES[:2] == (VIEW_INFORMATION, KNN)
    assert HELD_OUT
    assert ARMS


def test_a_real_run_has_one_verdict_in_report_and_diagnose(tmp_path: Path) -> None:
    from uncollapse.config.load import load_config
    from uncollapse.config.tiny import tiny
    from uncollapse.diagnosis.run import diagnose_file
    from uncollapse.training.run import train

    config = tiny(load_config("demo", {"data.path": "builtin:digits"}))
    train(config, tmp_path / "run", 4, say=lambda line: None, accelerator="cpu")
    run = read_run(tmp_path / "run")
    assert run.problems == []
    d = next(d for d in diagnose_file(tmp_path / "run", data="builtin:digits") if d.source.side == "teacher")
    assert d.images.used == run.summary["used"]
    assert verdict("joint", group([run])).labels == [(d.verdict.tone, d.verdict.label)]
