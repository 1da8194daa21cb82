"""Combinations of settings that no single key's range can rule out."""

from __future__ import annotations

from collections.abc import Iterator

from uncollapse.config.facts import targets_of
from uncollapse.config.methods import CENTRED, IBOT, DINOv2
from uncollapse.config.schema import Config

Problems = Iterator[tuple[str, str]]
"""(key, what is wrong with it)."""

_LABELS = {"ibot": "iBOT", "dinov2": "DINOv2", "capi": "CAPI"}
_WHOLE_BATCH = {"swav": "SwAV's codes come", "carp": "CARP's entropy comes", "msn": "MSN's mean prediction comes"}


def impossible(config: Config) -> list[tuple[str, str]]:
    """(key, what is wrong with it) for each; empty where all is well."""
    return [
        *_views(config),
        *_schedules(config),
        *_prototypes(config),
        *_parts(config),
        *_change(config),
        *_of_method(config),
    ]


def _views(config: Config) -> Problems:
    views, method = config.views, config.method.name
    for name in ("global_scale", "local_scale", "blur_sigma"):
        low, high = getattr(views, name)
        if low > high:
            yield f"views.{name}", f"the first number must not exceed the second, got {low} > {high}"
    if any(s <= 0 for s in views.std):
        yield "views.std", f"must be positive, got {list(views.std)}"
    if method == "capi" and views.local_count:
        yield "views.local_count", f"CAPI has no local views, got {views.local_count}; set it to 0"
    if method != "capi" and views.global_count + views.local_count < 2:
        yield "views.local_count", f"a single view of an image has no other one to predict in {method}"


def _schedules(config: Config) -> Problems:
    teacher, optim, run = config.teacher, config.optim, config.run
    momentum, end, lr = teacher.momentum, teacher.momentum_end, optim.lr * run.batch / optim.lr_batch
    if end < momentum:
        yield "teacher.momentum_end", f"must be at least teacher.momentum, {end} < {momentum}"
    if teacher.momentum_start is not None and teacher.momentum_shape == "linear":
        yield "teacher.momentum_start", "a straight line has no warm-up; take teacher.momentum_shape cosine"
    if teacher.temperature > 1 or teacher.temperature_start > 1:
        yield "teacher.temperature", "temperatures above 1 make every target uniform over cosines"
    if optim.min_lr > lr:
        yield "optim.min_lr", f"{optim.min_lr} exceeds the scaled learning rate {lr:g}"
    if optim.warmup_start > optim.lr:
        yield "optim.warmup_start", f"must not exceed optim.lr, {optim.warmup_start} > {optim.lr}"


def _prototypes(config: Config) -> Problems:
    protos, dim = config.prototypes, config.head.bottleneck
    if protos.kind == "memory" and (protos.memory_length or protos.count) < protos.count:
        yield "prototypes.memory_length", f"must be at least prototypes.count, {protos.count}"
    if protos.kind == "fixed" and protos.start == "simplex" and protos.count > dim + 1:
        why = f"a simplex in head.bottleneck = {dim} dimensions has at most one corner more than that"
        yield "prototypes.start", f"{why}, not {protos.count}"
    if protos.koleo_every > 1 and protos.diversity not in ("koleo", "mst"):
        yield "prototypes.koleo_every", f"{protos.diversity} looks for no neighbours; leave it at 1"


def _parts(config: Config) -> Problems:
    """Of a batch."""
    run, method = config.run, config.method
    if run.batch % run.accumulate:
        yield "run.accumulate", f"a batch of {run.batch} does not divide into {run.accumulate} equal parts"
    if method.name in _WHOLE_BATCH and run.accumulate > 1:
        yield "run.accumulate", f"must be 1: {_WHOLE_BATCH[method.name]} from the whole batch's student at once"
    part = run.batch // run.accumulate
    if isinstance(method, DINOv2) and method.koleo_weight and run.accumulate > 1 and part % method.koleo_images:
        why = f"parts of {part} images are not a multiple of method.koleo_images, {method.koleo_images}"
        yield "run.accumulate", why


def _change(config: Config) -> Problems:
    change = config.change
    if change.branch_step and not change.branch:
        yield "change.branch_step", "a run leaves no other at a step without change.branch, the folder of that one"


def _of_method(config: Config) -> Problems:
    method, protos, backbone = config.method, config.prototypes, config.backbone
    has_patches = backbone.name.startswith(("vit_", "deit"))
    if method.name == "carp" and method.block > protos.count:
        yield "method.block", f"blocks of {method.block} cannot be dealt from {protos.count} prototypes"
    if method.name == "swav" and method.queue % config.run.batch:
        yield "method.queue", f"{method.queue} is not a multiple of run.batch, {config.run.batch}"
    if method.name == "msn" and method.drop and not has_patches:
        yield "method.drop", f"{backbone.name} has no patches to leave out; take a vit_*, or 0"
    if method.name in _LABELS and not has_patches:
        why = f"{_LABELS[method.name]} hides patches, which {backbone.name} does not have; take a vit_*"
        yield "backbone.name", why
    if isinstance(method, IBOT | DINOv2):
        if method.mask_ratio[0] > method.mask_ratio[1]:
            yield "method.mask_ratio", "the first number must not exceed the second"
        if backbone.options.get("patch_drop_rate"):
            why = (
                f"patch_drop_rate drops patches whose targets {_LABELS[method.name]} needs; it hides patches of its own"
            )
            yield "backbone.options", f"{why} (method.masked_crops)"
    if isinstance(method, DINOv2) and method.shared and method.patch_bottleneck is not None:
        yield "method.patch_bottleneck", "patches have a head of their own only with method.shared false"


def meaningless(config: Config) -> list[tuple[str, str]]:
    """(key, why) for each pairing of a method, a way to learn prototypes and targets that means nothing.

    The table in docs/training.md lists them.
    """
    method, protos = config.method.name, config.prototypes
    problems = []
    if targets_of(config) == "posterior" and not protos.kind.startswith("decoupled"):
        problems.append(("prototypes.targets", f"only a mixture has a posterior, {protos.kind} has none"))
    if protos.targets == "centred" and method not in CENTRED:
        problems.append(("prototypes.targets", f"{method} has no centre; take sinkhorn or softmax"))
    if protos.targets == "centred" and protos.kind == "memory":
        why = "a centre follows each prototype, and those of memory are others every step; take sinkhorn or softmax"
        problems.append(("prototypes.targets", why))
    if protos.targets in ("floor", "power-law") and protos.kind == "memory":
        why = "it gives each prototype a size of its own, and those of memory are others every step"
        problems.append(("prototypes.targets", f"{why}; take sinkhorn or softmax"))
    if config.method.name == "msn" and config.method.prior == "power" and protos.kind == "memory":
        why = "a power law gives each prototype a share of its own, and those of memory are others every step"
        problems.append(("method.prior", f"{why}; take uniform"))
    if protos.vmf and not config.head.normalise:
        problems.append(("prototypes.vmf", "a vMF density is over unit vectors; head.normalise must be true"))
    return problems
