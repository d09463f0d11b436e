"""The online softmax inside the TPU's paged attention, in two layouts.

`Rows`, for decode: a few query rows against many keys, scores [rows, keys]. `Columns`, for tiles of queries: everything transposed, scores
[keys, rows], so that maxima and sums go down sublanes and the values' product fills the matrix unit: it gives [D, rows] where the other
order would give [rows, D], half of it padding at D = 128 on a matrix unit 256 wide.

`Columns` mostly looks at keys without a new maximum: weights are relative to an older one, so that a score is used as it leaves the
matrix unit and nothing is rescaled. Floating point keeps its relative precision however far from 1 the weights are; only a score beyond the
reference by 2 ** REACH spoils that. The largest excess comes out of the kernel, which then is run once more, exactly.
"""

import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.paged_attention_plan import LANES, Plan

LOG2E = math.log2(math.e)
MASKED = -1e30  # finite, so that a row which sees nothing of a block stays free of NaN until a block that it sees rescales it
REACH = 60.0  # of exponents of 2: 2 ** 60 times a million keys is far from the largest float32, and bfloat16 reaches as far
SUBLANES = 8


def _dot(plan: Plan, x, y, contract):
    precision = lax.Precision.HIGHEST if plan.compute == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(x, y, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _capped(plan: Plan, scores):
    """Scores with the soft cap, as exponents of 2; the queries are scaled so that without a cap nothing is left to do."""
    return scores if plan.softcap is None else jnp.tanh(scores) * (plan.softcap * LOG2E)


def _lane_sums(x):
    """x [rows, n] summed to [rows, LANES], of which the lanes' sum is wanted: crossing lanes is left for the end."""
    if x.shape[1] % LANES:
        return jnp.broadcast_to(jnp.sum(x, axis=1, keepdims=True) * (1 / LANES), (x.shape[0], LANES))
    return functools.reduce(jnp.add, [x[:, at : at + LANES] for at in range(0, x.shape[1], LANES)])


def _by_lanes(operation, x, row):
    """operation of x [rows, n] with a value of each row, row [rows, LANES] holding it in every lane: nothing crosses lanes."""
    if x.shape[1] % LANES:
        return operation(x, row[:, :1])
    return jnp.concatenate([operation(x[:, at : at + LANES], row) for at in range(0, x.shape[1], LANES)], axis=1)


class Rows(NamedTuple):
    """Softmax of decode. acc [heads, rows, width], top and total [heads, rows, LANES]: top has its value in every lane, of total each
    lane has a part."""

    plan: Plan
    acc: Any
    top: Any
    total: Any

    def reset(self, logits):
        """logits: None, or [heads, rows, LANES] of one more key without a value, as exponents of 2."""
        self.acc[...] = jnp.zeros_like(self.acc)
        if logits is None:
            self.total[...], self.top[...] = jnp.zeros_like(self.total), jnp.full_like(self.top, MASKED)
        else:
            self.total[...] = jnp.where(lax.broadcasted_iota(jnp.int32, self.total.shape, 2) == 0, 1.0, 0.0)
            self.top[...] = logits[...]

    def attend(self, h, q, kv, visible):
        """One step: rows q [rows, width] of head h against keys and values kv [keys, row]. visible: a mask [rows, keys], or None
        where every row sees all."""
        plan, acc, top, total = self.plan, self.acc, self.top, self.total
        keys, values = kv[:, : plan.width].astype(plan.compute), kv[:, plan.value_lane :].astype(plan.compute)
        scores = _capped(plan, _dot(plan, q, keys, ((1,), (1,))))
        if visible is not None:
            scores = jnp.where(visible, scores, MASKED)
        old_top = top[h]
        new_top = jnp.maximum(old_top, jnp.max(scores, axis=1, keepdims=True))
        weights, shrink = jnp.exp2(_by_lanes(jnp.subtract, scores, new_top)), jnp.exp2(old_top - new_top)
        top[h] = new_top
        total[h] = total[h] * shrink + _lane_sums(weights)
        acc[h] = _by_lanes(jnp.multiply, acc[h], shrink) + _dot(plan, weights.astype(plan.compute), values, ((1,), (0,)))

    def result(self, h):
        """[rows, width] of head h."""
        return self.acc[h] / jnp.sum(self.total[h], axis=1, keepdims=True)

    def lse(self, h):
        """[rows, LANES] of head h: the logarithm of the sum of exponentials."""
        return (self.top[h] + jnp.log2(jnp.sum(self.total[h], axis=1, keepdims=True))) * (1 / LOG2E)


def _masked(visible, parts):
    masks = [None if visible is None else visible(n) for n in range(len(parts))]
    return [part if mask is None else jnp.where(mask, part, MASKED) for part, mask in zip(parts, masks)]


class Columns(NamedTuple):
    """Softmax of a tile. acc [heads, D, rows]; top, total [heads, SUBLANES, rows]: top has its value in every sublane, of total each
    sublane has a part. worst [SUBLANES, rows]: the largest excess of a score over its reference, over all heads."""

    plan: Plan
    acc: Any
    top: Any
    total: Any
    worst: Any

    def reset(self, logits):
        """logits: None, or [heads, 1, rows] of one more key without a value, as exponents of 2."""
        self.worst[...] = jnp.zeros_like(self.worst)
        if logits is None:
            self.total[...], self.top[...] = jnp.zeros_like(self.total), jnp.full_like(self.top, MASKED)
        else:
            self.total[...] = jnp.where(lax.broadcasted_iota(jnp.int32, self.total.shape, 1) == 0, 1.0, 0.0)
            self.top[...] = jnp.broadcast_to(logits[...], self.top.shape)

    def _scores(self, q, kv):
        """Scores of kv [keys, row], as [SUBLANES, rows] of each eight keys."""
        scores = _capped(self.plan, _dot(self.plan, kv[:, : self.plan.width].astype(self.plan.compute), q, ((1,), (1,))))
        return [scores[at : at + SUBLANES] for at in range(0, scores.shape[0], SUBLANES)]

    def _raise(self, h, parts):
        """Takes a new maximum from the scores; returns it and what sums so far are to be multiplied by."""
        old_top = self.top[h]
        self.top[h] = new_top = jnp.maximum(old_top, jnp.max(functools.reduce(jnp.maximum, parts), axis=0, keepdims=True))
        return new_top, jnp.exp2(old_top - new_top)

    def probe(self, h, q, kv, visible):
        """A first reference from a few keys, which are not counted yet: acc must be zero."""
        _, shrink = self._raise(h, _masked(visible, self._scores(q, kv)))
        self.total[h] *= shrink

    def attend(self, h, q, kv, visible, settled=False, begins=False):
        """One step: rows q [rows, width] of head h against keys and values kv [keys, row]. visible: None where every row sees all,
        or a function of n giving the mask [SUBLANES, rows] of keys 8 * n .. 8 * n + 7, or None. settled: every row has a reference, which
        stays."""
        plan, acc, total, worst = self.plan, self.acc, self.total, self.worst
        so_far = jnp.where(begins, 0.0, acc[h])
        parts = self._scores(q, kv)
        if settled:
            over = _masked(visible, [part - self.top[h] for part in parts])
            worst[...] = functools.reduce(jnp.maximum, over, worst[...])
            old_total, old_acc = total[h], so_far
        else:
            parts = _masked(visible, parts)
            top, shrink = self._raise(h, parts)
            over = [part - top for part in parts]
            old_total, old_acc = total[h] * shrink, so_far * shrink[:1]
        weights = [jnp.exp2(part) for part in over]
        total[h] = old_total + functools.reduce(jnp.add, weights)
        values = kv[:, plan.value_lane :].astype(plan.compute).T
        mixed = _dot(plan, values, jnp.concatenate(weights, axis=0).astype(plan.compute), ((1,), (0,)))
        acc[h] = old_acc + mixed[plan.first_value : plan.first_value + plan.head_dim]

    def result(self, h):
        """[D, rows] of head h."""
        return self.acc[h] * (1 / jnp.sum(self.total[h], axis=0, keepdims=True))

    def lse(self, h):
        """[1, rows] of head h: the logarithm of the sum of exponentials."""
        return (self.top[h][:1] + jnp.log2(jnp.sum(self.total[h], axis=0, keepdims=True))) * (1 / LOG2E)
