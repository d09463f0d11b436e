"""Cost cases of flash attention, as cost_cases.py has them for paged attention: prompts processed whole, Llama-3-8B's heads."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from llminfer.target import chip_of
from pallas_kernels.flash_attention import flash_attention


def flash(
    A: Any,
    B: int = 1,
    T: int = 4096,
    H: int = 32,
    KV: int = 8,
    HD: int = 128,
    window: int = 0,
    step: int = 0,
    block_q: int = 0,
    block_k: int = 0,
) -> dict[str, Any]:
    """B causal prompts of T tokens each; step 0: what tuned.toml has, or the heuristic's."""
    chip = chip_of(A((8,)).sharding.mesh.devices.flat[0]) or ""
    blocks = {"step": step, "block_q": block_q, "block_k": block_k} if step else None

    def fn(q, k, v, window, lengths):
        return flash_attention(q, k, v, lengths=lengths, window=window, scale=HD**-0.5, blocks=blocks, chip=chip, impl="pallas")

    args = [A((B, T, H, HD)), *[A((B, T, KV, HD))] * 2, A((), jnp.int32), A((B,), jnp.int32)]
    return dict(fn=fn, args=args, donate=(), operands={"flash_attention": {0: np.array([window]), 1: np.full(B, T)}})
