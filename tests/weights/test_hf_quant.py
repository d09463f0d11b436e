"""Checkpoints that are stored quantized: what they stand for, and that rounding it to our MXFP4 loses nothing."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from goldens.families import golden
from safetensors.numpy import save_file

from llminfer import LLM
from llminfer.convert import convert
from llminfer.errors import UserError
from llminfer.quant import dequantize, quantize_to_mxfp4
from llminfer.weights import open_model
from llminfer.weights.hf_quant import MAGNITUDES, mxfp4

pytestmark = pytest.mark.usefixtures("compiled_fast")

CODES = np.array([*MAGNITUDES, *(-x for x in MAGNITUDES)], np.float32)


def packed(rng: np.random.Generator, experts: int, inner: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random (blocks, scales) as gpt-oss stores them, and the float32 [E, K, N] that they stand for."""
    codes, scales = rng.integers(0, 16, (experts, columns, inner // 32, 32)), rng.integers(122, 126, (experts, columns, inner // 32))
    scales[0, 0, 0], codes[0, 1, 0] = 4, 0  # nearly nothing; a group of zeros
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)
    whole = CODES[codes] * np.exp2(scales.astype(np.float32) - 127)[..., None]
    return blocks, scales.astype(np.uint8), whole.reshape(experts, columns, inner).swapaxes(1, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The tiny gpt-oss with its experts in MXFP4, in `packed`; in `plain` with what they stand for."""
    config, tensors, *_ = golden("gpt_oss")
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    rng, root = np.random.default_rng(3), tmp_path_factory.mktemp("gpt_oss")
    names = [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    stored = dict(tensors)
    for name in names:
        blocks, scales, tensors[name] = packed(rng, *tensors[name].shape)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        del stored[name]
    for kind, held in (("packed", stored), ("plain", tensors)):
        (root / kind).mkdir()
        save_file({name: np.ascontiguousarray(array) for name, array in held.items()}, root / kind / "model.safetensors")
        (root / kind / "config.json").write_text(json.dumps(config if kind == "packed" else config | {"quantization_config": None}))
    return root


def test_mxfp4_stands_for_what_the_standard_says() -> None:
    blocks, scales, whole = packed(np.random.default_rng(1), 2, 64, 5)
    for expert in range(2):
        np.testing.assert_array_equal(mxfp4(blocks[expert], scales[expert]).astype(np.float32).T, whole[expert])
    again = quantize_to_mxfp4(jnp.asarray(whole))
    np.testing.assert_array_equal(dequantize(again), whole)


def test_a_checkpoint_in_mxfp4_is_the_model_that_it_stands_for(folder: Path, tmp_path: Path) -> None:
    one, other = open_model(str(folder / "packed")), open_model(str(folder / "plain"))
    leaves = dict(other.leaves())
    for name, leaf in one.leaves():
        np.testing.assert_array_equal(leaf.astype(np.float32), leaves[name].astype(np.float32), err_msg=name)
    logits = []
    for kind, quantize in (("plain", None), ("packed", None), ("packed", "mxfp4_experts")):
        settings = dict(dtype="float32", page_size=8, chunk=32, slots=2, context=64, quantize=quantize)
        llm = LLM(str(folder / kind), **settings, expect=lambda _: (0, 0))
        logits.append(np.asarray(llm.prompt_logits(list(range(3, 35)))))
        llm.close()
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.abs(logits[2] - logits[0]).max() < 1e-5 * np.ptp(logits[0])
    convert(one, tmp_path / "copy", "safetensors", None, 10**9)
    convert(one, tmp_path / "wide", "safetensors", "bfloat16", 10**9)
    for name in ("copy", "wide"):
        for (left, a), (right, b) in zip(one.leaves(), open_model(str(tmp_path / name)).leaves(), strict=True):
            assert left == right and ("experts" not in left or "bias" in left or np.array_equal(a, b)), left
    assert "quantization_config" not in json.loads((tmp_path / "wide/config.json").read_text())


def test_what_is_not_known_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "packed/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(UserError, match="quantization_config: GptOssForCausalLM in 'awq' is not supported; legal: "):
        open_model(str(tmp_path))
