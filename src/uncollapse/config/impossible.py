"""Combinations of settings that no single key's range can rule out."""

from __future__ import annotations

from uncollapse.config.facts import targets_of
from uncollapse.config.methods import CENTRED, IBOT, DINOv2
from uncollapse.config.schema import Config


def impossible(config: Config) -> list[tuple[str, str]]:
    """(key, what is wrong with it) for each; empty where all is well."""
    views, teacher, optim, run = config.views, config.teacher, config.optim, config.run
    method, protos = config.method, config.prototypes
    problems = []
    for name in ("global_scale", "local_scale", "blur_sigma"):
        low, high = getattr(views, name)
        if low > high:
            problems.append((f"views.{name}", f"the first number must not exceed the second, got {low} > {high}"))
    if any(s <= 0 for s in views.std):
        problems.append(("views.std", f"must be positive, got {list(views.std)}"))
    momentum, end, lr = teacher.momentum, teacher.momentum_end, optim.lr * run.batch / optim.lr_batch
    if end < momentum:
        problems.append(("teacher.momentum_end", f"must be at least teacher.momentum, {end} < {momentum}"))
    if optim.min_lr > lr:
        problems.append(("optim.min_lr", f"{optim.min_lr} exceeds the scaled learning rate {lr:g}"))
    if optim.warmup_start > optim.lr:
        problems.append(("optim.warmup_start", f"must not exceed optim.lr, {optim.warmup_start} > {optim.lr}"))
    if teacher.momentum_start is not None and teacher.momentum_shape == "linear":
        problems.append(
            ("teacher.momentum_start", "a straight line has no warm-up; take teacher.momentum_shape cosine")
        )
    if method.name in ("dino", "ibot", "dinov2", "swav", "carp") and views.global_count + views.local_count < 2:
        problems.append(
            ("views.local_count", f"a single view of an image has no other one to predict in {method.name}")
        )
    if protos.kind == "memory" and (protos.memory_length or protos.count) < protos.count:
        problems.append(("prototypes.memory_length", f"must be at least prototypes.count, {protos.count}"))
    if protos.kind == "fixed" and protos.start == "simplex" and protos.count > config.head.bottleneck + 1:
        why = (
            f"a simplex in head.bottleneck = {config.head.bottleneck} dimensions has at most one corner more than that"
        )
        problems.append(("prototypes.start", f"{why}, not {protos.count}"))
    if run.batch % run.accumulate:
        problems.append(("run.accumulate", f"a batch of {run.batch} does not divide into {run.accumulate} equal parts"))
    if teacher.temperature > 1 or teacher.temperature_start > 1:
        problems.append(("teacher.temperature", "temperatures above 1 make every target uniform over cosines"))
    if method.name == "carp" and method.block > protos.count:
        problems.append(("method.block", f"blocks of {method.block} cannot be dealt from {protos.count} prototypes"))
    if method.name == "swav" and method.queue % run.batch:
        problems.append(("method.queue", f"{method.queue} is not a multiple of run.batch, {run.batch}"))
    if method.name in ("swav", "carp", "msn") and run.accumulate > 1:
        why = {
            "swav": "SwAV's codes come",
            "carp": "CARP's entropy comes",
            "msn": "MSN's mean prediction comes",
        }[method.name]
        problems.append(("run.accumulate", f"must be 1: {why} from the whole batch's student at once"))
    if isinstance(method, IBOT | DINOv2):
        label, name = {"ibot": "iBOT", "dinov2": "DINOv2"}[method.name], config.backbone.name
        if method.mask_ratio[0] > method.mask_ratio[1]:
            problems.append(("method.mask_ratio", "the first number must not exceed the second"))
        if not name.startswith(("vit_", "deit")):
            problems.append(("backbone.name", f"{label} hides patches, which {name} does not have; take a vit_*"))
        if config.backbone.options.get("patch_drop_rate"):
            why = f"patch_drop_rate drops patches whose targets {label} needs; it hides patches of its own"
            problems.append(("backbone.options", f"{why} (method.masked_crops)"))
    if protos.koleo_every > 1 and protos.diversity not in ("koleo", "mst"):
        problems.append(("prototypes.koleo_every", f"{protos.diversity} looks for no neighbours; leave it at 1"))
    if isinstance(method, DINOv2) and method.shared and method.patch_bottleneck is not None:
        problems.append(("method.patch_bottleneck", "patches have a head of their own only with method.shared false"))
    part = run.batch // run.accumulate
    if isinstance(method, DINOv2) and method.koleo_weight and run.accumulate > 1 and part % method.koleo_images:
        why = f"parts of {part} images are not a multiple of method.koleo_images, {method.koleo_images}"
        problems.append(("run.accumulate", why))
    if method.name == "msn" and views.global_count + views.local_count < 2:
        problems.append(("views.local_count", "MSN's student sees other views than its teacher, and there is but one"))
    if method.name == "msn" and method.drop and not config.backbone.name.startswith(("vit_", "deit")):
        problems.append(("method.drop", f"{config.backbone.name} has no patches to leave out; take a vit_*, or 0"))
    if method.name == "capi" and not config.backbone.name.startswith(("vit_", "deit")):
        why = f"CAPI hides patches, which {config.backbone.name} does not have; take a vit_*"
        problems.append(("backbone.name", why))
    if method.name == "capi" and views.local_count:
        problems.append(("views.local_count", f"CAPI has no local views, got {views.local_count}; set it to 0"))
    return problems


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
