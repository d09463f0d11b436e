"""paged_attention on a GPU: kernels in Pallas, through Triton (paged_attention_gpu_kernels.py).

    decode  sequences with one new token: a program for each kv head, split of the context and sequence. The query heads of a kv head
            are the rows of one product. The program of split 0 also writes the new key and value into their page, and takes them from
            its own registers: nobody reads what is written in the same launch
    merge   a program for each sequence and query head: the splits by their maxima and sums; and some for the rows that are nobody's
    write   the new keys and values of sequences with more: a program for each kv head and tile of tokens. XLA's scatter takes six times
            as long
    chunks  their attention: a program for each kv head and tile of query rows (tokens x the heads of the group), which goes over the
            context once: blocks that all rows see without masks, then those at the edges
    scaled  in place of what decode writes, where the cache has scales: a page whose scale grows is rounded once more

A split is a share of the blocks that the sequence has at the moment, so lengths stay on the device; one without keys ends at once.
Online softmax: Milakov and Gimelshein, arXiv 1805.02867; split contexts: Dao et al., Flash-Decoding. Powers are of 2 throughout.

What is rare stays with the plain-jnp body: trees, and the sinks of a streaming policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import kv_scales
from pallas_kernels import paged_attention_gpu_kernels as kernels
from pallas_kernels.paged_attention import check, check_options, paged_attention_reference, write_pages
from pallas_kernels.paged_attention_gpu_kernels import BLANKS, Sizes, Spec

# Measured on an H100 with 8 kv heads of 128 and groups of 4, by the bytes of a number of the cache: of what is within 2% of the best for
# pages of 16 and of 64 there, the same for all batches. float32 and what chunk_sizes says of other heads are by registers alone.
DECODE = {1: Sizes(block=32, warps=1, stages=5), 2: Sizes(block=16, warps=1, stages=5), 4: Sizes(block=16, warps=2, stages=3)}
CHUNKS = {1: Sizes(block=64, warps=8, stages=3, rows=128), 2: Sizes(block=64, warps=4, stages=3, rows=128)}
CHUNKS_FLOAT32 = Sizes(block=32, warps=4, stages=2, rows=32)
PROGRAMS = 528  # of the decode kernel, that a GPU needs: 4 for each of 132 multiprocessors
SPLIT = 64  # tokens of context that a split is worth


def decode_sizes(rows: int, tokens: int, heads: int, group: int, dim: int, itemsize: int) -> Sizes:
    """For `rows` sequences of up to `tokens` of context, by static shapes alone."""
    sizes, splits = DECODE[itemsize], min(-(-PROGRAMS // (rows * heads)), tokens // SPLIT)
    accumulators = kernels.decode_rows(group) * kernels.power(dim)  # a warp has registers for 2048
    return sizes._replace(splits=max(1, splits), warps=max(sizes.warps, accumulators // 2048))


def chunk_sizes(group: int, dim: int, itemsize: int, wide: bool) -> Sizes:
    """wide: products in float32, without the matrix units."""
    sizes = CHUNKS_FLOAT32 if wide else CHUNKS[1 if dim > 128 else itemsize]
    return sizes._replace(rows=max(sizes.rows, kernels.power(group)))


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
    packed=None,
    rope=None,
    interpret=False,
    sizes: Mapping[str, Sizes] | None = None,
):
    """The contract of paged_attention.py. Returns (out [T, Hq, D], kv, kv_scale, sums' logarithms float32 [T, Hq], -inf where nobody is).
    packed, with rope: what q, k and v were made of, which the kernels read in their place where the cache has no scales, and rotate.
    kv and kv_scale are written in place where they are donated. sizes: "decode" and "chunks" in place of the tuned ones. Raises ValueError
    for shapes that cannot work."""
    check(q, k, v, kv, page_table, q_start, q_len, kv_len, q_max)
    check_options(q, kv, window, sinks, q_sinks, sink_logits, tree, kv_scale, 1)
    beyond = kv.dtype.itemsize == 1 and 2**31 < kv.size <= 2**32  # Triton would count its bytes in int32
    if sinks or tree is not None or beyond or scale <= 0:
        rest: dict[str, Any] = dict(
            scale=scale, softcap=softcap, q_max=q_max, sinks=sinks, q_sinks=q_sinks, sink_logits=sink_logits, tree=tree
        )
        rest |= dict(layer=layer, page_table=page_table, q_start=q_start, q_len=q_len, kv_len=kv_len, window=window, kv_scale=kv_scale)
        return paged_attention_reference(q, k, v, kv, **rest, batched=True)
    heads, page, dim = *kv.shape[2:4], q.shape[2]
    group, dtype, sizes = q.shape[1] // heads, kv.dtype if kv_scale is None else q.dtype, sizes or {}
    itemsize = kv.dtype.itemsize
    decode = sizes.get("decode") or decode_sizes(len(q_len), page_table.shape[1] * page, heads, group, dim, itemsize)
    chunks = sizes.get("chunks") or chunk_sizes(group, dim, itemsize, dtype == jnp.float32)
    alone = kv_scale is None and kv.shape[4] == 2 * dim  # the decode kernel writes what it is brought
    spec = Spec(heads, group, dim, page, float(scale), softcap, dtype, decode, chunks.rows // group, alone, interpret=bool(interpret))
    one = lambda x: jnp.asarray(x, jnp.int32).reshape(1)
    rows, spec = (dict(q=q, k=k, v=v), spec) if packed is None or not alone else _packed(packed, rope, spec)
    data = dict(**rows, kv=kv, table=page_table, start=q_start, new=q_len, total=kv_len, layer=one(layer), window=one(window))
    data |= {} if kv_scale is None else dict(scales=kv_scale)
    data |= {} if sink_logits is None else dict(logits=sink_logits.astype(jnp.float32))
    if not alone or q_max > 1:
        data |= _written(data, spec, q_max)
    out, lse, kv = _decode(data, spec)
    if q_max > 1:
        out, lse = _chunks(data | dict(kv=kv), out, lse, replace(spec, sizes=chunks))
    return out, kv, data.get("scales"), lse


def _packed(packed, rope, spec: Spec) -> tuple[dict[str, Any], Spec]:
    """What the kernels read in place of queries, keys and values."""
    flat = lambda x: x.reshape(len(packed), -1)
    rows = dict(q=packed.reshape(len(packed), -1, spec.dim)) | ({} if rope is None else dict(zip(("cos", "sin"), map(flat, rope))))
    return rows, replace(spec, packed=True, rotary=0 if rope is None else rows["cos"].shape[1])


def _written(data: dict[str, Any], spec: Spec, q_max: int) -> dict[str, Any]:
    """The cache with the new keys and values in it: of all sequences, or of those that the decode kernel does not write."""
    kv, dim = data["kv"], spec.dim
    k, v = (data["q"],) * 2 if spec.packed else (data["k"], data["v"])
    rows = dict(page_table=data["table"], q_start=data["start"], q_len=data["new"], kv_len=data["total"], layer=data["layer"][0])
    if kv.shape[4] > 2 * dim and "scales" not in data:
        return dict(kv=write_pages(jnp.concatenate([k, v], axis=-1).astype(kv.dtype), kv, **rows))
    if "scales" in data and q_max == 1 and kv.shape[4] == 2 * dim:
        outputs = dict(cache=jax.ShapeDtypeStruct(kv.shape, kv.dtype), grown=jax.ShapeDtypeStruct(data["scales"].shape, jnp.float32))
        given = _only(data, "k v kv table start new total layer scales")
        spec = replace(spec, sizes=Sizes(block=1, warps=1, stages=1))  # with more, one could read a scale that another has written
        made = _call(kernels.scaled_kernel, given, outputs, (spec.heads, len(data["new"])), spec, dict(kv="cache", scales="grown"))
        return dict(kv=made["cache"], scales=made["grown"])
    found = {}
    if "scales" in data:
        found["scales"], new, ratio = kv_scales.grow(k, v, data["scales"], kv.dtype, spec.page, **rows)
        context = data["total"] - data["new"]
        kv = kv_scales.rescale(kv, ratio, dim, layer=rows["layer"], page_table=data["table"], context=context)
        if kv.shape[4] > 2 * dim:
            return found | dict(kv=write_pages(new, kv, **rows))
        k, v = new[..., :dim], new[..., dim:]
    given = _only(data, "table start new total layer") | (_only(data, "q cos sin") if spec.packed else dict(k=k, v=v)) | dict(kv=kv)
    given |= _tiles(data["new"], spec.tile, len(data["q"]), 2 if spec.write else 1)
    outputs = dict(cache=jax.ShapeDtypeStruct(kv.shape, kv.dtype))
    spec = replace(spec, sizes=Sizes(block=1, warps=4, stages=1))
    made = _call(kernels.write_kernel, given, outputs, (spec.heads, len(given["owner"])), spec, dict(kv="cache"))
    return found | dict(kv=made["cache"])


def _decode(data: dict[str, Any], spec: Spec):
    """Sequences with one new token: (out [T, Hq, D], sums' logarithms [T, Hq], kv)."""
    q, kv, rows, splits = data["q"], data["kv"], len(data["new"]), spec.sizes.splits
    given = _only(data, "q cos sin kv table start new total layer window scales" + (" k v" if spec.write else ""))
    made = (len(q), spec.heads * spec.group, spec.dim)
    partial = (rows, made[1], splits)
    shapes = dict(acc=(*partial, spec.dim), top=partial, sum=partial)
    outputs = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    outputs |= dict(cache=jax.ShapeDtypeStruct(kv.shape, kv.dtype)) if spec.write else {}
    found = _call(kernels.decode_kernel, given, outputs, (spec.heads, splits, rows), spec, dict(kv="cache") if spec.write else None)
    kv = found.pop("cache", kv)
    outputs = dict(out=jax.ShapeDtypeStruct(made, q.dtype), lse=jax.ShapeDtypeStruct(made[:2], jnp.float32))
    merge = replace(spec, sizes=Sizes(block=1, warps=1 if splits * spec.dim <= 1024 else 4, stages=1, splits=splits))
    grid = (made[1], rows + -(-len(q) // BLANKS))
    merged = _call(kernels.merge_kernel, found | _only(data, "start new logits"), outputs, grid, merge)
    return merged["out"], merged["lse"], kv


def _chunks(data: dict[str, Any], out, lse, spec: Spec):
    """Sequences with more than one new token, into out and lse."""
    given = _only(data, "q cos sin kv table start new total layer window scales logits") | dict(out=out, lse=lse)
    given |= _tiles(data["new"], spec.tile, len(out), 2)
    outputs = dict(made=jax.ShapeDtypeStruct(out.shape, out.dtype), sums=jax.ShapeDtypeStruct(lse.shape, lse.dtype))
    found = _call(kernels.chunk_kernel, given, outputs, (spec.heads, len(given["owner"])), spec, dict(out="made", lse="sums"))
    return found["made"], found["sums"]


def _tiles(new, tile: int, tokens: int, least: int) -> dict[str, Any]:
    """Tiles of the new tokens of sequences with at least `least`, as many as there can be: the sequence of each and its first token there,
    one that does not exist for those that are not needed. The last tile of a sequence comes first: it sees most, and what runs last
    should be short."""
    tiles = jnp.where(new >= least, (new + tile - 1) // tile, 0)
    ends = jnp.cumsum(tiles)
    number = jnp.arange(tokens // tile + min(len(new), tokens // least))
    owner = jnp.minimum(jnp.sum(number[:, None] >= ends, axis=1), len(new) - 1)
    offset = jnp.where(number < ends[-1], (ends[owner] - 1 - number) * tile, tokens)
    return dict(owner=owner.astype(jnp.int32), offset=offset.astype(jnp.int32))


def _only(data: dict[str, Any], names: str) -> dict[str, Any]:
    return {name: data[name] for name in names.split() if name in data}


def _call(kernel, data, outputs, grid, spec: Spec, aliases: Mapping[str, str] | None = None):
    """Runs a kernel of refs by name: inputs data, outputs as {name: shape}; aliases: {input: output in its place}. {name: array}."""
    names = (*data, *outputs)

    def body(*refs):
        kernel(dict(zip(names, refs, strict=True)), spec)

    body.__name__ = body.__qualname__ = "paged_" + kernel.__name__
    call = pl.pallas_call(
        body,
        grid=grid,
        out_shape=tuple(outputs.values()),
        input_output_aliases={list(data).index(old): list(outputs).index(new) for old, new in (aliases or {}).items()},
        compiler_params=plgpu.CompilerParams(num_warps=spec.sizes.warps, num_stages=spec.sizes.stages),
        interpret=spec.interpret,
        name=body.__name__,
    )
    return dict(zip(outputs, call(*data.values()), strict=True))
