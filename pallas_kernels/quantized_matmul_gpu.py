"""x times quantized weights on a GPU, for the few rows of a decode step: what binds there is reading the weights.

    x [M, K] bfloat16 or float32   layer int, or int32 scalar   scale, minimum as in quantized_matmul: [L, N], [L, 1, N], [L, K / group, N]
    w [L, N, K] int8 or float8_e4m3fn, or two numbers to a byte [L, N, K / 2]: int8 (int4) or uint8 (MXFP4), both with scales by groups

A GPU wants the numbers of one output beside each other, so w is the transpose of what quantized_matmul takes; for_gpu makes it. Of two to a
byte, `group` bytes hold one group of K in their low nibbles and the next group in their high ones: K is a multiple of 2 * group.

With weights so placed, XLA's own product of int8 or fp8 by channel is as fast as this kernel, but not for one row, which it multiplies and
adds up number by number; so one row becomes two. int4, MXFP4 and groups, which XLA writes out as bfloat16 first, have the kernel, which
takes K and N that are multiples of 128.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.quantized_matmul import by_group, quantize_rows
from pallas_kernels.round_gpu import ACTIVATIONS, activate
from pallas_kernels.weight_formats import GROUPS, LANES, bfloat16_parts, turned_values

bf16, f32 = jnp.bfloat16, jnp.float32
load = plgpu.load
MOST_ROWS = 64  # of x, for a kernel; beyond, dequantizing costs less than it saves
FEW_ROWS = 16  # up to which weights are the first operand of a product, so that x is padded to 8 only
FOUR_BITS = ("int4", "mxfp4")


class Tiles(NamedTuple):
    rows: int  # of w in a program
    depth: int  # stored numbers of a row in a tile
    stages: int  # tiles on their way
    splits: int  # of K, into programs whose sums are added afterwards
    warps: int


# Measured on an H100: (two to a byte, K, N) -> tiles for up to 16 rows. tests/bench_gpu_matmul.py finds them.
TUNED = {
    (True, 4096, 6144): Tiles(32, 64, 3, 8, 1),
    (True, 4096, 4096): Tiles(32, 64, 3, 4, 2),
    (True, 4096, 28672): Tiles(32, 128, 2, 2, 2),
    (True, 14336, 4096): Tiles(32, 64, 3, 8, 2),
    (True, 4096, 128256): Tiles(128, 128, 3, 1, 2),
    (False, 4096, 6144): Tiles(32, 128, 4, 4, 2),
    (False, 4096, 4096): Tiles(32, 128, 4, 4, 2),
    (False, 4096, 28672): Tiles(32, 256, 2, 4, 2),
    (False, 14336, 4096): Tiles(32, 128, 3, 8, 2),
}

# (type, K, N) -> {most rows: tiles}: bfloat16 and int8 by channel where this kernel was faster than XLA's product.
TUNED_ROWS = {
    ("bfloat16", 4096, 6144): {16: Tiles(16, 128, 5, 2, 1), 32: Tiles(64, 256, 2, 4, 2), 64: Tiles(32, 256, 3, 1, 2)},
    ("bfloat16", 4096, 4096): {16: Tiles(32, 256, 3, 4, 1), 32: Tiles(32, 64, 4, 4, 2), 64: Tiles(32, 256, 3, 2, 2)},
    ("bfloat16", 4096, 28672): {64: Tiles(128, 128, 2, 1, 4)},
    ("bfloat16", 14336, 4096): {16: Tiles(32, 256, 3, 4, 2), 32: Tiles(64, 128, 4, 4, 2), 64: Tiles(32, 128, 4, 2, 2)},
    ("bfloat16", 4096, 128256): {16: Tiles(64, 128, 5, 1, 1), 64: Tiles(128, 128, 4, 1, 4)},
    # the parts of two devices
    ("bfloat16", 4096, 3072): {32: Tiles(64, 64, 4, 4, 2), 64: Tiles(32, 64, 4, 4, 2)},
    ("bfloat16", 2048, 4096): {64: Tiles(64, 64, 4, 4, 4)},
    ("bfloat16", 4096, 14336): {32: Tiles(64, 128, 3, 1, 4), 64: Tiles(64, 64, 4, 1, 4)},
    ("bfloat16", 7168, 4096): {32: Tiles(64, 128, 3, 4, 4), 64: Tiles(32, 256, 3, 2, 2)},
    ("int8", 4096, 6144): {64: Tiles(64, 64, 3, 8, 2)},
    ("int8", 4096, 4096): {64: Tiles(128, 64, 4, 8, 4)},
}


# (K, N) -> {most rows: tiles} of gated_matmul_gpu.
TUNED_GATED = {
    (4096, 28672): {16: Tiles(64, 256, 4, 1, 2), 32: Tiles(128, 128, 4, 1, 4), 64: Tiles(64, 128, 3, 1, 4)},
    (4096, 14336): {16: Tiles(128, 128, 4, 1, 4), 32: Tiles(128, 128, 4, 1, 4), 64: Tiles(128, 128, 3, 1, 4)},
}

# (type of both, K, N) -> tiles for 33 to 64 rows of 8-bit tokens, where they were faster than XLA's product, or compile faster: XLA tries
# its own for a minute. On an H100; int8 gate and up takes 49 us in XLA's and 55 here.
TUNED_TOKENS = {
    ("int8", 4096, 6144): Tiles(32, 256, 4, 1, 2),
    ("int8", 4096, 4096): Tiles(32, 64, 4, 4, 4),
    ("int8", 14336, 4096): Tiles(32, 256, 5, 2, 2),
    ("float8_e4m3fn", 4096, 6144): Tiles(32, 128, 6, 1, 2),
    ("float8_e4m3fn", 4096, 4096): Tiles(32, 128, 5, 2, 2),
    ("float8_e4m3fn", 4096, 28672): Tiles(128, 256, 3, 1, 8),
    ("float8_e4m3fn", 14336, 4096): Tiles(32, 256, 5, 2, 2),
}


def for_gpu(w, scale):
    """Stored weights [..., K, N] (MXFP4 [..., K / 2, N]) as a GPU wants them: [..., N, K], or two to a byte [..., N, K / 2]. int4 whose
    groups, by `scale` [..., groups, N], are not an even number becomes int8; of MXFP4 that raises ValueError."""
    turn = lambda a: jnp.swapaxes(a, -1, -2)
    if w.dtype not in (jnp.int4, jnp.uint8):
        return turn(w)
    codes = w.astype(jnp.int8) if w.dtype == jnp.int4 else jnp.stack([w & 15, w >> 4], axis=-2)
    codes = codes.reshape(*w.shape[:-2], -1, w.shape[-1])
    inner, groups = codes.shape[-2], scale.shape[-2] if scale.ndim == w.ndim else 1
    if groups % 2:
        if w.dtype == jnp.uint8:
            raise ValueError(f"scale {scale.shape} of MXFP4 {w.shape}: groups must be an even number")
        return turn(codes)
    pairs = turn(codes).reshape(*w.shape[:-2], w.shape[-1], groups // 2, 2, inner // groups)
    return (pairs[..., 0, :] & 15 | pairs[..., 1, :] << 4).reshape(*w.shape[:-2], w.shape[-1], inner // 2)


def quantized_matmul_gpu(
    x, w, scale, *, layer: Any = 0, minimum=None, quantize_x=False, out: Any = None, tiles: Tiles | None = None, interpret=False
) -> jax.Array:
    """x [M, K] times layer `layer` of w, summed in float32 (quantize_x: int32). See the module for shapes. out: None for x's dtype.

    tiles: None: what was measured for the shape, else a guess. interpret: the kernel on a CPU. Raises ValueError for shapes and types."""
    kind, group = _check(x, w, scale, minimum, quantize_x)
    scale = scale if scale.ndim == 3 else scale[:, None]
    parts, out = 3 if x.dtype == f32 else 1, out or x.dtype
    if not group and not quantize_x and parts == 1 and isinstance(layer, int) and (best := tiles_for_rows(kind, x.shape[0], *w.shape[1:])):
        return functools.reduce(jnp.add, list(run(x, w, scale, best, kind=kind, layer=layer, out=out, interpret=interpret))).astype(out)
    if not group or parts * x.shape[0] > MOST_ROWS or x.shape[1] % LANES or w.shape[1] % LANES:
        pick = lambda a: a[layer] if isinstance(layer, int) else lax.dynamic_index_in_dim(a, layer, 0, keepdims=False)
        y = _by_xla(x, pick(w), pick(scale), kind, group, quantize_x, out)
    else:
        left = jnp.concatenate(bfloat16_parts(x, parts)) if parts > 1 else x
        tiles = _legal(tiles or _guess(left.shape[0], x.shape[1], w.shape[1], kind), kind, group, x.shape[1], w.shape[1], exact=parts > 1)
        sums = run(left, w, scale, tiles, kind=kind, layer=layer, out=f32 if parts > 1 else out, interpret=interpret)
        y = functools.reduce(jnp.add, list(sums))  # as so many additions, which XLA makes part of what comes next
        y = functools.reduce(jnp.add, list(y.reshape(parts, *x.shape[:1], -1))).astype(out)
    if minimum is None:
        return y
    least = minimum[layer] if isinstance(layer, int) else lax.dynamic_index_in_dim(minimum, layer, 0, keepdims=False)
    sums = x.astype(f32).reshape(x.shape[0], least.shape[0], -1).sum(axis=2)
    return (y.astype(f32) + jnp.dot(sums, least.astype(f32), precision=lax.Precision.HIGHEST)).astype(out)


def tiles_for_rows(kind: str, many: int, columns: int, inner: int) -> Tiles | None:
    """What the kernel takes for so many rows, two or more, where it is faster than XLA's product."""
    return _for_rows(TUNED_ROWS.get((kind, inner, columns), {}), many)


def _for_rows(found: dict[int, Tiles], many: int) -> Tiles | None:
    """Of a table by the most rows, those of the first size that has room."""
    at = next((most for most in (FEW_ROWS, 32, MOST_ROWS) if many <= most), 0)
    return found.get(at) if many > 1 else None


def _block_rows(many: int) -> int:
    """Of x, in a program."""
    return max(8, min(MOST_ROWS, 1 << (many - 1).bit_length()))


def _check(x, w, scale, minimum, quantize_x) -> tuple[str, int]:
    """(kind of weights, numbers under one scale or 0). Raises ValueError."""
    if x.ndim != 2 or w.ndim != 3 or w.shape[2] * 2 not in (x.shape[1], 2 * x.shape[1]) or 0 in x.shape:
        raise ValueError(f"x {x.shape}, w {w.dtype} {w.shape}: must be [M, K] and [L, N, K] or [L, N, K / 2]")
    (layers, columns, stored), inner = w.shape, x.shape[1]
    names = {jnp.dtype(jnp.int8): "int8", jnp.dtype(jnp.float8_e4m3fn): "float8_e4m3fn"}
    if stored < inner:
        names = {jnp.dtype(jnp.int8): "int4", jnp.dtype(jnp.uint8): "mxfp4"}
    if w.dtype not in names or x.dtype not in (bf16, f32):
        legal = ", ".join(str(key) for key in names)
        raise ValueError(f"x of {x.dtype}, w of {w.dtype} {w.shape}: must be bfloat16 or float32, and {legal}")
    kind = names[jnp.dtype(w.dtype)]
    group = inner // scale.shape[1] if by_group(scale) else 0
    grouped = [(layers, inner // size, columns) for size in GROUPS if inner % (size * (2 if kind in FOUR_BITS else 1)) == 0]
    legal = grouped if kind in FOUR_BITS else [(layers, columns), (layers, 1, columns), *grouped]
    if scale.shape not in legal:
        raise ValueError(f"scale {scale.shape} of {kind} {w.shape}: must be one of {legal}")
    if minimum is not None and (minimum.shape != scale.shape or not group):
        raise ValueError(f"minimum {minimum.shape}: must have the shape of scale {scale.shape}, and that by groups")
    if quantize_x and (kind in FOUR_BITS or group):
        raise ValueError(f"quantize_x with {kind} and scale {scale.shape}: needs int8 or float8_e4m3fn and a scale by channel")
    return kind, group


def _by_xla(x, w, scale, kind, group, quantize_x, out):
    """Of one layer, w [N, stored]."""
    many, dims = x.shape[0], (((1,), (1,)), ((), ()))
    rows = jnp.pad(x, ((0, 1), (0, 0))) if many == 1 else x
    scale = scale.astype(f32)
    if quantize_x:
        rows, amount = quantize_rows(rows, w.dtype)
        y = lax.dot_general(rows, w, dims, preferred_element_type=jnp.int32 if kind == "int8" else f32)
        return (y.astype(f32) * amount * scale)[:many].astype(out)
    if group:
        full = turned_values(w, group) if kind in FOUR_BITS else w
        w = (full.reshape(w.shape[0], -1, group).astype(f32) * scale.T[:, :, None]).reshape(w.shape[0], -1)
    precision = lax.Precision.HIGHEST if x.dtype == f32 else None
    y = lax.dot_general(rows, w.astype(x.dtype), dims, precision=precision, preferred_element_type=f32)
    return (y if group else y * scale)[:many].astype(out)


def eight_bit_sums(q, amount, w, scale, *, interpret=False):
    """(sums, by) of tokens q [M, K], two or more, amount [M, 1] and weights w [N, K], scale [1, N]; q and w of one 8-bit type.
    by None: the product, in bfloat16 [M, N] or float32 parts [splits, M, N]. Else XLA's sums [M, N], int32 or bfloat16, which are to be
    multiplied by `by`, ([M, 1], [1, N])."""
    tiles = TUNED_TOKENS.get((w.dtype.name, *w.shape[::-1])) if MOST_ROWS // 2 < q.shape[0] <= MOST_ROWS else None
    if tiles is not None:
        how: dict[str, Any] = dict(kind=w.dtype.name, amount=amount, out=bf16, interpret=interpret)
        parts = run(q, w[None], scale.reshape(1, 1, -1), tiles, **how)
        return parts if tiles.splits > 1 else parts[0], None
    kind = jnp.int32 if q.dtype == jnp.int8 else bf16
    return lax.dot_general(q, w, (((1,), (1,)), ((), ())), preferred_element_type=kind), (amount, scale.reshape(1, -1).astype(f32))


def _guess(many, inner, columns, kind) -> Tiles:
    """Tiles for `many` rows of x: enough programs to fill an H100's 132 processors about eight times over, few rows, or twice."""
    if many <= FEW_ROWS:
        found = TUNED.get((kind in FOUR_BITS, inner, columns))
        return found or Tiles(32, 64 if kind in FOUR_BITS else 128, 3, _splits(columns // 32, 900), 2)
    rows = 128 if columns >= 1 << 14 else 64
    return Tiles(rows, 128 if many <= 32 else 64, 3, _splits(columns // rows, 200), 4)


def _splits(programs: int, wanted: int) -> int:
    """The power of two, 8 at most, that makes as many of so many programs."""
    return next((n for n in (1, 2, 4) if n * programs >= wanted), 8)


def _legal(tiles: Tiles, kind, group, inner, columns, exact) -> Tiles:
    """The nearest tiles that divide the weights. exact: weights are not to be rounded, as those of several groups in a tile are."""
    stored = inner // 2 if kind in FOUR_BITS else inner
    rows, depth, stages, splits, warps = tiles
    depth = min(depth, group) if exact and kind != "mxfp4" else depth  # an MXFP4 scale is a power of two
    depth = next(size for size in (depth, 128, 64, 32) if size <= depth and stored % size == 0)
    splits = next(n for n in range(min(splits, stored // depth), 0, -1) if stored // depth % n == 0)
    return Tiles(next(size for size in (rows, 128, 64, 32) if columns % size == 0), depth, stages, splits, warps)


# PTX on 4 bytes at once. Those of nibbles first bring the bytes into the order 0 2 1 3, in which what shares a register is 16 bits apart;
# they give two registers of low nibbles and two of high ones.
_FP8 = """{
.reg .b16 p, q, h<4>;
.reg .b32 a, b;
.reg .f32 f<4>;
mov.b32 {p, q}, $2;
cvt.rn.f16x2.e4m3x2 a, p;
cvt.rn.f16x2.e4m3x2 b, q;
mov.b32 {h0, h1}, a;
mov.b32 {h2, h3}, b;
cvt.f32.f16 f0, h0;
cvt.f32.f16 f1, h1;
cvt.f32.f16 f2, h2;
cvt.f32.f16 f3, h3;
cvt.rn.bf16x2.f32 $0, f1, f0;
cvt.rn.bf16x2.f32 $1, f3, f2;
}"""
# A nibble flipped into the last bits of 136 makes the bfloat16 136 + q.
_INT4 = """{
.reg .b32 w, a, m;
mov.b32 m, 0x43084308;
prmt.b32 w, $4, 0, 0x3120;
lop3.b32 a, w, 0x000f000f, m, 0x6a;
sub.rn.bf16x2 $0, a, m;
shr.b32 a, w, 8;
lop3.b32 a, a, 0x000f000f, m, 0x6a;
sub.rn.bf16x2 $1, a, m;
shr.b32 a, w, 4;
lop3.b32 a, a, 0x000f000f, m, 0x6a;
sub.rn.bf16x2 $2, a, m;
shr.b32 a, w, 12;
lop3.b32 a, a, 0x000f000f, m, 0x6a;
sub.rn.bf16x2 $3, a, m;
}"""
# The three bits of a magnitude are those of a bfloat16 times 4, whose highest bit of an exponent is set unless they are those of 0.
_MXFP4 = """{
.reg .b32 w, a, b, s, m;
prmt.b32 w, $4, 0, 0x3120;
shl.b32 a, w, 1;
shl.b32 b, w, 2;
lop3.b32 s, w, a, b, 0xfd;
mov.b32 m, 0x88888888;
lop3.b32 s, m, w, s, 0xca;
mov.b32 m, 0xc000c000;
shl.b32 a, s, 12;
shl.b32 b, w, 6;
and.b32 b, b, 0x01c001c0;
lop3.b32 $0, a, m, b, 0xea;
shl.b32 a, s, 4;
shr.b32 b, w, 2;
and.b32 b, b, 0x01c001c0;
lop3.b32 $1, a, m, b, 0xea;
shl.b32 a, s, 8;
shl.b32 b, w, 2;
and.b32 b, b, 0x01c001c0;
lop3.b32 $2, a, m, b, 0xea;
shr.b32 b, w, 6;
and.b32 b, b, 0x01c001c0;
lop3.b32 $3, s, m, b, 0xea;
}"""
_PICK = "{mov.b32 $0, $LOW; mov.b32 $1, $HIGH;}"
_MULTIPLY = "mul.rn.bf16x2 $0, $1, $2;"


def _asm(text, constraints, pack, to, *args):
    like = jax.ShapeDtypeStruct(args[0].shape, to)
    return plgpu.elementwise_inline_asm(text, args=args, constraints=constraints, pack=pack, result_shape_dtypes=[like])[0]


def unpack(kind, t, interpret):
    """Stored numbers as bfloat16, exactly: [all] or, of two to a byte, [low nibbles, high nibbles]; MXFP4 times 4."""
    if kind == "bfloat16":
        return [t]
    if kind == "int8":
        return [t.astype(bf16)]
    if kind == "float8_e4m3fn":
        return [t.astype(f32).astype(bf16) if interpret else _asm(_FP8, "=r,=r,r", 4, bf16, t)]
    if not interpret:
        both = _asm(_INT4 if kind == "int4" else _MXFP4, "=r,=r,=r,=r,r", 4, jnp.int32, t)
        pick = lambda low: _PICK.replace("LOW", str(low)).replace("HIGH", str(low + 1))
        return [_asm(pick(low), "=r,=r,r,r,r,r", 4, bf16, both) for low in (2, 4)]
    if kind == "int4":
        return [((t << 4) >> 4).astype(bf16), (t >> 4).astype(bf16)]
    nibbles = [t.astype(jnp.int32) & 15, t.astype(jnp.int32) >> 4]
    size = [lax.bitcast_convert_type((n & 7) * (1 << 22) + (128 << 23), f32) for n in nibbles]  # 2 to 24; that of the code of 0 is 3
    return [jnp.where(n & 7 == 1, 0, jnp.where(n > 7, -v, v)).astype(bf16) for n, v in zip(nibbles, size)]


def scaled_weights(values, scale, group, interpret):
    """Unpacked [rows, depth] times scale [depth / group, rows], in bfloat16."""
    by = jnp.broadcast_to(scale.astype(bf16).T[:, :, None], (values.shape[0], scale.shape[0], group)).reshape(values.shape)
    return values * by if interpret else _asm(_MULTIPLY, "=r,r,r", 2, bf16, values, by)


class Site(NamedTuple):
    """What is static about a kernel."""

    kind: str
    tiles: Tiles
    group: int  # of K, under one scale; 0: by channel
    many: int  # rows of x in a program
    layer: int | None  # None: in a reference
    interpret: bool
    whole: bool = False  # whether x has the type of w


def _kernel(*refs, site: Site):
    """Rows of w times a block of rows of x, over a part of K, by tensor cores; the compiler makes the pipeline."""
    x, w, *refs, out = refs
    amount, *refs = refs if site.whole else (None, *refs)
    scale: Any = None
    scale, *at_layer = (None, *refs) if site.kind == "bfloat16" else refs
    layer = at_layer[0][0] if site.layer is None else jnp.int32(site.layer)
    tiles, group = site.tiles, site.group
    halves = 2 if site.kind in FOUR_BITS else 1
    flip = site.many > FEW_ROWS
    along = (lambda row: row[None, :]) if flip else (lambda row: row[:, None])
    rows = pl.ds(pl.program_id(0) * tiles.rows, tiles.rows)
    part, first, many = pl.program_id(1), pl.program_id(2) * site.many, out.shape[1]
    span = w.shape[2] // tiles.splits
    before = group and group < tiles.depth  # more than one group in a tile: the weights are scaled, not the sums
    mine = None if many % site.many == 0 else first + lax.iota(jnp.int32, site.many) < many
    here = None if mine is None else mine[:, None]
    total = jnp.int32 if site.whole and site.kind == "int8" else f32

    def scales(i):
        """Of each half [rows], or [groups of a tile, rows]; asked for one step ahead."""
        at = jnp.minimum(part * span + i * tiles.depth, w.shape[2] - tiles.depth) // group
        at = pl.ds(at, tiles.depth // group) if before else at
        return [load(scale.at[layer, at, jnp.int32(j), rows]) for j in range(halves)]

    def body(i, carried):
        of, acc = carried
        k = part * span + i * tiles.depth
        coming = scales(i + 1) if group else []
        stored = load(w.at[layer, rows, pl.ds(k, tiles.depth)])
        for j, values in enumerate([stored] if site.whole else unpack(site.kind, stored, site.interpret)):
            if before:
                values = scaled_weights(values, of[j], group, site.interpret)
            at = x.at[jnp.int32(j), pl.ds(first, site.many), pl.ds(k, tiles.depth)]
            right = load(at) if here is None else load(at, mask=here, other=jnp.zeros((), x.dtype))
            pair = (right, values) if flip else (values, right)
            more = lax.dot_general(*pair, (((1,), (1,)), ((), ())), preferred_element_type=total)
            acc += more * along(of[j].astype(f32)) if group and not before else more
        return coming, acc

    zero = jnp.zeros((site.many, tiles.rows) if flip else (tiles.rows, site.many), total)
    _, acc = lax.fori_loop(0, span // tiles.depth, body, (scales(0) if group else [], zero))
    if not group and scale is not None:
        acc = acc.astype(f32) * along(load(scale.at[layer, jnp.int32(0), jnp.int32(0), rows]).astype(f32))
    if amount is not None:
        by_row = load(amount.at[pl.ds(first, site.many)], mask=mine, other=None if mine is None else 0.0)
        acc *= by_row[:, None] if flip else by_row[None, :]
    if site.kind == "mxfp4":
        acc *= 0.25
    plgpu.store(out.at[part, pl.ds(first, site.many), rows], (acc if flip else acc.T).astype(out.dtype), mask=here)


def _gated_kernel(x, w, out, *, tiles: Tiles, block: int, gate: str):
    """act(gate) * up of bfloat16, of which a program has as many rows each. block: rows of x in a program."""
    many, wide = out.shape
    half, first = tiles.rows // 2, pl.program_id(1) * block
    columns = pl.program_id(0) * half
    mine = None if many % block == 0 else (first + lax.iota(jnp.int32, block) < many)[:, None]

    def body(i, sums):
        k = pl.ds(i * tiles.depth, tiles.depth)
        at = x.at[pl.ds(first, block), k]
        rows = load(at) if mine is None else load(at, mask=mine, other=jnp.zeros((), x.dtype))
        both = [load(w.at[pl.ds(columns + start, half), k]) for start in (0, wide)]
        return [s + lax.dot_general(rows, r, (((1,), (1,)), ((), ())), preferred_element_type=f32) for s, r in zip(sums, both, strict=True)]

    left, right = lax.fori_loop(0, w.shape[1] // tiles.depth, body, [jnp.zeros((block, half), f32)] * 2)
    y = activate(left, gate) * right
    plgpu.store(out.at[pl.ds(first, block), pl.ds(columns, half)], y.astype(out.dtype), mask=mine)


def gated_matmul_gpu(x, w, gate: str, *, tiles: Tiles | None = None, interpret=False) -> jax.Array:
    """act(x @ w[: N / 2].T) * (x @ w[N / 2 :].T) of bfloat16 x [M, K] and w [N, K], in bfloat16 [M, N / 2], two rows or more; tiles as
    in tiles_for_gated. The sums stay in float32 up to the end. Raises ValueError for what does not fit."""
    (many, inner), columns = x.shape, w.shape[0]
    tiles = tiles or tiles_for_gated(many, columns, inner)
    if tiles is None or x.dtype != bf16 or w.dtype != bf16 or columns % tiles.rows or inner % tiles.depth or gate not in ACTIVATIONS:
        raise ValueError(f"x {x.dtype} {x.shape}, w {w.dtype} {w.shape}, gate={gate!r}: must be bfloat16 of a shape that has tiles")
    block = _block_rows(many)
    return pl.pallas_call(
        functools.partial(_gated_kernel, tiles=tiles, block=block, gate=gate),
        grid=(columns // tiles.rows, pl.cdiv(many, block)),
        out_shape=jax.ShapeDtypeStruct((many, columns // 2), bf16),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="gated_matmul_gpu",
    )(x, w)


def tiles_for_gated(many: int, columns: int, inner: int) -> Tiles | None:
    """What gated_matmul_gpu takes for so many rows where it is faster than a product and the gate after it. Tiles.rows: of both halves."""
    return _for_rows(TUNED_GATED.get((inner, columns), {}), many)


def arrange(x, kind, group):
    """x [M, K] as [halves, M, stored], in the order of the stored weights."""
    if kind not in FOUR_BITS:
        return x[None]
    return x.reshape(x.shape[0], -1, 2, group).transpose(2, 0, 1, 3).reshape(2, x.shape[0], -1)


def run(x, w, scale, tiles: Tiles, *, kind, layer: Any = 0, amount=None, out=None, interpret=False) -> jax.Array:
    """[splits, M, N]: float32 sums of the parts of K or, of one part, the product in `out`, or x's dtype, which is bfloat16.
    amount [M, 1]: x has the type of w, and its rows are multiplied by that.
    kind: int8, float8_e4m3fn, int4, mxfp4, or bfloat16 without scale. scale: [L, 1, N] or [L, K / group, N]. tiles divide the weights."""
    many, inner = x.shape
    group = inner // scale.shape[1] if scale is not None and scale.shape[1] > 1 else 0
    halves = 2 if kind in FOUR_BITS else 1
    rows = _block_rows(many)
    site = Site(kind, tiles, group, rows, layer if isinstance(layer, int) else None, interpret, amount is not None)
    args = [arrange(x, kind, group), w, *([] if amount is None else [amount.reshape(-1)])]
    args += [] if scale is None else [scale.reshape(scale.shape[0], -1, halves if group else 1, scale.shape[2])]
    if site.layer is None:
        args.append(jnp.asarray(layer, jnp.int32).reshape(1))
    return pl.pallas_call(
        functools.partial(_kernel, site=site),
        grid=(w.shape[1] // tiles.rows, tiles.splits, pl.cdiv(many, rows)),
        out_shape=jax.ShapeDtypeStruct((tiles.splits, many, w.shape[1]), f32 if tiles.splits > 1 else out or x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="quantized_matmul_gpu",
    )(*args)
