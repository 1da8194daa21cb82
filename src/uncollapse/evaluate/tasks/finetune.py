"""Fine-tuning: all weights of a copy of the encoder trained further on the labels, by BEiT's recipe."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from uncollapse.data.images import ImageSet, subset
from uncollapse.data.load import split_items
from uncollapse.errors import DataError
from uncollapse.evaluate.encoder import EvalEncoder
from uncollapse.evaluate.extract import batches, identity
from uncollapse.evaluate.result import Result, bootstrap95_class_means, bootstrap95_mean
from uncollapse.evaluate.tasks.finetune_model import FinetuneConfig, Tuned, augmented_batches, parameter_groups, seeded
from uncollapse.progress import Report, bars
from uncollapse.run_folder.checkpoint import load_checkpoint, save_checkpoint
from uncollapse.schedules import cosine

SOURCE = "BEiT's fine-tuning (Bao et al. 2022) with iBOT's settings (Zhou et al. 2022)"


class Diverged(RuntimeError):
    """The loss is no longer a number."""


def published(encoder: EvalEncoder) -> FinetuneConfig:
    """iBOT's settings for ViT-S, -B and -L by width; those of ViT-S for anything smaller, and for CNNs."""
    if encoder.tokens and encoder.width >= 1024:
        return FinetuneConfig(epochs=50, warmup_epochs=5, layer_decay=0.75, drop_path=0.4)
    if encoder.tokens and encoder.width >= 768:
        return FinetuneConfig(epochs=100, layer_decay=0.65, drop_path=0.2)
    return FinetuneConfig()


def finetune(
    encoder: EvalEncoder,
    train: ImageSet,
    test: ImageSet,
    config: FinetuneConfig | None = None,
    *,
    max_steps: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    workers: int = 0,
    out: Path | None = None,
    report: Report | None = None,
) -> Result:
    """Accuracy on test images after training a copy of the encoder, with a linear classifier, on the labels.

    The learning rate is chosen by accuracy on held-out *training* images, in a shorter training for each candidate
    (of equal ones the smaller); then all training images are trained on from the start, and the test images are
    looked at once, after the last step. No moving average of weights.

    Args:
        encoder: not changed. train, test: labelled by the same classes.
        config: None: `published`. Short runs are stated in the result's protocol.
        max_steps: most steps of the final training; warm-up and search shrink in proportion.
        workers: processes that decode and augment; they do not change the result.
        out: state is kept in ``out/finetune`` at the end of an epoch, and a later call with the same encoder, data
            and settings goes on there with the same numbers; None: nothing is kept.
        report: called with (name, steps done, steps to do, loss); None: a bar on stderr.

    Returns:
        Metrics ``top1`` with a bootstrap interval over test images, ``top5`` where there are more than 5 classes,
        and ``class_mean``, the mean of the accuracies of the classes that have test images.

    Raises:
        DataError: labels or images that cannot be used. Diverged: a loss that is NaN or infinite.
    """
    if train.labels is None or test.labels is None:
        raise DataError("finetune: both training and test images need labels")
    if max_steps is not None and max_steps < 1:
        raise DataError(f"finetune: at least 1 step, got {max_steps}")
    config = config or published(encoder)
    classes = max(len(train.classes), int(train.labels.max()) + 1, int(test.labels.max()) + 1)
    kept, held = split_items(len(train), train.labels.numpy(), config.held_out, len(train), np.random.default_rng(seed))
    if len(kept) < 4 or not len(held):
        raise DataError(f"finetune: {len(train)} training images are too few to hold some out")
    searched_on, chosen_on = subset(train, kept), subset(train, held)
    state = _State(None if out is None else out / "finetune" / _key(encoder, train, config, max_steps, seed))
    saved = state.load()
    scores: dict[str, float] = saved.get("scores", {})
    work = _Work(encoder, config, classes, seed, torch.device(device), workers, max_steps, state, scores)
    with told("fine-tuning", report) as tell:
        for k, lr in enumerate(config.lrs):
            if len(config.lrs) > 1 and f"{lr:g}" not in scores:
                try:
                    model = _train(work, searched_on, k, lr, config.search_share, saved, tell)
                    scores[f"{lr:g}"] = float(_scores(model, chosen_on, work)[0].mean())
                except Diverged:
                    scores[f"{lr:g}"] = math.nan
        # Of equally good rates the smallest: the first one that no later one beats.
        usable = [(lr, scores.get(f"{lr:g}", 0.0)) for lr in sorted(config.lrs)]
        usable = [(lr, s) for lr, s in usable if not math.isnan(s)]
        if not usable:
            raise Diverged(
                f"finetune: the loss became NaN or infinite at every learning rate of {config.lrs}; "
                "the encoder's weights may be damaged, or the rates far too large"
            )
        lr = max(usable, key=lambda one: one[1])[0]
        model = _train(work, train, len(config.lrs), lr, 1.0, saved, tell)
    top1, top5, labels = _scores(model, test, work)
    return _result(work, top1, top5, labels, lr, len(train), len(held))


def _result(
    work: _Work, top1: np.ndarray, top5: np.ndarray, labels: np.ndarray, lr: float, n: int, held: int
) -> Result:
    config = work.config
    batch, per_epoch, steps = work.length(n, 1.0)
    full = round(config.epochs * per_epoch)
    means = [top1[labels == c].mean() for c in np.unique(labels)]
    metrics = {"top1": float(top1.mean())}
    if work.classes > 5:
        metrics["top5"] = float(top5.mean())
    metrics["class_mean"] = float(np.mean(means))
    short = "" if steps == full else f"; reduced to {steps} of {full} steps"
    return Result(
        "finetune",
        metrics,
        bootstrap95_mean(top1),
        len(top1),
        f"all weights, {steps / per_epoch:.3g} epochs of {per_epoch} steps of {batch} images, lr {lr:g} × "
        f"{batch}/{config.lr_batch}, layer decay {config.layer_decay:g}{short}",
        SOURCE,
        {
            "settings": dataclasses.asdict(config),
            "lr": lr,
            "held_out_accuracy_by_lr": work.scores,
            "rule": f"lr by accuracy on {held} held-out training images after {config.search_share:g} of the steps; "
            "test images seen once, at the end",
            "steps": steps,
            "full_steps": full,
            "batch": batch,
        },
        {
            **({"top5": bootstrap95_mean(top5)} if work.classes > 5 else {}),
            "class_mean": bootstrap95_class_means(top1, labels),
        },
    )


@contextmanager
def told(name: str, report: Report | None = None) -> Iterator[Report]:
    """``report`` where there is one; else one bar called ``name`` on stderr for all trainings of a task."""
    if report is not None:
        yield report
        return
    with bars(Console(stderr=True), [name], keep=True) as tell:
        yield lambda _, done, total, loss: tell(name, done, total, loss)


# --- state --------------------------------------------------------------------------------------------------


@dataclass
class _State:
    """Where training is kept; nowhere without a folder."""

    folder: Path | None
    written: float = -math.inf

    def load(self) -> dict[str, Any]:
        return (None if self.folder is None else load_checkpoint(self.folder)) or {}

    def save(self, stage: int, step: int, content: dict[str, Any], seconds: float) -> None:
        if self.folder is not None and time.monotonic() - self.written >= seconds:
            save_checkpoint(self.folder, stage * 10**7 + step, {"stage": stage, "done": step, **content}, keep=2)
            self.written = time.monotonic()


def _key(encoder: EvalEncoder, train: ImageSet, config: FinetuneConfig, max_steps: int | None, seed: int) -> str:
    """Of all that a training depends on, so that it only goes on where nothing has changed."""
    assert train.labels is not None
    parts = [
        encoder.weights_hash,
        encoder.size,
        list(encoder.mean),
        list(encoder.std),
        identity(train),
        hashlib.sha256(train.labels.numpy().tobytes()).hexdigest(),
        dataclasses.asdict(config),
        max_steps,
        seed,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class _Work:
    """What every training of one call shares."""

    encoder: EvalEncoder
    config: FinetuneConfig
    classes: int
    seed: int
    device: torch.device
    workers: int
    max_steps: int | None
    state: _State
    scores: dict[str, float]

    def length(self, n: int, share: float) -> tuple[int, int, int]:
        """Images per step, steps per epoch and steps in all for n images."""
        # Mixing pairs the images of a batch, which takes an even number.
        batch = max(2, min(self.config.batch, max(16, n // 16), n) // 2 * 2)
        per_epoch = n // batch
        steps = round(self.config.epochs * per_epoch)
        steps = steps if self.max_steps is None else min(steps, self.max_steps)
        return batch, per_epoch, max(1, round(steps * share))


# --- training -----------------------------------------------------------------------------------------------


def _train(
    work: _Work, images: ImageSet, stage: int, lr: float, share: float, saved: dict[str, Any], tell: Report
) -> Tuned:
    """The model of one training, trained from where ``saved`` left it if that was this stage."""
    from timm.data import Mixup

    config, device = work.config, work.device
    batch, per_epoch, steps = work.length(len(images), share)
    with seeded(work.seed, stage):
        model = Tuned(work.encoder, work.classes, config).to(device)
    groups = parameter_groups(model, work.encoder.tokens, config)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.betas)
    start = 0
    if saved.get("stage") == stage:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = int(saved["done"])
    warmup = round(steps * min(1.0, config.warmup_epochs / max(config.epochs, 1e-9)))
    top, low = lr * batch / config.lr_batch, min(config.min_lr, lr * batch / config.lr_batch)
    mixing = float(config.mixup > 0 or config.cutmix > 0)
    mix = Mixup(config.mixup, config.cutmix, prob=mixing, label_smoothing=config.smoothing, num_classes=work.classes)
    name = "fine-tuning" if share == 1 else f"lr {lr:g}"
    loss = torch.tensor(math.nan)
    model.train()
    remaining = augmented_batches(
        images, work.encoder, config, (work.seed, stage), batch, range(start, steps), work.workers, device
    )
    for step, (x, y) in enumerate(remaining, start):
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, top, low, warmup) * group["scale"]
        devices = [device] if device.type == "cuda" else []
        with seeded(work.seed, stage, 1, step), torch.random.fork_rng(devices, enabled=bool(devices)):
            if devices:
                torch.cuda.manual_seed(work.seed * 10**6 + step)
            x, targets = mix(x, y)
            with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(x)
        loss = -(targets * torch.log_softmax(logits.float(), 1)).sum(1).mean()
        if not math.isfinite(value := float(loss.detach())):
            raise Diverged(
                f"finetune: the loss is {value} at step {step} of {steps} with lr {lr:g} × {batch}/"
                f"{config.lr_batch}; give smaller learning rates"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % per_epoch == 0 or step + 1 == steps:
            content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scores": work.scores}
            work.state.save(stage, step + 1, content, 0.0 if step + 1 == steps else config.checkpoint_seconds)
        tell(name, step + 1, steps, value)
    return model.eval()


@torch.inference_mode()
def _scores(model: Tuned, images: ImageSet, work: _Work) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whether each image's class is the first, or among the first five (0/1 float64), and the labels."""
    assert images.labels is not None
    first, five, labels = [], [], []
    for rows, x in batches(images, work.encoder, 256, work.workers, work.device):
        with torch.autocast("cuda", torch.bfloat16, enabled=x.device.type == "cuda"):
            ranked = model(x).float().cpu().topk(min(5, work.classes), dim=1).indices
        y = images.labels[rows]
        hit = ranked == y[:, None]
        first.append(hit[:, 0])
        five.append(hit.any(1))
        labels.append(y)
    return tuple(torch.cat(part).double().numpy() for part in (first, five, labels))  # type: ignore[return-value]
