"""Prompts on one mesh and decoding on another, in one process: the tokens of one engine that does both, and pages that go round."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from test_config import refusal

from llminfer import LLM, SamplingParams
from llminfer.cache import KVCache, ScaledPages
from llminfer.disaggregated import Disaggregated, _lift, _put
from llminfer.request import FinishReason

pytestmark = [pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices"), pytest.mark.usefixtures("compiled_fast")]
PROMPTS = [[(7 * i + i * j + j) % 500 + 3 for i in range(length)] for j, length in enumerate((41, 33, 5))]
GREEDY = SamplingParams(max_tokens=10, ignore_eos=True, logprobs=2)
DRAWN = SamplingParams(max_tokens=10, ignore_eos=True, temperature=1.0, top_k=40, repetition_penalty=1.2, logit_bias={7: 1.0}, seed=5)
PARAMS = [GREEDY, DRAWN, SamplingParams(max_tokens=10, ignore_eos=True, min_tokens=3, presence_penalty=0.5)]


def model_of(model: str, mesh: str = "", prefill_mesh: str = "") -> LLM:
    """With pages for less than the two long prompts and what they become, and chunks shorter than those."""
    fixed = dict(slots=2, context=64, chunk=16, page_size=8, pages=11, dtype="float32", decode_steps=4, debug=True)
    return LLM(f"config:{model}", mesh=mesh, prefill_mesh=prefill_mesh, expect=lambda _: (0, 0), **fixed)


def served(llm: LLM) -> list[Any]:
    """What each prompt gives: twice, the second time with prefixes that are found in the cache."""
    return [[(output.token_ids, output.logprobs) for output in llm.generate(PROMPTS, PARAMS)] for _ in range(2)]


def free_everywhere(llm: LLM) -> bool:
    each = [engine.stats() for engine in llm.engine.engines]
    return all(stats["pages_free"] == stats["pages_total"] and not stats["running"] + stats["waiting"] for stats in each)


# One device and four, which have each key-value head twice; and a sliding window, between alike meshes.
@pytest.mark.parametrize(("model", "mesh", "prefill_mesh"), [("tiny", "tp=4", "tp=1"), ("tiny_window", "", "tp=1")])
def test_tokens_are_those_of_one_engine(model: str, mesh: str, prefill_mesh: str) -> None:
    """With prefixes that are found, sequences that are preempted, penalties and log-probabilities; then with aborts."""
    one = model_of(model)
    wanted = served(one)
    one.close()
    llm = model_of(model, mesh, prefill_mesh)
    assert isinstance(llm.engine, Disaggregated)
    prefill, decode = llm.engine.engines
    for run, found in zip(wanted, served(llm), strict=True):
        for (expected, said), (tokens, told) in zip(run, found, strict=True):
            assert tokens == expected
            for mine, other in zip(told or [], said or [], strict=True):
                np.testing.assert_allclose(list(mine.values()), [other[token] for token in mine], atol=1e-4)
    stats = llm.stats()
    assert prefill.stats()["decode_loops"] == 0 and decode.stats()["mixed_steps"] == 0
    assert stats["compiles_after_warmup"] == 0 and stats["preemptions"] > 0 and stats["prefix_hit_tokens"] > 0
    assert stats["handovers"] == 2 * len(PROMPTS) + decode.stats()["preemptions"]
    page = prefill.cache_bytes // prefill.pages.total  # of both groups, where there are two of as many pages
    assert stats["handover_pages"] * page // len(prefill.pages.groups) <= stats["handover_bytes"] < 1e6
    assert free_everywhere(llm)
    aborted_wherever_they_are(llm)
    llm.close()


def aborted_wherever_they_are(llm: LLM) -> None:
    """One that is computed, one that waits to be handed over, one that decodes, and one that waits for its turn."""
    engine, ours, theirs = llm.engine, llm.engine.prefill.scheduler, llm.engine.decode.scheduler
    made = [llm.submit(prompt, GREEDY)[0] for prompt in PROMPTS[:2] * 3]
    where = {"computed": ours.running, "held": engine._held, "decoded": theirs.running, "waiting": ours.waiting}
    for name in ("held", "computed", "decoded", "waiting"):
        while not (there := [seq for seq in where[name] if seq in made]):
            engine.step()
        engine.abort(there[0])
        assert there[0].finish is FinishReason.ABORT and there[0] not in [*ours.running, *ours.waiting, *theirs.running, *theirs.waiting]
    while engine.busy:
        engine.step()
    assert [seq.finish for seq in made].count(FinishReason.ABORT) == 4 and not engine._held and free_everywhere(llm)
    done = [seq for seq in made if seq.finish is FinishReason.LENGTH]
    assert len(done) == 2 and all(len(seq.output) == GREEDY.max_tokens for seq in done)


@pytest.mark.parametrize("scaled", [False, True])
def test_pages_arrive_where_they_belong(scaled: bool) -> None:
    """Between caches of 4 and 6 heads of which a checkpoint has 2, and of other sizes; two groups; -1 is no page."""
    rng, layers, size = np.random.default_rng(0), 3, 4

    def pages(number: int, copies: int) -> Any:
        rows = rng.standard_normal((layers, number, 2, 8, 16), np.float32).repeat(copies, 2)
        return (
            ScaledPages(rows, rng.standard_normal((layers, number, 2, 2), np.float32).repeat(copies, 2).reshape(layers, number, -1))
            if scaled
            else rows
        )

    ours, theirs = (KVCache(tuple(pages(number, copies) for number in (5, 7))) for copies in (2, 3))
    source, to = np.array([[4, 0, -1, 2], [6, 6, 1, -1]]), np.array([[0, 3, -1, 1], [5, 2, 0, -1]])
    put = jax.jit(lambda a, b, ids: _put(b, _lift(a, ids[0], 2), ids[1], 3))(ours, theirs, np.stack([source, to]))
    for group in range(2):
        for old, new, other in zip(*(jax.tree.leaves(cache.groups[group]) for cache in (theirs, put, ours)), strict=True):
            expected, each = np.array(old), 1 if old.ndim == 5 else 2
            by_head = lambda x, each=each: x.reshape(*x.shape[:2], -1, each, *x.shape[3:])
            for i in range(size):
                if to[group, i] >= 0:
                    of = by_head(other)[:, source[group, i]][:, ::2].repeat(3, 1)
                    expected[:, to[group, i]] = of.reshape(expected[:, 0].shape)
            np.testing.assert_array_equal(new, expected)


def test_settings_that_cannot_be() -> None:
    tiny = lambda **settings: refusal(lambda: LLM("config:tiny", **settings))
    assert "prefill_mesh='dp=2': it and mesh must have no dp" in tiny(prefill_mesh="dp=2")
    assert "prefill_mesh='tp=1': it and mesh must have no dp" in tiny(mesh="dp=2", prefill_mesh="tp=1")
    assert "prefill_mesh='xp=2': axis 'xp'" in tiny(prefill_mesh="xp=2")
    assert "prefill_mesh=2: must be a string" in tiny(prefill_mesh=2)
    assert "mesh of 4 devices: there are 0" in tiny(mesh="tp=8", prefill_mesh="tp=4")
