"""paged_attention on a GPU: kernels in Pallas, through Triton.

    decode  sequences with one new token: a program for each kv head, split of the context and sequence. The query heads of a kv head
            are the rows of one product. Without scales the program of split 0 also writes the new key and value into their page, and
            takes them from its own registers: nobody reads what is written in the same launch.
    merge   one program for each row of q and query head: the splits of a decoding sequence by their maxima and sums; zeros for nobody
    chunks  sequences with more: a program for each kv head and tile of query rows (tokens x the heads of the group), which goes over the
            context once: blocks that all rows see without masks, then those at the edges

A split is a share of the blocks that the sequence has at the moment, so lengths stay on the device; one without keys ends at once.
Online softmax: Milakov and Gimelshein, arXiv 1805.02867; split contexts: Dao et al., Flash-Decoding. Powers are of 2 throughout.

What is rare stays with the plain-jnp body: trees, and the sinks of a streaming policy.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import kv_scales
from pallas_kernels.paged_attention import check, check_options, paged_attention_reference, write_pages

_NEG = -1e8  # a score of nothing: so that rounding it, times a unit, against itself still leaves a power that float32 holds
_LOG2E = math.log2(math.e)


class Sizes(NamedTuple):
    """block: tokens of context in a step. warps, stages: of a program, as Triton has them. rows: of a tile of query rows, a power of 2 (a
    decoding sequence has what its group needs). splits: of a decoding sequence's context, a power of 2."""

    block: int
    warps: int
    stages: int
    rows: int = 16
    splits: int = 1


# Measured on an H100, in bytes of a number of the cache and the largest block that one page holds.
DECODE = {
    (2, 16): Sizes(block=16, warps=1, stages=3),
    (2, 32): Sizes(block=32, warps=2, stages=3),
    (2, 64): Sizes(block=64, warps=2, stages=2),
    (1, 16): Sizes(block=32, warps=2, stages=3),
    (4, 16): Sizes(block=16, warps=2, stages=2),
}
CHUNKS = {2: Sizes(block=64, warps=4, stages=3, rows=128), 1: Sizes(block=64, warps=4, stages=3, rows=128), 4: Sizes(32, 4, 2, 32)}
PROGRAMS = 1024  # of the decode kernel that fill a GPU
SPLIT = 256  # tokens of context that a split is worth


@dataclass(frozen=True)
class Spec:
    """What the kernels know when they are compiled. dtype: of the products; tile: query tokens in a tile of rows."""

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
    interpret: bool = False

    @property
    def lanes(self) -> int:
        return _power(self.dim)

    @property
    def unit(self) -> float:
        """A score of 1 as a power of 2. Without a cap scores are products that are not scaled yet: that is part of the exponent."""
        return self.scale * _LOG2E if self.softcap is None else _LOG2E


def _power(number: int) -> int:
    """The smallest power of 2 that is not smaller."""
    return 1 << (number - 1).bit_length()


def decode_sizes(rows: int, tokens: int, heads: int, page: int, itemsize: int) -> Sizes:
    """For `rows` sequences of up to `tokens` of context, by static shapes alone."""
    fits = math.gcd(page, 64)
    sizes = DECODE.get((itemsize, fits)) or DECODE.get((itemsize, 16)) or DECODE[2, 16]
    most = min(PROGRAMS // (rows * heads), tokens // SPLIT)
    return sizes._replace(splits=1 << max(0, most.bit_length() - 1))


def paged_attention_gpu(
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
    q_max,
    softcap=None,
    sinks=0,
    q_sinks=None,
    sink_logits=None,
    tree=None,
    kv_scale=None,
    interpret=False,
    sizes: Mapping[str, Sizes] | None = None,
):
    """The contract of paged_attention.py. Returns (out [T, Hq, D], kv, kv_scale, sums' logarithms float32 [T, Hq], -inf where nobody is).
    kv is written in place where it is donated. sizes: "decode" and "chunks" in place of the tuned ones. Raises ValueError for shapes that
    cannot work."""
    check(q, k, v, kv, page_table, q_start, q_len, kv_len, q_max)
    check_options(q, kv, window, sinks, q_sinks, sink_logits, tree, kv_scale, 1)
    rows = dict(page_table=page_table, q_start=q_start, q_len=q_len, kv_len=kv_len)
    beyond = kv.dtype.itemsize == 1 and 2**31 < kv.size <= 2**32  # Triton would count its bytes in int32
    if sinks or tree is not None or beyond:
        rest = dict(scale=scale, softcap=softcap, q_max=q_max, sinks=sinks, q_sinks=q_sinks, sink_logits=sink_logits, tree=tree)
        return paged_attention_reference(q, k, v, kv, layer=layer, window=window, **rows, **rest, kv_scale=kv_scale, batched=True)
    heads, page, dim = *kv.shape[2:4], q.shape[2]
    alone = kv_scale is None and kv.shape[4] == 2 * dim  # the decode kernel writes what it is brought
    if kv_scale is not None:
        kv_scale, new, ratio = kv_scales.grow(k, v, kv_scale, kv.dtype, page, layer=layer, **rows)
        kv = kv_scales.rescale(kv, ratio, dim, layer=layer, page_table=page_table, context=kv_len - q_len)
        kv = write_pages(new, kv, layer=layer, **rows)
    elif q_max > 1 or not alone:
        several = jnp.where(q_len > 1, q_len, 0) if alone else q_len
        new = jnp.concatenate([k, v], axis=-1).astype(kv.dtype)
        kv = write_pages(new, kv, layer=layer, **rows | dict(q_len=several))
    dtype = kv.dtype if kv_scale is None else q.dtype
    spec = Spec(
        heads, q.shape[1] // heads, dim, page, float(scale), softcap, dtype, Sizes(16, 4, 2), write=alone, interpret=bool(interpret)
    )
    one = lambda x: jnp.asarray(x, jnp.int32).reshape(1)
    data = dict(q=q, kv=kv, table=page_table, start=q_start, new=q_len, total=kv_len, layer=one(layer), window=one(window))
    data |= {} if kv_scale is None else dict(scales=kv_scale)
    sizes = sizes or {}
    found = sizes.get("decode") or decode_sizes(len(q_len), page_table.shape[1] * page, heads, page, kv.dtype.itemsize)
    out, lse, kv = _decode(data, k, v, sink_logits, replace(spec, sizes=found), interpret)
    if q_max > 1:
        found = sizes.get("chunks") or CHUNKS[dtype.itemsize]
        tile = max(1, found.rows // spec.group)
        out, lse = _chunks(data | dict(kv=kv), out, lse, sink_logits, replace(spec, sizes=found, tile=tile), interpret)
    return out, kv, kv_scale, lse


def _decode(data, k, v, sink_logits, spec: Spec, interpret):
    """Sequences with one new token: (out [T, Hq, D], sums' logarithms [T, Hq], kv). Rows of chunks are left as they are."""
    q, kv, rows, splits = data["q"], data["kv"], data["new"].shape[0], spec.sizes.splits
    tokens, q_heads, dim = q.shape
    data = data | (dict(k=k, v=v) if spec.write else {})
    partial = (rows, q_heads, splits)
    shapes = dict(acc=(*partial, dim), top=partial, sum=partial)
    outputs = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    outputs |= dict(cache=jax.ShapeDtypeStruct(kv.shape, kv.dtype)) if spec.write else {}
    aliases = {list(data).index("kv"): 3} if spec.write else {}
    found = _call(_decode_kernel, data, outputs, (spec.heads, splits, rows), spec, interpret, aliases)
    merged = {name: found[name] for name in shapes} | {name: data[name] for name in ("start", "new")}
    merged |= {} if sink_logits is None else dict(logits=sink_logits.astype(jnp.float32))
    outputs = dict(out=jax.ShapeDtypeStruct(q.shape, q.dtype), lse=jax.ShapeDtypeStruct((tokens, q_heads), jnp.float32))
    merge = replace(spec, sizes=Sizes(block=rows, warps=1 if splits * dim <= 1024 else 4, stages=1, splits=splits))
    made = _call(_merge_kernel, merged, outputs, (q_heads, tokens), merge, interpret)
    return made["out"], made["lse"], found.get("cache", kv)


def _chunks(data, out, lse, sink_logits, spec: Spec, interpret):
    """Sequences with more than one new token, into out and lse."""
    tokens, rows = out.shape[0], data["new"].shape[0]
    several = jnp.where(data["new"] > 1, data["new"], 0)
    tiles = (several + spec.tile - 1) // spec.tile
    ends = jnp.cumsum(tiles)
    number = jnp.arange(tokens // spec.tile + min(rows, tokens // 2))  # as many as there can be
    owner = jnp.minimum(jnp.sum(number[:, None] >= ends, axis=1), rows - 1)
    # The last tile of a sequence, which sees most, comes first: what runs last is short.
    offset = jnp.where(number < ends[-1], (ends[owner] - 1 - number) * spec.tile, tokens)
    data = data | dict(owner=owner.astype(jnp.int32), offset=offset.astype(jnp.int32), out=out, lse=lse)
    data |= {} if sink_logits is None else dict(logits=sink_logits.astype(jnp.float32))
    outputs = dict(made=jax.ShapeDtypeStruct(out.shape, out.dtype), sums=jax.ShapeDtypeStruct(lse.shape, lse.dtype))
    aliases = {list(data).index("out"): 0, list(data).index("lse"): 1}
    found = _call(_chunk_kernel, data, outputs, (spec.heads, len(number)), spec, interpret, aliases)
    return found["made"], found["sums"]


def _call(kernel, data, outputs, grid, spec: Spec, interpret, aliases=None):
    """Runs a kernel of refs by name: inputs data, outputs as {name: shape}. Returns {name: array}."""
    names = (*data, *outputs)

    def body(*refs):
        kernel(dict(zip(names, refs, strict=True)), spec)

    body.__name__ = body.__qualname__ = kernel.__name__.strip("_")
    call = pl.pallas_call(
        body,
        grid=grid,
        out_shape=tuple(outputs.values()),
        input_output_aliases=aliases or {},
        compiler_params=plgpu.CompilerParams(num_warps=spec.sizes.warps, num_stages=spec.sizes.stages),
        interpret=interpret,
        name=body.__name__,
    )
    return dict(zip(outputs, call(*data.values()), strict=True))


def _get(ref, place, mask=None, other=0):
    """ref[place], `other` where the mask is false: nothing is read there."""
    return plgpu.load(ref.at[place], mask=mask, other=None if mask is None else jnp.asarray(other, ref.dtype))


def _lanes(spec: Spec, number: int):
    """Of keys (number 0) or values (1) in a row of the cache; and which of them there are, None for all."""
    lane = jnp.arange(spec.lanes)
    return lane + number * spec.dim, None if spec.lanes == spec.dim else lane < spec.dim


def _both(rows, lanes):
    """The mask of a tile by those of its rows and lanes, None where there is none."""
    sides = [x for x in (None if rows is None else rows[:, None], None if lanes is None else lanes[None]) if x is not None]
    return functools.reduce(jnp.logical_and, sides) if sides else None


def _keys(refs, spec: Spec, layer, row, head, block, inside):
    """Keys and values [block, lanes] of a block of tokens, and their scales (None without): inside bool [block], or None for all. What
    is not inside is zero, whatever its page holds."""
    size, page = spec.sizes.block, spec.page
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
    keys, values, key_scale, value_scale = _keys(refs, spec, *where, block, inside)
    products = _dot(q, keys, transposed=True)
    scores = _scored(products if key_scale is None else products * key_scale[None], spec)
    if seen is not None:
        scores = jnp.where(seen, scores, _NEG)
    new_top = jnp.maximum(top, jnp.max(scores, axis=1))
    weights, keep = _exp(scores, new_top[:, None], spec), _exp(top, new_top, spec)
    total = total * keep + jnp.sum(weights, axis=1)
    weights = weights if value_scale is None else weights * value_scale[None]
    return new_top, total, acc * keep[:, None] + _dot(weights.astype(spec.dtype), values)


def _decode_kernel(refs, spec: Spec):
    """One share of the context of one sequence, for one kv head."""
    head, split, row = (pl.program_id(axis) for axis in range(3))
    size, new = spec.sizes.block, refs["new"][row]
    at = jnp.clip(refs["start"][row], 0, refs["q"].shape[0] - 1)
    pos = jnp.where(new == 1, refs["total"][row] - 1, -1)
    group = jnp.arange(max(16, _power(spec.group)))
    mine, lane, (_, real) = group < spec.group, jnp.arange(spec.lanes), _lanes(spec, 0)
    spread = lambda x: jnp.broadcast_to(x, (len(group), spec.lanes))
    q = _get(refs["q"], (spread(at), spread((head * spec.group + group)[:, None]), spread(lane[None])), _both(mine, real)).astype(
        spec.dtype
    )
    sums = jnp.full(group.shape, _NEG, jnp.float32), jnp.zeros(group.shape, jnp.float32), jnp.zeros(q.shape, jnp.float32)
    end = pos + 1
    if spec.write:
        first = (split == 0) & (new == 1)
        sums, end = _written(refs, spec, q, row, head, at, pos, first, sums), pos
    where = refs["layer"][0], row, head  # read here: a load in the loop would take stages from those of keys and values
    low = jnp.where(refs["window"][0] > 0, jnp.maximum(pos - refs["window"][0] + 1, 0), 0)
    begin, stop = lax.div(low, size), lax.div(jnp.maximum(end, 0) + size - 1, size)
    share = lax.div(stop - begin + spec.sizes.splits - 1, spec.sizes.splits)
    begin = begin + split * share

    def step(block, sums):
        token = block * size + jnp.arange(size)
        inside = (token >= low) & (token < end)
        return _attend(refs, spec, q, where, block, sums, inside, inside[None])

    top, total, acc = lax.fori_loop(begin, jnp.minimum(begin + share, stop), step, sums)
    heads = head * spec.group + group
    each = lambda x: jnp.full(group.shape, x)
    plgpu.store(refs["top"].at[each(row), heads, each(split)], top, mask=mine)
    plgpu.store(refs["sum"].at[each(row), heads, each(split)], total, mask=mine)
    place = (spread(row), spread(heads[:, None]), spread(split), spread(lane[None]))
    plgpu.store(refs["acc"].at[place], acc, mask=_both(mine, real))


def _written(refs, spec: Spec, q, row, head, at, pos, first, sums):
    """Writes the new key and value into their page, and begins the sums with them: if `first`."""
    lane, (_, real) = jnp.arange(spec.lanes), _lanes(spec, 0)
    each = lambda x: jnp.full(lane.shape, x)
    new = [_get(refs[name], (each(at), each(head), lane), real).astype(refs["kv"].dtype) for name in ("k", "v")]
    pos = jnp.maximum(pos, 0)
    page = refs["table"][row, jnp.minimum(lax.div(pos, spec.page), refs["table"].shape[1] - 1)]
    for number, x in enumerate(new):
        place = (each(refs["layer"][0]), each(page), each(head), each(lax.rem(pos, spec.page)), _lanes(spec, number)[0])
        plgpu.store(refs["cache"].at[place], x, mask=each(first) if real is None else real & first)
    key, value = (x.astype(jnp.float32)[None] for x in new)
    score = _scored(jnp.sum(q.astype(jnp.float32) * key, axis=1), spec)
    top, total, acc = sums
    return jnp.where(first, score, top), jnp.where(first, 1.0, total), jnp.where(first, value, acc)


def _merge_kernel(refs, spec: Spec):
    """One row of q and one query head: the splits of its sequence, if that decodes; zeros if it is nobody's."""
    head, token = pl.program_id(0), pl.program_id(1)
    rows, splits = spec.sizes.block, spec.sizes.splits
    sequence, split = jnp.arange(_power(rows)), jnp.arange(splits)
    start, new = (_get(refs[name], (sequence,), sequence < rows) for name in ("start", "new"))
    mine = (token >= start) & (token < start + new)
    row, new = jnp.max(jnp.where(mine, sequence, 0)), jnp.max(jnp.where(mine, new, 0))
    each = lambda x: jnp.full(split.shape, x)
    alone = new == 1
    place = each(row), each(head), split
    top, total = (_get(refs[name], place, each(alone), other) for name, other in (("top", _NEG), ("sum", 0)))
    lane, (_, real) = jnp.arange(spec.lanes), _lanes(spec, 0)
    spread = lambda x: jnp.broadcast_to(x, (splits, spec.lanes))
    acc = _get(refs["acc"], (spread(row), spread(head), spread(split[:, None]), spread(lane[None])), _both(each(alone), real))
    best = jnp.max(top)
    if "logits" in refs:
        logit = refs["logits"][head] * (_LOG2E / spec.unit)
        best = jnp.maximum(best, logit)
    keep = _exp(top, best, spec)
    total = jnp.sum(total * keep)
    if "logits" in refs:
        total += jnp.sum(_exp(jnp.full((1,), logit), best, spec))
    out = jnp.where(alone, jnp.sum(acc * keep[:, None], axis=0) / total, 0)
    lse = jnp.where(alone, best * (spec.unit / _LOG2E) + jnp.log(total), -jnp.inf)
    here = new <= 1  # the rows of chunks come later
    where = (jnp.full(lane.shape, token), jnp.full(lane.shape, head), lane)
    plgpu.store(refs["out"].at[where], out.astype(refs["out"].dtype), mask=jnp.full(lane.shape, here) if real is None else real & here)
    plgpu.store(refs["lse"].at[token, head], lse, mask=here)


def _chunk_kernel(refs, spec: Spec):
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
    q = _get(refs["q"], place, _both(live, real)).astype(spec.dtype)
    lowest = lambda pos: jnp.where(refs["window"][0] > 0, jnp.maximum(pos - refs["window"][0] + 1, 0), 0)
    pos, first = context + token, context + offset
    last = jnp.where(offset < new, context + jnp.minimum(offset + spec.tile, new) - 1, -1)
    # Blocks of tokens: those from `begin` to `stop` that a row sees, of which every row sees all from `inner` to `outer`.
    begin, stop = lax.div(lowest(first), size), lax.div(last + size, size)
    inner = jnp.minimum(lax.div(lowest(last) + size - 1, size), stop)
    outer = jnp.clip(lax.div(first + 1, size), inner, stop)
    sums = jnp.full(index.shape, _NEG, jnp.float32), jnp.zeros(index.shape, jnp.float32), jnp.zeros(q.shape, jnp.float32)
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
