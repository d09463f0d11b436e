"""Ring attention: causal attention of one long prompt whose tokens are spread over the devices of a mesh axis.

Each device keeps its queries; keys and values travel around the ring, and what each visit finds is merged by the logarithm of the
softmax's sums (Liu et al., arXiv 2310.01889; the merge: Milakov and Gimelshein, arXiv 1805.02867). Next block's transfer is begun
before this block is worked on, so the compiler can do both at once; after the last block nothing is sent.

**Zigzag order.** With tokens dealt out in order, device 0 would be done after its first block and the last would work all the time. So
the T tokens are cut into 2n chunks, and device i of n holds chunks i and 2n-1-i: each visit is then two chunk pairs of work on every
device. `zigzag` and `unzigzag` permute whole arrays, `zigzag_positions` says which positions a device holds (for rotary embeddings).

**Memory.** Scores exist for one tile of queries and keys at a time. Travelling keys and values need two buffers; they go around in
`parts`, so that the buffers are that much smaller (each part has rows of both chunks, which keeps the balance).

    q [T / n, Hq, D]   k, v [T / n, Hkv, D]   per device, in zigzag order; query head h uses key-value head h // (Hq // Hkv)
    length int32 scalar: positions from there on are padding; nobody sees them, they may hold anything, and their rows come back as zeros
    window int32 scalar: position p sees p - window + 1 .. p; 0: all of 0 .. p
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

# Rows of a tile of queries, and of keys, in plain jnp.
TILE = 128
# In how many parts keys and values travel, at most: the buffers of a device are 2 / PARTS of its keys and values.
PARTS = 16

# (q [tile, Hq, D], k, v [rows, Hkv, D], q_first, k_first, length) -> (out float32 like q, lse float32 [tile, Hq])
Attend = Callable[..., tuple[Any, Any]]


def zigzag_order(tokens: int, devices: int) -> np.ndarray:
    """int [tokens]: which token lies at each place of zigzag order. Raises ValueError unless 2 * devices divides tokens."""
    if tokens < 1 or tokens % (2 * devices):
        legal = max(1, -(-tokens // (2 * devices))) * 2 * devices
        raise ValueError(
            f"tokens={tokens}: must be a multiple of {2 * devices}, two chunks for each of {devices} devices; next legal: {legal}"
        )
    chunks = np.arange(tokens).reshape(2 * devices, -1)
    return np.concatenate([np.concatenate([chunks[i], chunks[2 * devices - 1 - i]]) for i in range(devices)])


def zigzag(x: Any, devices: int, axis: int = 0) -> Any:
    """x with its tokens (on `axis`) in zigzag order: sharded over n devices, each has its chunks. Raises ValueError as zigzag_order."""
    return jnp.take(x, zigzag_order(x.shape[axis], devices), axis=axis)


def unzigzag(x: Any, devices: int, axis: int = 0) -> Any:
    """The inverse of zigzag."""
    return jnp.take(x, np.argsort(zigzag_order(x.shape[axis], devices)), axis=axis)


def zigzag_positions(axis: str, rows: int) -> Any:
    """int32 [rows]: positions of the `rows` tokens that this device of the mesh axis holds; inside of shard_map."""
    n, i, chunk = lax.axis_size(axis), lax.axis_index(axis), rows // 2
    return jnp.concatenate([i * chunk + jnp.arange(chunk), (2 * n - 1 - i) * chunk + jnp.arange(chunk)]).astype(jnp.int32)


def ring_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    axis: str,
    scale: float,
    length: Any = None,
    window: Any = 0,
    softcap: float | None = None,
    attend: Attend | None = None,
    tile: int = TILE,
    parts: int = PARTS,
) -> tuple[Any, Any]:
    """Causal attention as the module describes; to be called inside of shard_map (check_vma=False) over a mesh that has `axis`; other
    axes may split the heads. Returns (out [T / n, Hq, D] of q's dtype, lse float32 [T / n, Hq]: natural logarithm of each row's sum of
    exponentials, -inf for padding), by which more keys, or a learned sink (out * sigmoid(lse - sink)), can be merged in.

    length: None for all T. window, length: may be traced. softcap: scores become softcap * tanh(scores / softcap).
    attend: what works on a tile of queries and a block of keys (a kernel): `(q [tile, Hq, D], k, v [rows, Hkv, D], q_first, k_first,
    length) -> (out, lse)`, float32, with rows at positions q_first .. and k_first .. of the prompt; lse is -inf where a row
    sees nothing. It is called only where some row of the tile sees a key. Scale, window and softcap it must know itself. None: plain jnp.
    tile: rows of a tile of queries. parts: see PARTS; the largest divisor of a chunk up to it is used.
    Raises ValueError for shapes that cannot work."""
    check(q, k, v)
    n, me, chunk = lax.axis_size(axis), lax.axis_index(axis), q.shape[0] // 2
    length = jnp.int32(2 * n * chunk if length is None else length)
    window = jnp.int32(window)
    attend = attend or functools.partial(attend_tiles, scale=scale, window=window, softcap=softcap, tile=tile)
    parts = max(p for p in range(1, min(parts, chunk) + 1) if chunk % p == 0)
    rows, onward = chunk // parts, [(i, (i + 1) % n) for i in range(n)]

    def visit(state: Any, here: Any, step: Any, part: Any) -> Any:
        """Both chunks of queries look at the part of the keys that began its way `step` devices before."""
        other = (me - step) % n

        def look(mine: Any, state: Any) -> Any:
            q_first = jnp.where(mine == 0, me, 2 * n - 1 - me) * chunk
            for half, index in enumerate((other, 2 * n - 1 - other)):
                block = (here[0][half], here[1][half], q_first, index * chunk + part * rows, length)
                state = _tiles(attend, q, state, block, window, mine * chunk, (chunk, min(tile, chunk)))
            return state

        return lax.fori_loop(0, 2, look, state)

    def around(part: Any, state: Any) -> Any:
        """One part of everybody's keys and values, all around the ring."""
        cut = lambda x: lax.dynamic_slice_in_dim(x.reshape(2, chunk, *x.shape[1:]), part * rows, rows, axis=1)

        def step(i: Any, carry: Any) -> Any:
            block, state = carry
            coming = lax.ppermute(block, axis, onward)  # before the work on this one: XLA moves the end of the transfer behind it
            return coming, visit(state, block, i, part)

        block, state = lax.fori_loop(0, n - 1, step, ((cut(k), cut(v)), state))
        return visit(state, block, n - 1, part)

    out, lse = lax.fori_loop(0, parts, around, (jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:2], -jnp.inf, jnp.float32)))
    return out.astype(q.dtype), lse


def to_owners(x: Any, turn: Any, page: int, axis: str) -> Any:
    """A prompt's rows in zigzag order, x [T / n, ...] of each device of a mesh axis, to where their pages are held: page i, of `page` rows,
    on the device with turn i % n. turn: int32, of this device; one more on the next, around. Returns [T / n, ...]: the pages turn,
    turn + n, ... in order. Raises ValueError unless chunks are whole pages; where they are a multiple of n pages, no padding is sent."""
    n, me, rows = lax.axis_size(axis), lax.axis_index(axis), x.shape[0] // 2
    if x.shape[0] != 2 * rows or rows % page:
        raise ValueError(f"x has {x.shape[0]} rows: must be two chunks of whole pages, a multiple of {2 * page}")
    pages = rows // page  # of a chunk
    blocks = x.reshape(2, pages, page, *x.shape[1:])
    chunk = jnp.stack([me, 2 * n - 1 - me])
    # Of each device's pages in each chunk the first, and all n behind that; what is behind the chunk is not looked at.
    theirs = (turn + jnp.arange(n)[:, None] - me - chunk * pages) % n  # [device, chunk]
    at = jnp.minimum(theirs[..., None] + jnp.arange(0, -(-pages // n) * n, n), pages - 1)
    came = lax.all_to_all(blocks[jnp.arange(2)[:, None], at], axis, 0, 0, tiled=True)
    number = turn + n * jnp.arange(2 * pages)
    of = number // pages
    found = came[jnp.minimum(of, 2 * n - 1 - of), (of >= n).astype(jnp.int32), number % pages // n]
    return found.reshape(x.shape)


def attention(q: Any, k: Any, v: Any, *, scale: float, length: Any = None, window: Any = 0, softcap: float | None = None, tile: int = TILE):
    """The same on one device, in plain order, tile by tile: what ring_attention is compared with. q [T, Hq, D], k, v [T, Hkv, D];
    returns (out [T, Hq, D], lse float32 [T, Hq])."""
    check(q, k, v, even=False)
    rows = q.shape[0]
    length = jnp.int32(rows if length is None else length)
    attend = functools.partial(attend_tiles, scale=scale, window=window, softcap=softcap, tile=tile)
    state = (jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:2], -jnp.inf, jnp.float32))
    out, lse = _tiles(attend, q, state, (k, v, 0, 0, length), jnp.int32(window), 0, (rows, min(tile, rows)))
    return out.astype(q.dtype), lse


def check(q: Any, k: Any, v: Any, even: bool = True) -> None:
    """Raises ValueError naming the shape that cannot work."""
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: must be [rows, Hq, D], and [rows, Hkv, D] twice")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads: must be a multiple of the {k.shape[1]} of k and v")
    if even and (q.shape[0] < 2 or q.shape[0] % 2):
        raise ValueError(f"q has {q.shape[0]} rows: must be an even number of at least 2, for two chunks on each device")


def merge_two(out: Any, lse: Any, more: Any, more_lse: Any) -> tuple[Any, Any]:
    """Attention over two sets of keys from attention over each: out, more float32 [..., D], lse float32 [...]. What has seen nothing
    (lse -inf) may hold anything."""
    top = jnp.maximum(lse, more_lse)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    a, b = jnp.exp(lse - top), jnp.exp(more_lse - top)
    total = a + b
    safe = jnp.where(total == 0, 1.0, total)
    part = lambda x, w: jnp.where((w == 0)[..., None], 0.0, x * (w / safe)[..., None])
    return part(out, a) + part(more, b), jnp.where(total == 0, -jnp.inf, top + jnp.log(safe))


def _tiles(attend: Attend, q: Any, state: Any, block: Any, window: Any, first: Any, sizes: tuple[int, int]) -> Any:
    """Rows first .. first+sizes[0]-1 of q look at a block of keys, a tile of sizes[1] after the other, each merged in its place into
    state (out, lse). Tiles that see nothing of the block are left out."""
    (k, v, q_first, k_first, length), (rows, tile) = block, sizes

    def one(t: Any, state: Any) -> Any:
        # The last tile begins early enough to be whole; rows that the one before had are left as they are.
        start = jnp.minimum(t * tile, rows - tile)
        cut = lambda x: lax.dynamic_slice_in_dim(x, first + start, tile)
        more, more_lse = attend(cut(q), k, v, q_first + start, k_first, length)
        mine = start + jnp.arange(tile)
        fresh = (mine >= t * tile) & (q_first + mine < length)
        merged = merge_two(cut(state[0]), cut(state[1]), more, jnp.where(fresh[:, None], more_lse, -jnp.inf))
        return tuple(lax.dynamic_update_slice_in_dim(x, new, first + start, 0) for x, new in zip(state, merged))

    low = jnp.maximum((k_first - q_first) // tile, 0)
    end = jnp.minimum(q_first + rows, length)  # of the positions that may see a key; of those that do, with a window:
    end = jnp.minimum(end, jnp.where(window > 0, k_first + jnp.minimum(k.shape[0], length - k_first) - 1 + window, end))
    high = jnp.where(k_first < length, -(-(end - q_first) // tile), 0)
    return lax.fori_loop(low, high, one, state)


def attend_tiles(q, k, v, q_first, k_first, length, *, scale, window=0, softcap=None, tile=TILE):
    """A tile of queries and a block of keys in plain jnp, a tile of keys at a time with an online softmax; tiles that no row sees are
    not looked at. Shapes and meaning: `attend` of ring_attention."""
    rows, heads, dim = q.shape
    kv_heads, size, tile = k.shape[1], k.shape[0], min(tile, k.shape[0])
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision)
    queries = q.reshape(rows, kv_heads, heads // kv_heads, dim)
    at = q_first + jnp.arange(rows)
    window = jnp.int32(window)
    # Keys low .. high - 1 of the block are seen by a row of this tile.
    low = jnp.where(window > 0, jnp.maximum(q_first - window + 1 - k_first, 0), 0)
    high = jnp.minimum(jnp.minimum(q_first + rows, length) - k_first, size)

    def one(t, carry):
        out, top, total = carry
        start = jnp.minimum(t * tile, size - tile)
        keys, values = lax.dynamic_slice_in_dim(k, start, tile), lax.dynamic_slice_in_dim(v, start, tile)
        place = start + jnp.arange(tile)
        there = k_first + place
        real = (place >= t * tile) & (there < length)
        seen = real[None] & (there[None] <= at[:, None]) & ((window <= 0) | (there[None] > at[:, None] - window))  # [rows, tile]
        scores = product("qkgd,skd->kgqs", queries, keys) * scale
        scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
        scores = jnp.where(seen, scores, -jnp.inf)
        best = jnp.maximum(top, scores.max(axis=-1))
        base = jnp.where(best == -jnp.inf, 0.0, best)
        weights, fade = jnp.exp(scores - base[..., None]), jnp.exp(top - base)
        values = jnp.where(real[:, None, None], values, 0)  # zero times NaN
        found = product("kgqs,skd->kgqd", weights.astype(v.dtype), values)
        return out * fade[..., None] + found, best, total * fade + weights.sum(axis=-1)

    shape = (kv_heads, heads // kv_heads, rows)
    start = (jnp.zeros((*shape, dim), jnp.float32), jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.float32))
    out, top, total = lax.fori_loop(low // tile, -(-high // tile), one, start)
    safe = jnp.where(total == 0, 1.0, total)
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(safe))
    turn = lambda x: jnp.moveaxis(x, 2, 0).reshape(rows, heads, *x.shape[3:])
    return turn(out / safe[..., None]), turn(lse)
