"""The engine: one scheduler, one cache, one set of programs. Requests go in, sequences come out token by token.

A step is: schedule on the host, pack, send one program to the device; then read the int32 tokens of the one before, and commit them.
So the device never waits for the host, except where the next plan depends on what the last one finds.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from llminfer import cache as kv
from llminfer import placement, stages
from llminfer.arrange import on_mesh
from llminfer.balance import Experts
from llminfer.batch import pack, pack_loop, ship
from llminfer.config import EngineConfig, ModelConfig, evicting
from llminfer.errors import UserError, refuse
from llminfer.metrics import Histogram
from llminfer.pages import Pages
from llminfer.programs import Declared, Program, Programs, count_compiles
from llminfer.request import MAX_STOPS, FinishReason, Logprobs, Request, SamplingParams, Sequence
from llminfer.sampler import request_key
from llminfer.scheduler import Item, Plan, Scheduler
from llminfer.spread import ring_rows
from llminfer.step import NOTHING
from llminfer.target import Target
from llminfer.text import TextStream

# A decode loop that someone watches should come back this often, in seconds. Another may be under way behind it.
STREAM_INTERVAL = 0.05
# A token of a watched sequence takes at most so many times as long while a prompt comes in beside it.
SLOWED = 2.5
# Steps of a profile; more would make it too large to look at.
PROFILED_STEPS = 50
_WRITTEN = 1 << 62


class NoRoom(UserError):
    """A prompt to be scored finds too few free pages."""


@dataclass
class _Flight:
    """A step that was sent to the device: what it returns, and when it was sent."""

    plan: Plan
    program: Program
    tokens: Any
    said: Any
    sent: float


class Engine:
    """Serves one model on one target: `load` gives it its weights."""

    def __init__(self, c: ModelConfig, settings: EngineConfig, target: Target, progress: Any = None):
        self._stored = c = evicting(c, settings.kv_policy)  # as a checkpoint has it
        target = placement.fitted(c, settings, target)
        self.c, self.settings, self.target = on_mesh(c, target), settings, target
        self.context = min(2048, c.max_position) if settings.context is None else settings.context
        if self.context > c.max_position and not c.sink_window:
            raise refuse("context", self.context, f"{c.name} was made for at most {c.max_position} positions")
        placement.check_cache(c, settings)
        totals = placement.pool_sizes(c, settings, self.context, target)
        how: dict[str, Any] = dict(prefix_cache=settings.prefix_cache, sinks=c.sinks, holders=target.ways("pages"))
        self.pages = Pages(c.groups, totals, settings.page_size, **how)
        self.scheduler = Scheduler(self.pages, slots=settings.slots, chunk=settings.chunk, decode_steps=settings.decode_steps)
        # Programs need shapes only: compiling and reading the weights go on side by side.
        self._shapes = (
            placement.abstract_params(c, settings, target),
            placement.abstract_cache(c, settings, target, totals),
            placement.abstract_history(settings, target, self.context),
        )
        self.declared = Declared(settings, target, self.pages.pages_for(self.context), len(c.groups), ring_rows(c, settings, target))
        routing = placement.abstract_routing(c, target)
        self.programs = Programs(self.c, target, self._shapes, settings.decode_steps, progress, routing)
        self.cache_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self._shapes[1]))
        self.weights_bytes = 0
        self._params: Any = None
        self._cache: Any = None
        self._history: Any = None
        self._experts = Experts(self.c, target) if self.c.num_experts else None
        self._known: dict[int, tuple[Sequence, int]] = {}  # slot -> whose whole context its history has; see _complete
        self._unscored: list[list[Sequence]] = []  # requests whose prompt is to be scored before they are queued
        self._scoring: Iterator[None] | None = None  # of the first of them
        self._flight: _Flight | None = None
        self._landed = 0.0  # when the last step was read
        self._times = {"mixed": Histogram(), "decode": Histogram()}
        self._prefill_tokens = self._decode_tokens = 0
        self._prefill_s = self._decode_s = 0.0
        self._stage_ticks = [0, 0]  # of a stage of a pipeline: those in which it had something to do, and all
        self._compiled = [0]
        self._traced = 0  # steps in the profile
        self._step_s = self._chunk_s = 0.0  # of the last decode loop's steps, and of the last chunk beside sequences that decode

    def warm_up(self, expect: tuple[int, int] | None = None) -> None:
        """Starts compiling in the background: all programs, the smaller first; or, where it is known what is expected (the
        tokens of a prompt, and sequences at once; 0 for none), only what that needs. What is left out is compiled when it is met."""
        self.programs.want(self.declared.all() if expect is None else self.declared.expected(*expect))

    # Weights ----------------------------------------------------------------------------------------------------

    def load(self, leaves: Iterable[tuple[str, Any]] | None) -> None:
        """Takes weights (named host arrays, see Checkpoint.leaves; None: random ones) and allocates the cache."""
        self._start(placement.load_params(leaves, self._stored, self.settings, self.target))

    def load_from(self, other: Engine) -> None:
        """Takes the weights that another engine of the same model and settings has, on other devices."""
        self._start(placement.copied(other._params, self._shapes[0]))

    def _start(self, placed: Any) -> None:
        self._params = placed
        self.weights_bytes = placement.tree_bytes(replace(placed, peers=None))
        self._cache = kv.allocate(self._shapes[1], poison=self.settings.debug)
        self._history = placement.zeros(self._shapes[2])

    @property
    def embedding_bytes(self) -> int:
        """Of the table in which tokens are looked up: a step reads a row of it for each token."""
        return placement.tree_bytes(self._params.embed)

    def bytes_per_token(self, group: int) -> float:
        """Bytes of the cache that a token takes in all layers of page group `group`."""
        return placement.tree_bytes(self._shapes[1].groups[group]) / (self.pages.groups[group].total * self.settings.page_size)

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
        if not self.pages.fits(most):
            room = self.pages.total * self.settings.page_size
            raise refuse("prompt + max_tokens", most, f"needs more pages than there are ({room} tokens; --set pages=N)")
        ends = len(params.stop_token_ids) + (0 if params.ignore_eos else len(self.c.eos_ids))
        if ends > MAX_STOPS:
            raise refuse("stop_token_ids", ends, f"at most {MAX_STOPS} end tokens, the model's {len(self.c.eos_ids)} included")
        for token in params.logit_bias or {}:
            if token >= self.c.vocab_size:
                raise refuse("logit_bias", token, f"its keys must be token ids from 0 to {self.c.vocab_size - 1}")
        return [int(token) for token in prompt]

    def add(self, prompt: list[int], params: SamplingParams, tokenizer: Any = None) -> list[Sequence]:
        """Queues a checked prompt; one Sequence for each of params.n samples."""
        seed = secrets.randbits(63) if params.seed is None else params.seed
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(self.c.eos_ids))
        limit = min(params.max_tokens, self.context - len(prompt))
        request = Request(prompt, params, seed, limit, ends, time.perf_counter(), self._regime(len(prompt)))
        made = []
        for index in range(params.n):
            seq = Sequence(request, index, request_key(seed, index))
            seq.stream = TextStream(tokenizer.stream() if tokenizer else None, params.stops)
            made.append(seq)
        if params.prompt_logprobs is None:
            self._queue(made)
        else:
            self._unscored.append(made)
        return made

    def found(self, prompt: list[int], params: SamplingParams) -> int:
        """How many tokens of a checked prompt are in the cache."""
        request = Request(prompt, params, 0, 1, frozenset(), 0.0, self._regime(len(prompt)))
        return self.pages.found(Sequence(request, 0, None))

    def _queue(self, sequences: list[Sequence]) -> None:
        for seq in sequences:
            if seq.finish is None:  # not aborted meanwhile
                self.scheduler.add(seq)

    def _score_some(self) -> None:
        """One chunk of the first prompt that is to be scored. One that finds no pages keeps others from being admitted until it does."""
        if self._scoring is None:
            self._unscored.sort(key=lambda made: made[0].request.params.priority)
            self._scoring = self._score(self._unscored[0])
        try:
            next(self._scoring)
            self.scheduler.hold = False
        except StopIteration:
            self._scoring, self.scheduler.hold = None, False
        except NoRoom:
            self._scoring, self.scheduler.hold = None, True
            if len(self.scheduler.free_slots) == self.settings.slots:
                raise

    def _regime(self, length: int) -> str:
        """See Request: a prompt that is longer than a rope was trained for has keys of its own."""
        if self.c.sink_window:
            length = min(length, self.c.sink_tokens + self.c.sink_window)
        past = [rope.kind for rope in self.c.ropes if rope.by_length and length > rope.original_max_position]
        return f"dynamic {length}" if "dynamic" in past else "longrope" if past else ""

    def abort(self, seq: Sequence) -> None:
        if self._is_unscored(seq):
            seq.finish = seq.finish or FinishReason.ABORT
        else:
            self.scheduler.end(seq, FinishReason.ABORT)

    def _is_unscored(self, seq: Sequence) -> bool:
        return any(seq in sequences for sequences in self._unscored)

    @property
    def queued(self) -> int:
        """Sequences that have no slot yet."""
        return len(self.scheduler.waiting) + sum(map(len, self._unscored))

    @property
    def busy(self) -> bool:
        return bool(self._unscored) or self.scheduler.busy

    def step(self, *, watched: bool = False) -> list[Sequence]:
        """Sends one step and reads the one before; the sequences that got tokens or ended. watched: someone reads along, so come
        back soon."""
        most = self.settings.decode_steps
        if watched and self._step_s:
            most = max(1, min(most, int(STREAM_INTERVAL / self._step_s)))
        if self._unscored:
            self._score_some()
        touched = self._expire()
        plan = self.scheduler.schedule(most, watched=watched, rest=self._rest() if watched else 0)
        flight, self._flight = self._flight, None
        if plan is not None:
            self._trace()
            self._flight = self._send(plan)
        if flight is not None:
            touched += self._land(flight)
        if self._flight and not (self.target.branches or self._flight.program.plain):
            touched += self.settle()  # it was waited for already
        return touched

    def _rest(self) -> int:
        """Decode steps after a chunk beside them, so that a token takes less than SLOWED times as long as without the chunk."""
        chunk, step = self._chunk_s, self._step_s
        return math.ceil((chunk - SLOWED * step) / ((SLOWED - 1) * step)) if step and chunk > SLOWED * step else 0

    def settle(self) -> list[Sequence]:
        """Reads the step that is under way, if there is one; the sequences that got tokens or ended."""
        flight, self._flight = self._flight, None
        return [] if flight is None else self._land(flight)

    def _expire(self) -> list[Sequence]:
        """Ends what has passed its deadline."""
        now = time.perf_counter()
        late = [seq for made in self._unscored for seq in made if seq.finish is None and self.scheduler.is_late(seq, now)]
        for seq in late:
            seq.finish = FinishReason.ABORT
        late += self.scheduler.expire(now)
        for seq in late:
            self._show(seq)
        return late

    def _send(self, plan: Plan) -> _Flight:
        program = self.declared.of(plan)
        compiled = self.programs.get(program)
        for item in plan.items:
            if item.seq.request.params.penalises:
                self._complete(item)
        if self.settings.debug:
            self._check_pages(plan)
        with count_compiles(self._compiled):
            sent = time.perf_counter()
            batch = pack(plan.items, program.shape)
            extra = (pack_loop(plan, program.shape.rows),) if plan.steps else ()
            tokens, said = self._run(compiled, ship((batch, *extra)))
            tokens.copy_to_host_async()
        return _Flight(plan, program, tokens, said, sent)

    def _run(self, compiled: Any, batch: Any) -> Any:
        """Sends a program to the device; what it says."""
        routing = self._experts and self._experts.routing
        found, self._cache, self._history, counts = compiled(self._params, self._cache, self._history, routing, batch)
        if self._experts:
            self._experts.count(counts)
        return found

    def rebalance(self) -> None:
        """Gives copies to the experts that most tokens came to since the start or the last time, and slots to all so that devices have
        equally many tokens. Between any two steps; nothing is compiled anew. Raises UserError without expert_copies."""
        if not self.settings.expert_copies or self._experts is None:
            raise refuse("expert_copies", self.settings.expert_copies, "must be at least 1: there is nothing to move")
        self._params = self._experts.rebalance(self._params, self.programs.get(self.declared.mover))

    def _land(self, flight: _Flight) -> list[Sequence]:
        """Reads what a step drew and commits it."""
        plan = flight.plan
        with count_compiles(self._compiled):
            drawn = self._read(flight)
        now = time.perf_counter()
        seconds, self._landed = now - max(flight.sent, self._landed), now
        self._times["decode" if plan.steps else "mixed"].observe(seconds)
        self._book(plan, drawn, seconds)
        if self.target.stages > 1:
            ticks = stages.occupied(plan, drawn, flight.program.shape.tokens, self.target)
            self._stage_ticks = [sum(pair) for pair in zip(self._stage_ticks, ticks, strict=True)]
        touched = self.scheduler.commit(plan, drawn)
        for seq in touched:
            self._show(seq)
        return touched

    def _trace(self) -> None:
        """Begins the profile with the first step, and ends it after PROFILED_STEPS."""
        if self.settings.profile and self._traced == 0:
            jax.profiler.start_trace(self.settings.profile)
        self._traced += 1
        if self._traced > PROFILED_STEPS:
            self.end_profile()

    def end_profile(self) -> None:
        """Writes the profile that settings.profile asks for, if it is under way."""
        if self.settings.profile and 0 < self._traced < _WRITTEN:
            jax.profiler.stop_trace()
            self._traced = _WRITTEN

    @staticmethod
    def _read(flight: _Flight) -> list[list[int]]:
        """The tokens of each item of a step; what is told of them goes to the sequences that asked."""
        rows, items = flight.program.shape.rows, flight.plan.items
        tokens = np.asarray(flight.tokens).reshape(rows, -1)[: len(items)]
        drawn = [[t for t in row if t != NOTHING] for row in tokens.tolist()]
        asks = [(row, item.seq, most) for row, item in enumerate(items) if (most := item.seq.request.params.logprobs) is not None]
        if asks:
            ids, values = (np.asarray(x).reshape(rows, -1, x.shape[-1]) for x in flight.said)
            for row, seq, most in asks:
                told = sum(token >= 0 for token in drawn[row])
                seq.logprobs += _logprobs(ids[row, :told], values[row, :told], most)
        return drawn

    def _complete(self, item: Item) -> None:
        """Puts the tokens that a prefix hit skipped into the history of the sequence's slot: once, whenever it gets one."""
        seq, size = item.seq, self.settings.chunk
        if self._known.get(seq.slot) == (seq, seq.preemptions):
            return
        self._known[seq.slot] = (seq, seq.preemptions)
        for start in range(0, item.start, size):
            tokens = np.zeros(size, np.int32)
            count = min(size, item.start - start)
            tokens[:count] = seq.slice(start, start + count)
            write = self.programs.get(self.declared.writer)
            with count_compiles(self._compiled):
                self._history = write(self._history, tokens, np.int32(seq.slot), np.int32(start), np.int32(count))

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
            if any(item.draws and item.count == 1 for item in plan.items):
                self._chunk_s = seconds
            self._prefill_tokens += sum(item.count for item in plan.items)

    def _show(self, seq: Sequence) -> None:
        """Turns new tokens into text; a stop string in it ends the sequence at that token."""
        now = time.perf_counter()
        if seq.output:
            seq.first_time = seq.first_time or now
        seq.last_time = now
        while seq.printed < len(seq.output):
            token = seq.output[seq.printed]
            seq.printed += 1
            if token in seq.request.end_ids:
                continue  # an end token is not part of the text
            if seq.stream.push(token, may_stop=self._may_stop(seq)):
                del seq.output[seq.printed :]
                self._stop(seq)
                return
        if seq.finish is not None and seq.stream.finish(may_stop=self._may_stop(seq)):
            self._stop(seq)

    @staticmethod
    def _may_stop(seq: Sequence) -> bool:
        """Stop strings count from where end tokens can be drawn."""
        return seq.printed > seq.request.params.min_tokens

    def _stop(self, seq: Sequence) -> None:
        """Ends a sequence at a stop string, also where the device had run on to another end."""
        self.scheduler.end(seq, FinishReason.STOP)
        seq.finish = FinishReason.STOP

    # Logits and statistics --------------------------------------------------------------------------------------

    def prompt_logits(self, prompt: list[int]) -> np.ndarray:
        """float32 [len, vocab] of every position, through the paged cache in chunks, as a served prompt would be."""
        return np.concatenate(list(self._by_chunks(_plain(prompt), self.declared.logits)))

    def token_logprobs(self, prompt: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """(float32 [len - 1], bool [len - 1]) of the second token of a prompt and all after it: its log-probability given all before
        it, and whether none was likelier. The prompt has at most `context` tokens; computed as in prompt_logits."""
        parts = list(self._by_chunks(_plain(prompt), self.declared.logprobs, most=0))
        logprobs, best = (np.concatenate([part[i] for part in parts])[:-1] for i in range(2))
        return logprobs, best

    def _score(self, made: list[Sequence]) -> Iterator[None]:
        """prompt_logprobs of the first request of _unscored, a chunk at a time; then it is queued. What this computes is found in the
        prefix cache when the request is served. Raises NoRoom."""
        request, found = made[0].request, []
        most = request.params.prompt_logprobs or 0
        wanted = lambda: any(seq.finish is None for seq in made)  # not all aborted meanwhile
        chunks = self._by_chunks(request, self.declared.logprobs, most=max(most, 1))
        while wanted() and (part := next(chunks, None)) is not None:
            found.append(part)
            yield
        chunks.close()
        if wanted():
            ids, values = (np.concatenate([part[2][i] for part in found])[:-1] for i in range(2))
            request.prompt_logprobs = [None, *_logprobs(ids, values, most)]
        self._unscored.remove(made)
        self._queue(made)

    def _by_chunks(self, request: Request, program: Program, most: int | None = None) -> Generator[Any]:
        """What `program` returns for each chunk of a prompt, its padding cut off. most: how many tokens the program of logprobs
        shall tell of. Raises NoRoom, before the first chunk."""
        prompt, size = request.prompt, self.settings.chunk
        seq = Sequence(request, 0, request_key(0, 0), pages=[[] for _ in self.pages.groups])
        compiled = self.programs.get(program)
        try:
            for start in range(0, len(prompt), size):
                count = min(size, len(prompt) - start)
                if not self.pages.reserve(seq, start + count, ahead=len(prompt)):
                    raise NoRoom(f"{program.kind}: {len(prompt)} tokens need more pages than are free ({self.pages.free})")
                batch = pack([Item(seq, start, count, 0)], program.shape)
                following = np.array([*prompt[start + 1 : start + count + 1], 0], np.int32)
                extra = () if most is None else (np.resize(following, size), np.int32(most))
                with count_compiles(self._compiled):
                    found = self._run(compiled, ship((batch, *extra)))
                    found = jax.tree.map(lambda x, count=count: np.asarray(x)[:count], found)
                if not any(np.isnan(x).any() for x in jax.tree.leaves(found)):
                    self.pages.computed(seq, start + count)  # from now on others find it
                yield found
        finally:
            self.pages.release(seq)

    @property
    def _bubble(self) -> float:
        """The share of their time in which the stages of a pipeline had nothing to do, by the schedules of the steps so far; else 0."""
        busy, ticks = self._stage_ticks
        return round(1 - busy / ticks, 4) if ticks else 0.0

    def stats(self) -> dict[str, Any]:
        """Counters since the start; see DESIGN for the names."""
        times = {kind: histogram.snapshot() for kind, histogram in self._times.items()}
        experts = {"expert_imbalance": self._experts.imbalance()} if self._experts else {}
        return {
            "compiles_after_warmup": self._compiled[0],
            "programs": {p.name: round(s, 3) for p, s in self.programs.seconds.items()},
            "compile_s": round(sum(self.programs.seconds.values()), 3),
            "pages_free": self.pages.free,
            "pages_total": self.pages.total,
            "waiting": self.queued,
            "running": len(self.scheduler.running),
            "preemptions": self.scheduler.preemptions,
            "prefix_hit_tokens": self.scheduler.prefix_hit_tokens,
            "mixed_steps": times["mixed"]["count"],
            "decode_loops": times["decode"]["count"],
            "step_seconds": times,
            "prefill_tokens": self._prefill_tokens,
            "decode_tokens": self._decode_tokens,
            "prefill_s": self._prefill_s,
            "decode_s": self._decode_s,
            "accepted_per_step": 1.0,
            "pipeline_bubble": self._bubble,
            "weights_bytes": self.weights_bytes,
            "cache_bytes": self.cache_bytes,
        } | experts


def _plain(prompt: list[int]) -> Request:
    """A prompt of which nothing but the model's answer is wanted."""
    return Request(prompt, SamplingParams(), 0, 1, frozenset(), 0.0)


def _logprobs(ids: np.ndarray, values: np.ndarray, most: int) -> list[Logprobs]:
    """What the programs tell of some positions, [N, 1 + MAX_LOGPROBS] each: the chosen token and the `most` most likely."""
    rows = zip(ids[:, : most + 1].tolist(), values[:, : most + 1].tolist(), strict=True)
    return [{token: value for token, value in zip(*row, strict=True) if token >= 0} for row in rows]
