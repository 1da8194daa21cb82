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


IN_FLIGHT = 1 << 23
"""Numbers of a temporary array where nothing says otherwise: 32 MiB of float32. Matrix products with fewer rows run
well below the processor's rate. Constants of other sizes stand where another was measured to be faster."""


def rows_at_once(width: int, numbers: int = IN_FLIGHT, least: int = 64) -> int:
    """Rows of ``width`` that make a block of about so many numbers, and ``least`` however wide they are."""
    return max(least, numbers // width)
