"""How a step's rows are shared out on a mesh, and prompts around a ring: the logits and tokens of one device, and what devices exchange."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from test_mesh import GREEDY, PARAMS, PROMPTS, SMALL, compare, model_of, program, scores

from llminfer import LLM
from llminfer.config import from_toml
from llminfer.spread import Shares, ring_rows, shares_of
from llminfer.target import Target
from sharding.collectives import collectives
from sharding.mesh import make_meshes, parse_mesh

pytestmark = [pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices"), pytest.mark.usefixtures("compiled_fast")]


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are shared out over the devices of heads on a CPU, too."""
    of = Target.of
    monkeypatch.setattr(Target, "of", lambda *args, **how: dataclasses.replace(of(*args, **how), shares=8))


def target_of(mesh: str, **fields: Any) -> Target:
    ((there, _),) = make_meshes(parse_mesh(mesh), jax.devices())
    return dataclasses.replace(Target.of("cpu", mesh=there), **fields)


def test_where_rows_are_shared_out() -> None:
    alone, tp, both = Target.of("cpu"), target_of("tp=4", shares=16), target_of("sp=2,tp=2", shares=16)
    assert shares_of(512, 512, alone) == shares_of(512, 512, target_of("tp=4")) == Shares()  # a CPU's devices gain nothing
    assert shares_of(64, 64, tp) == Shares(("tp",)) and shares_of(72, 72, tp) == Shares()
    assert shares_of(32, 32, tp) == shares_of(512, 1, tp) == Shares()  # too few, and decoding
    assert shares_of(64, 64, both) == Shares(("sp", "tp"), ("sp",))
    assert shares_of(48, 48, both) == Shares(("sp",), ("sp",)) and shares_of(40, 40, both) == Shares()


@pytest.mark.parametrize(
    ("model", "mesh", "settings"),
    [
        ("window", "tp=4", {"layout": "stacked"}),
        ("window", "sp=2,tp=2", {}),
        ("moe", "ep=2,tp=2", {"quantize": "int8"}),
        ("moe", "pp=2,tp=2", {}),
    ],
    ids=str,
)
def test_rows_over_the_devices_of_heads_change_no_logits(model: str, mesh: str, settings: dict[str, str], shares: None) -> None:
    quantized = {name: value for name, value in settings.items() if name == "quantize"}
    one, cut = model_of(SMALL[model], "", chunk=32, **quantized), model_of(SMALL[model], mesh, chunk=32, **settings)
    compare(cut, scores(one))
    for llm in (one, cut):
        llm.close()


def test_rows_over_the_devices_of_heads_change_no_tokens(shares: None) -> None:
    """In mixed steps; steps of one token each are as they were."""
    runs = []
    for mesh in ("", "tp=2"):
        llm = model_of(SMALL["moe"], mesh, slots=16, pages=40)
        runs.append([output.token_ids for output in llm.generate(PROMPTS, PARAMS)])
        assert llm.stats()["programs"].keys() >= {"mixed_32"}
        llm.close()
    assert runs[0] == runs[1]


@pytest.mark.parametrize(("model", "mesh"), [("tiny", "tp=4"), ("tiny_moe", "ep=2,tp=2")])
def test_a_layers_two_sums_are_cut_in_halves(model: str, mesh: str, shares: None) -> None:
    text = program(from_toml(model), mesh, "logprobs")
    layer = [each for scope in ("attention", "mlp") for each in collectives(text, scope)]
    assert Counter(each.kind for each in layer) == {"all-gather": 2, "reduce-scatter": 2}
    assert {each.shapes for each in layer} == {((32, 128),), ((8, 128),)}
    assert Counter(each.kind for each in collectives(program(from_toml(model), mesh, "decode"), "mlp")) == {"all-reduce": 1}


# Around a ring --------------------------------------------------------------------------------------------------


def served(llm: LLM, prompts: list[list[int]]) -> list[tuple[list[int], Any]]:
    """One after the other: a prompt goes around alone."""
    return [(out.token_ids, out.logprobs) for prompt in prompts for out in llm.generate([prompt], [GREEDY])]


@pytest.mark.parametrize(
    ("model", "mesh", "settings"),
    [("window", "sp=2", {"layout": "stacked"}), ("moe", "sp=2,tp=2", {}), ("window", "sp=4", {"chunk": 64})],
    ids=str,
)
def test_prompts_around_a_ring(model: str, mesh: str, settings: dict[str, Any]) -> None:
    """Of lengths that fill the ring or not, in one chunk or in several, and begun anew behind what is found in the cache."""
    how = dict(chunk=32, context=128, pages=32) | settings
    kept = {name: value for name, value in how.items() if name != "layout"}
    one, cut = model_of(SMALL[model], "", **kept), model_of(SMALL[model], mesh, **how)
    prompts = [[(5 * i * i + i * length) % 500 + 3 for i in range(length)] for length in (64, 49, 33, 32, 17, 5, 71)]
    prompts.append([*prompts[0], *prompts[3]])
    for (tokens, told), (wanted, by_one) in zip(served(cut, prompts), served(one, prompts), strict=True):
        assert tokens == wanted
        for each, other in zip(told, by_one, strict=True):
            assert each.keys() == other.keys()
            np.testing.assert_allclose(list(each.values()), [other[token] for token in each], atol=1e-5)
    ring = ring_rows(cut.engine.c, cut.settings, cut.target)
    assert ring == how["chunk"] and f"mixed_{ring}_ring" in cut.stats()["programs"]
    assert cut.stats()["compiles_after_warmup"] == 0 and cut.stats()["prefix_hit_tokens"] > 0
    for llm in (one, cut):
        llm.close()
