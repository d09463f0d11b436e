"""The GGUF container: values bit for bit those of the gguf package, split files, and a UserError for every damaged file."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import numpy as np
import pytest
from gguf_writer import F32, Q8_0, f32, gguf_bytes, text

from llminfer.errors import UserError
from llminfer.weights.gguf import GgufFile
from llminfer.weights.gguf_types import CHUNK_ELEMENTS, OTHER_TYPES, TYPES, dequantize


def opened(path: Path, data: bytes) -> GgufFile:
    path.write_bytes(data)
    return GgufFile(path)


ROW_BLOCKS = 3


def random_rows(kind: int, rows: int, odd_scales: bool) -> np.ndarray:
    """Stored bytes, all of them random; the scales too (so infinite, subnormal, negative, not a number), or of ordinary size."""
    rng = np.random.default_rng(kind)
    layout = TYPES[kind].layout
    blocks = np.frombuffer(rng.bytes(rows * ROW_BLOCKS * layout.itemsize), layout).copy()
    for field in ("d", "m"):
        if not odd_scales and field in (layout.names or ()):
            blocks[field] = rng.standard_normal(len(blocks))
    return blocks.view(np.uint8).reshape(rows, -1)


@pytest.mark.parametrize("odd_scales", [False, True])
@pytest.mark.parametrize("kind", TYPES, ids=[entry.name for entry in TYPES.values()])
def test_values_are_those_of_the_gguf_package_bit_for_bit(kind, odd_scales):
    oracle = pytest.importorskip("gguf")
    assert oracle.GGML_QUANT_SIZES[oracle.GGMLQuantizationType[TYPES[kind].name]] == (TYPES[kind].elements, TYPES[kind].layout.itemsize)
    assert oracle.GGMLQuantizationType[TYPES[kind].name] == kind
    # More than one chunk, and no whole number of them.
    rows = random_rows(kind, 2 * CHUNK_ELEMENTS // (ROW_BLOCKS * TYPES[kind].elements) + 5, odd_scales)
    with np.errstate(all="ignore"):
        expected = oracle.dequantize(rows, oracle.GGMLQuantizationType(kind))
        ours = dequantize(kind, rows)
        assert ours.dtype == (np.float32 if TYPES[kind].unpack else TYPES[kind].layout) and ours.shape == expected.shape
        np.testing.assert_array_equal(ours.astype(np.float32).view(np.uint32), expected.view(np.uint32))


def test_all_types_asked_for_are_there():
    asked = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL"
    assert {entry.name for entry in TYPES.values()} == set(asked.split())
    oracle = pytest.importorskip("gguf")
    assert OTHER_TYPES.items() <= {kind.value: kind.name for kind in oracle.GGMLQuantizationType}.items()


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
    "huge strings": (HEAD + text("abc") + struct.pack("<IIQ", 9, 8, 2**21), "truncated"),
    "huge string": (HEAD + text("abc") + struct.pack("<IQ", 8, 2**62), "fit"),
    "huge key": (HEAD + struct.pack("<Q", 2**62) + b"a" * 20, "fit"),
    "nested array": (HEAD + text("abc") + struct.pack("<IIQ", 9, 9, 1), "array of arrays"),
    "value type": (HEAD + text("abc") + struct.pack("<IQ", 77, 1), "value type 77"),
    "element type": (HEAD + text("abc") + struct.pack("<IIQ", 9, 13, 1), "element type 13"),
    "not UTF-8": (HEAD + text(b"\xff\xfe\xff") + struct.pack("<IQ", 4, 1), "UTF-8"),
    "key twice": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * (text("abc") + struct.pack("<II", 4, 1)), "twice"),
    "split name": (gguf_bytes({"split.count": 3}, {}), "must be NAME-00001-of-00003.gguf"),
    "split count": (gguf_bytes({"split.count": "3"}, {}), "split.count='3': must be an integer"),
    "many small arrays": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 5) + b"".join(text(key) + struct.pack("<IIQ", 9, 0, 2**20) + bytes(2**20) for key in "abcde"),
        "all arrays together may have at most 4194304",
    ),
    "alignment": (gguf_bytes(ARCHITECTURE | {"general.alignment": 12}, {}), "general.alignment=12"),
    "tensor type": (
        described((2, 256), 23, 0, bytes(420)),
        "tensor 't' has type IQ4_XS (23), which is not supported; legal: F32, F16, Q4_0",
    ),
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
        GgufFile(tmp_path / "x.gguf")
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


def split_parts(folder: Path, count: int = 3) -> list[Path]:
    """A split file as gguf-split writes it: the first part has the metadata, and here no tensor."""
    paths = [folder / f"big model-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]
    for i, path in enumerate(paths):
        metadata = {"split.no": i, "split.count": count, "split.tensors.count": 2 * (count - 1)} | (ARCHITECTURE if i == 0 else {})
        tensors = {f"{letter}{i}": f32(ROW * i) for letter in "ab"} if i else {}
        path.write_bytes(gguf_bytes(metadata, tensors))
    return paths


def test_any_part_opens_the_split_file(tmp_path):
    paths = split_parts(tmp_path)
    for path in paths:
        file = GgufFile(path)
        assert file.metadata["general.architecture"] == "llama" and file.paths == paths
        assert list(file.tensors) == ["a1", "b1", "a2", "b2"]
        np.testing.assert_array_equal(file.read("b2"), ROW * 2)


SPLIT_DAMAGE = {
    "missing": ({}, "big model-00003-of-00003.gguf is missing"),
    "number": ({"split.no": 1, "split.count": 3}, "has split.no=1 and split.count=3, by its name they must be 2 and 3"),
    "count": ({"split.no": 2, "split.count": 2}, "has split.no=2 and split.count=2, by its name"),
    "tensors": ({"split.no": 2, "split.count": 3}, "split.tensors.count=4, the 3 parts have 3 tensors"),
    "twice": ({"split.no": 2, "split.count": 3, "twice": 1}, "tensor 'b1' is also in another part"),
}


@pytest.mark.parametrize("case", SPLIT_DAMAGE)
def test_damaged_split_files(tmp_path, case):
    metadata, message = SPLIT_DAMAGE[case]
    paths = split_parts(tmp_path)
    paths[2].unlink()
    if metadata:
        paths[2].write_bytes(gguf_bytes(metadata, {"b1" if case == "twice" else "a2": f32(ROW)}))
    with pytest.raises(UserError) as error:
        GgufFile(paths[0])
    assert message in str(error.value) and "\n" not in str(error.value)
