"""The schedule of a pipeline, against layers run one after the other on one device."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from sharding.mesh import make_meshes, parse_mesh
from sharding.pipeline import Schedule, piece_rows, run, still, tick

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
LAYERS, ROWS, WIDTH = 4, 2, 4
RNG = np.random.default_rng(0)
WEIGHTS = RNG.standard_normal((LAYERS, WIDTH, WIDTH), np.float32)


def mesh(text: str) -> Mesh:
    ((found, _),) = make_meshes(parse_mesh(text), jax.devices())
    assert found is not None
    return found


def layer(weight, kept, x):
    """One layer, which remembers: what it gives depends on all pieces that it saw before."""
    y = jnp.tanh(jnp.dot(x, weight, precision="highest") + kept)
    return y, kept + y.sum(0)


def work(weights, kept, x, at, busy, scale):
    """The layers of a stage; a bubble must leave no trace."""
    for number in range(weights.shape[0]):
        x, new = layer(weights[number], kept[number], x)
        kept = kept.at[number].set(jnp.where(busy, new * scale, kept[number]))
    return x, kept


def in_order(xs, scale: float):
    """(what the last layer gives of each piece, what the layers remember)."""
    kept, found = [np.zeros(WIDTH, np.float32)] * LAYERS, []
    for x in xs:
        for number in range(LAYERS):
            x, new = layer(WEIGHTS[number], kept[number], x)
            kept[number] = new * scale
        found.append(x)
    return np.array(found), np.array(kept)


@pytest.mark.parametrize(("text", "pieces", "used"), [("pp=2,tp=2", 5, 5), ("pp=4", 3, 2), ("pp=4", 1, 1)])
def test_a_batch_goes_through_the_stages_as_through_the_layers(text: str, pieces: int, used: int) -> None:
    there, xs = mesh(text), RNG.standard_normal((pieces, ROWS, WIDTH), np.float32)
    wanted = np.array([0, used * ROWS - 1])
    through = jax.jit(functools.partial(run, work, mesh=there))
    zeros = np.zeros((LAYERS, WIDTH), np.float32)
    found, kept = through(WEIGHTS, zeros, xs, jnp.int32(used), wanted, jnp.float32(0.5))
    outs, left = in_order(xs[:used], 0.5)
    np.testing.assert_allclose(found, outs.reshape(-1, WIDTH)[wanted], atol=1e-6)
    np.testing.assert_allclose(kept, left, atol=1e-6)
    assert kept.addressable_shards[0].data.shape == (LAYERS // there.shape["pp"], WIDTH)


@pytest.mark.parametrize(("stages", "pieces"), [(2, 2), (4, 4), (4, 2), (2, 3)])
def test_pieces_that_come_again_find_every_stage_at_work(stages: int, pieces: int) -> None:
    there, schedule, steps = mesh(f"pp={stages}"), Schedule(stages, pieces), 3
    xs = RNG.standard_normal((pieces, ROWS, WIDTH), np.float32)
    end = (steps - 1) * schedule.period + pieces

    def one(weights, kept, x, stage, now):
        number, at, _ = schedule.at(stage, now)
        busy = (number >= 0) & (number < end) & (at < pieces)
        x, kept = work(weights, kept, x, at, busy, 1.0)
        return x, kept, busy

    def stepped(now, carry):
        kept, xs, moving, ticks = carry
        entering = xs[jnp.minimum(schedule.at(0, now)[1], pieces - 1)]
        body = lambda weights, state, x, stage, now: _counted(one(weights, state[0], x, stage, now), state[1])
        y, moving, (kept, ticks) = tick(body, WEIGHTS, (kept, ticks), entering, moving, now, mesh=there)
        number, at, _ = schedule.at(stages - 1, now)
        leaves = (number >= 0) & (at < pieces)
        at = jnp.minimum(at, pieces - 1)
        return kept, xs.at[at].set(jnp.where(leaves, y, xs[at])), moving, ticks

    def _counted(found, ticks):
        x, kept, busy = found
        return x, (kept, ticks + busy)

    start = (jnp.zeros((LAYERS, WIDTH)), jnp.asarray(xs), still(xs[0], there), jnp.zeros(stages, jnp.int32))
    kept, xs_out, _, ticks = jax.jit(lambda start: jax.lax.fori_loop(0, schedule.ticks(steps), stepped, start))(start)
    want, left = xs, [np.zeros(WIDTH, np.float32)] * LAYERS
    for _ in range(steps):
        out = []
        for x in want:
            for number in range(LAYERS):
                x, left[number] = layer(WEIGHTS[number], left[number], x)
            out.append(x)
        want = out
    np.testing.assert_allclose(xs_out, np.array(want), atol=1e-5)
    np.testing.assert_allclose(kept, np.array(left), atol=1e-5)
    assert ticks.tolist() == [steps * pieces] * stages  # each stage did each piece of each step, and else nothing
    assert schedule.bubble(steps) == pytest.approx(1 - steps * pieces / schedule.ticks(steps))


def test_bubbles_are_what_the_schedule_says() -> None:
    assert Schedule(4, 4).bubble() == pytest.approx(3 / 7) and Schedule(4, 16).bubble() == pytest.approx(3 / 19)
    assert Schedule(4, 4).bubble(100) < 0.01 < Schedule(4, 2).bubble(100)  # two pieces leave four stages half idle
    assert Schedule(1, 5).bubble() == 0


def test_pieces_are_small_where_that_is_for_free() -> None:
    assert piece_rows(24, 2, 8) == 8 and piece_rows(5, 4, 8) == 8
    assert piece_rows(528, 2, 128) == 136 and piece_rows(528, 1, 128) == 528
    assert piece_rows(8192, 4, 128) == 128
    for rows in (8, 40, 264, 1040):
        for stages in (1, 2, 4, 8):
            size = piece_rows(rows, stages, 128)
            assert size % 8 == 0 and 0 <= -(-rows // size) * size - rows < size
