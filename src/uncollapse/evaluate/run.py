"""One evaluation: features once, every task on them, results merged into ``evaluation.json``."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uncollapse.config.schema import DataConfig
from uncollapse.data.images import ImageSet, LazyImages
from uncollapse.data.long_tail import long_tail_rows
from uncollapse.errors import ConfigError, DataError
from uncollapse.evaluate.catalogue import TASKS, Context, Picture, Task, chosen
from uncollapse.evaluate.data.pair import open_pair, split_spec
from uncollapse.evaluate.encoder import EvalEncoder
from uncollapse.evaluate.extract import extract, identity
from uncollapse.evaluate.features import Features
from uncollapse.evaluate.result import Result
from uncollapse.progress import Report
from uncollapse.run_folder.evaluation import evaluation_key

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How an evaluation is done; the same for each of its encoders."""

    data: str
    """``TRAIN`` or ``TRAIN,TEST``, as `open_pair` takes it; empty where no task works on it."""
    data_config: DataConfig | None = None
    """How much is held out where the data has no test part; for our own runs the run's."""
    tasks: Sequence[str] | None = None
    """Names, or ``all``; None: the cheap ones."""
    seed: int = 0
    split_seed: int = 0
    """Of the split where the data has no test part; for our own runs the run's, so that it is training's."""
    limit: int | None = None
    """Most images of each part."""
    long_tail: float = 1.0
    """Imbalance factor to which the training part is cut; 1: as it is. Of our own runs on their own data, the run's."""
    trained_on_tail: float = 1.0
    """Imbalance factor of the long tail of these training images that the encoder was trained on, where they are uncut
    here: it says which classes are frequent."""
    sets: Sequence[str] = ()
    masks: Path | None = None
    cache: Path | None = None
    out: Path | None = None
    batch: int = 256
    workers: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The data set's name in ``evaluation.json``: other images are other numbers."""
        words = [] if self.limit is None else [f"limit {self.limit}"]
        if words and self.split_seed:
            words.append(f"seed {self.split_seed}")
        name = self.data.rstrip("/") or ", ".join([*self.sets, *([str(self.masks)] if self.masks else [])])
        return evaluation_key(name, self.long_tail, words)


@dataclass
class Evaluated:
    """What one encoder gave on one data set."""

    encoder: EvalEncoder
    images: str = ""
    """Digest of the images and labels of both parts; empty without."""
    n_train: int = 0
    n_test: int = 0
    classes: int = 0
    results: list[Result] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    """Reason by task."""
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Rules that were applied, and tasks that were left out."""

    @property
    def label(self) -> str:
        """``teacher``, ``student`` or ``untrained`` of our runs; other encoders by their name."""
        e = self.encoder
        if e.config is not None:
            return e.side
        return f"{e.name} untrained" if e.side == "untrained" else e.name


def evaluate(
    encoders: Sequence[EvalEncoder],
    settings: Settings,
    say: Say = lambda _: None,
    report: Report | None = None,
    keep: Callable[[Evaluated], None] = lambda _: None,
) -> list[Evaluated]:
    """Every task on every encoder; the first encoder decides which tasks there are.

    A task that fails is noted in `Evaluated.failures` and does not keep the others from running.

    Args:
        say: told a line on what is going on. report: told how far each extraction and training is.
        keep: called after every task with the results so far, so that an interruption costs one task at most.

    Raises:
        ConfigError: tasks that do not exist or lack something. DataError: images or labels that cannot be used,
            or features that are not finite.
    """
    train = test = None
    rules: list[str] = []
    if settings.data:
        cut = (settings.split_seed, settings.limit, settings.long_tail)
        pair = open_pair(settings.data, *cut, settings.data_config, report is not None)
        train, test = pair.train, pair.test
        rules = [*_split_note(settings), *_tail_note(settings), *pair.notes, *_rules(train, test)]
    frequency = None if train is None else _frequency(train, settings)
    counts = [] if train is None else class_counts(train) if frequency is None else frequency.tolist()
    tasks, skipped = chosen(settings.tasks, encoders[0], counts, settings.sets, settings.masks)
    if train is not None and test is not None:
        _check_labels([t.name for t in tasks if t.data], train, test, settings.data)
    images = "" if train is None or test is None else _digest(train, test)
    evaluated = []
    for encoder in encoders:
        own_tasks = [t for t in tasks if encoder is encoders[0] or (t.control and _able(t, encoder))]
        done = Evaluated(encoder, images, notes=[*encoder.notes, *rules, *skipped])
        if train is not None and test is not None:
            done.n_train, done.n_test, done.classes = len(train), len(test), len(train.classes)
        context = _context(encoder, train, test, own_tasks, settings, say, report, done.notes)
        context.frequency = frequency
        if context.train is not None and context.test is not None:
            done.n_train, done.n_test = len(context.train), len(context.test)
        for part, of_part, features in (("training", train, context.train), ("test", test, context.test)):
            done.notes += [] if of_part is None else _unreadable(part, of_part, features)
        for task in own_tasks:
            say(f"{done.label}: {task.name}")
            _run(task, context, done)
            keep(done)
        evaluated.append(done)
    return evaluated


def _able(task: Task, encoder: EvalEncoder) -> bool:
    return task.needs != "prototypes" or (encoder.vectors is not None and encoder.head is not None)


def _run(task: Task, context: Context, done: Evaluated) -> None:
    try:
        result = task.run(context)
    except Exception as error:
        if os.environ.get("UNCOLLAPSE_TRACEBACK"):
            raise
        # ValueErrors are written for users; of anything else the kind says more than the message.
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        # A loader process sends its whole traceback as the message; the last line is the error.
        text = str(error).strip().splitlines()[-1:] if "Traceback (most recent" in str(error) else [str(error)]
        done.failures[task.name] = kind + " ".join(" ".join(text).split())
        return
    done.pictures = context.pictures
    done.results += [result] if isinstance(result, Result) else list(result)


def _context(
    encoder: EvalEncoder,
    train: ImageSet | None,
    test: ImageSet | None,
    tasks: Sequence[Task],
    settings: Settings,
    say: Say,
    report: Report | None,
    notes: list[str],
) -> Context:
    label = "untrained " if encoder.side == "untrained" else ""

    def tell(name: str, done: float, total: float, loss: float | None) -> None:
        if report is not None:
            report(f"{label}{name}", done, total, loss)

    def features(images: ImageSet | None, part: str) -> Features:
        assert images is not None
        return extract(
            encoder,
            images,
            device=settings.device,
            cache=settings.cache,
            batch=settings.batch,
            workers=settings.workers,
            progress=lambda done, total: tell(f"features, {part}", done, total, None),
            say=lambda line: say(f"{label}{part}: {line}"),
        )

    def of_set(spec: str) -> tuple[Features, Features]:
        pair = open_pair(spec, settings.split_seed, settings.limit, 1.0, settings.data_config, report is not None)
        _check_labels(["transfer"], pair.train, pair.test, spec)
        name = Path(split_spec(spec)[0]).name
        both = features(pair.train, f"{name} train"), features(pair.test, f"{name} test")
        notes.extend(
            f"{name}: {note}"
            for note in [
                *pair.notes,
                *_rules(pair.train, pair.test),
                *_unreadable("training", pair.train, both[0]),
                *_unreadable("test", pair.test, both[1]),
            ]
        )
        return both

    needed = any(t.features for t in tasks)
    return Context(
        encoder,
        train,
        test,
        features(train, "train") if needed else None,
        features(test, "test") if needed else None,
        of_set,
        settings.seed,
        settings.device,
        settings.sets,
        settings.masks,
        settings.out,
        None if report is None else tell,
        options={"workers": settings.workers, **settings.options},
    )


# ----------------------------------------------------------------------------------------- data, checked


def _digest(train: ImageSet, test: ImageSet) -> str:
    digest = hashlib.sha256()
    for images in (train, test):
        labels = b"" if images.labels is None else images.labels.numpy().tobytes()
        digest.update(f"{identity(images)} {hashlib.sha256(labels).hexdigest()} {images.classes}\n".encode())
    return digest.hexdigest()[:32]


def _unreadable(part: str, images: ImageSet, features: Features | None) -> list[str]:
    """A line that counts and names the images that are left out, whether they were met now or the cache lacks them."""
    bad = list(images.bad)
    if isinstance(images, LazyImages) and features is not None and len(features) < len(images):
        lost = sorted(set(range(len(images))) - set(features.indices.tolist()))
        bad = [images.name(i) for i in lost]
    if not bad:
        return []
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return [f"{len(bad)} {part} image(s) cannot be read and are left out: {'; '.join(bad[:3])}{more}"]


def class_counts(images: ImageSet) -> list[int]:
    """Images of each class that has any; empty without labels."""
    if images.labels is None:
        return []
    return [int(c) for c in torch.bincount(images.labels) if c]


def _frequency(train: ImageSet, settings: Settings) -> np.ndarray | None:
    """(C,) images of each class in the long tail that the encoder was trained on; None where it was on these images."""
    if settings.trained_on_tail == 1 or train.labels is None:
        return None
    labels = train.labels.numpy()
    return np.bincount(labels[long_tail_rows(labels, settings.trained_on_tail)])


def _check_labels(needing: Sequence[str], train: ImageSet, test: ImageSet, data: str) -> None:
    if not needing:
        return
    first, second = split_spec(data)
    for images, part in ((train, first), (test, second or first)):
        if images.labels is None:
            verb = "need" if len(needing) > 1 else "needs"
            raise DataError(
                f"{part}: no labels, which {', '.join(needing)} {verb}: "
                + (images.about_labels or "folders give them by their names, Parquet by a column 'label'")
            )
    if len(class_counts(train)) < 2:
        raise DataError(f"{first}: its training images are all of one class, so there is nothing to tell apart")


def _rules(train: ImageSet, test: ImageSet) -> list[str]:
    """What is done about classes that one part lacks; nothing of it is silent."""
    if train.labels is None or test.labels is None:
        return []
    total = max(len(train.classes), int(train.labels.max()) + 1, int(test.labels.max()) + 1)
    in_train = torch.bincount(train.labels, minlength=total)
    in_test = torch.bincount(test.labels, minlength=total)
    rules = []
    unseen = int(((in_train == 0) & (in_test > 0)).sum())
    if unseen:
        theirs = int(in_test[in_train == 0].sum())
        rules.append(
            f"{unseen} class(es) of the test part have no training image: their {theirs} test images "
            "stay in and count as errors of every classifier"
        )
    empty = int(((in_train == 0) & (in_test == 0)).sum())
    if empty:
        rules.append(f"{empty} class(es) have no image at all and are left out of means over classes")
    return rules


def _split_note(settings: Settings) -> list[str]:
    first, second = split_spec(settings.data)
    return [] if second else [f"test images: the test part of {first} if it has one, else held out as training does"]


def _tail_note(settings: Settings) -> list[str]:
    notes = []
    if settings.long_tail > 1:
        notes.append(
            f"training images are cut to a long tail of imbalance factor {settings.long_tail:g}, test images are not"
        )
    if settings.trained_on_tail > 1:
        notes.append(
            "classes are frequent or rare as in what the encoder was trained on, a long tail of imbalance factor "
            f"{settings.trained_on_tail:g} of these training images"
        )
    return notes


def _same_place(data: str, path: str) -> bool:
    """Whether the training part of ``data`` is what a run was trained on."""
    first = split_spec(data)[0] if data else ""
    return first == path or Path(first).expanduser().resolve() == Path(path)


def settings_for(encoder: EvalEncoder, columns: dict[str, str] | None = None, **options: Any) -> Settings:
    """`Settings` with what our own runs bring along: their data, its columns, long tail, and the seed of their split.

    ``columns``: ``image`` and ``label`` column of Parquet and CSV files, where they are named.

    Raises:
        ConfigError: no data given, the encoder has none of its own, and a task works on it.
    """
    asked = options.get("tasks")
    if asked and all(name in TASKS and not TASKS[name].data for name in asked):
        options["data"] = ""
    else:
        if encoder.config is not None:
            data = encoder.config.data
            options["data"] = options.get("data") or ",".join(p for p in (data.path, data.val_path) if p)
        if not options.get("data"):
            raise ConfigError(
                "--data TRAIN[,TEST]: say where the labelled images are (a folder, Parquet, builtin:digits)"
            )
    if encoder.config is not None:
        options.setdefault("split_seed", encoder.config.seed)
        own = encoder.config.data
        if _same_place(options["data"], own.path):
            if options.get("long_tail") is None:
                options["long_tail"] = own.long_tail
            elif options["long_tail"] == 1 and options.get("limit") is None:
                options["trained_on_tail"] = own.long_tail
        if options["data"] != ",".join(p for p in (own.path, own.val_path) if p):
            own = dataclasses.replace(own, image="", label="")  # the columns of other files
        options.setdefault("data_config", own)
    if options.get("long_tail") is None:
        options.pop("long_tail", None)
    if columns:
        options["data_config"] = dataclasses.replace(options.get("data_config") or DataConfig(), **columns)
    return Settings(**options)
