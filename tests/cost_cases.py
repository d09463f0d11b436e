"""Work whose cost a simulator of the TPU compiler's schedules can count: factories for it, with the values of all scalar operands.

Each takes A(shape, dtype), which makes an abstract array on the target, and sizes; gives fn, args, the donated arguments, and for each
kernel (by a pattern of its name) the values of its scalar operands. The sizes default to Llama-3-8B's heads in bfloat16; ctx is the length
with the new tokens, T the number of new ones over all sequences. Page tables are random permutations. The cases of the other kernels lie
in files of their own beside this one, which is read by its path: they are found whatever the working directory is.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from llminfer.target import chip_of
from pallas_kernels.paged_attention_plan import make_plan, tuned_blocks, work_items
from pallas_kernels.paged_attention_tpu import paged_attention_tpu

sys.path.append(str(Path(__file__).resolve().parent))
from cost_flash import flash
from cost_grouped import gmm
from cost_quantized import fp8_matmul, int4_matmul, int8_matmul, mxfp4_matmul, w8a8_matmul

__all__ = ["decode", "flash", "fp8_matmul", "gmm", "int4_matmul", "int8_matmul", "mixed", "mxfp4_matmul", "prefill", "w8a8_matmul"]


def decode(A: Any, B: int = 64, page: int = 128, ctx: int = 2048, H: int = 32, KV: int = 8, HD: int = 128) -> dict[str, Any]:
    """B sequences with one new token each."""
    return attention(A, [1] * B, page, ctx, H, KV, HD)


def prefill(A: Any, B: int = 8, T: int = 2048, page: int = 128, ctx: int = 2048, H: int = 32, KV: int = 8, HD: int = 128) -> dict[str, Any]:
    """B sequences with T / B new tokens each."""
    return attention(A, [T // B] * B, page, ctx, H, KV, HD)


def mixed(
    A: Any, B: int = 64, T: int = 2048, some: int = 8, page: int = 128, ctx: int = 2048, H: int = 32, KV: int = 8, HD: int = 128
) -> dict[str, Any]:
    """B sequences, of which the first `some` have T / some new tokens each, and the others one."""
    return attention(A, [T // some] * some + [1] * (B - some), page, ctx, H, KV, HD)


def attention(A: Any, new: list[int], page: int, ctx: int, H: int, KV: int, HD: int) -> dict[str, Any]:
    """paged_attention of sequences with new[i] tokens each, all of them of length ctx."""
    rows, seqs, pages, i32 = sum(new), len(new), -(-ctx // page), jnp.int32
    pool = max(seqs * pages, (1 << 27) // (KV * page * HD))  # 512 MB or more: the compiler would keep a small cache in VMEM
    q, kv = A((rows, H, HD)), A((1, pool, KV, page, 2 * HD))
    table = np.random.default_rng(0).permutation(pool)[: seqs * pages].astype(np.int32)
    start, length, total = np.cumsum([0, *new[:-1]]), np.array(new), np.full(seqs, ctx)
    scale, most = HD**-0.5, max(new)
    chip = chip_of(A((8,)).sharding.mesh.devices.flat[0])

    def fn(q, k, v, kv, layer, window, table, q_start, q_len, kv_len):
        rest = dict(layer=layer, window=window, page_table=table, q_start=q_start, q_len=q_len, kv_len=kv_len)
        return paged_attention_tpu(q, k, v, kv, **rest, scale=scale, q_max=most, chip=chip)[:2]

    operands = {}
    for name, bound, mine in (("paged_decode", 1, length == 1), ("paged_prefill", most, length > 1)):
        if name == "paged_prefill" and most == 1:
            continue
        plan = make_plan(q, kv, pages, bound, None, 0, tuned_blocks(chip, q, kv, bound))
        own = np.where(mine, length, 0)
        alone = plan.decode and rows > seqs  # decode beside chunks: of the sequences' own rows only
        at = np.arange(seqs) if alone else start
        items = work_items(plan, seqs if alone else rows, jnp.asarray(at, i32), jnp.asarray(own, i32))
        values = ([0], [0], [0], table, at, own, total, np.zeros(seqs), total, np.zeros(seqs), *map(np.asarray, items))
        operands[name] = dict(enumerate(values))
    args = [q, *[A((rows, KV, HD))] * 2, kv, A((), i32), A((), i32), A((seqs, pages), i32), *[A((seqs,), i32)] * 3]
    return dict(fn=fn, args=args, donate=(3,), operands=operands)
