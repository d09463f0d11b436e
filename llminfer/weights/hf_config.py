"""ModelConfig from a Hugging Face config.json, in the spelling of transformers 4 or 5, for every family. Imports no jax.

Source of field names and defaults: the config classes of transformers 5, and of the repositories whose code comes with the
checkpoint (InternLM, EXAONE 3). A field that would change the result and is not read here is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llminfer.config import LIMITS, ModelConfig, Rope
from llminfer.errors import refuse, require_integer
from llminfer.weights.hf_dialects import deepseek_head, gemma3_text, gpt2_inner, gpt_oss_rope, internlm_rotary, llama4_text
from llminfer.weights.hf_experts import deepseek, experts, llama4
from llminfer.weights.hf_fields import Fields
from llminfer.weights.hf_rope import FULL, SLIDING, read_ropes

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu"} | dict.fromkeys(
    ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_tanh"
)
# Of LlamaConfig, where a field is absent.
DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# model_type -> the architecture of a checkpoint that transformers 5 saves as a Llama's, since it runs it with its Llama.
AS_LLAMA = {"exaone": "ExaoneForCausalLM", "internlm3": "InternLM3ForCausalLM"}
# A layer: its type (FULL or SLIDING), and whether it has a rotary embedding.
Layers = list[tuple[str, bool]]


@dataclass(frozen=True)
class Family:
    """How one architecture says what it is.

    defaults: of its config class, beside DEFAULTS; names: its own field names -> Llama's; fields: of ModelConfig, the same in all its
    models; flags: config.json flag -> the ModelConfig fields it switches on; numbers: config.json number -> ModelConfig field;
    only: config.json field -> the value it must have where it is given; ignored: fields it carries but does not use; layers: the
    type of each layer; more: further fields of ModelConfig; prepare: config.json -> the same in Llama's terms; rope_by_type: sliding
    layers have their own rotary embedding; partial_rotary: only a part of a head may be rotated."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    numbers: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    layers: Callable[[Fields, int], Layers] = lambda f, count: [(FULL, True)] * count
    more: Callable[[Fields, dict[str, Any]], dict[str, Any]] = lambda f, sizes: {}
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = lambda data: data
    rope_by_type: bool = False
    partial_rotary: bool = False


def from_hf(data: dict[str, Any], name: str) -> ModelConfig:
    """ModelConfig from the contents of a Hugging Face config.json (transformers 4 and 5 spelling). Raises UserError."""
    architecture = architecture_of(data)
    family = FAMILIES[architecture]
    f = Fields(family.prepare(data), {**DEFAULTS, **family.defaults}, family.names)
    sizes = _sizes(f)
    layers = family.layers(f, sizes["num_layers"])
    ropes: dict[str, Rope] = {}
    if any(rotary for _, rotary in layers):
        ropes, sizes["max_position"] = read_ropes(f, family.rope_by_type, sizes["head_dim"], sizes["max_position"])
        if not family.partial_rotary and any(rope.dim is not None for rope in ropes.values()):
            raise refuse("partial_rotary_factor", ropes[FULL].dim, f"a part of a head only: not supported for {architecture}")
    fields: dict[str, Any] = {**sizes, **_pattern(f, layers, ropes, sizes["max_position"]), **family.fields}
    fields |= {"norm_eps": f.number("rms_norm_eps"), "tie_embeddings": f.flag("tie_word_embeddings")}
    fields |= {"bos_id": next(iter(_tokens(f, "bos_token_id", sizes)), None), "eos_ids": _tokens(f, "eos_token_id", sizes)}
    for flag, switched in family.flags.items():
        fields |= dict.fromkeys(switched, f.flag(flag))
    for number, target in family.numbers.items():
        value = f.number(number)
        fields |= {target: value} if value is not None else {}
    fields |= family.more(f, fields)
    if fields.get("attn_scale") == fields["head_dim"] ** -0.5:
        fields["attn_scale"] = None
    if "activation" not in fields:
        fields["activation"] = ACTIVATIONS[f.one_of("hidden_act", ACTIVATIONS)]
    for field_name, value in family.only.items():
        if f.has(field_name) and f.value(field_name) != value:
            raise f.refuse(field_name, f.value(field_name), f"not supported for {architecture}; legal: {value}")
    f.ignore((*family.only, *family.ignored))
    f.refuse_unread(architecture)
    return ModelConfig(name=name, **fields)


def architecture_of(data: Any) -> str:
    """The supported architecture that a config.json names. Raises UserError that lists them all."""
    if not isinstance(data, dict):
        raise refuse("config.json", type(data).__name__, "must be a JSON object")
    named = data.get("architectures")
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else "none"
    if architecture == "LlamaForCausalLM":
        model_type = data.get("model_type")
        architecture = AS_LLAMA.get(model_type, architecture) if isinstance(model_type, str) else architecture
    if architecture not in FAMILIES:
        experts = "moe" in architecture.lower() or "Mixtral" in architecture or data.get("num_experts") or data.get("num_local_experts")
        why = "models with experts are not supported yet" if experts else "not supported"
        raise refuse("architectures", architecture, f"{why}; legal: {', '.join(FAMILIES)}")
    return architecture


def _sizes(f: Fields) -> dict[str, int]:
    sizes = {
        "vocab_size": f.required("vocab_size"),
        "hidden_size": f.required("hidden_size"),
        "intermediate_size": f.required("intermediate_size"),
        "num_layers": f.required("num_hidden_layers"),
        "num_heads": f.required("num_attention_heads"),
        "max_position": f.required("max_position_embeddings"),
    }
    heads = sizes["num_heads"]
    sizes["num_kv_heads"] = f.integer("num_key_value_heads") or heads
    sizes["head_dim"] = f.integer("head_dim") or sizes["hidden_size"] // heads
    if not f.integer("head_dim") and sizes["hidden_size"] % heads:
        raise f.refuse("num_attention_heads", heads, f"must divide hidden_size={sizes['hidden_size']}")
    for name, value in sizes.items():
        require_integer(name, value, 1, LIMITS[name])
    return sizes


def _tokens(f: Fields, name: str, sizes: dict[str, int]) -> tuple[int, ...]:
    """A token id or a list of them. A default that this vocabulary does not reach is none."""
    value = f.value(name)
    tokens = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int for token in tokens):
        raise f.refuse(name, value, "must be an integer or a list of integers")
    return tuple(token for token in tokens if f.has(name) or token < sizes["vocab_size"])


def _pattern(f: Fields, layers: Layers, ropes: dict[str, Rope], max_position: int) -> dict[str, Any]:
    """windows, ropes, rope_layers: the shortest pattern that gives these layers when it is repeated; ropes in order of first use.
    A window that no position leaves is none."""
    slides = any(kind == SLIDING for kind, _ in layers)
    window = f.integer("sliding_window", 1, LIMITS["max_position"]) if slides else 0
    if window is None:
        raise f.refuse("sliding_window", None, "must be given, since layers slide")
    window = 0 if window >= max_position else window
    used = list(dict.fromkeys(ropes[kind] for kind, rotary in layers if rotary))
    plan = [(window if kind == SLIDING else 0, used.index(ropes[kind]) if rotary else -1) for kind, rotary in layers]
    period = next(p for p in range(1, len(plan) + 1) if all(plan[i] == plan[i - p] for i in range(p, len(plan))))
    windows, numbers = zip(*plan[:period], strict=True)
    shortest = lambda values: values[:1] if len(set(values)) == 1 else values
    return {"windows": shortest(windows), "ropes": tuple(used), "rope_layers": shortest(numbers)}


def _types(f: Fields, count: int, default: list[str]) -> list[str]:
    """`layer_types`, or the default where the file has none."""
    types = f.items("layer_types", count) or default
    f.ignore(("sliding_window", "sliding_window_pattern"))
    for kind in types:
        if kind not in (FULL, SLIDING):
            raise f.refuse("layer_types", kind, f"not supported; legal: {FULL}, {SLIDING}")
    return types


def _every(f: Fields, count: int) -> list[str]:
    """All layers slide but each last of `sliding_window_pattern`, a number; or a text of L and G, then the last layer does not slide."""
    pattern = f.value("sliding_window_pattern")
    if isinstance(pattern, str) and 0 < len(pattern) <= 1024 and not pattern.strip("LG"):
        return [SLIDING if pattern[i % len(pattern)] == "L" and i < count - 1 else FULL for i in range(count)]
    every = f.integer("sliding_window_pattern", 0, 1024) or 1
    return [SLIDING if (i + 1) % every else FULL for i in range(count)]


def _all_slide(f: Fields, count: int) -> Layers:
    return [(SLIDING if f.value("sliding_window") is not None else FULL, True)] * count


def _alternating(f: Fields, count: int) -> Layers:
    return [(kind, True) for kind in _types(f, count, _every(f, count))]


def _qwen(f: Fields, count: int) -> Layers:
    """The window is used only where use_sliding_window says so, then in the layers from max_window_layers on."""
    first = f.integer("max_window_layers", 0) or 0
    slides = f.flag("use_sliding_window") and f.value("sliding_window") is not None
    types = _types(f, count, [SLIDING if slides and i >= first else FULL for i in range(count)])
    if not slides and SLIDING in types:
        raise f.refuse("layer_types", SLIDING, "needs use_sliding_window and sliding_window")
    return [(kind, True) for kind in types]


def _rope_where_sliding(f: Fields, count: int) -> Layers:
    """Full layers have no rotary embedding, unless no layer may slide."""
    if f.value("sliding_window") is None:
        return [(kind, True) for kind in _types(f, count, [FULL] * count)]
    return [(kind, kind == SLIDING) for kind in _types(f, count, _every(f, count))]


def _cohere2(f: Fields, count: int) -> Layers:
    return [(kind, kind == SLIDING) for kind in _types(f, count, _every(f, count))]


def _rotary(f: Fields, count: int) -> list[int]:
    """no_rope_layers: 1 where a layer has a rotary embedding, 0 where not."""
    interval = f.integer("no_rope_layer_interval") or 1
    given = f.items("no_rope_layers", count) if f.value("no_rope_layers") else None
    rotary = given or [int((i + 1) % interval != 0) for i in range(count)]
    if any(type(x) is not int or x not in (0, 1) for x in rotary):
        raise f.refuse("no_rope_layers", rotary, "must be a list of 1 (with rope) and 0 (without)")
    return rotary


def _smollm3(f: Fields, count: int) -> Layers:
    rotary = _rotary(f, count)
    slides = f.flag("use_sliding_window") and f.value("sliding_window") is not None
    types = _types(f, count, [SLIDING if slides and not x else FULL for x in rotary])
    if not slides and SLIDING in types:
        raise f.refuse("layer_types", SLIDING, "needs use_sliding_window and sliding_window")
    return list(zip(types, map(bool, rotary), strict=True))


def _gemma(f: Fields, fields: dict[str, Any]) -> dict[str, Any]:
    """In Gemma's first files gelu means its approximation by tanh."""
    own = f.has("hidden_activation")
    named = f.one_of("hidden_activation" if own else "hidden_act", ACTIVATIONS)
    scalar = f.number("query_pre_attn_scalar")
    return {
        "activation": "gelu_tanh" if named == "gelu" and not own else ACTIVATIONS[named],
        "embed_scale": fields["hidden_size"] ** 0.5,
        "attn_scale": None if scalar is None else scalar**-0.5,
    }


def _where_switched(f: Fields, count: int) -> Layers:
    """All layers slide where use_sliding_window says so."""
    return [(SLIDING if f.flag("use_sliding_window") and f.value("sliding_window") is not None else FULL, True)] * count


def _qwen2_moe(f: Fields, count: int) -> Layers:
    """Where the window is used, every second layer before max_window_layers slides."""
    first, slides = f.integer("max_window_layers", 0) or 0, f.flag("use_sliding_window") and f.value("sliding_window") is not None
    types = _types(f, count, [SLIDING if slides and i % 2 == 0 and i < first else FULL for i in range(count)])
    if not slides and SLIDING in types:
        raise f.refuse("layer_types", SLIDING, "needs use_sliding_window and sliding_window")
    return [(kind, True) for kind in types]


def _llama4(f: Fields, count: int) -> Layers:
    """no_rope_layers as SmolLM3's; layers with a rotary embedding attend by chunks, where their size is given."""
    rotary = _rotary(f, count)
    chunks = f.value("sliding_window") is not None
    return list(zip(_types(f, count, [SLIDING if x and chunks else FULL for x in rotary]), map(bool, rotary), strict=True))


def _no_rope(f: Fields, count: int) -> Layers:
    return [(FULL, False)] * count


ATTENTION_BIAS = {"attention_bias": ("qkv_bias", "o_bias")}
LLAMA_BIAS = {**ATTENTION_BIAS, "mlp_bias": ("mlp_bias",)}
LAYER_NORM = {"norm": "layer", "norm_bias": True}
GEMMA_TOKENS = {"bos_token_id": 2, "eos_token_id": 1, "tie_word_embeddings": True}
QWEN2 = Family(
    {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
    | {"bos_token_id": None, "eos_token_id": None},
    fields={"qkv_bias": True},
    layers=_qwen,
)
GEMMA2 = Family(
    {"num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192, "sliding_window": 4096, "sliding_window_pattern": 2}
    | {"hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256}
    | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, **GEMMA_TOKENS},
    fields={"norm_offset": 1.0, "post_norm": True},
    flags=ATTENTION_BIAS,
    numbers={"final_logit_softcapping": "logit_softcap", "attn_logit_softcapping": "attn_softcap"},
    ignored=("hidden_act",),
    layers=_alternating,
    more=_gemma,
)
MOE: dict[str, Any] = dict(names={"num_local_experts": "num_experts"}, more=experts)
TRAINING = ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
GEMMA3_SIZES = {"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8}
GEMMA3: dict[str, Any] = dict(
    defaults={**GEMMA2.defaults, **GEMMA3_SIZES, "max_position_embeddings": 131072, "sliding_window_pattern": 6}
    | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "final_logit_softcapping": None, "attn_logit_softcapping": None},
    fields={**GEMMA2.fields, "qk_norm": "head"},
    flags=GEMMA2.flags,
    numbers=GEMMA2.numbers,
    ignored=("hidden_act",),
    layers=_alternating,
    more=_gemma,
    rope_by_type=True,
)
OLMO: dict[str, Any] = dict(
    fields={"pre_norm": False, "post_norm": True, "qk_norm": "full"},
    flags=ATTENTION_BIAS,
)
OLMO_DEFAULTS = {"rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": 50279}
LLAMA4 = Family(
    {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 5e5}
    | {"intermediate_size_mlp": 16384, "num_experts": 16, "num_experts_per_tok": 1, "sliding_window": 8192, "use_qk_norm": True}
    | {"no_rope_layer_interval": 4, "attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1},
    names={"num_local_experts": "num_experts", "attention_chunk_size": "sliding_window"},
    flags=ATTENTION_BIAS,
    ignored=("for_llm_compressor", *TRAINING),
    layers=_llama4,
    more=llama4,
    prepare=llama4_text,
)
COHERE_DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "logit_scale": 0.0625, "tie_word_embeddings": True} | {
    "bos_token_id": 5,
    "eos_token_id": 255001,
}
COHERE: dict[str, Any] = dict(
    names={"layer_norm_eps": "rms_norm_eps", "layer_switch": "sliding_window_pattern"},
    fields={"norm": "layer", "parallel": True, "shared_norm": True},
    flags=ATTENTION_BIAS,
    numbers={"logit_scale": "logit_scale"},
)

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(flags=LLAMA_BIAS, ignored=("sliding_window",)),
    "MistralForCausalLM": Family({"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}, layers=_all_slide),
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": Family({**QWEN2.defaults, "head_dim": 128}, fields={"qk_norm": "head"}, flags=ATTENTION_BIAS, layers=_qwen),
    "Qwen2MoeForCausalLM": Family(
        {**QWEN2.defaults, "num_key_value_heads": 16, "shared_expert_intermediate_size": 5632, "moe_intermediate_size": 1408}
        | {"num_experts": 60, "num_experts_per_tok": 4, "qkv_bias": True},
        **MOE,
        flags={"qkv_bias": ("qkv_bias",)},
        layers=_qwen2_moe,
        ignored=TRAINING,
    ),
    "Qwen3MoeForCausalLM": Family(
        {**QWEN2.defaults, "num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
        **MOE,
        fields={"qk_norm": "head"},
        flags=ATTENTION_BIAS,
        layers=_where_switched,
        ignored=("max_window_layers", *TRAINING),
    ),
    "MixtralForCausalLM": Family(
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
        | {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True},
        **MOE,
        layers=_all_slide,
        ignored=TRAINING,
    ),
    "GptOssForCausalLM": Family(
        {"num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 150000.0}
        | {"sliding_window": 128, "sliding_window_pattern": 2, "attention_bias": True, "bos_token_id": None, "eos_token_id": None}
        | {"num_experts": 128, "num_experts_per_tok": 4, "norm_topk_prob": True},
        **MOE,
        fields={"sink_logits": True, "router_bias": "logits", "expert_bias": True, "activation": "clamped"},
        flags=ATTENTION_BIAS,
        only={"hidden_act": "silu", "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        ignored=("initial_context_length", "experts_per_token", *TRAINING),  # in the published files, beside fields that say the same
        layers=_alternating,
        prepare=gpt_oss_rope,
    ),
    "DeepseekV3ForCausalLM": Family(
        {"max_position_embeddings": 4096, "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048}
        | {"n_shared_experts": 1, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "norm_topk_prob": True}
        | {"routed_scaling_factor": 2.5, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
        | {"v_head_dim": 128, "bos_token_id": 0, "eos_token_id": 1},
        names={"n_routed_experts": "num_experts"},
        flags=ATTENTION_BIAS,
        only={"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1, "rope_interleave": True},
        # Further layers that draft tokens are not read; the rest speaks of training, or says again what others say.
        ignored=("num_nextn_predict_layers", "num_mtp_layers", "ep_size", "aux_loss_alpha", "seq_aux", "qk_head_dim", *TRAINING),
        more=deepseek,
        prepare=deepseek_head,
    ),
    "Llama4ForCausalLM": LLAMA4,
    "Llama4ForConditionalGeneration": LLAMA4,
    "GemmaForCausalLM": Family(
        {"num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192, "hidden_act": "gelu", **GEMMA_TOKENS},
        fields={"norm_offset": 1.0},
        flags=ATTENTION_BIAS,
        more=_gemma,
        ignored=("hidden_act",),
    ),
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": Family(**GEMMA3),
    "Gemma3ForConditionalGeneration": Family(**GEMMA3, prepare=gemma3_text),
    "Phi3ForCausalLM": Family(
        {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "eos_token_id": 32000},
        only={"full_attn_mod": 1, "interpolate_factor": 1},
        layers=_all_slide,
        partial_rotary=True,
    ),
    "Olmo2ForCausalLM": Family(OLMO_DEFAULTS, **OLMO),
    "Olmo3ForCausalLM": Family(
        {**OLMO_DEFAULTS, "rope_theta": 5e5, "sliding_window": 4096, "sliding_window_pattern": 4},
        **OLMO,
        layers=_alternating,
        rope_by_type=True,
    ),
    "SmolLM3ForCausalLM": Family(
        {"num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6, "no_rope_layer_interval": 4}
        | {"bos_token_id": 128000, "eos_token_id": 128001, "tie_word_embeddings": True},
        flags=LLAMA_BIAS,
        layers=_smollm3,
        ignored=("max_window_layers",),
    ),
    "GraniteForCausalLM": Family(
        {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0},
        flags=LLAMA_BIAS,
        numbers={"embedding_multiplier": "embed_scale", "residual_multiplier": "residual_scale", "attention_multiplier": "attn_scale"},
        more=lambda f, fields: {"logit_scale": 1 / (f.number("logits_scaling") or 1.0)},
    ),
    "CohereForCausalLM": Family(
        {**COHERE_DEFAULTS, "rope_theta": 5e5},
        **COHERE,
        more=lambda f, fields: {"qk_norm": "heads" if f.flag("use_qk_norm") else ""},
    ),
    "Cohere2ForCausalLM": Family(
        {**COHERE_DEFAULTS, "sliding_window": 4096, "sliding_window_pattern": 4},
        **COHERE,
        layers=_cohere2,
        only={"order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj", "rotary_pct": 1.0}
        | {"use_gated_activation": True, "use_parallel_block": True, "use_embedding_sharing": True},
        ignored=("use_parallel_embedding",),
    ),
    "StableLmForCausalLM": Family(
        {"num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.25}
        | {"bos_token_id": 0, "eos_token_id": 0},
        names={"layer_norm_eps": "rms_norm_eps"},
        fields=LAYER_NORM,
        flags={"use_qkv_bias": ("qkv_bias",), "use_parallel_residual": ("parallel", "shared_norm")},
        more=lambda f, fields: {"qk_norm": "heads" if f.flag("qk_layernorm") else ""},
        partial_rotary=True,
    ),
    "Starcoder2ForCausalLM": Family(
        {"num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "gelu_pytorch_tanh"}
        | {"bos_token_id": 50256, "eos_token_id": 50256, "tie_word_embeddings": True, "use_bias": True},
        names={"norm_epsilon": "rms_norm_eps"},
        fields={**LAYER_NORM, "gated": False},
        flags={"use_bias": ("qkv_bias", "o_bias", "mlp_bias")},
        only={"norm_type": "layer_norm", "mlp_type": "default", "scale_attn_weights": True},
        # Left over from its training code; the model uses hidden_act.
        ignored=("activation_function", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"),
        layers=_all_slide,
    ),
    "GPT2LMHeadModel": Family(
        {"max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "hidden_act": "gelu_new", "scale_attn_weights": True}
        | {"bos_token_id": 50256, "eos_token_id": 50256, "tie_word_embeddings": True},
        names={"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers", "n_inner": "intermediate_size"}
        | {"n_positions": "max_position_embeddings", "layer_norm_epsilon": "rms_norm_eps", "activation_function": "hidden_act"},
        fields={**LAYER_NORM, "gated": False, "qkv_bias": True, "o_bias": True, "mlp_bias": True, "learned_positions": True},
        more=lambda f, fields: {"attn_scale": None if f.flag("scale_attn_weights") else 1.0},
        layers=_no_rope,
        prepare=gpt2_inner,
        ignored=("n_ctx",),
    ),
    "GPTNeoXForCausalLM": Family(
        {"rms_norm_eps": 1e-5, "hidden_act": "gelu", "partial_rotary_factor": 0.25, "bos_token_id": 0}
        | {"attention_bias": True, "use_parallel_residual": True},
        names={"layer_norm_eps": "rms_norm_eps", "rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"},
        fields={**LAYER_NORM, "gated": False, "mlp_bias": True},
        flags={**ATTENTION_BIAS, "use_parallel_residual": ("parallel",)},
        partial_rotary=True,
    ),
    "InternLMForCausalLM": Family(
        {"attention_bias": True}, names={"bias": "attention_bias"}, flags=ATTENTION_BIAS, prepare=internlm_rotary
    ),
    "InternLM2ForCausalLM": Family({"attention_bias": True}, names={"bias": "attention_bias"}, flags=ATTENTION_BIAS),
    "InternLM3ForCausalLM": Family(
        {"num_key_value_heads": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "head_dim": 128},
        names={"qkv_bias": "attention_bias", "bias": "mlp_bias"},
        flags={"attention_bias": ("qkv_bias",), "mlp_bias": ("o_bias", "mlp_bias")},
    ),
    "ExaoneForCausalLM": Family(
        {"num_key_value_heads": 8, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "eos_token_id": 361},
        names={"num_layers": "num_hidden_layers", "layer_norm_epsilon": "rms_norm_eps", "activation_function": "hidden_act"},
    ),
    "Exaone4ForCausalLM": Family(
        {"num_key_value_heads": 32, "rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4, "bos_token_id": 0},
        fields={"pre_norm": False, "post_norm": True, "qk_norm": "head"},
        layers=_rope_where_sliding,
    ),
}
ARCHITECTURES = tuple(FAMILIES)
