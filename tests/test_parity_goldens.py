"""Our engine against logits and greedy tokens that torch and transformers made (tests/goldens/make_models.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from llminfer import LLM, SamplingParams

GOLDENS = Path(__file__).parent / "goldens"
VARIANTS = [("tiny_llama", "gqa"), ("tiny_llama", "mha"), ("tiny_llama", "mqa"), ("tiny_mistral", "window")]
SHAPES = [(8, 16), (16, 32)]  # page size and chunk: the prompt of 70 in 5 chunks, then in 3


def write_checkpoint(folder: Path, file: str, variant: str) -> tuple[np.ndarray, np.ndarray]:
    """Writes config.json and model.safetensors into `folder`; gives ids int32 [70] and logits float32 [70, 128]."""
    with np.load(GOLDENS / f"{file}.npz") as data:
        prefix = f"{variant}/weights/"
        save_file({n.removeprefix(prefix): data[n].astype(np.float32) for n in data if n.startswith(prefix)}, folder / "model.safetensors")
        (folder / "config.json").write_text(str(data[f"{variant}/config"]))
        return data[f"{variant}/ids"], data[f"{variant}/logits"]


@pytest.mark.parametrize(("page_size", "chunk"), SHAPES)
@pytest.mark.parametrize(("file", "variant"), VARIANTS)
def test_tiny_model_gives_the_logits_of_transformers(file: str, variant: str, page_size: int, chunk: int, tmp_path: Path) -> None:
    ids, expected = write_checkpoint(tmp_path, file, variant)
    llm = LLM(str(tmp_path), dtype="float32", page_size=page_size, chunk=chunk, slots=2, context=128)
    logits = np.asarray(llm.prompt_logits(ids.tolist()))
    assert logits.dtype == np.float32 and logits.shape == expected.shape
    error = np.abs(logits - expected).max(1)
    assert error.max() <= 1e-4 * np.ptp(expected), f"first bad position {int(np.argmax(error > 1e-4 * np.ptp(expected)))}, errors {error}"


@pytest.mark.demo
def test_demo_model_gives_the_greedy_tokens_of_transformers() -> None:
    with np.load(GOLDENS / "smollm2.npz") as data:
        golden = {str(name): {key: data[f"{name}/{key}"] for key in ("ids", "tokens", "gaps")} for name in data["names"]}
    llm = LLM("demo", dtype="float32", context=2048)
    params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    outs = llm.generate([g["ids"].tolist() for g in golden.values()], params)
    for (name, g), out in zip(golden.items(), outs, strict=True):
        differs = np.flatnonzero(np.array(out.token_ids) != g["tokens"]) if len(out.token_ids) == 64 else [len(out.token_ids)]
        assert not len(differs), f"{name}: step {differs[0]} differs; gap of the golden's logits there {g['gaps'][min(differs[0], 63)]:.4f}"
