"""Groups of parameters and rates, beside the formulas in float64."""

import math

import pytest
import torch
from torch import nn

from steps import Steps, small
from uncollapse.training.optim import build_optimizer

KEYS = {"optim.name": "lars", "optim.lr": 0.3, "optim.weight_decay": 0.1, "optim.weight_decay_end": 0.1}


def roles(state):
    return {id(p): g["role"] for g in state.optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize("decay_biases", [False, True])
def test_biases_decay_only_where_the_recipe_says_so(decay_biases):
    state = Steps(small("swav", **{"optim.decay_biases": decay_biases})).state
    found = roles(state)
    for parameter in state.student.parameters():
        plain = parameter.ndim == 1 and not decay_biases
        assert found[id(parameter)] == ("plain" if plain else "decay")
    assert found[id(state.prototypes().student_v)] == "prototypes"


@pytest.mark.parametrize("decay_biases", [False, True])
def test_lars_adapts_what_decays(decay_biases):
    """SwAV's optimiser adapts the rate of every tensor to its norm, DINO's and CARP's of matrices alone."""
    c = small("swav", **KEYS, **{"optim.decay_biases": decay_biases})
    model = nn.Linear(4, 3).double()
    optimizer = build_optimizer(c, model, nn.Module())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.3, 0.0 if group["role"] == "plain" else 0.1
    optimizer.step()
    for name, p in model.named_parameters():
        w, g = before[name], p.grad
        adapted = 0.001 * w.norm() / (g.norm() + 0.1 * w.norm()) * (g + 0.1 * w)
        expected = w - 0.3 * (adapted if name == "weight" or decay_biases else g)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-12)


def test_the_warm_up_may_start_above_zero():
    for start in (0.0, 0.001):
        keys = {"optim.warmup_start": start, "optim.lr": 0.01, "optim.lr_batch": 64, "optim.warmup_epochs": 3 / 44}
        steps = Steps(small("dino", **keys))  # 16 images a step, 44 steps an epoch
        rates = []
        for _ in range(3):
            steps.take()
            rates.append(steps.state.optimizer.param_groups[0]["lr"])
        assert rates == pytest.approx([start / 4, (start + 0.01) / 8, 0.01 / 4])


@pytest.mark.parametrize("of", ["tensor", "encoder"])
def test_gradients_are_clipped_one_by_one_or_as_a_whole(of):
    """As a whole the prototypes are left out, as in MSN's released code."""
    c = small("dino", **{"optim.clip": 0.25, "optim.clip_of": of})
    free, clipped = Steps(small("dino")), Steps(c)
    for steps in (free, clipped):
        steps.take()

    def gradients(steps):
        return [p.grad for p in steps.state.student.parameters()], [steps.state.prototypes().student_v.grad]

    (encoder, prototypes), found = gradients(free), gradients(clipped)
    whole = torch.cat([g.flatten() for g in encoder]).norm()
    assert whole > 0.25
    for was, now in zip(encoder, found[0], strict=True):
        norm = whole if of == "encoder" else was.norm()
        torch.testing.assert_close(now, was * min(1, 0.25 / (norm.item() + 1e-6)), rtol=1e-5, atol=1e-8)
    norm = 0.0 if of == "encoder" else prototypes[0].norm().item()
    torch.testing.assert_close(found[1][0], prototypes[0] * min(1, 0.25 / (norm + 1e-6)), rtol=1e-5, atol=1e-8)


def test_schedules_may_be_planned_for_longer_than_the_run():
    """MSN's recipe: 1.25 times as long, the teacher's momentum on a straight line."""
    keys = {"run.schedule_span": 1.25, "teacher.momentum_shape": "linear", "optim.lr": 0.01, "optim.lr_batch": 16}
    steps = Steps(small("dino", **keys, **{"optim.weight_decay": 0.1, "optim.weight_decay_end": 0.5}), total=4)
    for step in range(4):
        before = steps.snapshot()
        steps.take()
        group, share = steps.state.optimizer.param_groups[0], 0.5 * (1 + math.cos(math.pi * step / 5))
        assert group["lr"] == pytest.approx(1e-5 + (0.01 - 1e-5) * share)
        assert group["weight_decay"] == pytest.approx(0.5 - 0.4 * share)
        momentum = 0.99 + 0.01 * step / 5
        name, now = next(iter(steps.state.teacher.named_parameters()))
        student, was = (net.get_parameter(name) for net in (steps.state.student, before.teacher))
        torch.testing.assert_close(now, momentum * was + (1 - momentum) * student.detach(), rtol=1e-6, atol=1e-8)
