"""The paged KV cache on the device: one page pool for each group of layers with the same window."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from llminfer.config import ModelConfig


@flax.struct.dataclass
class ScaledPages:
    """A cache of 8-bit numbers with float32 scales [layers, pages, 2 * Hkv] by page and head (pallas_kernels/kv_scales.py)."""

    pages: Any
    scale: Any


@flax.struct.dataclass
class KVCache:
    """groups[g]: stacked layout: one array [layers of the group, pages, Hkv, page, lanes], or ScaledPages of one; listed layout: a
    tuple of such with one layer each. See pallas_kernels/paged_attention.py for a row: ModelConfig.row_dim lanes, on a TPU whole tiles."""

    groups: tuple[Any, ...]


def row_lanes(c: ModelConfig, platform: str) -> int:
    """Lanes of a row: a TPU stores whole tiles of them anyway, and would copy a cache with other rows for a kernel."""
    tile = 128 if platform == "tpu" else 1
    return -(-c.row_dim // tile) * tile


def abstract(c: ModelConfig, pages: tuple[int, ...], page_size: int, dtype: Any, *, stacked: bool, platform: str = "cpu") -> KVCache:
    """Shapes of the cache; pages: number of pages of each group."""
    dtype = jnp.dtype(dtype)

    def arrays(layers: int, number: int):
        rows = jax.ShapeDtypeStruct((layers, number, c.num_kv_heads, page_size, row_lanes(c, platform)), dtype)
        if dtype.itemsize > 1:
            return rows
        return ScaledPages(rows, jax.ShapeDtypeStruct((layers, number, 2 * c.num_kv_heads), jnp.float32))

    def group(index: int):
        layers = len(c.group_layers(index))
        return arrays(layers, pages[index]) if stacked else (arrays(1, pages[index]),) * layers

    return KVCache(tuple(group(i) for i in range(len(c.groups))))


def allocate(shapes: KVCache, *, poison: bool = False) -> KVCache:
    """The arrays, uninitialised: what no sequence owns is never read. poison fills them with NaN, to prove it."""
    where = jax.tree.map(lambda s: s.sharding, shapes)
    worst = lambda s: 127 if jnp.issubdtype(s.dtype, jnp.integer) else jnp.nan
    make = (lambda s: jnp.full(s.shape, worst(s), s.dtype)) if poison else (lambda s: lax.empty(s.shape, s.dtype))
    return jax.jit(lambda: jax.tree.map(make, shapes), out_shardings=where)()


def page_bytes(c: ModelConfig, page_size: int, itemsize: int, group: int, platform: str = "cpu") -> int:
    """Bytes of one page of a group, over all its layers."""
    scales = 8 if itemsize == 1 else 0
    return len(c.group_layers(group)) * c.num_kv_heads * (page_size * row_lanes(c, platform) * itemsize + scales)
