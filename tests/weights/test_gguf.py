"""The GGUF reader: values bit for bit those of the gguf package, and a UserError for every damaged file."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import numpy as np
import pytest
from gguf_writer import BF16, F16, F32, Q4_0, Q4_1, Q8_0, f32, gguf_bytes, metadata_of, random_hf, tensors_of, text, tiny, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llminfer.config import RopeScaling
from llminfer.errors import UserError
from llminfer.weights import open_model
from llminfer.weights.assemble import to_hf
from llminfer.weights.gguf import TYPES, GgufFile, dequantize, hf_name, llama3_factors, read_config


def opened(path: Path, data: bytes) -> GgufFile:
    path.write_bytes(data)
    return GgufFile(path)


@pytest.mark.parametrize("kind", [F32, F16, Q4_0, Q4_1, Q8_0, BF16])
def test_dequantize_equals_the_gguf_package(kind):
    oracle = pytest.importorskip("gguf")
    rng = np.random.default_rng(kind)
    if kind in (Q4_0, Q4_1, Q8_0):  # any bytes are quants; the scales are kept finite
        blocks = np.frombuffer(rng.bytes(3000 * TYPES[kind][2].itemsize), TYPES[kind][2]).reshape(300, 10).copy()
        for field in ("d", "m"):
            if field in blocks.dtype.names:
                blocks[field] = rng.standard_normal((300, 10))
    else:
        blocks = rng.standard_normal((30, 50)).astype(np.float32)
        blocks = (blocks.view(np.uint32) >> 16).astype("<u2") if kind == BF16 else blocks.astype(TYPES[kind][2])
    expected = oracle.dequantize(blocks.reshape(len(blocks), -1).view(np.uint8), oracle.GGMLQuantizationType(kind))
    ours = dequantize(kind, blocks)
    assert ours.dtype == np.float32 and ours.shape == expected.shape
    np.testing.assert_array_equal(ours.view(np.uint32), expected.view(np.uint32))


def test_a_damaged_scale_is_no_warning():
    blocks = np.zeros((1, 4), TYPES[Q4_1][2])
    blocks["d"], blocks["m"] = np.inf, -np.inf
    assert not np.isfinite(dequantize(Q4_1, blocks)).any()


def test_reads_what_the_gguf_package_writes(tmp_path):
    oracle = pytest.importorskip("gguf")
    writer = oracle.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_string("a.text", "grüße\n")
    writer.add_array("a.strings", ["", "x", "日本"])
    writer.add_array("a.ints", [-1, 2])
    writer.add_bool("a.bool", True)
    writer.add_float64("a.double", 1e-300)
    writer.add_int64("a.long", -(2**40))
    values = np.arange(2 * 3 * 64, dtype=np.float32).reshape(2, 3, 64)
    writer.add_tensor("t", values)
    writer.add_tensor("q", oracle.quantize(values, oracle.GGMLQuantizationType.Q8_0), raw_dtype=oracle.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "a.gguf")
    expected = {
        "a.text": "grüße\n",
        "a.strings": ["", "x", "日本"],
        "a.ints": [-1, 2],
        "a.bool": True,
        "a.double": 1e-300,
        "a.long": -(2**40),
    }
    assert {key: file.metadata[key] for key in expected} == expected
    np.testing.assert_array_equal(file.read("t"), values)
    np.testing.assert_allclose(file.read("q"), values, atol=2)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_file_loads_as_it_was(tmp_path, version, tied):
    config = tiny(tie_embeddings=tied)
    hf = random_hf(config)
    metadata = metadata_of(config) | {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.bos_token_id": 1}
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(metadata, tensors_of(config, hf), version))
    checkpoint = open_model(str(tmp_path / "m.gguf"), str(tmp_path / "cache"))
    assert checkpoint.config == tiny(tie_embeddings=tied, bos_id=1, eos_ids=(2, 5))
    assert checkpoint.metadata == metadata and not checkpoint.random
    for _ in range(2):  # built, then mapped
        back = to_hf(checkpoint.load(), checkpoint.config)
        assert back.keys() == hf.keys()
        for name, array in hf.items():
            np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_quantized_rows_of_q_and_k_are_moved_whole(tmp_path):
    config = tiny(num_layers=1)
    rng = np.random.default_rng(1)
    tensors = tensors_of(config, random_hf(config))
    shape = tensors["blk.0.attn_q.weight"][0]
    tensors["blk.0.attn_q.weight"] = shape, Q8_0, b"".join(np.float16(1).tobytes() + rng.bytes(32) for _ in range(shape[0]))
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(metadata_of(config), tensors))
    checkpoint = open_model(str(tmp_path / "m.gguf"), str(tmp_path / "cache"))
    stored = GgufFile(tmp_path / "m.gguf").read("blk.0.attn_q.weight").reshape(4, 4, 2, 32)
    q = to_hf(checkpoint.load(), config)["model.layers.0.self_attn.q_proj.weight"].reshape(4, 2, 4, 32)
    for head in range(4):
        for pair in range(4):
            np.testing.assert_array_equal(q[head, :, pair], stored[head, pair])


def test_a_vocabulary_is_read_quickly(tmp_path):
    tokens = [f"token{i}" for i in range(50_000)]
    data = gguf_bytes({"general.architecture": "llama", "tokenizer.ggml.tokens": tokens, "x": list(range(50_000))}, {})
    (tmp_path / "v.gguf").write_bytes(data)
    began = time.process_time()
    file = GgufFile(tmp_path / "v.gguf")
    assert time.process_time() - began < 1.0  # some 20 ms on an idle machine
    assert file.metadata["tokenizer.ggml.tokens"] == tokens and file.metadata["x"][-1] == 49_999


HEAD = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
ARCHITECTURE = {"general.architecture": "llama"}
ROW = np.ones((2, 32), np.float32)


def described(shape: tuple[int, ...], kind: int, offset: int, data: bytes = b"") -> bytes:
    """A file with one tensor `t` that claims this, and `data` (aligned to 32)."""
    head = gguf_bytes(ARCHITECTURE, {})[:-1].rstrip(b"\0")
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + head[24:]
    head += text("t") + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape)) + struct.pack("<IQ", kind, offset)
    return head + b"\0" * (-len(head) % 32) + data


DAMAGED = {
    "empty": (b"", "not a GGUF file"),
    "other": (b"PK" * 100, "first four bytes"),
    "version": (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "legal: 2, 3"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensor count": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "truncated"),
    "key count": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "truncated"),
    "huge array, 51 bytes": (HEAD + text("abc") + struct.pack("<IIQ", 9, 4, 2**61), "at most"),
    "huge strings": (HEAD + text("abc") + struct.pack("<IIQ", 9, 8, 2**23), "truncated"),
    "huge string": (HEAD + text("abc") + struct.pack("<IQ", 8, 2**62), "fit"),
    "huge key": (HEAD + struct.pack("<Q", 2**62) + b"a" * 20, "fit"),
    "nested array": (HEAD + text("abc") + struct.pack("<IIQ", 9, 9, 1), "array of arrays"),
    "value type": (HEAD + text("abc") + struct.pack("<IQ", 77, 1), "value type 77"),
    "element type": (HEAD + text("abc") + struct.pack("<IIQ", 9, 13, 1), "element type 13"),
    "not UTF-8": (HEAD + text(b"\xff\xfe\xff") + struct.pack("<IQ", 4, 1), "UTF-8"),
    "key twice": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * (text("abc") + struct.pack("<II", 4, 1)), "twice"),
    "no architecture": (gguf_bytes({"a": 1}, {}), "architecture None"),
    "architecture": (gguf_bytes({"general.architecture": "gemma3"}, {}), "'gemma3' is not supported; legal: llama"),
    "split": (gguf_bytes(ARCHITECTURE | {"split.count": 3}, {}), "split model"),
    "alignment": (gguf_bytes(ARCHITECTURE | {"general.alignment": 12}, {}), "general.alignment=12"),
    "tensor type": (described((2, 256), 14, 0, bytes(420)), "tensor 't' has type Q6_K (14), which is not supported; legal: F32, F16, Q4_0"),
    "unknown type": (described((2, 32), 999, 0, bytes(256)), "type unknown (999)"),
    "dimensions": (described((1, 1, 1, 1, 32), F32, 0, bytes(256)), "5 dimensions"),
    "no dimension": (described((), F32, 0, bytes(256)), "0 dimensions"),
    "empty tensor": (described((0, 32), F32, 0, bytes(256)), "shape [0, 32]"),
    "overflow": (described((2**62, 2**62), F32, 0, bytes(256)), "truncated"),
    "part of a block": (described((2, 33), Q8_0, 0, bytes(256)), "whole blocks of 32"),
    "offset": (described((2, 32), F32, 2**63, bytes(256)), "truncated"),
    "unaligned": (described((2, 32), F32, 4, bytes(512)), "aligned to 32"),
    "truncated data": (described((2, 32), F32, 0, bytes(255)), "truncated"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_one_clear_line(tmp_path, case):
    data, message = DAMAGED[case]
    (tmp_path / "x.gguf").write_bytes(data)
    began = time.process_time()
    with pytest.raises(UserError) as error:
        open_model(str(tmp_path / "x.gguf"))
    assert time.process_time() - began < 0.5
    assert message in str(error.value) and "\n" not in str(error.value) and "x.gguf" in str(error.value)


def test_tensors_may_not_overlap_or_occur_twice(tmp_path):
    one = gguf_bytes(ARCHITECTURE, {"a": f32(ROW), "b": f32(ROW)})
    with pytest.raises(UserError, match="twice"):
        opened(tmp_path / "x.gguf", one.replace(text("b"), text("a")))
    second = struct.pack("<2QIQ", 32, 2, F32, 256)
    assert one.count(second) == 1
    with pytest.raises(UserError, match="'a' and 'b' overlap"):
        opened(tmp_path / "x.gguf", one.replace(second, struct.pack("<2QIQ", 32, 2, F32, 32)))


FIELDS = [
    ({"llama.expert_count": 8}, "expert_count=8"),
    ({"llama.rope.dimension_count": 4}, "rope.dimension_count=4"),
    ({"llama.attention.value_length": 16}, "attention.value_length=16"),
    ({"llama.attention.head_count_kv": [2, 4]}, "the same for all layers"),
    ({"llama.attention.head_count": 0}, "attention.head_count=0"),
    ({"llama.attention.head_count_kv": 0}, "num_kv_heads=0"),
    ({"llama.block_count": 4_000_000_000}, "num_layers=4000000000"),
    ({"llama.rope.freq_base": float("nan")}, "rope_theta=nan"),
    ({"llama.rope.scaling.type": "yarn"}, "'yarn'"),
    ({"llama.rope.scaling.factor": float("nan")}, "factor nan"),
    ({"tokenizer.ggml.eos_token_id": 64}, "must be from 0 to vocab_size-1=63"),
    ({"llama.block_count": 3}, "model.layers.2.input_layernorm.weight [32] is missing"),
    ({"llama.feed_forward_length": 64}, "mlp.gate_proj.weight is [96, 32], expected [64, 32]"),
    ({"tokenizer.ggml.tokens": ["a"] * 63}, "model.embed_tokens.weight is [64, 32], expected [63, 32]"),
]


@pytest.mark.parametrize(("change", "message"), FIELDS, ids=[next(iter(f[0])) for f in FIELDS])
def test_metadata_that_cannot_be_honoured(tmp_path, change, message):
    config = tiny()
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(metadata_of(config) | change, tensors_of(config, random_hf(config))))
    with pytest.raises(UserError) as error:
        open_model(str(tmp_path / "x.gguf"))
    assert message in str(error.value) and "x.gguf" in str(error.value)


@pytest.mark.parametrize("missing", ["llama.block_count", "llama.attention.layer_norm_rms_epsilon"])
def test_metadata_that_is_missing(tmp_path, missing):
    metadata = metadata_of(tiny())
    del metadata[missing]
    with pytest.raises(UserError, match=f"{missing} is missing"):
        read_config(opened(tmp_path / "x.gguf", gguf_bytes(metadata, {})))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_factors(tmp_path, factor):
    config = tiny(rope_theta=500000.0, head_dim=128, num_heads=1, num_kv_heads=1)
    scaling = RopeScaling("llama3", factor, 1.0, 4.0, 8192)
    factors = llama3_factors(128, 500000.0, scaling).astype(np.float32)
    assert factors[0] == 1 and factors[-1] == factor and len(set(factors.tolist())) > 3
    embed = f32(np.zeros((64, 32)))
    read = opened(tmp_path / "x.gguf", gguf_bytes(metadata_of(config), {"token_embd.weight": embed, "rope_freqs.weight": f32(factors)}))
    assert read_config(read).rope_scaling == scaling
    ones = gguf_bytes(metadata_of(config), {"token_embd.weight": embed, "rope_freqs.weight": f32(np.ones(64))})
    assert read_config(opened(tmp_path / "y.gguf", ones)).rope_scaling is None
    for wrong in (factors * 1.01, factors[:-1], np.full(64, np.nan), np.zeros(64)):
        with pytest.raises(UserError, match=r"rope_freqs\.weight"):
            data = gguf_bytes(metadata_of(config), {"token_embd.weight": embed, "rope_freqs.weight": f32(wrong)})
            read_config(opened(tmp_path / "z.gguf", data))


def test_linear_rope_scaling(tmp_path):
    metadata = metadata_of(tiny()) | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    data = gguf_bytes(metadata, {"token_embd.weight": f32(np.zeros((64, 32)))})
    assert read_config(opened(tmp_path / "x.gguf", data)).rope_scaling == RopeScaling("linear", 4.0)


def test_names():
    assert hf_name("blk.12.attn_output.weight") == "model.layers.12.self_attn.o_proj.weight"
    assert hf_name("output.weight") == "lm_head.weight"
    for strange in ("blk.01.attn_q.weight", "blk.0.attn_q.bias", "blk.0.ssm.weight", "blk.٣.attn_q.weight"):
        assert hf_name(strange) == strange


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("fuzz") / "m.gguf"
    config = tiny(num_layers=1, vocab_size=8, intermediate_size=32)
    write_model(path, config)
    metadata = metadata_of(config) | {"tokenizer.ggml.tokens": list("abcdefgh"), "tokenizer.ggml.eos_token_id": 2}
    data = gguf_bytes(metadata, tensors_of(config, random_hf(config)))
    return path, data


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, 1600), st.integers(1, 255)), max_size=4),
    cut=st.one_of(st.none(), st.integers(0, 3000)),
)
def test_flipped_bytes_and_cuts_are_refused_or_read(whole, flips, cut):
    path, data = whole
    changed = bytearray(data)
    for at, bits in flips:
        changed[at] ^= bits
    path.write_bytes(changed[:cut])
    try:
        checkpoint = open_model(str(path))
        checkpoint.prepared_root = None
        checkpoint.load()
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert cut is None
