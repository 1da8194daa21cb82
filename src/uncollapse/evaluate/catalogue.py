"""Which tasks there are, what each needs, and how it is called. Modules of tasks are imported when they run."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from uncollapse.data.images import ImageSet
from uncollapse.errors import ConfigError
from uncollapse.evaluate.encoder import EvalEncoder
from uncollapse.evaluate.features import Features
from uncollapse.evaluate.result import Result
from uncollapse.measure.shots import Ints, is_imbalanced
from uncollapse.progress import Report
from uncollapse.shown import in_words


@dataclass(frozen=True)
class Picture:
    """What a task draws beside its numbers."""

    task: str
    caption: str
    src: str
    """``data:`` address of an image."""
    alt: str
    """The same in words."""


@dataclass
class Context:
    """What a task can work with. Images and features are there where any task asked for works on them."""

    encoder: EvalEncoder
    train_images: ImageSet | None
    test_images: ImageSet | None
    train: Features | None
    test: Features | None
    extract: Callable[[str], tuple[Features, Features]]
    """Features of both parts of another data set, from the cache where it has them."""
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sets: Sequence[str] = ()
    """Data sets of `transfer`."""
    masks: Path | None = None
    """Folder of `segment`."""
    out: Path | None = None
    """Where a task may leave pictures."""
    report: Report | None = None
    """Called by tasks that train, with (name, steps done, steps to do, loss)."""
    frequency: Ints | None = None
    """(C,) images of each class that the encoder was trained on, where it was on others than these."""
    pictures: list[Picture] = field(default_factory=list)
    """Filled by tasks that draw."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments, handed to the tasks that take them."""
    _probe: Any = None

    def probe(self) -> Any:
        """The linear probe of these features, fitted for the first task that wants it."""
        from uncollapse.evaluate.tasks.linear import fit_probe

        if self._probe is None:
            assert self.train is not None
            assert self.test is not None
            self._probe = fit_probe(self.train, self.test, self.seed, device=self.device, report=self.report)
        return self._probe


@dataclass(frozen=True)
class Task:
    """One protocol, by the name that ``--tasks`` takes."""

    name: str
    what: str
    """One line for ``--help``."""
    run: Callable[[Context], Result | Sequence[Result]]
    default: bool = False
    features: bool = True
    """Whether it needs the features of the data (and not only its images, or another set)."""
    data: bool = True
    """Whether it works on ``--data`` at all."""
    needs: str = ""
    """``prototypes``, ``sets`` or ``masks``: what the encoder or the command has to bring."""
    control: bool = True
    """Whether an untrained encoder is worth its time."""


def _called(function: Callable[..., Any], context: Context, *arguments: Any) -> Result | Sequence[Result]:
    """Settings go to the tasks that have them; each task's own defaults are its published protocol."""
    offered = {"seed": context.seed, "device": context.device, "out": context.out, "report": context.report}
    offered |= {"frequency": context.frequency, **context.options}
    takes = inspect.signature(function).parameters
    result: Result | Sequence[Result] = function(*arguments, **{n: value for n, value in offered.items() if n in takes})
    return result


def _knn(c: Context) -> Result | Sequence[Result]:
    from uncollapse.evaluate.tasks.knn import knn

    return _called(knn, c, c.train, c.test)


def _linear(c: Context) -> Result | Sequence[Result]:
    from uncollapse.evaluate.tasks.linear import linear

    assert c.train is not None
    assert c.test is not None
    return linear(c.train, c.test, probe=c.probe())


def _fewshot(c: Context) -> Result | Sequence[Result]:
    from uncollapse.evaluate.tasks.fewshot import fewshot

    return _called(fewshot, c, c.train, c.test)


def _longtail(c: Context) -> Result | Sequence[Result]:
    from uncollapse.evaluate.tasks.longtail import longtail

    assert c.train is not None
    assert c.test is not None
    return longtail(c.train, c.test, device=c.device, probe=c.probe(), frequency=c.frequency)


def _cluster(c: Context) -> Result | Sequence[Result]:
    from uncollapse.evaluate.tasks.cluster import cluster

    return _called(cluster, c, c.train, c.test, c.encoder.vectors)


def _retrieval(c: Context) -> Result | Sequence[Result]:
    from uncollapse.evaluate.tasks.retrieval import retrieval

    return _called(retrieval, c, c.train, c.test)


def _prototypes(c: Context) -> Result | Sequence[Result]:
    from uncollapse.evaluate.tasks.prototypes import prototype_owners

    result = _called(prototype_owners, c, c.train, c.test, c.encoder.vectors)
    try:
        _picture_groups(c)
    except Exception as error:  # the numbers are there, and they are the task
        warnings.warn(f"prototypes: no pictures of groups ({in_words(error)})", stacklevel=2)
    return result


def _picture_groups(c: Context) -> None:
    from uncollapse.evaluate.tasks.prototype_maps import draw_groups, group_maps

    assert c.test_images is not None
    assert c.test is not None
    assert c.encoder.vectors is not None
    groups = group_maps(c.encoder, c.test_images, c.test, c.encoder.vectors)
    if groups:
        caption = f"the test images nearest to prototypes, and {groups[0].kind}: duplicates beside distinct prototypes"
        c.pictures.append(Picture("prototypes", caption, *draw_groups(groups)))


def _finetune(c: Context) -> Result | Sequence[Result]:
    from uncollapse.evaluate.tasks.finetune import finetune

    return _called(finetune, c, c.encoder, c.train_images, c.test_images)


def _segment(c: Context) -> Result | Sequence[Result]:
    from uncollapse.evaluate.tasks.segment import segment

    return _called(segment, c, c.encoder, c.masks)


def _transfer(c: Context) -> Result | Sequence[Result]:
    from uncollapse.evaluate.tasks.transfer import transfer

    return _called(transfer, c, c.extract, list(c.sets))


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("knn", "weighted nearest neighbours", _knn, default=True),
        Task("linear", "the best of a grid of linear classifiers on frozen features", _linear, default=True),
        Task("longtail", "accuracy on frequent and on rare classes", _longtail, default=True),
        Task("cluster", "clusters against classes: NMI, ARI, matched accuracy", _cluster, default=True),
        Task("prototypes", "what each prototype stands for", _prototypes, default=True, needs="prototypes"),
        Task("fewshot", "a classifier from 1, 2, 5 and 10 images per class", _fewshot),
        Task("retrieval", "mean average precision of ranking by cosine", _retrieval),
        Task("finetune", "all weights trained further on the labels", _finetune, features=False, control=False),
        Task("segment", "masks from patch features or attention", _segment, features=False, data=False, needs="masks"),
        Task("transfer", "kNN and linear over several data sets", _transfer, features=False, data=False, needs="sets"),
    )
}


def chosen(
    asked: Sequence[str] | None, encoder: EvalEncoder, counts: Sequence[int], sets: Sequence[str], masks: Path | None
) -> tuple[list[Task], list[str]]:
    """The tasks to run, in order, and a line for each that the default or ``all`` leaves out.

    Args:
        asked: names, or ``["all"]``; None: the cheap ones, as far as encoder and data allow.
        counts: training images of each class that has any, the encoder's where it was trained on others; empty where
            there are no labels.
        sets, masks: what `transfer` and `segment` work on, where given.

    Raises:
        ConfigError: an unknown name, or a task named outright that lacks what it needs.
    """
    there = {
        "prototypes": encoder.vectors is not None and encoder.head is not None,
        "sets": bool(sets),
        "masks": masks is not None,
        "": True,
    }
    lacking = {
        "prototypes": f"{encoder.name} has no prototypes with a projection head",
        "sets": "it needs --sets SET...",
        "masks": "it needs --masks DIR",
    }
    if asked is not None and list(asked) != ["all"]:
        unknown = [name for name in asked if name not in TASKS]
        if unknown or not asked:
            raise ConfigError(
                f"--tasks: no task {', '.join(map(repr, unknown)) or 'named'}; there are {', '.join(TASKS)} and all"
            )
        named = [TASKS[name] for name in dict.fromkeys(asked)]
        for task in named:
            if not there[task.needs]:
                raise ConfigError(f"--tasks {task.name}: {lacking[task.needs]}")
        return named, []
    wanted = [t for t in TASKS.values() if asked is not None or t.default or (t.needs and there[t.needs])]
    tasks, skipped = [], []
    for task in wanted:
        if not there[task.needs]:
            skipped.append(f"{task.name} left out: {lacking[task.needs]}")
        elif asked is None and task.name == "longtail" and not is_imbalanced(counts):
            continue
        else:
            tasks.append(task)
    return tasks, skipped
