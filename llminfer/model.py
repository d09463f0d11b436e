"""The decoder: one function for every family, of weights, cache and batch. No module objects."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from llminfer.batch import Batch
from llminfer.cache import KVCache
from llminfer.config import ModelConfig
from llminfer.layers import rms_norm, rope_table, rotate
from llminfer.params import Layer, Params
from llminfer.quant import matmul
from llminfer.target import Target
from pallas_kernels.paged_attention import paged_attention
from sharding.rules import partition


def forward(params: Params, cache: KVCache, batch: Batch, c: ModelConfig, target: Target, q_max: int) -> tuple[jax.Array, KVCache]:
    """Hidden states after the final norm, [T, D], and the cache with the batch's keys and values in it.
    q_max: static bound of batch.q_len (1: decode)."""
    with jax.named_scope("embed"):
        x = params.embed[jnp.clip(batch.tokens, 0, c.vocab_size - 1)].astype(target.dtype)
    rope = rope_table(c, batch.positions)
    layer = functools.partial(run_layer, batch=batch, rope=rope, c=c, target=target, q_max=q_max)
    groups: list[Any] = list(cache.groups)
    if params.stacked:
        x, groups = _run_stacked(params.stacked, x, groups, layer, c)
    done = c.num_layers - len(params.listed)
    for number, weights in enumerate(params.listed, start=done):
        group = c.groups.index(c.window(number))
        place = c.group_layers(group).index(number)
        if params.stacked:
            x, groups[group] = layer(weights, x, groups[group], jnp.int32(place), group=group)
        else:  # listed cache: one array a layer
            x, own = layer(weights, x, groups[group][place], jnp.int32(0), group=group)
            groups[group] = (*groups[group][:place], own, *groups[group][place + 1 :])
    with jax.named_scope("final_norm"):
        return rms_norm(x, params.final_norm, c.norm_eps), KVCache(tuple(groups))


def _run_stacked(stacked: tuple[Layer, ...], x: jax.Array, groups: list[Any], layer: Any, c: ModelConfig):
    """The repeats of the window pattern under one scan. The caches ride in the carry, whole: a kernel picks its layer."""
    period = len(stacked)
    windows = [c.groups.index(c.window(place)) for place in range(period)]
    share = [windows.count(group) for group in range(len(groups))]  # layers of each group in one pattern

    def body(carry, xs):
        x, caches = carry
        repeat, weights = xs
        for place in range(period):
            group = windows[place]
            index = repeat * share[group] + windows[:place].count(group)
            x, own = layer(weights[place], x, caches[group], index, group=group)
            caches = (*caches[:group], own, *caches[group + 1 :])
        return (x, caches), None

    repeats = jax.tree.leaves(stacked)[0].shape[0]
    (x, caches), _ = jax.lax.scan(body, (x, tuple(groups)), (jnp.arange(repeats, dtype=jnp.int32), stacked))
    return x, list(caches)


@functools.partial(jax.jit, static_argnames=("c", "target", "q_max", "group"))
def run_layer(w: Layer, x, kv, index, *, batch: Batch, rope, c: ModelConfig, target: Target, q_max: int, group: int):
    """One decoder layer on x [T, D]; `index` is the layer's place in kv. An inner jit: equal layers trace once."""
    tokens, heads, kv_heads, dim = x.shape[0], c.num_heads, c.num_kv_heads, c.head_dim
    with jax.named_scope("attention"):
        y = matmul(rms_norm(x, w.attn_norm, c.norm_eps), w.qkv, target.platform)
        y = y.reshape(tokens, kv_heads, heads // kv_heads + 2, dim)
        q, k, v = y[:, :, :-2].reshape(tokens, heads, dim), y[:, :, -2], y[:, :, -1]
        attend = functools.partial(paged_attention, scale=dim**-0.5, q_max=q_max, impl=target.attention)
        if target.mesh is not None:  # a kernel is not split by XLA: each device attends with its own kv heads
            attend = _by_heads(attend, target.mesh)
        rows = dict(page_table=batch.tables[group], q_start=batch.q_start, q_len=batch.q_len, kv_len=batch.kv_len)
        y, kv = attend(rotate(q, rope), rotate(k, rope), v, kv, layer=index, window=jnp.int32(c.groups[group]), **rows)
        x = x + matmul(y.reshape(tokens, heads * dim), w.o, target.platform)
    with jax.named_scope("mlp"):
        y = matmul(rms_norm(x, w.mlp_norm, c.norm_eps), w.gate_up, target.platform)
        gate, up = jnp.split(y, 2, axis=-1)
        x = x + matmul(jax.nn.silu(gate.astype(jnp.float32)).astype(x.dtype) * up, w.down, target.platform)
    return x, kv


def _by_heads(attend: Any, mesh: jax.sharding.Mesh) -> Any:
    """paged_attention with heads and cache split over the mesh axis of kv heads, all else on every device."""
    new, cache = partition((None, "kv_heads", None)), partition((None, None, "kv_heads", None, None))

    def split(q, k, v, kv, **rows):
        each = jax.tree.map(lambda _: partition(()), rows)
        body = lambda q, k, v, kv, rows: attend(q, k, v, kv, **rows)
        return jax.shard_map(body, mesh=mesh, in_specs=(new, new, new, cache, each), out_specs=(new, cache), check_vma=False)(
            q, k, v, kv, rows
        )

    return split


def logits(params: Params, hidden: jax.Array, c: ModelConfig) -> jax.Array:
    """float32 [N, V] of hidden states [N, D] (after the final norm)."""
    head = params.embed if c.tie_embeddings else params.lm_head
    precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
    with jax.named_scope("head"):
        return jax.lax.dot_general(hidden, head, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
