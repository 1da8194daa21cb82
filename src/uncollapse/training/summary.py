"""The numbers of a finished run, all on held-out images: ``summary.json`` and ``diagnosis.npz``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from uncollapse.config.schema import Config, method_name, mode_name
from uncollapse.data.images import ImageSet, subset
from uncollapse.measure.information import ViewInformation, view_information
from uncollapse.measure.probes import confidence95, knn_predictions, linear_accuracy
from uncollapse.measure.random_start import random_likeness
from uncollapse.measure.unique import EPSILONS, cosine_argmax, epsilon_sweep, greedy_cover, nearest_kept
from uncollapse.measure.usage import PrototypeReport, prototype_report, usage_counts
from uncollapse.methods.contract import At, Seen, method_of
from uncollapse.models.embed import embed, nearest_images, project_views
from uncollapse.models.network import build_encoder
from uncollapse.prototypes.build import initial_prototypes
from uncollapse.run_folder.files import write_atomically
from uncollapse.training.job import Job
from uncollapse.training.state import TrainState

FIT_VIEWS, FEWEST_FIT, MOST_FIT = 2, 2000, 20_000
"""Views of each training image that view information is fitted on; 8 images for each prototype, within these bounds."""
SWEEP = tuple(float(e) for e in np.round(np.linspace(0.0125, 0.5, 40), 4))
K_NEIGHBOURS = 20


def finish_run(job: Job, state: TrainState, steps: int, loss: float, seconds: dict[str, float]) -> dict[str, Any]:
    """Evaluates the teacher's side and writes ``summary.json`` and ``diagnosis.npz``; returns the summary.

    Args:
        job: the run.
        state: as it was trained.
        steps: made so far, over all parts of a resumed run.
        loss: of the last one.
        seconds: spent on each part of all of them.
    """
    config, held_out, device = job.config, job.held_out, job.device
    prototypes, monitor = state.prototypes(), state.monitors["cls"]
    vectors = prototypes.vectors("teacher").cpu()
    features, z, labels = embed(state.evaluated, held_out, config.views, config.data.workers, device)
    report = prototype_report(vectors, z)
    information, notes = _information(job, state, vectors)
    probes, correct = _probes(job, state, features, labels)
    total = sum(seconds.values())
    summary: dict[str, Any] = {
        "name": mode_name(config),
        "method": method_name(config),
        "seed": config.seed,
        "prototypes": len(vectors),
        "dim": vectors.shape[1],
        "steps": steps,
        "n_train": len(job.images),
        "n_held_out": len(held_out),
        **job.digests,
        **_jsonable(report),
        "random_start": dataclasses.asdict(random_likeness(vectors, EPSILONS[0])),
        "view_information": None if information is None else information.to_json(),
        "unique_means": {f"{eps:g}": n for eps, n in epsilon_sweep(prototypes.means().cpu(), EPSILONS).items()},
        **_used_by_target(job, state, z, vectors),
        "alive": monitor.alive(),
        "alive_window": min(monitor.window, monitor.calls),
        "loss": loss,
        "seconds_per_step": total / max(1, steps),
        "step_parts": {part: value / max(1, steps) for part, value in seconds.items()},
        "diagnosis_share": seconds.get("diagnosis", 0.0) / total if total else 0.0,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "data": Path(config.data.path).name,
        "encoder": config.backbone.name,
        **probes,
    }
    summary["notes"] = [*notes, *summary["notes"]]
    arrays: dict[str, Any] = _arrays(config, vectors, z, held_out) | correct
    if information is not None:
        arrays["view_information_of_image"] = information.of_image.float().numpy()
    np.savez_compressed(job.out / "diagnosis.npz", **arrays)
    write_atomically(job.out / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    return summary


def _information(job: Job, state: TrainState, vectors: Tensor) -> tuple[ViewInformation | None, list[str]]:
    """View information of the held-out images, fitted on training images; or None, and why."""
    config, device = job.config, job.device
    chosen = np.random.default_rng([config.seed, 2]).permutation(len(job.images))
    fitting = subset(job.images, np.sort(chosen[: max(FEWEST_FIT, 8 * len(vectors))][:MOST_FIT]))
    try:
        z_views = project_views(state.evaluated, job.held_out, config.views, config.seed, config.data.workers, device)
        z_fit = project_views(
            state.evaluated, fitting, config.views, config.seed, config.data.workers, device, FIT_VIEWS
        )
        found = view_information(z_views, vectors, z_fit)
    except Exception as error:  # the training is done, and no measure may cost it
        return None, [f"no view information: {_in_words(error)}"]
    return dataclasses.replace(found, fitted_on="training images"), []


def _used_by_target(job: Job, state: TrainState, z: Tensor, vectors: Tensor) -> dict[str, Any]:
    """The same count by the target of training, which centring, Sinkhorn or the mixture's posterior decides."""
    config = job.config
    seen, end = Seen({"cls": z[None].to(job.device)}), At(0, float(1 << 40), 1.0, config.seed, None)
    sets = {name: state.prototypes(name) for name in state.parts.names()}
    targets = next(iter(method_of(config).assign(config, seen, sets, state.memory, end).values()))
    weight, bias = targets.weight.float(), targets.bias
    hardest = []
    for part in targets.z[0].float().split(max(64, (1 << 22) // len(weight))):
        logits = part @ weight.T / targets.temperature
        hardest.append((logits if bias is None else logits + bias).argmax(1))
    by_target = torch.cat(hardest).cpu()
    agreement = (by_target == cosine_argmax(z, vectors)).double().mean()
    return {"used_by_target": len(by_target.unique()), "target_agreement": float(agreement)}


def _jsonable(report: PrototypeReport) -> dict[str, Any]:
    """ε as text keys, as JSON has no numbers there."""
    values = dataclasses.asdict(report)
    for name, value in values.items():
        if isinstance(value, dict):
            values[name] = {f"{eps:g}": number for eps, number in value.items()}
    values.pop("n")
    values.pop("view_information")
    return values


def _probes(
    job: Job, state: TrainState, features: Tensor, labels: Tensor | None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """kNN and linear accuracy of the teacher's features, and kNN of the untrained encoder beside it; and of which
    held-out images they are right.

    Accuracies count images alike; the balanced ones beside them count classes alike. One that cannot be had is None,
    and ``notes`` says why: the training is done, and no probe may cost it.
    """
    config, held_out, device = job.config, job.held_out, job.device
    found: dict[str, Any] = dict.fromkeys(
        ("knn", "knn_ci95", "knn_balanced", "linear", "linear_ci95", "linear_balanced", "knn_untrained")
    )
    found["notes"] = []
    correct: dict[str, np.ndarray] = {}
    if labels is None or job.images.labels is None:
        return found, correct
    chosen = np.random.default_rng([config.seed, 2]).permutation(len(job.images))
    bank = subset(job.images, np.sort(chosen[: config.log.evaluate_train]))
    try:
        bank_features, _, bank_labels = embed(state.evaluated, bank, config.views, config.data.workers, device)
    except Exception as error:
        found["notes"].append(f"no probes: {_in_words(error)}")
        return found, correct
    assert bank_labels is not None
    k, n = min(K_NEIGHBOURS, len(bank_features)), len(labels)
    found.update(knn_k=k, n_bank=len(bank_features))

    counts = torch.bincount(labels)
    weight = (n / ((counts > 0).sum() * counts[labels])).double().numpy()  # classes count alike

    def measure(name: str, predict: Callable[[], Tensor], what: str) -> None:
        try:
            right = (predict().cpu() == labels).numpy()
        except Exception as error:
            found["notes"].append(f"no {what}: {_in_words(error)}")
            return
        found[name] = float(right.mean())
        found[f"{name}_ci95"] = list(confidence95(found[name], n))
        balanced = right * weight
        found[f"{name}_balanced"] = float(balanced.mean())
        correct.update({f"{name}_correct": right, f"{name}_balanced_of_image": balanced.astype(np.float32)})

    def linear() -> Tensor:
        return linear_accuracy(bank_features, bank_labels, features, labels, config.seed % 2**32).predicted

    def untrained() -> Tensor:
        encoder = build_encoder(config, drop_path=False).to(device)
        raw = [embed(encoder, images, config.views, config.data.workers, device)[0] for images in (bank, held_out)]
        return knn_predictions(raw[0], bank_labels, raw[1], [k])[k]

    measure("knn", lambda: knn_predictions(bank_features, bank_labels, features, [k])[k], "kNN accuracy")
    measure("linear", linear, "linear probe")
    measure("knn_untrained", untrained, "kNN accuracy of the untrained encoder")
    return found, correct


def _in_words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _arrays(config: Config, vectors: Tensor, z: Tensor, held_out: ImageSet) -> dict[str, np.ndarray]:
    """What the report draws."""
    plane = torch.linalg.qr(torch.randn(vectors.shape[1], 2, generator=torch.Generator().manual_seed(0)))[0]
    argmax = cosine_argmax(z, vectors)
    counts = usage_counts(argmax, len(vectors))
    start = initial_prototypes(config).vectors("teacher")
    unique = epsilon_sweep(vectors, SWEEP)
    arrays = {
        "circle": F.normalize(vectors @ plane, dim=-1).numpy(),
        "usage": counts.numpy(),
        "sweep_eps": np.array(list(unique)),
        "sweep_unique": np.array(list(unique.values())),
        "movement": (1 - (vectors * start).sum(-1)).numpy(),
    }
    duplicated, distinct = _example_prototypes(vectors, counts)
    for name, ids in (("duplicate", duplicated), ("unique", distinct)):
        if len(ids):
            arrays[f"{name}_ids"] = ids.numpy()
            arrays[f"{name}_images"] = nearest_images(vectors[ids], z, held_out)
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
