"""How far floating-point numbers can be trusted, and how many of them are held at once."""

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


IN_FLIGHT = 1 << 22
"""Numbers of a temporary array that a matrix product makes: 16 MiB of float32. From 32 MiB on, glibc fetches the pages
of every new array from the system, which costs as much as the product; an array that is used again may be larger."""
NEAR = 1 << 18
"""Numbers of an array that one pass after another goes over: 1 MiB of float32, which stays in a core's cache."""
_ON_GPU = 1 << 27
"""Numbers of either kind on a GPU, which wants few large kernels: 512 MiB of float32."""


def rows_at_once(columns: int, numbers: int = IN_FLIGHT, least: int = 64, device: torch.device | None = None) -> int:
    """Rows of so many ``columns`` to work on together, so that a block holds about ``numbers`` of them.

    Args:
        columns: of all arrays that are held at once; 0 counts as 1.
        numbers: `IN_FLIGHT`, `NEAR`, or a part or multiple of them where it was measured to be faster.
        least: rows, however wide they are: a matrix product of a few rows takes as long as one of many.
        device: where given and a GPU, blocks are as large as one needs to be busy.
    """
    if device is not None and device.type != "cpu":
        numbers = _ON_GPU
    return max(least, numbers // max(1, columns))


def blocks(count: int, rows: int) -> list[slice]:
    """``range(count)`` in blocks of so many rows, the last one perhaps shorter."""
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]
