"""Attention of a ragged batch over a paged KV cache, and the write of the new keys and values into their pages.

Each sequence r of R brings q_len[r] new tokens (0, 1 or many): rows q_start[r] .. q_start[r]+q_len[r]-1 of q, k and v,
at positions kv_len[r]-q_len[r] .. kv_len[r]-1 of its context. Their keys and values go into the cache first; then each
token attends to positions max(0, p-window+1) .. p of its own sequence (window 0: 0 .. p). Logical page i of sequence r
is physical page page_table[r, i]. What no sequence owns may hold anything, NaN included. With `sinks` S > 0 a token also attends to
those of positions 0 .. S-1 that its window has left behind, with a query of its own, q_sinks: rotated as if the tokens between were
not there (StreamingLLM: Xiao et al., arXiv 2309.17453).

    q [T, Hq, D]   k, v [T, Hkv, D]   kv [L, P, Hkv, page, lanes]: keys in lanes 0..D-1, values in D..2*D-1, zeros behind
    page_table int32 [R, pages_per_sequence]   q_start, q_len, kv_len int32 [R]   layer, window int32 scalars   q_sinks like q

What may be asked for beside that:
    sink_logits [Hq]   one more key without a value in each head's softmax (gpt-oss)
    packed, rope       with k and v None, q [T, Hkv, Hq / Hkv + 2, D] holds all three, and queries and keys are rotated here (rope.py)
    tree int32 [T, W]  the new tokens of a sequence are the nodes of a tree (drafts to be verified): bit j of the words of a row says
                       whether it sees the j-th new token of its sequence. A row sees itself and its ancestors, which lie before it, and its
                       position is its depth behind the context; a window must be longer than the tree is deep
    chunked            a token sees the positions of its own chunk of `window` positions, up to itself, and none of other chunks (Llama 4)
    value_dim          rows of the cache are keys alone, in lanes 0..D-1, and values are the first value_dim of these (a latent: arXiv
                       2405.04434); v is None, out [T, Hq, value_dim]
    kv_scale float32 [L, P, 2 * Hkv]   a cache of int8 or float8_e4m3fn with scales by page and head (kv_scales.py)
    with_lse           the logarithm of each row's sum of exponentials, float32 [T, Hq], by which parts of a context are merged
    dealt              (ways, turn int32 [R]), with with_lse: the pages of each context are dealt out to `ways` caches (dealt.py), of which
                       this is one, and page_table has those that it holds. Lengths are of the whole context. New rows of other caches'
                       pages are not written, and a row sees what is held here: where that is nothing, zeros and a sum of -inf. No window

Keys and values share the lanes of one row so that a token of one head is one contiguous vector: head_dim 64 then fills
the 128 lanes of a TPU register, and a page is one transfer. Online softmax: Milakov and Gimelshein, arXiv 1805.02867;
pages: Kwon et al., arXiv 2309.06180. A row that is key and value at once is read once for both: with Hkv = 1 and D = 576 a page is one
transfer of whole tiles of lanes, its first four the values, and all query heads are the rows of one product.

`impl` chooses the body: "reference" (plain jnp, below: the contract and what a CPU runs), "batched" (the same with all
decoding sequences at once), "pallas" (the TPU kernel of paged_attention_tpu.py), "interpret" (that kernel, interpreted on a CPU),
"triton" (the GPU kernels of paged_attention_gpu.py) and "triton-interpret". What neither kernel has yet goes to the reference, whatever
`impl` says (on a TPU or GPU as "batched"): value_dim, chunked, and on a GPU dealt.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels import kv_scales
from pallas_kernels.dealt import held, of_rows, position_of
from pallas_kernels.rope import apart

# Tokens of context that the reference handles at a time, for sequences that decode and for chunks; and query rows of a
# chunk at a time. The best on XLA:CPU of 32 to 640 (LOG.md).
DECODE_BLOCK, PREFILL_BLOCK = 128, 256
Q_BLOCK = 256
MOST_PRODUCTS = 32  # query heads of a kv head that are multiplied one by one
_NEG = -1e30
FALLBACK = {"pallas": "batched", "triton": "batched", "interpret": "reference", "triton-interpret": "reference"}


def paged_attention(
    q,
    k,
    v,
    kv,
    *,
    layer,
    page_table,
    q_start,
    q_len,
    kv_len,
    window,
    scale,
    q_max,
    rope=None,
    softcap=None,
    sinks=0,
    q_sinks=None,
    sink_logits=None,
    tree=None,
    kv_scale=None,
    kv_splits=1,
    value_dim=None,
    chunked=False,
    with_lse=False,
    dealt=None,
    debug=False,
    chip=None,
    blocks=None,
    impl="reference",
):
    """Writes k and v into kv and attends. Returns (out [T, Hq, D] of q's dtype, zeros in rows of no sequence, kv), then kv_scale if it was
    given, then the sums if with_lse. q_max: static bound of q_len (1: pure decode). softcap: scores become softcap * tanh(score / softcap).
    kv_splits: static, parts in which the TPU kernel looks at a context in decode. debug: a sequence with a page id, length or window that
    cannot be is not touched, its rows are NaN. chip, blocks: of a TPU, by which tuned.toml is asked, or block sizes. Raises ValueError."""
    packed = None
    if k is None:
        packed, (q, k, v) = q, apart(q, rope)
    check(q, k, v, kv, page_table, q_start, q_len, kv_len, q_max, value_dim)
    if chunked or value_dim is not None or (dealt is not None and impl.startswith("triton")):
        impl = FALLBACK.get(impl, impl)
    check_options(q, kv, window, sinks, q_sinks, sink_logits, tree, kv_scale, kv_splits)
    check_dealt(dealt, page_table, with_lse, sinks, sink_logits, tree)
    sound, asked = _sound(q.shape[0], kv, layer, page_table, q_start, q_len, kv_len, window, dealt) if debug else None, q_len
    q_len = q_len if sound is None else jnp.where(sound, q_len, 0)
    args: dict[str, Any] = dict(layer=layer, page_table=page_table, q_start=q_start, q_len=q_len, kv_len=kv_len, window=window)
    args |= dict(scale=scale, softcap=softcap, q_max=q_max, sinks=sinks, q_sinks=q_sinks, sink_logits=sink_logits, tree=tree)
    tpu = dict(kv_splits=kv_splits, with_lse=with_lse, chip=chip, blocks=blocks, dealt=dealt)
    body = _body(impl, tpu, dict(packed=packed, rope=rope), dict(value_dim=value_dim, chunked=chunked, dealt=dealt))
    out, kv, kv_scale, lse = body(q, k, v, kv, **args, kv_scale=kv_scale)
    if sound is not None:
        out, lse = _spoil(out, sound, q_start, asked), _spoil(lse, sound, q_start, asked) if with_lse else None
    return (out, kv, *([] if kv_scale is None else [kv_scale]), *([lse] if with_lse else []))


def _body(impl, tpu: dict[str, Any], gpu: dict[str, Any], plain: dict[str, Any]) -> Any:
    """What runs the op, with what it alone is told."""
    if impl in ("reference", "batched"):
        return functools.partial(paged_attention_reference, **plain, batched=impl == "batched")
    if impl in ("pallas", "interpret"):
        from jax.experimental.pallas import tpu as pltpu

        from pallas_kernels.paged_attention_tpu import paged_attention_tpu

        mode: Any = pltpu.InterpretParams() if impl == "interpret" else False
        return functools.partial(paged_attention_tpu, **tpu, interpret=mode)
    if impl in ("triton", "triton-interpret"):
        from pallas_kernels.paged_attention_gpu import paged_attention_gpu

        return functools.partial(paged_attention_gpu, **gpu, interpret=impl != "triton")
    raise ValueError(f"impl={impl!r}: legal: reference, batched, pallas, interpret, triton, triton-interpret")


def _sound(tokens, kv, layer, page_table, q_start, q_len, kv_len, window, dealt):
    """Which sequences [R] have rows, lengths and page ids that exist."""
    pages, page, most = kv.shape[1], kv.shape[3], page_table.shape[1] * kv.shape[3] * (1 if dealt is None else dealt[0])
    low = jnp.where(window > 0, jnp.maximum(kv_len - q_len - window + 1, 0), 0) // page
    place = jnp.arange(page_table.shape[1])
    looked_at = (place >= low[:, None]) & (place * page < held(kv_len, page, dealt)[:, None])
    ids = jnp.all(~looked_at | ((page_table >= 0) & (page_table < pages)), axis=1)
    lengths = (q_len >= 0) & (kv_len >= q_len) & (kv_len <= most) & (q_start >= 0) & (q_start + q_len <= tokens)
    return ids & lengths & (window >= 0) & (layer >= 0) & (layer < kv.shape[0])


def _spoil(out, sound, q_start, q_len):
    """NaN in the rows of sequences that are not sound, one row at least, where no other sequence has them."""
    row = jnp.arange(out.shape[0])[:, None]
    of = (row >= q_start) & (row < q_start + jnp.maximum(q_len, 1))
    bad = (of & ~sound).any(1) & ~(of & sound).any(1)
    return jnp.where(bad.reshape(-1, *[1] * (out.ndim - 1)), jnp.nan, out)


def check(q, k, v, kv, page_table, q_start, q_len, kv_len, q_max, value_dim=None):
    """Static checks shared by all bodies: names the dimension that is wrong. Raises ValueError."""
    if value_dim is not None:
        if v is not None or not 1 <= value_dim <= q.shape[-1] or kv.dtype.itemsize == 1:
            raise ValueError(f"value_dim={value_dim}: must be from 1 to {q.shape[-1]}, with v=None and a cache of 16 bits or more")
        v = k
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or kv.ndim != 5:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}, kv {kv.shape}: need [T,Hq,D], [T,Hkv,D] twice and [L,P,Hkv,page,2D]")
    tokens, q_heads, dim = q.shape
    kv_heads = kv.shape[2]
    if k.shape != (tokens, kv_heads, dim):
        raise ValueError(f"k {k.shape}: must be [{tokens}, {kv_heads}, {dim}] for q {q.shape} and kv {kv.shape}")
    if kv.shape[4] < (2 * dim if value_dim is None else dim):
        least = "twice " if value_dim is None else ""
        raise ValueError(f"kv lanes {kv.shape[4]}: must be {least}head_dim={dim}, or more to fill a tile of lanes")
    if q_heads % kv_heads:
        raise ValueError(f"query heads {q_heads}: must be a multiple of the {kv_heads} kv heads")
    if kv.shape[3] % 8:
        raise ValueError(f"page size {kv.shape[3]}: must be a multiple of 8")
    rows = page_table.shape[0]
    if any(x.shape != (rows,) for x in (q_start, q_len, kv_len)):
        raise ValueError(f"q_start {q_start.shape}, q_len {q_len.shape}, kv_len {kv_len.shape}: must all be [{rows}], as page_table")
    if not 1 <= q_max <= tokens:
        raise ValueError(f"q_max={q_max}: must be from 1 to the {tokens} rows of q")


def check_options(q, kv, window, sinks, q_sinks, sink_logits, tree, kv_scale, kv_splits):
    """Static checks of what may be asked for. Raises ValueError."""
    heads, scaled = kv.shape[2], kv.dtype.itemsize == 1
    if sinks and (q_sinks is None or q_sinks.shape != q.shape):
        raise ValueError(f"q_sinks {None if q_sinks is None else q_sinks.shape}: must be {q.shape}, as q, where there are sinks")
    if isinstance(window, int) and window < 0:
        raise ValueError(f"window={window}: must be 0 (none) or more")
    if sink_logits is not None and sink_logits.shape != q.shape[1:2]:
        raise ValueError(f"sink_logits {sink_logits.shape}: must be [{q.shape[1]}], one for each query head")
    if tree is not None and (tree.ndim != 2 or tree.shape[0] != q.shape[0] or tree.dtype != jnp.int32 or sinks):
        raise ValueError(f"tree {tree.dtype}{list(tree.shape)}: must be int32 [{q.shape[0]}, words], and there must be no sinks")
    if scaled != (kv_scale is not None):
        raise ValueError(
            f"kv_scale {None if kv_scale is None else kv_scale.shape}: a cache of {kv.dtype} {'needs' if scaled else 'has no'} scales"
        )
    if scaled and (kv_scale.shape != (*kv.shape[:2], 2 * heads) or sinks):
        raise ValueError(f"kv_scale {kv_scale.shape}: must be {(*kv.shape[:2], 2 * heads)}, and there must be no sinks")
    if kv_splits < 1 or (kv_splits > 1 and (sinks or sink_logits is not None)):
        raise ValueError(f"kv_splits={kv_splits}: must be 1 or more, and 1 with sinks or sink_logits")


def check_dealt(dealt, page_table, with_lse, sinks, sink_logits, tree):
    """Static checks of pages that are dealt out. Raises ValueError."""
    if dealt is None:
        return
    if dealt[0] < 1 or dealt[1].shape != page_table.shape[:1]:
        rows = page_table.shape[0]
        raise ValueError(f"dealt: ways {dealt[0]} must be 1 or more, and turn {dealt[1].shape} must be [{rows}], as page_table")
    if not with_lse or sinks or sink_logits is not None or tree is not None:
        raise ValueError("dealt: what is found has to be merged: needs with_lse, and no sinks, sink_logits or tree")


def paged_attention_reference(
    q,
    k,
    v,
    kv,
    *,
    layer,
    page_table,
    q_start,
    q_len,
    kv_len,
    window,
    scale,
    softcap,
    q_max,
    sinks=0,
    q_sinks=None,
    sink_logits=None,
    tree=None,
    kv_scale=None,
    value_dim=None,
    chunked=False,
    batched=False,
    dealt=None,
):
    """The contract in plain jnp: see the module. Work grows with the live context (batched: with the longest), not with
    the table. Returns (out, kv, kv_scale, lse)."""
    rows = dict(page_table=page_table, q_start=q_start, q_len=q_len, kv_len=kv_len, dealt=dealt)
    if kv_scale is None:
        new = (k if v is None else jnp.concatenate([k, v], axis=-1)).astype(kv.dtype)
    else:
        kv_scale, new, ratio = kv_scales.grow(k, v, kv_scale, kv.dtype, kv.shape[3], layer=layer, **rows)
        kv = kv_scales.rescale(kv, ratio, k.shape[2], layer=layer, page_table=page_table, context=kv_len - q_len, dealt=dealt)
    kv = write_pages(new, kv, layer=layer, **rows)
    look = functools.partial(_look, kv=kv, kv_scale=kv_scale, layer=layer, window=window, scale=scale, softcap=softcap, sinks=sinks)
    dim = q.shape[2]
    of_value = slice(dim, 2 * dim) if value_dim is None else slice(0, value_dim)
    look = functools.partial(look, sink_logits=sink_logits, of_value=of_value, chunked=chunked)
    qs = q[:, None] if q_sinks is None else jnp.stack([q, q_sinks], axis=1)  # [T, 1 or 2, Hq, D]
    empty = (jnp.zeros((*q.shape[:2], value_dim or dim), q.dtype), jnp.full(q.shape[:2], -jnp.inf))
    found = _one_each(qs, empty, page_table, q_start, jnp.where(q_len == 1, kv_len, 0), dealt, look, batched)
    if q_max > 1:
        found = _in_blocks(qs, found, page_table, q_start, jnp.where(q_len > 1, q_len, 0), kv_len, tree, dealt, look)
    return found[0], kv, kv_scale, found[1]


def write_pages(new, kv, *, layer, page_table, q_start, q_len, kv_len, dealt=None):
    """Scatters the new rows [T, Hkv, lanes or fewer] into their pages: in place when kv is donated. Rows of nobody are dropped."""
    page_size = kv.shape[3]
    _, pos, page, owned = kv_scales.owners(new.shape[0], page_size, page_table, q_start, q_len, kv_len, dealt)
    page = jnp.where(owned, page, kv.shape[1])  # out of range: dropped
    heads = jnp.arange(kv.shape[2])
    new = jnp.pad(new, ((0, 0), (0, 0), (0, kv.shape[4] - new.shape[2])))
    return kv.at[layer, page[:, None], heads[None], (pos % page_size)[:, None]].set(new, mode="drop")


def _one_each(qs, empty, page_table, q_start, kv_len, dealt, look, batched):
    """The sequences that bring one token each (kv_len 0: nothing to do): all at once, or one after the other, so that each
    costs its own length (XLA:CPU is no faster at several). Other rows are as in `empty`."""
    live = kv_len > 0
    rows = jnp.clip(q_start, 0, qs.shape[0] - 1)
    ways, turn = dealt or (1, None)

    def at_once(q, length, table, turn=None):
        own = None if turn is None else (ways, turn)
        return [x[:, 0] for x in look(q[:, None], (length - 1)[:, None], table, block=DECODE_BLOCK, dealt=own)]

    each = (qs[rows], kv_len, page_table, *([] if turn is None else [turn]))
    found = at_once(*each) if batched else lax.map(lambda row: [x[0] for x in at_once(*(x[None] for x in row))], each)
    at = jnp.where(live, q_start, qs.shape[0])
    return tuple(x.at[at].set(y.astype(x.dtype), mode="drop") for x, y in zip(empty, found))


def _in_blocks(qs, found, page_table, q_start, q_len, kv_len, tree, dealt, look):
    """Blocks of query rows one after the other, as many as the sequences have: padding costs nothing."""
    size = min(Q_BLOCK, qs.shape[0])
    ends = jnp.cumsum((q_len + size - 1) // size)  # blocks up to and including each sequence
    pad = lambda x: jnp.pad(x, ((0, size), *[(0, 0)] * (x.ndim - 1)))
    padded, found, tree = pad(qs), tuple(map(pad, found)), None if tree is None else pad(tree)

    def step(carry):
        i, found = carry
        row = jnp.searchsorted(ends, i, side="right")
        offset = (i - jnp.where(row > 0, ends[row - 1], 0)) * size + jnp.arange(size)
        inside = offset < q_len[row]
        context = kv_len[row] - q_len[row]
        pos = jnp.where(inside, context + offset, -1)
        start = q_start[row] + offset[0]
        cut = lambda x: lax.dynamic_slice_in_dim(x, start, size)
        nodes = None if tree is None else (context[None], cut(tree)[None])
        own = of_rows(dealt, row[None])
        new = look(cut(padded)[None], pos[None], page_table[row][None], block=PREFILL_BLOCK, nodes=nodes, dealt=own)
        put = lambda x, y: lax.dynamic_update_slice_in_dim(
            x, jnp.where(inside.reshape(-1, *[1] * (x.ndim - 1)), y[0].astype(x.dtype), cut(x)), start, axis=0
        )
        return i + 1, tuple(map(put, found, new))

    return tuple(x[: qs.shape[0]] for x in lax.while_loop(lambda c: c[0] < ends[-1], step, (0, found))[1])


def _look(qs, pos, table, *, kv, kv_scale, layer, window, scale, softcap, sinks, sink_logits, of_value, chunked, block, nodes=None, dealt):
    """Attention of qs [R, C, 1 or 2, Hq, D] (q, and q_sinks where there are sinks) at positions pos [R, C] (-1: nothing to see) over
    the pages of table [R, n]. nodes: None, or (length of the context [R], words [R, C, W]) where rows are a tree. Returns float32
    [R, C, Hq, D] and the sums' logarithms [R, C, Hq]. of_value: which lanes of a row are its value. A loop over blocks of
    `block` tokens, from the first that a window reaches to the last."""
    (rows, chunk, _, q_heads, dim), (heads, page_size) = qs.shape, kv.shape[2:4]
    group, pages_a_block = q_heads // heads, max(1, block // page_size)
    block = pages_a_block * page_size
    # dynamic_slice clamps: a table that is a whole number of blocks long keeps the last block where it belongs.
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % pages_a_block)))
    dtype = kv.dtype if kv_scale is None else qs.dtype
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    product = _products if chunk == 1 and group <= MOST_PRODUCTS else jnp.einsum
    dot = functools.partial(product, precision=precision, preferred_element_type=jnp.float32)
    whole = chunk == 1  # zeros under the value lanes: the product reads whole rows, which need not be cut out
    qs = _by_heads((qs * scale).astype(dtype), heads, kv.shape[4] if whole else dim)
    flat = lambda x: jnp.broadcast_to(x[:, :, None], (rows, chunk, group, x.shape[2])).reshape(rows, 1, chunk * group, -1)
    depth = pos if nodes is None else jnp.where(pos >= 0, nodes[0][:, None] + tree_depth(nodes[1]), -1)
    nodes = nodes and (nodes[0].reshape(rows, 1, 1, 1), flat(nodes[1]))
    pos, depth = flat(pos[..., None]), flat(depth[..., None])  # [R, 1, C * G, 1]
    low = depth // window * window if chunked else jnp.where(window > 0, depth - window + 1, 0)
    dealt = None if dealt is None else (dealt[0], dealt[1].reshape(rows, 1, 1, 1))
    first = 0 if dealt else jnp.maximum(jnp.min(jnp.where(pos >= 0, low, 1 << 30)), 0) // block
    count = held(pos + 1, page_size, dealt)  # of what is held here, what lies before the end of each row
    last = (jnp.max(count) + block - 1) // block

    def attend(q, ids, inside, sums):
        """Adds the tokens of pages ids [R, n] that are inside [R, 1, C * G, n * page] to the running sums."""
        top, total, acc = sums
        found = kv[layer, ids] if kv_scale is None else kv_scales.unpack(kv[layer, ids], kv_scale[layer, ids], dim, dtype)
        found = found.swapaxes(1, 2).reshape(rows, heads, inside.shape[-1], -1)
        # Values that nobody may see become 0: a NaN there would survive its zero weight.
        found = jnp.where(inside.any(axis=2)[..., None], found, 0)
        keys, values = (found, found) if whole else (found[..., :dim], found[..., of_value])
        scores = jnp.where(inside, _capped(dot("rhqd,rhtd->rhqt", q, keys), softcap), _NEG)
        new_top = jnp.maximum(top, scores.max(-1))
        weight, keep = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
        mixed = dot("rhqt,rhtd->rhqd", weight.astype(dtype), values)
        return new_top, total * keep + weight.sum(-1), acc * keep[..., None] + (mixed[..., of_value] if whole else mixed)

    def step(carry):
        i, *sums = carry
        ids = lax.dynamic_slice_in_dim(table, i * pages_a_block, pages_a_block, axis=1)
        at = position_of(i * block + jnp.arange(block), page_size, dealt)
        return i + 1, *attend(qs[0], ids, (at <= pos) & (at >= low if nodes is None else _in_tree(at, low, *nodes)), sums)

    shape = (rows, heads, chunk * group)
    logits = None if sink_logits is None else jnp.tile(sink_logits.reshape(heads, group), (1, chunk))
    sums = (*_begin(shape, logits), jnp.zeros((*shape, of_value.stop - of_value.start), jnp.float32))
    if sinks:
        first_pages = table[:, : -(-sinks // page_size)]
        at = jnp.arange(first_pages.shape[1] * page_size)
        sums = attend(qs[1], first_pages, (at < sinks) & (at < low), sums)
    _, top, total, acc = lax.while_loop(lambda c: c[0] < last, step, (first, *sums))
    # By position and not by what was found: a sequence's own NaN must come through, on a GPU too, where max drops it.
    out = jnp.where(count > 0, acc / total[..., None], 0)
    lse = jnp.where(count[..., 0] > 0, top + jnp.log(total), -jnp.inf)
    order = lambda x: x.reshape(rows, heads, chunk, group, -1).swapaxes(1, 2).reshape(rows, chunk, q_heads, -1)
    return order(out), order(lse)[..., 0]


def _capped(scores, softcap):
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _by_heads(qs, heads, lanes):
    """qs [R, C, n, Hq, D] to [n, R, heads, C * group, lanes], zeros behind D."""
    rows, chunk, _, q_heads, dim = qs.shape
    qs = qs.reshape(rows, chunk, -1, heads, q_heads // heads, dim)
    qs = qs.transpose(2, 0, 3, 1, 4, 5).reshape(-1, rows, heads, chunk * q_heads // heads, dim)
    return jnp.concatenate([qs, jnp.zeros((*qs.shape[:-1], lanes - dim), qs.dtype)], axis=-1) if lanes > dim else qs


def _begin(shape, logits):
    """The running maximum and sum before any key: of nothing, or of one logit."""
    if logits is None:
        return jnp.full(shape, _NEG, jnp.float32), jnp.zeros(shape, jnp.float32)
    return jnp.broadcast_to(logits.astype(jnp.float32), shape), jnp.ones(shape, jnp.float32)


def _in_tree(at, low, context, words):
    """Which positions at [block] rows see that are nodes of a tree behind context [R, 1, 1, 1], by words [R, 1, rows, W]."""
    place = at - context
    word = jnp.broadcast_to(jnp.clip(place >> 5, 0, words.shape[-1] - 1), (*words.shape[:3], at.shape[0]))
    bits = jnp.take_along_axis(words, word, axis=-1)
    return jnp.where(place < 0, at >= low, (bits >> (place & 31)) & 1 == 1)


def tree_depth(words):
    """How many ancestors each node [..., W] of a tree sees."""
    return jnp.sum(lax.population_count(words), axis=-1) - 1


def _products(form, left, right, **how):
    """The einsum with the query axis of `left` taken apart: matrix-vector products, which XLA:CPU compiles into its loops,
    where it would call a library for each small matrix product."""
    form = form.replace("q", "")
    return jnp.stack([jnp.einsum(form, left[:, :, i], right, **how) for i in range(left.shape[2])], axis=2)
