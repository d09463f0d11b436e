"""The same GGUF file in llama.cpp and here gives the same logits: so names, keys and what conversion changed are understood alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf_models import MODELS, model
from gguf_writer import f32, gguf_bytes, random_parts, tensors_of

from llminfer import LLM
from llminfer.weights import Checkpoint

pytestmark = pytest.mark.parity
IDS = np.random.default_rng(3).integers(0, 64, 40).tolist()
# llama.cpp decides by the number of layers what these are: it takes a tiny one for another model.
LEFT_OUT = ("gemma2:27b", "command-r", "exaone4")
# It ignores the window of these, so only as many positions are compared.
WITHOUT_WINDOW = {"llama:biases": 16, "phi3": 16, "starcoder2": 16}


def llama_cpp_logits(path: Path) -> np.ndarray:
    """float32 [len(IDS), 64], float32 cache."""
    lib = pytest.importorskip("llama_cpp")
    lib.llama_log_set(SILENT := lib.llama_log_callback(lambda level, text, data: None), None)
    loaded = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    assert loaded and SILENT
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 64
    params.type_k = params.type_v = 0
    params.flash_attn_type, params.swa_full = 0, True
    params.n_threads = params.n_threads_batch = 1
    context = lib.llama_init_from_model(loaded, params)
    batch = lib.llama_batch_init(64, 0, 1)
    batch.n_tokens = len(IDS)
    for i, token in enumerate(IDS):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    assert lib.llama_decode(context, batch) == 0
    logits = np.ctypeslib.as_array(lib.llama_get_logits(context), shape=(len(IDS), 64)).copy()
    lib.llama_free(context)
    lib.llama_model_free(loaded)
    return logits


@pytest.mark.parametrize("name", [name for name in MODELS if name not in LEFT_OUT])
def test_logits_are_those_of_llama_cpp(tmp_path, monkeypatch, name):
    architecture, config, metadata = model(name)
    # Small matrices, or attention looks at one position only.
    parts = {part: array * np.float32(0.2 if array.ndim == 2 and "norm" not in part else 1) for part, array in random_parts(config).items()}
    tensors = tensors_of(config, parts, architecture)
    if config.ropes and config.ropes[0].kind == "longrope":
        tensors["rope_factors_long.weight"] = f32(np.array(config.ropes[0].long_factors))
        tensors["rope_factors_short.weight"] = f32(np.array(config.ropes[0].short_factors))
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(metadata | {"tokenizer.ggml.model": "none", f"{architecture}.vocab_size": 64}, tensors))
    expected = llama_cpp_logits(path)
    monkeypatch.setattr(Checkpoint, "tokenizer", lambda self: None)
    # Nothing is generated, so nothing but prompt_logits is compiled.
    settings = {"slots": 2, "context": 64, "chunk": 32, "cache_dir": str(tmp_path / "cache"), "dtype": "float32"}
    llm = LLM(str(path), expect=lambda llm: (0, 0), **settings)
    compared = slice(WITHOUT_WINDOW.get(name))
    difference = np.abs(np.asarray(llm.prompt_logits(IDS)) - expected)[compared].max() / np.ptp(expected)
    # Its GELU is a table of float16; of the exact GELU (GPT-NeoX) it knows nothing. Its YaRN scale is rounded elsewhere.
    assert difference < (1e-3 if config.activation != "silu" else 1e-4 if "rope.scaling.yarn_attn_factor" in str(metadata) else 3e-6)
