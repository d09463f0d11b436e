"""Multi-head latent attention: keys and values of all heads are made of one latent a token, which is all that is cached.

A head's score is its query times its key, and its key is k_b times the latent: so the query is multiplied with k_b, once, and then with
latents as they are cached; what a head takes away is a weighted sum of latents, and v_b makes its value of that. Prompts are processed in
the same way: their chunks look back at the cache, whose keys and values would have to be made for each chunk anew. DeepSeek-V2
(arXiv 2405.04434, section 2.1 and appendix C).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from llminfer.config import ModelConfig
from llminfer.layers import norm
from llminfer.linear import Norm, linear
from llminfer.params import Layer
from llminfer.target import Target
from pallas_kernels.rope import rotate

EPS = 1e-6  # of the norms of latents, whatever the model's


def project(w: Layer, y: jax.Array, before: Norm | None, turns: Any, c: ModelConfig, target: Target):
    """Of hidden states y [T, D], `before` their norm if they still need it: (queries of latents [T, heads, row_dim], the rows to be cached
    [T, 1, row_dim], None, and queries for the sinks where turns has their rope table too)."""
    tokens, rank = y.shape[0], c.kv_rank
    if not c.q_rank and before is not None:  # read twice
        y, before = norm(y, before[0], before[1], c), None
    down = linear(y, w.qkv_a, c, target, bias=w.qkv_a_bias, before=before)
    source = norm(down[:, : c.q_rank], w.q_a_norm, None, c, EPS) if c.q_rank else y
    cached, rotated = down[:, c.q_rank : c.q_rank + rank], down[:, None, c.q_rank + rank :]
    row = jnp.concatenate([norm(cached, w.kv_a_norm, None, c, EPS)[:, None], rotate(rotated, turns[0])], axis=-1)
    q = linear(source, w.q_b, c, target).reshape(tokens, c.num_heads, c.head_dim)
    plain, rotated = q[..., : c.head_dim - c.rope_head_dim], q[..., c.head_dim - c.rope_head_dim :]
    plain = _by_head("thn,hnc->thc", plain, w.k_b)
    queries = [jnp.concatenate([plain, rotate(rotated, turn)], axis=-1) for turn in turns]
    return queries[0], row, None, {"q_sinks": queries[1]} if turns[1:] else {}


def values(y: jax.Array, w: Layer, c: ModelConfig) -> jax.Array:
    """[T, heads, value_dim] of each head's weighted sum of latents [T, heads, kv_rank]."""
    return _by_head("thc,hvc->thv", y, w.v_b)


def _by_head(form: str, x: jax.Array, w: jax.Array) -> jax.Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(form, x, w, precision=precision, preferred_element_type=jnp.float32).astype(x.dtype)
