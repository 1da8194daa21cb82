"""Which runs are seeds of one arm, what each arm is called, and which arms saw the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from uncollapse.config.methods import METHODS
from uncollapse.config.schema import ARMS
from uncollapse.measure.catalogue import Row
from uncollapse.run_folder.read import Arms, RunRecord, of_set

BASELINE, CONTROL = "joint", "fixed"
_PLACES = ("seed", "data.path", "data.val_path", "data.workers", "data.memory_gb", "change.branch")
"""Keys of a configuration that may differ between the seeds of an arm, as those of ``log`` may."""
_SAID = ("method.name", "prototypes.kind", "prototypes.targets")
"""What an arm's own name says already."""
_WORDS = {
    "prototypes.count": "K",
    "prototypes": "K",
    "steps": "steps",
    "optim.lr": "learning rate",
    "run.batch": "batch",
    "change.freeze": "frozen",
    "data.long_tail": "long tail",
}
MOST_NAMED = 3
"""Most differences that a name lists."""


@dataclass(frozen=True)
class Grouping:
    """Runs by arm, and what has to be said about them."""

    arms: Arms
    """In the order of methods and modes; the seeds of each ascending. Further sets of prototypes stand behind the arm
    that they are of, as arms of their own."""
    data: dict[str, int]
    """Of each arm, which of the sets of images it saw: only arms of one set are compared."""
    notes: list[str]


def group(runs: Sequence[RunRecord]) -> Grouping:
    """Runs are seeds of one arm only where nothing but the seed differs: configuration, steps and images are alike.

    The same run twice, and a seed twice, count once. Names say what differs.
    """
    notes: list[str] = []
    sets = _data_sets(runs)
    by_arm: dict[tuple[object, ...], list[tuple[int, RunRecord]]] = {}
    for run, of in sorted(zip(runs, sets, strict=True), key=lambda pair: pair[0].seed):
        settings = tuple(sorted((key, repr(value)) for key, value in _settings(run).items()))
        mates = by_arm.setdefault((run.method, run.name, of, settings), [])
        twin = next((other for _, other in mates if other.seed == run.seed), None)
        if twin is None:
            mates.append((of, run))
            continue
        same = run.folder == twin.folder or run.summary == twin.summary
        notes.append(
            f"{run.folder or run.name} is {'the same run as' if same else 'of the same arm and seed as'} "
            f"{twin.folder or twin.name}, and counted once"
        )
    groups = sorted(by_arm.values(), key=lambda pairs: _place(pairs[0][1]))
    names, said = _names([[run for _, run in pairs] for pairs in groups], [pairs[0][0] for pairs in groups])
    notes += said
    arms: Arms = {}
    data: dict[str, int] = {}
    for name, pairs in zip(names, groups, strict=True):
        members = [run for _, run in pairs]
        arms[name], data[name] = members, pairs[0][0]
        for part in dict.fromkeys(part for run in members for part in run.summary.get("sets") or {}):
            having = [run for run in members if part in (run.summary.get("sets") or {})]
            arms[set_name(name, part)] = [of_set(run, part) for run in having]
            data[set_name(name, part)] = data[name]
    if len(set(data.values())) > 1:
        seen = []
        for of in dict.fromkeys(data.values()):
            alike = [arm for arm in arms if data[arm] == of]
            seen.append(f"{_data_name(arms[alike[0]][0])}: {', '.join(alike)}")
        notes.append(f"These runs saw different images; only runs on the same ones are compared ({'; '.join(seen)})")
    return Grouping(arms, data, notes)


def _place(run: RunRecord) -> tuple[int, bool, int]:
    """Where a run's arm stands among others: methods in their order, each before its variants, and in them modes."""
    methods, modes = list(METHODS), list(ARMS)
    plain = str(run.config.get("method.name") or run.method.removesuffix("-vmf"))
    method = methods.index(plain) if plain in methods else len(methods)
    return method, plain != run.method, modes.index(run.name) if run.name in modes else len(modes)


def arm_name(method: str, mode: str, several: bool) -> str:
    """What an arm is called: its mode, and before it its method where there are ``several``."""
    return f"{method} {mode}" if several else mode


def set_name(arm: str, part: str) -> str:
    """What a further set of prototypes of an arm is called."""
    return f"{arm} · {part}"


def rival(arm: str, grouping: Grouping, mode: str) -> str | None:
    """The arm of that mode, of the same method, set and images, that is configured most like ``arm``; None without."""
    arms = grouping.arms
    rivals = [
        other for other in of_mode(arm, grouping, mode) if other != arm and grouping.data[other] == grouping.data[arm]
    ]
    return min(rivals, key=lambda other: len(_differing([arms[arm][0], arms[other][0]])), default=None)


def of_mode(arm: str, grouping: Grouping, mode: str) -> list[str]:
    """The arms of that mode, of the method and the set of prototypes of ``arm``."""
    run = grouping.arms[arm][0]
    firsts = ((other, runs[0]) for other, runs in grouping.arms.items())
    return [other for other, r in firsts if (r.method, r.name, r.set) == (run.method, mode, run.set)]


def without_control(arms: Arms) -> list[str]:
    """The methods of which no arm is the control."""
    methods = dict.fromkeys(runs[0].method for runs in arms.values())
    controlled = {runs[0].method for runs in arms.values() if runs[0].name == CONTROL}
    return [method for method in methods if method not in controlled]


def _settings(run: RunRecord) -> Row:
    """What decides the numbers of a run, its seed aside; of a folder without config.yaml what the summary tells."""
    settings = {k: v for k, v in run.config.items() if k not in _PLACES and not k.startswith("log.")}
    names = ("steps",) if settings else ("prototypes", "dim", "steps", "encoder")
    return settings | {name: value for name in names if (value := run.summary.get(name)) is not None}


def _differing(runs: Sequence[RunRecord]) -> list[str]:
    """Keys with different values; one that a run does not record says nothing."""
    settings = [_settings(run) for run in runs]
    keys = dict.fromkeys(key for row in settings for key in row)
    return [k for k in keys if k not in _SAID and len({repr(row[k]) for row in settings if k in row}) > 1]


def _names(groups: Sequence[Sequence[RunRecord]], sets: Sequence[int]) -> tuple[list[str], list[str]]:
    """A name for each arm: method, mode, and what else tells it from the others of its method.

    What differs only between methods is theirs, and is left to a note.
    """
    firsts = [group[0] for group in groups]
    methods = dict.fromkeys(run.method for run in firsts)
    inside = {key for method in methods for key in _differing([run for run in firsts if run.method == method])}
    everywhere = [key for key in _differing(firsts) if key in inside]
    notes = []
    if between := [key for key in _differing(firsts) if key not in inside]:
        notes.append(f"The methods also differ in {_listed(between)}")
    if len(everywhere) > MOST_NAMED:
        notes.append(f"The arms also differ in {_listed(everywhere)}")
    names = []
    for run in firsts:
        alike = [other for other in firsts if (other.method, other.name) == (run.method, run.name)]
        keys = everywhere if len(everywhere) <= MOST_NAMED else _differing(alike)
        parts = [arm_name(run.method, run.name, len(methods) > 1)]
        if len(keys) <= MOST_NAMED:
            parts += [_setting(key, value) for key in keys if (value := _settings(run).get(key)) is not None]
        if len(set(sets)) > 1:
            parts.append(f"on {_data_name(run)}")
        names.append(", ".join(parts))
    repeated = {name for name in names if names.count(name) > 1}
    for i, run in enumerate(firsts):
        if names[i] in repeated:  # too much differs to list it: the folder tells which is which
            names[i] = f"{names[i]} ({run.folder or i + 1})"
    return names, notes


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(keys[:12]) + (f" and {len(keys) - 12} more" if len(keys) > 12 else "")


def in_short(key: str) -> str:
    """What a key is called in an arm's name and beside an axis."""
    return _WORDS.get(key, key)


def _setting(key: str, value: object) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return f"{in_short(key)} = {text[:40] or 'nothing'}"


# -------------------------------------------------------------------------------------------- same images


def _data_name(run: RunRecord) -> str:
    name = str(run.summary.get("data") or "unnamed images")
    n = run.summary.get("n_train")
    return f"{name}, {n:,} training images" if isinstance(n, int) else name


def _data_sets(runs: Sequence[RunRecord]) -> list[int]:
    """A number for each run: equal where the images are the same.

    Digests decide. Where a part is held out by the seed, each seed has digests of its own: then name and numbers of
    images must agree, and no seed may have two different digests. A run without any of these goes with the first.
    """
    coarse = [tuple(run.summary.get(key) for key in ("data", "n_train", "n_held_out")) for run in runs]
    digests = [(run.summary.get("data_digest"), run.summary.get("held_out_digest")) for run in runs]

    def same(i: int, j: int, by_name: bool) -> bool:
        equal, known = digests[i] == digests[j], None not in digests[i] + digests[j]
        if known and (equal or not by_name or runs[i].seed == runs[j].seed):
            return equal
        return coarse[i] == coarse[j]

    def joined(by_name: Sequence[bool]) -> list[int]:
        label = list(range(len(runs)))
        for i in range(len(runs)):
            for j in range(i):
                if label[i] != label[j] and same(i, j, by_name[i] and by_name[j]):
                    old, new = max(label[i], label[j]), min(label[i], label[j])
                    label = [new if one == old else one for one in label]
        return label

    label = joined([True] * len(runs))
    torn = {
        label[i]
        for i in range(len(runs))
        for j in range(i)
        if label[i] == label[j] and runs[i].seed == runs[j].seed and digests[i] != digests[j]
        if None not in digests[i] + digests[j]
    }
    if torn:
        label = joined([one not in torn for one in label])
    silent = [set(coarse[i] + digests[i]) == {None} for i in range(len(runs))]
    first = next((one for one, nothing in zip(label, silent, strict=True) if not nothing), 0)
    return [first if nothing else one for one, nothing in zip(label, silent, strict=True)]
