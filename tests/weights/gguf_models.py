"""A tiny model of every architecture that is read from GGUF: its ModelConfig and the metadata that says so."""

from __future__ import annotations

import math
from typing import Any

from weights.gguf_writer import metadata_of, tiny

from llminfer.config import ModelConfig, Rope

PLAIN = {"norm": "layer", "norm_bias": True, "qkv_bias": True, "o_bias": True, "mlp_bias": True, "gated": False}
GEMMA = {"norm_offset": 1.0, "activation": "gelu_tanh", "embed_scale": math.sqrt(32), "tie_embeddings": True}
POST = {"pre_norm": False, "post_norm": True}
COHERE = {"norm": "layer", "parallel": True, "shared_norm": True, "logit_scale": 0.0625, "tie_embeddings": True}
LOCAL, GLOBAL = Rope(10000.0), Rope(1e6)
YARN = {"kind": "yarn", "factor": 8.0, "original_max_position": 64}
SHORT, LONG = (1.05, 1.1, 1.25), (1.1, 4.5, 30.75)
# architecture (and a variant after a colon) -> (fields that differ from tiny(), metadata without its prefix; None: not in the file)
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({}, {"vocab_size": 64, "expert_count": 0, "rope.scaling.finetuned": True}),
    "llama:biases": ({"qkv_bias": True, "o_bias": True, "mlp_bias": True, "windows": (16,), "num_heads": 6, "num_kv_heads": 6}, {}),
    "internlm2": ({"ropes": (Rope(1e6),)}, {}),
    "smollm3": ({"num_layers": 5, "rope_layers": (0, 0, 0, -1), "tie_embeddings": True}, {}),
    "granite": (
        {"embed_scale": 12.0, "residual_scale": 0.22, "attn_scale": 0.015625, "logit_scale": 1 / 8.0},
        {"embedding_scale": 12.0, "residual_scale": 0.22, "attention.scale": 0.015625, "logit_scale": 8.0},
    ),
    "qwen2": (
        {"qkv_bias": True, "ropes": (Rope(1e6, **YARN, attention_factor=0.1 * math.log(8) + 1),)},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 64},
    ),
    "qwen3": ({"qk_norm": "head", "head_dim": 16, "ropes": (Rope(1e6),)}, {}),
    "gemma": (GEMMA | {"head_dim": 16, "num_kv_heads": 1}, {}),
    "gemma2": (
        GEMMA | {"post_norm": True, "windows": (16, 0), "num_layers": 3, "attn_softcap": 50.0, "logit_softcap": 30.0},
        {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma2:27b": (
        GEMMA
        | {"post_norm": True, "windows": (4096, 0), "num_layers": 46, "head_dim": 4, "attn_scale": 8**-0.5}
        # What its files do not say.
        | {"attn_softcap": 50.0, "logit_softcap": 30.0},
        {"attention.sliding_window": None},
    ),
    "gemma3": (
        GEMMA
        | {"post_norm": True, "qk_norm": "head", "num_layers": 8, "head_dim": 16, "windows": (16, 16, 16, 16, 16, 0)}
        | {"ropes": (LOCAL, Rope(1e6, kind="linear", factor=8.0)), "rope_layers": (0, 0, 0, 0, 0, 1), "norm_eps": 1e-6},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "mm.tokens_per_image": 256},
    ),
    "gemma3:pattern": (
        GEMMA
        | {
            "post_norm": True,
            "qk_norm": "head",
            "num_layers": 4,
            "windows": (0, 16),
            "ropes": (GLOBAL, Rope(500.0)),
            "rope_layers": (0, 1),
        },
        {"attention.sliding_window_pattern": [False, True, False, True], "rope.freq_base_swa": 500.0},
    ),
    "phi3": ({"windows": (16,)}, {}),
    "phi3:longrope": (
        {"ropes": (Rope(dim=6, kind="longrope", original_max_position=32, attention_factor=1.19, short_factors=SHORT, long_factors=LONG),)}
        | {"tie_embeddings": True},
        {"rope.scaling.original_context_length": 32, "rope.scaling.attn_factor": 1.19, "attention.sliding_window": 0},
    ),
    "olmo2": (POST | {"qk_norm": "full"}, {}),
    "olmo2:3": (
        POST
        | {"qk_norm": "full", "num_layers": 6, "windows": (16, 16, 16, 0), "rope_layers": (0, 0, 0, 1)}
        | {"ropes": (LOCAL, Rope(**YARN, attention_factor=1.2079, beta_fast=16.0))},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 64}
        | {"rope.scaling.yarn_attn_factor": 1.2079, "rope.scaling.yarn_beta_fast": 16.0},
    ),
    "gpt2": (
        PLAIN
        | {"num_kv_heads": 4, "activation": "gelu_tanh", "learned_positions": True, "tie_embeddings": True}
        | {"ropes": (), "rope_layers": (-1,)},
        {},
    ),
    "gptneox": (
        PLAIN | {"num_kv_heads": 4, "activation": "gelu", "parallel": True, "ropes": (Rope(dim=2),)},
        {"use_parallel_residual": True, "tensor_data_layout": "Meta"},
    ),
    "starcoder2": (PLAIN | {"activation": "gelu_tanh", "windows": (16,), "tie_embeddings": True}, {}),
    "stablelm": (
        {"norm": "layer", "norm_bias": True, "qkv_bias": True, "qk_norm": "heads", "ropes": (Rope(dim=2),)},
        {"use_parallel_residual": False},
    ),
    "stablelm:12b": ({"norm": "layer", "norm_bias": True, "parallel": True, "shared_norm": True}, {"use_parallel_residual": True}),
    "command-r": (COHERE | {"qk_norm": "heads"}, {"logit_scale": 0.0625, "rope.scaling.type": "none"}),
    "cohere2": (COHERE | {"num_layers": 5, "windows": (16, 16, 16, 0), "rope_layers": (0, 0, 0, -1)}, {"logit_scale": 0.0625}),
    "exaone": ({}, {}),
    "exaone4": (POST | {"qk_norm": "head", "num_layers": 4, "windows": (16, 16, 16, 0), "rope_layers": (0, 0, 0, -1)}, {}),
    "exaone4:1.2b": (POST | {"qk_norm": "head", "tie_embeddings": True}, {}),
}


def model(name: str) -> tuple[str, ModelConfig, dict[str, Any]]:
    """(architecture, ModelConfig, metadata) of a name in MODELS."""
    architecture = name.partition(":")[0]
    fields, further = MODELS[name]
    config = tiny(**fields)
    metadata = metadata_of(config, architecture) | {f"{architecture}.{key}": item for key, item in further.items()}
    return architecture, config, {key: item for key, item in metadata.items() if item is not None}
