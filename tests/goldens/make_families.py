"""Makes families.npz beside this script with torch and transformers: see families.py.

    python tests/goldens/make_families.py

Needs torch, transformers, safetensors. Last made with torch 2.13.0 and transformers 5.24.0.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from families import COMMON, FILE, MODELS, PROMPT_LEN, VOCAB, uniform, weights
from safetensors import safe_open
from safetensors.torch import save_file

# Families whose code comes with their checkpoints: built as a Llama with these fields, their tensors renamed.
AS_LLAMA: dict[str, dict[str, Any]] = {
    "internlm": {"num_key_value_heads": 4, "attention_bias": True},
    "internlm2": {},
    "internlm3": {"attention_bias": True},
    "exaone": {},
}
EXAONE_NAMES = {
    "model.embed_tokens": "transformer.wte",
    "model.norm": "transformer.ln_f",
    "self_attn.o_proj": "attn.attention.out_proj",
    "self_attn": "attn.attention",
    "mlp.gate_proj": "mlp.c_fc_0",
    "mlp.up_proj": "mlp.c_fc_1",
    "mlp.down_proj": "mlp.c_proj",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "model.layers": "transformer.h",
}
INTERNLM2_NAMES = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "model.tok_embeddings": "model.embed_tokens",
    "output": "lm_head",
}
Shapes = dict[str, list[int]]
Tensors = dict[str, torch.Tensor]


def replaced(name: str, table: dict[str, str]) -> str:
    """`name` with each key of the table replaced where it is a whole run of dotted parts."""
    for old, new in table.items():
        name = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, name)
    return name


def llama_config(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The Llama that computes what a family of AS_LLAMA does."""
    same = {key: config[key] for key in (*COMMON, "rms_norm_eps", "head_dim", "tie_word_embeddings") if key in config}
    if name == "exaone":
        same |= {"num_hidden_layers": config["num_layers"], "rms_norm_eps": config["layer_norm_epsilon"]}
    if name == "internlm":
        rope = {"rope_type": "default", "rope_theta": config["rotary"]["base"]}
    else:
        scaling = config["rope_scaling"]
        rope = {"rope_type": scaling.get("type", "dynamic"), **scaling, "rope_theta": config["rope_theta"]}
        rope.pop("type", None)
    return same | AS_LLAMA[name] | {"rope_parameters": rope}


def own_shapes(name: str, shapes: Shapes) -> Shapes:
    """Names and shapes in the family's checkpoints, from those of the Llama."""
    if name == "exaone":
        return {replaced(key, EXAONE_NAMES): shape for key, shape in shapes.items()}
    if name == "internlm3":
        return {key: shape for key, shape in shapes.items() if not key.endswith("o_proj.bias")}
    if name == "internlm2":
        back = {new: old for old, new in INTERNLM2_NAMES.items()}
        own = {replaced(key, back): shape for key, shape in shapes.items() if not re.search(r"\.[qkv]_proj\.", key)}
        for key, (rows, width) in ((k, s) for k, s in shapes.items() if k.endswith("q_proj.weight")):
            key_rows = shapes[key.replace("q_proj", "k_proj")][0]
            own[key.replace("self_attn.q_proj", "attention.wqkv")] = [rows + 2 * key_rows, width]
        return own
    return shapes


def to_llama(name: str, tensors: Tensors, shapes: Shapes) -> Tensors:
    """The Llama's tensors from those of the family's checkpoint."""
    if name == "exaone":
        return {key: tensors[replaced(key, EXAONE_NAMES)] for key in shapes}
    if name == "internlm2":
        found = {}
        for key, value in tensors.items():
            if not key.endswith("wqkv.weight"):
                found[replaced(key, INTERNLM2_NAMES)] = value
                continue
            # Rows go by kv head: its queries, then its key, then its value.
            grouped = value.reshape(2, 2 + 2, -1, value.shape[1])
            for part, rows in (("q", grouped[:, :2]), ("k", grouped[:, 2]), ("v", grouped[:, 3])):
                found[key.replace("attention.wqkv", f"self_attn.{part}_proj")] = rows.reshape(-1, value.shape[1])
        return found
    return {key: tensors[key] if key in tensors else torch.zeros(shape) for key, shape in shapes.items()}


def saved(model: transformers.PreTrainedModel, folder: Path) -> Shapes:
    """Saves the model and gives the names and shapes in its file."""
    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: list(file.get_slice(name).get_shape()) for name in sorted(file.keys())}


def load(model_class: Any, folder: Path, tensors: Tensors) -> transformers.PreTrainedModel:
    """The model of `folder` with these tensors, which must be all that it has and no more."""
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    model, info = model_class.from_pretrained(folder, attn_implementation="eager", output_loading_info=True, dtype=torch.float32)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@torch.inference_mode()
def logits_of(model: transformers.PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """float32 [len, vocab]: the logits at every position of `ids`, computed without a cache."""
    if type(model).__name__ == "Llama4ForConditionalGeneration":
        model = model.language_model  # its own forward asks for images (transformers 5.24)
    return model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0].float().numpy()


def build(name: str, folder: Path) -> tuple[dict[str, Any], Shapes, transformers.PreTrainedModel]:
    """(config.json, shapes in the checkpoint, the model with `weights`)."""
    architecture, fields = MODELS[name]
    llama = name in AS_LLAMA
    model_class = transformers.LlamaForCausalLM if llama else getattr(transformers, architecture)
    config = model_class.config_class(**(llama_config(name, fields) if llama else fields))
    shapes = saved(model_class(config), folder)
    own = own_shapes(name, shapes)
    if name == "gpt2_unscaled":  # the published checkpoints leave this prefix out
        own = {key.removeprefix("transformer."): shape for key, shape in own.items()}
    tensors = {key: torch.from_numpy(value) for key, value in weights(own, name).items()}
    model = load(model_class, folder, to_llama(name, tensors, shapes) if llama else tensors)
    stored = json.loads((folder / "config.json").read_text())
    return {"architectures": [architecture], **fields} if llama else stored, own, model


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes families.npz with torch and transformers.")
    parser.add_argument("--only", nargs="*", help="look at these models, store nothing")
    parser.add_argument("--add", nargs="*", help="make these models, and leave the others as they are")
    only, add = (vars(parser.parse_args())[name] for name in ("only", "add"))
    torch.set_num_threads(2)
    arrays: dict[str, np.ndarray] = {}
    if add:
        with np.load(FILE) as there:
            arrays |= {name: there[name] for name in there}
    for name in only or add or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            config, shapes, model = build(name, Path(folder))
        ids = ((uniform((PROMPT_LEN,), f"{name}/ids") + 1) * VOCAB / 2).astype(np.int32).clip(3, 120)
        logits = logits_of(model, ids)
        top = np.mean(logits.max(1) - np.median(logits, 1))
        print(f"{name}: logits {logits.min():.2f} to {logits.max():.2f}, best over median {top:.2f}, {len(set(logits.argmax(1)))} argmax")
        arrays |= {f"{name}/config": np.array(json.dumps(config)), f"{name}/shapes": np.array(json.dumps(shapes))}
        arrays |= {f"{name}/ids": ids, f"{name}/logits": logits}
    if not only:
        np.savez_compressed(FILE, **arrays)
        print(f"{FILE.name}: {FILE.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
