"""Rounding of tokens to 8 bits on a GPU, for products with 8-bit weights, joined with what makes the numbers that are rounded.

    rows  x [T, K] -> q [T, K] int8 or float8_e4m3fn, amount float32 [T, 1]     x = q * amount, each row by its largest magnitude
    gate  y [T, 2 * K] -> the same of act(y[:, :K]) * y[:, K:]

y may be sums of a product that are not scaled yet, of any type, with `by` (float32 [T, 1], [1, N]) what to multiply them by.
add_norm_gpu.py rounds what a norm gives. XLA makes two kernels of each, and one more of the scales.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import kv_scales

bf16, f32 = jnp.bfloat16, jnp.float32
KINDS = (jnp.int8, jnp.float8_e4m3fn)
ACTIVATIONS = ("silu", "gelu_tanh")


# Four numbers at once to the nearest integers, as bytes of one register. Triton knows no such rounding.
_NEAREST = """{
.reg .b32 a, b, c, d;
cvt.rni.s32.f32 a, $1;
cvt.rni.s32.f32 b, $2;
cvt.rni.s32.f32 c, $3;
cvt.rni.s32.f32 d, $4;
prmt.b32 a, a, b, 0x0040;
prmt.b32 c, c, d, 0x0040;
prmt.b32 $0, a, c, 0x5410;
}"""


def rounded(x, kind, interpret: bool):
    """(q, amount) of a row x [K] of float32, for use inside of a kernel."""
    amount = jnp.maximum(jnp.max(jnp.abs(x)), 1e-30) / kv_scales.largest(kind) + jnp.sum(x - x)  # max may lose a NaN
    x = x * (1 / amount)
    if not jnp.issubdtype(kind, jnp.integer):
        return x.astype(kind), amount
    if interpret:
        return kv_scales.rounded(kind, x).astype(kind), amount
    like = [jax.ShapeDtypeStruct(x.shape, kind)]
    return plgpu.elementwise_inline_asm(_NEAREST, args=[x], constraints="=r,r,r,r,r", pack=4, result_shape_dtypes=like)[0], amount


def activate(x, name: str):
    """The activation of a gate, float32, in operations that Triton has."""
    if name == "silu":
        return x / (1 + jnp.exp(-x))
    inside = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1 + jnp.exp(-2 * inside))  # x * (1 + tanh(inside)) / 2


def round_gpu(y, kind, *, gate: str | None = None, by: Any = None, interpret=False) -> tuple[jax.Array, jax.Array]:
    """(q, amount) of the rows of y, or of its gated halves. kind: int8 or float8_e4m3fn. Raises ValueError."""
    rows, width = y.shape
    size = width // 2 if gate else width
    if kind not in KINDS or gate not in (None, *ACTIVATIONS) or (gate and width % 2):
        legal = f"kind int8 or float8_e4m3fn, gate None or {', '.join(ACTIVATIONS)} with an even width"
        raise ValueError(f"y {y.shape}, kind {jnp.dtype(kind)}, gate={gate!r}: legal: {legal}")
    if by is not None and (by[0].shape != (rows, 1) or by[1].shape != (1, width)):
        raise ValueError(f"by {by[0].shape}, {by[1].shape}: must be {(rows, 1)} and {(1, width)} for y {y.shape}")
    block = 1 << (size - 1).bit_length()

    def kernel(y, *refs):
        *factors, q, amount = refs
        row, lane = pl.program_id(0), lax.iota(jnp.int32, block)
        inside = None if block == size else lane < size

        def read(ref, first, *at):
            place = (*at, pl.ds(first, size) if inside is None else lane + first)
            return plgpu.load(ref.at[place], mask=inside, other=None if inside is None else jnp.zeros((), ref.dtype)).astype(f32)

        def part(first):
            x = read(y, first, row)
            return x * (plgpu.load(factors[0].at[row]) * read(factors[1], first)) if factors else x

        x = part(0) if gate is None else activate(part(0), gate) * part(size)
        x, by_row = rounded(x.astype(bf16).astype(f32), kind, bool(interpret))
        plgpu.store(q.at[row, pl.ds(0, size) if inside is None else lane], x, mask=inside)
        plgpu.store(amount.at[row], by_row)

    q, amount = pl.pallas_call(
        kernel,
        grid=(rows,),
        out_shape=[jax.ShapeDtypeStruct((rows, size), kind), jax.ShapeDtypeStruct((rows,), f32)],
        compiler_params=plgpu.CompilerParams(num_warps=max(1, min(8, block // 512)), num_stages=1),
        interpret=interpret,
        name="round_gpu",
    )(y, *([] if by is None else [by[0].reshape(-1), by[1].reshape(-1)]))
    return q, amount[:, None]
