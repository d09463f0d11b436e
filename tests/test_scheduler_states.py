"""Any order of requests, steps sent and read, aborts and deadlines keeps the books of Pages and Scheduler: 10,000 random operations."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_pages import PAGE, check, sequence

from llminfer.pages import Pages
from llminfer.request import FinishReason, Sequence
from llminfer.scheduler import PATIENCE, Plan, Scheduler

SLOTS, CHUNK, LOOP, MOST = 2, 16, 8, 12  # few slots and pages: most of what is interesting happens where they run out
GROUPS = {"full": ((0,), (0,)), "sliding": ((16,), (0,)), "both": ((0, 16), (0, 0)), "sinks": ((16, 24), (0, 10))}


class Books(RuleBasedStateMachine):
    """One scheduler; a plan may be sent before the last is read, as the engine does."""

    @initialize(
        kind=st.sampled_from(sorted(GROUPS)), prefix_cache=st.booleans(), total=st.integers(20, 24), holders=st.sampled_from([1, 1, 2, 3])
    )
    def begin(self, kind: str, prefix_cache: bool, total: int, holders: int) -> None:
        total += -total % holders
        windows, sinks = GROUPS[kind]
        need = [Pages.sliding_need(w, 2 * LOOP, PAGE, s) for w, s in zip(windows, sinks, strict=True)]
        totals = tuple(SLOTS * n + 2 * CHUNK // PAGE if w else total for w, n in zip(windows, need, strict=True))
        self.pages = Pages(windows, totals, PAGE, prefix_cache=prefix_cache, sinks=sinks, holders=holders)
        self.scheduler = Scheduler(self.pages, slots=SLOTS, chunk=CHUNK, decode_steps=LOOP)
        self.alive: list[Sequence] = []
        self.sent: list[Plan] = []
        self.now = 0.0

    @precondition(lambda self: len(self.alive) < MOST)
    @rule(
        period=st.sampled_from([3, 50]),
        length=st.integers(1, 60),
        limit=st.integers(1, 100),
        salt=st.sampled_from(["", "x"]),
        priority=st.sampled_from([0, 0, 3]),
        deadline=st.sampled_from([None, None, 5.0]),
    )
    def submit(self, period: int, length: int, limit: int, salt: str, priority: int, deadline: float | None) -> None:
        seq = sequence([1 + i % period for i in range(length)], limit=limit, salt=salt, priority=priority, deadline_s=deadline)
        seq.request.arrived = self.now
        self.scheduler.add(seq)
        self.alive.append(seq)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.scheduler.end(data.draw(st.sampled_from(self.alive)), FinishReason.ABORT)

    @rule()
    def time_passes(self) -> None:
        self.now += 1.0
        late = self.scheduler.expire(self.now)
        assert all(seq.finish is FinishReason.ABORT for seq in late)

    @rule(hold=st.booleans())
    def hold(self, hold: bool) -> None:
        self.scheduler.hold = hold

    @precondition(lambda self: len(self.sent) < 2)
    @rule(most=st.sampled_from([None, 1, 3]), watched=st.booleans())
    def send(self, most: int | None, watched: bool) -> None:
        self.send_one(most, watched)

    def send_one(self, most: int | None, watched: bool) -> None:
        plan = self.scheduler.schedule(most, watched=watched)
        if plan is None:
            return
        assert plan.items and len({item.seq.slot for item in plan.items}) == len(plan.items)
        assert sum(item.count for item in plan.items) <= CHUNK + SLOTS
        for item in plan.items:  # every position of the step has a page, and every one that it may draw on the way
            assert item.seq.finish is None and item.seq.slot >= 0
            last = item.start + item.count + max(0, item.draws - 1)
            assert all(len(pages) * PAGE >= last for pages in item.seq.pages)
            if item.draws:  # after all that is known, or will be
                assert item.start + item.count == item.seq.length - item.draws
            for group, pages in zip(self.pages.groups, item.seq.pages, strict=True):
                first = max(0, item.start - group.window + 1) // PAGE if group.window else 0
                assert all(pages[i] >= 0 for i in (*range(min(group.sinks, len(pages))), *range(first, -(-last // PAGE))))
        self.sent.append(plan)

    @precondition(lambda self: self.sent)
    @rule(seed=st.integers(0, 2**32))
    def read(self, seed: int) -> None:
        self.commit(seed)

    @rule(turns=st.integers(1, 6), seed=st.integers(0, 2**32))
    def work(self, turns: int, seed: int) -> None:
        """As the engine does it: one is sent, then the one before is read."""
        for turn in range(turns):
            before = len(self.sent)
            self.send_one(None, False)
            if before:
                self.commit(seed + turn)

    def commit(self, seed: int) -> None:
        """What a device might have drawn: sequences end anywhere, 0 being their end token, or have logits that are not numbers."""
        draw, plan, drawn = random.Random(seed), self.sent.pop(0), []
        assert not (plan.eager and self.sent)  # how far it came decides what comes next
        cut = draw.randrange(1, LOOP + 1) if plan.eager else LOOP
        for item in plan.items:
            tokens: list[int] = []
            for _ in range(0 if item.seq.finish else min(item.draws, cut)):
                tokens.append(draw.choice([0, -2] if draw.random() < 0.02 else [5, 6, 7]))
                if tokens[-1] <= 0:
                    break
            drawn.append(tokens)
        self.scheduler.commit(plan, drawn)

    @invariant()
    def books_are_right(self) -> None:
        if not hasattr(self, "pages"):
            return
        self.alive = [seq for seq in self.alive if seq.finish is None]
        check(self.pages, self.alive)
        assert len(self.scheduler.running) + len(self.scheduler.free_slots) == SLOTS
        assert all(seq.overtaken <= PATIENCE + MOST for seq in self.alive)
        assert all(seq.pending >= 0 for seq in self.alive) and all(seq.pending == 0 for seq in self.scheduler.waiting)

    def teardown(self) -> None:
        """Whatever happened, all that is left is served, and every page comes back."""
        if not hasattr(self, "pages"):
            return
        self.scheduler.hold = False
        for turn in range(10_000):
            if len(self.sent) == 2 or (plan := self.scheduler.schedule()) is None:
                if not self.sent:
                    break
                self.commit(turn)
            else:
                self.sent.append(plan)
        self.books_are_right()
        assert not self.alive and not self.pages.under_way and self.pages.free == self.pages.total


Books.TestCase.settings = settings(
    max_examples=150, stateful_step_count=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
TestBooks = Books.TestCase
