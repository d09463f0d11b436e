"""The programs that run on the device: a mixed step, a decode loop, and the logits (or what they say of given tokens) of a prompt chunk.

Each is a pure function of (weights, cache, history, batch) with static shapes; the cache and the history are donated.
history [slots, context] int32 holds the tokens of each slot by position: what a step works on and what it draws. So a next step is
sent before this one is read, and penalties know the tokens before. What a prefix hit skips is written by `write_history`.

plain: for sequences that want the likeliest tokens and nothing else, a program without a branch: such as a GPU's host need not wait for.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp

from llminfer import model, stages
from llminfer.batch import Batch, Loop
from llminfer.cache import KVCache
from llminfer.config import ModelConfig
from llminfer.params import Params
from llminfer.request import MAX_LOGPROBS
from llminfer.sampler import draw, greedy, top_logprobs
from llminfer.spread import in_ring_order, places_of, shared_out
from llminfer.target import Target

# What the programs return where no token was drawn, and where a row's logits were not numbers.
NOTHING, NOT_A_NUMBER = -1, -2


def mixed_step(
    params: Params,
    cache: KVCache,
    history: jax.Array,
    batch: Batch,
    *,
    c: ModelConfig,
    target: Target,
    plain: bool = False,
    ring: bool = False,
):
    """Chunks of prompts and single decode tokens together. Returns ((tokens int32 [R], what `sampler.draw` tells of them), cache,
    history). ring: there is one chunk, the first of its prompt; see spread.py."""
    rows, slots = batch.q_start.shape[0], history.shape[0]
    batch, history = _fill(batch, history)
    ends = jnp.clip(batch.q_start + batch.q_len - 1, 0, batch.tokens.shape[0] - 1)
    hidden, cache = _forward(params, cache, in_ring_order(batch, target) if ring else batch, c, target, ends)
    drew = batch.draws > 0
    # The chunks of a long prompt before the last draw nothing: no need to read the output head.
    nothing = (jnp.full(rows, NOTHING, jnp.int32), _said((rows,)))
    drawn = lambda: _draw(params, hidden, batch, history, c, target, plain)
    tokens, said = drawn() if plain else jax.lax.cond(drew.any(), drawn, lambda: nothing)
    tokens = jnp.where(drew, tokens, NOTHING)
    history = history.at[jnp.where(drew, batch.slots, slots), batch.kv_len].set(tokens, mode="drop")
    return (tokens, said), cache, history


def decode_loop(
    params: Params,
    cache: KVCache,
    history: jax.Array,
    batch: Batch,
    loop: Loop,
    *,
    c: ModelConfig,
    target: Target,
    most: int,
    plain: bool = False,
):
    """Up to loop.steps (at most `most`; plain: just `most`) decode steps of one token a sequence, sampling and stopping on the device.
    Returns ((tokens int32 [R, most], what `sampler.draw` tells of them [R, most, ...]), cache, history): NOTHING after a sequence's end."""
    rows, slots = batch.q_start.shape[0], history.shape[0]
    batch, history = _fill(batch, history)

    def step(carry):
        i, live, tokens, length, cache, history, out = carry
        now = replace(
            batch,
            tokens=tokens,
            positions=jnp.maximum(length - 1, 0),
            reach=jnp.maximum(batch.reach, length),
            q_len=live.astype(jnp.int32),
            kv_len=length,
        )
        hidden, cache = model.forward(params, cache, now, c, target, q_max=1)
        drawn, said = _draw(params, hidden, now, history, c, target, plain)
        history = history.at[jnp.where(live, batch.slots, slots), length].set(drawn, mode="drop")
        out = jax.tree.map(lambda whole, x: whole.at[:, i].set(x), out, (jnp.where(live, drawn, NOTHING), said))
        stop = (drawn[:, None] == batch.sampling.ends).any(1) | (drawn < 0) | (i + 1 >= loop.limit)
        tokens = jnp.where(live, drawn, tokens)
        return i + 1, live & ~stop, tokens, length + live, cache, history, out

    def more(carry):
        i, live = carry[:2]
        whole = jnp.all(live == started)
        return (i < loop.steps) & live.any() & (whole | (loop.eager == 0))

    started = batch.q_len > 0
    out = (jnp.full((rows, most), NOTHING, jnp.int32), _said((rows, most)))
    start = (jnp.int32(0), started, batch.tokens, batch.kv_len, cache, history, out)
    looped = jax.lax.fori_loop(0, most, lambda _, carry: step(carry), start) if plain else jax.lax.while_loop(more, step, start)
    _, live, _, length, cache, history, out = looped
    return out, cache, _ended(history, started & ~live, length, batch, loop.limit)


def pipelined_decode_loop(
    params: Params,
    cache: KVCache,
    history: jax.Array,
    batch: Batch,
    loop: Loop,
    *,
    c: ModelConfig,
    target: Target,
    most: int,
    plain: bool = False,
):
    """decode_loop with the layers in stages: the sequences go through them in as many pieces as there are stages, and what a piece draws
    enters the first stage again while the others are on their way, so that all stages are busy from the first step to the last. When it
    is left early, those on their way come out first: a sequence may then have drawn one token more than another."""
    rows, slots = batch.q_start.shape[0], history.shape[0]
    schedule = stages.decode_schedule(rows, target)
    batch, history = _fill(batch, history)
    batch = stages.deal(batch, schedule)
    padded = batch.q_start.shape[0]
    limit = jnp.pad(loop.limit, (0, padded - rows))
    take, put = (functools.partial(f, schedule=schedule) for f in (stages.take, stages.put))

    def tick(carry):
        now, end, live, tokens, length, cache, history, out, moving = carry
        current = replace(batch, tokens=tokens, q_len=live.astype(jnp.int32), kv_len=length)
        hidden, cache, moving = stages.tick(params, cache, current, moving, now, end, c, target, schedule)
        piece, at, step, busy = stages.in_stage(current, target.stages - 1, now, end, schedule)
        there, step = piece.q_len > 0, jnp.clip(step, 0, most - 1)
        draw = lambda: _draw(params, hidden, piece, history, c, target, plain)
        nothing = lambda: (jnp.full(there.shape, NOTHING, jnp.int32), _said(there.shape))
        drawn, said = draw() if plain else jax.lax.cond(busy, draw, nothing)
        history = history.at[jnp.where(there, piece.slots, slots), piece.kv_len].set(drawn, mode="drop")
        found = (jnp.where(there, drawn, NOTHING), said)
        write = lambda own, x: own.at[:, step].set(jnp.where(busy, x, own[:, step]))
        out = jax.tree.map(lambda whole, x: put(whole, write(take(whole, at), x), at), out, found)
        stop = (drawn[:, None] == piece.sampling.ends).any(1) | (drawn < 0) | (step + 1 >= take(limit, at))
        tokens = put(tokens, jnp.where(there, drawn, piece.tokens), at)
        length = put(length, piece.kv_len + there, at)
        live = put(live, take(live, at) & ~(there & stop), at)
        end = jnp.where((loop.eager != 0) & jnp.any(live != started), jnp.minimum(end, now + 1), end)
        return now + 1, end, live, tokens, length, cache, history, out, moving

    def more(carry):
        now, end, live = carry[:3]
        return (now < end + target.stages - 1) & live.any()

    started = batch.q_len > 0
    out = (jnp.full((padded, most), NOTHING, jnp.int32), _said((padded, most)))
    moving = stages.still(params, batch, schedule, target)
    end = (jnp.int32(most) if plain else loop.steps) * schedule.period - schedule.period + schedule.pieces
    start = (jnp.int32(0), end, started, batch.tokens, batch.kv_len, cache, history, out, moving)
    ticks = schedule.ticks(most)
    looped = jax.lax.fori_loop(0, ticks, lambda _, carry: tick(carry), start) if plain else jax.lax.while_loop(more, tick, start)
    _, _, live, _, length, cache, history, out, _ = looped
    history = _ended(history, started & ~live, length, batch, limit)
    return jax.tree.map(lambda x: x[:rows], out), cache, history


def _ended(history: jax.Array, ended: jax.Array, length: jax.Array, batch: Batch, limit: jax.Array) -> jax.Array:
    """Where a sequence stopped before its limit, its last position says so to the next step."""
    early = ended & (length < batch.kv_len + limit)
    return history.at[jnp.where(early, batch.slots, history.shape[0]), batch.kv_len + limit - 1].set(NOTHING, mode="drop")


def prompt_logits(params: Params, cache: KVCache, history: jax.Array, batch: Batch, *, c: ModelConfig, target: Target):
    """The logits of every row of one chunk, float32 [T, V]; (logits, cache, history)."""
    hidden, cache = _forward(params, cache, batch, c, target)
    return model.logits(params, hidden, c, target), cache, history


def token_logprobs(params, cache, history, batch: Batch, tokens: jax.Array, most: jax.Array, *, c: ModelConfig, target: Target):
    """What every row of one chunk says of the token given for it, tokens int32 [T]. Returns ((its log-probability float32 [T],
    whether no other has a larger logit bool [T], `top_logprobs`, zeros where `most` is 0), cache, history): the logits stay on
    the device."""
    logits, cache, history = prompt_logits(params, cache, history, batch, c=c, target=target)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    said = jax.lax.cond(most > 0, lambda: top_logprobs(logits, tokens, target), lambda: _said(tokens.shape))
    return (chosen - jax.nn.logsumexp(logits, axis=1), chosen >= logits.max(axis=1), said), cache, history


def write_history(history: jax.Array, tokens: jax.Array, slot: jax.Array, start: jax.Array, count: jax.Array) -> jax.Array:
    """Puts the first `count` of tokens [T] into the history of a slot, from position `start`."""
    at = jnp.arange(tokens.shape[0])
    return history.at[slot, jnp.where(at < count, start + at, history.shape[1])].set(tokens, mode="drop")


def _forward(params: Params, cache: KVCache, batch: Batch, c: ModelConfig, target: Target, rows: jax.Array | None = None):
    """Hidden states of a ragged batch's rows, of `rows` if given, and the cache."""
    if target.stages > 1:
        return stages.forward(params, cache, batch, c, target, rows)
    hidden, cache = model.forward(params, cache, batch, c, target, q_max=batch.tokens.shape[0])
    if rows is not None:
        return hidden[rows if batch.ring == 1 else jnp.asarray(places_of(batch))[rows]], cache
    return (shared_out(hidden, (), target) if target.mesh is not None else hidden), cache


def _fill(batch: Batch, history: jax.Array) -> tuple[Batch, jax.Array]:
    """Takes the tokens of negative ids from the history, and puts all the others into it. A sequence that goes on from the history and
    has ended there is left out: the host did not know."""
    row = jnp.arange(batch.tokens.shape[0])
    mine = (row >= batch.q_start[:, None]) & (row < (batch.q_start + batch.q_len)[:, None])
    slots = jnp.min(jnp.where(mine, batch.slots[:, None], history.shape[0]), axis=0)  # rows of nobody: beside the history
    tokens = jnp.where(batch.tokens < 0, history[slots, batch.positions], batch.tokens)
    first = tokens[batch.q_start]
    ended = (batch.tokens[batch.q_start] < 0) & ((first < 0) | (first[:, None] == batch.sampling.ends).any(1))
    at = jnp.where((mine & ended[:, None]).any(0), history.shape[0], slots)
    batch = replace(batch, tokens=tokens, q_len=jnp.where(ended, 0, batch.q_len), draws=jnp.where(ended, 0, batch.draws))
    return batch, history.at[at, batch.positions].set(tokens, mode="drop")


def _said(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """What `top_logprobs` gives where nobody asks."""
    return jnp.zeros((*shape, 1 + MAX_LOGPROBS), jnp.int32), jnp.zeros((*shape, 1 + MAX_LOGPROBS), jnp.float32)


def _draw(params: Params, hidden: jax.Array, batch: Batch, history: jax.Array, c: ModelConfig, target: Target, plain: bool):
    # The drawn token's position is the context length: the same noise whatever the batch, also after a preemption.
    sampling = replace(batch.sampling, position=batch.kv_len)
    logits = model.logits(params, hidden, c, target)
    if plain:
        tokens, said = greedy(logits), _said((logits.shape[0],))
    else:
        tokens, said = draw(logits, sampling, history, batch.slots, target)
    return jnp.where(tokens < 0, NOT_A_NUMBER, tokens), said
