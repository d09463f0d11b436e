"""The pages of the TPU's paged attention: which part of which sequence a step works on, blocks of keys and values on their way
from the cache, and new rows on their way into it. See paged_attention_tpu.py for the rules that keep reads and writes in order."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dealt import held
from pallas_kernels.kv_scales import rounded
from pallas_kernels.paged_attention_plan import LANES, Plan


class Scalars(NamedTuple):
    """The prefetched integers, in SMEM inside the kernel."""

    layer: jax.Array  # [1]
    window: jax.Array  # [1], 0 = full attention
    exact: jax.Array  # [1], 1: no keys are looked at without a new maximum; the second time that a kernel runs
    page_table: jax.Array  # [R * pages_per_seq]
    q_start: jax.Array  # [R]
    q_len: jax.Array  # [R]
    kv_len: jax.Array  # [R]
    begin: jax.Array  # [R], positions before it are not looked at; for tiles of a dealt plan: the number of the first page that is held
    end: jax.Array  # [R], nor from here on: kv_len, or less where several entries share one context
    grown: jax.Array  # [R], 1: the scales of the page that the first new row goes into have grown
    item_seq: jax.Array  # [items]
    item_tile: jax.Array  # [items]
    item_count: jax.Array  # [1]


class Item(NamedTuple):
    """One work item: new tokens of sequence `seq`, rows `row`.. of the tile, positions `first`..`end`-1; sees `low`..`end`-1."""

    seq: jax.Array
    row: jax.Array
    first: jax.Array
    end: jax.Array
    low: jax.Array
    known: jax.Array  # every row sees all keys before this position, but for the window
    count: jax.Array  # of rows; where pages are dealt out, low, end and known are places (dealt.py), and others lie between


def item_of(plan: Plan, s: Scalars, i) -> Item:
    seq, tile_row = s.item_seq[i], s.item_tile[i] * plan.tile
    start, length = s.q_start[seq], s.q_len[seq]
    row_from, row_to = jnp.maximum(start, tile_row), jnp.minimum(start + length, tile_row + plan.tile)
    context, count = s.kv_len[seq] - length, row_to - row_from
    first = context + row_from - start
    if plan.reads:  # one key at least, where nothing is seen too: some page is read for each item
        dealt = (plan.dealt, s.begin[seq])
        end, known = (held(n, plan.page, dealt) for n in (first + count, first + 1))
        return Item(seq, row_from - tile_row, first, jnp.maximum(end, 1), jnp.int32(0), known, count)
    oldest = context if plan.tree_words else first  # a node of a tree lies behind its ancestors, not behind all rows before it
    low = jnp.where(s.window[0] > 0, jnp.maximum(oldest - s.window[0] + 1, 0), 0)
    end = jnp.minimum(first + count, s.end[seq])
    return Item(seq, row_from - tile_row, first, end, jnp.maximum(low, s.begin[seq]), context if plan.tree_words else first + 1, count)


def requested_early(plan: Plan, s: Scalars, i, item: Item):
    """Whether the item before `i` requested the first block of `i` (rule 3)."""
    if plan.reads:
        return i > 0
    written_from = (s.kv_len[item.seq] - s.q_len[item.seq]) // plan.align * plan.align
    clean = (item.low // plan.block + 1) * plan.block <= written_from
    return (i > 0) & ((s.item_seq[jnp.maximum(i - 1, 0)] != item.seq) | clean)


def step_heads(plan: Plan):
    """The key-value heads of this step."""
    return pl.ds(pl.program_id(0) * plan.heads, plan.heads)


class Reader(NamedTuple):
    """Copies blocks of pages from the cache into one of two VMEM buffers."""

    plan: Plan
    s: Scalars
    kv: jax.Array
    buf: jax.Array
    sem: jax.Array

    def _copy(self, page_id, row, slot):
        dst = self.buf.at[slot, :, pl.ds(row, self.plan.page), :]
        return pltpu.make_async_copy(self.kv.at[self.s.layer[0], page_id, step_heads(self.plan)], dst, self.sem.at[slot])

    def _by_size(self, item: Item, b, full, one):
        """Runs full() for a block seen from its first page to its last, otherwise one(n) for the n-th page, for each page seen."""
        base = b * self.plan.block_pages
        first = jnp.maximum(item.low // self.plan.page - base, 0)
        end = jnp.minimum(pl.cdiv(item.end, self.plan.page) - base, self.plan.block_pages)
        whole = end - first == self.plan.block_pages
        pl.when(whole)(full)
        pl.when(jnp.logical_not(whole))(lambda: lax.fori_loop(first, end, lambda n, _: one(n), None))

    def start(self, item: Item, b, slot):
        entry = item.seq * self.plan.pages_per_seq + b * self.plan.block_pages

        def one(n):
            self._copy(self.s.page_table[entry + n], pl.multiple_of(n * self.plan.page, self.plan.page), slot).start()

        def full():
            for n in range(self.plan.block_pages):
                one(n)

        self._by_size(item, b, full, one)

    def wait(self, item: Item, b, slot):
        whole = self.buf.at[slot]
        self._by_size(item, b, pltpu.make_async_copy(whole, whole, self.sem.at[slot]).wait, lambda n: self._copy(0, 0, slot).wait())


class Writer(NamedTuple):
    """Patches new rows into a block and writes them to the cache; `pending` counts its unfinished writes, by parity of the item."""

    plan: Plan
    s: Scalars
    kv: jax.Array
    buf: jax.Array
    new: Any  # None where nothing is written
    ratio: jax.Array | None  # of a page's old scales to its new ones, in each lane of a row; None without scales
    stage: jax.Array
    pending: jax.Array
    sem: jax.Array

    def drain(self, parity):
        rows = self.stage.at[parity, 0, :, pl.ds(0, self.plan.write_rows), :]
        lax.fori_loop(0, self.pending[parity], lambda j, _: pltpu.make_async_copy(rows, rows, self.sem.at[parity]).wait(), None)
        self.pending[parity] = 0

    def _tile(self, h: int):
        """Rows [tile, row] of the step's tile of new rows."""
        return self.new[:, h * self.plan.row : (h + 1) * self.plan.row]

    def _new_rows(self, h, shift):
        """New rows of head h in float32, moved so that a row's index is its position modulo the window size."""
        if self.plan.decode:
            return jnp.broadcast_to(self.new[0, 0, pl.ds(h, 1), :].astype(jnp.float32), (self.plan.align, self.plan.row))
        rows = jnp.pad(self._tile(h).astype(jnp.float32), ((0, self.plan.align - self.plan.tile), (0, 0)))
        return pltpu.roll(rows, shift, 0)

    def patch(self, item: Item, b, slot, parity):
        """Puts the item's new rows of block b into the buffer and starts their way to the cache."""
        if self.plan.reads:
            return
        for w in range(self.plan.windows):
            start = (item.first // self.plan.align + w) * self.plan.align
            patch = functools.partial(self._patch_window, item, start, b, slot, parity, w)
            pl.when((start < item.end) & (start // self.plan.block == b))(patch)

    def _patch_window(self, item: Item, start, b, slot, parity, w):
        plan = self.plan
        pos = start + lax.broadcasted_iota(jnp.int32, (plan.align, plan.row), 0)
        is_new = (pos >= item.first) & (pos < item.end)
        rows = pl.ds(pl.multiple_of(start - b * plan.block, plan.align), plan.align)
        shift = lax.rem(item.first - item.row + plan.align, plan.align)
        context = self.s.kv_len[item.seq] - self.s.q_len[item.seq]
        rescaled = plan.quantized & (item.first == context) & (self.s.grown[item.seq] > 0) & (self.s.exact[0] == 0)
        page_start = item.first // plan.page * plan.page

        def put(h, value):
            self.buf[slot, h, rows, :] = self.stage[parity, w, h] = value.astype(self.buf.dtype)

        def copy():
            for h in range(plan.heads):
                put(h, self._tile(h))

        def merge():
            for h in range(plan.heads):
                old = self.buf[slot, h, rows, :].astype(jnp.float32)
                if self.ratio is not None:
                    ratio = jnp.where(rescaled & (pos >= page_start) & (pos < item.first), self.ratio[0, 0, pl.ds(h, 1), :], 1.0)
                    old = rounded(self.buf.dtype, old * ratio)
                put(h, jnp.where(is_new, self._new_rows(h, shift), old))

        if plan.decode or plan.align > plan.tile:
            merge()
        else:
            as_is = (shift == 0) & (start >= item.first) & (start + plan.align <= item.end)
            pl.when(as_is)(copy)
            pl.when(jnp.logical_not(as_is))(merge)
        write_from = jnp.where(rescaled, page_start, item.first)
        for j in range(0, plan.align, plan.write_rows):
            at = start + j
            pl.when((at < item.end) & (at + plan.write_rows > write_from))(functools.partial(self._write, item, at, parity, w, j))

    def _write(self, item: Item, at, parity, w, j):
        plan = self.plan
        page_id = self.s.page_table[item.seq * plan.pages_per_seq + at // plan.page]
        rows = pl.ds(pl.multiple_of(lax.rem(at, plan.page), plan.write_rows), plan.write_rows)
        src = self.stage.at[parity, w, :, pl.ds(j, plan.write_rows), :]
        pltpu.make_async_copy(src, self.kv.at[self.s.layer[0], page_id, step_heads(plan), rows, :], self.sem.at[parity]).start()
        self.pending[parity] += 1


class Scaled(NamedTuple):
    """Blocks of a cache of int8 or fp8, times their scales: what attention then looks at."""

    plan: Plan
    scales: jax.Array  # SMEM [1, 1, blocks, 2 * heads * block_pages]: for head h its keys' scales of all pages, then its values'
    buf: jax.Array
    plain: jax.Array  # [1, heads, block, row]

    def unpack(self, item: Item, b, slot):
        """Fills `plain` with what the item sees of block b."""
        plan, page = self.plan, self.plan.page
        unit = math.lcm(page, 32)  # rows of a tile of 8-bit numbers
        lane = lax.broadcasted_iota(jnp.int32, (unit, plan.row), 1)
        row = lax.broadcasted_iota(jnp.int32, (unit, plan.row), 0)

        def some(n, _):
            rows = pl.ds(pl.multiple_of(n * unit, unit), unit)
            for h in range(plan.heads):
                scale = jnp.zeros((unit, plan.row), jnp.float32)
                for at in range(unit // page):
                    place = 2 * h * plan.block_pages + n * (unit // page) + at
                    keys, values = self.scales[0, 0, b, place], self.scales[0, 0, b, place + plan.block_pages]
                    scale = jnp.where(row >= at * page, jnp.where(lane < plan.head_dim, keys, values), scale)
                self.plain[0, h, rows, :] = (self.buf[slot, h, rows, :].astype(jnp.float32) * scale).astype(self.plain.dtype)

        first = jnp.maximum(item.low - b * plan.block, 0) // unit
        lax.fori_loop(first, pl.cdiv(jnp.minimum(item.end - b * plan.block, plan.block), unit), some, None)


def clear_unseen_values(plan: Plan, item: Item, base, keys, buf, slot):
    """Zeroes those values among the first `keys` of the block at position `base` that no row
    of the item sees: zero times what lies there must not be NaN."""
    chunk = math.gcd(LANES, keys) if isinstance(keys, int) else math.gcd(LANES, plan.piece)
    lanes = slice(plan.value_lane, plan.row)

    def clear(n, _):
        pos = base + n * chunk + lax.broadcasted_iota(jnp.int32, (chunk, plan.row - plan.value_lane), 0)
        rows, seen = pl.ds(pl.multiple_of(n * chunk, chunk), chunk), (pos >= item.low) & (pos < item.end)
        for h in range(plan.heads):
            buf[slot, h, rows, lanes] = jnp.where(seen, buf[slot, h, rows, lanes].astype(jnp.float32), 0.0).astype(buf.dtype)

    pl.when(base < item.low)(lambda: lax.fori_loop(0, pl.cdiv(item.low - base, chunk), clear, None))
    pl.when(base + keys > item.end)(lambda: lax.fori_loop((item.end - base) // chunk, keys // chunk, clear, None))
