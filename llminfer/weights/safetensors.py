"""Reader of safetensors checkpoints: one file, or an index and its shards. Imports no jax.

Format: github.com/huggingface/safetensors, "Format": 8 bytes of header length, a JSON header (name -> dtype, shape,
offsets), then the tensors' bytes without holes. Everything is checked against the file size before data is touched.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from llminfer.errors import UserError

FLOATS = {
    **{"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)},
    **{"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2)},
}
# Masks and counters that lie beside the weights.
OTHERS = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
}
DTYPES = FLOATS | {label: np.dtype(code) for label, code in OTHERS.items()}
MAX_JSON = 100_000_000
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsFile:
    """One open file. `tensors`: name -> (dtype, shape, byte offset from file start). Raises UserError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                if size < 10:
                    raise self._bad(f"not a safetensors file ({size} bytes)")
                file.seek(0)
                (length,) = struct.unpack("<Q", file.read(8))
                if length > min(MAX_JSON, size - 8):
                    raise self._bad(f"damaged or truncated: the header claims {length} bytes, the file has {size}; at most {MAX_JSON}")
                header = parse_object(file.read(length), path)
        except OSError as error:
            raise self._bad(f"cannot be read ({error.strerror})") from None
        header.pop("__metadata__", None)
        self.tensors = {name: self._entry(name, entry, 8 + length) for name, entry in header.items()}
        end = 8 + length
        for name, (dtype, shape, offset) in sorted(self.tensors.items(), key=lambda item: item[1][2]):
            if offset != end:
                raise self._bad(f"damaged: tensor {_shown(name)} starts at byte {offset}, the one before it ends at {end}")
            end = offset + _elements(shape) * dtype.itemsize
        if end != size:
            raise self._bad(f"damaged or truncated: the tensors end at byte {end}, the file has {size} bytes")

    def _bad(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what}".replace("\n", " "))

    def _entry(self, name: str, entry: Any, start: int) -> tuple[np.dtype, tuple[int, ...], int]:
        if not isinstance(entry, dict) or not isinstance(label := entry.get("dtype"), str):
            raise self._bad(f"damaged: the header entry of {_shown(name)} is not an object with a dtype")
        if label not in DTYPES:
            raise self._bad(f"tensor {_shown(name)} has dtype {_shown(label)}, which is not supported; legal: {', '.join(DTYPES)}")
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or not all(shape):
            raise self._bad(f"damaged: tensor {_shown(name)} has shape {_shown(shape)} and data_offsets {_shown(offsets)}")
        dtype, (begin, end) = DTYPES[label], offsets
        if end - begin != _elements(shape) * dtype.itemsize:
            raise self._bad(f"damaged: tensor {_shown(name)}: {label} {_shown(shape)} does not fill data_offsets {_shown(offsets)}")
        return dtype, tuple(shape), start + begin

    def require_float(self, name: str) -> None:
        """Raises UserError unless the tensor is of one of the dtypes of weights."""
        dtype = self.tensors[name][0]
        if dtype not in FLOATS.values():
            raise self._bad(f"tensor {_shown(name)} has dtype {dtype}, which is not supported for weights; legal: {', '.join(FLOATS)}")

    def read(self, name: str) -> np.ndarray:
        """A tensor in its stored dtype. Read and not mapped: mapped pages would count as this process's memory. Raises
        UserError when the file has changed."""
        dtype, shape, offset = self.tensors[name]
        size = _elements(shape) * dtype.itemsize
        try:
            data = np.fromfile(self.path, np.uint8, size, offset=offset)
        except OSError as error:
            raise self._bad(f"cannot be read ({error.strerror})") from None
        if data.size != size:
            raise self._bad(f"has become shorter while it was read: tensor {_shown(name)} ends at byte {offset + size}")
        return data.view(dtype).reshape(shape)


class SafetensorsSource:
    """The tensors of a checkpoint directory: see hf_names.Tensors. Opens every shard's header, no data.

    Raises UserError for a missing, damaged or truncated file and for an index that leaves the directory."""

    def __init__(self, directory: Path) -> None:
        self._files: dict[str, SafetensorsFile] = {}
        if (directory / SINGLE).is_file():
            file = SafetensorsFile(directory / SINGLE)
            self._files = dict.fromkeys(file.tensors, file)
        elif (directory / INDEX).is_file():
            self._open_index(directory)
        else:
            there = sorted(p.name for p in directory.iterdir())[:10]
            raise UserError(f"{directory}: has neither {SINGLE} nor {INDEX}; there is: {', '.join(there) or 'nothing'}")

    def _open_index(self, directory: Path) -> None:
        path = directory / INDEX
        named = parse_object(read_bounded(path), path).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise UserError(f"{path}: weight_map must be an object that names a file for each tensor")
        for shard in {str(value): value for value in named.values()}.values():
            if not isinstance(shard, str) or not _plain(shard):
                raise UserError(f"{path}: names the file {_shown(shard)}; legal: a plain *.safetensors file name in the same directory")
        shards = {shard: SafetensorsFile(directory / shard) for shard in sorted(set(named.values()))}
        for shard, file in shards.items():
            expected = {name for name, where in named.items() if where == shard}
            if wrong := sorted(expected ^ file.tensors.keys()):
                raise UserError(f"{path}: does not agree with {shard} about {_shown(wrong[0])} and {len(wrong) - 1} more tensors")
            self._files.update(dict.fromkeys(expected, file))

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: file.tensors[name][1] for name, file in self._files.items()}

    def require_float(self, name: str) -> None:
        self._files[name].require_float(name)

    def dtype(self, name: str) -> np.dtype:
        return self._files[name].tensors[name][0]

    def read(self, name: str, columns: slice = slice(None)) -> np.ndarray:
        """Tensor `name` as stored, of its last axis these; see SafetensorsFile.read."""
        array = self._files[name].read(name)
        return array if columns == slice(None) else array[..., columns]


def read_bounded(path: Path, most: int = MAX_JSON) -> bytes:
    """The bytes of a small file. Raises UserError when it cannot be read or has more than `most` bytes."""
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > most:
        raise UserError(f"{path}: is larger than {most} bytes, which no file of this kind is")
    return data


def parse_object(data: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in `data`; `path` is for the message. Raises UserError."""
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError):
        raise UserError(f"{path}: damaged: its JSON cannot be parsed") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged: its JSON must be an object, not {type(value).__name__}")
    return value


def _sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) <= 8 and all(type(x) is int and 0 <= x < 2**63 for x in value)


def _elements(shape: Any) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _plain(name: str) -> bool:
    """A file name in the same folder, and nothing else."""
    path_like = name.startswith(".") or any(c in name for c in "/\\:")
    return len(name) <= 255 and name.endswith(".safetensors") and name.isprintable() and not path_like


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
