"""Scales of a paged cache in int8 or fp8: one float32 for each page, key-value head, and keys or values.

    kv_scale [L, P, 2 * Hkv]: the keys' scale of head h at 2 * h, the values' at 2 * h + 1; what was cached is number times scale

A page takes the scale that its largest number needs. Where a new token needs more, the page's scale grows, and what the page held is
rounded once more; a scale never shrinks while the page is in use, so that a page whose scale stays is not touched.
"""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.dealt import entry_of, is_held, of_rows

SMALLEST = 1e-30  # of a scale: zeros have one too


def largest(dtype) -> float:
    """The largest number of a cache's type."""
    return 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)


def rounded(dtype, x):
    """x in float32, rounded to what an integer type holds; a float type rounds by itself."""
    return jnp.round(x) if jnp.issubdtype(dtype, jnp.integer) else x


def begun(page: int, page_table, context, dealt=None):
    """The page [R] that each sequence's first new token goes into, behind context [R] tokens, if it is held."""
    return page_table[jnp.arange(context.shape[0]), entry_of(context, page, dealt, page_table.shape[1])]


def owners(tokens: int, page: int, page_table, q_start, q_len, kv_len, dealt=None):
    """Of each of `tokens` rows: the sequence it belongs to, its position, the page that holds it, and whether it belongs to one at all
    (and to a page that is held, see dealt.py)."""
    token = jnp.arange(tokens)[:, None]
    mine = (token >= q_start) & (token < q_start + q_len)  # [T, R]
    owner = jnp.argmax(mine, axis=1)
    pos = (kv_len - q_len - q_start)[owner] + token[:, 0]
    own = of_rows(dealt, owner)
    ids = page_table[owner, entry_of(pos, page, own, page_table.shape[1])]
    return owner, pos, ids, mine.any(1) if dealt is None else mine.any(1) & is_held(pos, page, own)


def grow(k, v, kv_scale, dtype, page: int, *, layer, page_table, q_start, q_len, kv_len, dealt=None):
    """For new k and v [T, Hkv, D] on their way into pages of `page` tokens of type `dtype`. Returns (kv_scale, rows, ratio): the scales
    with what the new rows need; the rows [T, Hkv, 2 * D] in the cache's type; ratio [R, 2 * Hkv], what the numbers that the page of a
    sequence's first new token held before are to be multiplied by."""
    tokens, heads, dim = k.shape
    owner, pos, ids, owned = owners(tokens, page, page_table, q_start, q_len, kv_len, dealt)
    context, nowhere = kv_len - q_len, kv_scale.shape[1]
    both = jnp.stack([k, v], axis=2).astype(jnp.float32)  # [T, Hkv, 2, D]
    need = jnp.maximum(jnp.abs(both).max(-1) / largest(dtype), SMALLEST).reshape(tokens, 2 * heads)
    fresh = owned & (pos // page * page >= context[owner])  # a page that holds no token from before
    grown = kv_scale.at[layer, jnp.where(fresh, ids, nowhere)].set(0.0, mode="drop")
    grown = grown.at[layer, jnp.where(owned, ids, nowhere)].max(need, mode="drop")
    mine = jnp.where(owned[:, None], grown[layer, ids], 1.0).reshape(tokens, heads, 2, 1)
    rows = jnp.where(owned[:, None, None, None], both / mine, 0.0)
    rows = rounded(dtype, rows).astype(dtype)
    shared, begins_in = ((context % page != 0) & (q_len > 0))[:, None], begun(page, page_table, context, dealt)
    shared = shared if dealt is None else shared & is_held(context, page, dealt)[:, None]
    ratio = jnp.where(shared, kv_scale[layer, begins_in] / jnp.where(shared, grown[layer, begins_in], 1.0), 1.0)
    return grown, rows.reshape(tokens, heads, 2 * dim), ratio


def lanes(scale, dim: int, row: int):
    """Scales [..., 2 * Hkv] for each lane of a cache row: [..., Hkv, row]; what fills the row behind key and value has scale 1."""
    scale = jnp.repeat(scale.reshape(*scale.shape[:-1], -1, 2), dim, axis=-1)
    return jnp.pad(scale, [(0, 0)] * (scale.ndim - 1) + [(0, row - 2 * dim)], constant_values=1.0)


def rescale(kv, ratio, dim: int, *, layer, page_table, context, dealt=None):
    """The cache kv [L, P, Hkv, page, row] with what the page of each sequence's first new token holds already, positions below
    context [R], times ratio [R, 2 * Hkv] as grow gives it."""
    page = kv.shape[3]
    ids = begun(page, page_table, context, dealt)
    grown = (ratio < 1).any(axis=1)
    old = kv[layer, ids].astype(jnp.float32)
    new = rounded(kv.dtype, old * lanes(ratio, dim, kv.shape[4])[:, :, None])
    kept = jnp.arange(page)[:, None] < (context % page)[:, None, None, None]
    return kv.at[layer, jnp.where(grown, ids, kv.shape[1])].set(jnp.where(kept, new, old).astype(kv.dtype), mode="drop")


def unpack(pages, scale, dim: int, dtype):
    """Pages [..., Hkv, page, row] times their scales [..., 2 * Hkv]."""
    return (pages.astype(jnp.float32) * lanes(scale, dim, pages.shape[-1])[..., None, :]).astype(dtype)
