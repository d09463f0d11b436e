"""A llama-architecture GGUF file as a transformers model and a tokenizer, for goldens and peer measurements.

Needs torch, transformers, gguf and tokenizers; imports nothing of llminfer, so that both sides stay independent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
import transformers

# GGUF name of a layer's weight -> Hugging Face name.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def field(reader: gguf.GGUFReader, name: str) -> Any:
    """The value of one metadata field. Raises SystemExit when the file lacks it."""
    found = reader.fields.get(name)
    if found is None:
        raise SystemExit(f"GGUF field {name} is missing")
    return found.contents()


def dequantized(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
    """All tensors by GGUF name, float32, [out, in] (GGUF lists sizes the other way round)."""
    return {t.name: np.array(gguf.dequantize(t.data, t.tensor_type), np.float32).reshape(t.shape[::-1]) for t in reader.tensors}


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection [heads * size, in] from interleaved rotary pairs (llama.cpp) to halves (transformers)."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def load_model(path: Path) -> transformers.LlamaForCausalLM:
    """The model with float32 weights, in eval mode, with the attention that transformers prefers (sdpa)."""
    reader = gguf.GGUFReader(path)
    heads, kv_heads = field(reader, "llama.attention.head_count"), field(reader, "llama.attention.head_count_kv")
    tensors = dequantized(reader)
    config = transformers.LlamaConfig(
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden_size=field(reader, "llama.embedding_length"),
        intermediate_size=field(reader, "llama.feed_forward_length"),
        num_hidden_layers=field(reader, "llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=field(reader, "llama.context_length"),
        rms_norm_eps=field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field(reader, "llama.rope.freq_base")},
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=field(reader, "tokenizer.ggml.eos_token_id"),
    )
    state = {"model.embed_tokens.weight": tensors["token_embd.weight"], "model.norm.weight": tensors["output_norm.weight"]}
    state["lm_head.weight"] = tensors.get("output.weight", tensors["token_embd.weight"])
    for layer in range(config.num_hidden_layers):
        for source, target in LAYER_NAMES.items():
            value = tensors[f"blk.{layer}.{source}.weight"]
            if source in ("attn_q", "attn_k"):
                value = unpermuted(value, heads if source == "attn_q" else kv_heads)
            state[f"model.layers.{layer}.{target}.weight"] = value
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()}, strict=True)
    return model.float().eval()


def load_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """The byte-level BPE of a GGUF with `tokenizer.ggml.pre = smollm` (single digits, then the GPT-2 split)."""
    reader = gguf.GGUFReader(path)
    if (kind := field(reader, "tokenizer.ggml.pre")) != "smollm":
        raise SystemExit(f"tokenizer.ggml.pre={kind}: only smollm is known here")
    tokens, types = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in field(reader, "tokenizer.ggml.merges")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    control = int(gguf.TokenType.CONTROL)
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == control]
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def chat_text(path: Path, user: str) -> str:
    """One user turn in the file's own chat template, ready for the assistant's answer."""
    import jinja2

    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(field(gguf.GGUFReader(path), "tokenizer.chat_template"))
    return template.render(messages=[{"role": "user", "content": user}], add_generation_prompt=True)
