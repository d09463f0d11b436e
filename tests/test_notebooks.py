"""Each notebook runs from top to bottom on a tiny model: its parameters cell is replaced."""

from __future__ import annotations

import asyncio
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.usefixtures("compiled_fast")

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def execute(path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a notebook with MODEL set to `model` and returns all that it printed. Raises CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    cell.source = f"MODEL = {model!r}"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    asyncio.run(client.async_execute())
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    return "".join(output.text for output in outputs if output.output_type == "stream")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_runs_on_a_tiny_model(path, tiny_directory, monkeypatch):
    printed = execute(path, str(tiny_directory), monkeypatch)
    assert "compiles_after_warmup: 0" in printed


@pytest.mark.demo
@pytest.mark.parametrize("path", NOTEBOOKS[:1], ids=lambda p: p.name)
def test_notebook_runs_on_the_demo_model(path, monkeypatch):
    assert "Paris" in execute(path, "demo", monkeypatch)
