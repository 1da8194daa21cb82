"""From a checkpoint or a matrix to numbers and a verdict: what `uncollapse diagnose` does, for Python."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uncollapse.checkpoints.files import damage_is_said
from uncollapse.checkpoints.own import own_directions
from uncollapse.checkpoints.prototypes import PrototypeSet, checked, find_prototypes, may_be_prototypes
from uncollapse.checkpoints.read import flatten, newest_of, read_tensors
from uncollapse.diagnosis.result import Diagnosis, Source
from uncollapse.errors import InputError
from uncollapse.measure.random_start import random_likeness
from uncollapse.measure.sweep import Sweep, complete_sweep, wide_of
from uncollapse.measure.unique import EPSILONS, SWEEP, greedy_cover, nearest_kept
from uncollapse.measure.verdict import FAILING, judge
from uncollapse.neighbours.close_pairs import product_seconds, tensor_of
from uncollapse.neighbours.spanning_tree import spanning_tree
from uncollapse.shown import shown

"""Told what is being done (``reading``, ``counting``, ``images``) and the share of it that is."""

COMPLETE_WORK = 1.5e12
"""K²·D up to which everything is counted unasked: K = 65,536 at D = 256 is 1.1e12, half a minute on one core."""


def diagnose(
    source: Tensor | np.ndarray | str | os.PathLike[str],
    eps: float | Sequence[float] = EPSILONS,
    *,
    key: str | None = None,
    trust: bool = False,
    complete: bool | None = None,
    device: torch.device | str | None = None,
) -> Diagnosis:
    """How many prototypes are distinct, how they are distributed, and whether that is a collapse.

    Args:
        source: (K, D) prototypes, or a checkpoint file or run folder. Of a file with several sets, the
            teacher's first is taken; `diagnose_file` returns them all.
        eps: cosine distances in (0, 2]; the first is the headline.
        key, trust: as `diagnose_file`.
        complete: whether to count components, rows without neighbours and the sweep besides the unique
            prototypes. None: where that takes about half a minute on one core (``COMPLETE_WORK``; 100 times as
            much on a GPU).
        device: where to compute; None: where the tensor is.

    Raises:
        InputError: a file that cannot be read, or holds no prototypes. ValueError: ε out of range.
    """
    if isinstance(source, Tensor | np.ndarray):
        try:
            matrix = tensor_of(source).detach()
        except TypeError as error:
            raise InputError(f"expected a floating (prototypes, dimensions) array: {error}") from None
        return measure(checked(PrototypeSet("", "", "unstated", "", matrix), "tensor"), "tensor", eps, complete, device)
    return diagnose_file(source, eps, key=key, trust=trust, complete=complete, device=device, most=1)[0]


def diagnose_file(
    path: str | os.PathLike[str],
    eps: float | Sequence[float] = EPSILONS,
    *,
    key: str | None = None,
    trust: bool = False,
    complete: bool | None = None,
    device: torch.device | str | None = None,
    most: int | None = None,
    data: str | None = None,
    limit: int = 2000,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> list[Diagnosis]:
    """One `Diagnosis` per prototype set of a file (or run folder), teachers first, aliases left out.

    Args:
        key: path of one tensor in the file, levels separated by ``/`` or ``.``.
        trust: let the file run code while it loads, if it wants to.
        most: stop after so many sets.
        data: images (what `uncollapse train --data` takes) to run the checkpoint's encoder on; ``images`` of
            every diagnosis then holds what they tell, or its ``notes`` why they could not.
        limit: most images of each part of ``data``.
        progress: told what is being done, and which share of it is (0 to 1), as often as it is known.

    Raises:
        InputError, ValueError: as `diagnose`.
    """
    with damage_is_said(path):
        file, passed_over = newest_of(Path(path))
    began = time.perf_counter()
    progress("reading", 0.0)
    loaded = read_tensors(file, trust, may_be_prototypes if data is None and key is None else None)
    with damage_is_said(file):
        tensors = flatten(loaded, file)
        sets = [own_directions(loaded, s, tensors) for s in find_prototypes(tensors, str(file), key)[:most]]
    reading = time.perf_counter() - began
    diagnoses: list[Diagnosis] = []
    counted: list[tuple[PrototypeSet, Diagnosis]] = []
    for i, s in enumerate(sets):

        def part(share: float, i: int = i) -> None:
            progress("counting", (i + share) / len(sets))

        twin = next((known for known in counted if _same_directions(known[0], s)), None)
        d = measure(s, str(file), eps, complete, device, part) if twin is None else _counted_before(s, twin[1])
        counted.append((s, dataclasses.replace(d, notes=list(d.notes))))  # before images have changed its verdict
        d.notes += passed_over
        d.seconds["read"] = reading
        diagnoses.append(d)
        if data is not None and d.vectors is not None:
            progress("images", i / len(sets))
            _add_images(d, s, loaded, tensors, data, limit, device)
        elif data is not None:
            d.notes.append("no prototype has a direction, so that images have nothing to tell")
    if data is not None and all(d.images is None and d.vectors is not None for d in diagnoses):
        raise InputError(diagnoses[0].notes[-1])
    return diagnoses


def _add_images(
    d: Diagnosis,
    s: PrototypeSet,
    loaded: Any,
    tensors: dict[str, Tensor],
    data: str,
    limit: int,
    device: torch.device | str | None,
) -> None:
    from uncollapse.checkpoints.encoder import center_of, rebuild_encoder
    from uncollapse.diagnosis.images import look

    try:
        with damage_is_said(d.source.file):
            rebuilt = rebuild_encoder(loaded, tensors, s, d.source.file)
        began = time.perf_counter()
        center = None if s.side == "student" else center_of(tensors, s)
        look(d, s, rebuilt, data, center, limit, torch.device(device or "cpu"))
    except InputError as error:
        d.notes.append(str(error))
        return
    d.seconds["images"] = time.perf_counter() - began


def _same_directions(a: PrototypeSet, b: PrototypeSet) -> bool:
    """Whether two sets count alike, as the student and the teacher of an untrained or a finished run do."""
    if a.weight.shape != b.weight.shape or a.weight.dtype != b.weight.dtype or (a.means is None) != (b.means is None):
        return False
    same = torch.equal(a.directions(), b.directions())
    return same and (a.means is None or b.means is None or torch.equal(a.means, b.means))


def _counted_before(s: PrototypeSet, twin: Diagnosis) -> Diagnosis:
    """The diagnosis of a set whose vectors are those of another one."""
    file = twin.source.file
    return dataclasses.replace(
        twin,
        source=Source(file, s.key, s.side, s.name, s.family),
        norms=_norms(s, twin.rows),
        seconds={},
        notes=[*s.notes, f"the same vectors as {twin.source} ({twin.source.key}): counted once"],
    )


def measure(
    s: PrototypeSet,
    file: str,
    eps: float | Sequence[float] = EPSILONS,
    complete: bool | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Diagnosis:
    """The diagnosis of one set; see `diagnose`. ``progress`` is told the share that is done."""
    several = eps if isinstance(eps, Sequence | np.ndarray) else [eps]
    epsilons = [float(e) for e in several]
    if not epsilons or not all(0 < e <= 2 for e in epsilons):
        raise InputError(f"ε is a cosine distance, 1 - cos, and must lie in (0, 2], got {epsilons or 'none'}")
    epsilons = list(dict.fromkeys(epsilons))
    rows = s.directions()
    rows = rows if device is None else rows.to(device)
    total, dim = rows.shape
    finite = torch.isfinite(rows).all(1)
    zero = finite & (rows == 0).all(1)
    usable = finite & ~zero
    w = rows if bool(usable.all()) else rows[usable]
    bad = total - len(w)
    notes = list(s.notes)
    if total < dim and s.name in ("", "bare", "picked"):
        notes.insert(
            0, f"{total:,} prototypes of {dim:,} dimensions look like a transposed matrix: one row is one prototype"
        )
    if s.family == "CARP":
        notes.append("CARP compares prototypes within random blocks, drawn anew each step; counted over all of them")
    source = Source(file, s.key, s.side, s.name, s.family)
    common: dict[str, Any] = {
        "source": source,
        "prototypes": total,
        "dim": dim,
        "dtype": str(s.weight.dtype).removeprefix("torch."),
        "zero_rows": int(zero.sum()),
        "non_finite_rows": total - int(finite.sum()),
        "norms": _norms(s, usable.nonzero()[:, 0].cpu()),
        "notes": notes,
    }
    if not len(w):
        none = dict.fromkeys(epsilons, 0)
        verdict = judge(total, bad, dim, none, None)
        return Diagnosis(
            unique=none,
            components=dict(none),
            no_neighbour=dict(none),
            unique_means=dict(none),
            sweep=None,
            groups=np.empty(0, np.int64),
            nearest={},
            random=None,
            verdict=verdict,
            **common,
        )
    began = time.perf_counter()
    work = float(total) * total * dim
    everything = work <= (COMPLETE_WORK if w.device.type == "cpu" else 100 * COMPLETE_WORK)
    everything = everything if complete is None else complete
    # Shares of the time, as it is for rows that all differ.
    first, groups, spanned = (0.08, 0.14, 0.9) if everything else (0.6, 1.0, 1.0)
    kept = greedy_cover(w, epsilons[0], progress=lambda share: progress(first * share))
    seconds = {"unique": time.perf_counter() - began, "product": product_seconds(w)}
    began = time.perf_counter()
    group_of = nearest_kept(w, kept)
    likeness = random_likeness(w, epsilons[0])
    nearest: dict[str, float] = {}
    progress(groups)
    if everything:
        tree = spanning_tree(w, progress=lambda share: progress(groups + (spanned - groups) * share))
        sweep: Sweep | None = complete_sweep(
            w, [*epsilons, *SWEEP], tree, progress=lambda share: progress(spanned + (1 - spanned) * share)
        )
        assert sweep is not None
        unique, linked, alone = (
            {e: getattr(sweep, n)[e] for e in epsilons} for n in ("unique", "components", "no_neighbour")
        )
        sweep = Sweep(*({e: v[e] for e in SWEEP} for v in (sweep.unique, sweep.components, sweep.no_neighbour)))
        nearest = _quantiles(tree.nearest)
    else:
        sweep, linked, alone = None, {}, {}
        unique = {epsilons[0]: len(kept)}
        notes.append(f"only ε = {epsilons[0]:g} was counted; --complete adds components, the sweep and the other ε")
    means = unique if s.means is None else _unique_means(s.means, list(unique), rows.device)
    seconds["rest"] = time.perf_counter() - began
    progress(1.0)
    return Diagnosis(
        unique=unique,
        components=linked,
        no_neighbour=alone,
        unique_means=dict(means),
        sweep=sweep,
        groups=np.sort(np.bincount(group_of.cpu().numpy())[kept.cpu().numpy()])[::-1].copy(),
        nearest=nearest,
        random=likeness,
        verdict=judge(total, bad, dim, unique, likeness, wide=wide_of(sweep)),
        seconds=seconds,
        vectors=w,
        group_of=group_of,
        rows=usable.nonzero()[:, 0].cpu(),
        **common,
    )


def _unique_means(means: Tensor, epsilons: list[float], device: torch.device) -> dict[float, int]:
    means = means.to(device)
    usable = means[torch.isfinite(means).all(1) & (means != 0).any(1)]
    return {eps: len(greedy_cover(usable, eps)) if len(usable) else 0 for eps in epsilons}


def _norms(s: PrototypeSet, rows: Tensor | None) -> dict[str, float]:
    """Quantiles of the lengths of some rows; None: of no row."""
    return {} if rows is None else _quantiles(s.norms()[rows.to(s.weight.device)].cpu().numpy())


def in_order(paths: Sequence[str]) -> list[str]:
    """Paths without repetitions; those in the alphabetical order of a shell's ``*`` by their numbers instead, so that

    ``epoch100`` comes after ``epoch25``.
    """
    once = list(dict.fromkeys(paths))
    if once != sorted(once):
        return once

    def numbers(path: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path)]

    return sorted(once, key=numbers)


def failures(diagnoses: Sequence[Diagnosis], under: float) -> list[str]:
    """One line for each set that a gate at the share ``under`` does not let pass.

    A set fails where fewer of its prototypes are unique, and where its verdict makes the share worthless:
    random vectors are all unique.
    """
    lines = []
    for d in diagnoses:
        where = f"{shown(d.source.file)}: {d.source}"
        if d.share < under:
            lines.append(f"{where}: {100 * d.share:.1f} % unique at ε = {d.epsilon:g}, below {100 * under:g} %")
        elif d.verdict.label in FAILING:
            lines.append(f"{where}: {d.verdict.label}, whatever the share of unique prototypes ({100 * d.share:.1f} %)")
    return lines


def _quantiles(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    low, middle, high = (float(v) for v in np.quantile(values.astype(np.float64), [0, 0.5, 1]))
    return {"min": low, "median": middle, "max": high}
