"""Rounding of tokens joined with a gate, a norm and the scales of a product, against plain steps; interpreted and on a GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.add_norm_gpu import add_norm_gpu
from pallas_kernels.quantized_matmul import quantize_rows
from pallas_kernels.round_gpu import round_gpu

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
i8, f8, bf16, f32 = jnp.int8, jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32
CASES = [(1, 64, i8), (5, 96, i8), (3, 4096, f8), (2, 100, f8)]


def back(q, amount) -> np.ndarray:
    return np.asarray(q, np.float32) * np.asarray(amount)


def check(rows: int, size: int, kind, interpret: bool) -> None:
    rng = np.random.default_rng(rows)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), f32)
    step = 0.51 if kind == i8 else 0.07  # of a unit, or of what is rounded
    close = lambda found, want: np.abs(back(*found) - want) <= step * (np.asarray(found[1]) if kind == i8 else np.abs(want) + found[1])
    x = draw(rows, size).astype(bf16)
    q, amount = round_gpu(x, kind, interpret=interpret)
    if kind == i8:
        whole, scale = quantize_rows(x)
        np.testing.assert_array_equal(np.asarray(amount), np.asarray(scale))
        assert np.abs(np.asarray(q, int) - np.asarray(whole, int)).max() <= 1  # a tie may fall to the other side
    assert close((q, amount), np.asarray(x, np.float32)).all()
    sums = jnp.asarray(rng.integers(-9999, 9999, (rows, 2 * size)), jnp.int32)
    by = (jnp.abs(draw(rows, 1)) / 999, jnp.abs(draw(1, 2 * size)))
    y = np.asarray(sums, np.float32) * np.asarray(by[0]) * np.asarray(by[1])
    for name, act in (("silu", jax.nn.silu), ("gelu_tanh", jax.nn.gelu)):
        want = np.asarray((act(jnp.asarray(y[:, :size])) * y[:, size:]).astype(bf16), np.float32)
        found = round_gpu(sums, kind, gate=name, by=by, interpret=interpret)
        assert (close(found, want) | (np.abs(back(*found) - want) < 1e-2 * np.abs(want))).all()
    by, sums, weight = (by[0], by[1][:, :size]), sums[:, :size], draw(size).astype(bf16)
    more = jnp.asarray(np.asarray(sums, np.float32) * np.asarray(by[0]) * np.asarray(by[1])).astype(bf16)
    total, normed = add_norm_gpu(x, more, weight, eps=1e-5, interpret=interpret)
    same, found = add_norm_gpu(x, sums, weight, eps=1e-5, kind=kind, by=by, interpret=interpret)
    np.testing.assert_allclose(np.asarray(same, np.float32), np.asarray(total, np.float32), rtol=1e-2)
    want = np.asarray(normed, np.float32)
    assert (close(found, want) | (np.abs(back(*found) - want) < 2e-2 * np.abs(want) + np.asarray(found[1]))).all()


@pytest.mark.parametrize("case", CASES)
def test_matches_plain_steps(case) -> None:
    check(*case, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_matches_plain_steps_on_a_gpu(case) -> None:
    check(*case, interpret=False)


def test_a_bad_row_stays_bad_and_others_do_not() -> None:
    x = jnp.ones((3, 64), bf16).at[1, 5].set(jnp.nan)
    q, amount = round_gpu(x, i8, interpret=True)
    assert np.isnan(np.asarray(amount)).ravel().tolist() == [False, True, False] and (np.asarray(q)[::2] == 127).all()


def test_refuses() -> None:
    x = jnp.ones((2, 64), bf16)
    for how in (dict(kind=jnp.int16), dict(kind=i8, gate="relu"), dict(kind=i8, by=(x, x))):
        with pytest.raises(ValueError, match=r"legal|must be"):
            round_gpu(x, **how)
