"""The grouped matmul's reference and its TPU kernel (interpreted) against a float64 oracle; the kernel compiled for real TPU targets."""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from tpu_program import run_program

from pallas_kernels import grouped_matmul as grouped
from pallas_kernels import tuning
from pallas_kernels.grouped_matmul import (
    ALPHA,
    LIMIT,
    Blocks,
    check,
    check_blocks,
    default_blocks,
    grouped_matmul,
    grouped_matmul_tpu,
    tuned_blocks,
    vmem_bytes,
    work_items,
)
from pallas_kernels.weight_formats import CHIPS, values

LAYERS, LAYER = 2, 1
BOUND = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}


@dataclass(frozen=True)
class Program:
    """What is static in a call: one compilation, slow in the interpreter, so that several cases share it."""

    blocks: Blocks
    rows: int
    k: int = 128
    n: int = 256  # columns of w
    experts: int = 5
    dtype: type = jnp.float32
    weight: type | None = None
    group: int = 0  # rows of w with one scale; 0: a column's
    bias: bool = False
    activation: str | None = None
    chip: str = "v5e"
    transfers: Literal["eager", "on_wait"] = "eager"

    @functools.cached_property
    def call(self):
        params = pltpu.InterpretParams(detect_races=True, dma_execution_mode=self.transfers)

        def run(x, w, sizes, layer, scale, bias):
            shape = check(x, w, sizes, scale, bias, self.activation, self.chip)
            check_blocks(shape, self.blocks)
            return grouped_matmul_tpu(shape, self.blocks, x, w, sizes, layer, scale, bias, interpret=params)

        return jax.jit(run)

    def arguments(self, sizes, seed: int = 0):
        """x, w, scale, bias. Everything that must not count is NaN: rows of nobody, float weights of experts without rows, other layers."""
        rng, used = np.random.default_rng(seed), np.array(sizes) > 0
        shape = (LAYERS, self.experts, self.k, self.n)
        other = lambda array: np.where((np.arange(LAYERS) == LAYER)[:, None, None, None] & used[:, None, None], array, np.nan)
        x = rng.standard_normal((self.rows, self.k))
        x[sum(sizes) :] = np.nan
        scale = bias = None
        if self.weight is None:
            w = jnp.asarray(other(rng.standard_normal(shape)), self.dtype)
        else:
            most = 7 if self.weight == jnp.int4 else 127
            w = jnp.asarray(rng.integers(-most - 1, most + 1, shape), self.weight)
            w = w[:, :, ::2] if self.weight == jnp.uint8 else w  # MXFP4: two rows in one
            scale = other(rng.uniform(0.5, 2, (LAYERS, self.experts, self.k // (self.group or self.k), self.n)) / most)
            scale = jnp.asarray(scale if self.group else scale[:, :, 0], jnp.float32)
        if self.bias:
            bias = jnp.asarray(rng.standard_normal((LAYERS, self.experts, self.n)), self.dtype)
        return jnp.asarray(x, self.dtype), w, scale, bias


def oracle(program: Program, sizes, x, w, scale, bias):
    """float64, one expert after the other."""
    wide = lambda array: np.asarray(array.astype(jnp.float32), np.float64)
    out, at = np.zeros((program.rows, program.n)), 0
    for e, size in enumerate(sizes):
        matrix = wide(values(w[LAYER, e]))
        if scale is not None:
            matrix = matrix * np.repeat(wide(scale[LAYER, e]).reshape(-1, program.n), program.group or program.k, axis=0)
        if size:
            out[at : at + size] = wide(x[at : at + size]) @ matrix + (0 if bias is None else wide(bias[LAYER, e]))
        at += size
    if program.activation is None:
        return out
    gate, up = np.split(out, 2, axis=1)
    if program.activation == "silu":
        return gate / (1 + np.exp(-gate)) * up
    if program.activation == "gelu":
        return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    gate, up = np.minimum(gate, LIMIT), np.clip(up, -LIMIT, LIMIT)
    return gate / (1 + np.exp(-ALPHA * gate)) * (up + 1)


def check_close(program: Program, found, want):
    assert found.dtype == program.dtype and found.shape == want.shape
    error = np.abs(np.asarray(found, np.float64) - want).max()
    assert error <= BOUND[program.dtype] * max(np.abs(want).max(), 1.0)


WIDE: dict[str, Any] = dict(n=512, activation="silu")
PROGRAMS = {
    "one_block": Program(Blocks(112, 128, 64), rows=99),
    "one_block_late": Program(Blocks(112, 128, 64), rows=99, transfers="on_wait"),
    "blocks": Program(Blocks(48, 256, 32), rows=203),
    "blocks_late": Program(Blocks(48, 256, 32), rows=203, transfers="on_wait"),
    "silu": Program(Blocks(48, 128, 16), rows=80, experts=20, dtype=jnp.bfloat16, **WIDE),
    "clamped": Program(Blocks(32, 128, 32), rows=64, bias=True, n=256, activation="clamped"),
    "int8": Program(Blocks(64, 128, 64), rows=64, weight=jnp.int8, dtype=jnp.bfloat16, bias=True, experts=18),
    "int8_groups": Program(Blocks(64, 128, 64), rows=64, k=384, weight=jnp.int8, group=128, dtype=jnp.bfloat16, **WIDE),
    "int4_groups": Program(Blocks(64, 128, 64), rows=64, k=384, weight=jnp.int4, group=32),
    "mxfp4": Program(
        Blocks(64, 128, 64), rows=64, k=384, weight=jnp.uint8, group=32, bias=True, n=256, dtype=jnp.bfloat16, activation="clamped"
    ),
    "mxfp4_float32": Program(Blocks(64, 128, 64), rows=64, k=128, weight=jnp.uint8, group=32, chip="v6e"),
    "int4": Program(Blocks(64, 128, 64), rows=64, k=384, weight=jnp.int4, dtype=jnp.bfloat16, n=256, activation="gelu"),
    # Widths that fill no register's lanes: the end of K is in a register's part, the last block of columns partly outside.
    "odd": Program(Blocks(48, 128, 32), rows=80, k=160, n=160, bias=True),
    "odd_clamped": Program(Blocks(64, 128, 32), rows=64, k=160, n=512, bias=True, dtype=jnp.bfloat16, activation="clamped"),
    "odd_int8": Program(Blocks(64, 256, 32), rows=64, k=288, n=416, weight=jnp.int8, dtype=jnp.bfloat16, chip="v6e"),
    "odd_int4": Program(Blocks(64, 128, 32), rows=64, k=192, n=160, weight=jnp.int4, group=64, dtype=jnp.bfloat16),
    "odd_mxfp4": Program(Blocks(64, 128, 32), rows=64, k=192, n=160, weight=jnp.uint8, group=32, bias=True, dtype=jnp.bfloat16, chip="v6e"),
    "int4_many": Program(Blocks(96, 128, 32), rows=96, k=384, weight=jnp.int4, group=128, dtype=jnp.bfloat16, experts=1, chip="v6e"),
}
UNEVEN, ONE = (0, 17, 1, 0, 30), (0, 0, 99, 0, 0)
CASES = [
    ("one_block", UNEVEN),
    ("one_block", ONE),
    ("one_block", (0, 0, 0, 0, 0)),
    ("one_block_late", (7, 16, 25, 48, 3)),
    ("blocks", (3, 0, 150, 1, 49)),
    ("blocks", (0, 48, 48, 1, 0)),
    ("blocks", (1, 1, 1, 1, 1)),
    ("blocks_late", (47, 1, 0, 96, 30)),
    ("silu", (1, 0) * 5 + (20, 0, 0, 33, 4, 0, 0, 1, 0, 0)),
    ("clamped", (20, 0, 9, 16, 2)),
    ("int8", (1, 0, 9, 16, 2, *[1] * 11, 17, 3)),
    ("int8_groups", (20, 0, 9, 16, 2)),
    ("int4_groups", (20, 0, 9, 16, 19)),
    ("mxfp4", (20, 0, 9, 16, 19)),
    ("mxfp4_float32", (1, 0, 9, 16, 2)),
    ("int4", (64, 0, 0, 0, 0)),
    ("int4", (2, 19, 5, 1, 0)),
    ("int4_many", (95,)),
    ("odd", (3, 0, 30, 1, 9)),
    ("odd", (0, 0, 60, 0, 20)),
    *((f"odd_{kind}", (20, 0, 9, 16, 2)) for kind in ("clamped", "int8", "int4", "mxfp4")),
]


@pytest.mark.parametrize(("name", "sizes"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_kernel_matches_oracle(name, sizes, capfd):
    program = PROGRAMS[name]
    x, w, scale, bias = program.arguments(sizes)
    found = jax.block_until_ready(program.call(x, w, jnp.array(sizes, jnp.int32), jnp.int32(LAYER), scale, bias))
    printed = "".join(capfd.readouterr())
    assert "RACE" not in printed and "non-zero count" not in printed, printed  # races, semaphores
    check_close(program, found, oracle(program, sizes, x, w, scale, bias))


@pytest.mark.parametrize("name", ["blocks", "silu", "clamped", "int8", "int4_groups", "int4", "mxfp4"])
def test_reference_matches_oracle(name):
    program = PROGRAMS[name]
    run = jax.jit(functools.partial(grouped_matmul, activation=program.activation))
    for sizes in (sizes for other, sizes in CASES if other == name):
        x, w, scale, bias = program.arguments(sizes, seed=1)
        found = run(x, w, jnp.array(sizes, jnp.int32), layer=LAYER, scale=scale, bias=bias)
        check_close(program, found, oracle(program, sizes, x, w, scale, bias))


def test_entry_interprets_with_its_own_blocks():
    program = PROGRAMS["one_block"]
    x, w, *_ = program.arguments(UNEVEN)
    found = grouped_matmul(x, w, jnp.array(UNEVEN, jnp.int32), layer=LAYER, chip="v5p", impl="interpret")
    check_close(program, found, oracle(program, UNEVEN, x, w, None, None))


@pytest.mark.parametrize("seed", range(3))
def test_items_read_each_used_weight_once(seed):
    """Items cover each row once, an expert's are neighbours, and no weights of experts without rows are asked for."""
    rng = np.random.default_rng(seed)
    experts, rows, block = 30, 400, 64
    sizes = rng.multinomial(rng.integers(rows), rng.dirichlet(np.full(experts, 0.2)))
    x, w = jax.ShapeDtypeStruct((rows, 128), jnp.float32), jax.ShapeDtypeStruct((1, experts, 128, 128), jnp.float32)
    shape = check(x, w, jnp.zeros(experts, jnp.int32))
    meta, bounds, group, tile = map(np.asarray, work_items(shape, block, 0, jnp.asarray(sizes, jnp.int32)))
    assert len(group) == experts + -(-rows // block) >= meta[1]
    covered = [r for g, b in zip(group[: meta[1]], tile) for r in range(max(bounds[g], b * block), min(bounds[g + 1], b * block + block))]
    assert covered == list(range(rows))
    asked = np.minimum(group, meta[2])
    fetched = asked[np.r_[True, asked[1:] != asked[:-1]]]
    assert list(fetched) == list(np.flatnonzero(sizes))


def test_default_blocks_fit():
    sizes = ((1024, 64, 2048, 1536, None), (512, 128, 2048, 1536, "silu"), (65536, 8, 4096, 28672, "silu"))
    for m, experts, k, n, activation in (*sizes, (256, 32, 3072, 2880, None), (256, 32, 2880, 6144, "clamped")):
        x, w = (jax.ShapeDtypeStruct(dims, jnp.bfloat16) for dims in ((m, k), (1, experts, k, n)))
        for chip in CHIPS:
            shape = check(x, w, jnp.zeros(experts, jnp.int32), None, None, activation, chip)
            blocks = default_blocks(shape)
            check_blocks(shape, blocks)  # VMEM
            assert vmem_bytes(shape, blocks) >= CHIPS[chip].vmem // 4 or blocks.block_n == shape.n


@pytest.mark.parametrize("entry", tuning.entries(tuning.FILE).get("grouped_matmul", []), ids=lambda entry: str(list(entry.values())))
def test_tuned_blocks_are_legal_and_used(entry):
    for rows in (entry["rows"], entry["rows"] // 2 + 1):
        shape = tuned_shape(rows, entry["experts"], entry["inner"], entry["columns"], entry["halves"], entry["chip"])
        found = tuned_blocks(shape)
        assert found and (found.block_n, found.window) == (entry["blocks"]["block_n"], entry["blocks"]["window"])
        check_blocks(shape, found)


def test_blocks_come_from_the_table(monkeypatch):
    """For rows up to the next power of two."""
    asked = []

    def lookup(op, chip, **about):
        asked.append((op, chip, about))
        return dict(block_m=64, block_n=128, window=32)

    monkeypatch.setattr(grouped, "lookup", lookup)
    assert tuned_blocks(tuned_shape(33, 5, 256, 384, 2, "v6e")) == Blocks(48, 128, 32)
    assert asked == [("grouped_matmul", "v6e", dict(experts=5, inner=256, columns=384, rows=64, halves=2, bits=16))]
    monkeypatch.setattr(grouped, "lookup", lambda *op, **about: None)
    assert tuned_blocks(tuned_shape(33, 5, 256, 384, 1, "v6e")) is None


def tuned_shape(rows, experts, inner, columns, halves, chip):
    x, w = (jax.ShapeDtypeStruct(dims, jnp.bfloat16) for dims in ((rows, inner), (1, experts, inner, halves * columns)))
    return check(x, w, jax.ShapeDtypeStruct((experts,), jnp.int32), None, None, "silu" if halves == 2 else None, chip)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=(16, 64)), r"the same K"),
        (dict(dtype=jnp.float16), "x has dtype float16"),
        (dict(sizes=(4,)), r"must be int32 \[3\]"),
        (dict(weight=jnp.int8), "no scale"),
        (dict(scale=(1, 3, 128)), "must be int8, int4 or uint8"),
        (dict(w=(1, 3, 64, 256), weight=jnp.uint8, scale=(1, 3, 2, 256)), "of MXFP4: must be .1, 3, 4, 256"),
        (dict(weight=jnp.int8, scale=(1, 3, 100)), "scale has shape"),
        (dict(weight=jnp.int8, scale=(1, 3, 3, 256)), "scale has shape"),
        (dict(weight=jnp.int8, scale=(1, 3, 8, 256)), "groups of 16 rows"),
        (dict(bias=(1, 3, 128)), "bias has shape"),
        (dict(activation="relu"), "legal: None, silu"),
        (dict(chip=None), "chip=None"),
        (dict(chip="v3"), "must be one of v4, v5e"),
        (dict(impl="cuda"), "legal: reference, pallas, interpret"),
        (dict(x=(16, 96), w=(1, 3, 96, 256)), "K=96"),
        (dict(x=(16, 144), w=(1, 3, 144, 256)), "K=144, output columns 256: K must be a multiple of 32"),
        (dict(w=(1, 3, 128, 320), activation="silu"), "columns 160"),
        (dict(blocks=Blocks(16, 192, 16)), "block_n=192"),
        (dict(blocks=Blocks(16, 128, 24)), "window=24"),
        (dict(blocks=Blocks(32, 128, 16)), "block_m=32"),
        (dict(x=(16, 65536), w=(1, 3, 65536, 1024), blocks=Blocks(16, 1024, 16)), "lower block_n"),
    ],
)
def test_refuses(change, message):
    dtype = change.get("dtype", jnp.bfloat16)
    array = lambda name, default, dtype: jax.ShapeDtypeStruct(change.get(name, default), dtype)
    x, w, sizes = array("x", (16, 128), dtype), array("w", (1, 3, 128, 256), change.get("weight", dtype)), array("sizes", (3,), jnp.int32)
    scale = array("scale", None, jnp.float32) if "scale" in change else None
    bias = array("bias", None, jnp.float32) if "bias" in change else None
    how: dict[str, Any] = dict(impl="interpret", chip="v5e") | {
        name: change[name] for name in ("activation", "blocks", "chip", "impl") if name in change
    }
    with pytest.raises(ValueError, match=message):
        grouped_matmul(x, w, sizes, scale=scale, bias=bias, **how)


COMPILE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pallas_kernels.grouped_matmul import grouped_matmul

topology, chip, kind, group, activation = sys.argv[1], sys.argv[1].split(":")[0], sys.argv[2], int(sys.argv[3]), sys.argv[4] or None
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
mesh = Mesh(np.array(devices[:1]), ("x",))
shape = lambda dtype, *dims: jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, PartitionSpec()))
layers, experts, k, n, rows = 4, 128, 2048, 1536, 512
w = shape(kind, layers, experts, k // 2 if kind == "uint8" else k, n)
scale = None if kind == "bfloat16" else shape("float32", layers, experts, k // group, n) if group else shape("float32", layers, experts, n)

def step(x, w, sizes, scale):
    def layer(carry, i):
        return carry, grouped_matmul(x, w, sizes, layer=i, scale=scale, activation=activation, chip=chip, impl="pallas").sum()
    return jax.lax.scan(layer, None, jnp.arange(layers))[1]

with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    args = shape("bfloat16", rows, k), w, shape("int32", experts), scale
    memory = jax.jit(step).lower(*args).compile().memory_analysis()
bits = dict(bfloat16=16, int8=8, int4=4, uint8=8)[kind]
assert memory.argument_size_in_bytes <= w.size * bits / 8 * 1.01 + (scale.size * 4 if scale else 0) + (1 << 23), memory
assert memory.temp_size_in_bytes <= 16 << 20, memory  # no layer's weights (50 MB and more) are copied
"""


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ("topology", "kind", "group", "activation"),
    [
        ("v4:2x2x1", "int4", 128, "silu"),
        ("v5e:2x2", "bfloat16", 0, "silu"),
        ("v5p:2x2x1", "int8", 0, ""),
        ("v6e:2x2", "int4", 32, "gelu"),
        ("v4:2x2x1", "uint8", 32, "clamped"),
        ("tpu7x:2x2x1", "uint8", 32, "clamped"),
        ("tpu7x:2x2x1", "bfloat16", 0, "clamped"),
    ],
)
def test_compiles_for_tpu(topology, kind, group, activation):
    """Qwen3-30B-A3B's experts, 64 tokens: weights are read where they lie, whatever the layer."""
    run_program(COMPILE, topology, kind, group, activation)
