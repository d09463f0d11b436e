"""Prompts on devices of their own: one engine computes them and draws their first tokens, another goes on from there. What it is asked
is what an Engine is asked. So a long prompt delays nobody's next token, and each mesh may suit what is done on it: Splitwise (arXiv
2311.18677), DistServe (arXiv 2401.09670).

Pages go from devices to devices, when the second engine has room: gathered to an array of a fixed number of them, copied, and put in
their places in the other cache; the host sends only their numbers. What that cache has already, by its hash, is not sent. A sequence that
loses its pages there goes back to the first engine, as a longer prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llminfer import placement
from llminfer.engine import Engine
from llminfer.programs import Program, count_compiles
from llminfer.replicas import EnginePrograms, Replicas
from llminfer.request import SamplingParams, Sequence


class Disaggregated(Replicas):
    """again: gives the weights (see Checkpoint.leaves) once more, for a mesh of another shape, which has them arranged in another way."""

    def __init__(self, prefill: Engine, decode: Engine, again: Callable[[], Iterable[tuple[str, Any]] | None]):
        super().__init__([prefill, decode])
        self.prefill, self.decode = prefill, decode
        self.programs = _ByKind([prefill, decode])
        self._again = again
        self._carrier = _Carrier(prefill, decode)
        self._held: dict[Sequence, Sequence] = {}  # who waits to be handed over -> who holds its slot and pages meanwhile
        self._handed = 0
        prefill.scheduler.prompts_only = True
        decode.scheduler.receive = self._receive

    def warm_up(self, expect: tuple[int, int] | None = None) -> None:
        self.programs.want(self.declared.all() if expect is None else self.declared.expected(*expect))

    def load(self, leaves: Iterable[tuple[str, Any]] | None) -> None:
        self._carrier.compile()
        self.prefill.load(leaves)
        if self._carrier.alike:
            self.decode.load_from(self.prefill)
        else:
            self.decode.load(self._again())

    def check(self, prompt: Iterable[int], params: SamplingParams) -> list[int]:
        return self.decode.check(self.prefill.check(prompt, params), params)

    def add(self, prompt: list[int], params: SamplingParams, tokenizer: Any = None) -> list[Sequence]:
        return self.prefill.add(prompt, params, tokenizer)

    def abort(self, seq: Sequence) -> None:
        theirs = self.decode.scheduler
        (self.decode if seq in theirs.running or seq in theirs.waiting else self.prefill).abort(seq)
        self._let_go()

    @property
    def busy(self) -> bool:
        return super().busy or bool(self._held)

    def step(self, *, watched: bool = False) -> list[Sequence]:
        """A step of each engine that has work: both are sent before the next call reads them, so both meshes are at work."""
        touched = [seq for engine in (self.decode, self.prefill) if engine.busy for seq in engine.step(watched=watched)]
        self._move()
        return touched

    def _move(self) -> None:
        """Sequences that have their first token go to the engine that decodes; those that lost their pages there come back."""
        ours, theirs = self.prefill.scheduler, self.decode.scheduler
        under_way = {id(item.seq) for plan in ours.unread for item in plan.items}
        done = [s for s in ours.running if s.output and s.length - s.computed == 1 and not s.pending and id(s) not in under_way]
        for seq in done:
            kept: dict[str, Any] = dict(slot=seq.slot, pages=seq.pages, hashes=seq.hashes, findable=seq.findable)
            self._held[seq] = Sequence(seq.request, seq.index, seq.key, **kept)
            ours.running.remove(seq)
            seq.slot, seq.pages, seq.findable, seq.elsewhere = -1, [], 0, seq.computed
            theirs.wait(seq)
        for seq in [seq for seq in theirs.waiting if not seq.elsewhere]:
            theirs.waiting.remove(seq)
            ours.wait(seq)
        self._let_go()

    def _let_go(self) -> None:
        for seq in [seq for seq in self._held if seq.finish is not None]:
            self._release(self._held.pop(seq))

    def _release(self, held: Sequence) -> None:
        self.prefill.pages.release(held)
        self.prefill.scheduler.free_slots.append(held.slot)

    def _receive(self, seq: Sequence, found: int) -> None:
        """Copies the pages of a sequence that has got a slot, but those of its first `found` tokens, and lets the others go."""
        held, pages = self._held.pop(seq), self.decode.pages
        places = range(found // pages.page_size, pages.pages_for(seq.elsewhere))
        pairs = [[(a[i], b[i]) for i in places if b[i] >= 0] for a, b in zip(held.pages, seq.pages, strict=True)]
        with count_compiles(self.decode._compiled):
            self._carrier.carry(pairs)
        self._handed += 1
        self._release(held)

    def stats(self) -> dict[str, Any]:
        return super().stats() | {"handovers": self._handed, "handover_pages": self._carrier.pages, "handover_bytes": self._carrier.bytes}


class _ByKind(EnginePrograms):
    """The programs of an engine that has prompts, and of one that decodes."""

    def want(self, programs: list[Program]) -> None:
        prefill, decode = self._each
        prefill.want([p for p in programs if p.kind != "decode"])
        decode.want([p for p in programs if p.kind in ("decode", "history")])


class _Carrier:
    """Carries pages from one engine's cache to another's. pages, bytes: carried so far, and of what was copied for that."""

    def __init__(self, source: Engine, to: Engine):
        self.source, self.to = source, to
        shape = lambda engine: dict(engine.target.mesh.shape) if engine.target.mesh is not None else {}
        self.alike = shape(source) == shape(to)
        self.size = max(1, min(to.declared.pages, to.settings.chunk // to.settings.page_size))  # pages a copy
        # Between meshes of one shape each device has its counterpart. Else all pages go to every device of the other, key-value heads
        # as a checkpoint has them.
        stored = source._stored.num_kv_heads
        self._every, self._copies = (1, 1) if self.alike else (source.c.num_kv_heads // stored, to.c.num_kv_heads // stored)
        self.pages = self.bytes = 0

    def compile(self) -> None:
        """Both programs. What travels lies as the caches do, or whole on every device."""
        cache, there = self.source._shapes[1], self.to._shapes[1]
        everywhere = [engine._shapes[2].sharding for engine in (self.source, self.to)]
        ids = lambda where: jax.ShapeDtypeStruct((len(self.source.pages.groups), self.size), jnp.int32, sharding=where)
        places = [jax.tree.map(lambda s, w=w: s.sharding if self.alike else w, c) for c, w in zip((cache, there), everywhere, strict=True)]
        lift = jax.jit(lambda cache, ids: _lift(cache, ids, self._every), out_shardings=places[0])
        self._lift = lift.lower(cache, ids(everywhere[0])).compile()
        lifted = jax.eval_shape(lift, cache, ids(everywhere[0]))
        self._places = places[1]
        came = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), lifted, self._places)
        put = jax.jit(lambda cache, came, ids: _put(cache, came, ids, self._copies), donate_argnums=0, out_shardings=_places(there))
        self._put = put.lower(there, came, ids(everywhere[1])).compile()
        self._size = placement.tree_bytes(lifted)

    def carry(self, pairs: list[list[tuple[int, int]]]) -> None:
        """pairs[g]: the page of group g in the one cache, and the page that it becomes in the other."""
        for start in range(0, max(map(len, pairs)), self.size):
            ids = np.full((2, len(pairs), self.size), -1, np.int32)
            for group, some in enumerate(pairs):
                part = some[start : start + self.size]
                ids[:, group, : len(part)] = np.array(part, np.int32).reshape(-1, 2).T
            came = jax.device_put(self._lift(self.source._cache, ids[0]), self._places)
            self.to._cache = self._put(self.to._cache, came, ids[1])
            self.bytes += self._size
        self.pages += sum(map(len, pairs))


def _places(shapes: Any) -> Any:
    return jax.tree.map(lambda s: s.sharding, shapes)


def _lift(cache: Any, ids: jax.Array, every: int) -> Any:
    """Pages ids [G, N] (-1: any) of a cache, one of `every` equal key-value heads: a tree like the cache, [layers, N, ...]. Page by page:
    for a gather XLA copies the whole cache of one head on a TPU."""

    def take(x: jax.Array, ids: jax.Array) -> jax.Array:
        one = lambda i: lax.dynamic_slice_in_dim(x, jnp.maximum(ids[i], 0), 1, axis=1)
        put = lambda i, out: lax.dynamic_update_slice_in_dim(out, one(i), i, axis=1)
        out = lax.fori_loop(0, ids.shape[0], put, jnp.zeros((x.shape[0], ids.shape[0], *x.shape[2:]), x.dtype))
        return _heads(out, lambda x, axis: lax.slice_in_dim(x, 0, None, every, axis))

    return type(cache)(tuple(jax.tree.map(lambda x, i=i: take(x, ids[i]), group) for i, group in enumerate(cache.groups)))


def _put(cache: Any, came: Any, ids: jax.Array, copies: int) -> Any:
    """The cache with what `_lift` gave as its pages ids [G, N] (-1: nowhere), each key-value head `copies` times. By page, in place."""
    came = jax.tree.map(lambda x: _heads(x, lambda x, axis: jnp.repeat(x, copies, axis)), came)

    def put(n: jax.Array, cache: Any) -> Any:
        def one(x: jax.Array, new: jax.Array, page: jax.Array) -> jax.Array:
            new, at = lax.dynamic_slice_in_dim(new, n, 1, axis=1), jnp.maximum(page, 0)
            old = lax.dynamic_slice_in_dim(x, at, 1, axis=1)
            return lax.dynamic_update_slice_in_dim(x, jnp.where(page >= 0, new, old), at, axis=1)

        each = zip(cache.groups, came.groups, strict=True)
        return type(cache)(tuple(jax.tree.map(lambda x, y, i=i: one(x, y, ids[i, n]), a, b) for i, (a, b) in enumerate(each)))

    return lax.fori_loop(0, ids.shape[1], put, cache)


def _heads(x: jax.Array, change: Any) -> jax.Array:
    """Pages [layers, N, heads, page, lanes], or scales [layers, N, 2 * heads] (the two of a head side by side), with other heads."""
    return change(x, 2) if x.ndim == 5 else change(x.reshape(*x.shape[:2], -1, 2), 2).reshape(*x.shape[:2], -1)
