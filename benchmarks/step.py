"""What each way to learn prototypes adds to a whole training step: ViT-S/16 at 224 px, K = 65,536, part by part.

    python benchmarks/step.py [--images 64] [--micro 4] [--markdown FILE]

The encoder's parts are measured on ``--micro`` images and multiplied up to ``--images`` (its cost is linear in
them; on a CPU the activations of 64 images would not fit); the prototypes' parts are measured on all of them. Two
global views of 224 px and ten local ones of 96 px, as DINO trains them. Views are made already: no data loading.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from common import Cost, Row, describe, measure, print_rows
from uncollapse.config.load import load_config
from uncollapse.models.drop_path import row_keys
from uncollapse.prototypes.build import build_prototypes
from uncollapse.prototypes.sets import JointPrototypes, Prototypes
from uncollapse.training.optim import update_teacher
from uncollapse.training.state import TrainState, build_state

ARMS = ("joint", "koleo", "decoupled", "decoupled-paper")
GLOBALS = 2


def rows(sizes: Sequence[int], device: torch.device, images: int = 64, micro: int | None = None) -> Iterator[Row]:
    k = max(sizes)
    micro = micro or (images if device.type == "cuda" else 4)
    config = load_config("dino-vits16", {"run.batch": images, "prototypes.count": k, "optim.min_lr": 0.0})
    encoder = _encoder_parts(build_state(config).to(device), config.views.local_count, micro, images, device)
    views = GLOBALS + config.views.local_count
    z = torch.nn.functional.normalize(torch.randn(views, images, config.head.bottleneck, device=device), dim=-1)
    arms = {arm: _prototype_parts(arm, k, z, device) for arm in ARMS}
    shared = sum(cost.seconds for cost in encoder.values())
    whole = {arm: shared + sum(c.seconds for c in parts.values()) for arm, parts in arms.items()}
    for part, cost in encoder.items():
        yield Row(
            f"encoder: {part}", _size(k, images), cost, note=f"{100 * cost.seconds / whole['joint']:.1f} % of joint's"
        )
    for arm, parts in arms.items():
        for part, cost in parts.items():
            share = f"{100 * cost.seconds / whole[arm]:.2f} % of its step"
            yield Row(f"{arm}: {part}", _size(k, images), cost, note=share)
        more = f"{100 * (whole[arm] / whole['joint'] - 1):+.2f} % beside joint"
        yield Row(
            f"{arm}: whole step", _size(k, images), Cost(whole[arm], max(c.peak for c in parts.values())), note=more
        )


def _size(k: int, images: int) -> str:
    return f"K = {k:,}, {images} images"


def _encoder_parts(state: TrainState, locals_: int, micro: int, images: int, device: torch.device) -> dict[str, Cost]:
    wide = [torch.randn(micro, 3, 224, 224, device=device) for _ in range(GLOBALS)]
    small = [torch.randn(micro, 3, 96, 96, device=device) for _ in range(locals_)]
    times = images / micro
    kept: list[Tensor] = []
    views = len(wide) + len(small)

    def teacher() -> None:
        with torch.no_grad():
            state.teacher(wide)

    def forward() -> None:
        kept[:] = [state.student([*wide, *small], row_keys(0, 0, torch.arange(micro, device=device), views)).cls]

    def both() -> None:
        forward()
        torch.stack(kept).sum().backward()
        kept.clear()

    def optimiser() -> None:
        state.optimizer.step()
        update_teacher(state.teacher, state.student, 0.996)

    parts = {"teacher forward": measure(teacher, 2), "student forward": measure(forward, 2)}
    kept.clear()
    whole = measure(both, 2)
    parts["student backward"] = Cost(max(0.0, whole.seconds - parts["student forward"].seconds), whole.peak)
    parts = {name: Cost(cost.seconds * times, round(cost.peak * times)) for name, cost in parts.items()}
    for group in state.optimizer.param_groups:
        if group["role"] == "prototypes":
            group["params"] = []  # counted with the prototypes
    parts["optimiser and EMA"] = measure(optimiser, 3)
    return parts


def _prototype_parts(arm: str, k: int, z: Tensor, device: torch.device) -> dict[str, Cost]:
    from uncollapse.methods import dino
    from uncollapse.methods.contract import At, Seen

    _, images, dim = z.shape
    config = load_config("dino-vits16", {"prototypes.kind": arm, "prototypes.count": k})
    prototypes: Prototypes = build_prototypes(config.prototypes, dim, GLOBALS * images, 0).to(device)
    sets, memory = {"cls": prototypes}, {n: t.to(device) for n, t in dino.memory(config).items()}
    at, teacher = At(0, 0.0, 0.0, 0, None), Seen({"cls": z[:GLOBALS]})
    learned = [p for p in prototypes.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4) if learned else None
    z_student = [v.clone().requires_grad_() for v in z]
    flat = z[:GLOBALS].flatten(0, 1)
    parts: dict[str, Cost] = {}
    if not isinstance(prototypes, JointPrototypes):
        first = measure(lambda: prototypes.observe(flat, 0.5), 0)  # what it allocates and keeps shows only here
        again = measure(lambda: prototypes.observe(flat, 0.5), 5)
        parts["E- and M-step"] = Cost(again.seconds, first.peak)
    parts["targets"] = measure(lambda: dino.assign(config, teacher, sets, memory, at), 5)
    targets = dino.assign(config, teacher, sets, memory, at)

    def loss() -> None:
        for tensor in [*z_student, *learned]:
            tensor.grad = None
        dino.objective(config, Seen({"cls": torch.stack(z_student)}), targets, sets, at)["cls"].backward()

    def regulariser() -> None:
        term = prototypes.regulariser()
        assert term is not None
        term.backward()

    parts["loss, forward and backward"] = measure(loss, 3)
    if prototypes.regulariser() is not None:
        parts["KoLeo-Proto, forward and backward"] = measure(regulariser, 2)
    parts["centre"] = measure(lambda: dino.remember(config, teacher, sets, memory, at), 5)
    if optimizer is not None:
        parts["prototypes' optimiser and EMA"] = measure(
            lambda: (optimizer.step(), prototypes.update_teacher(0.996)), 3
        )
    return parts


def markdown(measured: Sequence[Row], device: torch.device) -> str:
    lines = [
        "# What each way to learn prototypes adds to a training step",
        "",
        "Written by `python benchmarks/step.py --markdown docs/step-cost.md`. ViT-S/16, two global views of 224 px and",
        "ten local ones of 96 px, head 2048-2048-256, DINO's objective; views are made already. On a CPU the encoder's",
        "parts are measured on a few images and multiplied up (time and activations are linear in them). Projections",
        "are random unit vectors. The memory of a whole step is that of its largest prototype part.",
        "",
        f"{measured[0].size}; {describe(device)}.",
        "",
        "| part | time, ms | memory, MiB | |",
        "|---|---|---|---|",
    ]
    for row in measured:
        cost = row.ours
        lines.append(f"| {row.name} | {1e3 * cost.seconds:.1f} | {cost.peak / 2**20:.0f} | {row.note} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--micro", type=int)
    parser.add_argument("--count", type=int, default=65536, help="K")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--markdown", type=Path, help="also write the table there")
    options = parser.parse_args()
    device = torch.device(options.device)
    measured = list(rows([options.count], device, options.images, options.micro))
    print_rows("one training step", measured, device)
    if options.markdown:
        options.markdown.write_text(markdown(measured, device))


if __name__ == "__main__":
    main()
