"""x times quantized weights of one layer out of a stack: int8, int4, fp8 or MXFP4, scaled by output channel or by groups of inputs.

    x [M, K] bfloat16 or float32   w [L, K, N] int8, int4 or float8_e4m3fn, or [L, K / 2, N] uint8 (MXFP4)   layer int32 scalar
    scale float32 or bfloat16 [L, N] or [L, 1, N]: w = q * scale (of [L, N] the kernel must fetch a tile, 8 or 16 layers, at a time)
                           or [L, K / group, N] with group 32, 64 or 128 (MXFP4: 32): w = q * scale (+ minimum, of scale's shape)

weight_formats.py says how they are stored. The weights stay whole in HBM and the kernel picks its layer by scalar prefetch, so a scan
over layers copies nothing. A block of weights is converted to bfloat16 on its way into the matrix unit; all these types are exact there,
so scales multiply sums:

  channel   the sum over all of K, once;
  after     the sum over 128 of K, group by group. Groups smaller than 128 get copies of x ("slabs") that are zero outside of the group:
            at few rows the matrix unit, which is loaded with 128 rows of weights anyway, has nothing else to do;
  before    the weights themselves, which are then rounded to bfloat16: cheaper from some number of rows on.

A float32 x is cut into three bfloat16 parts, slabs too, whose products add up to float32 precision ("channel" and "after").

With quantize_x (weights int8, by channel) x is rounded to int8 too, each row by its largest magnitude; int8 x int8 sums in int32, and where
the chip has no such product both are widened to bfloat16. Dettmers et al., arXiv 2208.07339, section 2 (vector-wise quantization).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import kv_scales
from pallas_kernels.tuning import lookup
from pallas_kernels.weight_formats import (
    CHIPS,
    FP8,
    GROUPS,
    LANES,
    MAGIC,
    MXFP4,
    MXFP4_GROUP,
    bfloat16_parts,
    bits,
    convert,
    packed,
    reorder,
    scaled,
    values,
)


class Blocks(NamedTuple):
    rows: int  # of x
    inner: int  # of K
    columns: int  # of N


def quantize_rows(x, kind=jnp.int8):
    """Rounds each row of x [M, K] by its largest magnitude: (int8 or float8_e4m3fn [M, K], float32 [M, 1]), x = q * scale."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(axis=1, keepdims=True), 1e-30) / kv_scales.largest(kind)
    return kv_scales.rounded(kind, x / scale).astype(kind), scale


def quantized_matmul(
    x,
    w,
    scale,
    *,
    layer,
    minimum=None,
    quantize_x=False,
    chip: str | None = None,
    blocks: tuple[int, int, int] | None = None,
    impl="reference",
):
    """x [M, K] times layer `layer` of w, in x's dtype, summed in float32 (quantize_x: int32). See the module for shapes.

    chip: v4, v5e, v5p, v6e or tpu7x, for which the kernel is compiled (the reference needs none).
    blocks: (rows, inner, columns) of the kernel; None: what tuned.toml has for the chip and shape, else default_blocks.
    impl: reference (plain jnp), pallas (TPU), interpret (the kernel on a CPU). A layer out of range is undefined.
    Raises ValueError for shapes, types and blocks that cannot work."""
    check(x, w, scale, minimum, quantize_x)
    if impl == "reference":
        return quantized_matmul_reference(x, w, scale, layer=layer, minimum=minimum, quantize_x=quantize_x)
    if impl not in ("pallas", "interpret"):
        raise ValueError(f"impl={impl!r}: legal: reference, pallas, interpret")
    mode: Any = pltpu.InterpretParams() if impl == "interpret" else False
    return quantized_matmul_tpu(x, w, scale, minimum, layer, quantize_x=quantize_x, chip=chip, blocks=blocks, interpret=mode)


def quantized_matmul_reference(x, w, scale, *, layer, minimum=None, quantize_x=False):
    """The contract in plain jnp."""
    pick = lambda a: lax.dynamic_index_in_dim(a, layer, 0, keepdims=False)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dot = functools.partial(jnp.dot, precision=precision, preferred_element_type=jnp.float32)
    q, s = pick(w), pick(scale).astype(jnp.float32)
    if quantize_x:
        whole, amount = quantize_rows(x)
        return (jnp.dot(whole, q, preferred_element_type=jnp.int32).astype(jnp.float32) * amount * s).astype(x.dtype)
    if not by_group(scale):
        return (dot(x, (values(q) if q.dtype == jnp.uint8 else q).astype(x.dtype)) * s).astype(x.dtype)
    full = values(q).reshape(s.shape[0], -1, s.shape[1]) * s[:, None]
    if minimum is not None:
        full = full + pick(minimum).astype(jnp.float32)[:, None]
    return dot(x, full.reshape(-1, s.shape[1]).astype(x.dtype)).astype(x.dtype)


def check(x, w, scale, minimum, quantize_x):
    """Static checks shared by all bodies. Raises ValueError."""
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1] * packed(w.dtype) or 0 in x.shape:
        raise ValueError(
            f"x {x.shape}, w {w.dtype} {w.shape}: must be [M, K] and [L, K, N] (uint8: [L, K / 2, N]), K the same, M at least 1"
        )
    layers, inner, columns = w.shape[0], x.shape[1], w.shape[2]
    if inner % LANES or not inner:
        raise ValueError(f"K={inner} of w {w.shape}: must be a multiple of {LANES}")
    if columns < LANES:
        raise ValueError(f"N={columns} of w {w.shape}: must be {LANES} at least")
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"x has dtype {x.dtype}: must be bfloat16 or float32")
    if w.dtype not in (jnp.int8, jnp.int4, jnp.float8_e4m3fn, jnp.uint8):
        raise ValueError(f"w has dtype {w.dtype}: must be int8, int4, float8_e4m3fn or uint8 (MXFP4)")
    grouped = [(layers, inner // group, columns) for group in GROUPS]
    if w.dtype == jnp.uint8 and (scale.shape != grouped[GROUPS.index(MXFP4_GROUP)] or minimum is not None):
        raise ValueError(f"scale {scale.shape} of MXFP4: must be {grouped[GROUPS.index(MXFP4_GROUP)]}, without a minimum")
    if scale.shape not in ((layers, columns), (layers, 1, columns), *grouped):
        raise ValueError(
            f"scale {scale.shape}: must be {(layers, columns)}, {(layers, 1, columns)} or, for groups of {GROUPS}, of {grouped}"
        )
    for name, array in (("scale", scale), ("minimum", minimum)):
        if array is not None and array.dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"{name} has dtype {array.dtype}: must be float32 or bfloat16")
    if minimum is not None and (minimum.shape != scale.shape or not by_group(scale)):
        raise ValueError(f"minimum {minimum.shape}: must have the shape of scale {scale.shape}, and that by groups")
    if quantize_x and (w.dtype != jnp.int8 or by_group(scale)):
        raise ValueError(f"quantize_x with w of {w.dtype} and scale {scale.shape}: needs int8 and a scale by channel")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one kernel. Sizes in elements."""

    blocks: Blocks
    group: int  # of K, under one scale; 0: by channel
    before: bool  # scales multiply weights
    words: str  # type of the weights, if they are converted by words
    parts: int  # bfloat16 parts of a value of x
    bf16: bool  # weights are scaled in bfloat16
    native: bool  # int8 x int8

    @property
    def slabs(self) -> int:
        """Copies of x below each other: for each part, one for each group in 128 of K."""
        return self.parts * (LANES // self.group if self.group and not self.before else 1)

    @property
    def slab_rows(self) -> int:
        return self.blocks.rows if self.slabs == 1 else pl.cdiv(self.blocks.rows, 8) * 8

    @property
    def depth(self) -> int:
        """Rows of weights that one product takes: a group that is summed by itself is in 128; otherwise what fills the matrix unit."""
        return LANES if (self.group and not self.before) or self.blocks.inner % 256 else 256

    @property
    def accumulator(self):
        return jnp.int32 if self.native else jnp.float32


def make_plan(x, w, scale, quantize_x, chip: str | None, blocks: tuple[int, int, int] | None) -> Plan:
    if chip not in CHIPS:
        raise ValueError(f"chip={chip!r}: must be one of {', '.join(CHIPS)}")
    about, rows, inner = CHIPS[chip], *x.shape
    group = inner // scale.shape[1] if by_group(scale) else 0
    parts = 3 if x.dtype == jnp.float32 and not quantize_x else 1
    slabs = parts * (LANES // group if group else 1)
    before = bool(group) and parts == 1 and rows * slabs > about.after_rows
    native = quantize_x and about.int8
    kind = MXFP4 if w.dtype == jnp.uint8 else w.dtype.name
    words = not native and not before and rows * slabs <= about.words.get(kind, 0)
    # To float32 it matters that subnormal fp8 would count as 0, and what the 136 of an int4 leaves when it is taken off again.
    words = words and not (kind in (FP8, "int4") and parts > 1)
    words = words or kind == MXFP4
    tile = group * _tile_rows(scale)
    size = bits(w.dtype)
    chosen = Blocks(*blocks) if blocks else _tuned_blocks(chip, rows, inner, w.shape[2], size, group, tile) if parts == 1 else None
    chosen = chosen or default_blocks(rows, inner, w.shape[2], size, tile, 1 if before else slabs, chip)
    return Plan(chosen, group, before, kind if words else "", parts, about.bf16, native)


def _tuned_blocks(chip: str, rows: int, inner: int, columns: int, bits: int, group: int, tile: int) -> Blocks | None:
    """What tuned.toml has for as many rows or the next power of two, 8 at least; None for nothing, or for what cuts tiles of scales."""
    known = max(8, 1 << (rows - 1).bit_length())
    found = lookup("quantized_matmul", chip, rows=known, inner=inner, columns=columns, bits=bits, group=group)
    if found is None or (tile and found["inner"] % tile and found["inner"] != inner):
        return None
    return Blocks(min(found["rows"], rows), found["inner"], found["columns"])


def by_group(scale) -> bool:
    return scale.ndim == 3 and scale.shape[1] > 1


def _tile_rows(scale) -> int:
    """Rows of a tile of scales, which come whole."""
    return 8 if scale.dtype == jnp.float32 else 16


def default_blocks(rows: int, inner: int, columns: int, bits: int, tile: int, slabs: int, chip: str) -> Blocks:
    """Blocks of 2 MB of weights for few rows, and of 512 K weights for many, since a block's program is written out; x stays in VMEM with
    all of its K. tile: rows of weights under one tile of scales (0: scales by channel)."""
    held = CHIPS[chip].vmem // (4 * inner * slabs)  # rows of x in half of the VMEM, if they are fetched once
    block_rows = rows
    if rows > min(512 // slabs, held):
        most = max(16, min(512 // slabs, held // 2) // 16 * 16)
        block_rows = -(-rows // pl.cdiv(rows, most) // 16) * 16
    few = min(1 << (22 if bits == 4 else 21), 1 << (CHIPS[chip].vmem // 8).bit_length() - 1)
    size, width = (few, 1024) if block_rows * slabs <= 128 else (1 << 19, 512)
    unit, columns = max(LANES, tile), pl.cdiv(columns, LANES) * LANES
    wide = lambda n: max(LANES, min(width, columns, size // n // LANES * LANES))
    legal = [n for n in (*range(unit, inner, unit), inner) if inner % n == 0]
    block_inner = max(legal, key=lambda n: (min(n * wide(n), size), wide(n)))
    most = wide(block_inner)
    even = [n for n in range(most, most // 2, -LANES) if columns % n == 0]
    return Blocks(block_rows, block_inner, even[0] if even else most)


def vmem_bytes(plan: Plan, x, w, scale, minimum) -> int:
    """VMEM that the kernel asks for, with room for converted weights and spilled sums."""
    rows, inner, columns = plan.blocks
    size = 1 if plan.native else 2
    held = (1 if rows == x.shape[0] else 2) * plan.slabs * plan.slab_rows * x.shape[1] * size
    weights = 2 * inner * columns * bits(w.dtype) // 8
    scales = 2 * columns * (8 if not plan.group else inner // plan.group) * scale.dtype.itemsize
    least = 0 if minimum is None else 2 * (x.shape[1] // plan.group) * (columns * minimum.dtype.itemsize + rows * 4)
    sums = columns * (rows * 2 * x.dtype.itemsize + 4 * plan.slab_rows + 8 * plan.slabs * plan.slab_rows)
    spilled = inner * columns // 2 if plan.before and not plan.bf16 else 4 * plan.depth * columns
    return held + weights + scales + least + sums + spilled + 2 * rows * LANES * 4


def check_blocks(plan: Plan, x, w, scale, minimum, chip: str) -> int:
    """Raises ValueError for blocks that cannot work; returns the VMEM they need."""
    rows, inner, columns = plan.blocks
    total_rows, total, total_columns = *x.shape, w.shape[2]
    if rows != total_rows and (rows % 16 or not 0 < rows < total_rows):
        raise ValueError(f"block rows={rows}: must be all {total_rows} of x, or fewer, a multiple of 16")
    if inner <= 0 or total % inner or inner % LANES:
        raise ValueError(f"block inner={inner}: must be a multiple of {LANES} that divides K={total}")
    tile = plan.group * _tile_rows(scale)
    if tile and inner != total and inner % tile:
        raise ValueError(f"block inner={inner}: must be K={total} or a multiple of {tile}, {tile // plan.group} groups of {plan.group}")
    if not 0 < columns < total_columns + LANES or columns % LANES:
        raise ValueError(f"block columns={columns}: must be a multiple of {LANES} up to N={total_columns}, or the first from there")
    need, have = vmem_bytes(plan, x, w, scale, minimum), CHIPS[chip].vmem
    if need > have:
        raise ValueError(f"blocks {tuple(plan.blocks)} need {need} bytes of VMEM, {chip} has {have} for them: lower rows, inner or columns")
    return need


def _arrange(plan: Plan, x):
    """x as the kernel wants it, [row blocks * slabs * slab_rows, K] bfloat16: in parts, in slabs, K in the order of the words."""
    parts = bfloat16_parts(x, plan.parts)
    if plan.slabs == 1:
        return reorder(plan.words, parts[0])
    each, blocks = plan.slabs // plan.parts, pl.cdiv(x.shape[0], plan.blocks.rows)
    number = jnp.arange(x.shape[1]) % LANES // (LANES // each)  # of the group in its 128
    slabs = jnp.stack([jnp.where(number == j, part, 0) for part in parts for j in range(each)])
    padded = jnp.pad(reorder(plan.words, slabs), ((0, 0), (0, blocks * plan.slab_rows - x.shape[0]), (0, 0)))
    return padded.reshape(plan.slabs, blocks, plan.slab_rows, -1).swapaxes(0, 1).reshape(-1, x.shape[1])


def _scale_row(scale, i: int, kind):
    """Row i of scale [1, groups, columns] as [1, columns], out of its tile: a row read alone takes twice the work to spread over a tile."""
    first = i // _tile_rows(scale) * _tile_rows(scale)
    tile = scale[0, first : min(first + _tile_rows(scale), scale.shape[1]), :]
    return tile[i - first : i - first + 1].astype(kind)


def _scaled(plan: Plan, w, scale, first: int):
    """Weights times their rows of scales, from row `first`, as bfloat16 [n, columns]."""
    kind = jnp.bfloat16 if plan.bf16 else jnp.float32
    row = lambda k: _scale_row(scale, first + k // plan.group, kind)
    return scaled(plan.words, w, plan.group, row, kind).astype(jnp.bfloat16)


def _product(plan: Plan, x, w, scale, base):
    """Product of x[:, base:base + inner] and the block of weights: [slab_rows, columns], scaled if by groups."""
    after, depth, rows, pack = plan.group and not plan.before, plan.depth, plan.slab_rows, packed(w.dtype)
    dot = functools.partial(jnp.dot, preferred_element_type=plan.accumulator)
    slab = lambda sums, i: sums[i * rows : (i + 1) * rows]
    total: Any = 0
    for at in range(0, plan.blocks.inner, depth):
        left, right = x[:, pl.ds(base + at, depth)], w[0, at // pack : (at + depth) // pack, :]
        if plan.native:
            total += dot(left, right)
            continue
        sums = dot(left, _scaled(plan, right, scale, at // plan.group) if plan.before else convert(plan.words, right))
        if plan.words == "int4":
            sums -= MAGIC * jnp.sum(left.astype(jnp.float32), axis=1, keepdims=True)
        if after:
            first, each = at // plan.group, plan.slabs // plan.parts
            sums = sum(slab(sums, i) * _scale_row(scale, first + i % each, jnp.float32) for i in range(plan.slabs))
        total += sums
    return sum(slab(total, i) for i in range(plan.slabs)) if plan.slabs > 1 and not after else total


def _kernel(layer, x, w, scale, *refs, plan: Plan, least: bool, by_row: bool):
    refs = list(refs)
    minimum, sums = (refs.pop(0), refs.pop(0)) if least else (None, None)
    amount = refs.pop(0) if by_row else None
    out, acc = refs
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    acc[...] += _product(plan, x, w, scale, pl.multiple_of(k * plan.blocks.inner, LANES))

    @pl.when(k == pl.num_programs(2) - 1)
    def _():
        y = acc[...].astype(jnp.float32)[: out.shape[0]]
        if plan.words == FP8:
            y *= 2.0**60  # the other half of 2**120 is in x: the whole would leave the range of a float32
        if not plan.group:
            row = scale[pl.ds(layer[0] % scale.shape[0], 1), :] if len(scale.shape) == 2 else scale[0]
            y *= row.astype(jnp.float32)
        if minimum is not None and sums is not None:
            y += jnp.dot(sums[...], minimum[0].astype(jnp.float32), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        out[...] = (y if amount is None else y * amount[...]).astype(out.dtype)


def quantized_matmul_tpu(x, w, scale, minimum, layer, *, quantize_x, chip, blocks, interpret):
    """The TPU kernel; arguments as in quantized_matmul, interpret False or a pltpu.InterpretParams."""
    check(x, w, scale, minimum, quantize_x)
    plan = make_plan(x, w, scale, quantize_x, chip, blocks)
    need = check_blocks(plan, x, w, scale, minimum, chip)
    (rows, inner), (layers, _, columns) = x.shape, w.shape
    block, pack = plan.blocks, packed(w.dtype)
    left, amount = quantize_rows(x) if quantize_x else (x, None)
    left = left if plan.native else _arrange(plan, left.astype(jnp.bfloat16) if quantize_x else left)
    extra, specs = [], []
    of_layer = lambda n: pl.BlockSpec((1, n, block.columns), lambda m, n, k, layer: (layer[0], k, n))
    if minimum is not None:
        groups = inner // plan.group
        extra += [minimum, x.astype(jnp.float32).reshape(rows, groups, plan.group).sum(axis=2)]
        specs += [pl.BlockSpec((1, groups, block.columns), lambda m, n, k, layer: (layer[0], 0, n))]
        specs += [pl.BlockSpec((block.rows, groups), lambda m, n, k, layer: (m, 0))]
    if amount is not None:
        extra, specs = [amount], [pl.BlockSpec((block.rows, 1), lambda m, n, k, layer: (m, 0))]
    tile = min(_tile_rows(scale), layers)  # a row of [L, N] comes with those of its tile
    row_spec = pl.BlockSpec((tile, block.columns), lambda m, n, k, layer: (layer[0] // tile, n))
    if scale.ndim == 3:
        row_spec = pl.BlockSpec((1, 1, block.columns), lambda m, n, k, layer: (layer[0], 0, n))
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(pl.cdiv(rows, block.rows), pl.cdiv(columns, block.columns), inner // block.inner),
        in_specs=[
            pl.BlockSpec((plan.slabs * plan.slab_rows, inner), lambda m, n, k, layer: (m, 0)),
            of_layer(block.inner // pack),
            of_layer(block.inner // plan.group) if plan.group else row_spec,
            *specs,
        ],
        out_specs=pl.BlockSpec((block.rows, block.columns), lambda m, n, k, layer: (m, n)),
        scratch_shapes=[pltpu.VMEM((plan.slab_rows, block.columns), plan.accumulator)],
    )
    cost = pl.CostEstimate(
        flops=2 * rows * inner * columns,
        bytes_accessed=inner * columns * bits(w.dtype) // 8 + rows * (inner + columns) * x.dtype.itemsize,
        transcendentals=0,
    )
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan, least=minimum is not None, by_row=quantize_x),
        out_shape=jax.ShapeDtypeStruct((rows, columns), x.dtype),
        grid_spec=grid_spec,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=min(max(need, 14 << 20), CHIPS[chip].vmem)
        ),
        cost_estimate=cost,
        interpret=interpret,
        name="quantized_matmul",
    )(jnp.asarray(layer, jnp.int32).reshape(1), left, w, scale, *extra)
