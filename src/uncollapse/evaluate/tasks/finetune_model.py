"""What fine-tuning trains and on what: the recipe, a copy of the encoder with a classifier, augmented batches."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from uncollapse.data.images import ImageSet, LazyImages
from uncollapse.errors import DataError
from uncollapse.evaluate.encoder import EvalEncoder
from uncollapse.models.backbones import Conv3


@dataclass(frozen=True)
class FinetuneConfig:
    """The recipe; the defaults are iBOT's for ViT-S on ImageNet-1K. `published` has the other sizes."""

    epochs: float = 200.0
    warmup_epochs: float = 20.0
    batch: int = 1024
    """Images per step; a set that would make fewer than 16 steps per epoch of it takes a smaller one."""
    lrs: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3)
    """Learning rates to choose from, for ``lr_batch`` images: the one used is lr × batch / lr_batch."""
    lr_batch: int = 1024
    min_lr: float = 1e-6
    weight_decay: float = 0.05
    """Not on biases, norms, class tokens and position embeddings."""
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = 0.75
    """Factor on the learning rate for each layer below the classifier: block, stage of a CNN, layer of conv3."""
    drop_path: float = 0.1
    """Of transformers with blocks, rising linearly to this at the last one."""
    randaugment: str = "rand-m9-mstd0.5-inc1"
    """timm's name of the policy; empty: none."""
    crop: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop as a share of the image."""
    flip: float = 0.5
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1
    erasing: float = 0.25
    head_scale: float = 0.001
    """Factor on the classifier's initial weights."""
    held_out: float = 0.1
    """Share of the training images on which the learning rate is chosen."""
    search_share: float = 0.25
    """Length of the training that each learning rate is tried with, as a share of the final one's."""
    checkpoint_seconds: float = 30.0
    """At most so often is the state written, at the end of an epoch."""


# --- the model ----------------------------------------------------------------------------------------------


class Tuned(nn.Module):
    """A copy of the backbone that learns, and a linear classifier on its features."""

    def __init__(self, encoder: EvalEncoder, classes: int, config: FinetuneConfig) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(encoder.module).requires_grad_(True)
        self.classifier = nn.Linear(encoder.width, classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)
        with torch.no_grad():
            self.classifier.weight.mul_(config.head_scale)
        if encoder.tokens and config.drop_path:
            from timm.layers import DropPath

            blocks: Any = self.backbone.blocks
            for i, block in enumerate(blocks):
                for name in ("drop_path", "drop_path1", "drop_path2"):
                    if isinstance(getattr(block, name, None), nn.Identity | DropPath):
                        setattr(block, name, DropPath(config.drop_path * i / max(1, len(blocks) - 1)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.backbone(x).float())
        return out


def layer_ids(module: nn.Module, tokens: bool) -> tuple[dict[str, int], int]:
    """Layer of each parameter of a backbone, from 0 at the images, and that of a classifier on top.

    Vision transformers count by block, as BEiT does (embeddings 0, the final norm with the classifier); other timm
    models by stage; `Conv3` by convolution; anything else by its children.
    """
    names = [name for name, _ in module.named_parameters()]
    if tokens:
        top = len(module.blocks) + 1  # type: ignore[arg-type]
        embeddings = ("cls_token", "pos_embed", "reg_token", "dist_token", "mask_token", "patch_embed", "norm_pre")
        blocks = {n: int(n.split(".")[1]) + 1 for n in names if n.startswith("blocks.")}
        return {n: blocks.get(n, 0 if n.startswith(embeddings) else top) for n in names}, top
    if isinstance(module, Conv3):
        return {n: int(n.split(".")[0]) // 3 for n in names}, 3
    matcher = getattr(module, "group_matcher", None)
    if matcher is not None:
        from timm.models import group_parameters

        ids = {n: int(i) for n, i in group_parameters(module, matcher(coarse=True), reverse=True).items()}
    else:
        order = {child: i for i, (child, _) in enumerate(module.named_children())}
        ids = {n: order.get(n.split(".")[0], 0) for n in names}
    return ids, max(ids.values(), default=-1) + 1


def parameter_groups(model: Tuned, tokens: bool, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Parameters by (layer, decayed or not), each with the ``scale`` of its learning rate."""
    ids, top = layer_ids(model.backbone, tokens)
    skipped: set[str] = getattr(model.backbone, "no_weight_decay", set)()
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, p in model.backbone.named_parameters():
        groups.setdefault((ids[name], p.ndim > 1 and name not in skipped), []).append(p)
    for p in model.classifier.parameters():
        groups.setdefault((top, p.ndim > 1), []).append(p)
    return [
        {"params": ps, "scale": config.layer_decay ** (top - i), "weight_decay": config.weight_decay * decayed}
        for (i, decayed), ps in sorted(groups.items(), key=lambda one: one[0])
    ]


# --- images -------------------------------------------------------------------------------------------------


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """timm's transforms draw from global generators: seeded by position, and put back afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


@dataclass
class _Augmented(torch.utils.data.Dataset[Any]):
    """Item (epoch, index) → augmented image and label, and the unreadable images met; an error as text."""

    images: ImageSet
    transform: Any
    seed: tuple[int, int]

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor | str, int, list[str]]:
        epoch, index = key
        labels = self.images.labels
        assert labels is not None
        try:
            for k in range(len(self.images)):
                i = (index + k) % len(self.images)
                image = self.images.readable(i) if isinstance(self.images, LazyImages) else self.images.image(i)
                if image is not None:  # the next readable one, with its own label, keeps batches full
                    with seeded(*self.seed, epoch, index):
                        return self.transform(image), int(labels[i]), list(self.images.bad)
        except DataError as error:  # a loader would wrap it into a traceback of many lines
            return str(error), 0, list(self.images.bad)
        return "no image can be read", 0, list(self.images.bad)


def _collate(items: list[tuple[Tensor | str, int, list[str]]]) -> tuple[Any, Tensor, str | None, list[str]]:
    error = next((x for x, _, _ in items if isinstance(x, str)), None)
    bad = [note for _, _, notes in items for note in notes]
    x = None if error is not None else torch.stack([x for x, _, _ in items])  # type: ignore[misc]
    return x, torch.tensor([y for _, y, _ in items]), error, bad


def _transform(encoder: EvalEncoder, config: FinetuneConfig) -> Any:
    """timm's training transform of a PIL image: float32 (3, size, size), normalised."""
    from timm.data import create_transform

    transform: Any = create_transform(
        encoder.size,
        is_training=True,
        auto_augment=config.randaugment or None,
        color_jitter=0.0,
        interpolation="bicubic",
        scale=config.crop,
        hflip=config.flip,
        re_prob=config.erasing,
        re_mode="pixel",
        re_count=1,
        mean=encoder.mean,
        std=encoder.std,
    )
    for step in transform.transforms:
        for op in getattr(step, "ops", ()):
            # At a magnitude of exactly 10, one draw in 44, timm posterises to 0 bits, which newer Pillows refuse.
            if getattr(op, "magnitude_max", 0) is None:
                op.magnitude_max = 9.999
    return transform


def augmented_batches(
    images: ImageSet,
    encoder: EvalEncoder,
    config: FinetuneConfig,
    seed: tuple[int, int],
    batch: int,
    steps: range,
    workers: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of ``steps``: float32 (batch, 3, size, size) and int64 labels, on the device.

    Every epoch of ⌊n / batch⌋ steps has its own order. A batch depends on ``seed`` and its step alone: not on where
    training was resumed, nor on the number of ``workers``.
    """
    per_epoch = len(images) // batch

    def keys() -> Iterator[list[tuple[int, int]]]:
        for step in steps:
            epoch, k = divmod(step, per_epoch)
            if step == steps.start or k == 0:
                order = np.random.default_rng([*seed, epoch]).permutation(len(images))
            yield [(epoch, int(i)) for i in order[k * batch : (k + 1) * batch]]

    loader: Any = torch.utils.data.DataLoader(
        _Augmented(images, _transform(encoder, config), seed),
        batch_sampler=keys(),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )
    for x, y, error, bad in loader:
        if isinstance(images, LazyImages):
            images.note_bad(bad)
        if error is not None:
            raise DataError(error)
        yield x.to(device, non_blocking=True), y.to(device)
