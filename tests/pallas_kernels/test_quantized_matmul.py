"""Products with quantized weights against float64 NumPy (kernel interpreted, and the reference), and compiled for real TPU targets."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_program import run_program

from pallas_kernels import quantized_matmul as quantized
from pallas_kernels import tuning
from pallas_kernels.quantized_matmul import CHIPS, check_blocks, make_plan, quantize_rows, quantized_matmul
from pallas_kernels.weight_formats import MXFP4_VALUES, mxfp4_values, packed, quantize_mxfp4, values

BOUND = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}
f32, bf16, i8, i4, f8, mx = jnp.float32, jnp.bfloat16, jnp.int8, jnp.int4, jnp.float8_e4m3fn, jnp.uint8


@dataclass(frozen=True)
class Case:
    weights: type
    chip: str
    group: int = 0
    minimum: bool = False
    quantize_x: bool = False
    x: type = bf16
    rows: int = 5
    inner: int = 256
    columns: int = 384
    layers: int = 2
    scales: type = f32
    single: bool = False  # scales of shape [L, 1, N]
    blocks: tuple[int, int, int] | None = None
    words: bool = False  # whether this is a case of weights converted by words, and of scales on weights: that what is meant is tested
    before: bool = False


CASES = [
    Case(i8, "v6e"),
    Case(i8, "v4", words=True, rows=1),
    Case(i8, "v5e", x=f32, rows=8, layers=11),  # a scale row beyond the first tile of them
    Case(i8, "v4", words=True, x=f32, rows=37, inner=512, columns=640, layers=11, scales=bf16, blocks=(16, 256, 256)),
    Case(i8, "v4", words=True, group=32, minimum=True),
    Case(i8, "v5e", group=64, x=f32, minimum=True, scales=bf16),
    Case(i4, "v6e"),
    Case(i4, "v5e", words=True),
    Case(i4, "v5p", x=f32, rows=3),
    Case(i4, "v5e", words=True, group=128, rows=17, inner=384),  # a depth that is not a multiple of 256
    Case(i4, "v5e", words=True, group=32, minimum=True, inner=512, columns=256, blocks=(5, 256, 128)),
    Case(i4, "v4", group=64, x=f32, rows=20, minimum=True, blocks=(16, 256, 384)),
    Case(i4, "tpu7x", group=32, scales=bf16),
    Case(i4, "v5e", group=32, rows=40, before=True, minimum=True),
    Case(i4, "v6e", group=128, rows=49, inner=2048, blocks=(32, 1024, 128), before=True),
    Case(i8, "v6e", group=64, rows=41, columns=128, before=True),
    Case(f8, "tpu7x", single=True),
    Case(f8, "v5e", words=True, scales=bf16, single=True),
    Case(f8, "v6e", x=f32),
    Case(mx, "v5e", group=32, words=True, scales=bf16),
    Case(mx, "v4", group=32, words=True, x=f32, rows=3, columns=128),
    Case(mx, "v6e", group=32, words=True, rows=40, inner=512, scales=bf16, before=True, blocks=(16, 512, 128)),
    Case(mx, "v5p", group=32, words=True, rows=100, inner=384, columns=128, before=True),
    Case(i8, "v6e", quantize_x=True, rows=33, inner=512, layers=9, blocks=(16, 256, 256)),
    Case(i8, "v5e", quantize_x=True, x=f32, single=True),
    Case(i8, "v4", quantize_x=True, x=f32, words=True),
    Case(i8, "v6e", columns=160),  # the last block of columns lies partly outside
    Case(mx, "v5e", group=32, words=True, scales=bf16, columns=672, blocks=(5, 256, 512)),
]


def build(case: Case, seed: int):
    """(x, w, scale, minimum or None): layers other than the last hold large values, so that a wrong layer shows."""
    rng = np.random.default_rng(seed)
    shape = (case.layers, case.inner, case.columns)
    if case.weights == f8:
        w = jnp.asarray(rng.standard_normal(shape) * np.exp2(rng.integers(-9, 7, shape)), f8)  # subnormal ones too
    elif case.weights == mx:
        w = jnp.asarray(rng.integers(0, 256, (case.layers, case.inner // 2, case.columns)), mx)
    else:
        most = 1 << (3 if case.weights == i4 else 7)
        w = jnp.asarray(rng.integers(-most, most, shape), jnp.int32).astype(case.weights)
    per = (case.layers, case.inner // case.group, case.columns) if case.group else (case.layers, case.columns)
    per = (case.layers, 1, case.columns) if case.single else per
    large = np.where(np.arange(case.layers) == case.layers - 1, 1, 50).reshape(-1, *[1] * (len(per) - 1))
    scale = jnp.asarray(rng.uniform(0.2, 2, per) * large, case.scales)
    minimum = jnp.asarray(rng.standard_normal(per) * 3 * large, case.scales) if case.minimum else None
    return jnp.asarray(rng.standard_normal((case.rows, case.inner)) + 0.5, case.x), w, scale, minimum


def oracle(case: Case, x, w, scale, minimum):
    """float64, of the last layer."""
    wide = lambda array: np.asarray(array.astype(f32), np.float64)
    full, s, x = wide(values(w[-1])), wide(scale[-1]), np.asarray(x.astype(f32))
    if case.quantize_x:
        step = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
        x = np.round(x / step).astype(np.float64) * step
    if case.group:
        s = s.repeat(case.group, axis=0)
        full = full * s + (0 if minimum is None else wide(minimum[-1]).repeat(case.group, axis=0))
    else:
        full = full * s.reshape(1, -1)
    return x.astype(np.float64) @ full


@pytest.mark.parametrize("impl", ["interpret", "reference"])
@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c.weights.__name__}-{c.group}-{c.x.__name__}-{c.chip}-{c.rows}x{c.inner}x{c.columns}"
)
def test_matches_oracle(case, impl):
    x, w, scale, minimum = build(case, seed=CASES.index(case))
    plan = make_plan(x, w, scale, case.quantize_x, case.chip, case.blocks)
    assert (bool(plan.words), plan.before) == (case.words, case.before)
    call = functools.partial(quantized_matmul, minimum=minimum, quantize_x=case.quantize_x, chip=case.chip, blocks=case.blocks, impl=impl)
    found = jax.jit(lambda x, w, scale, layer: call(x, w, scale, layer=layer))(x, w, scale, jnp.int32(case.layers - 1))
    assert found.dtype == case.x and found.shape == (case.rows, case.columns)
    want = oracle(case, x, w, scale, minimum)
    error = np.abs(np.asarray(found.astype(f32), np.float64) - want).max() / np.abs(want).max()
    assert error <= BOUND[case.x]


def test_mxfp4_rounds_to_the_nearest():
    """All 16 codes, and values between them, whose neighbours are as OCP's tables have them: ties go to the even mantissa."""
    sizes = sorted(MXFP4_VALUES)
    ties = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5.0: 4, 6.9: 6}
    column = np.zeros(32)
    column[:16], column[16:24], column[24:] = [*sizes, *[-x for x in sizes]], list(ties), [-x for x in ties]
    w = np.stack([column * 2.0**-9, column * 2.0**20, np.zeros(32)], axis=1)
    held, scale = quantize_mxfp4(jnp.asarray(w, f32))
    assert held.shape == (16, 3) and held.dtype == mx and scale.shape == (1, 3) and scale.dtype == bf16
    assert np.asarray(scale[0, :2], np.float64).tolist() == [2.0**-9, 2.0**20]
    want = np.concatenate([column[:16], list(ties.values()), [-x for x in ties.values()]])
    for i in range(2):
        np.testing.assert_array_equal(np.asarray(mxfp4_values(held))[:, i], want)
    assert not np.asarray(mxfp4_values(held))[:, 2].any()


def test_quantize_rows():
    x = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32) * [[1e-3], [1], [1e4], [0]]
    q, scale = map(np.asarray, quantize_rows(jnp.asarray(x, f32)))
    assert q.dtype == np.int8 and scale.shape == (4, 1) and np.abs(q).max(axis=1).tolist() == [127, 127, 127, 0]
    assert (np.abs(q * scale - x) <= scale * 0.5001).all()


LEGAL = Case(i4, "v5e", group=32, inner=1024, rows=40)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(columns=100), "N=100"),
        (dict(inner=192), "K=192"),
        (dict(x=jnp.float16), "x has dtype float16"),
        (dict(weights=jnp.int16), "w has dtype int16"),
        (dict(group=16), "for groups of"),
        (dict(weights=jnp.uint8, group=64), "of MXFP4"),
        (dict(weights=jnp.uint8, minimum=True), "without a minimum"),
        (dict(scales=jnp.float16), "scale has dtype float16"),
        (dict(group=0, minimum=True), "minimum"),
        (dict(quantize_x=True), "needs int8 and a scale by channel"),
        (dict(chip="v3"), "must be one of v4, v5e"),
        (dict(blocks=(24, 1024, 128)), "block rows=24"),
        (dict(blocks=(40, 768, 128)), "inner=768.*divides K=1024"),
        (dict(blocks=(40, 128, 128)), "inner=128.*multiple of 256"),
        (dict(blocks=(40, 1024, 512)), "columns=512.*up to N=384"),
        (dict(inner=1 << 15, columns=2048, blocks=(40, 1 << 15, 2048)), "VMEM.*lower rows, inner or columns"),
    ],
)
def test_refuses(change, message):
    case = replace(LEGAL, **change)
    shape = lambda dims, dtype: jax.ShapeDtypeStruct(dims, dtype)
    per = (2, case.inner // case.group, case.columns) if case.group else (2, case.columns)
    x, w, scale = (
        shape((case.rows, case.inner), case.x),
        shape((2, case.inner // packed(case.weights), case.columns), case.weights),
        shape(per, case.scales),
    )
    static: Any = dict(quantize_x=case.quantize_x, chip=case.chip, blocks=case.blocks, impl="interpret")
    call = lambda x, w, scale, *least: quantized_matmul(x, w, scale, layer=0, minimum=least[0] if least else None, **static)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, x, w, scale, *([scale] if case.minimum else []))


KINDS = [(i8, 0, 8, bf16), (i4, 128, 8, bf16), (i4, 32, 70, f32), (i8, 0, 2048, bf16), (i4, 128, 2048, bf16)]


@pytest.mark.parametrize("chip", CHIPS)
def test_default_blocks_are_legal(chip):
    """Sizes of models from 1B to 405B: the kernel's checks pass, and blocks are large enough for a transfer."""
    sizes = (2048, 2560, 4096, 5120, 9728, 11008, 14336, 28672, 53248)
    shape = lambda dims, dtype: jax.ShapeDtypeStruct(dims, dtype)
    for inner, columns in zip(sizes, (*sizes[1:], 128256), strict=True):
        for weights, group, rows, dtype in KINDS:
            if dtype == f32 and inner > 14336:
                continue  # its twelve slabs of x do not fit a v4
            scale = shape((2, inner // group, columns) if group else (2, columns), f32)
            args = shape((rows, inner), dtype), shape((2, inner, columns), weights), scale
            plan = make_plan(*args, False, chip, None)
            assert 0 < check_blocks(plan, *args, None, chip) <= CHIPS[chip].vmem
            assert plan.blocks.inner * plan.blocks.columns >= 1 << 17, plan


@pytest.mark.parametrize("entry", tuning.entries(tuning.FILE).get("quantized_matmul", []), ids=lambda entry: str(list(entry.values())))
def test_tuned_blocks_are_legal_and_used(entry):
    """Of every type of weights that an entry holds for, and for fewer rows."""
    shape = lambda dims, dtype: jax.ShapeDtypeStruct(dims, dtype)
    inner, columns, group, rows = entry["inner"], entry["columns"], entry["group"], entry["rows"]
    scale = shape((2, inner // group, columns) if group else (2, columns), f32)
    for kind, whole in ((i4, False),) if entry["bits"] == 4 else ((i8, False), (i8, True), (f8, False)):
        for m in (rows, rows // 2 + 1):
            args = shape((m, inner), bf16), shape((2, inner, columns), kind), scale
            plan = make_plan(*args, whole and not group, entry["chip"], None)
            assert plan.blocks == (min(entry["blocks"]["rows"], m), entry["blocks"]["inner"], entry["blocks"]["columns"])
            assert check_blocks(plan, *args, scale if group else None, entry["chip"])


def test_blocks_come_from_the_table(monkeypatch):
    """For rows up to the next power of two, 8 at least; not for float32, whose parts need more VMEM, nor where tiles of scales are cut."""
    asked = []

    def lookup(op, chip, **about):
        asked.append((op, chip, about))
        return dict(rows=16, inner=1024, columns=256)

    monkeypatch.setattr(quantized, "lookup", lookup)
    shape = lambda dims, dtype: jax.ShapeDtypeStruct(dims, dtype)
    args = lambda rows, dtype: (shape((rows, 2048), dtype), shape((1, 2048, 512), i4), shape((1, 16, 512), f32))
    assert make_plan(*args(9, bf16), False, "v5e", None).blocks == (9, 1024, 256)
    assert asked == [("quantized_matmul", "v5e", dict(rows=16, inner=2048, columns=512, bits=4, group=128))]
    assert make_plan(*args(9, bf16), False, "v5e", (9, 2048, 128)).blocks == (9, 2048, 128)
    assert make_plan(*args(9, f32), False, "v5e", None).blocks != (9, 1024, 256)
    x, w, _ = args(9, bf16)
    assert make_plan(x, w, shape((1, 16, 512), bf16), False, "v5e", None).blocks.inner == 2048
    assert [about["rows"] for *_, about in asked] == [16, 16]


COMPILE = """
import functools, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pallas_kernels.quantized_matmul import quantized_matmul

topology, chip, layers, k, n = *sys.argv[1:3], 4, 4096, 6144
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
mesh = Mesh(np.array(devices[:1]), ("x",))
shape = lambda dtype, *dims: jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

def scanned(call, x, w, scale):
    step = lambda x, layer: (call(x, w, scale, layer=layer)[:, :k], None)
    return jax.lax.scan(step, x, jnp.arange(layers))[0]

def compile(rows, dtype, group=0, x=jnp.bfloat16, minimum=False, **how):
    scale = shape(jnp.float32, layers, k // group, n) if group else shape(jnp.float32, layers, n)
    least = dict(minimum=jnp.ones(scale.shape, jnp.float32)) if minimum else {}
    call = functools.partial(quantized_matmul, chip=chip, impl="pallas", **how, **least)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        w = shape(dtype, layers, k // (2 if dtype == jnp.uint8 else 1), n)
        lowered = jax.jit(functools.partial(scanned, call)).lower(shape(x, rows, k), w, scale)
    temporary = lowered.compile().memory_analysis().temp_size_in_bytes
    assert temporary < k * n // 8 + 6 * rows * (k + n), (rows, dtype, group, temporary)

i8, i4 = jnp.int8, jnp.int4
compile(8, i8)
compile(300, i8)
compile(7, i4, group=32)
compile(100, i4, group=128)
compile(8, i8, quantize_x=True)
compile(5, i4, group=64, x=jnp.float32)
compile(8, jnp.uint8, group=32)
compile(300, jnp.uint8, group=32)
if chip in ("v5e", "v6e"):
    compile(520, i4, group=64)
    compile(8, i4, group=32, minimum=True)
    compile(8, jnp.float8_e4m3fn)
"""


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ("topology", "chip"), [("v4:2x2x1", "v4"), ("v5e:2x2", "v5e"), ("v5p:2x2x1", "v5p"), ("v6e:2x2", "v6e"), ("tpu7x:2x2x1", "tpu7x")]
)
def test_compiles_for_tpu(topology, chip):
    """Under a scan over layers: no temporary as large as an eighth of one layer's weights, so nothing is copied or converted outside."""
    run_program(COMPILE, topology, chip)
