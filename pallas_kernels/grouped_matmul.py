"""Matrix products of rows sorted by group with one matrix a group: the experts of a mixture, each with its own ragged share of tokens.

Rows 0 .. group_sizes[0]-1 of x belong to expert 0, the next group_sizes[1] to expert 1, and so on; out[row] = x[row] @ w[layer, expert of
row]. Rows past the sum of group_sizes come back as zeros, whatever x holds there. Weights of experts without rows are not read.

    x [M, K] bfloat16 or float32   group_sizes int32 [E], sum at most M   layer int32 scalar   out [M, N] of x's dtype
    w [L, E, K, N]: of x's dtype; or int8 or int4 with scale [L, E, N] (a column's) or scale [L, E, K / group, N] (a group's: rows
    i * group .. of a column). The product is with w * scale.   bias [L, E, N], added to the product
    or [L, E, K / 2, N] uint8: MXFP4, with scale [L, E, K / 32, N] (weight_formats.py)
    or turned, as a GPU wants them: [L, E, N, K / 2], two numbers to a byte, int8 (int4) or uint8 (MXFP4), with scales by groups, an even
    number of them (quantized_matmul_gpu.py says in which order)

With an `activation` N is 2 * F, gate columns first, then up, and out [M, F] = act(gate) * up: the wide product stays on the chip.
"silu" and "gelu" (by tanh) are of the gate; "clamped" is gpt-oss's: gate * sigmoid(ALPHA * gate) * (up + 1), gate at most LIMIT, up from
-LIMIT to LIMIT.

The TPU kernel. A grid step is one overlap of an expert with a block of rows, for one block of columns; columns go outermost, so that a
weight is read once however ragged the groups are, and x as often as there are blocks of columns. All of K is in one block, so no sum
outlives a step. Inside a step, rows are multiplied in windows of a few sizes that start at multiples of 16: the matrix unit takes a
small window in the time that it needs to load the weights, so the smallest size that holds what is left is the cheapest. Rows of other
experts in a window keep what they had. The idea of work items over sorted groups: Gale et al., MegaBlocks (arXiv 2211.15841). `takes`
says for which sizes there is a kernel: K and, without an activation, N need not be multiples of a register's lanes; the last block of
columns then lies partly outside of w, and of what is not there nothing is kept.

`impl`: "reference" (plain jnp: the contract, and what a CPU runs), "pallas" (TPU), "interpret" (the kernel, interpreted on a CPU),
"triton" (grouped_matmul_gpu.py, where it fits, else the reference) and "triton-interpret".
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tuning import lookup
from pallas_kernels.weight_formats import (
    CHIPS,
    LANES,
    MAGIC,
    MXFP4,
    MXFP4_GROUP,
    bits,
    convert,
    packed,
    reorder,
    scaled,
    turned_values,
    values,
)

ALIGN = 16  # where windows start: rows of a packed bfloat16 tile
ROWS = 16  # experts whose scales (or biases) of a column come together
REFERENCE_ROWS = 64  # rows of one expert that the reference multiplies at a time
ALPHA, LIMIT = 1.702, 7.0  # gpt-oss
ACTIVATIONS = (None, "silu", "gelu", "clamped")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of the kernel's blocks."""

    block_m: int  # rows of x in VMEM
    block_n: int  # columns of the output, and of w (of gate and of up, each)
    window: int  # most rows of one product


@dataclasses.dataclass(frozen=True)
class Shape:
    """Everything static about one call. Sizes in elements."""

    m: int  # rows, padded to whole tiles
    experts: int
    k: int
    n: int  # columns of the output
    dtype: Any  # of x and of the operands of the product
    weight: Any  # dtype as stored
    group: int  # rows of w with one scale; 0: none, k: a column's
    scale: Any  # dtype, or None
    bias: Any
    activation: str | None
    chip: Any
    turned: bool = False

    @property
    def few(self) -> bool:
        """Whether an expert has few rows, so that the matrix unit has little to do but to load weights."""
        return self.m <= 64 * self.experts

    @property
    def after(self) -> bool:
        """Whether scales multiply sums. Otherwise they multiply weights: products of a group would use the matrix unit badly."""
        return self.group == self.k or self.group % (LANES if self.few else 2 * LANES) == 0

    @property
    def words(self) -> str:
        """The type of weights that are converted by words, as weight_formats.py describes; "": by the compiler."""
        if self.weight == jnp.uint8:
            return MXFP4
        by_words = self.group and self.after and self.few and self.dtype == jnp.bfloat16
        return self.weight.name if by_words and self.weight.name in CHIPS[self.chip].words else ""

    @property
    def halves(self) -> int:
        return 1 if self.activation is None else 2

    @property
    def ragged(self) -> bool:
        """Whether the last block of columns may be partly outside."""
        return self.n % LANES > 0


def grouped_matmul(
    x,
    w,
    group_sizes,
    *,
    layer: Any = 0,
    scale=None,
    bias=None,
    activation: str | None = None,
    turned: bool = False,
    chip: str | None = None,
    blocks: Blocks | None = None,
    impl: str = "reference",
):
    """Products of sorted rows with their experts' matrices: see the module. turned: how w lies. chip: v4, v5e, v5p, v6e or tpu7x, for which
    the kernel is compiled (the reference needs none). blocks: of the kernel; None: what tuned.toml has, else default_blocks. Returns
    [M, N], or with an activation [M, N / 2]. A layer out of range is undefined. Raises ValueError for shapes, types and blocks that cannot
    work."""
    shape = check(x, w, group_sizes, scale, bias, activation, chip, turned=turned)
    if impl in ("triton", "triton-interpret"):
        from pallas_kernels.grouped_matmul_gpu import fits, grouped_matmul_gpu

        if fits(x, w, scale, turned):
            more: dict[str, Any] = dict(layer=layer, scale=scale, bias=bias, activation=activation, turned=turned)
            more |= dict(interpret=impl != "triton")
            return grouped_matmul_gpu(x, w, group_sizes, **more)
        impl = "reference"
    if impl == "reference":
        return grouped_matmul_reference(shape, x, w, group_sizes, layer, scale, bias)
    if impl not in ("pallas", "interpret"):
        raise ValueError(f"impl={impl!r}: legal: reference, pallas, interpret, triton, triton-interpret")
    if turned:
        raise ValueError(f"turned=True with impl={impl!r}: legal: reference, triton, triton-interpret")
    if chip not in CHIPS:
        raise ValueError(f"chip={chip!r}: must be one of {', '.join(CHIPS)}")
    blocks = blocks or tuned_blocks(shape) or default_blocks(shape)
    check_blocks(shape, blocks)
    mode: Any = pltpu.InterpretParams() if impl == "interpret" else False
    return grouped_matmul_tpu(shape, blocks, x, w, group_sizes, layer, scale, bias, interpret=mode)


def grouped_matmul_reference(shape: Shape, x, w, group_sizes, layer, scale, bias):
    """The contract in plain jnp. Windows of rows one after the other, as many as the groups have: an expert without rows costs nothing.
    (lax.ragged_dot takes two to three times as long on a CPU: it multiplies all rows with each expert's matrix.)"""
    size = min(REFERENCE_ROWS, x.shape[0])
    ends = jnp.cumsum(group_sizes)
    windows = jnp.cumsum((group_sizes + size - 1) // size)
    padded = jnp.pad(x, ((0, size), (0, 0)))

    def step(carry):
        i, out = carry
        e = jnp.searchsorted(windows, i, side="right")
        count = group_sizes[e]
        offset = (i - windows[e] + (count + size - 1) // size) * size
        start = ends[e] - count + offset
        part = lambda array: None if array is None else array[layer, e]
        found = _reference_rows(shape, lax.dynamic_slice_in_dim(padded, start, size), part(w), part(scale), part(bias))
        mine = (offset + jnp.arange(size) < count)[:, None]
        old = lax.dynamic_slice_in_dim(out, start, size)
        return i + 1, lax.dynamic_update_slice_in_dim(out, jnp.where(mine, found, old), start, axis=0)

    out = jnp.zeros((x.shape[0] + size, shape.n), x.dtype)
    return lax.while_loop(lambda carry: carry[0] < windows[-1], step, (jnp.int32(0), out))[1][: x.shape[0]]


def _reference_rows(shape: Shape, x, w, scale, bias):
    """x [rows, K] with the matrix of one expert."""
    if scale is not None:
        w = turned_values(w, shape.group).T if shape.turned else values(w)
        w = w * jnp.repeat(scale.reshape(-1, w.shape[1]).astype(jnp.float32), shape.group, axis=0)
    product = jnp.dot(x, w.astype(x.dtype), precision=_precision(x.dtype), preferred_element_type=jnp.float32)
    product = product if bias is None else product + bias.astype(jnp.float32)
    return activate(shape.activation, *jnp.split(product, shape.halves, axis=1)).astype(x.dtype)


def activate(activation: str | None, gate, up=None):
    """act(gate) * up in float32, as the module says; gate itself without an activation."""
    if activation is None:
        return gate
    assert up is not None
    if activation == "silu":
        return gate * jax.nn.sigmoid(gate) * up
    if activation == "gelu":
        return jax.nn.gelu(gate, approximate=True) * up
    gate, up = jnp.minimum(gate, LIMIT), jnp.clip(up, -LIMIT, LIMIT)
    return gate * jax.nn.sigmoid(ALPHA * gate) * (up + 1)


def _precision(dtype):
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def check(x, w, group_sizes, scale=None, bias=None, activation=None, chip=None, *, turned=False) -> Shape:
    """Static checks of all bodies. Raises ValueError that names what is wrong and what would be legal."""
    if turned:
        if x.ndim != 2 or w.ndim != 4 or w.shape[3] * 2 != x.shape[1] or w.dtype not in (jnp.int8, jnp.uint8):
            raise ValueError(f"x {x.shape} and turned w {w.dtype} {w.shape}: need [M, K] and int8 or uint8 [L, E, N, K / 2], the same K")
        if scale is None or scale.ndim != 4 or scale.shape[2] % 2:
            have = "no scale" if scale is None else f"scale {scale.shape}"
            raise ValueError(f"{have} of turned w: must be [{w.shape[0]}, {w.shape[1]}, K / group, {w.shape[2]}], an even number of groups")
    elif x.ndim != 2 or w.ndim != 4 or w.shape[2] * packed(w.dtype) != x.shape[1]:
        raise ValueError(f"x {x.shape} and w {w.dtype} {w.shape}: need [M, K] and [L, E, K, N] (uint8: [L, E, K / 2, N]) with the same K")
    layers, experts, k, n = *w.shape[:2], x.shape[1], w.shape[2 if turned else 3]
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"x has dtype {x.dtype}: must be bfloat16 or float32")
    if group_sizes.shape != (experts,) or group_sizes.dtype != jnp.int32:
        raise ValueError(f"group_sizes is {group_sizes.dtype} {group_sizes.shape}: must be int32 [{experts}], a size for each expert of w")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: legal: {', '.join(map(str, ACTIVATIONS))}")
    if activation is not None and n % 2:
        raise ValueError(f"w has N={n} columns: must be even with an activation, half of them gate and half up")
    if scale is None and w.dtype != x.dtype:
        raise ValueError(f"w has dtype {w.dtype} and no scale: must be {x.dtype}, as x, or int8, int4 or uint8 (MXFP4) with a scale")
    if scale is not None and w.dtype not in (jnp.int8, jnp.int4, jnp.uint8):
        raise ValueError(f"w has dtype {w.dtype} and a scale: must be int8, int4 or uint8 (MXFP4)")
    group = 0
    if scale is not None:
        group = k if scale.ndim == 3 else k // max(scale.shape[2], 1) if scale.ndim == 4 else 0
        if scale.shape not in ((layers, experts, n), (layers, experts, k // max(group, 1), n)) or not group or k % group:
            raise ValueError(
                f"scale has shape {scale.shape}: must be [{layers}, {experts}, {n}] or [{layers}, {experts}, {k} / group, {n}]"
            )
    if scale is not None and w.dtype == jnp.uint8 and group != MXFP4_GROUP:
        raise ValueError(f"scale {scale.shape} of MXFP4: must be {(layers, experts, k // MXFP4_GROUP, n)}")
    if bias is not None and bias.shape != (layers, experts, n):
        raise ValueError(f"bias has shape {bias.shape}: must be [{layers}, {experts}, {n}]")
    rows, columns = pl.cdiv(x.shape[0], ALIGN) * ALIGN, n if activation is None else n // 2
    of = lambda array: None if array is None else jnp.dtype(array.dtype)
    return Shape(rows, experts, k, columns, of(x), of(w), group, of(scale), of(bias), activation, chip, turned)


def takes(inner: int, columns: int, weight: Any, activation: str | None = None) -> bool:
    """Whether the TPU kernel takes K and output columns of these sizes, of weights that are stored in this type: whole tiles of rows, and
    whole ones of columns where the halves of an activation lie side by side."""
    rows = 64 if bits(weight) == 4 else 32
    return inner % rows == 0 and inner >= LANES <= columns and (activation is None or columns % LANES == 0)


def check_blocks(shape: Shape, blocks: Blocks) -> None:
    """What only the kernel asks for. Raises ValueError."""
    if not takes(shape.k, shape.n, shape.weight, shape.activation):
        rule = "K must be a multiple of 32, 64 for 4 bits; columns with an activation a multiple of 128; both 128 at least"
        raise ValueError(f"K={shape.k}, output columns {shape.n}: {rule}")
    if shape.group not in (0, 32, 64, shape.k) and shape.group % LANES:
        raise ValueError(f"scales for groups of {shape.group} rows: the kernel takes 32, 64, multiples of {LANES}, and all {shape.k}")
    if blocks.block_n % LANES or (shape.n % blocks.block_n and not shape.ragged):
        raise ValueError(f"block_n={blocks.block_n}: must be a multiple of {LANES} that divides the {shape.n} output columns")
    if blocks.window < ALIGN or blocks.window & (blocks.window - 1):
        raise ValueError(f"window={blocks.window}: must be a power of two, {ALIGN} at least")
    if blocks.block_m % ALIGN or not ALIGN <= blocks.block_m <= shape.m:
        raise ValueError(f"block_m={blocks.block_m}: must be a multiple of {ALIGN} from {ALIGN} to {shape.m}, the rows of x")
    need, have = vmem_bytes(shape, blocks), CHIPS[shape.chip].vmem
    if need > have:
        raise ValueError(f"{blocks}: need {need} bytes of VMEM, {shape.chip} has {have} for them: lower block_n (weights) or block_m (x)")


def vmem_bytes(shape: Shape, blocks: Blocks) -> int:
    """VMEM that the kernel takes, with room for the sums of a window and for weights turned to x's type."""
    size, m, n = shape.dtype.itemsize, blocks.block_m, blocks.block_n
    columns = shape.halves * n
    x = m * pl.cdiv(shape.k, LANES) * LANES * size * (1 if m == shape.m else 2)
    weights = 2 * columns * shape.k * bits(shape.weight) // 8
    small = 2 * columns * 4 * (ROWS + (0 if not shape.group else max(shape.k // shape.group, ROWS)))
    unpacked = 4 * 256 * columns * 4 if shape.group else 0
    return x + weights + small + unpacked + 2 * m * n * size + 2 * blocks.window * columns * 4


def tuned_blocks(shape: Shape) -> Blocks | None:
    """What tuned.toml has, if anything, for as many rows of x or the next power of two. columns: of the output; bits: of a weight."""
    rows = 1 << (shape.m - 1).bit_length()
    about: dict[str, Any] = dict(
        experts=shape.experts, inner=shape.k, columns=shape.n, rows=rows, halves=shape.halves, bits=bits(shape.weight)
    )
    found: Any = lookup("grouped_matmul", shape.chip, **about)
    return None if found is None else Blocks(min(found["block_m"], shape.m), found["block_n"], found["window"])


def default_blocks(shape: Shape) -> Blocks:
    """Sizes for what was not tuned: x as a whole if it is small, since it is read again for each block of columns; then as many columns as
    fit, so that these blocks are few."""
    window, have = 128 if shape.m <= 64 * shape.experts else 256, CHIPS[shape.chip].vmem
    most = max(have // 3 // (shape.k * shape.dtype.itemsize), 2 * ALIGN)
    block_m = shape.m if shape.m <= min(most, 1024) else min(1 << (most // 2).bit_length() - 1, 2048)
    if shape.ragged:
        full = pl.cdiv(shape.n, LANES)
        widths = [pl.cdiv(full, count) * LANES for count in range(1, full)]
    else:
        widths = [width for width in range(shape.n, LANES, -LANES) if shape.n % width == 0 and width % LANES == 0]
    fits = (Blocks(block_m, width, window) for width in widths)
    return next((blocks for blocks in fits if vmem_bytes(shape, blocks) <= have), Blocks(block_m, LANES, window))


def work_items(shape: Shape, block_m: int, layer, group_sizes):
    """The kernel's scalars: (meta, bounds, item_group, item_block). Rows of nobody are a last group, number E, so that its zeros are
    written. Items are the overlaps of groups with blocks of rows, in order; dense comparisons: no sort, no scatter.

    meta int32 [3]: layer, items, last expert with rows   bounds int32 [E + 2]: first row of each group, and the end"""
    experts, blocks = shape.experts, pl.cdiv(shape.m, block_m)
    size = min(experts, shape.m) + blocks
    ends = jnp.minimum(jnp.cumsum(jnp.maximum(group_sizes, 0), dtype=jnp.int32), shape.m)
    bounds = jnp.concatenate([jnp.zeros(1, jnp.int32), ends, jnp.full(1, shape.m, jnp.int32)])
    start, end = bounds[:-1], bounds[1:]
    first = start // block_m
    count = jnp.where(end > start, (end - 1) // block_m - first + 1, 0)
    before = jnp.cumsum(count, dtype=jnp.int32) - count
    total = jnp.sum(count, dtype=jnp.int32)
    group = jnp.arange(experts + 1, dtype=jnp.int32)
    last = jnp.max(jnp.where(end > start, group, 0)[:-1])
    n = jnp.minimum(jnp.arange(size, dtype=jnp.int32), total - 1)[:, None]
    hit = (n >= before) & (n < before + count)
    pick = lambda x: jnp.sum(jnp.where(hit, x, 0), axis=1, dtype=jnp.int32)
    return jnp.stack([jnp.asarray(layer, jnp.int32), total, last]), bounds, pick(group), pick(first - before + n)


def _product(shape: Shape, x, w_ref, scale_ref, e):
    """x [rows, K] with one block of weights [K, n], in float32."""
    dot = functools.partial(jnp.dot, precision=_precision(shape.dtype), preferred_element_type=jnp.float32)
    if not shape.group:
        return dot(x, w_ref[0, 0])
    by_column = shape.group == shape.k
    row = lambda k, kind: scale_ref[0, 0, k // shape.group][None].astype(kind)
    depth = math.gcd(shape.group, 256) if shape.after and not by_column else 256  # few weights at a time lie converted in VMEM
    kind, pack = shape.dtype if CHIPS[shape.chip].bf16 else jnp.float32, packed(shape.weight)
    total: Any = 0
    for at in range(0, shape.k, depth):
        end = min(at + depth, shape.k)
        if shape.after:
            part = dot(x[:, at:end], _converted(shape, w_ref[0, 0, at:end]))
            if shape.words == "int4":
                part -= MAGIC * jnp.sum(x[:, at:end].astype(jnp.float32), axis=1, keepdims=True)
            total += part if by_column else part * row(at, jnp.float32)
        else:
            held = w_ref[0, 0, at // pack : end // pack]
            right = scaled(shape.words, held, shape.group, lambda k, at=at: row(at + k, kind), kind)
            total += dot(x[:, at:end], right.astype(shape.dtype))
    return total * _row_of(scale_ref, e) if by_column else total


def _converted(shape: Shape, w):
    """Weights [depth, n] in x's type."""
    return convert(shape.words, w) if shape.words else w.astype(shape.dtype)


def _row_of(ref, e):
    """Row [1, n] of expert e in a block [1, ROWS, n], by comparison: packed rows cannot be addressed."""
    rows = ref[0].astype(jnp.float32)
    return jnp.sum(jnp.where(lax.broadcasted_iota(jnp.int32, rows.shape, 0) == e % ROWS, rows, 0.0), axis=0, keepdims=True)


def _kernel(meta, bounds, item_group, item_block, x_ref, *refs, shape: Shape, blocks: Blocks):
    """One work item and block of columns. refs: for gate (and up) w, scale and bias as there are, then the output."""
    i, out_ref = pl.program_id(1), refs[-1]
    parts = [list(refs[h * (len(refs) // shape.halves) : (h + 1) * (len(refs) // shape.halves)]) for h in range(shape.halves)]
    group, block = item_group[i], item_block[i]
    low = jnp.maximum(bounds[group] - block * blocks.block_m, 0)
    high = jnp.minimum(bounds[group + 1] - block * blocks.block_m, blocks.block_m)
    first = low // ALIGN * ALIGN
    live = (i < meta[1]) & (group < shape.experts)

    def columns(x, half):
        refs = list(parts[half])
        w_ref = refs.pop(0)
        product = _product(shape, x, w_ref, refs.pop(0) if shape.group else None, group)
        return product + _row_of(refs.pop(0), group) if shape.bias is not None else product

    def window(size, at):
        start = pl.multiple_of(jnp.minimum(at, blocks.block_m - size), ALIGN)
        rows = pl.ds(start, size)
        found = activate(shape.activation, *(columns(x_ref[rows, :], half) for half in range(shape.halves)))
        row = start + lax.broadcasted_iota(jnp.int32, found.shape, 0)
        kept = out_ref[rows, :].astype(jnp.float32)
        out_ref[rows, :] = jnp.where((row >= low) & (row < high), found, kept).astype(out_ref.dtype)

    @pl.when((i < meta[1]) & ((i == 0) | (item_block[jnp.maximum(i - 1, 0)] != block)))
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    most = min(blocks.window, 1 << blocks.block_m.bit_length() - 1)
    sizes = [most >> shift for shift in (0, 1, 2, 4) if most >> shift >= ALIGN]
    whole = (high - first) // most

    @pl.when(live)
    def _():
        lax.fori_loop(0, whole, lambda n, _: window(most, first + n * most), None)
        left = high - first - whole * most
        for size, smaller in zip(sizes, [*sizes[1:], 0]):
            pl.when((left > smaller) & (left <= size))(functools.partial(window, size, first + whole * most))


def _cost(shape: Shape) -> pl.CostEstimate:
    """For XLA's scheduler, which cannot know the group sizes: as if rows were spread evenly."""
    weights = shape.halves * shape.k * shape.n * min(shape.m, shape.experts) * bits(shape.weight) // 8
    rows = shape.m * (shape.k + shape.n) * shape.dtype.itemsize
    flops = 2 * shape.m * shape.k * shape.n * shape.halves
    return pl.CostEstimate(flops=flops, bytes_accessed=weights + rows, transcendentals=(shape.halves - 1) * shape.m * shape.n)


def grouped_matmul_tpu(shape: Shape, blocks: Blocks, x, w, group_sizes, layer, scale, bias, *, interpret: Any = False):
    """The kernel's call. See grouped_matmul; shape, blocks: checked. interpret: False or a pltpu.InterpretParams."""
    scalars = work_items(shape, blocks.block_m, layer, group_sizes)
    padded = jnp.pad(reorder(shape.words, x), ((0, shape.m - x.shape[0]), (0, 0)))
    expert = lambda i, meta, item_group: jnp.minimum(item_group[i], meta[2])  # rows of nobody ask for no other weights
    tiles = pl.cdiv(shape.n, blocks.block_n)
    rows = min(ROWS, shape.experts)
    # Nor are blocks read in which all rows are of nobody.
    block = lambda i, bounds, item_block: jnp.minimum(item_block[i], jnp.maximum(bounds[shape.experts] - 1, 0) // blocks.block_m)
    in_specs = [
        pl.BlockSpec(memory_space=pltpu.VMEM)
        if blocks.block_m == shape.m
        else pl.BlockSpec(
            (blocks.block_m, shape.k),
            lambda n, i, meta, bounds, item_group, item_block: (block(i, bounds, item_block), 0),
        )
    ]
    operands = [padded]

    def add(array, block, index):
        in_specs.append(pl.BlockSpec(block, index))
        operands.append(array)

    for half in range(shape.halves):
        at = half * tiles
        whole = lambda n, i, meta, bounds, item_group, item_block, at=at: (meta[0], expert(i, meta, item_group), 0, at + n)
        several = lambda n, i, meta, bounds, item_group, item_block, at=at: (meta[0], expert(i, meta, item_group) // rows, at + n)
        add(w, (1, 1, w.shape[2], blocks.block_n), whole)
        if scale is not None and scale.ndim == 4:
            add(scale, (1, 1, scale.shape[2], blocks.block_n), whole)
        elif scale is not None:
            add(scale, (1, rows, blocks.block_n), several)
        if bias is not None:
            add(bias, (1, rows, blocks.block_n), several)
    out = pl.pallas_call(
        functools.partial(_kernel, shape=shape, blocks=blocks),
        out_shape=jax.ShapeDtypeStruct((shape.m, shape.n), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(tiles, scalars[2].shape[0]),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((blocks.block_m, blocks.block_n), lambda n, i, meta, bounds, item_group, item_block: (item_block[i], n)),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=max(vmem_bytes(shape, blocks) * 9 // 8, 14 << 20),
        ),
        cost_estimate=_cost(shape),
        interpret=interpret,
        name="grouped_matmul",
    )(*scalars, *operands)
    return out[: x.shape[0]]
