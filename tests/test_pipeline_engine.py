"""A model in stages: the logits and tokens of one device, a stage's layers and cache on its own devices; what the schedule costs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_mesh import PARAMS, PROMPTS, model_of

from llminfer import LLM, SamplingParams, UserError, placement, stages, weights
from llminfer.arrange import on_mesh
from llminfer.batch import BatchShape, pack
from llminfer.config import EngineConfig, from_toml
from llminfer.engine import Engine
from llminfer.programs import Program, Programs
from llminfer.sampler import draw
from llminfer.scheduler import Item, Plan
from llminfer.target import Target, chip_of
from sharding.collectives import collectives
from sharding.mesh import make_meshes, parse_mesh
from sharding.pipeline import Schedule

pytestmark = [pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices"), pytest.mark.usefixtures("compiled_fast")]


def mesh_of(text: str, devices: Any = None) -> Any:
    ((mesh, _),) = make_meshes(parse_mesh(text), devices or jax.devices())
    return mesh


def drawn(llm: LLM, prompt: list[int], params: SamplingParams, tokens: list[int]) -> list[int]:
    """What one device draws after each token but the last, by the logits of all of them at once: no step of an engine is in it."""
    logits = np.asarray(llm.prompt_logits([*prompt, *tokens[:-1]]))[len(prompt) - 1 :]
    (seq,) = llm.engine.add(prompt, params)
    seq.output, seq.slot, seq.pages = tokens, 0, [[], []]
    rows = [Item(seq, position - 1, 1, 1) for position in range(len(prompt), len(prompt) + len(tokens))]
    batch = pack(rows, BatchShape(len(rows), len(rows), 1, 2))
    history = np.array([[*prompt, *tokens, *[0] * (64 - len(prompt) - len(tokens))]], np.int32)
    return jax.jit(draw)(logits, dataclasses.replace(batch.sampling, position=batch.kv_len), history, batch.slots)[0].tolist()


def test_logits_and_tokens_are_those_of_one_device() -> None:
    """With preemptions, prefixes that are found, chunks, and decode loops; greedy and drawn. tests/mesh_matrix.py has all meshes."""
    cut, alone = model_of(from_toml("tiny_stages"), "pp=2,ep=2"), model_of(from_toml("tiny_stages"), "")
    wanted = np.asarray(alone.prompt_logits(PROMPTS[0]))
    np.testing.assert_allclose(cut.prompt_logits(PROMPTS[0]), wanted, atol=1e-5 * np.ptp(wanted), rtol=0)
    for _ in range(2):
        for prompt, params, found in zip(PROMPTS, PARAMS, cut.generate(PROMPTS, PARAMS), strict=True):
            assert len(found.token_ids) == 10 and drawn(alone, prompt, params, found.token_ids) == found.token_ids
    stats = cut.stats()
    assert stats["prefix_hit_tokens"] > 0 and stats["preemptions"] > 0 and stats["decode_loops"] > 0
    assert stats["compiles_after_warmup"] == 0 and stats["pages_free"] == stats["pages_total"]
    assert 0 < stats["pipeline_bubble"] < 0.5 and stats["expert_imbalance"].keys()
    for llm in (cut, alone):
        llm.close()


def test_a_stage_has_its_own_layers_and_their_cache_and_nothing_else(tiny_directory: Path) -> None:
    checkpoint = weights.open_model(str(tiny_directory))
    settings = EngineConfig(slots=2, context=64, chunk=16, page_size=8)
    engine, alone = (
        Engine(checkpoint.config, settings, Target.of("cpu", layout="stacked", mesh=mesh)) for mesh in (mesh_of("pp=2,tp=2"), None)
    )
    for each in (engine, alone):
        each.load(checkpoint.leaves())
    for name, leaf in vars(engine._params.stacked[0]).items():
        whole = getattr(alone._params.stacked[0], name)
        if leaf is None:
            assert whole is None
            continue
        assert leaf.shape == whole.shape and leaf.shape[0] == 4
        if name != "gate_up":  # in another order where tp splits it
            np.testing.assert_array_equal(leaf, whole)
        for shard in leaf.addressable_shards:
            number = jax.devices().index(shard.device) // 2
            assert shard.index[0] == slice(2 * number, 2 * number + 2) and shard.data.shape[0] == 2
    (cache,) = engine._cache.groups
    assert cache.shape[0] == 4 and {shard.data.shape[0] for shard in cache.addressable_shards} == {2}
    assert {shard.data.shape[0] for shard in engine._params.embed.addressable_shards} == {512 // 4}  # of all stages
    assert engine._cache.around == ()


def test_layers_around_the_stages_are_on_the_devices_of_all() -> None:
    c = from_toml("tiny_stages")
    target = placement.fitted(c, EngineConfig(), Target.of("cpu", mesh=mesh_of("pp=2,ep=2,tp=2")))
    shapes = placement.abstract_params(c, EngineConfig(), target)
    own = lambda x: x.sharding.shard_shape(x.shape)
    assert target.stacked and len(shapes.listed) == 2 and shapes.leading == 1
    assert [own(layer.experts_down) for layer in shapes.stacked] == [(1, 4, 64, 128)] * 2
    assert own(shapes.listed[1].experts_down) == (4, 64, 128)
    cache = placement.abstract_cache(c, EngineConfig(page_size=8), target, (9, 7))
    # Two patterns of a layer with a window and one without; beside them two layers with their own place in the cache.
    assert [group.shape[:2] for group in cache.groups] == [(2, 9), (2, 7)] and [own(group)[0] for group in cache.groups] == [1, 1]
    assert [own(layer)[:2] for layer in cache.around] == [(1, 9), (1, 7)]


@pytest.mark.parametrize(
    ("model", "mesh", "message"),
    [
        ("tiny", "pp=8", "mesh: pp=8: a stage needs one whole pattern of layers at least, tiny has 4; legal: 1, 2, 3, 4"),
        ("tiny_window", "pp=2", "mesh: pp=2: a stage needs one whole pattern of layers at least, tiny_window has 1; legal: 1"),
        ("tiny_moe", "pp=2,ep=3", "ep=3 does not divide num_experts=8; legal: 1, 2, 4, 8"),
    ],
)
def test_stages_that_would_not_be_alike_are_refused(model: str, mesh: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        placement.fitted(from_toml(model), EngineConfig(), Target.of("cpu", mesh=mesh_of(mesh)))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_pipeline_of_listed_layers_is_refused() -> None:
    with pytest.raises(UserError, match=r"layout='listed': .* legal: auto, stacked"):
        placement.fitted(from_toml("tiny"), EngineConfig(), Target.of("cpu", layout="listed", mesh=mesh_of("pp=2")))


def test_the_bubble_is_that_of_the_steps_that_were_made() -> None:
    target = placement.fitted(from_toml("tiny"), EngineConfig(), Target.of("cpu", mesh=mesh_of("pp=4")))
    item = lambda count, draws=1: Item(None, 0, count, draws)  # type: ignore[arg-type]
    # 17 rows in pieces of 8, whatever the program has room for; then 8 sequences that all draw 3 tokens, and two of which one ends.
    assert stages.occupied(Plan((item(16), item(1))), [[5], [5]], 24, target) == (3, 6)
    assert stages.occupied(Plan((item(1, 3),) * 8, steps=3), [[5] * 3] * 8, 8, target) == (12, Schedule(4, 4).ticks(3))
    assert stages.occupied(Plan((item(1, 3),) * 2, steps=3), [[5] * 3, [5]], 8, target) == (4, 15)
    assert stages.occupied(Plan((item(1, 3),), steps=3), [[]], 1, target) == (0, 4)


@pytest.mark.tpu_compile
def test_a_decode_loop_in_stages_compiles_for_a_tpu_in_place() -> None:
    jax.config.update("jax_disable_most_optimizations", False)
    from compile_matrix import TOPOLOGIES
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES["v5p"]).devices
    c = dataclasses.replace(from_toml("llama3_8b"), num_layers=4)
    target = placement.fitted(c, EngineConfig(), Target.of("tpu", chip=chip_of(devices[0]), mesh=mesh_of("pp=2,tp=2", devices)))
    settings, pages, context = EngineConfig(slots=8, page_size=16), 512, 1024
    trees = (placement.abstract_params(c, settings, target), placement.abstract_cache(c, settings, target, (pages,)))
    programs = Programs(on_mesh(c, target), target, (*trees, placement.abstract_history(settings, target, context)), most=8)
    compiled = programs.lower(Program("decode", BatchShape(8, 8, context // 16, 1), plain=True)).compile()
    programs.close()
    memory = compiled.memory_analysis()
    own = lambda tree: sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    assert own(trees[1]) == placement.tree_bytes(trees[1]) // 4 and own(trees[0].stacked) < placement.tree_bytes(trees[0].stacked) / 3.9
    assert memory.alias_size_in_bytes >= own(trees[1])
    assert memory.temp_size_in_bytes < own(trees[1]) / 2  # no second cache, and no copy of a layer's weights (55 MB each)
    found = collectives(compiled.as_text())
    moved = [each for each in found if each.kind == "collective-permute"]
    assert moved and all(each.shapes[0] == (4, 4096) for each in moved)  # half of the sequences, from stage to stage
    assert all(int(np.prod(shape)) <= 8 * 4096 for each in found for shape in each.shapes)  # nothing as large as weights goes anywhere
