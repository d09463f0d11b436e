"""Prepared weights on disk: the flat tree of a dequantized, fused checkpoint, mapped back at the next start.

An entry is a folder with `weights.bin` (the leaves, each at a multiple of 4,096 bytes) and `meta.json` (the key, and
name, shape, dtype and offset of each leaf). It is written under a temporary name and renamed, so a reader sees a whole
entry or none. A store is only a cache: what does not fit the key and its own description is built again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llminfer.errors import UserError

# Part of every key: raise it when the layout of the leaves or of the file changes.
FORMAT_VERSION = 1
ALIGNMENT = 4096
SAMPLE_BYTES = 1 << 20
# Free space that an entry must leave on the disk.
SPARE_BYTES = 1 << 30
# A temporary folder this old belongs to a process that was killed.
STALE_SECONDS = 3600
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
TEMPORARY = ".writing-"

log = logging.getLogger(__name__)

Flat = dict[str, np.ndarray]


def cache_root(cache_dir: str | None) -> Path:
    """Our cache folder: `cache_dir`, else llminfer under $XDG_CACHE_HOME or ~/.cache. It need not exist yet."""
    if cache_dir:
        return Path(cache_dir).expanduser()
    # The XDG base directory specification: a relative path there is to be ignored.
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "llminfer"


def file_key(path: Path) -> dict[str, Any]:
    """What identifies the contents of a model file: path, size, modification time, sha256 of its first and last MB.

    Raises UserError when the file cannot be read."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            digest = hashlib.sha256(file.read(SAMPLE_BYTES))
            file.seek(max(0, status.st_size - SAMPLE_BYTES))
            digest.update(file.read(SAMPLE_BYTES))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return {"path": str(path.resolve()), "size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": digest.hexdigest()}


def prepared(key: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], build: Callable[[], Flat], root: Path) -> Flat:
    """The flat tree for `key` (JSON values, with "path"), mapped read-only from `root`, or built and then written there.

    shapes: the leaves that the tree must have; an entry that differs is built again. Entries of the same path with
    another key are removed after a write. When writing fails the built tree is returned and a warning logged."""
    key = {**key, "format": FORMAT_VERSION}
    text = json.dumps(key, sort_keys=True)
    prefix = hashlib.sha256(str(key["path"]).encode()).hexdigest()[:16]
    folder = root / f"{prefix}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    tree = _load(folder, key, shapes)
    if tree is not None:
        return tree
    tree = build()
    # Another process may have been faster.
    if (other := _load(folder, key, shapes, logging.DEBUG)) is not None:
        return other
    try:
        _write(folder, key, tree)
    except OSError as error:
        log.warning("prepared weights were not stored in %s (%s); they will be prepared again at the next start", root, error)
        return tree
    _remove_old(root, prefix, folder)
    # Mapped pages are shared between processes and need no swap; the built copy is freed.
    return _load(folder, key, shapes) or tree


def _load(folder: Path, key: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], level: int = logging.WARNING) -> Flat | None:
    """The mapped entry, or None (with a log line of `level`, unless there is none) when it is not whole and right."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        with (folder / "weights.bin").open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if meta["key"] != key or {name: tuple(leaf["shape"]) for name, leaf in meta["leaves"].items()} != dict(shapes):
            raise ValueError("it is of another model")
        end = 0
        tree = {}
        for name, leaf in meta["leaves"].items():
            dtype, shape, offset = DTYPES[leaf["dtype"]], shapes[name], leaf["offset"]
            if offset != _aligned(end):
                raise ValueError(f"{name} is not where it should be")
            count = int(np.prod(shape))
            tree[name] = np.frombuffer(data, dtype, count, offset).reshape(shape)
            end = offset + count * dtype.itemsize
        if len(data) != end:
            raise ValueError(f"weights.bin has {len(data)} bytes, not {end}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.log(level, "stored weights in %s are damaged (%s: %s); preparing them again", folder, type(error).__name__, error)
        return None
    if hasattr(data, "madvise"):
        data.madvise(mmap.MADV_WILLNEED)
    return tree


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _write(folder: Path, key: dict[str, Any], tree: Flat) -> None:
    """Writes the entry. Raises OSError, and then leaves nothing behind."""
    root = folder.parent
    root.mkdir(parents=True, exist_ok=True)
    _remove_stale(root)
    need = sum(_aligned(leaf.nbytes) for leaf in tree.values())
    free = shutil.disk_usage(root).free
    if free < need + SPARE_BYTES:
        raise OSError(f"{need / 1e9:.2f} GB needed and {SPARE_BYTES / 1e9:.2f} GB to spare, {free / 1e9:.2f} GB free")
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=root))
    try:
        leaves: dict[str, dict[str, Any]] = {}
        with (temporary / "weights.bin").open("wb") as file:
            for name, leaf in tree.items():
                file.seek(_aligned(file.tell()))
                leaves[name] = {"shape": list(leaf.shape), "dtype": leaf.dtype.name, "offset": file.tell()}
                file.write(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
            # Without this a power cut could leave a whole-looking file of zeros under the final name.
            file.flush()
            os.fsync(file.fileno())
        (temporary / "meta.json").write_text(json.dumps({"key": key, "leaves": leaves}))
        # One that is there was found damaged, so it gives way.
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_old(root: Path, prefix: str, keep: Path) -> None:
    for entry in root.glob(f"{prefix}-*"):
        if entry != keep:
            shutil.rmtree(entry, ignore_errors=True)


def _remove_stale(root: Path) -> None:
    for entry in root.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if time.time() - entry.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(entry, ignore_errors=True)
