"""Our own checkpoint: a directory with llminfer.json (format, version, config), params (an Orbax checkpoint) and the tokenizer's
files, so that it is a whole model. Written whole or not at all; see saving.

The Orbax tree is the listed layout of llminfer.params: {"embed": ..., "layers": {"0": {"qkv": ..., ...}, ...}, ...}, a QTensor as
{"q": int8, int4 or uint8, "scale": float32 or bfloat16}; a weight that the family does not have is left out. Imports jax and orbax only
to read or write weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llminfer.config import ModelConfig, Rope
from llminfer.errors import UserError, refuse
from llminfer.progress import Progress, start
from llminfer.weights import saving
from llminfer.weights.safetensors import parse_object, read_bounded

FORMAT, VERSION = "llminfer", 1
CARD, WEIGHTS = "llminfer.json", "params"
MAX_CARD_BYTES = 10_000_000
LATE_SECONDS = 0.2  # in which threads of a read or write that failed come to their end
QUANTIZED = ("q", "scale")  # the fields of a QTensor


def save(directory: Path, leaves: Iterable[tuple[str, Any]], config: ModelConfig, files: Callable[[Path], None] | None = None) -> None:
    """Writes a checkpoint, in place of one that is there.

    leaves: named arrays or QTensors of the listed layout (assemble.leaves_of gives those of a tree), NumPy or jax, all of which are
    held in memory; files: writes the tokenizer's files into a folder. Raises UserError when there is no room for it."""
    from orbax.checkpoint import Checkpointer, PyTreeCheckpointHandler
    from orbax.checkpoint.args import PyTreeSave

    tree: dict[str, Any] = {}
    size = 0
    for name, leaf in leaves:
        stored = {field: getattr(leaf, field) for field in QUANTIZED} if hasattr(leaf, "scale") else leaf
        size += sum(array.nbytes for array in (stored.values() if isinstance(stored, dict) else (stored,)))
        *path, last = name.split(".")
        inner = tree
        for step in path:
            inner = inner.setdefault(step, {})
        inner[last] = stored
    with saving.replacing(directory, size) as folder, _quiet():
        # Weights do not compress: it takes three times as long for a tenth of the size.
        with Checkpointer(PyTreeCheckpointHandler(use_compression=False)) as writer:
            writer.save(folder / WEIGHTS, args=PyTreeSave(tree))
        if files is not None:
            files(folder)
        card = {"format": FORMAT, "version": VERSION, "config": dataclasses.asdict(config)}
        (folder / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def read_config(directory: Path) -> ModelConfig:
    """The config of a checkpoint of ours. Raises UserError for what is none, is damaged or of a newer version."""
    path = directory / CARD
    card = parse_object(read_bounded(path, MAX_CARD_BYTES), path)
    if card.get("format") != FORMAT or card.get("version") != VERSION:
        found = f"format {card.get('format')!r}, version {card.get('version')!r}"
        raise UserError(f"{path}: {found[:80]}: this version of llminfer reads format {FORMAT!r}, version {VERSION}")
    if not (directory / WEIGHTS).is_dir():
        raise UserError(f"{directory}: damaged: it has no folder {WEIGHTS}")
    try:
        return _config(card["config"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: damaged: {_plain(error)}") from None


def _config(data: Mapping[str, Any]) -> ModelConfig:
    fields = {field.name: field for field in dataclasses.fields(ModelConfig)}
    if unknown := sorted(data.keys() - fields.keys()):
        raise refuse("config", unknown[0], f"not a field of a model; legal: {', '.join(fields)}")
    for name, value in data.items():
        if isinstance(fields[name].default, bool) and not isinstance(value, bool):
            raise refuse(name, value, "legal: true, false")
    ropes = tuple(Rope(**_frozen(rope)) for rope in data["ropes"])
    return ModelConfig(**{**_frozen(data), "ropes": ropes})


def _frozen(values: Mapping[str, Any]) -> Any:
    """With tuples where JSON has lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def read_leaves(directory: Path, config: ModelConfig, progress: Progress | None = None) -> Iterator[tuple[str, Any]]:
    """The named leaves of a checkpoint, in the order of assemble.leaf_shapes, layer by layer: NumPy arrays as they were saved, and
    QTensors of them. Raises UserError, before the first is read, where they do not fit the config, and for damage."""
    import jax
    from orbax.checkpoint import Checkpointer, PyTreeCheckpointHandler, RestoreArgs
    from orbax.checkpoint.args import PyTreeRestore

    from llminfer.quant import QTensor

    where = directory / WEIGHTS
    with _readable(directory), _quiet(), Checkpointer(PyTreeCheckpointHandler()) as reader:
        stored: Any = reader.metadata(where).item_metadata.tree
        groups = _groups(stored, config, directory)
        task = start(progress, "Reading weights", len(groups))
        for number, names in groups.items():
            part = {name: stored[name] for name in names} if number is None else {"layers": {number: stored["layers"][number]}}
            as_numpy = jax.tree.map(lambda _: RestoreArgs(restore_type=np.ndarray), part)
            found: Any = reader.restore(where, args=PyTreeRestore(item=part, restore_args=as_numpy, partial_restore=True))
            for name in names:
                leaf = found[name] if number is None else found["layers"][number][name]
                array = QTensor(**leaf) if isinstance(leaf, dict) else leaf
                yield name if number is None else f"layers.{number}.{name}", array
            task.advance(1)
        task.done()


def _groups(stored: Any, config: ModelConfig, directory: Path) -> dict[str | None, list[str]]:
    """Number of a layer (None: outside) -> names of its leaves: what is restored at once. Raises UserError, see read_leaves."""
    from llminfer.weights.assemble import layer_of, leaf_shapes

    flat = {name: leaf for name, leaf in stored.items() if name != "layers"}
    flat |= {f"layers.{number}.{name}": leaf for number, layer in stored.get("layers", {}).items() for name, leaf in layer.items()}
    expected, found = leaf_shapes(config), {name: _shape(leaf) for name, leaf in flat.items()}
    if wrong := [name for name in {**expected, **found} if expected.get(name) != found.get(name)]:
        first, more = wrong[0], f" ({len(wrong) - 1} more differ)" if len(wrong) > 1 else ""
        raise UserError(f"{directory}: damaged: {first[:80]} is {found.get(first)}, expected {expected.get(first)}{more}")
    groups: dict[str | None, list[str]] = {}
    for name in expected:
        number, leaf = layer_of(name)
        groups.setdefault(None if number is None else str(number), []).append(leaf)
    return groups


def _shape(leaf: Any) -> tuple[int, ...]:
    """The shape of a leaf from its metadata; of a QTensor that of the matrix, () for what is neither."""
    if isinstance(leaf, dict):
        if tuple(sorted(leaf)) != QUANTIZED:
            return ()
        q, scale = list(leaf["q"].shape), tuple(leaf["scale"].shape)
        if len(q) > 1 and leaf["q"].dtype == np.uint8:  # MXFP4: two rows in one
            q[-2] *= 2
        whole = len(q) == len(scale) > 1 and (*scale[:-2], scale[-1]) == (*q[:-2], q[-1]) and scale[-2] and q[-2] % scale[-2] == 0
        return tuple(q) if whole else ()
    return tuple(getattr(leaf, "shape", ()))


@contextlib.contextmanager
def _readable(directory: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{directory}: damaged: its weights cannot be read ({_plain(error)})") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps off the screen what Orbax warns of its own work, and what its threads say after one of them has failed: they report to an
    event loop that is closed by then."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    before = logger.level

    def shown(event: Any) -> None:
        if str(event.exc_value) != "Event loop is closed":
            hook(event)

    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = shown
    try:
        yield
    except Exception:
        time.sleep(LATE_SECONDS)
        raise
    finally:
        sys.unraisablehook = hook
        logger.setLevel(before)


def _plain(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
