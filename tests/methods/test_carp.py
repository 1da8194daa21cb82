"""CARP's terms beside brute force in float64, through the method's own functions, and when its teacher follows."""

import math
from dataclasses import replace

import pytest
import torch

from steps import Steps, small
from uncollapse.config.load import load_config
from uncollapse.losses.carp import random_blocks
from uncollapse.methods import carp
from uncollapse.methods.contract import At, Seen
from uncollapse.prototypes.sets import JointPrototypes
from uncollapse.schedules import cosine

N, D, K, BLOCK = 6, 5, 23, 4


def config(**keys):
    return load_config("carp-resnet50", {"prototypes.count": K, "method.block": BLOCK, "head.bottleneck": D, **keys})


def made(views=4, length=1.0):
    """Projections of very different lengths, and a set whose teacher's side is not the student's; float64."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(views, N, D, generator=generator, dtype=torch.float64)
    z = length * z * torch.rand(views, N, 1, generator=generator, dtype=torch.float64) * 4
    prototypes = JointPrototypes(K, D, True, 0.0, generator).double()
    with torch.no_grad():
        prototypes.teacher_v.normal_(generator=generator)
        prototypes.student_g.uniform_(0.5, 2.0, generator=generator)
    return z.requires_grad_(), z.detach()[:2] + 0.3, prototypes


def terms(c, z, teacher, prototypes, at):
    sets = {"cls": prototypes}
    targets = carp.assign(c, Seen({"cls": teacher}), sets, carp.memory(c), at)
    return carp.objective(c, Seen({"cls": z}), targets, sets, at)


def brute(z, teacher, prototypes, blocks, entropy_weight):
    """Block by block, image by image, pair by pair."""
    student_w = prototypes.student_v / prototypes.student_v.norm(dim=1, keepdim=True) * prototypes.student_g
    teacher_w = prototypes.teacher_v / prototypes.teacher_v.norm(dim=1, keepdim=True) * prototypes.teacher_g
    consistency, entropy, pairs = 0.0, 0.0, 0
    for block in blocks.tolist():
        p = [[torch.softmax(torch.stack([student_w[k] @ x for k in block]), 0) for x in view] for view in z]
        q = [[torch.softmax(torch.stack([teacher_w[k] @ x for k in block]), 0) for x in view] for view in teacher]
        for v in range(len(p)):
            for t in range(len(q)):
                if v != t:
                    for i in range(N):
                        consistency, pairs = consistency - (p[v][i] * q[t][i].detach()).sum().log(), pairs + 1
        rows = [row for view in [*p, *q] for row in view]
        mean = torch.stack(rows).sum(0) / len(rows)
        entropy = entropy + (math.log(BLOCK) + (mean * mean.log()).sum()) / len(blocks)
    return consistency / pairs, entropy_weight * entropy


@pytest.mark.parametrize("views", [2, 4])
@pytest.mark.parametrize("entropy_weight", [1.0, 0.5])
def test_terms_and_gradients_are_the_papers(views, entropy_weight):
    c = config(**{"method.entropy_weight": entropy_weight})
    z, teacher, prototypes = made(views)
    at = At(17, 1.0, 0.1, 3, None)
    found = terms(c, z, teacher, prototypes, at)
    assert list(found) == ["consistency", "entropy"]
    blocks = random_blocks(K, BLOCK, 3, 17)
    consistency, entropy = brute(z, teacher, prototypes, blocks, entropy_weight)
    torch.testing.assert_close(found["consistency"], consistency, rtol=0, atol=1e-10)
    torch.testing.assert_close(found["entropy"], entropy, rtol=0, atol=1e-10)
    wanted = [z, prototypes.student_v, prototypes.student_g]
    one = torch.autograd.grad(sum(found.values()), wanted)
    other = torch.autograd.grad(consistency + entropy, wanted)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_blocks_are_dealt_anew_each_step_and_no_prototype_twice():
    deals = [random_blocks(K, BLOCK, 3, step) for step in (17, 18)]
    for deal in deals:
        assert deal.shape == (K // BLOCK, BLOCK)
        assert len(deal.unique()) == deal.numel()
    assert not torch.equal(*deals)
    z, teacher, prototypes = made()
    steps = (At(step, 1.0, 0.1, 3, None) for step in (17, 17, 18))
    first, again, other = (terms(config(), z, teacher, prototypes, at)["consistency"].item() for at in steps)
    assert first == again != other


def test_the_length_of_a_projection_counts():
    """How sure a prediction is: at length 0 every inner product is 1 / block, and the mean is even."""
    at = At(0, 0.0, 0.0, 0, None)
    nothing = terms(config(), *made(length=0.0)[:1], torch.zeros(2, N, D, dtype=torch.float64), made()[2], at)
    assert nothing["consistency"].item() == pytest.approx(math.log(BLOCK), abs=1e-12)
    assert nothing["entropy"].item() == pytest.approx(0, abs=1e-12)
    assert carp.parts(config()).uninformed["consistency"] == pytest.approx(math.log(BLOCK))
    short, long = (terms(config(), *made(length=x), at)["consistency"].item() for x in (0.1, 1.0))
    assert abs(short - math.log(BLOCK)) < 0.1 * abs(long - math.log(BLOCK))
    assert not small("carp").head.normalise


def test_the_mean_assignment_is_over_student_and_teacher_rows():
    z, teacher, prototypes = made()
    at = At(0, 0.0, 0.0, 0, None)
    one, other = (terms(config(), z, t, prototypes, at)["entropy"].item() for t in (teacher, teacher * 3))
    assert abs(one - other) > 1e-3


def test_the_teacher_follows_before_the_students_step():
    """So that it averages the student of before: after the first step it is still the start."""
    before, after = (Steps(small("carp", **{"optim.lr": 3e-3})) for _ in range(2))
    assert before.state.parts.average == "before"
    after.state.parts = replace(after.state.parts, average="after")
    start = before.snapshot()
    for steps in (before, after):
        steps.take()
    momentum = cosine(0, before.total, 0.99, 1.0)
    for n, p in before.state.teacher.named_parameters():
        torch.testing.assert_close(p, start.teacher.get_parameter(n), rtol=0, atol=1e-7)
        late, was = after.state.teacher.get_parameter(n), start.teacher.get_parameter(n)
        step = before.state.student.get_parameter(n).detach() - was
        torch.testing.assert_close(late, was + (1 - momentum) * step, rtol=0, atol=1e-7)
    torch.testing.assert_close(before.state.prototypes().teacher_v, start.prototypes().teacher_v, rtol=0, atol=1e-7)
    assert (after.state.prototypes().teacher_v - start.prototypes().teacher_v).abs().max() > 1e-6
    student = before.snapshot()
    before.take()
    momentum = cosine(1, before.total, 0.99, 1.0)
    for n, p in before.state.teacher.named_parameters():
        expected = momentum * student.teacher.get_parameter(n) + (1 - momentum) * student.student.get_parameter(n)
        torch.testing.assert_close(p, expected.detach(), rtol=0, atol=1e-7)
