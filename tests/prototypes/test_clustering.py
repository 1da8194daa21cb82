"""CAPI's clustering of the teacher's projections beside a linear layer, dense Sinkhorn and torch's AdamW in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ranks import on_ranks
from uncollapse.config.schema import ClusteringConfig
from uncollapse.prototypes.clustering import ClusteredPrototypes
from uncollapse.targets.positions import at_positions, sinkhorn_by_position
from uncollapse.targets.sinkhorn import sinkhorn, sinkhorn_offsets

K, D, P, N, STEPS = 9, 5, 3, 8, 4
CONFIG = ClusteringConfig(lr=0.05)


def rows(*shape, seed=0):
    """Of any length: the clustering is of directions."""
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clustering(**more):
    return ClusteredPrototypes(K, D, CONFIG, torch.Generator().manual_seed(1), **more).double()


class Plain:
    """The same, as a module with an optimiser and arrays of all assignments."""

    def __init__(self, like):
        self.layer = nn.Linear(D, K).double()
        with torch.no_grad():
            self.layer.weight.copy_(like.weight)
            self.layer.bias.copy_(like.bias)
        self.optimiser = torch.optim.AdamW(self.layer.parameters(), betas=(0.9, 0.95))

    def step(self, z, rate):
        """``z (P, n, D)``: every position has its own Sinkhorn."""
        logits = self.layer(z / z.norm(dim=-1, keepdim=True))
        assigned = torch.stack([sinkhorn(part.detach() / 0.06) for part in logits])
        loss = -(assigned * torch.log_softmax(logits / 0.12, dim=-1)).sum(-1).mean()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.param_groups[0]["lr"] = rate
        self.optimiser.step()


def assert_like(prototypes, plain):
    torch.testing.assert_close(prototypes.weight, plain.layer.weight.detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(prototypes.bias, plain.layer.bias.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(N,), (P, N)])
def test_steps_are_those_of_a_linear_layer_with_adamw(shape):
    prototypes = clustering()
    plain, start = Plain(prototypes), prototypes.weight.clone()
    for step in range(STEPS):
        z, progress = rows(*shape, seed=step), 0.2 + step / 10
        prototypes.observe(z, progress)
        prototypes.after_step()
        plain.step(z.view(-1, N, D), prototypes.rate(progress))
    assert_like(prototypes, plain)
    assert (prototypes.weight - start).abs().amax(1).min() > 0.01
    assert prototypes.bias.abs().min() > 0


def test_a_row_of_weight_w_counts_as_w_rows():
    counts = torch.tensor([1, 0, 3, 2, 1, 1, 0, 2])
    weighted, repeated = clustering(), clustering()
    for step in range(STEPS):
        z = rows(N, seed=step)
        weighted.observe(z, 0.5, counts.double())
        repeated.observe(z.repeat_interleave(counts, 0), 0.5)
        for one in (weighted, repeated):
            one.after_step()
    for name, value in repeated.state_dict().items():
        torch.testing.assert_close(weighted.state_dict()[name], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("budget", [1, 1 << 28])
def test_sinkhorn_takes_weights_of_rows(budget):
    """Scores so far apart that some columns start with next to nothing."""
    z, weight, counts = rows(150), 20 * rows(40, seed=1), torch.arange(150) % 4
    found = sinkhorn_offsets(z, weight, 0.06, row_weight=counts.double(), budget=budget)
    expected = sinkhorn_offsets(z.repeat_interleave(counts, 0), weight, 0.06)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_targets_have_the_offsets_of_their_own_position():
    z, weight, bias = rows(P, N), rows(K, seed=1), rows(2, seed=2).flatten()[:K]
    offsets = sinkhorn_by_position(z, weight, 0.3, 3, bias)
    place, image = torch.tensor([2, 0, 2, 1]), torch.tensor([5, 0, 1, 7])
    found = at_positions(z[place, image], place, weight, 0.3, bias, offsets).dense()
    for row, p, i in zip(found, place, image, strict=True):
        torch.testing.assert_close(row, sinkhorn(z[p] @ weight.T / 0.3 + bias)[i])


def test_targets_are_by_the_prototypes_that_the_loss_was_of():
    """The layer moves after the student's step; without a loss it does not move."""
    prototypes = clustering(own_student=True)
    start = prototypes.state_dict()["weight"].clone()
    prototypes.after_step()
    prototypes.observe(rows(N), 0.5)
    assert torch.equal(prototypes.targets(rows(N), 0.06).weight, start)
    prototypes.after_step()
    moved = prototypes.weight.clone()
    assert not torch.equal(moved, start)
    prototypes.observe(rows(0), 0.5)  # a step without a token
    prototypes.after_step()
    assert torch.equal(prototypes.weight, moved)


@pytest.mark.parametrize("own_student", [False, True])
def test_the_layer_learns_from_the_clustering_alone_and_the_encoder_never_from_it(own_student):
    prototypes, z = clustering(own_student=own_student), rows(N).requires_grad_()
    prototypes.observe(z, 0.5)
    prototypes.after_step()
    assert z.grad is None
    layer = {"weight", "bias"} | {f"{n}_{m}" for n in ("weight", "bias") for m in ("first", "second")} | {"steps"}
    assert set(dict(prototypes.named_buffers())) == layer
    assert set(dict(prototypes.named_parameters())) == ({"student_v", "student_g"} if own_student else set())
    weight, bias = prototypes.affine("student", 0.1)
    logits = z @ weight.T / 0.1 + (0 if bias is None else bias)
    torch.logsumexp(logits, 1).sum().backward()
    assert z.grad is not None
    assert prototypes.weight.grad is None
    assert prototypes.bias.grad is None
    if own_student:
        assert prototypes.student_v.grad.abs().amax(1).min() > 0
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(K, dtype=torch.float64))
    else:
        assert torch.equal(weight, prototypes.affine("teacher", 0.1)[0])


@pytest.mark.parametrize("own_student", [False, True])
def test_logits_are_those_of_the_layer(own_student):
    """Where its temperature is a method's, as of prototypes of length 1."""
    prototypes, z = clustering(own_student=own_student), rows(N)
    prototypes.bias.normal_()
    weight, bias = prototypes.affine("teacher", 0.06)
    expected = F.linear(z, prototypes.weight, prototypes.bias) / (0.06 if own_student else 0.06 * D**0.5)
    torch.testing.assert_close(z @ weight.T / 0.06 + bias, expected)
    assert own_student or 0.6 < weight.norm(dim=1).mean() < 1.4


def test_the_rate_is_the_published_schedule():
    """A tenth of the steps to warm up, then 0.8 of half a cosine over the others."""
    prototypes, total, warmup = clustering(), 5000, 500
    for step in (0, 100, 499, 500, 2000, 4999):
        if step < warmup:
            expected = 0.05 * step / (warmup - 1)
        else:
            expected = 0.025 * (1 + math.cos(math.pi * 0.8 * (step - warmup) / (total - warmup)))
        assert prototypes.rate(step / total) == pytest.approx(expected, rel=3e-3)


def test_a_copy_from_the_state_goes_on_to_the_same_bits():
    one, other = clustering(), clustering()
    for step in range(STEPS):
        one.observe(rows(N, seed=step), step / STEPS)
        one.after_step()
        if step == 1:
            other.load_state_dict({name: value.clone() for name, value in one.state_dict().items()})
        if step > 1:
            other.observe(rows(N, seed=step), step / STEPS)
            other.after_step()
    for name, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def learn(group, z):
    prototypes = clustering()
    for step, part in enumerate(z):
        own = part if group is None else part.chunk(group.size(), dim=1)[group.rank()]
        prototypes.observe(own, 0.2 + step / 10, group=group)
        prototypes.after_step()
    return prototypes.state_dict()


def test_ranks_add_up_their_rows(tmp_path):
    z = rows(STEPS, P, N)
    one, other = on_ranks(learn, 2, tmp_path, z)
    for name, value in learn(None, z).items():
        assert torch.equal(one[name], other[name]), name
        torch.testing.assert_close(one[name], value, rtol=1e-9, atol=1e-11)
