"""Partial attention merged over a mesh axis, and tokens exchanged for heads, against attention on one device."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from sharding import ring
from sharding.sequence import all_to_all_attention, legal_ways, merge_over, sum_rows

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")


def mesh(shape: tuple[int, ...] = (4,), names: tuple[str, ...] = ("sp",)) -> Mesh:
    return Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), names)


def softmax(scores: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) of scores [H, K] over values [K, H, D], float64; nothing for no keys."""
    if not scores.shape[1]:
        return np.full(values.shape[1:], np.nan), np.full(scores.shape[0], -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    lse = np.log(weights.sum(1)) + scores.max(1)
    return np.einsum("hk,khd->hd", weights / weights.sum(1, keepdims=True), values), lse


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("axis", ["sp", ("sp", "other")])
def test_parts_of_the_keys_merged_are_all_of_them(axis: Any, sinks: bool) -> None:
    """Rows whose keys lie on all devices, on some, on one, and nowhere; scores of hundreds."""
    rng, heads, dim = np.random.default_rng(0), 3, 5
    spread = mesh((4, 2), ("sp", "other"))
    ways = 4 if axis == "sp" else 8
    keys = np.array([[3] * ways, [0, 2] * (ways // 2), [0] * (ways - 1) + [4], [0] * ways])  # of each row, on each device
    sink = rng.normal(size=heads).astype(np.float32) * 5 if sinks else None
    out, lse = np.full((ways, 4, heads, dim), np.nan, np.float32), np.full((ways, 4, heads), -np.inf, np.float32)
    wanted, sums = np.zeros((4, heads, dim)), np.full((4, heads), -np.inf)
    for row in range(4):
        scores, values = rng.normal(size=(heads, keys[row].sum())) * 200, rng.normal(size=(keys[row].sum(), heads, dim))
        ends = np.cumsum(keys[row])
        for device, (start, end) in enumerate(zip(ends - keys[row], ends, strict=True)):
            out[device, row], lse[device, row] = softmax(scores[:, start:end], values[start:end])
        if sinks or keys[row].sum():
            extra = np.zeros((heads, 0)) if sink is None else sink[:, None]
            values = np.concatenate([values, np.zeros((extra.shape[1], heads, dim))])
            wanted[row], sums[row] = softmax(np.concatenate([scores, extra], 1), values)
    spec = PartitionSpec(axis)
    body = lambda out, lse: merge_over(out[0], lse[0], axis, sink)
    merged = jax.jit(jax.shard_map(body, mesh=spread, in_specs=spec, out_specs=PartitionSpec(), check_vma=False))
    found, found_lse = map(np.asarray, merged(out, lse))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(found_lse, sums, rtol=1e-6)
    if axis == "sp":  # four rows: each device has one
        body = lambda out, lse: merge_over(out[0], lse[0], axis, sink, scatter=True)
        scattered = jax.jit(jax.shard_map(body, mesh=spread, in_specs=spec, out_specs=spec, check_vma=False))
        for one, other in zip(scattered(out, lse), (found, found_lse), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)
    out[0, 0, 1] = np.nan  # a number that is none on a device that has keys comes through, to its own row and head only
    bad = np.isnan(np.asarray(merged(out, lse)[0])).any(-1)
    assert bad[0, 1] and bad.sum() == 1


@pytest.mark.parametrize(
    ("over", "rows"),
    [(("ep", "tp"), ("sp", "ep", "tp")), (("tp",), ("tp", "sp")), (("ep", "sp", "tp"), ("sp",)), (("sp",), ()), ((), ("tp", "ep"))],
)
def test_a_sum_of_which_each_device_gets_its_rows(over: tuple[str, ...], rows: tuple[str, ...]) -> None:
    """Split over axes that are summed over and axes that are not, in any order."""
    spread, names = mesh((2, 2, 2), ("ep", "sp", "tp")), ("ep", "sp", "tp")
    x = np.random.default_rng(0).integers(-9, 9, (2, 2, 2, 16, 3)).astype(np.float32)
    others = tuple(0 for name in names if name not in over)  # where nothing is summed all have the same
    x = np.broadcast_to(x[tuple(slice(None) if name in over else slice(1) for name in names)], x.shape)
    body = lambda x: sum_rows(x[0, 0, 0], over, rows)
    found = jax.jit(
        jax.shard_map(body, mesh=spread, in_specs=PartitionSpec(*names), out_specs=PartitionSpec(rows or None), check_vma=False)
    )(x)
    wanted = x.sum(tuple(names.index(name) for name in over))[others]
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 4), (8, 2), (4, 1)])
def test_tokens_exchanged_for_heads(heads: int, kv_heads: int) -> None:
    """Four devices: a kv head each, several devices for one, one for all."""
    rng, rows = np.random.default_rng(heads + kv_heads), 48
    q, k, v = (rng.standard_normal((rows, h, 8), np.float32) for h in (heads, kv_heads, kv_heads))
    asked: Any = dict(scale=0.4, softcap=3.0)
    spec = PartitionSpec("around")
    body = lambda q, k, v, length, window: all_to_all_attention(q, k, v, axis="around", length=length, window=window, **asked)
    specs: Any = dict(in_specs=(spec,) * 3 + (PartitionSpec(),) * 2, out_specs=(spec, spec), check_vma=False)
    split = jax.jit(jax.shard_map(body, mesh=mesh((4,), ("around",)), **specs))
    one = jax.jit(functools.partial(ring.attention, **asked))
    for length, window in ((rows, 0), (19, 5), (0, 0)):
        for x in (q, k, v):
            x[length:] = np.nan
        for found, wanted in zip(split(q, k, v, length, window), one(q, k, v, length=length, window=window), strict=True):
            np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), atol=2e-6)


def test_heads_that_cannot_be_exchanged() -> None:
    assert legal_ways(8, 2) == [1, 2, 4, 8] and legal_ways(6, 6) == [1, 2, 3, 6] and legal_ways(12, 2) == [1, 2, 4, 6, 12]
    q, k = (jax.ShapeDtypeStruct((8, heads, 16), np.float32) for heads in (6, 3))
    body = functools.partial(all_to_all_attention, axis="sp", scale=1.0)
    split = jax.shard_map(body, mesh=mesh(), in_specs=PartitionSpec("sp"), out_specs=PartitionSpec("sp"), check_vma=False)
    with pytest.raises(ValueError, match=r"^sp=4: cannot exchange 6 query heads and 3 kv heads; legal: 1, 3, 6 \("):
        jax.eval_shape(split, q, k, k)
