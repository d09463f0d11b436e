"""Paged attention for TPU: causal (optionally windowed) attention over a paged cache that it also extends, in place.

Algorithm. The cache stays in HBM. The query rows are cut into tiles (one token for decode, 16 to 256 tokens otherwise) and each
overlap of a tile with a sequence is one work item; a grid step works on one item for some of the key-value heads, all items with the
first heads, then all with the next. A step walks over the blocks of keys that its rows can see, several pages a block, copied page by
page into one of two VMEM buffers while the other is in use; the next item's first block is requested during the last block of this one.
Softmax is online, in float32, and for tiles mostly relative to an older maximum (paged_attention_softmax.py).

The item's own new keys and values are the last positions that it sees. They are patched into the block in VMEM and written to
the cache from there, in aligned windows of rows, since a single row of a tiled array cannot be addressed. Three rules keep reads
and writes of the same rows in order:
  1. an item sees no position after its own last one, so the new rows it needs are its own or those of earlier items;
  2. items of one sequence run in order, and a sequence's item begins by waiting for the writes of the item before it;
  3. the first block of the next item is only requested early if it ends before the first row this call writes to that sequence.

Sources: Dao et al., FlashAttention-2 (arXiv 2307.08691), for the online softmax; Kwon et al., PagedAttention (arXiv 2309.06180).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import kv_scales
from pallas_kernels.dealt import held, of_rows, position_of
from pallas_kernels.paged_attention_kernel import call_kernel
from pallas_kernels.paged_attention_pages import Scalars
from pallas_kernels.paged_attention_plan import Plan, check, make_plan, tuned_blocks, work_items
from pallas_kernels.paged_attention_softmax import LOG2E, REACH
from pallas_kernels.paged_attention_tiles import (
    from_tiles,
    logits_to_tiles,
    lse_from_tiles,
    new_to_tiles,
    scale_operands,
    to_tiles,
    tree_to_tiles,
)


class _Rows(NamedTuple):
    """A call's arrays as they are given, cut for the kernels here."""

    q: jax.Array
    new: jax.Array  # [T, Hkv, 2D] in the cache's type
    where: dict[str, jax.Array]  # page_table, q_start, q_len, kv_len
    layer: jax.Array
    window: jax.Array
    scale: float
    q_sinks: Any
    sink_logits: Any
    tree: Any
    kv_scale: Any
    ratio: Any
    interpret: Any
    end: Any = None  # [R] of positions, where it is not kv_len
    turn: Any = None  # [R], for tiles of a dealt plan

    def attend(self, plan: Plan, kv, length, splits: int, out, lse) -> tuple[Any, Any, Any]:
        """The sequences that bring length [R] rows: (out, kv, lse) with their rows in out [T, Hq, D] and lse [T, Hq]."""
        tokens, start = self.q.shape[0], self.where["q_start"]
        if plan.decode and (splits > 1 or tokens > length.shape[0]):
            part, kv, part_lse = self.run_alone(plan, kv, length, splits)
            at = jnp.where(length > 0, start, tokens)
            merged = lambda new, old: old.at[at].set(new, mode="drop")
        else:
            part, kv, part_lse = self.run(plan, kv, length)
            row = jnp.arange(tokens, dtype=jnp.int32)[:, None]
            owned = jnp.any((row >= start) & (row < start + length), axis=1)[:, None]
            merged = lambda new, old: jnp.where(owned if old.ndim == 2 else owned[..., None], new, old)
        return merged(part, out), kv, merged(part_lse, lse) if plan.lse else lse

    def run(self, plan: Plan, kv, length, begin: Any = 0, end: Any = None) -> tuple[Any, Any, Any]:
        """The sequences that bring length [R] rows, of their positions begin .. end-1: (out [T, Hq, D], kv, lse [T, Hq])."""
        q_start, kv_len, table = self.where["q_start"], self.where["kv_len"], self.where["page_table"]
        factor = self.scale * LOG2E if plan.softcap is None else self.scale / plan.softcap
        tiles = lambda x: to_tiles(plan, (x.astype(jnp.float32) * factor).astype(plan.compute))
        arrays = {"q": tiles(self.q)} | ({} if plan.reads else {"new": new_to_tiles(plan, self.new)})
        if plan.sinks:
            arrays["q_sinks"] = tiles(self.q_sinks)
        if plan.logits:
            arrays["logits"] = logits_to_tiles(plan, self.sink_logits.astype(jnp.float32) * LOG2E)
        if plan.tree_words:
            arrays["tree"] = tree_to_tiles(plan, self.tree)
        if plan.quantized:
            low = jnp.where(self.window > 0, kv_len - length - self.window + 1, 0)
            seen = held(kv_len, plan.page, (plan.dealt, self.turn)) if plan.reads else kv_len
            arrays |= scale_operands(plan, self.kv_scale[self.layer], self.ratio, table, low, seen)
        one, all_of = lambda x: jnp.asarray(x, jnp.int32).reshape(1), lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.int32), kv_len.shape)
        grown = all_of(0) if self.ratio is None else (self.ratio < 1).any(1).astype(jnp.int32)
        begin, end = self.turn if plan.reads else begin, self.end if end is None else end
        lists = (table.reshape(-1), q_start, length, kv_len, all_of(begin), kv_len if end is None else end, grown)
        items = work_items(plan, arrays["q"].shape[0], q_start, length)
        call = lambda kv, turn: call_kernel(
            plan, arrays | {"kv": kv}, Scalars(one(self.layer), one(self.window), one(turn), *lists, *items), self.interpret
        )
        found = call(kv, 0) if plan.decode else _until_exact(call, kv)
        lse = lse_from_tiles(plan, found["lse"], self.q.shape[0]) if plan.lse else None
        return from_tiles(plan, found["out"], self.q.shape[0]).astype(self.q.dtype), found["kv_out"], lse

    def run_alone(self, plan: Plan, kv, length, splits: int) -> tuple[Any, Any, Any]:
        """As run, for decode, of the sequences' own rows only: out [R, Hq, D] and lse [R, Hq]. Each context in `splits` parts, each as
        a sequence of its own, merged by their sums."""
        kv_len, q_start, seqs = self.where["kv_len"], self.where["q_start"], length.shape[0]
        part, of = jnp.arange(seqs * splits, dtype=jnp.int32) % splits, jnp.arange(seqs * splits, dtype=jnp.int32) // splits
        last = kv_len if self.end is None else self.end
        size = pl.cdiv(pl.cdiv(last, splits), plan.block) * plan.block
        begin, end = (part * size[of], jnp.minimum((part + 1) * size[of], last[of]))
        low = jnp.where(self.window > 0, jnp.maximum(kv_len - self.window, 0), 0)[of]
        mine = jnp.where((jnp.maximum(begin, low) < end), length[of], 0)
        row = jnp.clip(q_start[of], 0, self.q.shape[0] - 1)
        where = dict(
            page_table=self.where["page_table"][of], q_start=jnp.arange(seqs * splits, dtype=jnp.int32), q_len=mine, kv_len=kv_len[of]
        )
        q_sinks, ratio = None if self.q_sinks is None else self.q_sinks[row], None if self.ratio is None else self.ratio[of]
        parts = self._replace(q=self.q[row], new=self.new[row], where=where, q_sinks=q_sinks, ratio=ratio)
        out, kv, lse = parts.run(plan, kv, mine, begin, end)
        if splits == 1:
            return out, kv, lse
        lse = jnp.where(mine[:, None] > 0, lse, -jnp.inf).reshape(seqs, splits, -1)
        out = jnp.where(mine[:, None, None] > 0, out, 0).reshape(seqs, splits, *out.shape[1:])
        out, lse = merge_parts(out, lse, axis=1)
        return out, kv, lse


def _held(new, rows: dict[str, Any], page: int, dealt) -> tuple[Any, dict[str, Any]]:
    """What is held of new rows [T, ...] of sequences whose pages are dealt out, as if these were all: (the rows, those of each sequence
    together at its q_start; q_len and kv_len by places, see dealt.py)."""
    context, start = rows["kv_len"] - rows["q_len"], rows["q_start"]
    before, end = (held(n, page, dealt) for n in (context, rows["kv_len"]))
    places = rows | dict(q_len=end - before, kv_len=end)
    row = jnp.arange(new.shape[0], dtype=jnp.int32)[:, None]
    owner = jnp.argmax((row >= start) & (row < start + places["q_len"]), axis=1)
    place = before[owner] + jnp.maximum(row[:, 0] - start[owner], 0)
    source = start[owner] + position_of(place, page, of_rows(dealt, owner)) - context[owner]
    return new[jnp.clip(source, 0, new.shape[0] - 1)], places


def _attend_held(given: _Rows, places: dict[str, Any], dealt, plan: Plan, kv, length, splits: int, out, lse) -> tuple[Any, Any, Any]:
    """As _Rows.attend, where pages are dealt out. What is held is a context of its own. A single row looks at it as the last of it, and
    is written if it is; chunks are written first, by a call in which each row sees itself alone, and then look at places by position."""
    held_len, kept, page = places["kv_len"], places["q_len"], plan.page
    plan = dataclasses.replace(plan, lse=True)
    if plan.decode:
        where = places | dict(q_len=given.where["q_len"], kv_len=held_len + 1 - kept)
        mine = given._replace(where=where, end=held_len)
        return mine.attend(dataclasses.replace(plan, dealt=dealt[0]), kv, jnp.where(held_len > 0, length, 0), splits, out, lse)
    write = given._replace(q=jnp.zeros_like(given.q), where=places, window=jnp.int32(1))
    _, kv, _ = write.run(dataclasses.replace(plan, lse=False), kv, jnp.where(length > 0, kept, 0))
    ratio = None if given.ratio is None else jnp.ones_like(given.ratio)  # what was to be rounded again is
    read = given._replace(turn=dealt[1], ratio=ratio)
    out, kv, lse = read.attend(dataclasses.replace(plan, dealt=dealt[0]), kv, length, splits, out, lse)
    row = jnp.arange(out.shape[0], dtype=jnp.int32)[:, None]
    start, first = given.where["q_start"], given.where["kv_len"] - given.where["q_len"]
    mine = (row >= start) & (row < start + length)
    blind = jnp.any(mine & (held(jnp.maximum(first + row - start + 1, 0), page, dealt) == 0), axis=1)[:, None]
    return jnp.where(blind[..., None], 0, out), kv, jnp.where(blind, -jnp.inf, lse)


def merge_parts(out, lse, axis: int):
    """Attention over several parts of the keys as one: out [..., Hq, D] and lse [..., Hq] of each along `axis`; (out, lse) of all."""
    total = jax.nn.logsumexp(lse, axis=axis, keepdims=True)
    share = jnp.where(jnp.isneginf(total), 0.0, jnp.exp(lse - total))[..., None]
    return jnp.sum(out.astype(jnp.float32) * share, axis=axis).astype(out.dtype), jnp.squeeze(total, axis)


def _until_exact(call, kv) -> dict[str, Any]:
    """Runs the kernel of tiles, and once more without shortcuts where a score was so far above its reference that sums overflowed."""
    shapes = jax.eval_shape(lambda kv: call(kv, 0), kv)
    empty = {name: kv if name == "kv_out" else lax.empty(x.shape, x.dtype) for name, x in shapes.items()}

    def run(state):
        turn, before = state
        found = call(before["kv_out"], turn)
        return jnp.where((turn == 0) & (jnp.max(found["excess"]) > REACH), 1, 2), found

    return lax.while_loop(lambda state: state[0] < 2, run, (jnp.int32(0), empty))[1]


def paged_attention_tpu(
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
    softcap=None,
    q_max,
    sinks=0,
    q_sinks: Any = None,
    sink_logits: Any = None,
    tree: Any = None,
    kv_scale: Any = None,
    kv_splits: int = 1,
    with_lse: bool = False,
    chip: str | None = None,
    blocks: dict[str, int] | None = None,
    dealt: tuple[int, Any] | None = None,
    interpret=False,
):
    """Writes new keys and values into a paged cache and attends to it. Arguments as pallas_kernels.paged_attention has them.

    q_max 1 builds only the decode kernel; otherwise sequences with one row go through the decode kernel and the others through the
    tiled one. kv_splits: parts of a context that decode looks at independently, merged by their sums. interpret: False, True or a
    pltpu.InterpretParams. blocks: sizes for the kernel of q_max (paged_attention_plan.tuned_blocks); None: what tuned.toml has for `chip`.
    Returns (out [T, Hq, D] of q's dtype, zero in rows of no sequence, kv, kv_scale, lse float32 [T, Hq] or None).
    Raises ValueError for shapes and types that the kernel does not take. Page ids are not checked: one out of range is undefined.
    """
    check(q, k, v, kv, page_table, q_max)
    rows = dict(page_table=page_table, q_start=q_start, q_len=q_len, kv_len=kv_len)
    rows = {name: x.astype(jnp.int32) for name, x in rows.items()}
    ratio, places, new = None, rows, jnp.concatenate([k, v], axis=-1)
    if dealt is not None:
        new, places = _held(new, rows, kv.shape[3], dealt)
    if kv_scale is None:
        new = new.astype(kv.dtype)
    else:
        kv_scale, new, ratio = kv_scales.grow(*jnp.split(new, 2, axis=-1), kv_scale, kv.dtype, kv.shape[3], layer=layer, **places)
    window = jnp.asarray(window, jnp.int32)
    given = _Rows(q, new, rows, layer, window, scale, q_sinks, sink_logits, tree, kv_scale, ratio, interpret)
    out: Any = jnp.zeros_like(q)
    lse = jnp.full(q.shape[:2], -jnp.inf)
    for most in (1,) if q_max == 1 else (q_max, 1):
        decode = most == 1
        splits, words = (kv_splits, 0) if decode or tree is None else (1, tree.shape[1])
        sizes = blocks if blocks and most == q_max else tuned_blocks(chip, q, kv, most)
        plan = make_plan(q, kv, page_table.shape[1], most, softcap, sinks, sizes)
        plan = dataclasses.replace(plan, tree_words=words, logits=sink_logits is not None, lse=with_lse or (decode and splits > 1))
        length = jnp.where((rows["q_len"] == 1) == decode, rows["q_len"], 0)
        attend = given.attend if dealt is None else functools.partial(_attend_held, given, places, dealt)
        out, kv, lse = attend(plan, kv, length, splits, out, lse)
    return out, kv, kv_scale, lse if with_lse else None
