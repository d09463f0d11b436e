"""Rows of the TPU's paged attention as its kernels take them, and back. Decode works on [rows, heads, ...]; a tile of queries is cut out of
an array of two dimensions, tokens and the lanes of all heads, as a projection leaves it: nothing changes places in HBM."""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import kv_scales
from pallas_kernels.paged_attention import tree_depth
from pallas_kernels.paged_attention_plan import LANES, Plan


def _flat(plan: Plan, x):
    """x [T, heads, lanes] as [T, heads * lanes], one tile of rows at least."""
    return jnp.pad(x.reshape(x.shape[0], -1), ((0, max(plan.tile - x.shape[0], 0)), (0, 0)))


def to_tiles(plan: Plan, q):
    """q [T, Hq, D] to [T, Hq * width]; for decode to [T, Hkv, rows, width]."""
    q = jnp.pad(q, ((0, 0), (0, 0), (0, plan.width - plan.head_dim)))
    if not plan.decode:
        return _flat(plan, q)
    q = q.reshape(q.shape[0], plan.heads * plan.chunks, plan.group, plan.width)
    return jnp.pad(q, ((0, 0), (0, 0), (0, plan.rows - plan.group), (0, 0)))


def new_to_tiles(plan: Plan, new):
    """New rows of the cache [T, Hkv, 2D] to [T, Hkv * row]; for decode to [T, chunks, heads, row]."""
    new = jnp.pad(new, ((0, 0), (0, 0), (0, plan.row - new.shape[-1])))
    return new.reshape(new.shape[0], plan.chunks, plan.heads, new.shape[-1]) if plan.decode else _flat(plan, new)


def from_tiles(plan: Plan, out, t: int):
    """The output, [T, Hq * result_width] or for decode [T, Hkv, rows, width], as [T, Hq, D]."""
    heads = plan.heads * plan.chunks * plan.group
    if plan.decode:
        return out[:, :, : plan.group, plan.first_value : plan.first_value + plan.head_dim].reshape(t, heads, plan.head_dim)
    return out[:t].reshape(t, heads, plan.result_width)[:, :, : plan.head_dim]


def lse_from_tiles(plan: Plan, lse, t: int):
    """[tiles, Hkv, rows, LANES] for decode and [tiles, Hkv, 1, rows] otherwise as [T, Hq]."""
    if plan.decode:
        return lse[:, :, : plan.group, 0].reshape(t, -1)
    lse = lse.reshape(lse.shape[0], -1, plan.group, plan.tile).transpose(0, 3, 1, 2)
    return lse.reshape(-1, lse.shape[2] * plan.group)[:t]


def logits_to_tiles(plan: Plan, logits):
    """[Hq] to [Hkv, rows, LANES] for decode and [Hkv, 1, rows] otherwise."""
    logits = logits.reshape(-1, plan.group)
    if plan.decode:
        logits = jnp.pad(logits, ((0, 0), (0, plan.rows - plan.group)))
        return jnp.broadcast_to(logits[:, :, None], (*logits.shape, LANES))
    return jnp.repeat(logits, plan.tile, axis=1)[:, None]


def tree_to_tiles(plan: Plan, tree):
    """Words [T, W] of nodes that each token sees to [tiles, W + 1, rows]; the last is how far the token lies behind its root."""
    tree = jnp.concatenate([tree, tree_depth(tree)[:, None]], axis=1)
    tree = jnp.pad(tree, ((0, -tree.shape[0] % plan.tile), (0, 0))).reshape(-1, plan.tile, tree.shape[1])
    return jnp.tile(tree.transpose(0, 2, 1), (1, 1, plan.group))


def scale_operands(plan: Plan, kv_scale, ratio, page_table, low, kv_len):
    """The scales [P, 2 * Hkv] of one layer and ratio [R, 2 * Hkv] as the kernel's operands. Of pages that no row sees, zeros."""
    seqs, blocks, start = kv_len.shape[0], pl.cdiv(plan.pages_per_seq, plan.block_pages), jnp.arange(plan.pages_per_seq) * plan.page
    seen = (start < kv_len[:, None]) & (start + plan.page > low[:, None])
    scales = jnp.where(seen[..., None], kv_scale[jnp.where(seen, page_table, 0)], 0.0)
    scales = jnp.pad(scales, ((0, 0), (0, blocks * plan.block_pages - plan.pages_per_seq), (0, 0)))
    scales = scales.reshape(seqs, blocks, plan.block_pages, plan.chunks, -1).transpose(0, 3, 1, 4, 2)
    row = kv_scales.lanes(ratio, plan.head_dim, plan.row)
    return {"scales": scales.reshape(seqs, plan.chunks, blocks, -1), "ratio": row.reshape(seqs, plan.chunks, plan.heads, -1)}
