"""A few training steps of any method on real digits, without the run folder and the evaluation around them."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from uncollapse.config.load import load_config
from uncollapse.config.schema import Config
from uncollapse.config.tiny import tiny
from uncollapse.data.batched import multicrop
from uncollapse.data.images import MemoryImages
from uncollapse.data.load import load_images
from uncollapse.data.masks import around_blocks, crop_masks, dropped_patches
from uncollapse.data.views import view_specs
from uncollapse.methods.contract import Batch
from uncollapse.models.drop_path import row_keys
from uncollapse.models.tokens import patches_of
from uncollapse.training.job import Job
from uncollapse.training.state import TrainState, build_state
from uncollapse.training.step import Done, Stepper
from uncollapse.training.stopwatch import Stopwatch

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dino": ("dino-small32", {}),
    "dino-vmf": ("dino-vmf-vits16", {}),
    "swav": ("swav-small32", {"method.queue": 32, "method.queue_epoch": 0.0}),
    "carp": ("carp-small32", {}),
    "msn": ("msn-vits16", {}),
    "pmsn": ("msn-vits16", {"method.prior": "power", "method.entropy_weight": 0.1}),
    "ibot": ("ibot-vits16", {}),
    "ibot-separate": ("ibot-vits16", {"method.shared": False}),
    "ibot-vmf": ("ibot-vmf-vits16", {}),
    "dinov2": ("dinov2-vitl16", {"method.koleo_images": 4}),
    "dinov2-separate": ("dinov2-vitl14", {"method.koleo_images": 4, "prototypes.targets": None}),
    "esvit": ("esvit-swint7", {}),
    "wessl": ("wessl-vits16", {}),
    "capi": ("capi-vitl14", {}),
}
"""Name → recipe, and what differs from it."""

SMALL = {
    "data.path": "builtin:digits",
    "views.global_size": 32,
    "views.local_size": 16,
    "run.batch": 16,
    "prototypes.freeze_epochs": 0.0,
    "optim.warmup_epochs": 0.0,
    "run.precision": "32-true",
}


def small(method: str, kind: str = "joint", **keys: Any) -> Config:
    """A method's recipe shrunk to 16 digits a batch and 64 prototypes, with the prototypes learned as ``kind``."""
    recipe, own = METHODS[method]
    chosen = {**SMALL, **own, "prototypes.kind": kind, **keys}
    return tiny(load_config(recipe, chosen), {**own, **keys})


@cache
def digits() -> MemoryImages:
    images, _ = load_images("builtin:digits", small("dino").data, 0, None, progress=False)
    assert isinstance(images, MemoryImages)
    return images


def batch_of(config: Config, state: TrainState, step: int) -> Batch:
    """As the loop makes it: everything keyed by (seed, step, position, view)."""
    positions, specs = list(range(config.run.batch)), view_specs(config.views)
    indices = [(step * config.run.batch + i) % len(digits()) for i in positions]
    views = multicrop(digits(), indices, config.seed, step, specs, positions)
    groups: dict[str, list[torch.Tensor]] = {}
    for spec, view in zip(specs, views, strict=True):
        groups.setdefault(spec.name, []).append(view)
    masks = {}
    if state.parts.hide is not None:
        patches = patches_of(state.student.backbone, config.views.global_size)
        evenly = config.run.batch if state.parts.hide_evenly else None
        masks["global"] = crop_masks(patches, 2, *state.parts.hide, config.seed, step, positions, evenly)
    if state.parts.drop:
        patches = patches_of(state.student.backbone, config.views.global_size)
        masks["global"] = dropped_patches(patches, state.parts.drop, config.seed, step)
        masks["global"] = masks["global"].expand(len(groups["global"]), len(positions), -1)
    if state.parts.predict is not None:
        patches = patches_of(state.student.backbone, config.views.global_size)
        both = around_blocks(patches, len(groups["global"]), *state.parts.predict, config.seed, step, positions)
        masks["global"], masks["predicted"] = both
    return Batch(groups, masks, row_keys(config.seed, step, torch.tensor(positions), len(views)))


class Steps:
    """Takes training steps one by one."""

    def __init__(self, config: Config, total: int = 100) -> None:
        def check(tensor: torch.Tensor, what: str, step: int) -> None:
            assert torch.isfinite(tensor).all(), f"{what} at step {step}"

        self.config, self.state, self.total, self.done = config, build_state(config), total, 0
        fabric = Fabric(accelerator="cpu", devices=1)
        fabric.launch()
        job = Job(config, Path(), fabric, digits(), digits(), {}, 44, total)
        self.stepper = Stepper(job, self.state, Stopwatch(job.device), check)

    def take(self, batch: Batch | None = None) -> Done:
        batch = batch_of(self.config, self.state, self.done) if batch is None else batch
        done = self.stepper(self.done, batch, False)
        self.done += 1
        return done

    def snapshot(self) -> TrainState:
        """The state as it is now, to be compared with later."""
        return copy.deepcopy(self.state)


def tensors(content: Any, name: str = "") -> dict[str, torch.Tensor]:
    """Name → tensor, of nested mappings and lists."""
    if isinstance(content, torch.Tensor):
        return {name: content}
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return {n: t for key, value in inner for n, t in tensors(value, f"{name}/{key}").items()}
