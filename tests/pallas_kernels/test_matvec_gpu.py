"""The GPU's kernel for one row against float64, interpreted and on a GPU: each part of it alone, and all together."""

from __future__ import annotations

import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.matvec_gpu import Tiles, matvec_gpu

bf16 = jnp.bfloat16
CASES: dict[str, dict[str, Any]] = {
    "plain": dict(inner=1024),
    "long": dict(inner=6144, columns=10),
    "norm": dict(norm=True),
    "offset": dict(norm=True, offset=1.0, inner=1024),
    "silu": dict(gate="silu"),
    "gelu": dict(gate="gelu_tanh", columns=4, inner=1024),
    "residual": dict(residual=True),
    "all": dict(norm=True, gate="silu", residual=True, inner=3072),
    "tiles": dict(norm=True, gate="silu", tiles=Tiles(1, 512, 4)),
}


def check(inner=2048, columns=8, norm=False, offset=0.0, gate=None, residual=False, tiles=None, interpret=True) -> None:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), bf16)
    x, w = draw(1, inner) * 3, draw(columns, inner)
    made = columns // 2 if gate else columns
    more: dict[str, Any] = dict(norm=draw(inner), eps=1e-5, offset=offset) if norm else {}
    more |= dict(residual=draw(1, made)) if residual else {}
    found = matvec_gpu(x, w, gate=gate, tiles=tiles, interpret=interpret, **more)
    wide = lambda a: np.asarray(a.astype(jnp.float32), np.float64)
    y = wide(x)
    if norm:
        y = y / np.sqrt((y**2).mean() + 1e-5) * (offset + wide(more["norm"]))
    y = y @ wide(w).T
    if gate:
        left, right = np.split(y, 2, axis=1)
        inside = np.sqrt(2 / np.pi) * (left + 0.044715 * left**3)
        y = right * (left / (1 + np.exp(-left)) if gate == "silu" else left * (1 + np.tanh(inside)) / 2)
    y = y + (wide(more["residual"]) if residual else 0)
    assert found.shape == (1, made) and found.dtype == jnp.float32
    assert np.abs(np.asarray(found) - y).max() <= 1e-5 * np.abs(y).max()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_float64(case: dict[str, Any]) -> None:
    check(**case)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_on_a_gpu(case: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Triton backend is deprecated")  # from jax 0.11 on
        check(**case, interpret=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=(2, 1024)), "bfloat16 .1, K."),
        (dict(x=(1, 1000), w=(8, 1000)), "K a multiple of 1024"),
        (dict(gate="silu", w=(6, 1024)), "4 with a gate"),
        (dict(gate="relu"), "legal: None, silu"),
        (dict(residual=jnp.ones((1, 4))), "residual"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    x, w = jnp.ones(change.pop("x", (1, 1024)), bf16), jnp.ones(change.pop("w", (8, 1024)), bf16)
    with pytest.raises(ValueError, match=message):
        matvec_gpu(x, w, **change)
