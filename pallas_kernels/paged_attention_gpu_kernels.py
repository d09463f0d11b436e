"""The GPU kernels of paged_attention_gpu.py: what one program does. Refs come by name: see its `_call`s."""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import kv_scales

NEG = -1e8  # a score of nothing: so that rounding it, times a unit, against itself still leaves a power that float32 holds
BLANKS = 64  # rows of nobody that a program sets to zero
_LOG2E = math.log2(math.e)


class Sizes(NamedTuple):
    """block: tokens of context in a step. warps, stages: of a program, as Triton has them. rows: of a tile of query rows, a power of 2 (a
    decoding sequence has what its group needs). splits: of a decoding sequence's context."""

    block: int
    warps: int
    stages: int
    rows: int = 16
    splits: int = 1


@dataclass(frozen=True)
class Spec:
    """What the kernels know when they are compiled. dtype: of the products; tile: query tokens in a tile of rows. packed: queries, keys and
    values are rows of q, each kv head's after each other, whose first `rotary` elements are to be rotated."""

    heads: int
    group: int
    dim: int
    page: int
    scale: float
    softcap: float | None
    dtype: Any
    sizes: Sizes
    tile: int = 1
    write: bool = False
    packed: bool = False
    rotary: int = 0
    interpret: bool = False

    @property
    def lanes(self) -> int:
        return power(self.dim)

    @property
    def unit(self) -> float:
        """A score of 1 as a power of 2. Without a cap scores are products that are not scaled yet: that is part of the exponent."""
        return self.scale * _LOG2E if self.softcap is None else _LOG2E


def power(number: int) -> int:
    """The smallest power of 2 that is not smaller."""
    return 1 << (number - 1).bit_length()


def decode_rows(group: int) -> int:
    """Rows of a product of the decode kernel: no product has fewer than 16."""
    return max(16, power(group))


def _get(ref, place, mask=None, other: float = 0):
    """ref[place], `other` where the mask is false: nothing is read there."""
    return plgpu.load(ref.at[place], mask=mask, other=None if mask is None else jnp.asarray(other, ref.dtype))


def _new(refs, spec: Spec, name: str, place, mask=None):
    """Rows of queries (name q), keys or values as attention takes them. place: token, head (of q among all query heads), lane."""
    token, head, lane = place
    if not spec.packed:
        return _get(refs[name], place, mask)
    wide = spec.group + 2
    first = lax.div(head, spec.group) * wide + lax.rem(head, spec.group) if name == "q" else head * wide + spec.group + (name == "v")
    x = _get(refs["q"], (token, first, lane), mask)
    if name == "v" or not spec.rotary:
        return x
    turned, half = lane < spec.rotary, spec.rotary // 2
    other = jnp.where(turned, jnp.where(lane < half, lane + half, lane - half), lane)
    shared = turned if mask is None else turned & mask
    cos, sin = (_get(refs[by], (token, jnp.where(turned, lane, 0)), shared, rest) for by, rest in (("cos", 1), ("sin", 0)))
    return (x.astype(jnp.float32) * cos + _get(refs["q"], (token, first, other), mask).astype(jnp.float32) * sin).astype(x.dtype)


def _lanes(spec: Spec, number: int):
    """Of keys (number 0) or values (1) in a row of the cache; and which of them there are, None for all."""
    lane = jnp.arange(spec.lanes)
    return lane + number * spec.dim, None if spec.lanes == spec.dim else lane < spec.dim


def _both(rows, lanes):
    """The mask of a tile by those of its rows and lanes, None where there is none."""
    sides = [x for x in (None if rows is None else rows[:, None], None if lanes is None else lanes[None]) if x is not None]
    return functools.reduce(jnp.logical_and, sides) if sides else None


def _keys(refs, spec: Spec, where, block, inside):
    """Keys and values [block, lanes] of a block of tokens, and their scales (None without): inside bool [block], or None for all. What
    is not inside is zero, whatever its page holds."""
    size, page, (layer, row, head) = spec.sizes.block, spec.page, where
    if page % size == 0:  # the block lies in one page, and some token of it is inside
        place = lax.rem(block * size, page) + jnp.arange(size)
        ids = jnp.full((size,), refs["table"][row, lax.div(block * size, page)])
    else:
        at = block * size + jnp.arange(size)
        place = lax.rem(at, page)
        ids = _get(refs["table"], (jnp.full((size,), row), lax.div(at, page)), inside)

    def tile(number):
        lanes, real = _lanes(spec, number)
        spread = lambda x: jnp.broadcast_to(x, (size, spec.lanes))
        where = (spread(layer), spread(ids[:, None]), spread(head), spread(place[:, None]), spread(lanes[None]))
        return _get(refs["kv"], where, _both(inside, real)).astype(spec.dtype)

    def scales(number):
        each = lambda x: jnp.full((size,), x)
        return _get(refs["scales"], (each(layer), ids, each(2 * head + number)), inside) if "scales" in refs else None

    return tile(0), tile(1), scales(0), scales(1)


def _dot(x, y, transposed=False):
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    axes = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)


def _scored(products, spec: Spec):
    return products if spec.softcap is None else jnp.tanh(products * (spec.scale / spec.softcap)) * spec.softcap


def _exp(scores, top, spec: Spec):
    """The exponential of what scores are short of the maximum `top`."""
    if spec.interpret or spec.dtype == jnp.float32:
        return jnp.exp2((scores - top) * spec.unit)
    # One multiplication with subtraction and one power: the compiler joins no multiplication and subtraction by itself, and jnp.exp2
    # takes two more multiplications for results that are too small to count here.
    unit = struct.pack(">f", spec.unit).hex()
    asm = f"{{ .reg .f32 x; fma.rn.f32 x, $1, 0f{unit}, $2; ex2.approx.ftz.f32 $0, x; }}"
    args = [scores, jnp.broadcast_to(-top * spec.unit, scores.shape)]
    shape = [jax.ShapeDtypeStruct(scores.shape, jnp.float32)]
    return plgpu.elementwise_inline_asm(asm, args=args, constraints="=f,f,f", pack=1, result_shape_dtypes=shape)[0]


def _attend(refs, spec: Spec, q, where, block, sums, inside=None, seen=None):
    """Adds a block of the tokens of `where` (layer, sequence, head) to the running (maximum [rows], sum [rows], values [rows, lanes]).
    inside: those that may be read at all [block]; seen: those that each row sees, or None for all."""
    top, total, acc = sums
    keys, values, key_scale, value_scale = _keys(refs, spec, where, block, inside)
    products = _dot(q, keys, transposed=True)
    scores = _scored(products if key_scale is None else products * key_scale[None], spec)
    if seen is not None:
        scores = jnp.where(seen, scores, NEG)
    new_top = jnp.maximum(top, jnp.max(scores, axis=1))
    weights, keep = _exp(scores, new_top[:, None], spec), _exp(top, new_top, spec)
    total = total * keep + jnp.sum(weights, axis=1)
    weights = weights if value_scale is None else weights * value_scale[None]
    return new_top, total, acc * keep[:, None] + _dot(weights.astype(spec.dtype), values)


def decode_kernel(refs, spec: Spec):
    """One share of the context of one sequence, for one kv head. That of split 0 also holds the new token, where it is not cached yet."""
    head, split, row = (pl.program_id(axis) for axis in range(3))
    size, new = spec.sizes.block, refs["new"][row]
    at = jnp.clip(refs["start"][row], 0, refs["q"].shape[0] - 1)
    pos = jnp.where(new == 1, refs["total"][row] - 1, -1)
    group = jnp.arange(decode_rows(spec.group))
    heads = head * spec.group + group
    mine, lane, (_, real) = group < spec.group, jnp.arange(spec.lanes), _lanes(spec, 0)
    spread = lambda x: jnp.broadcast_to(x, (len(group), spec.lanes))
    q = _new(refs, spec, "q", (spread(at), spread(heads[:, None]), spread(lane[None])), _both(mine, real)).astype(spec.dtype)
    end = pos if spec.write else pos + 1
    where = refs["layer"][0], row, head  # read here: a load in the loop would take stages from those of keys and values
    low = jnp.where(refs["window"][0] > 0, jnp.maximum(pos - refs["window"][0] + 1, 0), 0)
    begin, stop = lax.div(low, size), lax.div(jnp.maximum(end, 0) + size - 1, size)
    share = lambda split: begin + lax.div((stop - begin) * split, spec.sizes.splits)

    def step(block, sums):
        token = block * size + jnp.arange(size)
        inside = (token >= low) & (token < end)
        return _attend(refs, spec, q, where, block, sums, inside, inside[None])

    sums = jnp.full(group.shape, NEG, jnp.float32), jnp.zeros(group.shape, jnp.float32), jnp.zeros(q.shape, jnp.float32)
    sums = lax.fori_loop(share(split), share(split + 1), step, sums)
    top, total, acc = _join(refs, spec, q, row, head, at, pos, (split == 0) & (new == 1), sums) if spec.write else sums
    each = lambda x: jnp.full(group.shape, x)
    plgpu.store(refs["top"].at[each(row), heads, each(split)], top, mask=mine)
    plgpu.store(refs["sum"].at[each(row), heads, each(split)], total, mask=mine)
    place = (spread(row), spread(heads[:, None]), spread(split), spread(lane[None]))
    plgpu.store(refs["acc"].at[place], acc, mask=_both(mine, real))


def _join(refs, spec: Spec, q, row, head, at, pos, first, sums):
    """Writes the new key and value into their page, and adds them to the sums: if `first`."""
    lane, (_, real) = jnp.arange(spec.lanes), _lanes(spec, 0)
    each = lambda x: jnp.full(lane.shape, x)
    new = [_new(refs, spec, name, (each(at), each(head), lane), real).astype(refs["kv"].dtype) for name in ("k", "v")]
    page, place = _page_of(refs, spec, row, pos)
    for number, x in enumerate(new):
        where = (each(refs["layer"][0]), each(page), each(head), each(place), _lanes(spec, number)[0])
        plgpu.store(refs["cache"].at[where], x, mask=each(first) if real is None else real & first)
    key, value = (x.astype(jnp.float32)[None] for x in new)
    score = jnp.where(first, _scored(jnp.sum(q.astype(jnp.float32) * key, axis=1), spec), NEG)
    top, total, acc = sums
    best = jnp.maximum(top, score)
    keep, own = _exp(top, best, spec), _exp(score, best, spec)
    added = jnp.where(first, own[:, None] * value, 0.0)
    return best, total * keep + jnp.where(first, own, 0.0), acc * keep[:, None] + added


def _page_of(refs, spec: Spec, row, pos):
    """The page that holds a position of a sequence, and where in it; of position 0 for one below."""
    pos = jnp.maximum(pos, 0)
    return refs["table"][row, jnp.minimum(lax.div(pos, spec.page), refs["table"].shape[1] - 1)], lax.rem(pos, spec.page)


def write_kernel(refs, spec: Spec):
    """The new keys and values of one tile of tokens of one sequence into their pages, for one kv head."""
    head, number = pl.program_id(0), pl.program_id(1)
    row, offset = refs["owner"][number], refs["offset"][number]
    index, lane, (_, real) = jnp.arange(power(spec.tile)), jnp.arange(spec.lanes), _lanes(spec, 0)
    token = offset + index
    live = (index < spec.tile) & (token < refs["new"][row])
    pos = refs["total"][row] - refs["new"][row] + token
    # Other rows must not meet live ones in a page: the interpreter writes back what it finds there.
    page = _get(refs["table"], (jnp.full(pos.shape, row), lax.div(pos, spec.page)), live, refs["cache"].shape[1])
    spread = lambda x: jnp.broadcast_to(x, (len(index), spec.lanes))
    source = (spread((refs["start"][row] + token)[:, None]), spread(head), spread(lane[None]))
    where = (spread(refs["layer"][0]), spread(page[:, None]), spread(head), spread(lax.rem(pos, spec.page)[:, None]))
    for name, number in (("k", 0), ("v", 1)):
        x = _new(refs, spec, name, source, _both(live, real)).astype(refs["kv"].dtype)
        plgpu.store(refs["cache"].at[(*where, spread(_lanes(spec, number)[0][None]))], x, mask=_both(live, real))


def scaled_kernel(refs, spec: Spec):
    """What kv_scales.grow and rescale do, for the new token of one decoding sequence and one kv head: the scale that it needs, what its
    page held before by that, and its own key and value."""
    head, row = pl.program_id(0), pl.program_id(1)
    alone, kind, layer = refs["new"][row] == 1, refs["kv"].dtype, refs["layer"][0]
    at = jnp.clip(refs["start"][row], 0, refs["k"].shape[0] - 1)
    page, place = _page_of(refs, spec, row, refs["total"][row] - 1)
    lane, (_, real), old = jnp.arange(spec.lanes), _lanes(spec, 0), jnp.arange(power(spec.page))
    each, spread = (lambda x: jnp.full(lane.shape, x)), lambda x: jnp.broadcast_to(x, (len(old), spec.lanes))
    for name, number in (("k", 0), ("v", 1)):
        x = _get(refs[name], (each(at), each(head), lane), real).astype(jnp.float32)
        need = jnp.maximum(jnp.max(jnp.abs(x)) / kv_scales.largest(kind), kv_scales.SMALLEST)
        was = jnp.where(place > 0, refs["scales"][layer, page, 2 * head + number], 0.0)
        # Without maximum, which may lose a NaN: a sequence's own must come through.
        scale = jnp.where(need > was, need, was) + jnp.sum(x - x)
        ratio = was / scale
        lanes = _lanes(spec, number)[0]
        where = (spread(layer), spread(page), spread(head), spread(old[:, None]), spread(lanes[None]))
        grown = _both((old < place) & alone & (ratio < 1), real)
        plgpu.store(refs["cache"].at[where], _rounded(_get(refs["kv"], where, grown).astype(jnp.float32) * ratio, kind), mask=grown)
        where = (each(layer), each(page), each(head), each(place), lanes)
        plgpu.store(refs["cache"].at[where], _rounded(x / scale, kind), mask=each(alone) if real is None else real & alone)
        plgpu.store(refs["grown"].at[layer, page, 2 * head + number], scale, mask=alone)


def _rounded(x, kind):
    """x [...] float32 in the cache's type, as kv_scales.rounded has it: Triton knows no rounding to the nearest integer."""
    if not jnp.issubdtype(kind, jnp.integer):
        return x.astype(kind)
    below = jnp.floor(x)
    rest, odd = x - below, below - 2 * jnp.floor(below / 2)
    return (below + ((rest > 0.5) | ((rest == 0.5) & (odd == 1))).astype(jnp.float32)).astype(kind)


def merge_kernel(refs, spec: Spec):
    """For one query head: the splits of one sequence, if that decodes, into its row; or zeros into those of BLANKS rows that are nobody's.
    The rows of chunks are left as they are."""
    head, number = pl.program_id(0), pl.program_id(1)
    rows, splits = refs["new"].shape[0], spec.sizes.splits
    row = jnp.minimum(number, rows - 1)
    alone = (number < rows) & (refs["new"][row] == 1)
    split, lane, (_, real) = jnp.arange(power(splits)), jnp.arange(spec.lanes), _lanes(spec, 0)
    there = None if len(split) == splits else split < splits  # whether it decodes or not: nothing to wait for
    each = lambda x: jnp.full(split.shape, x)
    top, total = (_get(refs[name], (each(row), each(head), split), there, other) for name, other in (("top", NEG), ("sum", 0)))
    spread = lambda x: jnp.broadcast_to(x, (len(split), spec.lanes))
    acc = _get(refs["acc"], (spread(row), spread(head), spread(split[:, None]), spread(lane[None])), _both(there, real))
    best = jnp.max(top)
    if "logits" in refs:
        logit = refs["logits"][head] * (_LOG2E / spec.unit)
        best = jnp.maximum(best, logit)
    keep = _exp(top, best, spec)
    total = jnp.sum(total * keep)
    if "logits" in refs:
        total += jnp.sum(_exp(jnp.full((1,), logit), best, spec))
    each, token = (lambda x: jnp.full(lane.shape, x)), jnp.clip(refs["start"][row], 0, refs["out"].shape[0] - 1)
    out = (jnp.sum(acc * keep[:, None], axis=0) / total).astype(refs["out"].dtype)
    plgpu.store(refs["out"].at[each(token), each(head), lane], out, mask=each(alone) if real is None else real & alone)
    plgpu.store(refs["lse"].at[token, head], best * (spec.unit / _LOG2E) + jnp.log(total), mask=alone)
    _blank(refs, spec, head, number - rows)


def _blank(refs, spec: Spec, head, block):
    """Zeros in one block of rows, in those that no sequence has; a negative block is none."""
    rows, lane, (_, real) = refs["new"].shape[0], jnp.arange(spec.lanes), _lanes(spec, 0)
    token = block * BLANKS + jnp.arange(BLANKS)

    def look(step, owned):
        sequence = step * BLANKS + jnp.arange(BLANKS)
        start, new = (_get(refs[name], (sequence,), sequence < rows) for name in ("start", "new"))
        mine = (token[:, None] >= start[None]) & (token[:, None] < (start + new)[None])
        return jnp.maximum(owned, jnp.max(mine.astype(jnp.int32), axis=1))

    owned = lax.fori_loop(0, (block >= 0).astype(jnp.int32) * -(-rows // BLANKS), look, jnp.zeros((BLANKS,), jnp.int32))
    free = (token >= 0) & (token < refs["out"].shape[0]) & (owned == 0)
    spread = lambda x: jnp.broadcast_to(x, (BLANKS, spec.lanes))
    place = (spread(token[:, None]), spread(head), spread(lane[None]))
    plgpu.store(refs["out"].at[place], jnp.zeros(place[0].shape, refs["out"].dtype), mask=_both(free, real))
    plgpu.store(refs["lse"].at[token, jnp.full(token.shape, head)], jnp.full(token.shape, -jnp.inf), mask=free)


def chunk_kernel(refs, spec: Spec):
    """One tile of query rows (tokens x group) of one sequence, for one kv head."""
    head, number = pl.program_id(0), pl.program_id(1)
    row, offset = refs["owner"][number], refs["offset"][number]
    new, context, size = refs["new"][row], refs["total"][row] - refs["new"][row], spec.sizes.block
    index, lane, (_, real) = jnp.arange(spec.sizes.rows), jnp.arange(spec.lanes), _lanes(spec, 0)
    token = offset + lax.div(index, spec.group)
    heads = head * spec.group + lax.rem(index, spec.group)
    live = (index < spec.tile * spec.group) & (token < new)
    spread = lambda x: jnp.broadcast_to(x, (len(index), spec.lanes))
    place = (spread((refs["start"][row] + token)[:, None]), spread(heads[:, None]), spread(lane[None]))
    q = _new(refs, spec, "q", place, _both(live, real)).astype(spec.dtype)
    lowest = lambda pos: jnp.where(refs["window"][0] > 0, jnp.maximum(pos - refs["window"][0] + 1, 0), 0)
    pos, first = context + token, context + offset
    last = jnp.where(offset < new, context + jnp.minimum(offset + spec.tile, new) - 1, -1)
    # Blocks of tokens: those from `begin` to `stop` that a row sees, of which every row sees all from `inner` to `outer`.
    begin, stop = lax.div(lowest(first), size), lax.div(last + size, size)
    inner = jnp.minimum(lax.div(lowest(last) + size - 1, size), stop)
    outer = jnp.clip(lax.div(first + 1, size), inner, stop)
    sums = jnp.full(index.shape, NEG, jnp.float32), jnp.zeros(index.shape, jnp.float32), jnp.zeros(q.shape, jnp.float32)
    if "logits" in refs:
        sums = _get(refs["logits"], (heads,), live) * (_LOG2E / spec.unit), jnp.ones(index.shape, jnp.float32), sums[2]
    attend = functools.partial(_attend, refs, spec, q, (refs["layer"][0], row, head))

    def edge(step, sums):
        block = jnp.where(step < inner - begin, begin + step, outer + step - (inner - begin))
        at = block * size + jnp.arange(size)
        seen = (at[None] <= pos[:, None]) & (at[None] >= lowest(pos)[:, None])
        return attend(block, sums, (at <= last) & (at >= lowest(first)), seen)

    sums = lax.fori_loop(inner, outer, lambda block, sums: attend(block, sums), sums)
    top, total, acc = lax.fori_loop(0, jnp.maximum(inner - begin, 0) + stop - outer, edge, sums)
    plgpu.store(refs["made"].at[place], (acc * (1 / total)[:, None]).astype(refs["made"].dtype), mask=_both(live, real))
    where = (refs["start"][row] + token, heads)
    plgpu.store(refs["sums"].at[where], top * (spec.unit / _LOG2E) + jnp.log(total), mask=live)
