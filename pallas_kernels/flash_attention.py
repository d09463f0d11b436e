"""Attention of whole prompts over contiguous keys and values: causal or full, optionally within a sliding window.

    q [B, T, Hq, D]   k, v [B, S, Hkv, D]   lengths int32 [B]   window int32 scalar   sinks float [Hq]

The T queries are the last T of S positions: query i of sequence b is position p = S - T + i. It sees the keys at positions
max(0, p - window + 1) .. p (window 0: from 0; not causal: to the end) that are below lengths[b]. Query head h uses key-value head
h // (Hq // Hkv). `sinks` are learned logits, one a head, in the denominator of the softmax only (gpt-oss). Queries at or beyond
lengths[b] give zeros, and what lies there in k and v may be anything.

`impl` chooses the body: "reference" (plain jnp, below: the contract, and what a CPU and a GPU run), "pallas" (the TPU kernel of
flash_attention_tpu.py), "interpret" (that kernel, interpreted on a CPU).
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.tuning import lookup

VMEM = {"v4": 16 << 20, "v5e": 128 << 20, "v6e": 128 << 20}  # bytes; unknown and other chips: at least OTHER_VMEM
OTHER_VMEM = 64 << 20
_LOW = -1e30


def flash_attention(
    q,
    k,
    v,
    *,
    lengths: Any = None,
    window: Any = 0,
    scale: float,
    softcap: float | None = None,
    causal: bool = True,
    sinks: Any = None,
    return_lse: bool = False,
    blocks: dict[str, int] | None = None,
    chip: str = "",
    impl: str = "reference",
):
    """Attention as the module describes. Returns out [B, T, Hq, D] of q's dtype; with return_lse also float32 [B, Hq, T], the natural
    log of the softmax's denominator (sinks included; -inf for a query at or beyond its length).

    q, k, v: bfloat16 or float32, one dtype. lengths: None for S everywhere. window: may be traced. softcap: scores become
    softcap * tanh(scores / softcap). blocks: {"step": positions at a time, "block_q": positions of a tile, "block_k": keys}; None: what
    tuned.toml has for `chip`, else default_blocks. impl: "reference" (plain jnp), "pallas" (TPU), "interpret" (the TPU kernel on a CPU).
    Raises ValueError for shapes that cannot work."""
    check(q, k, v, lengths, sinks)
    if impl not in ("reference", "pallas", "interpret"):
        raise ValueError(f"impl={impl!r}: legal: reference, pallas, interpret")
    lengths = jnp.full(q.shape[0], k.shape[1], jnp.int32) if lengths is None else lengths
    args = dict(lengths=lengths, window=window, scale=scale, softcap=softcap, causal=causal, sinks=sinks)
    if impl == "reference":
        out, lse = flash_attention_reference(q, k, v, **args)
    else:
        from jax.experimental.pallas import tpu as pltpu

        from pallas_kernels.flash_attention_tpu import clip_blocks, default_blocks, flash_attention_tpu, make_plan

        group, dim, limit = q.shape[2] // k.shape[2], q.shape[3], VMEM.get(chip, OTHER_VMEM)
        tuned = lookup("flash_attention", chip, head_dim=dim, group=group, keys=k.shape[1], dtype=str(q.dtype))
        blocks = blocks or (tuned and clip_blocks(tuned, q.shape[1], k.shape[1]))
        blocks = blocks or default_blocks(q.shape[1], k.shape[1], group, dim, q.dtype.itemsize, limit)
        plan = make_plan(q, k, blocks, softcap, causal, sinks is not None, return_lse, limit)
        mode: Any = pltpu.InterpretParams() if impl == "interpret" else False
        out, lse = flash_attention_tpu(plan, q, k, v, lengths, window, scale, sinks, mode)
    return (out, lse) if return_lse else out


def check(q, k, v, lengths, sinks):
    """Static checks shared by all bodies: names the dimension that is wrong. Raises ValueError."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: must be [B,T,Hq,D], [B,S,Hkv,D] twice")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k {k.shape}: must have the batch {q.shape[0]} and the head_dim {q.shape[3]} of q")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads {q.shape[2]}: must be a multiple of the {k.shape[2]} kv heads")
    if not 1 <= q.shape[1] <= k.shape[1]:
        raise ValueError(f"{q.shape[1]} queries: must be from 1 to the {k.shape[1]} keys, of which they are the last positions")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"dtypes q {q.dtype}, k {k.dtype}, v {v.dtype}: must be one of bfloat16 and float32")
    if lengths is not None and lengths.shape != q.shape[:1]:
        raise ValueError(f"lengths {lengths.shape}: must be [{q.shape[0]}], as the batch")
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise ValueError(f"sinks {sinks.shape}: must be [{q.shape[2]}], one a query head")


def flash_attention_reference(q, k, v, *, lengths, window, scale, softcap, causal, sinks, rows=256):
    """The contract in plain jnp, `rows` queries at a time: (out, lse)."""
    batch, tokens, q_heads, dim = q.shape
    keys, heads = k.shape[1:3]
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    dot = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    lengths, at = lengths[:, None, None], jnp.arange(keys)
    v = jnp.where((at < lengths[:, 0])[..., None, None], v, 0)  # zero times what lies there must not be NaN
    sink = None if sinks is None else sinks.astype(jnp.float32).reshape(1, heads, -1, 1, 1)

    def some(n):
        i = jnp.minimum(n * rows + jnp.arange(min(rows, tokens)), tokens - 1)
        pos = (keys - tokens + i)[:, None]
        scores = dot("btkgd,bskd->bkgts", q[:, i].reshape(batch, -1, heads, q_heads // heads, dim), k) * scale
        scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
        seen = (at < lengths) & (at >= jnp.where(window > 0, pos - window + 1, 0)) & ((at <= pos) | (not causal))
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
        top = jnp.max(scores, axis=-1, keepdims=True)
        top = jnp.maximum(jnp.where(top == -jnp.inf, _LOW, top), _LOW if sink is None else sink)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True) + (0 if sink is None else jnp.exp(sink - top))
        out, lse = dot("bkgts,bskd->bkgtd", weights.astype(q.dtype), v) / total, (top + jnp.log(total))[..., 0]
        real = (pos[:, 0] < lengths[:, 0])[:, None, None]  # [B, 1, 1, t]
        out, lse = jnp.where(real[..., None], out, 0).astype(q.dtype), jnp.where(real, lse, -jnp.inf)
        return out.transpose(0, 3, 1, 2, 4).reshape(batch, -1, q_heads, dim), lse.reshape(batch, q_heads, -1)

    out, lse = lax.map(some, jnp.arange(-(-tokens // rows)))
    return jnp.concatenate(list(out), 1)[:, :tokens], jnp.concatenate(list(lse), 2)[..., :tokens]
