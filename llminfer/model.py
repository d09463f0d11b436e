"""The decoder: one function for every family, of weights, cache and batch. No module objects."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from llminfer import latent, moe
from llminfer.balance import added, of_layers
from llminfer.batch import Batch
from llminfer.by_device import on_each, runs_alone
from llminfer.cache import KVCache, ScaledPages
from llminfer.config import ModelConfig
from llminfer.layers import norm, qk_norm, query_temperature, rope_tables, softcap, unit_norm
from llminfer.linear import Norm, Shared, add, entered, head_product, linear, rows_times
from llminfer.params import Layer, Params
from llminfer.quant import QTensor, Stacked
from llminfer.spread import by_devices, deal, entering, gathered, order_of, shared_out, shares_of
from llminfer.target import Target
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.rope import rotate


def forward(params: Params, cache: KVCache, batch: Batch, c: ModelConfig, target: Target, q_max: int) -> tuple[jax.Array, KVCache]:
    """Hidden states after the final norm, [T, D], and the cache with the batch's keys and values in it.
    q_max: static bound of batch.q_len (1: decode)."""
    shares = shares_of(batch.tokens.shape[0], q_max, target)
    batch = entering(batch, shares, target)
    x = embed(params, batch, c, target)
    x = shared_out(x, shares.stream, target) if shares.stream else x
    body = functools.partial(layers, q_max=q_max)
    if runs_alone(c, target):
        return on_each(body, c, target)(replace(params, embed=None, lm_head=None, positions=None), x, cache, batch)
    return body(params, x, cache, batch, c, target)


def layers(params: Params, x: Any, cache: KVCache, batch: Batch, c: ModelConfig, target: Target, *, q_max: int) -> tuple[Any, KVCache]:
    """What `forward` does after the embedding."""
    ropes = ropes_of(batch, c)
    batch = replace(batch, tables=deal(batch, cache, c, target))
    layer = functools.partial(run_layer, batch=batch, ropes=ropes, c=c, target=target, q_max=q_max)
    groups: list[Any] = list(cache.groups)
    used: list[jax.Array] = []  # of the layers so far that have experts: tokens of each slot for them
    scanned = c.scanned if params.stacked else range(0)
    numbers = [number for number in range(c.num_layers) if number not in scanned]
    for at, (number, weights) in enumerate(zip(numbers, params.listed, strict=True)):
        if params.stacked and at == params.leading:
            x, groups, used = run_stacked(params.stacked, x, groups, layer, c, cache.routing, used)
        group = c.groups.index(c.window(number))
        place = c.group_layers(group).index(number)
        kind, told = (group, c.rope(number)), of_layers(cache.routing, sum(map(len, used)), 1)
        if params.stacked:
            x, groups[group], counted = layer(weights, x, groups[group], (jnp.int32(place), told), kind=kind)
        else:  # listed cache: one array a layer
            x, own, counted = layer(weights, x, groups[group][place], (jnp.int32(0), told), kind=kind)
            groups[group] = (*groups[group][:place], own, *groups[group][place + 1 :])
        used += [] if counted is None else [counted]
    if params.stacked and params.leading == len(params.listed):
        x, groups, used = run_stacked(params.stacked, x, groups, layer, c, cache.routing, used)
    routing = cache.routing and replace(cache.routing, counts=added(cache.routing.counts, used))
    return final_norm(params, x, c, target), KVCache(tuple(groups), routing=routing)


def final_norm(params: Params, x: Any, c: ModelConfig, target: Target) -> jax.Array:
    with jax.named_scope("final_norm"):
        _, y, before = entered(x, (params.final_norm, params.final_norm_bias), c, target, peers=params.peers)
        return norm(y, before[0], before[1], c) if before else y


def ropes_of(batch: Batch, c: ModelConfig) -> tuple[Any, ...]:
    """A table for each of c.ropes, by the batch's positions; where a policy left tokens out, as many again for what looks at the sinks:
    by where a token would be if there were only the sinks and the window."""
    if not c.sink_window:
        return rope_tables(c, batch.positions, batch.reach)
    most = c.sink_tokens + c.sink_window
    reach = jnp.minimum(batch.reach, most)
    return (*rope_tables(c, batch.positions, reach), *rope_tables(c, jnp.minimum(batch.positions, most - 1), reach))


def embed(params: Params, batch: Batch, c: ModelConfig, target: Target) -> jax.Array:
    with jax.named_scope("embed"):
        ids = jnp.clip(batch.tokens, 0, c.vocab_size - 1)
        x = (params.embed[ids] if len(ids) > 1 else _one_of(params.embed, ids, target)).astype(target.dtype)
        if c.embed_scale != 1:
            x = x * jnp.asarray(c.embed_scale, x.dtype)
        if params.positions is not None:
            x = x + params.positions[jnp.clip(batch.positions, 0, c.max_position - 1)].astype(target.dtype)
        return x


def _one_of(table: jax.Array, ids: jax.Array, target: Target) -> jax.Array:
    """table[ids] for one id: of that XLA makes a slice, for GPUs so early that a table on several devices is gathered to be sliced."""
    if (ways := target.ways("vocab")) == 1:
        return table[ids]
    part, over = table.shape[0] // ways, target.over("vocab")

    def own(table: jax.Array, ids: jax.Array) -> jax.Array:
        at = ids - jax.lax.axis_index(over) * part
        return jax.lax.psum(jnp.where((at >= 0) & (at < part), table[jnp.clip(at, 0, part - 1)], 0), over)

    spec = jax.sharding.PartitionSpec
    return target.split(own, (target.partition(("vocab", None)), spec()), spec())(table, ids)


def run_stacked(
    stacked: tuple[Layer, ...],
    x: jax.Array,
    groups: list[Any],
    layer: Any,
    c: ModelConfig,
    routing: Any,
    used: list[Any],
    *,
    alone: bool = False,
):
    """The repeats of the layer pattern under one scan. The caches ride in the carry, whole: a kernel picks its layer. So do weights that
    a kernel takes; XLA's own products take slices without a copy. used: of the layers before.
    alone: the caches have no layers but these."""
    period, repeats = len(stacked), jax.tree.leaves(stacked)[0].shape[0]
    sparse = [place for place in range(period) if c.has_experts(c.scanned.start + place)]
    told = of_layers(routing, sum(map(len, used)), repeats * len(sparse))
    told = jax.tree.map(lambda x: x.reshape(repeats, len(sparse), *x.shape[1:]), told)
    by_kernel = lambda name, leaf: isinstance(leaf, QTensor) or name.startswith("experts_")
    whole = [{name: leaf for name, leaf in vars(w).items() if leaf is not None and by_kernel(name, leaf)} for w in stacked]
    sliced = tuple(replace(w, **dict.fromkeys(kept)) for w, kept in zip(stacked, whole, strict=True))
    first = c.scanned.start
    windows = [c.groups.index(c.window(first + place)) for place in range(period)]
    share = [windows.count(group) for group in range(len(groups))]  # layers of each group in one pattern
    before = [0 if alone else sum(number < first for number in c.group_layers(group)) for group in range(len(groups))]

    def body(carry, xs):
        x, caches = carry
        repeat, weights, now = xs
        counts = []
        for place in range(period):
            group = windows[place]
            index = before[group] + repeat * share[group] + windows[:place].count(group)
            w = replace(weights[place], **{name: Stacked(leaf, repeat) for name, leaf in whole[place].items()})
            own_told = jax.tree.map(lambda x, place=place: x[None, sparse.index(place)], now) if place in sparse else None
            x, own, counted = layer(w, x, caches[group], (index, own_told), kind=(group, c.rope(first + place)))
            counts += [] if counted is None else [counted]
            caches = (*caches[:group], own, *caches[group + 1 :])
        return (x, caches), jnp.concatenate(counts) if counts else None

    numbers = jnp.arange(repeats, dtype=jnp.int32)
    (x, caches), counts = jax.lax.scan(body, (x, tuple(groups)), (numbers, sliced, told))
    return x, list(caches), used if counts is None else [*used, counts.reshape(-1, counts.shape[-1])]


@functools.partial(jax.jit, static_argnames=("c", "target", "q_max", "kind"))
def run_layer(w: Layer, x, kv, at, *, batch: Batch, ropes, c: ModelConfig, target: Target, q_max: int, kind: tuple[int, int]):
    """One decoder layer on x [T, D]; at: its place in kv, and `of_layers` of it; kind: its page group, and which of ropes it uses (-1:
    none). An inner jit: equal layers trace once. Returns (x, kv, tokens of each slot for experts int32 [1, S], or None)."""
    (index, told), rope, used = at, kind[1], None
    with jax.named_scope("attention"):
        turns = ropes[rope :: len(c.ropes)] if rope >= 0 else (None, None)
        x, *read = entered(x, _attn_norm(w, c), c, target, w.qkv, w.peers)
        stream = shares_of(x.shape[0], q_max, target).stream
        attended, kv = _attention(w, (x, *read), kv, index, turns, batch, c, target, q_max, kind)
    if not c.parallel:
        x = add(x, norm(attended, w.attn_post_norm, None, c), c) if c.post_norm else attended
    with jax.named_scope("mlp"):
        own = _attn_norm(w, c) if c.shared_norm or not c.pre_norm else (w.mlp_norm, w.mlp_norm_bias)
        x, y, before = entered(x, own, c, target, w.gate_up, w.peers)
        if w.router is None:
            y, before = _gathered(y, before, (), stream, c, target)
            y = _mlp(y, before, w.gate_up, w.down, w, c, target, stream, x if _just_added(c) else None)
        else:
            y, used = _experts(y, before, w, batch, c, target, told, stream)
            y = add(x, y, c) if _just_added(c) else y
    if c.parallel:
        return add(x, attended + y, c), kv, used
    return add(x, norm(y, w.mlp_post_norm, None, c), c) if c.post_norm else y, kv, used


def _attn_norm(w: Layer, c: ModelConfig) -> Norm | None:
    return (w.attn_norm, w.attn_norm_bias) if c.pre_norm else None


def _just_added(c: ModelConfig) -> bool:
    """Whether what attention and mlp give is added to what they read, and nothing else is done with it."""
    return not (c.parallel or c.post_norm)


def _gathered(y: Any, before: Norm | None, over: tuple[str, ...], stream: tuple[str, ...], c: ModelConfig, target: Target):
    """What a block reads of a stream that is shared out: normed where it lies, then shared out over `over` only. Of another, as it is."""
    if not stream:
        return y, before
    y = y if before is None else norm(y, before[0], before[1], c)
    return gathered(y, stream, over, target), None


def _mlp(x: jax.Array, before: Norm | None, gate_up: Any, down: Any, w: Layer, c: ModelConfig, target: Target, stream, residual=None):
    """stream: over which axes rows are to be shared out."""
    y = linear(x, gate_up, c, target, bias=w.gate_up_bias, before=before, act=True, into=down if w.down_bias is None else None)
    return linear(y, down, c, target, bias=w.down_bias, residual=residual, shared=Shared("mlp", (), stream))


def _experts(x: jax.Array, before: Norm | None, w: Layer, batch: Batch, c: ModelConfig, target: Target, told: Any, stream):
    """What the experts of each token give, and those that all tokens share; and tokens of each slot [1, S]. stream: as in _mlp."""
    x, before = _gathered(x, before, (), stream, c, target)
    x = x if before is None else norm(x, before[0], before[1], c)
    told, shared = jax.tree.map(lambda x: x[0], told), None
    if w.shared_gate_up is not None:
        shared = linear(x, w.shared_gate_up, c, target, act=True, into=w.shared_down)
    if w.shared_router is not None:
        precision = jax.lax.Precision.HIGHEST
        gate = jnp.dot(x, w.shared_router, precision=precision, preferred_element_type=jnp.float32)
        shared = rows_times(shared, jax.nn.sigmoid(gate)[:, None])
    y, used = moe.experts(x, owned(batch), w, c, target, told, shared, stream)
    return y, used[None]


def owned(batch: Batch) -> jax.Array:
    """bool [T]: which rows belong to a sequence."""
    row = (jnp.arange(batch.tokens.shape[0]) if batch.ring == 1 else order_of(batch))[:, None]
    return ((row >= batch.q_start) & (row < batch.q_start + batch.q_len)).any(1)


def _attention(w: Layer, entry, kv, index, turns, batch: Batch, c: ModelConfig, target: Target, q_max: int, kind: tuple[int, int]):
    """Attention with its projections, the norm before them, and the addition of the stream where that is all that follows; ([T, D], kv).
    entry: what `entered` gave. turns: the rope table, and that of queries for the sinks."""
    x, y, before = entry
    group, rope = kind
    shares = shares_of(x.shape[0], q_max, target)
    y, before = _gathered(y, before, shares.projections, shares.stream, c, target)
    project = latent.project if c.kv_rank else _projected if _taken_apart_later(c, target, group) else _project
    q, k, v, rest = project(w, y, before, turns if c.sinks[group] else turns[:1], c, target)
    if c.qk_norm == "unit" and rope >= 0:
        q, k = unit_norm(q, c), unit_norm(k, c)
    if c.query_floor and rope < 0:
        q = (q * query_temperature(batch.positions, c)).astype(q.dtype)
    scale = c.head_dim**-0.5 if c.attn_scale is None else c.attn_scale
    how = dict(scale=scale, softcap=c.attn_softcap)
    asked: dict[str, Any] = how | dict(sinks=c.sinks[group], q_max=q_max, debug=target.debug, chip=target.chip)
    # In a context of one chunk no token sees another chunk: it is a window, which kernels have.
    page_size = jax.tree.leaves(kv)[0].shape[3]
    asked |= dict(value_dim=c.kv_rank or None, chunked=c.chunked and 0 < c.groups[group] < batch.tables[group].shape[1] * page_size)
    attend = functools.partial(paged_attention, **asked, impl=target.kernels)
    if target.mesh is not None:  # a kernel is not split by XLA: each device attends with its own kv heads
        attend = by_devices(attend, batch, c, target, shares, how)
    rows: dict[str, Any] = dict(page_table=batch.tables[group], q_start=batch.q_start, q_len=batch.q_len, kv_len=batch.kv_len)
    rows |= dict(layer=index, window=jnp.int32(c.groups[group]), **rest)
    rows |= {} if w.sink_logits is None else dict(sink_logits=w.sink_logits)
    if isinstance(kv, ScaledPages):
        y, *kv = attend(q, k, v, kv.pages, kv_scale=kv.scale, **rows)
        kv = ScaledPages(*kv)
    else:
        y, kv = attend(q, k, v, kv, **rows)
    y = latent.values(y, w, c) if c.kv_rank else y
    y = y.reshape(x.shape[0], -1)
    y = shared_out(y, shares.projections, target) if shares.projections else y
    how_rows = Shared("heads", shares.projections, shares.stream)
    return linear(y, w.o, c, target, bias=w.o_bias, residual=x if _just_added(c) else None, shared=how_rows), kv


def _project(w: Layer, y, before: Norm | None, turns, c: ModelConfig, target: Target) -> tuple[Any, Any, Any, dict[str, Any]]:
    """(q [T, heads, H], k and v [T, kv heads, H], and queries for the sinks where turns has their rope table too)."""
    heads, kv_heads, dim = c.num_heads, c.num_kv_heads, c.head_dim
    y = linear(y, w.qkv, c, target, bias=w.qkv_bias, before=before)
    y = y.reshape(y.shape[0], kv_heads, heads // kv_heads + 2, dim)
    q, k, v = y[:, :, :-2].reshape(y.shape[0], heads, dim), y[:, :, -2], y[:, :, -1]
    q, k = qk_norm(q, w.q_norm, c), rotate(qk_norm(k, w.k_norm, c), turns[0])
    return rotate(q, turns[0]), k, v, {"q_sinks": rotate(q, turns[1])} if turns[1:] else {}


def _projected(w: Layer, y, before: Norm | None, turns, c: ModelConfig, target: Target) -> tuple[Any, Any, Any, dict[str, Any]]:
    """The same for a GPU, whose attention takes queries, keys and values apart and rotates them itself."""
    y = linear(y, w.qkv, c, target, bias=w.qkv_bias, before=before)
    return y.reshape(y.shape[0], c.num_kv_heads, -1, c.head_dim), None, None, {"rope": turns[0]}


def _taken_apart_later(c: ModelConfig, target: Target, group: int) -> bool:
    return target.turned and target.mesh is None and not (c.qk_norm or c.query_floor or c.chunked or c.sinks[group])


def logits(params: Params, hidden: jax.Array, c: ModelConfig, target: Target) -> jax.Array:
    """float32 [N, V] of hidden states [N, D] (after the final norm)."""
    head = params.embed if params.lm_head is None else params.lm_head
    with jax.named_scope("head"):
        y = head_product(hidden, head, target)
        return softcap(y if c.logit_scale == 1 else y * c.logit_scale, c.logit_softcap)
