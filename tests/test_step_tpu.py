"""The step programs of real models (few layers) compile for real TPUs on this machine: the cache is updated in place, memory beside it
does not depend on the pool, and quantized weights and experts are not copied out of their stacks. All of it: tests/compile_matrix.py."""

from __future__ import annotations

import compile_meshes
import pytest
from compile_matrix import row

pytestmark = pytest.mark.tpu_compile


@pytest.mark.parametrize(
    ("chip", "model", "quantize", "kind", "once"),
    [
        ("v5e", "llama3_8b", None, "mixed", False),
        ("v6e", "llama3_8b", None, "decode", False),
        ("v5e", "llama3_8b", "int4", "decode", True),
        ("v6e", "llama3_8b", "w8a8", "decode", True),
        ("v6e", "qwen3_30b_a3b", "int4", "decode", True),
        ("v5e", "gemma3_4b", "int8", "decode", True),
        ("v5p", "llama3_8b", "int8", "decode", True),
    ],
)
def test_step_compiles_in_place(chip: str, model: str, quantize: str | None, kind: str, once: bool) -> None:
    good, line = row(chip, model, quantize, kind, once)
    print(line)
    assert good, line


@pytest.mark.parametrize(("model", "kind"), [("llama3_70b", "decode"), ("llama3_70b", "mixed"), ("mixtral_8x22b", "decode")])
def test_large_models_compile_for_their_meshes(model: str, kind: str) -> None:
    """Whole, for chips that hold them: two sums a layer, halved in chunks; no weight moved. The others: compile_matrix.py --meshes."""
    good, line = compile_meshes.row(model, kind, once=True)
    print(line)
    assert good, line
    assert ("2 all-gather, 2 reduce-scatter" in line) == (kind == "mixed")
