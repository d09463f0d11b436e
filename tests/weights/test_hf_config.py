"""config.json of every family, in both dialects; whatever would change the result and is not known is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fuzz_config import run_cases
from goldens.families import FILE, MODELS, to_v4

from llminfer.config import Rope, from_toml
from llminfer.errors import UserError
from llminfer.weights.hf_config import ARCHITECTURES, from_hf

with np.load(FILE) as golden:
    CONFIGS = {name: json.loads(str(golden[f"{name}/config"])) for name in MODELS}
OWN_DIALECT = ("internlm", "internlm2", "internlm3", "exaone")
BY_PATTERN = {
    "architectures": ["Cohere2ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
}


def llama(**change) -> dict:
    """config.json of Llama 3.1 8B as transformers 4 writes it, with changes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 128256,
    } | change


def family(name: str, **change) -> dict:
    return {**CONFIGS[name], **change}


def refusal(data) -> str:
    """The one line that refuses a config.json."""
    with pytest.raises(UserError) as caught:
        from_hf(data, "bad")
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1500
    return message


def test_every_architecture_has_a_golden():
    assert {architecture for architecture, _ in MODELS.values()} | {"LlamaForCausalLM"} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in OWN_DIALECT])
def test_both_dialects_give_the_same_model(name):
    old = to_v4(CONFIGS[name])
    assert "rope_parameters" not in json.dumps(old) and ("rope_scaling" in json.dumps(old) or "gpt2" in name)
    assert from_hf(old, name) == from_hf(CONFIGS[name], name)


@pytest.mark.parametrize("name", ["internlm3", "exaone"])
def test_transformers_5_saves_two_families_as_llama(name):
    """It runs them with its Llama, under their model_type, and renames their fields."""
    names = {"qkv_bias": "attention_bias", "bias": "mlp_bias", "num_layers": "num_hidden_layers"}
    names |= {"layer_norm_epsilon": "rms_norm_eps", "activation_function": "hidden_act"}
    new = {names.get(key, key): value for key, value in CONFIGS[name].items()}
    new["rope_parameters"] = {"rope_theta": new.pop("rope_theta"), **new.pop("rope_scaling")}
    new |= {"architectures": ["LlamaForCausalLM"], "model_type": name}
    assert from_hf(new, name) == from_hf(CONFIGS[name], name)


# Files as they are published, where they leave out or add something; the TOML says what they mean.
GEMMA3_TEXT = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
GEMMA3_TEXT |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
PUBLISHED = {
    "llama3_8b": llama(),
    "mistral_7b": {
        **{"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096},
        **{"intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32},
        **{"num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000},
    },
    "smollm2_135m": {
        **{"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536},
        **{"is_llama_config": True, "max_position_embeddings": 8192, "num_attention_heads": 9, "num_hidden_layers": 30},
        **{"num_key_value_heads": 3, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000},
        **{"tie_word_embeddings": True, "transformers.js_config": {"dtype": "q4"}, "vocab_size": 49152},
    },
    "gemma3_4b": {
        **{"architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000},
        **{"eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256},
        **{"model_type": "gemma3", "text_config": GEMMA3_TEXT, "vision_config": {"hidden_size": 1152, "vision_use_head": False}},
    },
    "command_r": {
        **{"architectures": ["CohereForCausalLM"], "attention_bias": False, "bos_token_id": 5, "eos_token_id": 255001},
        **{"hidden_act": "silu", "hidden_size": 8192, "intermediate_size": 22528, "layer_norm_eps": 1e-05, "logit_scale": 0.0625},
        **{"max_position_embeddings": 8192, "model_max_length": 131072, "num_attention_heads": 64, "num_hidden_layers": 40},
        **{"num_key_value_heads": 64, "pad_token_id": 0, "pretraining_tp": 1, "rope_theta": 8000000.0, "vocab_size": 256000},
    },
    "command_r7b": {
        **{"architectures": ["Cohere2ForCausalLM"], "cache_implementation": "hybrid", "head_dim": 128, "hidden_size": 4096},
        **{"intermediate_size": 14336, "layer_norm_eps": 1e-05, "layer_switch": 4, "logit_scale": 0.25, "rope_theta": 50000},
        **{"max_position_embeddings": 8192, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8},
        **{"order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj", "rotary_pct": 1.0},
        **{"sliding_window": 4096, "use_embedding_sharing": True, "use_gated_activation": True, "use_parallel_block": True},
        **{"use_parallel_embedding": True, "vocab_size": 256000},
    },
    "exaone3_5_2_4b": {
        **{"activation_function": "silu", "architectures": ["ExaoneForCausalLM"], "embed_dropout": 0.0, "head_dim": 80},
        **{"hidden_size": 2560, "intermediate_size": 7168, "layer_norm_epsilon": 1e-05, "max_position_embeddings": 32768},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "num_layers": 30, "rope_theta": 1000000.0, "vocab_size": 102400},
        "rope_scaling": {**llama()["rope_scaling"]},
        "tie_word_embeddings": True,
    },
    "gpt2": {
        **{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "n_ctx": 1024, "n_embd": 768},
        **{"n_head": 12, "n_layer": 12, "n_positions": 1024, "summary_type": "cls_index", "vocab_size": 50257, "bos_token_id": 50256},
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "pythia_1b": {
        **{"architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu", "hidden_size": 2048},
        **{"intermediate_size": 8192, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "num_attention_heads": 8},
        **{"num_hidden_layers": 16, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "vocab_size": 50304},
    },
    "gemma_2b": {
        **{"architectures": ["GemmaForCausalLM"], "head_dim": 256, "hidden_act": "gelu", "hidden_activation": None, "hidden_size": 2048},
        **{"intermediate_size": 16384, "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1, "vocab_size": 256000},
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_give_the_toml(name):
    assert from_hf(PUBLISHED[name], name) == from_toml(name)


def test_layers_become_the_shortest_pattern():
    types = ["sliding_attention"] * 5 + ["full_attention"]
    assert from_hf(family("gemma3", num_hidden_layers=34, layer_types=(types * 6)[:34]), "m").windows == (12, 12, 12, 12, 12, 0)
    # Cut where the pattern is longer than the model; ropes that no layer uses are left out.
    short = from_hf(family("gemma3", num_hidden_layers=4), "m")
    assert (short.windows, short.rope_layers, [rope.theta for rope in short.ropes]) == ((12,), (0,), [300.0])
    late = from_hf(family("qwen2_window", num_hidden_layers=6, layer_types=None, max_window_layers=4), "m")
    assert late.windows == (0, 0, 0, 0, 12, 12)
    assert from_hf(family("qwen2_window", layer_types=None, use_sliding_window=False), "m").windows == (0,)
    assert from_hf(BY_PATTERN | {"num_hidden_layers": 8, "sliding_window": 32}, "m").rope_layers == (0, 0, 0, -1)
    text = from_hf(family("exaone4", num_hidden_layers=6, layer_types=None, sliding_window_pattern="LLG"), "m")
    assert (text.windows, text.rope_layers) == ((12, 12, 0), (0, 0, -1))


def test_the_two_forms_of_gelu():
    """They differ by about what the goldens allow."""
    names = {"gpt2": "gelu_tanh", "gpt_neox": "gelu", "gpt_neox_serial": "gelu_tanh", "starcoder2": "gelu_tanh", "starcoder2_plain": "gelu"}
    assert {name: from_hf(CONFIGS[name], "m").activation for name in names} == names


def test_windows_that_are_none():
    assert from_hf(family("mistral", sliding_window=None), "m").windows == (0,)
    assert from_hf(family("mistral", sliding_window=256), "m").windows == (0,), "no position is that far away"
    assert from_hf(llama(sliding_window=512), "m").windows == (0,), "Llama carries the field and does not use it"


def test_rope_scalings():
    def rope(scaling, **change) -> Rope:
        return from_hf(llama(rope_scaling=scaling, **change), "m").ropes[0]

    yarn = {"type": "yarn", "factor": 4.0}
    assert rope(yarn).attention_factor == pytest.approx(0.1 * np.log(4) + 1)
    assert rope(yarn).original_max_position == 131072
    assert rope({**yarn, "attention_factor": 0.5}).attention_factor == 0.5
    both = rope({**yarn, "mscale": 2.0, "mscale_all_dim": 0.5})
    assert both.attention_factor == pytest.approx((0.2 * np.log(4) + 1) / (0.05 * np.log(4) + 1))
    assert rope({**yarn, "truncate": False}).truncate is False and rope(yarn).truncate is True
    stretched = from_hf(llama(rope_scaling={**yarn, "original_max_position_embeddings": 40000}), "m")
    assert stretched.max_position == 160000
    dynamic = from_hf(llama(rope_scaling={"type": "dynamic", "factor": 2.0}), "m")
    assert (dynamic.max_position, dynamic.ropes[0].original_max_position) == (262144, 131072)
    long = from_hf(family("phi3_long"), "m").ropes[0]
    assert (long.kind, long.dim, long.attention_factor) == ("longrope", 12, pytest.approx(np.sqrt(1 + np.log(8) / np.log(32))))
    old = family("phi3_long")
    assert from_hf(old | {"rope_parameters": {**old["rope_parameters"], "rope_type": "su"}}, "m").ropes[0] == long
    assert rope(None) == rope({"rope_type": "default"}) == Rope(500000.0)


def test_defaults_of_an_absent_field():
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 32}
    qwen = from_hf({**sizes, "architectures": ["Qwen3ForCausalLM"]}, "m")
    assert (qwen.head_dim, qwen.num_kv_heads, qwen.max_position, qwen.bos_id, qwen.eos_ids) == (128, 32, 32768, None, ())
    granite = from_hf({**sizes, "architectures": ["GraniteForCausalLM"]}, "m")
    assert (granite.attn_scale, granite.num_kv_heads, granite.eos_ids) == (1.0, 32, (2,))
    gpt2 = {"architectures": ["GPT2LMHeadModel"], "vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 2}
    assert (from_hf(gpt2, "m").intermediate_size, from_hf(gpt2, "m").eos_ids) == (256, ()), (
        "the default end token is not in this vocabulary"
    )


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([1], "must be a JSON object"),
        (llama(num_hidden_layers=10**12), "num_hidden_layers=1000000000000: must be an integer from 1 to"),
        (llama(num_hidden_layers=5000), "num_layers=5000: must be an integer from 1 to 1024"),
        (llama(num_hidden_layers="32"), "num_hidden_layers='32'"),
        (llama(num_hidden_layers=True), "num_hidden_layers=True"),
        (llama(num_hidden_layers=None), "num_hidden_layers is missing"),
        (llama(hidden_size=-1), "hidden_size=-1"),
        (llama(num_key_value_heads=5), "must divide num_heads=32"),
        (llama(num_attention_heads=33, num_key_value_heads=33), "must divide hidden_size=4096"),
        (llama(architectures=["BloomForCausalLM"]), "architectures='BloomForCausalLM': not supported; legal: LlamaForCausalLM, Mistral"),
        (llama(architectures=None), "legal: LlamaForCausalLM, Mistral"),
        (llama(architectures={"a": 1}), "legal: LlamaForCausalLM, Mistral"),
        (llama(architectures=["DeepseekV4ForCausalLM"], num_local_experts=8), "models with experts are not supported yet"),
        (llama(architectures=["GraniteMoeForCausalLM"]), "models with experts are not supported yet"),
        (llama(num_local_experts=8), "num_local_experts=8: not supported for LlamaForCausalLM unless null or false; supported: "),
        (llama(attention_bias="yes"), "attention_bias='yes': must be true or false"),
        (llama(hidden_act="relu"), "hidden_act='relu': not supported; legal: silu"),
        (llama(hidden_act=["silu"]), "hidden_act="),
        (llama(rms_norm_eps=0), "rms_norm_eps=0: must be a positive number"),
        (llama(rope_theta=float("inf")), "rope_theta=inf"),
        (llama(rope_theta=10**400), "rope_theta=1000"),
        (llama(eos_token_id=128256), "must be from 0 to vocab_size-1=128255"),
        (llama(eos_token_id=["2"]), "eos_token_id="),
        (llama(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (llama(logit_scale=2.0), "logit_scale=2.0: not supported"),
        (llama(**{"a\nb": 1}), "'a\\nb'=1: not supported"),
        (llama(rope_scaling="llama3"), "rope_scaling='llama3': must be an object"),
        (llama(rope_scaling={"rope_type": "ntk"}), "rope_scaling.rope_type='ntk': not supported; legal: default, linear, dynamic, yarn"),
        (llama(rope_scaling={"rope_type": "llama3", "factor": 2.0}), "rope_scaling.low_freq_factor=None: must be given"),
        (llama(rope_scaling={"rope_type": "linear"}), "rope_scaling.factor=None: must be given"),
        (llama(rope_scaling={"rope_type": "linear", "factor": 2.0, "mrope_section": [8]}), "rope_scaling.mrope_section="),
        (llama(rope_scaling={"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}), "must be a list of 64 numbers"),
        (llama(rope_parameters={"rope_type": "default"}), "must not be given together"),
        (family("mistral", layer_types=["full_attention"] * 4), "layer_types="),
        (family("qwen2", attention_bias=True), "attention_bias=True: not supported for Qwen2ForCausalLM"),
        (family("qwen2", layer_types=["sliding_attention"] * 4), "needs use_sliding_window"),
        (family("olmo2", sliding_window=12), "sliding_window=12: not supported for Olmo2ForCausalLM"),
        (family("gemma2", layer_types=["full_attention"]), "must be a list of 5"),
        (family("gemma2", layer_types=["chunked_attention"] * 5), "layer_types='chunked_attention'"),
        (family("gemma2", sliding_window=None), "sliding_window=None: must be given"),
        (family("gemma3", use_bidirectional_attention=True), "use_bidirectional_attention=True"),
        (family("gemma3", rope_parameters={"rope_type": "default"}), "rope_parameters.rope_type='default': not supported"),
        (family("gemma3_vision", text_config=None), "text_config='NoneType': must be an object"),
        (family("smollm3", no_rope_layers=[2] * 5), "must be a list of 1 (with rope) and 0 (without)"),
        (family("gpt2", scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
        (family("gpt2", n_layer=[1]), "n_layer="),
        (family("cohere2", use_parallel_block=False) | {"use_gated_activation": "no"}, "use_gated_activation='no'"),
        (family("cohere2", layer_switch=3, sliding_window_pattern=4), "differs from"),
        (family("phi3_long", original_max_position_embeddings="32"), "original_max_position_embeddings='32'"),
        (family("internlm", rotary={"type": "xpos"}), "rotary.type='xpos': legal: origin, dynamic"),
        (family("exaone", num_hidden_layers=5), "differs from num_layers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses(data, says):
    assert says in refusal(data)


def test_what_says_nothing_about_the_result_is_ignored():
    plain = from_hf(llama(), "m")
    extra = {"attention_dropout": 0.1, "pretraining_tp": 4, "_name_or_path": "x", "unsloth_fixed": True, "num_experts": None}
    assert from_hf(llama(**extra, temperature=0.6, auto_map={"AutoConfig": "x"}, is_encoder_decoder=False), "m") == plain


def test_fuzzed_files_are_refused_in_one_line(tmp_path):
    assert run_cases(300, 0, tmp_path) > 100


def test_fuzz_script(tmp_path):
    script = Path(__file__).parent.parent / "fuzz_config.py"
    done = subprocess.run([sys.executable, str(script), "--cases", "20", "--seed", "7"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "20 cases" in done.stdout, done.stderr
