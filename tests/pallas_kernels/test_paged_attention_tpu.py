"""The TPU paged-attention kernel against a dense float32 oracle (interpreted), and compiled for real TPU targets."""

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention_tpu import paged_attention_tpu

LAYERS, LAYER = 2, 1
BOUND = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}


@dataclass
class Case:
    """One call: lengths of each sequence (new rows, context with them) and the sizes of everything else."""

    q_len: tuple[int, ...]
    kv_len: tuple[int, ...]
    q_max: int
    page: int = 16
    group: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    dtype: type = jnp.float32
    window: int = 0
    softcap: float | None = None
    gap: int = 1  # rows of nobody between sequences
    seed: int = 0
    interpret: object = None


def build(case: Case):
    """Arguments of the kernel. Sequences lie in a shuffled order, pages are permuted, everything that nobody owns is NaN."""
    rng = np.random.default_rng(case.seed)
    seqs, width = len(case.q_len), 2 * case.head_dim
    per_seq = max(math.ceil(n / case.page) for n in case.kv_len) + 1
    pool = seqs * per_seq + 3
    draw = lambda *shape: np.asarray(jnp.asarray(rng.standard_normal(shape), case.dtype))
    starts, at = np.zeros(seqs, np.int32), case.gap
    for r in rng.permutation(seqs):
        starts[r], at = at, at + case.q_len[r] + case.gap
    q = draw(at, case.group * case.kv_heads, case.head_dim)
    k, v = draw(at, case.kv_heads, case.head_dim), draw(at, case.kv_heads, case.head_dim)
    kv = np.full((LAYERS, pool, case.kv_heads, case.page, width), np.nan, q.dtype)
    order, table = rng.permutation(pool), rng.integers(0, pool, (seqs, per_seq))
    for r, (new, total) in enumerate(zip(case.q_len, case.kv_len, strict=True)):
        low = max(0, total - new - case.window + 1) if case.window else 0
        for j in range(math.ceil(total / case.page)):
            if (j + 1) * case.page <= low:
                continue  # fell out of the window: the table entry is arbitrary
            table[r, j] = order[r * per_seq + j]
            rows = max(0, min(case.page, total - new - j * case.page))
            kv[:, table[r, j], :, :rows] = draw(LAYERS, case.kv_heads, rows, width)
    lengths = dict(q_start=starts, q_len=np.array(case.q_len, np.int32), kv_len=np.array(case.kv_len, np.int32))
    return q, k, v, kv, table.astype(np.int32), lengths


def oracle(case: Case, q, k, v, kv, table, lengths):
    """Dense float32 attention, one sequence and one row at a time: (out, cache)."""
    out, cache = np.zeros(q.shape, np.float32), kv.copy()
    for r, (start, new, total) in enumerate(zip(*lengths.values(), strict=True)):
        for n in range(new):
            pos = total - new + n
            cache[LAYER, table[r, pos // case.page], :, pos % case.page] = np.concatenate([k[start + n], v[start + n]], axis=-1)
        for n in range(new):
            pos = total - new + n
            seen = np.arange(max(0, pos - case.window + 1) if case.window else 0, pos + 1)
            rows = cache[LAYER, table[r, seen // case.page], :, seen % case.page].astype(np.float64)  # [keys, heads, 2D]
            rows = rows.repeat(case.group, axis=1)
            scores = np.einsum("hd,nhd->hn", q[start + n].astype(np.float64), rows[..., : case.head_dim]) * case.head_dim**-0.5
            if case.softcap:
                scores = np.tanh(scores / case.softcap) * case.softcap
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[start + n] = np.einsum("hn,nhd->hd", weights / weights.sum(axis=1, keepdims=True), rows[..., case.head_dim :])
    return out, cache


def check(case: Case, capfd):
    q, k, v, kv, table, lengths = build(case)
    want, want_kv = oracle(case, q, k, v, kv, table, lengths)
    params = case.interpret or pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager")
    call = jax.jit(
        lambda q, k, v, kv, layer, window, table, lengths: paged_attention_tpu(
            q, k, v, kv, layer=layer, page_table=table, window=window, scale=case.head_dim**-0.5, softcap=case.softcap,
            q_max=case.q_max, interpret=params, **lengths,
        )
    )  # fmt: skip
    out, cache = jax.block_until_ready(call(q, k, v, kv, LAYER, case.window, table, lengths))
    printed = capfd.readouterr()
    assert "RACE" not in (printed.out + printed.err).upper(), printed.out + printed.err
    out, cache = np.asarray(out, np.float32), np.asarray(cache)
    assert out.dtype == np.float32 and np.isfinite(out).all()
    np.testing.assert_array_equal(cache, want_kv)
    assert np.abs(out - want).max() <= BOUND[case.dtype] * max(1.0, np.abs(want).max())
