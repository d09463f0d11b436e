"""Flash attention against a dense float64 oracle: the reference, and the TPU kernel interpreted and compiled."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from tpu_program import run_program

from pallas_kernels import tuning
from pallas_kernels.flash_attention import OTHER_VMEM, VMEM, flash_attention
from pallas_kernels.flash_attention_tpu import clip_blocks, default_blocks, flash_attention_tpu, make_plan, vmem_bytes

SMALL = {"step": 128, "block_q": 256, "block_k": 256}
BOUND = {"float32": 1e-5, "bfloat16": 1e-2}


@dataclass(frozen=True)
class Case:
    tokens: int
    keys: int
    heads: int
    kv_heads: int
    dim: int
    lengths: tuple[int, ...]  # one a sequence
    window: int = 0
    dtype: str = "float32"
    softcap: float | None = None
    causal: bool = True
    sinks: bool = False
    loud: int = -1  # a key that outshouts all others
    transfers: Literal["eager", "on_wait"] = "eager"


CASES = [
    Case(600, 600, 2, 1, 128, (600, 0)),
    Case(600, 600, 2, 1, 128, (600, 130), transfers="on_wait"),
    Case(600, 600, 2, 1, 128, (383, 600), window=300),
    Case(600, 600, 2, 1, 128, (600, 511), loud=3),
    Case(130, 300, 3, 3, 64, (300, 171), dtype="bfloat16", sinks=True),  # a diagonal that lies athwart
    Case(130, 300, 3, 3, 64, (300, 171), window=7, dtype="bfloat16", sinks=True),
    Case(200, 200, 2, 2, 80, (200, 1), softcap=3.0, sinks=True),
    Case(256, 512, 8, 2, 256, (512,), dtype="bfloat16"),
    Case(300, 512, 2, 1, 96, (512, 300), causal=False),
    Case(300, 512, 2, 1, 96, (512, 300), causal=False, loud=500, transfers="on_wait"),
]


def build(case: Case):
    """Arguments, NaN where no query may look; and the oracle's (out, lse)."""
    rng, batch = np.random.default_rng(CASES.index(case)), len(case.lengths)
    draw = lambda *shape: np.array(jnp.asarray(rng.standard_normal(shape), case.dtype))
    q = draw(batch, case.tokens, case.heads, case.dim)
    k, v = (draw(batch, case.keys, case.kv_heads, case.dim) for _ in "kv")
    if case.loud >= 0:
        k[:, case.loud] *= 60
    for b, length in enumerate(case.lengths):
        k[b, length:], v[b, length:], q[b, max(0, length - case.keys + case.tokens) :] = np.nan, np.nan, np.nan
    sinks = rng.standard_normal(case.heads).astype(np.float32) * 4 if case.sinks else None
    out, lse = np.zeros(q.shape), np.full((batch, case.heads, case.tokens), -np.inf)
    group = case.heads // case.kv_heads
    for b, h, i in np.ndindex(batch, case.heads, case.tokens):
        pos, length = case.keys - case.tokens + i, case.lengths[b]
        if pos >= length:
            continue
        seen = slice(max(0, pos - case.window + 1) if case.window else 0, min(pos + 1, length) if case.causal else length)
        scores = k[b, seen, h // group].astype(np.float64) @ q[b, i, h].astype(np.float64) * case.dim**-0.5
        scores = scores if case.softcap is None else np.tanh(scores / case.softcap) * case.softcap
        every = scores if sinks is None else np.append(scores, sinks[h])
        lse[b, h, i] = every.max() + np.log(np.exp(every - every.max()).sum())
        out[b, i, h] = np.exp(scores - lse[b, h, i]) @ v[b, seen, h // group].astype(np.float64)
    data = dict(
        lengths=jnp.array(case.lengths, jnp.int32), window=jnp.int32(case.window), sinks=None if sinks is None else jnp.asarray(sinks)
    )
    return map(jnp.asarray, (q, k, v)), data, (out, lse)


def check_equal(case: Case, found, want):
    (out, lse), bound = (np.asarray(x, np.float64) for x in found), BOUND[case.dtype]
    assert found[0].dtype == case.dtype and found[1].dtype == np.float32
    assert np.abs(out - want[0]).max() <= bound * max(1.0, np.abs(want[0]).max())
    real = np.isfinite(want[1])
    assert (np.isfinite(lse) == real).all()
    assert np.abs(lse[real] - want[1][real]).max() <= bound * max(1.0, np.abs(want[1][real]).max())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle(case: Case, capfd: pytest.CaptureFixture) -> None:
    (q, k, v), data, want = build(case)
    static = dict(scale=case.dim**-0.5, softcap=case.softcap, causal=case.causal)
    check_equal(case, flash_attention(q, k, v, **data, **static, return_lse=True), want)
    plan = make_plan(q, k, SMALL, case.softcap, case.causal, case.sinks, True, 16 << 20)
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode=case.transfers)
    rest = (data["lengths"], data["window"], static["scale"], data["sinks"], params)
    found = jax.block_until_ready(flash_attention_tpu(plan, q, k, v, *rest))
    printed = "".join(capfd.readouterr())
    assert "RACE" not in printed and "non-zero count" not in printed, printed
    check_equal(case, found, want)


def test_the_public_entry_runs_the_kernel_and_its_default_blocks() -> None:
    draw = lambda *shape: jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)
    args = (draw(1, 40, 4, 128), draw(1, 40, 1, 128), draw(1, 40, 1, 128))
    attend = functools.partial(flash_attention, *args, scale=0.1)
    np.testing.assert_allclose(attend(impl="interpret"), attend(), atol=1e-5)


def test_measured_blocks_are_clipped_to_shorter_prompts() -> None:
    assert clip_blocks({"step": 128, "block_q": 1024, "block_k": 512}, 130, 200) == {"step": 128, "block_q": 256, "block_k": 256}
    assert clip_blocks(SMALL, 4096, 4096) == SMALL


@pytest.mark.parametrize("entry", tuning.entries(tuning.FILE)["flash_attention"], ids=lambda entry: f"{entry['chip']}")
def test_measured_blocks_work(entry: dict) -> None:
    assert tuning.lookup("flash_attention", keys=4096, **{k: v for k, v in entry.items() if k != "blocks"}) == entry["blocks"]
    q, k = (jnp.zeros((1, 4096, heads, entry["head_dim"]), entry["dtype"]) for heads in (entry["group"], 1))
    make_plan(q, k, entry["blocks"], None, True, False, True, VMEM.get(entry["chip"], OTHER_VMEM))


@pytest.mark.parametrize("group", [1, 3, 4, 8, 16, 71])
@pytest.mark.parametrize(("dim", "itemsize", "limit"), [(128, 2, 16 << 20), (256, 4, 128 << 20)])
def test_default_blocks_fit(group: int, dim: int, itemsize: int, limit: int) -> None:
    for tokens in (1, 200, 4096):
        blocks = default_blocks(tokens, 4096, group, dim, itemsize, limit)
        assert vmem_bytes(blocks, group, dim, itemsize) <= limit or blocks["block_q"] == blocks["block_k"] == blocks["step"] == 128
        dtype = jnp.bfloat16 if itemsize == 2 else jnp.float32
        make_plan(jnp.zeros((1, tokens, group, dim), dtype), jnp.zeros((1, 4096, 1, dim), dtype), blocks, None, True, False, False, 1 << 30)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=(1, 16, 3, 128)), "query heads 4: must be a multiple of the 3"),
        (dict(k=(1, 8, 2, 128)), "16 queries: must be from 1 to the 8 keys"),
        (dict(k=(1, 16, 2, 64)), "k .*must have the batch 1 and the head_dim 128"),
        (dict(lengths=np.zeros(2)), r"lengths \(2,\): must be \[1\]"),
        (dict(sinks=np.zeros(2)), r"sinks \(2,\): must be \[4\]"),
        (dict(dtype=jnp.float16), "dtypes q float16"),
        (dict(impl="cuda"), "impl='cuda': legal"),
        (dict(blocks=SMALL | {"step": 64}), "step=64: must be a multiple of 128"),
        (dict(blocks=SMALL | {"block_k": 200}), "block_k=200: must be a multiple of step=128"),
        (dict(blocks=SMALL | {"block_q": 1 << 17}), "MiB of VMEM, there are 16: lower block_q=131072"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    change = {"k": (1, 16, 2, 128), "dtype": jnp.bfloat16, "impl": "pallas", "chip": "v4"} | change
    dtype = change.pop("dtype")
    k = jnp.zeros(change.pop("k"), dtype)
    with pytest.raises(ValueError, match=message):
        flash_attention(jnp.zeros((1, 16, 4, 128), dtype), k, k, scale=1.0, **change)


COMPILE = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pallas_kernels import tuning
from pallas_kernels.flash_attention import OTHER_VMEM, VMEM, flash_attention

chip, topology, heads, kv_heads, dim, dtype = *sys.argv[1:3], *map(int, sys.argv[3:6]), sys.argv[6]
mesh = Mesh(np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:1]), ("x",))
A = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))
attend = lambda q, k, v, lengths, window, sinks: flash_attention(
    q, k, v, lengths=lengths, window=window, sinks=sinks, return_lse=True, scale=1.0, chip=chip, impl="pallas")
kv = A(dtype, 2, 1500, kv_heads, dim)
jax.jit(attend).lower(A(dtype, 2, 1500, heads, dim), kv, kv, A("int32", 2), A("int32"), A("float32", heads)).compile()
"""


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ("chip", "topology", "heads", "kv_heads", "dim", "dtype"),
    [
        ("v4", "v4:2x2x1", 32, 8, 128, "bfloat16"),
        ("v5e", "v5e:2x2", 4, 1, 256, "bfloat16"),
        ("v6e", "v6e:2x2", 2, 2, 64, "float32"),
        ("tpu7x", "tpu7x:2x2x1", 16, 2, 96, "bfloat16"),
    ],
)
def test_compiles_for_tpu(chip: str, topology: str, heads: int, kv_heads: int, dim: int, dtype: str) -> None:
    run_program(COMPILE, chip, topology, heads, kv_heads, dim, dtype)
