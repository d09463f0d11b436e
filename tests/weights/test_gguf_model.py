"""GGUF metadata and tensors of every architecture: the ModelConfig and the parts are what was put in, and nothing is ignored."""

from __future__ import annotations

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf_models import MODELS, model
from gguf_writer import BF16, F16, Q8_0, Stored, f32, gguf_bytes, metadata_of, random_parts, stored_of, tensors_of, tiny

from llminfer.config import ModelConfig, Rope
from llminfer.errors import UserError
from llminfer.weights import open_model
from llminfer.weights.assemble import check
from llminfer.weights.gguf import GgufFile
from llminfer.weights.gguf_model import FAMILIES, HARMLESS, GgufSource, llama3_factors, read_config


def opened(path: Path, metadata: dict, tensors: dict[str, Stored]) -> tuple[ModelConfig, GgufSource]:
    path.write_bytes(gguf_bytes(metadata, tensors))
    file = GgufFile(path)
    config = read_config(file)
    return config, GgufSource(file, config)


def tensors_for(name: str) -> dict[str, Stored]:
    architecture, config, _ = model(name)
    tensors = tensors_of(config, random_parts(config), architecture)
    rope = config.ropes[0] if config.ropes else Rope()
    if rope.kind == "longrope":
        tensors["rope_factors_long.weight"] = f32(np.array(rope.long_factors))
        tensors["rope_factors_short.weight"] = f32(np.array(rope.short_factors))
    return tensors


@pytest.mark.parametrize("name", MODELS)
def test_config_and_parts_are_what_was_put_in(tmp_path, name):
    _, expected, metadata = model(name)
    config, source = opened(tmp_path / "m.gguf", metadata, tensors_for(name))
    assert config == expected
    check(source, config, "m.gguf")
    parts = random_parts(expected)
    assert source.shapes() == {part: array.shape for part, array in parts.items()}
    for part, array in parts.items():
        if expected.norm_offset and part.endswith("norm"):
            array = array + np.float32(1) - np.float32(1)
        np.testing.assert_array_equal(source.read(part), array, err_msg=part)


@pytest.mark.parametrize("name", MODELS)
def test_names_are_those_of_the_gguf_package(name):
    oracle = pytest.importorskip("gguf")
    architecture, _, metadata = model(name)
    number = {text: key for key, text in oracle.MODEL_ARCH_NAMES.items()}[architecture]
    known = {oracle.TENSOR_NAMES[tensor] for tensor in oracle.MODEL_TENSORS[number]}
    stems = {re.sub(r"blk\.\d+", "blk.{bid}", tensor).rpartition(".")[0] for tensor in tensors_for(name)}
    assert stems <= known | {"rope_factors_long", "rope_factors_short"}
    groups = [vars(group) for group in vars(oracle.Keys).values() if isinstance(group, type)]
    keys = {text for group in groups for text in group.values() if isinstance(text, str)}
    assert {key.replace(f"{architecture}.", "{arch}.", 1) for key in metadata if ".mm." not in key} <= keys


def test_every_architecture_is_tested():
    assert {name.partition(":")[0] for name in MODELS} == FAMILIES.keys()
    asked = {"llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "granite", "gpt2"}
    assert asked <= FAMILIES.keys()


@pytest.mark.parametrize("name", MODELS)
def test_a_missing_and_a_strange_tensor_are_named_as_in_the_file(tmp_path, name):
    _, _, metadata = model(name)
    tensors = tensors_for(name)
    # Layer 1: what layer 0 has decides what the model is.
    for missing in [tensor for tensor in tensors if tensor.startswith(("blk.1.", "output_norm", "position_embd"))]:
        config, source = opened(
            tmp_path / "m.gguf", metadata, {key: item for key, item in tensors.items() if key != missing} | {"odd": f32(np.ones(3))}
        )
        with pytest.raises(UserError) as error:
            check(source, config, "m.gguf")
        line = str(error.value)
        assert re.search(rf"\b{re.escape(missing)} \[[^;]* is missing", line) and "'odd' [3] is not expected" in line


def test_a_misshapen_tensor_is_named_as_in_the_file(tmp_path):
    _, _, metadata = model("phi3")
    tensors = tensors_for("phi3")
    for name, rows, part in (("blk.0.attn_qkv.weight", 70, "layers.0.v"), ("blk.1.ffn_up.weight", 200, "layers.1.up")):
        wrong = tensors | {name: f32(np.ones((rows, 32)))}
        config, source = opened(tmp_path / "m.gguf", metadata, wrong)
        with pytest.raises(UserError, match=re.escape(f"{name} ({part}) is")):
            check(source, config, "m.gguf")


@pytest.mark.parametrize(
    "second", ["blk.0.attn_qkv.weight", "blk.0.attn_post_norm.weight", "blk.0.attn_q_norm.bias", "blk.00.attn_q.weight"]
)
def test_a_second_tensor_of_a_part_or_an_unknown_one_is_not_expected(tmp_path, second):
    _, config, metadata = model("llama")
    config, source = opened(tmp_path / "m.gguf", metadata, tensors_for("llama") | {second: f32(np.ones((64, 32)))})
    with pytest.raises(UserError, match=re.escape(f"'{second}' [64, 32] is not expected")):
        check(source, config, "m.gguf")


def test_rows_of_quantized_and_half_precision_tensors_are_moved_whole(tmp_path):
    config = tiny(num_layers=1)
    tensors = tensors_of(config, random_parts(config))
    rng = np.random.default_rng(1)
    q, k = "blk.0.attn_q.weight", "blk.0.attn_k.weight"
    tensors[q] = (32, 32), Q8_0, b"".join(np.float16(1).tobytes() + rng.bytes(32) for _ in range(32))
    tensors[k] = (16, 32), BF16, rng.standard_normal((16, 32), np.float32).astype(ml_dtypes.bfloat16).tobytes()
    tensors["token_embd.weight"] = (64, 32), F16, rng.standard_normal((64, 32)).astype("<f2").tobytes()
    _, source = opened(tmp_path / "m.gguf", metadata_of(config), tensors)
    file = GgufFile(tmp_path / "m.gguf")
    for part, name, heads in (("layers.0.q", q, 4), ("layers.0.k", k, 2)):
        stored, read = file.read(name).reshape(heads, 4, 2, 32), source.read(part).reshape(heads, 2, 4, 32)
        np.testing.assert_array_equal(read[:, 0], stored[:, :, 0])
        np.testing.assert_array_equal(read[:, 1], stored[:, :, 1])
    assert source.read("layers.0.k").dtype == "bfloat16" and source.read("embed").dtype == "float16"


@pytest.mark.parametrize("version", [2, 3])
def test_end_tokens_and_tied_heads(tmp_path, version):
    for tied in (True, False):
        config = tiny(tie_embeddings=tied, bos_id=1, eos_ids=(2, 5))
        ids = {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.bos_token_id": 1}
        (tmp_path / "m.gguf").write_bytes(gguf_bytes(metadata_of(config) | ids, tensors_of(config, random_parts(config)), version))
        checkpoint = open_model(str(tmp_path / "m.gguf"), str(tmp_path / "cache"))
        assert checkpoint.config == config and checkpoint.metadata == metadata_of(config) | ids
        assert checkpoint.tokenizer() is None  # token ids work without


def test_a_turn_ends_at_its_control_token_whether_or_not_the_file_says_so(tmp_path):
    config = tiny(eos_ids=(2, 7))
    tokens = [f"t{i}" for i in range(64)]
    tokens[7] = tokens[9] = "<|end|>"
    words = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * 7 + [3] + [1] * 56, "tokenizer.ggml.eos_token_id": 2}
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(metadata_of(config) | words, tensors_of(config, random_parts(config))))
    assert open_model(str(tmp_path / "m.gguf"), str(tmp_path / "cache")).config.eos_ids == (2, 7)


REFUSED = [
    ("llama", {"expert_count": 8}, "llama.expert_count'=8: not supported; legal for this architecture: "),
    ("llama", {"rope.dimension_count": 3}, "rope.dimension_count=3: must be even"),
    ("llama", {"rope.dimension_count": 10}, "rope.dimension_count=10: must be an integer from 2 to 8"),
    ("llama", {"attention.value_length": 16}, "attention.value_length=16"),
    ("llama", {"attention.head_count_kv": [2, 4]}, "the same for all layers"),
    ("llama", {"attention.head_count": 0}, "num_heads=0"),
    ("llama", {"attention.head_count_kv": 0}, "num_kv_heads=0"),
    ("gpt2", {"attention.head_count": 64}, "head_dim=0"),
    ("llama", {"block_count": 4_000_000_000}, "num_layers=4000000000"),
    ("llama", {"rope.freq_base": float("nan")}, "rope_theta=nan"),
    ("llama", {"rope.scaling.type": "dynamic"}, "'dynamic', factor 1: not supported; legal: none, linear or yarn"),
    ("llama", {"rope.scaling.type": "longrope"}, "'longrope', factor 1, attn_factor 1 and no tensor of factors: not supported"),
    ("llama", {"rope.scaling.factor": float("nan")}, "factor nan"),
    ("llama", {"rope.scaling.attn_factor": 2.0}, "attn_factor 2"),
    ("qwen2", {"rope.scaling.yarn_log_multiplier": 0.1}, "qwen2.rope.scaling.yarn_log_multiplier'=0.10"),
    ("qwen2", {"rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor: not supported; legal: 1"),
    ("qwen2", {"attention.sliding_window": 8}, "qwen2.attention.sliding_window'=8: not supported"),
    ("granite", {"rope.scaling.finetuned": False}, "rope.scaling.finetuned=False"),
    ("gemma3", {"attention.sliding_window_pattern": [True, False]}, "true or false for each of 8 layers"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "gemma3.attn_logit_softcapping'=50.0: not supported"),
    ("command-r", {"logit_scale": -1.0}, "logit_scale=-1.0"),
    ("gpt2", {"attention.max_alibi_bias": 8.0}, "gpt2.attention.max_alibi_bias'=8.0"),
    ("llama", {"block_count": 3}, "blk.2.attn_norm.weight [32] (layers.2.attn_norm) is missing"),
    ("llama", {"feed_forward_length": 64}, "blk.0.ffn_gate.weight (layers.0.gate) is [96, 32], expected [64, 32]"),
    ("llama", {"tokenizer.ggml.eos_token_id": 64}, "must be from 0 to vocab_size-1=63"),
    ("llama", {"tokenizer.ggml.tokens": ["a"] * 63}, "token_embd.weight (embed) is [64, 32], expected [63, 32]"),
    ("llama", {"general.architecture": "mamba"}, f"architecture 'mamba' is not supported; legal: {', '.join(FAMILIES)}"),
    ("llama", {"general.architecture": 3}, "architecture 3 is not supported"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=[f"{name}-{next(iter(change))}" for name, change, _ in REFUSED])
def test_metadata_that_cannot_be_honoured(tmp_path, name, change, message):
    architecture, _, metadata = model(name)
    change = {key if key.startswith(("general.", "tokenizer.")) else f"{architecture}.{key}": item for key, item in change.items()}
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(metadata | change, tensors_for(name)))
    with pytest.raises(UserError) as error:
        open_model(str(tmp_path / "x.gguf"))
    assert message in str(error.value) and "x.gguf" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["llama", "gpt2", "granite", "cohere2"])
def test_no_key_of_the_file_is_optional_by_accident(tmp_path, name):
    """Each key that is taken away is missed, changes the config, or is the default that every file leaves out."""
    architecture, expected, metadata = model(name)
    tensors = tensors_for(name)
    usual = {"attention.head_count_kv", "rope.dimension_count", "rope.freq_base", "vocab_size", "expert_count"}
    required = []
    for key in [key.removeprefix(f"{architecture}.") for key in metadata if key.startswith(f"{architecture}.")]:
        less = {other: item for other, item in metadata.items() if other != f"{architecture}.{key}"}
        try:
            config, _ = opened(tmp_path / "m.gguf", less, tensors)
        except UserError as error:
            assert f"metadata key {architecture}.{key} is missing" in str(error)
            required.append(key)
        else:
            assert config != expected or key in usual or HARMLESS.fullmatch(key), key
    assert {"block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"} < set(required)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_factors(tmp_path, factor):
    config = tiny(head_dim=128, num_heads=1, num_kv_heads=1, ropes=(Rope(500000.0, kind="llama3", factor=factor),))
    factors = llama3_factors(config.ropes[0], 128).astype(np.float32)
    assert factors[0] == 1 and factors[-1] == factor and len(set(factors.tolist())) > 3
    tensors = tensors_of(config, random_parts(config))
    read = lambda values: opened(tmp_path / "x.gguf", metadata_of(config), tensors | {"rope_freqs.weight": f32(values)})
    found, source = read(factors)
    assert found == config and "rope_freqs.weight" not in source.shapes()
    assert read(np.ones(64))[0].ropes == (Rope(500000.0),)
    # Those of other bounds are taken as they are.
    other = read(factors * 1.25)[0].ropes[0]
    assert other.kind == "longrope" and other.short_factors == other.long_factors
    np.testing.assert_array_equal(np.array(other.long_factors, np.float32), factors * np.float32(1.25))
    for wrong in (factors[:-1], np.full(64, np.nan), np.zeros(64), -factors):
        with pytest.raises(UserError, match=r"rope_freqs\.weight of shape"):
            read(wrong)
    metadata = metadata_of(config) | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    with pytest.raises(UserError, match=r"factor 2.* and rope_freqs\.weight: not supported"):
        opened(tmp_path / "y.gguf", metadata, tensors | {"rope_freqs.weight": f32(factors)})


def test_a_fused_tensor_is_read_where_an_architecture_usually_has_three(tmp_path):
    config = tiny(qkv_bias=True)
    parts = random_parts(config)
    fused = stored_of(config, parts)
    for i in range(2):
        for kind in ("weight", "bias"):
            fused[f"blk.{i}.attn_qkv.{kind}"] = np.concatenate([fused.pop(f"blk.{i}.attn_{x}.{kind}") for x in "qkv"])
    found, source = opened(tmp_path / "m.gguf", metadata_of(config), {name: f32(array) for name, array in fused.items()})
    assert found == config
    check(source, found, "m.gguf")
    for part in parts:
        np.testing.assert_array_equal(source.read(part), parts[part], err_msg=part)
