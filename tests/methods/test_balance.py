"""Targets balanced over a queue or above a floor: beside brute force in float64, and in force for every method."""

import math

import pytest
import torch
import torch.nn.functional as F

from steps import METHODS, Steps, small
from uncollapse.config.load import load_config
from uncollapse.methods.balance import balance_memory, balanced, remember_balance
from uncollapse.methods.contract import At, Parts, Seen
from uncollapse.targets.sinkhorn import sinkhorn
from uncollapse.targets.softmax import SoftmaxTargets

K, D, N, TAU = 9, 5, 6, 0.1


def config(targets, **keys):
    few = {"prototypes.count": K, "head.bottleneck": D, "run.batch": N, "prototypes.targets": targets}
    return load_config("dino-small32", {**few, **keys})


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, D, generator=generator, dtype=torch.float64), dim=-1)


def double(memory):
    return {n: t.double() if t.is_floating_point() else t for n, t in memory.items()}


def at(step):
    return At(step, float(step), 0.0, 3, None)


@pytest.mark.parametrize("length", [3 * 2 * N, 20, 7])
def test_a_queue_is_balanced_with_the_batch_once_it_is_full(length):
    c, weight, bias = config("sinkhorn-queue", **{"prototypes.queue": length}), unit(K, seed=50), unit(K)[:, 0]
    memory, kept = double(balance_memory(c, Parts())), []
    assert memory["queue"].shape == (length, D)
    for step in range(9):
        z = unit(2, N, seed=step)
        plain = {"cls": SoftmaxTargets(z, weight, TAU, bias)}
        targets = balanced(c, plain, memory, at(step))
        rows = torch.cat([z.flatten(0, 1), *kept[: length if len(kept) >= length else 0]])
        expected = sinkhorn(rows @ weight.T / TAU + bias, 3)[: 2 * N]
        torch.testing.assert_close(targets["cls"].dense().flatten(0, 1), expected, rtol=0, atol=1e-9)
        remember_balance(c, targets, Seen({"cls": z}), memory, at(step))
        kept = [*z.flatten(0, 1)[:, None].unbind(), *kept][:length]


def test_duals_put_a_floor_under_every_cluster_and_nothing_else():
    """At rest (Karush–Kuhn–Tucker): no size below the floor, and a dual above 0 only where the size is the floor."""
    c, weight = config("floor", **{"prototypes.floor_rate": 0.5}), unit(K, seed=50)
    z = F.normalize(weight[:3].repeat(20, 1) + 0.3 * unit(60), dim=-1)[None]  # three clusters have it all
    memory = double(balance_memory(c, Parts()))
    plain = {"cls": SoftmaxTargets(z, weight, TAU)}
    start = plain["cls"].dense().mean((0, 1))
    for step in range(1500):
        targets = balanced(c, plain, memory, at(step))
        dense = torch.softmax((z @ weight.T + memory["dual"]) / TAU, dim=-1)
        torch.testing.assert_close(targets["cls"].dense(), dense)
        before = memory["dual"].clone()
        remember_balance(c, targets, Seen({}), memory, at(step))
        expected = (before + 0.5 * (0.4 / K - dense.mean((0, 1)))).clamp_min(0)
        torch.testing.assert_close(memory["dual"], expected, rtol=0, atol=1e-12)
    size, floor = dense.mean((0, 1)), 0.4 / K
    assert start.min() < floor / 10
    assert size.min() > floor - 1e-6
    held = memory["dual"] > 0
    assert 0 < held.sum() < K
    torch.testing.assert_close(size[held], torch.full_like(size[held], floor), rtol=0, atol=1e-6)


def test_a_step_without_rows_leaves_the_duals():
    c, weight = config("floor", **{"prototypes.floor": 1.0}), unit(K, seed=50)
    memory = double(balance_memory(c, Parts()))
    for rows in (5, 0):
        before = memory["dual"].clone()
        targets = balanced(c, {"cls": SoftmaxTargets(unit(rows), weight, TAU)}, memory, at(0))
        remember_balance(c, targets, Seen({}), memory, at(0))
        assert torch.equal(memory["dual"], before) == (rows == 0)
    assert memory["dual"].isfinite().all()


def test_a_floor_at_equal_sizes_is_equal_sizes():
    c, weight = config("floor", **{"prototypes.floor": 1.0, "prototypes.floor_rate": 0.5}), unit(K, seed=50)
    z, memory = unit(1, 40), double(balance_memory(c, Parts()))
    plain = {"cls": SoftmaxTargets(z, weight, TAU)}
    for step in range(1000):
        targets = balanced(c, plain, memory, at(step))
        remember_balance(c, targets, Seen({}), memory, at(step))
    torch.testing.assert_close(targets["cls"].dense()[0], sinkhorn(z[0] @ weight.T / TAU, 500), rtol=0, atol=1e-6)
    assert (memory["dual"] < 0).any()


@pytest.mark.parametrize("targets", ["sinkhorn-queue", "floor", "power-law"])
@pytest.mark.parametrize("method", METHODS)
def test_a_rival_is_in_force_for_every_method(method, targets):
    """Its targets are its own, and what it carries changes with every step."""
    steps = Steps(
        small(method, "joint", **{"prototypes.targets": targets, "prototypes.queue": 16, "prototypes.floor": 1.0})
    )
    plain = Steps(small(method, "joint", **{"prototypes.targets": "softmax"}))
    carried = {n for n in steps.state.memory if n.startswith(("queue", "dual"))}
    assert bool(carried) == (targets != "power-law")
    for _ in range(2):
        before = {n: steps.state.memory[n].clone() for n in carried}
        done, other = steps.take(), plain.take()
        assert all(math.isfinite(term) for term in done.terms.values())
        assert not [n for n in carried if torch.equal(before[n], steps.state.memory[n])]
    assert done.targets.keys() == other.targets.keys()
    for name, of in done.targets.items():
        mass, plain_mass = (t.dense().flatten(0, -2).mean(0) for t in (of, other.targets[name]))
        if targets == "power-law":
            assert mass[:8].mean() > mass[-8:].mean()
        elif targets == "sinkhorn-queue":
            assert mass.max() / mass.min() < plain_mass.max() / plain_mass.min(), name
        elif "vmf" not in method:
            dual = before["dual" if name == "cls" else f"dual_{name}"]
            torch.testing.assert_close(of.bias, dual / of.temperature)
            assert dual.any()
