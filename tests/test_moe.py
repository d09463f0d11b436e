"""Mixture of experts: every token reaches its experts and no other, whatever the imbalance; layers with and without them in a model."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llminfer import LLM, SamplingParams, moe, placement
from llminfer.arrange import Halves, arrangement, on_mesh
from llminfer.config import EngineConfig, ModelConfig, from_toml
from llminfer.errors import UserError
from llminfer.moe import experts, route
from llminfer.params import Layer, layer_specs, param_specs, stacked_specs
from llminfer.quant import QTensor, Stacked, dequantize, maker, quantize_int4, quantize_int8
from llminfer.target import RULES, Target
from llminfer.weights.assemble import leaves_of
from llminfer.weights.hf_config import from_hf
from llminfer.weights.hf_write import to_hf
from pallas_kernels.grouped_matmul import grouped_matmul
from sharding.collectives import collectives
from sharding.mesh import make_meshes

pytestmark = pytest.mark.usefixtures("compiled_fast")

C = from_toml("tiny_moe")
CPU = Target.of("cpu")
EIGHT = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
TWO = pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")


def weights(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    d, e, m = C.hidden_size, C.num_experts, C.moe_intermediate_size
    return tuple(rng.standard_normal(shape, np.float32) * 0.1 for shape in ((d, e), (e, d, 2 * m), (e, m, d)))  # pyright: ignore


def expected(x, live, router, gate_up, down, c: ModelConfig) -> np.ndarray:
    """One token after the other, float64."""
    out = np.zeros(x.shape)
    for t in np.flatnonzero(live):
        scores = np.exp(x[t].astype(np.float64) @ router)
        scores /= scores.sum()
        best = np.argsort(-scores, kind="stable")[: c.experts_per_token]
        share = scores[best] / (scores[best].sum() if c.norm_topk else 1)
        for e, weight in zip(best, share, strict=True):
            gate, up = np.split(x[t].astype(np.float64) @ gate_up[e], 2)
            out[t] += weight * ((gate / (1 + np.exp(-gate)) * up) @ down[e])
    return out


def layer(router: Any, gate_up: Any, down: Any) -> Layer:
    return Layer(qkv=None, o=None, router=router, experts_gate_up=gate_up, experts_down=down)


@functools.cache
def compiled(c: ModelConfig, target: Target) -> Any:
    return jax.jit(lambda x, live, w, shared=None: experts(x, live, w, c, target, None, shared)[0])


def check(c: ModelConfig, target: Target, x, live, router, gate_up, down, *, stacked: bool = False, bound: float = 1e-5) -> None:
    whole = lambda w: Stacked(jnp.stack([jnp.full_like(w, jnp.nan), w]), jnp.int32(1)) if stacked else w
    placed = Halves(target.ways("expert_mlp"))(gate_up)
    y = compiled(c, target)(x, live, layer(router, whole(jnp.asarray(placed)), whole(jnp.asarray(down))))
    wanted = expected(x, live, router, gate_up, down, c)
    np.testing.assert_allclose(y, wanted, atol=bound * max(np.abs(wanted).max(), 1e-3), rtol=0)
    assert not np.asarray(y)[~live].any()


def test_no_token_is_dropped_in_random_and_skewed_batches() -> None:
    router, gate_up, down = weights()
    rng = np.random.default_rng(1)
    for batch in range(30):
        x = rng.standard_normal((24, C.hidden_size), np.float32)
        live = rng.random(24) < rng.choice([0.0, 0.3, 1.0])
        if batch % 3 == 0:  # all tokens want the same experts
            x = x * 0.1 + x[:1]
        x[~live] = np.nan if batch % 2 else 1e9  # rows of nobody
        check(C, CPU, x, live, router, gate_up, down, stacked=batch >= 27)


def test_no_token_is_dropped_in_1000_random_batches() -> None:
    """Against all experts' products of all tokens, weighted, for batches from even to all tokens at the same experts."""
    c = dataclasses.replace(C, hidden_size=16, num_experts=6, experts_per_token=2, moe_intermediate_size=8)
    c = dataclasses.replace(c, router_bias="logits", expert_bias=True)
    rng = np.random.default_rng(7)
    draw = lambda shape: 0.3 * jnp.asarray(rng.standard_normal(shape, np.float32))
    w = layer(draw((16, 6)), draw((6, 16, 16)), draw((6, 8, 16)))
    w = dataclasses.replace(w, experts_gate_up_bias=draw((6, 16)), experts_down_bias=draw((6, 16)))

    def worst(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(key, 4)
        skew = jax.random.choice(keys[0], jnp.asarray([0.0, 2.0, 30.0])) * jax.random.normal(keys[1], (6,))
        x, live = jax.random.normal(keys[2], (24, 16)), jax.random.bernoulli(keys[3], 0.8, (24,))
        own = dataclasses.replace(w, router_bias=skew)
        share, chosen = route(x, w.router, skew, c)
        gate, up = jnp.split(jnp.einsum("td,edm->etm", x, w.experts_gate_up) + w.experts_gate_up_bias[:, None], 2, axis=-1)
        each = jnp.einsum("etm,emd->etd", jax.nn.silu(gate) * up, w.experts_down) + w.experts_down_bias[:, None]
        dense = jnp.einsum("tke,tk,etd->td", jax.nn.one_hot(chosen, 6), share, each)
        error = jnp.abs(experts(x, live, own, c, CPU)[0] - jnp.where(live[:, None], dense, 0)).max()
        return error, jax.nn.one_hot(chosen, 6).sum((0, 1)).max()

    with jax.default_matmul_precision("highest"):
        errors, fullest = jax.jit(lambda keys: jax.lax.map(worst, keys))(jax.random.split(jax.random.key(8), 1000))
    assert errors.shape == (1000,) and np.asarray(errors).max() < 1e-5
    assert np.asarray(fullest).min() < 12 and np.asarray(fullest).max() == 24  # even ones, and all tokens at one expert


def test_weights_that_are_not_divided_by_their_sum() -> None:
    c = dataclasses.replace(C, norm_topk=False, experts_per_token=3)
    x = np.random.default_rng(2).standard_normal((9, C.hidden_size), np.float32)
    check(c, CPU, x, np.ones(9, bool), *weights(2))
    share, _ = route(x, weights(2)[0], None, c)
    assert (np.asarray(share).sum(1) < 0.99).all()


@EIGHT
@pytest.mark.parametrize(("kernels", "axes"), [("reference", {"ep": 2, "tp": 4}), ("interpret", {"ep": 2}), ("reference", {"tp": 2})])
def test_a_mesh_splits_the_experts(kernels: str, axes: dict[str, int]) -> None:
    ((mesh, _),) = make_meshes(axes, jax.devices())
    x, live = np.random.default_rng(3).standard_normal((7, C.hidden_size), np.float32), np.arange(7) != 2
    check(C, dataclasses.replace(CPU, kernels=kernels, chip="v5e", mesh=mesh), x, live, *weights(3), stacked=True)


@EIGHT
@pytest.mark.parametrize(("exchange", "axes"), [("", {"ep": 2, "tp": 2}), ("padded", {"ep": 4, "tp": 2})])
def test_a_mesh_adds_biases_once(exchange: str, axes: dict[str, int]) -> None:
    """And weights inputs where they are, as on one device."""
    ((mesh, _),) = make_meshes(axes, jax.devices())
    rng, (router, gate_up, down) = np.random.default_rng(6), weights(6)
    x, live = rng.standard_normal((16, C.hidden_size), np.float32), np.ones(16, bool)
    biases = [rng.standard_normal((C.num_experts, size), np.float32) for size in (gate_up.shape[2], C.hidden_size)]
    for c in (dataclasses.replace(C, experts_per_token=1), dataclasses.replace(C, experts_per_token=1, scale_inputs=True)):
        target = dataclasses.replace(CPU, mesh=mesh, exchange=exchange)
        placed = Halves(target.ways("expert_mlp"))
        made = [
            dataclasses.replace(layer(router, put(jnp.asarray(gate_up)), jnp.asarray(down)), **extra)
            for put in (lambda w: w, placed)
            for extra in [dict(experts_gate_up_bias=put(jnp.asarray(biases[0])), experts_down_bias=jnp.asarray(biases[1]))]
        ]
        want, found = (np.asarray(compiled(c, t)(x, live, w)) for t, w in zip((CPU, target), made, strict=True))
        np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max(), rtol=0)


@EIGHT
@pytest.mark.parametrize(("each", "axes"), [(1, {"ep": 4, "tp": 2}), (2, {"ep": 8})])
def test_tokens_are_sent_to_their_experts(each: int, axes: dict[str, int]) -> None:
    """And none is dropped: also where all want the experts of one device."""
    ((mesh, _),) = make_meshes(axes, jax.devices())
    c, target = dataclasses.replace(C, experts_per_token=each), dataclasses.replace(CPU, mesh=mesh, exchange="padded")
    for batch in range(4):
        x, live = np.random.default_rng(batch).standard_normal((16, C.hidden_size), np.float32), np.arange(16) % 5 != 2
        x = x * 0.1 + x[:1] if batch % 2 else x
        x[~live] = np.nan
        check(c, target, x, live, *weights(batch), stacked=batch == 3)
    program = compiled(c, target).lower(x, live, layer(*weights())).compile()
    assert {each.kind for each in collectives(program.as_text())} >= {"all-to-all"}


@EIGHT
@pytest.mark.parametrize("quantize", [None, quantize_int8])
@pytest.mark.parametrize(
    ("axes", "exchange", "split", "kinds"),
    [
        ({"ep": 4, "tp": 2}, "", ("ep", "tp"), {"all-reduce": 1}),
        ({"ep": 4, "tp": 2}, "", ("tp",), {"all-reduce": 1}),
        ({"ep": 4}, "", (), {"all-reduce": 1}),
        ({"ep": 2, "sp": 2, "tp": 2}, "", ("sp", "tp"), {"all-reduce": 1}),
        ({"ep": 4, "tp": 2}, "padded", ("tp",), {"all-to-all": 3, "all-reduce": 1, "all-gather": 1}),
        ({"ep": 4, "tp": 2}, "padded", ("ep", "tp"), {"all-reduce": 1}),
    ],
    ids=str,
)
def test_what_all_tokens_share_joins_the_sum(axes: dict, exchange: str, split: tuple, kinds: dict, quantize: Any) -> None:
    """Whatever splits its matrix, mlp, is what splits the experts, less, or more. Tokens are not sent where there is a sum anyway."""
    ((mesh, _),) = make_meshes(axes, jax.devices())
    c = dataclasses.replace(C, experts_per_token=1, shared_intermediate_size=64)
    target = dataclasses.replace(CPU, mesh=mesh, exchange=exchange, rules=dataclasses.replace(RULES, mlp=split))
    rng, (router, gate_up, down) = np.random.default_rng(8), weights(8)
    x, hidden, matrix = (rng.standard_normal(shape, np.float32) for shape in ((16, 128), (16, 64), (64, 128)))
    hidden = np.round(hidden * 8)
    hidden[:, ::8] = 127  # so that rounding to int8, of each device's part, leaves it as it is
    made = jnp.asarray(matrix) if quantize is None else quantize(jnp.asarray(matrix), ("mlp", "embed"))
    put = Halves(target.ways("expert_mlp"))
    w = dataclasses.replace(layer(router, put(jnp.asarray(gate_up)), jnp.asarray(down)), shared_down=made)
    program = compiled(c, target).lower(x, np.ones(16, bool), w, hidden).compile()
    assert Counter(each.kind for each in collectives(program.as_text())) == kinds
    wanted = expected(x, np.ones(16, bool), router, gate_up, down, c)
    wanted += hidden.astype(np.float64) @ (matrix if quantize is None else dequantize(made))
    np.testing.assert_allclose(program(x, np.ones(16, bool), w, hidden), wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4])
@pytest.mark.parametrize("kernels", ["reference", "interpret"])
def test_quantized_experts(quantize: Any, kernels: str) -> None:
    router, *matrices = weights(4)
    x = np.random.default_rng(5).standard_normal((11, C.hidden_size), np.float32)
    made = [quantize(jnp.asarray(w)) for w in matrices]
    y = compiled(C, dataclasses.replace(CPU, kernels=kernels, chip="v6e"))(x, np.ones(11, bool), layer(router, *made))
    wanted = expected(x, np.ones(11, bool), router, *(dequantize(w) for w in made), C)
    np.testing.assert_allclose(y, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize("kind", ["int4", "mxfp4"])
def test_a_gpu_has_its_4_bit_experts_turned(kind: str) -> None:
    """By the kernel in bfloat16, by the reference in float32."""
    target, rng = dataclasses.replace(Target.of("gpu"), kernels="triton-interpret"), np.random.default_rng(5)
    c = dataclasses.replace(C, hidden_size=256, moe_intermediate_size=256, num_experts=3)
    router, *matrices = (rng.standard_normal(shape, np.float32) * 0.1 for shape in ((256, 3), (3, 256, 512), (3, 256, 256)))
    made = [maker(kind, ("experts", "embed", "expert_mlp"), 1, target)(jnp.asarray(w)) for w in matrices]
    assert all(m.turned and m.q.shape == (3, w.shape[2], 128) for m, w in zip(made, matrices, strict=True))
    for dtype, bound in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):
        x = jnp.asarray(rng.standard_normal((5, 256)), dtype)
        wanted = expected(np.asarray(x, np.float32), np.ones(5, bool), router, *(dequantize(m) for m in made), c)
        y = compiled(c, target)(x, np.ones(5, bool), layer(router, *made))
        np.testing.assert_allclose(np.asarray(y, np.float32), wanted, atol=bound * np.abs(wanted).max(), rtol=0)


@EIGHT
@pytest.mark.parametrize(("kind", "axes"), [(None, {}), ("mxfp4", {}), ("mxfp4", {"tp": 2}), ("int8", {"ep": 2, "tp": 2})], ids=str)
def test_experts_of_odd_widths_on_a_tpu(kind: str | None, axes: dict[str, int]) -> None:
    """Placed with zeros that fill registers, their width cut by a mesh or not, they give what the reference makes of those of a checkpoint;
    which they give back."""
    hidden = 192 if kind == "mxfp4" else 160  # of 4 bits a kernel takes rows by 64
    c = dataclasses.replace(C, hidden_size=hidden, moe_intermediate_size=160, num_layers=1, activation="clamped", expert_bias=True)
    rng, specs = np.random.default_rng(11), param_specs(c)
    found = {name: rng.standard_normal(spec.shape, np.float32) for name, spec in leaves_of(specs)}
    mesh = make_meshes(axes, jax.devices())[0][0] if axes else None
    settings, tpu = EngineConfig(quantize=kind), dataclasses.replace(CPU, kernels="interpret", chip="v6e", mesh=mesh)
    tpu = placement.fitted(c, settings, tpu)
    placed, plain = (placement.load_params(found.items(), c, settings, t).listed[0] for t in (tpu, CPU))
    wide = on_mesh(c, tpu).moe_intermediate_size
    assert wide == 256 and wide % (128 * tpu.ways("expert_mlp")) == 0 and on_mesh(c, CPU) == c
    assert placed.experts_gate_up_bias.shape == (8, 2 * wide)
    for name, spec in leaves_of(specs):
        arrange = arrangement(name, spec, c, tpu)
        if "experts_" in name and arrange is not None:
            leaf = vars(placed)[name.rpartition(".")[2]]
            np.testing.assert_array_equal(arrange.inverse(np.asarray(arrange(jnp.asarray(found[name])))), found[name])
            if not isinstance(leaf, QTensor):
                np.testing.assert_array_equal(arrange.inverse(np.asarray(leaf)), found[name])
    x = rng.standard_normal((9, hidden), np.float32)
    with mock.patch.object(moe, "grouped_matmul", side_effect=grouped_matmul) as called:
        y, wanted = (compiled(config, t)(x, np.ones(9, bool), w) for config, t, w in ((on_mesh(c, tpu), tpu, placed), (c, CPU, plain)))
    assert [each.kwargs["impl"] for each in called.call_args_list[:2]] == ["interpret"] * 2
    np.testing.assert_allclose(y, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)


@TWO
def test_tokens_depend_neither_on_neighbours_nor_on_layout_nor_on_the_mesh() -> None:
    """A padding row, another sequence, a chunk: none changes which experts a token reaches."""
    prompts = [[(7 * i + j * j) % 500 + 3 for j in range(length)] for i, length in enumerate((1, 17, 40))]
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    found = []
    for settings in ({"slots": 1}, {"slots": 4, "layout": "stacked", "mesh": "tp=2"}):
        served = LLM("config:tiny_moe", context=64, chunk=16, dtype="float32", decode_steps=4, **settings)
        found.append([output.token_ids for output in served.generate(prompts, params)])
        assert served.stats()["compiles_after_warmup"] == 0
        served.close()
    assert found[0] == found[1]


def test_layers_follow_the_pattern() -> None:
    c = dataclasses.replace(C, moe_layers=(False, True), windows=(8, 0, 0), rope_layers=(0,), num_layers=13)
    assert c.period == 6 and [c.has_experts(i) for i in range(4)] == [False, True, False, True]
    listed, stacked = param_specs(c).listed, stacked_specs(c)
    assert [layer.router is None for layer in listed] == [i % 2 == 0 for i in range(13)]
    assert [layer.gate_up is None for layer in stacked.stacked] == [i % 2 == 1 for i in range(6)] and len(stacked.listed) == 1
    specs = layer_specs(dataclasses.replace(c, shared_intermediate_size=64, shared_gate=True), 1)
    assert specs.shared_gate_up.shape == (128, 128) and specs.shared_router.shape == (128,) and specs.gate_up is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts_per_token": 9}, "experts_per_token=9: must be an integer from 1 to 8"),
        ({"num_experts": 0}, "experts_per_token=2: must be 0 without num_experts"),
        ({"activation": "gelu"}, "activation='gelu': experts must be gated, by silu, gelu_tanh or clamped"),
        ({"activation": "clamped", "moe_layers": (True, False)}, "activation='clamped': is of experts alone: no layer may have an mlp"),
        ({"router_bias": "after"}, "router_bias='after': legal: , logits"),
        ({"router": "top"}, "router='top': legal: softmax, sigmoid"),
        ({"router_groups": 3}, "router_groups=3: must cut num_experts=8 into equal groups"),
        ({"router_groups": 4, "experts_per_token": 3}, "experts_per_token=3: must be at most the 2 experts of router_groups_used"),
        ({"kv_rank": 32}, "rope_head_dim=0: must be an integer from 1 to 31"),
        ({"dense_layers": 4}, "dense_layers=4: must be an integer from 0 to 3"),
        ({"moe_layers": ()}, "moe_layers="),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        dataclasses.replace(C, **fields)


def test_a_mesh_that_does_not_divide_the_experts_is_refused() -> None:
    with pytest.raises(UserError, match="ep=3 does not divide num_experts=8; legal: 1, 2, 4, 8"):
        if len(jax.devices()) < 3:
            raise UserError("ep=3 does not divide num_experts=8; legal: 1, 2, 4, 8: too few devices to ask")
        LLM("config:tiny_moe", mesh="ep=3", context=32)


def test_configs_are_written_and_read_back() -> None:
    """Published configs, as Hugging Face spells them, and back."""
    for name, architecture in (("qwen3_30b_a3b", "Qwen3MoeForCausalLM"), ("mixtral_8x7b", "MixtralForCausalLM")):
        data = to_hf(from_toml(name), "bfloat16")
        assert data["architectures"] == [architecture] and from_hf(data, name) == from_toml(name)
    data = to_hf(from_toml("gpt_oss_20b"), "bfloat16")
    assert from_hf(data | {"eos_token_id": [200002, 199999, 200012]}, "gpt_oss_20b") == from_toml("gpt_oss_20b")
    scout = from_toml("llama4_scout")
    assert from_hf(to_hf(scout, "bfloat16"), scout.name) == scout
    # As published: the text model inside another, with the name of its chunks.
    text = {"attention_chunk_size": 8192, "attn_scale": 0.1, "attn_temperature_tuning": 4, "floor_scale": 8192, "hidden_size": 5120}
    text |= {"intermediate_size": 8192, "intermediate_size_mlp": 16384, "interleave_moe_layer_step": 1, "max_position_embeddings": 10485760}
    text |= {"num_attention_heads": 40, "num_hidden_layers": 48, "no_rope_layers": [], "vocab_size": 202048, "rope_theta": 500000.0}
    text |= {
        "rope_scaling": {"factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0, "rope_type": "llama3"},
        "bos_token_id": 200000,
    }
    text["rope_scaling"] |= {"original_max_position_embeddings": 8192}
    text |= {"eos_token_id": [200001, 200007, 200008], "moe_layers": list(range(48)), "use_qk_norm": True}
    whole = {"architectures": ["Llama4ForConditionalGeneration"], "text_config": text, "vision_config": {"hidden_size": 1408}}
    assert from_hf(whole, scout.name) == scout
    mixed = dataclasses.replace(C, moe_layers=(False, True), shared_intermediate_size=64, shared_gate=True, norm_topk=False, qkv_bias=True)
    data = to_hf(mixed, "float32")
    assert data["architectures"] == ["Qwen2MoeForCausalLM"] and data["mlp_only_layers"] == [0, 2]
    assert from_hf(data | {"mlp_only_layers": [], "decoder_sparse_step": 2}, mixed.name) == mixed
