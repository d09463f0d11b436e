"""The maps between stored tensors, parts and leaves: exact both ways for every family, and honest about what does not fit."""

from __future__ import annotations

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from llminfer.config import ModelConfig, Rope
from llminfer.errors import UserError
from llminfer.params import is_spec, param_specs, stack
from llminfer.weights import hf_names
from llminfer.weights.assemble import check, leaf_shapes, leaves_of, params_of, part_shapes, parts_of, read_leaves, split

# Sizes that are no multiple of a tile of the transposed copy, and one that is larger.
SIZES = dict(vocab_size=20, hidden_size=150, intermediate_size=30, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, max_position=11)
PLAIN = ModelConfig("plain", **SIZES)
LAYER_NORM = dict(norm="layer", norm_bias=True)
MODELS = {
    "LlamaForCausalLM": PLAIN,
    "Qwen3ForCausalLM": ModelConfig("m", **SIZES, qk_norm="head", tie_embeddings=True),
    "InternLMForCausalLM": ModelConfig("m", **SIZES, qkv_bias=True, o_bias=True),
    "Gemma3ForCausalLM": ModelConfig("m", **SIZES, post_norm=True, qk_norm="head", norm_offset=1.0, tie_embeddings=True),
    "Olmo2ForCausalLM": ModelConfig("m", **SIZES, pre_norm=False, post_norm=True, qk_norm="full"),
    "CohereForCausalLM": ModelConfig("m", **SIZES, norm="layer", parallel=True, shared_norm=True, qk_norm="heads", tie_embeddings=True),
    "StableLmForCausalLM": ModelConfig("m", **SIZES, **LAYER_NORM, qkv_bias=True, qk_norm="heads"),
    "Phi3ForCausalLM": dataclasses.replace(PLAIN, num_kv_heads=1),
    "Starcoder2ForCausalLM": ModelConfig("m", **SIZES, **LAYER_NORM, gated=False, qkv_bias=True, o_bias=True, mlp_bias=True),
    "GPT2LMHeadModel": ModelConfig(
        "m",
        **(SIZES | {"num_kv_heads": 4}),
        **LAYER_NORM,
        **dict(gated=False, qkv_bias=True, o_bias=True, mlp_bias=True, learned_positions=True, rope_layers=(-1,), tie_embeddings=True),
    ),
    "GPTNeoXForCausalLM": ModelConfig(
        "m", **(SIZES | {"num_kv_heads": 4}), **LAYER_NORM, parallel=True, gated=False, qkv_bias=True, o_bias=True, mlp_bias=True
    ),
    "InternLM2ForCausalLM": dataclasses.replace(PLAIN, windows=(4, 0), ropes=(Rope(), Rope(theta=7.0)), rope_layers=(0, 1)),
    "ExaoneForCausalLM": PLAIN,
}


class Memory:
    """Stored tensors in memory, read-only, counting reads."""

    def __init__(self, tensors):
        self.tensors, self.reads = tensors, 0

    def shapes(self):
        return {name: array.shape for name, array in self.tensors.items()}

    def require_float(self, name):
        assert self.tensors[name].dtype.kind in "fV"

    def read(self, name):
        self.reads += 1
        array = self.tensors[name].view()
        array.flags.writeable = False
        return array


def random_stored(architecture: str, c: ModelConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {name: rng.standard_normal(t.shape, np.float32) for name, t in hf_names.stored_tensors(architecture, c).items()}


def source_of(stored, architecture, c):
    return hf_names.HfSource(Memory(stored), architecture, c)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("architecture", MODELS)
def test_round_trip(architecture, dtype):
    c = MODELS[architecture]
    stored = {name: array.astype(dtype) for name, array in random_stored(architecture, c).items()}
    source = source_of(stored, architecture, c)
    check(source, c, "memory")
    leaves = dict(read_leaves(source, c))
    assert {name: leaf.shape for name, leaf in leaves.items()} == leaf_shapes(c)
    assert all(leaf.dtype == dtype and leaf.flags.c_contiguous for leaf in leaves.values())
    params = params_of(leaves, c)
    specs = jax.tree.leaves(param_specs(c), is_leaf=is_spec)
    assert [leaf.shape for leaf in jax.tree.leaves(params)] == [spec.shape for spec in specs]
    assert sum(leaf.size for leaf in leaves.values()) == c.num_params
    for tree in (params, stack(params, c)):
        back = dict(hf_names.stored_from(parts_of(leaves_of(tree), c), architecture, c))
        assert back.keys() == stored.keys()
        for name, array in stored.items():
            np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_fused_layout():
    c = PLAIN
    stored = random_stored("LlamaForCausalLM", c)
    layer = params_of(dict(read_leaves(source_of(stored, "LlamaForCausalLM", c), c)), c).listed[1]
    d, g, h = c.hidden_size, 2, c.head_dim
    x = np.random.default_rng(5).standard_normal((3, d), np.float32)
    qkv = (x @ layer.qkv).reshape(3, c.num_kv_heads, g + 2, h)
    name = "model.layers.1.self_attn.{}_proj.weight".format
    q, k, v = ((x @ stored[name(part)].T).reshape(3, -1, h) for part in "qkv")
    for kv_head in range(c.num_kv_heads):
        np.testing.assert_allclose(qkv[:, kv_head, :g], q[:, kv_head * g : (kv_head + 1) * g], atol=1e-4)
        np.testing.assert_allclose(qkv[:, kv_head, g], k[:, kv_head], atol=1e-4)
        np.testing.assert_allclose(qkv[:, kv_head, g + 1], v[:, kv_head], atol=1e-4)
    np.testing.assert_allclose(q.reshape(3, -1) @ layer.o, q.reshape(3, -1) @ stored[name("o")].T, atol=1e-4)
    np.testing.assert_array_equal(layer.gate_up[:, : c.intermediate_size], stored["model.layers.1.mlp.gate_proj.weight"].T)
    np.testing.assert_array_equal(layer.gate_up[:, c.intermediate_size :], stored["model.layers.1.mlp.up_proj.weight"].T)


def test_names_of_fused_and_turned_tensors():
    """What is joined how, checked by hand on the names that transformers uses."""
    c, h = MODELS["GPTNeoXForCausalLM"], 6
    stored = random_stored("GPTNeoXForCausalLM", c)
    source = source_of(stored, "GPTNeoXForCausalLM", c)
    by_head = stored["gpt_neox.layers.2.attention.query_key_value.weight"].reshape(4, 3, h, 150)
    for at, part in enumerate("qkv"):
        np.testing.assert_array_equal(source.read(f"layers.2.{part}").reshape(4, h, 150), by_head[:, at])
    c = MODELS["GPT2LMHeadModel"]
    stored = random_stored("GPT2LMHeadModel", c)
    bare = {name.removeprefix("transformer."): array for name, array in stored.items()} | {"h.0.attn.bias": np.zeros((1, 1, 11, 11), bool)}
    source = source_of(bare, "GPT2LMHeadModel", c)  # the prefix may be missing, and masks are no weights
    check(source, c, "bare")
    np.testing.assert_array_equal(source.read("layers.1.k"), stored["transformer.h.1.attn.c_attn.weight"][:, 24:48].T)
    np.testing.assert_array_equal(source.read("layers.1.k_bias"), stored["transformer.h.1.attn.c_attn.bias"][24:48])
    c = MODELS["CohereForCausalLM"]
    stored = random_stored("CohereForCausalLM", c)
    source = source_of(stored, "CohereForCausalLM", c)
    rows = [0, 2, 4, 1, 3, 5]  # of a head of 6: the first of each pair, then the second
    np.testing.assert_array_equal(source.read("layers.0.q")[:6], stored["model.layers.0.self_attn.q_proj.weight"][rows])
    np.testing.assert_array_equal(source.read("layers.0.k_norm")[1], stored["model.layers.0.self_attn.k_norm.weight"][1, rows])
    np.testing.assert_array_equal(source.read("layers.0.v"), stored["model.layers.0.self_attn.v_proj.weight"])


@pytest.mark.parametrize("spelling", ["model.language_model.{}", "language_model.model.{}"])
def test_the_text_model_of_a_multimodal_checkpoint(spelling):
    c = MODELS["Gemma3ForCausalLM"]
    stored = random_stored("Gemma3ForCausalLM", c)
    inside = {spelling.format(name.removeprefix("model.")): array for name, array in stored.items()}
    inside |= {"vision_tower.x.weight": np.zeros(3), "model.multi_modal_projector.y": np.zeros(3)}
    inside["lm_head.weight"] = stored["model.embed_tokens.weight"]
    source = source_of(inside, "Gemma3ForConditionalGeneration", c)
    check(source, c, "inside")
    np.testing.assert_array_equal(source.read("layers.2.mlp_norm"), stored["model.layers.2.pre_feedforward_layernorm.weight"])


def test_mixed_and_half_precision_become_float32():
    c = dataclasses.replace(PLAIN, num_layers=1)
    stored = {name: array.astype(ml_dtypes.bfloat16) for name, array in random_stored("LlamaForCausalLM", c).items()}
    for changed, dtype in (("self_attn.k", np.float32), ("mlp.down", np.float16), ("mlp.gate", ml_dtypes.float8_e4m3fn)):
        name = f"model.layers.0.{changed}_proj.weight"
        stored[name] = stored[name].astype(dtype)
    leaves = dict(read_leaves(source_of(stored, "LlamaForCausalLM", c), c))
    wide = {name.rpartition(".")[2] for name, leaf in leaves.items() if leaf.dtype == np.float32}
    assert wide == {"qkv", "down"} and {leaf.dtype for leaf in leaves.values()} == {np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)}
    back = dict(hf_names.stored_from(parts_of(leaves.items(), c), "LlamaForCausalLM", c))
    for name, array in back.items():
        np.testing.assert_array_equal(array.astype(np.float32), stored[name].astype(np.float32), err_msg=name)


def test_differences_are_named_before_any_read():
    c = PLAIN
    stored = random_stored("LlamaForCausalLM", c)
    del stored["model.norm.weight"]
    stored["model.layers.0.mlp.up_proj.weight"] = stored["model.layers.0.mlp.up_proj.weight"].T
    stored["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    source = source_of(stored, "LlamaForCausalLM", c)
    with pytest.raises(UserError) as error:
        check(source, c, "here")
    assert str(error.value) == (
        "here: tensors do not fit the config: model.layers.0.mlp.up_proj.weight (layers.0.up) is [150, 30], expected [30, 150]; "
        "model.norm.weight [150] (final_norm) is missing; 'model.layers.0.self_attn.q_proj.bias' [32] is not expected"
    )
    assert source._tensors.reads == 0


def test_a_missing_head_of_a_norm_is_named():
    c = MODELS["StableLmForCausalLM"]
    stored = random_stored("StableLmForCausalLM", c)
    del stored["model.layers.1.self_attn.q_layernorm.norms.3.weight"]
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_layernorm\.norms\.0\.weight \[4, 6\] \(layers\.1\.q_norm\) is missing"):
        check(source_of(stored, "StableLmForCausalLM", c), c, "here")


def test_only_ten_differences_are_shown():
    deep = dataclasses.replace(PLAIN, num_layers=1000)
    with pytest.raises(UserError) as error:
        check(source_of({}, "LlamaForCausalLM", deep), deep, "here")
    assert str(error.value).count(";") == 10 and str(error.value).endswith("; and 8993 more")


def test_what_may_be_left_over():
    c = dataclasses.replace(PLAIN, tie_embeddings=True)
    stored = random_stored("LlamaForCausalLM", c)
    extra = {"lm_head.weight": np.zeros((20, 150)), "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4)}
    check(source_of(stored | extra, "LlamaForCausalLM", c), c, "here")
    with pytest.raises(UserError, match=r"lm_head\.weight .* is missing"):
        check(source_of(stored, "LlamaForCausalLM", PLAIN), PLAIN, "here")


def test_parts_of_a_leaf_are_the_parts_of_the_model():
    for c in MODELS.values():
        found = [part for name, shape in leaf_shapes(c).items() for part in parts_of([(name, np.zeros(shape, np.int8))], c)]
        assert {name: array.shape for name, array in found} == part_shapes(c)
    assert list(split("gate_up", np.zeros((4, 6)), PLAIN)) == ["gate", "up"]


def test_progress_counts_to_its_total():
    class Recorder:
        def __init__(self):
            self.events = []

        def task(self, description, total):
            self.events.append((description, total))
            return self

        def advance(self, n):
            self.events.append(n)

        def done(self):
            self.events.append("done")

    recorder = Recorder()
    leaves = list(read_leaves(source_of(random_stored("LlamaForCausalLM", PLAIN), "LlamaForCausalLM", PLAIN), PLAIN, recorder))
    assert recorder.events == [("Reading weights", len(leaves)), *[1] * len(leaves), "done"]
