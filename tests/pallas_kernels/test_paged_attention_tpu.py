"""The TPU paged-attention kernel against a dense float32 oracle (interpreted), and compiled for real TPU targets."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from tpu_program import run_program

from pallas_kernels.paged_attention_tpu import paged_attention_tpu

LAYERS, LAYER = 2, 1
# Most of a test's time is compilation: a little of the optimization that a run of milliseconds does not need.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
BOUND = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}
FP8 = jnp.float8_e4m3fn


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
    kv_dtype: type | None = None  # int8 or fp8: a cache with scales
    softcap: float | None = None
    sinks: int = 0
    logits: bool = False
    tree: int = 0  # words
    splits: int = 1
    lanes: int = 0  # of a row of the cache, where it is longer than key and value
    transfers: str = "eager"

    @functools.cached_property
    def call(self):
        params = pltpu.InterpretParams(detect_races=True, dma_execution_mode=self.transfers)
        static = dict(scale=self.head_dim**-0.5, softcap=self.softcap, q_max=self.q_max, sinks=self.sinks, kv_splits=self.splits)
        return jax.jit(functools.partial(paged_attention_tpu, **static, with_lse=True, interpret=params), compiler_options=QUICK)


@dataclass(frozen=True)
class Case:
    program: str
    q_len: tuple[int, ...]
    kv_len: tuple[int, ...]
    window: int = 0
    seed: int = 0
    spread: float = 1.0  # of the queries: large ones make scores that grow far beyond the first


def build(program: Program, case: Case) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
    """Arguments of the kernel. Sequences lie in a shuffled order, pages are permuted, everything that nobody owns is NaN."""
    rng, page, heads = np.random.default_rng(case.seed), program.page, program.kv_heads
    pool = program.seqs * program.pages + 3
    draw = lambda *shape: rng.standard_normal(shape, np.float32).astype(program.dtype)
    starts = np.zeros(program.seqs, np.int32)
    gaps = rng.multinomial(program.rows - sum(case.q_len), np.full(program.seqs + 1, 1 / (program.seqs + 1)))
    at = 0
    for r in rng.permutation(program.seqs):
        starts[r] = at + gaps[r]
        at = starts[r] + case.q_len[r]
    q = draw(program.rows, program.group * heads, program.head_dim) * np.asarray(case.spread, program.dtype)
    k, v = draw(program.rows, heads, program.head_dim), draw(program.rows, heads, program.head_dim)
    kind = program.kv_dtype or q.dtype
    cached = (lambda *shape: rng.integers(-127, 128, shape)) if kind == jnp.int8 else lambda *shape: draw(*shape).astype(np.float32)
    width = program.lanes or 2 * program.head_dim
    kv = np.full((LAYERS, pool, heads, page, width), 77 if kind == jnp.int8 else np.nan, kind)
    scales = np.full((LAYERS, pool, 2 * heads), np.nan, np.float32)
    order, table = rng.permutation(pool), rng.integers(0, pool, (program.seqs, program.pages), dtype=np.int32)
    for r, (new, total) in enumerate(zip(case.q_len, case.kv_len, strict=True)):
        low = max(0, total - new - case.window + 1) if case.window else 0
        kept = range(min(low // page, math.ceil(program.sinks / page)))
        for j in (*kept, *range(low // page, math.ceil(total / page))):  # entries of pages that fell out of the window stay arbitrary
            table[r, j] = order[r * program.pages + j]
            rows = max(0, min(page, total - new - j * page))
            kv[:, table[r, j], :, :rows] = 0
            kv[:, table[r, j], :, :rows, : 2 * program.head_dim] = cached(LAYERS, heads, rows, 2 * program.head_dim)
            if rows:
                scales[:, table[r, j]] = rng.uniform(0.3, 1.5, (LAYERS, 2 * heads)) / (60 if kind == jnp.int8 else 1)
    data = dict(q_start=starts, q_len=np.array(case.q_len, np.int32), kv_len=np.array(case.kv_len, np.int32))
    if program.sinks:
        data["q_sinks"] = draw(*q.shape)
    if program.logits:
        data["sink_logits"] = rng.standard_normal(program.group * heads).astype(np.float32)
    if program.tree:
        data["tree"] = random_trees(rng, program, starts, case.q_len)
    if program.kv_dtype:
        data["kv_scale"] = scales
    return q, k, v, kv, dict(layer=np.int32(LAYER), window=np.int32(case.window), page_table=table, **data)


def random_trees(rng, program: Program, starts, q_len):
    """Words of a random tree for each sequence: a node's parent is any node before it."""
    words = rng.integers(-(2**31), 2**31, (program.rows, program.tree), dtype=np.int32)
    for start, new in zip(starts, q_len, strict=True):
        seen = np.zeros((new, 32 * program.tree), bool)
        for j in range(new):
            if j:
                seen[j] = seen[rng.integers(max(0, j - 3), j)]
            seen[j, j] = True
        words[start : start + new] = np.packbits(seen, axis=1, bitorder="little").view("<i4")
    return words


def write(program: Program, k, v, kv, data):
    """The cache with the new rows, and with scales for them: (kv, scales)."""
    cache, scales = kv.copy(), None
    rows = np.concatenate([k, v], axis=-1)
    if program.kv_dtype:
        scales = data["kv_scale"].copy()
        most = 127 if program.kv_dtype == jnp.int8 else 448
        rounded = (lambda x: np.rint(x)) if program.kv_dtype == jnp.int8 else lambda x: x
    for r, table in enumerate(data["page_table"]):
        start, new, context = data["q_start"][r], data["q_len"][r], data["kv_len"][r] - data["q_len"][r]
        positions = context + np.arange(new)
        for page in sorted(set(positions // program.page)):
            here = positions[positions // program.page == page]
            place, found = table[page], rows[start + here - context]  # [n, Hkv, 2D]
            if program.kv_dtype:
                both = found.astype(np.float32).reshape(len(here), program.kv_heads, 2, -1)
                need = np.abs(both).max(axis=(0, 3)).reshape(-1) / np.float32(most)
                old, kept = scales[LAYER, place].copy(), max(0, context - page * program.page)
                scales[LAYER, place] = np.maximum(old, need) if kept else need
                lanes = lambda x: x.reshape(-1, 2).repeat(program.head_dim, axis=1)[:, None]
                if kept:
                    was = cache[LAYER, place, :, :kept, : 2 * program.head_dim].astype(np.float32)
                    cache[LAYER, place, :, :kept, : 2 * program.head_dim] = rounded(was * lanes(old / scales[LAYER, place])).astype(
                        cache.dtype
                    )
                found = rounded(found.astype(np.float32) / lanes(scales[LAYER, place])[:, 0]).astype(cache.dtype)
            cache[LAYER, place][:, here % program.page] = 0
            cache[LAYER, place][:, here % program.page, : 2 * program.head_dim] = found.swapaxes(0, 1)
    return cache, scales


def unpacked(program: Program, cache, scales):
    """A cache in float64, [P, Hkv, page, 2D]."""
    true = cache[LAYER, ..., : 2 * program.head_dim].astype(np.float64)
    if scales is not None:
        true = true * scales[LAYER].reshape(*scales.shape[1:2], -1, 2).repeat(program.head_dim, axis=2)[:, :, None]
    return true


def oracle(program: Program, q, k, v, kv, data, found=None):
    """Dense attention in float64, one sequence at a time: (out, cache, scales, sums). found: results whose cache is looked at in the place
    of this one's where it has scales: numbers that were rounded the other way are compared by check_equal, and not once more."""
    out, lse = np.zeros(q.shape, np.float32), np.full(q.shape[:2], -np.inf, np.float32)
    cache, scales = write(program, k, v, kv, data)
    true = unpacked(program, *(np.asarray(found[1]), np.asarray(found[2])) if found and program.kv_dtype else (cache, scales))
    for r, table in enumerate(data["page_table"]):
        new, total = data["q_len"][r], data["kv_len"][r]
        if not new:
            continue
        mine = slice(data["q_start"][r], data["q_start"][r] + new)
        recent, early = seen_keys(program, mine, new, total, data)
        either = (recent | early).any(axis=0)
        at = np.arange(total)
        rows = np.where(either[:, None, None], true[table[at // program.page], :, at % program.page], 0)  # [keys, heads, lanes]
        keys, values = (rows[..., i * program.head_dim :][..., : program.head_dim].transpose(1, 2, 0) for i in (0, 1))
        scores = score(program, q[mine], keys)
        if program.sinks:
            scores = np.where(early, score(program, data["q_sinks"][mine], keys), scores)
        scores = np.where(recent | early, scores, -np.inf)
        extra = data["sink_logits"][:, None, None].astype(np.float64) if program.logits else np.full((len(scores), 1, 1), -np.inf)
        top = np.maximum(scores.max(axis=2, keepdims=True), extra)
        weights = np.exp(scores - top)
        sums = weights.sum(axis=2, keepdims=True) + np.exp(extra - top)
        out[mine] = np.matmul(weights / sums, values.swapaxes(1, 2).repeat(program.group, axis=0)).swapaxes(0, 1)
        lse[mine] = (top + np.log(sums))[..., 0].T
    return out, cache, scales, lse


def score(program: Program, q, keys):
    """Scores [Hq, rows, keys] of q [rows, Hq, D] and keys [Hkv, D, keys]."""
    scores = np.matmul(q.astype(np.float64).swapaxes(0, 1), keys.repeat(program.group, axis=0)) * program.head_dim**-0.5
    return np.tanh(scores / program.softcap) * program.softcap if program.softcap else scores


def seen_keys(program: Program, mine: slice, new: int, total: int, data):
    """Which keys [rows, keys] the new rows of a sequence see, and which of its first keys they see although their window left them."""
    context, at, window = total - new, np.arange(total), data["window"]
    pos = context + np.arange(new)[:, None]
    before, always = at <= pos, np.zeros((new, total), bool)
    if program.tree and new > 1:
        bits = np.unpackbits(data["tree"][mine].view(np.uint8), axis=1, bitorder="little")[:, :new].astype(bool)
        pos = context + bits.sum(axis=1, keepdims=True) - 1
        before, always[:, context:] = at < context, bits
    low = np.maximum(0, pos - window + 1) if window else np.zeros_like(pos)
    return before & (at >= low) | always, (at < program.sinks) & (at < low)


def check_equal(program: Program, found, want, spread=1.0) -> tuple[float, float]:
    """found and want: (out, cache, scales, sums); the whole cache to the bit (with scales: a rounding may fall the other way), the output
    within the bound of its type, times the spread of the queries: that is how far the scores' own rounding goes. Returns the largest
    errors of the output and of the sums, relative to the largest value where that is above 1."""
    steps = np.abs(np.asarray(found[1], np.float32) - want[1].astype(np.float32))
    if program.kv_dtype:
        assert (np.isnan(steps) == np.isnan(want[1].astype(np.float32))).all()
        assert np.nanmax(steps) <= (1 if program.kv_dtype == jnp.int8 else 32) and np.nanmean(steps > 0) < 1e-3
        np.testing.assert_allclose(found[2], want[2], rtol=1e-6)
    else:
        np.testing.assert_array_equal(np.asarray(found[1], np.float32), want[1].astype(np.float32))
    assert found[0].dtype == program.dtype
    bound = spread * BOUND[program.dtype]
    rows = np.isfinite(want[3])
    assert (np.isneginf(found[3]) == ~rows).all()
    relative = lambda x, y: float(np.abs(np.asarray(x, np.float32) - y).max(initial=0) / max(1.0, np.abs(y).max(initial=0)))
    errors = relative(found[0], want[0]), relative(np.asarray(found[3])[rows], want[3][rows])
    assert all(error <= bound for error in errors), errors  # NaN is not
    return errors


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
    "far": Program(seqs=2, rows=140, q_max=130, pages=11, page=64, kv_heads=1, group=2),
    "logits": Program(seqs=6, rows=110, q_max=48, pages=6, group=2, logits=True),
    "tree": Program(seqs=4, rows=90, q_max=40, pages=8, group=3, kv_heads=1, tree=2),
    "int8": Program(seqs=6, rows=110, q_max=48, pages=6, page=32, group=1, kv_dtype=jnp.int8, transfers="on_wait"),
    "int8_decode": Program(seqs=4, rows=5, q_max=1, pages=4, page=32, kv_dtype=jnp.int8),
    "fp8": Program(seqs=6, rows=97, q_max=48, pages=6, page=16, group=2, head_dim=64, dtype=jnp.bfloat16, kv_dtype=FP8),
    "head80": Program(seqs=6, rows=97, q_max=48, pages=6, group=2, head_dim=80, lanes=256, dtype=jnp.bfloat16),
    "head256": Program(seqs=4, rows=60, q_max=40, pages=8, group=2, kv_heads=1, head_dim=256),
    "splits": Program(seqs=3, rows=4, q_max=1, pages=9, page=128, group=8, kv_heads=1, dtype=jnp.bfloat16, splits=2),
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
    Case("far", (130, 3), (700, 600)),
    Case("far", (3, 130), (690, 700), spread=300.0),
    Case("logits", MIX_Q, MIX_KV),
    Case("logits", MIX_Q, MIX_KV, window=10),
    Case("tree", (40, 7, 1, 33), (128, 20, 30, 33)),
    Case("tree", (40, 7, 1, 33), (100, 7, 30, 90), window=40),
    Case("int8", MIX_Q, MIX_KV),
    Case("int8", MIX_Q[::-1], MIX_KV[::-1], window=24, seed=1),
    Case("int8_decode", (1, 1, 0, 1), (1, 33, 0, 100)),
    Case("int8_decode", (1, 1, 1, 1), (32, 64, 100, 128), window=40),
    Case("fp8", MIX_Q, MIX_KV, window=30),
    Case("head80", MIX_Q, MIX_KV),
    Case("head256", (40, 0, 1, 9), (100, 0, 128, 9)),
    Case("splits", (1, 0, 1), (1030, 0, 1150)),
    Case("splits", (1, 1, 1), (1, 1025, 900), window=300),
    Case("sinks_decode", (1, 1, 1, 0, 1), (100, 3, 70, 5, 24), window=20),
    Case("sinks_mix", MIX_Q, MIX_KV, window=10),
    Case("sinks_mix", MIX_Q[::-1], MIX_KV[::-1], window=1, seed=1),
    Case("sinks_head64", MIX_Q, MIX_KV, window=24),
]


# Others cost a compilation each and have their like in test_kernel_grid.py; the reference is held against all of them.
INTERPRETED = ("decode_blocks", "mix", "far")


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.program in INTERPRETED], ids=lambda case: f"{case.program}-{case.window}-{case.seed}"
)
def test_matches_oracle(case, capfd):
    program = PROGRAMS[case.program]
    q, k, v, kv, data = build(program, case)
    found = jax.block_until_ready(program.call(q, k, v, kv, **data))
    want = oracle(program, q, k, v, kv, data, found)
    printed = "".join(capfd.readouterr())
    assert "RACE" not in printed and "non-zero count" not in printed, printed  # races, semaphores
    check_equal(program, found, want, case.spread)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kv=(1, 4, 2, 16, 240)), "kv has shape"),
        (dict(q=(4, 4, 24)), "head_dim 24"),
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
                               window=window, scale=128**-0.5, q_max=q_max, sinks=sinks, q_sinks=q)[:2]

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
    run_program(COMPILE, topology, page, rows, q_max, sinks)
