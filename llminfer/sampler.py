"""Sampling on the device: pure functions under jit, one program for every combination of parameters.

A token is drawn by the Gumbel-max rule: argmax over the kept ids v of logit[v] / temperature + G[v], G[v] standard Gumbel
noise, which draws v with exactly its probability and needs neither a sum nor a sort. G[v] is a hash of (request key, position,
v) alone, so a token depends neither on the other rows, their order, the padding of the vocabulary, nor the sharding.

Top-k, top-p and min-p each keep the ids of logit >= some bound, ties included. The bound is found exactly, without a sort, by 32
halvings of the range of float32 numbers in their order as integers; each is one fused masked sum over the row.

Before that `adjust` applies what was asked of the logits themselves: logit_bias, penalties and min_tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llminfer.request import MAX_LOGPROBS
from llminfer.target import Target

_MAX = np.finfo(np.float32).max
_TINY = np.finfo(np.float32).tiny
_BLOCK = 256  # positions of a history that are counted at a time


@flax.struct.dataclass
class SamplingBatch:
    """How to draw the next token of each of R rows; all arrays, so no value is part of the program."""

    temperature: Any  # [R] float32; 0: greedy, and the row's other fields are not read
    top_k: Any  # [R] int32; keep the k most likely ids (and ties with the last); 0: off
    top_p: Any  # [R] float32; keep the fewest most likely ids (and ties) of mass >= top_p among those of top_k; >= 1: off
    min_p: Any  # [R] float32 in [0, 1]; keep the ids of probability >= min_p x the largest; 0: off
    key: Any  # [R, 2] uint32; see request_key
    position: Any  # [R] int32; of the token that is drawn; folded into the key
    prompt_len: Any  # [R] int32; positions from there on are output
    penalties: Any  # [R, 3] float32; repetition (1: off), presence and frequency (0: off); see SamplingParams
    bias_ids: Any  # [R, MAX_BIAS] int32; each at most once; -1: unused
    bias: Any  # [R, MAX_BIAS] float32
    ends: Any  # [R, MAX_STOPS] int32; token ids that end the row's sequence; -1: unused
    end_from: Any  # [R] int32; `ends` cannot be drawn at positions before it
    logprobs: Any  # [R] int32; most likely tokens to tell of beside the drawn one; -1: tell nothing


def threefry2x32(key: tuple[Any, Any], counter: tuple[Any, Any], wrap: Callable[[Any], Any] = lambda x: x) -> tuple[Any, Any]:
    """The 20-round Threefry block cipher on pairs of uint32 arrays, or of Python integers with a `wrap` that takes them modulo 2**32.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. JAX's "threefry2x32" keys use the same."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA)
    x, y = wrap(counter[0] + schedule[0]), wrap(counter[1] + schedule[1])
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = wrap(x + y)
            y = wrap(y << turn) ^ (y >> (32 - turn)) ^ x
        x = wrap(x + schedule[(group + 1) % 3])
        y = wrap(y + schedule[(group + 2) % 3] + (group + 1))
    return x, y


def request_key(seed: int, sample_index: int) -> np.ndarray:
    """Key data [2] uint32 of sample `sample_index` (0 <= it < 2**32) of a request with an int64 seed, computed on the host.

    Equals, bit for bit, the key data of fold_in(fold_in(fold_in(key(0), seed >> 32), seed), sample_index) in jax.random with
    threefry2x32 keys (each number taken modulo 2**32), without an operation on the device."""
    key = (0, 0)
    for data in (seed >> 32, seed, sample_index):
        key = threefry2x32(key, (0, data & 0xFFFFFFFF), lambda x: x & 0xFFFFFFFF)
    return np.array(key, np.uint32)


def draw(
    logits: jax.Array, s: SamplingBatch, history: jax.Array, slots: jax.Array, target: Target | None = None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The next token of each row, and what the raw logits say of it.

    logits [R, V]; history [slots, N] int32: the tokens of each slot by position, those before s.position in place; slots [R]; target:
    whose mesh may split the vocabulary: nowhere is it brought together, devices exchange a few numbers a row.
    Returns tokens [R] int32 (-1 as for `sample`) and `top_logprobs`, all zeros where no row asks for them."""
    logits = logits.astype(jnp.float32)

    def adjusted() -> jax.Array:
        # A number that is none must be seen also where its id could not be drawn.
        return jnp.where(_row_max(logits)[1], sample(adjust(logits, s, history[slots]), s), -1)

    # Around the whole drawing: a cond that gave back logits would copy them where nothing is asked.
    token = lax.cond(jnp.any(_biased(s) | _penalised(s) | _held(s)), adjusted, lambda: sample(logits, s))
    shape = (logits.shape[0], 1 + MAX_LOGPROBS)
    nothing = lambda: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))
    return token, lax.cond(jnp.any(s.logprobs >= 0), lambda: top_logprobs(logits, token, target), nothing)


def _biased(s: SamplingBatch) -> jax.Array:
    return (s.bias_ids >= 0).any(axis=1)


def _penalised(s: SamplingBatch) -> jax.Array:
    return (s.penalties != jnp.array([1.0, 0.0, 0.0])).any(axis=1)


def _held(s: SamplingBatch) -> jax.Array:
    return s.position < s.end_from


def adjust(logits: jax.Array, s: SamplingBatch, history: jax.Array) -> jax.Array:
    """Float32 logits [R, V] after logit_bias, repetition, frequency and presence penalty and min_tokens, in that order (as vLLM's).

    history [R, N] int32: the row's tokens by position; at s.position and beyond it is not read. Rows that ask for nothing come back
    as they went in. Repetition as in CTRL (Keskar et al., arXiv:1909.05858); presence and frequency as in OpenAI's API."""
    row, width = jnp.arange(logits.shape[0])[:, None], logits.shape[1]
    column = lambda ids, used: jnp.where((ids >= 0) & used, ids, width)  # what is unused falls beside the row

    def biased() -> jax.Array:
        return logits.at[row, column(s.bias_ids, True)].add(s.bias, mode="drop")

    x = lax.cond(jnp.any(_biased(s)), biased, lambda: logits)

    def penalised() -> jax.Array:
        counts = _counts(history, s, width)
        repetition, presence, frequency = (s.penalties[:, i, None] for i in range(3))
        y = jnp.where(counts > 0, jnp.where(x > 0, x / repetition, x * repetition), x)
        times = counts >> 1
        y = y - frequency * times - presence * (times > 0)
        return jnp.where(jnp.isfinite(x), jnp.clip(y, -_MAX, _MAX), x)  # a penalty makes nothing infinite, nor finite

    x = lax.cond(jnp.any(_penalised(s)), penalised, lambda: x)
    held = lambda: x.at[row, column(s.ends, _held(s)[:, None])].set(-jnp.inf, mode="drop")
    return lax.cond(jnp.any(_held(s)), held, lambda: x)


def _counts(history: jax.Array, s: SamplingBatch, width: int) -> jax.Array:
    """For each token id [R, width]: 2 x its times in the output, + 1 if it is in the prompt; 0 for rows without penalties.
    Takes the time of the longest context that asks, not of the longest possible."""
    rows, most = history.shape
    block, asks = min(_BLOCK, most), _penalised(s)

    def over(counts: jax.Array, first: jax.Array, last: jax.Array, write: Callable[[Any], jax.Array]) -> jax.Array:
        """write(counts.at[row, ids]) for the positions first <= it < last of each row."""
        first, last = jnp.where(asks, first, most), jnp.where(asks, last, 0)

        def body(i: jax.Array, counts: jax.Array) -> jax.Array:
            start = jnp.minimum(i * block, most - block)
            at = (start + jnp.arange(block))[None]
            inside = (at >= jnp.maximum(first, i * block)[:, None]) & (at < last[:, None])
            ids = jnp.where(inside, lax.dynamic_slice_in_dim(history, start, block, axis=1), width)
            return write(counts.at[jnp.arange(rows)[:, None], ids])

        return lax.fori_loop(jnp.min(first) // block, (jnp.max(last) + block - 1) // block, body, counts)

    counts = over(jnp.zeros((rows, width), jnp.int32), jnp.zeros_like(s.position), s.prompt_len, lambda at: at.set(1, mode="drop"))
    return over(counts, s.prompt_len, s.position, lambda at: at.add(2, mode="drop"))


def top_logprobs(logits: jax.Array, token: jax.Array, target: Target | None = None) -> tuple[jax.Array, jax.Array]:
    """Ids int32 and log-probabilities float32, each [R, 1 + MAX_LOGPROBS]: of token [R], then of the most likely ids, by the
    log_softmax of float32 logits [R, V]. Where the vocabulary is smaller than MAX_LOGPROBS the rest has id -1."""
    most = min(MAX_LOGPROBS, logits.shape[1])
    values, ids = _most_likely(logits, most, target)
    chosen = jnp.take_along_axis(logits, jnp.maximum(token, 0)[:, None], axis=1)
    values = jnp.concatenate([chosen, values], axis=1) - jax.nn.logsumexp(logits, axis=1, keepdims=True)
    ids = jnp.concatenate([token[:, None], ids], axis=1)
    pad = ((0, 0), (0, MAX_LOGPROBS - most))
    return jnp.pad(ids, pad, constant_values=-1), jnp.pad(values, pad)


def _most_likely(logits: jax.Array, most: int, target: Target | None) -> tuple[jax.Array, jax.Array]:
    """lax.top_k of logits [R, V]. On a mesh that of each device's part, then among those: XLA would bring all logits together. Of equals
    the first, as the parts are in order."""
    if target is None or target.ways("vocab") == 1:
        return lax.top_k(logits, most)
    over, split = target.over("vocab"), target.partition((None, "vocab"))

    def own(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, ids = lax.top_k(logits, min(most, logits.shape[1]))
        ids += lax.axis_index(over).astype(ids.dtype) * logits.shape[1]
        values, ids = (lax.all_gather(x, over, axis=1, tiled=True) for x in (values, ids))
        values, at = lax.top_k(values, most)
        return values, jnp.take_along_axis(ids, at, axis=1)

    every = target.partition((None, None))
    return jax.shard_map(own, mesh=target.mesh, in_specs=split, out_specs=(every, every), check_vma=False)(logits)


def sample(logits: jax.Array, s: SamplingBatch) -> jax.Array:
    """Draws one token id a row: logits [R, V] (any float; -inf: never drawn), adjusted already -> [R] int32.

    Greedy rows take the largest logit, the lowest id of equals. A row that holds NaN or +inf, or nothing above -inf, gives -1.
    A batch of greedy rows costs a maximum and a search; noise and each threshold are computed only if some row asks."""
    logits = logits.astype(jnp.float32)
    top, valid = _row_max(logits)

    def by_chance() -> jax.Array:
        score = _gumbel(_bits(s, logits.shape[1])) - _distance(logits, top, s)
        score = jnp.where(logits >= _bound(logits, top, s), score, -jnp.inf)
        score = jnp.where((s.temperature > 0)[:, None], score, logits)
        return _first(score, jnp.max(score, axis=-1, keepdims=True))

    token = lax.cond(jnp.any(s.temperature > 0), by_chance, lambda: _first(logits, top))
    return jnp.where(valid, token, -1)


def greedy(logits: jax.Array) -> jax.Array:
    """`sample` where every row is greedy: without a branch."""
    logits = logits.astype(jnp.float32)
    top, valid = _row_max(logits)
    return jnp.where(valid, _first(logits, top), -1)


def distribution(logits: jax.Array, s: SamplingBatch) -> jax.Array:
    """The probabilities that `sample` draws from: logits [R, V] -> [R, V] float32, by the same bounds.

    A greedy row is 1 at its token; a row for which `sample` gives -1 is all 0. `key` and `position` are not read."""
    logits = logits.astype(jnp.float32)
    top, valid = _row_max(logits)
    weight = jnp.where(logits >= _bound(logits, top, s), jnp.exp(-_distance(logits, top, s)), 0.0)
    drawn = weight / jnp.sum(weight, axis=-1, keepdims=True)
    greedy = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == _first(logits, top)[:, None]
    p = jnp.where((s.temperature > 0)[:, None], drawn, greedy.astype(jnp.float32))
    return jnp.where(valid[:, None], p, 0.0)


def _row_max(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Largest logit [R, 1] and whether the row can be sampled [R]. NaN counts as +inf, for a maximum across devices may drop NaN."""
    top = jnp.max(jnp.where(jnp.isnan(logits), jnp.inf, logits), axis=-1, keepdims=True)
    return top, jnp.isfinite(top[:, 0])


def _first(x: jax.Array, value: jax.Array) -> jax.Array:
    """Lowest column [R] where x [R, V] equals value [R, 1]. With a maximum before it, a third of the time of argmax on a CPU."""
    column = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.min(jnp.where(x == value, column, x.shape[1]), axis=-1)


def _distance(logits: jax.Array, top: jax.Array, s: SamplingBatch) -> jax.Array:
    """(largest logit - logit) / temperature [R, V] >= 0; the maximum goes first, so that no temperature is too small."""
    return (top - logits) * (1 / jnp.maximum(s.temperature, _TINY))[:, None]


def _bound(logits: jax.Array, top: jax.Array, s: SamplingBatch) -> jax.Array:
    """The smallest logit kept [R, 1], finite: top-k, then top-p over what top-k kept, then min-p. Greedy rows ask for nothing."""
    asks = s.temperature > 0
    off = jnp.full(top.shape, -_MAX, jnp.float32)
    use_k, use_p = (asks & (s.top_k > 0))[:, None], (asks & (s.top_p < 1))[:, None]

    def top_k() -> jax.Array:
        found = _largest_bound(lambda t: jnp.sum((logits >= t).astype(jnp.int32), axis=-1, keepdims=True), s.top_k[:, None])
        return jnp.where(use_k, found, off)

    bound_k = lax.cond(jnp.any(use_k), top_k, lambda: off)

    def top_p() -> jax.Array:
        weight = jnp.where(logits >= bound_k, jnp.exp(-_distance(logits, top, s)), 0.0)
        target = s.top_p[:, None] * jnp.sum(weight, axis=-1, keepdims=True)
        found = _largest_bound(lambda t: jnp.sum(jnp.where(logits >= t, weight, 0.0), axis=-1, keepdims=True), target)
        return jnp.where(use_p, found, off)

    bound_p = lax.cond(jnp.any(use_p), top_p, lambda: off)
    bound_min = jnp.where(s.min_p > 0, top[:, 0] + s.temperature * jnp.log(s.min_p), -_MAX)[:, None]
    bound = jnp.maximum(jnp.maximum(bound_k, bound_p), bound_min)
    return jnp.clip(bound, off, top)  # no parameter drops the most likely id


def _largest_bound(measure: Callable[[jax.Array], jax.Array], target: jax.Array) -> jax.Array:
    """The largest float32 t [R, 1] for which measure(t) >= target [R, 1], exact; the smallest finite float where there is none.

    measure: t [R, 1] -> [R, 1], not increasing in t, below target at +inf."""

    def halve(_: int, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = interval  # measure(low) >= target > measure(high)
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        enough = measure(_float_at(middle)) >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, high = (jnp.full_like(target, _order(x), jnp.int32) for x in (-_MAX, np.float32(np.inf)))
    return _float_at(lax.fori_loop(0, 32, halve, (low, high))[0])


def _order(x: np.float32) -> int:
    """The place of a float32 among all of them, as an int32: greater floats have greater places."""
    bits = int(x.view(np.int32))
    return bits if bits >= 0 else bits ^ 0x7FFFFFFF


def _float_at(place: jax.Array) -> jax.Array:
    """The float32 at an int32 place: the inverse of `_order`."""
    return lax.bitcast_convert_type(jnp.where(place >= 0, place, place ^ 0x7FFFFFFF), jnp.float32)


def _bits(s: SamplingBatch, width: int) -> jax.Array:
    """Random uint32 [R, width]; column v hashes (key, position, v) alone: jax.random.bits of fold_in(key, position), partitionable."""
    zero = jnp.uint32(0)
    key = threefry2x32((s.key[:, 0], s.key[:, 1]), (zero, s.position.astype(jnp.uint32)))
    column = lax.broadcasted_iota(jnp.uint32, (1, width), 1)
    x, y = threefry2x32((key[0][:, None], key[1][:, None]), (zero, column))
    return x ^ y


def _gumbel(bits: jax.Array) -> jax.Array:
    """Standard Gumbel noise, finite, of random uint32 bits; small bits give the large values, with the resolution of all 32 bits."""
    # u is held below 1, where the noise would be -inf and could lose the only id that is kept.
    u = jnp.minimum(bits.astype(jnp.float32) * 2.0**-32 + 2.0**-33, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-u))
