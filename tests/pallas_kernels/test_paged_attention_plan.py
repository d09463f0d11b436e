"""Sizes of the TPU's paged attention: what tuned.toml has for a shape is used, is legal, and changes nothing that is computed."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from test_paged_attention_tpu import QUICK, Case, Program, build, check_equal, oracle

from pallas_kernels import paged_attention_plan, paged_attention_tpu, tuning
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention_plan import MOST_VMEM_BYTES, make_plan, tuned_blocks, vmem_bytes

bf16 = jnp.bfloat16


def shapes(entry: dict, dtype=bf16) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """q and kv of an entry's shape."""
    heads, dim = entry["kv_heads"], entry["head_dim"]
    row = -(-2 * dim // 128) * 128
    shape = jax.ShapeDtypeStruct
    return shape((2048, heads * entry["group"], dim), dtype), shape((1, 64, heads, entry["page"], row), jnp.dtype(entry["dtype"]))


@pytest.mark.parametrize("entry", tuning.entries(tuning.FILE).get("paged_attention", []), ids=lambda entry: str(list(entry.values())))
def test_tuned_blocks_are_legal_and_used(entry: dict) -> None:
    q_max, (q, kv) = 1 if entry["kind"] == "decode" else 512, shapes(entry)
    assert set(entry["blocks"]) <= ({"block_k"} if q_max == 1 else {"block_k", "piece", "tile"})
    sizes = tuned_blocks(entry["chip"], q, kv, q_max)
    plan = make_plan(q, kv, 1024, q_max, None, 0, sizes)
    assert sizes == entry["blocks"] and plan.block == sizes.get("block_k", plan.block) and plan.tile == sizes.get("tile", plan.tile)
    assert plan.piece == sizes.get("piece", plan.piece) and vmem_bytes(plan, kv.dtype.itemsize) <= MOST_VMEM_BYTES


def test_blocks_come_from_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each of the two kernels by itself, not for float32 nor without a chip; what does not fit VMEM is made smaller."""
    asked = []

    def lookup(op, chip, **about):
        asked.append((op, chip, about))
        return dict(block_k=256) if about["kind"] == "decode" else dict(block_k=512, piece=256, tile=64)

    monkeypatch.setattr(paged_attention_plan, "lookup", lookup)
    about = dict(kv_heads=8, group=4, head_dim=128, page=16, dtype="bfloat16")
    q, kv = shapes(about)
    assert tuned_blocks("v6e", q, kv, 1) == dict(block_k=256) and tuned_blocks("v6e", q, kv, 9)["tile"] == 64
    assert asked == [("paged_attention", "v6e", dict(kind=kind, **about)) for kind in ("decode", "tiles")]
    assert tuned_blocks(None, q, kv, 1) == tuned_blocks("v6e", *shapes(about, jnp.float32), 1) == {} and len(asked) == 2
    tiles = make_plan(q, kv, 1024, 512, None, 0, tuned_blocks("v6e", q, kv, 512))
    assert (tiles.block, tiles.piece, tiles.tile) == (512, 256, 64)
    assert make_plan(q, kv, 1024, 1, None, 0, dict(block_k=1 << 14)).block < 1 << 14


def test_given_blocks_are_used_and_change_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the public entry, interpreted: blocks that are given are those of the kernel of q_max, not of the decode kernel beside it."""
    plans = []
    monkeypatch.setattr(paged_attention_tpu, "make_plan", lambda *args: plans.append(make_plan(*args)) or plans[-1])
    program = Program(seqs=2, rows=24, q_max=20, pages=20, group=2, dtype=jnp.bfloat16)
    arrays = *args, data = build(program, Case("", (20, 1), (300, 290)))
    static = dict(scale=program.head_dim**-0.5, q_max=program.q_max, with_lse=True, impl="interpret")
    static["blocks"] = dict(block_k=256, piece=64, tile=16)
    out, kv, lse = jax.jit(functools.partial(paged_attention, **static), compiler_options=QUICK)(*args, **data)
    check_equal(program, (out, kv, None, lse), oracle(program, *arrays, (out, kv, None, lse)))
    assert [(plan.tile, plan.block, plan.decode or plan.piece) for plan in plans] == [(16, 256, 64), (1, 320, True)]
