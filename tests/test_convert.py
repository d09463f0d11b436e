"""python -m llminfer.convert: what comes out has the same weights, the same tokenizer and the same config, whatever went in."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from goldens import families
from safetensors import safe_open
from safetensors.numpy import save_file
from test_tokenizer_gguf import metadata as bpe_metadata
from test_tokenizer_spm import metadata as spm_metadata
from weights.gguf_writer import gguf_bytes, metadata_of, random_parts, tensors_of, tiny

from llminfer import cli, convert
from llminfer.errors import UserError
from llminfer.weights import Checkpoint, assemble, open_model, saving
from llminfer.weights.hf_config import from_hf
from llminfer.weights.hf_names import stored_tensors
from llminfer.weights.hf_write import to_hf

pytestmark = pytest.mark.usefixtures("compiled_fast")

TEXTS = ["Hello 1234", " a b  é!!\n\n", "<|turn|>a word<|end|>", "😀 \t", ""]


def call(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(convert.main, list(arguments))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def write_gguf(path: Path, **tokenizer) -> dict[str, np.ndarray]:
    """A tiny llama file with a byte-level tokenizer; returns its parts."""
    words = bpe_metadata(**tokenizer)
    c = tiny(vocab_size=len(words["tokenizer.ggml.tokens"]), num_kv_heads=4)
    parts = random_parts(c)
    path.write_bytes(gguf_bytes(metadata_of(c) | words, tensors_of(c, parts)))
    return parts


def write_hf(folder: Path, name: str) -> Path:
    """The golden model of a family as a Hugging Face directory."""
    config = from_hf(data := {"architectures": [families.MODELS[name][0]], **families.MODELS[name][1]}, name)
    shapes = {key: list(tensor.shape) for key, tensor in stored_tensors(data["architectures"][0], config).items()}
    folder.mkdir(parents=True)
    save_file(families.weights(shapes, name), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(data))
    return folder


def same_parts(one: Checkpoint, other: Checkpoint) -> bool:
    """Bitwise, and in everything but the name the same model."""
    assert one.tensors is not None and other.tensors is not None
    parts = assemble.part_shapes(one.config)
    equal = all((a := one.tensors.read(p)).tobytes() == (b := other.tensors.read(p)).tobytes() and a.dtype == b.dtype for p in parts)
    return equal and dataclasses.replace(one.config, name="") == dataclasses.replace(other.config, name="")


def same_tokenizer(one: Checkpoint, other: Checkpoint) -> bool:
    a, b = one.tokenizer(), other.tokenizer()
    ids = [[t.encode(text, add_special=add) for text in TEXTS for add in (False, True)] for t in (a, b)]
    talk = [t.apply_chat([{"role": "user", "content": "hi"}]) for t in (a, b) if t.chat_template]
    texts = [[t.decode(row, skip_special=skip) for row in ids[0] for skip in (False, True)] for t in (a, b)]
    return ids[0] == ids[1] and texts[0] == texts[1] and talk[:1] == talk[1:] and (a.bos_id, a.eos_ids) == (b.bos_id, b.eos_ids)


def test_gguf_to_safetensors_is_bitwise_the_same(capsys, tmp_path) -> None:
    parts = write_gguf(tmp_path / "m.gguf", template="{{ bos_token }}{{ messages[0]['content'] }}", eot_token_id=2, add_bos_token=True)
    code, out, err = call(capsys, "--model", str(tmp_path / "m.gguf"), "--out", str(tmp_path / "st"), "--json")
    report = json.loads(out)
    assert (code, err) == (0, "") and report["format"] == "safetensors" and report["tokenizer"] is True
    assert report["files"] == len(list((tmp_path / "st").iterdir()))
    was, now = open_model(str(tmp_path / "m.gguf")), open_model(str(tmp_path / "st"))
    assert same_parts(was, now) and same_tokenizer(was, now)
    assert all(now.tensors.read(part).tobytes() == array.tobytes() for part, array in parts.items())
    assert was.tokenizer().encode("a")[0] == 1 and now.config.eos_ids == (0, 2)
    with safe_open(tmp_path / "st/model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert (tmp_path / "st/model.safetensors").stat().st_mode & 0o777 == (tmp_path / "st/config.json").stat().st_mode & 0o777


def test_through_orbax_and_back(capsys, tmp_path) -> None:
    write_gguf(tmp_path / "m.gguf", add_eos_token=True)
    assert call(capsys, "--model", str(tmp_path / "m.gguf"), "--out", str(tmp_path / "ob"), "--format", "orbax")[0] == 0
    was, now = open_model(str(tmp_path / "m.gguf")), open_model(str(tmp_path / "ob"))
    assert now.config == was.config and same_tokenizer(was, now)
    leaves = dict(assemble.read_leaves(was.tensors, was.config))
    assert all(leaf.tobytes() == leaves[name].tobytes() for name, leaf in now.leaves())
    assert call(capsys, "--model", str(tmp_path / "ob"), "--out", str(tmp_path / "st"))[0] == 0
    assert same_parts(was, open_model(str(tmp_path / "st"))) and same_tokenizer(was, open_model(str(tmp_path / "st")))


def test_a_sentencepiece_tokenizer_travels(tmp_path) -> None:
    words = spm_metadata()
    c = tiny(vocab_size=len(words["tokenizer.ggml.tokens"]))
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(metadata_of(c) | words, tensors_of(c, random_parts(c))))
    was = open_model(str(tmp_path / "m.gguf"))
    convert.convert(was, tmp_path / "st", "safetensors", None, 10**9)
    assert same_tokenizer(was, open_model(str(tmp_path / "st"))) and was.tokenizer().encode("a")[0] == 1


@pytest.mark.parametrize("name", families.MODELS)
def test_every_family_has_a_config_and_names(tmp_path, name) -> None:
    """From a checkpoint that has no config.json of its own, as GGUF and Orbax have none."""
    was = open_model(str(write_hf(tmp_path / "hf", name)))
    bare = dataclasses.replace(was, directory=None, metadata=None, random=True)
    bare.tokenizer = lambda: None  # type: ignore[method-assign]
    convert.convert(bare, tmp_path / "st", "safetensors", None, 10**9)
    assert same_parts(was, open_model(str(tmp_path / "st")))


def test_a_directory_keeps_its_names_and_config(tmp_path) -> None:
    for name in ("cohere", "gemma3_vision"):
        folder = write_hf(tmp_path / name, name)
        was = open_model(str(folder))
        convert.convert(was, tmp_path / "out" / name, "safetensors", None, 10**9)
        assert same_parts(was, open_model(str(tmp_path / "out" / name)))
        assert json.loads((tmp_path / "out" / name / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_shards_have_an_index(tmp_path, tiny_directory) -> None:
    was = open_model(str(tiny_directory))
    convert.convert(was, tmp_path / "st", "safetensors", None, 100_000)
    index = json.loads((tmp_path / "st/model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "st").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)] and len(files) > 2
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == was.config.num_params * 4
    largest = max(np.prod(shape) for shape in assemble.part_shapes(was.config).values()) * 4
    assert all((tmp_path / "st" / f).stat().st_size < max(100_000, largest) + 10_000 for f in files)
    assert same_parts(was, open_model(str(tmp_path / "st"))) and same_tokenizer(was, open_model(str(tmp_path / "st")))
    copied = [p.name for p in tiny_directory.iterdir() if "token" in p.name]
    assert all((tmp_path / "st" / name).read_bytes() == (tiny_directory / name).read_bytes() for name in copied)


@pytest.mark.parametrize("kind", ["safetensors", "orbax"])
def test_dtypes(tmp_path, tiny_directory, kind) -> None:
    was = open_model(str(tiny_directory))
    exact = dict(was.leaves())
    for dtype, kept in (("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)):
        convert.convert(was, tmp_path / dtype, kind, dtype, 10**9)
        found = open_model(str(tmp_path / dtype))
        if kind == "safetensors":
            assert found.tensors.read("embed").dtype == kept
        for name, leaf in found.leaves():
            assert leaf.astype(np.float32).tobytes() == exact[name].astype(kept).astype(np.float32).tobytes()


def test_float16_that_overflows_is_refused(capsys, tmp_path, tiny_directory) -> None:
    shutil.copytree(tiny_directory, tmp_path / "big")
    with safe_open(tiny_directory / "model.safetensors", "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 70000
    save_file(tensors, tmp_path / "big/model.safetensors")
    for kind in ("safetensors", "orbax"):
        code, _, err = call(capsys, "--model", str(tmp_path / "big"), "--out", str(tmp_path / "o"), "--dtype", "float16", "--format", kind)
        assert code == 2 and "norm" in err and "legal: bfloat16, float32" in err and err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["big"]


def test_what_is_there_is_not_overwritten(capsys, tmp_path, tiny_directory, monkeypatch) -> None:
    (tmp_path / "o").mkdir()
    assert call(capsys, "--model", str(tiny_directory), "--out", str(tmp_path / "o"))[0] == 0  # an empty directory is none
    (tmp_path / "o/mine").write_text("x")
    arguments = ("--model", str(tiny_directory), "--out", str(tmp_path / "o"))
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "") and "--force replaces it" in err and (tmp_path / "o/mine").exists()
    with monkeypatch.context() as patch:
        patch.setattr(saving.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
        code, _, err = call(capsys, *arguments, "--force")
        assert code == 2 and "the disk has 0.00 GB free" in err and (tmp_path / "o/mine").exists()
    code, out, _ = call(capsys, *arguments, "--force")
    assert code == 0 and out.startswith(f"{tiny_directory} -> {tmp_path / 'o'} (safetensors, as stored): ")
    assert not (tmp_path / "o/mine").exists() and open_model(str(tmp_path / "o")).config.vocab_size > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "config:tiny"], "has no weights, only a config"),
        (["--model", "/nowhere"], "there is no such path"),
        (["--shard-gb", "0"], "--shard-gb=0"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--out", "FILE"], "is a file"),
        (["--out", "FILE/x"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, tiny_directory, arguments, said) -> None:
    (tmp_path / "FILE").write_text("x")
    named = [a.replace("FILE", str(tmp_path / "FILE")) for a in arguments]
    code, out, err = call(capsys, "--model", str(tiny_directory), "--out", str(tmp_path / "o"), *named)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["FILE"]


def test_a_model_that_no_architecture_is() -> None:
    with pytest.raises(UserError, match="legal: orbax"):
        to_hf(tiny(norm="layer", activation="gelu", attn_softcap=3.0), "float32")


def test_runs_from_orbax(tmp_path, tiny_directory) -> None:
    from llminfer.api import LLM

    convert.convert(open_model(str(tiny_directory)), tmp_path / "ob", "orbax", None, 10**9)
    logits = []
    for folder in (tiny_directory, tmp_path / "ob"):
        llm = LLM(str(folder), slots=1, context=64, chunk=32, expect=lambda _: (0, 0))  # only the logits
        logits.append(llm.prompt_logits(llm.encode("The same model, read twice.")))
        llm.close()
    assert logits[0].tobytes() == logits[1].tobytes()
