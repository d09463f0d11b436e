"""Tensors of Hugging Face checkpoints that are stored quantized, as the bfloat16 that they stand for. Imports no jax.

mxfp4 (gpt-oss): NAME is stored as NAME_blocks uint8 [E, N, K / 32, 16], in each byte an element's E2M1 code in the low and the next one's
in the high nibble, and NAME_scales uint8 [E, N, K / 32], the exponent of a power of two plus 127 (OCP Microscaling Formats 1.0). It stands
for [E, K, N]. bfloat16 holds all of it exactly, and rounding to our MXFP4 (--quantize mxfp4 or mxfp4_experts) gives the same numbers again:
a group's largest magnitude may only get another of the scales that all its numbers are multiples of.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llminfer.errors import UserError
from llminfer.weights.safetensors import SafetensorsSource

BLOCKS, SCALES = "_blocks", "_scales"
GROUP = 32
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the last three bits of an E2M1
LEAST, MOST = 2, 252  # scales of which 0.5 and 6 are normal bfloat16


def check(config: Mapping[str, Any], architecture: str, where: Path) -> None:
    """Raises UserError for a quantization_config that `dequantized` does not know."""
    found = config.get("quantization_config")
    if not found:
        return
    method = found.get("quant_method") if isinstance(found, dict) else None
    if (architecture, method) != ("GptOssForCausalLM", "mxfp4"):
        named = method if isinstance(method, str) else type(found).__name__
        raise UserError(
            f"{where}: quantization_config: {architecture} in {named[:40]!r} is not supported; legal: float32, float16, bfloat16, and "
            "GptOssForCausalLM in mxfp4"
        )


class Dequantized:
    """Stored tensors with those in MXFP4 under the names and shapes of what they stand for: see hf_names.Tensors."""

    def __init__(self, tensors: SafetensorsSource) -> None:
        self._tensors, shapes = tensors, tensors.shapes()
        self._packed = {}
        for name, shape in shapes.items():
            whole = name.removesuffix(BLOCKS)
            if whole != name and len(shape) == 4 and shape[3] * 2 == GROUP and shapes.get(whole + SCALES) == shape[:3]:
                self._packed[whole] = (shape[0], shape[2] * GROUP, shape[1])

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        hidden = {name + end for name in self._packed for end in (BLOCKS, SCALES)}
        return {name: shape for name, shape in self._tensors.shapes().items() if name not in hidden} | self._packed

    def require_float(self, name: str) -> None:
        if name not in self._packed:
            self._tensors.require_float(name)
            return
        for end in (BLOCKS, SCALES):
            if (dtype := self._tensors.dtype(name + end)) != np.uint8:
                raise UserError(f"tensor {name + end!r} has dtype {dtype}: must be uint8, as all of MXFP4")

    def read(self, name: str, columns: slice = slice(None)) -> np.ndarray:
        if name not in self._packed:
            return self._tensors.read(name, columns)
        blocks, scales = (self._tensors.read(name + end)[:, columns] for end in (BLOCKS, SCALES))
        if scales.max(initial=0) > MOST:
            raise UserError(f"tensor {name + SCALES!r}: a scale is {scales.max()}: must be at most {MOST}")
        out = np.empty((*scales.shape[:2], scales.shape[2] * GROUP), ml_dtypes.bfloat16)
        for expert in range(len(out)):  # one at a time: what lies between takes several times as much memory
            out[expert] = mxfp4(blocks[expert], scales[expert])
        return out.swapaxes(1, 2)


def mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """bfloat16 [N, K] of blocks uint8 [N, K / 32, 16] and scales uint8 [N, K / 32]. What is under 2**-125 becomes 0."""
    bits = _pairs()[blocks].view(np.uint16).reshape(*scales.shape, GROUP)
    shift = (scales.astype(np.int16) - 127 << 7).view(np.uint16)  # of the exponent's bits
    live = ((bits & 0x7FFF) != 0) & (scales >= LEAST)[..., None]
    return np.where(live, bits + shift[..., None], np.uint16(0)).view(ml_dtypes.bfloat16).reshape(len(scales), -1)


def _pairs() -> np.ndarray:
    """Byte -> the bits of its two bfloat16, the low nibble's first."""
    values = np.array([*MAGNITUDES, *(-x for x in MAGNITUDES)], ml_dtypes.bfloat16).view(np.uint16)
    byte = np.arange(256)
    return np.ascontiguousarray(np.stack([values[byte & 15], values[byte >> 4]], axis=1)).view(np.uint32)[:, 0]
