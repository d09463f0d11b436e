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


def in_order(xs, steps: int = 1, scale: float = 1.0):
    """(what the last layer gives of each piece after so many rounds, what the layers remember)."""
    kept = [np.zeros(WIDTH, np.float32)] * LAYERS
    for _ in range(steps):
        found = []
        for x in xs:
            for number in range(LAYERS):
                x, new = layer(WEIGHTS[number], kept[number], x)
                kept[number] = new * scale
            found.append(x)
        xs = found
    return np.array(xs), np.array(kept)


@pytest.mark.parametrize(("text", "pieces", "used"), [("pp=2,tp=2", 5, 5), ("pp=4", 3, 2), ("pp=4", 1, 1)])
def test_a_batch_goes_through_the_stages_as_through_the_layers(text: str, pieces: int, used: int) -> None:
    there, xs = mesh(text), RNG.standard_normal((pieces, ROWS, WIDTH), np.float32)
    wanted = np.array([0, used * ROWS - 1])
    through = jax.jit(functools.partial(run, work, mesh=there))
    zeros = np.zeros((LAYERS, WIDTH), np.float32)
    found, kept = through(WEIGHTS, zeros, xs, jnp.int32(used), wanted, jnp.float32(0.5))
    outs, left = in_order(xs[:used], scale=0.5)
    np.testing.assert_allclose(found, outs.reshape(-1, WIDTH)[wanted], atol=1e-6)
    np.testing.assert_allclose(kept, left, atol=1e-6)
    assert kept.addressable_shards[0].data.shape == (LAYERS // there.shape["pp"], WIDTH)


@pytest.mark.parametrize(("stages", "pieces"), [(2, 2), (4, 4), (4, 2), (2, 3)])
def test_pieces_that_come_again_find_every_stage_at_work(stages: int, pieces: int) -> None:
    there, schedule, steps = mesh(f"pp={stages}"), Schedule(stages, pieces), 3
    xs = RNG.standard_normal((pieces, ROWS, WIDTH), np.float32)
    end = (steps - 1) * schedule.period + pieces

    def there_is(stage, now):
        number, at, _ = schedule.at(stage, now)
        return (number >= 0) & (number < end) & (at < pieces), jnp.minimum(at, pieces - 1)

    def own(weights, state, x, stage, now):
        """Counts too how often a stage had something to do."""
        busy, at = there_is(stage, now)
        x, kept = work(weights, state[0], x, at, busy, 1.0)
        return x, (kept, state[1] + busy)

    def stepped(now, carry):
        xs, moving, state = carry
        y, moving, state = tick(own, WEIGHTS, state, xs[there_is(0, now)[1]], moving, now, mesh=there)
        leaves, at = there_is(stages - 1, now)
        return xs.at[at].set(jnp.where(leaves, y, xs[at])), moving, state

    start = (jnp.asarray(xs), still(xs[0], there), (jnp.zeros((LAYERS, WIDTH)), jnp.zeros(stages, jnp.int32)))
    looped = jax.jit(lambda start: jax.lax.fori_loop(0, schedule.ticks(steps), stepped, start))
    found, _, (kept, ticks) = looped(start)
    outs, left = in_order(xs, steps)
    np.testing.assert_allclose(found, outs, atol=1e-5)
    np.testing.assert_allclose(kept, left, atol=1e-5)
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
