"""Opening a model from disk: `open_model` reads headers only, `Checkpoint.load` the weights. Imports no jax until then."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llminfer.config import ModelConfig, from_toml
from llminfer.errors import UserError, refuse
from llminfer.progress import Progress
from llminfer.weights import assemble, gguf, gguf_model, hf_names, hf_quant, hub, orbax, safetensors, store
from llminfer.weights.demo import demo_path
from llminfer.weights.hf_config import architecture_of, from_hf

if TYPE_CHECKING:
    from llminfer.params import Params

LEGAL = "legal: demo, a directory with config.json and safetensors or one of ours, a .gguf file, a Hugging Face id, or config:NAME"
MAX_CONFIG_BYTES = 10_000_000


@dataclass
class Checkpoint:
    """A model that was opened and found whole, as far as headers tell.

    source: what to call it in messages; random: it has no weights (config:NAME); metadata: of a GGUF file; directory: of a
    safetensors checkpoint or one of ours (then without tensors); prepared_root: where dequantized weights are kept between starts,
    None to keep none; prepared_key: their key."""

    config: ModelConfig
    source: str
    random: bool = False
    metadata: dict[str, Any] | None = None
    directory: Path | None = None
    prepared_root: Path | None = None
    prepared_key: dict[str, Any] | None = None
    tensors: assemble.Source | None = None

    def leaves(self, progress: Progress | None = None) -> Iterable[assemble.Leaf]:
        """The weights as named NumPy arrays (assemble.leaf_shapes), perhaps read-only: mapped where they were prepared before,
        else read one by one, so that never more than a few are in memory. bfloat16 where the file is no wider, else float32.
        Raises UserError; a random model has no weights."""
        if self.tensors is None and self.directory is not None:
            return orbax.read_leaves(self.directory, self.config, progress)
        if self.tensors is None:
            raise UserError(f"{self.source}: has no stored weights, only a config")
        tensors = self.tensors
        if self.prepared_root is None or self.prepared_key is None:
            return assemble.read_leaves(tensors, self.config, progress)
        build = lambda: dict(assemble.read_leaves(tensors, self.config, progress))
        return store.prepared(self.prepared_key, assemble.leaf_shapes(self.config), build, self.prepared_root).items()

    def load(self, progress: Progress | None = None) -> Params:
        """All of `leaves` as a tree in the listed layout."""
        return assemble.params_of(dict(self.leaves(progress)), self.config)

    def tokenizer(self) -> Any:
        """The model's tokenizer (llminfer.tokenizer), or None when the model has none."""
        if self.random or (self.metadata is not None and self.metadata.get("tokenizer.ggml.model", "none") in ("none", "no_vocab")):
            return None
        # Imports the tokenizers package, which a caller that only wants shapes does not need.
        from llminfer import tokenizer, tokenizer_gguf

        if self.metadata is not None:
            return tokenizer_gguf.from_gguf(self.metadata)
        return None if self.directory is None else tokenizer.from_directory(self.directory)


def open_model(model: str, cache_dir: str | None = None, progress: Progress | None = None) -> Checkpoint:
    """Opens a model by name and checks its headers; no weights are read and jax is not imported.

    model: "demo", a directory with config.json and safetensors or one that `orbax` wrote, a .gguf file, a Hugging Face id, or
    "config:NAME".
    cache_dir: see store.cache_root. progress: shows a download.
    Raises UserError for anything else, and for a damaged, incomplete or unsupported checkpoint."""
    if not isinstance(model, str) or not model or "\0" in model:
        raise refuse("model", model, LEGAL)
    if model.startswith("config:"):
        return Checkpoint(from_toml(model.removeprefix("config:")), model, random=True)
    if model == "demo":
        return _open_gguf(demo_path(cache_dir, progress), cache_dir)
    path = Path(model).expanduser()
    if path.is_dir():
        return _open_directory(path)
    if path.suffix == ".gguf" or path.is_file():
        return _open_gguf(path, cache_dir)
    if hub.is_id(model):
        folder, source = hub.fetch(model, _read_config, progress)
        found = _open_directory(folder)
        return replace(found, source=source, config=replace(found.config, name=source.partition("@")[0].rpartition("/")[2]))
    raise refuse("model", model, f"there is no such path; {LEGAL}")


def _open_gguf(path: Path, cache_dir: str | None) -> Checkpoint:
    file = gguf.GgufFile(path)
    config = gguf_model.read_config(file)
    source = gguf_model.GgufSource(file, config)
    assemble.check(source, config, str(path))
    root = store.cache_root(cache_dir) / "prepared"
    key = store.file_key(file.paths[0]) | {"parts": [store.file_key(part) for part in file.paths[1:]]}
    return Checkpoint(config, str(path), metadata=file.metadata, prepared_root=root, prepared_key=key, tensors=source)


def _open_directory(path: Path) -> Checkpoint:
    if (path / orbax.CARD).is_file():
        return Checkpoint(orbax.read_config(path), str(path), directory=path)
    if not (path / "config.json").is_file():
        foreign = f", and is an Orbax checkpoint without our {orbax.CARD}" if (path / "_CHECKPOINT_METADATA").exists() else ""
        raise UserError(f"{path}: has no config.json{foreign}; {LEGAL}")
    config, architecture = _read_config(path)
    source = hf_names.HfSource(hf_quant.Dequantized(safetensors.SafetensorsSource(path)), architecture, config)
    assemble.check(source, config, str(path))
    return Checkpoint(config, str(path), directory=path, tensors=source)


def _read_config(path: Path) -> tuple[ModelConfig, str]:
    data = _read_json(path / "config.json")
    generation = path / "generation_config.json"
    if generation.is_file():
        # Where both name end tokens, text generation follows generation_config.json.
        eos = _read_json(generation).get("eos_token_id")
        data = data if eos is None else {**data, "eos_token_id": eos}
    try:
        architecture = architecture_of(data)
        hf_quant.check(data, architecture, path)
        return from_hf(data, path.resolve().name), architecture
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: config.json has a field of the wrong type ({error})") from None


def _read_json(path: Path) -> dict[str, Any]:
    return safetensors.parse_object(safetensors.read_bounded(path, MAX_CONFIG_BYTES), path)


__all__ = ["Checkpoint", "open_model"]
