"""Tiny models of every family: their config.json, weights that anyone can make again, and how the golden logits are stored.

families.npz, made by make_families.py; NAME is a key of MODELS:
    NAME/config   JSON string: config.json, in the dialect of transformers 5 where it has the family, else in the family's own
    NAME/shapes   JSON string: stored tensor name -> shape
    NAME/ids      int32 [70]
    NAME/logits   float32 [70, 128], one row a position
The weights are not stored: they are `weights(shapes, NAME)`.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).parent / "families.npz"
PROMPT_LEN, VOCAB, WINDOW = 70, 128, 12
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
COMMON = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
RMS = {**COMMON, "rms_norm_eps": 1e-5}
# The original length is under the prompt's, so that the scaling acts, and its parameters are none of the defaults.
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
YARN |= {"beta_fast": 1.2, "beta_slow": 0.2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0}
LLAMA3["original_max_position_embeddings"] = 48


def default_rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


def longrope(original: int) -> dict[str, Any]:
    factors = {"short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5], "long_factor": [1.5, 2.0, 3.0, 5.0, 8.0, 12.0]}
    return {
        "rope_type": "longrope",
        "rope_theta": 8000.0,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": original,
    } | factors


VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
GEMMA = {**RMS, "rms_norm_eps": 1e-3}
GEMMA3 = {**GEMMA, "num_hidden_layers": 7, "head_dim": 24, "sliding_window": WINDOW, "query_pre_attn_scalar": 20} | {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    }
}
NO_GROUPS = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}
GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 128, "bos_token_id": 1, "eos_token_id": 2}
INTERNLM = {**NO_GROUPS, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False}
EXAONE = {
    **{name: value for name, value in COMMON.items() if name != "num_hidden_layers"},
    **{"num_layers": 4, "layer_norm_epsilon": 1e-5, "activation_function": "silu", "head_dim": 24, "embed_dropout": 0.0},
    **{"rope_theta": 5000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}, "tie_word_embeddings": True},
}

LLAMA4 = {**RMS, "num_hidden_layers": 6, "head_dim": 24, "intermediate_size": 40, "intermediate_size_mlp": 96, "num_local_experts": 5}
LLAMA4 |= {"interleave_moe_layer_step": 2, "no_rope_layer_interval": 3, "attention_chunk_size": 20, "floor_scale": 8, "attn_scale": 0.4}
LLAMA4_PLAIN = {"use_qk_norm": False, "attn_temperature_tuning": False}
LLAMA4 |= {"rope_parameters": {**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 1.0}}

# Name -> (architecture, fields of its config). What transformers calls by another name is built from PEERS.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_bias_yarn": ("LlamaForCausalLM", {**RMS, "attention_bias": True, "mlp_bias": True, "rope_parameters": YARN}),
    "llama_yarn_mscale": (
        "LlamaForCausalLM",
        {**RMS, "head_dim": 24, "rope_parameters": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.5, "truncate": False}},
    ),
    "llama_dynamic": (
        "LlamaForCausalLM",
        {**RMS, "max_position_embeddings": 40, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 4.0}},
    ),
    "mistral": ("MistralForCausalLM", {**RMS, "sliding_window": WINDOW, "rope_parameters": default_rope(2000.0)}),
    "qwen2": ("Qwen2ForCausalLM", {**RMS, "tie_word_embeddings": True, "rope_parameters": default_rope(3000.0)}),
    "qwen2_window": (
        "Qwen2ForCausalLM",
        {**RMS, "num_hidden_layers": 5, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3}
        | {"rope_parameters": default_rope(3000.0)},
    ),
    "qwen3": ("Qwen3ForCausalLM", {**RMS, "head_dim": 24, "attention_bias": True, "rope_parameters": YARN}),
    "gemma": ("GemmaForCausalLM", {**GEMMA, "head_dim": 24, "num_key_value_heads": 1, "rope_parameters": default_rope(700.0)}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {**GEMMA, "num_hidden_layers": 5, "head_dim": 24, "sliding_window": WINDOW, "query_pre_attn_scalar": 20}
        | {"final_logit_softcapping": 6.0, "attn_logit_softcapping": 4.0, "rope_parameters": default_rope(700.0)},
    ),
    "gemma3": ("Gemma3ForCausalLM", GEMMA3),
    "gemma3_vision": (
        "Gemma3ForConditionalGeneration",
        {"text_config": GEMMA3, "vision_config": VISION, "mm_tokens_per_image": 1}
        | {"image_token_index": 127, "boi_token_index": 126, "eoi_token_index": 125},
    ),
    "phi3_window": ("Phi3ForCausalLM", {**RMS, "sliding_window": WINDOW, "rope_parameters": default_rope(900.0)}),
    "phi3_long": ("Phi3ForCausalLM", {**RMS, "original_max_position_embeddings": 32, "rope_parameters": longrope(32)}),
    "phi3_short": (
        "Phi3ForCausalLM",
        {**RMS, "original_max_position_embeddings": 96, "rope_parameters": longrope(96), "tie_word_embeddings": True},
    ),
    "olmo2": ("Olmo2ForCausalLM", {**RMS, "rope_parameters": default_rope(900.0)}),
    "olmo3": (
        "Olmo3ForCausalLM",
        {**RMS, "num_hidden_layers": 6, "sliding_window": WINDOW}
        | {
            "rope_parameters": {
                "full_attention": {**YARN, "rope_theta": 5e5, "attention_factor": 1.2},
                "sliding_attention": default_rope(5e5),
            }
        },
    ),
    "smollm3": ("SmolLM3ForCausalLM", {**RMS, "num_hidden_layers": 5, "rope_parameters": default_rope(900.0)}),
    "smollm3_window": (
        "SmolLM3ForCausalLM",
        {**RMS, "num_hidden_layers": 6, "no_rope_layers": [1, 0, 1, 1, 0, 1], "use_sliding_window": True, "sliding_window": WINDOW}
        | {"rope_parameters": default_rope(900.0), "tie_word_embeddings": False},
    ),
    "granite": (
        "GraniteForCausalLM",
        {
            **RMS,
            "rms_norm_eps": 1e-3,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.6,
            "logits_scaling": 0.7,
        }
        | {"rope_parameters": default_rope(900.0)},
    ),
    "cohere": ("CohereForCausalLM", {**COMMON, "attention_bias": True, "logit_scale": 0.6, "rope_parameters": default_rope(900.0)}),
    "cohere_qk_norm": (
        "CohereForCausalLM",
        {**COMMON, "use_qk_norm": True, "logit_scale": 0.8, "layer_norm_eps": 0.01, "rope_parameters": default_rope(900.0)},
    ),
    "cohere2": (
        "Cohere2ForCausalLM",
        {**COMMON, "num_hidden_layers": 6, "sliding_window": WINDOW, "logit_scale": 0.6, "rope_parameters": default_rope(900.0)},
    ),
    "stablelm": ("StableLmForCausalLM", {**COMMON, "use_qkv_bias": True, "rope_parameters": default_rope(90.0, partial_rotary_factor=0.5)}),
    "stablelm_parallel": (
        "StableLmForCausalLM",
        {**COMMON, "use_parallel_residual": True, "qk_layernorm": True, "layer_norm_eps": 0.01, "rope_parameters": default_rope(900.0)},
    ),
    "starcoder2": ("Starcoder2ForCausalLM", {**COMMON, "sliding_window": WINDOW, "rope_parameters": default_rope(900.0)}),
    "starcoder2_plain": (
        "Starcoder2ForCausalLM",
        {**COMMON, "use_bias": False, "tie_word_embeddings": False, "hidden_act": "gelu", "norm_epsilon": 0.01}
        | {"rope_parameters": {"rope_type": "linear", "rope_theta": 900.0, "factor": 3.0}},
    ),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2_unscaled": ("GPT2LMHeadModel", {**GPT2, "n_inner": 80, "scale_attn_weights": False, "layer_norm_epsilon": 0.01}),
    "gpt_neox": ("GPTNeoXForCausalLM", {**NO_GROUPS, "rope_parameters": default_rope(90.0, partial_rotary_factor=0.25)}),
    "gpt_neox_serial": (
        "GPTNeoXForCausalLM",
        {**NO_GROUPS, "attention_bias": False, "use_parallel_residual": False, "layer_norm_eps": 0.01, "tie_word_embeddings": True}
        | {"hidden_act": "gelu_new", "rope_parameters": default_rope(900.0, partial_rotary_factor=1.0)},
    ),
    "internlm": (
        "InternLMForCausalLM",
        {**INTERNLM, "bias": True, "max_position_embeddings": 128, "rotary": {"base": 900, "type": "dynamic"}},
    ),
    "internlm2": (
        "InternLM2ForCausalLM",
        {**INTERNLM, "num_key_value_heads": 2, "bias": False, "max_position_embeddings": 40, "rope_theta": 900.0}
        | {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "attn_implementation": "eager"},
    ),
    "internlm3": (
        "InternLM3ForCausalLM",
        {**INTERNLM, "num_key_value_heads": 2, "head_dim": 24, "qkv_bias": True, "bias": False, "rope_theta": 900.0}
        | {"max_position_embeddings": 40, "rope_scaling": {"rope_type": "dynamic", "factor": 6.0}},
    ),
    "exaone": ("ExaoneForCausalLM", EXAONE),
    "exaone4": (
        "Exaone4ForCausalLM",
        {**RMS, "num_hidden_layers": 6, "head_dim": 24, "sliding_window": WINDOW, "rope_parameters": LLAMA3},
    ),
    "exaone4_full": (
        "Exaone4ForCausalLM",
        {**RMS, "sliding_window": None, "sliding_window_pattern": None}
        | {"layer_types": ["full_attention"] * 4, "rope_parameters": default_rope(900.0), "tie_word_embeddings": True},
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {**RMS, "num_hidden_layers": 6, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "decoder_sparse_step": 2}
        | {"shared_expert_intermediate_size": 56, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 5}
        | {"rope_parameters": default_rope(3000.0)},
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {**RMS, "head_dim": 24, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True}
        | {"mlp_only_layers": [1], "rope_parameters": default_rope(3000.0)},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {**COMMON, "num_key_value_heads": 4, "num_hidden_layers": 4, "first_k_dense_replace": 1, "moe_intermediate_size": 40}
        | {"n_routed_experts": 12, "num_experts_per_tok": 3, "n_shared_experts": 2, "n_group": 4, "topk_group": 2, "rms_norm_eps": 1e-5}
        | {"q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 20}
        | {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}, "num_nextn_predict_layers": 0},
    ),
    "deepseek_v3_plain": (  # as Kimi-K2: one group; and queries without a latent
        "DeepseekV3ForCausalLM",
        {**COMMON, "num_key_value_heads": 4, "num_hidden_layers": 3, "first_k_dense_replace": 0, "moe_intermediate_size": 40}
        | {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}
        | {"q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 12, "v_head_dim": 8}
        | {"attention_bias": True, "routed_scaling_factor": 1.5, "rope_parameters": default_rope(900.0), "num_nextn_predict_layers": 0},
    ),
    "llama4": ("Llama4ForCausalLM", LLAMA4),
    "llama4_vision": (
        "Llama4ForConditionalGeneration",
        {"text_config": {**LLAMA4, "num_hidden_layers": 4, "no_rope_layer_interval": 2, "moe_layers": [1, 2], **LLAMA4_PLAIN}}
        | {"vision_config": {**VISION, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}}
        | {"image_token_index": 127, "boi_token_index": 126, "eoi_token_index": 125},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        {**RMS, "head_dim": 24, "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": WINDOW}
        | {"rope_parameters": {**YARN, "truncate": False}},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        {**RMS, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": WINDOW, "rope_parameters": default_rope(900.0)},
    ),
}


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): uint64 -> uint64."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def uniform(shape: tuple[int, ...], key: str) -> np.ndarray:
    """float32 from -1 to 1, the same on every machine: a hash of key and element number."""
    start = _mixed(np.array([zlib.crc32(key.encode())], np.uint64))
    with np.errstate(over="ignore"):
        bits = _mixed(start + np.arange(1, math.prod(shape) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return ((bits >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)).reshape(shape)


def weights(shapes: dict[str, list[int]], model: str) -> dict[str, np.ndarray]:
    """Tensor name -> float32. Norms and biases vary, attention is peaked, logits span several units."""
    center = 0.0 if model.startswith("gemma") else 1.0  # a Gemma norm stores what is added to 1
    tied = not any(name in shapes for name in ("lm_head.weight", "embed_out.weight", "output.weight"))
    tensors = {}
    for name, shape in shapes.items():
        value = uniform(tuple(shape), f"{model}/{name}")
        if name.endswith("bias"):
            value = value * 0.4
        elif len(shape) == 1 or "_norm" in name:
            value = value * 0.5 + center + (0.4 if any(s in name for s in ("q_norm", "k_norm", "_layernorm.norms")) else 0.0)
        elif any(part in name for part in ("embed", "wte", "wpe", "lm_head", "output.weight")):
            value = value * (0.2 if model.startswith("gemma") else 0.5 if tied else 0.7)  # Gemma scales its embeddings by 8
        elif name.endswith("experts.gate_up_proj") and model.startswith("gpt_oss"):
            value = value * 8.0 / shape[-2] ** 0.5  # so that its limits act
        else:
            attends = any(part in name for part in ("q_proj", "q_b_proj", "k_proj", "qkv", "query_key_value", "c_attn"))
            value = value * (2.5 if attends else 1.7) / shape[-1] ** 0.5
        tensors[name] = np.ascontiguousarray(value, np.float32)
    return tensors


def names() -> list[str]:
    return list(MODELS)


def golden(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """(config.json, tensors, ids int32 [70], logits float32 [70, 128]) of one model."""
    with np.load(FILE) as data:
        config, shapes = (json.loads(str(data[f"{name}/{part}"])) for part in ("config", "shapes"))
        return config, weights(shapes, name), data[f"{name}/ids"], data[f"{name}/logits"]


def to_v4(config: dict[str, Any], architecture: str = "") -> dict[str, Any]:
    """A config.json of transformers 5 as transformers 4 spells it."""
    architecture = architecture or config["architectures"][0]
    old = dict(config)
    if "text_config" in config:
        text = to_v4(config["text_config"], architecture.replace("ConditionalGeneration", "CausalLM"))
        vision = {name: value for name, value in config["vision_config"].items() if name != "rope_parameters"}
        return old | {"text_config": text, "vision_config": vision}
    if "dtype" in old:
        old["torch_dtype"] = old.pop("dtype")
    if architecture in ("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Cohere2ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        del old["layer_types"]
    if architecture == "Cohere2ForCausalLM":
        old["sliding_window_pattern"] = 4
    if architecture == "Gemma3ForCausalLM":
        old["sliding_window_pattern"] = old.pop("_sliding_window_pattern")
    rope = old.pop("rope_parameters", None)
    if rope is None:
        return old
    if "full_attention" in rope:
        if architecture == "Gemma3ForCausalLM":
            old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    rope = dict(rope)
    neox = architecture == "GPTNeoXForCausalLM"
    old["rotary_emb_base" if neox else "rope_theta"] = rope.pop("rope_theta")
    if (partial := rope.pop("partial_rotary_factor", None)) is not None:
        old["rotary_pct" if neox else "partial_rotary_factor"] = partial
    kind = rope.pop("rope_type")
    if kind == "longrope":
        del rope["original_max_position_embeddings"]
    # "type" came first; transformers 5 no longer understands it where layer types have ropes of their own.
    key = "rope_type" if kind == "llama3" or architecture in ("Gemma3ForCausalLM", "Olmo3ForCausalLM") else "type"
    old["rope_scaling"] = None if kind == "default" else {key: kind, **rope}
    return old
