"""grouped_matmul on a GPU: a program for each tile of an expert's rows and block of columns, through Triton.

The tiles are counted on the device, so that nothing waits for the sizes of the groups: as many programs as there can be, of which those
that are not needed end at once. A tile has rows of one expert only; programs of one block of columns follow each other, so that an expert's
weights come out of the L2 for all tiles but its first. Weights are read as they lie: bfloat16 or float32, or int8 with a scale for each
column.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.grouped_matmul import ALPHA, LIMIT

bf16, f32 = jnp.bfloat16, jnp.float32
load = plgpu.load


class Tiles(NamedTuple):
    rows: int
    columns: int  # of the output; with an activation of gate and of up, each
    depth: int
    stages: int
    warps: int


def fits(x, w, scale) -> bool:
    """Whether the kernel takes these, of which grouped_matmul.check has seen the shapes."""
    whole = x.shape[1] % 32 == 0 and w.shape[3] % 64 == 0
    return whole and (w.dtype == x.dtype or (w.dtype == jnp.int8 and x.dtype == bf16 and scale is not None and scale.ndim == 3))


def default_tiles(rows: int, experts: int, inner: int, columns: int) -> Tiles:
    """For `rows` rows over all experts: tiles of about an expert's share. A guess, not measured."""
    each = next(size for size in (16, 32, 64, 128) if size >= min(-(-rows // experts), 128))
    depth = next(size for size in ((128, 64, 32) if each <= 32 else (64, 32)) if inner % size == 0)
    width = next(size for size in ((64, 32) if each <= 32 else (128, 64, 32)) if columns % size == 0)
    return Tiles(each, width, depth, 3, 4 if each <= 64 else 8)


def grouped_matmul_gpu(x, w, group_sizes, *, layer: Any = 0, scale=None, bias=None, activation=None, tiles=None, interpret=False):
    """As grouped_matmul, of what `fits`. tiles: None for default_tiles. interpret: on a CPU."""
    rows, experts, columns = x.shape[0], w.shape[1], w.shape[3] // (1 if activation is None else 2)
    tiles = tiles or default_tiles(rows, experts, x.shape[1], columns)
    owner, first, count = _items(group_sizes, rows, tiles.rows)
    x = jnp.pad(x, ((0, max(0, tiles.rows - rows)), (0, 0)))  # a slice may not be longer than an array
    given = dict(x=x, w=w, owner=owner, first=first, count=count, layer=jnp.asarray(layer, jnp.int32).reshape(1))
    given |= {} if scale is None else dict(scale=scale)
    given |= {} if bias is None else dict(bias=bias)

    def kernel(*refs):
        _kernel(dict(zip((*given, "out"), refs, strict=True)), tiles, activation, columns)

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


def _kernel(refs: dict[str, Any], tiles: Tiles, activation: str | None, columns: int) -> None:
    item, begin = pl.program_id(0), pl.program_id(1) * tiles.columns
    expert, first, count, layer = (
        load(refs[name].at[at]) for name, at in (("owner", item), ("first", item), ("count", item), ("layer", jnp.int32(0)))
    )
    x, w = refs["x"], refs["w"]
    mine = lax.iota(jnp.int32, tiles.rows) < count
    rows = pl.ds(first, tiles.rows)
    parts = [pl.ds(begin, tiles.columns)] + ([] if activation is None else [pl.ds(begin + columns, tiles.columns)])
    precision = lax.Precision.HIGHEST if x.dtype == f32 else None

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

        zero = jnp.zeros((tiles.rows, tiles.columns), f32)
        sums = lax.fori_loop(0, x.shape[1] // tiles.depth, body, [zero] * len(parts))
        if "scale" in refs:
            sums = [acc * load(refs["scale"].at[layer, expert, part])[None, :].astype(f32) for acc, part in zip(sums, parts, strict=True)]
        if "bias" in refs:
            sums = [acc + load(refs["bias"].at[layer, expert, part])[None, :].astype(f32) for acc, part in zip(sums, parts, strict=True)]
        made = _activate(activation, *sums)
        plgpu.store(refs["out"].at[rows, parts[0]], made.astype(refs["out"].dtype), mask=mine[:, None])


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
