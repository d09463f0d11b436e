"""Writes GGUF files for tests: whole models of every architecture, and damaged files through the same few parts.

Names, keys and what conversion changes are written down here once more, apart from the reader's tables."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from llminfer.config import ModelConfig
from llminfer.weights.assemble import part_shapes

F32, F16, Q4_0, Q4_1, Q8_0, BF16 = 0, 1, 2, 3, 8, 30
# A tensor: (shape slowest axis first, type number, bytes).
Stored = tuple[tuple[int, ...], int, bytes]
INTERLEAVED = ("llama", "internlm2", "smollm3", "granite", "command-r", "cohere2")
FUSED_QKV = ("gpt2", "gptneox", "phi3")
TOP = {
    "embed": "token_embd.weight",
    "positions": "position_embd.weight",
    "final_norm": "output_norm.weight",
    "final_norm_bias": "output_norm.bias",
    "lm_head": "output.weight",
}
LAYER = {
    "attn_norm": "attn_norm",
    "attn_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp_post_norm": "post_ffw_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


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


def metadata_of(c: ModelConfig, architecture: str = "llama") -> dict[str, Any]:
    """Metadata of the sizes of a model; what is particular to a family is left to the test."""
    fields: dict[str, Any] = {
        "block_count": c.num_layers,
        "context_length": c.max_position,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_heads,
        "attention.head_count_kv": c.num_kv_heads,
        f"attention.layer_norm_{'rms_' if c.norm == 'rms' else ''}epsilon": c.norm_eps,
    }
    if c.rope_layers != (-1,):
        full = [c.ropes[c.rope(i)] for i in range(c.num_layers) if c.window(i) == 0 and c.rope(i) >= 0] or c.ropes
        fields |= {"rope.freq_base": full[0].theta, "rope.dimension_count": full[0].dim or c.head_dim}
    if c.head_dim * c.num_heads != c.hidden_size:
        fields |= {"attention.key_length": c.head_dim, "attention.value_length": c.head_dim}
    if any(c.windows):
        fields["attention.sliding_window"] = max(c.windows)
    metadata = {"general.architecture": architecture, "general.name": c.name}
    return metadata | {f"{architecture}.{key}": item for key, item in fields.items()}


def interleave(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """[heads * head_dim, ...] from the half-split rotary order to the interleaved one of llama GGUF files."""
    heads = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return np.stack([heads[:, 0], heads[:, 1]], axis=2).reshape(rows.shape)


def stored_of(c: ModelConfig, parts: dict[str, np.ndarray], architecture: str = "llama") -> dict[str, np.ndarray]:
    """The tensors, by their stored names, that conversion makes of the parts of a model."""
    stored = {}
    for part, array in parts.items():
        if part.endswith("norm"):
            array = array + np.float32(c.norm_offset)
        prefix, _, leaf = part.rpartition(".")
        if leaf in ("q", "k", "q_bias", "k_bias") and architecture in INTERLEAVED:
            array = interleave(array, c.head_dim)
        if leaf in ("q_norm", "k_norm") and architecture in INTERLEAVED:
            array = interleave(array.reshape(-1), c.head_dim).reshape(array.shape)
        kind = "bias" if leaf.endswith("_bias") else "weight"
        stored[f"blk.{prefix.split('.')[1]}.{LAYER[leaf.removesuffix('_bias')]}.{kind}" if prefix else TOP[part]] = array
    for i in range(c.num_layers):
        if architecture in FUSED_QKV:
            for kind in ("weight", "bias") if c.qkv_bias else ("weight",):
                stored[f"blk.{i}.attn_qkv.{kind}"] = np.concatenate([stored.pop(f"blk.{i}.attn_{x}.{kind}") for x in "qkv"])
        if architecture == "phi3":
            gate = stored.pop(f"blk.{i}.ffn_gate.weight")
            stored[f"blk.{i}.ffn_up.weight"] = np.concatenate([gate, stored[f"blk.{i}.ffn_up.weight"]])
    return stored


def tensors_of(c: ModelConfig, parts: dict[str, np.ndarray], architecture: str = "llama") -> dict[str, Stored]:
    """The parts of a model as float32 tensors."""
    return {name: f32(array) for name, array in stored_of(c, parts, architecture).items()}


def random_parts(c: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {part: rng.standard_normal(shape, np.float32) for part, shape in part_shapes(c).items()}


def tiny(**changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        **{"name": "t", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 96, "num_layers": 2, "num_heads": 4},
        **{"num_kv_heads": 2, "head_dim": 8, "max_position": 128, "norm_eps": 0.5},
    }
    return ModelConfig(**(fields | changes))


def write_model(path: Path, c: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """A whole float32 llama file of random weights; returns its parts."""
    parts = random_parts(c, seed)
    path.write_bytes(gguf_bytes(metadata_of(c), tensors_of(c, parts)))
    return parts
