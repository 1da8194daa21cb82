"""How far floating-point numbers can be trusted."""

from __future__ import annotations

import math

import torch


def exponent_floor(dtype: torch.dtype) -> float:
    """Logits this far below their row's largest count as this far: e⁻⁶¹ in float32, nothing beside 1.

    What lies further below are denormal numbers, which make exponentials and matrix products twenty times slower.
    """
    return 0.7 * math.log(torch.finfo(dtype).tiny)


def rounding(dim: int) -> float:
    """Largest error of a float32 cosine: of any order of summation, plus of the rounded inputs."""
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        matmul = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
        reduced = any(getattr(m, "fp32_precision", "ieee") not in ("ieee", "none") for m in matmul)
    else:  # torch before 2.9
        reduced = torch.get_float32_matmul_precision() != "highest"
    # TF32 and bf16 products round each input by at most 2**-9 (2**-8 where a kernel truncates).
    return (dim + 8) * 2.0**-24 + (2.0**-6 if reduced else 0.0)
