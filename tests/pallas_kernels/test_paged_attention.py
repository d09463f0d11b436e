"""The plain-jnp body of paged_attention against the same dense oracle and cases as the TPU kernel."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_paged_attention_tpu import CASES, PROGRAMS, Case, Program, build, check_equal, oracle

from pallas_kernels.paged_attention import paged_attention

# Shapes that only the reference takes: head sizes that a TPU has no lanes for, pages of 8.
SMALL = {
    "small": Program(seqs=6, rows=110, q_max=48, pages=12, page=8, group=2, kv_heads=2, head_dim=16),
    "small_decode": Program(seqs=5, rows=6, q_max=1, pages=40, page=8, group=3, kv_heads=1, head_dim=80),
}
MORE = [
    Case("small", (0, 1, 15, 16, 17, 48), (0, 20, 15, 33, 17, 90), window=12),
    Case("small_decode", (1, 1, 0, 1, 1), (1, 310, 0, 128, 129)),
    Case("small_decode", (1, 1, 1, 1, 1), (1, 310, 7, 256, 257), window=128),
]


@functools.cache
def call(program: Program, impl: str = "reference"):
    static = dict(scale=program.head_dim**-0.5, softcap=program.softcap, q_max=program.q_max, sinks=program.sinks)
    entry = functools.partial(paged_attention, **static, with_lse=True, impl=impl)

    def run(*args, **data):
        out, kv, *scale, lse = entry(*args, **data)
        return out, kv, *(scale or [None]), lse

    return jax.jit(run)


@pytest.mark.parametrize("case", CASES + MORE, ids=lambda case: f"{case.program}-{case.window}-{case.seed}")
def test_reference_matches_oracle(case: Case) -> None:
    program = {**PROGRAMS, **SMALL}[case.program]
    program = dataclasses.replace(program, transfers="eager")
    q, k, v, kv, data = build(program, case)
    for impl in ("reference", "batched") if program.sinks else ("reference",):
        found = call(program, impl)(q, k, v, kv, **data)
        check_equal(program, found, oracle(program, q, k, v, kv, data, found), case.spread)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=(4, 2, 32)), "k "),
        (dict(kv=(1, 4, 2, 16, 24)), "twice head_dim"),
        (dict(q=(4, 3, 16)), "multiple of the 2 kv heads"),
        (dict(kv=(1, 4, 2, 12, 32)), "page size 12"),
        (dict(q_max=5), "q_max=5"),
        (dict(rows=2), "must all be"),
        (dict(impl="fast"), "impl='fast'"),
        (dict(sinks=4), "q_sinks None"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    new, row = jnp.zeros((4, 2, 16)), jnp.zeros(1, jnp.int32)
    k = jnp.zeros(change["k"]) if "k" in change else new
    with pytest.raises(ValueError, match=message):
        paged_attention(
            jnp.zeros(change.get("q", (4, 4, 16))), k, k if "k" in change else new, jnp.zeros(change.get("kv", (1, 4, 2, 16, 32))),
            layer=0, page_table=jnp.zeros((change.get("rows", 1), 2), jnp.int32), q_start=row, q_len=row, kv_len=row, window=0,
            scale=1.0, q_max=change.get("q_max", 1), impl=change.get("impl", "reference"), sinks=change.get("sinks", 0),
        )  # fmt: skip


@pytest.mark.parametrize("impl", ["reference", "batched", "interpret", "triton-interpret"])
def test_a_token_sees_its_own_chunk_up_to_itself(impl: str) -> None:
    """One that decodes, a prompt over three chunks, a chunk's last token and the next one's first; kernels leave it to the reference."""
    rng, chunk, page = np.random.default_rng(3), 20, 8
    q_len, kv_len = np.array([1, 50, 1, 1], np.int32), np.array([33, 50, 40, 41], np.int32)
    start = np.cumsum([0, *q_len[:-1]], dtype=np.int32)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    q, k, v, old = draw(53, 4, 16), draw(53, 2, 16), draw(53, 2, 16), draw(4, 56, 2, 32)
    table = rng.permutation(30)[:28].reshape(4, 7).astype(np.int32)
    kv = np.full((1, 30, 2, page, 32), np.nan, np.float32)
    wanted = np.zeros_like(q)
    for row, (first, new, length) in enumerate(zip(start, q_len, kv_len, strict=True)):
        for at in range((length - new) // chunk * chunk, length - new):  # nothing before this chunk is there any more
            kv[0, table[row, at // page], :, at % page] = old[row, at]
        old[row, length - new : length] = np.concatenate([k, v], axis=-1)[first : first + new]
        for i, at in enumerate(range(length - new, length)):
            seen = old[row, at // chunk * chunk : at + 1].repeat(2, axis=1)
            weights = np.exp(np.einsum("hd,thd->ht", q[first + i], seen[..., :16]) * 0.25)
            wanted[first + i] = np.einsum("ht,thd->hd", weights / weights.sum(1, keepdims=True), seen[..., 16:])
    rows = dict(page_table=table, q_start=start, q_len=q_len, kv_len=kv_len, layer=0, window=chunk)
    attend = functools.partial(paged_attention, scale=0.25, q_max=50, chunked=True, impl=impl, chip="v5e")
    out, _ = jax.jit(attend)(q, k, v, kv, **jax.tree.map(jnp.asarray, rows))
    np.testing.assert_allclose(out, wanted, atol=1e-5, rtol=0)
