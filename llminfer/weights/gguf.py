"""Reader of GGUF files (versions 2 and 3, little endian), llama architecture. Imports no jax.

Format: github.com/ggml-org/ggml, docs/gguf.md. A header (magic, version, counts), key-value metadata, tensor
descriptions, then the tensors' bytes. The file comes from outside: every count, length and offset is checked against
the size of the file before it is used, and any damage is one UserError. Only headers are read by `GgufFile(path)`.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llminfer.config import ModelConfig, RopeScaling
from llminfer.errors import UserError

ARCHITECTURES = ("llama",)
ROPE_FACTORS = "rope_freqs.weight"

# Type number -> (name, elements in a block, layout of a block). d: scale, m: minimum, q: quants, two a byte for 4 bits.
TYPES: dict[int, tuple[str, int, np.dtype]] = {
    0: ("F32", 1, np.dtype("<f4")),
    1: ("F16", 1, np.dtype("<f2")),
    2: ("Q4_0", 32, np.dtype([("d", "<f2"), ("q", "u1", 16)])),
    3: ("Q4_1", 32, np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)])),
    8: ("Q8_0", 32, np.dtype([("d", "<f2"), ("q", "i1", 32)])),
    30: ("BF16", 1, np.dtype("<u2")),
}
# Names of the types that are not read, for the message only.
OTHER_TYPES = {
    **{6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K"},
    **{16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS"},
    **{24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"},
}
# Metadata value types with a fixed size. 7 is a bool of one byte, 8 a string, 9 an array.
SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8", 12: "<f8"}
BOOL, STRING, ARRAY = 7, 8, 9
MAX_DIMS = 4
# Of one metadata array; the largest vocabulary there may be is 2**21 (config.LIMITS).
MAX_ELEMENTS = 1 << 24
# Rows dequantized at a time are chosen so that the float32 result stays in a core's own cache.
CHUNK_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies. shape: slowest axis first (the reverse of the file's order); offset: bytes from file start."""

    shape: tuple[int, ...]
    type: int
    offset: int
    nbytes: int


class GgufFile:
    """An open file: `metadata` (key -> int, float, bool, str or list of these) and `tensors` (name -> Tensor).

    Raises UserError for anything that is not a whole, supported GGUF file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = file.seek(0, 2)
                if self.size < 24:
                    raise UserError(f"{path}: not a GGUF file ({self.size} bytes; the header alone has 24)")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        self._at = 0
        if self._take(4) != b"GGUF":
            raise self._bad("not a GGUF file (the first four bytes are not 'GGUF')")
        version = self._number("<I")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "big-endian files are not supported" if swapped in (2, 3) else "legal: 2, 3"
            raise self._bad(f"GGUF version {version}: {what}")
        tensors, pairs = self._number("<Q"), self._number("<Q")
        self._need(pairs * 13 + tensors * 32, f"{pairs} metadata entries and {tensors} tensors")
        self.metadata = self._read_metadata(pairs)
        self._check_kind()
        self.tensors = self._read_tensors(tensors)

    def _bad(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what}".replace("\n", " "))

    def _need(self, n: int, what: str) -> None:
        if n > self.size - self._at:
            raise self._bad(f"damaged or truncated: {what} at byte {self._at} need {n} bytes, the file has {self.size - self._at} left")

    def _take(self, n: int, what: str = "a field") -> bytes:
        self._need(n, what)
        self._at += n
        return self._map[self._at - n : self._at]

    def _number(self, code: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _text(self, what: str, limit: int) -> str:
        length = self._number("<Q")
        if length > limit:
            raise self._bad(f"damaged: {what} of {length} bytes at byte {self._at}; at most {limit} fit")
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError:
            raise self._bad(f"damaged: {what} before byte {self._at} is not UTF-8") from None

    def _read_metadata(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self._text("a metadata key", 65535)
            if key in found:
                raise self._bad(f"damaged: metadata key {_shown(key)} occurs twice")
            found[key] = self._read_value(key, self._number("<I"))
        return found

    def _read_value(self, key: str, kind: int) -> Any:
        if kind == STRING:
            return self._text(f"the string {_shown(key)}", self.size)
        if kind == ARRAY:
            return self._read_array(key)
        if kind not in SCALARS:
            raise self._bad(f"damaged: metadata key {_shown(key)} has the unknown value type {kind}; legal: 0 to 12")
        dtype = np.dtype(SCALARS[kind])
        value = np.frombuffer(self._take(dtype.itemsize), dtype)[0].item()
        return bool(value) if kind == BOOL else value

    def _read_array(self, key: str) -> list[Any]:
        kind, count = self._number("<I"), self._number("<Q")
        what = f"{count} elements of {_shown(key)}"
        if count > MAX_ELEMENTS:
            raise self._bad(f"damaged: {what}; at most {MAX_ELEMENTS}")
        if kind == ARRAY:
            raise self._bad(f"metadata key {_shown(key)} is an array of arrays, which is not supported")
        if kind == STRING:
            self._need(count * 8, what)
            return self._read_strings(count, what)
        if kind not in SCALARS:
            raise self._bad(f"damaged: array {_shown(key)} has the unknown element type {kind}; legal: 0 to 8, 10 to 12")
        dtype = np.dtype(SCALARS[kind])
        values = np.frombuffer(self._take(count * dtype.itemsize, what), dtype)
        return (values != 0).tolist() if kind == BOOL else values.tolist()

    def _read_strings(self, count: int, what: str) -> list[str]:
        # Vocabularies have 10**5 entries: one plain loop with local names (20 ms), bounds checked once a string.
        data, at, size, unpack = self._map, self._at, self.size, struct.Struct("<Q").unpack_from
        strings: list[str] = []
        try:
            for _ in range(count):
                (length,) = unpack(data, at)
                at += 8
                if length > size - at:
                    raise self._bad(f"damaged or truncated: {what}: a string of {length} bytes at byte {at}, the file has {size - at} left")
                strings.append(data[at : at + length].decode())
                at += length
        except UnicodeDecodeError:
            raise self._bad(f"damaged: {what}: the string at byte {at} is not UTF-8") from None
        except struct.error:
            raise self._bad(f"damaged or truncated: {what} run past the end of the file") from None
        self._at = at
        return strings

    def _check_kind(self) -> None:
        architecture = self.metadata.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise self._bad(f"architecture {_shown(architecture)} is not supported; legal: {', '.join(ARCHITECTURES)}")
        if self.metadata.get("split.count", 1) not in (0, 1):
            raise self._bad("is one part of a split model; merge the parts into one file first")

    def _read_tensors(self, count: int) -> dict[str, Tensor]:
        described: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self._text("a tensor name", 1024)
            if name in described:
                raise self._bad(f"damaged: tensor {_shown(name)} occurs twice")
            dims = self._number("<I")
            if not 1 <= dims <= MAX_DIMS:
                raise self._bad(f"damaged: tensor {_shown(name)} has {dims} dimensions; legal: 1 to {MAX_DIMS}")
            shape = struct.unpack(f"<{dims}Q", self._take(8 * dims))[::-1]
            described[name] = shape, self._number("<I"), self._number("<Q")
        alignment = self.metadata.get("general.alignment", 32)
        if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment not in [8 << i for i in range(18)]:
            raise self._bad(f"general.alignment={_shown(alignment)}: must be a power of two from 8 to {8 << 17}")
        start = -(-self._at // alignment) * alignment
        tensors = {name: self._place(name, info, start, alignment) for name, info in described.items()}
        end, last = start, ""
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
            if tensor.offset < end:
                raise self._bad(f"damaged: tensors {_shown(last)} and {_shown(name)} overlap")
            end, last = tensor.offset + tensor.nbytes, name
        return tensors

    def _place(self, name: str, info: tuple[tuple[int, ...], int, int], start: int, alignment: int) -> Tensor:
        shape, kind, offset = info
        if kind not in TYPES:
            legal = ", ".join(entry[0] for entry in TYPES.values())
            raise self._bad(
                f"tensor {_shown(name)} has type {OTHER_TYPES.get(kind, 'unknown')} ({kind}), which is not supported; legal: {legal}"
            )
        label, block, layout = TYPES[kind]
        elements = 1
        for size in shape:
            elements *= size
        if not elements or shape[-1] % block:
            raise self._bad(f"damaged: tensor {_shown(name)} of type {label} has shape {list(shape)}; rows must be whole blocks of {block}")
        nbytes = elements // block * layout.itemsize
        if offset % alignment or start + offset + nbytes > self.size:
            raise self._bad(
                f"damaged or truncated: tensor {_shown(name)} {list(shape)} is {nbytes} bytes at byte {start + offset} "
                f"(aligned to {alignment}), the file has {self.size} bytes"
            )
        return Tensor(shape, kind, start + offset, nbytes)

    def blocks(self, name: str) -> np.ndarray:
        """The stored blocks of a tensor, a view of the file: shape [..., row elements / block elements]."""
        tensor = self.tensors[name]
        _, block, layout = TYPES[tensor.type]
        count = tensor.nbytes // layout.itemsize
        flat = np.frombuffer(self._map, layout, count, tensor.offset)
        return flat.reshape(*tensor.shape[:-1], tensor.shape[-1] // block)

    def read(self, name: str) -> np.ndarray:
        """A tensor as float32."""
        return dequantize(self.tensors[name].type, self.blocks(name))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def dequantize(kind: int, blocks: np.ndarray) -> np.ndarray:
    """Blocks [..., n] of type number `kind` (see TYPES) to float32 [..., n * block elements].

    Bit for bit the reference formulas of ggml: Q4_0 d (q - 8), Q4_1 d q + m, Q8_0 d q; the low nibbles of a 4-bit block
    are its first 16 elements, the high nibbles the others. kind must be a key of TYPES."""
    label, block, _ = TYPES[kind]
    if label in ("F32", "F16"):
        return blocks.astype(np.float32)
    if label == "BF16":
        return (blocks.astype(np.uint32) << 16).view(np.float32)
    flat = blocks.reshape(-1)
    out = np.empty((flat.size, block), np.float32)
    step = CHUNK_ELEMENTS // block
    # A damaged scale may be infinite or not a number; that is the file's value, not a fault of this arithmetic.
    with np.errstate(all="ignore"):
        for at in range(0, flat.size, step):
            _dequantize_chunk(label, flat[at : at + step], out[at : at + step])
    return out.reshape(*blocks.shape[:-1], blocks.shape[-1] * block)


def _dequantize_chunk(label: str, blocks: np.ndarray, out: np.ndarray) -> None:
    quants, scale = blocks["q"], blocks["d"].astype(np.float32)[:, None]
    if label == "Q8_0":
        np.multiply(quants, scale, out=out)
        return
    packed = np.ascontiguousarray(quants)
    nibbles = np.empty((len(packed), 2, 16), np.uint8)
    np.bitwise_and(packed, 15, out=nibbles[:, 0])
    np.right_shift(packed, 4, out=nibbles[:, 1])
    values = nibbles.reshape(len(packed), 32)
    if label == "Q4_0":
        np.multiply(values.view(np.int8) - np.int8(8), scale, out=out)
        return
    np.multiply(values, scale, out=out)
    out += blocks["m"].astype(np.float32)[:, None]


# GGUF names of the llama architecture -> Hugging Face names; N is the layer.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def hf_name(name: str) -> str:
    """The Hugging Face name of a llama tensor; a name that has none stays as it is."""
    match = re.fullmatch(r"blk\.(0|[1-9]\d{0,4})\.(\w+)\.weight", name, re.ASCII)
    if match and match[2] in LAYER_NAMES:
        return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.weight"
    return TOP_NAMES.get(name, name)


class GgufSource:
    """The tensors of a llama GGUF file under Hugging Face names, in Hugging Face order: see assemble.Source."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        self._file, self._config = file, config
        self._names = {hf_name(name): name for name in file.tensors if name != ROPE_FACTORS}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._file.tensors[ours].shape for name, ours in self._names.items()}

    def read(self, name: str) -> np.ndarray:
        """Tensor `name` as float32. Rows of q and k are stored for interleaved rotary pairs (0, 1), (2, 3), ...; they
        come back in the half-split order (i, i + head_dim / 2). Rows are moved while still quantized."""
        stored = self._names[name]
        blocks = self._file.blocks(stored)
        if name.endswith((".q_proj.weight", ".k_proj.weight")):
            pairs = blocks.reshape(-1, self._config.head_dim // 2, 2, blocks.shape[-1])
            blocks = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(blocks.shape)
        return dequantize(self._file.tensors[stored].type, blocks)


def read_config(file: GgufFile) -> ModelConfig:
    """The ModelConfig of an open file. Raises UserError."""
    factors = file.read(ROPE_FACTORS) if ROPE_FACTORS in file.tensors else None
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    try:
        return config_from_gguf(file.metadata, shapes, factors)
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from None


def config_from_gguf(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rope_factors: np.ndarray | None = None
) -> ModelConfig:
    """ModelConfig from the metadata, tensor shapes (GGUF names) and the values of `rope_freqs.weight` if there is one.

    Raises UserError for what the model code cannot express: experts, partial rotary, unequal layers, other scalings."""
    get = _Fields(metadata, f"{metadata.get('general.architecture')}.")
    if get.integer("expert_count", 0) > 0:
        raise UserError(f"expert_count={metadata['llama.expert_count']}: mixture-of-experts models are not supported from GGUF")
    hidden, heads = get.integer("embedding_length"), get.integer("attention.head_count")
    if heads < 1 or hidden < 1:
        raise UserError(f"attention.head_count={heads}, embedding_length={hidden}: must be at least 1")
    head_dim = get.integer("attention.key_length", hidden // heads)
    for field in ("attention.value_length", "rope.dimension_count"):
        if get.integer(field, head_dim) != head_dim:
            raise UserError(f"{field}={get.integer(field)}: not supported; legal: the head size, {head_dim}")
    theta = get.number("rope.freq_base", 10000.0)
    tokens = metadata.get("tokenizer.ggml.tokens")
    embed = shapes.get("token_embd.weight", (0,))
    ids = _Fields(metadata, "tokenizer.ggml.")
    eos = [ids.integer(f, -1) for f in ("eos_token_id", "eot_token_id", "eom_token_id")]
    bos = ids.integer("bos_token_id", -1)
    return ModelConfig(
        name=str(metadata.get("general.name", "gguf"))[:200],
        vocab_size=len(tokens) if isinstance(tokens, list) else embed[0],
        hidden_size=hidden,
        intermediate_size=get.integer("feed_forward_length"),
        num_layers=get.integer("block_count"),
        num_heads=heads,
        num_kv_heads=get.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position=get.integer("context_length"),
        windows=(get.integer("attention.sliding_window", 0),),
        rope_theta=theta,
        rope_scaling=_rope_scaling(get, head_dim, theta, rope_factors),
        norm_eps=get.number("attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in shapes,
        bos_id=None if bos < 0 else bos,
        eos_ids=tuple(dict.fromkeys(token for token in eos if token >= 0)),
    )


class _Fields:
    """Typed look-ups of metadata keys under one prefix."""

    def __init__(self, metadata: Mapping[str, Any], prefix: str) -> None:
        self._metadata, self._prefix = metadata, prefix

    def _get(self, field: str, default: Any, kinds: tuple[type, ...], what: str) -> Any:
        value = self._metadata.get(self._prefix + field, default)
        if value is None:
            raise UserError(f"metadata key {self._prefix}{field} is missing")
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise UserError(f"{self._prefix}{field}={_shown(value)}: must be {what}, the same for all layers")
        return value

    def integer(self, field: str, default: int | None = None) -> int:
        return self._get(field, default, (int,), "an integer")

    def number(self, field: str, default: float | None = None) -> float:
        return float(self._get(field, default, (int, float), "a number"))

    def text(self, field: str, default: str) -> str:
        return self._get(field, default, (str,), "a string")


def _rope_scaling(get: _Fields, head_dim: int, theta: float, factors: np.ndarray | None) -> RopeScaling | None:
    kind = get.text("rope.scaling.type", "none")
    factor = get.number("rope.scaling.factor", get.number("rope.scale_linear", 1.0))
    if kind not in ("none", "linear") or not 1.0 <= factor < 1e6:
        raise UserError(f"rope.scaling.type={kind!r}, factor {factor:g}: not supported; legal: none, linear with a factor of at least 1")
    linear = RopeScaling("linear", factor) if factor > 1.0 else None
    if factors is None:
        return linear
    if factors.shape != (head_dim // 2,) or not np.all(np.isfinite(factors)) or factors.min() < 1.0:
        raise UserError(f"{ROPE_FACTORS} of shape {list(factors.shape)}: must be {head_dim // 2} numbers of at least 1")
    if np.all(factors == 1.0):
        return linear
    # The file keeps only the resulting factors. Llama 3.1 and 3.2 use these bounds with a factor of 8 or 32.
    scaling = RopeScaling("llama3", float(factors.max()), 1.0, 4.0, 8192)
    if linear is not None or not (theta >= 1 and np.allclose(factors, llama3_factors(head_dim, theta, scaling), rtol=1e-4, atol=0)):
        legal = "the Llama 3 factors (low 1, high 4, original context 8192) without other scaling"
        raise UserError(f"{ROPE_FACTORS}: not supported; legal: {legal}")
    return scaling


def llama3_factors(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """By what each rotary frequency theta^(-2i/head_dim) is divided under Llama 3 scaling: [head_dim / 2] float64.

    1 for wavelengths under original / high, `factor` over original / low, and between them a blend linear in
    original / wavelength (Llama 3.1 model code)."""
    waves = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = np.clip((scaling.original_max_position / waves - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - blend) / scaling.factor + blend)
