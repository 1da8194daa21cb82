"""DINO's targets beside brute force in float64."""

import pytest
import torch
import torch.nn.functional as F

from uncollapse.methods.dino import DINO
from uncollapse.prototypes.sets import FixedPrototypes
from uncollapse.targets.sinkhorn import sinkhorn


@pytest.fixture
def made():
    generator = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(2, 48, 8, generator=generator) + 1.5, dim=-1)
    return z, FixedPrototypes(20, 8, generator)


def test_centred_targets_are_the_papers(made):
    z, prototypes = made
    objective = DINO(20)
    objective.center.copy_(torch.linspace(-0.2, 0.2, 20))
    expected = ((z.double() @ prototypes.weight.double().T - objective.center.double()) / 0.1).softmax(-1)
    torch.testing.assert_close(objective.targets(z, prototypes, 0.1).dense().double(), expected, rtol=0, atol=1e-5)


def test_sinkhorn_targets_are_balanced_over_both_views(made):
    z, prototypes = made
    objective = DINO(20, target="sinkhorn")
    logits = z.double().flatten(0, 1) @ prototypes.weight.double().T / 0.05
    found = objective.targets(z, prototypes, 0.05).dense()
    torch.testing.assert_close(found.double().flatten(0, 1), sinkhorn(logits), rtol=0, atol=1e-4)
    spread = [
        t.dense().flatten(0, 1).sum(0).std()
        for t in (objective.targets(z, prototypes, 0.05), DINO(20).targets(z, prototypes, 0.05))
    ]
    assert spread[0] < 0.5 * spread[1]
    before = objective.center.clone()
    objective.update_center(z.mean((0, 1)), prototypes)
    assert torch.equal(objective.center, before)
