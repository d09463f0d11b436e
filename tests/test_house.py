"""The house rules that a machine can check: who imports whom, how long things are, and what is not written at all."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from strip_notebooks import strip

ROOT = Path(__file__).parent.parent
PACKAGES = ("llminfer", "pallas_kernels", "sharding")
FILES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NO_JAX = [Path("llminfer", name) for name in ("config.py", "errors.py", "request.py", "pages.py", "scheduler.py")]
MOST_LINES, MOST_FUNCTION, MOST_KERNEL, MOST_PARAMETERS = 500, 60, 150, 10

Function = ast.FunctionDef | ast.AsyncFunctionDef


def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def imports(tree: ast.AST) -> set[str]:
    """Top-level names of everything imported, anywhere in the file."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def length(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def longest(node: Function) -> int:
    """The length a function may have. A kernel reads its arguments through refs; a function inside one is part of it."""
    return MOST_KERNEL if "kernel" in node.name else MOST_FUNCTION


def parameters(node: Function) -> int:
    return len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_one_way(path):
    found = imports(parse(path))
    assert "torch" not in found, "no torch at run time"
    assert "tests" not in found
    if path.parts[0] in ("pallas_kernels", "sharding"):
        assert not found & {"llminfer", "flax"}, "arrays in, arrays out: it knows no model"
        assert not found & ({"pallas_kernels", "sharding"} - {path.parts[0]})
    if path in NO_JAX:
        assert not found & {"jax", "flax", "pallas_kernels", "sharding"}, "host side: no jax"


def test_host_files_import_no_jax_through_another():
    """What the host files import of llminfer at module level is host side too."""
    for path in NO_JAX:
        if not (ROOT / path).exists():
            continue
        for node in parse(path).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llminfer"):
                assert Path(*node.module.split(".")).with_suffix(".py") in NO_JAX, f"{path} imports {node.module}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_sizes(path):
    tree = parse(path)
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert lines < MOST_LINES
    for node in functions(tree):
        assert length(node) < longest(node), f"{node.name} at line {node.lineno}: {length(node)} lines"
        assert parameters(node) <= MOST_PARAMETERS or path.parts[0] != "llminfer", f"{node.name} at line {node.lineno}"


@pytest.mark.parametrize("path", [*FILES, *TESTS], ids=str)
def test_no_exception_is_swallowed(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ExceptHandler):
            assert not all(isinstance(s, ast.Pass) for s in node.body), f"line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_the_target_is_a_value(path):
    """Nobody asks which device is there; a program is made for the Target it was given."""
    called = {node.func.attr for node in ast.walk(parse(path)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)}
    named = {node.id for node in ast.walk(parse(path)) if isinstance(node, ast.Name)}
    assert "default_backend" not in called | named


def test_rules_see_what_they_look_for():
    """A rule that finds nothing anywhere proves nothing: each helper on a planted case."""
    tree = ast.parse("import jax.numpy as jnp\nfrom llminfer.config import x\ndef my_kernel(a, *, b):\n    return 1\n")
    assert imports(tree) == {"jax", "llminfer"}
    (node,) = functions(tree)
    assert (length(node), longest(node), parameters(node)) == (2, MOST_KERNEL, 2)
    assert {str(path.parent) for path in FILES} >= {"llminfer"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebooks_are_stripped(path):
    assert not strip(json.loads(path.read_text(encoding="utf-8"))), "run python tests/strip_notebooks.py notebooks/*.ipynb"


def test_strip_removes_outputs():
    notebook = {"cells": [{"cell_type": "code", "outputs": [{"output_type": "stream"}], "execution_count": 1}, {"cell_type": "markdown"}]}
    assert strip(notebook)
    assert notebook["cells"][0] == {"cell_type": "code", "outputs": [], "execution_count": None}
    assert not strip(notebook)


def test_ci_runs_the_command_of_the_readme():
    command = "python -m pytest -n 2"
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
    assert command in (ROOT / ".ci/run").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.name)
def test_configs_begin_with_their_command(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# python -m llminfer.")
    module = first.split()[3].split(".")[1]
    places = (ROOT / "llminfer" / f"{module}.py", ROOT / "llminfer" / module / "__main__.py")
    assert any(place.exists() for place in places), f"{first}: there is no such command"
