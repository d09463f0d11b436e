"""The parts of a decoder layer, as functions of arrays. T tokens, D hidden, H head_dim."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from llminfer.config import ModelConfig, RopeScaling


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root mean square norm over the last axis, computed in float32 (Zhang and Sennrich, arXiv 1910.07467)."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return weight * y.astype(x.dtype)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Angle a position for each rotary pair, float32 [H / 2] (Su et al., arXiv 2104.09864). Scaling: linear divides
    all; llama3 divides the long wavelengths, keeps the short and blends between (Llama 3.1 model card)."""
    freq = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    freq = freq.astype(np.float32)
    if scaling is None:
        return freq
    if scaling.kind == "linear":
        return (freq / scaling.factor).astype(np.float32)
    wavelength = 2 * math.pi / freq
    turns = scaling.original_max_position / wavelength
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * freq / scaling.factor + blend * freq).astype(np.float32)


def rope_table(c: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) float32 [T, 1, 2, H / 2] for positions [T]: for each half of a head, the sine with its sign."""
    freq = jnp.asarray(rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling))
    angle = positions.astype(jnp.float32)[:, None, None] * freq
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([cos, cos], axis=-2), jnp.stack([-sin, sin], axis=-2)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding of x [T, heads, H]: pair i is elements i and i + H/2. The halves change places by a reversal,
    which XLA:CPU vectorises; a concatenation of them takes it five times as long."""
    cos, sin = rope
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    return (halves * cos + jax.lax.rev(halves, (halves.ndim - 2,)) * sin).reshape(x.shape).astype(x.dtype)
