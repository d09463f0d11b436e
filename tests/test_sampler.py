"""llminfer.sampler: exact masks, right frequencies, tokens that depend on nothing but their own row, keys equal to jax.random's."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llminfer import sampler
from llminfer.batch import no_sampling
from llminfer.sampler import SamplingBatch, request_key
from llminfer.target import Target
from sharding.collectives import collectives

sample = jax.jit(sampler.sample)
distribution = jax.jit(sampler.distribution)
INT64 = 2**63


def batch(
    rows: int, temperature: Any = 1.0, top_k: Any = 0, top_p: Any = 1.0, min_p: Any = 0.0, seed: int = 0, position: Any = 0
) -> SamplingBatch:
    """Each field a scalar for all rows, or one value a row; row i draws with sample index i of `seed`."""
    fill = lambda x, dtype: np.broadcast_to(np.asarray(x, dtype), (rows,)).copy()
    f, i = np.float32, np.int32
    key = np.stack([request_key(seed, n) for n in range(rows)])
    drawn = {"temperature": fill(temperature, f), "top_k": fill(top_k, i), "top_p": fill(top_p, f), "min_p": fill(min_p, f)}
    return dataclasses.replace(no_sampling(rows), key=key, position=fill(position, i), **drawn)


def take(s: SamplingBatch, rows) -> SamplingBatch:
    return jax.tree.map(lambda x: x[rows], s)


def draws(logits, n: int, **fields: Any) -> np.ndarray:
    """n tokens of one row of logits, at n positions, in one call."""
    s = batch(1, **fields)
    s = jax.tree.map(lambda x: np.repeat(x, n, axis=0), s).replace(position=np.arange(n, dtype=np.int32))
    return np.asarray(sample(np.tile(np.asarray(logits, np.float32), (n, 1)), s))


def expected(logits, temperature, top_k, top_p, min_p) -> np.ndarray:
    """Probabilities [V] of one row, by sorting, in float64."""
    x = np.asarray(logits, np.float64)
    if temperature == 0:
        return np.eye(len(x))[int(np.argmax(x))]
    p = np.exp((x - x.max()) / temperature)
    order = np.argsort(-x, kind="stable")
    keep = x > -np.inf
    if 0 < top_k < len(x):
        keep &= x >= x[order[top_k - 1]]
    if top_p < 1:
        mass = np.cumsum(np.where(keep, p, 0)[order]) / p[keep].sum()
        last = order[min(int(np.searchsorted(mass, top_p)), len(x) - 1)]
        keep &= x >= x[last]
    if min_p > 0:
        keep &= p >= min_p * p.max()
    return np.where(keep, p, 0) / p[keep].sum()


PARAMETERS = [
    {"temperature": t, "top_k": k, "top_p": np.float32(p), "min_p": np.float32(m)}
    for t in (0.0, 1e-30, 0.3, 1.0, 5.0)
    for k in (0, 1, 7, 150, 10**6)
    for p in (1e-9, 0.0, 0.35, 0.9, 1.0)
    for m in (0.0, 0.013, 1.0)
]


def rows_of(kind: str, rows: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(rows, width)) * 3 + 5).astype(np.float32)
    if kind == "ties":
        x = np.round(x)
    if kind == "masked":
        x[rng.random(x.shape) < 0.7] = -np.inf
    if kind == "flat":
        x[:] = -1e30
    if kind == "wide":
        x *= np.float32(1e35)
    return x


@pytest.mark.parametrize("kind", ["normal", "ties", "masked", "flat", "wide"])
def test_distribution_equals_a_sorted_reference(kind):
    x = rows_of(kind, len(PARAMETERS), 211)
    fields: dict[str, Any] = {name: np.array([p[name] for p in PARAMETERS]) for name in PARAMETERS[0]}
    got = np.asarray(distribution(x, batch(len(x), **fields)))
    with np.errstate(over="ignore"):
        want = np.stack([expected(row, **p) for row, p in zip(x, PARAMETERS, strict=True)])
    # A sum in float32 may land on the other side of top_p than one in float64: such a row must equal a neighbour of the rule.
    for i, p in enumerate(PARAMETERS):
        if not np.array_equal(got[i] > 1e-30, want[i] > 1e-30):
            near = [expected(x[i], **{**p, "top_p": p["top_p"] * s, "min_p": p["min_p"] * s}) for s in (1 - 1e-6, 1 + 1e-6)]
            want[i] = min(near, key=lambda w: np.abs(w - got[i]).max())
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-7)


def test_top_k_is_exact_where_neighbours_differ_by_one_bit():
    x = np.float32(1.0) + np.arange(300, dtype=np.float32) * np.float32(2**-23)
    x = np.concatenate([x, -x, [40.0]]).astype(np.float32)  # beside a large maximum the differences round away; the order must not
    for k in (1, 2, 100, 301, 302, 500, 601):
        assert int((np.asarray(distribution(x[None], batch(1, 100.0, k)))[0] > 0).sum()) == k


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 4},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"top_k": 6, "top_p": 0.7, "min_p": 0.1},
    ],
)
def test_frequencies_pass_chi_square(fields):
    n, x = 20_000, np.random.default_rng(3).normal(size=12).astype(np.float32) * 1.5
    rule = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | fields
    want = expected(x, **rule) * n
    got = np.bincount(draws(x, n, seed=11, **fields), minlength=len(x))
    live = want > 0
    assert got[~live].sum() == 0
    chi2, freedom = float(((got - want)[live] ** 2 / want[live]).sum()), int(live.sum()) - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom) + 4  # above the 99.9% point for every freedom


def test_noise_is_standard_gumbel_and_uncorrelated_between_positions_and_samples():
    s = batch(4, seed=5, position=[0, 1, 0, 0])
    g = np.asarray(jax.jit(lambda s: sampler._gumbel(sampler._bits(s, 50_000)))(s), np.float64)
    assert np.isfinite(g).all()
    np.testing.assert_allclose(g.mean(axis=1), np.euler_gamma, atol=0.025)
    np.testing.assert_allclose(g.var(axis=1), np.pi**2 / 6, rtol=0.04)
    assert np.abs(np.corrcoef(g) - np.eye(4)).max() < 0.02
    assert (np.sort(g[0])[1:] == np.sort(g[0])[:-1]).mean() < 0.01  # fine enough that ties do not decide


def test_noise_is_finite_and_fine_at_both_ends_of_the_bits():
    bits = np.array([0, 1, 2, 100, 101, 2**31, 2**32 - 2**9, 2**32 - 1], np.uint32)
    g = np.asarray(jax.jit(sampler._gumbel)(bits), np.float64)
    np.testing.assert_allclose(g[:6], -np.log(-np.log1p(-(bits[:6] + 0.5) * 2.0**-32)), rtol=1e-5)
    assert np.isfinite(g).all() and (np.diff(g[:6]) < 0).all() and g[7] <= g[6] < -2.5


def test_bits_equal_partitionable_jax_random():
    s = batch(3, seed=123, position=[0, 17, 2**31 - 1])
    got = jax.jit(sampler._bits, static_argnums=1)(s, 301)
    with jax.threefry_partitionable(True):
        for i in range(3):
            key = jax.random.fold_in(jax.random.wrap_key_data(s.key[i], impl="threefry2x32"), s.position[i])
            np.testing.assert_array_equal(got[i], jax.random.bits(key, (301,), np.uint32))


@pytest.mark.parametrize("seed", [0, 1, -1, 42, 2**31, 2**32 - 1, 2**32, -(2**32), INT64 - 1, -INT64, 0x123456789ABCDEF])
@pytest.mark.parametrize("sample_index", [0, 1, 2**32 - 1])
def test_request_key_equals_jax_random(seed, sample_index):
    key = jax.random.key(0, impl="threefry2x32")
    for data in ((seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF, sample_index):
        key = jax.random.fold_in(key, np.uint32(data))
    got = request_key(seed, sample_index)
    assert got.dtype == np.uint32 and got.shape == (2,)
    np.testing.assert_array_equal(got, np.asarray(jax.random.key_data(key)))


def test_greedy_takes_the_lowest_id_of_equals_and_ignores_the_other_fields():
    x = np.array([[0, 3, 3, 1], [2, 2, 2, 2], [-np.inf, -np.inf, -5, -np.inf], [-0.0, 0.0, -1, 0]], np.float32)
    want = [1, 0, 2, 0]
    np.testing.assert_array_equal(sample(x, batch(4, 0.0)), want)
    np.testing.assert_array_equal(sample(x, batch(4, 0.0, 2, 0.5, 0.1)), want)
    assert np.asarray(sample(x.astype(jnp.bfloat16), batch(4, 0.0))).dtype == np.int32
    both = sample(np.concatenate([x, x]), batch(8, [0.0] * 4 + [1.0] * 4, 3, 0.9))  # in company of rows that draw
    np.testing.assert_array_equal(both[:4], want)


def test_a_temperature_near_zero_is_greedy_without_overflow():
    x = rows_of("normal", 64, 211)
    np.testing.assert_array_equal(sample(x, batch(64, 1e-38, 5, 0.5, 0.1)), x.argmax(axis=1))
    np.testing.assert_array_equal(sample(x, batch(64, 1.0, 1)), x.argmax(axis=1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_rows_give_minus_one_and_leave_the_others(temperature):
    x = rows_of("normal", 8, 211)
    s = batch(8, temperature, 50, 0.95, 0.01)
    want = np.asarray(sample(x, s)).copy()
    assert (want >= 0).all()
    x[1, 7], x[3], x[4, 210], x[6] = np.nan, -np.nan, np.inf, -np.inf
    bad = [1, 3, 4, 6]
    want[bad] = -1
    np.testing.assert_array_equal(sample(x, s), want)
    p = np.asarray(distribution(x, s))
    assert (p[bad] == 0).all()
    np.testing.assert_allclose(np.delete(p, bad, axis=0).sum(axis=1), 1, rtol=1e-5)


def test_a_token_depends_on_its_row_alone():
    x = rows_of("normal", 12, 211)
    s = batch(12, [1.0, 0.0, 0.7, 2.0] * 3, [0, 0, 5, 40] * 3, [1.0, 1.0, 0.9] * 4, [0.0, 0.05] * 6, seed=9, position=range(12))
    want = np.asarray(sample(x, s))
    np.testing.assert_array_equal(sample(x, s), want)
    order = np.random.default_rng(0).permutation(12)
    np.testing.assert_array_equal(sample(x[order], take(s, order)), want[order])
    for i in range(12):
        np.testing.assert_array_equal(sample(x[i : i + 1], take(s, slice(i, i + 1))), want[i : i + 1])
    padded = np.pad(x, ((0, 0), (0, 45)), constant_values=-np.inf)
    np.testing.assert_array_equal(sample(padded, s), want)


def test_other_positions_samples_and_seeds_draw_other_tokens():
    x = np.zeros((64, 4096), np.float32)
    tokens = [
        draws(x[0], 64, seed=1),
        np.asarray(sample(x, batch(64, seed=1, position=5))),
        np.asarray(sample(x, batch(64, seed=2, position=5))),
    ]
    for t in tokens:
        assert len(set(t.tolist())) > 58
    assert (tokens[1] != tokens[2]).sum() > 60


def test_one_program_for_all_values():
    traced = []

    @jax.jit
    def f(x, s):
        traced.append(x.shape)
        return sampler.sample(x, s)

    x = rows_of("normal", 4, 64)
    for s in (batch(4, 0.0), batch(4), batch(4, 0.7, 5), batch(4, 0.7, 0, 0.9), batch(4, [0, 1, 0, 1], 3, 0.5, 0.1, seed=-1, position=7)):
        f(x, s)
    assert len(traced) == 1


def test_what_no_row_asks_for_is_not_computed():
    found: dict[str, int] = {}  # name of a primitive -> how many conds are around it, at least

    def walk(jaxpr: Any, conds: int) -> None:
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            found[name] = min(conds, found.get(name, conds))
            for value in eqn.params.values():
                for part in value if isinstance(value, tuple | list) else (value,):
                    inner = getattr(part, "jaxpr", part)
                    if hasattr(inner, "eqns"):
                        walk(inner, conds + (name == "cond"))

    walk(jax.make_jaxpr(sampler.sample)(rows_of("normal", 4, 64), batch(4)).jaxpr, 0)
    assert found["reduce_max"] == 0 and found["cond"] == 0
    assert found["shift_left"] == found["log1p"] == 1  # noise: some row draws
    assert min(found.get(name, 9) for name in ("scan", "while")) == 2 and found["exp"] == 2  # bounds: some row that draws has one


def test_sharded_vocabulary_gives_the_same_tokens():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    x = rows_of("normal", 16, 1024)
    x[5, 1000] = np.nan
    s = batch(16, [1.0, 0.0, 0.7, 2.0] * 4, [0, 0, 5, 40] * 4, [1.0, 1.0, 0.9, 0.5] * 4, [0.0, 0.05] * 8, position=range(16))
    mesh = Mesh(np.array(jax.devices()[:8]), ("tp",))
    sharding = NamedSharding(mesh, PartitionSpec(None, "tp"))
    drawing = jax.jit(functools.partial(sampler.sample, target=Target.of("cpu", mesh=mesh)))
    compiled = drawing.lower(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), s).compile()
    told = collectives(str(compiled.as_text()))
    # The logits stay where they are; for each bound 3 numbers a row are summed at a time.
    assert {each.kind for each in told} == {"all-reduce"}
    assert sum(shape[:2] == (16, 3) for each in told for shape in each.shapes) == 2
    np.testing.assert_array_equal(compiled(jax.device_put(x, sharding), s), sample(x, s))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_bound_is_the_last_number_that_keeps_enough(bits: int) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal((6, 50)) * 10.0 ** rng.integers(-30, 38, (6, 50)), [[1.5, -1.5] * 25]]).astype(np.float32)
    x[0, :3] = -np.inf
    k = np.array([[1], [50], [7], [3], [51], [25], [9]], np.int32)
    found = jax.jit(lambda x, k: sampler._largest_bound(lambda t: sampler._sums(x, t, jnp.ones_like(x, jnp.int32)), k, bits))(x, k)
    want = [[-np.sort(-row)[n - 1] if n <= len(row) else np.finfo(np.float32).min] for row, (n,) in zip(x, k, strict=True)]
    np.testing.assert_array_equal(found, want)
