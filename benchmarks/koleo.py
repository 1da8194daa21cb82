"""KoLeo-Proto, forward and backward, beside half the matrix product, the naive form and lightly's KoLeoLoss.

Its rivals (``losses/diversity.py``) are measured beside their dense forms.

    OMP_NUM_THREADS=1 python benchmarks/koleo.py [--sizes 1024 8192 16384 65536]
    OMP_NUM_THREADS=1 python benchmarks/koleo.py --refresh [--sizes 1024 8192] [--steps 256]

Random rows, D = 256. Half the product (every pair once, by tiles, into a reused buffer) is what any method computes
that looks at every pair; it is measured in turns with the rest, and scaled from the tiles' area to K²/2.

``--refresh`` asks what it costs to look for neighbours only every n steps (``prototypes.koleo_every``): prototypes are
trained by DINO's loss plus KoLeo-Proto on synthetic projections, and what is left of them is compared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common import SIZES, Cost, Row, alternate, print_rows, to_json
from uncollapse.losses.diversity import hyperspherical_energy, mst_length, orthogonality, repulsion
from uncollapse.losses.koleo import koleo_proto, nearest_neighbours
from uncollapse.losses.pairs import fused_dino_loss
from uncollapse.measure.unique import epsilon_sweep
from uncollapse.prototypes.sets import JointPrototypes
from uncollapse.targets.sinkhorn import centred_softmax

DIM = 256
MOST = 6 * 2**30
"""Bytes beyond which a rival is not run."""


def naive(w: Tensor) -> Tensor:
    """The definition with all K × K cosines at once."""
    unit = F.normalize(w, dim=-1)
    with torch.no_grad():
        nearest = (unit @ unit.T).fill_diagonal_(-2).argmax(1)
    return -((unit - unit[nearest]).norm(dim=1) + 1e-8).log().mean()


def half_product(x: Tensor, rows: int = 512, columns: int = 1024) -> float:
    """Every pair of rows at least once, thrown away: the share of K² that was formed."""
    scratch, area = torch.empty(rows * columns, device=x.device), 0
    for i in range(0, len(x), rows):
        a = x[i : i + rows]
        for j in range(i, len(x), columns):
            b = x[j : j + columns]
            torch.mm(a, b.T, out=scratch[: len(a) * len(b)].view(len(a), len(b)))
            area += len(a) * len(b)
    return area / len(x) ** 2


def lightly_loss() -> Callable[[Tensor], Tensor] | None:
    try:
        from lightly.loss import KoLeoLoss
    except ImportError:
        return None
    return KoLeoLoss()


TARGETS = {
    1024: ("no slower than lightly", lambda times, light, memory: light is None or light >= 1),
    16384: (
        "≤ 1.35 × half product; ≥ 3.5 × faster than lightly, in ≤ 1/12 of its memory",
        lambda times, light, memory: times <= 1.35 and (light is None or (light >= 3.5 and memory >= 12)),
    ),
    65536: ("≤ 1.25 × half product, < 0.6 GB", lambda times, light, memory: times <= 1.25),
}


RIVALS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None, float]] = {
    "repulsion": (repulsion, lambda c: (4 * (c.masked_fill(diagonal(c), -torch.inf) - 1)).exp().sum().log(), 3),
    "energy": (hyperspherical_energy, lambda c: (2 - 2 * c + 1e-6 + diagonal(c)).rsqrt().sum(), 3),
    "orthogonality": (orthogonality, lambda c: c.masked_fill(diagonal(c), 0).square().sum(), 0),
    "mst": (mst_length, None, 1),
}
"""Name → ours, the dense form of its sum from all cosines (if any), and how many half products it takes at least."""
MOST_OF_RIVALS = 16384
"""Prototypes up to which the rivals are measured on a CPU: minutes a call beyond."""


def diagonal(cosines: Tensor) -> Tensor:
    return torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)


def rival_rows(w: Tensor, half: Cost, both: Callable[..., Callable[[], float]]) -> Iterator[Row]:
    """The rivals of KoLeo-Proto, each beside its dense form, where that fits."""
    k = len(w)
    product = half.seconds * 0.5 / half.result
    for name, (ours, dense, products) in RIVALS.items():
        functions = {"ours": both(ours)}
        if dense is not None and 16 * k * k < MOST:

            def whole(x: Tensor, dense: Callable[[Tensor], Tensor] = dense) -> Tensor:
                unit = F.normalize(x, dim=-1)
                return dense(unit @ unit.T)

            functions["naive"] = both(whole)
        costs = alternate(functions, 4, 20.0)
        limit = products * product if products else None
        counted = "half the product" if products == 1 else "1.5 products" if products else ""
        yield Row(f"{name}, f + b", f"K = {k:,}", costs["ours"], limit, counted, {"naive": costs.get("naive")})


def rows(sizes: Sequence[int], device: torch.device) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    for k in sizes:
        w = torch.randn(k, DIM, generator=generator).to(device).requires_grad_()
        unit = F.normalize(w.detach(), dim=-1)
        neighbours = nearest_neighbours(w)
        lightly = lightly_loss()

        def both(loss: Callable[[Tensor], Tensor], w: Tensor = w) -> Callable[[], float]:
            def step() -> float:
                value = loss(w)
                torch.autograd.grad(value, w)
                return float(value.detach())

            return step

        functions: dict[str, Callable[[], float]] = {
            "ours": both(koleo_proto),
            "half": lambda unit=unit: half_product(unit),  # type: ignore[misc]
            "old neighbours": both(lambda x, n=neighbours: koleo_proto(x, neighbours=n)),  # type: ignore[misc]
        }
        fits = 8 * k * k < MOST  # the cosines, and a copy
        if fits:
            functions["naive"] = both(naive)
            if lightly is not None:
                functions["lightly"] = both(lightly)
        costs = alternate(functions, 15 if k < 4096 else 4, 30.0)
        ours, half = costs["ours"], costs.pop("half")
        limit = half.seconds * 0.5 / half.result
        others = {name: costs.get(name) for name in ("naive", "lightly", "old neighbours")}
        for name in ("naive", "lightly"):
            if (cost := others[name]) is not None:
                assert abs(cost.result - ours.result) < 1e-4, f"{name}: {cost.result} and not {ours.result}"
        target, reached = TARGETS.get(k, ("", None))
        light = others["lightly"]
        met = (
            None
            if reached is None
            else reached(
                ours.seconds / limit, light and light.seconds / ours.seconds, light and light.peak / max(ours.peak, 1)
            )
            and (k < 65536 or ours.peak < 0.6e9)
        )
        note = "" if fits else f"naive and lightly need {8 * k * k / 2**30:.0f} GiB"
        yield Row("KoLeo-Proto, f + b", f"K = {k:,}", ours, limit, "half the product", others, target, met, note)
        if k <= MOST_OF_RIVALS or device.type == "cuda":
            yield from rival_rows(w, half, both)


# ------------------------------------------------------------------------------------- neighbours every n steps


def simulate(k: int, every: int, steps: int, device: torch.device, dim: int = 64, batch: int = 64) -> dict[str, float]:
    """DINO's loss and KoLeo-Proto on prototypes alone: projections come from k / 16 modes and move by noise.

    The learning rate and the decay of the prototypes are those of the demo, which raises them on purpose.
    """
    generator = torch.Generator().manual_seed(0)
    prototypes = JointPrototypes(k, dim, True, 0.1, generator, every).to(device)
    optimizer = torch.optim.AdamW([prototypes.student_v, prototypes.student_g], lr=3e-2, weight_decay=1.0)
    modes = torch.randn(max(2, k // 16), dim, generator=generator)
    center = torch.zeros(k, device=device)
    outdated, seconds = [], 0.0

    def views(which: Tensor) -> Tensor:
        return F.normalize(modes[which] + 0.4 * torch.randn(len(which), dim, generator=generator), dim=-1).to(device)

    for step in range(steps):
        which = torch.randint(len(modes), (batch,), generator=generator)
        z_teacher, z_student = ([views(which), views(which)] for _ in range(2))
        logits = [prototypes.logits(z, "teacher") for z in z_teacher]
        targets = [centred_softmax(x, center, 0.04) for x in logits]
        center.lerp_(torch.cat(logits).mean(0), 0.1)
        loss = fused_dino_loss(z_student, prototypes.affine("student", 0.1)[0], targets, 0.1)
        start = time.perf_counter()
        regulariser = prototypes.regulariser()
        seconds += time.perf_counter() - start
        assert regulariser is not None
        if every > 1 and step % 7 == 3:  # 7 has no factor in common with n: all ages are seen
            current = nearest_neighbours(prototypes.student_v)
            outdated.append(float((current != prototypes.neighbours).double().mean()))
        optimizer.zero_grad()
        (loss + regulariser).backward()
        optimizer.step()
        prototypes.after_step()
        prototypes.update_teacher(0.99)
    w = prototypes.student_v.detach()
    unit = F.normalize(w, dim=-1)
    distance = (unit - unit[nearest_neighbours(w)]).norm(dim=1)
    return {
        "outdated": sum(outdated) / max(1, len(outdated)),
        "koleo": float(koleo_proto(w)),
        "closest": float(distance.min()),
        "median": float(distance.median()),
        **{f"unique {eps}": count for eps, count in epsilon_sweep(prototypes.vectors("teacher")).items()},
        "ms": 1e3 * seconds / steps,
    }


def refresh(sizes: Sequence[int], steps: int, device: torch.device) -> None:
    for k in sizes:
        table = Table(title=f"neighbours every n steps: K = {k:,}, {steps} steps, D = 64", title_justify="left")
        for heading in (
            "n",
            "outdated",
            "final KoLeo",
            "closest pair",
            "median distance",
            "unique ε .025 / .1 / .25 / .5",
            "regulariser, ms a step",
        ):
            table.add_column(heading)
        for every in (1, 4, 16, 64):
            outcome = simulate(k, every, steps, device)
            table.add_row(
                str(every),
                f"{100 * outcome['outdated']:.1f} %",
                f"{outcome['koleo']:.4f}",
                f"{outcome['closest']:.4f}",
                f"{outcome['median']:.4f}",
                " / ".join(str(v) for n, v in outcome.items() if n.startswith("unique")),
                f"{outcome['ms']:.1f}",
            )
        Console(width=140).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--refresh", action="store_true")
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    where = torch.device(options.device)
    if options.refresh:
        refresh(options.sizes or (1024, 8192), options.steps, where)
    else:
        measured = list(rows(options.sizes or (*SIZES[:2], 16384, *SIZES[2:]), where))
        print_rows("koleo", measured, where)
        if options.json:
            import json

            options.json.write_text(json.dumps(to_json(measured), indent=1) + "\n")
