"""Configs give the published models; bad ones are refused with one line."""

from __future__ import annotations

import dataclasses
import json
import tomllib

import pytest

from llminfer.config import EngineConfig, ModelConfig, configs_dir, from_hf, from_toml, parse_setting
from llminfer.errors import UserError

# Parameter counts as published, a tied output head counted once.
PUBLISHED = {
    "smollm2_135m": 134_515_008,
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama32_1b": 1_235_814_400,
    "llama32_3b": 3_212_749_824,
    "mistral_7b": 7_241_732_096,
}
TINY = dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_layers=4, num_heads=8, num_kv_heads=2, head_dim=32, max_position=64)
NAMES = sorted(path.stem for path in configs_dir().glob("*.toml") if path.stem != "chips")


def refusal(make) -> str:
    """The message of the UserError that `make` raises: one line."""
    with pytest.raises(UserError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def llama3_hf(dialect: int) -> dict:
    """config.json of Llama 3.1 8B as transformers 4 and 5 write it."""
    data = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    }
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if dialect == 4:
        return data | {"rope_theta": 500000.0, "rope_scaling": scaling | {"rope_type": "llama3"}}
    return data | {"head_dim": 128, "rope_parameters": scaling | {"rope_type": "llama3", "rope_theta": 500000.0}}


@pytest.mark.parametrize("name", NAMES)
def test_every_config_loads(name):
    config = from_toml(name)
    assert config.name == name
    assert config.num_params == PUBLISHED.get(name, config.num_params)
    assert name in PUBLISHED or name.startswith("tiny"), "a published model needs its parameter count here"


@pytest.mark.parametrize("name", NAMES)
def test_specs_sum_to_num_params(name):
    import math

    import jax

    from llminfer.params import is_spec, param_specs

    config = from_toml(name)
    specs = jax.tree.leaves(param_specs(config), is_leaf=is_spec)
    assert sum(math.prod(spec.shape) for spec in specs) == config.num_params


def test_published_shapes():
    assert from_toml("mistral_7b").windows == (4096,)
    scaling = from_toml("llama3_8b").rope_scaling
    assert scaling is not None and (scaling.kind, scaling.factor, scaling.original_max_position) == ("llama3", 8.0, 8192)
    one = from_toml("llama32_1b")
    assert one.tie_embeddings and one.head_dim == 64 and one.rope_scaling is not None and one.rope_scaling.factor == 32.0


def test_windows_repeat_over_the_layers():
    config = from_toml("tiny_window")
    assert [config.window(i) for i in range(config.num_layers)] == [24, 24, 0, 24]
    assert config.groups == (24, 0)
    assert [config.group_layers(g) for g in range(2)] == [(0, 1, 3), (2,)]
    assert from_toml("tiny") == dataclasses.replace(config, name="tiny", windows=(0,))


@pytest.mark.parametrize("dialect", [4, 5])
def test_from_hf_dialects_agree_with_the_toml(dialect):
    data = json.loads(json.dumps(llama3_hf(dialect)))
    assert from_hf(data, "llama3_8b") == from_toml("llama3_8b")


@pytest.mark.parametrize("spelling", [{"rope_theta": 10000.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}])
def test_from_hf_mistral(spelling):
    data = {key: value for key, value in llama3_hf(4).items() if not key.startswith("rope")} | spelling
    data |= {"architectures": ["MistralForCausalLM"], "max_position_embeddings": 32768, "sliding_window": 4096, "vocab_size": 32000}
    data |= {"bos_token_id": 1, "eos_token_id": 2}
    assert from_hf(data, "mistral_7b") == from_toml("mistral_7b")
    assert from_hf(data | {"sliding_window": None}, "m").windows == (0,)


def test_from_hf_ignores_a_window_that_llama_does_not_use():
    assert from_hf(llama3_hf(4) | {"sliding_window": 512}, "m").windows == (0,)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 10**12}, "num_layers=1000000000000: must be an integer from 1 to 1024"),
        ({"num_hidden_layers": 0}, "num_layers=0"),
        ({"num_hidden_layers": "32"}, "num_layers='32'"),
        ({"num_hidden_layers": True}, "num_layers=True"),
        ({"hidden_size": -1}, "hidden_size=-1"),
        ({"num_key_value_heads": 5}, "must divide num_heads=32"),
        ({"num_attention_heads": 33, "num_key_value_heads": 33}, "must divide hidden_size=4096"),
        ({"architectures": ["GPT2LMHeadModel"]}, "legal: LlamaForCausalLM, MistralForCausalLM"),
        ({"architectures": None}, "legal: LlamaForCausalLM, MistralForCausalLM"),
        ({"attention_bias": True}, "attention_bias=True: not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "legal: default, linear, llama3"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_scaling": "llama3"}, "must be an object"),
        ({"rms_norm_eps": 0}, "norm_eps=0"),
        ({"rope_theta": float("inf")}, "rope_theta=inf"),
        ({"eos_token_id": 128256}, "must be from 0 to vocab_size-1=128255"),
    ],
)
def test_from_hf_refuses(change, says):
    data = llama3_hf(4) | change
    assert says in refusal(lambda: from_hf(data, "bad"))


def test_from_hf_names_the_missing_field():
    data = llama3_hf(4)
    del data["num_hidden_layers"]
    assert "num_hidden_layers is missing" in refusal(lambda: from_hf(data, "bad"))
    assert "must be a JSON object" in refusal(lambda: from_hf([1], "bad"))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads=3: must divide num_heads=8"),
        ({"head_dim": 31}, "head_dim=31: must be even"),
        ({"windows": ()}, "windows=()"),
        ({"windows": (-1,)}, "windows=(-1,)"),
        ({"windows": (0, 0, 0, 0, 8)}, "must not be longer than num_layers=4"),
        ({"norm_eps": float("nan")}, "norm_eps=nan"),
        ({"bos_id": 512}, "token id=512"),
    ],
)
def test_model_config_refuses(change, says):
    assert says in refusal(lambda: ModelConfig(name="bad", **(TINY | change)))


def test_unknown_config_lists_the_known_ones():
    message = refusal(lambda: from_toml("no_such_model"))
    assert all(name in message for name in NAMES)
    assert "chips" not in message
    refusal(lambda: from_toml("../pyproject"))


def test_engine_config_unknown_field_lists_the_known_ones():
    message = refusal(lambda: EngineConfig.from_settings({"slot": 8}))
    assert message.startswith("slot: not a setting")
    assert all(field.name in message for field in dataclasses.fields(EngineConfig))


@pytest.mark.parametrize(
    "settings",
    [
        {"slots": 0},
        {"slots": True},
        {"slots": 8.0},
        {"page_size": 4},
        {"page_size": 24},
        {"context": 1},
        {"pages": 0},
        {"chunk": "256"},
        {"seed": 2**63},
        {"dtype": "float16"},
        {"kv_dtype": "int3"},
        {"quantize": "int3"},
        {"prefix_cache": 1},
        {"mesh": None},
    ],
    ids=str,
)
def test_engine_config_refuses(settings):
    (name,) = settings
    assert refusal(lambda: EngineConfig.from_settings(settings)).startswith(f"{name}=")


def test_engine_config_is_frozen():
    config = EngineConfig.from_settings({"slots": 2, "page_size": 32, "seed": -(2**63)})
    assert (config.slots, config.page_size) == (2, 32)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.slots = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("k=8", 8),
        ("k=true", True),
        ("k=False", False),
        ("k=none", None),
        ("k=null", None),
        ("k=int8", "int8"),
        ("k=a=b", "a=b"),
        ("k=", ""),
    ],
)
def test_parse_setting(text, value):
    assert parse_setting(text) == ("k", value)


def test_parse_setting_refuses():
    assert "must be key=value" in refusal(lambda: parse_setting("slots"))
    assert "must be key=value" in refusal(lambda: parse_setting("=8"))


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "tpu7x", "h100"])
def test_chips(chip):
    peaks = tomllib.loads((configs_dir() / "chips.toml").read_text())[chip]
    assert set(peaks) >= {"bf16_tflops", "hbm_bytes", "hbm_gb_per_s", "devices"}
    # The bytes a second and operations a second of one chip: a ridge point outside this range is a wrong unit.
    assert 100 < peaks["bf16_tflops"] * 1e3 / peaks["hbm_gb_per_s"] < 1000
    assert 2**33 < peaks["hbm_bytes"] < 2**38
