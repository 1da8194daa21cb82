"""What ranks train together is what one process trains alone."""

import multiprocessing
import os
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from ranks import on_ranks
from steps import small
from uncollapse.config.facts import arm_keys
from uncollapse.config.load import load_config
from uncollapse.config.tiny import tiny
from uncollapse.run_folder.checkpoint import load_checkpoint

multiprocessing.set_forkserver_preload(["uncollapse.training.run", "uncollapse.training.summary", "timm", "ranks"])
KINDS = ("joint", "joint-sinkhorn", "koleo", "decoupled")
METHODS = (
    "swav joint",
    "carp joint",
    "ibot joint",
    "ibot-separate decoupled",
    "ibot-vmf joint",
    "ibot memory",
    "ibot joint-sinkhorn-queue",
    "dino joint-floor",
    "esvit decoupled",
    "wessl joint",
    "pmsn joint",
    "dinov2-separate joint",
    "capi capi",
    "ibot capi",
)
STEPS = 4


def recipe(kind):
    """Batch norm in the convolutions and in the head; of iBOT, stochastic depth and a rank without a hidden patch."""
    if kind in METHODS:
        plain = {"optim.name": "sgd", "optim.lr": 0.3, "optim.lr_batch": 16, "optim.min_lr": 0.0}
        own = {"method.queue": 16} if "swav" in kind else {"method.masked_crops": 0.1} if "ibot" in kind else {}
        own |= {"prototypes.queue": 16} if "queue" in kind else {}
        drawn = {"prototypes.count": 64, "prototypes.memory_length": 100} if "memory" in kind else {}
        method, arm = kind.split()
        return small(method, **arm_keys(arm), **plain, **own, **drawn)
    options = {**arm_keys(kind), "optim.name": "sgd", "optim.lr": 0.3, "optim.warmup_epochs": 0.0}
    options |= {"prototypes.freeze_epochs": 0.0, "prototypes.koleo_every": 2, "teacher.momentum": 0.9}
    config = tiny(load_config("demo", options))
    assert config.backbone.name == "conv3"
    assert config.head.batch_norm
    return replace(config, backbone=replace(config.backbone, drop_path=0.0))


def trained(folder, kinds):
    """The state after some steps of every kind, as one flat dictionary."""
    from uncollapse.training import summary
    from uncollapse.training.run import train

    out, whole = {}, summary.finish_run
    for kind in kinds:
        # What comes after training is rank 0's alone, and the same for every method.
        with patch.object(summary, "finish_run", (lambda *_: {}) if kind in METHODS else whole):
            train(
                recipe(kind), folder / kind, 3 if kind in METHODS else STEPS, say=lambda line: None, accelerator="cpu"
            )
        if int(os.environ.get("RANK", "0")) == 0:
            saved = load_checkpoint(folder / kind / "checkpoints")
            assert "NaN" not in (folder / kind / "metrics.jsonl").read_text()
            for part in ("student", "teacher", "memory"):
                out |= {f"{kind} {part} {n}": t for n, t in saved.get(part, {}).items()}
            for name, tensors in saved["prototypes"].items():
                out |= {f"{kind} prototypes {name} {n}": t for n, t in tensors.items()}
    return out


def train_on_rank(group, folder, kinds):
    # What torchrun would have set.
    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(group.rank()))
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(group.size()))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    return trained(folder, kinds)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("alone"), (*KINDS, *METHODS))


@pytest.mark.parametrize(("size", "kinds"), [(2, (*KINDS, *METHODS)), (4, KINDS)])
def test_runs_on_ranks_equal_a_run_alone(size, kinds, alone, tmp_path):
    """1e-4 at the end: the batch's sums are rounded in another order; sharp balanced targets pass on more."""
    together = on_ranks(train_on_rank, size, tmp_path, tmp_path, kinds)[0]
    expected = {name: tensor for name, tensor in alone.items() if name.startswith(kinds)}
    assert together.keys() == expected.keys()
    for name, tensor in expected.items():
        bound = 4e-4 if "sinkhorn" in name or name.startswith("swav") else 1e-4
        torch.testing.assert_close(together[name], tensor, rtol=bound, atol=bound, msg=lambda m, n=name: f"{n}: {m}")
