"""Pages and Scheduler without a device: ownership, prefix hits, windows, ranks, preemption. Random operations: test_scheduler_states.py."""

from __future__ import annotations

import random

from llminfer.pages import Pages
from llminfer.request import FinishReason, Request, SamplingParams, Sequence
from llminfer.scheduler import PATIENCE, SMALL_CHUNK, Plan, Scheduler

PAGE = 8


def sequence(prompt: list[int], limit: int = 4, salt: str = "", **more) -> Sequence:
    params = SamplingParams(max_tokens=limit, cache_salt=salt, **more)
    return Sequence(Request(prompt, params, 0, limit, frozenset({0}), 0.0), 0, None)


def check(pages: Pages, sequences: list[Sequence]) -> None:
    """Every page is free or owned as often as its count says; what is findable is what its digest says."""
    for index, group in enumerate(pages.groups):
        owned = [0] * group.total
        for seq in sequences:
            for page in seq.pages[index] if seq.pages else []:
                if page >= 0:
                    owned[page] += 1
            for i, page in enumerate(seq.pages[index] if seq.pages and group.holders > 1 else []):
                assert (page // group.part - seq.first_on - i) % group.holders == 0
        assert owned == group.count
        assert set(group.free) == {page for page, count in enumerate(group.count) if count == 0}
        assert {digest: page for page, digest in group.hash_of.items()} == group.page_of
    assert all(any(seq is owner for seq in sequences) and owner.pages for owner in pages.under_way.values())


def serve(scheduler: Scheduler, token: int = 7) -> list[Plan]:
    """Runs until nothing is left; every drawn token is `token`."""
    plans = []
    while (plan := scheduler.schedule()) is not None:
        assert not any(item.seq.finish for item in plan.items)
        scheduler.commit(plan, [[token] * item.draws for item in plan.items])
        plans.append(plan)
        assert len(plans) < 10_000
    return plans


def test_prefix_is_found_again_and_the_last_token_is_always_computed() -> None:
    pages = Pages((0,), (16,), PAGE, prefix_cache=True)
    scheduler = Scheduler(pages, slots=1, chunk=64, decode_steps=4)
    prompt = list(range(1, 33))
    first, again, other = sequence(prompt), sequence(prompt), sequence(prompt, salt="tenant")
    for seq in (first, again, other):
        scheduler.add(seq)
    serve(scheduler)
    assert (first.cached, again.cached, other.cached) == (0, 24, 0)  # 32 tokens: the fourth page holds the last one
    assert pages.free == pages.total


def test_sliding_group_holds_only_its_window() -> None:
    window, chunk = 16, 8
    most = Pages.sliding_need(window, chunk, PAGE)
    pages = Pages((0, window), (64, most), PAGE, prefix_cache=True)
    scheduler = Scheduler(pages, slots=1, chunk=chunk, decode_steps=4)
    seq = sequence([1 + i % 50 for i in range(200)], limit=100)
    scheduler.add(seq)
    held = 0
    while (plan := scheduler.schedule()) is not None:
        held = max(held, sum(page >= 0 for page in seq.pages[1]))
        check(pages, [seq])
        scheduler.commit(plan, [[7] * item.draws for item in plan.items])
    assert seq.finish is FinishReason.LENGTH
    assert held <= most
    # What the next token of a 200-token prefix sees is findable in both groups, if it was not reused meanwhile.
    again = sequence([1 + i % 50 for i in range(200)] + [7] * 60)
    assert pages.match(again) in (0, 256)


def test_decode_loops_follow_the_pages_and_preemption_computes_again() -> None:
    pages = Pages((0,), (8,), PAGE, prefix_cache=False)
    scheduler = Scheduler(pages, slots=4, chunk=32, decode_steps=16)
    sequences = [sequence([i + 1] * 12, limit=40) for i in range(3)]
    for seq in sequences:
        scheduler.add(seq)
    serve(scheduler)
    assert scheduler.preemptions > 0
    assert all(seq.finish is FinishReason.LENGTH and len(seq.output) == 40 for seq in sequences)
    check(pages, [])


def test_joins_and_leaves_between_steps() -> None:
    pages = Pages((0,), (64,), PAGE, prefix_cache=False)
    scheduler = Scheduler(pages, slots=2, chunk=16, decode_steps=8)
    sequences = [sequence([i + 1] * (5 + 9 * i), limit=3 + i) for i in range(5)]
    for seq in sequences:
        scheduler.add(seq)
    plans = serve(scheduler)
    assert all(len(plan.items) <= 2 for plan in plans)
    assert all(sum(item.count for item in plan.items) <= 16 + 2 for plan in plans)
    assert any(plan.eager for plan in plans if plan.steps)  # someone waited for a slot
    assert all(len(seq.output) == seq.request.limit for seq in sequences)


def test_numbers_that_went_bad_are_not_found_again() -> None:
    pages = Pages((0,), (16,), PAGE, prefix_cache=True)
    scheduler = Scheduler(pages, slots=1, chunk=16, decode_steps=4)
    seq = sequence(list(range(1, 33)))
    scheduler.add(seq)
    while (plan := scheduler.schedule()) is not None:
        scheduler.commit(plan, [[-2] if item.draws else [] for item in plan.items])
    assert seq.finish is FinishReason.ERROR
    assert pages.match(sequence(list(range(1, 33)))) == 0


def test_a_common_prefix_is_computed_once() -> None:
    """64 requests at once through 8 slots, 1,000 common tokens and tails of at most 16."""
    pages = Pages((0,), (8 * 80,), 16, prefix_cache=True)
    scheduler = Scheduler(pages, slots=8, chunk=256, decode_steps=8)
    draw = random.Random(0)
    common = [draw.randrange(1, 50) for _ in range(1000)]
    sequences = [sequence(common + [draw.randrange(1, 50) for _ in range(draw.randrange(1, 17))]) for _ in range(64)]
    other = sequence(common, salt="tenant")
    for seq in (*sequences, other):
        scheduler.add(seq)
    plans = serve(scheduler)
    work = sum(item.count for plan in plans if not plan.steps for item in plan.items if item.count > 1)
    asked = sum(len(seq.request.prompt) for seq in (*sequences, other))
    assert other.cached == 0 and work - 1000 < 0.1 * (asked - 1000)
    assert not pages.under_way and pages.free == pages.total


def test_priority_comes_first_but_starves_nobody() -> None:
    pages = Pages((0,), (64,), PAGE, prefix_cache=False)
    scheduler = Scheduler(pages, slots=1, chunk=16, decode_steps=8)
    patient = sequence([1] * 5, priority=5)
    scheduler.add(patient)
    hurried = [sequence([2] * 5, priority=-1) for _ in range(3 * PATIENCE)]
    for seq in hurried:
        scheduler.add(seq)
    ended: list[Sequence] = []
    while (plan := scheduler.schedule()) is not None:
        scheduler.commit(plan, [[7] * item.draws for item in plan.items])
        ended += [seq for seq in (patient, *hurried) if seq.finish and not any(seq is e for e in ended)]
    assert ended.index(patient) == PATIENCE and ended[:PATIENCE] == hurried[:PATIENCE]


def test_pages_are_taken_from_the_last_rank() -> None:
    pages = Pages((0,), (8,), PAGE, prefix_cache=False)
    scheduler = Scheduler(pages, slots=2, chunk=32, decode_steps=16)
    low, high = sequence([1] * 20, limit=40, priority=1), sequence([2] * 20, limit=40)
    scheduler.add(low)
    scheduler.commit(plan := scheduler.schedule(), [[7] * item.draws for item in plan.items])
    scheduler.add(high)
    serve(scheduler)
    assert low.preemptions and not high.preemptions
    assert len(low.output) == len(high.output) == 40


def test_a_long_prompt_keeps_nobody_waiting_long() -> None:
    pages = Pages((0,), (256,), PAGE, prefix_cache=False)
    scheduler = Scheduler(pages, slots=2, chunk=128, decode_steps=8)
    short, long = sequence([1] * 100, limit=400), sequence([2] * 1000)
    scheduler.add(short)
    first = scheduler.schedule()
    assert first.items[0].count == 100  # nobody decodes: the whole chunk
    scheduler.commit(first, [[7]])
    scheduler.add(long)
    for watched, chunk in ((False, 128), (True, SMALL_CHUNK)):
        plan = scheduler.schedule(watched=watched)
        assert [(item.seq, item.count) for item in plan.items] == [(short, 1), (long, chunk)]
        scheduler.commit(plan, [[7] * item.draws for item in plan.items])


def test_watched_sequences_decode_between_the_chunks_of_a_long_prompt() -> None:
    pages = Pages((0,), (256,), PAGE, prefix_cache=False)
    scheduler = Scheduler(pages, slots=2, chunk=128, decode_steps=8)
    short, long = sequence([1] * 100, limit=400), sequence([2] * 500)
    scheduler.add(short)
    scheduler.commit(plan := scheduler.schedule(), [[7]])
    scheduler.add(long)
    kinds = []
    while long.finish is None and not long.output:
        plan = scheduler.schedule(watched=True, rest=3)
        kinds.append((plan.steps, [(item.seq, item.draws) for item in plan.items if item.draws]))
        scheduler.commit(plan, [[7] * item.draws for item in plan.items])
    assert kinds[:4] == [(0, [(short, 1)]), (3, [(short, 3)])] * 2
    assert sum(steps == 0 for steps, _ in kinds) == -(-500 // SMALL_CHUNK)  # the last of them draws


def test_a_deadline_ends_a_sequence_wherever_it_is() -> None:
    pages = Pages((0,), (64,), PAGE, prefix_cache=True)
    scheduler = Scheduler(pages, slots=1, chunk=16, decode_steps=8)
    runs, waits, stays = sequence([1] * 50, deadline_s=5.0), sequence([2] * 5, deadline_s=5.0), sequence([3] * 5)
    for seq in (runs, waits, stays):
        scheduler.add(seq)
    scheduler.commit(plan := scheduler.schedule(), [[] for _ in plan.items])
    assert scheduler.expire(4.9) == []
    assert scheduler.expire(5.1) == [waits, runs]
    assert runs.finish is waits.finish is FinishReason.ABORT and not pages.under_way
    serve(scheduler)
    assert stays.finish is FinishReason.LENGTH and pages.free == pages.total


def test_what_is_computed_elsewhere_gets_the_pages_that_are_still_seen() -> None:
    """100 tokens, the window sees those from 80 on and the first 10; four pages are found."""
    windows, sinks = (0, 20), (0, 10)
    for found in (0, 4):
        pages = Pages(windows, (20, 20), PAGE, prefix_cache=True, sinks=sinks)
        prompt = list(range(1, 101))
        if found:
            other = sequence(prompt[: found * PAGE + 1])
            other.pages = [[], []]
            assert pages.reserve(other, found * PAGE)
            pages.computed(other, found * PAGE)
            pages.release(other)
        seq = sequence(prompt)
        assert pages.match(seq) == found * PAGE
        assert pages.adopt(seq, 99, ahead=100)
        check(pages, [seq])
        full, sliding = seq.pages
        assert len(full) == 13 and min(full) >= 0
        assert len(sliding) == 13 and [i for i, page in enumerate(sliding) if page >= 0] == [0, 1, 10, 11, 12]
        pages.computed(seq, 99)
        pages.release(seq)
        check(pages, [seq])
    small = Pages(windows, (20, 4), PAGE, prefix_cache=True, sinks=sinks)
    seq = sequence(prompt)
    assert small.match(seq) == 0 and not small.adopt(seq, 99, ahead=100)
    small.release(seq)
    check(small, [seq])
