"""Configs give the published models; bad ones are refused with one line."""

from __future__ import annotations

import dataclasses
import tomllib

import pytest

from llminfer.config import EngineConfig, ModelConfig, Rope, configs_dir, from_toml, parse_setting
from llminfer.errors import UserError

# Parameter counts as published, a tied output head counted once; of Gemma 3 the text model's.
PUBLISHED = {
    "smollm2_135m": 134_515_008,
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama32_1b": 1_235_814_400,
    "llama32_3b": 3_212_749_824,
    "mistral_7b": 7_241_732_096,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_0_6b": 596_049_920,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_32b": 32_762_123_264,
    "qwen3_30b_a3b": 30_532_122_624,
    "mixtral_8x7b": 46_702_792_704,
    "deepseek_v3": 671_026_419_200,
    "kimi_k2": 1_026_408_232_448,
    "llama4_scout": 107_769_861_120,
    "gpt_oss_20b": 20_914_757_184,
    "gpt_oss_120b": 116_829_156_672,
    "gemma_2b": 2_506_172_416,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma3_270m": 268_098_176,
    "gemma3_1b": 999_885_952,
    "gemma3_4b": 3_880_263_168,
    "gemma3_12b": 11_766_034_176,
    "gemma3_27b": 27_009_346_304,
    "phi3_mini": 3_821_079_552,
    "phi4": 14_659_507_200,
    "phi4_mini": 3_836_021_760,
    "olmo2_7b": 7_298_617_344,
    "olmo3_7b": 7_298_011_136,
    "smollm3_3b": 3_075_098_624,
    "granite3_8b": 8_170_848_256,
    "command_r": 34_980_831_232,
    "command_r7b": 8_028_033_024,
    "stablelm2_1_6b": 1_644_515_328,
    "starcoder2_3b": 3_030_371_328,
    "gpt2": 124_439_808,
    "pythia_1b": 1_011_781_632,
    "internlm2_7b": 7_737_708_544,
    "exaone3_5_2_4b": 2_405_327_360,
    "exaone4_1_2b": 1_279_391_488,
    "mistral_7b_v0_3": 7_248_023_552,
    "mistral_nemo_12b": 12_247_782_400,
    "mistral_small_24b": 23_572_403_200,
}
TINY = dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_layers=4, num_heads=8, num_kv_heads=2, head_dim=32, max_position=64)
NAMES = sorted(path.stem for path in configs_dir().glob("*.toml") if path.stem != "chips")


def refusal(make) -> str:
    """The message of the UserError that `make` raises: one line."""
    with pytest.raises(UserError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


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
    (rope,) = from_toml("llama3_8b").ropes
    assert (rope.kind, rope.factor, rope.original_max_position) == ("llama3", 8.0, 8192)
    one = from_toml("llama32_1b")
    assert one.tie_embeddings and one.head_dim == 64 and one.ropes[0].factor == 32.0
    gemma = from_toml("gemma3_4b")
    assert [i for i in range(gemma.num_layers) if not gemma.window(i)] == [5, 11, 17, 23, 29]
    assert [gemma.ropes[gemma.rope(i)].theta for i in (0, 5)] == [1e4, 1e6]


def test_windows_repeat_over_the_layers():
    config = from_toml("tiny_window")
    assert [config.window(i) for i in range(config.num_layers)] == [24, 24, 0, 24]
    assert config.groups == (24, 0)
    assert [config.group_layers(g) for g in range(2)] == [(0, 1, 3), (2,)]
    assert from_toml("tiny") == dataclasses.replace(config, name="tiny", windows=(0,))
    tiny = from_toml("tiny_gemma3")
    assert [tiny.rope(i) for i in range(tiny.num_layers)] == [0, 0, 0, 0, 0, 1, 0, 0]


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
        ({"rope_layers": (0, 1)}, "rope_layers=(0, 1): must be integers from -1 (none) to 0"),
        ({"windows": (8, 0), "rope_layers": (0, 0, -1)}, "must have one entry or as many as windows (2)"),
        ({"ropes": (Rope(dim=34),)}, "rope dim=34: must be at most head_dim=32"),
        ({"ropes": (Rope(kind="longrope", short_factors=(1.0,), long_factors=(1.0,)),)}, "one short and one long factor a pair (16)"),
        ({"norm": "batch"}, "norm='batch': legal: rms, layer"),
        ({"qk_norm": "all"}, "qk_norm='all'"),
        ({"pre_norm": False}, "a block needs pre_norm or post_norm"),
        ({"shared_norm": True}, "needs parallel and pre_norm"),
        ({"attn_softcap": 0.0}, "attn_softcap=0.0: must be a positive number"),
    ],
)
def test_model_config_refuses(change, says):
    assert says in refusal(lambda: ModelConfig(name="bad", **(TINY | change)))


@pytest.mark.parametrize(
    ("change", "says"),
    [({"kind": "ntk"}, "rope kind='ntk': legal: default, linear"), ({"theta": 0}, "rope_theta=0"), ({"dim": 7}, "must be even")],
)
def test_rope_refuses(change, says):
    assert says in refusal(lambda: Rope(**change))


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
