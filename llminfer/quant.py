"""Quantized weights and the one product that all matrices of the model go through."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax


@flax.struct.dataclass
class QTensor:
    """An int8 matrix with a float32 scale for each output channel: w[i, o] = q[i, o] * scale[o]. Leading axes (stacked
    layers) are carried along."""

    q: Any  # int8 [..., in, out]
    scale: Any  # float32 [..., out]


def quantize_int8(w: jax.Array) -> QTensor:
    """Symmetric per-channel rounding of w [..., in, out] to -127..127 by the largest magnitude of each column."""
    w = w.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(w).max(axis=-2), 1e-30) / 127.0
    return QTensor(jnp.round(w / scale[..., None, :]).astype(jnp.int8), scale)


def matmul(x: jax.Array, w: jax.Array | QTensor, platform: str) -> jax.Array:
    """x [T, in] times w [in, out], in x's dtype, summed in float32. A QTensor multiplies the weights as they are on
    TPU and GPU (weight only); on a CPU, where a conversion of the weights costs more than it saves, x is rounded to int8
    by token and the product is int8 x int8."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((1,), (0,)), ((), ()))
    if not isinstance(w, QTensor):
        return lax.dot_general(x, w, dims, precision=precision, preferred_element_type=jnp.float32).astype(x.dtype)
    if platform != "cpu":
        y = lax.dot_general(x, w.q.astype(x.dtype), dims, precision=precision, preferred_element_type=jnp.float32)
        return (y * w.scale).astype(x.dtype)
    amount = jnp.maximum(jnp.abs(x).max(axis=-1, keepdims=True).astype(jnp.float32), 1e-30) / 127.0
    whole = jnp.round(x / amount).astype(jnp.int8)
    rows = max(2, x.shape[0])  # XLA:CPU has a fast int8 product for two rows and more, and none for one
    whole = jnp.pad(whole, ((0, rows - x.shape[0]), (0, 0)))
    y = lax.dot_general(whole, w.q, dims, preferred_element_type=jnp.int32)[: x.shape[0]]
    return (y.astype(jnp.float32) * amount * w.scale).astype(x.dtype)
