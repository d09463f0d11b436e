"""What of a step lies where on a mesh: its rows, and contexts whose pages are on several devices (the mesh axis sp).

Page i of a sequence is on the device i places behind that of its first page, round and round (pages.py), so all have as much of a
context, to within a page. Each has all queries of a step, attends to the keys that it holds, and writes those that it is to hold;
sharding/sequence.py merges what they find. Layers with a window keep their pages whole on every device: they are few.

In chunks of prompts the rows are shared out too (`Shares`). Between the products of two blocks each device has its share of the stream, so
norms and residuals work on that; rows are gathered where columns of weights are split, and what those of the next product give is summed
and shared out again (Korthikanti et al., arXiv 2205.05198): together as much as a sum moves. Over sp, which splits no weights of
attention, the projections work on shares as well: queries, keys and values are gathered, and of what attention finds each device gets its
rows. Decoding reads all weights for a few tokens: there it would save nothing.

The first chunk of a prompt that has a step to itself goes around a ring: its rows are in zigzag order, and only keys and values move, which
are fewer than queries and what these find, once in each direction. Later chunks look at keys that are dealt out already: as above.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llminfer.batch import Batch
from llminfer.cache import KVCache
from llminfer.config import EngineConfig, ModelConfig
from llminfer.target import Target
from pallas_kernels.dealt import held
from pallas_kernels.flash_attention import flash_attention
from sharding.mesh import in_two_rows
from sharding.ring import ring_attention, to_owners, zigzag_order
from sharding.sequence import merge_over

PER_ROW = ("tokens", "positions", "reach")  # of a Batch
ROWS = 8  # of a device's share of the tokens, and multiples: what a tile of registers has


@flax.struct.dataclass
class Dealt:
    """The page tables of all devices, int32 [ways, R, entries] of their own page ids, and turn [ways, R]: the number of the first page of
    a sequence that each has."""

    table: Any
    turn: Any


def deal(batch: Batch, cache: KVCache, c: ModelConfig, target: Target) -> tuple[Any, ...]:
    """batch.tables, a Dealt in place of each whose pages lie on several devices."""
    ways = target.ways("pages")
    if ways == 1:
        return batch.tables
    pools = [jax.tree.leaves(group)[0].shape[1:4:2] for group in cache.groups]
    each = zip(batch.tables, c.groups, pools, strict=True)
    dealt = lambda table, pages, size: _dealt(table, batch.kv_len, pages // ways, size, target)
    return tuple(table if window else dealt(table, *pool) for table, window, pool in each)


def _dealt(table: jax.Array, kv_len: jax.Array, part: int, size: int, target: Target) -> Dealt:
    """part: pages of a device."""
    ways, over = target.ways("pages"), target.over("pages")
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % ways)))
    rank = shared_out(jnp.arange(ways, dtype=jnp.int32)[:, None], over, target)
    turn = shared_out((rank - table[:, 0] // part) % ways, over, target)
    number = turn[..., None] + jnp.arange(0, table.shape[1], ways, dtype=jnp.int32)  # [ways, R, entries]
    own = jnp.take_along_axis(table[None], number, axis=2) - part * rank[..., None]
    return Dealt(shared_out(jnp.where(number * size < kv_len[:, None], own, 0), over, target), turn)  # behind a context: any legal id


@dataclass(frozen=True)
class Shares:
    """The mesh axes over which rows of a step are shared out, the first the coarsest; (): all rows are on every device. stream: between
    the products of blocks; projections: in those around attention, of which stream has more, behind."""

    stream: tuple[str, ...] = ()
    projections: tuple[str, ...] = ()


def sharing_step(rows: int, target: Target) -> int:
    """What pieces of about so many rows should be multiples of, so that they can be shared out over the devices of heads too."""
    step = ROWS * target.ways("pages") * target.ways("heads")
    shares = shares_of(-(-rows // step) * step, rows, target)
    return ROWS if shares.stream == shares.projections else step


def shares_of(rows: int, q_max: int, target: Target) -> Shares:
    """How a step's rows are shared out: over sp wherever they can be; over the devices of heads too where target.shares says so, and sums
    in parts cost a TPU half as much as whole ones."""
    pages, heads = target.over("pages"), target.over("heads")
    each = lambda axes: rows / math.prod(target.mesh.shape[name] for name in axes)
    if q_max == 1 or not (pages or heads):
        return Shares()
    every = (*pages, *heads)
    if heads and 0 < target.shares <= rows and each(every) % ROWS == 0 and in_two_rows(target.mesh, every):
        return Shares(every, pages)
    return Shares(pages, pages) if pages and each(pages) % ROWS == 0 else Shares()


def shared_out(x: jax.Array, over: tuple[str, ...], target: Target) -> jax.Array:
    """x [T, ...] with each device's share of the rows over these axes on it; (): all of them on each."""
    return target.pinned(x, jax.sharding.PartitionSpec(over or None))


def gathered(x: jax.Array, stream: tuple[str, ...], over: tuple[str, ...], target: Target) -> jax.Array:
    """x [T, ...] of which each device has its share of the rows over `stream`, shared out over the first of these axes, `over`, only."""
    if not (rest := stream[len(over) :]):
        return x
    spec = jax.sharding.PartitionSpec
    return target.split(lambda x: jax.lax.all_gather(x, rest, tiled=True), spec(stream), spec(over or None))(x)


def entering(batch: Batch, shares: Shares, target: Target) -> Batch:
    """The batch with what is shipped of its rows on every device: XLA would share that out, too."""
    if not shares.stream:
        return batch
    return replace(batch, **{name: shared_out(getattr(batch, name), (), target) for name in PER_ROW})


def by_devices(attend: Any, batch: Batch, c: ModelConfig, target: Target, shares: Shares, how: dict[str, Any]) -> Any:
    """paged_attention with heads and cache split over the mesh axes of kv heads, its pages too where page_table is a Dealt; all else on
    every device. The one head of a latent cache is on every device: each writes the same row to its own. how: scale and softcap."""
    axis, partition = None if c.kv_rank else "kv_heads", target.partition
    queries, new, over = partition((None, "heads", None)), partition((None, axis, None)), target.over("pages")

    def whole(q: Any, k: Any, v: Any, kv: Any, rows: dict[str, Any]) -> Any:
        if batch.ring == 1:
            return attend(q, k, v, kv, **rows)
        places = places_of(batch)
        plain = lambda x: None if x is None else x[places]
        rows = rows | ({"q_sinks": plain(rows["q_sinks"])} if "q_sinks" in rows else {})
        out, *cache = attend(plain(q), plain(k), plain(v), kv, **rows)
        return out[order_of(batch)], *cache

    def dealt(q: Any, k: Any, v: Any, kv: Any, rows: dict[str, Any]) -> Any:
        own = jax.tree.map(lambda x: x[0], rows["page_table"])
        sink_logits = rows.get("sink_logits")  # one key for all: it counts when all is merged
        rest = {name: x for name, x in rows.items() if name not in ("page_table", "sink_logits")}
        ways = target.ways("pages")
        out, *cache, lse = attend(q, k, v, kv, page_table=own.table, dealt=(ways, own.turn), with_lse=True, **rest)
        out, _ = merge_over(out, lse, over, sink_logits, scatter=bool(shares.projections))
        return out, *cache

    def split(q: Any, k: Any, v: Any, kv: Any, **rows: Any) -> Any:
        apart = isinstance(rows["page_table"], Dealt)
        if apart and batch.ring > 1:
            return _around_ring(attend, target, how)(q, k, v, kv, **rows)
        pages = "pages" if apart else None
        cache, scale = partition((None, pages, axis, None, None)), partition((None, pages, axis))
        own = {"q_sinks": queries, "sink_logits": partition(("heads",)), "kv_scale": scale, "page_table": partition((pages,))}
        each = {name: own.get(name, partition(())) for name in rows}
        out = partition(("pages", "heads", None)) if apart and shares.projections else queries
        found = (out, cache, *([scale] if "kv_scale" in rows else []))
        specs = (queries, new, None if v is None else new, cache, each)
        body = dealt if apart else whole
        return target.split(body, specs, found)(q, k, v, kv, rows)

    return split


def ring_rows(c: ModelConfig, settings: EngineConfig, target: Target) -> int:
    """Rows of the program that takes the first chunk of a prompt around a ring: chunks of zigzag order have whole pages. 0: there is none:
    contexts are not spread, or keys are not seen as they are computed (latents, a cache of another type), or a chunk has too few rows."""
    ways, unit = target.ways("pages"), 2 * target.ways("pages") * settings.page_size
    rounded = settings.kv_dtype not in (None, target.dtype)
    if ways == 1 or target.stages > 1 or c.kv_rank or rounded or settings.chunk < unit:
        return 0
    return -(-settings.chunk // unit) * unit


def in_ring_order(batch: Batch, target: Target) -> Batch:
    """A batch of one sequence that begins with its first row, with its rows in zigzag order (sharding/ring.py)."""
    batch = replace(batch, ring=target.ways("pages"))
    return replace(batch, **{name: shared_out(getattr(batch, name), (), target)[order_of(batch)] for name in PER_ROW})


def order_of(batch: Batch) -> np.ndarray:
    """int [T]: which row of the order in which tokens follow each other each row of a batch in ring order is."""
    return zigzag_order(batch.tokens.shape[0], batch.ring)


def places_of(batch: Batch) -> np.ndarray:
    """int [T]: where in a batch in ring order each row is of the order in which tokens follow each other."""
    return np.argsort(order_of(batch))


def _around_ring(attend: Any, target: Target, how: dict[str, Any]) -> Any:
    """As by_devices, of a batch in ring order and pages that are dealt out: keys and values go around, each device's queries stay, and what
    is to be cached goes to its page's owner. how: scale and softcap. On a TPU two chunks are looked at by its kernel for whole prompts."""
    (axis,), partition, ways = target.over("pages"), target.partition, target.ways("pages")

    def body(q: Any, k: Any, v: Any, kv: Any, rows: dict[str, Any]) -> Any:
        own, length, page = jax.tree.map(lambda x: x[0], rows["page_table"]), rows["q_len"][0], kv.shape[3]
        out, lse = ring_attention(q, k, v, axis=axis, length=length, **how, **_pairs(q.shape[0] // 2, target, how))
        if (sink := rows.get("sink_logits")) is not None:
            out = (out * jax.nn.sigmoid(lse - sink.astype(jnp.float32))[..., None]).astype(q.dtype)
        new = to_owners(jnp.concatenate([k, v], axis=-1), own.turn[0], page, axis)
        first = jnp.arange(own.turn.shape[0]) == 0
        places = jnp.where(first, held(length, page, (ways, own.turn)), 0)
        where = dict(page_table=own.table, q_start=jnp.zeros_like(places), q_len=places, kv_len=places, window=jnp.int32(1))
        # Each row sees itself alone: what is wanted is that it is written.
        _, kv = attend(jnp.zeros_like(q), *jnp.split(new, 2, axis=-1), kv, layer=rows["layer"], q_max=q.shape[0], **where)
        return out, kv

    def split(q: Any, k: Any, v: Any, kv: Any, **rows: Any) -> Any:
        queries, new = partition(("pages", "heads", None)), partition(("pages", "kv_heads", None))
        cache = partition((None, "pages", "kv_heads"))
        own = {"sink_logits": partition(("heads",)), "page_table": partition(("pages",))}
        each = {name: own.get(name, partition(())) for name in rows}
        return target.split(body, (queries, new, new, cache, each), (queries, cache))(q, k, v, kv, rows)

    return split


def _pairs(chunk: int, target: Target, how: dict[str, Any]) -> dict[str, Any]:
    """What ring_attention is told where a kernel attends: whole chunks, which see all of each other or are the same."""
    if target.body == "reference":
        return {}

    def attend(q: Any, k: Any, v: Any, q_first: Any, k_first: Any, length: Any) -> tuple[Any, Any]:
        look = functools.partial(flash_attention, return_lse=True, chip=target.chip or "", impl=target.body, **how)
        see = lambda causal: look(q[None], k[None], v[None], lengths=jnp.clip(length - k_first, 0, chunk)[None], causal=causal)
        out, lse = jax.lax.cond(q_first == k_first, lambda: see(True), lambda: see(False))
        return out[0].astype(jnp.float32), lse[0].T

    return dict(attend=attend, tile=chunk, parts=1)
