"""The engine: one scheduler, one cache, one set of programs. Requests go in, sequences come out token by token.

A step is: schedule on the host, pack, run one program on the device, read its int32 tokens, commit.
"""

from __future__ import annotations

import functools
import os
import secrets
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llminfer import cache as kv
from llminfer import params as weights
from llminfer.batch import BatchShape, pack, pack_loop
from llminfer.config import EngineConfig, ModelConfig
from llminfer.errors import UserError, refuse
from llminfer.pages import Pages
from llminfer.programs import Program, Programs, abstract, count_compiles, last_tokens
from llminfer.quant import QTensor, quantize_int8
from llminfer.request import MAX_STOPS, FinishReason, Request, SamplingParams, Sequence
from llminfer.sampler import request_key
from llminfer.scheduler import Item, Plan, Scheduler
from llminfer.target import Target
from llminfer.text import TextStream

# A decode loop that someone watches should come back this often, in seconds.
STREAM_INTERVAL = 0.1


class Engine:
    """Serves one model on one target. `params` are host or device arrays in the listed layout."""

    def __init__(self, c: ModelConfig, settings: EngineConfig, target: Target, progress: Any = None):
        self.c, self.settings, self.target = c, settings, target
        self.context = min(2048, c.max_position) if settings.context is None else settings.context
        if self.context > c.max_position:
            raise refuse("context", self.context, f"{c.name} was made for at most {c.max_position} positions")
        self.dtype = jnp.dtype(settings.kv_dtype or target.dtype)
        totals = _pool_sizes(c, settings, self.context, self.dtype.itemsize, target)
        self.pages = Pages(c.groups, totals, settings.page_size, prefix_cache=settings.prefix_cache)
        self.scheduler = Scheduler(self.pages, slots=settings.slots, chunk=settings.chunk, decode_steps=settings.decode_steps)
        shapes = kv.abstract(c, totals, settings.page_size, self.dtype, stacked=target.stacked)
        self.cache_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
        self.weights_bytes = 0
        self._cache_shapes = shapes
        self._cache: Any = None
        self._params: Any = None
        self._last: Any = None
        self.programs: Any = None
        self._progress = progress
        self._steps = {"mixed": 0, "decode": 0}
        self._prefill_tokens = self._decode_tokens = 0
        self._prefill_s = self._decode_s = 0.0
        self._compiled = [0]
        self._step_s = 0.0

    # The declared set of programs -------------------------------------------------------------------------------

    def _shape(self, tokens: int, rows: int) -> BatchShape:
        return BatchShape(tokens, rows, self.pages.pages_for(self.context), len(self.c.groups))

    @functools.cached_property
    def _mixed(self) -> list[Program]:
        """Token buckets: a short one for short prompts, and the whole chunk; both with a token for every slot."""
        slots, chunk = self.settings.slots, self.settings.chunk
        sizes = sorted({min(32, chunk) + slots, chunk + slots})
        return [Program("mixed", self._shape(-(-size // 8) * 8, slots)) for size in sizes]

    @functools.cached_property
    def _decode(self) -> list[Program]:
        """Row buckets: one sequence alone, a few, all slots."""
        slots = self.settings.slots
        return [Program("decode", self._shape(rows, rows)) for rows in sorted({1, min(8, slots), slots})]

    @functools.cached_property
    def _logits(self) -> Program:
        return Program("logits", self._shape(self.settings.chunk, 1))

    def warm_up(self, prompt_tokens: int | None = None, sequences: int = 1) -> None:
        """Starts compiling in the background, first what a prompt of that length and so many sequences need."""
        mixed = sorted(self._mixed, key=lambda p: p is not self._fit(self._mixed, prompt_tokens or self.settings.chunk))
        decode = sorted(self._decode, key=lambda p: p is not self._fit(self._decode, sequences))
        self.programs.want([mixed[0], decode[0], *mixed[1:], *decode[1:]])

    @staticmethod
    def _fit(programs: list[Program], tokens: int) -> Program:
        return next((p for p in programs if p.shape.tokens >= tokens), programs[-1])

    # Weights ----------------------------------------------------------------------------------------------------

    def prepare(self, shapes: Any = None) -> None:
        """Declares the programs before the weights are there: compiling and reading then go on side by side. shapes:
        abstract weights in the target's layout."""
        device = jax.sharding.SingleDeviceSharding(_device(self.target))
        place = functools.partial(jax.tree.map, lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device))
        last = jax.ShapeDtypeStruct((self.settings.slots,), jnp.int32)
        shapes = (place(shapes), place(self._cache_shapes), place(last))
        self.programs = Programs(self.c, self.target, shapes, self.settings.decode_steps, self._progress)

    def abstract_params(self) -> Any:
        """Shapes of the weights as this engine holds them."""
        specs = weights.stacked_specs(self.c) if self.target.stacked else weights.param_specs(self.c)
        dtype = jnp.dtype(self.target.dtype)

        def shape(spec: weights.ParamSpec) -> Any:
            if spec.matrix and self.settings.quantize == "int8":
                scale = spec.shape[:-2] + spec.shape[-1:]
                return QTensor(jax.ShapeDtypeStruct(spec.shape, jnp.int8), jax.ShapeDtypeStruct(scale, jnp.float32))
            return jax.ShapeDtypeStruct(spec.shape, dtype)

        return jax.tree.map(shape, specs, is_leaf=weights.is_spec)

    def load(self, params: Any) -> None:
        """Puts weights of the listed layout on the device: cast, quantized and stacked as the target wants them. None:
        random ones from settings.seed."""
        device, dtype = _device(self.target), jnp.dtype(self.target.dtype)
        with jax.default_device(device):
            if params is None:
                specs = weights.param_specs(self.c)
                params = jax.jit(lambda key: weights.init(specs, key, dtype))(jax.random.key(self.settings.seed % 2**63))
            else:
                params = jax.tree.map(lambda x: jax.device_put(x if x.dtype == dtype else x.astype(dtype), device), params)
            if self.settings.quantize == "int8":
                params = jax.tree.map(_quantize, params, weights.param_specs(self.c))
            if self.target.stacked:
                params = jax.jit(functools.partial(weights.stack, c=self.c))(params)
            self._cache = kv.allocate(self._cache_shapes, poison=self.settings.debug)
            self._last = last_tokens(self.settings.slots)
        self._params = params
        self.weights_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
        if self.programs is None:
            self.prepare(abstract(params))

    # Requests ---------------------------------------------------------------------------------------------------

    def check(self, prompt: Iterable[int], params: SamplingParams) -> list[int]:
        """The prompt as a list of legal ids. Raises UserError for what can never be served."""
        prompt = list(prompt)
        if not prompt:
            raise refuse("prompt", prompt, "must have at least one token")
        for token in prompt:
            if isinstance(token, bool) or not isinstance(token, (int, np.integer)) or not 0 <= token < self.c.vocab_size:
                raise refuse("token id", token, f"must be an integer from 0 to {self.c.vocab_size - 1}")
        if len(prompt) >= self.context:
            raise refuse("prompt", f"{len(prompt)} tokens", f"must be shorter than the context of {self.context} (--set context=N)")
        most = min(len(prompt) + params.max_tokens, self.context)
        if self.pages.pages_for(most) > self.pages.total:
            room = self.pages.total * self.settings.page_size
            raise refuse("prompt + max_tokens", most, f"needs more pages than there are ({room} tokens; --set pages=N)")
        ends = len(params.stop_token_ids) + (0 if params.ignore_eos else len(self.c.eos_ids))
        if ends > MAX_STOPS:
            raise refuse("stop_token_ids", ends, f"at most {MAX_STOPS} end tokens, the model's {len(self.c.eos_ids)} included")
        return [int(token) for token in prompt]

    def add(self, prompt: list[int], params: SamplingParams, tokenizer: Any = None) -> list[Sequence]:
        """Queues a checked prompt; one Sequence for each of params.n samples."""
        seed = secrets.randbits(63) if params.seed is None else params.seed
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(self.c.eos_ids))
        limit = min(params.max_tokens, self.context - len(prompt))
        request = Request(prompt, params, seed, limit, ends, time.perf_counter())
        made = []
        for index in range(params.n):
            seq = Sequence(request, index, request_key(seed, index))
            seq.stream = TextStream(tokenizer.stream() if tokenizer else None, params.stops)
            self.scheduler.add(seq)
            made.append(seq)
        return made

    def abort(self, seq: Sequence) -> None:
        self.scheduler.abort(seq)

    @property
    def busy(self) -> bool:
        return self.scheduler.busy

    def step(self, *, watched: bool = False) -> list[Sequence]:
        """One step; the sequences that got tokens or ended. watched: someone reads along, so come back soon."""
        most = self.settings.decode_steps
        if watched and self._step_s:
            most = max(1, min(most, int(STREAM_INTERVAL / self._step_s)))
        plan = self.scheduler.schedule(most)
        if plan is None:
            return []
        kind = "decode" if plan.steps else "mixed"
        program = self._fit(self._decode, len(plan.items)) if plan.steps else self._fit(self._mixed, sum(i.count for i in plan.items))
        compiled = self.programs.get(program)
        with count_compiles(self._compiled):
            start = time.perf_counter()
            drawn = self._run(compiled, program, plan)
            seconds = time.perf_counter() - start
        self._steps[kind] += 1
        self._book(plan, drawn, seconds)
        touched = self.scheduler.commit(plan, drawn)
        for seq in touched:
            self._show(seq)
        return touched

    def _run(self, compiled: Any, program: Program, plan: Plan) -> list[list[int]]:
        batch = pack(plan.items, program.shape)
        if self.settings.debug:
            self._check_pages(plan)
        extra = (pack_loop(plan, program.shape.rows),) if plan.steps else ()
        tokens, self._cache, self._last = compiled(self._params, self._cache, self._last, batch, *extra)
        tokens = np.asarray(tokens).reshape(program.shape.rows, -1)[: len(plan.items)]
        return [[int(t) for t in row if t != -1] for row in tokens]

    def _check_pages(self, plan: Plan) -> None:
        for item in plan.items:
            for group, pages in zip(self.pages.groups, item.seq.pages, strict=True):
                if any(page >= group.total or (page >= 0 and group.count[page] < 1) for page in pages):
                    raise RuntimeError(f"page table of slot {item.seq.slot} names a page that it does not own: {pages}")

    def _book(self, plan: Plan, drawn: list[list[int]], seconds: float) -> None:
        """Throughput: a mixed step counts as prefill, a loop as decode."""
        if plan.steps:
            steps = max((len(tokens) for tokens in drawn), default=0)
            self._decode_s += seconds
            self._decode_tokens += sum(len(tokens) for tokens in drawn)
            self._step_s = seconds / max(steps, 1)
        else:
            self._prefill_s += seconds
            self._prefill_tokens += sum(item.count for item in plan.items)

    def _show(self, seq: Sequence) -> None:
        """Turns new tokens into text; a stop string in it ends the sequence at that token."""
        now = time.perf_counter()
        seq.first_time = seq.first_time or now
        seq.last_time = now
        while seq.printed < len(seq.output):
            token = seq.output[seq.printed]
            seq.printed += 1
            if token in seq.request.end_ids:
                continue  # an end token is not part of the text
            if seq.stream.push(token):
                del seq.output[seq.printed :]
                self.scheduler.end(seq, FinishReason.STOP)
                return
        if seq.finish is not None:
            seq.stream.finish()

    # Logits and statistics --------------------------------------------------------------------------------------

    def prompt_logits(self, prompt: list[int]) -> np.ndarray:
        """float32 [len, vocab] of every position, through the paged cache in chunks, as a served prompt would be."""
        request = Request(prompt, SamplingParams(), 0, 1, frozenset(), 0.0)
        seq = Sequence(request, 0, request_key(0, 0), pages=[[] for _ in self.pages.groups])
        program, out = self._logits, []
        compiled = self.programs.get(program)
        try:
            with count_compiles(self._compiled):
                for start in range(0, len(prompt), self.settings.chunk):
                    count = min(self.settings.chunk, len(prompt) - start)
                    if not self.pages.reserve(seq, start + count):
                        raise UserError(f"prompt_logits: {len(prompt)} tokens need more pages than are free ({self.pages.free})")
                    batch = pack([Item(seq, start, count, 0)], program.shape)
                    logits, self._cache, self._last = compiled(self._params, self._cache, self._last, batch)
                    out.append(np.asarray(logits)[:count])
                    seq.computed = start + count
                    self.pages.computed(seq)
        finally:
            self.pages.release(seq)
        return np.concatenate(out)

    def stats(self) -> dict[str, Any]:
        """Counters since the start; see DESIGN for the names."""
        loops = self._steps["decode"]
        return {
            "compiles_after_warmup": self._compiled[0],
            "programs": {f"{p.kind}_{p.shape.tokens}": round(s, 3) for p, s in self.programs.seconds.items()},
            "compile_s": round(sum(self.programs.seconds.values()), 3),
            "pages_free": self.pages.free,
            "pages_total": self.pages.total,
            "waiting": len(self.scheduler.waiting),
            "running": len(self.scheduler.running),
            "preemptions": self.scheduler.preemptions,
            "prefix_hit_tokens": self.scheduler.prefix_hit_tokens,
            "mixed_steps": self._steps["mixed"],
            "decode_loops": loops,
            "prefill_tokens": self._prefill_tokens,
            "decode_tokens": self._decode_tokens,
            "prefill_s": self._prefill_s,
            "decode_s": self._decode_s,
            "accepted_per_step": 1.0,
            "weights_bytes": self.weights_bytes,
            "cache_bytes": self.cache_bytes,
        }


def _device(target: Target) -> Any:
    return jax.devices()[0] if target.mesh is None else target.mesh.devices.flat[0]


@jax.jit
def _quantize_jit(w: jax.Array) -> QTensor:
    return quantize_int8(w)


def _quantize(w: jax.Array, spec: weights.ParamSpec) -> Any:
    return _quantize_jit(w) if spec.matrix else w


def _pool_sizes(c: ModelConfig, settings: EngineConfig, context: int, itemsize: int, target: Target) -> tuple[int, ...]:
    """Pages of each group. Full groups: settings.pages, or as many as all slots at full context need and memory
    allows; sliding groups: what all slots can hold at most."""
    size = settings.page_size
    per_sequence = -(-context // size)
    moving = max(settings.chunk, settings.decode_steps)

    def sliding(window: int) -> int:
        return settings.slots * min(per_sequence, Pages.sliding_need(window, moving, size))

    fixed = sum(sliding(w) * kv.page_bytes(c, size, itemsize, g) for g, w in enumerate(c.groups) if w)
    full = [g for g, w in enumerate(c.groups) if not w]
    weight_bytes = c.num_params * jnp.dtype(target.dtype).itemsize
    memory = _memory(target)
    spare = memory * 0.92 - weight_bytes - fixed
    page = sum(kv.page_bytes(c, size, itemsize, g) for g in full)
    wanted = settings.slots * per_sequence if settings.pages is None else settings.pages
    if settings.pages is None and full:
        wanted = min(wanted, int(spare // page))
    if spare < wanted * page or wanted < 1:
        have, need = memory / 2**30, (weight_bytes + fixed + max(wanted, 1) * page) / 2**30
        raise UserError(
            f"model={c.name}: weights and cache need {need:.1f} GiB, the device has {have:.1f} GiB; less context, slots or pages would do"
        )
    return tuple(sliding(w) if w else wanted for w in c.groups)


def _memory(target: Target) -> float:
    """Bytes of the device that are there to use."""
    stats = _device(target).memory_stats() if target.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
