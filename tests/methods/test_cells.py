"""Every method with every way to learn prototypes: what must move moves, what must not stays, every term is named."""

import math
from itertools import product
from typing import NamedTuple

import pytest
import torch

from steps import METHODS, Steps, small
from uncollapse.config.facts import targets_of
from uncollapse.config.schema import KINDS
from uncollapse.schedules import cosine, linear


class Facts(NamedTuple):
    """Of one method: what differs between methods, and is not its mathematics."""

    terms: set[str]
    memory: set[str]
    sets: tuple[str, ...] = ("cls",)
    heads: tuple[str, ...] = ("cls",)
    """Those with weights."""
    one_side: bool = False
    """Whether student and teacher look at the same prototypes."""
    queue: frozenset[str] = frozenset()
    """Of its memory, what only targets balanced over a queue need."""
    own_student: bool = False
    """Whether the student learns weights of its own beside a clustering of the teacher's projections."""


DINO, IBOT = Facts({"cls"}, {"center"}), Facts({"cls", "patch"}, {"center", "center_patch"})
DINOV2 = IBOT._replace(terms={"cls", "patch", "koleo"})
SWAV = frozenset({"queue_0", "queue_1", "filled_0", "filled_1"})
FACTS = {
    "dino": DINO,
    "dino-vmf": DINO,
    "swav": Facts({"cls"}, set(SWAV), one_side=True, queue=SWAV),
    "carp": Facts({"consistency", "entropy"}, set()),
    "msn": Facts({"cls", "prior"}, set(), one_side=True),
    "pmsn": Facts({"cls", "prior", "entropy"}, set(), one_side=True),
    "ibot": IBOT,
    "ibot-separate": IBOT._replace(sets=("cls", "patch")),
    "ibot-vmf": IBOT,
    "dinov2": DINOV2,
    "dinov2-separate": DINOV2._replace(sets=("cls", "patch"), heads=("cls", "patch")),
    "capi": Facts({"patch"}, set(), ("patch",), heads=(), own_student=True),
    "esvit": Facts({"cls", "region"}, {"center", "center_region"}, ("cls", "region"), ("cls", "region")),
    "wessl": Facts(
        {"cls"}, {"center", "center_head2", "center_head3"}, ("cls", "head2", "head3"), ("cls", "head2", "head3")
    ),
}
REFUSED = {("pmsn", "memory")}
"""Whose prior gives each prototype a share, where they are others every step."""


def parameters(module):
    return {} if module is None else {n: p.detach().clone() for n, p in module.named_parameters()}


@pytest.mark.parametrize(("method", "kind"), [cell for cell in product(METHODS, KINDS) if cell not in REFUSED])
def test_cell(method, kind):
    c, facts = small(method, kind), FACTS[method]
    steps = Steps(c)
    state, start = steps.state, steps.snapshot()
    done = [steps.take() for _ in range(2)]
    before = steps.snapshot()
    done.append(steps.take())
    learned = kind in ("joint", "koleo")

    # The loss: every term by name, regularisers beside it.
    names = state.parts.names()
    assert tuple(names) == facts.sets
    beside = {"koleo": "regulariser", "capi": "own"}.get(kind)
    regularisers = {f"{beside}/{name}" for name in names} if beside else set()
    for d in done:
        assert d.terms.keys() == facts.terms | regularisers
        assert all(math.isfinite(term) for term in d.terms.values())
        assert d.loss == pytest.approx(sum(v for n, v in d.terms.items() if n not in regularisers), abs=1e-5)

    # The prototypes, by their way to learn.
    optimised = {p.data_ptr() for group in state.optimizer.param_groups for p in group["params"]}
    for name in names:
        prototypes, other = state.prototypes(name), start.prototypes(name)
        moved = {s: (prototypes.vectors(s) - other.vectors(s)).abs().amax(1) for s in ("student", "teacher")}
        ours = {p.data_ptr() for p in prototypes.parameters() if p.requires_grad}
        assert bool(ours) == (learned or (kind == "capi" and facts.own_student))
        assert ours <= optimised
        assert not optimised & {b.data_ptr() for b in prototypes.buffers()}
        if kind == "memory":  # of each step, a projection for each image and level
            assert prototypes.entered == 3 * c.run.batch * len(state.parts.levels(name))
            assert (moved["student"] > 0).sum() == min(len(moved["student"]), prototypes.entered)
        else:
            for side in ("student",) if learned else ("student", "teacher"):
                assert (moved[side] > 0).all() if kind != "fixed" else (moved[side] == 0).all()
        if ours:
            assert (prototypes.student_v.grad.abs().amax(1) > 0).all()

    # The encoder learns, head by head.
    now, then = parameters(state.student), parameters(start.student)
    assert {n.split(".")[1] for n in now if n.startswith("heads.")} == set(facts.heads)
    still = {n for n in now if torch.equal(now[n], then[n])}
    assert not still, f"these never learn: {sorted(still)}"

    # The teacher follows: after the student's step, or (CARP) before it, the prototypes' side of it too.
    if c.method.name == "swav":
        assert state.teacher is None
    else:
        followed = before if c.method.name == "carp" else state
        shape = {"cosine": cosine, "linear": linear}[c.teacher.momentum_shape]
        momentum = shape(2, c.run.schedule_span * steps.total, c.teacher.momentum, c.teacher.momentum_end)
        was, towards = parameters(before.teacher), parameters(followed.student)
        for n, t in parameters(state.teacher).items():
            torch.testing.assert_close(t, momentum * was[n] + (1 - momentum) * towards[n], rtol=1e-5, atol=1e-7)
        for name in names if learned else []:
            if facts.one_side:
                for side in zip(
                    *(state.prototypes(name).affine(side, 0.1) for side in ("student", "teacher")), strict=True
                ):
                    torch.testing.assert_close(*side)
            else:
                old, ahead, new = (s.prototypes(name) for s in (before, followed, state))
                expected = momentum * old.teacher_v + (1 - momentum) * ahead.student_v.detach()
                torch.testing.assert_close(new.teacher_v, expected, rtol=1e-5, atol=1e-7)

    # What is carried from step to step.
    centred = targets_of(c) == "centred"
    for name, tensor in state.memory.items():
        changes = centred if name.startswith("center") else True
        assert torch.equal(tensor, start.memory[name]) != changes, name
    assert state.memory.keys() == facts.memory - (set() if targets_of(c) == "sinkhorn" else facts.queue)


@pytest.mark.parametrize("method", ["dino-vmf", "ibot-vmf"])
@pytest.mark.parametrize("kind", ["decoupled", "decoupled-paper", "fixed", "capi"])
def test_vmf_changes_nothing_but_joint_prototypes(method, kind):
    """One length, one normaliser, or a bias in its place: the pairing is allowed, and is that without it to the bit."""
    with_it, without = (Steps(small(method, kind, **{"prototypes.vmf": vmf})) for vmf in (True, False))
    for _ in range(2):
        assert with_it.take().terms == without.take().terms


def test_lengths_that_a_method_fixes_are_in_no_optimiser():
    """SwAV puts its prototypes back on the unit sphere, whatever the recipe says about lengths."""
    state = Steps(small("swav", **{"prototypes.learn_norm": True})).state
    assert [n for n, p in state.sets.named_parameters() if p.requires_grad] == ["cls.student_v"]
