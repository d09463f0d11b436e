"""Sampling on the device: pure functions under jit, one program for every combination of parameters.

A token is drawn by the Gumbel-max rule: argmax over the kept ids v of logit[v] / temperature + G[v], G[v] standard Gumbel
noise, which draws v with exactly its probability and needs neither a sum nor a sort. G[v] is a hash of (request key, position,
v) alone, so a token depends neither on the other rows, their order, the padding of the vocabulary, nor the sharding.

Top-k, top-p and min-p each keep the ids of logit >= some bound, ties included. The bound is found exactly, without a sort, by 32
halvings of the range of float32 numbers in their order as integers; each is one fused masked sum over the row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_MAX = np.finfo(np.float32).max
_TINY = np.finfo(np.float32).tiny


@flax.struct.dataclass
class SamplingBatch:
    """How to draw the next token of each of R rows; all arrays, so no value is part of the program."""

    temperature: Any  # [R] float32; 0: greedy, and the row's other fields are not read
    top_k: Any  # [R] int32; keep the k most likely ids (and ties with the last); 0: off
    top_p: Any  # [R] float32; keep the fewest most likely ids (and ties) of mass >= top_p among those of top_k; >= 1: off
    min_p: Any  # [R] float32 in [0, 1]; keep the ids of probability >= min_p x the largest; 0: off
    key: Any  # [R, 2] uint32; see request_key
    position: Any  # [R] int32; of the token that is drawn; folded into the key


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


def sample(logits: jax.Array, s: SamplingBatch) -> jax.Array:
    """Draws one token id a row: logits [R, V] (any float; -inf: never drawn) -> [R] int32.

    Greedy rows take the largest logit, the lowest id of equals. A row that holds NaN or +inf, or nothing above -inf, gives -1.
    A batch of greedy rows costs a maximum and a search; noise and each threshold are computed only if some row asks."""
    logits = logits.astype(jnp.float32)
    top, valid = _row_max(logits)

    def draw() -> jax.Array:
        score = _gumbel(_bits(s, logits.shape[1])) - _distance(logits, top, s)
        score = jnp.where(logits >= _bound(logits, top, s), score, -jnp.inf)
        score = jnp.where((s.temperature > 0)[:, None], score, logits)
        return _first(score, jnp.max(score, axis=-1, keepdims=True))

    token = lax.cond(jnp.any(s.temperature > 0), draw, lambda: _first(logits, top))
    return jnp.where(valid, token, -1)


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
