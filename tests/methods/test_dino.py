"""DINO's targets and centres beside brute force in float64."""

import pytest
import torch
import torch.nn.functional as F

from uncollapse.config.load import load_config
from uncollapse.methods import dino
from uncollapse.methods.contract import At, Seen
from uncollapse.prototypes.sets import FixedPrototypes, JointPrototypes
from uncollapse.targets.sinkhorn import centred_softmax, sinkhorn

END = At(0, 1e6, 1.0, 0, None)


def config(**keys):
    return load_config("dino-vits16", {"prototypes.count": 20, **keys})


@pytest.fixture
def made():
    generator = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(2, 48, 8, generator=generator) + 1.5, dim=-1)
    return z, FixedPrototypes(20, 8, generator)


def targets(c, z, prototypes, center):
    return dino.assign(c, Seen({"cls": z}), {"cls": prototypes}, {"center": center}, END)["cls"]


def test_centred_targets_are_the_papers(made):
    z, prototypes = made
    center = torch.linspace(-0.2, 0.2, 20)
    expected = centred_softmax(z.double() @ prototypes.weight.double().T, center.double(), 0.07)
    found = targets(config(), z, prototypes, center).dense().double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_sinkhorn_targets_are_balanced_over_both_views(made):
    z, prototypes = made
    c = config(**{"prototypes.targets": "sinkhorn"})
    center = torch.zeros(20)
    logits = z.double().flatten(0, 1) @ prototypes.weight.double().T / 0.07
    found = targets(c, z, prototypes, center).dense()
    torch.testing.assert_close(found.double().flatten(0, 1), sinkhorn(logits), rtol=0, atol=1e-4)
    spread = [t.dense().flatten(0, 1).sum(0).std() for t in (targets(a, z, prototypes, center) for a in (c, config()))]
    assert spread[0] < 0.5 * spread[1]
    dino.remember(c, Seen({"cls": z}), {"cls": prototypes}, {"center": center}, END)
    assert not center.any()


def test_the_centre_follows_the_mean_of_raw_logits():
    prototypes = FixedPrototypes(20, 5, torch.Generator().manual_seed(0))
    center, expected = torch.zeros(20), torch.zeros(20, dtype=torch.float64)
    for step in range(4):
        z = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(step))
        dino.remember(config(), Seen({"cls": z}), {"cls": prototypes}, {"center": center}, END)
        logits = torch.stack([prototypes.weight.double() @ x.double() for x in z.reshape(-1, 5)])
        expected = 0.9 * expected + 0.1 * logits.mean(0)
    torch.testing.assert_close(center.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_centre_of_probabilities_evens_out_the_targets_of_a_vmf_model():
    """Its fixed point is the log of the mean probabilities, which takes the marginal towards 1 / K."""
    generator = torch.Generator().manual_seed(0)
    prototypes = JointPrototypes(20, 8, True, 0.0, generator, vmf=True)
    with torch.no_grad():
        prototypes.teacher_g.copy_(torch.linspace(0.5, 1.5, 20)[:, None])
    z = F.normalize(torch.randn(2, 64, 8, generator=generator) + 1.0, dim=-1)
    c = config(**{"method.center": "probabilities", "prototypes.vmf": True, "teacher.center_momentum": 0.0})
    center = torch.zeros(20)
    before = targets(c, z, prototypes, center)
    dino.remember(c, Seen({"cls": z}), {"cls": prototypes}, {"center": center}, END)
    torch.testing.assert_close(center, before.dense().flatten(0, 1).mean(0).log(), rtol=1e-4, atol=1e-5)
    after = targets(c, z, prototypes, center).dense().flatten(0, 1).mean(0)
    assert (after - 1 / 20).abs().sum() < 0.6 * (before.dense().flatten(0, 1).mean(0) - 1 / 20).abs().sum()
