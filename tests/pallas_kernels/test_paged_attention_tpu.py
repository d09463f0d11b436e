"""The TPU paged-attention kernel against a dense float32 oracle (interpreted), and compiled for real TPU targets."""

import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention_tpu import paged_attention_tpu

LAYERS, LAYER = 2, 1
# libtpu as a compiler on a machine without a TPU
AOT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
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


MIX = dict(q_len=(0, 1, 15, 16, 17, 48), kv_len=(0, 20, 15, 33, 17, 90), q_max=48)
CASES = {
    "decode": Case((1, 1, 0, 1, 1), (1, 16, 0, 37, 33), 1),
    "decode_window_float32_g1": Case((1, 1, 1), (40, 9, 70), 1, window=20, group=1),
    "decode_blocks_bf16_g8": Case((1, 0, 1), (1100, 0, 2049), 1, kv_heads=1, group=8, page=128, dtype=jnp.bfloat16),
    "decode_head64_g3_softcap": Case((1, 1), (33, 90), 1, group=3, kv_heads=3, head_dim=64, softcap=5.0, dtype=jnp.bfloat16),
    "mix": Case(**MIX),
    "mix_no_gap_bf16_g8": Case(**MIX, gap=0, group=8, kv_heads=1, dtype=jnp.bfloat16, seed=1),
    "mix_window_head64_g3": Case(**MIX, window=24, group=3, kv_heads=3, head_dim=64, seed=2),
    "mix_window_over_context_softcap": Case(**MIX, window=1000, group=1, softcap=5.0, dtype=jnp.bfloat16, seed=3),
    "pages_of_48": Case((47, 49, 1, 144), (60, 49, 30, 300), 144, page=48, kv_heads=1, group=1, seed=4),
    "prefill_blocks": Case((130, 3, 1), (700, 600, 530), 130, kv_heads=1, group=3, dtype=jnp.bfloat16, seed=5),
    "prefill_blocks_window": Case((130, 3, 1), (700, 600, 1500), 130, page=64, kv_heads=1, group=1, window=90, seed=6),
    "nothing_to_do": Case((0, 0), (0, 5), 4, gap=2),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_oracle(name, capfd):
    check(CASES[name], capfd)


@pytest.mark.parametrize("name", ["decode", "mix"])
def test_late_transfers(name, capfd):
    """The interpreter moves data as late as it may: at the wait."""
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait")
    check(replace(CASES[name], interpret=params), capfd)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kv=(1, 4, 2, 16, 160)), "kv has shape"),
        (dict(kv=(1, 4, 2, 24, 256)), "page size 24"),
        (dict(q=(4, 3, 128)), "q has shape"),
        (dict(q_max=0), "q_max is 0"),
        (dict(dtype=jnp.float16), "q has dtype float16"),
    ],
)
def test_refuses(change, message):
    dtype, shape_q, shape_kv = change.get("dtype", jnp.bfloat16), change.get("q", (4, 4, 128)), change.get("kv", (1, 4, 2, 16, 256))
    new, row = jnp.zeros((4, 2, shape_kv[4] // 2), dtype), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match=message):
        paged_attention_tpu(
            jnp.zeros(shape_q, dtype), new, new, jnp.zeros(shape_kv, dtype), layer=0, page_table=jnp.zeros((1, 2), jnp.int32),
            q_start=row, q_len=row, kv_len=row, window=0, scale=1.0, q_max=change.get("q_max", 1),
        )  # fmt: skip


COMPILE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pallas_kernels.paged_attention_tpu import paged_attention_tpu

topology, page, rows, q_max = sys.argv[1], *map(int, sys.argv[2:])
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
mesh = Mesh(np.array(devices[:1]), ("x",))
shape = lambda dtype, *dims: jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, PartitionSpec()))
i32, bf16, seqs, layers = jnp.int32, jnp.bfloat16, 64, 2

def step(q, k, v, kv, layer, window, table, start, new, total):
    return paged_attention_tpu(q, k, v, kv, layer=layer, page_table=table, q_start=start, q_len=new, kv_len=total,
                               window=window, scale=128**-0.5, q_max=q_max)

temporaries = []
for pool in (8192 // page * 16, 8192 // page * 32):
    kv = shape(bf16, layers, pool, 8, page, 256)
    args = [shape(bf16, rows, 32, 128), *[shape(bf16, rows, 8, 128)] * 2, kv, shape(i32), shape(i32)]
    args += [shape(i32, seqs, 2048 // page), *[shape(i32, seqs)] * 3]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        memory = jax.jit(step, donate_argnums=3).lower(*args).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= kv.size * 2, memory
    temporaries.append(memory.temp_size_in_bytes)
assert temporaries[0] == temporaries[1], temporaries
"""


@pytest.mark.tpu_compile
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize(("page", "rows", "q_max"), [(16, 64, 1), (128, 64, 1), (16, 256, 256), (128, 256, 256)])
def test_compiles_for_tpu(topology, page, rows, q_max):
    """Llama-3-8B heads: the cache is aliased, and temporaries do not depend on the number of pages."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", COMPILE, topology, *map(str, (page, rows, q_max))]
    run = subprocess.run(command, env={**os.environ, **AOT, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
