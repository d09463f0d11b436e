"""How quantized weights lie in memory, and how a TPU kernel turns them to bfloat16: what quantized_matmul and grouped_matmul share.

A matrix [K, N] is stored as int8, int4 or float8_e4m3fn [K, N], or in MXFP4 (OCP Microscaling Formats 1.0) as uint8 [K / 2, N]: byte
[i, n] holds row 2 * i in its low nibble and row 2 * i + 1 in its high one, and 32 rows share a scale, a power of two, held as bfloat16. A
nibble is E2M1 (sign, two bits of exponent, one of mantissa) with the codes of 0 and 0.5 exchanged, so that every magnitude but 0 is these
three bits in a float.

The compiler's conversion is dear for some types on some chips, and there is none for MXFP4. "words" does it on the int32 words that hold
4 or 8 weights of consecutive rows. A nibble q of an int4 masked into the mantissa of 136 is the bfloat16 136 + q, two at once, and
136 * sum(x) is taken off again. The bits of an fp8, moved apart, are the bfloat16 w * 2**-120 (where |w| < 2**-6, of at most 448, it may
count as 0); x and the sum are multiplied by 2**60 each. Those of an E2M1, with the highest bit of an exponent wherever they are not those
of 0, are 4 * w; x is divided by 4. All this leaves the rows of a tile in another order, which x is brought into beforehand, by a product
with a permutation matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import tpu as pltpu

LANES = 128
MAGIC = 136  # bfloat16 0x4308: its last 4 bits, flipped by those of a signed nibble q, make 136 + q
GROUPS = (32, 64, 128)
MXFP4_GROUP = 32
MXFP4_VALUES = (0.5, 0.0, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the last three bits of a nibble


ANY = 1 << 30
FP8, MXFP4 = "float8_e4m3fn", "mxfp4"
FACTORS = {FP8: 2.0**60, MXFP4: 0.25}  # what x is multiplied by for weights converted by words


class Chip(NamedTuple):
    """What the kernels need to know of a chip."""

    vmem: int  # bytes that a kernel may use
    words: dict[str, int]  # types of weights that are converted by words, up to so many rows (slabs counted): x must be reordered for it
    int8: bool  # int8 x int8 in the matrix unit
    bf16: bool  # bfloat16 arithmetic in the vector unit: scales weights without a float32 between
    after_rows: int  # most rows (slabs counted) at which scales multiply sums


CHIPS = {
    "v4": Chip(14 << 20, {"int4": ANY, "int8": ANY, FP8: ANY}, int8=False, bf16=False, after_rows=512),
    "v5e": Chip(64 << 20, {"int4": 96, FP8: ANY}, int8=True, bf16=False, after_rows=96),
    "v5p": Chip(40 << 20, {"int4": 96, FP8: ANY}, int8=True, bf16=False, after_rows=96),
    "v6e": Chip(64 << 20, {FP8: ANY}, int8=True, bf16=True, after_rows=32),
    "tpu7x": Chip(40 << 20, {}, int8=False, bf16=True, after_rows=32),
}


def packed(dtype: Any) -> int:
    """Rows of a matrix in one row of what is stored in this type."""
    return 2 if dtype == jnp.uint8 else 1


def bits(dtype: Any) -> int:
    """Of one weight stored in this type."""
    return 4 if dtype in (jnp.int4, jnp.uint8) else 8 * jnp.dtype(dtype).itemsize


def bfloat16_parts(x, count: int) -> list[Any]:
    """x as `count` bfloat16 arrays that add up to it: three of a float32 give it exactly."""
    parts, rest = [], x
    for _ in range(count - 1):
        # Not a conversion there and back: XLA may take that for nothing.
        parts.append(lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7))
        rest = rest - parts[-1]
    return [part.astype(jnp.bfloat16) for part in (*parts, rest)]


def quantize_mxfp4(w):
    """Rounds w [..., K, N] to (uint8 [..., K / 2, N], bfloat16 [..., K / 32, N]), to the nearest value, halfway to the even code. The
    largest magnitude of a group has the scale that leaves it in 4..8; what is beyond 6 becomes 6 (OCP 1.0, section 6.3)."""
    *rest, inner, columns = w.shape
    grouped = w.astype(jnp.float32).reshape(*rest, inner // MXFP4_GROUP, MXFP4_GROUP, columns)
    _, exponent = jnp.frexp(jnp.abs(grouped).max(axis=-2, keepdims=True))  # of the largest: 2**(exponent - 1) to 2**exponent
    exponent = jnp.clip(exponent - 3, -125, 125)
    scaled = jnp.ldexp(grouped, -exponent).reshape(w.shape)
    size = jnp.minimum(jnp.abs(scaled), 6.0)
    step = jnp.where(size < 2, 0.5, jnp.where(size < 4, 1.0, 2.0))
    size = jnp.round(size / step) * step
    code = sum((size >= value).astype(jnp.uint8) for value in sorted(MXFP4_VALUES)[1:])
    code = jnp.where(code < 2, code ^ 1, code) | jnp.where(scaled < 0, jnp.uint8(8), jnp.uint8(0))
    low, high = code[..., 0::2, :], code[..., 1::2, :]
    return low | high << 4, jnp.ldexp(jnp.float32(1), exponent)[..., 0, :].astype(jnp.bfloat16)


def mxfp4_values(w):
    """float32 [..., K, N] of the nibbles in w uint8 [..., K / 2, N], without their scales; a NumPy array of one."""
    of: Any = np if isinstance(w, np.ndarray) else jnp
    code = of.stack([w & 15, w >> 4], axis=-2).reshape(*w.shape[:-2], 2 * w.shape[-2], w.shape[-1])
    size = of.asarray(MXFP4_VALUES, np.float32)[code & 7]
    return of.where(code < 8, size, -size)


def turned_values(w, group: int):
    """float32 [..., N, K] of weights two to a byte [..., N, K / 2], as quantized_matmul_gpu says, without their scales; NumPy of NumPy."""
    pairs = w.reshape(*w.shape[:-1], w.shape[-1] // group, 1, group)
    if w.dtype == jnp.uint8:
        full = mxfp4_values(pairs)  # of [..., 1, group] bytes [..., 2, group]
    else:
        of: Any = np if isinstance(w, np.ndarray) else jnp
        full = of.concatenate([(pairs << 4) >> 4, pairs >> 4], axis=-2).astype(jnp.float32)
    return full.reshape(*w.shape[:-1], 2 * w.shape[-1])


def values(w):
    """float32 [..., K, N] of stored weights, without their scales."""
    return mxfp4_values(w) if w.dtype == jnp.uint8 else w.astype(jnp.float32)


def reorder(words: str, x):
    """x [..., K], K a multiple of a tile's rows (64 for 4 bits, else 32), in the order that `convert` leaves the rows of weights of type
    `words` in, and multiplied by what it divides them by; "": as it is."""
    if not words:
        return x
    tile = np.arange(64 if words in ("int4", MXFP4) else 32)
    order = tile.reshape(8, 4).T if words == "int8" else tile.reshape(8, 2, -1).transpose(2, 0, 1)
    width = math.gcd(x.shape[-1], LANES)
    move = np.kron(np.eye(width // tile.size), np.eye(tile.size)[:, order.reshape(-1)])
    x = x * FACTORS[words] if words in FACTORS else x
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    moved = jnp.dot(x.reshape(-1, width), jnp.asarray(move, x.dtype), precision=precision, preferred_element_type=jnp.float32)
    return moved.astype(x.dtype).reshape(x.shape)


def convert(words: str, w):
    """Stored weights as bfloat16 [n, columns], exactly. words "": by the compiler. "int8", "int4" (then 136 + w), "float8_e4m3fn" (then
    w * 2**-120) or "mxfp4" (then 4 * w): their type, by words, n a multiple of the 32 (of 4 bits: 64) rows of a tile, which come in the
    order of the words."""
    if not words:
        return w.astype(jnp.bfloat16)
    held = pltpu.bitcast(w, jnp.int32)
    columns, right = w.shape[1], lambda array, by: lax.shift_right_logical(array, jnp.int32(by)) if by else array
    pairs = lambda found: [pltpu.bitcast(pair, jnp.bfloat16).reshape(-1, 16, columns) for pair in found]
    if words == "int4":
        pieces = pairs([(right(held, 4 * i) & jnp.int32(0x000F000F)) ^ jnp.int32(0x43084308) for i in range(4)])
    elif words == MXFP4:
        left = lambda array, by: array << jnp.int32(by) if by > 0 else right(array, -by)
        some = held | left(held, 1) | ~left(held, 2)  # the third bit of each nibble: it is not 0
        high = (held & jnp.int32(-0x77777778)) | (some & jnp.int32(0x44444444))
        part = lambda i: (left(high, 12 - 4 * i) & jnp.int32(-0x3FFF4000)) | (left(held, 6 - 4 * i) & jnp.int32(0x01C001C0))
        pieces = pairs([part(i) for i in range(4)])
    elif words == FP8:
        sign, rest = jnp.int32(0x00800080), jnp.int32(0x007F007F)
        low = ((held & sign) << jnp.int32(8)) | ((held & rest) << jnp.int32(4))
        high = (held & jnp.int32(-0x7FFF8000)) | right(held & (rest << jnp.int32(8)), 4)
        pieces = pairs([low, high])
    else:
        up = [held << jnp.int32(24 - 8 * i) if i < 3 else held for i in range(4)]
        pieces = [(byte >> jnp.int32(24)).astype(jnp.float32).reshape(-1, 8, columns) for byte in up]
    return jnp.stack(pieces, axis=1).reshape(-1, columns).astype(jnp.bfloat16)


def scaled(words: str, w, group: int, row: Callable[[int], Any], kind: Any):
    """Stored weights times the scales of their groups, in type `kind`. row(k): the scales [1, columns] of row k of w, in that type. words:
    "" or "mxfp4", whose result is in the order and has the factor of `convert`."""
    rows = w.shape[0] * packed(w.dtype)
    if words != MXFP4:
        step = min(group, rows)
        return jnp.concatenate([w[k : k + step].astype(kind) * row(k) for k in range(0, rows, step)])
    # Of 64 rows, the first 8 of each 16 in this order are of the first group.
    first = lax.broadcasted_iota(jnp.int32, (16, w.shape[1]), 0) < 8
    wide = lambda k: row(k).astype(jnp.float32)  # there is no selection among bfloat16 by a mask of 16 rows
    tiles = [jnp.where(first, wide(k), wide(k + MXFP4_GROUP)).astype(kind) for k in range(0, rows, 64)]
    pieces = convert(words, w).astype(kind).reshape(-1, 4, 16, w.shape[1])
    return jnp.stack([pieces[i] * tile for i, tile in enumerate(tiles)]).reshape(rows, -1)
