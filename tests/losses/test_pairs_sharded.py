"""Prototypes shared out over processes give the loss and the gradients of one process that has them all.

Tolerance: 1e-9 in float64, where only the order of sums differs.
"""

import multiprocessing

import pytest
import torch
import torch.multiprocessing

from uncollapse.distributed import shard, world
from uncollapse.losses.carp import carp_loss, fused_carp_loss, random_blocks
from uncollapse.losses.pairs import dino_loss, fused_dino_loss, fused_patch_loss, patch_weights
from uncollapse.prototypes.vmf import vmf_bias
from uncollapse.targets.softmax import SoftmaxTargets

K, D, N, VIEWS = 21, 6, 3, 4  # K divides by neither 2 nor 4


def random_rows(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def prototypes():
    return random_rows(0, K, D), random_rows(1, K, D), random_rows(2, K)


def images_of(rank):
    return random_rows(10 + rank, VIEWS, N, D), random_rows(20 + rank, 2, N, D)


def patches_of(rank):
    """As many masked patches as chance has it: other numbers on other ranks, and none on rank 1."""
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(rank)) < 0.3 * (rank != 1)
    weight = patch_weights(mask).double()
    return random_rows(30 + rank, len(weight), D), random_rows(40 + rank, len(weight), D), weight


def on_each_rank(rank, size, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    group = world()
    weight, weight_t, bias_t = prototypes()
    part = shard(K, group)
    out = {}

    mine = weight[part].clone().requires_grad_()
    (z, z_t), (zp, zp_t, row_weight) = images_of(rank), patches_of(rank)
    z.requires_grad_()
    zp.requires_grad_()
    targets = SoftmaxTargets(z_t, weight_t[part], 0.3, bias_t[part])
    loss = fused_dino_loss(list(z), mine, targets, 0.5, vmf_bias(mine, 0.5), group)
    out["dino"] = (loss.detach(), *torch.autograd.grad(loss, (z, mine)))
    targets = SoftmaxTargets(zp_t, weight_t[part], 0.3, bias_t[part])
    loss = fused_patch_loss(zp, mine, targets, 0.5, row_weight, None, group)
    out["patch"] = (loss.detach(), *torch.autograd.grad(loss, (zp, mine)))
    everything = weight.clone().requires_grad_()
    blocks = random_blocks(K, 5, 3, 4)
    loss = fused_carp_loss(list(z), everything, SoftmaxTargets(z_t, weight_t, 1.0), blocks, 1.5, group=group)
    out["carp"] = (loss.detach(), *torch.autograd.grad(loss, (z, everything)))
    torch.save(out, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    # One child imports torch, the ranks are forked from it.
    multiprocessing.set_forkserver_preload(["uncollapse.losses.carp", "uncollapse.prototypes.vmf"])
    torch.multiprocessing.start_processes(
        on_each_rank, (request.param, folder), request.param, start_method="forkserver"
    )
    return [torch.load(folder / f"{r}.pt") for r in range(request.param)]


def check(ranks, name, loss, grad_z, grad_weight, sharded=True):
    """``grad_z``: of the whole loss, by rank. A rank's own is of its own share, so it is size times as much."""
    size = len(ranks)
    tolerance = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(torch.stack([r[name][0] for r in ranks]).mean(), loss, **tolerance)
    for rank, own in enumerate(ranks):
        torch.testing.assert_close(own[name][1], size * grad_z[rank], **tolerance)
    gathered = torch.cat([r[name][2] for r in ranks]) if sharded else sum(r[name][2] for r in ranks) / size
    torch.testing.assert_close(gathered, grad_weight, **tolerance)


def test_pairs_of_views(ranks):
    weight, weight_t, bias_t = prototypes()
    weight.requires_grad_()
    z = [images_of(r)[0].requires_grad_() for r in range(len(ranks))]
    z_t = torch.cat([images_of(r)[1] for r in range(len(ranks))], dim=1)
    logits = [torch.cat(views) @ weight.T / 0.5 + vmf_bias(weight, 0.5) for views in zip(*z, strict=True)]
    loss = dino_loss(logits, list(SoftmaxTargets(z_t, weight_t, 0.3, bias_t).dense()))
    *grad_z, grad_weight = torch.autograd.grad(loss, (*z, weight))
    check(ranks, "dino", loss.detach(), grad_z, grad_weight)
    assert len({float(r["dino"][0]) for r in ranks}) == 1


def test_masked_patches_of_which_ranks_have_different_numbers(ranks):
    weight, weight_t, bias_t = prototypes()
    weight.requires_grad_()
    cases = [patches_of(r) for r in range(len(ranks))]
    z = [c[0].requires_grad_() for c in cases]
    loss = torch.zeros((), dtype=torch.float64)
    for own, (_, z_t, row_weight) in zip(z, cases, strict=True):
        log_p = torch.log_softmax(own @ weight.T / 0.5, dim=-1)
        cross = -(SoftmaxTargets(z_t, weight_t, 0.3, bias_t).dense() * log_p).sum(-1)
        loss = loss + (row_weight * cross).sum() / len(ranks)
    *grad_z, grad_weight = torch.autograd.grad(loss, (*z, weight))
    check(ranks, "patch", loss.detach(), grad_z, grad_weight)


def test_carp_takes_its_mean_over_all_ranks(ranks):
    weight, weight_t, _ = prototypes()
    weight.requires_grad_()
    z = [images_of(r)[0].requires_grad_() for r in range(len(ranks))]
    z_t = [torch.cat(views) for views in zip(*[images_of(r)[1] for r in range(len(ranks))], strict=True)]
    logits = [torch.cat(views) @ weight.T for views in zip(*z, strict=True)]
    loss = carp_loss(logits, [x @ weight_t.T for x in z_t], random_blocks(K, 5, 3, 4), 1.5)
    *grad_z, grad_weight = torch.autograd.grad(loss, (*z, weight))
    check(ranks, "carp", loss.detach(), grad_z, grad_weight, sharded=False)
