"""Fine-tuning: it learns, changes nothing of the caller's, goes on where it stopped, chooses without test images."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import timm
import torch

from uncollapse.data.images import LazyImages, subset
from uncollapse.errors import DataError
from uncollapse.evaluate.data.pair import load_pair
from uncollapse.evaluate.encoder import EvalEncoder
from uncollapse.evaluate.tasks.finetune import Diverged, finetune, published
from uncollapse.evaluate.tasks.finetune_model import (
    FinetuneConfig,
    Tuned,
    augmented_batches,
    layer_ids,
    parameter_groups,
)
from uncollapse.models.backbones import Conv3

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
QUICK = FinetuneConfig(
    epochs=6,
    warmup_epochs=1,
    batch=32,
    lrs=(0.02, 0.1),
    randaugment="",
    crop=(0.6, 1.0),
    flip=0.0,
    mixup=0.0,
    cutmix=0.0,
    erasing=0.0,
    checkpoint_seconds=0.0,
)
"""A recipe for 8-pixel digits, which flips and strong augmentation would spoil."""


def quiet(name: str, done: int, total: int, loss: float) -> None:
    pass


def conv3(width: int = 16) -> EvalEncoder:
    torch.manual_seed(0)
    return EvalEncoder(Conv3(width), 8, *HALF)


def vit(depth: int = 3) -> EvalEncoder:
    torch.manual_seed(0)
    options = {"patch_size": 4, "img_size": 16, "embed_dim": 48, "depth": depth, "num_heads": 2}
    return EvalEncoder(timm.create_model("vit_tiny_patch16_224", num_classes=0, **options), 16, *HALF)


@pytest.fixture(scope="module")
def digits():
    return load_pair("builtin:digits", limit=224)


def test_it_learns_and_leaves_the_encoder_and_random_states_alone(digits):
    encoder = conv3()
    before = {n: t.clone() for n, t in encoder.module.state_dict().items()}
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    steps: list[tuple[str, int, int]] = []
    result = finetune(encoder, *digits, QUICK, report=lambda name, done, total, loss: steps.append((name, done, total)))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()  # noqa: NPY002
    after = encoder.module.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert not encoder.module.training
    assert not any(p.requires_grad for p in encoder.module.parameters())
    assert result.metrics["top1"] > 0.6
    assert result.metrics["top5"] >= result.metrics["top1"]
    assert result.ci95[0] < result.metrics["top1"] < result.ci95[1]
    assert result.n == len(digits[1])
    assert set(result.details["held_out_accuracy_by_lr"]) == {"0.02", "0.1"}
    assert steps[-1] == ("fine-tuning", 14 * 6, 14 * 6)
    assert {name for name, _, _ in steps} == {"lr 0.02", "lr 0.1", "fine-tuning"}


def test_the_published_recipe_runs_on_a_transformer(digits):
    train, test = subset(digits[0], range(64)), subset(digits[1], range(40))
    result = finetune(vit(), train, test, dataclasses.replace(published(vit()), lrs=(1e-3,)), max_steps=5, report=quiet)
    assert "reduced to 5 of 800 steps" in result.protocol
    assert 0 <= result.metrics["top1"] <= 1
    assert result.details["settings"]["mixup"] == 0.8


class Stop(Exception):
    pass


SHORT = dataclasses.replace(QUICK, epochs=2, search_share=0.5)


@pytest.fixture(scope="module")
def whole(digits):
    return finetune(conv3(), *digits, SHORT, report=quiet)


def test_test_labels_play_no_part_in_what_is_chosen(digits, whole):
    wrong = dataclasses.replace(digits[1], labels=(digits[1].labels + 1) % 10)
    other = finetune(conv3(), digits[0], wrong, SHORT, report=quiet)
    assert other.details == whole.details
    assert other.metrics != whole.metrics


@pytest.mark.parametrize("where", [("lr 0.1", 10), ("fine-tuning", 20)])
def test_an_interrupted_training_gives_the_same_numbers(digits, whole, tmp_path, where):
    config = SHORT
    done = []

    def stop(name: str, step: int, total: int, loss: float) -> None:
        if (name, step) == where:
            raise Stop

    def count(name: str, step: int, total: int, loss: float) -> None:
        done.append((name, step))

    with pytest.raises(Stop):
        finetune(conv3(), *digits, config, out=tmp_path, report=stop)
    resumed = finetune(conv3(), *digits, config, out=tmp_path, report=count)
    assert resumed == whole
    assert done[0] == (where[0], 15 if where[0] == "fine-tuning" else 1)
    # A finished one is only measured again; another seed is another training.
    done.clear()
    assert finetune(conv3(), *digits, config, out=tmp_path, report=count) == whole
    assert not done
    assert finetune(conv3(), *digits, config, out=tmp_path, report=count, seed=1, max_steps=3) != whole
    assert done


def test_divergence_is_said(digits):
    huge = dataclasses.replace(QUICK, lrs=(1e30,), epochs=1, warmup_epochs=0)
    with pytest.raises(Diverged, match=r"loss is .* at step \d+ of .*smaller"):
        finetune(conv3(), *digits, huge, report=quiet)
    with pytest.raises(Diverged, match="every learning rate"):
        finetune(conv3(), *digits, dataclasses.replace(huge, lrs=(1e30, 1e29)), report=quiet)
    one = finetune(conv3(), *digits, dataclasses.replace(huge, lrs=(1e30, 0.05)), report=quiet)
    assert math.isnan(one.details["held_out_accuracy_by_lr"]["1e+30"])
    assert one.details["lr"] == 0.05


def test_what_cannot_be_fine_tuned(digits):
    train, test = digits
    with pytest.raises(DataError, match="labels"):
        finetune(conv3(), dataclasses.replace(train, labels=None), test)
    with pytest.raises(DataError, match="too few"):
        finetune(conv3(), subset(train, [0, 1]), test)
    with pytest.raises(DataError, match="1 step"):
        finetune(conv3(), train, test, max_steps=0)


def test_learning_rates_fall_by_layer():
    encoder = vit(3)
    ids, top = layer_ids(encoder.module, True)
    assert top == 4
    assert {ids[n] for n in ("cls_token", "pos_embed", "patch_embed.proj.weight")} == {0}
    assert [ids[f"blocks.{i}.mlp.fc1.weight"] for i in range(3)] == [1, 2, 3]
    assert ids["norm.weight"] == 4
    groups = parameter_groups(Tuned(encoder, 7, FinetuneConfig()), True, FinetuneConfig())
    parameters = [p for g in groups for p in g["params"]]
    assert len(parameters) == len(list(encoder.module.parameters())) + 2
    assert all(p.requires_grad for p in parameters)
    assert {round(g["scale"], 6) for g in groups} == {round(0.75**k, 6) for k in range(5)}
    assert all(p.ndim > 1 for g in groups if g["weight_decay"] for p in g["params"])
    ids, top = layer_ids(Conv3(4), False)
    assert [ids[n] for n in ("0.weight", "1.bias", "3.weight", "7.weight")] == [0, 0, 1, 2]
    assert top == 3
    ids, top = layer_ids(timm.create_model("resnet10t", num_classes=0), False)
    assert (ids["conv1.0.weight"], ids["layer4.0.conv1.weight"], top) == (0, 4, 5)


def test_drop_path_rises_to_the_last_block():
    tuned = Tuned(vit(3), 7, FinetuneConfig(drop_path=0.2))
    assert [block.drop_path1.drop_prob for block in tuned.backbone.blocks] == [0.0, 0.1, 0.2]


def test_batches_do_not_depend_on_the_start_or_on_workers(digits):
    encoder, config = vit(), FinetuneConfig()
    images = subset(digits[0], range(20))

    def made(steps: range, workers: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(augmented_batches(images, encoder, config, (3, 1), 4, steps, workers, torch.device("cpu")))

    whole = made(range(12))
    assert whole[0][0].shape == (4, 3, 16, 16)
    for other, part in ((made(range(7, 12)), whole[7:]), (made(range(12), 1), whole)):
        assert all(torch.equal(a, b) and torch.equal(y, z) for (a, y), (b, z) in zip(other, part, strict=True))
    assert not torch.equal(whole[0][1], whole[5][1])


def test_augmentation_of_the_largest_magnitude(digits):
    """timm's policy and Pillow disagree about posterising to 0 bits, which a long training would meet."""
    config = FinetuneConfig(randaugment="rand-m10-mstd0.5-inc1")
    batches = augmented_batches(digits[0], vit(), config, (0, 0), 20, range(20), 0, torch.device("cpu"))
    assert all(bool(x.isfinite().all()) for x, _ in batches)


def test_unreadable_images_are_replaced_with_their_label(tmp_path):
    from PIL import Image

    from uncollapse.config.schema import DataConfig

    for c in ("a", "b"):
        for k in range(10):
            (tmp_path / c).mkdir(exist_ok=True)
            Image.new("RGB", (16, 16), (255 * (c == "b"), 0, 0)).save(tmp_path / c / f"{k}.png")
    (tmp_path / "a" / "9.png").write_bytes(b"nothing")
    images, _ = load_pair(str(tmp_path), config=DataConfig(memory_gb=0, max_bad=0.5, held_out_max=1))
    assert isinstance(images, LazyImages)
    plain = dataclasses.replace(QUICK, crop=(1.0, 1.0))
    for x, y in augmented_batches(images, vit(), plain, (0, 0), 6, range(6), 0, torch.device("cpu")):
        assert torch.equal(x[:, 0].mean((1, 2)) > 0, y == 1)
    assert len(images.bad) == 1
