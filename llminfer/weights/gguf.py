"""Reader of GGUF files (versions 2 and 3, little endian), whole or split into parts. Imports no jax.

Format: github.com/ggml-org/ggml, docs/gguf.md. A header (magic, version, counts), key-value metadata, tensor
descriptions, then the tensors' bytes. The file comes from outside: every count, length and offset is checked against
the size of the file before it is used, and any damage is one UserError. Only headers are read by `GgufFile(path)`.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llminfer.errors import UserError
from llminfer.weights.gguf_types import OTHER_TYPES, TYPES, dequantize

# Metadata value types with a fixed size. 7 is a bool of one byte, 8 a string, 9 an array.
SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8", 12: "<f8"}
BOOL, STRING, ARRAY = 7, 8, 9
MAX_DIMS = 4
# Of all metadata arrays of a file together. Vocabularies have three to four arrays of some 2**18 elements.
MAX_ELEMENTS = 1 << 22
# How the parts of a split file are named: prefix, number from 1, count (llama.cpp, gguf-split).
PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies. shape: slowest axis first (the reverse of the file's order); offset: bytes from file start."""

    shape: tuple[int, ...]
    type: int
    offset: int
    nbytes: int


class GgufFile:
    """An open file: `metadata` (key -> int, float, bool, str or list of these), `tensors` (name -> Tensor), and `paths`, of
    which a split file has several; any of its parts opens all. Raises UserError for anything that is not whole and supported."""

    def __init__(self, path: Path) -> None:
        self.path = path
        opened = _Part(path)
        count = opened.split("count", 1)
        parts = [opened] if count <= 1 else _siblings(opened, count)
        self.paths = [part.path for part in parts]
        self.metadata = parts[0].metadata
        self._parts: dict[str, _Part] = {}
        for part in parts:
            if twice := sorted(part.tensors.keys() & self._parts.keys()):
                raise part.bad(f"damaged: tensor {shown(twice[0])} is also in another part of the split model")
            self._parts |= dict.fromkeys(part.tensors, part)
        self.tensors = {name: part.tensors[name] for name, part in self._parts.items()}
        if count > 1 and (total := parts[0].split("tensors.count", len(self.tensors))) != len(self.tensors):
            raise parts[0].bad(f"damaged: split.tensors.count={total}, the {count} parts have {len(self.tensors)} tensors")

    def rows(self, name: str) -> np.ndarray:
        """The stored bytes of a tensor, a read-only view of the file: uint8 [all but the last axis, bytes of a row]."""
        return self._parts[name].rows(name)

    def read(self, name: str) -> np.ndarray:
        """A tensor's values: see gguf_types.dequantize."""
        return dequantize(self.tensors[name].type, self.rows(name))


def _siblings(opened: _Part, count: int) -> list[_Part]:
    """All parts of a split file, in order, of which `opened` is one of `count`."""
    name = PART_NAME.fullmatch(opened.path.name)
    if not name or int(name[3]) != count:
        raise opened.bad(f"is one of the {count} parts of a split model, whose names must be NAME-00001-of-{count:05}.gguf and so on")
    parts = []
    for number in range(1, count + 1):
        path = opened.path.with_name(f"{name[1]}-{number:05}-of-{count:05}.gguf")
        if not path.is_file():
            raise opened.bad(f"is one of the {count} parts of a split model, and part {path.name} is missing beside it")
        part = opened if path == opened.path else _Part(path)
        if (part.split("no", 0), part.split("count", 1)) != (number - 1, count):
            claims = f"split.no={part.split('no', 0)} and split.count={part.split('count', 1)}"
            raise part.bad(f"damaged: has {claims}, by its name they must be {number - 1} and {count}")
        parts.append(part)
    return parts


class _Part:
    """One file on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = file.seek(0, 2)
                if self.size < 24:
                    raise self.bad(f"not a GGUF file ({self.size} bytes; the header alone has 24)")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise self.bad(f"cannot be read ({error.strerror})") from None
        self._at, self._elements = 0, 0
        if self._take(4) != b"GGUF":
            raise self.bad("not a GGUF file (the first four bytes are not 'GGUF')")
        version = self._number("<I")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "big-endian files are not supported" if swapped in (2, 3) else "legal: 2, 3"
            raise self.bad(f"GGUF version {version}: {what}")
        tensors, pairs = self._number("<Q"), self._number("<Q")
        self._need(pairs * 13 + tensors * 32, f"{pairs} metadata entries and {tensors} tensors")
        self.metadata = self._read_metadata(pairs)
        self.tensors = self._read_tensors(tensors)

    def bad(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what}".replace("\n", " "))

    def split(self, field: str, default: int) -> int:
        """The integer under split.FIELD. Raises UserError when it is none."""
        value = self.metadata.get(f"split.{field}", default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
            raise self.bad(f"damaged: split.{field}={shown(value)}: must be an integer of at least 0")
        return value

    def _need(self, n: int, what: str) -> None:
        if n > self.size - self._at:
            raise self.bad(f"damaged or truncated: {what} at byte {self._at} need {n} bytes, the file has {self.size - self._at} left")

    def _take(self, n: int, what: str = "a field") -> bytes:
        self._need(n, what)
        self._at += n
        return self._map[self._at - n : self._at]

    def _number(self, code: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _text(self, what: str, limit: int) -> str:
        length = self._number("<Q")
        if length > limit:
            raise self.bad(f"damaged: {what} of {length} bytes at byte {self._at}; at most {limit} fit")
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError:
            raise self.bad(f"damaged: {what} before byte {self._at} is not UTF-8") from None

    def _read_metadata(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self._text("a metadata key", 65535)
            if key in found:
                raise self.bad(f"damaged: metadata key {shown(key)} occurs twice")
            found[key] = self._read_value(key, self._number("<I"))
        return found

    def _read_value(self, key: str, kind: int) -> Any:
        if kind == STRING:
            return self._text(f"the string {shown(key)}", self.size)
        if kind == ARRAY:
            return self._read_array(key)
        if kind not in SCALARS:
            raise self.bad(f"damaged: metadata key {shown(key)} has the unknown value type {kind}; legal: 0 to 12")
        dtype = np.dtype(SCALARS[kind])
        value = np.frombuffer(self._take(dtype.itemsize), dtype)[0].item()
        return bool(value) if kind == BOOL else value

    def _read_array(self, key: str) -> list[Any]:
        kind, count = self._number("<I"), self._number("<Q")
        what = f"{count} elements of {shown(key)}"
        self._elements += count
        if self._elements > MAX_ELEMENTS:
            raise self.bad(f"damaged: {what}; all arrays together may have at most {MAX_ELEMENTS}")
        if kind == ARRAY:
            raise self.bad(f"metadata key {shown(key)} is an array of arrays, which is not supported")
        if kind == STRING:
            self._need(count * 8, what)
            return self._read_strings(count, what)
        if kind not in SCALARS:
            raise self.bad(f"damaged: array {shown(key)} has the unknown element type {kind}; legal: 0 to 8, 10 to 12")
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
                    raise self.bad(f"damaged or truncated: {what}: a string of {length} bytes at byte {at}, the file has {size - at} left")
                strings.append(data[at : at + length].decode())
                at += length
        except UnicodeDecodeError:
            raise self.bad(f"damaged: {what}: the string at byte {at} is not UTF-8") from None
        except struct.error:
            raise self.bad(f"damaged or truncated: {what} run past the end of the file") from None
        self._at = at
        return strings

    def _read_tensors(self, count: int) -> dict[str, Tensor]:
        described: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self._text("a tensor name", 1024)
            if name in described:
                raise self.bad(f"damaged: tensor {shown(name)} occurs twice")
            dims = self._number("<I")
            if not 1 <= dims <= MAX_DIMS:
                raise self.bad(f"damaged: tensor {shown(name)} has {dims} dimensions; legal: 1 to {MAX_DIMS}")
            shape = struct.unpack(f"<{dims}Q", self._take(8 * dims))[::-1]
            described[name] = shape, self._number("<I"), self._number("<Q")
        alignment = self.metadata.get("general.alignment", 32)
        if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment not in [8 << i for i in range(18)]:
            raise self.bad(f"general.alignment={shown(alignment)}: must be a power of two from 8 to {8 << 17}")
        start = -(-self._at // alignment) * alignment
        tensors = {name: self._place(name, info, start, alignment) for name, info in described.items()}
        end, last = start, ""
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
            if tensor.offset < end:
                raise self.bad(f"damaged: tensors {shown(last)} and {shown(name)} overlap")
            end, last = tensor.offset + tensor.nbytes, name
        return tensors

    def _place(self, name: str, info: tuple[tuple[int, ...], int, int], start: int, alignment: int) -> Tensor:
        shape, kind, offset = info
        if kind not in TYPES:
            label = OTHER_TYPES.get(kind, "unknown")
            legal = ", ".join(entry.name for entry in TYPES.values())
            raise self.bad(f"tensor {shown(name)} has type {label} ({kind}), which is not supported; legal: {legal}")
        label, block, layout = TYPES[kind].name, TYPES[kind].elements, TYPES[kind].layout
        elements = 1
        for size in shape:
            elements *= size
        if not elements or shape[-1] % block:
            raise self.bad(f"damaged: tensor {shown(name)} of type {label} has shape {list(shape)}; rows must be whole blocks of {block}")
        nbytes = elements // block * layout.itemsize
        if offset % alignment or start + offset + nbytes > self.size:
            raise self.bad(
                f"damaged or truncated: tensor {shown(name)} {list(shape)} is {nbytes} bytes at byte {start + offset} "
                f"(aligned to {alignment}), the file has {self.size} bytes"
            )
        return Tensor(shape, kind, start + offset, nbytes)

    def rows(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        return np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.offset).reshape(*tensor.shape[:-1], -1)


def shown(value: object) -> str:
    """A value from the file for a message, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
