"""Attention of a ragged batch over a paged KV cache, and the write of the new keys and values into their pages.

Each sequence r of R brings q_len[r] new tokens (0, 1 or many): rows q_start[r] .. q_start[r]+q_len[r]-1 of q, k and v,
at positions kv_len[r]-q_len[r] .. kv_len[r]-1 of its context. Their keys and values go into the cache first; then each
token attends to positions max(0, p-window+1) .. p of its own sequence (window 0: 0 .. p). Logical page i of sequence r
is physical page page_table[r, i]. What no sequence owns may hold anything, NaN included. With `sinks` S > 0 a token also attends to
those of positions 0 .. S-1 that its window has left behind, with a query of its own, q_sinks: rotated as if the tokens between were
not there (StreamingLLM: Xiao et al., arXiv 2309.17453).

    q [T, Hq, D]   k, v [T, Hkv, D]   kv [L, P, Hkv, page, 2 * D]: keys in lanes 0..D-1, values in lanes D..2*D-1
    page_table int32 [R, pages_per_sequence]   q_start, q_len, kv_len int32 [R]   layer, window int32 scalars   q_sinks like q

Keys and values share the lanes of one row so that a token of one head is one contiguous vector: head_dim 64 then fills
the 128 lanes of a TPU register, and a page is one transfer. Online softmax: Milakov and Gimelshein, arXiv 1805.02867;
pages: Kwon et al., arXiv 2309.06180.

`impl` chooses the body: "reference" (plain jnp, below: the contract and what a CPU runs), "batched" (the same with all
decoding sequences at once: what a GPU runs), "pallas" (the TPU kernel of paged_attention_tpu.py), "interpret" (that kernel,
interpreted on a CPU).
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

# Tokens of context that the reference handles at a time, for sequences that decode and for chunks; and query rows of a
# chunk at a time. The best on XLA:CPU of 32 to 640 (LOG.md).
DECODE_BLOCK, PREFILL_BLOCK = 128, 256
Q_BLOCK = 256
_NEG = -1e30


def paged_attention(
    q, k, v, kv, *, layer, page_table, q_start, q_len, kv_len, window, scale, q_max, softcap=None, sinks=0, q_sinks=None, impl="reference"
):
    """Writes k and v into kv and attends. Returns (out [T, Hq, D] of q's dtype, kv); rows of T that belong to no
    sequence come back as zeros. q_max: static bound of q_len (1: pure decode). softcap: scores become
    softcap * tanh(scores / softcap). sinks: static. Raises ValueError for shapes that cannot work."""
    check(q, k, v, kv, page_table, q_start, q_len, kv_len, q_max)
    args = dict(layer=layer, page_table=page_table, q_start=q_start, q_len=q_len, kv_len=kv_len, window=window)
    args |= dict(scale=scale, softcap=softcap, q_max=q_max)
    if sinks and (q_sinks is None or q_sinks.shape != q.shape):
        raise ValueError(f"q_sinks {None if q_sinks is None else q_sinks.shape}: must be {q.shape}, as q, where there are sinks")
    if impl in ("reference", "batched"):
        return paged_attention_reference(q, k, v, kv, **args, sinks=sinks, q_sinks=q_sinks, batched=impl == "batched")
    if impl not in ("pallas", "interpret"):
        raise ValueError(f"impl={impl!r}: legal: reference, batched, pallas, interpret")
    from jax.experimental.pallas import tpu as pltpu

    from pallas_kernels.paged_attention_tpu import paged_attention_tpu

    mode: Any = pltpu.InterpretParams() if impl == "interpret" else False
    return paged_attention_tpu(q, k, v, kv, **args, sinks=sinks, q_sinks=q_sinks, interpret=mode)


def check(q, k, v, kv, page_table, q_start, q_len, kv_len, q_max):
    """Static checks shared by all bodies: names the dimension that is wrong. Raises ValueError."""
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or kv.ndim != 5:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}, kv {kv.shape}: need [T,Hq,D], [T,Hkv,D] twice and [L,P,Hkv,page,2D]")
    tokens, q_heads, dim = q.shape
    kv_heads = kv.shape[2]
    if k.shape != (tokens, kv_heads, dim):
        raise ValueError(f"k {k.shape}: must be [{tokens}, {kv_heads}, {dim}] for q {q.shape} and kv {kv.shape}")
    if kv.shape[4] != 2 * dim:
        raise ValueError(f"kv lanes {kv.shape[4]}: must be twice head_dim={dim}")
    if q_heads % kv_heads:
        raise ValueError(f"query heads {q_heads}: must be a multiple of the {kv_heads} kv heads")
    if kv.shape[3] % 8:
        raise ValueError(f"page size {kv.shape[3]}: must be a multiple of 8")
    rows = page_table.shape[0]
    if any(x.shape != (rows,) for x in (q_start, q_len, kv_len)):
        raise ValueError(f"q_start {q_start.shape}, q_len {q_len.shape}, kv_len {kv_len.shape}: must all be [{rows}], as page_table")
    if not 1 <= q_max <= tokens:
        raise ValueError(f"q_max={q_max}: must be from 1 to the {tokens} rows of q")


def paged_attention_reference(
    q, k, v, kv, *, layer, page_table, q_start, q_len, kv_len, window, scale, softcap, q_max, sinks=0, q_sinks=None, batched=False
):
    """The contract in plain jnp: see the module. Work grows with the live context (batched: with the longest), not with
    the table."""
    kv = write_pages(k, v, kv, layer=layer, page_table=page_table, q_start=q_start, q_len=q_len, kv_len=kv_len)
    look = functools.partial(_look, kv=kv, layer=layer, window=window, scale=scale, softcap=softcap, sinks=sinks)
    qs = q[:, None] if q_sinks is None else jnp.stack([q, q_sinks], axis=1)  # [T, 1 or 2, Hq, D]
    out = _one_each(qs, page_table, q_start, jnp.where(q_len == 1, kv_len, 0), look, batched)
    if q_max > 1:
        out = _in_blocks(qs, out, page_table, q_start, jnp.where(q_len > 1, q_len, 0), kv_len, look)
    return out, kv


def write_pages(k, v, kv, *, layer, page_table, q_start, q_len, kv_len):
    """Scatters the new rows into their pages: in place when kv is donated. Rows of nobody are dropped."""
    token = jnp.arange(k.shape[0])[:, None]
    mine = (token >= q_start) & (token < q_start + q_len)  # [T, R]
    owner = jnp.argmax(mine, axis=1)
    pos = (kv_len - q_len - q_start)[owner] + token[:, 0]
    page_size = kv.shape[3]
    page = page_table[owner, jnp.clip(pos // page_size, 0, page_table.shape[1] - 1)]
    page = jnp.where(mine.any(1), page, kv.shape[1])  # out of range: dropped
    new = jnp.concatenate([k, v], axis=-1).astype(kv.dtype)  # [T, Hkv, 2D]
    heads = jnp.arange(kv.shape[2])
    return kv.at[layer, page[:, None], heads[None], (pos % page_size)[:, None]].set(new, mode="drop")


def _one_each(qs, page_table, q_start, kv_len, look, batched):
    """The sequences that bring one token each (kv_len 0: nothing to do): all at once, or one after the other, so that each
    costs its own length (XLA:CPU is no faster at several). Other rows are zeros."""
    live = kv_len > 0
    rows = jnp.clip(q_start, 0, qs.shape[0] - 1)
    at_once = lambda q, length, table: look(q[:, None], (length - 1)[:, None], table, block=DECODE_BLOCK)[:, 0]
    each = (qs[rows], kv_len, page_table)
    found = at_once(*each) if batched else lax.map(lambda row: at_once(*(x[None] for x in row))[0], each)
    return jnp.zeros_like(qs[:, 0]).at[jnp.where(live, q_start, qs.shape[0])].set(found.astype(qs.dtype), mode="drop")


def _in_blocks(qs, out, page_table, q_start, q_len, kv_len, look):
    """Blocks of query rows one after the other, as many as the sequences have: padding costs nothing."""
    size = min(Q_BLOCK, qs.shape[0])
    ends = jnp.cumsum((q_len + size - 1) // size)  # blocks up to and including each sequence
    padded, out = (jnp.pad(x, ((0, size), *[(0, 0)] * (x.ndim - 1))) for x in (qs, out))

    def step(carry):
        i, out = carry
        row = jnp.searchsorted(ends, i, side="right")
        offset = (i - jnp.where(row > 0, ends[row - 1], 0)) * size + jnp.arange(size)
        inside = offset < q_len[row]
        pos = jnp.where(inside, kv_len[row] - q_len[row] + offset, -1)
        start = q_start[row] + offset[0]
        rows = lax.dynamic_slice_in_dim(padded, start, size)
        found = look(rows[None], pos[None], page_table[row][None], block=PREFILL_BLOCK)[0]
        old = lax.dynamic_slice_in_dim(out, start, size)
        return i + 1, lax.dynamic_update_slice_in_dim(out, jnp.where(inside[:, None, None], found.astype(qs.dtype), old), start, axis=0)

    return lax.while_loop(lambda c: c[0] < ends[-1], step, (0, out))[1][: qs.shape[0]]


def _look(qs, pos, table, *, kv, layer, window, scale, softcap, sinks, block):
    """Attention of qs [R, C, 1 or 2, Hq, D] (q, and q_sinks where there are sinks) at positions pos [R, C] (-1: nothing to see) over
    the pages of table [R, n]. Returns float32 [R, C, Hq, D]. A loop over blocks of `block` tokens, from the first that a window
    reaches to the last."""
    rows, chunk, _, q_heads, dim = qs.shape
    heads, page_size = kv.shape[2], kv.shape[3]
    group, pages_a_block = q_heads // heads, max(1, block // page_size)
    block = pages_a_block * page_size
    # dynamic_slice clamps: a table that is a whole number of blocks long keeps the last block where it belongs.
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % pages_a_block)))
    precision = lax.Precision.HIGHEST if kv.dtype == jnp.float32 else None
    dot = functools.partial(_products if chunk == 1 else jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    whole = chunk == 1  # zeros under the value lanes: the product reads whole rows, which need not be cut out
    qs = (qs * scale).astype(kv.dtype).reshape(rows, chunk, -1, heads, group, dim)
    qs = qs.transpose(2, 0, 3, 1, 4, 5).reshape(-1, rows, heads, chunk * group, dim)
    if whole:
        qs = jnp.concatenate([qs, jnp.zeros_like(qs)], axis=-1)
    pos = jnp.broadcast_to(pos[:, :, None], (rows, chunk, group)).reshape(rows, 1, chunk * group, 1)
    low = jnp.where(window > 0, pos - window + 1, 0)
    first = jnp.maximum(jnp.min(jnp.where(pos >= 0, low, jnp.iinfo(jnp.int32).max)), 0) // block
    last = (jnp.max(pos) + block) // block

    def attend(q, ids, inside, sums):
        """Adds the tokens of pages ids [R, n] that are inside [R, 1, C * G, n * page] to the running sums."""
        top, total, acc = sums
        found = kv[layer, ids].swapaxes(1, 2).reshape(rows, heads, inside.shape[-1], 2 * dim)
        # Values that nobody may see become 0: a NaN there would survive its zero weight.
        seen = inside.any(axis=2)[..., None]
        found = jnp.where(seen, found, 0)
        keys, values = (found, found) if whole else (found[..., :dim], found[..., dim:])
        scores = dot("rhqd,rhtd->rhqt", q, keys)
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        scores = jnp.where(inside, scores, _NEG)
        new_top = jnp.maximum(top, scores.max(-1))
        weight = jnp.exp(scores - new_top[..., None])
        keep = jnp.exp(top - new_top)
        mixed = dot("rhqt,rhtd->rhqd", weight.astype(kv.dtype), values)
        return new_top, total * keep + weight.sum(-1), acc * keep[..., None] + mixed[..., -dim:]

    def step(carry):
        i, *sums = carry
        ids = lax.dynamic_slice_in_dim(table, i * pages_a_block, pages_a_block, axis=1)
        at = i * block + jnp.arange(block)
        return i + 1, *attend(qs[0], ids, (at <= pos) & (at >= low), sums)

    shape = (rows, heads, chunk * group)
    sums = (jnp.full(shape, _NEG, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros((*shape, dim), jnp.float32))
    if sinks:
        first_pages = table[:, : -(-sinks // page_size)]
        at = jnp.arange(first_pages.shape[1] * page_size)
        sums = attend(qs[1], first_pages, (at < sinks) & (at < low), sums)
    _, _, total, acc = lax.while_loop(lambda c: c[0] < last, step, (first, *sums))
    # By position and not by what was found: a sequence's own NaN must come through, on a GPU too, where max drops it.
    out = jnp.where(pos >= 0, acc / total[..., None], 0)
    return out.reshape(rows, heads, chunk, group, dim).swapaxes(1, 2).reshape(rows, chunk, q_heads, dim)


def _products(form, left, right, **how):
    """The einsum with the query axis of `left` taken apart: matrix-vector products, which XLA:CPU compiles into its loops,
    where it would call a library for each small matrix product."""
    form = form.replace("q", "")
    return jnp.stack([jnp.einsum(form, left[:, :, i], right, **how) for i in range(left.shape[2])], axis=2)
