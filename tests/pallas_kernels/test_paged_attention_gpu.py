"""The GPU paged-attention kernels against the dense float64 oracle: interpreted on a CPU, and on a GPU where there is one."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_paged_attention_tpu import FP8, QUICK, Case, Program, build, check_equal, oracle

from pallas_kernels import paged_attention_gpu as module
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention_gpu import Sizes, decode_sizes, paged_attention_gpu

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

# Three splits and tiles of 16 tokens: small contexts then have splits without keys, blocks at the edges and blocks inside.
SMALL = {"decode": Sizes(block=16, warps=2, stages=3, splits=3), "chunks": Sizes(block=16, warps=4, stages=2, rows=32)}
PROGRAMS = {
    "decode": Program(seqs=6, rows=7, q_max=1, pages=4),
    "decode_mha": Program(seqs=6, rows=6, q_max=1, pages=4, group=1, dtype=jnp.bfloat16),
    "decode_far": Program(seqs=2, rows=2, q_max=1, pages=10, page=64, group=8, kv_heads=1, dtype=jnp.bfloat16, logits=True),
    "decode_head64": Program(seqs=3, rows=3, q_max=1, pages=8, page=8, group=3, kv_heads=3, head_dim=64, dtype=jnp.bfloat16, softcap=5.0),
    "decode_int8": Program(seqs=5, rows=6, q_max=1, pages=4, kv_dtype=jnp.int8, head_dim=64),
    "decode_fp8": Program(seqs=4, rows=5, q_max=1, pages=4, page=48, kv_dtype=FP8, dtype=jnp.bfloat16),
    "mix": Program(seqs=7, rows=100, q_max=48, pages=6, group=4, kv_heads=1),
    "mix_mha": Program(seqs=7, rows=100, q_max=48, pages=6, group=1, head_dim=64, dtype=jnp.bfloat16, softcap=5.0, logits=True),
    "mix_int8": Program(seqs=7, rows=100, q_max=48, pages=6, group=8, kv_heads=1, head_dim=64, dtype=jnp.bfloat16, kv_dtype=jnp.int8),
    "mix_wide_rows": Program(seqs=3, rows=50, q_max=40, pages=8, group=3, kv_heads=1, head_dim=48, lanes=128, page=8),
}
EDGES = (1, 1, 1, 1, 1, 0), (1, 15, 16, 17, 48, 0)  # a page less one, a page, one more, three
MIX_Q, MIX_KV = (0, 1, 15, 16, 17, 1, 48), (0, 20, 15, 33, 17, 1, 90)
CASES = [
    Case("decode", *EDGES),
    Case("decode", (1, 0, 1, 1, 1, 1), (64, 30, 2, 33, 49, 63), window=20),
    Case("decode_mha", *EDGES),
    Case("decode_far", (1, 1), (600, 65), window=130),
    Case("decode_head64", (1, 1, 1), (33, 8, 61)),
    Case("decode_int8", (1, 1, 1, 0, 1), (1, 33, 16, 0, 64)),
    Case("decode_fp8", (1, 1, 1, 1), (49, 96, 40, 145), window=50),
    Case("mix", MIX_Q, MIX_KV),
    Case("mix", MIX_Q[::-1], MIX_KV[::-1], window=24, seed=1),
    Case("mix_mha", MIX_Q, MIX_KV, window=10),
    Case("mix_int8", MIX_Q, MIX_KV, seed=2),
    Case("mix_wide_rows", (9, 1, 40), (20, 60, 60)),
]
name = lambda case: f"{case.program}-{case.window}-{case.seed}"


@functools.cache
def call(program: Program, interpret: bool, tuned: bool = False):
    static = dict(scale=program.head_dim**-0.5, softcap=program.softcap, q_max=program.q_max, sizes=None if tuned else SMALL)
    entry = functools.partial(paged_attention_gpu, **static, interpret=interpret)
    return jax.jit(entry, compiler_options=QUICK if interpret else None)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_matches_oracle(case: Case) -> None:
    program = PROGRAMS[case.program]
    q, k, v, kv, data = build(program, case)
    found = call(program, True)(q, k, v, kv, **data)
    check_equal(program, found, oracle(program, q, k, v, kv, data, found))


@pytest.mark.gpu
@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_matches_oracle_on_gpu(case: Case, tuned: bool) -> None:
    program = PROGRAMS[case.program]
    q, k, v, kv, data = build(program, case)
    found = call(program, False, tuned)(q, k, v, kv, **data)
    check_equal(program, found, oracle(program, q, k, v, kv, data, found))


def check_packed(name: str, q_len, kv_len, pairs: int, interpret: bool) -> None:
    """Rows as a projection leaves them give what they give when they are taken apart and rotated before."""
    program = PROGRAMS[name]
    q, k, v, kv, data = build(program, Case("", q_len, kv_len))
    rng, tokens = np.random.default_rng(1), len(q)
    packed = np.concatenate([np.reshape(q, (tokens, program.kv_heads, -1, program.head_dim)), k[:, :, None], v[:, :, None]], axis=2)
    angle = rng.uniform(0, 6, (tokens, 1, 1, pairs)).astype(np.float32)
    cos, sin = np.cos(angle), np.sin(angle)
    rope = (np.concatenate([cos, cos], 2), np.concatenate([-sin, sin], 2)) if pairs else None
    static = dict(scale=0.2, q_max=program.q_max)
    attend = lambda impl: jax.jit(lambda x, kv, rope, data: paged_attention(x, None, None, kv, rope=rope, impl=impl, **static, **data))
    found = attend("triton-interpret" if interpret else "triton")(packed, kv, rope, data)
    want = attend("reference")(packed, kv, rope, data)
    close = dict(rtol=2e-2, atol=2e-2) if program.dtype == jnp.bfloat16 else dict(rtol=1e-5, atol=2e-5)
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), **close)


PACKED = [("decode", *EDGES, 32), ("decode_head64", (1, 1, 1), (33, 8, 61), 16), ("mix", MIX_Q, MIX_KV, 32), ("mix_mha", MIX_Q, MIX_KV, 0)]


@pytest.mark.parametrize("case", PACKED, ids=lambda case: case[0])
def test_takes_rows_apart_and_rotates_them(case) -> None:
    check_packed(*case, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("case", PACKED, ids=lambda case: case[0])
def test_takes_rows_apart_and_rotates_them_on_gpu(case) -> None:
    check_packed(*case, interpret=False)


@pytest.mark.parametrize("change", [dict(sinks=4), dict(tree=2)])
def test_leaves_what_is_rare_to_the_reference(change: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    program = dataclasses.replace(PROGRAMS["mix"], **change)
    q, k, v, kv, data = build(program, Case("", MIX_Q, MIX_KV, window=60))
    asked = {}
    monkeypatch.setattr(module, "paged_attention_reference", lambda *args, **options: asked.update(options))
    paged_attention_gpu(q, k, v, kv, scale=0.1, q_max=program.q_max, softcap=3.0, sinks=program.sinks, **data)
    given = data | dict(scale=0.1, q_max=program.q_max, softcap=3.0, sinks=program.sinks, batched=True)
    assert set(given) <= set(asked) and all(asked[name] is given[name] for name in given)


def test_own_nan_comes_through() -> None:
    """Of one sequence, in its context or new, and of no other."""
    program = PROGRAMS["mix"]
    q, k, v, kv, data = build(program, Case("", MIX_Q, MIX_KV))
    kv[1, data["page_table"][1, 0], 0, 3] = np.nan
    k[data["q_start"][4] + 5] = np.nan
    out = np.asarray(call(program, True)(q, k, v, kv, **data)[0])
    bad = [data["q_start"][1], *data["q_start"][4] + np.arange(5, 17)]
    assert np.isnan(out[bad]).all() and not np.isnan(np.delete(out, bad, axis=0)).any()


def test_splits_by_static_shapes() -> None:
    """As many programs as fill a GPU, and no split for a context that is not worth one."""
    splits = lambda rows, tokens: decode_sizes(rows, tokens, 8, 4, 128, 2).splits
    assert splits(64, 4096) == 2 and splits(512, 4096) == 1 and splits(1, 300) == 4 and splits(1, 60) == 1
    assert 64 <= splits(1, 32768) <= 32768 // 256


def lowered(program: Program, case: Case):
    """For an H100, whatever is here."""
    q, k, v, kv, data = build(program, case)
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return call(program, False, True).trace(q, k, v, kv, **data).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("program", "kernels"), [("decode", 2), ("decode_int8", 3), ("mix", 4)])
def test_lowers_to_kernels_alone(program: str, kernels: int) -> None:
    """No loop that the host would drive, and as many kernels as there should be."""
    case = next(case for case in CASES if case.program == program)
    text = lowered(PROGRAMS[program], case)
    assert text.count("__gpu$xla.gpu.triton") == kernels and "stablehlo.while" not in text


@pytest.mark.gpu
@pytest.mark.parametrize("program", ["decode", "decode_int8", "mix"])
def test_cache_stays_in_place(program: str) -> None:
    case = next(case for case in CASES if case.program == program)
    q, k, v, kv, data = build(PROGRAMS[program], case)
    entry = functools.partial(paged_attention_gpu, scale=0.1, q_max=PROGRAMS[program].q_max)
    memory = jax.jit(entry, donate_argnums=3).lower(q, k, v, kv, **data).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= kv.nbytes
