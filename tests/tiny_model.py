"""A tiny model on disk, as Hugging Face stores them: random weights, a tokenizer with one token a byte, a chat template."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file

from llminfer.config import ModelConfig, from_toml
from llminfer.weights.hf_names import stored_tensors

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model(folder: Path, name: str = "tiny", *, tokenizer: bool = True, seed: int = 0) -> Path:
    """Writes the model of configs/NAME.toml (full attention) into `folder`, float32, and returns `folder`."""
    c = from_toml(name)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tensors = {
        key: np.ones(t.shape, np.float32) if len(t.shape) == 1 else rng.standard_normal(t.shape, np.float32) * 0.1
        for key, t in stored_tensors("LlamaForCausalLM", c).items()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf_config(c)))
    if tokenizer:
        _write_tokenizer(folder)
    return folder


def hf_config(c: ModelConfig) -> dict:
    """config.json of a LlamaForCausalLM with these shapes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": c.bos_id,
        "eos_token_id": list(c.eos_ids),
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": c.max_position,
        "num_attention_heads": c.num_heads,
        "num_hidden_layers": c.num_layers,
        "num_key_value_heads": c.num_kv_heads,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.ropes[0].theta,
        "tie_word_embeddings": c.tie_embeddings,
        "vocab_size": c.vocab_size,
    }


def _write_tokenizer(folder: Path) -> None:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
