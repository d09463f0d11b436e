"""Flash attention for TPU. See pallas_kernels.flash_attention for the contract.

Algorithm. One grid step is a tile of query positions with all query heads of one key-value head as rows. It walks down the blocks of
keys that the tile sees, copied into one of two VMEM buffers while the other is in use. In the block of the diagonal and in those that
all rows see, the softmax is of base 2 and not online: weights are relative to a fixed reference, the row's score with one key that it
sees, so that a score is used as it leaves the matrix unit and no maximum is looked for. Any reference gives the same quotient as long
as no weight overflows. If a row's sum has come to 2**LIMIT, the tile is computed again with the online softmax of Milakov and
Gimelshein (arXiv 1805.02867), as are from the start the blocks that are cut by a window, a length, or a diagonal that lies athwart.
Tiling: Dao et al., FlashAttention-2 (arXiv 2307.08691).
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
LOG2E = math.log2(math.e)
LIMIT = 96  # of a sum's exponent in base 2: 2**31 is left for the values
MASKED = -1e30  # finite: a row that sees nothing of a piece stays free of NaN, until one that it sees rescales it
STEP_ROWS, TILE_ROWS, BLOCK_K = 1024, 4096, 1024  # rows (positions x query heads) of a step and of a tile; keys of a block


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one kernel. Sizes in elements."""

    heads: int  # key-value heads
    group: int  # query heads of one key-value head
    head_dim: int  # padded to whole lanes
    tokens: int
    keys: int
    step: int  # query positions, with all heads of the group, that are computed at a time; keys of one copy
    tile: int  # query positions of a grid step
    block: int  # keys of a buffer
    softcap: float | None
    causal: bool
    sinks: bool
    lse: bool
    dtype: Any
    vmem: int

    @property
    def rows(self) -> int:
        """Of one step: (head of the group, position) flattened."""
        return self.group * self.step

    @property
    def steps(self) -> int:
        """Of one tile."""
        return self.tile // self.step

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.tokens, self.tile)


def default_blocks(tokens: int, keys: int, group: int, head_dim: int, itemsize: int, vmem_limit: int) -> dict[str, int]:
    """step, block_q and block_k for a shape that tuned.toml does not have, as large as VMEM takes."""
    step = min(max(1 << (STEP_ROWS // group).bit_length() - 1, LANES), 4 * LANES)
    while step > LANES and step >= 2 * tokens:
        step //= 2
    tile = step * min(max(TILE_ROWS // (step * group), 1), pl.cdiv(tokens, step))
    keys_at_once = min(BLOCK_K, BLOCK_K * STEP_ROWS // (step * group))  # what a step unrolls stays the same
    found = {"step": step, "block_q": tile, "block_k": step * min(max(keys_at_once // step, 1), pl.cdiv(keys, step))}
    for name in ("block_q", "block_k"):
        while found[name] > step and vmem_bytes(found, group, head_dim, itemsize) > vmem_limit:
            found[name] = found[name] // 2 // step * step
    return found


def clip_blocks(blocks: dict[str, int], tokens: int, keys: int) -> dict[str, int]:
    """Blocks that were measured at some length, for a shorter one."""
    step = blocks["step"]
    most = {"step": step, "block_q": pl.cdiv(tokens, step) * step, "block_k": pl.cdiv(keys, step) * step}
    return {name: min(size, most[name]) for name, size in blocks.items()}


def vmem_bytes(blocks: dict[str, int], group: int, head_dim: int, itemsize: int) -> int:
    """VMEM that the kernel asks for, the log-sum-exp and what the scores spill included."""
    dim, rows = pl.cdiv(head_dim, LANES) * LANES, blocks["block_q"] * group
    tile = rows * (dim * (4 * itemsize + 4) + 4 * LANES * 4)  # q and out twice, the sums; reference, total, the log-sum-exp twice
    return tile + 4 * blocks["block_k"] * dim * itemsize + 5 * blocks["step"] * group * blocks["block_k"]


def make_plan(q, k, blocks: dict[str, int], softcap, causal: bool, sinks: bool, lse: bool, vmem_limit: int) -> Plan:
    """The plan for a call. Raises ValueError for blocks that cannot work."""
    if blocks.keys() != {"step", "block_q", "block_k"}:
        raise ValueError(f"blocks={blocks}: must have step, block_q and block_k")
    step, group = blocks["step"], q.shape[2] // k.shape[2]
    if step % LANES or step < LANES:
        raise ValueError(f"step={step}: must be a multiple of {LANES}")
    for name in ("block_q", "block_k"):
        if blocks[name] % step or blocks[name] < step:
            raise ValueError(f"{name}={blocks[name]}: must be a multiple of step={step}")
    need = vmem_bytes(blocks, group, q.shape[3], q.dtype.itemsize)
    if need > vmem_limit:
        lower = "block_q" if blocks["block_q"] > step else "block_k" if blocks["block_k"] > step else "step"
        raise ValueError(f"blocks need {need / 2**20:.1f} MiB of VMEM, there are {vmem_limit >> 20}: lower {lower}={blocks[lower]}")
    padded, sizes = pl.cdiv(q.shape[3], LANES) * LANES, (step, blocks["block_q"], blocks["block_k"])
    static = (softcap, causal, sinks, lse, q.dtype, max(need, 16 << 20))
    return Plan(k.shape[2], group, padded, q.shape[1], k.shape[1], *sizes, *static)


class _Scalars(NamedTuple):
    """The prefetched numbers, in SMEM inside the kernel."""

    window: jax.Array  # [1]
    lengths: jax.Array  # [B]
    sinks: jax.Array  # [Hq], times log2(e); [1] without


class _Rows(NamedTuple):
    """Query positions first..last, which see keys low..end-1; end is 0 where none of them is real."""

    first: jax.Array
    last: jax.Array
    low: jax.Array
    end: jax.Array
    length: jax.Array


def _rows(plan: Plan, s: _Scalars, start, count: int) -> _Rows:
    """`count` query positions from the start-th query of this sequence."""
    length, first = s.lengths[_floor(pl.program_id(0), plan.heads)], plan.keys - plan.tokens + start
    low = jnp.where(s.window[0] > 0, jnp.maximum(first - s.window[0] + 1, 0), 0)
    end = jnp.minimum(first + count, length) if plan.causal else length
    return _Rows(first, first + count - 1, low, jnp.where((first < length) & (start < plan.tokens), end, 0), length)


def _floor(x, n: int):
    """x // n for x >= 0; jnp's own asks the device what it is."""
    return lax.div(x, jnp.int32(n))


def _ceil(x, n: int):
    return lax.div(x + (n - 1), jnp.int32(n))


def _pieces(plan: Plan, rows: _Rows, b):
    """The pieces (of plan.step keys) of block b that the rows see: from, to."""
    each = plan.block // plan.step
    return jnp.maximum(_floor(rows.low, plan.step) - b * each, 0), jnp.minimum(_ceil(rows.end, plan.step) - b * each, each)


class _Reader(NamedTuple):
    """Copies blocks of keys and values into one of two VMEM buffers, those pieces of them that a tile sees."""

    plan: Plan
    sources: tuple
    buffers: tuple
    sem: jax.Array

    def _each(self, tile: _Rows, b, slot, act):
        def one(n, _):
            piece = lambda at: pl.ds(pl.multiple_of(at, self.plan.step), self.plan.step)
            for source, buffer in zip(self.sources, self.buffers, strict=True):
                here = source.at[pl.program_id(0), piece(b * self.plan.block + n * self.plan.step), :]
                act(pltpu.make_async_copy(here, buffer.at[slot, piece(n * self.plan.step), :], self.sem.at[slot]))

        lax.fori_loop(*_pieces(self.plan, tile, b), one, None)

    def start(self, tile: _Rows, b, slot):
        self._each(tile, b, slot, lambda copy: copy.start())

    def wait(self, tile: _Rows, b, slot):
        self._each(tile, b, slot, lambda copy: copy.wait())


def _by_lanes(operation, x, row):
    """operation of x [rows, n] with a value of each row, row [rows, LANES] holding it in every lane: nothing crosses lanes."""
    return jnp.concatenate([operation(x[:, at : at + LANES], row) for at in range(0, x.shape[1], LANES)], axis=1)


def _lane_sums(x):
    """x [rows, n] summed to [rows, LANES], of which the lanes' sum is wanted: crossing lanes is left for the end."""
    return functools.reduce(jnp.add, [x[:, at : at + LANES] for at in range(0, x.shape[1], LANES)])


def _sum_of_lanes(x):
    """The sum over the lanes of x [rows, LANES], in all lanes."""
    return jnp.broadcast_to(jnp.sum(x, axis=1, keepdims=True), x.shape)


class _Step(NamedTuple):
    """One step of a tile, and views of what the tile keeps for its rows [rows, ...]. reference: the exponent that a row's weights are
    relative to, in all lanes; total: each lane has a part of the sum."""

    plan: Plan
    s: _Scalars
    at: _Rows
    q: jax.Array
    acc: jax.Array
    reference: jax.Array
    total: jax.Array

    def by_head(self, x, change):
        """change(x of head g, g) of x [rows, ...] for each head g of the group."""
        step = self.plan.step
        return jnp.concatenate([change(x[g * step : (g + 1) * step], g) for g in range(self.plan.group)], axis=0)

    def sink_logits(self):
        """[rows, LANES]: each row's sink, in all lanes."""
        head = lax.rem(pl.program_id(0), self.plan.heads) * self.plan.group
        return self.by_head(jnp.zeros((self.plan.rows, LANES), jnp.float32), lambda x, g: x + self.s.sinks[head + g])

    def start(self):
        """Sets the sums to nothing but the sinks, for `follow`."""
        zeros = jnp.zeros((self.plan.rows, LANES), jnp.float32)
        self.reference[...] = self.sink_logits() if self.plan.sinks else zeros + MASKED
        self.total[...] = zeros + 1 / LANES if self.plan.sinks else zeros
        self.acc[...] = jnp.zeros((self.plan.rows, self.plan.head_dim), jnp.float32)

    def dot(self, x, y, contract: int):
        precision = lax.Precision.HIGHEST if self.plan.dtype == jnp.float32 else lax.Precision.DEFAULT
        return lax.dot_general(x, y, (((1,), (contract,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)

    def scores(self, keys, visible=None):
        """Exponents of 2 [rows, n] for keys [n, D]. visible: None, or a mask [step, m] for the last m keys: which each position sees."""
        scores = self.dot(self.q[...], keys, 1)
        if self.plan.softcap is not None:
            scores = jnp.tanh(scores) * (self.plan.softcap * LOG2E)
        if visible is None:
            return scores
        whole = keys.shape[0] - visible.shape[1]
        last = self.by_head(scores[:, whole:], lambda x, _: jnp.where(visible, x, MASKED))
        return jnp.concatenate([scores[:, :whole], last], axis=1) if whole else last

    def add(self, keys, values, visible=None, anchor=None):
        """Adds keys and values [n, D], relative to the reference as it is. anchor: nothing was added before, nor was start called; the
        reference is the score of this key [1, D], which all rows see."""
        if anchor is not None:
            self.reference[...] = self.scores(jnp.broadcast_to(anchor, (LANES, anchor.shape[1])))
        reference, scores = self.reference[...], self.scores(keys, visible)
        weights = jnp.exp2(_by_lanes(jnp.subtract, scores, reference))
        mixed, sums = self.dot(weights.astype(self.plan.dtype), values, 0), _lane_sums(weights)
        if anchor is None:
            mixed, sums = mixed + self.acc[...], sums + self.total[...]
        elif self.plan.sinks:
            sums += jnp.exp2(self.sink_logits() - reference) * (1 / LANES)
        self.acc[...], self.total[...] = mixed, sums

    def follow(self, keys, values, visible=None):
        """Adds keys and values [n, D] with a reference that follows the maximum: the online softmax."""
        scores, old = self.scores(keys, visible), self.reference[...]
        top = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
        weights, shrink = jnp.exp2(_by_lanes(jnp.subtract, scores, top)), jnp.exp2(old - top)
        self.reference[...] = top
        self.total[...] = self.total[...] * shrink + _lane_sums(weights)
        mixed = self.dot(weights.astype(self.plan.dtype), values, 0)
        self.acc[...] = _by_lanes(jnp.multiply, self.acc[...], shrink) + mixed

    def whole(self, base, n: int):
        """Whether all positions see all keys base..base + n - 1."""
        end = jnp.minimum(self.at.first + 1, self.at.length) if self.plan.causal else self.at.length
        return (base + n <= end) & self.no_window(base)

    def no_window(self, base):
        """Whether no position has left key `base` behind its window."""
        return (self.s.window[0] == 0) | (base + self.s.window[0] > self.at.last)

    def visible(self, base):
        """Mask [step, step]: which of the keys from base on each position sees."""
        shape = (self.plan.step, self.plan.step)
        pos, key = self.at.first + lax.broadcasted_iota(jnp.int32, shape, 0), base + lax.broadcasted_iota(jnp.int32, shape, 1)
        oldest = jnp.where(self.s.window[0] > 0, pos - self.s.window[0], -1)
        return (key > oldest) & (key < self.at.length) & ((key <= pos) | (not self.plan.causal))

    def block(self, k, v, b, finish):
        """Adds what the step sees of the b-th block k, v [block, D]; blocks come in descending order. A block that all rows
        see, and one until the diagonal: relative to a fixed reference; other ones piece by piece. Then finish(), after the last."""
        plan = self.plan
        base = b * plan.block
        highest, lowest = self.at.end <= base + plan.block, self.at.low >= base
        whole = self.whole(base, plan.block)

        @pl.when(whole)
        def _():
            add = lambda: self.add(k[...], v[...])
            if not plan.causal:
                pl.when(highest)(lambda: self.add(k[...], v[...], anchor=k[:1, :]))
                pl.when(jnp.logical_not(highest))(add)
                pl.when(lowest)(finish)
                return
            pl.when(jnp.logical_not(lowest))(add)

            @pl.when(lowest)
            def _():  # in one schedule: finishing needs other units than adding
                add()
                finish()

        @pl.when(jnp.logical_not(whole) & (self.at.end > base))
        def _():
            self.diagonal(k, v, b, highest)
            pl.when(lowest)(finish)

    def diagonal(self, k, v, b, highest):
        """The highest block if it ends with the diagonal and is else seen by all rows; other ones that not all rows see piece by piece."""
        plan = self.plan
        base = b * plan.block
        ahead = self.at.first - base

        def other():
            pl.when(highest)(self.start)
            self.pieces(k, v, b)

        if not plan.causal or (plan.keys - plan.tokens) % plan.step:
            return other()
        plain = highest & self.no_window(base) & (self.at.last < self.at.length)

        def until(n: int):
            triangle = lambda axis: lax.broadcasted_iota(jnp.int32, (plan.step, plan.step), axis)
            self.add(k[: n + plan.step, :], v[: n + plan.step, :], triangle(0) >= triangle(1), anchor=k[n : n + 1, :])

        @pl.when(plain)
        def _():
            for n in range(0, plan.block, plan.step):
                pl.when(ahead == n)(functools.partial(until, n))

        pl.when(jnp.logical_not(plain))(other)

    def pieces(self, k, v, b):
        """Adds what the step sees of a block, piece by piece."""
        plan = self.plan

        def piece(n, _):
            rows = pl.ds(pl.multiple_of(n * plan.step, plan.step), plan.step)
            start = b * plan.block + n * plan.step
            whole = self.whole(start, plan.step)
            pl.when(whole)(lambda: self.follow(k[rows, :], v[rows, :]))

            @pl.when(jnp.logical_not(whole))
            def _():
                key = start + lax.broadcasted_iota(jnp.int32, (plan.step, plan.head_dim), 0)
                values = jnp.where(key < self.at.length, v[rows, :].astype(jnp.float32), 0.0)  # zero times NaN must not be
                self.follow(k[rows, :], values.astype(plan.dtype), self.visible(start))

        lax.fori_loop(*_pieces(plan, self.at, b), piece, None)

    def finish(self, out, lse, worst):
        """Writes the quotients, and the logs of the sums where lse is not None; zeros and -inf in rows at or beyond the length. worst
        [8, LANES] takes the largest sum."""
        plan, total = self.plan, _sum_of_lanes(self.total[...])
        real = self.at.first + lax.broadcasted_iota(jnp.int32, (plan.step, LANES), 0) < self.at.length
        keep = lambda x, other: self.by_head(x, lambda part, _: jnp.where(real, part, other))
        total = keep(total, 1.0)
        worst[...] = jnp.maximum(worst[...], jnp.max(total.reshape(-1, 8, LANES), axis=0))
        out[...] = _by_lanes(lambda x, y: keep(x * y, 0.0), self.acc[...], 1 / total).astype(out.dtype)
        if lse is not None:
            lse[...] = keep((self.reference[...] + jnp.log2(total)) * (1 / LOG2E), -jnp.inf)


def _kernel(window, lengths, sinks, q_ref, k_hbm, v_hbm, *refs, plan: Plan):
    out_ref, lse_ref, refs = refs[0], refs[1] if plan.lse else None, refs[1 + plan.lse :]
    k_buf, v_buf, *sums, worst, slot_ref, sem = refs
    s, t = _Scalars(window, lengths, sinks), pl.program_id(1)
    tile, following = (_rows(plan, s, n * plan.tile, plan.tile) for n in (t, t + 1))
    reader = _Reader(plan, (k_hbm, v_hbm), (k_buf, v_buf), sem)
    end = _ceil(tile.end, plan.block)
    first = jnp.minimum(_floor(tile.low, plan.block), end)

    def for_steps(body, otherwise=lambda _: None):
        """body(step, its rows) for each step of the tile that has a real position, otherwise(its rows) for the others."""

        def one(n, _):
            rows = pl.ds(pl.multiple_of(n * plan.rows, plan.rows), plan.rows)
            at = _rows(plan, s, t * plan.tile + n * plan.step, plan.step)
            pl.when(at.end == 0)(lambda: otherwise(rows))
            pl.when(at.end > 0)(lambda: body(_Step(plan, s, at, q_ref.at[0, rows, :], *(x.at[rows, :] for x in sums)), rows))

        lax.fori_loop(0, plan.steps, one, None)

    def zeros(rows):
        out_ref[0, rows, :] = jnp.zeros((plan.rows, plan.head_dim), out_ref.dtype)
        if lse_ref is not None:
            lse_ref[0, rows, :] = jnp.full((plan.rows, LANES), -jnp.inf)

    def finish(step, rows):
        step.finish(out_ref.at[0, rows, :], None if lse_ref is None else lse_ref.at[0, rows, :], worst)

    def block(n, _):
        b, slot = end - 1 - n, (slot_ref[0] + n) & 1
        more, last_of_next = b > first, _ceil(following.end, plan.block) - 1
        pl.when(more)(lambda: reader.start(tile, b - 1, 1 - slot))
        pl.when(jnp.logical_not(more) & (following.end > 0))(lambda: reader.start(following, last_of_next, 1 - slot))
        reader.wait(tile, b, slot)
        keys, values = k_buf.at[slot], v_buf.at[slot]
        for_steps(lambda step, rows: step.block(keys, values, b, lambda: finish(step, rows)))

    def again(b, _):
        slot = 1 - slot_ref[0]  # the other one is being filled for the next tile
        reader.start(tile, b, slot)
        reader.wait(tile, b, slot)
        for_steps(lambda step, _: step.pieces(k_buf.at[slot], v_buf.at[slot], b))

    @pl.when(t == 0)
    def _():
        slot_ref[0] = 0
        pl.when(tile.end > 0)(lambda: reader.start(tile, end - 1, 0))

    for_steps(lambda *_: None, zeros)
    worst[...] = jnp.zeros_like(worst)
    lax.fori_loop(0, end - first, block, None)
    slot_ref[0] = (slot_ref[0] + end - first) & 1

    @pl.when(jnp.max(worst[...]) >= 2.0**LIMIT)
    def _():
        for_steps(lambda step, _: step.start())
        lax.fori_loop(first, end, again, None)
        for_steps(finish)


@functools.partial(jax.jit, static_argnames=("plan", "scale", "interpret"))
def flash_attention_tpu(plan: Plan, q, k, v, lengths, window, scale, sinks, interpret):
    """The kernel on arrays as flash_attention takes them: (out, lse or None)."""
    batch, tokens, q_heads, dim = q.shape
    total, pad = plan.tiles * plan.tile, ((0, 0), (0, 0), (0, 0), (0, plan.head_dim - dim))
    factor = scale * LOG2E if plan.softcap is None else scale / plan.softcap
    q = jnp.pad((q.astype(jnp.float32) * factor).astype(plan.dtype), (pad[0], (0, total - tokens), *pad[2:]))
    q = q.reshape(batch, -1, plan.step, plan.heads, plan.group, plan.head_dim).transpose(0, 3, 1, 4, 2, 5)
    q = q.reshape(batch * plan.heads, total * plan.group, plan.head_dim)
    by_head = lambda x, n: jnp.pad(x, (pad[0], (0, n), *pad[2:])).swapaxes(1, 2).reshape(batch * plan.heads, -1, plan.head_dim)
    k, v = (by_head(x, -plan.keys % plan.step) for x in (k, v))
    if not interpret:  # in VMEM, where XLA would put short ones, they would be copied by the vector unit
        k, v = (pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (k, v))
    sinks = jnp.zeros(1) if sinks is None else sinks.astype(jnp.float32) * LOG2E
    scalars = (jnp.asarray(window, jnp.int32).reshape(1), lengths.astype(jnp.int32), sinks)
    rows = lambda n, lanes: pl.BlockSpec((1, n, lanes), lambda head, t, *_: (head, t, 0))
    shapes = [jax.ShapeDtypeStruct(q.shape, plan.dtype)]
    if plan.lse:
        shapes.append(jax.ShapeDtypeStruct((*q.shape[:2], LANES), jnp.float32))
    tile, buffer = plan.tile * plan.group, pltpu.VMEM((2, plan.block, plan.head_dim), plan.dtype)
    found = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        out_shape=shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch * plan.heads, plan.tiles),
            in_specs=[rows(tile, plan.head_dim), *[pl.BlockSpec(memory_space=pltpu.HBM)] * 2],
            out_specs=[rows(tile, shape.shape[2]) for shape in shapes],
            scratch_shapes=[
                *[buffer] * 2,
                *[pltpu.VMEM((tile, lanes), jnp.float32) for lanes in (plan.head_dim, LANES, LANES)],
                pltpu.VMEM((8, LANES), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), disable_bounds_checks=True, vmem_limit_bytes=plan.vmem
        ),
        interpret=interpret,
        name="flash_attention",
    )(*scalars, q, k, v)
    back = lambda x: x.reshape(batch, plan.heads, -1, plan.group, plan.step, x.shape[-1]).transpose(0, 2, 4, 1, 3, 5)
    out, lse = (back(x).reshape(batch, total, q_heads, -1)[:, :tokens] for x in (found[0], found[-1][..., :1]))
    return out[..., :dim], lse[..., 0].swapaxes(1, 2)
