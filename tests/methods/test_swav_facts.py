"""What SwAV's released code does beyond its equations, and so do we."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steps import Steps, small
from uncollapse.config.load import load_config
from uncollapse.methods import swav
from uncollapse.methods.balance import balance_memory, balanced, remember_balance
from uncollapse.methods.contract import At, Seen
from uncollapse.prototypes.sets import JointPrototypes
from uncollapse.targets.sinkhorn import sinkhorn

ROWS, EPOCH = 6, 4


def projections(step, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return F.normalize(torch.randn(3, ROWS, 8, generator=generator, dtype=torch.float64), dim=-1)


def codes_step_by_step(queue, queue_epoch, steps=14):
    keys = {"prototypes.count": 20, "head.bottleneck": 8, "run.batch": ROWS}
    c = load_config("swav-resnet50", {**keys, "method.queue": queue, "method.queue_epoch": queue_epoch})
    sets = {
        "cls": JointPrototypes(
            20, 8, False, 0.0, torch.Generator().manual_seed(0), followed=False, on_sphere=True
        ).double()
    }
    memory = {n: t.double() if t.is_floating_point() else t for n, t in balance_memory(c, swav.parts(c)).items()}
    for step in range(steps):
        at = At(step, step / EPOCH, 0.0, 0, None)
        seen = swav.see_teacher(c, None, None, Seen({"cls": projections(step)}))
        targets = balanced(c, swav.assign(c, seen, sets, memory, at), memory, at)
        yield [t.dense()[0] for t in targets.values()], sets["cls"].student_v.detach()
        remember_balance(c, targets, seen, memory, at)


@pytest.mark.parametrize("queue_epoch", [0.0, 1.0, 2.0])
def test_a_queue_is_filled_from_its_epoch_on_and_used_once_it_is_full(queue_epoch):
    """Balanced with exactly the rows of the last steps, beside brute force; before that, without any."""
    length, first = 3, int(queue_epoch * EPOCH)
    for step, (codes, weight) in enumerate(codes_step_by_step(length * ROWS, queue_epoch)):
        full = step >= first + length
        steps = [step, *(range(step - 1, step - 1 - length, -1) if full else [])]
        for view, found in enumerate(codes):
            rows = torch.cat([projections(s)[view] for s in steps])
            expected = sinkhorn(rows @ weight.double().T / 0.05, 3)[:ROWS]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, msg=f"step {step}, view {view}")


def test_prototypes_are_unit_vectors_before_the_first_and_after_every_step():
    steps = Steps(small("swav"))
    for _ in range(3):
        norms = steps.state.prototypes().student_v.norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones_like(norms))
        steps.take()


def test_the_head_may_have_relu():
    head = Steps(small("swav", **{"head.activation": "relu"})).state.student.head
    assert [type(m) for m in head.mlp if not isinstance(m, nn.Linear | nn.BatchNorm1d)] == [nn.ReLU, nn.ReLU]
    assert load_config("swav-resnet50").head.activation == "relu"
