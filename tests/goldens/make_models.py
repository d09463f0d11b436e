"""Makes the golden files beside this script with torch and transformers.

    python tests/goldens/make_models.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf      # all three files
    python tests/goldens/make_models.py --only tiny

Needs torch, transformers, gguf, tokenizers, jinja2. Last made with torch 2.13.0 and transformers 5.23.0.

tiny_llama.npz, tiny_mistral.npz: random models; VARIANT is gqa, mha, mqa / window.
    VARIANT/config                JSON string: config.json as save_pretrained writes it
    VARIANT/ids                   int32 [70]
    VARIANT/logits                float32 [70, 128], one row a position
    VARIANT/weights/HF_NAME       float16; the model ran in float32 with exactly these values
smollm2.npz: greedy text of SmolLM2-135M-Instruct, dequantized to float32; NAME is a prompt.
    names                         the prompts, in order
    NAME/ids                      int32 [len], the prompt in the chat template
    NAME/tokens                   int32 [64], greedy, no penalties, the end token treated as any other
    NAME/gaps                     float32 [64], best less second-best logit of each step
    NAME/ranges                   float32 [64], best less worst logit of each step
    NAME/end_logits               float16 [3072], logits after the prompt of every 16th vocabulary id
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
PROMPT_LEN, NEW_TOKENS, VOCAB, END_STRIDE = 70, 64, 128, 16
WINDOW = 12
COMMON = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2}

# Every constant that a wrong reading could hide behind its default differs between the variants.
TINY: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "tiny_llama": {
        "gqa": (
            "Llama",
            {
                "num_hidden_layers": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
                "rms_norm_eps": 1e-5,
                "tie_word_embeddings": False,
                # With 16 dimensions the wavelengths are 6, 20, 63, 199, ...: kept, two blended, the rest divided.
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
        ),
        "mha": (
            "Llama",
            {
                "num_hidden_layers": 3,
                "num_key_value_heads": 4,
                "max_position_embeddings": 256,
                "rms_norm_eps": 1e-6,
                "tie_word_embeddings": True,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
        ),
        "mqa": (
            "Llama",
            {
                "num_hidden_layers": 3,
                "num_key_value_heads": 1,
                "head_dim": 32,  # not hidden_size / num_attention_heads
                "max_position_embeddings": 256,
                "rms_norm_eps": 0.02,
                "tie_word_embeddings": False,
                "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
            },
        ),
    },
    "tiny_mistral": {
        "window": (
            "Mistral",
            {
                "num_hidden_layers": 3,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                "rms_norm_eps": 1e-5,
                "tie_word_embeddings": False,
                "sliding_window": WINDOW,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
        ),
    },
}


def tiny_model(kind: str, sizes: dict[str, Any], seed: int) -> transformers.PreTrainedModel:
    """A random model whose weights are exact in float16; norms vary, attention is peaked, logits span several units."""
    config = getattr(transformers, f"{kind}Config")(**COMMON, **sizes)
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, attn_implementation="eager").float().eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=random)
            if weight.ndim == 1:
                value = 1 + 0.4 * noise
            elif "embed_tokens" in name:
                value = noise * (0.25 if config.tie_word_embeddings else 1.0)
            else:
                gain = 2.0 if "lm_head" in name else 1.5 if "q_proj" in name or "k_proj" in name else 1.0
                value = noise * gain / weight.shape[1] ** 0.5
            weight.copy_(value.half().float())
    return model


@torch.inference_mode()
def all_logits(model: transformers.PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """float32 [len, vocab]: the logits at every position of `ids`, computed without a cache."""
    return model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0].float().numpy()


def hf_config(model: transformers.PreTrainedModel) -> dict[str, Any]:
    """config.json as `save_pretrained` writes it, in the dialect of the installed transformers."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return json.loads((Path(folder) / "config.json").read_text())


def check_window(model: transformers.PreTrainedModel, ids: np.ndarray, logits: np.ndarray) -> None:
    """A token must reach exactly layers * (window - 1) positions ahead, and the window must matter."""
    changed = ids.copy()
    changed[0] = (ids[0] + 1) % VOCAB
    moved = np.abs(all_logits(model, changed) - logits).max(1)
    reach = model.config.num_hidden_layers * (WINDOW - 1)
    assert moved[: reach + 1].min() > 0 and moved[reach + 1 :].max() == 0, np.flatnonzero(moved)
    model.config.sliding_window = None
    wide = np.abs(all_logits(model, ids) - logits).max(1)
    model.config.sliding_window = WINDOW
    assert wide[:WINDOW].max() < 1e-4 and wide[WINDOW:].min() > 1e-2, wide
    print(f"  window {WINDOW}: reach {reach}, without it logits move by {wide[WINDOW:].min():.2f} to {wide.max():.2f}")


def make_tiny(file: str) -> None:
    arrays: dict[str, np.ndarray] = {}
    for number, (variant, (kind, sizes)) in enumerate(TINY[file].items()):
        model = tiny_model(kind, sizes, seed=100 + number)
        ids = np.random.default_rng(number).integers(0, VOCAB, PROMPT_LEN).astype(np.int32)
        logits = all_logits(model, ids)
        print(f"{file}/{variant}: logits {logits.min():.2f} to {logits.max():.2f}, distinct argmax {len(set(logits.argmax(1)))}")
        if kind == "Mistral":
            check_window(model, ids, logits)
        arrays |= {f"{variant}/config": np.array(json.dumps(hf_config(model))), f"{variant}/ids": ids, f"{variant}/logits": logits}
        for name, weight in model.named_parameters():
            arrays[f"{variant}/weights/{name}"] = weight.detach().numpy().astype(np.float16)
    save(file, arrays)


def prompt_texts() -> dict[str, str]:
    """The user turns. The long one depends on the Python version: its ids are taken from smollm2.npz once that exists."""
    texts = [json.__doc__, textwrap.dedent.__doc__, argparse.__doc__, re.__doc__]
    return {
        "question": "What is the capital of France, and what is it known for?",
        "code": "Write a Python function that returns the n-th Fibonacci number without recursion.",
        "list": "List seven things to check before a long bicycle tour.",
        "story": "Tell me a short story about a lighthouse keeper who finds a message in a bottle.",
        "long": "Summarise this documentation in a few sentences.\n\n" + "\n\n".join(text or "" for text in texts)[:5000],
    }


@torch.inference_mode()
def greedy(model: transformers.PreTrainedModel, ids: np.ndarray) -> dict[str, np.ndarray]:
    """NEW_TOKENS greedy tokens with a cache; then all steps again without one, which must choose the same tokens."""
    step, cache, rows = torch.from_numpy(ids.astype(np.int64))[None], None, []
    for _ in range(NEW_TOKENS):
        out = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, row = out.past_key_values, out.logits[0, -1].float()
        rows.append(row.numpy())
        step = row.argmax()[None, None]
    logits = np.stack(rows)
    tokens = logits.argmax(1).astype(np.int32)
    best = np.sort(logits, 1)
    whole = torch.from_numpy(np.concatenate([ids, tokens[:-1]]).astype(np.int64))[None]
    again = model(whole, use_cache=False, logits_to_keep=NEW_TOKENS).logits[0].float().numpy()
    gaps, ranges = best[:, -1] - best[:, -2], best[:, -1] - best[:, 0]
    error, differ = np.abs(again - logits).max(), int((again.argmax(1) != tokens).sum())
    print(f"  error {error:.1e}, smallest gap {gaps.min():.4f} of range {ranges.mean():.0f}, tokens that differ {differ}")
    assert (again.argmax(1) == tokens)[gaps > 1e-3 * ranges].all()
    return {"tokens": tokens, "gaps": gaps, "ranges": ranges, "end_logits": logits[0, ::END_STRIDE].astype(np.float16)}


def make_smollm2(gguf_path: Path, new_prompts: bool) -> None:
    import torch_llama

    model, tokenizer = torch_llama.load_model(gguf_path), torch_llama.load_tokenizer(gguf_path)
    old = HERE / "smollm2.npz"
    texts = prompt_texts()
    if old.exists() and not new_prompts:
        with np.load(old) as file:
            prompts = {str(name): file[f"{name}/ids"] for name in file["names"]}
    else:
        chat = {name: torch_llama.chat_text(gguf_path, text) for name, text in texts.items()}
        prompts = {name: np.array(tokenizer.encode(text).ids, np.int32) for name, text in chat.items()}
    arrays = {"names": np.array(list(prompts))}
    for name, ids in prompts.items():
        print(f"smollm2/{name}: {len(ids)} tokens")
        found = greedy(model, ids)
        print("  " + repr(tokenizer.decode(found["tokens"].tolist(), skip_special_tokens=False)))
        arrays |= {f"{name}/ids": ids, **{f"{name}/{key}": value for key, value in found.items()}}
    save("smollm2", arrays)


def save(file: str, arrays: dict[str, np.ndarray]) -> None:
    path = HERE / f"{file}.npz"
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} KB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the golden files with torch and transformers.")
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct as a GGUF file; needed for smollm2")
    parser.add_argument("--only", choices=("tiny", "smollm2"), help="make only these")
    parser.add_argument("--new-prompts", action="store_true", help="tokenize the prompts again instead of keeping the old ids")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only != "smollm2":
        for file in TINY:
            make_tiny(file)
    if args.only != "tiny":
        if args.gguf is None or not args.gguf.is_file():
            parser.error(f"--gguf {args.gguf}: must be a GGUF file")
        make_smollm2(args.gguf, args.new_prompts)


if __name__ == "__main__":
    main()
