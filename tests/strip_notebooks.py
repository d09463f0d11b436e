"""Removes outputs from notebooks in place: python tests/strip_notebooks.py NOTEBOOK... Exits with 1 if a file changed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def strip(notebook: dict[str, Any]) -> bool:
    """Removes the outputs and execution counts of a notebook (nbformat 4, parsed), in place. True if there were any."""
    changed = False
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and (cell["outputs"] or cell["execution_count"] is not None):
            cell["outputs"], cell["execution_count"] = [], None
            changed = True
    return changed


def main(paths: list[str]) -> int:
    """Strips each file that has outputs and names it."""
    found = 0
    for path in map(Path, paths):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if strip(notebook):
            path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(f"{path}: outputs removed")
            found = 1
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
