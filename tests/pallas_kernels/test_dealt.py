"""A context whose pages are dealt out to several caches: what each finds, merged, is what one cache with all pages finds; and each new row
is written once, where its page is."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_program import run_program

from pallas_kernels.dealt import held, is_held, position_of
from pallas_kernels.paged_attention import paged_attention

PAGE, PAGES, SEQS, DIM, LAYERS, LAYER = 16, 12, 4, 64, 2, 1
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# (q_len, kv_len): a chunk at the start, one behind others that ends within a page, single tokens, nobody.
MIXED = [((37, 1, 20, 0), (37, 150, 131, 0)), ((1, 1, 1, 70), (16, 17, 1, 70)), ((2, 33, 16, 16), (2, 192, 16, 48))]
DECODE = [((1, 1, 1, 0), (1, 16, 17, 0)), ((1, 1, 1, 1), (192, 33, 48, 100))]


@pytest.mark.parametrize("ways", [1, 2, 3])
def test_places_and_positions(ways: int) -> None:
    position = np.arange(200)
    for turn in range(ways):
        dealt = (ways, np.int32(turn))
        own = position[np.asarray(is_held(position, PAGE, dealt))]
        np.testing.assert_array_equal(np.asarray(position_of(np.arange(len(own)), PAGE, dealt)), own)
        np.testing.assert_array_equal(np.asarray(held(position, PAGE, dealt)), [(own < end).sum() for end in position])


@functools.cache
def call(impl: str, q_max: int, ways: int, **more: Any) -> Any:
    def run(q, k, v, kv, turn, rows, scale):
        asked: Any = dict(layer=jnp.int32(LAYER), window=jnp.int32(0), scale=DIM**-0.5, q_max=q_max, with_lse=True, impl=impl, **more)
        return paged_attention(q, k, v, kv, **asked, **rows, kv_scale=scale, dealt=None if turn is None else (ways, turn))

    return jax.jit(run, compiler_options=QUICK)


def build(q_len: tuple[int, ...], kv_len: tuple[int, ...], q_max: int, kind: Any, heads: tuple[int, int]) -> tuple[Any, ...]:
    """q, k, v, the pages of all sequences by position [SEQS, L, PAGES, Hkv, PAGE, 2 * D] with NaN where nothing is yet, scales, rows."""
    rng, tokens = np.random.default_rng(sum(kv_len)), SEQS if q_max == 1 else 96
    q, k, v = (rng.standard_normal((tokens, each, DIM), np.float32) for each in (heads[0], heads[1], heads[1]))
    shape = (SEQS, LAYERS, PAGES, heads[1], PAGE, 2 * DIM)
    pages = rng.integers(-127, 128, shape).astype(np.int8) if kind == jnp.int8 else rng.standard_normal(shape, np.float32)
    scales = rng.uniform(0.005, 0.03, (SEQS, LAYERS, PAGES, 2 * heads[1])).astype(np.float32) if kind == jnp.int8 else None
    for r in range(SEQS):
        at = np.arange(PAGES * PAGE).reshape(PAGES, PAGE)
        pages[r] = np.where((at >= kv_len[r] - q_len[r])[:, None, :, None], 77 if kind == jnp.int8 else np.nan, pages[r])
    starts = np.arange(SEQS) if q_max == 1 else np.cumsum([0, *q_len[:-1]]) + 2
    rows = dict(q_start=starts.astype(np.int32), q_len=np.array(q_len, np.int32), kv_len=np.array(kv_len, np.int32))
    return q, k, v, pages, scales, rows


def deal(pages: np.ndarray, ways: int, turn: np.ndarray, rng: Any, empty: Any) -> tuple[Any, Any]:
    """(pool [L, P, ...], page table) of the pages numbered turn, turn + ways, ... of each sequence; what nobody owns is `empty`."""
    entries = -(-PAGES // ways)
    ids = 2 + rng.permutation(SEQS * entries).reshape(SEQS, entries)
    pool = np.full((LAYERS, 2 + SEQS * entries, *pages.shape[3:]), empty, pages.dtype)
    for r in range(SEQS):
        for entry, number in enumerate(range(turn[r], PAGES, ways)):
            pool[:, ids[r, entry]] = pages[r][:, number]
    return pool, ids.astype(np.int32)


def together(impl: str, q_max: int, ways: int, case: Any, kind: Any = jnp.float32, heads: Any = (4, 2), **more: Any) -> None:
    """Compares `ways` caches by `impl` with one by the reference."""
    q, k, v, pages, scales, rows = build(*case, q_max, kind, heads)
    rng, first = np.random.default_rng(ways), np.array([0, 1, 2, 5]) % ways
    nothing = 77 if kind == jnp.int8 else np.nan
    pool, table = deal(pages, 1, np.zeros(SEQS, int), rng, nothing)
    scale = None if scales is None else deal(scales, 1, np.zeros(SEQS, int), np.random.default_rng(ways), np.nan)[0]
    wanted, whole, *_, sums = call("reference", q_max, 1)(q, k, v, pool, None, rows | dict(page_table=table), scale)
    outs, lses = [], []
    for rank in range(ways):
        turn = ((rank - first) % ways).astype(np.int32)
        rng = np.random.default_rng(rank)
        pool, own = deal(pages, ways, turn, rng, nothing)
        scale = None if scales is None else deal(scales, ways, turn, np.random.default_rng(rank), np.nan)[0]
        out, kv, *_, lse = call(impl, q_max, ways, **more)(q, k, v, pool, turn, rows | dict(page_table=own), scale)
        for r in range(SEQS):
            for entry, number in enumerate(range(turn[r], PAGES, ways)):
                np.testing.assert_array_equal(kv[:, own[r, entry]], whole[:, table[r, number]], err_msg=f"page {number} of {r} on {rank}")
        np.testing.assert_array_equal(np.asarray(kv)[:, :2], np.full_like(pool[:, :2], nothing))
        outs.append(np.where(np.isneginf(lse)[..., None], 0, out))
        lses.append(lse)
    top = np.max(lses, axis=0)
    weights = np.exp(np.array(lses) - np.where(np.isneginf(top), 0, top))
    total = weights.sum(0)
    live = np.zeros(len(q), bool)
    for start, count in zip(rows["q_start"], rows["q_len"], strict=True):
        live[start : start + count] = True
    assert (total[live] > 0).all() and not total[~live].any()
    found = sum(w[..., None] * out for w, out in zip(weights, outs, strict=True))[live] / total[live][..., None]
    np.testing.assert_allclose(found, np.asarray(wanted)[live], atol=5e-6)
    np.testing.assert_allclose((top + np.log(np.where(live[:, None], total, 1)))[live], np.asarray(sums)[live], atol=5e-6)


def test_reference() -> None:
    for case in MIXED:
        together("reference", 96, 3, case, debug=True)
    for case in DECODE:
        together("batched", 1, 2, case, debug=True)


def test_reference_with_scales() -> None:
    for case in MIXED:
        together("reference", 96, 3, case, jnp.int8)


@pytest.mark.parametrize("q_max", [pytest.param(96, marks=pytest.mark.tpu_compile), 1])
def test_tpu_kernel(q_max: int) -> None:
    """Interpreted: chunks and single tokens; contexts of which a device holds nothing. That of tiles has one head: it compiles long."""
    for case in MIXED if q_max > 1 else DECODE:
        together("interpret", q_max, 3, case, heads=(2, 1) if q_max > 1 else (4, 2))


COMPILE = """
import functools, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from pallas_kernels.paged_attention import paged_attention
from sharding.sequence import merge_over

topology, rows, q_max = sys.argv[1], *map(int, sys.argv[2:])
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
mesh = Mesh(np.array(devices[:4]), ("sp",))
shape = lambda dtype, *dims, over=P(): jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, over))
i32, bf16, seqs = jnp.int32, jnp.bfloat16, 16
pages, each, every = P(None, "sp"), P("sp"), P()

def step(q, k, v, kv, table, turn, start, new, total):
    rows = dict(page_table=table[0], q_start=start, q_len=new, kv_len=total)
    out, kv, lse = paged_attention(q, k, v, kv, layer=jnp.int32(1), window=jnp.int32(0), scale=0.1, q_max=q_max, **rows,
                                   dealt=(4, turn[0]), with_lse=True, impl="pallas")
    return merge_over(out, lse, "sp")[0], kv

specs = dict(in_specs=(every, every, every, pages, each, each, every, every, every), out_specs=(every, pages))
temporaries = []
for pool in (2048, 4096):
    kv = shape(bf16, 2, pool, 8, 16, 256, over=pages)
    args = [shape(bf16, rows, 32, 128), *[shape(bf16, rows, 8, 128)] * 2, kv, shape(i32, 4, seqs, 256, over=each)]
    args += [shape(i32, 4, seqs, over=each), *[shape(i32, seqs)] * 3]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        run = jax.jit(jax.shard_map(step, mesh=mesh, **specs, check_vma=False), donate_argnums=3)
        memory = run.lower(*args).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= kv.size * 2 // 4, memory
    temporaries.append(memory.temp_size_in_bytes)
assert temporaries[1] - temporaries[0] < 0.01 * kv.size * 2 // 4, temporaries
"""


@pytest.mark.tpu_compile
@pytest.mark.parametrize(("topology", "rows", "q_max"), [("v5e:2x2", 16, 1), ("v6e:2x2", 128, 128)])
def test_compiles_for_four_tpus(topology: str, rows: int, q_max: int) -> None:
    """A quarter of the cache on each, updated in place, whatever its size; what each finds is merged."""
    run_program(COMPILE, topology, rows, q_max)


def test_what_cannot_be_dealt_out() -> None:
    q, k, v, pages, _, rows = build(*DECODE[0], 1, jnp.float32, (4, 2))
    pool, table = deal(pages, 1, np.zeros(SEQS, int), np.random.default_rng(0), np.nan)
    asked: Any = dict(layer=0, window=0, scale=1.0, q_max=1, page_table=table, **rows)
    with pytest.raises(ValueError, match=r"^dealt: what is found has to be merged: needs with_lse, and no sinks"):
        paged_attention(q, k, v, pool, dealt=(2, np.zeros(SEQS, np.int32)), **asked)
    with pytest.raises(ValueError, match=r"^dealt: ways 2 must be 1 or more, and turn \(3,\) must be \[4\], as page_table$"):
        paged_attention(q, k, v, pool, dealt=(2, np.zeros(3, np.int32)), with_lse=True, **asked)
