"""Input that cannot be meant is refused by every function of the mathematics alike, in one line of its own."""

import re

import pytest
import torch

from uncollapse import MixtureLayer, PrototypeMonitor, nearest_cosine, usage_counts
from uncollapse.losses.carp import carp_loss, fused_carp_loss, random_blocks
from uncollapse.losses.cross_entropy import fused_cross_entropy
from uncollapse.losses.koleo import koleo_proto, nearest_neighbours
from uncollapse.losses.logits import fused_dino_loss_on_logits
from uncollapse.losses.mean_entropy import me_max
from uncollapse.losses.pairs import dino_loss, fused_dino_loss, fused_patch_loss, patch_weights
from uncollapse.prototypes.mixture import OnlineMixture
from uncollapse.prototypes.vmf import vmf_bias
from uncollapse.targets.sinkhorn import centred_softmax, sinkhorn, sinkhorn_offsets
from uncollapse.targets.softmax import SoftmaxTargets

N, K, D = 6, 8, 4
RNG = torch.Generator().manual_seed(0)
W, W_TEACHER, CENTER = (torch.randn(*shape, generator=RNG) for shape in ((K, D), (K, D), (K,)))
BLOCKS = random_blocks(K, 4, 0, 0)


def z(n=N, d=D):
    return torch.randn(n, d, generator=RNG)


def probabilities(n=N, k=K):
    return torch.softmax(torch.randn(n, k, generator=RNG), -1)


def soft(n=N, temperature=0.1, **parts):
    return SoftmaxTargets(**{"z": torch.stack([z(n), z(n)]), "weight": W_TEACHER, "temperature": temperature, **parts})


def refused(call, says):
    with pytest.raises(ValueError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


MEANS = {
    "dino": lambda n: dino_loss([z(n) @ W.T] * 3, [probabilities(n)] * 2),
    "fused dino": lambda n: fused_dino_loss([z(n)] * 3, W, soft(n), 0.1),
    "fused dino, arrays": lambda n: fused_dino_loss([z(n)] * 3, W, [probabilities(n)] * 2, 0.1),
    "on logits": lambda n: fused_dino_loss_on_logits([z(n) @ W.T] * 3, [probabilities(n)] * 2),
    "carp": lambda n: carp_loss([z(n) @ W.T] * 3, [z(n) @ W.T] * 2, BLOCKS),
    "fused carp": lambda n: fused_carp_loss([z(n)] * 3, W, soft(n), BLOCKS),
    "me_max": lambda n: me_max(z(n), W, 0.1),
    "sinkhorn": lambda n: sinkhorn(z(n) @ W.T),
    "sinkhorn_offsets": lambda n: sinkhorn_offsets(z(n), W, 0.1),
    "centred_softmax": lambda n: centred_softmax(z(n) @ W.T, CENTER, 0.1),
}


@pytest.mark.parametrize("name", MEANS)
def test_an_empty_batch_has_no_mean(name):
    MEANS[name](N)
    refused(lambda: MEANS[name](0), "empty batch")


def test_a_sum_over_no_rows_is_nothing():
    w = W.clone().requires_grad_()
    loss = fused_patch_loss(z(0), w, SoftmaxTargets(z(0), W_TEACHER, 0.1), 0.1, torch.zeros(0))
    loss.backward()
    assert float(loss.detach()) == 0 == float(w.grad.abs().sum())


SHARP = {
    "fused dino": lambda t: fused_dino_loss([z()] * 3, W, [probabilities()] * 2, t),
    "fused patch": lambda t: fused_patch_loss(z(), W, probabilities(), t, torch.ones(N)),
    "fused cross entropy": lambda t: fused_cross_entropy(
        torch.stack([z()] * 2), W, [probabilities()] * 2, t, torch.ones(2, 2), torch.ones(N)
    ),
    "on logits": lambda t: fused_dino_loss_on_logits([z() @ W.T] * 3, [probabilities()] * 2, t),
    "targets": lambda t: soft(temperature=t),
    "fused carp": lambda t: fused_carp_loss([z()] * 3, W, soft(), BLOCKS, temperature=t),
    "me_max": lambda t: me_max(z(), W, t),
    "sinkhorn_offsets": lambda t: sinkhorn_offsets(z(), W, t),
    "centred_softmax": lambda t: centred_softmax(z() @ W.T, CENTER, t),
    "vmf_bias": lambda t: vmf_bias(W, t),
}


@pytest.mark.parametrize("name", SHARP)
@pytest.mark.parametrize("temperature", [0.0, -0.1, float("nan")])
def test_a_temperature_is_above_zero(name, temperature):
    SHARP[name](0.1)
    refused(lambda: SHARP[name](temperature), rf"temperature must be above 0, got {temperature}")


SHAPES = {
    "one row for all: dino": (lambda: dino_loss([z() @ W.T] * 3, [probabilities(1)] * 2), r"\(1, 8\)"),
    "one row for all: on logits": (
        lambda: fused_dino_loss_on_logits([z() @ W.T] * 3, [probabilities(1)] * 2),
        r"\(1, 8\)",
    ),
    "one row for all: fused": (lambda: fused_dino_loss([z()] * 3, W, [probabilities(1)] * 2, 0.1), "is 1, not 6"),
    "one row for all: patch": (lambda: fused_patch_loss(z(), W, probabilities(1), 0.1, torch.ones(N)), "is 1, not 6"),
    "one row for all: carp": (lambda: carp_loss([z() @ W.T] * 3, [z(1) @ W.T] * 2, BLOCKS), r"\(1, 8\)"),
    "one row for all: fused carp": (lambda: fused_carp_loss([z()] * 3, W, soft(1), BLOCKS), "6 images.*1 images"),
    "other numbers of views' rows": (lambda: fused_dino_loss([z(), z(1)], W, soft(), 0.1), r"\(6, 4\).*\(1, 4\)"),
    "the same, carp": (lambda: fused_carp_loss([z(), z(1)], W, soft(), BLOCKS), r"\(6, 4\).*\(1, 4\)"),
    "one weight for all rows": (
        lambda: fused_patch_loss(z(), W, probabilities(), 0.1, torch.ones(1)),
        r"row_weight is \(1,\), not \(6,\)",
    ),
    "targets of other prototypes": (lambda: fused_dino_loss([z()] * 3, W[:5], soft(), 0.1), "is 8, not 5"),
    "targets' dimensions": (lambda: soft(weight=W[:, :3]), "4 dimensions, their prototypes 3"),
    "targets' bias": (lambda: soft(bias=torch.zeros(1)), r"bias of the targets is \(1,\), not \(8,\)"),
    "dimensions": (lambda: fused_dino_loss([z(d=3)] * 3, W, soft(), 0.1), "is 4, not 3"),
    "carp's dimensions": (lambda: fused_carp_loss([z(d=3)] * 3, W, soft(), BLOCKS), "3 dimensions.*prototypes 4"),
    "carp's bias": (
        lambda: fused_carp_loss([z()] * 3, W, soft(), BLOCKS, bias=torch.zeros(1)),
        r"bias is \(1,\), not \(8,\)",
    ),
    "carp's blocks": (lambda: fused_carp_loss([z()] * 3, W, soft(), BLOCKS + 1), "blocks.*0 to 7"),
    "carp's blocks, plain": (lambda: carp_loss([z() @ W.T] * 3, [z() @ W.T] * 2, BLOCKS - 1), "blocks.*0 to 7"),
    "me_max's dimensions": (lambda: me_max(z(d=3), W, 0.1), "3 dimensions.*prototypes 4"),
    "me_max's bias": (lambda: me_max(z(), W, 0.1, torch.zeros(1)), r"bias is \(1,\), not \(8,\)"),
    "sinkhorn's dimensions": (lambda: sinkhorn_offsets(z(d=3), W, 0.1), "3 dimensions.*prototypes 4"),
    "sinkhorn's bias": (lambda: sinkhorn_offsets(z(), W, 0.1, bias=torch.zeros(1)), r"bias is \(1,\), not \(8,\)"),
    "sinkhorn's iterations": (lambda: sinkhorn(z() @ W.T, 0), "at least one iteration"),
    "the centre": (lambda: centred_softmax(z() @ W.T, torch.zeros(1), 0.1), r"center is \(1,\), not \(8,\)"),
    "a mask of numbers": (lambda: patch_weights(torch.ones(3, 4)), "boolean"),
    "a mixture's rows": (lambda: OnlineMixture(K, D, N).responsibilities(z(d=3)), r"\(6, 3\)"),
    "a mixture of nothing": (lambda: OnlineMixture(0, 0, N), "above 0: components = 0, dim = 0"),
    "a mixture layer's projections": (lambda: MixtureLayer(K, D, N)(z(N, 7)), "projections have 7 dimensions"),
    "a monitor's cosines": (lambda: PrototypeMonitor(K, N).observe(z(N, K - 1)), r"must be \(rows, 8\), got \(6, 7\)"),
    "a monitor's prototypes": (
        lambda: PrototypeMonitor(K + 1, N).observe_projections(z(), W),
        "8 vectors; this monitor was made for 9 prototypes",
    ),
    "a monitor's projections": (
        lambda: PrototypeMonitor(K, N).observe_projections(z(N, 7), W),
        "projections have 7 dimensions, their prototypes 4",
    ),
    "views that nobody flattened": (
        lambda: PrototypeMonitor(K, N).observe_projections(torch.stack([z(), z()]), W),
        "flatten views",
    ),
    "cosines as argmaxes": (lambda: usage_counts(z(), K), "argmax is of torch.float32; pass indices"),
    "one vector": (lambda: nearest_cosine(W[:1]), "K ≥ 2"),
    "a mixture's beta": (lambda: OnlineMixture(K, D, N).responsibilities(z(), -1.0), "beta must be above 0"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_would_broadcast_or_break_are_named(name):
    refused(*SHAPES[name])


@pytest.mark.parametrize("bad", [-1e-3, float("nan"), float("inf")])
def test_weights_are_finite_and_not_negative(bad):
    weight, pairing = torch.ones(N), torch.ones(1, 1)
    weight[2] = bad
    refused(lambda: fused_patch_loss(z(), W, probabilities(), 0.1, weight), "row_weight .* 0 or above.* row 2|place 2")
    pairing[0, 0] = bad
    call = lambda: fused_cross_entropy(z()[None], W, [probabilities()], 0.1, pairing, torch.ones(N))  # noqa: E731
    refused(call, "pairing .* 0 or above")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("search", [koleo_proto, nearest_neighbours])
def test_prototypes_too_long_to_normalise_are_named(dtype, search):
    w = torch.randn(9, D, generator=RNG).to(dtype)
    w[5] = 1e30 if dtype != torch.float64 else 1e200
    refused(lambda: search(w), re.escape("row 5 of w (1 in all)"))
    w[5] = torch.inf
    refused(lambda: search(w), re.escape("row 5 of w (1 in all)"))
    refused(lambda: koleo_proto(w, neighbours=torch.arange(9).roll(1)), re.escape("row 5 of w"))
