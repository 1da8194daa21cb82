"""Every method through the loop: a batch in parts, and a run that was resumed, end where a run in one piece does."""

import pytest
import torch

from steps import Steps, small, tensors
from uncollapse.config.facts import arm_keys
from uncollapse.run_folder.checkpoint import load_checkpoint
from uncollapse.training.run import train

FEW = {"data.held_out": 0.9, "data.held_out_max": 16}
PLAIN = {"optim.name": "sgd", "optim.lr": 1.0, "optim.lr_batch": 16, "optim.min_lr": 0.0}


def mode(arm):
    """Its keys; a short queue, and prototypes drawn from a longer one, so that some steps reach their ends."""
    short = {"prototypes.queue": 24, "prototypes.floor": 1.0}
    return arm_keys(arm) | short | ({"prototypes.count": 40, "prototypes.memory_length": 72} if arm == "memory" else {})


IN_PARTS = {
    "ibot": ("koleo", "decoupled", "memory", "joint-sinkhorn-queue", "capi"),
    "ibot-separate": ("joint", "decoupled"),
    "ibot-vmf": ("joint",),
    "dino-vmf": ("joint", "joint-floor"),
    "esvit": ("joint", "decoupled"),
    "wessl": ("joint",),
    "dinov2": ("decoupled",),
    "dinov2-separate": ("joint",),
    "capi": ("capi",),
}
"""Method → modes."""


@pytest.mark.parametrize(("method", "kind"), [(method, kind) for method, kinds in IN_PARTS.items() for kind in kinds])
def test_a_batch_in_parts_is_the_batch(method, kind):
    """Losses and weights after three steps, with stochastic depth and some parts without a hidden patch."""
    keys = {**PLAIN, "method.masked_crops": 0.2} if "ibot" in method or "dinov2" in method else PLAIN
    whole, parts = (Steps(small(method, **mode(kind), **keys, **{"run.accumulate": n})) for n in (1, 4))
    start = whole.snapshot()
    for _ in range(3):
        one, other = whole.take(), parts.take()
        assert one.terms.keys() == other.terms.keys()
        for name, term in one.terms.items():
            assert other.terms[name] == pytest.approx(term, abs=2e-5), name
    for module in ("student", "teacher", "sets"):
        expected = dict(getattr(whole.state, module).state_dict())
        for name, found in getattr(parts.state, module).state_dict().items():
            torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    for name, found in parts.state.memory.items():
        torch.testing.assert_close(found, whole.state.memory[name], rtol=1e-4, atol=2e-5)
    moved = [
        (a - b).abs().max() for a, b in zip(whole.state.student.parameters(), start.student.parameters(), strict=True)
    ]
    assert max(moved) > 100 * 2e-5


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("swav", "joint"),
        ("carp", "joint"),
        ("carp", "decoupled"),
        ("ibot", "koleo"),
        ("ibot-separate", "decoupled"),
        ("esvit", "decoupled"),
        ("wessl", "joint"),
        ("ibot", "memory"),
        ("dino", "joint-floor"),
        ("pmsn", "joint"),
        ("dinov2-separate", "mst"),
    ],
)
def test_resume_reaches_the_same_bits(method, kind, tmp_path, monkeypatch):
    """Between a step that fills SwAV's queue and one that uses it."""
    monkeypatch.setattr("uncollapse.training.summary.finish_run", lambda *_: {})
    c = small(method, **mode(kind), **FEW, **{"log.checkpoint_steps": 0})

    def run(name, steps, resume=False):
        train(c, tmp_path / name, steps, resume, say=lambda line: None, accelerator="cpu")
        saved = load_checkpoint(tmp_path / name / "checkpoints")
        return saved["step"], tensors(saved)

    step, whole = run("whole", 5)
    run("parts", 2)
    again, parts = run("parts", 5, resume=True)
    assert step == again == 5
    assert whole.keys() == parts.keys()
    assert {name.split("/")[1] for name in whole} >= {"student", "prototypes", "optimizer", "monitor"}
    assert ("/memory/queue_0" in whole) == (method == "swav")
    different = [name for name, tensor in whole.items() if not torch.equal(tensor, parts[name])]
    assert not different
