"""Any recipe shrunk to run in seconds, for smoke tests: ``--tiny``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from uncollapse.config.load import build_config, load_config, set_key
from uncollapse.config.methods import CAPI, CARP, WESSL, DINOv2, Method, SwAV
from uncollapse.config.schema import BackboneConfig, Config

WIDTH = 48
"""Of the small transformer."""
_KEPT = ("class_token", "reg_tokens", "global_pool", "fc_norm")
"""Options that say which tokens a transformer has, whatever its size."""


def load_tiny(recipe: str | Path, overrides: Mapping[str, Any]) -> Config:
    """A recipe with what the user asked for by name, shrunk; only the small values have to go together."""
    return tiny(load_config(recipe, overrides, together=False), overrides)


def tiny(config: Config, typed: Mapping[str, Any] | None = None) -> Config:
    """The same recipe with a small encoder, K, batch and views, in float32: half precision is slow on a CPU.

    ``typed``: dotted keys with the values that the user asked for by name; they are in ``config`` already, and stay.

    Raises:
        ConfigError: values that do not go together with the small ones.
    """
    typed = typed or {}
    views, head, protos, run = config.views, config.head, config.prototypes, config.run
    small = replace(
        config,
        views=replace(
            views,
            global_size=min(32, views.global_size),
            local_size=min(16, views.local_size),
            local_count=min(2, views.local_count),
        ),
        head=replace(head, hidden=min(64, head.hidden), bottleneck=min(32, head.bottleneck) if head.layers else WIDTH),
        method=_tiny_method(config.method, int(typed.get("run.batch", min(32, run.batch)))),
        prototypes=replace(protos, count=min(64, protos.count), queue=min(64, protos.queue)),
        run=replace(run, batch=min(32, run.batch), epochs=min(2.0, run.epochs), accumulate=1, precision="32-true"),
        data=replace(config.data, workers=min(1, config.data.workers)),
        backbone=replace(_tiny_backbone(config.backbone), init=config.backbone.init),
        log=replace(
            config.log,
            every_steps=1,
            checkpoint_steps=min(5, config.log.checkpoint_steps),
            evaluate_train=min(256, config.log.evaluate_train),
        ),
    )
    content = json.loads(json.dumps(asdict(small)))
    if any(key.startswith("backbone.") and key != "backbone.init" for key in typed):
        content["backbone"] = json.loads(json.dumps(asdict(config.backbone)))
        if not head.layers:
            content["head"]["bottleneck"] = head.bottleneck  # the length of that backbone's features
    for key, value in typed.items():
        set_key(content, key, value)
    if "optim.min_lr" not in typed:
        optim = content["optim"]
        optim["min_lr"] = min(optim["min_lr"], optim["lr"] * content["run"]["batch"] / optim["lr_batch"])
    return build_config(content, "--tiny")


def _tiny_method(method: Method, batch: int) -> Method:
    if isinstance(method, DINOv2) and method.patch_bottleneck is not None:
        return replace(method, patch_bottleneck=min(24, method.patch_bottleneck))
    if isinstance(method, CARP):
        return replace(method, block=min(16, method.block))
    if isinstance(method, CAPI):
        return replace(method, decoder_depth=min(2, method.decoder_depth))
    if isinstance(method, SwAV):
        return replace(method, queue=min(2 * batch, method.queue), queue_epoch=0.0)
    if isinstance(method, WESSL):
        return replace(method, heads=min(3, method.heads))
    return method


def _tiny_backbone(backbone: BackboneConfig) -> BackboneConfig:
    """The smallest member of the same family that still takes 16-pixel views."""
    if backbone.name.startswith("vit_"):
        options = {"patch_size": 8, "img_size": 32, "embed_dim": WIDTH, "depth": 2, "num_heads": 2}
        options |= {name: value for name, value in backbone.options.items() if name in _KEPT}
        return replace(backbone, name="vit_tiny_patch16_224", options=options)
    if backbone.name.startswith("swin_"):
        blocks = {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 2]}
        small = {"img_size": 32, "window_size": 2, **blocks}
        return replace(backbone, name="swin_tiny_patch4_window7_224", options=small)
    if backbone.name.startswith("resnet"):
        return replace(backbone, name="resnet10t", drop_path=0.0, options={})
    return backbone
