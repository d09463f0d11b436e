"""Tensor types of GGUF files: how a block of each is laid out, and what values it stands for. Imports no jax.

Source of the layouts: github.com/ggml-org/ggml, ggml-common.h and ggml-quants.c. A tensor's rows are whole blocks. A block of
the plain types (Q4_0 to Q8_0, IQ4_NL) is 32 elements with one scale; a block of the K types is 256 elements in 8 or 16 groups,
whose small integer scales are multiplied by one float16. `dequantize` gives the bits that ggml's reference code gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

# Rows dequantized at a time are chosen so that the float32 result stays in a core's own cache.
CHUNK_ELEMENTS = 1 << 16
# The 16 values of a non-linear 4-bit quant.
IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)

Unpack = Callable[[np.ndarray, np.ndarray], None]


@dataclass(frozen=True)
class TensorType:
    """name; elements of a block; layout of a block (d: scale, m: minimum, q: low bits, h: high bits, s: scales of groups);
    unpack: writes blocks [n] into float32 [n, elements], None where the layout is a number already."""

    name: str
    elements: int
    layout: np.dtype
    unpack: Unpack | None = None


def _float(field: np.ndarray) -> np.ndarray:
    """float16 [n] to float32 [n, 1]."""
    return field.astype(np.float32)[:, None]


def _pieces(packed: np.ndarray, bits: int, width: int) -> np.ndarray:
    """Bytes [n, w] to uint8 [n, w / width, 8 / bits, width]: of every `width` bytes first their lowest bits, then the next."""
    groups = np.ascontiguousarray(packed).reshape(len(packed), -1, width)
    out = np.empty((*groups.shape[:2], 8 // bits, width), np.uint8)
    for i in range(8 // bits):
        np.right_shift(groups, i * bits, out=out[:, :, i])
    # The topmost piece has no bits above it.
    out[:, :, :-1] &= (1 << bits) - 1
    return out


def _flat(pieces: np.ndarray) -> np.ndarray:
    return pieces.reshape(len(pieces), -1)


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = blocks["q"]
    out *= _float(blocks["d"])


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = _flat(_pieces(blocks["q"], 4, 16)).view(np.int8) - np.int8(8)
    out *= _float(blocks["d"])


def _q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = _flat(_pieces(blocks["q"], 4, 16))
    out *= _float(blocks["d"])
    out += _float(blocks["m"])


def _five_bits(blocks: np.ndarray) -> np.ndarray:
    """uint8 [n, 32] from 16 bytes of low nibbles and 32 fifth bits."""
    quants = _flat(_pieces(blocks["q"], 4, 16))
    quants |= np.unpackbits(np.ascontiguousarray(blocks["h"]), axis=1, bitorder="little") << 4
    return quants


def _q5_0(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = _five_bits(blocks).view(np.int8) - np.int8(16)
    out *= _float(blocks["d"])


def _q5_1(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = _five_bits(blocks)
    out *= _float(blocks["d"])
    out += _float(blocks["m"])


def _iq4_nl(blocks: np.ndarray, out: np.ndarray) -> None:
    np.take(IQ4_VALUES, _flat(_pieces(blocks["q"], 4, 16)), out=out, mode="clip")
    out *= _float(blocks["d"])


def _grouped(out: np.ndarray, quants: np.ndarray, scales: np.ndarray, minima: np.ndarray | None = None) -> None:
    """out = quants * scale - minimum, with quants [n, 256] and a scale and minimum for each group: float32 [n, groups]."""
    groups = out.reshape(*scales.shape, -1)
    groups[:] = quants.reshape(groups.shape)
    groups *= scales[:, :, None]
    if minima is not None:
        groups -= minima[:, :, None]


def _q2_k(blocks: np.ndarray, out: np.ndarray) -> None:
    scales = _float(blocks["d"]) * (blocks["s"] & 15)
    minima = _float(blocks["m"]) * (blocks["s"] >> 4)
    _grouped(out, _pieces(blocks["q"], 2, 32), scales, minima)


def _q3_k(blocks: np.ndarray, out: np.ndarray) -> None:
    # 16 scales of 6 bits: the low nibbles in 8 bytes, the two high bits in 4.
    scales = _flat(_pieces(blocks["s"][:, :8], 4, 8)) | _flat(_pieces(blocks["s"][:, 8:], 2, 4)) << 4
    quants = _flat(_pieces(blocks["q"], 2, 32))
    # The high bit is stored inverted: where it is 0, 4 is taken away.
    quants |= _flat(_pieces(blocks["h"], 1, 32)) << 2
    _grouped(out, quants.view(np.int8) - np.int8(4), _float(blocks["d"]) * (scales.view(np.int8) - np.int8(32)))


def _scales_and_minima(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n, 8] each, from 12 bytes: 8 scales and 8 minima of 6 bits. The first four of each are the low bits of
    bytes 0-3 and 4-7; of the others, the low 4 bits are the nibbles of bytes 8-11 and the high bits the top of bytes 0-7."""
    first, second, third = np.split(blocks["s"], 3, axis=1)
    scales = np.concatenate([first & 63, (third & 15) | (first >> 2) & 48], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 2) & 48], axis=1)
    return _float(blocks["d"]) * scales, _float(blocks["m"]) * minima


def _q4_k(blocks: np.ndarray, out: np.ndarray) -> None:
    _grouped(out, _pieces(blocks["q"], 4, 32), *_scales_and_minima(blocks))


def _q5_k(blocks: np.ndarray, out: np.ndarray) -> None:
    quants = _flat(_pieces(blocks["q"], 4, 32))
    quants |= _flat(_pieces(blocks["h"], 1, 32)) << 4
    _grouped(out, quants, *_scales_and_minima(blocks))


def _q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    quants = _flat(_pieces(blocks["q"], 4, 64))
    quants |= _flat(_pieces(blocks["h"], 2, 32)) << 4
    _grouped(out, quants.view(np.int8) - np.int8(32), _float(blocks["d"]) * blocks["s"])


def _layout(*fields: tuple[str, str] | tuple[str, str, int]) -> np.dtype:
    return np.dtype(list(fields))


D, M = ("d", "<f2"), ("m", "<f2")
TYPES: dict[int, TensorType] = {
    0: TensorType("F32", 1, np.dtype("<f4")),
    1: TensorType("F16", 1, np.dtype("<f2")),
    2: TensorType("Q4_0", 32, _layout(D, ("q", "u1", 16)), _q4_0),
    3: TensorType("Q4_1", 32, _layout(D, M, ("q", "u1", 16)), _q4_1),
    6: TensorType("Q5_0", 32, _layout(D, ("h", "u1", 4), ("q", "u1", 16)), _q5_0),
    7: TensorType("Q5_1", 32, _layout(D, M, ("h", "u1", 4), ("q", "u1", 16)), _q5_1),
    8: TensorType("Q8_0", 32, _layout(D, ("q", "i1", 32)), _q8_0),
    10: TensorType("Q2_K", 256, _layout(("s", "u1", 16), ("q", "u1", 64), D, M), _q2_k),
    11: TensorType("Q3_K", 256, _layout(("h", "u1", 32), ("q", "u1", 64), ("s", "u1", 12), D), _q3_k),
    12: TensorType("Q4_K", 256, _layout(D, M, ("s", "u1", 12), ("q", "u1", 128)), _q4_k),
    13: TensorType("Q5_K", 256, _layout(D, M, ("s", "u1", 12), ("h", "u1", 32), ("q", "u1", 128)), _q5_k),
    14: TensorType("Q6_K", 256, _layout(("q", "u1", 128), ("h", "u1", 64), ("s", "i1", 16), D), _q6_k),
    20: TensorType("IQ4_NL", 32, _layout(D, ("q", "u1", 16)), _iq4_nl),
    30: TensorType("BF16", 1, np.dtype(ml_dtypes.bfloat16)),
}
# Names of the types that are not read, for the message only.
OTHER_TYPES = {
    **{9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS"},
    **{24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"},
}


def dequantize(kind: int, rows: np.ndarray) -> np.ndarray:
    """The values of stored bytes: uint8 [..., bytes of a row], contiguous, of type number `kind` (a key of TYPES), to [..., elements
    of a row]. float32, but F16 and BF16 keep their type; types without blocks are a view of `rows`."""
    tensor_type = TYPES[kind]
    if tensor_type.unpack is None:
        return rows.view(tensor_type.layout)
    blocks = rows.reshape(-1).view(tensor_type.layout)
    out = np.empty((blocks.size, tensor_type.elements), np.float32)
    step = CHUNK_ELEMENTS // tensor_type.elements
    # A damaged scale may be infinite or not a number; that is the file's value, not a fault of this arithmetic.
    with np.errstate(all="ignore"):
        for at in range(0, blocks.size, step):
            tensor_type.unpack(blocks[at : at + step], out[at : at + step])
    return out.reshape(*rows.shape[:-1], -1)
