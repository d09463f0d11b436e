"""A cache of 8-bit numbers with scales: close to the whole one, and the same in every layout and on a mesh."""

from __future__ import annotations

import numpy as np
import pytest

from llminfer import LLM, SamplingParams
from llminfer.errors import UserError

pytestmark = pytest.mark.usefixtures("compiled_fast")

PROMPTS = [[(7 * i + j) % 500 + 3 for i in range(20 + 31 * j)] for j in range(3)]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
SETTINGS = dict(slots=4, context=256, chunk=32, debug=True)  # debug: what nobody owns is NaN


def tokens(**settings) -> list[list[int]]:
    llm = LLM("config:tiny_window", **SETTINGS, **settings)
    found = llm.generate(PROMPTS, GREEDY)
    assert llm.stats()["compiles_after_warmup"] == 0
    assert all(x.finish_reason == "length" for x in found)
    return [x.token_ids for x in found]


@pytest.mark.parametrize(("dtype", "bound"), [("int8", 0.01), ("float8_e4m3fn", 0.05)])
def test_logits_are_close(dtype: str, bound: float) -> None:
    whole, small = (LLM("config:tiny_window", **SETTINGS, kv_dtype=kind).prompt_logits(PROMPTS[2]) for kind in (None, dtype))
    error = np.abs(np.asarray(small) - np.asarray(whole)).max() / np.ptp(np.asarray(whole))
    assert 0 < error < bound


def test_layouts_and_meshes_agree() -> None:
    listed = tokens(kv_dtype="int8")
    assert tokens(kv_dtype="int8", layout="stacked") == listed
    assert tokens(kv_dtype="int8", mesh="tp=2") == listed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(kv_dtype="int4"), "kv_dtype"),
        (dict(kv_dtype="int8", kv_policy="sinks:4,window:64"), "sinks must be 0"),
    ],
)
def test_refuses(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LLM("config:tiny", **settings)
