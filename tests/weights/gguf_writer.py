"""Writes GGUF files for tests: whole ones, and damaged ones through the same few parts."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from llminfer.config import ModelConfig
from llminfer.weights.assemble import EMBED, HEAD, hf_shapes
from llminfer.weights.gguf import LAYER_NAMES, TOP_NAMES

F32, F16, Q4_0, Q4_1, Q8_0, BF16 = 0, 1, 2, 3, 8, 30
# A tensor: (shape slowest axis first, type number, bytes).
Stored = tuple[tuple[int, ...], int, bytes]


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def value(item: Any) -> bytes:
    """A metadata value with its type: bool, int (u32), float (f32), str, or a list of one of these."""
    if isinstance(item, list):
        first = value(item[0]) if item else value(0)
        return struct.pack("<I", 9) + first[:4] + struct.pack("<Q", len(item)) + b"".join(value(x)[4:] for x in item)
    if isinstance(item, bool):
        return struct.pack("<IB", 7, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    return struct.pack("<I", 8) + text(item)


def gguf_bytes(metadata: dict[str, Any], tensors: dict[str, Stored], version: int = 3, alignment: int = 32) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(text(key) + value(item) for key, item in metadata.items())
    data = b""
    for name, (shape, kind, raw) in tensors.items():
        data += b"\0" * (-len(data) % alignment)
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", kind, len(data))
        data += raw
    return head + b"\0" * (-len(head) % alignment) + data


def f32(array: np.ndarray) -> Stored:
    return array.shape, F32, array.astype("<f4").tobytes()


def metadata_of(c: ModelConfig) -> dict[str, Any]:
    """Metadata of a llama model; rope_scaling is left to the test."""
    fields = {
        "block_count": c.num_layers,
        "context_length": c.max_position,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_heads,
        "attention.head_count_kv": c.num_kv_heads,
        "attention.layer_norm_rms_epsilon": c.norm_eps,
        "rope.freq_base": c.rope_theta,
        "rope.dimension_count": c.head_dim,
    }
    if c.head_dim * c.num_heads != c.hidden_size:
        fields |= {"attention.key_length": c.head_dim, "attention.value_length": c.head_dim}
    metadata = {"general.architecture": "llama", "general.name": c.name}
    return metadata | {f"llama.{key}": item for key, item in fields.items()}


def permute(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """[heads * head_dim, in] from the half-split rotary order to the interleaved one of llama GGUF files."""
    return np.stack(np.split(rows.reshape(-1, head_dim, rows.shape[1]), 2, axis=1), axis=2).reshape(rows.shape)


def tensors_of(c: ModelConfig, hf: dict[str, np.ndarray]) -> dict[str, Stored]:
    """Hugging Face tensors as float32 GGUF tensors."""
    stored = {}
    for name, array in hf.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            array = permute(array, c.head_dim)
        stored[gguf_name(name)] = f32(array)
    return stored


def gguf_name(name: str) -> str:
    if name.startswith("model.layers."):
        _, _, layer, rest = name.split(".", 3)
        ours = {theirs: ours for ours, theirs in LAYER_NAMES.items()}[rest.removesuffix(".weight")]
        return f"blk.{layer}.{ours}.weight"
    return {theirs: ours for ours, theirs in TOP_NAMES.items()}[name]


def random_hf(c: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors under Hugging Face names."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in hf_shapes(c).items()}


def tiny(**changes: Any) -> ModelConfig:
    fields = {
        **{"name": "t", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 96, "num_layers": 2, "num_heads": 4},
        **{"num_kv_heads": 2, "head_dim": 8, "max_position": 128, "rope_theta": 10000.0, "norm_eps": 0.5},
    }
    return ModelConfig(**(fields | changes))


def write_model(path: Path, c: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """A whole float32 file of random weights; returns them."""
    hf = random_hf(c, seed)
    path.write_bytes(gguf_bytes(metadata_of(c), tensors_of(c, hf)))
    return hf


__all__ = ["EMBED", "HEAD", "gguf_bytes", "tiny", "write_model"]
