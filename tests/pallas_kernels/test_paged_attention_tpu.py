"""The TPU paged-attention kernel against a dense float32 oracle (interpreted), and compiled for real TPU targets."""

import functools
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


@dataclass(frozen=True)
class Program:
    """What is static in a call: one compilation, slow in the interpreter, so that several cases share it."""

    seqs: int
    rows: int  # of q, k and v; those that no sequence needs lie between the sequences
    q_max: int
    pages: int  # of a sequence
    page: int = 16
    group: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    dtype: type = jnp.float32
    softcap: float | None = None
    sinks: int = 0
    transfers: str = "eager"

    @functools.cached_property
    def call(self):
        params = pltpu.InterpretParams(detect_races=True, dma_execution_mode=self.transfers)
        static = dict(scale=self.head_dim**-0.5, softcap=self.softcap, q_max=self.q_max, sinks=self.sinks, interpret=params)
        return jax.jit(functools.partial(paged_attention_tpu, **static))


@dataclass(frozen=True)
class Case:
    program: str
    q_len: tuple[int, ...]
    kv_len: tuple[int, ...]
    window: int = 0
    seed: int = 0


def build(program: Program, case: Case):
    """Arguments of the kernel. Sequences lie in a shuffled order, pages are permuted, everything that nobody owns is NaN."""
    rng, page, heads = np.random.default_rng(case.seed), program.page, program.kv_heads
    pool = program.seqs * program.pages + 3
    draw = lambda *shape: np.asarray(jnp.asarray(rng.standard_normal(shape), program.dtype))
    starts = np.zeros(program.seqs, np.int32)
    gaps = rng.multinomial(program.rows - sum(case.q_len), np.full(program.seqs + 1, 1 / (program.seqs + 1)))
    at = 0
    for r in rng.permutation(program.seqs):
        starts[r] = at + gaps[r]
        at = starts[r] + case.q_len[r]
    q = draw(program.rows, program.group * heads, program.head_dim)
    k, v = draw(program.rows, heads, program.head_dim), draw(program.rows, heads, program.head_dim)
    kv = np.full((LAYERS, pool, heads, page, 2 * program.head_dim), np.nan, q.dtype)
    order, table = rng.permutation(pool), rng.integers(0, pool, (program.seqs, program.pages), dtype=np.int32)
    for r, (new, total) in enumerate(zip(case.q_len, case.kv_len, strict=True)):
        low = max(0, total - new - case.window + 1) if case.window else 0
        kept = range(min(low // page, math.ceil(program.sinks / page)))
        for j in (*kept, *range(low // page, math.ceil(total / page))):  # entries of pages that fell out of the window stay arbitrary
            table[r, j] = order[r * program.pages + j]
            rows = max(0, min(page, total - new - j * page))
            kv[:, table[r, j], :, :rows] = draw(LAYERS, heads, rows, 2 * program.head_dim)
    more = dict(q_sinks=draw(*q.shape)) if program.sinks else {}
    lengths = more | dict(q_start=starts, q_len=np.array(case.q_len, np.int32), kv_len=np.array(case.kv_len, np.int32))
    return q, k, v, kv, dict(layer=np.int32(LAYER), window=np.int32(case.window), page_table=table, **lengths)


def oracle(program: Program, q, k, v, kv, data):
    """Dense attention in float64, one row at a time: (out, cache)."""
    out, cache, dim, window = np.zeros(q.shape, np.float32), kv.copy(), program.head_dim, data["window"]
    for r, table in enumerate(data["page_table"]):
        start, new = data["q_start"][r], data["q_len"][r]
        positions = data["kv_len"][r] - new + np.arange(new)
        for row, pos in enumerate(positions, start):
            cache[LAYER, table[pos // program.page], :, pos % program.page] = np.concatenate([k[row], v[row]], axis=-1)
        for row, pos in enumerate(positions, start):
            seen = np.arange(max(0, pos - window + 1) if window else 0, pos + 1)
            early = np.arange(min(program.sinks, seen[0]))
            seen = np.concatenate([early, seen])
            queries = np.stack([q[row]] * len(seen)).astype(np.float64)
            if len(early):
                queries[: len(early)] = data["q_sinks"][row]
            rows = cache[LAYER, table[seen // program.page], :, seen % program.page].astype(np.float64)  # [keys, heads, 2 * dim]
            rows = rows.repeat(program.group, axis=1)
            scores = np.einsum("nhd,nhd->hn", queries, rows[..., :dim]) * dim**-0.5
            if program.softcap:
                scores = np.tanh(scores / program.softcap) * program.softcap
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[row] = np.einsum("hn,nhd->hd", weights / weights.sum(axis=1, keepdims=True), rows[..., dim:])
    return out, cache


def check_equal(program: Program, found, want):
    """found and want: (out, cache); the whole cache to the bit, the output within the bound of its type."""
    np.testing.assert_array_equal(np.asarray(found[1], np.float32), want[1].astype(np.float32))
    assert found[0].dtype == program.dtype
    error = np.abs(np.asarray(found[0], np.float32) - want[0]).max()
    assert error <= BOUND[program.dtype] * max(1.0, np.abs(want[0]).max())


MIX_Q, MIX_KV = (0, 1, 15, 16, 17, 48), (0, 20, 15, 33, 17, 90)
PROGRAMS = {
    "decode": Program(seqs=5, rows=6, q_max=1, pages=7),
    "decode_late": Program(seqs=5, rows=6, q_max=1, pages=7, transfers="on_wait"),
    "decode_blocks": Program(seqs=3, rows=3, q_max=1, pages=17, page=128, group=8, kv_heads=1, dtype=jnp.bfloat16),
    "decode_head64": Program(seqs=2, rows=2, q_max=1, pages=6, group=3, kv_heads=3, head_dim=64, dtype=jnp.bfloat16, softcap=5.0),
    "mix": Program(seqs=6, rows=110, q_max=48, pages=6, group=1),
    "mix_late": Program(seqs=6, rows=110, q_max=48, pages=6, group=1, transfers="on_wait"),
    "mix_head64": Program(seqs=6, rows=97, q_max=48, pages=6, group=3, kv_heads=3, head_dim=64, dtype=jnp.bfloat16, softcap=5.0),
    "pages_of_48": Program(seqs=4, rows=250, q_max=144, pages=7, page=48, kv_heads=1),
    "blocks": Program(seqs=3, rows=140, q_max=130, pages=11, page=64, kv_heads=1, group=8, dtype=jnp.bfloat16),
    "sinks_decode": Program(seqs=5, rows=6, q_max=1, pages=7, sinks=4, transfers="on_wait"),
    "sinks_mix": Program(seqs=6, rows=110, q_max=48, pages=6, group=1, sinks=20),
    "sinks_head64": Program(seqs=6, rows=97, q_max=48, pages=6, group=3, kv_heads=3, head_dim=64, dtype=jnp.bfloat16, softcap=5.0, sinks=3),
}
CASES = [
    Case("decode", (1, 1, 0, 1, 1), (1, 16, 0, 37, 33)),
    Case("decode", (1, 1, 1, 0, 1), (100, 21, 70, 5, 112), window=20),
    Case("decode_late", (1, 1, 0, 1, 1), (1, 16, 0, 37, 33)),
    Case("decode_blocks", (1, 0, 1), (1100, 0, 2049)),
    Case("decode_blocks", (1, 1, 1), (1030, 2048, 129), window=300),
    Case("decode_head64", (1, 1), (33, 90)),
    Case("mix", MIX_Q, MIX_KV),
    Case("mix", MIX_Q, MIX_KV, window=24, seed=1),
    Case("mix", MIX_Q[::-1], MIX_KV[::-1], window=1000, seed=2),
    Case("mix", (0,) * 6, MIX_KV),
    Case("mix_late", MIX_Q, MIX_KV, window=24),
    Case("mix_head64", MIX_Q, MIX_KV),
    Case("pages_of_48", (47, 49, 1, 144), (60, 49, 30, 300)),
    Case("blocks", (130, 3, 1), (700, 600, 530)),
    Case("blocks", (3, 130, 1), (513, 650, 530), window=90),
    Case("sinks_decode", (1, 1, 1, 0, 1), (100, 3, 70, 5, 24), window=20),
    Case("sinks_mix", MIX_Q, MIX_KV, window=10),
    Case("sinks_mix", MIX_Q[::-1], MIX_KV[::-1], window=1, seed=1),
    Case("sinks_head64", MIX_Q, MIX_KV, window=24),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.program}-{case.window}-{case.seed}")
def test_matches_oracle(case, capfd):
    program = PROGRAMS[case.program]
    q, k, v, kv, data = build(program, case)
    want = oracle(program, q, k, v, kv, data)
    out, cache = jax.block_until_ready(program.call(q, k, v, kv, **data))
    printed = "".join(capfd.readouterr())
    assert "RACE" not in printed and "non-zero count" not in printed, printed  # races, semaphores
    check_equal(program, (out, cache), want)


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

topology, page, rows, q_max, sinks = sys.argv[1], *map(int, sys.argv[2:])
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
mesh = Mesh(np.array(devices[:1]), ("x",))
shape = lambda dtype, *dims: jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, PartitionSpec()))
i32, bf16, seqs, layers = jnp.int32, jnp.bfloat16, 64, 2

def step(q, k, v, kv, layer, window, table, start, new, total):
    return paged_attention_tpu(q, k, v, kv, layer=layer, page_table=table, q_start=start, q_len=new, kv_len=total,
                               window=window, scale=128**-0.5, q_max=q_max, sinks=sinks, q_sinks=q)

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
@pytest.mark.parametrize(
    ("topology", "page", "rows", "q_max", "sinks"),
    [
        ("v5e:2x2", 16, 64, 1, 0),
        ("v6e:2x2", 128, 64, 1, 4),
        ("v5e:2x2", 128, 256, 256, 0),
        ("v6e:2x2", 16, 256, 256, 0),
        ("v5e:2x2", 16, 256, 256, 4),
        ("tpu7x:2x2x1", 16, 256, 256, 0),
    ],
)
def test_compiles_for_tpu(topology, page, rows, q_max, sinks):
    """Llama-3-8B heads: the cache is aliased, and temporaries do not depend on the number of pages."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", COMPILE, topology, *map(str, (page, rows, q_max, sinks))]
    run = subprocess.run(command, env={**os.environ, **AOT, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
