"""Products with quantized weights, as work whose cost a simulator of the TPU compiler's schedules can count: see cost_cases.py.

xla=1 compiles what XLA makes of the same product instead. rows, inner, columns: blocks.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from llminfer.target import chip_of
from pallas_kernels.quantized_matmul import quantized_matmul
from pallas_kernels.weight_formats import MXFP4_GROUP, packed


def int8_matmul(A: Any, M: int = 8, K: int = 4096, N: int = 14336, L: int = 2, group: int = 0, **more: Any):
    """int8 weights; group 0: scales by output channel."""
    return matmul(A, M, (L, K, N), jnp.int8, group, **more)


def int4_matmul(A: Any, M: int = 8, K: int = 4096, N: int = 14336, L: int = 2, group: int = 128, **more: Any):
    return matmul(A, M, (L, K, N), jnp.int4, group, **more)


def fp8_matmul(A: Any, M: int = 8, K: int = 4096, N: int = 14336, L: int = 2, **more: Any):
    return matmul(A, M, (L, K, N), jnp.float8_e4m3fn, 0, **more)


def mxfp4_matmul(A: Any, M: int = 8, K: int = 4096, N: int = 14336, L: int = 2, **more: Any):
    return matmul(A, M, (L, K, N), jnp.uint8, MXFP4_GROUP, scales="bfloat16", **more)


def w8a8_matmul(A: Any, M: int = 8, K: int = 4096, N: int = 14336, L: int = 2, **more: Any):
    """int8 weights by channel, x rounded to int8 by row."""
    return matmul(A, M, (L, K, N), jnp.int8, 0, quantize_x=True, **more)


def matmul(
    A: Any, M: int, shape: tuple[int, int, int], dtype: Any, group: int, *, rows=0, inner=0, columns=0, xla=0, scales="float32",
    minimum=0, x="bfloat16", **how: Any,
) -> dict[str, Any]:  # fmt: skip
    layers, k, n = shape
    chip = chip_of(A((8,)).sharding.mesh.devices.flat[0])
    blocks = (rows or M, inner, columns) if inner else None
    impl = "reference" if xla else "pallas"

    def fn(x, w, scale, layer, *least):
        return quantized_matmul(x, w, scale, layer=layer, minimum=least[0] if least else None, chip=chip, blocks=blocks, impl=impl, **how)

    scale = A((layers, k // group, n) if group else (layers, n), jnp.dtype(scales))
    args = [A((M, k), jnp.dtype(x)), A((layers, k // packed(dtype), n), dtype), scale, A((), jnp.int32), *([scale] if minimum else [])]
    return dict(fn=fn, args=args, donate=(), operands={"quantized_matmul": {0: [layers - 1]}})
