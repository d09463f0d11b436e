"""The parts of a decoder layer, as functions of arrays. T tokens, D hidden, H head_dim."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llminfer.config import ModelConfig, Rope


def norm(x: jax.Array, weight: jax.Array, bias: jax.Array | None, c: ModelConfig, eps: float | None = None) -> jax.Array:
    """Norm over the last axis, computed in float32: by the root mean square (Zhang and Sennrich, arXiv 1910.07467), or after
    the mean is taken off (layer norm, Ba et al., arXiv 1607.06450). weight, bias: shapes that broadcast to x. eps: None for the model's."""
    y = x.astype(jnp.float32)
    if c.norm == "layer":
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + (c.norm_eps if eps is None else eps))
    if c.norm_offset:  # such a weight is small beside the offset: it must not be rounded with it
        return (y * (c.norm_offset + weight.astype(jnp.float32))).astype(x.dtype)
    y = weight * y.astype(x.dtype)
    return y if bias is None else y + bias


def qk_norm(x: jax.Array, weight: jax.Array | None, c: ModelConfig) -> jax.Array:
    """Norm of queries or keys x [T, heads, H], before their rotation: over each head (one weight [H] for all, or weights
    [heads * H]), or over all heads at once (c.qk_norm "full")."""
    if weight is None:
        return x
    if c.qk_norm == "full":
        return norm(x.reshape(x.shape[0], -1), weight, None, c).reshape(x.shape)
    return norm(x, weight if c.qk_norm == "head" else weight.reshape(x.shape[1:]), None, c)


def unit_norm(x: jax.Array, c: ModelConfig) -> jax.Array:
    """x [..., H] divided by the root of its mean square, computed in float32."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + c.norm_eps)).astype(x.dtype)


def query_temperature(positions: jax.Array, c: ModelConfig) -> jax.Array:
    """What queries [T, heads, H] at positions [T] of a layer without a rotation are multiplied by, float32 [T, 1, 1], so that attention
    stays sharp in long contexts (Nakanishi, arXiv 2501.19399)."""
    return (1 + c.query_scale * jnp.log1p(((positions + 1) // c.query_floor).astype(jnp.float32)))[:, None, None]


def activate(x: jax.Array, c: ModelConfig) -> jax.Array:
    """The mlp's activation, in float32 and back."""
    y = x.astype(jnp.float32)
    y = jax.nn.silu(y) if c.activation == "silu" else jax.nn.gelu(y, approximate=c.activation == "gelu_tanh")
    return y.astype(x.dtype)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """x held inside -cap .. cap by a tanh (Gemma 2, arXiv 2408.00118)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def rope_frequencies(rope: Rope, head_dim: int, length: Any = None) -> Any:
    """Angle a position for each rotary pair, float32 [dim / 2], or [..., dim / 2] for lengths [...] of sequences where the
    frequencies depend on them (Rope.by_length). See Rope for the kinds."""
    dim = rope.dim or head_dim
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    freq = (1.0 / rope.theta**exponent).astype(np.float32)
    if rope.kind == "default":
        return freq
    if rope.kind == "linear":
        return (freq / rope.factor).astype(np.float32)
    if rope.kind == "llama3":
        turns = rope.original_max_position * freq / (2 * math.pi)
        blend = np.clip((turns - rope.low_freq_factor) / max(rope.high_freq_factor - rope.low_freq_factor, 1e-6), 0.0, 1.0)
        return ((1 - blend) * freq / rope.factor + blend * freq).astype(np.float32)
    if rope.kind == "yarn":
        keep = _yarn_keep(rope, dim)
        return (freq / rope.factor * (1 - keep) + freq * keep).astype(np.float32)
    length = jnp.maximum(jnp.asarray(length), rope.original_max_position)[..., None]
    if rope.kind == "dynamic":
        grown = rope.factor * length / rope.original_max_position - (rope.factor - 1)
        return 1.0 / (rope.theta * grown ** (dim / (dim - 2))) ** exponent
    short, long = (freq / np.asarray(factors, np.float32) for factors in (rope.short_factors, rope.long_factors))
    return jnp.where(length > rope.original_max_position, long, short)


def _yarn_keep(rope: Rope, dim: int) -> np.ndarray:
    """The share of each pair's frequency that yarn keeps: 1 for the fast pairs, 0 for the slow, a ramp between."""

    def pair(rotations: float) -> float:
        return dim * math.log(rope.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (np.arange(dim // 2, dtype=np.float32) - low) / max(high - low, 0.001)
    return 1 - np.clip(ramp, 0, 1)


RopeTable = tuple[jax.Array, jax.Array]


def rope_tables(c: ModelConfig, positions: jax.Array, reach: jax.Array) -> tuple[RopeTable, ...]:
    """For each of c.ropes (cos, sin), float32 [T, 1, 2, dim / 2], at positions [T]: for each half of the rotated part, the
    sine with its sign. reach [T]: the length that decides where frequencies depend on it."""
    return tuple(_rope_table(rope, c.head_dim, positions, reach) for rope in c.ropes)


def _rope_table(rope: Rope, head_dim: int, positions: jax.Array, reach: jax.Array) -> RopeTable:
    freq = jnp.asarray(rope_frequencies(rope, head_dim, reach[:, None] if rope.by_length else None))
    angle = positions.astype(jnp.float32)[:, None, None] * freq
    cos, sin = (f(angle) * np.float32(rope.attention_factor) for f in (jnp.cos, jnp.sin))
    return jnp.stack([cos, cos], axis=-2), jnp.stack([-sin, sin], axis=-2)
