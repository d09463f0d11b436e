"""Copies of experts: where they are put, that they change nothing but who works, and that weights arrive where the table says."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
import test_moe
from test_mesh import PROMPTS, SMALL, Given, model_of

from llminfer import AsyncLLM, SamplingParams, UserError
from llminfer.arrange import Halves
from llminfer.balance import by_expert, imbalance, place, sources, table, total
from llminfer.config import EngineConfig, ModelConfig, from_toml
from llminfer.engine import Engine
from llminfer.moe import experts
from llminfer.quant import dequantize
from llminfer.target import Target
from sharding.mesh import make_meshes

pytestmark = pytest.mark.usefixtures("compiled_fast")
EIGHT = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
# All tokens want expert 7, and another.
SKEWED = dataclasses.replace(SMALL["moe"], router_bias="logits")
GREEDY = SamplingParams(max_tokens=9, ignore_eos=True)


class Skewed(Given):
    def leaves(self, progress: Any = None) -> Iterator[tuple[str, np.ndarray]]:
        for name, leaf in super().leaves(progress):
            yield name, np.float32([0, 0, 0, 0, 0, 0, 0, 9]) if name.endswith("router_bias") else leaf


def loads(order: np.ndarray, load: np.ndarray, devices: int) -> np.ndarray:
    """Of each device, where copies share a load equally."""
    return (load / np.bincount(order))[order].reshape(devices, -1).sum(1)


def test_a_placement_has_all_experts_and_evens_out_devices() -> None:
    rng, gains = np.random.default_rng(0), []
    for number, copies, devices in [(8, 0, 4), (8, 4, 4), (8, 8, 2), (64, 16, 8), (5, 1, 3)] * 4:
        load = rng.permutation(1000 / np.arange(1, number + 1) ** rng.uniform(0, 1.5))
        order = place(load, number + copies, devices)
        assert order.dtype == np.int32 and len(order) == number + copies and set(order) == {*range(number)}
        each = order.reshape(devices, -1)
        assert all(len({*row}) == len(row) for row in each)  # no two of one expert on a device
        found = loads(order, load, devices)
        # Longest-first leaves the fullest device at most 4/3 of the best, which is at least the mean and the heaviest slot; with as many
        # slots on each, the bound is what was seen.
        assert found.max() <= 1.5 * max(found.mean(), (load / np.bincount(order)).max())
        if copies and number % devices == 0:
            gains.append(imbalance(load.reshape(1, devices, -1).sum(2)) / imbalance(found[None]))
    assert min(gains) > 0.99 and np.mean(gains) > 1.2
    np.testing.assert_array_equal(place(np.array([1.0, 9, 1, 1]), 6, 2).reshape(2, 3), [[0, 1, 2], [0, 1, 3]])
    for slots, devices in ((7, 2), (2, 2), (10, 2)):
        with pytest.raises(ValueError, match=f"{slots} slots of 4 experts on {devices} devices"):
            place(np.ones(4), slots, devices)


def test_counts_go_on_past_32_bits_and_belong_to_experts() -> None:
    counts = np.array([[[2**32 - 1, 3, 5]], [[1, 0, 0]]], np.uint32)
    np.testing.assert_array_equal(total(counts), [[2**33 - 1, 3, 5]])
    np.testing.assert_array_equal(by_expert(total(counts), np.array([[1, 0, 1]]), 2), [[3, 2**33 + 4]])
    assert imbalance(np.array([[0, 0], [3, 1], [2, 2]])) == (1.5 + 1) / 2 and imbalance(np.zeros((2, 2))) == 0
    order = np.array([[0, 1, 1, 2]])
    np.testing.assert_array_equal(table(order, 3, 2), [[[1, 0, 0], [2, 1, 2], [1, 3, 0]]])
    np.testing.assert_array_equal(sources(order, np.array([[1, 2, 0, 1]]), 2), [[1, 3, 0, 2]])
    with pytest.raises(ValueError, match="layer 0: expert 1 has 2 slots, not 1 to 1"):
        table(order, 3, 1)


@EIGHT
@pytest.mark.parametrize(("layout", "axes", "quantize"), [("listed", {"ep": 4, "tp": 2}, "int8"), ("stacked", {"ep": 2}, "int4")])
def test_weights_move_to_the_slots_of_their_experts(layout: str, axes: dict[str, int], quantize: str) -> None:
    c = dataclasses.replace(SKEWED, expert_bias=True, num_layers=3, moe_layers=(True, False, True))
    ((mesh, _),) = make_meshes(axes, jax.devices())
    settings = EngineConfig(slots=1, context=32, chunk=16, page_size=8, quantize=quantize, expert_copies=4, layout=layout)
    engine = Engine(c, settings, Target.of("cpu", mesh=mesh, layout=layout))
    engine.load(Given(c).leaves(None))
    before = experts_of(engine)
    counts = np.zeros_like(engine._experts.routing.counts)
    counts[0] = np.random.default_rng(0).integers(0, 1000, counts.shape[1:])
    engine._experts.count(jax.device_put(counts, engine.target.place(())))
    first = engine._experts.order
    engine.rebalance()
    second = engine._experts.order
    assert (first != second).any() and len(before) == 4 * len(first)
    places = np.asarray(engine._experts.routing.places)
    for row, (was, now) in enumerate(zip(first, second, strict=True)):
        for expert in range(c.num_experts):
            number, *at = places[row, expert]
            assert sorted(at[:number]) == np.flatnonzero(now == expert).tolist()
        for (name, old), new in zip(
            list(before.items())[row :: len(first)], list(experts_of(engine).values())[row :: len(first)], strict=True
        ):
            for slot, expert in enumerate(now):
                np.testing.assert_array_equal(new[slot], old[np.argmax(was == expert)], err_msg=name)
    assert not total(engine._experts.routing.counts).any()
    engine.programs.close()


def experts_of(engine: Engine) -> dict[str, np.ndarray]:
    """Name and layer -> an expert's leaf [slots, ...], by names, then by layers."""
    params, found = engine._params, {}
    host = lambda leaf: dequantize(leaf) if hasattr(leaf, "scale") else np.asarray(leaf)
    layers = [*params.listed]
    if params.stacked:
        repeats = range(jax.tree.leaves(params.stacked)[0].shape[0])
        layers = [jax.tree.map(lambda x, i=i: x[i], layer) for i in repeats for layer in params.stacked] + layers
    for name in vars(layers[0]):
        if name.startswith("experts_"):
            found |= {f"{name} {i}": host(leaf) for i, layer in enumerate(layers) if (leaf := getattr(layer, name)) is not None}
    return found


@EIGHT
def test_copies_even_out_devices_and_change_no_token() -> None:
    alone, llm = (model_of(SKEWED, mesh, slots=1, given=Skewed, **more) for mesh, more in (("", {}), ("ep=4", {"expert_copies": 4})))
    prompt, runs = PROMPTS[0], []
    for _ in range(2):
        tokens = llm.generate([prompt], GREEDY)[0].token_ids
        runs.append((tokens, llm.prompt_logits(prompt + tokens), llm.stats()))
        llm.rebalance()
    made = llm.submit(prompt, GREEDY)
    while llm.engine.busy:  # also with a step under way
        llm.engine.step()
        llm.rebalance()

    async def meanwhile() -> list[int]:
        async with AsyncLLM(llm) as serving:
            stream = await serving.submit(prompt, GREEDY)
            await serving.rebalance()
            return (await stream.result()).token_ids

    assert asyncio.run(meanwhile()) == made[0].output
    wanted = alone.prompt_logits(prompt + made[0].output)
    for tokens, logits, _ in runs:
        assert tokens == made[0].output == wanted[len(prompt) - 1 : -1].argmax(1).tolist()
        np.testing.assert_allclose(logits, wanted, atol=1e-5 * np.ptp(wanted), rtol=0)
    assert alone.stats()["expert_imbalance"] == {"experts": 4, "devices": 1}  # one of eight has half of all
    before, after = (stats["expert_imbalance"] for _, _, stats in runs)
    assert before["experts"] == after["experts"] == 4 and before["devices"] > 2 and after["devices"] < 1.25, (before, after)
    assert llm.stats()["compiles_after_warmup"] == 0 and "llminfer_expert_imbalance_devices" in llm.prometheus()
    for one in (alone, llm):
        one.close()


@EIGHT
@pytest.mark.parametrize(("exchange", "axes"), [("", {"ep": 4, "tp": 2}), ("padded", {"ep": 8})])
def test_copies_take_turns(exchange: str, axes: dict[str, int]) -> None:
    """And each token reaches its experts, wherever they are; rows of nobody take no turn."""
    ((mesh, _),) = make_meshes(axes, jax.devices())
    c = dataclasses.replace(from_toml("tiny_moe"), expert_copies=8)
    target = dataclasses.replace(Target.of("cpu", mesh=mesh), exchange=exchange)
    router, gate_up, down = test_moe.weights()
    order = place(np.array([1.0, 2, 3, 4, 5, 6, 7, 80]), 16, axes["ep"])
    told = (table(order[None], 8, axes["ep"])[0], np.arange(16, dtype=np.uint32))
    x, live = np.random.default_rng(0).standard_normal((24, c.hidden_size), np.float32), np.arange(24) % 4 != 1
    w = test_moe.layer(router, Halves(target.ways("expert_mlp"))(gate_up[order]), down[order])
    y, used = jax.jit(lambda x, live, w, told: experts(x, live, w, c, target, told))(x, live, w, told)
    wanted = test_moe.expected(x, live, router, gate_up, down, c)
    np.testing.assert_allclose(y, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)
    chosen = np.argsort(-(x[live] @ router), axis=1)[:, :2]
    used = np.asarray(used)
    np.testing.assert_array_equal(by_expert(used[None], order[None], 8)[0], np.bincount(chosen.ravel(), minlength=8))
    assert all(np.ptp(used[order == expert]) <= 1 for expert in range(8)) and len({*order}) == 8 < len(order)


@EIGHT
@pytest.mark.parametrize(
    ("model", "mesh", "copies", "message"),
    [
        ("window", "tp=2", 2, "expert_copies=2: needs a model with experts, and a mesh that splits them (ep=2 and more); legal: 0"),
        ("moe", "tp=2", 2, "expert_copies=2: needs a model with experts, and a mesh that splits them (ep=2 and more); legal: 0"),
        ("moe", "ep=2", 9, "expert_copies=9: must be at most 8: one of each of 8 experts on every device of ep=2"),
        ("moe", "ep=4", 2, "mesh: ep=4 does not divide num_experts + expert_copies=10; legal: 1, 2, 5, 10"),
        ("moe", "ep=4", -1, "expert_copies=-1: must be an integer from 0 to 65536"),
    ],
)
def test_copies_that_cannot_be_are_refused_in_one_line(model: str, mesh: str, copies: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        model_of(SMALL[model], mesh, expert_copies=copies)
    assert str(caught.value) == message


def test_what_has_no_copies_is_not_rebalanced() -> None:
    c: ModelConfig = SMALL["moe"]
    engine = Engine(c, EngineConfig(slots=1, context=32, chunk=16, page_size=8), Target.of("cpu"))
    with pytest.raises(UserError, match="expert_copies=0: must be at least 1: there is nothing to move"):
        engine.rebalance()
