"""The numbers of a finished run, all on held-out images: ``summary.json`` and ``diagnosis.npz``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uncollapse.config.facts import method_name, mode_name
from uncollapse.data.images import ImageSet, subset
from uncollapse.measure.information import ViewInformation, view_information
from uncollapse.measure.linear import linear_probe
from uncollapse.measure.probes import confidence95, knn_predictions
from uncollapse.measure.random_start import random_likeness
from uncollapse.measure.unique import EPSILONS, SWEEP, cosine_argmax, epsilon_sweep, greedy_cover, nearest_kept
from uncollapse.measure.usage import PrototypeReport, prototype_report, usage_counts
from uncollapse.methods.balance import balanced
from uncollapse.methods.contract import At, Seen, method_of
from uncollapse.models.embed import SomePatches, embed, nearest_images, project_views, projected
from uncollapse.models.network import OF_TOKENS, Encoder, build_encoder
from uncollapse.models.tokens import PatchTokens, plain
from uncollapse.numerics import rows_at_once
from uncollapse.prototypes.build import initial_prototypes
from uncollapse.run_folder.files import write_atomically
from uncollapse.run_folder.summary import Information, SetSummary, Summary
from uncollapse.shown import in_words
from uncollapse.training.job import Job
from uncollapse.training.state import TrainState

FIT_VIEWS, FEWEST_FIT, MOST_FIT = 2, 2000, 20_000
"""Views of each training image that view information is fitted on; 8 images for each prototype, within these bounds."""
K_NEIGHBOURS = 20
NO_PAIRS = "no view information: these are prototypes of patches, and two crops of an image share no patch"
T = TypeVar("T")


def finish_run(job: Job, state: TrainState, steps: int, loss: float, seconds: dict[str, float]) -> dict[str, Any]:
    """Evaluates the teacher's side and writes ``summary.json`` and ``diagnosis.npz``; returns the summary.

    Args:
        job: the run.
        state: as it was trained.
        steps: made so far, over all parts of a resumed run.
        loss: of the last one.
        seconds: spent on each part of all of them.
    """
    config, device = job.config, job.device
    main, *others = state.parts.names()
    of_patches = state.parts.levels(main) == ["patch"]
    vectors, moved = state.prototypes(main).vectors("teacher").cpu(), _movement(job, state, main)
    features, z, labels = embed(state.evaluated, job.held_out, config.views, config.data.workers, device)
    each = 1
    if of_patches:
        z, each = _patches(job, state, state.evaluated.head_of("patch"))
    report = prototype_report(vectors, z)
    information, notes = (None, [NO_PAIRS]) if of_patches else _information(job, state, vectors)
    probes, correct = _probes(job, state, features, labels)
    notes += probes.pop("notes")
    if moved is None:
        notes.append("neither alive nor movement: prototypes that are projections are others every step")
    total = sum(seconds.values())
    summary = Summary(
        name=mode_name(config),
        method=method_name(config),
        seed=config.seed,
        steps=steps,
        n_train=len(job.images),
        n_held_out=len(job.held_out),
        data_digest=job.digests["data_digest"],
        held_out_digest=job.digests["held_out_digest"],
        **_of_set(job, state, main, moved, report, "patches" if of_patches else "images"),
        effective_rank=report.effective_rank,
        uniformity=report.uniformity,
        view_information=None if information is None else _in_short(information),
        **({} if of_patches else _used_by_target(job, state, z, vectors)),
        sets={name: SetSummary(**_of_other_set(job, state, name, features, notes)) for name in others},
        loss=loss,
        seconds_per_step=total / max(1, steps),
        step_parts={part: value / max(1, steps) for part, value in seconds.items()},
        diagnosis_share=seconds.get("diagnosis", 0.0) / total if total else 0.0,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        data=Path(config.data.path).name,
        encoder=config.backbone.name,
        **probes,
        notes=notes,
    )
    arrays: dict[str, Any] = _arrays(vectors, z, job.held_out, each) | correct
    if moved is not None:
        arrays["movement"] = moved.numpy()
    if information is not None:
        arrays["view_information_of_image"] = information.of_image.float().numpy()
    np.savez_compressed(job.out / "diagnosis.npz", **arrays)
    row = dataclasses.asdict(summary)
    write_atomically(job.out / "summary.json", (json.dumps(row, indent=1) + "\n").encode())
    return row


def _movement(job: Job, state: TrainState, name: str) -> Tensor | None:
    """``(K,)``: the cosine distance of every prototype of a set from where it started; None where none lasts."""
    if not state.prototypes(name).lasting:
        return None
    start = initial_prototypes(job.config, state.parts.names().index(name), len(state.parts.levels(name)), name)
    return 1 - (state.prototypes(name).vectors("teacher").cpu() * start.vectors("teacher")).sum(-1)


def _of_set(
    job: Job, state: TrainState, name: str, moved: Tensor | None, report: PrototypeReport | None, unit: str = "images"
) -> dict[str, Any]:
    """The entries of a `SetSummary`; those that need projections come from ``report``, of so many of a ``unit``."""
    prototypes, monitor = state.prototypes(name), state.monitors[name]
    vectors = prototypes.vectors("teacher").cpu()
    entries: dict[str, Any] = {
        "prototypes": len(vectors),
        "dim": vectors.shape[1],
        "unique": _by_epsilon(epsilon_sweep(vectors, EPSILONS) if report is None else report.unique),
        "unique_means": _by_epsilon(epsilon_sweep(prototypes.means().cpu(), EPSILONS)),
        "random_start": random_likeness(vectors, EPSILONS[0]),
    }
    if moved is not None:
        entries |= {"alive": monitor.alive(), "alive_window": min(monitor.window, monitor.calls)}
        entries["movement"] = float(moved.mean().clamp_min(0))
    if report is not None:
        entries |= {"used": report.used, "n": report.n, "unit": unit}
        entries |= {"unique_used": _by_epsilon(report.unique_used), "effective": _by_epsilon(report.effective)}
    return entries


def _of_other_set(job: Job, state: TrainState, name: str, features: Tensor, notes: list[str]) -> dict[str, Any]:
    """The same of a set beside the first.

    Its use is seen on the features ``(n, d)`` of held-out images; that of a set of patches or regions on some of these.
    """
    report = None
    head, of_tokens = state.evaluated.head_of(name), state.parts.levels(name)[0] in OF_TOKENS
    try:
        z = _patches(job, state, head)[0] if of_tokens else projected(head, features, job.device)
        report = prototype_report(state.prototypes(name).vectors("teacher").cpu(), z)
    except Exception as error:  # the training is done, and no measure may cost it
        notes.append(f"no use of the prototypes of {name!r}: {in_words(error)}")
    return _of_set(job, state, name, _movement(job, state, name), report, "patches" if of_tokens else "images")


def _patches(job: Job, state: TrainState, head: nn.Module) -> tuple[Tensor, int]:
    """Projections of some patches of the held-out images, image by image, and of how many of each."""
    chosen, config = SomePatches(PatchTokens(plain(state.evaluated.backbone))), job.config
    z = embed(Encoder(chosen, {"cls": head}), job.held_out, config.views, config.data.workers, job.device)[1]
    return z, chosen.each


def _in_short(information: ViewInformation) -> Information:
    return Information(
        information.bits,
        information.standard_error,
        information.fitted_on,
        information.n_fit,
        information.n,
        information.views,
    )


def _by_epsilon(by_epsilon: Mapping[float, T]) -> dict[str, T]:
    """ε as text keys, as JSON has no numbers there."""
    return {f"{eps:g}": number for eps, number in by_epsilon.items()}


def _information(job: Job, state: TrainState, vectors: Tensor) -> tuple[ViewInformation | None, list[str]]:
    """View information of the held-out images, fitted on training images; or None, and why."""
    config, device = job.config, job.device
    fitting = _training_subset(job, min(MOST_FIT, max(FEWEST_FIT, 8 * len(vectors))))
    try:
        z_views = project_views(state.evaluated, job.held_out, config.views, config.seed, config.data.workers, device)
        z_fit = project_views(
            state.evaluated, fitting, config.views, config.seed, config.data.workers, device, FIT_VIEWS
        )
        information = view_information(z_views, vectors, z_fit)
    except Exception as error:  # the training is done, and no measure may cost it
        return None, [f"no view information: {in_words(error)}"]
    return dataclasses.replace(information, fitted_on="training images"), []


def _training_subset(job: Job, most: int) -> ImageSet:
    """At most so many training images, chosen by the seed alone; fewer are among more."""
    chosen = np.random.default_rng([job.config.seed, 2]).permutation(len(job.images))
    return subset(job.images, np.sort(chosen[:most]))


def _used_by_target(job: Job, state: TrainState, z: Tensor, vectors: Tensor) -> dict[str, Any]:
    """The same count by the target of training, which centring, Sinkhorn or the mixture's posterior decides."""
    config = job.config
    seen, end = Seen({"cls": z[None].to(job.device)}), At(0, float(1 << 40), 1.0, config.seed, None)
    made = method_of(config).assign(config, seen, state.by_name, state.memory, end)
    targets = next(iter(balanced(config, made, state.memory, end).values()))
    weight, bias = targets.weight.float(), targets.bias
    hardest = []
    for part in targets.z[0].float().split(rows_at_once(len(weight))):
        logits = part @ weight.T / targets.temperature
        hardest.append((logits if bias is None else logits + bias).argmax(1))
    by_target = torch.cat(hardest).cpu()
    agreement = (by_target == cosine_argmax(z, vectors)).double().mean()
    return {"used_by_target": len(by_target.unique()), "target_agreement": float(agreement)}


def _probes(
    job: Job, state: TrainState, features: Tensor, labels: Tensor | None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """kNN and linear accuracy of the teacher's features, and kNN of the untrained encoder beside it; and of which
    held-out images they are right.

    Accuracies count images alike; the balanced ones beside them count classes alike. One that cannot be had is None,
    and ``notes`` says why: the training is done, and no probe may cost it.
    """
    config, held_out, device = job.config, job.held_out, job.device
    probes: dict[str, Any] = dict.fromkeys(
        ("knn", "knn_ci95", "knn_balanced", "linear", "linear_ci95", "linear_balanced", "knn_untrained")
    )
    probes["notes"] = []
    correct: dict[str, np.ndarray] = {}
    if labels is None or job.images.labels is None:
        return probes, correct
    bank = _training_subset(job, config.log.evaluate_train)
    try:
        bank_features, _, bank_labels = embed(state.evaluated, bank, config.views, config.data.workers, device)
    except Exception as error:
        probes["notes"].append(f"no probes: {in_words(error)}")
        return probes, correct
    assert bank_labels is not None
    k, n = min(K_NEIGHBOURS, len(bank_features)), len(labels)
    probes.update(knn_k=k, n_bank=len(bank_features))

    counts = torch.bincount(labels)
    weight = (n / ((counts > 0).sum() * counts[labels])).double().numpy()  # classes count alike

    def measure(name: str, predict: Callable[[], Tensor], what: str) -> None:
        try:
            right = (predict().cpu() == labels).numpy()
        except Exception as error:
            probes["notes"].append(f"no {what}: {in_words(error)}")
            return
        probes[name] = float(right.mean())
        probes[f"{name}_ci95"] = list(confidence95(probes[name], n))
        balanced = right * weight
        probes[f"{name}_balanced"] = float(balanced.mean())
        correct.update({f"{name}_correct": right, f"{name}_balanced_of_image": balanced.astype(np.float32)})

    def linear() -> Tensor:
        probe = linear_probe(bank_features, bank_labels, features, seed=config.seed % 2**32, device=device)
        return probe.scores.argmax(1)

    def untrained() -> Tensor:
        encoder = build_encoder(config, drop_path=False).to(device)
        raw = [embed(encoder, images, config.views, config.data.workers, device)[0] for images in (bank, held_out)]
        return knn_predictions(raw[0], bank_labels, raw[1], [k])[k]

    measure("knn", lambda: knn_predictions(bank_features, bank_labels, features, [k])[k], "kNN accuracy")
    measure("linear", linear, "linear probe")
    measure("knn_untrained", untrained, "kNN accuracy of the untrained encoder")
    return probes, correct


def _arrays(vectors: Tensor, z: Tensor, held_out: ImageSet, each: int) -> dict[str, np.ndarray]:
    """What the report draws; ``z`` has ``each`` rows of every image."""
    plane = torch.linalg.qr(torch.randn(vectors.shape[1], 2, generator=torch.Generator().manual_seed(0)))[0]
    argmax = cosine_argmax(z, vectors)
    counts = usage_counts(argmax, len(vectors))
    unique = epsilon_sweep(vectors, SWEEP)
    arrays = {
        "circle": F.normalize(vectors @ plane, dim=-1).numpy(),
        "usage": counts.numpy(),
        "sweep_eps": np.array(list(unique)),
        "sweep_unique": np.array(list(unique.values())),
    }
    duplicated, distinct = _example_prototypes(vectors, counts)
    for name, ids in (("duplicate", duplicated), ("unique", distinct)):
        if len(ids):
            arrays[f"{name}_ids"] = ids.numpy()
            arrays[f"{name}_images"] = nearest_images(vectors[ids], z.unflatten(0, (-1, each)), held_out)
    return arrays


def _example_prototypes(vectors: Tensor, counts: Tensor, eps: float = 0.025, most: int = 4) -> tuple[Tensor, Tensor]:
    """Members of the ε-group with the most images, and the most used prototypes that have no duplicate."""
    group = nearest_kept(vectors, greedy_cover(vectors, eps))
    size = torch.bincount(group, minlength=len(vectors))
    images = torch.zeros(len(vectors), dtype=counts.dtype).index_add_(0, group, counts)
    crowded = torch.where(size > 1, images, torch.full_like(images, -1))
    leader = int(crowded.argmax())
    members = (group == leader).nonzero().squeeze(1) if crowded[leader] >= 0 else group[:0]
    order = counts[members].argsort(descending=True, stable=True)
    alone = torch.where((size[group] == 1) & (counts > 0), counts, torch.full_like(counts, -1))
    top = alone.topk(min(most, len(alone)))
    return members[order[:most]], top.indices[top.values > 0]
