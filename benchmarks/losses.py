"""Losses, forward and backward, beside the forms they replace.

    OMP_NUM_THREADS=1 python benchmarks/losses.py [--sizes 1024 8192 65536]

64 images, 2 teacher and 10 student views, D = 256. "On logits" everyone starts from the logits; "from z and W" the
products with the prototypes, and their gradients, count for everyone. Rivals are minimal forms written here from the
published formulas; lightly's DINOLoss is timed as installed (its call also moves its centre). Every result is
compared with ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common import Cost, Row, alternate, copy_rate, exp_rate, main, matmul_seconds
from uncollapse.losses.carp import carp_loss, fused_carp_loss, random_blocks
from uncollapse.losses.logits import fused_dino_loss_on_logits
from uncollapse.losses.pairs import dino_loss, fused_dino_loss, fused_patch_loss
from uncollapse.prototypes.vmf import vmf_bias
from uncollapse.targets.sinkhorn import centred_softmax, sinkhorn, sinkhorn_offsets
from uncollapse.targets.softmax import SoftmaxTargets

IMAGES, TEACHER_VIEWS, VIEWS, DIM, PATCHES = 64, 2, 10, 256, 512
TAU_STUDENT, TAU_TEACHER = 0.1, 0.04
Loss = Callable[[], float]


def unit(*shape: int, device: torch.device) -> Tensor:
    return F.normalize(torch.randn(*shape, device=device), dim=-1)


# --------------------------------------------------------------------------------------- the forms that are replaced


def pair_by_pair(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The definition in one expression: every pair's products at once."""
    log_p = torch.log_softmax(torch.stack(list(student)) / TAU_STUDENT, dim=-1)
    cross = -(torch.stack(list(teacher)).unsqueeze(1) * log_p).sum(-1).mean(-1)
    pairs = 1 - torch.eye(len(teacher), len(student), device=cross.device)
    return (cross * pairs).sum() / pairs.sum()


def dino_loop(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Two nested loops with a log-softmax for every pair, as in DINO's Algorithm 1 with several crops."""
    terms = [
        -(t * torch.log_softmax(s / TAU_STUDENT, dim=-1)).sum(-1).mean()
        for q, t in enumerate(teacher)
        for v, s in enumerate(student)
        if v != q
    ]
    return torch.stack(terms).mean()


def dinov2_loop(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The log-softmax of a student view is shared by its pairs, which are summed one by one."""
    total, pairs = student[0].new_zeros(()), 0
    for v, s in enumerate(student):
        log_p = torch.log_softmax(s / TAU_STUDENT, dim=-1)
        for q, t in enumerate(teacher):
            if v != q:
                total, pairs = total - (t * log_p).sum(-1).mean(), pairs + 1
    return total / pairs


def lightly_loss(k: int, center: Tensor) -> Callable[[list[Tensor], list[Tensor]], Tensor] | None:
    try:
        from lightly.loss import DINOLoss
    except ImportError:
        return None
    module = DINOLoss(k, student_temp=TAU_STUDENT, warmup_teacher_temp_epochs=0, center_momentum=1.0)
    module = module.to(center.device)
    module.center.copy_(center.view_as(module.center))

    def loss(teacher: list[Tensor], student: list[Tensor]) -> Tensor:
        return module(teacher, student, teacher_temp=TAU_TEACHER)

    return loss


# --------------------------------------------------------------------------------------------------------- one row


def timed(ours: Loss, others: dict[str, Loss | None], k: int) -> tuple[Cost, dict[str, Cost | None]]:
    """All in turns; a rival whose loss differs by more than 0.5 % is a mistake in this file."""
    costs = alternate({"ours": ours, **{n: f for n, f in others.items() if f}}, repeats=3 if k > 30000 else 8)
    for name, cost in costs.items():
        if not math.isclose(cost.result, costs["ours"].result, rel_tol=5e-3):
            raise AssertionError(f"{name}: {cost.result}, ours: {costs['ours'].result}")
    return costs["ours"], {name: costs.get(name) for name in others}


def row(
    name: str,
    k: int,
    ours: Loss,
    others: dict[str, Loss | None],
    limit: float,
    limit_is: str,
    targets: dict[str, float] | None = None,
    lightly_memory: bool = False,
    note: str = "",
) -> Row:
    """``targets``: by rival, how many times faster ours is to be; like the memory's, for 65,536 prototypes."""
    ours_cost, theirs = timed(ours, others, k)
    targets = targets if targets and k >= 65536 else {}
    wanted = [f"≥ {factor}× {rival}" for rival, factor in targets.items()]
    met = [
        cost.seconds >= factor * ours_cost.seconds
        for rival, factor in targets.items()
        if (cost := theirs[rival]) is not None
    ]
    peer = theirs.get("lightly")
    if lightly_memory and peer is not None and k >= 65536:
        wanted.append("memory ≤ 1/3 of lightly's")
        met.append(3 * ours_cost.peak <= peer.peak)
    missing = [n for n, c in theirs.items() if c is None]
    notes = [note] if note else []
    notes += [f"{n} is not installed" for n in missing]
    return Row(
        name,
        f"K = {k:,}",
        ours_cost,
        limit,
        limit_is,
        theirs,
        ", ".join(wanted),
        all(met) if met else None,
        "; ".join(notes),
    )


def gradient(loss: Tensor, leaves: Sequence[Tensor]) -> float:
    torch.autograd.grad(loss, leaves)
    return float(loss.detach())


def rows(sizes: Sequence[int], device: torch.device) -> Iterator[Row]:
    torch.manual_seed(0)
    copies, exps = copy_rate(device), exp_rate(device)
    for k in sizes:
        yield on_logits(k, device, copies, exps)
        product = matmul_seconds(IMAGES, DIM, k, device)
        yield from from_z(k, device, exps, product)
        yield patches(k, device, exps, product)
        yield carp(k, device, exps, product)


def on_logits(k: int, device: torch.device, copies: float, exps: float) -> Row:
    weight, center = unit(k, DIM, device=device), 0.1 * torch.randn(k, device=device)
    student = [(unit(IMAGES, DIM, device=device) @ weight.T).requires_grad_() for _ in range(VIEWS)]
    teacher = [unit(IMAGES, DIM, device=device) @ weight.T for _ in range(TEACHER_VIEWS)]
    lightly = lightly_loss(k, center)

    def targets() -> list[Tensor]:
        return [centred_softmax(t, center, TAU_TEACHER) for t in teacher]

    student_size, teacher_size = VIEWS * IMAGES * k, TEACHER_VIEWS * IMAGES * k
    limit = 4 * (2 * student_size + teacher_size) / copies + (student_size + teacher_size) / exps
    return row(
        "DINO loss on logits",
        k,
        lambda: gradient(fused_dino_loss_on_logits(student, targets(), TAU_STUDENT), student),
        {
            "pair by pair": lambda: gradient(pair_by_pair(student, targets()), student),
            "DINO's loop": lambda: gradient(dino_loop(student, targets()), student),
            "DINOv2's form": lambda: gradient(dinov2_loop(student, targets()), student),
            "lightly": lightly and (lambda: gradient(lightly(teacher, student), student)),
        },
        limit,
        "logits read, gradient written, one exp of each logit",
        {"DINO's loop": 2, "DINOv2's form": 1.6},
        lightly_memory=True,
        note=f"the gradient of the logits alone is {4 * student_size / 2**20:.0f} MiB; stretch: 1.2 × limit",
    )


def from_z(k: int, device: torch.device, exps: float, product: float) -> Iterator[Row]:
    """DINO, DINO-vMF and SwAV, whose rivals make logits first."""
    weight = unit(k, DIM, device=device).requires_grad_()
    scaled = (weight.detach() * (0.5 + torch.rand(k, 1, device=device))).requires_grad_()
    weight_teacher, center = unit(k, DIM, device=device), 0.1 * torch.randn(k, device=device)
    z = [unit(IMAGES, DIM, device=device).requires_grad_() for _ in range(VIEWS)]
    z_teacher = unit(TEACHER_VIEWS, IMAGES, DIM, device=device)
    lightly = lightly_loss(k, center)

    def targets() -> list[Tensor]:
        return [centred_softmax(t @ weight_teacher.T, center, TAU_TEACHER) for t in z_teacher]

    def logits() -> list[Tensor]:
        return [x @ weight.T for x in z]

    both = VIEWS + TEACHER_VIEWS
    limit = (3 * VIEWS + TEACHER_VIEWS) * product + both * IMAGES * k / exps
    limit_is = "3 products per student view, 1 per teacher view, one exp of each logit"
    soft = SoftmaxTargets(z_teacher, weight_teacher, TAU_TEACHER, -center / TAU_TEACHER)
    yield row(
        "DINO loss from z and W",
        k,
        lambda: gradient(fused_dino_loss(z, weight, soft, TAU_STUDENT), [*z, weight]),
        {
            "targets as arrays": lambda: gradient(fused_dino_loss(z, weight, targets(), TAU_STUDENT), [*z, weight]),
            "DINO's loop": lambda: gradient(dino_loop(logits(), targets()), [*z, weight]),
            "DINOv2's form": lambda: gradient(dinov2_loop(logits(), targets()), [*z, weight]),
            "lightly": lightly
            and (lambda: gradient(lightly([t @ weight_teacher.T for t in z_teacher], logits()), [*z, weight])),
        },
        limit,
        limit_is,
        lightly_memory=True,
    )

    def fused_vmf() -> float:
        teacher = SoftmaxTargets(z_teacher, weight_teacher, TAU_TEACHER, vmf_bias(weight_teacher, TAU_TEACHER))
        return gradient(fused_dino_loss(z, scaled, teacher, TAU_STUDENT, vmf_bias(scaled, TAU_STUDENT)), [*z, scaled])

    def naive_vmf() -> float:
        bias, bias_teacher = vmf_bias(scaled, TAU_STUDENT), vmf_bias(weight_teacher, TAU_TEACHER)
        teacher = [torch.softmax(t @ weight_teacher.T / TAU_TEACHER + bias_teacher, -1) for t in z_teacher]
        return gradient(dino_loss([x @ scaled.T / TAU_STUDENT + bias for x in z], teacher), [*z, scaled])

    yield row(
        "DINO-vMF loss from z and W",
        k,
        fused_vmf,
        {"logits, then dino_loss": naive_vmf},
        limit,
        limit_is,
        note="both call vmf_bias",
    )

    def balanced() -> SoftmaxTargets:
        offsets = sinkhorn_offsets(z_teacher.flatten(0, 1), weight_teacher, TAU_TEACHER)
        return SoftmaxTargets(z_teacher, weight_teacher, TAU_TEACHER, offsets)

    def arrays() -> float:
        q = sinkhorn(z_teacher.flatten(0, 1) @ weight_teacher.T / TAU_TEACHER).chunk(TEACHER_VIEWS)
        return gradient(fused_dino_loss(z, weight, q, TAU_STUDENT), [*z, weight])

    def naive_swav() -> float:
        q = torch.exp(z_teacher.flatten(0, 1) @ weight_teacher.T / TAU_TEACHER)
        for _ in range(3):
            q = q / q.sum(0, keepdim=True)
            q = q / q.sum(1, keepdim=True)
        return gradient(dino_loop(logits(), list(q.chunk(TEACHER_VIEWS))), [*z, weight])

    yield row(
        "Sinkhorn targets from z and W",
        k,
        lambda: gradient(fused_dino_loss(z, weight, balanced(), TAU_STUDENT), [*z, weight]),
        {"targets as arrays": arrays, "exp, divide, DINO's loop": naive_swav},
        limit,
        limit_is,
    )


def patches(k: int, device: torch.device, exps: float, product: float) -> Row:
    weight, weight_teacher = unit(k, DIM, device=device).requires_grad_(), unit(k, DIM, device=device)
    z, z_teacher = unit(PATCHES, DIM, device=device).requires_grad_(), unit(PATCHES, DIM, device=device)
    a = torch.rand(PATCHES, device=device) / PATCHES
    soft = SoftmaxTargets(z_teacher, weight_teacher, TAU_TEACHER)

    def naive() -> float:
        target = torch.softmax(z_teacher @ weight_teacher.T / TAU_TEACHER, dim=-1)
        cross = -(target * torch.log_softmax(z @ weight.T / TAU_STUDENT, dim=-1)).sum(-1)
        return gradient((a * cross).sum(), [z, weight])

    return row(
        f"masked patches, {PATCHES}, from z and W",
        k,
        lambda: gradient(fused_patch_loss(z, weight, soft, TAU_STUDENT, a), [z, weight]),
        {"softmax, log-softmax, sum": naive},
        4 * PATCHES / IMAGES * product + 2 * PATCHES * k / exps,
        "3 products of the student's, 1 of the teacher's, one exp of each logit",
    )


def carp(k: int, device: torch.device, exps: float, product: float) -> Row:
    weight, weight_teacher = unit(k, DIM, device=device).requires_grad_(), unit(k, DIM, device=device)
    z = [torch.randn(IMAGES, DIM, device=device).requires_grad_() for _ in range(VIEWS)]
    soft = SoftmaxTargets(torch.randn(TEACHER_VIEWS, IMAGES, DIM, device=device), weight_teacher, 1.0)
    blocks = random_blocks(k, min(512, k), 0, 0)

    def naive() -> float:
        teacher = [t @ weight_teacher.T for t in soft.z]
        return gradient(carp_loss([x @ weight.T for x in z], teacher, blocks), [*z, weight])

    return row(
        "CARP loss from z and W",
        k,
        lambda: gradient(fused_carp_loss(z, weight, soft, blocks), [*z, weight]),
        {"logits, then carp_loss": naive},
        (3 * VIEWS + TEACHER_VIEWS) * product + (VIEWS + TEACHER_VIEWS) * IMAGES * k / exps,
        "3 products per student view, 1 per teacher view, one exp of each logit",
    )


if __name__ == "__main__":
    main("losses", rows)
