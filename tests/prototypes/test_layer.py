"""The mixture as a head's last layer: cosines forward, one update a step, targets of the teacher's projections."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ranks import on_ranks
from uncollapse import MixtureLayer, OnlineMixture, fused_dino_loss, fused_dino_loss_on_logits

K, D = 24, 6


def layer(rows=32, **options):
    return MixtureLayer(K, D, rows, generator=torch.Generator().manual_seed(0), **options)


def projections(*shape, seed=0):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed))


def test_logits_are_cosines_with_the_mixture_s_directions():
    last, z = layer(), 3 * projections(2, 5).requires_grad_()
    expected = F.cosine_similarity(z.unsqueeze(-2), last.mixture.directions(), dim=-1)
    torch.testing.assert_close(last(z), expected)
    (grad,) = torch.autograd.grad(last(z).square().sum(), z)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), z)[0])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(last(z), expected)


def test_updates_and_targets_are_those_of_the_mixture_over_unit_vectors():
    last, z = layer(), 5 * projections(2, 16)
    mixture, unit = copy.deepcopy(last.mixture), F.normalize(z, dim=-1)
    last.update(z)
    mixture.observe(unit.flatten(0, 1))
    torch.testing.assert_close(last.weight, mixture.directions())
    torch.testing.assert_close(last.targets(z).dense(), mixture.responsibilities(unit.flatten(0, 1)).view(2, 16, K))
    last.update(z, torch.arange(32.0).view(2, 16))
    mixture.observe(unit.flatten(0, 1), torch.arange(32.0))
    torch.testing.assert_close(last.weight, mixture.directions())


def test_it_replaces_the_last_layer_of_a_head_that_dino_trains():
    """The student's head ends in it, the teacher's in nothing; both forms of the loss agree, and the encoder learns."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, D))
    teacher = copy.deepcopy(student).requires_grad_(False)
    last = layer(rows=2 * 64)
    student.append(last)
    teacher.append(nn.Identity())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    assert [len(list(m.parameters())) for m in (last, student, teacher)] == [0, 4, 4]  # averaged in pairs, as DINO does
    losses = []
    for step in range(40):
        x = torch.randn(64, 12, generator=torch.Generator().manual_seed(step % 4))
        views = [x + 0.1 * torch.randn(64, 12) for _ in range(3)]
        z_teacher = torch.stack([teacher(v) for v in views[:2]])
        last.update(z_teacher)
        targets = last.targets(z_teacher)
        loss = fused_dino_loss_on_logits([student(v) for v in views], list(targets.dense()), temperature=0.1)
        z = [F.normalize(student[:-1](v), dim=-1) for v in views]
        torch.testing.assert_close(loss, fused_dino_loss(z, last.weight, targets, 0.1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
            slow.lerp_(fast.detach(), 0.05)
        losses.append(float(loss.detach()))
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_its_state_is_the_mixture_s_and_moves_with_the_module():
    last, other = layer(), MixtureLayer(K, D, 32)
    last.update(projections(32))
    other.load_state_dict(last.state_dict())
    assert torch.equal(other(projections(3)), last(projections(3)))
    assert set(last.state_dict()) == {f"mixture.{name}" for name in OnlineMixture(K, D, 32).state_dict()}
    assert last.double()(projections(3)).dtype == torch.float64


def test_a_row_that_is_no_number_is_refused():
    z = projections(8)
    z[3] = torch.nan
    with pytest.raises(ValueError, match="row 3"):
        layer().update(z)


def updated(group):
    rank = torch.distributed.get_rank(group)
    last = layer().double()
    last.update(projections(4, 8).double()[2 * rank : 2 * rank + 2], torch.arange(32.0).view(4, 8)[2 * rank :][:2])
    return last.weight


def test_ranks_learn_from_all_rows(tmp_path):
    one = layer().double()
    one.update(projections(4, 8).double(), torch.arange(32.0).view(4, 8))
    for weight in on_ranks(updated, 2, tmp_path):
        torch.testing.assert_close(weight, one.weight, rtol=1e-12, atol=1e-12)
