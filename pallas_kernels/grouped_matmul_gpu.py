"""grouped_matmul on a GPU: a program for each tile of an expert's rows and block of columns, through Triton.

The tiles are counted on the device, so that nothing waits for the sizes of the groups: as many programs as there can be, of which those
that are not needed end at once. A tile has rows of one expert only; programs of one block of columns follow each other, so that an expert's
weights come out of the L2 for all tiles but its first. Weights are read as they lie: bfloat16 or float32, or int8 with a scale for each
column; or turned, two numbers to a byte with scales by groups, as quantized_matmul_gpu has them, which unpacks them too. A tile of these
is [columns, bytes]; its low and high nibbles are products of their own with what they meet of x, read from where it lies. Where a tile is
of one group the scales multiply sums, else the weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.grouped_matmul import ALPHA, LIMIT
from pallas_kernels.quantized_matmul_gpu import FEW_ROWS, scaled_weights, unpack
from pallas_kernels.weight_formats import GROUPS

bf16, f32 = jnp.bfloat16, jnp.float32
load = plgpu.load


class Tiles(NamedTuple):
    rows: int
    columns: int  # of the output; with an activation of gate and of up, each
    depth: int  # of x; of turned weights, bytes: so many of the low nibbles and so many of the high ones
    stages: int
    warps: int


def fits(x, w, scale, turned: bool = False) -> bool:
    """Whether the kernel takes these, of which grouped_matmul.check has seen the shapes."""
    if turned:
        return x.dtype == bf16 and w.shape[2] % 64 == 0 and x.shape[1] // scale.shape[2] in GROUPS
    whole = x.shape[1] % 32 == 0 and w.shape[3] % 64 == 0
    return whole and (w.dtype == x.dtype or (w.dtype == jnp.int8 and x.dtype == bf16 and scale is not None and scale.ndim == 3))


def default_tiles(rows: int, experts: int, inner: int, columns: int) -> Tiles:
    """For `rows` rows over all experts: tiles of about an expert's share. A guess, not measured."""
    each = next(size for size in (16, 32, 64, 128) if size >= min(-(-rows // experts), 128))
    depth = next(size for size in ((128, 64, 32) if each <= 32 else (64, 32)) if inner % size == 0)
    width = next(size for size in ((64, 32) if each <= 32 else (128, 64, 32)) if columns % size == 0)
    return Tiles(each, width, depth, 3, 4 if each <= 64 else 8)


def default_turned_tiles(rows: int, experts: int, stored: int, columns: int, group: int) -> Tiles:
    """As default_tiles, for turned weights whose rows are `stored` bytes. A guess, not measured. Rows: twice an expert's share, since rows
    that are not there are not read, but a second tile unpacks the weights again. Depth: a line of the L2, 128 bytes, eight loads of 16, but
    of one group where its sums can be scaled. Few rows: 16 columns where wider tiles would leave processors without a program."""
    each = next(size for size in (8, 16, 32, 64, 128) if size >= min(2 * -(-rows // experts), 128))
    wanted = 128 if each <= FEW_ROWS else 64
    depth = next(size for size in (128, 64, 32) if size <= (min(group, wanted) if group >= 64 else wanted) and stored % size == 0)
    if each <= FEW_ROWS:
        return Tiles(each, 32 if min(rows, experts) * columns // 32 >= 400 else 16, depth, 3, 2 if each * columns >= 1 << 10 else 1)
    return Tiles(each, 64 if columns % 64 == 0 else 32, depth, 3, 4 if each <= 64 else 8)


def grouped_matmul_gpu(
    x, w, group_sizes, *, layer: Any = 0, scale: Any = None, bias=None, activation=None, turned=False, tiles=None, interpret=False
):
    """As grouped_matmul, of what `fits`. tiles: None for default_tiles or default_turned_tiles. interpret: on a CPU."""
    rows, experts, columns = x.shape[0], w.shape[1], w.shape[2 if turned else 3] // (1 if activation is None else 2)
    group = x.shape[1] // scale.shape[2] if turned else 0
    if turned:
        tiles = tiles or default_turned_tiles(rows, experts, w.shape[3], columns, group)
        scale = scale.reshape(*scale.shape[:2], -1, 2, scale.shape[3])
    tiles = tiles or default_tiles(rows, experts, x.shape[1], columns)
    owner, first, count = _items(group_sizes, rows, tiles.rows)
    x = jnp.pad(x, ((0, max(0, tiles.rows - rows)), (0, 0)))  # a slice may not be longer than an array
    x = x.reshape(x.shape[0], -1, 2, group) if group and group < tiles.depth else x
    given = dict(x=x, w=w, owner=owner, first=first, count=count, layer=jnp.asarray(layer, jnp.int32).reshape(1))
    given |= {} if scale is None else dict(scale=scale)
    given |= {} if bias is None else dict(bias=bias)

    def kernel(*refs):
        _kernel(dict(zip((*given, "out"), refs, strict=True)), tiles, activation, columns, group, interpret)

    out = pl.pallas_call(
        kernel,
        grid=(owner.shape[0], columns // tiles.columns),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], columns), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="grouped_matmul_gpu",
    )(*given.values())
    return jnp.where((jnp.arange(rows) < jnp.sum(group_sizes))[:, None], out[:rows], 0)  # what nobody wrote may be anything


def _items(sizes, rows: int, tile: int):
    """(expert, first row, rows) of each tile, as many as there can be; no rows: none."""
    tiles = (sizes + tile - 1) // tile
    ends, row_ends = jnp.cumsum(tiles), jnp.cumsum(sizes)
    number = jnp.arange(min(rows, rows // tile + sizes.shape[0]), dtype=jnp.int32)
    owner = jnp.minimum(jnp.sum(number[:, None] >= ends, axis=1, dtype=jnp.int32), sizes.shape[0] - 1)
    first = row_ends[owner] - sizes[owner] + (number - ends[owner] + tiles[owner]) * tile
    count = jnp.where(number < ends[-1], jnp.minimum(row_ends[owner] - first, tile), 0)
    return owner, first.astype(jnp.int32), count.astype(jnp.int32)


def _kernel(refs: dict[str, Any], tiles: Tiles, activation: str | None, columns: int, group: int, interpret: bool) -> None:
    """group: of turned weights, else 0."""
    item, begin = pl.program_id(0), pl.program_id(1) * tiles.columns
    expert, first, count, layer = (
        load(refs[name].at[at]) for name, at in (("owner", item), ("first", item), ("count", item), ("layer", jnp.int32(0)))
    )
    x, w = refs["x"], refs["w"]
    mine = lax.iota(jnp.int32, tiles.rows) < count
    rows = pl.ds(first, tiles.rows)
    parts = [pl.ds(begin, tiles.columns)] + ([] if activation is None else [pl.ds(begin + columns, tiles.columns)])
    precision = lax.Precision.HIGHEST if x.dtype == f32 else None
    flip = group > 0 and tiles.rows <= FEW_ROWS  # sums are [columns, rows]
    along = (lambda column: column[:, None]) if flip else (lambda column: column[None, :])

    @pl.when(count > 0)
    def _() -> None:
        def body(i, sums):
            at = pl.ds(i * tiles.depth, tiles.depth)
            left = load(x.at[rows, at], mask=mine[:, None], other=0.0)
            product = lambda part: lax.dot_general(
                left,
                load(w.at[layer, expert, at, part]).astype(left.dtype),
                (((1,), (0,)), ((), ())),
                precision=precision,
                preferred_element_type=f32,
            )
            return [acc + product(part) for acc, part in zip(sums, parts, strict=True)]

        if group:
            sums = _turned_sums(refs, (layer, expert), rows, parts, mine, tiles=tiles, group=group, flip=flip, interpret=interpret)
        else:
            zero = jnp.zeros((tiles.rows, tiles.columns), f32)
            sums = lax.fori_loop(0, x.shape[1] // tiles.depth, body, [zero] * len(parts))
            if "scale" in refs:
                sums = [acc * along(load(refs["scale"].at[layer, expert, part]).astype(f32)) for acc, part in zip(sums, parts, strict=True)]
        if "bias" in refs:
            sums = [acc + along(load(refs["bias"].at[layer, expert, part]).astype(f32)) for acc, part in zip(sums, parts, strict=True)]
        made = _activate(activation, *sums)
        made = made.T if flip else made
        plgpu.store(refs["out"].at[rows, parts[0]], made.astype(refs["out"].dtype), mask=mine[:, None])


def _turned_sums(refs: dict[str, Any], at, rows, parts, mine, *, tiles: Tiles, group: int, flip: bool, interpret: bool):
    """The products of a tile's rows with these columns of turned weights, scaled: [rows, columns], or with `flip` the other way round, so
    that few rows are padded to 8 only. at: (layer, expert)."""
    x, w, scale = refs["x"], refs["w"], refs["scale"]
    kind, before = "mxfp4" if w.dtype == jnp.uint8 else "int4", group < tiles.depth
    steps = w.shape[3] // tiles.depth

    def scales(i):
        """Of each part and half [columns], or [groups of a tile, columns]; asked for one step ahead."""
        first = lax.div(jnp.minimum(i, steps - 1) * tiles.depth, jnp.int32(group))
        first = pl.ds(first, tiles.depth // group) if before else first
        return [load(scale.at[(*at, first, jnp.int32(half), part)]) for part in parts for half in range(2)]

    def rows_of_x(i, half):
        """What the low or the high nibbles of step i meet."""
        k = i * tiles.depth
        pair = lax.div(k, jnp.int32(group))
        if before:
            here = load(x.at[rows, pl.ds(pair, tiles.depth // group), jnp.int32(half), :], mask=mine[:, None, None], other=0.0)
            return here.reshape(tiles.rows, tiles.depth)
        return load(x.at[rows, pl.ds(k + (pair + half) * group, tiles.depth)], mask=mine[:, None], other=0.0)

    def body(i, carried):
        of, sums = carried
        coming, left, made = scales(i + 1), [rows_of_x(i, half) for half in range(2)], []
        for p, (acc, part) in enumerate(zip(sums, parts, strict=True)):
            for half, values in enumerate(unpack(kind, load(w.at[(*at, part, pl.ds(i * tiles.depth, tiles.depth))]), interpret)):
                by = of[2 * p + half]
                values = scaled_weights(values, by, group, interpret) if before else values
                pair = (values, left[half]) if flip else (left[half], values)
                more = lax.dot_general(*pair, (((1,), (1,)), ((), ())), preferred_element_type=f32)
                acc += more if before else more * (by.astype(f32)[:, None] if flip else by.astype(f32)[None, :])
            made.append(acc)
        return coming, made

    zero = jnp.zeros((tiles.columns, tiles.rows) if flip else (tiles.rows, tiles.columns), f32)
    _, sums = lax.fori_loop(0, steps, body, (scales(jnp.int32(0)), [zero] * len(parts)))
    return [acc * 0.25 for acc in sums] if kind == "mxfp4" else sums  # unpack gives 4 times the numbers of MXFP4


def _activate(activation: str | None, gate, up: Any = None):
    """grouped_matmul.activate in operations that Triton has."""
    sigmoid = lambda x: 1 / (1 + jnp.exp(-x))
    if activation is None:
        return gate
    if activation == "silu":
        return gate * sigmoid(gate) * up
    if activation == "gelu":
        return gate * sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    gate, up = jnp.minimum(gate, LIMIT), jnp.maximum(jnp.minimum(up, LIMIT), -LIMIT)
    return gate * sigmoid(ALPHA * gate) * (up + 1)
