"""One row times a matrix on a GPU, with what a decoder layer does before and after it in the same kernel.

    y = x @ w.T, or norm(x) @ w.T     norm: x / sqrt(mean(x ** 2) + eps) * weight (Zhang and Sennrich, arXiv 1910.07467)
    act(y[:N/2]) * y[N/2:]            where gate is given
    y + residual                      where that is given

    x [1, K], w [N, K], weight [K], all bfloat16   residual like the output

What binds is reading w. A program asks for all of its rows of w at once; a barrier keeps the compiler from moving the loads down to their
use, one after the other. The norm's factor is multiplied in at the end, so that nothing waits for it. Norm and activation then cost little
beside the reading, while kernels of their own would each take as long as 5 MB of w. Of 8-bit weights XLA's product is faster.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.round_gpu import ACTIVATIONS, activate

bf16, f32 = jnp.bfloat16, jnp.float32
load = plgpu.load


class Tiles(NamedTuple):
    rows: int  # of w in a program; of each half, with a gate
    depth: int  # numbers of a row in one load
    warps: int


# Measured on an H100: (N, K) -> tiles. tests/bench_gpu_matmul.py --only one_row finds them.
TUNED = {
    (6144, 4096): Tiles(2, 4096, 8),
    (4096, 4096): Tiles(4, 1024, 2),
    (28672, 4096): Tiles(2, 2048, 8),
    (4096, 14336): Tiles(4, 2048, 8),
    (128256, 4096): Tiles(4, 2048, 8),
}


def matvec_fits(columns: int, inner: int, gate: str | None = None) -> bool:
    """Whether matvec_gpu takes w of this shape."""
    return columns % (4 if gate else 2) == 0 and inner % 1024 == 0 and inner // default_tiles(columns, inner).depth <= 16


def default_tiles(columns: int, inner: int) -> Tiles:
    """What was measured for a shape, else a guess."""
    depth = next((size for size in (4096, 2048, 1024) if inner % size == 0), 1024)
    return TUNED.get((columns, inner)) or Tiles(2, depth, 8)


class Site(NamedTuple):
    """What is static about a kernel."""

    tiles: Tiles
    columns: int
    inner: int
    eps: float | None  # of the norm
    offset: float  # added to the norm's weight
    gate: str | None
    interpret: bool


def matvec_gpu(
    x,
    w,
    *,
    norm: Any = None,
    eps: float = 0.0,
    offset: float = 0.0,
    gate: str | None = None,
    residual: Any = None,
    out: Any = f32,
    tiles: Tiles | None = None,
    interpret=False,
) -> jax.Array:
    """The row [1, N], or [1, N / 2] with a gate, in `out`; summed in float32. norm: the weight of a norm before the product, which has
    `offset` added. K a multiple of 1024. Raises ValueError for shapes and types that it does not take."""
    columns, inner = w.shape
    if x.shape != (1, inner) or not matvec_fits(columns, inner, gate) or x.dtype != bf16 or w.dtype != bf16:
        rule = "must be bfloat16 [1, K] and [N, K], K a multiple of 1024, N of 2 (4 with a gate)"
        raise ValueError(f"x {x.dtype} {x.shape}, w {w.dtype} {w.shape}: {rule}")
    if gate not in (None, *ACTIVATIONS):
        raise ValueError(f"gate={gate!r}: legal: None, {', '.join(ACTIVATIONS)}")
    made = columns // 2 if gate else columns
    if residual is not None and residual.shape != (1, made):
        raise ValueError(f"residual {residual.shape}: must be {(1, made)}")
    given = {name: a.reshape(-1) for name, a in dict(x=x, norm=norm, residual=residual).items() if a is not None} | dict(w=w)
    tiles = tiles or default_tiles(columns, inner)
    site = Site(tiles, columns, inner, None if norm is None else eps, offset, gate, bool(interpret))

    def kernel(*refs):
        _kernel(dict(zip((*given, "out"), refs, strict=True)), site)

    call = pl.pallas_call(
        kernel,
        grid=(made // tiles.rows,),
        out_shape=jax.ShapeDtypeStruct((made,), out),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=1),
        interpret=interpret,
        name="matvec_gpu",
    )
    return call(*given.values())[None]


def _kernel(refs: dict[str, Any], site: Site) -> None:
    rows, depth = site.tiles.rows, site.tiles.depth
    first = pl.program_id(0) * rows
    parts = [pl.ds(first, rows)] + ([pl.ds(first + site.columns // 2, rows)] if site.gate else [])
    steps = [pl.ds(k, depth) for k in range(0, site.inner, depth)]
    held = [[load(refs["w"].at[part, step]) for step in steps] for part in parts]
    xs = [load(refs["x"].at[step]).astype(f32) for step in steps]
    if not site.interpret:
        plgpu.debug_barrier()
    factor = None
    if site.eps is not None:
        square = jnp.zeros(depth, f32)
        for x in xs:
            square += x * x
        factor = lax.rsqrt(jnp.sum(square) / site.inner + site.eps)
        weights = [load(refs["norm"].at[step]).astype(f32) + site.offset for step in steps]
        xs = [x * weight for x, weight in zip(xs, weights, strict=True)]
    sums = []
    for tiles in held:
        acc = jnp.zeros((rows, depth), f32)
        for tile, x in zip(tiles, xs, strict=True):
            acc += tile.astype(f32) * x[None, :]
        sums.append(acc.sum(axis=1) if factor is None else acc.sum(axis=1) * factor)
    y = sums[0] if site.gate is None else activate(sums[0], site.gate) * sums[1]
    if "residual" in refs:
        y += load(refs["residual"].at[parts[0]]).astype(f32)
    plgpu.store(refs["out"].at[parts[0]], y.astype(refs["out"].dtype))
