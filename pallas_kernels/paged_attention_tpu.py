"""Paged attention for TPU: causal (optionally windowed) attention over a paged cache that it also extends, in place.

Algorithm. The cache stays in HBM. The query rows are cut into tiles (one token for decode, 16 to 128 tokens otherwise) and each
overlap of a tile with a sequence is one work item, one grid step. An item walks over the blocks of keys that its rows can see,
several pages a block, copied page by page into one of two VMEM buffers while the other is in use; the next item's first block is
requested during the last block of this one. Softmax is online, in float32.

The item's own new keys and values are the last positions that it sees. They are patched into the block in VMEM and written to
the cache from there, in aligned windows of rows, since a single row of a tiled array cannot be addressed. Three rules keep reads
and writes of the same rows in order:
  1. an item sees no position after its own last one, so the new rows it needs are its own or those of earlier items;
  2. items of one sequence run in order, and a sequence's item begins by waiting for the writes of the item before it;
  3. the first block of the next item is only requested early if it ends before the first row this call writes to that sequence.

Sources: Dao et al., FlashAttention-2 (arXiv 2307.08691), for the online softmax; Kwon et al., PagedAttention (arXiv 2309.06180).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention_plan import LANES, Plan, check, from_tiles, make_plan, new_to_tiles, to_tiles, vmem_bytes, work_items
from pallas_kernels.paged_attention_softmax import LOG2E, REACH, SUBLANES, Columns, Rows

UNROLLED_ROWS = 4096  # of heads that are looked at side by side


class _Scalars(NamedTuple):
    """The prefetched integers, in SMEM inside the kernel."""

    layer: jax.Array  # [1]
    window: jax.Array  # [1], 0 = full attention
    page_table: jax.Array  # [R * pages_per_seq]
    q_start: jax.Array  # [R]
    q_len: jax.Array  # [R]
    kv_len: jax.Array  # [R]
    item_seq: jax.Array  # [items]
    item_tile: jax.Array  # [items]
    item_count: jax.Array  # [1]
    exact: jax.Array  # [1], 1: no block is looked at without a new maximum


class _Item(NamedTuple):
    """One work item: `count` new tokens of sequence `seq`, rows `row`.. of the tile, positions `first`..`end`-1; sees `low`..`end`-1."""

    seq: jax.Array
    row: jax.Array
    first: jax.Array
    end: jax.Array
    low: jax.Array


def _item(plan: Plan, s: _Scalars, i) -> _Item:
    seq, tile_row = s.item_seq[i], s.item_tile[i] * plan.tile
    start, length = s.q_start[seq], s.q_len[seq]
    row_from, row_to = jnp.maximum(start, tile_row), jnp.minimum(start + length, tile_row + plan.tile)
    first = s.kv_len[seq] - length + row_from - start
    low = jnp.where(s.window[0] > 0, jnp.maximum(first - s.window[0] + 1, 0), 0)
    return _Item(seq, row_from - tile_row, first, first + row_to - row_from, low)


def _requested_early(plan: Plan, s: _Scalars, i, item: _Item):
    """Whether the item before `i` requested the first block of `i` (rule 3)."""
    written_from = (s.kv_len[item.seq] - s.q_len[item.seq]) // plan.align * plan.align
    clean = (item.low // plan.block + 1) * plan.block <= written_from
    return (i > 0) & ((s.item_seq[jnp.maximum(i - 1, 0)] != item.seq) | clean)


def _heads(plan: Plan):
    """The key-value heads of this step."""
    return pl.ds(pl.program_id(0) * plan.heads, plan.heads)


class _Reader(NamedTuple):
    """Copies blocks of pages from the cache into one of two VMEM buffers."""

    plan: Plan
    s: _Scalars
    kv: jax.Array
    buf: jax.Array
    sem: jax.Array

    def _copy(self, page_id, row, slot):
        dst = self.buf.at[slot, :, pl.ds(row, self.plan.page), :]
        return pltpu.make_async_copy(self.kv.at[self.s.layer[0], page_id, _heads(self.plan)], dst, self.sem.at[slot])

    def _by_size(self, item: _Item, b, full, one):
        """Runs full() for a block seen from its first page to its last, otherwise one(n) for the n-th page, for each page seen."""
        base = b * self.plan.block_pages
        first = jnp.maximum(item.low // self.plan.page - base, 0)
        end = jnp.minimum(pl.cdiv(item.end, self.plan.page) - base, self.plan.block_pages)
        whole = end - first == self.plan.block_pages
        pl.when(whole)(full)
        pl.when(jnp.logical_not(whole))(lambda: lax.fori_loop(first, end, lambda n, _: one(n), None))

    def start(self, item: _Item, b, slot):
        entry = item.seq * self.plan.pages_per_seq + b * self.plan.block_pages

        def one(n):
            self._copy(self.s.page_table[entry + n], pl.multiple_of(n * self.plan.page, self.plan.page), slot).start()

        def full():
            for n in range(self.plan.block_pages):
                one(n)

        self._by_size(item, b, full, one)

    def wait(self, item: _Item, b, slot):
        whole = self.buf.at[slot]
        self._by_size(item, b, pltpu.make_async_copy(whole, whole, self.sem.at[slot]).wait, lambda n: self._copy(0, 0, slot).wait())


class _Writer(NamedTuple):
    """Patches new rows into a block and writes them to the cache; `pending` counts its unfinished writes, by parity of the item."""

    plan: Plan
    s: _Scalars
    kv: jax.Array
    buf: jax.Array
    new: jax.Array
    stage: jax.Array
    pending: jax.Array
    sem: jax.Array

    def drain(self, parity):
        rows = self.stage.at[parity, 0, :, pl.ds(0, self.plan.write_rows), :]
        lax.fori_loop(0, self.pending[parity], lambda j, _: pltpu.make_async_copy(rows, rows, self.sem.at[parity]).wait(), None)
        self.pending[parity] = 0

    def _new_rows(self, h, shift):
        """New rows of head h in float32, moved so that a row's index is its position modulo the window size."""
        if self.plan.decode:
            return jnp.broadcast_to(self.new[0, 0, pl.ds(h, 1), :].astype(jnp.float32), (self.plan.align, 2 * self.plan.head_dim))
        return pltpu.roll(self.new[0, h].astype(jnp.float32), shift, 0)

    def patch(self, item: _Item, b, slot, parity):
        """Puts the item's new rows of block b into the buffer and starts their way to the cache."""
        for w in range(self.plan.windows):
            start = (item.first // self.plan.align + w) * self.plan.align
            patch = functools.partial(self._patch_window, item, start, b, slot, parity, w)
            pl.when((start < item.end) & (start // self.plan.block == b))(patch)

    def _patch_window(self, item: _Item, start, b, slot, parity, w):
        plan = self.plan
        pos = start + lax.broadcasted_iota(jnp.int32, (plan.align, 2 * plan.head_dim), 0)
        is_new = (pos >= item.first) & (pos < item.end)
        rows = pl.ds(pl.multiple_of(start - b * plan.block, plan.align), plan.align)
        shift = lax.rem(item.first - item.row + plan.tile, plan.align)

        def put(h, value):
            self.buf[slot, h, rows, :] = self.stage[parity, w, h] = value

        def copy():
            for h in range(plan.heads):
                put(h, self.new[0, h])

        def merge():
            for h in range(plan.heads):
                put(h, jnp.where(is_new, self._new_rows(h, shift), self.buf[slot, h, rows, :].astype(jnp.float32)).astype(self.buf.dtype))

        if plan.decode:
            merge()
        else:
            as_is = (shift == 0) & (start >= item.first) & (start + plan.align <= item.end)
            pl.when(as_is)(copy)
            pl.when(jnp.logical_not(as_is))(merge)
        for j in range(0, plan.align, plan.write_rows):
            at = start + j
            pl.when((at < item.end) & (at + plan.write_rows > item.first))(functools.partial(self._write, item, at, parity, w, j))

    def _write(self, item: _Item, at, parity, w, j):
        plan = self.plan
        page_id = self.s.page_table[item.seq * plan.pages_per_seq + at // plan.page]
        rows = pl.ds(pl.multiple_of(lax.rem(at, plan.page), plan.write_rows), plan.write_rows)
        src = self.stage.at[parity, w, :, pl.ds(j, plan.write_rows), :]
        pltpu.make_async_copy(src, self.kv.at[self.s.layer[0], page_id, _heads(plan), rows, :], self.sem.at[parity]).start()
        self.pending[parity] += 1


def _clear_unseen_values(plan: Plan, item: _Item, base, keys, buf, slot):
    """Zeroes those values among the first `keys` of the block at position `base` that no row
    of the item sees: zero times what lies there must not be NaN."""
    chunk = math.gcd(LANES, keys) if isinstance(keys, int) else math.gcd(LANES, plan.piece)
    lanes = slice(plan.value_lane, 2 * plan.head_dim)

    def clear(n, _):
        pos = base + n * chunk + lax.broadcasted_iota(jnp.int32, (chunk, 2 * plan.head_dim - plan.value_lane), 0)
        rows, seen = pl.ds(pl.multiple_of(n * chunk, chunk), chunk), (pos >= item.low) & (pos < item.end)
        for h in range(plan.heads):
            buf[slot, h, rows, lanes] = jnp.where(seen, buf[slot, h, rows, lanes].astype(jnp.float32), 0.0).astype(buf.dtype)

    pl.when(base < item.low)(lambda: lax.fori_loop(0, pl.cdiv(item.low - base, chunk), clear, None))
    pl.when(base + keys > item.end)(lambda: lax.fori_loop((item.end - base) // chunk, keys // chunk, clear, None))


def _visible(plan: Plan, s: _Scalars, item: _Item, base, keys: int, known: int = 0):
    """Which keys from position `base` on each row sees: for decode the mask [rows, keys] of the first `keys`, for a tile a function as
    Columns.attend takes it. known: so many keys, from the first on, are seen by every row."""
    reach = jnp.where(s.window[0] > 0, s.window[0], 1 << 30)
    if plan.decode:
        back = item.first - base - lax.broadcasted_iota(jnp.int32, (plan.rows, keys), 1)
        return (back >= 0) & (back < reach)
    token = lax.broadcasted_iota(jnp.int32, (SUBLANES, plan.rows), 1) & (plan.tile - 1)
    back = item.first - item.row - base + token - lax.broadcasted_iota(jnp.int32, (SUBLANES, plan.rows), 0)
    # as unsigned numbers, so that one comparison does for both ends
    mask = lambda n: (back - SUBLANES * n).astype(jnp.uint32) < reach.astype(jnp.uint32)
    return lambda n: None if SUBLANES * (n + 1) <= known else mask(n)


class _Sinks(NamedTuple):
    """The first tokens of a sequence, for rows whose window has left them behind: a block of their own, with queries of their own."""

    plan: Plan
    s: _Scalars
    kv: jax.Array
    q: jax.Array
    buf: jax.Array
    sem: jax.Array

    def attend(self, item: _Item, softmax: Rows | Columns):
        """After all other blocks of the item, since new rows of its own may be among the sinks; what it wrote has been waited for."""
        plan = self.plan
        copies = [
            pltpu.make_async_copy(
                self.kv.at[self.s.layer[0], self.s.page_table[item.seq * plan.pages_per_seq + n], _heads(plan)],
                self.buf.at[:, pl.ds(n * plan.page, plan.page), :],
                self.sem,
            )
            for n in range(plan.sink_rows // plan.page)
        ]
        for copy in copies:
            copy.start()
        for copy in copies:
            copy.wait()
        left = jnp.minimum(plan.sinks, item.end - self.s.window[0])  # what the last row has left behind
        known = lax.broadcasted_iota(jnp.int32, (plan.sink_rows, 2 * plan.head_dim), 0) < left

        def head(h):
            rows = jnp.where(known, self.buf[h].astype(jnp.float32), 0.0).astype(self.buf.dtype)  # zero times NaN must not be
            softmax.attend(h, self.q[0, h], rows, self._visible(item))

        _for_heads(plan, plan.heads if plan.decode else 1, head)

    def _visible(self, item: _Item):
        """As _visible, for the keys of the sinks."""
        plan, behind = self.plan, item.first - item.row - self.s.window[0]
        if plan.decode:
            key = lax.broadcasted_iota(jnp.int32, (plan.rows, plan.sink_rows), 1)
            return (key < plan.sinks) & (key <= behind)
        token = lax.broadcasted_iota(jnp.int32, (SUBLANES, plan.rows), 1) & (plan.tile - 1)
        key = lax.broadcasted_iota(jnp.int32, (SUBLANES, plan.rows), 0)
        return lambda n: (key < plan.sinks - SUBLANES * n) & (key <= behind + token - SUBLANES * n)


def _for_heads(plan: Plan, unrolled: int, body):
    """Runs body(h) for each key-value head, about `unrolled` heads side by side, so that they overlap in the schedule."""
    step = math.gcd(plan.heads, max(1, unrolled))
    if step == plan.heads:
        for h in range(plan.heads):
            body(h)
        return

    def some(n, _):
        for h in range(step):
            body(n * step + h)

    lax.fori_loop(0, plan.heads // step, some, None)


class _Step(NamedTuple):
    """Attention of one work item by one step's heads."""

    plan: Plan
    s: _Scalars
    reader: _Reader
    writer: _Writer
    sinks: _Sinks | None
    q: jax.Array
    out: jax.Array
    softmax: Rows | Columns
    excess: jax.Array | None
    slot: jax.Array  # of the first block; then that of the next item's

    def run(self):
        """Leaves the result in out."""
        plan, s = self.plan, self.s
        i, parity = pl.program_id(1), lax.rem(pl.program_id(1), 2)
        item, last = _item(plan, s, i), i + 1 == s.item_count[0]
        following = _item(plan, s, jnp.where(last, i, i + 1))
        early = jnp.logical_not(last) & _requested_early(plan, s, i + 1, following)

        self.writer.drain(parity)
        pl.when((i > 0) & (s.item_seq[jnp.maximum(i - 1, 0)] == item.seq))(lambda: self.writer.drain(1 - parity))
        first_slot = self.slot[0]
        pl.when(jnp.logical_not(_requested_early(plan, s, i, item)))(lambda: self.reader.start(item, item.low // plan.block, first_slot))
        token = lax.broadcasted_iota(jnp.int32, (1, plan.rows), 1) & (plan.tile - 1)
        mine = (token >= item.row) & (token < item.row + item.end - item.first)
        self._look(item, following, early, parity)
        self._finish(item, mine)
        pl.when(last)(lambda: lax.fori_loop(0, 2, lambda either, _: self.writer.drain(either), None))

    def _look(self, item: _Item, following: _Item, early, parity):
        """Goes over all blocks that the item sees. early: the next item's first block is requested during the last one."""
        plan, first, end, slot0 = self.plan, item.low // self.plan.block, pl.cdiv(item.end, self.plan.block), self.slot[0]
        self.softmax.reset()

        def block(b, _):
            slot = (slot0 + b - first) % 2
            more = b + 1 < end
            pl.when(more)(lambda: self.reader.start(item, b + 1, 1 - slot))
            pl.when(jnp.logical_not(more) & early)(lambda: self.reader.start(following, following.low // plan.block, 1 - slot))
            self.reader.wait(item, b, slot)
            self.writer.patch(item, b, slot, parity)
            if plan.decode:
                self._attend_block(item, b, slot)
            else:
                self._attend_pieces(item, b, slot)

        lax.fori_loop(first, end, block, None)
        if self.sinks is not None:
            pl.when(item.first < plan.sinks)(lambda: self.writer.drain(parity))
            pl.when((self.s.window[0] > 0) & (item.end > self.s.window[0]))(lambda: self.sinks.attend(item, self.softmax))
        self.slot[0] = (slot0 + end - first) % 2

    def _whole(self, item: _Item, start, keys: int):
        """Whether every row sees all `keys` keys from position `start` on."""
        window = self.s.window[0]
        return (start + keys <= item.first + 1) & ((window == 0) | (start + window >= item.end))

    def _attend_block(self, item: _Item, b, slot):
        plan, buf, base = self.plan, self.reader.buf, b * self.plan.block

        def attend(keys, whole=False):
            visible = None
            if not whole:
                _clear_unseen_values(plan, item, base, keys, buf, slot)
                visible = _visible(plan, self.s, item, base, keys)
            _for_heads(plan, plan.heads, lambda h: self.softmax.attend(h, self.q[0, h], buf[slot, h, :keys], visible))

        whole = self._whole(item, base, plan.block)
        short = item.end - base <= plan.short_block if plan.short_block < plan.block else False
        pl.when(whole)(lambda: attend(plan.block, whole=True))
        pl.when(jnp.logical_not(whole | short))(lambda: attend(plan.block))
        if plan.short_block < plan.block:
            pl.when(short & jnp.logical_not(whole))(lambda: attend(plan.short_block))

    def _attend_pieces(self, item: _Item, b, slot):
        plan, buf, base, size = self.plan, self.reader.buf, b * self.plan.block, self.plan.piece
        first = jnp.maximum(item.low - base, 0) // size
        end = pl.cdiv(jnp.minimum(item.end - base, plan.block), size)
        last_low = jnp.where(self.s.window[0] > 0, jnp.maximum(item.end - self.s.window[0], 0), 0)
        _clear_unseen_values(plan, item, base, end * size, buf, slot)

        def piece(n, _):
            start = base + n * size
            whole = self._whole(item, start, size)
            fresh = start <= last_low  # a row may have seen no key of an earlier piece
            first_of_all = (b == item.low // plan.block) & (n == first) & (last_low < start + plan.probe)
            exact = (self.s.exact[0] > 0) | (fresh & jnp.logical_not(first_of_all))

            def attend(begin, keys, how, unrolled=1, known=0):  # known: so many keys, from the first on, are seen by every row
                visible = _visible(plan, self.s, item, base + begin, keys, known) if known < keys else None
                at = pl.ds(pl.multiple_of(begin, keys), keys)
                _for_heads(plan, unrolled, lambda h: how(h, self.q[0, h], buf[slot, h, at], visible))

            softmax, narrow, wide = self.softmax, plan.probe, UNROLLED_ROWS // plan.rows
            go_on, half = functools.partial(softmax.attend, settled=True), size // 2 // SUBLANES * SUBLANES
            pl.when(exact)(
                lambda: lax.fori_loop(0, size // narrow, lambda m, _: attend(n * size + m * narrow, narrow, softmax.attend), None)
            )
            pl.when(jnp.logical_not(exact) & fresh)(lambda: attend(n * size, narrow, softmax.probe, wide))
            half_known = self._whole(item, start, half)
            pl.when(jnp.logical_not(exact) & whole)(lambda: attend(n * size, size, go_on, wide, size))
            pl.when(jnp.logical_not(exact | whole) & half_known)(lambda: attend(n * size, size, go_on, 1, half))
            pl.when(jnp.logical_not(exact | whole | half_known))(lambda: attend(n * size, size, go_on))

        lax.fori_loop(first, end, piece, None)

    def _finish(self, item: _Item, mine):
        plan, out = self.plan, self.out

        def head(h):
            result = self.softmax.result(h)
            if not plan.decode:
                result = jnp.where(mine, result, out[0, h].astype(jnp.float32))
            out[0, h] = result.astype(out.dtype)

        _for_heads(plan, plan.heads if plan.decode else 1, head)
        if not plan.decode:
            worst = jnp.where(mine, self.softmax.worst[...], 0.0)
            for at in range(0, plan.rows, LANES):
                part = worst[:, at : at + LANES]
                lanes = slice(0, part.shape[1])
                self.excess[0, :, lanes] = jnp.maximum(self.excess[0, :, lanes], part)


def _kernel(*refs, plan: Plan):
    s, refs = _Scalars(*refs[:10]), refs[10:]
    q_ref, new_ref, _, *refs = refs
    sink_q, *refs = refs if plan.sinks else (None, *refs)
    out_ref, kv_ref, *refs = refs
    excess, *refs = (None, *refs) if plan.decode else refs
    buf, stage, slot_ref, pending, read_sem, write_sem, *refs = refs
    sums, sink_refs = (refs[:-2], refs[-2:]) if plan.sinks else (refs, [])

    @pl.when(pl.program_id(1) == 0)
    def _():
        slot_ref[0], pending[0], pending[1] = 0, 0, 0
        if not plan.decode:
            excess[...] = jnp.zeros_like(excess)

    @pl.when(pl.program_id(1) < s.item_count[0])
    def _():
        reader = _Reader(plan, s, kv_ref, buf, read_sem)
        writer = _Writer(plan, s, kv_ref, buf, new_ref, stage, pending, write_sem)
        sinks = None if sink_q is None else _Sinks(plan, s, kv_ref, sink_q, *sink_refs)
        softmax = (Rows if plan.decode else Columns)(plan, *sums)
        _Step(plan, s, reader, writer, sinks, q_ref, out_ref, softmax, excess, slot_ref).run()


def _call(plan: Plan, q, new, kv, s: _Scalars, *, sink_q, interpret):
    """The pallas_call: (out tiles, kv), and for tiles the largest excess of a score. sink_q: like q, or None without sinks."""
    tiles, row = q.shape[0], 2 * plan.head_dim
    tile_of = lambda c, i, *scalars: (scalars[7][i], c, 0, 0)
    queries = pl.BlockSpec((1, plan.heads, plan.rows, plan.width), tile_of)
    new_block = (1, 1, plan.heads, row) if plan.decode else (1, plan.heads, plan.tile, row)
    result = (plan.rows, plan.width) if plan.decode else (plan.head_dim, plan.rows)
    f32 = lambda *shape: pltpu.VMEM(shape, jnp.float32)
    if plan.decode:
        sums = [f32(plan.heads, plan.rows, lanes) for lanes in (plan.width, LANES, LANES)]
    else:
        sums = [f32(plan.heads, rows, plan.rows) for rows in (plan.head_dim, SUBLANES, SUBLANES)] + [f32(SUBLANES, plan.rows)]
    excess = [
        pl.BlockSpec((1, SUBLANES, LANES), lambda c, *_: (c, 0, 0)),
        jax.ShapeDtypeStruct((plan.chunks, SUBLANES, LANES), jnp.float32),
    ]
    excess = [] if plan.decode else excess
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(s),
        grid=(plan.chunks, s.item_seq.shape[0]),
        in_specs=[
            queries,
            pl.BlockSpec(new_block, tile_of),
            pl.BlockSpec(memory_space=pl.ANY),
            *([queries] if plan.sinks else []),
        ],
        out_specs=[pl.BlockSpec((1, plan.heads, *result), tile_of), pl.BlockSpec(memory_space=pl.ANY), *excess[:1]],
        scratch_shapes=[
            pltpu.VMEM((2, plan.heads, plan.block, row), kv.dtype),
            pltpu.VMEM((2, plan.windows, plan.heads, plan.align, row), kv.dtype),
            pltpu.SMEM((1,), jnp.int32),
            pltpu.SMEM((2,), jnp.int32),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
            *sums,
            *([pltpu.VMEM((plan.heads, plan.sink_rows, row), kv.dtype), pltpu.SemaphoreType.DMA(())] if plan.sinks else []),
        ],
    )
    vmem = max(vmem_bytes(plan, kv.dtype.itemsize, q.dtype.itemsize), 16 << 20)
    params = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), disable_bounds_checks=True, vmem_limit_bytes=vmem)
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        out_shape=[
            jax.ShapeDtypeStruct((tiles, plan.heads * plan.chunks, *result), q.dtype),
            jax.ShapeDtypeStruct(kv.shape, kv.dtype),
            *excess[1:],
        ],
        grid_spec=grid_spec,
        input_output_aliases={len(s) + 2: 1},
        compiler_params=params,
        interpret=interpret,
        name="paged_decode" if plan.decode else "paged_prefill",
    )(*s, q, new, kv, *([] if sink_q is None else [sink_q]))


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
    interpret=False,
):
    """Writes new keys and values into a paged cache and attends to it. See pallas_kernels.paged_attention for the reference.

    q [T, Hq, D], k and v [T, Hkv, D]: new rows of all sequences, flattened; query head h uses key-value head h // (Hq // Hkv).
    kv [L, P, Hkv, page, 2D]: the cache, keys in lanes 0..D-1, values in D..2D-1. Donate it: it is updated in place.
    layer, window: int32 scalars; window 0 is full attention, otherwise position p sees p-window+1..p.
    page_table int32 [R, pages_per_seq]; q_start, q_len, kv_len int32 [R]: first row, rows and context length (new rows included).
    q_max: static upper bound of q_len. 1 builds only the decode kernel; otherwise sequences with one row go through the decode
    kernel and the others through the tiled one. sinks (static), q_sinks [T, Hq, D]: see the reference; a window must be given with them.
    interpret: False, True or a pltpu.InterpretParams.
    Returns (out [T, Hq, D] of q's dtype, zero in rows of no sequence, and kv).
    Raises ValueError for shapes and types that the kernel does not take. Page ids are not checked: one out of range is undefined.
    """
    check(q, k, v, kv, page_table, q_max)
    interpret = pltpu.InterpretParams() if interpret is True else interpret
    scalar = lambda x: jnp.asarray(x, jnp.int32).reshape(1)
    shared = (scalar(layer), scalar(window), page_table.reshape(-1).astype(jnp.int32))
    q_start, q_len, kv_len = (x.astype(jnp.int32) for x in (q_start, q_len, kv_len))
    new = jnp.concatenate([k, v], axis=-1).astype(kv.dtype)
    row = jnp.arange(q.shape[0], dtype=jnp.int32)[:, None]
    out = jnp.zeros_like(q)
    for most in (1,) if q_max == 1 else (1, q_max):
        plan = make_plan(q, kv, page_table.shape[1], most, softcap, sinks)
        length = jnp.where((q_len == 1) if plan.decode else (q_len > 1), q_len, 0)
        # The first sequence of several rows begins a tile; one that crosses into a tile costs that tile once more.
        shift = 0 if plan.decode else jnp.min(jnp.where(length > 0, q_start, q.shape[0]))
        turned = lambda x, by, decode=plan.decode: x if decode else jnp.roll(x, by, axis=0)
        factor = scale * LOG2E if softcap is None else scale / softcap
        tiles, sink_tiles = (
            None if x is None else to_tiles(plan, turned((x.astype(jnp.float32) * factor).astype(plan.compute), -shift))
            for x in (q, q_sinks if sinks else None)
        )
        items = work_items(plan, tiles.shape[0] * plan.tile, q_start - shift, length)
        call = functools.partial(_call, plan, tiles, new_to_tiles(plan, turned(new, -shift)), sink_q=sink_tiles, interpret=interpret)
        scalars = (*shared, q_start - shift, length, kv_len, *items)
        part, kv = call(kv, _Scalars(*scalars, scalar(0))) if plan.decode else _until_exact(call, kv, scalars)
        owned = jnp.any((row >= q_start) & (row < q_start + length), axis=1)
        out = jnp.where(owned[:, None, None], turned(from_tiles(plan, part, q.shape[0]), shift).astype(q.dtype), out)
    return out, kv


def _until_exact(call, kv, scalars):
    """Runs the kernel of tiles, and once more without shortcuts where a score was so far above its reference that sums overflowed."""
    shapes = jax.eval_shape(lambda kv: call(kv, _Scalars(*scalars, jnp.zeros(1, jnp.int32))), kv)

    def run(state):
        turn, _, kv = state
        out, kv, excess = call(kv, _Scalars(*scalars, turn.reshape(1)))
        return jnp.where((turn == 0) & (jnp.max(excess) > REACH), 1, 2), out, kv

    _, out, kv = lax.while_loop(lambda state: state[0] < 2, run, (jnp.int32(0), lax.empty(shapes[0].shape, shapes[0].dtype), kv))
    return out, kv
