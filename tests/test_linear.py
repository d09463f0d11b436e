"""A layer as a GPU runs it, its kernels interpreted, against the same layer as XLA makes it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llminfer import linear
from llminfer.config import ModelConfig, from_toml
from llminfer.quant import Turned, maker
from llminfer.target import Target
from pallas_kernels.quantized_matmul_gpu import Tiles

PLAIN = Target.of("cpu", dtype="bfloat16")
GPU = dataclasses.replace(PLAIN, kernels="triton-interpret", branches=False)
C = from_toml("tiny")


def mlp(target: Target, c: ModelConfig, x: jax.Array, norm: jax.Array, up: Any, down: Any, kind: str | None = None) -> jax.Array:
    """A residual stream through norm, mlp and the next norm, as model.run_layer does it."""
    make = maker(kind, ("embed", "mlp"), 1, target) or (lambda w: w)
    up, down, before = make(up), make(down), (norm, None)
    x, y, left = linear.entered(x, before, c, target, up)
    y = linear.linear(y, up, c, target, before=left, act=True, into=down)
    x = linear.linear(y, down, c, target, residual=x)
    x, y, left = linear.entered(x, before, c, target)
    y = linear.norm(y, norm, None, c) if left else y
    return jnp.concatenate([x, y])


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_a_mlp_with_what_goes_around_it(monkeypatch: pytest.MonkeyPatch, rows: int, offset: float) -> None:
    c = dataclasses.replace(C, norm_offset=offset)
    keys = jax.random.split(jax.random.key(rows), 4)
    draw = lambda key, *shape: jax.random.normal(key, shape, jnp.float32).astype(jnp.bfloat16)
    x, norm = draw(keys[0], rows, 1024), draw(keys[1], 1024)
    up, down = draw(keys[2], 1024, 2048) / 32, draw(keys[3], 1024, 1024) / 32
    called = []
    for name in ("matvec_gpu", "add_norm_gpu"):
        home = linear.gpu if name == "matvec_gpu" else linear
        original = getattr(home, name)
        monkeypatch.setattr(home, name, lambda *args, name=name, original=original, **kw: called.append(name) or original(*args, **kw))
    found, want = (np.asarray(jax.jit(mlp, static_argnums=(0, 1))(t, c, x, norm, up, down), np.float32) for t in (GPU, PLAIN))
    np.testing.assert_allclose(found, want, atol=0.02 * np.abs(want).max())
    assert called == (["matvec_gpu"] * 2 if rows == 1 else ["add_norm_gpu"])


@pytest.mark.parametrize("kind", ["w8a8", "w8a8_fp8"])
def test_a_mlp_with_tokens_in_eight_bits(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Rounded with the gate; what is left to do is done with the next norm."""
    keys = jax.random.split(jax.random.key(2), 4)
    draw = lambda key, *shape: jax.random.normal(key, shape, jnp.float32).astype(jnp.bfloat16)
    x, norm = draw(keys[0], 5, 1024), draw(keys[1], 1024)
    up, down = draw(keys[2], 1024, 2048) / 32, draw(keys[3], 1024, 1024) / 32
    called: list[Any] = []
    for name in ("round_gpu", "add_norm_gpu"):
        original = getattr(linear, name)
        watch = lambda *args, name=name, original=original, **kw: called.append((name, kw.get("by") is not None)) or original(*args, **kw)
        monkeypatch.setattr(linear, name, watch)
    found, want = (np.asarray(jax.jit(mlp, static_argnums=(0, 1, 6))(t, C, x, norm, up, down, kind), np.float32) for t in (GPU, PLAIN))
    assert called == [("round_gpu", False), ("round_gpu", True), ("add_norm_gpu", True)]
    np.testing.assert_allclose(found, want, atol=(0.03 if kind == "w8a8" else 0.06) * np.abs(want).max())
    gap = np.abs(want - np.asarray(mlp(PLAIN, C, x, norm, up, down), np.float32)).mean() / np.abs(want).mean()
    assert 1e-3 < gap < (0.02 if kind == "w8a8" else 0.06)  # rounding shows, and not by much


def test_tuned_products_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 17 to 64 rows, where a shape was measured."""
    monkeypatch.setattr(linear, "tiles_for_rows", lambda kind, *shape: Tiles(32, 64, 2, 2, 2))
    x, w = (jax.random.normal(jax.random.key(i), shape).astype(jnp.bfloat16) for i, shape in enumerate(((20, 256), (128, 256))))
    found, want = (linear.rows_product(x, w, target) for target in (GPU, PLAIN))
    np.testing.assert_allclose(np.asarray(found), np.asarray(want), atol=1e-3 * np.abs(np.asarray(want)).max())
    left = linear.linear(x, Turned(w), C, GPU, residual=x[:, :128])
    assert left.y.shape == (2, 20, 128)  # in parts, to be added up with the norm
    norm = (jnp.ones(128, jnp.bfloat16), None)
    want = x[:, :128] + linear.rows_product(x, w, PLAIN, jnp.bfloat16)
    for before in (norm, None):
        found, read, then = linear.entered(left, before, C, GPU)
        np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(want, np.float32), rtol=0.02, atol=0.02)
        assert then is None and (before is None) == bool((read == found).all())


def test_a_gate_in_the_product_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "tiles_for_gated", lambda *shape: Tiles(64, 64, 2, 1, 4))
    monkeypatch.setattr("pallas_kernels.quantized_matmul_gpu.tiles_for_gated", lambda *shape: Tiles(64, 64, 2, 1, 4))
    x, w = (jax.random.normal(jax.random.key(i), shape).astype(jnp.bfloat16) for i, shape in enumerate(((20, 256), (256, 256))))
    found, want = (np.asarray(linear.linear(x, Turned(w), C, target, act=True), np.float32) for target in (GPU, PLAIN))
    np.testing.assert_allclose(found, want, atol=0.01 * np.abs(want).max())
    assert "gated_matmul_gpu" in str(jax.make_jaxpr(lambda x: linear.linear(x, Turned(w), C, GPU, act=True))(x))
