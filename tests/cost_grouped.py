"""Cost cases of the grouped matmul; see cost_cases.py for the form. The sizes default to 1024 rows over 64 experts, 2048 x 1536."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from llminfer.target import chip_of
from pallas_kernels.grouped_matmul import Blocks, check, default_blocks, grouped_matmul, tuned_blocks, work_items


def group_sizes(M: int, E: int, skew: str = "equal", seed: int = 0) -> np.ndarray:
    """int32 [E], sum M. skew: equal; random (all experts as likely); zipf (a share falls as 1 / rank); one (all of one expert)."""
    if skew == "equal":
        return np.diff(np.arange(E + 1) * M // E).astype(np.int32)
    shares = {"random": np.ones(E), "zipf": 1 / np.arange(1, E + 1), "one": np.arange(E) == E // 2}[skew]
    return np.random.default_rng(seed).multinomial(M, shares / shares.sum()).astype(np.int32)


def gmm(
    A: Any,
    M: int = 1024,
    E: int = 64,
    K: int = 2048,
    N: int = 1536,
    skew: str = "equal",
    activation: str = "",
    bits: int = 16,
    group: int = 0,
    mxfp4: int = 0,
    bias: int = 0,
    rows: str = "gathered",
    **sizes: int,
) -> dict[str, Any]:
    """activation "silu" and others: N is twice the output's columns. bits 8 or 4: with scales of a column (group 0) or of a group;
    mxfp4 1: in MXFP4. bias 1: one is added. rows: "gathered" from M / 8 tokens, as in a model: the compiler leaves them in VMEM, where it
    also puts an argument of JAX's megablox before that kernel begins, so that the bytes of both kernels are weights and output; or "given",
    an argument in HBM, which the kernel reads once. sizes: block_m, block_n and window, in place of the usual ones."""
    chip = chip_of(A((8,)).sharding.mesh.devices.flat[0])
    dtype = {16: jnp.bfloat16, 8: jnp.int8, 4: jnp.int4}[bits]
    w, counts = A((1, E, K // 2, N), jnp.uint8) if mxfp4 else A((1, E, K, N), dtype), A((E,), jnp.int32)
    scale = None if bits == 16 else A((1, E, K // group, N) if group else (1, E, N), jnp.float32)
    scale = A((1, E, K // 32, N)) if mxfp4 else scale
    more = {"scale": scale, "bias": A((1, E, N)) if bias else None}
    more = {name: array for name, array in more.items() if array is not None}
    shape = check(A((M, K)), w, counts, **more, activation=activation or None, chip=chip)
    blocks = Blocks(**sizes) if sizes else tuned_blocks(shape) or default_blocks(shape)

    def fn(x, w, counts, layer, token, *rest):
        how: dict[str, Any] = dict(layer=layer, **dict(zip(more, rest, strict=True)), activation=activation or None)
        return grouped_matmul(x if rows == "given" else x[token], w, counts, **how, chip=chip, blocks=blocks, impl="pallas")

    values = work_items(shape, blocks.block_m, 0, jnp.asarray(group_sizes(M, E, skew)))
    tokens = A((M if rows == "given" else M // 8, K))
    args = [tokens, w, counts, A((), jnp.int32), A((M,), jnp.int32), *more.values()]
    return dict(fn=fn, args=args, donate=(), operands={"grouped_matmul": dict(enumerate(map(np.asarray, values)))})
