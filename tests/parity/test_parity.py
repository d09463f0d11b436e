"""The tiny goldens, made again by the installed transformers: says whether a mismatch lies in our engine or in the golden."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.parity
GOLDENS = Path(__file__).parent.parent / "goldens"
VARIANTS = [("tiny_llama", "gqa"), ("tiny_llama", "mha"), ("tiny_llama", "mqa"), ("tiny_mistral", "window")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # theirs, at import
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
