"""Prototypes that are earlier projections: beside a plain list, and draws that anyone can repeat."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from steps import small
from uncollapse.prototypes.memory import MemoryPrototypes
from uncollapse.report.page import write_report
from uncollapse.report.table import print_table
from uncollapse.run_folder.read import read_run
from uncollapse.training.run import train

K, D = 12, 6


def rows(n, seed=0):
    return 3 * torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def made(length=None, seed=0):
    return MemoryPrototypes(K, D, torch.Generator().manual_seed(5), length, seed)


def as_set(vectors):
    return {tuple(v) for v in vectors.tolist()}


@pytest.mark.parametrize("batch", [1, 5, 12, 20])
def test_the_newest_projections_push_the_oldest_out_and_random_directions_stand_in(batch):
    prototypes, kept = made(), []
    start = as_set(prototypes.weight)
    for step in range(9):
        kept = [*kept, *F.normalize(rows(batch, step)[:K], dim=-1)][-K:]
        prototypes.observe(rows(batch, step), 0.0)
        prototypes.after_step()
        held = as_set(prototypes.affine("student", 0.1)[0])
        assert as_set(torch.stack(kept)) <= held
        assert len(held) == K
        assert len(held & start) == K - len(kept)
    assert not prototypes.lasting


def test_no_image_is_compared_with_itself():
    """What is observed enters after the step, whose targets stay what they were."""
    prototypes = made()
    z = rows(4)
    prototypes.observe(z, 0.0)
    targets = prototypes.targets(z, 0.1)
    before = targets.dense()
    assert float((F.normalize(z, dim=-1) @ prototypes.weight.T).max()) < 0.999
    prototypes.after_step()
    assert torch.equal(targets.dense(), before)
    assert float((F.normalize(z, dim=-1) @ prototypes.weight.T).amax(1).min()) > 0.999


def test_of_a_longer_queue_as_many_are_drawn_anew_every_step():
    prototypes, kept, draws = made(3 * K), [], []
    start = as_set(prototypes.queue)
    for step in range(20):
        new = F.normalize(rows(5, step), dim=-1)
        kept = [*kept, *new][-3 * K :]
        prototypes.observe(rows(5, step), 0.0)
        prototypes.after_step()
        held = as_set(prototypes.weight)
        assert len(held) == K
        if len(kept) >= K:
            assert held <= as_set(torch.stack(kept))
        else:
            assert as_set(torch.stack(kept)) <= held
            assert len(held & start) == K - len(kept)
        draws.append(held)
    assert len({frozenset(d) for d in draws}) == len(draws)
    union = set.union(*draws[-8:])
    assert len(union) > 2 * K


def test_draws_are_those_of_seed_and_step_and_go_on_from_a_checkpoint():
    one, same, other = made(40, 1), made(40, 1), made(40, 2)
    for step in range(6):
        if step == 3:
            state, same = copy.deepcopy(same.state_dict()), made(40, 1)
            same.load_state_dict(state)
        for prototypes in (one, same, other):
            prototypes.observe(rows(7, step), 0.0)
            prototypes.after_step()
        assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.weight, other.weight)


def test_a_queue_shorter_than_the_prototypes_is_refused():
    with pytest.raises(ValueError, match="12 prototypes cannot be taken from a queue of 11"):
        made(K - 1)


def test_a_run_does_not_pretend_that_its_prototypes_can_be_followed(tmp_path):
    """Neither alive nor movement, in log, summary, arrays and table, and a note that says why."""
    c = small("dino", "memory", **{"data.held_out": 0.9, "data.held_out_max": 40, "log.alive_window": 1})
    said = []
    summary = train(c, tmp_path / "run", 3, say=said.append, accelerator="cpu")
    assert (summary["alive"], summary["alive_window"], summary["movement"]) == (None, None, None)
    assert any("others every step" in note for note in summary["notes"])
    assert summary["used"] > 0
    assert not [line for line in said if "nearest in the" in line]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert not [row for row in rows if "alive" in row]
    assert "movement" not in np.load(tmp_path / "run" / "diagnosis.npz")
    print_table([summary])
    write_report([read_run(tmp_path / "run")], tmp_path / "report.html")
