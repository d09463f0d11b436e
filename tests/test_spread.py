"""How a step's rows are shared out on a mesh, and prompts around a ring: what one device finds, and what devices exchange."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from test_mesh import PROMPTS, model_of, program

from llminfer import LLM, SamplingParams, placement, stages
from llminfer.config import EngineConfig, from_toml
from llminfer.engine import Engine
from llminfer.programs import Declared, Programs
from llminfer.scheduler import Item, Plan
from llminfer.spread import Shares, _pairs, ring_rows, shares_of
from llminfer.target import Target
from sharding.collectives import collectives
from sharding.mesh import make_meshes, parse_mesh
from sharding.ring import attend_tiles

pytestmark = [pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices"), pytest.mark.usefixtures("compiled_fast")]
# A token of each prompt: one program compiles for that. What was cached is read by the next chunk, and behind a prefix.
FIRST = SamplingParams(max_tokens=1, ignore_eos=True, logprobs=20)
MOE = from_toml("tiny_moe")
MODELS = {
    "all": dataclasses.replace(MOE, num_layers=2, windows=(24, 0), moe_layers=(True, False), sink_logits=True, post_norm=True),
    "moe": dataclasses.replace(MOE, num_layers=2),
}


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are shared out over the devices of heads on a CPU, too; also those of a piece in a stage."""
    of = Target.of
    monkeypatch.setattr(Target, "of", lambda *args, **how: dataclasses.replace(of(*args, **how), shares=8))
    monkeypatch.setitem(stages.LEAST_ROWS, "cpu", 16)


def target_of(mesh: str, **fields: Any) -> Target:
    ((there, _),) = make_meshes(parse_mesh(mesh), jax.devices())
    return dataclasses.replace(Target.of("cpu", layout="stacked", mesh=there), **fields)


def found(llm: LLM, prompts: list[list[int]]) -> list[tuple[list[int], Any]]:
    """One after the other: a prompt goes around a ring alone."""
    return [(out.token_ids, out.logprobs) for prompt in prompts for out in llm.generate([prompt], [FIRST])]


@functools.cache
def alone(model: str, prompts: Any, **settings: Any) -> list[tuple[list[int], Any]]:
    llm = model_of(MODELS[model], "", **settings)
    wanted = found(llm, prompts())
    llm.close()
    return wanted


def compare(some: Any, wanted: Any) -> None:
    for (tokens, told), (others, by_one) in zip(some, wanted, strict=True):
        assert tokens == others
        for each, other in zip(told, by_one, strict=True):
            assert each.keys() == other.keys()
            np.testing.assert_allclose(list(each.values()), [other[token] for token in each], atol=1e-5)


def test_where_rows_are_shared_out() -> None:
    one, tp, both = Target.of("cpu"), target_of("tp=4", shares=48), target_of("sp=2,tp=2", shares=48)
    assert shares_of(512, 512, one) == shares_of(512, 512, target_of("tp=4")) == Shares()  # a CPU's devices gain nothing
    assert shares_of(64, 64, tp) == Shares(("tp",)) and shares_of(72, 72, tp) == Shares()
    assert shares_of(32, 32, tp) == shares_of(512, 1, tp) == Shares()  # too few, and decoding
    assert shares_of(64, 64, both) == Shares(("sp", "tp"), ("sp",))
    assert shares_of(48, 48, both) == Shares(("sp",), ("sp",)) and shares_of(40, 40, both) == Shares()


def ordinary() -> list[list[int]]:
    return [*PROMPTS, [*PROMPTS[0][:32], 9, 9, 9]]


@pytest.mark.parametrize(
    ("model", "mesh", "quantize"),
    [("all", "sp=2,tp=2", None), ("moe", "ep=2,tp=2", "int8"), ("moe", "pp=2,tp=2", None)],
)
def test_rows_over_the_devices_of_heads_change_nothing(model: str, mesh: str, quantize: str | None, shares: None) -> None:
    how = dict(slots=8, chunk=24, quantize=quantize, layout="stacked")  # steps of 32 rows
    cut = model_of(MODELS[model], mesh, **how)
    compare(found(cut, ordinary()), alone(model, ordinary, **how))
    assert {"mixed_32"} == {name for name in cut.stats()["programs"] if "mixed" in name} and cut.stats()["prefix_hit_tokens"] > 0
    cut.close()


def test_a_layers_two_sums_are_cut_in_halves(shares: None) -> None:
    """Of a dense model and one with experts; each half gives a device its share, or all rows again. Decoding is as it was."""
    c = dataclasses.replace(MOE, num_layers=2, moe_layers=(True, False))
    text = program(c, "ep=2,tp=2", "logprobs")
    layer = [each for scope in ("attention", "mlp") for each in collectives(text, scope)]
    assert Counter(each.kind for each in layer) == {"all-gather": 4, "reduce-scatter": 4}  # two layers are a pattern
    assert {each.shapes for each in layer} == {((32, 128),), ((8, 128),)}
    lowered = []
    for least in (0, 8):
        engine = Engine(c, EngineConfig(slots=8, context=64), target_of("ep=2,tp=2", shares=least))
        lowered.append(engine.programs.lower(engine.declared.decode[-1]).as_text())
    assert lowered[0] == lowered[1]


def around() -> list[list[int]]:
    """Prompts of lengths that fill the ring or not, in one chunk or in more; the second finds the first in the cache."""
    made = [[(5 * i * i + i * length) % 500 + 3 for i in range(length)] for length in (64, 33, 32, 17, 5)]
    return [made[0], [*made[0], *made[2]], *made[1:]]


def test_prompts_around_a_ring() -> None:
    """With a layer that has a window and one that sees all positions, experts, and learned sinks."""
    how: dict[str, Any] = dict(chunk=32, context=128, pages=32, layout="stacked")
    cut = model_of(MODELS["all"], "sp=2,tp=2", **how)
    compare(found(cut, around()), alone("all", around, **how))
    assert ring_rows(cut.engine.c, cut.settings, cut.target) == 32
    stats = cut.stats()
    assert {name for name in stats["programs"] if "mixed" in name} == {"mixed_40", "mixed_32_ring"}
    assert stats["compiles_after_warmup"] == 0 and stats["prefix_hit_tokens"] > 0
    cut.close()


def test_a_kernel_looks_at_two_chunks() -> None:
    """The same chunk, or one before; the prompt may end in it."""
    how: dict[str, Any] = dict(scale=0.3, softcap=5.0)
    rng, target = np.random.default_rng(0), dataclasses.replace(Target.of("tpu", chip="v5e"), kernels="interpret")
    q, k, v = (rng.standard_normal((32, heads, 16), np.float32) for heads in (4, 2, 2))
    look = jax.jit(_pairs(32, target, how)["attend"])
    for places in ((32, 32, 96), (64, 32, 96), (32, 32, 37), (64, 0, 70)):
        q_first, k_first, length = map(np.int32, places)
        wanted, real = attend_tiles(q, k, v, q_first, k_first, length, **how), slice(0, max(0, length - q_first))
        for one, other in zip(look(q, k, v, q_first, k_first, length), wanted, strict=True):
            np.testing.assert_allclose(one[real], other[real], atol=1e-5)


def test_who_goes_around_a_ring() -> None:
    c, asked, sp = from_toml("tiny"), EngineConfig(slots=2, context=64, chunk=40, page_size=8), target_of("sp=2")
    rows = lambda target=sp, c=c, **how: ring_rows(c, dataclasses.replace(asked, **how), target)
    assert rows() == 64 and rows(chunk=64) == 64 and rows(chunk=31) == 0  # chunks of zigzag order are whole pages
    assert rows(Target.of("cpu")) == rows(target_of("pp=2,sp=2")) == rows(kv_dtype="bfloat16") == rows(kv_dtype="int8") == 0
    assert rows(c=from_toml("deepseek_v3")) == 0
    declared = Declared(asked, sp, 8, 1, 64)
    plan = lambda *items: declared.of(Plan(tuple(Item(None, *item, 0) for item in items))).name  # type: ignore[arg-type]
    taken = [plan((0, 32)), plan((0, 40)), plan((0, 31)), plan((8, 40)), plan((0, 32), (9, 1))]
    assert taken == ["mixed_64_ring", "mixed_64_ring", "mixed_40", "mixed_40", "mixed_40"]


@pytest.mark.tpu_compile
def test_a_tpu_computes_while_a_ring_turns() -> None:
    """Llama-3-8B's shapes for v5e:2x2: loops of kernels between the start and the end of each transfer, the cache in place, and nothing but
    keys and values exchanged for attention."""
    jax.config.update("jax_disable_most_optimizations", False)
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    ((mesh, _),) = make_meshes({"sp": 4}, devices)
    c = dataclasses.replace(from_toml("llama3_8b"), num_layers=2)
    settings = EngineConfig(slots=2, context=4096, chunk=1024)
    target = placement.fitted(c, settings, Target.of("tpu", chip="v5e", mesh=mesh))
    cache = placement.abstract_cache(c, settings, target, (512,))
    shapes = (placement.abstract_params(c, settings, target), cache, placement.abstract_history(settings, target, 4096))
    programs = Programs(c, target, shapes, most=8)
    (program,) = Declared(settings, target, 256, 1, ring_rows(c, settings, target)).ring
    compiled = programs.lower(program).compile()
    programs.close()
    between = [each for each in transfers(compiled.as_text()) if "attention" in each[0]]
    assert len(between) == 2 and all(" while(" in lines for _, lines in between)
    assert compiled.memory_analysis().alias_size_in_bytes >= placement.device_bytes(cache)
    moved = collectives(compiled.as_text(), "attention")
    assert Counter(each.kind for each in moved) == {"collective-permute": 2, "all-to-all": 1}
    assert {np.prod(each.shapes[0]) for each in moved} == {256 * 8 * 128, 256 * 8 * 256}  # a device's keys, and its keys and values


def transfers(text: str) -> list[tuple[str, str]]:
    """(a transfer's line, the lines between its start and its end) of a compiled program."""
    found = []
    for computation in text.split("\n\n"):
        lines, started = computation.splitlines(), {}
        for number, line in enumerate(lines):
            if begins := re.search(r"%(\S+) = .* collective-permute-start\(", line):
                started[begins[1]] = number
            elif ends := re.search(r"collective-permute-done\([^)]*%([\w.-]+)\)", line):
                first = started[ends[1]]
                found.append((lines[first], "\n".join(lines[first + 1 : number])))
    return found
