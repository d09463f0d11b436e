"""The tiny goldens, made again by the installed transformers: says whether a mismatch lies in our engine or in the golden."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from goldens.families import MODELS, golden, to_v4

from llminfer.weights.hf_config import ARCHITECTURES, from_hf

# Theirs: warnings at import, and one where a Mistral has layer types.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")]
GOLDENS = Path(__file__).parent.parent / "goldens"
VARIANTS = [("tiny_llama", "gqa"), ("tiny_llama", "mha"), ("tiny_llama", "mqa"), ("tiny_mistral", "window")]


@pytest.mark.parametrize(("file", "variant"), VARIANTS)
def test_transformers_gives_the_golden_logits(file: str, variant: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    # The saved config.json spells rotary settings as transformers 5 does; 4 would ignore them silently.
    transformers = pytest.importorskip("transformers", minversion="5.0")
    with np.load(GOLDENS / f"{file}.npz") as data:
        arrays = {name.removeprefix(f"{variant}/"): data[name] for name in data if name.startswith(f"{variant}/")}
    (tmp_path / "config.json").write_text(str(arrays["config"]))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    model_class = getattr(transformers, json.loads(str(arrays["config"]))["architectures"][0])
    model = model_class._from_config(config, attn_implementation="eager").float().eval()
    prefix = "weights/"
    weights = {k.removeprefix(prefix): torch.from_numpy(v.astype(np.float32)) for k, v in arrays.items() if k.startswith(prefix)}
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, strict=True)
    with torch.inference_mode():
        logits = model(torch.from_numpy(arrays["ids"].astype(np.int64))[None], use_cache=False).logits[0].numpy()
    expected = arrays["logits"]
    assert np.abs(logits - expected).max() <= 1e-5 * np.ptp(expected)


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch):
    """The script that made families.npz."""
    pytest.importorskip("transformers", minversion="5.0")
    monkeypatch.syspath_prepend(str(GOLDENS))
    return pytest.importorskip("make_families")


@pytest.mark.parametrize("name", MODELS)
def test_transformers_makes_the_family_golden_again(name: str, families, tmp_path: Path) -> None:
    config, tensors, ids, expected = golden(name)
    again, shapes, model = families.build(name, tmp_path)
    assert {key: tuple(shape) for key, shape in shapes.items()} == {key: value.shape for key, value in tensors.items()}
    for side in (again, config):
        side.pop("transformers_version", None)
    assert again == config
    assert np.abs(families.logits_of(model, ids) - expected).max() <= 1e-5 * np.ptp(expected)


@pytest.mark.parametrize("name", [name for name in MODELS if "internlm" not in name and name != "exaone"])
def test_transformers_reads_our_old_dialect_as_the_new(name: str, families, tmp_path: Path) -> None:
    """What the tests call the dialect of transformers 4 is one that transformers 5 converts to the golden's config."""
    config = golden(name)[0]
    config_class = getattr(families.transformers, config["architectures"][0]).config_class
    (tmp_path / "config.json").write_text(json.dumps(to_v4(config)))
    old = config_class.from_pretrained(tmp_path).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    new = config_class.from_pretrained(tmp_path).to_dict()
    assert without_spelling(old) == without_spelling(new)


def without_spelling(config: dict) -> dict:
    """A loaded config without what only says how its file was written."""
    beside = ("transformers_version", "sliding_window_pattern", "rope_theta", "rotary_pct", "partial_rotary_factor", "rope_local_base_freq")
    kept = {key: value for key, value in config.items() if key not in beside}
    if isinstance(rope := kept.get("rope_parameters"), dict):
        kept["rope_parameters"] = {key: value for key, value in rope.items() if key != "type"}
    return kept | ({"text_config": without_spelling(kept["text_config"])} if "text_config" in kept else {})


# Llama's own are read by the code of the checkpoint, not by a class of transformers.
@pytest.mark.parametrize(
    "architecture", [name for name in ARCHITECTURES if not name.startswith("InternLM") and name != "ExaoneForCausalLM"]
)
def test_absent_fields_are_those_of_the_config_class(architecture: str, families) -> None:
    sizes = {"vocab_size": 300_000, "hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 7, "num_attention_heads": 32}
    if architecture == "GPT2LMHeadModel":
        sizes = {"vocab_size": 300_000, "n_embd": 256, "n_layer": 7, "n_head": 32}
    vision = architecture.endswith("ForConditionalGeneration")
    config_class = getattr(families.transformers, architecture.replace("ConditionalGeneration", "CausalLM")).config_class
    whole = {"architectures": [architecture], **config_class(**sizes).to_diff_dict()}
    sparse = {"architectures": [architecture], **sizes}
    if vision:
        whole, sparse = ({"architectures": [architecture], "text_config": part} for part in (whole, sparse))
    assert from_hf(sparse, "m") == from_hf(json.loads(json.dumps(whole)), "m")


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "llama4"])
def test_tokens_go_to_the_experts_of_transformers(name: str, families, tmp_path: Path) -> None:
    """The experts of each token of random hidden states, and their weights, of the first layer that has experts."""
    from llminfer.moe import route

    torch = families.torch
    config, tensors, *_ = golden(name)
    model = families.build(name, tmp_path)[2]
    c = from_hf(config, name)
    layer = next(i for i in range(c.num_layers) if c.has_experts(i))
    block = model.model.layers[layer].feed_forward if name == "llama4" else model.model.layers[layer].mlp
    router = block.gate if name == "deepseek_v3" else block.router
    x = np.random.default_rng(1).standard_normal((200, c.hidden_size), np.float32)
    with torch.inference_mode():
        first, *rest = router(torch.from_numpy(x))
    if name == "llama4":  # the scores of all experts, 0 where they are not chosen
        scores, chosen = first.numpy(), first.numpy().argmax(1)[:, None]
        weights = np.take_along_axis(scores, chosen, axis=1)
    else:
        weights, chosen = (part.numpy() for part in rest)
    bias = {"gpt_oss": "mlp.router.bias", "deepseek_v3": "mlp.gate.e_score_correction_bias"}.get(name)
    bias = None if bias is None else tensors[f"model.layers.{layer}.{bias}"]
    ours, numbers = (np.asarray(part) for part in route(x, router.weight.detach().numpy().T, bias, c))
    order, theirs = numbers.argsort(1), chosen.argsort(1)
    np.testing.assert_array_equal(np.take_along_axis(numbers, order, 1), np.take_along_axis(chosen, theirs, 1))
    np.testing.assert_allclose(np.take_along_axis(ours, order, 1), np.take_along_axis(weights, theirs, 1), atol=1e-5)
