"""A context whose pages lie on several devices (the mesh axis sp): their tables, and attention of each device's own keys, merged.

Page i of a sequence is on the device i places behind that of its first page, round and round (pages.py), so all have as much of a
context, to within a page. Each has all queries of a step, attends to the keys that it holds, and writes those that it is to hold;
sharding/sequence.py merges what they find. Layers with a window keep their pages whole on every device: they are few.

In chunks of prompts the tokens are shared out too, for the projections around attention: queries, keys and values are then gathered, and
of what attention finds each device gets its tokens only. Decoding reads all weights for a few tokens: there it would save nothing.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from llminfer.batch import Batch
from llminfer.cache import KVCache
from llminfer.config import ModelConfig
from llminfer.target import Target
from sharding.sequence import merge_over

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
    ways = target.ways("pages")
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % ways)))
    rank = shared_out(jnp.arange(ways, dtype=jnp.int32)[:, None], target)
    turn = shared_out((rank - table[:, 0] // part) % ways, target)
    number = turn[..., None] + jnp.arange(0, table.shape[1], ways, dtype=jnp.int32)  # [ways, R, entries]
    own = jnp.take_along_axis(table[None], number, axis=2) - part * rank[..., None]
    return Dealt(shared_out(jnp.where(number * size < kv_len[:, None], own, 0), target), turn)  # behind a context: any legal id


def shares_rows(rows: int, q_max: int, target: Target) -> bool:
    """Whether each device projects a share of the tokens only."""
    ways = target.ways("pages")
    return ways > 1 and q_max > 1 and rows % (ROWS * ways) == 0


def shared_out(x: jax.Array, target: Target, *, whole: bool = False) -> jax.Array:
    """x [T, ...] with each device's share of the rows on it, or (whole) all of them on each."""
    spec = jax.sharding.PartitionSpec() if whole else target.partition(("pages", *[None] * (x.ndim - 1)))
    return target.pinned(x, spec)


def by_devices(attend: Any, c: ModelConfig, target: Target, shared: bool) -> Any:
    """paged_attention with heads and cache split over the mesh axes of kv heads, its pages too where page_table is a Dealt; all else on
    every device. The one head of a latent cache is on every device: each writes the same row to its own. shared: see shares_rows."""
    axis, partition = None if c.kv_rank else "kv_heads", target.partition
    queries, new, over = partition((None, "heads", None)), partition((None, axis, None)), target.over("pages")

    def whole(q: Any, k: Any, v: Any, kv: Any, rows: dict[str, Any]) -> Any:
        return attend(q, k, v, kv, **rows)

    def dealt(q: Any, k: Any, v: Any, kv: Any, rows: dict[str, Any]) -> Any:
        own = jax.tree.map(lambda x: x[0], rows["page_table"])
        sink_logits = rows.get("sink_logits")  # one key for all: it counts when all is merged
        rest = {name: x for name, x in rows.items() if name not in ("page_table", "sink_logits")}
        ways = target.ways("pages")
        out, *cache, lse = attend(q, k, v, kv, page_table=own.table, dealt=(ways, own.turn), with_lse=True, **rest)
        out, _ = merge_over(out, lse, over, sink_logits, scatter=shared)
        return out, *cache

    def split(q: Any, k: Any, v: Any, kv: Any, **rows: Any) -> Any:
        apart = isinstance(rows["page_table"], Dealt)
        pages = "pages" if apart else None
        cache, scale = partition((None, pages, axis, None, None)), partition((None, pages, axis))
        own = {"q_sinks": queries, "sink_logits": partition(("heads",)), "kv_scale": scale, "page_table": partition((pages,))}
        each = {name: own.get(name, partition(())) for name in rows}
        out = partition(("pages", "heads", None)) if apart and shared else queries
        found = (out, cache, *([scale] if "kv_scale" in rows else []))
        specs = (queries, new, None if v is None else new, cache, each)
        body = dealt if apart else whole
        return target.split(body, specs, found)(q, k, v, kv, rows)

    return split
