"""The engine on tiny random models: a request's tokens depend on nothing but the request."""

from __future__ import annotations

import dataclasses
import functools
import gc
import random
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llminfer import LLM, SamplingParams, UserError
from llminfer.config import EngineConfig, from_toml
from llminfer.engine import Engine
from llminfer.target import Target

pytestmark = pytest.mark.usefixtures("compiled_fast")

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0, top_k=40, top_p=0.9, min_p=0.01, seed=-5)


def prompts() -> list[list[int]]:
    draw = random.Random(3)
    return [[draw.randrange(3, 512) for _ in range(length)] for length in (1, 15, 16, 17, 40, 70, 33, 5, 64)]


@functools.lru_cache(maxsize=6)  # each holds thousands of memory maps, of which a process has 65,530
def llm(model: str, **settings) -> LLM:
    return LLM(model, **{"slots": 8, "context": 128, "decode_steps": 8, "debug": True, "dtype": "float32"} | settings)


def tokens(model: str, params: SamplingParams, *, alone: bool = False, **settings) -> list[list[int]]:
    served = llm(model, **settings)
    if alone:
        return [served.generate([prompt], params)[0].token_ids for prompt in prompts()]
    found = [output.token_ids for output in served.generate(prompts(), params)]
    assert served.stats()["compiles_after_warmup"] == 0
    assert served.engine.pages.free == served.engine.pages.total
    return found


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("model", ["config:tiny", "config:tiny_window"])
def test_tokens_do_not_depend_on_neighbours_chunks_pages_or_the_cache(model: str, params: SamplingParams) -> None:
    want = tokens(model, params, alone=True)
    assert tokens(model, params) == want
    assert tokens(model, params, chunk=16, prefix_cache=False) == want
    assert tokens(model, params, page_size=64) == want
    assert tokens(model, params, page_size=64) == want  # the second time from cached prefixes


@pytest.mark.parametrize("model", ["config:tiny", "config:tiny_window"])
def test_tokens_do_not_depend_on_the_layout_of_the_layers(model: str) -> None:
    assert tokens(model, GREEDY, layout="stacked") == tokens(model, GREEDY)
    ids = prompts()[5]
    stacked, listed = llm(model, layout="stacked").prompt_logits(ids), llm(model).prompt_logits(ids)
    np.testing.assert_allclose(stacked, listed, atol=1e-5 * np.ptp(listed))


EIGHT = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")


@EIGHT
@pytest.mark.parametrize("layout", ["listed", "stacked"])
def test_tokens_do_not_depend_on_the_mesh(layout: str) -> None:
    for params in (GREEDY, DRAWN):
        assert tokens("config:tiny_window", params, mesh="tp=2", layout=layout) == tokens("config:tiny_window", params)
    served = llm("config:tiny_window", mesh="tp=2", layout=layout)
    for array in (served.engine._cache.groups[0], served.engine._params.embed):
        piece = jax.tree.leaves(array)[0]
        assert piece.addressable_shards[0].data.size * 2 == piece.size


def test_the_kernels_serve_the_same_tokens_in_the_interpreter() -> None:
    """Those of a GPU without the sinks, which they leave to the reference."""
    c = dataclasses.replace(from_toml("tiny_window"), num_layers=3, head_dim=64)
    settings = EngineConfig(slots=2, context=64, chunk=16, decode_steps=3)
    policy = dataclasses.replace(settings, kv_policy="sinks:3,window:10")
    found = []
    runs = [("reference", policy), ("batched", policy), ("interpret", policy), ("reference", settings), ("triton-interpret", settings)]
    for kernels, settings in runs:
        layout = "listed" if kernels.startswith("triton") else "stacked"
        target = dataclasses.replace(Target.of("cpu", layout=layout), kernels=kernels, branches=layout == "stacked")
        engine = Engine(c, settings, target)
        engine.load(None)
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        sequences = [engine.add(engine.check(prompt, params), params)[0] for prompt in (prompts()[3], prompts()[7])]
        while engine.busy:
            engine.step()
        found.append([seq.output for seq in sequences])
        assert ("decode_2_plain" in engine.stats()["programs"]) == (not target.branches)
        engine.programs.close()
    assert found[0] == found[1] == found[2] and found[3] == found[4]


def test_few_pages_preempt_and_change_nothing() -> None:
    want = tokens("config:tiny", GREEDY)
    served = llm("config:tiny", pages=9, context=128)
    outputs = served.generate(prompts(), GREEDY)
    assert [output.token_ids for output in outputs] == want
    assert served.stats()["preemptions"] > 0
    assert served.stats()["pages_free"] == served.stats()["pages_total"] == 9


def test_nothing_is_compiled_over_fifty_requests_of_random_lengths() -> None:
    served, draw = llm("config:tiny"), random.Random(9)
    for _ in range(10):
        batch = [[draw.randrange(512) for _ in range(draw.randrange(1, 110))] for _ in range(5)]
        params = [
            SamplingParams(max_tokens=draw.randrange(1, 18), temperature=draw.choice([0.0, 1.0]), top_k=draw.choice([0, 5])) for _ in batch
        ]
        for output, each in zip(served.generate(batch, params), params, strict=True):
            assert 1 <= len(output.token_ids) <= each.max_tokens
    assert served.stats()["compiles_after_warmup"] == 0


def test_prefix_cache_reports_its_hits() -> None:
    for model in ("config:tiny", "config:tiny_window"):
        served = llm(model)
        prompt = [7, *prompts()[5]]
        served.generate([prompt], GREEDY)
        again = served.generate([prompt], GREEDY)[0]
        assert again.metrics.cached_tokens == 64
        other = served.generate([prompt], dataclasses.replace(GREEDY, cache_salt="someone else"))[0]
        assert other.metrics.cached_tokens == 0
        assert again.token_ids == other.token_ids


def test_samples_of_one_request_differ_and_repeat_by_seed() -> None:
    params = dataclasses.replace(DRAWN, n=3)
    first, again = (llm("config:tiny").generate([prompts()[4]], params)[0] for _ in range(2))
    assert [o.token_ids for o in first.outputs] == [o.token_ids for o in again.outputs]
    assert len({tuple(o.token_ids) for o in first.outputs}) == 3
    fresh = llm("config:tiny").generate([prompts()[4]], dataclasses.replace(DRAWN, seed=None))[0]
    told = dataclasses.replace(DRAWN, seed=fresh.outputs[0].seed)
    assert llm("config:tiny").generate([prompts()[4]], told)[0].token_ids == fresh.token_ids


def test_a_step_is_sent_before_the_last_one_is_read() -> None:
    """The host then does not know what was drawn, nor whether a sequence has ended: the device does."""
    served = llm("config:tiny")
    free = tokens("config:tiny", GREEDY)
    ends = dataclasses.replace(GREEDY, stop_token_ids=sorted({output[2 + 5 * (i % 2)] for i, output in enumerate(free)}))
    cut = [output[: 1 + min(output.index(t) for t in ends.stop_token_ids if t in output)] for output in free]
    for most in (None, 1):  # ended in a loop; and in steps of one token
        sequences = [served.submit(prompt, ends)[0] for prompt in prompts()]
        unread = wasted = 0
        while served.engine.busy:
            flight = served.engine._flight
            with pytest.MonkeyPatch.context() as patch:
                if most:
                    patch.setattr(served.engine.scheduler, "decode_steps", most)
                served.engine.step()
            if flight is not None and (after := served.engine._flight) is not None:
                unread += 1
                wasted += sum(item.seq.finish is not None for item in after.plan.items)
        assert [seq.output for seq in sequences] == cut
        assert unread and wasted
    assert served.engine.pages.free == served.engine.pages.total


def test_scoring_a_prompt_holds_nobody_up_and_ends_at_its_deadline() -> None:
    served = llm("config:tiny", chunk=16)
    long, short = [i % 500 + 3 for i in range(120)], prompts()[3]
    scored = SamplingParams(max_tokens=2, ignore_eos=True, prompt_logprobs=0)
    (first,), (late,) = served.submit(long, scored), served.submit(long, dataclasses.replace(scored, deadline_s=0.001, priority=1))
    (other,) = served.submit(short, SamplingParams(max_tokens=2, ignore_eos=True))
    while served.engine.busy:
        served.engine.step()
        if other.finish is not None and first.finish is None:
            other.order = -1  # it was served between the chunks
    assert other.order == -1 and (first.finish, late.finish, late.output) == ("length", "abort", [])
    assert len(first.request.prompt_logprobs) == 120 and late.request.prompt_logprobs is None


def test_end_tokens_stop_and_count() -> None:
    free = llm("config:tiny").generate([prompts()[4]], GREEDY)[0].token_ids
    stopped = llm("config:tiny").generate([prompts()[4]], dataclasses.replace(GREEDY, stop_token_ids=[free[5]]))[0]
    assert stopped.token_ids == free[: free.index(free[5]) + 1]
    assert stopped.finish_reason == "stop"
    assert llm("config:tiny").generate([prompts()[4]], GREEDY)[0].finish_reason == "length"


def test_one_bad_row_ends_alone() -> None:
    served = LLM("config:tiny", slots=4, context=128, decode_steps=8, dtype="float32")
    good, bad = [7, 8, 9] * 10, [5, 6] * 20  # the bad one ends with a good token: only attention brings it the NaN
    want = served.generate([good], GREEDY)[0].token_ids
    params = served.engine._params
    assert params.lm_head is not None  # a tied head would carry the NaN to every row
    served.engine._params = dataclasses.replace(params, embed=params.embed.at[5].set(jnp.nan))
    outputs = served.generate([bad, good], GREEDY)
    assert (outputs[0].finish_reason, outputs[0].token_ids) == ("error", [])
    assert outputs[1].token_ids == want
    assert served.generate([bad], GREEDY)[0].metrics.cached_tokens == 0
    served.close()


def test_prompt_logits_are_those_that_serving_sees() -> None:
    ids = prompts()[5]
    for model in ("config:tiny", "config:tiny_window"):
        whole, chunked = llm(model).prompt_logits(ids), llm(model, chunk=16, prefix_cache=False).prompt_logits(ids)
        assert whole.shape == (70, 512) and whole.dtype == np.float32
        np.testing.assert_allclose(whole, chunked, atol=1e-5 * np.ptp(whole))
        assert llm(model).generate([ids], GREEDY)[0].token_ids[0] == whole[-1].argmax()


def test_int8_weights_stay_close() -> None:
    ids = prompts()[5]
    exact, rounded = llm("config:tiny").prompt_logits(ids), llm("config:tiny", quantize="int8").prompt_logits(ids)
    assert 0 < np.abs(exact - rounded).max() < 0.05 * np.ptp(exact)
    assert llm("config:tiny", quantize="int8").stats()["weights_bytes"] < 0.6 * llm("config:tiny").stats()["weights_bytes"]


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "at least one token"),
        ([1, 512], {}, "token id=512: must be an integer from 0 to 511"),
        ([1, -1], {}, "token id=-1"),
        ([1.5], {}, "token id=1.5"),
        ([1] * 128, {}, "must be shorter than the context of 128"),
        ([1], {"max_tokens": 0}, "max_tokens=0"),
        ([1], {"temperature": -1.0}, "temperature=-1.0"),
        ([1], {"top_p": 0.0}, "top_p=0.0"),
        ([1], {"logprobs": 21}, "logprobs=21: must be an integer from 0 to 20"),
        ([1], {"seed": 2**63}, "seed="),
        ([1], {"stop": ["x"]}, "tokenizer"),
        ("text", {}, "tokenizer"),
        ([1], {"stop_token_ids": list(range(17))}, "at most 16"),
    ],
)
def test_bad_requests_are_refused_in_one_line_and_the_next_works(prompt, params: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        llm("config:tiny").generate([prompt], SamplingParams(**params))
    assert "\n" not in str(caught.value)
    assert len(llm("config:tiny").generate([[1, 2]], GREEDY)[0].token_ids) == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slot": 3}, "legal: slots"),
        ({"context": 50_000}, "at most 40960"),
        ({"page_size": 24}, "power of two"),
        ({"pages": 10**9}, "GiB"),
        ({"mesh": "xx=2"}, "legal: dp, pp, ep, sp, tp"),
        pytest.param({"mesh": "tp=3"}, "tp=3 does not divide num_heads=8; legal: 1, 2, 4, 8", marks=EIGHT),
        ({"mesh": "tp=1024"}, "mesh of 1024 devices: there are"),
        ({"dtype": "float16"}, "legal: auto, float32, bfloat16"),
        ({"chunk": 0}, "chunk=0"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LLM("config:tiny", **settings)


def test_abort_in_the_middle_gives_everything_back() -> None:
    served = llm("config:tiny")
    stream = served.follow(served.submit(prompts()[5], GREEDY))
    served.engine.step()
    assert served.engine.pages.free < served.engine.pages.total
    stream.close()  # never started: nothing to clean up
    for seq in list(served.engine.scheduler.running):
        served.engine.abort(seq)
    assert served.engine.pages.free == served.engine.pages.total
    assert not served.engine.busy


def test_a_profile_names_the_parts_of_the_model(tmp_path) -> None:
    llm = LLM("config:tiny", slots=1, context=64, page_size=8, chunk=16, profile=str(tmp_path))
    llm.generate([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True))
    llm.close()
    (trace,) = tmp_path.rglob("*.xplane.pb")
    found = trace.read_bytes()
    assert all(name in found for name in (b"attention", b"mlp", b"head"))


def test_a_model_that_nobody_uses_is_let_go() -> None:
    llm = LLM("config:tiny", slots=1, context=64, page_size=8, chunk=16)
    llm.generate([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True))
    llm.close()
    gone = weakref.ref(llm.engine.programs)
    del llm
    gc.collect()
    assert gone() is None
