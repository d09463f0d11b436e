"""The decoder in stages: its stacked layers as a pipeline over the mesh axis pp, the layers around them on the devices of all stages.

A step's rows are cut into pieces that follow each other: those of a chunk in order, so that a piece finds the keys of the one before.
Embedding, final norm and head are computed by the devices of all stages together; a stage gets its rows of the batch from the whole one.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from llminfer import model
from llminfer.balance import Routing, added, of_layers
from llminfer.batch import Batch
from llminfer.cache import KVCache
from llminfer.config import ModelConfig
from llminfer.params import Params
from llminfer.scheduler import Plan
from llminfer.spread import deal as deal_pages
from llminfer.spread import shared_out, shares_of, sharing_step
from llminfer.target import Target
from sharding import pipeline
from sharding.pipeline import Schedule

# Rows for whose products a chip takes as long as for reading the weights, about; of a CPU with small caches.
LEAST_ROWS = {"tpu": 128, "gpu": 128, "cpu": 8}


def rows_of_piece(tokens: int, target: Target) -> int:
    """How many rows of a step of so many tokens go through the stages together."""
    least = LEAST_ROWS[target.platform]
    return pipeline.piece_rows(tokens, target.stages, least, sharing_step(least, target))


def decode_schedule(rows: int, target: Target) -> Schedule:
    """How the sequences of a decode loop go through the stages: as many pieces as there are stages keep all of them busy."""
    size = -(-rows // min(rows, target.stages))
    return Schedule(target.stages, -(-rows // size))


def occupied(plan: Plan, drawn: list[list[int]], tokens: int, target: Target) -> tuple[int, int]:
    """What one step was for one stage: (ticks in which it had rows of somebody, all ticks). tokens: of the program."""
    if not plan.steps:
        pieces = -(-sum(item.count for item in plan.items) // rows_of_piece(tokens, target))
        return pieces, Schedule(target.stages, pieces).ticks()
    schedule = decode_schedule(tokens, target)
    steps = max(1, *map(len, drawn))
    live = [{row % schedule.pieces for row, found in enumerate(drawn) if len(found) > step} for step in range(steps)]
    return sum(map(len, live)), schedule.ticks(steps)


def forward(params: Params, cache: KVCache, batch: Batch, c: ModelConfig, target: Target, wanted: Any = None) -> tuple[jax.Array, KVCache]:
    """As model.forward: hidden states after the final norm of rows `wanted` [N], None for all of them, and the cache."""
    tokens = batch.tokens.shape[0]
    size = rows_of_piece(tokens, target)
    pieces = -(-tokens // size)
    x, cache, used = listed(params, model.embed(params, batch, c, target), cache, [], batch, c, target, tokens, leading=True)
    pad = lambda a: jnp.pad(a, ((0, pieces * size - tokens), *[(0, 0)] * (a.ndim - 1)))
    rows = replace(batch, tokens=pad(batch.tokens), positions=pad(batch.positions), reach=pad(batch.reach), sampling=None)
    live = -(-jnp.max(batch.q_start + batch.q_len) // size) if target.branches else pieces
    after = len(params.listed) > params.leading
    work = functools.partial(_work, c=c, target=target, size=size)
    xs = pad(x).reshape(pieces, size, -1)
    every = jnp.arange(tokens) if after or wanted is None else wanted
    weights, state = _of_stages(params, cache, c)
    x, (groups, counts) = pipeline.run(work, weights, state, xs, live, every, rows, mesh=target.mesh)
    cache, used = replace(cache, groups=groups), used if counts is None else [*used, counts]
    if after:
        x, cache, used = listed(params, x, cache, used, batch, c, target, tokens, leading=False)
        x = x if wanted is None else x[wanted]
    return model.final_norm(params, x, c, target), _counted(cache, used)


def _of_stages(params: Params, cache: KVCache, c: ModelConfig) -> tuple[Any, Any]:
    """(weights, state) of the pipeline, by layer: with the weights what programs are told of experts, with the caches how many tokens come
    to each slot for experts, from 0 on; None in a model without."""
    first, last = (sum(c.has_experts(layer) for layer in range(end)) for end in (c.scanned.start, c.scanned.stop))
    counts = jnp.zeros((last - first, cache.routing.counts.shape[-1]), jnp.int32) if cache.routing and last > first else None
    return (params.stacked, of_layers(cache.routing, first, last - first)), (cache.groups, counts)


def _counted(cache: KVCache, used: list[jax.Array]) -> KVCache:
    return replace(cache, routing=cache.routing and replace(cache.routing, counts=added(cache.routing.counts, used)))


def _work(weights, state, x, at, busy, batch: Batch, *, c: ModelConfig, target: Target, size: int):
    """One piece of a ragged batch in one stage; see pipeline.run."""
    piece = piece_of(batch, at, size)
    return stage(weights, state, x, replace(piece, q_len=jnp.where(busy, piece.q_len, 0)), c, target, size)


def piece_of(batch: Batch, at: jax.Array, size: int) -> Batch:
    """Rows at * size .. of a batch, of all its sequences: a sequence ends where the piece does."""
    first = at * size
    cut = lambda x: lax.dynamic_slice_in_dim(x, first, size)
    start, end = (jnp.clip(x - first, 0, size) for x in (batch.q_start, batch.q_start + batch.q_len))
    behind = jnp.clip(batch.q_start + batch.q_len - first - size, 0, batch.q_len)
    rows = dict(tokens=cut(batch.tokens), positions=cut(batch.positions), reach=cut(batch.reach))
    return replace(batch, **rows, q_start=jnp.where(end > start, start, 0), q_len=end - start, kv_len=batch.kv_len - behind)


def stage(weights: Any, state: Any, x: jax.Array, batch: Batch, c: ModelConfig, target: Target, q_max: int) -> tuple[jax.Array, Any]:
    """The layers of one stage, on its own part of what `_of_stages` gives."""
    (stacked, told), (groups, counts) = weights, state
    routing = None if told is None else Routing(told[1][None], told[0])
    inside = replace(target, in_stage=True)
    batch = replace(batch, tables=deal_pages(batch, KVCache(groups), c, inside))
    how: dict[str, Any] = dict(batch=batch, ropes=model.ropes_of(batch, c), c=c, target=inside, q_max=q_max)
    layer = functools.partial(model.run_layer, **how)
    stream = shares_of(x.shape[0], q_max, inside).stream
    x = shared_out(x, stream, inside) if stream else x
    x, groups, used = model.run_stacked(stacked, x, list(groups), layer, c, routing, [], alone=True)
    x = shared_out(x, (), inside) if stream else x
    return x, (tuple(groups), counts + used[0] if used else counts)


def listed(params: Params, x, cache: KVCache, used: list[Any], batch: Batch, c: ModelConfig, target: Target, q_max: int, *, leading: bool):
    """The layers before (leading), or after, those of the stages, on the devices of all stages: (x [T, D], the cache, used). used: tokens
    of each slot for experts, of the layers so far."""
    first, last = (0, params.leading) if leading else (params.leading, len(params.listed))
    if first == last:
        return x, cache, used
    around, batch = cache.around, replace(batch, tables=deal_pages(batch, cache, c, target))
    caches, numbers = list(around), [number for number in range(c.num_layers) if number not in c.scanned]
    how: dict[str, Any] = dict(batch=batch, ropes=model.ropes_of(batch, c), c=c, target=target, q_max=q_max)
    for at in range(first, last):
        kind = (c.groups.index(c.window(numbers[at])), c.rope(numbers[at]))
        place = (jnp.int32(0), of_layers(cache.routing, sum(map(len, used)), 1))
        x, caches[at], counted = model.run_layer(params.listed[at], x, caches[at], place, kind=kind, **how)
        used = used if counted is None else [*used, counted]
    x = shared_out(x, (), target) if shares_of(x.shape[0], q_max, target).stream else x
    return x, replace(cache, around=tuple(caches)), used


# A decode loop: piece m of M has rows m, m + M, ... of the batch, so that few sequences are in as many pieces as there can be.


def deal(batch: Batch, schedule: Schedule) -> Batch:
    """A batch of one token a sequence with as many rows as its pieces have; those behind it belong to nobody."""
    rows = batch.q_start.shape[0]
    extra = -rows % schedule.pieces
    # Copies of the last row, so that nobody seems to ask for what nobody asked for.
    padded = jax.tree.map(lambda x: jnp.pad(x, ((0, extra), *[(0, 0)] * (x.ndim - 1)), mode="edge"), batch)
    return replace(padded, q_len=jnp.where(jnp.arange(rows + extra) < rows, padded.q_len, 0))


def still(params: Params, batch: Batch, schedule: Schedule, target: Target) -> jax.Array:
    """What moves between the stages before the first tick of a loop."""
    x = jax.ShapeDtypeStruct((batch.q_start.shape[0] // schedule.pieces, params.embed.shape[1]), target.dtype)
    return pipeline.still(x, target.mesh)


def take(x: jax.Array, at: jax.Array, schedule: Schedule) -> jax.Array:
    """The rows of x [rows, ...] that are in piece `at`."""
    return lax.dynamic_index_in_dim(x.reshape(-1, schedule.pieces, *x.shape[1:]), at, 1, keepdims=False)


def put(x: jax.Array, y: jax.Array, at: jax.Array, schedule: Schedule) -> jax.Array:
    """x with the rows y in the place of those of piece `at`."""
    return lax.dynamic_update_index_in_dim(x.reshape(-1, schedule.pieces, *x.shape[1:]), y, at, 1).reshape(x.shape)


def in_stage(batch: Batch, stage: Any, tick: Any, end: Any, schedule: Schedule) -> tuple[Batch, Any, Any, Any]:
    """What a stage has in a tick: (a piece's rows of the dealt batch, the piece's number, its step, whether it is there). end: entries
    from that number on are not made. The lengths of a piece's sequences change only when it leaves the last stage, so all see the same."""
    number, at, step = schedule.at(stage, tick)
    busy, at = (number >= 0) & (number < end) & (at < schedule.pieces), jnp.minimum(at, schedule.pieces - 1)
    own = jax.tree.map(lambda x: take(x, at, schedule), batch)
    q_len = jnp.where(busy, own.q_len, 0)
    positions, reach = jnp.maximum(own.kv_len - 1, 0), jnp.maximum(own.reach, own.kv_len)
    rows = jnp.arange(q_len.shape[0], dtype=jnp.int32)
    return replace(own, q_start=rows, q_len=q_len, positions=positions, reach=reach), at, step, busy


def tick(params: Params, cache: KVCache, batch: Batch, moving, now, end, c: ModelConfig, target: Target, schedule: Schedule):
    """One tick of a decode loop on a dealt batch. Returns (hidden states of the piece that leaves, after the final norm; the cache; what
    moves between the stages)."""
    entering, *_ = in_stage(batch, 0, now, end, schedule)
    x, cache, used = listed(params, model.embed(params, entering, c, target), cache, [], entering, c, target, 1, leading=True)
    weights, state = _of_stages(params, cache, c)
    work = functools.partial(_decode_work, c=c, target=target, schedule=schedule)
    own = replace(batch, sampling=None)
    x, moving, (groups, counts) = pipeline.tick(work, weights, state, x, moving, now, end, own, mesh=target.mesh)
    cache, used = replace(cache, groups=groups), used if counts is None else [*used, counts]
    leaving, *_ = in_stage(batch, target.stages - 1, now, end, schedule)
    x, cache, used = listed(params, x, cache, used, leaving, c, target, 1, leading=False)
    return model.final_norm(params, x, c, target), _counted(cache, used), moving


def _decode_work(weights, state, x, number, now, end, batch: Batch, *, c: ModelConfig, target: Target, schedule: Schedule):
    """One tick of stage `number`; see pipeline.tick."""
    piece, *_ = in_stage(batch, number, now, end, schedule)
    return stage(weights, state, x, piece, c, target, 1)
