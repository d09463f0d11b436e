"""Rotary embedding (Su et al., arXiv 2104.09864), and queries, keys and values as one projection leaves them.

rope: (cos, sin) float32 [T, 1, 2, pairs]: of each token, for both halves of the rotated elements, the sine with its sign
packed [T, Hkv, G + 2, D]: of each kv head its G queries, its key and its value, not rotated yet
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax


def rotate(x, rope):
    """x [T, heads, D] rotated; None: as it is. Pair i of the first 2 * pairs elements is elements i and i + pairs. The halves change
    places by a reversal, which XLA:CPU vectorises; a concatenation of them takes it five times as long."""
    if rope is None:
        return x
    cos, sin = rope
    dim = 2 * cos.shape[-1]
    turned, rest = x[..., :dim], x[..., dim:]
    halves = turned.astype(jnp.float32).reshape(*turned.shape[:-1], 2, -1)
    turned = (halves * cos + lax.rev(halves, (halves.ndim - 2,)) * sin).reshape(turned.shape).astype(x.dtype)
    return turned if dim == x.shape[-1] else jnp.concatenate([turned, rest], axis=-1)


def apart(packed, rope):
    """(q [T, Hkv * G, D], k, v [T, Hkv, D]) of packed, q and k rotated."""
    q = packed[:, :, :-2].reshape(packed.shape[0], -1, packed.shape[3])
    return rotate(q, rope), rotate(packed[:, :, -2], rope), packed[:, :, -1]
