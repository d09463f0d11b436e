"""Cost cases of the grouped matmul; see cost_cases.py for the form. The sizes default to 1024 rows over 64 experts, 2048 x 1536."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import Blocks, check, default_blocks, grouped_matmul, work_items

BLOCKS = ("block_m", "block_n", "window")


def group_sizes(M: int, E: int, skew: str = "equal", seed: int = 0) -> np.ndarray:
    """int32 [E], sum M. skew: equal; random (each row's expert is drawn evenly); zipf (an expert's share falls as 1 / rank); one (all of one)."""
    if skew == "equal":
        return np.diff(np.arange(E + 1) * M // E).astype(np.int32)
    shares = {"random": np.ones(E), "zipf": 1 / np.arange(1, E + 1), "one": np.arange(E) == E // 2}[skew]
    return np.random.default_rng(seed).multinomial(M, shares / shares.sum()).astype(np.int32)


def gmm(
    A: Any, M: int = 1024, E: int = 64, K: int = 2048, N: int = 1536, L: int = 1, skew: str = "equal", activation: str = "",
    bits: int = 16, group: int = 0, vmem: int = 16, **sizes: int
) -> dict[str, Any]:  # fmt: skip
    """activation "silu" and others: N is twice the output's columns. bits 8 or 4: with scales of a column (group 0) or of a group.
    vmem: MiB for default_blocks; block_m, block_n, window in its place."""
    dtype = {16: jnp.bfloat16, 8: jnp.int8, 4: jnp.int4}[bits]
    x, w, counts = A((M, K)), A((L, E, K, N), dtype), A((E,), jnp.int32)
    scale = None if bits == 16 else A((L, E, K // group, N) if group else (L, E, N), jnp.float32)
    shape = check(x, w, counts, scale, None, activation or None)
    blocks = Blocks(*(sizes[name] for name in BLOCKS)) if sizes else default_blocks(shape, vmem << 20)

    def fn(x, w, counts, layer, *scale):
        how = dict(scale=scale[0] if scale else None, activation=activation or None)
        return grouped_matmul(x, w, counts, layer=layer, **how, blocks=blocks, impl="pallas")

    values = work_items(shape, blocks.block_m, L - 1, jnp.asarray(group_sizes(M, E, skew)))
    args = [x, w, counts, A((), jnp.int32), *([] if scale is None else [scale])]
    return dict(fn=fn, args=args, donate=(), operands={"grouped_matmul": dict(enumerate(map(np.asarray, values)))})
