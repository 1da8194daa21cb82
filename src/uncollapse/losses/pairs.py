"""Cross-entropy between the teacher's and the student's assignments: over pairs of views, and over masked patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from uncollapse.checks import one_shape
from uncollapse.losses.cross_entropy import fused_cross_entropy
from uncollapse.targets.softmax import SoftmaxTargets as SoftmaxTargets


def dino_loss(student_logits: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Mean cross-entropy over all pairs (teacher view q, student view v) with q ≠ v (Caron et al. 2021, eq. 3).

    The targets of one student view are summed first, so each view's log-probabilities are made once.
    This is the form to read. :func:`uncollapse.losses.logits.fused_dino_loss_on_logits` is the same number sooner, and
    :func:`fused_dino_loss` the one for large K: it never holds a view's logits.

    Args:
        student_logits: one ``(n, K)`` per view, divided by the student's temperature; the views that the
            teacher saw come first, in the teacher's order.
        targets: one ``(n, K)`` per teacher view, rows summing to 1, no gradient.

    Returns:
        Scalar, in nats; ln K when the student knows nothing.

    Raises:
        ValueError: fewer student views than teacher views, no pair at all, an empty batch, or shapes that differ.
    """
    pairs = pair_count(len(student_logits), len(targets))
    one_shape([*student_logits, *targets], "logits and targets (images, prototypes)")
    total = student_logits[0].new_zeros(())
    everyone = torch.stack(list(targets)).sum(0)
    for v, logits in enumerate(student_logits):
        target = everyone - targets[v] if v < len(targets) else everyone
        total = total - (target * torch.log_softmax(logits, dim=-1)).sum(-1).mean()
    return total / pairs


def fused_dino_loss(
    z: Sequence[Tensor],
    weight: Tensor,
    targets: Sequence[Tensor] | SoftmaxTargets,
    temperature: float,
    bias: Tensor | None = None,
) -> Tensor:
    """:func:`dino_loss` on logits ``z @ weight.T / temperature + bias`` that are never kept.

    The gradient is formed in the forward pass, block by block, so memory beyond the targets and the gradient itself
    is one block of rows whatever the number of views; with :class:`SoftmaxTargets` there are no targets in memory
    either. With Sinkhorn's targets this is SwAV's objective (Caron et al. 2020, eq. 2).

    Args:
        z: one ``(n, D)`` per student view, the teacher's views first.
        weight: ``(K, D)``; gets a gradient where it requires one.
        targets: one ``(n, K)`` per teacher view, or :class:`SoftmaxTargets` with z ``(T, n, D)``; no gradient.
        temperature: the student's, above 0.
        bias: ``(K,)`` added to the logits after the temperature; gets a gradient where it requires one.

    Raises:
        ValueError: fewer student views than teacher views, no pair at all, an empty batch, shapes that do not fit,
            or a temperature that is not above 0.
    """
    views = len(z)
    seen = len(targets.z) if isinstance(targets, SoftmaxTargets) else len(targets)
    pairs = pair_count(views, seen)
    one_shape(z, "views (images, dimensions)")
    x = torch.stack(list(z))
    # Not in half precision, in which 1 / (n · pairs) is another number.
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    pairing = 1 - torch.eye(views, seen, dtype=wide, device=x.device)
    row_weight = torch.full((x.shape[1],), 1 / (x.shape[1] * pairs), dtype=wide, device=x.device)
    return fused_cross_entropy(x, weight, targets, temperature, pairing, row_weight, bias)


def fused_patch_loss(
    z: Tensor,
    weight: Tensor,
    targets: Tensor | SoftmaxTargets,
    temperature: float,
    row_weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """``Σ_i a_i · CE(t_i, s_i)`` over masked patches: iBOT's second term (Zhou et al. 2022, eq. 2).

    Student row i is a token that was masked, target row i the teacher's token at the same place of the same crop
    without the mask.

    Args:
        z: ``(M, D)``, the student's projections of the masked tokens of all crops.
        weight: ``(K, D)``; gets a gradient where it requires one.
        targets: ``(M, K)`` or :class:`SoftmaxTargets` with z ``(M, D)``; no gradient.
        temperature: the student's, above 0.
        row_weight: ``(M,)``, a, 0 or above; from :func:`patch_weights`.
        bias: ``(K,)`` added to the logits after the temperature; gets a gradient where it requires one.

    Returns:
        Scalar; 0 with a gradient of zeros where nothing is masked.

    Raises:
        ValueError: shapes that do not fit, a temperature that is not above 0, or a negative or infinite weight.
    """
    if isinstance(targets, SoftmaxTargets):
        views: Sequence[Tensor] | SoftmaxTargets = replace(targets, z=targets.z.unsqueeze(0))
    else:
        views = [targets]
    return fused_cross_entropy(z.unsqueeze(0), weight, views, temperature, z.new_ones(1, 1), row_weight, bias)


def patch_weights(mask: Tensor, unmasked_count: bool = True) -> Tensor:
    """How much each masked patch counts: a mean over an image's masked patches, then over images.

    iBOT averages over images within a crop and then over the two crops, DINOv2 divides by the number of all crops:
    the same numbers. In both, a crop without a mask counts as one whose loss is 0, which makes the term smaller the
    fewer crops are masked.

    Args:
        mask: ``(n, patches)`` boolean, True where the student's token was masked; n counts crops.
        unmasked_count: False takes the mean over the crops that have a mask, so the term is a mean cross-entropy.

    Returns:
        ``(M,)`` float32 in the order of ``mask.nonzero()``; sums to the share of crops that have a mask, or to 1.

    Raises:
        ValueError: a mask that is not a boolean matrix.
    """
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise ValueError(f"a mask is boolean and (crops, patches), got {mask.dtype} of shape {tuple(mask.shape)}")
    masked = mask.sum(-1)
    images = len(mask) if unmasked_count else int((masked > 0).sum())
    each = 1 / (masked.clamp(min=1).float() * max(1, images))
    return each.unsqueeze(-1).expand(mask.shape)[mask]


def pair_count(views: int, teacher_views: int) -> int:
    """Pairs (teacher view q, student view v ≠ q), the teacher's views being the student's first.

    Raises:
        ValueError: fewer student views than teacher views, or no pair at all.
    """
    pairs = views * teacher_views - min(views, teacher_views)
    if views < teacher_views or pairs < 1:
        raise ValueError(
            f"need every teacher view among the student's and one more view in all; "
            f"got {teacher_views} teacher and {views} student views"
        )
    return pairs
