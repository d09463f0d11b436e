"""Eviction from the cache: the engine's logits are those of StreamingLLM as its paper has it, and memory stays bounded."""

from __future__ import annotations

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llminfer import LLM, SamplingParams, UserError, layers
from llminfer.model import logits
from llminfer.target import Target
from pallas_kernels.rope import rotate

pytestmark = pytest.mark.usefixtures("compiled_fast")

POLICY = "sinks:3,window:20"


@functools.lru_cache(maxsize=6)  # each holds thousands of memory maps, of which a process has 65,530
def llm(model: str = "config:tiny", **settings) -> LLM:
    return LLM(model, **{"slots": 4, "context": 128, "chunk": 32, "decode_steps": 8, "debug": True, "dtype": "float32"} | settings)


def prompt(length: int) -> list[int]:
    draw = random.Random(length)
    return [draw.randrange(3, 512) for _ in range(length)]


def streaming(engine, ids: list[int], sinks: int, window: int) -> np.ndarray:
    """Logits [len, V] by a loop over tokens and layers: keys are kept unrotated, what lies between sinks and window is thrown away, and
    positions are places in what is left (Xiao et al., arXiv 2309.17453, section 3.2)."""
    c, params, out = engine.c, engine._params, []
    kept: list[list] = [[] for _ in params.listed]
    heads, group, dim = c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim

    def turned(x, place: int):
        at = jnp.array([place])
        return rotate(x, layers.rope_tables(c, at, at + 1)[0])[0]

    for token in ids:
        x = params.embed[jnp.array([token])]
        for w, past in zip(params.listed, kept, strict=True):
            y = (layers.norm(x, w.attn_norm, None, c) @ w.qkv).reshape(1, heads, group + 2, dim)
            past.append((y[:, :, -2], y[:, :, -1]))
            if len(past) > sinks + window:
                del past[sinks]
            q = turned(y[:, :, :-2].reshape(1, heads * group, dim), len(past) - 1).reshape(heads, group, dim)
            keys = jnp.stack([turned(k, place) for place, (k, _) in enumerate(past)])
            values = jnp.stack([v[0] for _, v in past])
            weight = jax.nn.softmax(jnp.einsum("hgd,nhd->hgn", q, keys) * dim**-0.5, axis=-1)
            x = x + jnp.einsum("hgn,nhd->hgd", weight, values).reshape(1, -1) @ w.o
            y = layers.norm(x, w.mlp_norm, None, c) @ w.gate_up
            gate, up = jnp.split(y, 2, axis=-1)
            x = x + (layers.activate(gate, c) * up) @ w.down
        out.append(logits(params, layers.norm(x, params.final_norm, None, c), c, Target.of("cpu"))[0])
    return np.stack(out)


@pytest.mark.parametrize("chunk", [32, 8])
def test_logits_are_those_of_streaming_llm(chunk: int) -> None:
    served = llm(kv_policy=POLICY, chunk=chunk)
    ids = prompt(60)
    with jax.default_matmul_precision("highest"):
        want = streaming(served.engine, ids, 3, 20)
    found = served.prompt_logits(ids)
    assert np.abs(found - want).max() < 1e-5 * np.ptp(want)
    plain = llm().prompt_logits(ids)
    assert np.abs(plain[:23] - want[:23]).max() < 1e-5 * np.ptp(want)  # nothing is left out yet
    assert np.abs(plain[30:] - want[30:]).max() > 1e-3 * np.ptp(want)


@pytest.mark.parametrize("model", ["config:tiny", "config:tiny_window"])
def test_tokens_do_not_depend_on_chunks_pages_neighbours_or_the_cache(model: str) -> None:
    prompts, params = [prompt(n) for n in (1, 15, 22, 23, 24, 70, 100)], SamplingParams(max_tokens=28, ignore_eos=True)
    serve = lambda **settings: [o.token_ids for o in llm(model, kv_policy=POLICY, **settings).generate(prompts, params)]
    want = [llm(model, kv_policy=POLICY).generate([ids], params)[0].token_ids for ids in prompts]
    assert serve() == want
    assert serve() == want  # the second time from cached prefixes
    assert serve(chunk=16, page_size=8, prefix_cache=False) == want
    assert llm(model, kv_policy=POLICY).stats()["prefix_hit_tokens"] > 0
    assert llm(model, kv_policy=POLICY).stats()["compiles_after_warmup"] == 0


def test_generation_without_end_holds_bounded_pages() -> None:
    """The context may be longer than the model was made for."""
    served = llm(kv_policy=POLICY, context=100_000, slots=2, page_size=8)
    assert served.engine.context > served.config.max_position
    pages = served.engine.pages
    assert pages.total < 40
    (seq,) = served.submit(prompt(50), SamplingParams(max_tokens=9_000, ignore_eos=True))
    held = 0
    for _ in range(1200):
        served.engine.step()
        if seq.finish is None:
            held = max(held, sum(page >= 0 for page in seq.pages[0]))
    assert seq.finish == "length" and len(seq.output) == 9_000
    assert held <= 1 + -(-(20 + 16) // 8) + 1 and pages.free == pages.total


@pytest.mark.parametrize(
    ("model", "policy", "message"),
    [
        ("config:tiny", "sinks:4", "kv_policy='sinks:4': must be 'sinks:S,window:W'"),
        ("config:tiny", "sinks:4,window:0", "W from 1"),
        ("config:tiny", "sinks:1000,window:10", "S from 0 to 128"),
        ("config:tiny", "last:4,window:10", "must be"),
        ("config:tiny_window", "sinks:4,window:24", "window must not be one of"),
    ],
)
def test_what_makes_no_sense_is_refused(model: str, policy: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LLM(model, kv_policy=policy)
