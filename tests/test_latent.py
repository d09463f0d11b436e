"""Latent attention (DeepSeek-V3): rows of the cache that are key and value at once, and a model that is served from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens.families import golden
from safetensors.numpy import save_file

from llminfer import LLM, SamplingParams
from llminfer.config import from_toml
from llminfer.errors import UserError
from llminfer.weights import open_model
from llminfer.weights.hf_config import from_hf
from llminfer.weights.hf_write import to_hf
from pallas_kernels.paged_attention import paged_attention

pytestmark = pytest.mark.usefixtures("compiled_fast")

HEADS, DIM, VALUE, PAGE = 40, 24, 16, 8
Q_LEN, KV_LEN = [1, 0, 13, 1, 5], [30, 0, 13, 1, 22]  # decode, nobody, a prompt, a first token, a later chunk


def batch(lanes: int) -> dict:
    """Arguments of paged_attention for the sequences above; what nobody owns is NaN."""
    rng = np.random.default_rng(5)
    q_len, kv_len = np.array(Q_LEN, np.int32), np.array(KV_LEN, np.int32)
    table = rng.permutation(40)[:20].reshape(5, 4).astype(np.int32)
    kv = np.full((2, 40, 1, PAGE, lanes), np.nan, np.float32)
    for row, length in enumerate(kv_len - q_len):
        for at in range(length):
            kv[1, table[row, at // PAGE], 0, at % PAGE] = np.pad(rng.standard_normal(DIM, np.float32), (0, lanes - DIM))
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    rows = dict(page_table=table, q_start=np.cumsum([2, *q_len[:-1]], dtype=np.int32), q_len=q_len, kv_len=kv_len)
    return dict(q=draw(24, HEADS, DIM), k=draw(24, 1, DIM), kv=kv, layer=jnp.int32(1), scale=0.3, **rows)


@pytest.mark.parametrize("impl", ["reference", "batched", "interpret", "triton-interpret"])
@pytest.mark.parametrize("window", [0, 9])
def test_values_are_the_first_part_of_keys(window: int, impl: str) -> None:
    """Against the op with values of their own; what kernels do not take yet goes to the reference, whatever is asked for."""
    given = batch(32)
    run = lambda q_max, **more: jax.jit(lambda **x: paged_attention(**x, window=jnp.int32(window), q_max=q_max, **more))
    arrays = {name: jnp.asarray(x) for name, x in given.items() if name != "scale"}
    out, kv = run(13, scale=0.3, value_dim=VALUE, impl=impl, v=None)(**arrays)
    own = arrays["k"].at[..., VALUE:].set(0)
    wide = jnp.concatenate([arrays["kv"][..., :DIM], arrays["kv"].at[..., VALUE:].set(0)[..., :DIM]], axis=-1)
    wide = jnp.where(jnp.isnan(arrays["kv"][..., :1]), jnp.nan, wide)
    wanted, _ = run(13, scale=0.3, v=own, impl="reference")(**arrays | {"kv": wide})
    assert out.shape == (24, HEADS, VALUE)
    np.testing.assert_allclose(out, wanted[..., :VALUE], atol=1e-5, rtol=0)
    place = lambda row, at: (1, given["page_table"][row, at // PAGE], 0, at % PAGE)
    for row, (start, count, length) in enumerate(zip(given["q_start"], Q_LEN, KV_LEN, strict=True)):
        for i in range(count):
            np.testing.assert_array_equal(kv[place(row, length - count + i)][:DIM], given["k"][start + i, 0])


def test_what_cannot_be_is_refused() -> None:
    given = batch(32) | dict(window=0, q_max=13)
    with pytest.raises(ValueError, match="value_dim=25: must be from 1 to 24"):
        paged_attention(**given, v=None, value_dim=25)
    with pytest.raises(ValueError, match="kv lanes 16: must be head_dim=24"):
        paged_attention(**given | {"kv": given["kv"][..., :16]}, v=None, value_dim=VALUE)
    with pytest.raises(UserError, match="kv_dtype='int8': deepseek_v3 caches latents"):
        LLM("config:deepseek_v3", kv_dtype="int8", context=32)


def test_decoding_agrees_with_the_prompt_s_logits(tmp_path: Path) -> None:
    """Stacked after a dense layer that is not, over a mesh where there is one: test_parity_goldens has the plain ones."""
    config, tensors, ids, expected = golden("deepseek_v3")
    draft = {f"model.layers.{config['num_hidden_layers']}.eh_proj.weight": np.zeros((4, 8), np.float32)}  # is left out
    save_file(tensors | draft, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_model(str(tmp_path)).config.row_dim == config["kv_lora_rank"] + config["qk_rope_head_dim"]
    settings: Any = dict(layout="stacked", mesh="sp=2,tp=2" if len(jax.devices()) > 3 else "")
    settings |= dict(dtype="float32", slots=1, context=32, page_size=8, chunk=16, decode_steps=4)
    llm = LLM(str(tmp_path), **settings)
    prompt = ids[:21].tolist()
    (output,) = llm.generate([prompt], SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True))
    logits = np.asarray(llm.prompt_logits([*prompt, *output.token_ids]))
    assert logits[len(prompt) - 1 : -1].argmax(1).tolist() == output.token_ids
    assert np.abs(logits[: len(prompt)] - expected[: len(prompt)]).max() < 1e-4 * np.ptp(expected)
    assert llm.stats()["compiles_after_warmup"] == 0


def test_configs_are_written_and_read_back() -> None:
    for name in ("deepseek_v3", "kimi_k2"):
        data = to_hf(from_toml(name), "bfloat16")
        assert data["architectures"] == ["DeepseekV3ForCausalLM"] and from_hf(data, name) == from_toml(name)
    c = from_toml("deepseek_v3")
    assert c.row_dim == 576 and [c.has_experts(i) for i in (2, 3, 60)] == [False, True, True]
    published = {
        **{"architectures": ["DeepseekV3ForCausalLM"], "aux_loss_alpha": 0.001, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1},
        **{"first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512},
        **{"max_position_embeddings": 163840, "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256},
        **{"n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61},
        **{"num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "topk_group": 4},
        **{"qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid"},
        **{"seq_aux": True, "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280, "tie_word_embeddings": False},
    }
    yarn = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "yarn"}
    published["rope_scaling"] = yarn | {"original_max_position_embeddings": 4096}
    assert from_hf(published, "deepseek_v3") == c
