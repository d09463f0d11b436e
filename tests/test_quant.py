"""Quantized weights: what rounding loses, and that every way to multiply them gives the same product."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from llminfer import LLM
from llminfer.errors import UserError
from llminfer.linear import Shared, head_product, matmul
from llminfer.quant import QTensor, Stacked, Turned, dequantize, maker, quantize_int4, quantize_int8, quantize_to_mxfp4
from llminfer.target import Target, chip_of
from pallas_kernels.quantized_matmul import quantize_rows

pytestmark = pytest.mark.usefixtures("compiled_fast")

CPU = Target.of("cpu")
KERNEL = dataclasses.replace(CPU, kernels="interpret", chip="v5e")
GPU = dataclasses.replace(Target.of("gpu", dtype="float32"), kernels="triton-interpret")
IDS = list(range(3, 40))


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def close(y, expected, bound: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(y), expected, atol=bound * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(("inner", "ways", "group"), [(256, 1, 128), (256, 2, 128), (192, 1, 64), (96, 1, 32), (256, 4, 64), (40, 1, 40)])
def test_int4_groups_and_error(inner: int, ways: int, group: int) -> None:
    w = np.asarray(random(3, inner, 24))
    q = quantize_int4(jnp.asarray(w), ("kv_heads", "embed"), ways=ways)
    assert q.q.dtype == jnp.int4 and q.q.shape == w.shape and q.scale.shape == (3, inner // group, 24)
    most = np.abs(w).reshape(3, -1, group, 24).max(2)
    np.testing.assert_allclose(q.scale, most / 7, rtol=1e-6)
    error = np.abs(dequantize(q) - w).reshape(3, -1, group, 24)
    assert (error <= most[:, :, None] / 14 * 1.001).all() and error.max() > 0
    held = quantize_int4(jnp.asarray(w), ways=ways, dtype=jnp.int8)  # as a CPU keeps it
    np.testing.assert_array_equal(dequantize(held), dequantize(q))


def test_mxfp4_error() -> None:
    """Within the step of each value, a quarter of it at most (a sixth beyond 6, which is cut); kept in int8 it is the same matrix."""
    w = np.asarray(random(3, 128, 24))
    q = quantize_to_mxfp4(jnp.asarray(w))
    assert q.q.dtype == jnp.uint8 and q.q.shape == (3, 64, 24) and q.scale.dtype == jnp.bfloat16 and q.scale.shape == (3, 4, 24)
    scale = np.asarray(q.scale.astype(jnp.float32)).repeat(32, axis=1)
    assert (np.abs(dequantize(q) - w) <= np.maximum(np.abs(w) / 4, scale / 4) * 1.001).all()
    np.testing.assert_array_equal(dequantize(quantize_to_mxfp4(jnp.asarray(w), whole=True)), dequantize(q))
    np.testing.assert_array_equal(dequantize(jax.tree.map(np.asarray, q)), dequantize(q))
    for ways in (1, 4):
        with pytest.raises(UserError, match=r"quantize='mxfp4'.*48 inputs.*legal: int8"):
            quantize_to_mxfp4(jnp.ones((48, 8)), ways=ways)


def test_int8_error() -> None:
    w = np.asarray(random(128, 48))
    q = quantize_int8(jnp.asarray(w))
    assert q.q.dtype == jnp.int8 and q.scale.shape == (1, 48)
    assert (np.abs(dequantize(q) - w) <= np.abs(w).max(0) / 254 * 1.001).all()


KINDS = ["int8", "fp8", "int4", "mxfp4", "w8a8", "w8a8_fp8"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", [CPU, KERNEL, GPU], ids=["cpu", "kernel", "gpu"])
def test_product_of_a_stack_and_of_one_matrix(kind: str, target: Target) -> None:
    """Against float64, each target by its own rules: who rounds x, and what is left to XLA where a kernel cannot go."""
    out = 160 if target is KERNEL else 128
    for inner in (256, 192):  # a TPU's get rows of zeros to a multiple of 128, a GPU's kernels take that only
        x, w = random(5, inner, seed=1), random(3, inner, out, seed=2)
        made, plain = (maker(kind, ("layers", "embed", "mlp"), 1, t)(w) for t in (target, CPU))
        assert made.by_token == kind.startswith("w8a8") and made.turned == (target is GPU)
        pairs = inner // 2 if kind == "mxfp4" or (kind == "int4" and inner == 256) else inner  # three groups of 64 share no bytes
        eight = jnp.float8_e4m3fn if kind.endswith("fp8") else jnp.int8
        assert made.q.dtype == (jnp.uint8 if kind == "mxfp4" and target is GPU else eight)
        assert target is not GPU or made.q.shape == (3, 128, pairs)
        full = dequantize(made if target is KERNEL else plain).astype(np.float64)
        assert target is not KERNEL or (full.shape[1] == 256 and not full[:, inner:].any())
        full = full[:, :inner]
        rounded = kind.startswith("w8a8") or (kind == "int8" and target is CPU)
        q, amount = quantize_rows(x, made.q.dtype if rounded else jnp.int8)
        seen = np.asarray(q if rounded else x).astype(np.float64) * (np.asarray(amount) if rounded else 1)
        one = jax.tree.map(lambda leaf: leaf[2], made)
        close(jax.jit(lambda x, w: matmul(x, w, target))(x, one), seen @ full[2])
        inside = jax.jit(lambda x, w, layer: matmul(x, Stacked(w, layer), target))
        close(inside(x, made, jnp.int32(1)), seen @ full[1])


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", [("embed", "mlp"), ("mlp", "embed")], ids=["columns", "rows"])
@pytest.mark.parametrize("target", [KERNEL, GPU], ids=["tpu", "gpu"])
def test_a_mesh_splits_the_kernel(kind: str, axes: tuple[str, str], target: Target) -> None:
    target = dataclasses.replace(target, mesh=Mesh(np.array(jax.devices()[:2]), ("tp",)))
    x, w = random(4, 512, seed=3), random(2, 512, 256, seed=4)
    made, plain = (maker(kind, ("layers", *axes), 2 if axes[0] == "mlp" else 1, t)(w) for t in (target, CPU))
    whole = lambda x, w: matmul(x, w, target)
    parts = lambda x, w: matmul(x, w, target, shared=Shared("mlp", (), ("tp",))) if axes[0] == "mlp" else None
    product = jax.jit(lambda x, w, layer: [f(x, Stacked(w, layer)) for f in (whole, parts)])
    (y, part), full = product(x, made, jnp.int32(1)), np.asarray(x) @ dequantize(plain)[1]
    if axes[0] == "mlp":  # each device has its share of the rows of the same sum
        assert part.sharding.shard_shape(y.shape) == (2, 256)
        np.testing.assert_array_equal(part, y)
    close(y, full, {"w8a8": 0.02, "w8a8_fp8": 0.05}.get(kind, 1e-5))
    if axes[1] == "mlp":
        assert y.sharding.shard_shape(y.shape) == (4, 128)


@functools.lru_cache
def logits(model: str, **settings) -> np.ndarray:
    served = LLM(model, slots=2, context=64, chunk=64, dtype="float32", expect=lambda _: (0, 0), **settings)
    found = np.asarray(served.prompt_logits(IDS))
    served.close()
    return found


@pytest.mark.parametrize(
    ("model", "kind", "bound", "other"),
    [
        ("config:tiny_moe", "int4", 0.3, {"layout": "stacked"}),
        ("config:tiny_moe", "mxfp4", 0.3, {"layout": "stacked"}),
        ("config:tiny_moe", "w8a8_fp8", 0.2, {"layout": "stacked"}),
        ("config:tiny", "w8a8", 0.05, {"layout": "stacked", "mesh": "tp=2"}),
    ],
)
def test_models_stay_close(model: str, kind: str, bound: float, other: dict) -> None:
    if len(jax.devices()) < 2:
        other = other | {"mesh": ""}
    exact, rounded = logits(model), logits(model, quantize=kind)
    assert 0 < np.abs(exact - rounded).max() < bound * np.ptp(exact)
    close(logits(model, quantize=kind, **other), rounded, 1e-4)


@pytest.mark.parametrize(
    ("model", "kind", "bound", "other"),
    [
        ("config:tiny", "int8", 0.05, {"layout": "stacked"}),
        ("config:tiny", "w8a8", 0.05, {"mesh": "tp=2"}),
        ("config:tiny_gemma3", "int4", 0.4, {"layout": "stacked"}),
    ],
)
def test_a_head_is_quantized_too(model: str, kind: str, bound: float, other: dict) -> None:
    """Of its own, or tied to the embedding, which stays for looking tokens up."""
    if len(jax.devices()) < 2:
        other = other | {"mesh": ""}
    exact, layers, whole = logits(model), logits(model, quantize=kind), logits(model, quantize=kind, quantize_head=True)
    assert np.abs(whole - layers).max() > 0 and np.abs(whole - exact).max() < bound * np.ptp(exact)
    close(logits(model, quantize=kind, quantize_head=True, **other), whole, 1e-4)
    with pytest.raises(UserError, match=r"quantize_head=True.*needs quantize, one of int8"):
        LLM(model, quantize_head=True)


def test_a_head_is_a_float32_product_on_every_target() -> None:
    x, w = random(3, 256, seed=7).astype(jnp.bfloat16), random(256, 384, seed=8)
    for kind in ("int8", "int4", "mxfp4"):
        want = np.asarray(x, np.float64) @ dequantize(maker(kind, ("embed", "vocab"), 1, CPU)(w)).astype(np.float64)
        for target in (CPU, KERNEL, GPU):
            found = head_product(x, maker(kind, ("embed", "vocab"), 1, target)(w), target)
            assert found.dtype == jnp.float32 and found.shape == (3, 384)
            close(found, want, 2e-2 if target is CPU and kind == "int8" else 1e-3)  # XLA:CPU multiplies whole numbers


def test_a_gpu_has_its_matrices_turned() -> None:
    """One row in bfloat16 by the kernel, others and float32 by XLA: the same product."""
    w = random(1024, 6, seed=5)
    for dtype, rows, bound in ((jnp.bfloat16, 1, 1e-2), (jnp.bfloat16, 3, 1e-2), (jnp.float32, 1, 1e-6)):
        x, made = random(rows, 1024, seed=6).astype(dtype), maker(None, ("embed", "mlp"), 1, GPU)(w.astype(dtype))
        assert isinstance(made, Turned) and made.w.shape == (6, 1024)
        y = jax.jit(lambda x, w: matmul(x, w, GPU))(x, made)
        assert y.dtype == dtype
        close(y.astype(jnp.float32), np.asarray(x, np.float64) @ np.asarray(w.astype(dtype), np.float64), bound)
    experts = maker(None, ("experts", "embed", "mlp"), 1, GPU)
    assert experts is None and maker(None, ("embed", "mlp"), 1, CPU) is None
    with pytest.raises(UserError, match="no even number of groups of 32 in 2 parts"):
        maker("mxfp4", ("mlp", "embed"), 2, GPU)(jnp.ones((192, 128)))


def test_names_of_chips() -> None:
    device = functools.partial(dataclasses.make_dataclass("Device", ["platform", "device_kind"]), "tpu")
    kinds = ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x", "TPU v2"]
    assert [chip_of(device(kind)) for kind in kinds] == ["v4", "v5e", "v5p", "v6e", "tpu7x", None]
    assert chip_of(jax.devices()[0]) is None
    assert isinstance(quantize_int8(jnp.ones((2, 2))), QTensor)
