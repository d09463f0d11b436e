"""A sum and its norm on a GPU, in one pass over both: what XLA makes two kernels of, since the sum is used again.

s = x + y   n = s / sqrt(mean(s ** 2) + eps) * (weight + offset)     Zhang and Sennrich, arXiv 1910.07467

x [T, D], weight [D] bfloat16   y bfloat16 [T, D], or in parts to be added up, bfloat16 or float32 [parts, T, D]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

bf16, f32 = jnp.bfloat16, jnp.float32


def add_norm_gpu(x, y, weight, *, eps: float, offset: float = 0.0, interpret=False) -> tuple[jax.Array, jax.Array]:
    """(s, n), rounded to bfloat16 where the model rounds. Raises ValueError for shapes and types that do not fit."""
    parts = y if y.ndim == 3 else y[None]
    shapes = x.ndim == 2 and parts.shape[1:] == x.shape and weight.shape == x.shape[1:]
    if not shapes or x.dtype != bf16 or weight.dtype != bf16 or y.dtype not in (bf16, f32):
        given = f"x {x.dtype} {x.shape}, y {y.dtype} {y.shape}, weight {weight.dtype} {weight.shape}"
        raise ValueError(f"{given}: must be bfloat16 [T, D], [T, D] or [parts, T, D], and bfloat16 [D]")
    rows, size = x.shape
    block = 1 << (size - 1).bit_length()

    def kernel(x, y, weight, total, normed):
        row, lanes = pl.program_id(0), lax.iota(jnp.int32, block)
        inside = None if block == size else lanes < size
        read = lambda ref: plgpu.load(ref, mask=inside, other=None if inside is None else 0.0)
        here = pl.ds(0, size) if inside is None else lanes  # a slice may not reach beyond an array
        at = (row, here)
        s = read(x.at[at]).astype(f32)
        for part in range(parts.shape[0]):
            s += read(y.at[(jnp.int32(part), *at)]).astype(f32)
        s = s.astype(bf16)
        plgpu.store(total.at[at], s, mask=inside)
        wide = s.astype(f32)
        n = wide * lax.rsqrt(jnp.sum(wide * wide) / size + eps)
        by = read(weight.at[here]).astype(f32)
        n = n * (by + offset) if offset else by * n.astype(bf16).astype(f32)
        plgpu.store(normed.at[at], n.astype(bf16), mask=inside)

    call = pl.pallas_call(
        kernel,
        grid=(rows,),
        out_shape=[jax.ShapeDtypeStruct(x.shape, bf16)] * 2,
        compiler_params=plgpu.CompilerParams(num_warps=max(1, min(8, block // 512)), num_stages=1),
        interpret=interpret,
        name="add_norm_gpu",
    )
    total, normed = call(x, parts, weight)
    return total, normed
