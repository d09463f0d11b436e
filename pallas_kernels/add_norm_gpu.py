"""A sum and its norm on a GPU, in one pass over both: what XLA makes two kernels of, since the sum is used again.

s = x + y   n = s / sqrt(mean(s ** 2) + eps) * (weight + offset)     Zhang and Sennrich, arXiv 1910.07467

x [T, D], weight [D] bfloat16   y bfloat16 [T, D], or in parts to be added up, bfloat16 or float32 [parts, T, D]; with `by` (float32 [T, 1],
[1, D]) the sums of a product of 8-bit numbers, int32 or bfloat16, not multiplied by their scales yet; with `peers` that of one device,
which is added up over all of them, in the same kernel (peers_gpu.py)
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import peers_gpu
from pallas_kernels.round_gpu import rounded

bf16, f32 = jnp.bfloat16, jnp.float32


def add_norm_gpu(
    x, y, weight, *, eps: float, offset: float = 0.0, kind: Any = None, by: Any = None, peers: Any = None, interpret=False
) -> tuple[Any, Any]:
    """(s, n), rounded to bfloat16 where the model rounds. kind: int8 or float8_e4m3fn: n is (q, amount), as round_gpu.py has it. peers:
    this device's words of peers_gpu.workspace, int32 [words]. Raises ValueError for shapes and types that do not fit."""
    parts = y if y.ndim == 3 else y[None]
    shapes = x.ndim == 2 and parts.shape[1:] == x.shape and weight.shape == x.shape[1:]
    types = (bf16, f32) if by is None else (jnp.int32, bf16, f32)
    if not shapes or x.dtype != bf16 or weight.dtype != bf16 or y.dtype not in types or (by is not None and len(parts) > 1):
        given = f"x {x.dtype} {x.shape}, y {y.dtype} {y.shape}, weight {weight.dtype} {weight.shape}"
        raise ValueError(f"{given}: must be bfloat16 [T, D], [T, D] or [parts, T, D], and bfloat16 [D]")
    rows, size = x.shape
    if peers is not None and (size not in peers_gpu.WIDTHS or rows > peers_gpu.ROWS or interpret):
        raise ValueError(
            f"x {x.shape}: with peers there are at most {peers_gpu.ROWS} rows of {', '.join(map(str, peers_gpu.WIDTHS))}, on GPUs"
        )
    block = 1 << (size - 1).bit_length()

    def kernel(x, y, weight, *refs):
        table, refs = (None, refs) if peers is None else (refs[0], refs[1:])
        factors, total, normed, amount = refs[: 2 if by else 0], refs[2 if by else 0], refs[3 if by else 1], refs[-1]
        row, lanes = pl.program_id(0), lax.iota(jnp.int32, block)
        inside = None if block == size else lanes < size
        read = lambda ref: plgpu.load(ref, mask=inside, other=None if inside is None else jnp.zeros((), ref.dtype))
        here = pl.ds(0, size) if inside is None else lanes  # a slice may not reach beyond an array
        at = (row, here)
        s = read(x.at[at]).astype(f32)
        given = [read(y.at[(jnp.int32(part), *at)]).astype(f32) for part in range(parts.shape[0])]
        if factors:
            given = [(given[0] * (plgpu.load(factors[0].at[row]) * read(factors[1].at[here]))).astype(bf16).astype(f32)]
        if table is not None:
            given = [peers_gpu.summed(functools.reduce(jnp.add, given).astype(bf16), table).astype(f32)]
        s = functools.reduce(jnp.add, given, s).astype(bf16)
        plgpu.store(total.at[at], s, mask=inside)
        wide = s.astype(f32)
        n = wide * lax.rsqrt(jnp.sum(wide * wide) / size + eps)
        weights = read(weight.at[here]).astype(f32)
        n = (n * (weights + offset) if offset else weights * n.astype(bf16).astype(f32)).astype(bf16)
        if kind is not None:
            n, by_row = rounded(n.astype(f32), kind, bool(interpret))
            plgpu.store(amount.at[row], by_row)
        plgpu.store(normed.at[at], n, mask=inside)

    shape = lambda kind: jax.ShapeDtypeStruct(x.shape, kind)
    call = pl.pallas_call(
        kernel,
        grid=(rows,),
        out_shape=[shape(bf16), shape(kind or bf16), *([] if kind is None else [jax.ShapeDtypeStruct((rows,), f32)])],
        compiler_params=plgpu.CompilerParams(num_warps=max(1, block // 512 if peers is not None else min(8, block // 512)), num_stages=1),
        interpret=interpret,
        name="add_norm_gpu",
    )
    more = [] if peers is None else [peers]
    total, normed, *amount = call(x, parts, weight, *more, *([] if by is None else [by[0].reshape(-1), by[1].reshape(-1)]))
    return total, (normed, amount[0][:, None]) if amount else normed
