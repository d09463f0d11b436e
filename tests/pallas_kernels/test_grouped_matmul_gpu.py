"""The GPU's grouped matmul against the reference in float32, interpreted and on a GPU."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul_gpu import Tiles, default_tiles, fits, grouped_matmul_gpu
from pallas_kernels.quantized_matmul_gpu import for_gpu

bf16, f32, i8 = jnp.bfloat16, jnp.float32, jnp.int8


@dataclass(frozen=True)
class Case:
    sizes: tuple[int, ...]
    rows: int = 70  # those past the groups are NaN
    inner: int = 128
    columns: int = 128
    dtype: Any = bf16
    weights: Any = None
    bias: bool = False
    activation: str | None = None
    tiles: Tiles | None = None
    group: int = 0  # of turned weights, int4 or (uint8) MXFP4


i4, mx = jnp.int4, jnp.uint8
CASES = {
    "ragged": Case((1, 0, 15, 17, 33)),
    "all": Case((0, 70, 0), activation="silu"),
    "none": Case((0, 0, 0)),
    "one_each": Case((1,) * 40, rows=40, activation="gelu"),
    "few": Case((0, 2, 0, 1), rows=5, activation="silu"),
    "edges": Case((16, 15, 17, 16), rows=64, bias=True, activation="clamped"),
    "float32": Case((3, 40, 1), dtype=f32, activation="silu"),
    "int8": Case((20, 0, 31), weights=i8),
    "int8_gated": Case((20, 0, 31), weights=i8, bias=True, activation="silu"),
    "int4": Case((1, 0, 15, 17, 33), weights=i4, group=64),
    "int4_gated": Case((3, 0, 1), rows=6, inner=256, columns=64, weights=i4, group=128, bias=True, activation="silu"),
    "int4_several_groups": Case((9, 21), weights=i4, group=32, activation="gelu", tiles=Tiles(32, 32, 64, 2, 4)),
    "int4_part_of_a_group": Case((9, 21), inner=256, weights=i4, group=128, tiles=Tiles(16, 64, 64, 2, 4)),
    "mxfp4_gated": Case((3, 0, 1), rows=6, inner=192, columns=64, weights=mx, group=32, bias=True, activation="clamped"),
    "mxfp4": Case((20, 0, 31), weights=mx, group=32),
    "narrow": Case((9, 21), inner=96, columns=64, tiles=Tiles(32, 32, 32, 2, 4)),
}


def build(case: Case) -> tuple[Any, Any, Any, dict[str, Any]]:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), case.dtype)
    x = draw(case.rows, case.inner).at[sum(case.sizes) :].set(jnp.nan)
    shape = (2, len(case.sizes), case.inner, case.columns * (2 if case.activation else 1))
    if case.weights in (i4, mx):  # as they lie untouched; turned by `check`
        stored = shape if case.weights == i4 else (*shape[:2], case.inner // 2, shape[3])
        w = jnp.asarray(rng.integers(-8, 8, stored) if case.weights == i4 else rng.integers(0, 256, stored), jnp.int32).astype(case.weights)
    else:
        w = draw(*shape) / 8 if case.weights is None else jnp.asarray(rng.integers(-127, 128, shape), case.weights)
    of_scale = (*shape[:2], case.inner // case.group, shape[3]) if case.group else (*shape[:2], shape[3])
    scale = rng.uniform(0.001, 0.002, of_scale) * (16 if case.group else 1)
    scale = np.exp2(np.round(np.log2(scale))) if case.weights == mx else scale
    more: dict[str, Any] = {} if case.weights is None else dict(scale=jnp.asarray(scale, bf16 if case.weights == mx else f32))
    more |= dict(bias=draw(*shape[:2], shape[3])) if case.bias else {}
    return x, w, jnp.array(case.sizes, jnp.int32), more | dict(layer=jnp.int32(1), activation=case.activation)


def check(case: Case, interpret: bool) -> None:
    x, w, sizes, more = build(case)
    how: dict[str, Any] = dict(activation=case.activation, turned=case.group > 0, tiles=case.tiles, interpret=interpret)
    held = for_gpu(w, more["scale"]) if case.group else w
    assert fits(x, held, more.get("scale"), case.group > 0)
    found = jax.jit(lambda x, w, sizes, more: grouped_matmul_gpu(x, w, sizes, **more, **how))(
        x, held, sizes, {name: a for name, a in more.items() if name != "activation"}
    )
    wide = {name: a.astype(f32) if name == "bias" else a for name, a in more.items()}
    want = grouped_matmul(x.astype(f32), w.astype(f32) if case.weights is None else w, sizes, **wide)
    assert found.dtype == case.dtype and found.shape == (case.rows, case.columns)
    bound = 1e-5 if case.dtype == f32 else 1e-2
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(want), atol=bound * max(float(jnp.abs(want).max()), 1e-9))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_reference(case: Case) -> None:
    check(case, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_on_a_gpu(case: Case) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Triton backend is deprecated")  # from jax 0.11 on
        check(case, interpret=False)


def test_what_does_not_fit_is_the_references() -> None:
    """4-bit weights and scales by groups; the entry then gives what the reference gives."""
    x, w, sizes, more = build(replace(CASES["int8"], activation=None))
    grouped = {**more, "scale": jnp.repeat(more["scale"][:, :, None], 4, axis=2)}
    assert fits(x, w, more["scale"]) and not fits(x, w, grouped["scale"]) and not fits(x, w.astype(jnp.int4), more["scale"])
    found, want = (grouped_matmul(x, w, sizes, **how, impl="triton-interpret") for how in (grouped, more))
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(want, np.float32), rtol=0.02, atol=0.05)


def test_default_tiles_divide_and_fit() -> None:
    for rows, experts in ((1, 128), (512, 128), (4096, 128), (8, 8), (70000, 8)):
        for inner, columns in ((2048, 768), (768, 2048), (4096, 14336), (96, 64), (2880, 2880)):
            tiles = default_tiles(rows, experts, inner, columns)
            assert inner % tiles.depth == 0 and columns % tiles.columns == 0
            assert tiles.stages * tiles.depth * (tiles.rows + 2 * tiles.columns) * 2 <= 227 << 10, tiles
