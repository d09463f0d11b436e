"""What the next step does: which sequences, how many tokens of each, how many decode steps. Imports no jax.

A step either mixes chunks of prompts with one token of every decoding sequence, or, when no prompt is under way, is a loop of
decode steps. Sequences rank by priority (lower first), then by arrival; one that was overtaken too often comes first. Admission is
optimistic: it takes the pages of the prompt; when pages run out the sequence of the last rank gives its pages back and is computed
again later. A sequence whose next prefix page is just being computed by another waits for it.

The next plan may be made before the last one's tokens are read: it takes for granted that no sequence ended in it. Where one did, the
device leaves it out, and its tokens never come.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass

from llminfer.pages import Pages
from llminfer.request import FinishReason, Sequence

# Later arrivals that may be admitted before a waiting sequence; then it is first, whatever its priority.
PATIENCE = 32
# Waiting sequences that are passed over in one step because they wait for a page of another; a bound on the work of a step.
PASSED_OVER = 64
# Prompt tokens a step beside sequences that decode and are watched: a whole chunk would keep those waiting.
SMALL_CHUNK = 32


@dataclass(frozen=True)
class Item:
    """`count` tokens of `seq` from position `start`; draws: how many tokens may be drawn after the last of them (more
    than one only in a decode loop)."""

    seq: Sequence
    start: int
    count: int
    draws: int


@dataclass(frozen=True)
class Plan:
    """One step. steps 0: a mixed step of ragged items; else a decode loop of up to that many steps, one token an item.
    eager: leave the loop as soon as a sequence ends, because another waits for its slot; how far the others come is then not
    known before."""

    items: tuple[Item, ...]
    steps: int = 0
    eager: bool = False


class _TooEarly(Exception):
    """The next plan depends on what the last one finds."""


class Scheduler:
    """Owns the queue, the slots and, through Pages, the cache's memory. chunk: prompt tokens a step; decode_steps: the
    longest decode loop."""

    def __init__(self, pages: Pages, *, slots: int, chunk: int, decode_steps: int):
        self.pages = pages
        self.chunk = chunk
        self.decode_steps = decode_steps
        self.waiting: list[Sequence] = []  # by rank
        self.running: list[Sequence] = []
        self.free_slots = list(range(slots))[::-1]
        self.unread: list[Plan] = []  # scheduled, not committed
        self.hold = False  # admit nobody: pages are to become free
        self.prompts_only = False  # a sequence gets its first token here, and all others elsewhere
        self.receive: Callable[[Sequence, int], None] | None = None  # brings what is computed elsewhere, behind so many tokens found here
        self.chunk_was_last = False  # the last plan had one beside sequences that decode
        self.preemptions = 0
        self.prefix_hit_tokens = 0
        self.arrivals = 0

    def add(self, seq: Sequence) -> None:
        seq.order = self.arrivals
        self.arrivals += 1
        self.wait(seq)

    def wait(self, seq: Sequence) -> None:
        """Queues a sequence by its rank."""
        bisect.insort(self.waiting, seq, key=self._rank)

    @staticmethod
    def _rank(seq: Sequence) -> tuple[bool, int, int]:
        return seq.overtaken < PATIENCE, seq.request.params.priority, seq.order

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self, most: int | None = None, *, watched: bool = False, rest: int = 0) -> Plan | None:
        """The next step, its pages reserved, to be run and committed in the order of scheduling; None when nothing is left to do, or
        nothing before the last plan is committed. most: a shorter decode loop this time. watched: someone reads along, so keep the
        gaps between tokens short; rest: so many decode steps between one chunk and the next beside those who decode."""
        if any(plan.eager for plan in self.unread):
            return None
        self._admit()
        self.running.sort(key=self._rank)
        try:
            most = min(self.decode_steps, most or self.decode_steps)
            prefilling = any(self._prefilling(seq) for seq in self.running)
            decoding = not self.prompts_only and any(seq.remaining and not self._prefilling(seq) for seq in self.running)
            if prefilling and not (decoding and self.chunk_was_last and watched and rest):
                plan = self._mixed(watched and decoding)
                self.chunk_was_last = decoding
            elif decoding:
                plan = self._decode(min(rest, most) if prefilling else most)
                self.chunk_was_last = False
            else:
                return None  # all will have ended
        except _TooEarly:
            return None
        for item in plan.items:
            item.seq.computed = item.start + item.count + max(0, item.draws - 1)
            item.seq.pending += item.draws
        self.unread.append(plan)
        return plan

    def commit(self, plan: Plan, drawn: list[list[int]]) -> list[Sequence]:
        """Books the result of the oldest plan that is not: drawn[i] are the new tokens of plan.items[i], a negative one for logits
        that were not numbers. Returns the sequences that got a token or ended."""
        if not self.unread or self.unread[0] is not plan:
            raise RuntimeError("plans are committed in the order of scheduling")
        del self.unread[0]
        touched = []
        for item, tokens in zip(plan.items, drawn, strict=True):
            seq = item.seq
            seq.pending -= item.draws
            if seq.finish is not None:
                continue  # aborted meanwhile, or ended before this step
            reason = self._append(seq, tokens)
            if len(tokens) < item.draws:  # the loop was left early, for another that ended
                seq.computed -= item.draws - len(tokens)
            if reason is FinishReason.ERROR:
                self.pages.forget(seq)
            else:
                self.pages.computed(seq, item.start + item.count + max(0, len(tokens) - 1))
            if reason is not None:
                self._finish(seq, reason)
            if tokens:
                touched.append(seq)
        return touched

    def expire(self, now: float) -> list[Sequence]:
        """Ends the sequences whose deadline has passed at time `now` of the clock that stamped their arrival; returns them."""
        late = [seq for seq in (*self.waiting, *self.running) if self.is_late(seq, now)]
        for seq in late:
            self._finish(seq, FinishReason.ABORT)
        return late

    @staticmethod
    def is_late(seq: Sequence, now: float) -> bool:
        """Whether the deadline of a sequence has passed at time `now`."""
        limit = seq.request.params.deadline_s
        return limit is not None and now - seq.request.arrived > limit

    def end(self, seq: Sequence, reason: FinishReason) -> None:
        """Ends a sequence from outside the token stream, wherever it is: a stop string, the caller. Nothing if it has ended."""
        if seq.finish is None:
            self._finish(seq, reason)

    @staticmethod
    def _append(seq: Sequence, tokens: list[int]) -> FinishReason | None:
        """Adds tokens to the output; why that ends the sequence, if it does."""
        for token in tokens:
            if token < 0:
                return FinishReason.ERROR
            seq.output.append(token)
            if token in seq.request.end_ids:
                return FinishReason.STOP
        return FinishReason.LENGTH if tokens and len(seq.output) >= seq.request.limit else None

    def _finish(self, seq: Sequence, reason: FinishReason) -> None:
        seq.finish = reason
        if seq in self.running:
            self._leave(seq)
        else:
            self.waiting.remove(seq)

    def _leave(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.pages.release(seq)
        self.free_slots.append(seq.slot)
        seq.slot = -1

    def _prefilling(self, seq: Sequence) -> bool:
        """More than its last token is still to be computed; or anything, where only prompts are."""
        return not seq.pending if self.prompts_only else seq.length - seq.computed > 1

    def _admit(self) -> None:
        """Gives slots to waiting sequences by rank. One that has no pages keeps those behind it from taking them; one that
        waits for a page of another does not."""
        passed = 0
        while self.free_slots and not self.hold and passed < min(len(self.waiting), PASSED_OVER):
            seq = self.waiting[passed]
            found = self.pages.match(seq)
            if self.pages.awaits(seq, found):
                self.pages.release(seq)
                passed += 1
            elif self._room(seq, found):
                self._enter(self.waiting.pop(passed), found, passed)
            else:
                self.pages.release(seq)
                return

    def _room(self, seq: Sequence, found: int) -> bool:
        if seq.elsewhere:
            return self.pages.adopt(seq, seq.elsewhere, ahead=seq.length)
        return self.pages.reserve(seq, found, ahead=seq.length)

    def _enter(self, seq: Sequence, found: int, passed: int) -> None:
        """Gives a slot to a sequence that came before others; passed: how many of a better rank wait on."""
        first, last = (self._rank(self.waiting[i])[:2] if self.waiting else None for i in (0, -1))
        # Where all are of one priority, the earlier arrivals among those who wait are the ones that were passed over.
        for other in self.waiting[:passed] if first == last else self.waiting:
            other.overtaken += other.order < seq.order
        if any(other.overtaken == PATIENCE for other in self.waiting[:passed]) or first != last:
            self.waiting.sort(key=self._rank)
        self.pages.begin(seq)
        seq.computed = max(found, seq.elsewhere)
        if not (seq.preemptions or seq.elsewhere):
            seq.cached = found
            self.prefix_hit_tokens += found
        seq.slot = self.free_slots.pop()
        self.running.append(seq)
        if seq.elsewhere and self.receive is not None:
            self.receive(seq, found)
            self.pages.computed(seq, seq.elsewhere)
            seq.elsewhere = 0

    def _mixed(self, stalls: bool) -> Plan:
        """One token of each decoding sequence, and prompts by rank until the chunk is full. stalls: someone watches the sequences
        that decode, so it is small; where nobody does, large ones get more done."""
        items: list[Item] = []
        left = min(SMALL_CHUNK, self.chunk) if stalls else self.chunk
        for seq in list(self.running):
            if seq.slot < 0 or not seq.remaining or (self.prompts_only and seq.pending):
                continue  # preempted by an earlier one; or it will have ended, or has what it came for
            prefilling = self._prefilling(seq)
            count = min(seq.length - seq.computed, left) if prefilling else 1
            if count and self._reserve(seq, seq.computed + count, items):
                left -= count if prefilling else 0
                items.append(Item(seq, seq.computed, count, int(seq.computed + count == seq.length)))
        return Plan(tuple(items))

    def _decode(self, most: int) -> Plan:
        """As many steps as the longest sequence needs and the limit allows; each sequence draws what its pages carry."""
        items: list[Item] = []
        steps = min(most, max(seq.remaining for seq in self.running if not self._prefilling(seq)))
        for seq in list(self.running):
            if seq.slot < 0 or not seq.remaining or self._prefilling(seq):
                continue
            draws = min(steps, seq.remaining)
            while draws > 1 and not self.pages.reserve(seq, seq.computed + draws):
                draws //= 2
            if self._reserve(seq, seq.computed + draws, items):
                items.append(Item(seq, seq.computed, 1, draws))
        return Plan(tuple(items), steps=max(item.draws for item in items), eager=bool(self.waiting))

    def _reserve(self, seq: Sequence, tokens: int, items: list[Item]) -> bool:
        """Reserves pages, taking them from the sequence of the last rank where it must, never from one already planned. Raises
        _TooEarly where a plan that is not read yet may set pages free."""
        planned = {id(item.seq) for item in items}
        while not self.pages.reserve(seq, tokens):
            if self.unread:
                raise _TooEarly
            victim = max((s for s in self.running if id(s) not in planned), key=self._rank)
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        self._leave(seq)
        seq.computed = 0
        seq.preemptions += 1
        self.preemptions += 1
        self.wait(seq)
