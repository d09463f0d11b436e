"""Products with quantized weights for a GPU against float64 NumPy: the kernel interpreted, XLA's own, and both on a GPU if there is one."""

import functools
import warnings
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_quantized_matmul import oracle

from pallas_kernels import quantized_matmul_gpu as module
from pallas_kernels.quantized_matmul_gpu import MOST_ROWS, TUNED, Tiles, _guess, _legal, for_gpu, quantized_matmul_gpu

f32, bf16, i8, i4, f8, mx = jnp.float32, jnp.bfloat16, jnp.int8, jnp.int4, jnp.float8_e4m3fn, jnp.uint8
BOUND = {f32: 1e-5, bf16: 1e-2}


@dataclass(frozen=True)
class Case:
    weights: type  # as quantized_matmul takes them
    group: int = 0
    rows: int = 1
    x: type = bf16
    inner: int = 256
    columns: int = 128
    layers: int = 1
    minimum: bool = False
    quantize_x: bool = False
    single: bool = False  # scales of shape [L, 1, N]
    tiles: Tiles | None = None


SPLIT = Tiles(32, 64, 3, 2, 2)
CASES = [
    Case(i8, rows=1),
    Case(i8, rows=5, x=f32, single=True, columns=384),
    Case(i8, rows=64, layers=2),
    Case(f8, rows=1, single=True),
    Case(f8, rows=5, x=f32),
    Case(i8, quantize_x=True, rows=1),
    Case(i8, quantize_x=True, rows=5, x=f32),
    Case(i8, 128, rows=1, tiles=SPLIT),
    Case(i8, 128, rows=16, x=f32, columns=384),
    Case(i8, 64, rows=5, minimum=True, inner=384),
    Case(i8, 32, rows=1, tiles=Tiles(32, 128, 3, 1, 2)),
    Case(f8, 128, rows=16),
    Case(i4, 128, rows=1),
    Case(i4, 128, rows=5, columns=384, inner=512, tiles=SPLIT),
    Case(i4, 128, rows=16, layers=2, tiles=Tiles(64, 128, 2, 1, 2)),
    Case(i4, 128, rows=64),
    Case(i4, 64, rows=1, x=f32, tiles=SPLIT),
    Case(i4, 64, rows=20, minimum=True, inner=384),
    Case(i4, 32, rows=1, x=f32, minimum=True),
    Case(i4, 32, rows=16, tiles=Tiles(32, 128, 2, 1, 2)),
    Case(mx, 32, rows=1, tiles=SPLIT),
    Case(mx, 32, rows=5, x=f32),
    Case(mx, 32, rows=64, columns=384),
    Case(i4, 128, rows=MOST_ROWS + 1),
    Case(mx, 32, rows=MOST_ROWS, x=f32),
    Case(i4, 0, rows=3, single=True),  # held as int8
    Case(i4, 128, rows=3, inner=384),  # three groups: held as int8 too
]


def name(case: Case) -> str:
    return f"{case.weights.__name__}-{case.group}-{case.x.__name__}-{case.rows}x{case.inner}x{case.columns}"


def build(case: Case, seed: int):
    """(x, w as quantized_matmul takes it, scale, minimum or None): other layers than the last hold large values; a wrong layer shows."""
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
    sizes = rng.uniform(0.2, 2, per) * large
    scale = jnp.asarray(np.exp2(np.round(np.log2(sizes))), bf16) if case.weights == mx else jnp.asarray(sizes, f32)
    minimum = jnp.asarray(rng.standard_normal(per) * 3 * large, f32) if case.minimum else None
    return jnp.asarray(rng.standard_normal((case.rows, case.inner)) + 0.5, case.x), w, scale, minimum


def compare(case: Case, interpret: bool, traced: bool = False):
    """traced: the layer is known to the program only."""
    x, w, scale, minimum = build(case, seed=CASES.index(case))
    call = functools.partial(quantized_matmul_gpu, quantize_x=case.quantize_x, tiles=case.tiles, interpret=interpret)
    held = for_gpu(w, scale)
    layer = case.layers - 1
    if traced:
        found = jax.jit(lambda x, w, s, m, layer: call(x, w, s, minimum=m, layer=layer))(x, held, scale, minimum, jnp.int32(layer))
    else:
        found = jax.jit(lambda x, w, s, m: call(x, w, s, minimum=m, layer=layer))(x, held, scale, minimum)
    assert found.dtype == case.x and found.shape == (case.rows, case.columns)
    want = oracle(case, x, w, scale, minimum)
    error = np.abs(np.asarray(found.astype(f32), np.float64) - want).max() / np.abs(want).max()
    assert error <= BOUND[case.x]


@pytest.mark.parametrize("case", CASES, ids=name)
def test_matches_oracle(case):
    compare(case, interpret=True)


@pytest.mark.parametrize("case", [case for case in CASES if case.layers > 1], ids=name)
def test_picks_a_layer_that_is_not_known(case):
    compare(case, interpret=True, traced=True)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=name)
def test_on_a_gpu(case):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Triton backend is deprecated")  # from jax 0.11 on
        compare(case, interpret=False, traced=case.layers > 1)


def test_two_to_a_byte():
    """Bytes of a group hold it in their low nibbles, and the next group in their high ones."""
    w = jnp.asarray(np.random.default_rng(0).integers(-8, 8, (2, 128, 3)), jnp.int32).astype(i4)
    held = np.asarray(for_gpu(w, jnp.ones((2, 4, 3))))
    assert held.shape == (2, 3, 64) and held.dtype == np.int8
    plain = np.asarray(w.astype(i8)).transpose(0, 2, 1).reshape(2, 3, 2, 2, 32)
    np.testing.assert_array_equal((held << 4).astype(np.int8) >> 4, plain[:, :, :, 0].reshape(2, 3, 64))
    np.testing.assert_array_equal(held >> 4, plain[:, :, :, 1].reshape(2, 3, 64))


@pytest.mark.parametrize("inner", [256, 384, 4096, 11008, 14336, 18944, 53248])
def test_tiles_are_legal(inner):
    """Of sizes of models, and of what was measured: they divide the weights, and what they need of shared memory an H100 has."""
    for columns in (128, 384, 4096, 14336, 28672, 128256):
        for kind, many in (("int4", 1), ("int4", 16), ("int4", 32), ("int4", 64), ("int8", 1), ("int8", 64), ("mxfp4", 48)):
            for group in (32, 64, 128) if kind != "mxfp4" else (32,):
                stored, halves = (inner, 1) if kind == "int8" else (inner // 2, 2)
                if inner % (halves * group):
                    continue
                tiles = _legal(_guess(many, inner, columns, kind), kind, group, inner, columns, exact=False)
                assert columns % tiles.rows == 0 and stored % (tiles.depth * tiles.splits) == 0, (tiles, kind, group)
                assert tiles.depth % group == 0 or group % tiles.depth == 0
                assert tiles.stages * tiles.depth * (tiles.rows + 2 * halves * max(8, many)) <= 200 << 10
    assert all(_legal(tiles, "int4" if four else "int8", 128, k, n, False) == tiles for (four, k, n), tiles in TUNED.items())


LEGAL = Case(i4, 128, rows=2, inner=512)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=jnp.float16), "x of float16"),
        (dict(weights=jnp.int16), "w of int16"),
        (dict(group=16), "scale .* of int8"),
        (dict(weights=mx, group=64), "of MXFP4|scale"),
        (dict(weights=i8, group=0, minimum=True), "minimum"),
        (dict(quantize_x=True), "needs int8 or float8_e4m3fn and a scale by channel"),
    ],
)
def test_refuses(change, message):
    case = replace(LEGAL, **change)
    shape = lambda dims, dtype: jax.ShapeDtypeStruct(dims, dtype)
    packs = case.weights == mx or (case.weights == i4 and case.group in (32, 64, 128))
    w = shape((1, case.columns, case.inner // (2 if packs else 1)), i8 if case.weights == i4 else case.weights)
    scale = shape((1, case.inner // case.group, case.columns) if case.group else (1, case.columns), f32)
    if case.weights == mx:
        w = shape((1, case.columns, case.inner // 2), i8)  # int4 it is, then, of uneven groups
        scale = shape((1, 3, case.columns), f32)
    call = lambda x, w, s, *least: quantized_matmul_gpu(x, w, s, quantize_x=case.quantize_x, minimum=least[0] if least else None)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, shape((case.rows, case.inner), case.x), w, scale, *([scale] if case.minimum else []))


def check_tokens(kind, rows: int, splits: int, interpret: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(rows)
    inner, columns = 256, 128
    draw = lambda *shape: jnp.asarray(rng.integers(-127, 128, shape), i8).astype(kind)
    q, w, amount, scale = (
        draw(rows, inner),
        draw(columns, inner),
        jnp.asarray(rng.random((rows, 1)), f32),
        jnp.asarray(rng.random((1, columns)), f32),
    )
    monkeypatch.setitem(module.TUNED_TOKENS, (w.dtype.name, inner, columns), Tiles(32, 64, 3, splits, 4))
    sums, by = module.eight_bit_sums(q, amount, w, scale, interpret=interpret)
    assert (by is None) == (rows > 32) and sums.shape == ((splits, rows, columns) if by is None and splits > 1 else (rows, columns))
    y = np.asarray(sums, np.float64) * (1 if by is None else np.asarray(by[0]) * np.asarray(by[1]))
    want = np.asarray(q, np.float64) @ np.asarray(w, np.float64).T * np.asarray(amount) * np.asarray(scale)
    assert np.abs((y.sum(0) if y.ndim == 3 else y) - want).max() < (1e-5 if splits > 1 and by is None else 1e-2) * np.abs(want).max()


TOKENS = [(i8, 64, 2), (f8, 40, 2), (i8, 33, 1), (f8, 5, 1)]


@pytest.mark.parametrize(("kind", "rows", "splits"), TOKENS)
def test_tokens_in_eight_bits(kind, rows: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_tokens(kind, rows, splits, True, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "rows", "splits"), TOKENS)
def test_tokens_in_eight_bits_on_a_gpu(kind, rows: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Triton backend is deprecated")
        check_tokens(kind, rows, splits, False, monkeypatch)


def check_gated(rows: int, gate: str, interpret: bool) -> None:
    rng = np.random.default_rng(rows)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((rows, 256), (256, 256)))
    found = module.gated_matmul_gpu(x, w / 16, gate, tiles=Tiles(64, 64, 2, 1, 4), interpret=interpret)
    y = np.asarray(x, np.float64) @ np.asarray(w / 16, np.float64).T
    act = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}[gate]
    want = np.asarray(act(jnp.asarray(y[:, :128], f32)), np.float64) * y[:, 128:]
    assert np.linalg.norm(np.asarray(found, np.float64) - want) < 4e-3 * np.linalg.norm(want)


GATED = [(2, "silu"), (33, "gelu_tanh"), (64, "silu"), (70, "silu")]


@pytest.mark.parametrize(("rows", "gate"), GATED)
def test_gated(rows: int, gate: str) -> None:
    check_gated(rows, gate, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "gate"), GATED)
def test_gated_on_a_gpu(rows: int, gate: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Triton backend is deprecated")
        check_gated(rows, gate, interpret=False)


def test_gated_refuses() -> None:
    x, w = jnp.ones((2, 256), jnp.bfloat16), jnp.ones((256, 256), jnp.bfloat16)
    for args in ((x, w, "silu"), (x.astype(f32), w, "silu"), (x, w, "relu")):
        with pytest.raises(ValueError, match="has tiles"):
            module.gated_matmul_gpu(*args, tiles=None if args[2] == "silu" else Tiles(64, 64, 2, 1, 4))
