"""python -m llminfer.convert: any model that opens becomes a directory, of Hugging Face safetensors or of our own kind (Orbax)."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llminfer import cli
from llminfer.errors import refuse
from llminfer.progress import Progress, Task, start
from llminfer.weights import Checkpoint, assemble, hf_names, hf_quant, open_model, orbax, safetensors, saving
from llminfer.weights.hf_write import to_hf
from llminfer.weights.hub import TOKENIZER_FILES

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
GIGABYTE = 10**9


def main(arguments: list[str]) -> int:
    parser = cli.Parser(prog="python -m llminfer.convert", description="Write a model as a directory.")
    parser.add_argument("--model", default="demo", help="demo, a directory, a .gguf file, or a Hugging Face id (default: demo)")
    parser.add_argument("--out", required=True, metavar="DIR", help="the directory to write")
    parser.add_argument("--format", choices=["safetensors", "orbax"], default="safetensors", help="of the weights (default: safetensors)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the weights (default: as they are; of a GGUF file float32)")
    parser.add_argument("--shard-gb", default="5", help="largest safetensors file, in GB of 10^9 bytes (default: 5)")
    parser.add_argument("--force", action="store_true", help="replace a directory that is there and not empty")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    options = parser.parse_args(arguments)
    shard = cli.positive(options.shard_gb, "--shard-gb") * GIGABYTE
    out = Path(options.out).expanduser()
    if out.exists() and not out.is_dir():
        raise refuse("--out", options.out, "is a file; must be a directory, or not be there yet")
    if out.is_dir() and any(out.iterdir()) and not options.force:
        raise refuse("--out", options.out, "is there and not empty; --force replaces it")
    started = time.perf_counter()
    from llminfer.progress import RichProgress

    with RichProgress() as progress:
        checkpoint = open_model(options.model, progress=progress)
        convert(checkpoint, out, options.format, options.dtype, shard, progress)
    written = open_model(str(out))  # whole, as far as headers tell
    files = [path for path in out.rglob("*") if path.is_file()]
    report = {
        "model": checkpoint.source,
        "out": str(out),
        "format": options.format,
        "dtype": options.dtype or "as stored",
        "parameters": written.config.num_params,
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
        "tokenizer": any((out / name).is_file() for name in ("tokenizer.json", "tokenizer.model")),
        "seconds": time.perf_counter() - started,
    }
    if options.json:
        cli.print_json(report)
    else:
        size = f"{report['bytes'] / 1e9:.2f} GB in {report['files']} files, {report['seconds']:.1f} s"
        print(f"{checkpoint.source} -> {out} ({options.format}, {report['dtype']}): {report['parameters'] / 1e6:.0f}M parameters, {size}")
    return 0


def convert(checkpoint: Checkpoint, out: Path, kind: str, dtype: str | None, shard: int, progress: Progress | None = None) -> None:
    """Writes a model into `out`, whole or not at all. kind: "safetensors" or "orbax"; dtype: a key of DTYPES, None: as stored;
    shard: bytes of a safetensors file at most, and what is held in memory (for orbax it is the whole model).

    Raises UserError: no room, weights that float16 cannot hold, a model that transformers has no architecture for."""
    if kind == "orbax":
        leaves = ((name, _cast(leaf, dtype, name)) for name, leaf in _leaves(checkpoint, progress))
        orbax.save(out, leaves, checkpoint.config, lambda folder: write_tokenizer(checkpoint, folder))
        return
    config, tensors, count = _stored(checkpoint, dtype, progress)
    width = DTYPES[dtype or "float32"].itemsize if dtype or checkpoint.directory is None else 2
    with saving.replacing(out, checkpoint.config.num_params * width) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        task = start(progress, "Writing tensors", count)
        write_shards(folder, ((name, _cast(array, dtype, name)) for name, array in tensors), shard, task)
        task.done()
        write_tokenizer(checkpoint, folder)


def _leaves(checkpoint: Checkpoint, progress: Progress | None) -> Iterable[tuple[str, Any]]:
    """The leaves of a model, without the store of prepared weights, which would be a second copy on disk."""
    if checkpoint.random:
        raise refuse("--model", checkpoint.source, "has no weights, only a config")
    if checkpoint.tensors is None:
        return checkpoint.leaves(progress)
    return assemble.read_leaves(checkpoint.tensors, checkpoint.config, progress)


def _stored(checkpoint: Checkpoint, dtype: str | None, progress: Progress | None) -> tuple[dict[str, Any], Iterable[Any], int]:
    """(config.json, (name, array) of the tensors to store, how many). A Hugging Face checkpoint keeps its names and its config."""
    c, source = checkpoint.config, checkpoint.tensors
    if checkpoint.directory is not None and source is not None:
        path = checkpoint.directory / "config.json"
        data = safetensors.parse_object(safetensors.read_bounded(path), path)
        files: hf_names.Tensors = safetensors.SafetensorsSource(checkpoint.directory)
        if dtype is not None and data.pop("quantization_config", None):
            files = hf_quant.Dequantized(files)
        names = list(files.shapes())
        return _with_dtype(data, dtype), ((name, files.read(name)) for name in names), len(names)
    data = to_hf(c, dtype or "float32")
    if source is not None:
        parts: Iterator[tuple[str, np.ndarray]] = ((part, source.read(part)) for part in assemble.part_shapes(c))
    else:
        parts = assemble.parts_of(((name, _plain(leaf)) for name, leaf in _leaves(checkpoint, None)), c)
    architecture = data["architectures"][0]
    return data, hf_names.stored_from(parts, architecture, c), len(hf_names.stored_tensors(architecture, c))


def _with_dtype(data: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """config.json whose fields of the dtype, in either spelling and of an inner model too, say what is written."""
    if dtype is None:
        return data
    changed = {name: _with_dtype(value, dtype) if isinstance(value, dict) else value for name, value in data.items()}
    return changed | {name: dtype for name in ("dtype", "torch_dtype") if name in data}


def _plain(leaf: Any) -> np.ndarray:
    """A QTensor as the float32 matrix that it stands for."""
    if not hasattr(leaf, "scale"):
        return leaf
    from llminfer.quant import dequantize

    return dequantize(leaf)


def _cast(array: Any, dtype: str | None, name: str) -> Any:
    if dtype is None:
        return array
    with np.errstate(over="ignore"):
        narrow = _plain(array).astype(DTYPES[dtype], copy=False)
    if dtype == "float16" and not np.isfinite(narrow).all():
        raise refuse("--dtype", dtype, f"{name} has values beyond what it holds (65,504); legal: bfloat16, float32")
    return narrow


def write_shards(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shard: int, task: Task) -> None:
    """model.safetensors, or several of at most `shard` bytes (a larger tensor has its own) and their index. Source: the naming of
    transformers' save_pretrained."""
    from safetensors.numpy import save_file

    held: dict[str, np.ndarray] = {}
    homes: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        path = folder / f"{len(homes)}.part"
        save_file(held, path, metadata={"format": "pt"})
        path.chmod(folder.stat().st_mode & 0o666)  # the package makes files that only their owner may read
        homes.append(list(held))
        held.clear()

    for name, array in tensors:
        if held and size + array.nbytes > shard:
            flush()
            size = 0
        held[name] = np.ascontiguousarray(array)
        size, total = size + array.nbytes, total + array.nbytes
        task.advance(1)
    flush()
    if len(homes) == 1:
        (folder / "0.part").rename(folder / safetensors.SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(homes):
        file = f"model-{number + 1:05d}-of-{len(homes):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / safetensors.INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """The tokenizer's files: copied from a directory, or made of a GGUF file's tokenizer; and the end tokens."""
    generation: dict[str, Any] = {}
    if checkpoint.directory is not None:
        for pattern in TOKENIZER_FILES:
            for path in checkpoint.directory.glob(pattern):
                target = folder / path.relative_to(checkpoint.directory)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
        path = folder / "generation_config.json"
        generation = safetensors.parse_object(safetensors.read_bounded(path), path) if path.is_file() else {}
    elif (tokenizer := checkpoint.tokenizer()) is not None:
        tokenizer.save(folder)
    c = checkpoint.config
    ends = {"bos_token_id": c.bos_id, "eos_token_id": list(c.eos_ids) or None}
    generation |= {name: value for name, value in ends.items() if value is not None}
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.leave(cli.main(main, sys.argv[1:]))
