"""What ranks train together is what one process trains alone."""

import multiprocessing
import os
from dataclasses import replace

import pytest
import torch

from ranks import on_ranks
from uncollapse.config.load import load_config
from uncollapse.config.schema import arm_keys
from uncollapse.config.tiny import tiny
from uncollapse.run_folder.checkpoint import load_checkpoint

multiprocessing.set_forkserver_preload(["uncollapse.training.run", "uncollapse.training.summary", "timm", "ranks"])
KINDS = ("joint", "joint-sinkhorn", "koleo", "decoupled")
STEPS = 4


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
