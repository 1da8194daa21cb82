"""Long tails: their published class sizes, what they leave alone, and that every seed and reader gets the same one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from red_images import folders, reds
from uncollapse.config.load import load_config
from uncollapse.config.schema import DataConfig
from uncollapse.data.fingerprint import image_digests
from uncollapse.data.load import described, load_images
from uncollapse.data.long_tail import long_tail_rows
from uncollapse.errors import ConfigError, DataError


def test_class_sizes_are_those_of_cifar10_lt_and_cifar100_lt():
    """As the code of Cao et al. draws them."""
    labels = np.repeat(np.arange(10), 5000)
    kept = np.bincount(labels[long_tail_rows(labels, 100)])
    assert kept.tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    hundred = np.repeat(np.arange(100), 500)
    kept = np.bincount(hundred[long_tail_rows(hundred, 100)])
    assert len(hundred[long_tail_rows(hundred, 100)]) == 10847
    assert (kept[0], kept[-1]) == (500, 5)


@given(st.integers(2, 15), st.integers(20, 60), st.floats(1, 15), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_of_any_balanced_set(classes, size, factor, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(classes), size))
    rows = long_tail_rows(labels, factor)
    kept = np.bincount(labels[rows], minlength=classes)
    assert (np.diff(kept) <= 0).all()
    assert kept[0] == size
    assert kept[-1] == int(size / factor + 1e-9)
    smaller = long_tail_rows(labels, factor * 1.2)
    assert set(smaller.tolist()) <= set(rows.tolist())


@pytest.mark.parametrize(
    ("counts", "factor", "words"),
    [
        ([10, 100], 2, "not balanced enough"),
        ([40, 40], 100, "can be 40 at most"),
        ([9, 9], 0.5, "at least 1"),
        ([9, 9], float("nan"), "at least 1"),
        ([9], 2, "two classes"),
    ],
)
def test_those_that_cannot_be_drawn(counts, factor, words):
    with pytest.raises(DataError, match=words):
        long_tail_rows(np.repeat(np.arange(len(counts)), counts), factor)


@pytest.mark.parametrize("memory_gb", [2.0, 0.0], ids=["memory", "lazy"])
def test_training_images_alone_are_cut_and_every_seed_keeps_the_same(tmp_path, memory_gb):
    folders(tmp_path / "train", {"a": 20, "b": 20, "c": 20})
    folders(tmp_path / "test", {"a": 5, "b": 5, "c": 5}, first=60)
    whole = load_images(tmp_path, DataConfig(memory_gb=memory_gb), 0, progress=False)
    config = DataConfig(memory_gb=memory_gb, long_tail=10)
    cut = [load_images(tmp_path, config, seed, progress=False) for seed in (0, 7)]
    for train, held in cut:
        assert train.labels.bincount().tolist() == [20, 6, 2]
        assert set(reds(train)) < set(reds(whole[0]))
        assert reds(held) == reds(whole[1])
        assert reds(train) == reds(cut[0][0])
    assert "28 training images (a long tail cut from 60: 20 images in the largest class, 2 in the" in described(*cut[0])
    assert "cut" not in described(*whole)


def test_runs_of_other_tails_have_other_digests():
    digests = [
        image_digests(*load_images("builtin:digits", DataConfig(long_tail=f), 0, progress=False)) for f in (1, 10, 20)
    ]
    assert len({d["data_digest"] for d in digests}) == 3
    assert len({d["held_out_digest"] for d in digests}) == 1


def test_images_without_labels_have_no_tail(tmp_path):
    folders(tmp_path / "x", {"": 12})
    with pytest.raises(DataError, match=r"data\.long_tail: a long tail is cut by class.*no labels") as error:
        load_images(tmp_path / "x", DataConfig(long_tail=5), 0, progress=False)
    assert "\n" not in str(error.value)


def test_a_factor_below_one_is_no_recipe():
    with pytest.raises(ConfigError, match=r"data\.long_tail"):
        load_config("demo", {"data.long_tail": 0.5})
