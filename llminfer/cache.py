"""The paged KV cache on the device: one page pool for each group of layers with the same window."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from llminfer.config import ModelConfig


@flax.struct.dataclass
class KVCache:
    """groups[g]: stacked layout: one array [layers of the group, pages, Hkv, page, 2 * head_dim]; listed layout: a
    tuple of such arrays with one layer each. See pallas_kernels/paged_attention.py for a row."""

    groups: tuple[Any, ...]


def abstract(c: ModelConfig, pages: tuple[int, ...], page_size: int, dtype: Any, *, stacked: bool) -> KVCache:
    """Shapes of the cache; pages: number of pages of each group."""

    def group(index: int):
        layers = len(c.group_layers(index))
        page = (c.num_kv_heads, page_size, 2 * c.head_dim)
        if stacked:
            return jax.ShapeDtypeStruct((layers, pages[index], *page), dtype)
        return (jax.ShapeDtypeStruct((1, pages[index], *page), dtype),) * layers

    return KVCache(tuple(group(i) for i in range(len(c.groups))))


def allocate(shapes: KVCache, *, poison: bool = False) -> KVCache:
    """The arrays, uninitialised: what no sequence owns is never read. poison fills them with NaN, to prove it."""
    where = jax.tree.map(lambda s: s.sharding, shapes)
    make = (lambda s: jnp.full(s.shape, jnp.nan, s.dtype)) if poison else (lambda s: lax.empty(s.shape, s.dtype))
    return jax.jit(lambda: jax.tree.map(make, shapes), out_shardings=where)()


def page_bytes(c: ModelConfig, page_size: int, itemsize: int, group: int) -> int:
    """Bytes of one page of a group, over all its layers."""
    return len(c.group_layers(group)) * c.num_kv_heads * page_size * 2 * c.head_dim * itemsize
