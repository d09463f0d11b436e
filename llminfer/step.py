"""The programs that run on the device: a mixed step, a decode loop, and the logits (or what they say of given tokens) of a prompt chunk.

Each is a pure function of (weights, cache, last tokens, batch) with static shapes; the cache and `last` are donated.
last [slots] int32 holds the token that each slot drew last, so that a next step can be sent before this one is read.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from llminfer import model
from llminfer.batch import Batch, Loop
from llminfer.cache import KVCache
from llminfer.config import ModelConfig
from llminfer.params import Params
from llminfer.sampler import sample
from llminfer.target import Target

# What the programs return where no token was drawn, and where a row's logits were not numbers.
NOTHING, NOT_A_NUMBER = -1, -2


def mixed_step(params: Params, cache: KVCache, last: jax.Array, batch: Batch, *, c: ModelConfig, target: Target):
    """Chunks of prompts and single decode tokens together. Returns (tokens int32 [R], cache, last)."""
    rows = batch.q_start.shape[0]
    batch = _fill(batch, last)
    hidden, cache = model.forward(params, cache, batch, c, target, q_max=batch.tokens.shape[0])
    ends = jnp.clip(batch.q_start + batch.q_len - 1, 0, hidden.shape[0] - 1)
    drew = batch.draws > 0
    # The chunks of a long prompt before the last draw nothing: no need to read the output head.
    nothing = jnp.full(rows, NOTHING, jnp.int32)
    tokens = jax.lax.cond(drew.any(), lambda: jnp.where(drew, _draw(params, hidden[ends], batch, c), NOTHING), lambda: nothing)
    slots = jnp.where(drew, batch.slots, last.shape[0])
    return tokens, cache, last.at[slots].set(tokens, mode="drop")


def decode_loop(params: Params, cache: KVCache, last: jax.Array, batch: Batch, loop: Loop, *, c: ModelConfig, target: Target, most: int):
    """Up to loop.steps (at most `most`) decode steps of one token a sequence, sampling and stopping on the device.
    Returns (tokens int32 [R, most], cache, last): NOTHING after a sequence's end."""
    rows = batch.q_start.shape[0]
    batch = _fill(batch, last)

    def step(carry):
        i, live, tokens, length, cache, out = carry
        now = replace(
            batch,
            tokens=tokens,
            positions=jnp.maximum(length - 1, 0),
            reach=jnp.maximum(batch.reach, length),
            q_len=live.astype(jnp.int32),
            kv_len=length,
        )
        hidden, cache = model.forward(params, cache, now, c, target, q_max=1)
        drawn = _draw(params, hidden, now, c)
        out = out.at[:, i].set(jnp.where(live, drawn, NOTHING))
        stop = (drawn[:, None] == loop.stops).any(1) | (drawn < 0) | (i + 1 >= loop.limit)
        tokens = jnp.where(live, drawn, tokens)
        return i + 1, live & ~stop, tokens, length + live, cache, out

    def more(carry):
        i, live = carry[:2]
        whole = jnp.all(live == started)
        return (i < loop.steps) & live.any() & (whole | (loop.eager == 0))

    started = batch.q_len > 0
    out = jnp.full((rows, most), NOTHING, jnp.int32)
    start = (jnp.int32(0), started, batch.tokens, batch.kv_len, cache, out)
    _, _, tokens, _, cache, out = jax.lax.while_loop(more, step, start)
    slots = jnp.where(started, batch.slots, last.shape[0])
    return out, cache, last.at[slots].set(tokens, mode="drop")


def prompt_logits(params: Params, cache: KVCache, last: jax.Array, batch: Batch, *, c: ModelConfig, target: Target):
    """The logits of every row of one chunk, float32 [T, V]; (logits, cache, last)."""
    hidden, cache = model.forward(params, cache, batch, c, target, q_max=batch.tokens.shape[0])
    return model.logits(params, hidden, c), cache, last


def token_logprobs(params: Params, cache: KVCache, last: jax.Array, batch: Batch, tokens: jax.Array, *, c: ModelConfig, target: Target):
    """What every row of one chunk says of the token given for it, tokens int32 [T]. Returns ((its log-probability float32 [T],
    whether no other has a larger logit bool [T]), cache, last): the logits stay on the device."""
    logits, cache, last = prompt_logits(params, cache, last, batch, c=c, target=target)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return (chosen - jax.nn.logsumexp(logits, axis=1), chosen >= logits.max(axis=1)), cache, last


def _fill(batch: Batch, last: jax.Array) -> Batch:
    """Puts the token drawn last in place of negative ids: those rows are the first (and only) of their sequence."""
    rows = batch.tokens.shape[0]
    drawn = jnp.zeros(rows, jnp.int32).at[jnp.where(batch.q_len > 0, batch.q_start, rows)].set(last[batch.slots], mode="drop")
    return replace(batch, tokens=jnp.where(batch.tokens < 0, drawn, batch.tokens))


def _draw(params: Params, hidden: jax.Array, batch: Batch, c: ModelConfig) -> jax.Array:
    # The drawn token's position is the context length: the same noise whatever the batch, also after a preemption.
    tokens = sample(model.logits(params, hidden, c), replace(batch.sampling, position=batch.kv_len))
    return jnp.where(tokens < 0, NOT_A_NUMBER, tokens)
