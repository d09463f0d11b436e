"""Pipelines for inference: the layers of a model cut into stages, each on devices of its own, and pieces of a batch that follow each other
through them.

In a tick each stage does one piece and hands what it makes of it to the next: GPipe's schedule (Huang et al., arXiv 1811.06965) without a
way back. All devices run one program: in a tick in which a stage has no piece (a bubble) it works on rows of nobody. `run` takes a batch
through once; `tick` is one tick alone, for a loop that sends a piece in again when its next token is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

AXIS = "pp"  # of the mesh

# work(weights, state, x, stage, tick, *more) -> (y, state): what one stage does in one tick with its own part of weights and state.
Work = Callable[..., tuple[jax.Array, Any]]


@dataclass(frozen=True)
class Schedule:
    """pieces in flight through stages. A piece may come back to the first stage, for its next step, `period` ticks after it entered: by
    then it has left the last one."""

    stages: int
    pieces: int

    @property
    def period(self) -> int:
        return max(self.stages, self.pieces)

    def ticks(self, steps: int = 1) -> int:
        """How long so many steps of all pieces take."""
        return (steps - 1) * self.period + self.pieces + self.stages - 1

    def bubble(self, steps: int = 1) -> float:
        """The share of the stages' ticks in which they have nothing to do: (stages - 1) / (pieces + stages - 1) of one step."""
        return 1 - steps * self.pieces / self.ticks(steps)

    def at(self, stage: Any, tick: Any) -> tuple[Any, Any, Any]:
        """(number of the entry, piece, step) that a stage has in a tick; numbers are negative before its first one. A piece from `pieces`
        on is none. Works on numbers and on arrays."""
        number = tick - stage
        return number, number % self.period, number // self.period


def piece_rows(rows: int, stages: int, least: int, step: int = 8) -> int:
    """How many rows a piece of a step of `rows` shall have, a multiple of `step`: fewer make the bubble smaller, but a piece of less than
    `least` rows takes as long as one of `least`, for a stage reads all of its weights for each piece."""
    sizes = range(step, -(-rows // step) * step + 1, step)
    return min(sizes, key=lambda size: (Schedule(stages, -(-rows // size)).ticks() * max(size, least), -size))


def run(work: Work, weights: Any, state: Any, xs: jax.Array, pieces: Any, wanted: Any, *more: Any, mesh: Mesh) -> tuple[jax.Array, Any]:
    """Takes the first `pieces` (int or int32 scalar) of xs [pieces, rows, D] through all stages, in order: what a stage keeps of a piece in
    its state, the next piece finds there.

    weights, state: trees of arrays whose first axis is split over the stages. work: as Work, with more[0] the number of the piece and
    more[1] whether there is one, before `more`; with none it must not touch the state. Returns (rows `wanted` [N] of what the last stage
    gives of all pieces [pieces * rows, D], None for all of them, on every device; the new state)."""
    most, last = xs.shape[0], mesh.shape[AXIS] - 1

    def body(weights: Any, state: Any, xs: jax.Array, pieces: Any, wanted: Any, more: Any) -> tuple[jax.Array, Any]:
        stage = lax.axis_index(AXIS)

        def one(tick: jax.Array, carry: tuple[Any, jax.Array, jax.Array]) -> tuple[Any, jax.Array, jax.Array]:
            state, x, out = carry
            number = tick - stage
            at, busy = jnp.clip(number, 0, most - 1), (number >= 0) & (number < pieces)
            y, state = work(weights, state, jnp.where(stage == 0, xs[at], x), at, busy, *more)
            out = lax.dynamic_update_index_in_dim(out, jnp.where(busy, y, out[at]), at, 0)
            return state, _hand_on(y, last), out

        state, _, out = lax.fori_loop(0, pieces + last, one, (state, jnp.zeros_like(xs[0]), jnp.zeros_like(xs)))
        out = out.reshape(-1, xs.shape[-1])
        return _of_last(out if wanted is None else out[wanted], stage, last), state

    own, every = PartitionSpec(AXIS), PartitionSpec()
    return _by_stage(body, mesh, (own, own, every, every, every, every), (every, own))(weights, state, xs, pieces, wanted, more)


def tick(work: Work, weights: Any, state: Any, x: jax.Array, moving: jax.Array, *more: Any, mesh: Mesh) -> tuple[jax.Array, jax.Array, Any]:
    """One tick of all stages. x [rows, D] enters the first; moving [stages, rows, D], split over them: what the others got from the tick
    before (`still` at the start). work: as Work, with more[0] the number of the stage, before `more`. Returns (what the last stage gives
    [rows, D], on every device; what moves on; the new state)."""
    last = mesh.shape[AXIS] - 1

    def body(weights: Any, state: Any, x: jax.Array, moving: jax.Array, more: Any) -> tuple[jax.Array, jax.Array, Any]:
        stage = lax.axis_index(AXIS)
        y, state = work(weights, state, jnp.where(stage == 0, x, moving[0]), stage, *more)
        return _of_last(y, stage, last), _hand_on(y, last)[None], state

    own, every = PartitionSpec(AXIS), PartitionSpec()
    return _by_stage(body, mesh, (own, own, every, own, every), (every, own, own))(weights, state, x, moving, more)


def still(x: Any, mesh: Mesh) -> jax.Array:
    """What moves between the stages before the first tick, for pieces like x [rows, D]."""
    return jnp.zeros((mesh.shape[AXIS], *x.shape), x.dtype)


def _hand_on(y: jax.Array, last: int) -> jax.Array:
    return lax.ppermute(y, AXIS, [(stage, stage + 1) for stage in range(last)])


def _of_last(y: jax.Array, stage: jax.Array, last: int) -> jax.Array:
    return lax.psum(jnp.where(stage == last, y, jnp.zeros_like(y)), AXIS)


def _by_stage(body: Any, mesh: Mesh, specs: Any, found: Any) -> Any:
    """Each stage for itself; over the other axes of the mesh XLA splits what it does, or a shard_map inside."""
    return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=found, axis_names={AXIS}, check_vma=False)
