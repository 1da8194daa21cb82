"""What ranks compute together is what one process computes alone: KoLeo-Proto in shards, and whole training runs."""

import multiprocessing
import os
from dataclasses import replace

import pytest
import torch

from ranks import on_ranks
from uncollapse.config.load import load_config
from uncollapse.config.schema import arm_keys
from uncollapse.config.tiny import tiny
from uncollapse.distributed import shard
from uncollapse.losses.koleo import koleo_proto, nearest_neighbours
from uncollapse.run_folder.checkpoint import load_checkpoint

multiprocessing.set_forkserver_preload(["uncollapse.training.run", "uncollapse.training.summary", "timm", "ranks"])
KINDS = ("joint", "joint-sinkhorn", "koleo", "decoupled")
STEPS = 4

# --- KoLeo-Proto, each rank with some of the rows -----------------------------------------------------------


def prototypes(k=301, d=24):
    """Clusters, so that many nearest neighbours lie on other ranks; exact duplicates and a zero row among them."""
    g = torch.Generator().manual_seed(0)
    w = (torch.randn(20, 1, d, generator=g) + 0.05 * torch.randn(20, 16, d, generator=g)).reshape(-1, d)
    w = w[torch.randperm(len(w), generator=g)[:k]]
    w[200], w[17] = w[3], 0
    return w


def sharded(group):
    out = {}
    for dtype in (torch.float32, torch.float64):
        w = prototypes().to(dtype)
        mine = w[shard(len(w), group)].clone().requires_grad_()
        neighbours = nearest_neighbours(mine, group=group)
        for name, options in (("searched", {}), ("given", {"neighbours": neighbours}), ("tiles", {"block": 9})):
            value = koleo_proto(mine, group=group, **options)
            (gradient,) = torch.autograd.grad(3 * value, mine)
            out[f"{dtype} {name}"] = (value.detach(), gradient, neighbours)
    uneven = prototypes()[:50]
    some = [uneven[:1], uneven[1:20], uneven[20:20], uneven[20:]] if group.size() == 4 else [uneven[:0], uneven]
    out["uneven"] = (koleo_proto(some[group.rank()], group=group), torch.zeros(0), torch.zeros(0))
    return out


@pytest.mark.parametrize("size", [2, 4])
def test_shards_give_the_value_and_gradient_of_the_whole(size, tmp_path):
    """The same neighbours. 1e-12 in float64, 2e-6 of the largest gradient in float32: orders of sums differ."""
    ranks = on_ranks(sharded, size, tmp_path)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
        w = prototypes().to(dtype).requires_grad_()
        value = koleo_proto(w)
        (gradient,) = torch.autograd.grad(3 * value, w)
        for name in ("searched", "given", "tiles"):
            found = [r[f"{dtype} {name}"] for r in ranks]
            assert torch.equal(torch.cat([f[2] for f in found]), nearest_neighbours(w))
            assert len({float(f[0]) for f in found}) == 1
            torch.testing.assert_close(found[0][0], value.detach(), rtol=tolerance, atol=0)
            bound = tolerance * float(gradient.abs().max())
            torch.testing.assert_close(torch.cat([f[1] for f in found]), gradient, rtol=0, atol=bound)
    torch.testing.assert_close(ranks[0]["uneven"][0], koleo_proto(prototypes()[:50]))


# --- training runs ------------------------------------------------------------------------------------------


def recipe(kind):
    """Batch norm in the convolutions and in the head; nothing that is random by rank."""
    options = {**arm_keys(kind), "optim.name": "sgd", "optim.lr": 0.3, "optim.warmup_epochs": 0.0}
    options |= {"prototypes.freeze_epochs": 0.0, "prototypes.koleo_every": 2, "teacher.momentum": 0.9}
    config = tiny(load_config("demo", options))
    assert config.backbone.name == "conv3"
    assert config.head.batch_norm
    return replace(config, backbone=replace(config.backbone, drop_path=0.0))


def trained(folder, kinds=KINDS):
    """The state after some steps of every kind, as one flat dictionary."""
    from uncollapse.training.run import train

    out = {}
    for kind in kinds:
        train(recipe(kind), folder / kind, STEPS, say=lambda line: None, accelerator="cpu")
        if int(os.environ.get("RANK", "0")) == 0:
            saved = load_checkpoint(folder / kind / "checkpoints")
            for part in ("student", "teacher", "memory"):
                out |= {f"{kind} {part} {n}": t for n, t in saved[part].items()}
            out |= {f"{kind} prototypes {n}": t for n, t in saved["prototypes"]["cls"].items()}
    return out


def train_on_rank(group, folder):
    # What torchrun would have set.
    os.environ |= {
        "RANK": str(group.rank()), "LOCAL_RANK": str(group.rank()), "WORLD_SIZE": str(group.size()),
        "LOCAL_WORLD_SIZE": str(group.size()), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0",
    }  # fmt: skip
    return trained(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("size", [2, 4])
def test_runs_on_ranks_equal_a_run_alone(size, alone, tmp_path):
    """1e-4 after four steps: the batch's sums are rounded in another order; sharp balanced targets pass on more."""
    together = on_ranks(train_on_rank, size, tmp_path, tmp_path)[0]
    assert together.keys() == alone.keys()
    for name, expected in alone.items():
        bound = 4e-4 if name.startswith("joint-sinkhorn") else 1e-4
        torch.testing.assert_close(together[name], expected, rtol=bound, atol=bound, msg=lambda m, n=name: f"{n}: {m}")
