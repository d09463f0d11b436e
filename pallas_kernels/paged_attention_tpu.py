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

LOG2E = math.log2(math.e)
MASKED = -1e30  # finite, so that a row which sees nothing of a block stays free of NaN until a block that it sees rescales it


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


class _Reader(NamedTuple):
    """Copies blocks of pages from the cache into one of two VMEM buffers."""

    plan: Plan
    s: _Scalars
    kv: jax.Array
    buf: jax.Array
    sem: jax.Array

    def _copy(self, page_id, row, slot):
        dst = self.buf.at[slot, :, pl.ds(row, self.plan.page), :]
        return pltpu.make_async_copy(self.kv.at[self.s.layer[0], page_id], dst, self.sem.at[slot])

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
        if self.plan.tile == 1:
            return jnp.broadcast_to(self.new[0, pl.ds(h, 1), :].astype(jnp.float32), (self.plan.align, 2 * self.plan.head_dim))
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
        for h in range(plan.heads):
            merged = jnp.where(is_new, self._new_rows(h, shift), self.buf[slot, h, rows, :].astype(jnp.float32)).astype(self.buf.dtype)
            self.buf[slot, h, rows, :] = merged
            self.stage[parity, w, h] = merged
        for j in range(0, plan.align, plan.write_rows):
            at = start + j
            pl.when((at < item.end) & (at + plan.write_rows > item.first))(functools.partial(self._write, item, at, parity, w, j))

    def _write(self, item: _Item, at, parity, w, j):
        plan = self.plan
        page_id = self.s.page_table[item.seq * plan.pages_per_seq + at // plan.page]
        rows = pl.ds(pl.multiple_of(lax.rem(at, plan.page), plan.write_rows), plan.write_rows)
        src = self.stage.at[parity, w, :, pl.ds(j, plan.write_rows), :]
        pltpu.make_async_copy(src, self.kv.at[self.s.layer[0], page_id, :, rows, :], self.sem.at[parity]).start()
        self.pending[parity] += 1


def _clear_unseen_values(plan: Plan, item: _Item, b, keys: int, buf, slot):
    """Zeroes those values among the first `keys` of block b that no row of the item sees: zero times what lies there must not be NaN."""
    base, chunk = b * plan.block, math.gcd(LANES, keys)
    lanes = slice(plan.value_lane, 2 * plan.head_dim)

    def clear(n, _):
        pos = base + n * chunk + lax.broadcasted_iota(jnp.int32, (chunk, 2 * plan.head_dim - plan.value_lane), 0)
        rows, seen = pl.ds(pl.multiple_of(n * chunk, chunk), chunk), (pos >= item.low) & (pos < item.end)
        for h in range(plan.heads):
            buf[slot, h, rows, lanes] = jnp.where(seen, buf[slot, h, rows, lanes].astype(jnp.float32), 0.0).astype(buf.dtype)

    pl.when(base < item.low)(lambda: lax.fori_loop(0, pl.cdiv(item.low - base, chunk), clear, None))
    pl.when(base + keys > item.end)(lambda: lax.fori_loop((item.end - base) // chunk, keys // chunk, clear, None))


def _visible(plan: Plan, s: _Scalars, item: _Item, b, keys: int):
    """Mask [rows, keys]: which of the first keys of block b each row sees."""
    shape = (plan.rows, keys)
    token = lax.broadcasted_iota(jnp.int32, shape, 0) & (plan.tile - 1)
    row_pos = item.first - item.row + token
    key_pos = b * plan.block + lax.broadcasted_iota(jnp.int32, shape, 1)
    oldest = jnp.where(s.window[0] > 0, row_pos - s.window[0], -1)
    return (key_pos <= row_pos) & (key_pos > oldest)


def _lane_sums(x):
    """x [rows, n] summed to [rows, LANES], of which the lanes' sum is wanted: crossing lanes is left for the end."""
    if x.shape[1] % LANES:
        return jnp.broadcast_to(jnp.sum(x, axis=1, keepdims=True) * (1 / LANES), (x.shape[0], LANES))
    return functools.reduce(jnp.add, [x[:, at : at + LANES] for at in range(0, x.shape[1], LANES)])


def _by_lanes(operation, x, row):
    """operation of x [rows, n] with a value of each row, row [rows, LANES] holding it in every lane: nothing crosses lanes."""
    if x.shape[1] % LANES:
        return operation(x, row[:, :1])
    return jnp.concatenate([operation(x[:, at : at + LANES], row) for at in range(0, x.shape[1], LANES)], axis=1)


def _attend_block(plan: Plan, h, q, kv, visible, acc, top, total):
    """One step of the online softmax: rows q [rows, width] of head h against keys and values kv [keys, 2 * head_dim]. visible: a mask, or
    None where every row sees all. Exponents are of 2, and the queries are scaled for that. total: each lane has a part of the sum."""
    precision = lax.Precision.HIGHEST if plan.compute == jnp.float32 else lax.Precision.DEFAULT
    dot = functools.partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
    keys, values = kv[:, : plan.width].astype(plan.compute), kv[:, plan.value_lane :].astype(plan.compute)
    scores = dot(q, keys, (((1,), (1,)), ((), ())))
    if plan.softcap is not None:
        scores = jnp.tanh(scores) * (plan.softcap * LOG2E)
    if visible is not None:
        scores = jnp.where(visible, scores, MASKED)
    old_top = top[h]
    new_top = jnp.maximum(old_top, jnp.max(scores, axis=1, keepdims=True))
    weights, shrink = jnp.exp2(_by_lanes(jnp.subtract, scores, new_top)), jnp.exp2(old_top - new_top)
    top[h] = new_top
    total[h] = total[h] * shrink + _lane_sums(weights)
    acc[h] = _by_lanes(jnp.multiply, acc[h], shrink) + dot(weights.astype(plan.compute), values, (((1,), (0,)), ((), ())))


class _Sinks(NamedTuple):
    """The first tokens of a sequence, for rows whose window has left them behind: a block of their own, with queries of their own."""

    plan: Plan
    s: _Scalars
    kv: jax.Array
    q: jax.Array
    buf: jax.Array
    sem: jax.Array

    def attend(self, item: _Item, acc, top, total):
        """After all other blocks of the item, since new rows of its own may be among the sinks; what it wrote has been waited for."""
        plan, size = self.plan, (self.plan.rows, self.plan.sink_rows)
        copies = [
            pltpu.make_async_copy(
                self.kv.at[self.s.layer[0], self.s.page_table[item.seq * plan.pages_per_seq + n]],
                self.buf.at[:, pl.ds(n * plan.page, plan.page), :],
                self.sem,
            )
            for n in range(plan.sink_rows // plan.page)
        ]
        for copy in copies:
            copy.start()
        for copy in copies:
            copy.wait()
        token = lax.broadcasted_iota(jnp.int32, size, 0) & (plan.tile - 1)
        key_pos = lax.broadcasted_iota(jnp.int32, size, 1)
        visible = (key_pos < plan.sinks) & (key_pos <= item.first - item.row + token - self.s.window[0])
        left = jnp.minimum(plan.sinks, item.end - self.s.window[0])  # what the last row has left behind
        known = lax.broadcasted_iota(jnp.int32, (plan.sink_rows, 2 * plan.head_dim), 0) < left

        def head(h):
            rows = jnp.where(known, self.buf[h].astype(jnp.float32), 0.0).astype(self.buf.dtype)  # zero times NaN must not be
            _attend_block(plan, h, self.q[0, h], rows, visible, acc, top, total)

        _for_heads(plan, head)


def _for_heads(plan: Plan, body):
    """Runs body(h) for each key-value head, unrolled as far as the tile is small, so that the heads overlap in the schedule."""
    step = math.gcd(plan.heads, max(1, 1024 // plan.rows))
    if step == plan.heads:
        for h in range(plan.heads):
            body(h)
        return

    def some(n, _):
        for h in range(step):
            body(n * step + h)

    lax.fori_loop(0, plan.heads // step, some, None)


def _run_item(plan: Plan, s: _Scalars, reader: _Reader, writer: _Writer, sinks: _Sinks | None, q_ref, out_ref, softmax, slot_ref):
    """Attention of one work item; leaves the result in out_ref and the slot of the next item's first block in slot_ref."""
    i, parity = pl.program_id(0), lax.rem(pl.program_id(0), 2)
    item, last = _item(plan, s, i), i + 1 == s.item_count[0]
    following = _item(plan, s, jnp.where(last, i, i + 1))
    ask_early = jnp.logical_not(last) & _requested_early(plan, s, i + 1, following)
    first_block, end_block, slot0 = item.low // plan.block, pl.cdiv(item.end, plan.block), slot_ref[0]
    acc, top, total = softmax

    writer.drain(parity)
    pl.when((i > 0) & (s.item_seq[jnp.maximum(i - 1, 0)] == item.seq))(lambda: writer.drain(1 - parity))
    pl.when(jnp.logical_not(_requested_early(plan, s, i, item)))(lambda: reader.start(item, first_block, slot0))
    acc[...], total[...] = jnp.zeros_like(acc), jnp.zeros_like(total)
    top[...] = jnp.full_like(top, MASKED)

    def block(b, _):
        slot = (slot0 + b - first_block) % 2
        more = b + 1 < end_block
        pl.when(more)(lambda: reader.start(item, b + 1, 1 - slot))
        pl.when(jnp.logical_not(more) & ask_early)(lambda: reader.start(following, following.low // plan.block, 1 - slot))
        reader.wait(item, b, slot)
        writer.patch(item, b, slot, parity)

        def attend(keys, whole=False):
            visible = None
            if not whole:
                _clear_unseen_values(plan, item, b, keys, reader.buf, slot)
                visible = _visible(plan, s, item, b, keys)
            _for_heads(plan, lambda h: _attend_block(plan, h, q_ref[0, h], reader.buf[slot, h, :keys], visible, acc, top, total))

        base = b * plan.block
        whole = (base + plan.block <= item.first + 1) & ((s.window[0] == 0) | (base + s.window[0] >= item.end))
        short = item.end - base <= plan.short_block if plan.short_block < plan.block else False
        pl.when(whole)(lambda: attend(plan.block, whole=True))
        pl.when(jnp.logical_not(whole | short))(lambda: attend(plan.block))
        if plan.short_block < plan.block:
            pl.when(short & jnp.logical_not(whole))(lambda: attend(plan.short_block))

    lax.fori_loop(first_block, end_block, block, None)
    if sinks is not None:
        pl.when(item.first < plan.sinks)(lambda: writer.drain(parity))
        pl.when((s.window[0] > 0) & (item.end > s.window[0]))(lambda: sinks.attend(item, *softmax))
    slot_ref[0] = (slot0 + end_block - first_block) % 2

    token = lax.broadcasted_iota(jnp.int32, (plan.rows, plan.width), 0) & (plan.tile - 1)
    mine = (token >= item.row) & (token < item.row + item.end - item.first)

    def finish(h):
        result = acc[h] / jnp.sum(total[h], axis=1, keepdims=True)
        out_ref[0, h] = jnp.where(mine, result, out_ref[0, h].astype(jnp.float32)).astype(out_ref.dtype)

    _for_heads(plan, finish)
    pl.when(last)(lambda: lax.fori_loop(0, 2, lambda either, _: writer.drain(either), None))


def _kernel(*refs, plan: Plan):
    s, refs = _Scalars(*refs[:9]), refs[9:]
    q_ref, new_ref, _, *refs = refs
    sink_q, *refs = refs if plan.sinks else (None, *refs)
    out_ref, kv_ref, buf, stage, acc, top, total, slot_ref, pending, read_sem, write_sem, *sink_refs = refs

    @pl.when(pl.program_id(0) == 0)
    def _():
        slot_ref[0], pending[0], pending[1] = 0, 0, 0

    @pl.when(pl.program_id(0) < s.item_count[0])
    def _():
        reader = _Reader(plan, s, kv_ref, buf, read_sem)
        writer = _Writer(plan, s, kv_ref, buf, new_ref, stage, pending, write_sem)
        sinks = None if sink_q is None else _Sinks(plan, s, kv_ref, sink_q, *sink_refs)
        _run_item(plan, s, reader, writer, sinks, q_ref, out_ref, (acc, top, total), slot_ref)


def _call(plan: Plan, q, new, kv, sink_q, s: _Scalars, interpret):
    """The pallas_call: (out tiles, kv). sink_q: like q, or None without sinks."""
    tiles, new_shape = q.shape[0], new.shape[1:]
    tile_of = lambda dims: lambda i, *scalars: (scalars[7][i],) + (0,) * dims
    block = (1, plan.heads, plan.rows, plan.width)
    row = 2 * plan.head_dim
    softmax = [pltpu.VMEM((plan.heads, plan.rows, lanes), jnp.float32) for lanes in (plan.width, LANES, LANES)]
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(s),
        grid=(s.item_seq.shape[0],),
        in_specs=[
            pl.BlockSpec(block, tile_of(3)),
            pl.BlockSpec((1, *new_shape), tile_of(len(new_shape))),
            pl.BlockSpec(memory_space=pl.ANY),
            *([pl.BlockSpec(block, tile_of(3))] if plan.sinks else []),
        ],
        out_specs=[pl.BlockSpec(block, tile_of(3)), pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[
            pltpu.VMEM((2, plan.heads, plan.block, row), kv.dtype),
            pltpu.VMEM((2, plan.windows, plan.heads, plan.align, row), kv.dtype),
            *softmax,
            pltpu.SMEM((1,), jnp.int32),
            pltpu.SMEM((2,), jnp.int32),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
            *([pltpu.VMEM((plan.heads, plan.sink_rows, row), kv.dtype), pltpu.SemaphoreType.DMA(())] if plan.sinks else []),
        ],
    )
    vmem = max(vmem_bytes(plan, kv.dtype.itemsize, q.dtype.itemsize), 16 << 20)
    params = pltpu.CompilerParams(dimension_semantics=("arbitrary",), disable_bounds_checks=True, vmem_limit_bytes=vmem)
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        out_shape=[jax.ShapeDtypeStruct((tiles, *block[1:]), q.dtype), jax.ShapeDtypeStruct(kv.shape, kv.dtype)],
        grid_spec=grid_spec,
        input_output_aliases={len(s) + 2: 1},
        compiler_params=params,
        interpret=interpret,
        name="paged_decode" if plan.tile == 1 else "paged_prefill",
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
    for tile_max in (1,) if q_max == 1 else (1, q_max):
        plan = make_plan(q, kv, page_table.shape[1], tile_max, softcap, sinks)
        length = jnp.where((q_len == 1) if tile_max == 1 else (q_len > 1), q_len, 0)
        factor = scale * LOG2E if softcap is None else scale / softcap
        scaled = lambda x, plan=plan, factor=factor: to_tiles(plan, (x.astype(jnp.float32) * factor).astype(plan.compute))
        tiles, sink_tiles = scaled(q), scaled(q_sinks) if sinks else None
        items = work_items(plan, tiles.shape[0] * plan.tile, q_start, length)
        scalars = _Scalars(*shared, q_start, length, kv_len, *items)
        part, kv = _call(plan, tiles, new_to_tiles(plan, new), kv, sink_tiles, scalars, interpret)
        owned = jnp.any((row >= q_start) & (row < q_start + length), axis=1)
        out = jnp.where(owned[:, None, None], from_tiles(plan, part, q.shape[0]).astype(q.dtype), out)
    return out, kv
