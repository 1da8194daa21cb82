"""A change in mid-run: a run that leaves another one, and parts that learn no more."""

import pytest
import torch

from steps import Steps, small, tensors
from uncollapse.config.load import load_config
from uncollapse.config.schema import KINDS
from uncollapse.errors import CheckpointError, ConfigError
from uncollapse.run_folder.checkpoint import load_checkpoint
from uncollapse.training.run import train

FEW = {"data.held_out": 0.9, "data.held_out_max": 16, "log.checkpoint_steps": 0}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("uncollapse.training.summary.finish_run", lambda *_: {})


def trained(config, out, steps):
    train(config, out, steps, say=lambda line: None, accelerator="cpu")
    return load_checkpoint(out / "checkpoints")


def branch(config_of, trunk, step):
    return config_of(**{"change.branch": str(trunk), "change.branch_step": step}, **FEW)


@pytest.mark.parametrize(("method", "kind"), [("carp", "decoupled"), ("ibot-separate", "koleo")])
def test_a_branch_with_the_same_prototypes_is_the_run_itself(method, kind, tmp_path, quick):
    whole = trained(small(method, kind, **FEW), tmp_path / "whole", 4)
    trained(small(method, kind, **FEW), tmp_path / "trunk", 2)
    other = trained(branch(lambda **k: small(method, kind, **k), tmp_path / "trunk", 2), tmp_path / "branch", 4)
    assert other["step"] == whole["step"] == 4
    for part in ("student", "teacher", "prototypes", "memory", "optimizer", "monitor"):
        expected, seen = tensors(whole[part]), tensors(other[part])
        assert expected.keys() == seen.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, seen[name]), (part, name)


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    """A run with joint prototypes, three steps long."""
    out = tmp_path_factory.mktemp("joint") / "trunk"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uncollapse.training.summary.finish_run", lambda *_: {})
        trained(small("dino", "joint", **FEW), out, 3)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_starts_where_the_prototypes_are_and_learns_them_in_its_own_way(kind, joint, tmp_path, quick):
    trunk = load_checkpoint(joint / "checkpoints")
    later = trained(branch(lambda **k: small("dino", kind, **k), joint, 3), tmp_path / "branch", 5)
    start = load_checkpoint(tmp_path / "branch" / "checkpoints", 3)
    assert all(torch.equal(t, trunk["student"][n]) for n, t in start["student"].items())
    there, here = Steps(small("dino", "joint")), Steps(small("dino", kind))
    there.state.sets["cls"].load_state_dict(trunk["prototypes"]["cls"])
    here.state.sets["cls"].load_state_dict(start["prototypes"]["cls"])
    was, now = (s.state.prototypes().means() for s in (there, here))
    torch.testing.assert_close(torch.nn.functional.normalize(now, dim=-1), was, rtol=0, atol=1e-5)
    moved = any(not torch.equal(t, start["prototypes"]["cls"][n]) for n, t in later["prototypes"]["cls"].items())
    assert moved == (kind != "fixed")
    assert later["step"] == 5


def test_what_a_branch_cannot_leave_is_said(joint, tmp_path, quick):
    def leave(step=3, **keys):
        c = branch(lambda **k: small("dino", "joint", **k, **keys), joint, step)
        train(c, tmp_path / "branch", 3, say=lambda line: None, accelerator="cpu")

    with pytest.raises(CheckpointError, match="no checkpoint of step 7"):
        leave(7)
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        leave(**{"optim.lr": 0.5})
    with pytest.raises(ConfigError, match=r"prototypes.count: 32, but .* has 64"):
        leave(**{"prototypes.count": 32})
    assert not (tmp_path / "branch").exists()


@pytest.mark.parametrize("kind", ["joint", "koleo", "decoupled"])
@pytest.mark.parametrize("part", ["encoder", "prototypes"])
def test_what_is_frozen_stays_and_the_rest_learns(kind, part):
    steps = Steps(small("dino", kind, **{"change.freeze": f"{part}@2"}))
    free = Steps(small("dino", kind))
    for _ in range(2):
        assert steps.take().terms == free.take().terms
    before = steps.snapshot()
    for _ in range(2):
        steps.take()

    def changed(name):
        old, new = (dict(getattr(s, name).named_parameters()) for s in (before, steps.state))
        return [n for n in old if not torch.equal(old[n], new[n])]

    assert bool(changed("student")) == bool(changed("teacher")) == (part == "prototypes")
    sets = [s.sets.state_dict() for s in (before, steps.state)]
    ages = [n for n in sets[0] if n.endswith("neighbours_age")]
    assert any(not torch.equal(sets[0][n], sets[1][n]) for n in sets[0] if n not in ages) == (part == "encoder")


def test_what_can_be_frozen_is_said():
    with pytest.raises(ConfigError, match=r"change\.freeze"):
        load_config("dino-small32", {"change.freeze": "teacher@3"})
