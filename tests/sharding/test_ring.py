"""Ring attention against dense attention in float64: lengths, windows, groups of heads, another axis name; and the order of tokens."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from tpu_program import run_program

from sharding import ring

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
SCALE = 0.3
ROWS = 96  # of the whole prompt: chunks of 12 rows, tiles of 8 that do not divide them


def dense(q: np.ndarray, k: np.ndarray, v: np.ndarray, length: int, window: int, softcap: float | None) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) in plain order, float64; zeros and -inf from `length` on."""
    group, at = q.shape[1] // k.shape[1], np.arange(q.shape[0])
    own = at < length
    k, v = (np.where(own[:, None, None], x, 0).astype(np.float64).repeat(group, axis=1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", np.where(own[:, None, None], q, 0).astype(np.float64), k) * SCALE
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    seen = (at[None] <= at[:, None]) & ((window == 0) | (at[None] > at[:, None] - window))
    weights = np.where(seen, np.exp(scores), 0)
    out = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)
    return np.where(own[:, None, None], out, 0), np.where(own[:, None], np.log(weights.sum(-1)).T, -np.inf)


@functools.cache
def case(heads: int, kv_heads: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(heads)
    return tuple(rng.standard_normal((ROWS, h, 16), np.float32) for h in (heads, kv_heads, kv_heads))


@functools.cache
def program(axis: str, shape: tuple[int, ...], softcap: float | None, **how: Any) -> Any:
    """(q, k, v, length, window) in plain order -> (out, lse) in plain order, over a mesh of `axis`; the last of two axes splits heads."""
    names = (axis, "heads")[: len(shape)]
    mesh = Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), names)
    spec, lse = PartitionSpec(*names), PartitionSpec(*names)
    attend = functools.partial(ring.ring_attention, axis=axis, scale=SCALE, softcap=softcap, tile=8, **how)
    body = lambda q, k, v, length, window: attend(q, k, v, length=length, window=window)
    split = jax.shard_map(
        body, mesh=mesh, in_specs=(spec,) * 3 + (PartitionSpec(),) * 2, out_specs=(spec, lse), check_vma=False
    )  # what lies on the heads' axis knows nothing of the other

    def run(q, k, v, length, window):
        found = split(*(ring.zigzag(x, shape[0]) for x in (q, k, v)), length, window)
        return [ring.unzigzag(x, shape[0]) for x in found]

    return jax.jit(run)


@pytest.mark.parametrize(
    ("axis", "shape", "heads", "softcap", "how"),
    [
        ("sp", (4,), (4, 4), None, {}),
        ("around", (2, 2), (8, 2), 2.0, {"parts": 3}),
        ("sp", (8,), (6, 1), None, {"parts": 1}),
    ],
)
def test_ring_is_dense_attention(axis: str, shape: tuple[int, ...], heads: tuple[int, int], softcap: float | None, how: Any) -> None:
    run = program(axis, shape, softcap, **how)
    for length, window in ((ROWS, 0), (0, 0), (1, 0), (37, 0), (53, 7), (ROWS, 1), (71, 40), (ROWS, 200)):
        q, k, v = (x.copy() for x in case(*heads))
        for x in (q, k, v):
            x[length:] = np.nan  # what is behind the prompt may be anything
        out, lse = map(np.asarray, run(q, k, v, length, window))
        wanted, sums = dense(q, k, v, length, window, softcap)
        np.testing.assert_allclose(out, wanted, atol=3e-6, err_msg=f"length={length} window={window}")
        np.testing.assert_allclose(lse, sums, atol=3e-6)


def test_a_sequences_own_nan_stays_in_its_rows_to_come() -> None:
    """A key that is not a number is seen by later tokens, and by none before it."""
    q, k, v = (x.copy() for x in case(4, 4))
    v[50] = np.nan
    out, _ = program("sp", (4,), None)(q, k, v, 80, 0)
    bad = np.isnan(np.asarray(out)).any((1, 2))
    assert not bad[:50].any() and bad[50:80].all() and not bad[80:].any()


def test_a_learned_sink_is_merged_by_the_sums() -> None:
    q, k, v = case(4, 4)
    out, lse = (np.asarray(x, np.float64) for x in program("sp", (4,), None)(q, k, v, ROWS, 0))
    sink = np.array([0.5, -1.0, 3.0, 0.0])
    wanted, sums = dense(q, k, v, ROWS, 0, None)
    np.testing.assert_allclose(
        out / (1 + np.exp(sink - lse))[..., None], wanted * (np.exp(sums) / (np.exp(sums) + np.exp(sink)))[..., None], atol=3e-6
    )


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_zigzag_and_back(devices: int) -> None:
    tokens = 2 * devices * 5
    order = ring.zigzag_order(tokens, devices)
    x = np.arange(3 * tokens).reshape(tokens, 3)
    assert sorted(order) == [*range(tokens)]
    np.testing.assert_array_equal(ring.unzigzag(ring.zigzag(x, devices), devices), x)
    np.testing.assert_array_equal(ring.zigzag(x.T, devices, axis=1), x.T[:, order])
    # Each device has as many pairs of a query and a key that it sees as any other, to within a chunk.
    work = (order + 1).reshape(devices, -1).sum(1)
    assert np.ptp(work) == 0
    mesh = Mesh(np.array(jax.devices()[:devices]), ("sp",))
    spec = PartitionSpec("sp")
    where = jax.shard_map(lambda: ring.zigzag_positions("sp", tokens // devices), mesh=mesh, in_specs=(), out_specs=spec, check_vma=False)
    np.testing.assert_array_equal(where(), order)


@pytest.mark.parametrize(("devices", "pages", "first"), [(4, 4, 1), (4, 3, 0), (2, 1, 1), (8, 9, 5)])
def test_rows_come_to_the_owners_of_their_pages(devices: int, pages: int, first: int) -> None:
    """pages: of a chunk, a multiple of the devices or not; first: the device of the first page."""
    page, spec = 2, PartitionSpec("sp")
    rows = np.arange(2 * devices * pages * page * 3).reshape(-1, 3)
    turn = (np.arange(devices) - first) % devices
    body = lambda x, turn: ring.to_owners(x, turn[0], page, "sp")
    split = jax.shard_map(body, mesh=Mesh(np.array(jax.devices()[:devices]), ("sp",)), in_specs=spec, out_specs=spec, check_vma=False)
    found = np.asarray(jax.jit(split)(ring.zigzag(rows, devices), turn.astype(np.int32)))
    by_page = rows.reshape(-1, page, 3)
    np.testing.assert_array_equal(found, np.concatenate([by_page[number::devices] for number in turn]).reshape(-1, 3))


def test_chunks_that_are_no_whole_pages_cannot_be_sent() -> None:
    split = jax.shard_map(
        lambda x: ring.to_owners(x, 0, 4, "sp"),
        mesh=Mesh(np.array(jax.devices()[:2]), ("sp",)),
        in_specs=PartitionSpec("sp"),
        out_specs=PartitionSpec("sp"),
        check_vma=False,
    )
    with pytest.raises(ValueError, match=r"^x has 12 rows: must be two chunks of whole pages, a multiple of 8"):
        jax.eval_shape(split, np.zeros((24, 1)))


@pytest.mark.parametrize(("tokens", "devices", "legal"), [(0, 4, 8), (12, 4, 16), (17, 2, 20)])
def test_tokens_that_cannot_be_dealt_out(tokens: int, devices: int, legal: int) -> None:
    with pytest.raises(ValueError, match=rf"^tokens={tokens}: must be a multiple of {2 * devices}, .*; next legal: {legal}$"):
        ring.zigzag_order(tokens, devices)


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [((8, 4, 16), (6, 4, 16), "must be .rows, Hq, D."), ((8, 3, 16), (8, 2, 16), "multiple of the 2"), ((7, 2, 16), (7, 2, 16), "even")],
)
def test_shapes_that_cannot_work(q: tuple[int, ...], k: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ring.check(np.zeros(q), np.zeros(k), np.zeros(k))


OVERLAP = """
import functools, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from sharding.ring import ring_attention
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
mesh = Mesh(np.array(devices), ("sp",))
attend = functools.partial(ring_attention, axis="sp", scale=0.1)
ring = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=P("sp"), out_specs=P("sp"), check_vma=False))
shape = lambda heads: jax.ShapeDtypeStruct((16384, heads, 128), jnp.bfloat16, sharding=NamedSharding(mesh, P("sp")))
text = ring.lower(shape(4), shape(2), shape(2)).compile().as_text()
for computation in re.split(r"\\n\\n", text):
    started = {}
    for number, line in enumerate(computation.splitlines()):
        if m := re.search(r"%(\\S+) = .* collective-permute-start\\(", line):
            started[m.group(1)] = number
        elif m := re.search(r"collective-permute-done\\([^)]*%([\\w.-]+)\\)", line):
            between = computation.splitlines()[started[m.group(1)] + 1 : number]
            print(sum(" while(" in x or " fusion(" in x or "convolution" in x for x in between), sum(" while(" in x for x in between))
"""


@pytest.mark.tpu_compile
def test_a_tpu_computes_while_blocks_travel() -> None:
    """Compiled for v5e:4x4: between the start and the end of each transfer lies the work on the block before: a loop over its tiles."""
    found = [[int(n) for n in line.split()] for line in run_program(OVERLAP).splitlines()]
    assert len(found) >= 2 and all(loops >= 1 for _, loops in found), found
