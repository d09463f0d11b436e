"""A model on many devices: the logits and tokens of one, whatever the mesh; and what devices say to each other."""

from __future__ import annotations

import dataclasses
import functools
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from tiny_model import write_model

from llminfer import LLM, SamplingParams, placement
from llminfer.arrange import arrangement, on_mesh
from llminfer.config import EngineConfig, ModelConfig, from_toml
from llminfer.engine import Engine
from llminfer.errors import UserError
from llminfer.params import param_specs
from llminfer.replicas import Replicas
from llminfer.target import Target
from llminfer.weights import assemble, open_model
from llminfer.weights.assemble import leaves_of
from sharding.collectives import collectives
from sharding.mesh import make_meshes, parse_mesh

pytestmark = [pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices"), pytest.mark.usefixtures("compiled_fast")]
PROMPTS = [[(7 * i + i * j + j) % 500 + 3 for i in range(length)] for j, length in enumerate((41, 33, 5))]
GREEDY = SamplingParams(max_tokens=10, ignore_eos=True, logprobs=2)
DRAWN = SamplingParams(
    max_tokens=10, ignore_eos=True, temperature=1.0, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.2, logit_bias={7: 1.0}, seed=5
)
PARAMS = [GREEDY, DRAWN, dataclasses.replace(GREEDY, min_tokens=3, presence_penalty=0.5, logprobs=None)]
# Two layers compile twice as fast as four.
SMALL = {
    "window": dataclasses.replace(from_toml("tiny_window"), num_layers=2, windows=(24, 0)),
    "moe": dataclasses.replace(from_toml("tiny_moe"), num_layers=2, shared_intermediate_size=64, shared_gate=True),
}
# Each pair of sizes of two axes up to 8 devices but dp=8, those of tokens' test included; tp of 4 and 8 on 2 key-value heads.
# tests/mesh_matrix.py runs all. Quantized matrices on a mesh: test_quant.py.
MESHES = [
    ("window", "tp=8", {}),
    ("window", "dp=2,tp=4", {}),
    ("window", "dp=4,tp=2", {}),
    ("moe", "ep=8", {}),
    ("moe", "ep=4,tp=2", {}),
    ("moe", "ep=2,tp=4", {"layout": "stacked"}),
    ("moe", "ep=2,sp=2,tp=2", {"layout": "stacked"}),
    ("moe", "pp=2,sp=2,tp=2", {}),
    ("moe", "dp=2,ep=4", {}),
    ("moe", "dp=4,ep=2", {"layout": "stacked"}),
]


@dataclasses.dataclass(frozen=True)
class Given:
    """A checkpoint of random weights on the host: no program has to be compiled to make them."""

    config: ModelConfig
    random: bool = False
    tokenizer: Any = lambda: None

    def leaves(self, progress: Any) -> Iterator[tuple[str, np.ndarray]]:
        rng = np.random.default_rng(0)
        for name, spec in leaves_of(param_specs(self.config)):
            drawn = rng.standard_normal(spec.shape, np.float32) * np.float32(spec.std)
            yield name, drawn if spec.init == "normal" else np.full(spec.shape, spec.init == "ones", np.float32)


def model_of(c: ModelConfig, mesh: str, given: Any = Given, **settings: Any) -> LLM:
    """With pages for less than the two long prompts and what they become, and chunks shorter than those."""
    fixed = dict(slots=2, context=64, chunk=16, page_size=8, pages=11, dtype="float32", decode_steps=4, debug=True)
    with mock.patch("llminfer.api.open_model", lambda *_: given(c)):
        return LLM(mesh=mesh, expect=lambda _: (0, 0), **fixed | settings)


def scores(llm: LLM) -> np.ndarray:
    """The logits of a prompt in three chunks, of the last replica: its weights come from the first."""
    return getattr(llm.engine, "engines", [llm.engine])[-1].prompt_logits(PROMPTS[0])


@functools.cache
def alone(model: str) -> LLM:
    return model_of(SMALL[model], "", slots=1, layout="stacked")


def compare(llm: LLM, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(scores(llm), wanted, atol=1e-5 * np.ptp(wanted), rtol=0)


@pytest.mark.parametrize(("model", "mesh", "settings"), MESHES, ids=lambda x: x if isinstance(x, str) else "".join(x.values()) or "listed")
def test_logits_do_not_depend_on_the_mesh(model: str, mesh: str, settings: dict[str, str]) -> None:
    llm = model_of(SMALL[model], mesh, **settings)
    compare(llm, scores(alone(model)))
    llm.close()


def served(llm: LLM) -> list[list[tuple[list[int], Any]]]:
    """What each prompt gives: twice, the second time with prefixes that are found in the cache."""
    outputs = [[(o.token_ids, o.logprobs) for o in llm.generate(PROMPTS, PARAMS)] for _ in range(2)]
    stats = llm.stats()
    assert stats["compiles_after_warmup"] == 0 and stats["prefix_hit_tokens"] > 0 and stats["decode_loops"] > 0
    assert stats["pages_free"] == stats["pages_total"]
    return outputs


def test_tokens_do_not_depend_on_the_mesh() -> None:
    """Nor on the replica, or a prefix in the cache. Batches and preemption on a mesh: test_engine.py."""
    llm = model_of(SMALL["moe"], "dp=2,ep=2,tp=2", slots=1)
    first, *others = [*served(alone("moe")), *served(llm)]
    for run in others:
        assert [tokens for tokens, _ in run] == [tokens for tokens, _ in first]
        for (_, told), (_, wanted) in zip(run, first, strict=True):
            for one, other in zip(told or [], wanted or [], strict=True):
                assert one.keys() == other.keys()
                np.testing.assert_allclose(list(one.values()), [other[token] for token in one], atol=1e-4)
    compare(llm, scores(alone("moe")))
    llm.close()


def test_tokens_do_not_depend_on_where_a_context_lies() -> None:
    """Its pages dealt out to two devices; sequences are preempted meanwhile."""
    llm = model_of(SMALL["window"], "sp=2", layout="stacked")
    first, *others = [*served(alone("window")), *served(llm)]
    assert llm.stats()["preemptions"] > 0
    for run in others:
        assert [tokens for tokens, _ in run] == [tokens for tokens, _ in first]
    llm.close()


def test_a_context_is_dealt_out() -> None:
    """What a device has of the pages of layers that see all positions is its share; and a sequence needs more pages than one has. The
    logits are those of one device."""
    llm = model_of(SMALL["window"], "sp=4,tp=2", prefix_cache=False)
    compare(llm, scores(alone("window")))
    engine = llm.engine
    c, at = engine.c, engine.c.groups.index(0)
    full, sliding, pool = engine._cache.groups[at][0], engine._cache.groups[1 - at][0], engine.pages.groups[at]
    assert pool.total == 12  # 11 were asked for
    shapes = lambda x: {shard.data.shape for shard in x.addressable_shards}
    assert shapes(full) == {(1, 3, 1, 8, c.row_dim)} and shapes(sliding) == {(1, sliding.shape[1], 1, 8, c.row_dim)}
    (seq,) = engine.add(list(range(1, 60)), SamplingParams(max_tokens=1))
    engine.scheduler.schedule()
    where = [page // 3 for page in seq.pages[at]]
    assert where == [(where[0] + i) % 4 for i in range(8)] and len(pool.free) == 4
    llm.close()


def test_a_model_of_windows_has_nothing_to_deal_out() -> None:
    c = dataclasses.replace(from_toml("tiny_window"), windows=(24,))
    ((there, _),) = make_meshes({"sp": 2}, jax.devices())
    with pytest.raises(UserError, match=r"^mesh: sp=2: tiny_window has no layers that see all positions, .*; legal: 1$"):
        Engine(c, EngineConfig(), Target.of("cpu", mesh=there))


def test_collectives_are_found_in_xlas_text() -> None:
    text = """
      %a = f32[8,128]{1,0} all-reduce(%x), metadata={op_name="jit(f)/while/body/attention/dot_general" stack_frame_id=3}
      %b = (f32[2]{0}, s32[]) all-gather-start(%x), metadata={op_name="jit(f)/mlp/top_k"}
      %c = f32[4]{0} add(%all-reduce.1, %b)
    """
    found = collectives(text)
    assert [(each.kind, each.shapes) for each in found] == [("all-reduce", ((8, 128),)), ("all-gather", ((2,), ()))]
    assert collectives(text, "mlp") == found[1:] and collectives(text, "attn") == []


def test_a_host_holds_one_tensor_and_a_part_while_it_loads_a_mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read, and a device's part of it. What lies on devices is not counted."""
    monkeypatch.setattr(assemble, "AHEAD_BYTES", 0)
    checkpoint = open_model(str(write_model(tmp_path / "tiny", tokenizer=False)))
    ((mesh, _),) = make_meshes({"ep": 2, "tp": 4}, jax.devices())
    target = placement.fitted(checkpoint.config, EngineConfig(), Target.of("cpu", mesh=mesh))
    tracemalloc.start()
    weights = placement.load_params(checkpoint.leaves(), checkpoint.config, EngineConfig(), target)
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(weights))
    assert placement.tree_bytes(weights) > 10 * largest and peak - after < 2 * largest
    parts = dict.fromkeys(mesh.devices.flat, 0)
    for shard in (shard for leaf in jax.tree.leaves(weights) for shard in leaf.addressable_shards):
        parts[shard.device] += shard.data.nbytes
    assert max(parts.values()) < placement.tree_bytes(weights) / 7.5  # all but norms is split


@pytest.mark.parametrize("qk_norm", ["head", "heads", "full"])
def test_what_a_mesh_arranges_can_be_given_back(qk_norm: str) -> None:
    ((mesh, _),) = make_meshes({"tp": 4}, jax.devices())
    target, rng = Target.of("cpu", mesh=mesh), np.random.default_rng(0)
    c = dataclasses.replace(from_toml("tiny"), qk_norm=qk_norm, qkv_bias=True, mlp_bias=True)
    placed = dict(leaves_of(param_specs(on_mesh(c, target))))
    changed = set()
    for name, spec in leaves_of(param_specs(c)):
        if (arrange := arrangement(name, spec, c, target)) is None:
            assert spec.shape == placed[name].shape
            continue
        w = rng.standard_normal(spec.shape, np.float32)
        assert arrange(w).shape == placed[name].shape
        np.testing.assert_array_equal(arrange.inverse(arrange(w)), w)
        changed.add(name.rpartition(".")[2])
    assert changed == {"qkv", "qkv_bias", "gate_up", "gate_up_bias", *(() if qk_norm == "head" else ("k_norm",))}


def test_a_request_goes_where_there_is_room_or_its_prefix() -> None:
    llm = LLM("config:tiny", mesh="dp=2", slots=2, context=64, chunk=16, page_size=8, decode_steps=4, expect=lambda _: (0, 0))
    replicas = llm.engine
    assert isinstance(replicas, Replicas)
    loads = lambda: [engine.queued for engine in replicas.engines]
    made = [llm.submit(PROMPTS[1], GREEDY)[0] for _ in range(3)]
    assert loads() == [2, 1]
    llm.submit(PROMPTS[1], dataclasses.replace(GREEDY, n=2))
    assert loads() in ([4, 1], [2, 3])
    for seq in [*made, *replicas._home]:
        replicas.abort(seq)
    assert loads() == [0, 0] and not replicas.busy and not replicas._home
    replicas.engines[1].found = lambda prompt, params: 16  # type: ignore[method-assign]
    assert llm.submit(PROMPTS[0], GREEDY) and loads() == [0, 1]
    assert llm.submit(PROMPTS[0], GREEDY) and loads() == [0, 2]
    assert llm.submit(PROMPTS[0], GREEDY) and loads() == [1, 2]  # no slot is free there
    llm.close()


def program(c: ModelConfig, mesh: str, kind: str) -> str:
    """The compiled text of a stacked engine's largest decode loop, or of its logprobs."""
    jax.config.update("jax_disable_most_optimizations", False)
    ((there, _),) = make_meshes(parse_mesh(mesh), jax.devices())
    settings = EngineConfig(slots=8, context=64, chunk=32, page_size=16, decode_steps=4)
    engine = Engine(c, settings, Target.of("cpu", layout="stacked", mesh=there))
    return engine.programs.lower(engine.declared.decode[-1] if kind == "decode" else engine.declared.logprobs).compile().as_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_device_runs_the_program_of_one(dtype: str) -> None:
    """As on GPUs, with their kernels interpreted: the logits are those of one device, also where key-value heads are copied and products
    have biases, which are to be added once; a layer has two sums."""
    c = dataclasses.replace(SMALL["window"], qkv_bias=True, o_bias=True, mlp_bias=True, head_dim=64)
    rng = np.random.default_rng(3)
    drawn = {name: rng.standard_normal(spec.shape, np.float32) * np.float32(spec.std) for name, spec in leaves_of(param_specs(c))}
    settings, found = EngineConfig(slots=2, context=64, chunk=16, page_size=8), []
    for mesh in ("", "tp=4"):
        there = make_meshes(parse_mesh(mesh), jax.devices())[0][0] if mesh else None
        target = Target.of("cpu", layout="listed", mesh=there, dtype=dtype)
        if mesh:
            target = dataclasses.replace(target, kernels="triton-interpret", branches=False)
        engine = Engine(c, settings, target)
        engine.load(iter(drawn.items()))
        found.append(engine.prompt_logits(PROMPTS[1]))
        if mesh:
            layer = collectives(engine.programs.lower(engine.declared.decode[0]).compile().as_text())
            sums = [each for each in layer if {"attention", "mlp"} & set(each.scope)]
            assert Counter(each.kind for each in sums) == {"all-reduce": 2 * c.num_layers}
        engine.programs.close()
    np.testing.assert_allclose(found[1], found[0], atol=(1e-5 if dtype == "float32" else 0.03) * np.ptp(found[0]), rtol=0)


@pytest.mark.parametrize(("model", "mesh", "kind"), [("tiny", "tp=4", "logprobs"), ("tiny_moe", "ep=2,tp=4", "decode")])
def test_a_layer_has_two_sums_and_logits_stay_where_they_are(model: str, mesh: str, kind: str) -> None:
    """One of the mlp, or of the experts with the one that all tokens share."""
    c = from_toml(model)
    text = program(dataclasses.replace(c, shared_intermediate_size=64, shared_gate=True) if c.num_experts else c, mesh, kind)
    layer = [each for scope in ("attention", "mlp") for each in collectives(text, scope)]
    assert Counter(each.kind for each in layer) == {"all-reduce": 2}  # under the scan: of one layer
    # Nothing as large as a device's part of the logits goes anywhere.
    rows, vocab = (8, 64) if kind == "decode" else (32, 128)
    outside = [each for each in collectives(text) if each not in layer]
    gathered = [shape for each in outside if each.kind != "all-reduce" for shape in each.shapes]
    assert outside and all(shape[-1] < 512 and np.prod(shape) < rows * 512 for shape in gathered)
    assert all(shape[-1:] < (vocab,) or shape[-1:] == (128,) for each in outside for shape in each.shapes if each.kind == "all-reduce")
