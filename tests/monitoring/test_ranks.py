"""Metrics and callback over two ranks give, on each, what the functions give of the rows of both."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import uncollapse as un
from every_metric import EXPECTED, feed, made, new
from ranks import on_ranks


class Logs(nn.Module):
    """What a callback sees of a `LightningModule`: its layers, and where numbers go."""

    def __init__(self, w):
        super().__init__()
        self.prototypes = nn.Linear(*reversed(w.shape), bias=False)
        self.prototypes.weight.data = w
        self.logged = {}

    def log_dict(self, numbers, **how):
        assert how["sync_dist"]
        self.logged |= numbers


def watched(rank):
    """A training epoch of three batches, ragged over ranks, and a validation, hook by hook."""
    w, batches = made()
    module, trainer = Logs(w), SimpleNamespace(enable_validation=True, sanity_checking=False, global_step=0)
    callback = un.PrototypeCallback(target="z", epsilons=(0.1,))
    callback.on_fit_start(trainer, module)
    step = {"z": batches[2] if rank else batches[1]}
    callback.on_train_batch_end(trainer, module, step, None, 0)
    callback.on_train_epoch_end(trainer, module)
    callback.on_validation_start(trainer, module)
    for z in batches[rank::2]:
        callback.on_validation_batch_end(trainer, module, {"z": z}, None, 0)
    callback.on_validation_epoch_end(trainer, module)
    callback.on_validation_start(trainer, module)
    if rank == 0:  # the other one has nothing: told, and no rank waits
        callback.on_validation_batch_end(trainer, module, {"z": batches[0]}, None, 0)
    before = dict(module.logged)
    callback.on_validation_epoch_end(trainer, module)
    assert before == module.logged
    return before


def of_one_rank(group):
    rank = torch.distributed.get_rank(group)
    w, batches = made()
    values = {}
    for idle in (False, True):  # whether the second rank has no rows
        for name in EXPECTED:
            metric = new(name)
            for z in batches[rank::2]:
                feed(metric, z[:, :0] if idle and rank else z, w)
            values[name, idle] = float(metric.compute())
    return values, watched(rank)


@pytest.mark.filterwarnings("ignore:.*PrototypeCallback")
def test_two_ranks_are_the_function_on_the_rows_of_both(tmp_path):
    w, batches = made()
    both = torch.cat([batches[0], batches[2], batches[1]], 1)  # in the order of ranks
    in_training = un.usage_counts(un.prototype_argmax(torch.cat([batches[1, 0], batches[2, 0]]), w), len(w))
    for values, logged in on_ranks(of_one_rank, 2, tmp_path):
        for (name, idle), value in values.items():
            z = torch.cat([*batches[0::2], *(() if idle else batches[1::2])], 1)
            assert value == pytest.approx(EXPECTED[name](z, w), rel=1e-6), (name, idle)
        assert logged["prototypes/alive"] == un.used_prototypes(in_training)
        assert logged["prototypes/n"] == both.shape[1]
        for key, name in (("used", "UsedPrototypesMetric"), ("effective@0.1", "EffectivePrototypesMetric")):
            assert logged[f"prototypes/{key}"] == pytest.approx(EXPECTED[name](both, w))
        assert logged["prototypes/view_information"] == pytest.approx(un.view_information(both, w).bits)
