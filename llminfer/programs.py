"""The declared set of programs of an engine: compiled ahead of use, in the background, most needed first.

After that nothing is ever compiled: `count_compiles` counts what XLA compiles inside an engine's own calls, and must
stay 0.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import functools
import os
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llminfer import step
from llminfer.balance import mover
from llminfer.batch import BatchShape, pack, pack_loop, ship, unship
from llminfer.config import EIGHT_BITS, EngineConfig, ModelConfig
from llminfer.moe import exchanges
from llminfer.scheduler import Plan
from llminfer.target import Target

MAX_THREADS = max(1, min(4, os.cpu_count() or 1))
MANY = 4  # sequences of a loop that are not likely to end all of them before it does
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_counting: ContextVar[list[int] | None] = ContextVar("counting", default=None)


@dataclass(frozen=True)
class Program:
    """kind: mixed | decode | logits | logprobs | history | experts; shape: its static sizes; plain, ring: see llminfer.step."""

    kind: str
    shape: BatchShape
    plain: bool = False
    ring: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.shape.tokens}" + ("_ring" if self.ring else "") + ("_plain" if self.plain else "")


@dataclass(frozen=True)
class Declared:
    """What an engine may ever run. pages: of a sequence; groups: of pages; ring_rows: see spread.py."""

    settings: EngineConfig
    target: Target
    pages: int
    groups: int
    ring_rows: int = 0

    def _program(self, kind: str, tokens: int, rows: int) -> Program:
        return Program(kind, BatchShape(tokens, rows, self.pages, self.groups))

    @functools.cached_property
    def mixed(self) -> list[Program]:
        """Token buckets: a short one for short prompts, and the whole chunk, both with a token for every slot; and where those are many,
        the chunk alone, for when nobody decodes."""
        slots, chunk = self.settings.slots, self.settings.chunk
        sizes = {min(32, chunk) + slots, chunk + slots} | ({chunk} if slots * 16 >= chunk > 32 + slots else set())
        return [self._program("mixed", -(-size // 8) * 8, slots) for size in sorted(sizes)]

    @functools.cached_property
    def ring(self) -> list[Program]:
        """One, where there are rows for a ring."""
        return [replace(self._program("mixed", self.ring_rows, self.settings.slots), ring=True)] if self.ring_rows else []

    @functools.cached_property
    def decode(self) -> list[Program]:
        """Row buckets: one sequence alone, a few, many, all slots; more of them where they compile fast."""
        slots = self.settings.slots
        sizes = {1, 8, 64, slots} | (set() if self.target.branches else {32, 128})
        least = 2 if self.target.turned and self.settings.quantize in EIGHT_BITS else 1  # XLA multiplies two rows faster than one
        return [self._program("decode", rows, rows) for rows in sorted({max(least, min(rows, slots)) for rows in sizes})]

    @functools.cached_property
    def logits(self) -> Program:
        return self._program("logits", self.settings.chunk, 1)

    @functools.cached_property
    def logprobs(self) -> Program:
        return self._program("logprobs", self.settings.chunk, 1)

    @functools.cached_property
    def writer(self) -> Program:
        return self._program("history", self.settings.chunk, 1)

    @functools.cached_property
    def mover(self) -> Program:
        """Gives experts other slots."""
        return self._program("experts", 0, 1)

    def all(self) -> list[Program]:
        """What serving needs, the smaller first."""
        first, *rest = self.mixed
        last = [self.writer, *([self.mover] if self.settings.expert_copies else [])]
        return [*self._variants(first, self.decode[0], *rest, *self.ring, *self.decode[1:]), *last]

    def expected(self, tokens: int, sequences: int) -> list[Program]:
        """What prompts of so many tokens and so many sequences at once need; 0 for none."""
        chunks = {tokens % self.settings.chunk, min(tokens, self.settings.chunk)} - {0}
        decode = [_fit(self.decode, sequences)] if sequences else []
        ring = self.ring if self._goes_around(min(tokens, self.settings.chunk)) else []
        return self._variants(*(_fit(self.mixed, n) for n in sorted(chunks)), *ring, *decode)

    def of(self, plan: Plan) -> Program:
        """The smallest program that does a plan; around a ring where a prompt begins with a chunk that fills half of it, alone."""
        program = _fit(self.decode, len(plan.items)) if plan.steps else _fit(self.mixed, sum(item.count for item in plan.items))
        if not plan.steps and len(plan.items) == 1 and plan.items[0].start == 0 and self._goes_around(plan.items[0].count):
            (program,) = self.ring
        return replace(program, plain=self._is_plain(plan))

    def _goes_around(self, count: int) -> bool:
        return count > 1 and 2 * count >= self.ring_rows > 0

    def _variants(self, *programs: Program) -> list[Program]:
        """Each program, where branches cost something after the plain one."""
        return [variant for p in programs for variant in ([p] if self.target.branches else [replace(p, plain=True), p])]

    def _is_plain(self, plan: Plan) -> bool:
        """Whether the plain program will do. A loop of it cannot be left early: for few sequences, which may all end, only if none can."""
        if self.target.branches or not all(item.seq.request.params.plain for item in plan.items):
            return False
        ends = any(item.seq.request.end_ids for item in plan.items)
        whole = plan.steps == self.settings.decode_steps and not plan.eager and (len(plan.items) >= MANY or not ends)
        return whole or not plan.steps


def _fit(programs: list[Program], tokens: int) -> Program:
    return next((p for p in programs if p.shape.tokens >= tokens), programs[-1])


class Programs:
    """Compiles `wanted` in the background, in that order, and anything else of its kinds when it is asked for."""

    def __init__(self, c: ModelConfig, target: Target, shapes: tuple[Any, Any, Any], most: int, progress: Any = None, routing: Any = None):
        """shapes: abstract (weights, cache, history); most: the longest decode loop; routing: `placement.abstract_routing`, None where
        tokens of experts are not counted."""
        self.c, self.target, self.shapes, self.most = c, target, (*shapes, routing), most
        self.seconds: dict[Program, float] = {}
        self.progress = progress
        self._futures: dict[Program, Future] = {}
        self._waiting: collections.deque[Program] = collections.deque()
        self._threads: set[threading.Thread] = set()
        self._lock = threading.Lock()  # of the three above
        self._tracing = threading.Lock()  # in Python, so one at a time, and in the order asked for
        _alive.add(self)

    def want(self, programs: list[Program]) -> None:
        """Queues programs for compilation."""
        with self._lock:
            for program in programs:
                if program not in self._futures:
                    self._futures[program] = Future()
                    self._waiting.append(program)
            for _ in range(min(len(self._waiting), MAX_THREADS - len(self._threads))):
                thread = threading.Thread(target=self._work, name="compile", daemon=True)
                self._threads.add(thread)
                thread.start()

    def _work(self) -> None:
        """A thread's life: as long as something is queued."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads.discard(threading.current_thread())
                    return
                program = self._waiting.popleft()
            try:
                self._futures[program].set_result(self._compile(program))
            except BaseException as error:  # whoever waits for the program gets it
                self._futures[program].set_exception(error)

    def get(self, program: Program) -> Any:
        """The compiled program; waits for it if it must."""
        self.want([program])
        return self._futures[program].result()

    def wait_first(self) -> None:
        """Returns when the program that was asked for first is there."""
        if self._futures:
            next(iter(self._futures.values())).result()

    def wait_all(self) -> None:
        """Returns when everything that was asked for so far is there."""
        for future in list(self._futures.values()):
            future.result()

    def lower(self, program: Program) -> Any:
        """The lowered (not yet compiled) program: for the planner and for tests that read the HLO. What changes from step to step comes
        as one array; see `ship`."""
        if program.kind == "history":
            history, number = self.shapes[2], np.int32(0)
            write = jax.jit(step.write_history, donate_argnums=0, out_shardings=history.sharding)
            return write.lower(history, np.zeros(program.shape.tokens, np.int32), number, number, number)
        if program.kind == "experts":
            return mover(self.shapes[0], self.c, self.target)
        decode = step.decode_loop if self.target.stages == 1 else step.pipelined_decode_loop
        functions = {"mixed": step.mixed_step, "decode": decode, "logits": step.prompt_logits, "logprobs": step.token_logprobs}
        function = functions[program.kind]
        extra: tuple[Any, ...] = ()
        keywords: dict[str, Any] = {}
        if program.kind == "decode":
            extra, keywords = (pack_loop(Plan(()), program.shape.rows),), {"most": self.most}
        keywords |= {name: True for name in ("plain", "ring") if getattr(program, name)}
        if program.kind == "logprobs":
            extra = (np.zeros(program.shape.tokens, np.int32), np.int32(0))
        function = functools.partial(function, c=self.c, target=self.target, **keywords)
        like = (pack((), program.shape), *extra)

        def shipped(params: Any, cache: Any, history: Any, routing: Any, flat: Any) -> Any:
            found, cache, history = function(params, replace(cache, routing=routing), history, *unship(flat, like))
            return found, replace(cache, routing=None), history, cache.routing and cache.routing.counts

        # The cache and the history come back as they went in; what is drawn is read by the host. So are counts, whenever somebody asks:
        # they are not given away to the next step.
        kept = jax.tree.map(lambda s: s.sharding, self.shapes[1:3])
        # The mesh tells kernels the chip that they are lowered for, present here or not.
        mesh = self.target.mesh or Mesh(np.array(list(kept[1].device_set)), ("devices",))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            # Said of what is shipped, too: left to itself XLA cuts it up over a mesh, and what is made of it travels in pieces.
            flat = ship(like)
            flat = jax.ShapeDtypeStruct(flat.shape, flat.dtype, sharding=kept[1])
            return jax.jit(shipped, donate_argnums=(1, 2), out_shardings=(kept[1], *kept, kept[1])).lower(*self.shapes, flat)

    @property
    def options(self) -> dict[str, str] | None:
        """What XLA is to be told. It finds no barrier of its own for the exchange among 32 TPUs or more, and gives up."""
        ragged = self.target.exchange == "ragged" and exchanges(self.c, self.target)
        return {"xla_tpu_force_custom_barrier_for_ragged_all_to_all": "true"} if ragged else None

    def _compile(self, program: Program) -> Any:
        handle = self.progress.task(f"compile {program.kind} {program.shape.tokens}", 1) if self.progress else None
        with self._tracing:
            start = time.perf_counter()
            lowered = self.lower(program)
        compiled = lowered.compile(self.options)
        self.seconds[program] = time.perf_counter() - start
        if handle:
            handle.advance(1)
            handle.done()
        return compiled

    def close(self) -> None:
        """Gives up what is queued and waits for what is being compiled."""
        with self._lock:
            for program in self._waiting:
                self._futures[program].cancel()
            self._waiting.clear()
            threads = list(self._threads)
        for thread in threads:
            thread.join()


_alive: weakref.WeakSet[Programs] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """XLA must not be cut off in the middle of a compilation by the interpreter's end."""
    for programs in list(_alive):
        programs.close()


@contextlib.contextmanager
def count_compiles(counter: list[int]) -> Iterator[None]:
    """While this runs (in this thread), each compilation by XLA adds one to counter[0]."""
    _listen()
    token = _counting.set(counter)
    try:
        yield
    finally:
        _counting.reset(token)


@functools.cache
def _listen() -> None:
    def heard(event: str, *_: Any, **__: Any) -> None:
        if event == _COMPILE_EVENT and (counter := _counting.get()) is not None:
            counter[0] += 1

    jax.monitoring.register_event_duration_secs_listener(heard)


def keep_compiled(folder: Path) -> None:
    """Turns on XLA's persistent compilation cache in `folder`, unless the user has set one up already."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
