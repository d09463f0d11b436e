"""A Hugging Face config.json for a ModelConfig: the inverse of hf_config. Imports no jax.

The tables of hf_config are read backwards for one architecture after the other; the first whose config.json reads back as the very
same ModelConfig is taken. The dialect is that of transformers 4, which 5 reads too."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from llminfer.config import ModelConfig, Rope
from llminfer.errors import UserError
from llminfer.weights import hf_config
from llminfer.weights.hf_config import FAMILIES, Family, from_hf
from llminfer.weights.hf_rope import FULL, SLIDING

# Architectures that transformers has itself, plainest first -> model_type.
MODEL_TYPES = {
    **{"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"},
    **{"GemmaForCausalLM": "gemma", "Gemma2ForCausalLM": "gemma2", "Gemma3ForCausalLM": "gemma3_text", "Phi3ForCausalLM": "phi3"},
    **{"Olmo2ForCausalLM": "olmo2", "Olmo3ForCausalLM": "olmo3", "SmolLM3ForCausalLM": "smollm3", "GraniteForCausalLM": "granite"},
    **{"StableLmForCausalLM": "stablelm", "Starcoder2ForCausalLM": "starcoder2", "GPT2LMHeadModel": "gpt2"},
    **{"GPTNeoXForCausalLM": "gpt_neox", "Exaone4ForCausalLM": "exaone4"},
    **{"CohereForCausalLM": "cohere", "Cohere2ForCausalLM": "cohere2"},
    **{"MixtralForCausalLM": "mixtral", "Qwen2MoeForCausalLM": "qwen2_moe", "Qwen3MoeForCausalLM": "qwen3_moe"},
    **{"GptOssForCausalLM": "gpt_oss", "DeepseekV3ForCausalLM": "deepseek_v3", "Llama4ForCausalLM": "llama4_text"},
}
# Readings of layers whose window and type are both written.
BY_TYPE = (hf_config._alternating, hf_config._qwen, hf_config._rope_where_sliding, hf_config._smollm3, hf_config._cohere2)
BY_TYPE += (hf_config._qwen2_moe,)
SWITCHED = (hf_config._qwen, hf_config._smollm3, hf_config._qwen2_moe)
ACTIVATIONS = {"clamped": "silu", "silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def to_hf(c: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json of a model whose weights are of this dtype. Raises UserError where no architecture of transformers is this model."""
    for architecture, model_type in MODEL_TYPES.items():
        family = FAMILIES[architecture]
        own = {name: own for own, name in family.names.items()}
        fields = {own.get(name, name): value for name, value in _fields(c, architecture, family).items()}
        data = {"architectures": [architecture], "model_type": model_type, "torch_dtype": dtype, **fields}
        try:
            if dataclasses.replace(from_hf(data, c.name)) == c:
                return data
        except UserError:
            continue
    raise UserError(f"{c.name}: no architecture that is written as safetensors has these shapes and constants; legal: orbax")


def _fields(c: ModelConfig, architecture: str, family: Family) -> dict[str, Any]:
    """The fields in Llama's names."""
    fields: dict[str, Any] = {
        **{"vocab_size": c.vocab_size, "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size},
        **{"num_hidden_layers": c.num_layers, "num_attention_heads": c.num_heads, "max_position_embeddings": c.max_position},
        **{"rms_norm_eps": c.norm_eps, "tie_word_embeddings": c.tie_embeddings, "bos_token_id": c.bos_id},
        "pad_token_id": None,  # the default of some classes is beyond a small vocabulary
        "eos_token_id": c.eos_ids[0] if len(c.eos_ids) == 1 else list(c.eos_ids) or None,
        "hidden_activation" if family.more is hf_config._gemma else "hidden_act": ACTIVATIONS[c.activation],
    }
    if c.num_kv_heads != c.num_heads or "num_key_value_heads" in family.defaults:
        fields["num_key_value_heads"] = c.num_kv_heads
    if c.head_dim * c.num_heads != c.hidden_size or "head_dim" in family.defaults:
        fields["head_dim"] = c.head_dim
    for flag, switched in family.flags.items():
        fields[flag] = all(getattr(c, name) for name in switched)
    for number, name in family.numbers.items():
        value = getattr(c, name)
        fields[number] = c.head_dim**-0.5 if value is None and name == "attn_scale" else value
    return fields | _ropes(c, family) | _layers(c, family) | EXTRA.get(architecture, lambda c: {})(c)


def _layers(c: ModelConfig, family: Family) -> dict[str, Any]:
    """The windows of layers, and which have a rotary embedding."""
    window = max(c.windows)
    if family.layers is hf_config._all_slide:
        return {"sliding_window": window or None}
    if family.layers is hf_config._where_switched:
        return {"sliding_window": window or None, "use_sliding_window": window > 0}
    if family.layers not in BY_TYPE:
        return {}
    rotary = {"no_rope_layers": [int(c.rope(i) >= 0) for i in range(c.num_layers)]} if family.layers is hf_config._smollm3 else {}
    types = [SLIDING if c.window(i) else FULL for i in range(c.num_layers)]
    switch = {"use_sliding_window": window > 0} if family.layers in SWITCHED else {}
    return {**rotary, **switch, "sliding_window": window or None, "layer_types": types}


def _ropes(c: ModelConfig, family: Family) -> dict[str, Any]:
    if not c.ropes:
        return {}
    local = [c.ropes[c.rope(i)] for i in range(c.num_layers) if c.window(i) and c.rope(i) >= 0]
    others = [c.ropes[c.rope(i)] for i in range(c.num_layers) if not c.window(i) and c.rope(i) >= 0]
    rope = (others or local)[0]
    fields: dict[str, Any] = {"rope_theta": rope.theta}
    if family.rope_by_type:
        fields["rope_local_base_freq"] = (local or others)[0].theta
    if family.partial_rotary:
        fields["partial_rotary_factor"] = 1.0 if rope.dim is None else rope.dim / c.head_dim
    if rope.kind == "dynamic":  # the limit of the stretched model follows from it
        fields["max_position_embeddings"] = rope.original_max_position
    if rope.kind == "longrope":
        fields["original_max_position_embeddings"] = rope.original_max_position
    return fields | ({} if rope.kind == "default" else {"rope_scaling": _scaling(rope)})


def _scaling(rope: Rope) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind == "longrope":
        factors = {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
        return {**scaling, "type": "longrope", **factors, "attention_factor": rope.attention_factor}
    scaling["factor"] = rope.factor
    if rope.kind in ("yarn", "llama3"):
        scaling["original_max_position_embeddings"] = rope.original_max_position
    if rope.kind == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        scaling["attention_factor"] = rope.attention_factor
    return scaling


def _experts(c: ModelConfig) -> dict[str, Any]:
    sizes = {"num_experts": c.num_experts, "num_experts_per_tok": c.experts_per_token, "moe_intermediate_size": c.moe_intermediate_size}
    dense = [i for i in range(c.num_layers) if not c.has_experts(i)]
    return {**sizes, "norm_topk_prob": c.norm_topk, "mlp_only_layers": dense}


def _local_experts(c: ModelConfig) -> dict[str, Any]:
    return {"num_local_experts": c.num_experts, "num_experts_per_tok": c.experts_per_token}


def _deepseek(c: ModelConfig) -> dict[str, Any]:
    sizes = {"kv_lora_rank": c.kv_rank, "q_lora_rank": c.q_rank or None, "v_head_dim": c.value_dim, "qk_rope_head_dim": c.rope_head_dim}
    sizes |= {"qk_nope_head_dim": c.head_dim - c.rope_head_dim, "num_key_value_heads": c.num_heads}
    router = {"n_group": c.router_groups, "topk_group": c.router_groups_used, "routed_scaling_factor": c.routed_scale}
    shared = {"n_shared_experts": c.shared_intermediate_size // (c.moe_intermediate_size or 1), "norm_topk_prob": c.norm_topk}
    counts = {"n_routed_experts": c.num_experts, "num_experts_per_tok": c.experts_per_token, "first_k_dense_replace": c.dense_layers}
    rope, larger = c.ropes[0], ((c.attn_scale or c.head_dim**-0.5) * c.head_dim**0.5) ** 0.5
    weight = round((larger - 1) / (0.1 * math.log(rope.factor)), 9) if rope.kind == "yarn" else 0
    scaling = {"rope_scaling": {**_scaling(rope), "mscale_all_dim": weight}} if weight else {}
    widths = {"moe_intermediate_size": c.moe_intermediate_size, "head_dim": c.rope_head_dim}
    return {**sizes, **router, **shared, **counts, **widths, **scaling}


def _llama4(c: ModelConfig) -> dict[str, Any]:
    layers = range(c.num_layers)
    kinds = ["chunked_attention" if c.window(i) else FULL for i in layers]
    types = {"layer_types": kinds, "no_rope_layers": [int(c.rope(i) >= 0) for i in layers], "attention_chunk_size": max(c.windows) or None}
    tuned = {"attn_temperature_tuning": c.query_floor > 0, "use_qk_norm": c.qk_norm == "unit"}
    tuned |= {"floor_scale": c.query_floor, "attn_scale": c.query_scale} if c.query_floor else {}
    widths = {"intermediate_size": c.moe_intermediate_size or c.intermediate_size, "intermediate_size_mlp": c.intermediate_size}
    return {**_local_experts(c), **widths, **types, **tuned, "moe_layers": [i for i in layers if c.has_experts(i)]}


def _gemma(c: ModelConfig) -> dict[str, Any]:
    scalar = c.head_dim if c.attn_scale is None else round(c.attn_scale**-2, 6)
    return {"query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar}


# Architecture -> what its functions in hf_config read beside the tables.
EXTRA: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "Gemma2ForCausalLM": _gemma,
    "Gemma3ForCausalLM": _gemma,
    "GraniteForCausalLM": lambda c: {"logits_scaling": round(1 / c.logit_scale, 9)},
    "StableLmForCausalLM": lambda c: {"qk_layernorm": c.qk_norm == "heads"},
    "CohereForCausalLM": lambda c: {"use_qk_norm": c.qk_norm == "heads"},
    "GPT2LMHeadModel": lambda c: {"scale_attn_weights": c.attn_scale is None},
    **dict.fromkeys(("MixtralForCausalLM", "GptOssForCausalLM"), _local_experts),
    "Qwen2MoeForCausalLM": lambda c: {**_experts(c), "shared_expert_intermediate_size": c.shared_intermediate_size},
    "Qwen3MoeForCausalLM": _experts,
    "DeepseekV3ForCausalLM": _deepseek,
    "Llama4ForCausalLM": _llama4,
}
