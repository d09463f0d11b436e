"""Bias, penalties, min_tokens and logprobs: exact by the formulas, row by row, and through the engine whatever serves the request."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import random
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llminfer import LLM, SamplingParams, UserError, sampler
from llminfer.batch import no_sampling
from llminfer.request import MAX_BIAS, MAX_LOGPROBS
from llminfer.sampler import SamplingBatch, request_key

pytestmark = pytest.mark.usefixtures("compiled_fast")
draw = jax.jit(sampler.draw)
adjust = jax.jit(sampler.adjust)
WIDTH, CONTEXT = 97, 600  # more than two blocks of history, and not a multiple of one

# The formulas --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """One row's tokens so far and what is asked of it."""

    prompt: list[int]
    output: list[int]
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: dict[int, float] = dataclasses.field(default_factory=dict)
    ends: tuple[int, ...] = ()
    min_tokens: int = 0
    temperature: float = 0.0
    logprobs: int = -1

    def expected(self, logits: np.ndarray) -> np.ndarray:
        """The formulas, in plain words, one token id after the other."""
        x = logits.astype(np.float32).copy()
        for token in range(len(x)):
            x[token] += np.float32(self.bias.get(token, 0.0))
            times = self.output.count(token)
            if times or token in self.prompt:
                x[token] = x[token] / np.float32(self.repetition) if x[token] > 0 else x[token] * np.float32(self.repetition)
            x[token] -= np.float32(self.frequency * times + self.presence * (times > 0))
            if token in self.ends and len(self.output) < self.min_tokens:
                x[token] = -np.inf
        return x


def pack(rows: list[Row]) -> tuple[SamplingBatch, np.ndarray]:
    """The batch, and a history whose slots hold what must not be read in all other places."""
    s = no_sampling(len(rows))
    history = np.random.default_rng(8).integers(0, WIDTH, (len(rows), CONTEXT)).astype(np.int32)
    for i, row in enumerate(rows):
        tokens = row.prompt + row.output
        history[i, : len(tokens)] = tokens
        s.position[i], s.prompt_len[i], s.temperature[i], s.logprobs[i] = len(tokens), len(row.prompt), row.temperature, row.logprobs
        s.penalties[i] = row.repetition, row.presence, row.frequency
        s.bias_ids[i, : len(row.bias)], s.bias[i, : len(row.bias)] = list(row.bias), list(row.bias.values())
        s.ends[i, : len(row.ends)] = row.ends
        s.end_from[i] = len(row.prompt) + row.min_tokens if row.min_tokens else 0
        s.key[i] = request_key(5, i)
    return s, history


def every_combination() -> list[Row]:
    rng = random.Random(4)
    choices = ((1.0, 1.3, 0.5), (0.0, 0.7), (0.0, -0.4), ({}, {3: 5.0, 90: -1e9, 0: 0.25}), (0, 10**6))
    rows = []
    for repetition, presence, frequency, bias, least in itertools.product(*choices):
        tokens = [rng.randrange(WIDTH) for _ in range(rng.choice([1, 30, 256, 511, 599]))]
        cut = rng.randrange(1, len(tokens) + 1)
        rows.append(Row(tokens[:cut], tokens[cut:], repetition, presence, frequency, bias, (7, 11), least, rng.choice([0.0, 1.0])))
    return rows


def logits_of(rows: list[Row]) -> np.ndarray:
    return (np.random.default_rng(2).normal(size=(len(rows), WIDTH)) * 3).astype(np.float32)


def test_logits_follow_the_formulas_in_every_combination():
    rows = every_combination()
    x = logits_of(rows)
    x[:, 20] = -np.inf  # as padding of the vocabulary has it: no penalty makes it a number
    got = np.asarray(adjust(x, *pack(rows)))
    np.testing.assert_allclose(got, np.stack([row.expected(each) for row, each in zip(rows, x, strict=True)]), rtol=1e-5, atol=1e-5)
    plain = [i for i, row in enumerate(rows) if (row.repetition, row.presence, row.frequency, row.bias, row.min_tokens) == (1, 0, 0, {}, 0)]
    np.testing.assert_array_equal(got[plain], x[plain])


def test_a_row_does_not_depend_on_its_neighbours_or_its_slot():
    rows = every_combination()
    x, (s, history) = logits_of(rows), pack(rows)
    order = np.random.default_rng(0).permutation(len(rows)).astype(np.int32)
    placed = np.empty_like(history)
    placed[order] = history
    token, said = draw(x, s, placed, order)
    assert not any(np.asarray(part).any() for part in said)
    for i in range(len(rows)):
        alone = jax.tree.map(lambda a, i=i: a[i : i + 1], s)
        assert draw(x[i : i + 1], alone, history[i : i + 1], np.zeros(1, np.int32))[0] == token[i]
    greedy = [i for i, row in enumerate(rows) if row.temperature == 0]
    np.testing.assert_array_equal(token[np.array(greedy)], [rows[i].expected(x[i]).argmax() for i in greedy])


def test_a_penalty_makes_no_number_infinite_and_nan_is_seen_under_a_ban():
    rows = [Row([1], [2], repetition=1e-6), Row([1], [2], repetition=1e6), Row([1], [], ends=(3,), min_tokens=2)]
    x = np.tile(np.array([0, 3e38, -3e38, 1], np.float32), (3, 1))
    x[2] = [0, 1, 2, np.nan]
    s, history = pack(rows)
    assert np.isfinite(np.asarray(adjust(x, s, history))[:2]).all()
    np.testing.assert_array_equal(draw(x, s, history, np.arange(3, dtype=np.int32))[0], [1, 1, -1])


@pytest.mark.parametrize("fields", [{"repetition": 1.7}, {"presence": 0.8, "frequency": 0.3}, {"bias": {2: 1.5, 5: -1.0, 9: -1e9}}])
def test_frequencies_pass_chi_square(fields: dict[str, Any]):
    n, x = 20_000, np.random.default_rng(3).normal(size=12).astype(np.float32)
    row = Row([0, 1, 1, 4], [4, 4, 6, 2], temperature=1.0, **fields)
    s, history = pack([row])
    # All rows are of one context and differ in their keys: one history serves them.
    s = jax.tree.map(lambda a: np.repeat(a, n, axis=0), s).replace(key=np.random.default_rng(7).integers(0, 2**32, (n, 2), np.uint32))
    token, _ = draw(np.tile(x, (n, 1)), s, history[:, :16], np.zeros(n, np.int32))
    y = row.expected(x).astype(np.float64)
    want = np.exp(y - y.max()) / np.exp(y - y.max()).sum() * n
    got = np.bincount(np.asarray(token), minlength=12)
    live = want > 0
    assert got[~live].sum() == 0
    chi2, freedom = float(((got - want)[live] ** 2 / want[live]).sum()), int(live.sum()) - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom) + 4  # above the 99.9% point for every freedom


def test_logprobs_are_of_the_raw_logits():
    rows = [Row([1], [2], repetition=1.5, bias={4: 9.0}, temperature=0.7, logprobs=3), Row([1], []), Row([5], [], logprobs=0)]
    x, (s, history) = logits_of(rows), pack(rows)
    token, (ids, values) = (jax.tree.map(np.asarray, part) for part in draw(x, s, history, np.arange(3, dtype=np.int32)))
    want = x - np.log(np.exp(x.astype(np.float64)).sum(axis=1, keepdims=True))
    assert ids.shape == values.shape == (3, 1 + MAX_LOGPROBS)
    np.testing.assert_array_equal(ids[:, 0], token)
    np.testing.assert_array_equal(ids[:, 1:], np.argsort(-x, axis=1, kind="stable")[:, :MAX_LOGPROBS])
    np.testing.assert_allclose(values, np.take_along_axis(want, ids, axis=1), atol=1e-5)
    small = jax.jit(sampler.top_logprobs)(x[:, :5], token * 0)
    assert (np.asarray(small[0])[:, 6:] == -1).all()


def test_a_sharded_vocabulary_gives_the_same():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    rows = [dataclasses.replace(row, logprobs=4) for row in every_combination()[:16]]
    x, (s, history), slots = np.pad(logits_of(rows), ((0, 0), (0, 7))), pack(rows), np.arange(16, dtype=np.int32)
    place = NamedSharding(Mesh(np.array(jax.devices()[:8]), ("tp",)), PartitionSpec(None, "tp"))
    for want, got in zip(
        jax.tree.leaves(draw(x, s, history, slots)), jax.tree.leaves(draw(jax.device_put(x, place), s, history, slots)), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_what_no_row_asks_for_is_not_computed():
    rows = [Row([1], [2])] * 2
    s, history = pack(rows)
    found: set[tuple[str, int]] = set()  # a primitive, and how many conds are around it

    def walk(jaxpr: Any, conds: int) -> None:
        for eqn in jaxpr.eqns:
            found.add((eqn.primitive.name, conds))
            for value in eqn.params.values():
                for part in value if isinstance(value, tuple | list) else (value,):
                    if hasattr(inner := getattr(part, "jaxpr", part), "eqns"):
                        walk(inner, conds + (eqn.primitive.name == "cond"))

    walk(jax.make_jaxpr(sampler.draw)(logits_of(rows), s, history, np.arange(2)).jaxpr, 0)
    least = lambda *names: min(conds for name, conds in found if name in names)
    assert least("scatter-add", "scatter", "while", "scan") == 2  # each under its own cond, within that of all adjustments
    assert least("top_k") == least("exp") == least("gather") == 1


# Through the engine --------------------------------------------------------------------------------------------------

ALL = SamplingParams(
    max_tokens=24,
    ignore_eos=True,
    temperature=0.3,
    seed=3,
    repetition_penalty=0.2,  # repeats what came before
    presence_penalty=0.3,
    frequency_penalty=0.4,
    logit_bias={5: 2.0, 6: -3.0},
    min_tokens=20,
    stop_token_ids=tuple(range(40, 56)),
    logprobs=2,
)


@functools.lru_cache(maxsize=6)  # each holds thousands of memory maps, of which a process has 65,530
def llm(model: str = "config:tiny", **settings: Any) -> LLM:
    return LLM(model, **{"slots": 4, "context": 128, "chunk": 32, "decode_steps": 8, "debug": True, "dtype": "float32"} | settings)


def prompts() -> list[Any]:
    rng = random.Random(3)
    shared = [rng.randrange(60, 90) for _ in range(50)]  # longer than a chunk; its pages are found again
    return [shared + [rng.randrange(60, 90) for _ in range(length)] for length in (1, 14, 15, 9, 30, 4)]


def asks(index: int) -> SamplingParams:
    """Neighbours ask for other things than ALL does."""
    others = {"max_tokens": 24, "ignore_eos": True, "seed": index}
    return [ALL, SamplingParams(**others), SamplingParams(**others, temperature=1.0, presence_penalty=2.0), ALL][index % 4]


def serve(served: LLM, *, alone: bool = False) -> list[Any]:
    """The outputs of all prompts, each with what it asks for, twice: the second time from cached pages where there are some."""
    params = [asks(i) for i in range(len(prompts()))]
    for _ in range(2):
        if alone:
            found = [served.generate([prompt], each)[0] for prompt, each in zip(prompts(), params, strict=True)]
        else:
            found = served.generate(prompts(), params)
    assert served.stats()["compiles_after_warmup"] == 0
    assert served.engine.pages.free == served.engine.pages.total
    return found


@pytest.mark.parametrize("model", ["config:tiny_window", "config:tiny"])  # the last one's engine serves the tests behind this one
def test_tokens_are_the_same_alone_in_a_batch_from_the_cache_and_after_preemption(model: str):
    cached = llm(model)
    # pages are of full layers: few of them make the scheduler preempt, but one request alone
    small = llm(model, pages=13, prefix_cache=False)
    want = serve(small, alone=True)
    assert small.stats()["preemptions"] == 0
    for served, alone in (
        (cached, True),
        (cached, False),
        (small, False),
        (llm(model, pages=13), False),
        (llm(model, pages=13, decode_steps=1), False),
    ):
        for a, b in zip(want, serve(served, alone=alone), strict=True):
            assert a.token_ids == b.token_ids
            assert (a.logprobs is None) == (b.logprobs is None)
            for x, y in zip(a.logprobs or [], b.logprobs or [], strict=True):
                assert x == pytest.approx(y, abs=1e-3)
    assert cached.stats()["prefix_hit_tokens"] > 0 and small.stats()["preemptions"] > 0
    plain = small.generate(prompts()[:1], dataclasses.replace(ALL, repetition_penalty=1.0))[0]
    assert plain.token_ids != want[0].token_ids  # the prompt counts
    assert len(cached.stats()["programs"]) <= 8


def test_penalties_and_logprobs_are_those_of_prompt_logits():
    """Greedy tokens of the engine, by the formulas on the logits of its own prompt_logits, the prompt found in the cache."""
    served, prompt = llm(), prompts()[1]
    params = dataclasses.replace(ALL, temperature=0.0, logit_bias={7: 1.0}, stop_token_ids=(), min_tokens=0)
    for _ in range(2):
        output = served.generate([prompt], params)[0]
    assert output.metrics.cached_tokens == 48
    x = served.prompt_logits(prompt + output.token_ids)[len(prompt) - 1 :]
    assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids) == 24
    for i, (token, told) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        row = Row(prompt, output.token_ids[:i], 0.2, 0.3, 0.4, {7: 1.0})
        assert row.expected(x[i]).argmax() == token
        want = x[i] - np.log(np.exp(x[i].astype(np.float64)).sum())
        best = [token, *(int(t) for t in np.argsort(-x[i])[:2])]
        assert list(told) == list(dict.fromkeys(best))
        np.testing.assert_allclose(list(told.values()), want[list(told)], atol=1e-4)


def test_min_tokens_holds_back_end_tokens_and_no_longer():
    served, prompt = llm(), prompts()[0]
    eos = served.config.eos_ids[0]
    base = SamplingParams(max_tokens=20, logit_bias={eos: 1e6}, logprobs=0)
    assert served.generate([prompt], base)[0].token_ids == [eos]
    for least in (1, 7, 19):
        output = served.generate([prompt], dataclasses.replace(base, min_tokens=least, stop_token_ids=[3]))[0]
        assert len(output.token_ids) == least + 1 and output.token_ids[-1] == eos and output.finish_reason == "stop"
        assert not {eos, 3} & set(output.token_ids[:-1])


def test_stop_strings_count_after_min_tokens(tiny_directory):
    served = LLM(str(tiny_directory), slots=2, context=128, decode_steps=4, dtype="float32")
    a, b = served.encode("a")[-1], served.encode("b")[-1]
    # Both letters by turns: what is in the output falls behind the other.
    params = SamplingParams(max_tokens=12, ignore_eos=True, logit_bias={a: 1e4, b: 1e4}, frequency_penalty=2.0, stop="ab")
    free = served.generate(["x"], dataclasses.replace(params, stop=None))[0].text
    for least in (0, 3, 6):
        output = served.generate(["x"], dataclasses.replace(params, min_tokens=least))[0]
        at = next(i for i in range(least, 12) if free[: i + 1].endswith("ab"))
        assert (output.text, output.finish_reason) == (free[: at - 1], "stop")
    served.close()


def test_prompt_logprobs_and_their_pages():
    served, prompt = LLM("config:tiny", slots=2, context=128, chunk=32, pages=9, dtype="float32"), prompts()[4]
    params = SamplingParams(max_tokens=8, ignore_eos=True, prompt_logprobs=3, logprobs=1, n=2, seed=1, temperature=1.0)
    plain = served.generate([prompt], dataclasses.replace(params, prompt_logprobs=None, cache_salt="other"))[0]
    output = served.generate([prompts()[0], prompt], [SamplingParams(max_tokens=60, ignore_eos=True), params])[1]
    assert output.token_ids == plain.token_ids and plain.prompt_logprobs is None
    assert output.metrics.cached_tokens >= 64
    x = served.prompt_logits(prompt)
    want = x - np.log(np.exp(x.astype(np.float64)).sum(axis=1, keepdims=True))
    rest: list[Any]
    first, *rest = output.prompt_logprobs or []
    assert first is None and len(rest) == len(prompt) - 1
    for i, told in enumerate(rest):
        assert list(told) == list(dict.fromkeys([prompt[i + 1], *(int(t) for t in np.argsort(-x[i])[:3])]))
        np.testing.assert_allclose(list(told.values()), want[i, list(told)], atol=1e-4)
    zero = served.generate([prompt], dataclasses.replace(params, prompt_logprobs=0))[0].prompt_logprobs
    assert zero is not None and zero[1] == {prompt[1]: rest[0][prompt[1]]}
    aborted = served.submit(prompt, params)
    for seq in aborted:
        served.engine.abort(seq)
    assert not served.generate([[1]], SamplingParams(max_tokens=1))[0].prompt_logprobs
    assert served.stats()["compiles_after_warmup"] == 0 and served.engine.pages.free == 9 and not served.engine.busy
    served.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: must be a number above 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty=nan"),
        ({"presence_penalty": 2.1}, "presence_penalty=2.1: must be a number from -2 to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty=-3: must be"),
        ({"logit_bias": [1]}, "must be a dict"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias=-1: its keys"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias='x'"),
        ({"logit_bias": {1: 1.0, "1": 2.0}}, "each once"),
        ({"logit_bias": {1: float("inf")}}, r"logit_bias\[1\]=inf"),
        ({"logit_bias": dict.fromkeys(range(MAX_BIAS + 1), 1.0)}, "at most 256"),
        ({"logit_bias": {512: 1.0}}, "logit_bias=512: its keys must be token ids from 0 to 511"),
        ({"min_tokens": -1}, "min_tokens=-1"),
        ({"min_tokens": 9, "max_tokens": 8}, r"at most max_tokens \(8\)"),
        ({"logprobs": True}, "logprobs=True"),
        ({"prompt_logprobs": 21}, "prompt_logprobs=21: must be an integer from 0 to 20"),
        ({"priority": 1.5}, "priority=1.5"),
        ({"deadline_s": 0}, "deadline_s=0: must be a number above 0"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(fields: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        llm().generate([[1, 2]], SamplingParams(**fields))


def test_all_fields_come_from_json():
    fields = json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(ALL, priority=2, deadline_s=5, prompt_logprobs=0))))
    assert SamplingParams.from_fields(fields) == dataclasses.replace(ALL, priority=2, deadline_s=5, prompt_logprobs=0)
