"""Sum and norm in one kernel against float64, interpreted and on a GPU."""

from __future__ import annotations

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.add_norm_gpu import add_norm_gpu

CASES = [(1, 64, 0.0), (5, 576, 0.0), (3, 4096, 1.0), (17, 2304, 0.0)]


def check(rows: int, size: int, offset: float, interpret: bool) -> None:
    rng = np.random.default_rng(rows)
    x, y, weight = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((rows, size), (rows, size), (size,)))
    total, normed = add_norm_gpu(x, y, weight, eps=1e-5, offset=offset, interpret=interpret)
    np.testing.assert_array_equal(np.asarray(total), np.asarray(x + y))
    parts = jnp.stack([y.astype(jnp.float32) / 4, y.astype(jnp.float32) * 3 / 4])
    for a, b in zip(add_norm_gpu(x, parts, weight, eps=1e-5, offset=offset, interpret=interpret), (total, normed), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    s = np.asarray(total, np.float64)
    want = s / np.sqrt((s**2).mean(1, keepdims=True) + 1e-5) * (np.asarray(weight, np.float64) + offset)
    np.testing.assert_allclose(np.asarray(normed, np.float64), want, rtol=1.3e-2, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_matches_float64(case: tuple[int, int, float]) -> None:
    check(*case, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case: tuple[int, int, float]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Triton backend is deprecated")  # from jax 0.11 on
        check(*case, interpret=False)


def test_refuses() -> None:
    x = jnp.ones((2, 8), jnp.bfloat16)
    for y, weight in ((x[:1], x[0]), (x, x[0, :4]), (x.astype(jnp.float16), x[0])):
        with pytest.raises(ValueError, match="must be bfloat16"):
            add_norm_gpu(x, y, weight, eps=1e-5)
