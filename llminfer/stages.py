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
from llminfer.batch import Batch
from llminfer.cache import KVCache
from llminfer.config import ModelConfig
from llminfer.params import Params
from llminfer.scheduler import Plan
from llminfer.target import Target
from sharding import pipeline
from sharding.pipeline import Schedule

# Rows for whose products a chip takes as long as for reading the weights, about; of a CPU with small caches.
LEAST_ROWS = {"tpu": 128, "gpu": 128, "cpu": 8}


def rows_of_piece(tokens: int, target: Target) -> int:
    """How many rows of a step of so many tokens go through the stages together."""
    return pipeline.piece_rows(tokens, target.stages, LEAST_ROWS[target.platform])


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
    live = [sum(len(tokens) > step for tokens in drawn) for step in range(max(map(len, drawn), default=0))]
    return sum(min(n, schedule.pieces) for n in live), schedule.ticks(max(1, len(live)))


def forward(params: Params, cache: KVCache, batch: Batch, c: ModelConfig, target: Target, wanted: Any = None) -> tuple[jax.Array, KVCache]:
    """As model.forward: hidden states after the final norm of rows `wanted` [N], None for all of them, and the cache."""
    tokens = batch.tokens.shape[0]
    size = rows_of_piece(tokens, target)
    pieces = -(-tokens // size)
    x, around = listed(params, model.embed(params, batch, c, target), cache.around, batch, c, target, tokens, leading=True)
    pad = lambda a: jnp.pad(a, ((0, pieces * size - tokens), *[(0, 0)] * (a.ndim - 1)))
    rows = replace(batch, tokens=pad(batch.tokens), positions=pad(batch.positions), reach=pad(batch.reach), sampling=None)
    used = -(-jnp.max(batch.q_start + batch.q_len) // size) if target.branches else pieces
    after = len(params.listed) > params.leading
    work = functools.partial(_work, c=c, target=target, size=size)
    xs = pad(x).reshape(pieces, size, -1)
    every = jnp.arange(tokens) if after or wanted is None else wanted
    x, groups = pipeline.run(work, params.stacked, cache.groups, xs, used, every, rows, mesh=target.mesh)
    if after:
        x, around = listed(params, x, around, batch, c, target, tokens, leading=False)
        x = x if wanted is None else x[wanted]
    return model.final_norm(params, x, c, target), KVCache(groups, around)


def _work(weights, groups, x, at, busy, batch: Batch, *, c: ModelConfig, target: Target, size: int):
    """One piece of a ragged batch in one stage; see pipeline.run."""
    piece = piece_of(batch, at, size)
    return stage(weights, groups, x, replace(piece, q_len=jnp.where(busy, piece.q_len, 0)), c, target, size)


def piece_of(batch: Batch, at: jax.Array, size: int) -> Batch:
    """Rows at * size .. of a batch, of all its sequences: a sequence ends where the piece does."""
    first = at * size
    cut = lambda x: lax.dynamic_slice_in_dim(x, first, size)
    start, end = (jnp.clip(x - first, 0, size) for x in (batch.q_start, batch.q_start + batch.q_len))
    behind = jnp.clip(batch.q_start + batch.q_len - first - size, 0, batch.q_len)
    rows = dict(tokens=cut(batch.tokens), positions=cut(batch.positions), reach=cut(batch.reach))
    return replace(batch, **rows, q_start=jnp.where(end > start, start, 0), q_len=end - start, kv_len=batch.kv_len - behind)


def stage(weights: Any, groups: Any, x: jax.Array, batch: Batch, c: ModelConfig, target: Target, q_max: int) -> tuple[jax.Array, Any]:
    """The layers of one stage, on its own part of stacked weights and cache."""
    inside = replace(target, in_stage=True)
    how: dict[str, Any] = dict(batch=batch, ropes=model.ropes_of(batch, c), c=c, target=inside, q_max=q_max)
    x, groups = model.run_stacked(weights, x, list(groups), functools.partial(model.run_layer, **how), c, alone=True)
    return x, tuple(groups)


def listed(params: Params, x, around: tuple[Any, ...], batch: Batch, c: ModelConfig, target: Target, q_max: int, *, leading: bool):
    """The layers before (leading), or after, those of the stages, on the devices of all stages: (x [T, D], their caches)."""
    first, last = (0, params.leading) if leading else (params.leading, len(params.listed))
    if first == last:
        return x, around
    caches, numbers = list(around), [number for number in range(c.num_layers) if number not in c.scanned]
    how: dict[str, Any] = dict(batch=batch, ropes=model.ropes_of(batch, c), c=c, target=target, q_max=q_max)
    for at in range(first, last):
        kind = (c.groups.index(c.window(numbers[at])), c.rope(numbers[at]))
        x, caches[at] = model.run_layer(params.listed[at], x, caches[at], jnp.int32(0), kind=kind, **how)
    return x, tuple(caches)
