"""The safetensors reader: what the safetensors package writes, one file or shards, and refusals for damaged checkpoints."""

from __future__ import annotations

import dataclasses
import json
import struct
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from test_assemble import random_stored

from llminfer.config import ModelConfig, Rope
from llminfer.errors import UserError
from llminfer.weights import open_model
from llminfer.weights.assemble import leaves_of, parts_of
from llminfer.weights.hf_names import stored_from
from llminfer.weights.safetensors import SafetensorsFile, SafetensorsSource

CONFIG = ModelConfig(
    name="tiny",
    **dict(vocab_size=64, hidden_size=32, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, max_position=128),
    **dict(ropes=(Rope(10000.0),), norm_eps=0.5, bos_id=1, eos_ids=(2,)),
)
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "rope_theta": 10000.0, "rms_norm_eps": 0.5},
    **{"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False},
}
INDEX = "model.safetensors.index.json"


def random_hf(c: ModelConfig) -> dict[str, np.ndarray]:
    return random_stored("LlamaForCausalLM", c)


def to_hf(params, c: ModelConfig) -> dict[str, np.ndarray]:
    return dict(stored_from(parts_of(leaves_of(params), c), "LlamaForCausalLM", c))


def write_checkpoint(folder: Path, tensors: dict[str, np.ndarray], shards: int = 1, **config) -> None:
    (folder / "config.json").write_text(json.dumps(HF_CONFIG | config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names = sorted(tensors)
    where = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(names)}
    for shard in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint_loads_as_it_was(tmp_path, dtype, shards):
    hf = {name: array.astype(dtype) for name, array in random_hf(CONFIG).items()}
    write_checkpoint(tmp_path, hf, shards)
    checkpoint = open_model(str(tmp_path))
    assert checkpoint.config == dataclasses.replace(CONFIG, name=tmp_path.name)
    assert checkpoint.directory == tmp_path and checkpoint.metadata is None
    params = checkpoint.load()
    assert params.embed.dtype == (np.float32 if dtype == np.float16 else dtype)
    back = to_hf(params, checkpoint.config)
    assert back.keys() == hf.keys()
    for name, array in hf.items():
        np.testing.assert_array_equal(back[name], array.astype(params.embed.dtype), err_msg=name)


def test_end_tokens_follow_the_generation_config(tmp_path):
    write_checkpoint(tmp_path, random_hf(CONFIG))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 2]}))
    assert open_model(str(tmp_path)).config.eos_ids == (3, 2)


def test_a_tied_checkpoint_may_repeat_the_head(tmp_path):
    write_checkpoint(tmp_path, random_hf(CONFIG), tie_word_embeddings=True)
    assert open_model(str(tmp_path)).load().lm_head is None


def refused(folder: Path, message: str) -> None:
    began = time.process_time()
    with pytest.raises(UserError) as error:
        open_model(str(folder))
    assert time.process_time() - began < 0.5
    assert message in str(error.value), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_truncated_file_is_refused_at_open(tmp_path, shards):
    write_checkpoint(tmp_path, random_hf(CONFIG), shards)
    path = sorted(tmp_path.glob("*.safetensors"))[0]
    data = path.read_bytes()
    for length in (0, 5, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        refused(tmp_path, path.name)
    path.write_bytes(data + b"\0")
    refused(tmp_path, "the tensors end at byte")


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "..\\x.safetensors", "C:x.safetensors", "a/b.safetensors", "..", "", "x.bin", 3, None, []],
)
def test_an_index_stays_in_its_directory(tmp_path, name):
    inner = tmp_path / "inner"
    inner.mkdir()
    write_checkpoint(inner, random_hf(CONFIG), 2)
    (inner / "model-0.safetensors").rename(tmp_path / "x.safetensors")
    index = json.loads((inner / INDEX).read_text())
    index["weight_map"] = {key: name if shard == "model-0.safetensors" else shard for key, shard in index["weight_map"].items()}
    (inner / INDEX).write_text(json.dumps(index))
    refused(inner, "legal: a plain *.safetensors file name in the same directory")


def test_an_index_that_does_not_fit_its_shards(tmp_path):
    write_checkpoint(tmp_path, random_hf(CONFIG), 2)
    index = json.loads((tmp_path / INDEX).read_text())
    for weight_map in ({}, [], None):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        refused(tmp_path, "weight_map must be an object")
    fewer = dict(index["weight_map"])
    del fewer["lm_head.weight"]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": fewer}))
    refused(tmp_path, "does not agree")
    (tmp_path / INDEX).write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").unlink()
    refused(tmp_path, "model-1.safetensors: cannot be read (No such file or directory)")


def header(entries: object, data: bytes = bytes(64)) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(16,), offsets=(0, 64)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


DAMAGED = {
    "huge header": (struct.pack("<Q", 2**63) + bytes(100), "the header claims"),
    "header past the end": (struct.pack("<Q", 200) + bytes(100), "the header claims"),
    "no JSON": (header(b"{" * 30), "its JSON cannot be parsed"),
    "deep JSON": (header(b"[" * 200_000), "its JSON cannot be parsed"),
    "not UTF-8": (header(b"\xff" * 30), "its JSON cannot be parsed"),
    "list": (header([1, 2, 3]), "must be an object"),
    "entry": (header({"a": 5}), "is not an object"),
    "dtype": (header({"a": entry("F6_E2M3", (64,))}), "dtype 'F6_E2M3', which is not supported; legal: F32, F16, BF16, F8_E4M3"),
    "integers": (header({"model.norm.weight": entry("I32")}), "has dtype int32, which is not supported for weights; legal: F32"),
    "dtype type": (header({"a": entry(7)}), "is not an object with a dtype"),
    "shape": (header({"a": {"dtype": "F32", "shape": "16", "data_offsets": [0, 64]}}), "has shape '16'"),
    "negative": (header({"a": entry("F32", (-16,))}), "has shape [-16]"),
    "boolean": (header({"a": entry("F32", (True, 16))}), "has shape [True, 16]"),
    "huge shape": (header({"a": entry("F32", (2**40, 2**40))}), "does not fill"),
    "one offset": (header({"a": entry(offsets=(0,))}), "data_offsets [0]"),
    "beyond": (header({"a": entry(shape=(32,), offsets=(0, 128))}), "truncated"),
    "overlap": (header({"a": entry(), "b": entry()}), "starts at byte"),
    "hole": (header({"a": entry(shape=(8,), offsets=(32, 64))}), "starts at byte"),
    "left over": (header({"a": entry(shape=(8,), offsets=(0, 32))}), "the tensors end at byte"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_one_clear_line(tmp_path, case):
    data, message = DAMAGED[case]
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    (tmp_path / "model.safetensors").write_bytes(data)
    refused(tmp_path, message)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 250), st.integers(1, 255)), max_size=3), cut=st.one_of(st.none(), st.integers(0, 299)))
def test_flipped_bytes_and_cuts_are_refused_or_read(tmp_path, flips, cut):
    tensors = {"a": entry(), "b": entry("BF16", (4, 8), (64, 128))}
    data = bytearray(header({"__metadata__": {"x": "y"}, **tensors}, bytes(128)))
    for at, bits in flips:
        data[at] ^= bits
    (tmp_path / "x.safetensors").write_bytes(data[:cut])
    try:
        file = SafetensorsFile(tmp_path / "x.safetensors")
        for name, (_, shape, _) in file.tensors.items():
            assert file.read(name).shape == shape
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"{", "its JSON cannot be parsed"),
        (b"[]", "must be an object"),
        (b'{"architectures": 5}', "architectures='none'"),
        (b'{"architectures": ["Gemma"]}', "architectures='Gemma'"),
        (json.dumps(HF_CONFIG | {"quantization_config": {"quant_method": "fp8"}}).encode(), "quantization_config"),
        (json.dumps(HF_CONFIG | {"rms_norm_eps": "x"}).encode(), "norm_eps"),
        (json.dumps(HF_CONFIG | {"rope_theta": []}).encode(), "rope_theta='list of 0': must be a positive number"),
        (
            json.dumps(HF_CONFIG | {"num_hidden_layers": 3}).encode(),
            "model.layers.2.self_attn.q_proj.weight [32, 32] (layers.2.q) is missing",
        ),
        (json.dumps(HF_CONFIG | {"hidden_size": 10**12}).encode(), "hidden_size=1000000000000"),
    ],
)
def test_configs_that_cannot_be_honoured(tmp_path, config, message):
    write_checkpoint(tmp_path, random_hf(CONFIG))
    (tmp_path / "config.json").write_bytes(config)
    refused(tmp_path, message)


def test_a_directory_without_a_checkpoint(tmp_path):
    refused(tmp_path, "has no config.json; legal: demo, a directory")
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, "has neither model.safetensors nor model.safetensors.index.json; there is: config.json, pytorch_model.bin")


@pytest.mark.parametrize("data", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_a_read_gives_the_stored_values(tmp_path, data):
    save_file({"a": np.arange(6, dtype=data).reshape(2, 3), "b": np.arange(8)}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    array = source.read("a")
    assert source.shapes() == {"a": (2, 3), "b": (8,)} and array.dtype == data
    np.testing.assert_array_equal(array, np.arange(6, dtype=data).reshape(2, 3))
    with pytest.raises(UserError, match="dtype int64"):
        source.require_float("b")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="has become shorter while it was read"):
        source.read("a")
