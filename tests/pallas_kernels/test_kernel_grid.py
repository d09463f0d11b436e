"""A sample of kernel_grid.py in which any two values of its factors meet, and sequences that cannot be, in debug mode."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_grid import GRID, OPTIONS, WINDOWS, case_of, legal, pairwise, program_of, run, whole
from test_paged_attention_tpu import LAYER, Case, Program, build

from pallas_kernels.paged_attention import paged_attention

SAMPLE = pairwise()


@pytest.mark.parametrize("number", range(len(SAMPLE)), ids=lambda n: "-".join(str(x) for x in SAMPLE[n].values()))
def test_sample(number: int) -> None:
    shape = SAMPLE[number]
    program = program_of(shape)
    run(shape, program, case_of(shape, shape["window"], number), None if shape["page"] == 256 else 32)
    program.call.clear_cache()


def test_sample_is_pairwise() -> None:
    factors = GRID | OPTIONS | {"window": WINDOWS}
    for a, b in itertools.combinations(factors, 2):
        want = {(x, y) for x, y in itertools.product(factors[a], factors[b]) if legal({a: x, b: y})}
        assert want == {(shape[a], shape[b]) for shape in SAMPLE}, (a, b)
    assert len(SAMPLE) <= 200
    assert {tuple(shape[name] for name in GRID) for shape in whole()} == {
        x for x in itertools.product(*GRID.values()) if legal(dict(zip(GRID, x)))
    }


DEBUG = Program(seqs=6, rows=12, q_max=4, pages=4, group=2, kv_heads=1)


@functools.cache
def debug_call(impl: str):
    return jax.jit(functools.partial(paged_attention, scale=0.1, q_max=DEBUG.q_max, debug=True, impl=impl))


@pytest.mark.parametrize("impl", ["reference", "interpret"])
def test_debug_touches_no_sequence_that_cannot_be(impl: str) -> None:
    """Sequences 0 to 4 are wrong, each in its own way; 5 is as if it were alone."""
    q, k, v, kv, data = build(DEBUG, Case("", (1, 2, 1, 2, 1, 4), (20, 30, 40, 33, 9, 50)))
    alone = data | {"q_len": np.where(np.arange(6) == 5, data["q_len"], 0)}
    table, total, new, start = (data[name].copy() for name in ("page_table", "kv_len", "q_len", "q_start"))
    table[0, 1], table[1, 0] = len(kv[0]), -1
    total[2] = 4 * DEBUG.page + 1
    total[3] = 1  # fewer than are new
    start[4] = DEBUG.rows
    broken = data | dict(page_table=table, kv_len=total, q_len=new, q_start=start)
    call = debug_call(impl)
    (want, cache), (out, found) = call(q, k, v, kv, **alone), call(q, k, v, kv, **broken)
    mine = slice(start[5], start[5] + new[5])
    np.testing.assert_array_equal(out[mine], want[mine])
    assert np.isfinite(out[mine]).all()
    assert np.isnan(np.asarray(out)[start[:4]]).all()
    assert all(np.isnan(out[at : at + rows]).all() for at, rows in zip(start[:4], new[:4], strict=True))
    np.testing.assert_array_equal(found, cache)
    changed = (np.asarray(found) != kv) & ~(np.isnan(found) & np.isnan(kv))
    assert set(np.unique(np.nonzero(changed)[1])) == {data["page_table"][5, 2], data["page_table"][5, 3]} and changed[LAYER].any()


@pytest.mark.parametrize("impl", ["reference", "interpret"])
def test_debug_takes_no_negative_window(impl: str) -> None:
    q, k, v, kv, data = build(DEBUG, Case("", (1, 2, 1, 2, 1, 4), (20, 30, 40, 33, 9, 50)))
    out, found = debug_call(impl)(q, k, v, kv, **(data | {"window": jnp.int32(-1)}))
    assert np.isnan(np.asarray(out)[data["q_start"]]).all()
    np.testing.assert_array_equal(found, kv)
