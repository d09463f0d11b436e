"""The kernel of the TPU's paged attention: what one step does, and the pallas_call. See paged_attention_tpu.py for the algorithm."""

import functools
import math
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dealt import position_of
from pallas_kernels.paged_attention_pages import (
    Item,
    Reader,
    Scalars,
    Scaled,
    Writer,
    clear_unseen_values,
    item_of,
    requested_early,
    step_heads,
)
from pallas_kernels.paged_attention_plan import LANES, Plan, vmem_bytes
from pallas_kernels.paged_attention_softmax import SUBLANES, Columns, Rows

UNROLLED_ROWS = 4096  # of heads that are looked at side by side


def _visible(plan: Plan, s: Scalars, item: Item, tree: Any, base, keys: int, known: int = 0):
    """Which keys from position `base` on each row sees: for decode the mask [rows, keys] of the first `keys`, for a tile a function as
    Columns.attend takes it. known: so many keys, from the first on, are seen by every row."""
    reach = jnp.where(s.window[0] > 0, s.window[0], 1 << 30)
    if plan.decode:
        # Where pages are dealt out the new row may be another's: then it is behind the end, and nothing is written.
        last = item.end - 1 if plan.dealt else item.first
        back = last - base - lax.broadcasted_iota(jnp.int32, (plan.rows, keys), 1)
        return (back >= 0) & (back < reach)
    token = lax.broadcasted_iota(jnp.int32, (SUBLANES, plan.rows), 1) & (plan.tile - 1)
    key = lax.broadcasted_iota(jnp.int32, (SUBLANES, plan.rows), 0)
    if plan.reads:
        ahead, position = item.first - item.row + token - key, _positions(plan, s, item, base)
        return lambda n: None if SUBLANES * (n + 1) <= known else ahead >= position(n)
    key = base + key
    row_pos = item.first - item.row + token if tree is None else item.known + tree[0, plan.tree_words :, :]
    # as unsigned numbers, so that one comparison does for both ends
    mask = lambda n: (row_pos - key - SUBLANES * n).astype(jnp.uint32) < reach.astype(jnp.uint32)

    words: Any = tree

    def node(n):
        place = key + SUBLANES * n - item.known  # among the new tokens, if not negative
        bits = jnp.zeros_like(place)
        for word in range(plan.tree_words):
            bits = jnp.where(place >> 5 == word, words[0, word : word + 1, :], bits)
        return ((place < 0) & mask(n)) | ((place >= 0) & ((bits >> (place & 31)) & 1 == 1))

    return lambda n: None if SUBLANES * (n + 1) <= known else mask(n) if tree is None else node(n)


def _positions(plan: Plan, s: Scalars, item: Item, base):
    """n -> the position of place base + SUBLANES * n, which may be the first of a piece or of a probe; as many keys are on one page."""
    dealt = (plan.dealt, s.begin[item.seq])
    if plan.piece % plan.page or plan.probe % plan.page:
        return lambda n: position_of(base + SUBLANES * n, plan.page, dealt)
    start = position_of(base, plan.page, dealt)
    return lambda n: start + SUBLANES * n // plan.page * plan.page * plan.dealt + SUBLANES * n % plan.page


class _StreamSinks(NamedTuple):
    """The first tokens of a sequence, for rows whose window has left them behind: a block of their own, with queries of their own."""

    plan: Plan
    s: Scalars
    kv: jax.Array
    q: jax.Array
    buf: jax.Array
    sem: jax.Array

    def attend(self, item: Item, softmax: Any):
        """After all other blocks of the item, since its own new rows may be in the sinks' pages; those have been waited for."""
        plan = self.plan
        copies = [
            pltpu.make_async_copy(
                self.kv.at[self.s.layer[0], self.s.page_table[item.seq * plan.pages_per_seq + n], step_heads(plan)],
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
        known = lax.broadcasted_iota(jnp.int32, (plan.sink_rows, plan.row), 0) < left

        def head(h):
            rows = jnp.where(known, self.buf[h].astype(jnp.float32), 0.0).astype(self.buf.dtype)  # zero times NaN must not be
            softmax.attend(h, _queries(plan, self.q, h), rows, self._visible(item))

        _for_heads(plan, plan.heads if plan.decode else 1, head)

    def _visible(self, item: Item):
        """As _visible, for the keys of the sinks."""
        plan, behind = self.plan, item.first - item.row - self.s.window[0]
        if plan.decode:
            key = lax.broadcasted_iota(jnp.int32, (plan.rows, plan.sink_rows), 1)
            return (key < plan.sinks) & (key <= behind)
        token = lax.broadcasted_iota(jnp.int32, (SUBLANES, plan.rows), 1) & (plan.tile - 1)
        key = lax.broadcasted_iota(jnp.int32, (SUBLANES, plan.rows), 0)
        return lambda n: (key < plan.sinks - SUBLANES * n) & (key <= behind + token - SUBLANES * n)


def _lanes(width: int, h):
    """The lanes of head h in a row of two dimensions."""
    return pl.ds(pl.multiple_of(h * width, LANES), width)


def _queries(plan: Plan, ref, h):
    """Query rows [rows, width] of key-value head h."""
    if plan.decode:
        return ref[0, h]
    block = ref[:, _lanes(plan.group * plan.width, h)]
    return jnp.concatenate([block[:, g * plan.width : (g + 1) * plan.width] for g in range(plan.group)], axis=0)


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
    s: Scalars
    refs: Any  # everything by the names of _names
    reader: Reader
    writer: Writer
    scaled: Scaled | None
    sinks: Any  # _StreamSinks or None
    softmax: Any  # Rows for decode, else Columns

    def run(self):
        """Leaves the result in out."""
        plan, s = self.plan, self.s
        i, parity = pl.program_id(1), lax.rem(pl.program_id(1), 2)
        item, last = item_of(plan, s, i), i + 1 == s.item_count[0]
        following = item_of(plan, s, jnp.where(last, i, i + 1))
        early = jnp.logical_not(last) & requested_early(plan, s, i + 1, following)

        self.writer.drain(parity)
        pl.when((i > 0) & (s.item_seq[jnp.maximum(i - 1, 0)] == item.seq))(lambda: self.writer.drain(1 - parity))
        first_slot = self.refs.slot[0]
        pl.when(jnp.logical_not(requested_early(plan, s, i, item)))(lambda: self.reader.start(item, item.low // plan.block, first_slot))
        self._look(item, following, early, parity)
        self._finish(item)
        pl.when(last)(lambda: lax.fori_loop(0, 2, lambda either, _: self.writer.drain(either), None))

    def _look(self, item: Item, following: Item, early, parity):
        """Goes over all blocks that the item sees. early: the next item's first block is requested during the last one."""
        plan, first, end, slot0 = self.plan, item.low // self.plan.block, pl.cdiv(item.end, self.plan.block), self.refs.slot[0]
        self.softmax.reset(self.refs.logits if plan.logits else None)

        def block(b, _):
            slot = (slot0 + b - first) % 2
            more = b + 1 < end
            pl.when(more)(lambda: self.reader.start(item, b + 1, 1 - slot))
            pl.when(jnp.logical_not(more) & early)(lambda: self.reader.start(following, following.low // plan.block, 1 - slot))
            self.reader.wait(item, b, slot)
            self.writer.patch(item, b, slot, parity)
            buf = self.reader.buf
            if self.scaled is not None:
                self.scaled.unpack(item, b, slot)
                buf, slot = self.scaled.plain, 0
            (self._attend_block if plan.decode else self._attend_pieces)(item, b, buf, slot)

        lax.fori_loop(first, end, block, None)
        if self.sinks is not None:
            pl.when(item.first < plan.sink_rows)(lambda: self.writer.drain(parity))
            pl.when((self.s.window[0] > 0) & (item.end > self.s.window[0]))(lambda: self.sinks.attend(item, self.softmax))
        self.refs.slot[0] = (slot0 + end - first) % 2

    def _whole(self, item: Item, start, keys: int):
        """Whether every row sees all `keys` keys from position `start` on."""
        window = self.s.window[0]
        return (start + keys <= item.known) & ((window == 0) | (start + window >= item.end))

    def _attend_block(self, item: Item, b, buf, slot):
        plan, base = self.plan, b * self.plan.block

        def attend(keys, whole=False):
            visible = None
            if not whole:
                clear_unseen_values(plan, item, base, keys, buf, slot)
                visible = _visible(plan, self.s, item, None, base, keys)
            _for_heads(plan, plan.heads, lambda h: self.softmax.attend(h, _queries(plan, self.refs.q, h), buf[slot, h, :keys], visible))

        whole = self._whole(item, base, plan.block)
        short = item.end - base <= plan.short_block if plan.short_block < plan.block else False
        pl.when(whole)(lambda: attend(plan.block, whole=True))
        pl.when(jnp.logical_not(whole | short))(lambda: attend(plan.block))
        if plan.short_block < plan.block:
            pl.when(short & jnp.logical_not(whole))(lambda: attend(plan.short_block))

    def _attend_pieces(self, item: Item, b, buf, slot):
        plan, base, size = self.plan, b * self.plan.block, self.plan.piece
        first = jnp.maximum(item.low - base, 0) // size
        end = pl.cdiv(jnp.minimum(item.end - base, plan.block), size)
        last_low = jnp.where(self.s.window[0] > 0, jnp.maximum(item.end - self.s.window[0], 0), 0)
        tree = self.refs.tree if plan.tree_words else None
        clear_unseen_values(plan, item, base, end * size, buf, slot)

        def piece(n, _):
            start = base + n * size
            whole = self._whole(item, start, size)
            fresh = start <= last_low  # a row may have seen no key of an earlier piece
            begins = (b == item.low // plan.block) & (n == first)
            first_of_all = begins & (last_low < start + plan.probe)
            exact = (self.s.exact[0] > 0) | (fresh & jnp.logical_not(first_of_all))

            def attend(begin, keys, how, unrolled=1, known=0):  # known: so many keys, from the first on, are seen by every row
                visible = _visible(plan, self.s, item, tree, base + begin, keys, known) if known < keys else None
                at = pl.ds(pl.multiple_of(begin, keys), keys)
                _for_heads(plan, unrolled, lambda h: how(h, _queries(plan, self.refs.q, h), buf[slot, h, at], visible))

            softmax, narrow, wide = self.softmax, plan.probe, UNROLLED_ROWS // plan.rows
            go_on, half = functools.partial(softmax.attend, settled=True, begins=begins), size // 2 // SUBLANES * SUBLANES
            pl.when(exact)(
                lambda: lax.fori_loop(
                    0,
                    size // narrow,
                    lambda m, _: attend(n * size + m * narrow, narrow, functools.partial(softmax.attend, begins=begins & (m == 0))),
                    None,
                )
            )
            pl.when(jnp.logical_not(exact) & fresh)(lambda: attend(n * size, narrow, softmax.probe, wide))
            half_known = self._whole(item, start, half)
            pl.when(jnp.logical_not(exact) & whole)(lambda: attend(n * size, size, go_on, wide, size))
            pl.when(jnp.logical_not(exact | whole) & half_known)(lambda: attend(n * size, size, go_on, 1, half))
            pl.when(jnp.logical_not(exact | whole | half_known))(lambda: attend(n * size, size, go_on))

        lax.fori_loop(first, end, piece, None)

    def _finish(self, item: Item):
        plan, out = self.plan, self.refs.out
        is_mine = lambda token: (token >= item.row) & (token < item.row + item.count)
        mine = is_mine(lax.broadcasted_iota(jnp.int32, (1, plan.rows), 1) & (plan.tile - 1))
        own_rows = is_mine(lax.broadcasted_iota(jnp.int32, (plan.tile, plan.result_width), 0))

        def decoded(h):
            out[0, h] = self.softmax.result(h).astype(out.dtype)
            if plan.lse:
                self.refs.lse[0, h] = self.softmax.lse(h)

        def tiled(h, whole):
            found = jnp.pad(self.softmax.result(h), ((0, plan.result_width - plan.head_dim), (0, 0))).astype(out.dtype).T
            for g in range(plan.group):
                at, part = _lanes(plan.result_width, h * plan.group + g), found[g * plan.tile : (g + 1) * plan.tile]
                if not whole:
                    part = jnp.where(own_rows, part.astype(jnp.float32), out[:, at].astype(jnp.float32)).astype(out.dtype)
                out[:, at] = part
            if plan.lse:
                self.refs.lse[0, h] = jnp.where(mine, self.softmax.lse(h), self.refs.lse[0, h])

        if plan.decode:
            _for_heads(plan, plan.heads, decoded)
            return
        whole, unrolled = (item.row == 0) & (item.count == plan.tile), UNROLLED_ROWS // plan.rows
        pl.when(whole)(lambda: _for_heads(plan, unrolled, lambda h: tiled(h, True)))
        pl.when(jnp.logical_not(whole))(lambda: _for_heads(plan, 1, lambda h: tiled(h, False)))
        worst = self.softmax.worst[...]
        worst = jnp.where(mine & (worst > 0), worst, 0.0)  # NaN of one sequence must not hide the excess of another
        for at in range(0, plan.rows, LANES):
            part = worst[:, at : at + LANES]
            lanes = slice(0, part.shape[1])
            self.refs.excess[0, :, lanes] = jnp.maximum(self.refs.excess[0, :, lanes], part)


def _kernel(*refs, plan: Plan):
    s = Scalars(*refs[: len(Scalars._fields)])
    names = [name for part in _names(plan) for name in part]
    r = types.SimpleNamespace(**dict(zip(names, refs[len(s) :], strict=True)))

    @pl.when(pl.program_id(1) == 0)
    def _():
        r.slot[0], r.pending[0], r.pending[1] = 0, 0, 0
        if not plan.decode:
            r.excess[...] = jnp.zeros_like(r.excess)

    @pl.when(pl.program_id(1) < s.item_count[0])
    def _():
        reader = Reader(plan, s, r.kv_out, r.buf, r.read_sem)
        ratio, new = r.ratio if plan.quantized else None, None if plan.reads else r.new
        writer = Writer(plan, s, r.kv_out, r.buf, new, ratio, r.stage, r.pending, r.write_sem)
        scaled = Scaled(plan, r.scales, r.buf, r.plain) if plan.quantized else None
        sinks = _StreamSinks(plan, s, r.kv_out, r.q_sinks, r.sink_buf, r.sink_sem) if plan.sinks else None
        softmax = Rows(plan, r.acc, r.top, r.total) if plan.decode else Columns(plan, r.acc, r.top, r.total, r.worst)
        _Step(plan, s, r, reader, writer, scaled, sinks, softmax).run()


def _names(plan: Plan) -> tuple[list[str], list[str], list[str]]:
    """What a kernel has beside its scalars: operands, results, scratch."""
    tiled, some = not plan.decode, lambda condition, *names: list(names) if condition else []
    operands = ["q", *some(not plan.reads, "new"), "kv", *some(plan.sinks, "q_sinks")]
    operands += some(plan.logits, "logits") + some(plan.tree_words, "tree") + some(plan.quantized, "ratio", "scales")
    results = ["out", "kv_out", *some(tiled, "excess"), *some(plan.lse, "lse")]
    scratch = ["buf", "stage", "slot", "pending", "read_sem", "write_sem", "acc", "top", "total", *some(tiled, "worst")]
    return operands, results, scratch + some(plan.sinks, "sink_buf", "sink_sem") + some(plan.quantized, "plain")


def _specs(plan: Plan) -> dict[str, pl.BlockSpec]:
    """How operands and results that are not scratch are cut for a step."""
    tile_of = lambda c, i, s: (s.item_tile[i], c, 0, 0)
    seq_of = lambda c, i, s: (s.item_seq[i], c, 0, 0)
    spec = lambda shape, index, **how: pl.BlockSpec(shape, lambda c, i, *scalars: index(c, i, Scalars(*scalars)), **how)
    row, decode = plan.row, plan.decode
    flat = lambda width: spec((plan.tile, plan.heads * width), lambda c, i, s: (s.item_tile[i], c))
    queries = spec((1, plan.heads, plan.rows, plan.width), tile_of) if decode else flat(plan.group * plan.width)
    blocks = pl.cdiv(plan.pages_per_seq, plan.block_pages)
    return {
        "q": queries,
        "q_sinks": queries,
        "new": spec((1, 1, plan.heads, row), tile_of) if decode else flat(row),
        "kv": pl.BlockSpec(memory_space=pl.ANY),
        "logits": spec((plan.heads, plan.rows, LANES) if decode else (plan.heads, 1, plan.rows), lambda c, i, s: (c, 0, 0)),
        "tree": spec((1, plan.tree_words + 1, plan.rows), lambda c, i, s: (s.item_tile[i], 0, 0)),
        "ratio": spec((1, 1, plan.heads, row), seq_of),
        "scales": spec((1, 1, blocks, 2 * plan.heads * plan.block_pages), seq_of, memory_space=pltpu.SMEM),
        "out": queries if decode else flat(plan.group * plan.result_width),
        "kv_out": pl.BlockSpec(memory_space=pl.ANY),
        "excess": spec((1, SUBLANES, LANES), lambda c, i, s: (c, 0, 0)),
        "lse": spec((1, plan.heads, plan.rows, LANES) if decode else (1, plan.heads, 1, plan.rows), tile_of),
    }


def _scratch(plan: Plan, dtype) -> dict[str, Any]:
    f32, row = lambda *shape: pltpu.VMEM(shape, jnp.float32), plan.row
    sums = (
        [(plan.rows, n) for n in (plan.width, LANES, LANES)]
        if plan.decode
        else [(n, plan.rows) for n in (plan.head_dim, SUBLANES, SUBLANES)]
    )
    return {
        "buf": pltpu.VMEM((2, plan.heads, plan.block, row), dtype),
        "stage": pltpu.VMEM((2, plan.windows, plan.heads, plan.align, row), dtype),
        "slot": pltpu.SMEM((1,), jnp.int32),
        "pending": pltpu.SMEM((2,), jnp.int32),
        "read_sem": pltpu.SemaphoreType.DMA((2,)),
        "write_sem": pltpu.SemaphoreType.DMA((2,)),
        **{name: f32(plan.heads, *shape) for name, shape in zip(("acc", "top", "total"), sums)},
        "worst": f32(SUBLANES, plan.rows),
        "sink_buf": pltpu.VMEM((plan.heads, plan.sink_rows, row), dtype),
        "sink_sem": pltpu.SemaphoreType.DMA(()),
        "plain": pltpu.VMEM((1, plan.heads, plan.block, row), plan.compute),
    }


def call_kernel(plan: Plan, arrays: dict[str, Any], s: Scalars, interpret) -> dict[str, Any]:
    """The pallas_call: operands and results by the names of _names."""
    operands, results, scratch = _names(plan)
    specs, rooms, kv, rows = _specs(plan), _scratch(plan, arrays["kv"].dtype), arrays["kv"], arrays["q"].shape[0]
    blocks, heads, tiles = lambda name: (specs[name].block_shape or ())[2:], plan.heads * plan.chunks, pl.cdiv(rows, plan.tile)
    out = arrays["q"].shape if plan.decode else (rows, heads * plan.group * plan.result_width)
    shapes = {
        "out": (out, arrays["q"].dtype),
        "kv_out": (kv.shape, kv.dtype),
        "excess": ((plan.chunks, SUBLANES, LANES), jnp.float32),
        "lse": ((tiles, heads, *blocks("lse")), jnp.float32),
    }
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(s),
        grid=(plan.chunks, s.item_seq.shape[0]),
        in_specs=[specs[name] for name in operands],
        out_specs=[specs[name] for name in results],
        scratch_shapes=[rooms[name] for name in scratch],
    )
    vmem = max(vmem_bytes(plan, kv.dtype.itemsize), 16 << 20)
    found = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        out_shape=[jax.ShapeDtypeStruct(*shapes[name]) for name in results],
        grid_spec=grid_spec,
        input_output_aliases={len(s) + operands.index("kv"): results.index("kv_out")},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), disable_bounds_checks=True, vmem_limit_bytes=vmem
        ),
        interpret=interpret,
        name="paged_decode" if plan.decode else "paged_prefill",
    )(*s, *(arrays[name] for name in operands))
    return dict(zip(results, found))
