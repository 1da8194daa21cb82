"""Stochastic depth by keys: the same coins in any process and part of a batch, others for all else."""

import itertools

import pytest
import timm
import torch
from timm.layers import DropPath

from steps import Steps, batch_of, small
from uncollapse.models.drop_path import KeyedDropPath, keyed, row_keys


def coins(probability=0.3, number=0, seed=0, step=5, views=4, images=1000):
    """``(views, images)`` bool, True where the branch is kept."""
    drop = KeyedDropPath(probability, number)
    drop.keys = row_keys(seed, step, torch.arange(images), views).flatten()
    return (drop(torch.ones(views * images, 1)) > 0).view(views, images)


@pytest.mark.parametrize("probability", [0.05, 0.3, 0.9])
def test_the_rate_is_right_and_the_mean_is_kept(probability):
    drop = KeyedDropPath(probability, 3)
    drop.keys = row_keys(0, 7, torch.arange(5000), 8).flatten()
    x = drop(torch.ones(40_000, 2, 2, dtype=torch.float64))
    error = (probability * (1 - probability) / 40_000) ** 0.5
    assert abs(float((x[:, 0, 0] == 0).double().mean()) - probability) < 4 * error
    assert torch.equal(x.amax((1, 2)), x.amin((1, 2)))  # a row is dropped whole
    torch.testing.assert_close(x.max(), torch.tensor(1 / (1 - probability), dtype=torch.float64))
    assert float(x.mean()) == pytest.approx(1, abs=4 * error / (1 - probability))


def test_layers_views_steps_and_seeds_have_coins_of_their_own():
    """Any two agree as often as independent coins do."""
    views = coins()
    others = [coins(number=1), coins(number=2), coins(step=6), coins(seed=1), coins(seed=5, step=0)]
    pairs = [*itertools.combinations(views, 2), *((views.flatten(), other.flatten()) for other in others)]
    for a, b in pairs:
        expected, n = 0.7**2 + 0.3**2, len(a)
        assert abs(float((a == b).double().mean()) - expected) < 4 * (expected * (1 - expected) / n) ** 0.5
    assert torch.equal(views, coins())


def test_an_images_coins_are_those_of_its_place_in_the_whole_batch():
    """Parts of a batch, ranks, and more views beside them change none."""
    whole = row_keys(3, 5, torch.arange(12), 4)
    assert len(whole.unique()) == whole.numel()
    for places in (torch.arange(6, 12), torch.tensor([7, 2])):
        assert torch.equal(row_keys(3, 5, places, 4), whole[:, places])
    assert torch.equal(row_keys(3, 5, torch.arange(12), 2), whole[:2])


def test_a_missing_key_is_an_error_in_training_alone():
    drop = KeyedDropPath(0.2, 0)
    with pytest.raises(RuntimeError, match="needs a key for each of 3 rows: pass keys to the encoder"):
        drop(torch.ones(3, 2))
    drop.keys = row_keys(0, 0, torch.arange(2), 1).flatten()
    with pytest.raises(RuntimeError, match="each of 3 rows"):
        drop(torch.ones(3, 2))
    assert torch.equal(drop.eval()(torch.ones(3, 2)), torch.ones(3, 2))
    assert torch.equal(KeyedDropPath(0.0, 0)(torch.ones(3, 2)), torch.ones(3, 2))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto"])
def test_every_drop_path_of_a_backbone_is_replaced_at_its_rate(name):
    backbone = timm.create_model(name, num_classes=0, drop_path_rate=0.2)
    rates = [m.drop_prob for m in backbone.modules() if isinstance(m, DropPath)]
    made = keyed(backbone)
    assert len(made) > 3
    assert [drop.probability for drop in made] == rates
    assert [drop.number for drop in made] == list(range(len(made)))
    assert not any(isinstance(m, DropPath) for m in backbone.modules())
    assert set(made) == {m for m in backbone.modules() if isinstance(m, KeyedDropPath)}


def test_the_encoder_gives_a_view_the_same_in_parts_and_in_any_order():
    steps = Steps(small("ibot", **{"backbone.drop_path": 0.5}))
    net, batch = steps.state.student, batch_of(steps.config, steps.state, 0)
    views = [view for group in batch.views.values() for view in group]
    with torch.no_grad():
        whole = net(views, batch.keys).cls
        for part in (slice(0, 4), slice(10, 16)):
            some = net([view[part] for view in views], batch.keys[:, part]).cls
            torch.testing.assert_close(some, whole[:, part], rtol=0, atol=1e-5)
        order = [3, 0, 2, 1]  # small and large views mixed
        shuffled = net([views[i] for i in order], batch.keys[order]).cls
        torch.testing.assert_close(shuffled, whole[order], rtol=0, atol=1e-5)
        again = net(views, row_keys(steps.config.seed, 1, torch.arange(16), 4)).cls
        assert (again - whole).abs().max() > 1e-3
        with pytest.raises(RuntimeError, match="pass keys to the encoder"):
            net(views)
        assert torch.equal(net.eval()(views).cls, net(views, batch.keys).cls)
    net.train()
